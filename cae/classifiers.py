"""The black box b: image -> class logits. The built-in ResNets, and those of foreign.py behind the same interface.

Legend: B batch, H height, W width, C classes. Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cae.blackboxes import FUNCTION, TRUSTED, WEB, is_foreign, read_card
from cae.checkpoint import read_model, save_model
from cae.config import ClassifierConfig
from cae.data import first_line
from cae.foreign import open_foreign

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK = ("resnet50", "resnet101")
LEAST = 1e-7
"""Where only outputs are known, the probability below which their logarithm goes on along its tangent: about float32's
step below 1. A 0 was rounded, and its logarithm would outweigh all else that a map is made of; so would one of anything
much smaller. A softmax with a gradient rounds nothing above float32's least normal number: there it is that one."""
PROBE = (128, 128)  # the images that a classifier for any size is tried on when it is opened


class ResidualUnit(nn.Module):
    """He et al. 2016: two 3x3 convolutions, or 1x1, 3x3, 1x1 for a bottleneck; names and shapes as torchvision's."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            shapes = [(c_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        else:
            shapes = [(c_in, width, 3, stride), (width, width, 3, 1)]
        self.depth = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        c_out = shapes[-1][1]
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(y))
            if i < self.depth:
                y = torch.relu(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Residual network whose state dict has torchvision's names and, with the `imagenet` stem, its shapes.

    The `small` stem, for images of 32 to 96 pixels, has a 3x3 first convolution.
    """

    def __init__(self, arch: str, classes: int, stem: Literal["imagenet", "small"] = "imagenet") -> None:
        super().__init__()
        if arch not in LAYERS:
            raise ValueError(f"unknown network {arch!r}: choose one of {', '.join(LAYERS)}")
        bottleneck = arch in BOTTLENECK
        small = stem == "small"
        self.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        for i, depth in enumerate(LAYERS[arch]):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            units = []
            for j in range(depth):
                units.append(ResidualUnit(c_in, width, stride if j == 0 else 1, bottleneck))
                c_in = width * (4 if bottleneck else 1)
            self.add_module(f"layer{i + 1}", nn.Sequential(*units))
        self.fc = nn.Linear(c_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean(dim=(2, 3)))


