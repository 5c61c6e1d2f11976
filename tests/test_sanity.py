from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cae.classifiers import BlackBox, build
from cae.config import ClassifierConfig
from cae.sanity import cascade, rank_correlation, structural_similarity


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Cascade ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> BlackBox:
    torch.manual_seed(0)
    return build(ClassifierConfig(arch="resnet18", stem="small"), ("a", "b")).eval()


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the entries of a state dict that differ."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def test_each_copy_has_the_weights_of_one_more_stage_drawn_anew(resnet: BlackBox) -> None:
    original = {name: value.clone() for name, value in resnet.state_dict().items()}
    # A constant tensor has nothing to draw: fresh batch norms and biases, which training would have moved.
    spread = {name for name, weights in resnet.named_parameters() if weights.std() > 0}
    expected: set[str] = set()
    order = ["fc", "layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    before = original
    for stage, (name, random_one) in zip(order, cascade(resnet), strict=True):
        assert name == stage
        expected |= {entry for entry in spread if entry.startswith(f"net.{stage}.")}
        state = random_one.state_dict()
        assert changed(original, state) == expected
        # What was drawn before stays: a cascade, and not another network each time.
        assert all(entry.startswith(f"net.{stage}.") for entry in changed(before, state))
        before = state
    assert expected == spread
    assert not changed(original, resnet.state_dict())


def test_copies_are_independent_and_seeded(resnet: BlackBox) -> None:
    (_, first), (_, second), *_ = cascade(resnet)
    _, again = next(iter(cascade(resnet)))
    _, other = next(iter(cascade(resnet, seed=1)))
    assert torch.equal(first.net.fc.weight, second.net.fc.weight) and first.net.fc is not second.net.fc
    assert torch.equal(first.net.fc.weight, again.net.fc.weight)
    assert not torch.equal(first.net.fc.weight, other.net.fc.weight)
    assert first.cam_layer == resnet.cam_layer and first.classes == resnet.classes
    assert not first.training


def test_draws_keep_mean_and_spread() -> None:
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 2))
    with torch.no_grad():
        net[0].weight.mul_(0.2).add_(0.5)
    (last, _), (first, random_one) = cascade(BlackBox(net, ("a", "b")))
    assert (last, first) == ("3", "0")
    weights, before = random_one.net[0].weight.detach(), net[0].weight.detach()
    assert math.isclose(weights.mean(), before.mean(), abs_tol=0.01)
    assert math.isclose(weights.std(), before.std(), rel_tol=0.1)
    assert abs(torch.corrcoef(torch.stack([weights.flatten(), before.flatten()]))[0, 1]) < 0.1


def test_weights_outside_of_any_part_are_a_stage_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.place = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.mean((2, 3)) * self.place)

    stages = [stage for stage, _ in cascade(BlackBox(Scaled(), ("a", "b")))]
    assert stages == ["head", "place"]


def test_a_classifier_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        next(iter(cascade(BlackBox(nn.Flatten(), ("a", "b")))))


# --- Rank correlation -------------------------------------------------------------------------------------------------


def slow_spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks, each counted; one more than those below, and half of the other equal ones."""

    def ranks(values: list[float]) -> list[float]:
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    x, y = ranks(a.flatten().tolist()), ranks(b.flatten().tolist())
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((p - mean_x) * (q - mean_y) for p, q in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((p - mean_x) ** 2 for p in x) * sum((q - mean_y) ** 2 for q in y))


def test_rank_correlation_is_spearmans() -> None:
    a, noise = random(4, 6, 7), random(4, 6, 7, seed=1)
    b = a * torch.tensor([0.0, 0.5, 1.0, -1.0]).view(4, 1, 1) + noise
    a[2], b[3] = a[2].round(), b[3].clamp(min=0)  # ties
    expected = [slow_spearman(p, q) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected))
    assert expected[2] > 0.3 and expected[3] < -0.3
    torch.testing.assert_close(rank_correlation(a[1:2], b[1:2]), rank_correlation(a, b)[1:2])


def test_rank_correlation_sees_order_only() -> None:
    a = random(3, 8, 8)
    assert rank_correlation(a, a.exp() * 7 - 3).tolist() == [1, 1, 1]
    assert rank_correlation(a, -(a**3)).tolist() == [-1, -1, -1]


def test_a_constant_map_correlates_with_nothing() -> None:
    a, flat = random(2, 8, 8), torch.full((2, 8, 8), 0.3)
    assert rank_correlation(a, flat).tolist() == rank_correlation(flat, flat).tolist() == [0, 0]


# --- Structural similarity --------------------------------------------------------------------------------------------


def slow_similarity(a: Tensor, b: Tensor) -> float:
    """The mean over all windows in the image of SSIM(x, y), its statistics summed pixel by pixel."""
    weight = {
        (i, j): math.exp(-(i**2 + j**2) / (2 * 1.5**2)) for i in range(-5, 6) for j in range(-5, 6)
    }  # fmt: skip
    total = sum(weight.values())
    x, y = (((m - m.min()) / (m.max() - m.min())).tolist() for m in (a, b))
    values = []
    for row in range(5, len(x) - 5):
        for col in range(5, len(x[0]) - 5):
            window = [(w / total, x[row + i][col + j], y[row + i][col + j]) for (i, j), w in weight.items()]
            mean_x, mean_y = sum(w * p for w, p, _ in window), sum(w * q for w, _, q in window)
            var_x = sum(w * (p - mean_x) ** 2 for w, p, _ in window)
            var_y = sum(w * (q - mean_y) ** 2 for w, _, q in window)
            covariance = sum(w * (p - mean_x) * (q - mean_y) for w, p, q in window)
            c1, c2 = 0.01**2, 0.03**2
            values.append(
                (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
                / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
            )  # fmt: skip
    return sum(values) / len(values)


def test_structural_similarity_is_the_papers() -> None:
    a, noise = random(3, 14, 17), random(3, 14, 17, seed=1)
    b = a + noise * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    found = structural_similarity(a, b)
    expected = [slow_similarity(p, q) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert found[0] > 0.9 > found[1] > found[2]
    torch.testing.assert_close(structural_similarity(b, a), found)


def test_structural_similarity_is_of_maps_scaled_to_their_range() -> None:
    a, b = random(2, 16, 16), random(2, 16, 16, seed=1)
    torch.testing.assert_close(structural_similarity(a, 1000 * a - 3), torch.ones(2))
    torch.testing.assert_close(structural_similarity(a, b), structural_similarity(1e-6 * a, 1e6 * b + 1))


def test_structural_similarity_of_constant_maps() -> None:
    a, flat = random(1, 16, 16), torch.full((1, 16, 16), 0.3)
    assert structural_similarity(flat, 2 * flat).item() == 1
    assert 0 <= structural_similarity(a, flat).item() < 0.1


def test_maps_that_cannot_be_compared_are_refused() -> None:
    a = random(1, 12, 12)
    for measure in (rank_correlation, structural_similarity):
        with pytest.raises(ValueError, match="two stacks"):
            measure(a, a[:, :-1])
        with pytest.raises(ValueError, match="not finite"):
            measure(a, a / 0)
    with pytest.raises(ValueError, match="needs 11"):
        structural_similarity(a[:, :10], a[:, :10])
