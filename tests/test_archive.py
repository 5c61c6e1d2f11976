"""A finished run explains an archive of new images, as a user calls it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import corpus
import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import blob, command, kill_when, state

from cae.images import encode_png
from cae.sources import survey
from pipelines.bulk import listing


def explained(out: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(path) for path in sorted(out.glob("explanations/*.parquet"))]
    return pd.concat(parts, ignore_index=True).sort_values("id", ignore_index=True)


@pytest.mark.slow
def test_a_finished_run_explains_an_archive(finished: Path, archive: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    new = {f"ward/{i}.png": encode_png(blob(rng, i % 2)) for i in range(9)}
    known = {f"spot/{path.name}": path.read_bytes() for path in (archive / "spot").glob("[0-9]*")}
    broken = {"ward/cut.jpg": corpus.CORPUS["jpeg"][0][:300], "notes": b"no picture"}
    (tmp_path / "new.zip").write_bytes(corpus.zipped(new | known | broken))
    out, before = tmp_path / "out", (finished / "run.json").read_bytes()
    words = ["--run", str(finished), "--archive", str(tmp_path / "new.zip"), "--out", str(out)]
    words += ["--overlays", "4"]
    done = command("explain.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (finished / "run.json").read_bytes() == before

    rows = explained(out)
    assert sorted(rows.id.str.split("#").str[0]) == sorted(new | known | broken) and set(rows.split) == {"archive"}
    lost = rows[rows.status == "unreadable"]
    assert sorted(lost.id.str.split("#").str[0]) == sorted(broken) and lost.error.str.len().gt(0).all()
    assert len(list(out.glob("overlays/*.png"))) == 4
    # An image that the run has explained gets the same map and code.
    theirs = [pd.read_parquet(path) for path in finished.glob("explanations/split=*/*.parquet")]
    both = rows.merge(pd.concat(theirs), on=["id", "target"])
    codes = pd.concat([pd.read_parquet(path) for path in finished.glob("codes/**/*.parquet")]).set_index("id")
    assert len(both)
    for row in both.itertuples():
        assert row.status_x == row.status_y
        mine, theirs = row.map_x.astype(np.float32), row.map_y.astype(np.float32)
        np.testing.assert_allclose(mine, theirs, atol=0.01 * theirs.max())
        np.testing.assert_allclose(row.class_code_x, codes.class_code[row.id], rtol=1e-3, atol=1e-4)

    result = state(out)["stages"]["explain"]["result"]
    assert result["classes"] == ["plain", "spot"] and state(out)["explained_by"] == str(finished)
    assert rows.p_source[rows.status != "unreadable"].between(0.5, 1).all() and lost.p_source.isna().all()
    assert result["statuses"] == rows.status.value_counts().to_dict() and sum(result["reasons"].values()) == 2
    assert "unreadable 2 (3.9%)" in done.stdout
    client = mlflow.MlflowClient(state(out)["tracking_uri"])
    logged = client.get_run(state(out)["mlflow_run_id"]).data.metrics
    assert {name: logged[f"explain/rows/{name}"] for name in result["statuses"]} == result["statuses"]

    done = command("explain.py", *words)
    assert done.returncode == 0 and "already done" in done.stdout
    for change, says in (
        (["--mode", "contrast"], "--mode contrast contradicts the stage explain"),
        (["--archive", str(archive)], "contradicts the stage explain"),
        (["--out", str(finished / "new")], "choose a folder of its own"),
        (["--fit", "squash", "--out", str(tmp_path / "other")], "--fit squash contradicts the stage classify"),
        (["--image-size", "128", "--out", str(tmp_path / "other")], "--image-size 128 contradicts"),
        (["--out", ""], "--archive says what to explain and --out where to"),
        (["--archive", str(tmp_path / "none"), "--out", str(tmp_path / "other")], "is no folder"),
    ):
        done = command("explain.py", *words, *change)
        assert done.returncode != 0 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    (out / "run.json").write_text(json.dumps(state(out) | {"model": "of another training"}))
    done = command("explain.py", *words)
    assert done.returncode != 0 and "holds explanations by another model" in done.stderr


@pytest.mark.slow
def test_a_run_folder_that_was_moved_still_explains(finished: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    state_of = json.loads((moved / "run.json").read_text())
    state_of["stages"]["classify"]["result"]["spec"] = str(tmp_path / "where it was/classifier")
    (moved / "run.json").write_text(json.dumps(state_of))
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.png").write_bytes(encode_png(blob(np.random.default_rng(7), 1)))
    words = ["--run", str(moved), "--archive", str(tmp_path / "new"), "--out", str(tmp_path / "out")]
    done = command("explain.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(explained(tmp_path / "out")) == 1
    shutil.rmtree(moved / "classifier")
    done = command("explain.py", *words, "--again")
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_an_archive_whose_files_have_changed_is_another(tmp_path: Path) -> None:
    """Under the same names, but for a copy of the same content."""
    rng = np.random.default_rng(7)
    first, second = (encode_png(blob(rng, label)) for label in (0, 1))
    assert len(first) != len(second)
    for name in ("folder", "new.zip", "tables", "list.csv", "uris.csv"):
        path, versions = tmp_path / name, []
        for content in (first, first, second):
            held = {"a.png": content, "b.png": first}
            if name == "new.zip":
                path.write_bytes(corpus.zipped(held))
            elif name == "tables":
                path.mkdir(exist_ok=True)
                pq.write_table(pa.table({"image": list(held.values())}), path / "0.parquet")
            elif name.endswith(".csv"):  # of the files that the loop has left in the folder
                (tmp_path / "folder/a.png").write_bytes(content)
                folder = "folder" if name == "list.csv" else f"file://{tmp_path}/folder"
                path.write_text(f"path\n{folder}/a.png\n{folder}/b.png\nnowhere.png\n")
            else:
                path.mkdir(exist_ok=True)
                for file, data in held.items():
                    (path / file).write_bytes(data)
            found = survey(str(path))
            versions.append(listing(found.pieces, found.version))
        assert versions[0] == versions[1] != versions[2], name


@pytest.mark.slow
def test_killed_it_goes_on_and_refuses_another_archive(finished: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    images = {f"{i}.png": encode_png(blob(rng, i % 2)) for i in range(700)}
    path, out = tmp_path / "new.tar.gz", tmp_path / "out"
    path.write_bytes(corpus.tarred(images, "w:gz"))
    words = ["--run", str(finished), "--archive", str(path), "--out", str(out)]
    wrote, log = lambda: any(out.glob("explanations/*.parquet")), tmp_path / "log"
    kill_when(wrote, log, "explain.py", *words, by=signal.SIGTERM)  # as a cluster ends what takes too long
    assert "stopped; the same command goes on from here" in log.read_text()
    assert "result" not in state(out)["stages"]["explain"]
    there = {part: part.stat().st_mtime_ns for part in out.glob("explanations/*.parquet")}

    path.write_bytes(corpus.tarred(images | {"more.png": images["0.png"]}, "w:gz"))
    done = command("explain.py", *words)
    assert done.returncode != 0 and "it has changed since" in done.stderr, done.stderr[-3000:]
    path.write_bytes(corpus.tarred(images, "w:gz"))
    done = command("explain.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {part: part.stat().st_mtime_ns for part in there} == there  # nothing is done twice
    rows = explained(out)
    assert sorted(rows.id.str.split("#").str[0]) == sorted(images)
    assert json.loads((out / "run.json").read_text())["stages"]["explain"]["result"]["statuses"]
