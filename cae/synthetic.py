"""The `synthetic` dataset: drawn chest radiographs whose classes differ by a lesion at a known place, and nothing else.

Every image is an individual of its own (build, pose, organs, ribs, exposure, noise, wires and burnt-in marks), drawn
alike for all classes; the class only decides which lesion is added. So the truth is known for every pixel, and the
same individual can be drawn with another class: the counterfactual that an explainer tries to find.

Coordinates run from -1 to 1, x to the right and y downwards, so an image looks the same at any size.
Legend: S image size. Fields are float32 (S, S); brightness runs from 0 (black) to 1 (white).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

_Pair = tuple[np.ndarray, np.ndarray]

CLASSES = ("normal", "nodule", "ring", "streaks")


@dataclass(frozen=True)
class Synthetic:
    """Which images the dataset holds. Raises ValueError for values that can't be drawn."""

    images: int = 1000
    """Images in all splits together, 5 or more for each class."""
    size: int = 64
    """Height and width, 32 or more."""
    classes: int = 2
    """How many of CLASSES there are, 2 to 4."""
    shortcut: bool = False
    """Whether a small marker in the lower right corner goes with the last class."""
    seed: int = 0
    """Another seed, other individuals."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= len(CLASSES):
            raise ValueError(f"synthetic: classes is {self.classes}; choose 2 to {len(CLASSES)}")
        if self.size < 32:
            raise ValueError(f"synthetic: size is {self.size}; choose 32 or more")
        if self.images < 5 * self.classes:
            raise ValueError(f"synthetic: images is {self.images}; choose {5 * self.classes} or more")
        if self.seed < 0:
            raise ValueError(f"synthetic: seed is {self.seed}; choose 0 or more")

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names, in the order of their numbers."""
        return CLASSES[: self.classes]


@dataclass(frozen=True, eq=False)
class Sample:
    """One drawn image and the truth about it."""

    image: np.ndarray
    """uint8 (S, S, 3), grey."""
    mask: np.ndarray
    """bool (S, S): where the lesion changes the image by a quarter of its greatest change or more."""
    shortcut_mask: np.ndarray
    """bool (S, S): the planted marker, all False without one."""
    label: int
    """Class drawn."""
    split: str
    """`train`, `val` or `test`."""


def place(config: Synthetic, index: int) -> tuple[int, str]:
    """Class and split of image `index`: classes alternate, and each class is split 70/15/15 in order of index."""
    if not 0 <= index < config.images:
        raise ValueError(f"synthetic: no image {index}; there are {config.images}, counted from 0")
    per_class = config.images // config.classes
    held_out = max(1, round(0.15 * per_class))
    rank = index // config.classes
    split = "train" if rank < per_class - 2 * held_out else "val" if rank < per_class - held_out else "test"
    return index % config.classes, split


def draw(config: Synthetic, index: int, label: int | None = None) -> Sample:
    """Image `index`, whatever was drawn before; with `label`, the same individual drawn as that class instead."""
    own_label, split = place(config, index)
    label = own_label if label is None else label
    if not 0 <= label < config.classes:
        raise ValueError(f"synthetic: no class {label}; there are {config.classes}, counted from 0")
    # One stream a layer: what one of them draws moves nothing in the others.
    of_body, of_lesion, of_objects, of_noise = (np.random.default_rng([config.seed, index, k]) for k in range(4))
    x, y = _grid(config.size)
    body_x, body_y = _pose(of_body, x, y)

    lungs = _draw_lungs(of_body)
    anatomy = _expose(of_body, _anatomy(of_body, lungs, body_x, body_y), x, y)
    lesion = _lesion(of_lesion, lungs, CLASSES[label], body_x, body_y)
    lung_depth = np.maximum(lungs[0].depth(body_x, body_y), lungs[1].depth(body_x, body_y))
    cover, paint = _objects(of_objects, lung_depth, x, y)
    marker = np.zeros_like(x)
    if config.shortcut:
        marker_cover, marker_paint = _marker(of_objects, x, y)
        if label == config.classes - 1:
            marker = marker_cover
            cover, paint = np.maximum(cover, marker), paint * (1 - marker) + marker_paint * marker

    # Objects lie over the body, so they hide the lesion too, and the mask is what is left to be seen of it.
    change = (np.clip(anatomy + lesion, 0, 1) - anatomy) * (1 - cover)
    mask = (change >= 0.25 * change.max()) & (change > 0)
    grey = anatomy * (1 - cover) + paint * cover + change + _noise(of_noise, config.size)
    pixels = np.clip(grey * 255 + 0.5, 0, 255).astype(np.uint8)
    return Sample(np.repeat(pixels[:, :, None], 3, axis=2), mask, marker > 0.5, label, split)


