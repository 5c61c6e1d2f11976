"""What stage evaluate does with the images of a run: the rows that its workers make, and the tables of them."""

from __future__ import annotations

import html
import shutil
from itertools import groupby, pairwise, product
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import command, state
from safetensors.torch import load_file, save_file
from test_pipelines import parts, shards
from torch import nn

from cae import classifiers, training
from cae.config import ClassifierConfig
from cae.explain import Mode
from cae.images import decode, to_tensor
from cae.metrics import Fill, disjoint_steps, perturbation_curve
from cae.peers.table import peers
from pipelines import evaluate, measure
from pipelines.bulk import read_table, shard_units
from pipelines.command_line import parse
from pipelines.evaluate import NEW_CODES, EvaluateOptions, _cut, make_plan
from pipelines.explain import ExplainOptions
from pipelines.maps import ExplainWorker
from pipelines.measure import CONTROLS, MeasureWorker
from pipelines.pictures import draw_examples
from pipelines.run import Run
from pipelines.tables import map_rows, swap_table
from pipelines.ways import Ways, read_ways

# What the worker of stage evaluate is told besides the networks, and a task that asks for nothing.
WAYS = Ways("runner-up", "medoid", 1, "linear", 0, {}, codes=np.eye(8, dtype=np.float32))
HOW = {"ways": WAYS, "modes": {"CAE": {}}, "oracle": "", "full": False, "draws": 1, "seed": 0}
NOTHING = {"donor": None, "measured": False, "located": False, "shown": False, "new_codes": []}


def test_the_tables_follow_from_the_rows(finished: Path) -> None:
    rows = parts(finished / "evaluation/images")
    table = pd.read_csv(finished / "evaluation/swap_success.csv").query("direction == 'all'").set_index("split")
    for split, part in rows.groupby("split"):
        others = [one["swap_predicted"] == one["swap_target"] for swaps in part.other_swaps for one in swaps]
        assert np.isclose(table.success[split], np.mean([*(part.swap_predicted == part.swap_target), *others]))
        assert table.swaps[split] == evaluate.DONORS * len(part)
        assert (part.source != part.swap_target).all()
    measured = pd.read_csv(finished / "evaluation/measured.csv")
    assert set(measured.id) == set(rows.id[rows.measured]) and measured.split.value_counts().to_dict() == {
        "val": 10, "test": 10}  # fmt: skip
    perturbation = pd.read_csv(finished / "evaluation/perturbation.csv")
    smoothed = {f"{name}, smoothed" for name in {"Grad-CAM", *CONTROLS} - {"centre"}}
    assert set(perturbation.method) == {"CAE", "Grad-CAM", *CONTROLS, *smoothed}
    for split, part in rows[rows.measured].groupby("split"):
        curves = [m["curves"][0]["disjoint"] for maps in part.maps for m in maps if m["method"] == "CAE"]
        row = perturbation.query("measure == 'aopc' and form == 'disjoint' and method == 'CAE'")
        row = row[row.split == split]
        assert np.isclose(row.value.item(), np.mean(curves), atol=1e-6) and row.images.item() == 10


def test_what_is_measured_of_an_image_is_what_comes_out_by_hand(finished: Path) -> None:
    images, codes, maps = (table.set_index("id") for table in (
        shards(finished), parts(finished / "codes"), parts(finished / "explanations")))  # fmt: skip
    blackbox, cae = classifiers.load(str(finished / "classifier")), training.load(str(finished / "cae"))
    rows = parts(finished / "evaluation/images")
    steps = disjoint_steps(32, measure.HEADLINE)
    for row in rows.itertuples():
        x = to_tensor(decode(images.image[row.id], 32)[None])
        code, individual = cae.encode(x)
        error = float((cae.decode(code, individual) - x).abs().mean())
        donated = cae.decode(torch.from_numpy(codes.class_code[row.donor].copy())[None], individual)
        p = blackbox.probabilities(donated)[0]
        assert row.swap_target == codes.predicted[row.donor] and row.swap_predicted == int(p.argmax())
        assert row.swap_p == pytest.approx(float(p[row.swap_target]), abs=1e-4)
        assert row.reconstruction_error == pytest.approx(error, abs=1e-5)
        assert [one["swap_target"] != row.source for one in row.other_swaps] == [True] * (evaluate.DONORS - 1)
        if row.measured:
            heat = torch.from_numpy(maps["map"][row.id].astype(np.float32)).view(1, 32, 32)
            curve = perturbation_curve(blackbox, x, heat, torch.tensor([row.source]), steps=steps, draws=2)
            (kept,) = (entry["curves"][0] for entry in row.maps if entry["method"] == "CAE")
            np.testing.assert_allclose(kept["disjoint"], curve[0].numpy(), atol=1e-4)
    assert rows.measured.sum() == 20


