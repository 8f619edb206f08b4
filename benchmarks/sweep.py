"""What a sweep costs next to its trials: 32 short trials through Ray Tune against the same work by hand, one after another.

And 100 linear heads in one pass over cached features against one head. Both sides of each are measured on one core, in turn, as
processor seconds where the work is ours alone, and as wall time where waiting is what is asked about: run it on an idle machine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.turns import hardware

NUM_SEEDS, SHOTS = 8, (1, 2)
LIMIT_SWEEP, LIMIT_HEADS = 1.15, 1.5
SUITE = {
    "name": "short",
    "tasks": [{"card": "digits", "holdout_per_class": 2}],
    "num_seeds": NUM_SEEDS,
    "methods": {
        "finetune": {"shots": list(SHOTS), "learning_rates": [0.1], "num_steps": [60], "batch": 16},
    },
}
"""2 numbers of shots x 2 inits x 8 seeds = 32 final trials; nothing is searched."""

BY_HAND = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from transfer.sweep.cells import Sweep, plan
from transfer.sweep.sources import open_source
from transfer.protocol.suite_files import load_suite
from transfer.sweep.trials import run_finetune
checkpoint, suite, out, root = sys.argv[1:]
begin = time.perf_counter()
sweep = Sweep(out=out, data_root=root, sources=(open_source(checkpoint),), suite=load_suite(suite))
for cell in plan(sweep)[0]:
    cell.select(out, dict(cell.points[0]), [])
    for trial in cell.finals(dict(cell.points[0]), sweep.suite.num_seeds):
        run_finetune(sweep, trial, lambda row: None)
print(json.dumps({"seconds_s": time.perf_counter() - begin}))
"""

SWEEP = """
import json, sys
from orchestration.tune.ray_tune import transfer
checkpoint, suite, out, root = sys.argv[1:]
result = transfer(checkpoint, suite, out, data_root=root, max_concurrent=1)
print(json.dumps({"seconds_s": result.seconds_s, "num_failed": result.num_failed, "num_run": result.num_run}))
"""


def main() -> None:
    print(hardware())
    _sweep()
    _heads()


def _sweep() -> None:
    import nfnet
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import load_card

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(load_card("digits"), str(place / "data" / "digits"))
        nfnet.save_weights(nfnet.create_model("nfnet_tiny", num_classes=10), place / "tiny.safetensors")
        (place / "suite.yaml").write_text(json.dumps(SUITE))
        seconds: dict[str, list[float]] = {"by hand": [], "sweep": []}
        for turn in range(2):
            for name, program in (("by hand", BY_HAND), ("sweep", SWEEP)):
                out = place / f"{name} {turn}"
                found = _run(program, [place / "tiny.safetensors", place / "suite.yaml", out, place / "data"])
                seconds[name].append(found["seconds_s"])
                entries = [json.loads(p.read_text()) for p in (out / "trials").iterdir()]
                assert len(entries) == 32 and all(e["status"] == "ok" for e in entries)
        by_hand, sweep = min(seconds["by hand"]), min(seconds["sweep"])
        print(f"32 trials of 60 steps, one core: by hand {by_hand:.1f} s, sweep {sweep:.1f} s, {sweep / by_hand:.2f}x")
        print(
            f"  the sweep's time begins before Ray starts; limit {LIMIT_SWEEP}x: {_verdict(sweep / by_hand, LIMIT_SWEEP)}"
        )


def _run(program: str, words: list[Path]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _heads() -> None:
    import torch

    from transfer.probes.linear import fit_linear, scores_of

    torch.set_num_threads(1)
    rng = np.random.Generator(np.random.PCG64(0))
    features = rng.standard_normal((20_000, 768), dtype=np.float32)
    labels = rng.integers(0, 100, 20_000)
    images = _extraction_s(len(features))
    times = {}
    for num in (1, 100):
        begin = time.process_time()
        grid = np.geomspace(1e-4, 0.1, num).tolist()
        heads = fit_linear(features, labels, 100, grid=grid, num_steps=200, batch=128, seed=0)
        scores_of(heads, features[:2000])
        times[num] = time.process_time() - begin
    ratio = (images + times[100]) / (images + times[1])
    print(
        f"linear heads on 20,000 images of 768 features, 100 classes, 200 steps: 1 head {times[1]:.1f} s, 100 heads "
        f"{times[100]:.1f} s; with the one pass of nfnet_tiny at 32 px before them ({images:.0f} s) {ratio:.2f}x, limit "
        f"{LIMIT_HEADS}x: {_verdict(ratio, LIMIT_HEADS)}"
    )


def _extraction_s(num: int) -> float:
    """Processor seconds of one pass over as many images."""
    import torch

    import nfnet

    network = nfnet.create_model("nfnet_tiny", num_classes=10).eval()
    images = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(images)
        begin = time.process_time()
        for _ in range(10):
            network(images)
        return (time.process_time() - begin) / 640 * num


def _verdict(ratio: float, limit: float) -> str:
    return "held" if ratio <= limit else "not held"


if __name__ == "__main__":
    main()
