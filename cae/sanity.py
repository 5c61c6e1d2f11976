"""Do maps follow the classifier? The classifier with its weights drawn anew, and how alike two maps are.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim, "Sanity Checks for Saliency Maps", NeurIPS 2018: maps that stay as they
were when the weights are drawn anew do not come from what the classifier has learnt.

Legend: B maps, H height, W width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cae.classifiers import BlackBox
from cae.metrics import mean_ranks

WINDOW, SIGMA = 11, 1.5  # of the Gaussian that SSIM is taken under, in pixels
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1]


@torch.no_grad()
def cascade(blackbox: BlackBox, seed: int = 0) -> Iterator[tuple[str, BlackBox]]:
    """Copies of the classifier, each with the weights of one more stage drawn anew, from the output on: (stage, copy).

    A stage is a direct part of `blackbox.net`, a ResNet's `fc`, `layer4` … `conv1` for instance; in the last copy all
    weights are random. Each tensor is drawn from the normal distribution with its own mean and standard deviation, so
    that activations keep about their size even where batch norms are folded into the convolutions; running means and
    other buffers stay. The classifier itself is left as it is. Raises ValueError for one without weights of its own.
    """
    stages: dict[str, list[str]] = {}
    for name, _ in blackbox.net.named_parameters():
        stages.setdefault(name.partition(".")[0], []).append(name)
    if not stages:
        raise ValueError("the classifier holds no weights here to draw anew: give one that is a PyTorch network")
    random, rng = copy.deepcopy(blackbox), torch.Generator().manual_seed(seed)
    for stage in reversed(stages):
        for name in stages[stage]:
            weights = random.net.get_parameter(name)
            draw = torch.randn(weights.shape, generator=rng).to(weights)
            weights.copy_(weights.mean() + weights.std(correction=0) * draw)
        yield stage, copy.deepcopy(random)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation (B,) of each two maps of a and b (B, H, W); 0 where either is constant.

    Raises ValueError for other shapes and for values that are not finite.
    """
    _check(a, b)
    middle = (a[0].numel() + 1) / 2
    first, second = mean_ranks(a) - middle, mean_ranks(b) - middle  # (B, H*W)
    norm = (first.square().sum(1) * second.square().sum(1)).sqrt()  # 0 or at least 1/2: ranks are multiples of that
    return ((first * second).sum(1) / norm.clamp(min=0.5)).float()


def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,) of each two maps of a and b (B, H, W), scaled to [0, 1] each; 1 for equal ones.

    Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE
    TIP 2004, Eqs. 13 to 17: under a Gaussian of 11 x 11 pixels, sigma 1.5, the mean over all places where it lies in
    the image. A constant map counts as 0 everywhere. Raises ValueError as `rank_correlation` does, and for maps smaller
    than the Gaussian.
    """
    _check(a, b)
    if min(a.shape[1:]) < WINDOW:
        raise ValueError(f"maps are {a.shape[1]} x {a.shape[2]} pixels: structural similarity needs {WINDOW} a side")
    x, y = (_scaled(maps)[:, None] for maps in (a, b))  # (B, 1, H, W)
    place = torch.arange(WINDOW, device=a.device, dtype=x.dtype) - WINDOW // 2
    bell = torch.softmax(-0.5 * (place / SIGMA) ** 2, 0)

    def mean(maps: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(maps, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variances + C2)
    return (luminance * structure).mean((1, 2, 3)).float()


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(f"maps have shapes {tuple(a.shape)} and {tuple(b.shape)}: pass two stacks (B, H, W)")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("maps hold values that are not finite: leave those images out")


def _scaled(maps: Tensor) -> Tensor:
    """Maps (B, H, W) from 0 at their least to 1 at their greatest value, in double precision."""
    maps = maps.double()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
