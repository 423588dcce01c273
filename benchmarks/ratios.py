"""Ratios of two sides that took turns, with their lower bound: what benchmarks claim."""

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rampart.handlers.engine import cpu_features

# As the kernel spells them, on x86 and ARM.
FEATURES = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx_vnni", "avx512_vnni"},
    "bf16": {"avx512_bf16", "bf16"},
    "dot products": {"asimddp"},
}


def lower_bound(ratios: np.ndarray) -> float:
    """Lower 95% bound of the median over rounds, by bootstrap."""
    drawn = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    return float(np.quantile(np.median(drawn, axis=1), 0.05))


def claim(
    name: str, setting: str, rates: ArrayLike, peer: ArrayLike, target: float
) -> dict[str, Any]:
    """What `--json` lists: `rates` (R,) over those of `peer` (R,), round by round."""
    ratios = np.asarray(rates) / np.asarray(peer)
    ratio, low = float(np.median(ratios)), lower_bound(ratios)
    return {
        "claim": name,
        "setting": setting,
        "ratio": round(ratio, 3),
        "low": round(low, 3),
        "target": round(target, 3),
        "holds": low >= target,
    }


def in_words(made: dict[str, Any]) -> str:
    """One claim as a line."""
    return (
        f"     {made['claim']}: {made['ratio']:.2f}, at least {made['low']:.2f} (95%);"
        f" target {made['target']:.2f}"
    )


def machine() -> str:
    """Processor, cores and the features that decide about speed."""
    known = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    name = known[0] if known else platform.machine()
    features = cpu_features()
    has = [title for title, mine in FEATURES.items() if features & mine] or ["no AVX2"]
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {', '.join(has)}"


def write(path: Path, claims: list[dict[str, Any]]) -> None:
    """The file that `--json` names."""
    content = {"claims": claims, "machine": machine(), "command": shlex.join(sys.argv)}
    path.write_text(json.dumps(content, indent=1) + "\n")
