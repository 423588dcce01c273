"""The table of docs/servers.md: which server has what, by the tests that ran against it.

A test says what it shows by `feature(NAME, SERVER, ...)`; `make servers` runs those and writes.
"""

from collections import defaultdict
from pathlib import Path

import pytest

SERVERS = ("TorchServe", "Rampart", "Triton", "KServe", "Ray Serve")
OVERLOAD = "Overload is refused at once with 503 and Retry-After"
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
    OVERLOAD,
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
# What a test covers in part alone: the words of its cell.
PARTLY = {
    ("Raw pictures and forms", "KServe"): "raw pictures",
    ("Open Inference v2, JSON", "Triton"): "pixels",
    ("Open Inference v2, binary tensors", "KServe"): "pixels",
    ("Compressed bodies", "KServe"): "over gRPC",
    ("TLS", "Triton"): "over gRPC",
    ("Several models or versions", "Ray Serve"): "models",
}
# What a server cannot do, or does not do for Rampart, and why.
CANNOT = {
    ("Raw pictures and forms", "Triton"): "its protocol has only tensors",
    ("KServe v1", "Triton"): "it speaks only Open Inference v2",
    ("Open Inference v2, gRPC", "TorchServe"): "it has its own gRPC, which returns the verdicts",
    ("Open Inference v2, gRPC", "Ray Serve"): "its gRPC needs generated code",
    ("Open Inference v2, gRPC streams", "TorchServe"): "see its gRPC",
    ("Open Inference v2, gRPC streams", "KServe"): "its gRPC has no streams",
    ("Open Inference v2, gRPC streams", "Ray Serve"): "see its gRPC",
    ("Protocol health and metadata", "TorchServe"): "it has health at `/ping`, but no metadata",
    ("Client deadlines", "TorchServe"): "it has one time limit per model",
    ("Client deadlines", "Triton"): "with a time limit it no longer fetches requests early",
    ("Client deadlines", "KServe"): "the adapter does not read them",
    (OVERLOAD, "TorchServe"): "if its queue is full it refuses requests, but without Retry-After",
    (OVERLOAD, "Triton"): "its queue has no limit; with one it no longer fetches requests early",
    (OVERLOAD, "Ray Serve"): "its proxy queues requests without limit",
    ("Tokens", "Triton"): "leave them to a gateway",
    ("Tokens", "KServe"): "leave them to KServe's gateway",
    ("Rate limits per token", "TorchServe"): "leave them to a gateway",
    ("Rate limits per token", "Triton"): "leave them to a gateway",
    ("Rate limits per token", "KServe"): "leave them to KServe's gateway",
    ("Traces", "TorchServe"): "it passes on a request's `traceparent`, but makes no spans",
    ("Traces", "Triton"): "its own traces do not show Rampart's stages",
    ("Traces", "KServe"): "the adapter makes no spans",
    ("Traces", "Ray Serve"): "a replica makes no spans",
    ("A new version without a restart", "KServe"): "KServe replaces the pods",
    ("Several models or versions", "KServe"): "it serves one archive",
    ("Graceful shutdown: requests received are answered", "TorchServe"): (
        "it drops waiting requests when it stops: take it out of your load balancer first"
    ),
    ("Dead workers are replaced", "Triton"): (
        "if its Python process is killed, Triton 2.51 answers with errors but says that it is "
        "ready: let the liveness probe send a picture"
    ),
    ("Dead workers are replaced", "KServe"): "it is one process, which Kubernetes replaces",
    ("Hostile clients do not block others", "Triton"): "it limits neither bodies nor its queue",
    ("Hostile clients do not block others", "KServe"): "it reads bodies of any size",
    ("Hostile clients do not block others", "Ray Serve"): (
        "its proxy accepts connections and bodies before Rampart sees them: put a gateway in front"
    ),
    ("Explanations", "Triton"): "its outputs are fixed",
}
TEXT = """\
# Servers

`make servers` writes this table. Each `yes` comes from tests that ran against the real server.
`Rampart` is [the built-in server](serve.md#the-built-in-server), and `Triton` is Triton with its
Python backend. Other words name the part of a feature that is tested. `no` means that the server
does not have the feature; the reasons are below. An empty cell means that no test covers the
feature: do not rely on it.

"""
NOTES = "\n## Why not\n\n"


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
            [feature, *(self._cell(feature, server) for server in SERVERS)] for feature in FEATURES
        ]
        table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        self._path.write_text(TEXT + table + NOTES + reasons())

    def _cell(self, feature: str, server: str) -> str:
        outcomes = self._outcomes[f"{feature}|{server}"]
        if "failed" in outcomes:
            return "fails"
        if "skipped" in outcomes:
            return "not run"
        return told(feature, server, shown=bool(outcomes))


def told(feature: str, server: str, *, shown: bool) -> str:
    """The cell of a feature that tests have shown, or of one that has none."""
    if shown:
        return PARTLY.get((feature, server), "yes")
    return "no" if (feature, server) in CANNOT else ""


def reasons() -> str:
    """Why servers do not have what they do not have, a paragraph a server."""
    lines = []
    for one in SERVERS:
        own = [f"*{feature}*: {why}." for (feature, server), why in CANNOT.items() if server == one]
        lines += [f"**{one}**", "", *(f"- {line}" for line in own), ""] if own else []
    return "\n".join(lines[:-1]) + "\n"
