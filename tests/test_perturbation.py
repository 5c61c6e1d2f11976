"""Perturbation curves, insertion and deletion: against slow definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_metrics import BLOCK, block_classifier, conv_classifier, random
from torch import Tensor

from cae import metrics
from cae.images import inpaint
from cae.peers import controls


def slow_centres(values: np.ndarray, count: int, patch: int, disjoint: bool, tie_order: list[int]) -> list[list[int]]:
    """Pixel after pixel from the most important, painting patches on a canvas; `tie_order` settles equal values.

    A disjoint patch that sticks out is pushed into the image pixel by pixel first.
    """
    height, width = values.shape
    place = {pixel: position for position, pixel in enumerate(tie_order)}
    pixels = sorted(range(height * width), key=lambda pixel: (-values.flat[pixel], place[pixel]))
    canvas, reach = np.zeros((height, width), bool), patch // 2
    taken: list[list[int]] = []
    for row, col in (divmod(pixel, width) for pixel in pixels):
        while disjoint and row - reach < 0:
            row += 1
        while disjoint and row + reach >= height:
            row -= 1
        while disjoint and col - reach < 0:
            col += 1
        while disjoint and col + reach >= width:
            col -= 1
        square = canvas[max(0, row - reach) : row + reach + 1, max(0, col - reach) : col + reach + 1]
        if len(taken) < count and not (disjoint and square.any()):
            square[:] = True
            taken.append([row, col])
    return taken + [[-1, -1]] * (count - len(taken))


def tie_order(height: int, width: int, seed: int) -> list[int]:
    """The order in which equal pixels are taken, read off a constant map."""
    order = metrics.rank_centres(torch.zeros(1, height, width), height * width, 1, disjoint=False, seed=seed)[0]
    return (order[:, 0] * width + order[:, 1]).tolist()


@pytest.mark.parametrize(("disjoint", "patch", "seed"), itertools.product((False, True), (1, 3, 7), (0, 5)))
def test_rankings_match_the_slow_definition(disjoint: bool, patch: int, seed: int) -> None:
    height, width, count = 20, 26, 600  # more than there are pixels
    smooth = np.add.outer(np.arange(height), np.arange(width)) * -1.0  # the top pixel is a corner
    signed = random(height, width, seed=1).numpy() - 0.5
    maps = np.stack([signed, signed.round(1), smooth, np.ones_like(smooth), (signed > 0.3) * 1.0]).astype(np.float32)
    got = metrics.rank_centres(torch.from_numpy(maps), count, patch, disjoint=disjoint, seed=seed)
    ties = tie_order(height, width, seed)
    assert got.dtype == torch.int64
    assert got.tolist() == [slow_centres(values, count, patch, disjoint, ties) for values in maps]
    alone = metrics.rank_centres(torch.from_numpy(maps[3:4]), count, patch, disjoint=disjoint, seed=seed)
    assert torch.equal(alone, got[3:4])


@pytest.mark.parametrize("patch", [3, 7])
def test_disjoint_patches_have_equal_area_for_every_map(patch: int) -> None:
    height, width = 32, 40
    rows, cols = torch.arange(height)[:, None], torch.arange(width)
    frame = torch.minimum(torch.minimum(rows, height - 1 - rows), torch.minimum(cols, width - 1 - cols)) == 0
    corner = -1.0 * (rows + cols)
    maps = torch.stack(
        [random(height, width), frame.float(), corner, -corner, corner.abs() % 7, torch.ones_like(corner)]
    )
    count = math.ceil((height - patch + 1) * (width - patch + 1) / (2 * patch - 1) ** 2)  # always room for these
    centres = metrics.rank_centres(maps, count, patch, disjoint=True, seed=0)
    shares = metrics.covered_share(metrics.covering_step(centres, height, width, patch), count)
    exact = torch.arange(1, count + 1) * patch**2 / (height * width)
    torch.testing.assert_close(shares, exact.expand(len(maps), -1))
    # Clipped patches, the paper's form, do differ: the corner's first one is a quarter.
    clipped = metrics.rank_centres(maps, 1, patch, disjoint=False, seed=0)
    share = metrics.covered_share(metrics.covering_step(clipped, height, width, patch), 1)
    assert share[2, 0] == pytest.approx((patch // 2 + 1) ** 2 / (height * width))


def test_ties_are_random_by_seed_and_never_reorder_values() -> None:
    orders = [tie_order(16, 16, seed) for seed in range(3)]
    assert all(sorted(order) == list(range(256)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) != orders[0]
    assert orders[0] == tie_order(16, 16, 0)
    # Neighbouring floats: any jitter added to the values would mix them up.
    values = torch.tensor(1.0)
    ladder = [values := torch.nextafter(values, torch.tensor(2.0)) for _ in range(64)]
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    got = metrics.rank_centres(torch.stack(ladder)[shuffle].view(1, 8, 8), 64, disjoint=False, seed=0)[0]
    assert (shuffle[got[:, 0] * 8 + got[:, 1]]).tolist() == list(range(63, -1, -1))
    # 0.0 and -0.0 are a tie.
    zeros = torch.zeros(1, 8, 8)
    zeros[0, :, ::2] = -0.0
    assert torch.equal(
        metrics.rank_centres(zeros, 64, disjoint=False, seed=4),
        metrics.rank_centres(torch.zeros(1, 8, 8), 64, disjoint=False, seed=4),
    )


def test_rank_centres_takes_half_precision_and_refuses_bad_input() -> None:
    maps = random(2, 12, 12).half()
    kept = metrics.rank_centres(maps, 5, 3, disjoint=True, seed=0)
    assert torch.equal(kept, metrics.rank_centres(maps.float(), 5, 3, disjoint=True, seed=0))
    with pytest.raises(ValueError, match="patch odd"):
        metrics.rank_centres(maps, 5, 4, disjoint=True, seed=0)
    with pytest.raises(ValueError, match="patch is 13, images 12 x 12"):
        metrics.rank_centres(maps, 5, 13, disjoint=True, seed=0)
    maps[1, 3, 3] = math.nan
    with pytest.raises(ValueError, match="map 1 holds values that are not finite"):
        metrics.rank_centres(maps, 5, disjoint=True, seed=0)


def test_tie_share() -> None:
    maps = torch.stack([torch.ones(4, 5), torch.arange(20.0).view(4, 5), torch.arange(20).div(3).floor().view(4, 5)])
    maps[2, 0, 0] = -7  # groups of 2, five of 3, and 2, one alone
    flat = [values.flatten().tolist() for values in maps]
    slow = [sum(values.count(value) > 1 for value in values) / 20 for values in flat]
    assert metrics.tie_share(maps).tolist() == pytest.approx(slow)
    assert slow == [1.0, 0.0, 0.95]


# --- perturbation


def slow_curve(classifier, image, centres, target, patch, fillings) -> list[float]:  # type: ignore[no-untyped-def]
    """Paint patch after patch and ask the classifier each time, for one image; Eq. 11's brackets."""

    def probability(picture: Tensor) -> float:
        with torch.no_grad():
            return float(classifier(picture[None]).softmax(1)[0, target])

    curve = np.zeros(len(centres))
    for filling in fillings:
        canvas = image.clone()
        for step, (row, col) in enumerate(centres):
            for i, j in itertools.product(range(image.shape[1]), range(image.shape[2])):
                if row >= 0 and abs(i - row) <= patch // 2 and abs(j - col) <= patch // 2:
                    canvas[:, i, j] = filling[:, i, j]
            curve[step] += (probability(image) - probability(canvas)) / len(fillings)
    return curve.tolist()


