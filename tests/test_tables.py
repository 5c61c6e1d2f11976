"""The tables of stage evaluate, from rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cae import counterfactuals, metrics
from pipelines import pictures, report, tables

NAMES = ("plain", "spot")
VALUES = {  # AOPC of three images, by method and fill
    "CAE": {"uniform": [0.5, 0.7, 0.9], "blur": [0.3, 0.3, 0.3]},
    "peer": {"uniform": [0.4, 0.1, 0.4], "blur": [0.4, 0.5, 0.6]},
    "random": {"uniform": [0.1, 0.2, 0.0], "blur": [0.0, 0.0, 0.0]},
}


def curves(method: str, image: int) -> list[dict[str, Any]]:
    """Curves of two steps around the AOPC; the paper's form has half of it."""
    return [
        {"fill": fill, "disjoint": [v - 0.1, v + 0.1], "paper": [v / 2, v / 2], "long": [v] * 4, "insertion": 1 - v,
         "deletion": v if method == "CAE" else None}
        for fill, v in ((fill, values[image]) for fill, values in VALUES[method].items())
    ]  # fmt: skip


def rows() -> pd.DataFrame:
    """Three measured images of test; the peer failed on the last one, and only two have a known truth."""
    out = []
    for i in range(3):
        maps = [
            {"method": m, "error": None, "pointing": [1.0, 0.0, None][i], "energy": 0.1, "iou": 0.2,
             "auroc": 0.5 + i / 10, "tie_share": 0.25, "covered_disjoint": 0.08, "covered_paper": 0.02 * (i + 1),
             "curves": curves(m, i)}
            for m in VALUES
        ]  # fmt: skip
        if i == 2:
            maps[1] = {"method": "peer", "error": "it has no gradient"}
        out.append({"id": f"image {i}", "split": "test", "group": f"patient {i}", "source": 0, "measured": True,
                    "features": np.zeros(2), "maps": maps})  # fmt: skip
    return pd.DataFrame([*out, {"id": "other", "split": "test", "group": "p", "source": 1, "measured": False}])


@pytest.fixture(autouse=True)
def intervals_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FEWEST", 2)


def test_there_is_no_interval_of_few_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FEWEST", 4)
    for patients, told in ((3, False), (4, True)):
        images = [{"id": f"{i}", "group": f"{i % patients}", "method": method, "value": i * gain}
                  for i in range(8) for method, gain in (("CAE", 2.0), ("peer", 1.0))]  # fmt: skip
        _, peer = tables.compare(pd.DataFrame(images), "value")
        assert peer["images"] == 8 and peer["value"] == peer["cae_minus_this"] == 3.5 and ("low" in peer) == told


def test_perturbation_is_means_peaks_and_paired_differences() -> None:
    table = tables.perturbation_table(tables.map_rows(rows()), {"peer": ("blur",)})
    keys = ["fill", "form", "measure", "method"]
    assert set(table.split) == {"test"} and not table.duplicated(keys).any()
    found = table.set_index(keys)
    for method, by_fill in VALUES.items():
        kept = 2 if method == "peer" else 3
        for fill, values in by_fill.items():
            row = found.loc[fill, "disjoint", "aopc", method]
            assert row.images == kept and np.isclose(row.value, np.mean(values[:kept]))
            assert np.isclose(found.value[fill, "paper", "aopc", method], np.mean(values[:kept]) / 2)
            assert np.isclose(found.value[fill, "disjoint", "pd", method], np.mean(values[:kept]) + 0.1)
            assert np.isclose(found.value[fill, "pixels", "insertion", method], 1 - np.mean(values[:kept]))
            assert row.told == (method == "peer" and fill == "blur")
            if method == "CAE":
                assert np.isclose(found.value[fill, "pixels", "deletion", method], np.mean(values))
                assert np.isnan([row.cae_minus_this, row.low, row.high]).all()
                continue
            expected = metrics.paired_bootstrap(VALUES["CAE"][fill][:kept], values[:kept])
            np.testing.assert_allclose([row.cae_minus_this, row.low, row.high], expected)
            peak, ours = found.loc[fill, "disjoint", "pd", method], np.mean(VALUES["CAE"][fill][:kept])
            assert np.isclose(peak.cae_minus_this, ours - np.mean(values[:kept]))
            assert np.isclose(peak.low, row.low) and np.isclose(peak.high, row.high)  # these curves rise alike
    over_fills = {m: np.mean([by_fill["uniform"], by_fill["blur"]], 0) for m, by_fill in VALUES.items()}
    for method, kept in (("peer", 2), ("random", 3)):
        row, expected = found.loc["all", "disjoint", "aopc", method], over_fills[method][:kept]
        assert np.isclose(row.value, expected.mean()) and row.told == (method == "peer")
        interval = metrics.paired_bootstrap(over_fills["CAE"][:kept], expected)
        np.testing.assert_allclose([row.cae_minus_this, row.low, row.high], interval)
    assert np.isclose(found.value["", "disjoint", "covered", "random"], 0.08)
    assert np.isclose(found.value["", "paper", "covered", "random"], 0.04)
    assert np.isclose(found.value["", "", "tie_share", "CAE"], 0.25)


