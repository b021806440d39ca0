"""A headless Chromium, driven by chromedriver over HTTP (W3C WebDriver): clicks, keys, scripts, the console."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

AXE = Path(__file__).with_name("axe.min.js")  # axe-core by Deque, MPL-2.0

needs_browser = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None, reason="no Chromium with chromedriver on this machine's path"
)

_WAIT_SECONDS = 20
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's name for the key of an element (W3C, section 11)


class Browser:
    """One window. `find` waits for an element; `until` for a script to give something that is true."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, address: str) -> None:
        """Load a page."""
        _call(f"{self._session}/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a script returns."""
        return _call(f"{self._session}/execute/sync", {"script": script, "args": []})

    def until(self, script: str) -> Any:
        """What an expression gives, as soon as that is true."""
        end = time.monotonic() + _WAIT_SECONDS
        while not (found := self.run(f"return ({script})")):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return found

    def click(self, selector: str) -> None:
        """Click an element with the mouse; it has to be visible."""
        element = _call(f"{self._session}/element", {"using": "css selector", "value": selector})[_ELEMENT]
        _call(f"{self._session}/element/{element}/click", {})

    def hover(self, selector: str) -> None:
        """Move the mouse over an element."""
        element = _call(f"{self._session}/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": element}
        self._act({"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]})

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keys", "actions": strokes})

    def seconds_to_open(self, address: str) -> float:
        """Load a page; the processor time that its main thread takes, whoever else uses the machine."""
        self._command("Performance.enable", timeDomain="threadTicks")
        self.open(address)
        metrics = self._command("Performance.getMetrics")["metrics"]
        return next(float(each["value"]) for each in metrics if each["name"] == "TaskDuration")

    def wear(self, scheme: str) -> None:
        """Prefer a colour scheme: light or dark."""
        self._command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def faults(self) -> list[str]:
        """What axe-core finds against WCAG and good practice on the page: rule, place and reason, in light and dark."""
        found = []
        for scheme in ("light", "dark"):
            self.wear(scheme)
            self.run(AXE.read_text(encoding="utf-8"))
            script = "axe.run().then(arguments[0])"
            results = _call(f"{self._session}/execute/async", {"script": script, "args": []})
            assert len(results["passes"]) > 5, "axe-core looked at nothing"
            found += [
                f"{scheme}: {rule['id']}: {node['html'][:200]}: {node['failureSummary']}"
                for rule in results["violations"]
                for node in rule["nodes"]
            ]
        return found

    def console(self) -> list[str]:
        """What the console has said since the last time, errors and warnings alone."""
        entries = _call(f"{self._session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def _command(self, command: str, **params: Any) -> Any:
        return _call(f"{self._session}/goog/cdp/execute", {"cmd": command, "params": params})

    def _act(self, source: dict[str, Any]) -> None:
        _call(f"{self._session}/actions", {"actions": [source]})


@contextlib.contextmanager
def open_browser(profile: Path, *, width: int = 1200, height: int = 900, touch: bool = True) -> Iterator[Browser]:
    """A window of a size; narrower than 500 pixels it is a phone, unless it has no `touch`."""
    port = _free_port()
    driver = subprocess.Popen(
        [str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        root = f"http://127.0.0.1:{port}"
        _until_ready(root)
        options: dict[str, Any] = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
        }
        if width < 500:  # a window of the desktop's can't be
            metrics = {"width": width, "height": height, "pixelRatio": 2, "touch": touch, "mobile": touch}
            options["mobileEmulation"] = {"deviceMetrics": metrics}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = _call(f"{root}/session", {"capabilities": {"alwaysMatch": capabilities}})
        session = f"{root}/session/{made['sessionId']}"
        try:
            yield Browser(session)
        finally:
            _call(session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def _call(address: str, content: dict[str, Any] | None = None, *, method: str = "POST") -> Any:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _OPENER.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]["message"]) from None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _until_ready(root: str) -> None:
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            with _OPENER.open(f"{root}/status", timeout=5) as answer:
                if json.load(answer)["value"]["ready"]:
                    return
        except OSError:
            assert time.monotonic() < end, "chromedriver doesn't start"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
