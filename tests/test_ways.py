"""Where paths lead: which counter codes an image gets, and what the rows say of them."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from conftest import state

import pipelines.ways
from cae import classifiers, training
from cae.explain import Explanation, explain
from cae.images import decode, to_tensor
from cae.manifold import TrainingCodes
from pipelines import maps
from pipelines.bulk import matrix, read_table, read_unit, shard_units, write_table
from pipelines.classify import PredictWorker
from pipelines.command_line import parse
from pipelines.embed import EmbedWorker
from pipelines.explain import ExplainOptions, path_options
from pipelines.maps import ExplainWorker, choose_targets
from pipelines.mistakes import UserError
from pipelines.run import Run
from pipelines.ways import Ways, read_medoids, read_ways

RNG = np.random.default_rng(0)
POOL = {2: RNG.normal(size=(20, 4)).astype(np.float32), 5: RNG.normal(size=(3, 4)).astype(np.float32)}
IDS = {label: [f"{label}/{k}" for k in range(len(codes))] for label, codes in POOL.items()}
NAMES, CODES = [f"image {k}" for k in range(6)], RNG.normal(size=(6, 4)).astype(np.float32)
TARGETS = [2, 5, 2, 2, 5, 2]


def ways(counter: str, donors: int = 1, path: str = "linear", seed: int = 0) -> Ways:
    ends = {label: (IDS[label], POOL[label]) for label in POOL}
    return Ways("all", counter, donors, path, seed, ends, np.concatenate([*POOL.values()]))


def code_of(name: str) -> np.ndarray:
    label, k = name.split("/")
    return POOL[int(label)][int(k)]


@pytest.mark.parametrize("counter", ["medoid", "random", "nearest"])
@pytest.mark.parametrize("path", ["linear", "guided"])
def test_each_image_has_its_own_counter_codes_of_the_target_class(counter: str, path: str) -> None:
    among = TrainingCodes(np.concatenate([*POOL.values()]))
    for donors in (1, 4):
        asked = ways(counter, donors, path)
        found, waypoints = asked.find(NAMES, CODES, TARGETS)
        assert [len(own) for own in found] == [min(donors, len(IDS[label])) for label in TARGETS]
        assert waypoints.dtype == np.float32
        each = [(k, name) for k, own in enumerate(found) for name in own]
        assert len(each) == len(waypoints) and waypoints.shape[1] == (1 if path == "linear" else 16)
        for (k, name), way in zip(each, waypoints, strict=True):
            assert name in IDS[TARGETS[k]] and np.array_equal(way[-1], code_of(name))
            if path == "guided":
                assert np.allclose(way, among.guided(CODES[k : k + 1], code_of(name)[None])[0], atol=1e-6)
        for k, own in enumerate(found):
            assert len(set(own)) == len(own)
            # Whatever else is asked for at the same time.
            assert asked.find(NAMES[k : k + 1], CODES[k : k + 1], TARGETS[k : k + 1])[0] == [own]


def test_medoids_come_in_their_order_and_the_nearest_are_the_nearest() -> None:
    found, _ = ways("medoid", 2).find(NAMES, CODES, TARGETS)
    assert found == [[f"{label}/0", f"{label}/1"] for label in TARGETS]
    found, _ = ways("nearest", 3).find(NAMES, CODES, TARGETS)
    for code, label, own in zip(CODES, TARGETS, found, strict=True):
        ranked = sorted(IDS[label], key=lambda name: float(((code_of(name) - code) ** 2).sum()))
        assert own == ranked[:3]


def test_random_counter_codes_differ_between_images_and_seeds_and_reach_all() -> None:
    names = [f"image {k}" for k in range(300)]
    codes, targets = np.zeros((300, 4), np.float32), [2] * 300
    found = [own[0] for own in ways("random").find(names, codes, targets)[0]]
    assert set(found) == set(IDS[2])
    other = [own[0] for own in ways("random", seed=1).find(names, codes, targets)[0]]
    assert np.mean([a != b for a, b in zip(found, other, strict=True)]) > 0.8


@pytest.mark.parametrize("counter", ["random", "nearest"])
def test_no_way_ends_at_a_code_that_stands_among_another_class(tmp_path: Path, counter: str) -> None:
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(0, 1, (40, 4)), rng.normal(9, 1, (40, 4))]).astype(np.float32)
    predicted = np.repeat([0, 1], 40)
    predicted[[3, 50]] = [1, 0]
    table = pa.table({
        "id": [f"image {k}" for k in range(80)], "split": ["train"] * 80, "predicted": pa.array(predicted, pa.int32()),
        "class_code": pa.array(list(codes), pa.list_(pa.float32())),
    })  # fmt: skip
    write_table(Run(str(tmp_path)), "codes/train.parquet", table)
    (tmp_path / "run.json").write_text('{"options": {"dataset": "x"}, "stages": {}}')
    found = read_ways(Run(str(tmp_path)), options(tmp_path, "--counter", counter))
    held = {label: {int(name.split()[1]) for name in found.ends[label][0]} for label in (0, 1)}
    assert held == {0: set(range(40)) - {3}, 1: set(range(40, 80)) - {50}}


@pytest.mark.parametrize("counter", ["random", "nearest"])
def test_ways_end_at_training_images_and_distances_are_to_those_alone(
    tmp_path: Path, counter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    split, predicted = np.tile(["train", "val", "train", "test"], 15), np.arange(60) // 30
    codes[:, 0] += 9 * predicted
    table = pa.table({
        "id": [f"image {k}" for k in range(60)], "split": split, "predicted": pa.array(predicted, pa.int32()),
        "class_code": pa.array(list(codes), pa.list_(pa.float32())),
    })  # fmt: skip
    write_table(Run(str(tmp_path)), "codes/all.parquet", table)
    (tmp_path / "run.json").write_text('{"options": {"dataset": "x"}, "stages": {}}')
    found = read_ways(Run(str(tmp_path)), options(tmp_path, "--counter", counter))
    training = {k: codes[k].tolist() for k in range(0, 60, 2)}
    assert {label: len(ids) for label, (ids, _) in found.ends.items()} == {0: 15, 1: 15}
    for label, (ids, ends) in found.ends.items():
        for name, code in zip(ids, ends, strict=True):
            k = int(name.split()[1])
            assert k // 30 == label and training[k] == code.tolist()
    assert sorted(found.codes.tolist()) == sorted(training.values())
    # Of more than it takes, a random part.
    monkeypatch.setattr(pipelines.ways, "DONOR_CODES", 5)
    monkeypatch.setattr(pipelines.ways, "REFERENCE_CODES", 20)
    found = read_ways(Run(str(tmp_path)), options(tmp_path, "--counter", counter))
    assert len(found.ends[0][0]) == 5 and found.ends[0][0] != sorted(f"image {k}" for k in range(0, 30, 2))[:5]
    assert len(found.codes) == 20 and {predicted[codes.tolist().index(code)] for code in found.codes.tolist()} == {0, 1}


def test_targets() -> None:
    names = ("a", "b", "c", "d")
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert choose_targets(p, "runner-up", names, {0, 1, 2, 3}) == [(0, 1), (1, 2)]
    assert choose_targets(p, "runner-up", names, {0, 2, 3}) == [(0, 2), (1, 2)]  # none but those with a code
    assert choose_targets(p, "runner-up", names, {0, 3}) == [(0, 3), (1, 0)]
    assert choose_targets(p, "runner-up", names, {0}) == [(0, 1), (1, 0)]  # if there is one, else it is to be said
    assert choose_targets(p, "all", names, {0}) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 1), (1, 0)]
    assert choose_targets(p, "a", names, {0}) == [(1, 0)]
    assert choose_targets(p[:0], "all", names, {0}) == []
    alike = torch.full((20, 1000), 1e-3).scatter_(1, torch.randint(1000, (20, 2)), 0.25)
    names = tuple(str(label) for label in range(1000))
    for targets in ("runner-up", "all"):
        for i, label in choose_targets(alike, targets, names, set(range(1000))):
            assert label != int(alike[i].argmax())


def test_maps_are_made_alike_by_the_command_line_and_from_python_but_for_inversion() -> None:
    own = {name: parameter.default for name, parameter in inspect.signature(explain).parameters.items()}
    told = path_options(ExplainOptions())
    assert told.pop("inversion") == 8 and own["inversion"] == 0  # the paper's
    assert {name: own[name] for name in told} == told


# On the run that the pipeline tests share.


def options(folder: Path, *words: str) -> ExplainOptions:
    return parse(ExplainOptions, ["--run", str(folder), *words])


def rows_of(folder: Path, *words: str) -> pd.DataFrame:
    """What the stage writes for the images of the split `test`."""
    run, given = Run(str(folder)), options(folder, *words)
    worker = ExplainWorker(run, spec=str(folder / "classifier"), names=("plain", "spot"), cae=str(folder / "cae"),
                           size=32, fit="crop", device="cpu", ways=read_ways(run, given), frames=True,
                           how=path_options(given))  # fmt: skip
    table = pa.concat_tables(some for unit in shard_units(run, ("test",)) for some in worker(unit | {"overlays": 0}))
    return table.to_pandas()


def test_the_map_of_several_donors_is_the_mean_of_theirs(finished: Path) -> None:
    rows = rows_of(finished, "--counter", "random", "--donors", "2", "--mode", "contrast")
    codes = read_table(Run(str(finished)), "codes").to_pandas().set_index("id")
    blackbox = classifiers.load(str(finished / "classifier"), ("plain", "spot"))
    cae = training.load(str(finished / "cae"))
    images = pd.concat([pd.read_parquet(part) for part in finished.glob("shards/split=test/*.parquet")]).set_index("id")
    assert len(rows) == len(images)
    for row in rows.itertuples():
        x = to_tensor(decode(images.image[row.id], 32)[None])
        found = [
            explain(cae, blackbox, x, torch.tensor([row.source]), torch.tensor([row.target]),
                    torch.tensor(codes.class_code[name])[None], mode="contrast")
            for name in row.counter_ids
        ]  # fmt: skip
        assert row.counter_statuses.tolist() == [each.status[0] for each in found]
        expected = sum(each.map[0] for each in found) / 2
        np.testing.assert_allclose(row.map.astype(np.float32), expected.flatten(), atol=2e-3)
        assert row.flip_at == pytest.approx(np.mean([float(each.flip_at) for each in found]), abs=1e-3)
        assert len(row.frames) == len(row.frame_p) == 9


def test_medoids_are_ranked_by_how_surely_they_flip(finished: Path) -> None:
    run = Run(str(finished))
    table = pd.read_parquet(finished / "manifold/counter_codes.parquet")
    assert table.groupby("label").size().to_dict() == {0: 8, 1: 8}
    assert all(part.flips.is_monotonic_decreasing for _, part in table.groupby("label"))
    for label, (ids, codes) in read_medoids(run).items():
        own = table[table.label == label]
        assert len(set(ids)) == 8 and ids == own.id.to_list()
        assert np.array_equal(codes, np.stack(own.class_code.to_list()))
    rate = state(finished)["stages"]["embed"]["result"]["manifold/counter_flips_spot"]
    assert rate == table[table.label == 1].flips.max()


def test_a_given_image_and_those_of_its_own_class(finished: Path) -> None:
    codes = read_table(Run(str(finished)), "codes").to_pandas()
    spot = codes[(codes.predicted == 1) & (codes.split == "val")].id.iloc[0]  # need not be a training image
    rows = rows_of(finished, "--counter", spot)
    test = codes[codes.split == "test"]  # those of the image's own class are left out, as under --targets spot
    assert sorted(rows.id) == sorted(test.id[test.predicted == 0]) and len(rows) < len(test)
    assert set(rows.target) == {1} and set(rows.source) == {0}
    assert set(rows.status) <= {"flipped", "unflipped", "reconstruction_flipped"}
    assert all(ids.tolist() == [spot] for ids in rows.counter_ids)


def test_ways_that_cannot_be_gone_are_refused(finished: Path) -> None:
    run = Run(str(finished))
    table = read_table(run, "codes").to_pandas()
    spot = table[table.predicted == 1].id.iloc[0]
    for words, says in {
        ("--counter", "nobody"): "--counter nobody: choose medoid, random, nearest or the id of an image of",
        ("--donors", "9"): "--donors 9: of --counter medoid there are 8 at most",
        ("--counter", "random", "--donors", "33"): "of --counter random there are 32 at most",
        ("--counter", spot, "--donors", "2"): "there is one, an image's",
        ("--counter", spot, "--targets", "plain"): "--targets plain: the classifier gives the --counter image",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=says):
            read_ways(run, options(finished, *words))
    with pytest.raises(UserError, match="--donors is 0"):
        options(finished, "--donors", "0")
    assert read_ways(run, options(finished, "--counter", spot, "--targets", "spot")).targets == "spot"
    assert read_ways(run, options(finished, "--counter", spot)).targets == "spot"


@pytest.mark.parametrize(
    ("donors", "mode", "paths"),
    [
        ("1", "input", {8, 16, 24, 32}),
        ("3", "input", {24}),
        ("6", "input", {30}),
        ("1", "integrated", {8, 16, 24, 32}),
        ("1", "patch", set()),
    ],
)
def test_the_networks_see_few_sizes_of_batches(finished: Path, donors: str, mode: str, paths: set[int]) -> None:
    run, given = Run(str(finished)), options(finished, "--counter", "random", "--donors", donors, "--mode", mode)
    worker = ExplainWorker(run, spec=str(finished / "classifier"), names=("plain", "spot"), cae=str(finished / "cae"),
                           size=32, fit="crop", device="cpu", ways=read_ways(run, given), frames=False,
                           how=path_options(given) | {"steps": 1, "refine": 0, "inversion": 0})  # fmt: skip
    asked, encoded = sizes_seen(worker.blackbox), sizes_seen(worker.cae.class_encoder)
    arrays = np.random.default_rng(0).integers(256, size=(32, 32, 32, 3), dtype=np.uint8)
    whole = worker.explain([str(i) for i in range(32)], arrays)
    for count in (1, 7, 8, 19, 31):
        rows = worker.explain([str(i) for i in range(count)], arrays[:count])
        assert [(row["id"], row["status"]) for row in rows] == [(row["id"], row["status"]) for row in whole[:count]]
        for mine, theirs in zip(rows, whole, strict=False):
            assert np.allclose(mine["map"], theirs["map"], atol=0.01 * float(theirs["map"].max()))
    assert encoded <= {8, 16, 24, 32, 5}
    if mode == "patch":  # besides, full batches of windows, and what is left over of them for each of the three sizes
        assert {8, 24, 32} <= asked and len(asked) <= 3 + 1 + 3
    else:
        assert asked <= paths | {8, 16, 24, 32}


def test_a_batch_that_does_not_fit_is_asked_about_one_by_one(finished: Path) -> None:
    run, given = Run(str(finished)), options(finished, "--mode", "input")
    worker = ExplainWorker(run, spec=str(finished / "classifier"), names=("plain", "spot"), cae=str(finished / "cae"),
                           size=32, fit="crop", device="cpu", ways=read_ways(run, given), frames=False,
                           how=path_options(given))  # fmt: skip
    arrays = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    whole, ask, asked = worker.explain(["a", "b", "c"], arrays), worker._ask, []

    def little_memory(some: np.ndarray) -> torch.Tensor:
        asked.append(len(some))
        if len(some) > 1:
            raise torch.OutOfMemoryError
        return ask(some)

    worker._ask = little_memory  # type: ignore[method-assign]
    kept, encode, encoded = list[weakref.ref[torch.Tensor]](), worker.cae.encode, []

    def little_room(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append((len(x), sum(one() is not None for one in kept)))
        if len(x) > 1:
            kept.append(weakref.ref(x))
            raise torch.OutOfMemoryError
        return encode(x)

    worker.cae.encode = little_room  # type: ignore[method-assign]
    rows = worker.explain(["a", "b", "c"], arrays)
    assert asked == [8, 1, 1, 1]
    assert encoded == [(8, 0), (1, 0), (1, 0), (1, 0)]  # and what there was no room for is gone by then
    assert [(row["id"], row["status"], row["target"]) for row in rows] == [
        (row["id"], row["status"], row["target"]) for row in whole]  # fmt: skip


def test_a_broken_accelerator_is_no_fault_of_the_images(finished: Path) -> None:
    run, given = Run(str(finished)), options(finished, "--mode", "input")
    worker = ExplainWorker(run, spec=str(finished / "classifier"), names=("plain", "spot"), cae=str(finished / "cae"),
                           size=32, fit="crop", device="cpu", ways=read_ways(run, given), frames=False,
                           how=path_options(given))  # fmt: skip

    def broken(_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.AcceleratorError

    worker.cae.encode = broken  # type: ignore[method-assign]
    with pytest.raises(torch.AcceleratorError):
        worker.explain(["a", "b"], np.zeros((2, 32, 32, 3), np.uint8))


def test_a_map_that_half_precision_cannot_hold_is_none(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = Run(str(finished)), options(finished, "--mode", "input")
    worker = ExplainWorker(run, spec=str(finished / "classifier"), names=("plain", "spot"), cae=str(finished / "cae"),
                           size=32, fit="crop", device="cpu", ways=read_ways(run, given), frames=False,
                           how=path_options(given))  # fmt: skip

    def large(*given: Any, **how: Any) -> Explanation:
        found = explain(*given, **how)
        return replace(found, map=torch.where(torch.arange(len(found.map))[:, None, None] == 0, 1e6, found.map))

    monkeypatch.setattr(maps, "explain", large)
    first, second = worker.explain(["a", "b"], np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    assert first["status"] == "failed" and "not finite" in first["error"] and "map" not in first
    assert second["status"] != "failed" and second["map"].shape == (32 * 32,)


def sizes_seen(network: torch.nn.Module) -> set[int]:
    """The batch sizes that a network will have been given."""
    seen = set[int]()
    network.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    return seen


@pytest.mark.parametrize("kind", [PredictWorker, EmbedWorker])
def test_workers_that_ask_about_every_image_fill_their_last_batch(
    finished: Path, kind: type[PredictWorker | EmbedWorker]
) -> None:
    run = Run(str(finished))
    worker = kind(run, str(finished / "classifier"), ("plain", "spot"), 32, "crop", "cpu")
    asked = sizes_seen(worker.blackbox)
    (unit,) = shard_units(run, ("val",))
    found = worker(unit)
    assert unit["rows"] % 8 and asked and all(size % 8 == 0 for size in asked)
    assert found["id"].to_pylist() == read_unit(run, unit, ["id"])["id"].to_pylist()
    folder = "predictions" if kind is PredictWorker else "codes"
    kept = read_table(run, folder, ["id", "probabilities"]).filter(
        pc.is_in(pc.field("id"), found["id"].combine_chunks())
    )
    assert np.allclose(matrix(found["probabilities"]), matrix(kept["probabilities"]), atol=1e-5)
