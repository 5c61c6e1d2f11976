"""Stage evaluate: how far to trust the maps and the manifold. The numbers by Ray Data; tables, figures, report.html.

Writes `evaluation/…`, `figures/*.png` and `report.html`. What is measured on images is in `pipelines.measure`, what
becomes of it in `pipelines.tables`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from cae import training
from cae.blackboxes import fingerprint
from cae.explain import PAPER_MODES, Mode, choose_mode
from cae.manifold import smote_codes
from cae.peers.table import peers
from pipelines import run as runs
from pipelines import tables, tracking
from pipelines.bulk import Unit, bulk, read_part, read_table, read_unit, shard_units
from pipelines.classify import accuracy_table
from pipelines.cluster import connect, where
from pipelines.command_line import command
from pipelines.explain import ExplainOptions, path_options
from pipelines.measure import AT_ONCE, SMOOTHED, MeasureWorker
from pipelines.mistakes import UserError
from pipelines.report import write_report
from pipelines.run import Run, Work
from pipelines.shard import read_groups
from pipelines.timing import TIMED, TimeWorker
from pipelines.train import open_oracle
from pipelines.ways import read_ways

SWAPS = 2000  # images a split whose class codes are swapped, at most
DONORS = 5  # swaps of each image: of one each, some tens of odd donors move the success by a percent or two
NEW_CODES, MOST_NEW_CODES = 2000, 40_000  # class codes made by SMOTE, of each class, and of all at most
UNSMOOTHED, UNFADED = "CAE, not smoothed", "CAE, not faded"
SHOWN = 8  # images whose maps by every method are drawn side by side
MEASURED = AT_ONCE  # images measured in a unit: short ones tell sooner how long it takes, and keep all cores busy


@dataclass(frozen=True)
class EvaluateOptions(ExplainOptions):
    """How to measure the explanations."""

    tables: Literal["brief", "full"] = "brief"
    """`brief`: CAE's maps against Grad-CAM and the controls, under noise. `full`: all of the paper's tables and
    figures: every `--mode` and every peer, three fills, insertion and deletion, resampled class codes, seconds per
    map; thousands of questions to the classifier for every image of `--evaluated`."""
    evaluated: int = 64
    """Images of each split whose maps are measured by perturbation, among those that the classifier gets right."""
    draws: int = 5
    """Random fills that AOPC under noise is averaged over; the long curves and areas take one."""


def prepare(run: Run, options: EvaluateOptions) -> Work:
    """The work: which image to measure how, and by what."""
    chosen = run.result("classify")
    names = tuple(chosen["classes"])
    options = replace(options, mode=choose_mode(options.mode, chosen.get("differentiable", True)))
    oracle = open_oracle(options, run.result("classify"))
    plan = make_plan(run, options)
    if not plan.units:
        why = "; ".join(f"{what}: {reason}" for what, reason in plan.skipped.items())
        raise UserError(f"there is nothing to measure ({why})")
    training.load(run.path("cae"))  # fails here, in a line, where another version saved it
    connect()
    common = {"spec": chosen["spec"], "names": names, "size": options.model.image_size, "fit": options.fit,
              "ways": read_ways(run, options), "modes": own_modes(options), **where(options)}  # fmt: skip
    return partial(evaluate, run, options, plan, common, oracle)


def evaluate(run: Run, options: EvaluateOptions, plan: Plan, common: dict[str, Any], oracle: str) -> dict[str, Any]:
    """Measure swaps, manifold and maps; write tables, figures and the report; returns the headline numbers."""
    names, full = common["names"], options.tables == "full"
    runs.drop_if_other(run, "evaluate", fingerprint(oracle) if oracle else "", "evaluation/images")
    bulk(run, options, "evaluate", plan.units, MeasureWorker, "evaluation/images", **common,
         oracle=oracle, full=full, draws=options.draws, seed=options.seed, smooth=options.smooth)  # fmt: skip
    rows = read_table(run, "evaluation/images", parts=[unit["part"] for unit in plan.units]).to_pandas()
    codes = read_table(run, "codes", ["split", "id", "predicted", "class_code"]).to_pandas()
    codes = tables.sample_codes(codes, options.seed)
    groups = read_groups(run, pd.concat([rows.id, codes.id]))
    for of_images in (rows, codes):
        of_images["group"] = of_images.id.map(groups)
    maps = tables.map_rows(rows)
    told = {kind: peer.told for name, peer in peers().items() for kind in (name, name + SMOOTHED)}
    said = read_table(run, "predictions", ["id", "probabilities"])
    said = said.filter(pc.is_in(said["id"], pa.array(rows.id)))
    said = dict(zip(said["id"].to_pylist(), said["probabilities"].to_pylist(), strict=True))
    found = {
        "accuracy": accuracy_table(run, names),
        "swap_success": tables.swap_table(rows, names),
        "confidence": tables.confidence_table(rows, said),
        "counterfactuals": tables.counterfactual_table(rows),
        "separability": tables.separability_table(codes, options.seed),
        "perturbation": tables.perturbation_table(maps, told),
        "perturbation_by_class": tables.classes_table(maps, names, told),
        "localisation": tables.localisation_table(maps),
        "grid": tables.grid_table(rows),
        "training": tables.training_table(run.state["stages"], tracking.read_history(run, "train")),
        "skipped": tables.skipped_table(rows, maps, plan.skipped),
        "measured": rows[rows.measured][["split", "id", "source"]],
    }
    if full:
        found |= {"fill_agreement": tables.agreement_table(found["perturbation"]),
                  "modes": tables.modes_table(maps, told),
                  "new_codes": tables.new_code_table(rows, names)}  # fmt: skip
        if plan.timed:
            # Without a part it costs what the CAE does; and how many of a few images are inverted is chance.
            timed = {name: how | {"inversion": 0} for name, how in common["modes"].items()
                     if name not in (UNSMOOTHED, UNFADED)}  # fmt: skip
            bulk(run, options, "evaluate", [plan.timed], TimeWorker, "evaluation/times", **common | {"modes": timed})
            found["time_per_map"] = tables.time_table(read_part(run, "evaluation/times/times.parquet").to_pandas())
    for name, table in found.items():
        run.write(f"evaluation/{name}.csv", table.to_csv(index=False).encode())
        tracking.log_folder(run, f"evaluation/{name}.csv")
    write_report(run, options, rows, maps, found, plan.headline, names)
    for name in ("figures", "report.html"):
        tracking.log_folder(run, name, whole=True)
    numbers = headline_numbers(found, plan.headline)
    swaps = ", ".join(f"{key.split('/')[1]} {value:.3f}" for key, value in numbers.items()
                      if key.startswith("swap_success/") and key.count("/") == 1)  # fmt: skip
    return {
        "says": f"swap success {swaps}; AOPC (disjoint) {numbers.get('aopc_disjoint/cae', float('nan')):.3f}"
    } | numbers


def own_modes(options: EvaluateOptions) -> dict[str, dict[str, Any]]:
    """The CAE's methods by their name in tables, and what `explain` takes for each: the run's own mode is `CAE`."""
    modes: dict[str, ExplainOptions] = {"CAE": options}
    if options.tables == "full":
        if options.smooth:
            modes[UNSMOOTHED] = replace(options, smooth=0)
        if options.fade and options.mode in ("integrated", "evidence"):
            modes[UNFADED] = replace(options, fade=0)
        for mode in get_args(Mode):
            if mode != options.mode:
                how = replace(options, smooth=0, inversion=0) if mode in PAPER_MODES else options  # to the letter
                modes[f"CAE {mode}"] = replace(how, mode=mode, steps=0)
    return {name: path_options(how) for name, how in modes.items()}


# --- What to do with which image -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What stage evaluate does."""

    headline: str
    """The split that the report's headline is of: test, or the last one explained."""
    units: list[Unit]
    """For `MeasureWorker`."""
    timed: Unit | None
    """For `TimeWorker`, if there are images to time on."""
    skipped: dict[str, str]
    """What cannot be done -> why."""


