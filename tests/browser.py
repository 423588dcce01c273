"""Chromium as a person uses it, by its DevTools protocol over a pipe: no driver is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
)
# What DevTools calls keys: code, number, text.
KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    " ": ("Space", 32, " "),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}


class Pipe:
    """Messages of DevTools: JSON, each ended by a zero byte."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read, "rb", 0), os.fdopen(write, "wb", 0)
        self._rest, self._count = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """What a command gives; events that come meanwhile are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._read.read(1 << 16)
            assert piece, "Chromium has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def close(self) -> None:
        self._read.close()
        self._write.close()


class Page:
    """One tab."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._pipe.call(method, self._session, **parameters)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def js(self, code: str) -> Any:
        """The value of an expression."""
        given = self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in given, given
        return given["result"].get("value")

    def wait(self, code: str, seconds: float = 60) -> None:
        """Until an expression is true."""
        until = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < until, (code, self.text("body"))
            time.sleep(0.05)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def visible(self, selector: str) -> bool:
        return self.js(f"document.querySelector({json.dumps(selector)}).checkVisibility()")

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element is, once it has been scrolled to."""
        return tuple(
            self.js(
                f"""(() => {{ const node = document.querySelector({json.dumps(selector)});
                node.scrollIntoView({{block: "center", behavior: "instant"}});
                const box = node.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
            )
        )

    def mouse(self, kind: str, x: float, y: float) -> None:
        """`kind` is mousePressed, mouseMoved or mouseReleased."""
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def click(self, selector: str) -> None:
        place = self.middle(selector)
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def press(self, key: str, times: int = 1) -> None:
        """A key that has a name, or a letter."""
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key.upper()[0]), key))
        named = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def focused(self) -> str:
        """The id of what has the focus, or its text."""
        return self.js("document.activeElement.id || document.activeElement.innerText")

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Exceptions of the page's script, and what its security policy forbade."""
        self.js("0")  # what was on its way has come
        events = [e for e in self._pipe.events if e.get("sessionId") == self._session]
        wrong = {"security", "javascript"}
        return [
            json.dumps(e["params"])
            for e in events
            if e["method"] == "Runtime.exceptionThrown"
            or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["source"] in wrong)
        ]


def violations(page: Page) -> list[str]:
    """What axe finds that is serious or critical."""
    spec = find_spec("axe_core_python")
    assert spec is not None and spec.submodule_search_locations
    script = Path(spec.submodule_search_locations[0]) / "axe.min.js"
    page.js(script.read_text(encoding="utf-8") + "; 0")
    found = page.js("axe.run().then(done => JSON.stringify(done.violations))")
    return [
        f"{one['id']}: {node['html'][:120]} {node['failureSummary']}"
        for one in json.loads(found)
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@contextmanager
def chromium(folder: Path) -> Iterator[Pipe]:
    """A browser of its own, whose profile is in `folder`. Skips where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Chromium: install the Debian package chromium")
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    redirect = f'exec "$@" 3<&{their_read} 4>&{their_write}'
    command = ["bash", "-c", redirect, "bash", program, *OPTIONS, f"--user-data-dir={folder}"]
    with (folder.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            command, pass_fds=(their_read, their_write), stdout=log, stderr=log
        )
    os.close(their_read)
    os.close(their_write)
    pipe = Pipe(our_read, our_write)
    try:
        yield pipe
        pipe.call("Browser.close")
    finally:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        pipe.close()
