"""Every option that shapes a model or its training, and the presets as one table.

The presets keep every part of the paper's model: two encoders, AdaIN decoder, two-headed discriminator, 8-d class code,
all loss terms. The smaller ones differ in sizes, and in what makes a short training succeed: warm-up, the `keep` term,
the class head, rates and an average of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ClassHead = Literal["auto", "learned", "distilled", "blackbox", "both"]
Preset = Literal["paper", "standard", "quick"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the class association embedding and its discriminator."""

    image_size: int = 256
    """Height and width of the square images: a multiple of 4, at least 32."""
    channels: Literal[0, 1, 3] = 3
    """Colour channels inside the networks: 3, 1 (grey: the images' channel mean), or 0: 1 where all images are grey.
    A grey network cannot fool a classifier by tints."""
    class_dim: int = 8
    """Numbers in the class code (Section IV-A)."""
    stem: Literal["conv", "unshuffle"] = "conv"
    """`conv`: 7x7 and two strided 4x4 convolutions, as the authors; `unshuffle`: pixel-unshuffle x4 and one 3x3,
    without a norm, so that the individual code holds the exposure too and the class code need not."""
    class_encoder: Literal["plain", "residual"] = "plain"
    """`plain`: stem and strided convolutions without a norm, as the authors; `residual`: seven residual blocks from the
    pixels on, with a batch norm that the warm-up sets. It agrees with the classifier on more images that it was not
    trained on."""
    width: int = 256
    """Channels of the individual code, which is `image_size / 4` wide and high."""
    blocks: int = 6
    """Residual blocks in the individual encoder, and again in the decoder."""
    mlp_width: int = 256
    """Hidden units between the class code and the AdaIN parameters."""
    up_kernel: int = 5
    """Kernel of the convolution after each x2 upsampling."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """How the decoder doubles its size. `bilinear` leaves no grid after a short training."""
    out_kernel: int = 7
    """Kernel of the decoder's last convolution."""
    detail: bool = False
    """Beyond the paper: the individual code also reaches the pixels directly, as overlapping patches past AdaIN. Fine
    structure comes back sooner, and what it adds is the same whatever the class code."""
    disc_width: int = 64
    """Channels after the discriminator's first convolution; doubled three times."""
    disc_blocks: int = 2
    """Residual blocks at the end of the discriminator."""
    dropout: float = 0.4
    """Dropout before the discriminator's last layer."""
    disc_init: Literal["normal", "kaiming"] = "normal"
    """Weights that the discriminator starts from: `normal` N(0, 0.02), as the authors, or `kaiming`, which learns a
    small lesion in seconds where the other takes minutes."""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the named loss terms: lambda 1-6 of Eq. 7 and phi 1-2 of Eq. 10, with the paper's values."""

    recon_x: float = 10.0
    """lambda1: L1 of the reconstruction against the image, Eq. 1."""
    recon_c: float = 1.0
    """lambda2: L1 of the swap's class code against the one put in, Eq. 2."""
    recon_s: float = 1.0
    """lambda3: L1 of the swap's individual code against the one put in, Eq. 3."""
    cyc_x: float = 10.0
    """lambda4: L1 of the image after swapping there and back, Eq. 4."""
    adv1: float = 1.0
    """lambda5: the swap should look real to the discriminator, Eq. 5."""
    cla1: float = 1.0
    """lambda6: the swap should have the class whose code it got, Eq. 6."""
    adv2: float = 1.0
    """phi1: the discriminator tells swaps from images, Eq. 8."""
    cla2: float = 2.0
    """phi2: the discriminator names the class of images, Eq. 9."""
    keep: float = 0.0
    """Beyond the paper: D_c (b, for the class heads `blackbox` and `both`) gives the reconstruction the image's own
    class. Without it a short training on two classes may learn to invert the class whatever the code."""


