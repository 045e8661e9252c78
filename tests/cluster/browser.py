"""Chromium without a window, driven over its DevTools protocol through two pipes: nothing else has to be installed.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREENS = Path(os.environ["LLMPIPE_SCREENSHOTS"]) if "LLMPIPE_SCREENSHOTS" in os.environ else None
"""Where pictures of the pages are left to look at."""
PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAPTOP, PHONE = (1366, 768), (390, 844)
SECONDS = 120
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One tab, and what went wrong in it."""

    def __init__(self, browser: "Browser", session: str):
        self._browser, self._session = browser, session
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        return self._browser.call(method, parameters, self._session)

    def go(self, address: str) -> None:
        """Open an address and wait until it has loaded."""
        self.events.clear()
        told = self.call("Page.navigate", url=address)
        assert "errorText" not in told, (address, told)
        self._browser.wait(lambda: self._has_loaded(told["loaderId"]))

    def _has_loaded(self, loader: str) -> bool:
        """Whether this document has; an empty tab's own load event may come late."""
        begun = False
        for event in self.events:
            if event["method"] == "Page.frameNavigated":
                begun = begun or event["params"]["frame"]["loaderId"] == loader
            elif event["method"] == "Page.loadEventFired" and begun:
                return True
        return False

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        self._browser.wait(lambda: self.value(expression))

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the page down to its end, or of what is on the screen."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}

    @property
    def problems(self) -> list[str]:
        """Errors on the console and in scripts, requests that failed."""
        return [told for event in self.events if (told := _problem(event["method"], event["params"]))]

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [parameters["request"]["url"] for parameters in sent]


def _problem(method: str, told: dict[str, Any]) -> str | None:
    if method == "Runtime.exceptionThrown":
        return str(told["exceptionDetails"].get("exception", told["exceptionDetails"]).get("description", told))
    if method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
        return f"console: {[argument.get('value') for argument in told['args']]}"
    if method == "Log.entryAdded" and told["entry"]["level"] == "error":
        return f"{told['entry']['text']} {told['entry'].get('url', '')}"
    if method == "Network.loadingFailed" and not told.get("canceled"):
        return f"a request failed: {told['errorText']}"
    if method == "Network.responseReceived" and told["response"]["status"] >= 400:
        return f"{told['response']['url']}: status {told['response']['status']}"
    return None


class Browser:
    """A Chromium of its own, with a profile of its own."""

    def __init__(self, profile: Path):
        assert PROGRAM, "Chromium is not installed: apt-get install chromium"
        ours, theirs = os.pipe(), os.pipe()
        # Chromium reads from descriptor 3 and writes to 4: high numbers first, so that none of ours is in the way.
        reads, writes = (fcntl.fcntl(number, fcntl.F_DUPFD, 20) for number in (ours[0], theirs[1]))
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{reads} 4>&{writes}', "chromium",
             PROGRAM, *OPTIONS, f"--user-data-dir={profile}"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for number in (ours[0], theirs[1], reads, writes):
            os.close(number)
        self._to, self._from, self._rest = ours[1], theirs[0], b""
        os.set_blocking(self._from, False)
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        self._last = 0

    def call(self, method: str, parameters: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._last += 1
        number, message = self._last, {"id": self._last, "method": method, "params": parameters}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self.wait(lambda: number in self._answers)
        answer = self._answers.pop(number)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def wait(self, condition: Any) -> None:
        """Take in what the browser says until something holds."""
        deadline = time.monotonic() + SECONDS
        while True:
            self._take_in()
            if condition():
                return
            assert self._process.poll() is None, "Chromium has ended"
            assert time.monotonic() < deadline, "Chromium does not come to it"
            time.sleep(0.02)

    def _take_in(self) -> None:
        while True:
            try:
                part = os.read(self._from, 1 << 20)
            except BlockingIOError:
                return
            if not part:
                return
            *messages, self._rest = (self._rest + part).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]] = message
                elif message.get("sessionId") in self._pages:
                    self._pages[message["sessionId"]].events.append(message)

    @contextmanager
    def page(self, size: tuple[int, int] = LAPTOP, dark: bool = False) -> Iterator[Page]:
        """A tab of a size; a narrow one is a phone's."""
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        width, height = size
        mobile = width < 600
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if mobile else 1, mobile=mobile,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        try:
            yield page
        finally:
            self.call("Target.closeTarget", {"targetId": target})

    def close(self) -> None:
        """End it, and its children."""
        os.close(self._to)  # it ends when its pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
