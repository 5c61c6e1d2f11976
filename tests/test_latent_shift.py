"""Latent shift: its closed form, and its search."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_peers import LinearLogits, ToyCAE, pictures, small_box
from torch import Tensor, nn

from cae.config import PRESETS
from cae.networks import CAE
from cae.peers.latent_shift import latent_shift


def test_latent_shift_has_its_closed_form_for_linear_parts() -> None:
    cae, images, target = ToyCAE(), pictures(4), torch.tensor([1, 0, 1, 1])
    net = LinearLogits()
    net.weight, net.bias = net.weight[:2], net.bias[:2]
    maps = latent_shift(net, images, target, cae=cae, step=0.3, frames=4)
    decoder, ends = cae.weight.detach(), []
    for i in range(4):
        lead = net.weight[target[i]] - net.weight[1 - target[i]]  # the log odds' gradient by the image
        gradient = (decoder * lead).sum((1, 2, 3))  # (D,)
        change = torch.einsum("d,dchw->chw", -gradient / gradient.square().sum(), decoder)
        torch.testing.assert_close((change * lead).sum(), torch.tensor(-1.0))  # the log odds fall as said
        logits = net(cae.decode(*cae.encode(images[i : i + 1])))[0].detach()
        odds, far = float(logits[target[i]] - logits[1 - target[i]]), 0.0
        for _ in range(12):
            far = 1.1 * far + 0.3
            p, start = 1 / (1 + math.exp(far - odds)), 1 / (1 + math.exp(-odds))
            if p < 0.05 or start - p > 0.8:
                break
        ends.append(far)
        torch.testing.assert_close(maps[i], far / 3 * change.abs().mean(0))  # three equal differences
    assert len(set(ends)) > 1  # each image's search is its own
    assert all(parameter.grad is None for parameter in cae.parameters())


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        ([0.9, 0.7, 0.5, 0.3, 0.2], 4.641),  # never enough: as far as `steps` says
        ([0.9, 0.7, 0.8, 0.3, 0.2], 2.1),  # no longer falls
        ([0.9, 0.7, 0.09, 0.05, 0.05], 2.1),  # by more than `fall`
        ([0.6, 0.04, 0.03, 0.02, 0.01], 1.0),  # below 0.05
    ],
)
def test_latent_shift_ends_its_search_as_the_authors_do(answers: list[float], end: float) -> None:
    class Scripted(nn.Module):
        """Says what the script says when the code has been moved so many steps along its first axis."""

        def forward(self, x: Tensor) -> Tensor:
            moved = -x[:, 0, 0, 0]  # the first entry of the code
            script = torch.tensor(answers).logit()
            at = moved.detach().clamp(0, 4).round().long()
            return torch.stack([moved * 0, script[at] - (moved - moved.detach())], 1)

    class Axis(nn.Module):
        """The code is the image's first channel, shifted by all at once."""

        def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(len(x), 1), torch.zeros_like(x)

        def decode(self, class_code: Tensor, individual_code: Tensor) -> Tensor:
            return individual_code + class_code[:, :, None, None]

    images = torch.zeros(2, 3, 4, 4)
    # The steps, each a tenth longer than the one before, lead to 1, 2.1, 3.31 and 4.641.
    maps = latent_shift(Scripted(), images, torch.tensor([1, 1]), cae=Axis(), step=1.0, steps=4, frames=2)
    torch.testing.assert_close(maps, torch.full((2, 4, 4), end))


def test_latent_shift_refuses_a_sweep_of_one_frame() -> None:
    with pytest.raises(ValueError, match="a difference needs two"):
        latent_shift(LinearLogits(), pictures(1), torch.tensor([0]), cae=ToyCAE(), frames=1)


def test_latent_shift_follows_the_gradient_of_a_real_cae() -> None:
    torch.manual_seed(0)
    cae, box = (
        CAE(replace(PRESETS["quick"].model, image_size=32, channels=1, width=16, mlp_width=16)).eval(),
        small_box(),
    )
    box.net[-1] = nn.Linear(8 * 16 * 16, 3).requires_grad_(False)
    cae, box = cae.double(), box.double()  # finite differences of a network with kinks need it
    images, target = pictures(2, 32, 32).double(), torch.tensor([2, 0])
    maps = latent_shift(box, images, target, cae=cae, step=0.5, steps=1, frames=2)
    with torch.no_grad():
        code, rest = cae.encode(images)

        def log_odds(codes: Tensor) -> Tensor:
            p = box(cae.decode(codes, rest)).softmax(1)[torch.arange(2), target]
            return (p / (1 - p)).log()

        small = 1e-6
        slope = torch.stack(
            [(log_odds(code + small * e) - log_odds(code - small * e)) / (2 * small) for e in torch.eye(8)], 1
        )
        shifted = code - 0.5 * slope / slope.square().sum(1, keepdim=True)
        expected = (cae.decode(shifted, rest) - cae.decode(code, rest)).abs().mean(1)
    assert maps.shape == (2, 32, 32) and (maps >= 0).all()
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
    assert all(parameter.grad is None for parameter in cae.parameters())
