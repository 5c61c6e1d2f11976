"""Stage embed: class codes of every image, by Ray Data, and what is drawn from all of them.

Writes `codes/…parquet`, `manifold/projections.parquet` and `manifold/counter_codes.parquet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cae import classifiers, manifold, training
from cae.explain import images_at_once
from cae.images import Fit, to_tensor
from pipelines import run as runs
from pipelines.bulk import (
    FILLED,
    Unit,
    batches,
    bulk,
    decode_all,
    filled,
    matrix,
    read_images,
    read_part,
    read_predicted,
    read_table,
    read_unit,
    shard_units,
    write_table,
)
from pipelines.cluster import connect, place, where
from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run, Work
from pipelines.train import TrainOptions

BATCH = 64  # images that are encoded at once, at most
CANDIDATES = 8  # training images a class that are tried as its counter codes
TRIED_ON = 32  # training images of other classes that each candidate is tried on


@dataclass(frozen=True)
class EmbedOptions(TrainOptions):
    """The class codes."""


def prepare(run: Run, options: EmbedOptions) -> Work:
    """The work, where the classifier sees two classes at least."""
    predicted = read_predicted(run, "train")
    if len(np.unique(predicted)) < 2:
        raise UserError(f"the classifier gives the {len(predicted)} training images fewer than two classes: paths lead "
                        "from one class to another")  # fmt: skip
    training.load(run.path("cae"))  # fails here, in a line, where another version saved it
    connect()
    return partial(embed, run, options, where(options))


def embed(run: Run, options: EmbedOptions, placed: dict[str, Any]) -> dict[str, Any]:
    """Write codes, projections and counter codes; returns the variance that two axes show."""
    chosen = run.result("classify")
    size, names = options.model.image_size, tuple(chosen["classes"])
    bulk(run, options, "embed", shard_units(run), EmbedWorker, "codes",
         spec=chosen["spec"], names=names, size=size, fit=options.fit, **placed)  # fmt: skip
    table = read_table(run, "codes", ["id", "split", "predicted", "class_code"])
    codes = matrix(table["class_code"])
    ids, splits = (table[name].to_numpy(zero_copy_only=False) for name in ("id", "split"))
    known = splits == "train"
    projections = manifold.project(codes, known, options.seed, options.threads or None)
    write_table(run, "manifold/projections.parquet", pa.table({
        "id": ids, "split": splits, "predicted": table["predicted"],
        "pca_1": projections.pca[:, 0], "pca_2": projections.pca[:, 1],
        "tsne_1": projections.tsne[:, 0], "tsne_2": projections.tsne[:, 1],
    }))  # fmt: skip
    here = placed["device"] if torch.cuda.is_available() else "cpu"  # a cluster's head may have no GPU
    rates = _counter_codes(run, options, here, codes[known], ids[known], np.array(table["predicted"])[known])
    worst = min(rates.values())
    return {
        "says": f"{len(codes):,} codes; a class's counter code flips at least {worst:.0%} of training images",
        "manifold/pca_variance_2": sum(projections.variance),
        **{f"manifold/counter_flips_{names[label]}": rate for label, rate in rates.items()},
    }


@torch.no_grad()
def _counter_codes(
    run: Run, options: EmbedOptions, device: str, codes: np.ndarray, ids: np.ndarray, predicted: np.ndarray
) -> dict[int, float]:
    """Write for each class the codes of the training images nearest to its mean, those first that flip b most surely.

    Each candidate is put into training images of other classes; the share that b then gives to the class decides.
    Returns that share of each class's first one.
    """
    chosen = run.result("classify")
    blackbox = place(classifiers.load(chosen["spec"], tuple(chosen["classes"])), device)
    cae = place(training.load(run.path("cae")), device)
    rng = np.random.default_rng(options.seed)
    medoids = manifold.medoids(codes, predicted, CANDIDATES)
    tried = {label: rng.permutation(np.flatnonzero(predicted != label))[:TRIED_ON] for label in medoids}
    used = np.unique(np.concatenate(list(tried.values())))
    images = read_images(run, ids[used], options.model.image_size, options.fit)  # at once: it opens every shard
    rows, rates = [], {}
    for label, candidates in medoids.items():
        others = tried[label]
        individual = cae.encode(to_tensor(images[np.searchsorted(used, others)], device))[1]
        shares = []
        for candidate in candidates:
            code = torch.from_numpy(codes[int(candidate)]).to(device).expand(len(others), -1)
            p = blackbox.probabilities(cae.decode(code, individual))
            shares.append((float((p.argmax(1) == label).float().mean()), float(p[:, label].mean())))
        order = sorted(range(len(candidates)), key=lambda i: shares[i], reverse=True)
        rates[label] = shares[order[0]][0]
        rows += [{"id": ids[candidates[i]], "label": label, "class_code": codes[candidates[i]].tolist(),
                  "flips": shares[i][0], "tried_on": len(others)} for i in order]  # fmt: skip
    write_table(run, "manifold/counter_codes.parquet", pa.Table.from_pylist(rows))
    return rates


class EmbedWorker:
    """Encodes the images of a unit."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str,
                 bf16: bool = False) -> None:  # fmt: skip
        self.run, self.size, self.fit, self.device = run, size, fit, device
        self.blackbox = place(classifiers.load(spec, names), device, bf16)
        self.cae = place(training.load(run.path("cae")), device, bf16)
        few = images_at_once(torch.empty(0, 3, size, size, device=device), self.blackbox)
        self.at_once = max(1, min(BATCH, few) // FILLED) * FILLED

    @torch.no_grad()
    def __call__(self, unit: Unit) -> pa.Table:
        table = read_unit(self.run, unit)
        said = read_part(self.run, f"predictions/{unit['part']}", ["predicted", "probabilities"])  # of the same rows
        columns: dict[str, list[np.ndarray]] = {"code": [], "p_reconstruction": [], "error": []}
        for batch in batches(table, self.at_once):
            arrays, _ = decode_all(batch["image"].to_pylist(), self.size, self.fit)
            x = to_tensor(arrays[filled(len(arrays))], self.device)
            code, individual = self.cae.encode(x)
            reconstruction = self.cae.decode(code, individual)
            found = {
                "code": code, "p_reconstruction": self.blackbox.probabilities(reconstruction),
                "error": (reconstruction - x).abs().mean((1, 2, 3)),
            }  # fmt: skip
            for name, tensor in found.items():
                columns[name].append(tensor[: len(arrays)].float().cpu().numpy())
        codes, p_reconstruction, error = (np.concatenate(parts) for parts in columns.values())
        seen = classifiers.decided(torch.from_numpy(p_reconstruction))
        return pa.table({
            "id": table["id"], "split": pa.array([unit["split"]] * len(table), pa.string()),
            "label": table["label"], "predicted": said["predicted"], "probabilities": said["probabilities"],
            "class_code": pa.array(list(codes), pa.list_(pa.float32())),
            "reconstruction_error": pa.array(error, pa.float32()),
            "reconstruction_predicted": pa.array(seen.numpy(), pa.int32()),
        })  # fmt: skip


OWN = ("train", "model")


def main(options: EmbedOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("embed", options, prepare, OWN, needs=("shard", "classify", "train"))


if __name__ == "__main__":
    command(EmbedOptions, main)
