"""What is wrong with a request or an image, in words for its sender."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

PAUSE = 1.0  # seconds between two similar images that a throttled client may send
RETRY = 1.0  # seconds after which a client that was put off may come again


class ImageError(Exception):
    """Why an image, or the request that should carry one, cannot be used.

    `code` is the HTTP status, `type` a short constant for programs, `message` says what is wrong
    and what to send instead; none of them quotes the request.
    """

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message

    def bare(self) -> "ImageError":
        """The same without its traceback, which holds the picture that it is about."""
        return ImageError(self.code, self.type, self.message)

    def to_dict(self) -> dict[str, Any]:
        """The contents for JSON."""
        return {"code": self.code, "type": self.type, "message": self.message}


BUSY = ImageError(
    503, "busy", f"the server has too much to do: send this request again in {RETRY:g} s"
)
DEAR_BUSY = ImageError(
    503,
    "busy",
    f"the server is busy, and this picture is large: scale it down, or send it in {RETRY:g} s",
)
TOO_SLOW = ImageError(
    413, "too_much_work", "the images of this request take too long to decode: send fewer"
)
TOO_SIMILAR = ImageError(
    429,
    "similar_query",
    f"the image is nearly one of a moment ago: wait {PAUSE:g} s before you send another like it",
)
TOO_LONG = ImageError(
    500, "reply_too_long", "the answer is too long to send: ask about fewer images at once"
)
ENGINE_FAILURE = ImageError(500, "engine_failure", "the model failed on this image: retry")
INTERNAL = ImageError(500, "internal_error", "the request could not be read: retry or report it")
# Seconds that a client should wait, by status.
RETRY_AFTER = {TOO_SIMILAR.code: PAUSE, BUSY.code: RETRY}


def unexpected(error: Exception) -> ImageError:
    """What a client hears of a fault of ours; the log gets its type and nothing of the request."""
    logger.error("Reading a request failed: %s", type(error).__name__)
    return INTERNAL
