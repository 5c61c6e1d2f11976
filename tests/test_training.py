"""Pairs, and the trainer: what it learns, how it goes on after a stop, and on two workers."""

from __future__ import annotations

import copy
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cae import checkpoint, training
from cae.config import PRESETS, ClassHead, LossWeights, ModelConfig, TrainConfig
from cae.layers import FrozenNorm
from cae.losses import DiscriminatorObjective, GeneratorObjective, partner
from cae.networks import CAE, Discriminator
from cae.training import Pairs, Trainer, draw_pairs

TINY = ModelConfig(
    image_size=32, stem="unshuffle", width=16, blocks=1, mlp_width=16, up_kernel=3, out_kernel=3, disc_width=4,
    disc_blocks=1, dropout=0.0,
)  # fmt: skip
RESIDUAL = replace(TINY, class_encoder="residual")
TRAIN = TrainConfig(batch=4, lr=1e-3, lr_halvings=0)
STEPS = 6


def toy_batch(step: int, pairs: int = 4) -> tuple[Tensor, Tensor]:
    """Pairs of one dark image (class 0) and one bright one (class 1), with noise and a stripe anywhere."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(2, (pairs,), generator=generator).repeat(2)
    y[pairs:] = 1 - y[pairs:]
    x = (y[:, None, None, None] - 0.5) + 0.1 * torch.randn(2 * pairs, 3, 32, 32, generator=generator)
    for image, row in zip(x, torch.randint(28, (2 * pairs,), generator=generator).tolist(), strict=True):
        image[:, row : row + 4] += 0.4
    return x.clamp(-1, 1), y


class Brightness(nn.Module):
    """A black box that knows the toy's truth: bright is class 1."""

    def forward(self, x: Tensor) -> Tensor:
        logit = 4 * x.mean((1, 2, 3))
        return torch.stack([-logit, logit], 1)


def weights_with(class_head: ClassHead) -> LossWeights:
    """Of the preset `quick` for the class head that it trains with: they ask the black box to `keep` classes, too."""
    return PRESETS["quick"].weights if class_head == "both" else LossWeights()


def make_trainer(
    config: TrainConfig = TRAIN, seed: int = 0, double: bool = False, model: ModelConfig = TINY, **options: Any
) -> Trainer:
    torch.manual_seed(seed)
    cae, discriminator = CAE(model), Discriminator(model, 2)
    for norm in cae.modules():
        if isinstance(norm, FrozenNorm):  # as a warm-up would
            norm.running_mean = torch.randn(norm.num_features)
    if double:
        cae, discriminator = cae.double(), discriminator.double()
    blackbox = None if config.class_head == "learned" else Brightness()
    return Trainer(cae, discriminator, config, weights_with(config.class_head), STEPS, blackbox, **options)


def parameters(trainer: Trainer) -> list[Tensor]:
    """And statistics."""
    modules = [trainer.cae, trainer.discriminator, trainer.best]
    return [value.clone() for module in modules for value in module.state_dict().values()]


# --- pairs

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 2, 5], [3, 40, 200]))


@pytest.mark.parametrize("pairs", [8, 100, 1000])
def test_pairs_are_even_over_class_pairs_and_over_the_images_of_a_class(pairs: int) -> None:
    drawn = draw_pairs(LABELS, TrainConfig(pairs=pairs, batch=4), seed=1)
    assert drawn.index.shape == drawn.flip.shape == (pairs, 2)
    kinds = LABELS[drawn.index]
    assert (kinds[:, 0] != kinds[:, 1]).all()
    counts = Counter(tuple(sorted(kind)) for kind in kinds.tolist())
    assert set(counts) == {(0, 2), (0, 5), (2, 5)}
    assert max(counts.values()) - min(counts.values()) <= 1
    for label in (0, 2, 5):
        uses = [int((drawn.index == i).sum()) for i in np.flatnonzero(label == LABELS)]
        assert max(uses) - min(uses) <= 1
        assert sum(uses) == (kinds == label).sum()


