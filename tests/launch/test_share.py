"""Connections that ask are spread over workers, though one may have taken all."""

import os
from pathlib import Path

import pytest

from rampart.launch.share import Share


@pytest.mark.parametrize(("own", "other", "surplus"), [(32, 0, 16), (17, 15, 0), (22, 10, 6)])
def test_who_has_many_more_than_its_share_gives_up_what_is_beyond_it(
    own: int, other: int, surplus: int, tmp_path: Path
) -> None:
    (tmp_path / f"{os.getppid()}.clients").write_text(str(other))
    (tmp_path / f"{2**22 + 1}.clients").write_text("1000")  # of a worker that has ended
    assert Share(tmp_path).surplus(own) == surplus


def test_a_lone_worker_keeps_all(tmp_path: Path) -> None:
    assert Share(tmp_path).surplus(100) == 0
