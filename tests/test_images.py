from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from cae.images import MAX_PIXELS, UnreadableImage, decode, encode_png, inpaint, load, to_array, to_tensor

SIZE = 32
HEIGHT, WIDTH = 48, 64

# The picture: grey rises from left to right; in colour, red rises, green falls and blue stays.
RAMP = np.tile(np.linspace(0, 255, WIDTH).round().astype(np.uint8), (HEIGHT, 1))
COLOUR = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 77)], 2)
GREY = np.repeat(RAMP[..., None], 3, 2)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def photo(file_format: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(COLOUR), file_format, **options)


def grey(file_format: str, **options: Any) -> bytes:
    return encoded(Image.fromarray(RAMP), file_format, **options)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def with_alpha(array: np.ndarray) -> Image.Image:
    """Opaque above, fully transparent in the lower half."""
    alpha = np.full(array.shape[:2], 255, np.uint8)
    alpha[HEIGHT // 2 :] = 0
    return Image.fromarray(np.dstack([array, alpha]))


def palette() -> Image.Image:
    """Four vertical bars, one palette entry each."""
    row = np.repeat(np.arange(4, dtype=np.uint8), WIDTH // 4)
    bars = Image.frombytes("P", (WIDTH, HEIGHT), np.tile(row, (HEIGHT, 1)).tobytes())
    bars.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 200, 200, 200])
    return bars


BARS = np.tile(
    np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 200]], np.uint8), WIDTH // 4, 0),
    (HEIGHT, 1, 1),
)


def animation(file_format: str) -> bytes:
    first, other = Image.fromarray(COLOUR), Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    return encoded(first, file_format, save_all=True, append_images=[other, other], duration=50, **options)


# name -> encoded bytes, the picture that they hold, and how far a value may be off
CORPUS: dict[str, tuple[bytes, np.ndarray, float]] = {
    "jpeg": (photo("JPEG", quality=95), COLOUR, 6),
    "jpeg, progressive": (photo("JPEG", quality=95, progressive=True), COLOUR, 6),
    "jpeg, grey": (grey("JPEG", quality=95), GREY, 4),
    "jpeg, cmyk": (encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=95), COLOUR, 8),
    "png": (photo("PNG"), COLOUR, 0),
    "png, grey": (grey("PNG"), GREY, 0),
    "png, 16 bits": (encoded(Image.fromarray(RAMP.astype(np.uint16) * 16), "PNG"), GREY, 0),
    "png, 1 bit": (encoded(Image.fromarray(RAMP >= 128), "PNG"), np.where(GREY >= 128, 255, 0), 0),
    "png, palette": (encoded(palette(), "PNG"), BARS, 0),
    "webp": (photo("WEBP", quality=95), COLOUR, 16),
    "webp, lossless": (photo("WEBP", lossless=True), COLOUR, 0),
    "webp, animated": (animation("WEBP"), COLOUR, 0),
    "tiff": (photo("TIFF"), COLOUR, 0),
    "tiff, lzw": (photo("TIFF", compression="tiff_lzw"), COLOUR, 0),
    "tiff, 16 bits big-endian": (encoded(Image.fromarray(RAMP.astype(">u2") * 200), "TIFF"), GREY, 0),
    "tiff, 32 bits": (encoded(Image.fromarray(RAMP.astype(np.int32) * 1000 - 99), "TIFF"), GREY, 0),
    "tiff, float": (encoded(Image.fromarray(RAMP.astype(np.float32) / 1000 - 7), "TIFF"), GREY, 0),
    "bmp": (photo("BMP"), COLOUR, 0),
    "gif": (encoded(palette(), "GIF"), BARS, 0),
    "gif, animated": (animation("GIF"), COLOUR, 8),
}


@pytest.mark.parametrize("name", CORPUS)
def test_every_format_gives_the_picture(name: str) -> None:
    data, picture, tolerance = CORPUS[name]
    full = np.asarray(load(data))
    assert full.dtype == np.uint8 and full.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(full.astype(float) - picture).max() <= tolerance

    small = decode(data, SIZE, "squash")
    assert small.dtype == np.uint8 and small.shape == (SIZE, SIZE, 3)
    expected = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    assert np.abs(small.astype(float) - expected).max() <= tolerance
    assert decode(data, SIZE).shape == (SIZE, SIZE, 3)


