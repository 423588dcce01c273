"""Where the real server listens that all hostile clients share."""

import pytest
from clients import Target
from servers import Server


@pytest.fixture(scope="session")
def target(server: Server) -> Target:
    """The server that all hostile clients share."""
    return Target(server.port, server.grpc, "tiny")
