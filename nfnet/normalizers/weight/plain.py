"""No normaliser at all: biased convolutions and bare activations.

Idea: The control that every table needs: shallow residual networks train well without a normaliser, and a claim that
    a method helps shows nothing where this one trains.
Formula: activation(convolution(x)), weights normal with variance 2 / fan-in.
Training and evaluation: the same.
When: a control; shallow networks at small rates.
Source: He et al. 2015 (arXiv 1502.01852).
Uncertainty: none.
"""

from dataclasses import dataclass

from nfnet.normalizers.method import Method, method


@method("none")
@dataclass(frozen=True, kw_only=True)
class Plain(Method):
    pass
