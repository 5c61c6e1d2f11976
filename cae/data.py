"""Datasets: what the known ones are, where the images lie, which split and class each belongs to.

Nothing here decodes an image file. A listing holds every file that could be meant as an image, so that a later stage
can reject the ones that are none with a reason, and no file vanishes silently.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs


@dataclass(frozen=True)
class Dataset:
    """A dataset known by name."""

    name: str
    """What `--dataset` calls it, and the folder under the data root."""
    classes: tuple[str, ...]
    """Class names, in the order of their numbers."""
    page: str
    """Web page it comes from."""
    licence: str
    """Licence as its page states it."""
    layout: str
    """Where to put the files inside its folder."""


@dataclass(frozen=True, slots=True)  # an archive may have millions
class Item:
    """One image of an archive, not yet read."""

    path: str
    """Absolute path or fsspec URL of the file that holds it."""
    name: str
    """Path relative to the archive, with forward slashes: what a person recognises."""
    split: str | None
    """`train`, `val`, `test`, `archive` (explained only), or None: not assigned yet."""
    label: str | None
    """Class name, None when unknown."""
    group: str | None
    """Items of one group (a patient, say) never straddle splits."""
    span: tuple[int, ...] = ()
    """Where it lies in that file, as `cae.sources` has it; empty: it is the whole file."""
    problem: str = ""
    """Why it cannot be read, where that is known already."""
    version: str = field(default="", compare=False)
    """Of a file in a folder, or one on disk that a list names: see `version_of`. Else ""."""


KERMANY = "https://data.mendeley.com/datasets/rscbjbr9sj"
UNKNOWN = "whatever licence that page states"

# The first five are the paper's (Section IV-A, references 71 to 74).
DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "oct", ("CNV", "DME", "DRUSEN", "NORMAL"), KERMANY, "CC BY 4.0",
            "train/CLASS/ and test/CLASS/ with CLASS one of CNV, DME, DRUSEN, NORMAL, as in the archive",
        ),
        Dataset(
            "brain_tumor1", ("no", "yes"), "https://www.kaggle.com/datasets/ahmedhamada0/brain-tumor-detection",
            UNKNOWN, "no/ and yes/, as in the archive; leave its folder pred/ out",
        ),
        Dataset(
            "brain_tumor2", ("normal", "tumor"),
            "https://www.cancerimagingarchive.net/analysis-result/rsna-asnr-miccai-brats-2021/",
            "CC BY 4.0 with TCIA's data usage policy",
            "slices as PNG in normal/ and tumor/, and manifest.csv with the columns file and patient",
        ),
        Dataset(
            "chest_xray", ("NORMAL", "PNEUMONIA"), KERMANY, "CC BY 4.0",
            "train/CLASS/ and test/CLASS/ with CLASS one of NORMAL, PNEUMONIA, as in the archive",
        ),
        Dataset(
            "face", ("female", "male"), "https://www.kaggle.com/datasets/cashutosh/gender-classification-dataset",
            UNKNOWN, "the page's Training/ as train/ and its Validation/ as test/, each with female/ and male/",
        ),
        Dataset(
            "brain_tumor", ("glioma", "meningioma", "pituitary"),
            "https://figshare.com/articles/dataset/brain_tumor_dataset/1512427", "CC BY 4.0",
            "slices as PNG in glioma/, meningioma/, pituitary/, and manifest.csv with the columns file and patient",
        ),
        Dataset(
            "pneumoniamnist", ("normal", "pneumonia"), "https://medmnist.com", "CC BY 4.0",
            "the file pneumoniamnist.npz, as it is",
        ),
    )
}  # fmt: skip

SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
NOT_IMAGES = {"thumbs.db", "desktop.ini"} | {
    name + kind for name in ("readme", "license", "licence") for kind in ("", ".txt", ".rst", ".html", ".pdf")
}
NOT_IMAGE_ENDINGS = (".csv", ".json", ".md")
MAX_PIXELS = 100_000_000  # of an image; larger ones are taken for decompression bombs
GROUP_COLUMNS = ("patient", "group", "patient_id", "group_id", "subject", "subject_id")
MANIFEST = "manifest.csv"
MIN_TRAIN = 3


def locate(dataset: str, data_root: str | None = None) -> str:
    """Path or URL of a dataset: a known name under `data_root`, else $CAE_DATA, else ./data; or an existing path.

    A known name is `<root>/<name>/<name>.npz` or the folder `<root>/<name>/`. `synthetic` needs no files and comes
    back as it is. Raises ValueError, in one line, for any other word, and when a known name has no files: then it says
    what to download and where to put it.
    """
    if dataset == "synthetic":
        return dataset
    if dataset not in DATASETS:
        fs, path = filesystem(dataset)
        if fs.exists(path):
            return dataset
        names = ", ".join(sorted([*DATASETS, "synthetic"]))
        raise ValueError(f"{dataset!r} is no path that exists and no known dataset; known are {names}")
    known = DATASETS[dataset]
    root = data_root or os.environ.get("CAE_DATA") or "data"
    folder = f"{root.rstrip('/')}/{dataset}"
    fs, path = filesystem(folder)
    if fs.isfile(f"{path}/{dataset}.npz"):
        return f"{folder}/{dataset}.npz"
    if fs.isdir(path) and fs.ls(path):
        return folder
    raise ValueError(
        f"{dataset}: nothing in {folder}/; download it from {known.page} ({known.licence}) and put there: "
        f"{known.layout}; or name another root with --data-root or $CAE_DATA"
    )


@dataclass(frozen=True)
class Layout:
    """What names say: `SPLIT/CLASS/...` where a first folder is called as a split is (train, val, valid, validation,
    test, in any case), else `CLASS/...`, else flat. Names that fit neither carry no label.
    """

    by_split: bool = False
    """Whether first folders are splits."""
    inside: str = ""
    """The folder that all names lie in, with its slash: it says nothing."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Name to group, from a manifest."""

    def item(self, path: str, name: str, span: tuple[int, ...] = (), problem: str = "") -> Item:
        """The image called `name` in the file `path`."""
        parts = [part for part in name.removeprefix(self.inside).split("/") if part not in ("", ".", "..")]
        folders, split = parts[:-1], None
        if self.by_split:
            split = SPLITS.get(folders[0].lower()) if folders else None
            folders = folders[1:] if split else []
        return Item(path, name, split, text(folders[0]) if folders else None, self.groups.get(name), span, problem)


