"""Train on this machine: in this process, or in several that torch's launcher starts, watches and ends together."""

from __future__ import annotations

import logging
import os
import sys
import uuid

from orchestration.launch.worker import EXIT_OURS, run_worker
from pipeline import storage
from pipeline.config import Run, dump_yaml
from pipeline.errors import UserError


def pretrain(run: Run, out: str, *, num_processes: int, tracking_uri: str | None, debug: bool) -> int:
    """Exit code of the run: 0 done, 2 the user's mistake, 75 stopped by a signal after saving, 1 anything else."""
    run.batch_plan(num_processes)  # a batch that does not divide is refused before anything starts
    if not run.data.url:
        raise UserError("the run has no data: set --data.url to a folder that 'normfree data prepare' wrote")
    if num_processes == 1:
        return run_worker(run, out, tracking_uri=tracking_uri, debug=debug)
    requested = storage.join(out, "requested.yaml")
    storage.write_bytes(requested, dump_yaml(run).encode())
    arguments = ["-m", "orchestration.launch.worker", requested, out]
    arguments += ["--tracking-uri", tracking_uri] if tracking_uri else []
    arguments += ["--debug"] if debug else []
    return _supervise(arguments, num_processes)


def _supervise(arguments: list[str], num_processes: int) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the workers say what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else EXIT_OURS
    return 0
