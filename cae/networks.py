"""The class association embedding (Fig. 2): two encoders, an AdaIN decoder and a two-headed discriminator.

Legend: B batch, C channels, H height, W width, D numbers in the class code. Images are (B, 3, H, W) in [-1, 1].
Nothing here knows about losses, devices or workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from cae.config import PRESETS, ModelConfig
from cae.layers import (
    AdaINBlock,
    Detail,
    InstanceNorm,
    LayerNorm,
    OutConv,
    ResidualBlock,
    StridedBlock,
    UpConv,
    conv,
    repeat,
)


def stem(config: ModelConfig, norm: type[nn.Module]) -> nn.Sequential:
    """(B, channels, H, W) -> (B, width, H/4, W/4), with `norm` after each convolution of the authors' stem."""
    if config.stem == "unshuffle":
        return nn.Sequential(nn.PixelUnshuffle(4), conv(16 * config.channels, config.width, 3), nn.ReLU(inplace=True))
    widths = [config.width // 4, config.width // 2, config.width]
    layers = [conv(config.channels, widths[0], 7), norm(widths[0]), nn.ReLU(inplace=True)]
    for c_in, c_out in pairwise(widths):
        layers += [conv(c_in, c_out, 4, 2), norm(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def prepare(x: Tensor, config: ModelConfig) -> Tensor:
    """Images (B, 3, H, W) as the networks take them: channels-last; one channel, if they have one, is the mean."""
    x = x if config.channels == x.shape[1] else x.mean(1, keepdim=True)
    return x.contiguous(memory_format=torch.channels_last)


class ClassEncoder(nn.Module):
    """E_c: image -> class code (B, D).

    `plain` has no norm, and that of `residual` is the same for all images, so that brightness and contrast of a feature
    can be class features. `residual` has no stem: of codes behind an unshuffle fewer agree with the classifier
    (benchmarks/README.md).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module]
        if config.class_encoder == "plain":
            layers = [
                stem(config, nn.Identity),
                conv(width, width, 4, 2), nn.ReLU(inplace=True), conv(width, width, 4, 2), nn.ReLU(inplace=True),
            ]  # fmt: skip
        else:
            layers = [
                StridedBlock(config.channels, width // 2, 2),
                StridedBlock(width // 2, width, 2),
                StridedBlock(width, width, 1),
                StridedBlock(width, width, 1),
                StridedBlock(width, 2 * width, 2),
                StridedBlock(2 * width, 2 * width, 1),
                StridedBlock(2 * width, 4 * width, 2),
            ]
        self.features = nn.Sequential(*layers)
        self.to_code = nn.Conv2d(width if config.class_encoder == "plain" else 4 * width, config.class_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)  # (B, width or 4 * width, H/16, W/16)
        return self.to_code(features).mean(dim=(2, 3))  # (B, D)


class IndividualEncoder(nn.Module):
    """E_s: image -> individual code (B, width, H/4, W/4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        blocks = [ResidualBlock(config.width, InstanceNorm, nn.ReLU(inplace=True)) for _ in range(config.blocks)]
        self.features = nn.Sequential(stem(config, InstanceNorm), *blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Decoder(nn.Module):
    """G: class codes (K * B, D), individual codes (B, width, H/4, W/4) -> images (K * B, channels, H, W) in [-1, 1].

    The individual codes meet K rounds of class codes, each in their order; the first convolution, which they have in
    common, is done once.
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
        if not len(class_code) or len(class_code) % len(individual_code):
            raise ValueError(
                f"{len(class_code)} class codes for {len(individual_code)} individual codes: give a multiple of them"
            )
        # Per AdaIN layer first all shifts, then all scales: (K * B, blocks, convolutions, shift | scale, C).
        adain = self.mlp(class_code).unflatten(1, (len(self.blocks), 2, 2, self.width))
        x = individual_code
        for i, block in enumerate(self.blocks):
            x = block(x, adain[:, i, :, 0], adain[:, i, :, 1])
        y = self.up(x)
        if self.detail is not None:
            y = y + repeat(self.detail(individual_code), len(y))
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
            ResidualBlock(widths[-1], nn.Identity, nn.LeakyReLU(0.2, inplace=True)) for _ in range(config.disc_blocks)
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
        if module.bias is not None:
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
