"""LIME: Ribeiro, Singh, Guestrin, "Why Should I Trust You? Explaining the Predictions of Any Classifier", KDD 2016.

Superpixels after SLIC: Achanta, Shaji, Smith, Lucchi, Fua, Süsstrunk, "SLIC Superpixels Compared to State-of-the-art
Superpixel Methods", TPAMI 2012.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import Lime
from torch import Tensor, nn

KERNEL_WIDTH = 0.25
"""Of the proximity kernel, for images, in the authors' code."""


def superpixels(images: Tensor, number: int, compactness: float = 0.5) -> Tensor:
    """Labels (B, H, W), from 0 without gaps, of about `number` superpixels of images (B, 3, H, W) in [-1, 1].

    k-means over colour and place as in SLIC, from a regular grid: the squared distance is that of the colours, plus
    `compactness`^2 times that of the places in units of the grid's cell. Unlike SLIC's, a superpixel may have parts
    that do not touch.
    """
    from sklearn.cluster import KMeans  # here, as it takes seconds to import

    height, width = images.shape[2:]
    rows = min(height, max(1, round(math.sqrt(number * height / width))))
    cols = min(width, max(1, round(number / rows)))
    row, col = np.mgrid[:height, :width]
    cell = (row * rows // height * cols + col * cols // width).ravel()  # of a grid of rows x cols cells
    place = np.stack((row * rows / height, col * cols / width), axis=2).reshape(-1, 2) * compactness
    labels = []
    for image in images.detach().double().cpu().numpy():
        points = np.concatenate((image.reshape(len(image), -1).T, place), axis=1)  # (H*W, 5)
        centres = np.stack([points[cell == i].mean(0) for i in range(rows * cols)])
        found = KMeans(len(centres), init=centres, n_init=1, max_iter=10).fit(points).labels_
        labels.append(np.unique(found, return_inverse=True)[1].reshape(height, width))
    return torch.from_numpy(np.stack(labels)).to(images.device)


@torch.no_grad()
def lime(
    classifier: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    samples: int = 1000,
    number: int = 50,
    baseline: float | None = None,
    ridge: float = 1.0,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Weight of each pixel's superpixel in a linear model of the classifier near the image: maps (B, H, W), signed.

    argmin over w, w_0 of sum_i exp(-d_i^2 / (2 v^2)) (p(x_i) - w_0 - w z_i)^2 + `ridge` |w|^2. p is the probability of
    each image's `target` (B,) for images (B, 3, H, W). z_i says which of about `number` `superpixels` a sample keeps:
    all in the first of the `samples`, each one of two in the others; the same draws for every image. x_i has the rest
    filled with `baseline`, or by default, as the authors do, each with its own mean colour: an unfair advantage where a
    metric fills with the same. d_i is the cosine distance of z_i to all ones, v = KERNEL_WIDTH. A map is constant over
    each superpixel: its ranking is full of ties. At most `batch` samples at once.
    """
    labels = superpixels(images, number)

    def draws(image: Tensor, num_interp_features: int, **_: Any) -> Iterator[Tensor]:
        rng = np.random.default_rng([*b"lime", seed])
        yield torch.ones(1, num_interp_features, dtype=torch.long, device=image.device)
        while True:
            yield torch.from_numpy(rng.integers(0, 2, (1, num_interp_features))).to(image.device)

    def proximity(image: Tensor, sample: Tensor, kept: Tensor, **_: Any) -> Tensor:
        distance = 1 - kept.float().mean().sqrt()
        return torch.exp(-(distance**2) / (2 * KERNEL_WIDTH**2))

    method = Lime(
        lambda x: classifier(x).float().softmax(1),
        interpretable_model=SkLearnRidge(alpha=ridge),
        similarity_func=proximity,
        perturb_func=draws,
    )
    maps = []
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1, None]  # (1, 3, H, W), (1, 1, H, W)
        with torch.random.fork_rng([]):  # captum's data loader draws a seed that it does not use
            parts = method.attribute(
                image,
                baselines=_mean_colours(image[0], label[0, 0])[None] if baseline is None else baseline,
                target=target[i : i + 1],
                feature_mask=label,
                n_samples=samples,
                perturbations_per_eval=batch,
            )
        maps.append(parts[:, 0])  # a superpixel holds all channels, which therefore have the same map
    return torch.cat(maps)


def _mean_colours(image: Tensor, labels: Tensor) -> Tensor:
    """An image (3, H, W) with each pixel replaced by the mean of those with its label (H, W)."""
    flat, where = image.flatten(1), labels.flatten()
    sums = flat.new_zeros(len(flat), int(where.max()) + 1).index_add_(1, where, flat)
    return (sums / where.bincount())[:, where].view_as(image)
