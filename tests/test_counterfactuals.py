"""Measures of counterfactual images against slow, obvious definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cae import counterfactuals
from cae.classifiers import ResNet


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def means(images: Tensor) -> Tensor:
    """Logits (B, 3): the mean of each channel, made steeper."""
    return 20 * images.mean((2, 3))


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_validity_is_its_definition(margin: float) -> None:
    images, target = random(40, 3, 5, 5), torch.arange(40) % 3
    slow = []
    for image, label in zip(images, target.tolist(), strict=True):
        odds = [math.exp(20 * float(image[c].mean())) for c in range(3)]
        p = [value / sum(odds) for value in odds]
        slow.append(all(p[label] > p[c] + margin for c in range(3) if c != label))
    assert counterfactuals.validity(means, images, target, margin, batch=7).tolist() == slow
    assert 3 < sum(slow) < 37


def test_validity_knows_draws_and_nan() -> None:
    flat = torch.zeros(2, 3, 4, 4)
    flat[1] = torch.nan
    assert counterfactuals.validity(means, flat, torch.tensor([0, 0])).tolist() == [False, False]
    flat[:, 0] = 1
    assert counterfactuals.validity(means, flat, torch.tensor([0, 0])).tolist() == [True, False]


def test_proximity_and_sparsity_are_their_definitions() -> None:
    a, b = random(4, 3, 6, 7), random(4, 3, 6, 7, seed=1)
    b[1] = a[1]
    b[2] = a[2] + random(3, 6, 7, seed=2) * 0.1
    l1, l2 = counterfactuals.proximity(a, b)
    sparse = {threshold: counterfactuals.sparsity(a, b, threshold) for threshold in (0.05, 0.08, 0.9)}
    for i in range(4):
        change = np.abs(a[i].numpy() - b[i].numpy())
        assert float(l1[i]) == pytest.approx(sum(change.flatten()) / change.size, abs=1e-6)
        assert float(l2[i]) == pytest.approx(math.sqrt(sum(change.flatten() ** 2) / change.size), abs=1e-6)
        for threshold, found in sparse.items():
            same = [all(change[c, y, x] < threshold for c in range(3)) for y in range(6) for x in range(7)]
            assert float(found[i]) == pytest.approx(sum(same) / len(same))
    assert l1[1] == l2[1] == 0 and all(found[1] == 1 for found in sparse.values())
    assert 0 < sparse[0.08][2] < 1 and 0 < sparse[0.9][0] < 1
    for measure in (counterfactuals.proximity, counterfactuals.sparsity):
        with pytest.raises(ValueError, match="pass equal shapes"):
            measure(a, b[:1])


def slow_kid(a: np.ndarray, b: np.ndarray) -> float:
    """Three means over pairs, no image with itself."""

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((sum(u * v) / len(u) + 1) ** 3)

    first = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
    second = [kernel(b[i], b[j]) for i in range(len(b)) for j in range(len(b)) if i != j]
    return float(np.mean(first) + np.mean(second) - 2 * np.mean([kernel(u, v) for u in a for v in b]))


def test_kid_is_its_definition() -> None:
    def features(images: Tensor) -> Tensor:
        return images.flatten(1)

    a, b = random(9, 3, 2, 2), random(6, 3, 2, 2, seed=1) * 1.5 + 0.2
    slow = slow_kid(a.flatten(1).double().numpy(), b.flatten(1).double().numpy())
    for batch in (1, 4, 256):
        assert counterfactuals.kid(features, a, b, batch) == pytest.approx(slow, rel=1e-9)
    with pytest.raises(ValueError, match="1 and 6 images"):
        counterfactuals.kid(features, a[:1], b)


def test_kid_leaves_out_what_was_made_from_each_other() -> None:
    draw = torch.Generator().manual_seed(0)
    biased, fair = [], []
    for _ in range(200):
        own = torch.randn(20, 6, generator=draw)
        copies = own + 0.01 * torch.randn(20, 6, generator=draw)
        biased.append(counterfactuals.kid(lambda x: x, copies, own))
        fair.append(counterfactuals.kid(lambda x: x, copies, own, pairs=(torch.arange(20), torch.arange(20))))
    assert np.mean(biased) < -5 * np.std(biased) / 200**0.5
    assert abs(np.mean(fair)) < 0.02 * abs(np.mean(biased))  # sums over the same pairs, almost


def test_kid_is_unbiased_and_sees_a_shift() -> None:
    """Of equal distributions 0 on average, of either sign; each estimate's own spread gives the tolerance."""
    draw = torch.Generator().manual_seed(0)
    equal = [counterfactuals.kid(lambda x: x, *torch.randn(2, 20, 6, generator=draw)) for _ in range(200)]
    assert abs(np.mean(equal)) < 4 * np.std(equal) / math.sqrt(200)
    assert min(equal) < 0 < max(equal)
    a, b = torch.randn(2, 20, 6, generator=draw)
    assert counterfactuals.kid(lambda x: x, a, b + 1) > max(equal)