@lru_cache(maxsize=8)
def _grid(size: int) -> _Pair:
    """x and y of the pixel centres, each (S, S)."""
    axis = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x, y


def _step(distance: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 as the signed distance goes from -width to width."""
    t = np.clip(distance * (0.5 / width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _bump(distance: np.ndarray, width: float) -> np.ndarray:
    """1 at distance 0, falling to 0.37 at `width` and on to 0."""
    return np.exp(-((distance / width) ** 2))


def _turned(x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, angle: float) -> _Pair:
    """x and y seen from a centre, in axes turned by `angle` (radians)."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(centre_x), y - np.float32(centre_y)
    return cos * dx + sin * dy, cos * dy - sin * dx


def _pose(rng: Generator, x: np.ndarray, y: np.ndarray) -> _Pair:
    """x and y in the axes of a body that stands a little askew, nearer or farther."""
    u, v = _turned(x, y, rng.uniform(-0.1, 0.1), rng.uniform(-0.08, 0.08), rng.normal(0, 0.06))
    scale = np.float32(rng.uniform(0.9, 1.12))
    return u * scale, v * scale


@dataclass(frozen=True)
class _Lung:
    """An egg, narrow at the top, cut off by the dome of the diaphragm."""

    side: int
    x: float
    y: float
    half_width: float
    half_height: float
    tilt: float
    floor: float

    def depth(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Rough signed distance to the outline, positive inside."""
        u, v = _turned(x, y, self.x, self.y, self.tilt)
        u, v = u / (self.half_width * (1 + 0.28 * v / self.half_height)), v / self.half_height
        egg = (1 - np.sqrt(u * u + v * v * np.abs(v))) * self.half_width
        dome = self.floor + 0.9 * (x - self.x - 0.1 * self.side) ** 2 / self.half_width - y
        return np.minimum(egg, dome)


def _draw_lungs(rng: Generator) -> tuple[_Lung, _Lung]:
    """The lungs on the left and right of the image."""
    top, bottom = rng.uniform(-0.92, -0.62), rng.uniform(0.3, 0.78)
    half_width, gap, tilt = rng.uniform(0.27, 0.37), rng.uniform(0.1, 0.2), rng.uniform(0.02, 0.16)
    lungs = []
    for side in (-1, 1):
        width = half_width * rng.uniform(0.9, 1.08)
        floor = bottom + rng.uniform(-0.08, 0.08)
        half_height = (floor - top) * 0.6
        x = side * (gap + width)
        lungs.append(_Lung(side, x, top + half_height, width, half_height, -side * tilt, floor))
    return lungs[0], lungs[1]


def _smooth(rng: Generator, cells: int, size: int) -> np.ndarray:
    """A random field with features about `2 / cells` wide, of standard deviation near 1 at its knots."""
    knots = rng.standard_normal((cells + 1, cells + 1), np.float32)
    before, weight = _between(cells, size)
    rows = knots[before] * (1 - weight[:, None]) + knots[before + 1] * weight[:, None]
    return rows[:, before] * (1 - weight) + rows[:, before + 1] * weight


@lru_cache(maxsize=32)
def _between(cells: int, size: int) -> _Pair:
    """For each pixel of a row, the knot before it and the weight of the one after it, each (S,)."""
    position = (np.arange(size) + 0.5) * (cells / size)
    before = position.astype(np.int64)
    return before, (0.5 - 0.5 * np.cos(np.pi * (position - before))).astype(np.float32)


def _anatomy(rng: Generator, lungs: tuple[_Lung, _Lung], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the body lets through: about 0 for air around it, 0.3 for lungs, 0.9 for bone on organs."""
    left, right = lungs
    centre = (left.x + right.x) / 2
    spread = (right.x - left.x) / 2 + (left.half_width + right.half_width) / 2
    across = x - centre

    # Torso with shoulders and neck, and arms that may hang beside it.
    shoulder, slope = left.y - left.half_height + rng.uniform(-0.05, 0.12), rng.uniform(0.14, 0.3)
    flank = spread + rng.uniform(0.05, 0.16) + 0.05 * y * rng.uniform(-1, 1)
    reach = rng.uniform(0.1, 0.5)
    neck = rng.uniform(0.26, 0.36)
    outline = neck + (flank + reach * _step(0.1 - y, 0.4) - neck) * _step(y - shoulder, slope)
    body = _step(outline - np.abs(across), 0.035)
    thickness = np.sqrt(np.clip(1 - (across / (outline + 0.05)) ** 2, 0, 1))
    field = body * (rng.uniform(0.3, 0.4) + rng.uniform(0.22, 0.32) * thickness)

    # Abdomen below the lungs, sometimes with a bubble of gas under the diaphragm.
    belly = _step(y - (left.floor + right.floor) / 2 + 0.05, 0.25) * body
    field = field + rng.uniform(0.08, 0.16) * belly
    if rng.random() < 0.35:
        u, v = _turned(x, y, right.x - 0.05, right.floor + rng.uniform(0.18, 0.26), 0.0)
        field = field - rng.uniform(0.1, 0.2) * _bump(np.sqrt((u / 0.2) ** 2 + (v / 0.09) ** 2), 1.0)

    # Lungs, with the vessels that leave them at the hilum.
    soft = rng.uniform(0.025, 0.05)
    air = np.maximum(_step(left.depth(x, y), soft), _step(right.depth(x, y), soft))
    vessels = _smooth(rng, 14, len(x)) * 0.02 + _smooth(rng, 7, len(x)) * 0.025
    for lung in lungs:
        u, v = _turned(x, y, lung.x - lung.side * lung.half_width * 0.85, lung.y + 0.12, 0.0)
        vessels = vessels + rng.uniform(0.03, 0.1) * _bump(np.sqrt(u * u + 0.5 * v * v), 0.2)
    field = field - air * (rng.uniform(0.28, 0.4) - vessels)

    # Heart and great vessels.
    u, v = _turned(x, y, centre + rng.uniform(0.05, 0.16), right.floor - rng.uniform(0.12, 0.3), rng.uniform(0.4, 0.9))
    heart = _step(1 - np.sqrt((u / rng.uniform(0.36, 0.5)) ** 2 + (v / rng.uniform(0.24, 0.34)) ** 2), 0.22)
    aorta = _step(rng.uniform(0.1, 0.17) - np.abs(across), 0.06) * _step(y - shoulder + 0.05, 0.25)
    field = field + np.maximum(heart, aorta * 0.7) * body * rng.uniform(0.12, 0.2)

    # Spine, its discs as faint gaps.
    discs = 1 + 0.35 * np.sin(y * rng.uniform(18, 24) + rng.uniform(0, 6.3))
    field = field + rng.uniform(0.05, 0.13) * _bump(across, 0.09) * discs * body

    # Ribs arch from the spine outwards and down, the front ones fainter and the other way.
    chest = _step(np.maximum(left.depth(x, y), right.depth(x, y)) + 0.1, 0.1)
    radius = np.abs(across) / spread
    count, phase, drop = rng.uniform(15, 21), rng.uniform(0, 6.3), rng.uniform(0.3, 0.55)
    back = np.sin(count * (y + 0.22 * radius - drop * radius * radius) + phase)
    front = np.sin(count * 0.8 * (y - drop * 1.1 * radius) + rng.uniform(0, 6.3))
    ribs = rng.uniform(0.035, 0.075) * back + rng.uniform(0.0, 0.025) * front
    rim = np.clip(1.15 - thickness, 0, 1) * 0.06
    field = field + chest * (ribs * _step(radius - 0.15, 0.15) + rim)

    # Collar bones.
    tilt = rng.uniform(0.1, 0.35)
    for lung in lungs:
        u, v = _turned(x, y, lung.x, lung.y - lung.half_height * rng.uniform(0.72, 0.9), lung.side * -tilt)
        field = field + rng.uniform(0.05, 0.13) * _bump(v + 0.25 * u * u, 0.045) * _step(0.36 - np.abs(u), 0.08)
    return field + 0.012 * body * _smooth(rng, 5, len(x))


def _expose(rng: Generator, field: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The field as a detector and its operator might show it, within [0.02, 0.98]."""
    gain, offset, gamma = rng.uniform(0.85, 1.15), rng.uniform(-0.04, 0.06), rng.uniform(0.8, 1.35)
    slant = rng.uniform(-0.07, 0.07) * x + rng.uniform(-0.07, 0.07) * y
    exposed = np.clip(field * gain + offset + slant * field, 0.02, 1) ** gamma
    # The collimator cuts off one edge now and then.
    edge, angle = rng.uniform(0.82, 1.3), rng.choice(4) * np.pi / 2 + rng.uniform(-0.05, 0.05)
    u, _ = _turned(x, y, 0.0, 0.0, angle)
    return np.clip(exposed * _step(edge - u, 0.02), 0.02, 0.98).astype(np.float32)


def _lesion(rng: Generator, lungs: tuple[_Lung, _Lung], kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What a lesion of this kind adds to the brightness; place, size and strength don't depend on the kind."""
    radius, strength = rng.uniform(0.2, 0.32), rng.uniform(0.42, 0.6)
    centre_x, centre_y = _spot(rng, lungs, radius)
    angle, squeeze = rng.uniform(0, np.pi), rng.uniform(0.8, 1.0)
    lobes, phase = rng.uniform(0.0, 0.1), rng.uniform(0, 2 * np.pi)
    u, v = _turned(x, y, centre_x, centre_y, angle)
    if kind == "normal":
        return np.zeros_like(x)
    if kind == "streaks":
        lines = _bump(np.sin(v * (np.pi / max(0.15, 0.8 * radius))), 0.55)
        return strength * lines * _step(1.15 * radius - np.hypot(u, v), 0.3 * radius)
    distance = np.hypot(u, v / squeeze) * (1 + lobes * np.sin(3 * np.arctan2(v, u) + phase))
    if kind == "ring":
        return strength * _bump(distance - 0.82 * radius, 0.32 * radius)
    return strength * _step(0.92 * radius - distance, 0.45 * radius)


def _spot(rng: Generator, lungs: tuple[_Lung, _Lung], radius: float) -> tuple[float, float]:
    """A point well inside a lung: the deepest of the candidates if none has room for the radius."""
    candidates = []
    for _ in range(12):
        lung = lungs[rng.integers(2)]
        u, v = rng.uniform(-1, 1), rng.uniform(-0.9, 0.7)
        candidates.append((lung, lung.x + u * lung.half_width, lung.y + v * lung.half_height))
    depths = [float(lung.depth(np.array(x), np.array(y))) for lung, x, y in candidates]
    fits = [k for k, depth in enumerate(depths) if depth > 0.85 * radius]
    _, x, y = candidates[fits[0] if fits else int(np.argmax(depths))]
    return x, y


def _objects(rng: Generator, lung_depth: np.ndarray, x: np.ndarray, y: np.ndarray) -> _Pair:
    """Things that say nothing about the class: their opacity and their brightness."""
    pixel = 2 / len(x)
    cover, paint = np.zeros_like(x), np.ones_like(x)

    def lay(shape: np.ndarray, brightness: float) -> None:
        nonlocal cover, paint
        paint = np.where(shape > cover, np.float32(brightness), paint)
        cover = np.maximum(cover, shape)

    # A letter at an upper corner, as blocks of a 3 x 5 grid.
    if rng.random() < 0.5:
        side, cell = rng.choice((-1, 1)), rng.uniform(0.045, 0.065)
        u, v = _turned(x, y, side * rng.uniform(0.72, 0.86), rng.uniform(-0.88, -0.5), rng.uniform(-0.15, 0.15))
        lay(_glyph(rng, u, v, cell, 3, 5) * 0.95, rng.uniform(0.75, 1.0))
    # A line of burnt-in text.
    if rng.random() < 0.3:
        u, v = _turned(x, y, rng.uniform(-0.6, 0.2), rng.choice((-0.93, 0.93)), 0.0)
        lay(_glyph(rng, u, v, 0.032, 16, 2) * 0.9, rng.uniform(0.6, 0.95))
    # A wire or line across the body, with the electrode it ends in.
    if rng.random() < 0.4:
        start, end, bend = rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.5)
        stop = rng.uniform(-0.4, 1.2)
        t = (np.minimum(y, np.float32(stop)) + 1) / 2
        path = start + (end - start) * t + bend * np.sin(np.pi * t)
        steep = np.sqrt(1 + ((end - start) / 2 + bend * np.pi / 2 * np.cos(np.pi * t)) ** 2)
        wire = _step(0.012 - np.abs(x - path) / steep, max(0.01, pixel / 2)) * _step(stop - y, 0.02)
        lay(wire * 0.6, 0.95)
        # Below the end, `path` stays where the wire ended.
        tip = _step(0.05 - np.hypot(x - path[-1:], y - np.float32(stop)), max(0.01, pixel / 2))
        lay(tip * 0.9, 0.97)
    # Surgical clips: short bright strokes.
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 4)):
            u, v = _turned(x, y, rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.8), rng.uniform(0, np.pi))
            stroke = _step(0.045 - np.abs(u), pixel / 2) * _step(0.016 - np.abs(v), max(0.008, pixel / 2))
            lay(stroke * 0.9, 1.0)
    # Soft spots, never over the lungs.
    if rng.random() < 0.4:
        low, side = rng.random() < 0.5, rng.choice((-1, 1))
        spot_x = rng.uniform(-0.7, 0.7) if low else side * rng.uniform(0.7, 0.95)
        spot_y = rng.uniform(0.6, 0.9) if low else rng.uniform(-0.5, 0.6)
        size, outside = rng.uniform(0.07, 0.14), 1 - _step(lung_depth + 0.06, 0.05)
        lay(_step(size - np.hypot(x - spot_x, y - spot_y), 0.5 * size) * outside * rng.uniform(0.3, 0.7), 0.9)
    return cover, paint


