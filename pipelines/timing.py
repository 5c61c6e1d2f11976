"""What a map costs by each method: the same images, one process, one after the other; the paper's Table V."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cae import classifiers, training
from cae.images import Fit, to_tensor
from pipelines.bulk import Unit, decode_all, read_unit
from pipelines.cluster import place
from pipelines.measure import CONTROLS, UNFIT, answered, methods, waypoints_of
from pipelines.run import Run
from pipelines.ways import Ways

TIMED = 8  # images, given to each method as one batch
ROUNDS = 2  # over all methods; the faster one counts, as other work on the machine only ever adds


class TimeWorker:
    """Times every method, and the parts that a CAE's map is made of, on the images that a unit's `tasks` name."""

    def __init__(self, run: Run, spec: str, names: tuple[str, ...], size: int, fit: Fit, device: str, ways: Ways,
                 modes: dict[str, dict[str, Any]], bf16: bool = False) -> None:  # fmt: skip
        self.run, self.size, self.fit, self.device = run, size, fit, device
        self.blackbox = place(classifiers.load(spec, names), device, bf16)
        self.cae = place(training.load(run.path("cae")), device, bf16)
        self.ways = ways
        self.methods = {name: f for name, f in methods(self.blackbox, self.cae, modes, True).items()
                        if name not in CONTROLS}  # fmt: skip

    def __call__(self, unit: Unit) -> pa.Table:
        table = read_unit(self.run, unit).take([task["row"] for task in unit["tasks"]])
        ids = table["id"].to_pylist()
        answers = answered(self.run, unit["explanations"], ids)
        target = torch.tensor([answers[name]["target"] for name in ids], device=self.device)
        x = to_tensor(decode_all(table["image"].to_pylist(), self.size, self.fit)[0], self.device)
        with torch.no_grad():
            code, individual = self.cae.encode(x)
        question = x, self.blackbox.probabilities(x).argmax(1), target, *waypoints_of(self.ways, ids, code, target)

        def gradient(f: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
            point = point.detach().requires_grad_()
            return torch.autograd.grad(f(point).sum(), point)[0]

        work: dict[tuple[str, str], Callable[[], Any]] = {
            ("part", "encode an image"): torch.no_grad()(lambda: self.cae.encode(x)),
            ("part", "decode a frame"): torch.no_grad()(lambda: self.cae.decode(code, individual)),
            ("part", "classify a frame"): lambda: self.blackbox.probabilities(x),
            ("part", "gradient of the classifier"): partial(gradient, self.blackbox, x),
            ("part", "gradient of the decoder"): partial(gradient, partial(self.cae.decode, code), individual),
        }
        work |= {("method", name): partial(method, *question) for name, method in self.methods.items()}
        best: dict[tuple[str, str], float] = {}
        for _ in range(ROUNDS):
            for name, do in work.items():
                try:
                    best[name] = min(best.get(name, np.inf), self._seconds(do))
                except torch.AcceleratorError:
                    raise
                except UNFIT:  # stage evaluate says of every map why it is missing
                    continue
        return pa.Table.from_pylist([
            {"kind": kind, "name": name, "seconds": seconds / len(x), "images": len(x)}
            for (kind, name), seconds in best.items()
        ])  # fmt: skip

    def _seconds(self, do: Callable[[], Any]) -> float:
        begun = time.perf_counter()
        do()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - begun
