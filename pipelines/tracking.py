"""What MLflow knows of a run: one MLflow run a run folder, a nested one a stage. The only place that imports mlflow."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cae.data import first_line

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
if TYPE_CHECKING:
    import mlflow

    from pipelines.run import Run, RunOptions
elif "mlflow" in sys.modules:
    import mlflow
else:  # every worker imports this module and few talk to MLflow, which takes over a second to import
    _spec = importlib.util.find_spec("mlflow")
    _spec.loader = importlib.util.LazyLoader(_spec.loader)
    mlflow = importlib.util.module_from_spec(_spec)
    sys.modules["mlflow"] = mlflow
    _spec.loader.exec_module(mlflow)


def store(run: Run, options: RunOptions) -> str:
    """The tracking store: the one asked for, else an SQLite file beside the run folder."""
    if options.tracking_uri:
        return options.tracking_uri
    return f"sqlite:///{Path(run.folder).parent}/mlflow.db"


def failure(error: BaseException) -> str | None:
    """The reason, in one line, when it is MLflow's error; else None."""
    if isinstance(error, mlflow.exceptions.MlflowException):
        return f"MLflow: {first_line(error)[:300]} (see --tracking-uri)"
    return None


def _track_at(uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    for name in ("mlflow", "alembic"):  # once imported, which sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)


def open_experiment(run: Run, options: RunOptions) -> str:
    """The id of the experiment in the run's tracking store; makes both where they are not there yet."""
    uri = store(run, options)
    if uri.startswith("sqlite:///"):
        os.makedirs(os.path.dirname(uri.removeprefix("sqlite:///")), exist_ok=True)
    _track_at(uri)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(options.experiment)
    if experiment is not None:
        return experiment.experiment_id
    # SQLite keeps no files; without a place of its own they would land wherever one happens to stand.
    place = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" if uri.startswith("sqlite") else None
    return client.create_experiment(options.experiment, place.as_uri() if place else None)


@contextmanager
def tracked(run: Run, options: RunOptions, experiment_id: str, stage: str, params: dict[str, Any],
            own: set[str]) -> Iterator[None]:  # fmt: skip
    """Inside, MLflow's active run is the stage's, nested in the run folder's own; `open_experiment` comes before.

    The stage's has all parameters, the folder's those that are the stage's `own`: MLflow never forgets one, and later
    stages may be called with others, or be refused them.
    """
    uri, client = store(run, options), mlflow.MlflowClient()
    tags = {"dataset": options.dataset, "preset": options.preset, "git": run.state["git"], "run_folder": run.folder}
    # A stage that was killed goes on in the MLflow runs that it had, in the same store.
    same = run.state.get("tracking_uri") == uri
    parent = _still_there(client, run.state.get("mlflow_run_id")) if same else None
    earlier = _still_there(client, run.state["stages"][stage].get("mlflow_run_id")) if parent else None
    with mlflow.start_run(run_id=parent, experiment_id=experiment_id, run_name=Path(run.folder).name) as whole:
        if parent is None:
            run.state |= {"mlflow_run_id": whole.info.run_id, "tracking_uri": uri}
            run.save()
        mlflow.set_tags(tags)
        with mlflow.start_run(
            run_id=earlier,
            experiment_id=experiment_id,
            run_name=stage,
            nested=True,
            log_system_metrics=True,
            tags=tags | {"stage": stage},
        ) as child:
            common = own | {"dataset", "preset"}
            for active, told in ((whole, {k: v for k, v in params.items() if k in common}), (child, params)):
                new = {k: v for k, v in told.items() if k not in active.data.params}
                client.log_batch(active.info.run_id, params=[mlflow.entities.Param(k, str(v)) for k, v in new.items()])
            run.state["stages"][stage]["mlflow_run_id"] = child.info.run_id
            run.save()
            yield


def _still_there(client: mlflow.MlflowClient, run_id: str | None) -> str | None:
    """The MLflow run, or None if there is none, or no more: people delete runs, and whole stores."""
    try:
        there = run_id is not None and client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        there = False
    return run_id if there else None


@contextmanager
def trial(of_search: tuple[str, str], name: str, params: dict[str, Any]) -> Iterator[None]:
    """In the process of a trial of a search: MLflow's active run is the trial's, nested in that of the stage.

    A trial that was killed goes on in the run that it had.
    """
    uri, search = of_search
    _track_at(uri)
    experiment = mlflow.get_run(search).info.experiment_id
    tags = {"mlflow.parentRunId": search, "stage": "tune", "trial": name}
    with mlflow.start_run(_trial_run(experiment, search, name), experiment, run_name=name, tags=tags):
        mlflow.log_params(params)
        yield


def end_trial(name: str, outcome: str) -> None:
    """Close the run of a trial that was stopped, or whose process did not live to do it; it `failed` or not."""
    info = _active().info
    run_id = _trial_run(info.experiment_id, info.run_id, name)
    if run_id is not None:
        client = mlflow.MlflowClient()
        client.set_tag(run_id, "outcome", outcome)
        client.set_terminated(run_id, "FAILED" if outcome == "failed" else "FINISHED")


def _trial_run(experiment: str, search: str, name: str) -> str | None:
    mine = f"tags.trial = '{name}' and tags.`mlflow.parentRunId` = '{search}'"
    found = mlflow.MlflowClient().search_runs([experiment], mine, max_results=1)
    return found[0].info.run_id if found else None


def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
    """Metrics of the active stage; those that are no curve (no step) go to the whole run too, so that runs compare."""
    active = mlflow.active_run()
    if active is None:  # a worker that is not rank 0
        return
    # MLflow refuses other characters, which class names may hold.
    metrics = {re.sub(r"[^\w.\- :/]", "_", name): value for name, value in metrics.items()}
    if step is not None:
        mlflow.log_metrics(metrics, step=step)
        return
    curves = mlflow.MlflowClient().get_run(active.info.run_id).data.metrics  # not to get a false point at step 0
    mlflow.log_metrics({key: value for key, value in metrics.items() if key not in curves})
    mlflow.log_metrics(metrics, run_id=active.data.tags["mlflow.parentRunId"])


def log_folder(run: Run, folder: str, whole: bool = False) -> None:
    """A folder (or file) of the run, if it is there, as artifacts of the active stage, or of the whole run."""
    active = _active()
    run_id = active.data.tags["mlflow.parentRunId"] if whole else active.info.run_id
    client = mlflow.MlflowClient()
    if not run.fs.exists(run.path(folder)):
        return
    with tempfile.TemporaryDirectory() as copy:
        local = run.path(folder)
        if "://" in local:
            local = f"{copy}/{os.path.basename(folder)}"
            run.fs.get(run.path(folder), local, recursive=run.fs.isdir(run.path(folder)))
        if os.path.isdir(local):
            client.log_artifacts(run_id, local, folder)
        else:
            client.log_artifact(run_id, local, os.path.dirname(folder) or None)


def log_dataset(name: str, source: str, digest: str, **counts: int) -> None:
    """The data set as an input of the stage and of the whole run."""
    place = mlflow.data.http_dataset_source.HTTPDatasetSource(source)
    dataset = mlflow.data.meta_dataset.MetaDataset(place, name=name, digest=digest)  # type: ignore[abstract]
    context = mlflow.entities.InputTag("mlflow.data.context", "training")
    logged = mlflow.entities.DatasetInput(dataset._to_mlflow_entity(), [context])
    client, active = mlflow.MlflowClient(), _active()
    for run_id in (active.info.run_id, active.data.tags["mlflow.parentRunId"]):
        client.log_inputs(run_id, [logged])
        for split, count in counts.items():
            client.set_tag(run_id, f"images_{split}", count)


def log_figure(figure: Any, name: str) -> None:
    """A figure as an artifact of the active stage."""
    mlflow.log_figure(figure, name)


def read_history(run: Run, stage: str) -> dict[str, list[tuple[int, float]]]:
    """The curves that a finished or running stage logged: metric -> (step, value)."""
    run_id = run.state["stages"].get(stage, {}).get("mlflow_run_id")
    if run_id is None:
        return {}
    client = mlflow.MlflowClient()
    try:
        names = [name for name in client.get_run(run_id).data.metrics if name.startswith(f"{stage}/")]
    except mlflow.exceptions.MlflowException:  # that stage was tracked in another store
        return {}
    curves = {
        name.split("/", 1)[1]: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names
    }
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def of_stage() -> tuple[str, str]:
    """What a worker needs for `join`: the store, and the active stage's MLflow run."""
    return mlflow.get_tracking_uri(), _active().info.run_id


def _active() -> mlflow.ActiveRun:
    active = mlflow.active_run()
    assert active is not None, "a stage works inside run_stage"
    return active


@contextmanager
def join(tracking: tuple[str, str], rank: int) -> Iterator[None]:
    """In a worker process: rank 0 logs to the stage's MLflow run that the driver opened, the others nowhere."""
    if rank > 0:
        yield
        return
    uri, run_id = tracking
    _track_at(uri)
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        yield
