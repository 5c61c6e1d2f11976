"""Pictures made of images, and what all figures share: arrays -> a matplotlib Figure, saved by `fig.savefig(path)`.

Legend: N images, K frames, R rows, H height, W width. Images are uint8 (N, H, W, 3), maps are floats (N, H, W),
larger = more important. Images are drawn as they are, tints included. Wrong shapes raise ValueError.

Nothing here touches pyplot or matplotlib's global settings, so several threads may draw at once.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which stay apart for every kind of colour vision; without the yellow, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
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


def captioned(picture: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """A picture uint8 (H, W, 3), enlarged by a whole number to about 256 pixels of height, with lines of text below."""
    times = max(1, round(256 / len(picture)))
    large = picture.repeat(times, 0).repeat(times, 1)
    lines = [textwrap.shorten(line, 100) for line in lines]
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)
    width = max(large.shape[1], *(int(font.getlength(line)) + 12 for line in lines))
    strip = Image.new("RGB", (width, 20 * len(lines) + 6), "white")
    ImageDraw.Draw(strip).multiline_text((6, 3), "\n".join(lines), INK, font)
    white = np.full((len(large), width - large.shape[1], 3), 255, np.uint8)
    return np.concatenate([np.concatenate([large, white], 1), np.asarray(strip)])


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
        ax.set_xlabel(wrap(caption, _column(count)), fontsize=8, color=INK)
    return finished(fig)


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
        _row_label(original, wrap(captions[row], 24))
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
    return finished(fig)


def maps_by_method(images: np.ndarray, maps: Mapping[str, np.ndarray], captions: Sequence[str]) -> Figure:
    """Methods compared: a row an image, columns the image uint8 (N, H, W, 3) and each method's map (N, H, W) on it.

    Where a map is NaN the method has none of that image.
    """
    count = _same_shape({"images": images}, captions)
    for name, values in maps.items():
        if values.shape != images.shape[:3]:
            raise ValueError(f"maps_by_method: maps of {name!r} are {values.shape}, the images need {images.shape[:3]}")
    fig, axes = _grid(count, [1, GAP, *[1] * len(maps)], images.shape[1:3], left=1.3, below=0.0)
    for row, line in enumerate(axes):
        _row_label(line[0], wrap(captions[row], 22))
        _show(line[0], images[row])
        for ax, values in zip(line[2:], maps.values(), strict=True):
            if np.isnan(values[row]).any():
                _show(ax, np.full_like(images[row], 255))
                ax.text(0.5, 0.5, "no map", ha="center", va="center", fontsize=8.5, color=MUTED, transform=ax.transAxes)
            else:
                ax.imshow(overlay(images[row], values[row]))
    _heading(axes[0, 0], "image")
    for ax, name in zip(axes[0, 2:], maps, strict=True):
        _heading(ax, wrap(name, _column(len(maps) + 1)), weight="bold" if name.startswith("CAE") else "normal")
    return finished(fig)


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
            _row_label(line[0], wrap(captions[row], 20))
        for column, ax in enumerate(line[2:]):
            _show(ax, combinations[row, column])
            if probabilities is not None:
                _probability(ax, float(probabilities[row, column]))
    return finished(fig)


def dragged_codes(
    originals: np.ndarray, frames: np.ndarray, probabilities: np.ndarray, donors: np.ndarray, captions: Sequence[str]
) -> Figure:
    """Class codes dragged from the original's to the donor's, its individual code kept (the paper's Fig. 11a).

    A row a pair: originals and donors uint8 (N, H, W, 3), frames uint8 (N, K, H, W, 3) at even distances between the
    two codes, headed by their share of the way; probabilities (N, K) of the donor's class, printed below each frame.
    """
    count = _same_shape({"originals": originals, "donors": donors}, captions)
    steps = frames.shape[1]
    if frames.shape != (count, steps, *originals.shape[1:]) or probabilities.shape != (count, steps):
        given = f"frames are {frames.shape} and probabilities {probabilities.shape}"
        raise ValueError(f"dragged_codes: {given}; {count} pairs need (N, K, H, W, 3) and (N, K)")
    widths = [1, GAP, *[1] * steps, GAP, 1]
    fig, axes = _grid(count, widths, originals.shape[1:3], left=1.5, below=0.25 * count)
    for row, line in enumerate(axes):
        _row_label(line[0], wrap(captions[row], 24))
        _show(line[0], originals[row])
        for ax, frame, p in zip(line[2:-2], frames[row], probabilities[row], strict=True):
            _show(ax, frame)
            _probability(ax, float(p))
        _show(line[-1], donors[row])
    _heading(axes[0, 0], "individual code")
    for ax, share in zip(axes[0, 2:-2], np.linspace(0, 1, steps), strict=True):
        _heading(ax, f"{share:.3g}")
    _heading(axes[0, -1], "class donor")
    return finished(fig)


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# What the functions above share; the last two, with cae.plots too.


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


def _limits(heat: np.ndarray) -> tuple[float, float]:
    """Where the colours of a map begin and end: 0.5th and 99.5th percentile, or its extremes where those coincide."""
    finite = heat[np.isfinite(heat)].astype(np.float64)
    if not finite.size:
        return 0.0, 0.0
    low, high = np.percentile(finite, (0.5, 99.5))
    return (float(low), float(high)) if high > low else (float(finite.min()), float(finite.max()))


def _column(count: int) -> int:
    """Characters that fit on a column of a grid of so many."""
    return int(np.clip(180 / count, 14, 22))


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


def finished(fig: Figure) -> Figure:
    """The figure, its texts taken to the letter."""
    # Names come from users' folders: a dollar sign in them is no formula.
    for text in fig.findobj(Text):
        text.set_parse_math(False)
    return fig


def wrap(text: str, width: int) -> str:
    """Text broken into lines of at most `width` characters, between words; its own line breaks stay."""
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in text.splitlines())
