"""Scores plus calibration to a p-value, p-value plus policy to a Verdict.

The p-value is the share of clean images at least as suspicious. It is split conformal (Vovk et al.,
2005): among images exchangeable with the calibration images, the share of clean ones flagged is at
most the false-alarm rate.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rampart.handlers.engine import Outputs
    from rampart.handlers.image import View

Floats = NDArray[np.float64]
TOP = 5


@dataclass(frozen=True)
class Calibration:
    """Quantile tables of D detectors and of their combination on clean images.

    `knots` (D, Q) are score quantiles on the tuning images and `surprise` (Q,) their -log tail
    probability; `combined` (n,) are the sorted combinations of the `images` calibration images.
    """

    detectors: tuple[str, ...]
    knots: Floats
    surprise: Floats
    combined: Floats
    images: int
    variant: str

    def __post_init__(self) -> None:
        shape = (len(self.detectors), len(self.surprise))
        rules = {
            "variant is full, guarded or lean": self.variant in ("full", "guarded", "lean"),
            "detectors are distinct, and there is one": 0 < len(set(self.detectors)) == shape[0],
            "knots has one row a detector, one column a surprise": self.knots.shape == shape,
            "knots, surprise and combined are finite": all(
                np.isfinite(table).all() for table in (self.knots, self.surprise, self.combined)
            ),
            "knots do not decrease": bool((np.diff(self.knots) >= 0).all()),
            "surprise starts at 0 and increases": len(self.surprise) > 1
            and self.surprise[0] == 0
            and bool((np.diff(self.surprise) > 0).all()),
            "combined is sorted": bool((np.diff(self.combined) >= 0).all()),
            "combined has one value an image": self.combined.shape == (self.images,)
            and self.images > 0,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError("not a calibration: it breaks the rule that " + "; ".join(broken))

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read calibration.json. Raises ValueError that names the file and what is malformed."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                detectors=tuple(str(name) for name in content["detectors"]),
                knots=np.array(content["knots"], dtype=np.float64),
                surprise=np.array(content["surprise"], dtype=np.float64),
                combined=np.array(content["combined"], dtype=np.float64),
                images=content["images"],
                variant=content["variant"],
            )
        except KeyError as error:
            raise ValueError(f"{path.name}: the entry {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name}: {error}") from error

    def check_rate(self, rate: float) -> None:
        """Raise ValueError for a false-alarm rate finer than the calibration images can tell."""
        if 0 < rate <= 1 / (self.images + 1):
            raise ValueError(
                f"{self.images} calibration images cannot support a false_alarm_rate of {rate}:"
                f" calibrate on at least {int(1 / rate)} images or choose a rate above"
                f" {1 / (self.images + 1):.3g}"
            )


def surprises(scores: NDArray[np.floating[Any]], calibration: Calibration) -> Floats:
    """How surprising each score is among clean images: scores (N, D) to float64 (N, D).

    Interpolated between the knots, 0 up to the first, linear beyond the last. A NaN score is
    infinitely surprising.
    """
    scores = np.asarray(scores, dtype=np.float64)  # (N, D)
    if scores.ndim != 2 or scores.shape[1] != len(calibration.detectors):
        raise ValueError(f"scores {scores.shape} do not fit {len(calibration.detectors)} detectors")
    scores = np.where(np.isnan(scores), np.inf, scores)
    knots, surprise = calibration.knots, calibration.surprise  # (D, Q), (Q,)
    columns = zip(scores.T, knots, strict=True)
    between = np.stack([np.interp(score, own, surprise) for score, own in columns], axis=1)
    first, middle, last = knots[:, 0], knots[:, knots.shape[1] // 2], knots[:, -1]
    slope = (surprise[-1] - surprise[len(surprise) // 2]) / np.maximum(last - middle, 1e-6)
    beyond = surprise[-1] + slope * (scores - last)
    inside = np.where(scores > last, beyond, between)
    return np.where(scores <= first, 0.0, inside)


def combine(scores: NDArray[np.floating[Any]], calibration: Calibration) -> Floats:
    """How suspicious each image is over all detectors, the sum of its surprises: scores (N, D) to
    float64 (N,).
    """
    total: Floats = surprises(scores, calibration).sum(axis=1)
    return total


def p_values(scores: NDArray[np.floating[Any]], calibration: Calibration) -> Floats:
    """Share of clean images at least as suspicious, from scores (N, D): float64 (N,) in (0, 1]."""
    suspicion = combine(scores, calibration)
    as_suspicious = calibration.images - np.searchsorted(calibration.combined, suspicion, "left")
    shares: Floats = (1 + as_suspicious) / (calibration.images + 1)
    return shares


def drift(p_values: Floats, counts: NDArray[np.integer[Any]] | None = None) -> float:
    """How far p-values (N,) are from uniform, in [0, 1]: the Kolmogorov-Smirnov distance.

    With `counts` (N,) they are distinct and in order, and each stands for so many images. For
    exchangeable images it stays below `drift_by_chance` in 95% of cases (Smirnov 1948). More means
    that traffic no longer resembles the calibration images.
    """
    if counts is None:
        p_values, counts = np.unique(p_values, return_counts=True)
    up_to, own = np.cumsum(counts) / counts.sum(), counts / counts.sum()
    return float(max((up_to - p_values).max(), (p_values - up_to + own).max()))


def drift_by_chance(images: int, calibrated_on: int) -> float:
    """The limit that `drift` of so many exchangeable images exceeds in 5% of cases."""
    return float(1.36 * (1 / images + 1 / calibrated_on) ** 0.5)


@dataclass(frozen=True)
class Policy:
    """The operator's rules: flag below `false_alarm_rate`, and what a detection does.

    `on_detection` is flag (the label stays), reject (no label), or shadow (only metrics show it).
    `detail` is full, or public for clients who must not see scores. Where purifier or detectors
    give no number, `on_failure` closed refuses an image without logits and detects one without
    scores; open takes the classifier's answer.
    """

    false_alarm_rate: float = 0.01
    on_detection: str = "flag"
    detail: str = "full"
    on_failure: str = "closed"

    def __post_init__(self) -> None:
        if not 0 <= self.false_alarm_rate < 1:
            raise ValueError("false_alarm_rate must be at least 0 (never flag) and below 1")
        if self.on_detection not in ("flag", "reject", "shadow"):
            raise ValueError("on_detection must be flag, reject or shadow")
        if self.detail not in ("full", "public"):
            raise ValueError("detail must be full or public")
        if self.on_failure not in ("closed", "open"):
            raise ValueError("on_failure must be closed or open")


class Suspicion(NamedTuple):
    """What a policy makes of the scores of one image."""

    p_value: float
    detected: bool
    failed: bool  # what cannot be judged
    decision: str
    detail: dict[str, Any]


def suspicions(
    scores: NDArray[np.float32],
    failed: NDArray[np.bool_],
    *,
    calibration: Calibration,
    policy: Policy,
) -> list[Suspicion]:
    """Suspicions of N images, from scores (N, D) and which of them `failed` (N,)."""
    p = p_values(scores, calibration)
    closed = policy.on_failure == "closed"
    p = p if closed else np.where(failed, 1.0, p)
    # What cannot be judged counts as detected, whatever the rate, unless `on_failure` is open.
    detected = (p < policy.false_alarm_rate) | (failed & closed)
    decisions = {False: "accept", True: policy.on_detection.replace("shadow", "accept")}
    # Python's own numbers: numpy's are slow one by one.
    rows = zip(*(column.tolist() for column in (p, detected, failed, scores)), strict=True)
    return [
        Suspicion(
            one,
            found,
            broken,
            decisions[found],
            {
                "p_value": rounded(one),
                "scores": dict(zip(calibration.detectors, map(rounded, own), strict=True)),
            },
        )
        for one, found, broken, own in rows
    ]


@dataclass(frozen=True)
class Verdict:
    """The answer for one image; `to_dict` gives its JSON form."""

    label: str | None
    index: int | None
    confidence: float | None
    decision: str
    top: tuple[dict[str, Any], ...]
    model: Mapping[str, str]
    detail: Mapping[str, Any] | None
    # For the operator only, whatever `detail` shows.
    p_value: float
    detected: bool
    failed: bool  # purifier or detectors gave no number
    explanation: Mapping[str, Any] | None = None  # where one was asked for

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Verdict":
        """A verdict out of its JSON form, as far as that tells it. Raises KeyError or TypeError.

        Without `detail` the p-value is NaN; what `shadow` detected does not show.
        """
        detail = content.get("detail")
        return cls(
            **{name: content[name] for name in ("label", "index", "confidence", "decision")},
            top=tuple(content["top"]),
            model=content["model"],
            detail=detail,
            p_value=math.nan if detail is None else detail["p_value"],
            detected=content["decision"] != "accept",
            failed=detail is not None and None in detail["scores"].values(),
            explanation=content.get("explanation"),
        )

    def rejected(self) -> "Verdict":
        """The same without a label."""
        return replace(self, label=None, index=None, confidence=None, top=(), decision="reject")

    def to_dict(self) -> dict[str, Any]:
        """The contents for JSON; without `detail` where the policy hides it."""
        return shown(vars(self))


def shown(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a verdict that a client sees."""
    hidden = {"p_value", "detected", "failed"}
    hidden |= {name for name in ("detail", "explanation") if verdict.get(name) is None}
    return {name: value for name, value in verdict.items() if name not in hidden}


