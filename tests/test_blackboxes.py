"""Black boxes of every kind: each gives what the same network gives in this process, and each can be explained."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import TINY, blob, command, state
from PIL import Image
from torch import Tensor, nn

from cae.blackboxes import Card, fingerprint, is_foreign, read_card, resolve
from cae.classifiers import BlackBox, ResNet, load
from cae.config import PRESETS, LossWeights
from cae.explain import explain
from cae.networks import CAE, Discriminator
from cae.peers.grad_cam import grad_cam
from cae.training import Trainer
from pipelines import explain as explain_stage
from pipelines import train as train_stage
from pipelines.command_line import parse
from pipelines.mistakes import UserError
from pipelines.run import Run

CLASSES = ("bird", "cat", "dog")
SIZE = 32


class Net(nn.Module):
    """Colour, place and sign all matter to it."""

    def __init__(self, channels: int = 3, outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 5, 3)
        self.head = nn.Linear(6 * 4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(nn.functional.adaptive_avg_pool2d(self.conv(x), 2)).flatten(1)) * 9


class Last(nn.Module):
    """Takes its colours last."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2))


def network(channels: int = 3, outputs: int = 3) -> Net:
    torch.manual_seed(7)
    return Net(channels, outputs).eval().requires_grad_(False)


def images(count: int = 5, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1


def write_card(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(fields))


# --- Every kind, from the same network --------------------------------------------------------------------------------


def answers(net: nn.Module, key: str = "instances") -> Callable[[dict[str, Any]], Any]:
    return lambda body: {"predictions": net(torch.tensor(body[key])).tolist()}


def export(path: Path, net: nn.Module, example: Tensor, batch: int | None = None) -> str:
    """As .pt2, for any batch or for one of `batch`."""
    if batch:
        program = torch.export.export(net, (example[:batch],))
    else:
        program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return str(path)


@pytest.mark.filterwarnings("ignore")
def to_onnx(path: Path, net: nn.Module, example: Tensor, batch: int | None = None) -> str:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    axes = None if batch else {"x": {0: "batch"}}
    torch.onnx.export(net, (example[: batch or len(example)],), path, dynamo=False, input_names=["x"],
                      dynamic_axes=axes)  # fmt: skip
    return str(path)


def module_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """A module called `name` that can be imported."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


FUNCTIONS = """
import numpy as np
import torch
net = torch.load({path!r}, weights_only=False)
def with_gradient(x):
    return net(x)
class Nested:
    @staticmethod
    def outputs_only(x):
        with torch.no_grad():
            return net(x).numpy().astype(np.float64).tolist()
answer = 42
"""
KINDS = ["pt2", "pt2, batch of 2", "onnx", "onnx, batch of 2", "http", "mlflow", "function", "function, no gradient",
         "pickle", "timm", "torchvision"]  # fmt: skip
DIFFERENTIABLE = {"pt2", "pt2, batch of 2", "function", "pickle", "timm", "torchvision"}


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {type(error).__name__}: {error}")


@pytest.fixture
def open_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any) -> Callable[[str], tuple[str, nn.Module]]:
    """A classifier of a kind, as a user would name it, and its network in this process."""

    def make(kind: str) -> tuple[str, nn.Module]:
        net, x = network(), images()
        batch = 2 if kind.endswith("of 2") else None
        card = {"classes": CLASSES, "mean": [0.2, 0.5, 0.6], "std": [0.3, 0.2, 0.5]}
        if kind in ("timm", "torchvision"):
            module = library(kind)
            torch.manual_seed(1)
            name = "test_resnet" if kind == "timm" else "shufflenet_v2_x0_5"
            make = module.create_model if kind == "timm" else module.models.get_model
            net = make(name, num_classes=3).requires_grad_(False)
            for _ in range(30):  # batch norms that have seen images, so that the outputs differ
                net(images(8, 64))
            net.eval()
            safetensors.torch.save_file(net.state_dict(), tmp_path / "net.safetensors")
            write_card(tmp_path / "net.json", **card)
            return f"{kind}:{name}@{tmp_path}/net.safetensors", net
        if kind.startswith(("pt2", "onnx")):
            path = tmp_path / f"net.{kind[:4].rstrip(',')}"
            write_card(tmp_path / "net.json", **card)
            return (export if kind.startswith("pt2") else to_onnx)(path, net, x, batch), net
        torch.save(net, tmp_path / "net.pth")
        if kind == "pickle":
            write_card(tmp_path / "net.json", **card)
            return resolve(f"{tmp_path}/net.pth", trust_pickle=True), net
        if kind in ("http", "mlflow"):
            server = serve(answers(net, "inputs" if kind == "mlflow" else "instances"))
            card |= {"classifier": server.url, "protocol": "mlflow" if kind == "mlflow" else "json", "batch": 2}
        else:
            module_of(tmp_path, monkeypatch, "theirs", FUNCTIONS.format(path=f"{tmp_path}/net.pth"))
            card |= {"classifier": "theirs:with_gradient" if kind == "function" else "theirs:Nested.outputs_only"}
        write_card(tmp_path / "card.json", **card)
        return f"{tmp_path}/card.json", net

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_network_s_outputs_and_explains(kind: str, open_kind: Any) -> None:
    spec, net = open_kind(kind)
    blackbox = load(spec, CLASSES)
    x = images(5, SIZE)
    normalised = x.clone()
    for channel, (mean, std) in enumerate([(0.2, 0.3), (0.5, 0.2), (0.6, 0.5)]):
        normalised[:, channel] = ((x[:, channel] + 1) / 2 - mean) / std
    torch.testing.assert_close(blackbox(x).detach(), net(normalised), rtol=1e-4, atol=1e-4)
    assert blackbox.classes == CLASSES and blackbox(x[:1]).shape == (1, 3) and not blackbox.training
    assert blackbox.differentiable == (kind in DIFFERENTIABLE)

    # Explaining through it is explaining through the network itself: by outputs alone, and by its gradient if any.
    torch.manual_seed(2)
    cae = CAE(replace(PRESETS["quick"].model, image_size=SIZE, channels=3, width=8, mlp_width=8)).eval()
    itself = BlackBox(net, CLASSES, mean=[0.2, 0.5, 0.6], std=[0.3, 0.2, 0.5])
    order = blackbox.probabilities(x).argsort(1, descending=True)
    question = x, order[:, 0], order[:, 1], cae.encode(x.flip(0))[0].detach()
    for mode in ("path", "auto"):
        found = explain(cae, blackbox, *question, mode=mode)
        wanted = "patch" if mode == "auto" and not blackbox.differentiable else mode
        expected = explain(cae, itself, *question, mode=wanted)
        assert found.status == expected.status and found.map.abs().sum() > 0
        torch.testing.assert_close(found.map, expected.map, rtol=1e-2, atol=1e-3 * expected.map.max().item())
    if not blackbox.differentiable:
        with pytest.raises(ValueError, match=r"^--mode integrated needs the classifier's gradient.*choose patch$"):
            explain(cae, blackbox, *question, mode="integrated")


def test_a_fixed_batch_and_size_are_kept_to(tmp_path: Path) -> None:
    """A file for exactly two images of 20 x 28 pixels."""
    net, example = network(), torch.rand(2, 3, 20, 28)
    for spec in (export(tmp_path / "a.pt2", net, example, 2), to_onnx(tmp_path / "b.onnx", net, example, 2)):
        blackbox = load(spec)
        assert blackbox.input_size == (20, 28) and blackbox.classes == ("0", "1", "2")
        x = images(5, 40)
        smaller = nn.functional.interpolate((x + 1) / 2, size=(20, 28), mode="bilinear", antialias=True)
        torch.testing.assert_close(blackbox(x).detach(), net(smaller), rtol=1e-4, atol=1e-4)


def test_axes_channels_and_single_outputs(tmp_path: Path) -> None:
    x, unit = images(), (images() + 1) / 2
    second = network(3, 1)(unit)
    cases: dict[str, tuple[nn.Module, dict[str, Any], Tensor, Tensor]] = {
        "last": (Last(network()), {"layout": "NHWC"}, unit.permute(0, 2, 3, 1), network()(unit)),
        "bgr": (network(), {"channels": "BGR", "mean": [0.1, 0.2, 0.3]}, unit,
                network()(unit[:, [2, 1, 0]] - torch.tensor([0.1, 0.2, 0.3])[:, None, None])),
        "grey": (network(1), {"channels": "grey", "std": 1 / 255}, unit[:, :1],
                 network(1)(unit.mean(1, keepdim=True) * 255)),
        "softmax": (nn.Sequential(network(), nn.Softmax(1)), {"outputs": "probabilities"}, unit,
                    network()(unit).log_softmax(1)),
        "second": (network(3, 1), {}, unit, torch.cat([-second / 2, second / 2], 1)),
        "sigmoid": (nn.Sequential(network(3, 1), nn.Sigmoid()), {"outputs": "probabilities"}, unit,
                    torch.cat([nn.functional.logsigmoid(-second), nn.functional.logsigmoid(second)], 1)),
    }  # fmt: skip
    for name, (net, fields, example, expected) in cases.items():
        write_card(tmp_path / f"{name}.json", **fields)
        blackbox = load(export(tmp_path / f"{name}.pt2", net, example))
        torch.testing.assert_close(blackbox(x).detach(), expected, rtol=1e-4, atol=1e-3)
        assert torch.allclose(blackbox.probabilities(x), expected.softmax(1), atol=1e-5)


def test_the_one_logit_of_two_classes_gives_either_of_them_a_gradient() -> None:
    blackbox, x = BlackBox(network(3, 1), ("well", "sick")), images().requires_grad_()
    gradients = [torch.autograd.grad(blackbox(x)[:, label].sum(), x)[0] for label in (0, 1)]
    assert gradients[0].abs().amax() > 0 and torch.equal(gradients[0], -gradients[1])


class Striped(nn.Module):
    """Makes tensors of its own, which an export ties to the device that it was made on."""

    def forward(self, x: Tensor) -> Tensor:
        stripes = torch.arange(x.shape[3], device=x.device) % 2
        return (x * stripes).mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.filterwarnings("ignore")
def test_an_exported_network_answers_where_the_images_are(tmp_path: Path) -> None:
    blackbox = load(export(tmp_path / "net.pt2", Striped(), images()))
    torch.testing.assert_close(blackbox(images()), Striped()((images() + 1) / 2))
    away = blackbox.to("meta")(images().to("meta"))  # the only other device that every machine has
    assert away.device.type == "meta" and away.shape == (len(images()), 3)


def test_probabilities_of_nothing_are_no_reason_to_fail() -> None:
    class Certain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

    p = BlackBox(Certain(), ("a", "b"), outputs="probabilities").probabilities(images(2))
    assert p.isfinite().all() and p.allclose(torch.tensor([[0.0, 1.0]]), atol=1e-6)


@pytest.mark.parametrize(("digits", "cliff"), [(4, 7.0), (6, 2.4), (None, 1.2)])
def test_what_rounds_to_probability_0_is_near_what_just_does_not(digits: int | None, cliff: float) -> None:
    """A cliff in the logits there would outweigh all that a map is made of."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            p = torch.sigmoid(20 * x.mean((1, 2, 3)))
            return p if digits is None else (p.double() * 10**digits).round().float() / 10**digits

    brightness = torch.linspace(0, 1, 2001)
    grey = brightness[:, None, None, None].expand(-1, 3, 4, 4)
    logits = BlackBox(Rounded(), ("a", "b"), outputs="probabilities", differentiable=digits is None)(grey)
    lead, true = logits[:, 1] - logits[:, 0], 20 * brightness
    assert torch.allclose(lead[true < 5], true[true < 5], atol=0.02)
    assert lead.diff().abs().max() < cliff and lead.max() < 16.7


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_smaller_probability_is_never_taken_for_a_larger_one(differentiable: bool) -> None:
    """From where a softmax of float32 rounds little, past where it is denormal, to where it is 0."""

    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.mean((2, 3))[:, :1] * 200, torch.zeros(len(x), 1)], 1).softmax(1)

    x = torch.linspace(-1, 1, 401)[:, None, None, None].expand(-1, 3, 4, 4).clone().requires_grad_()
    logits = BlackBox(Softmax(), ("a", "b"), outputs="probabilities", differentiable=differentiable)(x)
    lead = logits[:, 1] - logits[:, 0]
    assert (lead.diff() <= 0).all() and lead.isfinite().all()
    (gradient,) = torch.autograd.grad(lead.sum(), x)
    assert gradient.isfinite().all()
    reach = 87 if differentiable else 16
    true = -200 * x.detach().mean((1, 2, 3))
    within = true.abs() < reach
    assert torch.allclose(lead[within], true[within], atol=0.01) and within.sum() > 30
    assert (gradient[within].flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_probabilities_keep_their_order(differentiable: bool, dtype: torch.dtype) -> None:
    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[1.0, 1e-12, 3e-7, 1e-10, 0.0]], dtype=dtype).expand(len(x), 5)

    logits = BlackBox(Sure(), tuple("abcde"), outputs="probabilities", differentiable=differentiable)(images(2))
    assert logits.isfinite().all() and logits.argsort(1, descending=True)[:, :2].tolist() == [[0, 2]] * 2
    if dtype == torch.float32:
        assert logits.argsort(1, descending=True).tolist() == [[0, 2, 3, 1, 4]] * 2


