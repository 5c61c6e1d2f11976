"""Do the maps lie where the truth is? On generated radiographs, whose lesions are known to the pixel.

The CAE in each mode, every peer, and each peer after the blur that the CAE's maps get, on images of split test that
have a lesion and that the classifier gets right: the share of maps whose peak lies on the lesion (pointing game) and
the area under the ROC curve of the pixels, with the 95% intervals of the default's values minus the method's, paired
over images. `evaluate --tables full` measures this too, beside everything else; this is for enough lesions to tell
methods apart. The table goes to a CSV beside this file.

python pipelines/full.py --dataset synthetic --images 4000 --preset quick --stages shard classify train embed
python benchmarks/known_truth.py --run runs/synthetic-quick
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
import tyro
from methods import methods, networks
from record import append, here_and_now, say
from torch import Tensor

from cae import metrics
from cae.images import blur, load, to_tensor
from pipelines.bulk import decode_all, read_table, read_unit, shard_units
from pipelines.command_line import parse
from pipelines.explain import ExplainOptions
from pipelines.maps import BATCH
from pipelines.measure import SMOOTHED
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
DEFAULT = "CAE, integrated"
MEASURES = {"pointing": metrics.pointing_game, "auroc": metrics.pixel_auroc}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    run: str
    """Run folder on `synthetic` images with the stages up to embed."""
    images: int = 400
    """Lesions, at most."""
    only: tuple[str, ...] = ()
    """Methods to measure beside the default, by their names in the table (`RISE` stands for the smoothed ones too);
    without any, all of them."""


def lesions(run: Run, size: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, S, S) of split test with a lesion that the classifier gets right, where that lies, bool (N, S, S),
    and the classes that the classifier finds likeliest, in their order (N, C)."""
    table = read_table(run, "predictions", ["id", "label", "predicted", "probabilities"])
    right = table.filter(pc.equal(table["label"], table["predicted"]))
    says = dict(zip(right["id"].to_pylist(), right["probabilities"].to_pylist(), strict=True))
    images: list[bytes] = []
    masks: list[np.ndarray] = []
    p: list[list[float]] = []
    for unit in shard_units(run, ("test",)):
        for row in read_unit(run, unit, ["id", "image", "mask"]).to_pylist():
            if row["mask"] is None or row["id"] not in says:
                continue
            mask = np.asarray(load(row["mask"]).resize((size, size)))[..., 0] > 127
            if mask.any() and len(images) < most:
                images.append(row["image"])
                masks.append(mask)
                p.append(says[row["id"]])
    if not images:
        sys.exit(f"error: {run.folder} has no test images with a known lesion: give a run on `synthetic`")
    x = to_tensor(decode_all(images, size, "crop")[0])
    return x, torch.from_numpy(np.stack(masks)), torch.tensor(p).argsort(dim=1, descending=True, stable=True)


def main(options: Options) -> None:
    """Measure and append to the table."""
    run = Run(options.run)
    base = parse(ExplainOptions, ["--run", options.run])
    blackbox, cae = networks(run, base.precision == "bfloat16")
    found = methods(run, cae)
    unknown = [name for name in options.only if name not in found]
    if unknown:
        sys.exit(f"error: there is no {unknown[0]!r} to measure: choose among {', '.join(found)}")
    x, masks, order = lesions(run, base.model.image_size, options.images)
    source, target = order[:, 0], order[:, 1]
    rows: list[dict[str, object]] = []
    default: dict[str, Tensor] = {}
    for name in dict.fromkeys((DEFAULT, *(options.only or found))):
        begun = time.process_time()
        chunks = torch.arange(len(x)).split(BATCH)
        plain = torch.cat([found[name](blackbox, x[i], source[i], target[i]) for i in chunks])
        seconds = (time.process_time() - begun) / len(x)
        forms = {name: plain} if name.startswith("CAE") else {name: plain, name + SMOOTHED: blur(plain, base.smooth)}
        for form, heat in forms.items():
            row: dict[str, object] = {**here_and_now(), "run": Path(options.run).name, "lesions": len(x),
                                      "method": form, "cpu_seconds": f"{seconds:.3f}"}  # fmt: skip
            for measure, function in MEASURES.items():
                values = function(heat, masks).double()
                _, low, high = metrics.paired_bootstrap(default.setdefault(measure, values), values)
                row |= {measure: f"{float(values.mean()):.3f}", f"{measure}_low": f"{low:.3f}",
                        f"{measure}_high": f"{high:.3f}"}  # fmt: skip
            rows.append(row)
            say(row)
    append(TABLE, rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
