"""Black boxes from elsewhere: how they are named, and the card that says what one takes and gives.

`cae.foreign` opens them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

import fsspec
import numpy as np

from cae.data import first_line

LIBRARIES = ("torchvision:", "timm:")
WEB = ("http://", "https://")
TRUSTED = "trusted:"  # in front of a classifier whose pickles may be run
FILES = (".json", ".onnx", ".pt2", ".pth", ".pt")
FUNCTION = re.compile(r"[a-z_]\w*(\.\w+)*:[a-z_]\w*(\.\w+)*", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """What a classifier takes and gives: the fields of the JSON beside it (`net.json` beside `net.onnx`).

    Raises ValueError, in one line, for values that make no sense.
    """

    classifier: str = ""
    """The classifier itself, where the JSON is given in its place. A relative path starts at the JSON's folder."""
    classes: tuple[str, ...] = ()
    """Names of the outputs, in order. Empty: the data's classes in sorted order, or numbers."""
    input_size: int | tuple[int, int] | None = None
    """Side of the square, or height and width, that images are resized to. None: any size will do."""
    channels: Literal["RGB", "BGR", "grey"] = "RGB"
    """Order of the colour channels; `grey`: one channel, their mean; three times where `mean` or `std` has three
    numbers."""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Order of the axes."""
    mean: float | tuple[float, ...] | None = None
    """What is subtracted from values in [0, 1], for all channels or for each. None: ImageNet's for torchvision, the
    network's own for timm, else 0."""
    std: float | tuple[float, ...] | None = None
    """What they are then divided by (1/255 for a classifier that wants 0 to 255). None: likewise, else 1."""
    outputs: Literal["logits", "probabilities"] = "logits"
    """What comes out: a number for every class, or, of two classes, the second one's alone."""
    batch: int = 64
    """Most images that a file, a server or a function is asked about at once."""
    cam_layer: str = ""
    """Layer of a torchvision or timm network that Grad-CAM looks at. Empty: no Grad-CAM."""
    protocol: Literal["json", "mlflow"] = "json"
    """What a server is sent: {"instances": [image, ...]}, as TensorFlow Serving and KServe take it, or MLflow's
    {"inputs": [image, ...]}. It answers {"predictions": [...]} or a bare list, with a list or an object an image; an
    object's names are the classes, in any order, or their numbers."""
    timeout: float = 60.0
    """Seconds that a server may take to answer."""
    retries: int = 5
    """How often a server is asked again, after growing pauses, where it does not answer or answers 429 or 5xx."""
    token: str = ""
    """Environment variable with the server's bearer token, on every machine that asks it."""

    def __post_init__(self) -> None:
        def numbers(value: Any, kind: type | tuple[type, ...]) -> bool:
            values = value if isinstance(value, tuple) else (value,)
            return bool(values) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)

        size, names, of_channels = self.input_size, self.classes, ((), (1,), (3,))
        fine = {
            "classes": isinstance(names, tuple) and all(isinstance(n, str) for n in names)
            and len(set(names)) == len(names) != 1,
            "input_size": size is None or (numbers(size, int) and np.min(size) > 0 and np.shape(size) in ((), (2,))),
            "mean": self.mean is None or (numbers(self.mean, (int, float)) and np.shape(self.mean) in of_channels),
            "std": self.std is None or (numbers(self.std, (int, float)) and np.all(self.std)
                                        and np.shape(self.std) in of_channels),
            "batch": numbers(self.batch, int) and self.batch > 0,
            "timeout": numbers(self.timeout, (int, float)) and self.timeout > 0,
            "retries": numbers(self.retries, int) and self.retries >= 0,
        }  # fmt: skip
        for name, hint in get_type_hints(Card).items():
            value, choices = getattr(self, name), get_args(hint) if name not in fine else ()
            if not fine.get(name, value in choices if choices else isinstance(value, str)):
                raise ValueError(f"{name} is {value!r}" + (f": choose {', '.join(choices)}" if choices else ""))


