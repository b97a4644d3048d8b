"""A headless Chromium for tests, spoken to over its DevTools protocol: what a page logs, fetches, shows and measures."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_SECONDS = 30.0


def executable() -> str | None:
    """Where a Chromium is on this machine; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page. `events` are all that the browser said of it, in order."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        self._listening = asyncio.create_task(self._listen())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to one command of the protocol."""
        number = next(self._numbers)
        coming = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(coming, PATIENCE_SECONDS)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer.get("result", {})
        return result

    async def evaluate(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def open(self, path: Path) -> None:
        """Load a file and wait until all of it is there."""
        loaded = len(self.of("Page.loadEventFired"))
        await self.call("Page.navigate", url=path.resolve().as_uri())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.of("Page.loadEventFired")) == loaded:
                await asyncio.sleep(0.02)

    async def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        """Show the page in a window of this size, in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
        )
        await self.drawn()

    async def media(self, kind: str = "", **features: str) -> None:
        """Emulate `print`, or features such as prefers_color_scheme="dark"; without either, nothing any more."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.call("Emulation.setEmulatedMedia", media=kind, features=given)
        await self.drawn()

    async def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """One event of a mouse: mouseMoved, mousePressed, mouseReleased."""
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        await self.drawn()

    async def drawn(self) -> None:
        """Wait until the page has heard of what happened to it, a scroll too, and has been drawn."""
        await self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    async def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def pdf(self) -> bytes:
        """The page as it is printed on A4."""
        made = await self.call("Page.printToPDF", printBackground=False, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(made["data"])

    def of(self, method: str) -> list[dict[str, Any]]:
        """What came with the events of one kind."""
        return [event.get("params", {}) for event in self.events if event["method"] == method]

    def complaints(self) -> list[str]:
        """Everything that a developer would see in red in the console."""
        thrown = [str(each["exceptionDetails"].get("text")) for each in self.of("Runtime.exceptionThrown")]
        said = [str(e["args"]) for e in self.of("Runtime.consoleAPICalled") if e["type"] in ("error", "assert")]
        logged = [e["entry"]["text"] for e in self.of("Log.entryAdded") if e["entry"]["level"] == "error"]
        return thrown + said + logged

    def requests(self) -> list[str]:
        """Every address that was fetched."""
        return [each["request"]["url"] for each in self.of("Network.requestWillBeSent")]

    async def close(self) -> None:
        self._listening.cancel()
        with suppress(asyncio.CancelledError):
            await self._listening

    async def _listen(self) -> None:
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self.events.append(said)


@asynccontextmanager
async def browsing(folder: Path) -> AsyncIterator[Page]:
    """A page in a browser of its own, whose profile is in `folder`; both end with the block."""
    program = executable()
    assert program is not None
    profile = folder / "profile"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--no-first-run", "--disable-extensions", "--mute-audio"]
    command = [program, *flags, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"HOME": str(folder)},
    )
    try:
        port = await _port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                target = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                try:
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await page.call(f"{domain}.enable")
                    yield page
                finally:
                    await page.close()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    """The port that the browser chose, once it says so."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (file.exists() and file.read_text().count("\n")):
            assert process.returncode is None, f"the browser ended with {process.returncode}"
            await asyncio.sleep(0.05)
    return int(file.read_text().splitlines()[0])
