"""A pipeline in fp16 between float32 pixels, logits and scores: half the size, for GPUs."""

import copy

from torch import Tensor, nn

from rampart.hardening.model.pipeline import DefendedClassifier


class Half(nn.Module):
    """A module in half precision between float32 borders."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner.half()

    def forward(self, x: Tensor) -> Tensor:
        """Whatever `inner` makes of x, both float32."""
        out: Tensor = self.inner(x.half()).float()
        return out


def halve(pipeline: DefendedClassifier) -> DefendedClassifier:
    """A copy of `pipeline` that computes in fp16 inside."""
    made = copy.deepcopy(pipeline)
    made.classifier.backbone = Half(made.classifier.backbone)
    if made.purifier is not None:
        made.purifier.residual = Half(made.purifier.residual)
    return made
