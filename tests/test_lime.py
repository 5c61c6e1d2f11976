"""LIME: its superpixels, and its regression in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from test_peers import LinearProbability, pictures
from torch import Tensor

from cae.peers.lime import lime, superpixels


def test_superpixels_are_the_grid_where_nothing_is_seen_and_follow_edges() -> None:
    flat = torch.zeros(1, 3, 24, 32)
    cells = torch.arange(24)[:, None] // 8 * 4 + torch.arange(32) // 8
    assert torch.equal(superpixels(flat, 12)[0], cells)
    # The edge is in no cell's border: superpixels must move to it.
    halves = flat.clone()
    halves[:, :, :, 13:] = 0.9
    labels = superpixels(torch.cat((halves, flat)), 12)
    assert not set(labels[0, :, :13].unique().tolist()) & set(labels[0, :, 13:].unique().tolist())
    assert torch.equal(labels[1], cells)  # whatever else is in the batch
    assert labels[0].unique().tolist() == list(range(int(labels[0].max()) + 1)) and labels[0].max() >= 7


def test_superpixels_trade_colour_against_place() -> None:
    images = 0.4 * pictures(1)
    place = torch.stack(torch.meshgrid(torch.arange(12) / 4, torch.arange(16) / 4, indexing="ij"))  # in cells

    def spread(values: Tensor, labels: Tensor) -> float:
        parts = [values[:, labels == label] for label in labels.unique()]
        return sum(float((part - part.mean(1, keepdim=True)).square().sum()) for part in parts) / labels.numel()

    loose, usual, tight = (superpixels(images, 12, compactness)[0] for compactness in (0.02, 0.5, 10))
    assert spread(place, loose) > 4 * spread(place, usual) and spread(images[0], loose) < 0.5 * spread(images[0], usual)
    assert spread(images[0], usual) < spread(images[0], tight) and torch.equal(usual, superpixels(images, 12)[0])
    cells = torch.arange(12)[:, None] // 4 * 4 + torch.arange(16) // 4
    assert spread(place, tight) == pytest.approx(spread(place, cells), rel=0.05)


def test_lime_on_a_linear_model_is_the_sum_over_each_superpixel() -> None:
    net, images, target = LinearProbability(), pictures(3), torch.tensor([1, 0, 1])
    labels = superpixels(images, 12)
    for baseline in (0.2, None):
        maps = lime(net, images, target, samples=80, number=12, ridge=1e-6, baseline=baseline)
        for i in range(3):
            for label in labels[i].unique():
                inside = labels[i] == label
                pixels = images[i][:, inside]
                fill = pixels.mean(1, keepdim=True) if baseline is None else baseline
                expected = (net.weight[:, inside] * (pixels - fill)).sum() * (1 if target[i] == 1 else -1)
                torch.testing.assert_close(maps[i][inside], expected.expand(int(inside.sum())), rtol=1e-3, atol=2e-5)


def test_lime_is_the_slow_weighted_ridge_regression() -> None:
    net, images = LinearProbability(power=2), pictures(1)
    labels = superpixels(images, 12)[0]
    net.weight = net.weight.sign() * 0.1 / math.sqrt(labels.numel())
    maps = lime(net, images, torch.tensor([1]), samples=100, number=12, baseline=1.5, batch=30)
    assert max(len(asked) for asked in net.asked) <= 30
    asked = torch.cat(net.asked)
    assert len(asked) == 100
    first = [(labels == i).nonzero()[0].tolist() for i in range(int(labels.max()) + 1)]
    z = torch.stack([asked[:, 0, row, col] != 1.5 for row, col in first], 1).double()
    for sample, kept in zip(asked, z, strict=True):
        torch.testing.assert_close(sample, torch.where(kept[labels].bool(), images[0], 1.5))
    assert (z[0] == 1).all() and 0.4 < z[1:].mean() < 0.6
    ones = torch.ones_like(z)
    distance = 1 - torch.cosine_similarity(z, ones)
    weight = (-(distance**2) / 0.25**2).exp().sqrt()
    p = net.probability(asked).double()
    # With an intercept that is not penalised: least squares on what is left of the weighted means.
    z_left, p_left = z - (weight[:, None] * z).sum(0) / weight.sum(), p - (weight * p).sum() / weight.sum()
    normal = (z_left * weight[:, None]).T @ z_left + torch.eye(z.shape[1])
    expected = torch.linalg.solve(normal, (z_left * weight[:, None]).T @ p_left)
    torch.testing.assert_close(maps[0], expected[labels].float(), rtol=1e-3, atol=1e-5)
