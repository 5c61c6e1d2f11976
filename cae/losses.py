"""The ten equations of Section III-D, and the two players' objectives built from them.

A batch holds B pairs as 2B images: the first members, then the second ones. `partner` swaps the two halves, so the
swap of image i is G(class code of its partner, its own individual code). Every term is a mean over the 2B members;
the paper's sum over A and B is twice that, and the objectives say so.

Under DDP only `forward` synchronises gradients; hence each player's whole objective is one module with one `forward`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.config import ClassHead, LossWeights
from cae.networks import CAE, Discriminator

Terms = dict[str, Tensor]
GRADIENT: tuple[ClassHead, ...] = ("blackbox", "both")  # class heads that descend through the black box


def partner(x: Tensor) -> Tensor:
    """Each member's row replaced by that of the other member of its pair: (2B, ...) -> (2B, ...)."""
    return x.roll(len(x) // 2, 0)


# Eqs. 1 to 4: L1 over elements (a sum would let the individual code outweigh everything).
def recon_x(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Eq. 1: the image comes back from its own codes."""
    return F.l1_loss(reconstruction, x)


def recon_c(class_code_of_swap: Tensor, class_code_put_in: Tensor) -> Tensor:
    """Eq. 2: the swap carries the class code it was given. Neither side is detached, as in the paper."""
    return F.l1_loss(class_code_of_swap, class_code_put_in)


def recon_s(individual_code_of_swap: Tensor, individual_code: Tensor) -> Tensor:
    """Eq. 3: the swap keeps the individual code."""
    return F.l1_loss(individual_code_of_swap, individual_code)


def cyc_x(there_and_back: Tensor, x: Tensor) -> Tensor:
    """Eq. 4: the swap's individual code with the first class code gives the image again."""
    return F.l1_loss(there_and_back, x)


def adv1(logits_of_swap: Tensor) -> Tensor:
    """Eq. 5: D_r takes the swap for real (index 1)."""
    return F.cross_entropy(logits_of_swap[:, :2], torch.ones_like(logits_of_swap[:, 0], dtype=torch.long))


def cla1(class_logits_of_swap: Tensor, y_partner: Tensor) -> Tensor:
    """Eq. 6: D_c gives the swap the class whose code it got."""
    return F.cross_entropy(class_logits_of_swap, y_partner)


def adv2(logits_of_swap: Tensor, logits_of_image: Tensor) -> Tensor:
    """Eq. 8: D_r takes the swap for fake (index 0) and the image for real."""
    fake = F.cross_entropy(logits_of_swap[:, :2], torch.zeros_like(logits_of_swap[:, 0], dtype=torch.long))
    real = F.cross_entropy(logits_of_image[:, :2], torch.ones_like(logits_of_image[:, 0], dtype=torch.long))
    return fake + real


def cla2(class_logits_of_image: Tensor, y: Tensor) -> Tensor:
    """Eq. 9: D_c names the class of an image; y are class indices (2B,) or probabilities (2B, C)."""
    return F.cross_entropy(class_logits_of_image, y)


def keep(class_logits: Tensor, y: Tensor) -> Tensor:
    """Beyond the paper: D_c gives reconstructions (2B, C) the class y (2B,) of the image."""
    return F.cross_entropy(class_logits, y)


class GeneratorObjective(nn.Module):
    """Eq. 7: x (2B, 3, H, W), y (2B,) -> named terms before weights, "loss_g" their weighted sum, and the swaps.

    Among the terms, "code_scale" is no loss: the standard deviation of the batch's class codes, mean over numbers.

    Eq. 6 asks D_c, or `blackbox` instead, where it is given, or the two (`both`): then "cla1" is the sum of both terms.

    The other players, frozen (the discriminator and, for class heads with it, the classifier), are kept in a closure,
    not as submodules, so that DDP does not take their parameters for this player's.
    """

    def __init__(self, cae: CAE, discriminator: Discriminator, weights: LossWeights,
                 blackbox: nn.Module | None = None, both: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.cae = cae
        self.weights = weights
        self.both = both
        self._critics: Callable[[], tuple[Discriminator, nn.Module | None]] = lambda: (discriminator, blackbox)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Terms, Tensor]:
        w, (discriminator, blackbox) = self.weights, self._critics()
        c, s = self.cae.encode(x)
        # One decode serves reconstructions and swaps.
        decoded = self.cae.decode(torch.cat([c, partner(c)]), s)  # (4B, 3, H, W)
        reconstruction, swap = decoded.chunk(2)
        c_swap, s_swap = self.cae.encode(swap)
        there_and_back = self.cae.decode(c, s_swap)
        judged = torch.cat([swap, reconstruction]) if w.keep else swap
        logits = discriminator(judged if blackbox is None else swap)  # (2B or 4B, 2 + C)
        class_logits = logits[:, 2:] if blackbox is None else blackbox(judged)
        n = len(x)
        terms = {
            "recon_x": recon_x(reconstruction, x),
            "recon_c": recon_c(c_swap, partner(c)),
            "recon_s": recon_s(s_swap, s),
            "cyc_x": cyc_x(there_and_back, x),
            "adv1": adv1(logits[:n]),
            "cla1": cla1(class_logits[:n], partner(y)),
        }
        if self.both:
            terms["cla1"] = terms["cla1"] + cla1(logits[:n, 2:], partner(y))
        if w.keep:
            terms["keep"] = keep(class_logits[n:], y)
        terms["loss_g"] = 2 * torch.stack([getattr(w, name) * term for name, term in terms.items()]).sum()
        # Codes that shrink towards one point carry no class any more.
        terms["code_scale"] = c.detach().std(0).mean()
        return terms, swap.detach()


class DiscriminatorObjective(nn.Module):
    """Eq. 10: x, swap (2B, 3, H, W), y (2B,) -> named terms before weights and "loss_d", their weighted sum.

    With `swap_probabilities` (2B, C), the black box's on the swaps, D_c also learns those (class head `distilled`):
    it then tracks the black box where the generator goes, by queries alone.
    """

    def __init__(self, discriminator: Discriminator, weights: LossWeights) -> None:
        super().__init__()
        self.discriminator = discriminator
        self.weights = weights

    def forward(self, x: Tensor, swap: Tensor, y: Tensor, swap_probabilities: Tensor | None = None) -> Terms:
        logits_x, logits_swap = self.discriminator(torch.cat([x, swap])).chunk(2)
        terms = {"adv2": adv2(logits_swap, logits_x), "cla2": cla2(logits_x[:, 2:], y)}
        loss = self.weights.adv2 * terms["adv2"] + self.weights.cla2 * terms["cla2"]
        if swap_probabilities is not None:
            terms["distil"] = cla2(logits_swap[:, 2:], swap_probabilities)
            loss = loss + self.weights.cla2 * terms["distil"]
        terms["loss_d"] = 2 * loss
        return terms


def choose_class_head(class_head: ClassHead, differentiable: bool) -> ClassHead:
    """The class head that `auto` stands for, for a classifier with a gradient or without; any other as it is.

    Raises ValueError for `blackbox` and `both` without a gradient.
    """
    if class_head == "auto":
        return "both" if differentiable else "distilled"
    if class_head in GRADIENT and not differentiable:
        raise ValueError(
            f"--class-head {class_head} needs the classifier's gradient, and this one gives outputs only: "
            "choose distilled"
        )
    return class_head


def needs_blackbox(class_head: ClassHead) -> bool:
    """Whether training with this class head asks the black box about swaps."""
    return class_head != "learned"
