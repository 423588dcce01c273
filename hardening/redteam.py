"""Black-box attacks on a running endpoint: what somebody achieves who sees only its answers.

The attacks but `oars` are ART's (adversarial-robustness-toolbox 1.20.1); what is sent, counted and
called a success is ours. Sent are 8-bit PNGs, each counts as one query, and an image is fooled by
the first one inside the Linf ball that comes back accepted under a wrong label. An answer is
remembered, so nothing is sent twice: ART asks for the same image up to three times in a row.

Sources: Square, Andriushchenko et al. 2020; SimBA, Guo et al. 2019; HopSkipJump, Chen et al. 2020;
Boundary, Brendel et al. 2018; OARS, Feng et al. 2023; palette of the picture, Okabe and Ito 2008.
"""

import base64
import hashlib
import http.client
import importlib
import ipaddress
import json
import socket
import statistics
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from handlers.image import MAX_IMAGES
from hardening.data import Images
from hardening.metrics import wilson

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]

FILE = "queries.jsonl"
STARTS = 100
SIMILAR = "similar_query"  # how the endpoint calls what it throttles
UNNAMED = ("", "")  # a throttled answer tells no model
# An attack that asks so often in a row for what it has already been told is going in circles.
MAX_REPEATS = 200


class Answer(NamedTuple):
    """What the endpoint says of one image; `label` is None where it flags or rejects it.

    `top` are (class index, confidence) pairs, `model` is (name, version); `similar` where it takes
    the image for part of a query attack, and shows that.
    """

    label: int | None
    top: tuple[tuple[int, float], ...]
    model: tuple[str, str]
    similar: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Where to send images, and the `classes` that its labels are to be found in.

    Raises ValueError for a URL that is not of a prediction, and for a host other than loopback
    unless it is `owned`: attacking somebody else's endpoint is a crime in most places.
    """

    url: str
    classes: tuple[str, ...]
    owned: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url} is no URL as http://127.0.0.1:8080/predictions/NAME")
        if not self.owned and not _is_loopback(parts.hostname, parts.port):
            raise ValueError(
                f"{parts.hostname} is not this machine: attack only what is yours, and say so with"
                " --i-own-this-endpoint"
            )

    def ask(self, images: Pixels) -> list[Answer]:
        """The answers for uint8 (N, H, W, 3), N up to MAX_IMAGES, sent in one request.

        Raises ConnectionError where nobody answers, and ValueError that quotes any answer but
        N verdicts under known labels.
        """
        instances = [{"b64": base64.b64encode(_png(image)).decode()} for image in images]
        status, text = self._post(json.dumps({"instances": instances}))
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        throttled = isinstance(body, dict) and body.get("type") == SIMILAR
        if (status != 200 and not throttled) or not isinstance(body, dict):
            said = body.get("message", text) if isinstance(body, dict) else text
            raise ValueError(f"{self.url} answers with status {status}: {_short(said)}")
        found = body.get("predictions", [body])  # a single image's verdict comes without a list
        if not isinstance(found, list) or len(found) != len(images):
            raise ValueError(f"{self.url} does not answer {len(images)} images: {_short(text)}")
        return [self._parse(verdict) for verdict in found]

    def _post(self, body: str) -> tuple[int, str]:
        """Status and text. Neither proxies nor redirects, which might lead to another machine."""
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with closing(kind(str(parts.hostname), parts.port, timeout=60)) as connection:
                connection.request("POST", target, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                return response.status, response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"{self.url} does not answer ({error or type(error).__name__}): is it running?"
                " `rampart serve` starts one"
            ) from error

    def _parse(self, verdict: Mapping[str, Any]) -> Answer:
        if verdict.get("type") == SIMILAR:
            return Answer(None, (), UNNAMED, similar=True)
        try:
            accepted = verdict["decision"] == "accept"
            top = tuple((self._index(t["label"]), float(t["confidence"])) for t in verdict["top"])
            model = (str(verdict["model"]["name"]), str(verdict["model"]["version"]))
            similar = bool((verdict.get("detail") or {}).get("similar_query"))
            return Answer(self._index(verdict["label"]) if accepted else None, top, model, similar)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.url} gives no verdict of Rampart's but: {_short(json.dumps(verdict))}"
            ) from error

    def _index(self, label: str) -> int:
        if label not in self.classes:
            raise ValueError(
                f"{self.url} answers {label!r}, which is no class of these images"
                f" ({_short(', '.join(self.classes))}): take images with the model's classes"
            )
        return self.classes.index(label)


def _is_loopback(host: str, port: int | None) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, port)}
    except OSError as error:
        raise ValueError(f"no machine is called {host}: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in found)


def _png(image: Pixels) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 200 else words[:200] + " ..."


SAME = 0.001  # confidences that differ by less may be one model's


@dataclass(frozen=True)
class Settings:
    """What a run was made with; `eps` is n/255, `budget` the queries an image may cost.

    `said` is what the endpoint said of the first image, class and confidence: another model says
    something else, whatever it is called.
    """

    endpoint: str
    model: str
    version: str
    eps: int
    budget: int
    seed: int
    said: Sequence[Sequence[float]] = ()


@dataclass(frozen=True)
class Outcome:
    """What one attack did to one image.

    `queries` were sent; number `success` was the first to fool inside the ball, None if none did.
    `clean_wrong` tells that this was the image itself. `distance` is the smallest Linf distance, in
    n/255, of any fooling image, inside the ball or not. `index` is the row in the data set.
    `noticed` is the first query that the endpoint took for part of an attack, where it shows that.
    """

    settings: Settings
    attack: str
    index: int
    sha256: str
    label: str
    queries: int
    success: int | None
    clean_wrong: bool
    distance: int | None
    noticed: int | None = None


class _Over(Exception):
    """The attack on this image ends: it is fooled, its budget spent, or nothing new is asked."""


class Probe:
    """One image under attack: answers what the attack asks, counts, and ends it with _Over.

    `image` uint8 (H, W, 3) has the true `label`. Called with float (N, 3, H, W) in [0, 1] it gives
    probabilities (N, K), as ART's black-box classifier wants them.
    """

    def __init__(self, endpoint: Endpoint, image: Pixels, label: int, settings: Settings) -> None:
        self.endpoint, self.image, self.label, self.settings = endpoint, image, label, settings
        self.queries = 0
        self.success: int | None = None
        self.distance: int | None = None
        self.noticed: int | None = None
        self.refused = False  # the last image that was sent
        self._told: dict[bytes, Floats] = {}
        self._repeats = 0

    @property
    def x(self) -> Floats:
        """The image itself as ART takes it, float32 (1, 3, H, W)."""
        return as_float(self.image)

    @property
    def one_hot(self) -> Floats:
        """The true label as probabilities (1, K)."""
        rows: Floats = np.eye(len(self.endpoint.classes))[[self.label]]
        return rows

    def __call__(self, x: Floats) -> Floats:
        """Probabilities (N, K); sends what was not sent before. Raises _Over."""
        images = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        keys = [image.tobytes() for image in images]
        asked = dict(zip(keys, images, strict=True))
        new = [image for key, image in asked.items() if key not in self._told]
        self._repeats = 0 if new else self._repeats + 1
        if self._repeats > MAX_REPEATS:
            raise _Over
        for first in range(0, len(new), MAX_IMAGES):
            self._send(new[first : first + MAX_IMAGES])
        return np.stack([self._told[key] for key in keys])

    def _send(self, images: Sequence[Pixels]) -> None:
        affordable = images[: self.settings.budget - self.queries]
        answers = self.endpoint.ask(np.stack(affordable)) if affordable else []
        for image, answer in zip(affordable, answers, strict=True):
            self._count(image, answer)
        if self.success is not None or len(affordable) < len(images):
            raise _Over

    def _count(self, image: Pixels, answer: Answer) -> None:
        if answer.model not in (UNNAMED, (self.settings.model, self.settings.version)):
            raise ValueError(
                f"{self.endpoint.url} answers as {' '.join(answer.model)} now, and began as"
                f" {self.settings.model} {self.settings.version}: choose another --out"
            )
        self.queries += 1
        self.refused = answer.label is None
        if answer.similar and self.noticed is None:
            self.noticed = self.queries
        self._told[image.tobytes()] = scores(answer, self.label, len(self.endpoint.classes))
        if answer.label is None or answer.label == self.label:
            return
        distance = int(np.abs(image.astype(int) - self.image).max())
        self.distance = distance if self.distance is None else min(self.distance, distance)
        if distance <= self.settings.eps and self.success is None:
            self.success = self.queries


def as_float(image: Pixels) -> Floats:
    """Uint8 (H, W, 3) to float32 (1, 3, H, W) in [0, 1]."""
    return (image.astype(np.float32) / 255).transpose(2, 0, 1)[None]


def scores(answer: Answer, label: int, classes: int) -> Floats:
    """An answer as probabilities (K,) that an attack can follow.

    What the top classes leave is spread evenly over the others. Where the endpoint is not fooled
    because it flags or rejects, all goes to the true `label`: to an attack, a failure.
    """
    top = {label: 1.0} if answer.label is None else dict(answer.top)
    rest = max(0.0, 1 - sum(top.values())) / max(1, classes - len(top))
    spread = np.array([top.get(index, rest) for index in range(classes)])
    result: Floats = spread / spread.sum()
    return result


def starts(images: Images, label: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Where decision-based attacks may begin: float32 (1, 3, H, W), images of other classes first.

    ART begins in noise only, drawn without a seed, and detectors flag noise.
    """
    others = np.flatnonzero(images.label.numpy() != label)
    for row in generator.permutation(others)[:STARTS]:
        yield as_float(images.image[int(row)].numpy())
    _, height, width, _ = images.image.shape
    for _ in range(STARTS):
        yield generator.random((1, 3, height, width), dtype=np.float32)


