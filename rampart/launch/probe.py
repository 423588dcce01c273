"""Whether a served model is alive, by its metrics.

TorchServe's /ping wants a token where tokens are on, and says nothing of a worker that hangs. The
handler writes the time into a metric while its process runs; a probe looks how old that is.
TorchServe shows metrics without a token, the own server where it has no tokens.
"""

import math
import re
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from rampart.launch.asking import authorization, opener

HEARTBEAT = re.compile(r'^rampart_heartbeat_seconds\{(?:.*,)?model="([^"]+)".*\} (\S+)$', re.M)


def probe(
    metrics: str,
    within: float,
    model: str | None = None,
    *,
    tokens: Path | None = None,
    certificate: Path | None = None,
) -> dict[str, float]:
    """Seconds since the last sign of life of `model`, or of each, by name, none above `within`.

    `metrics` is the address, http://127.0.0.1:8082/metrics; `tokens` and `certificate` are files of
    our own server, where it has them. TorchServe keeps the figures of a model that was removed, so
    it counts as silent. Raises RuntimeError where one is silent, or where there is none.
    """
    text = _figures(metrics, tokens, certificate)
    now = time.time()
    ages: dict[str, float] = {}
    for name, value in HEARTBEAT.findall(text):  # TorchServe has one of each worker
        ages[name] = min(now - float(value), ages.get(name, math.inf))
    if model:
        ages = {name: age for name, age in ages.items() if name == model}
    if not ages:
        what = f"model {model}" if model else "Rampart model"
        raise RuntimeError(f"{metrics} shows no {what}: none is loaded")
    for name, age in ages.items():
        if age > within:
            raise RuntimeError(
                f"{name} has been silent for {age:.0f} s; if you removed it, choose another with"
                " --name"
            )
    return ages


def _figures(metrics: str, tokens: Path | None, certificate: Path | None) -> str:
    """What stands at the address. Raises RuntimeError."""
    request = urllib.request.Request(metrics, headers=authorization(tokens) if tokens else {})
    try:
        with opener(certificate).open(request, timeout=5) as answer:
            text: str = answer.read().decode(errors="replace")
            return text
    except (OSError, HTTPException) as error:
        known = isinstance(error, OSError)  # the other kind quotes what came
        reason = getattr(error, "reason", error) if known else "this is no HTTP"
        raise RuntimeError(
            f"no metrics at {metrics} ({reason}): start a server, or pass its address as --metrics"
        ) from error
