"""What each mode makes of a path."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from worlds import (
    BLOBS,
    FLAW,
    GAIN,
    SIDE,
    THRESHOLD,
    TOY,
    B,
    assert_same,
    blob_means,
    crooked_world,
    crossing,
    explain,
    image,
    run,
)

import cae.explain
from cae import attribution
from cae.classifiers import BlackBox
from cae.explain import Mode, choose_mode
from cae.images import blur


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


def test_steps_are_what_the_mode_needs_unless_given() -> None:
    x = image(-0.2)
    bent = [[[0.1, -0.4], [0.8, -0.5]]]
    for mode, steps in (("integrated", 1), ("evidence", 1), ("patch", 1), ("path", 8), ("contrast", 8), ("input", 8)):
        assert run(x, [0], [1], [[0.8, -0.5]], mode=mode).frames.shape[1] == steps + 1
        assert run(x, [0], [1], bent, mode=mode).frames.shape[1] == 9
        assert run(x, [0], [1], [[0.8, -0.5]], mode=mode, steps=3, refine=0).frames.shape[1] == 4
    assert run(x, [0], [1], [[0.8, -0.5]], mode="integrated").flip_at.isnan().all()  # nobody looked for it
    at = run(x, [0], [1], [[0.8, -0.5]], mode="integrated", steps=8).flip_at.item()
    assert at == pytest.approx(crossing(-0.2, 0.8, 0.0), abs=1e-3)


def test_integrated_map_is_the_closed_form_where_b_is_linear() -> None:
    """Each pixel of the first blob gets its share of the logit's rise; nothing else moves b."""
    x = torch.cat([image(-0.2), image(0.1, 0.2, seed=1)])
    question: Any = (x, [0, 0], [1, 1], [[0.8, -0.5], [0.6, 0.2]])
    found = run(*question, mode="integrated", steps=4, fade=0.0)
    rise = blob_means(found.frames[:, -1])[:, 0] - blob_means(x)[:, 0]
    assert torch.allclose(found.map, (GAIN * rise / BLOBS[0].sum())[:, None, None] * BLOBS[0], atol=1e-4)
    # Of a faded counterfactual: what moves b is what is left of its contrast.
    faded = run(*question, mode="integrated", steps=4, fade=0.4)
    end = found.frames[:, -1]
    end = 0.6 * end + 0.4 * end.mean((2, 3), keepdim=True)
    expected = GAIN * (end - x).mean(1) * BLOBS[0] / BLOBS[0].sum()
    assert torch.allclose(faded.map, expected.clamp(min=0), atol=1e-4)
    assert not torch.allclose(faded.map, found.map, atol=1e-2) and torch.equal(faded.frames, found.frames)


def test_contrast_falls_evenly_to_the_end_of_the_way() -> None:
    way = torch.randn(3, 6, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    last = torch.tensor([5, 2, 1])
    for fade in (0.0, 0.3, 1.0):
        found = attribution.faded(way, last, fade)
        for i, k in product(range(3), range(6)):
            left = 1 - fade * min(1, k / int(last[i]))
            for channel in range(3):
                frame = way[i, k, channel]
                assert torch.allclose(found[i, k, channel], frame.mean() + left * (frame - frame.mean()), atol=1e-12)


def test_maps_by_gradient_fade_and_no_others() -> None:
    network, b, x, codes = crooked_world()
    given = x[:3], torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), codes[:3]
    for mode in get_args(Mode):
        plain, faded = (explain(network, b, *given, mode=mode, fade=share) for share in (0.0, 0.3))
        assert torch.equal(plain.map, faded.map) == (mode not in ("integrated", "evidence"))
    for fade in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"fade {fade}"):
            explain(network, b, *given, mode="integrated", fade=fade)


def test_integrated_map_shows_only_what_speaks_for_the_target() -> None:
    # On the way from class 2 to class 1 both blobs speak for the target; towards class 0 only the second one's fall.
    x = image(-0.2, 0.6)
    both = run(x, [2], [1], [[0.9, -0.4]], mode="integrated").map[0]
    assert (both[BLOBS[0] > 0] > 0.1).all() and (both[BLOBS[1] > 0] > 0.1).all()
    one = run(x, [2], [0], [[-0.9, -0.4]], mode="integrated").map[0]
    assert one[BLOBS[0] > 0].abs().max() < 1e-4 and (one[BLOBS[1] > 0] > 0.1).all()
    assert both[(BLOBS.sum(0) == 0)].abs().max() == 0