def layout_of(names: Sequence[str], manifest: bytes | None = None, where: str = "", inside: str = "") -> Layout:
    """The layout of the files called `names`, with groups from a `manifest.csv`, whose path `where` errors name.

    Raises ValueError, in one line, when the manifest names none of the files.
    """
    below = [name.removeprefix(inside) for name in names]
    by_split = any("/" in name and name.split("/")[0].lower() in SPLITS for name in below)
    groups = {} if manifest is None else _groups(manifest, where, below)
    return Layout(by_split, inside, {inside + name: group for name, group in groups.items()})


def list_images(root: str) -> list[Item]:
    """Every file of a folder that could be meant as an image, sorted by name.

    Splits and classes as `Layout` has them. Groups come from a `manifest.csv` in the root with a column `file` and one
    of GROUP_COLUMNS. Raises ValueError, in one line, when the folder is none or empty, or when its manifest names none
    of its files.
    """
    fs, base = filesystem(root)
    if not fs.isdir(base):
        raise ValueError(f"{root} is no folder; give a folder of images")
    base = base.rstrip("/")
    versions = {path[len(base) + 1 :]: version_of(info) for path, info in fs.find(base, detail=True).items()}
    names = sorted(filter(may_be_image, versions))
    if not names:
        raise ValueError(f"{root} holds no images; expected SPLIT/CLASS/*, CLASS/* or a flat folder of image files")
    manifest = f"{base}/{MANIFEST}"
    layout = layout_of(names, fs.cat_file(manifest) if fs.isfile(manifest) else None, manifest)
    local = "file" in fs.protocol
    items = []
    for name in names:
        path = f"{base}/{name}"
        item = layout.item(path if local else fs.unstrip_protocol(path), name)
        items.append(dataclasses.replace(item, version=versions[name]))
    return items


