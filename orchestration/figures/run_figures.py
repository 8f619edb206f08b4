"""Pictures of a run for its page in MLflow: signal propagation of its network, and what training did to it.

`python -m orchestration.figures.run_figures RUN_DIR WHAT` writes `RUN_DIR/pictures/<WHAT>.png` (signal or training); a process of
its own, below the priority of everything else, for networks and plots have no business in the uploader.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration import child_process
from orchestration.figures.signal_figure import STYLE, quiet
from orchestration.spool.spool import read
from pipeline import places
from pipeline.display import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = "pictures"
KINDS = ("signal", "training")
MAX_PARAMETERS = 300_000_000
"""Larger networks are not built a second time next to a training; `normfree inspect MODEL --signal` draws those."""
MAX_PX = 1024
NUM_IMAGES, MAX_POINTS = 4, 2000
INK, MUTED = "#22252a", "#6b7079"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MAX_LABEL_CHARACTERS = 40
LINE_STYLES = ("-", "--", "-.", ":")


class Pictures:
    """The pictures of one run folder, drawn by processes of their own. NORMFREE_PICTURES=0: none."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._drawing: dict[str, subprocess.Popen[bytes]] = {}
        self._there: list[Path] = []
        self._is_wanted = os.environ.get("NORMFREE_PICTURES", "1") != "0"

    def begin(self) -> None:
        """Draw what the configuration alone decides, if it is not there already: from an import to another server."""
        if self._is_wanted and self._path("signal").exists():
            self._there = [self._path("signal")]
        elif self._is_wanted:
            self._draw("signal")

    def take(self) -> list[Path]:
        """Those finished since the last call."""
        done = [kind for kind, process in self._drawing.items() if process.poll() is not None]
        there, self._there = self._there, []
        return there + [self._path(kind) for kind in done if self._drawing.pop(kind).returncode == 0]

    def last(self, wait_s: float) -> list[Path]:
        """Those of the whole run, and others that were not ready before; what takes longer is given up."""
        if not self._is_wanted:
            return []
        self._draw("training")
        until = time.monotonic() + wait_s
        for process in self._drawing.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return self.take()

    def _path(self, kind: str) -> Path:
        return self._run_dir / FOLDER / f"{kind}.png"

    def _draw(self, kind: str) -> None:
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
        words = [os.path.abspath(self._run_dir), kind]
        with open(self._run_dir / "tracking.log", "ab", opener=places.no_follow) as log:
            self._drawing[kind] = child_process.start(
                "orchestration.figures.run_figures", words, environment=environment, output=log
            )


def signal(config: dict[str, Any], path: Path) -> bool:
    """The run's network with fresh weights and open branches, against the law; False where it is too large for that."""
    import torch

    import nfnet
    from nfnet.analysis.signal_propagation import open_branches
    from nfnet.analysis.signal_theory import predict, predict_on_noise
    from orchestration.figures.signal_figure import draw_signal

    name, options = config["model"]["name"], config["model"].get("options") or {}
    if config["augment"]["image_px"] > MAX_PX:  # somebody else's numbers, perhaps
        return False
    with torch.device("meta"):
        if sum(p.numel() for p in nfnet.create_model(name, **options).parameters()) > MAX_PARAMETERS:
            return False
    torch.manual_seed(config.get("seed", 0))
    model, px = nfnet.create_model(name, **options), config["augment"]["image_px"]
    open_branches(model, 1.0)
    try:
        law = predict(model)
    except ValueError:
        law = None
    images = torch.randn(NUM_IMAGES, 3, px, px).contiguous(memory_format=torch.channels_last)
    draw_signal(
        str(path),
        title=f"Signal propagation of {name}",
        subtitle=f"at initialisation, branches open, {NUM_IMAGES} images of {px}×{px} px of unit normal noise",
        measured=nfnet.signal_propagation(model, images),
        law=law,
        on_noise=predict_on_noise(model),
    )
    return True


def training(steps: list[dict[str, Any]], path: Path) -> bool:
    """Loss, what was clipped (of each part of the network where records say so), gradient norm, speed; over the steps."""
    import matplotlib
    from matplotlib.figure import Figure

    if len(steps) < 2:
        return False
    every = max(1, len(steps) // MAX_POINTS)
    steps = [*steps[:-1:every], steps[-1]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 6.4), layout="constrained")
        (loss, clipped), (norm, speed) = figure.subplots(2, 2)
        _lines(loss, steps, {"": lambda s: s["loss"]}, "Training loss")
        parts = sorted({part for step in steps for part in step.get("parts") or ()}, key=_order)
        shares = {part: _of_part(part, "clipped_share") for part in parts} or {"": lambda s: s["clipped_share"]}
        _lines(clipped, steps, shares, "Units clipped by AGC, share")
        clipped.set_ylim(bottom=0)
        _lines(norm, steps, {"": lambda s: s["gradient_norm"]}, "Gradient norm after clipping", log=True)
        _lines(speed, steps, {"": lambda s: s["images_per_s"]}, "Images per second")
        speed.set_ylim(bottom=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, facecolor="white")
    return True


def _of_part(part: str, name: str) -> Any:
    return lambda step: (step.get("parts") or {}).get(part, {}).get(name)


def _order(part: str) -> tuple[int, str]:
    """Stem, stages, the rest: as the signal flows."""
    return (0 if part == "stem" else 1 if part.startswith("stage") else 2), part


def _lines(axes: Axes, steps: list[dict[str, Any]], series: dict[str, Any], title: str, *, log: bool = False) -> None:
    for number, (label, value) in enumerate(series.items()):
        points = [(s["step"], y) for s in steps if (y := value(s)) is not None and math.isfinite(y)]
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "ls": LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)],
            "lw": 1.4,
        }
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=shortened(label, MAX_LABEL_CHARACTERS) or None,
            **style,
        )
    if log:
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2, labelcolor=INK)
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel("step", fontsize=9, color=MUTED)
    quiet(axes)


def main(arguments: Sequence[str] | None = None) -> int:
    run_dir, kind = (arguments or sys.argv[1:])[:2]
    os.nice(10)
    records = [line.value for line in read(Path(run_dir) / "records.jsonl")]
    path = Path(run_dir) / FOLDER / f"{kind}.png"
    if kind == "training":
        steps = {r["step"]: r for r in reversed(records) if r["kind"] == "Step"}  # of steps done twice, the first
        return 0 if training([steps[number] for number in sorted(steps)], path) else 1
    configs = [json.loads(json.dumps(r["config"])) for r in records if r["kind"] == "Started"]
    return 0 if configs and signal(configs[0], path) else 1


if __name__ == "__main__":
    sys.exit(main())
