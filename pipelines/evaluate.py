"""Stage evaluate: how far to trust the maps and the manifold. The numbers by Ray Data; tables, figures, report.html.

Writes `evaluation/…`, `figures/*.png` and `report.html`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cae import classifiers, metrics, training
from cae.images import Fit, load, to_tensor
from cae.peers import controls
from cae.peers.grad_cam import grad_cam
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import Unit, bulk, decode_all, read_table, read_unit, shard_units, split_of
from pipelines.classify import absolute
from pipelines.cluster import connect, device_of, place
from pipelines.explain import ExplainOptions
from pipelines.report import write_report
from pipelines.run import Run

CONTROLS = ("random", "Sobel", "centre", "|x - reconstruction|")
METHODS = ("CAE", "Grad-CAM", *CONTROLS)
SWAPS = 2000  # images a split whose class codes are swapped, at most
SEPARATED = 20_000  # codes a split that the forest learns from, at most
STRIDES = (2, 4)  # of the encoders' convolutions and of the decoder's upsampling
CURVE = 0.30  # share of the image to which perturbation curves are drawn
HEADLINE = 0.075  # share of the image over which AOPC is taken: the paper's 100 patches of 7x7 on 256x256


@dataclass(frozen=True)
class EvaluateOptions(ExplainOptions):
    """How to measure the explanations."""

    evaluated: int = 64
    """Images whose maps are measured by perturbation, of the test split (or the last one explained), among those that
    the classifier gets right."""
    draws: int = 5
    """Random fills that each perturbation is averaged over."""
    oracle: str = ""
    """A second classifier, trained apart from the explained one (given as for --classifier; another run's
    `classifier/` will do), that is asked about every swap: one that fools the first classifier only is noise."""


def evaluate(run: Run, options: EvaluateOptions) -> dict[str, Any]:
    """Measure swaps, manifold and maps; write tables, figures and the report; returns the headline numbers."""
    connect()
    chosen = run.result("classify")
    names = tuple(chosen["classes"])
    oracle = absolute(options.oracle) if options.oracle else ""
    if oracle:
        classifiers.load(oracle, names)  # fails here, early, on a wrong one
    units = _units(run, options)
    bulk(run, options, "evaluate", units, EvaluateWorker, "evaluation/images",
         spec=chosen["spec"], names=names, size=options.model.image_size, fit=options.fit, device=device_of(options),
         draws=options.draws, seed=options.seed, oracle=oracle)  # fmt: skip
    rows = read_table(run, "evaluation/images").to_pandas()
    tables = {
        "swap_success": swap_table(rows, names),
        "separability": separability_table(run, options.seed),
        "perturbation": perturbation_table(rows),
        "localisation": localisation_table(rows),
        "grid": grid_table(rows),
    }
    numbers: dict[str, float] = {}
    for row in tables["swap_success"].itertuples():
        if row.direction == "all":
            numbers[f"swap_success/{row.split}"] = row.success
            numbers[f"reconstruction_keeps_class/{row.split}"] = row.reconstruction_keeps_class
            numbers[f"reconstruction_error/{row.split}"] = row.reconstruction_error
            if options.oracle:
                numbers[f"oracle_success/{row.split}"] = row.oracle_success
        else:
            numbers[f"swap_success/{row.split}/{row.direction}"] = row.success
    for row in tables["separability"].itertuples():
        numbers[f"separability/{row.split}"] = row.forest_mean
    for row in tables["perturbation"].itertuples():
        numbers[f"{row.measure}_{row.form}/{_key(row.method)}"] = row.value
    for row in tables["localisation"].itertuples():
        numbers |= {
            f"pointing_game/{_key(row.method)}": row.pointing_game,
            f"pixel_auroc/{_key(row.method)}": row.pixel_auroc,
        }
    for name, table in tables.items():
        run.write(f"evaluation/{name}.csv", table.to_csv(index=False).encode())
    write_report(run, options, rows, tables, names)
    tracking.log_folder(run, "evaluation")
    tracking.log_folder(run, "figures", whole=True)
    tracking.log_folder(run, "report.html", whole=True)
    swaps = ", ".join(f"{key.split('/')[1]} {value:.3f}" for key, value in numbers.items()
                      if key.startswith("swap_success/") and key.count("/") == 1)  # fmt: skip
    return {
        "says": f"swap success {swaps}; AOPC (disjoint) {numbers.get('aopc_disjoint/cae', float('nan')):.3f}"
    } | numbers


def _key(method: str) -> str:
    """MLflow allows no bars in metric names."""
    return {"|x - reconstruction|": "reconstruction_error"}.get(method, method.lower().replace("-", "_"))


def _units(run: Run, options: EvaluateOptions) -> list[Unit]:
    """Per unit of images, which to swap with whose class code and which to measure by perturbation."""
    codes = read_table(run, "codes", ["id", "split", "label", "predicted", "class_code"]).to_pandas()
    explained = read_table(run, "explanations", ["id", "split", "status"]).to_pandas()
    rng = np.random.default_rng(options.seed)
    plan: dict[str, dict[str, Any]] = {}
    splits = [split for split in options.splits if (codes.split == split).any()]
    for split in splits:
        of_split = codes[codes.split == split].sort_values("id")
        classes = of_split.predicted.to_numpy()
        for i in rng.permutation(len(of_split))[:SWAPS]:
            others = np.flatnonzero(classes != classes[i])
            if not len(others):
                continue
            donor = of_split.iloc[int(rng.choice(others))]
            plan[of_split.iloc[int(i)].id] = {
                "donor": donor.id, "donor_class": int(donor.predicted), "donor_code": donor.class_code.tolist(),
            }  # fmt: skip
    measured_split = "test" if "test" in splits else splits[-1]
    fine = set(explained[(explained.split == measured_split) & (explained.status != "failed")].id)
    right = codes[(codes.split == measured_split) & codes.id.isin(fine)].sort_values("id")
    if right.label.notna().any():
        right = right[right.label == right.predicted]
    located = set(right.id)  # where the truth is known, maps are held to it on all of these
    measured = set(right.id.to_numpy()[rng.permutation(len(right))[: options.evaluated]])
    units = []
    no_swap = {"donor": None, "donor_class": None, "donor_code": None}
    for unit in shard_units(run, tuple(splits)):
        ids = read_unit(run, unit, ["id"])["id"].to_pylist()
        tasks = [
            {"row": i, "measured": name in measured, "located": name in located, **plan.get(name, no_swap)}
            for i, name in enumerate(ids) if name in plan or name in located
        ]  # fmt: skip
        # Short units keep every core busy to the end.
        for start in range(0, len(tasks), 64):
            part = f"{unit['part'].removesuffix('.parquet')}-{start:04d}.parquet"
            chunk = tasks[start : start + 64]
            units.append(unit | {"tasks": chunk, "rows": len(chunk), "explanations": unit["part"], "part": part})
    return units


class EvaluateWorker:
    """Swaps the class codes of the images of a unit and measures maps of some of them."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str, draws: int,
                 seed: int, oracle: str) -> None:  # fmt: skip
        self.run, self.size, self.fit, self.device, self.draws, self.seed = run, size, fit, device, draws, seed
        self.blackbox = place(classifiers.load(spec, names), device)
        self.oracle = place(classifiers.load(oracle, names), device) if oracle else None
        self.cae = place(training.load(run.path("cae")), device)

    def __call__(self, unit: Unit) -> pa.Table:
        tasks = unit["tasks"]
        table = read_unit(self.run, unit).take([task["row"] for task in tasks])
        x = to_tensor(decode_all(table["image"].to_pylist(), self.size, self.fit)[0], self.device)
        with torch.no_grad():
            code, individual = self.cae.encode(x)
            reconstruction = self.cae.decode(code, individual)
            donor_code = code.clone()  # an image without a donor keeps its own
            swaps = [i for i, task in enumerate(tasks) if task["donor"] is not None]
            for i in swaps:
                donor_code[i] = torch.tensor(tasks[i]["donor_code"])
            swapped = self.cae.decode(donor_code, individual)
        p_x, p_reconstruction, p_swap = (self.blackbox.probabilities(image) for image in (x, reconstruction, swapped))
        rows: list[dict[str, Any]] = [
            {"id": name, "split": split_of(unit), "source": a, "reconstruction_predicted": b,
             "measured": task["measured"], "reconstruction_error": error}
            for name, task, a, b, error in zip(table["id"].to_pylist(), tasks, p_x.argmax(1).tolist(),
                                               p_reconstruction.argmax(1).tolist(),
                                               (reconstruction - x).abs().mean((1, 2, 3)).tolist(), strict=True)
        ]  # fmt: skip
        _measure_grid(rows, {"image": x.mean(1), "reconstruction": reconstruction.mean(1), "swap": swapped.mean(1)})
        for i in swaps:
            target = tasks[i]["donor_class"]
            rows[i] |= {"donor": tasks[i]["donor"], "swap_target": target, "swap_predicted": int(p_swap[i].argmax()),
                        "swap_p": float(p_swap[i, target])}  # fmt: skip
        if self.oracle is not None:
            of_image, of_swap = (self.oracle.probabilities(image).argmax(1).tolist() for image in (x, swapped))
            for i in swaps:
                rows[i] |= {"oracle_image": of_image[i], "oracle_swap": of_swap[i]}
        masks = self._masks(table)
        located = [task["located"] and bool(mask.any()) for task, mask in zip(tasks, masks, strict=True)]
        chosen = [i for i, task in enumerate(tasks) if task["measured"] or located[i]]
        if chosen:
            maps = self._maps(unit, x[chosen], p_x[chosen].argmax(1), reconstruction[chosen],
                              [rows[i]["id"] for i in chosen])  # fmt: skip
            _measure_grid([rows[i] for i in chosen], {"map": maps["CAE"]})
            for method, heat in maps.items():
                self._measure(method, heat, x, p_x.argmax(1), masks, chosen, located, rows)
        return pa.Table.from_pylist(rows, _schema())

    def _masks(self, table: pa.Table) -> Tensor:
        """Where the truth lies, bool (N, S, S): all False where it is not known."""
        empty = np.zeros((self.size, self.size), bool)
        return torch.from_numpy(np.stack([
            empty if mask is None else np.asarray(load(mask).resize((self.size, self.size)))[..., 0] > 127
            for mask in table["mask"].to_pylist()
        ])).to(self.device)  # fmt: skip

    def _measure(self, method: str, heat: Tensor, x: Tensor, predicted: Tensor, masks: Tensor, chosen: list[int],
                 located: list[bool], rows: list[dict[str, Any]]) -> None:  # fmt: skip
        """Add to the rows of `chosen` images how well their maps `heat` meet the truth, and perturbation curves."""
        pointing, auroc = metrics.pointing_game(heat, masks[chosen]), metrics.pixel_auroc(heat, masks[chosen])
        for k, i in enumerate(chosen):
            if located[i]:
                rows[i] |= {f"{method}/pointing": bool(pointing[k]), f"{method}/auroc": float(auroc[k])}
        perturbed = [k for k, i in enumerate(chosen) if rows[i]["measured"]]
        if not perturbed:
            return
        index = [chosen[k] for k in perturbed]
        given = self.blackbox, x[index], heat[perturbed], predicted[index]
        headline, whole = (metrics.disjoint_steps(self.size, share) for share in (HEADLINE, CURVE))
        curves = {
            "disjoint": metrics.perturbation_curve(*given, steps=headline, draws=self.draws, seed=self.seed),
            "paper": metrics.perturbation_curve(
                *given, steps=headline, draws=self.draws, seed=self.seed, disjoint=False
            ),
            "curve": metrics.perturbation_curve(*given, steps=whole, draws=1, seed=self.seed),
        }
        for form, curve in curves.items():
            for i, values in zip(index, curve.tolist(), strict=True):
                rows[i][f"{method}/{form}"] = values

    def _maps(
        self, unit: Unit, x: Tensor, predicted: Tensor, reconstruction: Tensor, ids: list[str]
    ) -> dict[str, Tensor]:
        with self.run.fs.open(self.run.path("explanations", unit["explanations"])) as file:
            table = pq.read_table(file, columns=["id", "status", "p_target_start", "map"]).to_pylist()
        # Of several targets the one that the classifier finds likeliest.
        best: dict[str, dict[str, Any]] = {}
        for row in table:
            if (
                row["status"] != "failed"
                and row["p_target_start"] > best.get(row["id"], {"p_target_start": -1})["p_target_start"]
            ):
                best[row["id"]] = row
        heat = np.stack([np.array(best[name]["map"], np.float32).reshape(self.size, self.size) for name in ids])
        layer = self.blackbox.net.get_submodule(self.blackbox.cam_layer)
        return {
            "CAE": torch.from_numpy(heat).to(self.device),
            "Grad-CAM": grad_cam(self.blackbox, x, predicted, layer).detach(),
            "random": controls.random_map(x, self.seed),
            "Sobel": controls.sobel(x),
            "centre": controls.centre(x),
            "|x - reconstruction|": controls.reconstruction_error(x, reconstruction),
        }


