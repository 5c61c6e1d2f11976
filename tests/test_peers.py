"""Control maps and attribution methods against their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cae.classifiers import BlackBox
from cae.images import blur
from cae.peers import controls
from cae.peers.full_grad import full_grad, simple_full_grad, smooth_full_grad
from cae.peers.grad_cam import grad_cam
from cae.peers.integrated_gradients import integrated_gradients
from cae.peers.latent_shift import latent_shift
from cae.peers.lime import lime
from cae.peers.occlusion import occlusion
from cae.peers.rise import rise
from cae.peers.table import peers


def pictures(number: int = 4, height: int = 12, width: int = 16, seed: int = 0) -> Tensor:
    return torch.rand((number, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_random_map_belongs_to_the_image_and_the_seed_alone() -> None:
    images = pictures(4, 64, 64)
    maps = controls.random_map(images, seed=1)
    assert maps.shape == (4, 64, 64) and maps.min() >= 0 and maps.max() < 1
    assert torch.equal(controls.random_map(images.flip(0)[1:3], seed=1), maps.flip(0)[1:3])
    assert torch.equal(controls.random_map(images.to(memory_format=torch.channels_last), seed=1), maps)
    assert not torch.equal(controls.random_map(images, seed=2), maps)
    # Unrelated between images, and to the image: 4096 pixels, so five standard errors are 5/64.
    streams = torch.cat([maps.flatten(1), images[:, 0].flatten(1)])
    assert (torch.corrcoef(streams) - torch.eye(8)).abs().max() < 5 / 64


def test_sobel_is_the_slow_convolution() -> None:
    images = pictures(2)
    maps, grey = controls.sobel(images), images.mean(1)
    kernel = [[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]

    def pixel(i: int, row: int, col: int) -> float:
        return float(grey[i, min(max(row, 0), 11), min(max(col, 0), 15)])

    for i, row, col in [(0, 0, 0), (0, 5, 7), (1, 11, 15), (1, 0, 9), (1, 8, 0)]:
        near = [(a, b) for a in range(3) for b in range(3)]
        across = sum(kernel[a][b] * pixel(i, row + a - 1, col + b - 1) for a, b in near) / 8
        down = sum(kernel[b][a] * pixel(i, row + a - 1, col + b - 1) for a, b in near) / 8
        assert float(maps[i, row, col]) == pytest.approx(math.hypot(across, down), abs=1e-6)
    assert controls.sobel(torch.full((1, 3, 8, 8), 0.4)).abs().max() < 1e-6
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    torch.testing.assert_close(controls.sobel(ramp)[0, :, 1:-1], torch.ones(8, 6))


def test_centre_falls_off_from_the_middle() -> None:
    maps = controls.centre(pictures(2, 9, 13))
    assert maps.shape == (2, 9, 13) and maps.argmax() == 4 * 13 + 6
    assert float(maps[1, 4, 6]) == 1.0
    assert float(maps[1, 1, 8]) == pytest.approx(math.exp(-0.5 * ((3 / (9 / 4)) ** 2 + (2 / (13 / 4)) ** 2)))
    torch.testing.assert_close(maps, maps.flip(1, 2))


def test_reconstruction_error() -> None:
    images, others = pictures(), pictures(seed=1)
    slow = sum((images[:, channel] - others[:, channel]).abs() for channel in range(3)) / 3
    torch.testing.assert_close(controls.reconstruction_error(images, others), slow)
    assert controls.reconstruction_error(images, images).abs().max() == 0
    with pytest.raises(ValueError, match="pass equal shapes"):
        controls.reconstruction_error(images, others[:1])


class Linear(nn.Module):
    """Strided 1x1 convolution, global average, linear without bias: Grad-CAM is ReLU(sum_k w_ck A_k) / (h w)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 5, 1, stride=stride)
        self.head = nn.Linear(5, 4, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


class LinearProbability(nn.Module):
    """p(class 1) = 0.5 + sum of weight * x, p(class 0) = 1 - p(class 1). Remembers what it was asked."""

    def __init__(self, height: int = 12, width: int = 16, power: int = 1) -> None:
        super().__init__()
        weight = torch.rand((3, height, width), generator=torch.Generator().manual_seed(7)) - 0.5
        self.weight = weight * 0.8 / weight.abs().sum()  # so p is within 0.1 and 0.9
        self.power = power
        self.asked: list[Tensor] = []

    def probability(self, x: Tensor) -> Tensor:
        return 0.5 + (x * self.weight).sum((1, 2, 3)).sign() * (x * self.weight).sum((1, 2, 3)).abs() ** self.power

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        p = self.probability(x)
        return torch.stack((1 - p, p), 1).log()


class LinearLogits(nn.Module):
    """Logits sum of weight * x + bias, for three classes."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(9)
        self.weight = torch.randn((3, 3, 12, 16), generator=rng) / 10
        self.bias = torch.tensor([0.3, -0.2, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight) + self.bias


def upsampled(coarse: Tensor, height: int, width: int) -> Tensor:
    """Bilinear between pixel centres, the border repeated: one pixel after another."""
    rows, cols = coarse.shape
    fine = torch.zeros(height, width)
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * cols / width - 0.5, 0), cols - 1)
            for row in range(int(y), min(int(y) + 2, rows)):
                for col in range(int(x), min(int(x) + 2, cols)):
                    fine[i, j] += max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - col)) * coarse[row, col]
    return fine


@pytest.mark.parametrize("stride", [1, 4])
def test_grad_cam_has_its_closed_form(stride: int) -> None:
    classifier, images, target = Linear(stride).eval().requires_grad_(False), pictures(), torch.tensor([0, 3, 1, 3])
    maps = grad_cam(classifier, images, target, classifier.features)
    assert maps.shape == (4, 12, 16) and not maps.requires_grad
    activations = classifier.features(images)  # (B, 5, h, w)
    for i in range(4):
        weights = classifier.head.weight[target[i]]
        coarse = (weights[:, None, None] * activations[i]).sum(0).clamp(min=0) / activations[0, 0].numel()
        torch.testing.assert_close(maps[i], upsampled(coarse, 12, 16), atol=1e-7, rtol=1e-5)
    assert (maps == 0).any() and (maps > 0).any()


def test_grad_cam_leaves_images_weights_and_activations_alone() -> None:
    torch.manual_seed(0)

    def network(inplace: bool) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(4 * 10 * 14, 2)).eval()

    plain, inplace = network(False), network(True)
    inplace.load_state_dict(plain.state_dict())
    images, target = pictures(), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():  # as a batch stage would call it
        maps = grad_cam(plain, images, target, plain[0])
    torch.testing.assert_close(grad_cam(inplace, images, target, inplace[0]), maps)
    torch.testing.assert_close(grad_cam(inplace.requires_grad_(False), images, target, inplace[0]), maps)
    torch.testing.assert_close(grad_cam(plain, images[2:3], target[2:3], plain[0]), maps[2:3])
    assert images.grad is None and not images.requires_grad
    assert all(parameter.grad is None for parameter in plain.parameters())


def test_grad_cam_refuses_a_layer_that_cannot_be_shown() -> None:
    classifier, target = Linear(1).eval(), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="not a module of the classifier"):
        grad_cam(classifier, pictures(), target, nn.Conv2d(3, 5, 1))
    with pytest.raises(ValueError, match="choose a convolutional one"):
        grad_cam(classifier, pictures(), target, classifier.head)


def test_grad_cam_takes_the_layer_that_a_black_box_names() -> None:
    box, images, target = small_box(), pictures(), torch.tensor([0, 1, 2, 1])
    assert torch.equal(grad_cam(box, images, target), grad_cam(box, images, target, box.net.get_submodule("2")))
    with pytest.raises(ValueError, match="names no layer for Grad-CAM"):
        grad_cam(box.net, images, target)


# What every method must do.


def scramble(net: nn.Module, seed: int = 0) -> None:
    """Batch norms and biases as after some training: none is at its trivial start."""
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5), (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
            ):  # fmt: skip
                tensor.data.uniform_(low, high, generator=rng)
        elif isinstance(module, nn.Linear):
            module.bias.data.uniform_(-1, 1, generator=rng)


def small_box() -> BlackBox:
    """Convolution, batch norm, ReLU, pooling; a normalisation of its inputs that does not cancel."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 48, 3),
    )  # fmt: skip
    scramble(net)
    box = BlackBox(net, ("a", "b", "c"), mean=[0.2, 0.5, 0.6], std=[0.3, 0.5, 0.2], cam_layer="2")
    return box.eval().requires_grad_(False)


