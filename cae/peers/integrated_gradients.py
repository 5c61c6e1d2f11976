"""Integrated gradients: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017."""

from __future__ import annotations

import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn


def integrated_gradients(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    baseline: float | Tensor = -1.0,
    steps: int = 50,
    batch: int = 64,
) -> Tensor:
    """(x - x') * integral over a in [0, 1] of df/dx at x' + a (x - x'), summed over channels: maps (B, H, W), signed.

    f is the logit of each image's `target` (B,), x the images (B, 3, H, W), x' the `baseline`: a value in [-1, 1], by
    default black as in the paper, or images that broadcast to x. A pixel that equals the baseline gets nothing. Where a
    metric fills pixels with that same baseline, the method has been told what the metric will ask, which is an unfair
    advantage: measure with another fill, or take another baseline. `steps` points by Gauss-Legendre; no more than
    `batch` images at once.
    """
    method = IntegratedGradients(classifier)
    baselines = torch.as_tensor(baseline).to(images).expand_as(images)
    maps = []
    for x, start, label in zip(images.detach().split(batch), baselines.split(batch), target.split(batch), strict=True):
        parts = method.attribute(x, start, label, n_steps=steps, internal_batch_size=batch)
        maps.append(parts.detach().sum(1))
    return torch.cat(maps).to(images.dtype)
