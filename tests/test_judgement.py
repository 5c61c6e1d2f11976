"""What is measured on held-out images: a toy world with known numbers, and each image alone against all at once."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cae.classifiers import BlackBox
from cae.explain import explain
from cae.judgement import Judgement, draw_donors, judge, score
from cae.metrics import aopc, perturbation_curve
from cae.networks import CAE

# An image is a texture whose left half is dark (class 0) or bright (class 1); the class code is that half's mean. The
# toy decoder makes the right half brighter by 0.1, and stuck images dark whatever code is put in.
SIDE, GAIN, FLAW = 16, 4.0, 0.1
LEFT = torch.zeros(SIDE, SIDE)
LEFT[:, : SIDE // 2] = 1
CLASSES = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
STUCK = [0, 1, 6]


class ToyCAE(nn.Module):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = (x[:, 0] * LEFT).sum((1, 2)) / LEFT.sum()
        return code[:, None], x - code[:, None, None, None] * LEFT

    def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        stuck = individual_code[:, :1, -1:, -1:] > 0.95
        code = torch.where(stuck, -0.4, class_code[:, :, None, None])
        return individual_code + code * LEFT + FLAW * (1 - LEFT)


class Bright(nn.Module):
    """Class 1 where its columns are brighter than the middle grey."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.columns = slice(start, stop)

    def forward(self, x: Tensor) -> Tensor:
        logit = GAIN * x[..., self.columns].mean((1, 2, 3))
        return torch.stack([-logit, logit], 1)


def seeing(start: int, stop: int) -> BlackBox:
    return BlackBox(Bright(start, stop), ("dark", "bright"))


