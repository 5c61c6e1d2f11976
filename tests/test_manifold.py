from __future__ import annotations

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_info, threadpool_limits

from cae import manifold
from cae.manifold import TrainingCodes, medoids, project, separability, smote_codes


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


def test_tsne_leaves_cores_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fit_transform(_: TSNE, codes: np.ndarray) -> np.ndarray:
        asked.append(max(library["num_threads"] for library in threadpool_info()))
        return codes[:, :2]

    monkeypatch.setattr(TSNE, "fit_transform", fit_transform)
    codes, _ = clusters()
    with threadpool_limits(3):  # as many as nobody says, whatever the machine has
        project(codes, np.ones(len(codes), bool))
        project(codes, np.ones(len(codes), bool), threads=2)
        project(codes, np.ones(len(codes), bool))
    assert asked == [3, 2, 3]


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


def test_distance_of_codes_that_are_not_finite() -> None:
    codes, _ = clusters()
    strange = codes[:3].copy()
    strange[1, 4] = np.nan
    assert np.isnan(distance_to(strange, codes)).tolist() == [False, True, False]


def slow_guided(codes: np.ndarray, start: np.ndarray, end: np.ndarray, neighbours: int) -> np.ndarray:
    """Corners of the shortest path from start to end, by Floyd and Warshall's algorithm on the whole matrix."""
    points = np.concatenate([codes, [start, end]])
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    count = len(codes)
    length = np.full((count + 2, count + 2), np.inf)
    for i in range(count + 2):
        nearest = [j for j in np.argsort(apart[i], kind="stable") if j != i and j < count][:neighbours]
        for j in nearest:
            length[i, j] = length[j, i] = apart[i, j]
    after = np.where(np.isfinite(length), np.arange(count + 2), -1)
    for k in range(count):
        shorter = length[:, k, None] + length[k] < length
        length = np.where(shorter, length[:, k, None] + length[k], length)
        after = np.where(shorter, after[:, k, None], after)
    way = [count]
    while way[-1] != count + 1:
        way.append(int(after[way[-1], count + 1]))
    return points[way]


def place_along(corners: np.ndarray, share: float) -> np.ndarray:
    """The place on a polyline after this share of its length, leg by leg."""
    legs = np.linalg.norm(np.diff(corners, axis=0), axis=1)
    left = share * legs.sum()
    for begin, end, leg in zip(corners[:-1], corners[1:], legs, strict=True):
        if left <= leg:
            return begin + (end - begin) * left / leg
        left -= leg
    return corners[-1]


def test_guided_paths_against_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "NEIGHBOURS", 4)
    rng = np.random.default_rng(0)
    codes = rng.uniform(size=(80, 2))
    starts, ends = rng.uniform(-0.2, 1.2, (7, 2)), np.repeat(rng.uniform(size=(4, 2)), 2, 0)[:7]
    ends[5] = codes[3]  # a training code, as counter codes are
    training = TrainingCodes(codes)
    found = training.guided(starts, ends, 6)
    assert found.shape == (7, 6, 2) and np.array_equal(found[:, -1], ends)
    legs = []
    for start, end, way in zip(starts, ends, found, strict=True):
        corners = slow_guided(codes, start, end, 4)
        legs.append(len(corners))
        assert np.allclose(way, [place_along(corners, k / 6) for k in range(1, 7)])
    assert max(legs) > 5
    # A path does not depend on those beside it.
    for k in range(7):
        assert np.array_equal(training.guided(starts[k : k + 1], ends[k : k + 1], 6)[0], found[k])


