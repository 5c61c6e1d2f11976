"""Pairs a second of our training step against a plain one, on the paper's network: same weights, pairs and numbers.

The plain step is METHOD's account of the paper's own training: one pair at a time, every pass by itself, the
discriminator's turn encoding and decoding anew, borders padded by modules of their own, memory in the usual order.
The benchmark stops where the gradients of the two are not the same. Part of the ratio is the optimiser: ours moves the
weights once for all `--pairs` of its step, by Adam's fused form, the plain one after every pair, by the usual one; with
`--pairs 1` both move them as often.

Both steps run in turn, three times to warm up and then `--rounds` times, of which the table gives the median. Also the
FLOPs of a pair (counted), the share that this is of what 3x3 convolutions reach on this machine, and the memory that a
step keeps for its backward.

python benchmarks/train_step.py --sizes 64 128 256
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from here import as_workers_run
from record import append, here_and_now, program, say
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cae.config import PRESETS, LossWeights
from cae.layers import AdaINBlock, InstanceNorm, LayerNorm, UpConv
from cae.networks import CAE, Discriminator
from cae.training import Trainer
from pipelines.cluster import place

TABLE = Path(__file__).with_suffix(".csv")
WARM_UP = 3  # rounds before those that count: until then memory is taken from the system, page by page
SAME = 1e-9  # gradients in double precision that differ by less are the same


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sizes: tuple[int, ...] = (64, 128, 256)
    """Image sizes."""
    pairs: int = 4
    """Pairs of our step; the plain one takes them one by one."""
    rounds: int = 5
    """Times that each step is measured, in turn."""
    threads: int = os.cpu_count() or 1
    """CPU threads."""


# --- The plain step --------------------------------------------------------------------------------------------------


class PlainConv(nn.Module):
    """Pads by a module of its own, then convolves."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(int(conv.padding[0]))
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)


class PlainLayerNorm(nn.Module):
    """Layer norm step by step."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        self.scale, self.shift = norm.scale, norm.shift

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(len(x), -1)
        mean, std = flat.mean(1)[:, None, None, None], flat.std(1)[:, None, None, None]
        return (x - mean) / (std + 1e-5) * self.scale[:, None, None] + self.shift[:, None, None]


class PlainAdaIN(nn.Module):
    """Adaptive instance norm as a batch norm of one image whose channels are those of the whole batch."""

    def __init__(self, block: AdaINBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = PlainConv(block.conv1), PlainConv(block.conv2)

    @staticmethod
    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x (B, C, H, W), shift and scale (B, C)."""
        line = x.reshape(1, -1, *x.shape[2:])
        return F.batch_norm(line, None, None, scale.reshape(-1), shift.reshape(-1), True, 0.1, 1e-5).view_as(x)

    def forward(self, x: Tensor, shifts: Tensor, scales: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv1(x), shifts[:, 0], scales[:, 0]))
        return x + self.norm(self.conv2(y), shifts[:, 1], scales[:, 1])


def plain(module: nn.Module) -> nn.Module:
    """Our network with each layer in its plain form; it shares the weights."""
    if isinstance(module, UpConv):
        return nn.Sequential(nn.Upsample(scale_factor=2, mode=module.mode), PlainConv(module))
    if isinstance(module, AdaINBlock):
        return PlainAdaIN(module)
    if isinstance(module, LayerNorm):
        return PlainLayerNorm(module)
    if isinstance(module, InstanceNorm):
        return nn.InstanceNorm2d(module.channels)
    if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
        return PlainConv(module)
    for name, child in module.named_children():
        setattr(module, name, plain(child))
    return module


