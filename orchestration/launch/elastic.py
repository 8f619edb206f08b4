"""torch's elastic agent, as it is used here: one agent is one attempt, and has no restarts of its own.

By itself it restarts after any code but 0, forgets the codes, knows no window and no pause, gives saves 30 s when hosts
change, and shares one store over all attempts, with which a host that returns ends the job (torch 2.15). Rendezvous, the
start and the end of ranks, and what a host that joins or leaves means for the others are its.
"""

import logging
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed import Store
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState, create_handler

from pipeline.errors import UserError
from pipeline.exchange import objects

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
POLL_S = 0.1
LAST_CALL_S = 10
"""When there are enough hosts but not all, so long they wait for the others."""


def rendezvous(
    store: Store, *, run_id: str, min_hosts: int, max_hosts: int, own_address: str, join_s: float
) -> RendezvousHandler:
    """Of the agents of one job, through `store`.

    Raises:
        RendezvousConnectionError: it does not answer.
    """
    os.environ[OWN_STORE] = "1"  # one for each attempt, and it is rank 0's: torch reads the variable at each rendezvous
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="",
        run_id=run_id,
        min_nodes=min_hosts,
        max_nodes=max_hosts,
        local_addr=own_address,
        join_timeout=max(1, int(join_s)),
        last_call_timeout=LAST_CALL_S,
    )
    return create_handler(store, _Backend(store, run_id), parameters)


class _Backend(C10dRendezvousBackend):
    """torch unpickles the state that stands in the store, which has no password: no other state comes through here."""

    def _decode_state(self, base64_state: bytes) -> tuple[bytes, Any] | None:
        found = super()._decode_state(base64_state)
        if found is not None:
            try:
                state = objects.loads(found[0], {(c.__module__, c.__name__): c for c in (_RendezvousState, _NodeDesc)})
            except UserError as error:
                raise RendezvousStateError(str(error)) from None
            if type(state) is not _RendezvousState:
                raise RendezvousStateError(
                    f"what stands in the job's store is no state of its agents; {objects.REMEDY}"
                )
        return found


class Agent(LocalElasticAgent):
    """Of one attempt.

    Args:
        command: of a rank, program first.
        environment: of the ranks, besides that of this process; it goes before what torch's agent sets.
        start: called where ranks are to be started, with the group and what starts them; it may raise instead.
        grace_s: what ranks have for their saves when a host joins.
    """

    def __init__(
        self,
        handler: RendezvousHandler,
        command: tuple[str, ...],
        *,
        processes: int,
        environment: Mapping[str, str],
        start: Callable[[WorkerGroup, Callable[[], dict[int, Any]]], dict[int, Any]],
        grace_s: float,
    ) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=processes,
            entrypoint=command[0],
            args=command[1:],
            rdzv_handler=handler,
            max_restarts=0,
            monitor_interval=POLL_S,
        )
        super().__init__(spec, _Surroundings(environment), shutdown_timeout=max(1, int(grace_s)))
        self._start_ranks = start

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        return self._start_ranks(worker_group, lambda: super(Agent, self)._start_workers(worker_group))

    def _exit_barrier(self) -> None:
        """The wait for the ends of other hosts is the verdict's; torch's own warns of each second of it."""

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        # When hosts change, torch calls this without the time that it was given.
        super()._shutdown(death_sig, max(timeout, self._shutdown_timeout))


class _Surroundings(DefaultLogsSpecs):
    """The ranks write where this process writes, and get variables of ours, without any being set in this process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(log_dir=os.devnull)  # otherwise a folder in the temporary one stays behind
        self._environment = dict(environment)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for variables in envs.values():
            variables.update(self._environment)
        return super().reify(envs)


def quiet_logs() -> None:
    """What torch's agent logs on the way (each signal to a rank, each failure) is reported in sentences of ours."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
