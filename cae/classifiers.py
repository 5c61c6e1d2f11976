"""The black box b: image -> class logits. The built-in ResNets, and the user's own behind the same interface.

Legend: B batch, H height, W width, C classes. Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cae.checkpoint import read_model, read_weights, save_model
from cae.config import ClassifierConfig

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK = ("resnet50", "resnet101")


def _check_arch(name: str) -> None:
    if name not in LAYERS:
        raise ValueError(f"unknown network {name!r}: choose one of {', '.join(LAYERS)}")


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
        _check_arch(arch)
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

    `mean` and `std` are those of the network's own inputs in [0, 1]; `input_size` is the size that it wants, if any.
    `cam_layer` names the layer whose activations Grad-CAM uses.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: tuple[str, ...],
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        input_size: int | None = None,
        cam_layer: str = "layer4",
    ) -> None:
        super().__init__()
        self.net = net
        self.classes = classes
        self.input_size = input_size
        self.cam_layer = cam_layer
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2 - self.mean) / self.std
        if self.input_size is not None and set(x.shape[-2:]) != {self.input_size}:
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        return self.net(x)

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Class probabilities (B, C), each row summing to 1."""
        return self(x).float().softmax(1)


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

    One saved by this project knows its own, and the data may have fewer; a torchvision one takes the data's, or
    numbers its outputs where the data has none. Raises ValueError, in one line, where they do not fit.
    """
    if spec.startswith("torchvision:"):
        blackbox = _load_torchvision(spec, found)
    else:
        state, config = read_model(spec)
        blackbox = _load_own(spec, state, config)
    unknown = [name for name in found if name not in blackbox.classes]
    if unknown:
        raise ValueError(
            f"the classifier {spec} knows the classes {', '.join(blackbox.classes)} and the data has {unknown[0]!r}: "
            "take that class's folder out, or give a classifier that knows it"
        )
    return blackbox.classes


def load(spec: str, classes: tuple[str, ...] = ()) -> BlackBox:
    """The frozen classifier that `spec` names, in evaluation mode.

    FOLDER                        one saved by this project
    torchvision:NAME@WEIGHTS      a torchvision ResNet's state dict (.safetensors, or .pth of which only tensors are
                                  read); its inputs are normalised as ImageNet's. `classes` names its outputs,
                                  which are numbered without.

    Raises ValueError, in one line, for anything else.
    """
    if spec.startswith("torchvision:"):
        blackbox = _load_torchvision(spec, classes)
    else:
        state, config = read_model(spec)
        blackbox = _load_own(spec, state, config)
    if classes and blackbox.classes != classes:
        raise ValueError(
            f"the classifier {spec} knows the classes {', '.join(blackbox.classes)}, "
            f"the data has {', '.join(classes)}: they must be the same, in the same order"
        )
    _fuse(blackbox.eval().net)
    return blackbox.requires_grad_(False)


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


def _load_own(spec: str, state: dict[str, Tensor], config: dict[str, Any]) -> BlackBox:
    try:
        names = tuple(config["classes"])
        net = ResNet(config["arch"], len(names), config["stem"])
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{spec} is no classifier saved by this project: {reason}") from error
    return _own(net, names)


def _load_torchvision(spec: str, classes: tuple[str, ...]) -> BlackBox:
    name, _, path = spec.removeprefix("torchvision:").partition("@")
    if not path:
        raise ValueError(f"--classifier {spec} names no weights: write torchvision:NAME@FILE.safetensors")
    _check_arch(name)
    state = read_weights(path)
    if "fc.weight" not in state:
        raise ValueError(f"the weights in {path} are no torchvision ResNet's: they hold no fc.weight")
    outputs = len(state["fc.weight"])
    classes = classes or tuple(str(i) for i in range(outputs))
    if outputs != len(classes):
        raise ValueError(
            f"the weights in {path} have {outputs} outputs, the data has {len(classes)} classes "
            f"({', '.join(classes)}): give weights trained on these classes, in this order"
        )
    net = ResNet(name, outputs)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit {name}") from error
    return BlackBox(net, classes, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


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
