"""Classifiers that are refused, and how."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_blackboxes import CLASSES, export, images, module_of, network, write_card
from test_classifiers import Bomb
from torch import nn

from cae.blackboxes import resolve
from cae.classifiers import class_names, load


class Planted(nn.Module):
    """A network whose pickle leaves a file behind."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.bomb = Bomb(path)


def test_pickles_run_only_where_they_are_trusted(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for name in ("net.pth", "net.pt"):
        torch.save(Planted(trace), tmp_path / name)
        write_card(tmp_path / "card.json", classifier=name)
        for spec in (f"{tmp_path}/{name}", f"{tmp_path}/card.json"):
            with pytest.raises(ValueError, match="--trust-pickle"):
                load(spec)
            assert not trace.exists()
            with pytest.raises(ValueError):
                load(resolve(spec, trust_pickle=True))
            assert trace.exists()
            trace.unlink()
    with pytest.raises(ValueError, match="say --trust-pickle instead"):
        resolve("trusted:net.pth")
    write_card(tmp_path / "card.json", classifier="trusted:net.pth")
    with pytest.raises(ValueError, match="say --trust-pickle instead"):
        load(f"{tmp_path}/card.json")
    torch.save([1, 2], tmp_path / "net.pth")
    with pytest.raises(ValueError, match="holds no network but a list"):
        load(resolve(f"{tmp_path}/net.pth", trust_pickle=True))


def two_listings(path: str) -> str:
    """The file with a second listing of its names, in which an object is called a tensor: zipfile takes the one just
    before the end, torch the one that the end points at."""
    data = Path(path).read_bytes()
    end = data.rfind(b"PK\5\6")
    size, begin = struct.unpack("<LL", data[end + 12 : end + 20])
    listing = data[begin : begin + size]
    Path(path).write_bytes(data[:end] + listing.replace(b"opaque_obj_0", b"tensor_obj_0") + data[end:])
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if "opaque" in name]
    return path


def test_an_exported_network_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    """`torch.export.load` falls back to unpickling anything that lies where the example inputs do."""
    trace = tmp_path / "trace"
    good = export(tmp_path / "good.pt2", network(), images())
    bomb = io.BytesIO()
    torch.save(Bomb(trace), bomb)
    with zipfile.ZipFile(good) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def planted(name: str, changes: dict[str, bytes]) -> str:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for filename, data in (entries | changes).items():
                archive.writestr(filename, data)
        return f"{tmp_path}/{name}"

    (inputs,) = [name for name in entries if "sample_inputs" in name]
    (config,) = [name for name in entries if name.endswith("weights_config.json")]
    weight = next(name for name in entries if "/data/weights/weight_" in name)

    def pickled(value: Any, separators: tuple[str, str]) -> dict[str, bytes]:
        told = json.loads(entries[config])
        for about in told["config"].values():
            about["use_pickle"] = value
        return {config: json.dumps(told, separators=separators).encode(), weight: bomb.getvalue()}

    root = inputs.split("/")[0]
    load(planted("same.pt2", {}))
    bad = {
        "inputs.pt2": {inputs: bomb.getvalue()},
        "weights.pt2": pickled(True, (", ", ": ")),
        "close.pt2": pickled(True, (",", ":")),
        "one.pt2": pickled(1, (" , ", " : ")),
        "constants.pt2": {f"{root}/data/constants/opaque_obj_0": b"."},
        "native.pt2": {f"{root}/data/aotinductor/model/x.so": b"\x7fELF"},
        "case.pt2": {f"{root}/data/constants/OPAQUE_OBJ_0": b"."},  # torch finds it all the same
        "twice.pt2": {config.upper(): entries[config]},
        "listings.pt2": {f"{root}/data/constants/opaque_obj_0": b"."},
    }
    for name, changes in bad.items():
        with pytest.raises(ValueError, match=rf"{name} is no file of torch.export.save.*--trust-pickle"):
            load(two_listings(planted(name, changes)) if name == "listings.pt2" else planted(name, changes))
    assert not trace.exists()
    with pytest.raises(ValueError):
        load(resolve(f"{tmp_path}/inputs.pt2", trust_pickle=True))
    assert trace.exists()  # it would have gone off


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def refusal(spec: str, classes: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as error:
        load(spec, classes)
    reason = str(error.value)
    assert reason and len(reason.splitlines()) == 1
    return reason


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"classes": ["a", "a"]}, "classes is ('a', 'a')"), ({"classes": "ab"}, "classes is 'ab'"),
        ({"classes": ["a"]}, "classes is ('a',)"), ({"input_size": 0}, "input_size is 0"),
        ({"input_size": [1, 2, 3]}, "input_size is (1, 2, 3)"), ({"input_size": 1.5}, "input_size is 1.5"),
        ({"channels": "GRB"}, "channels is 'GRB': choose RGB, BGR, grey"), ({"layout": 3}, "layout is 3"),
        ({"mean": "0"}, "mean is '0'"), ({"std": 0}, "std is 0"), ({"std": [1, 0, 1]}, "std is (1, 0, 1)"),
        ({"std": [1, 1]}, "std is (1, 1)"), ({"mean": [0.5, 0.5, 0.5, 0.5]}, "mean is (0.5, 0.5, 0.5, 0.5)"),
        ({"outputs": "softmax"}, "choose logits, probabilities"), ({"batch": 0}, "batch is 0"),
        ({"batch": True}, "batch is True"), ({"timeout": 0}, "timeout is 0"), ({"retries": -1}, "retries is -1"),
        ({"token": 5}, "token is 5"), ({"size": 3}, "'size' is none of the fields classifier, classes"),
        (None, "no card of a classifier"), ([1], "no card of a classifier"),
    ],
)  # fmt: skip
def test_cards_that_make_no_sense(tmp_path: Path, fields: Any, says: str) -> None:
    (tmp_path / "net.json").write_text(json.dumps(fields))
    (tmp_path / "net.onnx").write_bytes(b"")
    reason = refusal(f"{tmp_path}/net.onnx")
    assert says in reason and f"{tmp_path}/net.json" in reason


