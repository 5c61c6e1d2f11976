"""Where images come from: folders, zip and tar archives, lists of paths, Parquet tables of images, .npz files.

`survey` looks at names and labels and says in which pieces a source can be read; `read` reads a piece, image by image.
Only the image at hand is in memory, nothing is unpacked, and no name in an archive becomes a path.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import operator
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import IO, Any
from urllib.parse import urlsplit

from PIL import Image

from cae.archives import DAMAGED, Member, of_web, open_file, pass_on, read_span, tar_members, zip_members
from cae.data import (
    GROUP_COLUMNS,
    MANIFEST,
    SPLITS,
    Item,
    Layout,
    column_of,
    filesystem,
    first_line,
    layout_of,
    list_images,
    may_be_image,
    read_npz,
    text,
    version_of,
)
from cae.images import UnreadableImage, encode_png, load_all

Piece = dict[str, Any]  # plain values and `Item`s: any process can be handed it
STREAMED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")  # can only be read from the start
# Columns of lists and tables, however they are written (see `column_of`); of several the first.
PATHS = ("path", "url", "uri", "file", "filename", "image")
LABELS = ("class_name", "class", "label")
IMAGES = ("image", "bytes", "image_bytes")
PATIENCE = (1, 5)  # seconds before a download that broke off is tried again
SURPLUS = "more fields than the header"  # where the csv module puts those of a row


@dataclass(frozen=True)
class Survey:
    """What a source holds."""

    pieces: list[Piece]
    """What `read` takes. Each says under `rows` how many images it holds."""
    labels: list[str]
    """Class names, sorted; numbers by their size, unless they are names of folders."""
    splits: set[str | None]
    """The splits that are given, and None where an image has none."""
    version: str = ""
    """Another one where a file of the source has another content, as far as its size or ETag say so. Of the files that
    a list names, those on disk say so by their items' version; URLs are not asked."""


def survey(source: str, rows: int = 256) -> Survey:
    """Look through a source, a path or URL; where it can be read anywhere, in pieces of at most `rows` images.

    Raises ValueError, in one line, for a source that is none, is damaged as a whole, or holds nothing.
    """
    try:
        if _is_folder(source):
            return _survey_source(source, "", rows)
        return replace(_survey_source(source, _unsigned(source).lower(), rows), version=_version(source))
    except FileNotFoundError as error:
        raise ValueError(f"{source} cannot be read: {_why(error)}") from error


def _unsigned(source: str) -> str:
    """A path or URL without the signature of a web address that has one."""
    return urlsplit(source)._replace(query="").geturl() if source.startswith(("http://", "https://")) else source


def _is_folder(source: str) -> bool:
    """Whether a source is one, whatever it is called: Spark writes folders `NAME.parquet`."""
    if "://" not in source:
        return os.path.isdir(source)
    fs, inner = filesystem(source)
    return not source.startswith(("http://", "https://")) and fs.isdir(inner)  # a web server tells of none


def _version(source: str) -> str:
    if "://" not in source:
        return str(os.path.getsize(source))
    fs, inner = filesystem(source)
    return version_of(fs.info(inner))


def _survey_source(source: str, kind: str, rows: int) -> Survey:
    """`survey` of a source that its name, in lower case, tells the kind of: "" for a folder."""
    if kind.endswith(".npz"):
        items = [item for item, _ in read_npz(source)]
        return _survey(items, [{"npz": source, "rows": len(items)}])
    if kind.endswith(STREAMED):
        layout, items = _list(source, tar_members(source, streamed=True))
        return _survey(items, [{"stream": source, "layout": json.dumps(asdict(layout)), "rows": len(items)}])
    if kind.endswith((".zip", ".tar")):
        _, items = _list(source, zip_members(source) if kind.endswith(".zip") else tar_members(source))
    elif kind.endswith((".csv", ".tsv")):
        items = _list_csv(source)
    elif kind.endswith(".parquet"):
        return _survey_tables({source: ""}, rows)
    else:
        items = list_images(source)
        version = hashlib.sha256("\n".join(item.version for item in items).encode()).hexdigest()
        # Beside tables, names with an underscore are those of notes on them: `_SUCCESS`, `_metadata`.
        tables = [item for item in items if not item.name.split("/")[-1].startswith("_")]
        if tables and all(item.name.endswith(".parquet") for item in tables):
            many = len(tables) > 1
            found = _survey_tables({item.path: f"{item.name}/" if many else "" for item in tables}, rows)
            return replace(found, version=version)
        labels = sorted({item.label for item in items if item.label is not None})  # as torchvision sorts folders
        return replace(_survey(items, _chunks(items, rows)), labels=labels, version=version)
    return _survey(items, _chunks(items, rows))


