"""Work over a whole archive on Ray Data: units of work that are each done exactly once.

A unit is a dict that names what to do and, under `part`, the Parquet file that holds its result. The file is written
in one piece, last, so a unit whose file exists is done. A job that is killed at any time and called again does the
rest; a unit that Ray runs twice (a retry after a lost node) writes the same file again. Ray Data's own row-level
checkpoints need rows to reach a write task first and keep a growing set of ids to filter by; files cost one listing.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from cae.data import first_line
from cae.images import Fit, UnreadableImage, decode
from pipelines.cluster import cores, gpus_of, pace, threads_for
from pipelines.mistakes import Damaged, UserError
from pipelines.run import Run, RunOptions

Unit = dict[str, Any]
Worker = Callable[[Unit], pa.Table | Iterable[pa.Table]]
UNIT_ROWS = 256
PATIENCE = (1, 5, 20, 60)  # seconds before a unit is tried again whose files' server cannot be reached
FILLED = 8
"""Batches are filled up to a multiple of this: torch keeps its CPU kernels for every size of batch that they were built
for, which is a hundred MiB over an archive. Where a path is searched for its flip (modes `path`, `contrast`, `input`)
it does not help: as many images are asked about at each step as have not flipped yet."""
ACTOR_ROWS = 1000  # images that are worth starting another actor for, which takes seconds


class _Task:
    """One worker of a bulk stage, in an actor: does units and writes their parts."""

    def __init__(self, worker: type, arguments: dict[str, Any], folder: str, out: str, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # what is said to be in float32 has all of its digits
        self.run = Run(folder)
        self.out = out
        self.worker: Worker = worker(self.run, **arguments)

    def __call__(self, row: dict[str, bytes]) -> dict[str, Any]:
        unit: Unit = pickle.loads(row["unit"])
        for wait in (*PATIENCE, None):
            try:
                write_table(self.run, f"{self.out}/{unit['part']}", self.worker(unit))
            except (ConnectionError, TimeoutError) as error:  # a server that is down comes back, mostly
                if wait is None:
                    return {"rows": 0, "error": pickle.dumps(error)}
                time.sleep(wait)
            except (ValueError, OSError) as error:  # of these Ray Data would hand on no more than the text
                return {"rows": 0, "error": pickle.dumps(error)}
            else:
                break
        return {"rows": unit["rows"], "error": b""}


def bulk(
    run: Run,
    options: RunOptions,
    stage: str,
    units: list[Unit],
    worker: type,
    out: str,
    *,
    on_gpu: bool = True,
    **arguments: Any,
) -> None:
    """Do every unit whose part is not in `out` yet; `worker(run, **arguments)` is called on one unit at a time.

    Prints progress with rate and time left. `unit["rows"]` is the number of images in it.
    """
    done = set(list_parts(run, out))
    pending = [unit for unit in units if unit["part"] not in done]
    rows = sum(unit["rows"] for unit in pending)
    if len(pending) < len(units):
        print(f"{stage:9} {len(units) - len(pending)} of {len(units)} parts are there already", flush=True)
    if not pending:
        return
    gpus = gpus_of(options) if on_gpu else 0
    wanted = options.workers or gpus or min(cores(options), -(-rows // ACTOR_ROWS))
    actors = min(len(pending), max(1, min(wanted, gpus or cores(options))))
    # Pickled, since Arrow would change a unit's types, and takes no file name that is no UTF-8.
    rows_of_units = [{"unit": pickle.dumps(unit)} for unit in pending]
    data = ray.data.from_items(rows_of_units, override_num_blocks=len(pending)).map(
        _Task,  # type: ignore[arg-type]  # a class whose instances are called, as Ray Data's actors want it
        fn_constructor_kwargs={
            "worker": worker, "arguments": arguments, "folder": run.folder, "out": out,
            "threads": threads_for(options, actors, gpus),
        },
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=0.5,
        num_gpus=1 if gpus else 0,
    )  # fmt: skip
    seen, begun, told = 0, time.time(), time.time()
    for result in data.iter_rows():
        if result["error"]:
            raise pickle.loads(result["error"])
        seen += result["rows"]
        if time.time() - told > 10 and seen < rows:
            told = time.time()
            rate = seen / (told - begun)
            left = (rows - seen) / rate / 60
            print(f"{stage:9} {seen:,}/{rows:,} images  {pace(rate)}  {left:.1f} min left", flush=True)


def listing(units: list[Unit], version: str) -> str:
    """A hash of what there is to do, and of the `version` of where it comes from: 64 hexadecimal digits.

    Of an item's fields only those that differ from their defaults are in it, with their names: a field that is new to
    the code leaves the hashes of what was listed before as they were.
    """

    def told(value: Any) -> Any:
        if isinstance(value, list):
            return [told(one) for one in value]
        if not is_dataclass(value):
            return value
        return [(f.name, held) for f in fields(value) if (held := getattr(value, f.name)) != f.default]

    found = hashlib.sha256(version.encode())
    for unit in units:
        named = sorted((name, told(value)) for name, value in unit.items())
        found.update(repr(named).encode("utf-8", "surrogateescape"))
    return found.hexdigest()


# --- Parquet in the run folder ---------------------------------------------------------------------------------------


def write_table(run: Run, name: str, tables: pa.Table | Iterable[pa.Table]) -> None:
    """Write a Parquet file in one piece: readers see all of it or nothing.

    Of several tables, at least one, that are made one after the other, only their compressed form is held.
    """
    several = iter([tables] if isinstance(tables, pa.Table) else tables)
    first, file = next(several, None), io.BytesIO()
    if first is None:
        raise ValueError(f"{name}: no table to write")
    with pq.ParquetWriter(file, first.schema, write_page_checksum=True) as writer:
        for table in chain([first], several):
            writer.write_table(table, row_group_size=UNIT_ROWS)
    run.write(name, file.getvalue())


def list_parts(run: Run, folder: str) -> list[str]:
    """Parquet files below a folder of the run, relative to it, sorted."""
    base = run.fs._strip_protocol(run.path(folder))
    if not run.fs.isdir(base):
        return []
    return sorted(path[len(base) + 1 :] for path in run.fs.find(base) if path.endswith(".parquet"))


def read_table(run: Run, folder: str, columns: list[str] | None = None, parts: list[str] | None = None) -> pa.Table:
    """The parts of a folder of the run, these or all, sorted by id. Of all, hidden folders (`_parts`) are left out."""
    if parts is None:
        parts = [part for part in list_parts(run, folder) if not part.startswith("_")]
    if not parts:
        raise UserError(f"{run.path(folder)} holds no Parquet files")
    return pa.concat_tables([read_part(run, f"{folder}/{part}", columns) for part in parts]).sort_by("id")


def read_predicted(run: Run, *splits: str) -> np.ndarray:
    """The classifier's classes of the images of some splits."""
    table = read_table(run, "predictions", ["id", "split", "predicted"])
    return table.filter(pc.is_in(table["split"], pa.array(splits)))["predicted"].to_numpy()


