"""The global side: class codes as points, their projections, those that stand for a class, and new ones between.

Legend: N images, D numbers in the class code, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

TSNE_POINTS = 4000  # t-SNE's cost grows faster than the number of points


@dataclass(frozen=True, eq=False)
class Projections:
    """Class codes in the plane."""

    pca: np.ndarray
    """(N, 2), principal axes fitted on the training codes."""
    variance: tuple[float, float]
    """Share of the training codes' variance along each axis; 0 where they do not vary."""
    tsne: np.ndarray
    """(N, 2), t-SNE; NaN beyond TSNE_POINTS points."""


def project(codes: np.ndarray, training: np.ndarray, seed: int = 0) -> Projections:
    """Project codes (N, D) to the plane; `training` (N,) says which are training codes."""
    from sklearn.decomposition import PCA  # in functions: workers need none of scikit-learn, slow to import
    from sklearn.manifold import TSNE

    fitted = codes[training] if training.sum() > 2 else codes
    pca = PCA(2, random_state=seed).fit(fitted)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(codes))[:TSNE_POINTS])
    tsne = np.full((len(codes), 2), np.nan)
    perplexity = min(30.0, max(1.0, (len(chosen) - 1) / 4))
    # Codes that are all equal have no axes to start from: scikit-learn would divide by zero and crash the process.
    init = "pca" if np.ptp(codes[chosen], axis=0).any() else "random"
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
    """Training codes (M, D), to say how far other codes are from them."""

    def __init__(self, codes: np.ndarray) -> None:
        from sklearn.neighbors import NearestNeighbors

        self._nearest = NearestNeighbors(n_neighbors=2).fit(codes)
        self._typical = max(float(np.median(self._nearest.kneighbors(codes)[0][:, 1])), 1e-12)

    def distance_to(self, codes: np.ndarray) -> np.ndarray:
        """Distance (N,) of codes (N, D) to the nearest training code, over the typical nearest one among those.

        About 1: as close as training codes are to each other; much more: an image unlike those that the CAE learned
        from. A training code itself has distance 0, so the number says something of new images only.
        """
        return self._nearest.kneighbors(codes, 1)[0][:, 0] / self._typical


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
