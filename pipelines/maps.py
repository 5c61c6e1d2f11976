"""What the workers of stage explain do with images, from a run's shards or from an archive: a row for each explanation.

Legend: B images, D numbers in the class code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cae import classifiers, figures, sources, training
from cae.data import Item, first_line
from cae.explain import Explanation, explain, over_donors
from cae.images import Fit, encode_png, fitted, to_array, to_tensor
from pipelines.bulk import (
    FILLED,
    UNIT_ROWS,
    Unit,
    batches,
    decode_all,
    filled,
    read_part,
    read_unit,
    write_table,
)
from pipelines.cluster import place
from pipelines.run import Run
from pipelines.ways import Ways

BATCH = 32


def choose_targets(p: Tensor, targets: str, names: tuple[str, ...],
                   reachable: Collection[int]) -> list[tuple[int, int]]:  # fmt: skip
    """Image index and target class of every explanation asked for, for probabilities (B, C).

    `targets` is `runner-up` (the likeliest one that is reachable, if any is), `all`, or one of the class names.
    """
    pairs = []
    # Stable, as `argmax` is: of several classes that are equally likely, that one is the image's own.
    for i, (_, *others) in enumerate(p.argsort(dim=1, descending=True, stable=True).tolist()):
        if targets in names:
            others = [label for label in others if names[label] == targets]
        elif targets == "runner-up":
            others = [label for label in others if label in reachable][:1] or others[:1]
        pairs += [(i, label) for label in others]
    return pairs


class ExplainWorker:
    """Explains the images of a unit."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], cae: str, size: int, fit: Fit, device: str,
                 ways: Ways, frames: bool, how: dict[str, Any], bf16: bool = False) -> None:  # fmt: skip
        self.run, self.names, self.size, self.fit, self.device = run, names, size, fit, device
        self.ways, self.frames, self.how = ways, frames, how
        self.blackbox = place(classifiers.load(spec, names), device, bf16)
        self.cae = place(training.load(cae), device, bf16)
        self.overlays = 0  # to be drawn yet

    def __call__(self, unit: Unit) -> Iterator[pa.Table]:
        self.overlays = unit["overlays"]
        for batch in batches(read_unit(self.run, unit), BATCH):
            arrays, _ = decode_all(batch["image"].to_pylist(), self.size, self.fit)
            yield self.table(self.explain(batch["id"].to_pylist(), arrays), unit["split"])

    def explain(self, ids: list[str], arrays: np.ndarray) -> list[dict[str, Any]]:
        """A row for every explanation of images uint8 (B, size, size, 3); draws overlays while any are left."""
        rows: list[dict[str, Any]] = []
        cached = self.device == "cpu" and self.blackbox.differentiable  # else filling would only ask more questions
        room = BATCH // self.ways.donors  # at least 1: see MOST_DONORS
        multiple = min(FILLED, room) if cached else 1
        at_once = room // multiple * multiple
        try:
            p = self._ask(arrays[filled(len(arrays))])[: len(arrays)]
        except torch.OutOfMemoryError:
            p = None
        if p is None:  # out of the handler, which holds on to all that there was no room for
            p = torch.cat([self._ask(array[None]) for array in arrays])
        images, targets = [], []
        for i, label in choose_targets(p, self.ways.targets, self.names, self.ways.ends):
            if label in self.ways.ends:
                images.append(i)
                targets.append(label)
            else:
                reason = f"the classifier gives no training image the class {self.names[label]}: no code to walk to"
                rows.append(self.failed(ids[i], reason, p[i], label))
        for start in range(0, len(images), at_once):
            chosen = slice(start, start + at_once)
            rows += self._explain(arrays, ids, p, images[chosen], targets[chosen], multiple)
        first = {row["id"]: row for row in reversed(rows) if row["status"] != "failed"}
        for array, name in zip(arrays, ids, strict=True):
            if self.overlays > 0 and name in first:
                self._overlay(array, first[name])
                self.overlays -= 1
        return rows

    def _ask(self, arrays: np.ndarray) -> Tensor:
        """The classifier's probabilities (B, C)."""
        return self.blackbox.probabilities(to_tensor(arrays, self.device)).cpu()

    def table(self, rows: list[dict[str, Any]], split: str) -> pa.Table:
        """Rows of images of one split as they are written."""
        return pa.Table.from_pylist([row | {"split": split} for row in rows], SCHEMA)

    def failed(self, name: str, reason: str, p: Tensor | None = None, target: int | None = None,
               status: str = "failed") -> dict[str, Any]:  # fmt: skip
        """The row of an image that has no map, and why; `p` (C,) is what the classifier says of it, if it could."""
        seen = {} if p is None else {"source": int(p.argmax()), "p_source": float(p.max())}
        return {"id": name, "target": target, "status": status, "error": reason, "mode": self.how["mode"],
                "size": self.size} | seen  # fmt: skip

    @torch.no_grad()
    def _explain(self, arrays: np.ndarray, ids: list[str], p: Tensor, images: list[int], targets: list[int],
                 multiple: int = 1) -> list[dict[str, Any]]:  # fmt: skip
        wanted = len(images)
        images, targets = ([values[i] for i in filled(wanted, multiple)] for values in (images, targets))
        source = p[images].argmax(1)
        names, reason = [ids[i] for i in images], ""
        try:
            paths, donors, codes = self._walk(arrays[images], names, source, targets)
        except torch.AcceleratorError:  # not the image's fault: nothing can be computed in this process any more
            raise
        except RuntimeError as error:
            reason = first_line(error)
        if reason and len(images) > 1:
            # One at a time tells the guilty from the rest; out of the handler, which holds on to all their memory.
            pairs = list(zip(images, targets, strict=True))[:wanted]
            return [row for i, t in pairs for row in self._explain(arrays, ids, p, [i], [t])]
        if reason:  # alone, it becomes a row that says what happened
            return [self.failed(names[0], reason, p[images[0]], targets[0])]
        counts = [len(own) for own in donors]
        found = over_donors(paths, counts)
        distance = self.ways.known.distance_to(codes)
        ends = np.cumsum(counts).tolist()
        return [
            {"id": names[k], "source": int(source[k]), "p_source": float(p[images[k]].max()), "target": targets[k],
             "size": self.size, "mode": self.how["mode"], "counter_ids": donors[k],
             "counter_statuses": paths.status[ends[k] - counts[k] : ends[k]], "class_code": codes[k],
             "code_distance": float(distance[k])}
            | self._row(found, k)
            for k in range(wanted)
        ]  # fmt: skip

    def _walk(self, arrays: np.ndarray, names: list[str], source: Tensor,
              targets: list[int]) -> tuple[Explanation, list[list[str]], np.ndarray]:  # fmt: skip
        """The paths of images (B, size, size, 3) of classes `source` (B,), the ids of each one's counter codes, and the
        images' class codes (B, D)."""
        x = to_tensor(arrays, self.device)
        class_code, individual_code = self.cae.encode(x)
        codes = class_code.float().cpu().numpy()
        donors, waypoints = self.ways.find(names, codes, targets)
        each = torch.arange(len(x)).repeat_interleave(torch.tensor([len(own) for own in donors]))  # each path's image
        there = each.to(self.device)
        paths = explain(self.cae, self.blackbox, x[there], source[each].to(self.device),
                        torch.tensor(targets)[each].to(self.device), torch.from_numpy(waypoints).to(self.device),
                        codes=(class_code[there], individual_code[there]), **self.how)  # fmt: skip
        return paths, donors, codes

    def _row(self, found: Explanation, k: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "status": found.status[k], "error": "",
            "flip_at": None if found.flip_at[k].isnan() else float(found.flip_at[k]),
            "p_source_start": float(found.p_source[k, 0]), "p_source_end": float(found.p_source[k, 1]),
            "p_target_start": float(found.p_target[k, 0]), "p_target_end": float(found.p_target[k, 1]),
            "reconstruction_error": float(found.reconstruction_error[k]),
            "inversion_steps": int(found.inversion_steps[k]),
        }  # fmt: skip
        heat = found.map[k].flatten().half()
        if row["status"] == "failed" or not heat.isfinite().all():  # by half precision's measure too
            return row | {"status": "failed", "error": "the model or the classifier gave values that are not finite"}
        row["map"] = heat.cpu().numpy()
        row["signed"] = found.signed[k].flatten().half().cpu().numpy()
        if self.frames:
            row["frames"] = [encode_png(frame) for frame in to_array(found.frames[k])]
            row["frame_p"] = found.frame_p[k].cpu().numpy()
        return row

    def _overlay(self, image: np.ndarray, row: dict[str, Any]) -> None:
        heat = row["map"].astype(np.float32).reshape(self.size, self.size)
        source, target = (self.names[row[which]] for which in ("source", "target"))
        says = (
            f"{source} → {target}: {row['status']}",
            f"p({target}) {row['p_target_start']:.2f} → {row['p_target_end']:.2f}, map up to {heat.max():.1e}",
        )
        picture = np.concatenate([image, figures.overlay(image, heat)], 1)
        name = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "_" for c in row["id"])[-120:]
        self.run.write(f"overlays/{name}.png", encode_png(figures.captioned(picture, says)))


