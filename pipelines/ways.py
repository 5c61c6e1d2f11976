"""Where paths lead: which training images' class codes they end at, and the way there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cae.manifold import TrainingCodes
from pipelines.bulk import matrix, read_part, read_table
from pipelines.embed import CANDIDATES
from pipelines.mistakes import UserError
from pipelines.run import Run

if TYPE_CHECKING:
    from pipelines.explain import ExplainOptions

REFERENCE_CODES = 5000  # training codes that a code's distance is taken to, and that guided paths run among
DONOR_CODES = 1000  # training codes a class among which random and nearest counter codes are found
VOTERS = 15  # training codes that say whether one of these stands among its own class
MOST_DONORS = {"medoid": CANDIDATES, "random": 32, "nearest": 32}  # that an image may have; of a given image: itself


def read_medoids(run: Run) -> dict[int, tuple[list[str], np.ndarray]]:
    """Class index -> ids (n,) and class codes (n, D) of the training images tried for it, the best first."""
    table = read_part(run, "manifold/counter_codes.parquet")
    parts = {label: table.filter(pc.equal(table["label"], label)) for label in table["label"].unique().to_pylist()}
    return {label: (part["id"].to_pylist(), _codes(part)) for label, part in parts.items()}


def _codes(table: pa.Table) -> np.ndarray:
    return matrix(table["class_code"]).astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class Ways:
    """The ways that a run's paths take: from images' class codes to those of images of the target classes."""

    targets: str
    """Classes to walk each image to: `runner-up`, `all` or a class name."""
    counter: str
    donors: int
    path: str
    seed: int
    ends: dict[int, tuple[list[str], np.ndarray]]
    """Class -> ids (n,) and class codes (n, D) of the images that its paths may end at."""
    codes: np.ndarray
    """(M, D) training codes."""

    @cached_property
    def known(self) -> TrainingCodes:
        """The training codes, to measure distances to and to go among; set up once per process."""
        return TrainingCodes(self.codes)

    def find(self, names: list[str], codes: np.ndarray, targets: list[int]) -> tuple[list[list[str]], np.ndarray]:
        """For images with these ids and class codes (B, D): the ids of each one's counter codes, and waypoints.

        Those are (n, W, D), n the number of counter codes of all images together, in turn. An image may have fewer
        than `donors`, where its target class has. Its own depend on no other image.
        """
        donors, starts, ends = [], [], []
        for name, code, target in zip(names, codes, targets, strict=True):
            ids, found = self.ends[target]
            count = min(self.donors, len(ids))
            if self.counter == "random":
                chosen = np.random.default_rng([self.seed, target, *name.encode()]).permutation(len(ids))[:count]
            elif self.counter == "nearest":
                chosen = np.linalg.norm(found - code, axis=1).argsort(kind="stable")[:count]
            else:
                chosen = np.arange(count)
            donors.append([ids[k] for k in chosen])
            starts += [code] * count
            ends += list(found[chosen])
        straight = np.stack(ends)[:, None]
        guided = self.path == "guided"
        return donors, self.known.guided(np.stack(starts), straight[:, 0]).astype(np.float32) if guided else straight


def check_donors(options: ExplainOptions) -> None:
    """Raise UserError for more `--donors` than `--counter` has."""
    most = MOST_DONORS.get(options.counter, 1)
    if options.donors > most:
        there = f"there are {most} at most" if options.counter in MOST_DONORS else "there is one, an image's"
        raise UserError(f"--donors {options.donors}: of --counter {options.counter} {there}")


def read_ways(run: Run, options: ExplainOptions) -> Ways:
    """What a run's codes and options say of the ways. Raises UserError for options that cannot be followed."""
    check_donors(options)
    table = read_table(run, "codes", ["id", "split", "predicted", "class_code"])
    training = table.filter(pc.equal(table["split"], "train"))
    training = training.take(np.random.default_rng(options.seed).permutation(len(training)))
    targets, ends = options.targets, {}
    if options.counter == "medoid":
        ends = read_medoids(run)
    elif options.counter in MOST_DONORS:
        from sklearn.neighbors import KNeighborsClassifier  # here: slow to import, and workers need it not

        among = training.slice(0, REFERENCE_CODES)
        vote = KNeighborsClassifier(min(VOTERS, len(among))).fit(_codes(among), among["predicted"])
        for label in sorted(training["predicted"].unique().to_pylist()):
            part = training.filter(pc.equal(training["predicted"], label)).slice(0, DONOR_CODES)
            # Not those that stand among another class: they flip nothing, and for its images they are the nearest.
            own = vote.predict(_codes(part)) == label
            part = part.filter(pa.array(own)) if own.any() else part
            ends[label] = part["id"].to_pylist(), _codes(part)
    else:
        image = table.filter(pc.equal(table["id"], options.counter))
        if not len(image):
            choices = ", ".join(MOST_DONORS)
            raise UserError(
                f"--counter {options.counter}: choose {choices} or the id of an image of {run.path('codes')}"
            )
        label = image["predicted"][0].as_py()
        names = run.result("classify")["classes"]
        targets, ends = names[label], {label: ([options.counter], _codes(image))}
        if options.targets in names and options.targets != targets:
            raise UserError(
                f"--targets {options.targets}: the classifier gives the --counter image the class {targets}"
            )
    codes = _codes(training.slice(0, REFERENCE_CODES))
    return Ways(targets, options.counter, options.donors, options.path, options.seed, ends, codes)
