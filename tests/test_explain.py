from __future__ import annotations

import math
from itertools import pairwise
from typing import cast, get_args

import pytest
import torch
from torch import Tensor
from worlds import (
    BLOBS,
    BROKEN,
    SIDE,
    THRESHOLD,
    TOY,
    B,
    ToyCAE,
    ToyNet,
    assert_same,
    blob_means,
    crooked_world,
    crossing,
    explain,
    image,
    run,
)

import cae.explain
from cae.classifiers import BlackBox
from cae.explain import INVERSION_RATE, Mode, along, over_donors
from cae.networks import CAE


def test_the_toy_is_what_it_says() -> None:
    x = image(0.1, -0.4)
    assert torch.allclose(blob_means(x), torch.tensor([[0.1, -0.4]]), atol=1e-6)
    logits = B(x)
    assert torch.allclose(logits, torch.tensor([[0.0, -4.0, -14.0]]), atol=1e-4)


def test_path_starts_at_the_reconstruction_and_is_linear_in_the_code() -> None:
    x = image(-0.2)
    found = run(x, [0], [1], [[0.8, -0.5]], steps=5)
    assert found.frames.shape == (1, 6, 3, SIDE, SIDE) and found.frame_p.shape == (1, 6)
    class_code, individual_code = TOY.encode(x)
    assert torch.equal(found.frames[:, 0], TOY.decode(class_code, individual_code))
    share = blob_means(found.frames[0, -1:])[0, 0].item() + 0.2  # from the end of the path on, the end
    for k in range(6):
        t = min(k / 5, share)
        expected = TOY.decode(class_code + t * (torch.tensor([[0.8, -0.5]]) - class_code), individual_code)
        assert torch.allclose(found.frames[:, k], expected, atol=1e-6)
        assert found.frame_p[0, k].item() == pytest.approx(B.probabilities(expected)[0, 1].item(), abs=1e-5)
    assert 0.2 < share < 0.8 and found.flip_at.item() == pytest.approx(share, abs=1 / (5 * 2**4))


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
@pytest.mark.parametrize("refine", [0, 1, 4, 9])
@pytest.mark.parametrize("margin", [0.0, 0.4, 0.9])
def test_flip_is_found_where_it_is(steps: int, refine: int, margin: float) -> None:
    starts, ends = [-0.9, -0.3, 0.0, 0.25], [0.6, 0.9, 0.46, 0.99]
    x = torch.cat([image(start) for start in starts])
    found = run(x, [0] * 4, [1] * 4, [[end, -0.5] for end in ends], steps=steps, refine=refine, margin=margin)
    assert found.status == ["flipped"] * 4
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        truth, resolution = crossing(start, end, margin), 1 / (steps * 2**refine)
        # Without a margin the lead is linear in this world, and so the interpolation exact. In one step nobody looked.
        told = truth if steps > 1 or refine else math.nan
        assert found.flip_at[k].item() == pytest.approx(told, abs=resolution if margin else 1e-3, nan_ok=True)
        # The end lies on a grid of that resolution, after the flip, and the target is ahead there by the margin.
        place = (blob_means(found.frames[k, -1:])[0, 0].item() - start) / (end - start) / resolution
        assert place == pytest.approx(round(place), abs=1e-2) and truth / resolution - 1e-3 <= place
        assert place <= truth / resolution + 1 + 1e-3
        assert found.p_target[k, 1] - found.p_source[k, 1] > margin - 1e-6


def test_probabilities_of_source_and_target_at_both_ends() -> None:
    x = torch.cat([image(-0.1), image(0.6, 0.1)])
    found = run(x, [0, 1], [1, 2], [[0.9, -0.5], [0.2, 0.9]], steps=4)
    for k, (source, target) in enumerate([(0, 1), (1, 2)]):
        start, end = B.probabilities(found.frames[k, [0, -1]])
        assert torch.allclose(found.p_source[k], torch.stack([start[source], end[source]]), atol=1e-5)
        assert torch.allclose(found.p_target[k], torch.stack([start[target], end[target]]), atol=1e-5)
        assert end.argmax() == target and start.argmax() == source
        assert found.frame_p[k, 0] == found.p_target[k, 0] and found.frame_p[k, -1] == found.p_target[k, 1]


