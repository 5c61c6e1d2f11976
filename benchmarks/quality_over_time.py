"""Swap success on held-out images over the CPU minutes of training: preset `quick` against the paper's network.

Both train at the same image size on the images and predictions of a run, in this process; warm-ups count, looking at
the held-out images does not. `quick` is a schedule with an end: asked for fewer minutes than it takes, it is trained
anew with all of it shortened in proportion, as a person would who has only these minutes. The paper's has no end within
reach and is read on its way. The curves go to a CSV and a picture beside this file.

python benchmarks/quality_over_time.py --run runs/chest_xray-quick --minutes 2 5 10 20 30
"""

from __future__ import annotations

import csv
import datetime
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from here import as_workers_run, blackbox_of, data, training_of
from matplotlib.figure import Figure
from record import append, machine

from cae.config import PRESETS, Preset, PresetConfig
from cae.images import to_tensor
from cae.judgement import Judgement, draw_donors, judge
from cae.training import Trainer
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Run folder with the stages shard and classify."""
    minutes: tuple[float, ...] = (2, 5, 10, 20, 30)
    """When to look, in CPU minutes (a minute of two threads is two)."""
    whole: float = 25.0
    """CPU minutes that `quick` takes here: for fewer, it gets that share of its warm-ups, pairs and average."""
    presets: tuple[Preset, ...] = ("quick", "paper")
    """Presets to train, one after the other."""
    image_size: int = 64
    """Image size for all."""
    seed: int = 0
    """Seed of weights and pairs."""
    threads: int = 1
    """CPU threads."""


def shortened(config: PresetConfig, share: float) -> PresetConfig:
    """The preset with a share of its schedule, at most all of it: warm-ups, pairs, and the memory of the average."""
    share, train = min(1.0, share), config.train
    shorter = replace(
        train, warm_up=round(share * train.warm_up), recon_warm_up=round(share * train.recon_warm_up),
        pairs=round(share * train.pairs), ema=1 - (1 - train.ema) / share,
    )  # fmt: skip
    return replace(config, train=shorter)


def train(
    options: Options, preset: Preset, config: PresetConfig, minutes: tuple[float, ...]
) -> list[dict[str, object]]:
    """Train once and look at the given minutes; those after the training's end see its end."""
    run = Run(options.run)
    size, blackbox = options.image_size, blackbox_of(run)
    known, held_out = data(run, "train", size), data(run, "val", size)
    x, y, donors = to_tensor(held_out.images), held_out.y, draw_donors(held_out.y)
    target, others = torch.from_numpy(y[donors]), torch.from_numpy(donors)
    rows: list[dict[str, object]] = []
    left = sorted(minutes)
    spent, begun = 0.0, time.process_time()
    trainer = None

    def see(trainer: Trainer, at: float) -> dict[str, object]:
        return look(trainer, preset, at, options, judge(trainer.best, blackbox, x, target, others))

    for trainer in training_of(run, known, config, options.seed):
        now = spent + time.process_time() - begun
        if now >= 60 * left[0]:
            rows.append(see(trainer, now / 60))
            left = [at for at in left if now < 60 * at]  # a warm-up may pass several
            spent, begun = now, time.process_time()
        if not left:
            return rows
    assert trainer is not None
    ended = (spent + time.process_time() - begun) / 60
    return [*rows, see(trainer, ended)]


def look(trainer: Trainer, preset: Preset, minutes: float, options: Options, found: Judgement) -> dict[str, object]:
    """A row of the table."""
    row = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "run": Path(options.run).name,
        "size": options.image_size, "preset": preset, "seed": options.seed, "minutes": f"{minutes:.1f}",
        "pairs": trainer.step_count * trainer.config.batch,
        "swap_success": f"{found.measures['swap_success']:.3f}", "keeps_class": f"{found.measures['keeps_class']:.3f}",
        "reconstruction_error": f"{found.measures['reconstruction_error']:.3f}",
    }  # fmt: skip
    print("  ".join(f"{k} {v}" for k, v in row.items() if k not in ("date", "machine")), flush=True)
    return row


def main(options: Options) -> None:
    """Train, append to the table, draw what it holds of this run, size and seed."""
    torch.set_num_threads(options.threads)
    for preset in options.presets:
        config = PRESETS[preset]
        config = replace(config, model=replace(config.model, image_size=options.image_size))
        if preset == "paper":
            append(TABLE, train(options, preset, config, options.minutes))
        else:
            for minutes in options.minutes:
                append(TABLE, train(options, preset, shortened(config, minutes / options.whole), (minutes,)))
                if minutes >= options.whole:
                    break  # longer than to its end it does not train
    with TABLE.open() as file:
        same = (Path(options.run).name, str(options.image_size), str(options.seed))
        rows = [row for row in csv.DictReader(file) if (row["run"], row["size"], row["seed"]) == same]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for preset in sorted({row["preset"] for row in rows}, reverse=True):
        mine = [row for row in rows if row["preset"] == preset]
        axes.plot([float(row["minutes"]) for row in mine], [float(row["swap_success"]) for row in mine], "o-",
                  label=preset)  # fmt: skip
    axes.set(xlabel="CPU minutes of training", ylabel="swap success, val", ylim=(0, 1))
    axes.legend()
    figure.savefig(TABLE.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    as_workers_run()
    main(tyro.cli(Options, description=__doc__))
