"""The copy of a certificate and its key that workers open."""

import ssl
from pathlib import Path

import pytest
from servers import certificate_and_key

from rampart.launch.certificate import Certificate
from rampart.launch.endpoint import LaunchError


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "given").mkdir()
    return certificate_and_key(tmp_path / "given")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


def shown(certificate: Certificate) -> str:
    """The copy as servers open it: its chain, once its key belongs to that."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate.copy)
    head = "-----BEGIN CERT"
    return head + certificate.copy.read_text().partition(head)[2]


def test_a_new_pair_is_taken_once_it_is_whole_and_only_its_owner_reads_the_copy(
    pair: tuple[Path, Path], folder: Path
) -> None:
    certificate, old = Certificate(pair, folder), pair[0].read_text()
    assert shown(certificate) == old and not certificate.renew()
    certificate_and_key(pair[0].parent)
    # The first look sees that it changed, the second that it does no more, the third nothing new.
    assert [certificate.renew() for _ in range(3)] == [False, True, False]
    assert shown(certificate) == pair[0].read_text() != old
    assert certificate.copy.stat().st_mode & 0o777 == 0o600
    assert list(folder.iterdir()) == [certificate.copy]


@pytest.mark.parametrize("half", [0, 1], ids=["chain", "key"])
def test_half_a_new_pair_is_told_once_and_left_until_the_other_half_comes(
    pair: tuple[Path, Path],
    folder: Path,
    tmp_path: Path,
    half: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    certificate, old = Certificate(pair, folder), pair[0].read_text()
    (tmp_path / "new").mkdir()
    new = certificate_and_key(tmp_path / "new")
    new[half].replace(pair[half])
    assert [certificate.renew() for _ in range(4)] == [False] * 4
    assert shown(certificate) == old and list(folder.iterdir()) == [certificate.copy]
    said = capfd.readouterr().out
    assert said.count("the old certificate stays in service") == 1 and str(pair[0]) in said
    pair[1 - half].unlink()  # as while it is replaced
    assert not certificate.renew() and not certificate.renew()
    new[1 - half].replace(pair[1 - half])
    assert [certificate.renew() for _ in range(2)] == [False, True]
    assert shown(certificate) == pair[0].read_text() != old


def test_files_that_are_no_pair_are_refused_at_the_start(
    pair: tuple[Path, Path], folder: Path
) -> None:
    for wrong in (pair[::-1], (pair[0], pair[0]), (folder / "missing", pair[1])):
        with pytest.raises(LaunchError, match="not a PEM certificate chain and its key"):
            Certificate((wrong[0], wrong[1]), folder)
    assert not list(folder.iterdir())
