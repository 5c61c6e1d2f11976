"""Zip and tar archives, never unpacked: what is in them in which order, and single files out of them."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import IO, Any

from cae.data import filesystem

MAX_BYTES = 1 << 29  # of one encoded image
NOT_ITS_FAULT = (ConnectionError, TimeoutError)  # of a file: it is to be read again
# Neither are these: a store that is too busy or at fault, a network that is down, a key that is out of date.
AWAY = {getattr(errno, name, None) for name in
        ("EBUSY", "EREMOTEIO", "ESTALE", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH")} - {None}  # fmt: skip
REFUSALS = {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch", "RequestTimeTooSkewed"}
TAR_NOTES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
             tarfile.SOLARIS_XHDTYPE)  # fmt: skip
MAX_NOTE = 1 << 20  # of names and the like before a member of a tar archive
DAMAGED = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, RecursionError)


def of_web(error: BaseException | None) -> bool:
    """Whether an error is aiohttp's, which fsspec reads URLs by."""
    return type(error).__module__.startswith("aiohttp")


def pass_on(error: Exception) -> None:
    """Raise ConnectionError or TimeoutError for what is no fault of a file: a row that says it cannot be read would be
    there for good, and of an archive all that follows would be missing."""
    if isinstance(error, NOT_ITS_FAULT):
        raise error
    answer = getattr(error.__cause__, "response", None) or {}  # botocore's, behind what s3fs makes of it
    if of_web(error) or getattr(error, "errno", None) in AWAY or answer.get("Error", {}).get("Code") in REFUSALS:
        raise ConnectionError(str(error) or type(error).__name__) from error


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    span: tuple[int, ...]
    """Where it lies, as `read_span` takes it; empty in an archive that can only be read from its start."""
    problem: str
    """Why it cannot be read, where that is known already."""
    content: Callable[[], bytes]
    """Reads it, at once. Raises one of DAMAGED."""


def open_file(path: str) -> IO[bytes]:
    """A path or URL, to be read anywhere. Raises OSError; ValueError or ImportError for a URL of no known kind."""
    if "://" not in path:  # whatever is in a file's name
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
            raise OSError("it is no file")
        return open(path, "rb")
    fs, inner = filesystem(path)
    return fs.open(inner, "rb")


def read_span(file: IO[bytes], span: Sequence[int] = ()) -> bytes:
    """A whole file; or what lies at a span of an archive: offset and size in a tar, offset and more in a zip.

    Raises ValueError or zlib.error where that is damaged, or too large for an image.
    """
    _refuse_huge(max(span[1:3], default=0))
    if not span:
        content = file.read(MAX_BYTES + 1)
        _refuse_huge(len(content))
        return content
    file.seek(span[0])
    if len(span) > 2:
        return _unzip(file, *span[1:])
    content = file.read(span[1])
    if len(content) < span[1]:
        raise ValueError("the archive is cut short here")
    return content


def _refuse_huge(size: int) -> None:
    if size > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MB are no image that can be used")


def _tidy(name: str) -> str:
    """A member's name with forward slashes. What climbs out of the archive stays visible, and is never followed."""
    return name.replace("\\", "/").removeprefix("./")


def _unfit(path: str, what: str, error: Exception) -> str:
    if "range requests" in str(error):  # fsspec's
        return f"the server of {path} gives whole files only, and this archive is read in parts: download it first"
    return f"{path} is {what} ({error}): download or make it again"


def zip_members(path: str) -> Iterator[Member]:
    """The files of a zip archive, in its own order. Raises ValueError, in one line, for a file that is none."""
    with open_file(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, struct.error, OverflowError, NotImplementedError, ValueError) as error:
            raise ValueError(_unfit(path, "no whole .zip archive", error)) from error
        for info in archive.infolist():
            if info.is_dir():
                continue
            problem = ""
            if info.flag_bits & 1:
                problem = "encrypted: unpack the archive with its password"
            elif stat.S_ISLNK(info.external_attr >> 16):
                problem = "a link, which is not followed"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                problem = f"packed by method {info.compress_type}: only stored and deflated files are read"
            span = (info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
            yield Member(_tidy(info.filename), span, problem, partial(read_span, file, span))


def _unzip(file: IO[bytes], packed: int, size: int, method: int, checksum: int) -> bytes:
    """The member of a zip archive whose local header the file stands at. Raises ValueError or zlib.error.

    By hand, because `zipfile` would read the list of all members again in every process and for every piece.
    """
    head = file.read(30)
    if head[:4] != b"PK\x03\x04" or len(head) < 30:
        raise ValueError("the archive is damaged here")
    file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)  # name and extra field
    content = file.read(packed)
    if method == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    if len(content) != size or zlib.crc32(content) != checksum:
        raise ValueError("the archive is damaged here: its checksum does not fit")
    return content


class _Header(tarfile.TarInfo):
    """Tells the archive why no file follows, since `tarfile` takes a damaged header for the end."""

    @classmethod
    def frombuf(cls, *given: Any) -> _Header:
        header = super().frombuf(*given)
        if header.type in TAR_NOTES and header.size > MAX_NOTE:  # which tarfile would read whole
            raise tarfile.InvalidHeaderError(f"{header.size:,} bytes of notes")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Header:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended = error
            raise


def tar_members(path: str, streamed: bool = False) -> Iterator[Member]:
    """The files of a tar archive in their order; a damaged one ends with a member that says so.

    `streamed`: read from start to end without going back, as a compressed one must be; contents are then to be asked
    for one after the other. Raises ValueError, in one line, for a file that is no tar archive.
    """
    with ExitStack() as files:
        file = files.enter_context(open_file(path))
        try:
            mode: Any = "r|" if streamed else "r:"
            plain = _unpacked(file) if streamed else file
            tar: Any = files.enter_context(tarfile.open(fileobj=plain, mode=mode, tarinfo=_Header))
        except DAMAGED as error:
            pass_on(error)
            raise ValueError(_unfit(path, "no tar archive", error)) from error
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else it keeps them all
                if not member.isdir():
                    problem = "" if member.isreg() and not member.issparse() else _what(member)
                    span = () if streamed else (member.offset_data, member.size)
                    yield Member(_tidy(member.name), span, problem, partial(_extract, tar, member))
            whole = isinstance(tar.ended, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
            damage = "" if whole else str(tar.ended)
        except DAMAGED as error:
            pass_on(error)
            damage = str(error)
        if damage:
            yield Member(
                os.path.basename(path), (), f"the archive is damaged behind its last file here: {damage}", bytes
            )


def _unpacked(file: IO[bytes]) -> Any:
    """What a compressed file unpacks to, a little at a time; tarfile itself unpacks ten kilobytes at once, which may be
    seventy megabytes of zeros."""
    begins = file.read(6)
    file.seek(0)
    opens: dict[bytes, Callable[[IO[bytes]], Any]] = {
        b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open,
    }  # fmt: skip
    for magic, unpack in opens.items():
        if begins.startswith(magic):
            return SimpleNamespace(read=unpack(file).read1)  # which gives what is before a damage
    return file


def _what(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname}, which is not followed"
    return "a device, a pipe or a file with holes"


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _refuse_huge(member.size)
    file = tar.extractfile(member)
    return b"" if file is None else file.read()
