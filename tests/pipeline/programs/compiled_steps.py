"""Run by test_compile_engine.py on several ranks: steps compiled by inductor against eager ones; raises where they differ."""

import sys
import warnings

import torch

from pipeline.distributed import leave
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.supervision.process_exit import end
from tests.pipeline.compilation.test_compile_engine import assert_equal_to_eager


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the compiler's own
    stage = int(sys.argv[1])
    print(assert_equal_to_eager(EngineConfig(compile="network", zero_stage=stage)), flush=True)  # type: ignore[arg-type]
    leave()


if __name__ == "__main__":
    main()
    end(0)