def read_part(run: Run, name: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file of the run."""
    with _opened(run, name) as file:
        return file.read(columns)


@contextmanager
def _opened(run: Run, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the run. Raises Damaged, with its name, for one that is."""
    path = run.path(name)
    with run.fs.open(path) as file:
        try:
            yield pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None) is not None:  # Arrow's own have none
                raise
            raise Damaged(f"{path} is damaged ({first_line(error)}): bring back a copy, or do the stage that made it "
                          "over (--again)") from error  # fmt: skip


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of N lists of equal length D, N > 0, as an array (N, D), with no Python object for every number."""
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


def list_shards(run: Run) -> list[tuple[str, str]]:
    """Split and file of every image shard, relative to the folder `shards`, whose other files are notes."""
    parts = [part for part in list_parts(run, "shards") if part.startswith("split=")]
    return [(part.split("/")[0].removeprefix("split="), part) for part in parts]


def shard_units(run: Run, splits: tuple[str, ...] | None = None) -> list[Unit]:
    """One unit per row group of the image shards, of some splits or all."""
    units = []
    for split, part in list_shards(run):
        if splits is not None and split not in splits:
            continue
        with _opened(run, f"shards/{part}") as file:
            groups = file.metadata
            units += [
                {
                    "split": split,
                    "shard": part,
                    "group": i,
                    "rows": groups.row_group(i).num_rows,
                    "part": f"{part.removesuffix('.parquet')}-{i:04d}.parquet",
                }
                for i in range(groups.num_row_groups)
            ]
    return units


def read_unit(run: Run, unit: Unit, columns: list[str] | None = None) -> pa.Table:
    """The shard rows of a unit."""
    with _opened(run, f"shards/{unit['shard']}") as file:
        return file.read_row_group(unit["group"], columns)


def decode_all(images: list[bytes], size: int, fit: Fit) -> tuple[np.ndarray, list[str]]:
    """Encoded images to uint8 (N, size, size, 3), and for each the reason why it could not be decoded, or ""."""

    def one(data: bytes) -> tuple[np.ndarray, str]:
        try:
            return decode(data, size, fit), ""
        except UnreadableImage as error:
            return np.zeros((size, size, 3), np.uint8), str(error)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        decoded = list(pool.map(one, images))
    return np.stack([array for array, _ in decoded]), [reason for _, reason in decoded]


def read_images(run: Run, ids: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """The images with these ids, uint8 (N, size, size, 3), in their order; only those are held in memory.

    An id may come more than once. Raises KeyError for one that no shard holds.
    """
    names, places = np.unique(ids, return_inverse=True)
    place = {name: i for i, name in enumerate(names)}
    missing = set(names)
    out = np.empty((len(names), size, size, 3), np.uint8)
    for unit in shard_units(run):
        rows = [i for i, name in enumerate(read_unit(run, unit, ["id"])["id"].to_pylist()) if name in place]
        if rows:
            table = read_unit(run, unit, ["id", "image"]).take(rows)
            arrays, _ = decode_all(table["image"].to_pylist(), size, fit)
            found = table["id"].to_pylist()
            out[[place[name] for name in found]] = arrays
            missing -= set(found)
    if missing:
        raise KeyError(f"no shard holds the image {min(missing)}")
    # Copying all of them only where some come twice or in another order.
    return out if np.array_equal(names, ids) else out[places]


def batches(table: pa.Table, size: int) -> Iterator[pa.Table]:
    """A table in slices of `size` rows."""
    for start in range(0, len(table), size):
        yield table.slice(start, size)


def filled(count: int, multiple: int = FILLED) -> list[int]:
    """Which of `count` items to put into a batch: all, and the last again until there is a multiple of `multiple`."""
    return [*range(count), *[count - 1] * (-count % multiple)]
