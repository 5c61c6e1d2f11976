"""Swap success on held-out images over the CPU minutes of training: preset `quick` against the paper's network.

Both train at the same image size on the images and predictions of a run, in this process; warm-ups count, looking at
the held-out images does not. `quick` is a schedule with an end: for fewer minutes than it takes, it is trained anew,
all of it shortened in proportion, as a person would who has only these minutes, and seen at its end; the table has the
minutes that it took. The paper's schedule ends after days here and is read on its way, at its full rate: that and the
gradient of the classifier, which `quick` descends through and the paper's class head does not, favour `quick`. So the
oracle, which neither has seen, counts beside the classifier. Curves go to a CSV and a picture beside this file.

python benchmarks/quality_over_time.py --run runs/chest_xray-quick --oracle runs/chest-1/classifier
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from here import as_workers_run, blackbox_of, data, training_of
from matplotlib.figure import Figure
from record import append, here_and_now, program, say

from cae import classifiers
from cae.config import PRESETS, PresetConfig
from cae.images import to_tensor
from cae.judgement import draw_donors, judge
from cae.training import Trainer
from pipelines.cluster import place
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
Compared = Literal["quick", "paper"]
SEEN = ("swap_success", "oracle_success", "keeps_class", "reconstruction_error")


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Run folder with the stages shard and classify."""
    oracle: str
    """Folder of a second classifier, trained apart."""
    minutes: tuple[float, ...] = (2, 5, 10, 20, 35)
    """When to look, in CPU minutes (a minute of two threads is two)."""
    whole: float = 35.0
    """CPU minutes that `quick` takes here, reckoned from whole runs: for fewer, it gets that share of its warm-ups,
    pairs and average."""
    presets: tuple[Compared, ...] = ("quick", "paper")
    """Presets to train, one after the other."""
    image_size: int = 64
    """Image size for all."""
    seed: int = 0
    """Seed of weights and pairs."""
    threads: int = 1
    """CPU threads."""


def quick(share: float, size: int) -> PresetConfig:
    """The preset with a share of its schedule, at most all of it: warm-ups, pairs, and the memory of the average."""
    share, preset = min(1.0, share), PRESETS["quick"]
    train = replace(
        preset.train, warm_up=round(share * preset.train.warm_up), pairs=round(share * preset.train.pairs),
        recon_warm_up=round(share * preset.train.recon_warm_up), ema=max(0.0, 1 - (1 - preset.train.ema) / share),
    )  # fmt: skip
    return replace(preset, train=train, model=replace(preset.model, image_size=size))


def paper(size: int) -> PresetConfig:
    """The preset at another image size."""
    return replace(PRESETS["paper"], model=replace(PRESETS["paper"].model, image_size=size))


def train(options: Options, preset: Compared, config: PresetConfig, minutes: Sequence[float] = ()) -> None:
    """Train once, and add to the table what is seen at the given minutes or, without any, at its end."""
    run = Run(options.run)
    size, blackbox = options.image_size, blackbox_of(run)
    oracle = place(classifiers.load(options.oracle, blackbox.classes), "cpu")
    known, held_out = data(run, "train", size), data(run, "val", size)
    x, y, donors = to_tensor(held_out.images), held_out.y, draw_donors(held_out.y)
    target, others = torch.from_numpy(y[donors]), torch.from_numpy(donors)

    def see(trainer: Trainer, seconds: float) -> None:
        found = judge(trainer.best, blackbox, x, target, others, oracle).measures
        row = {
            **here_and_now(), "run": Path(options.run).name,
            "size": size, "preset": preset, "seed": options.seed, "threads": options.threads,
            "minutes": f"{seconds / 60:.1f}", "pairs": trainer.step_count * trainer.config.batch,
            **{name: f"{found[name]:.3f}" for name in SEEN},
        }  # fmt: skip
        say(row)
        append(TABLE, [row])

    spent, begun, trainer, left = 0.0, time.process_time(), None, sorted(minutes)
    for trainer in training_of(run, known, config, options.seed):
        now = spent + time.process_time() - begun
        if left and now >= 60 * left[0]:
            see(trainer, now)
            left = [at for at in left if now < 60 * at]  # a warm-up may pass several
            spent, begun = now, time.process_time()
            if not left:
                return
    assert trainer is not None
    see(trainer, spent + time.process_time() - begun)


def main(options: Options) -> None:
    """Train, append to the table, draw what it holds of this run, size and seed."""
    torch.set_num_threads(options.threads)
    for preset in options.presets:
        if preset == "paper":
            train(options, preset, paper(options.image_size), options.minutes)
        else:
            for share in sorted({min(1.0, minutes / options.whole) for minutes in options.minutes}):
                train(options, preset, quick(share, options.image_size))
    with TABLE.open() as file:
        same = (Path(options.run).name, str(options.image_size), str(options.seed))
        rows = [row for row in csv.DictReader(file) if (row["run"], row["size"], row["seed"]) == same]
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for measure, style, what in (("swap_success", "o-", "classifier"), ("oracle_success", "s--", "oracle")):
        for preset, color in (("quick", "C0"), ("paper", "C1")):
            mine = sorted(
                (float(row["minutes"]), float(row[measure])) for row in rows if row["preset"] == preset and row[measure]
            )
            if mine:
                axes.plot(*zip(*mine, strict=True), style, color=color, label=f"{preset}, {what}")
    axes.set(xlabel="CPU minutes of training", ylabel="swaps believed, val", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(TABLE.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    as_workers_run()
    program(Options, main, __doc__)
