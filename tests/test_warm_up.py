"""Warm-ups before the pairs, and images disturbed for them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import RESIDUAL, TINY, TRAIN, Brightness, toy_batch
from torch import Tensor, nn

import cae.training
from cae.config import LossWeights, ModelConfig
from cae.images import to_array, to_tensor
from cae.networks import CAE, Discriminator, prepare
from cae.training import TEMPERATURE, Trainer, _distil, _to_unit_scale, disturb, mixed, warm_up


@pytest.mark.parametrize("bf16", [False, True])
def test_warm_up_teaches_class_code_and_class_head_and_leaves_the_rest(bf16: bool) -> None:
    torch.manual_seed(0)
    model = replace(TINY, disc_init="kaiming")
    cae, discriminator = CAE(model), Discriminator(model, 2)
    rest = [p.detach().clone() for part in (cae.individual_encoder, cae.decoder) for p in part.parameters()]
    y = np.repeat([0, 1], [90, 10])
    images = (
        np.random.default_rng(0).integers(0, 90, (100, 32, 32, 3), dtype=np.uint8)
        + 120 * y.astype(np.uint8)[:, None, None, None]
    )
    told: list[tuple[str, int, int]] = []
    learned = warm_up(
        cae, discriminator, images, y, replace(TRAIN, warm_up=60), 0, lambda *words: told.append(words), bf16
    )
    assert learned["class"] < 0.2 and math.isnan(learned["recon_x"])  # nats; knowing nothing costs 0.69
    assert told == [("class", step, 60) for step in range(1, 61)]
    x = to_tensor(images)
    with torch.no_grad():
        assert (discriminator(x)[:, 2:].argmax(1).numpy() == y).all()
        codes = cae.encode(x)[0].numpy()
    gap = np.linalg.norm(codes[y == 0].mean(0) - codes[y == 1].mean(0))
    assert gap > 3 * np.linalg.norm(codes[y == 0].std(0))
    for part, old in zip((p for m in (cae.individual_encoder, cae.decoder) for p in m.parameters()), rest, strict=True):
        assert torch.equal(part, old)


def test_statistics_of_the_class_encoder_are_learned_in_its_warm_up_alone() -> None:
    torch.manual_seed(0)
    network, discriminator = CAE(RESIDUAL).train(), Discriminator(RESIDUAL, 2)

    def statistics() -> list[Tensor]:
        return [value.clone() for name, value in network.state_dict().items() if "running_" in name]

    def changed(before: list[Tensor]) -> set[bool]:
        return {not torch.equal(new, old) for new, old in zip(statistics(), before, strict=True)}

    x, y = toy_batch(0, 32)
    images, labels = to_array(x), y.numpy()
    before = statistics()
    assert before
    warm_up(network, discriminator, images, labels, replace(TRAIN, warm_up=8), 0)
    assert changed(before) == {True}
    before = statistics()
    warm_up(network, discriminator, images, labels, replace(TRAIN, recon_warm_up=2), 0)
    trainer = Trainer(network, discriminator, TRAIN, LossWeights(), steps=2)
    trainer.step(*toy_batch(1))
    assert changed(before) == {False}
    x, _ = toy_batch(2)
    whole = network.train().encode(x)[0]
    for i in range(len(x)):
        torch.testing.assert_close(whole[i : i + 1], network.encode(x[i : i + 1])[0], rtol=1e-4, atol=1e-5)


def test_class_encoder_learns_what_its_teacher_says_and_class_head_learns_the_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    network, discriminator = CAE(RESIDUAL), Discriminator(replace(TINY, disc_init="kaiming"), 2)
    x, y = toy_batch(0, 32)

    class Wrong(nn.Module):
        """A classifier that has it the other way round."""

        def forward(self, images: Tensor) -> Tensor:
            return Brightness()(images).flip(1)

    agrees: list[float] = []

    def watched(logits: Tensor, images: Tensor, teacher: nn.Module) -> Tensor:
        agrees.append(float((logits.argmax(1) == teacher(images).argmax(1)).float().mean()))
        return _distil(logits, images, teacher)

    monkeypatch.setattr(cae.training, "_distil", watched)
    warm_up(network, discriminator, to_array(x), y.numpy(), replace(TRAIN, warm_up=60), 0, teacher=Wrong())
    # Of disturbed images, some of which are hardly bright or dark; the labels' class would agree on next to none.
    assert len(agrees) == 60 and sum(agrees[-10:]) / 10 > 0.95
    with torch.no_grad():
        assert torch.equal(discriminator(x)[:, 2:].argmax(1), y)


@pytest.mark.parametrize("model", [TINY, RESIDUAL])
def test_class_codes_have_unit_scale_after_the_warm_up(model: ModelConfig) -> None:
    torch.manual_seed(0)
    network, discriminator = CAE(model), Discriminator(replace(TINY, disc_init="kaiming"), 2)
    x, y = toy_batch(0, 64)
    with torch.no_grad():
        network.class_encoder.to_code.weight.mul_(50)
        assert not 0.8 < network.encode(x)[0].std(0).mean() < 1.25
    warm_up(
        network, discriminator, to_array(x), y.numpy(), replace(TRAIN, warm_up=20, flip=0.0), 0, teacher=Brightness()
    )
    with torch.no_grad():
        code = network.encode(x)[0]
    assert 0.8 < code.std(0).mean() < 1.25 and code.mean(0).abs().max() < 0.4


def test_class_codes_that_are_all_alike_are_not_scaled() -> None:
    network, images = CAE(TINY), np.full((8, 32, 32, 3), 100, np.uint8)
    before = network.class_encoder.to_code.weight.detach().clone()
    with torch.no_grad():
        network.class_encoder.features[-2].weight.zero_()
    _to_unit_scale(network, to_tensor(images))
    assert torch.equal(network.class_encoder.to_code.weight, before)


def test_mixed_images_have_one_square_of_another_image() -> None:
    x = torch.arange(400.0)[:, None, None, None].expand(-1, 3, 16, 16)
    found, again = (mixed(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(found, again)
    areas = []
    for i, image in enumerate(found):
        other = image[0] != i
        assert ((image == i) | (image == (i - 1) % 400)).all() and (image == image[0]).all()
        rows, cols = other.any(1), other.any(0)
        assert torch.equal(other, rows[:, None] & cols[None, :])  # a rectangle: a square, cut at borders
        inside = not (rows[0] or rows[-1] or cols[0] or cols[-1])
        assert not inside or abs(int(rows.sum()) - int(cols.sum())) <= 1
        areas.append(float(other.float().mean()))
    assert min(areas) < 0.01 and max(areas) > 0.7 and 0.15 < np.mean(areas) < 0.3


def test_images_are_mixed_for_the_teacher_alone_and_not_in_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    images, y = to_array(toy_batch(0, 32)[0]), np.repeat([0, 1], 32)
    asked, plain, named = [], [], []

    class Watching(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(x)
            return super().forward(x)

    def watched(x: Tensor, chance: torch.Generator) -> Tensor:
        plain.append(disturb(x, chance))
        return plain[-1]

    monkeypatch.setattr(cae.training, "disturb", watched)
    discriminator = Discriminator(TINY, 2)
    discriminator.register_forward_pre_hook(lambda _, given: named.append(given[0]))
    warm_up(CAE(TINY), discriminator, images, y, replace(TRAIN, warm_up=10), 0, teacher=Watching())
    assert [torch.equal(a, b) for a, b in zip(asked, plain, strict=True)] == [False] * 8 + [True] * 2
    assert all(torch.equal(a, b) for a, b in zip(named, plain, strict=True))

    network, coded = CAE(TINY), []
    network.class_encoder.register_forward_pre_hook(lambda _, given: coded.append(given[0]))
    plain.clear()
    warm_up(network, discriminator, images, y, replace(TRAIN, warm_up=3), 0)
    assert all(torch.equal(a, prepare(b, TINY)) for a, b in zip(coded[:3], plain, strict=True))


def test_distilling_is_its_slow_definition() -> None:
    x, logits = toy_batch(0, 3)[0], torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    said, own = ((values / TEMPERATURE).exp().double() for values in (Brightness()(x), logits))
    said, own = (values / values.sum(1, keepdim=True) for values in (said, own))
    slow = TEMPERATURE**2 * sum(
        float(p[k] * (p[k] / q[k]).log()) for p, q in zip(said, own, strict=True) for k in range(2)
    ) / len(x)  # fmt: skip
    assert float(_distil(logits, x, Brightness())) == pytest.approx(slow, rel=1e-4)
    assert float(_distil(Brightness()(x) + 3, x, Brightness())) == pytest.approx(0, abs=1e-5)


def test_images_are_disturbed_alike_with_and_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    seen: list[Tensor] = []

    def watched(x: Tensor, chance: torch.Generator) -> Tensor:
        seen.append(disturb(x, chance))
        return seen[-1]

    monkeypatch.setattr(cae.training, "disturb", watched)
    for bf16 in (False, True):
        model = CAE(TINY)
        warm_up(model, Discriminator(TINY, 2), images, np.repeat([0, 1], 4), replace(TRAIN, warm_up=1), 0, bf16=bf16)
    assert torch.equal(*seen)


def test_warm_up_mirrors_as_often_as_pairs_are() -> None:
    shades = np.linspace(0, 255, 32).astype(np.uint8)[None, None, :, None]
    images, y = np.broadcast_to(shades, (8, 32, 32, 3)).copy(), np.repeat([0, 1], 4)
    for flip, rising in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.5)):
        torch.manual_seed(0)
        cae, seen = CAE(TINY), []
        cae.individual_encoder.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        warm_up(cae, Discriminator(TINY, 2), images, y, replace(TRAIN, flip=flip, recon_warm_up=6), 0)
        x = torch.cat(seen)
        assert ((x[:, 0, 0, -1] > x[:, 0, 0, 0]).float().mean() - rising).abs() < 0.15


def test_reconstruction_warm_up_teaches_images_and_leaves_the_rest() -> None:
    torch.manual_seed(0)
    cae, discriminator = CAE(replace(TINY, detail=True)), Discriminator(TINY, 2)
    rest = [p.detach().clone() for part in (cae.class_encoder, discriminator) for p in part.parameters()]
    x, y = toy_batch(0, 32)
    images = to_array(x)
    with torch.no_grad():
        before = float((cae(x) - x).abs().mean())
    config = replace(TRAIN, recon_warm_up=80)
    learned = warm_up(cae, discriminator, images, y.numpy(), config, 0)
    with torch.no_grad():
        after = float((cae(x) - x).abs().mean())
    assert math.isnan(learned["class"]) and learned["recon_x"] == pytest.approx(after, rel=0.3)
    assert after < 0.1 < 0.3 < before
    for part, old in zip((p for m in (cae.class_encoder, discriminator) for p in m.parameters()), rest, strict=True):
        assert torch.equal(part, old)


def test_disturbed_images_stay_near_and_each_is_its_own() -> None:
    plane = torch.linspace(-0.5, 0.5, 32).expand(64, 3, 32, 32)
    x, again = (disturb(plane, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(x, again) and x.abs().max() <= 1
    assert len({image.mean().item() for image in x}) == 64
    # Brightness moves the mean of a plane that is 0 in the middle, contrast by 0.2 of 1, geometry by its slope.
    assert 0.1 < x.mean((1, 2, 3)).abs().max() < 0.15 + 0.2 + 0.1
    slope = x[..., 8:24, 24].mean((1, 2)) - x[..., 8:24, 8].mean((1, 2))
    plain = (plane[..., 24] - plane[..., 8]).mean()
    assert 0.7 < slope.min() / plain < 0.9 and 1.1 < slope.max() / plain < 1.4


def test_disturbing_is_its_slow_definition() -> None:
    places = ((torch.arange(32) + 0.5) / 16 - 1).tolist()  # of pixels, in half sides from the middle
    plane = 0.3 * torch.tensor(places)[:, None] - 0.2 * torch.tensor(places)
    found = disturb(plane.expand(8, 3, 32, 32), torch.Generator().manual_seed(3))
    draws = (torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1).T.tolist()
    for image, (turn, scale, dx, dy, bright, contrast) in zip(found, draws, strict=True):
        for row, col in ((16, 16), (9, 20), (22, 8), (12, 11)):
            across, down = (1 + 0.15 * scale) * places[col], (1 + 0.15 * scale) * places[row]
            sin, cos = math.sin(0.15 * turn), math.cos(0.15 * turn)
            there = 0.3 * (sin * across + cos * down + 0.1 * dy) - 0.2 * (cos * across - sin * down + 0.1 * dx)
            expected = (there + 1) * (1 + 0.2 * contrast) - 1 + 0.15 * bright
            assert image[:, row, col].tolist() == pytest.approx([expected] * 3, abs=1e-5)


def test_warm_up_draws_classes_evenly_whatever_their_counts() -> None:
    seen: list[Tensor] = []
    network, y = CAE(TINY), np.repeat([0, 1], [58, 6])
    images = np.broadcast_to(np.where(y, 250, 5).astype(np.uint8)[:, None, None, None], (64, 32, 32, 3)).copy()
    network.individual_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    warm_up(network, Discriminator(TINY, 2), images, y, replace(TRAIN, recon_warm_up=12), 0)
    bright = (torch.cat(seen).mean((1, 2, 3)) > 0).float()
    assert len(bright) == 192 and bright.mean().item() == pytest.approx(0.5, abs=0.18)  # five standard errors


def test_the_loss_of_the_first_warm_up_is_the_mean_of_both_learners() -> None:
    torch.manual_seed(0)
    network, discriminator, (x, y) = CAE(TINY), Discriminator(TINY, 2), toy_batch(0, 16)
    with torch.no_grad():  # which know nothing: a nat times log 2 each, but for the bias of a random head
        for p in (*network.class_encoder.parameters(), *discriminator.parameters()):
            p.zero_()
    learned = warm_up(network, discriminator, to_array(x), y.numpy(), replace(TRAIN, warm_up=1), 0)
    assert learned["class"] == pytest.approx(math.log(2), rel=0.1)
