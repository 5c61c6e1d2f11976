"""Stage train: the class association embedding, by Ray Train (DDP). Writes `cae/`; resumes from `checkpoints/train`."""

from __future__ import annotations

import io
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from ray.train.torch import prepare_model
from torch import Tensor

from cae import classifiers, figures, training
from cae.blackboxes import FUNCTION, WEB, fingerprint, resolve
from cae.checkpoint import read_weights
from cae.classifiers import BlackBox
from cae.config import PRESETS, LossWeights, ModelConfig, TrainConfig
from cae.images import to_array, to_tensor
from cae.judgement import draw_donors, judge
from cae.losses import choose_class_head
from cae.networks import CAE, Discriminator, from_authors
from pipelines import run as runs
from pipelines import tracking
from pipelines.bulk import read_images, read_table
from pipelines.classify import ClassifyOptions
from pipelines.cluster import connect, enter_loop, fit_torch, last_checkpoint, pace, place, report, train_workers
from pipelines.command_line import command
from pipelines.mistakes import UserError
from pipelines.run import Run, Work

PREVIEWS = 10  # looks at held-out images, and checkpoints, over a training; one takes a few seconds, so
PREVIEW_STEPS = 100  # at least so many steps lie between two
WATCHED = 96  # held-out images that are looked at


@dataclass(frozen=True)
class TrainOptions(ClassifyOptions):
    """The class association embedding and its training."""

    labels: Literal["predicted", "truth"] = "predicted"
    """What the pairs' classes are: the classifier's predictions, or the data's labels (which explains the data, not
    the classifier)."""
    authors_generator: str = ""
    """A `gen_*.pt` of the paper's authors to take instead of training (only its tensors are loaded). Goes with
    `--preset paper`; any image size that is a multiple of 4 will do."""
    oracle: str = ""
    """A second classifier, trained apart from the explained one (given as for --classifier; another run's
    `classifier/` will do), that is asked about swaps: one that fools the first classifier only is noise."""
    best: Annotated[str, tyro.conf.arg(name="weights")] = ""
    """A `best.json` of tune.py, to take loss weights (and what else was searched) from; options beside it go first."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="", prefix_name=False)] = field(default_factory=TrainConfig)
    weights: Annotated[LossWeights, tyro.conf.arg(name="", prefix_name=False)] = field(default_factory=LossWeights)


def prepare(run: Run, options: TrainOptions) -> Work:
    """The work: a training that can be done, or a network of the authors' that is there."""
    cae = check(options)
    return partial(train, run, options, plan(run, options)) if cae is None else partial(_take, run, options, cae)


def check(options: TrainOptions) -> CAE | None:
    """The authors' network, if it is to be taken. Raises UserError for options that no training can have, ValueError
    for a file that is no such network."""
    if options.authors_generator:
        if replace(options.model, image_size=0) != replace(PRESETS["paper"].model, image_size=0):
            raise UserError("--authors-generator is the network of --preset paper: give that, and no other sizes")
        return from_authors(read_weights(options.authors_generator, "ab"))[0]
    if options.model.class_encoder == "residual" and not options.train.warm_up:
        raise UserError("--warm-up 0 leaves the norm of the residual class encoder without statistics: give it steps, "
                        "or --class-encoder plain")  # fmt: skip
    if options.workers and options.train.batch % options.workers:
        raise UserError(f"--batch {options.train.batch} does not divide among {options.workers} workers: choose "
                        "another --workers")  # fmt: skip
    return None


def train(run: Run, options: TrainOptions, planned: dict[str, Any]) -> dict[str, Any]:
    """Train the CAE on the train split and save it in `cae/`; returns its last measures on held-out images."""
    last = fit(run, options, "train", planned, save=run.path("cae"), start="checkpoints/train/start.pt")
    tracking.log_folder(run, "cae")
    head, success = planned["train"]["class_head"], last["swap_success"]
    says = f"{last['pairs']:,} pairs, class head {head}, held-out swap success {success:.3f}"
    return {"says": says} | {f"train/{name}": last[name] for name in last.keys() - {"pairs", "progress"}}