def read(piece: Piece) -> Iterator[tuple[Item, bytes, str]]:
    """Each image of a piece, encoded; where there is none, why, of which `frames` makes one line.

    Raises OSError where the way to a file fails and not the file: the piece is then to be read again.
    """
    if "npz" in piece:
        for item, array in read_npz(piece["npz"]):
            yield item, encode_png(array), ""
    elif "stream" in piece:
        yield from _read_stream(piece["stream"], Layout(**json.loads(piece["layout"])))
    elif "table" in piece:
        yield from _read_table(piece)
    else:
        yield from _read_items(piece["items"])


def frames(item: Item, content: bytes, problem: str) -> Iterator[tuple[str, Image.Image | None, str]]:
    """Of what `read` gives: the id of each picture in it, and the picture, RGB; or None and why there is none.

    An id is the image's name, what `cae.images.load_all` calls the frame, and a hash of the content.
    """
    name, digest = text(item.name), hashlib.sha256(content).hexdigest()[:16]
    try:
        if problem:
            raise UnreadableImage(problem)
        for frame, picture in load_all(content):
            yield f"{name}{frame}#{digest}", picture, ""
    except UnreadableImage as error:
        yield f"{name}#{digest}", None, " ".join(text(str(error)).split())


def _survey(items: Sequence[Item], pieces: list[Piece]) -> Survey:
    labels = {item.label for item in items if item.label is not None}
    ordered = sorted(labels, key=lambda name: (name.isdecimal() and int(name), name))
    return Survey(pieces, ordered, {item.split for item in items if not item.problem} or {None})


def _chunks(items: Sequence[Item], rows: int) -> list[Piece]:
    chunks = [items[start : start + rows] for start in range(0, len(items), rows)]
    return [{"items": chunk, "rows": len(chunk)} for chunk in chunks]


def _read_items(items: Iterable[Item]) -> Iterator[tuple[Item, bytes, str]]:
    """Whole files, and members of archives; an archive is opened once for neighbours."""
    with ExitStack() as files:
        archive, opened = "", None
        for item in items:
            content, problem = b"", item.problem
            for wait in () if problem else (*PATIENCE, None):
                try:
                    if not item.span:
                        with open_file(item.path) as file:
                            content = read_span(file)
                    else:
                        if opened is None or item.path != archive:
                            files.close()
                            archive, opened = item.path, files.enter_context(open_file(item.path))
                        content = read_span(opened, item.span)
                    break
                except Exception as error:
                    problem = _problem(error)
                    if not of_web(error) or wait is None:
                        break
                    archive, opened = "", None
                    time.sleep(wait)
                    problem = ""
            yield item, content, problem


def _problem(error: Exception) -> str:
    """Why a file cannot be read, as its row says it. Raises what is no fault of a file."""
    if any(kind.__name__ == "ClientConnectorError" for kind in type(error).__mro__):  # aiohttp's: nobody answers
        raise ConnectionError(str(error)) from error
    if of_web(error):
        return f"the download broke off: {error}"
    pass_on(error)
    if isinstance(error, OSError):
        return f"the file cannot be read: {_why(error)}"
    if isinstance(error, (ValueError, ImportError, zlib.error)):  # fsspec's, for URLs, are ValueError and ImportError
        return str(error) or type(error).__name__
    raise error


def _why(error: OSError) -> str:
    """Why a file cannot be read. fsspec says "not found" whatever a web server said, with the true reason as the cause.

    Raises ConnectionError where the server is not there, or has a fault of its own.
    """
    cause = error.__cause__
    if not of_web(cause):
        bare = isinstance(error, FileNotFoundError) and not error.strerror  # fsspec's: the name alone
        return f"there is no {error}" if bare else str(error.strerror or error)
    status = getattr(cause, "status", None)
    if status is None or status >= 500 or status == 429:
        raise ConnectionError(f"{error}: {cause}") from error
    return f"the server answers {status} {getattr(cause, 'message', '')}".strip()


