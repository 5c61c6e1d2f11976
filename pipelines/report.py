"""The pictures of a run, and its report page: the part of stage evaluate that people look at."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cae import classifiers, figures, training
from cae.classifiers import BlackBox
from cae.explain import along, explain, swap
from cae.images import to_array, to_tensor
from cae.networks import CAE
from cae.report import Section, render
from pipelines import tracking
from pipelines.bulk import read_images
from pipelines.explain import path_options
from pipelines.run import Run
from pipelines.ways import read_ways

if TYPE_CHECKING:
    from pipelines.evaluate import EvaluateOptions

SAMPLES = 8
READ_ME = {
    "flipped": "the path reached the target class",
    "unflipped": "it did not; the map is of the whole path and should not be relied on",
    "reconstruction_flipped": "the classifier sees another class in the reconstruction already; no trust",
    "failed": "no map; the row's error says why",
}
MAP_SHOWS = {
    "integrated": "makes the same changes to the image itself and shows which of them move the classifier towards the "
    "target class, by its gradient",
    "patch": "makes the same changes to the image itself, a window at a time, and undoes them again, and shows which "
    "of them move the classifier towards the target class",
    "path": "shows what changed, weighted by how much it raised the target's probability",
    "contrast": "is the difference of the path's two ends",
    "input": "is the difference of the path's end and the image, the reconstruction's error included",
}


def write_report(run: Run, options: EvaluateOptions, rows: pd.DataFrame, tables: dict[str, pd.DataFrame],
                 names: tuple[str, ...]) -> None:  # fmt: skip
    """Draw `figures/*.png`, log them, and write `report.html`."""
    pictures = _pictures(run, options, rows, names)
    for name, (_, figure) in pictures.items():
        run.write(f"figures/{name}.png", _png(figure))
        tracking.log_figure(figure, f"figures/{name}.png")

    shard, classified = run.result("shard"), run.result("classify")
    statuses = run.result("explain")["statuses"]
    total = sum(statuses.values())
    swaps = tables["swap_success"].query("direction == 'all'")
    accuracy = {k: v for k, v in classified.items() if k.endswith("balanced_accuracy")}
    aopc = tables["perturbation"].query("measure == 'aopc' and form == 'disjoint' and method == 'CAE'")
    summary = [
        *[(f"classifier, balanced accuracy ({key.split('/')[1]})", f"{value:.3f}") for key, value in accuracy.items()
          if "train" not in key],
        *[(f"swap success ({row.split})", f"{row.success:.3f}") for row in swaps.itertuples()],
        ("maps that flipped", f"{statuses.get('flipped', 0) / total:.1%}"),
        *[("AOPC, disjoint patches", f"{value:.3f}") for value in aopc.value],
    ]  # fmt: skip
    counted = [[name, count, f"{count / total:.1%}", READ_ME.get(name, "")] for name, count in statuses.items()]

    def shown(*chosen: str) -> list[tuple[str, Figure | bytes]]:
        return [(pictures[name][0], pictures[name][1]) for name in chosen if name in pictures]

    def table(caption: str, name: str) -> list[tuple[str, list[str], list[list[Any]]]]:
        frame = tables[name]
        if frame.empty:
            return []
        values = frame.astype(object).where(frame.notna(), "")
        return [(caption, list(frame.columns), values.to_numpy().tolist())]

    counts = ", ".join(f"{split} {count:,}" for split, count in shard["counts"].items())
    explained = "predictions" if options.labels == "predicted" else "data set's labels, not its predictions"
    sections = [
        Section(
            "Data and classifier",
            f"{sum(shard['counts'].values()):,} images of {options.dataset} in {counts}; {shard['rejected']} files "
            "were no readable images (shards/rejected.parquet says why). What is explained are the classifier's "
            f"{explained}.",
            tables=[_frame("Classifier on every split", read_csv(run, "evaluation/accuracy.csv"))],
        ),
        Section(
            "Swapping class codes",
            "Each image is rebuilt with the class code of an image of another class and shown to the classifier. A "
            "good embedding changes what the classifier looks at and keeps the individual.",
            shown("swaps"),
            table("Swap success, and how often the reconstruction keeps the class", "swap_success")
            + table("Grid of the networks' strides: power at its frequencies over that beside them; 1 is none", "grid"),
        ),
        Section(
            "Explanations",
            "From the reconstruction, the class code walks towards that of the target class until the classifier "
            f"changes its mind. The map (mode {options.mode}) {MAP_SHOWS[options.mode]}.",
            shown("paths", "maps"),
            [("Status of every map", ["status", "maps", "share", "meaning"], counted)],
        ),
        Section(
            "The manifold of class codes",
            f"Every image's {options.model.class_dim} numbers in the plane, coloured by the classifier's prediction. "
            "The table says how well the codes alone give the classifier's class, by cross-validation of as many folds "
            "as it says; a high stump, or nearly all variance in two components, says that the code is little more "
            "than one score.",
            shown("manifold"),
            table("Separability of the class codes", "separability"),
        ),
        Section(
            "Measuring the maps",
            "The top-ranked places of each map are overwritten with noise, and the fall of the classifier's "
            "probability is measured; more is better. Disjoint patches, all of them in the image, cover the "
            "same area for every method and are the headline; the paper's form lets them overlap, which rewards noisy "
            "maps. A method that does not beat the grey controls explains nothing. Differences are paired "
            "over images, with 95% bootstrap intervals.",
            shown("perturbation"),
            table("Eq. 11 (AOPC) and Eq. 12 (PD)", "perturbation") + table("Against the known truth", "localisation"),
        ),
        Section("Training", "The named loss terms over the pairs seen.", shown("training")),
    ]
    page = render(f"{options.dataset}: what the classifier looks at", summary, sections,
                  {"run": run.folder, **asdict(options), **run.state["versions"], "git": run.state["git"]})  # fmt: skip
    run.write("report.html", page.encode())


def read_csv(run: Run, name: str) -> pd.DataFrame:
    """A table of the run folder."""
    with run.fs.open(run.path(name)) as file:
        return pd.read_csv(file)


def _frame(caption: str, frame: pd.DataFrame) -> tuple[str, list[str], list[list[Any]]]:
    return caption, list(frame.columns), frame.to_numpy().tolist()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@torch.no_grad()
def _pictures(
    run: Run, options: EvaluateOptions, rows: pd.DataFrame, names: tuple[str, ...]
) -> dict[str, tuple[str, Figure]]:
    """Name -> caption and figure."""
    donated = rows.dropna(subset="donor")
    pictures = {} if donated.empty else _examples(run, options, donated, names)

    table = _projections(run)
    splits = table.split.to_numpy()
    projections = {"PCA": table[["pca_1", "pca_2"]].to_numpy()}
    drawn = table.tsne_1.notna().to_numpy()
    if drawn.sum() > 2:
        projections["t-SNE"] = table[["tsne_1", "tsne_2"]].to_numpy()
    pictures["manifold"] = (
        "Class codes by split, of three splits at most; colour is the classifier's prediction.",
        figures.manifold(projections, table.predicted.to_numpy(), names, splits),
    )

    measured = rows[rows.measured]
    if len(measured):
        from pipelines.evaluate import METHODS

        curves = {m: np.stack(measured[f"{m}/curve"].to_list()) for m in METHODS}
        steps = len(next(iter(curves.values()))[0])
        pictures["perturbation"] = (
            f"Mean fall of the probability of the predicted class over {len(measured)} images of the "
            f"{measured.split.iloc[0]} split, by the share of the image destroyed in disjoint 7x7 patches.",
            figures.perturbation_curves(
                {m: curve.mean(0) for m, curve in curves.items()},
                np.arange(1, steps + 1) * 49 / options.model.image_size**2,
            ),
        )
    history = tracking.read_history(run, "train")
    if history:
        caption = "What training logged: loss terms before their weights, their sums, and held-out swaps."
        pictures["training"] = (caption, figures.training_curves(history))
    return pictures


def _examples(
    run: Run, options: EvaluateOptions, rows: pd.DataFrame, names: tuple[str, ...]
) -> dict[str, tuple[str, Figure]]:
    """Swaps, paths and maps of a few images."""
    size = options.model.image_size
    blackbox = classifiers.load(run.result("classify")["spec"], names)
    cae = training.load(run.path("cae"))
    # A few images of every class from the split that was measured, chosen by the seed and not by their looks.
    pool = rows[rows.measured] if rows.measured.sum() >= 2 else rows
    per_class = max(1, SAMPLES // max(1, pool.source.nunique()))
    sample = pool.sort_values("id").groupby("source").sample(frac=1, random_state=options.seed)
    sample = sample.groupby("source").head(per_class)
    images = read_images(run, sample.id.to_numpy(), size, options.fit)
    donors = read_images(run, sample.donor.to_numpy(), size, options.fit)
    x = to_tensor(images)
    p = blackbox.probabilities(x)
    source = p.argmax(1)

    reconstruction, swapped = swap(cae, x, to_tensor(donors))
    p_swap = blackbox.probabilities(swapped)
    captions = [
        f"{names[a]} → {names[b]}\np={float(p_swap[i, b]):.2f}"
        for i, (a, b) in enumerate(zip(source.tolist(), sample.swap_target, strict=True))
    ]
    pictures = {
        "swaps": (
            "Originals, reconstructions, and originals with the class code of the donor below; p is the classifier's "
            "probability of the donor's class.",
            figures.swaps(images, to_array(reconstruction), to_array(swapped), donors, captions),
        )
    }

    ways = read_ways(run, options)
    ranked = p.argsort(1, descending=True)
    asked = {names.index(ways.targets)} & set(ways.ends) if ways.targets in names else set(ways.ends)
    aims = [next((t for t in r.tolist()[1:] if t in asked), -1) for r in ranked]  # -1: nothing to walk to
    walks = [i for i, t in enumerate(aims) if t >= 0]
    if not walks:
        return pictures
    images, x, source, target = images[walks], x[walks], source[walks], torch.tensor(aims)[walks]
    codes = cae.encode(x)[0].numpy()
    ends, waypoints = ways.find(sample.id.iloc[walks].to_list(), codes, target.tolist())
    first = np.cumsum([0, *map(len, ends)])[:-1]  # of several counter codes the first one
    way = torch.from_numpy(waypoints[first])  # (B, W, D)
    found = explain(cae, blackbox, x, source, target, way, **path_options(options))
    captions = [
        f"{names[int(a)]} → {names[int(b)]}\n{s}" + (f" at {at:.2f}" if s == "flipped" else "")
        for a, b, s, at in zip(source, target, found.status, found.flip_at, strict=True)
    ]
    heat = found.map.numpy()
    frames, probabilities = zip(
        *[_walk(cae, blackbox, *each) for each in zip(x, way, target, strict=True)], strict=True
    )
    pictures["paths"] = (
        "The way from each image to its counterfactual, with the classifier's probability of the target class, the "
        "map, and the map on the image.",
        figures.path_strips(frames, probabilities, images, heat, captions),
    )
    pictures["maps"] = (
        "Maps over their images.",
        figures.maps_by_method(images, {f"CAE, {options.mode}": heat}, captions),
    )
    return pictures


@torch.no_grad()
def _walk(cae: CAE, blackbox: BlackBox, x: Tensor, waypoints: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Frames of an image's whole way by waypoints (W, D), uint8 (9, H, W, 3), and the target's probability in each."""
    class_code, individual_code = cae.encode(x[None])
    codes = along(torch.cat([class_code, waypoints]).expand(9, -1, -1), torch.linspace(0, 1, 9))
    frames = cae.decode(codes, individual_code.expand(9, -1, -1, -1))
    return to_array(frames), blackbox.probabilities(frames)[:, target].numpy()


def _projections(run: Run) -> pd.DataFrame:
    with run.fs.open(run.path("manifold", "projections.parquet")) as file:
        return pd.read_parquet(file)
