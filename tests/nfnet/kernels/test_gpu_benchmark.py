"""What of the GPU's benchmark can be held without one."""

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out == "gpu: there is no GPU here, so nothing is measured\n"
