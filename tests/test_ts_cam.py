"""TS-CAM against its definition: class maps, attention, their product."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.peers.ts_cam import TSCAM, ts_cam


def network(drop: float = 0.1) -> TSCAM:
    """A small one whose attention is far from even: its weights are larger than those that training starts from."""
    torch.manual_seed(0)
    net = TSCAM(3, 24, patch=6, dim=8, depth=3, heads=2, drop=drop)
    with torch.no_grad():
        for weight in net.layers.parameters():
            weight.normal_()
        net.position.normal_()
    return net.eval().requires_grad_(False)


def pictures(number: int = 3, size: int = 24) -> Tensor:
    return torch.rand((number, 3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, 1e-6)


def slow(net: TSCAM, image: Tensor) -> tuple[Tensor, Tensor]:
    """Class maps (C, h, w) and attention map (h, w) of one image (3, H, W): token by token, head by head."""
    patch, side = net.size // net.side, net.side
    weight = net.embed.weight.flatten(1)  # (D, 3 * patch * patch)
    tokens = [net.class_token[0, 0]]
    for i in range(side):
        for j in range(side):
            pixels = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(weight @ pixels.flatten() + net.embed.bias)
    x = torch.stack(tokens) + net.position[0]  # (N, D)
    total = torch.zeros(side, side)
    for layer in net.layers:
        attention, y = layer.attention, norm(layer.norm1, x)
        width = x.shape[1] // attention.num_heads
        query, key, value = (y @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
        parts = []
        for head in range(attention.num_heads):
            mine = slice(head * width, (head + 1) * width)
            share = torch.softmax(query[:, mine] @ key[:, mine].T / math.sqrt(width), dim=1)
            parts.append(share @ value[:, mine])
            for token in range(side * side):
                total[token // side, token % side] += share[0, 1 + token] / attention.num_heads
        x = x + torch.cat(parts, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
        hidden = F.gelu(norm(layer.norm2, x) @ layer.mlp[0].weight.T + layer.mlp[0].bias)
        x = x + hidden @ layer.mlp[2].weight.T + layer.mlp[2].bias
    x = norm(net.norm, x)
    maps = net.head.bias[:, None, None].repeat(1, side, side)
    for i in range(side):
        for j in range(side):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < side and 0 <= j + dj < side:
                        token = x[1 + (i + di) * side + j + dj]
                        maps[:, i, j] += net.head.weight[:, :, di + 1, dj + 1] @ token
    return maps, total


def test_class_maps_and_attention_are_the_slow_definition() -> None:
    net, images = network(), pictures()
    maps, attention = net.class_maps(images)
    assert maps.shape == (3, 3, 4, 4) and attention.shape == (3, 4, 4)
    for i, image in enumerate(images):
        class_maps, total = slow(net, image)
        torch.testing.assert_close(maps[i], class_maps, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(attention[i], total, atol=1e-6, rtol=1e-4)
    # A layer's attention to all tokens sums to 1, so to the patches to less; and it is not even.
    assert (attention.sum((1, 2)) < 3).all()
    assert (attention.amax((1, 2)) > 2 * attention.mean((1, 2))).all()


def test_logits_are_the_means_of_the_class_maps() -> None:
    net, images = network(), pictures()
    torch.testing.assert_close(net(images), torch.stack([slow(net, x)[0].mean((1, 2)) for x in images]),
                               atol=1e-5, rtol=1e-4)  # fmt: skip


def test_the_map_is_attention_times_the_map_of_the_target() -> None:
    net, images, target = network(), pictures(), torch.tensor([2, 0, 2])
    maps = ts_cam(net, images, target)
    assert maps.shape == (3, 24, 24) and (maps < 0).any() and (maps > 0).any()
    for i, label in enumerate(target.tolist()):
        class_maps, attention = slow(net, images[i])
        coupled = attention * class_maps[label]
        # The middle of four patches is their mean.
        expected = F.avg_pool2d(coupled[None], 2, 1)[0]
        torch.testing.assert_close(F.avg_pool2d(maps[i : i + 1], 2, 1)[0, 5:18:6, 5:18:6], expected,
                                   atol=1e-5, rtol=1e-4)  # fmt: skip
        assert not torch.allclose(maps[i], ts_cam(net, images[i : i + 1], torch.tensor([1]))[0])
    torch.testing.assert_close(ts_cam(net, images[1:2], target[1:2])[0], maps[1], atol=1e-6, rtol=1e-4)


def test_even_attention_gives_the_plain_class_activation_map() -> None:
    net, images, target = network(), pictures(), torch.tensor([1, 0, 2])
    for layer in net.layers:
        layer.attention.in_proj_weight.zero_()
        layer.attention.in_proj_bias.zero_()
    cam = net.class_maps(images)[0][torch.arange(3), target]
    plain = F.interpolate(cam[:, None], size=(24, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(ts_cam(net, images, target), plain * 3 / 17)  # 3 layers, 16 patches and the class token


def test_stochastic_depth_leaves_out_whole_branches_of_some_images_and_keeps_their_mean() -> None:
    net = network(drop=0.9)
    layer = net.layers[0].train()  # the first of three layers: 0.3
    layer.mlp[2].weight.zero_()
    layer.mlp[2].bias.zero_()
    torch.manual_seed(0)
    x = torch.randn(1, 17, 8)
    branch = layer.eval()(x)[0] - x
    added = layer.train()(x.expand(4000, -1, -1))[0] - x
    gone = (added == 0).flatten(1).all(1)
    assert abs(float(gone.float().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    torch.testing.assert_close(added[~gone], (branch / 0.7).expand(4000 - int(gone.sum()), -1, -1))
    assert not (branch == 0).any()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide into patches of 8"):
        TSCAM(2, 36)
    with pytest.raises(ValueError, match="32 x 32: this network was made for 24 x 24"):
        ts_cam(network(), pictures(size=32), torch.tensor([0, 1, 0]))
