"""Do the maps follow the classifier? How alike a run's maps are to those of other classifiers.

Against the maps of a finished run, on the same images towards the same classes:

- `other image`: the run's own map of another image, what any two maps share by lying in the middle;
- `random weights`: the run's CAE, a classifier with its weights drawn anew;
- `permuted labels`: a classifier trained on shuffled labels, and a CAE trained on its predictions;
- `permuted labels, truth`: the same classifier with a CAE trained on the data's labels (`--labels truth`).

The last two are runs of their own under `--work`, made by the pipeline with the options after `--`; they are taken up
where they were.

python benchmarks/randomisation.py --run runs/chest_xray-quick --work runs/permuted -- --preset quick
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from methods import alikeness, examples, methods, networks
from PIL import Image
from record import append, here_and_now, program, say

from cae.sanity import cascade
from pipelines.bulk import read_images, read_table
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
FULL = Path(__file__).parents[1] / "pipelines" / "full.py"
MAPS = "CAE, integrated"  # the default mode


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Finished run folder."""
    work: str = ""
    """Folder for the permuted data set and its runs; empty: random weights only."""
    images: int = 100
    """Images of the split val."""
    seed: int = 0
    """Seed of the shuffle, of the weights and of the choice of images."""


def permuted_data(run: Run, folder: Path, seed: int) -> None:
    """The run's train and val images as PNG files in class folders, those of train with their labels shuffled."""
    size, names = run.state["options"]["model"]["image_size"], run.result("classify")["classes"]
    table = read_table(run, "predictions", ["id", "split", "label"]).to_pandas()
    rng, draft = np.random.default_rng(seed), folder.with_name(f"{folder.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    for split in ("train", "val"):
        part = table[table.split == split]
        labels = rng.permutation(part.label.to_numpy()) if split == "train" else part.label.to_numpy()
        images = read_images(run, part.id.to_numpy(), size, run.state["options"]["fit"])
        for name, label, image in zip(part.id, labels, images, strict=True):
            path = draft / split / names[int(label)] / f"{name.replace('/', '_')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    draft.rename(folder)  # whole, or not there


def main(options: Options, rest: list[str]) -> None:
    """Measure and append to the table."""
    run = Run(options.run)
    blackbox, cae = networks(run)
    *given, groups = examples(run, blackbox, options.images, options.seed)
    original = methods(run, cae)[MAPS](blackbox, *given)
    *_, (_, random) = cascade(blackbox, options.seed)
    others = {"other image": original.roll(1, 0), "random weights": methods(run, cae)[MAPS](random, *given)}
    if options.work:
        work = Path(options.work).absolute()
        if not (work / "data").exists():
            permuted_data(run, work / "data", options.seed)
        own = str(work / "permuted labels" / "classifier")
        for name, more in {
            "permuted labels": [],
            "permuted labels, truth": ["--classifier", own, "--labels", "truth"],
        }.items():
            stages = ["shard", "classify", "train", "embed"]
            folders = ["--dataset", str(work / "data"), "--run", str(work / name)]
            command = [sys.executable, str(FULL), *folders, "--stages", *stages, *more, *rest]
            subprocess.run(command, check=True)
            retrained = Run(str(work / name))
            blackbox, cae = networks(retrained)
            others[name] = methods(retrained, cae)[MAPS](blackbox, *given)
    rows = []
    for name, heat in others.items():
        rows.append({
            **here_and_now(), "run": Path(options.run).name,
            "maps": name, **alikeness(original, heat, groups),
        })  # fmt: skip
        say(rows[-1])
    append(TABLE, rows)


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    program(Options, partial(main, rest=words[cut + 1 :]), __doc__, words[:cut])
