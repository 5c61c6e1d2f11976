"""Control maps and Grad-CAM against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cae.peers import controls
from cae.peers.grad_cam import grad_cam

torch.set_num_threads(1)


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
