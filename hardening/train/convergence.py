"""The convergence stride: how far the loss may move from one epoch to the next.

Source: Zhao et al. 2023, "Fast adversarial training with smooth convergence" (ICCV), where the
constraint is called ConvergeSmooth; here in its form for batches, on the loss of clean images. A
robustness that collapses within an epoch shows first as a jump of the loss.
"""

import torch
from torch import Tensor, nn

from rampart.hardening.train import distributed

# Bounds of the stride; the upper one is the paper's for CIFAR-10, at 1.5 times the lower one.
LEAST, MOST = 0.02, 0.03


class Convergence(nn.Module):
    """Mean losses of the epochs of a run, which go on with its state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("before", torch.full((2,), torch.nan))  # last epoch, the one before
        self.register_buffer("so_far", torch.zeros(2))  # sum and count of this epoch
        self.register_buffer("epoch", torch.tensor(0))
        self.before: Tensor
        self.so_far: Tensor
        self.epoch: Tensor
        self.latest: Tensor | None = None

    def note(self, epoch: int) -> None:
        """Count the latest loss as one of `epoch`."""
        if self.latest is None:
            return
        if epoch != int(self.epoch):
            mean = self.so_far[0] / self.so_far[1]
            self.before = torch.stack([mean, self.before[0]])
            self.so_far = torch.zeros_like(self.so_far)
            self.epoch = torch.full_like(self.epoch, epoch)
        self.so_far = self.so_far + torch.stack([self.latest, torch.ones_like(self.latest)])
        self.latest = None


def outlying(convergence: Convergence, loss: Tensor) -> Tensor:
    """1 where a batch's `loss` lies above the last epoch's mean by more than the stride, -1 where
    it lies as far below, else 0. The first two epochs, from which the stride follows, give 0.
    """
    everywhere = loss.detach().float().clone()
    distributed.average([everywhere])  # or processes would decide differently
    convergence.latest = everywhere
    last, earlier = convergence.before.unbind()
    gap, stride = everywhere - last, (last - earlier).abs().clamp(LEAST, MOST)
    return torch.where(gap.abs() > stride, gap.sign(), torch.zeros_like(gap))
