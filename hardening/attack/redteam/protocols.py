"""How servers are asked, and where in their answers labels and scores are.

Rampart's own, the Open Inference Protocol (v2), TorchServe's plain classifiers, `predictions` of
TensorFlow Serving, and any JSON by a template and two paths.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

from rampart.handlers.image import MAX_IMAGES, as_png
from rampart.hardening.attack.redteam.said import Said
from rampart.hardening.model.arrays import Pixels
from rampart.hardening.model.scaling import SCALINGS, Layout, Scaling

Name = Literal["rampart", "v2", "torchserve", "tensorflow", "json"]
NAMES: tuple[Name, ...] = get_args(Name)
JSON, PNG = "application/json", "image/png"
# A step of a path into JSON: .name, ['name'], [3] or [*].
STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\['([^']+)'\]|\[(\d+|\*)\]")
FLOATS = ("FP16", "FP32", "FP64")
Fetch = Callable[[str], Any]  # the JSON at a URL of the same server


class Speech(Protocol):
    """How a server of one kind is asked about images, and what it says."""

    @property
    def most(self) -> int:
        """How many images a request may carry."""
        ...

    def request(self, images: Pixels) -> tuple[bytes, str]:
        """The body about uint8 (N, H, W, 3), and its content type."""
        ...

    def read(self, content: Any, count: int) -> list[Said]:
        """What the JSON of an answer says of each. Raises ValueError, LookupError or TypeError."""
        ...


class Wire(NamedTuple):
    """What a person knows of a server: `send` is a body with places for pictures, `label` and
    `score` are paths into its answers, `scaling` and `layout` are of pixels sent as numbers, and
    `output` is the tensor of v2 that has the scores.
    """

    protocol: Name | None = None
    send: str | None = None
    label: str | None = None
    score: str | None = None
    scaling: Scaling = SCALINGS["unit"]
    layout: Layout | None = None
    output: str | None = None

    def name(self, url: str) -> Name:
        """The protocol, by the URL where none is named."""
        if self.protocol:
            return self.protocol
        if self.send or self.label or self.score:
            return "json"
        path = url.partition("?")[0]
        if path.endswith("/infer"):
            return "v2"
        return "tensorflow" if path.endswith(":predict") else "rampart"


def speech_of(wire: Wire, url: str, size: int, fetch: Fetch) -> Speech | None:
    """How to ask the server at `url` about images of `size`; None for Rampart's own protocol."""
    name = wire.name(url)
    if name == "v2":
        return open_inference(wire, fetch(url.partition("?")[0].removesuffix("/infer")), size)
    if name == "tensorflow":
        return TensorFlow(wire.scaling, wire.layout or "nhwc")
    if name == "json":
        return Mapped(wire)
    return TorchServe() if name == "torchserve" else None


class TorchServe:
    """A picture as the body; label to probability of the first few comes back."""

    most = 1

    def request(self, images: Pixels) -> tuple[bytes, str]:
        """As Speech has it."""
        return as_png(images[0]), PNG

    def read(self, content: Any, count: int) -> list[Said]:
        """As Speech has it."""
        return [Said(scores={str(name): float(value) for name, value in content.items()})]


class TensorFlow(NamedTuple):
    """Pixels as `instances`; `predictions` are scores, or hold them under a name."""

    scaling: Scaling
    layout: Layout
    most: int = MAX_IMAGES

    def request(self, images: Pixels) -> tuple[bytes, str]:
        """As Speech has it."""
        pixels = self.scaling.of(images, self.layout)
        return json.dumps({"instances": pixels.round(6).tolist()}).encode(), JSON

    def read(self, content: Any, count: int) -> list[Said]:
        """As Speech has it."""
        return [self._said(one) for one in content["predictions"]]

    @staticmethod
    def _said(one: Any) -> Said:
        if isinstance(one, Mapping):
            lists = [value for value in one.values() if isinstance(value, list)]
            if len(lists) != 1:
                raise ValueError(f"`predictions` have {len(lists)} lists of scores each, not one")
            return Said(scores=lists[0])
        return Said(scores=one) if isinstance(one, list) else Said(label=one)


class OpenInference(NamedTuple):
    """One tensor of pixels or of pictures; a tensor of scores, or of labels, comes back."""

    input: str
    datatype: str
    trailing: int  # dimensions of one picture as BYTES
    layout: Layout
    scaling: Scaling
    output: str | None
    most: int

    def request(self, images: Pixels) -> tuple[bytes, str]:
        """As Speech has it."""
        if self.datatype == "BYTES":
            shape = [len(images), *[1] * self.trailing]
            data: list[Any] = [base64.b64encode(as_png(image)).decode() for image in images]
        else:
            pixels = self.scaling.of(images, self.layout)
            if self.datatype == "UINT8":
                pixels = pixels.round().astype("uint8")
            shape, data = list(pixels.shape), pixels.ravel().tolist()
        tensor = {"name": self.input, "shape": shape, "datatype": self.datatype, "data": data}
        return json.dumps({"inputs": [tensor]}).encode(), JSON

    def read(self, content: Any, count: int) -> list[Said]:
        """As Speech has it."""
        outputs = {tensor["name"]: tensor for tensor in content["outputs"]}
        if {"label", "confidence", "decision"} <= outputs.keys() and not self.output:
            columns = [outputs[name]["data"] for name in ("label", "confidence", "decision")]
            return [Said(n, float(c), d == "accept") for n, c, d in zip(*columns, strict=True)]
        tensor = outputs[self.output] if self.output else _scores(list(outputs.values()))
        data = tensor["data"]
        if tensor["datatype"] not in FLOATS:
            return [Said(label=one) for one in data]
        width = len(data) // count
        return [Said(scores=data[n * width : (n + 1) * width]) for n in range(count)]


