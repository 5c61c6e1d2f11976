"""DICOM to 8-bit pictures: every frame, windowed as the file asks for.

Legend: H height, W width.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np

MAX_LEVELS = 1 << 20  # grey values that are looked up in a table rather than computed pixel by pixel
DEFLATED = b"1.2.840.10008.1.2.1.99"
NOBODY = {"", "0", "none", "na", "n/a", "unknown", "patient", "removed", "anon", "anonym", "anonymous", "anonymized",
          "anonymised", "deidentified", "de-identified"}  # fmt: skip
"""What stands for the Patient ID of files that it was taken out of: no patient of whom all those images are."""


def is_dicom(data: bytes) -> bool:
    """Whether bytes are DICOM: with its mark, or, as older files, beginning with one of the first data elements."""
    return data[128:132] == b"DICM" or data[:4] in (b"\x02\x00\x00\x00", b"\x08\x00\x00\x00", b"\x08\x00\x05\x00")


def patient(data: bytes) -> str | None:
    """Whose images a file holds: a hash of its Patient ID (PS3.3 C.7.1.1), so that shards do not name people. It is no
    secret: who tries all numbers finds the ID.

    None for what is no DICOM, or damaged, or names nobody.
    """
    if not is_dicom(data) or DEFLATED in data[: 1 << 20]:
        return None
    import pydicom

    try:
        file = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=True, specific_tags=["PatientID"])
        name = str(file.get("PatientID", "")).strip()
    except Exception:  # whatever pydicom stumbles over, `frames` has the reason
        return None
    return None if name.lower() in NOBODY else hashlib.sha256(name.encode()).hexdigest()[:16]


def frames(data: bytes, max_pixels: int) -> Iterator[tuple[str, np.ndarray]]:
    """The frames of a DICOM file, uint8 (H, W) or (H, W, 3), and how each is called: "", or "[0]", "[1]", … of several.

    Grey values go through the modality's and the first VOI transform that the file, or its frame's functional groups,
    have (PS3.3 C.11.1, C.11.2, C.7.6.16), without one from least to greatest; MONOCHROME1 is inverted. Raises
    ValueError, in one line.
    """
    import pydicom
    from pydicom.pixels import iter_pixels
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if DEFLATED in data[: 1 << 20]:
        raise ValueError("deflated DICOM, which could unpack to any size, is not read")
    file = pydicom.dcmread(io.BytesIO(data), force=True)
    if "TransferSyntaxUID" not in file.file_meta:  # older than file meta information
        implicit = file.original_encoding[0]
        file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    if not {"PixelData", "FloatPixelData", "DoubleFloatPixelData"} & {element.keyword for element in file}:
        raise ValueError("DICOM without pixels")
    if file.Rows * file.Columns > max_pixels:
        raise ValueError(f"{file.Columns} x {file.Rows} pixels are more than {max_pixels:,}")
    several = int(file.get("NumberOfFrames") or 1) > 1
    for number, pixels in enumerate(iter_pixels(file)):
        for groups in (file.get("SharedFunctionalGroupsSequence"), file.get("PerFrameFunctionalGroupsSequence")):
            of_frame = groups[min(number, len(groups) - 1)] if groups else {}  # the shared ones are one item
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                file.update((of_frame.get(name) or [{}])[0])
        yield f"[{number}]" if several else "", _eight_bits(pixels, file)


def _eight_bits(pixels: np.ndarray, file: Any) -> np.ndarray:
    from pydicom.pixels import apply_color_lut

    kind = file.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, file)
        return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize > 1 else pixels
    if pixels.ndim == 3:
        return (pixels >> max(0, file.BitsStored - 8)).astype(np.uint8)
    grey = _window(pixels, file)
    return 255 - grey if kind == "MONOCHROME1" else grey


def _window(pixels: np.ndarray, file: Any) -> np.ndarray:
    """Grey values as the file wants them shown, uint8."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    low, high = pixels.min(), pixels.max()
    lookup = pixels.dtype.kind in "iu" and int(high) - int(low) < MAX_LEVELS
    levels = np.arange(int(low), int(high) + 1) if lookup else pixels.ravel()
    # What the transform makes of values beyond it is its black and its white; its tables know no more than 16 bits.
    asked = None not in (file.get("WindowCenter"), file.get("WindowWidth"))  # both may be there, and empty
    tables = bool(file.get("VOILUTSequence") or file.get("ModalityLUTSequence"))
    beyond = (-(1 << 15), (1 << 16) - 1) if tables else (-(1 << 31), 1 << 31)
    shown = apply_voi_lut(apply_modality_lut(np.concatenate([beyond, levels]), file), file).astype(np.float64)
    ends = shown[:2] if asked or file.get("VOILUTSequence") else shown[2:]
    black, white = ends.min(), ends.max()
    if not np.isfinite([black, white]).all():
        raise ValueError("holds values that are not finite")
    table = (
        ((shown[2:] - black) * (255 / (white - black) if white > black else 0)).round().clip(0, 255).astype(np.uint8)
    )
    return table[pixels.astype(np.int64) - int(low)] if lookup else table.reshape(pixels.shape)
