"""Explaining images one path at a time (Section III-E): path of class codes -> frames -> map and status.

Legend: B images, K path steps, D numbers in the class code, C classes, H height, W width. Pure and batched; all
tensors stay on the images' device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cae.classifiers import BlackBox
from cae.images import blur
from cae.networks import CAE

Mode = Literal["integrated", "path", "contrast", "input"]
PIXELS_AT_ONCE = 512 * 64 * 64  # decoded together; bounds memory whatever the images' size


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns for B images, one target each."""

    status: list[str]
    """`flipped`: b gives the target class at the end of the path; `unflipped`: it never does, the map is of the whole
    path; `reconstruction_flipped`: b sees another class in the reconstruction already, so the path explains little;
    `failed`: values that are not finite."""
    map: Tensor
    """(B, H, W), not negative: how much each pixel matters for the way to the target class, as the mode has it."""
    signed: Tensor
    """(B, H, W): what appears (> 0) and what vanishes (< 0) on that way, mean over channels."""
    flip_at: Tensor
    """(B,) share of the way to the counter code at the end of the path used; 1 where it never flipped."""
    p_source: Tensor
    """(B, 2) b's probability of the source class at the start (the reconstruction) and the end."""
    p_target: Tensor
    """(B, 2) b's probability of the target class at both ends."""
    reconstruction_error: Tensor
    """(B,) mean |x - reconstruction|, in units of the [-1, 1] range."""
    frames: Tensor
    """(B, K + 2, 3, H, W): K + 1 frames evenly along the whole path, the reconstruction first, then the end used."""
    frame_p: Tensor
    """(B, K + 2) b's probability of the target class for each frame."""


