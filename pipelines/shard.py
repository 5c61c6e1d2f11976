"""Stage shard: any source of images to Parquet shards, by Ray Data.

Writes `shards/split=…/…parquet` with one row per readable image and `shards/rejected.parquet` with one row, and the
reason, for every file that is none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cae import classifiers, data, dicom, images, sources, synthetic
from cae.blackboxes import resolve
from cae.config import PRESETS
from cae.data import Item
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import UNIT_ROWS, Unit, bulk, list_parts, list_shards, listing, read_part, write_table
from pipelines.cluster import connect
from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run, RunOptions, Work

SCHEMA = pa.schema(
    {
        "id": pa.string(),  # name in the archive and hash of the content
        "image": pa.binary(),  # the original JPEG, or PNG
        "height": pa.int32(),
        "width": pa.int32(),
        "label": pa.int32(),  # index of class_name, null when unknown
        "class_name": pa.string(),
        "group": pa.string(),  # patient, where a manifest or the file names one
        "source": pa.string(),
        "grey": pa.bool_(),  # whether the three channels are equal
        "mask": pa.binary(),  # PNG of the truth, where it is known
    }
)
SHARD_BYTES = 1 << 26  # of large images fewer go into a shard, which a worker holds whole
REJECTED = pa.schema({"id": pa.string(), "source": pa.string(), "split": pa.string(), "reason": pa.string()})


@dataclass(frozen=True)
class ShardOptions(RunOptions):
    """Which images, and how they are split."""

    data_root: str = ""
    """Folder (or s3://…) that holds the named data sets. Default: $CAE_DATA, else ./data."""
    images: int = 1000
    """Images to generate for the data set `synthetic`, at the preset's image size."""
    classes: int = 2
    """Classes of the data set `synthetic`: 2 to 4."""
    shortcut: bool = False
    """Plant a marker that goes with the last class into the data set `synthetic`."""
    classifier: str = ""
    """The black box: empty to train one (the images then need labels), a folder with one saved by this project,
    torchvision:NAME@WEIGHTS or timm:NAME@WEIGHTS (a state dict as .safetensors or .pth), FILE.onnx, FILE.pt2 (of
    torch.export), an http(s):// address, package.module:function, or a JSON that describes one of these. A JSON beside
    the file, of the same name, may say input size, channels, mean, std and class names (see cae.blackboxes.Card);
    without those its outputs are the data's classes in sorted order, or just numbered where the data is a flat folder.
    The data may lack some of the classes of one that knows them."""


def prepare(run: Run, options: ShardOptions) -> Work:
    """The work, on a data set that is there, and by a classifier that knows its classes."""
    if options.dataset == "synthetic":
        config = synthetic.Synthetic(options.images, PRESETS[options.preset].model.image_size,
                                     options.classes, options.shortcut, options.seed)  # fmt: skip
        names, units, source, version = list(config.class_names), _ranges(options.images), "synthetic", ""
        arguments: dict[str, Any] = {"config": config}
        if options.classifier:
            classifiers.load(resolve(options.classifier, options.trust_pickle), config.class_names)
    else:
        source = data.locate(options.dataset, options.data_root or None)
        found = sources.survey(source, UNIT_ROWS)
        names, version = found.labels, found.version
        if options.classifier:
            spec = resolve(options.classifier, options.trust_pickle)
            names = list(classifiers.class_names(spec, tuple(names)))
        units = [piece | {"part": f"{i:06d}.parquet"} for i, piece in enumerate(found.pieces)]
        arguments = {"names": names, "present": found.splits, "label_free": bool(options.classifier)}
    return partial(shard, run, options, names, units, source, version, arguments)


def shard(run: Run, options: ShardOptions, names: list[str], units: list[Unit], source: str, version: str,
          arguments: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Write the shards of the data set; returns classes, counts and digest."""
    connect()
    _start_over_if_changed(run, listing(units, version)[:16])
    bulk(run, options, "shard", units, ShardWorker, "shards/_parts", on_gpu=False, **arguments)

    parts = list_parts(run, "shards/_parts")
    rejected = pa.concat_tables([read_part(run, f"shards/_parts/{part}") for part in parts])
    write_table(run, "shards/rejected.parquet", rejected.sort_by("id"))
    if not list_shards(run):
        why = f", the first because: {rejected['reason'][0]}" if len(rejected) else ""
        raise UserError(f"none of the {len(rejected)} files in {source} is a readable image{why}")
    index = read_index(run)
    grouped = index.group_by(["split", "class_name"]).aggregate([([], "count_all")]).to_pylist()
    held = {(row["split"], row["class_name"]): row["count_all"] for row in grouped}
    if not options.classifier:
        readable = data.check_classes(held)
        empty = sorted(set(names) - set(readable))
        if empty and options.dataset != "synthetic":
            raise UserError(f"class {empty[0]!r} has no readable image: take its folder out of {source}")
    counts = Counter[str]()
    for (split, _), count in held.items():
        counts[split] += count
    digest = hashlib.sha256("\n".join(sorted(index["id"].to_pylist())).encode()).hexdigest()[:16]
    tracking.log_dataset(options.dataset, source, digest, **counts)
    if len(rejected):
        tracking.log_folder(run, "shards/rejected.parquet")
    shown = ", ".join(f"{split} {count:,}" for split, count in sorted(counts.items()))
    return {
        "says": f"{len(index):,} images ({shown}), {len(names)} classes, {len(rejected)} rejected",
        "classes": names,
        "grey": pc.all(index["grey"]).as_py(),
        "counts": dict(counts),
        "rejected": len(rejected),
        "digest": digest,
        "source": source,
    }


def read_index(run: Run) -> pa.Table:
    """id, split, label, class_name, group, grey of every sharded image, sorted by id."""
    tables = []
    for split, part in list_shards(run):
        table = read_part(run, f"shards/{part}", ["id", "label", "class_name", "group", "grey"])
        tables.append(table.append_column("split", pa.array([split] * len(table), pa.string())))
    return pa.concat_tables(tables).sort_by("id")


def read_groups(run: Run, ids: Iterable[str]) -> dict[str, str]:
    """Id -> what an image is drawn together with in intervals: images of its patient or group, where that is known.

    Else its copies, and the frames of its file: they share their ids' hash.
    """
    index = read_index(run)
    index = index.filter(pc.is_in(index["id"], pa.array(ids)))
    known = zip(index["id"].to_pylist(), index["group"].to_pylist(), strict=True)
    return {name: group or name.rpartition("#")[2] for name, group in known}


def _ranges(count: int) -> list[Unit]:
    return [
        {"start": start, "stop": min(start + UNIT_ROWS, count), "part": f"{start // UNIT_ROWS:06d}.parquet",
         "rows": min(UNIT_ROWS, count - start)}
        for start in range(0, count, UNIT_ROWS)
    ]  # fmt: skip


def _start_over_if_changed(run: Run, found: str) -> None:
    """Drop what an interrupted call left behind when the source has changed since: its parts no longer fit.

    Raises UserError for a folder `shards` that is none of ours.
    """
    if run.state.get("listing") != found and run.fs.exists(run.path("shards")):
        if "listing" not in run.state:
            raise UserError(f"{run.folder} has a folder shards that no run of ours made: choose another --run")
        run.fs.rm(run.path("shards"), recursive=True)
    run.state["listing"] = found
    run.save()


class ShardWorker:
    """Reads the images of a unit and writes their shards; returns the rejected ones."""

    def __init__(self, run: Run, config: synthetic.Synthetic | None = None, names: list[str] | None = None,
                 present: set[str | None] | None = None, label_free: bool = False) -> None:  # fmt: skip
        self.run = run
        self.config = config
        self.names = list(config.class_names) if config else names or []
        self.present = present or set()
        self.label_free = label_free

    def __call__(self, unit: Unit) -> pa.Table:
        good: dict[str, list[dict[str, Any]]] = {}
        bad = []
        part = unit["part"].removesuffix(".parquet")
        written, held = Counter[str](), Counter[str]()

        def flush(split: str) -> None:
            rows = pa.Table.from_pylist(good.pop(split), SCHEMA)
            write_table(self.run, f"shards/split={split}/{part}-{written[split]:04d}.parquet", rows)
            written[split] += 1
            del held[split]

        for item, content, mask, problem in self._read(unit):
            group = dicom.patient(content) if item.group is None else item.group
            # Exact duplicates go to the same split when nothing else ties them together.
            tied = replace(item, group=hashlib.sha256(content).hexdigest()[:16] if group is None else group)
            split = data.choose_split(tied, self.present, self.label_free)
            source = data.text(item.path)
            for name, picture, reason in sources.frames(item, content, problem):
                if picture is None:
                    bad.append({"id": name, "source": source, "split": split, "reason": reason})
                    continue
                pixels = np.asarray(picture)
                grey = bool((pixels == pixels[..., :1]).all())
                # A JPEG stays as it is; anything else becomes a PNG that any reader opens.
                image = content if content[:2] == b"\xff\xd8" else images.encode_png(pixels)
                good.setdefault(split, []).append({
                    "id": name, "image": image, "height": picture.height, "width": picture.width,
                    "label": None if item.label is None else self.names.index(item.label), "class_name": item.label,
                    "group": group, "source": source, "grey": grey, "mask": mask,
                })  # fmt: skip
                held[split] += len(image)
                if len(good[split]) == UNIT_ROWS or held[split] > SHARD_BYTES:
                    flush(split)
        for split in sorted(good):
            flush(split)
        for split in {*data.SPLITS.values(), "archive"}:
            self._drop_from(f"shards/split={split}/{part}", written[split])
        return pa.Table.from_pylist(bad, REJECTED)

    def _drop_from(self, name: str, first: int) -> None:
        """Drop what an earlier try of a unit, killed, has left from a number on: an image that has been replaced since
        may have been in another split."""
        after = first
        while self.run.fs.exists(self.run.path(f"{name}-{after:04d}.parquet")):
            after += 1
        for number in reversed(range(first, after)):  # killed again, it leaves no gap to stop at
            self.run.fs.rm(self.run.path(f"{name}-{number:04d}.parquet"))

    def _read(self, unit: Unit) -> Iterator[tuple[Item, bytes, bytes | None, str]]:
        """Of each image of the unit: item, encoded image, encoded mask, and why there is none, if so."""
        if self.config is not None:
            for index in range(unit["start"], unit["stop"]):
                sample = synthetic.draw(self.config, index)
                item = Item("synthetic", f"{index:07d}", sample.split, self.names[sample.label], None)
                yield item, images.encode_png(sample.image), images.encode_png(sample.mask.astype("uint8") * 255), ""
        else:
            for item, content, problem in sources.read(unit):
                yield item, content, None, problem


OWN = ("dataset", "preset", "data_root", "images", "classes", "shortcut", "classifier")


def main(options: ShardOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("shard", options, prepare, OWN)


if __name__ == "__main__":
    command(ShardOptions, main)