def test_each_class_stands_first_as_often_as_second() -> None:
    kinds = LABELS[draw_pairs(LABELS, TrainConfig(pairs=3000), seed=0).index]
    for label in (0, 2, 5):
        assert (kinds[:, 0] == label).sum() / (kinds == label).sum() == pytest.approx(0.5, abs=0.05)


def test_pairs_depend_on_the_seed_and_on_nothing_else() -> None:
    config = TrainConfig(pairs=64, batch=8)
    first, again, other = (draw_pairs(LABELS, config, seed) for seed in (3, 3, 4))
    assert (first.index == again.index).all() and (first.flip == again.flip).all()
    assert (first.index != other.index).any() and (first.flip != other.flip).any()
    np.random.rand(10)  # the global state has no say
    assert (draw_pairs(LABELS, config, 3).index == first.index).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_flips(share: float) -> None:
    flip = draw_pairs(LABELS, TrainConfig(pairs=2000, flip=share), seed=0).flip
    assert flip.mean() == pytest.approx(share, abs=0.03)
    assert flip.all() if share == 1 else not flip.any() if share == 0 else 0 < flip[:, 0].mean() < 1


def test_passes_over_a_class_are_shuffled_each_anew() -> None:
    index = draw_pairs(LABELS, TrainConfig(pairs=1200, batch=4), seed=0).index
    common = index[np.isin(index, np.flatnonzero(LABELS == 5))]  # in the order of the steps, 200 a pass
    passes = common[:600].reshape(3, 200)
    for one in passes:
        assert abs(np.corrcoef(one, np.arange(200))[0, 1]) < 0.4  # five standard errors are 0.35
    assert (passes[0] == passes[1]).mean() < 0.1 and (passes[1] == passes[2]).mean() < 0.1


def test_each_member_of_a_pair_is_mirrored_by_itself() -> None:
    flip = draw_pairs(LABELS, TrainConfig(pairs=2000, flip=0.5), seed=0).flip
    assert (flip[:, 0] != flip[:, 1]).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (TrainConfig(pairs=103, batch=8), 96),  # whole steps
        (TrainConfig(pairs=3, batch=8), 8),  # one step at least
        (TrainConfig(pairs=10_000, epochs=2.0, batch=2), 486),  # 243 images
        (TrainConfig(pairs=100, epochs=2.0, batch=2), 100),
    ],
)
def test_how_many_pairs(config: TrainConfig, count: int) -> None:
    assert len(draw_pairs(LABELS, config, 0).index) == count


def test_one_class_makes_no_pairs() -> None:
    with pytest.raises(ValueError, match="two classes") as error:
        draw_pairs(np.full(9, 2), TRAIN, 0)
    assert "\n" not in str(error.value)


# --- the trainer


@pytest.mark.parametrize("class_head", ["learned", "distilled", "blackbox", "both"])
def test_a_toy_is_learned(class_head: Any) -> None:
    trainer = make_trainer(replace(TRAIN, lr=4e-3, class_head=class_head))
    history = [{name: float(term) for name, term in trainer.step(*toy_batch(i, pairs=2)).items()} for i in range(80)]
    names = {"recon_x", "recon_c", "recon_s", "cyc_x", "adv1", "cla1", "loss_g", "code_scale", "adv2", "cla2", "loss_d"}
    assert set(history[0]) == names | {"distilled": {"distil"}, "both": {"keep"}}.get(class_head, set())
    first, last = ({n: np.mean([h[n] for h in part]) for n in names} for part in (history[:5], history[-5:]))
    for name in ("recon_x", "recon_s", "cyc_x", "cla1", "cla2", "loss_g"):
        assert last[name] < 0.5 * first[name], name
    x, y = toy_batch(99, pairs=16)
    with torch.no_grad():
        c, s = trainer.cae.encode(x)
        swap = trainer.cae.decode(partner(c), s)
    assert (Brightness()(swap).argmax(1) == partner(y)).float().mean() > 0.9


