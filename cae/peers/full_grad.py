"""FullGrad and its two variants: Srinivas, Fleuret, "Full-Gradient Representation for Neural Network Visualization",
NeurIPS 2019; the variants are in the code that the authors published with it.

In a network of convolutions, linear layers, batch norms, ReLU and pooling, a logit f is its first-order part exactly:

    f(x) = sum(x * df/dx) + sum over layers l of sum(b_l * df/do_l),

o_l what layer l gives and b_l its bias; a batch norm's is what it makes of 0, shift - mean * scale / std.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cae.classifiers import BlackBox

INCOMPLETE = 1e-4
"""Share of the sum of all terms' sizes that may be missing: far above rounding, far below another nonlinearity."""


@dataclass(frozen=True, eq=False)
class FullGradients:
    """The terms of a logit, for B images."""

    logit: Tensor
    """(B,) f, the logit of the target; the sum of all terms below."""
    input: Tensor
    """(B, 3 or 1, H, W) input * gradient, the input being what the network itself takes: of a `BlackBox` the images as
    it normalises them."""
    gradients: list[Tensor]
    """df/do_l, (B, C, h, w) or, of linear layers, (B, C), for each layer with a bias in the order of their calls."""
    biases: list[Tensor]
    """b_l, (C, 1, 1) or (C,), of the same layers."""

    def bias_terms(self) -> list[Tensor]:
        """b_l * df/do_l, of the gradients' shapes."""
        return [gradient * bias for gradient, bias in zip(self.gradients, self.biases, strict=True)]


def full_gradients(classifier: nn.Module, images: Tensor, target: Tensor) -> FullGradients:
    """The terms of the logit of each image's `target` (B,), for images (B, 3, H, W).

    Raises ValueError if they do not add up to it: then the classifier has other biases or nonlinearities than those
    above, and no such terms.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    normalised: Callable[[Tensor], Tensor] = nn.Identity()
    answer: Callable[[Tensor], Tensor] = classifier
    if isinstance(classifier, BlackBox):
        normalised, answer = classifier.normalised, classifier.answer

    def keep(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = _bias(layer)
        if bias is None:
            return output
        behind = 0 if isinstance(layer, nn.Linear) else output.ndim - 2  # axes behind the channels
        calls.append((output, bias.detach().view(-1, *[1] * behind)))
        return output.clone()  # an activation may work in place

    hooks = [layer.register_forward_hook(keep) for layer in classifier.modules()]
    try:
        with torch.enable_grad():
            x = normalised(images).detach().requires_grad_()
            logit = answer(x).gather(1, target[:, None])[:, 0]
            # Zeros for a layer whose output is not used.
            gradient, *gradients = torch.autograd.grad(
                logit.sum(), [x, *[output for output, _ in calls]], materialize_grads=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    terms = FullGradients(logit.detach(), x.detach() * gradient, gradients, [bias for _, bias in calls])
    flat = [term.flatten(1) for term in (terms.input, *terms.bias_terms())]
    total = torch.stack([term.sum(1, dtype=torch.float64) for term in flat]).sum(0)
    sizes = torch.stack([term.abs().sum(1, dtype=torch.float64) for term in flat]).sum(0)
    missing = (terms.logit - total).abs() / sizes.clamp(min=torch.finfo(torch.float32).tiny)
    if (missing > INCOMPLETE).any():
        raise ValueError(
            f"the terms leave out {float(missing.max()):.1g} of their sizes' sum: FullGrad is for networks of "
            "convolutions, linear layers, batch norms, ReLU and pooling in evaluation mode"
        )
    return terms


def _bias(layer: nn.Module) -> Tensor | None:
    """What the layer adds to a linear map of its input, (C,); None if nothing."""
    if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
        nothing = torch.zeros_like(layer.running_mean)[None]
        shift = F.batch_norm(nothing, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        return shift[0]
    return layer.bias if isinstance(layer, _ConvNd | nn.Linear) else None


def full_grad(classifier: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """psi(x * df/dx) + sum over layers l of psi(b_l * df/do_l), summed over channels: maps (B, H, W), not negative.

    f is the logit of each image's `target` (B,) for images (B, 3, H, W). psi takes absolute values, scales an image's
    to [0, 1] over all channels and places of the term, and enlarges them to (H, W), bilinearly with the corners
    aligned. Linear layers have no place and are left out. Raises ValueError as `full_gradients` does.
    """
    terms = full_gradients(classifier, images, target)
    return _aggregate([terms.input, *terms.bias_terms()])


def simple_full_grad(classifier: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """psi(x * df/dx) + sum over layers l of psi(df/do_l): `full_grad` without the multiplication by the biases.

    Layers without a bias stay out, as there. Maps (B, H, W), not negative. Raises ValueError as `full_gradients` does.
    """
    terms = full_gradients(classifier, images, target)
    return _aggregate([terms.input, *terms.gradients])


def smooth_full_grad(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    samples: int = 25,
    noise: float = 0.15,
    simple: bool = True,
    seed: int = 0,
) -> Tensor:
    """`simple_full_grad` of terms that are signed means over `samples` noisy images, psi after it: maps (B, H, W).

    The noise is Gaussian, its sigma `noise` times the range of each image's values (the authors take the batch's), the
    draws the same for every image; without noise the map is that of `simple_full_grad`. With `simple` False it is so
    for `full_grad`, which is nearer to the authors' code (there the input's term is summed over channels before psi).
    Raises ValueError as `full_gradients` does.
    """
    sigma = noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    rng = np.random.default_rng([*b"smooth full grad", seed])
    sums: list[Tensor] = []
    for _ in range(samples):
        draw = torch.from_numpy(rng.standard_normal(images.shape[1:])).to(images)
        terms = full_gradients(classifier, images + sigma * draw, target)
        layers = terms.gradients if simple else terms.bias_terms()
        sums = [a + b for a, b in zip(sums, [terms.input, *layers], strict=True)] if sums else [terms.input, *layers]
    return _aggregate([term / samples for term in sums])


def _aggregate(terms: list[Tensor]) -> Tensor:
    """Sum over terms (B, C, h, w), the first of them of the images' size, and channels of psi: maps (B, H, W)."""
    size = terms[0].shape[2:]
    heat = torch.zeros_like(terms[0][:, 0])
    for term in terms:
        if term.ndim == 4:
            term = term.abs()
            term = term - term.amin((1, 2, 3), keepdim=True)
            term = term / (term.amax((1, 2, 3), keepdim=True) + 1e-6)
            # The sum over channels first: enlarging is linear, and so a hundred times cheaper.
            term = term.sum(1, keepdim=True)
            heat = heat + F.interpolate(term, size=size, mode="bilinear", align_corners=True)[:, 0]
    return heat
