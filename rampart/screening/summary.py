"""What a run found, in figures and in words."""

import math
from typing import Any

import numpy as np

from rampart.handlers.service import Service
from rampart.handlers.verdict import drift, drift_by_chance
from rampart.hardening.model.promise import flagged_ranks
from rampart.screening.parts import Tally
from rampart.screening.run import Outcome

FILE = "summary.json"
Z = 1.959964  # of 95%


def wilson(held: int, n: int) -> tuple[float, float]:
    """95% interval of a share of `n` (Wilson 1927); hardening's own wants SciPy."""
    centre, square = held + Z * Z / 2, n + Z * Z
    half = Z * math.sqrt(held * (n - held) / n + Z * Z / 4)
    return max(0.0, (centre - half) / square), min(1.0, (centre + half) / square)


def spread(rate: float, images: int) -> tuple[float, float]:
    """Middle 95% of the true false-alarm rate of a calibration on so many images, by simulation."""
    if not (ranks := flagged_ranks(rate, images)):
        return 0.0, 0.0
    drawn = np.random.default_rng(0).beta(ranks, images + 1 - ranks, 100_000)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def figures(service: Service, outcome: Outcome) -> dict[str, Any]:
    """All counts, and shares with their intervals, for JSON."""
    tally = outcome.tally
    content: dict[str, Any] = {
        "images": tally.images,
        "shards": outcome.shards,
        "failed_shards": outcome.failed,
        "decisions": dict(tally.decisions),
        "labels": dict(tally.labels.most_common()),
        "errors": dict(tally.errors.most_common()),
        "images_a_second": round(outcome.screened / outcome.seconds, 1)
        if outcome.screened
        else None,
    }
    if tally.judged:
        content["flagged"] = _flagged(service, tally)
    if tally.ranks:
        content["drift"] = _drift(service.calibration.images, tally)
    return content


def _flagged(service: Service, tally: Tally) -> dict[str, Any]:
    rate, ranked = service.policy.false_alarm_rate, service.calibration.images
    return {
        "value": tally.detected / tally.judged,
        "n": tally.judged,
        "interval": wilson(tally.detected, tally.judged),
        "promised": rate,
        "calibration_images": ranked,
        "promised_spread": spread(rate, ranked),
    }


def _drift(ranked: int, tally: Tally) -> dict[str, float]:
    ranks = sorted(tally.ranks)
    counts = np.array([tally.ranks[rank] for rank in ranks])
    value = drift(np.array(ranks) / (ranked + 1), counts)
    return {"value": value, "limit": drift_by_chance(int(counts.sum()), ranked)}


def in_words(content: dict[str, Any]) -> list[str]:
    """The figures as lines."""
    counts = ", ".join(f"{name} {n:,}" for name, n in content["decisions"].items())
    lines = [f"{content['images']:,} pictures in {content['shards']:,} shards: {counts or 'none'}"]
    if errors := content["errors"]:
        named = ", ".join(f"{name} {n:,}" for name, n in errors.items())
        lines.append(f"{sum(errors.values()):,} without a verdict (column `error`): {named}")
    if flagged := content.get("flagged"):
        lines.append(_flagged_in_words(flagged))
    if moved := content.get("drift"):
        lines.append(_drift_in_words(moved))
    if near := content.get("near_duplicates"):
        lines.append(
            f"{near['near']:,} nearly equal an earlier one, {near['identical']:,} equal one exactly"
        )
    if content["images_a_second"]:
        lines.append(f"{content['images_a_second']:,.0f} images/s")
    if content.get("files_left_out"):
        lines.append(f"{content['files_left_out']:,} files skipped: not named like pictures")
    return lines


def _flagged_in_words(flagged: dict[str, Any]) -> str:
    (low, high), (least, most) = flagged["interval"], flagged["promised_spread"]
    text = (
        f"flagged {flagged['value']:.2%} ({low:.2%} to {high:.2%}, n = {flagged['n']:,}); promised"
        f" {flagged['promised']:.1%} of clean pictures, {least:.2%} to {most:.2%} after a"
        f" calibration on {flagged['calibration_images']:,} images"
    )
    if low > most:
        text += ". These are more: attacked pictures, or unlike the calibration images"
    return text


def _drift_in_words(moved: dict[str, float]) -> str:
    text = f"drift {moved['value']:.3f}, by chance up to {moved['limit']:.3f}"
    if moved["value"] > moved["limit"]:
        text += ": unlike the calibration images; recalibrate with `rampart calibrate --archive`"
    return text