def test_guided_paths_stay_where_codes_are() -> None:
    """On half a circle, from tip to tip: a straight way would pass its centre."""
    angles = np.linspace(0, np.pi, 300)
    arc = np.stack([np.cos(angles), np.sin(angles)], 1)
    found = TrainingCodes(arc).guided(arc[:1], arc[-1:], 12)[0]
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    assert np.allclose(np.arctan2(found[:, 1], found[:, 0]), np.pi * np.arange(1, 13) / 12, atol=2e-2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_guided_paths_cross_gaps_where_they_are_narrowest(dtype: type) -> None:
    codes, labels = clusters(count=30, classes=4)
    codes = codes.astype(dtype)
    training = TrainingCodes(codes)
    graph = training._graph.toarray()
    assert np.array_equal(graph, graph.T)
    crossings = [(i, j) for i, j in np.argwhere(graph) if labels[i] != labels[j] and i < j]
    # Slowly: the least spanning tree of the classes, each pair of them as far apart as their nearest codes.
    joined, expected = {0}, set()
    while len(joined) < 4:
        pairs = [(i, j) for i in range(120) for j in range(120) if labels[i] in joined and labels[j] not in joined]
        i, j = min(pairs, key=lambda pair: float(np.linalg.norm(codes[pair[0]] - codes[pair[1]])))
        expected.add((min(i, j), max(i, j)))
        joined.add(labels[j])
    assert set(crossings) == expected
    for i, j in crossings:  # and a path from one class to the next goes over the bridge
        a, b = codes[labels == labels[i]][:1], codes[labels == labels[j]][:1]
        way = np.concatenate([a, training.guided(a, b, 2000)[0]])
        for end in (codes[i], codes[j]):
            assert np.linalg.norm(way - end, axis=1).min() < np.linalg.norm(codes[i] - codes[j]) / 50


def test_guided_paths_of_few_equal_and_broken_codes() -> None:
    two = np.array([[0.0, 0.0], [1.0, 0.0]])
    found = TrainingCodes(two).guided(np.array([[0.0, 1.0]]), np.array([[1.0, 1.0]]), 3)
    assert np.isfinite(found).all() and np.array_equal(found[0, -1], [1, 1])
    codes = np.repeat(np.random.default_rng(0).normal(size=(5, 8)), 20, 0)  # each of five codes twenty times
    found = TrainingCodes(codes).guided(codes[:1], codes[-1:], 10)
    assert np.isfinite(found).all() and np.array_equal(found[0, -1], codes[-1])
    same = np.full((50, 8), 0.3)
    assert np.array_equal(TrainingCodes(same).guided(same[:2], same[:2], 4), np.full((2, 4, 8), 0.3))
    starts, ends = codes[:4].copy(), codes[-4:].copy()
    starts[1, 0], ends[2, 3] = np.nan, np.inf
    found = TrainingCodes(codes).guided(starts, ends)
    assert np.isnan(found).all((1, 2)).tolist() == [False, True, True, False] and np.isfinite(found[[0, 3]]).all()
    assert TrainingCodes(codes).guided(codes[:0], codes[:0]).shape == (0, manifold.WAYPOINTS, 8)


def test_separability_of_two_clear_classes() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(["normal", "pneumonia"], 40)
    codes = rng.normal(size=(80, 8)) * 0.1
    codes[40:, 3] += 5
    found = separability(codes, labels, seed=0)
    assert found["forest_mean"] == found["stump_mean"] == found["1nn_mean"] == 1.0
    assert found["forest_std"] == 0.0 and found["folds"] == 10 and found["note"] == ""
    assert found["effective_dimension"] < 1.1  # type: ignore[operator]  # the classes differ along one axis
    assert found["two_component_share"] > 0.97  # type: ignore[operator]


def test_separability_stump_has_one_threshold() -> None:
    """One class between two groups of the other: two thresholds part them, one gets at most three in four."""
    groups = np.tile([0, 1, 2, 1], 10)
    codes = groups[:, None] + np.random.default_rng(0).normal(size=(40, 1)) * 0.01
    found = separability(codes, groups % 2)
    assert found["1nn_mean"] == found["forest_mean"] == 1.0
    assert found["stump_mean"] <= 0.75  # type: ignore[operator]
    assert found["effective_dimension"] == found["two_component_share"] == 1.0


def test_separability_nearest_neighbour_and_dimension_match_slow_definitions() -> None:
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [20, 15, 4])
    codes = rng.normal(size=(39, 4)) * [4, 2, 1, 0.5] + labels[:, None]
    found = separability(codes, labels, seed=3)
    scores = []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=3).split(codes, labels):
        nearest = [min(train, key=lambda j: float(np.sum((codes[i] - codes[j]) ** 2))) for i in test]
        scores.append(np.mean(labels[nearest] == labels[test]))
    assert found["1nn_mean"] == pytest.approx(np.mean(scores))
    assert found["1nn_std"] == pytest.approx(np.std(scores))
    assert str(found) == str(separability(codes, labels, seed=3))  # not a number is unequal to itself
    # Participation ratio without eigenvalues: trace(S)^2 / trace(S S).
    covariance = np.cov(codes.T)
    assert found["effective_dimension"] == pytest.approx(np.trace(covariance) ** 2 / np.trace(covariance @ covariance))
    singular = np.linalg.svd(codes - codes.mean(0), compute_uv=False) ** 2
    assert found["two_component_share"] == pytest.approx(singular[:2].sum() / singular.sum())


def test_separability_over_groups_is_not_fooled_by_images_that_are_alike() -> None:
    """Codes say whose image it is and nothing of the class: a fold that parts a patient's images reads it off them."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 4)
    labels = patients % 2
    codes = rng.normal(size=(30, 4))[patients] + rng.normal(size=(120, 4)) * 0.01
    found = separability(codes, labels, groups=patients)
    assert found["forest_mean"] > 0.95  # type: ignore[operator]
    assert 0.2 < found["forest_grouped_mean"] < 0.8 and found["folds_grouped"] == 10  # type: ignore[operator]
    scores = []
    for train, test in StratifiedGroupKFold(10, shuffle=True, random_state=0).split(codes, labels, patients):
        assert not set(patients[train]) & set(patients[test])
        forest = RandomForestClassifier(random_state=0).fit(codes[train], labels[train])
        scores.append(forest.score(codes[test], labels[test]))
    assert found["forest_grouped_mean"] == pytest.approx(np.mean(scores))
    assert found["forest_grouped_std"] == pytest.approx(np.std(scores))
    few = [0, 1, 4, 5, 8, 9]  # two images of one patient, of another and of a third one
    for groups, folds in ((None, 0), (labels[few], 0), (patients[few], 0), (range(6), 2)):
        found = separability(codes[few], labels[few], groups=groups)
        assert found["folds_grouped"] == folds and np.isnan(found["forest_grouped_mean"]) == (folds == 0)  # type: ignore[arg-type]


def test_separability_of_small_constant_and_impossible_codes() -> None:
    labels = np.repeat(["a", "b"], [12, 3])
    found = separability(np.ones((15, 8)), labels)
    assert found["folds"] == 3 and found["note"] == "3 folds: class b has only 3 codes"
    assert found["forest_mean"] == pytest.approx(12 / 15)  # nothing to learn: the larger class
    assert found["effective_dimension"] == 0 and found["two_component_share"] == 1
    with pytest.raises(ValueError, match="class b has 1 code"):
        separability(np.ones((13, 8)), labels[:13])
    with pytest.raises(ValueError, match="at least 2 classes"):
        separability(np.ones((12, 8)), labels[:12])
    with pytest.raises(ValueError, match="do not fit"):
        separability(np.ones((12, 8)), labels)


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
