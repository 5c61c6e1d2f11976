"""Stage train: the class association embedding, by Ray Train (DDP). Writes `cae/`; resumes from `checkpoints/train`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from ray.train.torch import prepare_model
from torch import Tensor

from cae import classifiers, figures, training
from cae.checkpoint import read_weights
from cae.config import PRESETS, LossWeights, ModelConfig, TrainConfig
from cae.explain import swap
from cae.images import to_array, to_tensor
from cae.losses import choose_class_head
from cae.networks import CAE, Discriminator, from_authors
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import read_images, read_table
from pipelines.classify import ClassifyOptions
from pipelines.cluster import connect, enter_loop, fit_torch, last_checkpoint, place, report, train_workers
from pipelines.run import Run, UserError

PREVIEWS = 10  # looks at held-out swaps, and checkpoints, over a training; one takes a few seconds, so
PREVIEW_STEPS = 100  # at least so many steps lie between two
WATCHED = 96  # held-out images whose swaps are watched


@dataclass(frozen=True)
class TrainOptions(ClassifyOptions):
    """The class association embedding and its training."""

    labels: Literal["predicted", "truth"] = "predicted"
    """What the pairs' classes are: the classifier's predictions, or the data's labels (which explains the data, not
    the classifier)."""
    authors_generator: str = ""
    """A `gen_*.pt` of the paper's authors to take instead of training (only its tensors are loaded). Goes with
    `--preset paper`; any image size that is a multiple of 4 will do."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="", prefix_name=False)] = field(default_factory=TrainConfig)
    weights: Annotated[LossWeights, tyro.conf.arg(name="", prefix_name=False)] = field(default_factory=LossWeights)


def train(run: Run, options: TrainOptions) -> dict[str, Any]:
    """Train the CAE on the train split and save it in `cae/`; returns its last figures on held-out swaps."""
    if options.authors_generator:
        return _take(run, options)
    chosen = run.result("classify")
    class_head = choose_class_head(options.train.class_head, chosen.get("differentiable", True))
    how = replace(options.train, class_head=class_head)
    connect()
    train_workers(options, options.train.batch)  # refuses early
    table = read_table(run, "predictions", ["id", "split", "label", "predicted"]).to_pandas()
    table["y"] = table.predicted if options.labels == "predicted" else table.label
    table = table.dropna(subset=["y"])
    known = table[table.split == "train"]
    if known.y.nunique() < 2:
        raise UserError(
            f"the classifier gives all {len(known)} training images the same class, so there is nothing to explain: "
            + ("give images of its other classes too" if options.classifier else
               "give more data, or train it longer (classify.py --again --resnet.epochs N)")
        )  # fmt: skip
    pairs = training.draw_pairs(known.y.to_numpy(np.int64), options.train, options.seed)
    used, position = np.unique(pairs.index, return_inverse=True)  # only the images that some pair names are read
    held_out = table[table.split == ("val" if (table.split == "val").any() else "train")]
    watched = held_out.sample(min(WATCHED, len(held_out)), random_state=options.seed)
    model = options.model
    if model.channels == 0:
        model = replace(model, channels=1 if run.result("shard")["grey"] else 3)
    result = fit_torch(run, options, "train", _train_loop, {
        "folder": run.folder, "spec": chosen["spec"], "names": tuple(chosen["classes"]), "fit": options.fit,
        "model": asdict(model), "train": asdict(how), "weights": asdict(options.weights),
        "ids": known.id.to_numpy()[used], "labels": known.y.to_numpy(np.int64)[used], "seed": options.seed,
        "index": position.reshape(pairs.index.shape), "flip": pairs.flip,
        "watched_ids": watched.id.to_numpy(), "watched_labels": watched.y.to_numpy(np.int64),
    }, options.train.batch)  # fmt: skip
    tracking.log_folder(run, "cae")
    success = f"held-out swap success {result['train/swap_success']:.3f}"
    return {"says": f"{len(pairs.index):,} pairs, class head {class_head}, {success}", **result}


def _take(run: Run, options: TrainOptions) -> dict[str, Any]:
    """Save the authors' generator as this run's CAE."""
    if replace(options.model, image_size=0) != replace(PRESETS["paper"].model, image_size=0):
        raise UserError("--authors-generator is the network of --preset paper: give that, and no other sizes")
    cae, _ = from_authors(read_weights(options.authors_generator, "ab"))
    names = tuple(run.result("classify")["classes"])
    training.save(run.path("cae"), cae, names, authors_generator=options.authors_generator)
    tracking.log_folder(run, "cae")
    return {"says": f"took {options.authors_generator}"}