def differentiable(linear: bool = False) -> BlackBox:
    """A classifier of three classes, linear in its images or far from it, in double precision."""
    torch.manual_seed(0)
    curved = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.Tanh(), nn.Conv2d(8, 3, 3, 2), nn.Tanh())
    net = nn.Sequential(nn.Identity() if linear else curved, nn.Flatten(), nn.LazyLinear(3)).double()
    with torch.no_grad():
        net(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64))
    return BlackBox(net, ("a", "b", "c"), 0.0, 0.5)


def logit_lead(b: BlackBox, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    logits = b(x)
    return (logits.gather(1, target[:, None]) - logits.gather(1, source[:, None]))[:, 0]


@torch.no_grad()
def test_integrated_attributions_sum_to_the_change_of_the_logit_from_the_image_to_its_counterfactual() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 2 - 1
    there, aside = torch.randn(2, 4, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    source, target = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])

    def incomplete(b: BlackBox, steps: int) -> Tensor:
        """What the sums over the maps of bent ways miss of the changes."""
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None, None, None]
        way = x[:, None] + there * t + aside * torch.sin(math.pi * t / 2)
        first = torch.tensor([steps, (steps + 1) // 2, (steps + 7) // 8, steps])
        for i, last in enumerate(first):
            way[i, last:] = way[i, last]
        heat = attribution.integrated(b, way, first, source, target, at_once=7)
        change = logit_lead(b, way[:, -1], source, target) - logit_lead(b, x, source, target)
        assert change.abs().min() > 0.01
        return (heat.sum((1, 2)) - change).abs()

    errors = torch.stack([incomplete(differentiable(), steps) for steps in (8, 32, 128)]).amax(1)
    assert (errors[1:] < errors[:-1] / 128).all() and errors[-1] < 1e-7  # of fourth order
    for steps in (1, 5):
        assert incomplete(differentiable(linear=True), steps).max() < 1e-10


@torch.no_grad()
def slow_windows(b: BlackBox, x: Tensor, content: Tensor, source: Tensor, target: Tensor, window: int) -> Tensor:
    """The signed map (H, W) of one image (3, H, W), window by window."""

    def f(picture: Tensor) -> float:
        logits = b(picture[None])[0]
        return float(logits[target] - logits[source])

    height, width = x.shape[1:]
    stride = {5: 5, 8: 7, 20: 19}[window]  # side by side, and odd
    tops, lefts = ([*range(0, size - window, stride), size - window] for size in (height, width))
    total, count = torch.zeros(height, width), torch.zeros(height, width)
    for top in tops:
        for left in lefts:
            square = slice(top, top + window), slice(left, left + window)
            picture = x.clone()
            picture[:, *square] = content[:, *square]
            total[square] += (f(picture) - f(x)) / window**2
            count[square] += 1
    return total / count


@pytest.mark.parametrize("window", [5, 8, 20])
def test_patch_map_against_slow(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, x, codes = crooked_world()
    x, codes = x[:2, :, :20], codes[:2]  # 20 rows and 32 columns: the last windows stand nearer than the others
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 4))
    blackbox = BlackBox(net.double(), tuple("abcd")).eval()
    source, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    with torch.no_grad():
        end = network.decode(codes, network.encode(x)[1])
    there, back = (
        torch.stack([slow_windows(blackbox, *each, window) for each in zip(*pair, source, target, strict=True)])
        for pair in ((x, end), (end, x))
    )
    expected = (there - back) / 2
    assert expected.amax() > 1e-4 and (window == 20 or expected.amin() < 0)
    found = explain(network, blackbox, x, source, target, codes, mode="patch", window=window / 20)
    assert torch.allclose(found.map, expected.clamp(min=0).double(), atol=1e-6)

    # No more images at once than memory is meant for, and the same map.
    asked: list[int] = []
    blackbox.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    monkeypatch.setattr(cae.explain, "CPU_PIXELS_AT_ONCE", 8 * 20 * 32)
    chunked = explain(network, blackbox, x, source, target, codes, mode="patch", window=window / 20)
    assert torch.allclose(chunked.map, found.map, atol=1e-9) and max(asked) <= 8
    # One that only answers, a server say, is asked about as many as memory allows.
    asked.clear()
    blackbox.differentiable = False
    chunked = explain(network, blackbox, x, source, target, codes, mode="patch", window=window / 20)
    windows = [len(range(0, size - window, attribution.spacing(window))) + 1 for size in (20, 32)]
    assert torch.allclose(chunked.map, found.map, atol=1e-9) and max(asked) == 2 * math.prod(windows)
    monkeypatch.setattr(cae.explain, "PIXELS_AT_ONCE", 8 * 20 * 32)
    asked.clear()
    explain(network, blackbox, x, source, target, codes, mode="patch", window=window / 20)
    assert max(asked) <= 8
    blackbox.differentiable = True
    for k in range(2):
        one = slice(k, k + 1)
        assert_same(explain(network, blackbox, x[one], source[one], target[one], codes[one], mode="patch",
                            window=window / 20), found, k)  # fmt: skip


@torch.no_grad()
def test_windows_where_b_is_linear_have_the_attributions_averaged_over_them() -> None:
    b = differentiable(linear=True)
    x, change = torch.randn(2, 2, 3, SIDE, SIDE, dtype=torch.float64)
    source, target = torch.tensor([0, 2]), torch.tensor([1, 0])
    weights = b.net[2].weight
    share = ((weights[target] - weights[source]).view_as(x) * change).sum(1)  # (B, H, W): each pixel's part
    found = attribution.windows(b, x, x + change, source, target, 4, at_once=50)
    total, count = torch.zeros_like(share), torch.zeros_like(share)
    for top in range(0, SIDE - 3, 3):
        for left in range(0, SIDE - 3, 3):
            square = ..., slice(top, top + 4), slice(left, left + 4)
            total[square] += share[square].mean((1, 2), keepdim=True)
            count[square] += 1
    assert torch.allclose(found, total / count)
    # A pixel at a time: the attributions themselves.
    assert torch.allclose(attribution.windows(b, x, x + change, source, target, 1, at_once=50), share)


@torch.no_grad()
def test_one_window_has_the_whole_change_whatever_b() -> None:
    b = differentiable()
    x, change = torch.randn(2, 3, 3, SIDE, SIDE, dtype=torch.float64)
    source, target = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])
    rise = logit_lead(b, x + change, source, target) - logit_lead(b, x, source, target)
    found = attribution.windows(b, x, x + change, source, target, SIDE, at_once=1)
    assert torch.allclose(found, (rise / SIDE**2)[:, None, None].expand(-1, SIDE, SIDE))


