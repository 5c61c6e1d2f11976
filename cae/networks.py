"""The class association embedding (Fig. 2): two encoders, an AdaIN decoder and a two-headed discriminator.

Legend: B batch, C channels, H height, W width, D numbers in the class code. Images are (B, 3, H, W) in [-1, 1].
Padding is by reflection everywhere. Nothing here knows about losses, devices or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cae.config import PRESETS, ModelConfig

WIDE = 128  # channels of the individual code
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


def stem(config: ModelConfig, norm: type[nn.Module]) -> nn.Sequential:
    """(B, channels, H, W) -> (B, width, H/4, W/4), with `norm` after each convolution of the authors' stem."""
    if config.stem == "unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(4), conv(16 * config.channels, config.width, 3), nn.ReLU(inplace=True))
    widths = [config.width // 4, config.width // 2, config.width]
    layers = [conv(config.channels, widths[0], 7), norm(widths[0]), nn.ReLU(inplace=True)]
    for c_in, c_out in pairwise(widths):
        layers += [conv(c_in, c_out, 4, 2), norm(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def memory_format(config: ModelConfig, device: torch.device) -> torch.memory_format:
    """The faster memory order of features: channels-last on GPUs; on CPUs for narrow networks only."""
    return torch.contiguous_format if device.type == "cpu" and config.width >= WIDE else torch.channels_last


def prepare(x: Tensor, config: ModelConfig) -> Tensor:
    """Images (B, 3, H, W) as the networks take them: one channel, if they have one, is the mean."""
    x = x if config.channels == x.shape[1] else x.mean(1, keepdim=True)
    return x.contiguous(memory_format=memory_format(config, x.device))


class NoNorm(nn.Identity):
    """Takes the place of a norm layer; `nn.Identity` accepts and ignores the channel count."""


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


class StridedBlock(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))): (B, c_in, H, W) -> (B, c_out, H/stride, W/stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            Conv(c_in, c_out, 3, stride, 1), nn.GroupNorm(8, c_out), nn.ReLU(inplace=True),
            conv(c_out, c_out, 3), nn.GroupNorm(8, c_out),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride), nn.GroupNorm(8, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.body(x)).relu_()


class ClassEncoder(nn.Module):
    """E_c: image -> class code (B, D).

    `plain` has no norm, so that brightness and contrast of a feature can be class features; the groups of channels of
    `residual` leave it the contrasts between the channels of a group.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        if config.class_encoder == "plain":
            layers = [conv(width, width, 4, 2), nn.ReLU(inplace=True), conv(width, width, 4, 2), nn.ReLU(inplace=True)]
        else:
            layers = [
                StridedBlock(width, width, 1),
                StridedBlock(width, 2 * width, 2),
                StridedBlock(2 * width, width, 2),
            ]
        self.features = nn.Sequential(stem(config, NoNorm), *layers)
        self.to_code = nn.Conv2d(width, config.class_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)  # (B, width, H/16, W/16)
        return self.to_code(features).mean(dim=(2, 3))  # (B, D)


class IndividualEncoder(nn.Module):
    """E_s: image -> individual code (B, width, H/4, W/4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = [ResidualBlock(config.width, InstanceNorm, nn.ReLU(inplace=True)) for _ in range(config.blocks)]
        self.features = nn.Sequential(stem(config, InstanceNorm), *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class AdaINBlock(nn.Module):
    """A residual block whose instance norms take shift and scale as arguments."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, channels, 3)
        self.conv2 = conv(channels, channels, 3)

    def forward(self, x: Tensor, shifts: Tensor, scales: Tensor) -> Tensor:
        """x (B, C, H, W); shifts and scales (K * B, 2, C), one row per convolution -> (K * B, C, H, W)."""
        y = _adain(self.conv1(x), shifts[:, 0], scales[:, 0]).relu_()
        return _repeat(x, len(y)) + _adain(self.conv2(y), shifts[:, 1], scales[:, 1])


def _adain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift[:, :, None, None], _repeat(instance_norm(x), len(shift)), scale[:, :, None, None])


def _repeat(x: Tensor, count: int) -> Tensor:
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
        super().__init__(c_in, 16 * c_out, 3, padding=1)
        hann = torch.sin((torch.arange(12) + 0.5) * torch.pi / 12) ** 2 / 1.5  # the three that meet sum to 1
        places = hann.view(3, 4).flip(0)  # (tap, place): the left neighbour's patch ends here
        window = torch.einsum("ya,xb->abyx", places, places).flatten(0, 1)[:, None]  # (16, 1, 3, 3)
        self.register_buffer("window", window.repeat(c_out, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        weight = self.weight * self.window
        bias = self.bias.view(-1, 16).mean(1).repeat_interleave(16)
        sums = weight.sum((2, 3)).unflatten(0, (-1, 16))  # (c_out, place, c_in)
        excess = (sums - sums.mean(1, keepdim=True)).flatten(0, 1)[:, :, None, None]
        y = F.pixel_shuffle(F.conv2d(reflect(x, 1), weight - excess * self.window, bias), 4)
        return F.avg_pool2d(F.avg_pool2d(F.pad(y, (1, 1, 1, 1), mode="reflect"), 2, 1), 2, 1)


class Decoder(nn.Module):
    """G: class codes (K * B, D), individual codes (B, width, H/4, W/4) -> images (K * B, channels, H, W) in [-1, 1].

    The individual codes meet K rounds of class codes, each in their order; what they have in common is done once.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width
        self.width = width
        self.mlp = nn.Sequential(
            nn.Linear(config.class_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, config.blocks * 4 * width),
        )  # fmt: skip
        self.blocks = nn.ModuleList(AdaINBlock(width) for _ in range(config.blocks))
        ups: list[nn.Module] = []
        for c in (width, width // 2):
            ups += [UpConv(c, c // 2, config.up_kernel, config.upsample), LayerNorm(c // 2), nn.ReLU(inplace=True)]
        self.up = nn.Sequential(*ups, OutConv(width // 4, config.channels, config.out_kernel))
        self.detail = Detail(width, config.channels) if config.detail else None

    def forward(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        # Per AdaIN layer first all shifts, then all scales: (B, blocks, convolutions, shift | scale, C).
        adain = self.mlp(class_code).unflatten(1, (len(self.blocks), 2, 2, self.width))
        x = individual_code
        for i, block in enumerate(self.blocks):
            x = block(x, adain[:, i, :, 0], adain[:, i, :, 1])
        y = self.up(x)
        if self.detail is not None:
            y = y + _repeat(self.detail(individual_code), len(y))
        return torch.tanh(y)


class CAE(nn.Module):
    """Class association embedding: encodes an image into a class code and an individual code, and back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The code is a quarter of the image; below 32 the discriminator's last map has no border left to reflect.
        if config.image_size % 4 or config.image_size < 32:
            raise ValueError(f"image size {config.image_size} is no multiple of 4 from 32 on: choose one that is")
        self.config = config
        self.class_encoder = ClassEncoder(config)
        self.individual_encoder = IndividualEncoder(config)
        self.decoder = Decoder(config)
        self.apply(_kaiming)
        if self.decoder.detail is not None:  # learned from nothing, where random pixels would drown the rest
            nn.init.zeros_(self.decoder.detail.weight)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> class code (B, D), individual code (B, width, H/4, W/4)."""
        x = prepare(x, self.config)
        return self.class_encoder(x), self.individual_encoder(x)

    def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        """Class codes (B, D) and individual codes (B, width, H/4, W/4) -> images (B, 3, H, W).

        Of K * B class codes, K any whole number, each B meet the B individual codes, in order: (K * B, 3, H, W).
        """
        return self.decoder(class_code, individual_code).expand(-1, 3, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction G(E_c(x), E_s(x))."""
        return self.decode(*self.encode(x))


class Discriminator(nn.Module):
    """D: image -> logits (B, 2 + classes): fake, real (D_r), then one per class (D_c)."""

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        widths = [config.disc_width * 2**i for i in range(4)]
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise([config.channels, *widths]):
            layers += [conv(c_in, c_out, 4, 2), nn.LeakyReLU(0.2, inplace=True)]
        layers += [
            ResidualBlock(widths[-1], NoNorm, nn.LeakyReLU(0.2, inplace=True)) for _ in range(config.disc_blocks)
        ]
        self.features = nn.Sequential(*layers)
        hidden = widths[-1] // 2
        self.head = nn.Sequential(
            nn.Linear(widths[-1], hidden), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(hidden, 2 + classes)
        )
        self.apply(_normal if config.disc_init == "normal" else _kaiming)

    def forward(self, x: Tensor) -> Tensor:
        x = prepare(x, self.config)
        features = self.features(x).mean(dim=(2, 3))  # (B, 8 * disc_width)
        return self.head(features)


def _kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, mode="fan_in")
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def from_authors(
    generator: Mapping[str, Tensor], discriminator: Mapping[str, Tensor] | None = None
) -> tuple[CAE, Discriminator | None]:
    """The networks of the paper's authors, from the state dicts in their `gen_*.pt` and `dis_*.pt` (entry `ab`).

    Their sizes are those of the preset `paper`. Their `enc_style` is the class encoder, their `enc_content` the
    individual encoder. Raises ValueError where the tensors are not those of their networks.
    """
    config = PRESETS["paper"].model
    cae = CAE(config)
    _take_in_order(cae, generator, ("enc_style", "enc_content", "mlp", "dec"))
    if discriminator is None:
        return cae, None
    last = discriminator.get("fc.3.bias")
    critic = Discriminator(config, 0 if last is None else len(last) - 2)
    _take_in_order(critic, discriminator, ("cnns", "fc"))
    return cae, critic


def _take_in_order(module: nn.Module, state: Mapping[str, Tensor], parts: tuple[str, ...]) -> None:
    """Load another implementation's state whose `parts` stand in the module's order and hold their layers in it."""
    own = module.state_dict()
    names = [name for part in parts for name in state if name.startswith(f"{part}.") and "running_" not in name]
    # Within a layer the authors' norm comes before its convolution and ours after it: pair the norms apart.
    names.sort(key=lambda name: name.endswith(("gamma", "beta")))
    own_names = sorted(own, key=lambda name: name.endswith(("scale", "shift")))
    if [state[name].shape for name in names] != [own[name].shape for name in own_names]:
        raise ValueError(f"no state dict of the authors' network: give one with {', '.join(parts)} of the usual sizes")
    module.load_state_dict({mine: state[name] for mine, name in zip(own_names, names, strict=True)})
