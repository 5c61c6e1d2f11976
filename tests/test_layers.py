"""Layers in faster forms: the numbers and gradients of the plain ones."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from test_networks import images, tiny
from torch import Tensor, nn

from cae.layers import (
    AdaINBlock,
    Detail,
    FrozenNorm,
    InstanceNorm,
    LayerNorm,
    OutConv,
    StridedBlock,
    UpConv,
    learned_statistics,
)
from cae.metrics import grid_energy
from cae.networks import CAE


def slow_instance_norm(x: Tensor) -> Tensor:
    return torch.stack(
        [torch.stack([(c - c.mean()) / (c.var(correction=0) + 1e-5).sqrt() for c in image]) for image in x]
    )


def slow_layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    normed = torch.stack([(image - image.mean()) / (image.std() + 1e-5) for image in x])
    return normed * norm.scale[:, None, None] + norm.shift[:, None, None]


def slow_up(layer: UpConv, x: Tensor) -> Tensor:
    if layer.mode == "nearest":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:
        for dim in (2, 3):  # each pixel has a quarter of its neighbour on either side, that of the edge itself
            before, after = (x.index_select(dim, torch.arange(x.shape[dim]).add(d).clamp(0, x.shape[dim] - 1))
                             for d in (-1, 1))  # fmt: skip
            x = torch.stack([(3 * x + before) / 4, (3 * x + after) / 4], dim + 1).flatten(dim, dim + 1)
    return slow_conv(layer, x)


def slow_decode(cae: CAE, class_code: Tensor, individual_code: Tensor) -> Tensor:
    """The decoder with the AdaIN parameters read one after the other: shifts, then scales, of layer after layer."""
    decoder, parameters, used, x = cae.decoder, cae.decoder.mlp(class_code), 0, individual_code
    for block in decoder.blocks:
        assert isinstance(block, AdaINBlock)
        y = x
        for conv in (block.conv1, block.conv2):
            shift, scale = parameters[:, used : used + 8], parameters[:, used + 8 : used + 16]
            used += 16
            y = slow_instance_norm(conv(y)) * scale[:, :, None, None] + shift[:, :, None, None]
            y = y.clamp(min=0) if conv is block.conv1 else y
        x = x + y
    assert used == parameters.shape[1]
    for layer in decoder.up:
        if isinstance(layer, LayerNorm):
            x = slow_layer_norm(layer, x)
        elif isinstance(layer, UpConv):
            x = slow_up(layer, x)
        elif isinstance(layer, OutConv):
            x = slow_conv(layer, x)
        else:
            x = layer(x)
    if decoder.detail is not None:
        x = x + slow_detail(decoder.detail, individual_code)
    return x.tanh()


def slow_detail(layer: Detail, code: Tensor) -> Tensor:
    """Patch by patch: each of 12x12 pixels that begins 4 above and left of the code's pixel."""
    c_out = layer.out_channels // 16
    at = torch.arange(12, dtype=code.dtype)
    hann = torch.sin((at + 0.5) * math.pi / 12) ** 2
    # weight (place of the target, tap of the source) as patches: tap 0 is the neighbour before, whose patch ends here
    patches = torch.zeros(c_out, layer.in_channels, 12, 12, dtype=code.dtype)
    for place, tap in product(product(range(4), repeat=2), product(range(3), repeat=2)):
        values = layer.weight.unflatten(0, (c_out, 4, 4))[:, place[0], place[1], :, tap[0], tap[1]]
        patches[:, :, 4 * (2 - tap[0]) + place[0], 4 * (2 - tap[1]) + place[1]] = values
    patches = patches * hann[:, None] * hann / 1.5**2
    sums = patches.unflatten(2, (3, 4)).unflatten(4, (3, 4)).sum((2, 4))
    excess = sums - sums.mean((2, 3), keepdim=True)
    patches = patches - excess.repeat(1, 1, 3, 3) * hann[:, None] * hann / 1.5**2
    code = F.pad(code, (1, 1, 1, 1), mode="reflect")
    batch, height, width = len(code), 4 * code.shape[2] + 8, 4 * code.shape[3] + 8
    y = torch.zeros(batch, c_out, height, width, dtype=code.dtype)
    for i, j in product(range(code.shape[2]), range(code.shape[3])):
        y[:, :, 4 * i : 4 * i + 12, 4 * j : 4 * j + 12] += torch.einsum("bi,oiyx->boyx", code[:, :, i, j], patches)
    y = y[:, :, 8:-8, 8:-8]
    y = F.pad(y + layer.level[:, None, None], (1, 1, 1, 1), mode="reflect")
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=code.dtype)
    for dim, size in ((2, height - 16), (3, width - 16)):
        y = torch.stack([w * y.narrow(dim, k, size) for k, w in enumerate(weights)]).sum(0)
    return y