def test_other_modes_are_compared_with_every_method() -> None:
    maps = tables.map_rows(rows())
    maps["method"] = maps.method.replace({"peer": "CAE patch"})
    table = tables.modes_table(maps, {})
    assert set(table["mode"]) == {"CAE patch"} and set(table.fill) == {"uniform", "blur", "all"}
    found = table.set_index(["fill", "method"])
    assert set(table.method) == {"CAE", "random"} and len(found) == 6
    mine = {fill: np.array(VALUES["peer"][fill][:2]) for fill in ("uniform", "blur")}
    for method in ("CAE", "random"):
        theirs = {fill: np.array(VALUES[method][fill]) for fill in mine}
        for fill, ours, other in (*((f, mine[f], theirs[f]) for f in mine),
                                  ("all", sum(mine.values()) / 2, sum(theirs.values()) / 2)):  # fmt: skip
            row = found.loc[fill, method]
            assert row.images == 3 and np.isclose(row.value, other.mean())
            interval = metrics.paired_bootstrap(ours, other[:2])
            np.testing.assert_allclose([row.mode_minus_this, row.low, row.high], interval)
    assert tables.modes_table(tables.map_rows(rows()), {}).empty


def test_classes_are_told_apart() -> None:
    mixed = rows()
    mixed.loc[1, "source"] = 1
    table = tables.classes_table(tables.map_rows(mixed), ("sick", "well"), {"peer": ("blur",)}).set_index(
        ["fill", "class_name", "method"]
    )
    assert set(table.split) == {"test"} and len(table) == 3 * (3 + 3)
    for fill in ("uniform", "blur"):
        values = {method: np.array(by_fill[fill]) for method, by_fill in VALUES.items()}
        well, sick = table.loc[fill, "well", "random"], table.loc[fill, "sick", "random"]
        assert (well.images, sick.images) == (1, 2) and np.isnan(well.low)  # one image has no interval
        assert np.isclose(well.value, values["random"][1])
        pair = [0, 2]
        expected = metrics.paired_bootstrap(values["CAE"][pair], values["random"][pair])
        np.testing.assert_allclose([sick.cae_minus_this, sick.low, sick.high], expected)
        assert np.isclose(table.value[fill, "sick", "peer"], values["peer"][0])  # it failed on the other
    assert set(table[table.told].index.droplevel("class_name")) == {("blur", "peer"), ("all", "peer")}
    shown = {caption: (header, [row[0] for row in body]) for caption, header, body in
             report.class_tables(table.reset_index())}  # fmt: skip
    sick, well = "test, images of sick, disjoint patches: Eq. 11", "test, images of well, disjoint patches: Eq. 11"
    assert set(shown) == {f"{sick}; 2 images", f"{well}; 1 images"}  # each with its own number
    header, methods = shown[f"{sick}; 2 images"]
    assert header[:3] == ["method", "AOPC, uniform", "CAE minus this"] and methods == ["CAE", "peer", "random"]
    assert shown[f"{well}; 1 images"][0] == ["method", "AOPC, uniform", "AOPC, blur", "AOPC, all"]  # no interval of one
    both = (table.value["uniform", "well", "CAE"] + table.value["blur", "well", "CAE"]) / 2
    assert np.isclose(table.value["all", "well", "CAE"], both)


