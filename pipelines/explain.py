"""Stage explain: a map, its counterfactual and a status for every image and target, by Ray Data.

Writes `explanations/…parquet`, and over the first `--overlays` images maps as PNG in `overlays/`.

    python pipelines/explain.py --run RUN --archive PATH --out FOLDER

explains new images by a finished run: any archive that `cae.sources` reads, labelled or not. FOLDER is then a run
folder of this one stage, so that a call that was killed goes on when it is repeated.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from cae import classifiers, sources, training
from cae.explain import Mode, choose_mode
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import UNIT_ROWS, Unit, bulk, list_parts, listing, read_part, read_predicted, shard_units
from pipelines.cluster import connect, where
from pipelines.command_line import command
from pipelines.embed import EmbedOptions
from pipelines.maps import ArchiveWorker, ExplainWorker
from pipelines.mistakes import UserError
from pipelines.run import Run, Work
from pipelines.ways import check_donors, read_ways

Split = Literal["train", "val", "test", "archive"]
DEFAULT_SPLITS: tuple[Split, ...] = ("val", "test", "archive")


@dataclass(frozen=True)
class ExplainOptions(EmbedOptions):
    """Which images to explain, towards what, and how."""

    splits: tuple[Split, ...] = DEFAULT_SPLITS
    """Splits of the run to explain; add `train` to explain everything. An `--archive` is explained whole."""
    targets: str = "runner-up"
    """Classes to explain each image towards: `runner-up` (the classifier's second choice), `all`, or a class name
    (images of that class are then left out)."""
    counter: str = "medoid"
    """Where a path ends: at the class code of a training image to which the classifier gives the target class.
    `medoid`: of those near the class's mean the surest to flip; `random`: one drawn for each image; `nearest`: the one
    nearest to the image's own code, at the border and less sure to flip; neither is one that stands among the codes of
    another class. Or the id of an image of the run: then its class, by the classifier, is the target of every image
    (those of that class are then left out)."""
    donors: int = 1
    """Counter codes for each image and target. The map is the mean of theirs, and counts as flipped if at least half
    of their paths flip."""
    path: Literal["linear", "guided"] = "linear"
    """The way to a counter code: straight, or guided: the shortest one among the training codes, from neighbour to
    neighbour."""
    mode: Mode | Literal["auto"] = "auto"
    """How a path becomes a map: `integrated` (what changes from the image to its counterfactual, weighted by the
    classifier's gradient), `evidence` (that, and what the classifier loses where windows of the image are greyed, asked
    where `integrated` says most: 30 questions), `patch` (by questions only: what each window of the counterfactual does
    to the classifier in the image, and one of the image in the counterfactual: 166), `path` (the paper's: frame
    differences weighted by the rise of the target's probability), `contrast` (end against reconstruction) or `input`
    (end against image). `auto`: `integrated`, or `patch` where the classifier has no gradient."""
    window: float = 0.125
    """Side of the windows of modes `evidence` and `patch`, as a share of the image's; they stand nearly side by side.
    0.125 takes 25 and 162 of them an image, 0.25 takes 8 and 50."""
    smooth: float = 0.05
    """Sigma of the Gaussian that maps are blurred by, as a share of the image's side; 0: none, as in the paper."""
    fade: float = 0.25
    """Modes `integrated` and `evidence`: share of its contrast that the counterfactual has lost at the end of the way;
    0: none. With some, maps also show what the image's own class needs and the other class has as well."""
    steps: int = 0
    """Steps of the path; 0: as the mode needs, 1 for `integrated`, `evidence` and `patch` on a linear path, else 8,
    then bisection."""
    margin: float = 0.0
    """How far, in probability, the target must be ahead of every other class to end the path."""
    inversion: int = 8
    """Steps, at most, that fit the individual code to an image whose reconstruction the classifier gives another class,
    by its pixels alone, until it gives the right one twice, so 2 at least; 0: none, as in the paper."""
    frames: bool = False
    """Keep the frames of every path as PNG in the Parquet files; `--steps` says how many."""
    overlays: int = 24
    """Images whose maps are also drawn over them as PNG files."""


@dataclass(frozen=True)
class ArchiveOptions(ExplainOptions):
    """Explain the images of a run's own splits; or, by a finished run, those of `--archive`."""

    archive: str = ""
    """New images to explain, labelled or not: a folder, a zip or tar archive, a list of paths or URLs as CSV or
    Parquet, Parquet with images, or .npz; a path or URL. It is only read."""
    out: str = ""
    """The folder (or s3://…) that gets the explanations of --archive."""


def prepare(run: Run, options: ExplainOptions) -> Work:
    """The work, on splits that have images, and ways to a class that they are not of already."""
    options = replace(options, mode=check(options, run.result("classify")))
    held = run.result("shard")["counts"]
    for wanted in options.splits:
        if wanted not in held and wanted not in DEFAULT_SPLITS:
            raise UserError(f"--splits {wanted}: there is none, only {', '.join(sorted(held))}")
    units = shard_units(run, options.splits)
    if not units:
        raise UserError(f"no images in the splits {', '.join(options.splits)}: choose others with --splits")
    connect()
    how = explainer(run, options)
    targets = how["ways"].targets
    if targets in how["names"]:
        own = how["names"].index(targets)
        if (read_predicted(run, *options.splits) == own).all():
            raise UserError(f"the classifier gives every image the class {targets} already: choose other --targets")
    return partial(explain_images, run, options, units, how)


def explain_images(run: Run, options: ExplainOptions, units: list[Unit], how: dict[str, Any]) -> dict[str, Any]:
    """Explain every image of the splits asked for; returns the share of each status."""
    held = run.result("shard")["counts"]
    _share_overlays(units, options.overlays)
    bulk(run, options, "explain", units, ExplainWorker, "explanations", **how)
    counts, inverted = Counter[tuple[str, str]](), 0
    for part in list_parts(run, "explanations"):  # one after the other: an archive may have many millions of rows
        told = read_part(run, f"explanations/{part}", ["split", "status", "inversion_steps"])
        counts.update(zip(told["split"].to_pylist(), told["status"].to_pylist(), strict=True))
        inverted += sum(steps is not None and steps > 0 for steps in told["inversion_steps"].to_pylist())
    totals, statuses = Counter[str](), Counter[str]()
    for (split, status), count in counts.items():
        totals[split] += count
        statuses[status] += count
    metrics = {f"explain/{split}/flipped": counts[split, "flipped"] / total for split, total in totals.items()}
    says = ", ".join(f"{name} {count:,} ({count / statuses.total():.1%})" for name, count in statuses.most_common())
    says += f"; {inverted:,} of them after inversion" if inverted else ""
    left_out = ", ".join(f"{count:,} of {name}" for name, count in held.items() if name not in options.splits)
    if left_out:
        says += f"; not explained: {left_out} (see --splits)"
    if options.overlays:
        tracking.log_folder(run, "overlays")
    says = f"{statuses.total():,} maps by mode {options.mode}: {says}"
    return {"says": says, "statuses": dict(statuses), "inverted": inverted, "classes": how["names"], **metrics}


def prepare_archive(run: Run, options: ArchiveOptions, model: Run) -> Work:
    """The work: every image of an archive by the finished run `model`, into `run`."""
    options = replace(options, mode=check(options, model.result("classify")))
    found = sources.survey(options.archive, UNIT_ROWS)
    units = [piece | {"part": f"{i:06d}.parquet"} for i, piece in enumerate(found.pieces)]
    told = {"explained_by": model.folder, "model": _fingerprint(model)}
    told["listing"] = hashlib.sha256((listing(units, found.version) + told["model"]).encode()).hexdigest()
    other = run.state.get("listing") != told["listing"] and list_parts(run, "explanations")
    if other and not options.again:
        raise UserError(
            f"{run.folder} holds explanations of another archive or model, or it has changed since, or they were begun "
            "by an earlier version: choose another --out, or drop them with --again"
        )
    connect()
    return partial(explain_archive, run, options, units, told, explainer(model, options))


def explain_archive(run: Run, options: ArchiveOptions, units: list[Unit], told: dict[str, str],
                    how: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Explain every image of an archive, of which (and of the model) run.json is `told`; returns counts by status."""
    run.state |= told
    run.save()
    _share_overlays(units, options.overlays)
    bulk(run, options, "explain", units, ArchiveWorker, "explanations/_parts", **how)

    statuses, reasons = Counter[str](), Counter[str]()
    for part in list_parts(run, "explanations/_parts"):
        for row in read_part(run, f"explanations/_parts/{part}").to_pylist():
            statuses[row["status"]] += row["rows"]
            reasons[row["error"]] += row["rows"]
    reasons.pop("", None)
    says = ", ".join(f"{name} {count:,} ({count / statuses.total():.1%})" for name, count in statuses.most_common())
    if reasons:
        says += f"; most often: {reasons.most_common(1)[0][0]}"
    if options.overlays:
        tracking.log_folder(run, "overlays")
    return {
        "says": f"{statuses.total():,} rows by mode {options.mode} in {run.path('explanations')}: {says or 'none'}",
        "statuses": dict(statuses),
        "classes": how["names"],
        "reasons": dict(reasons.most_common(100)),
        **{f"explain/rows/{name}": float(count) for name, count in statuses.items()},
    }


def check(options: ExplainOptions, chosen: dict[str, Any]) -> Mode:
    """The mode, as far as `auto` hangs on the classifier, of which stage classify noted down `chosen`.

    Raises UserError where `--targets` names no class of it and for more `--donors` than there are, ValueError for a
    `--mode` that it cannot do.
    """
    names = chosen["classes"]
    if options.targets not in ("runner-up", "all", *names):
        raise UserError(f"--targets {options.targets}: choose runner-up, all, or one of {', '.join(names)}")
    check_donors(options)
    return choose_mode(options.mode, chosen.get("differentiable", True))


def _share_overlays(units: list[Unit], overlays: int) -> None:
    """Say under `overlays` how many images of each unit are to be drawn: of the first units, all."""
    for unit in units:
        unit["overlays"] = min(overlays, unit["rows"])
        overlays -= unit["overlays"]


def _fingerprint(model: Run) -> str:
    """A hash of what explains: the CAE's weights, the classifier and the counter codes; 64 hexadecimal digits."""
    found = hashlib.sha256(model.result("classify").get("fingerprint", "").encode())
    for name in ("cae/model.safetensors", "manifold/counter_codes.parquet"):
        with model.fs.open(model.path(name), "rb") as file:
            found.update(file.read())
    return found.hexdigest()


def explainer(model: Run, options: ExplainOptions) -> dict[str, Any]:
    """What `ExplainWorker` takes to explain as the finished run `model` does."""
    chosen = model.result("classify")
    classifiers.load(chosen["spec"], tuple(chosen["classes"]))  # fails here, early, when it is not there any more
    training.load(model.path("cae"))  # ... or where another version saved it
    return {
        "spec": chosen["spec"], "names": tuple(chosen["classes"]), "cae": model.path("cae"),
        "size": options.model.image_size, "fit": options.fit, **where(options),
        "ways": read_ways(model, options), "frames": options.frames, "how": path_options(options),
    }  # fmt: skip


def path_options(options: ExplainOptions) -> dict[str, Any]:
    """What `cae.explain.explain` takes of the options."""
    return {"mode": options.mode, "smooth": options.smooth, "fade": options.fade, "steps": options.steps or None,
            "margin": options.margin, "window": options.window, "inversion": options.inversion}  # fmt: skip


OWN = ("splits", "targets", "counter", "donors", "path", "mode", "window", "smooth", "fade", "steps", "margin",
       "inversion", "frames", "overlays")  # fmt: skip
NEEDS = ("shard", "classify", "train", "embed")


def main(options: ExplainOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("explain", options, prepare, OWN, NEEDS)


def run_archive(options: ArchiveOptions) -> dict[str, Any]:
    """Run the stage on an archive of new images, if one is given, else on the run folder."""
    if not options.archive and not options.out:
        return main(options)
    if not options.archive or not options.out:
        raise UserError("--archive says what to explain and --out where to: give both, or neither")
    archive, out = (
        path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
        for path in (options.archive, options.out)
    )
    if f"{out}/".startswith((f"{archive}/", f"{options.run}/")):
        raise UserError(f"--out {options.out} lies in the archive or in the run folder: choose a folder of its own")
    there = Run(out)
    if set(there.state["stages"]) - {"explain"}:
        raise UserError(f"--out {options.out} is the folder of another run: choose a folder of its own")
    model = Run(options.run)
    runs.refuse_unfinished(model, options, NEEDS)
    # How to explain may be chosen anew; what the model was made with may not.
    runs.refuse_contradictions(model, options, "explain", only_before=True)
    if there.done("explain") and not options.again and there.state.get("model", known := _fingerprint(model)) != known:
        raise UserError(f"{out} holds explanations by another model: choose another --out, or drop them with --again")
    # The new folder is a run folder of this stage alone; it is tracked where the finished run is.
    options = replace(options, run=out, archive=archive, tracking_uri=tracking.store(model, options))
    return runs.run_stage("explain", options, partial(prepare_archive, model=model), (*OWN, "archive"))


if __name__ == "__main__":
    command(ArchiveOptions, run_archive)
