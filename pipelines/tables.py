"""The tables of stage evaluate: what the workers measured, a row an image -> tables. Pure.

Every comparison of methods has the same columns: `images` and mean `value` of a method, and `cae_minus_this`, `low` and
`high`, the mean of CAE's value minus this method's over the images that have both, with its 95% interval by a paired
bootstrap of the images' `group`s: patients, say, where those are known. Of fewer than FEWEST groups there is none: it
would be too narrow (of five, 84% of such intervals hold the truth). They are not corrected for the number of methods.
`told` marks a method's numbers under a fill that it fills its own queries with, as an argument of that name says:
method -> those fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from cae import counterfactuals, manifold, metrics
from pipelines.measure import SMOOTHED

SEPARATED = 20_000  # codes a split that the forest learns from, at most
KID_IMAGES = 10  # of a class, real and generated, that KID is taken of, at least
FEWEST = 10  # groups of images that an interval is given of
CLASSES = 100  # the commonest, whose codes are told apart
DIP = 0.01  # how far the probability may fall along a path that still counts as monotone
CONFIDENCE = (0.0, 0.7, 0.9, 0.99, 1.01)  # the classifier's, of an image's class, from and below the next
COMPARED = ["method", "images", "value", "cae_minus_this", "low", "high"]
LOCALISED = {
    "pointing": "pointing_game",
    "energy": "energy_in_mask",
    "iou": "iou_at_equal_area",
    "auroc": "pixel_auroc",
}


def map_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per image and method, with its `id`, `split`, `group` and class `source`; without a map: an `error`."""
    return pd.DataFrame([
        {"id": row.id, "split": row.split, "group": row.group, "source": row.source, **entry}
        for row in rows.dropna(subset="maps").itertuples() for entry in row.maps
    ])  # fmt: skip


def curve_rows(maps: pd.DataFrame) -> pd.DataFrame:
    """One row per image, method and fill, from `map_rows`, with the areas over Eq. 11's curves, `aopc_FORM`."""
    if maps.empty:
        return pd.DataFrame()
    return pd.DataFrame([
        {"id": row.id, "split": row.split, "group": row.group, "source": row.source, "method": row.method, **entry,
         **{f"aopc_{form}": float(np.mean(entry[form])) for form in ("disjoint", "paper")}}
        for row in maps.dropna(subset="curves").itertuples() for entry in row.curves
    ])  # fmt: skip


def compare(frame: pd.DataFrame, value: str, ours: str = "CAE") -> list[dict[str, Any]]:
    """A row of COMPARED for each method, in their order in a frame with the columns `id`, `group`, `method` and
    `value`: means over images, or of curves the largest mean over images (Eq. 12). `ours` is the method that the others
    are compared with; "": none."""
    methods, group = frame.method.unique(), frame.drop_duplicates("id").set_index("id").group
    whole = [np.isfinite(np.asarray(held, float)).all() for held in frame[value]]  # neither a NaN nor a curve with one
    table = frame[whole].pivot(index="id", columns="method", values=value).reindex(columns=methods).sort_index()
    found = []
    for method in methods:
        of_method = table[method].dropna()
        values = np.array(of_method.to_list(), float)
        curves = values.ndim == 2
        mean = metrics.peak_degradation(torch.from_numpy(values)) if curves else of_method.astype(float).mean()
        row = {"method": method, "images": len(values), "value": mean}
        both = table[[ours, method]].dropna() if method != ours and ours in table else of_method[:0]
        groups = group[both.index]
        if groups.nunique() > 1:
            a, b = (np.array(both[name].to_list(), float) for name in both)
            interval = metrics.paired_bootstrap(a, b, groups=groups)
            row |= dict(zip(COMPARED[3:], interval if groups.nunique() >= FEWEST else interval[:1], strict=False))
        found.append(row)
    return found


