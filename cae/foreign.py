"""Opening black boxes from elsewhere: networks of torchvision and timm, exported ones, ONNX files, servers, functions.

Each becomes a module that takes images as its card says and gives outputs (B, C); some of them have a gradient.
Legend: B images, H height, W width, C classes.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from cae.blackboxes import FUNCTION, LIBRARIES, WEB, Card, parted, read_bytes, reason
from cae.checkpoint import read_weights

Create = Callable[[int], nn.Module]  # a network with so many outputs
TRANSIENT = (429, 500, 502, 503, 504)  # what a server answers that may answer well another time
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def open_foreign(spec: str, card: Card, trusted: bool, built_in: Mapping[str, Create],
                 classes: tuple[str, ...] = ()) -> tuple[nn.Module, Card]:  # fmt: skip
    """The network, in evaluation mode, and its card with what the file or library says of its own inputs.

    `built_in` makes networks that need no library, by name (`torchvision:resnet18`); `classes` are those that its
    outputs have where the card names none. Raises ValueError, in one line, and a server's network ConnectionError where
    the server does not answer.
    """
    if spec.startswith(WEB):
        return _server(spec, card, card.classes or classes), card
    if spec.startswith(LIBRARIES):
        return _from_library(spec, card, built_in)
    if FUNCTION.fullmatch(spec):
        return _function(spec, card), card
    if spec.endswith(".onnx"):
        return _onnx(spec, card)
    if spec.endswith(".pt2"):
        return _exported(spec, card, trusted)
    if not trusted:
        raise ValueError(
            f"{spec} is read as tensors only, which make no network: name one with torchvision:NAME@{spec} or "
            f"timm:NAME@{spec}, or say --trust-pickle if it holds a whole network and you trust whoever made it"
        )
    try:
        net = torch.load(io.BytesIO(read_bytes(spec)), map_location="cpu", weights_only=False)
    except Exception as error:
        raise ValueError(f"cannot load {spec}: {reason(error)}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{spec} holds no network but a {type(net).__name__}: save the network itself")
    return net.eval(), card


def _from_library(spec: str, card: Card, built_in: Mapping[str, Create]) -> tuple[nn.Module, Card]:
    network, _, path = parted(spec)
    library, _, name = network.partition(":")
    if not path:
        raise ValueError(f"--classifier {spec} names no weights: write {library}:NAME@FILE.safetensors")
    create = built_in.get(network)
    if create is None:
        try:
            module = importlib.import_module(library)
        except Exception as error:  # also what a torchvision built for another torch raises
            known = ", ".join(known.partition(":")[2] for known in built_in if known.startswith(library))
            instead = f"; without it there are {known}" if known else ""
            raise ValueError(f"{network} needs the package {library} ({reason(error)}){instead}") from error
        make = module.models.get_model if library == "torchvision" else module.create_model

        def create(outputs: int) -> nn.Module:
            return make(name, num_classes=outputs)

    try:
        with torch.device("meta"):
            names = list(create(2).state_dict())
            last = names[-1]  # of the head: one row an output
    except Exception as error:
        raise ValueError(f"{library} makes no network {name!r}: {reason(error)}") from error
    state = read_weights(path)
    # What wraps a network in training puts its own name before all others: DDP `module.`, Lightning often `model.`.
    needed = {held for held in names if not held.endswith("num_batches_tracked")}
    before = [held.removesuffix(last) for held in state if f".{held}".endswith(f".{last}")]
    before = [prefix for prefix in before if {prefix + held for held in needed} <= set(state)] or before
    if len(before) != 1:
        several = f"there are several networks in it ({', '.join(before)})" if before else f"they hold no {last}"
        raise ValueError(f"the weights in {path} do not fit {name}: {several}")
    (prefix,) = before
    state = {held.removeprefix(prefix): tensor for held, tensor in state.items() if held.startswith(prefix)}
    net = create(len(state[last]))
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {name}") from error
    about = getattr(net, "pretrained_cfg", IMAGENET)  # timm's
    size = getattr(net, "image_size", None)  # torchvision's vision transformers
    if about.get("fixed_input_size"):
        size = tuple(about["input_size"][1:])
    return net.eval(), replace(
        card,
        mean=tuple(about["mean"]) if card.mean is None else card.mean,
        std=tuple(about["std"]) if card.std is None else card.std,
        input_size=card.input_size or size,
    )


class Foreign(nn.Module):
    """Asks what is no network of torch modules about at most `batch` images at once.

    `fixed`: about exactly so many, the last one repeated as often as need be.
    """

    def __init__(self, ask: Callable[[Tensor], Tensor], batch: int, fixed: bool = False) -> None:
        super().__init__()
        self.ask, self.batch, self.fixed = ask, batch, fixed

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for part in x.float().split(self.batch):
            missing = self.batch - len(part) if self.fixed else 0
            padded = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part
            try:
                outputs.append(self.ask(padded)[: len(part)])
            except (RuntimeError, ValueError, ConnectionError, TimeoutError):
                raise
            except Exception as error:  # ONNX Runtime's own, and whatever a function raises
                raise ValueError(f"the classifier failed: {reason(error)}") from error
        return torch.cat(outputs)

    def train(self, mode: bool = True) -> Foreign:  # an exported network stays as it was exported
        return self


def _from_file(card: Card, ask: Callable[[Tensor], Tensor], shape: Sequence[Any]) -> tuple[Foreign, Card]:
    """A network whose input has a shape, of which some sizes are fixed: integers; and the card that says so."""
    sides = tuple(shape[2:4] if card.layout == "NCHW" else shape[1:3])
    if all(isinstance(side, int) for side in sides):
        card = replace(card, input_size=sides)
    fixed = isinstance(shape[0], int)
    return Foreign(ask, shape[0] if fixed else card.batch, fixed), card


def _onnx(spec: str, card: Card) -> tuple[nn.Module, Card]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{spec} needs the package onnxruntime: pip install onnxruntime") from error
    # A path, where there is one: a large network's weights lie in files beside it.
    model = spec if os.path.exists(spec) else read_bytes(spec)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised as well
    available = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
    try:
        session = onnxruntime.InferenceSession(model, options, providers)
        (given,) = session.get_inputs()
        dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}[given.type]
    except Exception as error:
        raise ValueError(f"{spec} is no ONNX network with one input of images: {reason(error)}") from error
    wanted = [session.get_outputs()[0].name]

    def ask(x: Tensor) -> Tensor:
        (outputs,) = session.run(wanted, {given.name: np.ascontiguousarray(x.detach().cpu().numpy(), dtype)})
        return torch.as_tensor(outputs, dtype=torch.float32, device=x.device)

    return _from_file(card, ask, given.shape)


def _exported(spec: str, card: Card, trusted: bool) -> tuple[nn.Module, Card]:
    data = read_bytes(spec)
    if not trusted:
        _refuse_pickles(spec, data)
    try:
        program = torch.export.load(io.BytesIO(data))
        (given,) = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    except Exception as error:
        raise ValueError(f"{spec} is no exported network with one input of images: {reason(error)}") from error
    return _from_file(card, _Exported(program), given.meta["val"].shape)


class _Exported:
    """Asks an exported network where the images are: it has the device in its graph."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.device: torch.device | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.device != self.device:
            self.net = move_to_device_pass(self.program, x.device).module().requires_grad_(False)
            self.device = x.device
        outputs: Tensor = self.net(x)
        return outputs


