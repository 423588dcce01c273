"""Who is let in, and how often; several workers count together."""

from pathlib import Path

import pytest
from clock import Clock

from rampart.handlers.http import admission
from rampart.handlers.http.admission import Admission, Buckets
from rampart.handlers.http.tokens import Rate, Tokens
from rampart.handlers.telemetry import Metrics


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admission, "time", clock)
    return clock


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate(tmp_path: Path, clock: Clock) -> None:
    buckets, rate = Buckets(tmp_path), Rate(2.0, 3)
    assert [buckets.take("a", rate) for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    clock.now += 0.5
    assert [buckets.take("a", rate) for _ in range(2)] == [0, 0.5]
    clock.now += 60  # it fills no further than its burst
    assert [bool(buckets.take("a", rate)) for _ in range(4)] == [False, False, False, True]


def test_workers_share_a_bucket_and_names_do_not(tmp_path: Path, clock: Clock) -> None:
    one, two, rate = Buckets(tmp_path), Buckets(tmp_path), Rate(1.0, 2)
    assert [one.take("a", rate), two.take("a", rate)] == [0, 0]
    assert one.take("a", rate) == two.take("a", rate) == 1
    assert two.take("b", rate) == 0


def test_a_name_may_be_longer_than_that_of_a_file(tmp_path: Path) -> None:
    name = "\N{MATHEMATICAL SCRIPT CAPITAL A}" * 64  # of 256 bytes
    assert Buckets(tmp_path).take(name, Rate(1.0, 1)) == 0
    assert Buckets(tmp_path).take(name, Rate(1.0, 1)) > 0


def test_a_refusal_says_why_and_when_to_come_again(tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"free {'a' * 16}\nslow {'b' * 16} 0.1 1\n")
    metrics = Metrics()
    admit = Admission(Tokens(file), tmp_path, metrics).refusal
    free, slow = b"Bearer " + b"a" * 16, b"Bearer " + b"b" * 16
    assert all(admit(free) is None for _ in range(1000))
    assert admit(slow) is None
    refusal = admit(slow)
    assert refusal and (refusal.error.code, refusal.headers) == (429, {"retry-after": "10"})
    unknown = admit(b"")
    assert unknown and (unknown.error.code, unknown.headers) == (
        401,
        {"www-authenticate": "Bearer"},
    )
    name = "rampart_requests_total"
    assert metrics.take() == {(name, ("429",)): 1, (name, ("401",)): 1}


def test_a_rate_that_is_raised_counts_at_once_also_for_what_is_owed(
    tmp_path: Path, clock: Clock
) -> None:
    buckets, slow, fast = Buckets(tmp_path), Rate(1 / 60, 60), Rate(100.0, 200)
    assert [buckets.take("a", slow) for _ in range(60)] == [0] * 60
    assert buckets.take("a", slow) == pytest.approx(60)
    assert [buckets.take("a", fast) for _ in range(140)] == [0] * 140
    assert buckets.take("a", fast) == pytest.approx(0.01, rel=1e-3)


def test_a_dear_request_is_paid_at_once_or_owed_by_a_bucket_that_never_holds_so_much(
    tmp_path: Path, clock: Clock
) -> None:
    buckets, rate = Buckets(tmp_path), Rate(2.0, 10)
    assert [buckets.take("a", rate, 8), buckets.take("a", rate, 8)] == [0, 3]
    assert [buckets.take("a", rate) for _ in range(3)] == [0, 0, 0.5]
    assert [buckets.take("b", rate, 65), buckets.take("b", rate)] == [0, 28]
    clock.now += 28
    assert [buckets.take("b", rate, 65), buckets.take("b", rate)] == [4.5, 0]