@dataclass(frozen=True)
class Judge:
    """Turns the graph's outputs into verdicts, by one calibration and one policy.

    `labels` are the K class names, `model` the name and version that each verdict carries. Raises
    ValueError where the calibration cannot tell the policy's false-alarm rate.
    """

    labels: tuple[str, ...]
    calibration: Calibration
    policy: Policy
    model: Mapping[str, str]

    def __post_init__(self) -> None:
        self.calibration.check_rate(self.policy.false_alarm_rate)

    def verdicts(
        self,
        logits: NDArray[np.float32],
        raw_logits: NDArray[np.float32],
        scores: NDArray[np.float32],
    ) -> list[Verdict]:
        """Judge N images from logits (N, K), raw_logits (N, K) and scores (N, D).

        Raises ValueError where shapes do not fit or logits are not finite: such an image has no
        label that anybody should trust.
        """
        if logits.shape[1:] != (len(self.labels),):
            raise ValueError(f"logits {logits.shape} do not fit {len(self.labels)} labels")
        failed = ~np.isfinite(np.concatenate([logits, scores], axis=1)).all(axis=1)  # (N,)
        if self.policy.on_failure == "open":
            logits = np.where(failed[:, None], raw_logits, logits)
        if not (np.isfinite(logits).all() and np.isfinite(raw_logits).all()):
            raise ValueError("the graph gave logits that are not finite")
        confidences = _softmax(logits)  # (N, K)
        best = np.argsort(-confidences, axis=1, kind="stable")[:, :TOP]
        found = suspicions(scores, failed, calibration=self.calibration, policy=self.policy)
        # Python's own numbers: numpy's are slow one by one.
        first, shares, raw = (
            column.tolist() for column in (best, confidences, raw_logits.argmax(axis=1))
        )
        rows = zip(map(self._top, first, shares), raw, found, strict=True)
        return [self._verdict(*row) for row in rows]

    def of(self, outputs: "Outputs", views: "Sequence[View]") -> list[Verdict]:
        """Verdicts on what the graph gave of these views."""
        return self.verdicts(outputs.logits, outputs.raw_logits, outputs.scores)

    def _verdict(
        self, top: tuple[dict[str, Any], ...], raw_index: int, found: Suspicion
    ) -> Verdict:
        detail = found.detail | {
            "raw_label": self.labels[raw_index],
            "changed_by_purifier": raw_index != top[0]["index"],
        }
        verdict = Verdict(
            **top[0],
            decision=found.decision,
            top=top,
            model=self.model,
            detail=detail if self.policy.detail == "full" else None,
            p_value=found.p_value,
            detected=found.detected,
            failed=found.failed,
        )
        return verdict.rejected() if found.decision == "reject" else verdict

    def _top(self, best: list[int], confidences: list[float]) -> tuple[dict[str, Any], ...]:
        return tuple(
            {"label": self.labels[i], "index": i, "confidence": rounded(confidences[i])}
            for i in best
        )


def _softmax(logits: NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)  # (N, K)
    exponentials = np.exp(shifted)
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def rounded(value: float) -> float | None:
    """Six significant digits; JSON has no NaN or infinity, so these become null."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
