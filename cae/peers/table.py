"""The peers as they are measured: name -> maps, with the fills that a method has been told of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cae.classifiers import BlackBox
from cae.images import blur
from cae.metrics import FILL_BLUR, Fill
from cae.networks import CAE
from cae.peers.full_grad import full_grad, simple_full_grad, smooth_full_grad
from cae.peers.grad_cam import grad_cam
from cae.peers.integrated_gradients import integrated_gradients
from cae.peers.latent_shift import latent_shift
from cae.peers.lime import lime
from cae.peers.occlusion import occlusion
from cae.peers.rise import rise


@dataclass(frozen=True)
class Peer:
    """A method to compare with."""

    maps: Callable[[BlackBox, Tensor, Tensor], Tensor]
    """Classifier, images (B, 3, H, W), classes to explain (B,) -> maps (B, H, W)."""
    told: tuple[Fill, ...] = ()
    """Fills of the perturbation curves that the method fills its own queries with: an unfair advantage there."""
    gradient: bool = True
    """Whether it needs the classifier's gradient."""


def peers(cae: CAE | None = None, seed: int = 0) -> dict[str, Peer]:
    """Every peer by its name in tables, those that draw at random by `seed`; `latent shift` needs a decoder and is
    there only with a `cae`.

    Smooth FullGrad, LIME and RISE take 10, 500 and 1000 samples, fewer than their own defaults, so that a table of some
    hundred images takes minutes.
    """
    found = {
        "Grad-CAM": Peer(grad_cam),
        "FullGrad": Peer(full_grad),
        "Simple FullGrad": Peer(simple_full_grad),
        "Smooth FullGrad": Peer(lambda b, x, y: smooth_full_grad(b, x, y, samples=10, seed=seed)),
        "integrated gradients": Peer(integrated_gradients),
        "integrated gradients, blur": Peer(
            lambda b, x, y: integrated_gradients(b, x, y, baseline=blur(x, FILL_BLUR)), told=("blur",)
        ),
        "occlusion": Peer(occlusion, gradient=False),
        "LIME": Peer(lambda b, x, y: lime(b, x, y, samples=500, seed=seed), gradient=False),
        "RISE": Peer(lambda b, x, y: rise(b, x, y, masks=1000, seed=seed), gradient=False),
    }
    if cae is not None:
        found["latent shift"] = Peer(lambda b, x, y: latent_shift(b, x, y, cae=cae))
    return found