def test_a_function_that_takes_no_tensor_of_a_device_gets_it_from_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def f(x):\n    if x.device.type != 'cpu':\n        raise TypeError\n    return [[1.0, 2.0]] * len(x)\n"
    module_of(tmp_path, monkeypatch, "of_numpy", code)
    on_cpu = []
    monkeypatch.setattr(Tensor, "cpu", lambda x: on_cpu.append(x.device.type) or torch.zeros(x.shape))
    asked = load("of_numpy:f").net(torch.zeros(2, 3, 4, 4, device="meta"))  # as good as a GPU, but that it has no data
    assert asked.device.type == "meta" and asked.shape == (2, 2) and on_cpu == ["meta"]


def test_paths_become_absolute_and_nothing_else_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    for spec, expected in {
        "folder": f"{here}/folder", "net.onnx": f"{here}/net.onnx", "/a/net.pt2": "/a/net.pt2",
        "torchvision:resnet18@a/b.pth": f"torchvision:resnet18@{here}/a/b.pth", "timm:x@/a.pth": "timm:x@/a.pth",
        "pack.age:f.g": "pack.age:f.g", "s3://b/net.pt2": "s3://b/net.pt2",
        "https://host/x": "https://host/x", "timm:x@s3://b/n.pth": "timm:x@s3://b/n.pth",
    }.items():  # fmt: skip
        assert resolve(spec) == expected and is_foreign(spec) == (spec != "folder")
    assert resolve("net.pth", folder="s3://b/c") == "s3://b/c/net.pth"
    with pytest.raises(ValueError, match="would be logged") as error:
        resolve("http://me:secret@host/x")
    assert "secret" not in str(error.value)
    write_card(tmp_path / "net.json", classifier="net.onnx", mean=[1, 2, 3])
    assert read_card(f"{here}/net.json") == (f"{here}/net.onnx", Card(classifier="net.onnx", mean=(1, 2, 3)))


