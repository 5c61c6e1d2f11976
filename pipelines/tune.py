"""Stage tune: a search for loss weights, by Ray Tune; every trial is a shorter training of stage train, by Ray Train.

Writes `tune/best.json`, which `train.py --weights` takes, `tune/trials.csv` and `tune/*.png`. A search that was killed
goes on from what Ray Tune keeps in `checkpoints/tune`, its trials from their own checkpoints.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from cae import search_plots
from cae.figures import png
from cae.losses import GRADIENT, choose_class_head
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import read_predicted
from pipelines.cluster import cores, gpus_of, threads_for, train_workers
from pipelines.command_line import command, read_best
from pipelines.mistakes import UserError, user_error
from pipelines.run import Run, Work
from pipelines.train import TrainOptions, check, fit, plan

WEIGHTS = ("recon_x", "recon_c", "recon_s", "cyc_x", "adv1", "cla1", "adv2", "cla2")  # lambda 1-6, phi 1-2
HEADS = ["learned", "distilled", "blackbox", "both"]
WANTED = ("believed", "aopc", "likeness")  # the factors of the score
MEASURES = ("score", *WANTED, "swap_success", "oracle_success", "keeps_class", "reconstruction_error")
# ASHA compares a trial after this share of its pairs, and after two and four times that, with those that came so far:
# the lower half is stopped.
FIRST_RUNG = 0.2
MEMORY_PERIOD = 5  # seconds after which Ray Tune writes down, at most, what it knows


@dataclass(frozen=True)
class TuneOptions(TrainOptions):
    """Search the loss weights lambda 1-6 and phi 1-2 by short trainings, measured on the split val. The best go to
    `tune/best.json` of the run folder, for `train.py --weights`; `full.py --tune N` searches and then trains with them.
    """

    trials: int = 16
    """Trials of the search: short trainings, each with its own weights; the first has the weights given."""
    search: Literal["asha", "optuna", "random"] = "optuna"
    """How: `random` draws weights and trains every trial to its end; `asha` draws them and stops bad trials early;
    `optuna` lets TPE propose them from what is known so far, and stops bad trials early."""
    metric: Literal["score", "believed", "swap_success", "aopc", "likeness"] = "score"
    """What to maximise, on held-out images: `score` is (`believed` * `aopc` * `likeness`)^(1/3). `believed`: share of
    images whose reconstruction keeps the class and whose swap has the donor's, for --oracle too; `aopc`: of their maps,
    disjoint patches; `likeness`: 1 - reconstruction error over that of the mean image."""
    span: float = 10.0
    """Each weight is searched from 1/SPAN to SPAN times the one given, evenly in its logarithm; one of 0 stays off."""
    budget: int = 2000
    """Pairs that a trial is trained on, at most; with too few, weights win that learn fast but end badly."""
    also: tuple[Literal["lr", "class_head"], ...] = ()
    """What to search beside the weights: the learning rate, within the square root of SPAN, or the class head."""


OptionsT = TypeVar("OptionsT", bound=TuneOptions)


def prepare(run: Run, options: TuneOptions) -> Work:
    """The work, on held-out images that trials can be measured on."""
    if not run.result("shard")["counts"].get("val"):
        raise UserError("a search measures its trials on the split val, which this data set has not: give it one")
    if len(np.unique(read_predicted(run, "val"))) < 2:
        raise UserError("a search measures swaps on val, all of which the classifier gives the same class")
    _proposals(options, [])
    check(options)
    plan(run, options)
    return partial(search, run, options)


def search(run: Run, options: TuneOptions) -> dict[str, Any]:
    """Search for weights; write the best ones, a table of the trials and figures; returns the best one's measures."""
    found = _tuner(run, options).fit()
    results = [found[i] for i in range(len(found))]
    table = pd.DataFrame([_row(result) for result in results])
    fine = table.outcome != "failed"
    if not fine.any():
        raise UserError(f"all {len(table)} trials failed, the first one: {table.reason[0]}")
    pairs, early = _at_equal_pairs([result for result in results if not result.error], options.metric)
    table.loc[fine, f"{options.metric}_after_{pairs}_pairs"] = early
    run.write("tune/trials.csv", table.to_csv(index=False).encode())
    # What was trained to the end goes before what was not.
    ended = table[fine].assign(finished=table.outcome == "finished")
    best = ended.sort_values(["finished", options.metric], ascending=False).iloc[0]
    _write_best(run, options, best)
    for name, figure in _pictures(table[fine], options, best.name, np.array(early), pairs).items():
        run.write(f"tune/{name}.png", png(figure))
    tracking.log_folder(run, "tune")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in table.outcome.value_counts().items())
    return {
        "says": f"{len(table)} trials ({counts}); best {options.metric} {best[options.metric]:.3f}, swap success "
        f"{best.swap_success:.3f}, trial {best.trial}",
        **{f"tune/{name}": float(best[name]) for name in MEASURES if name in best},
    }


