from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import cae.explain
from cae.classifiers import BlackBox
from cae.config import ModelConfig
from cae.explain import Explanation, swap
from cae.networks import CAE

torch.set_num_threads(1)
# The paper's map unless a test says otherwise.
explain = partial(cae.explain.explain, mode="path", smooth=0.0)

# A world whose truth is known. An image is a texture with two blobs, and its class code says how bright they are; b
# looks at nothing but the blobs' means. Class 0: neither is bright, 1: the first is, 2: the second is.
SIDE = 16
BLOBS = torch.zeros(2, SIDE, SIDE)
BLOBS[0, 2:7, 3:8] = 1
BLOBS[1, 10:14, 9:15] = 1
GAIN, THRESHOLD = 20.0, 0.3
FLAW = 0.03  # what the toy decoder adds to one corner, far from the blobs: the reconstruction's only error
BROKEN = 0.875  # b gives NaN for images whose last pixel has this value


def blob_means(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 2)."""
    return (x[:, None] * BLOBS[:, None]).sum((2, 3, 4)) / (3 * BLOBS.sum((1, 2)))


def paint(brightness: Tensor) -> Tensor:
    """(B, 2) -> (B, 3, H, W)."""
    return torch.einsum("bk,khw->bhw", brightness, BLOBS)[:, None].expand(-1, 3, -1, -1)


class ToyCAE(nn.Module):
    """Encodes and decodes exactly, up to the flaw."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = blob_means(x)
        return means, x - paint(means)

    def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        image = individual_code + paint(class_code)
        image[:, :, 0, -1] += FLAW
        return image


class ToyNet(nn.Module):
    """Logits: 0, and for each blob how far it is above the threshold."""

    def forward(self, x: Tensor) -> Tensor:
        means = blob_means(x)
        logits = torch.cat([torch.zeros(len(x), 1), GAIN * (means - THRESHOLD)], 1)
        return torch.where(x[:, :1, -1, -1] == BROKEN, torch.nan, logits)


TOY = cast(CAE, ToyCAE())
B = BlackBox(ToyNet(), ("neither", "first", "second"))


def image(first: float, second: float = -0.5, seed: int = 0) -> Tensor:
    """One image (1, 3, H, W) whose blobs have these means."""
    texture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
    return texture - paint(blob_means(texture)) + paint(torch.tensor([[first, second]]))


def run(x: Tensor, source: list[int], target: list[int], codes: list[list[float]], **options: object) -> Explanation:
    return explain(
        TOY, B, x, torch.tensor(source), torch.tensor(target), torch.tensor(codes), **options  # type: ignore[arg-type]
    )  # fmt: skip


def crossing(start: float, end: float, margin: float = 0.0) -> float:
    """Share of the way at which class 1 leads class 0 by `margin`: sigmoid(z) - sigmoid(-z) = tanh(z / 2)."""
    z = 2 * math.atanh(margin)
    return (THRESHOLD + z / GAIN - start) / (end - start)


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
        # Without a margin the lead is linear in this world, and so the interpolation exact.
        assert found.flip_at[k].item() == pytest.approx(truth, abs=resolution if margin else 1e-3)
        # The end lies on a grid of that resolution, after the flip, and the target is ahead there by the margin.
        place = (blob_means(found.frames[k, -1:])[0, 0].item() - start) / (end - start) / resolution
        assert place == pytest.approx(round(place), abs=1e-2) and truth / resolution - 1e-3 <= place
        assert place <= truth / resolution + 1 + 1e-3
        assert found.p_target[k, 1] - found.p_source[k, 1] > margin - 1e-6