def _first_adversarial(probe: Probe, begin: Iterator[Floats]) -> Floats | None:
    """The first start that the endpoint accepts under a wrong label."""
    return next((x for x in begin if probe(x)[0].argmax() != probe.label), None)


def _classifier(probe: Probe, predict: Callable[[Floats], Floats]) -> Any:
    """`predict` as ART's attacks take it."""
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    return BlackBoxClassifierNeuralNetwork(
        predict, probe.x.shape[1:], len(probe.endpoint.classes), clip_values=(0.0, 1.0)
    )


def square(probe: Probe, begin: Iterator[Floats]) -> None:
    """Square attack (Linf), which follows confidences; `begin` is unused."""
    from art.attacks.evasion import SquareAttack

    eps, budget = probe.settings.eps / 255, probe.settings.budget
    # An iteration costs one query; the squares shrink by the share of iterations that have gone.
    attack = SquareAttack(_classifier(probe, probe), eps=eps, max_iter=budget, verbose=False)
    attack.generate(probe.x, probe.one_hot)


def simba(probe: Probe, begin: Iterator[Floats]) -> None:
    """SimBA with low frequencies first, which follows confidences; `begin` is unused.

    SimBA knows no Linf ball, so every image is projected onto it before it is sent. One step is a
    cosine as high as the ball allows: of a unit step (H/2)-fold, since its peak is 2/H.
    """
    from art.attacks.evasion import SimBA

    eps = probe.settings.eps / 255
    low, high = probe.x - eps, probe.x + eps
    inside = _classifier(probe, lambda x: probe(np.clip(x, low, high)))
    step = eps * probe.image.shape[0] / 2
    attack = SimBA(inside, "dct", max_iter=probe.settings.budget, epsilon=step, verbose=False)
    attack.generate(probe.x, probe.one_hot)


