"""RISE: Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def random_masks(
    number: int, height: int, width: int, *, cells: int = 7, keep: float = 0.5, seed: int = 0, batch: int = 64
) -> Iterator[Tensor]:
    """`number` masks in [0, 1], in chunks (n, H, W) of at most `batch`; the same for any `batch`.

    A grid of `cells` x `cells` is drawn from Bernoulli(`keep`), enlarged bilinearly to one cell more than the image
    needs, and cut out at a random shift of less than one cell: every pixel has the mean `keep`.
    """
    rng_grid, rng_shift = np.random.default_rng([*b"rise grid", seed]), np.random.default_rng([*b"rise shift", seed])
    cell = -(-height // cells), -(-width // cells)  # rounded up
    for start in range(0, number, batch):
        count = min(batch, number - start)
        grids = torch.from_numpy((rng_grid.random((count, 1, cells, cells)) < keep).astype(np.float32))
        shifts = rng_shift.integers(0, cell, (count, 2)).tolist()
        size = ((cells + 1) * cell[0], (cells + 1) * cell[1])
        large = F.interpolate(grids, size=size, mode="bilinear", align_corners=False)[:, 0]
        cut = [mask[y : y + height, x : x + width] for mask, (y, x) in zip(large, shifts, strict=True)]
        yield torch.stack(cut)


@torch.no_grad()
def rise(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    masks: int = 4000,
    cells: int = 7,
    keep: float = 0.5,
    baseline: float = 0.0,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """sum_i p(M_i x + (1 - M_i) baseline) M_i / (N keep): maps (B, H, W), not negative.

    p is the probability of each image's `target` (B,) for images (B, 3, H, W); M_i are the N = `masks` of
    `random_masks`, the same for all images (the paper takes 4000 to 8000). What is masked fades to `baseline`, by
    default mid-grey; an unfair advantage where a metric fills with the same. At most `batch` masked images at once.
    """
    height, width = images.shape[2:]
    maps = torch.zeros(len(images), height, width, device=images.device)
    for chunk in random_masks(masks, height, width, cells=cells, keep=keep, seed=seed, batch=batch):
        chunk = chunk.to(images.device)  # (n, H, W)
        for heat, image, label in zip(maps, images, target.tolist(), strict=True):
            p = classifier(torch.lerp(images.new_tensor(baseline), image, chunk[:, None])).float().softmax(1)[:, label]
            heat += torch.einsum("n,nhw->hw", p, chunk)
    return maps / (masks * keep)
