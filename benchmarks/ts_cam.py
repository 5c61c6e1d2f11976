"""TS-CAM, in a table apart: its own vision transformer, trained on a run's images, and what its maps are worth.

The transformer learns the classes that the run's classifier b predicts, on the training images. Then, on test images
that both get right, AOPC over disjoint patches under three fills: of TS-CAM's maps, of the controls, and of occlusion,
which asks the classifier itself and so shows what there is to find:

- `own`: for the transformer, which TS-CAM explains. How far a probability drops depends on the classifier, so these
  numbers compare with each other, not with tables about b;
- `b`: the transfer. Do the maps of one network explain another one, trained to say the same?

The authors fine-tune a DeiT that knows ImageNet. Here nothing is pre-trained, so the transformer is trained as DeiT is:
AdamW with a weight decay of 0.05, but none on norms, biases, class token and positions; warm-up, then cosine; label
smoothing 0.1; stochastic depth 0.1. Smaller than theirs: 64 patches of 8x8 at 64 pixels, not 196 of 16x16 at 224, and 4
layers of 96, not 12 of 192 or more. Other than theirs: augmentation is that of the built-in classifiers, the rate 2e-3.

python benchmarks/ts_cam.py --run runs/chest_xray-quick
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from methods import groups_of, networks
from record import append, here_and_now, program
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor

from cae import classifiers, metrics
from cae.images import to_tensor
from cae.peers import controls
from cae.peers.occlusion import occlusion
from cae.peers.ts_cam import TSCAM, ts_cam
from pipelines.bulk import read_images, read_table
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
BATCH = 64


@dataclass(frozen=True)
class Options:
    """What to train and measure."""

    run: str
    """Run folder with the stages up to train."""
    epochs: int = 20
    """Passes over the training images."""
    images: int = 200
    """Images of the split test that are measured."""
    draws: int = 2
    """Random images that the fill `uniform` is averaged over."""
    seed: int = 0
    """Seed of everything random."""


def train(net: TSCAM, images: np.ndarray, labels: Tensor, epochs: int, seed: int) -> None:
    """Train on images (N, S, S, 3) uint8 and their classes (N,), and leave the network in evaluation mode."""
    matrices = [weight for weight in net.parameters() if weight.ndim in (2, 4)]
    others = [weight for weight in net.parameters() if weight.ndim in (1, 3)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    steps = -(-len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps * epochs, pct_start=0.1, cycle_momentum=False
    )
    rng = torch.Generator().manual_seed(seed)
    net.train()
    for epoch in range(epochs):
        begun, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(labels), generator=rng).split(BATCH):
            x = classifiers.augment(to_tensor(images[chosen.numpy()]), rng)
            loss = F.cross_entropy(net(x), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        print(f"epoch {epoch + 1}/{epochs}  loss {total:.3f}  {time.perf_counter() - begun:.0f} s", flush=True)
    net.eval().requires_grad_(False)


@torch.no_grad()
def predictions(net: TSCAM, images: Tensor) -> np.ndarray:
    """Classes (B,) of images (B, 3, H, W)."""
    return torch.cat([net(chunk) for chunk in images.split(BATCH)]).argmax(1).numpy()


def aopc_rows(classifier: metrics.Classifier, images: Tensor, target: Tensor, maps: dict[str, Tensor], draws: int,
              seed: int, groups: list[str]) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each fill and method: AOPC over disjoint patches, and by how much TS-CAM is ahead, paired, with images
    of a group drawn together."""
    steps, rows = metrics.disjoint_steps(images.shape[2]), []
    for fill in get_args(metrics.Fill):
        scores = {}
        for name, heat in maps.items():
            curve = metrics.perturbation_curve(
                classifier, images, heat, target, steps=steps, fill=fill, draws=draws, seed=seed
            )
            scores[name] = metrics.aopc(curve)
        for name, score in scores.items():
            ahead, low, high = metrics.paired_bootstrap(scores["TS-CAM"], score, groups=groups)
            rows.append({"fill": fill, "maps": name, "aopc": f"{float(score.mean()):.4f}",
                         "ts_cam_ahead_by": f"{ahead:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}"})  # fmt: skip
    return rows


def main(options: Options) -> None:
    """Train, measure and append to the table."""
    run = Run(options.run)
    settings = run.state["options"]
    size = settings["model"]["image_size"]
    blackbox, cae = networks(run)
    table = read_table(run, "predictions", ["id", "split", "label", "predicted"]).to_pandas()

    def images_of(part: pd.DataFrame) -> np.ndarray:
        return read_images(run, part.id.to_numpy(), size, settings["fit"])

    torch.manual_seed(options.seed)
    net = TSCAM(len(blackbox.classes), size)
    known = table[table.split == "train"]
    begun = time.perf_counter()
    train(net, images_of(known), torch.from_numpy(known.predicted.to_numpy(np.int64)), options.epochs, options.seed)
    numbers = {**here_and_now(), "threads": torch.get_num_threads(),
               "run": Path(options.run).name, "size": size, "trained_on": len(known), "epochs": options.epochs,
               "seconds": f"{time.perf_counter() - begun:.0f}"}  # fmt: skip
    for split in ("val", "test"):
        part = table[(table.split == split) & table.label.notna()]
        part = part.assign(own=predictions(net, to_tensor(images_of(part))))
        accuracy = balanced_accuracy_score(part.label.astype(int), part.own)
        numbers |= {f"agrees_{split}": f"{(part.own == part.predicted).mean():.3f}",
                    f"balanced_accuracy_{split}": f"{accuracy:.3f}"}  # fmt: skip
    print("  ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
    right = part[(part.label == part.predicted) & (part.label == part.own)]  # of test, the last of them
    some = right.sample(min(options.images, len(right)), random_state=options.seed)
    x, target = to_tensor(images_of(some)), torch.from_numpy(some.predicted.to_numpy(np.int64))
    with torch.no_grad():
        reconstruction = cae.decode(*cae.encode(x))
    maps = {
        "TS-CAM": ts_cam(net, x, target),
        "random": controls.random_map(x, options.seed),
        "Sobel": controls.sobel(x),
        "centre": controls.centre(x),
        "|x - reconstruction|": controls.reconstruction_error(x, reconstruction),
    }
    rows, groups = [], groups_of(run, some.id)
    for name, classifier in (("own", net), ("b", blackbox)):
        measured = maps | {"occlusion": occlusion(classifier, x, target)}
        for row in aopc_rows(classifier, x, target, measured, options.draws, options.seed, groups):
            rows.append(numbers | {"images": len(x), "explained": name} | row)
            print("  ".join(f"{key} {value}" for key, value in ({"explained": name} | row).items()), flush=True)
    append(TABLE, rows)


if __name__ == "__main__":
    program(Options, main, __doc__)
