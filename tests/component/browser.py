"""A real browser without a window: Debian's chromium-headless-shell, driven over the DevTools protocol.

https://chromedevtools.github.io/devtools-protocol: JSON over a WebSocket, for which aiohttp is there already.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

DEADLINE_SECONDS = 10.0

# Not the script of that name in /usr/bin, which waits for this one and does not take it along when it is ended.
PROGRAM = Path("/usr/lib/chromium/chromium-headless-shell")

LAN_HOST = "gateway.test"

_KEYS = {"Tab": 9, "Enter": 13, " ": 32}


class Browser:
    """The process; each page is a profile of its own."""

    def __init__(self, directory: Path) -> None:
        options = ["--remote-debugging-port=0", f"--user-data-dir={directory}", "--no-first-run", "--disable-gpu"]
        options += ["--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en-GB"]
        # A name of another machine, for the browser: it is not trusted as localhost is.
        options.append(f"--host-resolver-rules=MAP {LAN_HOST} 127.0.0.1")
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium's does not work as root
        # It ends with us, whatever ends us.
        command = ["setpriv", "--pdeathsig=KILL", "--", str(PROGRAM), *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._active = directory / "DevToolsActivePort"

    async def address(self) -> str:
        """Where it listens, as soon as it does."""
        deadline = time.monotonic() + 2 * DEADLINE_SECONDS
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"{PROGRAM} ended with {self._process.returncode}"
            if self._active.exists() and len(lines := self._active.read_text().splitlines()) == 2:
                return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
            await asyncio.sleep(0.02)
        raise AssertionError(f"{PROGRAM} does not answer")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Page:
    """One tab. ``complaints`` is all that the console calls an error."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._listener = asyncio.create_task(self._listen())
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []
        self.questions: list[str] = []
        """Of confirm(), which were answered with yes."""

    async def open(self) -> None:
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self._context = context
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.call(f"{domain}.enable")

    async def close(self) -> None:
        self._session = None
        await self.call("Target.disposeBrowserContext", browserContextId=self._context)
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        await self._socket.send_str(json.dumps(message))
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await answer

    async def look(
        self, *, width: int = 1000, height: int = 900, scheme: str = "light", reduced_motion: bool = False
    ) -> None:
        """How large the window is, and what its user likes."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        motion = "reduce" if reduced_motion else "no-preference"
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", motion)]
        await self.call(
            "Emulation.setEmulatedMedia", features=[{"name": name, "value": value} for name, value in features]
        )

    async def goto(self, url: str) -> None:
        async with self.leading_on():
            told = await self.call("Page.navigate", url=url)
            assert "errorText" not in told, told

    @asynccontextmanager
    async def leading_on(self) -> AsyncIterator[None]:
        """What is done in the context leads to another page, which is there at its end."""
        self._loaded.clear()
        yield
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self._loaded.wait()

    async def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Until a JavaScript expression holds."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not await self.ask(f"Boolean({expression})"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{expression} never held; the page is:\n{await self.text()}")
            await asyncio.sleep(0.02)

    async def text(self, selector: str = "body") -> str:
        """What a person reads there."""
        return str(await self.ask(f"document.querySelector({json.dumps(selector)})?.innerText"))

    async def click(self, selector: str, *, count: int = 1) -> None:
        """With the mouse, where the element is."""
        found = json.dumps(selector)
        await self.ask(f"document.querySelector({found}).scrollIntoView({{block: 'center'}})")
        box = await self.ask(f"JSON.stringify(document.querySelector({found}).getBoundingClientRect())")
        place = json.loads(box)
        where = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2, "button": "left"}
        for number in range(1, count + 1):
            for kind in ("mousePressed", "mouseReleased"):
                await self.call("Input.dispatchMouseEvent", type=kind, clickCount=number, **where)

    async def press(self, key: str) -> None:
        options: dict[str, Any] = {"key": key, "code": "Space" if key == " " else key}
        options["windowsVirtualKeyCode"] = _KEYS[key]
        text = {"Enter": "\r", " ": " "}.get(key)
        typed = {"text": text} if text else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **options, **typed)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    async def screenshot(self, file: Path) -> None:
        """All of the page, not only what fits the window."""
        told = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(told["data"]))

    async def roles(self) -> list[tuple[str, str]]:
        """What a screen reader is told: role and name of everything, in order."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        seen = [node for node in nodes if not node.get("ignored")]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]

    async def _listen(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if answer.done():
                    continue
                if "error" in told:
                    answer.set_exception(AssertionError(told["error"]["message"]))
                else:
                    answer.set_result(told["result"])
            else:
                self._hear(told["method"], told["params"])

    def _hear(self, event: str, told: dict[str, Any]) -> None:
        match event:
            case "Page.loadEventFired":
                self._loaded.set()
            case "Page.javascriptDialogOpening":
                self.questions.append(told["message"])
                self._yes = asyncio.ensure_future(self.call("Page.handleJavaScriptDialog", accept=True))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(told["exceptionDetails"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if told["type"] == "error":
                self.complaints.append(str(told["args"]))


@asynccontextmanager
async def opened(browser: Browser) -> AsyncIterator[Page]:
    """A page of its own, with nothing in it yet."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(await browser.address(), max_msg_size=0, compress=0) as socket,
    ):
        page = Page(socket)
        await page.open()
        try:
            yield page
        finally:
            await page.close()
