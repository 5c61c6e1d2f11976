"""Do the maps show a shortcut? A marker that gives one class away is planted before the classifier is trained.

A folder of images is copied to `--work` with a small bright cross on a dark square near the upper right corner of every
train and val image of class `--marked`, and of every second test image of every class; `synthetic` has its own marker
(`--shortcut`). The pipeline then runs on the copy, with the options after `--`. Last, test images are shown with and
without the marker. Their maps, where they carry it and the classifier says `--marked`, should have their peak on it:

- `own class`: images of that class, which may have another reason too;
- `turned`: images of the others that only the marker has turned: it is the reason, for sure.

The tables go to CSV files beside this file; `path.png` (the marker comes and goes along the path) and `maps.png` to
`--work`.

python benchmarks/shortcut.py --dataset chest_xray --data-root DATA --work runs/shortcut -- --preset quick
python benchmarks/shortcut.py --dataset synthetic --work runs/shortcut-synthetic -- --preset quick
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from matplotlib.figure import Figure
from methods import methods, networks, read_counter_codes, runner_up
from PIL import Image
from record import append, here_and_now, program
from scipy.stats import binomtest
from torch import Tensor

from cae import data, figures, synthetic
from cae.classifiers import BlackBox
from cae.config import PRESETS
from cae.data import Item
from cae.explain import explain
from cae.images import UnreadableImage, decode, encode_png, to_array, to_tensor
from cae.metrics import energy_in_mask, pointing_game
from cae.networks import CAE
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
ACCURACY = Path(__file__).with_name("shortcut_classifier.csv")
FULL = Path(__file__).parents[1] / "pipelines" / "full.py"
DEFAULT = "CAE, integrated"  # the default mode, drawn in `path.png`


@dataclass(frozen=True)
class Options:
    """Where to plant the marker, and what to measure."""

    dataset: str
    """`synthetic`, another known data set or a folder of images, as for the pipeline."""
    work: str
    """Folder for the marked copy, its run and the pictures; what is there already is taken up."""
    data_root: str = ""
    """Folder that holds the known data sets."""
    marked: str = ""
    """Class that the marker gives away; empty: the last one, which it always is of `synthetic`."""
    size: int = 64
    """Height and width of the copy, and the pipeline's `--image-size`."""
    images: int = 100
    """Test images of each class, at most."""
    tolerance: int = 2
    """Pixels that a peak may lie beside the marker, to be on it; `peak_inside` allows none."""
    seed: int = 0
    """Seed of the markers' places, of the test images and of the pipeline."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A test image without and with the marker."""

    label: str
    plain: np.ndarray
    """uint8 (S, S, 3)"""
    marked: np.ndarray
    mask: np.ndarray
    """bool (S, S): where the marker lies."""