def hopskipjump(probe: Probe, begin: Iterator[Floats]) -> None:
    """HopSkipJump (Linf), which follows decisions only."""
    from art.attacks.evasion import HopSkipJump

    start = _first_adversarial(probe, begin)
    if start is None:
        return
    classifier = _classifier(probe, probe)
    attack = HopSkipJump(classifier, norm=np.inf, max_iter=probe.settings.budget, verbose=False)
    # ART probes the boundary with noise of a hundredth of a level a pixel, which rounding to 8 bits
    # takes back; this noise has a standard deviation of two levels.
    noise = 2 / 255 * np.sqrt(probe.image.size)
    attack._compute_delta = lambda **_: noise
    attack.generate(probe.x, probe.one_hot, x_adv_init=start)


def boundary(probe: Probe, begin: Iterator[Floats]) -> None:
    """Boundary attack, which follows decisions only and reduces the L2 distance."""
    from art.attacks.evasion import BoundaryAttack

    start = _first_adversarial(probe, begin)
    if start is None:
        return
    attack = BoundaryAttack(
        _classifier(probe, probe), targeted=False, max_iter=probe.settings.budget, verbose=False
    )
    attack.generate(probe.x, probe.one_hot, x_adv_init=start)


def oars(probe: Probe, begin: Iterator[Floats]) -> None:
    """Random search that looks for the smallest steps which the endpoint still answers.

    Against detection of query attacks, after OARS (Feng et al., CCS 2023): a step that is not
    answered makes the next ones larger, one that is makes them smaller. A step sets some blocks of
    pixels to the ball's edge. Follows confidences; `begin` is unused.
    """
    eps, side = probe.settings.eps / 255, probe.image.shape[0]
    generator = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002  # seeded by _attack
    best, share = probe.x, 0.05
    lowest = probe(best)[0][probe.label]
    while True:
        blocks = int(generator.choice([side // 8, side // 4, side // 2, side]))
        signs = generator.choice([-eps, eps], (1, 3, blocks, blocks))
        signs *= generator.random((1, 1, blocks, blocks)) < share  # 0 stays as it was
        step = np.repeat(np.repeat(signs, side // blocks, 2), side // blocks, 3)
        step = np.pad(step, [(0, 0), (0, 0), *[(0, side - step.shape[2])] * 2])
        x = np.where(step != 0, np.clip(probe.x + step, 0, 1), best).astype(np.float32)
        confidence = probe(x)[0][probe.label]
        share = min(1.0, share * 1.2) if probe.refused else max(0.01, share * 0.98)
        if confidence < lowest:
            best, lowest = x, confidence


ATTACKS: dict[str, Callable[[Probe, Iterator[Floats]], None]] = {
    "square": square,
    "simba": simba,
    "hopskipjump": hopskipjump,
    "boundary": boundary,
    "oars": oars,
}


def redteam(
    endpoint: Endpoint,
    images: Images,
    out: Path,
    *,
    attacks: Sequence[str] = tuple(ATTACKS),
    limit: int = 50,
    eps: int = 8,
    budget: int = 1000,
    seed: int = 0,
) -> list[Outcome]:
    """Attack `limit` images, evenly spaced over all, each with up to `budget` queries an attack.

    Every finished image is a line of OUT/queries.jsonl, and a second run goes on from there. One
    request beyond the budget asks for the model's name. Raises ValueError for a run that was made
    with other settings, and what Endpoint.ask raises.
    """
    _require("art")
    if not set(attacks) <= set(ATTACKS):
        raise ValueError(f"no such attack: choose of {', '.join(ATTACKS)}")
    if min(eps, budget, limit) < 1:
        raise ValueError("eps, queries and limit must be at least 1")
    (hello,) = endpoint.ask(images.image[:1].numpy())
    known, said = (endpoint.url, *hello.model), [list(pair) for pair in hello.top]
    settings = Settings(*known, eps=eps, budget=budget, seed=seed, said=said)
    done = {(outcome.attack, outcome.index): outcome for outcome in _resume(out, settings)}
    count = min(limit, len(images))
    rows = [number * len(images) // count for number in range(count)]
    for name in attacks:
        for row in tqdm(rows, desc=name):
            old = done.get((name, row))
            if old is None:
                done[name, row] = _attack(name, row, endpoint, images, settings)
                _append(out, done[name, row])
            elif old.sha256 != _sha256(images, row):
                raise ValueError(f"{out / FILE} is of other images: choose another --out")
    return [done[name, row] for name in attacks for row in rows]


def _attack(name: str, row: int, endpoint: Endpoint, images: Images, settings: Settings) -> Outcome:
    """One attack on one image. The clean image is query 1; fooling by that needs no attack."""
    label = int(images.label[row])
    probe = Probe(endpoint, images.image[row].numpy(), label, settings)
    source = [settings.seed, zlib.crc32(name.encode()), row]
    # ART draws from numpy's global generator; a resumed run must draw what a whole one would.
    np.random.seed(source)  # noqa: NPY002
    with suppress(_Over):
        probe(probe.x)
        ATTACKS[name](probe, starts(images, label, np.random.default_rng(source)))
    return Outcome(
        settings,
        name,
        row,
        _sha256(images, row),
        images.classes[label],
        probe.queries,
        probe.success,
        clean_wrong=probe.success == 1,
        distance=probe.distance,
        noticed=probe.noticed,
    )


def _sha256(images: Images, row: int) -> str:
    return hashlib.sha256(images.image[row].numpy().tobytes()).hexdigest()


def read(out: Path) -> list[Outcome]:
    """The outcomes in OUT/queries.jsonl; none where there is no such file.

    A last line that a crash left torn is no outcome. Raises ValueError for other malformed lines.
    """
    file = out / FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [_outcome(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]


def _outcome(line: str, where: str) -> Outcome:
    try:
        content = json.loads(line)
        return Outcome(**content | {"settings": Settings(**content["settings"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is no outcome of a red team: {error}") from error


def _resume(out: Path, settings: Settings) -> list[Outcome]:
    """What is done already, and the file made ready for more lines."""
    outcomes = read(out)
    for outcome in outcomes:
        if replace(outcome.settings, said=settings.said) != settings:
            raise ValueError(
                f"{out / FILE} was made with {_differences(outcome.settings, settings)}: choose"
                " another --out"
            )
        if not _alike(outcome.settings.said, settings.said):
            raise ValueError(
                f"{out / FILE} is of another model, of the same name and version: choose another"
                " --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    return outcomes


def _alike(was: Sequence[Sequence[float]], now: Sequence[Sequence[float]]) -> bool:
    """Whether two answers to one image are one model's, which another CPU may compute a little
    differently; so is whatever was not said."""
    if not (was and now):
        return True
    one, other = ({int(index): share for index, share in pairs} for pairs in (was, now))
    # What is not among the first few is at most the last of them.
    last, least = min(one.values()), min(other.values())
    return all(abs(one.get(k, last) - other.get(k, least)) < SAME for k in one | other)


def _differences(old: Settings, new: Settings) -> str:
    now = asdict(replace(new, said=old.said))
    return ", ".join(f"{k} {was} (now {now[k]})" for k, was in asdict(old).items() if was != now[k])


def _append(out: Path, outcome: Outcome) -> None:
    with (out / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def _require(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"red teaming needs what `make .venv/dev` installs: run it first ({error})"
        ) from error


def by_attack(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of each attack, attacks in the order of ATTACKS."""
    groups = {name: [o for o in outcomes if o.attack == name] for name in ATTACKS}
    return {name: group for name, group in groups.items() if group}


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line of text an attack: images, share fooled with its interval, queries, distance."""
    return "\n".join(_line(name, group) for name, group in by_attack(outcomes).items())


def _line(name: str, outcomes: Sequence[Outcome]) -> str:
    n, clean = len(outcomes), sum(o.clean_wrong for o in outcomes)
    needed = [o.success for o in outcomes if o.success is not None and not o.clean_wrong]
    share = (clean + len(needed)) / n
    low, high = wilson(share, n)
    noticed = [o.noticed for o in outcomes if o.noticed is not None]
    distances = [o.distance for o in outcomes if o.distance is not None and not o.clean_wrong]
    return (
        f"{name:12} {share:.1%} of {n} images fooled ({low:.1%} to {high:.1%}): {clean} wrong when"
        f" clean, {len(needed)} by the attack"
        + (f" after {statistics.median(needed):g} queries (median)" if needed else "")
        + (
            f"; nearest at {min(distances)}/255, median {statistics.median(distances):g}/255"
            if distances
            else ""
        )
        + (
            f"; noticed on {len(noticed)}, at query {statistics.median(noticed):g} (median)"
            if noticed
            else ""
        )
    )


# Okabe and Ito's blue, vermilion, green, purple and orange, and a mark for each, for print without
# colour.
LOOKS = {
    "square": ("#0072B2", "o"),
    "simba": ("#D55E00", "s"),
    "hopskipjump": ("#009E73", "^"),
    "boundary": ("#CC79A7", "D"),
    "oars": ("#E69F00", "v"),
}
STROKES = ("-", "--", ":", "-.")


def picture(results: Mapping[str, Sequence[Outcome]], path: Path) -> Path:
    """Draw the share of images fooled against queries, as a PNG 1,000 pixels wide.

    `results` holds the outcomes of each run by the name that the legend gives it: a colour an
    attack, a stroke a run. Raises ValueError for a run without outcomes, or runs of unlike eps.
    """
    _require("matplotlib")
    from matplotlib.figure import Figure

    empty = [run for run, outcomes in results.items() if not outcomes]
    if empty or not results:
        raise ValueError(f"nothing to draw: no outcomes in {', '.join(empty) or 'no run'}")
    eps = {outcome.settings.eps for outcomes in results.values() for outcome in outcomes}
    if len(eps) != 1:
        raise ValueError(f"runs of eps {sorted(eps)} do not belong into one picture")
    figure = Figure(figsize=(10, 5.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for (run, outcomes), stroke in zip(results.items(), cycle(STROKES), strict=False):
        for name, group in by_attack(outcomes).items():
            _draw(axes, name, group, stroke=stroke, label=f"{name}, {run}")
    sizes = sorted({len(g) for outcomes in results.values() for g in by_attack(outcomes).values()})
    axes.set_title(f"Black-box attacks within Linf {eps.pop()}/255, n = {_span(sizes)} images")
    axes.set(xlabel="queries per image (1: the image itself, unattacked)", xscale="log")
    axes.set(ylabel="images accepted under a wrong label", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", handlelength=3.5)
    figure.savefig(path, format="png")
    return path


def _draw(axes: Any, name: str, outcomes: Sequence[Outcome], *, stroke: str, label: str) -> None:
    """One attack's curve; marks are staggered, so that curves which coincide still show."""
    colour, mark = LOOKS[name]
    every = ((list(LOOKS).index(name) + 1) / 40, 0.1)
    style = {"marker": mark, "markersize": 7, "markevery": every, "drawstyle": "steps-post"}
    axes.plot(*curve(outcomes), stroke, color=colour, label=label, **style)


def curve(outcomes: Sequence[Outcome]) -> tuple[Floats, Floats]:
    """(queries, share of the images that some query up to there fooled), from 1 to the budget."""
    budget = outcomes[0].settings.budget
    queries = np.unique(np.geomspace(1, budget, 400).round())
    solved = np.sort([o.success for o in outcomes if o.success is not None])
    return queries, np.searchsorted(solved, queries, side="right") / len(outcomes)


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