class BlackBox(nn.Module):
    """A classifier as the rest of the project sees it: images in [-1, 1] of any size -> logits (B, C).

    `channels`, `layout`, `input_size` and `outputs` are the network's own (see `cae.blackboxes.Card`), as are `mean`
    and `std`, which are those of inputs in [0, 1]. `cam_layer` names the layer whose activations Grad-CAM uses, ""
    where there is none. `differentiable` says whether gradients reach the image.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: tuple[str, ...],
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        input_size: int | tuple[int, int] | None = None,
        cam_layer: str = "layer4",
        *,
        channels: Literal["RGB", "BGR", "grey"] = "RGB",
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        outputs: Literal["logits", "probabilities"] = "logits",
        differentiable: bool = True,
    ) -> None:
        super().__init__()
        self.net = net
        self.classes = classes
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.cam_layer = cam_layer
        self.channels, self.layout, self.outputs = channels, layout, outputs
        self.differentiable = differentiable
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.normalised(x))

    def normalised(self, x: Tensor) -> Tensor:
        """Images x (B, 3, H, W) in the network's channels and units, before they are resized: (B, 3 or 1, H, W)."""
        x = (x + 1) / 2
        if self.channels != "RGB":
            x = x.flip(1) if self.channels == "BGR" else x.mean(1, keepdim=True)
        return (x - self.mean) / self.std

    def answer(self, x: Tensor) -> Tensor:
        """The logits (B, C) of images x (B, 3 or 1, H, W) that `normalised` gave."""
        if self.input_size is not None and x.shape[-2:] != self.input_size:
            x = F.interpolate(x, size=self.input_size, mode="bilinear", antialias=True)
        y = self.net(x if self.layout == "NCHW" else x.permute(0, 2, 3, 1))
        if self.outputs == "probabilities":
            y = y.float()
        if y.numel() == len(y):  # of two classes the second one's; a logit's halves, so that either has a gradient
            y = y.reshape(-1, 1)
            y = torch.cat([-y / 2, y / 2] if self.outputs == "logits" else [(1 - y).clamp(min=LEAST), y], 1)
        if self.outputs == "logits":
            return y
        least = torch.finfo(torch.float32).tiny if self.differentiable else LEAST
        return torch.where(y > least, y, least).log() + (y / least - 1).clamp(max=0)  # one that keeps their order

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Class probabilities (B, C), each row summing to 1."""
        return self(x).float().softmax(1)


def decided(p: Tensor) -> Tensor:
    """The class (B,) that probabilities p (B, C) say; -1 where they are not finite, of which argmax would name one."""
    return torch.where(p.isfinite().all(1), p.argmax(1), -1)


def build(config: ClassifierConfig, classes: tuple[str, ...]) -> BlackBox:
    """A fresh built-in classifier."""
    return _own(ResNet(config.arch, len(classes), config.stem), classes)


def _own(net: ResNet, classes: tuple[str, ...]) -> BlackBox:
    # On small images the last stage is a few pixels wide: Grad-CAM looks one stage earlier.
    return BlackBox(net, classes, cam_layer="layer3" if net.conv1.kernel_size == (3, 3) else "layer4")


def save(folder: str, blackbox: BlackBox, config: ClassifierConfig) -> None:
    """Save a built-in classifier where `load` finds it."""
    save_model(folder, blackbox.net, {"kind": "resnet", "classes": list(blackbox.classes), **asdict(config)})


def class_names(spec: str, found: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the classifier that `spec` names, in order, for data with the classes `found` (perhaps none).

    One that knows its own may know more than the data has; another takes the data's, or numbers its outputs where the
    data has none. Raises ValueError, in one line, where they do not fit.
    """
    known = _open(spec, found).classes
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(
            f"the classifier {spec} knows the classes {', '.join(known)} and the data has {unknown[0]!r}: "
            "take that class's folder out, or give a classifier that knows it"
        )
    return known


def load(spec: str, classes: tuple[str, ...] = ()) -> BlackBox:
    """The frozen classifier that `spec` names, in evaluation mode.

    FOLDER                        one saved by this project
    torchvision:NAME@WEIGHTS      a network of torchvision (its ResNets need no torchvision), or of timm, with a state
    timm:NAME@WEIGHTS             dict: .safetensors, or .pth of which only tensors are read
    FILE.pt2, FILE.onnx           one saved by torch.export.save, or as ONNX
    http://…, https://…           a server that answers in JSON
    package.module:function       float tensors -> numbers (B, C)
    FILE.json                     a `cae.blackboxes.Card` that names one of these and says what it takes and gives;
                                  one beside the file, of the same name, is read too

    `classes` names the outputs where the card does not; they are numbered without. Raises ValueError, in one line, for
    anything else, and for a classifier that fails on a grey image, and ConnectionError for a server that does not
    answer. Pickles are refused unless the spec comes from `cae.blackboxes.resolve` with `trust_pickle`.
    """
    blackbox = _open(spec, classes)
    if classes and blackbox.classes != classes:
        raise ValueError(
            f"the classifier {spec} knows the classes {', '.join(blackbox.classes)}, "
            f"the data has {', '.join(classes)}: they must be the same, in the same order"
        )
    if isinstance(blackbox.net, ResNet):
        _fuse(blackbox.net)
    return blackbox


def _open(spec: str, classes: tuple[str, ...]) -> BlackBox:
    """The classifier, frozen; `classes` names the outputs of one that does not know their names."""
    inner = spec.removeprefix(TRUSTED)
    foreign = is_foreign(inner)
    blackbox = _open_foreign(inner, spec != inner, classes) if foreign else _open_own(spec, *read_model(spec))
    return blackbox.eval().requires_grad_(False)