def test_an_image_whose_target_has_no_counter_code_or_no_donor_is_not_lost(finished: Path) -> None:
    run = Run(str(finished))
    common = {"spec": str(finished / "classifier"), "names": ("plain", "spot"), "size": 32, "fit": "crop",
              "device": "cpu"}  # fmt: skip
    unit = shard_units(run, ("test",))[0]
    how = {"mode": "path", "smooth": 0.0, "steps": 2, "margin": 0.0}
    ends = {0: (["x"], np.zeros((1, 8), np.float32))}
    ways = Ways("runner-up", "medoid", 1, "linear", 0, ends, codes=np.eye(8, dtype=np.float32))
    worker = ExplainWorker(run, **common, cae=run.path("cae"), ways=ways, frames=False, how=how)
    found = pa.concat_tables(worker(unit | {"overlays": 0})).to_pylist()
    assert len(found) == unit["rows"] and {row["source"] for row in found} == {0, 1}
    for row in found:
        assert (row["status"] == "failed") == (row["target"] == 1)
        assert ("no training image the class spot" in row["error"]) == (row["target"] == 1)
    tasks = [NOTHING | {"row": i} for i in range(2)]
    tasks[1] |= {"donor": "d", "donor_class": 1, "donor_code": [0.0] * 8, "other_donors": [(1, [0.1] * 8)] * 3}
    rows = MeasureWorker(run, **common, **HOW)(unit | {"tasks": tasks, "explanations": unit["part"]}).to_pandas()
    assert rows.donor.isna().tolist() == rows.swap_predicted.isna().tolist() == [True, False]
    table = swap_table(rows, ("plain", "spot"))
    assert table.query("direction == 'all'")[["images", "swaps"]].to_numpy().tolist() == [[1, 4]]
    assert swap_table(rows[:1], ("plain", "spot")).empty


def test_a_second_classifier_is_asked_about_every_swap(finished: Path, tmp_path: Path) -> None:
    run, names = Run(str(finished)), ("plain", "spot")
    torch.manual_seed(5)
    config = ClassifierConfig(arch="resnet18", stem="small")
    classifiers.save(str(tmp_path / "other"), classifiers.build(config, names), config)
    unit = shard_units(run, ("test",))[0]
    code = parts(finished / "codes").class_code[0].tolist()
    tasks = [NOTHING | {"row": i, "donor": "d", "donor_class": i % 2, "donor_code": code, "other_donors": []}
             for i in range(unit["rows"])]  # fmt: skip
    unit |= {"tasks": tasks, "explanations": unit["part"]}
    common = {"spec": str(finished / "classifier"), "names": names, "size": 32, "fit": "crop", "device": "cpu"}
    tables = {
        oracle: swap_table(MeasureWorker(run, **common, **HOW | {"oracle": str(oracle)})(unit).to_pandas(), names)
        .set_index("direction").loc["all"]
        for oracle in (finished / "classifier", tmp_path / "other")
    }  # fmt: skip
    own, other = tables.values()
    assert own.oracle_success == own.success and own.oracle_agrees_on_images == 1
    assert other.success == own.success and other.oracle_agrees_on_images < 1  # an untrained one


def test_kid_has_the_features_of_the_oracle_where_there_is_one() -> None:
    b, oracle = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2))
    images = torch.rand(3, 3, 4, 4)
    for given, judge in ((None, b), (oracle, oracle)):
        found = MeasureWorker._features(SimpleNamespace(blackbox=b, oracle=given), images)
        np.testing.assert_allclose(np.stack(found), judge[:3](images).detach(), atol=1e-6)
    assert MeasureWorker._features(SimpleNamespace(blackbox=b, oracle=nn.Flatten()), images) == [None] * 3


