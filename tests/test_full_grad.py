"""FullGrad and its kin: complete, and their slow definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_peers import pictures, scramble
from torch import Tensor, nn

from cae.classifiers import BlackBox, ResNet, load, save
from cae.config import ClassifierConfig
from cae.peers.full_grad import full_grad, full_gradients, simple_full_grad, smooth_full_grad


def black_boxes(folder: Path, case: str) -> BlackBox:
    torch.manual_seed(2)
    net = ResNet("resnet18", 3, "small")
    scramble(net)
    if case == "folded":
        config = ClassifierConfig(arch="resnet18", stem="small")
        save(str(folder / "box"), BlackBox(net, ("a", "b", "c")), config)
        return load(str(folder / "box"))
    if case == "plain":
        return BlackBox(net, ("a", "b", "c")).eval().requires_grad_(False)
    imagenet: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    if case == "grey":
        imagenet["channels"] = "grey"
    if case == "BGR":
        imagenet = {name: values[::-1] for name, values in imagenet.items()} | {"channels": "BGR"}
    return BlackBox(net, ("a", "b", "c"), **imagenet, input_size=48).eval().requires_grad_(False)


@pytest.mark.parametrize("case", ["plain", "folded", "normalised and resized", "BGR", "grey"])
def test_full_gradients_are_complete(tmp_path: Path, case: str) -> None:
    box, images, target = black_boxes(tmp_path, case), pictures(3, 32, 32), torch.tensor([2, 0, 1])
    terms = full_gradients(box, images, target)
    logit = box(images)[torch.arange(3), target]
    torch.testing.assert_close(terms.logit, logit, rtol=1e-4, atol=0)
    inputs = terms.input.sum((1, 2, 3))
    biases = torch.stack([term.flatten(1).sum(1) for term in terms.bias_terms()])  # (layers, B)
    torch.testing.assert_close(inputs + biases.sum(0), logit, rtol=1e-4, atol=0)
    assert len(biases) == 21 and (biases.abs() > 1e-3 * logit.abs().max()).any(1).sum() > 10  # none can be left out
    assert (inputs.abs() > 1e-3 * logit.abs()).all()


def test_full_grad_is_the_same_after_folding(tmp_path: Path) -> None:
    plain, folded = black_boxes(tmp_path, "plain"), black_boxes(tmp_path, "folded")
    assert any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    images, target = pictures(2, 32, 32), torch.tensor([2, 0])
    for method in (full_grad, simple_full_grad):
        maps = method(plain, images, target)
        torch.testing.assert_close(method(folded, images, target), maps, rtol=1e-3, atol=1e-3 * float(maps.max()))


class TwoLayers(nn.Module):
    """A convolution, ReLU, another that is smaller, norm over places, mixed; biases may be given per place.

    The norm is homogeneous of degree 1, as FullGrad needs, and unlike an average's its gradient varies over places.
    Remembers what it was asked.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 2, 3, stride=2)
        self.mix = torch.tensor([[1.0, 0.6], [-0.7, 1.0]])  # so that no channel's gradient is 0
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor, *biases: Tensor) -> Tensor:
        self.asked.append(x.detach())
        if biases:
            y = torch.relu(nn.functional.conv2d(x, self.first.weight, padding=1) + biases[0])
            return (nn.functional.conv2d(y, self.second.weight, stride=2) + biases[1]).square().sum(
                (2, 3)
            ).sqrt() @ self.mix
        return self.second(self.first(x).relu_()).square().sum((2, 3)).sqrt() @ self.mix


def psi(terms: list[Tensor]) -> Tensor:
    """The map (12, 16) of one image's terms (C, h, w), channel by channel; corners lie on each other."""

    def takes(large: int, size: int) -> Tensor:
        place = [i * (size - 1) / (large - 1) for i in range(large)]
        return torch.tensor([[max(0, 1 - abs(at - j)) for j in range(size)] for at in place])

    heat = torch.zeros(12, 16)
    for term in terms:
        scaled = (term.abs() - term.abs().min()) / (term.abs().max() - term.abs().min())
        for channel in scaled:
            heat += takes(12, channel.shape[0]) @ channel @ takes(16, channel.shape[1]).T
    return heat