def _open_foreign(spec: str, trusted: bool, classes: tuple[str, ...]) -> BlackBox:
    what, card = read_card(spec)
    if not is_foreign(what):
        own = _open_own(what, *read_model(what))
        if others := [field.name for field in fields(card)[1:] if getattr(card, field.name) != field.default]:
            raise ValueError(f"{what} is a classifier of this project, which knows what it takes and gives: take "
                             f"{', '.join(others)} out of {spec}")  # fmt: skip
        return own
    built_in = {f"torchvision:{arch}": partial(ResNet, arch) for arch in LAYERS}
    net, card = open_foreign(what, card, trusted, built_in, classes)
    blackbox = BlackBox(
        net.requires_grad_(False), card.classes, 0.0 if card.mean is None else card.mean,
        1.0 if card.std is None else card.std, card.input_size,
        card.cam_layer or ("layer4" if isinstance(net, ResNet) else ""),
        channels=card.channels, layout=card.layout, outputs=card.outputs,
    )  # fmt: skip
    x = torch.zeros(2, 3, *(blackbox.input_size or PROBE))
    try:
        logits = _try(blackbox, x)
        _, outputs = logits.shape
        if not logits.isfinite().all():
            raise ValueError("its outputs are not finite")
    except (ConnectionError, TimeoutError):  # no fault of what is asked
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"the classifier {spec} fails on two grey images of {x.shape[2]} x {x.shape[3]} pixels: "
            f"{reason.splitlines()[0]}"
            + ("" if blackbox.input_size else "; one that takes no other size than its own has it as `input_size` in a "
               "JSON that names it")
        ) from error  # fmt: skip
    blackbox.differentiable = logits.requires_grad
    blackbox.classes = card.classes or classes or tuple(str(i) for i in range(outputs))
    if outputs != len(blackbox.classes):
        no_file = spec.startswith(WEB) or FUNCTION.fullmatch(spec)
        raise ValueError(
            f"the classifier {spec} has {outputs} outputs and there are {len(blackbox.classes)} classes "
            f"({', '.join(blackbox.classes)}): name its outputs, in order, under `classes` in "
            + ("a JSON that names it under `classifier`, and give that" if no_file else "the JSON beside it")
        )
    return blackbox


def _try(blackbox: BlackBox, x: Tensor) -> Tensor:
    """Logits for images x, which need a gradient if they can have one."""
    with torch.enable_grad():
        try:
            return blackbox(x.clone().requires_grad_())
        except RuntimeError:  # a function in NumPy takes no tensor that wants a gradient
            return blackbox(x)


def _fuse(net: nn.Module) -> None:
    """Fold every batch norm of a frozen ResNet into the convolution before it: same numbers, fewer passes."""
    for parent in net.modules():
        pairs = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")]
        if isinstance(parent, nn.Sequential):  # downsample
            pairs = [("0", "1")]
        for conv, norm in pairs:
            first, second = getattr(parent, conv, None), getattr(parent, norm, None)
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, conv, fuse_conv_bn_eval(first, second))
                setattr(parent, norm, nn.Identity())


def _open_own(spec: str, state: dict[str, Tensor], config: dict[str, Any]) -> BlackBox:
    try:
        names = tuple(config["classes"])
        net = ResNet(config["arch"], len(names), config["stem"])
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{spec} is no classifier saved by this project: {first_line(error)}") from error
    return _own(net, names)


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """Random rotation (±8°), scale (±12%), shift (±5%), mirroring, brightness and contrast of images (B, 3, H, W)."""
    n = len(x)
    angle, scale, dx, dy, gain, offset = ((torch.rand(6, n, generator=rng) - 0.5) * 2).to(x.device)
    angle, scale = angle * 0.14, 1 + scale * 0.12
    mirror = torch.where(torch.rand(n, generator=rng).to(x.device) < 0.5, -1.0, 1.0)
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), dx * 0.1], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), dy * 0.1], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)  # (B, H, W, 2)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    gain, offset = 1 + gain * 0.25, offset * 0.15
    return (x * gain[:, None, None, None] + offset[:, None, None, None]).clamp(-1, 1)
