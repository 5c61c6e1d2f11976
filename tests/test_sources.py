"""Every kind of source gives the same images under the same names, read anywhere and without unpacking."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import command, state
from PIL import Image
from test_dicom import VALUES, dicom

from cae import archives, sources
from cae.archives import MAX_BYTES
from cae.data import Item
from cae.images import decode, encode_png
from cae.sources import Survey, read, survey
from pipelines.run import Run
from pipelines.shard import ShardWorker

SIZE = 8


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


# A small archive: what lies where, and what the class and split of each are.
FILES = {
    f"{split}/{label}/{i}.png": encode_png(picture(100 * s + 10 * k + i))
    for s, split in enumerate(("train", "test"))
    for k, label in enumerate(("cat", "dog"))
    for i in range(3)
}
OTHERS = {"README.md": b"read me", ".hidden/x.png": b"hidden", "train/cat/notes.txt": b"no image at all"}


def folder(root: Path) -> str:
    for name, content in (FILES | OTHERS).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def zipped(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("train")
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def tarred(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        directory = tarfile.TarInfo("train")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def contents(source: str, rows: int = 5) -> dict[str, tuple[Item, bytes, str]]:
    """Everything in a source by its name, each piece read by itself as another process would."""
    found: dict[str, tuple[Item, bytes, str]] = {}
    pieces = survey(source, rows).pieces
    for piece in pickle.loads(pickle.dumps(pieces)):
        held = list(read(piece))
        assert len(held) == piece["rows"]
        for item, content, problem in held:
            assert item.name not in found and bool(content) != bool(problem)
            found[item.name] = item, content, problem
    return found


MAKE: dict[str, Callable[[Path], str]] = {
    "folder": lambda root: folder(root / "images"),
    "zip": lambda root: zipped(root / "a.zip", FILES | OTHERS),
    "zip, stored": lambda root: zipped(root / "a.ZIP", FILES | OTHERS, zipfile.ZIP_STORED),
    "tar": lambda root: tarred(root / "a.tar", FILES | OTHERS),
    "tar with long names": lambda root: tarred(
        root / "a.tar", {f"{'x' * 150}/{n}": c for n, c in (FILES | OTHERS).items()}
    ),
    "tar of .": lambda root: tarred(root / "a.tar", {f"./{n}": c for n, c in (FILES | OTHERS).items()}),
    "tar.gz": lambda root: tarred(root / "a.tar.gz", FILES | OTHERS, "w:gz"),
    "tgz": lambda root: tarred(root / "a.tgz", FILES | OTHERS, "w:gz"),
    "tar.bz2": lambda root: tarred(root / "a.tar.bz2", FILES | OTHERS, "w:bz2"),
    "tar.xz": lambda root: tarred(root / "a.tar.xz", FILES | OTHERS, "w:xz"),
    "zip in a folder": lambda root: zipped(root / "a.zip", {f"set/{n}": c for n, c in (FILES | OTHERS).items()}),
}


@pytest.mark.parametrize("kind", MAKE)
def test_archives_hold_what_a_folder_holds(tmp_path: Path, kind: str) -> None:
    source = MAKE[kind](tmp_path)
    found = survey(source, 5)
    assert found.labels == ["cat", "dog"] and found.splits == {"train", "test"}
    inside = {"tar with long names": "x" * 150 + "/", "zip in a folder": "set/"}.get(kind, "")
    held = contents(source)
    assert {name.removeprefix(inside) for name in held} == {*FILES, "train/cat/notes.txt"}
    for name, content in FILES.items():
        item, data, problem = held[inside + name]
        assert data == content and not problem
        assert [item.split, item.label] == name.split("/")[:2]
    if kind not in ("tar.gz", "tgz", "tar.bz2", "tar.xz"):
        assert [piece["rows"] for piece in survey(source, 5).pieces] == [5, 5, 3]
        last = list(read(survey(source, 5).pieces[-1]))  # without those before it
        assert len(last) == 3 and all(data for _, data, _ in last)


@pytest.mark.parametrize("split", ["test", "Train"])
def test_an_archive_of_one_split_is_of_that_split(tmp_path: Path, split: str) -> None:
    files = {f"{split}/cat/{i}.png": encode_png(picture(i)) for i in range(2)}
    for round_it in ("", "set/"):
        held = survey(zipped(tmp_path / "a.zip", {round_it + name: content for name, content in files.items()}))
        assert held.splits == {split.lower()} and held.labels == ["cat"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_manifest_in_an_archive_names_groups(tmp_path: Path, kind: str) -> None:
    rows = "\n".join(f"{name},p{i // 2}" for i, name in enumerate(FILES))
    files = {f"set/{name}": content for name, content in FILES.items()}
    files["set/manifest.csv"] = f"file,patient\n{rows}\n".encode()
    source = zipped(tmp_path / "a.zip", files) if kind == "zip" else tarred(tmp_path / "a.tgz", files, "w:gz")
    held = contents(source)
    assert [held[f"set/{name}"][0].group for name in FILES] == [f"p{i // 2}" for i in range(len(FILES))]
    files["set/manifest.csv"] = b"file,patient\nelsewhere.png,p1\n"
    source = zipped(tmp_path / "b.zip", files)
    with pytest.raises(ValueError, match="names no file of its folder"):
        survey(source)


def test_a_manifest_in_a_class_s_folder_is_not_the_archive_s(tmp_path: Path) -> None:
    files = {name.removeprefix("train/"): content for name, content in FILES.items() if name.startswith("train/")}
    files["dog/manifest.csv"] = b"file,patient\n0.png,p1\n"
    assert {item.group for item, _, _ in contents(zipped(tmp_path / "a.zip", files)).values()} == {None}
    files = {"manifest.csv": b"file,patient\ncat/0.png,p2\n"} | files
    held = contents(zipped(tmp_path / "b.zip", files))
    assert held["cat/0.png"][0].group == "p2" and held["dog/0.png"][0].group is None


def test_two_files_of_one_name_are_both_there(tmp_path: Path) -> None:
    one, two = FILES["train/cat/0.png"], FILES["train/cat/1.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for content in (one, two, one):
            member = tarfile.TarInfo("a.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "a.zip", "w") as zip_archive:
        for content in (one, two, one):
            zip_archive.writestr("a.png", content)
    for name in ("a.tar", "a.tar.gz", "a.zip"):
        held = contents(f"{tmp_path}/{name}")
        assert {key: data for key, (_, data, _) in held.items()} == {"a.png": one, "a.png (2)": two, "a.png (3)": one}


# --- Bounded ----------------------------------------------------------------------------------------------------------


def fill(held: dict[str, Any], source: str) -> None:
    held.update(contents(source))


def peak(work: Callable[[], object]) -> int:
    """Most bytes that Python held at once while working."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_tar_of_a_hundred_gigabytes_needs_neither_memory_nor_disk(tmp_path: Path) -> None:
    """Its file is sparse: two images, and between them 100 GB that are claimed to be one more."""
    one, two = FILES["train/cat/0.png"], FILES["train/cat/1.png"]
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        for name, content, size in (
            ("one.png", one, len(one)),
            ("huge.png", b"", 100 << 30),
            ("two.png", two, len(two)),
        ):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.write(content)
            file.seek(-(-(file.tell() + size - len(content)) // 512) * 512)
        file.truncate(file.tell() + 1024)
    assert path.stat().st_size > 100 << 30 and path.stat().st_blocks * 512 < 1 << 20
    held: dict[str, Any] = {}
    assert peak(partial(fill, held, str(path))) < 30 << 20
    assert held["one.png"][1] == one and held["two.png"][1] == two
    assert held["huge.png"][2] == "more than 512 MB are no image that can be used"


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.xz"])
def test_what_unpacks_to_gigabytes_is_not_held(tmp_path: Path, kind: str) -> None:
    """Compressed, zeros are small; a few members are just small enough to be looked at."""
    small, count = 2 << 20, 40
    files = {f"{i}.png": bytes(small) for i in range(count)} | {"good.png": FILES["train/cat/0.png"]}
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, files)
    else:
        tarred(path, files, f"w:{kind.removeprefix('tar.')}")
    assert path.stat().st_size < small / 10

    def work() -> None:
        for piece in survey(str(path)).pieces:
            for item, content, problem in read(piece):
                assert not problem and len(content) == (small if item.name != "good.png" else len(files["good.png"]))

    assert peak(work) < 14 * small  # lzma itself takes eight megabytes


def test_a_zip_bomb_is_refused_unopened(tmp_path: Path) -> None:
    """Its list claims a gigabyte, or less than there is: neither is unpacked."""
    path = Path(zipped(tmp_path / "a.zip", {"a.png": bytes(9 << 20), "good.png": FILES["train/cat/0.png"]}))
    whole = path.read_bytes()
    size = (9 << 20).to_bytes(4, "little")
    for claim, reason in ((MAX_BYTES + 1, "more than 512 MB"), (1000, "checksum does not fit")):
        path.write_bytes(whole.replace(size, claim.to_bytes(4, "little")))
        held: dict[str, Any] = {}
        assert peak(partial(fill, held, str(path))) < 3 << 20
        assert reason in held["a.png"][2] and held["good.png"][1] == FILES["train/cat/0.png"]


# --- Damage -----------------------------------------------------------------------------------------------------------


def good_names(held: dict[str, tuple[Item, bytes, str]]) -> set[str]:
    return {name for name, (_, data, problem) in held.items() if not problem and FILES.get(name) == data}


@pytest.mark.parametrize("packed", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_cut_or_damaged_tar_gives_what_is_before_and_says_so(tmp_path: Path, packed: str) -> None:
    whole = Path(tarred(tmp_path / "whole.tar", FILES)).read_bytes()
    header = 512 + 1024 * 5  # of the sixth file: the folder has one block, each file two
    cuts = {"a header": header + 100, "a file": header + 600, "between files": header}
    cuts["the end"] = 1024 * (len(FILES) + 1)
    cases = {name: whole[:at] for name, at in cuts.items()}
    cases["flipped"] = whole[: header + 3] + b"\xff\xff" + whole[header + 5 :]
    pack: dict[str, Callable[[bytes], bytes]] = {
        "tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress,
    }  # fmt: skip
    path = tmp_path / f"a.{packed}"
    for name, content in cases.items():
        path.write_bytes(pack[packed](content))
        held = contents(str(path))
        expected = list(FILES) if name == "the end" else list(FILES)[:5]
        assert good_names(held) == set(expected), name
        problems = [problem for _, _, problem in held.values() if problem]
        if name != "the end":  # whose zeros are not needed but for their first block
            assert problems and all("damaged" in problem or "cut short" in problem for problem in problems), name
    if packed != "tar":
        data = pack[packed](whole)
        for cut in (len(data) // 2, len(data) - 20):
            path.write_bytes(data[:cut])
            try:
                held = contents(str(path))
            except ValueError as error:  # not even the first block can be unpacked
                assert packed == "tar.bz2" and "is no tar archive" in str(error)
                continue
            good = good_names(held)  # all of them where only the tar's closing zeros are gone
            assert good == set(FILES) or any("damaged" in problem for _, _, problem in held.values())


class Refused(Exception):
    """As botocore says why S3 does not give something."""

    def __init__(self) -> None:
        self.response = {"Error": {"Code": "ExpiredToken"}}


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "parquet"])
def test_a_store_that_is_busy_or_refuses_is_no_fault_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, busy: bool
) -> None:
    if kind == "parquet":
        source = f"{tmp_path}/a.parquet"
        pq.write_table(pa.table({"image": [encode_png(picture(i)) for i in range(200)]}), source, compression="none")
    else:
        source = MAKE[kind](tmp_path)
    error: OSError = OSError(errno.EBUSY, "Please reduce your request rate.")
    if not busy:
        error = PermissionError("The provided token has expired.")
        error.__cause__ = Refused()
    pieces = survey(source, 100).pieces

    class Faulty(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            whole = os.path.getsize(self.name)
            if 3 * (self.tell() + (whole if size in (None, -1) else size)) > whole:  # what is behind the first third
                raise error
            return super().read(size)

    def faulty(path: str) -> io.BufferedReader:
        file = Faulty(io.FileIO(path))
        if kind == "folder":
            file.seek(0, os.SEEK_END)
        return file

    for module in (sources, archives):
        monkeypatch.setattr(module, "open_file", faulty)
    with pytest.raises(ConnectionError, match="reduce" if busy else "expired"):
        list(read(pieces[0]))
    if kind.startswith("tar"):
        with pytest.raises(ConnectionError):
            survey(source)
    error.__cause__, error.errno = None, errno.EACCES  # a file that this account may not see is a row
    if kind == "folder":
        assert all("cannot be read" in problem for _, _, problem in read(pieces[0]))


def test_a_tar_of_names_upon_names_is_damaged(tmp_path: Path) -> None:
    """`tarfile` follows each to the next by calling itself."""
    header = tarfile.TarInfo("x" * 120).tobuf(tarfile.GNU_FORMAT)[:1024]
    good = Path(tarred(tmp_path / "good.tar", dict(list(FILES.items())[:2]))).read_bytes()
    whole = tarfile.BLOCKSIZE * -(-len(good.rstrip(b"\0")) // tarfile.BLOCKSIZE)
    (tmp_path / "deep.tar").write_bytes(good[:whole] + header * 5000 + b"\0" * 1024)
    held = contents(f"{tmp_path}/deep.tar")
    assert len(held) == 3 and "damaged behind" in held["deep.tar"][2]


def test_a_damaged_zip_loses_only_what_is_damaged(tmp_path: Path) -> None:
    path = Path(zipped(tmp_path / "a.zip", FILES, zipfile.ZIP_STORED))
    whole = path.read_bytes()
    names = list(FILES)
    for name, change in (
        (names[3], lambda at: whole[: at + 40] + b"\xff" + whole[at + 41 :]),  # in the pixels
        (names[4], lambda at: whole.replace(b"PK\x03\x04", b"PK\x03\x05")),
    ):
        at = whole.index(FILES[name])
        path.write_bytes(change(at))
        held = contents(str(path))
        damaged = {name} if name == names[3] else set(names)
        assert good_names(held) == set(FILES) - damaged
        assert all("the archive is damaged here" in held[lost][2] for lost in damaged)
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is no whole \.zip archive") as error:
            survey(str(path))
        assert "\n" not in str(error.value)


def test_files_that_are_no_archive(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar.gz", "a.tgz", "a.tar.xz"):
        for content in (b"", b"no archive" * 100):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match="is no tar archive") as error:
                survey(f"{tmp_path}/{name}")
            assert "\n" not in str(error.value)
    for make in (lambda: zipped(tmp_path / "e.zip", {}), lambda: tarred(tmp_path / "e.tar", {"README.md": b"x"})):
        with pytest.raises(ValueError, match="holds no images"):
            survey(make())


def test_links_devices_and_secrets_are_rows_not_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "soft.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.CHRTYPE, "dev.png"),
                           (tarfile.FIFOTYPE, "pipe.png")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        for name in ("../../climb.png", "/absolute.png", "ok.png"):
            member = tarfile.TarInfo(name)
            member.size = len(FILES["train/cat/0.png"])
            archive.addfile(member, io.BytesIO(FILES["train/cat/0.png"]))
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    for name in ("a.tar", "a.tar.gz"):
        held = contents(f"{tmp_path}/{name}")
        for link in ("soft.png", "hard.png"):
            assert held[link][2] == "a link to /etc/passwd, which is not followed"
        assert "a device, a pipe" in held["dev.png"][2] and "a device, a pipe" in held["pipe.png"][2]
        for odd in ("../../climb.png", "/absolute.png", "ok.png"):
            assert held[odd][1] == FILES["train/cat/0.png"] and held[odd][0].label is None
    assert not [*tmp_path.glob("**/*.png"), *tmp_path.parents[1].glob("climb.png")]

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zip_archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        zip_archive.writestr(link, "/etc/passwd")
        zip_archive.writestr("bzip2.png", FILES["train/cat/0.png"], zipfile.ZIP_BZIP2)
        zip_archive.writestr("a\\b.png", FILES["train/cat/0.png"])
        zip_archive.writestr("secret.png", FILES["train/cat/0.png"])
    data = bytearray((tmp_path / "a.zip").read_bytes())
    entry = data.rindex(b"PK\x01\x02")  # the last one in the list: secret.png
    data[entry + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    held = contents(f"{tmp_path}/a.zip")
    assert "a link" in held["link.png"][2] and "packed by method 12" in held["bzip2.png"][2]
    assert "encrypted" in held["secret.png"][2] and held["a/b.png"][0].label == "a"


# --- Shards -----------------------------------------------------------------------------------------------------------


def shards(run: Path) -> pd.DataFrame:
    frames = [pd.read_parquet(p).assign(split=p.parent.name[6:]) for p in run.glob("shards/split=*/*.parquet")]
    return pd.concat(frames, ignore_index=True).sort_values("id", ignore_index=True)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "zip in a folder"])
def test_shards_are_the_same_from_every_source(tmp_path: Path, kind: str) -> None:
    found = survey(MAKE[kind](tmp_path), 4)
    run = Run(str(tmp_path / "run"))
    worker = ShardWorker(run, names=found.labels, present=found.splits)
    rejected = [row for i, piece in enumerate(found.pieces)
                for row in worker(piece | {"part": f"{i:06d}.parquet"}).to_pylist()]  # fmt: skip
    rows = shards(tmp_path / "run")
    assert len(rows) == len(FILES) and rows.id.is_unique
    prefix = "set/" if kind == "zip in a folder" else ""
    assert [name.split("#")[0].removeprefix(prefix) for name in rows.id] == sorted(FILES)
    for row in rows.itertuples():
        name = row.id.split("#")[0].removeprefix(prefix)
        assert np.array_equal(decode(row.image, SIZE), decode(FILES[name], SIZE))
        assert row.class_name == name.split("/")[1] and found.labels[row.label] == row.class_name
        assert row.split == "test" if name.startswith("test") else row.split in ("train", "val")
    assert [(row["id"].split("#")[0].removeprefix(prefix), row["reason"]) for row in rejected] == [
        ("train/cat/notes.txt", "no known image format")
    ]


def test_a_unit_done_again_leaves_each_image_in_one_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its part, with files of other content, of the same size even, when it is called again."""
    monkeypatch.setattr("pipelines.shard.SHARD_BYTES", 1)  # a shard an image
    run, splits = Run(str(tmp_path / "run")), []
    for attempt in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        for i in range(24):
            (tmp_path / f"images/{i}.png").write_bytes(encode_png(picture(24 * attempt + i)))
        (piece,) = survey(str(tmp_path / "images")).pieces
        ShardWorker(run, names=[], present={None}, label_free=True)(piece | {"part": "000000.parquet"})
        rows = shards(tmp_path / "run")
        assert len(rows) == 24 and rows.id.str.split("#").str[0].is_unique
        splits.append(rows.split.value_counts())
    assert (splits[1] < splits[0]).any()


def test_a_patient_that_dicom_files_name_is_in_one_split(tmp_path: Path) -> None:
    """As in a manifest, which goes first."""
    source = tmp_path / "scans"
    for label in ("ill", "well"):
        (source / label).mkdir(parents=True)
        for i in range(24):
            scan = dicom(VALUES + i, PatientID=f"{label} {i // 4}")
            (source / label / f"{i}.dcm").write_bytes(scan)
    (source / "well" / "plain.png").write_bytes(encode_png(picture(1)))
    found = survey(str(source), 100)

    def sharded(folder: str, survey: Survey) -> pd.DataFrame:
        worker = ShardWorker(Run(str(tmp_path / folder)), names=found.labels, present=found.splits)
        assert worker(survey.pieces[0] | {"part": "0.parquet"}).num_rows == 0
        return shards(tmp_path / folder)

    rows = sharded("run", found)
    assert rows.group.isna().sum() == 1 and rows.group.nunique() == 12 and rows.split.nunique() > 1
    assert (rows.groupby("group").split.nunique() == 1).all() and (rows.groupby("group").size() == 4).all()
    (source / "manifest.csv").write_text("file,patient\n" + "".join(f"ill/{i}.dcm,one\n" for i in range(24)))
    rows = sharded("again", survey(str(source), 100))
    assert set(rows.group[rows.class_name == "ill"]) == {"one"} and rows.group.nunique() == 7


@pytest.mark.slow
def test_a_tar_gz_as_a_user_gives_it(tmp_path: Path) -> None:
    """Through the command line and Ray, with names that are no UTF-8."""
    files = {}
    for k, label in enumerate(("cat", "dog")):
        for i in range(14):
            files[f"{label}/{i}\udcff.png"] = encode_png(picture(50 * k + i))
    source = tarred(tmp_path / "a.tar.gz", files | {"cat/not.png": b"no"}, "w:gz")
    done = command("shard.py", "--dataset", source, "--run", f"{tmp_path}/run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert state(tmp_path / "run")["stages"]["shard"]["result"]["classes"] == ["cat", "dog"]
    rows = shards(tmp_path / "run")
    assert len(rows) == 28 and rows.id[0].startswith("cat/0\ufffd.png#")
    rejected = pd.read_parquet(tmp_path / "run/shards/rejected.parquet")
    assert rejected.reason.tolist() == ["no known image format"]
    with Image.open(io.BytesIO(rows.image[0])) as image:
        assert image.size == (SIZE, SIZE)
