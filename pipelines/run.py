"""The run folder, its options, and which stages are done.

`run.json` is the run's memory. A stage notes its options there when it starts and its results when it is done, written
last, so a killed run goes on at the stage it was in.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints
from urllib.parse import urlsplit

import fsspec
import torch
import tyro

from cae.blackboxes import TRUSTED
from cae.config import PRESETS, LossWeights, Preset, TrainConfig
from pipelines import tracking


class UserError(ValueError):
    """A mistake that the user can mend; shown as one line without a traceback."""


@dataclass(frozen=True)
class RunOptions:
    """Options that every stage takes."""

    dataset: str = ""
    """A named data set (synthetic, chest_xray, brain_tumor, oct, brain_tumor1, brain_tumor2, face, pneumoniamnist), or
    the path of a folder of images or an .npz file in MedMNIST's layout."""
    preset: Preset = "quick"
    """Sizes of the networks and of their training: `paper` (256 pixels, the authors' network), `standard` (128, one
    GPU) or `quick` (64, minutes on a CPU). The default is `standard` where there is a GPU, else `quick`."""
    run: str = ""
    """Run folder, local or s3://. Default: DATASET-PRESET in $CAE_RUNS, else in runs/. An existing one goes on where it
    was, with its own options."""
    seed: int = 0
    """Seed of everything random."""
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
    workers: int = 0
    """Training processes (DDP), and actors of the bulk stages. 0: one per GPU; without any, one to train and one actor
    per core, as far as there are 1000 images for each."""
    trust_pickle: bool = False
    """Open classifiers whose files may hold pickles, which can do anything with this account: whole networks saved by
    torch.save, and .pt2 files with more than a network and tensors. For this call only."""
    threads: int = 0
    """CPU threads of all processes on a machine together, to leave cores to others. 0: one per core. For this
    call only: another on the same run folder must say it again."""


# These say how to run, not what to compute: they may differ from call to call on the same run folder.
FREE = {"run", "tracking_uri", "experiment", "device", "workers", "threads", "trust_pickle", "stages", "again", "best"}
# Of this call only, not to be the next one's defaults.
FORGOTTEN = {"run", "stages", "again", "threads", "trust_pickle", "best"}
# Least values of options that no other part looks at before hours of work.
LEAST = {"steps": 0, "threads": 0, "smooth": 0, "draws": 1, "evaluated": 0, "overlays": 0, "pairs": 1, "batch": 1,
         "donors": 1, "trials": 1, "tune": 0, "budget": 1, "span": 1}  # fmt: skip
# What each stage leaves in the run folder, to go on from or to drop when it starts over.
WRITES = {
    "shard": ("shards",),
    "classify": ("checkpoints/classify", "classifier", "predictions"),
    "tune": ("checkpoints/tune", "tune"),
    "train": ("checkpoints/train", "cae"),
    "embed": ("codes", "manifold"),
    "explain": ("explanations",),
    "evaluate": ("evaluation/images", "evaluation/times", "figures"),
}
UNREACHABLE = (ConnectionError, TimeoutError)  # a server, of images or of a classifier
OptionsT = TypeVar("OptionsT", bound=RunOptions)


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
            with self.fs.open(file) as stream:
                self.state = json.load(stream)

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
        draft = Path(f"{path}.{os.getpid()}.tmp")
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
        left = any(self.fs.exists(self.path(name)) for name in WRITES[stage])
        return self.done(stage) or (bool(state) and not state.get("mistake") and left)