def best_of(run: Run, options: OptionsT) -> OptionsT:
    """The options with what the run's finished search found in place of what it started from."""
    found = read_best(run.path("tune", "best.json"))
    return replace(
        options, weights=replace(options.weights, **found["weights"]), train=replace(options.train, **found["train"])
    )


# --- The search -------------------------------------------------------------------------------------------------------


def _tuner(run: Run, options: TuneOptions) -> tune.Tuner:
    """The search, from its beginning or from where it was."""
    one = replace(options, workers=options.workers or 1)
    # As many trials side by side as the cluster has GPUs, or else cores, for.
    together = max(1, (gpus_of(one) or cores(one)) // train_workers(one, one.train.batch))
    one = replace(one, threads=threads_for(one, together))
    # What a trial needs, its training asks for; of Tune it takes next to nothing, which must not be nothing.
    trainable = tune.with_resources(partial(_trial, options=one, of_search=tracking.of_stage()), {"memory": 1})
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(MEMORY_PERIOD)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is the user's: it does not end the search
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints, however silent it is asked to be
    warnings.filterwarnings("ignore", module="optuna")  # that it has heard of a trial's early measures before
    place, name = run.path("checkpoints", "tune"), "search"
    if run.fs.glob(f"{place}/{name}/experiment_state-*.json"):
        return tune.Tuner.restore(f"{place}/{name}", trainable)
    differentiable = run.result("classify").get("differentiable", True)
    space = _space(options, differentiable)
    proposals = _proposals(options, [_start(options, space, differentiable)])
    scheduler = FIFOScheduler() if options.search == "random" else ASHAScheduler(
        "progress", max_t=1, grace_period=FIRST_RUNG, reduction_factor=2, stop_last_trials=False  # type: ignore[arg-type]
    )  # fmt: skip
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=options.metric, mode="max", num_samples=options.trials, max_concurrent_trials=together,
            search_alg=proposals, scheduler=scheduler, trial_dirname_creator=_trial_id, trial_name_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=place, verbose=0, callbacks=[Watch(options.trials, options.metric, scheduler)]
        ),
    )  # fmt: skip


def _trial_id(trial: Trial) -> str:
    return trial.trial_id


def _space(options: TuneOptions, differentiable: bool = True) -> dict[str, Any]:
    """What is searched, by name: every weight log-uniform round the one given, unless that is 0, and what `--also` asks
    for; of class heads those that a classifier with a gradient, or without, can have."""
    given = {name: weight for name, weight in asdict(options.weights).items() if name in WEIGHTS and weight}
    space: dict[str, Any] = {
        name: tune.loguniform(weight / options.span, weight * options.span) for name, weight in given.items()
    }
    if "lr" in options.also:
        reach = options.span**0.5
        space["lr"] = tune.loguniform(options.train.lr / reach, options.train.lr * reach)
    if "class_head" in options.also:
        space["class_head"] = tune.choice([head for head in HEADS if differentiable or head not in GRADIENT])
    return space


