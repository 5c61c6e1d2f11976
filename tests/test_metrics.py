"""The fast metrics against slow, obvious definitions, and a toy classifier whose truth is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cae import metrics

BLOCK = (slice(4, 12), slice(14, 22))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def block_classifier(images: Tensor) -> Tensor:
    """Class 0 if the block is bright; the rest of the image does not matter."""
    bright = images[:, :, *BLOCK].mean((1, 2, 3))
    return torch.stack((8 * bright, torch.zeros_like(bright)), dim=1)


def conv_classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).eval()


# --- known truth


def test_pointing_game_matches_the_slow_definition() -> None:
    maps, masks = random(40, 12, 15), random(40, 12, 15, seed=1) > 0.97
    masks[0] = False
    for tolerance in (0, 1, 2.5):
        got = metrics.pointing_game(maps, masks, tolerance).tolist()
        for i in range(40):
            row, col = divmod(int(np.argmax(maps[i].numpy())), 15)
            distances = [math.hypot(row - r, col - c) for r, c in masks[i].nonzero().tolist()]
            assert got[i] == (min(distances, default=math.inf) <= tolerance)
        assert not got[0]
    assert any(got) and not all(got)
    # Constant map: the pixel is drawn, so over seeds it hits as often as the mask is large.
    half = torch.zeros(1, 12, 15, dtype=torch.bool)
    half[:, :6] = True
    hits = [bool(metrics.pointing_game(torch.ones(1, 12, 15), half, seed=seed)) for seed in range(100)]
    assert 25 < sum(hits) < 75  # five standard errors around 50


def test_energy_in_mask() -> None:
    maps, masks = random(5, 9, 8) - 0.5, random(5, 9, 8, seed=1) > 0.6
    maps[3], maps[4] = 0, 2
    for i in range(3):
        energy = [(max(0.0, float(m)), bool(t)) for m, t in zip(maps[i].flatten(), masks[i].flatten(), strict=True)]
        slow = sum(m for m, t in energy if t) / sum(m for m, _ in energy)
        assert float(metrics.energy_in_mask(maps, masks)[i]) == pytest.approx(slow, abs=1e-6)
    even = masks.float().mean((1, 2))
    torch.testing.assert_close(metrics.energy_in_mask(maps, masks)[3:], even[3:])


def test_iou_at_equal_area() -> None:
    maps, masks = random(4, 9, 8), random(4, 9, 8, seed=1) > 0.6
    maps[2] = masks[2].float()
    masks[3] = False
    got = metrics.iou_at_equal_area(maps, masks)
    for i in range(3):
        area = int(masks[i].sum())
        top = set(np.argsort(-maps[i].flatten().numpy(), kind="stable")[:area].tolist())
        truth = set(masks[i].flatten().nonzero()[:, 0].tolist())
        assert float(got[i]) == pytest.approx(len(top & truth) / len(top | truth))
    assert got[2] == 1 and got[3].isnan()


def test_pixel_auroc_is_scikit_learns() -> None:
    maps, masks = random(6, 14, 11) - 0.5, random(6, 14, 11, seed=1) > 0.8
    maps[1] = maps[1].round(decimals=1)  # many ties
    maps[2] = 3.0
    maps[3] += masks[3]
    masks[4], masks[5] = False, True
    got = metrics.pixel_auroc(maps, masks)
    for i in range(4):
        assert float(got[i]) == pytest.approx(roc_auc_score(masks[i].flatten(), maps[i].flatten()), abs=1e-6)
    assert got[2] == 0.5
    assert got[4:].isnan().all()
    with pytest.raises(ValueError, match="one mask per map"):
        metrics.pixel_auroc(maps, masks[:3])


# --- intervals


def test_bootstrap_interval_of_gaussian_differences_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 400), rng.normal(0.9, 1, 400)
    mean, low, high = metrics.paired_bootstrap(a, b)
    error = float(np.std(a - b)) / math.sqrt(400)
    assert mean == pytest.approx(np.mean(a - b))
    # A 2.5% quantile of 10,000 draws has standard error sqrt(.025 * .975 / 10,000) / density(1.96) = 0.027 errors of
    # the mean, and the skewness of 400 gaussian values moves it by less than 0.01: 0.12 is over four of the first.
    assert low == pytest.approx(mean - 1.96 * error, abs=0.12 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.12 * error)
    assert (mean, low, high) == metrics.paired_bootstrap(a, b)
    assert metrics.paired_bootstrap(b, a)[0] == pytest.approx(-mean)


def test_bootstrap_covers_the_truth_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        a, b = rng.normal(0.3, 1, (2, 60))
        _, low, high = metrics.paired_bootstrap(a, b, draws=500, seed=trial)
        covered += low <= 0 <= high
    assert 175 <= covered <= 199  # 190 expected; standard error 3.1, and small samples cover a little less


def test_bootstrap_of_groups_and_of_curves_is_that_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 12, 60)
    a, b = rng.normal(0.2, 1, (2, 60)) + 2 * rng.normal(size=12)[patients]  # a patient's images have much in common
    a2, b2 = rng.normal([0.0, 0.1, 0.2], 1, (2, 60, 3))
    mean, low, high = metrics.paired_bootstrap(a, 0 * a, groups=patients)
    _, near, far = metrics.paired_bootstrap(a, 0 * a)
    assert mean == pytest.approx(a.mean()) and high - low > 1.5 * (far - near)
    names = np.array([f"p{k}" for k in patients])
    assert metrics.paired_bootstrap(a, 0 * a, groups=names)[0] == pytest.approx(mean)
    peak, low, high = metrics.paired_bootstrap(a2, b2, groups=patients, draws=4000)
    assert peak == pytest.approx(a2.mean(0).max() - b2.mean(0).max())
    slow, members = [], [np.flatnonzero(patients == k) for k in np.unique(patients)]
    for _ in range(4000):
        drawn = np.concatenate([members[k] for k in rng.integers(0, len(members), len(members))])
        slow.append(a2[drawn].mean(0).max() - b2[drawn].mean(0).max())
    width = np.subtract(*np.percentile(slow, (97.5, 2.5)))
    assert np.allclose([low, high], np.percentile(slow, (2.5, 97.5)), atol=0.05 * width)
    one = metrics.paired_bootstrap(a[:, None], b[:, None], groups=patients)
    assert one == pytest.approx(metrics.paired_bootstrap(a, b, groups=patients))
    with pytest.raises(ValueError, match="1 groups of 60 images"):
        metrics.paired_bootstrap(a, b, groups=0 * patients)


def test_bootstrap_is_paired_chunked_and_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0, 100, 50)
    assert metrics.paired_bootstrap(values + 0.5, values, draws=100) == pytest.approx((0.5, 0.5, 0.5))
    whole = metrics.paired_bootstrap(values, 0 * values, draws=333)
    monkeypatch.setattr(metrics, "BOOTSTRAP_CELLS", 120)  # two draws at a time, the last alone
    assert metrics.paired_bootstrap(values, 0 * values, draws=333) == pytest.approx(whole)
    with pytest.raises(ValueError, match="not finite at image 1"):
        metrics.paired_bootstrap([1.0, math.nan], [0.0, 0.0])
    with pytest.raises(ValueError, match="at least 2 images"):
        metrics.paired_bootstrap([1.0], [0.0])


# --- grids


def slow_grid_energy(x: np.ndarray, stride: int) -> float:
    """The spectrum by its definition, one frequency at a time."""
    height, width = x.shape
    hann = [0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n) for n in x.shape]
    x = (x - x.mean()) * hann[0][:, None] * hann[1]

    def power(i: int, j: int) -> float:
        rows, cols = (
            np.exp(-2j * np.pi * i * np.arange(height) / height),
            np.exp(-2j * np.pi * j * np.arange(width) / width),
        )
        return abs(rows @ x @ cols) ** 2

    peaks, beside = [], []
    for i, j in itertools.product(range(stride), repeat=2):
        if (i, j) != (0, 0):
            row, col = i * height // stride, j * width // stride
            peaks.append(power(row, col))
            ring = []
            for a, b in itertools.product(range(-3, 4), repeat=2):
                leaves = (i == 0 and a != 0) or (j == 0 and b != 0)  # the axis
                if (abs(a) > 1 or abs(b) > 1) and not leaves:
                    ring.append(power(row + a, col + b))
            beside.append(np.mean(ring))
    return float(np.mean(peaks) / np.mean(beside))


@pytest.mark.parametrize("stride", [2, 4])
def test_grid_energy_is_its_definition(stride: int) -> None:
    x = random(3, 32, 40).double()
    for found, image in zip(metrics.grid_energy(x, stride), x.numpy(), strict=True):
        assert found.item() == pytest.approx(slow_grid_energy(image, stride), rel=1e-6)


def test_grid_energy_sees_grids_and_nothing_else() -> None:
    noise = torch.randn(200, 64, 64, generator=torch.Generator().manual_seed(0))
    assert metrics.grid_energy(noise, 4).mean().item() == pytest.approx(1, abs=0.05)
    walk = noise.double().cumsum(1).cumsum(2)  # most of its power at low frequencies, along the axes
    assert 0.7 < metrics.grid_energy(walk, 4).median() < 1.3
    comb = 0.3 * (torch.arange(64) % 4 == 0).float()
    checkers = 0.3 * ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float()
    assert metrics.grid_energy(noise + comb, 4).median() > 2
    assert metrics.grid_energy(noise + checkers, 2).median() > 5
    assert metrics.grid_energy(walk / walk.std((1, 2), keepdim=True) + comb, 4).median() > 4
    with pytest.raises(ValueError, match="multiple"):
        metrics.grid_energy(noise[:, :30], 4)
