"""The search for loss weights: its parts, and a real one, killed and called again, on tiny images."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from conftest import command, kill_when, state
from matplotlib.figure import Figure
from matplotlib.text import Text

from cae import search_plots
from cae.config import PRESETS, LossWeights
from pipelines import full, train, tune
from pipelines.command_line import parse, read_best
from pipelines.mistakes import UserError
from pipelines.run import Run
from pipelines.tune import TuneOptions

LAMBDA_AND_PHI = {"recon_x", "recon_c", "recon_s", "cyc_x", "adv1", "cla1", "adv2", "cla2"}


# --- the parts


def test_every_weight_of_the_paper_is_searched_evenly_in_its_logarithm_round_the_one_given() -> None:
    options = TuneOptions(weights=LossWeights(recon_x=20.0), span=5.0)
    space = tune._space(options)
    assert set(space) == LAMBDA_AND_PHI
    for name, domain in space.items():
        given = getattr(options.weights, name)
        assert (domain.lower, domain.upper) == pytest.approx((given / 5, given * 5))
        drawn = np.array(domain.sample(size=2000, random_state=0))
        assert drawn.min() >= domain.lower and drawn.max() <= domain.upper
        assert abs(np.median(np.log(drawn / given))) < 0.15
    more = tune._space(replace(options, also=("lr", "class_head"), span=9.0))
    assert set(more) == LAMBDA_AND_PHI | {"lr", "class_head"}
    assert (more["lr"].lower, more["lr"].upper) == pytest.approx((options.train.lr / 3, options.train.lr * 3))
    assert set(more["class_head"].categories) == {"learned", "distilled", "blackbox", "both"}


def test_a_weight_that_is_off_stays_off(tmp_path: Path) -> None:
    options = TuneOptions(run=str(tmp_path), weights=LossWeights(adv1=0.0, adv2=0.0))
    space = tune._space(options)
    assert set(space) == LAMBDA_AND_PHI - {"adv1", "adv2"}
    trials = pd.DataFrame([{name: float(i) for name in (*space, *tune.WANTED, "score")} for i in (1, 2)])
    trials["trial"] = trials["outcome"] = "finished"
    tune._write_best(Run(str(tmp_path)), options, trials.iloc[1])
    assert read_best(f"{tmp_path}/tune/best.json")["weights"] == dict.fromkeys(space, 2.0) | {
        "adv1": 0, "adv2": 0, "keep": 0
    }  # fmt: skip
    for figure in tune._pictures(trials, options, 1, trials.score.to_numpy(), 9).values():
        figure.canvas.draw()


def test_a_search_for_class_heads_starts_from_the_one_that_auto_stands_for() -> None:
    """By Optuna itself, which takes no value that is not in its space."""
    options = TuneOptions(train=PRESETS["quick"].train, also=("class_head",))
    for differentiable, heads in ((True, tune.HEADS), (False, ["learned", "distilled"])):
        space = tune._space(options, differentiable)
        start = tune._start(options, space, differentiable)
        assert space["class_head"].categories == heads and set(start) == set(space)
        proposals = tune._proposals(options, [start])
        assert proposals.set_search_properties("score", "max", space)
        first = proposals.suggest("1")
        assert first == pytest.approx(start) and first["class_head"] == ("both" if differentiable else "distilled")


def test_a_trial_is_a_training_of_its_own_weights_and_few_pairs() -> None:
    options = TuneOptions(train=PRESETS["quick"].train, weights=PRESETS["quick"].weights, budget=500)
    trial = tune._with(options, {"recon_x": 3.0, "cla2": 0.5, "lr": 7e-4, "class_head": "learned"})
    assert trial.weights == replace(options.weights, recon_x=3.0, cla2=0.5)
    assert trial.train == replace(options.train, pairs=500, lr=7e-4, class_head="learned")
    assert tune._with(replace(options, budget=10**6), {}).train == options.train  # never more than stage train


def test_non_dominated_against_its_definition() -> None:
    points = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)  # with ties and duplicates
    for point, kept in zip(points, tune.non_dominated(points), strict=True):
        beaten = False
        for other in points:
            beaten |= all(b >= a for a, b in zip(point, other, strict=True)) and list(other) != list(point)
        assert kept == (not beaten)
    assert tune.non_dominated(points).any()


def test_importance_finds_what_the_score_depends_on() -> None:
    rng = np.random.default_rng(0)
    options = {name: np.exp(rng.normal(size=200)) for name in ("idle", "strong", "weak")}
    options["head"] = np.array(rng.choice(["a", "b"], 200), dtype=object)
    score = np.log(options["strong"]) + 0.3 * np.log(options["weak"]) + 1.0 * (options["head"] == "b")
    found = tune.importance(options, score, seed=0)
    assert list(found) == list(options)
    assert found["strong"] > found["head"] > found["weak"] > found["idle"] and found["strong"] > 0.5


def test_trials_are_compared_after_the_pairs_that_all_of_them_had() -> None:
    def result(pairs: list[int], score: list[float]) -> Any:
        return SimpleNamespace(metrics_dataframe=pd.DataFrame({"pairs": pairs, "score": score}))

    results = [result([400, 800, 1600], [0.5, 0.6, 0.9]), result([400], [0.3]), result([200, 400], [0.1, 0.4])]
    assert tune._at_equal_pairs(results, "score") == (400, [0.5, 0.3, 0.4])


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


def test_figures_show_every_trial_and_option() -> None:
    rng = np.random.default_rng(0)
    options = {name: np.exp(rng.normal(size=9)) for name in LAMBDA_AND_PHI}
    options["class_head"] = np.array(["learned", "blackbox", "learned"] * 3, dtype=object)
    score, finished = rng.random(9), np.arange(9) % 2 == 0
    weight = {name: k / 10 for k, name in enumerate(options)}
    effects = search_plots.search_effects(options, score, weight, best=4, name="score after 9 pairs")
    panels = [ax for ax in effects.axes if ax.get_visible()]
    titles = [ax.get_title().split() for ax in panels]
    assert [float(title[1]) for title in titles] == sorted(weight.values(), reverse=True)
    drawn = panels[[title[0] for title in titles].index("recon_x")].collections
    np.testing.assert_allclose(drawn[0].get_offsets(), np.stack([options["recon_x"], score], 1))
    np.testing.assert_allclose(drawn[2].get_offsets(), [[options["recon_x"][4], score[4]]])
    parallel = search_plots.search_parallel(options, score, finished, "score")
    lines = [line for line in parallel.axes[0].lines if len(line.get_ydata()) == 10]
    assert len(lines) == 9 and sum(line.get_linestyle() == "--" for line in lines) == 4
    assert {*options, "score", "learned", "blackbox"} <= words(parallel)
    lines.sort(key=lambda line: line.get_ydata()[-1])
    heights = np.log(options["recon_x"])[score.argsort()]
    heights = (heights - heights.min()) / np.ptp(heights)
    np.testing.assert_allclose([line.get_ydata()[list(options).index("recon_x")] for line in lines], heights)
    front = np.arange(9) < 3
    picture = search_plots.pareto({"a": score, "b": score[::-1], "c": score}, front, best=0)
    assert len(picture.axes) == 3 and len(picture.axes[0].collections[1].get_offsets()) == 3
    for figure in (effects, parallel, picture):
        figure.canvas.draw()
    with pytest.raises(ValueError, match="one value a trial"):
        search_plots.pareto({"a": score, "b": score[:3]}, front, 0)


def test_one_trial_and_equal_trials_can_be_drawn() -> None:
    for trials in (1, 3):
        options, score = {"adv1": np.ones(trials), "head": np.array(["x"] * trials, dtype=object)}, np.zeros(trials)
        for figure in (
            search_plots.search_effects(options, score, tune.importance(options, score, 0), 0, "score"),
            search_plots.search_parallel(options, score, np.ones(trials, bool), "score"),
        ):
            figure.canvas.draw()


# --- what it found, as options


def test_weights_of_a_file_go_before_the_preset_s_and_after_the_command_line_s(tmp_path: Path) -> None:
    best, folder = tmp_path / "best.json", str(tmp_path / "run")
    best.write_text(json.dumps({"weights": {"recon_x": 3.5, "adv1": 0.25}, "train": {"lr": 5e-4}}))
    given = ["--dataset", "synthetic", "--run", folder, "--preset", "quick"]
    options = parse(train.TrainOptions, [*given, "--weights", str(best), "--adv1", "2"])
    assert options.weights == replace(PRESETS["quick"].weights, recon_x=3.5, adv1=2.0)
    assert options.train == replace(PRESETS["quick"].train, lr=5e-4)
    run = Run(folder)
    run.state["options"] = json.loads(json.dumps(dataclasses.asdict(options)))
    run.save()
    best.unlink()
    assert parse(full.FullOptions, ["--run", folder]).weights == options.weights  # kept by value
    for text in ("{}", "[1]", "no json", '{"weights": {"recon_z": 1}, "train": {}}'):
        best.write_text(text)
        with pytest.raises(UserError, match=r"--weights .*best\.json is no best\.json"):
            parse(train.TrainOptions, [*given, "--weights", str(best)])
    with pytest.raises(UserError, match="No such file"):
        parse(train.TrainOptions, [*given, "--weights", str(tmp_path / "none.json")])


# --- a real search


@pytest.mark.slow
def test_a_search_before_training_killed_and_called_again_is_whole(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "searched"
    folder.mkdir()
    for part in ("shards", "classifier", "predictions"):
        shutil.copytree(finished / part, folder / part)
    memory = state(finished)
    memory["stages"] = {name: memory["stages"][name] for name in ("shard", "classify")}
    (folder / "run.json").write_text(json.dumps(memory))
    given = memory["options"]["weights"]

    # So wide that some trials overflow, which must not end the search.
    how = ["--tune", "3", "--stages", "tune", "train", "--span", "1e50"]
    if importlib.util.find_spec("optuna") is None:
        how += ["--search", "asha"]

    def underway() -> list[str]:
        known = "".join(path.read_text() for path in folder.glob("checkpoints/tune/search/experiment_state-*.json"))
        begun = [path.parent.name for path in folder.glob("checkpoints/tune/*/checkpoint_manager_snapshot.json")]
        return [trial for trial in begun if trial in known]

    kill_when(lambda: bool(underway()), tmp_path / "log", "full.py", "--run", str(folder), *how)
    killed = underway()
    assert killed and not (folder / "tune").exists() and (folder / "checkpoints/tune/start.pt").exists()
    done = command("full.py", "--run", str(folder), *how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "goes on at pair 24" in done.stdout and "3/3  trial" in done.stdout
    assert done.stdout.count("warmed up") == 1  # stage train; the trials take what the first one left
    assert not (folder / "checkpoints/tune").exists()

    trials = pd.read_csv(folder / "tune/trials.csv", index_col="trial", keep_default_na=False, na_values=[""])
    assert len(trials) == 3 and trials.index.is_unique and set(killed) <= set(trials.index)
    assert any(all(math.isclose(row[name], given[name]) for name in LAMBDA_AND_PHI) for _, row in trials.iterrows())
    largest = trials[sorted(LAMBDA_AND_PHI)].max(axis=1)
    assert (trials.outcome[largest > 1e40] == "failed").all() and (trials.outcome[largest < 1e30] != "failed").all()
    assert trials.reason[trials.outcome == "failed"].str.contains("not finite: lower --lr").all()
    best = json.loads((folder / "tune/best.json").read_text())
    ended = trials[trials.outcome == "finished"]
    assert best["found"]["trial"] == ended.score.idxmax()
    for name in LAMBDA_AND_PHI:
        assert best["weights"][name] == pytest.approx(ended.loc[best["found"]["trial"], name])
    assert best["start"] == {"weights": given, "train": {}}
    # What was found is what was trained with.
    trained = json.loads((folder / "cae/config.json").read_text())
    assert trained["weights"] == best["weights"] == state(folder)["options"]["weights"]
    assert trained["train"]["pairs"] == memory["options"]["train"]["pairs"]

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient()
    stage = client.get_run(state(folder)["stages"]["tune"]["mlflow_run_id"])
    nested = client.search_runs([stage.info.experiment_id], f"tags.`mlflow.parentRunId` = '{stage.info.run_id}'")
    assert {run.data.tags["trial"] for run in nested} == set(trials.index) and len(nested) == 3
    for run in nested:
        row = trials.loc[run.data.tags["trial"]]
        assert run.data.tags["outcome"] == row.outcome
        assert run.info.status == ("FAILED" if row.outcome == "failed" else "FINISHED")
        assert float(run.data.params["recon_x"]) == pytest.approx(row.recon_x)
        if row.outcome == "finished":
            # One killed between a measurement and its checkpoint measures anew.
            history = client.get_metric_history(run.info.run_id, "train/score")
            assert {point.step for point in history} == {24, 48} and history[-1].step == 48
            assert client.list_artifacts(run.info.run_id, "swaps")
    logged = {Path(file.path).name for file in client.list_artifacts(stage.info.run_id, "tune")}
    assert logged == {"best.json", "trials.csv", "effects.png", "parallel.png", "pareto.png"}

    again = command("tune.py", "--run", str(folder))
    assert again.returncode == 0 and "already done" in again.stdout
