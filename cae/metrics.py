"""How good a map is: perturbation curves, agreement with a known truth; grids, paired intervals.

Legend: B images, C classes, H height, W width, P patches. Images are float32 (B, 3, H, W) in [-1, 1]; maps are
(B, H, W), larger = more important; a classifier maps images to logits (B, C) and is in evaluation mode. Work is done
on the images' device. Nothing depends on which other images share the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cae.images import blur, inpaint

Classifier = Callable[[Tensor], Tensor]
Fill = Literal["uniform", "blur", "inpaint"]
PATCH = 7  # pixels a side of the patches that are destroyed, as in the paper
FILL_BLUR = 1 / 8
"""Sigma of the fill `blur`, as a share of the image's side."""
BOOTSTRAP_CELLS = 4_000_000
"""Resampled values that `paired_bootstrap` holds at once."""


def _random(purpose: str, *numbers: int) -> np.random.Generator:
    """A stream of its own for each purpose: with one stream, noise and tie-breaking of a seed would be correlated."""
    return np.random.default_rng([*purpose.encode(), *numbers])


def _check(maps: Tensor, other: Tensor | None = None) -> None:
    if maps.ndim != 3:
        raise ValueError(f"maps have shape {tuple(maps.shape)}: pass (B, H, W)")
    if other is not None and other.shape != maps.shape:
        raise ValueError(f"masks have shape {tuple(other.shape)}, maps {tuple(maps.shape)}: pass one mask per map")
    finite = maps.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"map {int(finite.logical_not().nonzero()[0])} holds values that are not finite: leave it out")


def _ranking(maps: Tensor, seed: int) -> Tensor:
    """Flat pixel positions (B, H*W), most important first; equal values in a seeded random order, one for all maps."""
    _check(maps)
    shuffle = torch.from_numpy(_random("ties", seed).permutation(maps[0].numel())).to(maps.device)
    # A stable sort of shuffled pixels leaves ties as shuffled and can't reorder unequal values, as added noise could.
    return shuffle[maps.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)]