def stamp(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image (S, S, 3) with the marker, and where it lies, bool (S, S)."""
    size, unit = len(image), max(1, len(image) // 64)
    top, right = rng.integers(size // 32, size // 10, 2)
    square = np.s_[top : top + 7 * unit, size - right - 7 * unit : size - right]
    cross = np.zeros((7, 7), np.uint8)
    cross[1:6, 3] = cross[3, 1:6] = 255
    image, mask = image.copy(), np.zeros((size, size), bool)
    image[square] = cross.repeat(unit, 0).repeat(unit, 1)[..., None]
    mask[square] = True
    return image, mask


def listed(options: Options) -> list[Item]:
    """The labelled images of the data set, each with a split: where it has none, by its group or name."""
    items = data.list_images(data.locate(options.dataset, options.data_root or None))
    present = {item.split for item in items}
    return [replace(item, split=data.choose_split(item, present)) for item in items if item.label is not None]


def pair(item: Item, options: Options) -> tuple[Pair, bool]:
    """An image with and without its marker, and a coin; all of them the image's own. Raises UnreadableImage."""
    rng = np.random.default_rng([options.seed, *item.name.encode("utf-8", "surrogateescape")])
    with fsspec.open(item.path, "rb") as file:
        plain = decode(file.read(), options.size)
    return Pair(str(item.label), plain, *stamp(plain, rng)), bool(rng.random() < 0.5)


def plant(options: Options, folder: Path) -> None:
    """Write the marked copy as folder/SPLIT/CLASS/*.png, in one piece."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for item in listed(options):
        try:
            both, coin = pair(item, options)
        except UnreadableImage as error:
            print(f"left out: {item.name}: {error}")
            continue
        carries = coin if item.split == "test" else item.label == options.marked
        path = draft / str(item.split) / both.label / f"{item.name.replace('/', '_')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(both.marked if carries else both.plain).save(path)
    draft.rename(folder)


def of_folder(options: Options) -> list[Pair]:
    """Test images of each class, chosen by the seed."""
    test = [item for item in listed(options) if item.split == "test"]
    pairs: list[Pair] = []
    for name in sorted({str(item.label) for item in test}):
        mine = [item for item in test if item.label == name]
        found: list[Pair] = []
        for i in np.random.default_rng(options.seed).permutation(len(mine)):
            with contextlib.suppress(UnreadableImage):  # the copy left it out and said so
                found.append(pair(mine[i], options)[0])
            if len(found) == options.images:
                break
        pairs += found
    return pairs


def of_synthetic(options: Options, run: Run) -> list[Pair]:
    """Test images of each class of the run's generated data; other classes get the marker of the same individual."""
    of_run = run.state["options"]
    config = synthetic.Synthetic(of_run["images"], PRESETS[of_run["preset"]].model.image_size, of_run["classes"], True,
                                 of_run["seed"])  # fmt: skip
    test = [index for index in range(config.images) if synthetic.place(config, index)[1] == "test"]
    pairs = []
    for index in test[: options.images * config.classes]:  # classes alternate
        label, _ = synthetic.place(config, index)
        plain = synthetic.draw(replace(config, shortcut=False), index).image
        with_marker = synthetic.draw(config, index, config.classes - 1)
        mask = np.repeat(with_marker.shortcut_mask[..., None], 3, 2)
        marked = np.where(mask, with_marker.image, plain)
        images = [decode(encode_png(i), options.size) for i in (plain, marked, mask.astype(np.uint8) * 255)]
        pairs.append(Pair(config.class_names[label], images[0], images[1], images[2][..., 0] > 127))
    return pairs


def main(options: Options, rest: list[str]) -> None:
    """Plant, run the pipeline, measure, append to the tables, draw."""
    if any(
        word.replace("_", "-").startswith("--image-size") for word in rest
    ):  # images shown would be of another size than the run's
        sys.exit("error: --image-size after `--`: give the size as --size, before it")
    if options.marked and options.dataset == "synthetic":
        sys.exit(f"error: --marked {options.marked}: of `synthetic` it is the last class always, leave the option out")
    work = Path(options.work).absolute()
    where = ["--dataset", "synthetic", "--shortcut"]
    if options.dataset != "synthetic":
        classes = sorted({str(item.label) for item in listed(options)})
        options = replace(options, marked=options.marked or classes[-1])
        if options.marked not in classes:
            sys.exit(f"error: --marked {options.marked}: choose one of {', '.join(classes)}")
        if not (work / "data").exists():
            plant(options, work / "data")
        where = ["--dataset", str(work / "data")]
    command = [sys.executable, str(FULL), *where, "--run", str(work / "run"), "--image-size", str(options.size),
               "--seed", str(options.seed), "--stages", "shard", "classify", "train", "embed", *rest]  # fmt: skip
    if subprocess.run(command).returncode:
        sys.exit("error: the pipeline stopped, see above; the same command goes on from there")

    run = Run(str(work / "run"))
    blackbox, cae = networks(run)
    names = blackbox.classes
    pairs = of_synthetic(options, run) if options.dataset == "synthetic" else of_folder(options)
    shortcut = names.index(options.marked) if options.marked else len(names) - 1
    label = torch.tensor([names.index(one.label) for one in pairs])
    plain, marked = (to_tensor(np.stack([getattr(one, kind) for one in pairs])) for kind in ("plain", "marked"))
    mask = torch.from_numpy(np.stack([one.mask for one in pairs]))
    images = {"without": plain, "with": marked}
    says = {marker: blackbox.probabilities(x).argmax(1) for marker, x in images.items()}
    nearest = {marker: nearest_class(run, cae, x) for marker, x in images.items()}
    common = {**here_and_now(), "dataset": options.dataset,
              "marked": names[shortcut], "size": options.size, "seed": options.seed}  # fmt: skip
    accuracy = [
        common | {"marker": marker, "class": name, "images": int((label == i).sum()),
                  "accuracy": f"{share(predicted[label == i] == i):.3f}",
                  "says_marked": f"{share(predicted[label == i] == shortcut):.3f}",
                  "code_says_marked": f"{share(nearest[marker][label == i] == shortcut):.3f}"}
        for marker, predicted in says.items() for i, name in enumerate(names)
    ]  # fmt: skip
    append(ACCURACY, accuracy)
    show(accuracy)

    fooled = says["with"] == shortcut
    groups = {"own class": fooled & (label == shortcut), "turned": fooled & (label != shortcut)
              & (says["without"] != shortcut)}  # fmt: skip
    chosen = groups["own class"] | groups["turned"]
    x, source = marked[chosen], torch.full((int(chosen.sum()),), shortcut)
    target = blackbox.probabilities(x).argsort(dim=1, descending=True, stable=True)[:, 1]
    heat = {name: method(blackbox, x, source, target) for name, method in methods(run, cae).items()}
    rows = [
        common | {"group": group, "method": name} | of_maps(maps[members[chosen]], mask[members], options.tolerance)
        for group, members in groups.items() for name, maps in heat.items() if members.sum() > 1
    ]  # fmt: skip
    if not rows:
        sys.exit("the classifier follows the marker on no image: nothing to measure")
    append(TABLE, rows)
    show(rows)

    few = torch.cat([members[chosen].nonzero()[:4, 0] for members in groups.values()])
    captions = [f"{names[i]}, with the marker" for i in label[chosen][few].tolist()]
    drawn = {name: maps[few].numpy() for name, maps in heat.items()}
    save(figures.maps_by_method(to_array(x[few]), drawn, captions), work / "maps.png")
    save(strips(run, blackbox, cae, plain, marked, label, groups, shortcut), work / "path.png")


def nearest_class(run: Run, cae: CAE, x: Tensor) -> Tensor:
    """The class (B,) whose code, of the run's codes of the classes, is the nearest to the class codes of images."""
    counters = read_counter_codes(run)
    codes = torch.from_numpy(np.stack([code for _, code in counters.values()]))
    with torch.no_grad():
        return torch.tensor(list(counters))[torch.cdist(cae.encode(x)[0], codes).argmin(1)]


def share(hits: Tensor) -> float:
    """Of bool (N,), how many are true; NaN of none."""
    return float(hits.float().mean())


def of_maps(maps: Tensor, mask: Tensor, tolerance: int) -> dict[str, object]:
    """How many peaks lie on the marker or up to `tolerance` pixels beside it, with Wilson's 95% interval, which has a
    width where all do too; how many inside it; how much of the maps lies on it, and of the images."""
    hits = int(pointing_game(maps, mask, tolerance).sum())
    low, high = binomtest(hits, len(maps)).proportion_ci(method="wilson")
    return {"images": len(maps), "peak_on_marker": f"{hits / len(maps):.3f}",
            "low": f"{low:.3f}", "high": f"{high:.3f}", "peak_inside": f"{share(pointing_game(maps, mask)):.3f}",
            "energy": f"{float(energy_in_mask(maps, mask).mean()):.3f}",
            "area": f"{float(mask.float().mean()):.3f}"}  # fmt: skip


def strips(run: Run, blackbox: BlackBox, cae: CAE, plain: Tensor, marked: Tensor, label: Tensor,
           groups: dict[str, Tensor], shortcut: int) -> Figure:  # fmt: skip
    """The whole way from marked images to another class, and from plain ones of the others to the marked class."""
    going = torch.cat([members.nonzero()[:2, 0] for members in groups.values()])
    coming = (label != shortcut).nonzero()[:3, 0]
    x = torch.cat([marked[going], plain[coming]])
    p = blackbox.probabilities(x)
    source = p.argmax(1)
    target = torch.cat([runner_up(run, p[: len(going)]), torch.full((len(coming),), shortcut)])
    right = source != target  # a plain image that the classifier gives the marked class has no way to go
    x, source, target = x[right], source[right], target[right]
    counters = read_counter_codes(run)
    codes = torch.from_numpy(np.stack([counters[i][1] for i in target.tolist()]))
    # No frame is ahead by more than 1: so none ends the path.
    way = explain(cae, blackbox, x, source, target, codes, mode="contrast", margin=1.0)
    heat = methods(run, cae)[DEFAULT](blackbox, x, source, target)
    kind = ["with the marker"] * len(going) + ["without"] * len(coming)
    names = blackbox.classes
    captions = [f"{names[a]} → {names[b]},\n{k}" for a, b, k in
                zip(source.tolist(), target.tolist(), np.array(kind)[right.numpy()], strict=True)]  # fmt: skip
    frames = [to_array(frames) for frames in way.frames]
    return figures.path_strips(frames, list(way.frame_p.numpy()), to_array(x), heat.numpy(), captions)


def save(figure: Figure, path: Path) -> None:
    """Write a picture and say where."""
    figure.savefig(path, dpi=120)
    print(path)


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table without what all rows share."""
    columns = [name for name in rows[0] if len({row[name] for row in rows}) > 1 or name == "images"]
    widths = [max(len(str(row[name])) for row in [*rows, {name: name}]) for name in columns]
    for row in [{name: name for name in columns}, *rows]:
        print("  ".join(str(row[name]).ljust(width) for name, width in zip(columns, widths, strict=True)))
    print(flush=True)


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    program(Options, partial(main, rest=words[cut + 1 :]), __doc__, words[:cut])
