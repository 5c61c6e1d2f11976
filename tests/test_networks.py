"""The networks against the numbers of the authors' own, and against slow definitions of their parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cae.config import PRESETS, LossWeights, ModelConfig
from cae.losses import GeneratorObjective
from cae.networks import CAE, Discriminator, from_authors

REFERENCE = Path(__file__).with_name("reference")  # what the authors' network makes of two images of noise
TINY = ModelConfig(
    image_size=32, stem="unshuffle", width=8, blocks=2, mlp_width=6, up_kernel=3, out_kernel=3, disc_width=4,
    disc_blocks=1, dropout=0.0,
)  # fmt: skip


def images(batch: int, height: int = 32, width: int | None = None, seed: int = 0) -> Tensor:
    shape = (batch, 3, height, width or height)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny(**changes: Any) -> CAE:
    torch.manual_seed(0)
    return CAE(replace(TINY, **changes))


def gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# --- the authors' network


def reference_weights(names: dict[str, list[int]]) -> dict[str, Tensor]:
    """The weights of the reference case, drawn as its description says."""
    state = {}
    for j, (name, shape) in enumerate(names.items()):
        z = np.random.RandomState(1000 + j).standard_normal(shape).astype(np.float32)
        if "running_" in name:  # dead buffers: of no effect whatever they hold
            z[:] = np.nan
        elif name.endswith("gamma"):
            z = 1 + 0.05 * z
        elif z.ndim == 1:
            z = 0.05 * z
        else:
            z = z * 1.4 / np.sqrt(z[0].size)
        state[name] = torch.from_numpy(z.astype(np.float32))
    return state


class Case(NamedTuple):
    cae: CAE
    discriminator: Discriminator
    arrays: dict[str, Tensor]
    losses: dict[str, float]
    gradient_norms: dict[str, float]
    generator_state: dict[str, Tensor]
    discriminator_state: dict[str, Tensor]


@pytest.fixture(scope="module")
def case() -> Case:
    names = json.loads((REFERENCE / "authors_state_dict_shapes.json").read_text())
    generator, discriminator = (reference_weights(names[player]) for player in ("generator", "discriminator"))
    cae, critic = from_authors(generator, discriminator)
    assert critic is not None
    with np.load(REFERENCE / "authors_network_case.npz") as file:
        losses, norms = (json.loads(str(file[name])) for name in ("losses", "gradient_norms"))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if file[name].dtype == np.float32}
    return Case(cae.eval(), critic.eval(), arrays, losses, norms, generator, discriminator)


def test_outputs_are_those_of_the_authors_network(case: Case) -> None:
    with torch.no_grad():
        c_a, s_a = case.cae.encode(case.arrays["x_a"])
        c_b, _ = case.cae.encode(case.arrays["x_b"])
        ours = {
            "class_code_a": c_a,
            "class_code_b": c_b,
            "individual_code_a_mean": s_a.mean((2, 3)),
            "individual_code_a_std": s_a.std((2, 3)),
            "reconstruction_a": case.cae.decode(c_a, s_a),
            "swap_a_individual_b_class": case.cae.decode(c_b, s_a),
            "discriminator_logits_a": case.discriminator(case.arrays["x_a"]),
        }
    assert ours.keys() == case.arrays.keys() - {"x_a", "x_b"}
    for name, value in ours.items():
        torch.testing.assert_close(value, case.arrays[name], rtol=0, atol=1e-4, msg=name)


def test_losses_and_gradients_are_those_of_the_authors_network(case: Case) -> None:
    # In double precision: with 32 bits the signs of L1 and ReLU near 0 move these norms by 1e-3 from run to run.
    cae, discriminator = copy.deepcopy(case.cae).double(), copy.deepcopy(case.discriminator).double()
    x = torch.cat([case.arrays["x_a"], case.arrays["x_b"]]).double()
    terms, _ = GeneratorObjective(cae, discriminator, LossWeights())(x, torch.tensor([0, 1]))
    terms["loss_g"].backward()

    # Their `c` is the content, our individual code s; their `s` the style, our class code c. Ours are means over A, B.
    for ours, theirs in [
        ("recon_x", "recon_x"),
        ("recon_c", "recon_s"),
        ("recon_s", "recon_c"),
        ("cyc_x", "cycrecon_x"),
    ]:
        expected = (case.losses[f"loss_gen_{theirs}_a"] + case.losses[f"loss_gen_{theirs}_b"]) / 2
        assert terms[ours].item() == pytest.approx(expected, rel=1e-4), ours
    assert terms["loss_g"].item() == pytest.approx(case.losses["loss_gen_total"], rel=1e-4)

    # A parameter of ours is known by the values it was given.
    ours_by_values = {p.flatten()[:3].float(): p for p in cae.parameters()}
    assert len(ours_by_values) == len(case.gradient_norms)
    for name, expected in case.gradient_norms.items():
        start = case.generator_state[name].flatten()[:3]
        [parameter] = [p for values, p in ours_by_values.items() if torch.equal(values, start)]
        assert parameter.grad is not None
        # A bias before a norm has no effect: its gradient is rounding, 1e-5 at most in the reference.
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-4), name


def test_the_authors_class_count_is_read_and_other_weights_are_refused(case: Case) -> None:
    state = case.discriminator_state
    seven = state | {"fc.3.weight": torch.zeros(7, 256), "fc.3.bias": torch.zeros(7)}
    _, critic = from_authors(case.generator_state, seven)
    assert critic is not None and critic(images(1)).shape == (1, 7)
    assert from_authors(case.generator_state)[1] is None
    less = {name: tensor for name, tensor in case.generator_state.items() if not name.startswith("mlp.model.1")}
    for generator, discriminator in [(less, None), (case.generator_state, {"ab": state}), ({"ab": less}, None)]:
        with pytest.raises(ValueError, match="authors") as error:
            from_authors(generator, discriminator)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


# --- shapes


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_preset_builds_and_keeps_shapes(preset: str, channels: int) -> None:
    config = replace(PRESETS[preset].model, channels=channels)  # type: ignore[index]
    with torch.no_grad(), torch.device("meta"):
        cae, discriminator = CAE(config), Discriminator(config, 4)
        c, s = cae.encode(torch.empty(2, 3, config.image_size, config.image_size))
        assert c.shape == (2, 8) and s.shape == (2, config.width, config.image_size // 4, config.image_size // 4)
        x = cae.decode(c, s)
        assert x.shape == (2, 3, config.image_size, config.image_size)
        assert discriminator(x).shape == (2, 6)


@pytest.mark.parametrize(("stem", "class_encoder"), [("conv", "plain"), ("unshuffle", "residual")])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 64), (36, 36), (44, 100)])
def test_any_multiple_of_four_from_32_on_works(
    stem: str, class_encoder: str, channels: int, height: int, width: int
) -> None:
    cae = tiny(stem=stem, class_encoder=class_encoder, channels=channels, image_size=height)
    c, s = cae.encode(images(2, height, width))
    assert c.shape == (2, 8) and s.shape == (2, 8, height // 4, width // 4)
    x = cae(images(2, height, width))
    assert x.shape == (2, 3, height, width) and x.abs().max() <= 1
    assert Discriminator(cae.config, 3)(x).shape == (2, 5)


@pytest.mark.parametrize("size", [0, 16, 28, 33, 66])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"image size {size} is no multiple of 4") as error:
        tiny(image_size=size)
    assert "\n" not in str(error.value)


def test_grey_networks_see_and_make_grey() -> None:
    cae, x = tiny(channels=1), images(2)
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    y = cae(x)
    torch.testing.assert_close(y, cae(grey))
    assert torch.equal(y[:, :1].expand(-1, 3, -1, -1), y)


def test_individual_code_forgets_brightness_and_the_class_code_does_not() -> None:
    cae, x = tiny(stem="conv"), images(1) * 0.4
    (c, s), (c_bright, s_bright) = cae.encode(x), cae.encode(x + 0.5)
    torch.testing.assert_close(s, s_bright, rtol=0, atol=1e-4)
    assert (c - c_bright).abs().max() > 1e-2


def test_first_weights() -> None:
    cae, discriminator = CAE(replace(TINY, width=64, mlp_width=64)), Discriminator(replace(TINY, disc_width=16), 2)
    for name, p in [*cae.named_parameters(), *discriminator.named_parameters()]:
        if name.endswith("bias"):
            assert not p.any(), name
    last = cae.decoder.mlp[-1]
    assert isinstance(last, nn.Linear)
    assert last.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)  # Kaiming, 64 inputs
    for module in discriminator.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)


# --- AdaIN parameters are arguments


def test_a_decode_inside_another_changes_neither() -> None:
    cae = tiny()
    (c1, s1), (c2, s2) = cae.encode(images(2, seed=1)), cae.encode(images(2, seed=2))
    alone1, alone2 = cae.decode(c1, s1), cae.decode(c2, s2)
    inside: list[Tensor] = []

    def decode_the_other(*_: Any) -> None:
        hook.remove()
        inside.append(cae.decode(c2, s2))

    hook = cae.decoder.blocks[0].register_forward_hook(decode_the_other)
    assert torch.equal(cae.decode(c1, s1), alone1)
    assert torch.equal(inside[0], alone2)
    assert not torch.allclose(alone1, alone2, atol=1e-2)


def test_gradients_go_to_the_decode_they_belong_to() -> None:
    cae = tiny()
    codes = [tuple(t.detach().requires_grad_() for t in cae.encode(images(2, seed=i))) for i in (1, 2)]
    cae.decode(*codes[0]).sum().backward()
    alone = gradients(cae.decoder)
    cae.zero_grad()
    first, second = (cae.decode(*pair) for pair in codes)
    first.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(alone, gradients(cae.decoder), strict=True))
    assert codes[1][0].grad is None and not second.isnan().any()


@pytest.mark.parametrize("make", [tiny, lambda: Discriminator(TINY, 2)])
def test_a_copy_after_a_backward_is_the_same_and_apart(make: Callable[[], nn.Module]) -> None:
    module, x = make(), images(2)
    module(x).square().sum().backward()
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not torch.equal(twin(x), module(x))


@pytest.mark.parametrize(("stem", "class_encoder"), [("conv", "plain"), ("unshuffle", "residual")])
def test_a_batch_is_its_images_one_by_one(stem: str, class_encoder: str) -> None:
    cae, x = tiny(stem=stem, class_encoder=class_encoder), images(5)
    discriminator = Discriminator(cae.config, 3)
    c, s = cae.encode(x)
    batch = [c, s, cae.decode(c, s), cae.decode(c.flip(0), s), discriminator(x)]
    for i in range(len(x)):
        c1, s1 = cae.encode(x[i : i + 1])
        swap = cae.decode(c[4 - i : 5 - i], s1)
        for whole, single in zip(batch, [c1, s1, cae.decode(c1, s1), swap, discriminator(x[i : i + 1])], strict=True):
            torch.testing.assert_close(whole[i : i + 1], single, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_in_evaluation() -> None:
    discriminator, x = Discriminator(replace(TINY, dropout=0.4), 2), images(2)
    for p in discriminator.parameters():
        nn.init.normal_(p, std=0.3)
    assert not torch.equal(discriminator(x), discriminator(x))
    discriminator.eval()
    assert torch.equal(discriminator(x), discriminator(x))
    assert F.softmax(discriminator(x)[:, 2:], 1).shape == (2, 2)