def test_a_method_that_cannot_work_with_the_classifier_is_left_out_with_its_reason(finished: Path) -> None:
    run = Run(str(finished))
    unit = shard_units(run, ("test",))[0]
    asks = NOTHING | {"measured": True, "located": True, "shown": True}
    unit |= {"tasks": [asks | {"row": i} for i in range(3)], "explanations": unit["part"]}
    worker = MeasureWorker(run, str(finished / "classifier"), ("plain", "spot"), 32, "crop", "cpu",
                           **HOW | {"ways": read_ways(run, ExplainOptions())})  # fmt: skip
    worker.blackbox.cam_layer = "nowhere"

    def broken(x: torch.Tensor, *_: object) -> torch.Tensor:
        maps = x.mean(1)
        maps[1] = torch.nan
        return maps

    worker.methods["broken"] = broken
    rows = worker(unit).to_pandas()
    maps = map_rows(rows.assign(group=rows.id))
    reasons = {(row.method, row.id): row.error for row in maps.itertuples() if isinstance(row.error, str)}
    assert set(reasons) == {("Grad-CAM", name) for name in rows.id} | {("broken", rows.id[1])}
    assert "nowhere" in reasons["Grad-CAM", rows.id[0]] and "not finite" in reasons["broken", rows.id[1]]
    fine = maps[maps.error.isna()]
    assert fine.curves.notna().all() and fine["map"].notna().all() and len(fine) == 5 * 3 + 2
    worker.blackbox.differentiable = False
    maps = map_rows(worker(unit).to_pandas().assign(group=rows.id))
    assert maps.error[maps.method == "Grad-CAM"].str.startswith("it needs the classifier's gradient").all()