def noise(classifier, shape, draws, seed) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The noise images themselves: what the classifier sees when one patch covers the whole image."""
    seen: list[Tensor] = []

    def record(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return classifier(images)

    height, width = shape
    metrics.perturbation_curve(
        record, torch.zeros(1, 3, height, width), torch.zeros(1, height, width), torch.tensor([0]),
        steps=1, patch=2 * max(shape) + 1, draws=draws, seed=seed, disjoint=False,
    )  # fmt: skip
    return [images[0] for images in seen[1:]]


@pytest.mark.parametrize("disjoint", [True, False])
def test_curve_matches_the_slow_definition(disjoint: bool) -> None:
    classifier, size, patch, steps = conv_classifier(), (14, 18), 5, 30
    images, target = random(3, 3, *size) * 2 - 1, torch.tensor([0, 2, 1])
    maps = torch.cat([random(2, *size, seed=3), torch.ones(1, *size)])
    options = {"steps": steps, "patch": patch, "disjoint": disjoint, "seed": 3, "draws": 2}
    got = metrics.perturbation_curve(classifier, images, maps, target, **options)  # type: ignore[arg-type]
    fillings = noise(classifier, size, 2, 3)
    centres = metrics.rank_centres(maps, steps, patch, disjoint=disjoint, seed=3)
    assert (centres < 0).any() == disjoint  # the disjoint ranking runs out of room here
    for i in range(3):
        slow = slow_curve(classifier, images[i], centres[i].tolist(), target[i], patch, fillings)
        assert got[i].tolist() == pytest.approx(slow, abs=1e-6)
    # The same numbers in any batch, and for an image alone.
    for batch in (1, 7):
        again = metrics.perturbation_curve(classifier, images, maps, target, batch=batch, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(again, got, atol=1e-6, rtol=0)
    alone = metrics.perturbation_curve(classifier, images[1:2], maps[1:2], target[1:2], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(alone, got[1:2], atol=1e-6, rtol=0)


def test_noise_is_uniform_and_does_not_follow_ties_or_random_maps() -> None:
    first, second = noise(block_classifier, (64, 64), 2, 0)
    assert torch.equal(first, noise(block_classifier, (64, 64), 1, 0)[0])  # a draw does not depend on their number
    assert -1 <= first.min() < -0.99 and 0.99 < first.max() <= 1
    # 4096 uncorrelated pixels: a correlation has standard error 1/64, so 5/64 is five of them.
    pixels = torch.tensor(tie_order(64, 64, 0))
    position = torch.empty(4096).scatter_(0, pixels, torch.arange(4096.0))
    random_map = controls.random_map(torch.zeros(1, 3, 64, 64), 0).flatten()
    streams = torch.stack([*first.flatten(1), *second.flatten(1), position, random_map])
    assert (torch.corrcoef(streams) - torch.eye(8)).abs().max() < 5 / 64


def test_blur_fill_is_a_gaussian_of_an_eighth_of_the_size() -> None:
    height, width = 10, 12
    image = random(1, 3, height, width)
    slow = torch.zeros(3, height, width)
    for row, col in itertools.product(range(height), range(width)):
        rows = torch.tensor([math.exp(-0.5 * ((i - row) / (height / 8)) ** 2) for i in range(height)])
        cols = torch.tensor([math.exp(-0.5 * ((j - col) / (width / 8)) ** 2) for j in range(width)])
        weight = rows[:, None] * cols
        slow[:, row, col] = (image[0] * weight).sum((1, 2)) / weight.sum()
    centres = metrics.rank_centres(image[:, 0], 4, 3, disjoint=True, seed=0)[0].tolist()
    classifier = conv_classifier()
    target = torch.tensor([1])
    got = metrics.perturbation_curve(classifier, image, image[:, 0], target, steps=4, patch=3, fill="blur")
    assert got[0].tolist() == pytest.approx(slow_curve(classifier, image[0], centres, 1, 3, [slow]), abs=1e-6)


def test_inpaint_fill_starts_from_the_image_at_every_step() -> None:
    image = random(1, 3, 18, 20) * 2 - 1
    classifier, target, patch = conv_classifier(), torch.tensor([1]), 5
    for disjoint in (True, False):
        got = metrics.perturbation_curve(
            classifier, image, image[:, 0], target, steps=4, patch=patch, fill="inpaint", disjoint=disjoint
        )
        centres = metrics.rank_centres(image[:, 0], 4, patch, disjoint=disjoint, seed=0)[0].tolist()
        covered = torch.zeros(1, 1, 18, 20, dtype=torch.bool)
        for step, (row, col) in enumerate(centres):
            covered[..., max(0, row - 2) : row + 3, max(0, col - 2) : col + 3] = True
            with torch.no_grad():
                p, left = (classifier(x).softmax(1)[0, 1] for x in (image, inpaint(image, covered)))
            assert float(got[0, step]) == pytest.approx(float(p - left), abs=1e-6)


def test_no_more_than_a_batch_at_once_and_no_gradients() -> None:
    sizes = []

    def classifier(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return block_classifier(images)

    images = random(5, 3, 24, 24).requires_grad_()
    curve = metrics.perturbation_curve(
        classifier, images, random(5, 24, 24), torch.zeros(5, dtype=torch.long), steps=6, draws=3, batch=4
    )
    assert not curve.requires_grad
    assert max(sizes) == 4 and sum(sizes) == 5 + 5 * 6 * 3


def test_covered_share_is_the_painted_area() -> None:
    maps = torch.stack([random(20, 26, seed=1), -torch.arange(520.0).view(20, 26)])
    for disjoint in (True, False):
        centres = metrics.rank_centres(maps, 40, 5, disjoint=disjoint, seed=0)
        got = metrics.covered_share(metrics.covering_step(centres, 20, 26, 5), 40)
        for i, path in enumerate(centres.tolist()):
            canvas, slow = np.zeros((20, 26)), []
            for row, col in path:
                if row >= 0:
                    canvas[max(0, row - 2) : row + 3, max(0, col - 2) : col + 3] = 1
                slow.append(canvas.mean())
            assert got[i].tolist() == pytest.approx(slow)


def test_aopc_and_peak_degradation_are_eqs_11_and_12() -> None:
    curve = random(4, 9) - 0.3
    total = sum(float(curve[i, p]) for i in range(4) for p in range(9)) / (4 * 9)
    assert float(metrics.aopc(curve).mean()) == pytest.approx(total)
    assert metrics.aopc(curve).shape == (4,)
    peak = max(sum(float(curve[i, p]) for i in range(4)) / 4 for p in range(9))
    assert metrics.peak_degradation(curve) == pytest.approx(peak)


def test_disjoint_steps() -> None:
    assert [metrics.disjoint_steps(size) for size in (256, 224, 128, 64, 48, 4)] == [100, 77, 25, 6, 4, 1]
    assert metrics.disjoint_steps(256, share=0.3) == 401


def test_the_truth_beats_the_controls() -> None:
    images = random(16, 3, 32, 32) - 0.5
    images[:, :, *BLOCK] = 0.9
    target = torch.zeros(16, dtype=torch.long)
    truth = torch.zeros(16, 32, 32)
    truth[:, *BLOCK] = 1
    peers = {"truth": truth, "random": controls.random_map(images), "constant": torch.ones(16, 32, 32)}
    options = {"steps": metrics.disjoint_steps(32), "draws": 3}
    for fill, disjoint in itertools.product(("uniform", "blur", "inpaint"), (True, False)):
        score = {
            name: metrics.aopc(
                metrics.perturbation_curve(
                    block_classifier, images, maps, target, fill=fill, disjoint=disjoint, **options  # type: ignore[arg-type]
                )
            )
            for name, maps in peers.items()
        }  # fmt: skip
        _, low, _ = metrics.paired_bootstrap(score["truth"].numpy(), score["random"].numpy())
        assert low > 0, (fill, disjoint)
        assert score["truth"].mean() > score["constant"].mean(), (fill, disjoint)
    # Covering what does not matter changes nothing.
    away = torch.zeros(16, 32, 32)
    away[:, 20:, :] = random(16, 12, 32)
    assert metrics.perturbation_curve(block_classifier, images, away, target, steps=2).abs().max() == 0


def test_curve_refuses_what_does_not_fit() -> None:
    images, target = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="do not fit"):
        metrics.perturbation_curve(block_classifier, images, torch.zeros(2, 8, 8), target, steps=1)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.perturbation_curve(block_classifier, images, torch.zeros(2, 16, 16), target[:1], steps=1)
    with pytest.raises(ValueError, match="choose one of uniform, blur, inpaint"):
        metrics.perturbation_curve(block_classifier, images, torch.zeros(2, 16, 16), target, steps=1, fill="grey")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        metrics.perturbation_curve(block_classifier, images, torch.zeros(2, 16, 16), target, steps=1, draws=0)


# --- insertion and deletion


def slow_insertion_deletion(classifier, image, order, target, steps, filling) -> tuple[list[float], list[float]]:  # type: ignore[no-untyped-def]
    """Pixel after pixel, (row, col) in `order`, put from one image into the other; asked at each of the shares."""

    def curve(canvas: Tensor, giver: Tensor) -> list[float]:
        canvas, found, done = canvas.clone(), [], 0
        for step in range(steps + 1):
            while done < len(order) * step // steps:
                row, col = order[done]
                canvas[:, row, col] = giver[:, row, col]
                done += 1
            with torch.no_grad():
                found.append(float(classifier(canvas[None]).softmax(1)[0, target]))
        return found

    return curve(filling, image), curve(image, filling)


@pytest.mark.parametrize("steps", [1, 6, 11])
def test_insertion_and_deletion_match_the_slow_definition(steps: int) -> None:
    classifier, size = conv_classifier(), (9, 12)
    images, target = random(3, 3, *size) * 2 - 1, torch.tensor([0, 2, 1])
    maps = torch.cat([random(2, *size, seed=3), (random(1, *size, seed=4) > 0.5).float()])  # the last has many ties
    found = metrics.insertion_deletion(
        classifier, images, maps, target, steps=steps, fill="uniform", draws=1, seed=3, batch=5
    )
    (filling,) = noise(classifier, size, 1, 3)
    order = metrics.rank_centres(maps, 9 * 12, 1, disjoint=False, seed=3).tolist()
    share = [(108 * k // steps) / 108 for k in range(steps + 1)]
    assert found.share.tolist() == pytest.approx(share)
    for i in range(3):
        slow = slow_insertion_deletion(classifier, images[i], order[i], target[i], steps, filling)
        areas = [sum((c[k] + c[k + 1]) / 2 * (share[k + 1] - share[k]) for k in range(steps)) for c in slow]
        assert found.insertion[i].tolist() == pytest.approx(slow[0], abs=1e-6)
        assert found.deletion[i].tolist() == pytest.approx(slow[1], abs=1e-6)
        assert (float(found.insertion_area[i]), float(found.deletion_area[i])) == pytest.approx(areas, abs=1e-6)


@pytest.mark.parametrize("fill", ["uniform", "blur", "inpaint"])
def test_insertion_and_deletion_prefer_the_truth(fill: metrics.Fill) -> None:
    images = random(8, 3, 32, 32) - 1
    images[:, :, *BLOCK] = 0.9
    truth = torch.zeros(8, 32, 32)
    truth[:, *BLOCK] = 1
    target, sizes = torch.zeros(8, dtype=torch.long), []

    def classifier(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return block_classifier(x)

    good, bad = (
        metrics.insertion_deletion(classifier, images, maps, target, steps=8, fill=fill, draws=2, batch=10)
        for maps in (truth, controls.random_map(images))
    )
    between = 8 * (2 * 7 + 1) * (2 if fill == "uniform" else 1)  # the filled image is an end of both curves
    assert max(sizes) == 10 and sum(sizes) == 2 * (8 + between)
    whole = good.deletion[:, 0]
    known = metrics.insertion_deletion(
        block_classifier, images, truth, target, steps=8, fill=fill, draws=2, whole=whole
    )
    torch.testing.assert_close(known.insertion, good.insertion)
    torch.testing.assert_close(known.deletion, good.deletion)
    assert (good.insertion_area > bad.insertion_area).all() and (good.deletion_area < bad.deletion_area).all()
    assert torch.equal(good.insertion[:, -1], good.deletion[:, 0])
    torch.testing.assert_close(good.insertion[:, 0], good.deletion[:, -1])
    assert (good.deletion[:, 0] > 0.99).all() and (good.deletion[:, 1] < good.deletion[:, 0] - 0.2).all()


def test_insertion_and_deletion_refuse_what_does_not_fit() -> None:
    given = block_classifier, torch.zeros(2, 3, 24, 24), torch.zeros(2, 24, 24)
    with pytest.raises(ValueError, match="do not fit"):
        metrics.insertion_deletion(*given, torch.tensor([0]))
    for steps in (0, 577):
        with pytest.raises(ValueError, match="choose 1 to 576"):
            metrics.insertion_deletion(*given, torch.tensor([0, 1]), steps=steps)
