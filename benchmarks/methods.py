"""What benchmarks share: a run's networks and images, which of these belong together, the maps of every method, and how
alike they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cae import classifiers, training
from cae.classifiers import BlackBox
from cae.explain import PAPER_MODES, Mode, explain
from cae.images import to_tensor
from cae.metrics import paired_bootstrap
from cae.networks import CAE
from cae.peers.table import Peer, peers
from cae.sanity import rank_correlation, structural_similarity
from pipelines.bulk import read_images, read_table
from pipelines.cluster import place
from pipelines.maps import BATCH, choose_targets
from pipelines.run import Run
from pipelines.shard import read_groups
from pipelines.ways import read_medoids

Method = Callable[[BlackBox, Tensor, Tensor, Tensor], Tensor]
"""Classifier, images (B, 3, H, W), the class it gives them (B,), the class to walk to (B,) -> maps (B, H, W)."""


def networks(run: Run, bf16: bool = False) -> tuple[BlackBox, CAE]:
    """A run's classifier and CAE; with `bf16` they answer in bfloat16."""
    chosen = run.result("classify")
    blackbox = classifiers.load(chosen["spec"], tuple(chosen["classes"]))
    return place(blackbox, "cpu", bf16), place(training.load(run.path("cae")), "cpu", bf16)


def read_counter_codes(run: Run) -> dict[int, tuple[str, np.ndarray]]:
    """Class index -> id and class code of the training image whose code stands for the class."""
    return {label: (ids[0], codes[0]) for label, (ids, codes) in read_medoids(run).items()}


def groups_of(run: Run, ids: Iterable[str]) -> list[str]:
    """What each image is drawn together with in intervals, as in stage evaluate."""
    ids = list(ids)
    groups = read_groups(run, ids)
    return [groups[name] for name in ids]


def runner_up(run: Run, p: Tensor) -> Tensor:
    """The class (B,) that stage explain walks to by default from images of probabilities p (B, C)."""
    names = tuple(run.result("classify")["classes"])
    return torch.tensor([target for _, target in choose_targets(p, "runner-up", names, read_medoids(run))])


def examples(run: Run, blackbox: BlackBox, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Images of the split val (all, where there are fewer), the classifier's class for each and the one to walk to,
    and the images' groups."""
    table = read_table(run, "codes", ["id", "split"]).to_pandas()
    ids = table[table.split == "val"].id
    ids = ids.sample(min(count, len(ids)), random_state=seed).to_numpy()
    options = run.state["options"]
    x = to_tensor(read_images(run, ids, options["model"]["image_size"], options["fit"]))
    p = blackbox.probabilities(x)
    return x, p.argmax(1), runner_up(run, p), groups_of(run, ids)


def methods(run: Run, cae: CAE) -> dict[str, Method]:
    """The CAE in each of its modes, towards the run's codes of the classes, and every peer, by name.

    Maps of modes `path`, `contrast` and `input` are not smoothed, as in the paper; no image is inverted, where the
    pipeline inverts the few per cent whose reconstruction has lost their class.
    """
    counters = {label: torch.from_numpy(code) for label, (_, code) in read_counter_codes(run).items()}
    modes = {f"CAE, {mode}": partial(_of_cae, cae, counters, mode) for mode in get_args(Mode)}
    return modes | {name: partial(_of_peer, peer) for name, peer in peers(cae).items()}


def alikeness(a: Tensor, b: Tensor, groups: Sequence[str] | None = None) -> dict[str, object]:
    """How alike each two maps of a and b (N, H, W) are, mean over N; of the rank correlation with its 95% interval, for
    which images of one of the `groups` (N) are drawn together."""
    rank = rank_correlation(a, b)
    mean, low, high = paired_bootstrap(rank, torch.zeros_like(rank), groups=groups)
    return {"images": len(rank), "spearman": f"{mean:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}",
            "ssim": f"{float(structural_similarity(a, b).mean()):.3f}"}  # fmt: skip


def maps_to(cae: CAE, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor, codes: Tensor,
            mode: Mode | Literal["auto"] = "auto") -> Tensor:  # fmt: skip
    """The CAE's maps (B, H, W) on the way to class codes (B, D)."""
    chunks = zip(*(given.split(BATCH) for given in (x, source, target, codes)), strict=True)
    smooth = {"smooth": 0.0} if mode in PAPER_MODES else {}
    return torch.cat([explain(cae, blackbox, *chunk, mode=mode, **smooth).map for chunk in chunks])


def _of_cae(
    cae: CAE, counters: dict[int, Tensor], mode: Mode, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor
) -> Tensor:
    return maps_to(cae, blackbox, x, source, target, torch.stack([counters[label] for label in target.tolist()]), mode)


def _of_peer(peer: Peer, blackbox: BlackBox, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.cat(
        [peer.maps(blackbox, a, b).detach() for a, b in zip(x.split(BATCH), source.split(BATCH), strict=True)]
    )