def parse(options_class: type[OptionsT], argv: list[str] | None = None) -> OptionsT:
    """Options from the command line, on top of what the run folder holds, on top of the preset.

    So `--help` shows the values that would be used, and a later stage needs only `--run`.
    """
    argv = sys.argv[1:] if argv is None else argv
    dataset, preset, folder, best = (_peek(argv, name) for name in ("dataset", "preset", "run", "weights"))
    if preset is None:
        preset = "standard" if torch.cuda.is_available() else "quick"
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    if folder is None and dataset:
        base = os.environ.get("CAE_RUNS") or _local_base()
        folder = f"{base.rstrip('/')}/{Path(dataset.rstrip('/')).stem}-{preset}"
    if folder and "://" not in folder:
        folder = os.path.abspath(os.path.expanduser(folder))
    stored = Run(folder).state["options"] if folder else {}
    stored = {name: value for name, value in stored.items() if name not in FORGOTTEN}
    # What a run of an older version does not name is as it was then: off, as the authors have it.
    for name, group in dataclasses.asdict(PRESETS["paper"]).items():
        if name in stored:
            stored[name] = group | stored[name]
    # A preset on the command line is only a table of defaults: what the run folder holds goes before it.
    if best:  # and before that, what a search found
        stored |= {name: stored.get(name, {}) | values for name, values in read_best(best).items()}
    default = _from_dict(
        options_class, {"preset": preset} | stored | {"run": folder or ""}, stored.get("preset", preset)
    )
    options = tyro.cli(options_class, args=argv, default=default, config=(tyro.conf.AvoidSubcommands,))
    if not options.dataset:
        if stored or not folder:
            raise UserError("which data? say --dataset synthetic, another name or a path (see --help)")
        raise UserError(f"{folder} is no run folder yet: say --dataset NAME or PATH to begin one, or another --run")
    table = flat(options)
    for name, least in LEAST.items():
        if table.get(name, least) < least:
            raise UserError(f"--{name} is {table[name]}: it must be {least} at least")
    size = table.get("image_size", 32)
    if size % 4 or size < 32:
        raise UserError(f"--image-size is {size}: choose a multiple of 4 from 32 on")
    dataset = options.dataset.rstrip("/") or options.dataset
    folder = folder or options.run
    return dataclasses.replace(options, run=folder, tracking_uri=_tracking_uri(options, folder), dataset=dataset)


def _tracking_uri(options: RunOptions, folder: str) -> str:
    """Where to track, as workers that stand elsewhere find it; "" for beside the run folder."""
    uri = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and "://" in folder:
        uri = f"sqlite:///{_local_base()}/mlflow.db"
    if urlsplit(uri).password:
        raise UserError(
            "--tracking-uri holds a password, which run.json would show: take it out and set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD (for a PostgreSQL database: PGPASSWORD)"
        )
    if uri.startswith("sqlite:///"):
        uri = "sqlite:///" + os.path.abspath(uri.removeprefix("sqlite:///"))
    return uri


def command(options_class: type[OptionsT], main: Callable[[OptionsT], Any]) -> None:
    """The command line of a stage: parse, run, and show a user's mistake as one line."""
    try:
        main(parse(options_class))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except Exception as error:
        if os.environ.get("CAE_TRACEBACK"):
            raise
        reason = user_error(error)
        if reason is None:
            raise
        sys.exit(f"error: {reason}")


def user_error(error: BaseException) -> str | None:
    """The one-line reason when an error, or what caused it in a worker, is the user's to mend; else None."""
    mistake = _mistake(error)
    if _of_s3(mistake):
        return f"S3: {mistake}"
    if isinstance(mistake, UNREACHABLE):
        return f"no connection: {' '.join(str(mistake).split())}; the same command goes on from here"
    if isinstance(mistake, OSError):
        return f"{mistake.strerror}: {mistake.filename or 'the run folder'}"
    if mistake is None:
        return None
    return tracking.failure(mistake) or str(mistake)


