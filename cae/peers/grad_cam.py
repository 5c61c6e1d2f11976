"""Grad-CAM: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017.
"""

from __future__ import annotations

import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from cae.classifiers import BlackBox


def grad_cam(classifier: nn.Module, images: Tensor, target: Tensor, layer: nn.Module | None = None) -> Tensor:
    """ReLU(sum_k alpha_k A_k), (B, H, W) and not negative, for the logit of each image's `target` class (B,).

    A_k (h, w) is channel k of what `layer`, usually the last convolutional one and by default the one that a
    `BlackBox` names, gives for images (B, 3, H, W) in [-1, 1]; alpha_k is the mean over (h, w) of the logit's gradient
    by A_k. Bilinear from (h, w) to (H, W). The classifier must be in evaluation mode. Raises ValueError if `layer` is
    not in it, gives no (B, K, h, w), or is missing.
    """
    if layer is None:
        if not isinstance(classifier, BlackBox) or not classifier.cam_layer:
            raise ValueError("the classifier names no layer for Grad-CAM: its card's cam_layer may")
        layer = classifier.net.get_submodule(classifier.cam_layer)
    if all(module is not layer for module in classifier.modules()):
        raise ValueError(f"layer {type(layer).__name__} is not a module of the classifier: pass one of its own")
    cam = LayerGradCam(classifier, layer).attribute(images, target, relu_attributions=True)
    if not isinstance(cam, Tensor) or cam.ndim != 4:
        raise ValueError(f"layer {type(layer).__name__} gives no (B, K, h, w) activations: choose a convolutional one")
    return F.interpolate(cam.detach(), size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