@torch.no_grad()
def swap(cae: CAE, x: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions of images x (B, 3, H, W), and the same images with the class codes of the donors."""
    class_code, individual_code = cae.encode(x)
    return cae.decode(class_code, individual_code), cae.decode(cae.encode(donors)[0], individual_code)


@torch.no_grad()
def explain(cae: CAE, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor, counter_code: Tensor, *,
            mode: Mode = "integrated", smooth: float = 0.025, steps: int = 8, refine: int = 4,
            margin: float = 0.0) -> Explanation:  # fmt: skip
    """Walk images x (B, 3, H, W) of b's classes `source` (B,) towards `counter_code` (B, D) of class `target` (B,).

    The path is linear in the class code with `steps` steps, the reconstruction at its start. Its end is the first
    frame whose class for b is the target, ahead of every other class by `margin` in probability, found to
    1 / (steps * 2^refine) of the way by bisection. Maps:

    - `integrated`: the path's changes made to the image itself, asking b all along; see `_integrated`;
    - `path`: sum over frames of |frame_k - frame_{k-1}| * max(0, rise of p_target), over the sum of the weights, mean
      over channels (the paper's);
    - `contrast`: mean over channels of |end - reconstruction|;
    - `input`: that of |end - x|, which mixes in the reconstruction's error (what the authors' script does).

    `smooth` blurs the map by a Gaussian whose sigma is this share of the image's side; 0, as in the paper: none.
    """
    batch, size = len(x), x.shape[-2:]
    class_code, individual_code = cae.encode(x)
    rows = torch.arange(batch, device=x.device)
    at_once = max(1, PIXELS_AT_ONCE // size.numel())

    def frames_at(t: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, T, 3, H, W) and probabilities (B, T, C) at shares t (B, T) of the way."""
        codes = torch.lerp(class_code[:, None], counter_code[:, None], t[:, :, None].to(class_code))  # (B, T, D)
        individual = individual_code[:, None].expand(-1, t.shape[1], -1, -1, -1)
        frames, probabilities = [], []
        for chunk in torch.arange(t.numel(), device=x.device).split(at_once):
            image, step = chunk // t.shape[1], chunk % t.shape[1]
            decoded = cae.decode(codes[image, step], individual[image, step])
            frames.append(decoded)
            probabilities.append(blackbox.probabilities(decoded))
        return torch.cat(frames).unflatten(0, t.shape), torch.cat(probabilities).unflatten(0, t.shape)

    def is_target(p: Tensor) -> Tensor:
        """(B, T, C) -> (B, T)."""
        others = p.scatter(2, target[:, None, None].expand(-1, p.shape[1], 1), -1.0).amax(2)
        return p_of(p, target) > others + margin

    grid = torch.linspace(0, 1, steps + 1, device=x.device).expand(batch, -1)
    frames, p = frames_at(grid)  # (B, K+1, 3, H, W), (B, K+1, C)
    flipped = is_target(p)
    flipped[:, 0] = False  # a reconstruction that flips by itself is a status, not the end of a path
    ever = flipped.any(1)
    first = torch.where(ever, flipped.float().argmax(1), steps)  # (B,) index of the path's last grid frame

    low, high = (first - 1) / steps, first / steps
    for _ in range(refine):
        middle = (low + high) / 2
        hit = is_target(frames_at(middle[:, None])[1])[:, 0] & ever
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
    flip_at = torch.where(ever, high, torch.ones_like(high))
    end, p_end = frames_at(flip_at[:, None])
    end, p_end = end[:, 0], p_end[:, 0]

    # The path used: grid frames 0 .. first-1, then the end. Steps past it weigh nothing.
    walked = torch.cat([frames[:, :1], torch.where(_before(first, steps), frames[:, 1:], end[:, None])], 1)
    p_target = p_of(p, target)  # (B, K+1)
    p_walked = torch.cat(
        [
            p_target[:, :1],
            torch.where(_before(first, steps)[..., 0, 0, 0], p_target[:, 1:], p_of(p_end[:, None], target)),
        ],
        1,
    )
    difference = walked.diff(dim=1)  # (B, K, 3, H, W)
    weight = p_walked.diff(dim=1).clamp(min=0)  # (B, K)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    if mode == "integrated":
        heat = _integrated(blackbox, x, walked, first, source, target, at_once).clamp(min=0)
    elif mode == "path":
        heat = (difference.abs().mean(2) * weight[:, :, None, None]).sum(1)
    else:
        heat = (end - (frames[:, 0] if mode == "contrast" else x)).abs().mean(1)
    if smooth:
        heat = blur(heat, smooth)
    signed = (end - frames[:, 0]).mean(1)

    start_class = p[:, 0].argmax(1)
    finite = p.isfinite().flatten(1).all(1) & heat.isfinite().flatten(1).all(1)
    status = [
        "failed" if not fine else "reconstruction_flipped" if wrong else "flipped" if flip else "unflipped"
        for fine, wrong, flip in zip(finite.tolist(), (start_class != source).tolist(), ever.tolist(), strict=True)
    ]
    assert heat.shape == (batch, *size)
    return Explanation(
        status=status, map=heat, signed=signed, flip_at=flip_at,
        p_source=torch.stack([p[rows, 0, source], p_end[rows, source]], 1),
        p_target=torch.stack([p_target[:, 0], p_end[rows, target]], 1),
        reconstruction_error=(frames[:, 0] - x).abs().mean((1, 2, 3)),
        frames=torch.cat([frames, end[:, None]], 1), frame_p=torch.cat([p_target, p_end[rows, target][:, None]], 1),
    )  # fmt: skip


def _integrated(blackbox: BlackBox, x: Tensor, walked: Tensor, first: Tensor, source: Tensor, target: Tensor,
                at_once: int) -> Tensor:  # fmt: skip
    """What each pixel's change along the path does to b when it is made to the image itself; signed, (B, H, W).

    With d_k = frame_k - frame_0 of the frames walked (B, K + 1, 3, H, W), the sum over k of (gradient of b's target
    minus source logit at x + (d_{k-1} + d_k) / 2) * (d_k - d_{k-1}), over channels too: path-integrated gradients
    (Sundararajan et al. 2017) along the counterfactual path. So the map sums to what the path's changes do to that
    logit in x, up to the quadrature. Asked at x and not at the frames, b says nothing about what the reconstruction
    added or lost. Frames from `first` (B,) on are all alike and are left out.
    """
    heat = torch.zeros_like(x[:, 0])
    used = torch.arange(walked.shape[1] - 1, device=x.device) < first[:, None]  # (B, K)
    for chunk in used.nonzero().split(at_once):
        image, step = chunk.T
        before, after = walked[image, step], walked[image, step + 1]
        point = x[image] + (before + after) / 2 - walked[image, 0]
        with torch.enable_grad():
            logits = blackbox(point.requires_grad_())
            wanted = logits.gather(1, target[image, None]) - logits.gather(1, source[image, None])
            (gradient,) = torch.autograd.grad(wanted.sum(), point)
        heat.index_add_(0, image, (gradient * (after - before)).sum(1))
    return heat


def p_of(p: Tensor, label: Tensor) -> Tensor:
    """Probabilities (B, T, C) of one class per image (B,) -> (B, T)."""
    return p.gather(2, label[:, None, None].expand(-1, p.shape[1], 1))[..., 0]


def _before(first: Tensor, steps: int) -> Tensor:
    """(B, K, 1, 1, 1): whether grid frame 1 .. K comes before the path's last one."""
    return (torch.arange(1, steps + 1, device=first.device) < first[:, None])[..., None, None, None]
