"""Against a real HTTP server that reads, decodes and judges with the handlers' own code.

Only its graph is a toy: mean brightness decides, and a detector looks at how much pixels differ
from their neighbours. So each expected verdict is plain arithmetic. (TorchServe takes 15 s to
start; tests/handlers and tests/launch have it.)
"""

import html
import json
import shutil
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from PIL import Image

from rampart.handlers.errors import ImageError
from rampart.handlers.image import decode
from rampart.handlers.protocols.choice import read
from rampart.handlers.queries.stores import open_store
from rampart.handlers.queries.watch import Watch
from rampart.handlers.types import Incoming
from rampart.handlers.verdict import Calibration, Judge, Policy
from rampart.hardening.attack import redteam
from rampart.hardening.attack.redteam import (
    ATTACKS,
    Answer,
    Endpoint,
    Outcome,
    Probe,
    Settings,
)
from rampart.hardening.attack.redteam import endpoint as asking
from rampart.hardening.attack.redteam.probe import MAX_REPEATS, AttackEnd, as_float, scores
from rampart.hardening.attack.redteam.run import FILE, _alike
from rampart.hardening.model.images import Images
from rampart.hardening.report import redteam as report
from rampart.hardening.report.card import read_card, write_card
from rampart.hardening.report.evidence import evidence

