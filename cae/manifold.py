"""The global side: class codes as points, their projections, those that stand for a class, how well they tell the
classes apart, and new ones between.

Legend: N images, D numbers in the class code, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TSNE_POINTS = 4000  # t-SNE's cost grows faster than the number of points
NEIGHBOURS = 10  # of each code in the graph that guided paths run along
WAYPOINTS = 16  # of a guided path


@dataclass(frozen=True, eq=False)
class Projections:
    """Class codes in the plane."""

    pca: np.ndarray
    """(N, 2), principal axes fitted on the training codes."""
    variance: tuple[float, float]
    """Share of the training codes' variance along each axis; 0 where they do not vary."""
    tsne: np.ndarray
    """(N, 2), t-SNE; NaN beyond TSNE_POINTS points."""


def project(codes: np.ndarray, training: np.ndarray, seed: int = 0, threads: int | None = None) -> Projections:
    """Project codes (N, D) to the plane, on so many threads at most; `training` (N,) says which are training codes."""
    from sklearn.decomposition import PCA  # in functions: workers need none of scikit-learn, slow to import
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    fitted = codes[training] if training.sum() > 2 else codes
    pca = PCA(2, random_state=seed).fit(fitted)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(codes))[:TSNE_POINTS])
    tsne = np.full((len(codes), 2), np.nan)
    perplexity = min(30.0, max(1.0, (len(chosen) - 1) / 4))
    # Codes that are all equal have no axes to start from: scikit-learn would divide by zero and crash the process.
    init = "pca" if np.ptp(codes[chosen], axis=0).any() else "random"
    with threadpool_limits(threads):  # t-SNE's own `n_jobs` is of its search for neighbours only
        tsne[chosen] = TSNE(2, perplexity=perplexity, init=init, random_state=seed).fit_transform(codes[chosen])
    first, second = pca.explained_variance_ratio_ if np.ptp(fitted, axis=0).any() else (0.0, 0.0)
    return Projections(pca.transform(codes), (float(first), float(second)), tsne)


def medoids(codes: np.ndarray, classes: np.ndarray, count: int = 1) -> dict[int, np.ndarray]:
    """For each class the `count` images whose codes lie nearest to the class's mean code, nearest first.

    codes (N, D), classes (N,) -> class -> indices. The nearest is the class's medoid in the sense used here.
    """
    found = {}
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        distance = np.linalg.norm(codes[members] - codes[members].mean(0), axis=1)
        found[int(label)] = members[np.argsort(distance, kind="stable")[:count]]
    return found


