"""The Ray cluster: joining it, what it has, and training loops under Ray Train."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, TypeVar

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.placement_group import placement_group, remove_placement_group
from torch import Tensor

from pipelines import tracking
from pipelines.mistakes import UserError
from pipelines.run import Run, RunOptions

# Of glibc, for processes that train: freed memory is kept. Blocks of many megabytes are else given back to the system
# and taken anew at every step, page by page (benchmarks/README.md).
KEEP_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
# Progress is ours to print; of Ray's own messages only errors are for the user. Threads that wait for each other sleep:
# where another program has a core, two that spin take ten times as long (benchmarks/README.md).
WORKERS = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"}
START_MINUTES = 15  # that a cluster on demand gets to start its machines
ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it set), else start Ray inside this process."""
    if ray.is_initialized():
        return
    workers = _unless_set(WORKERS)
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address, logging_level=logging.ERROR, runtime_env={"env_vars": workers})
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        # Ray Train's helpers ask the dashboard which workers live; beside another Ray they would not know which one.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = workers | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        # Four slots at least: a bulk stage needs one for its actor and others for Ray Data's own tasks.
        try:
            ray.init("local", num_cpus=max(4, cores_here()), object_store_memory=500_000_000,
                     dashboard_port=port, logging_level=logging.ERROR, runtime_env={"env_vars": env})  # fmt: skip
        except Exception as error:  # Ray has no class for it
            if "timed out during startup" in str(error):
                raise UserError("Ray did not start in half a minute: is this machine busy? Call again") from error
            raise
    ray.data.DataContext.get_current().enable_progress_bars = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own prints where it was, and aborts


def _unless_set(variables: dict[str, str]) -> dict[str, str]:
    """Those environment variables that have no value yet; they have these then.

    The others reach the workers with this process's environment, or with the job's: Ray refuses to be told twice.
    """
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    return new


def gpus_of(options: RunOptions) -> int:
    """GPUs to use: all that the cluster has, none with `--device cpu`; `cuda` waits for a cluster that grows on demand.

    Raises UserError where `cuda` gets none.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if options.device == "cuda" and gpus < max(1, options.workers) and "RAY_ADDRESS" in os.environ:
        gpus = _ask_for_gpus(max(1, options.workers))
    if options.device == "cuda" and not gpus:
        raise UserError("--device cuda, but this Ray cluster has no GPU: leave --device out to use the CPUs")
    return 0 if options.device == "cpu" else gpus


@cache  # a cluster that cannot have as many is not waited for again; one that can starts them again when work comes
def _ask_for_gpus(count: int) -> int:
    """Ask the cluster's autoscaler, if it has one, for so many GPUs; returns how many are there in the end."""
    print(f"asking the Ray cluster for {count} GPUs, for up to {START_MINUTES} minutes", flush=True)
    wish = placement_group([{"GPU": 1}] * count)  # ends with this job, unlike what ray.autoscaler.sdk requests
    wish.wait(60 * START_MINUTES)
    remove_placement_group(wish)
    return int(ray.cluster_resources().get("GPU", 0))


def where(options: RunOptions) -> dict[str, Any]:
    """Device of the bulk stages' models, and whether they compute in bfloat16: for their workers, and for `place`."""
    return {"device": "cuda" if gpus_of(options) else "cpu", "bf16": options.precision == "bfloat16"}


def cores_here() -> int:
    """CPU cores that this process may use: fewer than the machine's in a container that is granted fewer."""
    from joblib import cpu_count  # here: workers need it not

    return cpu_count()


def cores(options: RunOptions) -> int:
    """CPU cores of the cluster; of this machine for Ray inside this process, which has more slots than cores."""
    if "RAY_ADDRESS" in os.environ:
        return max(1, int(ray.cluster_resources().get("CPU", 0)))
    return options.threads or cores_here()


def train_workers(options: RunOptions, batch: int) -> int:
    """Processes that train together on steps of `batch`: as asked for, else as many GPUs as divide it, else 1.

    Raises UserError for more than the cluster has, or than divide the step.
    """
    gpus = gpus_of(options)
    if options.workers == 0:
        return max((n for n in range(1, gpus + 1) if batch % n == 0), default=1)
    there, kind = (gpus, "GPUs") if gpus else (int(ray.cluster_resources().get("CPU", 0)), "CPU slots")
    if options.workers > there:
        raise UserError(f"--workers {options.workers}, but the Ray cluster has {there} {kind}: ask for fewer")
    if batch % options.workers:
        raise UserError(f"steps of {batch} do not divide among {options.workers} workers: choose another --workers")
    return options.workers