def test_a_gradient_stays_a_gradient() -> None:
    for name in ("jpeg", "jpeg, progressive", "jpeg, cmyk", "png", "webp", "tiff", "bmp", "gif, animated"):
        red, green, blue = np.moveaxis(decode(CORPUS[name][0], SIZE, "squash").astype(float).mean(0), 1, 0)
        assert (np.diff(red) > 0).all() and (np.diff(green) < 0).all() and np.ptp(blue) < 12, name
        assert red[0] < 12 and red[-1] > 243


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_lies_on_black(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = np.asarray(load(encoded(with_alpha(COLOUR), file_format, **options)))
    assert np.array_equal(image[: HEIGHT // 2], COLOUR[: HEIGHT // 2])
    assert not image[HEIGHT // 2 :].any()


def test_transparency_of_grey_and_palettes() -> None:
    image = np.asarray(load(encoded(with_alpha(RAMP), "PNG")))
    assert np.array_equal(image[: HEIGHT // 2], GREY[: HEIGHT // 2]) and not image[HEIGHT // 2 :].any()

    for file_format in ("PNG", "GIF"):  # palette entry 1, the green bar, is transparent
        image = np.asarray(load(encoded(palette(), file_format, transparency=1)))
        green = slice(WIDTH // 4, WIDTH // 2)
        assert not image[:, green].any()
        assert np.array_equal(np.delete(image, np.r_[green], 1), np.delete(BARS, np.r_[green], 1))

    # Half transparent entries are darkened by half; a transparent grey value, and a transparent colour, turn black.
    image = np.asarray(load(encoded(palette(), "PNG", transparency=bytes([255, 255, 128, 255]))))
    assert image[0, WIDTH // 2].tolist() == [0, 0, 128] and image[0, -1].tolist() == [200, 200, 200]
    image = np.asarray(load(grey("PNG", transparency=int(RAMP[0, -1]))))
    assert not image[:, -1].any() and np.array_equal(image[:, :-1], GREY[:, :-1])
    image = np.asarray(load(photo("PNG", transparency=tuple(int(v) for v in COLOUR[0, 9]))))
    assert not image[:, 9].any() and np.array_equal(np.delete(image, 9, 1), np.delete(COLOUR, 9, 1))


# What a viewer does for each orientation tag to show the picture upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    picture = COLOUR.copy()
    picture[: HEIGHT // 2, :, 2] = 177  # so that up and down differ
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless: dict[str, Any] = {
        "PNG": {},
        "TIFF": {},
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95, "subsampling": 0},
    }
    image = np.asarray(load(encoded(Image.fromarray(picture), file_format, exif=exif, **lossless[file_format])))
    expected = UPRIGHT[orientation](picture)
    assert image.shape == expected.shape
    assert np.abs(image.astype(float) - expected).mean() < (3 if file_format == "JPEG" else 1e-9)


def test_deep_images_are_windowed() -> None:
    deep = RAMP.astype(np.float32) * 3 - 1000
    assert np.array_equal(np.asarray(load(encoded(Image.fromarray(deep), "TIFF"))), GREY)
    assert not np.asarray(load(encoded(Image.fromarray(np.full((5, 5), 7, np.float32)), "TIFF"))).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_deep_images_must_be_finite(value: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 4] = value
    with pytest.raises(UnreadableImage, match=r"^holds values that are not finite$"):
        load(encoded(Image.fromarray(values), "TIFF"))


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as error:
        decode(data, SIZE)
    reason = str(error.value)
    assert reason and len(reason.splitlines()) == 1
    return reason


CUT = [
    "jpeg", "jpeg, progressive", "jpeg, grey", "jpeg, cmyk", "png", "png, 16 bits", "webp", "webp, lossless", "tiff",
    "tiff, lzw", "tiff, float", "bmp", "gif",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("name", CUT)
def test_truncated_files_are_refused(name: str) -> None:
    """Cut anywhere, a file is refused, unless only its end mark is gone and every pixel is there."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data, whole = CORPUS[name][0], np.asarray(load(CORPUS[name][0]))
    spared = 0
    for cut in sorted({*range(0, len(data), max(1, len(data) // 150)), *range(len(data) - 30, len(data))}):
        try:
            image = np.asarray(load(data[:cut]))
        except UnreadableImage as error:
            assert str(error) and len(str(error).splitlines()) == 1
        else:
            assert np.array_equal(image, whole), cut
            spared += 1
    # PNG ends with 12 bytes of IEND and 4 of a checksum after the pixels; GIF with a trailer. JPEG is always refused.
    assert spared <= (20 if name.startswith("png") else 2 if name == "gif" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 2}], ids=str)
def test_a_large_jpeg_is_refused_wherever_it_is_cut(options: dict[str, Any]) -> None:
    """Larger than the 64 kB that Pillow reads at once."""
    data = encoded(noise(300, 400), "JPEG", quality=95, **options)
    assert len(data) > 100_000
    load(data)
    cuts = [2, 20, 300, 700, 2000, 65_535, 65_536, 65_537, 100_000, *range(len(data) - 12, len(data))]
    assert all("truncated" in refusal(data[:cut]).lower() for cut in cuts[3:])
    for cut in cuts[:3]:
        refusal(data[:cut])


def header_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_is_refused() -> None:
    for data in (b"", b"\0" * 100, b"This is text in a file named x.png\n" * 20, b"<svg xmlns='x'/>", b"%PDF-1.4"):
        assert refusal(data) == "no known image format"
    rng = np.random.default_rng(0)
    for length in (1, 10, 100, 1000, 10_000):
        for _ in range(10):
            refusal(rng.bytes(length))
    damaged = bytearray(CORPUS["png"][0])
    damaged[70] ^= 255
    refusal(bytes(damaged))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_are_decoded() -> None:
    assert "2500000000 pixels" in refusal(header_png(50_000, 50_000))
    width = 10_000
    height = MAX_PIXELS // width + 1  # one row too many: our own limit, not one of Pillow's
    assert refusal(header_png(width, height)) == f"{width} x {height} pixels are more than 100,000,000"
    refusal(header_png(0, 5))


def decode_scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def test_crop_keeps_the_centre_and_squash_keeps_everything() -> None:
    for height, width in ((SIZE, 3 * SIZE), (3 * SIZE, SIZE)):
        picture = np.full((height, width, 3), 255, np.uint8)
        middle = picture.swapaxes(0, 1) if width > height else picture
        middle[SIZE : 2 * SIZE] = np.asarray(noise(SIZE, SIZE)) // 2
        centre = picture[:, SIZE : 2 * SIZE] if width > height else picture[SIZE : 2 * SIZE]
        data = encode_png(picture)
        assert np.array_equal(decode(data, SIZE), centre)
        assert np.array_equal(decode(data, SIZE, "crop"), centre)
        squashed = decode(data, SIZE, "squash")
        assert (squashed == 255).all(2).mean() > 0.5

        # Scaled as well: the shorter side to the size asked for, then the centre.
        scaled = decode_scaled(picture, height * 20 // SIZE, width * 20 // SIZE)
        expected = scaled[:, 20:40] if width > height else scaled[20:40]
        assert np.abs(decode(data, 20).astype(int) - expected).max() <= 1
    square = encode_png(np.asarray(noise(50, 50)))
    assert np.array_equal(decode(square, SIZE, "crop"), decode(square, SIZE, "squash"))


@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_extreme_shapes(fit: str) -> None:
    for size in ((1, 1), (1, 1000), (1000, 1), (1, 60_000), (2, 3)):
        image = decode(encoded(Image.new("RGB", size, (10, 200, 30)), "PNG"), SIZE, fit)  # type: ignore[arg-type]
        assert image.shape == (SIZE, SIZE, 3) and (image == [10, 200, 30]).all()
    assert decode(photo("PNG"), 1, fit).shape == (1, 1, 3)  # type: ignore[arg-type]


def test_tensor_round_trip_is_exact() -> None:
    array = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, 2)
    array[..., 1] = array[::-1, :, 0]
    batch = np.stack([array, array[:, ::-1]])
    tensor = to_tensor(batch)
    assert tensor.shape == (2, 3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert tensor.min() == -1 and tensor.max() == 1
    for b, y, x, c in ((0, 3, 5, 0), (1, 0, 15, 1), (1, 15, 0, 2)):
        assert tensor[b, c, y, x].item() == pytest.approx(batch[b, y, x, c] / 127.5 - 1, abs=1e-6)
    assert np.array_equal(to_array(tensor), batch)
    assert np.array_equal(to_array(tensor.double()), batch) and np.array_equal(to_array(tensor.contiguous()), batch)


def test_tensors_do_not_share_memory_and_are_clipped() -> None:
    array = np.zeros((1, 4, 4, 3), np.uint8)
    tensor = to_tensor(array)
    tensor.add_(9)
    assert not array.any()
    assert (to_array(tensor) == 255).all() and not to_array(tensor - 99).any()
    array = decode(photo("PNG"), SIZE)[None]  # what Pillow gives is not writable
    assert np.array_equal(to_array(to_tensor(array)), array)
    assert to_array(torch.zeros(0, 3, 4, 4)).shape == (0, 4, 4, 3)


def test_png_round_trip_is_exact() -> None:
    picture = np.asarray(noise(SIZE, SIZE))
    assert np.array_equal(decode(encode_png(picture), SIZE), picture)
    assert np.array_equal(decode(encode_png(picture[..., 0]), SIZE)[..., 2], picture[..., 0])


def harmonic(image: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Each covered pixel (H, W) the mean of its neighbours in the image (C, H, W), as one dense linear system."""
    holes = [(int(i), int(j)) for i, j in np.argwhere(covered)]
    matrix, known = np.eye(len(holes)), np.zeros((len(holes), len(image)))
    for k, (i, j) in enumerate(holes):
        around = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        around = [(a, b) for a, b in around if 0 <= a < covered.shape[0] and 0 <= b < covered.shape[1]]
        for place in around:
            if covered[place]:
                matrix[k, holes.index(place)] -= 1 / len(around)
            else:
                known[k] += image[:, place[0], place[1]] / len(around)
    filled = image.copy()
    filled[:, covered] = np.linalg.solve(matrix, known).T
    return filled


def holes(height: int, width: int) -> torch.Tensor:
    """Several kinds of holes, (4, 1, height, width): patches, at the border too; one of 17 pixels; scattered; none."""
    covered = torch.zeros(4, 1, height, width, dtype=torch.bool)
    covered[0, :, :7, :7] = covered[0, :, 3:10, 12:19] = covered[0, :, 8:15, 10:17] = covered[0, :, -7:, 20:27] = True
    covered[1, :, 2:19, 3:20] = True
    covered[2] = torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.8
    return covered


def test_inpaint_solves_laplaces_equation_and_touches_nothing_else() -> None:
    covered = holes(23, 29)
    x = torch.rand(4, 3, 23, 29, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = inpaint(x, covered)
    assert torch.equal(found.masked_fill(covered, 0), x.masked_fill(covered, 0))
    for image, hole, filled in zip(x.double().numpy(), covered[:, 0].numpy(), found, strict=True):
        assert np.abs(filled.numpy() - harmonic(image, hole)).max() < 1e-3
    assert torch.equal(inpaint(x.masked_fill(covered, torch.nan), covered), found)  # what is hidden is not looked at
    assert torch.equal(inpaint(x[1:2], covered[1:2]), found[1:2])
    grey = inpaint(x[:, :1].expand(-1, 3, -1, -1), covered)  # whose channels are solved as one
    assert grey.is_contiguous() and torch.equal(grey, found[:, :1].expand_as(grey))


def test_inpaint_keeps_constants_and_ramps() -> None:
    covered = holes(23, 29)
    constant = torch.full((4, 3, 23, 29), 0.7)
    torch.testing.assert_close(inpaint(constant, covered), constant, atol=1e-6, rtol=0)
    inner = covered[:2].clone()
    inner[0, :, :7, :7] = inner[0, :, -7:] = False  # at the border nothing says that a ramp goes on
    ramp = torch.linspace(-1, 0, 23)[:, None] + torch.linspace(0, 1, 29)
    ramp = torch.stack((ramp, -ramp, ramp.flip(1))).expand(2, -1, -1, -1)
    torch.testing.assert_close(inpaint(ramp, inner), ramp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (6, 2), (16, 16)])
def test_inpaint_of_whole_images_and_of_all_but_a_pixel(shape: tuple[int, int]) -> None:
    x = torch.full((2, 3, *shape), -0.4)
    covered = torch.ones(2, 1, *shape, dtype=torch.bool)
    covered[1, 0, 0, -1] = False
    found = inpaint(x, covered)
    assert not found[0].any()
    torch.testing.assert_close(found[1], x[1])