def test_unflipped_gives_the_map_of_the_whole_path() -> None:
    x = image(-0.5)
    found = run(x, [0], [1], [[0.2, -0.5]], steps=4)  # ends below the threshold
    assert found.status == ["unflipped"] and found.flip_at.item() == 1
    assert not torch.equal(found.frames[:, -1], found.frames[:, -2])
    assert torch.allclose(found.map[0], BLOBS[0] * 0.7 / 4, atol=1e-5)  # four equal steps, whatever their weights
    assert torch.allclose(found.signed[0], BLOBS[0] * 0.7, atol=1e-5)
    assert found.p_target[0, 1] < 0.5

    # The same codes, but a margin that the end does not reach.
    assert run(x, [0], [1], [[0.35, -0.5]]).status == ["flipped"]
    assert run(x, [0], [1], [[0.35, -0.5]], margin=0.9).status == ["unflipped"]


def test_weights_are_normalised_however_small_the_rises() -> None:
    """b's probability of the target stays below 1e-13 all the way; the map is that of four equal steps all the same."""
    found = run(image(-2.0), [0], [1], [[-1.2, -0.5]], steps=4)
    assert 0 < found.p_target[0, 1] < 1e-12
    assert torch.allclose(found.map[0], BLOBS[0] * 0.8 / 4, atol=1e-5)


def test_a_path_that_goes_the_wrong_way_has_an_empty_map() -> None:
    found = run(image(0.2), [0], [1], [[-0.8, -0.5]], steps=4)
    assert found.status == ["unflipped"] and found.p_target[0, 1] < found.p_target[0, 0]
    assert not found.map.any()
    assert (found.signed[0][BLOBS[0].bool()] < -0.9).all()
    assert (run(image(0.2), [0], [1], [[-0.8, -0.5]], mode="contrast").map[0][BLOBS[0].bool()] > 0.9).all()


def test_a_reconstruction_of_another_class_is_said_to_be_one() -> None:
    # b is said to see class 1 (0) in x, but sees class 0 (1: the target itself) in the reconstruction.
    found = run(torch.cat([image(-0.2), image(0.7)]), [1, 0], [2, 1], [[-0.3, 0.9], [0.9, -0.5]])
    assert found.status == ["reconstruction_flipped"] * 2
    assert found.flip_at[1].item() == 0
    # Even where the path then never reaches the target.
    assert run(image(-0.2), [1], [2], [[-0.2, -0.4]]).status == ["reconstruction_flipped"]


def test_values_that_are_not_finite_fail_alone() -> None:
    x = torch.cat([image(-0.2, seed=1), image(-0.2, seed=2), image(-0.2, seed=3), image(-0.2, seed=4)])
    x[1, :, -1, -1] = BROKEN  # b answers NaN
    x[2, 0, 4, 4] = torch.nan
    codes = [[0.9, -0.5], [0.9, -0.5], [0.9, -0.5], [math.nan, -0.5]]
    for mode in get_args(Mode):
        found = run(x, [0] * 4, [1] * 4, codes, mode=mode)
        assert found.status == ["flipped", "failed", "failed", "failed"]
        alone = run(x[:1], [0], [1], codes[:1], mode=mode)
        assert torch.allclose(found.map[0], alone.map[0], atol=1e-7)
        assert found.flip_at[0].item() == pytest.approx(alone.flip_at[0].item(), abs=0, nan_ok=True)


def test_frames_that_are_not_finite_fail_though_b_overlooks_it() -> None:
    class Holed(ToyCAE):
        def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
            image = super().decode(class_code, individual_code)
            image[:, :, 0, 0] = torch.nan
            return image

    class Overlooks(ToyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num())

    for mode in get_args(Mode):
        found = explain(
            cast(CAE, Holed()), BlackBox(Overlooks(), B.classes), image(-0.2), torch.tensor([0]), torch.tensor([1]),
            torch.tensor([[0.9, -0.5]]), mode=mode,
        )  # fmt: skip
        assert found.status == ["failed"] and found.frame_p.isfinite().all()


def test_mixed_batch_equals_one_by_one() -> None:
    x = torch.cat([image(s, t, seed) for seed, (s, t) in enumerate([(-0.2, -0.5), (0.7, 0), (-0.5, 0.8), (0.1, 0.1)])])
    x = torch.cat([x, image(-0.2)])
    x[4, :, -1, -1] = BROKEN
    source, target = [0, 1, 0, 0, 0], [1, 2, 1, 1, 1]
    codes = [[0.6, -0.4], [-0.5, 0.9], [0.9, -0.9], [0.1, 0.2], [0.9, -0.5]]
    together = run(x, source, target, codes, steps=5, margin=0.1)
    assert together.status == ["flipped", "flipped", "reconstruction_flipped", "unflipped", "failed"]
    for k in range(5):
        alone = run(x[k : k + 1], source[k : k + 1], target[k : k + 1], codes[k : k + 1], steps=5, margin=0.1)
        assert_same(alone, together, k)


