"""The layers of the networks: the paper's in faster forms with the same numbers; and beyond it `FrozenNorm`, `Detail`.

Legend: B batch, C channels, H height, W width. Padding is by reflection everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-5  # of norms, the paper's
TINY_STD = 1e-12  # below it a feature map is constant, and no gradient goes through its deviation


class Conv(nn.Conv2d):
    """A convolution with reflected borders."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(reflect(x, int(self.padding[0])), self.weight, self.bias, self.stride)


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> Conv:
    """A convolution with reflected borders that keeps the size (or halves it: a 4x4 or 3x3 kernel with stride 2)."""
    return Conv(c_in, c_out, kernel, stride, 1 if stride == 2 else kernel // 2)


def reflect(x: Tensor, border: int) -> Tensor:
    """(B, C, H, W) with `border` reflected pixels on each side."""
    return F.pad(x, (border,) * 4, mode="reflect")


class _Norm(torch.autograd.Function):
    """(x - mean) / deviation * scale + shift, each channel of an image by itself or an image as a whole.

    In channels-last order, which convolutions are fastest in, torch's own instance norm takes four times as long, and
    its gradient is wrong for a batch of one (2.13, CPU). x (B, C, H, W), scale and shift (B, C), (C,) or (1,). By
    itself, deviation² = variance + 1e-5; as a whole, deviation = unbiased standard deviation + 1e-5. Computed in
    float32 where x has fewer digits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, whole: bool) -> Tensor:
        total, ctx.whole = torch.promote_types(x.dtype, torch.float32), whole
        ctx.n = n = x[0].numel() if whole else x[0, 0].numel()
        mean = _over(x.sum((2, 3), dtype=total), whole) / n
        centred = x - _wide(mean)
        square = _over((centred * centred).sum((2, 3)), whole)
        if whole:
            std = (square / (n - 1)).clamp(min=torch.finfo(total).tiny).sqrt()
            inverse = 1 / (std + EPS)
            slope = inverse**2 / (std * (n - 1))
            slope = torch.where(std > TINY_STD, slope, 0)
        else:
            inverse = (square / n + EPS).rsqrt()
            slope = inverse**3 / n
        ctx.save_for_backward(centred.to(x.dtype), scale, inverse, slope)
        gain = inverse * scale
        return torch.addcmul(_wide(shift.to(total).expand_as(gain)), centred, _wide(gain)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        centred, scale, inverse, slope = ctx.saved_tensors
        centred, grad = centred.to(inverse.dtype), grad.to(inverse.dtype)
        sums, products = grad.sum((2, 3)), (grad * centred).sum((2, 3))
        offset = -inverse / ctx.n * _over(sums * scale, ctx.whole)
        slope = -slope * _over(products * scale, ctx.whole)
        grad_x = torch.addcmul(_wide(offset), centred, _wide(slope)).addcmul_(grad, _wide(inverse * scale))
        return grad_x, (products * inverse).sum_to_size(scale.shape), sums.sum_to_size(scale.shape), None


def _over(sums: Tensor, whole: bool) -> Tensor:
    """Sums of channels (B, C), or for images as a whole (B, 1)."""
    return sums.sum(1, keepdim=True) if whole else sums


def _wide(values: Tensor) -> Tensor:
    """A number per image and channel (B, C or 1), to go with (B, C, H, W)."""
    return values[:, :, None, None]


class InstanceNorm(nn.Module):
    """Norm of every channel of every image by itself, to mean 0 and variance 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, x.new_ones(1), x.new_zeros(1), False)


