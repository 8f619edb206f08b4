"""MLflow's pages in headless Chromium: what a page says once it says what is expected, and a picture of it.

python -m tests.orchestration.pages URL PICTURE.png WIDTHxHEIGHT WORDS [CLICK ...]
"""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chromium asks its maker's servers about updates and fields of study otherwise.
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
CLOSE_PANEL = "for (const v of ['', '_v1']) localStorage.setItem('mlflow.assistant.panelOpen' + v, 'false')"
PATIENCE_S, SETTLE_S = 180.0, 3.0


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(url: str, words: str, picture: Path | None = None, size: tuple[int, int] = (1400, 900), *clicks: str) -> str:
    """The text of a page as soon as it holds all `words` (with commas between), after clicking elements by their text.

    With `picture` also a PNG of the window. AssertionError with the page's text if it never says that.
    """
    return asyncio.run(_look(url, words.split(","), picture, size, clicks))


async def _look(
    url: str, words: list[str], picture: Path | None, size: tuple[int, int], clicks: tuple[str, ...]
) -> str:
    async with _page(size) as page:
        await page("Page.addScriptToEvaluateOnNewDocument", source=CLOSE_PANEL)
        await page("Page.navigate", url=url)
        text = await _until(page, clicks[:1] or words)
        for number, click in enumerate(clicks):
            find = (
                f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(click)}).at(-1)"
            )
            await page("Runtime.evaluate", expression=f"{find}.click()")
            text = await _until(page, clicks[number + 1 : number + 2] or words)
        await asyncio.sleep(SETTLE_S)  # curves are drawn after their titles
        if picture is not None:
            shot = await page("Page.captureScreenshot", format="png")
            picture.write_bytes(base64.b64decode(shot["data"]))
        return text


async def _until(page: Any, words: list[str] | tuple[str, ...]) -> str:
    loop = asyncio.get_running_loop()
    until, text = loop.time() + PATIENCE_S, ""
    while not text or not all(word in text for word in words):
        assert loop.time() < until, f"{words} are not all on the page:\n{text}"
        await asyncio.sleep(0.3)
        answer = await page("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
        text = answer["result"].get("value", "")
    return text


@contextlib.asynccontextmanager
async def _page(size: tuple[int, int]) -> AsyncIterator[Any]:
    """A browser's only page: `await page(METHOD, **parameters)` speaks Chrome's DevTools protocol."""
    browser = find_browser()
    assert browser is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            port = Path(profile) / "DevToolsActivePort"
            for _ in range(int(PATIENCE_S / 0.1)):
                if port.exists() and "\n" in port.read_text():
                    break
                await asyncio.sleep(0.1)
            address = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{address}/json/list") as answer:
                    target = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield _caller(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _caller(socket: aiohttp.ClientWebSocketResponse) -> Any:
    number = 0

    async def call(method: str, **parameters: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        await socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = await socket.receive_json()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    return call


if __name__ == "__main__":
    width, height = sys.argv[3].split("x")
    print(
        len(look(sys.argv[1], sys.argv[4], Path(sys.argv[2]), (int(width), int(height)), *sys.argv[5:])), "characters"
    )