def place(module: ModuleT, device: torch.device | str, bf16: bool = False) -> ModuleT:
    """The module on a device, its convolutions channels-last, which is the faster memory order.

    With `bf16` its parts answer in bfloat16 under autocast; what they take and give is float32. Where gradients are
    asked for they stay in float32: those to the pixels, which maps are made of, would be off by a seventh.
    """
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.children() if bf16 else ():
        vars(part).setdefault("in_float32", part.forward)
        vars(part)["forward"] = MethodType(_in_bfloat16, part)  # a method: a copy of the module asks its own weights
    return module


def _in_bfloat16(part: Any, *inputs: Tensor) -> Tensor:
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=not torch.is_grad_enabled()):
        return part.in_float32(*inputs).float()


def threads_for(options: RunOptions, processes: int, gpus: int = 0) -> int:
    """Threads for each of so many processes, as if all of them were on one machine: Ray may put them there.

    On a cluster that is the smallest that has work to take, one with GPUs where they are used, and not the head if
    there are others.
    """
    available = options.threads or cores_here()
    if "RAY_ADDRESS" in os.environ and not options.threads:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [node for node in nodes if node.get("GPU" if gpus else "CPU")]
        nodes = [node for node in nodes if "node:__internal_head__" not in node] or nodes
        available = min((int(node.get("CPU", 1)) for node in nodes), default=1)
    return max(1, available // processes)


def fit_torch(run: Run, options: Any, name: str, loop: Any, config: dict[str, Any], batch: int,
              callbacks: Sequence[Any] = (), retries: int = 3) -> Any:  # fmt: skip
    """Run a training loop under Ray Train on `--workers` processes; it resumes at the last checkpoint in
    `checkpoints/NAME`.

    The workers share steps of `batch`. After a fault they go on up to `retries` times. Returns what the loop returns on
    rank 0.
    """
    parent, _, name = f"checkpoints/{name}".rpartition("/")
    gpus, workers = gpus_of(options), train_workers(options, batch)
    trainer = TorchTrainer(
        loop,
        train_loop_config=config
        | {
            "threads": threads_for(options, workers, gpus),
            "tracking": tracking.of_stage(),
            "precision": options.precision,
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=run.path(parent),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=retries),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": KEEP_MEMORY},
            logging_config=LoggingConfig(log_level="ERROR"),  # type: ignore[call-arg]
        ),
    )
    with _own_interrupts():
        return trainer.fit().return_value  # type: ignore[attr-defined]


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ray Train takes SIGINT, keeps it, and ends the process as if all were well: here it is KeyboardInterrupt, and
    afterwards what it was before."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        raise KeyboardInterrupt from stop
    finally:
        if threading.current_thread() is threading.main_thread():  # where alone it may be said
            signal.signal(signal.SIGINT, before)


def enter_loop(config: dict[str, Any]) -> tuple[int, int, torch.device]:
    """Called first in a training loop: this worker's rank, the number of workers, and its device.

    Sets `config["bf16"]`, whether to compute in bfloat16: by default on GPUs that have it in hardware.
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells of every checkpoint
    torch.set_num_threads(config["threads"])
    context, device = ray.train.get_context(), get_device()
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    config["bf16"] = config["precision"] == "bfloat16" or (config["precision"] == "auto" and has_it)
    return context.get_world_rank(), context.get_world_size(), device


def report(state: dict[str, Any] | None, measures: dict[str, float] | None = None) -> None:
    """Hand measures and a checkpoint, if there is a state, to Ray Train; every worker calls it, rank 0 with both."""
    with tempfile.TemporaryDirectory() as folder:
        if state is not None:
            torch.save(state, f"{folder}/state.pt")
        ray.train.report(measures or {}, checkpoint=Checkpoint.from_directory(folder) if state is not None else None)


def pace(rate: float) -> str:
    """A rate a second as people read it, slow ones by the minute: 12.3/s, 5.6/min."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"


def last_checkpoint(device: torch.device) -> dict[str, Any] | None:
    """The state that `report` kept last in this run folder, if any."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return torch.load(f"{folder}/state.pt", map_location=device, weights_only=True)