def perturbation_table(maps: pd.DataFrame, told: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Table II: Eqs. 11 (`aopc`) and 12 (`pd`) of every method by split, form and fill; areas under the insertion and
    deletion curves, of which the latter is better small; how much of the image is covered, and how many values tie.
    Fill `all` is the mean of an image's AOPC over the fills.
    """
    curves = curve_rows(maps)
    columns = ["split", "fill", "form", "measure", *COMPARED, "told"]
    out: list[dict[str, Any]] = []
    if curves.empty:
        return pd.DataFrame(columns=columns)
    for (split, fill), group in curves.groupby(["split", "fill"], sort=False):
        common = {"split": split, "fill": fill}
        for form in ("disjoint", "paper"):
            out += [common | {"form": form, "measure": "aopc"} | row for row in compare(group, f"aopc_{form}")]
            out += [common | {"form": form, "measure": "pd"} | row for row in compare(group, form)]
        for measure in ("insertion", "deletion"):
            if group[measure].notna().any():
                out += [common | {"form": "pixels", "measure": measure} | row for row in compare(group, measure)]
    for split, group in over_fills(curves).groupby("split", sort=False):
        for form in ("disjoint", "paper"):
            common = {"split": split, "fill": "all", "form": form, "measure": "aopc"}
            out += [common | row for row in compare(group, f"aopc_{form}")]
    for split, group in maps.dropna(subset="curves").groupby("split", sort=False):
        columns_of = {"covered_disjoint": ("covered", "disjoint"), "covered_paper": ("covered", "paper"),
                      "tie_share": ("tie_share", "")}  # fmt: skip
        for column, (measure, form) in columns_of.items():
            rows = compare(group, column, ours="")
            out += [{"split": split, "fill": "", "form": form, "measure": measure} | row for row in rows]
    return _marked(pd.DataFrame(out, columns=columns), told)


def _marked(table: pd.DataFrame, told: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    fills_told = [told.get(method, ()) for method in table.method]  # the mean of all holds those too
    return table.assign(
        told=[fill in own or (fill == "all" and bool(own)) for fill, own in zip(table.fill, fills_told, strict=True)]
    )


def over_fills(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean AOPC of each image and method over the fills, one number since they disagree, where there are several."""
    several = curves[curves.groupby("split").fill.transform("nunique") > 1]
    by, forms = ["split", "id", "group", "source", "method"], ["aopc_disjoint", "aopc_paper"]
    return several.groupby(by, sort=False)[forms].agg(lambda of: of.mean(skipna=False)).reset_index()


def modes_table(maps: pd.DataFrame, told: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """How the CAE's other modes do beside every method: AOPC over disjoint patches by split and fill, with the mean of
    the `mode`'s value minus the method's and its interval."""
    curves = curve_rows(maps)
    columns = ["split", "fill", "mode", *COMPARED[:3], "mode_minus_this", *COMPARED[4:], "told"]
    if curves.empty:
        return pd.DataFrame(columns=columns)
    out: list[dict[str, Any]] = []
    for (split, fill), group in pd.concat([curves, over_fills(curves).assign(fill="all")]).groupby(
        ["split", "fill"], sort=False
    ):
        for mode in group.method[group.method.str.startswith("CAE ")].unique():
            rows = pd.DataFrame(compare(group, "aopc_disjoint", ours=mode), columns=COMPARED)
            out += (rows.rename(columns={"cae_minus_this": "mode_minus_this"})
                    .assign(split=split, fill=fill, mode=mode).query("method != mode").to_dict("records"))  # fmt: skip
    return _marked(pd.DataFrame(out, columns=columns), told)


def classes_table(maps: pd.DataFrame, names: Sequence[str], told: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """AOPC over disjoint patches of every method, by split, fill and class of the image. A fill may be a step towards
    one class and away from another, so a mean over images holds for their mix of classes only."""
    curves = curve_rows(maps)
    columns = ["split", "fill", "class_name", *COMPARED, "told"]
    if curves.empty:
        return pd.DataFrame(columns=columns)
    curves = pd.concat([curves, over_fills(curves).assign(fill="all")])
    return _marked(pd.DataFrame([
        {"split": split, "fill": fill, "class_name": names[int(label)]} | row
        for (split, fill, label), part in curves.groupby(["split", "fill", "source"], sort=False)
        for row in compare(part, "aopc_disjoint")
    ], columns=columns), told)  # fmt: skip


def agreement_table(perturbation: pd.DataFrame) -> pd.DataFrame:
    """Whether the ranking of methods by AOPC holds across fills: Kendall's tau of every two, by split and form; of maps
    as they are, and of methods that neither fill is told to."""
    from scipy.stats import kendalltau  # takes a while to import

    out = []
    ranked = perturbation.query("measure == 'aopc' and fill != 'all' and not told")
    ranked = ranked[~ranked.method.str.endswith(SMOOTHED)]
    for (split, form), group in ranked.groupby(["split", "form"], sort=False):
        table = group.pivot(index="method", columns="fill", values="value")
        for a, b in combinations(group.fill.unique(), 2):
            both = table[[a, b]].dropna()
            tau = float(kendalltau(both[a], both[b]).statistic)
            out.append({"split": split, "form": form, "fills": f"{a}, {b}", "methods": len(both), "kendall_tau": tau})
    return pd.DataFrame(out, columns=["split", "form", "fills", "methods", "kendall_tau"])


def localisation_table(maps: pd.DataFrame) -> pd.DataFrame:
    """How well maps meet the known truth, on images that have one, by split and measure."""
    columns = ["split", "measure", *COMPARED]
    out: list[dict[str, Any]] = []
    if maps.empty:
        return pd.DataFrame(columns=columns)
    for split, group in maps.dropna(subset="pointing").groupby("split", sort=False):
        for column, measure in LOCALISED.items():
            out += [{"split": split, "measure": measure} | row for row in compare(group, column)]
    return pd.DataFrame(out, columns=columns)


def skipped_table(rows: pd.DataFrame, maps: pd.DataFrame, reasons: Mapping[str, str]) -> pd.DataFrame:
    """What could not be measured, why, and of how many images; `reasons` has more: what -> why."""
    out: list[dict[str, Any]] = [{"what": what, "reason": why} for what, why in reasons.items()]
    if not maps.empty:
        failed = maps.dropna(subset="error").groupby(["method", "error"], sort=False).size()
        out += [{"what": f"maps by {method}", "reason": why, "images": n} for (method, why), n in failed.items()]
    measured = rows[rows.measured]
    if len(measured) and measured.features.isna().all():
        why = "the oracle, or without one the classifier, has no linear layer to take features from"
        out.append({"what": "KID", "reason": why})
    return pd.DataFrame(out, columns=["what", "reason", "images"])


def swap_table(rows: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Table IV: share of swaps that b gives the class of the code put in, by split and direction.

    With an oracle: the share of swaps that it gives that class too, and of images that it gives b's class.
    """
    out = []
    for split, part in each_swap(rows).groupby("split"):
        groups: list[tuple[str, pd.DataFrame]] = [("all", part)]
        groups += [(f"{names[a]} to {names[int(b)]}", g) for (a, b), g in part.groupby(["source", "swap_target"])]
        out += [{"split": split, "direction": direction} | _swapped(group) for direction, group in groups]
    return pd.DataFrame(out, columns=None if out else ["split", "direction", "images", "success"])


def confidence_table(rows: pd.DataFrame, probabilities: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """Table IV by split and how sure b is of the image: `probabilities` has those of the classes (C,) by `id`.

    A reconstruction is a little off, so where b wavers between two classes it may have the other one.
    """
    sure = rows.id.map({name: float(np.max(p)) for name, p in probabilities.items()})
    known = each_swap(rows.assign(confidence=pd.cut(sure, CONFIDENCE, right=False)).dropna(subset="confidence"))
    out = [
        {"split": split, "confidence_from": share.left, "to": min(share.right, 1.0)} | _swapped(group)
        for (split, share), group in known.groupby(["split", "confidence"], observed=True)
    ]
    return pd.DataFrame(out, columns=None if out else ["split", "confidence_from", "to", "images", "success"])


def each_swap(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for every swap of every image, under the image's index: of its first donor, and of the others."""
    first = rows.dropna(subset="donor")
    others = first.other_swaps.explode().dropna()
    if others.empty:
        return first
    seen = pd.DataFrame(others.to_list(), index=others.index)
    return pd.concat([first, first.drop(columns=list(seen)).join(seen, how="right")])


def _swapped(rows: pd.DataFrame) -> dict[str, Any]:
    """What Table IV has of some swaps (`each_swap`), and of their images."""
    images = rows[~rows.index.duplicated()]
    row = {
        "images": len(images), "swaps": len(rows),
        "success": float((rows.swap_predicted == rows.swap_target).mean()),
        "reconstruction_keeps_class": float((images.reconstruction_predicted == images.source).mean()),
        "reconstruction_error": float(images.reconstruction_error.mean()),
    }  # fmt: skip
    if rows.oracle_swap.notna().any():
        row |= {"oracle_success": float((rows.oracle_swap == rows.swap_target).mean()),
                "oracle_agrees_on_images": float((images.oracle_image == images.source).mean())}  # fmt: skip
    return row


def sample_codes(codes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """As many codes of each split, of its CLASSES commonest classes, as their separability is measured on."""
    common = codes.groupby("split").predicted.transform(lambda of: of.isin(of.value_counts().index[:CLASSES]))
    codes = codes[common]
    parts = [part.sample(min(len(part), SEPARATED), random_state=seed) for _, part in codes.groupby("split")]
    return pd.concat(parts) if parts else codes


def separability_table(codes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Table III: how well the class codes alone tell b's classes apart, by split; codes: `split`, `predicted`,
    `class_code`, and `group` for images that belong together."""
    out = []
    for split, part in codes.groupby("split"):
        counts = part.predicted.value_counts()
        part = part[part.predicted.isin(counts[counts > 1].index)]
        if part.predicted.nunique() > 1:
            groups = part.group.to_numpy() if "group" in part and part.group.duplicated().any() else None
            found = manifold.separability(np.stack(part.class_code.to_list()), part.predicted.to_numpy(), seed, groups)
            out.append({"split": split, "images": len(part)} | found)
    return pd.DataFrame(out, columns=None if out else ["split", "images", "forest_mean"])


def new_code_table(rows: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """Section IV-F3: share of class codes made by SMOTE that b gives their class, decoded with individual codes."""
    pairs = [
        pair for row in rows.dropna(subset="new_classes").itertuples()
        for pair in zip(row.new_classes, row.new_predicted, strict=True)
    ]  # fmt: skip
    found = pd.DataFrame(pairs, columns=["wanted", "predicted"])
    return pd.DataFrame([
        {"class_name": names[label], "codes": len(part), "right": float((part.predicted == label).mean())}
        for label, part in found.groupby("wanted")
    ], columns=["class_name", "codes", "right"])  # fmt: skip


def counterfactual_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per image and kind of counterfactual."""
    return pd.DataFrame([
        {"id": row.id, "split": row.split, "source": row.source, **entry}
        for row in rows.dropna(subset="counterfactuals").itertuples() for entry in row.counterfactuals
    ])  # fmt: skip


def counterfactual_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How good generated images are, by split and kind: `reconstruction` (what any of them loses), `explanation` (the
    end of the run's path to the code that stands for the target class), `swap` (the code of a random image of it).

    Valid for b, and for the oracle where there is one; L1, L2 and sparsity of the difference to the image itself;
    identity, and that of different images; KID, in features of the oracle, or of b without one (`kid_features` says
    whose), to real images that b gives the class, without the one each was made from (but with the donor of a swap),
    mean over classes; share of paths there (of several counter codes, to the first) on which the probability of the
    class falls by no more than DIP.
    """
    found = counterfactual_rows(rows)
    columns = ["split", "kind", "images", "valid", "oracle_valid", "l1", "l2", "sparsity", "identity",
               "identity_of_others", "kid", "kid_features", "monotone"]  # fmt: skip
    out: list[dict[str, Any]] = []
    if found.empty:
        return pd.DataFrame(columns=columns)
    for (split, kind), part in found.groupby(["split", "kind"], sort=False):
        of_split = rows[(rows.split == split) & rows.measured]
        means = part[columns[3:9]].astype(float).mean()
        ways = part.way.dropna()
        out.append({"split": split, "kind": kind, "images": len(part), **means,
                    "identity_of_others": of_split.identity_of_others.mean(), "kid": _kid(of_split, part),
                    "kid_features": "oracle" if part.oracle_valid.notna().any() else "classifier",
                    "monotone": _monotone(ways) if len(ways) else np.nan})  # fmt: skip
    return pd.DataFrame(out, columns=columns)


def _kid(images: pd.DataFrame, generated: pd.DataFrame) -> float:
    """KID of generated images to the real ones of the same class, mean over classes, weighted by the former."""
    total, count = 0.0, 0
    for label, part in generated.dropna(subset="features").groupby("target"):
        real = images[images.source == label].dropna(subset="features")
        if min(len(part), len(real)) >= KID_IMAGES:
            a, b = (torch.from_numpy(np.stack(some.features.to_list())) for some in (part, real))
            _, made, origin = np.intersect1d(part.id, real.id, assume_unique=True, return_indices=True)
            pairs = torch.from_numpy(made), torch.from_numpy(origin)
            total += len(part) * counterfactuals.kid(lambda x: x, a, b, pairs=pairs)
            count += len(part)
    return total / count if count else float("nan")


def _monotone(ways: pd.Series) -> float:
    return float(counterfactuals.monotonicity(torch.from_numpy(np.stack(ways.to_list())), DIP).float().mean())


def ways_by_direction(rows: pd.DataFrame, split: str, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, float]]:
    """Fig. 11b: direction -> the donor's class's probability along paths to its code (N, K), and share monotone."""
    found = counterfactual_rows(rows[rows.split == split])
    if found.empty:
        return {}
    swaps = found[found.kind == "swap"].groupby(["source", "target"])
    return {
        f"{names[a]} to {names[b]}": (np.stack(part.way.to_list()), _monotone(part.way)) for (a, b), part in swaps
    }  # fmt: skip


def grid_table(rows: pd.DataFrame) -> pd.DataFrame:
    """How strong a grid is, by split, stride and where: median over images of `metrics.grid_energy`; 1 is none."""
    out = []
    for split, part in rows.groupby("split"):
        for name in rows.columns[rows.columns.str.startswith("grid")]:
            if part[name].notna().any():
                stride, of = name.removeprefix("grid").split("/")
                out.append({"split": split, "stride": int(stride), "of": of, "energy": float(part[name].median())})
    return pd.DataFrame(out, columns=["split", "stride", "of", "energy"])


def time_table(times: pd.DataFrame) -> pd.DataFrame:
    """Table V: seconds for a map by every method, fastest first, and how many times CAE's; below, CAE's parts."""
    own = times[times.name == "CAE"].seconds
    times = times.assign(times_cae=times.seconds / (own.iloc[0] if len(own) else np.nan))
    ordered = times.sort_values(["kind", "seconds"])[["kind", "name", "images", "seconds", "times_cae"]]
    return ordered.reset_index(drop=True)


def training_table(stages: Mapping[str, Any], history: Mapping[str, Sequence[tuple[int, float]]]) -> pd.DataFrame:
    """Table VI: seconds of each stage that learns, from run.json; of the embedding, pairs and pairs a second.

    Seconds are those of all `calls` of a stage, of one that was stopped until the last file that it left.
    """
    out = []
    for stage, what in (("classify", "classifier"), ("train", "embedding"), ("embed", "codes and manifold")):
        noted = stages.get(stage, {})
        row: dict[str, Any] = {"stage": stage, "what": what} | {name: noted.get(name) for name in ("seconds", "calls")}
        if stage == "train" and history.get("pairs_per_second"):
            row |= dict(zip(("pairs", "pairs_per_second"), history["pairs_per_second"][-1], strict=True))
        out.append(row)
    return pd.DataFrame(out, columns=["stage", "what", "seconds", "calls", "pairs", "pairs_per_second"])
