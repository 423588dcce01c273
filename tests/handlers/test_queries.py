"""Detection of query attacks: what looks alike, what does not, and what becomes of it."""

import json
import logging
import resource
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from alike import crops, nudged
from clock import Clock
from inprocess import ask, png, post
from servers import Redis, Server

from rampart.export.archive import archive
from rampart.handlers.queries import lookup
from rampart.handlers.queries import watch as queries
from rampart.handlers.queries.stores import open_store
from rampart.handlers.queries.watch import (
    DIGESTS,
    ENTRIES,
    SHARED,
    Entry,
    Fingerprints,
    Watch,
    _is_plain,
    _nearest,
    _windows,
)
from rampart.handlers.service import Service
from rampart.handlers.telemetry import Metrics, declared
from rampart.hardening.model.images import Images

pytestmark = pytest.mark.usefixtures("patience")
feature = pytest.mark.feature

SECRET = bytes(range(32))
LOST = "Query attacks are not detected: the store fails"
Watcher = Callable[..., Watch]


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    return crops()


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def watching(tmp_path: Path) -> Watcher:
    """Makes watches over one LMDB store."""
    store = open_store(str(tmp_path / "queries"), entries=1_000 * ENTRIES, expiry=60)

    def make(response: str = "alert", model: str = "tiny", expiry: float = 60) -> Watch:
        return Watch(store, model, response=response, expiry=expiry)  # type: ignore[arg-type]

    return make


def look(watch: Watch, images: Sequence[np.ndarray] | np.ndarray, owner: str = "") -> list[Any]:
    return [watch.look([image], [owner])[0] for image in images]


def test_windows_are_numbers_in_base_6_of_20_levels_from_every_fourth_place(
    noise: np.random.Generator,
) -> None:
    levels = noise.integers(0, 6, (3, 62)).astype(np.uint8)
    expected = [
        [int("".join(map(str, row[start : start + 20])), 6) for start in range(0, 44, 4)]
        for row in levels[:, :60]
    ]
    assert _windows(levels).tolist() == expected


def test_plain_windows_have_at_most_one_edge() -> None:
    row = np.zeros(120, dtype=np.uint8)
    row[30:60] = 1  # one edge between pixels 9 and 10, another between 19 and 20
    row[60:72] = [3, 1, 2, 0, 4, 1, 2, 2, 5, 0, 1, 3]
    plain = _is_plain(row[None])[0]
    assert plain[:10].all() and not plain[12:17].any() and plain[-8:].all()


def test_a_fingerprint_is_a_secret_function_of_image_and_owner(photos: np.ndarray) -> None:
    image = photos[0]

    def digests(secret: bytes = SECRET, owner: str = "") -> np.ndarray:
        return Fingerprints(secret).digests([photos[1], image], ["", owner])[1]

    own = digests()
    assert len(own) == DIGESTS and (np.diff(own[::-1].astype(float)) > 0).all()
    assert np.array_equal(own, Fingerprints(SECRET).digests([image.copy()], [""])[0])
    others = [digests(SECRET[::-1]), digests(owner="b")]
    assert all(not np.intersect1d(own, other).size for other in others)


def test_different_photographs_pass_and_each_nudged_one_is_seen(
    watching: Watcher, photos: np.ndarray, noise: np.random.Generator
) -> None:
    watch = watching()
    assert look(watch, photos) == [None] * 60
    assert look(watch, nudged(photos, noise)).count("alert") >= 55  # some are rather smooth


def test_the_same_picture_again_is_no_attack_for_its_answer_is_known(
    watching: Watcher, photos: np.ndarray
) -> None:
    watch = watching("reject")
    assert look(watch, photos[:5]) == look(watch, photos[:5]) == [None] * 5


def test_a_batch_without_a_readable_image_harms_nothing(
    watching: Watcher, photos: np.ndarray, noise: np.random.Generator
) -> None:
    watch = watching()
    look(watch, photos[:1])
    assert watch.look([], []) == [] and watch.up
    assert look(watch, nudged(photos[:1], noise)) == ["alert"]


