"""What is wrong with a request or an image, in words for its sender."""

import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

logger = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
PAUSE = 1.0  # seconds between two similar images that a throttled client may send
RETRY = 1.0  # seconds after which a client may try again


class ImageError(Exception):
    """Why an image, or the request that should carry one, cannot be used.

    `code` is the HTTP status, `type` a short constant for programs. `message` says what is wrong
    and what to send instead. None of them quotes the request.
    """

    def __init__(self, code: int, type: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.type = type
        self.message = message

    def bare(self) -> "ImageError":
        """A copy without the traceback, which would keep the picture in memory."""
        return ImageError(self.code, self.type, self.message)

    def to_dict(self) -> dict[str, Any]:
        """The contents for JSON."""
        return {"code": self.code, "type": self.type, "message": self.message}


BUSY = ImageError(503, "busy", f"the server is overloaded: send this request again in {RETRY:g} s")
DEAR_BUSY = ImageError(
    503,
    "busy",
    f"the server is busy and this picture is large: scale it down, or retry in {RETRY:g} s",
)
TOO_LATE = ImageError(
    504, "too_late", "the answer would arrive after the request's deadline: allow more time"
)
TOO_SLOW = ImageError(
    413, "too_much_work", "the images of this request take too long to decode: send fewer"
)
TOO_SIMILAR = ImageError(
    429,
    "similar_query",
    f"the image is nearly the same as a recent one: wait {PAUSE:g} s before you send a similar one",
)
TOO_LONG = ImageError(
    500, "reply_too_long", "the answer is too long to send: ask about fewer images at once"
)
ENGINE_FAILURE = ImageError(500, "engine_failure", "the model failed on this image: retry")
INTERNAL = ImageError(
    500, "internal_error", "the request could not be read: retry, or report the error"
)
# Seconds that a client should wait, by status.
RETRY_AFTER = {TOO_SIMILAR.code: PAUSE, BUSY.code: RETRY}


def outcome(
    task: Callable[Arguments, Result], *args: Arguments.args, **options: Arguments.kwargs
) -> Result | ImageError:
    """What `task` returns, or why it cannot: no request's fault may reach another request.

    Of a fault of ours the log gets the type, and nothing of the request.
    """
    try:
        return task(*args, **options)
    except ImageError as error:
        return error.bare()
    except Exception as error:
        logger.error("Reading a request failed: %s", type(error).__name__)
        return INTERNAL