def test_a_fingerprint_is_of_what_a_classifier_is_read_from(tmp_path: Path) -> None:
    here = tmp_path / "me@work"
    (here / "own").mkdir(parents=True)
    for file in ("net.onnx", "w.pth", "own/model.safetensors", "own/config.json"):
        (here / file).write_text(file)
    write_card(here / "card.json", classifier="net.onnx")
    write_card(here / "server.json", classifier="http://host/x")
    specs = [f"{here}/net.onnx", f"timm:x@{here}/w.pth", f"{here}/own", f"{here}/card.json", f"{here}/server.json",
             "http://host/x", "pack.age:f"]  # fmt: skip
    before = [fingerprint(spec) for spec in specs]
    assert before == [fingerprint(spec) for spec in specs] and fingerprint(f"trusted:{specs[0]}") == before[0]

    def changed(file: str, text: str) -> set[int]:
        was = (here / file).read_text() if (here / file).exists() else None
        (here / file).write_text(text)
        found = {i for i, spec in enumerate(specs) if fingerprint(spec) != before[i]}
        (here / file).unlink() if was is None else (here / file).write_text(was)
        return found

    assert changed("net.onnx", "other") == {0, 3} and changed("w.pth", "other") == {1}
    assert changed("net.onnx.data", "other") == {0, 3}
    assert changed("own/config.json", "other") == changed("own/model.safetensors", "other") == {2}
    assert changed("net.json", '{"std": 2}') == {0} and changed("w.json", '{"std": 2}') == {1}
    assert changed("server.json", '{"classifier": "http://host/x", "std": 2}') == {4}
    (here / "w.pth").unlink()
    with pytest.raises(ValueError, match=f"cannot read the classifier {here}/w.pth"):
        fingerprint(specs[1])