class PlainTrainer:
    """One pair a step, every pass by itself."""

    def __init__(self, cae: CAE, discriminator: Discriminator, weights: LossWeights) -> None:
        self.cae, self.discriminator, self.weights = plain(cae), plain(discriminator), weights
        config = PRESETS["paper"].train
        self.optimizers = [
            torch.optim.Adam(player.parameters(), config.lr, config.betas, weight_decay=config.weight_decay)
            for player in (self.cae, self.discriminator)
        ]

    def step(self, a: Tensor, b: Tensor, y_a: Tensor, y_b: Tensor) -> None:
        """Images (1, 3, H, W) and classes (1,). Both players move at the end, so that both see the same opponent."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.discriminator.requires_grad_(False)
        self.generator_loss(a, b, y_a, y_b).backward()
        self.discriminator.requires_grad_(True)
        self.discriminator_loss(a, b, y_a, y_b).backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, x: Tensor, y: Tensor) -> None:
        """One step for each pair of x (2B, 3, H, W), first members first."""
        n = len(x) // 2
        for i in range(n):
            self.step(x[i : i + 1], x[n + i : n + i + 1], y[i : i + 1], y[n + i : n + i + 1])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`CAE.encode`, in the order of memory that x has."""
        return self.cae.class_encoder(x), self.cae.individual_encoder(x)

    def judge(self, x: Tensor) -> Tensor:
        """The discriminator, likewise."""
        return self.discriminator.head(self.discriminator.features(x).mean((2, 3)))

    def generator_loss(self, a: Tensor, b: Tensor, y_a: Tensor, y_b: Tensor) -> Tensor:
        """Eq. 7."""
        encode, decode, w = self.encode, self.cae.decode, self.weights
        (c_a, s_a), (c_b, s_b) = encode(a), encode(b)
        loss = w.recon_x * (F.l1_loss(decode(c_a, s_a), a) + F.l1_loss(decode(c_b, s_b), b))
        for x, c, s, c_other, y_other in ((a, c_a, s_a, c_b, y_b), (b, c_b, s_b, c_a, y_a)):
            swap = decode(c_other, s)
            c_swap, s_swap = encode(swap)
            logits = self.judge(swap)
            loss = loss + w.recon_c * F.l1_loss(c_swap, c_other) + w.recon_s * F.l1_loss(s_swap, s)
            loss = loss + w.cyc_x * F.l1_loss(decode(c, s_swap), x)
            loss = loss + w.adv1 * F.cross_entropy(logits[:, :2], torch.ones_like(y_other))
            loss = loss + w.cla1 * F.cross_entropy(logits[:, 2:], y_other)
        return loss

    def discriminator_loss(self, a: Tensor, b: Tensor, y_a: Tensor, y_b: Tensor) -> Tensor:
        """Eq. 10."""
        (c_a, s_a), (c_b, s_b) = self.encode(a), self.encode(b)
        loss = torch.zeros(())
        for x, y, c_other, s in ((a, y_a, c_b, s_a), (b, y_b, c_a, s_b)):
            real, fake = self.judge(x), self.judge(self.cae.decode(c_other, s).detach())
            loss = loss + self.weights.adv2 * F.cross_entropy(real[:, :2], torch.ones_like(y))
            loss = loss + self.weights.adv2 * F.cross_entropy(fake[:, :2], torch.zeros_like(y))
            loss = loss + self.weights.cla2 * F.cross_entropy(real[:, 2:], y)
        return loss


# --- Measuring -------------------------------------------------------------------------------------------------------


def networks(size: int) -> tuple[CAE, Discriminator]:
    """The paper's, of fixed weights; without dropout, whose draws would differ between the steps."""
    torch.manual_seed(0)
    model = replace(PRESETS["paper"].model, image_size=size, dropout=0.0)
    return CAE(model), Discriminator(model, 2)


def ours(size: int) -> Trainer:
    """Our trainer, placed as the pipeline places it."""
    cae, discriminator = (place(net, "cpu") for net in networks(size))
    return Trainer(cae, discriminator, replace(PRESETS["paper"].train, batch=1), LossWeights(), 10**6)


