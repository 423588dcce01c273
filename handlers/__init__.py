"""The serving half of Rampart: from request bytes to a verdict, without torch."""

import os

# Since 1.29 ONNX Runtime reports models and their hashes to its maker unless told not to, and it
# must be told before it is imported. Nothing leaves this endpoint unasked.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