def test_penultimate_features_are_what_the_last_layer_is_given() -> None:
    torch.manual_seed(0)
    net = ResNet("resnet18", 3, "small").eval()
    images = random(2, 3, 32, 32)
    with torch.no_grad():
        features = counterfactuals.penultimate(net)(images)
        assert features.shape == (2, 512)
        torch.testing.assert_close(net.fc(features), net(images))
    assert not net.fc._forward_pre_hooks
    net.spare = nn.Linear(7, 7)  # which forward never calls
    assert torch.equal(counterfactuals.penultimate(net)(images), features)
    with pytest.raises(ValueError, match="calls none"):
        convolution = nn.Conv2d(3, 4, 1)
        convolution.spare = net.spare
        counterfactuals.penultimate(convolution)(images)
    with pytest.raises(ValueError, match="no linear layer"):
        counterfactuals.penultimate(nn.Conv2d(3, 4, 1))


def test_identity_is_its_definition() -> None:
    a, b = random(5, 4, 3, 3), random(5, 4, 3, 3, seed=1)
    b[1], b[2], b[3] = a[1], -a[2], a[3] * 0.5
    a[4] = b[4] = 0
    found = counterfactuals.identity(a, b)
    u, v = a[0].flatten().tolist(), b[0].flatten().tolist()
    slow = 1 - sum(abs(x - y) for x, y in zip(u, v, strict=True)) / (sum(map(abs, u)) + sum(map(abs, v)))
    assert found.tolist() == pytest.approx([slow, 1, 0, 1 - 0.5 / 1.5, 1], abs=1e-6)
    torch.testing.assert_close(counterfactuals.identity(b, a), found)
    unrelated = torch.randn(2, 1, 20_000, generator=torch.Generator().manual_seed(0))
    assert float(counterfactuals.identity(*unrelated)) == pytest.approx(1 - 1 / math.sqrt(2), abs=0.01)
    with pytest.raises(ValueError, match="pass equal shapes"):
        counterfactuals.identity(a, b[:, :2])


def test_monotonicity_is_its_definition() -> None:
    p = (random(60, 5) * 0.3 + torch.linspace(0, 1, 5)).clamp(0, 1)
    p[0], p[1], p[2, 3] = 0.5, torch.tensor([0.9, 0.87, 0.84, 0.81, 0.78]), torch.nan
    for tolerance in (0, 0.05, 0.2):
        slow = [
            all(path[i] - path[j] <= tolerance for j in range(5) for i in range(j)) for path in p.numpy()
        ]  # every later frame against every earlier one
        found = counterfactuals.monotonicity(p, tolerance).tolist()
        assert found == slow and 5 < sum(found) < 60
        assert found[0] and found[1] == (tolerance > 0.12) and not found[2]
