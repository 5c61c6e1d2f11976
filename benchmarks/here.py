"""What benchmarks share that train a CAE in their own process: on the images and predictions of a run."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from cae import classifiers, training
from cae.classifiers import BlackBox
from cae.config import PresetConfig
from cae.images import to_tensor
from cae.networks import CAE, Discriminator
from pipelines.bulk import read_images, read_table
from pipelines.cluster import KEEP_MEMORY, WORKERS, place
from pipelines.run import Run


def as_workers_run() -> None:
    """Start this program anew with the environment that training workers have, unless it has it; called first."""
    theirs = WORKERS | KEEP_MEMORY
    if not theirs.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | theirs)


@dataclass(frozen=True, eq=False)
class Data:
    """Images uint8 (N, S, S, 3) of one split, and the classes (N,) that the run's classifier gives them."""

    images: np.ndarray
    y: np.ndarray


def data(run: Run, split: str, size: int) -> Data:
    """A split of a run, whole."""
    table = read_table(run, "predictions", ["id", "split", "predicted"]).to_pandas()
    of_split = table[table.split == split]
    fit = run.state["options"].get("fit", "crop")
    return Data(read_images(run, of_split.id.to_numpy(), size, fit), of_split.predicted.to_numpy(np.int64))


def blackbox_of(run: Run) -> BlackBox:
    """The run's classifier."""
    chosen = run.result("classify")
    return place(classifiers.load(chosen["spec"], tuple(chosen["classes"])), "cpu")


def warmed(run: Run, known: Data, config: PresetConfig, seed: int) -> tuple[CAE, Discriminator]:
    """Networks after the warm-up."""
    classes = run.result("classify")["classes"]
    model = config.model
    if model.channels == 0:
        model = replace(model, channels=1 if run.result("shard")["grey"] else 3)
    torch.manual_seed(seed)
    cae, discriminator = place(CAE(model), "cpu"), place(Discriminator(model, len(classes)), "cpu")
    blackbox = blackbox_of(run)
    teacher = blackbox if blackbox.differentiable else None
    training.warm_up(cae, discriminator, known.images, known.y, config.train, seed, teacher=teacher)
    return cae, discriminator


def training_of(run: Run, known: Data, config: PresetConfig, seed: int,
                networks: tuple[CAE, Discriminator] | None = None) -> Iterator[training.Trainer]:  # fmt: skip
    """Train as stage train does, in one process: the trainer, once after the warm-up and then after every step.

    `networks`, which have had their warm-up, are copied; without them there is one first.
    """
    cae, discriminator = warmed(run, known, config, seed) if networks is None else copy.deepcopy(networks)
    pairs = training.draw_pairs(known.y, config.train, seed)
    batch = config.train.batch
    steps = len(pairs.index) // batch
    trainer = training.Trainer(cae, discriminator, config.train, config.weights, steps, blackbox_of(run))
    yield trainer
    for step in range(steps):
        images, members = pairs.batch(known.images, slice(step * batch, (step + 1) * batch))
        torch.manual_seed(seed + step)  # dropout
        trainer.step(to_tensor(images), torch.tensor(known.y[members]))
        yield trainer
