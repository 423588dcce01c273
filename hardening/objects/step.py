"""A small step towards objects, to see how readily scores rise."""

import torch
from torch import Tensor

from rampart.hardening.objects.detector import ObjectDetector


def step_towards(detector: ObjectDetector, x: Tensor, radius: float) -> Tensor:
    """x (N, 3, S, S) after one signed step of `radius`, in [0, 1], that raises how many objects one
    would expect in it: the sum, over all anchors, of the probability of any.

    The step is a constant of what follows, and gradients pass it where it leaves [0, 1] too (BPDA,
    Athalye et al. 2018, section 4.1): so attackers see all that it shows.
    """
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        background = detector.dense(start).logits.softmax(2)[:, :, 0]  # (N, A)
        (slope,) = torch.autograd.grad((1 - background).sum(), start)
    near = (x + radius * slope.sign()).clamp(0, 1)
    return x + (near - x).detach()
