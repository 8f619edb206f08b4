"""What counting saved tensors leaves behind."""

import gc
import weakref

import torch
from torch import nn

from nfnet.analysis.activation_memory import saved_bytes


def test_what_was_counted_is_freed() -> None:
    """A node that keeps its own output made a circle: every trial of a laboratory left all its activations in the process."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())  # a sigmoid saves its output
    with saved_bytes(model) as counter:
        output = model(torch.ones(2, 4))
    seen = weakref.ref(output)
    del output
    gc.collect()
    assert counter.total == 2 * 32 and seen() is None  # the input and the sigmoid's output
