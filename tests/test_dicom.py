"""DICOM as clinics write it, against windowing written out from the standard."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGBaseline8Bit

from cae.dicom import patient
from cae.images import UnreadableImage, decode, encode_png, load, load_all

HEIGHT, WIDTH = 24, 40
# Computed tomography: air to bone, with a step in between.
VALUES = np.add.outer(np.arange(HEIGHT) * 20, np.arange(WIDTH) * 40).astype(np.int16) - 1024


def dicom(pixels: np.ndarray, *, syntax: Any = ExplicitVRLittleEndian, preamble: bool = True, **tags: Any) -> bytes:
    """A file with these pixels (frames, H, W) or (H, W) or (H, W, 3); `tags` go over what follows from the pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128 if preamble else None)
    colour = pixels.shape[-1] == 3
    frames = pixels.shape[:-3] if colour else pixels.shape[:-2]
    file.Rows, file.Columns = pixels.shape[len(frames) : len(frames) + 2]
    if frames:
        file.NumberOfFrames = frames[0]
    file.SamplesPerPixel = 3 if colour else 1
    file.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        file.PlanarConfiguration = 0
    file.BitsAllocated = file.BitsStored = pixels.dtype.itemsize * 8
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    data = pixels.tobytes()
    file.PixelData = data + b"\0" * (len(data) % 2)
    for name, value in tags.items():
        setattr(file, name, value)
    buffer = io.BytesIO()
    if preamble:
        file.save_as(buffer, enforce_file_format=True)
    else:
        file.file_meta = FileMetaDataset()
        file.save_as(buffer, implicit_vr=True, little_endian=True, enforce_file_format=False)
    return buffer.getvalue()


def grey(data: bytes) -> np.ndarray:
    array = np.asarray(load(data))
    assert array.shape[2] == 3 and (array == array[..., :1]).all()
    return array[..., 0]


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return ((values - low) / (high - low) * 255).round().astype(np.uint8)


def window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """PS3.3 C.11.2.1.2.1, pixel by pixel."""
    out = np.empty(values.shape)
    for i, x in np.ndenumerate(values):
        if x <= centre - 0.5 - (width - 1) / 2:
            out[i] = 0
        elif x > centre - 0.5 + (width - 1) / 2:
            out[i] = 255
        else:
            out[i] = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return out


@pytest.mark.parametrize(("centre", "width"), [(40, 400), (-600, 1500), (3000, 100), (-5000, 200), (0, 1)])
def test_windows_are_those_of_the_standard(centre: float, width: float) -> None:
    data = dicom(VALUES + 1024, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=centre, WindowWidth=width)
    assert np.abs(grey(data) - window(VALUES.astype(float), centre, width)).max() <= 0.51
    several = dicom(VALUES + 1024, RescaleSlope=1, RescaleIntercept=-1024,
                    WindowCenter=[centre, 7], WindowWidth=[width, 9])  # fmt: skip
    assert np.array_equal(grey(several), grey(data))


def test_slopes_and_other_window_functions() -> None:
    values = VALUES * 0.5 - 10
    common: dict[str, Any] = {"RescaleSlope": 0.5, "RescaleIntercept": -10, "WindowCenter": 20.0, "WindowWidth": 300.0}
    assert np.abs(grey(dicom(VALUES, **common)) - window(values, 20, 300)).max() <= 0.51
    exact = ((values - 20) / 300 + 0.5).clip(0, 1) * 255
    assert np.abs(grey(dicom(VALUES, VOILUTFunction="LINEAR_EXACT", **common)) - exact).max() <= 0.51
    sigmoid = 255 / (1 + np.exp(-4 * (values - 20) / 300))
    assert np.abs(grey(dicom(VALUES, VOILUTFunction="SIGMOID", **common)) - sigmoid).max() <= 0.51


def test_without_a_window_from_least_to_greatest() -> None:
    assert np.array_equal(grey(dicom(VALUES)), stretched(VALUES.astype(float)))
    assert np.array_equal(grey(dicom(VALUES, RescaleSlope=2, RescaleIntercept=5)), stretched(VALUES.astype(float)))
    assert np.array_equal(grey(dicom((VALUES + 1024).astype(np.uint16))), stretched(VALUES.astype(float)))
    assert not grey(dicom(np.full((5, 6), 77, np.uint8))).any()
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(grey(dicom(ramp)), ramp)


