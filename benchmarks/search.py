"""Are the weights that a search found better than those it started from? Both train anew, on seeds it never saw.

On a run with a finished search (`pipelines/tune.py`): for every seed one training with each, in turn, with the same
classifier, warm-up, pairs and threads, then measured as trials are (`cae.judgement`) on val, by which the search chose,
and on test, which it has not seen. Equally many pairs take the same time, unless the search had `--also class_head`.
Rows go to `search.csv`, networks to the run's `compare/`, curves and swaps to its MLflow.

python benchmarks/search.py --run runs/chest_xray-quick --pairs 5000
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from record import append, here_and_now, program, say

from cae import classifiers, training
from cae.blackboxes import resolve
from cae.images import to_tensor
from cae.judgement import draw_donors, judge
from pipelines import run as runs
from pipelines.bulk import read_images, read_table
from pipelines.cluster import connect
from pipelines.command_line import parse
from pipelines.run import Run
from pipelines.train import TrainOptions, fit, plan
from pipelines.tune import MEASURES

TABLE = Path(__file__).with_suffix(".csv")
KEPT = "compare"


@dataclass(frozen=True)
class Options:
    """What to compare, and how long to train."""

    run: str
    """Run folder with a finished search."""
    pairs: int = 5000
    """Pairs of each training."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the trainings. The search's own would favour what it found."""
    images: int = 400
    """Images of each split that are measured, at most."""
    threads: int = 0
    """CPU threads of a training; 0: all cores."""


def train(run: Run, options: TrainOptions, name: str) -> float:
    """Train from the beginning and save in `compare/NAME`; returns the seconds it took, warm-up included if it had to.

    Both trainings of a seed start from the same warmed-up networks.
    """
    if run.fs.exists(run.path("checkpoints", KEPT, name)):  # of a call that was killed
        run.fs.rm(run.path("checkpoints", KEPT, name), recursive=True)
    begun = time.time()
    with mlflow.start_run(run_name=f"{KEPT} {name}"):
        mlflow.log_params(runs.flat(options))
        fit(run, options, f"{KEPT}/{name}", plan(run, options), save=run.path(KEPT, name),
            start=f"checkpoints/{KEPT}/{options.seed}.pt")  # fmt: skip
    return time.time() - begun


def measure(run: Run, options: TrainOptions, name: str, split: str, images: int) -> tuple[int, dict[str, float]]:
    """How many images of a split, and what `judge` says of the CAE in `compare/NAME` on them."""
    chosen = run.result("classify")
    names = tuple(chosen["classes"])
    blackbox = classifiers.load(chosen["spec"], names)
    oracle = classifiers.load(resolve(options.oracle, options.trust_pickle), names) if options.oracle else None
    table = read_table(run, "predictions", ["id", "split", "predicted"]).to_pandas()
    table = table[table.split == split]
    table = table.sample(min(images, len(table)), random_state=0)  # the same for all
    y = table.predicted.to_numpy(np.int64)
    donors = draw_donors(y)
    x = to_tensor(read_images(run, table.id.to_numpy(), options.model.image_size, options.fit))
    found = judge(
        training.load(run.path(KEPT, name)), blackbox, x, torch.from_numpy(y[donors]), torch.from_numpy(donors), oracle
    )
    return len(table), found.measures


def main(options: Options) -> None:
    """Train, measure, append to the table, and print the means."""
    run = Run(os.path.abspath(options.run))
    run.result("tune")
    with run.fs.open(run.path("tune", "best.json")) as file:
        found = json.load(file)
    common = parse(TrainOptions, ["--run", run.folder, "--threads", str(options.threads)])
    connect()
    mlflow.set_tracking_uri(run.state["tracking_uri"])
    mlflow.set_experiment(common.experiment)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for weights, given in {"start": found["start"], "best": found}.items():
            name = f"{weights}-{seed}"
            trained = replace(
                common, seed=seed, weights=replace(common.weights, **given["weights"]),
                train=replace(common.train, pairs=options.pairs, epochs=0.0, **given["train"]),
            )  # fmt: skip
            seconds = train(run, trained, name)
            done = []
            for split in ("val", "test"):
                images, measures = measure(run, trained, name, split, options.images)
                done.append({
                    **here_and_now(), "run": Path(run.folder).name,
                    "weights": weights, "seed": seed, "pairs": options.pairs, "seconds": round(seconds), "split": split,
                    "images": images,
                } | {measure: f"{measures.get(measure, np.nan):.4f}" for measure in MEASURES})  # fmt: skip
                say(done[-1])
            append(TABLE, done)
            rows += done
    run.fs.rm(run.path("checkpoints", KEPT), recursive=True)
    table = pd.DataFrame(rows).astype(dict.fromkeys(MEASURES, float))
    print(table.groupby(["split", "weights"], sort=False)[list(MEASURES)].mean().round(3).T.to_string())


if __name__ == "__main__":
    program(Options, main, __doc__)