def test_a_class_that_sampling_leaves_one_code_of_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SEPARATED", 60)
    rng = np.random.default_rng(0)
    predicted = np.array([0, 1] * 60 + [2] * 2)
    codes = pd.DataFrame({"split": "test", "predicted": predicted})
    codes["class_code"] = list(rng.normal(size=(len(codes), 4)) + predicted[:, None])
    left = [codes.sample(60, random_state=seed).predicted.value_counts().get(2, 0) for seed in range(20)]
    assert {0, 1} <= set(left)
    for seed in (left.index(0), left.index(1)):
        (row,) = tables.separability_table(tables.sample_codes(codes, seed), seed).itertuples()
        assert row.images == 60 - left[seed] and row.forest_mean > 0.5


def test_codes_of_the_commonest_classes_of_each_split_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CLASSES", 2)
    monkeypatch.setattr(tables, "SEPARATED", 8)
    counts = {"val": (5, 3, 1), "test": (1, 7, 3)}
    codes = pd.DataFrame([
        {"split": split, "predicted": label} for split, of in counts.items() for label, n in enumerate(of)
        for _ in range(n)
    ])  # fmt: skip
    kept = tables.sample_codes(codes, 0).groupby("split").predicted
    assert kept.size().to_dict() == {"val": 8, "test": 8} and {k: set(v) for k, v in kept} == {
        "val": {0, 1}, "test": {1, 2}}  # fmt: skip