class ToyCAE(nn.Module):
    """Class code = two means of the image; decoder = a linear map of it, plus the rest of the image."""

    def __init__(self, height: int = 12, width: int = 16) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn((2, 3, height, width), generator=rng))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2].mean((2, 3)), x

    def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
        return 0.1 * individual_code + torch.einsum("bd,dchw->bchw", class_code, self.weight)


METHODS: dict[str, Callable[..., Tensor]] = {
    "grad_cam": grad_cam,
    "lime": lambda *given, **more: lime(*given, samples=40, number=12, batch=16, **more),
    "full_grad": full_grad,
    "simple_full_grad": simple_full_grad,
    "smooth_full_grad": lambda *given, **more: smooth_full_grad(*given, samples=3, **more),
    "integrated_gradients": lambda *given: integrated_gradients(*given, steps=8, batch=5),
    "occlusion": lambda *given: occlusion(*given, window=4, batch=10),
    "rise": lambda *given, **more: rise(*given, masks=30, cells=3, batch=8, **more),
    "latent_shift": lambda *given: latent_shift(*given, cae=ToyCAE()),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_to_the_contract(name: str) -> None:
    method, box, images, target = METHODS[name], small_box(), pictures(7), torch.tensor([0, 1, 2, 1, 0, 2, 0])
    before, given = {key: value.clone() for key, value in box.state_dict().items()}, images.clone()
    with torch.no_grad():  # as a batch stage would call it
        maps = method(box, images, target)
    assert maps.shape == (7, 12, 16) and maps.dtype == torch.float32 and not maps.requires_grad
    assert maps.isfinite().all() and (maps.flatten(1).std(1) > 0).all()
    torch.testing.assert_close(method(box, images, target), maps)
    # An image's map is its own, in any batch and order.
    torch.testing.assert_close(method(box, images[4:5], target[4:5]), maps[4:5], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(method(box, images.flip(0), target.flip(0)), maps.flip(0), atol=1e-5, rtol=1e-4)
    # It is about the target.
    others = method(box, images, (target + 1) % 3)
    assert ((others - maps).flatten(1).abs().amax(1) > 1e-3 * maps.flatten(1).abs().amax(1)).all()
    # And nobody sees that it was asked for.
    assert torch.equal(images, given) and images.grad is None and not images.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in box.state_dict().items())
    for module in box.modules():
        assert not module.training and not module._forward_hooks and not module._backward_hooks
        assert not module._forward_pre_hooks and not module._backward_pre_hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in box.parameters())