def test_a_picture_of_next_to_nothing_is_not_stored(watching: Watcher) -> None:
    watch = watching()
    prints = Fingerprints(watch._store.secret())
    plain = [np.full((32, 32, 3), level, dtype=np.uint8) for level in range(0, 250, 10)]
    assert look(watch, plain) == [None] * 25
    keys = [b"q" + prints.name(image, "tiny\n") for image in plain]
    assert watch._store.find(keys) == [b""] * 25


def test_who_is_rejected_does_not_keep_a_picture_from_its_owner_for_good(
    tmp_path: Path, photos: np.ndarray, noise: np.random.Generator, clock: Clock
) -> None:
    store = open_store(str(tmp_path), entries=1_000, expiry=80)
    watch = Watch(store, "tiny", response="reject", expiry=80)
    assert look(watch, nudged(photos[:1], noise)) == [None]
    answers = []
    for _ in range(10):
        answers += look(watch, photos[:1])
        clock.now += 15
    assert answers[0] == "reject" and answers[-1] is None


def test_what_was_seen_stands_though_it_cannot_be_stored(
    redis: Redis, photos: np.ndarray, noise: np.random.Generator
) -> None:
    redis.flush()
    store = open_store(redis.address, entries=1_000, expiry=60)
    watch = Watch(store, "tiny", response="reject", expiry=60)
    look(watch, photos[:1])
    redis.set("maxmemory", "1")
    near = [nudged(photos[0], noise), photos[1]]
    try:
        assert watch.look(near, ["", ""]) == ["reject", None] and not watch.up
    finally:
        redis.set("maxmemory", "0")


def test_pictures_with_the_same_white_border_are_not_alike(
    watching: Watcher, photos: np.ndarray
) -> None:
    bordered = np.full((50, 96, 96, 3), 255, dtype=np.uint8)
    bordered[:, 32:64, 32:64] = photos[:50]
    assert look(watching(), bordered) == [None] * 50
    plain = np.stack([np.full((32, 32, 3), level, dtype=np.uint8) for level in range(0, 250, 50)])
    assert look(watching(), plain) == [None] * 5


def test_images_of_one_batch_are_compared_with_each_other(
    watching: Watcher, photos: np.ndarray, noise: np.random.Generator
) -> None:
    batch = [photos[0], photos[1], nudged(photos[0], noise), photos[1]]
    assert watching().look(batch, [""] * 4) == [None, None, "alert", None]


def test_owners_and_models_are_watched_apart(
    watching: Watcher, photos: np.ndarray, noise: np.random.Generator
) -> None:
    watch, near = watching(), nudged(photos[:5], noise)
    look(watch, photos[:5], owner="a")
    assert look(watch, near, owner="b") == [None] * 5
    assert look(watching(model="other"), near, owner="a") == [None] * 5
    assert look(watch, nudged(photos[:5], noise), owner="a") == ["alert"] * 5


def test_throttle_answers_one_near_image_in_a_pause(
    watching: Watcher, photos: np.ndarray, noise: np.random.Generator, clock: Clock
) -> None:
    watch = watching("throttle")
    asked = [nudged(photos[0], noise) for _ in range(5)]
    assert look(watch, [photos[0], *asked[:2]]) == [None, "throttle", "throttle"]
    clock.now += 1.1 * queries.PAUSE
    assert look(watch, asked[2:4]) == ["alert", "throttle"]
    clock.now += 1.1 * queries.PAUSE
    assert look(watch, asked[4:]) == ["alert"]


def test_an_attack_that_goes_on_is_not_forgotten(
    tmp_path: Path, photos: np.ndarray, noise: np.random.Generator, clock: Clock
) -> None:
    store = open_store(str(tmp_path), entries=1_000, expiry=80)
    watch = Watch(store, "tiny", response="alert", expiry=80)
    assert look(watch, photos[:2]) == [None, None]
    for _ in range(12):
        clock.now += 15
        assert look(watch, [nudged(photos[0], noise)]) == ["alert"]
    assert look(watch, [nudged(photos[1], noise)]) == [None]