@torch.no_grad()
def slow_explain(
    cae: CAE, blackbox: BlackBox, x: Tensor, source: int, target: int, counter: Tensor, mode: str, steps: int,
    refine: int, margin: float,
) -> tuple[str, Tensor, Tensor, float, list[float]]:  # fmt: skip
    """One image x (3, H, W): status, map, signed map, flip_at, and the rises of p_target that the map was made of."""
    code, individual = cae.encode(x[None])

    def look(t: float) -> tuple[Tensor, Tensor]:
        frame = cae.decode((1 - t) * code + t * counter[None], individual)
        return frame[0], blackbox.probabilities(frame)[0]

    def reached(p: Tensor) -> bool:
        return all(p[target] > p[c] + margin for c in range(len(p)) if c != target)

    def lead(p: Tensor) -> float:
        return math.log(p[target] / (max(p[c] for c in range(len(p)) if c != target) + margin))

    frame, p = look(0.0)
    reconstruction, wrong = frame, int(p.argmax()) != source
    frames, rises, before = [frame], [], p[target]
    flip_at, flipped = 1.0, False
    for k in range(1, steps + 1):
        t = k / steps
        frame, p = look(t)
        if reached(p):
            low, high, flipped = (k - 1) / steps, t, True
            for _ in range(refine):
                middle = (low + high) / 2
                if reached(look(middle)[1]):
                    high = middle
                else:
                    low = middle
            frame, p = look(high)
            behind = min(0.0, lead(look(low)[1]))
            searched = steps > 1 or refine > 0
            flip_at = low + (high - low) * behind / (behind - lead(p)) if searched else math.nan
        frames.append(frame)
        rises.append(float(p[target] - before))
        before = p[target]
        if flipped:
            break
    if mode == "path":
        heat, total = torch.zeros(x.shape[1:]), 0.0
        for k, rise in enumerate(rises):
            if rise > 0:
                heat += rise * (frames[k + 1] - frames[k]).abs().mean(0)
                total += rise
        heat = heat / total if total > 0 else heat
    elif mode == "contrast":
        heat = (frames[-1] - reconstruction).abs().mean(0)
    else:
        heat = (frames[-1] - x).abs().mean(0)
    status = "reconstruction_flipped" if wrong else "flipped" if flipped else "unflipped"
    return status, heat, (frames[-1] - reconstruction).mean(0), flip_at, rises


@pytest.mark.parametrize("mode", ["path", "contrast", "input"])
@pytest.mark.parametrize(("steps", "refine", "margin"), [(8, 4, 0.0), (1, 0, 0.0), (5, 2, 0.3)])
def test_batched_equals_slow_loop(mode: str, steps: int, refine: int, margin: float) -> None:
    network, blackbox, x, codes = crooked_world()
    p = blackbox.probabilities(network(x).detach())
    source, target = p.argmax(1), p.argsort(1, descending=True)[:, 1]
    source[0], target[1] = (source[0] + 1) % 4, p[1].argmin()
    source[2], target[2] = target[2], source[2]  # the reconstruction is of the target class
    found = explain(
        network, blackbox, x, source, target, codes, mode=mode, steps=steps, refine=refine, margin=margin  # type: ignore[arg-type]
    )  # fmt: skip
    falls = 0
    for k in range(len(x)):
        status, heat, signed, flip_at, rises = slow_explain(
            network, blackbox, x[k], int(source[k]), int(target[k]), codes[k], mode, steps, refine, margin
        )
        falls += status == "flipped" and any(rise < 0 for rise in rises)
        assert found.status[k] == status
        assert found.flip_at[k].item() == pytest.approx(flip_at, abs=1e-4, nan_ok=True)
        # Rises are differences of float32 probabilities: where all are tiny, the weights are rounding.
        rounding = 1e-6 / max(1e-6, sum(max(0, rise) for rise in rises)) if mode == "path" else 0
        assert torch.allclose(found.map[k], heat.to(found.map), atol=1e-5 + rounding)
        assert torch.allclose(found.signed[k], signed, atol=1e-5)
    # The test tests something: every status, and paths along which the probability fell before it rose.
    assert set(found.status) == {"flipped", "unflipped", "reconstruction_flipped"}
    assert falls > 0 or steps == 1


