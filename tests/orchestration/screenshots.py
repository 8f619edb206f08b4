"""Takes the pictures of docs/screenshots from a running MLflow (`normfree ui`) that holds runs, sweeps and a registered model.

python -m tests.orchestration.screenshots ADDRESS FOLDER [NAME ...]

Chromium is driven by its DevTools protocol, because MLflow's pages say what they have to say some seconds after they are
there: a picture is taken when the expected words stand on the page.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from orchestration.tracking import heartbeat
from orchestration.tracking.mlflow_client import connect
from tests.orchestration.pages import QUIET, find_browser

# What a person clicks once: pages about training instead of chat bots.
SETTINGS = "for (const v of ['', '_v1']) localStorage.setItem('mlflow.workflowType' + v, '\"machine_learning\"')"
# A browser without a mouse shows each plot's tool bar all the time.
TIDY = "document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none !important }</style>')"
PANEL_CLOSE_PX = 36, 35
"""From the right and the top of the window: the cross of the panel that a first visit opens."""
PATIENCE_S, SETTLE_S = 180.0, 4.0
FOLDED = ("checkpoint", "eval/val_ema", "final", "gradient_norm", "speed")
"""Groups of curves that stand above others worth more in a picture."""


@dataclass(frozen=True, kw_only=True)
class Page:
    path: str
    """After ADDRESS/#/."""
    words: tuple[str, ...]
    """That stand on it when it is ready."""
    width_px: int = 1400
    height_px: int = 1000
    clicks: tuple[str, ...] = ()
    """Texts of elements to click first, one after the other."""


def pages(address: str) -> dict[str, Page]:
    """Name of a picture -> its page, from what the server holds: the newest run, the two oldest sweeps."""
    client = connect(address)
    runs = client.search_runs(heartbeat.all_experiments(client), order_by=["attributes.start_time ASC"])
    sweeps = [run for run in runs if "sweep_dir" in run.data.tags]
    trained = [run for run in runs if "checkpoint.digest" in run.data.tags]
    (version, *_) = client.search_model_versions()
    first, sweep = trained[-1].info, sweeps[0].info
    run = f"experiments/{first.experiment_id}/runs/{first.run_id}"
    ids = json.dumps([each.info.run_id for each in sweeps[:2]], separators=(",", ":"))
    compared = f'compare-runs?runs={ids}&experiments=["{sweep.experiment_id}"]'
    names = tuple(each.info.run_name for each in sweeps[:2])
    parent = f"experiments/{sweep.experiment_id}/runs/{sweep.run_id}"
    return {
        "run_list": Page(path=f"experiments/{first.experiment_id}/runs", words=(first.run_name,), height_px=620),
        "run": Page(path=run, words=("train/loss", "all steps are done"), height_px=1500),
        "curves": Page(path=f"{run}/model-metrics", words=("speed",), clicks=FOLDED, height_px=1700),
        "signal_propagation": Page(path=f"{run}/artifacts", words=("pictures",), clicks=("pictures", "signal.png")),
        "training": Page(path=f"{run}/artifacts", words=("pictures",), clicks=("pictures", "training.png")),
        "sweep": Page(
            path=parent, words=("pretraining.run_id", "Show more"), clicks=("Show more",), width_px=1700, height_px=1400
        ),
        "scorecard": Page(path=f"{parent}/artifacts", words=("scorecard.png",), clicks=("scorecard.png",)),
        "sweeps_compared": Page(path=compared, words=names, clicks=("Visualizations",), height_px=1400),
        "model": Page(path=f"models/{version.name}/versions/{version.version}", words=("Description",), height_px=1500),
    }


async def take(url: str, page: Page, picture: Path) -> None:
    """AssertionError with the page's text if it never says what it should."""
    async with browser(page) as call:
        await call("Page.enable")
        await call("Page.addScriptToEvaluateOnNewDocument", source=SETTINGS)
        await call("Page.navigate", url=url)
        await until(call, page.words)
        await call("Runtime.evaluate", expression=TIDY)
        await asyncio.sleep(SETTLE_S)
        place = {"x": page.width_px - PANEL_CLOSE_PX[0], "y": PANEL_CLOSE_PX[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await call("Input.dispatchMouseEvent", type=kind, **place)
        for click in page.clicks:
            found = (
                f"[...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === {json.dumps(click)}).at(-1)"
            )
            await call("Runtime.evaluate", expression=f"{found}.click()")
            await asyncio.sleep(1.0)
        await asyncio.sleep(SETTLE_S)  # curves are drawn after their titles
        shot = await call("Page.captureScreenshot", format="png")
        picture.write_bytes(base64.b64decode(shot["data"]))


async def until(call: Any, words: Sequence[str]) -> None:
    loop = asyncio.get_running_loop()
    end, text = loop.time() + PATIENCE_S, ""
    while not text or not all(word in text for word in words):
        assert loop.time() < end, f"{words} are not all on the page:\n{text}"
        await asyncio.sleep(0.3)
        answer = await call("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
        text = answer["result"].get("value", "")


@contextlib.asynccontextmanager
async def browser(page: Page) -> AsyncIterator[Any]:
    """A browser's only window: `await call(METHOD, **parameters)`."""
    program = find_browser()
    assert program is not None, "no Chromium: apt-get install chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, *QUIET, "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        words += [f"--window-size={page.width_px},{page.height_px}", "about:blank"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            port = Path(profile) / "DevToolsActivePort"
            while not (port.exists() and "\n" in port.read_text()):
                assert process.poll() is None, "Chromium ended"
                await asyncio.sleep(0.1)
            place = f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json/list"
            async with aiohttp.ClientSession() as session, session.get(place) as answer:
                target = next(t for t in await answer.json() if t["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield caller(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def caller(socket: aiohttp.ClientWebSocketResponse) -> Any:
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
    for name, page in pages(sys.argv[1]).items():
        if not sys.argv[3:] or name in sys.argv[3:]:
            asyncio.run(take(f"{sys.argv[1]}/#/{page.path}", page, Path(sys.argv[2]) / f"{name}.png"))
            print(name, flush=True)