def world() -> Tensor:
    noise = 0.05 * torch.randn(len(CLASSES), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    x = noise + (0.8 * torch.from_numpy(CLASSES)[:, None, None, None] - 0.4) * LEFT
    x[:, :, -1, -1] = 0
    x[STUCK, :, -1, -1] = 1
    return x.expand(-1, 3, -1, -1).contiguous()


def judged(oracle: BlackBox | None = None, y: np.ndarray = CLASSES, batch: int = 32) -> Judgement:
    donors = draw_donors(y)
    target, place = torch.from_numpy(y[donors]), torch.from_numpy(donors)
    return judge(cast(CAE, ToyCAE()), seeing(0, 8), world(), target, place, oracle, batch)


def test_the_numbers_of_the_toy_world() -> None:
    found = judged().measures
    assert "oracle_success" not in found
    assert found["swap_success"] == pytest.approx(0.8)  # the two dark ones that are stuck stay dark
    assert found["keeps_class"] == pytest.approx(0.9)  # the bright one that is stuck gets dark
    assert found["believed"] == pytest.approx(0.7)
    x, total, spread = world(), 0.0, 0.0
    mean = x.mean(0)
    for image, stuck in zip(x, [i in STUCK for i in range(10)], strict=True):
        rebuilt = image.clone()
        rebuilt[:, :, 8:] += FLAW
        if stuck:
            rebuilt[:, :, :8] += -0.4 - image[0, :, :8].mean()
        total += float((rebuilt - image).abs().mean()) / 10
        spread += float((image - mean).abs().mean()) / 10
    assert found["reconstruction_error"] == pytest.approx(total, rel=1e-4)
    assert found["likeness"] == pytest.approx(1 - total / spread, rel=1e-4)
    assert found["score"] == pytest.approx((0.7 * found["aopc"] * found["likeness"]) ** (1 / 3), rel=1e-5)


def test_the_aopc_is_that_of_each_image_alone() -> None:
    cae, b, x, donors = cast(CAE, ToyCAE()), seeing(0, 8), world(), draw_donors(CLASSES)
    drops = []
    for i in range(10):
        source, target = torch.tensor([CLASSES[i]]), torch.tensor([CLASSES[donors[i]]])
        code = cae.encode(x[donors[i]][None])[0]
        heat = explain(cae, b, x[i][None], source, target, code, mode="integrated", steps=1).map
        drops.append(float(aopc(perturbation_curve(b, x[i][None], heat, source, steps=1, draws=1))))
    assert max(drops) > 0.02
    for batch in (32, 3):
        assert judged(batch=batch).measures["aopc"] == pytest.approx(np.mean(drops), abs=1e-6)


def test_an_oracle_must_believe_the_swap_too() -> None:
    plain, agreeing, other = judged().measures, judged(seeing(2, 6)).measures, judged(seeing(8, 16)).measures
    assert agreeing["oracle_success"] == pytest.approx(0.8) and agreeing["believed"] == pytest.approx(0.7)
    # One that looks at the right half finds every decoded image bright.
    assert other["oracle_success"] == pytest.approx(0.6) and other["believed"] == pytest.approx(0.4)
    assert {name: other[name] for name in ("swap_success", "aopc", "likeness")} == {
        name: plain[name] for name in ("swap_success", "aopc", "likeness")
    }
    assert other["score"] < plain["score"]


def test_images_of_which_nothing_finite_comes_out_are_lost_and_their_maps_name_no_pixels() -> None:
    class Broken(ToyCAE):
        def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
            image = super().decode(class_code, individual_code)
            return torch.where(individual_code[:, :1, -1:, -1:] > 0.95, torch.nan, image)

    cae, b, x, donors = cast(CAE, Broken()), seeing(0, 8), world(), draw_donors(CLASSES)
    target, place = torch.from_numpy(CLASSES[donors]), torch.from_numpy(donors)
    found = judge(cae, b, x, target, place, seeing(0, 8)).measures
    for name in ("swap_success", "oracle_success", "keeps_class", "believed"):
        assert found[name] == pytest.approx(1 - len(STUCK) / 10), name
    drops = []
    for i in sorted(set(range(10)) - set(STUCK)):
        source = torch.tensor([CLASSES[i]])
        code = cae.encode(x[donors[i]][None])[0]
        heat = explain(cae, b, x[i][None], source, target[i][None], code, mode="integrated", steps=1).map
        drops.append(float(aopc(perturbation_curve(b, x[i][None], heat, source, steps=1, draws=1))))
    assert found["aopc"] == pytest.approx(sum(drops) / 10, abs=1e-6) and sum(drops) > 0.02


def test_a_swap_towards_the_class_that_b_sees_anyway_proves_nothing() -> None:
    # By these labels, which are not b's predictions, some dark images are asked to become dark.
    y = np.array([1, 0, 0, 1, 1, 0, 1, 1, 1, 1])
    found = judged(y=y)
    donors = draw_donors(y)
    asked = np.flatnonzero(y[donors] != CLASSES)
    assert 0 < len(asked) < 10
    hits = [y[donors[i]] == (0 if i in STUCK else CLASSES[donors[i]]) for i in asked]
    assert found.measures["swap_success"] == pytest.approx(np.mean(hits))
    alone = judged(y=np.ones(10, int))
    assert math.isnan(alone.measures["swap_success"]) and math.isnan(alone.measures["score"])


def test_images_and_probabilities_are_those_of_the_swaps() -> None:
    found, x, donors = judged(batch=4), world(), draw_donors(CLASSES)
    cae = ToyCAE()
    codes, individual = cae.encode(x)
    assert torch.allclose(found.reconstruction, cae.decode(codes, individual), atol=1e-6)
    assert torch.allclose(found.swap, cae.decode(codes[donors], individual), atol=1e-6)
    p = seeing(0, 8).probabilities(found.swap)[torch.arange(10), torch.from_numpy(CLASSES[donors])]
    assert torch.allclose(found.p_target, p)


def test_score_is_nothing_without_any_of_its_factors() -> None:
    assert score(believed=0.5, aopc=0.25, likeness=1.0, swap_success=0.0) == pytest.approx(0.5)
    for lacking in ({"believed": 0.0}, {"aopc": -0.1}, {"likeness": -3.0}):
        assert score(**{"believed": 0.9, "aopc": 0.3, "likeness": 0.8} | lacking) == 0


def test_donors_are_of_another_class_and_always_the_same() -> None:
    y = np.random.default_rng(1).integers(0, 3, 200)
    donors = draw_donors(y)
    assert (y[donors] != y).all() and (donors == draw_donors(y)).all() and len(set(donors)) > 50
    assert draw_donors(np.zeros(3, int)).tolist() == [0, 1, 2]