# --- Archives ---------------------------------------------------------------------------------------------------------


def _list(path: str, members: Iterable[Member]) -> tuple[Layout, list[Item]]:
    """The layout of an archive, and its items in their order. A folder round all of it is looked through."""
    found: list[Member] = []
    manifests: dict[str, bytes] = {}
    for member in members:
        if member.name.split("/")[-1] == MANIFEST and member.name.count("/") <= 1 and not member.problem:
            try:
                manifests[member.name] = member.content()
            except DAMAGED as error:
                pass_on(error)
                raise ValueError(f"{member.name} in {path} is damaged: {error}") from error
        if may_be_image(member.name):
            found.append(replace(member, content=bytes))
    if not found:
        raise ValueError(f"{path} holds no images; expected SPLIT/CLASS/*, CLASS/* or images alone")
    names = [member.name for member in found if not member.problem]
    inside = names[0].split("/")[0] + "/" if names else ""
    wraps = inside.rstrip("/").lower() not in SPLITS
    if not wraps or not all(name.startswith(inside) and "/" in name.removeprefix(inside) for name in names):
        inside = ""
    manifest = manifests.get(inside + MANIFEST, manifests.get(MANIFEST))  # not that of a class's folder
    layout = layout_of(names, manifest, f"{MANIFEST} in {path}", inside)
    seen: Counter[str] = Counter()
    return layout, [_numbered(layout.item(path, m.name, m.span, m.problem), seen) for m in found]


def _read_stream(path: str, layout: Layout) -> Iterator[tuple[Item, bytes, str]]:
    seen: Counter[str] = Counter()
    for member in tar_members(path, streamed=True):
        if may_be_image(member.name):
            content, problem = b"", member.problem
            try:
                content = b"" if problem else member.content()
            except DAMAGED as error:
                pass_on(error)
                problem = f"the archive is damaged here: {error}"
            yield _numbered(layout.item(path, member.name), seen), content, problem


def _numbered(item: Item, seen: Counter[str]) -> Item:
    """The item; a second one of the same name, as archives and lists may hold, becomes `name (2)`."""
    seen[item.name] += 1
    return item if seen[item.name] == 1 else replace(item, name=f"{item.name} ({seen[item.name]})")


# --- Lists and tables -------------------------------------------------------------------------------------------------


def _describe(item: Item, row: Mapping[str, Any]) -> Item:
    """The item with the label, split and group that a row of a list or table gives it."""

    def told(wanted: Sequence[str]) -> str | None:
        column = column_of(row, wanted)
        value = None if column is None else row[column]
        if value is None or value != value or value == "":  # not a number: what pandas makes of a gap
            return None
        return str(value).removesuffix(".0") if str(value).removesuffix(".0").isdecimal() else str(value)

    return replace(item, label=told(LABELS), split=SPLITS.get((told(("split",)) or "").lower()),
                   group=told(GROUP_COLUMNS))  # fmt: skip


