"""The store through which the agents of a job meet: a process of its own, outside of all of them.

    python -P -m orchestration.launch.store ADDRESS PORT       PORT 0: a free one; the first line says which

It listens on that address alone. It has no password: whoever reaches it can end the job, and runs no code (`pipeline.exchange`),
so the address is one of a network that is the user's. It holds nothing that is needed once the agents have left.
"""

import argparse
import signal

from orchestration import child_process
from orchestration.run.rank_end import EXIT_USER
from pipeline.display import terminal
from pipeline.errors import UserError
from pipeline.supervision.process_exit import run as run_process
from pipeline.supervision.stop_signals import say


def main() -> int:
    parser = argparse.ArgumentParser(description="the store of a job (started by 'normfree launch')")
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    args = parser.parse_args()
    try:
        store = child_process.listening_store(args.address, args.port)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        say(
            f"the job's store cannot listen on {args.address}:{args.port} ({why}); give another port, or an address of this host"
        )
        return EXIT_USER
    except UserError as error:
        say(str(error))
        return EXIT_USER
    print(terminal(f"{args.address} {store.port}"), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    return 0


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    run_process(main)
