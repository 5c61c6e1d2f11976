"""What a path does to the classifier, pixel by pixel: the attributions that ask it, by gradients or by windows.

Legend: B images, K path steps, C classes, H height, W width. Pure and batched; all tensors stay on the images' device,
and b is asked about `at_once` images at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cae.classifiers import BlackBox

ASKED = 0.3  # share of the windows, those where `where` says most, that `windows` asks b about
GAUSS_LEGENDRE = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)  # shares of a step that two points stand at


def faded(way: Tensor, last: Tensor, fade: float) -> Tensor:
    """The way (B, K + 1, 3, H, W) with contrast that falls evenly, to 1 - `fade` of it at its end, step `last` (B,).

    Contrast about the mean of each frame and channel. Flat images are no class's, and to integrate gradients on the way
    to one shows what b goes by at all; a counterfactual shows what sets two classes apart. Some of the former finds
    what the image's class needs and the other has as well; how much was chosen on val (benchmarks/README.md).
    """
    step = torch.arange(way.shape[1], device=way.device, dtype=way.dtype)
    share = fade * (step / last[:, None]).clamp(max=1)  # (B, K + 1)
    return torch.lerp(way, way.mean((-2, -1), keepdim=True), share[:, :, None, None, None])


def integrated(blackbox: BlackBox, way: Tensor, last: Tensor, source: Tensor, target: Tensor,
               at_once: int) -> Tensor:  # fmt: skip
    """Each pixel's part in what the way from an image to its counterfactual does to b; signed, (B, H, W).

    The way (B, K + 1, 3, H, W) has the image at its start and then the path's frames, faded (see `faded`); the sum
    over k of (gradient of b's target minus source logit between image_{k-1} and image_k) * (image_k - image_{k-1}),
    over channels too, by two Gauss-Legendre points a step: path-integrated gradients (Sundararajan et al. 2017) with
    the faded counterfactual in the place of a baseline. So the map sums to that logit there minus at the image, up to
    the quadrature. Starting at the image and not at its reconstruction, it also shows what b loses there, such as fine
    texture: a part of why b changes its mind. Images from `last` (B,) on are all alike and are left out.
    """
    heat = torch.zeros_like(way[:, 0, 0])
    used = torch.arange(way.shape[1] - 1, device=way.device) < last[:, None]  # (B, K)
    for chunk in used.nonzero().split(at_once):
        image, step = chunk.T
        before, after = way[image, step], way[image, step + 1]
        for share in GAUSS_LEGENDRE:
            with torch.enable_grad():
                point = torch.lerp(before, after, share).requires_grad_()
                wanted = _logit_lead(blackbox, point, source[image], target[image])
                (gradient,) = torch.autograd.grad(wanted.sum(), point)
            heat.index_add_(0, image, (gradient * (after - before)).sum(1) / len(GAUSS_LEGENDRE))
    return heat


def spacing(window: int) -> int:
    """Pixels from one window of `window` pixels to the next: nearly side by side, and an odd number.

    Even steps, multiples of a network's strides, stand the same way to its grid everywhere, and what it would say of
    other places is never asked.
    """
    return (window - 1) | 1


def windows(blackbox: BlackBox, x: Tensor, content: Tensor, source: Tensor, target: Tensor, window: int,
            at_once: int, where: Tensor | None = None) -> Tensor:  # fmt: skip
    """What a square window of `content` (B, 3, H, W) does to b in the images x; signed, (B, H, W).

    With f b's target minus source logit, and m the mask of a window of `window` pixels a side: the mean over the
    window's area of f(x with the content inside m) - f(x). A pixel has the mean over the windows that cover it, which
    stand `spacing` apart, those at the right and lower border as far in as needed. So it is logits a pixel, as
    `integrated` is; for a linear f it is that of content - x averaged over windows. The logit and not the probability,
    which hardly moves by any window of an image that b is sure of, though that is where most images are; it takes the
    outputs only, for a softmax's log odds are that difference.

    With `where` (B, H, W), b is asked only about the share ASKED of an image's windows in which that has the greatest
    mean; the others change nothing.
    """
    number, _, height, width = x.shape

    def masks(size: int) -> Tensor:
        """Which of the rows (or columns) each window covers: bool (windows, size)."""
        begins = torch.tensor([*range(0, size - window, spacing(window)), size - window], device=x.device)[:, None]
        place = torch.arange(size, device=x.device)
        return (begins <= place) & (place < begins + window)

    down, across = masks(height), masks(width)
    rows, cols = down.to(x), across.to(x)
    places = len(down) * len(across)
    chosen = torch.arange(places, device=x.device).expand(number, -1)
    if where is not None:
        chosen = (rows @ where.to(x) @ cols.T).flatten(1).topk(math.ceil(ASKED * places)).indices
    lead = [_logit_lead(blackbox, x[i], source[i], target[i]) for i in torch.arange(number).split(at_once)]
    asked = []
    for chunk in torch.arange(chosen.numel(), device=x.device).split(at_once):
        image, place = chunk // chosen.shape[1], chosen.flatten()[chunk]
        mask = (down[place // len(across), :, None] & across[place % len(across), None, :])[:, None]  # (n, 1, H, W)
        asked.append(_logit_lead(blackbox, torch.where(mask, content[image], x[image]), source[image], target[image]))
    change = torch.cat(asked).view_as(chosen) - torch.cat(lead)[:, None]
    effect = change.new_zeros(number, places).scatter(1, chosen, change / window**2)
    total = rows.T.to(effect) @ effect.view(number, len(down), len(across)) @ cols.to(effect)
    return total / torch.outer(rows.sum(0), cols.sum(0)).to(effect)


def _logit_lead(blackbox: BlackBox, images: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """By how much b's logit of the target (B,) exceeds that of the source (B,), for images (B, 3, H, W): (B,)."""
    logits = blackbox(images)
    return (logits.gather(1, target[:, None]) - logits.gather(1, source[:, None]))[:, 0]