def test_map_lies_on_the_blob_exactly() -> None:
    start, end = -0.4, 0.7
    x = image(start)
    on = BLOBS[0].bool()
    for mode in ("path", "contrast", "input"):
        found = run(x, [0], [1], [[end, -0.5]], mode=mode, steps=6)
        share = (blob_means(found.frames[0, -1:])[0, 0].item() - start) / (end - start)
        assert found.flip_at.item() <= share <= found.flip_at.item() + 1 / (6 * 2**4)
        heat = found.map[0]
        assert heat.shape == (SIDE, SIDE)
        clean = on.clone()
        clean[0, -1] = True  # where the toy's reconstruction is wrong
        assert (heat[~clean] < 1e-6).all() and (heat[on] > 0.01).all()
        flaw = FLAW if mode == "input" else 0
        assert heat[0, -1].item() == pytest.approx(flaw, abs=1e-6)
        if mode != "path":
            assert torch.allclose(heat[on], torch.tensor(share * (end - start)), atol=1e-5)
        assert torch.allclose(found.signed[0], BLOBS[0] * share * (end - start), atol=1e-5)
        assert found.reconstruction_error.item() == pytest.approx(FLAW / SIDE**2, rel=1e-3)

    # Frames differ by one step's worth of brightness, the last by what bisection left of it.
    found = run(x, [0], [1], [[end, -0.5]], steps=6)
    share = (blob_means(found.frames[0, -1:])[0, 0].item() - start) / (end - start)
    shares = [k / 6 for k in range(7) if k / 6 < share - 1e-6] + [share]
    p = [1 / (1 + math.exp(-GAIN * (start + t * (end - start) - THRESHOLD))) for t in shares]
    rises = [after - before for before, after in pairwise(p)]
    changes = [(after - before) * (end - start) for before, after in pairwise(shares)]
    expected = sum(rise * change for rise, change in zip(rises, changes, strict=True)) / sum(rises)
    assert torch.allclose(found.map[0][on], torch.tensor(expected), atol=1e-5)


def test_signed_map_tells_what_appears_from_what_vanishes() -> None:
    x = torch.cat([image(-0.2), image(0.8), image(0.8, -0.4)])
    found = run(x, [0, 1, 1], [1, 0, 2], [[0.9, -0.5], [-0.3, -0.5], [-0.3, 0.9]], steps=5)
    assert found.status == ["flipped"] * 3
    first, second = BLOBS.bool()
    assert (found.signed[0][first] > 0.1).all() and found.signed[0][~first].abs().max() < 1e-6
    assert (found.signed[1][first] < -0.1).all() and found.signed[1][~first].abs().max() < 1e-6
    assert (found.signed[2][first] < -0.1).all() and (found.signed[2][second] > 0.1).all()
    assert (found.map >= 0).all()
    both = first | second
    assert (found.map[2][both] > 0.01).all() and found.map[2][~both].abs().max() < 1e-6


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
    for mode in ("path", "contrast", "input"):
        found = run(x, [0] * 4, [1] * 4, codes, mode=mode)
        assert found.status == ["flipped", "failed", "failed", "failed"]
        alone = run(x[:1], [0], [1], codes[:1], mode=mode)
        assert torch.allclose(found.map[0], alone.map[0], atol=1e-7) and found.flip_at[0] == alone.flip_at[0]


def test_frames_that_are_not_finite_fail_though_b_overlooks_it() -> None:
    class Holed(ToyCAE):
        def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
            image = super().decode(class_code, individual_code)
            image[:, :, 0, 0] = torch.nan
            return image

    class Overlooks(ToyNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num())

    for mode in ("path", "contrast", "input"):
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


def assert_same(alone: Explanation, together: Explanation, k: int, tolerance: float = 1e-5) -> None:
    """Image 0 of `alone` is image k of `together`."""
    assert alone.status[0] == together.status[k]
    for name in ("map", "signed", "flip_at", "p_source", "p_target", "reconstruction_error", "frames", "frame_p"):
        one, other = getattr(alone, name)[0], getattr(together, name)[k]
        assert torch.allclose(one, other, atol=tolerance, equal_nan=True), name


# The same definitions, slowly, on a network and a classifier with nothing linear about them.


