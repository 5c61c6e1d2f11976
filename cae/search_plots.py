"""Pictures of a search: what each searched option did, all trials at once, and what one measure costs in another.

Legend: T trials. Options are arrays (T,) of positive numbers, drawn in their logarithm, or of words. Wrong shapes
raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cae.figures import COLOURS, INK, MUTED, RULE, finished
from cae.plots import plot_style

LEVEL = matplotlib.colormaps["viridis"]


def search_effects(
    options: Mapping[str, np.ndarray], score: np.ndarray, importance: Mapping[str, float], best: int, name: str
) -> Figure:
    """A panel an option, the most important first: each trial's value against its score (T,), which `name` describes.

    importance: what shuffling the option takes from a forest's prediction of the score, in units of the score's
    variance. Trial `best` is marked, and so is the first, from which the search started.
    """
    _check("search_effects", options, score)
    order = sorted(options, key=lambda option: -importance[option])
    columns = min(4, len(order))
    rows = math.ceil(len(order) / columns)
    fig = Figure(figsize=(3.0 * columns, 2.5 * rows + 0.4), dpi=160, layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, sharey=True)
    for ax, option in zip(axes.flat, order, strict=False):
        values = options[option]
        ax.scatter(_numbers(values), score, s=22, color=COLOURS[0], alpha=0.75, linewidths=0)
        for trial, colour, marker in ((0, INK, "s"), (best, COLOURS[1], "*")):
            size = 130 if marker == "*" else 42
            ax.scatter(_numbers(values)[trial], score[trial], s=size, color=colour, marker=marker, linewidths=0)
        _option_axis(ax, values)
        ax.set_title(f"{option}   {importance[option]:.2f}", fontsize=9.5, color=INK)
        plot_style(ax)
    for ax in axes.flat[len(order) :]:
        ax.set_visible(False)
    fig.supylabel(name, fontsize=9.5, color=INK)
    fig.supxlabel("square: where the search started; star: the best trial; number: importance", fontsize=9, color=MUTED)
    return finished(fig)


def search_parallel(options: Mapping[str, np.ndarray], score: np.ndarray, ended: np.ndarray, name: str) -> Figure:
    """Every trial as a line across one axis an option and, last, its score (T,), which colours it.

    Trials that have not `ended` (T,), but were stopped, are dashed.
    """
    _check("search_parallel", options, score)
    axes = {**options, name: score}
    fig = Figure(figsize=(1.25 * len(axes) + 1.2, 4.2), dpi=160, layout="constrained")
    ax = fig.subplots()
    heights = np.stack([_heights(values, option != name) for option, values in axes.items()])  # (options + 1, T)
    low, high = float(np.nanmin(score)), float(np.nanmax(score))
    norm = Normalize(low, high if high > low else low + 1e-6)
    for trial in np.argsort(score):
        width, style = (1.8, "-") if ended[trial] else (1.0, "--")
        ax.plot(heights[:, trial], color=LEVEL(norm(score[trial])), linewidth=width, linestyle=style, alpha=0.85)
    for k, values in enumerate(axes.values()):
        ax.axvline(k, color=RULE, linewidth=1, zorder=0)
        ends = (sorted(set(values))[0], sorted(set(values))[-1])
        for height, end in zip((-0.03, 1.03), ends if ends[0] != ends[1] else ("", ends[0]), strict=True):
            text = end if isinstance(end, str) else f"{end:.3g}"
            ax.text(k, height, text, ha="center", va="top" if height < 0 else "bottom", fontsize=8, color=MUTED)
    ax.set_xticks(range(len(axes)), list(axes))
    ax.tick_params(length=0, labelsize=9, labelcolor=INK, pad=14)
    ax.set(yticks=[], ylim=(-0.02, 1.02), xlim=(-0.3, len(axes) - 0.7))
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(ScalarMappable(norm, LEVEL), ax=ax, pad=0.02, aspect=30)
    bar.set_label(f"{name} (dashed: stopped early)", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, labelcolor=INK)
    bar.outline.set_visible(False)
    return finished(fig)


def pareto(measures: Mapping[str, np.ndarray], front: np.ndarray, best: int) -> Figure:
    """A panel a pair of measures (T,), more is better: trials on the front (T,) bool in colour, the best one a star.

    A trial is on the front if no other is as good in all measures and better in one.
    """
    _check("pareto", measures, front)
    pairs = list(combinations(measures, 2))
    fig = Figure(figsize=(3.5 * len(pairs), 3.3), dpi=160, layout="constrained")
    for ax, (across, up) in zip(fig.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        x, y = measures[across], measures[up]
        ax.scatter(x[~front], y[~front], s=22, color=MUTED, alpha=0.6, linewidths=0, label="dominated")
        ax.scatter(x[front], y[front], s=34, color=COLOURS[0], linewidths=0, label="on the front")
        ax.scatter(x[best], y[best], s=150, color=COLOURS[1], marker="*", linewidths=0, label="chosen")
        ax.set_xlabel(across, fontsize=9.5, color=INK)
        ax.set_ylabel(up, fontsize=9.5, color=INK)
        plot_style(ax)
    ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1.02))
    return finished(fig)


def _check(figure: str, arrays: Mapping[str, np.ndarray], last: np.ndarray) -> None:
    shapes = {name: np.shape(values) for name, values in arrays.items()}
    if not shapes or set(shapes.values()) != {(len(last),)} or not len(last):
        raise ValueError(f"{figure}: arrays {shapes} must all be ({len(last)},), one value a trial")


def _words(values: np.ndarray) -> bool:
    return not np.issubdtype(np.asarray(values).dtype, np.number)


def _numbers(values: np.ndarray) -> np.ndarray:
    """Numbers as they are, words as their place in the alphabet."""
    return np.unique(values, return_inverse=True)[1].astype(float) if _words(values) else np.asarray(values, float)


def _heights(values: np.ndarray, log: bool) -> np.ndarray:
    """Where on an axis from 0 to 1 the values lie; all in the middle if they are alike."""
    numbers = _numbers(values)
    numbers = np.log(numbers) if log and not _words(values) else numbers
    low, high = numbers.min(), numbers.max()
    return (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)


def _option_axis(ax: Axes, values: np.ndarray) -> None:
    if _words(values):
        words = np.unique(values)
        ax.set_xticks(range(len(words)), list(words))
        ax.set_xlim(-0.5, len(words) - 0.5)
        return
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=5))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
