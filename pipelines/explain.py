"""Stage explain: a map, its counterfactual and a status for every image and target, by Ray Data.

Writes `explanations/…parquet`, and overlays as PNG for the first `--overlays` images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cae import classifiers, figures, training
from cae.explain import Explanation, Mode, choose_mode, explain, over_donors
from cae.images import Fit, encode_png, to_array, to_tensor
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import Unit, batches, bulk, decode_all, read_table, read_unit, shard_units, split_of
from pipelines.cluster import connect, device_of, place
from pipelines.embed import EmbedOptions
from pipelines.run import Run, UserError
from pipelines.ways import Ways, read_medoids, read_ways

BATCH = 32
DEFAULT_SPLITS = ("val", "test", "archive")


@dataclass(frozen=True)
class ExplainOptions(EmbedOptions):
    """Which images to explain, towards what, and how."""

    splits: tuple[str, ...] = DEFAULT_SPLITS
    """Splits to explain; add `train` to explain everything."""
    targets: str = "runner-up"
    """Classes to explain each image towards: `runner-up` (the classifier's second choice), `all`, or a class name
    (images of that class are then left out)."""
    counter: str = "medoid"
    """Where a path ends: at the class code of a training image to which the classifier gives the target class.
    `medoid`: of those near the class's mean the surest to flip; `random`: one drawn for each image; `nearest`: the one
    nearest to the image's own code, at the border and less sure to flip. Or the id of an image of the run: then its
    class, by the classifier, is the target of every image."""
    donors: int = 1
    """Counter codes for each image and target. The map is the mean of theirs, and counts as flipped if at least half
    of their paths flip."""
    path: Literal["linear", "guided"] = "linear"
    """The way to a counter code: straight, or guided: the shortest one among the training codes, from neighbour to
    neighbour."""
    mode: Mode | Literal["auto"] = "auto"
    """How a path becomes a map: `integrated` (the path's changes made to the image itself, weighted by the classifier's
    gradient), `patch` (the same with queries only: what each window of the changes does to the classifier in the image,
    and when it is undone), `path` (the paper's: frame differences weighted by the rise of the target's probability),
    `contrast` (end against reconstruction) or `input` (end against image). `auto`: `integrated`, or `patch` where the
    classifier has no gradient."""
    window: float = 0.125
    """Side of the windows of mode `patch`, as a share of the image's; they stand half of it apart. 0.125 takes 452
    queries an image, 0.25 takes 100."""
    smooth: float = 0.025
    """Sigma of the Gaussian that maps are blurred by, as a share of the image's side; 0: none, as in the paper."""
    steps: int = 0
    """Steps of the path; 0: as the mode needs, 1 for `integrated` and `patch` on a linear path, else 8, then
    bisection."""
    margin: float = 0.0
    """How far, in probability, the target must be ahead of every other class to end the path."""
    frames: bool = False
    """Keep the frames of every path as PNG in the Parquet files; `--steps` says how many."""
    overlays: int = 24
    """Images whose maps are also drawn over them as PNG files."""


def explain_images(run: Run, options: ExplainOptions) -> dict[str, Any]:
    """Explain every image of the splits asked for; returns the share of each status."""
    chosen = run.result("classify")
    options = replace(options, mode=choose_mode(options.mode, chosen.get("differentiable", True)))
    connect()
    names = tuple(chosen["classes"])
    if options.targets not in ("runner-up", "all", *names):
        raise UserError(f"--targets {options.targets}: choose runner-up, all, or one of {', '.join(names)}")
    held = run.result("shard")["counts"]
    for wanted in options.splits:
        if wanted not in held and wanted not in DEFAULT_SPLITS:
            raise UserError(f"--splits {wanted}: there is none, only {', '.join(sorted(held))}")
    if not 0 < options.window <= 1:
        raise UserError(f"--window {options.window}: give a share of the image's side, above 0 and at most 1")
    units = shard_units(run, options.splits)
    if not units:
        raise UserError(f"no images in the splits {', '.join(options.splits)}: choose others with --splits")
    left = options.overlays
    for unit in units:
        unit["overlays"] = min(left, unit["rows"])
        left -= unit["overlays"]
    ways = read_ways(run, options)
    bulk(run, options, "explain", units, ExplainWorker, "explanations",
         spec=chosen["spec"], names=names, size=options.model.image_size, fit=options.fit, device=device_of(options),
         ways=ways, frames=options.frames, how=path_options(options))  # fmt: skip
    found = read_table(run, "explanations", ["id", "split", "status"])
    if not len(found):
        raise UserError(f"the classifier gives every image the class {ways.targets} already: choose other --targets")
    status, split = np.array(found["status"].to_pylist()), np.array(found["split"].to_pylist())
    metrics = {f"explain/{s}/flipped": float((status[split == s] == "flipped").mean()) for s in np.unique(split)}
    counts = Counter(status.tolist())
    says = ", ".join(f"{name} {count:,} ({count / len(status):.1%})" for name, count in counts.most_common())
    left_out = ", ".join(f"{count:,} of {name}" for name, count in held.items() if name not in options.splits)
    if left_out:
        says += f"; not explained: {left_out} (see --splits)"
    if options.overlays:
        tracking.log_folder(run, "explanations/overlays")
    return {"says": f"{len(status):,} maps by mode {options.mode}: {says}", "statuses": dict(counts), **metrics}


def path_options(options: ExplainOptions) -> dict[str, Any]:
    """What `cae.explain.explain` takes of the options."""
    return {"mode": options.mode, "smooth": options.smooth, "steps": options.steps or None, "margin": options.margin,
            "window": options.window}  # fmt: skip


def read_counter_codes(run: Run) -> dict[int, tuple[str, np.ndarray]]:
    """Class index -> id and class code of the training image whose code stands for the class."""
    return {label: (ids[0], codes[0]) for label, (ids, codes) in read_medoids(run).items()}


def choose_targets(p: Tensor, targets: str, names: tuple[str, ...],
                   reachable: Collection[int]) -> list[tuple[int, int]]:  # fmt: skip
    """Image index and target class of every explanation asked for, for probabilities (B, C).

    `targets` is `runner-up` (the likeliest one that is reachable, if any is), `all`, or one of the class names.
    """
    pairs = []
    for i, (_, *others) in enumerate(p.argsort(1, descending=True).tolist()):
        if targets in names:
            others = [label for label in others if names[label] == targets]
        elif targets == "runner-up":
            others = [label for label in others if label in reachable][:1] or others[:1]
        pairs += [(i, label) for label in others]
    return pairs


class ExplainWorker:
    """Explains the images of a unit."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str, ways: Ways,
                 frames: bool, how: dict[str, Any]) -> None:  # fmt: skip
        self.run, self.names, self.size, self.fit, self.device = run, names, size, fit, device
        self.ways, self.frames, self.how = ways, frames, how
        self.blackbox = place(classifiers.load(spec, names), device)
        self.cae = place(training.load(run.path("cae")), device)

    def __call__(self, unit: Unit) -> pa.Table:
        rows: list[dict[str, Any]] = []
        at_once = max(1, BATCH // self.ways.donors)
        for batch in batches(read_unit(self.run, unit), BATCH):
            ids = batch["id"].to_pylist()
            arrays, _ = decode_all(batch["image"].to_pylist(), self.size, self.fit)
            p = self.blackbox.probabilities(to_tensor(arrays, self.device)).cpu()
            images, targets = [], []
            for i, label in choose_targets(p, self.ways.targets, self.names, self.ways.ends):
                if label in self.ways.ends:
                    images.append(i)
                    targets.append(label)
                else:
                    reason = f"the classifier gives no training image the class {self.names[label]}: no code to walk to"
                    rows.append(self._failed(ids[i], int(p[i].argmax()), label, reason))
            if self.ways.given:
                own = next(iter(self.ways.ends))
                reason = f"the counter image is of the image's own class, {self.names[own]}: no way to another one"
                rows += [self._failed(ids[i], own, own, reason) for i in (p.argmax(1) == own).nonzero()[:, 0].tolist()]
            for start in range(0, len(images), at_once):
                chosen = slice(start, start + at_once)
                rows += self._explain(arrays, ids, p, images[chosen], targets[chosen])
            first = {row["id"]: row for row in reversed(rows)}
            for array, name in zip(arrays, ids, strict=True):
                if unit["overlays"] > 0 and name in first:
                    self._overlay(array, first[name])
                    unit["overlays"] -= 1
        for row in rows:
            row["split"] = split_of(unit)
        return pa.Table.from_pylist(rows, _schema(self.size))

    def _failed(self, name: str, source: int, target: int, reason: str) -> dict[str, Any]:
        return {"id": name, "source": source, "target": target, "status": "failed", "error": reason,
                "mode": self.how["mode"], "size": self.size}  # fmt: skip

    @torch.no_grad()
    def _explain(self, arrays: np.ndarray, ids: list[str], p: Tensor, images: list[int],
                 targets: list[int]) -> list[dict[str, Any]]:  # fmt: skip
        source = p[images].argmax(1)
        x = to_tensor(arrays[images], self.device)
        names = [ids[i] for i in images]
        try:
            class_code, individual_code = self.cae.encode(x)
            codes = class_code.float().cpu().numpy()
            donors, waypoints = self.ways.find(names, codes, targets)
            counts = [len(own) for own in donors]
            each = torch.arange(len(images)).repeat_interleave(torch.tensor(counts))  # the image of each path
            there = each.to(self.device)
            paths = explain(self.cae, self.blackbox, x[there], source[each].to(self.device),
                            torch.tensor(targets)[each].to(self.device), torch.from_numpy(waypoints).to(self.device),
                            codes=(class_code[there], individual_code[there]), **self.how)  # fmt: skip
        except RuntimeError as error:
            # One image at a time tells the guilty from the rest; alone, it becomes a row that says what happened.
            if len(images) > 1:
                return [
                    row for i, t in zip(images, targets, strict=True) for row in self._explain(arrays, ids, p, [i], [t])
                ]
            reason = str(error).splitlines()[0]
            return [self._failed(names[0], int(source[0]), targets[0], reason)]
        found = over_donors(paths, counts)
        distance = self.ways.known.distance_to(codes)
        ends = np.cumsum(counts).tolist()
        return [
            {"id": names[k], "source": int(source[k]), "target": targets[k], "size": self.size,
             "mode": self.how["mode"], "counter_ids": donors[k],
             "counter_statuses": paths.status[ends[k] - counts[k] : ends[k]], "code_distance": float(distance[k])}
            | self._row(found, k)
            for k in range(len(images))
        ]  # fmt: skip

    def _row(self, found: Explanation, k: int) -> dict[str, Any]:
        row = {
            "status": found.status[k], "error": "", "flip_at": float(found.flip_at[k]),
            "p_source_start": float(found.p_source[k, 0]), "p_source_end": float(found.p_source[k, 1]),
            "p_target_start": float(found.p_target[k, 0]), "p_target_end": float(found.p_target[k, 1]),
            "reconstruction_error": float(found.reconstruction_error[k]),
        }  # fmt: skip
        if row["status"] == "failed":
            return row | {"error": "the model or the classifier gave values that are not finite"}
        row["map"] = found.map[k].flatten().half().cpu().numpy()
        row["signed"] = found.signed[k].flatten().half().cpu().numpy()
        if self.frames:
            row["frames"] = [encode_png(frame) for frame in to_array(found.frames[k])]
            row["frame_p"] = found.frame_p[k].cpu().numpy()
        return row

    def _overlay(self, image: np.ndarray, row: dict[str, Any]) -> None:
        if row["status"] == "failed":
            return
        picture = figures.overlay(image, row["map"].astype(np.float32).reshape(self.size, self.size))
        name = "".join(c if c.isalnum() or c in "-._" else "_" for c in row["id"])[-120:]
        self.run.write(f"explanations/overlays/{name}.png", encode_png(np.concatenate([image, picture], 1)))


def _schema(size: int) -> pa.Schema:
    half = pa.list_(pa.float16(), size * size)
    return pa.schema({
        "id": pa.string(), "split": pa.string(),
        "source": pa.int32(),  # the classifier's class
        "target": pa.int32(), "status": pa.string(), "error": pa.string(),
        "counter_ids": pa.list_(pa.string()), "counter_statuses": pa.list_(pa.string()), "mode": pa.string(),
        "flip_at": pa.float32(), "p_source_start": pa.float32(), "p_source_end": pa.float32(),
        "p_target_start": pa.float32(), "p_target_end": pa.float32(), "reconstruction_error": pa.float32(),
        "code_distance": pa.float32(), "size": pa.int32(), "map": half, "signed": half,
        "frames": pa.list_(pa.binary()), "frame_p": pa.list_(pa.float32()),
    })  # fmt: skip


OWN = ("splits", "targets", "counter", "donors", "path", "mode", "window", "smooth", "steps", "margin", "frames",
       "overlays")  # fmt: skip


def main(options: ExplainOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("explain", options, explain_images, OWN, needs=("shard", "classify", "train", "embed"))


if __name__ == "__main__":
    runs.command(ExplainOptions, main)