def choose_split(item: Item, present: Collection[str | None], label_free: bool = False) -> str:
    """The split of an item, when those of the whole archive have the splits `present`.

    The one that it has, unless a validation split must be taken from train. Without any split: about 70/15/15 train,
    val, test. With train but no val: about 10% of train's groups become val. The group (or, without one, the name)
    decides through a hash, so groups stay whole, every machine agrees, and an archive that grows moves no image.
    Unlabelled items without a split (unless `label_free`, for a classifier that needs no labels), and any left without
    a split beside others that have one, become `archive`.
    """
    position = _position(item.name if item.group is None else item.group)
    if item.split == "train" and "val" not in present:
        return "train" if position < 0.9 else "val"
    if item.split is not None:
        return item.split
    if (item.label is None and not label_free) or set(present) != {None}:
        return "archive"
    return "train" if position < 0.7 else "val" if position < 0.85 else "test"


def check_classes(counts: Mapping[tuple[str | None, str | None], int]) -> list[str]:
    """The class names, sorted, once it is sure that they can be trained on; `counts` is (split, class) -> images.

    Raises ValueError, in one line, unless there are two classes or more with MIN_TRAIN images or more each in train.
    """
    total = sum(counts.values())
    if not total:
        raise ValueError("no images: give a folder with images in CLASS/* or SPLIT/CLASS/*")
    classes = sorted({label for _, label in counts if label is not None})
    if not classes:
        raise ValueError(
            f"none of the {total} images has a label, and training needs them: sort the images into one folder "
            "per class, or give a trained classifier with --classifier to label them"
        )
    if len(classes) == 1:
        raise ValueError(
            f"only one class, {classes[0]!r}, with {total} images, and training needs two: give the folder whose "
            "subfolders are the classes, or a trained classifier with --classifier"
        )
    for name in classes:
        held = counts.get(("train", name), 0)
        if held < MIN_TRAIN:
            raise ValueError(
                f"class {name!r} has {held} images in train and needs {MIN_TRAIN}: add images to it, or take "
                "its folders out"
            )
    return classes


def read_npz(path: str) -> Iterator[tuple[Item, np.ndarray]]:
    """Images of an `.npz` in MedMNIST's layout, one by one, as uint8 arrays (H, W, 3); grey becomes three channels.

    Keys are `{train,val,test}_images`, uint8 (N, H, W) or (N, H, W, 3), and `_labels`, integers (N,) or (N, 1); a
    split may be absent, and so may labels. Classes are called as in DATASETS when the file's name starts with a known
    one, else "0", "1", ... The images stream from the file, and nothing pickled is ever loaded. Raises ValueError in
    one line.
    """
    fs, inner = filesystem(path)
    stem = PurePosixPath(inner).stem.split("_")[0]
    classes = DATASETS[stem].classes if stem in DATASETS else ()
    with fs.open(inner, "rb") as file:
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ValueError(
                f"{path} is no whole .npz archive; download it again, or write it with numpy.savez"
            ) from error
        keys = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        splits = [split for split in ("train", "val", "test") if f"{split}_images" in keys]
        if not splits:
            raise ValueError(f"{path} has no train_images, val_images or test_images; name its arrays as MedMNIST does")
        for split in splits:
            try:
                labels = _npz_labels(archive, path, f"{split}_labels") if f"{split}_labels" in keys else None
                for index, image in enumerate(_npz_images(archive, path, f"{split}_images", labels)):
                    label = None
                    if labels is not None:
                        number = int(labels[index])
                        label = classes[number] if 0 <= number < len(classes) else str(number)
                    yield Item(path, f"{split}/{index:06d}", split, label, None), image
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{path} is damaged ({error}); download or save it again") from error


