"""Which path, counter code, number of them, blur and mode make the best maps? AOPC over disjoint patches, on split val.

Of a finished run, on images that the classifier gets right: the defaults, and each of the choices that explain has
instead, one at a time, under every fill and by their mean, with the 95% intervals of the choice's values minus those of
the defaults, or of `--against` (paired, images of one patient or group drawn together); and any peer or control
that `--only` names. Defaults are chosen on val; test is for looking at what was chosen. The classifier answers in the
run's `--precision`, as everywhere. The table goes to a CSV beside this file.

python benchmarks/choices.py --run runs/chest_xray-quick
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from methods import groups_of, networks, runner_up
from record import append, here_and_now, program, say
from torch import Tensor

from cae import metrics
from cae.classifiers import BlackBox
from cae.explain import PAPER_MODES, choose_mode, explain, over_donors
from cae.images import blur, to_tensor
from cae.networks import CAE
from pipelines.bulk import read_images, read_table
from pipelines.command_line import parse
from pipelines.explain import ExplainOptions, path_options
from pipelines.maps import BATCH
from pipelines.measure import HEADLINE, SMOOTHED, methods, waypoints_of
from pipelines.run import Run
from pipelines.ways import read_ways

TABLE = Path(__file__).with_suffix(".csv")
DEFAULTS = "defaults"
CHOICES: Mapping[str, dict[str, Any]] = {
    DEFAULTS: {},
    "4 donors": {"donors": 4},
    "random donor": {"counter": "random"},
    "4 random donors": {"counter": "random", "donors": 4},
    "nearest donor": {"counter": "nearest"},
    "4 nearest donors": {"counter": "nearest", "donors": 4},
    "guided": {"path": "guided"},
    "8 steps": {"steps": 8},
    "margin 0.5": {"margin": 0.5},
    "not smoothed": {"smooth": 0.0},
    "smooth 0.025": {"smooth": 0.025},
    "smooth 0.1": {"smooth": 0.1},
    "not faded": {"fade": 0.0},
    "fade 0.1": {"fade": 0.1},
    "fade 0.3": {"fade": 0.3},
    "patch": {"mode": "patch"},
    "evidence": {"mode": "evidence"},
    **{mode: {"mode": mode, "smooth": 0.0} for mode in PAPER_MODES},  # as in the paper
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    run: str
    """Finished run folder."""
    only: tuple[str, ...] = tuple(CHOICES)
    """What to measure: choices, and peers and controls by their names in tables (`FullGrad`, `random`; `occlusion,
    smoothed` after the blur that the CAE's maps get)."""
    against: str = DEFAULTS
    """The one of these that intervals are of differences to."""
    split: Literal["val", "test"] = "val"
    """Split of the images."""
    images: int = 200
    """Images of the split, at most."""
    draws: int = 5
    """Random fills that AOPC under noise is averaged over."""
    seed: int = 0
    """Seed of the choice of images and of the noise."""


@torch.no_grad()
def maps_by(run: Run, options: ExplainOptions, cae: CAE, blackbox: BlackBox, ids: list[str], x: Tensor,
            source: Tensor, target: Tensor) -> tuple[Tensor, float]:  # fmt: skip
    """Maps (N, S, S) of images x (N, 3, S, S) as stage explain makes them, and the share that flipped."""
    ways, maps, flipped = read_ways(run, options), [], 0
    how = path_options(replace(options, mode=choose_mode(options.mode, blackbox.differentiable)))
    for rows in torch.arange(len(x)).split(BATCH):
        waypoints, counts = waypoints_of(ways, [ids[i] for i in rows], cae.encode(x[rows])[0], target[rows])
        each = rows.repeat_interleave(torch.tensor(counts))
        found = over_donors(explain(cae, blackbox, x[each], source[each], target[each], waypoints, **how), counts)
        maps.append(found.map)
        flipped += found.status.count("flipped")
    return torch.cat(maps), flipped / len(x)


def main(options: Options) -> None:
    """Measure every choice and append to the table."""
    if options.images < 2 or options.draws < 1 or not options.only:
        sys.exit("error: give --images 2 or more, --draws 1 or more, and names after --only")
    run = Run(options.run)
    base = parse(ExplainOptions, ["--run", options.run])
    blackbox, cae = networks(run, base.precision == "bfloat16")
    others = methods(blackbox, cae, {}, full=True, seed=options.seed)
    names = {*CHOICES, *others, *(name + SMOOTHED for name in others)}
    unknown = [name for name in (options.against, *options.only) if name not in names]
    if unknown:
        sys.exit(f"error: there is no {unknown[0]!r} to measure: choose among {'; '.join(sorted(names))}")
    table = read_table(run, "predictions", ["id", "split", "label", "predicted", "probabilities"]).to_pandas()
    right = table[(table.split == options.split) & (table.label == table.predicted)]
    chosen = right.sample(min(options.images, len(right)), random_state=options.seed)
    groups = groups_of(run, chosen.id)
    x = to_tensor(read_images(run, chosen.id.to_numpy(), base.model.image_size, base.fit))
    p = torch.from_numpy(np.stack(chosen.probabilities.to_list()))
    source, target = p.argmax(1), runner_up(run, p)
    steps = metrics.disjoint_steps(base.model.image_size, HEADLINE)
    rows: list[dict[str, Any]] = []
    first: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}  # maps of others as they are, for the smoothed ones too
    for name in dict.fromkeys((options.against, *options.only)):
        if name in CHOICES:
            how = replace(base, **CHOICES[name])
            heat, flipped = maps_by(run, how, cae, blackbox, chosen.id.to_list(), x, source, target)
        else:
            plain, flipped = name.removesuffix(SMOOTHED), math.nan
            if plain not in known:
                there = torch.empty(0)  # they do not walk
                known[plain] = torch.cat([others[plain](x[i], source[i], target[i], there, [])
                                          for i in torch.arange(len(x)).split(BATCH)])  # fmt: skip
            heat = blur(known[plain], base.smooth) if name != plain else known[plain]
        by_fill = {
            fill: metrics.perturbation_curve(
                blackbox, x, heat, source, steps=steps, fill=fill, seed=options.seed,
                draws=options.draws if fill == "uniform" else 1,
            ).mean(1)
            for fill in get_args(metrics.Fill)
        }  # fmt: skip
        by_fill["mean"] = torch.stack(list(by_fill.values())).mean(0)
        first = first or by_fill
        apart = {fill: metrics.paired_bootstrap(value, first[fill], groups=groups) for fill, value in by_fill.items()}
        rows.append({
            **here_and_now(), "run": Path(options.run).name,
            "images": len(x), "split": options.split, "choice": name, "flipped": f"{flipped:.3f}",
            **{fill: f"{float(value.mean()):.3f}" for fill, value in by_fill.items()}, "against": options.against,
            **{f"{fill}_{end}": f"{limit:.3f}" for fill, (_, *limits) in apart.items()
               for end, limit in zip(("low", "high"), limits, strict=True)},
        })  # fmt: skip
        say(rows[-1])
    append(TABLE, rows)


if __name__ == "__main__":
    program(Options, main, __doc__)
