"""Bytes to tensor and back: the only preprocessing, the same for every stage; and how pixels are blurred or filled.

Legend: B batch, H height, W width. Tensors are float32 (B, 3, H, W) in [-1, 1]; arrays are uint8 (B, H, W, 3).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from cae import dicom
from cae.data import MAX_PIXELS, first_line

Fit = Literal["crop", "squash"]
# Pillow knows more, some of which run other programs or take anything for an image.
FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG2000", "PPM")
SWEEPS, RELAXATION = 32, 1.7  # of `inpaint`: 1.7 is best for holes 17 pixels wide, and 0.7^32 is 1e-5


class UnreadableImage(ValueError):
    """The bytes are no image that can be used; the message says why, in one line."""


def load_all(data: bytes) -> Iterator[tuple[str, Image.Image]]:
    """Every frame of a DICOM file, called "[0]", "[1]", … if there are several; else what `load` gives, called "".

    Raises UnreadableImage, perhaps behind some frames.
    """
    if not dicom.is_dicom(data):
        yield "", load(data)
        return
    try:
        for name, array in dicom.frames(data, MAX_PIXELS):
            yield name, Image.fromarray(array).convert("RGB")
    except ImportError as error:
        raise UnreadableImage("DICOM needs the package pydicom: pip install pydicom") from error
    except Exception as error:  # pydicom's as little as Pillow's are of one kind
        raise UnreadableImage(first_line(error)) from error


def load(data: bytes) -> Image.Image:
    """The first frame of an encoded image as upright 8-bit RGB, transparency on black.

    More than 8 bits of grey are windowed: DICOM as the file says, others from the image's least to its greatest value,
    since they do not say how many of their bits carry signal. Of 16-bit colours Pillow keeps the upper 8 bits. Raises
    UnreadableImage.
    """
    if dicom.is_dicom(data):
        return next(load_all(data))[1]
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnreadableImage:
        raise
    # Pillow's decoders raise whatever their format runs into: OSError, ValueError, SyntaxError, struct.error, ...
    except Exception as error:
        reason = first_line(error)
        raise UnreadableImage("no known image format" if "cannot identify" in reason else reason) from error
    if image.mode.startswith(("I", "F")):
        values = np.array(image, np.float32)
        if not np.isfinite(values).all():
            raise UnreadableImage("holds values that are not finite")
        low, high = values.min(), values.max()
        values -= low
        values *= 255 / (high - low) if high > low else 0
        image = Image.fromarray(values.round(out=values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB")


def decode(data: bytes, size: int, fit: Fit = "crop") -> np.ndarray:
    """Encoded image to a uint8 array (size, size, 3).

    Fitted as `fitted` does. Raises UnreadableImage.
    """
    return fitted(load(data), size, fit)


def fitted(image: Image.Image, size: int, fit: Fit = "crop") -> np.ndarray:
    """An RGB image as a uint8 array (size, size, 3).

    `crop` scales the shorter side to `size` and keeps the centre; `squash` scales both sides.
    """
    if fit == "crop":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def encode_png(array: np.ndarray) -> bytes:
    """A uint8 array (H, W) or (H, W, 3) as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def to_tensor(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """A uint8 array (B, H, W, 3) as a float32 tensor (B, 3, H, W) in [-1, 1], in channels-last memory."""
    tensor = torch.from_numpy(np.array(array, copy=True)).to(device)
    return tensor.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_array(tensor: Tensor) -> np.ndarray:
    """A float tensor (B, 3, H, W) in [-1, 1] as a uint8 array (B, H, W, 3), clipped and rounded."""
    scaled = tensor.detach().float().add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def blur(x: Tensor, share: float) -> Tensor:
    """Gaussian blur of (..., H, W), sigma a share of either side, its weights renormalised at the border."""

    def weights(size: int) -> Tensor:
        place = torch.arange(size, device=x.device, dtype=x.dtype)
        return torch.softmax(-0.5 * ((place[:, None] - place) / (size * share)) ** 2, dim=1)  # (size, size)

    return weights(x.shape[-2]) @ x @ weights(x.shape[-1]).T


def inpaint(x: Tensor, covered: Tensor) -> Tensor:
    """Images x (B, C, H, W) whose pixels in `covered` (B, 1, H, W) bool are filled in smoothly from around them.

    Laplace's equation on the grid: each covered pixel is the mean of its neighbours, the two to four of them that lie
    in the image. A first guess from a pyramid (at each scale the mean of the pixels that are known, holes from the
    scale above), then `SWEEPS` sweeps of red-black successive over-relaxation. Of images in [-1, 1], holes up to 17
    pixels wide (half that at the image's border) are solved to 1e-3; in wider ones the middle keeps some of the guess.
    An image that is covered whole becomes 0. What `covered` hides is never read, what it shows is not changed.
    """
    seen = x.masked_fill(covered, 0)
    if x.shape[1] > 1 and torch.equal(seen, seen[:, :1].expand_as(seen)):  # grey: the work of one channel does
        return inpaint(seen[:, :1], covered).expand_as(x).contiguous()
    number, channels, height, width = x.shape
    known = covered.logical_not().to(x)
    sums, weights = [seen], [known]
    while max(sums[-1].shape[-2:]) > 1:
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    guess = x.new_zeros(number, channels, 1, 1)
    for total, weight in zip(reversed(sums), reversed(weights), strict=True):
        guess = F.interpolate(guess, scale_factor=2, mode="bilinear")[..., : total.shape[-2], : total.shape[-1]]
        guess = torch.where(weight > 0, total / weight.clamp(min=torch.finfo(x.dtype).tiny), guess)

    # Only the covered pixels are worked on, usually few. What lies outside of the image is one more pixel, always 0.
    pixels = torch.cat((guess.transpose(0, 1).reshape(channels, -1), x.new_zeros(channels, 1)), 1)  # (C, B*H*W + 1)
    image, row, col = covered[:, 0].nonzero().T
    here = (image * height + row) * width + col  # (n,)
    inside = torch.stack((row > 0, row < height - 1, col > 0, col < width - 1))  # (4, n)
    around = torch.where(inside, here + here.new_tensor((-width, width, -1, 1))[:, None], pixels.shape[1] - 1)
    count = inside.sum(0).clamp(min=1)
    even = (row + col) % 2 == 0
    colours = [(here[mine], around[:, mine].flatten(), count[mine]) for mine in (even, ~even)]
    for _ in range(SWEEPS):
        for mine, near, many in colours:
            mean = pixels.index_select(1, near).view(channels, 4, -1).sum(1) / many
            pixels.index_copy_(1, mine, pixels.index_select(1, mine).lerp(mean, RELAXATION))
    return pixels[:, :-1].view(channels, number, height, width).transpose(0, 1).contiguous()
