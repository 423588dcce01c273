"""Ask a server on this machine: past proxies, with a token of its file, by its certificate."""

import contextlib
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from rampart.handlers.http.tokens import read_tokens


def trust_in(certificate: Path) -> ssl.SSLContext:
    """Trust a certificate for what it is, whatever name it gives."""
    trust = ssl.create_default_context(cafile=str(certificate))
    trust.check_hostname = False
    trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its root need not be in the file
    return trust


def opener(certificate: Path | None) -> urllib.request.OpenerDirector:
    """What opens addresses, past proxies."""
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    if certificate:
        handlers.append(urllib.request.HTTPSHandler(context=trust_in(certificate)))
    return urllib.request.build_opener(*handlers)


def authorization(tokens: Path) -> dict[str, str]:
    """The header with a token of a file, of one without a rate if there is one.

    There is none where the file cannot be read.
    """
    with contextlib.suppress(OSError, ValueError):
        names, rates = read_tokens(tokens)
        token = min(names, key=lambda token: names[token] in rates)
        return {"Authorization": f"Bearer {token.decode()}"}
    return {}


def status(url: str, body: bytes, headers: Mapping[str, str], certificate: Path | None) -> int:
    """Status of the answer to a body that is posted; 0 without an answer."""
    request = urllib.request.Request(url, body, dict(headers))
    try:
        with opener(certificate).open(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0
