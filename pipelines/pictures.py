"""The pictures of a run: what stage evaluate draws, name -> caption and figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cae import classifiers, figures, plots, training
from cae.classifiers import BlackBox
from cae.explain import explain
from cae.images import to_array, to_tensor
from cae.metrics import PATCH
from cae.networks import CAE
from pipelines import tables, tracking
from pipelines.bulk import read_images, read_part
from pipelines.explain import path_options
from pipelines.measure import CONTROLS, SMOOTHED, walk, waypoints_of
from pipelines.run import Run
from pipelines.ways import read_ways

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateOptions

Pictures = dict[str, tuple[str, Figure]]
SAMPLES = 8  # images that are drawn, a class' share of them at least one each,
MOST_SAMPLES = 24  # and of many classes so many
CLASSES = 40  # most that a table of swaps is drawn of
STRIPS = 6  # rows of the swap grid and of the dragged codes
FILLS = {"uniform": "noise", "blur": "the image itself, heavily blurred", "inpaint": "a smooth in-fill"}


def plot_numbers(run: Run, options: EvaluateOptions, rows: pd.DataFrame, maps: pd.DataFrame,
                 found: dict[str, pd.DataFrame], headline: str, names: tuple[str, ...]) -> Pictures:  # fmt: skip
    """Class codes, paths between them, perturbation curves, differences of AOPC, and training."""
    points = read_part(run, "manifold/projections.parquet").to_pandas()
    projections = {"PCA": points[["pca_1", "pca_2"]].to_numpy()}
    if points.tsne_1.notna().sum() > 2:
        projections["t-SNE"] = points[["tsne_1", "tsne_2"]].to_numpy()
    pictures = {"manifold": (
        "Class codes by split, of three splits at most; colour is the classifier's prediction.",
        plots.manifold(projections, points.predicted.to_numpy(), names, points.split.to_numpy()),
    )}  # fmt: skip
    swapped = tables.each_swap(rows[rows.split == headline])
    of_swaps = swapped.loc[swapped.swap_predicted >= 0, ["swap_target", "swap_predicted"]].to_numpy(int)
    present = np.unique(of_swaps)
    if 0 < len(present) <= CLASSES:
        matrix = np.zeros((len(present), len(present)), int)
        np.add.at(matrix, tuple(np.searchsorted(present, of_swaps).T), 1)
        pictures["swap_classes"] = (
            f"Images of {headline} rebuilt with another's class code: the class of the code put in, and the one that "
            "the classifier then sees.",
            plots.confusion(matrix, [names[label] for label in present], "Swaps", "class of the code", "class seen"),
        )
    ways = tables.ways_by_direction(rows, headline, names)
    if ways:
        pictures["smoothness"] = (
            f"The classifier's probability of the donor's class on the straight way from the class code of an image of "
            f"{headline} to that of a random image of another class; in red the mean. Monotone: it never falls by more "
            f"than {tables.DIP}.",
            plots.smoothness({k: p for k, (p, _) in ways.items()}, {k: share for k, (_, share) in ways.items()}),
        )
    curves = tables.curve_rows(maps)
    if len(curves):
        curves = curves[curves.split == headline]
    for fill, group in curves.groupby("fill", sort=False) if len(curves) else ():
        means = {name: np.stack(part.long.to_list()).mean(0) for name, part in group.groupby("method", sort=False)}
        means = _better_forms(means)
        covered = np.arange(1, len(next(iter(means.values()))) + 1) * PATCH**2 / options.model.image_size**2
        pictures["perturbation" if fill == "uniform" else f"perturbation_{fill}"] = (
            f"Mean fall of the probability of the predicted class over {group.id.nunique()} images of {headline}, by "
            f"the share of the image destroyed in disjoint {PATCH}x{PATCH} patches, filled with {FILLS[str(fill)]}; "
            "of a peer's maps as they are and smoothed, those that do better. AOPC in the tables is the mean over the "
            f"first {len(group.disjoint.iloc[0])} patches.",
            plots.perturbation_curves(means, covered),
        )
    aopc = found["perturbation"].query("split == @headline and measure == 'aopc' and form == 'disjoint'")
    compared = aopc.dropna(subset="low")
    if len(compared):
        panels = {
            str(fill): {row.method: (row.cae_minus_this, row.low, row.high) for row in part.itertuples()}
            for fill, part in compared.groupby("fill", sort=False)
        }
        told = {str(fill): set(part.method[part.told]) for fill, part in compared.groupby("fill")}
        pictures["differences"] = (
            f"By how much CAE's AOPC over disjoint patches is ahead of each method's on {headline}: mean and 95% "
            "interval, paired over images, by fill; all: the mean of the fills. Hollow, with a star: a method that "
            "fills its own queries in the same way.",
            plots.differences(panels, told, "CAE's AOPC minus the method's"),
        )
    history = tracking.read_history(run, "train")
    if history:
        caption = "What training logged: loss terms before their weights, their sums, and held-out swaps."
        pictures["training"] = (caption, plots.training_curves(history))
    return pictures


@torch.no_grad()
def draw_examples(run: Run, options: EvaluateOptions, rows: pd.DataFrame, maps: pd.DataFrame,
                  names: tuple[str, ...]) -> Pictures:  # fmt: skip
    """Swaps, paths and maps of a few images: of the same ones, as far as those whose maps are kept are swapped too."""
    blackbox, cae = classifiers.load(run.result("classify")["spec"], names), training.load(run.path("cae"))
    kept = maps.dropna(subset="map") if len(maps) else maps
    mapped = rows[rows.id.isin(set(kept.id))] if len(kept) else rows
    both = mapped.dropna(subset="donor")
    donated = both if len(both) else rows.dropna(subset="donor")
    pictures: Pictures = {}
    swapped, sample = _few(donated, options.seed), _few(both if len(both) else mapped, options.seed)
    ids = np.concatenate([sample.id, swapped.id, swapped.donor])  # at once: it opens every shard
    found = read_images(run, ids, options.model.image_size, options.fit)
    images, originals, donors = np.split(found, [len(sample), len(sample) + len(swapped)])
    if len(swapped):
        pictures |= _swaps(cae, blackbox, swapped, originals, donors, names)
    if len(kept):
        pictures["maps"] = (
            f"Maps by every method, over their images, each in its own scale. CAE's mode is {options.mode}.",
            _maps(kept, sample, images, names),
        )
    return pictures | _paths(run, options, cae, blackbox, images, sample.id.to_numpy(), names)


def _few(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Some images of every class, chosen by the seed and not by their looks."""
    if rows.empty:
        return rows
    rows = rows.sort_values("id").groupby("source").sample(frac=1, random_state=seed)
    return rows.groupby("source").head(max(1, SAMPLES // rows.source.nunique())).head(MOST_SAMPLES)


def _swaps(cae: CAE, blackbox: BlackBox, sample: pd.DataFrame, images: np.ndarray, donors: np.ndarray,
           names: tuple[str, ...]) -> Pictures:  # fmt: skip
    """Class codes put into other images, and on the way there."""
    code, individual = cae.encode(to_tensor(images))
    given = cae.encode(to_tensor(donors))[0]
    target = torch.tensor(sample.swap_target.to_numpy(int))
    frames, p = walk(cae, blackbox, code, given[:, None], individual, target)
    ways = [f"{names[a]} → {names[b]}" for a, b in zip(sample.source, target.tolist(), strict=True)]
    captions = [f"{way}\np={float(chance):.2f}" for way, chance in zip(ways, p[:, -1], strict=True)]
    return {
        "swaps": (
            "Originals, reconstructions, and originals with the class code of the donor below; p is the classifier's "
            "probability of the donor's class.",
            figures.swaps(images, to_array(frames[:, 0]), to_array(frames[:, -1]), donors, captions),
        ),
        "swap_grid": (
            "Every class code (left) with every individual code (top); below each, the classifier's probability of the "
            "class of the code's donor.",
            _swap_grid(cae, blackbox, images, individual, donors, given, target, names),
        ),
        "dragged_codes": (
            "The class code dragged from the image's own to the donor's, the individual code kept; below each frame, "
            "the classifier's probability of the donor's class.",
            figures.dragged_codes(
                images[:STRIPS], np.stack([to_array(strip) for strip in frames[:STRIPS]]), p[:STRIPS].numpy(),
                donors[:STRIPS], ways[:STRIPS],
            ),
        ),
    }  # fmt: skip


def _maps(kept: pd.DataFrame, sample: pd.DataFrame, images: np.ndarray, names: tuple[str, ...]) -> Figure:
    """The maps that are kept of the images of a sample, by method."""
    shown = kept[~kept.method.isin(CONTROLS) & ~kept.method.str.endswith(SMOOTHED)]
    table = shown.pivot(index="id", columns="method", values="map").reindex(sample.id)
    by_method = {
        method: np.stack([
            np.full(images.shape[1:3], np.nan) if np.isscalar(heat)
            else np.asarray(heat, np.float32).reshape(images.shape[1:3])
            for heat in table[method]
        ])
        for method in shown.method.unique()
    }  # fmt: skip
    return figures.maps_by_method(images, by_method, [names[label] for label in sample.source])


def _swap_grid(cae: CAE, blackbox: BlackBox, images: np.ndarray, individual: Tensor, donors: np.ndarray, given: Tensor,
               target: Tensor, names: tuple[str, ...]) -> Figure:  # fmt: skip
    # Donors of every class in turn.
    order = np.argsort(pd.Series(target.numpy()).groupby(target.numpy()).cumcount().to_numpy(), kind="stable")[:STRIPS]
    combined, p = [], []
    for i in order:
        made = cae.decode(given[i].expand(len(images), -1), individual)
        combined.append(to_array(made))
        p.append(blackbox.probabilities(made)[:, target[i]].numpy())
    captions = [names[int(target[i])] for i in order]
    return figures.swap_grid(images, donors[order], np.stack(combined), captions, np.stack(p))


def _better_forms(curves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a method's curves for its maps as they are and smoothed, the one with the greater mean."""
    best: dict[str, str] = {}
    for name, curve in curves.items():
        method = name.removesuffix(SMOOTHED)
        if method not in best or curve.mean() > curves[best[method]].mean():
            best[method] = name
    return {name: curves[name] for name in best.values()}


def _paths(run: Run, options: EvaluateOptions, cae: CAE, blackbox: BlackBox, images: np.ndarray,
           ids: np.ndarray, names: tuple[str, ...]) -> Pictures:  # fmt: skip
    """The way of each image to the class that explains it, and its map."""
    ways = read_ways(run, options)
    x = to_tensor(images)
    ranked = blackbox.probabilities(x).argsort(dim=1, descending=True, stable=True)
    asked = {names.index(ways.targets)} & set(ways.ends) if ways.targets in names else set(ways.ends)
    aims = [next((t for t in r.tolist()[1:] if t in asked), -1) for r in ranked]  # -1: nothing to walk to
    walks = [i for i, t in enumerate(aims) if t >= 0]
    if not walks:
        return {}
    images, x, source, target = images[walks], x[walks], ranked[walks, 0], torch.tensor(aims)[walks]
    code, _ = cae.encode(x)
    waypoints, counts = waypoints_of(ways, ids[walks].tolist(), code, target)
    way = waypoints[np.cumsum([0, *counts])[:-1]]  # of several counter codes the first
    found = explain(cae, blackbox, x, source, target, way, **path_options(options))
    captions = [
        f"{names[int(a)]} → {names[int(b)]}\n{s}" + (f" at {at:.2f}" if s == "flipped" and not at.isnan() else "")
        for a, b, s, at in zip(source, target, found.status, found.flip_at, strict=True)
    ]
    frames, p = walk(cae, blackbox, code, way, found.individual_code, target)
    strips = [to_array(strip) for strip in frames]
    return {
        "paths": (
            "The way from each image to its counterfactual, with the classifier's probability of the target class, the "
            "map, and the map on the image.",
            figures.path_strips(strips, list(p.numpy()), images, found.map.numpy(), captions),
        )
    }