def is_foreign(spec: str) -> bool:
    """Whether a classifier is one from elsewhere; else it is a folder saved by this project."""
    return spec.startswith((*LIBRARIES, *WEB)) or spec.endswith(FILES) or FUNCTION.fullmatch(spec) is not None


def parted(spec: str) -> tuple[str, str, str]:
    """A library's network, "@" and the file with its weights; of all else the file, or folder, alone."""
    return spec.partition("@") if spec.startswith(LIBRARIES) else ("", "", spec)


def resolve(spec: str, trust_pickle: bool = False, folder: str = "") -> str:
    """A classifier as any process finds it: a path, relative to `folder` or the current one, made absolute.

    With `trust_pickle`, a file that may hold a pickle is marked as one that may be run. Raises ValueError.
    """
    if spec.startswith(TRUSTED):
        raise ValueError(f"--classifier {spec}: say --trust-pickle instead")
    if spec.startswith(WEB):
        if urlsplit(spec).password:
            raise ValueError("a URL with a password would be logged: put a token into the environment (see Card.token)")
        return spec
    if FUNCTION.fullmatch(spec):
        return spec
    network, at, path = parted(spec)
    if "://" not in path and path:
        local = os.path.join(folder, os.path.expanduser(path))
        path = f"{folder}/{path}" if "://" in folder else os.path.abspath(local)
    mark = TRUSTED if trust_pickle and path.endswith((".json", ".pt2", ".pth", ".pt")) and not at else ""
    return mark + network + at + path


def read_card(spec: str) -> tuple[str, Card]:
    """What to open for a foreign classifier, and its card, from the JSON that it is or that lies beside its file.

    Raises ValueError, in one line, for a JSON that is no card.
    """
    if spec.startswith(WEB) or FUNCTION.fullmatch(spec):
        return spec, Card()
    given = spec.endswith(".json")
    path = spec if given else os.path.splitext(parted(spec)[2])[0] + ".json"
    try:
        with fsspec.open(path) as file:
            values = json.load(file)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        unknown = [name for name in values if name not in get_type_hints(Card)]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of the fields {', '.join(get_type_hints(Card))}")
        card = Card(**values)
    except (FileNotFoundError, NotADirectoryError) as error:
        if given:
            raise ValueError(f"no file {path}: give a classifier, or the JSON that describes one") from error
        return spec, Card()
    except (AttributeError, TypeError) as error:
        names = ", ".join(get_type_hints(Card))
        raise ValueError(f"{path} is no card of a classifier, an object with some of the fields {names}") from error
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot use {path}: {first_line(error)}") from error
    if not given:
        return spec, card
    if not card.classifier or card.classifier.endswith(".json"):
        raise ValueError(f'{path} names no classifier: add, say, "classifier": "net.onnx"')
    return resolve(card.classifier, folder=os.path.dirname(path)), card


def fingerprint(spec: str) -> str:
    """A hash of what a classifier is read from: 64 hexadecimal digits.

    Of its files and its card; of a server and a function there is the card alone. Of weights that lie beside an ONNX
    file those are seen whose name begins with its own. Raises ValueError where a file is gone.
    """
    spec = spec.removeprefix(TRUSTED)
    what, card = read_card(spec) if is_foreign(spec) else (spec, Card())
    # Fields as they are by default are left out: one that is new to the code leaves the hashes as they were.
    told = {field.name: value for field in fields(card) if (value := getattr(card, field.name)) != field.default}
    found = hashlib.sha256(repr(told).encode())
    path = parted(what)[2]
    if not is_foreign(what):
        files = [f"{path}/model.safetensors", f"{path}/config.json"]
    else:
        files = [] if what.startswith(WEB) or FUNCTION.fullmatch(what) else [path]
        if path.endswith(".onnx"):
            files += sorted(glob.glob(f"{glob.escape(path)}?*"))
    for file in files:
        found.update(read_bytes(file))
    return found.hexdigest()


def read_bytes(spec: str) -> bytes:
    """A classifier's file, whole. Raises ValueError, in one line."""
    try:
        with fsspec.open(spec, "rb") as file:
            return file.read()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot read the classifier {spec}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
