"""Explaining images one path at a time (Section III-E): path of class codes -> frames -> map and status.

Legend: B images, K path steps, N waypoints, D numbers in the class code, C classes, H height, W width. Pure and
batched; all tensors stay on the images' device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cae import attribution
from cae.classifiers import BlackBox
from cae.images import blur
from cae.networks import CAE

Mode = Literal["integrated", "evidence", "patch", "path", "contrast", "input"]
PAPER_MODES: tuple[Mode, ...] = ("path", "contrast", "input")  # of frames alone: the paper's, and what it compares with
# Steps of the path, and of the bisection after it. On a straight path the other modes need one step: `integrated` gains
# nothing from more (benchmarks/README.md), and `patch` looks at the path's two ends only.
SEARCH, SEARCH_STRAIGHT = (8, 4), (1, 0)
INVERSION_RATE = 0.05  # root mean square of a step, in standard deviations of the individual code
TINY = 1e-30
PIXELS_AT_ONCE = 512 * 64 * 64  # see `images_at_once`
CPU_PIXELS_AT_ONCE = 64 * 64 * 64


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` returns for B images, one target each."""

    status: list[str]
    """`flipped`: b gives the target class, by the margin asked for, at the end of the path; `unflipped`: it does not,
    the map is of the whole path; `reconstruction_flipped`: b sees another class in the reconstruction already, so the
    path explains little; `failed`: values that are not finite."""
    map: Tensor
    """(B, H, W), not negative: how much each pixel matters for the way to the target class, as the mode has it."""
    signed: Tensor
    """(B, H, W): what appears (> 0) and what vanishes (< 0) on that way, mean over channels."""
    flip_at: Tensor
    """(B,) share of the way to the counter code where b changes its mind, by linear interpolation of the target's lead
    in log probability between the last frame before and the end of the path used; 1 where it never flipped, not a
    number where nobody looked for it: in one step, without a search, from the path's start to its end."""
    p_source: Tensor
    """(B, 2) b's probability of the source class at the start (the reconstruction) and the end."""
    p_target: Tensor
    """(B, 2) b's probability of the target class at both ends."""
    reconstruction_error: Tensor
    """(B,) mean |x - reconstruction|, in units of the [-1, 1] range."""
    inversion_steps: Tensor
    """(B,) steps that it took to find an individual code by which b sees the image's class in the reconstruction; 0
    where the encoder's own does, or none was found."""
    individual_code: Tensor
    """(B, ...) the code that all frames were made with."""
    frames: Tensor
    """(B, K + 1, 3, H, W): evenly along the path, the reconstruction first; from the end of the path on, the end."""
    frame_p: Tensor
    """(B, K + 1) b's probability of the target class for each frame."""


def images_at_once(x: Tensor, blackbox: BlackBox) -> int:
    """How many images of the size of x (B, 3, H, W) to give the networks in one batch, by their pixels.

    So memory is bounded whatever their size. Few enough for a CPU's caches where that is what computes; a classifier
    that only answers (a server, a file with a batch of its own) is asked about more at once. One that takes images
    enlarged has that many pixels to look at.
    """
    cached = x.device.type == "cpu" and blackbox.differentiable
    pixels = max(x.shape[-2:].numel(), math.prod(blackbox.input_size or (0,)))
    return max(1, (CPU_PIXELS_AT_ONCE if cached else PIXELS_AT_ONCE) // pixels)


def along(corners: Tensor, t: Tensor) -> Tensor:
    """Class codes (B, D) at shares t (B,) of the way, by its length, along polylines with `corners` (B, N + 1, D)."""
    length = corners.diff(dim=1).norm(dim=2).cumsum(1)  # (B, N): from the start to each corner after it
    knots = F.pad(length / length[:, -1:].clamp(min=TINY), (1, 0))  # (B, N + 1), from 0 to 1: two corners, no rounding
    t = t.to(knots)
    rows, segment = torch.arange(len(t), device=t.device), (knots[:, 1:-1] <= t[:, None]).sum(1)
    low, high = knots[rows, segment], knots[rows, segment + 1]
    share = torch.where(low == high, 0, (t - low) / (high - low))
    return torch.lerp(corners[rows, segment], corners[rows, segment + 1], share[:, None])


def choose_mode(mode: Mode | Literal["auto"], differentiable: bool) -> Mode:
    """The mode that `auto` stands for, for a classifier with a gradient or without; any other as it is.

    Raises ValueError for `integrated` and `evidence` without a gradient, and for one that there is not.
    """
    if mode == "auto":
        return "integrated" if differentiable else "patch"
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r}: choose one of {', '.join(get_args(Mode))}, auto")
    if mode in ("integrated", "evidence") and not differentiable:
        raise ValueError(
            f"--mode {mode} needs the classifier's gradient, and this one gives outputs only: choose patch"
        )
    return mode