def fit(run: Run, options: TrainOptions, name: str, planned: dict[str, Any], save: str = "", start: str = "",
        callbacks: Sequence[Any] = (), retries: int = 3) -> dict[str, Any]:  # fmt: skip
    """Do a `planned` training, by Ray Train, with checkpoints in `checkpoints/NAME`; save the CAE where asked.

    `start` is a file of the run folder that keeps the warmed-up networks, for when the training is killed before its
    first checkpoint, and for others that differ in nothing that the warm-up depends on: the first of them writes it.
    Returns, and reports to `callbacks` with every checkpoint, the measures on held-out images (`cae.judgement`),
    `pairs`, how many it was trained on, and `progress`, the share of those it is to be trained on.
    """
    how = planned | {"save": save, "start": start, "label": name.rpartition("/")[2]}
    return fit_torch(run, options, name, _train_loop, how, options.train.batch, callbacks, retries)


def open_oracle(options: TrainOptions, known: Mapping[str, Any]) -> str:
    """The oracle as any process finds it, or "" for none; `known` is the result of stage classify, if it is done.

    Raises UserError for one that does not answer, does not know the same classes, or is the classifier itself.
    """
    if not options.oracle:
        return ""
    try:
        oracle = resolve(options.oracle, options.trust_pickle)
        classifiers.load(oracle, tuple(known.get("classes", ())))
        # Of a bare URL or function there is no file to know it by.
        named = oracle.startswith(WEB) or FUNCTION.fullmatch(oracle)
        same = oracle == known.get("spec") if named else fingerprint(oracle) == known.get("fingerprint")
    except ValueError as error:
        raise UserError(f"--oracle {options.oracle}: {error}") from error
    if same:
        raise UserError(f"--oracle {options.oracle} is the classifier that is explained: give one of another training")
    return oracle


def plan(run: Run, options: TrainOptions) -> dict[str, Any]:
    """What a training on the train split takes. Raises UserError where there can be none."""
    chosen = run.result("classify")
    oracle = open_oracle(options, chosen)
    class_head = choose_class_head(options.train.class_head, chosen.get("differentiable", True))
    table = read_table(run, "predictions", ["id", "split", "label", "predicted"]).to_pandas()
    table["y"] = table.predicted if options.labels == "predicted" else table.label
    table = table.dropna(subset=["y"])
    known = table[table.split == "train"]
    if known.empty:
        raise UserError("no images to train the CAE on: the split train has none"
                        + (" with a label" if options.labels == "truth" else ""))  # fmt: skip
    if known.y.nunique() < 2:
        if options.labels == "truth":
            raise UserError(f"all {len(known)} training images have the same label: --labels truth needs two")
        raise UserError(
            f"the classifier gives all {len(known)} training images the same class, so there is nothing to explain: "
            + ("give images of its other classes too" if options.classifier else
               "give more data, or train it longer (classify.py --again --resnet.min-steps N)")
        )  # fmt: skip
    pairs = training.draw_pairs(known.y.to_numpy(np.int64), options.train, options.seed)
    used, position = np.unique(pairs.index, return_inverse=True)  # only the images that some pair names are read
    held_out = table[table.split == ("val" if (table.split == "val").any() else "train")]
    watched = held_out.sample(min(WATCHED, len(held_out)), random_state=options.seed)
    model = options.model
    if model.channels == 0:
        model = replace(model, channels=1 if run.result("shard")["grey"] else 3)
    connect()
    train_workers(options, options.train.batch)
    return {
        "folder": run.folder, "spec": chosen["spec"], "names": tuple(chosen["classes"]), "fit": options.fit,
        "oracle": oracle,
        "model": asdict(model), "train": asdict(replace(options.train, class_head=class_head)),
        "weights": asdict(options.weights),
        # One without a gradient may be a server, which is not to be asked about tens of thousands of images more.
        "teach": options.labels == "predicted" and chosen.get("differentiable", True),
        "ids": known.id.to_numpy()[used], "labels": known.y.to_numpy(np.int64)[used], "seed": options.seed,
        "index": position.reshape(pairs.index.shape), "flip": pairs.flip,
        "watched_ids": watched.id.to_numpy(), "watched_labels": watched.y.to_numpy(np.int64),
    }  # fmt: skip


