"""Is every image explained exactly once, whatever is killed and when? `explain --archive` against an undisturbed call.

A Ray cluster of a head and two nodes is started on this machine, and a finished run explains an archive of synthetic
images on it, once undisturbed. Then again into other folders, while at random moments one of these is killed by
signal 9, until `--kills` of them have been:

- `driver`: the command itself, which is then called again;
- `worker`: one of the processes that explain, which Ray Data is to replace;
- `node`: a node's raylet and with it all that runs there; another node takes its place.

The rows of every folder are held against the undisturbed ones: none lost, none doubled, the same values.

python benchmarks/soak.py --run runs/synthetic-quick --work runs/soak
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from PIL import Image
from ray.cluster_utils import Cluster
from record import append, here_and_now, program, say

from cae import synthetic
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
EXPLAIN = Path(__file__).parents[1] / "pipelines" / "explain.py"
KINDS = ("driver", "worker", "node")
WORKER = "ray::MapWorker"  # what Ray calls the processes of Ray Data's actors
NUMBERS = ("flip_at", "p_source_start", "p_source_end", "p_target_start", "p_target_end", "reconstruction_error",
           "code_distance")  # fmt: skip
CLOSE = 1e-3  # of probabilities and the like: sums of floats in another order


@dataclass(frozen=True)
class Options:
    """What to explain, and how often to kill."""

    run: str
    """Finished run folder, of synthetic images or any other."""
    work: str
    """Folder for the archive and the explanations; what is there is removed."""
    images: int = 4000
    """Images of the archive."""
    kills: int = 20
    """Kills in all, over as many explanations as it takes."""
    longest: float = 30.0
    """Seconds between two kills, at most; at least 1."""
    seed: int = 0
    """Seed of the images, of the moments and of what is killed."""


class Nodes:
    """A Ray cluster on this machine whose head runs nothing and whose two nodes can be killed."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]

    def kill(self, index: int) -> None:
        """Kill one node, and start another in its place."""
        self.cluster.remove_node(self.nodes.pop(index), allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=2))


def make_archive(folder: Path, images: int, size: int, seed: int) -> None:
    """Synthetic images as PNG files, and a broken one for every hundred."""
    config = synthetic.Synthetic(images, size, seed=seed)
    for i in range(images):
        path = folder / f"{i // 1000:03d}" / f"{i:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.draw(config, i).image).save(path)
        if i % 100 == 50:
            path.write_bytes(path.read_bytes()[:200])


def start(options: Options, archive: Path, out: Path, address: str) -> subprocess.Popen[bytes]:
    """The command, on the cluster."""
    words = ["--run", options.run, "--archive", str(archive), "--out", str(out), "--workers", "2", "--threads", "1"]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen([sys.executable, str(EXPLAIN), *words], stdout=log, stderr=log,
                                env=os.environ | {"RAY_ADDRESS": address})  # fmt: skip


def kill(kind: str, driver: subprocess.Popen[bytes], nodes: Nodes, rng: random.Random) -> bool:
    """Kill one of a kind; whether there was one."""
    if kind == "driver":
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    elif kind == "node":
        nodes.kill(rng.randrange(2))
    else:
        ours = psutil.Process().children(recursive=True)  # and not those of another Ray on this machine
        workers = [process for process in ours if process.name().startswith(WORKER)]
        if not workers:
            return False
        rng.choice(workers).kill()
    return True


def explained(out: Path) -> pd.DataFrame:
    """All rows of a folder."""
    parts = sorted((out / "explanations").glob("*.parquet"))
    return pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)


def differences(rows: pd.DataFrame, expected: pd.DataFrame) -> dict[str, int]:
    """How many rows are lost, doubled, or have other values."""
    counts = rows.groupby(["id", "target"], dropna=False).size()
    both = expected.merge(rows.drop_duplicates(["id", "target"]), on=["id", "target"], suffixes=("", "_now"))
    same = (both.status == both.status_now) & (both.error.fillna("") == both.error_now.fillna(""))
    for name in NUMBERS:
        same &= np.isclose(both[name], both[f"{name}_now"], atol=CLOSE, equal_nan=True)
    maps = np.array([_same_map(a, b) for a, b in zip(both["map"], both["map_now"], strict=True)])
    return {
        "rows": len(rows), "lost": len(expected) - len(both), "doubled": int((counts - 1).sum()),
        "other_values": int((~(same & maps)).sum()),
    }  # fmt: skip


def _same_map(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.allclose(a.astype(np.float32), b.astype(np.float32), rtol=1e-2, atol=CLOSE)


def main(options: Options) -> None:
    """Explain undisturbed, then disturbed; compare and append to the table."""
    work = Path(options.work).absolute()
    shutil.rmtree(work, ignore_errors=True)
    make_archive(work / "archive", options.images, Run(options.run).state["options"]["model"]["image_size"],
                 options.seed)  # fmt: skip
    rng, nodes = random.Random(options.seed), Nodes()
    address = nodes.cluster.address
    begun = time.time()
    if start(options, work / "archive", work / "undisturbed", address).wait():
        sys.exit(f"the undisturbed call failed: see {work}/undisturbed.log")
    print(f"undisturbed: {time.time() - begun:.0f} s", flush=True)
    expected = explained(work / "undisturbed")
    killed: Counter[str] = Counter()
    calls = 0
    rows: list[dict[str, Any]] = []
    while killed.total() < options.kills:
        out, before, begun, own = work / f"disturbed-{len(rows)}", calls, time.time(), Counter[str]()
        driver = start(options, work / "archive", out, address)
        calls += 1
        while True:
            wait = rng.uniform(1, options.longest) if killed.total() + own.total() < options.kills else None
            try:
                if code := driver.wait(wait):
                    sys.exit(f"a call ended with {code} by itself: see {out.with_suffix('.log')}")
                break
            except subprocess.TimeoutExpired:
                kind = rng.choice(KINDS)
                if kill(kind, driver, nodes, rng):
                    own[kind] += 1
                    print(f"{time.time() - begun:5.0f} s  {kind} killed", flush=True)
                if kind == "driver":
                    driver = start(options, work / "archive", out, address)
                    calls += 1
        killed += own
        rows.append({
            **here_and_now(), "images": options.images,
            **{f"{kind}s_killed": own[kind] for kind in KINDS}, "calls": calls - before,
            "seconds": round(time.time() - begun), **differences(explained(out), expected),
        })  # fmt: skip
        say(rows[-1])
        append(TABLE, rows[-1:])
    nodes.cluster.shutdown()
    wrong = sum(row["lost"] + row["doubled"] + row["other_values"] for row in rows)
    print(f"{killed.total()} kills: {wrong} rows lost, doubled or with other values")


if __name__ == "__main__":
    program(Options, main, __doc__)
