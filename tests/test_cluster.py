"""Jobs on a Ray cluster of two nodes, each a set of processes on this machine: one submitted as a user does, and one
that waits for GPUs that are not there yet."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from conftest import PATIENT, ROOT

# The head takes no work, so that every stage's work is done on the other node, whose runtime environments lie in a
# folder of their own, as on a machine of its own.
TWO_NODES = """
import sys
from ray.cluster_utils import Cluster

memory = {"object_store_memory": 200_000_000}
dashboard, *agents = map(int, sys.argv[1:])
head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": dashboard, **memory}
cluster = Cluster(initialize_head=True, head_node_args=head | {"dashboard_agent_listen_port": agents[0]})
cluster.add_node(num_cpus=2, runtime_env_dir_name="runtime_resources_of_node_2",
                 dashboard_agent_listen_port=agents[1], **memory)
cluster.wait_for_nodes()
print("ready", flush=True)
sys.stdin.read()
cluster.shutdown()
"""

GROWING = """
import os
from concurrent.futures import ThreadPoolExecutor
import ray
from pipelines import cluster as ours
from pipelines.mistakes import UserError
from pipelines.run import RunOptions
from ray.cluster_utils import Cluster

memory = {"object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "include_dashboard": False, **memory})
os.environ["RAY_ADDRESS"] = cluster.address
ours.connect()
ours.START_MINUTES = 0.01
try:
    ours.gpus_of(RunOptions(device="cuda", workers=1))
except UserError as error:
    print(f"refused: {error}")
ours.START_MINUTES = 2
asked = RunOptions(device="cuda", workers=2)
with ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(ours.gpus_of, asked)
    cluster.add_node(num_cpus=8, num_gpus=2, **memory)
    print("got", waiting.result())
    print("trains on", ours.train_workers(asked, batch=4))
    print("threads", ours.threads_for(RunOptions(), 2), ours.threads_for(RunOptions(threads=6), 2),
          ours.threads_for(RunOptions(), 2, gpus=2), ours.threads_for(RunOptions(), 99))
    print("by itself", ours.gpus_of(RunOptions()), "without", ours.gpus_of(RunOptions(device="cpu")))
ray.shutdown()  # a cluster does not take down the node that its own process is joined to
cluster.shutdown()
"""


pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Dashboard, Python and environment of a cluster of two nodes."""
    # A Python that has this one's packages but not this project. Of a virtual environment Ray makes a whole copy for
    # every job's runtime environment: this one is empty.
    python = tmp_path / "python/bin/python"
    venv.create(tmp_path / "python", symlinks=True)
    (folder,) = (tmp_path / "python/lib").glob("python3*/site-packages")
    (folder / "packages.pth").write_text(sysconfig.get_path("purelib"))
    env = os.environ | PATIENT | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "CAE_RUNS": str(tmp_path / "runs"),
    }  # fmt: skip
    env.pop("PYTHONPATH", None)
    with ExitStack() as stack:  # ports that no other Ray on this machine has
        free = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in free:
            each.bind(("127.0.0.1", 0))
        port, *agents = (str(each.getsockname()[1]) for each in free)
    log = tmp_path / "cluster.log"
    with log.open("w") as errors, subprocess.Popen(
        [python, "-c", TWO_NODES, port, *agents], env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
    ) as cluster:  # fmt: skip
        try:
            assert cluster.stdout is not None and cluster.stdout.readline() == "ready\n", log.read_text()[-3000:]
            listening = [
                connection.laddr.ip
                for process in psutil.Process(cluster.pid).children(recursive=True)
                for connection in process.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
            assert len(listening) > 5 and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
            yield f"http://127.0.0.1:{port}", python, env
        finally:
            assert cluster.stdin is not None
            cluster.stdin.close()


def test_a_job_with_its_runtime_environment_from_pyproject(two_nodes: tuple[str, Path, dict[str, str]]) -> None:
    shard = "python pipelines/shard.py --dataset synthetic --preset quick --images 40"
    dashboard, python, env = two_nodes
    packages = subprocess.check_output([python, ROOT / "infra/runtime_env.py"], text=True)
    assert {"ray", "torch"} <= {package.split(">")[0].split("[")[0] for package in json.loads(packages)["pip"]}
    words = [python, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard, "--working-dir", ROOT,
             "--runtime-env-json", packages, "--", "sh", "-c", f"command -v python && {shard}"]  # fmt: skip
    for _ in range(300):
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500)
        if "No available agent" not in done.stderr:  # a cluster takes some seconds more until it takes jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "/runtime_resources/pip/" in done.stdout  # the job's Python is the one that Ray made for it
    assert "shard     40 images" in done.stdout
    run = json.loads(Path(env["CAE_RUNS"], "synthetic-quick/run.json").read_text())
    assert run["tracking_uri"] == env["MLFLOW_TRACKING_URI"] and run["stages"]["shard"]["result"]["rejected"] == 0


def test_cuda_waits_for_gpus_that_an_autoscaler_starts(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | PATIENT
    words = [sys.executable, "-c", GROWING]
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if not line.startswith("asking")]
    assert said[0].startswith("refused: --device cuda, but this Ray cluster has no GPU")
    assert said[1:] == ["got 2", "trains on 2", "threads 4 3 4 1", "by itself 2 without 0"]