@pytest.mark.parametrize("class_head", ["learned", "both"])
def test_each_player_gets_one_gradient_a_step_and_its_own(class_head: ClassHead) -> None:
    # From N(0, 0.02) the discriminator would have next to no gradient to pass on.
    trainer = make_trainer(replace(TRAIN, lr=0.0, class_head=class_head), model=replace(TINY, disc_init="kaiming"))
    counts: Counter[int] = Counter()
    both = [*trainer.cae.parameters(), *trainer.discriminator.parameters()]
    for i, p in enumerate(both):
        p.register_hook(lambda grad, i=i: counts.update([i]))
    x, y = toy_batch(0)
    trainer.step(x, y)
    assert counts == dict.fromkeys(range(len(both)), 1)
    assert all(p.requires_grad for p in both)

    # With the learning rate at 0 the gradients left behind are those of the first weights.
    cae, discriminator = copy.deepcopy(trainer.cae), copy.deepcopy(trainer.discriminator)
    weights, asked = weights_with(class_head), Brightness() if class_head == "both" else None
    terms, swap = GeneratorObjective(cae, discriminator, weights, asked, both=asked is not None)(x, y)
    loss_d = DiscriminatorObjective(discriminator, weights)(x, swap, y)["loss_d"]
    for player, loss, kept in (
        (cae, terms["loss_g"], trainer.cae),
        (discriminator, loss_d, trainer.discriminator),
    ):
        expected = torch.autograd.grad(loss, list(player.parameters()))
        for gradient, p in zip(expected, kept.parameters(), strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_learning_rate_halves_at_even_distances() -> None:
    trainer = make_trainer(replace(TRAIN, lr=0.8, lr_halvings=3))  # 6 steps
    rates = []
    for i in range(STEPS):
        rates.append({group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups})
        trainer.step(*toy_batch(i, pairs=1))
    assert rates == [{rate} for rate in (0.8, 0.8, 0.4, 0.4, 0.2, 0.2)]


def test_adam_is_set_as_configured() -> None:
    trainer = make_trainer(replace(TRAIN, betas=(0.3, 0.9), weight_decay=0.02))
    for optimizer, player in zip(trainer.optimizers, (trainer.cae, trainer.discriminator), strict=True):
        for group in optimizer.param_groups:
            assert group["betas"] == (0.3, 0.9) and group["weight_decay"] == 0.02
        given = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(given) == sorted(id(p) for p in player.parameters())


@pytest.mark.parametrize(
    ("ema", "decays"),  # (1 + i) / (10 + i), until that is more
    [(0.2, (0.1, 2 / 11, 0.2, 0.2)), (0.9, (0.1, 2 / 11, 3 / 12, 4 / 13))],
)
def test_best_is_the_running_average_of_the_weights(ema: float, decays: tuple[float, ...]) -> None:
    trainer = make_trainer(replace(TRAIN, ema=ema))
    slow: list[Tensor] = []
    for i, decay in enumerate(decays):
        trainer.step(*toy_batch(i))
        now = [p.detach().clone() for p in trainer.cae.parameters()]
        slow = [decay * a + (1 - decay) * b for a, b in zip(slow, now, strict=True)] if slow else now
    for ours, expected in zip(trainer.best.parameters(), slow, strict=True):
        torch.testing.assert_close(ours, expected)
    assert trainer.best is not trainer.cae


def test_without_an_average_best_is_the_cae() -> None:
    trainer = make_trainer(replace(TRAIN, ema=0.0))
    assert trainer.best is trainer.cae


@pytest.mark.parametrize("class_head", ["distilled", "blackbox"])
def test_a_class_head_that_asks_the_classifier_needs_one(class_head: Any) -> None:
    config = replace(TRAIN, class_head=class_head)
    with pytest.raises(ValueError, match=f"{class_head} needs the classifier"):
        Trainer(CAE(TINY), Discriminator(TINY, 2), config, LossWeights(), STEPS)


@pytest.mark.parametrize("class_head", ["learned", "distilled", "both"])
def test_going_on_from_a_state_is_as_if_never_stopped(class_head: Any) -> None:
    config = replace(TRAIN, ema=0.9, lr_halvings=3, class_head=class_head)
    whole = make_trainer(config, model=RESIDUAL)
    for i in range(3):
        whole.step(*toy_batch(i))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = make_trainer(config, seed=9, model=RESIDUAL)
    assert any(not torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.step_count == 3
    for i in range(3, STEPS):
        ours, theirs = resumed.step(*toy_batch(i)), whole.step(*toy_batch(i))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for a, b in zip(parameters(whole), parameters(resumed), strict=True):
        assert torch.equal(a, b)
    assert resumed.step_count == whole.step_count == STEPS


def test_save_and_load(tmp_path: Path) -> None:
    trainer = make_trainer(replace(TRAIN, ema=0.5), model=RESIDUAL)
    trainer.step(*toy_batch(0))
    folder, (x, _) = str(tmp_path / "run" / "cae"), toy_batch(1)
    training.save(folder, trainer.best, ("left", "right"), weights={"recon_x": 10.0})
    loaded = training.load(folder)
    assert loaded.config == RESIDUAL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(x), trainer.best(x))
    _, about = checkpoint.read_model(folder)
    assert about["classes"] == ["left", "right"] and about["weights"] == {"recon_x": 10.0}


def test_load_says_in_a_line_what_is_missing(tmp_path: Path) -> None:
    checkpoint.save_model(str(tmp_path / "other"), nn.Linear(1, 1), {"kind": "classifier"})
    checkpoint.save_model(str(tmp_path / "older"), nn.Linear(1, 1), {"kind": "cae", "model": {"image_size": 32}})
    for folder, says in (("nothing", "no model in"), ("other", "is no CAE"), ("older", "another version")):
        with pytest.raises(ValueError, match=says) as error:
            training.load(str(tmp_path / folder))
        assert "\n" not in str(error.value)


def test_a_batch_of_pairs_has_first_members_first_and_mirrors_its_copy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    before = images.copy()
    pairs = Pairs(np.array([[0, 3], [1, 4], [2, 3], [0, 4]]), np.array([[0, 1], [0, 0], [1, 1], [1, 0]], bool))
    batch, members = pairs.batch(images, slice(1, 4, 2))  # the second of two workers
    assert members.tolist() == [1, 0, 4, 4]
    expected = [images[1], images[0][:, ::-1], images[4], images[4]]
    assert (batch == np.stack(expected)).all() and (images == before).all()


# --- two workers

WORLD = 2
DISTRIBUTED = replace(TRAIN, ema=0.5)


def worker(rank: int, folder: str, class_head: ClassHead, model: ModelConfig) -> None:
    """Three steps on this worker's half of every batch; leaves all parameters in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    # Other first weights on the second worker: wrapping must bring them together.
    config = replace(DISTRIBUTED, class_head=class_head)
    trainer = make_trainer(config, seed=rank, double=True, model=model, wrap=DistributedDataParallel)
    for i in range(3):
        x, y = toy_batch(i)
        mine = torch.cat([torch.arange(4)[rank::WORLD], torch.arange(4, 8)[rank::WORLD]])
        trainer.step(x[mine].double(), y[mine])
    torch.save(parameters(trainer), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("class_head", "model"), [("distilled", TINY), ("both", RESIDUAL)])
def test_two_workers_end_with_the_parameters_of_one(
    class_head: ClassHead, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    # In double precision: Adam blows up the rounding in gradients that are 0 but for it (biases before a norm). Such a
    # one, of 1e-13 at most, moves its bias by lr * 1e-13 / eps = 1e-8.
    single = make_trainer(replace(DISTRIBUTED, class_head=class_head), double=True, model=model)
    first = parameters(single)
    for i in range(3):
        x, y = toy_batch(i)
        single.step(x.double(), y)
    torch.multiprocessing.spawn(worker, (str(tmp_path), class_head, model), nprocs=WORLD)
    ends = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for end in ends:
        for ours, theirs in zip(end, parameters(single), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)
    assert max(float((a - b).abs().max()) for a, b in zip(first, parameters(single), strict=True)) > 1e-3


# --- what GPUs do, as far as a CPU can show it


@pytest.mark.parametrize(("class_head", "model"), [
    ("learned", TINY), ("distilled", TINY), ("blackbox", TINY), ("both", TINY),
    ("learned", replace(TINY, stem="conv", upsample="nearest", up_kernel=5, out_kernel=7)),  # as `paper`
    ("both", replace(RESIDUAL, upsample="bilinear", detail=True)),  # as `quick`
])  # fmt: skip
def test_bf16_takes_the_same_step_up_to_its_precision(class_head: ClassHead, model: ModelConfig) -> None:
    config = replace(TRAIN, class_head=class_head)
    full, half = make_trainer(config, model=model), make_trainer(config, bf16=True, model=model)
    start = parameters(full)
    terms, rough = full.step(*toy_batch(0)), half.step(*toy_batch(0))
    seen = []
    half.cae.decoder.up[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for step in range(1, STEPS):
        full.step(*toy_batch(step)), half.step(*toy_batch(step))
    assert set(seen) == {torch.bfloat16}  # autocast was on
    for name, term in terms.items():
        assert rough[name].item() == pytest.approx(term.item(), rel=0.03, abs=0.01), name
    moved, moved_roughly = (
        torch.cat([(p - q).flatten() for p, q in zip(parameters(trainer), start, strict=True)])
        for trainer in (full, half)
    )
    assert all(p.dtype == torch.float32 for p in half.cae.parameters())
    # Adam's first steps are all but signs, which rounding turns where a gradient is near nothing.
    assert F.cosine_similarity(moved, moved_roughly, dim=0) > 0.8


def test_memory_order_changes_no_number() -> None:
    torch.manual_seed(0)
    model = replace(TINY, stem="conv", upsample="nearest", up_kernel=5)
    cae, discriminator = CAE(model).double(), Discriminator(model, 2).double()
    x = toy_batch(0)[0].double()
    results = []
    for order in (torch.contiguous_format, torch.channels_last):
        cae.to(memory_format=order), discriminator.to(memory_format=order)  # type: ignore[call-overload]
        for given in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
            code, individual = cae.encode(given)
            results.append([code, individual, cae.decode(code, individual), discriminator(given)])
            assert individual.is_contiguous(memory_format=torch.channels_last)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# --- the players' own rates


def test_players_and_the_class_encoder_may_learn_slower() -> None:
    trainer = make_trainer(replace(TRAIN, disc_lr=1e-4, class_lr=5e-4, warm_up=1, lr_halvings=2))

    def rates() -> list[list[float]]:
        return [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    generator = trainer.optimizers[0].param_groups
    assert [id(p) for p in generator[0]["params"]] == [id(p) for p in trainer.cae.class_encoder.parameters()]
    assert sum(len(group["params"]) for group in generator) == len(list(trainer.cae.parameters()))
    assert rates() == [[5e-4, 1e-3, 1e-3], [1e-4]]
    for step in range(STEPS - 1):
        trainer.step(*toy_batch(step))
    assert rates() == [pytest.approx([2.5e-4, 5e-4, 5e-4]), pytest.approx([5e-5])]
    untaught = make_trainer(replace(TRAIN, class_lr=5e-4))  # has all yet to learn
    assert untaught.optimizers[0].param_groups[0]["lr"] == TRAIN.lr
