"""Equations 1 to 10 against slow definitions, and one batched pass of each player against one pair at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cae import losses
from cae.config import ClassHead, LossWeights, ModelConfig
from cae.losses import DiscriminatorObjective, GeneratorObjective, partner
from cae.networks import CAE, Discriminator

TINY = ModelConfig(
    image_size=32, stem="unshuffle", width=8, blocks=1, mlp_width=6, up_kernel=3, out_kernel=3, disc_width=4,
    disc_blocks=1, dropout=0.0,
)  # fmt: skip
# No two weights alike, so that no term can stand for another.
WEIGHTS = LossWeights(recon_x=7.0, recon_c=2.0, recon_s=3.0, cyc_x=5.0, adv1=1.1, cla1=1.3, adv2=0.7, cla2=1.9)
Y = torch.tensor([0, 1, 2, 1, 2, 0])  # three pairs: (0, 1), (1, 2), (2, 0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def players() -> tuple[CAE, Discriminator, Tensor]:
    """Both players in double precision with weights large enough for every gradient to count, and three pairs."""
    torch.manual_seed(0)
    cae, discriminator = CAE(TINY).double(), Discriminator(TINY, 3).double()
    for p in discriminator.parameters():
        nn.init.normal_(p, std=0.2)
    return cae, discriminator, random(6, 3, 32, 32).tanh()


def linear_blackbox() -> nn.Module:
    """Of three classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)).double().requires_grad_(False)


def gradients(module: nn.Module) -> list[Tensor]:
    assert all(p.grad is not None for p in module.parameters())
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# --- slow definitions: one pair (a, b), one number at a time


def slow_l1(a: Tensor, b: Tensor) -> float:
    """The mean over elements of |a - b|."""
    differences = [abs(p - q) for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)]
    return sum(differences) / len(differences)


def slow_log_share(logits: Tensor, index: int) -> float:
    """-log of exp(logits[index]) over the sum of all, for one image."""
    exps = [math.exp(value) for value in logits.flatten().tolist()]
    return -math.log(exps[index] / sum(exps))


