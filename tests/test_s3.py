"""A whole run on S3: data root, run folder, Ray Train's checkpoints, and MLflow's artifacts through a server that asks
who one is, started as infra/mlflow does."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import s3fs
from conftest import ROOT, TINY, blob
from moto.server import ThreadedMotoServer
from PIL import Image

from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run, RunOptions


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment that leads to an S3 server with a bucket called cae."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(),
    }  # fmt: skip
    bucket(env).mkdir("cae")
    yield env
    server.stop()


def bucket(env: dict[str, str]) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(key=env["AWS_ACCESS_KEY_ID"], secret=env["AWS_SECRET_ACCESS_KEY"],
                             endpoint_url=env["AWS_ENDPOINT_URL"], use_listings_cache=False)  # fmt: skip


@pytest.fixture
def here(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """S3 as this very process finds it, by the usual variables."""
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return bucket(s3)


@pytest.fixture
def mlflow_server(s3: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """infra/mlflow's server, on SQLite; yields what its clients need to know."""
    here = (ROOT / "infra/mlflow/Dockerfile").read_text().replace("\\\n", "")
    words = [word for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", here, re.M) for word in json.loads(line)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ours = {"5000": port, "0.0.0.0": "127.0.0.1", "2": "1"}  # port, host, workers
    words = [ours.get(word, word).replace(":5000", f":{port}") for word in words]
    database = f"sqlite:///{tmp_path}/mlflow.db"
    words[words.index("--backend-store-uri") + 1] = database
    settings = (ROOT / "infra/mlflow/auth.ini").read_text()
    (tmp_path / "auth.ini").write_text(re.sub("(?m)^database_uri.*$", f"database_uri = {database}", settings))
    password = secrets.token_urlsafe()
    env = os.environ | s3 | {
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"), "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.terminate()
        server.wait()


def wait_for(url: str) -> None:
    deadline = time.time() + 300
    while True:
        try:
            urllib.request.urlopen(url)
            return
        except OSError:
            assert time.time() < deadline, f"{url} does not answer"
            time.sleep(0.2)


@pytest.mark.slow
def test_a_run_on_s3_from_images_to_maps(s3: dict[str, str], mlflow_server: dict[str, str], tmp_path: Path) -> None:
    store, rng = bucket(s3), np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 4)):
        for label, name in enumerate(("NORMAL", "PNEUMONIA")):
            for i in range(count):
                png = io.BytesIO()
                Image.fromarray(blob(rng, label)).save(png, "PNG")
                store.pipe_file(f"cae/data/chest_xray/{split}/{name}/{i:02}.png", png.getvalue())
    store.pipe_file("cae/data/chest_xray/test/NORMAL/notes.png", b"no pixels")
    wait_for(mlflow_server["MLFLOW_TRACKING_URI"] + "/health")
    words = ["--dataset", "chest_xray", "--data-root", "s3://cae/data", "--run", "s3://cae/runs/chest", *TINY,
             "--stages", "shard", "classify", "train", "embed", "explain"]  # fmt: skip
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    driver = subprocess.Popen(
        [sys.executable, ROOT / "pipelines/full.py", *words], env=os.environ | s3 | mlflow_server, cwd=empty, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    listening, log = set(), ""
    assert driver.stdout is not None
    for line in driver.stdout:
        log += line
        if line.startswith("shard "):  # Ray is up: nobody but this machine reaches it
            for process in psutil.Process(driver.pid).children(recursive=True):
                listening |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert driver.wait() == 0, log[-4000:]
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

    def rows(folder: str) -> list[dict]:
        parts = store.glob(f"cae/runs/chest/{folder}/split=*/*.parquet")
        return [row for part in parts for row in pq.ParquetFile(store.open(part)).read().to_pylist()]

    images, maps = rows("shards"), rows("explanations")
    assert len(images) == 56 and "1 rejected" in log
    state = json.loads(store.cat_file("cae/runs/chest/run.json"))
    held_out = {row["id"] for row in images if row["source"].startswith("s3://cae/data/chest_xray/test")}
    assert held_out <= {row["id"] for row in maps} and len(maps) == sum(
        count for split, count in state["stages"]["shard"]["result"]["counts"].items() if split != "train"
    )
    assert {row["status"] for row in maps} <= {"flipped", "unflipped", "reconstruction_flipped", "failed"}
    names = store.find("cae")
    for kept in ("runs/chest/checkpoints/train/checkpoint_", "runs/chest/cae/model.safetensors", "mlflow/"):
        assert any(name.startswith(f"cae/{kept}") for name in names), kept
    assert [name for name in names if name.startswith("cae/mlflow/") and name.endswith("/cae/model.safetensors")]
    assert list(empty.iterdir()) == []  # nothing is left on the machine

    secret = (s3["AWS_SECRET_ACCESS_KEY"], mlflow_server["MLFLOW_TRACKING_PASSWORD"])
    told = [log.encode(), *map(store.cat_file, names), *(path.read_bytes() for path in tmp_path.glob("*.db"))]
    assert not [word for word in secret for text in told if word.encode() in text]


def test_a_bucket_that_is_not_there_is_not_made(here: s3fs.S3FileSystem) -> None:
    with pytest.raises(UserError, match=r"cannot write to the run folder s3://misspelt/run: .*bucket does not exist"):
        Run("s3://misspelt/run").save()
    assert here.ls("") == ["cae"]


def test_what_another_process_writes_is_seen_at_once(here: s3fs.S3FileSystem) -> None:
    run = Run("s3://cae/runs/seen/")
    assert run.folder == "s3://cae/runs/seen" and not run.fs.exists(run.path("codes")) and run.fs.find(run.folder) == []
    run.write("codes/one.parquet", b"1")
    assert run.fs.find(run.folder) == ["cae/runs/seen/codes/one.parquet"]
    here.pipe_file("cae/runs/seen/codes/two.parquet", b"2")
    assert [path[-11:] for path in run.fs.find(run.path("codes"))] == ["one.parquet", "two.parquet"]


@pytest.mark.parametrize(("change", "says"), [
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}, "S3: Could not connect to the endpoint"),
    ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "S3: Unable to locate credentials"),
    ({"AWS_PROFILE": "nobody"}, r"S3: The config profile \(nobody\) could not be found"),
])  # fmt: skip
def test_s3_out_of_reach_is_one_line(change: dict[str, str | None], says: str, here: s3fs.S3FileSystem, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["shard.py", "--dataset", "synthetic", "--run", "s3://cae/runs/none"])
    with pytest.raises(SystemExit, match=f"^error: {says}"):
        command(RunOptions, lambda options: Run(options.run).save())
