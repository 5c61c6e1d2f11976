"""What stage evaluate's worker writes of every image, in a toy world, against the measures called by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_explain import Dim
from torch import Tensor, nn
from worlds import BLOBS, SIDE, TOY, B, image, paint

from cae import counterfactuals, metrics
from cae.classifiers import BlackBox
from cae.explain import explain, over_donors
from cae.images import blur, encode_png, to_array, to_tensor
from cae.metrics import Fill
from cae.networks import CAE
from cae.peers import controls
from cae.peers.integrated_gradients import integrated_gradients
from cae.peers.occlusion import occlusion
from pipelines import measure
from pipelines.bulk import write_table
from pipelines.measure import AREA_STEPS, WALK, MeasureWorker, Seen, answered, methods
from pipelines.run import Run
from pipelines.ways import Ways

OWN: dict[str, Any] = {"mode": "contrast", "smooth": 0.0, "steps": 3}
ENDS = {
    label: ([f"{label}/{k}" for k in range(len(codes))], np.array(codes, np.float32))
    for label, codes in enumerate([[[-0.5, -0.5], [-0.3, -0.6]], [[0.8, -0.5]], [[-0.5, 0.8], [-0.4, 0.9]]])
}
WAYS = Ways("runner-up", "medoid", 2, "linear", 0, ENDS, np.concatenate([codes for _, codes in ENDS.values()]))
TARGETS = [2, 0, 1]  # of the three images, which are of classes 0, 1, 2: 2, 2 and 1 counter codes
FIRST = torch.tensor([[-0.5, 0.8], [-0.5, -0.5], [0.8, -0.5]])  # the first one of each


def seen() -> Seen:
    x = torch.cat([image(-0.2), image(0.6, -0.4, 1), image(-0.5, 0.7, 2)])
    code, individual = TOY.encode(x)
    return Seen(x, *B.probabilities(x).max(1), code, individual, TOY.decode(code, individual))


def oracle() -> BlackBox:
    """Another classifier, whose last linear layer is given five features."""
    torch.manual_seed(1)
    layers = nn.Flatten(), nn.Linear(3 * SIDE**2, 5), nn.Tanh(), nn.Linear(5, 3)
    return BlackBox(nn.Sequential(*layers), B.classes).eval().requires_grad_(False)


def worker(**changes: Any) -> MeasureWorker:
    """One whose networks are the toy world's."""
    made = object.__new__(MeasureWorker)
    given = {"blackbox": B, "cae": TOY, "oracle": None, "ways": WAYS, "own": OWN, "full": True, "size": SIDE,
             "device": "cpu", "draws": 2, "seed": 3, "smooth": 0.1, "smoothed": set(),
             "fills": get_args(Fill)}  # fmt: skip
    vars(made).update(given | changes)
    return made


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What `_measure` adds to the rows of three images, the second of which is located alone; maps by method."""
    monkeypatch.setattr(measure, "HEADLINE", 0.4)
    monkeypatch.setattr(measure, "CURVE", 0.6)  # two patches, and three
    kept, heat = random(3, SIDE, SIDE), random(3, SIDE, SIDE, seed=1) - 0.5
    heat[heat > 0.4] = 0.4  # ties
    asked: list[tuple[Any, ...]] = []

    def peer(*given: Any) -> Tensor:
        asked.append(given)
        return heat

    nothing = {"measured": False, "located": False, "shown": False, "donor": None}
    tasks = [nothing | {"measured": True, "located": True, "shown": True, "donor": "d", "donor_class": 1,
                        "donor_code": [0.7, -0.3]},
             nothing | {"located": True}, nothing | {"measured": True}]  # fmt: skip
    rows: list[dict[str, Any]] = [{"id": name} for name in "abc"]
    masks = torch.stack([BLOBS[0], BLOBS[1], 0 * BLOBS[0]]).bool()
    answers = [{"target": target, "map": list(values.flatten())} for target, values in zip(TARGETS, kept, strict=True)]
    with torch.no_grad():
        judge = worker(methods={"CAE": peer, "peer": peer}, smoothed={"peer"}, oracle=oracle())
        judge._measure(rows, tasks, seen(), masks, answers)
    (x, source, target, waypoints, counts), = asked  # not for CAE: that is the run's own map  # fmt: skip
    assert torch.equal(x, seen().x) and source.tolist() == [0, 1, 2] and target.tolist() == TARGETS
    assert counts == [2, 2, 1] and torch.equal(waypoints[[0, 2, 4], 0], FIRST)
    return rows, {"CAE": kept, "peer": heat, "peer, smoothed": blur(heat, 0.1)}


def test_maps_are_measured_as_their_definitions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, maps = measured(monkeypatch)
    of, masks = seen(), torch.stack([BLOBS[0], BLOBS[1]]).bool()
    for row in rows:
        assert [entry["method"] for entry in row["maps"]] == list(maps)
    for at, heat in enumerate(maps.values()):
        entries = [row["maps"][at] for row in rows]
        known = {"pointing": metrics.pointing_game, "energy": metrics.energy_in_mask,
                 "iou": metrics.iou_at_equal_area, "auroc": metrics.pixel_auroc}  # fmt: skip
        for name, how in known.items():
            assert [entries[k][name] for k in (0, 1)] == pytest.approx(how(heat[:2], masks).float().tolist())
            assert name not in entries[2]  # of which no truth is known
        assert "curves" not in entries[1] and "map" not in entries[1] and "map" not in entries[2]
        assert np.array_equal(entries[0]["map"], heat[0].flatten().half().numpy())
        for k in (0, 2):
            entry, one = entries[k], slice(k, k + 1)
            assert entry["tie_share"] == pytest.approx(metrics.tie_share(heat[one]).item())
            for form, disjoint in (("disjoint", True), ("paper", False)):
                centres = metrics.rank_centres(heat[one], 2, disjoint=disjoint, seed=3)
                steps = metrics.covering_step(centres, SIDE, SIDE)
                assert entry[f"covered_{form}"] == pytest.approx((steps < 2).float().mean().item())
            assert [curve["fill"] for curve in entry["curves"]] == ["uniform", "blur", "inpaint"]
            for curve in entry["curves"]:
                given = B, of.x[one], heat[one], of.source[one]
                common: dict[str, Any] = {"fill": curve["fill"], "seed": 3}
                slow = {"disjoint": {"steps": 2, "draws": 2}, "paper": {"steps": 2, "draws": 2, "disjoint": False},
                        "long": {"steps": 3, "draws": 1}}  # fmt: skip
                for form, how in slow.items():
                    expected = metrics.perturbation_curve(*given, **common, **how)[0]  # type: ignore[arg-type]
                    assert curve[form] == pytest.approx(expected.tolist(), abs=1e-6), (curve["fill"], form)
                areas = metrics.insertion_deletion(*given, steps=AREA_STEPS, draws=1, **common)
                assert curve["insertion"] == pytest.approx(areas.insertion_area.item(), abs=1e-6)
                assert curve["deletion"] == pytest.approx(areas.deletion_area.item(), abs=1e-6)


def test_counterfactuals_are_measured_as_their_definitions_say(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = measured(monkeypatch)
    of, judge = seen(), oracle()
    assert "counterfactuals" not in rows[1] and "features" not in rows[1]
    kinds = {"a": ["reconstruction", "explanation", "swap"], "c": ["reconstruction", "explanation"]}
    for k in (0, 2):
        row, one = rows[k], slice(k, k + 1)
        np.testing.assert_allclose(row["features"], judge.net[:3](of.x[one])[0], atol=1e-5)
        assert [entry["kind"] for entry in row["counterfactuals"]] == kinds[row["id"]]
        towards = {"reconstruction": (of.source[k], of.code[k]), "explanation": (torch.tensor(TARGETS[k]), FIRST[k]),
                   "swap": (torch.tensor(1), torch.tensor([0.7, -0.3]))}  # fmt: skip
        for entry in row["counterfactuals"]:
            target, end = towards[entry["kind"]]
            made = TOY.decode(end[None], of.individual[one])
            if entry["kind"] == "explanation":  # which ends where the class changes
                made = explain(TOY, B, of.x[one], of.source[one], target[None], end[None], **OWN).frames[:, -1]
            assert entry["target"] == target
            assert entry["valid"] == (B.probabilities(made).argmax(1) == target).item()
            assert entry["oracle_valid"] == (judge.probabilities(made).argmax(1) == target).item()
            difference = made - of.x[one]
            assert entry["l1"] == pytest.approx(difference.abs().mean().item(), abs=1e-6)
            assert entry["l2"] == pytest.approx(difference.square().mean().sqrt().item(), abs=1e-6)
            same = (difference.abs().amax(1) < 0.1).float().mean().item()
            assert entry["sparsity"] == pytest.approx(same)
            identity = counterfactuals.identity(of.individual[one], TOY.encode(made)[1]).item()
            assert entry["identity"] == pytest.approx(identity, abs=1e-5)
            np.testing.assert_allclose(entry["features"], judge.net[:3](made)[0], atol=1e-5)
            if entry["kind"] == "reconstruction":
                assert "way" not in entry
                continue
            shares = [torch.lerp(of.code[k], end, step / (WALK - 1)) for step in range(WALK)]
            frames = TOY.decode(torch.stack(shares), of.individual[one].expand(WALK, -1, -1, -1))
            assert entry["way"] == pytest.approx(B.probabilities(frames)[:, target].tolist(), abs=1e-5)


def test_the_way_to_an_explanation_is_walked_with_the_code_that_was_fitted_to_the_image() -> None:
    dim, own, x = cast(CAE, Dim()), OWN | {"inversion": 8}, image(0.315)
    code, individual = dim.encode(x)
    of = Seen(x, *B.probabilities(x).max(1), code, individual, dim.decode(code, individual))
    rows: list[dict[str, Any]] = [{"id": "a"}]
    tasks = [{"measured": True, "located": False, "shown": False, "donor": None}]
    answers = [{"target": 0, "map": [0.0] * SIDE**2}]
    worker(cae=dim, own=own, methods={})._measure(rows, tasks, of, torch.zeros(1, SIDE, SIDE).bool(), answers)
    _, made = rows[0]["counterfactuals"]
    end = explain(dim, B, x, of.source, torch.tensor([0]), FIRST[1:2], **own)
    assert end.inversion_steps > 0 and made["way"][0] == pytest.approx(end.p_target[0, 0].item(), abs=1e-5)
    assert abs(B.probabilities(of.reconstruction)[0, 0].item() - made["way"][0]) > 0.01  # by the encoder's own


def test_swaps_and_new_codes_are_decoded_with_the_images_own_individual_codes() -> None:
    of, judge = seen(), oracle()
    rows: list[dict[str, Any]] = [{} for _ in range(3)]
    tasks = [{"donor": f"d{k}", "donor_class": target, "donor_code": FIRST[k].numpy(),
              "other_donors": [((target + n) % 3, FIRST[k - n].numpy()) for n in (1, 2)]}
             for k, target in enumerate(TARGETS)]  # fmt: skip
    worker(oracle=judge)._swap(rows, tasks, of)
    swaps = of.individual + paint(FIRST)
    p = B.probabilities(swaps)
    for k, row in enumerate(rows):
        assert (row["donor"], row["swap_target"], row["swap_predicted"]) == (f"d{k}", TARGETS[k], int(p[k].argmax()))
        assert row["swap_p"] == pytest.approx(p[k, TARGETS[k]].item(), abs=1e-4)
    decoded = TOY.decode(FIRST, of.individual)
    assert [row["oracle_image"] for row in rows] == judge.probabilities(of.x).argmax(1).tolist()
    assert [row["oracle_swap"] for row in rows] == judge.probabilities(decoded).argmax(1).tolist()
    for n in (1, 2):
        others = TOY.decode(FIRST.roll(n, 0), of.individual)
        expected = [B.probabilities(others).argmax(1).tolist(), judge.probabilities(others).argmax(1).tolist()]
        told = [row["other_swaps"][n - 1] for row in rows]
        assert [[one[name] for one in told] for name in ("swap_predicted", "oracle_swap")] == expected
        assert [one["swap_target"] for one in told] == [(target + n) % 3 for target in TARGETS]
    codes = torch.rand(70, 2, generator=torch.Generator().manual_seed(0)) * 1.5 - 0.75
    expected = B.probabilities(TOY.decode(codes, of.individual[1:2].expand(70, -1, -1, -1))).argmax(1).tolist()
    assert worker()._decode_new({"new_codes": list(codes.numpy())}, of.individual[1]) == expected
    assert set(expected) == {0, 1, 2}


def test_rows_tell_what_the_classifier_sees_in_reconstructions_and_how_far_off_they_are() -> None:
    class Dark(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return B(x) - torch.tensor([0.0, 90.0, 0.0]) * (x[:, 0, 8, 8] > 0.5)[:, None]

    of = seen()
    of.reconstruction[1, :, 8, 8] = 0.9  # where this classifier looks, too
    rows = worker(blackbox=BlackBox(Dark(), B.classes))._rows({"split": "val"}, list("abc"), of)
    assert [row["source"] for row in rows] == [0, 1, 2] and [row["id"] for row in rows] == list("abc")
    assert [row["reconstruction_predicted"] for row in rows] == [0, 0, 2] and {row["split"] for row in rows} == {"val"}
    errors = [(of.reconstruction[k] - of.x[k]).abs().mean().item() for k in range(3)]
    assert [row["reconstruction_error"] for row in rows] == pytest.approx(errors)
    for k, row in enumerate(rows):
        for name, images in (("image", of.x), ("reconstruction", of.reconstruction)):
            expected = metrics.grid_energy(images[k : k + 1].mean(1), 2).item()
            assert row[f"grid2/{name}"] == pytest.approx(expected, rel=1e-4)
            assert f"grid4/{name}" not in row  # too small for it


def test_what_is_not_finite_is_seen_as_no_class() -> None:
    """The greatest of not-a-numbers is the first class for argmax: a broken image would count as a swap to it."""
    of, whole = seen(), seen()
    of.reconstruction[1, :, 2, 2] = of.individual[2] = torch.nan
    rows = worker()._rows({"split": "val"}, list("abc"), of)
    tasks: list[dict[str, Any]] = [{"donor": "d", "donor_class": 0, "other_donors": []}] * 3
    assert [row["reconstruction_predicted"] for row in rows] == [0, -1, 2]
    for task in tasks:
        task["donor_code"] = whole.code[0].tolist()
    judge = worker(oracle=B)
    judge._swap(rows, tasks, of)
    assert [row["swap_predicted"] >= 0 for row in rows] == [True, True, False] and rows[2]["swap_predicted"] == -1
    assert rows[2]["oracle_swap"] == -1 and rows[2]["oracle_image"] == 2
    assert judge._decode_new({"new_codes": whole.code.tolist()}, of.individual[2]) == [-1] * 3


def test_each_image_of_a_portion_gets_what_its_own_task_asks_for(tmp_path: Path) -> None:
    arrays = to_array(seen().x)
    x = to_tensor(arrays)
    _, individual = TOY.encode(x)
    source, maps = B.probabilities(x).argmax(1), random(3, SIDE, SIDE)
    explained = {"id": list("cab"), "status": ["flipped"] * 3, "target": [1, 2, 0], "p_target_start": [0.1] * 3,
                 "map": list(maps[[2, 0, 1]].flatten(1).numpy())}  # fmt: skip
    write_table(Run(str(tmp_path)), "explanations/part.parquet", pa.table(explained))
    donor = {"donor": "d", "donor_class": 2, "donor_code": [-0.5, 0.8], "other_donors": []}
    nothing = {"measured": False, "located": False, "shown": False, "donor": None, "new_codes": []}
    tasks = [nothing | {"measured": True}, nothing | donor, nothing | {"measured": True}]
    given = {"id": list("abc"), "image": [encode_png(array) for array in arrays], "mask": pa.nulls(3, pa.binary())}
    judge = worker(run=Run(str(tmp_path)), fit="crop", methods={"CAE": None}, fills=("uniform",), full=False)
    unit = {"split": "val", "shard": "split=val/0.parquet", "explanations": "part.parquet"}
    rows = judge._portion(unit, tasks, pa.table(given))
    assert [row["id"] for row in rows] == list("abc") and [row["measured"] for row in rows] == [True, False, True]
    for k, row in enumerate(rows):  # held against the one before
        others = counterfactuals.identity(individual[k : k + 1], individual[[k - 1]])
        assert row["identity_of_others"] == pytest.approx(others.item())
    assert ["swap_predicted" in row for row in rows] == [False, True, False]
    p = B.probabilities(individual[1:2] + paint(FIRST[:1]))[0, 2].item()
    assert rows[1]["swap_p"] == pytest.approx(p, abs=1e-5)
    assert ["maps" in row for row in rows] == [True, False, True]
    steps = metrics.disjoint_steps(SIDE)
    for k, target in ((0, 2), (2, 1)):
        (entry,), one = rows[k]["maps"], slice(k, k + 1)
        curve = metrics.perturbation_curve(B, x[one], maps[one], source[one], steps=steps, draws=2, seed=3)
        assert entry["curves"][0]["disjoint"] == pytest.approx(curve[0].tolist(), abs=1e-6)
        assert rows[k]["counterfactuals"][1]["target"] == target


def test_masks_are_where_the_truth_is_bright_and_nowhere_where_none_is_known() -> None:
    drawn = (random(SIDE, SIDE) * 255).byte().numpy()
    found = worker()._masks([encode_png(drawn), None])
    assert np.array_equal(found[0].numpy(), drawn > 127) and not found[1].any()


def test_methods_explain_the_classifiers_own_class_but_for_caes_which_lead_to_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "AT_ONCE", 4)  # of two donors two images at once
    of, target = seen(), torch.tensor(TARGETS)
    waypoints, counts = measure.waypoints_of(WAYS, ["a", "b", "c"], of.code, target)
    modes = {"CAE": OWN, "CAE path": OWN | {"mode": "path"}}
    found = methods(B, TOY, modes, full=True, seed=3)
    of_task = of.x, of.source, target, waypoints, counts
    each = torch.tensor([0, 0, 1, 1, 2])
    for name, how in modes.items():
        slow = over_donors(explain(TOY, B, of.x[each], of.source[each], target[each], waypoints, **how), counts).map
        torch.testing.assert_close(found[name](*of_task), slow)
    baseline = blur(of.x, 1 / 8)
    slow = {
        "occlusion": occlusion(B, of.x, of.source),
        "integrated gradients": integrated_gradients(B, of.x, of.source),
        "integrated gradients, blur": integrated_gradients(B, of.x, of.source, baseline=baseline),
        "random": controls.random_map(of.x, 3),
        "Sobel": controls.sobel(of.x),
        "centre": controls.centre(of.x),
        "|x - reconstruction|": (of.x - of.reconstruction).abs().mean(1),
    }
    for name, expected in slow.items():
        torch.testing.assert_close(found[name](*of_task), expected)
    brief = methods(B, TOY, modes, full=False)
    assert set(brief) == {*modes, "Grad-CAM", "random", "Sobel", "centre", "|x - reconstruction|"}


def test_a_classifier_without_a_gradient_is_explained_by_all_peers_that_only_ask() -> None:
    class Answers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return B(x).detach()

    asks, of = BlackBox(Answers(), B.classes, differentiable=False), seen()
    found, works = methods(asks, TOY, {}, full=True), set()
    for name in set(found) - set(measure.CONTROLS):
        try:
            found[name](of.x[:1], of.source[:1])  # type: ignore[call-arg]
        except ValueError as error:
            assert "needs the classifier's gradient" in str(error)
        else:
            works.add(name)
    assert works == {"occlusion", "LIME", "RISE"}


def test_what_draws_at_random_draws_by_the_seed() -> None:
    of = seen()
    first, same, other = (methods(B, TOY, {}, full=True, seed=seed) for seed in (3, 3, 4))
    for name in ("RISE", "LIME", "random"):
        maps, again, others = (
            found[name](of.x[:1], of.source[:1], *3 * [None])  # type: ignore[list-item]
            for found in (first, same, other)
        )
        assert torch.equal(maps, again) and not torch.equal(maps, others), name


def test_a_device_that_has_failed_is_no_fault_of_the_method() -> None:
    def fails(*_: Any) -> Tensor:
        raise torch.AcceleratorError

    task = {"measured": True, "located": False, "shown": False, "donor": None}
    answers = [{"target": TARGETS[0], "map": [0.0] * SIDE**2}]
    judge = worker(methods={"peer": fails})
    with pytest.raises(torch.AcceleratorError):
        judge._measure([{"id": "a"}], [task], seen()[[0]], BLOBS[:1].bool(), answers)


def test_of_several_targets_the_one_that_is_likeliest_in_the_reconstruction_is_measured(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    table = {"id": list("aabba"), "status": ["flipped", "flipped", "flipped", "failed", "unflipped"],
             "target": [1, 2, 1, 2, 3], "p_target_start": [0.1, 0.3, 0.2, 0.9, 0.2],
             "map": [[float(k)] for k in range(5)]}  # fmt: skip
    write_table(run, "explanations/part.parquet", pa.table(table))
    found = answered(run, "part.parquet", ["a", "b"])
    assert {name: (row["target"], row["map"]) for name, row in found.items()} == {"a": (2, [1.0]), "b": (1, [2.0])}
    assert set(answered(run, "part.parquet", ["b"])) == {"b"} and answered(run, "part.parquet", []) == {}
