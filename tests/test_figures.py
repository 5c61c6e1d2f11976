"""Pictures and the report: what is drawn is what was given."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cae import figures, plots

SIZE = 12


def colour_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def grey_images(count: int, seed: int = 0) -> np.ndarray:
    return colour_images(count, seed)[..., :1].repeat(3, -1)


def shown(fig: Figure) -> list[np.ndarray]:
    """The arrays of all images in the figure, in drawing order."""
    return [np.asarray(image.get_array()) for ax in fig.axes for image in ax.images]


def words(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.findobj(Text) if text.get_visible() and text.get_text()]


def png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()


def slow_overlay(image: np.ndarray, heat: np.ndarray, alpha: float) -> np.ndarray:
    ordered = np.sort(heat.ravel())

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))

    low, high = percentile(0.005), percentile(0.995)
    out = image.copy()
    for y in range(heat.shape[0]):
        for x in range(heat.shape[1]):
            level = min(1.0, max(0.0, (heat[y, x] - low) / (high - low)))
            opacity = alpha * level**1.5
            for channel, colour in enumerate(matplotlib.colormaps["inferno"](0.33 + 0.67 * level)[:3]):
                out[y, x, channel] = round(float(image[y, x, channel]) * (1 - opacity) + 255 * colour * opacity)
    return out


def test_overlay_is_its_definition() -> None:
    heat = np.random.default_rng(1).normal(size=(SIZE, SIZE))
    image = colour_images(1)[0]
    np.testing.assert_array_equal(figures.overlay(image, heat, 0.6), slow_overlay(image, heat, 0.6))
    # The scale of a map carries no meaning.
    np.testing.assert_array_equal(figures.overlay(image, heat), figures.overlay(image, 1e-6 * heat + 3))


@pytest.mark.parametrize("value", [0.0, -2.5, 1e30, np.nan, np.inf])
def test_overlay_of_a_constant_map_is_the_image(value: float) -> None:
    image = colour_images(1)[0]
    result = figures.overlay(image, np.full((SIZE, SIZE), value))
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)


def test_overlay_shows_one_pixel_and_leaves_the_others() -> None:
    image = np.full((40, 40, 3), 90, np.uint8)
    heat = np.zeros((40, 40), np.float16)
    heat[3, 5] = 1
    result = figures.overlay(image, heat, alpha=1)
    assert to_hex(result[3, 5] / 255) == to_hex(matplotlib.colormaps["inferno"](1.0))
    result[3, 5] = 90
    np.testing.assert_array_equal(result, image)


def test_overlay_ignores_what_is_not_finite() -> None:
    image, heat = colour_images(1)[0], np.random.default_rng(1).random((SIZE, SIZE))
    heat[0, 0], heat[0, 1] = np.nan, -np.inf
    result = figures.overlay(image, heat)
    np.testing.assert_array_equal(result[0, :2], image[0, :2])
    assert (result[1:] != image[1:]).any()


def test_overlay_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"map \(5, 5\)"):
        figures.overlay(colour_images(1)[0], np.zeros((5, 5)))
    with pytest.raises(ValueError, match="uint8"):
        figures.overlay(np.zeros((5, 5, 3)), np.zeros((5, 5)))


def test_swaps_show_the_arrays_row_by_row() -> None:
    a, b, c, d = arrays = [colour_images(3, seed) for seed in range(4)]
    fig = figures.swaps(a, b, c, d, ["A → B\np = 0.97", "B → A\np = 0.12", "costs $5 and $6"])
    assert len(fig.axes) == 12
    for drawn, given in zip(shown(fig), np.concatenate(arrays), strict=True):
        np.testing.assert_array_equal(drawn, given)
    assert {"original", "reconstruction", "class donor", "A → B\np = 0.97", "costs $5 and $6"} <= set(words(fig))
    assert Image.open(io.BytesIO(png(fig))).width > 100


def test_tints_of_what_is_generated_are_shown() -> None:
    originals, tinted = grey_images(2), colour_images(2)
    drawn = shown(figures.swaps(originals, tinted, tinted, originals, ["", ""]))
    np.testing.assert_array_equal(drawn[2], tinted[0])


@pytest.mark.parametrize(
    ("arrays", "captions", "message"),
    [
        ([colour_images(2)] * 4, ["one"], "1 captions for 2 images"),
        ([colour_images(2)] * 3 + [colour_images(1)], ["", ""], "class donor"),
        ([colour_images(2)] * 3 + [colour_images(2) / 255], ["", ""], "uint8"),
        ([colour_images(0)] * 4, [], "N > 0"),
    ],
)
def test_swaps_refuse_what_does_not_fit(arrays: list[np.ndarray], captions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        figures.swaps(arrays[0], arrays[1], arrays[2], arrays[3], captions)
    assert "\n" not in str(error.value)


def test_path_strips_pick_frames_evenly_and_print_their_probabilities() -> None:
    rng = np.random.default_rng(2)
    lengths = (17, 4, 1)
    frames = [colour_images(length, seed) for seed, length in enumerate(lengths)]
    probabilities = [np.round(np.linspace(0.011, 0.987, length), 3) for length in lengths]
    originals, maps = colour_images(3, 9), rng.random((3, SIZE, SIZE)).astype(np.float16)
    fig = figures.path_strips(frames, probabilities, originals, maps, ["a", "b", "c"])
    chosen = [list(range(0, 17, 2)), [0, 1, 2, 3], [0]]
    expected = []
    for row, picks in enumerate(chosen):
        overlaid = figures.overlay(originals[row], maps[row])
        expected += [originals[row], *frames[row][picks], maps[row], overlaid]
    drawn = shown(fig)
    assert len(drawn) == len(expected)
    for ours, given in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(ours, given)
    printed = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    assert printed == [f"{probabilities[row][k]:.2f}" for row, picks in enumerate(chosen) for k in picks]
    bars = [ax.patches[-1].get_window_extent().width / ax.bbox.width for ax in fig.axes if ax.get_xlabel()]
    np.testing.assert_allclose(bars, [probabilities[row][k] for row, picks in enumerate(chosen) for k in picks])
    png(fig)


def test_path_strips_name_the_row_that_does_not_fit() -> None:
    originals, maps = colour_images(2), np.zeros((2, SIZE, SIZE))
    frames = [colour_images(3), colour_images(3)]
    with pytest.raises(ValueError, match="image 1 has 3 frames and 2 probabilities"):
        figures.path_strips(frames, [np.zeros(3), np.zeros(2)], originals, maps, ["", ""])
    with pytest.raises(ValueError, match="1 paths"):
        figures.path_strips(frames[:1], [np.zeros(3)] * 2, originals, maps, ["", ""])


def test_maps_by_method_lays_each_map_on_its_image() -> None:
    images = grey_images(2)
    maps = {name: np.random.default_rng(k).random((2, SIZE, SIZE)) for k, name in enumerate(("CAE path", "LIME"))}
    fig = figures.maps_by_method(images, maps, ["first", "second"])
    drawn = shown(fig)
    assert len(drawn) == 6
    np.testing.assert_array_equal(drawn[0], images[0])
    np.testing.assert_array_equal(drawn[5], figures.overlay(images[1], maps["LIME"][1]))
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == ["image", "CAE path", "LIME"]
    maps["LIME"][1] = np.nan  # it has none of the second image
    fig = figures.maps_by_method(images, maps, ["first", "second"])
    assert (shown(fig)[5] == 255).all() and [text.get_text() for text in fig.axes[-1].texts] == ["no map"]
    with pytest.raises(ValueError, match="LIME"):
        figures.maps_by_method(images, {"LIME": maps["LIME"][:1]}, ["first", "second"])


def test_swap_grid_puts_class_codes_in_rows_and_individual_codes_in_columns() -> None:
    originals, donors = colour_images(3, 1), colour_images(2, 2)
    combinations = np.stack([colour_images(3, 3), colour_images(3, 4)])
    p = np.array([[0.11, 0.12, 0.13], [0.21, 0.22, 0.23]])
    fig = figures.swap_grid(originals, donors, combinations, ["A", "B"], p)
    drawn = shown(fig)
    expected = [*originals, donors[0], *combinations[0], donors[1], *combinations[1]]
    for ours, given in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(ours, given)
    assert [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()] == [f"{value:.2f}" for value in p.ravel()]
    assert len(shown(figures.swap_grid(originals, donors, combinations))) == len(drawn)
    with pytest.raises(ValueError, match="combinations"):
        figures.swap_grid(originals, donors, combinations.swapaxes(0, 1))


def test_dragged_codes_show_every_frame_at_its_place() -> None:
    originals, donors = colour_images(2, 1), colour_images(2, 2)
    frames = np.stack([colour_images(3, 3), colour_images(3, 4)])
    p = np.array([[0.11, 0.12, 0.13], [0.21, 0.22, 0.23]])
    fig = figures.dragged_codes(originals, frames, p, donors, ["A → B", "B → A"])
    expected = [originals[0], *frames[0], donors[0], originals[1], *frames[1], donors[1]]
    for ours, given in zip(shown(fig), expected, strict=True):
        np.testing.assert_array_equal(ours, given)
    assert [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()] == [f"{value:.2f}" for value in p.ravel()]
    assert [ax.get_title() for ax in fig.axes if ax.get_title()] == ["individual code", "0", "0.5", "1", "class donor"]
    with pytest.raises(ValueError, match="2 pairs need"):
        figures.dragged_codes(originals, frames, p[:1], donors, ["", ""])


def test_differences_are_coloured_by_their_interval_and_marked_where_told() -> None:
    panels = {"blur": {"ahead": (0.2, 0.1, 0.3), "open": (0.0, -0.1, 0.1)}, "noise": {"behind": (-0.2, -0.3, -0.1)}}
    fig = plots.differences(panels, {"blur": {"open"}}, "difference")
    left, right = fig.axes
    assert [ax.get_title() for ax in fig.axes] == ["blur", "noise"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["ahead", "open", "behind"]
    drawn = [line for ax in fig.axes for line in ax.lines[1:]]  # without those at 0
    ends, points = drawn[::2], drawn[1::2]
    assert [list(line.get_xdata()) for line in ends] == [[0.1, 0.3], [-0.1, 0.1], [-0.3, -0.1]]
    assert [float(np.ravel(point.get_xdata())[0]) for point in points] == [0.2, 0.0, -0.2]
    assert [float(np.ravel(point.get_ydata())[0]) for point in points] == [0, 1, 2]
    colours = [to_hex(line.get_color()) for line in ends]
    assert colours[0] == to_hex(figures.COLOURS[0]) and colours[2] == to_hex(figures.COLOURS[1])
    assert np.ptp(to_rgb(colours[1])) < 0.1
    assert [to_hex(point.get_markerfacecolor()) == "#ffffff" for point in points] == [False, True, False]
    assert [text.get_text() for text in left.texts] == ["*"] and not right.texts
    with pytest.raises(ValueError, match="no method"):
        plots.differences({"blur": {}}, {}, "difference")


def test_smoothness_draws_paths_and_their_mean_for_the_commonest_directions() -> None:
    rng = np.random.default_rng(0)
    paths = {f"way {k}": rng.random((k + 2, 5)) for k in range(8)}
    fig = plots.smoothness(paths, {name: 0.5 for name in paths}, drawn=3)
    assert [ax.get_title() for ax in fig.axes] == [
        f"way {k}\n50% of {k + 2} paths monotone" for k in (7, 6, 5, 4, 3, 2)
    ]
    *lines, mean = fig.axes[0].lines
    for line, path in zip(lines, paths["way 7"][:3], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), path)
        np.testing.assert_allclose(line.get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(mean.get_ydata(), paths["way 7"].mean(0))
    with pytest.raises(ValueError, match="N > 0"):
        plots.smoothness({"way": np.zeros((0, 5))}, {"way": 1.0})


def test_manifold_separates_splits_shares_limits_and_counts_classes() -> None:
    rng = np.random.default_rng(0)
    points = {"PCA": rng.normal(size=(300, 2)), "t-SNE": 50 * rng.normal(size=(300, 2))}
    labels, splits = rng.integers(-1, 2, 300), rng.choice(["test", "train"], 300)
    fig = plots.manifold(points, labels, ["_odd", "PNEUMONIA"], splits)
    assert [ax.get_title() for ax in fig.axes[:2]] == [f"{s} (n = {(splits == s).sum()})" for s in ("train", "test")]
    for row, name in enumerate(points):
        train, test = fig.axes[2 * row : 2 * row + 2]
        assert train.get_xlim() == test.get_xlim() and train.get_ylim() == test.get_ylim()
        for ax, split in ((train, "train"), (test, "test")):
            offsets = np.asarray(ax.collections[0].get_offsets())
            here = points[name][splits == split]
            np.testing.assert_array_equal(offsets[np.lexsort(offsets.T)], here[np.lexsort(here.T)])
            # Every point has the colour of its class.
            colours = np.asarray(ax.collections[0].get_facecolor())[:, :3]
            colour = dict(zip(map(tuple, offsets), colours, strict=True))
            for point, label in zip(here, labels[splits == split], strict=True):
                expected = (*figures.COLOURS[:2], "#b8bec8")[label]
                np.testing.assert_allclose(colour[tuple(point)], to_rgb(expected))
    legend = fig.axes[3].get_legend()
    assert legend is not None
    count = [int(((labels == k) & (splits == "test")).sum()) for k in (0, 1, -1)]
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == [f"_odd ({count[0]})", f"PNEUMONIA ({count[1]})", f"unknown ({count[2]})"]
    png(fig)


def test_manifold_draws_three_splits_at_most_and_many_classes() -> None:
    points = np.zeros((40, 2))
    splits = np.array(["train", "val", "test", "more"] * 10)
    fig = plots.manifold({"PCA": points}, np.arange(40) % 12, [f"c{k}" for k in range(12)], splits)
    assert [ax.get_title().split()[0] for ax in fig.axes] == ["train", "val", "test"]
    with pytest.raises(ValueError, match="label 11 has no name"):
        plots.manifold({"PCA": points}, np.arange(40) % 12, ["a"], splits)
    with pytest.raises(ValueError, match="do not match"):
        plots.manifold({"PCA": points[1:]}, np.zeros(40, int), ["a"], splits)


def test_manifold_of_many_codes_and_classes_stays_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "POINTS", 100)
    labels = np.minimum(np.arange(3000), 999)  # 999 is the commonest
    fig = plots.manifold({"PCA": np.random.default_rng(0).normal(size=(3000, 2))}, labels,
                         [f"c{k}" for k in range(1000)], np.full(3000, "test"))  # fmt: skip
    (ax,) = fig.axes
    assert len(ax.collections[0].get_offsets()) == 100 and ax.get_title() == "test (n = 3,000)"
    entries = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(entries) == plots.ENTRIES and entries[-1] == "c999 (2,001)"


def test_perturbation_curves_tell_methods_from_controls() -> None:
    covered = np.linspace(0.01, 0.3, 20)
    slopes = {"random map": 0.1, "LIME": 0.5, "CAE path": 2.0, "Sobel": 0.3}
    curves = {name: slope * covered for name, slope in slopes.items()}
    fig = plots.perturbation_curves(curves, covered)
    (ax,) = fig.axes
    legend = ax.get_legend()
    assert legend is not None
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == [f"{np.mean(curves[n]):+.3f}   {n}" for n in ("CAE path", "LIME", "Sobel", "random map")]
    lines = {float(np.max(line.get_ydata())): line for line in ax.lines[: len(curves)]}
    line = {name: lines[float(curve.max())] for name, curve in curves.items()}
    for name, curve in curves.items():
        np.testing.assert_array_equal(line[name].get_ydata(), curve)
        np.testing.assert_array_equal(line[name].get_xdata(), covered)
        control = name in ("random map", "Sobel")
        assert (line[name].get_linestyle() != "-") == control
        assert (np.ptp(to_rgb(line[name].get_color())) < 0.1) == control
    assert all(line["CAE path"].get_linewidth() > line[name].get_linewidth() for name in curves if name != "CAE path")
    with pytest.raises(ValueError, match="shape"):
        plots.perturbation_curves({"LIME": covered[1:]}, covered)


def test_training_curves_draw_a_moving_mean_of_every_term() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(200)
    history = {
        "recon_x": [(10 * k, float(value)) for k, value in enumerate(values)],
        "adv1": [(0, 1.0), (10, float("nan")), (20, 3.0)],
        "lost": [(0, float("nan"))],
        "fast": [(k, 10.0 ** -(k / 10)) for k in range(60)],
        "one": [(5, 0.25)],
    }
    fig = plots.training_curves(history)
    axes = [ax for ax in fig.axes if ax.get_visible()]
    assert [ax.get_title().split()[0] for ax in axes] == list(history)
    raw, mean = axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), values)
    slow = [values[max(0, k - 5) : k + 6].mean() for k in range(200)]
    np.testing.assert_allclose(np.asarray(mean.get_ydata(), float), slow)
    assert axes[0].get_title().endswith(f"{slow[-1]:.3g}")
    assert list(np.asarray(axes[1].lines[0].get_xdata())) == [0, 20]
    assert axes[2].get_title() == "lost   never finite"
    assert [ax.get_yscale() for ax in axes] == ["linear", "linear", "linear", "log", "linear"]
    png(fig)
    with pytest.raises(ValueError, match="empty"):
        plots.training_curves({"recon_x": []})


def test_confusion_prints_counts_and_shares_of_the_row() -> None:
    fig = plots.confusion(np.array([[1200, 300], [0, 0]]), ["A", "B"], "Swaps", "donor", "given")
    (ax,) = fig.axes
    np.testing.assert_allclose(shown(fig)[0], np.array([[0.8, 0.2], [0, 0]]))
    assert [text.get_text() for text in ax.texts] == ["1,200\n80.0%", "300\n20.0%", "0\n0.0%", "0\n0.0%"]
    assert ax.get_title() == "Swaps\n1,200 of 1,500 on the diagonal (80.0%)"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("donor", "given")
    plots.confusion(np.zeros((1, 1), int), ["A"], "none")
    with pytest.raises(ValueError, match="3 class names"):
        plots.confusion(np.zeros((2, 2), int), ["A", "B", "C"], "t")


def test_threads_draw_the_same_pictures_as_one() -> None:
    def draw(seed: int) -> bytes:
        images = colour_images(2, seed)
        return png(figures.swaps(images, images, images, images, [f"seed {seed}", ""]))

    alone = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(draw, range(4))) == alone


def test_pyplot_stays_out() -> None:
    code = "import sys, cae.plots, cae.report; sys.exit('matplotlib.pyplot' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