def test_predictions_go_on_without_redis_and_alerts_resume_with_it(
    redis: Redis,
    photos: np.ndarray,
    noise: np.random.Generator,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    redis.flush()
    store = open_store(redis.address, entries=1_000, expiry=60)
    watch = Watch(store, "tiny", response="alert", expiry=60)
    assert look(watch, [photos[0], nudged(photos[0], noise)]) == [None, "alert"] and watch.up
    redis.stop()
    assert look(watch, nudged(photos[:3], noise)) == [None] * 3 and not watch.up
    clock.now += queries.RETRY
    assert look(watch, nudged(photos[:1], noise)) == [None] and not watch.up
    redis.start()
    assert look(watch, photos[:1]) == [None] and not watch.up  # it is left alone for a while
    clock.now += queries.RETRY
    assert look(watch, [photos[0], nudged(photos[0], noise)]) == [None, "alert"] and watch.up
    assert caplog.messages == [
        "Query attacks are not detected: the store fails: ConnectionError",
        "Detecting query attacks again",
    ]


def test_what_others_wrote_into_the_store_fails_the_watch_and_not_the_prediction(
    redis: Redis, photos: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    redis.flush()
    store = open_store(redis.address, entries=1_000, expiry=60)
    watch = Watch(store, "tiny", response="alert", expiry=60)
    prints = Fingerprints(store.secret())
    (digests,) = prints.digests([photos[0]], ["tiny\n"])
    store.add({digest.tobytes(): b"short" for digest in digests})
    store.add({b"qshort": b"no entry"})
    assert look(watch, photos[:1]) == [None] and not watch.up
    assert caplog.messages == ["Query attacks are not detected: the store fails: error"]


def test_a_store_that_does_not_answer_holds_nobody_up_and_is_asked_nothing_more(
    unpacked: Path,
    photos: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lookup, "QUERY_WAIT", 0.1)
    service = Service.open(unpacked, {"query_store": str(tmp_path / "queries")})
    freed, calls = threading.Event(), []

    def hangs(self: Watch, images: object, owners: Sequence[str]) -> list[None]:
        calls.append(images)
        freed.wait(60)
        return [None] * len(owners)

    monkeypatch.setattr(Watch, "look", hangs)
    began = time.monotonic()
    for photo in photos[:3]:
        assert "label" in ask(service, png(photo))
    assert time.monotonic() - began < 30 and len(calls) == 1
    lines = [line for line in caplog.messages if "uery" in line]
    assert lines == ["Query attacks are not detected: the store took over 0.1 s"]

    freed.set()
    deadline = time.monotonic() + 30
    while len(calls) < 2 and time.monotonic() < deadline:
        ask(service, png(photos[3]))
    assert len(calls) == 2


def test_a_store_that_is_slow_is_left_alone_for_a_while_and_told(
    unpacked: Path,
    photos: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lookup, "RETRY", 1.0)
    metrics, calls, look = Metrics(), list[float](), Watch.look
    service = Service.open(unpacked, {"query_store": str(tmp_path / "queries")}, metrics)

    def slowly(self: Watch, images: Any, owners: Sequence[str]) -> Any:
        calls.append(time.monotonic())
        if len(calls) == 1:
            time.sleep(lookup.QUERY_WAIT + 0.5)
        return look(self, images, owners)

    monkeypatch.setattr(Watch, "look", slowly)
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        assert "label" in ask(service, png(photos[0]))
    assert len(calls) == 1 and metrics.take()["rampart_query_store_up", ()] == 0
    while len(calls) < 2:
        ask(service, png(photos[0]))
    assert metrics.take()["rampart_query_store_up", ()] == 1
    assert len([line for line in caplog.messages if "uery" in line]) == 1


@pytest.fixture
def handling(unpacked: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Answers of one service, opened with the first settings, to one image after another."""
    services: list[Service] = []

    def answers(images: Sequence[np.ndarray], **settings: object) -> list[dict[str, Any]]:
        if not services:
            own = {"query_store": str(tmp_path / "queries"), "false_alarm_rate": 0.05}
            services.append(Service.open(unpacked, own | settings))
        return [ask(services[0], png(image)) for image in images]

    return answers


def test_reject_takes_the_label_and_says_why_where_details_are_shown(
    handling: Callable[..., list[dict[str, Any]]], photos: np.ndarray, noise: np.random.Generator
) -> None:
    images = [photos[0], nudged(photos[0], noise)]
    first, second = handling(images, on_query_attack="reject", false_alarm_rate=0)
    assert first["decision"] == "accept" and "similar_query" not in first["detail"]
    assert second["decision"] == "reject" and second["label"] is None and second["top"] == []
    assert second["detail"]["similar_query"] is True


def test_owners_are_told_apart_by_the_header_that_the_operator_names(
    unpacked: Path, tmp_path: Path, photos: np.ndarray, noise: np.random.Generator
) -> None:
    policy = {"on_query_attack": "throttle", "query_owner": "X-Tenant"}
    service = Service.open(unpacked, policy | {"query_store": str(tmp_path / "queries")})
    near = png(nudged(photos[0], noise))
    assert post(service, png(photos[0]), x_tenant="a").status == 200
    assert post(service, near, x_tenant="b").status == 200
    reply = post(service, near, x_tenant="a")
    assert (reply.status, reply.headers["retry-after"]) == (429, "1")


def test_in_public_detail_a_rejected_query_looks_like_any_rejected_image(
    handling: Callable[..., list[dict[str, Any]]], tiny_images: Images, noise: np.random.Generator
) -> None:
    known = tiny_images.image[:20].numpy()
    strange = noise.integers(0, 256, (32, 32, 3)).astype(np.uint8)
    policy = {"on_query_attack": "reject", "on_detection": "reject", "detail": "public"}
    answers = handling([*known, strange], **policy, false_alarm_rate=0.3)
    accepted = [image for image, answer in zip(known, answers[:-1], strict=True)
                if answer["decision"] == "accept"]  # fmt: skip
    assert answers[-1]["decision"] == "reject"
    assert answers[-1] in handling([nudged(image, noise) for image in accepted])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_query_attack": "shrug"}, "on_query_attack must be one of alert, throttle, reject"),
        ({"query_store": "ftp://x"}, "query_store must be a folder or redis://"),
        ({"query_capacity": 0}, "query_capacity above 1"),
    ],
)
def test_settings_that_make_no_sense_fail_the_load(
    handling: Callable[..., list[dict[str, Any]]], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"Rampart cannot serve this archive: .*{message}"):
        handling([], **settings)


@feature("Query attacks are noticed", "TorchServe")
def test_workers_share_what_they_have_seen_and_count_it(
    launch: Callable[..., Server],
    tiny_shipped: Path,
    tmp_path: Path,
    photos: np.ndarray,
    noise: np.random.Generator,
) -> None:
    policy = {"on_query_attack": "throttle", "query_owner": "X-Tenant", "detail": "public"}
    archive(tiny_shipped, tmp_path / "tiny.mar", variant="lean", settings={"rampart": policy})
    places = {"query_store": tmp_path / "queries", "quarantine": tmp_path / "flagged"}
    options = {name: str(place) for name, place in places.items()}
    server = launch(tmp_path / "tiny.mar", workers=2, **options)
    assert "Rampart is ready" in server.read(until="  curl '"), server.lines

    def ask(image: np.ndarray, tenant: str = "a") -> requests.Response:
        return requests.post(server.url, png(image), headers={"X-Tenant": tenant}, timeout=60)

    assert [ask(image).status_code for image in photos[3::-1]] == [200] * 4
    began = time.monotonic()
    answers = [ask(nudged(photos[0], noise)) for _ in range(20)]
    answered = sum(answer.status_code == 200 for answer in answers)
    assert answered <= time.monotonic() - began + 1 and answered < 18
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["type"] == "similar_query" and refused.headers["Retry-After"] == "1"
    assert ask(nudged(photos[0], noise), tenant="b").status_code == 200
    time.sleep(1.1)
    assert ask(nudged(photos[0], noise)).status_code == 200

    deadline = time.monotonic() + 30
    wanted = {"throttle": 20.0 - answered, "alert": 1.0 + answered}
    seen: dict[str, float] = {}
    while seen != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        text = requests.get(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=60).text
        lines = [line for line in text.splitlines() if "rampart_query_alerts_total{" in line]
        seen = {
            line.split('response="')[1].split('"')[0]: float(line.split()[-1]) for line in lines
        }
    assert seen == wanted
    assert "rampart_query_store_up{" in text and "rampart_quarantine_up{" in text
    assert all(place.is_dir() for place in places.values())
    assert "rampart_query_alerts_total" in declared()["counter"]
    assert server.end() == 0


@pytest.mark.parametrize("kind", [pytest.param("redis", marks=pytest.mark.server), "lmdb"])
def test_where_the_store_fails_clients_are_answered_and_alerts_resume_with_it(
    unpacked: Path,
    tmp_path: Path,
    photos: np.ndarray,
    noise: np.random.Generator,
    kind: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(queries, "RETRY", 0.3)
    caplog.set_level(logging.WARNING)
    store: Redis | None = request.getfixturevalue("redis") if kind == "redis" else None
    if store:
        store.flush()
    address = store.address if store else str(tmp_path / "queries")
    policy = {"on_query_attack": "reject", "query_store": address, "false_alarm_rate": 0}
    service = Service.open(unpacked, policy)
    own = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail() -> None:
        if store:
            store.stop()
        else:  # a disk that takes no more
            size = (tmp_path / "queries" / "data.mdb").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, own[1]))

    def mend() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
        if store:
            store.start()

    def decisions(images: np.ndarray) -> list[str]:
        replies = [post(service, png(image)) for image in images]
        assert {reply.status for reply in replies} == {200}
        return [json.loads(reply.body)["decision"] for reply in replies]

    def until_rejected(image: np.ndarray) -> bool:
        """Whether an attack on it is noticed; where all cores are busy Redis may miss one."""
        deadline = time.monotonic() + 30
        while decisions(np.stack([image, nudged(image, noise)]))[1] != "reject":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        return True

    assert until_rejected(photos[0])
    before = caplog.text.count(LOST)
    fail()
    try:
        decisions(photos[1:40])  # until the store takes no more
        assert "reject" not in decisions(nudged(photos[30:40], noise))
    finally:
        mend()
    assert caplog.text.count(LOST) == before + 1
    assert until_rejected(photos[40])
    assert "Detecting query attacks again" in caplog.messages


def test_more_than_a_fifth_of_a_fingerprint_makes_an_image_near() -> None:
    own = tuple(range(DIGESTS, 0, -1))
    entries = {
        b"few": Entry(0.0, (*range(999, 999 - DIGESTS + SHARED, -1), *own[:SHARED])),
        b"enough": Entry(0.0, (*range(999, 998 - DIGESTS + SHARED, -1), *own[: SHARED + 1])),
    }
    assert _nearest(entries, own) == b"enough"
    del entries[b"enough"]
    assert _nearest(entries, own) is None and _nearest({}, own) is None


def test_an_entry_survives_its_packing_and_of_two_the_newer_counts() -> None:
    old, new = Entry(1.5, (2**64 - 1, 1)), Entry(2.5, tuple(range(DIGESTS, 0, -1)))
    assert Entry.unpack(old.pack()) == old
    assert Entry.unpack(old.pack() + new.pack()) == new