def _list_rows(source: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[Item]:
    """Items of a list of paths and URLs; a path may be relative to the list's folder."""
    column = column_of(columns, PATHS)
    if column is None:
        raise ValueError(f"{source} has the columns {', '.join(columns)}: call the one with paths {', '.join(PATHS)}")
    items, seen, beside = [], Counter[str](), os.path.dirname(_unsigned(source)) or "."
    for number, row in enumerate(rows, 1):
        given = str(row[column] or "").strip()
        path = given if "://" in given or os.path.isabs(given) else f"{beside}/{given}"
        item = Item(path, given, None, None, None)
        if not given:
            item = Item(source, f"row {number}", None, None, None, problem=f"the row has no {column}")
        elif SURPLUS in row:
            item = replace(item, problem=f"the row has {SURPLUS}")
        items.append(_numbered(_describe(item, row), seen))
    if not items:
        raise ValueError(f"{source} lists no images")
    chunks = [items[start : start + 1000] for start in range(0, len(items), 1000)]
    with ThreadPoolExecutor(16) as pool:  # on a network's disk every answer takes its time
        return [item for chunk in pool.map(_with_versions, chunks) for item in chunk]


def _with_versions(items: Sequence[Item]) -> list[Item]:
    """The items, those that are files on disk with their versions."""

    def told(item: Item) -> Item:
        if item.problem or ("://" in item.path and not item.path.startswith("file://")):
            return item
        try:
            return replace(item, version=_version(item.path))
        except (OSError, ValueError):  # there is none, or its name has a null byte
            return item

    return [told(item) for item in items]


def _list_csv(path: str) -> list[Item]:
    with open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        delimiter = "\t" if _unsigned(path).lower().endswith(".tsv") else ","
        rows = csv.DictReader(text, delimiter=delimiter, restval="", restkey=SURPLUS)
        try:
            return _list_rows(path, rows, rows.fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no list in UTF-8 with a header ({error}): save it as CSV again") from error


def _survey_tables(paths: Mapping[str, str], rows: int) -> Survey:
    """Parquet files of images, path -> what goes before their images' names, a piece a row group; or one with a list of
    paths."""
    pieces: list[Piece] = []
    described: set[Item] = set()
    for path, prefix in paths.items():
        with open_file(path) as file:
            table = _open_table(path, file)
            columns, number = table.schema_arrow.names, 0
            if _image_column(table.schema_arrow) is None:
                if len(paths) > 1:
                    raise ValueError(f"{path} has no column of encoded images, only {', '.join(columns)}")
                items = _list_rows(path, table.read().to_pylist(), columns)
                return _survey(items, _chunks(items, rows))
            told = [column for wanted in (LABELS, ("split",)) if (column := column_of(columns, wanted)) is not None]
            for group in range(table.num_row_groups):
                count = table.metadata.row_group(group).num_rows
                if not count:
                    continue
                described |= {_describe(Item("", "", None, None, None), row)
                              for row in table.read_row_group(group, told).to_pylist()}  # fmt: skip
                pieces.append({"table": path, "group": group, "prefix": prefix, "first": number, "rows": count})
                number += count
    if not pieces:
        raise ValueError(f"{next(iter(paths))} holds no images")
    return _survey(list(described), pieces)


def _read_table(piece: Piece) -> Iterator[tuple[Item, bytes, str]]:
    """The images of a row group. They are called by their number, and by their path where the table has one."""
    numbers = iter(range(piece["first"], piece["first"] + piece["rows"]))

    def item(row: Mapping[str, Any], path: str = "") -> Item:
        name = f"{piece['prefix']}{next(numbers):09d}{'/' if path else ''}{path}"
        return _describe(Item(piece["table"], name, None, None, None), row)

    with open_file(piece["table"]) as file:
        table = _open_table(piece["table"], file)
        columns = table.schema_arrow.names
        image = _image_column(table.schema_arrow)
        path = column_of([column for column in columns if column != image], PATHS)
        about = (column_of(columns, kind) for kind in (LABELS, ("split",), GROUP_COLUMNS))
        wanted = sorted({name for name in (image, path, *about) if name is not None})
        problem = "the table is shorter than it says"
        try:
            for batch in table.iter_batches(16, [piece["group"]], wanted):
                for row in batch.to_pylist():
                    held = row.pop(image)
                    given = row.get(path)
                    if isinstance(held, dict):
                        held, given = held["bytes"], held.get("path") or given
                    yield item(row, str(given or "")), held or b"", "" if held else "the row holds no image"
        except (OSError, ValueError) as error:
            pass_on(error)
            problem = f"the table is damaged here: {error}"
        for _ in range(operator.length_hint(numbers)):
            yield item({}), b"", problem


def _open_table(path: str, file: IO[bytes]) -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (OSError, ValueError) as error:
        pass_on(error)
        raise ValueError(f"{path} is no whole Parquet file: {first_line(error)}") from error


def _image_column(schema: Any) -> str | None:
    """The column of encoded images, if any: bytes, or bytes and path in a struct, as Hugging Face keeps them."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    names = [field.name for field in schema if holds_bytes(field.type)]
    return column_of(names, IMAGES) or next(iter(names), None)