def slow_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (layer.weight.shape[-1] // 2,) * 4, "reflect"), layer.weight, layer.bias)


@pytest.mark.parametrize("detail", [False, True])
def test_decode_is_its_slow_definition(detail: bool) -> None:
    cae = tiny(detail=detail)
    for p in cae.parameters():
        nn.init.normal_(p, std=0.3)
    c, s = cae.encode(images(3))
    torch.testing.assert_close(cae.decode(c, s), slow_decode(cae, c, s), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mode", "kernel"), [("nearest", 5), ("bilinear", 3)])
@pytest.mark.parametrize(("height", "width"), [(2, 3), (5, 7), (8, 8)])
def test_upsampling_convolution_is_its_slow_definition(height: int, width: int, mode: str, kernel: int) -> None:
    torch.manual_seed(0)
    layer = UpConv(6, 4, kernel, mode).double()
    x = torch.randn(2, 6, height, width, dtype=torch.double, requires_grad=True)
    fast, slow = layer(x), slow_up(layer, x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert_same_gradients(fast, slow, [x, *layer.parameters()])


def assert_same_gradients(fast: Tensor, slow: Tensor, into: list[Tensor], within: float = 1e-11) -> None:
    weight = torch.randn_like(fast)
    for got, expected in zip(torch.autograd.grad(fast, into, weight), torch.autograd.grad(slow, into, weight),
                             strict=True):  # fmt: skip
        torch.testing.assert_close(got, expected, rtol=within, atol=within)


@pytest.mark.parametrize("detail", [False, True])
def test_several_class_codes_may_meet_each_individual_code(detail: bool) -> None:
    cae = tiny(detail=detail)
    for p in cae.parameters():
        nn.init.normal_(p, std=0.3)
    c, s = cae.encode(images(2))
    codes = torch.cat([c, c.flip(0), -c])
    for once in (s, s.contiguous()):
        again = torch.cat([once, once, once])
        torch.testing.assert_close(cae.decode(codes, once), cae.decode(codes, again), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 class codes for 2 individual codes"):
        cae.decode(codes[:3], s)


@pytest.mark.parametrize(("c_out", "kernel"), [(3, 7), (1, 3)])
def test_last_convolution_by_phases_is_the_convolution(c_out: int, kernel: int) -> None:
    torch.manual_seed(0)
    layer = OutConv(5, c_out, kernel).double()
    nn.init.normal_(layer.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 5, 8, 12, dtype=torch.double, requires_grad=True)
    fast, slow = layer(x), slow_conv(layer, x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert_same_gradients(fast, slow, [x, *layer.parameters()])


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_and_its_gradient_are_their_slow_definitions(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = LayerNorm(5).double()
    nn.init.normal_(norm.scale), nn.init.normal_(norm.shift)
    x = (3 + torch.randn(4, 5, 6, 7, dtype=torch.double)).contiguous(memory_format=order).requires_grad_()
    fast, slow = norm(x), slow_layer_norm(norm, x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert fast.is_contiguous(memory_format=order)
    assert_same_gradients(fast, slow, [x, *norm.parameters()])


@pytest.mark.parametrize("batch", [1, 4])  # of one, torch's own has a wrong gradient in channels-last order
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_and_its_gradient_are_their_slow_definitions(order: torch.memory_format, batch: int) -> None:
    torch.manual_seed(0)
    x = (3 + torch.randn(batch, 5, 6, 7, dtype=torch.double)).contiguous(memory_format=order).requires_grad_()
    fast, slow = InstanceNorm(5)(x), slow_instance_norm(x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert fast.is_contiguous(memory_format=order)
    weight = torch.randn_like(fast).contiguous(memory_format=order)
    (got,), (expected,) = (torch.autograd.grad(y, x, weight) for y in (fast, slow))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rounds", [1, 3])
def test_adain_block_and_its_gradient_are_their_slow_definitions(rounds: int) -> None:
    torch.manual_seed(0)
    block = AdaINBlock(5).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.double, requires_grad=True)
    shifts, scales = (torch.randn(2 * rounds, 2, 5, dtype=torch.double, requires_grad=True) for _ in range(2))
    slow = again = torch.cat([x] * rounds)
    for i, conv in enumerate((block.conv1, block.conv2)):
        slow = slow_instance_norm(slow_conv(conv, slow)) * scales[:, i, :, None, None] + shifts[:, i, :, None, None]
        slow = slow if i else slow.clamp(min=0)
    assert_same_gradients(block(x, shifts, scales), again + slow, [x, shifts, scales, *block.parameters()])
    torch.testing.assert_close(block(x, shifts, scales), again + slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_of_what_varies_little_is_as_exact_as_float32(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (10 + 0.01 * torch.randn(2, 64, 64, 64)).contiguous(memory_format=order)
    exact = slow_instance_norm(x.double())
    assert (InstanceNorm(64)(x).double() - exact).abs().max() < 5e-4  # torch.group_norm, channels-last: 10


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_layer_norm_of_millions_of_numbers_is_as_exact_as_float32(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (1 + torch.randn(1, 64, 256, 256)).contiguous(memory_format=order)
    norm = LayerNorm(64)
    exact = (x.double() - x.double().mean()) / (x.double().std() + 1e-5)
    assert (norm(x).double() - exact).abs().max() < 5e-6


def test_layer_norm_of_a_constant_passes_a_gradient_that_is_no_larger_than_its_division() -> None:
    x = torch.full((2, 3, 8, 8), 0.7, requires_grad=True)
    norm = LayerNorm(3)
    (norm(x) * torch.randn(2, 3, 8, 8)).sum().backward()
    assert x.grad is not None and x.grad.abs().max() < 10 / 1e-5


def test_detail_is_its_slow_definition_and_leaves_no_lattice() -> None:
    torch.manual_seed(0)
    layer = Detail(5, 2).double()
    nn.init.normal_(layer.level)
    code = torch.randn(2, 5, 8, 9, dtype=torch.double, requires_grad=True)
    fast, slow = layer(code), slow_detail(layer, code)
    float32 = 1e-6  # the window's
    torch.testing.assert_close(fast, slow, rtol=0, atol=float32)
    assert_same_gradients(fast, slow, [code, *layer.parameters()], float32)
    flat = layer(torch.randn(2, 5, 1, 1, dtype=torch.double).expand(2, 5, 8, 8))
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat), rtol=0, atol=float32)
    smooth = torch.randn(16, 64, 1, 1) + F.interpolate(torch.randn(16, 64, 4, 4), scale_factor=8, mode="bicubic")
    lapped = Detail(64, 1)(smooth)[:, 0].detach()
    side_by_side = grid_energy(F.pixel_shuffle(nn.Conv2d(64, 16, 3, padding=1)(smooth), 4)[:, 0].detach(), 4)
    assert grid_energy(lapped, 4).median() < 2 and side_by_side.median() > 20
    assert grid_energy(lapped, 2).median() < 0.5


def test_detail_is_the_same_whatever_the_class_code() -> None:
    cae = tiny(detail=True)
    c, s = cae.encode(images(2))
    assert cae.decoder.detail is not None and not cae.decoder.detail.weight.any()  # learned from nothing
    nn.init.normal_(cae.decoder.detail.weight, std=0.01)
    without = tiny(detail=False).double()
    without.load_state_dict(cae.state_dict(), strict=False)
    cae, c, s = cae.double(), c.double(), s.double()
    for code in (c, c.flip(0)):
        added = cae.decode(code, s).atanh() - without.decode(code, s).atanh()
        expected = cae.decoder.detail(s).expand(-1, 3, -1, -1)  # type: ignore[misc]
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


def test_frozen_norm_learns_statistics_where_it_is_told_to_and_nowhere_else() -> None:
    norm, plain = FrozenNorm(3), nn.BatchNorm2d(3)
    module, x = nn.Sequential(norm), torch.randn(5, 3, 4, 6) * 2 + 1
    torch.testing.assert_close(module.train()(x), x, rtol=1e-4, atol=0)  # mean 0 and variance 1, until it is told
    with learned_statistics(module):
        for scale in (1, 3):
            assert torch.equal(module(scale * x), plain.train()(scale * x))
    for mode in (True, False):
        assert torch.equal(module.train(mode)(x), plain.eval()(x))
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
    assert norm.running_mean is not None and plain.running_mean is not None
    assert torch.equal(norm.running_mean, plain.running_mean)
    with pytest.raises(RuntimeError, match="a fault"), learned_statistics(module):
        raise RuntimeError("a fault")
    assert torch.equal(module(x), plain.eval()(x))


def test_strided_block_is_its_slow_definition() -> None:
    torch.manual_seed(0)
    block, x = StridedBlock(3, 5, 2).double().eval(), torch.randn(2, 3, 8, 10, dtype=torch.double)
    for value in (*block.parameters(), *block.buffers()):  # none of them at its trivial start
        if value.is_floating_point():
            value.data.uniform_(0.2, 1).mul_(1 if value.ndim == 1 else torch.randn_like(value))
    first, norm1, _, second, norm2 = block.body
    across, norm3 = block.shortcut

    def normed(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        shift, scale, mean, var = (
            value[:, None, None] for value in (norm.bias, norm.weight, norm.running_mean, norm.running_var)
        )
        return (y - mean) / (var + norm.eps).sqrt() * scale + shift

    def convolved(y: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
        y = nn.functional.pad(y, (1, 1, 1, 1), mode="reflect")
        return nn.functional.conv2d(y, conv.weight, conv.bias)[:, :, ::stride, ::stride]

    inside = normed(convolved(x, first, 2), norm1).clamp(min=0)
    beside = torch.einsum("oi,bihw->bohw", across.weight[:, :, 0, 0], x[:, :, ::2, ::2]) + across.bias[:, None, None]
    expected = (normed(convolved(inside, second, 1), norm2) + normed(beside, norm3)).clamp(min=0)
    torch.testing.assert_close(block(x.clone()), expected, rtol=0, atol=1e-12)
    assert (expected == 0).any() and (expected > 0).any()
