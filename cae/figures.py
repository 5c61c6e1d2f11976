"""Every picture: functions from plain arrays to a matplotlib Figure, which the caller saves with `fig.savefig(path)`.

Legend: N images, K frames, S steps, C classes, H height, W width. Images are uint8 (N, H, W, 3), maps are floats
(N, H, W), larger = more important. Images are drawn as they are, tints included. Wrong shapes raise ValueError.

Nothing here touches pyplot or matplotlib's global settings, so several threads may draw at once.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

# Okabe and Ito's colours, which stay apart for every kind of colour vision; without the yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CONTROLS = ("random", "edge", "sobel", "centre", "center", "gauss", "|x")
"""A curve whose name begins with one of these, in any case, is a control: a map that knows nothing of the model."""
INK, MUTED, RULE = "#1f2933", "#667085", "#d5dae1"
FRAMES = 9
"""Most frames of a path in one row."""
GAP = 0.12
"""Width of the gap between groups of images, in images."""
HEAT = matplotlib.colormaps["inferno"]


def overlay(image: np.ndarray, heat: np.ndarray, alpha: float = 0.75) -> np.ndarray:
    """The map (H, W) as heat colours on the image uint8 (H, W, 3), more opaque the larger the value; uint8 (H, W, 3).

    The map is scaled between its 0.5th and 99.5th percentile; `alpha` in [0, 1] is the opacity at the top. A constant
    map leaves the image as it is; values that are not finite count as the least.
    """
    if image.ndim != 3 or image.dtype != np.uint8 or heat.shape != image.shape[:2] or image.shape[2] != 3:
        raise ValueError(f"overlay: image {image.shape} must be uint8 (H, W, 3) and map {heat.shape} (H, W) to match")
    low, high = _limits(heat)
    if high <= low:
        return image.copy()
    finite = np.where(np.isfinite(heat), heat, low).astype(np.float64)
    level = np.clip((finite - low) / (high - low), 0, 1)
    # The darkest third of the colours would blacken what is only a little important.
    colour = HEAT(0.33 + 0.67 * level)[..., :3] * 255
    opacity = alpha * level[..., None] ** 1.5
    return np.rint(image * (1 - opacity) + colour * opacity).astype(np.uint8)


def swaps(
    originals: np.ndarray, reconstructions: np.ndarray, swapped: np.ndarray, donors: np.ndarray, captions: Sequence[str]
) -> Figure:
    """Class codes exchanged between images: a column a sample, rows original, reconstruction, swap and class donor.

    The swap has the original's individual code and the donor's class code. All arrays uint8 (N, H, W, 3); a caption
    goes below each column.
    """
    rows = {
        "original": originals,
        "reconstruction": reconstructions,
        "swap: the original\nwith the class code\nof the donor": swapped,
        "class donor": donors,
    }
    count = _same_shape(rows, captions)
    fig, axes = _grid(len(rows), [1.0] * count, originals.shape[1:3], left=1.75, below=0.4)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        _row_label(line[0], name)
        for ax, image in zip(line, images, strict=True):
            _show(ax, image)
    for ax, caption in zip(axes[-1], captions, strict=True):
        ax.set_xlabel(_wrap(caption, _column(count)), fontsize=8, color=INK)
    return _finished(fig)


def path_strips(
    frames: Sequence[np.ndarray],
    probabilities: Sequence[np.ndarray],
    originals: np.ndarray,
    maps: np.ndarray,
    captions: Sequence[str],
) -> Figure:
    """The way from each image to its counterfactual: original, frames along the path, map, map on the original.

    frames: for each image uint8 (K, H, W, 3), the reconstruction first; probabilities: for each image (K,), of the
    target class, printed below its frame beside a bar of that length. K may differ between images; of more than nine
    frames nine are drawn, evenly spaced, with the first and the last. originals uint8 (N, H, W, 3), maps (N, H, W).
    """
    count = _same_shape({"originals": originals}, captions)
    if not len(frames) == len(probabilities) == len(maps) == count:
        given = f"{len(frames)} paths, {len(probabilities)} rows of probabilities and {len(maps)} maps"
        raise ValueError(f"path_strips: {count} originals but {given}; pass one each")
    for row, (strip, p) in enumerate(zip(frames, probabilities, strict=True)):
        if len(strip) != len(p) or len(strip) == 0:
            raise ValueError(
                f"path_strips: image {row} has {len(strip)} frames and {len(p)} probabilities; pass one each"
            )
    shown = min(FRAMES, max(len(strip) for strip in frames))
    fig, axes = _grid(count, [1, GAP, *[1] * shown, GAP, 1, 1], originals.shape[1:3], left=1.5, below=0.25 * count)
    for row, line in enumerate(axes):
        original, path, (bare, on_image) = line[0], line[2 : 2 + shown], line[-2:]
        _row_label(original, _wrap(captions[row], 24))
        _show(original, originals[row])
        last = len(frames[row]) - 1
        for ax, k in zip(path, np.unique(np.linspace(0, last, shown).round().astype(int)), strict=False):
            _show(ax, frames[row][k])
            _probability(ax, float(probabilities[row][k]))
        low, high = _limits(maps[row])
        bare.imshow(maps[row], cmap=HEAT, vmin=low, vmax=high)
        on_image.imshow(overlay(originals[row], maps[row]))
    _heading(axes[0, 0], "original")
    _heading(axes[0, 2], "reconstruction")
    if shown > 1:
        # Runs over several columns, so the layout must not know of it.
        text = "probability of the target class  →"
        note = axes[0, 3].annotate(text, (0, 1), (2, 4), "axes fraction", "offset points", fontsize=8, color=INK)
        note.set_in_layout(False)
    _heading(axes[0, -2], "map")
    _heading(axes[0, -1], "overlay")
    return _finished(fig)


def maps_by_method(images: np.ndarray, maps: Mapping[str, np.ndarray], captions: Sequence[str]) -> Figure:
    """Methods compared: a row an image, columns the image uint8 (N, H, W, 3) and each method's map (N, H, W) on it."""
    count = _same_shape({"images": images}, captions)
    for name, values in maps.items():
        if values.shape != images.shape[:3]:
            raise ValueError(f"maps_by_method: maps of {name!r} are {values.shape}, the images need {images.shape[:3]}")
    fig, axes = _grid(count, [1, GAP, *[1] * len(maps)], images.shape[1:3], left=1.3, below=0.0)
    for row, line in enumerate(axes):
        _row_label(line[0], _wrap(captions[row], 22))
        _show(line[0], images[row])
        for ax, values in zip(line[2:], maps.values(), strict=True):
            ax.imshow(overlay(images[row], values[row]))
    _heading(axes[0, 0], "image")
    for ax, name in zip(axes[0, 2:], maps, strict=True):
        _heading(ax, _wrap(name, _column(len(maps) + 1)), weight="bold" if name.startswith("CAE") else "normal")
    return _finished(fig)


