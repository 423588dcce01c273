"""The real server of tests/handlers, and where it listens."""

import importlib.util
import sys
from pathlib import Path

import pytest
from clients import Target

# Pytest shares fixtures down a tree, not across: this module's are made ours by their names.
_file = Path(__file__).parent.parent / "handlers" / "conftest.py"
_spec = importlib.util.spec_from_file_location("handlers_conftest", _file)
assert _spec and _spec.loader
servers = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(servers)
launch, server, encode, pixels = servers.launch, servers.server, servers.encode, servers.pixels


@pytest.fixture(scope="session")
def target(server: servers.Server) -> Target:
    """The server that all hostile clients share."""
    return Target(server.port, server.grpc, "tiny")
