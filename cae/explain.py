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
# Steps of the path, and of the bisection after it. `integrated` gains nothing from more (benchmarks/README.md).
SEARCH: dict[Mode, tuple[int, int]] = {"integrated": (1, 0), "path": (8, 4), "contrast": (8, 4), "input": (8, 4)}
TINY = 1e-30
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
    """(B,) share of the way to the counter code where b changes its mind, by linear interpolation of the target's lead
    in log probability between the last frame before and the end of the path used; 1 where it never flipped."""
    p_source: Tensor
    """(B, 2) b's probability of the source class at the start (the reconstruction) and the end."""
    p_target: Tensor
    """(B, 2) b's probability of the target class at both ends."""
    reconstruction_error: Tensor
    """(B,) mean |x - reconstruction|, in units of the [-1, 1] range."""
    frames: Tensor
    """(B, K + 1, 3, H, W): evenly along the path, the reconstruction first; from the end of the path on, the end."""
    frame_p: Tensor
    """(B, K + 1) b's probability of the target class for each frame."""


@torch.no_grad()
def swap(cae: CAE, x: Tensor, donors: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions of images x (B, 3, H, W), and the same images with the class codes of the donors."""
    class_code, individual_code = cae.encode(x)
    return cae.decode(class_code, individual_code), cae.decode(cae.encode(donors)[0], individual_code)


@torch.no_grad()
def explain(cae: CAE, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor, counter_code: Tensor, *,
            mode: Mode = "integrated", smooth: float = 0.025, steps: int | None = None, refine: int | None = None,
            margin: float = 0.0) -> Explanation:  # fmt: skip
    """Walk images x (B, 3, H, W) of b's classes `source` (B,) towards `counter_code` (B, D) of class `target` (B,).

    The path is linear in the class code with `steps` steps, the reconstruction at its start. Its end is the first
    frame whose class for b is the target, ahead of every other class by `margin` in probability, found to
    1 / (steps * 2^refine) of the way by bisection; both as the mode needs (`SEARCH`) where not given. Maps:

    - `integrated`: the path's changes made to the image itself, weighted by b's gradient; see `_integrated`;
    - `path`: sum over frames of |frame_k - frame_{k-1}| * max(0, rise of p_target), over the sum of the weights, mean
      over channels (the paper's);
    - `contrast`: mean over channels of |end - reconstruction|;
    - `input`: that of |end - x|, which mixes in the reconstruction's error (what the authors' script does).

    `smooth` blurs the map by a Gaussian whose sigma is this share of the image's side; 0, as in the paper: none.
    """
    steps = SEARCH[mode][0] if steps is None else steps
    refine = SEARCH[mode][1] if refine is None else refine
    batch, size = len(x), x.shape[-2:]
    class_code, individual_code = cae.encode(x)
    rows = torch.arange(batch, device=x.device)
    at_once = max(1, PIXELS_AT_ONCE // size.numel())

    def look(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (n, 3, H, W) of some images (n,) at shares t (n,) of the way, and b's probabilities (n, C)."""
        codes = torch.lerp(class_code[images], counter_code[images], t[:, None].to(class_code))
        frames = [cae.decode(codes[i], individual_code[images[i]]) for i in rows[: len(images)].split(at_once)]
        return torch.cat(frames), torch.cat([blackbox.probabilities(frame) for frame in frames])

    def lead(images: Tensor, p: Tensor) -> Tensor:
        """By how much, in log probability, p (n, C) put some images (n,) in their target class; 0 at the margin."""
        label = target[images, None]
        best = p.scatter(1, label, 0.0).amax(1) + margin
        return (p.gather(1, label)[:, 0] / best).clamp(TINY, 1 / TINY).log()

    # Step by step, only those that have not flipped yet. A reconstruction that flips by itself is a status, not an end.
    frame, p = look(rows, torch.zeros(batch, device=x.device))
    frames, probabilities = [frame], [p]
    first = torch.full((batch,), steps, device=x.device)  # the path's last step
    ever = torch.zeros(batch, dtype=torch.bool, device=x.device)
    for k in range(1, steps + 1):
        frames.append(frames[-1].clone())
        probabilities.append(probabilities[-1].clone())
        walking = rows[~ever]
        if len(walking):
            frame, p = look(walking, torch.full((len(walking),), k / steps, device=x.device))
            frames[k][walking], probabilities[k][walking] = frame, p
            arrived = walking[lead(walking, p) > 0]
            first[arrived], ever[arrived] = k, True

    low, high = (first - 1) / steps, first / steps
    end, p_end, flipped = frames[-1].clone(), probabilities[-1].clone(), rows[ever]
    p_before = torch.stack(probabilities, 1)[rows, first - 1]
    for _ in range(refine if len(flipped) else 0):
        middle = (low + high) / 2
        frame, p = look(flipped, middle[flipped])
        hit = lead(flipped, p) > 0
        nearer, farther = flipped[hit], flipped[~hit]
        end[nearer], p_end[nearer], high[nearer] = frame[hit], p[hit], middle[nearer]
        p_before[farther], low[farther] = p[~hit], middle[farther]
    behind, ahead = lead(rows, p_before).clamp(max=0), lead(rows, p_end)  # a start that flips by itself is no lead
    flip_at = torch.where(ever, low + (high - low) * behind / (behind - ahead), torch.ones_like(high))

    # The path used: the steps before the end, then the end for the rest, which weighs nothing.
    ended = rows.new_tensor(range(steps + 1)) >= first[:, None]  # (B, K + 1)
    walked = torch.where(ended[:, :, None, None, None], end[:, None], torch.stack(frames, 1))  # (B, K + 1, 3, H, W)
    p_walked = torch.where(ended[:, :, None], p_end[:, None], torch.stack(probabilities, 1))  # (B, K + 1, C)
    p_target = p_walked.gather(2, target[:, None, None].expand(-1, steps + 1, 1))[..., 0]  # (B, K + 1)
    difference = walked.diff(dim=1)  # (B, K, 3, H, W)
    weight = p_target.diff(dim=1).clamp(min=0)  # (B, K)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    if mode == "integrated":
        heat = _integrated(blackbox, x, walked, first, source, target, at_once).clamp(min=0)
    elif mode == "path":
        heat = (difference.abs().mean(2) * weight[:, :, None, None]).sum(1)
    else:
        heat = (end - (walked[:, 0] if mode == "contrast" else x)).abs().mean(1)
    if smooth:
        heat = blur(heat, smooth)

    finite = p_walked.isfinite().flatten(1).all(1) & heat.isfinite().flatten(1).all(1)
    wrong = p_walked[:, 0].argmax(1) != source
    status = [
        "failed" if not fine else "reconstruction_flipped" if astray else "flipped" if flip else "unflipped"
        for fine, astray, flip in zip(finite.tolist(), wrong.tolist(), ever.tolist(), strict=True)
    ]
    assert heat.shape == (batch, *size)
    return Explanation(
        status=status, map=heat, signed=(end - walked[:, 0]).mean(1), flip_at=flip_at,
        p_source=torch.stack([p_walked[rows, 0, source], p_end[rows, source]], 1),
        p_target=torch.stack([p_target[:, 0], p_target[:, -1]], 1),
        reconstruction_error=(walked[:, 0] - x).abs().mean((1, 2, 3)), frames=walked, frame_p=p_target,
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
