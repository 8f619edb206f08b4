"""What signal propagation should look like at initialisation: the laws, and the one that fits a network.

Sources: Brock et al. 2021a, sections 2 and 3; for `on_noise` and `conv_bn_relu` the same moments carried through each
layer. 1/pi and 1 - 1/pi are twice the squared mean and the variance of a rectified standard normal; He initialisation
doubles them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nfnet.analysis.signal_propagation import SignalPropagation, residual_blocks, shortcut_of
from nfnet.block import Block

_NO_LAW = math.nan
"""Of the stem of a network whose stem normalises or pools."""


def normaliser_free(transitions: Sequence[bool], gains: Sequence[float], alpha: float = 0.2) -> SignalPropagation:
    """x' = shortcut + alpha * gain * f: the variance grows by (alpha * gain)^2 a block, from 1 at each transition.

    Args:
        transitions: for each block, whether its shortcut has layers.
        gains: SkipInit gain of each block; all 1: 1 + b * alpha^2 after b blocks of a stage; all 0: 1 throughout.
    """
    variance = [1.0]
    for starts, gain in zip(transitions, gains, strict=True):
        variance.append((1.0 if starts else variance[-1]) + (alpha * gain) ** 2)
    return SignalPropagation([0.0] * len(variance), variance, [1.0] * len(gains), list(transitions))


def bn_relu_conv(
    transitions: Sequence[bool], branches: Sequence[float] = (), shortcuts: Sequence[float] = ()
) -> SignalPropagation:
    """Pre-activation: every branch and every shortcut convolution adds (1 - 1/pi) variance and 1/pi squared mean.

    So after b blocks of a stage (1 - 1/pi)(b + 1) and (b + 1)/pi: transitions start again at the shortcut's own share.

    Args:
        branches, shortcuts: for each block, the mean squared weight of its last (shortcut) convolution times fan-in / 2:
            1 for He initialisation by fan-in, which is also the default. Shortcuts' entries of other blocks are not read.
    """
    branches = branches or [1.0] * len(transitions)
    shortcuts = shortcuts or [1.0] * len(transitions)
    total = _NO_LAW  # He-initialised convolutions that were added up
    totals = [total]
    for starts, branch, shortcut in zip(transitions, branches, shortcuts, strict=True):
        total = (shortcut if starts else total) + branch
        totals.append(total)
    keep = 1 - 1 / math.pi
    return SignalPropagation(
        [t / math.pi for t in totals], [t * keep for t in totals], [b * keep for b in branches], list(transitions)
    )


def conv_bn_relu(
    transitions: Sequence[bool], gains: Sequence[float] = (), shortcuts: Sequence[float] = ()
) -> SignalPropagation:
    """Post-activation: the sum in relu(shortcut + BN(f)). At a transition both terms are normalised: variances add.

    Elsewhere the shortcut is the last sum, rectified. There is no formula for long stages, so the sum's density is
    carried along on a grid: rectified, then blurred by the branch's normal density.

    Args:
        gains, shortcuts: squared scale of the normalisation that ends each branch (each shortcut), averaged over channels.
    """
    gains, shortcuts = gains or [1.0] * len(transitions), shortcuts or [1.0] * len(transitions)
    x = torch.linspace(-20, 60, 4001, dtype=torch.float64)
    density: torch.Tensor | None = None
    moments = [(_NO_LAW, _NO_LAW)]
    for starts, gain, shortcut in zip(transitions, gains, shortcuts, strict=True):
        if starts:
            density = _normal(x, shortcut + gain)
        elif density is not None:
            positive = torch.where(x > 0, density, 0.0)
            positive[int((x < 0).sum())] += 1 - positive.sum()  # all that was below 0 is now at 0
            kernel = _normal(x - x.mean(), gain)
            density = torch.nn.functional.conv1d(positive[None, None], kernel[None, None], padding="same")[0, 0]
        if density is None:
            moments.append((_NO_LAW, _NO_LAW))
        else:
            mean = float((density * x).sum())
            moments.append((mean**2, float((density * x**2).sum()) - mean**2))
    return SignalPropagation([m for m, _ in moments], [v for _, v in moments], list(gains), list(transitions))


def _normal(x: torch.Tensor, variance: float) -> torch.Tensor:
    """Probabilities of the grid's points; a variance of 0 is a point."""
    density = torch.exp(-(x**2) / (2 * max(variance, 1e-12)))
    return density / density.sum()


