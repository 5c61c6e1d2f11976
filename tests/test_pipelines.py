"""The stages as a user runs them: one whole run, what it leaves behind, and calling it again."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from conftest import BAD, TINY, command, state

from cae import classifiers, training
from cae.images import decode, to_tensor
from cae.networks import from_authors
from pipelines import embed, evaluate, explain, full, shard, train
from pipelines.bulk import listing, read_images
from pipelines.command_line import parse
from pipelines.evaluate import EvaluateOptions
from pipelines.explain import ExplainOptions
from pipelines.run import Run


def parts(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.rglob("*.parquet"))], ignore_index=True)


def shards(folder: Path) -> pd.DataFrame:
    frames = [pd.read_parquet(p).assign(split=p.parent.name[6:]) for p in folder.glob("shards/split=*/*.parquet")]
    return pd.concat(frames, ignore_index=True)


def test_every_readable_image_is_sharded_and_every_other_file_has_a_reason(finished: Path) -> None:
    rows = shards(finished)
    assert len(rows) == 81 and rows.id.is_unique
    rejected = pd.read_parquet(finished / "shards/rejected.parquet")
    reasons = {Path(source).name: reason for source, reason in zip(rejected.source, rejected.reason, strict=True)}
    assert set(reasons) == set(BAD)
    for name, word in BAD.items():
        assert word in reasons[name]
    for row in rows.itertuples():  # any reader can open the stored bytes
        assert decode(row.image, 32).shape == (32, 32, 3)
        assert ["plain", "spot"][int(row.label)] == row.class_name


def test_exact_duplicates_share_a_split(finished: Path) -> None:
    rows = shards(finished)
    twins = rows[rows.source.str.endswith(("spot/00.png", "spot/copy.png"))]
    assert len(twins) == 2 and twins.split.nunique() == 1


def test_predictions_and_codes_are_those_of_the_saved_models(finished: Path) -> None:
    rows = shards(finished).set_index("id")
    predictions = parts(finished / "predictions").set_index("id")
    codes = parts(finished / "codes").set_index("id")
    assert set(predictions.index) == set(codes.index) == set(rows.index)
    blackbox = classifiers.load(str(finished / "classifier"), ("plain", "spot"))
    cae = training.load(str(finished / "cae"))
    some = rows.index[::9]
    x = to_tensor(np.stack([decode(rows.image[name], 32) for name in some]))
    with torch.no_grad():
        p, code = blackbox.probabilities(x).numpy(), cae.encode(x)[0].numpy()
    np.testing.assert_allclose(np.stack(predictions.probabilities[some].to_list()), p, atol=1e-4)
    np.testing.assert_allclose(np.stack(codes.class_code[some].to_list()), code, atol=1e-4)


def test_every_held_out_image_has_one_explanation_with_a_status(finished: Path) -> None:
    rows, found = shards(finished), parts(finished / "explanations")
    predictions = parts(finished / "predictions").set_index("id").probabilities
    result = state(finished)["stages"]["explain"]["result"]
    assert result["classes"] == state(finished)["stages"]["classify"]["result"]["classes"]
    held_out = set(rows.id[rows.split != "train"])
    assert sorted(found.id) == sorted(held_out)
    assert set(found.status) <= {"flipped", "unflipped", "reconstruction_flipped"}
    for row in found.itertuples():
        heat = np.asarray(row.map, np.float32)
        assert heat.shape == (32 * 32,) and np.isfinite(heat).all() and heat.min() >= 0
        assert len(row.counter_ids) == 1 and row.counter_ids[0] in set(rows.id[rows.split == "train"])
        assert row.counter_statuses.tolist() == [row.status]
        assert row.source != row.target
        said = predictions[row.id]
        assert row.source == said.argmax() and np.isclose(row.p_source, said.max(), atol=1e-4)
        if row.status == "flipped":
            assert row.p_target_end > 0.5
        assert 0 <= row.inversion_steps <= (0 if row.status == "reconstruction_flipped" else 8)
    overlays = list((finished / "overlays").glob("*.png"))
    assert len(overlays) == 3
    as_read = pd.read_parquet(finished / "explanations", partitioning=None)  # as README says
    assert sorted(as_read.id) == sorted(found.id)


def test_the_readme_explains_in_a_notebook(finished: Path, tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = text.partition("In a notebook")[2].partition("```python\n")[2].partition("```")[0]
    rows, told = shards(finished), parts(finished / "predictions").set_index("id")
    for file, label in (("this.png", 1), ("other.png", 0)):
        (row,) = rows[rows.id.map(told.predicted) == label].head(1).itertuples()
        (tmp_path / file).write_bytes(row.image)
        assert file in lines
        lines = lines.replace(file, str(tmp_path / file))
    held: dict[str, Any] = {}
    exec(lines.replace("runs/mine", str(finished)), held)
    assert held["label"].tolist() == [1, 0] and held["found"].map.shape == (1, 32, 32)
    assert held["found"].status[0] in ("flipped", "unflipped", "reconstruction_flipped")


def test_the_report_is_one_file_with_every_picture(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    pictures = {path.stem for path in (finished / "figures").glob("*.png")}
    assert pictures == {"swaps", "swap_grid", "swap_classes", "dragged_codes", "paths", "maps", "manifold",
                        "smoothness", "perturbation", "differences", "training"}  # fmt: skip
    assert page.count("data:image/png;base64,") == len(pictures)
    assert not re.search(r"src=.https?:", page)
    assert str(finished) in page


def test_mlflow_has_one_run_with_a_nested_run_per_stage(finished: Path) -> None:
    folder = state(finished)
    client = mlflow.MlflowClient(f"sqlite:///{finished.parent}/mlflow.db")
    whole = client.get_run(folder["mlflow_run_id"])
    assert {"swap_success/test", "aopc_disjoint/cae", "classifier/val/balanced_accuracy"} <= set(whole.data.metrics)
    assert whole.data.params["batch"] == "4" and whole.data.tags["preset"] == "quick"
    assert whole.data.tags.keys() >= {"images_train", "dataset"}
    children = client.search_runs([whole.info.experiment_id], f"tags.mlflow.parentRunId = '{whole.info.run_id}'")
    assert {run.info.run_name for run in children} == {"shard", "classify", "train", "embed", "explain", "evaluate"}
    assert all(run.info.status == "FINISHED" for run in [whole, *children])
    by_name = {run.info.run_name: run for run in children}
    train = by_name["train"]
    for term in ("recon_x", "recon_c", "recon_s", "cyc_x", "adv1", "cla1", "adv2", "cla2", "loss_g", "loss_d"):
        assert f"train/{term}" in train.data.metrics
    curve = client.get_metric_history(train.info.run_id, "train/swap_success")
    assert len(curve) > 1 and min(point.step for point in curve) > 0
    assert by_name["shard"].inputs.dataset_inputs[0].dataset.digest == folder["stages"]["shard"]["result"]["digest"]
    assert [a.path for a in client.list_artifacts(train.info.run_id, "cae")] == [
        "cae/config.json",
        "cae/model.safetensors",
    ]
    assert "report.html" in [a.path for a in client.list_artifacts(whole.info.run_id)]


def test_a_second_call_does_nothing_and_says_so(finished: Path, archive: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.is_file() and p.name != "stdout.txt"}
    again = command("full.py", "--run", str(finished))
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_contradicting_options_are_refused(finished: Path) -> None:
    for words, says in [
        (["--lr", "0.5"], "--lr 0.5 contradicts the stage train"),
        (["--mode", "contrast"], "--mode contrast contradicts the stage explain"),
        (["--dataset", "synthetic"], "--dataset synthetic contradicts the stage shard"),
    ]:
        done = command("full.py", "--run", str(finished), *words)
        assert done.returncode != 0
        assert says in done.stderr and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_stage_progress_is_one_line_each(finished: Path) -> None:
    out = (finished / "stdout.txt").read_text()
    for stage in ("shard", "classify", "train", "embed", "explain", "evaluate"):
        assert len(re.findall(rf"^{stage}  .*\(\d+ s\)$", out, re.M)) == 1
    assert "report    " in out and "mlflow ui" in out
    assert state(finished)["versions"]["torch"] == torch.__version__
    assert (
        pq.read_schema(next((finished / "explanations").rglob("*.parquet"))).field("map").type.value_type == "halffloat"
    )


def test_images_are_read_in_the_order_asked_for_however_often(finished: Path) -> None:
    run, rows = Run(str(finished)), shards(finished).set_index("id")
    ids = rows.index.to_numpy()[[7, 3, 7, 0, 3]]
    expected = np.stack([decode(rows.image[name], 32) for name in ids])
    assert np.array_equal(read_images(run, ids, 32, "crop"), expected)
    with pytest.raises(KeyError, match="nobody"):
        read_images(run, np.array(["nobody", *ids]), 32, "crop")


def test_targets_that_are_no_class_are_refused_before_the_training_and_forgotten(
    finished: Path, tmp_path: Path
) -> None:
    folder, given = tmp_path / "run", ["--targets", "nobody", "--stages", "shard", "classify", "train", "explain"]
    shards = state(finished)["stages"]["shard"]["result"]
    enough = str(2 * (shards["counts"]["train"] // 8) + 1)  # steps, which take a third pass
    begin = ["--dataset", shards["source"], *TINY, "--resnet.epochs", "1", "--resnet.min-steps", enough]
    for words in ([*begin, *given], given):  # by classify, then by the stages that are done
        wrong = command("full.py", "--run", str(folder), *words)
        assert wrong.returncode and "--targets nobody: choose runner-up, all, or one of plain, spot" in wrong.stderr
        found = state(folder)
        assert set(found["stages"]) == {"shard", "classify"} and "targets" not in found["options"]
    client = mlflow.MlflowClient(found["tracking_uri"])
    whole = client.get_run(found["mlflow_run_id"]).data.params
    assert "targets" not in whole and whole["image_size"] == "32" and whole["resnet.epochs"] == "1"
    losses = client.get_metric_history(found["stages"]["classify"]["mlflow_run_id"], "classifier/loss")
    assert sorted(loss.step for loss in losses) == [1, 2, 3]


def test_a_listing_tells_what_there_is_to_do_and_not_how_the_code_writes_it() -> None:
    @dataclass
    class Older:
        path: str
        name: str

    @dataclass
    class Newer(Older):
        extra: str = ""

    older = [{"part": "0", "items": [Older("a", "b")]}, {"part": "1", "table": "t", "rows": 3}]
    newer = [{"items": [Newer("a", "b")], "part": "0"}, {"part": "1", "table": "t", "rows": 3}]
    assert listing(older, "v") == listing(newer, "v")
    newer[0]["items"] = [Newer("a", "b", "c")]
    others = [listing(older, "w"), listing(older[:1], "v"), listing(newer, "v")]
    assert len({listing(older, "v"), *others}) == 4


def test_a_cae_that_another_version_saved(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    saved = folder / "cae/config.json"
    about = json.loads(saved.read_text())
    about["model"]["mlp_width"] += 1
    saved.write_text(json.dumps(about))
    held = sorted(path for path in folder.rglob("*") if path.is_file())
    for stage, options in (
        (embed, embed.EmbedOptions), (explain, ExplainOptions), (evaluate, EvaluateOptions)
    ):  # fmt: skip
        with pytest.raises(ValueError, match="was saved by another version of this project: train it again"):
            stage.main(parse(options, ["--run", str(folder), "--again"]))
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == held  # nothing is dropped


def test_a_stage_done_again_with_other_options(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    held = sorted(path for path in folder.rglob("*") if path.is_file())
    for (stage, options, *wrong), says in {
        (explain, ExplainOptions, "--targets", "nobody"): "--targets nobody: choose",
        (explain, ExplainOptions, "--counter", "nobody"): "--counter nobody: choose",
        (evaluate, EvaluateOptions, "--oracle", "/nothing"): "--oracle /nothing: no model in /nothing",
        (evaluate, EvaluateOptions, "--oracle", f"{finished}/classifier"): "is the classifier that is explained",
        (shard, shard.ShardOptions, "--dataset", "/gone"): "'/gone' is no path that exists",
        (train, train.TrainOptions, "--workers", "3"): "--batch 4 does not divide among 3 workers",
        (full, full.FullOptions, "--oracle", "/nothing"): "--oracle /nothing: no model in /nothing",
        (full, full.FullOptions, "--targets", "nobody"): "--targets nobody: choose",
        (full, full.FullOptions, "--donors", "99"): "--donors 99: of --counter medoid there are 8 at most",
    }.items():
        with pytest.raises(ValueError, match=says):
            stage.main(parse(options, ["--run", str(folder), "--again", *wrong]))
        assert sorted(path for path in folder.rglob("*") if path.is_file()) == held  # nothing is dropped
        assert state(folder) == state(finished)
    other = ["--mode", "patch", "--targets", "spot", "--counter", "random", "--donors", "3", "--path", "guided"]
    done = command("explain.py", "--run", str(folder), "--again", *other)
    assert done.returncode == 0, done.stderr[-3000:]
    found, codes = parts(folder / "explanations"), parts(folder / "codes").set_index("id")
    assert set(found["mode"]) == {"patch"} and set(found.target) == {1}
    assert sorted(found.id) == sorted(codes.index[(codes.split != "train") & (codes.predicted == 0)])
    for row in found.itertuples():
        assert len(set(row.counter_ids)) == len(row.counter_statuses) == 3
        assert (codes.loc[row.counter_ids, "split"] == "train").all()
        assert (codes.loc[row.counter_ids, "predicted"] == 1).all()
        flips = row.counter_statuses.tolist().count("flipped")
        assert (row.status == "flipped") == (flips >= 2) and (row.flip_at < 1) == (flips > 0)
        assert np.isfinite(row.map).all() and row.map.min() >= 0 and np.isfinite(row.signed).all()
    assert len({tuple(ids) for ids in found.counter_ids}) > 1
    assert list(state(folder)["stages"]) == ["shard", "classify", "train", "embed", "explain"]


def test_npz_archives_keep_their_splits_and_the_order_of_their_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 44), ("val", 11), ("test", 11)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 11
    np.savez(tmp_path / "eleven.npz", **arrays)
    done = command("shard.py", "--dataset", str(tmp_path / "eleven.npz"), "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    result = state(tmp_path / "run")["stages"]["shard"]["result"]
    assert result["classes"] == [str(i) for i in range(11)]
    assert result["counts"] == {"train": 44, "val": 11, "test": 11}
    rows = shards(tmp_path / "run")
    assert (rows.label.astype(str) == rows.class_name).all()


def test_a_generator_of_the_authors_takes_the_place_of_training(tmp_path: Path) -> None:
    names = Path(__file__).with_name("reference") / "authors_state_dict_shapes.json"
    shapes = json.loads(names.read_text())["generator"]
    generator = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    torch.save({"ab": generator}, tmp_path / "gen_00200000.pt")
    run = {
        "options": {"dataset": "face", "preset": "paper"},
        "stages": {
            "shard": {"options": {}, "result": {}},
            "classify": {"options": {}, "result": {"classes": ["man", "woman"]}},
        },
    }
    for name in ("run", "wrong"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(run))
    words = ["--authors-generator", str(tmp_path / "gen_00200000.pt"), "--run"]
    wrong = command("train.py", *words, str(tmp_path / "wrong"), "--width", "64")
    assert wrong.returncode and "--preset paper" in wrong.stderr and "Traceback" not in wrong.stderr
    done = command("train.py", *words, str(tmp_path / "run"))
    assert done.returncode == 0 and not done.stderr, done.stderr
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    mine, theirs = training.load(str(tmp_path / "run" / "cae")), from_authors(generator)[0].eval()
    assert torch.equal(mine(x), theirs(x))
