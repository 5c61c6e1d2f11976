"""Pictures made of numbers: plain arrays -> a matplotlib Figure. The look is that of `cae.figures`.

Legend: N images, K frames, S steps, C classes. Wrong shapes raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from cae.figures import COLOURS, INK, MUTED, RULE, finished, wrap

CONTROLS = ("random", "sobel", "centre", "|x")
"""A curve whose name begins with one of these, in any case, is a control: a map that knows nothing of the model."""

POINTS = 20_000  # codes of a split that are drawn, at most
ENTRIES = 24  # classes that a legend names, at most


def manifold(
    projections: Mapping[str, np.ndarray], labels: np.ndarray, class_names: Sequence[str], splits: np.ndarray
) -> Figure:
    """Class codes in the plane: a row a projection (N, 2), a column a split, one colour a class (the paper's Fig. 8).

    labels: ints (N,), below 0 where unknown; splits: names (N,), of which at most three are drawn, train first. The
    panels of a row share their limits, so that a shift between splits shows. Of more than POINTS codes of a split so
    many are drawn, and the ENTRIES commonest classes are named.
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
            chosen = np.random.default_rng(0).permutation(np.flatnonzero(splits == split))[:POINTS]
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
        counts = np.bincount(here + 1, minlength=len(class_names) + 1)
        common = set(np.argsort(-counts, kind="stable")[:ENTRIES] - 1)
        present = [k for k in (*range(len(class_names)), -1) if counts[k + 1] and k in common]
        last.legend(
            [last.plot([], [], "o", color=colours[k], markersize=6)[0] for k in present],
            [f"{(*class_names, 'unknown')[k]} ({(here == k).sum():,})" for k in present],
            loc="upper center", bbox_to_anchor=(0.5, -0.01), frameon=False, fontsize=9, ncols=min(2, len(present)),
            handletextpad=0.2, columnspacing=1.2,
        )  # fmt: skip
    return finished(fig)


def perturbation_curves(curves: Mapping[str, np.ndarray], covered: np.ndarray) -> Figure:
    """Drop of b's probability (S,) as the top-ranked share `covered` (S,) of the image is destroyed (Eqs. 11, 12).

    Controls (see CONTROLS) are dashed and grey, methods solid, those that begin with "CAE" thickest. The legend is
    ordered by the mean of each curve over its steps.
    """
    if not curves or any(np.shape(y) != np.shape(covered) for y in curves.values()):
        raise ValueError(f"perturbation_curves: every curve must have the shape of `covered`, {np.shape(covered)}")
    fig = Figure(figsize=(8.6, 4.6), dpi=160, layout="constrained")
    ax = fig.subplots()
    # The headline takes the strongest colour; a second and a third round of the colours come with markers.
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
        marker = "" if control or k < 7 else "os^"[(k - 7) // 6 % 3]
        zorder = 4 if headline else 2 if control else 3
        (drawn[name],) = ax.plot(
            covered, curves[name], color=colour, linestyle=style, linewidth=width, zorder=zorder, marker=marker,
            markersize=4, markevery=max(1, len(covered) // 10),
        )  # fmt: skip
    order.sort(key=lambda name: -float(np.mean(curves[name])))
    ax.legend(
        [drawn[name] for name in order], [f"{np.mean(curves[name]):+.3f}   {name}" for name in order],
        title="mean drop over the curve", title_fontsize=8.5, alignment="left", loc="upper left",
        bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9, handlelength=2.6,
    )  # fmt: skip
    ax.axhline(0, color=MUTED, linewidth=0.8, zorder=0)
    ax.set_xlabel("share of the image destroyed, most important first")
    ax.set_ylabel("drop of the probability")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xlim(0, float(np.max(covered)))
    plot_style(ax)
    return finished(fig)


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
        plot_style(ax)
    for ax in axes.flat[len(terms) :]:
        ax.set_visible(False)
    for ax in axes.flat[len(terms) - columns : len(terms)]:
        ax.tick_params(labelbottom=True)
    fig.supxlabel("pairs seen", fontsize=9.5, color=INK)
    return finished(fig)


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
    names = [wrap(name, 14) for name in class_names]
    ax.set_xticks(range(count), names, rotation=0 if count < 5 else 40, ha="center" if count < 5 else "right")
    ax.set_yticks(range(count), names)
    ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    ax.set_xlabel(columns, color=MUTED)
    ax.set_ylabel(rows, color=MUTED)
    ax.spines[:].set_visible(False)
    right, total = np.trace(matrix), matrix.sum()
    summary = f"{right:,} of {total:,} on the diagonal ({right / max(total, 1):.1%})"
    ax.set_title(f"{title}\n{summary}", fontsize=10, color=INK)
    return finished(fig)


def differences(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    told: Mapping[str, Collection[str]],
    label: str,
) -> Figure:
    """By how much one method is ahead of each other one: panel -> method -> (mean, low end, high end).

    A row a method, in the order of their first appearance from the top. Blue where the whole interval is above 0,
    vermilion where it is below, else grey; hollow, with a star, for the methods that `told` names for a panel.
    """
    methods = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    if not methods:
        raise ValueError("differences: there is no method to compare with; give one at least")
    size = (2.2 + 3.3 * len(panels), 1.0 + 0.27 * len(methods))
    fig = Figure(figsize=size, dpi=160, layout="constrained")
    axes = fig.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        ax.axvline(0, color=INK, linewidth=1, zorder=1)
        for name, (mean, low, high) in panel.items():
            colour = COLOURS[0] if low > 0 else COLOURS[1] if high < 0 else "#8b929c"
            hollow, row = name in told.get(title, ()), methods.index(name)
            ax.plot([low, high], [row, row], color=colour, linewidth=1.8, zorder=2)
            ax.plot(mean, row, "o", color=colour, markerfacecolor="white" if hollow else colour, zorder=3)
            if hollow:
                ax.annotate("*", (high, row), (4, -4), textcoords="offset points", color=INK, fontsize=10)
        ax.set_title(title, fontsize=11, color=INK)
        plot_style(ax)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    fig.supxlabel(label, fontsize=9.5, color=INK)
    return finished(fig)


def smoothness(paths: Mapping[str, np.ndarray], monotone: Mapping[str, float], drawn: int = 40) -> Figure:
    """The donor's class's probability along straight paths between two class codes (the paper's Fig. 11b).

    paths: direction -> (N, K) at even distances, of which the first `drawn` are drawn, pale, and the mean of all;
    monotone: direction -> share of the paths that never fall, in the title. At most six directions are drawn, those
    with the most paths.
    """
    if not paths or any(np.ndim(p) != 2 or not len(p) for p in paths.values()):
        raise ValueError(f"smoothness: paths are {[np.shape(p) for p in paths.values()]}; give (N, K) with N > 0")
    chosen = sorted(paths, key=lambda name: -len(paths[name]))[:6]
    columns = min(3, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    fig = Figure(figsize=(3.9 * columns, 2.9 * rows + 0.2), dpi=160, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax, name in zip(axes.flat, chosen, strict=False):
        p = paths[name]
        share = np.linspace(0, 1, p.shape[1])
        ax.plot(share, p[:drawn].T, color=COLOURS[0], linewidth=0.8, alpha=0.3)
        ax.plot(share, p.mean(0), color=COLOURS[1], linewidth=2.6)
        ax.set_title(f"{wrap(name, 34)}\n{monotone[name]:.0%} of {len(p):,} paths monotone", fontsize=9.5, color=INK)
        ax.set(xlim=(0, 1), ylim=(-0.02, 1.02))
        plot_style(ax)
    for ax in axes.flat[len(chosen) :]:
        ax.set_visible(False)
    fig.supxlabel("share of the way from the image's class code to the donor's", fontsize=9.5, color=INK)
    fig.supylabel("probability of the donor's class", fontsize=9.5, color=INK)
    return finished(fig)


# What the functions above share.


def plot_style(ax: Axes) -> None:
    """Axes of a plot: two of them, a quiet grid below what is drawn."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.grid(color=RULE, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=INK)


def _palette(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count)))
