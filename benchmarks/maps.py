"""Maps a second of `cae.explain` in its default mode against the plain form, on a trained run's network and images.

The plain form takes one image at a time: it encodes the image and the counter example, decodes at t = 0, 0.2 … 1 of
the way, one by one, until the classifier changes its mind, and takes the difference to the start. Both run in turn,
`--rounds` times; the table gives the median of each.

python benchmarks/maps.py --run runs/chest_xray-quick --sizes 64 128
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from methods import networks, read_counter_codes
from record import append, here_and_now, program, say
from torch import Tensor

from cae.classifiers import BlackBox
from cae.explain import explain
from cae.images import to_tensor
from cae.networks import CAE
from pipelines.bulk import read_images, read_table
from pipelines.maps import BATCH
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    run: str
    """Run folder with the stages up to embed."""
    sizes: tuple[int, ...] = (64, 128)
    """Image sizes; the networks take any."""
    images: int = 64
    """Images of the test split."""
    rounds: int = 3
    """Times that each way is measured, in turn."""


@torch.no_grad()
def plain(cae: CAE, blackbox: BlackBox, x: Tensor, counter: Tensor, target: int) -> tuple[Tensor, bool]:
    """Map (H, W) of one image x (1, 3, H, W), and whether b flipped."""
    code, individual = cae.encode(x)
    other, _ = cae.encode(counter)
    start = frame = cae.decode(code, individual)
    for t in (0.2, 0.4, 0.6, 0.8, 1.0):
        frame = cae.decode(code + t * (other - code), individual)
        if int(blackbox.probabilities(frame).argmax()) == target:
            return (frame - start).abs().mean(1)[0], True
    return (frame - start).abs().mean(1)[0], False


def main(options: Options) -> None:
    """Measure and append to the table."""
    run = Run(options.run)
    blackbox, cae = networks(run)
    table = read_table(run, "codes", ["id", "split"]).to_pandas()
    ids = table[table.split == "test"].id
    ids = ids.sample(min(options.images, len(ids)), random_state=0).to_numpy()
    counters, fit = read_counter_codes(run), run.state["options"]["fit"]
    rows = []
    for size in options.sizes:
        x = to_tensor(read_images(run, ids, size, fit))
        examples = to_tensor(read_images(run, np.array([counters[c][0] for c in sorted(counters)]), size, fit))
        p = blackbox.probabilities(x)
        source, target = p.argmax(1), p.argsort(dim=1, descending=True, stable=True)[:, 1]
        codes = torch.from_numpy(np.stack([counters[c][1] for c in target.tolist()]))

        def one_by_one(x: Tensor = x, examples: Tensor = examples, target: Tensor = target) -> float:
            found = [plain(cae, blackbox, x[i : i + 1], examples[t : t + 1], t) for i, t in enumerate(target.tolist())]
            return sum(flipped for _, flipped in found) / len(found)

        def ours(x: Tensor = x, codes: Tensor = codes, source: Tensor = source, target: Tensor = target) -> float:
            flipped = 0
            for i in torch.arange(len(x)).split(BATCH):
                found = explain(cae, blackbox, x[i], source[i], target[i], codes[i])
                flipped += int((found.flip_at != 1).sum())  # not a number where it flipped and nobody looked for where
            return flipped / len(x)

        ways: dict[str, Callable[[], float]] = {"plain": one_by_one, "ours": ours}
        times: dict[str, list[float]] = {name: [] for name in ways}
        share = {name: way() for name, way in ways.items()}  # warms up
        for _ in range(options.rounds):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                times[name].append((time.perf_counter() - begun) / len(x))
        for name in ways:
            took = median(times[name])
            rows.append({
                **here_and_now(), "threads": torch.get_num_threads(),
                "size": size, "images": len(x), "way": name, "maps_per_second": f"{1 / took:.2f}",
                "ratio": f"{median(times['plain']) / took:.2f}", "flipped": f"{share[name]:.3f}",
            })  # fmt: skip
            say(rows[-1])
    append(TABLE, rows)


if __name__ == "__main__":
    program(Options, main, __doc__)
