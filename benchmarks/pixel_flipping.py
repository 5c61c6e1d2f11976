"""Our perturbation curves against Quantus' PixelFlipping on the same maps: the same numbers? how much faster?

On grey images, one batch: of a colour image Quantus flips single channels. Both fill with the blurred image. For each
method's maps both ways run in turn, `--rounds` times; seconds are the median, of CPU time, all threads together.

- `disjoint patches`: `metrics.perturbation_curve` over 7.5% of the image, as for AOPC. Quantus knows no patches: it is
  given the order in which ours cover the pixels, a patch a step. It has no way to stop and goes on to the whole image.
  What the classifier says of the image as it is, both are told: evaluate knows it, and it is the same for all maps.
- `insertion - deletion`: `metrics.insertion_deletion` in as many steps as patches fit along a side, against two calls
  of Quantus, most and least important first. Here both ask the classifier equally often.

Maps have ties, which Quantus breaks as its sort happens to: it is given each map's ranking by `metrics` instead. Its
steps must divide the image: the images' size is rounded to a multiple of the patch.

pip install -e '.[pipelines,bench]'
python benchmarks/pixel_flipping.py --run runs/chest_xray-quick
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from here import blackbox_of
from quantus import PixelFlipping
from record import append, here_and_now, program
from torch import Tensor, nn

from cae import metrics
from cae.classifiers import BlackBox
from cae.images import blur, to_tensor
from cae.peers import controls
from cae.peers.table import peers
from pipelines.bulk import read_images, read_table
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
PEERS = ("Grad-CAM", "FullGrad", "Simple FullGrad", "integrated gradients", "occlusion")
BATCH = 64  # Quantus' own; it has one image a step in a batch, ours all steps
COLUMNS = {"maps": "", "ours": ".4f", "quantus": ".4f", "difference": ".1e", "rank_ours": "", "rank_quantus": "",
           "seconds": ".2f", "quantus_seconds": ".2f", "ratio": ".1f"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Run folder with the stages up to classify, of grey images."""
    images: int = 32
    """Images of the split val, among those that the classifier gets right."""
    patch: int = 7
    """Side of the disjoint patches, in pixels: odd."""
    size: int = 0
    """Side of the images; 0: that of the run's. The larger, the more steps of Quantus' are beyond what AOPC needs."""
    rounds: int = 3
    """Times that each way is measured, in turn."""


class Grey(nn.Module):
    """The classifier for images of one channel (B, 1, H, W)."""

    def __init__(self, blackbox: BlackBox) -> None:
        super().__init__()
        self.blackbox = blackbox

    def forward(self, x: Tensor) -> Tensor:
        return self.blackbox(x.expand(-1, 3, -1, -1))


class Quantus:
    """PixelFlipping of one batch of grey images (B, 3, H, W) that fills with their blurred selves."""

    def __init__(self, blackbox: BlackBox, images: Tensor, target: Tensor) -> None:
        self.model = Grey(blackbox).eval()
        self.x = images[:, :1].contiguous().numpy()
        self.y = target.numpy()
        self.filled = blur(images[:, :1], metrics.FILL_BLUR).flatten(1).numpy()
        self.rows = np.arange(len(images))[:, None]

    def fill(self, arr: np.ndarray, indices: np.ndarray, **_: object) -> np.ndarray:
        """Quantus' own `batch_baseline_replacement_by_indices` with an image in place of a number."""
        arr = arr.copy()
        arr[self.rows, indices] = self.filled[self.rows, indices]
        return arr

    def flip(self, order: Tensor, pixels: int) -> Tensor:
        """Probability (B, steps) of the target after each step of so many pixels, those of least `order` first."""
        metric = PixelFlipping(features_in_step=pixels, normalise=False, perturb_func=self.fill, disable_warnings=True)
        ranked = -order[:, None].float().numpy()
        return torch.tensor(metric(self.model, self.x, self.y, ranked, batch_size=len(self.x), channel_first=True))

    def whole(self) -> Tensor:
        """Probability (B, 1) of the target before any step, which PixelFlipping leaves out."""
        with torch.no_grad():
            p = self.model(torch.from_numpy(self.x)).softmax(1)
        return p.gather(1, torch.from_numpy(self.y)[:, None])


def ranking(maps: Tensor) -> Tensor:
    """Each pixel's place (B, H, W), from 0, in the order of importance that `metrics` goes by."""
    number, height, width = maps.shape
    row, col = metrics.rank_centres(maps, height * width, 1, disjoint=False, seed=0).unbind(2)
    places = torch.arange(height * width).expand(number, -1)
    return torch.empty_like(places).scatter_(1, row * width + col, places).view_as(maps)


