"""HTTP of our own: an ASGI application that translates between HTTP and lanes of requests."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route as At

from rampart.handlers.errors import INTERNAL, ImageError
from rampart.handlers.explanation import IMAGES, wanted
from rampart.handlers.http import pages
from rampart.handlers.http.admission import Admission
from rampart.handlers.http.bodies import Bodies, parts
from rampart.handlers.http.exposition import Exposition
from rampart.handlers.http.lane import ANSWER_SECONDS, Lane
from rampart.handlers.http.metadata import SERVER, Models, find, tensors
from rampart.handlers.http.pages import Api
from rampart.handlers.types import Incoming, Reply, Route

TIMEOUT = "x-request-timeout-ms"  # a client's own
NOT_FOUND = ImageError(404, "not_found", "there is nothing at this address: / lists what there is")
NO_METHOD = ImageError(405, "method_not_allowed", "this address needs another method: see /")
NOT_READY = ImageError(503, "not_ready", "the model does not answer: try again later")
OPEN = {"/ping", "/v2/health/live", "/v2/health/ready"}  # need no token: a kubelet has none
Respond = Callable[[HTTPRequest], Awaitable[Response]]

REFUSED = (ImageError, HTTPException, ClientDisconnect, Exception)


def application(
    models: Models, exposition: Exposition, api: Api, admission: Admission | None = None
) -> Starlette:
    """The ASGI application of several models; with `admission` it answers those who have a token.

    `api` is the OpenAPI document that it shows.
    """
    app = Starlette(
        routes=_routes(Front(models, exposition, api)),
        exception_handlers=dict.fromkeys(REFUSED, _refusal),
    )
    app.router.redirect_slashes = False
    if admission:
        explains = any(lane.service.explains for lane in models.values())
        app.add_middleware(Gate, admission=admission, explains=explains)
    app.add_middleware(Unread)
    return app


def _routes(front: "Front") -> list["At"]:
    """Every path, with what answers there."""
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    uploads = {  # curl -T sends PUT
        "/predictions/{model}": front.predict("predictions"),
        "/predictions/{model}/{version}": front.predict("predictions"),
        "/explanations/{model}": front.predict("predictions", explain=True),
        "/explanations/{model}/{version}": front.predict("predictions", explain=True),
    }
    posts = {
        "/v1/models/{model}:predict": front.predict("v1"),
        "/v1/models/{model}:explain": front.predict("v1", explain=True),
        f"{model}/infer": front.predict("v2"),
        f"{version}/infer": front.predict("v2"),
    }
    gets = {
        "/": front.overview,
        "/docs": front.manual,
        "/openapi.json": front.api,
        "/ping": front.health,
        "/metrics": front.metrics,
        "/v1/models": front.names,
        "/v1/models/{model}": front.ready,
        "/v2": front.server,
        "/v2/health/live": front.health,
        "/v2/health/ready": front.health,
        model: front.metadata,
        version: front.metadata,
        f"{model}/ready": front.ready,
        f"{version}/ready": front.ready,
    }
    kinds = ((["POST", "PUT"], uploads), (["POST"], posts), (["GET"], gets))
    return [
        At(path, ask, methods=methods) for methods, paths in kinds for path, ask in paths.items()
    ]


class Gate:
    """Lets those in who have a token, as often as they may ask.

    An explanation, where there are some, counts as all the pictures that it takes.
    """

    def __init__(self, app: Any, admission: Admission, *, explains: bool) -> None:
        self._app, self._admission, self._explains = app, admission, explains

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI 3 calls it."""
        answer = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN:
            sent = dict(scope["headers"]).get(b"authorization", b"")
            dear = self._explains and _may_ask_why(scope)
            if refusal := self._admission.refusal(sent, IMAGES if dear else 1):
                answer = _error(*refusal)
        await answer(scope, receive, send)


class Unread:
    """Closes the connection of a request that is answered before its body has come."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI 3 calls it."""
        headers = dict(scope.get("headers", ()))
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def take() -> Any:
            nonlocal unread
            message = await receive()
            unread = unread and bool(message.get("more_body"))
            return message

        async def give(message: Any) -> None:
            if unread and message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self._app(scope, take, give)


