"""A user's mistakes: one line each that says what was wrong, where, and what to do; never a traceback."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import blob, command
from PIL import Image

from cae.config import PRESETS
from pipelines import full, shard
from pipelines import run as runs
from pipelines.command_line import parse
from pipelines.explain import ArchiveOptions
from pipelines.mistakes import UserError
from pipelines.run import Run, RunOptions
from pipelines.train import TrainOptions


def mistake(*words: str, script: str = "full.py", **env: str) -> str:
    """The one line that a mistaken command prints."""
    done = command(script, *words, **env)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr[-3000:]
    return lines[0]


def test_missing_named_dataset_says_what_to_download_and_where_to_put_it(tmp_path: Path) -> None:
    line = mistake("--dataset", "chest_xray", "--data-root", str(tmp_path), "--run", str(tmp_path / "r"))
    assert "download it from https://" in line and str(tmp_path / "chest_xray") in line


def test_no_dataset_and_unknown_dataset(tmp_path: Path) -> None:
    assert "--dataset" in mistake("--run", str(tmp_path / "r"))
    assert "known are" in mistake("--dataset", "nonsense", "--run", str(tmp_path / "r"))


def test_empty_folder_one_class_and_too_few_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in mistake("--dataset", str(tmp_path / "empty"), "--run", str(tmp_path / "r1"))
    rng = np.random.default_rng(0)
    for name, count in {"a": 12, "b": 2}.items():
        (tmp_path / "few" / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(blob(rng, 0)).save(tmp_path / "few" / name / f"{i}.png")
    line = mistake("--dataset", str(tmp_path / "few"), "--run", str(tmp_path / "r2"), script="shard.py")
    assert "class 'b' has" in line and "add images" in line


def test_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = mistake("--dataset", "synthetic", "--run", str(tmp_path / "file" / "run"))
    assert "cannot write" in line or "Not a directory" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to play a full disk with")
def test_full_disk(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f".run.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        run.save()


def test_numbers_that_are_too_small_are_refused_before_any_work(tmp_path: Path) -> None:
    for flag, least in (("--class-dim", 2), ("--resnet.batch", 1), ("--pairs", 1)):
        with pytest.raises(UserError, match=f"{flag} is {least - 1}: it must be {least} at least"):
            parse(TrainOptions, ["--dataset", "synthetic", "--run", str(tmp_path), flag, str(least - 1)])


def test_broken_options() -> None:
    for words in (["--preset", "huge"], ["--pairs", "many"], ["--nonsense", "1"]):
        done = command("full.py", "--dataset", "synthetic", *words)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert words[0] in done.stdout + done.stderr


def test_options_that_cannot_work_are_refused_before_any_work(tmp_path: Path) -> None:
    for words, says in {
        ("--image-size", "50"): "multiple of 4", ("--steps", "-1"): "--steps is -1",
        ("--smooth", "-1"): "--smooth is -1", ("--draws", "0"): "--draws is 0", ("--epochs", "-3"): "--epochs is -3",
        ("--smooth", "9"): "--smooth is 9.0: it must be 0.5 at most", ("--fade", "2"): "--fade is 2.0",
        ("--margin", "2"): "--margin is 2.0",
        ("--cla1", "-1"): "--cla1 is -1", ("--flip", "7"): "--flip is 7.0: it must be 1 at most",
        ("--width", "2"): "--width is 2: it must be 4 at least", ("--blocks", "0"): "--blocks is 0",
        ("--mlp-width", "0"): "--mlp-width is 0", ("--disc-width", "0"): "--disc-width is 0",
        ("--up-kernel", "4"): "--up-kernel is 4: choose an odd", ("--out-kernel", "65"): "--out-kernel is 65: choose",
        ("--seed", "-1"): "--seed is -1", ("--seed", "4294967296"): "--seed is 4294967296: it must be 4294967295 at",
        ("--lr", "nan"): "--lr is nan", ("--window", "nan"): "--window is nan", ("--betas", "0", "1"): "--betas are",
        ("--inversion", "1"): "--inversion is 1: give 0 for none, or 2 at least",
        ("--lr", "inf"): "--lr is inf: it must be finite", ("--span", "inf"): "--span is inf",
        ("--splits",): "--splits names nothing: name one", ("--stages",): "--stages names nothing",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=says):
            parse(full.FullOptions, ["--dataset", "synthetic", "--run", str(tmp_path / "r"), *words])
    with pytest.raises(SystemExit):
        parse(full.FullOptions, ["--dataset", "synthetic", "--run", str(tmp_path / "r"), "--channels", "2"])
    given = ["--dataset", "a/b/", "--run", str(tmp_path / "r"), "--tracking-uri", "sqlite:///here.db"]
    options = parse(full.FullOptions, given)
    assert options.tracking_uri == f"sqlite:///{Path.cwd()}/here.db" and options.dataset == "a/b"


def test_what_explain_cannot_do_is_refused_before_the_training(tmp_path: Path) -> None:
    run = Run(str(tmp_path / "run"))
    for words, says in {
        ("--mode", "evidence"): "needs the classifier's gradient", ("--donors", "99"): "--donors 99",
        ("--targets", "c"): "--targets c", ("--counter", "x.png#1", "--donors", "2"): "there is one, an image's",
    }.items():  # fmt: skip
        run.state = {"options": {}, "stages": {
            "shard": {"options": {"dataset": "synthetic", "data_root": "", "classifier": ""}},
            "classify": {"options": {}, "result": {"classes": ["a", "b"], "differentiable": False}}}}  # fmt: skip
        run.save()
        options = parse(full.FullOptions, ["--dataset", "synthetic", "--run", run.folder, *words])
        run.state["options"] = {"mode": options.mode, "donors": options.donors, "targets": options.targets}
        run.save()  # as the stages before do
        wrong = "donors" if "--donors" in words else words[0].removeprefix("--")
        for before in ({}, {wrong: "fine"}):  # no default of the next call, which has what it had before
            with pytest.raises(ValueError, match=says):
                full._check(options, ["explain"], before)
            held = Run(run.folder).state["options"]
            assert {"mode", "donors", "targets"} - set(held) == {wrong} - set(before) and before.items() <= held.items()


@pytest.mark.parametrize(("words", "refused"), [([], True), (["--stages", "tune"], False), (["--again"], False)])
def test_a_search_before_a_training_that_is_done_is_refused(tmp_path: Path, words: list[str], refused: bool) -> None:
    run = Run(str(tmp_path / "run"))
    run.state["stages"] = {"train": {"options": {}, "result": {}}}
    run.save()
    options = parse(full.FullOptions, ["--dataset", "synthetic", "--run", run.folder, "--tune", "2", *words])
    stages = [stage for stage in full.STAGES if stage in options.stages]
    if refused:
        with pytest.raises(UserError, match=r"--tune 2: the CAE is trained already, .*--stages tune searches alone"):
            full._check(options, stages, {})
    else:
        full._check(options, stages, {})


def test_of_an_option_given_twice_the_last_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # here may lie the run of `make demo`, whose options would come back
    words = ["--preset", "paper", "--dataset", "a", "--dataset=synthetic", "--preset", "quick"]
    options = parse(full.FullOptions, words)
    assert options.preset == "quick" and options.model == PRESETS["quick"].model
    assert options.dataset == "synthetic" and options.run.endswith("synthetic-quick")


def test_stage_without_the_ones_before_it(tmp_path: Path) -> None:
    line = mistake("--dataset", "synthetic", "--run", str(tmp_path / "r"), script="explain.py")
    assert "no finished stage shard" in line and "pipelines/shard.py" in line


def test_help_teaches_and_shows_the_preset_s_values() -> None:
    text = command("full.py", "--preset", "paper", "--help").stdout
    for word in ("--dataset", "--image-size", "256", "--recon-x", "lambda1", "--class-head", "200000", "MLflow"):
        assert word in text


def test_stored_options_come_back_and_the_command_line_goes_before_them(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    first = parse(
        full.FullOptions,
        ["--dataset", "synthetic", "--run", folder, "--pairs", "77", "--splits", "val", "--threads", "3"],
    )
    assert first.threads == 3
    assert (first.train.pairs, first.splits, first.model) == (77, ("val",), PRESETS["quick"].model)
    assert first.resnet == PRESETS["quick"].resnet
    run = Run(folder)
    run.state["options"] = dataclasses.asdict(first)
    run.save()
    again = parse(full.FullOptions, ["--run", folder, "--batch", "4"])
    assert (again.train.pairs, again.train.batch, again.splits, again.dataset) == (77, 4, ("val",), "synthetic")
    assert again.threads == 0  # how a call is run is its own affair
    # A run of a version that did not know an option yet goes on without it, whatever the preset says now.
    del run.state["options"]["model"]["detail"], run.state["options"]["train"]["recon_warm_up"]
    run.save()
    older = parse(full.FullOptions, ["--run", folder])
    assert PRESETS["quick"].model.detail and not older.model.detail and older.train.recon_warm_up == 0
    # Of a newer one it leaves out what it does not know.
    run.state["options"]["model"]["newer"] = run.state["options"]["newer"] = 1
    run.save()
    assert parse(full.FullOptions, ["--run", folder]) == older
    stage = parse(shard.ShardOptions, ["--run", folder])
    assert stage.dataset == "synthetic"


def stage(folder: Path, work: object, **options: object) -> dict:
    """Run a stage called shard whose outcome depends on the preset."""
    given = RunOptions(dataset="synthetic", run=str(folder), **options)  # type: ignore[arg-type]
    return runs.run_stage("shard", given, lambda *by: partial(work, *by), ("preset",))  # type: ignore[arg-type]


def test_options_that_failed_are_free_and_those_of_stopped_work_are_not(tmp_path: Path) -> None:
    folder, part = tmp_path / "run", tmp_path / "run" / "shards" / "part"

    def begin(run: Run, options: RunOptions) -> dict:
        run.write("shards/part", options.preset.encode())
        raise KeyboardInterrupt if options.preset == "quick" else UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        stage(folder, begin, preset="paper")
    assert part.read_text() == "paper" and parse(RunOptions, ["--run", str(folder), "--dataset", "x"])
    assert "preset" not in Run(str(folder)).state["options"]  # not to be a default
    with pytest.raises(KeyboardInterrupt):
        stage(folder, begin)
    assert part.read_text() == "quick"  # started over
    with pytest.raises(UserError, match=r"--preset paper contradicts .* made with --preset quick: .*shard.py --again"):
        stage(folder, lambda run, options: {}, preset="paper")
    assert part.read_text() == "quick"

    def refuse(run: Run, options: RunOptions) -> dict:
        raise UserError("the disk is not mounted")

    with pytest.raises(UserError, match="not mounted"):
        stage(folder, refuse)
    with pytest.raises(UserError, match="contradicts"):  # what went wrong now frees nobody to drop the work before
        stage(folder, lambda run, options: {}, preset="paper")
    assert part.read_text() == "quick"
    assert stage(folder, lambda run, options: {"share of {a+b}": 0.5}) == {"share of {a+b}": 0.5}  # odd for MLflow
    assert part.read_text() == "quick"  # went on
    with pytest.raises(UserError, match="contradicts"):
        stage(folder, lambda run, options: {}, preset="paper")

    def unfit(run: Run, options: RunOptions) -> runs.Work:
        raise UserError("no such folder")

    with pytest.raises(UserError, match="no such folder"):
        runs.run_stage("shard", RunOptions(dataset="synthetic", run=str(folder), again=True), unfit, ("preset",))
    assert part.read_text() == "quick" and Run(str(folder)).done("shard")  # nor does one that cannot be done
    elsewhere = RunOptions(dataset="synthetic", run=str(folder), preset="paper", again=True)
    with pytest.raises(UserError, match="contradicts the stage shard"):
        runs.run_stage("classify", elsewhere, lambda run, options: dict, ("preset",))
    assert part.read_text() == "quick"  # a refused call drops nothing
    assert stage(folder, lambda run, options: {"left": part.exists()}, preset="paper", again=True) == {"left": False}


def test_a_run_folder_of_another_version_may_know_other_options(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stage(folder, lambda run, options: {})
    run = Run(str(folder))
    run.state["stages"]["shard"]["options"] |= {"train": {"forgotten": 1, "seed": 0}}
    runs.refuse_contradictions(run, RunOptions(dataset="synthetic", run=str(folder)))


def test_one_folder_may_be_spelled_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    given = ("images", "./images/", f"{tmp_path}/images", f"{tmp_path}/../{tmp_path.name}/images")
    for name in given:
        words = ["--dataset", name, "--data-root", name, "--classifier", f"torchvision:resnet18@{name}/w.pth"]
        options = parse(shard.ShardOptions, [*words, "--run", "r"])
        assert options.dataset == options.data_root == f"{tmp_path}/images"
        assert options.classifier == f"torchvision:resnet18@{tmp_path}/images/w.pth"
    run = Run(str(tmp_path / "r"))
    table = dataclasses.asdict(options) | {"dataset": "images"}  # as an earlier version noted it down
    run.state["stages"] = {"shard": {"options": {name: table[name] for name in shard.OWN}, "result": {}}}
    runs.refuse_contradictions(run, options)
    with pytest.raises(UserError, match=r"--dataset chest_xray contradicts .*, made with --dataset images"):
        runs.refuse_contradictions(run, parse(shard.ShardOptions, [*words, "--run", "r", "--dataset", "chest_xray"]))
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse(shard.ShardOptions, ["--run", "r", "--dataset=~/images", "--classifier=timm:x@~/images/w.pth"])
    assert (options.dataset, options.classifier) == (f"{tmp_path}/images", f"timm:x@{tmp_path}/images/w.pth")
    for name in ("synthetic", "chest_xray", "s3://bucket/images", "no/such"):
        assert parse(shard.ShardOptions, ["--dataset", name, "--run", "r"]).dataset == name


def test_a_folder_shards_of_somebody_else_is_left_alone(tmp_path: Path, archive: Path) -> None:
    theirs = tmp_path / "run" / "shards" / "theirs.tar"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("precious")
    line = mistake("--dataset", str(archive), "--run", str(tmp_path / "run"), script="shard.py")
    assert "no run of ours made" in line and theirs.read_text() == "precious"


def test_another_preset_brings_its_own_sizes(tmp_path: Path) -> None:
    words = ["--dataset", "synthetic", "--run", str(tmp_path / "run")]
    run = Run(str(tmp_path / "run"))
    run.state["options"] = dataclasses.asdict(parse(full.FullOptions, [*words, "--preset", "quick", "--lr", "0.5"]))
    run.save()
    assert parse(full.FullOptions, words).train.lr == 0.5
    paper = parse(full.FullOptions, [*words, "--preset", "paper", "--batch", "2"])
    assert paper.model == PRESETS["paper"].model and paper.train == dataclasses.replace(PRESETS["paper"].train, batch=2)


def test_the_folder_of_an_archive_s_explanations_is_no_run(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.state |= {"options": {"dataset": "synthetic", "archive": "/a.zip", "out": "/out"}, "explained_by": "/runs/mine"}
    run.save()
    for options in (full.FullOptions, ArchiveOptions):
        with pytest.raises(UserError, match=r"what the run /runs/mine explained, .*: give --run that one"):
            parse(options, ["--run", run.folder])
    del run.state["explained_by"]
    run.save()
    found = parse(ArchiveOptions, ["--run", run.folder])
    assert (found.dataset, found.archive, found.out) == ("synthetic", "", "")


@pytest.mark.parametrize(("words", "preset"), [([], "standard"), (["--device", "cpu"], "quick")])
def test_the_preset_is_that_of_the_device(words: list[str], preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert parse(RunOptions, ["--dataset", "synthetic", *words]).preset == preset


def test_a_damaged_run_folder_is_named(tmp_path: Path) -> None:
    for text in ("", "[1]", "{", '{"options": [1]}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            parse(RunOptions, ["--run", str(tmp_path)])


def test_run_folders_are_called_after_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAE_RUNS", raising=False)
    for dataset, name in ((".", tmp_path.name), ("x.tar.gz", "x"), ("s3://bucket/scans/", "scans"), ("oct", "oct")):
        assert parse(RunOptions, ["--dataset", dataset]).run == str(tmp_path / "runs" / f"{name}-quick")
