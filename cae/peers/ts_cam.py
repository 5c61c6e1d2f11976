"""TS-CAM: Gao, Wan, Pan, Peng, Tian, Han, Zhou, Ye, "TS-CAM: Token Semantic Coupled Attention Map for Weakly Supervised
Object Localization", ICCV 2021.

It explains its own classifier, a vision transformer (DeiT: Touvron et al., ICML 2021) whose head sits on the patch
tokens. What its maps score there does not compare with what other methods score on another classifier, so it is not in
`cae.peers.table`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm self-attention, then a perceptron, each added to the tokens (B, N, D)."""

    def __init__(self, dim: int, heads: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = drop

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the attention (B, N, N) of each to each, its mean over heads: rows sum to 1."""
        y = self.norm1(x)
        y, attention = self.attention(y, y, y)
        x = x + self._dropped(y)
        return x + self._dropped(self.mlp(self.norm2(x))), attention

    def _dropped(self, y: Tensor) -> Tensor:
        """Stochastic depth (Huang et al., ECCV 2016): in training, some images go without."""
        if not self.training:
            return y
        keep = y.new_full((len(y), 1, 1), 1 - self.drop)
        return y * keep.bernoulli() / keep


class TSCAM(nn.Module):
    """Vision transformer whose logits are the means of class maps: images (B, 3, size, size) in [-1, 1] -> (B, C).

    DeiT but for its head: the patch tokens, back in their places, go through a 3x3 convolution to a map for each class;
    the class token is there for its attention only. `drop` is the share of images that go without the last layer in
    training, less so the layers before it. Raises ValueError for a size that is no multiple of `patch`.
    """

    def __init__(
        self, classes: int, size: int, *, patch: int = 8, dim: int = 96, depth: int = 4, heads: int = 3,
        drop: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if size % patch:
            raise ValueError(f"images of {size} pixels do not divide into patches of {patch}: choose another patch")
        self.size, self.side = size, size // patch
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Parameter(torch.empty(1, 1 + self.side**2, dim))
        self.layers = nn.ModuleList(Layer(dim, heads, drop * (i + 1) / depth) for i in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Conv2d(dim, classes, 3, padding=1)
        for weight in self.parameters():
            if weight.ndim in (2, 3):
                nn.init.trunc_normal_(weight, std=0.02)
        nn.init.kaiming_normal_(self.head.weight)

    def class_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A map for each class (B, C, h, w), h = w = size / patch, and the attention map (B, h, w).

        The latter is the attention of the class token to each patch, its mean over heads, summed over layers. Raises
        ValueError for images of another size.
        """
        if images.shape[2:] != (self.size, self.size):
            height, width = images.shape[2:]
            raise ValueError(f"images are {height} x {width}: this network was made for {self.size} x {self.size}")
        place = self.side, self.side
        patches = self.embed(images).flatten(2).transpose(1, 2)  # (B, h*w, D)
        x = torch.cat((self.class_token.expand(len(images), -1, -1), patches), 1) + self.position
        total = images.new_zeros(len(images), *place)
        for layer in self.layers:
            x, attention = layer(x)
            total = total + attention[:, 0, 1:].unflatten(1, place)
        return self.head(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, place)), total

    def forward(self, images: Tensor) -> Tensor:
        return self.class_maps(images)[0].mean((2, 3))


@torch.no_grad()
def ts_cam(classifier: TSCAM, images: Tensor, target: Tensor) -> Tensor:
    """A * M_c: maps (B, H, W), signed, M_c the class map of each image's `target` (B,) and A the attention map.

    For images (B, 3, H, W) of the network's size. Bilinear from (h, w) to (H, W); the authors also scale each map to
    [0, 1], which changes no ranking. Raises ValueError for images of another size.
    """
    maps, attention = classifier.class_maps(images)
    of_target = maps[torch.arange(len(images), device=maps.device), target]  # (B, h, w)
    coupled = (attention * of_target)[:, None]
    return F.interpolate(coupled, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
