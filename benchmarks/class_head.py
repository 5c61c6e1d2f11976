"""Which D_c should Eq. 6 ask? The same training of preset `quick` with each class head, on a run's images.

For val and test: swap success and what the oracle says of the swaps, reconstruction, AOPC of the maps (disjoint, under
noise); how alike maps are to those of the classifier with its weights drawn anew, in rank correlation (a map must
follow the classifier), beside those of another image; images that the classifier is asked about for a pair.

python benchmarks/class_head.py --run runs/chest_xray-quick --oracle runs/chest-1/classifier --pairs 4000
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from here import as_workers_run, blackbox_of, data, training_of, warmed
from methods import alikeness, maps_to
from record import append, here_and_now, program, say

from cae import classifiers
from cae.config import PRESETS, ClassHead
from cae.images import to_tensor
from cae.judgement import draw_donors, judge
from cae.sanity import cascade
from pipelines.cluster import place
from pipelines.run import Run

TABLE = Path(__file__).with_suffix(".csv")
ASKED = {"learned": 0, "distilled": 2, "blackbox": 4, "both": 4}  # swaps, and reconstructions for the term `keep`


@dataclass(frozen=True)
class Options:
    """What to compare."""

    run: str
    """Run folder with the stages shard and classify."""
    oracle: str
    """Folder of a second classifier, trained apart."""
    heads: tuple[ClassHead, ...] = ("learned", "distilled", "blackbox", "both")
    """Class heads, one after the other."""
    pairs: int = 4000
    """Pairs of each training."""
    images: int = 64
    """Images of val whose maps are compared with those of a random classifier."""
    seed: int = 0
    """Seed of weights and pairs."""
    threads: int = 1
    """CPU threads."""


def main(options: Options) -> None:
    """Measure and append to the table, after every training."""
    torch.set_num_threads(options.threads)
    run, config = Run(options.run), PRESETS["quick"]
    size = config.model.image_size
    blackbox = blackbox_of(run)
    oracle = place(classifiers.load(options.oracle, blackbox.classes), "cpu")
    known, splits = data(run, "train", size), {split: data(run, split, size) for split in ("val", "test")}
    *_, (_, random) = cascade(blackbox, options.seed)
    networks = warmed(run, known, config, options.seed)  # the same for all
    for head in options.heads:
        train = replace(config.train, class_head=head, pairs=options.pairs, epochs=0.0)
        begun = time.process_time()
        *_, trainer = training_of(run, known, replace(config, train=train), options.seed, networks)
        minutes = (time.process_time() - begun) / 60
        for split, part in splits.items():
            if not len(part.y):
                continue
            x, donors = to_tensor(part.images), draw_donors(part.y)
            source, target = torch.from_numpy(part.y), torch.from_numpy(part.y[donors])
            found = judge(trainer.best, blackbox, x, target, torch.from_numpy(donors), oracle).measures
            row: dict[str, object] = {
                **here_and_now(), "run": Path(options.run).name,
                "seed": options.seed, "pairs": options.pairs, "class_head": head, "cpu_minutes": f"{minutes:.1f}",
                "asked_per_pair": ASKED[head], "split": split,
                **{name: f"{found[name]:.3f}" for name in ("swap_success", "oracle_success", "keeps_class", "believed",
                                                           "reconstruction_error", "aopc", "score")},
            }  # fmt: skip
            few = slice(options.images)
            codes = trainer.best.encode(x[donors[few]])[0].detach()
            given = (x[few], source[few], target[few], codes)
            own = maps_to(trainer.best, blackbox, *given)
            for name, other in (("random", maps_to(trainer.best, random, *given)), ("other_image", own.roll(1, 0))):
                row |= {f"{name}_spearman": alikeness(own, other)["spearman"]}
            append(TABLE, [row])
            say(row)


if __name__ == "__main__":
    as_workers_run()
    program(Options, main, __doc__)
