"""What libraries are set to and the run does not say: recorded once, compared at each start and over the ranks.

    library_settings.json    in the run folder: of the newest start, by name

DeepSpeed's own defaults, torch's switches, and variables of the environment that libraries read. What decides numbers must be
the same on all ranks; everything else that differs is named, and so is each change since the start before.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping

import torch

from pipeline import distributed, documents
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.records import Changed, Record
from pipeline.secrets import public
from pipeline.storage import objects

NAME = "library_settings.json"
VARIABLES = re.compile(
    r"(?:NCCL|GLOO|TORCH|CUDA|CUDNN|CUBLAS|ONEDNN|DNNL|OMP|MKL|KMP|PYTORCH|DS)_[A-Z0-9_]{1,60}", re.ASCII
)
A_RANKS_OWN = ("CUDA_VISIBLE_DEVICES",)
ENVIRONMENT = "environment "
MAX_NAMED, MAX_VALUE = 8, 200


def of_process(library: Mapping[str, str]) -> dict[str, str]:
    """Of this process, with what the engine's library is set to, by name."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = {
        "torch default dtype": str(torch.get_default_dtype()),
        "torch float32 matmul precision": torch.get_float32_matmul_precision(),
        "torch deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "torch cudnn.enabled": str(cudnn.enabled),
        "torch cudnn.benchmark": str(cudnn.benchmark),
        "torch cudnn.deterministic": str(cudnn.deterministic),
        "torch cudnn.allow_tf32": str(cudnn.allow_tf32),
        "torch matmul.allow_tf32": str(matmul.allow_tf32),
        "torch matmul.allow_bf16_reduced_precision_reduction": str(matmul.allow_bf16_reduced_precision_reduction),
        "torch mkldnn.enabled": str(torch.backends.mkldnn.enabled),
    }
    variables = {n: v for n, v in sorted(os.environ.items()) if VARIABLES.fullmatch(n) and n not in A_RANKS_OWN}
    found |= {f"{ENVIRONMENT}{name}": public(value) for name, value in variables.items()}
    return {
        name: value[:MAX_VALUE] for name, value in (found | {f"deepspeed {n}": v for n, v in library.items()}).items()
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of what is not the same; variables of the environment last."""
    names = sorted({*before, *now}, key=lambda name: (name.startswith(ENVIRONMENT), name))
    return [name for name in names if before.get(name) != now.get(name)]


def compared(out: str, me: World, library: Mapping[str, str], step: int) -> Iterator[Record]:
    """What differs, in words; this start's settings are then the ones on record. A collective.

    Raises:
        UserError: ranks differ in what decides numbers.
    """
    mine = of_process(library)
    main = distributed.broadcast(me, mine)
    names = differences(main, mine)
    shown = [(name, mine.get(name, "not set")) for name in names[:MAX_NAMED]]
    answers = distributed.gather(me, (len(names), shown))
    odd = {rank: answer for rank, (num, answer) in enumerate(answers) if num}
    for rank, answer in odd.items():
        decides = [(name, value) for name, value in answer if not name.startswith(ENVIRONMENT)]
        if decides:
            name, value = decides[0]
            raise UserError(
                f"rank {rank} has {name} = {value}, and rank 0 {main.get(name, 'not set')}, which decides numbers; start all "
                "ranks with the same versions and settings"
            )
    if odd:
        rank, answer = next(iter(odd.items()))
        listed = ", ".join(f"{name.removeprefix(ENVIRONMENT)} = {value}" for name, value in answer)
        text = f"{len(odd)} ranks have other variables than rank 0; rank {rank}: {listed}"
        yield Changed(step=step, what="library settings of hosts", text=text)
    before = distributed.from_main(me, lambda: _recorded(out, main))
    if names := differences(before, main):
        listed = ", ".join(
            f"{n} is {main.get(n, 'not set')} and was {before.get(n, 'not set')}" for n in names[:MAX_NAMED]
        )
        more = f", and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        yield Changed(step=step, what="library settings", text=f"since the last start of the run {listed}{more}")


def _recorded(out: str, now: dict[str, str]) -> dict[str, str]:
    """What stood on record, or else what stands there from now on."""
    place = objects.join(out, NAME)
    try:
        before = documents.read(place, dict[str, str], remedy="delete it; it is written again")
    except FileNotFoundError:
        before = None
    if before != now:
        objects.write_bytes(place, (json.dumps(now, indent=1) + "\n").encode())
    return now if before is None else before