class TrainingCodes:
    """Training codes (M, D): how far other codes are from them, and paths that stay among them.

    Memory grows with M, and so does the time of a path: thousands are enough.
    """

    def __init__(self, codes: np.ndarray) -> None:
        from sklearn.neighbors import NearestNeighbors

        self._codes = codes
        self._nearest = NearestNeighbors(n_neighbors=2).fit(codes)
        self._typical = max(float(np.median(self._nearest.kneighbors(codes)[0][:, 1])), 1e-12)

    def distance_to(self, codes: np.ndarray) -> np.ndarray:
        """Distance (N,) of codes (N, D) to the nearest training code, over the typical nearest one among those.

        About 1: as close as training codes are to each other; much more: an image unlike those that the CAE learned
        from. A training code itself has distance 0, so the number says something of new images only. NaN for a code
        that is not finite.
        """
        distance = np.full(len(codes), np.nan)
        finite = np.isfinite(codes).all(1)
        if finite.any():
            distance[finite] = self._nearest.kneighbors(codes[finite], 1)[0][:, 0] / self._typical
        return distance

    def guided(self, starts: np.ndarray, ends: np.ndarray, waypoints: int = WAYPOINTS) -> np.ndarray:
        """Waypoints (N, waypoints, D) of the shortest paths from codes `starts` to `ends` (N, D) by way of these.

        A path runs along the edges of the graph that joins every training code to its `NEIGHBOURS` nearest; its start
        and end are joined to theirs. The waypoints divide it into equal lengths, the last is the end. So it goes where
        images are, and only as far into the empty as a straight way between neighbours does. Paths from or to codes
        that are not finite are NaN.
        """
        from scipy.sparse import block_array, csr_array
        from scipy.sparse.csgraph import dijkstra

        found = np.full((len(starts), waypoints, starts.shape[1]), np.nan)
        fine = np.flatnonzero(np.isfinite(starts).all(1) & np.isfinite(ends).all(1))
        if not len(fine):
            return found
        targets, which = np.unique(ends[fine], axis=0, return_inverse=True)
        # Edges lead from the ends to training codes, among those, and from those to the starts: a search from the ends
        # passes no other start or end, so that a path depends on its own only.
        into, out = self._edges(starts[fine]).T, self._edges(targets)
        size, first = len(self._codes), len(self._codes) + len(fine)  # nodes: training codes, starts from `size`, ends
        shut = csr_array((len(fine), len(fine))), csr_array((len(targets), len(targets)))
        graph = block_array([[self._graph, into, None], [None, shut[0], None], [out, None, shut[1]]], format="csr")
        _, before = dijkstra(graph, indices=first + np.arange(len(targets)), return_predecessors=True)
        points = np.concatenate([self._codes, starts[fine], targets])
        for i, (row, end) in enumerate(zip(fine, which, strict=True)):
            nodes = [size + i]
            while nodes[-1] != first + end:
                nodes.append(before[end, nodes[-1]])
            found[row] = _evenly(points[nodes], waypoints)
        return found

    @cached_property
    def _graph(self) -> csr_array:
        """Lengths (M, M) of the edges between training codes, both ways; all codes can be reached."""
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import connected_components
        from sklearn.neighbors import NearestNeighbors

        graph = self._edges()
        graph = graph.maximum(graph.T)
        # Boruvka's algorithm: each part by its shortest edge to another one, until there is one part.
        while (found := connected_components(graph, directed=False))[0] > 1:
            bridges = []
            for part in range(found[0]):
                inside, outside = np.flatnonzero(found[1] == part), np.flatnonzero(found[1] != part)
                length, nearest = (
                    NearestNeighbors(n_neighbors=1).fit(self._codes[outside]).kneighbors(self._codes[inside])
                )
                best = int(length.argmin())
                bridges.append((length[best, 0], inside[best], outside[nearest[best, 0]]))
            lengths, here, there = zip(*bridges, strict=True)
            added = csr_array((lengths, (here, there)), shape=graph.shape)
            graph = graph.maximum(added.maximum(added.T))
        return graph

    def _edges(self, codes: np.ndarray | None = None) -> csr_array:
        """Lengths (N, M) of the edges from codes (N, D), or from the training codes themselves, to their nearest."""
        from scipy.sparse import csr_array

        others = len(self._codes) - (codes is None)
        edges = csr_array(self._nearest.kneighbors_graph(codes, min(NEIGHBOURS, others), mode="distance"))
        edges.data = edges.data.clip(min=1e-9 * self._typical)  # an entry of 0 is no edge
        return edges


def _evenly(points: np.ndarray, count: int) -> np.ndarray:
    """The `count` points (count, D) that divide the polyline through points (n, D) into equal lengths, its end last."""
    reached = np.concatenate([[0], np.linalg.norm(np.diff(points, axis=0), axis=1).cumsum()])
    at = np.linspace(0, reached[-1], count + 1)[1:]
    return np.stack([np.interp(at, reached, column) for column in points.T], 1)


