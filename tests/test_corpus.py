"""Whatever an archive holds, every file becomes a row: a map, or the reason why there is none."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import pandas as pd
import pytest
import torch

from cae import sources, training
from cae.config import PRESETS
from cae.images import UnreadableImage, encode_png, load_all
from cae.networks import CAE
from pipelines import maps
from pipelines.maps import ArchiveWorker
from pipelines.run import Run
from pipelines.ways import Ways

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's and pydicom's, of files like these
GOOD, BAD, ODD = corpus.good(), corpus.bad(), corpus.odd()
FILES = {name: content for name, (content, _) in GOOD.items()} | {
    name: content for name, (content, _) in BAD.items()
} | ODD  # fmt: skip
SIZE = 32


def test_there_are_a_hundred_kinds_and_more() -> None:
    assert len(BAD) >= 100 and len(GOOD) >= 40 and len(FILES) == len(GOOD) + len(BAD) + len(ODD)


@pytest.fixture(scope="module")
def explain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], ArchiveWorker]:
    """Makes a worker that writes into a folder; it explains a classifier by brightness through an untrained CAE."""
    torch.manual_seed(0)
    model = replace(PRESETS["quick"].model, image_size=SIZE, channels=3, width=8, blocks=1, mlp_width=8)
    folder = str(tmp_path_factory.mktemp("model"))
    names = ("dark", "bright")
    training.save(folder, CAE(model), names)
    codes = np.random.default_rng(0).normal(size=(6, model.class_dim)).astype(np.float32)
    ends = {label: ([f"end {label}"], codes[label : label + 1]) for label in (0, 1)}
    ways = Ways("runner-up", "medoid", 1, "linear", 0, ends, codes)
    how = {"mode": "integrated", "smooth": 0.025, "steps": None, "margin": 0.0, "window": 0.125}
    return lambda out: ArchiveWorker(
        Run(str(out)), spec="corpus:brightness", names=names, cae=folder, size=SIZE, fit="crop", device="cpu",
        ways=ways, frames=False, how=how,
    )  # fmt: skip


def write(root: Path) -> str:
    for name, content in FILES.items():
        path = os.fsencode(root / name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    return str(root)


def do(worker: ArchiveWorker, source: str, overlays: int = 0) -> Counter[str]:
    """Explain a whole source; the counts by status that are reported."""
    found = Counter[str]()
    for i, piece in enumerate(sources.survey(source, maps.UNIT_ROWS).pieces):
        for row in worker(piece | {"part": f"{i:06d}.parquet", "overlays": overlays if i == 0 else 0}).to_pylist():
            found[row["status"]] += row["rows"]
    return found


def rows(out: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in sorted(out.glob("explanations/*.parquet"))], ignore_index=True)


def tree(root: Path) -> set[bytes]:
    return {os.path.join(where, name) for where, _, names in os.walk(os.fsencode(root)) for name in names}


def test_every_file_is_a_row_and_nothing_is_written_elsewhere(tmp_path: Path, explain: Any) -> None:
    source, out = write(tmp_path / "images"), tmp_path / "out"
    strange = {"pipe.png", "loop", "nowhere.png"}
    os.mkfifo(f"{source}/pipe.png")
    os.symlink(".", f"{source}/loop")
    os.symlink("nothing", f"{source}/nowhere.png")
    before = tree(tmp_path)
    counts = do(explain(out), source, overlays=40)
    written = {os.fsdecode(path) for path in tree(tmp_path) - before}
    assert written and all(path.startswith((f"{out}/explanations/", f"{out}/overlays/")) for path in written)

    found = rows(out)
    assert found.id.is_unique and len(found) == counts.total()
    found["name"] = found.id.str.replace(r"(\[\d+\])?#[0-9a-f]{16}$", "", regex=True)
    by_name = dict(list(found.groupby("name")))
    assert set(by_name) == {sources.text(name) for name in FILES} | strange
    assert all(by_name[name].error.str.startswith("the file cannot be read: ").all() for name in strange)
    for name, (_, pictures) in GOOD.items():
        mine = by_name[sources.text(name)]
        assert len(mine) == pictures and set(mine.status) <= {"flipped", "unflipped", "reconstruction_flipped"}, name
        for heat in mine["map"]:
            assert heat.shape == (SIZE * SIZE,) and np.isfinite(heat.astype(np.float32)).all()
        assert (
            (mine.code_distance >= 0).all()
            and mine.p_source.between(0.5, 1).all()
            and all(len(code) == 8 for code in mine.class_code)
        )
    for name, (_, reason) in BAD.items():
        (row,) = by_name[name].itertuples()
        assert row.status == "unreadable" and row.map is None and reason in row.error.lower(), (name, row.error)
        assert row.error and len(row.error.splitlines()) == 1
    assert all(len(by_name[name]) == 1 for name in ODD)
    assert len(list(out.glob("overlays/*.png"))) == 40


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_gives_what_its_files_give(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(corpus.zipped(FILES) if kind == "zip" else corpus.tarred(FILES, "w:gz" if "gz" in kind else "w"))
    found = Counter[str]()
    for piece in sources.survey(str(path), 50).pieces:
        for item, content, problem in sources.read(piece):
            name = next((name for name in (item.name, sources.text(item.name)) if name in FILES), "")
            if kind == "zip" and not name:  # zip keeps no bytes that are no UTF-8
                assert "\ufffd" in item.name
                continue
            assert content == FILES[name] and not problem
            found[item.name] += 1
    assert set(found.values()) == {1} and len(found) == len(FILES) - (kind == "zip")


def test_archives_that_are_partly_broken(tmp_path: Path) -> None:
    made = corpus.archives(tmp_path)
    for name, (content, expected) in made.items():
        (tmp_path / name).write_bytes(content)
        before = tree(tmp_path)
        pictures, reasons = {}, {}
        for piece in sources.survey(str(tmp_path / name)).pieces:
            for item, data, problem in sources.read(piece):
                for _, picture, reason in sources.frames(item, data, problem):
                    assert item.name not in reasons, name
                    pictures[item.name], reasons[item.name] = picture, reason
        if name == "arrays.npz":
            assert len(reasons) == 3 and not any(reasons.values())
            continue
        for image, reason in expected.items():
            assert (reasons[image] == "") == (reason == ""), (name, image, reasons)
            assert reason in reasons[image] and (pictures[image] is None) == bool(reason), (name, image, reasons)
        if "cut.tar.gz" not in name:  # of which more or less is there
            assert set(reasons) == set(expected), name
        assert tree(tmp_path) == before


def test_archives_that_are_none_are_refused_in_a_line(tmp_path: Path) -> None:
    for name, content in corpus.refused().items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            sources.survey(str(tmp_path / name))
        assert str(error.value) and "\n" not in str(error.value), name
    assert tree(tmp_path) == {os.fsencode(tmp_path / name) for name in corpus.refused()}


def test_bombs_are_refused_before_they_are_decoded() -> None:
    """The least of them would be 300 MB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_peak()
    for name, (content, reason) in BAD.items():
        if name.startswith("bomb/"):
            with pytest.raises(UnreadableImage) as error:
                list(load_all(content))
            assert reason in str(error.value).lower()
    assert resident_peak() - before < 64 << 10


