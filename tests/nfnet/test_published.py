"""The networks are the published ones: counts from the papers' tables, outputs recorded from DeepMind's haiku code.

`golden/` holds what that code computed for NFNet-F0 (jax 0.10.2, float32, CPU) on weights and images that
`reference.py` draws again by name; no code or weights of it are stored.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nfnet
from nfnet.analysis.flops import count_parameters, multiply_adds
from nfnet.optim.agc import adaptive_clip_grad_
from nfnet.optim.losses import label_smoothing_cross_entropy
from nfnet.variants import get_variant
from nfnet.weights.haiku import load_haiku
from tests.nfnet.haiku_names import haiku_names

GOLDEN = Path(__file__).parent / "golden"
DATA = json.loads((GOLDEN / "nfnet_f0_64px.json").read_text())
RECORDED = np.load(GOLDEN / "nfnet_f0_64px.npz")
_spec = importlib.util.spec_from_file_location("golden_reference", GOLDEN / "reference.py")
assert _spec and _spec.loader
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

RELEASED = {k: (v["params"], v["flops_test_res"]) for k, v in DATA["counts_published_code"].items()}
PAPER = {k: tuple(v) for k, v in DATA["counts_paper_width"].items()}


def counts(name: str, **options: bool) -> tuple[int, int]:
    name = f"nfnet_{name.lower()}"
    with torch.device("meta"):
        model = nfnet.create_model(name, **options)
    return count_parameters(model), multiply_adds(model, get_variant(name).test_px)


@pytest.mark.parametrize("name", RELEASED)
def test_counts_equal_the_released_code(name: str) -> None:
    assert counts(name, rounded_bottleneck=True) == RELEASED[name]


@pytest.mark.parametrize("name", PAPER)
def test_counts_of_the_plus_variants_equal_the_paper(name: str) -> None:
    assert counts(name) == PAPER[name]


@pytest.fixture(scope="module")
def f0() -> nfnet.NFNet:
    model = nfnet.create_model("nfnet_f0").eval()
    shapes = DATA["F0_64"]["shapes"]
    tree = {
        m: {k: torch.from_numpy(np.asarray(reference.seeded_param(m, k, s))) for k, s in keys.items()}
        for m, keys in shapes.items()
    }
    load_haiku(model, tree, "the recorded parameters")
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(reference.seeded_images(2, 64)).permute(0, 3, 1, 2).contiguous()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_every_published_parameter_has_one_of_ours(f0: nfnet.NFNet) -> None:
    theirs = {(m, k) for m, keys in DATA["F0_64"]["shapes"].items() for k in keys}
    assert sorted(haiku_names(f0).values()) == sorted(theirs)


def test_logits_equal_the_published_code(f0: nfnet.NFNet, images: torch.Tensor) -> None:
    with torch.no_grad():
        features = f0.forward_features(images)
    assert relative(f0.forward_head(features, pre_logits=True).numpy(), RECORDED["pool"]) < 5e-6
    assert relative(f0.forward_head(features).detach().numpy(), RECORDED["logits"]) < 5e-6


def test_signal_statistics_equal_the_published_code(f0: nfnet.NFNet, images: torch.Tensor) -> None:
    found = nfnet.signal_propagation(f0, images)
    for key, values in (
        ("avg_sq_mean", found.squared_mean),
        ("avg_var", found.variance),
        ("res_avg_var", found.residual_variance),
    ):
        theirs = [float(RECORDED[f"{key}_{i}"]) for i in range(len(values))]
        np.testing.assert_allclose(values, theirs, rtol=1e-4)


def test_gradient_norms_before_and_after_clipping_equal_the_published_code(
    f0: nfnet.NFNet, images: torch.Tensor
) -> None:
    f0.zero_grad()
    labels = torch.arange(2) * 7 % 1000
    loss = label_smoothing_cross_entropy(f0(images), labels, 0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(RECORDED["loss"]), rel=1e-5)
    ours = {f"{m}:{k}": n for n, (m, k) in haiku_names(f0).items()}
    parameters = dict(f0.named_parameters())

    def norms() -> list[float]:
        grads = (parameters[ours[name]].grad for name in DATA["F0_64"]["grad_names"])
        return [float(g.double().norm()) for g in grads if g is not None]

    np.testing.assert_allclose(norms(), RECORDED["grad_norms"], rtol=1e-4)
    # The recording clipped all parameters; by rule ours leaves the classifier's weight alone.
    adaptive_clip_grad_(f0.named_parameters(), clipping=0.01, eps=1e-3)
    head = DATA["F0_64"]["grad_names"].index("NFNet/~/linear:w")
    keep = [i for i in range(len(RECORDED["clipped_norms"])) if i != head]
    np.testing.assert_allclose(np.array(norms())[keep], RECORDED["clipped_norms"][keep], rtol=1e-4)
    assert norms()[head] == pytest.approx(float(RECORDED["grad_norms"][head]), rel=1e-4)
