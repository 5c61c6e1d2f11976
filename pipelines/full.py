"""All stages in order: images to shards, classifier, class association embedding, codes, maps, measurements, report.

    python pipelines/full.py --dataset synthetic --preset quick

Calling it again on the same run folder does what is not done yet, and nothing else.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from pipelines import classify, embed, evaluate, explain, shard, train, tune
from pipelines import run as runs
from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run
from pipelines.ways import check_donors

STAGES: dict[str, Callable[[Any], Any]] = {
    "shard": shard.main,
    "classify": classify.main,
    "tune": tune.main,
    "train": train.main,
    "embed": embed.main,
    "explain": explain.main,
    "evaluate": evaluate.main,
}


@dataclass(frozen=True)
class FullOptions(evaluate.EvaluateOptions, tune.TuneOptions):
    """Explain what a classifier looks at, across a whole data set: all stages, or those named in --stages."""

    stages: tuple[str, ...] = tuple(STAGES)
    """Stages to do, in order."""
    tune: int = 0
    """Trials of a search for loss weights before training, which then takes the best ones; 0: no search."""
    trials: tyro.conf.Suppress[int] = 1


def _check(options: FullOptions, stages: list[str], before: dict[str, Any]) -> None:
    """Refuse what later stages would, before any work and as soon as the classifier is known, not after the training.

    The stages before have noted it down as what further calls of the run take: that is `before` again.
    """
    run = Run(options.run)
    made = run.state["stages"].get("shard", {}).get("options", {})
    decisive = ("dataset", "data_root", "classifier")
    renewed = any(made.get(name) != getattr(options, name) for name in decisive)  # the classes may be others then
    known = run.result("classify") if run.done("classify") and not renewed else None
    to_do = {stage for stage in stages if options.again or not run.done(stage)}
    try:
        if "tune" in to_do and "train" in stages and not options.again and run.bound("train"):
            raise UserError(
                f"--tune {options.tune}: the CAE is trained already, or half, and would not take what is found: "
                "--stages tune searches alone, --tune 0 not at all; or begin another --run"
            )
        if "train" in to_do:
            train.check(options)
        if "explain" in to_do:
            check_donors(options)
            if known:
                explain.check(options, known)
        if {"tune", "train", "evaluate"} & to_do:
            train.open_oracle(options, known or {})
    except ValueError as error:
        name = str(error).split()[0].removeprefix("--").replace("-", "_")  # which it begins with
        if name in before:
            run.state["options"][name] = before[name]
        else:
            run.state["options"].pop(name, None)
        if run.state["stages"]:
            run.save()
        raise


def main(options: FullOptions) -> None:
    """Do the stages and say where the results are."""
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise UserError(f"--stages {unknown[0]}: choose among {', '.join(STAGES)}")
    stages = [name for name in STAGES if name in options.stages and (name != "tune" or options.tune)]
    run = Run(options.run)
    if options.tune and run.done("tune") and not options.again:
        options = tune.best_of(run, options)
    if not options.again and all(run.done(stage) for stage in stages):
        runs.refuse_contradictions(run, options)
        print(f"nothing to do: {', '.join(stages)} are done in {run.folder}")
    else:
        begun, before = time.time(), dict(run.state["options"])
        _check(options, stages, before)
        print(f"{options.dataset}, preset {options.preset}, run folder {run.folder}", flush=True)
        for name in stages:
            if name == "tune":
                tune.main(replace(options, trials=options.tune))
                options = tune.best_of(run, options)
            else:
                STAGES[name](options)
            if name == "classify":
                _check(options, stages, before)
        print(f"finished in {(time.time() - begun) / 60:.1f} min")
    run = Run(options.run)
    if run.done("evaluate"):
        print(f"report    {run.path('report.html')}")
        print(f"pictures  {run.path('figures')}/")
    uri = run.state.get("tracking_uri", "")
    mlflow = shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    where = uri if uri.startswith("http") else f"{mlflow} ui --backend-store-uri {shlex.quote(uri)}"
    print(f"MLflow    {where}")


if __name__ == "__main__":
    command(FullOptions, main)