def _glyph(rng: Generator, u: np.ndarray, v: np.ndarray, cell: float, columns: int, rows: int) -> np.ndarray:
    """Random blocks that read as a letter or a line of text, starting at the origin."""
    filled = rng.random((rows + 2, columns + 2)) < 0.62
    filled[[0, -1], :] = filled[:, [0, -1]] = False
    column = np.clip(np.floor(u / cell).astype(np.int64) + 1, 0, columns + 1)
    row = np.clip(np.floor(v / cell).astype(np.int64) + 1, 0, rows + 1)
    return filled[row, column].astype(np.float32)


def _marker(rng: Generator, x: np.ndarray, y: np.ndarray) -> _Pair:
    """The planted shortcut, a bright square with a dark core in the lower right corner: opacity and brightness."""
    pixel = 2 / len(x)
    u, v = _turned(x, y, rng.uniform(0.74, 0.86), rng.uniform(0.74, 0.86), rng.uniform(-0.2, 0.2))
    distance = np.maximum(np.abs(u), np.abs(v))
    return _step(0.1 - distance, pixel / 2), np.float32(0.95) * _step(distance - 0.04, pixel / 2)


def _noise(rng: Generator, size: int) -> np.ndarray:
    """Film grain, finer and coarser, of an exposure that varies."""
    level = rng.uniform(0.008, 0.022)
    return level * (rng.standard_normal((size, size), np.float32) + 0.6 * _smooth(rng, 32, size))
