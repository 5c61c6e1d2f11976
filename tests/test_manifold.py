from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cae import manifold
from cae.manifold import TrainingCodes, medoids, project, smote_codes


def distance_to(codes: np.ndarray, training: np.ndarray) -> np.ndarray:
    return TrainingCodes(training).distance_to(codes)


def clusters(count: int = 40, classes: int = 3, dim: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, D) around one far centre a class, in mixed order, and their classes (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), count))
    return (rng.normal(size=(classes, dim)) * 10)[labels] + rng.normal(size=(len(labels), dim)), labels


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_medoids_against_slow(count: int) -> None:
    codes, labels = clusters()
    labels = labels * 2 + 1  # classes need not be 0, 1, 2
    found = medoids(codes, labels, count)
    assert list(found) == [1, 3, 5]
    for label, indices in found.items():
        members = [i for i in range(len(codes)) if labels[i] == label]
        mean = sum(codes[i] for i in members) / len(members)
        ranked = sorted(members, key=lambda i: float(np.sqrt(((codes[i] - mean) ** 2).sum())))
        assert indices.tolist() == ranked[:count]


def test_medoids_of_equal_codes_and_single_members() -> None:
    found = medoids(np.ones((5, 8)), np.array([0, 1, 0, 1, 4]), 2)
    assert {label: indices.tolist() for label, indices in found.items()} == {0: [0, 2], 1: [1, 3], 4: [4]}
    assert medoids(np.ones((0, 8)), np.zeros(0, int)) == {}


def test_axes_come_from_the_training_codes_alone() -> None:
    codes, _ = clusters()
    training = np.arange(len(codes)) % 3 > 0
    found = project(codes, training)
    assert found.pca.shape == found.tsne.shape == (len(codes), 2)

    # Slowly: the two leading eigenvectors of the training codes' covariance, up to their signs.
    centred = codes - codes[training].mean(0)
    values, vectors = np.linalg.eigh(np.cov(codes[training].T))
    expected = centred @ vectors[:, ::-1][:, :2]
    assert np.allclose(found.pca * np.sign((found.pca * expected).sum(0)), expected, atol=1e-8)
    assert found.variance == pytest.approx(values[::-1][:2] / values.sum())

    # Other images, however far off, change neither the axes nor where the training codes lie.
    moved = codes.copy()
    moved[~training] += 1e4 * np.arange(8)
    again = project(moved, training)
    assert np.allclose(again.pca[training], found.pca[training]) and again.variance == pytest.approx(found.variance)
    assert not np.allclose(again.pca[~training], found.pca[~training])


def test_axes_of_an_archive_without_training_codes() -> None:
    codes, _ = clusters()
    nobody, everybody = project(codes, np.zeros(len(codes), bool)), project(codes, np.ones(len(codes), bool))
    assert np.allclose(nobody.pca, everybody.pca)


def test_tsne_keeps_neighbours_together_and_is_repeatable() -> None:
    codes, labels = clusters()
    training = np.ones(len(codes), bool)
    found = project(codes, training, seed=1)
    assert np.isfinite(found.tsne).all()
    neighbours = KNeighborsClassifier(6).fit(found.tsne, labels)
    assert neighbours.score(found.tsne, labels) == 1
    assert np.array_equal(project(codes, training, seed=1).tsne, found.tsne)


