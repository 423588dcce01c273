"""A client of a service in this very process, where no server is needed."""

import json
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from rampart.handlers.service import Service
from rampart.handlers.types import Incoming, Reply, Route


def png(image: np.ndarray) -> bytes:
    out = BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def post(service: Service, *parts: bytes, route: Route = "predictions", **headers: str) -> Reply:
    """The reply to one request; `x_request_id="7"` is a header."""
    known = {name.replace("_", "-"): value for name, value in headers.items()}
    (reply,) = service.answer([Incoming(known, parts, route)])
    return reply


def ask(service: Service, *parts: bytes, **options: Any) -> dict[str, Any]:
    """The JSON of one reply."""
    content: dict[str, Any] = json.loads(post(service, *parts, **options).body)
    return content
