"""What stage evaluate measures on every image: swaps, counterfactuals, and maps by every method.

Legend: B images, D numbers in the class code, K frames, S side. A worker gives one row per image; what is measured of
it by several methods, or several times over, lies in lists in that row, and `pipelines.tables` takes it apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cae import classifiers, counterfactuals, metrics, training
from cae.classifiers import BlackBox, decided
from cae.data import first_line
from cae.explain import along, explain, images_at_once, over_donors
from cae.images import Fit, blur, load, to_tensor
from cae.metrics import Fill
from cae.networks import CAE
from cae.peers import controls
from cae.peers.table import Peer, peers
from pipelines.bulk import Unit, decode_all, read_unit
from pipelines.cluster import place
from pipelines.run import Run
from pipelines.ways import Ways

CURVE = 0.3  # share of the image to which perturbation curves are drawn
HEADLINE = 0.075  # share of the image over which AOPC is taken: the paper's 100 patches of 7x7 on 256x256
AREA_STEPS = 10  # of the insertion and deletion curves
STRIDES = (2, 4)  # of the encoders' convolutions and of the decoder's upsampling
WALK = 9  # frames of a straight path between two class codes
AT_ONCE = 16  # images that a method is given, or walked with, at once
CONTROLS = ("random", "Sobel", "centre", "|x - reconstruction|")
BRIEF_PEERS = ("Grad-CAM",)
ALREADY_SMOOTH = ("centre",)  # controls that a blur would only turn into themselves
SMOOTHED = ", smoothed"  # behind a peer's or control's name: its maps after the blur that CAE's get
Method = Callable[[Tensor, Tensor, Tensor, Tensor, list[int]], Tensor]
"""Images (B, 3, S, S), b's classes (B,), classes to walk to (B,), waypoints of all paths there (n, W, D) and how many
of these paths are each image's, in turn (B,) -> maps (B, S, S)."""
# What a method says by raising when it cannot work with a classifier: one without gradients or layers, for example.
UNFIT = (ValueError, RuntimeError, AttributeError, TypeError)


