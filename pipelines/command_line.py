"""Command lines of the stages: options given, on top of what the run folder holds, on top of the preset."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from urllib.parse import urlsplit

import fsspec
import torch
import tyro

from cae.config import PRESETS, LossWeights, Preset, TrainConfig
from pipelines.mistakes import UserError, in_a_line
from pipelines.run import OLDER, PATHS, Run, RunOptions, absolute, flat

# Of this call only, not to be the next one's defaults.
FORGOTTEN = {"run", "stages", "again", "threads", "trust_pickle", "best", "archive", "out"}
# Least and greatest values of options.
LEAST = {"steps": 0, "threads": 0, "workers": 0, "smooth": 0, "fade": 0, "margin": 0, "draws": 1, "evaluated": 0,
         "overlays": 0, "images": 1, "pairs": 1, "batch": 1, "donors": 1, "trials": 1, "tune": 0, "budget": 1,
         "span": 1, "class_dim": 2, "width": 4, "blocks": 1, "mlp_width": 1, "disc_width": 1, "disc_blocks": 0,
         "resnet.batch": 1, "resnet.epochs": 0, "resnet.min_steps": 0, "resnet.lr": 0, "resnet.weight_decay": 0,
         "epochs": 0, "lr": 0, "disc_lr": 0, "class_lr": 0, "weight_decay": 0, "lr_halvings": 0, "warm_up": 0,
         "recon_warm_up": 0, "flip": 0, "ema": 0, "dropout": 0, "inversion": 0, "seed": 0,
         **{field.name: 0 for field in dataclasses.fields(LossWeights)}}  # fmt: skip
MOST = {"flip": 1, "ema": 1, "dropout": 1, "smooth": 0.5, "fade": 1, "margin": 0.99, "seed": 2**32 - 1}
OptionsT = TypeVar("OptionsT", bound=RunOptions)


def parse(options_class: type[OptionsT], argv: list[str] | None = None) -> OptionsT:
    """Options from the command line, on top of what the run folder holds, on top of the preset.

    So `--help` shows the values that would be used, and a later stage needs only `--run`.
    """
    argv = sys.argv[1:] if argv is None else argv
    dataset, given, folder, best, device = (
        _peek(argv, name) for name in ("dataset", "preset", "run", "weights", "device")
    )
    preset = given or ("standard" if device != "cpu" and torch.cuda.is_available() else "quick")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose one of {', '.join(PRESETS)}")
    if folder is None and dataset:
        base = os.environ.get("CAE_RUNS") or _local_base()
        called = Path(dataset.rstrip("/") if "://" in dataset else os.path.abspath(dataset)).stem
        folder = f"{base.rstrip('/')}/{called.removesuffix('.tar')}-{preset}"
    if folder and "://" not in folder:
        folder = os.path.abspath(os.path.expanduser(folder))
    state = Run(folder).state if folder else {"options": {}}
    if "explained_by" in state:
        raise UserError(f"{folder} holds what the run {state['explained_by']} explained, and is no run to go on with: "
                        "give --run that one")  # fmt: skip
    stored = {name: value for name, value in state["options"].items() if name not in FORGOTTEN}
    # What a run of an older version does not name is as it was then: off, as the authors have it.
    for name, group in dataclasses.asdict(PRESETS["paper"]).items():
        if name in stored:
            stored[name] = group | stored[name]
    if "mode" in stored:
        stored = OLDER | stored
    # Another one than the folder's brings its own sizes and rates.
    if stored and given and given != stored.get("preset"):
        stored = {name: value for name, value in stored.items() if name not in dataclasses.asdict(PRESETS["paper"])}
        stored["preset"] = preset
    if best:  # before all that, what a search found
        stored |= {name: stored.get(name, {}) | values for name, values in read_best(best).items()}
    default = _from_dict(
        options_class, {"preset": preset} | stored | {"run": folder or ""}, stored.get("preset", preset)
    )
    options = tyro.cli(options_class, args=argv, default=default, config=(tyro.conf.AvoidSubcommands,))
    if not options.dataset:
        if stored or not folder:
            raise UserError("which data? say --dataset synthetic, another name or a path, or --run FOLDER of a run "
                            "that has been begun (see --help)")  # fmt: skip
        raise UserError(f"{folder} is no run folder yet: say --dataset NAME or PATH to begin one, or another --run")
    table = flat(options)
    _refuse_values(table)
    folder = folder or options.run
    paths = {name: absolute(name, table[name]) for name in PATHS if name in table}
    return dataclasses.replace(options, run=folder, tracking_uri=_tracking_uri(options, folder), **paths)


def _refuse_values(table: dict[str, Any]) -> None:
    """Raise UserError for a value that no other part looks at before hours of work, of options as `flat` has them."""
    for name, least in LEAST.items():
        if not table.get(name, least) >= least:  # nor is nan
            raise UserError(f"--{name.replace('_', '-')} is {table[name]}: it must be {least} at least")
    for name, most in MOST.items():
        if table.get(name, most) > most:
            raise UserError(f"--{name.replace('_', '-')} is {table[name]}: it must be {most} at most")
    for name, value in table.items():
        if isinstance(value, float) and math.isinf(value):
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be finite")
    for name in ("splits", "stages"):
        if table.get(name) == ():
            raise UserError(f"--{name} names nothing: name one at least")
    size = table.get("image_size", 32)
    if size % 4 or size < 32:
        raise UserError(f"--image-size is {size}: choose a multiple of 4 from 32 on")
    for name in ("up_kernel", "out_kernel"):
        if (kernel := table.get(name, 1)) not in range(1, size, 2):
            raise UserError(f"--{name.replace('_', '-')} is {kernel}: choose an odd number below the image's size")
    if not all(0 <= beta < 1 for beta in table.get("betas", ())):
        raise UserError(f"--betas are {table['betas']}: choose two from 0 on, below 1")
    if table.get("inversion") == 1:  # the classifier must see the class twice
        raise UserError("--inversion is 1: give 0 for none, or 2 at least")
    if not 0 < table.get("window", 1) <= 1:
        raise UserError(f"--window is {table['window']}: give a share of the image's side, above 0 and at most 1")


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with in_a_line():
            options = parse(options_class)
            if options.threads:
                torch.set_num_threads(options.threads)
            main(options)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


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
    """The value of an option, of several the last one, as tyro takes it."""
    for word, after in reversed(list(zip(argv, [*argv[1:], None], strict=True))):
        if word == f"--{name}" and after is not None:
            return after
        if word.startswith(f"--{name}="):
            return word.split("=", 1)[1]
    return None


def _local_base() -> str:
    # Ray unpacks a job's working folder into a place that it deletes again.
    return os.path.expanduser("~/cae-runs") if "runtime_resources" in os.getcwd() else "runs"


def _from_dict(cls: type, stored: dict[str, Any], preset: Preset) -> Any:
    """An options object: stored values where there are any, else the preset's, else the class's own defaults."""
    row, values = PRESETS[preset], _known(cls, stored)
    for name, kind in get_type_hints(cls).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            base = getattr(row, name, None) or kind()
            values[name] = dataclasses.replace(base, **_known(type(base), stored.get(name, {})))
    return cls(**values)


def _known(cls: type, stored: dict[str, Any]) -> dict[str, Any]:
    """Of stored values those that this version knows; lists are tuples, which JSON has not."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name in names}
