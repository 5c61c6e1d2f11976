"""Do memory and time per image stay flat? Stages shard, embed and explain over more and more synthetic images.

The networks are tiny ones, from a run over the smallest number of images, for what is measured is the way of the data.
Each stage is a command of its own. Its peak memory is that of the driver and of every process under it, sampled twice a
second: the sum of what each has for itself (USS), and the largest worker's. Seconds an image are those that `--images`
more images take, over the next smaller number, so that the start of Ray and of the workers does not count.

Last, `explain`'s worker is called on the same units in one process with as many threads as there are cores: a bare
loop to compare the rate of the stage with.

python benchmarks/scale.py --work runs/scale --sizes 1000 10000 100000
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from record import append, here_and_now, program

from pipelines.bulk import shard_units
from pipelines.explain import ExplainOptions, path_options
from pipelines.maps import ExplainWorker
from pipelines.run import Run
from pipelines.ways import read_ways

TABLE = Path(__file__).with_suffix(".csv")
BARE = Path(__file__).with_name("scale_bare_loop.csv")
FULL = Path(__file__).parents[1] / "pipelines" / "full.py"
TINY = [
    "--image-size", "32", "--width", "16", "--blocks", "1", "--disc-width", "8", "--pairs", "200", "--epochs", "0",
    "--batch", "4", "--warm-up", "50", "--recon-warm-up", "20", "--resnet.epochs", "1", "--resnet.min-steps", "0",
    "--overlays", "0", "--splits", "train", "val", "test",
]  # fmt: skip
MEASURED = ("shard", "embed", "explain")
BARE_IMAGES = 4000  # of the largest run that the bare loop explains
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """How much to measure."""

    work: str
    """Folder for the runs; those there already are removed."""
    sizes: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of images, rising; two at least."""


def measured(stage: str, folder: Path, *words: str) -> dict[str, float]:
    """Run one stage; its seconds, and the peak memory in MiB of all its processes and of the largest worker."""
    driver = subprocess.Popen([sys.executable, str(FULL), "--run", str(folder), "--stages", stage, *words])
    peak = {"memory": 0.0, "largest_worker": 0.0}
    while driver.poll() is None:
        sizes = {}
        try:
            for process in (psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)):
                sizes[process.pid] = process.memory_full_info().uss / MIB
        except psutil.NoSuchProcess:  # one that ended meanwhile
            continue
        peak["memory"] = max(peak["memory"], sum(sizes.values()))
        workers = [size for pid, size in sizes.items() if pid != driver.pid]
        peak["largest_worker"] = max(peak["largest_worker"], *workers, 0.0)
        time.sleep(0.5)
    if driver.returncode:
        sys.exit(f"stage {stage} of {folder} failed")
    seconds = json.loads((folder / "run.json").read_text())["stages"][stage]["seconds"]
    return {"seconds": seconds, **peak}


def bare_rate(folder: Path) -> float:
    """Images a second that explain's worker does in this process, without Ray and without writing anything."""
    run = Run(str(folder))
    options = ExplainOptions(run=str(folder), overlays=0)
    chosen = run.result("classify")
    torch.set_num_threads(os.cpu_count() or 1)
    worker = ExplainWorker(run, chosen["spec"], tuple(chosen["classes"]), run.path("cae"), 32, "crop", "cpu",
                           read_ways(run, options), False, path_options(options))  # fmt: skip
    units = [unit | {"overlays": 0} for unit in shard_units(run)]
    list(worker(units[0]))  # warm
    begun, done = time.time(), 0
    for unit in units[1:]:
        list(worker(unit))
        done += unit["rows"]
        if done >= BARE_IMAGES:
            break
    return done / (time.time() - begun)


def main(options: Options) -> None:
    """Measure every size; append to the table and draw it."""
    work = Path(options.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    common = {**here_and_now(), "cores": os.cpu_count()}
    tracking = ["--tracking-uri", f"sqlite:///{work}/mlflow.db"]
    found: dict[tuple[str, int], dict[str, float]] = {}
    for size in options.sizes:
        folder = work / str(size)
        folder.mkdir(parents=True)
        words = ["--dataset", "synthetic", "--images", str(size), *TINY, *tracking]
        if size != options.sizes[0]:
            words += ["--classifier", str(work / str(options.sizes[0]) / "classifier")]
        for stage in ("shard", "classify", "train", "embed", "explain"):
            # As many processes whatever the size, or memory would grow with them.
            workers = ["--workers", str(os.cpu_count() or 1)] if stage in MEASURED else []
            found[stage, size] = measured(stage, folder, *words, *workers)
            print(f"{stage:9} {size:,} images  " + "  ".join(f"{k} {v:.0f}" for k, v in found[stage, size].items()),
                  flush=True)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for stage in MEASURED:
        for before, size in pairwise((0, *options.sizes)):
            now = found[stage, size]
            more = now["seconds"] - found[stage, before]["seconds"] if before else float("nan")
            rows.append(common | {
                "stage": stage, "images": size, "seconds": f"{now['seconds']:.1f}",
                "milliseconds_a_further_image": f"{1000 * more / (size - before):.3f}" if before else "",
                "memory_mib": f"{now['memory']:.0f}", "largest_worker_mib": f"{now['largest_worker']:.0f}",
            })  # fmt: skip
    append(TABLE, rows)
    *_, before, size = options.sizes
    rate = (size - before) / (found["explain", size]["seconds"] - found["explain", before]["seconds"])
    bare = bare_rate(work / str(size))
    rows.append(common | {"images": size, "rate": f"{rate:.1f}", "bare_rate": f"{bare:.1f}",
                          "ratio": f"{rate / bare:.2f}"})  # fmt: skip
    append(BARE, rows[-1:])
    draw(found, options.sizes).savefig(TABLE.with_suffix(".png"), dpi=120)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items() if k not in common))


def draw(found: dict[tuple[str, int], dict[str, float]], sizes: tuple[int, ...]) -> Figure:
    """Memory and milliseconds an image over the number of images."""
    figure = Figure((9, 3.5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    for stage in MEASURED:
        memory.plot(sizes, [found[stage, size]["memory"] for size in sizes], "o-", label=stage)
        further = [
            1000 * (found[stage, b]["seconds"] - found[stage, a]["seconds"]) / (b - a) for a, b in pairwise(sizes)
        ]
        speed.plot(sizes[1:], further, "o-", label=stage)
    for axes, label in ((memory, "peak memory of all processes (MiB)"), (speed, "milliseconds a further image")):
        axes.set(xscale="log", xlabel="images", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend(frameon=False)
    return figure


if __name__ == "__main__":
    program(Options, main, __doc__)