@torch.no_grad()
def test_windows_are_asked_about_where_another_map_says_most() -> None:
    generator = torch.Generator().manual_seed(0)
    b, (height, width) = differentiable(), (SIDE, SIDE)
    x, change = torch.randn(2, 3, 3, height, width, generator=generator, dtype=torch.float64)
    source, target = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 2])
    where = torch.randn(3, height, width, generator=generator)
    found = attribution.windows(b, x, x + change, source, target, 8, at_once=5, where=where)
    begins = [*range(0, SIDE - 8, 7), SIDE - 8]
    places = [(slice(top, top + 8), slice(left, left + 8)) for top in begins for left in begins]
    few = math.ceil(0.3 * len(places))
    assert 1 < few < len(places) / 2
    for k in range(3):
        total, count = torch.zeros(2, height, width, dtype=torch.float64)
        best = sorted(places, key=lambda square, k=k: -float(where[k][square].mean()))[:few]
        for square in places:
            count[square] += 1
            if square in best:
                one = x[k : k + 1].clone()
                one[0, :, *square] += change[k, :, *square]
                of = source[k : k + 1], target[k : k + 1]
                total[square] += (logit_lead(b, one, *of) - logit_lead(b, x[k : k + 1], *of)) / 8**2
        assert torch.allclose(found[k], total / count, atol=1e-9)


