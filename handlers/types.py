"""What the parts of serving hand to each other. None of it belongs to a server."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rampart.handlers.errors import ImageError

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB
Answer = tuple[int, dict[str, Any]]  # HTTP status and JSON body, of an image or a request
Replier = Callable[[Sequence[Answer]], Answer]
# Where a request came in: our own route, KServe's two, or a question for the model's description.
Route = Literal["predictions", "v1", "v2", "describe"]


class Incoming(NamedTuple):
    """A request as any server can hand it over."""

    headers: Mapping[str, str]  # names in lower case
    parts: Sequence[bytes]  # the body, or the files of a form in their order
    route: Route = "predictions"
    refusal: ImageError | None = None  # what the server found wrong with it already


class Request(NamedTuple):
    """Images as they came, an ImageError for an unreadable one, and what makes of their answers
    the answer to the request."""

    images: Sequence[bytes | Pixels | ImageError]
    reply: Replier


class Reply(NamedTuple):
    """What goes back to the client, JSON; names of headers in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
