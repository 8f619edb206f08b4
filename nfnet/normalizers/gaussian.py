"""What an activation makes of a normal variable, by quantiles."""

from collections.abc import Callable

import torch

POINTS = 200


def quantiles(like: torch.Tensor) -> torch.Tensor:
    """(200,) of the standard normal, at (i + 1/2) / 200, in the type and on the device of `like`."""
    steps = (torch.arange(POINTS, device=like.device, dtype=torch.float64) + 0.5) / POINTS
    return torch.special.ndtri(steps).to(like.dtype)


def activation_moments(
    function: Callable[[torch.Tensor], torch.Tensor], mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) of function(N(mean, std^2)), mean and std (C,); about 1 % exact."""
    z = function(mean[:, None] + std[:, None] * quantiles(mean))
    var, average = torch.var_mean(z, dim=1, correction=0)
    return average, var
