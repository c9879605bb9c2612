"""A headless Chromium driven over its DevTools protocol, with the standard library only."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
]


def find_chromium() -> str | None:
    given = os.environ.get("BROWSER_PATH")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; ``errors`` gathers exceptions and console errors, ``requests`` what it loads."""

    def __init__(self, binary: str, folder: Path, width: int = 1280, height: int = 900) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.count = 0
        size = f"--window-size={width},{height}"
        command = [binary, *FLAGS, size, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            port = self._port(folder / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as reply:
                pages = [one for one in json.load(reply) if one["type"] == "page"]
            self._connect(port, pages[0]["webSocketDebuggerUrl"])
            for domain in ("Runtime", "Log", "Page", "Network"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _port(self, file: Path) -> int:
        for _ in range(300):
            if file.exists() and len(lines := file.read_text().splitlines()) >= 1:
                return int(lines[0])
            time.sleep(0.1)
        raise TimeoutError("Chromium did not open its DevTools port within 30 s")

    def _connect(self, port: int, url: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        path = "/" + url.split("/", 3)[3]
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self.socket.sendall(request.encode())
        self.file = self.socket.makefile("rb")
        assert b"101" in self.file.readline()
        while self.file.readline().strip():
            pass

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method and return its result; events that come in between are noted."""
        self.count += 1
        data = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        mask = os.urandom(4)
        if len(data) < 126:
            head = struct.pack("!BB", 0x81, 0x80 | len(data))
        else:
            head = struct.pack("!BBQ", 0x81, 0xFF, len(data))
        self.socket.sendall(head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data)))
        while True:
            message = self._receive()
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _receive(self) -> dict[str, Any]:
        parts = []
        while True:
            first, second = self.file.read(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack("!H", self.file.read(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", self.file.read(8))
            parts.append(self.file.read(length))
            if first & 0x80:
                return json.loads(b"".join(parts))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        kind = message.get("method")
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:2000])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"])[:2000])
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.send("Page.navigate", url=url)
        for _ in range(300):
            ready = "document.readyState === 'complete' && location.href !== 'about:blank'"
            if self.run(ready):
                return
            time.sleep(0.05)
        raise TimeoutError(f"{url} did not load")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        reply = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        for _ in range(200):
            if self.run(condition):
                return
            time.sleep(0.05)
        raise TimeoutError(f"never became true: {condition}")

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        where = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send(
                "Input.dispatchMouseEvent",
                type=kind, x=where[0], y=where[1], button="left", clickCount=1,
            )  # fmt: skip

    def type(self, selector: str, text: str) -> None:
        """Replace what an input holds by typing."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.value = ''; e.dispatchEvent(new Event('input')); e.focus(); })()"
        )
        if text:
            self.send("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        """Real key presses, such as "ArrowDown", "Enter" or "/"."""
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def close(self) -> None:
        """End the browser that this object started."""
        if hasattr(self, "socket"):
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
