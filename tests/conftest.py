"""What tests share: a small archive on disk with every kind of trouble, one whole run over it, and a model server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from PIL import Image

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
# Small enough for a minute, large enough that a classifier learns it: in six epochs it may not, by the CPU it is on.
TINY = [
    "--image-size", "32", "--width", "16", "--blocks", "1", "--disc-width", "8", "--pairs", "48", "--epochs", "0",
    "--batch", "4", "--warm-up", "20", "--recon-warm-up", "20",
    "--resnet.epochs", "15", "--resnet.min-steps", "0", "--resnet.batch", "8",
    "--evaluated", "10", "--draws", "2", "--overlays", "3",
]  # fmt: skip
BAD = {
    "truncated.jpg": "truncated",
    "notes.png": "no known image format",
    "empty.png": "no known image format",
}


# A busy machine may need longer to start than Ray grants it.
PATIENT = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_SCHEDULER_EVENTS": "0",
}  # and tells its user less


def call(script: str, *words: str) -> list[str]:
    """A pipeline's command line, which leaves the other core to the tests beside it."""
    alone = [] if {"--threads", "--workers"} & set(words) else ["--threads", "1"]
    return [sys.executable, str(ROOT / "pipelines" / script), *words, *alone]


def environment() -> dict[str, str]:
    """What programs are started with: not MLflow's store of this process, where they would track too."""
    return {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | PATIENT


def command(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a pipeline as a user does, from another folder; again, as it advises, where Ray did not start in time."""
    for _ in range(2):
        done = subprocess.run(call(script, *words), capture_output=True, text=True, timeout=500, cwd="/",
                              env=environment() | env)  # fmt: skip
        if "Ray did not start in half a minute" not in done.stderr:
            break
    return done


def kill_when(
    happens: Callable[[], bool], log: Path, script: str, *words: str, by: signal.Signals = signal.SIGKILL
) -> None:
    """Start a pipeline that writes to a log and kill its driver, `by` a signal, as soon as something is seen, and what
    of it has not seen to its own end a little later: none must write into what the next call does."""
    with log.open("w") as out:
        driver = subprocess.Popen(call(script, *words), stdout=out, stderr=out, cwd="/", env=environment())
        deadline = time.time() + 400
        while not happens():
            assert driver.poll() is None, log.read_text()[-3000:]
            assert time.time() < deadline, "nothing to kill happened"
            time.sleep(0.02)
        started = psutil.Process(driver.pid).children(recursive=True)
        os.kill(driver.pid, by)
        driver.wait()
        _, left = psutil.wait_procs(started, 3)
        for process in left:
            process.kill()
        psutil.wait_procs(left)


def keeps_checkpoint(folder: Path) -> bool:
    """Whether the training in a run folder goes on from a checkpoint when called again: Ray Train has noted it, which
    on a busy machine it does long after the checkpoint's own file is there."""
    note = folder / "checkpoints/train/checkpoint_manager_snapshot.json"
    return note.exists() and "checkpoint_dir_name" in note.read_text()


def blob(rng: np.random.Generator, label: int, size: int = 40) -> np.ndarray:
    """A dim textured image; class 1 has a bright disc somewhere."""
    y, x = np.mgrid[:size, :size]
    image = 60 + 25 * np.sin(x / rng.uniform(3, 6)) + rng.normal(0, 6, (size, size))
    if label:
        cy, cx = rng.uniform(12, size - 12, 2)
        image = np.where((y - cy) ** 2 + (x - cx) ** 2 < 60, 230, image)
    return image.clip(0, 255).astype(np.uint8)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process to need it makes, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_name(f"{name}.done")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/* with grey, RGBA, 16-bit, CMYK and odd-sized images, files that are no images, and an exact duplicate."""
    return made_once(tmp_path_factory, "archive", make_archive)


def make_archive(root: Path) -> None:
    """Write the files of `archive`."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("plain", "spot")):
        folder = root / name
        folder.mkdir()
        for i in range(40):
            image = Image.fromarray(blob(rng, label))
            kind = i % 8
            if kind == 1:
                image.convert("RGBA").save(folder / f"{i:02}.png")
            elif kind == 2:
                wide = np.asarray(image).astype(np.uint16) * 200
                Image.fromarray(wide).save(folder / f"{i:02}.png")
            elif kind == 3:
                image.convert("CMYK").save(folder / f"{i:02}.jpg", quality=95)
            elif kind == 4:
                image.resize((64, 50)).save(folder / f"{i:02}.png")
            else:
                image.save(folder / f"{i:02}.png")
    (root / "spot" / "copy.png").write_bytes((root / "spot" / "00.png").read_bytes())
    jpeg = root / "plain" / "truncated.jpg"
    Image.fromarray(blob(rng, 0, 200)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:900])
    (root / "plain" / "notes.png").write_text("these are notes, not pixels")
    (root / "spot" / "empty.png").write_bytes(b"")


@pytest.fixture(scope="session")
def finished(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one whole run over the archive, made by the command line. Tests that write copy it."""

    def make(runs: Path) -> None:
        done = command("full.py", "--dataset", str(archive), "--run", str(runs / "tiny"), *TINY)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (runs / "tiny" / "stdout.txt").write_text(done.stdout)

    return made_once(tmp_path_factory, "runs", make) / "tiny"


def state(folder: Path) -> dict:
    """run.json."""
    return json.loads((folder / "run.json").read_text())


class Server:
    """A model server on this machine: answers as `reply` says and keeps what it was asked."""

    def __init__(self, reply: Callable[[dict[str, Any]], Any]) -> None:
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.failures: list[int] = []  # status codes to answer with before the first good one
        self.pause = 0.0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append((body, dict(self.headers)))
                time.sleep(server.pause)
                status = server.failures.pop(0) if server.failures else 200
                answer = b"out of \n order" if status != 200 else json.dumps(reply(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict[str, Any]], Any]], Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[dict[str, Any]], Any]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()
