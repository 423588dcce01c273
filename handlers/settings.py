"""What an operator may set: the `rampart` entries of an archive's YAML, and the environment."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rampart.handlers.cores import available_cores
from rampart.handlers.image import MAX_PIXELS, default_pixels
from rampart.handlers.verdict import Policy

POLICY = {field.name for field in fields(Policy)}
QUERIES = {"query_store", "on_query_attack", "query_owner", "query_expiry", "query_capacity"}
SETTINGS = POLICY | QUERIES | {"threads", "device", "quarantine", "max_pixels", "min_confidence"}
# Settings that an environment variable overrides.
VARIABLES = {
    "RAMPART_DEVICE": "device",
    "RAMPART_QUARANTINE": "quarantine",
    "RAMPART_QUERY_STORE": "query_store",
    "RAMPART_THREADS": "threads",
}


def override(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """An archive's settings, overridden by those of the environment."""
    changes = {name: environment.get(variable) for variable, name in VARIABLES.items()}
    return {**settings, **{name: value for name, value in changes.items() if value}}


def read_policy(settings: Mapping[str, Any]) -> Policy:
    """The policy among the settings. Raises ValueError, for unknown names too."""
    unknown = set(settings) - SETTINGS
    if unknown:
        raise ValueError(f"unknown rampart setting {sorted(unknown)}: known are {sorted(SETTINGS)}")
    policy = {name: settings[name] for name in POLICY & settings.keys()}
    rate = float(policy.pop("false_alarm_rate", Policy.false_alarm_rate))
    return Policy(false_alarm_rate=rate, **policy)


def read_threads(settings: Mapping[str, Any], workers: int) -> int:
    """Threads of one of `workers`: the setting `threads`, or a share of the cores."""
    return int(settings.get("threads") or max(1, available_cores() // workers))


def read_max_pixels(settings: Mapping[str, Any], size: int) -> int:
    """How many pixels the images of a request may have: `max_pixels`, or the model's default.

    Raises ValueError.
    """
    pixels = settings.get("max_pixels", default_pixels(size))
    if type(pixels) is not int or not size * size <= pixels <= MAX_PIXELS:
        raise ValueError(
            f"max_pixels must be a whole number from {size * size}, which the model takes, to"
            f" {MAX_PIXELS}"
        )
    return pixels
