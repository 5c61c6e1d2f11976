"""The run folder, its options, and which stages are done.

`run.json` is the run's memory. A stage notes its options there when it starts and its results when it is done, written
last, so a killed run goes on at the stage it was in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import fsspec

from cae.blackboxes import TRUSTED, fingerprint, resolve
from cae.config import Preset
from cae.data import DATASETS
from pipelines import tracking
from pipelines.mistakes import UserError, mistake

Work = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class RunOptions:
    """Options that every stage takes."""

    dataset: str = ""
    """A named data set (synthetic, chest_xray, brain_tumor, oct, brain_tumor1, brain_tumor2, face, pneumoniamnist), or
    a path or URL: a folder of images, a .zip or .tar archive, a list of paths or URLs (.csv, .tsv, .parquet),
    .parquet with images, or an .npz file in MedMNIST's layout."""
    preset: Preset = "quick"
    """Sizes of the networks and of their training: `paper` (256 pixels, the authors' network), `standard` (128, one
    GPU) or `quick` (64, minutes on a CPU). The default is `standard` where there is a GPU to use, else `quick`."""
    run: str = ""
    """Run folder, local or s3://. Default: DATASET-PRESET in $CAE_RUNS, else in runs/. An existing one goes on where it
    was, with its own options."""
    seed: int = 0
    """Seed of everything random, but for what held-out images are asked while a CAE trains: always the same."""
    tracking_uri: str = ""
    """MLflow server (http://…) or database (sqlite:///…). Default: $MLFLOW_TRACKING_URI, else mlflow.db beside the run
    folder (with a run folder on S3: in runs/)."""
    experiment: str = "cae"
    """MLflow experiment."""
    again: bool = False
    """Do the stages again that are asked for, with the options given now; what they and those after them made before
    is dropped."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. `auto` takes the GPUs that the cluster has; `cuda` waits for those that an autoscaler must
    start first, as many as `--workers` says."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic inside the networks. `auto`: bfloat16 in trainings on GPUs that have it, float32 in all else.
    `bfloat16`: in all stages, but for the gradients that maps are made of; faster on GPUs and on CPUs with AMX or
    AVX512-BF16 (others emulate it), and probabilities move by up to 0.01."""
    workers: int = 0
    """Training processes (DDP), and actors of the bulk stages. 0: one per GPU; without any, one to train and one actor
    per core, as far as there are 1000 images for each."""
    trust_pickle: bool = False
    """Open classifiers whose files may hold pickles, which can do anything with this account: whole networks saved by
    torch.save, and .pt2 files with more than a network and tensors. For this call only."""
    threads: int = 0
    """CPU threads of all the processes of a stage on a machine together, to leave cores to others. 0: one per core. For
    this call only: another on the same run folder must say it again."""


# These say how to run, not what to compute: they may differ from call to call on the same run folder.
FREE = {"run", "tracking_uri", "experiment", "device", "precision", "workers", "threads", "trust_pickle", "stages",
        "again", "best"}  # fmt: skip
OLDER = {"inversion": 0, "fade": 0.0}  # of explain, as it was before it had these options
PATHS = ("dataset", "data_root", "classifier", "oracle", "authors_generator")  # or names, or URLs
# What each stage leaves in the run folder, to go on from or to drop when it starts over.
WRITES = {
    "shard": ("shards",),
    "classify": ("checkpoints/classify", "classifier", "predictions"),
    "tune": ("checkpoints/tune", "tune"),
    "train": ("checkpoints/train", "cae"),
    "embed": ("codes", "manifold"),
    "explain": ("explanations", "overlays"),
    "evaluate": ("evaluation", "figures", "report.html"),
}


