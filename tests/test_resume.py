"""A run whose driver is killed (kill -9) twice in train, and in explain, goes on to the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import command, keeps_checkpoint, kill_when, state
from safetensors.numpy import load_file


def explained(folder: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted(folder.glob("explanations/split=*/*.parquet"))]
    return pd.concat(parts).sort_values("id").reset_index(drop=True)


@pytest.mark.timeout(1800)  # six programs
def test_killed_in_train_and_in_explain_it_ends_as_if_undisturbed(finished: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "killed", tmp_path / "log"
    run = ["--run", str(folder)]
    shutil.copytree(finished, folder)
    for done in ("cae", "codes", "manifold", "explanations", "checkpoints/train"):
        shutil.rmtree(folder / done)
    for measured in folder.glob("evaluation/images/split=*/*.parquet"):  # those of units that were cut otherwise
        measured.rename(measured.with_stem("of-an-earlier-version"))
    memory = state(folder)
    memory["stages"] = {name: memory["stages"][name] for name in ("shard", "classify")}
    (folder / "run.json").write_text(json.dumps(memory))

    warmed_up = folder / "checkpoints/train/start.pt"
    kill_when(warmed_up.exists, log, "train.py", *run)
    before = warmed_up.stat().st_mtime_ns
    for later in folder.glob("checkpoints/train/checkpoint_*"):  # if its worker outlived it by as much
        shutil.rmtree(later)
    (folder / "checkpoints/train/checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    kill_when(lambda: keeps_checkpoint(folder), log, "train.py", *run)
    assert "result" not in state(folder)["stages"]["train"]
    assert warmed_up.stat().st_mtime_ns == before and "warmed up" not in log.read_text()
    for script in ("train.py", "embed.py"):
        done = command(script, *run)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert script != "train.py" or "goes on at pair 24" in done.stdout
    ours, theirs = (load_file(path / "cae/model.safetensors") for path in (folder, finished))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)

    kill_when(lambda: any(folder.glob("explanations/split=*/*.parquet")), log, "explain.py", *run)
    assert "result" not in state(folder)["stages"]["explain"]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("explanations/split=*/*.parquet")}
    done = command("full.py", *run)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert before and {p: p.stat().st_mtime_ns for p in before} == before  # nothing is done twice
    ours, theirs = explained(folder), explained(finished)
    assert ours.id.to_list() == theirs.id.to_list() and ours.status.to_list() == theirs.status.to_list()
    ours, theirs = (np.stack(rows["map"]).astype(np.float32) for rows in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=0.01 * theirs.max())
    assert (folder / "report.html").exists()
    measured, swaps = ([pd.read_csv(path / f"evaluation/{name}.csv") for path in (folder, finished)]
                       for name in ("measured", "swap_success"))  # fmt: skip
    assert measured[0].id.is_unique and set(measured[0].id) == set(measured[1].id)
    assert swaps[0].images.to_list() == swaps[1].images.to_list()
