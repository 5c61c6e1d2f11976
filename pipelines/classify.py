"""Stage classify: the black box. Trains a ResNet with Ray Train, or takes the user's; then asks it about every image.

Writes `classifier/` (unless the user's own is used), `predictions/…parquet` and `classifier/accuracy.csv`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import torch.nn.functional as F
import tyro
from ray.train.torch import prepare_model

from cae import classifiers
from cae.blackboxes import fingerprint, resolve
from cae.config import ClassifierConfig, ModelConfig
from cae.images import Fit, to_tensor
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import (
    Unit,
    batches,
    bulk,
    decode_all,
    filled,
    read_images,
    read_table,
    read_unit,
    shard_units,
)
from pipelines.cluster import connect, enter_loop, fit_torch, last_checkpoint, pace, place, report, train_workers, where
from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run, Work
from pipelines.shard import ShardOptions, read_index

KEPT = 50  # steps, at least, from one checkpoint of the classifier to the next


@dataclass(frozen=True)
class ClassifyOptions(ShardOptions):
    """The classifier to explain."""

    fit: Fit = "crop"
    """How an image becomes square: `crop` its centre, or `squash` it."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="", prefix_name=False)] = field(default_factory=ModelConfig)
    resnet: ClassifierConfig = field(default_factory=ClassifierConfig)


def prepare(run: Run, options: ClassifyOptions) -> Work:
    """The work, by a classifier that answers, or images to train one on."""
    names = tuple(run.result("shard")["classes"])
    spec, differentiable, known, found = run.path("classifier"), True, None, ""
    if options.classifier:
        spec = resolve(options.classifier, options.trust_pickle)
        differentiable, found = classifiers.load(spec, names).differentiable, fingerprint(spec)
        connect()
        where(options)
    else:
        index = read_index(run).to_pandas()
        known = index[(index.split == "train") & index.label.notna()]
        if known.empty:
            raise UserError("no labelled images in train: give a trained classifier with --classifier")
        connect()
        train_workers(options, options.resnet.batch)
    return partial(classify, run, options, names, spec, differentiable, known, found)


def classify(run: Run, options: ClassifyOptions, names: tuple[str, ...], spec: str, differentiable: bool,
             known: pd.DataFrame | None, found: str) -> dict[str, Any]:  # fmt: skip
    """Train a classifier on `known` images, if any, and write its predictions; returns its accuracy on every split.

    `found` is the fingerprint of one that is not trained here.
    """
    if known is not None:
        _train(run, options, names, known)
        found = fingerprint(spec)
    runs.drop_if_other(run, "classify", found, "predictions")
    bulk(run, options, "classify", shard_units(run), PredictWorker, "predictions",
         spec=spec, names=names, size=options.model.image_size, fit=options.fit, **where(options))  # fmt: skip
    accuracy = accuracy_table(run, names)
    run.write("classifier/accuracy.csv", accuracy.to_csv(index=False).encode())
    tracking.log_folder(run, "classifier")
    metrics = {
        f"classifier/{row.split}/{name}": float(getattr(row, name))
        for row in accuracy.itertuples()
        for name in ("accuracy", "balanced_accuracy")
    }
    shown = ", ".join(f"{row.split} {row.balanced_accuracy:.3f}" for row in accuracy.itertuples())
    says = f"balanced accuracy {shown or 'unknown: no labels'}"
    if not differentiable:
        says += "; the classifier gives outputs only, no gradient"
    return {"says": says, "spec": spec, "fingerprint": found, "classes": names,
            "differentiable": differentiable, **metrics}  # fmt: skip


def accuracy_table(run: Run, names: tuple[str, ...]) -> pd.DataFrame:
    """One row a split: accuracy, balanced accuracy, recall of each class, on the images with labels."""
    from sklearn.metrics import balanced_accuracy_score, recall_score  # here: slow to import, and workers need it not

    table = read_table(run, "predictions", ["id", "split", "label", "predicted"]).to_pandas()
    rows = []
    for split, part in table.dropna(subset=["label"]).groupby("split"):
        recall = recall_score(part.label, part.predicted, average=None, labels=range(len(names)), zero_division=np.nan)
        rows.append({
            "split": split, "images": len(part), "accuracy": (part.label == part.predicted).mean(),
            "balanced_accuracy": balanced_accuracy_score(part.label, part.predicted),
            **{f"recall_{name}": value for name, value in zip(names, recall, strict=True)},
        })  # fmt: skip
    columns = ["split", "images", "accuracy", "balanced_accuracy"]
    return pd.DataFrame(rows, columns=None if rows else columns)


