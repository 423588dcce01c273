"""A pipeline where an engine is asked for: an export takes seconds, and its parity has tests."""

import numpy as np
import torch

from rampart.handlers.engine import Outputs
from rampart.hardening.model.pipeline import DefendedClassifier


class InTorch:
    """Answers as the graph of `pipeline` does."""

    device = "cpu"

    def __init__(self, pipeline: DefendedClassifier, threads: int = 1) -> None:
        size = pipeline.classifier.config.image_size
        self.pipeline, self.image_shape = pipeline, (size, size, 3)

    def run(self, images: np.ndarray) -> Outputs:
        with torch.no_grad():
            return Outputs(*(part.numpy() for part in self.pipeline(torch.from_numpy(images))))