def resident_peak() -> int:
    """Most memory that this process has held, in kilobytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


class Killed(Exception):
    """Stands for a process that is gone."""


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_call_that_was_killed_goes_on_and_ends_with_each_image_once(
    tmp_path: Path, explain: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(maps, "UNIT_ROWS", 10)
    names = [*list(GOOD)[:22], *list(BAD)[:3], *list(GOOD)[22:30]]
    chosen = {name: FILES[name] for name in names}
    path = tmp_path / f"a.{kind}"
    path.write_bytes(corpus.zipped(chosen) if kind == "zip" else corpus.tarred(chosen, "w:gz"))
    undisturbed = do(explain(tmp_path / "whole"), str(path), overlays=3)

    worker = explain(tmp_path / "killed")
    at, open_frames = 0, sources.frames

    def frames(*given: Any) -> Iterator[Any]:
        nonlocal at
        at += 1
        if at in (15, 29):
            raise Killed
        yield from open_frames(*given)

    monkeypatch.setattr(sources, "frames", frames)
    for _ in range(2):
        with pytest.raises(Killed):
            do(worker, str(path), overlays=3)
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/explanations/*.parquet")}
    assert there and do(worker, str(path), overlays=3) == undisturbed
    assert at == 15 + 14 + 13  # of what was there nothing is opened again
    assert all(path.stat().st_mtime_ns == then for path, then in there.items())
    pd.testing.assert_frame_equal(rows(tmp_path / "killed"), rows(tmp_path / "whole"))
    drawn, wanted = ({path.name for path in tmp_path.glob(f"{run}/overlays/*")} for run in ("killed", "whole"))
    assert drawn == wanted and len(drawn) == 3


def test_a_row_is_that_of_its_image(tmp_path: Path, explain: Any) -> None:
    """Images are explained with their neighbours; each one's map and code are those that it has alone."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8) for _ in range(8)]
    (tmp_path / "all.zip").write_bytes(corpus.zipped({f"{k}.png": encode_png(array) for k, array in enumerate(arrays)}))
    do(explain(tmp_path / "all"), str(tmp_path / "all.zip"))
    together = rows(tmp_path / "all")
    worker = explain(tmp_path / "one")
    codes = []
    for k, (array, row) in enumerate(zip(arrays, together.itertuples(), strict=True)):
        (alone,) = worker.worker.explain([row.id], array[None])
        assert alone["status"] == row.status and row.id.startswith(f"{k}.png#")
        np.testing.assert_allclose(alone["map"].astype(np.float32), row.map.astype(np.float32), rtol=2e-2, atol=1e-4)
        codes.append(alone["class_code"])
    # The untrained encoder makes much of rounding, but less than of another image.
    far = np.linalg.norm(np.stack(together.class_code)[:, None] - np.stack(codes), axis=2)
    assert (far.argmin(1) == np.arange(8)).all()