def swap_grid(
    originals: np.ndarray,
    donors: np.ndarray,
    combinations: np.ndarray,
    captions: Sequence[str] | None = None,
    probabilities: np.ndarray | None = None,
) -> Figure:
    """Every class code with every individual code (the paper's Figs. 9 and 10).

    Top row: originals uint8 (N, H, W, 3) that give individual codes; left column: donors uint8 (R, H, W, 3) that give
    class codes, with a caption each; body: combinations uint8 (R, N, H, W, 3), with the probability (R, N) of the
    donor's class when given.
    """
    rows = _same_shape({"donors": donors}, captions)
    count = _same_shape({"originals": originals}, None)
    if combinations.shape != (rows, *originals.shape):
        raise ValueError(f"swap_grid: combinations are {combinations.shape}, they must be {(rows, *originals.shape)}")
    if probabilities is not None and probabilities.shape != (rows, count):
        raise ValueError(f"swap_grid: probabilities are {probabilities.shape}, they must be {(rows, count)}")
    below = 0.0 if probabilities is None else 0.22 * rows
    fig, axes = _grid(rows + 2, [1, GAP, *[1] * count], originals.shape[1:3], left=1.2, below=below, gap_row=1)
    body = np.delete(axes, 1, axis=0)
    corner = "individual\ncode  →\n\nclass\ncode  ↓"
    body[0, 0].text(0.96, 0.5, corner, ha="right", va="center", fontsize=8.5, color=MUTED)
    for ax, image in zip(body[0, 2:], originals, strict=True):
        _show(ax, image)
    for row, line in enumerate(body[1:]):
        _show(line[0], donors[row])
        if captions is not None:
            _row_label(line[0], _wrap(captions[row], 20))
        for column, ax in enumerate(line[2:]):
            _show(ax, combinations[row, column])
            if probabilities is not None:
                _probability(ax, float(probabilities[row, column]))
    return _finished(fig)


