"""Open Inference Protocol v2 over gRPC: translates between its messages and lanes of requests."""

import json
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode

from rampart.handlers.errors import ImageError
from rampart.handlers.http.admission import Admission, Refusal
from rampart.handlers.http.arrivals import Arrivals
from rampart.handlers.http.lane import ANSWER_SECONDS
from rampart.handlers.http.messages import CLASSES, SERVICE
from rampart.handlers.http.metadata import SERVER, Models, find, tensors
from rampart.handlers.image import check_count
from rampart.handlers.protocols.choice import MAX_NUMBERS
from rampart.handlers.protocols.content_encoding import MAX_BODY
from rampart.handlers.protocols.open_inference import wrong
from rampart.handlers.types import Incoming, Reply

MAX_LISTED = 16  # inputs, outputs, raw contents, or sides of a shape: checked before they are read
MAX_FIELDS = 256  # of a message: an empty one of two bytes takes eighty when it is parsed
OPEN = {f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady"}  # need no token, as over HTTP
STATUSES = {
    401: StatusCode.UNAUTHENTICATED,
    404: StatusCode.NOT_FOUND,
    429: StatusCode.RESOURCE_EXHAUSTED,
    500: StatusCode.INTERNAL,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
NO_MESSAGE = ImageError(
    400, "malformed_message", "this is not exactly one message of this method: send it again"
)
# A client that is silent or that never ends is let go.
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_connection_age_ms", 600_000),
    ("grpc.max_connection_age_grace_ms", 30_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.so_reuseport", 1),  # all workers listen
    ("grpc.http2.bdp_probe", 0),  # it would let windows grow, and with them what calls hold
)
# How an element of an output is packed, and where it stands unpacked.
PACKED = {"INT64": "<q", "FP32": "<f"}
FIELDS = {"INT64": "int64_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
Context = Any  # grpc.aio.ServicerContext


def listen(
    models: Models, address: str, admission: Admission | None, certificate: Path | None
) -> Any:
    """A grpc.aio.Server on `address`, not yet started; with `admission` for those it lets in.

    A file with a certificate chain and its key, PEM, has it speak TLS. Raises OSError.
    """
    interceptors = [Gate(admission)] if admission else []
    server = grpc.aio.server(options=OPTIONS, interceptors=interceptors)
    server.add_generic_rpc_handlers((Servicer(models, admission).handlers(),))
    try:
        if certificate:
            pair = certificate.read_bytes()
            server.add_secure_port(address, grpc.ssl_server_credentials([(pair, pair)]))
        else:
            server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {address}: choose another --grpc-port") from error
    return server


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets those in who have a token, before it reads what they send."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def intercept_service(self, continuation: Any, call: Any) -> Any:
        """As grpc.aio calls it."""
        token = _token(call.invocation_metadata)
        if call.method not in OPEN and (refusal := self._admission.refusal(token)):
            return _refusing(refusal)
        return await continuation(call)


def _token(metadata: Any) -> bytes:
    sent: str | bytes = dict(metadata or ()).get("authorization", "")
    return sent if isinstance(sent, bytes) else sent.encode()


def _refusing(refusal: Refusal) -> Any:
    """A method that refuses. One that takes a stream is called before a message has come."""
    error, headers = refusal

    async def refuse(_: Any, context: Context) -> None:
        await _abort(context, error.code, error.to_dict(), [*headers.items()])

    return grpc.stream_stream_rpc_method_handler(refuse)


class Servicer:
    """What answers each method."""

    def __init__(self, models: Models, admission: Admission | None) -> None:
        self._models, self._admission = models, admission
        self._arrivals = Arrivals()

    def handlers(self) -> Any:
        """All methods, as grpc takes them."""
        methods: dict[str, Callable[[Any, Context], Awaitable[Any]]] = {
            "ServerLive": self.live,
            "ServerReady": self.ready,
            "ServerMetadata": self.server,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model,
            "ModelInfer": self.infer,
        }
        known = {
            name: grpc.stream_stream_rpc_method_handler(
                self._respond(method, CLASSES[f"{name}Request"]),
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name, method in methods.items()
        }
        known["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.stream, response_serializer=CLASSES["ModelStreamInferResponse"].SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, known)

    def _respond(
        self, method: Callable[[Any, Context], Awaitable[Any]], kind: Any
    ) -> Callable[[Any, Context], Awaitable[None]]:
        """One message in, one out; ours to read when there is room, so it is called a stream."""

        async def respond(_: Any, context: Context) -> None:
            try:
                read = self._arrivals.read(context.read, context.peer())
                answer = await method(_parsed(kind, await read), context)
            except ImageError as error:
                await _abort(context, error.code, error.to_dict())
            await context.write(answer)

        return respond

    async def live(self, *_: Any) -> Any:
        """Whether every model's thread runs."""
        alive = all(lane.alive() for lane in self._models.values())
        return CLASSES["ServerLiveResponse"](live=alive)

    async def ready(self, *_: Any) -> Any:
        """Whether every model answers."""
        alive = all(lane.alive() for lane in self._models.values())
        return CLASSES["ServerReadyResponse"](ready=alive)

    async def server(self, *_: Any) -> Any:
        """The server."""
        return CLASSES["ServerMetadataResponse"](**SERVER)

    async def model_ready(self, request: Any, _: Context) -> Any:
        """Whether one model answers; one that is not there does not."""
        try:
            alive = find(self._models, request.name, request.version).alive()
        except ImageError:
            alive = False
        return CLASSES["ModelReadyResponse"](ready=alive)

    async def model(self, request: Any, _: Context) -> Any:
        """A model and its tensors."""
        content = tensors(self._models, request.name, request.version)
        return CLASSES["ModelMetadataResponse"](**content)

    async def infer(self, request: Any, context: Context) -> Any:
        """Verdicts on the images of a request."""
        raw = bool(request.raw_input_contents)
        answer = self._answer(request, context)
        del request  # its pictures need be held but once while they wait
        reply = await answer
        headers = [item for item in reply.headers.items() if item[0] != "content-type"]
        content = json.loads(reply.body)
        if reply.status != 200:
            await _abort(context, reply.status, content, headers)
        context.set_trailing_metadata(tuple(headers))
        return as_message(content, raw=raw)

    async def stream(self, _: Any, context: Context) -> None:
        """Answers to one request after the other, as long as they come; an error ends none."""
        first = True
        while True:
            try:
                data = await self._arrivals.read(context.read, context.peer())
                if data is grpc.aio.EOF:
                    return
                answer, raw, reply = self._begun(data, context, first=first)
            except ImageError as error:
                await _abort(context, error.code, error.to_dict())
            first, data = False, b""  # what was sent is held no longer than it must
            try:
                message = {"infer_response": _streamed(await reply, raw=raw)}
            except ImageError as error:
                message = {"error_message": error.message, "infer_response": answer}
            await context.write(CLASSES["ModelStreamInferResponse"](**message))

    def _begun(
        self, data: Any, context: Context, *, first: bool
    ) -> tuple[dict[str, str], bool, Awaitable[Reply]]:
        """What one message of a stream is called, whether it is raw, and its reply.

        Raises ImageError where it is no message.
        """
        request = _parsed(CLASSES["ModelInferRequest"], data)
        try:
            if not first:
                self._admit(context)  # the first came in with the call
            reply = self._answer(request, context)
        except ImageError as error:
            reply = _failed(error)
        names = {"id": request.id, "model_name": request.model_name}
        return names, bool(request.raw_input_contents), reply

    def _admit(self, context: Context) -> None:
        """Count one more request of a call. Raises ImageError."""
        if not self._admission:
            return
        if refusal := self._admission.refusal(_token(context.invocation_metadata())):
            raise refusal.error.bare()

    def _answer(self, request: Any, context: Context) -> Awaitable[Reply]:
        """What is over HTTP the reply to a request, which need not be held for it.

        Raises ImageError.
        """
        lane = find(self._models, request.model_name, request.model_version)
        sent = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
        try:
            incoming = as_http(request, sent)
        except ImageError as error:
            return _at_once(lane.service.refuse(Incoming(sent, ()), error))
        left = context.time_remaining()
        seconds = ANSWER_SECONDS if left is None else min(ANSWER_SECONDS, left)
        return lane.answer(incoming, seconds=seconds)


async def _at_once(reply: Reply) -> Reply:
    return reply


async def _failed(error: ImageError) -> Reply:
    raise error


def _streamed(reply: Reply, *, raw: bool) -> Any:
    """The answer of a stream to one request. Raises ImageError."""
    content = json.loads(reply.body)
    if reply.status != 200:
        raise ImageError(reply.status, content["type"], content["message"])
    return as_message(content, raw=raw)


def _parsed(kind: Any, data: Any) -> Any:
    """A message of `kind`. Raises ImageError."""
    if isinstance(data, bytes) and _crowded(data):
        raise wrong("the request must have exactly one input, few dimensions and few outputs")
    try:
        return kind.FromString(data)
    except (DecodeError, TypeError):  # the latter where the stream ended without one
        raise NO_MESSAGE.bare() from None


def _crowded(data: bytes) -> bool:
    """Whether a message has too many fields to be parsed; one that is none has not."""
    position, fields = 0, 0
    try:
        while position < len(data) and fields <= MAX_FIELDS:
            fields += 1
            tag, position = _varint(data, position)
            match tag & 7:
                case 0:
                    _, position = _varint(data, position)
                case 1:
                    position += 8
                case 2:
                    length, position = _varint(data, position)
                    position += length
                case 5:
                    position += 4
                case _:
                    return False
    except IndexError:
        return False
    return fields > MAX_FIELDS


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number as protobuf writes it, and where it ends."""
    number = shift = 0
    while True:
        number |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if data[position - 1] < 128 or shift > 63:
            return number, position


async def _abort(
    context: Context,
    code: int,
    error: Mapping[str, Any],
    headers: Sequence[tuple[str, str]] = (),
) -> None:
    kind = ("error-type", str(error["type"]))
    await context.abort(
        status_of(code), error["message"], (kind, ("http-status", str(code)), *headers)
    )


def status_of(code: int) -> StatusCode:
    """The status of gRPC that stands for one of HTTP."""
    return STATUSES.get(code, StatusCode.INVALID_ARGUMENT)


def as_http(request: Any, headers: Mapping[str, str]) -> Incoming:
    """A ModelInferRequest as the same request over HTTP with binary tensors. Raises ImageError."""
    listed = (request.inputs, request.outputs, request.raw_input_contents)
    listed += tuple(tensor.shape for tensor in request.inputs[:1])
    if len(request.inputs) != 1 or any(len(items) > MAX_LISTED for items in listed):
        raise wrong("the request must have exactly one input, few dimensions and few outputs")
    (tensor,) = request.inputs
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    content = {
        "inputs": [entry],
        "outputs": [{"name": output.name} for output in request.outputs],
        **({"id": request.id} if request.id else {}),
    }
    head = json.dumps(content).encode()
    data = b"".join([head, *(request.raw_input_contents or _packed(tensor))])
    length = {"inference-header-content-length": str(len(head))}
    return Incoming({**headers, **length}, [data], "v2")


def _packed(tensor: Any) -> list[bytes]:
    """The contents of a tensor as a client packs them raw. Raises ImageError."""
    if tensor.datatype == "BYTES":
        elements = tensor.contents.bytes_contents
        check_count(len(elements))  # a message has room for millions of empty ones
        return [part for item in elements for part in (len(item).to_bytes(4, "little"), item)]
    numbers = tensor.contents.uint_contents
    if len(numbers) > MAX_NUMBERS:
        raise wrong("its data has too many numbers: send raw contents")
    try:
        return [bytes(numbers)]
    except ValueError:  # a number beyond those of a byte
        raise wrong("its data is not whole numbers from 0 to 255") from None


def as_message(content: Mapping[str, Any], *, raw: bool) -> Any:
    """An answer over HTTP as a ModelInferResponse; its contents are raw where the request's are."""
    message = CLASSES["ModelInferResponse"](
        **{name: content[name] for name in ("model_name", "model_version", "id") if name in content}
    )
    for output in content["outputs"]:
        kind, data = output["datatype"], output["data"]
        values = [text.encode() for text in data] if kind == "BYTES" else data
        tensor = message.outputs.add(name=output["name"], datatype=kind, shape=output["shape"])
        if raw:
            message.raw_output_contents.append(b"".join(_element(kind, one) for one in values))
        else:
            getattr(tensor.contents, FIELDS[kind]).extend(values)
    return message


def _element(kind: str, value: Any) -> bytes:
    if kind == "BYTES":
        return len(value).to_bytes(4, "little") + bytes(value)
    return struct.pack(PACKED[kind], value)
