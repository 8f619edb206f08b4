"""A run of several processes as a person meets it: a second one is refused, the printed command goes on when typed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
FIELDS = (
    "--global_batch 16 --augment.image_px 16 --optim.warmup '1 steps' --engine.parity_check false --log_every_steps 1"
)
LAUNCHERS = {
    "processes of ours": "normfree pretrain nfnet_tiny_glyphs --num-processes 2",
    "torchrun": f"torchrun --standalone --nproc-per-node 2 {BIN}/normfree pretrain nfnet_tiny_glyphs",
}


def typed(command: str, folder: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        f"exec {command}",
        shell=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_to(process: "subprocess.Popen[str]", word: str) -> str:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(word, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_second_run_is_refused_and_the_printed_command_goes_on(launcher: str, digits: str, tmp_path: Path) -> None:
    command = f"{LAUNCHERS[launcher]} --data.url {digits} --out 'my run' --duration '4000 steps' {FIELDS}"
    first = typed(command, tmp_path)
    read_to(first, r"^step \d")
    second, _ = (other := typed(command, tmp_path)).communicate()
    assert other.returncode != 0 and second.count("my run is in use: a run of process ") == 1, second
    assert other.returncode == 2 or launcher == "torchrun"
    first.terminate()
    said = first.communicate()[0]
    (resume,) = re.findall(r"^ *go on  (.*)$", said, re.MULTILINE)
    third = typed(resume, tmp_path)
    third_from = int(read_to(third, r"^ *from  step").rpartition("from  step ")[2].partition(",")[0])
    read_to(third, r"^step \d")
    third.kill()  # and not its ranks, which save and leave
    third.wait()
    fourth = typed(resume, tmp_path)
    assert 0 < third_from < int(read_to(fourth, r"^ *from  step").rpartition("from  step ")[2].partition(",")[0])
    os.killpg(fourth.pid, signal.SIGKILL)
    fourth.wait()
