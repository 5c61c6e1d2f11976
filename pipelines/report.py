"""The report page of a run: what stage evaluate found, in an order to read it in."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from cae.figures import png
from cae.report import Section, Table, render
from pipelines.pictures import draw_examples, plot_numbers
from pipelines.run import Run
from pipelines.tables import CLASSES, FEWEST

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateOptions

READ_ME = {
    "flipped": "the path reached the target class",
    "unflipped": "it did not; the map is of the whole path and should not be relied on",
    "reconstruction_flipped": "the classifier sees another class in the reconstruction already; no trust",
    "failed": "no map; the row's error says why",
}
MAP_SHOWS = {
    "integrated": "makes the same changes to the image itself, takes some of its contrast too (--fade), and shows what "
    "of that moves the classifier towards the target class, by its gradient",
    "evidence": "makes the same changes to the image itself, and greys the windows of it where they do most, and "
    "shows what moves the classifier away from its class and towards the target class",
    "patch": "makes the same changes to the image itself, a window at a time, and undoes them again, and shows which "
    "of them move the classifier towards the target class",
    "path": "shows what changed, weighted by how much it raised the target's probability",
    "contrast": "is the difference of the path's two ends",
    "input": "is the difference of the path's end and the image, the reconstruction's error included",
}


SMOOTH = (
    " Maps of peers, and of controls that a blur changes, are measured as they are and smoothed as CAE's are: a blur "
    "may be all that a map is ahead by."
)
FULL = (
    " CAE's modes path, contrast and input, where its own is another, are not smoothed, as in the paper. Smooth "
    "FullGrad, LIME and RISE take 10, 500 and 1000 samples, fewer than their authors."
)


def write_report(run: Run, options: EvaluateOptions, rows: pd.DataFrame, maps: pd.DataFrame,
                 found: dict[str, pd.DataFrame], headline: str, names: tuple[str, ...]) -> None:  # fmt: skip
    """Draw `figures/*.png` and write `report.html`, from the rows and the tables of stage evaluate."""
    figures = draw_examples(run, options, rows, maps, names)
    figures |= plot_numbers(run, options, rows, maps, found, headline, names)
    pictures = {name: (caption, png(figure)) for name, (caption, figure) in figures.items()}
    for name, (_, image) in pictures.items():
        run.write(f"figures/{name}.png", image)

    shard, classified = run.result("shard"), run.result("classify")
    statuses, inverted = run.result("explain")["statuses"], run.result("explain").get("inverted", 0)
    total = sum(statuses.values())
    swaps = found["swap_success"].query("direction == 'all'")
    accuracy = {k: v for k, v in classified.items() if k.endswith("balanced_accuracy")}
    aopc = found["perturbation"].query(
        "split == @headline and fill == 'uniform' and measure == 'aopc' and form == 'disjoint' and method == 'CAE'"
    )
    summary = [
        *[(f"classifier, balanced accuracy ({key.split('/')[1]})", f"{value:.3f}") for key, value in accuracy.items()
          if "train" not in key],
        *[(f"swap success ({row.split})", f"{row.success:.3f}") for row in swaps.itertuples()],
        ("maps that flipped", f"{statuses.get('flipped', 0) / total:.1%}"),
        *[("AOPC, disjoint patches", f"{value:.3f}") for value in aopc.value],
    ]  # fmt: skip
    counted = [[name, count, f"{count / total:.1%}", READ_ME.get(name, "")] for name, count in statuses.items()]

    def shown(*chosen: str) -> list[tuple[str, bytes]]:
        return [pictures[name] for name in chosen if name in pictures]

    def table(caption: str, name: str) -> list[Table]:
        return _frame(caption, found[name]) if name in found else []

    counts = ", ".join(f"{split} {count:,}" for split, count in shard["counts"].items())
    explained = "predictions" if options.labels == "predicted" else "data set's labels, not its predictions"
    sections = [
        Section(
            "Data and classifier",
            f"{sum(shard['counts'].values()):,} images of {options.dataset} in {counts}; {shard['rejected']} files "
            "were no readable images (shards/rejected.parquet says why). What is explained are the classifier's "
            f"{explained}.",
            tables=table("Classifier on every split", "accuracy"),
        ),
        Section(
            "Swapping class codes",
            "Each image is rebuilt with the class codes of images of another class, five at random, the first of which "
            "are in the pictures, and shown to the classifier. A good embedding changes what the classifier looks at "
            "and keeps the individual.",
            shown("swaps", "swap_grid", "swap_classes"),
            table("Swap success, and how often the reconstruction keeps the class (Table IV)", "swap_success")
            + table("The same by how sure the classifier is of the image: its probability of the class that it gives",
                    "confidence")
            + table("Generated images: whether the classifier sees the class that they are made for, how far they are "
                    "from the image, how much of its individual code they keep (beside that of other images), distance "
                    "to real images of the class (KID, in the features of the network that is named), share of "
                    "monotone paths", "counterfactuals")
            + table("Grid of the networks' strides: power at its frequencies over that beside them; 1 is none", "grid"),
        ),
        Section(
            "Explanations",
            "From the reconstruction, the class code walks towards that of the target class until the classifier "
            f"changes its mind. The map (mode {options.mode}) {MAP_SHOWS[options.mode]}. Where the classifier saw "
            f"another class in the reconstruction, the individual code was fitted to the image: {inverted:,} of the "
            "maps are of such codes. (The swaps above are all of the networks' own codes.)",
            shown("paths", "maps"),
            [("Status of every map", ["status", "maps", "share", "meaning"], counted)],
        ),
        Section(
            "The manifold of class codes",
            f"Every image's {options.model.class_dim} numbers in the plane, coloured by the classifier's prediction. "
            "The table says how well the codes alone give the classifier's class, by cross-validation of as many folds "
            "as it says; a high stump, or nearly all variance in two components, says that the code is little more "
            "than one score.",
            shown("manifold", "dragged_codes", "smoothness"),
            table(f"Separability of the class codes (Table III), of the {CLASSES} commonest classes at most",
                    "separability")
            + table("New class codes, by SMOTE of the training codes: share that the classifier gives their class, "
                    f"decoded with the individual codes of {headline}", "new_codes"),
        ),
        Section(
            "Measuring the maps",
            "The top-ranked places of each map are overwritten, and the fall of the classifier's probability is "
            "measured; more is better. Disjoint patches, all of them in the image, cover the same area for every "
            "method and are the headline; the paper's form lets them overlap, which rewards noisy maps. A method that "
            "does not beat the grey controls explains nothing. Differences are paired over images, with 95% bootstrap "
            "intervals; images of one patient, where that is known, are drawn together. The intervals are not "
            f"corrected for the number of methods, and of fewer than {FEWEST} patients or images there is none. A "
            "star: the method fills its own queries as the measure does, an unfair advantage. CAE's values tie more "
            "than they would: its maps are read back in half precision. A fill may be a step towards one class and "
            "away from another, so means hold for this mix of classes; the mean of all fills is mostly that of the "
            "fill that does most."
            + (SMOOTH if options.smooth else "")
            + (FULL if options.tables == "full" else ""),
            shown("perturbation", "perturbation_blur", "perturbation_inpaint", "differences"),
            perturbation_tables(found["perturbation"])
            + class_tables(found["perturbation_by_class"])
            + table("Whether the ranking of methods holds across fills", "fill_agreement")
            + localisation_tables(found["localisation"])
            + table("What is not measured, and why", "skipped"),
        ),
        Section(
            "Cost and training",
            "",
            shown("training"),
            table("Seconds for a map, the same images as one batch, one process; below, what one image costs in the "
                  "steps that CAE's maps are made of (Table V)", "time_per_map")
            + table("Training (Table VI)", "training"),
        ),
    ]  # fmt: skip
    if run.done("tune"):
        sections.append(_search(run))
    page = render(f"{options.dataset}: what the classifier looks at", summary, sections,
                  {"run": run.folder, **asdict(options), **run.state["versions"], "git": run.state["git"]})  # fmt: skip
    run.write("report.html", page.encode())


def perturbation_tables(perturbation: pd.DataFrame) -> list[Table]:
    """Table II, to be read: by split, one for each form, one of the areas, and one of what the numbers rest on."""
    tables = []
    for split, of_split in perturbation.groupby("split", sort=False):
        fills = [fill for fill in of_split.fill.unique() if fill]
        for form in ("disjoint", "paper"):
            columns = {
                f"{name}, {fill}": (fill, form, m) for fill in fills for name, m in (("AOPC", "aopc"), ("PD", "pd"))
            }
            tables.append(_by_method(f"{split}, {form} patches: Eq. 11 (AOPC) and Eq. 12 (PD)", of_split, columns))
        columns = {f"{m}, {fill}": (fill, "pixels", m) for m in ("insertion", "deletion") for fill in fills}
        caption = f"{split}: area under the insertion curve (more is better) and under the deletion curve (less)"
        tables.append(_by_method(caption, of_split, columns))
        columns = {"covered, disjoint": ("", "disjoint", "covered"), "covered, paper": ("", "paper", "covered"),
                   "tied values": ("", "", "tie_share")}  # fmt: skip
        caption = f"{split}: share of the image that the patches of either form cover, and of a map's values that tie"
        tables.append(_by_method(caption, of_split, columns))
    return [table for table in tables if table[2]]


def class_tables(by_class: pd.DataFrame) -> list[Table]:
    """AOPC over disjoint patches by the class of the image, to be read: one table for each split and class."""
    return [
        _by_method(f"{split}, images of {name}, disjoint patches: Eq. 11", part.assign(form="disjoint", measure="aopc"),
                   {f"AOPC, {fill}": (fill, "disjoint", "aopc") for fill in part.fill.unique()})
        for (split, name), part in by_class.groupby(["split", "class_name"], sort=False)
    ]  # fmt: skip


def localisation_tables(localisation: pd.DataFrame) -> list[Table]:
    """How well maps meet the known truth, to be read: one for each split."""
    return [
        _by_method(f"{split}, against the known truth", of_split.assign(fill="", form="", told=False),
                   {m.replace("_", " "): ("", "", m) for m in of_split.measure.unique()})
        for split, of_split in localisation.groupby("split", sort=False)
    ]  # fmt: skip


def _by_method(caption: str, table: pd.DataFrame, columns: dict[str, tuple[str, str, str]]) -> Table:
    """A row a method, in falling order of the first column; `columns` are heading -> fill, form and measure.

    Behind a column that was compared stands another with CAE's value minus the method's.
    """
    found = {(row.method, (row.fill, row.form, row.measure)): row for row in table.itertuples()}
    columns = {name: key for name, key in columns.items() if ("CAE", key) in found}
    if not columns:
        return caption, [], []
    compared = {key for (_, key), row in found.items() if pd.notna(row.low)}
    first = next(iter(columns.values()))
    methods = sorted({method for method, key in found if key == first}, key=lambda name: -found[name, first].value)
    rows: list[list[object]] = []
    for method in methods:
        cells: list[object] = [method]
        for key in columns.values():
            row = found.get((method, key))
            cells.append(row.value if row else None)
            if key in compared:
                cells.append("" if row is None or pd.isna(row.low) else _interval(row))
        rows.append(cells)
    header = ["method"]
    for name, key in columns.items():
        header += [name, "CAE minus this"] if key in compared else [name]
    images = max(row.images for (_, key), row in found.items() if key == first)
    return f"{caption}; {images} images", header, rows


def _interval(row: Any) -> str:
    star = " *" if row.told else ""
    return f"{row.cae_minus_this:+.3f} ({row.low:+.3f} to {row.high:+.3f}){star}"


def _search(run: Run) -> Section:
    """What the search for loss weights found, from what stage tune left in the run folder."""
    captions = {
        "effects": "What each searched option does to what was maximised, when all trials had seen equally many pairs.",
        "parallel": "All trials; the last axis is what was maximised.",
        "pareto": "What one aim costs in another: no trial beats one of the front in everything.",
    }
    figures = []
    for name, caption in captions.items():
        with run.fs.open(run.path("tune", f"{name}.png"), "rb") as file:
            figures.append((caption, file.read()))
    return Section(
        "The search for loss weights",
        "Short trainings with weights of their own, measured on val. Importance is what shuffling the option among "
        "trials takes from a forest's prediction, in units of its variance; with few trials it says little.",
        figures,
        _frame("The trials", _read_csv(run, "tune/trials.csv")),
    )


def _read_csv(run: Run, name: str) -> pd.DataFrame:
    """A table of the run folder."""
    with run.fs.open(run.path(name)) as file:
        return pd.read_csv(file)


def _frame(caption: str, frame: pd.DataFrame) -> list[Table]:
    """A data frame as a table of the page, without the columns that hold nothing; none if it is empty."""
    frame = frame.dropna(axis=1, how="all")
    if frame.empty:
        return []
    values = frame.astype(object).where(frame.notna(), None)
    return [(caption, [name.replace("_", " ") for name in frame.columns], values.to_numpy().tolist())]
