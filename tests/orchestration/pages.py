"""MLflow's pages in headless Chromium: the document of a page after its scripts have run, and a picture of it.

python -m tests.orchestration.pages URL PICTURE.png [WIDTHxHEIGHT]
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Chromium asks its maker's servers about updates and fields of study otherwise.
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
SCRIPTS_S = 30  # of the page's own time, which passes as fast as its scripts allow


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def look(url: str, picture: Path | None = None, size: str = "1400x1000") -> str:
    """The page's document; with `picture` also a PNG of the window."""
    browser = find_browser()
    assert browser is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", f"--window-size={size.replace('x', ',')}"]
        command += [f"--virtual-time-budget={1000 * SCRIPTS_S}", "--dump-dom"]
        command += [f"--screenshot={picture}"] if picture else []
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=300)
    assert picture is None or picture.exists(), done.stderr[-2000:]
    return done.stdout


if __name__ == "__main__":
    print(len(look(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4])), "characters")
