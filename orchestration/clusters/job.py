"""What is launched, independent of where: the run, and what each host's agent is given."""

import secrets
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.training.run import Run, dump_yaml

RESTART_WINDOW_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Job:
    run: Run
    out: str
    command: str
    """What was typed."""
    num_hosts: int
    processes: int
    """Ranks a host."""
    min_hosts: int = 1
    """With fewer the run stops."""
    first_hosts: int | None = None
    """So many are enough to start with; None = all."""
    max_restarts: int = 10
    """Within `RESTART_WINDOW_S`."""
    debug: bool = False

    def check(self) -> None:
        """UserError for what can be seen before anything starts anywhere."""
        if not self.out:
            raise UserError(
                "no run folder: set --out to where checkpoints and records go, on a disk or in a store that all hosts share"
            )
        if not self.run.data.url:
            raise UserError("the run has no data: set --data.url to a folder that 'normfree data prepare' wrote")
        if not 1 <= self.min_hosts <= self.num_hosts:
            raise UserError(f"--min-hosts is {self.min_hosts}; set it to 1 to {self.num_hosts}, the number of hosts")
        if self.max_restarts < 0:
            raise UserError(f"--max-restarts is {self.max_restarts}; set it to 0 or more")
        try:
            self.run.batch_plan(self.num_hosts * self.processes)
        except UserError as error:
            raise UserError(f"{self.num_hosts} hosts with {self.processes} ranks each: {error}") from None

    def document(self, *, run_id: str, store: str, **more: Any) -> dict[str, Any]:
        """For `orchestration.launch.agent`; `more`: what is one host's own."""
        return {
            "run": dump_yaml(self.run),
            "out": self.out,
            "command": self.command,
            "run_id": run_id,
            "min_hosts": self.min_hosts,
            "max_hosts": self.num_hosts,
            "processes": self.processes,
            "store": store,
            "max_restarts": self.max_restarts,
            "restart_window_s": RESTART_WINDOW_S,
            "grace_s": self.run.watchdog.grace_s,
            "debug": self.debug,
            **more,
        }


def new_run_id() -> str:
    return secrets.token_hex(8)
