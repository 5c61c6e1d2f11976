"""Which pairs to train on, and one step of training the CAE against its discriminator.

Legend: B pairs in a step, so 2B images: the first members, then the second ones (see losses.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cae.checkpoint import read_model, save_model
from cae.config import LossWeights, ModelConfig, TrainConfig
from cae.images import to_tensor
from cae.layers import learned_statistics
from cae.losses import (
    GRADIENT,
    DiscriminatorObjective,
    GeneratorObjective,
    choose_class_head,
    needs_blackbox,
    recon_x,
)
from cae.networks import CAE, Discriminator, prepare

Wrap = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a whole training, in order: P pairs of different classes."""

    index: np.ndarray
    """(P, 2) positions of the two images in the labels given."""
    flip: np.ndarray
    """(P, 2) whether to mirror each image."""

    def batch(self, images: np.ndarray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The images of some pairs, mirrored or not, and their positions: (2B, S, S, 3) and (2B,), first members first.

        `images` (N, S, S, 3) are those that `index` points to.
        """
        members, mirrored = self.index[rows].T.reshape(-1), self.flip[rows].T.reshape(-1)
        return mirror(images[members], mirrored), members


def mirror(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Images (B, S, S, 3), changed in place: those of `which` (B,) with left and right exchanged."""
    images[which] = images[which, :, ::-1]
    return images


def draw_pairs(labels: np.ndarray, config: TrainConfig, seed: int) -> Pairs:
    """Every class pair equally often, and within a class every image equally often, whatever the class counts.

    `labels` (N,) are class indices. The pairs depend on the labels, the configuration and the seed only, not on the
    number of workers. Raises ValueError for fewer than two classes.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError("pairs need images of two classes at least: the labels to train on name only one")
    count = config.pairs if config.epochs == 0 else min(config.pairs, round(config.epochs * len(labels)))
    count = max(config.batch, count - count % config.batch)  # whole steps
    rng = np.random.default_rng(seed)
    kinds = classes[np.stack(np.triu_indices(len(classes), 1), 1)]
    kind = kinds[_passes(np.arange(len(kinds)), count, rng)]  # (P, 2) classes
    kind = rng.permuted(kind, axis=1)
    index = np.empty((count, 2), np.int64)
    for label in classes:
        index[kind == label] = _passes(np.flatnonzero(labels == label), int((kind == label).sum()), rng)
    return Pairs(index, rng.random((count, 2)) < config.flip)


def _passes(items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` items in shuffled passes over all of them."""
    passes = [rng.permutation(items) for _ in range(-(-count // len(items)))]
    return np.concatenate(passes)[:count]


class Trainer:
    """The CAE, its discriminator and their optimisers; `step` trains both on one batch of pairs.

    `wrap` takes each player's objective and returns what to call instead (DistributedDataParallel, say); nothing in
    here knows about workers. `blackbox` is needed for every class head but `learned`. Raises ValueError without it.
    """

    def __init__(
        self,
        cae: CAE,
        discriminator: Discriminator,
        config: TrainConfig,
        weights: LossWeights,
        steps: int,
        blackbox: nn.Module | None = None,
        wrap: Wrap = lambda module: module,
        bf16: bool = False,
    ) -> None:
        if needs_blackbox(config.class_head) and blackbox is None:
            raise ValueError(f"the class head {config.class_head} needs the classifier")
        differentiable = getattr(blackbox, "differentiable", True)
        config = replace(config, class_head=choose_class_head(config.class_head, differentiable))
        self.cae = cae
        self.discriminator = discriminator
        self.config = config
        self.blackbox = blackbox if needs_blackbox(config.class_head) else None
        self.bf16 = bf16
        judge = self.blackbox if config.class_head in GRADIENT else None
        self.generator_objective = wrap(
            GeneratorObjective(cae, discriminator, weights, judge, both=config.class_head == "both")
        )
        self.discriminator_objective = wrap(DiscriminatorObjective(discriminator, weights))
        generator = [
            {"params": list(part.parameters()), "lr": rate}
            for part, rate in ((cae.class_encoder, (config.class_lr if config.warm_up else 0) or config.lr),
                               (cae.individual_encoder, config.lr), (cae.decoder, config.lr))
        ]  # fmt: skip
        critic = [{"params": list(discriminator.parameters()), "lr": config.disc_lr or config.lr}]
        self.optimizers = [
            torch.optim.Adam(player, betas=config.betas, weight_decay=config.weight_decay, fused=True)
            for player in (generator, critic)
        ]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (config.lr_halvings * step // steps))
            for optimizer in self.optimizers
        ]
        self.average = AveragedModel(cae, multi_avg_fn=self._average) if config.ema else None
        self.step_count = 0

    def _average(self, kept: Any, new: Any, _: Any) -> None:
        """Move averaged weights towards new ones, early on faster: a short training must not stay at its start."""
        decay = min(self.config.ema, (1 + self.step_count) / (10 + self.step_count))
        torch._foreach_lerp_(kept, new, 1 - decay)

    @property
    def best(self) -> CAE:
        """The CAE to use: the averaged weights where `ema` asks for them."""
        best = self.cae if self.average is None else self.average.module
        assert isinstance(best, CAE)
        return best

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Images x (2B, 3, H, W) and class indices y (2B,) of B pairs -> named terms, before weights."""
        generator, discriminator = self.optimizers
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            # One generator pass serves both players: its swaps, detached, are the discriminator's fakes.
            self.discriminator.requires_grad_(False)
            terms_g, swap = self.generator_objective(x, y)
            self._descend(generator, terms_g["loss_g"])

            self.discriminator.requires_grad_(True)
            swap_probabilities = None
            if self.config.class_head == "distilled" and self.blackbox is not None:
                with torch.no_grad():
                    swap_probabilities = self.blackbox(swap).softmax(1)
            terms_d = self.discriminator_objective(x, swap, y, swap_probabilities)
            self._descend(discriminator, terms_d["loss_d"])
        for scheduler in self.schedulers:
            scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.cae)
        self.step_count += 1
        return {name: term.detach() for name, term in (terms_g | terms_d).items()}

    @staticmethod
    def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly where this trainer is."""
        return {
            "cae": self.cae.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "step_count": self.step_count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; models of other sizes raise RuntimeError."""
        self.cae.load_state_dict(state["cae"])
        self.discriminator.load_state_dict(state["discriminator"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.step_count = state["step_count"]


WARM_UP_BATCH, WARM_UP_LR, WARM_UP_DISC_LR = 32, 2e-3, 5e-4
RECON_BATCH = 16
TEMPERATURE = 4.0
MIXED = 0.8  # of the steps that a teacher is asked in
Tell = Callable[[str, int, int], None]
"""What is being learned, steps done, steps in all."""


def silent(what: str, step: int, steps: int) -> None:
    """Tells nobody."""


def warm_up(cae: CAE, discriminator: Discriminator, images: np.ndarray, labels: np.ndarray, config: TrainConfig,
            seed: int, tell: Tell = silent, bf16: bool = False,
            teacher: nn.Module | None = None) -> dict[str, float]:  # fmt: skip
    """Teach the networks what single images can, before the first pair; returns each mean loss over its last steps.

    First `config.warm_up` steps for the class encoder and D_c (`class`, nats), after which class codes get unit scale,
    then `config.recon_warm_up` ones for the individual encoder and the decoder (`recon_x`, L1). `images` (N, S, S, 3)
    uint8 and `labels` (N,); classes are drawn evenly. The class encoder learns the labels, or what `teacher`, the
    classifier, says of each image; `class` is the mean of its loss and D_c's. `tell` is called after every step. After
    no steps a loss is NaN. `bf16`: under autocast, as in `Trainer`.
    """
    device = next(cae.parameters()).device
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def batches(what: str, count: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng(seed)
        for step in range(steps):
            index = np.array([rng.choice(members[kind]) for kind in rng.integers(len(members), size=count)])
            batch = mirror(images[index], rng.random(count) < config.flip)
            yield to_tensor(batch, device), torch.tensor(labels[index], device=device)
            tell(what, step + 1, steps)

    classes = batches("class", WARM_UP_BATCH, config.warm_up)
    learned = {"class": _learn_classes(cae, discriminator, classes, config, seed, bf16, teacher)}
    if config.warm_up:
        _to_unit_scale(cae, next(batches("scale", 4 * WARM_UP_BATCH, 1))[0])
    return learned | {
        "recon_x": _learn_images(cae, batches("recon_x", RECON_BATCH, config.recon_warm_up), config, bf16)
    }


def _learn_classes(cae: CAE, discriminator: Discriminator, batches: Iterator[tuple[Tensor, Tensor]],
                   config: TrainConfig, seed: int, bf16: bool, teacher: nn.Module | None) -> float:  # fmt: skip
    """Teach the class encoder and D_c to name the classes of images, which are disturbed (`disturb`).

    A class code that means nothing yet and a D_c that sees no lesion yet teach the decoder to ignore both, and a short
    training never recovers. Rates rise and fall over the steps. The head on the class code is thrown away. From a
    teacher it learns softened probabilities (Hinton, Vinyals, Dean 2015): of few images they tell far more than their
    classes do, and what the class code is for is the teacher's view, not the truth. It has a view of images that are
    `mixed`, too, but the last ones are not, so that the encoder's norms know images as they are.
    """
    device = next(cae.parameters()).device
    chance = torch.Generator(device).manual_seed(seed)
    head = nn.Linear(cae.config.class_dim, discriminator.classes).to(device)
    rates = [(cae.class_encoder, WARM_UP_LR), (head, WARM_UP_LR), (discriminator, WARM_UP_DISC_LR)]
    to_mix = iter(range(int(MIXED * config.warm_up)))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would put the pixels' places on a coarse grid
            x = disturb(x, chance)
        named = F.cross_entropy(discriminator(x)[:, 2:], y)
        if teacher is not None and next(to_mix, None) is not None:
            x = mixed(x, chance)
        logits = head(cae.class_encoder(prepare(x, cae.config)))
        return named + (F.cross_entropy(logits, y) if teacher is None else _distil(logits, x, teacher))

    with learned_statistics(cae.class_encoder):
        return _descend_once(rates, loss, batches, config.warm_up, bf16) / 2


@torch.no_grad()
def _to_unit_scale(cae: CAE, x: Tensor) -> None:
    """Move and scale class codes so that those of images x (B, 3, H, W) have mean 0 and a standard deviation of 1.

    How large the warm-up leaves them hangs on the teacher's logits, and what is large weighs more in Eq. 2 and lets the
    decoder start wildly.
    """
    code = torch.cat([cae.class_encoder(prepare(part, cae.config)) for part in x.split(WARM_UP_BATCH)])
    scale, last = code.std(0).mean(), cae.class_encoder.to_code  # one scale for all numbers
    assert last.bias is not None
    if scale > 1e-4:  # else all codes are alike, and stay so
        last.bias.sub_(code.mean(0)).div_(scale)
        last.weight.div_(scale)


def _distil(logits: Tensor, x: Tensor, teacher: nn.Module) -> Tensor:
    """T^2 times the divergence, in nats, of softmax(logits / T) from what the teacher says of images x, at T too."""
    with torch.no_grad():
        said = (teacher(x).float() / TEMPERATURE).log_softmax(1)
    own = (logits.float() / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * F.kl_div(own, said, reduction="batchmean", log_target=True)


def _learn_images(cae: CAE, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig, bf16: bool) -> float:
    """Teach the individual encoder and the decoder to give images back, with the class encoder as it is."""
    rates = [(cae.individual_encoder, WARM_UP_LR), (cae.decoder, WARM_UP_LR)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            code = cae.class_encoder(prepare(x, cae.config))
        return recon_x(cae.decode(code, cae.individual_encoder(prepare(x, cae.config))), x)

    return _descend_once(rates, loss, batches, config.recon_warm_up, bf16)


def _descend_once(rates: list[tuple[nn.Module, float]], loss: Callable[[Tensor, Tensor], Tensor],
                  batches: Iterator[tuple[Tensor, Tensor]], steps: int, bf16: bool) -> float:  # fmt: skip
    """Descend under rates that rise to the ones given and fall; the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW([{"params": list(part.parameters())} for part, _ in rates], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [rate for _, rate in rates], total_steps=max(steps, 1))
    losses = []
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):  # for a step: it keeps the weights it casts
            value = loss(x, y)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        losses.append(value.detach())
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean()) if losses else math.nan


def disturb(x: Tensor, chance: torch.Generator) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] turned, scaled, shifted, brightened and given contrast at random, each by itself.

    By up to 9 degrees, 15% and a tenth of the half side; up to 0.15 and 20% of the range.
    """
    turn, scale, dx, dy, bright, contrast = torch.rand(6, len(x), generator=chance, device=x.device) * 2 - 1
    cos, sin = (1 + 0.15 * scale) * (0.15 * turn).cos(), (1 + 0.15 * scale) * (0.15 * turn).sin()
    affine = torch.stack([cos, -sin, 0.1 * dx, sin, cos, 0.1 * dy], 1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    bright, contrast = 0.15 * bright[:, None, None, None], 1 + 0.2 * contrast[:, None, None, None]
    return ((x + 1) * contrast - 1 + bright).clamp(-1, 1)


def mixed(x: Tensor, chance: torch.Generator) -> Tensor:
    """Images (B, 3, S, S), each with a square of another in it (CutMix; Yun et al. 2019), which is cut at borders.

    Its side is up to the image's. Such images have no label, but a classifier has a view of them.
    """
    size, side = x.shape[-1], torch.rand(len(x), 1, generator=chance, device=x.device)
    place, centre = torch.arange(size, device=x.device), torch.rand(2, len(x), 1, generator=chance, device=x.device)
    rows, cols = (place - size * centre).abs() < size * side / 2  # (B, S) each
    return torch.where((rows[:, :, None] & cols[:, None, :])[:, None], x.roll(1, 0), x)


def save(folder: str, cae: CAE, classes: tuple[str, ...], **about: Any) -> None:
    """Save a trained CAE, with anything worth knowing about it in `about`."""
    save_model(folder, cae, {"kind": "cae", "classes": list(classes), "model": asdict(cae.config), **about})


def load(folder: str) -> CAE:
    """The CAE saved in a folder, frozen, in evaluation mode. Raises ValueError, in one line, when there is none."""
    state, config = read_model(folder)
    if config.get("kind") != "cae":
        raise ValueError(f"the model in {folder} is no CAE")
    try:
        cae = CAE(ModelConfig(**config["model"]))
        cae.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the CAE in {folder} was saved by another version of this project: train it again") from error
    return cae.eval().requires_grad_(False)