@torch.no_grad()
def test_evidence_is_the_sum_of_its_parts() -> None:
    network, b, x, codes = crooked_world()
    x, codes = x[:3], codes[:3]
    source, target = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    for fade, smooth in product((0.0, 0.2), (0.0, 0.1)):
        end = network.decode(codes, network.encode(x)[1])
        way = attribution.faded(torch.stack([x, end], 1), torch.ones(3), fade)
        heat = attribution.integrated(b, way, torch.ones(3, dtype=int), source, target, at_once=9)
        heat = blur(heat, smooth) if smooth else heat
        asked = attribution.windows(b, x, 0 * x, source, target, 8, at_once=9, where=heat)
        expected = heat + (blur(asked, smooth / 2) if smooth else asked) / 4
        options: Any = {"window": 0.25, "smooth": smooth, "fade": fade}
        found = explain(network, b, x, source, target, codes, mode="evidence", **options)
        assert torch.allclose(found.map, expected.clamp(min=0), atol=1e-6) and found.map.amax() > 1e-3
        plain = explain(network, b, x, source, target, codes, mode="integrated", **options)
        assert not torch.allclose(plain.map, found.map, atol=1e-4)


def test_patch_map_lies_within_a_window_of_the_blob_and_needs_no_gradient() -> None:
    class Queried(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(B(x).numpy())  # an answer that nothing can be derived from

    b = BlackBox(Queried(), B.classes)
    x, source, target, codes = image(-0.2), torch.tensor([0]), torch.tensor([1]), torch.tensor([[0.8, -0.5]])
    heat = explain(TOY, b, x, source, target, codes, mode="patch").map[0]  # windows of 2, a pixel apart
    near = nn.functional.max_pool2d(BLOBS[:1], 3, 1, 1)[0].bool()
    assert (heat[BLOBS[0].bool()] > 0.1).all() and heat[~near].max() < 1e-5
    # Signed as in every mode, and only what speaks for the target.
    assert torch.allclose(explain(TOY, b, x, source, target, codes, mode="patch").signed[0], BLOBS[0], atol=1e-5)
    away = run(x, [0], [1], [[-0.8, -0.5]], mode="patch")
    assert away.map.abs().max() < 1e-5 and away.status == ["unflipped"]


@pytest.mark.parametrize(
    "wrong", [{"smooth": -0.1}, {"smooth": 0.6}, {"smooth": math.nan}, {"margin": 1.1}, {"margin": math.nan},
              {"refine": -1}, {"inversion": -1}, {"fade": 1.1}, {"steps": 0}, {"mode": "nonsense"}],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        run(image(-0.2), [0], [1], [[0.8, -0.5]], **wrong)


def test_windows_that_are_no_share_of_the_side_are_refused() -> None:
    for window in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=f"window {window}"):
            run(image(-0.2), [0], [1], [[0.8, -0.5]], mode="patch", window=window)


@pytest.mark.parametrize("mode", sorted(set(get_args(Mode)) - {"evidence"}))
def test_smooth_blurs_the_map_and_nothing_else(mode: str) -> None:
    x = image(-0.2)
    sharp, smooth = (run(x, [0], [1], [[0.8, -0.5]], mode=mode, smooth=share) for share in (0.0, 0.1))
    assert torch.allclose(smooth.map, blur(sharp.map, 0.1))
    assert not torch.allclose(smooth.map, sharp.map, atol=1e-3) and (smooth.map >= 0).all()
    assert torch.equal(smooth.signed, sharp.signed) and smooth.status == sharp.status


@pytest.mark.parametrize("mode", ["integrated", "patch"])
def test_smooth_weighs_what_speaks_against_the_target_too(mode: str) -> None:
    class Against(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -b(x)

    network, b, x, codes = crooked_world()
    given = x[:4], torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0]), codes[:4]
    against = BlackBox(Against(), b.classes)
    for_it, against_it = (explain(network, asked, *given, mode=mode).map for asked in (b, against))
    assert (for_it * against_it == 0).all() and (for_it > 0).any() and (against_it > 0).any()
    smooth = explain(network, b, *given, mode=mode, smooth=0.05).map
    assert torch.allclose(smooth, blur(for_it - against_it, 0.05).clamp(min=0))


def test_auto_is_the_mode_that_the_classifier_allows() -> None:
    assert choose_mode("auto", True) == "integrated" and choose_mode("auto", False) == "patch"
    for mode in get_args(Mode):
        assert choose_mode(mode, True) == mode
        if mode in ("integrated", "evidence"):
            with pytest.raises(ValueError, match=f"--mode {mode} needs the classifier's gradient"):
                choose_mode(mode, False)
        else:
            assert choose_mode(mode, False) == mode