def manifold(
    projections: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], splits: np.ndarray
) -> Figure:
    """Class codes in the plane: a row a projection (N, 2), a column a split, one colour a class (the paper's Fig. 8).

    labels: ints (N,), below 0 where unknown; splits: names (N,), of which at most three are drawn, train first. The
    panels of a row share their limits, so that a shift between splits shows.
    """
    labels, splits = np.maximum(labels, -1), np.asarray(splits)
    sizes = {name: np.shape(points) for name, points in projections.items()}
    if not len(labels) or not sizes or set(sizes.values()) != {(len(labels), 2)} or len(splits) != len(labels):
        raise ValueError(f"manifold: {len(labels)} labels, {len(splits)} splits and projections {sizes} do not match")
    if labels.max() >= len(class_names):
        raise ValueError(f"manifold: label {labels.max()} has no name, there are {len(class_names)} class names")
    known = ("train", "val", "validation", "test")
    names = sorted({str(s) for s in splits}, key=lambda s: (known.index(s) if s in known else len(known), s))[:3]
    colours = [*_palette(len(class_names)), "#b8bec8"]  # the last, at index -1, for unknown labels
    fig = Figure(figsize=(0.5 + 3.9 * len(names), 3.7 * len(projections) + 0.7), dpi=160, layout="constrained")
    axes = fig.subplots(len(projections), len(names), squeeze=False)
    for (name, points), line in zip(projections.items(), axes, strict=True):
        low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
        margin = 0.04 * np.where(high > low, high - low, 1)
        for ax, split in zip(line, names, strict=True):
            # In a random but fixed order, so that no class lies on top of the others.
            chosen = np.random.default_rng(0).permutation(np.flatnonzero(splits == split))
            colour, size = [colours[k] for k in labels[chosen]], float(np.clip(15_000 / len(chosen), 2, 14))
            opacity = 0.8 if len(chosen) < 3000 else 0.55
            ax.scatter(*points[chosen].T, s=size, c=colour, alpha=opacity, linewidths=0, rasterized=True)
            (left, bottom), (right, top) = low - margin, high + margin
            ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
            ax.spines[:].set_color(RULE)
        line[0].set_ylabel(name, fontsize=11, weight="bold", color=INK)
    for first, last, split in zip(axes[0], axes[-1], names, strict=True):
        here = labels[splits == split]
        first.set_title(f"{split} (n = {len(here):,})", fontsize=11, color=INK)
        present = [k for k in (*range(len(class_names)), -1) if (here == k).any()]
        last.legend(
            [last.plot([], [], "o", color=colours[k], markersize=6)[0] for k in present],
            [f"{(*class_names, 'unknown')[k]} ({(here == k).sum():,})" for k in present],
            loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=9, ncols=min(2, len(present)),
            handletextpad=0.2, columnspacing=1.2,
        )  # fmt: skip
    return _finished(fig)


