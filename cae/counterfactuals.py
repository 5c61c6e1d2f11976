"""How good counterfactual images are: believed, near, sparse, realistic, of the same individual, on a monotone way.

Legend: B images, C classes, D features, K path steps. Images are float32 (B, 3, H, W) in [-1, 1]; a classifier maps
images to logits (B, C) and is in evaluation mode. Measures are per image, for paired intervals; their means are the
numbers to report. No single one is enough: noise that fools the classifier is near, sparse and valid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cae.metrics import Classifier

Features = Callable[[Tensor], Tensor]


@torch.no_grad()
def validity(
    classifier: Classifier, counterfactuals: Tensor, target: Tensor, margin: float = 0, batch: int = 256
) -> Tensor:
    """Whether (B,) the classifier gives each counterfactual its `target` class (B,).

    That is, with a probability ahead of every other class's by more than `margin`. Ask a second classifier, trained
    apart, too: what only the explained one believes is noise made for it. Probabilities that are NaN are not valid.
    """
    target = target.to(counterfactuals.device)
    valid = []
    for images, label in zip(counterfactuals.split(batch), target[:, None].split(batch), strict=True):
        p = classifier(images).float().softmax(1)
        valid.append(p.gather(1, label)[:, 0] > p.scatter(1, label, 0.0).amax(1) + margin)
    return torch.cat(valid)


def _difference(images: Tensor, counterfactuals: Tensor) -> Tensor:
    if images.shape != counterfactuals.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and counterfactuals {tuple(counterfactuals.shape)} differ: pass equal shapes"
        )
    return (images - counterfactuals).abs()


def proximity(images: Tensor, counterfactuals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute (B,) and root mean square difference (B,) over pixels and channels, L1 and L2: 0 to 2, 0 if equal.

    Both are in units of the [-1, 1] range, whatever the images' size. Raises ValueError if shapes differ.
    """
    difference = _difference(images, counterfactuals).flatten(1)
    return difference.mean(1), difference.square().mean(1).sqrt()


def sparsity(images: Tensor, counterfactuals: Tensor, threshold: float = 0.1) -> Tensor:
    """Share (B,) of the pixels that change by less than `threshold` in every channel, in units of the [-1, 1] range.

    1: nothing changed. Raises ValueError if shapes differ.
    """
    return (_difference(images, counterfactuals).amax(1) < threshold).flatten(1).float().mean(1)


def penultimate(classifier: nn.Module) -> Features:
    """The function from images to features (B, D): what the linear layer that the classifier calls last is given.

    Raises ValueError if it has no linear layer; the function does, if it calls none.
    """
    layers = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the classifier has no linear layer: pass a feature function of your own")

    def features(images: Tensor) -> Tensor:
        given: list[Tensor] = []
        handles = [layer.register_forward_pre_hook(lambda _, args: given.append(args[0])) for layer in layers]
        try:
            classifier(images)
        finally:
            for handle in handles:
                handle.remove()
        if not given:
            raise ValueError("the classifier calls none of its linear layers: pass a feature function of your own")
        return given[-1].flatten(1)

    return features


@torch.no_grad()
def kid(
    features: Features, images: Tensor, others: Tensor, batch: int = 256, pairs: tuple[Tensor, Tensor] | None = None
) -> float:
    """Kernel distance between two sets of images (N, 3, H, W) and (M, 3, H, W). Binkowski et al., ICLR 2018.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (a . b / D + 1)^3 of their features
    (B, D); 0 on average for sets of one distribution, so it may be below 0. The whole sets are compared, in double
    precision, `batch` images or rows of the kernel at a time. The features are not Inception's: numbers are comparable
    within a run, under one feature function, and with no published KID. `pairs`: which images were made from which
    others, as two lists of places: alike for that reason alone, they are left out of the comparison of the sets, as an
    image and itself are within one. Raises ValueError on fewer than 2 images.
    """
    if min(len(images), len(others)) < 2:
        raise ValueError(f"sets have {len(images)} and {len(others)} images: both need at least 2")
    a, b = (torch.cat([features(chunk).double() for chunk in part.split(batch)]) for part in (images, others))

    def kernel_sum(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([((rows @ right.T / right.shape[1] + 1) ** 3).sum() for rows in left.split(batch)]).sum()

    def within(x: Tensor) -> Tensor:
        itself = ((x.square().mean(1) + 1) ** 3).sum()  # the kernel's diagonal, which would bias the estimate
        return (kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    across, count = kernel_sum(a, b), len(a) * len(b)
    if pairs is not None:
        across -= (((a[pairs[0]] * b[pairs[1]]).mean(1) + 1) ** 3).sum()
        count -= len(pairs[0])
    return float(within(a) + within(b) - 2 * across / count)


def identity(codes: Tensor, others: Tensor) -> Tensor:
    """How much (B,) individual codes (B, ...) are alike: 1 - sum |a - b| / sum (|a| + |b|), 0 to 1, 1 if equal.

    Codes of the images and of their counterfactuals. Codes that have nothing to do with each other don't reach 0
    (0.29 if Gaussian around 0), so report that of other images beside it. Raises ValueError if shapes differ.
    """
    if codes.shape != others.shape:
        raise ValueError(f"codes {tuple(codes.shape)} and {tuple(others.shape)} differ: pass equal shapes")
    a, b = codes.flatten(1), others.flatten(1)
    size = (a.abs() + b.abs()).sum(1)
    return 1 - (a - b).abs().sum(1) / torch.where(size == 0, torch.ones_like(size), size)  # two codes of 0 are equal


def monotonicity(p: Tensor, tolerance: float = 0) -> Tensor:
    """Whether (B,) the target's probability p (B, K + 1) along a path never lies `tolerance` below its highest before.

    Below by more than `tolerance`, that is: many small falls count as one, whatever the number of steps. The mean is
    the share of monotone paths, Fig. 11b; a path with a NaN is none.
    """
    return (p.cummax(1).values - p <= tolerance).all(1)