def _measure_grid(rows: list[dict[str, Any]], images: dict[str, Tensor]) -> None:
    """Add to rows how strong a grid is in each of their images (N, S, S); nothing for images too small to tell."""
    for name, image in images.items():
        for stride in STRIDES:
            if image.shape[-1] >= 8 * stride:
                for row, value in zip(rows, metrics.grid_energy(image, stride).tolist(), strict=True):
                    row[f"grid{stride}/{name}"] = value


def _schema() -> pa.Schema:
    fields = {
        "id": pa.string(), "split": pa.string(), "donor": pa.string(), "source": pa.int32(), "swap_target": pa.int32(),
        "reconstruction_predicted": pa.int32(), "swap_predicted": pa.int32(), "swap_p": pa.float32(),
        "oracle_image": pa.int32(), "oracle_swap": pa.int32(),
        "measured": pa.bool_(), "reconstruction_error": pa.float32(),
    }  # fmt: skip
    fields |= {f"grid{n}/{of}": pa.float32() for n in STRIDES for of in ("image", "reconstruction", "swap", "map")}
    for method in METHODS:
        fields |= {f"{method}/{form}": pa.list_(pa.float32()) for form in ("disjoint", "paper", "curve")}
        fields |= {f"{method}/pointing": pa.bool_(), f"{method}/auroc": pa.float32()}
    return pa.schema(fields)


