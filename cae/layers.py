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

TINY_STD = 1e-12  # below it a feature map is constant


class Conv(nn.Conv2d):
    """A convolution with reflected borders."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(reflect(x, int(self.padding[0])), self.weight, self.bias, self.stride)


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> Conv:
    """A convolution with reflected borders that keeps the size (or halves it: a 4x4 or 3x3 kernel with stride 2)."""
    return Conv(c_in, c_out, kernel, stride, 1 if stride == 2 else kernel // 2)


def reflect(x: Tensor, border: int) -> Tensor:
    """(B, C, H, W) with `border` reflected pixels on each side."""
    if x.device.type == "cpu" and x.is_contiguous() and x.requires_grad:
        return _Reflect.apply(x, border)
    return F.pad(x, (border,) * 4, mode="reflect")


class _Reflect(torch.autograd.Function):
    """Padding by reflection whose backward pass takes half as long as torch's, on CPUs in plain memory order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, border: int) -> Tensor:
        ctx.border = border
        return F.pad(x, (border,) * 4, mode="reflect")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for dim in (2, 3):  # fold what lies beyond each side back onto what it reflects
            n, size = ctx.border, grad.shape[dim] - 2 * ctx.border
            before, inner, after = grad.split((n, size, n), dim)
            grad = inner.clone() if dim == 2 else inner  # not onto what autograd gave; the second fold is onto our own
            grad.narrow(dim, 1, n).add_(before.flip(dim))
            grad.narrow(dim, size - 1 - n, n).add_(after.flip(dim))
        return grad.contiguous(), None


class InstanceNorm(nn.Module):
    """Norm of every channel of every image by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(x)


def instance_norm(x: Tensor) -> Tensor:
    """(B, C, H, W), each (H, W) with mean 0 and variance 1."""
    # The same numbers by whichever kernel is the faster one for the memory order.
    return F.group_norm(x, x.shape[1]) if x.is_contiguous() else F.instance_norm(x)


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
        y = _adain(self.conv1(x), shifts[:, 0], scales[:, 0]).relu_()
        return repeat(x, len(y)) + _adain(self.conv2(y), shifts[:, 1], scales[:, 1])


def _adain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, :, None, None], repeat(instance_norm(x), len(shift)), scale[:, :, None, None])


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
        return _LayerNorm.apply(x, self.scale, self.shift)


class _LayerNorm(torch.autograd.Function):
    """y = (x - mean) / (std + 1e-5) * scale + shift, in as few passes over x as it takes, and so its gradient.

    By autograd from elementary operations it takes three times as long. x (B, C, H, W), scale and shift (C,).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        n, total = x[0].numel(), torch.promote_types(x.dtype, torch.float32)
        mean = x.mean((1, 2, 3), dtype=total)  # (B,)
        # By the sum of squares; what cancels is far below float32 for features. In two stages, the first along what
        # lies side by side: torch adds the numbers of a norm one by one, and a million of them lose digits.
        inner = (2, 3) if x.is_contiguous() else 1
        square = torch.linalg.vector_norm(x, dim=inner, dtype=total).square().flatten(1).sum(1)
        std = ((square - n * mean * mean) / (n - 1)).clamp(min=torch.finfo(total).tiny).sqrt()
        ctx.save_for_backward(x, scale, mean, std)
        gain = scale / (std + 1e-5)[:, None]  # (B, C)
        return torch.addcmul(_wide(shift - mean[:, None] * gain, x), x, _wide(gain, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, std = ctx.saved_tensors
        n, inverse = x[0].numel(), 1 / (std + 1e-5)
        sums = grad.sum((2, 3), dtype=mean.dtype)  # (B, C)
        products = (grad * x).sum((2, 3), dtype=mean.dtype) - sums * mean[:, None]  # with x - mean
        by_std = inverse**2 / (std * (n - 1)) * (products * scale).sum(1)  # (B,)
        by_std = torch.where(std > TINY_STD, by_std, 0)  # none through a deviation that is all rounding
        offset = mean * by_std - inverse * (sums * scale).sum(1) / n
        grad_x = torch.addcmul(_wide(offset[:, None], x), x, _wide(-by_std[:, None], x))
        grad_x.addcmul_(grad, _wide(inverse[:, None] * scale, x))
        return grad_x, (products * inverse[:, None]).sum(0), sums.sum(0)


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """A number per image and channel (B, C or 1), to go with x (B, C, H, W)."""
    return values.to(x.dtype)[:, :, None, None]


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
        small = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), phases, self.bias.repeat_interleave(4))
        reflected, repeated = self._line(x.shape[3], "reflect", x.device), self._line(x.shape[2], "replicate", x.device)
        rows = self._missing(x[..., reflected], self.weight)  # (B, c_out, 2, 2W)
        cols = self._missing(x[:, :, repeated].mT, self.weight.mT).mT  # (B, c_out, 2H, 2)
        return _AddBorder.apply(F.pixel_shuffle(small, 2), rows, cols)

    @staticmethod
    def _missing(x: Tensor, weight: Tensor) -> Tensor:
        """What first and last row lack: x (B, c_in, H, 2W + 4), in order across -> (B, c_out, 2, 2W)."""
        ends = ((x[:, :, [1]] - x[:, :, [0]], weight[:, :, :1]), (x[:, :, [-2]] - x[:, :, [-1]], weight[:, :, -1:]))
        return torch.cat([F.conv2d(difference, tap) for difference, tap in ends], 2)

    @staticmethod
    def _line(size: int, border: str, device: torch.device) -> Tensor:
        """Which of a line's small pixels stands at each place after nearest upsampling, with two border pixels."""
        places = torch.arange(2 * size, dtype=torch.float32, device=device)[None]
        return F.pad(places, (2, 2), mode=border)[0].long() // 2


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
        return F.avg_pool2d(F.avg_pool2d(reflect(y, 1), 2, 1), 2, 1) + self.level[:, None, None]