def test_a_split_of_one_class_has_maps_and_paths_and_says_that_it_has_no_swaps(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    run, options = Run(str(tmp_path / "copy")), parse(EvaluateOptions, ["--run", str(tmp_path / "copy")])
    for part in (tmp_path / "copy/codes").rglob("*.parquet"):
        codes = pq.read_table(part, partitioning=None).to_pandas()
        codes.loc[codes.split == "test", "predicted"] = 0
        codes.to_parquet(part)
    plan = make_plan(run, options)
    assert plan.skipped["swaps of test"] == "the classifier gives all its images one class: there is none to swap with"
    donors = {unit["split"]: {task["donor"] is None for task in unit["tasks"]} for unit in plan.units}
    assert donors == {"test": {True}, "val": {False}}
    rows = read_table(run, "evaluation/images").to_pandas().query("split == 'test'").assign(donor=None)
    rows["group"] = rows.id
    assert set(draw_examples(run, options, rows, map_rows(rows), ("plain", "spot"))) == {"maps", "paths"}


@pytest.mark.slow
def test_the_full_set_measures_every_method_under_every_fill(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    oracle, itself = str(tmp_path / "oracle"), str(finished / "classifier")
    shutil.copytree(itself, oracle)
    weights = load_file(f"{oracle}/model.safetensors")
    save_file({name: tensor * (1 + 1e-6) for name, tensor in weights.items()}, f"{oracle}/model.safetensors")
    words = ["--again", "--tables", "full", "--evaluated", "2", "--draws", "1", "--oracle", oracle]
    done = command("evaluate.py", "--run", str(folder), *words)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = {path.stem: pd.read_csv(path, keep_default_na=False) for path in (folder / "evaluation").glob("*.csv")}
    own = {"CAE", "CAE, not smoothed", "CAE, not faded"}
    own |= {f"CAE {mode}" for mode in get_args(Mode) if mode != "integrated"}
    known = peers(training.load(str(folder / "cae")))
    timed = {name for name in own if ", not " not in name} | set(known)
    compared = own | timed | {f"{name}, smoothed" for name in {*known, *CONTROLS} - {"centre"}}
    for split in ("val", "test"):
        aopc = tables["perturbation"]
        aopc = aopc[(aopc.split == split) & (aopc.measure == "aopc")]
        fills = (*get_args(Fill), "all")
        assert set(zip(aopc.fill, aopc.form, strict=True)) == set(product(fills, ("disjoint", "paper")))
        for _, part in aopc.groupby(["fill", "form"]):
            assert set(part.method) == compared | set(CONTROLS) and set(part.images) == {2}
    told = tables["perturbation"].query("told == 'True' or told == True")
    assert {(row.method, row.fill) for row in told.itertuples()} == {
        (name + kind, fill) for name, peer in peers().items() for fill in ((*peer.told, "all") if peer.told else ())
        for kind in ("", ", smoothed")
    }  # fmt: skip
    times = tables["time_per_map"]
    assert set(times.name[times.kind == "method"]) == timed and (times.seconds > 0).all()
    assert tables["new_codes"].codes.sum() == 2 * NEW_CODES and tables["skipped"].empty  # nothing failed
    counterfactuals = tables["counterfactuals"]
    assert set(counterfactuals.kind) == {"reconstruction", "explanation", "swap"}
    assert (counterfactuals.valid == counterfactuals.oracle_valid).all()  # the oracle is nearly the classifier
    pictures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"perturbation", "perturbation_blur", "perturbation_inpaint", "differences", "maps"} <= pictures
    page = (folder / "report.html").read_text()
    assert all(html.escape(name) in page for name in compared | set(CONTROLS))
    client = mlflow.MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    metrics = client.get_run(state(folder)["mlflow_run_id"]).data.metrics
    assert {"aopc_disjoint/cae", "aopc_disjoint_blur/val/integrated_gradients_blur", "seconds_per_map/rise",
            "insertion_inpaint/test/cae_path"} <= set(metrics)  # fmt: skip


def test_units_of_evaluate_are_cut_by_what_is_measured() -> None:
    tasks = [{"row": i, "measured": i % 3 > 1, "located": i % 3 > 0} for i in range(100)]
    cut = _cut(tasks)
    assert sorted(task["row"] for unit in cut for task in unit) == list(range(100))
    assert [sum(task["measured"] or task["located"] for task in unit) for unit in cut] == [14, 13, 13, 13, 13, 0]
    # Neighbours, who may be one patient, are not measured side by side.
    assert all(b["row"] - a["row"] >= 5 for unit in cut[:-1] for a, b in pairwise(unit))
    cheap = [{"row": i, "measured": False, "located": False} for i in range(256)]
    assert _cut([]) == [] and _cut(cheap) == [cheap]


def test_more_images_are_measured_than_are_swapped_where_so_many_are_asked_for(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SWAPS", 2)
    options = parse(EvaluateOptions, ["--run", str(finished), "--evaluated", "4"])
    for split, units in groupby(make_plan(Run(str(finished)), options).units, itemgetter("split")):
        tasks = [task for unit in units for task in unit["tasks"]]
        swapped, measured = (sum(bool(task[what]) for task in tasks) for what in ("donor", "measured"))
        assert swapped == 2 < measured <= 4, split


def test_maps_of_many_donors_are_made_of_few_images_at_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = Run(str(finished)), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    blackbox, cae = classifiers.load(str(finished / "classifier")), training.load(run.path("cae"))
    waypoints, counts = torch.randn(6, 1, cae.config.class_dim, generator=torch.Generator().manual_seed(1)), [2, 1, 3]
    how = {"mode": "contrast", "smooth": 0.0}
    method = measure.methods(blackbox, cae, {"CAE": how}, full=False)["CAE"]
    source, seen, real = torch.zeros(3, dtype=torch.long), [], measure.explain
    monkeypatch.setattr(measure, "explain", lambda *given, **more: seen.append(len(given[2])) or real(*given, **more))
    at_once = method(x, source, 1 - source, waypoints, counts)
    monkeypatch.setattr(measure, "AT_ONCE", 6)
    torch.testing.assert_close(method(x, source, 1 - source, waypoints, counts), at_once)
    assert seen == [6, 3, 3]


def test_modes_that_fade_are_measured_without_it_too() -> None:
    for mode in get_args(Mode):
        modes = evaluate.own_modes(EvaluateOptions(run="r", mode=mode, tables="full"))
        assert ("CAE, not faded" in modes) == (mode in ("integrated", "evidence"))
        assert modes["CAE"]["mode"] == mode and modes["CAE"]["fade"] == 0.25
        assert {modes[name]["fade"] for name in modes if name == "CAE, not faded"} <= {0}
