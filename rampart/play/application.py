"""HTTP of the playground: a page, and what the page asks. Only this machine may ask."""

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rampart.handlers.errors import INTERNAL, ImageError
from rampart.handlers.http.application import Unread
from rampart.handlers.http.bodies import Bodies
from rampart.handlers.protocols.content_encoding import MAX_BODY
from rampart.launch.addresses import is_loopback
from rampart.play.attack import MAX_EPS, MAX_STEPS, Event, Order, Stopped, attack, refused
from rampart.play.bench import Bench, timed
from rampart.play.pictures import Offer
from rampart.play.scene_attack import SceneOrder
from rampart.play.scene_attack import attack as scene_attack
from rampart.play.scene_bench import SceneBench
from rampart.play.worker import Worker

# Whoever went away before the body was there needs no answer, and no traceback in the terminal.
REFUSED = (ImageError, HTTPException, ClientDisconnect, Exception)
PATIENCE = 2.0  # seconds for which an attack waits until one that was stopped has ended
# What is answered belongs to the page alone: no other may embed it, and no cache keeps it.
PRIVATE = (
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
ELSEWHERE = ImageError(
    403, "not_this_machine", "the playground answers only this machine: open http://127.0.0.1"
)
ANOTHER = ImageError(409, "attack_under_way", "another attack is running: stop it, or wait for it")
NOT_FOUND = ImageError(404, "not_found", "there is nothing at this address")
NO_METHOD = ImageError(405, "method_not_allowed", "this address takes another method")


def application(bench: Bench | SceneBench, pictures: Mapping[str, Offer]) -> Starlette:
    """The ASGI application that shows `bench` to one person, with `pictures` to pick from.

    `state.end()` ends an attack that is under way.
    """
    play = Play(bench, pictures)
    upload = ["POST", "PUT"]  # curl -T sends PUT
    app = Starlette(
        routes=[
            Route("/", play.page),
            Route("/api/model", play.model),
            Route("/api/pictures/{number:int}", play.picture),
            Route("/api/p-value", play.p_value),
            Route("/api/verdict", play.verdict, methods=upload),
            Route("/api/attack", play.attack, methods=upload),
        ],
        exception_handlers=dict.fromkeys(REFUSED, refusal),
        lifespan=play.lifespan,
    )
    app.state.end = play.end
    app.add_middleware(Guard)
    app.add_middleware(Unread)
    return app


class Guard:
    """Answers those who call this machine by a name of its own, and pages of its own.

    A name of somebody else's may lead here as well (DNS rebinding), and their pages may send here.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI 3 calls it."""
        answer = self._app
        if scope["type"] == "http" and not is_own(dict(scope["headers"])):
            answer = shown(ELSEWHERE)

        async def give(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *PRIVATE]
            await send(message)

        await answer(scope, receive, give)


def is_own(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request names this machine, and comes from no page of another one."""
    host = headers.get(b"host", b"").decode("latin-1")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    origin = headers.get(b"origin", b"").decode("latin-1")
    return is_loopback(name or "") and origin in ("", f"http://{host}")


class Play:
    """What answers at each address; one picture is judged at a time, and one attacked."""

    def __init__(self, bench: Bench | SceneBench, pictures: Mapping[str, Offer]) -> None:
        self._bench, self._pictures = bench, dict(pictures)
        scenes = isinstance(bench, SceneBench)
        self._order: Callable[..., Any] = SceneOrder.read if scenes else Order.read
        self._attack: Callable[..., Event] = scene_attack if scenes else attack
        self._bodies = Bodies()
        self._judge, self._attacker = Worker(), Worker()
        self._attacking, self._stop = asyncio.Lock(), threading.Event()
        html = files("rampart.play").joinpath("page.html").read_text(encoding="utf-8")
        self._page, self._headers = html, headers_for(html)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Waits when the server ends until nothing is under way."""
        yield
        self.end()
        for worker in (self._judge, self._attacker):
            await worker.do(int)  # what was begun has ended

    def end(self) -> None:
        """End an attack that is under way, at its next step."""
        self._stop.set()

    async def page(self, _: Request) -> Response:
        """The page itself; it loads nothing from elsewhere."""
        return HTMLResponse(self._page, headers=self._headers)

    async def model(self, _: Request) -> Response:
        """What the page has to know once."""
        limits = {"eps": MAX_EPS, "steps": MAX_STEPS, "bytes": MAX_BODY}
        pictures = [{"name": n, "drawn": offer.drawn} for n, offer in self._pictures.items()]
        return JSONResponse({**self._bench.described(), "pictures": pictures, "limits": limits})

    async def picture(self, request: Request) -> Response:
        """One of the pictures on offer."""
        number, seed = request.path_params["number"], request.query_params.get("seed", "0")
        if number >= len(self._pictures) or not re.fullmatch("[0-9]{1,9}", seed):
            raise NOT_FOUND.bare()
        data = list(self._pictures.values())[number].file(int(seed))
        return Response(data, media_type="image/jpeg" if data[:2] == b"\xff\xd8" else "image/png")

    async def p_value(self, request: Request) -> Response:
        """What the p-value would be with some detectors: `variant`, and the surprise of each."""
        query = dict(request.query_params)
        defence = self._bench.defences.get(query.pop("variant", ""))
        if defence is None or not set(query) <= set(defence.calibration.detectors):
            raise refused("name a variant, and detectors of it with their surprise")
        try:
            surprise = {name: float(text) for name, text in query.items()}
        except ValueError:
            raise refused("a surprise must be a number") from None
        if not all(0 <= value < float("inf") for value in surprise.values()):
            raise refused("a surprise must be a number of at least 0")
        chosen = defence.switched(surprise)
        flagged = chosen.p_value < defence.rate
        return JSONResponse({**chosen._asdict(), "decision": "flag" if flagged else "accept"})

    async def verdict(self, request: Request) -> Response:
        """What everybody says of the picture in the body."""
        image, milliseconds = await self._image(request)
        answers = await self._judge.do(self._bench.answers, image)
        found = {"decoded_in": milliseconds, "answers": answers}
        return JSONResponse(found | self._bench.seen(image))

    async def attack(self, request: Request) -> Response:
        """Attack the picture in the body: a line of JSON a step, then one of what came of it."""
        order = self._order(request.query_params, self._bench)
        image, _ = await self._image(request)
        if self._attacking.locked() and not self._stop.is_set():
            raise ANOTHER.bare()
        try:
            async with asyncio.timeout(PATIENCE):
                await self._attacking.acquire()
        except TimeoutError:
            raise ANOTHER.bare() from None
        return StreamingResponse(self._begin(image, order), media_type="application/x-ndjson")

    def _begin(self, image: Any, order: Any) -> AsyncIterator[str]:
        """Start an attack; its lines. Who stops reading them stops the attack."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()
        stop = self._stop = threading.Event()

        def tell(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                tell(self._attack(self._bench, image, order, tell, stop))
            except Stopped:
                pass
            except Exception as error:
                known = error if isinstance(error, ImageError) else INTERNAL
                tell({"kind": "error", **known.to_dict()})
            finally:
                tell(None)

        async def lines() -> AsyncIterator[str]:
            try:
                while (event := await events.get()) is not None:
                    yield json.dumps(event) + "\n"
            finally:
                stop.set()

        self._attacker.do(run).add_done_callback(lambda _: self._attacking.release())
        return lines()

    async def _image(self, request: Request) -> tuple[Any, float]:
        """What the model sees of the picture in the body, and milliseconds. Raises ImageError."""
        body = await self._bodies.read(dict(request.headers), request.stream())
        found: tuple[Any, float] = await self._judge.do(timed, self._bench.see, body)
        return found


def headers_for(html: str) -> dict[str, str]:
    """Headers that let the page run its own script and ask this server, and nothing else."""
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    return {
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; connect-src"
        f" 'self'; img-src 'self' data: blob:; script-src 'sha256-{digest}'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
    }


def shown(error: ImageError) -> Response:
    """An error as JSON."""
    return JSONResponse(error.to_dict(), error.code)


async def refusal(_: Request, error: Exception) -> Response:
    """A fault without a word of the request, of our code or of a path."""
    if isinstance(error, HTTPException):
        return shown(NO_METHOD if error.status_code == NO_METHOD.code else NOT_FOUND)
    return shown(error if isinstance(error, ImageError) else INTERNAL)
