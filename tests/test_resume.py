"""A run whose driver is killed (kill -9) twice in train, and in explain, goes on to the same result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from conftest import command, kill_when, state
from safetensors.numpy import load_file


def explained(folder: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted(folder.glob("explanations/split=*/*.parquet"))]
    return pd.concat(parts).sort_values("id").reset_index(drop=True)


def test_killed_in_train_and_in_explain_it_ends_as_if_undisturbed(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    for done in ("cae", "codes", "manifold", "explanations", "checkpoints/train"):
        shutil.rmtree(folder / done)
    for measured in folder.glob("evaluation/images/split=*/*.parquet"):  # those of units that were cut otherwise
        measured.rename(measured.with_stem("of-an-earlier-version"))
    memory = state(folder)
    memory["stages"] = {name: memory["stages"][name] for name in ("shard", "classify")}
    (folder / "run.json").write_text(json.dumps(memory))

    warmed_up = folder / "checkpoints/train/start.pt"
    kill_when(warmed_up.exists, "train.py", folder)
    before = warmed_up.stat().st_mtime_ns
    for later in folder.glob("checkpoints/train/checkpoint_*"):  # if its worker lived to write one
        shutil.rmtree(later)
    kill_when(lambda: any(folder.glob("checkpoints/train/checkpoint_*/state.pt")), "train.py", folder)
    assert "result" not in state(folder)["stages"]["train"]
    assert warmed_up.stat().st_mtime_ns == before and "warmed up" not in (folder / "train.py.log").read_text()
    for script in ("train.py", "embed.py"):
        done = command(script, "--run", str(folder))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = (load_file(path / "cae/model.safetensors") for path in (folder, finished))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)

    kill_when(lambda: any(folder.glob("explanations/split=*/*.parquet")), "explain.py", folder)
    assert "result" not in state(folder)["stages"]["explain"]
    before = {p: p.stat().st_mtime_ns for p in folder.glob("explanations/split=*/*.parquet")}
    done = command("full.py", "--run", str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert before and {p: p.stat().st_mtime_ns for p in before} == before  # nothing is done twice
    ours, theirs = explained(folder), explained(finished)
    assert ours.id.to_list() == theirs.id.to_list() and ours.status.to_list() == theirs.status.to_list()
    np.testing.assert_allclose(np.stack(ours["map"]), np.stack(theirs["map"]), atol=2e-3)
    assert (folder / "report.html").exists()
    measured, swaps = ([pd.read_csv(path / f"evaluation/{name}.csv") for path in (folder, finished)]
                       for name in ("measured", "swap_success"))  # fmt: skip
    assert measured[0].id.is_unique and set(measured[0].id) == set(measured[1].id)
    assert swaps[0].images.to_list() == swaps[1].images.to_list()