def perturbation_curves(
    curves: Mapping[str, np.ndarray],
    covered: np.ndarray,
    intervals: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> Figure:
    """Drop of b's probability (S,) as the top-ranked share `covered` (S,) of the image is destroyed (Eqs. 11, 12).

    intervals: (2, S) low and high ends, drawn as bands. Controls (see CONTROLS) are dashed and grey, methods solid,
    those that begin with "CAE" thickest. The legend is ordered by the mean of each curve over its steps.
    """
    if not curves or any(np.shape(y) != np.shape(covered) for y in curves.values()):
        raise ValueError(f"perturbation_curves: every curve must have the shape of `covered`, {np.shape(covered)}")
    fig = Figure(figsize=(8.6, 4.6), dpi=160, layout="constrained")
    ax = fig.subplots()
    # The headline takes the strongest colour; a second round of the colours comes with dots.
    colours = [COLOURS[k] for k in (1, 0, 2, 3, 4, 5, 6)]
    dashes = ("--", ":", "-.", (0, (6, 2)), (0, (1, 3)))
    order = sorted(curves, key=lambda name: not name.startswith("CAE"))
    seen, drawn = {True: 0, False: 0}, {}
    for name in order:
        headline, control = name.startswith("CAE"), name.lower().startswith(CONTROLS)
        k, seen[control] = seen[control], seen[control] + 1
        colour = ("#6b7280", "#8b929c", "#50565f")[k % 3] if control else colours[k if k < 7 else 1 + (k - 7) % 6]
        style = dashes[k % 5] if control else "-"
        width = 3.2 if headline else 1.4 if control else 1.7
        marker = "o" if not control and k >= 7 else ""
        zorder = 4 if headline else 2 if control else 3
        (drawn[name],) = ax.plot(
            covered, curves[name], color=colour, linestyle=style, linewidth=width, zorder=zorder, marker=marker,
            markersize=4, markevery=max(1, len(covered) // 10),
        )  # fmt: skip
        if intervals is not None and name in intervals:
            low, high = intervals[name]
            ax.fill_between(covered, low, high, color=colour, alpha=0.2 if headline else 0.08, lw=0, zorder=1)
    order.sort(key=lambda name: -float(np.mean(curves[name])))
    ax.legend(
        [drawn[name] for name in order], [f"{np.mean(curves[name]):+.3f}   {name}" for name in order],
        title="mean drop over the curve", title_fontsize=8.5, alignment="left", loc="upper left",
        bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9, handlelength=2.6,
    )  # fmt: skip
    ax.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
    ax.set_xlabel("share of the image destroyed, most important first")
    ax.set_ylabel("drop of the probability")
    ax.set_title(title, fontsize=11, loc="left", color=INK)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlim(0, float(np.max(covered)))
    _plot_style(ax)
    return _finished(fig)


def training_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """One panel a named loss term: (pairs seen, value) as logged, pale, and a moving mean; its last value on top."""
    terms = {name: np.asarray(points, float) for name, points in history.items() if len(points)}
    if not terms:
        raise ValueError("training_curves: the history is empty; log at least one value before drawing it")
    columns = min(4, len(terms))
    rows = math.ceil(len(terms) / columns)
    fig = Figure(figsize=(3.1 * columns, 2.2 * rows + 0.2), dpi=160, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True)
    for ax, (name, points) in zip(axes.flat, terms.items(), strict=False):
        pairs, values = points[np.isfinite(points[:, 1])].T
        if not len(values):
            ax.set_title(f"{name}   never finite", fontsize=9.5, color=INK)
            continue
        # The mean over a twentieth of the run, over fewer points at its ends.
        window = np.ones(2 * (len(values) // 40) + 1)
        mean = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
        ax.set_title(f"{name}   {mean[-1]:.3g}", fontsize=9.5, color=INK)
        ax.plot(pairs, values, color=COLOURS[5], linewidth=0.8, alpha=0.55)
        ax.plot(pairs, mean, color=COLOURS[0], linewidth=1.6, marker="o" if len(values) == 1 else "")
        if values.min() > 0 and mean.max() > 100 * mean.min():
            ax.set_yscale("log")
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1000:g}k" if n >= 1000 else f"{n:g}"))
        _plot_style(ax)
    for ax in axes.flat[len(terms) :]:
        ax.set_visible(False)
    for ax in axes.flat[len(terms) - columns : len(terms)]:
        ax.tick_params(labelbottom=True)
    fig.supxlabel("pairs seen", fontsize=9.5, color=INK)
    return _finished(fig)


def confusion(
    matrix: np.ndarray,
    class_names: Sequence[str],
    title: str,
    rows: str = "true class",
    columns: str = "predicted class",
) -> Figure:
    """Counts (C, C), shaded by their share of the row; `rows` and `columns` name the two axes."""
    count = len(class_names)
    if np.shape(matrix) != (count, count) or not count:
        raise ValueError(f"confusion: matrix is {np.shape(matrix)}, {count} class names need {(count, count)}")
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 1.6 + max(2.2, 0.85 * count)
    fig = Figure(figsize=(side + 0.8, side), dpi=160, layout="constrained")
    ax = fig.subplots()
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(count, count):
        dark = share[row, column] > 0.55
        ax.text(
            column, row, f"{matrix[row, column]:,}\n{share[row, column]:.1%}", ha="center", va="center",
            fontsize=9, color="white" if dark else INK,
        )  # fmt: skip
    names = [_wrap(name, 14) for name in class_names]
    ax.set_xticks(range(count), names, rotation=0 if count < 5 else 40, ha="center" if count < 5 else "right")
    ax.set_yticks(range(count), names)
    ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    ax.set_xlabel(columns, color=MUTED)
    ax.set_ylabel(rows, color=MUTED)
    ax.spines[:].set_visible(False)
    right, total = np.trace(matrix), matrix.sum()
    summary = f"{right:,} of {total:,} on the diagonal ({right / max(total, 1):.1%})"
    ax.set_title(f"{title}\n{summary}", fontsize=10, color=INK)
    return _finished(fig)


# What the functions above share.


def _grid(
    rows: int, widths: Sequence[float], shape: tuple[int, int], left: float, below: float, gap_row: int | None = None
) -> tuple[Figure, np.ndarray]:
    """A figure and its bare axes (rows, columns) for images of (H, W); widths in cells, margins in inches."""
    width = float(np.clip(12 / sum(widths), 0.95, 1.6))
    height = width * shape[0] / shape[1]
    heights = [GAP if row == gap_row else 1.0 for row in range(rows)]
    size = (left + (width + 0.05) * sum(widths), 0.3 + (height + 0.05) * sum(heights) + below)
    fig = Figure(figsize=size, dpi=200, layout="compressed")
    engine: Any = fig.get_layout_engine()
    engine.set(w_pad=0.025, h_pad=0.03, wspace=0, hspace=0)
    axes = fig.subplots(rows, len(widths), squeeze=False, width_ratios=widths, height_ratios=heights)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], facecolor="none")
        ax.spines[:].set_visible(False)
    return fig, axes


def _show(ax: Axes, image: np.ndarray) -> None:
    ax.imshow(image)


def _heading(ax: Axes, text: str, weight: str = "normal") -> None:
    ax.set_title(text, fontsize=8, color=INK, weight=weight, pad=4)


def _row_label(ax: Axes, text: str) -> None:
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8.5, color=INK, labelpad=6)