def _take(run: Run, options: TrainOptions, cae: CAE) -> dict[str, Any]:
    """Save the authors' generator as this run's CAE."""
    names = tuple(run.result("classify")["classes"])
    training.save(run.path("cae"), cae, names, authors_generator=options.authors_generator)
    tracking.log_folder(run, "cae")
    return {"says": f"took {options.authors_generator}"}


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    rank, world, device = enter_loop(config)
    run, names, label = Run(config["folder"]), config["names"], f"{config['label']:9}"
    options = TrainConfig(**config["train"])
    model = ModelConfig(**config["model"])
    pairs = training.Pairs(config["index"], config["flip"])
    steps = len(pairs.index) // options.batch
    images = read_images(run, config["ids"], model.image_size, config["fit"])
    labels = torch.tensor(config["labels"])

    torch.manual_seed(config["seed"])
    blackbox = place(classifiers.load(config["spec"], names), device)
    cae, discriminator = place(CAE(model), device), place(Discriminator(model, len(names)), device)
    state = last_checkpoint(device)
    if state is None:
        _warmed_up(run, config, cae, discriminator, images, blackbox, rank)
    trainer = training.Trainer(
        cae, discriminator, options,
        LossWeights(**config["weights"]), steps, blackbox,
        wrap=lambda module: prepare_model(module, move_to_device=False), bf16=config["bf16"],
    )  # fmt: skip
    if state is not None:
        _take_over(trainer, state)
        if rank == 0:
            print(f"{label} goes on at pair {trainer.step_count * options.batch:,}", flush=True)
    watched = None
    if rank == 0:
        oracle = place(classifiers.load(config["oracle"], names), device) if config["oracle"] else None
        images_watched = read_images(run, config["watched_ids"], model.image_size, config["fit"])
        watched = Watched(images_watched, config["watched_labels"], blackbox, oracle, device)

    every = max(min(PREVIEW_STEPS, steps // 2), math.ceil(steps / PREVIEWS), 1)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    measures: dict[str, Any] = {}
    since, first, begun, told = 0, trainer.step_count, time.time(), time.time()
    with tracking.join(config["tracking"], rank):
        while trainer.step_count < steps:
            step = trainer.step_count
            mine = slice(step * options.batch + rank, (step + 1) * options.batch, world)
            batch, members = pairs.batch(images, mine)
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
                seen = trainer.step_count * options.batch
                rate = (trainer.step_count - first) * options.batch / (time.time() - begun)
                left = (steps - trainer.step_count) * options.batch / rate / 60
                tracking.log_metrics(means | {"train/pairs_per_second": rate, "train/minutes_left": left}, step=seen)
                if time.time() - told > 15 or finished:
                    told = time.time()
                    told_terms = f"recon_x {means['train/recon_x']:.3f}  cla1 {means['train/cla1']:.2f}"
                    progress = f"{seen:,}/{len(pairs.index):,} pairs  {pace(rate)}  {left:.1f} min left"
                    print(f"{label} {progress}  {told_terms}", flush=True)
                sums.clear()
                since = 0
            if trainer.step_count % every == 0 or finished:
                measures = {"progress": trainer.step_count / steps}
                if watched is not None:
                    measures |= watched.look(trainer)
                    print(f"{label} held-out swap success {measures['swap_success']:.3f}", flush=True)
                report(trainer.state_dict() if rank == 0 and not finished else None, measures)
    if config["save"] and rank == 0:
        training.save(config["save"], trainer.best, names, train=config["train"], weights=config["weights"])
    return measures


def _warmed_up(run: Run, config: dict[str, Any], cae: CAE, discriminator: Discriminator, images: np.ndarray,
               blackbox: BlackBox, rank: int) -> None:  # fmt: skip
    """Warm the networks up, or take them from the file `start` of the run folder; rank 0 writes it.

    Every worker starts alike; wrapping for DDP then gives all of them rank 0's weights.
    """
    options, label = TrainConfig(**config["train"]), f"{config['label']:9}"
    networks = torch.nn.ModuleList([cae, discriminator])
    if config["start"] and run.fs.exists(run.path(config["start"])):
        with run.fs.open(run.path(config["start"]), "rb") as file:
            device = next(cae.parameters()).device
            _take_over(networks, torch.load(file, map_location=device, weights_only=True))
    elif options.warm_up + options.recon_warm_up:
        learned = training.warm_up(cae, discriminator, images, config["labels"], options, config["seed"],
                                   warm_up_teller(label) if rank == 0 else training.silent, config["bf16"],
                                   blackbox if config["teach"] else None)  # fmt: skip
        if rank == 0:
            print(f"{label} warmed up: class {learned['class']:.3f} nats  recon_x {learned['recon_x']:.3f}", flush=True)
            if config["start"]:
                buffer = io.BytesIO()
                torch.save(networks.state_dict(), buffer)
                run.write(config["start"], buffer.getvalue())


def _take_over(module: Any, state: dict[str, Any]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise UserError("was begun by another version of this project: do it over (--again)") from error


def warm_up_teller(label: str) -> training.Tell:
    """Prints how far the warm-up is, every 15 seconds."""
    told = began = time.time()

    def tell(what: str, step: int, steps: int) -> None:
        nonlocal told, began
        now = time.time()
        if step == 1:
            began = now
        elif now - told > 15:
            told = now
            rate = (step - 1) / (now - began)
            progress = f"{step:,}/{steps:,} steps  {pace(rate)}  {(steps - step) / rate / 60:.1f} min left"
            print(f"{label} warming up, {what}  {progress}", flush=True)

    return tell


class Watched:
    """The held-out images (N, S, S, 3) of classes y (N,) that rank 0 looks at in the course of a training."""

    def __init__(self, images: np.ndarray, y: np.ndarray, blackbox: BlackBox, oracle: BlackBox | None,
                 device: torch.device) -> None:  # fmt: skip
        self.images, self.y, self.donors = images, y, draw_donors(y)
        self.blackbox, self.oracle, self.device = blackbox, oracle, device

    def look(self, trainer: training.Trainer) -> dict[str, Any]:
        """Log what the CAE makes of the images, and how good that is; returns that and the pairs it has seen."""
        x, target = to_tensor(self.images, self.device), self.y[self.donors]
        found = judge(
            trainer.best, self.blackbox, x, torch.from_numpy(target).to(self.device),
            torch.from_numpy(self.donors).to(self.device), self.oracle,
        )  # fmt: skip
        names, few = self.blackbox.classes, range(min(8, len(self.y)))
        captions = [f"{names[self.y[i]]} → {names[target[i]]}\np={found.p_target[i]:.2f}" for i in few]
        figure = figures.swaps(
            self.images[:8], to_array(found.reconstruction[:8]), to_array(found.swap[:8]),
            self.images[self.donors[:8]], captions,
        )  # fmt: skip
        pairs = trainer.step_count * trainer.config.batch
        tracking.log_figure(figure, f"swaps/{pairs:08d}.png")
        tracking.log_metrics({f"train/{name}": value for name, value in found.measures.items()}, step=pairs)
        return found.measures | {"pairs": pairs}


OWN = ("labels", "authors_generator", "train", "weights", "model")


def main(options: TrainOptions) -> dict[str, Any]:
    """Run the stage on a run folder."""
    return runs.run_stage("train", options, prepare, OWN, needs=("shard", "classify"))


if __name__ == "__main__":
    import pipelines.train as itself  # other processes find its functions by this name, not in __main__

    command(itself.TrainOptions, itself.main)