class Run:
    """A run folder. `path` names things in it; `run.json` is kept in `state` and written by `save`."""

    def __init__(self, folder: str) -> None:
        try:
            # No listings are kept: workers write what this process must see.
            self.fs, root = fsspec.url_to_fs(folder, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open the run folder {folder}: {error}") from error
        self.local = "file" in self.fs.protocol
        self.folder = root if self.local else folder.rstrip("/")
        file = self.path("run.json")
        self.state: dict[str, Any] = {"options": {}, "stages": {}}
        if self.fs.exists(file):
            try:
                with self.fs.open(file) as stream:
                    self.state |= json.load(stream)
                if not all(isinstance(self.state[name], dict) for name in ("options", "stages")):
                    raise ValueError("it is that of no run")
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{file} is damaged ({error}): give another --run, or bring back a copy of it"
                ) from error

    def path(self, *parts: str) -> str:
        """A path in the run folder, as fsspec, pyarrow and Ray take it."""
        return "/".join([self.folder, *parts])

    def save(self) -> None:
        """Write run.json."""
        try:
            self.write("run.json", json.dumps(self.state, indent=1, default=str).encode())
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror or error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file into the run folder, in one piece: a reader sees all of it, or what was there before."""
        path = self.path(name)
        if not self.local:  # an object store shows a file only when it is whole, and has no folders to make
            self.fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Hidden: who reads a folder of Parquet files takes one that a kill has left for one of them.
        draft = Path(path).with_name(f".{os.path.basename(path)}.{os.getpid()}.tmp")
        draft.write_bytes(data)
        draft.replace(path)

    def result(self, stage: str) -> dict[str, Any]:
        """What a finished stage noted down. Raises UserError when it is not done."""
        if not self.done(stage):
            raise UserError(
                f"the run {self.folder} has no finished stage {stage}: run pipelines/{stage}.py on it first"
            )
        result = self.state["stages"][stage]["result"]
        given = self.state["stages"].get("shard", {}).get("options", {}).get("classifier")
        if stage == "classify" and given == "":  # trained here: found again wherever the run folder is moved to
            return result | {"spec": self.path("classifier")}
        return result

    def done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return "result" in self.state["stages"].get(stage, {})

    def bound(self, stage: str) -> bool:
        """Whether a stage is held to the options it was begun with: done, or stopped with work worth going on from.

        One that failed for a mistake in its options is free to start over with others.
        """
        state = self.state["stages"].get(stage, {})
        return self.done(stage) or (bool(state) and not state.get("mistake") and self.left(stage))

    def left(self, stage: str) -> bool:
        """Whether there is anything that a stage has written."""
        return any(self.fs.exists(self.path(name)) for name in WRITES[stage])


def flat(options: RunOptions) -> dict[str, Any]:
    """Options as one flat table: flag name -> value."""
    return _flat(dataclasses.asdict(options))


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict):
            table |= {f"{name}.{k}" if name == "resnet" else k: v for k, v in value.items()}
        else:
            table[name] = value
    return table


def run_stage(name: str, options: RunOptions, prepare: Callable[[Run, Any], Work],
              own: tuple[str, ...], needs: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    """Do one stage of a run, once: refuse contradicting options, note the start, work, note the result.

    `prepare` refuses what cannot be done as asked, and returns the work; it writes nothing, and what a stage that is to
    be done again made before is dropped only after it. `own` are the option fields that decide this stage's outcome;
    `needs` the stages that must be done before.
    """
    run = Run(options.run)
    refuse_contradictions(run, options, name, only_before=options.again)
    if run.done(name) and not options.again:
        print(f"{name:9} already done in {run.folder}", flush=True)
        return run.state["stages"][name]["result"]
    refuse_unfinished(run, options, needs)
    held = run.state["stages"].get(name, {}).get("options")
    if held and set(held) != {"seed", *own} and run.bound(name) and not options.again:
        raise UserError(
            f"the stage {name} of {run.folder} was begun by another version of this project, whose rows have other "
            f"columns: finish it with that version, or do it anew (pipelines/{name}.py --again)"
        )
    work = prepare(run, options)
    run.save()  # fails here, before anything is dropped, where it cannot be written
    experiment = tracking.open_experiment(run, options)
    if options.again:
        _start_over(run, name)
    table = dataclasses.asdict(options)
    options_before, work_before = dict(run.state["options"]), run.bound(name)
    run.state["options"] |= table
    run.state |= {"versions": _versions(), "git": _git_commit()}
    decisive = json.loads(json.dumps({field: table[field] for field in ("seed", *own)}))
    begun_before = run.state["stages"].get(name, {})
    if begun_before and begun_before["options"] != decisive:
        if run.left(name):
            print(f"{name:9} starts over: it was begun with other options, and failed", flush=True)
        _drop(run, name)
        begun_before |= {"calls": 0, "seconds": 0.0}
    spent, begun = _spent(run, name, begun_before), time.time()
    calls = begun_before.get("calls", int(bool(begun_before))) + 1  # an earlier version did not count
    noted = {"options": decisive, "mistake": False, "calls": calls, "seconds": spent, "begun": begun}
    run.state["stages"][name] = begun_before | noted
    run.save()
    try:
        with tracking.tracked(run, options, experiment, name, flat(options), set(_flat(decisive))):
            result = work()
            seconds = spent + time.time() - begun
            tracking.log_metrics(
                {f"{name}/seconds": seconds} | {k: v for k, v in result.items() if isinstance(v, float)}
            )
    except Exception as error:
        found = mistake(error)
        if isinstance(found, ValueError):
            # What led here must not become the defaults. But with work left, one line of anybody's text is no proof of
            # a mistake: a call without options goes on with it, and only one that gives others starts over.
            if isinstance(found, UserError) or not run.left(name):
                run.state["options"] = options_before
            run.state["stages"][name]["mistake"] = not work_before  # which nobody may drop for what went wrong now
            run.save()
        raise
    run.state["stages"][name] |= {"seconds": round(seconds, 1), "result": result}
    run.save()
    says = result.get("says", "done")
    print(f"{name:9} {says}  ({seconds:.0f} s)", flush=True)
    return result


def _spent(run: Run, name: str, state: dict[str, Any]) -> float:
    """Seconds that calls of a stage took that were stopped, by what is noted of it: each until the last file that it
    left, as nothing is known of the time after."""
    if "begun" not in state:  # no call, or one of an earlier version
        return 0.0
    last = state["begun"]
    for left in WRITES[name]:
        for path, info in run.fs.find(run.path(left), detail=True).items():
            with suppress(FileNotFoundError):  # what outlived the call may clear up
                # Local files and S3 tell it with the listing; asking for each takes hours of a large archive.
                when = info.get("LastModified") or info.get("mtime") or run.fs.modified(path)
                last = max(last, when if isinstance(when, float) else when.timestamp())
    return state["seconds"] + last - state["begun"]


def refuse_unfinished(run: Run, options: RunOptions, needs: tuple[str, ...]) -> None:
    """Raise UserError when a stage is not done, or when its classifier is another one by now, or may run a pickle that
    is not trusted."""
    for stage in needs:
        run.result(stage)
    if "classify" not in needs:
        return
    known = run.result("classify")
    spec = known.get("spec", "")
    if spec.startswith(TRUSTED) and not options.trust_pickle:
        raise UserError(f"the classifier {spec.removeprefix(TRUSTED)} may run a pickle: say --trust-pickle again")
    if "fingerprint" in known and fingerprint(spec) != known["fingerprint"]:  # an earlier version took none
        raise UserError(
            f"the classifier {spec.removeprefix(TRUSTED)} has changed since stage classify of {run.folder}: bring back "
            "the one it was, or begin another --run with the new one"
        )


def _start_over(run: Run, name: str) -> None:
    """Forget a stage and those after it, and drop what they made, the last one first: killed on the way, what is left
    still has its stage, so the next call drops it too."""
    for stage in reversed(list(WRITES)[list(WRITES).index(name) :]):
        if stage in run.state["stages"]:
            run.state["stages"][stage] = {"options": {}}
            run.save()
            _drop(run, stage)
            del run.state["stages"][stage]
            run.save()


def drop_if_other(run: Run, stage: str, found: str, folder: str) -> None:
    """Drop what a killed call of the stage left in a folder, if it asked a classifier with another fingerprint."""
    state = run.state["stages"][stage]
    if state.get("fingerprint", found) != found and run.fs.exists(run.path(folder)):
        run.fs.rm(run.path(folder), recursive=True)
    state["fingerprint"] = found
    run.save()


def _drop(run: Run, stage: str) -> None:
    for name in WRITES[stage]:
        if run.fs.exists(run.path(name)):
            run.fs.rm(run.path(name), recursive=True)


def absolute(option: str, value: Any) -> Any:
    """The value of an option as it is for whoever stands elsewhere: of PATHS, a relative one made absolute."""
    if option not in PATHS or not value:
        return value
    if option in ("classifier", "oracle"):
        return resolve(value)
    value = os.path.expanduser(value)
    named = option == "dataset" and (value in (*DATASETS, "synthetic") or not os.path.exists(value))
    return value.rstrip("/") or value if named or "://" in value else os.path.abspath(value)


def refuse_contradictions(run: Run, options: RunOptions, name: str = "", only_before: bool = False) -> None:
    """Raise UserError when an option differs from the one that a stage of the run was made with.

    With `only_before` only the stages before `name` count: `name` itself is done over, or done for another folder.
    A search for weights binds itself alone, to its end: what it found may be taken or left.
    """
    table = json.loads(json.dumps(flat(options), default=str))
    for stage in list(WRITES)[: list(WRITES).index(name) if name and only_before else None]:
        if not run.bound(stage) or (stage == "tune" and (name != "tune" or run.done("tune"))):
            continue
        state = run.state["stages"][stage]
        # A run folder of an earlier version may know fewer options, or more.
        for field, was in ((OLDER if stage == "explain" else {}) | _flat(state["options"])).items():
            if field in FREE or table.get(field, was) in (was, absolute(field, was)):
                continue
            flag = "--" + field.replace("_", "-")
            raise UserError(
                f"{flag} {table[field]} contradicts the stage {stage} of {run.folder}, made with {flag} {was}: "
                f"choose another folder, leave the option out, or do that stage over "
                f"(pipelines/{stage}.py --again)"
            )


def _versions() -> dict[str, str]:
    packages = ("torch", "ray", "mlflow", "pyarrow", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _git_commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