def pairs_of(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Images (2 * count, 3, H, W), first members first, and classes."""
    x = F.interpolate(torch.randn(2 * count, 3, size // 4, size // 4), size=(size, size), mode="bicubic")
    return x.clamp(-1, 1), torch.tensor([0] * count + [1] * count)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def flops(work: Callable[[], object]) -> float:
    """Floating-point operations, counted: two per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def kept(work: Callable[[], object]) -> float:
    """Bytes of tensors that are kept for backward passes, at most at once in one of them, weights left out."""
    alive: dict[int, int] = {}
    most = 0

    class Kept:
        """A saved tensor; counted until autograd lets it go."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor, self.key = tensor, 0 if tensor.is_leaf else tensor.untyped_storage().data_ptr()
            counts[self.key] += 1
            alive[self.key] = tensor.untyped_storage().nbytes() if self.key else 0
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            counts[self.key] -= 1
            if counts[self.key] == 0:
                del alive[self.key]

    counts: Counter[int] = Counter()
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda held: held.tensor):
        work()
    return most


def peak(size: int, pairs: int) -> float:
    """FLOP/s of a 3x3 convolution at the network's width and size of code, forward and backward."""
    conv = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    shape = (4 * pairs, 256, size // 4, size // 4)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(shape).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        conv(x).backward(grad)

    count = flops(work)
    return count / min(seconds(work) for _ in range(5))


def same_numbers(size: int) -> float:
    """Largest relative difference, over all tensors of weights, of the gradients that either step takes of one pair.

    In double precision: in single, rounding at the kinks of ReLUs alone makes up to 1%.
    """
    x, y = pairs_of(size, 1)
    x = x.double()
    trainer, baseline = ours(size), PlainTrainer(*networks(size), LossWeights())
    for player in (trainer.cae, trainer.discriminator, baseline.cae, baseline.discriminator):
        player.double()
    trainer.step(x, y)
    baseline.steps(x, y)
    found = []
    for mine, other in ((trainer.cae, baseline.cae), (trainer.discriminator, baseline.discriminator)):
        # A bias before a norm has no gradient but rounding, so differences count against the network's largest.
        most = max(float(p.grad.norm()) for p in mine.parameters() if p.grad is not None)
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            found.append((p.grad - q.grad).norm() / max(float(p.grad.norm()), 1e-3 * most))
    return float(torch.stack(found).max())  # NaN, if any of them is


def main(options: Options) -> None:
    """Measure and append to the table."""
    torch.set_num_threads(options.threads)
    rows = []
    apart = same_numbers(32)
    if not apart < SAME:
        sys.exit(f"error: the gradients of the two steps differ by {apart:.1e}: they do not do the same work")
    print(f"the gradients of the two steps differ by {apart:.1e} at most", flush=True)
    for size in options.sizes:
        x, y = pairs_of(size, options.pairs)
        baseline, trainer, n = PlainTrainer(*networks(size), LossWeights()), ours(size), options.pairs
        steps: dict[str, Callable[[], object]] = {
            "plain": partial(baseline.steps, x, y),
            "ours": partial(trainer.step, x, y),
        }
        count = {name: flops(step) / n for name, step in steps.items()}
        memory = {"plain": kept(partial(baseline.steps, x[[0, n]], y[[0, n]])), "ours": kept(steps["ours"])}
        times: dict[str, list[float]] = {name: [] for name in steps}
        peaks = []
        for _ in range(WARM_UP + options.rounds):
            peaks.append(peak(size, n))
            for name, step in steps.items():
                times[name].append(seconds(step) / n)
        best = max(peaks[WARM_UP:])
        for name in steps:
            took, work = median(times[name][WARM_UP:]), count[name]
            rows.append({
                **here_and_now(), "threads": options.threads,
                "size": size, "pairs": n, "step": name, "pairs_per_second": f"{1 / took:.3f}",
                "ratio": f"{median(times['plain'][WARM_UP:]) / took:.2f}", "gflop_per_pair": f"{work / 1e9:.0f}",
                "gflop_per_second": f"{work / took / 1e9:.1f}", "peak_gflop_per_second": f"{best / 1e9:.1f}",
                "share_of_peak": f"{work / took / best:.2f}",
                "memory_gb": f"{memory[name] / 1e9:.2f}",
            })  # fmt: skip
            say(rows[-1])
    append(TABLE, rows)


if __name__ == "__main__":
    as_workers_run()
    program(Options, main, __doc__)