def _npz_labels(archive: zipfile.ZipFile, path: str, key: str) -> np.ndarray:
    """The labels (N,) under `key`."""
    with archive.open(f"{key}.npy") as member:
        try:
            labels = np.lib.format.read_array(member, allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"{path}: {key} is no plain array (pickles are never loaded); save integers") from error
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or labels.size != labels.shape[0]:
        raise ValueError(f"{path}: {key} is {labels.dtype} {labels.shape}; one integer per image is needed")
    return labels.reshape(-1)


def _npz_images(archive: zipfile.ZipFile, path: str, key: str, labels: np.ndarray | None) -> Iterator[np.ndarray]:
    """The images under `key`, one by one, uint8 (H, W, 3); if there are labels, there must be as many."""
    with archive.open(f"{key}.npy") as member:
        try:
            version, of = np.lib.format.read_magic(member), np.lib.format
            read_header = of.read_array_header_1_0 if version == (1, 0) else of.read_array_header_2_0
            shape, fortran, dtype = read_header(member)
        except ValueError as error:
            raise ValueError(f"{path}: {key} is no array ({first_line(error)}); save the file again") from error
        if np.prod(shape[1:3], dtype=object) > MAX_PIXELS:
            raise ValueError(f"{path}: {key} has images of more than {MAX_PIXELS:,} pixels")
        if dtype != np.uint8 or fortran or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"{path}: {key} is {dtype} {shape}{order}; save uint8 (N, H, W) or (N, H, W, 3), C order")
        if labels is not None and shape[0] != len(labels):
            raise ValueError(
                f"{path}: {key} holds {shape[0]} images but there are {len(labels)} labels; make them match"
            )
        size = int(np.prod(shape[1:]))
        for _ in range(shape[0]):
            pixels = member.read(size)
            if len(pixels) < size:
                raise ValueError(f"{path}: {key} is cut short; download or save the file again")
            image = np.frombuffer(pixels, np.uint8).reshape(shape[1:])
            yield image.copy() if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path inside it; ValueError when the URL's kind isn't supported."""
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} can't be opened: {first_line(error)}") from error


def version_of(info: Mapping[str, Any]) -> str:
    """What tells that a file's content is another, of what a file system says of it: an object store's ETag, or the
    size. Not the time: a copy is as good."""
    return str(info.get("ETag") or info.get("size"))


def may_be_image(name: str) -> bool:
    """Whether a file, named relative to the archive, is neither hidden nor plainly something else."""
    parts = name.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    name = parts[-1].lower()
    return not hidden and name not in NOT_IMAGES and not name.endswith(NOT_IMAGE_ENDINGS)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind, if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def text(name: str) -> str:
    """A file name as Parquet takes it: bytes that are no UTF-8 become question marks."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def column_of(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that there is, however it is written: patient_id is PatientID and Patient Id."""

    def plain(name: str) -> str:
        return re.sub(r"[\s_-]", "", name).lower()

    found = {plain(name): name for name in names}
    return next((found[plain(name)] for name in wanted if plain(name) in found), None)


def _groups(manifest: bytes, where: str, names: list[str]) -> dict[str, str]:
    """File name to group, from a manifest; empty when it has no group column."""
    try:
        text = manifest.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no UTF-8 text; save it as CSV in UTF-8") from error
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        column, file = (column_of(rows.fieldnames or (), wanted) for wanted in (GROUP_COLUMNS, ("file",)))
        if column is None:
            return {}
        groups = {
            row[file].replace("\\", "/"): row[column] for row in rows if file is not None and row[file] and row[column]
        }
    except csv.Error as error:
        raise ValueError(f"{where} is no CSV with a header ({error}); save it again") from error
    # A manifest that doesn't match would otherwise let patients straddle splits unnoticed.
    if groups.keys().isdisjoint(names):
        raise ValueError(f"{where} names no file of its folder; give paths relative to it in a column called file")
    return groups


def _position(key: str) -> float:
    """A fixed position in [0, 1) for a word, the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