def test_cards_that_name_nothing(tmp_path: Path) -> None:
    assert "no file" in refusal(f"{tmp_path}/card.json")
    for text, says in {
        "{": "cannot use",
        '{"mean": 0}': "names no classifier",
        '{"classifier": "x.json"}': "names no",
    }.items():
        (tmp_path / "card.json").write_text(text)
        assert says in refusal(f"{tmp_path}/card.json")


def test_classifiers_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any) -> None:
    module_of(
        tmp_path,
        monkeypatch,
        "theirs",
        "def f(x): return x[:, :, 0, 0][:, None]\ndef g(x): 1 / 0\n"
        "def nan(x): return x[:, :2, 0, 0] / 0 - x[:, :2, 0, 0] / 0\nanswer = 42\n",
    )
    module_of(tmp_path, monkeypatch, "broken", "import nothing_of_that_name")
    (tmp_path / "net.onnx").write_bytes(b"junk")
    (tmp_path / "net.pt2").write_bytes(b"junk")
    for spec, says in {
        "nowhere:f": "no function nowhere:f (ModuleNotFoundError", "theirs:h": "no function theirs:h (AttributeError",
        "broken:f": "nothing_of_that_name", "theirs:answer": "is no function", "theirs:f": "fails on two grey images",
        "theirs:nan": "its outputs are not finite",
        "theirs:g": "of 128 x 128 pixels: the classifier failed: ZeroDivisionError",
        f"{tmp_path}/net.pt2": "no file of torch.export.save", f"{tmp_path}/none.pt2": "cannot read the classifier",
        f"{tmp_path}/none.onnx": "cannot read the classifier", "foo://x/net.pt2": "cannot",
        f"{tmp_path}/net.pth": "read as tensors only",
    }.items():  # fmt: skip
        assert says in refusal(spec)
    pytest.importorskip("onnxruntime")
    assert "net.onnx is no ONNX network" in refusal(f"{tmp_path}/net.onnx")


def test_outputs_must_be_as_many_as_the_classes(tmp_path: Path) -> None:
    spec = export(tmp_path / "net.pt2", network(), images())
    assert class_names(spec, ()) == ("0", "1", "2") and class_names(spec, CLASSES) == CLASSES
    reason = refusal(spec, ("a", "b"))
    assert "has 3 outputs and there are 2 classes (a, b)" in reason and "JSON beside it" in reason
    write_card(tmp_path / "net.json", classes=CLASSES)
    assert class_names(spec, ("dog",)) == CLASSES
    with pytest.raises(ValueError, match="the data has 'horse'"):
        class_names(spec, ("horse",))
    assert "the same order" in refusal(spec, CLASSES[::-1])