def _train_loop(config: dict[str, Any]) -> dict[str, float]:
    rank, world, device = enter_loop(config["threads"])
    run, names = Run(config["folder"]), config["names"]
    options = TrainConfig(**config["train"])
    model = ModelConfig(**config["model"])
    index, flip = config["index"], config["flip"]
    steps = len(index) // options.batch
    images = read_images(run, config["ids"], model.image_size, config["fit"])
    labels = torch.tensor(config["labels"])

    torch.manual_seed(config["seed"])
    blackbox = place(classifiers.load(config["spec"], names), device)
    cae, discriminator = place(CAE(model), device), place(Discriminator(model, len(names)), device)
    state = last_checkpoint(device)
    if state is None and options.warm_up:
        # Every worker does the same; wrapping for DDP then gives all of them rank 0's weights.
        loss = training.warm_up(cae, discriminator, images, config["labels"], options.warm_up, config["seed"])
        if rank == 0:
            print(f"train     warmed up: {loss:.3f} nats to name a class", flush=True)
    trainer = training.Trainer(
        cae, discriminator, options,
        LossWeights(**config["weights"]), steps, blackbox,
        wrap=lambda module: prepare_model(module, move_to_device=False), bf16=device.type == "cuda",
    )  # fmt: skip
    if state is not None:
        trainer.load_state_dict(state)
        if rank == 0:
            print(f"train     goes on at pair {trainer.step_count * options.batch:,}", flush=True)
    watched = read_images(run, config["watched_ids"], model.image_size, config["fit"]) if rank == 0 else None

    every = max(min(PREVIEW_STEPS, steps // 2), math.ceil(steps / PREVIEWS), 1)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    since, first, begun, told = 0, trainer.step_count, time.time(), time.time()
    with tracking.join(config["tracking"], rank):
        while trainer.step_count < steps:
            step = trainer.step_count
            mine = slice(step * options.batch + rank, (step + 1) * options.batch, world)
            members = index[mine].T.reshape(-1)  # first members, then second ones
            batch = images[members]
            mirrored = flip[mine].T.reshape(-1)
            batch[mirrored] = batch[mirrored, :, ::-1]
            torch.manual_seed(config["seed"] + step)  # dropout: the same after a resume
            terms = trainer.step(to_tensor(batch, device), labels[members].to(device))
            for name, term in terms.items():
                sums[name] += term
            since += 1
            finished = trainer.step_count == steps
            if rank == 0 and (since == 50 or finished):
                means = {f"train/{name}": float(total) / since for name, total in sums.items()}
                bad = [name for name, value in means.items() if not math.isfinite(value)]
                if bad:
                    raise UserError(f"{', '.join(bad)} is not finite: lower --lr")
                pairs = trainer.step_count * options.batch
                rate = (trainer.step_count - first) * options.batch / (time.time() - begun)
                left = (steps - trainer.step_count) * options.batch / rate / 60
                tracking.log_metrics(means | {"train/pairs_per_second": rate, "train/minutes_left": left}, step=pairs)
                if time.time() - told > 15 or finished:
                    told = time.time()
                    told_terms = f"recon_x {means['train/recon_x']:.3f}  cla1 {means['train/cla1']:.2f}"
                    progress = f"{pairs:,}/{len(index):,} pairs  {rate:.1f}/s  {left:.1f} min left"
                    print(f"train     {progress}  {told_terms}", flush=True)
                sums.clear()
                since = 0
            if trainer.step_count % every == 0 and not finished:
                if watched is not None:
                    _preview(trainer, blackbox, watched, config["watched_labels"], names, device)
                report(trainer.state_dict() if rank == 0 else None)
        if watched is None:
            return {}
        last = _preview(trainer, blackbox, watched, config["watched_labels"], names, device)
    training.save(run.path("cae"), trainer.best, names, train=config["train"], weights=config["weights"])
    return last


@torch.no_grad()
def _preview(trainer: training.Trainer, blackbox: classifiers.BlackBox, images: np.ndarray, y: np.ndarray,
             names: tuple[str, ...], device: torch.device) -> dict[str, float]:  # fmt: skip
    """Log reconstructions and swaps of held-out images, and the share of swaps that the classifier believes."""
    cae = trainer.best
    x = to_tensor(images, device)
    rng = np.random.default_rng(0)
    mixed = len(set(y)) > 1  # else there is nothing to swap
    donors = np.array([rng.choice(np.flatnonzero(y != mine)) for mine in y]) if mixed else np.arange(len(y))
    reconstruction, swapped = swap(cae, x, x[donors])
    p = blackbox.probabilities(swapped).cpu().numpy()
    target = y[donors]
    captions = [f"{names[y[i]]} → {names[target[i]]}\np={p[i, target[i]]:.2f}" for i in range(min(8, len(y)))]
    figure = figures.swaps(
        images[:8], to_array(reconstruction[:8]), to_array(swapped[:8]), images[donors[:8]], captions
    )
    pairs = trainer.step_count * trainer.config.batch
    tracking.log_figure(figure, f"swaps/{pairs:08d}.png")
    metrics = {
        "train/swap_success": float((p.argmax(1) == target).mean()) if mixed else math.nan,
        "train/val_recon_x": float((reconstruction - x).abs().mean()),
    }
    tracking.log_metrics(metrics, step=pairs)
    print(f"train     held-out swap success {metrics['train/swap_success']:.3f}", flush=True)
    return metrics


OWN = ("labels", "authors_generator", "train", "weights", "model")


def main(options: TrainOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("train", options, train, OWN, needs=("shard", "classify"))


if __name__ == "__main__":
    runs.command(TrainOptions, main)