def _start(options: TuneOptions, names: Iterable[str], differentiable: bool) -> dict[str, Any]:
    """What the search starts from: the options given, with what `auto` stands for."""
    head = choose_class_head(options.train.class_head, differentiable)
    given = {**asdict(options.weights), **asdict(options.train), "class_head": head}
    return {name: given[name] for name in names}


def _proposals(options: TuneOptions, first: list[dict[str, Any]]) -> Searcher | SearchAlgorithm:
    """Where trials' weights come from; the `first` ones are given."""
    if options.search != "optuna":
        return BasicVariantGenerator(points_to_evaluate=first, random_state=options.seed)
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise UserError("--search optuna needs the package optuna: pip install optuna, or --search asha") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A third of the trials at random, then TPE (its default is ten, which a short search would hardly get past).
    sampler = optuna.samplers.TPESampler(n_startup_trials=max(3, options.trials // 3), seed=options.seed)
    return OptunaSearch(sampler=sampler, points_to_evaluate=first)


def _with(options: TuneOptions, chosen: dict[str, Any]) -> TuneOptions:
    """The options of a trial: what was `chosen` in its place, and no more pairs than its budget."""
    weights = {name: value for name, value in chosen.items() if name in WEIGHTS}
    other = {name: value for name, value in chosen.items() if name not in WEIGHTS}
    train = replace(options.train, pairs=min(options.budget, options.train.pairs), **other)
    return replace(options, weights=replace(options.weights, **weights), train=train)


def _trial(chosen: dict[str, Any], options: TuneOptions, of_search: tuple[str, str]) -> None:
    """One trial, in a process of its own: stage train's training, which reports to Ray Tune."""
    name = tune.get_context().get_trial_id()
    run, mine = Run(options.run), _with(options, chosen)
    with tracking.trial(of_search, name, chosen):
        fit(run, mine, f"tune/{name}", plan(run, mine), start="checkpoints/tune/start.pt",
            callbacks=[TuneReportCallback()], retries=0)  # fmt: skip


class Watch(tune.Callback):
    """Says of every trial how it ended, to the user and MLflow, and keeps ASHA's memory, which Ray Tune forgets."""

    def __init__(self, trials: int, metric: str, scheduler: TrialScheduler) -> None:
        self.trials, self.metric, self.scheduler = trials, metric, scheduler

    def get_state(self) -> dict[str, Any]:
        return vars(self.scheduler)

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self.scheduler).update(state)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        last = trial.last_result
        outcome = "finished" if last.get("progress") == 1 else "stopped"
        says = f"after {last['pairs']:,} pairs: {self.metric} {last[self.metric]:.3f}, " if "pairs" in last else ""
        self._end(trials, trial, outcome, f"{says}swap success {last.get('swap_success', np.nan):.3f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trials, trial, "failed", _reason(trial.get_error()))

    def _end(self, trials: list[Trial], trial: Trial, outcome: str, says: str) -> None:
        tracking.end_trial(trial.trial_id, outcome)
        ended = 1 + sum(other.is_finished() for other in trials if other is not trial)
        print(f"tune      {ended}/{self.trials}  trial {trial.trial_id} {outcome} {says}", flush=True)


def _reason(error: Exception | None) -> str:
    """Why a trial failed, in one line."""
    if error is None:
        return "unknown"
    return user_error(error) or str(error).strip().splitlines()[-1][:300]


# --- What it found ----------------------------------------------------------------------------------------------------


def _row(result: tune.Result) -> dict[str, Any]:
    """A trial in the table: how it ended, its weights, its last measures."""
    last = result.metrics or {}
    outcome = "failed" if result.error else "finished" if last.get("progress") == 1 else "stopped"
    reason = _reason(result.error) if result.error else ""
    row = {"trial": os.path.basename(result.path), "outcome": outcome, "reason": reason, **(result.config or {})}
    return row | {name: last[name] for name in ("pairs", *MEASURES) if name in last}


def _at_equal_pairs(results: list[tune.Result], metric: str) -> tuple[int, list[float]]:
    """The most pairs that every trial was trained on, and the metric of each by then: a fair comparison of them all."""
    curves = [pd.DataFrame(result.metrics_dataframe).set_index("pairs")[metric] for result in results]
    pairs = min(curve.index.max() for curve in curves)
    return int(pairs), [float(curve.loc[:pairs].iloc[-1]) for curve in curves]


def _write_best(run: Run, options: TuneOptions, best: pd.Series) -> None:
    found = _with(options, {name: best[name] for name in _space(options)})
    about = {name: best[name] for name in ("trial", "outcome", "pairs", *MEASURES) if name in best}
    about |= {"metric": options.metric, "dataset": options.dataset, "preset": options.preset, "seed": options.seed}
    content = _chosen(found) | {"start": _chosen(options), "found": about}
    run.write("tune/best.json", json.dumps(content, indent=1, default=lambda number: number.item()).encode())


def _chosen(options: TuneOptions) -> dict[str, Any]:
    """What a search searches, and the other weights, as `train --weights` takes them."""
    return {"weights": asdict(options.weights), "train": {name: getattr(options.train, name) for name in options.also}}


def _pictures(table: pd.DataFrame, options: TuneOptions, best: int, early: np.ndarray, pairs: int) -> dict[str, Figure]:
    """Figures of the trials that did not fail; `best` is the label of one, `early` their metric after `pairs` pairs."""
    searched = {name: table[name].to_numpy() for name in _space(options)}
    wanted = {name: table[name].to_numpy() for name in WANTED}
    place = table.index.get_loc(best)
    return {
        "effects": search_plots.search_effects(
            searched, early, importance(searched, early, options.seed), place, f"{options.metric} after {pairs:,} pairs"
        ),
        "parallel": search_plots.search_parallel(
            searched, table[options.metric].to_numpy(), (table.outcome == "finished").to_numpy(), options.metric
        ),
        "pareto": search_plots.pareto(wanted, non_dominated(np.stack(list(wanted.values()), 1)), place),
    }


def importance(options: dict[str, np.ndarray], score: np.ndarray, seed: int) -> dict[str, float]:
    """By how much, in units of the scores' variance, a random forest tells the scores (T,) worse with one option
    (T,) shuffled among trials; mean of 30 shuffles. A few trials say little: compare with what chance would give.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    if len(score) < 2:
        return dict.fromkeys(options, 0.0)
    # Logarithms of numbers, places of words.
    columns = [np.unique(v, return_inverse=True)[1] if v.dtype == object else np.log(v) for v in options.values()]
    forest = RandomForestRegressor(random_state=seed).fit(np.stack(columns, 1), score)
    found = permutation_importance(forest, np.stack(columns, 1), score, n_repeats=30, random_state=seed)
    return dict(zip(options, found.importances_mean.tolist(), strict=True))


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which (T,) of the points (T, M), larger is better, no other one equals in all M and beats in one."""
    beaten = [(np.all(points >= point, axis=1) & np.any(points > point, axis=1)).any() for point in points]
    return ~np.array(beaten)


OWN = ("trials", "search", "metric", "span", "budget", "also", "oracle", "labels", "model", "train", "weights")


def main(options: TuneOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    result = runs.run_stage("tune", options, prepare, OWN, needs=("shard", "classify"))
    run = Run(options.run)
    if run.fs.exists(run.path("checkpoints", "tune")):  # not before the result is noted: a kill would lose the search
        run.fs.rm(run.path("checkpoints", "tune"), recursive=True)
    return result


if __name__ == "__main__":
    import pipelines.tune as itself  # other processes find its functions by this name, not in __main__

    command(itself.TuneOptions, itself.main)