class ResidualBlock(nn.Module):
    """x + norm(conv(act(norm(conv(x))))), both convolutions 3x3; no activation after the sum."""

    def __init__(self, channels: int, norm: type[nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(channels, channels, 3), norm(channels), activation, conv(channels, channels, 3), norm(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm by statistics that stay as they are, in training too, but for `learned_statistics`.

    So what becomes of an image hangs neither on the others of its batch nor on how workers share the batch.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.training = False

    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


@contextmanager
def learned_statistics(module: nn.Module) -> Iterator[None]:
    """In here each `FrozenNorm` of the module is a batch norm in training: by its batch, whose statistics it learns."""
    norms = [part for part in module.modules() if isinstance(part, FrozenNorm)]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        module.train(module.training)


class StridedBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))): (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Conv(c_in, c_out, 3, stride, 1), FrozenNorm(c_out), nn.ReLU(inplace=True),
            conv(c_out, c_out, 3), FrozenNorm(c_out),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), FrozenNorm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.body(x)).relu_()


class AdaINBlock(nn.Module):
    """A residual block whose instance norms take shift and scale as arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3)
        self.conv2 = conv(channels, channels, 3)

    def forward(self, x: Tensor, shifts: Tensor, scales: Tensor) -> Tensor:
        """x (B, C, H, W); shifts and scales (K * B, 2, C), one row per convolution -> (K * B, C, H, W)."""
        y = _Norm.apply(repeat(self.conv1(x), len(shifts)), scales[:, 0], shifts[:, 0], False).relu_()
        return repeat(x, len(y)) + _Norm.apply(self.conv2(y), scales[:, 1], shifts[:, 1], False)


def repeat(x: Tensor, count: int) -> Tensor:
    """The batch x (B, ...) as often as makes `count` members."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


