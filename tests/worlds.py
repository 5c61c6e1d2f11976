"""Two worlds to explain in: one whose truth is known, and one with nothing simple about it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import cae.explain
from cae.classifiers import BlackBox
from cae.config import ModelConfig
from cae.explain import Explanation
from cae.networks import CAE

# The paper's map unless a test says otherwise.
explain = partial(cae.explain.explain, mode="path", smooth=0.0)

# A world whose truth is known. An image is a texture with two blobs, and its class code says how bright they are; b
# looks at nothing but the blobs' means. Class 0: neither is bright, 1: the first is, 2: the second is.
SIDE = 16
BLOBS = torch.zeros(2, SIDE, SIDE)
BLOBS[0, 2:7, 3:8] = 1
BLOBS[1, 10:14, 9:15] = 1
GAIN, THRESHOLD = 20.0, 0.3
FLAW = 0.03  # what the toy decoder adds to one corner, far from the blobs: the reconstruction's only error
BROKEN = 0.875  # b gives NaN for images whose last pixel has this value


def blob_means(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 2)."""
    return (x[:, None] * BLOBS[:, None]).sum((2, 3, 4)) / (3 * BLOBS.sum((1, 2)))


def paint(brightness: Tensor) -> Tensor:
    """(B, 2) -> (B, 3, H, W)."""
    return torch.einsum("bk,khw->bhw", brightness, BLOBS)[:, None].expand(-1, 3, -1, -1)


class ToyCAE(nn.Module):
    """Encodes and decodes exactly, up to the flaw."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means = blob_means(x)
        return means, x - paint(means)

    def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        image = individual_code + paint(class_code)
        image[:, :, 0, -1] += FLAW
        return image


class ToyNet(nn.Module):
    """Logits: 0, and for each blob how far it is above the threshold."""

    def forward(self, x: Tensor) -> Tensor:
        means = blob_means(x)
        logits = torch.cat([torch.zeros(len(x), 1), GAIN * (means - THRESHOLD)], 1)
        return torch.where(x[:, :1, -1, -1] == BROKEN, torch.nan, logits)


TOY = cast(CAE, ToyCAE())
B = BlackBox(ToyNet(), ("neither", "first", "second"))


def image(first: float, second: float = -0.5, seed: int = 0) -> Tensor:
    """One image (1, 3, H, W) whose blobs have these means."""
    texture = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 0.2 - 0.1
    return texture - paint(blob_means(texture)) + paint(torch.tensor([[first, second]]))


def run(x: Tensor, source: list[int], target: list[int], codes: list[Any], **options: object) -> Explanation:
    return explain(
        TOY, B, x, torch.tensor(source), torch.tensor(target), torch.tensor(codes), **options  # type: ignore[arg-type]
    )  # fmt: skip


def crossing(start: float, end: float, margin: float = 0.0) -> float:
    """Share of the way at which class 1 leads class 0 by `margin`: sigmoid(z) - sigmoid(-z) = tanh(z / 2)."""
    z = 2 * math.atanh(margin)
    return (THRESHOLD + z / GAIN - start) / (end - start)


def crooked_world() -> tuple[CAE, BlackBox, Tensor, Tensor]:
    """A random small CAE, a random classifier of four classes whose answer changes often, images and counter codes."""
    torch.manual_seed(3)
    config = ModelConfig(
        image_size=32, stem="unshuffle", width=8, blocks=1, mlp_width=16, up_kernel=3, out_kernel=3, class_dim=4
    )
    net = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 49, 16), nn.Tanh())
    head = nn.Linear(16, 4)
    nn.init.normal_(net[3].weight, 0, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(head.weight, 0, 1.5)
    images, codes = torch.rand(24, 3, 32, 32) * 2 - 1, torch.randn(24, 4) * 3
    # In double precision: the crooked classifier makes much of rounding, which batches of other sizes do otherwise.
    network, blackbox = CAE(config).eval().double(), BlackBox(nn.Sequential(net, head), tuple("abcd")).eval().double()
    return network, blackbox, images.double(), codes.double()


def assert_same(alone: Explanation, together: Explanation, k: int, tolerance: float = 1e-5) -> None:
    """Image 0 of `alone` is image k of `together`."""
    assert alone.status[0] == together.status[k]
    for name in ("map", "signed", "flip_at", "p_source", "p_target", "reconstruction_error", "inversion_steps",
                 "frames", "frame_p"):  # fmt: skip
        one, other = getattr(alone, name)[0], getattr(together, name)[k]
        assert torch.allclose(one, other, atol=tolerance, equal_nan=True), name
