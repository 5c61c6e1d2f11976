"""Do the maps follow the classifier? Its weights are drawn anew from the output on, a stage of the network at a time.

For the CAE in each mode (not trained again) and every peer: how alike its maps are to the run's own on the same images,
towards the same classes, by rank correlation and structural similarity, means over the images of split val; and how
alike maps of *different* images are, what any two maps of the method share. The table goes to a CSV beside this file,
and what this call measured to a picture.

python benchmarks/cascade.py --run runs/chest_xray-quick
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from methods import Method, alikeness, examples, methods, networks
from record import append, here_and_now, program
from torch import Tensor

from cae.classifiers import BlackBox
from cae.figures import COLOURS
from cae.sanity import cascade
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
OFTEN = 40  # queries for one map, from which on a method is measured on a few images
OTHER = "other image"


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Finished run folder."""
    images: int = 64
    """Images of the split val."""
    few: int = 12
    """Of them, those for methods that ask the classifier more than 40 times for a map (integrated gradients, occlusion,
    LIME, RISE): with all 64 they would take an hour."""
    only: tuple[str, ...] = ()
    """Methods to measure, by their names in the table; without any, all of them, and a picture."""
    seed: int = 0
    """Seed of the weights and of the choice of images."""


def queries(method: Method, blackbox: BlackBox, *example: Tensor) -> int:
    """Images that the classifier is shown for one map."""
    shown: list[int] = []
    hook = blackbox.register_forward_hook(lambda _, given, __: shown.append(len(given[0])))
    try:
        method(blackbox, *example)
    finally:
        hook.remove()
    return sum(shown)


def main(options: Options) -> None:
    """Measure, append to the table, draw."""
    run = Run(options.run)
    blackbox, cae = networks(run)
    x, source, target, groups = examples(run, blackbox, options.images, options.seed)
    found = methods(run, cae)
    unknown = [name for name in options.only if name not in found]
    if unknown:
        raise SystemExit(f"error: --only {unknown[0]!r}: choose among {', '.join(found)}")
    found = {name: found[name] for name in options.only or found}
    asked = {name: queries(method, blackbox, x[:1], source[:1], target[:1]) for name, method in found.items()}

    def maps(name: str, classifier: BlackBox) -> Tensor:
        few = options.few if asked[name] > OFTEN else len(x)
        return found[name](classifier, x[:few], source[:few], target[:few])

    begun = time.time()
    rows: list[dict[str, object]] = []
    common = {**here_and_now(), "run": Path(options.run).name, "seed": options.seed}
    original = {name: maps(name, blackbox) for name in found}

    def compare(level: str, others: dict[str, Tensor]) -> None:
        new = [common | {"method": name, "queries": asked[name], "drawn_anew_down_to": level}
               | alikeness(heat, others[name], groups[: len(heat)]) for name, heat in original.items()]  # fmt: skip
        append(TABLE, new)
        rows.extend(new)
        print(f"{level}  {time.time() - begun:.0f} s", flush=True)

    compare(OTHER, {name: heat.roll(1, 0) for name, heat in original.items()})
    for stage, random in cascade(blackbox, options.seed):
        compare(stage, {name: maps(name, random) for name in found})
    if not options.only:
        draw(rows).savefig(TABLE.with_suffix(".png"), dpi=120)
    stages = list(dict.fromkeys(row["drawn_anew_down_to"] for row in rows))
    print(f"rank correlation\n{'':28}" + "".join(f"{stage:>12}" for stage in stages))
    for name in found:
        print(f"{name:28}" + "".join(f"{row['spearman']:>12}" for row in rows if row["method"] == name))


def draw(rows: list[dict[str, object]]) -> Figure:
    """A line a method over the depth, and its mark for different images."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(str(row["method"]) for row in rows))
    stages = [str(row["drawn_anew_down_to"]) for row in rows if row["method"] == names[0]][1:]
    places = [*range(len(stages) + 1), len(stages) + 1.5]
    for axes, measure in zip(panels, ("spearman", "ssim"), strict=True):
        for i, name in enumerate(names):
            floor, *values = (float(str(row[measure])) for row in rows if row["method"] == name)
            own = name.startswith("CAE")
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 2.6 if own else 1.1,
                     "linestyle": "-" if own else ("--", ":", "-.")[i // len(COLOURS) % 3]}  # fmt: skip
            axes.plot(places[:-1], [1, *values], label=name, **style)
            axes.plot(places[-1], floor, "o" if own else "x", color=style["color"], markersize=5)
        axes.axhline(0, color="#999999", linewidth=0.6)
        axes.set_xticks(places, ["as trained", *stages, "other\nimage"], fontsize=8)
        axes.set_xlabel("weights drawn anew down to")
    panels[0].set_ylabel("rank correlation with the trained classifier's maps")
    panels[1].set_ylabel("structural similarity to them")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    program(Options, main, __doc__)