def crooked_world() -> tuple[CAE, BlackBox, Tensor, Tensor]:
    """A random small CAE, a random classifier of four classes whose answer changes often, images and counter codes."""
    torch.manual_seed(3)
    config = ModelConfig(
        image_size=32, stem="unshuffle", width=8, blocks=1, mlp_width=16, up_kernel=3, out_kernel=3, class_dim=4
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 16), nn.Tanh())
    head = nn.Linear(16, 4)
    nn.init.normal_(net[3].weight, 0, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(head.weight, 0, 1.5)
    images, codes = torch.rand(24, 3, 32, 32) * 2 - 1, torch.randn(24, 4) * 3
    # In double precision: the crooked classifier makes much of rounding, which batches of other sizes do otherwise.
    network, blackbox = CAE(config).eval().double(), BlackBox(nn.Sequential(net, head), tuple("abcd")).eval().double()
    return network, blackbox, images.double(), codes.double()


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
            flip_at = low + (high - low) * behind / (behind - lead(p))
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
        assert found.flip_at[k].item() == pytest.approx(flip_at, abs=1e-4)
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
    monkeypatch.setattr(cae.explain, "PIXELS_AT_ONCE", 7 * x.shape[-1] ** 2)
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


def test_swap() -> None:
    x, donors = (
        torch.cat([image(-0.2, -0.5, 1), image(0.6, 0.1, 2)]),
        torch.cat([image(0.9, 0, 3), image(-0.7, 0.7, 4)]),
    )
    reconstructed, swapped = swap(TOY, x, donors)
    assert torch.allclose(blob_means(reconstructed), blob_means(x), atol=1e-6)
    assert torch.allclose(blob_means(swapped), blob_means(donors), atol=1e-6)
    assert torch.allclose(swapped - paint(blob_means(donors)), reconstructed - paint(blob_means(x)), atol=1e-6)
    assert B.probabilities(swapped).argmax(1).tolist() == [1, 2]


def test_steps_are_what_the_mode_needs_unless_given() -> None:
    x = image(-0.2)
    for mode, steps in (("integrated", 1), ("path", 8), ("contrast", 8), ("input", 8)):
        assert run(x, [0], [1], [[0.8, -0.5]], mode=mode).frames.shape[1] == steps + 1
        assert run(x, [0], [1], [[0.8, -0.5]], mode=mode, steps=3, refine=0).frames.shape[1] == 4
    at = run(x, [0], [1], [[0.8, -0.5]], mode="integrated").flip_at.item()
    assert at == pytest.approx(crossing(-0.2, 0.8, 0.0), abs=1e-3)


def test_integrated_map_is_the_closed_form_where_b_is_linear() -> None:
    """Each pixel of the first blob gets its share of the logit's rise; nothing else moves b."""
    x = torch.cat([image(-0.2), image(0.1, 0.2, seed=1)])
    found = run(x, [0, 0], [1, 1], [[0.8, -0.5], [0.6, 0.2]], mode="integrated", steps=4)
    rise = blob_means(found.frames[:, -1])[:, 0] - blob_means(found.frames[:, 0])[:, 0]
    assert torch.allclose(found.map, (GAIN * rise / BLOBS[0].sum())[:, None, None] * BLOBS[0], atol=1e-4)


def test_integrated_map_shows_only_what_speaks_for_the_target() -> None:
    # On the way from class 2 to class 1 both blobs speak for the target; towards class 0 only the second one's fall.
    x = image(-0.2, 0.6)
    both = run(x, [2], [1], [[0.9, -0.4]], mode="integrated").map[0]
    assert (both[BLOBS[0] > 0] > 0.1).all() and (both[BLOBS[1] > 0] > 0.1).all()
    one = run(x, [2], [0], [[-0.9, -0.4]], mode="integrated").map[0]
    assert one[BLOBS[0] > 0].abs().max() < 1e-4 and (one[BLOBS[1] > 0] > 0.1).all()
    assert both[(BLOBS.sum(0) == 0)].abs().max() == 0


def test_integrated_attributions_sum_to_the_change_of_the_logit_in_the_image_itself() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, 2), nn.Tanh(), nn.Conv2d(8, 3, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )
    b = BlackBox(net.double(), ("a", "b", "c"), 0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 2 - 1
    there, aside = torch.randn(2, 4, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 33, dtype=torch.float64)[:, None, None, None]
    walked = there * t + aside * torch.sin(math.pi * t)  # a bent way
    first = torch.tensor([32, 16, 1, 32])
    for i, last in enumerate(first):
        walked[i, last:] = walked[i, last]
    source, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    with torch.no_grad():
        b(x)  # the lazy layer
        heat = cae.explain._integrated(b, x, walked, first, source, target, at_once=7)

        def lead(images: Tensor) -> Tensor:
            logits = b(images)
            return logits.gather(1, target[:, None]) - logits.gather(1, source[:, None])

        change = lead(x + walked[:, -1] - walked[:, 0]) - lead(x)
    assert change.abs().min() > 0.01
    assert torch.allclose(heat.sum((1, 2)), change[:, 0], rtol=0.02)


@pytest.mark.parametrize("mode", ["integrated", "path", "contrast", "input"])
def test_smooth_blurs_the_map_and_nothing_else(mode: str) -> None:
    x = image(-0.2)
    sharp, smooth = (run(x, [0], [1], [[0.8, -0.5]], mode=mode, smooth=share) for share in (0.0, 0.1))
    assert torch.allclose(smooth.map, cae.explain.blur(sharp.map, 0.1))
    assert not torch.allclose(smooth.map, sharp.map, atol=1e-3) and (smooth.map >= 0).all()
    assert torch.equal(smooth.signed, sharp.signed) and smooth.status == sharp.status
