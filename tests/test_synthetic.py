from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cae.synthetic import CLASSES, Synthetic, draw, place


def grey(config: Synthetic, index: int, label: int | None = None) -> np.ndarray:
    """The image in grey values of [0, 1], (S, S)."""
    return draw(config, index, label).image[:, :, 0] / 255


def test_shapes_and_types() -> None:
    for size in (32, 64, 100):
        sample = draw(Synthetic(size=size), 1)
        assert sample.image.shape == (size, size, 3) and sample.image.dtype == np.uint8
        assert (sample.image == sample.image[:, :, :1]).all()
        assert sample.mask.shape == sample.shortcut_mask.shape == (size, size)
        assert sample.mask.dtype == sample.shortcut_mask.dtype == bool


def test_an_image_depends_on_its_index_and_seed_only() -> None:
    config = Synthetic(classes=4)
    forwards = {index: draw(config, index) for index in range(6)}
    for index in reversed(range(6)):
        again = draw(config, index)
        np.testing.assert_array_equal(again.image, forwards[index].image)
        np.testing.assert_array_equal(again.mask, forwards[index].mask)
    assert (draw(Synthetic(images=99), 0).image == draw(Synthetic(), 0).image).all()
    assert (draw(Synthetic(seed=1), 0).image != draw(Synthetic(), 0).image).any()
    assert (draw(config, 4).image != draw(config, 8).image).mean() > 0.5  # two individuals of one class


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_classes_are_balanced_in_every_split(classes: int) -> None:
    config = Synthetic(images=100 * classes, classes=classes)
    counts = Counter(place(config, index) for index in range(config.images))
    assert counts == {
        (label, split): count for label in range(classes) for split, count in (("train", 70), ("val", 15), ("test", 15))
    }
    assert config.class_names == CLASSES[:classes]


@pytest.mark.parametrize("images", [10, 11, 37])
def test_small_and_odd_numbers_fill_every_split(images: int) -> None:
    config = Synthetic(images=images)
    counts = Counter(place(config, index) for index in range(images))
    for split in ("train", "val", "test"):
        assert counts[0, split] >= 1 and abs(counts[0, split] - counts[1, split]) <= 1
    assert counts[1, "train"] >= 3 and sum(counts.values()) == images


@pytest.mark.parametrize("size", [32, 64, 128])
def test_mask_is_where_the_lesion_changes_the_image(size: int) -> None:
    config = Synthetic(classes=4, size=size)
    for index in range(24 if size < 128 else 6):
        assert not draw(config, index, 0).mask.any()
        for label in (1, 2, 3):
            mask = draw(config, index, label).mask
            change = grey(config, index, label) - grey(config, index, 0)
            # Nothing else differs, so the difference is the lesion, but for rounding (1/255) and clipping at white.
            assert change.min() > -1.5 / 255
            assert change[mask].sum() > 0.7 * change.sum()
            assert change[~mask].max(initial=0) < 0.25 * change.max() + 6 / 255
            assert 0.004 < mask.mean() < 0.1


def test_lesions_are_visible_and_lie_inside_the_lungs() -> None:
    config = Synthetic()
    strength, diameter, contrast = [], [], []
    for index in range(1, 121, 2):
        sample, without = draw(config, index), grey(config, index, 0)
        change = grey(config, index) - without
        strength.append(change.max())
        diameter.append(2 * np.sqrt(sample.mask.mean() / np.pi))
        rows, columns = np.nonzero(sample.mask)
        assert 1 < rows.mean() < 60 and 4 < columns.mean() < 60
        contrast.append(without[sample.mask].mean() - without[without > 0.1].mean())
    assert min(strength) > 0.35 and max(strength) < 0.65
    assert np.quantile(diameter, 0.05) > 0.15 and np.quantile(diameter, 0.95) < 0.38
    assert np.mean(np.array(contrast) < 0.05) > 0.9  # the lungs are the darker part of the body


def test_everything_but_the_lesion_is_alike_in_all_classes() -> None:
    # Images without their lesion: no statistic may tell the indices of one class from those of the other.
    config = Synthetic(images=2000, size=32)
    plain = np.stack([grey(config, index, 0) for index in range(600)])
    for statistic in (plain.mean((1, 2)), plain.std((1, 2)), plain.max((1, 2)), (plain > 0.9).mean((1, 2))):
        first, second = statistic[0::2], statistic[1::2]
        error = np.sqrt(first.var() / len(first) + second.var() / len(second))
        assert abs(first.mean() - second.mean()) < 4 * error


def test_shortcut_goes_with_the_last_class() -> None:
    config, plain = Synthetic(classes=3, shortcut=True), Synthetic(classes=3)
    for index in range(12):
        for label in range(3):
            sample, without = draw(config, index, label), draw(plain, index, label)
            assert not without.shortcut_mask.any()
            assert sample.shortcut_mask.any() == (label == 2)
            differs = (sample.image != without.image).any(axis=2)
            if label < 2:
                assert not differs.any()
                continue
            rows, columns = np.nonzero(sample.shortcut_mask)
            assert min(rows.min(), columns.min()) > 44 and 0.004 < sample.shortcut_mask.mean() < 0.03
            near = np.zeros_like(differs)
            near[rows.min() - 2 :, columns.min() - 2 :] = True
            assert differs[sample.shortcut_mask].mean() > 0.8 and not differs[~near].any()
            assert (sample.mask & ~near).sum() == (without.mask & ~near).sum()


def test_the_same_individual_at_every_size() -> None:
    for index in range(4):
        small = grey(Synthetic(classes=4), index)
        large = grey(Synthetic(classes=4, size=128), index).reshape(64, 2, 64, 2).mean((1, 3))
        assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.95


@pytest.mark.parametrize(
    ("options", "name"),
    [({"classes": 1}, "classes"), ({"classes": 5}, "classes"), ({"size": 31}, "size"), ({"images": 9}, "images"),
     ({"seed": -1}, "seed")],
)  # fmt: skip
def test_options_that_cannot_be_drawn(options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=rf"synthetic: {name} is .*; choose") as error:
        Synthetic(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_images_that_do_not_exist() -> None:
    config = Synthetic()
    for index, label in ((-1, None), (1200, None), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match=r"there are .* counted from 0"):
            draw(config, index, label)