def test_crooked_batch_equals_one_by_one_and_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    network, blackbox, x, codes = crooked_world()
    p = blackbox.probabilities(network(x).detach())
    source, target = p.argmax(1), p.argsort(1, descending=True)[:, 1]
    together = explain(network, blackbox, x, source, target, codes, steps=3)
    for k in range(0, len(x), 5):
        one = slice(k, k + 1)
        assert_same(explain(network, blackbox, x[one], source[one], target[one], codes[one], steps=3), together, k)
    monkeypatch.setattr(cae.explain, "CPU_PIXELS_AT_ONCE", 7 * x.shape[-1] ** 2)
    chunked = explain(network, blackbox, x, source, target, codes, steps=3)
    for k in range(len(x)):
        assert_same(explain(network, blackbox, x[k : k + 1], source[k : k + 1], target[k : k + 1], codes[k : k + 1],
                            steps=3), chunked, k)  # fmt: skip


def test_path_between_equal_codes_and_empty_batch() -> None:
    x = image(-0.2)
    found = run(x, [0], [1], [[-0.2, -0.5]])
    assert found.status == ["unflipped"] and not (found.map > 1e-6).any()
    empty = explain(TOY, B, x[:0], torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0, 2))
    assert empty.status == [] and empty.map.shape == (0, SIDE, SIDE)


def test_explaining_changes_no_input_and_keeps_no_gradient() -> None:
    network, blackbox, x, codes = crooked_world()
    copies = x.clone(), codes.clone()
    source, target = torch.zeros(24).long(), torch.ones(24).long()
    found = explain(network, blackbox, x, source, target, codes, steps=2, refine=1)
    assert torch.equal(x, copies[0]) and torch.equal(codes, copies[1])
    assert not source.any() and not found.map.requires_grad and not found.frames.requires_grad


def slow_along(corners: Tensor, t: float) -> Tensor:
    """The place on a polyline with corners (N + 1, D) after the share t of its length, leg by leg."""
    legs = [float((b - a).norm()) for a, b in pairwise(corners)]
    left = t * sum(legs)
    for (a, b), leg in zip(pairwise(corners), legs, strict=True):
        if left <= leg and leg > 0:
            return a + (b - a) * left / leg
        left -= leg
    return corners[-1]


def test_along_a_polyline_against_slow() -> None:
    torch.manual_seed(0)
    corners = torch.randn(6, 5, 4, dtype=torch.float64)
    corners[1, 2] = corners[1, 1]  # a leg without length, first, in the middle and last, and nothing but such
    corners[2, 1] = corners[2, 0]
    corners[3, 4] = corners[3, 3]
    corners[4] = corners[4, :1]
    for t in (0, 0.1, 0.25, 0.5, 0.77, 1):
        found = along(corners, torch.full((6,), t))
        expected = torch.stack([slow_along(way, t) for way in corners])
        assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(along(corners, torch.zeros(6)), corners[:, 0])
    assert torch.equal(along(corners, torch.ones(6)), corners[:, -1])
    # Each corner is met exactly where the way's length says.
    lengths = corners.diff(dim=1).norm(dim=2).cumsum(1)[0]
    for k in range(4):
        assert torch.allclose(along(corners[:1], (lengths[k] / lengths[-1])[None]), corners[:1, k + 1])


def test_one_waypoint_is_the_straight_way_bit_for_bit() -> None:
    network, blackbox, x, codes = crooked_world()
    network, blackbox, x, codes = network.float(), blackbox.float(), x.float(), codes.float()
    start, t = network.encode(x)[0].detach(), torch.rand(24)
    assert torch.equal(along(torch.stack([start, codes], 1), t), torch.lerp(start, codes, t[:, None]))
    source, target = torch.zeros(24).long(), torch.ones(24).long()
    plain = explain(network, blackbox, x, source, target, codes)
    listed = explain(network, blackbox, x, source, target, codes[:, None])
    assert plain.status == listed.status and torch.equal(plain.map, listed.map)
    assert torch.equal(plain.frames, listed.frames) and torch.equal(plain.flip_at, listed.flip_at)


