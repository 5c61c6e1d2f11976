from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.classifiers import BlackBox, ResNet, augment, build, class_names, load, save
from cae.config import ClassifierConfig

CLASSES = ("normal", "pneumonia")
SMALL = ClassifierConfig(arch="resnet18", stem="small")


def images(count: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_state(arch: str, classes: int, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as torchvision would save it, with running statistics that are not the initial ones."""
    torch.manual_seed(seed)
    state = ResNet(arch, classes).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return state


# What torchvision's networks are known to look like: (arch, keys, parameters with 1000 classes).
@pytest.mark.parametrize(("arch", "keys", "parameters"), [("resnet18", 122, 11_689_512), ("resnet50", 320, 25_557_032)])
def test_names_and_shapes_are_torchvisions(arch: str, keys: int, parameters: int) -> None:
    with torch.device("meta"):
        net = ResNet(arch, 1000)
    state = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(state) == keys
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    wide = arch == "resnet50"
    assert {name: state[name] for name in state if name.startswith(("conv1", "bn1", "fc"))} == {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.weight": (64,), "bn1.bias": (64,), "bn1.running_mean": (64,), "bn1.running_var": (64,),
        "bn1.num_batches_tracked": (),
        "fc.weight": (1000, 2048 if wide else 512), "fc.bias": (1000,),
    }  # fmt: skip
    expected: dict[str, tuple[int, ...]] = (
        {
            "layer1.0.conv1.weight": (64, 64, 1, 1), "layer1.0.conv2.weight": (64, 64, 3, 3),
            "layer1.0.conv3.weight": (256, 64, 1, 1), "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer1.0.downsample.1.running_var": (256,), "layer1.1.conv1.weight": (64, 256, 1, 1),
            "layer2.0.conv2.weight": (128, 128, 3, 3), "layer2.0.downsample.0.weight": (512, 256, 1, 1),
            "layer3.5.bn3.num_batches_tracked": (), "layer4.2.conv3.weight": (2048, 512, 1, 1),
            "layer4.1.bn2.weight": (512,), "layer4.2.bn3.bias": (2048,),
        }
        if wide
        else {
            "layer1.0.conv1.weight": (64, 64, 3, 3), "layer1.1.conv2.weight": (64, 64, 3, 3),
            "layer2.0.conv1.weight": (128, 64, 3, 3), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer2.0.downsample.1.weight": (128,), "layer2.0.downsample.1.num_batches_tracked": (),
            "layer3.0.downsample.1.running_mean": (256,), "layer4.0.downsample.0.weight": (512, 256, 1, 1),
            "layer4.1.bn2.weight": (512,), "layer4.1.bn2.running_var": (512,), "layer4.1.bn2.num_batches_tracked": (),
        }
    )  # fmt: skip
    assert {name: state.get(name) for name in expected} == expected
    assert ("layer1.0.downsample.0.weight" in state) == wide  # a basic first stage needs none
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"layer{i}.")}) for i in range(1, 5)]
    assert blocks == ([3, 4, 6, 3] if wide else [2, 2, 2, 2])


@pytest.mark.parametrize(("stem", "size", "grid"), [("imagenet", 96, (3, 3)), ("small", 64, (4, 4))])
def test_grad_cams_layer_is_there_and_has_a_grid(stem: Any, size: int, grid: tuple[int, int]) -> None:
    """The last stage of the `imagenet` stem has 1/32 of the side, the one that the `small` stem offers has 1/16."""
    blackbox = build(ClassifierConfig(arch="resnet18", stem=stem), CLASSES).eval()
    seen: list[torch.Size] = []
    layer = blackbox.net.get_submodule(blackbox.cam_layer)
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2:]))
    assert blackbox(images(1, size)).shape == (1, 2) and tuple(seen[0]) == grid


def slow_resnet18(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of He et al. in functions, straight from a state dict with torchvision's names."""

    def norm(x: Tensor, name: str) -> Tensor:
        shift, scale = state[f"{name}.running_mean"], (state[f"{name}.running_var"] + 1e-5).sqrt()
        y = (x - shift[:, None, None]) / scale[:, None, None]
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    x = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(x, "bn1").relu(), 3, 2, 1)
    for stage in range(1, 5):
        for block in range(2):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1").relu()
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                x = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2), f"{name}.downsample.1")
            x = (x + y).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_torchvision_weights_load_and_see_imagenets_normalisation(tmp_path: Path, suffix: str) -> None:
    state, path = random_state("resnet18", 2), tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    blackbox = load(f"torchvision:resnet18@{path}", CLASSES)
    assert blackbox.classes == CLASSES and not blackbox.training
    assert not any(parameter.requires_grad for parameter in blackbox.parameters())
    x = images(2)
    normalised = x.clone()
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        normalised[:, channel] = ((x[:, channel] + 1) / 2 - mean) / std
    expected = slow_resnet18(state, normalised)
    assert torch.allclose(blackbox(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert not torch.allclose(blackbox(x), slow_resnet18(state, x), rtol=1e-2)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_save_and_load_give_equal_outputs(tmp_path: Path, stem: str) -> None:
    torch.manual_seed(0)
    config = ClassifierConfig(arch="resnet18", stem=stem)  # type: ignore[arg-type]
    blackbox = build(config, CLASSES)
    x = images(4, 48)
    blackbox.train()(x)  # moves the running statistics, which must be saved too
    save(f"{tmp_path}/deep/er", blackbox, config)
    assert sorted(path.name for path in (tmp_path / "deep/er").iterdir()) == ["config.json", "model.safetensors"]
    found = load(f"{tmp_path}/deep/er", CLASSES)
    assert found.classes == CLASSES and found.cam_layer == blackbox.cam_layer and not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    torch.testing.assert_close(found(x), blackbox.eval()(x), rtol=1e-5, atol=1e-5)  # batch norms are folded
    assert torch.equal(load(f"{tmp_path}/deep/er")(x), found(x))  # classes need not be given
    assert found(x[:1].requires_grad_()).requires_grad  # frozen, yet gradients reach the image


def test_probabilities_sum_to_one_and_follow_the_logits() -> None:
    torch.manual_seed(0)
    blackbox = build(SMALL, ("a", "b", "c")).eval()
    for x in (images(5), images(1, 33), torch.ones(2, 3, 32, 32), -torch.ones(2, 3, 32, 32)):
        p = blackbox.probabilities(x)
        assert p.shape == (len(x), 3) and p.dtype == torch.float32 and not p.requires_grad
        assert torch.allclose(p.sum(1), torch.ones(len(x))) and (p >= 0).all()
        exponentials = blackbox(x).detach().double().exp()
        assert torch.allclose(p.double(), exponentials / exponentials.sum(1, keepdim=True), atol=1e-6)


def test_black_box_around_any_network() -> None:
    class Report(nn.Module):
        """Mean of each channel of what the network is given, and its height and width."""

        def forward(self, x: Tensor) -> Tensor:
            size = torch.tensor([[float(x.shape[2]), float(x.shape[3])]]).expand(len(x), -1)
            return torch.cat([x.mean((2, 3)), size], 1)

    x = images(2, 24)
    plain = BlackBox(Report(), CLASSES)(x)
    assert torch.allclose(plain[:, :3], x.mean((2, 3)), atol=1e-6) and plain[0, 3:].tolist() == [24, 24]
    unit = BlackBox(Report(), CLASSES, mean=0.0, std=1.0)(x)
    assert torch.allclose(unit[:, :3], (x.mean((2, 3)) + 1) / 2, atol=1e-6)
    for shape in ((24, 24), (10, 10), (24, 10), (10, 24), (16, 10), (10, 16)):
        sized = BlackBox(Report(), CLASSES, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0], input_size=16)
        constant = torch.tensor([-0.5, 0.0, 0.5])[:, None, None].expand(1, 3, *shape)
        expected = [(0.25 - 0.1) / 1, (0.5 - 0.2) / 2, (0.75 - 0.3) / 4, 16, 16]
        assert sized(constant)[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert not BlackBox(Report(), CLASSES).state_dict()


def refusal(spec: str, classes: tuple[str, ...] = CLASSES) -> str:
    with pytest.raises(ValueError) as error:
        load(spec, classes)
    reason = str(error.value)
    assert reason and len(reason.splitlines()) == 1 and "\x1b" not in reason
    return reason


def test_classes_must_be_the_same_in_the_same_order(tmp_path: Path) -> None:
    save(str(tmp_path), build(SMALL, CLASSES), SMALL)
    for classes in (CLASSES[::-1], (*CLASSES, "other"), ("normal", "covid")):
        reason = refusal(str(tmp_path), classes)
        assert str(tmp_path) in reason and "normal, pneumonia" in reason and ", ".join(classes) in reason


def test_folders_that_hold_no_classifier(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save(str(good), build(SMALL, CLASSES), SMALL)
    assert "no model in" in refusal(str(tmp_path / "missing"))
    assert "no model in" in refusal(str(good / "model.safetensors"))  # the file instead of its folder
    assert "no model in" in refusal("")
    assert "foo" in refusal("foo://bucket/classifier")

    config = json.loads((good / "config.json").read_text())
    wrong: list[Any] = [
        [1, 2], {}, config | {"classes": 3}, config | {"arch": "vgg16"}, config | {"arch": "resnet50"},
        config | {"classes": ["only one"]}, config | {"stem": "imagenet"},
    ]  # fmt: skip
    for values in wrong:
        (good / "config.json").write_text(json.dumps(values))
        assert f"{good} is no classifier saved by this project" in refusal(str(good))
    for text in ("", "{'classes'", "\x00\x01"):
        (good / "config.json").write_text(text)
        assert f"cannot read {good}/config.json" in refusal(str(good))
    (good / "config.json").write_bytes(b"\xff\xfe\xfa")
    assert f"cannot read {good}/config.json" in refusal(str(good))

    (good / "config.json").write_text(json.dumps(config))
    load(str(good))
    weights = (good / "model.safetensors").read_bytes()
    for damaged in (b"", weights[:5], weights[:1000], weights[:-1], b"junk" * 100):
        (good / "model.safetensors").write_bytes(damaged)
        assert f"{good}/model.safetensors are damaged" in refusal(str(good))
    (good / "model.safetensors").unlink()
    assert f"no weights at {good}/model.safetensors" in refusal(str(good))


def test_a_card_may_name_a_saved_classifier_and_say_nothing_else_of_it(tmp_path: Path) -> None:
    save(str(tmp_path / "saved"), build(SMALL, CLASSES), SMALL)
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"classifier": "saved"}))
    assert load(str(card)).classes == CLASSES
    card.write_text(json.dumps({"classifier": "saved", "channels": "BGR", "mean": 0}))
    assert refusal(str(card)).endswith(f"take channels, mean out of {card}")