CLASSES = ("dark", "bright", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
THRESHOLD = 128
# Images whose neighbouring pixels differ by more than 10 on average are flagged.
CALIBRATION = Calibration(
    ("roughness",),
    np.array([[0.0, 5.0, 10.0]]),
    np.array([0.0, 1.0, 2.0]),
    np.linspace(0, 2, 200),
    200,
    "full",
)


class Toy(ThreadingHTTPServer):
    """The endpoint; `seen` are the images that came, `requests` how many came at once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.labels, self.policy, self.version = CLASSES, Policy(0.01), "1.0"
        self.seen: list[np.ndarray] = []
        self.requests: list[int] = []
        self.breaks_after = 10**6
        self.asked, self.busy_at = 0, 0
        self.watch: Watch | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/predictions/toy"

    def answer(self, body: bytes) -> tuple[int, Any]:
        try:
            images = [
                decode(item, 32) for item in read(Incoming({}, [body])).images if is_bytes(item)
            ]
        except ImageError as error:
            return error.code, {"code": error.code, "type": error.type, "message": error.message}
        self.asked += 1
        if self.busy_at == self.asked and len(images) > 1:
            busy = {"code": 503, "type": "busy", "message": "come again"}
            return 200, {"predictions": [busy] * len(images)}
        if len(self.seen) >= self.breaks_after or self.busy_at == self.asked:
            return 503, {"code": 503, "type": "Busy", "message": "no worker " + "is free " * 99}
        self.seen += images
        self.requests.append(len(images))
        pixels = np.stack(images).astype(np.float32)
        logits = np.tile(-5 - np.arange(8, dtype=np.float32), (len(images), 1))
        logits[:, 0] = (THRESHOLD - pixels.mean((1, 2, 3))) / 20
        logits[:, 1] = -logits[:, 0]
        roughness = np.abs(np.diff(pixels, axis=2)).mean((1, 2, 3))[:, None]
        model = {"name": "toy", "version": self.version}
        judge = Judge(self.labels, CALIBRATION, self.policy, model)
        verdicts = [v.to_dict() for v in judge.verdicts(logits, logits, roughness)]
        seen = self.watch.look(images, [""] * len(images)) if self.watch else []
        for number, response in enumerate(seen):
            if response == "throttle":
                message = {"code": 429, "type": "similar_query", "message": "wait"}
                return (429, message) if len(seen) == 1 else (200, {"predictions": verdicts})
            verdicts[number]["detail"] |= {"similar_query": True} if response else {}
        return 200, verdicts[0] if len(verdicts) == 1 else {"predictions": verdicts}


def is_bytes(item: bytes | ImageError) -> bool:
    if isinstance(item, ImageError):
        raise item
    return True


class Answering(BaseHTTPRequestHandler):
    server: Toy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        code, content = {
            "/predictions/toy": lambda: self.server.answer(body),
            "/predictions/other": lambda: (200, {"hello": "world"}),
            "/predictions/moved": lambda: (302, {"message": "moved"}),
        }.get(self.path, lambda: (404, {"code": 404, "message": "Model not found: tyo"}))()
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Location", self.server.url)
        self.send_header("Content-Length", str(len(text)))
        if code == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        """Nothing: tests print no access log."""


@pytest.fixture
def toy() -> Iterator[Toy]:
    with Toy() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def endpoint(toy: Toy) -> Endpoint:
    return Endpoint(toy.url, CLASSES)


def flat(brightness: int) -> np.ndarray:
    return np.full((32, 32, 3), brightness, np.uint8)


def pictures(*brightness: int) -> Images:
    """Flat images that carry their right labels."""
    label = torch.tensor([int(b > THRESHOLD) for b in brightness])
    return Images(torch.from_numpy(np.stack([flat(b) for b in brightness])), label, CLASSES)


def probe_of(endpoint: Endpoint, brightness: int, *, budget: int = 99) -> Probe:
    settings = Settings(endpoint.url, "toy", "1.0", 8, budget, 0)
    return Probe(endpoint, flat(brightness), int(brightness > THRESHOLD), settings)


def send(probe: Probe, *images: np.ndarray) -> np.ndarray | None:
    """Probabilities, or None where the probe ends the attack."""
    try:
        return probe(np.concatenate([as_float(image) for image in images]))
    except AttackEnd:
        return None


def brightness(image: np.ndarray) -> float:
    return float(image.astype(float).mean())


def distance(image: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(image.astype(int) - other).max())


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_fools_an_easy_model_by_an_image_that_was_sent_inside_the_ball(
    name: str, toy: Toy, endpoint: Endpoint, tmp_path: Path
) -> None:
    toy.policy = Policy(0)
    images = pictures(127, 140)  # which is outside the ball, and where decision-based ones begin
    (outcome,) = redteam.redteam(endpoint, images, tmp_path, attacks=[name], limit=1, budget=600)
    assert outcome.success is not None
    assert 1 < outcome.success <= outcome.queries <= 600
    assert not outcome.clean_wrong
    sent = toy.seen[1:]  # the first one asked for the model's name
    assert np.array_equal(sent[0], flat(127))
    wins = [brightness(i) > THRESHOLD and distance(i, flat(127)) <= 8 for i in sent]
    assert wins.index(True) + 1 == outcome.success
    nearest = min(distance(i, flat(127)) for i in sent if brightness(i) > THRESHOLD)
    assert outcome.distance == nearest <= 8


@pytest.mark.parametrize("name", ATTACKS)
def test_an_image_that_cannot_be_fooled_costs_the_budget_and_no_query_more(
    name: str, toy: Toy, endpoint: Endpoint, tmp_path: Path
) -> None:
    images = pictures(40, 180)
    (outcome,) = redteam.redteam(endpoint, images, tmp_path, attacks=[name], limit=1, budget=45)
    assert outcome.success is None
    assert outcome.queries == len(toy.seen) - 1 <= 45
    assert outcome.queries > 40
    assert max(toy.requests) <= 32
    assert len({image.tobytes() for image in toy.seen}) == outcome.queries


def test_success_counts_inside_the_ball_only(endpoint: Endpoint) -> None:
    probe = probe_of(endpoint, 121)
    assert send(probe, flat(121), flat(140), flat(130)) is not None
    assert (probe.queries, probe.success, probe.distance) == (3, None, 9)
    assert send(probe, flat(129)) is None
    assert (probe.queries, probe.success, probe.distance) == (4, 4, 8)


def test_what_is_sent_is_rounded_before_it_is_judged(toy: Toy, endpoint: Endpoint) -> None:
    probe = probe_of(endpoint, 121)
    x = np.full((1, 3, 32, 32), 129.4 / 255)
    with pytest.raises(AttackEnd):
        probe(x)
    assert np.array_equal(toy.seen[0], flat(129))
    assert (probe.success, probe.distance) == (1, 8)


@pytest.mark.parametrize("detail", ["full", "public"])
@pytest.mark.parametrize("on_detection", ["flag", "reject"])
def test_a_wrong_label_that_was_flagged_or_rejected_is_no_success(
    toy: Toy, endpoint: Endpoint, on_detection: str, detail: str
) -> None:
    rough = flat(127)
    rough[:, ::2] += 8
    rough[:, 1::2] -= 5  # bright on average, and neighbours differ by 13
    toy.policy = Policy(0.01, on_detection, detail)
    probe = probe_of(endpoint, 127)
    answer = send(probe, rough)
    assert answer is not None
    assert answer[0].argmax() == 0
    assert (probe.queries, probe.success, probe.distance) == (1, None, None)
    toy.policy = Policy(0, on_detection, detail)
    trusting = probe_of(endpoint, 127)
    assert send(trusting, rough) is None
    assert (trusting.success, trusting.distance) == (1, 8)


def test_a_clean_image_that_is_accepted_and_wrong_needs_one_query(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    images = Images(torch.from_numpy(flat(40)[None]), torch.tensor([1]), CLASSES)
    for outcome in redteam.redteam(endpoint, images, tmp_path):
        assert outcome.clean_wrong
        assert (outcome.queries, outcome.success, outcome.distance) == (1, 1, 0)


def test_an_answer_is_remembered_and_not_paid_twice(toy: Toy, endpoint: Endpoint) -> None:
    probe = probe_of(endpoint, 40)
    first = send(probe, flat(40), flat(40), flat(41))
    assert np.array_equal(send(probe, flat(41), flat(40)), first[[2, 0]])
    assert probe.queries == len(toy.seen) == 2


def test_an_attack_that_goes_in_circles_is_ended(endpoint: Endpoint) -> None:
    probe = probe_of(endpoint, 40)
    answers = [send(probe, flat(40)) for _ in range(MAX_REPEATS + 2)]
    assert answers[-2] is not None
    assert answers[-1] is None


def test_scores_spread_what_the_top_classes_leave() -> None:
    top = ((3, 0.5), (1, 0.2), (0, 0.1))
    assert scores(Answer(3, top, ("", "")), 1, 5) == pytest.approx([0.1, 0.2, 0.1, 0.5, 0.1])
    assert scores(Answer(None, top, ("", "")), 1, 5) == pytest.approx([0, 1, 0, 0, 0])


def test_a_run_that_broke_off_goes_on_as_if_it_had_not(
    toy: Toy, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(40, 180, 60, 200)
    options: dict[str, Any] = {"attacks": ["square", "boundary"], "budget": 12}
    whole = redteam.redteam(endpoint, images, tmp_path / "whole", **options)
    assert len(whole) == 8
    sent = list(toy.seen)
    toy.breaks_after = len(toy.seen) + 40  # in the fourth image
    monkeypatch.setattr(asking, "PAUSES", (0.0, 0.01))
    with pytest.raises(ConnectionError, match=r"overloaded .*no worker is free.*run the") as caught:
        redteam.redteam(endpoint, images, tmp_path / "broken", **options)
    assert len(str(caught.value)) < 350
    assert redteam.read(tmp_path / "broken") == whole[:3]
    toy.breaks_after, before = 10**6, len(toy.seen)
    assert redteam.redteam(endpoint, images, tmp_path / "broken", **options) == whole
    rest = sum(outcome.queries for outcome in whole[3:])
    assert len(toy.seen) - before == 1 + rest
    assert np.array_equal(toy.seen[before + 1 :], sent[-rest:])
    before = len(toy.seen)
    assert redteam.redteam(endpoint, images, tmp_path / "broken", **options) == whole
    assert len(toy.seen) == before + 1


@pytest.mark.parametrize("count", [1, 3])
def test_an_endpoint_that_is_busy_once_is_asked_again(
    toy: Toy, endpoint: Endpoint, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PAUSES", (0.01,))
    toy.busy_at = 1
    answers = endpoint.ask(np.concatenate([flat(40)[None]] * count))
    assert len(answers) == count and toy.asked == 2
    monkeypatch.setattr(asking, "PAUSES", ())
    toy.busy_at = 3
    with pytest.raises(ConnectionError, match="is overloaded"):
        endpoint.ask(np.concatenate([flat(40)[None]] * count))


def test_more_images_are_added_to_a_run(toy: Toy, endpoint: Endpoint, tmp_path: Path) -> None:
    images = pictures(40, 180, 60, 200)
    options: dict[str, Any] = {"attacks": ["square"], "budget": 5}
    few = redteam.redteam(endpoint, images, tmp_path, limit=2, **options)
    before = len(toy.seen)
    more = redteam.redteam(endpoint, images, tmp_path, limit=4, **options)
    assert [more[0], more[2]] == few
    assert len(toy.seen) == before + 1 + 2 * 5


@pytest.mark.parametrize("tail", ['{"settings": {"endp', '{"settings": 1}'])
def test_a_torn_last_line_is_dropped(endpoint: Endpoint, tmp_path: Path, tail: str) -> None:
    options: dict[str, Any] = {"attacks": ["square"], "budget": 3}
    images = pictures(40, 180)
    redteam.redteam(endpoint, images, tmp_path, limit=1, **options)
    with (tmp_path / FILE).open("a") as file:
        file.write(tail)
    assert len(redteam.read(tmp_path)) == 1
    both = redteam.redteam(endpoint, images, tmp_path, **options)
    assert redteam.read(tmp_path) == both
    assert len(both) == 2


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"settings": {}}\n')
    with pytest.raises(ValueError, match=r"queries\.jsonl, line 1 is not a red-team result"):
        redteam.read(tmp_path)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"eps": 4}, "eps 8 .now 4"), ({"budget": 4}, "budget 3"), ({"seed": 1}, "seed 0")],
)
def test_a_run_with_other_settings_is_refused(
    endpoint: Endpoint, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    options: dict[str, Any] = {"attacks": ["square"], "budget": 3}
    redteam.redteam(endpoint, pictures(40), tmp_path, **options)
    with pytest.raises(ValueError, match=f"{named}.* choose another --out"):
        redteam.redteam(endpoint, pictures(40), tmp_path, **options | changed)


def test_a_run_of_another_model_or_other_images_is_refused(
    toy: Toy, endpoint: Endpoint, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"attacks": ["square"], "budget": 3}
    redteam.redteam(endpoint, pictures(40), tmp_path, **options)
    with pytest.raises(ValueError, match="on other images: choose another --out"):
        redteam.redteam(endpoint, pictures(41), tmp_path, **options)
    toy.labels = (*CLASSES[1::-1], *CLASSES[2:])
    for attack in ("square", "simba"):
        with pytest.raises(
            ValueError, match="another model with the same name and version: choose"
        ):
            redteam.redteam(endpoint, pictures(40), tmp_path, **options | {"attacks": [attack]})
    assert len(redteam.read(tmp_path)) == 1
    toy.labels = CLASSES
    probe = probe_of(endpoint, 40)
    toy.version = "2.0"
    with pytest.raises(ValueError, match=r"version 1\.0 \(now 2\.0\): choose another --out"):
        redteam.redteam(endpoint, pictures(40), tmp_path, **options)
    with pytest.raises(ValueError, match=r"now serves toy 2\.0"):
        send(probe, flat(40))


@pytest.mark.parametrize(
    ("was", "now", "alike"),
    [
        ([[3, 0.6], [1, 0.3]], ((3, 0.6004), (1, 0.2996)), True),
        ([[3, 0.6], [1, 0.2]], ((3, 0.6), (2, 0.2004)), True),
        ([[3, 0.6], [1, 0.3]], ((3, 0.6), (2, 0.2)), False),
        ([[3, 0.6]], ((3, 0.61),), False),
        ([], ((3, 0.6),), True),
        ([[3, 0.6]], (), True),
    ],
)
def test_a_model_is_known_by_what_it_says_of_an_image_but_for_rounding(
    was: list[list[float]], now: tuple[tuple[int, float], ...], alike: bool
) -> None:
    assert _alike(was, now) is alike


def test_only_loopback_is_attacked_without_a_word() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.1 is not this machine.*--i-own-this-endp"):
        Endpoint("http://192.0.2.1:8080/predictions/toy", CLASSES)
    assert Endpoint("http://192.0.2.1:8080/predictions/toy", CLASSES, owned=True).owned
    assert not Endpoint("http://localhost:8080/predictions/toy", CLASSES).owned
    assert not Endpoint("http://[::1]:8080/predictions/toy", CLASSES).owned


@pytest.mark.parametrize("url", ["127.0.0.1:8080/predictions/toy", "file:///etc/passwd", "http://"])
def test_a_url_of_nothing_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL like http://"):
        Endpoint(url, CLASSES)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("tyo", "status 404: Model not found: tyo"),
        ("moved", "status 302: moved"),
        ("other", 'does not return a Rampart verdict, but {"hello": "world"}'),
    ],
)
def test_a_wrong_url_is_told_by_what_it_answers(toy: Toy, path: str, says: str) -> None:
    endpoint = Endpoint(toy.url.replace("toy", path), CLASSES)
    with pytest.raises(ValueError, match=says):
        endpoint.ask(flat(40)[None])
    assert toy.seen == []


def test_an_unknown_label_is_named(toy: Toy, endpoint: Endpoint, tmp_path: Path) -> None:
    toy.labels = ("night", *CLASSES[1:])
    with pytest.raises(ValueError, match=r"'night', which is not a class .*dark, bright"):
        redteam.redteam(endpoint, pictures(40), tmp_path)


def test_a_server_that_is_down_is_named() -> None:
    with Toy() as gone:
        url = gone.url
    with pytest.raises(ConnectionError, match=r"toy does not answer .*refused.*rampart serve"):
        Endpoint(url, CLASSES).ask(flat(40)[None])


def test_without_art_the_command_that_installs_it_is_named(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "art", None)
    with pytest.raises(ValueError, match=r"make \.venv/dev"):
        redteam.redteam(endpoint, pictures(40), tmp_path)


def test_an_unknown_attack_is_told_which_there_are(endpoint: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose among square, simba"):
        redteam.redteam(endpoint, pictures(40), tmp_path, attacks=["triangle"])


@pytest.mark.parametrize("wrong", [{"eps": 0}, {"budget": 0}, {"limit": 0}])
def test_numbers_below_one_are_refused(
    endpoint: Endpoint, tmp_path: Path, wrong: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        redteam.redteam(endpoint, pictures(40), tmp_path, **wrong)


def outcomes(*, eps: int = 8, name: str = "square") -> list[Outcome]:
    """Four images: wrong when clean, fooled at queries 10 and 30, and not at all."""
    settings = Settings("http://127.0.0.1/predictions/toy", "toy", "1.0", eps, 100, 0)
    rows = [(1, 1, 0), (10, 10, 8), (32, 30, 7), (100, None, 21)]
    return [
        Outcome(settings, name, index, "", "dark", queries, success, success == 1, near)
        for index, (queries, success, near) in enumerate(rows)
    ]


def test_the_curve_is_the_share_fooled_by_each_query() -> None:
    queries, share = report.curve(outcomes())
    at = dict(zip(queries.tolist(), share.tolist(), strict=True))
    assert (at[1], at[9], at[10], at[29], at[30], at[100]) == (0.25, 0.25, 0.5, 0.5, 0.75, 0.75)
    assert max(at) == 100


def test_the_summary_tells_clean_errors_from_fooled_images() -> None:
    text = report.summary(outcomes(name="simba") + outcomes())
    first, second = text.splitlines()
    assert first.startswith("square")
    assert second.startswith("simba")
    assert "75.0% of 4 images fooled" in first
    assert (
        "1 wrong when clean, 2 by the attack after 20 queries (median); nearest at 7/255" in first
    )


def test_the_query_that_gives_an_attack_away_is_kept_and_told(
    toy: Toy, endpoint: Endpoint, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "queries"), entries=1_000, expiry=600)
    toy.watch = Watch(store, "toy", response="alert", expiry=600)
    texture = np.random.default_rng(0).integers(0, 100, (1, 32, 32, 3)).astype(np.uint8)
    images = Images(torch.from_numpy(texture), torch.zeros(1).long(), CLASSES)
    (outcome,) = redteam.redteam(endpoint, images, tmp_path, attacks=["simba"], budget=30)
    assert outcome.noticed is not None and 2 <= outcome.noticed <= 10
    assert redteam.read(tmp_path) == [outcome]
    text = report.summary([outcome])
    assert text.endswith(f"noticed on 1, at query {outcome.noticed} (median)")


@pytest.mark.parametrize("attack", ["square", "oars"])
def test_an_attack_goes_on_though_it_is_throttled(
    toy: Toy, endpoint: Endpoint, tmp_path: Path, attack: str
) -> None:
    store = open_store(str(tmp_path / "queries"), entries=1_000, expiry=600)
    toy.watch = Watch(store, "toy", response="throttle", expiry=600)
    texture = np.random.default_rng(0).integers(0, 100, (1, 32, 32, 3)).astype(np.uint8)
    images = Images(torch.from_numpy(texture), torch.zeros(1).long(), CLASSES)
    (outcome,) = redteam.redteam(endpoint, images, tmp_path, attacks=[attack], budget=30)
    assert outcome.queries == 30 and outcome.noticed is not None


def test_the_picture_shows_two_runs_of_one_eps(tmp_path: Path) -> None:
    some = [outcome for name in ATTACKS for outcome in outcomes(name=name)]
    one = report.picture({"defended": some}, tmp_path / "one.png").read_bytes()
    two = report.picture({"defended": some, "bare": outcomes()}, tmp_path / "two.png").read_bytes()
    assert one != two
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.width == 1000
    with pytest.raises(ValueError, match=r"different eps \[4, 8\] in one"):
        report.picture({"a": some, "b": outcomes(eps=4)}, tmp_path / "no.png")
    with pytest.raises(ValueError, match="no outcomes in a"):
        report.picture({"a": [], "b": some}, tmp_path / "no.png")


def test_every_attack_has_a_look_of_its_own() -> None:
    assert list(report.LOOKS) == list(ATTACKS)
    assert len(set(report.LOOKS.values())) == len(ATTACKS)


def test_figures_go_into_the_card_and_evidence_fills_its_black_box_rows_from_them(
    toy: Toy, tmp_path: Path
) -> None:
    model = Path(shutil.copytree("model_store/traffic-signs", tmp_path / "signs"))
    images = pictures(100, 124, 140, 200)
    label = torch.tensor([0, 0, 1, 0])  # the last one is wrong when clean
    arrays = {"image": images.image, "label": label, "classes": images.classes}
    np.savez(tmp_path / "few.npz", **arrays)
    words = ["redteam", toy.url, tmp_path / "few.npz", "--out", tmp_path / "out", "--queries", 20]
    words += ["--attack", "square", "--into-card", model]
    with pytest.raises(ValueError, match=r"serves toy, and .*signs is traffic-signs: pass"):
        run(*words)
    assert "redteam" not in read_card(model)
    asked = len(toy.seen)
    write_card(model, read_card(model) | {"model": "toy"})
    run(*words)
    assert len(toy.seen) == asked + 1  # which model it is, and no attack again
    (row,) = read_card(model)["redteam"]
    assert (row["attack"], row["n"], row["eps"], row["queries"]) == ("square", 4, "8/255", 20)
    assert row["fooled"] == {"value": 0.25, "interval": [0.0456, 0.6994]}
    page = html.unescape(evidence(model))
    line = "square: 25.0% (4.6% to 69.9%) of images fooled, n = 4, Linf 8/255, up to 20 queries"
    assert page.count(line) == 3  # as a figure, for MITRE ATLAS and for NIST
    assert row["command"] in page
    run(*words[:-2], "--out", tmp_path / "third", "--target", "third", "--into-card", model)
    first, second = read_card(model)["redteam"]
    assert first == row and second["target"] == "third" and second["fooled"]["value"] == 0
