"""Arguments of `normfree transfer` and `report`."""

from __future__ import annotations

from typing import Any

from orchestration.arguments.parser import add


def transfer_commands(commands: Any) -> None:
    _transfer(commands)
    _report(commands)


def _transfer(commands: Any) -> None:
    p = add(
        commands,
        "transfer",
        "transfer",
        "few-shot and fine-tuning trials on a suite of tasks, against from scratch",
        [
            "normfree transfer runs/glyphs --suite demo --data-root data --out sweeps/demo",
            "normfree transfer s3://bucket/runs/c100 --suite small_images --data-root data --out sweeps/c100 --seeds 5",
            "normfree transfer ours=runs/c100 runs/convnext 'timm:convnext_atto@atto.safetensors' --suite small_images "
            "--data-root data --out sweeps/compared",
            "normfree transfer nfnet_f0@F0_haiku.npz --suite my.yaml --data-root data --out sweeps/f0 --budget '2 hours'",
        ],
    )
    p.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="+",
        help="a checkpoint or run folder; NAME@FILE, one of our networks and a file of published weights; timm:NAME[@FILE], "
        "timm's own weights or a local file's. Several stand in one table, each with its from-scratch twin; LABEL=CHECKPOINT "
        "names one",
    )
    p.add_argument("--suite", required=True, metavar="SUITE", help="name of a suite or path of its YAML")
    p.add_argument("--data-root", required=True, metavar="URL", help="holds one prepared dataset a task: ROOT/<card>")
    p.add_argument("--out", required=True, metavar="URL", help="sweep folder; the same command again resumes")
    p.add_argument("--seeds", type=int, help="supports drawn for each cell (default: the suite's)")
    p.add_argument(
        "--scheduler",
        choices=["halving", "hyperband", "asha", "none"],
        default="halving",
        help="which candidates of a search go on: halving and hyperband decide from what is written down, so any two sweeps "
        "select the same; asha is quicker and depends on which trial is first; none stops nobody. A method that states a "
        "search (ranges, in its suite) runs each trial to its end under all of them (default %(default)s)",
    )
    p.add_argument(
        "--budget", metavar="TEXT", help="for this call: '100 trials', '1e6 images', '2 hours', or several with commas"
    )
    p.add_argument("--trial-limit", metavar="TIME", help="a trial that takes longer is a failed one, as '30 minutes'")
    p.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time (default: one a core)")
    p.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="X",
        help="share of a GPU, 0 to 1, or whole GPUs: as many processes a trial (default: all GPUs over the trials at a time)",
    )
    p.add_argument(
        "--processes-per-trial", type=int, metavar="N", help="of fine-tuning trials, a core or GPU each (default: 1)"
    )
    p.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster, host:port; default: a Ray of its own on this machine"
    )
    p.add_argument(
        "--tracking-uri", metavar="URI", help="MLflow; default: MLFLOW_TRACKING_URI, else SQLite in the sweep folder"
    )


def _report(commands: Any) -> None:
    p = add(
        commands,
        "report",
        "report",
        "scorecard of sweeps: table, CSV, HTML page, picture; or one cell of it, run again",
        [
            "normfree report sweeps/demo",
            "normfree report sweeps/c100 sweeps/timm --out docs/results/c100 --overlap cifar10=overlap.csv",
            "normfree report sweeps/demo --rerun digits-ridge-pretrained-5",
        ],
    )
    p.add_argument("sweep", metavar="URL", nargs="+", help="sweep folders; several stand side by side")
    p.add_argument("--out", metavar="DIR", help="default: the first sweep folder's report/")
    p.add_argument(
        "--overlap",
        action="append",
        default=[],
        metavar="[TASK=]FILE",
        help="what 'data overlap UPSTREAM TASK --out FILE' wrote: scores with and without these images; again for each task",
    )
    p.add_argument("--data-root", metavar="DIR", help="where the datasets lie now; default: where the sweep read them")
    p.add_argument(
        "--rerun",
        metavar="CELL",
        help="run this cell's trials again; exit 0 if the mean lands in the recorded interval, else 1",
    )