def separability(codes: ArrayLike, labels: ArrayLike, seed: int = 0,
                 groups: ArrayLike | None = None) -> dict[str, float | str]:  # fmt: skip
    """How well class codes (N, D) tell the classes `labels` (N,) apart, by stratified cross-validation; Table III.

    Accuracy `_mean` and `_std` over the folds (scikit-learn's settings; the paper names none) of a random `forest`,
    of a `stump` (one threshold on one coordinate) and of the nearest neighbour, `1nn`, all on the same folds; of the
    forest where no group of `groups` (N,), a patient's images say, is parted by a fold, `forest_grouped`: images of one
    patient are alike, whatever the codes are worth (in `folds_grouped`, ten or as many as a class has groups; not a
    number without groups, or where a class is all one group);
    `effective_dimension`, the participation ratio of the covariance's eigenvalues, 1 .. D (0 if all codes are equal);
    `two_component_share` of the variance; `folds`, ten or the smallest class's size, which `note` then says.
    Raises ValueError if there is one class only, or a class with fewer than 2 codes.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.tree import DecisionTreeClassifier

    points, classes = np.asarray(codes, np.float64), np.asarray(labels)
    if points.ndim != 2 or classes.shape != points.shape[:1]:
        raise ValueError(f"codes {points.shape} and labels {classes.shape} do not fit: pass (N, D) and (N,)")
    if not np.isfinite(points).all():
        raise ValueError("codes hold values that are not finite: leave out the images that failed to embed")
    names, counts = np.unique(classes, return_counts=True)
    if len(names) < 2:
        raise ValueError(f"codes come from {len(names)} class: separability needs at least 2 classes")
    rarest = counts.argmin()
    if counts[rarest] < 2:
        raise ValueError(f"class {names[rarest]} has 1 code: cross-validation needs at least 2, add images or drop it")
    folds = min(10, int(counts[rarest]))
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(points, classes))
    spread = np.linalg.eigvalsh(np.atleast_2d(np.cov(points, rowvar=False)))[::-1].clip(0)
    varied = spread.sum() > 0
    result: dict[str, float | str] = {
        "effective_dimension": float(spread.sum() ** 2 / (spread**2).sum()) if varied else 0.0,
        "two_component_share": float(spread[:2].sum() / spread.sum()) if varied else 1.0,
        "folds": folds,
        "note": "" if folds == 10 else f"{folds} folds: class {names[rarest]} has only {counts[rarest]} codes",
    }
    models = {
        "forest": RandomForestClassifier(random_state=seed),
        "stump": DecisionTreeClassifier(max_depth=1, random_state=seed),
        "1nn": KNeighborsClassifier(1),
    }
    for name, model in models.items():
        scores = cross_val_score(model, points, classes, cv=splits)
        result |= {f"{name}_mean": float(scores.mean()), f"{name}_std": float(scores.std())}
    scores, most = np.array([np.nan]), 0
    if groups is not None:
        apart = np.unique(np.asarray(groups), return_inverse=True)[1]
        most = min(10, *(len(np.unique(apart[classes == name])) for name in names))
    if most > 1:
        by_group = StratifiedGroupKFold(most, shuffle=True, random_state=seed)
        scores = cross_val_score(models["forest"], points, classes, groups=apart, cv=by_group)
    return result | {"forest_grouped_mean": float(scores.mean()), "forest_grouped_std": float(scores.std()),
                     "folds_grouped": most if most > 1 else 0}  # fmt: skip


def smote_codes(
    codes: np.ndarray, labels: np.ndarray, per_class: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """New class codes (C * per_class, D) and their labels, by SMOTE (Chawla et al. 2002; Section IV-F3).

    Each lies at a random place between a code of the class, drawn at random, and one of its 5 nearest neighbours of
    that class; class by class, without the codes (N, D) given. SMOTE needs 2 classes and 6 codes in each: ValueError.
    """
    from imblearn.over_sampling import SMOTE  # brings scikit-learn

    neighbours = 5
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise ValueError(f"codes come from {len(names)} class: SMOTE needs at least 2 classes")
    rarest = counts.argmin()
    if counts[rarest] <= neighbours:
        raise ValueError(f"class {names[rarest]} has {counts[rarest]} codes: SMOTE needs at least {neighbours + 1}")
    wanted = {name: count + per_class for name, count in zip(names.tolist(), counts.tolist(), strict=True)}
    with warnings.catch_warnings():
        # It warns that classes grow beyond the largest one, which is what is wanted.
        warnings.filterwarnings("ignore", "After over-sampling", UserWarning)
        found, classes = SMOTE(sampling_strategy=wanted, k_neighbors=neighbours, random_state=seed).fit_resample(
            codes, labels
        )
    return found[len(codes) :], classes[len(codes) :]  # it puts the new ones after those given