@pytest.mark.parametrize("tags", [{"WindowCenter": None, "WindowWidth": None}, {"WindowCenter": 40},
                                  {"VOILUTSequence": []}, {"SharedFunctionalGroupsSequence": []}])  # fmt: skip
def test_a_window_that_is_there_but_empty_is_none(tags: dict[str, Any]) -> None:
    """De-identified files have such."""
    assert np.array_equal(grey(dicom(VALUES, **tags)), stretched(VALUES.astype(float)))


def test_windows_of_functional_groups() -> None:
    """Enhanced multi-frame files have them there, of all frames or of each."""

    def window_of(centre: float, width: float) -> Dataset:
        groups, voi = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, width
        groups.FrameVOILUTSequence = [voi]
        return groups

    shared, rescale = Dataset(), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    shared.PixelValueTransformationSequence = [rescale]
    data = dicom(np.stack([VALUES, VALUES]) + 1024, SharedFunctionalGroupsSequence=[shared],
                 PerFrameFunctionalGroupsSequence=[window_of(40, 400), window_of(-600, 1500)])  # fmt: skip
    for (_, picture), given in zip(load_all(data), ((40, 400), (-600, 1500)), strict=True):
        assert np.abs(np.asarray(picture)[..., 0] - window(VALUES.astype(float), *given)).max() <= 0.51
    shared.FrameVOILUTSequence = window_of(40, 400).FrameVOILUTSequence
    one = grey(dicom(VALUES + 1024, SharedFunctionalGroupsSequence=[shared]))
    assert np.abs(one - window(VALUES.astype(float), 40, 400)).max() <= 0.51


def test_monochrome1_is_white_where_values_are_low() -> None:
    common: dict[str, Any] = {"WindowCenter": 40, "WindowWidth": 400}
    one = grey(dicom(VALUES, PhotometricInterpretation="MONOCHROME1", **common))
    assert np.array_equal(one, 255 - grey(dicom(VALUES, **common))) and one[0, 0] == 255
    assert np.array_equal(grey(dicom(VALUES, PhotometricInterpretation="MONOCHROME1")), 255 - grey(dicom(VALUES)))


def test_lookup_tables() -> None:
    from pydicom.sequence import Sequence

    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    table = Dataset()
    curve = (np.arange(16) ** 2).astype(np.uint16)
    table.LUTDescriptor, table.LUTData = [16, 0, 16], curve.tolist()
    table.add_new(0x00283002, "US", [16, 0, 16])
    table.add_new(0x00283006, "US", curve.tolist())
    expected = (curve[values] * (255 / 225)).round()
    assert np.abs(grey(dicom(values, VOILUTSequence=Sequence([table]))) - expected).max() <= 1

    palette = {
        f"{colour}PaletteColorLookupTable{part}": value
        for k, colour in enumerate(("Red", "Green", "Blue"))
        for part, value in (("Descriptor", [16, 0, 16]),
                            ("Data", (np.arange(16) * 4096 * (k + 1) % 65536).astype(np.uint16).tobytes()))
    }  # fmt: skip
    picture = np.asarray(load(dicom(values, PhotometricInterpretation="PALETTE COLOR", **palette)))
    assert np.array_equal(picture, np.stack([values.astype(int) * 16 * (k + 1) % 256 for k in range(3)], 2))


def test_colour() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    assert np.array_equal(np.asarray(load(dicom(colour))), colour)
    planes = np.ascontiguousarray(colour.transpose(2, 0, 1)).reshape(HEIGHT, WIDTH, 3)
    assert np.array_equal(np.asarray(load(dicom(planes, PlanarConfiguration=1))), colour)
    deep = colour.astype(np.uint16) * 16 + 3
    assert np.array_equal(np.asarray(load(dicom(deep, BitsStored=12, HighBit=11))), colour)
    ybr = np.asarray(Image.fromarray(colour).convert("YCbCr"))
    back = np.asarray(load(dicom(ybr, PhotometricInterpretation="YBR_FULL")))
    assert np.abs(back.astype(int) - colour).max() <= 3


def test_every_frame_is_an_image() -> None:
    stack = np.stack([np.roll(VALUES, k, 1) for k in range(3)])
    found = list(load_all(dicom(stack, WindowCenter=40, WindowWidth=400)))
    assert [name for name, _ in found] == ["[0]", "[1]", "[2]"]
    for k, (_, picture) in enumerate(found):
        assert np.array_equal(np.asarray(picture)[..., 0], np.roll(np.asarray(found[0][1])[..., 0], k, 1))
    assert [name for name, _ in load_all(dicom(VALUES[None]))] == [""]
    assert decode(dicom(stack), 16).shape == (16, 16, 3)