def _refuse_pickles(spec: str, data: bytes) -> None:
    """Raise ValueError where opening an exported network would run a pickle, or code compiled for some machine."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(name.split("/", 1)[-1] == "version" for name in archive.namelist()):  # of the older format
                raise ValueError("version")
        # By the reader that opens them: it finds names in any case, and may see other ones than zipfile does.
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        names = [name.lower() for name in reader.get_all_records()]
        if len(set(names)) < len(names):
            raise ValueError("a name that comes twice")
        for name in names:
            if name.endswith(".pt"):  # inputs that the exporter kept as an example
                torch.load(io.BytesIO(reader.get_record(name)), weights_only=True, map_location="cpu")
            pickled = name.endswith("_config.json") and _pickled(json.loads(reader.get_record(name)))
            if pickled or re.match(r"data/(aotinductor|constants/(custom|opaque)_obj)", name):
                raise ValueError(name)
    except Exception as error:
        raise ValueError(
            f"{spec} is no file of torch.export.save (2.8 or newer), or holds more than a network and tensors: export "
            "it again without, or say --trust-pickle if you trust whoever made it"
        ) from error


def _pickled(config: Any) -> bool:
    """Whether a part of an exported network's configuration says of any tensor that it is a pickle."""
    if isinstance(config, list):
        return any(map(_pickled, config))
    return isinstance(config, dict) and (config.get("use_pickle", False) is not False
                                         or any(map(_pickled, config.values())))  # fmt: skip


