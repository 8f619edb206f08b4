"""Weights to and from timm: names, shapes and outputs are those of the installed timm."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import nfnet

LARGE = [f"{family}_f{n}" for family in ("dm_nfnet", "nfnet") for n in range(2, 8)]
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
    for name in timm.list_models(
        ["dm_nfnet_f*", "nfnet_f*", "nf_resnet*", "nf_regnet_b*"], exclude_filters="nf_resnet26"
    )
]


def theirs(name: str, **options: Any) -> torch.nn.Module:
    """timm's network with every parameter away from its initial value."""
    torch.manual_seed(1)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("gain", "bias")):
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if key.endswith("gain") else 0.0))
    return model


def ours(name: str, **options: Any) -> nfnet.NFNet:
    return nfnet.create_model(name, **nfnet.timm_options(name), **options).eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_network_of_timm_has_our_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        exported, model = nfnet.to_timm(ours(name)), timm.create_model(name)
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "name", ["dm_nfnet_f0", "nf_resnet50", "nf_regnet_b1", pytest.param("nfnet_f0", marks=pytest.mark.slow)]
)
def test_outputs_equal_timms_and_weights_return(name: str) -> None:
    timm_model, model = theirs(name), ours(name)
    report = nfnet.from_timm(model, timm_model.state_dict())
    assert not report.notes and not report.head_remade and report.num_loaded == len(timm_model.state_dict())
    for size in (64, 75):
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected, found = timm_model(images), model(images)
        assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    back = nfnet.to_timm(model)
    for key, value in timm_model.state_dict().items():
        folded = name != "dm_nfnet_f0" and re.match(r"(stem\.conv1?|final_conv)\.gain|head\.fc\.weight", key)
        if folded:
            neighbour = torch.nextafter(value, torch.full_like(value, torch.inf))
            assert ((back[key] - value).abs() <= (neighbour - value).abs()).all(), key
        else:
            assert torch.equal(back[key], value), key


@pytest.mark.parametrize("file", ["safetensors", "pth", "legacy pth", "checkpoint"])
def test_files_of_timm_are_read(tmp_path: Path, file: str) -> None:
    timm_model, model, path = (
        theirs("nf_regnet_b0", num_classes=5),
        ours("nf_regnet_b0", num_classes=5),
        tmp_path / "model.bin",
    )
    state = timm_model.state_dict()
    if file == "safetensors":
        save_file(state, path)
    elif file == "checkpoint":  # as timm's training script writes it
        other = {k: torch.zeros_like(v) for k, v in state.items()}
        torch.save({"epoch": 3, "arch": "nf_regnet_b0", "state_dict": other, "state_dict_ema": state}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file == "pth")
    report = nfnet.load_published(model, path)
    assert report.format == "timm"
    assert torch.equal(nfnet.to_timm(model)["stages.1.0.conv1.weight"], state["stages.1.0.conv1.weight"])


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.sentinel}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_malicious_torch_file_runs(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "model.pth"
    content = {"stem.conv.weight": torch.zeros(2), "more": Payload(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.pth is refused, nothing of it was run"):
        nfnet.load_published(nfnet.create_model("nfnet_tiny"), path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the file was a real one


def test_a_network_with_other_conventions_says_that_outputs_differ() -> None:
    timm_model, model = theirs("nf_regnet_b0"), ours("nf_regnet_b0", activation="relu")
    options = {**nfnet.timm_options("nf_regnet_b0"), "ws_eps": None}
    notes = nfnet.from_timm(nfnet.create_model("nf_regnet_b0", **options), timm_model.state_dict()).notes
    assert "ws_eps differ from nfnet.timm_options('nf_regnet_b0')" in notes[0]
    assert "activation differ" in nfnet.from_timm(model, timm_model.state_dict()).notes[0]


def test_a_state_dict_of_another_network_is_refused() -> None:
    with torch.device("meta"):
        states = {n: timm.create_model(n).state_dict() for n in ("dm_nfnet_f1", "nf_regnet_b1", "resnet18")}
        model, published = ours("dm_nfnet_f0"), nfnet.create_model("nf_regnet_b1")
    with pytest.raises(ValueError, match=r"blocks.1.conv0.weight is .* looks like nfnet_f1: create that"):
        nfnet.from_timm(model, states["dm_nfnet_f1"])
    with pytest.raises(ValueError, match=r"stem.0.weight is \(40, 3, 3, 3\) there and \(36, 3, 3, 3\).*timm_options"):
        nfnet.from_timm(published, states["nf_regnet_b1"])
    strange = {**states["dm_nfnet_f1"], "stem.x.y": torch.zeros(1), "stages.0.0.attn": torch.zeros(2)}
    with pytest.raises(ValueError, match="does not fit"):
        nfnet.from_timm(model, strange)
    with pytest.raises(ValueError, match="holds no weights of timm's normaliser-free networks"):
        nfnet.from_timm(model, states["resnet18"])


def test_what_timm_cannot_compute_is_not_exported() -> None:
    with torch.device("meta"):
        with pytest.raises(
            ValueError, match=r"padding, skip_init, shortcut, width_divisor; .*timm_options\('nf_resnet50'\)"
        ):
            nfnet.to_timm(nfnet.create_model("nf_resnet50"))
        with pytest.raises(ValueError, match="activation"):
            nfnet.to_timm(nfnet.create_model("nfnet_f0", activation="relu"))
        assert len(nfnet.to_timm(nfnet.create_model("nfnet_f0"))) == 233