def test_tsne_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "TSNE_POINTS", 25)
    codes, _ = clusters()
    found = project(codes, np.ones(len(codes), bool), seed=3)
    drawn = np.isfinite(found.tsne).all(1)
    assert drawn.sum() == 25 and np.isnan(found.tsne[~drawn]).all()
    assert np.isfinite(found.pca).all()
    # The points drawn are a random part of all, the same for a seed, another for another.
    other = np.isfinite(project(codes, np.ones(len(codes), bool), seed=4).tsne).all(1)
    assert other.sum() == 25 and (other != drawn).any()
    assert drawn[:60].any() and drawn[60:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("count", [5, 50, 200])
def test_equal_codes_do_no_harm(count: int) -> None:
    """A collapsed class encoder gives them; t-SNE started from their principal axes ends the process."""
    codes = np.full((count, 8), 0.3, np.float32)
    training = np.arange(count) % 2 == 0
    found = project(codes, training)
    assert np.isfinite(found.tsne).all() and np.abs(found.pca).max() < 1e-4 and found.variance == (0, 0)
    assert not distance_to(codes, codes).any()

    codes[1] += 1  # one that is no training code differs
    found = project(codes, training)
    assert np.isfinite(found.tsne).all() and np.isfinite(found.pca).all() and found.variance == (0, 0)
    assert np.isfinite(distance_to(codes, codes[training])).all()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_codes(count: int) -> None:
    codes, _ = clusters(count, classes=1)
    found = project(codes, np.ones(count, bool))
    assert found.pca.shape == (count, 2) and np.isfinite(found.pca).all() and np.isfinite(found.tsne).all()


def test_distance_against_slow() -> None:
    training, _ = clusters(30, classes=2)
    codes, _ = clusters(10, classes=2, seed=7)
    between = np.array([sorted(np.linalg.norm(training - code, axis=1))[1] for code in training])  # [0] is itself
    expected = [min(np.linalg.norm(training - code, axis=1)) / np.median(between) for code in codes]
    assert np.allclose(distance_to(codes, training), expected)


def test_distance_of_training_codes_new_codes_and_strangers() -> None:
    codes, _ = clusters(200, classes=1)
    training, new = codes[:150], codes[150:]
    assert np.allclose(distance_to(training, training), 0, atol=1e-6)
    assert 0.8 < np.median(distance_to(new, training)) < 1.25
    assert (distance_to(new + 50, training) > 10).all()
    # In units of the training codes' own distances: the same whatever the code's scale.
    assert np.allclose(distance_to(new * 1000, training * 1000), distance_to(new, training))


def on_a_segment(point: np.ndarray, members: np.ndarray, neighbours: int) -> bool:
    """Whether a point lies between a code and one of its nearest neighbours, tried one pair after the other."""
    for i, start in enumerate(members):
        distance = [np.linalg.norm(start - other) for other in members]
        for j in [j for j in np.argsort(distance) if j != i][:neighbours]:
            way = members[j] - start
            share = (point - start) @ way / (way @ way)
            if 0 <= share <= 1 and np.allclose(start + share * way, point, atol=1e-6):
                return True
    return False


def test_smote_codes_lie_between_neighbours_of_their_class() -> None:
    codes, labels = clusters(count=12)
    kept = np.flatnonzero((labels > 0) | (np.cumsum(labels == 0) <= 6))  # class 0 has as few as SMOTE can do with
    codes, labels = codes[kept], labels[kept] * 2 + 1
    found, classes = smote_codes(codes, labels, per_class=25, seed=1)
    assert found.shape == (75, 8) and classes.tolist() == [1] * 25 + [3] * 25 + [5] * 25
    for point, label in zip(found, classes, strict=True):
        assert on_a_segment(point, codes[labels == label], 5)
    assert len(np.unique(found, axis=0)) == 75
    assert np.array_equal(found, smote_codes(codes, labels, per_class=25, seed=1)[0])
    assert not np.array_equal(found, smote_codes(codes, labels, per_class=25, seed=2)[0])


def test_smote_codes_says_what_it_needs() -> None:
    codes, labels = clusters(count=6, classes=2)
    with pytest.raises(ValueError, match="class 1 has 5 codes: SMOTE needs at least 6"):
        smote_codes(np.delete(codes, np.argmax(labels == 1), 0), np.delete(labels, np.argmax(labels == 1)))
    with pytest.raises(ValueError, match="1 class: SMOTE needs at least 2"):
        smote_codes(codes, np.zeros(12, int))
