"""What a person wants of a trained CAE, measured cheaply on held-out images, and one number for all of it.

An explanation is of use when its path is believed from end to end, when its map names pixels that matter to b, and when
the images along the path are still those of this individual. Each is a number up to 1, and their geometric mean is the
score: none makes up for the lack of another.

Legend: N images, H height, W width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cae.classifiers import BlackBox, decided
from cae.explain import explain
from cae.metrics import aopc, disjoint_steps, perturbation_curve
from cae.networks import CAE

DRAWS = 1  # random fills per perturbation


@dataclass(frozen=True, eq=False)
class Judgement:
    """What `judge` returns for N images."""

    measures: dict[str, float]
    """`swap_success`: share of the swaps that b gives the donor's class; `oracle_success`: that of the oracle, if one
    was given; `keeps_class`: share of the reconstructions that keep b's class; `believed`: share of the images for
    which all of these hold; `aopc`: of the maps on the way to the swap, disjoint patches, uniform fill;
    `reconstruction_error`: mean |x - reconstruction|, of [-1, 1]; `likeness`: 1 - that over mean |x - mean image|;
    `score`: (`believed` * `aopc` * `likeness`)^(1/3), factors below 0 counting as 0.

    Swaps towards the class that b sees anyway, and of an image with itself, are left out; NaN for want of others."""
    reconstruction: Tensor
    """(N, 3, H, W)."""
    swap: Tensor
    """(N, 3, H, W) the images with their donors' class codes."""
    p_target: Tensor
    """(N,) b's probability of the donor's class in the swap."""


def draw_donors(y: np.ndarray) -> np.ndarray:
    """For each image of classes y (N,) the position of a random image of another class, always the same one.

    Where all have one class there is nothing to swap, and each is its own donor.
    """
    rng = np.random.default_rng(0)
    if len(set(y)) < 2:
        return np.arange(len(y))
    return np.array([rng.choice(np.flatnonzero(y != mine)) for mine in y])


@torch.no_grad()
def judge(cae: CAE, blackbox: BlackBox, x: Tensor, target: Tensor, donors: Tensor, oracle: BlackBox | None = None,
          batch: int = 32) -> Judgement:  # fmt: skip
    """Swap, explain and perturb images x (N, 3, H, W), `batch` at a time.

    Each gets the class code of x[donors], `donors` (N,), and should then have the class `target` (N,), the donor's.
    The map is that of `explain`'s default mode. Nothing random but for fixed seeds: two CAEs meet the same questions.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for rows in torch.arange(len(x), device=x.device).split(batch):
        for name, values in _walk(cae, blackbox, x[rows], target[rows], x[donors[rows]], oracle).items():
            found[name].append(values)
    of = {name: torch.cat(values) for name, values in found.items()}
    reconstruction, swap, p_target = (of.pop(name) for name in ("reconstruction", "swap", "p_target"))
    asked = of.pop("asked") & (donors != torch.arange(len(x), device=x.device))
    means = {name: float(values[asked].float().nanmean()) for name, values in of.items()}
    error, spread = float((reconstruction - x).abs().mean()), float((x - x.mean(0)).abs().mean())
    means |= {"reconstruction_error": error, "likeness": 1 - error / max(spread, 1e-6)}
    return Judgement(means | {"score": score(**means)}, reconstruction, swap, p_target)


def score(*, believed: float, aopc: float, likeness: float, **_: float) -> float:
    """The geometric mean of the three that no explanation can do without; see `Judgement.measures`."""
    return float(np.prod(np.maximum([believed, aopc, likeness], 0)) ** (1 / 3))


def _walk(cae: CAE, blackbox: BlackBox, x: Tensor, target: Tensor, donors: Tensor,
          oracle: BlackBox | None) -> dict[str, Tensor]:  # fmt: skip
    """From the reconstruction of each of a few images to its swap: images, and what is measured for each image."""
    source = blackbox.probabilities(x).argmax(1)
    path = explain(cae, blackbox, x, source, target, cae.encode(donors)[0])  # in one step
    reconstruction, swap = path.frames[:, 0], path.frames[:, -1]
    p_swap = blackbox.probabilities(swap)
    fine, keeps = (
        torch.tensor([status not in bad for status in path.status], device=x.device)
        for bad in (("failed",), ("failed", "reconstruction_flipped"))
    )
    found = {
        "reconstruction": reconstruction, "swap": swap, "p_target": p_swap.gather(1, target[:, None])[:, 0],
        "asked": source != target, "swap_success": decided(p_swap) == target, "keeps_class": keeps,
    }  # fmt: skip
    found["believed"] = found["swap_success"] & found["keeps_class"]
    if oracle is not None:
        found["oracle_success"] = decided(oracle.probabilities(swap)) == target
        found["believed"] &= found["oracle_success"]
    drops = torch.zeros(len(x), device=x.device)  # a map that is not finite names no pixels
    if fine.any():
        curve = perturbation_curve(
            blackbox, x[fine], path.map[fine], source[fine], steps=disjoint_steps(x.shape[-1]), draws=DRAWS
        )
        drops[fine] = aopc(curve)
    return found | {"aopc": drops}
