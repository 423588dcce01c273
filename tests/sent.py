"""A request over HTTP, and what a client makes of its answer."""

from typing import Any

import requests

Sent = tuple[str, bytes, dict[str, str]]  # path, body, headers


def ask(root: str, sent: Sent) -> tuple[int, Any, dict[str, str | None]]:
    """Status, content and the headers that count."""
    path, body, headers = sent
    answer = requests.post(root + path, body, headers=headers, timeout=60)
    kept = ("content-type", "retry-after", "traceparent")
    return answer.status_code, answer.json(), {name: answer.headers.get(name) for name in kept}