class LayerNorm(nn.Module):
    """Norm over C, H, W of each image by its mean and unbiased standard deviation, then an affine map per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.scale, self.shift, True)


class UpConv(Conv):
    """Upsampling x2 and a convolution with reflected borders: (B, c_in, H, W) -> (B, c_out, 2H, 2W).

    After nearest upsampling a 5x5 kernel meets only 3x3 different pixels, those of the small image. So each of the
    four phases of the result (even or odd row and column) is a 3x3 convolution of the small image by sums of the
    kernel's weights: the same numbers for 9/25 of the multiplications. Of the border, which for the phases repeats the
    outermost pixels, only what the outermost taps see is not the reflection: the second pixel from the edge should
    stand there. Their difference, times the kernel's outermost row or column, is added to the result's.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, mode: str) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)
        self.mode = mode
        # (phase, row of the 3x3 kernel, row of the 5x5 kernel)
        sums = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]],
                             [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]])  # fmt: skip
        self.register_buffer("sums", sums.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode != "nearest" or self.kernel_size != (5, 5):
            return super().forward(F.interpolate(x, scale_factor=2, mode=self.mode))
        phases = torch.einsum("ayu,bxv,oiuv->oabiyx", self.sums, self.sums, self.weight).flatten(0, 2)
        assert self.bias is not None
        padded, rows, cols = _Replicate.apply(x)
        small = F.conv2d(padded, phases, self.bias.repeat_interleave(4))
        reflected, repeated = self._line(x.shape[3], "reflect", x.device), self._line(x.shape[2], "replicate", x.device)
        rows = self._missing(rows[..., reflected], self.weight)  # (B, c_out, 2, 2W)
        cols = self._missing(cols[:, :, repeated].mT, self.weight.mT).mT  # (B, c_out, 2H, 2)
        return _AddBorder.apply(F.pixel_shuffle(small, 2), rows, cols)

    @staticmethod
    def _missing(ends: Tensor, weight: Tensor) -> Tensor:
        """What first and last row lack, by their differences: (B, c_in, 2, 2W + 4) -> (B, c_out, 2, 2W)."""
        return torch.cat([F.conv2d(ends[:, :, :1], weight[:, :, :1]), F.conv2d(ends[:, :, 1:], weight[:, :, -1:])], 2)

    @staticmethod
    def _line(size: int, border: str, device: torch.device) -> Tensor:
        """Which of a line's small pixels stands at each place after nearest upsampling, with two border pixels."""
        places = torch.arange(2 * size, dtype=torch.float32, device=device)[None]
        return F.pad(places, (2, 2), mode=border)[0].long() // 2


class _Replicate(torch.autograd.Function):
    """x (B, C, H, W) with its outermost pixels repeated once; and by how much the next ones differ from them.

    The differences, of first and last row (B, C, 2, W) and column (B, C, H, 2), would cost autograd an image of zeros
    for every slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = x[:, :, [1, -2]] - x[:, :, [0, -1]], x[..., [1, -2]] - x[..., [0, -1]]
        return F.pad(x, (1, 1, 1, 1), mode="replicate").to(x.dtype), rows, cols  # autocast would make it float32

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        inner = grad[:, :, 1:-1, 1:-1].clone()
        for i, outermost, following in ((0, 0, 1), (1, -1, -2)):
            inner[:, :, outermost] += grad[:, :, outermost, 1:-1] - rows[:, :, i]
            inner[:, :, following] += rows[:, :, i]
            inner[..., outermost] += grad[:, :, 1:-1, outermost] - cols[..., i]
            inner[..., following] += cols[..., i]
            for corner in (0, -1):
                inner[:, :, outermost, corner] += grad[:, :, outermost, corner]
        return inner


class _AddBorder(torch.autograd.Function):
    """y (B, C, H, W), changed in place: `rows` (B, C, 2, W) added to its first and last, `cols` (B, C, H, 2) likewise.

    By slices autograd would copy the whole gradient for each.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        y[:, :, :: y.shape[2] - 1] += rows
        y[..., :: y.shape[3] - 1] += cols
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, grad[:, :, :: grad.shape[2] - 1], grad[..., :: grad.shape[3] - 1]


class OutConv(Conv):
    """A convolution with reflected borders to a few channels, by its four phases: (B, c_in, H, W), H and W even.

    One to three output channels leave most of a vector unit idle. Every 2x2 pixels of the result as channels, from a
    kernel one larger with stride 2, are the same numbers in half the time.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        places = [(right, 1 - right, down, 1 - down) for down in (0, 1) for right in (0, 1)]
        phases = torch.stack([F.pad(self.weight, place) for place in places], 1).flatten(0, 1)
        assert self.bias is not None
        x = reflect(x, self.kernel_size[0] // 2)
        return F.pixel_shuffle(F.conv2d(x, phases, self.bias.repeat_interleave(4), stride=2), 2)


class Detail(Conv):
    """The individual code straight to pixels, four to a side: (B, c_in, H, W) -> (B, c_out, 4H, 4W), without a lattice.

    Each pixel of the code makes a patch of 12x12 under a Hann window, so that patches fade into their neighbours. The
    nine weights that meet at any of its 4x4 places have the same sum, so that a constant code makes a constant image;
    and what alternates from pixel to pixel is averaged away.
    """

    window: Tensor

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, 16 * c_out, 3, padding=1, bias=False)
        self.level = nn.Parameter(torch.zeros(c_out))
        hann = torch.sin((torch.arange(12) + 0.5) * torch.pi / 12) ** 2 / 1.5  # the three that meet sum to 1
        places = hann.view(3, 4).flip(0)  # (tap, place): the left neighbour's patch ends here
        window = torch.einsum("ya,xb->abyx", places, places).flatten(0, 1)[:, None]  # (16, 1, 3, 3)
        self.register_buffer("window", window.repeat(c_out, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.window
        sums = weight.sum((2, 3)).unflatten(0, (-1, 16))  # (c_out, place, c_in)
        excess = (sums - sums.mean(1, keepdim=True)).flatten(0, 1)[:, :, None, None]
        y = F.pixel_shuffle(F.conv2d(reflect(x, 1), weight - excess * self.window), 4)
        return _averaged(y.shape[2], y) @ y @ _averaged(y.shape[3], y).T + self.level[:, None, None]


def _averaged(size: int, y: Tensor) -> Tensor:
    """The matrix (size, size) that averages a line by 1 2 1, its ends reflected.

    Up to 256 pixels a side two such products take a half to a tenth of the time that pooling does.
    """
    line = torch.eye(size, dtype=y.dtype, device=y.device)
    line = torch.cat([line[1:2], line, line[-2:-1]])
    return (line[:-2] + 2 * line[1:-1] + line[2:]) / 4