def test_separability_is_also_measured_without_parting_groups_where_there_are_any() -> None:
    rng = np.random.default_rng(0)
    codes = pd.DataFrame({"split": "test", "predicted": np.repeat([0, 1], 4), "group": np.arange(8) // 2})
    codes["class_code"] = list(rng.normal(size=(8, 3)) + codes.predicted.to_numpy()[:, None] * 9)
    (row,) = tables.separability_table(codes, 1).itertuples()
    assert (row.folds, row.folds_grouped, row.forest_grouped_mean) == (4, 2, 1)
    (row,) = tables.separability_table(codes.assign(group=np.arange(8)), 1).itertuples()  # as good as none
    assert (row.folds, row.folds_grouped) == (4, 0)


def test_images_of_one_patient_are_drawn_together() -> None:
    alone = tables.perturbation_table(tables.map_rows(rows()), {})
    of_patients = rows().assign(group=["a", "a", "b", "c"])
    tied = tables.perturbation_table(tables.map_rows(of_patients), {})
    compared = alone.low.notna()
    assert np.allclose(tied.value, alone.value, equal_nan=True)
    # The peer's two images are of one patient: nothing to draw from.
    assert tied.low[compared & (alone.method == "peer")].isna().all()
    both = tied.low.notna()
    assert both.any() and np.allclose(tied.cae_minus_this[both], alone.cae_minus_this[both])
    assert not np.allclose(tied.low[both], alone.low[both])


def test_an_image_with_a_nan_in_its_curve_is_left_out_of_that_comparison_alone() -> None:
    spoiled = rows()
    spoiled["maps"][0][2]["curves"][0]["disjoint"][1] = np.nan
    table = tables.perturbation_table(tables.map_rows(spoiled), {}).set_index(["fill", "form", "measure", "method"])
    for measure in ("aopc", "pd"):
        noise, blur = (table.loc[fill, "disjoint", measure, "random"] for fill in ("uniform", "blur"))
        assert (noise.images, blur.images) == (2, 3) and np.isfinite([noise.value, noise.low]).all()
    assert np.isclose(table.value["uniform", "disjoint", "aopc", "random"], 0.1)


def test_the_mean_over_fills_is_of_images_that_have_all_and_of_fills_that_are_several() -> None:
    spoiled = rows()
    spoiled["maps"][0][2]["curves"][0]["disjoint"][1] = np.nan
    table = tables.perturbation_table(tables.map_rows(spoiled), {}).set_index(["fill", "form", "measure", "method"])
    row = table.loc["all", "disjoint", "aopc", "random"]
    expected = [np.mean([VALUES["random"][fill][i] for fill in ("uniform", "blur")]) for i in (1, 2)]
    assert row.images == 2 and np.isclose(row.value, np.mean(expected))
    for entries in spoiled.maps.dropna():
        for entry in entries:
            entry["curves"] = entry.get("curves", [])[:1]
    assert set(tables.perturbation_table(tables.map_rows(spoiled), {}).fill) == {"uniform", ""}


def test_of_curves_the_peak_of_their_mean_is_taken_and_not_the_mean_of_their_peaks() -> None:
    curves = {"CAE": [[0.9, 0.1, 0.2], [0.1, 0.3, 0.6]], "peer": [[0.4, 0.0, 0.0], [0.0, 0.2, 0.0]]}
    frame = pd.DataFrame([
        {"id": k, "group": k, "method": method, "disjoint": of[k]} for method, of in curves.items() for k in (0, 1)
    ])  # fmt: skip
    cae, peer = tables.compare(frame, "disjoint")
    assert cae["value"] == pytest.approx(0.5) and peer["value"] == pytest.approx(0.2)
    assert peer["cae_minus_this"] == pytest.approx(0.3)


def test_rankings_of_fills_are_compared_by_kendalls_tau() -> None:
    perturbation = tables.perturbation_table(tables.map_rows(rows()), {})
    table = tables.agreement_table(perturbation).set_index("form")
    means = {m: [np.mean(v[: 2 if m == "peer" else 3]) for v in by_fill.values()] for m, by_fill in VALUES.items()}
    pairs = [(a, b) for a in means for b in means if a < b]
    agree = [np.sign((means[a][0] - means[b][0]) * (means[a][1] - means[b][1])) for a, b in pairs]
    assert table.fills["disjoint"] == "uniform, blur" and table.methods["disjoint"] == 3
    assert np.isclose(table.kendall_tau["disjoint"], np.mean(agree)) and np.isclose(np.mean(agree), 1 / 3)
    # Neither a method that a fill is told to nor a map's smoothed twin is another witness.
    twins = perturbation[perturbation.method == "random"].assign(method="random, smoothed")
    told = perturbation.told | ((perturbation.method == "peer") & (perturbation.fill == "blur"))
    table = tables.agreement_table(pd.concat([perturbation.assign(told=told), twins]))
    assert (table.methods == 2).all() and (table.kendall_tau == 1).all()


def test_localisation_is_of_images_with_a_known_truth() -> None:
    table = tables.localisation_table(tables.map_rows(rows())).set_index(["measure", "method"])
    assert (table.images == 2).all() and (table.split == "test").all()
    assert table.value["pointing_game", "CAE"] == 0.5 and np.isclose(table.value["pixel_auroc", "peer"], 0.55)
    assert table.cae_minus_this["iou_at_equal_area", "random"] == 0
    assert {measure for measure, _ in table.index} == set(tables.LOCALISED.values())


def test_what_is_missing_is_said_with_its_reason() -> None:
    table = tables.skipped_table(rows(), tables.map_rows(rows()), {"class codes by SMOTE": "too few"})
    said = {row.what: row.reason for row in table.itertuples()}
    assert said == {"class codes by SMOTE": "too few", "maps by peer": "it has no gradient"}
    blind = rows().assign(features=None)
    assert "no linear layer" in tables.skipped_table(blind, tables.map_rows(blind), {}).iloc[-1].reason


def test_what_is_missing_is_counted() -> None:
    maps = pd.DataFrame({"method": ["a", "a", "b", "b"], "error": ["no", "no", None, "no"]})
    table = tables.skipped_table(pd.DataFrame({"measured": []}, dtype=bool), maps, {})
    assert table[["what", "images"]].to_numpy().tolist() == [["maps by a", 2], ["maps by b", 1]]


def test_tables_of_nothing_are_empty_and_have_columns() -> None:
    none = rows()[3:].assign(donor=None, other_swaps=None, counterfactuals=None, new_classes=None)
    maps = tables.map_rows(none)
    perturbation = tables.perturbation_table(maps, {})
    empty = [perturbation, tables.agreement_table(perturbation), tables.localisation_table(maps),
             tables.skipped_table(none, maps, {}), tables.counterfactual_table(none),
             tables.new_code_table(none, NAMES), tables.swap_table(none, NAMES),
             tables.confidence_table(none, {})]  # fmt: skip
    for table in empty:
        assert table.empty and len(table.columns) > 2
    assert tables.ways_by_direction(none, "test", NAMES) == {}


def test_swaps_are_told_by_direction() -> None:
    # (source, target) -> swaps that the classifier gives the target, the source and the third class; no two shares are
    # alike. The reconstruction of one image in each direction has another class.
    given = {(0, 1): (2, 0, 0), (0, 2): (2, 1, 0), (1, 0): (1, 1, 2), (1, 2): (4, 0, 1), (2, 0): (3, 2, 1),
             (2, 1): (0, 3, 4)}  # fmt: skip
    rows = pd.DataFrame([
        {"split": "test", "donor": "x", "source": a, "swap_target": b, "swap_predicted": predicted,
         "reconstruction_predicted": a if k else b, "reconstruction_error": a + b / 10, "oracle_swap": None,
         "other_swaps": None}
        for (a, b), counts in given.items()
        for k, predicted in enumerate(np.repeat([b, a, 3 - a - b], counts))
    ])  # fmt: skip
    without_donor = rows[:1].assign(donor=None, swap_target=None, swap_predicted=None)
    table = tables.swap_table(pd.concat([without_donor, rows]).sample(frac=1, random_state=0), ("no", "one", "two"))
    assert (table.split == "test").all() and "oracle_success" not in table
    found = table.set_index("direction")[["images", "success", "reconstruction_keeps_class", "reconstruction_error"]]
    expected = {
        "all": (27, 12 / 27, 21 / 27, sum(sum(n) * (a + b / 10) for (a, b), n in given.items()) / 27),
        "no to one": (2, 2 / 2, 1 / 2, 0.1), "no to two": (3, 2 / 3, 2 / 3, 0.2),
        "one to no": (4, 1 / 4, 3 / 4, 1.0), "one to two": (5, 4 / 5, 4 / 5, 1.2),
        "two to no": (6, 3 / 6, 5 / 6, 2.0), "two to one": (7, 0 / 7, 6 / 7, 2.1),
    }  # fmt: skip
    assert set(found.index) == set(expected) and len(found) == 7
    for direction, row in expected.items():
        np.testing.assert_allclose(found.loc[direction], row, err_msg=direction)


def test_every_swap_of_an_image_counts_and_the_image_once() -> None:
    def swap(target: int, predicted: int, oracle: int) -> dict[str, int]:
        return {"swap_target": target, "swap_predicted": predicted, "oracle_swap": oracle}

    rows = pd.DataFrame({
        "id": list("abc"), "split": "test", "donor": ["x", "y", None], "source": [0, 1, 1], "swap_target": [1, 0, None],
        "swap_predicted": [1, 1, None], "oracle_swap": [1, 0, None], "oracle_image": [0, 2, None],
        "reconstruction_predicted": [0, 2, 1], "reconstruction_error": [0.1, 0.3, 0.5],
        "other_swaps": [[swap(2, 2, 0), swap(1, 0, 1)], [swap(0, 0, 0), swap(0, 0, 1)], None],
    })  # fmt: skip
    table = tables.swap_table(rows, ("no", "one", "two")).set_index("direction")
    expected = {"all": (2, 6, 4 / 6, 1 / 2, 0.2, 4 / 6, 1 / 2), "no to one": (1, 2, 1 / 2, 1, 0.1, 1, 1),
                "no to two": (1, 1, 1, 1, 0.1, 0, 1), "one to no": (1, 3, 2 / 3, 0, 0.3, 2 / 3, 0)}  # fmt: skip
    assert list(table.index) == list(expected)
    for direction, row in expected.items():
        np.testing.assert_allclose(table.drop(columns="split").loc[direction].to_numpy(float), row, err_msg=direction)
    by = tables.confidence_table(rows, {"a": [0.9, 0.1], "b": [0.2, 0.8], "c": [0.1, 0.9]})
    assert by[["images", "swaps", "success"]].to_numpy().tolist() == [[1, 3, 2 / 3], [1, 3, 2 / 3]]


def test_an_oracle_is_asked_whether_swaps_have_the_donors_class_and_images_bs() -> None:
    rows = pd.DataFrame({
        "split": "test", "donor": "x", "source": 0, "swap_target": 1, "swap_predicted": [1, 1, 1, 1, 0],
        "reconstruction_predicted": [0, 0, 2, 1, 0], "reconstruction_error": 0.1, "oracle_image": [0, 0, 1, 2, 0],
        "oracle_swap": [1, 0, 0, 1, 1], "other_swaps": None,
    })  # fmt: skip
    row = tables.swap_table(rows, NAMES).set_index("direction").loc["all"]
    assert row.reconstruction_keeps_class == 3 / 5  # a third class is not the image's either
    assert (row.success, row.oracle_success, row.oracle_agrees_on_images) == (4 / 5, 3 / 5, 3 / 5)


def test_swaps_are_told_by_how_sure_the_classifier_is_of_the_image() -> None:
    sure = {"a": [0.4, 0.6], "b": [0.7, 0.3], "c": [0.8, 0.2], "d": [0.0, 1.0], "e": [0.0, 1.0]}
    rows = pd.DataFrame({
        "id": list("abcde"), "split": "test", "donor": ["x", "x", "x", "x", None], "source": [1, 0, 0, 1, 1],
        "swap_target": [0, 1, 1, 0, None], "swap_predicted": [0, 1, 0, 0, None],
        "reconstruction_predicted": [0, 0, 0, 1, 0], "reconstruction_error": 0.1, "oracle_swap": None,
        "other_swaps": None,
    })  # fmt: skip
    table = tables.confidence_table(rows, sure)
    assert table[["confidence_from", "to", "images"]].to_numpy().tolist() == [[0, 0.7, 1], [0.7, 0.9, 2], [0.99, 1, 1]]
    assert table.success.tolist() == [1, 0.5, 1] and table.reconstruction_keeps_class.tolist() == [0, 1, 1]


def test_new_codes_are_counted_by_their_class() -> None:
    given = pd.DataFrame({"new_classes": [[0, 1, 1], None, [1, 0]], "new_predicted": [[0, 1, 0], None, [1, 1]]})
    table = tables.new_code_table(given, NAMES).set_index("class_name")
    assert table.codes.to_dict() == {"plain": 2, "spot": 3}
    np.testing.assert_allclose(table.right[["plain", "spot"]], [1 / 2, 2 / 3])


def generated(count: int) -> pd.DataFrame:
    """Images of class 0, each with a swap to class 1; a third of the ways dips."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        way = [0.1, 0.5, 0.4, 0.9] if i % 3 == 0 else [0.1, 0.5, 0.495, 0.9]
        swap = {"kind": "swap", "target": 1, "valid": i % 2 == 0, "oracle_valid": None, "l1": 0.1 * i, "l2": 0.2,
                "sparsity": 0.3, "identity": 0.8, "features": rng.normal(size=4), "way": way}  # fmt: skip
        same = swap | {"kind": "reconstruction", "target": 0, "way": None}
        out.append({"id": str(i), "split": "val", "source": 0, "measured": True, "identity_of_others": 0.5,
                    "features": rng.normal(size=4), "counterfactuals": [same, swap]})  # fmt: skip
    real = [{"id": f"real {i}", "split": "val", "source": 1, "measured": True, "features": rng.normal(size=4),
             "counterfactuals": None} for i in range(count)]  # fmt: skip
    return pd.DataFrame([*out, *real])


def test_counterfactuals_are_means_and_kid_is_to_real_images_of_the_class() -> None:
    frame = generated(12)
    table = tables.counterfactual_table(frame).set_index("kind")
    swap = table.loc["swap"]
    assert (swap.images, swap.valid, swap.identity_of_others) == (12, 0.5, 0.5)
    assert np.isclose(swap.l1, 0.1 * np.mean(range(12))) and np.isnan(swap.oracle_valid)
    assert np.isclose(swap.monotone, 8 / 12) and np.isnan(table.monotone["reconstruction"])
    made = np.stack([row.counterfactuals[1]["features"] for row in frame[:12].itertuples()])
    real = np.stack(frame.features[12:].to_list())

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (np.dot(a, b) / 4 + 1) ** 3

    def mean(a: np.ndarray, b: np.ndarray, same: bool) -> float:
        return np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)])

    expected = mean(made, made, True) + mean(real, real, True) - 2 * mean(made, real, False)
    assert np.isclose(swap.kid, expected) and (table.kid_features == "classifier").all()
    made, own = (np.stack(part) for part in ([row.counterfactuals[0]["features"] for row in frame[:12].itertuples()],
                                             frame.features[:12]))  # fmt: skip
    without_its_own = mean(made, made, True) + mean(own, own, True) - 2 * mean(made, own, True)
    assert np.isclose(table.kid["reconstruction"], without_its_own)
    assert np.isnan(tables.counterfactual_table(generated(9)).kid).all()  # too few to say
    for entries in frame.counterfactuals.dropna():
        for entry in entries:
            entry["oracle_valid"] = False
    assert (tables.counterfactual_table(frame).kid_features == "oracle").all()
    ways = tables.ways_by_direction(frame, "val", NAMES)
    assert list(ways) == ["plain to spot"]
    p, monotone = ways["plain to spot"]
    assert p.shape == (12, 4) and np.isclose(monotone, 8 / 12)


def kid(made: list[Any], real: list[Any], origin: list[int]) -> float:
    """Of generated and real images; `origin` has the place among the latter of what each of the former is made of."""
    a, b = (torch.from_numpy(np.stack(some)) for some in (made, real))
    return counterfactuals.kid(lambda x: x, a, b, pairs=(torch.arange(len(origin)), torch.tensor(origin).long()))


def test_kid_is_weighted_by_the_images_of_a_class_and_each_split_has_its_own() -> None:
    frame = generated(31)[:31].sample(frac=1, random_state=0)  # in another order than their ids
    frame["source"] = np.repeat([1, 0], [10, 21])
    for entries in frame.counterfactuals[:10]:
        entries[0]["target"] = 1
    frame.iloc[10, frame.columns.get_loc("counterfactuals")] = None  # a real image that nothing was made of
    other = generated(12).assign(split="test", identity_of_others=0.25)
    other["id"] += " of test"
    table = tables.counterfactual_table(pd.concat([frame, other])).set_index(["split", "kind"])
    total = 0.0
    for label, number in ((0, 20), (1, 10)):
        part = frame[frame.source == label]
        made = [entries[0]["features"] for entries in part.counterfactuals if entries]
        assert len(made) == number
        total += number * kid(made, part.features.to_list(), list(range(len(part) - number, len(part))))
    assert np.isclose(table.kid["val", "reconstruction"], total / 30)
    made = [entries[1]["features"] for entries in other[:12].counterfactuals]
    assert np.isclose(table.kid["test", "swap"], kid(made, other.features[12:].to_list(), []))
    assert table.identity_of_others["val", "swap"] == 0.5 and table.identity_of_others["test", "swap"] == 0.25


def test_ways_by_direction_are_those_of_swaps_of_the_split() -> None:
    frame = generated(12)
    for entries in frame.counterfactuals.dropna():
        entries.append(entries[1] | {"kind": "explanation", "way": [0.0, 0.0, 0.0, 1.0]})
    other = generated(2).assign(split="test")
    (p, monotone), = tables.ways_by_direction(pd.concat([frame, other]), "val", NAMES).values()  # fmt: skip
    assert p.shape == (12, 4) and (p[:, 0] == 0.1).all() and np.isclose(monotone, 8 / 12)


def test_grids_are_medians_over_the_images_of_a_split() -> None:
    rows = pd.DataFrame({
        "split": ["val", "test", "val", "val"], "grid2/image": [1.0, 5.0, 2.0, 9.0],
        "grid4/swap": [np.nan, np.nan, 3.0, 4.0], "swap_p": 0.5,
    })  # fmt: skip
    table = tables.grid_table(rows).set_index(["split", "stride", "of"]).energy
    assert table.to_dict() == {("val", 2, "image"): 2.0, ("test", 2, "image"): 5.0, ("val", 4, "swap"): 3.5}


def test_seconds_are_ordered_and_held_against_cae() -> None:
    given = pd.DataFrame([
        {"kind": "part", "name": "decode a frame", "seconds": 0.01, "images": 8},
        {"kind": "method", "name": "LIME", "seconds": 3.0, "images": 8},
        {"kind": "method", "name": "CAE", "seconds": 0.5, "images": 8},
    ])  # fmt: skip
    table = tables.time_table(given)
    assert table.name.to_list() == ["CAE", "LIME", "decode a frame"]
    np.testing.assert_allclose(table.times_cae, [1, 6, 0.02])


def test_training_has_the_rate_that_was_logged_last() -> None:
    stages = {"classify": {"seconds": 10.0}, "train": {"seconds": 60.0, "calls": 2}}  # of both calls
    table = tables.training_table(stages, {"pairs_per_second": [(200, 4.0), (400, 5.0)]}).set_index("stage")
    assert table.seconds["classify"] == 10 and table.seconds["train"] == 60 and pd.isna(table.seconds["embed"])
    assert (table.pairs["train"], table.pairs_per_second["train"], table.calls["train"]) == (400, 5.0, 2)
    assert pd.isna(tables.training_table(stages, {}).pairs).all()


def test_the_page_has_a_row_a_method_and_marks_who_was_told() -> None:
    perturbation = tables.perturbation_table(tables.map_rows(rows()), {"peer": ("blur",)})
    disjoint, paper, areas, cover = report.perturbation_tables(perturbation)
    caption, header, body = disjoint
    assert caption.startswith("test, disjoint") and caption.endswith("3 images")
    assert header == ["method", "AOPC, uniform", "CAE minus this", "PD, uniform", "CAE minus this", "AOPC, blur",
                      "CAE minus this", "PD, blur", "CAE minus this", "AOPC, all", "CAE minus this"]  # fmt: skip
    assert [line[0] for line in body] == ["CAE", "peer", "random"]
    peer = body[1]
    assert peer[1] == pytest.approx(0.25) and str(peer[6]).endswith("*") and not str(peer[2]).endswith("*")
    assert str(peer[2]).startswith("+0.350 (") and body[0][2] == ""
    assert all(len(line) == len(head) for _, head, lines in (disjoint, paper, areas, cover) for line in lines)
    (located,) = report.localisation_tables(tables.localisation_table(tables.map_rows(rows())))
    assert located[1][:2] == ["method", "pointing game"] and len(located[2]) == 3


def test_curves_drawn_are_the_better_form_of_a_methods_maps() -> None:
    curves = {"CAE": [0.1], "a": [0.3], "a, smoothed": [0.2], "b": [0.1], "b, smoothed": [0.4], "c": [0.0]}
    drawn = pictures._better_forms({name: np.array(curve) for name, curve in curves.items()})
    assert list(drawn) == ["CAE", "a", "b, smoothed", "c"] and drawn["b, smoothed"] == [0.4]
