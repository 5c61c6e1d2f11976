"""Maps that know nothing of the classifier. A method that doesn't beat them explains nothing.

Each takes images (B, 3, H, W) in [-1, 1], `reconstruction_error` a CAE's reconstructions of them too, and returns maps
(B, H, W) on their device, larger = more important.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def random_map(images: Tensor, seed: int = 0) -> Tensor:
    """Uniform noise in [0, 1), another for each image.

    An image's noise is seeded by `seed` and a hash of its own pixels: the same in any batch, order or worker, with no
    ids to carry along. The hash ties the noise to the image's identity but to nothing that can be seen in it.
    """
    height, width = images.shape[2:]
    maps = []
    for image in images.detach().float().cpu().contiguous().numpy():
        identity = int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little")
        maps.append(np.random.default_rng([*b"random map", seed, identity]).random((height, width), np.float32))
    return torch.from_numpy(np.stack(maps)).to(images.device)


def sobel(images: Tensor) -> Tensor:
    """Edges: size of the Sobel gradient of the mean over channels, the border repeated outwards."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")  # (B, 1, H + 2, W + 2)
    across = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    slopes = F.conv2d(grey, torch.stack((across, across.T))[:, None])  # (B, 2, H, W): along columns, along rows
    return slopes.square().sum(1).sqrt()


def centre(images: Tensor) -> Tensor:
    """A Gaussian at the middle of the image, its sigma a quarter of the side; its ranking holds for any sigma."""
    number, _, height, width = images.shape

    def bell(size: int) -> Tensor:
        place = torch.arange(size, device=images.device, dtype=torch.float32) - (size - 1) / 2
        return torch.exp(-0.5 * (place / (size / 4)) ** 2)

    return (bell(height)[:, None] * bell(width)).repeat(number, 1, 1)


def reconstruction_error(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean over channels of |x - reconstruction|: what a difference against x shows before any class has changed.

    Raises ValueError if the two differ in shape.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reconstructions {tuple(reconstructions.shape)} differ: pass equal shapes"
        )
    return (images - reconstructions).abs().mean(1)
