"""What an archive costs, as far as a small run tells: FLOPs of an image in every stage, bytes of an image on disk.

FLOPs are counted (two per multiply-add) on the presets' own networks, with random weights and two classes. Bytes and
files are those of a finished run folder; `decode` is the time of a core to read one of its images; the index
of all images is what `shard` holds in memory at its end. What is called `on paper` is arithmetic from these numbers.

python benchmarks/cost.py --run runs/synthetic-quick
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import append, program
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cae import classifiers
from cae.config import PRESETS, ModelConfig, Preset
from cae.explain import explain
from cae.images import decode
from cae.networks import CAE, Discriminator
from cae.training import Trainer
from pipelines.bulk import list_parts, read_unit, shard_units
from pipelines.run import Run
from pipelines.shard import read_index

TABLE = Path(__file__).with_suffix(".csv")
NAMES = ("a", "b")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    run: str = ""
    """A finished run folder; empty: FLOPs only."""
    presets: tuple[Preset, ...] = ("quick", "standard", "paper")
    """Whose networks."""
    images: tuple[int, ...] = (10**6, 10**8)
    """Archives to reckon for."""
    tflops: float = 12.0
    """10^12 operations that a GPU does in a second: here a fifth of what an L4 is sold for in TF32, an assumption."""


class Flops(TorchDispatchMode):
    """Counts floating-point operations. FlopCounterMode follows modules too, and loses its way in `autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def count(work: Callable[[], object]) -> int:
    """Floating-point operations of some work."""
    with Flops() as flops:
        work()
    return flops.total


def model_of(preset: Preset) -> ModelConfig:
    """The sizes of a preset's networks; for grey images where it leaves that open."""
    model = PRESETS[preset].model
    return replace(model, channels=model.channels or 1)


def bulk(preset: Preset) -> dict[str, int]:
    """FLOPs of one image in the stages that go over the whole archive."""
    model = model_of(preset)
    cae, blackbox = CAE(model).eval(), classifiers.build(PRESETS[preset].resnet, NAMES).eval()
    x, label = torch.rand(1, 3, model.image_size, model.image_size), torch.tensor([0])
    with torch.no_grad():
        code, individual = cae.encode(x)
        predict, encode = count(lambda: blackbox.probabilities(x)), count(lambda: cae.encode(x))
        reconstruct = count(lambda: cae.decode(code, individual))
    one_map = count(lambda: explain(cae, blackbox, x, label, 1 - label, code + 1, codes=(code, individual)))
    return {"classify": predict, "embed": encode + reconstruct + predict, "explain": predict + encode + one_map}


def training(preset: Preset) -> dict[str, int]:
    """FLOPs of one image, or pair, in one step of training."""
    row, model = PRESETS[preset], model_of(preset)
    classifier = classifiers.build(row.resnet, NAMES)
    images = torch.rand(row.resnet.batch, 3, model.image_size, model.image_size)
    learned = count(lambda: classifier(images).sum().backward())
    once = replace(row.train, ema=0.0)  # the average of weights counts none, and fake tensors are not copied
    trainer = Trainer(CAE(model), Discriminator(model, 2), once, row.weights, 100, classifier.eval())
    pairs = torch.rand(2 * row.train.batch, 3, model.image_size, model.image_size)
    step = count(lambda: trainer.step(pairs, torch.zeros(len(pairs)).long()))
    return {"train the classifier, an image an epoch": learned // len(images), "train, a pair": 2 * step // len(pairs)}


def on_disk(run: Run) -> dict[str, tuple[float, float]]:
    """Bytes of an image, and files of a thousand, that each stage leaves behind; for `explanations`, of a map."""
    sizes = {}
    for folder in ("shards", "predictions", "codes", "explanations"):
        parts = [f"{folder}/{part}" for part in list_parts(run, folder) if part.startswith("split=")]
        rows = sum(_rows(run, part) for part in parts)
        sizes[folder] = (sum(run.fs.size(run.path(part)) for part in parts) / rows, 1000 * len(parts) / rows)
    return sizes


def _rows(run: Run, part: str) -> int:
    with run.fs.open(run.path(part)) as file:
        return pq.ParquetFile(file).metadata.num_rows


def decode_milliseconds(run: Run, size: int) -> float:
    """Median processor time to decode one stored image to `size` pixels."""
    times = []
    for image in read_unit(run, shard_units(run)[0], ["image"])["image"].to_pylist():
        begun = time.process_time()
        decode(image, size, "crop")
        times.append(time.process_time() - begun)
    return 1000 * statistics.median(times)


def index_bytes(run: Run) -> float:
    """Bytes of memory an image that the index of all images takes, as `shard` reads it at its end; its ids as text come
    to that."""
    tracemalloc.start()
    before = pa.total_allocated_bytes()  # Arrow's memory is none of Python's
    index = read_index(run)
    held = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held / len(index)


def on_paper(images: int, flops: int, tflops: float, kept: float, files: float, decode_ms: float) -> dict[str, float]:
    """What so many images cost in the stages that go over all of them, from `flops`, bytes, files and time of one."""
    return {
        "GPU-hours": images * flops / (tflops * 1e12) / 3600,
        "core-hours of decoding": 4 * images * decode_ms / 1000 / 3600,  # shard, classify, embed, explain
        "GB": images * kept / 1e9,
        "files": images * files / 1000,
    }


def main(options: Options) -> None:
    """Measure, print, and append to the table."""
    torch.set_num_threads(1)
    counts = {preset: bulk(preset) for preset in options.presets}
    with FakeTensorMode():  # shapes only: nothing is computed
        counts = {preset: training(preset) | counts[preset] for preset in options.presets}
    measured = [
        (f"{preset}, {PRESETS[preset].model.image_size} pixels", f"{stage}, GFLOP", f"{number / 1e9:.3g}")
        for preset, stages in counts.items()
        for stage, number in stages.items()
    ]
    if options.run:
        run = Run(os.path.abspath(options.run))
        size = run.state["options"]["model"]["image_size"]
        where = f"{Path(run.folder).name}, {size} pixels"
        kept, decode_ms = on_disk(run), decode_milliseconds(run, size)
        for folder, (size_of_one, files) in kept.items():
            measured += [
                (where, f"{folder}, bytes", f"{size_of_one:.0f}"),
                (where, f"{folder}, files/1000", f"{files:.2g}"),
            ]
        measured.append((where, "index in memory, bytes", f"{index_bytes(run):.0f}"))
        measured.append((where, "decode, ms", f"{decode_ms:.2g}"))
        for preset, images in product(options.presets, options.images):
            larger = (PRESETS[preset].model.image_size / size) ** 2  # than the run's maps
            stored = sum(n * (larger if folder == "explanations" else 1) for folder, (n, _) in kept.items())
            files = sum(files for _, files in kept.values())
            flops = sum(counts[preset][stage] for stage in ("classify", "embed", "explain"))
            cost = on_paper(images, flops, options.tflops, stored, files, decode_ms)
            of = f"{preset}, {images:.0e} images"
            measured += [(of, f"on paper: {what}", f"{number:.3g}") for what, number in cost.items()]
    rows = [
        {"date": datetime.date.today().isoformat(), "of": of, "measure": measure, "value": value}
        for of, measure, value in measured
    ]
    for row in rows:
        print(f"{row['of']:28} {row['measure']:40} {row['value']:>10}")
    append(TABLE, rows)


if __name__ == "__main__":
    program(Options, main, __doc__)
