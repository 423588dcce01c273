"""The bare classifier in LitServe: lit.py eager|onnx MODEL PORT THREADS."""

import base64
import io
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from PIL import Image

KIND, MODEL, PORT, THREADS = sys.argv[1:]


class Classify(litserve.LitAPI):
    """PNG in base64 to a label's index; up to eight requests a run."""

    def setup(self, device: str) -> None:
        """Load the model in torch, or in ONNX Runtime."""
        if KIND == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = int(THREADS)
            session = onnxruntime.InferenceSession(MODEL, options, ["CPUExecutionProvider"])
            self.run = lambda x: session.run(None, {"image": x})[0]
            return
        import torch

        from rampart.hardening.model.pipeline import load_classifier

        torch.set_num_threads(int(THREADS))
        net = load_classifier(Path(MODEL)).eval()

        def run(x: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return net(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255).numpy()

        self.run = run

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        """Base64 to pixels (H, W, 3)."""
        data = base64.b64decode(request["image"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """(N, H, W, 3)."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Logits (N, K)."""
        return self.run(x)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """Logits of each."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        """JSON."""
        return {"index": int(output.argmax())}


if __name__ == "__main__":
    api = Classify(max_batch_size=8, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(port=int(PORT), generate_client_file=False, log_level="warning")