class ArchiveWorker:
    """Explains the images of a piece of an archive, and says how many have which status.

    The explanations of every UNIT_ROWS files are one Parquet file, written whole: a piece may be a whole archive, which
    can only be read from its start, and a call that goes on explains only what is not there yet.
    """

    def __init__(self, run: Run, **how: Any) -> None:
        self.run = run
        self.worker = ExplainWorker(run, **how)

    def __call__(self, unit: Unit) -> pa.Table:
        counts = Counter[tuple[str, str]]()
        numbered = enumerate(sources.read(unit))
        for number, group in groupby(numbered, lambda pair: pair[0] // UNIT_ROWS):
            name = f"explanations/{unit['part'].removesuffix('.parquet')}-{number:06d}.parquet"
            if not self.run.fs.exists(self.run.path(name)):
                self.worker.overlays = min(UNIT_ROWS, max(0, unit["overlays"] - number * UNIT_ROWS))
                of_group = self._explain(found for _, found in group)
                write_table(self.run, name, (self.worker.table(rows, "archive") for rows in of_group))
            told = read_part(self.run, name, ["status", "error"])
            counts.update(zip(told["status"].to_pylist(), told["error"].to_pylist(), strict=True))
        rows = [{"status": status, "error": error, "rows": count} for (status, error), count in counts.items()]
        return pa.Table.from_pylist(rows, COUNTED)

    def _explain(self, found: Iterator[tuple[Item, bytes, str]]) -> Iterator[list[dict[str, Any]]]:
        """Rows of images as they come, of not more than BATCH at once."""
        ids, arrays, lost = [], [], []
        for item, content, problem in found:
            for name, picture, reason in sources.frames(item, content, problem):
                if picture is None:
                    lost.append(self.worker.failed(name, reason, status="unreadable"))
                    continue
                ids.append(name)
                arrays.append(fitted(picture, self.worker.size, self.worker.fit))
                if len(ids) == BATCH:
                    yield self.worker.explain(ids, np.stack(arrays))
                    ids, arrays = [], []
        yield lost + (self.worker.explain(ids, np.stack(arrays)) if ids else [])


COUNTED = pa.schema({"status": pa.string(), "error": pa.string(), "rows": pa.int64()})


_MAP = pa.list_(pa.float16())  # size * size; Parquet cannot read lists of fixed size back where some are null
SCHEMA = pa.schema({
    "id": pa.string(), "split": pa.string(),
    "source": pa.int32(), "p_source": pa.float32(),  # the classifier's class of the image, and its probability
    "target": pa.int32(), "status": pa.string(), "error": pa.string(),
    "counter_ids": pa.list_(pa.string()), "counter_statuses": pa.list_(pa.string()), "mode": pa.string(),
    "flip_at": pa.float32(), "p_source_start": pa.float32(), "p_source_end": pa.float32(),
    "p_target_start": pa.float32(), "p_target_end": pa.float32(), "reconstruction_error": pa.float32(),
    "inversion_steps": pa.int32(), "class_code": pa.list_(pa.float32()), "code_distance": pa.float32(),
    "size": pa.int32(), "map": _MAP, "signed": _MAP,
    "frames": pa.list_(pa.binary()), "frame_p": pa.list_(pa.float32()),
})  # fmt: skip
