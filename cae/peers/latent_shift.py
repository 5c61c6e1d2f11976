"""Latent shift: Cohen, Brooks, En, Zucker, Pareek, Lungren, Chaudhari, "Gifsplanation via Latent Shift: A Simple
Autoencoder Approach to Counterfactual Generation for Chest X-rays", MIDL 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cae.networks import CAE


def latent_shift(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    cae: CAE,
    step: float = 2.0,
    steps: int = 12,
    fall: float = 0.8,
    frames: int = 10,
) -> Tensor:
    """Mean over `frames` from G(c, s) to G(c', s) of how much neighbours differ: maps (B, H, W), not negative.

    c and s are the class and individual code of the images (B, 3, H, W), G the decoder of `cae`, p the probability of
    each image's `target` (B,) for the classifier at G(c, s), and c' = c - a * g / |g|^2 with g the gradient by c of its
    log odds, which has the direction of that of p. As in the authors' code, a is searched: it grows by `step` and a
    tenth of itself, `steps` times at most, until p has fallen by `fall` or below 0.05, or rises again. Unlike
    there, only the class code is shifted, a counts log odds, by which they would fall if everything were linear, so
    that it is the same for codes in any units, one step at least is taken, and no share of changed pixels ends the
    search. Where g is 0, so is the map. Raises ValueError for fewer than two frames.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}: a difference needs two")
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
        way = -gradient / square

        def frame(far: Tensor, rows: Tensor) -> Tensor:
            return cae.decode(class_code[rows] + far[:, None] * way[rows], individual_code[rows])

        everyone = rows = torch.arange(len(images), device=images.device)
        first = log_odds.detach().sigmoid()
        last, end, far = first.clone(), torch.zeros_like(first), 0.0
        for _ in range(steps):
            far = 1.1 * far + step
            end[rows] = far
            p = classifier(frame(end[rows], rows)).float().softmax(1).gather(1, own[rows])[:, 0]
            going = (p <= last[rows]) & (p >= 0.05) & (first[rows] - p <= fall)
            last[rows] = p
            rows = rows[going]
            if not len(rows):
                break

        # The reconstruction once more: under `--precision bfloat16` gradients, and what they are of, are in float32.
        maps, before = torch.zeros_like(images[:, 0]), frame(0 * end, everyone)
        for share in torch.linspace(0, 1, frames).tolist()[1:]:
            after = frame(share * end, everyone)
            maps += (after - before).abs().mean(1)
            before = after
        return maps / (frames - 1)
