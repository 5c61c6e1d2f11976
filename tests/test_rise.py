"""RISE: its slow definition, and its expectation."""

from __future__ import annotations

import math

import torch
from test_peers import LinearProbability, pictures, small_box, upsampled
from torch import Tensor

from cae.peers.rise import random_masks, rise


def test_rise_is_the_slow_weighted_sum_of_its_masks() -> None:
    box, images, target = small_box(), pictures(2), torch.tensor([2, 0])
    masks = torch.cat(list(random_masks(50, 12, 16, cells=4, keep=0.3, seed=3, batch=50)))
    maps = rise(box, images, target, masks=50, cells=4, keep=0.3, baseline=-0.5, seed=3, batch=20)
    for i in range(2):
        slow = torch.zeros(12, 16)
        for mask in masks:
            masked = mask * images[i] + (1 - mask) * -0.5
            slow += box(masked[None]).softmax(1)[0, target[i]] * mask
        torch.testing.assert_close(maps[i], slow / (50 * 0.3), rtol=1e-4, atol=1e-5)


def test_rise_masks_and_map_have_their_expectation() -> None:
    keep, number, cells = 0.4, 5000, 3
    masks = torch.cat(list(random_masks(number, 12, 16, cells=cells, keep=keep, seed=0)))
    assert masks.min() >= 0 and masks.max() <= 1

    def overlap(size: int) -> Tensor:
        """Mean over shifts of U U^T, U (size, cells) what each pixel takes of each cell."""
        cell = math.ceil(size / cells)
        large = (cells + 1) * cell
        takes = torch.stack([upsampled(row[None], 1, large)[0] for row in torch.eye(cells)], 1)  # (large, cells)
        return torch.stack([takes[s : s + size] @ takes[s : s + size].T for s in range(cell)]).mean(0)

    rows, cols = overlap(12), overlap(16)
    covariance = keep * (1 - keep) * torch.einsum("ij,kl->ikjl", rows, cols).reshape(192, 192)
    error = 5 * 0.25 / math.sqrt(number)  # five standard errors of a mean of values with this spread
    torch.testing.assert_close(masks.mean(0), torch.full((12, 16), keep), atol=2 * error, rtol=0)
    torch.testing.assert_close(torch.cov(masks.flatten(1).T), covariance, atol=error, rtol=0)
    # E[p(M x) M] / keep = p(0) + sum over pixels of (covariance / keep + keep) * weight * x, for a linear p.
    net, images = LinearProbability(), pictures(1)
    net.weight = torch.zeros_like(net.weight)
    net.weight[:, 2:5, 9:14] = 0.4 * images[0, :, 2:5, 9:14].sign() / images[0, :, 2:5, 9:14].abs().sum()
    part = (net.weight * images[0]).sum(0).flatten()  # 0.4 in all, in one corner
    expected = 0.5 + covariance @ part / keep + keep * part.sum()
    found = rise(net, images, torch.tensor([1]), masks=number, cells=cells, keep=keep, batch=500)
    assert max(len(asked) for asked in net.asked) <= 500
    assert expected.max() - expected.min() > 0.09
    torch.testing.assert_close(found[0].flatten(), expected, atol=0.03, rtol=0)