@pytest.mark.parametrize("loss", [losses.recon_x, losses.recon_c, losses.recon_s, losses.cyc_x])
@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 6, 5), (2, 1)])
def test_eqs_1_to_4_are_the_mean_over_members_of_the_mean_absolute_error(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    a, b = random(*shape), random(*shape, seed=1)
    slow = sum(slow_l1(a[i], b[i]) for i in range(len(a))) / len(a)
    assert loss(a, b).item() == pytest.approx(slow, rel=1e-12)
    assert loss(a, a).item() == 0


def test_eqs_5_6_8_9_are_cross_entropies() -> None:
    fakes, reals = random(6, 5), random(6, 5, seed=1)  # fake, real, three classes

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    slow = {
        "adv1": mean([slow_log_share(logits[:2], 1) for logits in fakes]),
        "cla1": mean([slow_log_share(logits[2:], int(y)) for logits, y in zip(fakes, Y, strict=True)]),
        "adv2": mean([slow_log_share(f[:2], 0) + slow_log_share(r[:2], 1) for f, r in zip(fakes, reals, strict=True)]),
        "cla2": mean([slow_log_share(logits[2:], int(y)) for logits, y in zip(reals, Y, strict=True)]),
    }
    assert losses.adv1(fakes).item() == pytest.approx(slow["adv1"])
    assert losses.cla1(fakes[:, 2:], Y).item() == pytest.approx(slow["cla1"])
    assert losses.adv2(fakes, reals).item() == pytest.approx(slow["adv2"])
    assert losses.cla2(reals[:, 2:], Y).item() == pytest.approx(slow["cla2"])


def test_eq_9_takes_probabilities_as_well() -> None:
    logits, p = random(6, 3), random(6, 3, seed=1).softmax(1)
    slow = sum(float(p[i, k]) * slow_log_share(logits[i], k) for i in range(6) for k in range(3)) / 6
    assert losses.cla2(logits, p).item() == pytest.approx(slow)
    assert losses.cla2(logits, torch.eye(3, dtype=torch.double)[Y]).item() == pytest.approx(
        losses.cla2(logits, Y).item()
    )


def test_partner_gives_each_member_the_other_one_of_its_pair() -> None:
    assert partner(torch.tensor([10, 20, 30, 11, 21, 31])).tolist() == [11, 21, 31, 10, 20, 30]
    assert partner(torch.tensor([[1], [2]])).tolist() == [[2], [1]]


def l1(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().mean()


def share(logits: Tensor, index: int) -> Tensor:
    """-log of the softmax of one image's logits at one index."""
    return logits[0].logsumexp(0) - logits[0, index]


def eq_7(cae: CAE, d: Discriminator, x_a: Tensor, x_b: Tensor, y_a: int, y_b: int, w: LossWeights,
         heads: Sequence[Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:  # fmt: skip
    """The twelve terms of Eq. 7 and our `keep` for one pair, each from its own passes, summed over both members.

    Eq. 6 asks every one of `heads`, image -> logits of its classes; `keep` asks the first.
    """
    terms: dict[str, Tensor] = {name: torch.zeros((), dtype=torch.double) for name in vars(LossWeights())}
    for (x1, x2), y1, y2 in (
        ((x_a, x_b), y_a, y_b),
        ((x_b, x_a), y_b, y_a),
    ):  # x1 is the sample to be credited, x2 its partner
        c1, s1 = cae.class_encoder(x1), cae.individual_encoder(x1)
        c2, s2 = cae.class_encoder(x2), cae.individual_encoder(x2)
        terms["recon_x"] = terms["recon_x"] + l1(cae.decode(c1, s1), x1)  # Eq. 1
        terms["recon_c"] = terms["recon_c"] + l1(cae.class_encoder(cae.decode(c1, s2)), c1)  # Eq. 2
        terms["recon_s"] = terms["recon_s"] + l1(cae.individual_encoder(cae.decode(c2, s1)), s1)  # Eq. 3
        there = cae.individual_encoder(cae.decode(c2, s1))
        terms["cyc_x"] = terms["cyc_x"] + l1(cae.decode(c1, there), x1)  # Eq. 4
        terms["adv1"] = terms["adv1"] + share(d(cae.decode(c2, s1))[:, :2], 1)  # Eq. 5
        for head in heads:
            terms["cla1"] = terms["cla1"] + share(head(cae.decode(c2, s1)), y2)  # Eq. 6
        terms["keep"] = terms["keep"] + share(heads[0](cae.decode(c1, s1)), y1)
    generator = [name for name in terms if name not in ("adv2", "cla2")]
    return terms | {"loss_g": torch.stack([getattr(w, name) * terms[name] for name in generator]).sum()}


def eq_10(
    cae: CAE, d: Discriminator, x_a: Tensor, x_b: Tensor, y_a: int, y_b: int, w: LossWeights
) -> dict[str, Tensor]:
    """The terms of Eq. 10 for one pair, each from its own passes, summed over both members."""
    with torch.no_grad():
        a_as_b = cae.decode(cae.class_encoder(x_b), cae.individual_encoder(x_a))
        b_as_a = cae.decode(cae.class_encoder(x_a), cae.individual_encoder(x_b))
    a2b = share(d(a_as_b)[:, :2], 0) + share(d(x_b)[:, :2], 1)  # Eq. 8
    b2a = share(d(b_as_a)[:, :2], 0) + share(d(x_a)[:, :2], 1)
    classes = share(d(x_a)[:, 2:], y_a) + share(d(x_b)[:, 2:], y_b)  # Eq. 9
    return {"adv2": a2b + b2a, "cla2": classes, "loss_d": w.adv2 * (a2b + b2a) + w.cla2 * classes}


def one_by_one(
    equation: Callable[..., dict[str, Tensor]],
    cae: CAE,
    d: Discriminator,
    x: Tensor,
    total: str,
    weights: LossWeights = WEIGHTS,
) -> dict[str, float]:
    """Means over the three pairs of the paper's sums; backward, pair after pair."""
    sums: dict[str, float] = {}
    for a, b in ((0, 3), (1, 4), (2, 5)):
        terms = equation(cae, d, x[a : a + 1], x[b : b + 1], int(Y[a]), int(Y[b]), weights)
        (terms[total] / 3).backward()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.item() / 3
    return sums


# --- the two objectives


@pytest.mark.parametrize("keep", [0.0, 1.7])
@pytest.mark.parametrize("class_head", ["learned", "blackbox", "both"])  # of this player, `distilled` is `learned`
def test_generator_objective_is_eq_7_one_pair_at_a_time(class_head: ClassHead, keep: float) -> None:
    cae, discriminator, x = players()
    weights, blackbox = replace(WEIGHTS, keep=keep), linear_blackbox()

    def own(image: Tensor) -> Tensor:
        return discriminator(image)[:, 2:]

    heads = {"learned": [own], "blackbox": [blackbox], "both": [blackbox, own]}[class_head]
    slow = one_by_one(partial(eq_7, heads=heads), cae, discriminator, x, "loss_g", weights)
    expected = gradients(cae)
    cae.zero_grad()
    asked = None if class_head == "learned" else blackbox
    terms, swap = GeneratorObjective(cae, discriminator, weights, asked, both=class_head == "both")(x, Y)
    terms["loss_g"].backward()
    codes = cae.class_encoder(x).detach()
    deviation = ((codes - codes.mean(0)) ** 2).sum(0).div(5).sqrt().mean()
    torch.testing.assert_close(terms.pop("code_scale"), deviation, rtol=1e-12, atol=0)
    named = {"recon_x", "recon_c", "recon_s", "cyc_x", "adv1", "cla1", "loss_g"}
    assert set(terms) == (named | {"keep"} if keep else named)
    for name, term in terms.items():  # ours are means over both members, except for the total
        factor = 1 if name == "loss_g" else 2
        assert factor * term.item() == pytest.approx(slow[name], rel=1e-12), name
    for ours, theirs in zip(gradients(cae), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert any(g.abs().max() > 1 for g in expected)
    assert not swap.requires_grad
    for i in range(6):
        c, s = cae.class_encoder(x[(i + 3) % 6][None]), cae.individual_encoder(x[i][None])
        torch.testing.assert_close(swap[i][None], cae.decode(c, s).detach(), rtol=0, atol=1e-9)


def test_discriminator_objective_is_eq_10_one_pair_at_a_time() -> None:
    cae, discriminator, x = players()
    slow = one_by_one(eq_10, cae, discriminator, x, "loss_d")
    expected = gradients(discriminator)
    discriminator.zero_grad()
    _, swap = GeneratorObjective(cae, discriminator, WEIGHTS)(x, Y)
    terms = DiscriminatorObjective(discriminator, WEIGHTS)(x, swap, Y)
    terms["loss_d"].backward()
    assert set(terms) == {"adv2", "cla2", "loss_d"}
    for name, term in terms.items():
        factor = 1 if name == "loss_d" else 2
        assert factor * term.item() == pytest.approx(slow[name], rel=1e-12), name
    for ours, theirs in zip(gradients(discriminator), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert any(g.abs().max() > 0.1 for g in expected)


def test_each_objective_trains_its_own_player_only() -> None:
    cae, discriminator, x = players()
    generator, critic = GeneratorObjective(cae, discriminator, WEIGHTS), DiscriminatorObjective(discriminator, WEIGHTS)
    # What DistributedDataParallel would synchronise, and an optimiser of the objective would change.
    assert {id(p) for p in generator.parameters()} == {id(p) for p in cae.parameters()}
    assert {id(p) for p in critic.parameters()} == {id(p) for p in discriminator.parameters()}

    discriminator.requires_grad_(False)  # as the Trainer does
    terms, swap = generator(x, Y)
    terms["loss_g"].backward()
    assert all(p.grad is None for p in discriminator.parameters())
    before = gradients(cae)
    discriminator.requires_grad_(True)
    critic(x, swap, Y)["loss_d"].backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(cae), before, strict=True))
    assert all(g.abs().max() > 0 for g in gradients(discriminator))


def test_distilled_adds_the_black_box_on_swaps() -> None:
    _, discriminator, x = players()
    swap, p = random(6, 3, 32, 32, seed=1).tanh(), random(6, 3, seed=2).softmax(1)
    objective = DiscriminatorObjective(discriminator, WEIGHTS)
    plain, distilled = objective(x, swap, Y), objective(x, swap, Y, p)
    logits = discriminator(swap)[:, 2:]
    slow = sum(float(p[i, k]) * slow_log_share(logits[i], k) for i in range(6) for k in range(3)) / 6
    assert set(distilled) == {*plain, "distil"}
    assert distilled["distil"].item() == pytest.approx(slow)
    for name in ("adv2", "cla2"):
        assert distilled[name].item() == pytest.approx(plain[name].item(), rel=1e-12)
    assert (distilled["loss_d"] - plain["loss_d"]).item() == pytest.approx(2 * WEIGHTS.cla2 * slow)


def test_blackbox_takes_the_black_box_for_the_class_head() -> None:
    cae, discriminator, x = players()
    blackbox = linear_blackbox()
    learned, swap = GeneratorObjective(cae, discriminator, WEIGHTS)(x, Y)
    objective = GeneratorObjective(cae, discriminator, WEIGHTS, blackbox)
    terms, _ = objective(x, Y)
    wanted = [1, 2, 0, 0, 1, 2]  # the partner's class
    slow = sum(slow_log_share(blackbox(swap)[i], wanted[i]) for i in range(6)) / 6
    assert terms["cla1"].item() == pytest.approx(slow)
    assert terms["cla1"].item() != pytest.approx(learned["cla1"].item(), rel=1e-3)
    both, _ = GeneratorObjective(cae, discriminator, WEIGHTS, blackbox, both=True)(x, Y)
    assert both["cla1"].item() == pytest.approx(slow + learned["cla1"].item())
    for name in ("recon_x", "recon_c", "recon_s", "cyc_x", "adv1"):
        for other in (terms, both):
            assert other[name].item() == pytest.approx(learned[name].item(), rel=1e-12)
    added = both["loss_g"] - terms["loss_g"]
    assert added.item() == pytest.approx(2 * WEIGHTS.cla1 * learned["cla1"].item())

    # The class head of the discriminator is out of it; the black box passes the gradient on.
    terms["cla1"].backward()
    assert all(p.grad is None for p in [*discriminator.parameters(), *blackbox.parameters()])
    assert any(g.abs().max() > 0 for g in gradients_or_zero(cae))
    assert {id(p) for p in objective.parameters()} == {id(p) for p in cae.parameters()}


def gradients_or_zero(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def test_an_objective_can_be_copied() -> None:
    cae, discriminator, x = players()
    objective = GeneratorObjective(cae, discriminator, WEIGHTS)
    objective(x, Y)[0]["loss_g"].backward()
    assert copy.deepcopy(objective)(x, Y)[0]["loss_g"].item() == objective(x, Y)[0]["loss_g"].item()


def test_only_learned_does_without_the_black_box() -> None:
    heads: list[ClassHead] = ["learned", "distilled", "blackbox", "both"]
    assert [losses.needs_blackbox(head) for head in heads] == [False, True, True, True]


def test_auto_is_the_class_head_that_the_classifier_allows() -> None:
    assert losses.choose_class_head("auto", True) == "both" and losses.choose_class_head("auto", False) == "distilled"
    heads: list[ClassHead] = ["learned", "distilled", "blackbox", "both"]
    for head in heads:
        assert losses.choose_class_head(head, True) == head
        if head in ("blackbox", "both"):
            with pytest.raises(ValueError, match=f"--class-head {head} needs the classifier's gradient"):
                losses.choose_class_head(head, False)
        else:
            assert losses.choose_class_head(head, False) == head