@pytest.mark.parametrize("name", ["lime", "rise", "smooth_full_grad"])
def test_draws_belong_to_the_seed_alone(name: str) -> None:
    method, box, images, target = METHODS[name], small_box(), pictures(2), torch.tensor([0, 1])
    torch.manual_seed(5)
    np.random.seed(5)
    maps, state = method(box, images, target, seed=1), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # it draws nothing from the common generator
    torch.manual_seed(6)
    np.random.seed(6)
    torch.testing.assert_close(method(box, images, target, seed=1), maps)
    assert ((method(box, images, target, seed=2) - maps).flatten(1).abs().amax(1) > 1e-4).all()


# Integrated gradients and occlusion


def test_integrated_gradients_have_their_closed_forms() -> None:
    net, images, target = LinearLogits(), pictures(), torch.tensor([0, 2, 1, 2])
    shade = pictures(1, seed=4)
    for baseline in (-1.0, 0.25, shade):
        expected = (net.weight[target] * (images - baseline)).sum(1)
        maps = integrated_gradients(net, images, target, baseline=baseline)
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(integrated_gradients(net, images, target), (net.weight[target] * (images + 1)).sum(1))

    def cubic(x: Tensor) -> Tensor:
        return (x**3).sum((2, 3))

    # Class k is the sum of cubes of channel k: what each pixel adds is x^3 - x'^3, by quadrature.
    maps = integrated_gradients(_Module(cubic), images, target, baseline=0.5, steps=4)
    torch.testing.assert_close(maps, images[torch.arange(4), target] ** 3 - 0.125, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_add_up_to_the_change_of_the_logit() -> None:
    box, images, target = small_box(), pictures(3), torch.tensor([0, 2, 1])
    asked: list[int] = []
    hook = box.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    maps = integrated_gradients(box, images, target, steps=200, batch=32)
    hook.remove()
    assert max(asked) <= 32 and sum(asked) >= 600
    change = (box(images) - box(torch.full_like(images, -1)))[torch.arange(3), target]
    torch.testing.assert_close(maps.sum((1, 2)), change, rtol=1e-2, atol=1e-2 * float(change.abs().max()))


class _Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 2), (5, 3)])
def test_occlusion_is_the_slow_mean_over_windows(window: int, stride: int) -> None:
    net, images, target = LinearProbability(), pictures(2), torch.tensor([1, 0])
    maps = occlusion(net, images, target, baseline=0.3, window=window, stride=stride, batch=7)
    assert max(len(asked) for asked in net.asked) <= 7
    for i in range(2):
        total, count = torch.zeros(12, 16), torch.zeros(12, 16)
        drop = (net.weight * (images[i] - 0.3)).sum(0) * (1 if target[i] == 1 else -1)
        for row in range(0, 12, stride):
            for col in range(0, 16, stride):
                # A window that ends where one before it did, at the border, is none.
                if row - stride + window < 12 and col - stride + window < 16:
                    total[row : row + window, col : col + window] += drop[row : row + window, col : col + window].sum()
                    count[row : row + window, col : col + window] += 1
        torch.testing.assert_close(maps[i], total / count, rtol=1e-3, atol=1e-6)