# --- Tables ----------------------------------------------------------------------------------------------------------


def swap_table(rows: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Table IV: share of swaps that b gives the class of the code put in, by split and direction.

    With an oracle: the share of swaps that it gives that class too, and of images that it gives b's class.
    """
    out = []
    for split, part in rows.dropna(subset="donor").groupby("split"):
        part = part.astype({"swap_target": int, "swap_predicted": int})
        groups: list[tuple[str, pd.DataFrame]] = [("all", part)]
        groups += [(f"{names[a]} to {names[b]}", g) for (a, b), g in part.groupby(["source", "swap_target"])]
        for direction, group in groups:
            row = {
                "split": split,
                "direction": direction,
                "images": len(group),
                "success": float((group.swap_predicted == group.swap_target).mean()),
                "reconstruction_keeps_class": float((group.reconstruction_predicted == group.source).mean()),
                "reconstruction_error": float(group.reconstruction_error.mean()),
            }
            if group.oracle_swap.notna().any():
                row |= {"oracle_success": float((group.oracle_swap == group.swap_target).mean()),
                        "oracle_agrees_on_images": float((group.oracle_image == group.source).mean())}  # fmt: skip
            out.append(row)
    return pd.DataFrame(out, columns=None if out else ["split", "direction", "images", "success"])


def separability_table(run: Run, seed: int) -> pd.DataFrame:
    """Table III: how well the class codes alone tell b's classes apart, by split."""
    codes = read_table(run, "codes", ["split", "id", "predicted", "class_code"]).to_pandas()
    out = []
    for split, part in codes.groupby("split"):
        counts = part.predicted.value_counts()
        part = part[part.predicted.isin(counts[counts > 1].index)]
        part = part.sample(min(len(part), SEPARATED), random_state=seed)
        if part.predicted.nunique() > 1:
            found = metrics.separability(np.stack(part.class_code.to_list()), part.predicted.to_numpy(), seed)
            out.append({"split": split, "images": len(part)} | found)
    return pd.DataFrame(out, columns=None if out else ["split", "images", "forest_mean"])


def grid_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How strong a grid is, by split, stride and where: median over images of `metrics.grid_energy`; 1 is none."""
    out = []
    for split, part in rows.groupby("split"):
        for name in rows.columns[rows.columns.str.startswith("grid")]:
            if part[name].notna().any():
                stride, of = name.removeprefix("grid").split("/")
                out.append({"split": split, "stride": int(stride), "of": of, "energy": float(part[name].median())})
    return pd.DataFrame(out, columns=["split", "stride", "of", "energy"])


def perturbation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Eqs. 11 and 12 for every method in both forms, with the paired difference of CAE's AOPC to each method."""
    measured = rows[rows.measured].sort_values("id")
    out: list[dict[str, Any]] = []
    for form in ("disjoint", "paper"):
        curves = (
            {m: torch.from_numpy(np.stack(measured[f"{m}/{form}"].to_list())) for m in METHODS} if len(measured) else {}
        )
        for method, curve in curves.items():
            mean, low, high = (0.0, 0.0, 0.0)
            if method != "CAE" and len(curve) > 1:
                mean, low, high = metrics.paired_bootstrap(metrics.aopc(curves["CAE"]), metrics.aopc(curve))
            common = {"form": form, "method": method, "images": len(curve)}
            out.append({"measure": "aopc", **common, "value": float(metrics.aopc(curve).mean()),
                        "cae_minus_this": mean, "low": low, "high": high})  # fmt: skip
            out.append({"measure": "pd", **common, "value": metrics.peak_degradation(curve)})
    return pd.DataFrame(out, columns=None if out else ["measure", "form", "method", "images", "value"])


def localisation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Pointing game and pixel AUROC against the known truth, on images that have one."""
    known = rows[rows["CAE/pointing"].notna()]
    return pd.DataFrame(
        [{"method": m, "images": len(known), "pointing_game": float(known[f"{m}/pointing"].astype(float).mean()),
          "pixel_auroc": float(known[f"{m}/auroc"].mean())} for m in METHODS] if len(known) else [],
        columns=["method", "images", "pointing_game", "pixel_auroc"],
    )  # fmt: skip


OWN = ("evaluated", "draws", "oracle")


def main(options: EvaluateOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("evaluate", options, evaluate, OWN, needs=("shard", "classify", "train", "embed", "explain"))


if __name__ == "__main__":
    runs.command(EvaluateOptions, main)
