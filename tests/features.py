"""The table of docs/servers.md: which server has what, by the tests that ran against it.

A test says what it shows by `feature(NAME, SERVER, ...)`; `make servers` runs those and writes.
"""

from collections import defaultdict
from pathlib import Path

import pytest

SERVERS = ("TorchServe", "Rampart", "Triton", "KServe", "Ray Serve")
FEATURES = (
    "Same verdicts as every other server",
    "Raw pictures and forms",
    "KServe v1",
    "Open Inference v2, JSON",
    "Open Inference v2, binary tensors",
    "Open Inference v2, gRPC",
    "Open Inference v2, gRPC streams",
    "A bad picture does not affect the others",
    "Compressed bodies",
    "Batches across clients",
    "Protocol health and metadata",
    "Client deadlines",
    "Overload is refused at once with 503 and Retry-After",
    "Tokens",
    "Rate limits per token",
    "TLS",
    "Prometheus metrics",
    "Traces",
    "A new version without a restart",
    "Several models or versions",
    "Graceful shutdown: requests received are answered",
    "Dead workers are replaced",
    "Hostile clients do not block others",
    "Explanations",
    "Query attacks are noticed",
)
TEXT = """\
# Servers

`make servers` writes this table. Each `yes` comes from tests that ran against the real server.
`Rampart` is [the built-in server](serve.md#the-built-in-server), `Triton` its Python backend.
An empty cell means that no test covers the feature: do not rely on it.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--servers", type=Path, help="write the table of servers into this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--servers")
    if path and not hasattr(config, "workerinput"):  # xdist's workers tell its controller
        config.pluginmanager.register(Table(path))


def tell(item: pytest.Item) -> None:
    """Let a test's report say what it shows."""
    for mark in item.iter_markers("feature"):
        feature, *servers = mark.args
        assert feature in FEATURES and servers and set(servers) <= set(SERVERS), mark
        item.user_properties += [("feature", f"{feature}|{server}") for server in servers]


class Table:
    """What came of the tests of each feature and server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes = defaultdict[str, set[str]](set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test that passes its call counts alone; any of its stages may fail or skip."""
        if report.when == "call" or report.outcome != "passed":
            for name, value in report.user_properties:
                if name == "feature":
                    self._outcomes[str(value)].add(report.outcome)

    def pytest_sessionfinish(self) -> None:
        """Write the table."""
        rows = [["", *SERVERS], [":---"] * (len(SERVERS) + 1)]
        rows += [
            [feature, *(self._cell(f"{feature}|{server}") for server in SERVERS)]
            for feature in FEATURES
        ]
        self._path.write_text(TEXT + "".join(f"| {' | '.join(row)} |\n" for row in rows))

    def _cell(self, name: str) -> str:
        outcomes = self._outcomes[name]
        if "failed" in outcomes:
            return "fails"
        return "not run" if "skipped" in outcomes else "yes" if outcomes else ""