def test_full_grad_and_simple_are_their_slow_definitions() -> None:
    net, images, target = TwoLayers().eval().requires_grad_(False), pictures(2), torch.tensor([1, 0])
    for simple, method in ((False, full_grad), (True, simple_full_grad)):
        maps = method(net, images, target)
        for i in range(2):
            given = [images[i].clone().requires_grad_()]
            for layer, size in ((net.first, (12, 16)), (net.second, (5, 7))):
                given.append(layer.bias[:, None, None].expand(-1, *size).clone().requires_grad_())
            logit = net(given[0][None], *[bias[None] for bias in given[1:]])[0, target[i]]
            torch.testing.assert_close(logit, net(images[i : i + 1])[0, target[i]])
            gradients = torch.autograd.grad(logit, given)
            terms = [value.detach() * gradient for value, gradient in zip(given, gradients, strict=True)]
            expected = psi([terms[0], *gradients[1:]] if simple else terms)
            torch.testing.assert_close(maps[i], expected, rtol=1e-3, atol=1e-3)


def test_smooth_full_grad_without_noise_is_simple_and_averages_with_it() -> None:
    net, images, target = TwoLayers().eval().requires_grad_(False), pictures(2), torch.tensor([0, 1])
    images[1] *= 0.1
    simple, full = simple_full_grad(net, images, target), full_grad(net, images, target)
    torch.testing.assert_close(smooth_full_grad(net, images, target, noise=0), simple)
    torch.testing.assert_close(smooth_full_grad(net, images, target, noise=0, simple=False), full)
    assert (full - simple).abs().max() > 0.1
    for only_simple in (True, False):
        net.asked.clear()
        maps = smooth_full_grad(net, images, target, samples=30, noise=0.2, simple=only_simple)
        asked = torch.stack(net.asked)  # (samples, B, 3, H, W)
        draws = (asked - images) / torch.stack([image.max() - image.min() for image in images])[:, None, None, None]
        assert len(draws) == 30 and float(draws.std()) == pytest.approx(0.2, rel=0.05) and abs(draws.mean()) < 0.01
        torch.testing.assert_close(draws[:, 0], draws[:, 1], atol=1e-5, rtol=1e-3)
        assert (draws[0] - draws[1]).abs().max() > 0.1
        all_terms = [full_gradients(net, noisy, target) for noisy in asked]
        for i in range(2):
            layers = [terms.gradients if only_simple else terms.bias_terms() for terms in all_terms]
            each = [[terms.input, *more] for terms, more in zip(all_terms, layers, strict=True)]
            means = [sum(term[i] for term in same) / 30 for same in zip(*each, strict=True)]
            torch.testing.assert_close(maps[i], psi(means), rtol=1e-3, atol=1e-3)


def test_full_grad_refuses_every_image_of_a_network_that_it_decomposes_nearly() -> None:
    images, layers, width = pictures(16, 12, 12), list[nn.Module](), 3
    torch.manual_seed(1)
    for _ in range(4):
        layers, width = [*layers, nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()], 8
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 144, 2)).eval().requires_grad_(False)
    scramble(net)
    for one in images.split(1):
        with pytest.raises(ValueError, match="leave out"):
            full_grad(net, one, torch.tensor([1]))


def test_full_grad_refuses_a_network_that_it_does_not_decompose() -> None:
    images, target = pictures(), torch.tensor([0, 1, 0, 1])
    torch.manual_seed(0)
    for smooth in (nn.GELU(), nn.Sigmoid(), nn.GroupNorm(2, 4)):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), smooth, nn.Flatten(), nn.Linear(4 * 140, 2)).requires_grad_(False)
        for method in (full_grad, simple_full_grad, smooth_full_grad):
            with pytest.raises(ValueError, match="leave out"):
                method(net, images, target)
        assert not any(module._forward_hooks for module in net.modules())
