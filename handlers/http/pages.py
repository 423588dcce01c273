"""Pages for people: what is served, and what the OpenAPI file says; all of it is in the page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}
STYLE = (
    ":root{color-scheme:light dark;background:Canvas;color:CanvasText}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50em;margin:2em auto;padding:0 1em;"
    "overflow-wrap:anywhere}"
    "pre{background:rgba(128,128,128,.15);padding:.7em;overflow:auto}h2{margin-top:2em}"
)
PHONE = '<meta name="viewport" content="width=device-width, initial-scale=1">'
METHODS = ("get", "put", "post", "delete")
Api = Mapping[str, Any]  # an OpenAPI document


def overview(models: Sequence[tuple[str, str]]) -> str:
    """The page at `/`: each model's name and version, and where to go on."""
    lines = [
        f"<li><b>{escape(name)}</b> {escape(version)}"
        f"{_block(f'curl -T picture.png http://.../predictions/{name}/{version}')}"
        for name, version in models
    ]
    links = ("docs", "openapi.json", "metrics", "v2", "v2/health/ready")
    ways = " · ".join(f'<a href="/{link}">/{link}</a>' for link in links)
    return page("Rampart", [f"<ul>{''.join(lines)}</ul>", f"<p>{ways}</p>"])


def manual(api: Api) -> str:
    """The page at `/docs`: each operation, then each schema."""
    return page(api["info"]["title"], [*_introduction(api), *_operations(api), *_schemas(api)])


def page(title: str, pieces: Sequence[str]) -> str:
    """A whole page out of HTML."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">{PHONE}'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(pieces)}</html>\n"
    )


def _introduction(api: Api) -> Iterator[str]:
    yield f"<p>{escape(api['info']['description'])}</p>"


def _operations(api: Api) -> Iterator[str]:
    for path, operations in api["paths"].items():
        for method in METHODS:
            if method in operations:
                yield from _operation(f"{method.upper()} {path}", operations[method])


def _operation(address: str, operation: Api) -> Iterator[str]:
    yield f"<h2><code>{escape(address)}</code></h2><p>{escape(operation['summary'])}</p>"
    if body := operation.get("requestBody"):
        yield f"<p>Send one of</p>{_block(_json(body['content']))}"
    for status, answer in operation["responses"].items():
        yield f"<p><b>{escape(status)}</b></p>{_block(_json(answer))}"


def _schemas(api: Api) -> Iterator[str]:
    for kind, parts in api["components"].items():
        for name, part in parts.items():
            place = f"#/components/{kind}/{name}"
            yield f"<h2><code>{escape(place)}</code></h2>{_block(_json(part))}"


def _block(text: str) -> str:
    """Text as it is; keys reach and scroll it."""
    return f'<pre tabindex="0">{escape(text)}</pre>'


def _json(content: Any) -> str:
    return json.dumps(content, indent=1)