def test_grad_cam_needs_a_layer(tmp_path: Path) -> None:
    state = ResNet("resnet18", 3).state_dict()
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    assert load(f"torchvision:resnet18@{tmp_path}/net.safetensors").cam_layer == "layer4"
    write_card(tmp_path / "net.json", cam_layer="layer3")
    blackbox = load(f"torchvision:resnet18@{tmp_path}/net.safetensors")
    assert grad_cam(blackbox, images(2), torch.tensor([0, 1])).shape == (2, SIZE, SIZE)
    exported = load(export(tmp_path / "plain.pt2", network(), images()))
    with pytest.raises(ValueError, match="names no layer for Grad-CAM"):
        grad_cam(exported, images(2), torch.tensor([0, 1]))


def test_the_class_head_falls_back_without_a_gradient_and_says_so_if_it_was_asked_for() -> None:
    model = replace(PRESETS["quick"].model, image_size=SIZE, channels=3, width=8, mlp_width=8, disc_width=4)
    blackbox = BlackBox(network(), CLASSES)

    def trainer(class_head: Any) -> Trainer:
        config = replace(PRESETS["quick"].train, class_head=class_head)
        return Trainer(CAE(model), Discriminator(model, 3), config, LossWeights(), 10, blackbox)

    assert trainer("auto").config.class_head == "both"
    blackbox.differentiable = False
    assert trainer("auto").config.class_head == "distilled"
    terms = trainer("auto").step(images(4), torch.tensor([0, 1, 1, 2]))
    assert "distil" in terms
    for head in ("blackbox", "both"):
        refused = rf"^--class-head {head} needs the classifier's gradient.*choose distilled$"
        with pytest.raises(ValueError, match=refused):
            trainer(head)