def test_torchvision_specs_that_cannot_work(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = random_state("resnet18", 2)
    safetensors.torch.save_file(state, path)
    for spec in ("torchvision:resnet18", "torchvision:resnet18@", "torchvision:"):
        assert "names no weights: write torchvision:NAME@FILE.safetensors" in refusal(spec)
    assert "no weights at" in refusal(f"torchvision:resnet18@{path}.missing")
    assert "cannot read" in refusal(f"torchvision:resnet18@{tmp_path}")  # a folder
    for name in ("vgg160", "resnet", ""):
        reason = refusal(f"torchvision:{name}@{path}")
        without = f"torchvision:{name} needs the package torchvision" in reason and "there are resnet18, " in reason
        assert without or f"torchvision makes no network {name!r}" in reason
    assert f"{path} do not fit resnet50" in refusal(f"torchvision:resnet50@{path}")
    reason = refusal(f"torchvision:resnet18@{path}", ("a", "b", "c"))
    assert "2 outputs" in reason and "3 classes (a, b, c)" in reason
    safetensors.torch.save_file({"classifier.6.weight": torch.zeros(2, 9)}, path)
    assert "hold no fc.bias" in refusal(f"torchvision:resnet18@{path}")
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if name != "bn1.bias"}, path)
    assert "do not fit resnet18" in refusal(f"torchvision:resnet18@{path}")


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bomb = Bomb(trace)
    pickle.loads(pickle.dumps(bomb))
    assert trace.exists()  # it does go off
    trace.unlink()

    tensors = {"fc.weight": torch.zeros(2, 512)}
    for k, content in enumerate([bomb, {"model": bomb}, tensors | {"more": bomb}, nn.Linear(2, 2)]):
        path = tmp_path / f"{k}.pth"
        torch.save(content, path)
        assert f"{path} are damaged or no state dict" in refusal(f"torchvision:resnet18@{path}")
        torch.save(content, path, _use_new_zipfile_serialization=False)
        assert f"{path} are damaged or no state dict" in refusal(f"torchvision:resnet18@{path}")
    for suffix in ("pth", "pt", "bin", "safetensors"):
        path = tmp_path / f"raw.{suffix}"
        path.write_bytes(pickle.dumps(bomb, protocol=2))
        assert f"{path} are damaged or no state dict" in refusal(f"torchvision:resnet18@{path}")
    assert not trace.exists()