@torch.no_grad()
def explain(cae: CAE, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor, waypoints: Tensor, *,
            mode: Mode | Literal["auto"] = "auto", smooth: float = 0.05, fade: float = 0.25,
            steps: int | None = None, refine: int | None = None, margin: float = 0.0, window: float = 0.125,
            inversion: int = 0, codes: tuple[Tensor, Tensor] | None = None) -> Explanation:  # fmt: skip
    """Walk images x (B, 3, H, W) of b's classes `source` (B,) towards counter codes of class `target` (B,).

    The path goes from the image's class code by `waypoints` (B, N, D), the last of which is the counter code, or, if
    they are (B, D), straight to it. It is walked at constant speed in `steps` steps, the reconstruction at its start.
    Its end is the first frame whose class for b is the target, ahead of every other class by `margin` in probability,
    found to 1 / (steps * 2^refine) of the way by bisection; both as the mode needs where not given: 8 and 4, and for
    `integrated`, `evidence` and `patch` on a straight way 1 and 0. `codes` are what `cae.encode` gives, if it is known.
    Maps:

    - `auto`: `integrated`, or `patch` where b has no gradient;
    - `integrated`: what changes from the image to its counterfactual, weighted by b's gradient; see
      `attribution.integrated`. On the way the frames lose contrast, evenly, down to 1 - `fade` of it at the
      counterfactual: so it counts what makes the other class, and, less, what the own one needs, which the
      counterfactual may have as well;
    - `evidence`: `integrated`, and a quarter of what b loses where a window of the image is greyed (see
      `attribution.windows`; it is of the same unit, logits a pixel), asked where `integrated` says most: what b says
      when it is asked corrects what its gradient promised;
    - `patch`: what a window of the counterfactual does in the image, and back; asks b only; see `attribution.windows`;
    - `path`: sum over frames of |frame_k - frame_{k-1}| * max(0, rise of p_target), over the sum of the weights, mean
      over channels (the paper's);
    - `contrast`: mean over channels of |end - reconstruction|;
    - `input`: that of |end - x|, which mixes in the reconstruction's error (what the authors' script does).

    Where b sees another class in the reconstruction, the individual code is fitted to the image, in `inversion` steps
    at most, until it does not; see `_invert`. 0, as in the paper: never.
    `smooth` blurs the map by a Gaussian whose sigma is this share of the image's side; 0, as in the paper: none. The
    part of `evidence` that is a mean over windows gets half of it.
    `fade`, in [0, 1], is used by `integrated` and `evidence`; see `attribution.faded`.
    `window`, in (0, 1], is the side of the windows of `evidence` and `patch` as a share of the image's shorter side.
    """
    mode = choose_mode(mode, blackbox.differentiable)
    if steps is not None and steps < 1:
        raise ValueError(f"{steps} steps: a path has one at least")
    if not 0 < window <= 1:
        raise ValueError(f"window {window}: give a share of the image's side, above 0 and at most 1")
    if not 0 <= fade <= 1:
        raise ValueError(f"fade {fade}: give a share of the image's contrast, from 0 to 1")
    if not (0 <= smooth <= 0.5 and 0 <= margin <= 1):
        raise ValueError(f"smooth {smooth}, margin {margin}: give shares from 0 to 0.5, and from 0 to 1")
    if inversion < 0 or (refine or 0) < 0:
        raise ValueError(f"{inversion} steps of inversion, {refine} of refinement: give 0 for none")
    class_code, individual_code = cae.encode(x) if codes is None else codes
    corners = torch.cat([class_code[:, None], waypoints[:, None] if waypoints.ndim == 2 else waypoints], 1)
    needed = SEARCH if mode in PAPER_MODES or corners.shape[1] > 2 else SEARCH_STRAIGHT
    steps = needed[0] if steps is None else steps
    refine = needed[1] if refine is None else refine
    rows = torch.arange(len(x), device=x.device)
    at_once = images_at_once(x, blackbox)

    def look(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (n, 3, H, W) of some images (n,) at shares t (n,) of the way, and b's probabilities (n, C)."""
        code = along(corners[images], t)
        frames = [cae.decode(code[i], individual_code[images[i]]) for i in rows[: len(images)].split(at_once)]
        return torch.cat(frames), torch.cat([blackbox.probabilities(frame) for frame in frames])

    start, p_start = look(rows, torch.zeros(len(x), device=x.device))
    inversion_steps, individual_code = torch.zeros_like(source), individual_code.clone()
    astray = rows[p_start.argmax(1) != source]
    if inversion and len(astray):
        of = x[astray], source[astray], class_code[astray], individual_code[astray]
        for k, step, code, frame, p in _invert(cae, blackbox, *of, steps=inversion):
            i = astray[k]
            inversion_steps[i], individual_code[i], start[i], p_start[i] = step, code, frame, p
    path = _walk(look, start, p_start, target, steps, refine, margin)
    pixels = max(1, round(window * min(x.shape[-2:])))
    heat = _map(mode, blackbox, x, path, source, target, pixels, smooth, fade, at_once)

    reconstruction, p_target = path.frames[:, 0], path.p_of(target)
    signed = (path.frames[:, -1] - reconstruction).mean(1)
    finite = torch.stack([part.isfinite().flatten(1).all(1) for part in (path.p, heat, signed)]).all(0)
    wrong = path.p[:, 0].argmax(1) != source
    status = [
        "failed" if not fine else "reconstruction_flipped" if lost else "flipped" if flip else "unflipped"
        for fine, lost, flip in zip(finite.tolist(), wrong.tolist(), path.flipped.tolist(), strict=True)
    ]
    assert heat.shape == (len(x), *x.shape[-2:])
    return Explanation(
        status=status, map=heat, signed=signed, flip_at=path.flip_at,
        p_source=path.p_of(source)[:, [0, -1]], p_target=p_target[:, [0, -1]],
        reconstruction_error=(reconstruction - x).abs().mean((1, 2, 3)), inversion_steps=inversion_steps,
        individual_code=individual_code, frames=path.frames, frame_p=p_target,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Path:
    """The paths of B images, walked."""

    frames: Tensor
    """(B, K + 1, 3, H, W): the steps before a path's end, then the end for the rest, which weighs nothing."""
    p: Tensor
    """(B, K + 1, C) b's probabilities of the frames."""
    last: Tensor
    """(B,) the step, 1 to K, from which on all frames are the end."""
    flipped: Tensor
    """(B,) bool: the target leads at the end, by the margin."""
    flip_at: Tensor
    """(B,) as in `Explanation`."""

    def p_of(self, label: Tensor) -> Tensor:
        """(B, K + 1) b's probability of one class each, `label` (B,)."""
        return self.p.gather(2, label[:, None, None].expand(-1, self.p.shape[1], 1))[..., 0]


def _walk(look: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], start: Tensor, p_start: Tensor, target: Tensor,
          steps: int, refine: int, margin: float) -> _Path:  # fmt: skip
    """Walk from the frames `start` (B, 3, H, W), of which b says `p_start` (B, C), to where the target (B,) leads.

    `look` gives the frames of some images at shares of the way, and what b says of them. Step by step, only images
    that have not flipped yet; then bisection. A reconstruction that flips by itself is a status, not an end.
    """
    batch, rows = len(start), torch.arange(len(start), device=start.device)

    def lead(images: Tensor, p: Tensor) -> Tensor:
        """By how much, in log probability, p (n, C) put some images (n,) in their target class; 0 at the margin."""
        label = target[images, None]
        best = p.scatter(1, label, 0.0).amax(1) + margin
        return (p.gather(1, label)[:, 0] / best).clamp(TINY, 1 / TINY).log()

    frames, probabilities = [start], [p_start]
    last = torch.full((batch,), steps, device=start.device)
    ever = torch.zeros(batch, dtype=torch.bool, device=start.device)
    for k in range(1, steps + 1):
        frames.append(frames[-1].clone())
        probabilities.append(probabilities[-1].clone())
        walking = rows[~ever]
        if len(walking):
            frame, p = look(walking, torch.full((len(walking),), k / steps, device=start.device))
            frames[k][walking], probabilities[k][walking] = frame, p
            arrived = walking[lead(walking, p) > 0]
            last[arrived], ever[arrived] = k, True

    low, high = (last - 1) / steps, last / steps
    end, p_end, flipped = frames[-1].clone(), probabilities[-1].clone(), rows[ever]
    p_before = torch.stack(probabilities, 1)[rows, last - 1]
    for _ in range(refine if len(flipped) else 0):
        middle = (low + high) / 2
        frame, p = look(flipped, middle[flipped])
        hit = lead(flipped, p) > 0
        nearer, farther = flipped[hit], flipped[~hit]
        end[nearer], p_end[nearer], high[nearer] = frame[hit], p[hit], middle[nearer]
        p_before[farther], low[farther] = p[~hit], middle[farther]
    behind, ahead = lead(rows, p_before).clamp(max=0), lead(rows, p_end)  # a start that flips by itself is no lead
    flip_at = torch.where(ever, low + (high - low) * behind / (behind - ahead), torch.ones_like(high))
    if steps == 1 and not refine:
        flip_at[ever] = torch.nan

    ended = rows.new_tensor(range(steps + 1)) >= last[:, None]  # (B, K + 1)
    walked = torch.where(ended[:, :, None, None, None], end[:, None], torch.stack(frames, 1))
    return _Path(walked, torch.where(ended[:, :, None], p_end[:, None], torch.stack(probabilities, 1)), last, ever,
                 flip_at)  # fmt: skip


def _map(mode: Mode, blackbox: BlackBox, x: Tensor, path: _Path, source: Tensor, target: Tensor, window: int,
         smooth: float, fade: float, at_once: int) -> Tensor:  # fmt: skip
    """The map (B, H, W) of images x (B, 3, H, W), by one of `explain`'s modes; `window` in pixels."""
    start, end = path.frames[:, 0], path.frames[:, -1]
    windows = partial(attribution.windows, blackbox, source=source, target=target, window=window, at_once=at_once)
    if mode in ("integrated", "evidence"):
        way = attribution.faded(torch.cat([x[:, None], path.frames[:, 1:]], 1), path.last, fade)
        heat = attribution.integrated(blackbox, way, path.last, source, target, at_once)
    elif mode == "patch":
        # What the counterfactual's windows do in the image, and what the image's undo in the counterfactual.
        heat = (windows(x, end) - windows(end, x)) / 2
    elif mode == "path":
        weight = path.p_of(target).diff(dim=1).clamp(min=0)  # (B, K)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        heat = (path.frames.diff(dim=1).abs().mean(2) * weight[:, :, None, None]).sum(1)
    else:
        heat = (end - (start if mode == "contrast" else x)).abs().mean(1)
    if smooth:
        heat = blur(heat, smooth)
    if mode == "evidence":
        asked = windows(x, torch.zeros_like(x), where=heat)
        heat = heat + (blur(asked, smooth / 2) if smooth else asked) / 4
    # What speaks against the target is dropped only now: dropped before, noise of either sign would blur into a map of
    # where the images differ, whatever the classifier.
    return heat.clamp(min=0)


def over_donors(found: Explanation, counts: list[int]) -> Explanation:
    """Explanations of B images towards several counter codes each, `counts` (B,) of them in turn, as one an image.

    Maps and numbers are means over an image's counter codes, those that failed left out unless all did (`flip_at` is 1
    where one never flipped, and not a number where nobody looked). The status is `flipped` if at least half of them
    flipped, else that of the others. Frames are those of the first one: a mean of images shows none of them.
    """
    if all(count == 1 for count in counts):
        return found
    used, begin = [], 0
    for count in counts:
        mine = list(range(begin, begin + count))
        used.append([k for k in mine if found.status[k] != "failed"] or mine)
        begin += count

    def mean(values: Tensor) -> Tensor:
        return torch.stack([values[mine].mean(0) for mine in used])

    status = []
    for mine in used:
        others = [found.status[k] for k in mine if found.status[k] != "flipped"]
        status.append("flipped" if 2 * len(others) <= len(mine) else others[0])
    first = [mine[0] for mine in used]
    return Explanation(
        status=status, map=mean(found.map), signed=mean(found.signed), flip_at=mean(found.flip_at),
        p_source=mean(found.p_source), p_target=mean(found.p_target),
        reconstruction_error=mean(found.reconstruction_error), inversion_steps=found.inversion_steps[first],
        individual_code=found.individual_code[first], frames=found.frames[first], frame_p=found.frame_p[first],
    )  # fmt: skip


def _invert(cae: CAE, blackbox: BlackBox, x: Tensor, source: Tensor, class_code: Tensor, individual_code: Tensor,
            steps: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Each image x (B, 3, H, W) of which b sees its class `source` (B,) once its individual code is fitted to it: its
    index, the steps that took, the code, the reconstruction, and b's probabilities of that.

    Encoders give codes for the typical image; where b wavers, what they miss decides. So from there on the code
    descends the error of the reconstruction (Eq. 1) alone, until b gives the reconstruction its class twice in a row:
    inversion by encoder and optimisation (Zhu et al. 2016). b's gradient has no part in it, or the code would learn to
    deceive b. Steps with momentum, of equal length in standard deviations of the image's code; no image depends on the
    others.
    """
    # Few at once: a gradient keeps all that the decoder computed, and those found early wait for the others.
    for rows in torch.arange(len(x), device=x.device).split(max(1, images_at_once(x, blackbox) // 16)):
        begin, about = individual_code[rows], class_code[rows]
        pace = INVERSION_RATE * begin.flatten(1).std(1)[:, None, None, None]
        way = torch.zeros_like(begin)
        code, before, found = begin, torch.zeros_like(rows, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                code = code.detach().requires_grad_()
                error = (cae.decode(about, code) - x[rows]).abs().mean((1, 2, 3)).sum()
                (gradient,) = torch.autograd.grad(error, code)
            # Not Adam: it makes as much of gradients that are mere rounding, so batches of other sizes go other ways.
            way = torch.lerp(gradient, way, 0.9)
            code = code.detach() - pace * way / way.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=TINY)
            frame = cae.decode(about, code)
            p = blackbox.probabilities(frame)
            right = p.argmax(1) == source[rows]
            new = right & before & ~found
            for k in new.nonzero()[:, 0].tolist():
                yield int(rows[k]), step, code[k], frame[k], p[k]
            found, before = found | new, right
            if found.all():
                break