def test_occlusion_has_a_default_and_refuses_gaps() -> None:
    net, images, target = LinearProbability(), pictures(1), torch.tensor([1])
    torch.testing.assert_close(occlusion(net, images, target), (net.weight * images).sum(1), rtol=1e-3, atol=1e-6)
    for window, stride in ((3, 4), (13, 2), (4, 0)):
        with pytest.raises(ValueError, match="stride <= window <= side"):
            occlusion(net, images, target, window=window, stride=stride)


def test_occlusions_default_window_is_an_eighth_of_the_side_and_its_stride_odd() -> None:
    for height, width, window, stride in ((24, 16, 2, 1), (32, 40, 4, 3), (64, 48, 6, 3)):
        net, images = LinearProbability(height, width), pictures(1, height, width)
        given = net, images, torch.tensor([1])
        torch.testing.assert_close(occlusion(*given), occlusion(*given, window=window, stride=stride))


@pytest.mark.parametrize("name", peers(cae=None))
def test_every_peer_of_the_table_gives_maps(name: str) -> None:
    box, images = small_box(), pictures(2)
    maps = peers()[name].maps(box, images, torch.tensor([0, 1]))
    assert maps.shape == images[:, 0].shape and maps.isfinite().all() and maps.flatten(1).std(1).gt(0).all()


def test_names_of_the_table_stand_for_their_methods() -> None:
    box, images, target = small_box(), pictures(2), torch.tensor([0, 1])
    slow = {
        "Grad-CAM": grad_cam(box, images, target),
        "FullGrad": full_grad(box, images, target),
        "Simple FullGrad": simple_full_grad(box, images, target),
        "Smooth FullGrad": smooth_full_grad(box, images, target, samples=10, noise=0.15, simple=True),
        "integrated gradients": integrated_gradients(box, images, target, baseline=-1.0),
        "integrated gradients, blur": integrated_gradients(box, images, target, baseline=blur(images, 1 / 8)),
        "occlusion": occlusion(box, images, target, baseline=0.0),
        "LIME": lime(box, images, target, samples=500),
        "RISE": rise(box, images, target, masks=1000, baseline=0.0),
    }
    found = peers()
    assert set(found) == set(slow)
    for name, expected in slow.items():
        torch.testing.assert_close(found[name].maps(box, images, target), expected, msg=name)


def test_only_the_peer_that_blurs_is_told_of_a_fill() -> None:
    assert {name: peer.told for name, peer in peers().items() if peer.told} == {"integrated gradients, blur": ("blur",)}