def _function(spec: str, card: Card) -> nn.Module:
    module, _, path = spec.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
    except Exception as error:
        raise ValueError(f"no function {spec} ({reason(error)}): it must be installed, or on PYTHONPATH") from error
    if not callable(function):
        raise ValueError(f"{spec} is no function")

    def ask(x: Tensor) -> Tensor:
        try:
            answer = function(x)
        except TypeError:  # NumPy takes no tensors that lie on a GPU
            if x.device.type == "cpu":
                raise
            answer = function(x.cpu())
        return torch.as_tensor(answer, dtype=torch.float32, device=x.device)

    return Foreign(ask, card.batch)


def _server(url: str, card: Card, classes: tuple[str, ...]) -> nn.Module:
    try:
        import urllib3
    except ImportError as error:
        raise ValueError(f"{url} needs the package urllib3: pip install urllib3") from error
    headers = {"Content-Type": "application/json"}
    if card.token:
        if card.token not in os.environ:
            raise ValueError(f"the card of {url} says that ${card.token} holds its token, and it is not set")
        headers["Authorization"] = f"Bearer {os.environ[card.token]}"
    again = urllib3.Retry(card.retries, backoff_factor=0.5, allowed_methods=None, raise_on_status=False,
                          status_forcelist=TRANSIENT)  # fmt: skip
    pool = urllib3.PoolManager(retries=again, timeout=card.timeout, headers=headers)
    key = "inputs" if card.protocol == "mlflow" else "instances"

    def ask(x: Tensor) -> Tensor:
        images = x.detach().cpu().double().numpy().round(6).tolist()
        try:
            answer = pool.request("POST", url, body=json.dumps({key: images}))
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(f"the classifier at {url} does not answer: {reason(error)}") from error
        if answer.status != 200:
            text = " ".join(answer.data.decode("utf-8", "replace").split())
            kind = ConnectionError if answer.status in TRANSIENT else ValueError  # another day, perhaps; or never
            raise kind(f"the classifier at {url} answers {answer.status}: {text[:200]}")
        try:
            held = json.loads(answer.data)
            rows = held["predictions"] if isinstance(held, dict) else held
            rows = [_in_order(row, classes) if isinstance(row, dict) else row for row in rows]
            outputs = torch.tensor(rows, dtype=torch.float32, device=x.device)
            if len(outputs) != len(x):
                raise ValueError(f"{len(outputs)} rows for {len(x)} images")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the classifier at {url} gives no list of numbers for each image: {reason(error)}"
            ) from error
        return outputs

    return Foreign(ask, card.batch)


def _in_order(row: dict[str, float], classes: tuple[str, ...]) -> list[float]:
    """A row with named columns as a list, in the order of the classes: its own may be another one for each image.

    Raises ValueError for names that are neither the classes nor their numbers; the second class's number alone may have
    any but the first one's.
    """
    for names in (classes, [str(i) for i in range(len(row))]):
        if row.keys() == set(names):
            return [row[name] for name in names]
    if len(row) == 1 and row.keys() != set(classes[:1]):
        return list(row.values())
    raise ValueError(
        f"it names {', '.join(row)} and the classes are {', '.join(classes) or 'not known'}: name its outputs, in "
        "order, under `classes` in a JSON that names it under `classifier`, and give that"
    )