def test_a_bent_way_is_walked_by_its_waypoints() -> None:
    """The second blob lights up, from -0.5 to 0.1, then the first one, from -0.2 to 0.7: lengths 0.6 and 0.9."""
    x = image(-0.2)
    found = run(x, [0], [1], [[[-0.2, 0.1], [0.7, 0.1]]], steps=15, refine=9)
    assert found.status == ["flipped"]
    assert found.flip_at.item() == pytest.approx((0.6 + crossing(-0.2, 0.7) * 0.9) / 1.5, abs=1e-3)
    means = blob_means(found.frames[0])
    for k in range(11):  # until the flip, a step is 0.1 long
        expected = [-0.2, -0.5 + k / 10] if k <= 6 else [-0.2 + (k - 6) / 10, 0.1]
        assert torch.allclose(means[k], torch.tensor(expected), atol=1e-5)
    # What the path did to the second blob on its way is in the map: not so if it went straight there.
    second = BLOBS[1].bool()
    straight = run(image(-0.2, 0.1), [0], [1], [[0.7, 0.1]], mode="contrast")
    bent = run(x, [0], [1], [[[-0.2, 0.1], [0.7, 0.1]]], mode="contrast")
    assert bent.map[0][second].min() > 0.5 and straight.map[0][second].max() < 1e-5
    # Another waypoint may flip b by itself, before the counter code, which never would.
    found = run(x, [0], [1], [[[0.7, -0.5], [-0.2, -0.5]]], steps=8)
    assert found.status == ["flipped"] and found.flip_at.item() < 0.5


def test_waypoints_that_are_not_finite_fail_wherever_they_stand() -> None:
    ways = torch.tensor([[-0.2, 0.1], [0.3, 0.1], [0.7, 0.1]]).repeat(4, 1, 1)
    for k in range(3):
        ways[k, k, 0] = math.nan
    for mode in get_args(Mode):
        found = explain(TOY, B, image(-0.2).expand(4, -1, -1, -1), torch.zeros(4).long(), torch.ones(4).long(), ways,
                        mode=mode)  # fmt: skip
        assert found.status == ["failed"] * 3 + ["flipped"]


def test_codes_that_are_known_are_not_computed_again() -> None:
    class Blind(ToyCAE):
        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("encoded")

    x, source, target, counter = image(-0.2), torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.9, -0.5]])
    found = explain(cast(CAE, Blind()), B, x, source, target, counter, codes=TOY.encode(x))
    assert_same(found, explain(TOY, B, x, source, target, counter), 0, tolerance=0)


class Dim(ToyCAE):
    """Its encoder takes every image for a little darker than it is."""

    SHADE = 0.03

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        class_code, individual_code = super().encode(x)
        return class_code, individual_code - self.SHADE


def test_inversion_finds_codes_by_which_b_sees_the_image() -> None:
    dim, above = cast(CAE, Dim()), [0.315, 0.36, 0.305, 0.32, 0.31]
    x = torch.cat([image(value, seed=k) for k, value in enumerate(above)])
    source, target, codes = torch.ones(5, dtype=torch.long), torch.zeros(5, dtype=torch.long), torch.full((5, 2), -0.5)
    plain = explain(dim, B, x, source, target, codes)
    assert plain.status == ["reconstruction_flipped", "flipped", *["reconstruction_flipped"] * 3]
    found = explain(dim, B, x, source, target, codes, inversion=8)
    # All pixels brighten evenly, a step of the spread of the codes at a time; and one more step, to see it twice.
    spread = dim.encode(x)[1].flatten(1).std(1)
    missing = Dim.SHADE - (torch.tensor(above) - THRESHOLD)
    steps = (missing / (INVERSION_RATE * spread)).ceil().long() + 1
    assert steps.max() > 8 >= steps[0] > 2 and missing[1] < 0  # one is not to be found in eight
    steps[1], steps[steps > 8] = 0, 0
    assert found.inversion_steps.tolist() == steps.tolist()
    assert found.status == ["flipped" if k == 1 or n else "reconstruction_flipped" for k, n in enumerate(steps)]
    brighter = (found.frames[:, 0] - plain.frames[:, 0]).mean((1, 2, 3))
    assert torch.allclose(brighter, INVERSION_RATE * spread * steps, atol=1e-4)
    again = torch.cat([dim.decode(dim.encode(x[k : k + 1])[0], found.individual_code[k : k + 1]) for k in range(5)])
    assert torch.equal(again, found.frames[:, 0])  # the code is the one that the frames are of


