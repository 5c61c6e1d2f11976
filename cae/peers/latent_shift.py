"""Latent shift: Cohen, Brooks, En, Zucker, Pareek, Lungren, Chaudhari, "Gifsplanation via Latent Shift: A Simple
Autoencoder Approach to Counterfactual Generation for Chest X-rays", MIDL 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae.networks import CAE


def latent_shift(classifier: nn.Module, images: Tensor, target: Tensor, *, cae: CAE, step: float = 10.0) -> Tensor:
    """Mean over channels of |G(c', s) - G(c, s)|, c' = c - step * g / |g|^2: maps (B, H, W), not negative.

    c and s are the class and individual code of the images (B, 3, H, W), G the decoder of `cae`, and g the gradient by
    c of f(G(c, s)), f the log odds of each image's `target` (B,) for the classifier. The authors shift the whole code
    of a plain autoencoder along the gradient of the probability, which has the same direction, as far as a search says.
    Here it is the class code only, and the length is such that the log odds would fall by `step` if everything were
    linear: the same for codes in any units. Where g is 0, so is the map.
    """
    with torch.no_grad():
        class_code, individual_code = cae.encode(images)
    class_code.requires_grad_()
    with torch.enable_grad():
        logits = classifier(cae.decode(class_code, individual_code)).float()
        own = target[:, None]
        log_odds = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(1)
        (gradient,) = torch.autograd.grad(log_odds.sum(), class_code)  # (B, D)
    with torch.no_grad():
        square = gradient.square().sum(1, keepdim=True).clamp(min=torch.finfo(gradient.dtype).tiny)
        # The reconstruction once more: under `--precision bfloat16` gradients, and what they are of, are in float32.
        codes = torch.stack([class_code, class_code - step * gradient / square])
        reconstruction, shifted = (cae.decode(code, individual_code) for code in codes)
        return (shifted - reconstruction).abs().mean(1)