def _square(centre: Tensor, reach: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the pixels at most `reach` rows and columns from each centre (B, 2), clipped to the image."""
    offsets = torch.arange(-reach, reach + 1, device=centre.device)
    rows = (centre[:, :1] + offsets).clamp(0, height - 1)
    cols = (centre[:, 1:] + offsets).clamp(0, width - 1)
    # Clipping repeats pixels of the border, which lie in the square anyway.
    return torch.arange(len(centre), device=centre.device)[:, None, None], rows[:, :, None], cols[:, None, :]


def rank_centres(maps: Tensor, count: int, patch: int = PATCH, *, disjoint: bool, seed: int) -> Tensor:
    """Centres (B, count, 2) of the patches to cover, as (row, col), most important first; -1 where no room is left.

    Not disjoint, the paper's form (Section IV-C): the `count` largest pixels, whose patches may overlap and stick out.
    Disjoint: greedy, and every patch has its whole area in the image: one that would stick out is moved inwards, and
    a pixel is skipped when its patch, as moved, would share a pixel with one already taken. So all methods cover the
    same area, as long as there is room, and there is for (H - patch + 1) (W - patch + 1) / (2 patch - 1)^2 patches at
    least. Ties are broken at random by `seed`, in the same way for every map. Raises ValueError on an even patch, one
    larger than the image if disjoint, and on values that are not finite.
    """
    if count < 1 or patch < 1 or patch % 2 == 0:
        raise ValueError(f"count is {count} and patch {patch}: count must be positive and patch odd, to have a centre")
    number, height, width = maps.shape
    if disjoint and patch > min(height, width):
        raise ValueError(f"patch is {patch}, images {height} x {width}: a disjoint patch must lie in the image")
    ranking = _ranking(maps, seed)
    centres = torch.full((number, count, 2), -1, device=maps.device)
    if not disjoint:
        best = ranking[:, :count]
        centres[:, : best.shape[1]] = torch.stack((best // width, best % width), dim=2)
        return centres
    # Only pixels this far from the border can be centres; each ranks as the best pixel whose patch is moved onto it.
    reach, pixels = patch // 2, height * width
    rows, cols = height - 2 * reach, width - 2 * reach
    moved_row, moved_col = ((ranking // width - reach).clamp(0, rows - 1), (ranking % width - reach).clamp(0, cols - 1))
    places = torch.arange(pixels, dtype=torch.int32, device=maps.device).expand(number, -1)
    rank = torch.full((number, rows * cols), pixels, dtype=torch.int32, device=maps.device)
    rank = rank.scatter_reduce_(1, moved_row * cols + moved_col, places, "amin").view(number, rows, cols)
    for step in range(count):
        least, best = rank.flatten(1).min(1)
        centre = torch.stack((best // cols, best % cols), dim=1)
        centres[:, step] = torch.where((least < pixels)[:, None], centre + reach, -1)
        rank[_square(centre, patch - 1, rows, cols)] = pixels  # two patches share a pixel iff centres are this near
    return centres


def tie_share(maps: Tensor) -> Tensor:
    """Share (B,) of each map's pixels whose value some other pixel has too."""
    _check(maps)
    ordered = maps.flatten(1).sort(1).values
    same = ordered[:, 1:] == ordered[:, :-1]
    edge = same.new_zeros(len(same), 1)
    return (torch.cat((same, edge), 1) | torch.cat((edge, same), 1)).float().mean(1)


def covering_step(centres: Tensor, height: int, width: int, patch: int = PATCH) -> Tensor:
    """The step (B, H, W), from 0, at which a patch of `centres` (B, P, 2) first covers each pixel; P: never."""
    number, count, _ = centres.shape
    steps = torch.full((number, height, width), count, device=centres.device)
    # Backwards, so that the first patch on a pixel has the last word. Missing centres come last in the ranking, hence
    # first here, where writing "never" changes nothing.
    for step in reversed(range(count)):
        centre = centres[:, step]
        value = torch.where(centre[:, 0] < 0, count, step)
        steps[_square(centre, patch // 2, height, width)] = value[:, None, None]
    return steps


def covered_share(steps: Tensor, count: int) -> Tensor:
    """Share (B, count) of the image covered after 1 .. count patches, from `covering_step` (B, H, W)."""
    return torch.stack([(steps <= step).flatten(1).float().mean(1) for step in range(count)], dim=1)


def disjoint_steps(size: int, share: float = 0.075, patch: int = PATCH) -> int:
    """Number of disjoint patches that cover `share` of a square image, at least 1; 100 for 256 pixels."""
    return max(1, round(share * size * size / patch**2))


def _check_curve(images: Tensor, maps: Tensor, target: Tensor, fill: Fill, draws: int, batch: int) -> None:
    number, _, height, width = images.shape
    if maps.shape != (number, height, width) or target.shape != (number,):
        raise ValueError(
            f"maps {tuple(maps.shape)} or target {tuple(target.shape)} do not fit images {tuple(images.shape)}: "
            "pass one map of the images' size and one class per image"
        )
    if fill not in get_args(Fill):
        raise ValueError(f"fill is {fill!r}: choose one of {', '.join(get_args(Fill))}")
    if draws < 1 or batch < 1:
        raise ValueError(f"draws is {draws} and batch {batch}: both must be at least 1")


def _cover(images: Tensor, covered: Tensor, fill: Fill, noise: Tensor) -> Tensor:
    """Images (n, 3, H, W) with the pixels in `covered` (n, 1, H, W) filled."""
    if fill == "inpaint":
        return inpaint(images, covered)
    return torch.where(covered, noise if fill == "uniform" else blur(images, FILL_BLUR), images)


def _whole_probability(classifier: Classifier, images: Tensor, target: Tensor, batch: int = 64) -> Tensor:
    """F(X_0) of Eq. 11: the softmax probability (B,) of `target` (B,) for the images as they are."""
    chunks = zip(images.split(batch), target.to(images.device).split(batch), strict=True)
    return torch.cat([_probability(classifier, chunk, chosen) for chunk, chosen in chunks])


def _probability(classifier: Classifier, images: Tensor, target: Tensor) -> Tensor:
    """F_c of Eq. 11: the softmax probability (B,) of each image's `target` class."""
    return classifier(images).float().softmax(1).gather(1, target[:, None])[:, 0]


def _covered_probability(
    classifier: Classifier, images: Tensor, covered_at: Tensor, target: Tensor, steps: int, fill: Fill, draws: int,
    seed: int, batch: int,
) -> Tensor:  # fmt: skip
    """F (B, steps) of the images with all pixels filled whose step `covered_at` (B, H, W) is at most 0 .. steps - 1.

    Fills: see `perturbation_curve`. At most `batch` filled images exist at once.
    """
    number, _, height, width = images.shape
    draws = draws if fill == "uniform" else 1
    total = torch.zeros(number * steps, device=images.device)
    for draw in range(draws):
        values = _random("fill", seed, draw).uniform(-1, 1, (3, height, width))
        noise = torch.from_numpy(values).to(images)
        for jobs in torch.arange(number * steps, device=images.device).split(batch) if steps else ():
            image, step = jobs // steps, jobs % steps
            covered = (covered_at[image] <= step[:, None, None])[:, None]  # (batch, 1, H, W)
            total[jobs] += _probability(classifier, _cover(images[image], covered, fill, noise), target[image])
    return total.view(number, steps) / draws


@torch.no_grad()
def perturbation_curve(
    classifier: Classifier,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int,
    patch: int = PATCH,
    disjoint: bool = True,
    fill: Fill = "uniform",
    draws: int = 5,
    seed: int = 0,
    batch: int = 64,
    whole: Tensor | None = None,
) -> Tensor:
    """Drop F(X_0) - F(X_p) of Eq. 11, (B, steps) for p = 1 .. steps patches, F the probability of `target` (B,).

    Patches stand on the map's top pixels (see `rank_centres`); when there is no room for another, the curve stays
    where it is. Not disjoint, they are clipped at the border. Fill `uniform`: i.i.d. per pixel and channel over
    [-1, 1], one noise image per draw for all images and methods, averaged over `draws`; `blur`: the image itself under
    a Gaussian of an eighth of its size; `inpaint`: smoothly from the patches' border (`images.inpaint`); neither has
    draws. At most `batch` perturbed images exist at once. `whole` is F(X_0) (B,), where it is known already. Raises
    ValueError.
    """
    _check_curve(images, maps, target, fill, draws, batch)
    target = target.to(images.device)
    centres = rank_centres(maps.to(images.device), steps, patch, disjoint=disjoint, seed=seed)
    covered_at = covering_step(centres, images.shape[2], images.shape[3], patch)
    if whole is None:
        whole = _whole_probability(classifier, images, target, batch)
    left = _covered_probability(classifier, images, covered_at, target, steps, fill, draws, seed, batch)
    return whole[:, None] - left


@dataclass(frozen=True, eq=False)
class InsertionDeletion:
    """What `insertion_deletion` returns for B images."""

    share: Tensor
    """(steps + 1,) of the pixels inserted or deleted, 0 to 1."""
    insertion: Tensor
    """(B, steps + 1) probability of the target with only this share of top pixels seen; ends at the whole image."""
    deletion: Tensor
    """(B, steps + 1) probability of the target with this share of top pixels filled; starts at the whole image."""
    insertion_area: Tensor
    """(B,) area under the insertion curve, 0 to 1: more is better."""
    deletion_area: Tensor
    """(B,) area under the deletion curve, 0 to 1: less is better."""


@torch.no_grad()
def insertion_deletion(
    classifier: Classifier,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    *,
    steps: int = 32,
    fill: Fill = "blur",
    draws: int = 5,
    seed: int = 0,
    batch: int = 64,
    whole: Tensor | None = None,
) -> InsertionDeletion:
    """Insertion and deletion curves of `target` (B,) and the areas under them. Petsiuk et al., BMVC 2018.

    Pixels in the map's order, ties as in `rank_centres`, after k = 0 .. steps equal shares of the image; areas by the
    trapezoid rule. Filled as in `perturbation_curve`, in both directions alike; the authors insert into a blurred
    image and delete to a constant. At most `batch` filled images exist at once. `whole` is the probability (B,) for the
    images themselves, where it is known already. Raises ValueError.
    """
    _check_curve(images, maps, target, fill, draws, batch)
    number, _, height, width = images.shape
    pixels = height * width
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps is {steps}: choose 1 to {pixels}, the number of pixels")
    ranking = _ranking(maps.to(images.device), seed)
    counts = torch.arange(steps + 1, device=images.device) * pixels // steps  # pixels done at each step
    place = torch.arange(pixels, device=images.device)
    step = torch.searchsorted(counts, place, right=True).expand(number, -1)  # 1 .. steps: the first that does them
    done_at = torch.empty_like(ranking).scatter_(1, ranking, step).view(number, height, width)

    target = target.to(images.device)

    def curve(covered_at: Tensor, steps: int) -> Tensor:
        return _covered_probability(classifier, images, covered_at, target, steps, fill, draws, seed, batch)

    # Both curves go between the whole image and the filled one.
    start = (_whole_probability(classifier, images, target, batch) if whole is None else whole)[:, None]
    end = curve(torch.zeros_like(done_at), 1)
    deletion = torch.cat([start, curve(done_at - 1, steps - 1), end], 1)
    insertion = torch.cat([end, curve(steps - done_at, steps - 1).flip(1), start], 1)  # backwards, the last go first
    share = counts / pixels
    return InsertionDeletion(
        share, insertion, deletion, torch.trapezoid(insertion, share), torch.trapezoid(deletion, share)
    )


def aopc(curve: Tensor) -> Tensor:
    """Area over the perturbation curve of each image (B,), from its curve (B, steps); Eq. 11 is its mean over B."""
    return curve.mean(1)


def peak_degradation(curve: Tensor) -> float:
    """Largest mean drop over all numbers of patches, from the curves (B, steps) of all images, Eq. 12."""
    return float(curve.mean(0).max())


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0, seed: int = 0) -> Tensor:
    """Whether (B,) the largest pixel lies at most `tolerance` pixels (Euclidean) from the mask (B, H, W) bool.

    Several largest pixels: one of them by `seed`. An empty mask is never hit. Zhang et al., ECCV 2016.
    """
    _check(maps, masks)
    row, col = rank_centres(maps, 1, 1, disjoint=False, seed=seed)[:, 0, :, None, None].unbind(1)  # (B, 1, 1)
    rows = torch.arange(maps.shape[1], device=maps.device)[:, None]
    cols = torch.arange(maps.shape[2], device=maps.device)
    near = (rows - row) ** 2 + (cols - col) ** 2 <= tolerance**2
    return (near & masks.bool()).flatten(1).any(1)


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """Share (B,) of the map's positive values that lies in the mask (B, H, W) bool. Wang et al., Score-CAM, 2020.

    A map with no positive value says nothing about place and counts as an even one: the mask's share of the image.
    """
    _check(maps, masks)
    energy = maps.clamp(min=0).flatten(1).double()
    energy = torch.where(energy.sum(1, keepdim=True) > 0, energy, 1.0)
    return ((energy * masks.flatten(1).bool()).sum(1) / energy.sum(1)).float()


def iou_at_equal_area(maps: Tensor, masks: Tensor, seed: int = 0) -> Tensor:
    """Intersection over union (B,) of the mask (B, H, W) bool and as many top pixels; NaN for an empty mask."""
    _check(maps, masks)
    inside = masks.bool().flatten(1).gather(1, _ranking(maps, seed))
    area = inside.sum(1)
    shared = (inside.cumsum(1).gather(1, (area - 1).clamp(min=0)[:, None])[:, 0]).double()
    return (shared / (2 * area - shared)).float()


def mean_ranks(maps: Tensor) -> Tensor:
    """Rank of every pixel of maps (B, H, W) from 1, the least, to H*W; equal values share their mean rank: (B, H*W)."""
    flat = maps.flatten(1)
    ordered = flat.sort(1).values
    return (torch.searchsorted(ordered, flat) + torch.searchsorted(ordered, flat, right=True) + 1).double() / 2


def pixel_auroc(maps: Tensor, masks: Tensor) -> Tensor:
    """Chance (B,) that a pixel in the mask (B, H, W) bool outranks one outside, ties half; NaN if either is missing."""
    _check(maps, masks)
    rank, inside = mean_ranks(maps), masks.bool().flatten(1)
    within = inside.sum(1).double()
    outside = inside.shape[1] - within
    return (((rank * inside).sum(1) - within * (within + 1) / 2) / (within * outside)).float()


def grid_energy(x: Tensor, stride: int) -> Tensor:
    """How much stronger (B,) images x (B, H, W) are at a grid's frequencies than beside them: 1 for none.

    Mean power of the spectrum, under a Hann window, at the multiples of one cycle in `stride` pixels in either
    direction (but not at the mean), over that two and three frequencies away: along the spectrum's axes, where images
    are strong, those on the axis. Strided convolutions and upsampling leave their grid there. Raises ValueError for
    sides that are no multiples of the stride, or less than eight of them.
    """
    height, width = x.shape[1:]
    if height % stride or width % stride or min(height, width) < 8 * stride:
        raise ValueError(f"images of {height} x {width} for a stride of {stride}: give a multiple of it, 8 at least")
    window = torch.outer(*(torch.hann_window(n, device=x.device, dtype=x.dtype) for n in (height, width)))
    power = torch.fft.fft2((x - x.mean((1, 2), keepdim=True)) * window).abs() ** 2  # (B, H, W)
    peaks, beside = [], []
    for i, j in itertools.product(range(stride), repeat=2):
        if i or j:
            row, col, near = i * height // stride, j * width // stride, range(-3, 4)
            ring = itertools.product(near if i else (0,), near if j else (0,))
            around = [(row + a, col + b) for a, b in ring if max(abs(a), abs(b)) > 1]
            peaks.append(power[:, row, col])
            beside.append(torch.stack([power[:, a % height, b % width] for a, b in around]).mean(0))
    return torch.stack(peaks).mean(0) / torch.stack(beside).mean(0).clamp(min=torch.finfo(x.dtype).tiny)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, draws: int = 10_000, seed: int = 0, groups: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Mean of a over images minus that of b, both (N,), and its 95% percentile interval: (difference, low, high).

    Of curves (N, P) the largest mean over the images among the P is taken in place of the mean, as in Eq. 12. Images
    are resampled, each with both of its values; with `groups` (N,), of the same patient say, whole groups, as images of
    one group say less than as many that have nothing to do with each other. Raises ValueError on other shapes, fewer
    than 2 images or groups, or values that are not finite.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim not in (1, 2) or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"a has shape {first.shape}, b {second.shape}: pass two values for each of at least 2 images")
    both = np.stack([first, second], 1).reshape(len(first), 2, -1)  # (N, 2, P)
    if not np.isfinite(both).all():
        where = int(np.flatnonzero(~np.isfinite(both).all((1, 2)))[0])
        raise ValueError(f"a or b is not finite at image {where}: leave the image out of both")
    own = np.unique(np.arange(len(both)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    number = int(own.max()) + 1
    if number < 2 or len(own) != len(both):
        raise ValueError(f"{number} groups of {len(own)} images: pass one for each of {len(both)}, and at least 2")
    sizes, sums = np.bincount(own).astype(float), np.zeros((number, 2, both.shape[2]))
    np.add.at(sums, own, both)

    def difference(total: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Of sums (..., 2 * P) over so many images (...)."""
        peak = (total / images[..., None]).reshape(*images.shape, 2, -1).max(-1)
        return peak[..., 0] - peak[..., 1]

    random, found = _random("bootstrap", seed), np.empty(draws)
    rows = max(1, BOOTSTRAP_CELLS // number)
    for start in range(0, draws, rows):
        chunk = found[start : start + rows]
        picked = random.integers(0, number, (len(chunk), number)) + number * np.arange(len(chunk))[:, None]
        times = np.bincount(picked.ravel(), minlength=picked.size).reshape(len(chunk), number).astype(float)
        chunk[:] = difference(times @ sums.reshape(number, -1), times @ sizes)
    low, high = np.percentile(found, (2.5, 97.5))
    whole = difference(sums.sum(0).reshape(-1), sizes.sum())
    return float(whole), float(low), float(high)
