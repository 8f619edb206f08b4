"""Fused loops for the parts of a step that only move memory, each beside a plain torch twin of the same signature.

`plain` is the reference: the tests compare every other implementation with it. `gpu` launches the Triton programs of
`weight_programs`, `activation_programs` and `update_programs`; importing it loads no Triton.
"""

LAUNCH = {"enable_fp_fusion": True}
"""Of every program: a * b + c is rounded once. Said aloud because Triton's own default changes between versions."""
