"""Lists of paths and URLs, and tables of images."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_sources import FILES, contents, folder, picture

from cae import sources
from cae.images import encode_png
from cae.sources import read, survey


def test_lists_of_paths_and_urls(tmp_path: Path) -> None:
    folder(tmp_path / "images")
    memory = fsspec.filesystem("memory")
    memory.pipe("/lists/far.png", FILES["test/dog/2.png"])
    rows = [
        {"Path": "images/train/cat/0.png", "label": "cat", "split": "Training", "patient": "p1"},
        {"Path": f"{tmp_path}/images/train/dog/1.png", "label": "dog", "split": "val", "patient": ""},
        {"Path": "memory://lists/far.png", "label": "", "split": "", "patient": "p2"},
        {"Path": "images/none.png", "label": "dog", "split": "test", "patient": ""},
        {"Path": "", "label": "cat", "split": "", "patient": ""},
        {"Path": "images/train/cat/0.png", "label": "cat", "split": "", "patient": ""},
        {"Path": "nowhere://x/y.png", "label": "cat", "split": "", "patient": ""},
    ]
    made = []
    for name, delimiter in (("list.csv", ","), ("list.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        made.append(name)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    for name in [*made, "list.parquet"]:
        held = contents(f"{tmp_path}/{name}")
        near, again = "images/train/cat/0.png", "images/train/cat/0.png (2)"
        assert held[near][1] == held[again][1] == FILES["train/cat/0.png"]
        assert (held[near][0].split, held[near][0].label, held[near][0].group) == ("train", "cat", "p1")
        whole = held[f"{tmp_path}/images/train/dog/1.png"]
        assert whole[1] == FILES["train/dog/1.png"] and (whole[0].split, whole[0].group) == ("val", None)
        far = held["memory://lists/far.png"]
        assert far[1] == FILES["test/dog/2.png"] and (far[0].label, far[0].group) == (None, "p2")
        assert "the file cannot be read" in held["images/none.png"][2]
        assert held["row 5"][2] == "the row has no Path" and "nowhere" in held["nowhere://x/y.png"][2]


def test_lists_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    for content, reason in (
        (b"picture,label\na.png,cat\n", "call the one with paths path, url"), (b"", "call the one with paths"),
        (b"path\n", "lists no images"), (b"path\n\xff\xfe\n", "is no list in UTF-8"),
        (b"path\n" + b"x" * 200_000 + b"\n", "is no list in UTF-8"),
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as error:
            survey(str(path))
        assert "\n" not in str(error.value)


def tables(root: Path) -> dict[str, str]:
    """The images of FILES as Parquet, in every form they are kept in."""
    split, label = zip(*(name.split("/")[:2] for name in FILES), strict=True)
    plain = {"image": list(FILES.values()), "label": label, "split": split}
    struct = [{"bytes": content, "path": name} for name, content in FILES.items()]
    numbered = {**plain, "label": [10 if name == "dog" else 9 for name in label]}
    pq.write_table(pa.table(plain), root / "plain.parquet", row_group_size=5)
    pq.write_table(pa.table({**plain, "image": struct, "id": range(len(FILES))}), root / "struct.parquet")
    pq.write_table(pa.table(numbered), root / "numbers.parquet", row_group_size=7)
    (root / "several").mkdir()
    for i in range(3):
        half = {key: column[4 * i : 4 * i + 4] for key, column in plain.items()}
        pq.write_table(pa.table({"content": half.pop("image"), **half}), root / f"several/{i}.parquet")
    return {name: f"{root}/{name}{'' if name == 'several' else '.parquet'}"
            for name in ("plain", "struct", "numbers", "several")}  # fmt: skip


def test_tables_of_images(tmp_path: Path) -> None:
    for kind, source in tables(tmp_path).items():
        found = survey(source)
        assert found.labels == (["9", "10"] if kind == "numbers" else ["cat", "dog"])
        assert found.splits == {"train", "test"}
        held = contents(source)
        assert [data for _, data, _ in held.values()] == list(FILES.values())
        assert list(held)[1] == {"struct": "000000001/train/cat/1.png", "several": "0.parquet/000000001"}.get(
            kind, "000000001"
        )
        splits = [item.split for item, _, _ in held.values()]
        assert splits == [name.split("/")[0] for name in FILES]
    assert len(survey(f"{tmp_path}/plain.parquet").pieces) == 3


def test_classes_that_pandas_made_floats_of_are_numbers(tmp_path: Path) -> None:
    """A gap makes a column of integers one of floats; classes go by their size all the same."""
    labels = [float(i) for i in range(12)] + [float("nan"), None]
    rows = pa.table(
        {"image": [encode_png(picture(i)) for i in range(14)], "label": pa.array(labels, from_pandas=False)}
    )
    pq.write_table(rows, tmp_path / "a.parquet")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,{i}.0\n" for i in range(12)) + "x.png,\n")
    for name in ("a.parquet", "list.csv"):
        found = survey(f"{tmp_path}/{name}")
        assert found.labels == [str(i) for i in range(12)]
    assert [item.label for item, _, _ in read(survey(f"{tmp_path}/a.parquet").pieces[0])][-3:] == ["11", None, None]


def test_tables_with_gaps_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    content = FILES["train/cat/0.png"]
    pq.write_table(pa.table({"image": pa.array([content, None, b"", content], pa.binary())}), path)
    held = contents(str(path))
    assert [problem for _, _, problem in held.values()] == ["", "the row holds no image", "the row holds no image", ""]

    images = [encode_png(picture(i)) for i in range(60)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=20, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    offset = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:offset] + b"\xff" * 40 + whole[offset + 40 :])
    held = contents(str(path))
    problems = [problem for _, _, problem in held.values()]
    assert len(held) == 60 and not any(problems[:20] + problems[40:])
    assert all("the table is damaged here" in problem for problem in problems[20:40])
    for damaged in (b"", b"junk", whole[:-9]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no whole Parquet file") as error:
            survey(str(path))
        assert "\n" not in str(error.value)
    pq.write_table(pa.table({"x": [1, 2]}), path)
    with pytest.raises(ValueError, match="has the columns x: call the one with paths"):
        survey(str(path))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(ValueError, match="holds no images"):
        survey(str(path))


def test_the_network_s_faults_are_not_the_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "images")
    (piece, *_) = survey(f"{tmp_path}/images").pieces

    def fails(*_: Any) -> bytes:
        raise TimeoutError("slow")

    monkeypatch.setattr(sources, "read_span", fails)
    with pytest.raises(TimeoutError):
        list(read(piece))


@pytest.fixture
def web() -> Iterator[str]:
    """A web server: /NNN answers with that status, /short with less than it says, /once so the first time only,
    /list.csv and /list.tsv with a list, anything else with a picture."""
    asked = Counter[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            last = urlsplit(self.path).path.split("/")[-1].removesuffix(".zip")
            lists = {"list.csv": b"url\n/a.png\n", "list.tsv": b"url\tclass\na.png\tcat, black\n"}
            content = lists.get(last, FILES["train/cat/0.png"])
            asked[last] += self.command == "GET"
            cut = last == "short" or (last == "once" and asked[last] < 2)
            self.send_response(int(last) if last.isdecimal() else 200)
            self.send_header("Content-Length", str(len(content) + 100 * cut))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server_s_answers_are_told_apart(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*names: str) -> list[tuple[bytes, str]]:
        path = tmp_path / "list.csv"
        path.write_text("\n".join(["url", *(name if "://" in name else f"{web}/{name}" for name in names)]))
        return [(content, problem) for piece in survey(str(path)).pieces for _, content, problem in read(piece)]

    pytest.importorskip("aiohttp")
    monkeypatch.setattr(sources, "PATIENCE", (0, 0))
    good, missing, forbidden, short, again, after = listed("a.png", "404", "403", "short", "once", "b.png")
    assert good == again == after == (FILES["train/cat/0.png"], "")
    assert missing == (b"", "the file cannot be read: the server answers 404 Not Found")
    assert forbidden == (b"", "the file cannot be read: the server answers 403 Forbidden")
    assert not short[0] and "the download broke off" in short[1]
    again = {"503": ": 503, message", "429": ": 429, message", "http://127.0.0.1:1/a.png": "Cannot connect to host 127"}
    for name, says in again.items():  # to be read again, and no row yet
        with pytest.raises(ConnectionError, match=says):
            listed("a.png", name)
    assert len(survey(f"{web}/list.csv?X-Amz-Signature=a.b/c").pieces) == 1  # as S3 signs addresses
    signed = survey(f"{web}/list.tsv?X-Amz-Signature=a.b/c").pieces[0]
    assert [(item.path, item.label) for item in signed["items"]] == [(f"{web}/a.png", "cat, black")]
    with pytest.raises(ConnectionError, match=": 503, message"):  # of an archive too
        survey(f"{web}/503.zip")
    with pytest.raises(ValueError, match="cannot be read: the server answers 404"):
        survey(f"{web}/404.zip")


def test_sources_that_are_not_there_are_said_in_one_line(tmp_path: Path) -> None:
    for name in ("a.zip", "a.tar", "a.tar.gz", "a.csv", "a.parquet", "a.npz"):
        with pytest.raises(ValueError, match="cannot be read: No such file"):
            survey(str(tmp_path / name))


def test_tables_as_spark_writes_them(tmp_path: Path) -> None:
    for label in ("a", "b"):
        part = tmp_path / f"data.parquet/label={label}/part.parquet"
        part.parent.mkdir(parents=True)
        pq.write_table(pa.table({"image": [FILES["train/cat/0.png"]]}), part)
    (tmp_path / "data.parquet/_SUCCESS").touch()
    held = contents(str(tmp_path / "data.parquet"))
    assert list(held) == ["label=a/part.parquet/000000000", "label=b/part.parquet/000000000"]
    assert all(content == FILES["train/cat/0.png"] and not problem for _, content, problem in held.values())


def test_a_row_with_more_fields_than_the_header(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(FILES["train/cat/0.png"])
    (tmp_path / "a.csv").write_text("path,label\n0.png,cat\n0.png,cat,more\n")
    (_, _, none), (_, _, problem) = contents(str(tmp_path / "a.csv")).values()
    assert not none and problem == "the row has more fields than the header"
