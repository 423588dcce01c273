"""Addresses that a server listens on."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether this machine alone reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
