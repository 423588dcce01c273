"""The short form of every benchmark that makes claims, and one table of what holds.

    make bench

About 15 minutes on 2 cores that do nothing else. The long forms, each a command of its own, give
narrower bounds; their results stand in benchmarks/README.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHORT: Mapping[str, Sequence[str]] = {
    "engines": ("--rounds", "9"),
    "defences": ("--rounds", "5", "--seconds", "0.5"),
    "training": ("--rounds", "3", "--steps", "1"),
    "queries": ("cost", "--rounds", "3", "--seconds", "1"),
    "endpoint": ("--rounds", "3", "--seconds", "1"),
}


def main() -> int:
    """Run those asked for; the exit code says whether all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help=f"of {', '.join(SHORT)}; default all")
    wanted = parser.parse_args().only or list(SHORT)
    if unknown := set(wanted) - set(SHORT):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    lines, failed = [], list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            began, out = time.monotonic(), Path(scratch) / f"{name}.json"
            command = [sys.executable, str(HERE / f"{name}.py"), *SHORT[name], "--json", str(out)]
            print(f"{name}.py {' '.join(SHORT[name])} ...", flush=True)
            done = subprocess.run(command, capture_output=True, text=True)
            if not out.is_file():
                failed.append(f"{name}.py ended without figures: {done.stderr.strip()[-500:]}")
                continue
            content = json.loads(out.read_text())
            lines += rows(name, content["claims"])
            print(f"  {time.monotonic() - began:.0f} s, {content['machine']}", flush=True)
    print("\n".join([*table(lines), *failed]))
    return bool(failed)


def rows(name: str, claims: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The claims of one benchmark as rows of the table."""
    return [
        (
            name,
            claim["claim"],
            claim["setting"],
            f"{claim['target']:.2f}",
            f"{claim['ratio']:.2f}",
            f"{claim['low']:.2f}",
            "holds" if claim["holds"] else "does NOT hold",
        )
        for claim in claims
    ]


def table(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """All claims, aligned, and how many hold."""
    head = ("benchmark", "claim", "setting", "target", "ratio", "at least (95%)", "")
    every = [head, *lines]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    out = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in every]
    held = sum(line[-1] == "holds" for line in lines)
    return [*out, f"{held} of {len(lines)} claims hold"]


if __name__ == "__main__":
    sys.exit(main())
