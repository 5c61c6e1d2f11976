"""`--precision bfloat16`: what networks take and give stays float32, and close to what they give without it."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, blob, command
from safetensors.torch import load_file
from torch import Tensor

from cae import classifiers, training
from cae.config import ClassifierConfig, ModelConfig
from cae.images import to_tensor
from cae.networks import CAE
from cae.peers.latent_shift import latent_shift
from cae.sanity import rank_correlation
from pipelines.cluster import place
from pipelines.measure import methods


def networks(bf16: bool) -> tuple[classifiers.BlackBox, CAE]:
    torch.manual_seed(0)
    blackbox = classifiers.build(ClassifierConfig(arch="resnet18", stem="small"), ("a", "b"))
    model = CAE(ModelConfig(image_size=32, width=16, blocks=1, channels=1))
    return tuple(place(net.eval().requires_grad_(False), "cpu", bf16) for net in (blackbox, model))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def x() -> Tensor:
    coarse = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")


def test_networks_answer_in_float32_nearly_what_they_do_without_it(x: Tensor) -> None:
    answers, gradients, inside = [], [], []
    for bf16 in (False, True):
        blackbox, cae = networks(bf16)
        layer = blackbox.net.get_submodule("layer1")
        layer.register_forward_hook(lambda module, given, output: inside.append(output.dtype))
        with torch.no_grad():
            codes = cae.encode(x)
            answers.append((blackbox(x), *codes, cae.decode(*codes)))
        point = x.clone().requires_grad_()
        gradients += torch.autograd.grad(blackbox(point)[:, 0].sum(), point)
    assert inside == [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(*gradients)
    for full, half in zip(*answers, strict=True):
        assert full.dtype == half.dtype == torch.float32
        assert 0 < (full - half).norm() < 0.05 * full.norm()


def test_a_copy_asks_its_own_weights(x: Tensor) -> None:
    blackbox, _ = networks(True)
    other = copy.deepcopy(blackbox)
    with torch.no_grad():
        for part in other.parameters():
            part.zero_()
        assert (other(x) == 0).all() and (blackbox(x) != 0).any()
        once = blackbox(x)
        assert torch.equal(place(blackbox, "cpu", True)(x), once)  # placed again


def test_no_shift_in_latent_shift_is_no_difference(x: Tensor) -> None:
    blackbox, cae = networks(True)
    target = torch.tensor([0, 1, 0, 1])
    assert (latent_shift(blackbox, x, target, cae=cae, step=0.0) == 0).all()
    assert (latent_shift(blackbox, x, target, cae=cae) > 0).any()


def test_maps_of_trained_networks_are_float32_and_nearly_the_same(finished: Path) -> None:
    rng = np.random.default_rng(3)
    images = to_tensor(np.stack([np.repeat(blob(rng, i % 2, 32)[..., None], 3, 2) for i in range(8)]))
    maps = []
    for bf16 in (False, True):
        blackbox = place(classifiers.load(str(finished / "classifier")), "cpu", bf16)
        cae = place(training.load(str(finished / "cae")), "cpu", bf16)
        made = methods(blackbox, cae, {"CAE": {"mode": "integrated"}}, full=False)
        source, code = blackbox.probabilities(images).argmax(1), cae.encode(images)[0]
        waypoints = code.roll(1, 0)[:, None]  # every other image's, of another class
        maps.append({name: method(images, source, 1 - source, waypoints, [1] * 8) for name, method in made.items()})
    for name, full in maps[0].items():
        half = maps[1][name]
        assert half.dtype == torch.float32 and half.shape == (8, 32, 32)
        ranked = full.flatten(1).std(1) > 0  # Grad-CAM may find nothing in an image: no ranking, the same map
        assert ranked.sum() >= 4 and torch.equal(full[~ranked], half[~ranked]), name
        assert rank_correlation(full[ranked], half[ranked]).mean() > 0.95, name


@pytest.mark.slow
def test_a_whole_run_in_bfloat16(finished: Path, archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    done = command("full.py", "--dataset", str(archive), "--run", str(folder), *TINY, "--precision", "bfloat16")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for model in ("classifier", "cae"):  # trained with it, to other weights
        mine, other = (load_file(run / model / "model.safetensors") for run in (folder, finished))
        assert mine.keys() == other.keys() and any(not torch.equal(mine[name], other[name]) for name in mine)
    codes = pd.concat([pd.read_parquet(path) for path in folder.glob("codes/**/*.parquet")])
    assert len(codes) and codes.reconstruction_error.notna().all()
    maps = pd.concat([pd.read_parquet(path) for path in folder.glob("explanations/**/*.parquet")])
    assert len(maps) and set(maps.status) <= {"flipped", "unflipped", "reconstruction_flipped"}
