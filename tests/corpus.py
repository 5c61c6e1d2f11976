"""Files and archives as they come from the world: good, odd and broken, each with what is to become of it."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian
from test_dicom import VALUES, dicom
from test_images import COLOUR, CORPUS, encoded, grey, header_png, photo

FORMATS = ("jpeg", "jpeg, progressive", "jpeg, cmyk", "png", "png, 16 bits", "webp", "tiff", "tiff, lzw", "bmp", "gif")


def brightness(x: Any) -> Any:
    """The classifier of these tests: logits (B, 2) of images (B, 3, H, W), dark and bright."""
    mean = x.mean((1, 2, 3))
    return (mean[:, None] * mean.new_tensor([-9.0, 9.0])) + mean.new_tensor([4.0, -4.0])


def good() -> dict[str, tuple[bytes, int]]:
    """Name -> content and how many pictures are in it."""
    found = {f"{name}.{name.split(',')[0]}": (content, 1) for name, (content, _, _) in CORPUS.items()}
    png, jpeg = photo("PNG"), photo("JPEG", quality=90)
    for size in ((1, 1), (1, 10_000), (10_000, 1), (3, 5)):
        found[f"{size[0]} x {size[1]}.png"] = encoded(Image.new("RGB", size, (9, 99, 200)), "PNG"), 1
    exif = Image.Exif()
    exif[0x0112] = 6
    found["upright.jpg"] = photo("JPEG", exif=exif), 1
    found["no orientation.jpg"] = photo("JPEG", exif=b"Exif\0\0" + b"\xff" * 40), 1
    found["colour profile.jpg"] = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", icc_profile=b"\7" * 999), 1
    found["jpeg called.png"] = jpeg, 1
    found["png called.txt"] = png, 1
    found["called nothing"] = png, 1
    found["more behind it.png"] = png + b"\0" * 1000, 1
    for transparency in ("LA", "RGBA"):
        found[f"{transparency}.png"] = encoded(Image.fromarray(COLOUR).convert(transparency), "PNG"), 1
    found["lab.tiff"] = encoded(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), 1
    found["pages.tiff"] = photo("TIFF", save_all=True, append_images=[Image.fromarray(COLOUR)]), 1
    found["scan.dcm"] = dicom(VALUES, WindowCenter=40, WindowWidth=400), 1
    found["negative.dcm"] = dicom(VALUES, PhotometricInterpretation="MONOCHROME1"), 1
    found["colour.dcm"] = dicom(COLOUR), 1
    found["old.dcm"] = dicom(VALUES, preamble=False, ImageType=["ORIGINAL"], SpecificCharacterSet="ISO_IR 100"), 1
    found["frames.dcm"] = dicom(np.stack([VALUES, VALUES // 2, VALUES // 3])), 3
    for name in ("two\nlines.png", "r\u00f6ntgen.png", "\u80ba" * 60 + ".png", "no utf-8 \udcff\udcfe.png", " .png",
                 "semi;colon 'quote\" %41.png", "a" * 200 + ".png"):  # fmt: skip
        found[name] = png, 1
    found["deep/" * 20 + "x.png"] = png, 1
    found["same/x.png"] = found["again/x.png"] = png, 1
    return found


def bad() -> dict[str, tuple[bytes, str]]:
    """Name -> content that is no picture, and a part of the reason that is to be given, in small letters."""
    found: dict[str, tuple[bytes, str]] = {}
    for name in FORMATS:
        content = CORPUS[name][0]
        for share in (0.02, 0.3, 0.6, 0.8):
            found[f"cut/{name} at {share}"] = content[: int(len(content) * share)], ""
        found[f"zeros/{name}"] = bytes(len(content)), "no known image format"
        found[f"headless/{name}"] = bytes(32) + content[32:], ""
    rng = np.random.default_rng(0)
    for name, content in {
        "empty.png": b"", "a byte.png": b"\x89", "text.png": b"no picture\n" * 20, "page.jpg": b"<!doctype html><p>404",
        "vector.png": b"<svg/>", "paper.png": b"%PDF-1.7\n%\xff\xff", "data.png": b"{}",
        "program.png": b"\x7fELF" + bytes(200), "inner.zip": zipped({"x.png": b""}),
        "archive.png": gzip.compress(b"x"),
        "post.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "noise.png": rng.bytes(3000),
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "layers.psd": b"8BPS\0\1" + bytes(40),
        "icon.ico": encoded(Image.fromarray(COLOUR).resize((16, 16)), "ICO"),
    }.items():  # fmt: skip
        found[f"other/{name}"] = content, "no known image format"

    large = struct.pack
    found |= {f"bomb/{name}": (content, "pixels") for name, content in {
        "square.png": header_png(50_000, 50_000), "wide.png": header_png(2_000_000_000, 1),
        "just.png": header_png(10_000, 10_001),
        "screen.gif": b"GIF89a" + large("<HH", 65_535, 65_535) + photo("GIF")[10:],
        "map.bmp": photo("BMP")[:18] + large("<ii", 60_000, 60_000) + photo("BMP")[26:],
        "photo.jpg": sized_jpeg(65_000, 65_000), "any.ppm": b"P6 100000 100000 255\n" + bytes(99),
        "scan.dcm": dicom(VALUES, Rows=65_535, Columns=65_535),
    }.items()}  # fmt: skip
    found["bomb/words.png"] = with_text(photo("PNG"), 100 << 20), "too large"
    found["bomb/deflated.dcm"] = dicom(VALUES, syntax=DeflatedExplicitVRLittleEndian), "deflated dicom"
    found["size/none.png"] = header_png(0, 5), ""
    found["size/negative.bmp"] = photo("BMP")[:18] + large("<ii", -5, 5) + photo("BMP")[26:], ""
    for name, value in {"nan": np.nan, "infinite": np.inf}.items():
        values = np.ones((9, 9), np.float32)
        values[3, 4] = value
        found[f"values/{name}.tiff"] = encoded(Image.fromarray(values), "TIFF"), "not finite"
    flipped = bytearray(photo("PNG"))
    flipped[70] ^= 255
    found["flipped.png"] = bytes(flipped), ""

    scan = dicom(VALUES, WindowCenter=40, WindowWidth=400)
    for share in (0.3, 0.6, 0.9):
        found[f"dicom/cut at {share}.dcm"] = scan[: int(len(scan) * share)], ""
    wrong: dict[str, dict[str, Any]] = {
        "no rows": {"Rows": 0}, "odd bits": {"BitsAllocated": 12}, "no window": {"WindowWidth": 0},
        "unknown": {"PhotometricInterpretation": "MAGIC"}, "too many": {"NumberOfFrames": 10**6},
    }  # fmt: skip
    for name, tags in wrong.items():
        found[f"dicom/{name}.dcm"] = dicom(VALUES, **({"WindowCenter": 40, "WindowWidth": 400} | tags)), ""
    found["dicom/mark alone.dcm"] = bytes(128) + b"DICM", "dicom without pixels"
    found["dicom/noise.dcm"] = bytes(128) + b"DICM" + rng.bytes(500), ""
    return found


def odd() -> dict[str, bytes]:
    """Files that some readers take and others do not: a picture, or a reason."""
    found = {}
    rng = np.random.default_rng(1)
    for name in FORMATS:
        for k in range(2):
            content = bytearray(CORPUS[name][0])
            for place in rng.integers(len(content) // 3, len(content), 8):
                content[place] ^= 1 << int(rng.integers(8))
            found[f"flips/{name} {k}"] = bytes(content)
    return found


def sized_jpeg(width: int, height: int) -> bytes:
    content = grey("JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def with_text(png: bytes, size: int) -> bytes:
    """A PNG with a comment that unpacks to `size` bytes."""
    data = b"Comment\0\0" + zlib.compress(bytes(size), 1)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    return png[:33] + chunk + png[33:]


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in files.items():
            archive.writestr(name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        kinds = {"soft.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "device.png": tarfile.CHRTYPE}
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("x.png")
        member.size = len(photo("PNG"))
        archive.addfile(member, io.BytesIO(photo("PNG")))
    return buffer.getvalue()


def locked() -> bytes:
    """A zip archive whose second member is encrypted."""
    content = bytearray(zipped({"x.png": photo("PNG"), "secret.png": photo("PNG")}))
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def damaged(content: bytes, place: int) -> bytes:
    return content[:place] + b"\xff\xff\xff\xff" + content[place + 4 :]


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def table(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def arrays(**values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **values)  # type: ignore[arg-type]
    return buffer.getvalue()


def archives(root: Path) -> dict[str, tuple[bytes, dict[str, str]]]:
    """File name -> content, and for every image that is to be found in it "" or a part of why there is none."""
    png = photo("PNG")
    three = {"a.png": png, "b.png": png, "c.png": png}
    (root / "near.png").write_bytes(png)
    whole_tar = tarred(three)
    block = whole_tar.index(b"b.png")
    make: dict[str, tuple[bytes, dict[str, str]]] = {
        "climbs.zip": (zipped({"../../up.png": png, "x.png": png}), {"../../up.png": "", "x.png": ""}),
        "climbs.tar": (tarred({"../../up.png": png, "x.png": png}), {"../../up.png": "", "x.png": ""}),
        "absolute.zip": (zipped({"/etc/x.png": png}), {"/etc/x.png": ""}),
        "absolute.tar.gz": (tarred({"/etc/x.png": png}, "w:gz"), {"/etc/x.png": ""}),
        "backslash.zip": (zipped({"..\\x.png": png}), {"../x.png": ""}),
        "locked.zip": (locked(), {"x.png": "", "secret.png": "encrypted"}),
        "nested.zip": (zipped({"in.zip": zipped(three), "x.png": png}), {"in.zip": "no known", "x.png": ""}),
        "nested.tar": (tarred({"in.tar": whole_tar, "x.png": png}), {"in.tar": "no known", "x.png": ""}),
        "packed.zip": (zipped({"x.png": png}, zipfile.ZIP_LZMA), {"x.png": "packed by method"}),
        "links.tar": (linked(), {"soft.png": "a link", "hard.png": "a link", "device.png": "a device", "x.png": ""}),
        "pixels.zip": (damaged(zipped(three, zipfile.ZIP_STORED), 80), {"a.png": "damaged", "b.png": "", "c.png": ""}),
        "head.tar": (damaged(whole_tar, block), {"a.png": "", "head.tar": "damaged"}),
        "cut.tar": (whole_tar[: block + 600], {"a.png": "", "b.png": "cut short", "cut.tar": "damaged"}),
        "cut.tar.gz": (halved(tarred(three, "w:gz")), {"cut.tar.gz": "damaged"}),
        "list.csv": (b"path,label\nnear.png,a\nfar.png,\n,b\nnear.png,a\n",
                     {"near.png": "", "far.png": "cannot be read", "row 3": "no path", "near.png (2)": ""}),
        "odd.csv": (f"url\nnowhere://x.png\n{root}\nnear.png\n".encode(),
                    {"nowhere://x.png": "", f"{root}": "cannot be read", "near.png": ""}),
        "gaps.parquet": (table(image=[png, None, b"", b"no"]),
                         {f"{k:09d}": why for k, why in enumerate(("", "no image", "no image", "no known"))}),
        "list.parquet": (table(path=["near.png", "far.png"]), {"near.png": "", "far.png": "cannot be read"}),
        "arrays.npz": (arrays(train_images=np.zeros((3, 8, 8), np.uint8), train_labels=np.zeros(3, np.uint8)), {}),
    }  # fmt: skip
    make["odd.csv"][1]["nowhere://x.png"] = "nowhere"
    return make


def refused() -> dict[str, bytes]:
    """Archives that are none, or hold nothing: file name -> content."""
    three = {f"{name}.png": photo("PNG") for name in "abc"}
    return {
        "empty.zip": zipped({}), "nothing.zip": b"", "text.zip": b"no archive" * 9, "cut.zip": zipped(three)[:-30],
        "papers.zip": zipped({"readme.md": b"x"}), "empty.tar": tarred({}), "nothing.tar": b"", "text.tar": b"x" * 2000,
        "packed.tar": tarred(three, "w:gz"), "unpacked.tar.gz": b"no archive" * 99, "text.csv": b"\xff\xfe\0x",
        "other.csv": b"picture\nx.png\n", "empty.csv": b"path\n", "cut.parquet": table(image=[b"x"])[:-9],
        "other.parquet": table(x=[1, 2]), "text.parquet": b"no table", "empty.parquet": table(image=[])[:0],
        "objects.npz": arrays(train_images=np.array([{}, {}], object)), "other.npz": arrays(x=np.zeros(3)),
        "cut.npz": arrays(train_images=np.zeros((9, 8, 8), np.uint8))[:-50], "text.npz": b"no arrays",
    }  # fmt: skip