def methods(
    blackbox: BlackBox, cae: CAE, modes: dict[str, dict[str, Any]], full: bool, seed: int = 0
) -> dict[str, Method]:
    """Every method of making maps, by its name in tables: CAE, peers (Grad-CAM alone if not `full`) and controls.

    `modes` gives the names of the CAE's own and, for each, what `explain` takes.
    """

    def of_cae(how: dict[str, Any], x: Tensor, source: Tensor, target: Tensor, waypoints: Tensor,
               counts: list[int]) -> Tensor:  # fmt: skip
        maps, first = [], 0
        for rows in torch.arange(len(x)).split(max(1, AT_ONCE // max(counts))):  # of many donors fewer images at once
            own = counts[rows[0] : rows[-1] + 1]
            each, there = rows.repeat_interleave(torch.tensor(own)).to(x.device), waypoints[first : first + sum(own)]
            paths = explain(cae, blackbox, x[each], source[each], target[each], there, **how)
            maps.append(over_donors(paths, own).map)
            first += sum(own)
        return torch.cat(maps)

    def of_peer(peer: Peer, x: Tensor, source: Tensor, *_: Any) -> Tensor:
        if peer.gradient and not blackbox.differentiable:
            raise ValueError("it needs the classifier's gradient, and this one gives outputs only")
        return peer.maps(blackbox, x, source).detach()

    @torch.no_grad()
    def against_reconstruction(x: Tensor, *_: Any) -> Tensor:
        return controls.reconstruction_error(x, cae.decode(*cae.encode(x)))

    found: dict[str, Method] = {name: partial(of_cae, how) for name, how in modes.items()}
    for name, peer in peers(cae, seed).items():
        if full or name in BRIEF_PEERS:
            found[name] = partial(of_peer, peer)
    known_nothing: tuple[Method, ...] = (
        lambda x, *_: controls.random_map(x, seed),
        lambda x, *_: controls.sobel(x),
        lambda x, *_: controls.centre(x),
        against_reconstruction,
    )
    return found | dict(zip(CONTROLS, known_nothing, strict=True))


@torch.no_grad()
def walk(
    cae: CAE, blackbox: BlackBox, start: Tensor, waypoints: Tensor, individual: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """WALK frames (B, K, 3, H, W) at even places from class codes `start` (B, D) along `waypoints` (B, W, D), of one
    individual code (B, …) each, and b's probability (B, K) of `target` (B,) in them."""
    corners, shares = torch.cat([start[:, None], waypoints], 1), torch.linspace(0, 1, WALK, device=start.device)
    frames = [cae.decode(along(corners, t.expand(len(start))), individual) for t in shares]
    p = [blackbox.probabilities(frame).gather(1, target[:, None])[:, 0] for frame in frames]
    return torch.stack(frames, 1), torch.stack(p, 1)


def waypoints_of(ways: Ways, ids: list[str], code: Tensor, target: Tensor) -> tuple[Tensor, list[int]]:
    """Waypoints (n, W, D) of the paths from class codes (B, D) to the classes `target` (B,), and how many are whose."""
    donors, waypoints = ways.find(ids, code.float().cpu().numpy(), target.tolist())
    return torch.from_numpy(waypoints).to(code.device), [len(of_image) for of_image in donors]


def answered(run: Run, part: str, ids: list[str]) -> dict[str, dict[str, Any]]:
    """What stage explain said of these images: id -> row with `target` and `map`.

    Of several targets the one that the classifier finds likeliest in the reconstruction.
    """
    if not ids:
        return {}
    columns = ["id", "status", "target", "p_target_start", "map"]
    with run.fs.open(run.path("explanations", part)) as file:
        table = pq.read_table(file, columns=columns, filters=pc.field("id").isin(ids))
    rows = [row for row in table.to_pylist() if row["status"] != "failed"]
    return {row["id"]: row for row in sorted(rows, key=lambda row: row["p_target_start"])}


@dataclass(frozen=True)
class Seen:
    """B images, and what the networks make of them."""

    x: Tensor
    """(B, 3, S, S)."""
    p: Tensor
    """(B,) b's probability of the class that it gives each."""
    source: Tensor
    """(B,) that class."""
    code: Tensor
    """(B, D) class codes."""
    individual: Tensor
    """(B, …) individual codes."""
    reconstruction: Tensor
    """(B, 3, S, S)."""

    def __getitem__(self, index: list[int]) -> Seen:
        return Seen(*(getattr(self, field.name)[index] for field in fields(self)))


class MeasureWorker:
    """Measures the images that a unit's `tasks` name, each as far as its task says.

    A task has the `row` of its image in the shard, the `donor` whose class code is put into it (with `donor_class` and
    `donor_code`; or None), classes and codes of `other_donors`, of which the classes seen are all that is kept, the
    `new_codes` of `new_classes` that are decoded with its individual code, whether its maps are `measured` by
    destroying the image, and held to the truth where that is known (`located`), and `shown`, kept.
    """

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str, ways: Ways,
                 oracle: str, modes: dict[str, dict[str, Any]], full: bool, draws: int, seed: int,
                 smooth: float = 0, bf16: bool = False) -> None:  # fmt: skip
        self.run, self.size, self.fit, self.device, self.draws, self.seed = run, size, fit, device, draws, seed
        self.blackbox = place(classifiers.load(spec, names), device, bf16)
        self.oracle = place(classifiers.load(oracle, names), device, bf16) if oracle else None
        self.cae = place(training.load(run.path("cae")), device, bf16)
        self.ways = ways
        self.own, self.full = modes["CAE"], full
        self.methods = methods(self.blackbox, self.cae, modes, full, seed)
        # A blur may be all that a map is ahead by: peers and controls are measured with the one that the CAE's get too.
        others = set(self.methods) - set(modes) - set(ALREADY_SMOOTH)
        self.smooth, self.smoothed = smooth, others if smooth else set()
        self.fills: tuple[Fill, ...] = get_args(Fill) if full else ("uniform",)

    def __call__(self, unit: Unit) -> pa.Table:
        tasks = unit["tasks"]
        table = read_unit(self.run, unit).take([task["row"] for task in tasks])
        rows: list[dict[str, Any]] = []
        for some in np.array_split(np.arange(len(tasks)), -(-len(tasks) // AT_ONCE)):  # even ones: two images at least
            rows += self._portion(unit, [tasks[i] for i in some], table.take(some))
        return pa.Table.from_pylist(rows, SCHEMA)

    def _portion(self, unit: Unit, tasks: list[dict[str, Any]], table: pa.Table) -> list[dict[str, Any]]:
        """The rows of AT_ONCE images or fewer."""
        seen = self._see(table["image"].to_pylist())
        rows = self._rows(unit, table["id"].to_pylist(), seen)
        if len(rows) > 1:  # how much codes of different images are alike: what `identity` is to be read against
            others = counterfactuals.identity(seen.individual, seen.individual.roll(len(rows) // 2, 0))
            for row, value in zip(rows, others.tolist(), strict=True):
                row["identity_of_others"] = value
        swaps = [i for i, task in enumerate(tasks) if task["donor"] is not None]
        if swaps:
            self._swap([rows[i] for i in swaps], [tasks[i] for i in swaps], seen[swaps])
        for row, task, individual in zip(rows, tasks, seen.individual, strict=True):
            row["measured"] = task["measured"]
            if task["new_codes"]:
                row |= {"new_classes": task["new_classes"], "new_predicted": self._decode_new(task, individual)}

        masks = self._masks(table["mask"].to_pylist())
        chosen = [i for i, task in enumerate(tasks) if task["measured"] or (task["located"] and bool(masks[i].any()))]
        if chosen:
            answers = answered(self.run, unit["explanations"], [rows[i]["id"] for i in chosen])
            answer = [answers[rows[i]["id"]] for i in chosen]
            self._measure([rows[i] for i in chosen], [tasks[i] for i in chosen], seen[chosen], masks[chosen], answer)
        return rows

    @torch.no_grad()
    def _see(self, images: list[bytes]) -> Seen:
        x = to_tensor(decode_all(images, self.size, self.fit)[0], self.device)
        code, individual = self.cae.encode(x)
        return Seen(x, *self.blackbox.probabilities(x).max(1), code, individual, self.cae.decode(code, individual))

    def _rows(self, unit: Unit, ids: list[str], seen: Seen) -> list[dict[str, Any]]:
        found = decided(self.blackbox.probabilities(seen.reconstruction))
        error = (seen.reconstruction - seen.x).abs().mean((1, 2, 3))
        rows: list[dict[str, Any]] = [
            {"id": name, "split": unit["split"], "source": a, "reconstruction_predicted": b, "reconstruction_error": c}
            for name, a, b, c in zip(ids, seen.source.tolist(), found.tolist(), error.tolist(), strict=True)
        ]
        _measure_grid(rows, {"image": seen.x, "reconstruction": seen.reconstruction})
        return rows

    @torch.no_grad()
    def _swap(self, rows: list[dict[str, Any]], tasks: list[dict[str, Any]], seen: Seen) -> None:
        """Give the images the class codes of their donors, and see what the classifier (and the oracle) says."""

        def donate(donors: Iterable[tuple[int, list[float]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
            """The images with classes' codes put into them, b's probabilities of them, and what is seen in each."""
            targets, codes = zip(*donors, strict=True)
            swaps = self.cae.decode(self._tensor(codes), seen.individual)
            p = self.blackbox.probabilities(swaps)
            oracle = decided(self.oracle.probabilities(swaps)).tolist() if self.oracle else [None] * len(swaps)
            told = zip(targets, decided(p).tolist(), oracle, strict=True)
            return swaps, p, [{"swap_target": a, "swap_predicted": b, "oracle_swap": c} for a, b, c in told]

        donated, p, seen_in = donate((task["donor_class"], task["donor_code"]) for task in tasks)
        for row, task, one, of_swap in zip(rows, tasks, seen_in, p.tolist(), strict=True):
            row |= {"donor": task["donor"], **one, "swap_p": of_swap[one["swap_target"]], "other_swaps": []}
        _measure_grid(rows, {"swap": donated})
        for others in zip(*(task["other_donors"] for task in tasks), strict=True):
            for row, one in zip(rows, donate(others)[2], strict=True):
                row["other_swaps"].append(one)
        if self.oracle is not None:
            for row, of_image in zip(rows, decided(self.oracle.probabilities(seen.x)).tolist(), strict=True):
                row["oracle_image"] = of_image

    @torch.no_grad()
    def _decode_new(self, task: dict[str, Any], individual: Tensor) -> list[int]:
        """b's classes for new class codes, decoded with an image's individual code."""
        codes = self._tensor(task["new_codes"])
        frames = [self.cae.decode(some, individual[None]) for some in codes.split(64)]
        return [label for frame in frames for label in decided(self.blackbox.probabilities(frame)).tolist()]

    def _masks(self, masks: list[bytes | None]) -> Tensor:
        """Where the truth lies, bool (B, S, S): all False where it is not known."""
        empty = np.zeros((self.size, self.size), bool)
        return torch.from_numpy(np.stack([
            empty if mask is None else np.asarray(load(mask).resize((self.size, self.size)))[..., 0] > 127
            for mask in masks
        ])).to(self.device)  # fmt: skip

    def _measure(self, rows: list[dict[str, Any]], tasks: list[dict[str, Any]], seen: Seen, masks: Tensor,
                 answers: list[dict[str, Any]]) -> None:  # fmt: skip
        """Measure the maps of images whose explanations are `answers`; of measured ones, the counterfactuals too."""
        target = torch.tensor([answer["target"] for answer in answers], device=self.device)
        waypoints, counts = waypoints_of(self.ways, [row["id"] for row in rows], seen.code, target)
        kept = self._tensor([answer["map"] for answer in answers]).view(-1, self.size, self.size)
        _measure_grid(rows, {"map": kept[:, None]})
        for row in rows:
            row["maps"] = []
        for name, method in self.methods.items():
            try:
                # What is measured under the name CAE is what the run has given its user.
                heat = kept if name == "CAE" else method(seen.x, seen.source, target, waypoints, counts)
            except torch.AcceleratorError:  # not the method's fault: nothing can be computed in this process any more
                raise
            except UNFIT as error:
                for row in rows:
                    row["maps"].append({"method": name, "error": first_line(error)})
                continue
            self._judge(name, heat, rows, tasks, seen, masks)
            if name in self.smoothed:
                self._judge(name + SMOOTHED, blur(heat, self.smooth), rows, tasks, seen, masks)

        judged = [k for k, task in enumerate(tasks) if task["measured"]]
        if judged:
            chosen, of = seen[judged], [rows[k] for k in judged]
            for row, features in zip(of, self._features(chosen.x), strict=True):
                row |= {"features": features, "counterfactuals": []}
            self._counterfactual("reconstruction", of, chosen, chosen.reconstruction, chosen.source)
            first = waypoints[np.cumsum([0, *counts])[judged]]  # of several counter codes of an image
            end = explain(self.cae, self.blackbox, chosen.x, chosen.source, target[judged], first, **self.own)
            way = walk(self.cae, self.blackbox, chosen.code, first, end.individual_code, target[judged])[1]
            self._counterfactual("explanation", of, chosen, end.frames[:, -1], target[judged], way)
        swapped = [k for k in judged if tasks[k]["donor"] is not None]
        if swapped:
            chosen, code = seen[swapped], self._tensor([tasks[k]["donor_code"] for k in swapped])
            aim = torch.tensor([tasks[k]["donor_class"] for k in swapped], device=self.device)
            frames, way = walk(self.cae, self.blackbox, chosen.code, code[:, None], chosen.individual, aim)
            self._counterfactual("swap", [rows[k] for k in swapped], chosen, frames[:, -1], aim, way)

    def _judge(self, method: str, heat: Tensor, rows: list[dict[str, Any]], tasks: list[dict[str, Any]], seen: Seen,
               masks: Tensor) -> None:  # fmt: skip
        """Add to the rows how well their maps `heat` meet the truth, and what destroying their top pixels does."""
        found: list[dict[str, Any]] = [{"method": method} for _ in rows]
        for row, entry in zip(rows, found, strict=True):
            row["maps"].append(entry)
        finite = heat.isfinite().flatten(1).all(1).tolist()
        for entry, fine in zip(found, finite, strict=True):
            if not fine:
                entry["error"] = "the map holds values that are not finite"
        known = masks.flatten(1).any(1).tolist()
        located = [
            k for k, task in enumerate(tasks) if finite[k] and known[k] and (task["located"] or task["measured"])
        ]
        if located:
            given = heat[located], masks[located]
            measures = {
                "pointing": metrics.pointing_game(*given, seed=self.seed),
                "energy": metrics.energy_in_mask(*given),
                "iou": metrics.iou_at_equal_area(*given, seed=self.seed),
                "auroc": metrics.pixel_auroc(*given),
            }
            for spot, k in enumerate(located):
                found[k] |= {name: float(values[spot]) for name, values in measures.items()}
        perturbed = [k for k, task in enumerate(tasks) if finite[k] and task["measured"]]
        if perturbed:
            for k, entry in zip(perturbed, self._destroy(seen[perturbed], heat[perturbed]), strict=True):
                found[k] |= entry
        for k, task in enumerate(tasks):
            if finite[k] and task["shown"]:
                found[k]["map"] = heat[k].flatten().half().cpu().numpy()

    def _destroy(self, seen: Seen, heat: Tensor) -> list[dict[str, Any]]:
        """For each image its map's ties, the area that either form covers, and curves under every fill."""
        count, most = (metrics.disjoint_steps(self.size, share) for share in (HEADLINE, CURVE))
        found: list[dict[str, Any]] = [{"tie_share": share, "curves": []} for share in metrics.tie_share(heat).tolist()]
        for form, disjoint in (("disjoint", True), ("paper", False)):
            centres = metrics.rank_centres(heat, count, disjoint=disjoint, seed=self.seed)
            covered = metrics.covered_share(metrics.covering_step(centres, self.size, self.size), count)[:, -1]
            for entry, share in zip(found, covered.tolist(), strict=True):
                entry[f"covered_{form}"] = share
        given = self.blackbox, seen.x, heat, seen.source
        batch = images_at_once(seen.x, self.blackbox)
        common: dict[str, Any] = {"seed": self.seed, "batch": batch, "whole": seen.p}
        for fill in self.fills:
            curve = partial(metrics.perturbation_curve, *given, fill=fill, **common)
            long = curve(steps=most, draws=1)
            # The long curve begins with the short one; only the noise asks for more draws of that.
            more = fill == "uniform" and self.draws > 1
            short = curve(steps=count, draws=self.draws) if more else long[:, :count]
            columns = {"disjoint": short, "paper": curve(steps=count, draws=self.draws, disjoint=False), "long": long}
            if self.full:
                areas = metrics.insertion_deletion(*given, steps=AREA_STEPS, fill=fill, draws=1, **common)
                columns |= {"insertion": areas.insertion_area, "deletion": areas.deletion_area}
            lists = {name: values.tolist() for name, values in columns.items()}
            for k, entry in enumerate(found):
                entry["curves"].append({"fill": fill} | {name: values[k] for name, values in lists.items()})
        return found

    @torch.no_grad()
    def _counterfactual(self, kind: str, rows: list[dict[str, Any]], seen: Seen, images: Tensor, target: Tensor,
                        way: Tensor | None = None) -> None:  # fmt: skip
        """Add to the rows how good `images` are, made of those seen to be of class `target` (B,), b's probability of it
        on the way there being `way` (B, K)."""
        l1, l2 = counterfactuals.proximity(seen.x, images)
        measures = {
            "target": target, "valid": counterfactuals.validity(self.blackbox, images, target), "l1": l1, "l2": l2,
            "sparsity": counterfactuals.sparsity(seen.x, images),
            "identity": counterfactuals.identity(seen.individual, self.cae.encode(images)[1]),
        }  # fmt: skip
        if self.oracle is not None:
            measures["oracle_valid"] = counterfactuals.validity(self.oracle, images, target)
        if way is not None:
            measures["way"] = way
        lists = {name: values.tolist() for name, values in measures.items()} | {"features": self._features(images)}
        for k, row in enumerate(rows):
            row["counterfactuals"].append({"kind": kind} | {name: values[k] for name, values in lists.items()})

    @torch.no_grad()
    def _features(self, images: Tensor) -> list[Any]:
        """What the last linear layer is given, for KID; None for each image if there is none. The oracle's, where there
        is one: b's own gradient may have trained the CAE to make whatever b takes for an image of a class."""
        judge = self.blackbox if self.oracle is None else self.oracle
        try:
            return list(counterfactuals.penultimate(judge)(images).float().cpu().numpy())
        except UNFIT:
            return [None] * len(images)

    def _tensor(self, values: Iterable[Any]) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(value, np.float32) for value in values])).to(self.device)


def _measure_grid(rows: list[dict[str, Any]], images: dict[str, Tensor]) -> None:
    """Add to rows how strong a grid is in each of their images (B, channels, S, S), if those are not too small."""
    for name, image in images.items():
        for stride in STRIDES:
            if image.shape[-1] >= 8 * stride:
                for row, value in zip(rows, metrics.grid_energy(image.mean(1), stride).tolist(), strict=True):
                    row[f"grid{stride}/{name}"] = value


_FLOATS = pa.list_(pa.float32())
_CURVES = {"fill": pa.string(), "disjoint": _FLOATS, "paper": _FLOATS, "long": _FLOATS, "insertion": pa.float32(),
           "deletion": pa.float32()}  # fmt: skip
_MAPS = {
    "method": pa.string(),
    "error": pa.string(),  # null where there is a map
    "pointing": pa.float32(), "energy": pa.float32(), "iou": pa.float32(), "auroc": pa.float32(),
    "tie_share": pa.float32(), "covered_disjoint": pa.float32(), "covered_paper": pa.float32(),
    "curves": pa.list_(pa.struct(_CURVES)),
    "map": pa.list_(pa.float16()),
}  # fmt: skip
_COUNTERFACTUALS = {
    "kind": pa.string(), "target": pa.int32(), "valid": pa.bool_(), "oracle_valid": pa.bool_(), "l1": pa.float32(),
    "l2": pa.float32(), "sparsity": pa.float32(), "identity": pa.float32(), "features": _FLOATS, "way": _FLOATS,
}  # fmt: skip
SCHEMA = pa.schema(
    {
        "id": pa.string(), "split": pa.string(), "donor": pa.string(), "source": pa.int32(), "swap_target": pa.int32(),
        "reconstruction_predicted": pa.int32(), "swap_predicted": pa.int32(), "swap_p": pa.float32(),
        "oracle_image": pa.int32(), "oracle_swap": pa.int32(),
        "other_swaps": pa.list_(pa.struct(dict.fromkeys(("swap_target", "swap_predicted", "oracle_swap"), pa.int32()))),
        "measured": pa.bool_(), "reconstruction_error": pa.float32(),
    }
    | {f"grid{n}/{of}": pa.float32() for n in STRIDES for of in ("image", "reconstruction", "swap", "map")}
    | {
        "new_classes": pa.list_(pa.int32()), "new_predicted": pa.list_(pa.int32()),
        "features": _FLOATS, "identity_of_others": pa.float32(),
        "maps": pa.list_(pa.struct(_MAPS)), "counterfactuals": pa.list_(pa.struct(_COUNTERFACTUALS)),
    }
)  # fmt: skip
