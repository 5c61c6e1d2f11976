"""Do the maps lie where the truth is? On generated radiographs, whose lesions are known to the pixel.

The CAE in each mode, every peer, and each peer after the blur that the CAE's maps get, on newly drawn images with a
lesion that the classifier gets right: the share of maps whose peak lies on the lesion (pointing game) and the area
under the ROC curve of the pixels, with the 95% intervals of the default's values minus the method's, paired over
images. `evaluate --tables full` measures this too, on the run's test images, which are too few to tell the best methods
apart. The table goes to a CSV beside this file.

python benchmarks/known_truth.py --run runs/synthetic-quick
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from methods import methods, networks, runner_up
from record import append, here_and_now, program, say
from torch import Tensor

from cae import metrics
from cae.classifiers import BlackBox
from cae.config import PRESETS
from cae.images import blur, decode, encode_png, to_tensor
from cae.synthetic import Synthetic, draw, place
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
    """Run folder on `synthetic` images with the stages up to embed, such as that of `make demo`."""
    lesions: int = 400
    """Images with a lesion to draw."""
    only: tuple[str, ...] = ()
    """Methods to measure beside the default, by their names in the table, with or without `, smoothed`: a peer is
    measured as it is and smoothed. Without any, all of them."""


def lesions(run: Run, blackbox: BlackBox, size: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Newly drawn images (N, 3, S, S) with a lesion that the classifier gets right, of `count`; where the lesion lies,
    bool (N, S, S); the classifier's probabilities (N, C)."""
    of_run = run.state["options"]
    if of_run["dataset"] != "synthetic":
        sys.exit(f"error: {run.folder} is on {of_run['dataset']}: give a run on `synthetic`, whose truth is known")
    if count < 2:
        sys.exit(f"error: --lesions {count}: give 2 or more, for intervals")
    classes = of_run["classes"]
    config = Synthetic(5 * classes + count * 2, PRESETS[of_run["preset"]].model.image_size, classes, False,
                       of_run["seed"] + 1)  # fmt: skip
    images, masks, labels = [], [], []
    for index in (i for i in range(config.images) if place(config, i)[0] and len(labels) < count):
        sample = draw(config, index)
        mask = decode(encode_png(np.repeat(sample.mask[..., None] * np.uint8(255), 3, 2)), size)
        images.append(decode(encode_png(sample.image), size))
        masks.append(mask[..., 0] > 127)
        labels.append(sample.label)
    x, known = to_tensor(np.stack(images)), torch.from_numpy(np.stack(masks))
    p = torch.cat([blackbox.probabilities(some) for some in x.split(BATCH)])
    fine = (p.argmax(1) == torch.tensor(labels)) & known.flatten(1).any(1)
    if fine.sum() < 2:
        sys.exit(f"error: of {count} lesions the classifier gets {int(fine.sum())} right: give more --lesions")
    return x[fine], known[fine], p[fine]


def main(options: Options) -> None:
    """Measure and append to the table."""
    run = Run(options.run)
    base = parse(ExplainOptions, ["--run", options.run])
    blackbox, cae = networks(run, base.precision == "bfloat16")
    found = methods(run, cae)
    only = [name.removesuffix(SMOOTHED) for name in options.only]
    unknown = [name for name in only if name not in found]
    if unknown:
        sys.exit(f"error: there is no {unknown[0]!r} to measure: choose among {'; '.join(found)}")
    x, masks, p = lesions(run, blackbox, base.model.image_size, options.lesions)
    source, target = p.argmax(1), runner_up(run, p)
    rows: list[dict[str, object]] = []
    default: dict[str, Tensor] = {}
    for name in dict.fromkeys((DEFAULT, *(only or found))):
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
    program(Options, main, __doc__)
