"""The run folder: what is refused before any work, and what is dropped; no stage runs here."""

from __future__ import annotations

import dataclasses
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cae.config import PRESETS
from pipelines import embed, explain, tracking, train, tune
from pipelines import run as runs
from pipelines.bulk import read_part, shard_units, write_table
from pipelines.cluster import _own_interrupts, _unless_set, pace
from pipelines.command_line import parse
from pipelines.embed import EmbedOptions
from pipelines.explain import ExplainOptions
from pipelines.mistakes import Damaged, UserError, user_error
from pipelines.run import Run
from pipelines.tune import TuneOptions


def test_a_classifier_that_gives_one_class_only_is_refused_before_any_work(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.state["stages"] = {"shard": {"result": {"counts": {"train": 3, "val": 2}}}}
    for split, predicted in (("train", [1, 1, 1]), ("val", [1, 1])):
        ids = [f"{split}{i}" for i in range(len(predicted))]
        table = pa.table({"id": ids, "split": [split] * len(ids), "predicted": pa.array(predicted, pa.int32())})
        write_table(run, f"predictions/{split}.parquet", table)
    with pytest.raises(UserError, match="the 3 training images fewer than two classes"):
        embed.prepare(run, EmbedOptions(run=str(tmp_path)))
    with pytest.raises(UserError, match="all of which the classifier gives the same class"):
        tune.prepare(run, TuneOptions(run=str(tmp_path)))


def test_a_stage_dropped_halfway_is_dropped_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ("cae", "checkpoints/train", "codes", "explanations", "overlays", "predictions")
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    run = Run(str(tmp_path))
    run.state["stages"] = {name: {"options": {}, "result": {}} for name in ("classify", "train", "embed", "explain")}
    drop, dropped = runs._drop, []

    def killed(run: Run, stage: str) -> None:
        if stage == "embed":
            raise KeyboardInterrupt
        dropped.append(stage)
        drop(run, stage)

    monkeypatch.setattr(runs, "_drop", killed)
    with pytest.raises(KeyboardInterrupt):
        runs._start_over(run, "train")
    monkeypatch.setattr(runs, "_drop", drop)
    again = Run(str(tmp_path))  # as the next call reads it
    assert dropped == ["explain"] and set(again.state["stages"]) == {"classify", "train", "embed"}
    assert not again.done("embed")
    runs._start_over(again, "train")
    assert [name for name in made if (tmp_path / name).exists()] == ["predictions"]
    assert set(Run(str(tmp_path)).state["stages"]) == {"classify"}


def test_no_table_or_page_of_an_older_cae_is_left(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for name in ("evaluation/swap_success.csv", "evaluation/accuracy.csv", "report.html", "figures/swaps.png"):
        run.write(name, b"old")
    run.state["stages"] = {name: {"options": {}, "result": {}} for name in ("classify", "train", "evaluate")}
    runs._start_over(run, "train")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run.json"]


def test_what_another_classifier_said_to_a_killed_call_is_dropped(tmp_path: Path) -> None:
    run, there = Run(str(tmp_path)), tmp_path / "predictions/part"
    run.state["stages"] = {"classify": {"options": {}}}
    for found, left in (("one", True), ("one", True), ("another", False)):
        run.write("predictions/part", b"said")
        runs.drop_if_other(run, "classify", found, "predictions")
        assert there.exists() == left and Run(str(tmp_path)).state["stages"]["classify"]["fingerprint"] == found
    runs.drop_if_other(run, "classify", "third", "predictions")  # nothing there to drop


@pytest.mark.parametrize(("rate", "read"), [(12.34, "12.3/s"), (1.0, "1.0/s"), (0.0941, "5.6/min")])
def test_slow_rates_are_told_by_the_minute(rate: float, read: str) -> None:
    assert pace(rate) == read


def test_half_a_stage_of_another_version_is_kept_and_neither_dropped_nor_gone_on_with(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    options = parse(ExplainOptions, ["--dataset", "synthetic", "--run", run.folder])
    table = dataclasses.asdict(options)
    new = ("inversion", "fade")
    begun = {field: table[field] for field in ("seed", *explain.OWN) if field not in new}
    run.state |= {"options": {name: value for name, value in table.items() if name not in new},
                  "stages": {"explain": {"options": begun}}}  # fmt: skip
    write_table(run, "explanations/a.parquet", pa.table({"id": ["x"]}))
    run.save()
    options = parse(ExplainOptions, ["--run", run.folder])
    assert options.inversion == options.fade == 0  # as it was then
    with pytest.raises(UserError, match=r"stage explain of .* was begun by another version"):
        runs.run_stage("explain", options, lambda *_: pytest.fail("begun"), explain.OWN)
    assert (tmp_path / "explanations/a.parquet").exists()
    assert parse(ExplainOptions, ["--run", run.folder, "--inversion", "8"]).inversion == 8
    for option, value in (("--inversion", "2"), ("--fade", "1")):  # else evaluate would measure maps made without it
        asked = parse(ExplainOptions, ["--run", run.folder, option, value])
        with pytest.raises(UserError, match=rf"{option} {value}.* contradicts the stage explain .* {option} 0"):
            runs.refuse_contradictions(run, asked)
    assert parse(ExplainOptions, ["--dataset", "synthetic", "--run", f"{tmp_path}/new"]).inversion == 8


@pytest.mark.parametrize("gone", ["nothing", "stage", "whole", "store"])
def test_a_stage_goes_on_where_mlflow_has_lost_its_run(tmp_path: Path, gone: str) -> None:
    run, options = Run(str(tmp_path / "run")), EmbedOptions(run=str(tmp_path / "run"), experiment="e")
    run.state |= {"git": "", "stages": {"embed": {}}}

    def track() -> tuple[str, str]:
        experiment = tracking.open_experiment(run, options)
        with tracking.tracked(run, options, experiment, "embed", {"seed": 0}, {"seed"}):
            tracking.log_metrics({"score": 1.0})
        return run.state["mlflow_run_id"], run.state["stages"]["embed"]["mlflow_run_id"]

    whole, stage = track()
    client = mlflow.MlflowClient(run.state["tracking_uri"])
    if gone == "store":
        client.delete_run(stage)
        client.delete_run(whole)
        with sqlite3.connect(tmp_path / "mlflow.db") as store:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                store.execute(f"delete from {table}")
    elif gone != "nothing":
        client.delete_run({"stage": stage, "whole": whole}[gone])
    again = track()
    assert (again[0] == whole, again[1] == stage) == (gone in ("nothing", "stage"), gone == "nothing")
    for run_id in again:
        found = client.get_run(run_id)
        assert found.info.lifecycle_stage == "active" and found.data.params == {"seed": "0"}
    assert client.get_run(again[1]).data.tags["mlflow.parentRunId"] == again[0]


@pytest.mark.parametrize(
    ("labels", "differentiable", "teach"),
    [("predicted", True, True), ("predicted", False, False), ("truth", True, False)],
)
def test_class_encoder_is_taught_by_a_classifier_with_a_gradient_whose_predictions_are_the_labels(
    labels: Literal["predicted", "truth"], differentiable: bool, teach: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = Run(str(tmp_path))
    classify = {"spec": "", "classes": ["a", "b"], "differentiable": differentiable}
    run.state["stages"] = {"shard": {"result": {"grey": True}}, "classify": {"result": classify}}
    ids, half = [f"image{i}" for i in range(8)], pa.array([0, 1] * 4, pa.int32())
    table = pa.table({"id": ids, "split": ["train"] * 8, "label": half, "predicted": half})
    write_table(run, "predictions/train.parquet", table)
    monkeypatch.setattr(train, "train_workers", lambda *_: 1)
    monkeypatch.setattr(train, "connect", lambda: None)
    preset = PRESETS["quick"]
    options = train.TrainOptions(run=str(tmp_path), labels=labels, model=preset.model, train=preset.train)
    assert train.plan(run, options)["teach"] is teach
    with pytest.raises(UserError, match="--warm-up 0"):
        train.check(replace(options, train=replace(preset.train, warm_up=0)))


def test_a_file_of_several_tables_is_whole_or_not_there(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    tables = [
        pa.table({"id": pa.array([f"{k}" for k in some], pa.string())}) for some in (range(3), range(0), range(3, 700))
    ]
    write_table(run, "a/b.parquet", iter(tables))
    assert pq.read_table(tmp_path / "a/b.parquet")["id"].to_pylist() == [f"{k}" for k in range(700)]

    def broken() -> Iterator[pa.Table]:
        yield tables[0]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        write_table(run, "a/c.parquet", broken())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.parquet"]


def test_seconds_of_a_stage_are_those_of_all_its_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, logged = 1e9, []
    monkeypatch.setattr(runs, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(tracking, "open_experiment", lambda *_: None)
    monkeypatch.setattr(tracking, "tracked", lambda *_: nullcontext())
    monkeypatch.setattr(tracking, "log_metrics", lambda metrics: logged.append(metrics["embed/seconds"]))

    def call(seconds: float, left: tuple[float, ...], stop: BaseException | None = None, **more: Any) -> dict:
        def work() -> dict[str, Any]:
            nonlocal now
            for name, after in enumerate(left):
                run.write(f"codes/{name}.parquet", b"")
                os.utime(run.path(f"codes/{name}.parquet"), (now + after, now + after))
            now += seconds
            if stop:
                raise stop
            return {}

        nonlocal now
        options = EmbedOptions(**{"run": str(tmp_path / "run")} | more)
        run = Run(options.run)
        with pytest.raises(type(stop)) if stop else nullcontext():
            runs.run_stage("embed", options, lambda *_: work, embed.OWN)
        now += 3600  # until somebody calls again
        return Run(options.run).state["stages"]["embed"]

    call(100, (30, 70), KeyboardInterrupt())
    call(50, (), KeyboardInterrupt())  # to begin with, only what the other left is there
    call(10, (8,), ConnectionError())
    done = call(20, (5, 19))
    assert done["seconds"] == logged.pop() == 70 + 8 + 20 and done["calls"] == 4
    call(30, (5,), KeyboardInterrupt(), again=True)
    done = call(40, ())
    assert done["seconds"] == logged.pop() == 5 + 40 and done["calls"] == 2
    for _ in range(2):  # a mistake: with other options it starts over
        call(30, (5,), UserError(), run=str(tmp_path / "other"))
    done = call(40, (), run=str(tmp_path / "other"), seed=1)
    assert done["seconds"] == logged.pop() == 40 and done["calls"] == 1


def test_what_a_stage_has_made_survives_an_error_and_a_call_without_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line of text is no proof that the options were wrong: a bare call goes on as the first one asked."""
    monkeypatch.setattr(tracking, "open_experiment", lambda *_: None)
    monkeypatch.setattr(tracking, "tracked", lambda *_: nullcontext())
    monkeypatch.setattr(tracking, "log_metrics", lambda *_: None)
    run = Run(str(tmp_path))

    def fails(*, after: tuple[str, ...]) -> Any:
        def work() -> dict[str, Any]:
            for name in after:
                run.write(f"codes/{name}.parquet", b"")
            raise ValueError("one line")

        return lambda *_: work

    asked = EmbedOptions(dataset="synthetic", run=str(tmp_path), seed=3)
    with pytest.raises(ValueError, match="one line"):
        runs.run_stage("embed", asked, fails(after=()), embed.OWN)
    assert "seed" not in Run(str(tmp_path)).state["options"]  # what led to nothing is not the default now
    with pytest.raises(ValueError, match="one line"):
        runs.run_stage("embed", asked, fails(after=("0",)), embed.OWN)
    bare = parse(EmbedOptions, ["--run", str(tmp_path)])
    assert bare.seed == 3
    runs.run_stage("embed", bare, lambda *_: lambda: {}, embed.OWN)
    assert run.fs.exists(run.path("codes/0.parquet"))


def test_no_stage_drops_what_another_has_made() -> None:
    made = [(stage, f"{name}/") for stage, names in runs.WRITES.items() for name in names]
    for stage, name in made:
        assert not [other for other, theirs in made if other != stage and theirs.startswith(name)], name


def test_half_a_file_that_a_kill_has_left_is_not_read_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(str(tmp_path))
    write_table(run, "a/b.parquet", pa.table({"id": ["x"]}))
    monkeypatch.setattr(Path, "replace", lambda *_: None)  # never comes to it
    run.write("a/c.parquet", b"PAR1 and not much more")
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert pq.read_table(tmp_path / "a")["id"].to_pylist() == ["x"]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for name, read in (("codes/a.parquet", lambda: read_part(run, "codes/a.parquet")),
                       ("shards/split=val/a.parquet", lambda: shard_units(run))):  # fmt: skip
        write_table(run, name, pa.table({"id": ["x"] * 100}))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
        with pytest.raises(Damaged, match=rf"{name} is damaged \(.*\): bring back a copy, or do the stage"):
            read()


def test_a_part_with_a_damaged_body_is_named_and_no_mistake_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "open_experiment", lambda *_: None)
    monkeypatch.setattr(tracking, "tracked", lambda *_: nullcontext())
    run = Run(str(tmp_path))
    write_table(run, "codes/a.parquet", pa.table({"id": [f"{i * i}" for i in range(1000)]}))
    path = tmp_path / "codes/a.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes(byte ^ 1 for byte in whole[1000:1001]) + whole[1001:])  # one bit of it
    options = EmbedOptions(dataset="synthetic", run=str(tmp_path), seed=3)
    with pytest.raises(Damaged, match=r"codes/a.parquet is damaged \(.*\): bring back a copy") as error:
        runs.run_stage("embed", options, lambda run, _: lambda: read_part(run, "codes/a.parquet"), embed.OWN)
    assert user_error(error.value) == str(error.value) and "\n" not in str(error.value)
    assert Run(str(tmp_path)).state["options"]["seed"] == 3 and Run(str(tmp_path)).bound("embed")


def test_no_splits_are_none_and_not_all(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for split in ("val", "test"):
        write_table(run, f"shards/split={split}/000000-0000.parquet", pa.table({"id": [split]}))
    assert [len(shard_units(run, splits)) for splits in (None, (), ("val",), ("val", "test"))] == [2, 0, 1, 2]


def test_an_interrupt_of_a_training_is_one_and_later_ones_are_ours_again() -> None:
    """Ray Train takes the signal for itself, and makes of it the end of a process that is content."""
    ours = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), _own_interrupts():
            signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is ours


def test_workers_are_told_what_nobody_has_told_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"B": "theirs"})
    assert _unless_set({"A": "ours", "B": "ours"}) == {"A": "ours"}
    assert os.environ == {"A": "ours", "B": "theirs"}
