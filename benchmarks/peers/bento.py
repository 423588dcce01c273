"""The bare classifier in BentoML and ONNX Runtime: MODEL= THREADS= bentoml serve bento:Classify."""

import base64
import io
import os

import bentoml
import numpy as np
import onnxruntime
from PIL import Image


@bentoml.service(workers=1)
class Classify:
    """PNGs in base64 to labels' indices; it batches adaptively."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["THREADS"])
        model = os.environ["MODEL"]
        self.session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])

    @bentoml.api(batchable=True, max_batch_size=8)
    def classify(self, images: list[str]) -> list[int]:
        """Indices of labels."""
        pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
        pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        return self.session.run(None, {"image": pixels})[0].argmax(axis=1).tolist()