class Front:
    """What answers at each address."""

    def __init__(self, models: Models, exposition: Exposition, api: Api) -> None:
        self._models, self._exposition, self._api = models, exposition, api
        self._bodies = Bodies()

    def predict(self, route: Route, *, explain: bool = False) -> Respond:
        """What answers predictions of one protocol's route; with `explain` they have reasons."""

        async def respond(request: HTTPRequest) -> Response:
            lane, headers = self._lane(request), dict(request.headers)
            try:
                body = await self._bodies.read(headers, request.stream())
                said = explain or wanted(request.query_params.get("explain", "false"))
                incoming = Incoming(headers, parts(headers, body), route, explain=said)
            except ImageError as error:
                return _response(lane.service.refuse(Incoming(headers, ()), error))
            return _response(await lane.answer(incoming, seconds=_patience(headers)))

        return respond

    def _lane(self, request: HTTPRequest) -> Lane:
        return find(self._models, **_model(request))

    async def overview(self, _: HTTPRequest) -> Response:
        """What there is, for people."""
        return HTMLResponse(pages.overview(list(self._models)), headers=pages.HEADERS)

    async def manual(self, _: HTTPRequest) -> Response:
        """What can be asked, for people."""
        return HTMLResponse(pages.manual(self._api), headers=pages.HEADERS)

    async def api(self, _: HTTPRequest) -> Response:
        """What can be asked, for programs."""
        return JSONResponse(self._api)

    async def health(self, _: HTTPRequest) -> Response:
        """Whether every model's thread is alive."""
        if not all(lane.alive() for lane in self._models.values()):
            raise NOT_READY.bare()
        return JSONResponse({"status": "Healthy", "live": True, "ready": True})

    async def metrics(self, _: HTTPRequest) -> Response:
        """Every figure of all workers, as Prometheus reads them."""
        return PlainTextResponse(self._exposition.text(), media_type=self._exposition.KIND)

    async def names(self, _: HTTPRequest) -> Response:
        """KServe v1's list of models."""
        return JSONResponse({"models": list(dict.fromkeys(name for name, _ in self._models))})

    async def ready(self, request: HTTPRequest) -> Response:
        """Whether one model answers."""
        if not self._lane(request).alive():
            raise NOT_READY.bare()
        return JSONResponse({"name": request.path_params["model"], "ready": True})

    async def server(self, _: HTTPRequest) -> Response:
        """Open Inference Protocol: the server."""
        return JSONResponse(SERVER)

    async def metadata(self, request: HTTPRequest) -> Response:
        """Open Inference Protocol: a model, its tensors, and what its card says in short."""
        card = self._lane(request).service.summary
        return JSONResponse({**tensors(self._models, **_model(request)), "card": card})


def _model(request: HTTPRequest) -> dict[str, Any]:
    """Which model an address names."""
    return {"name": request.path_params["model"], "version": request.path_params.get("version")}


def _may_ask_why(scope: Any) -> bool:
    """Whether a request is one for an explanation, before it is read."""
    path, query = scope["path"], QueryParams(scope["query_string"])
    by_path = "/explanations/" in path or path.endswith(":explain")
    return by_path or query.get("explain", "false") not in ("false", "0")


def _patience(headers: Mapping[str, str]) -> float:
    """Seconds for which a client waits, where it says so; no more than we have."""
    text = headers.get(TIMEOUT, "")
    known = re.fullmatch("[0-9]{1,9}", text)  # `isdigit` takes a superscript too, and any length
    return min(ANSWER_SECONDS, int(text) / 1000) if known else ANSWER_SECONDS


def _response(reply: Reply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers))


def _error(error: ImageError, headers: Mapping[str, str] | None = None) -> Response:
    body = json.dumps(error.to_dict()).encode() + b"\n"
    return Response(body, error.code, {"content-type": "application/json", **(headers or {})})


async def _refusal(_: HTTPRequest, error: Exception) -> Response:
    """A fault without a word of the request, of our code or of the libraries."""
    if isinstance(error, HTTPException):
        known = NO_METHOD if error.status_code == NO_METHOD.code else NOT_FOUND
        return _error(known, error.headers)
    return _error(error if isinstance(error, ImageError) else INTERNAL)