@dataclass(frozen=True)
class TrainConfig:
    """How the CAE is trained."""

    pairs: int = 200_000
    """Most pairs to train on."""
    epochs: float = 0.0
    """Passes over the training images (a pass is one pair per image), at most `pairs` in all; 0: exactly `pairs`."""
    batch: int = 1
    """Pairs per step, over all workers."""
    lr: float = 1e-4
    """Adam's learning rate."""
    disc_lr: float = 0.0
    """The discriminator's learning rate; 0: the same. A lower one keeps the adversarial game even."""
    class_lr: float = 0.0
    """The class encoder's learning rate, after a warm-up; 0: the same. A lower one keeps what the warm-up taught it."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Adam's beta1 and beta2."""
    weight_decay: float = 1e-4
    """Adam's weight decay."""
    lr_halvings: int = 10
    """The learning rate halves this many times over the run, at even distances."""
    ema: float = 0.0
    """Decay per step of the averaged generator weights that are kept for use, (1 + n) / (10 + n) at most in step n; 0:
    the last weights, as the authors."""
    flip: float = 0.5
    """Probability that an image is mirrored left to right; 0 where sides matter. (The built-in classifier is always
    trained on mirrored images too.)"""
    warm_up: int = 0
    """Steps of 32 images before the first pair, on which the class encoder and D_c learn to name the classes, the
    encoder by what b says of each image if b has a gradient and its predictions are the labels: 0 as the authors, whose
    class encoder has no norm to set."""
    recon_warm_up: int = 0
    """Steps of 16 images after those, on which the individual encoder and the decoder learn to give images back
    (Eq. 1 alone; an image costs a sixth of one in a pair): 0 as the authors."""
    class_head: ClassHead = "learned"
    """The D_c of Eq. 6: `learned` on images, `distilled` from b on images and swaps, `blackbox`: b itself, which must
    have a gradient, or `both`: b and the learned one, so that swaps change what any classifier would see and not b's
    blind spots. `auto`: `both`, or `distilled` where b has no gradient."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The built-in black box and its training."""

    arch: Literal["resnet18", "resnet50"] = "resnet50"
    """Depth of the residual network; parameter names and shapes are torchvision's."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`imagenet`: 7x7 stride 2 and max pooling (torchvision's); `small`: 3x3 stride 2, for small images."""
    epochs: int = 20
    """Passes over the training images, in whole steps; more of few images, where `min_steps` says so."""
    min_steps: int = 0
    """Steps at least, in whole passes: few images need more of those."""
    batch: int = 64
    """Images per step, over all workers."""
    lr: float = 2e-3
    """Peak learning rate of AdamW under a one-cycle schedule."""
    weight_decay: float = 1e-2
    """AdamW's weight decay."""


@dataclass(frozen=True)
class PresetConfig:
    """One row of the preset table."""

    model: ModelConfig
    train: TrainConfig
    resnet: ClassifierConfig
    weights: LossWeights = LossWeights()


PRESETS: dict[Preset, PresetConfig] = {
    # The authors' network and schedule, number for number (METHOD: preset `paper`).
    "paper": PresetConfig(ModelConfig(), TrainConfig(), ClassifierConfig()),
    # One GPU, some hours.
    "standard": PresetConfig(
        ModelConfig(
            image_size=128, channels=0, stem="unshuffle", class_encoder="residual", width=128, blocks=3,
            upsample="bilinear", up_kernel=3, out_kernel=3, detail=True, dropout=0.0, disc_init="kaiming",
        ),
        TrainConfig(
            pairs=100_000, epochs=20.0, batch=8, lr=5e-4, disc_lr=1e-4, class_lr=2e-6, lr_halvings=4, ema=0.999,
            warm_up=2000, recon_warm_up=1000, class_head="auto",
        ),
        ClassifierConfig(arch="resnet18", epochs=10, min_steps=800),
        LossWeights(recon_x=30.0, keep=1.0),
    ),
    # Two CPU cores, minutes.
    "quick": PresetConfig(
        ModelConfig(
            image_size=64, channels=0, stem="unshuffle", class_encoder="residual", width=64, blocks=2, mlp_width=128,
            upsample="bilinear", up_kernel=3, out_kernel=3, detail=True, disc_width=32, disc_blocks=1, dropout=0.0,
            disc_init="kaiming",
        ),
        TrainConfig(
            pairs=7_000, batch=4, lr=1e-3, disc_lr=1e-4, class_lr=3e-6, lr_halvings=3, ema=0.995,
            warm_up=2400, recon_warm_up=600, class_head="auto",
        ),
        ClassifierConfig(arch="resnet18", stem="small", epochs=6, min_steps=800, batch=32),
        LossWeights(recon_x=30.0, keep=1.0),
    ),
}  # fmt: skip
