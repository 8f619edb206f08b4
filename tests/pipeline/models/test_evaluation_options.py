"""Views and a temperature: against the same written with NumPy and SciPy, and from the command line."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from torch import nn

from orchestration.cli import main
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image
from pipeline.data.format.manifest import Manifest
from pipeline.errors import UserError
from pipeline.models.evaluation_options import Views, fit_temperature, with_views

Make = Callable[..., str]


class Pixels(nn.Module):
    """Logits that tell every place of an image apart."""

    def __init__(self, px: int) -> None:
        super().__init__()
        self.weight = torch.from_numpy(np.random.default_rng(0).normal(size=(3 * px * px, 4)).astype(np.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(len(images), -1) @ self.weight


def test_views_are_the_mean_of_probabilities_over_crops_and_mirror_images() -> None:
    network = Pixels(4)
    images = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 3, 7, 7)).astype(np.float32))
    found = Views(network, 4, flip=True, crops=5)(images)
    whole, weight = images.numpy(), network.weight.numpy()
    views = [whole[:, :, y : y + 4, x : x + 4] for y, x in ((0, 0), (0, 3), (3, 0), (3, 3), (2, 2))]
    views += [view[..., ::-1] for view in views]
    expected = np.mean([softmax(view.reshape(2, -1) @ weight, axis=1) for view in views], axis=0)
    np.testing.assert_allclose(found.exp().numpy(), expected, rtol=1e-4)
    np.testing.assert_allclose(found.exp().sum(1).numpy(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(("resize", "px"), [("published", 20), ("square", 21), ("square", 20), ("aspect", 21)])
def test_the_centre_view_is_what_evaluation_looks_at(resize: str, px: int) -> None:
    augment = AugmentConfig(image_px=px, eval_resize=resize)  # type: ignore[arg-type]
    image = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    network, larger = with_views(nn.Identity(), augment, flip=False, crops=5)
    assert isinstance(network, Views)
    whole = torch.from_numpy(eval_image(image, larger)).permute(2, 0, 1)[None]
    centre = network._crops(whole)[0][0].permute(1, 2, 0).numpy()
    assert np.array_equal(centre, eval_image(image, augment)) and whole.shape[-1] > px


def test_no_views_change_nothing_and_a_whole_image_has_no_corners() -> None:
    augment = AugmentConfig(image_px=16)
    network = nn.Identity()
    assert with_views(network, augment, flip=False, crops=1) == (network, augment)
    with pytest.raises(UserError, match="needs a margin"):
        with_views(network, AugmentConfig(image_px=16, eval_resize="aspect", eval_crop=1.0), flip=False, crops=5)


@pytest.mark.parametrize("factor", [1.0, 0.1, 7.0])
def test_the_temperature_is_scipys_minimum_of_the_cross_entropy(factor: float) -> None:
    rng = np.random.default_rng(3)
    logits = factor * rng.normal(size=(200, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(logits / factor * 1.5, axis=1)])

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(200), labels].mean())

    expected = np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10}).x)
    assert fit_temperature(torch.from_numpy(logits), torch.from_numpy(labels)) == pytest.approx(expected, rel=1e-4)


def test_logits_that_are_all_right_have_no_best_temperature() -> None:
    labels = torch.arange(5)
    for sign in (1.0, -1.0):  # all right; and worse than no look at all
        with pytest.raises(UserError, match="fit it on more images"):
            fit_temperature(sign * torch.eye(5), labels)


@pytest.mark.slow
def test_from_the_command_line(
    make_checkpoint: Make, digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make_checkpoint(tmp_path, classes=list(Manifest.open(digits).classes))
    plain = f"evaluate {url} {digits} --split train"
    assert main(plain.split()) == 0
    first = capsys.readouterr().out
    assert main([*plain.split(), "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    loss = re.findall(r"loss (\d+\.\d+)", out)
    assert out.startswith(first.rstrip()) and loss[0] == loss[1]
    assert main([*plain.split(), "--flip", "--crops", "5"]) == 0 and "top-1" in capsys.readouterr().out
    for words, sentence in (
        (["--fit-temperature", "test"], "nothing is chosen on a test split"),
        (["--fit-temperature", "train"], "is the split that is reported"),
        (["--fit-temperature", "val", "--temperature", "2"], "not allowed with"),
        (["--crops", "3"], "invalid choice"),
    ):
        try:
            code = main([*plain.split(), *words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert code == 2 and sentence in capsys.readouterr().err
    assert main([*plain.split(), "--fit-temperature", "val"]) in (0, 2)
    told = capsys.readouterr()
    assert "fitted on" in told.out or "fit it on more images" in told.err
