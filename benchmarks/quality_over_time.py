"""Swap success on held-out images over the minutes of training: preset `quick` against the paper's network.

Both train at the same image size on the images and predictions of a run, in this process, on all cores; looking at the
held-out images does not count. The curves go to a CSV and a picture beside this file.

python benchmarks/quality_over_time.py --run runs/chest_xray-quick --minutes 2 5 10 20 30
"""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from record import append, machine

from cae import classifiers, training
from cae.classifiers import BlackBox
from cae.config import PRESETS, Preset
from cae.explain import swap
from cae.images import to_tensor
from cae.losses import needs_blackbox
from cae.networks import CAE, Discriminator
from pipelines.bulk import read_images, read_table
from pipelines.cluster import place
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Run folder with the stages shard and classify."""
    minutes: tuple[float, ...] = (2, 5, 10, 20, 30)
    """When to look."""
    presets: tuple[Preset, ...] = ("quick", "paper")
    """Presets to train, one after the other."""
    image_size: int = 64
    """Image size for all."""
    seed: int = 0
    """Seed of weights and pairs."""


def success(cae: CAE, blackbox: BlackBox, images: np.ndarray, y: np.ndarray) -> float:
    """Share of held-out images (N, S, S, 3) that b gives the class of the random donor of their class code."""
    rng = np.random.default_rng(0)
    donors = np.array([rng.choice(np.flatnonzero(y != mine)) for mine in y])
    hits = 0
    for i in np.array_split(np.arange(len(y)), max(1, len(y) // 64)):
        _, swapped = swap(cae, to_tensor(images[i]), to_tensor(images[donors[i]]))
        hits += int((blackbox.probabilities(swapped).argmax(1).numpy() == y[donors[i]]).sum())
    return hits / len(y)


def train(options: Options, preset: Preset) -> list[dict[str, object]]:
    """Train one preset and look at it at the given minutes."""
    run, config = Run(options.run), PRESETS[preset]
    chosen = run.result("classify")
    table = read_table(run, "predictions", ["id", "split", "predicted"]).to_pandas()
    known, held_out = table[table.split == "train"], table[table.split == "val"]
    model = replace(config.model, image_size=options.image_size)
    if model.channels == 0:
        model = replace(model, channels=1 if run.result("shard")["grey"] else 3)
    images = read_images(run, known.id.to_numpy(), options.image_size, "crop")
    labels = known.predicted.to_numpy(np.int64)
    watched, y = read_images(run, held_out.id.to_numpy(), options.image_size, "crop"), held_out.predicted.to_numpy()
    pairs = training.draw_pairs(labels, config.train, options.seed)
    torch.manual_seed(options.seed)
    blackbox = place(classifiers.load(chosen["spec"], tuple(chosen["classes"])), "cpu")
    cae, discriminator = place(CAE(model), "cpu"), place(Discriminator(model, len(chosen["classes"])), "cpu")
    spent, begun = 0.0, time.perf_counter()
    training.warm_up(cae, discriminator, images, labels, config.train, options.seed)
    batch = config.train.batch
    steps = len(pairs.index) // batch
    asked = blackbox if needs_blackbox(config.train.class_head) else None
    trainer = training.Trainer(cae, discriminator, config.train, config.weights, steps, asked)
    rows: list[dict[str, object]] = []
    left = sorted(options.minutes)
    while left:
        spent += time.perf_counter() - begun
        if spent >= 60 * left[0] or trainer.step_count == steps:
            share = success(trainer.best, blackbox, watched, y)
            rows.append({
                "date": datetime.date.today().isoformat(), "machine": machine(), "preset": preset, "seed": options.seed,
                "minutes": left.pop(0), "pairs": trainer.step_count * batch, "swap_success": f"{share:.3f}",
            })  # fmt: skip
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if k not in ("date", "machine")), flush=True)
        begun = time.perf_counter()
        if trainer.step_count == steps:
            continue  # trained to its end: the rest of the points are this one
        step = trainer.step_count
        index = pairs.index[step * batch : (step + 1) * batch].T.reshape(-1)
        mirrored = pairs.flip[step * batch : (step + 1) * batch].T.reshape(-1)
        chunk = images[index]
        chunk[mirrored] = chunk[mirrored, :, ::-1]
        trainer.step(to_tensor(chunk), torch.tensor(labels[index]))
    return rows


def main(options: Options) -> None:
    """Train, append to the table, draw."""
    rows = [row for preset in options.presets for row in train(options, preset)]
    append(TABLE, rows)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for preset in options.presets:
        mine = [row for row in rows if row["preset"] == preset]
        axes.plot([row["minutes"] for row in mine], [float(str(row["swap_success"])) for row in mine], "o-",
                  label=preset)  # fmt: skip
    axes.set(xlabel="minutes of training", ylabel="swap success, val", ylim=(0, 1))
    axes.legend()
    figure.savefig(TABLE.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