def _probability(ax: Axes, p: float) -> None:
    """The probability below the image, as a number and as a bar of that share of the image's width."""
    for width, colour in ((1.0, RULE), (p, COLOURS[1])):
        ax.add_patch(Rectangle((0, -0.06), width, 0.035, transform=ax.transAxes, color=colour, lw=0, clip_on=False))
    ax.set_xlabel(f"{p:.2f}", fontsize=8, color=INK, labelpad=9)


def _plot_style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.grid(color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK)


def _finished(fig: Figure) -> Figure:
    # Names come from users' folders: a dollar sign in them is no formula.
    for text in fig.findobj(Text):
        text.set_parse_math(False)
    return fig


def _limits(heat: np.ndarray) -> tuple[float, float]:
    """Where the colours of a map begin and end: 0.5th and 99.5th percentile, or its extremes where those coincide."""
    finite = heat[np.isfinite(heat)].astype(np.float64)
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(finite.min()), float(finite.max()))


def _palette(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count)))


def _column(count: int) -> int:
    """Characters that fit on a column of a grid of so many."""
    return int(np.clip(180 / count, 14, 22))


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in text.splitlines())


def _same_shape(arrays: Mapping[str, np.ndarray], captions: Sequence[str] | None) -> int:
    """N of uint8 arrays (N, H, W, 3) that must agree in shape, with N captions. Raises ValueError."""
    shape = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        name = name.split(":")[0]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
            raise ValueError(f"figures: {name} is {array.dtype} {array.shape}, it must be uint8 (N, H, W, 3), N > 0")
        if array.shape != shape:
            raise ValueError(f"figures: {name} is {array.shape} but the first array is {shape}; they must be equal")
    if captions is not None and len(captions) != shape[0]:
        raise ValueError(f"figures: {len(captions)} captions for {shape[0]} images; pass one each")
    return int(shape[0])