def make_plan(run: Run, options: EvaluateOptions) -> Plan:
    """Which image to swap with whose class code, and which to measure, show and combine with new class codes."""
    codes = read_table(run, "codes", ["id", "split", "label", "predicted", "class_code"]).to_pandas()
    explained = read_table(run, "explanations", ["id", "split", "status"]).to_pandas()
    rng, by_image = np.random.default_rng(options.seed), np.random.default_rng((options.seed, 1))
    full = options.tables == "full"
    splits = [split for split in options.splits if (codes.split == split).any()]
    headline = "test" if "test" in splits else splits[-1]
    tasks: dict[str, dict[str, Any]] = {}
    nothing: dict[str, Any] = {
        "donor": None, "donor_class": None, "donor_code": None, "other_donors": [], "measured": False,
        "located": False, "shown": False, "new_codes": [], "new_classes": [],
    }  # fmt: skip
    for split in splits:
        of_split = codes[codes.split == split].sort_values("id")
        classes = of_split.predicted.to_numpy()
        for i in rng.permutation(len(of_split))[:SWAPS]:
            others = np.flatnonzero(classes != classes[i])
            if len(others):
                donor = of_split.iloc[int(rng.choice(others))]
                more = of_split.iloc[by_image.choice(others, DONORS - 1)]
                tasks[of_split.iloc[int(i)].id] = nothing | {
                    "donor": donor.id, "donor_class": int(donor.predicted), "donor_code": donor.class_code.tolist(),
                    "other_donors": [(int(one.predicted), one.class_code.tolist()) for one in more.itertuples()],
                }  # fmt: skip
    skipped: dict[str, str] = {}
    for split in splits:
        if codes.predicted[codes.split == split].nunique() < 2:
            skipped[f"swaps of {split}"] = "the classifier gives all its images one class: there is none to swap with"
    for split in sorted(splits, key=lambda split: split != headline):  # whatever other splits there are
        fine = set(explained[(explained.split == split) & (explained.status != "failed")].id)
        of_split = codes[codes.split == split]
        right = of_split[of_split.id.isin(fine)].sort_values("id")
        without = len(of_split) - len(right)
        if right.label.notna().any():
            right = right[right.label == right.predicted]
        wrong = len(of_split) - without - len(right)
        if without or len(right) < options.evaluated:
            skipped[f"maps of {split}"] = (
                f"of {len(of_split)} images {without} have no explanation and {wrong} are misclassified or unlabelled; "
                f"of the other {len(right)}, {options.evaluated} at most (--evaluated) are measured"
            )
        order = rng.permutation(len(right))
        measured = right.iloc[order[: options.evaluated]]
        # Where the truth is known, maps are held to it on more of these, unless every peer makes them too.
        for name in (measured if full else right.iloc[order[:SWAPS]]).id:
            tasks[name] = tasks.get(name, nothing) | {"located": True}
        for name in measured.id:
            tasks[name] = tasks.get(name, nothing) | {"measured": True}
        if split == headline:  # a few of every class, chosen by the seed and not by their looks
            shown = measured.groupby("predicted").head(max(1, SHOWN // max(1, measured.predicted.nunique())))
            for name in shown.id[: 2 * SHOWN]:
                tasks[name] |= {"shown": True}
    if full:
        skipped |= _spread_new_codes(codes, tasks, headline, options.seed)
    whole, units = [], []
    for unit in shard_units(run, tuple(splits)):
        table = read_unit(run, unit, ["id", "mask"])
        known = table["mask"].is_valid().to_pylist()
        chosen = [
            {"row": i} | tasks[name] | {"located": tasks[name]["located"] and known[i]}
            for i, name in enumerate(table["id"].to_pylist()) if name in tasks
        ]  # fmt: skip
        whole.append(unit | {"tasks": chosen, "explanations": unit["part"]})
        for some in _cut(chosen):
            part = f"{unit['part'].removesuffix('.parquet')}-{some[0]['row']:04d}-{some[-1]['row']:04d}.parquet"
            units.append(whole[-1] | {"tasks": some, "rows": len(some), "part": part})
    return Plan(headline, units, _timed(whole), skipped)


def _cut(tasks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Tasks in units: MEASURED of those whose maps are measured in each, and all others, which cost little, in one.

    An archive's neighbours are often of one class and one patient, so a unit's images come from all over the shard.
    """
    costly = [task for task in tasks if task["measured"] or task["located"]]
    cheap = [task for task in tasks if not (task["measured"] or task["located"])]
    count = -(-len(costly) // MEASURED)
    return [costly[first::count] for first in range(count)] + ([cheap] if cheap else [])


def _spread_new_codes(codes: pd.DataFrame, tasks: dict[str, dict[str, Any]], split: str, seed: int) -> dict[str, str]:
    """Give every image of the split that is swapped its share of new class codes, made by SMOTE of training codes."""
    known = codes[codes.split == "train"]
    each = min(NEW_CODES, MOST_NEW_CODES // max(1, known.predicted.nunique()))
    try:
        if not len(known):
            raise ValueError("there are no training codes")
        if not each:
            raise ValueError(f"there are more than {MOST_NEW_CODES:,} classes")
        new, classes = smote_codes(np.stack(known.class_code.to_list()), known.predicted.to_numpy(), each, seed)
    except ValueError as error:
        return {"class codes by SMOTE": str(error)}
    of_split = set(codes[codes.split == split].id)
    owners = sorted(name for name, task in tasks.items() if name in of_split and task["donor"] is not None)
    for k, name in enumerate(owners):
        mine = slice(k, None, len(owners))
        tasks[name] |= {"new_codes": new[mine].tolist(), "new_classes": classes[mine].tolist()}
    return {} if owners else {"class codes by SMOTE": f"no image of {split} is swapped"}


def _timed(units: list[Unit]) -> Unit | None:
    """A unit of a few measured images, of the unit that has the most of them."""
    of_units = [(unit, [task for task in unit["tasks"] if task["measured"]]) for unit in units]
    unit, measured = max(of_units, key=lambda pair: len(pair[1]), default=({}, []))
    measured = measured[:TIMED]
    return unit | {"tasks": measured, "rows": len(measured), "part": "times.parquet"} if measured else None


# --- Numbers for MLflow ----------------------------------------------------------------------------------------------


def headline_numbers(found: dict[str, pd.DataFrame], headline: str) -> dict[str, float]:
    """Metric name -> value. Names without a split are of the headline's, those without a fill of `uniform`."""
    numbers: dict[str, float] = {}
    for row in found["swap_success"].itertuples():
        if row.direction == "all":
            numbers[f"swap_success/{row.split}"] = row.success
            numbers[f"reconstruction_keeps_class/{row.split}"] = row.reconstruction_keeps_class
            numbers[f"reconstruction_error/{row.split}"] = row.reconstruction_error
            if "oracle_success" in found["swap_success"]:
                numbers[f"oracle_success/{row.split}"] = row.oracle_success
        else:
            numbers[f"swap_success/{row.split}/{row.direction}"] = row.success
    for row in found["separability"].itertuples():
        numbers[f"separability/{row.split}"] = row.forest_mean
        numbers[f"separability_grouped/{row.split}"] = row.forest_grouped_mean
    for row in found["perturbation"].query("fill != ''").itertuples():
        measure = f"{row.measure}_{row.form}" if row.measure in ("aopc", "pd") else row.measure
        numbers[f"{measure}_{row.fill}/{row.split}/{_key(row.method)}"] = row.value
        if row.split == headline and row.fill == "uniform":
            numbers[f"{measure}/{_key(row.method)}"] = row.value
    for row in found["localisation"].itertuples():
        numbers[f"{row.measure}/{row.split}/{_key(row.method)}"] = row.value
        if row.split == headline:
            numbers[f"{row.measure}/{_key(row.method)}"] = row.value
    for row in found["counterfactuals"].itertuples():
        for measure in ("valid", "oracle_valid", "l1", "l2", "sparsity", "identity", "kid", "monotone"):
            numbers[f"counterfactual/{measure}/{row.split}/{row.kind}"] = getattr(row, measure)
    for row in found.get("new_codes", pd.DataFrame()).itertuples():
        numbers[f"new_codes_right/{_key(row.class_name)}"] = row.right
    for row in found.get("time_per_map", pd.DataFrame()).itertuples():
        numbers[f"seconds_per_map/{_key(row.name)}"] = row.seconds
    return {name: float(value) for name, value in numbers.items() if not pd.isna(value)}


def _key(name: str) -> str:
    """The name of a method as part of a metric's, where MLflow allows no bars."""
    return {"|x - reconstruction|": "reconstruction_error"}.get(name, re.sub(r"\W+", "_", name.lower()))


OWN = ("tables", "evaluated", "draws", "oracle")


def main(options: EvaluateOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("evaluate", options, prepare, OWN, needs=("shard", "classify", "train", "embed", "explain"))


if __name__ == "__main__":
    command(EvaluateOptions, main)
