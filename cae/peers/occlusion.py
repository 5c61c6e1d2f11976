"""Occlusion: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, Section 4.2."""

from __future__ import annotations

import torch
from captum.attr import Occlusion
from torch import Tensor, nn


@torch.no_grad()
def occlusion(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    baseline: float = 0.0,
    window: int | None = None,
    stride: int | None = None,
    batch: int = 64,
) -> Tensor:
    """Mean, over the windows W that cover a pixel, of p(x) - p(x with W filled): maps (B, H, W), signed.

    p is the probability of each image's `target` (B,) for images (B, 3, H, W). The square window has `window` pixels a
    side, by default an eighth of the shorter side, and moves by `stride`, by default about half of that and odd (even
    steps stand the same way to a network's strides everywhere); at the right and lower borders it is clipped. It is
    filled with `baseline`, by default mid-grey as in the paper. Where a metric covers patches with that same value, the
    method has been told what the metric will ask, which is an unfair advantage: measure with another fill, or take
    another baseline. At most `batch` images at once. Raises ValueError for a window that is not in the image, or a
    stride that leaves gaps.
    """
    side = min(images.shape[2:])
    window = max(1, side // 8) if window is None else window
    stride = window // 2 | 1 if stride is None else stride
    if not 1 <= stride <= window <= side:
        raise ValueError(f"window {window}, stride {stride}, image side {side}: give 1 <= stride <= window <= side")
    method = Occlusion(lambda x: classifier(x).float().softmax(1))
    maps = [
        method.attribute(
            x,
            sliding_window_shapes=(x.shape[1], window, window),
            strides=(x.shape[1], stride, stride),
            baselines=baseline,
            target=label,
            perturbations_per_eval=batch // len(x),
        )[:, 0]  # the window covers all channels, which therefore have the same map
        for x, label in zip(images.split(batch), target.split(batch), strict=True)
    ]
    return torch.cat(maps)
