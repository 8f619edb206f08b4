"""Weights in and out: published names, what a file of another network gets, safetensors."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pytest
import torch

import nfnet
from nfnet.weights.haiku import our_name
from nfnet.weights.state_dict import load_entries
from pipeline.errors import UserError
from pipeline.models.backbone import _load
from tests.nfnet.haiku_names import haiku_names

GOLDEN = Path(__file__).parents[1] / "golden"
MODULES = {
    "nfnet_f0": "NFNet/~/nf_block",
    "nf_resnet50": "NF_ResNet/~/nf_res_block",
    "nf_regnet_b0": "NF_RegNet/~/nf_block",
}


def haiku_tree(model: nfnet.NFNet) -> dict[str, dict[str, np.ndarray]]:
    """The model's weights as haiku holds them: HWIO, IO, scalars without dimensions."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, value in model.state_dict().items():
        module, key = haiku_names(model)[name]
        value = value.permute(2, 3, 1, 0) if value.dim() == 4 else value.t() if value.dim() == 2 else value
        tree.setdefault(module, {})[key] = (value.reshape(()) if key == "skip_gain" else value).contiguous().numpy()
    return tree


def tiny(seed: int = 0, **options: Any) -> nfnet.NFNet:
    model = nfnet.create_model("nfnet_tiny", **{"num_classes": 10, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in a.state_dict().items())


def write(path: Path, tree: Any) -> Path:
    with open(path, "wb") as file:
        dill.dump(tree, file)
    return path


@pytest.mark.parametrize("name", nfnet.list_models())
def test_every_parameter_has_one_published_name(name: str) -> None:
    with torch.device("meta"):
        model = nfnet.create_model(name)
    names = haiku_names(model)
    assert list(names) == [n for n, _ in model.named_parameters()] and len(set(names.values())) == len(names)
    assert all(our_name(*theirs) == ours for ours, theirs in names.items())


@pytest.mark.parametrize("name", MODULES)
def test_blocks_are_named_as_haiku_names_their_classes(name: str) -> None:
    with torch.device("meta"):
        names = set(haiku_names(nfnet.create_model(name)).values())
    stem = "stem_conv0" if name == "nfnet_f0" else "initial_conv"
    root, block = MODULES[name].split("/~/")
    assert {(f"{root}/~/{stem}", "w"), (f"{root}/~/linear", "b"), (MODULES[name], "skip_gain")} <= names
    assert {
        (f"{root}/~/{block}_3/~/conv0", "gain"),
        (f"{root}/~/{block}_12", "skip_gain"),
    } <= names or name == "nfnet_f0"


def test_a_published_file_gives_the_published_logits(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("golden_reference", GOLDEN / "reference.py")
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    shapes = json.loads((GOLDEN / "nfnet_f0_64px.json").read_text())["F0_64"]["shapes"]
    tree = {m: {k: reference.seeded_param(m, k, s) for k, s in keys.items()} for m, keys in shapes.items()}
    model = nfnet.create_model("nfnet_f0").eval()
    report = nfnet.load_published(model, write(tmp_path / "F0_haiku.npz", tree))
    assert report.num_loaded == sum(len(keys) for keys in shapes.values()) and not report.head_remade
    with torch.no_grad():
        logits = model(torch.from_numpy(reference.seeded_images(2, 64)).permute(0, 3, 1, 2)).numpy()
    recorded = np.load(GOLDEN / "nfnet_f0_64px.npz")["logits"]
    assert np.abs(logits - recorded).max() < 5e-6 * np.abs(recorded).max()


@pytest.mark.parametrize("form", ["tree", "params and state", "state and params", "checkpoint", "averaged", "npz"])
def test_parameters_are_found_where_they_are_kept(tmp_path: Path, form: str) -> None:
    source, other, model, path = tiny(1), tiny(2), tiny(3), tmp_path / "weights.npz"
    tree = haiku_tree(source)
    forms = {
        "tree": tree,
        "params and state": (tree, {}),
        "state and params": ({}, tree),
        "checkpoint": {"step": 3, "params": tree, "state": {}},
        "averaged": {"params": haiku_tree(other), "ema_params": tree, "opt_state": [1.0]},
    }
    if form == "npz":
        np.savez(path, **{f"{m}/{k}": v for m, keys in tree.items() for k, v in keys.items()})
    else:
        write(path, forms[form])
    report = nfnet.load_published(model, path)
    assert same(model, source) and report.format == "haiku"
    if form == "averaged":
        assert "ema_params" in str(report)
        nfnet.load_published(model, path, which="params")
        assert same(model, other)


def test_a_head_of_another_size_is_remade_and_said(tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2, num_classes=7)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    report = nfnet.load_published(model, write(tmp_path / "w.npz", haiku_tree(source)))
    assert report.head_remade and "the head is made anew" in str(report)
    assert report.num_loaded == len(model.state_dict()) - 2
    assert all(torch.equal(v, head[k]) for k, v in model.head.state_dict().items())
    assert torch.equal(model.blocks[0].conv0.weight, source.blocks[0].conv0.weight)


def test_a_network_without_head_takes_the_rest(tmp_path: Path) -> None:
    model = tiny(2, num_classes=0)
    report = nfnet.load_published(model, write(tmp_path / "w.npz", haiku_tree(tiny(1))))
    assert "skipped" in str(report) and not report.head_remade


MISFITS = {
    "another variant": ("nfnet_f0", {}, "nfnet_f1", {}, r"blocks.1.*285 more.*like nfnet_f1: create"),
    "another family": ("nfnet_f0", {}, "nf_resnet50", {}, "nf_resnet50"),
    "released rounding": ("nfnet_f0+", {}, "nfnet_f0+", {"rounded_bottleneck": True}, "rounded_bottleneck=True"),
    "paper's width": ("nfnet_f0+", {"rounded_bottleneck": True}, "nfnet_f0+", {}, "rounded_bottleneck=False"),
    "other channels": ("nfnet_tiny", {"in_chans": 1}, "nfnet_tiny", {}, r"16, 3, 3, 3.*16, 1, 3, 3.*in_chans=3"),
    "no gains": (
        "nfnet_tiny",
        {"skip_init": None},
        "nfnet_tiny",
        {},
        r"skip_gain is \(1,\) there and absent.*skip_init=0",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_of_another_shape_says_where_and_what_to_change(misfit: str) -> None:
    name, options, their_name, their_options, message = MISFITS[misfit]
    with torch.device("meta"):
        model = nfnet.create_model(name, **options)
        entries = nfnet.create_model(their_name, **their_options).state_dict()
    with pytest.raises(ValueError, match=rf"w.npz does not fit the network: .*{message}") as error:
        load_entries(model, entries, "w.npz")
    assert 1 <= str(error.value).count(" there and ") <= 3
    with pytest.raises(UserError, match="does not fit"):
        _load(model, dict(entries), "w.npz")


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, tree = tiny(1), haiku_tree(tiny(2))
    tree["NFNet/~/final_conv"]["gain"] = np.zeros(5, "f4")
    with pytest.raises(ValueError, match=r"final_conv.gain is \(5,\) there and \(768,\) here"):
        nfnet.load_published(model, write(tmp_path / "w.npz", tree))
    assert same(model, tiny(1))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 cut", pickle.dumps({"a": 1}), b"\x08" + bytes(7) + b'{"a":1} ']
)
def test_a_file_of_no_weights_is_refused_with_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights.bin (is empty|is damaged|holds no modules)"):
        nfnet.load_published(tiny(), path)
    with pytest.raises(ValueError, match="there is no file"):
        nfnet.load_published(tiny(), tmp_path / "absent")


def test_saved_weights_build_the_network_again(tmp_path: Path) -> None:
    options = {"activation": "relu", "in_chans": 1, "drop_rate": 0.25, "skip_init": None, "padding": "symmetric"}
    model, path = tiny(1, **options), tmp_path / "weights.safetensors"
    model.reset_classifier(4)
    nfnet.save_weights(model, path)
    state = torch.get_rng_state()
    again = nfnet.load_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.options == options and again.num_classes == 4 and not again.training and again.dropout.p == 0.25
    images = torch.randn(2, 1, 33, 33)
    assert torch.equal(again(images), model.eval()(images))
    other = tiny(2, **options)
    assert nfnet.load_published(other, path).head_remade and torch.equal(other.stem[0].weight, model.stem[0].weight)


def test_a_file_without_description_builds_nothing(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not say which network"):
        nfnet.load_model(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="cannot be read"):
        nfnet.load_model(tmp_path / "w.safetensors")