def _scores(tensors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The output with the scores. Raises ValueError where there is a choice."""
    floats = [tensor for tensor in tensors if tensor["datatype"] in FLOATS]
    found = floats or list(tensors)
    if len(found) != 1:
        names = ", ".join(str(tensor["name"]) for tensor in found)
        raise ValueError(f"several outputs may be the scores: name one with --output ({names})")
    return found[0]


def open_inference(wire: Wire, metadata: Any, size: int) -> OpenInference:
    """By what the server tells of its model. Raises ValueError for an input of no pictures."""
    for tensor in metadata["inputs"]:
        name, kind = str(tensor["name"]), str(tensor["datatype"])
        shape = [int(side) for side in tensor["shape"]]
        most = 1 if shape and shape[0] == 1 else MAX_IMAGES
        if len(shape) == 4 and kind in (*FLOATS, "UINT8"):
            layout = wire.layout or ("nhwc" if shape[3] in (1, 3) else "nchw")
            side = shape[2]
            if side not in (-1, size):
                raise ValueError(f"the model takes {side} pixels a side: pass --image-size {side}")
            scaling = SCALINGS["bytes"] if kind == "UINT8" else wire.scaling
            return OpenInference(name, kind, 0, layout, scaling, wire.output, most)
        if kind == "BYTES":
            layout = wire.layout or "nhwc"
            own = (len(shape) - 1, layout, wire.scaling, wire.output, most)
            return OpenInference(name, kind, *own)
    told = ", ".join(f"{t['name']} {t['datatype']} {t['shape']}" for t in metadata["inputs"])
    raise ValueError(f"the model takes {told}, which is neither pictures nor pixels (N, H, W, 3)")


class Mapped:
    """Any JSON: a body with "$b64", "$pixels", or lists of them as "$b64*" and "$pixels*"; without
    one a PNG is the body.
    """

    def __init__(self, wire: Wire) -> None:
        if not (wire.label or wire.score):
            raise ValueError("--send goes with --label PATH, --score PATH, or both")
        self._wire = wire
        self._body = _template(wire.send) if wire.send else None
        self._steps = {name: steps(getattr(wire, name)) for name in ("label", "score")}
        self.most = MAX_IMAGES if wire.send and '*"' in wire.send else 1

    def request(self, images: Pixels) -> tuple[bytes, str]:
        """As Speech has it."""
        if self._body is None:
            return as_png(images[0]), PNG
        return json.dumps(self._filled(self._body, images)).encode(), JSON

    def _filled(self, part: Any, images: Pixels) -> Any:
        if isinstance(part, dict):
            return {name: self._filled(value, images) for name, value in part.items()}
        if isinstance(part, list):
            return [self._filled(value, images) for value in part]
        if part in ("$b64", "$b64*"):
            texts = [base64.b64encode(as_png(image)).decode() for image in images]
            return texts if part.endswith("*") else texts[0]
        if part in ("$pixels", "$pixels*"):
            pixels = self._wire.scaling.of(images, self._wire.layout or "nhwc").round(6).tolist()
            return pixels if part.endswith("*") else pixels[0]
        return part

    def read(self, content: Any, count: int) -> list[Said]:
        """As Speech has it."""
        columns = {
            name: reached(content, path) if path else [None] * count
            for name, path in self._steps.items()
        }
        return [Said(*both) for both in zip(columns["label"], columns["score"], strict=True)]


def _template(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        example = '{"image": "$b64"}'
        raise ValueError(f"--send is not JSON ({error}): write it as {example}") from error


def steps(path: str | None) -> list[str | int] | None:
    """A path as `$.a['b'][0][*]` in its steps. Raises ValueError for any other."""
    if path is None:
        return None
    found = list(STEP.finditer(path, 1))
    if not path.startswith("$") or "".join(["$", *(match[0] for match in found)]) != path:
        raise ValueError(f"{path} is not a path: write it as $.predictions[*].label")
    names = [match[1] or match[2] or match[3] for match in found]
    return [int(n) if m[3] and n != "*" else n for m, n in zip(found, names, strict=True)]


def reached(content: Any, path: Sequence[str | int]) -> list[Any]:
    """All that a path leads to. Raises LookupError or TypeError where it leads nowhere."""
    if not path:
        return [content]
    first, *rest = path
    if first == "*":
        return [found for part in content for found in reached(part, rest)]
    return reached(content[first], rest)