def curves(
    blackbox: BlackBox, images: Tensor, target: Tensor, maps: Tensor, patch: int
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each curve (B, steps) made our way, and by Quantus."""
    side = images.shape[2]
    few = metrics.disjoint_steps(side, patch=patch)
    theirs = Quantus(blackbox, images, target)
    whole = theirs.whole()
    given = blackbox, images, maps, target

    def disjoint() -> Tensor:
        return metrics.perturbation_curve(*given, steps=few, patch=patch, fill="blur", batch=BATCH, whole=whole[:, 0])

    def disjoint_by_quantus() -> Tensor:
        centres = metrics.rank_centres(maps, few, patch, disjoint=True, seed=0)
        order = metrics.covering_step(centres, side, side, patch)
        return whole - theirs.flip(order, patch**2)[:, :few]

    def difference() -> Tensor:
        found = metrics.insertion_deletion(*given, steps=side // patch, fill="blur", batch=BATCH, whole=whole[:, 0])
        return found.insertion - found.deletion

    def difference_by_quantus() -> Tensor:
        order = ranking(maps)
        deletion = torch.cat((whole, theirs.flip(order, side * patch)), 1)
        insertion = torch.cat((whole, theirs.flip(-order, side * patch)), 1).flip(1)
        return insertion - deletion

    return {
        "disjoint patches": (disjoint, disjoint_by_quantus),
        "insertion - deletion": (difference, difference_by_quantus),
    }


def timed(way: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns, and the seconds of CPU time that it took."""
    begun = time.process_time()
    return way(), time.process_time() - begun


def compare(
    ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]], rounds: int
) -> list[dict[str, str | float]]:
    """A row for each method, from its two ways to make a curve, and one for all."""
    rows: list[dict[str, str | float]] = []
    for name, pair in ways.items():
        results = [(timed(pair[0]), timed(pair[1])) for _ in range(rounds)]
        (ours, _), (theirs, _) = results[0]
        rows.append({
            "maps": name, "ours": float(ours.mean()), "quantus": float(theirs.mean()),
            "difference": float((ours - theirs).abs().max()),
            "seconds": median(result[0][1] for result in results),
            "quantus_seconds": median(result[1][1] for result in results),
        })  # fmt: skip
    for who in ("ours", "quantus"):
        for rank, row in enumerate(sorted(rows, key=lambda row, who=who: -row[who]), 1):
            row[f"rank_{who}"] = rank
    total = {key: sum(row[key] for row in rows) for key in ("seconds", "quantus_seconds")}
    rows.append({"maps": "all", "difference": max(row["difference"] for row in rows)} | total)
    for row in rows:
        row["ratio"] = row["quantus_seconds"] / row["seconds"]
    return rows


def main(options: Options) -> None:
    """Measure and append to the table."""
    warnings.filterwarnings("ignore", module="quantus")  # it says so when a fill changes little
    run = Run(options.run)
    settings = run.state["options"]
    if not run.result("shard")["grey"]:
        sys.exit(f"{options.run} has images in colour, of which Quantus flips channels, not pixels: give a grey run")
    blackbox = blackbox_of(run)
    table = read_table(run, "predictions", ["id", "split", "label", "predicted"]).to_pandas()
    right = table[(table.split == "val") & (table.label == table.predicted)]
    some = right.sample(min(options.images, len(right)), random_state=0)
    size = options.patch * round((options.size or settings["model"]["image_size"]) / options.patch)
    images = to_tensor(read_images(run, some.id.to_numpy(), size, settings["fit"]))
    target = torch.from_numpy(some.predicted.to_numpy(np.int64))
    maps = {name: peers()[name].maps(blackbox, images, target) for name in PEERS}
    maps |= {"random": controls.random_map(images), "Sobel": controls.sobel(images), "centre": controls.centre(images)}
    pairs = {name: curves(blackbox, images, target, heat, options.patch) for name, heat in maps.items()}
    common = {**here_and_now(), "threads": torch.get_num_threads(),
              "run": Path(options.run).name, "size": size, "images": len(images), "patch": options.patch}  # fmt: skip
    rows = []
    for curve in pairs["random"]:
        for found in compare({name: pair[curve] for name, pair in pairs.items()}, options.rounds):
            shown = {key: f"{found[key]:{form}}" for key, form in COLUMNS.items() if key in found}
            rows.append(common | {"curve": curve} | dict.fromkeys(COLUMNS, "") | shown)
            print("  ".join(f"{key} {value}" for key, value in ({"curve": curve} | shown).items()), flush=True)
    append(TABLE, rows)


if __name__ == "__main__":
    program(Options, main, __doc__)