def _mistake(error: BaseException | None) -> BaseException | None:
    """Of an error and what caused it, in a worker perhaps, the one that the user can mend, if any."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            return error
        if isinstance(error, UNREACHABLE):
            return error
        if tracking.failure(error) or _of_s3(error):
            return error
        # Pillow's, torch's and our own ValueErrors look alike; ours fit one line.
        if isinstance(error, ValueError) and "\n" not in str(error):
            return error
        failures = getattr(error, "worker_failures", None)
        error = next(iter(failures.values())) if failures else getattr(error, "cause", None) or error.__cause__
    return None


def _of_s3(error: BaseException | None) -> bool:
    """Whether S3 refused, or could not be asked: no credentials, no connection, no such bucket."""
    return type(error).__module__ == "botocore.exceptions"


def read_best(path: str) -> dict[str, dict[str, Any]]:
    """What a search found, by the options that hold it: `weights`, and of `train` what was searched too."""
    try:
        with fsspec.open(path) as file:
            best = json.load(file)
        for name, known in (("weights", LossWeights()), ("train", TrainConfig())):
            dataclasses.replace(known, **best[name])
        return {name: best[name] for name in ("weights", "train")}
    except OSError as error:
        raise UserError(f"--weights {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--weights {path} is no best.json of tune.py, or of another version") from error


def _peek(argv: list[str], name: str) -> str | None:
    for i, word in enumerate(argv):
        if word == f"--{name}" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _local_base() -> str:
    # Ray unpacks a job's working folder into a place that it deletes again.
    return os.path.expanduser("~/cae-runs") if "runtime_resources" in os.getcwd() else "runs"


def _from_dict(cls: type, stored: dict[str, Any], preset: Preset) -> Any:
    """An options object: stored values where there are any, else the preset's, else the class's own defaults."""
    row = PRESETS[preset]
    values, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            base = getattr(row, field.name, None) or hints[field.name]()
            # JSON has no tuples.
            kept = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.get(field.name, {}).items()}
            values[field.name] = dataclasses.replace(base, **kept)
        elif field.name in stored:
            kept = stored[field.name]
            values[field.name] = tuple(kept) if isinstance(kept, list) else kept
    return cls(**values)


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


def run_stage(name: str, options: RunOptions, work: Callable[[Run, Any], dict[str, Any]],
              own: tuple[str, ...], needs: tuple[str, ...] = ()) -> dict[str, Any]:  # fmt: skip
    """Do one stage of a run, once: refuse contradicting options, note the start, work, note the result.

    `own` are the option fields that decide this stage's outcome; `needs` the stages that must be done before.
    """
    run = Run(options.run)
    refuse_contradictions(run, options, name, only_before=options.again)
    refuse_unfinished(run, options, needs)
    if options.again:  # only now: a refused call drops nothing
        _start_over(run, name)
    if run.done(name):
        print(f"{name:9} already done in {run.folder}", flush=True)
        return run.state["stages"][name]["result"]
    table = dataclasses.asdict(options)
    options_before = dict(run.state["options"])
    run.state["options"] |= table
    run.state |= {"versions": _versions(), "git": _git_commit()}
    decisive = json.loads(json.dumps({field: table[field] for field in ("seed", *own)}))
    begun_before = run.state["stages"].get(name, {})
    if begun_before and begun_before["options"] != decisive:
        _drop(run, name)
    run.state["stages"][name] = begun_before | {"options": decisive, "mistake": False}
    run.save()
    begun = time.time()
    try:
        with tracking.tracked(run, options, name, flat(options)):
            result = work(run, options)
            seconds = time.time() - begun
            tracking.log_metrics(
                {f"{name}/seconds": seconds} | {k: v for k, v in result.items() if isinstance(v, float)}
            )
    except Exception as error:
        if isinstance(_mistake(error), ValueError):  # the options that led here must not become the defaults
            run.state["options"] = options_before
            run.state["stages"][name]["mistake"] = True
            run.save()
        raise
    run.state["stages"][name] |= {"seconds": round(seconds, 1), "result": result}
    run.save()
    says = result.get("says", "done")
    print(f"{name:9} {says}  ({seconds:.0f} s)", flush=True)
    return result


def refuse_unfinished(run: Run, options: RunOptions, needs: tuple[str, ...]) -> None:
    """Raise UserError when a stage is not done, or when its classifier may run a pickle that is not trusted."""
    for stage in needs:
        run.result(stage)
    used = run.result("classify").get("spec", "") if "classify" in needs else ""
    if used.startswith(TRUSTED) and not options.trust_pickle:
        raise UserError(f"the classifier {used.removeprefix(TRUSTED)} may run a pickle: say --trust-pickle again")


def _start_over(run: Run, name: str) -> None:
    """Forget a stage and those after it, and drop what they made."""
    for stage in list(WRITES)[list(WRITES).index(name) :]:
        if run.state["stages"].pop(stage, None) is None:
            continue
        run.save()
        _drop(run, stage)


def _drop(run: Run, stage: str) -> None:
    for name in WRITES[stage]:
        if run.fs.exists(run.path(name)):
            run.fs.rm(run.path(name), recursive=True)


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
        for field, was in _flat(state["options"]).items():
            if field in FREE or table.get(field, was) == was:
                continue
            flag = "--" + field.replace("_", "-")
            raise UserError(
                f"{flag} {table[field]} contradicts the stage {stage} of {run.folder}, made with {flag} {was}: "
                f"choose another --run folder, leave the option out, or do that stage over "
                f"(pipelines/{stage}.py --again)"
            )


def _versions() -> dict[str, str]:
    packages = ("torch", "ray", "mlflow", "pyarrow", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def _git_commit() -> str:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git here
        return ""
