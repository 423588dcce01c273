"""Pictures of a store that are nearly the same, as attacks by queries leave them.

Fingerprints and what counts as near are those of the watch for query attacks.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from rampart.handlers.queries.watch import CANDIDATES, INDEXED, PROBED, SHARED

FILE = "near-duplicates.parquet"
NAMES = ["shard", "name", "sha256"]


class Seen(NamedTuple):
    """An earlier picture."""

    row: dict[str, Any]
    digests: frozenset[int]


def find(parts: Path) -> Iterator[dict[str, Any]]:
    """Each picture that is near an earlier one, with that one and how much they share.

    It keeps some 5 KB in memory for each picture.
    """
    index: dict[int, list[Seen]] = defaultdict(list)
    for file in sorted(parts.glob("*.parquet")):
        for batch in parquet.ParquetFile(file).iter_batches(columns=[*NAMES, "fingerprint"]):
            for row in batch.to_pylist():
                digests = row.pop("fingerprint")
                if digests is None or len(digests) <= SHARED:
                    continue
                seen = Seen(row, frozenset(digests))
                nearest, shared = _nearest(seen, index, digests)
                if nearest is not None:
                    yield _pair(row, nearest.row, shared)
                    continue
                for digest in digests[:INDEXED]:
                    index[digest].append(seen)


def _nearest(
    picture: Seen, index: dict[int, list[Seen]], digests: list[int]
) -> tuple[Seen | None, int]:
    """The earlier picture that shares most with one, and how much that is, where it is enough."""
    found = {
        id(seen): seen
        for digest in digests[:PROBED]
        for seen in index.get(digest, ())[-CANDIDATES:]
    }
    best = max(found.values(), key=lambda s: len(s.digests & picture.digests), default=None)
    shared = len(best.digests & picture.digests) if best else 0
    return (best, shared) if shared > SHARED else (None, shared)


def _pair(row: dict[str, Any], other: dict[str, Any], shared: int) -> dict[str, Any]:
    same = {"identical": row["sha256"] == other["sha256"], "shared": shared}
    near = {"near_shard": other["shard"], "near_name": other["name"]}
    return {"shard": row["shard"], "name": row["name"]} | near | same


def write(parts: Path, out: Path) -> dict[str, int]:
    """Write the table; how many pictures are near an earlier one, and how many are that file."""
    pairs = list(find(parts))
    columns = [
        ("shard", pa.string()), ("name", pa.string()), ("near_shard", pa.string()),
        ("near_name", pa.string()), ("identical", pa.bool_()), ("shared", pa.int32()),
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(pairs, schema=pa.schema(columns)), out / FILE)
    return {"near": len(pairs), "identical": sum(pair["identical"] for pair in pairs)}