# --- The pipeline, as a user runs it ----------------------------------------------------------------------------------

BRIGHT = """
import numpy as np
def brightness(x):
    highest = x.numpy().max((1, 2, 3))
    return np.stack([0.8 - highest, highest - 0.8], 1) * 20
"""


@pytest.mark.slow
def test_a_whole_run_through_a_function_without_a_gradient(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(blob(rng, i % 2)).save(tmp_path / "images" / f"{i:02}.png")
    (tmp_path / "theirs.py").write_text(BRIGHT)
    write_card(tmp_path / "card.json", classifier="theirs:brightness", classes=["dark", "bright"])
    run = tmp_path / "run"
    where = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = ["--dataset", f"{tmp_path}/images", "--run", str(run), "--classifier", f"{tmp_path}/card.json", *TINY]
    done = command("full.py", *words, PYTHONPATH=where)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "outputs only, no gradient" in done.stdout
    assert "class head distilled" in done.stdout and "mode patch" in done.stdout
    assert state(run)["stages"]["classify"]["result"]["classes"] == ["dark", "bright"]
    assert {"CAE", "random"} <= set(pd.read_csv(run / "evaluation/perturbation.csv").dropna(subset="value").method)
    skipped = pd.read_csv(run / "evaluation/skipped.csv").set_index("what").reason
    assert "names no layer" in skipped["maps by Grad-CAM"]


def test_what_needs_a_gradient_or_trust_is_refused_before_any_work(tmp_path: Path) -> None:
    def begun(**classified: Any) -> Run:
        stages = {name: {"options": {}, "result": {}} for name in ("shard", "classify", "train", "embed")}
        stages["classify"]["result"] = {"spec": "theirs:f", "classes": ["a", "b"], **classified}
        (tmp_path / "run.json").write_text(json.dumps({"options": {"dataset": "x"}, "stages": stages}))
        return Run(str(tmp_path))

    run = begun(differentiable=False)
    options = parse(explain_stage.ExplainOptions, ["--run", str(tmp_path), "--class-head", "blackbox"])
    with pytest.raises(ValueError, match="--class-head blackbox needs the classifier's gradient"):
        train_stage.prepare(run, options)
    with pytest.raises(ValueError, match="--mode integrated needs the classifier's gradient"):
        explain_stage.prepare(run, replace(options, mode="integrated"))
    begun(spec="trusted:/theirs/net.pth")
    with pytest.raises(UserError, match=r"^the classifier /theirs/net.pth may run a pickle: say --trust-pickle again$"):
        explain_stage.main(options)
    (tmp_path / "net.onnx").write_bytes(b"one network")
    begun(spec=f"{tmp_path}/net.onnx", fingerprint=fingerprint(f"{tmp_path}/net.onnx"))
    for file, content in {"net.onnx": "another network", "net.json": '{"mean": 0.5}'}.items():
        (tmp_path / file).write_text(content)
        with pytest.raises(UserError, match=rf"^the classifier {tmp_path}/net.onnx has changed since stage classify"):
            explain_stage.main(options)
        (tmp_path / "net.onnx").write_text("one network")
    assert not parse(explain_stage.ExplainOptions, ["--run", str(tmp_path)]).trust_pickle
