from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cae.data import (
    DATASETS,
    Item,
    check_classes,
    choose_split,
    list_images,
    locate,
    read_npz,
)


def plant(root: Path, *names: str) -> str:
    """Files called `names` under `root`; what they hold doesn't matter to a listing."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return str(root)


def labelled(count: int, label: str | None = "a", split: str | None = None, group: str | None = None) -> list[Item]:
    return [Item(f"/x/{label}/{k}.png", f"{label}/{k}.png", split, label, group) for k in range(count)]


def assign_splits(items: list[Item]) -> list[Item]:
    """Items that are a whole archive, each with its split."""
    present = {item.split for item in items}
    return [replace(item, split=choose_split(item, present)) for item in items]


def message(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def test_known_datasets_describe_themselves() -> None:
    assert {"oct", "brain_tumor1", "brain_tumor2", "chest_xray", "face", "pneumoniamnist", "brain_tumor"} == set(
        DATASETS
    )
    for name, dataset in DATASETS.items():
        assert dataset.name == name and len(dataset.classes) >= 2 and dataset.page.startswith("https://")
        assert len(dataset.layout.split()) > 3 and dataset.licence


def test_locate_known_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAE_DATA", raising=False)
    plant(tmp_path, "given/face/train/male/1.jpg", "env/face/1.jpg", "data/face/1.jpg", "env/pneumoniamnist/x.txt")
    monkeypatch.chdir(tmp_path)
    assert locate("face") == "data/face"
    monkeypatch.setenv("CAE_DATA", str(tmp_path / "env"))
    assert locate("face") == f"{tmp_path}/env/face"
    assert locate("face", f"{tmp_path}/given/") == f"{tmp_path}/given/face"
    assert locate("pneumoniamnist") == f"{tmp_path}/env/pneumoniamnist"
    plant(tmp_path, "env/pneumoniamnist/pneumoniamnist.npz")
    assert locate("pneumoniamnist") == f"{tmp_path}/env/pneumoniamnist/pneumoniamnist.npz"
    assert locate("synthetic") == "synthetic"


def test_locate_paths(tmp_path: Path) -> None:
    root = plant(tmp_path, "images/1.png")
    assert locate(root) == root
    assert locate(f"{root}/images/1.png") == f"{root}/images/1.png"


@pytest.mark.parametrize("name", DATASETS)
def test_locate_missing_says_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()  # an empty folder is as good as none
    with pytest.raises(ValueError) as error:
        locate(name, str(tmp_path))
    text = message(error)
    known = DATASETS[name]
    for part in (name, str(tmp_path), known.page, known.licence, known.layout, "--data-root"):
        assert part in text


def test_locate_unknown_names_the_known() -> None:
    with pytest.raises(ValueError) as error:
        locate("chest_xrya\n")
    assert all(name in message(error) for name in [*DATASETS, "synthetic"])
    with pytest.raises(ValueError) as error:
        locate("nosuchkind://bucket/images")
    assert "nosuchkind" in message(error)


def test_list_split_class(tmp_path: Path) -> None:
    root = plant(
        tmp_path, "Train/cat/1.png", "Train/dog/deep/er/2.png", "valid/cat/3.png", "VALIDATION/dog/4.png",
        "test/cat/5.png", "extra/6.png", "7.png", "test/8.png",
    )  # fmt: skip
    found = {item.name: (item.split, item.label) for item in list_images(root)}
    assert found == {
        "Train/cat/1.png": ("train", "cat"), "Train/dog/deep/er/2.png": ("train", "dog"),
        "valid/cat/3.png": ("val", "cat"), "VALIDATION/dog/4.png": ("val", "dog"), "test/cat/5.png": ("test", "cat"),
        "extra/6.png": (None, None), "7.png": (None, None), "test/8.png": ("test", None),
    }  # fmt: skip


def test_list_class_and_flat(tmp_path: Path) -> None:
    root = plant(tmp_path / "classes", "b/2.png", "a/deep/1.png", "a/10.png", "loose.png")
    assert [(item.name, item.split, item.label) for item in list_images(root)] == [
        ("a/10.png", None, "a"), ("a/deep/1.png", None, "a"), ("b/2.png", None, "b"), ("loose.png", None, None),
    ]  # fmt: skip
    root = plant(tmp_path / "flat", "2.png", "1.png", "test")  # a file called as a split is no split
    assert [(item.name, item.split, item.label) for item in list_images(f"{root}/")] == [
        ("1.png", None, None), ("2.png", None, None), ("test", None, None),
    ]  # fmt: skip


def test_list_leaves_out_only_what_is_plainly_no_image(tmp_path: Path) -> None:
    left_out = ("README.txt", "a/readme", "a/x.CSV", "a/x.json", "notes.md", "LICENSE", "a/Thumbs.db", "desktop.ini",
                ".hidden.png", "a/.DS_Store", ".git/x.png", "manifest.csv")  # fmt: skip
    kept = ("a/license_plate.jpg", "a/notes.txt", "a/photo.png", "a/readme-figure.png", "a/scan.dcm")
    root = plant(tmp_path, *left_out, *kept)
    items = list_images(root)
    assert tuple(item.name for item in items) == kept
    assert all(Path(item.path).read_bytes() == b"x" and item.path.startswith("/") for item in items)


def test_list_works_on_other_file_systems() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/archive/train/a/1.png": b"1", "/archive/train/b/2.png": b"2"})
    items = list_images("memory://archive")
    assert [(item.name, item.split, item.label) for item in items] == [
        ("train/a/1.png", "train", "a"), ("train/b/2.png", "train", "b"),
    ]  # fmt: skip
    with fsspec.open(items[1].path, "rb") as file:
        assert file.read() == b"2"


@pytest.mark.parametrize("column", ["patient", "group", "patient_id", "GroupID", "Patient ID", "subject-id"])
def test_manifest_gives_groups(tmp_path: Path, column: str) -> None:
    root = plant(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    (tmp_path / "manifest.csv").write_text(f"\ufefffile,{column}\na/1.png,p1\na\\2.png,p1\nb/3.png,\n", "utf-8")
    assert [item.group for item in list_images(root)] == ["p1", "p1", None]


def test_manifest_mistakes(tmp_path: Path) -> None:
    root = plant(tmp_path, "a/1.png")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("file,class\na/1.png,a\n")
    assert list_images(root)[0].group is None
    for content in (
        b"file,patient\nelsewhere/1.png,p1\n",
        b"name,patient\na/1.png,p1\n",
        b"file,patient\na/1.png,\xff",
        b"file,patient\na/1.png," + b"x" * 200_000,
    ):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.csv .*(relative|UTF-8|no CSV)") as error:
            list_images(root)
        message(error)


def test_list_nothing(tmp_path: Path) -> None:
    plant(tmp_path, "README.md", "file.png")
    (tmp_path / "empty").mkdir()
    for path, reason in ((tmp_path / "empty", "no images"), (tmp_path / "file.png", "no folder")):
        with pytest.raises(ValueError, match=reason) as error:
            list_images(str(path))
        assert str(path) in message(error)
    with pytest.raises(ValueError, match="no folder"):
        list_images(str(tmp_path / "nowhere"))


def test_splits_hold_the_hash_to_its_definition() -> None:
    items = labelled(3000)
    got = assign_splits(items)
    for before, after in zip(items, got, strict=True):
        percent = int(hashlib.sha256(before.name.encode()).hexdigest()[:16], 16) / 16**16
        assert after.split == ("train" if percent < 0.7 else "val" if percent < 0.85 else "test")
        assert (after.path, after.name, after.label, after.group) == (before.path, before.name, before.label, None)
    shares = Counter(item.split for item in got)
    assert shares["train"] == pytest.approx(2100, abs=90) and shares["val"] == pytest.approx(450, abs=70)
    # Fixed values: another machine or version must agree.
    assert [item.split for item in got[:8]] == ["train", "train", "train", "val", "test", "train", "val", "train"]


def test_splits_keep_groups_whole_and_ignore_order_and_growth() -> None:
    items = [Item("/x", f"{k}.png", None, "ab"[k % 2], f"patient {k % 97}") for k in range(1000)]
    got = assign_splits(items)
    by_group: dict[str | None, set[str | None]] = {}
    for item in got:
        by_group.setdefault(item.group, set()).add(item.split)
    assert all(len(splits) == 1 for splits in by_group.values())
    assert {item.split for item in got} == {"train", "val", "test"}
    assert assign_splits(items[::-1]) == got[::-1]
    assert assign_splits(items[:500]) == got[:500]


def test_splits_take_val_from_train_only_when_missing() -> None:
    items = [Item("/x", f"{k}.png", "train", "a", f"p{k // 3}") for k in range(3000)] + labelled(50, split="test")
    got = assign_splits(items)
    assert Counter(item.split for item in got)["val"] == pytest.approx(300, abs=60)
    assert sum(item.split == "test" for item in got) == 50
    groups = {split: {item.group for item in got if item.split == split} for split in ("train", "val")}
    assert groups["train"].isdisjoint(groups["val"])
    complete = labelled(20, split="train") + labelled(5, split="val")
    assert assign_splits(complete) == complete
    only_test = labelled(5, split="test")
    assert assign_splits(only_test) == only_test


def test_splits_call_the_rest_archive() -> None:
    assert {item.split for item in assign_splits(labelled(9, label=None))} == {"archive"}
    mixed = assign_splits(labelled(9, split="train") + labelled(2, label=None) + labelled(2, label="b"))
    assert [item.split for item in mixed[-4:]] == ["archive"] * 4
    assert assign_splits([]) == []
    assert assign_splits([Item("/x", "\udcff.png", None, "a", None)])[0].split is not None  # an undecodable file name


def counted(items: list[Item]) -> Counter[tuple[str | None, str | None]]:
    return Counter((item.split, item.label) for item in items)


def test_check_classes() -> None:
    fine = labelled(3, "b", "train") + labelled(3, "a", "train") + labelled(4, None, "archive")
    assert check_classes(counted(fine)) == ["a", "b"]
    mistakes = {
        "no images": [],
        "--classifier": labelled(5, None, "archive"),
        "only one class, 'a'": labelled(5, "a", "train"),
        "class 'b' has 2 images in train": labelled(5, "a", "train") + labelled(2, "b", "train"),
        "class 'c' has 0 images in train": fine + labelled(5, "c", "test"),
    }
    for reason, items in mistakes.items():
        with pytest.raises(ValueError) as error:
            check_classes(counted(items))
        assert reason in message(error)


def save_npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def test_npz_grey_and_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 5, 4), np.uint8)
    colour = rng.integers(0, 256, (2, 5, 4, 3), np.uint8)
    arrays = {
        "train_images": grey, "train_labels": np.array([[0], [1], [2]]),
        "test_images": colour, "test_labels": np.array([1, 0], np.uint8),
    }  # fmt: skip
    path = save_npz(tmp_path / "mine.npz", **arrays)
    items, images = zip(*read_npz(path), strict=True)
    assert [(item.name, item.split, item.label, item.group) for item in items] == [
        ("train/000000", "train", "0", None), ("train/000001", "train", "1", None),
        ("train/000002", "train", "2", None), ("test/000000", "test", "1", None), ("test/000001", "test", "0", None),
    ]  # fmt: skip
    for k in range(3):
        assert images[k].shape == (5, 4, 3) and (images[k] == grey[k][:, :, None]).all()
    np.testing.assert_array_equal(np.stack(images[3:]), colour)
    assert all(image.dtype == np.uint8 and image.flags.writeable for image in images)
    known = save_npz(tmp_path / "pneumoniamnist_64.npz", **arrays)
    assert [item.label for item, _ in read_npz(known)] == ["normal", "pneumonia", "2", "pneumonia", "normal"]


IMAGES, LABELS = np.zeros((2, 4, 4), np.uint8), np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": IMAGES}, "has no train_images"),
        ({"train_images": IMAGES, "train_labels": np.array([{"a": 1}, None], object)}, "pickles are never loaded"),
        ({"train_images": np.array([{"a": 1}, None], object), "train_labels": LABELS}, "save uint8"),
        ({"train_images": IMAGES.astype(np.float32), "train_labels": LABELS}, "save uint8"),
        ({"train_images": np.zeros((2, 4, 4, 4), np.uint8), "train_labels": LABELS}, "save uint8"),
        ({"train_images": np.asfortranarray(np.zeros((2, 4, 5), np.uint8)), "train_labels": LABELS}, "Fortran"),
        ({"train_images": np.zeros((1, 10_001, 10_000), np.uint8)}, "more than 100,000,000 pixels"),
        ({"train_images": IMAGES, "train_labels": np.array([0.0, 1.0])}, "one integer per image"),
        ({"train_images": IMAGES, "train_labels": np.array([[0, 1], [1, 0]])}, "one integer per image"),
        ({"train_images": IMAGES, "train_labels": np.array(1)}, "one integer per image"),
        ({"train_images": IMAGES, "train_labels": np.array([0, 1, 1])}, "make them match"),
    ],
)
def test_npz_mistakes(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    path = save_npz(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=reason) as error:
        list(read_npz(path))
    assert path in message(error)


def test_npz_without_labels_or_with_damage(tmp_path: Path) -> None:
    (one, image), (two, _) = read_npz(save_npz(tmp_path / "a.npz", test_images=IMAGES))
    assert one.label is two.label is None and one.split == "test" and image.shape == (4, 4, 3)
    path = Path(
        save_npz(tmp_path / "b.npz", test_images=np.random.default_rng(0).integers(0, 256, (9, 9, 9), np.uint8))
    )
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 255
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged") as error:
        list(read_npz(str(path)))
    assert str(path) in message(error)


def test_npz_that_is_none(tmp_path: Path) -> None:
    whole = Path(save_npz(tmp_path / "whole.npz", train_images=IMAGES, train_labels=LABELS)).read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match="is no whole") as error:
            list(read_npz(str(tmp_path / "bad.npz")))
        message(error)
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("train_images.npy", b"no array at all")
    with pytest.raises(ValueError, match=r"bad\.npz: train_images is no array") as error:
        list(read_npz(str(tmp_path / "bad.npz")))
    message(error)