class PredictWorker:
    """Asks the classifier about the images of a unit."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str,
                 bf16: bool = False) -> None:  # fmt: skip
        self.run, self.size, self.fit, self.device = run, size, fit, device
        self.blackbox = place(classifiers.load(spec, names), device, bf16)

    def __call__(self, unit: Unit) -> pa.Table:
        table = read_unit(self.run, unit)
        probabilities = []
        for batch in batches(table, 128):
            arrays, _ = decode_all(batch["image"].to_pylist(), self.size, self.fit)
            x = to_tensor(arrays[filled(len(arrays))], self.device)
            probabilities.append(self.blackbox.probabilities(x)[: len(arrays)].cpu().numpy())
        p = np.concatenate(probabilities)
        return pa.table({
            "id": table["id"], "split": pa.array([unit["split"]] * len(p), pa.string()), "label": table["label"],
            "predicted": pa.array(p.argmax(1), pa.int32()), "probabilities": pa.array(list(p), pa.list_(pa.float32())),
        })  # fmt: skip


# --- Training ---------------------------------------------------------------------------------------------------------


def _train(run: Run, options: ClassifyOptions, names: tuple[str, ...], known: pd.DataFrame) -> None:
    """Train the built-in ResNet on images with an `id` and a `label`, and save it in `classifier/`."""
    fit_torch(run, options, "classify", _train_loop, {
        "folder": run.folder, "ids": known.id.to_numpy(), "labels": known.label.to_numpy(np.int64), "names": names,
        "config": asdict(options.resnet), "size": options.model.image_size, "fit": options.fit, "seed": options.seed,
    }, options.resnet.batch)  # fmt: skip


def _train_loop(config: dict[str, Any]) -> None:
    rank, world, device = enter_loop(config)
    options = ClassifierConfig(**config["config"])
    images = read_images(Run(config["folder"]), config["ids"], config["size"], config["fit"])
    labels = torch.tensor(config["labels"])
    torch.manual_seed(config["seed"])
    blackbox = place(classifiers.build(options, config["names"]), device)
    model = prepare_model(blackbox, move_to_device=False)
    # Class balance: each class weighs the same, whatever its count.
    counts = torch.bincount(labels, minlength=len(config["names"]))
    weight = (len(labels) / (counts.count_nonzero() * counts.clamp(1))).to(device)
    steps_per_epoch = max(1, len(labels) // options.batch)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=options.weight_decay)
    epochs = max(options.epochs, math.ceil(options.min_steps / steps_per_epoch))
    total = epochs * steps_per_epoch
    pause = math.ceil(KEPT / steps_per_epoch)  # epochs of few steps are told of, and kept, several at a time
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total)
    first = 0
    state = last_checkpoint(device)
    if state is not None:
        blackbox.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"] + 1
    begun = time.time()
    model.train()
    with tracking.join(config["tracking"], rank):
        for epoch in range(first, epochs):
            rng = torch.Generator().manual_seed(config["seed"] + epoch)
            order = torch.randperm(len(labels), generator=rng)
            rng.manual_seed(rng.initial_seed() + 10_000 * (rank + 1))  # each worker disturbs its images in its own way
            losses = []
            for step in range(steps_per_epoch):
                chosen = order[step * options.batch : (step + 1) * options.batch][rank::world]
                x = classifiers.augment(to_tensor(images[chosen.numpy()], device), rng)
                with torch.autocast(device.type, torch.bfloat16, enabled=config["bf16"]):
                    loss = F.cross_entropy(model(x), labels[chosen].to(device), weight, reduction="sum") / len(x)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            tracking.log_metrics({"classifier/loss": float(torch.stack(losses).mean())}, step=epoch + 1)
            if (epoch + 1) % pause and epoch + 1 < epochs:
                continue
            left = (time.time() - begun) / (epoch + 1 - first) * (epochs - 1 - epoch) / 60
            if rank == 0:
                rate = (epoch + 1 - first) * min(steps_per_epoch * options.batch, len(labels)) / (time.time() - begun)
                print(f"classify  epoch {epoch + 1}/{epochs}  images {pace(rate)}  {left:.1f} min left", flush=True)
            kept = {"model": blackbox.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "epoch": epoch}  # fmt: skip
            report(kept if rank == 0 else None)
    if rank == 0:
        classifiers.save(Run(config["folder"]).path("classifier"), blackbox, options)


OWN = ("fit", "model", "resnet")


def main(options: ClassifyOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("classify", options, prepare, OWN, needs=("shard",))


if __name__ == "__main__":
    command(ClassifyOptions, main)