def test_compressed_frames() -> None:
    smooth = np.add.outer(np.arange(32) * 4, np.arange(32) * 3).astype(np.uint8)
    encoded = []
    for picture in (smooth, smooth[::-1]):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=98)
        encoded.append(buffer.getvalue())
    data = dicom(np.stack([smooth, smooth]), syntax=JPEGBaseline8Bit, PixelData=encapsulate(encoded),
                 WindowCenter=127.5, WindowWidth=256)  # fmt: skip
    for (_, found), expected in zip(load_all(data), (smooth, smooth[::-1]), strict=True):
        assert np.abs(np.asarray(found)[..., 0].astype(int) - expected).max() <= 3


def test_files_without_preamble() -> None:
    data = dicom(VALUES, preamble=False, WindowCenter=40, WindowWidth=400, ImageType=["ORIGINAL", "PRIMARY"],
                 SpecificCharacterSet="ISO_IR 100")  # fmt: skip
    assert data[:2] == b"\x08\x00" and data[128:132] != b"DICM"
    assert np.array_equal(grey(data), grey(dicom(VALUES, WindowCenter=40, WindowWidth=400)))


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableImage) as error:
        list(load_all(data))
    reason = str(error.value)
    assert reason and len(reason.splitlines()) == 1
    return reason


@pytest.mark.filterwarnings("ignore")
def test_dicom_that_is_no_picture() -> None:
    whole = dicom(VALUES, WindowCenter=40, WindowWidth=400)
    file = pydicom.dcmread(io.BytesIO(whole))
    del file.PixelData
    buffer = io.BytesIO()
    file.save_as(buffer)
    assert refusal(buffer.getvalue()) == "DICOM without pixels"
    assert "deflated DICOM" in refusal(dicom(VALUES, syntax=DeflatedExplicitVRLittleEndian))
    assert "more than 100,000,000" in refusal(dicom(VALUES, Rows=65535, Columns=65535))
    for tags in ({"Rows": 0}, {"BitsAllocated": 12}, {"PhotometricInterpretation": "MAGIC"}, {"WindowWidth": 0}):
        refusal(dicom(VALUES, **({"WindowCenter": 40, "WindowWidth": 400} | tags)))
    floats = np.full((4, 4), np.nan, np.float32)
    bad = dicom(VALUES[:4, :4], FloatPixelData=floats.tobytes(), BitsAllocated=32)
    file = pydicom.dcmread(io.BytesIO(bad))
    del file.PixelData
    buffer = io.BytesIO()
    file.save_as(buffer)
    assert refusal(buffer.getvalue())
    start = whole.index(b"DICM")
    for cut in range(start + 4, len(whole), 97):
        refusal(whole[:cut])
    assert refusal(dicom(VALUES, syntax=ImplicitVRLittleEndian)[:-200])


def test_files_of_one_patient_are_tied_by_a_word_that_does_not_name_them() -> None:
    ann, again = (patient(dicom(values, PatientID="Ann 17")) for values in (VALUES, VALUES // 2))
    old = patient(dicom(VALUES, preamble=False, SpecificCharacterSet="ISO_IR 100", PatientID="Ann 17"))
    bob = patient(dicom(VALUES, PatientID="Bob"))
    assert ann == again == old is not None and bob not in (None, ann)
    assert "ann" not in ann.lower() and ann != "17"


@pytest.mark.parametrize("name", ["", " ", "0", "ANONYMOUS", "Anonymized"])
def test_what_stands_for_a_name_that_was_taken_out_ties_no_files(name: str) -> None:
    assert patient(dicom(VALUES, PatientID=name)) is None


def test_other_files_and_damaged_ones_have_no_patient() -> None:
    scan = dicom(VALUES, PatientID="Ann")
    assert patient(dicom(VALUES)) is None
    for data in (b"", b"no picture", encode_png(stretched(VALUES)), scan[:140], scan[:132] + b"\xff" * 300,
                 dicom(VALUES, syntax=DeflatedExplicitVRLittleEndian, PatientID="Ann")):  # fmt: skip
        assert patient(data) is None
    assert patient(scan[:-100]) == patient(scan) is not None  # pixels that are cut short are another matter