def test_files_that_hold_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    state = {"fc.weight": torch.zeros(2, 512)}
    contents: list[Any] = [3, [1, 2], torch.zeros(5), {}, {"epoch": 3}, {"model": state, "average": state}]
    for content in contents:
        torch.save(content, path)
        assert f"{path} are damaged or no state dict" in refusal(f"torchvision:resnet18@{path}")
    torch.save({"fc.weight": torch.randn(2, 512), "fc.bias": torch.randn(2)}, path)
    assert "do not fit resnet18" in refusal(f"torchvision:resnet18@{path}")
    whole = path.read_bytes()
    for damaged in (b"", b"junk" * 100, whole[:1000], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(damaged)
        assert f"{path} are damaged or no state dict" in refusal(f"torchvision:resnet18@{path}")


@pytest.mark.parametrize("prefix", ["", "module.", "model.net.", "_orig_mod.module."])
def test_checkpoints_of_trainings_are_taken(tmp_path: Path, prefix: str) -> None:
    state = random_state("resnet18", 2)
    torch.save(state, tmp_path / "bare.pth")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    loss = {"loss.weight": torch.zeros(2)} if prefix else {}  # of a module that holds the network and more
    torch.save({"state_dict": wrapped | loss, "optimizer": optimizer, "epoch": 3}, tmp_path / "training.pth")
    x = images(3, 32)
    bare, training = (load(f"torchvision:resnet18@{tmp_path}/{name}.pth") for name in ("bare", "training"))
    assert torch.equal(bare(x), training(x))


def test_checkpoints_of_two_networks_are_refused_and_of_one_among_parts_taken(tmp_path: Path) -> None:
    state, path = random_state("resnet18", 2), tmp_path / "two.pth"
    two = {f"{prefix}.{name}": tensor for prefix in ("student", "teacher") for name, tensor in state.items()}
    torch.save(two, path)
    assert "several networks in it (student., teacher.)" in refusal(f"torchvision:resnet18@{path}")
    torch.save({"aux.fc.bias": torch.zeros(3)} | {f"model.net.{name}": t for name, t in state.items()}, path)
    assert load(f"torchvision:resnet18@{path}").classes == ("0", "1")


def augmented(x: Tensor, seed: int = 0) -> Tensor:
    return augment(x, torch.Generator().manual_seed(seed))


def test_augment_keeps_shape_and_range_and_follows_its_generator() -> None:
    x = images(16, 32)
    before = x.clone()
    y = augmented(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all() and y.abs().max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(augmented(x), y) and not torch.equal(augmented(x, 1), y)
    assert len({tuple(image.flatten().tolist()) for image in augmented(x[:1].expand(16, -1, -1, -1))}) == 16


def test_augment_draws_what_it_says() -> None:
    """Constants give away brightness and contrast; a picture of its own coordinates tells where pixels came from."""
    count, size = 200, 64
    shape = (count, 3, size, size)
    offset = augmented(torch.zeros(shape))
    gain = (augmented(torch.full(shape, 0.5)) - offset) / 0.5
    for constant in (offset, gain):
        assert torch.allclose(constant, constant[:, :1, :1, :1].expand(shape), atol=1e-5)
    offset, gain = offset[:, :1, :1, :1], gain[:, :1, :1, :1]
    assert offset.abs().max() <= 0.15 and (gain - 1).abs().max() <= 0.25 + 1e-6
    assert offset.min() < -0.1 and offset.max() > 0.1 and gain.min() < 0.8 and gain.max() > 1.2

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = axis.expand(size, size), axis[:, None].expand(size, size)
    seen = (augmented(torch.stack([x, y, x * 0]).mul(0.5).expand(shape)) - offset) / gain / 0.5
    inner = slice(size // 4, -size // 4)  # far from the borders and their reflections
    design = torch.stack([x, y, torch.ones(size, size)], 2)[inner, inner].reshape(-1, 3)
    points = seen[:, :2, inner, inner].flatten(2).transpose(1, 2)  # (count, pixels, 2)
    fit = torch.linalg.lstsq(design.expand(count, -1, -1), points).solution  # (count, 3, 2)
    assert torch.allclose(design @ fit, points, atol=1e-4)  # affine, indeed

    across, down, shift = fit.unbind(1)  # what a step to the right, a step down and no step mean in the original
    mirrored = across[:, 0] < 0
    assert 0.35 < mirrored.float().mean() < 0.65
    across = torch.where(mirrored[:, None], -across, across)
    scale, angle = across.norm(dim=1), torch.atan2(across[:, 1], across[:, 0]).rad2deg().abs()
    assert torch.allclose(scale, down.norm(dim=1), atol=1e-3)
    assert torch.allclose((across * down).sum(1), torch.zeros(count), atol=1e-3)
    assert (scale - 1).abs().max() <= 0.121 and scale.min() < 0.9 and scale.max() > 1.1
    assert 7 < angle.max() < 8.1
    assert 0.04 < shift.abs().max() / 2 <= 0.0501  # as a share of the side, which is 2 long


def test_untrained_classifiers_are_seeded_and_differ_by_seed() -> None:
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(build(SMALL, CLASSES).eval()(images(2, 32)).detach().numpy())
    assert np.array_equal(outputs[0], outputs[1]) and not np.allclose(outputs[0], outputs[2])


def test_class_names_are_the_classifiers_own_or_the_datas_or_numbers(tmp_path: Path) -> None:
    save(str(tmp_path / "own"), build(SMALL, ("a", "b", "c")), SMALL)
    for found in ((), ("b",), ("a", "c")):
        assert class_names(str(tmp_path / "own"), found) == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"knows the classes a, b, c and the data has 'd'"):
        class_names(str(tmp_path / "own"), ("a", "d"))
    torch.save(ResNet("resnet18", 3).state_dict(), tmp_path / "net.pth")
    spec = f"torchvision:resnet18@{tmp_path}/net.pth"
    assert class_names(spec, ()) == ("0", "1", "2")
    assert class_names(spec, ("x", "y", "z")) == ("x", "y", "z")
    with pytest.raises(ValueError, match="3 outputs"):
        class_names(spec, ("x", "y"))