@torch.no_grad()
def predict(model: nn.Module) -> SignalPropagation:
    """The law of a freshly initialised network, with its own SkipInit gains and initial scales.

    The input has unit variance, shortcuts do not pool (`predict_on_noise` knows how they do), borders are far.

    Raises:
        ValueError: neither normaliser-free nor BatchNorm and ReLU without squeeze-excite: there is no law for it here.
    """
    blocks = residual_blocks(model)
    transitions = [shortcut_of(b) is not None for b in blocks]
    if all(isinstance(getattr(b, "alpha", None), float) for b in blocks):
        gains = [_skip_gain(b) for b in blocks]
        law = normaliser_free(transitions, gains, alpha=blocks[0].alpha)  # type: ignore[arg-type]
        if any("MaxPool" in type(m).__name__ for m in model.modules()):
            law.variance[0] = law.squared_mean[0] = _NO_LAW
        return law
    layers = [_branch_layers(b) for b in blocks]
    gates = any(isinstance(getattr(b, "se", None), nn.Module) for b in blocks)
    rectified = any(isinstance(m, nn.ReLU) for m in model.modules())
    normalised = all(any(isinstance(m, _BatchNorm) for m in found) for found in layers)
    if gates or not rectified or not normalised:
        raise ValueError(
            f"there is no law for {type(model).__name__}: only for NF networks, and for BatchNorm with ReLU"
        )
    ends, shortcuts = [found[-1] for found in layers], [_shortcut_layers(b) for b in blocks]
    if all(isinstance(m, nn.Conv2d) for m in ends):
        return bn_relu_conv(transitions, [_he_share(m) for m in ends], [_he_share(_last_conv(s)) for s in shortcuts])
    return conv_bn_relu(transitions, [_scale(m) for m in ends], [_scale(s[-1]) if s else 1.0 for s in shortcuts])


@torch.no_grad()
def predict_on_noise(model: nn.Module) -> SignalPropagation | None:
    """Where `predict` does not hold: shortcuts that average pixels, fed with pixels that have nothing in common.

    A k x k mean of independent pixels has 1 / k^2 of their variance, and what comes after is scaled down by an expected
    standard deviation that is too large. Real images lie between this and `predict`. None: no shortcut pools.
    """
    blocks = [b for b in residual_blocks(model) if isinstance(b, Block)]
    if not any(b.pool_stride > 1 for b in blocks):
        return None
    variances, branches = [1.0], []
    for block in blocks:
        entering = _activated_variance(block.act0, variances[-1])
        branch = entering
        inner = [block.act1, *([block.act1b] if block.has_second_3x3 else []), block.act2]
        for activation in inner:
            branch = _activated_variance(activation, branch)
        starts = block.conv_shortcut is not None
        shortcut = entering / block.pool_stride**2 if starts else variances[-1]
        branches.append(branch)
        variances.append(shortcut + (block.alpha * _skip_gain(block)) ** 2 * branch)
    return SignalPropagation([0.0] * len(variances), variances, branches, [b.conv_shortcut is not None for b in blocks])


def _activated_variance(activation: Callable[[torch.Tensor], torch.Tensor], variance: float) -> float:
    """Of activation(z) for normal z; a standardised convolution of gain 1 keeps it, and takes the mean away."""
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    density, y = _normal(z, 1.0), activation(z * math.sqrt(variance))
    mean = (density * y).sum()
    return float((density * (y - mean) ** 2).sum())


def _skip_gain(block: nn.Module) -> float:
    for name in ("skip_gain", "skipinit_gain"):
        gain = getattr(block, name, None)
        if isinstance(gain, torch.Tensor):
            return float(gain)
    return 1.0


def _branch_layers(block: nn.Module) -> list[nn.Module]:
    """Convolutions and normalisers of the branch, as registered."""
    shortcut = shortcut_of(block)
    aside = set() if shortcut is None else set(shortcut.modules())
    return [m for m in block.modules() if m not in aside and isinstance(m, nn.Conv2d | _BatchNorm)]


def _shortcut_layers(block: nn.Module) -> list[nn.Module]:
    shortcut = shortcut_of(block)
    return [] if shortcut is None else [m for m in shortcut.modules() if isinstance(m, nn.Conv2d | _BatchNorm)]


def _last_conv(layers: Sequence[nn.Module]) -> nn.Module | None:
    return next((m for m in reversed(layers) if isinstance(m, nn.Conv2d)), None)


def _he_share(conv: nn.Module | None) -> float:
    """Mean squared weight times fan-in / 2, which is 1 at He initialisation by fan-in."""
    return 1.0 if not isinstance(conv, nn.Conv2d) else float(conv.weight.square().mean()) * conv.weight[0].numel() / 2


def _scale(layer: nn.Module) -> float:
    weight = getattr(layer, "weight", None)
    return float(weight.square().mean()) if isinstance(layer, _BatchNorm) and weight is not None else 1.0