def test_inversion_is_its_slow_definition() -> None:
    network, blackbox, x, codes = crooked_world()
    x = x[:10] * 0.3 + network(x[:10]).detach() * 0.7  # something it can give back
    source, found = blackbox.probabilities(x).argmax(1), 0
    with torch.no_grad():
        class_code, individual_code = network.encode(x)
    explained = explain(network, blackbox, x, source, (source + 1) % 4, codes[:10], inversion=12)
    for k in range(len(x)):
        code, momentum = individual_code[k : k + 1], torch.zeros_like(individual_code[:1])
        pace, taken, before = INVERSION_RATE * float(code.std()), 0, False
        right = blackbox.probabilities(network.decode(class_code[k : k + 1], code).detach()).argmax() == source[k]
        for step in range(1, 13 if not right else 0):
            code = code.detach().requires_grad_()
            error = (network.decode(class_code[k : k + 1], code) - x[k]).abs().mean()
            (gradient,) = torch.autograd.grad(error, code)
            momentum = 0.9 * momentum + 0.1 * gradient
            code = code.detach() - pace * momentum / momentum.square().mean().sqrt()
            p = blackbox.probabilities(network.decode(class_code[k : k + 1], code).detach())[0]
            before, right = right, bool(p.argmax() == source[k])
            if right and before and step > 1:
                taken = step
                break
        found += taken > 2
        assert explained.inversion_steps[k] == taken
        expected = code if taken else individual_code[k : k + 1]
        torch.testing.assert_close(explained.individual_code[k : k + 1], expected.detach(), rtol=1e-6, atol=1e-9)
    assert found > 0


@pytest.mark.parametrize("mode", ["integrated", "patch"])
def test_inversion_treats_every_image_alone(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cae.explain, "CPU_PIXELS_AT_ONCE", 16 * 3 * 32**2)  # three codes at once
    network, blackbox, x, codes = crooked_world()
    x = x * 0.3 + torch.stack([network(image[None])[0] for image in x]).detach() * 0.7  # something it can give back
    source = blackbox.probabilities(x).argmax(1)
    target = (source + 1) % 4
    together = explain(network, blackbox, x, source, target, codes, mode=mode, inversion=20)
    plain = explain(network, blackbox, x, source, target, codes, mode=mode)
    fitted = together.inversion_steps > 0
    assert fitted.sum() > 2 and not fitted.all()
    for k in range(len(x)):
        one = slice(k, k + 1)
        alone = explain(network, blackbox, x[one], source[one], target[one], codes[one], mode=mode, inversion=20)
        assert_same(alone, together, k)
        if fitted[k]:
            assert plain.status[k] == "reconstruction_flipped" != together.status[k]
            assert together.p_source[k, 0] > plain.p_source[k, 0]
        else:
            assert_same(alone, plain, k)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_several_donors_make_one_explanation() -> None:
    x = image(-0.2).expand(7, -1, -1, -1).clone()
    x[5:] = image(0.1, seed=1)
    codes = [[0.9, -0.5], [0.6, 0.1], [math.nan, 0], [0.2, -0.5], [0.2, 0.0], [0.9, -0.5], [0.2, -0.5]]
    each = run(x, [0] * 7, [1] * 7, codes)
    flips = ["flipped", "flipped", "failed", "unflipped", "unflipped", "flipped", "unflipped"]
    assert each.status == flips

    found = over_donors(each, [5, 2])
    assert found.status == ["flipped", "flipped"]  # 2 of 4, the failed one aside, and 1 of 2
    for name in ("map", "signed", "flip_at", "p_source", "p_target", "reconstruction_error"):
        values = getattr(each, name)
        expected = [sum(values[k] for k in group) / len(group) for group in ((0, 1, 3, 4), (5, 6))]
        assert torch.allclose(getattr(found, name), torch.stack(expected), atol=1e-6), name
    assert torch.equal(found.frames, each.frames[[0, 5]]) and torch.equal(found.frame_p, each.frame_p[[0, 5]])

    assert over_donors(each, [1, 1, 1, 3, 1]).status == ["flipped", "flipped", "failed", "unflipped", "unflipped"]
    assert over_donors(each, [2, 1, 4]).map[1].isnan().any()  # nothing but a failed one
    assert over_donors(each, [1] * 7) is each
    wrong = run(x[:2], [1, 1], [2, 2], [[-0.3, 0.9], [-0.3, 0.8]])
    assert over_donors(wrong, [2]).status == ["reconstruction_flipped"]
