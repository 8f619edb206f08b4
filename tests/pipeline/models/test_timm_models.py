"""timm's networks under our loop, and weights of other houses, against timm itself."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nfnet
from nfnet.optim.param_groups import assign
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.models import timm_models
from pipeline.models.backbone import ModelConfig, absolute, build_model, find_origin, load_backbone, make, spelled
from pipeline.training.run import Run
from pipeline.training.train import train

timm = pytest.importorskip("timm")
NAME = "timm:convnext_atto"


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = timm.create_model("convnext_atto", num_classes=7)
    return model.eval()


@pytest.fixture(scope="module")
def files(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    save_file(theirs.state_dict(), folder / "atto.safetensors")
    torch.save({"state_dict": theirs.state_dict()}, folder / "atto.pth")
    return {p.suffix: str(p) for p in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_of_timms_gives_timms_features_and_logits(
    suffix: str, theirs: nn.Module, files: dict[str, str]
) -> None:
    loaded = load_backbone(f"{NAME}@{files[suffix]}")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        features = loaded.model.forward_head(loaded.model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)  # type: ignore[operator]
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(loaded.model(images), theirs(images))
    assert len(loaded.classes) == 7 and loaded.digest == find_origin(f"{NAME}@{files['.pth']}").digest


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnetv2_50x1_bit", "mixer_s32_224"])
def test_heads_of_any_make_are_taken_over(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load_backbone(f"timm:{name}@{tmp_path / 'w.pth'}")
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["convnext_atto", "tf_efficientnet_l2.ns_jft_in1k_475", "beit_base_patch16_224"])
@pytest.mark.parametrize("size", [(300, 200), (97, 131), (500, 500)])
def test_evaluation_images_are_timms(name: str, size: tuple[int, int]) -> None:
    config = timm_models.preprocessing(f"timm:{name}")
    stated = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    transform = timm.data.create_transform(**stated)
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    ours = torch.from_numpy(eval_image(pixels, config)).permute(2, 0, 1).float() / 255
    ours = (ours - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[:, None, None]
    torch.testing.assert_close(ours, transform(Image.fromarray(pixels)), atol=1e-5, rtol=0)


def test_the_head_of_a_peer_falls_under_the_rules_of_heads() -> None:
    network = make(NAME, 5, {"head_init": "zero", "stochastic_depth": 0.1, "drop_rate": 0.2})
    rules = assign(list(network.named_parameters()))
    assert {n for n, r in rules.items() if r.is_head} == {"head.weight", "head.bias"}
    assert not rules["head.weight"].clip and not network.head.weight.any() and network.dropout.p == 0.2  # type: ignore[union-attr]
    assert "drop_path" in repr(network)


def test_a_peer_is_trained_saved_and_loaded_by_the_loop(digits: str, tmp_path: Path, files: dict[str, str]) -> None:
    run = Run(
        name="peer",
        model=ModelConfig(name=NAME, init_from=f"{NAME}@{files['.safetensors']}"),
        data=DataConfig(url=digits, eval_split=None),
        augment=AugmentConfig(image_px=32),
        optim=OptimConfig(learning_rate=0.05),
        global_batch=4,
        duration=Duration(2, "steps"),
    )
    list(train(run, str(tmp_path)))
    loaded = load_backbone(str(tmp_path))
    start, note = build_model(run.model, 10, seed=0)
    assert "head is made anew" in note and loaded.config["model"]["name"] == NAME and len(loaded.classes) == 10
    assert {n for n, p in loaded.model.named_parameters()} == {n for n, p in start.named_parameters()}
    moved = [n for n, p in loaded.model.named_parameters() if not torch.equal(p, start.state_dict()[n])]
    assert len(moved) > 0.9 * len(list(start.parameters())) and loaded.augment == run.augment
    # The weights of a run are those of any run: another one starts from them.
    again, _ = build_model(ModelConfig(name=NAME, init_from=str(tmp_path)), 10, seed=9)
    assert torch.equal(again.head.weight, loaded.model.head.weight)  # type: ignore[union-attr, arg-type]


def test_names_and_files_that_do_not_exist_are_said(files: dict[str, str]) -> None:
    for name, message in (
        ("timm:convnext_ato", "nearest names are convnext_atto"),
        (f"{NAME}@/no/where.pth", "there is no file"),
        (f"timm:convnext_nano@{files['.pth']}", "could not be loaded"),
        (f"nfnet_tiny@{files['.pth']}", "holds no modules"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(name)
    with pytest.raises(UserError, match=r"set model\.init_from"):
        make(f"{NAME}@x.pth", 10, {})


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(UserError):
            load_backbone(f"{NAME}@{tmp_path / name}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "num_classes"])
def test_options_that_come_with_a_checkpoint_name_no_file_and_no_address(option: str) -> None:
    with pytest.raises(UserError, match=f"{option} is no option of a network"):
        make(NAME, 10, {option: "/etc/passwd"})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 20_000}, "more than [0-9],[0-9]* modules"),
        ("nfnet_tiny", {"in_chans": 10**18}, "verflow"),
        (NAME, {"head_init": []}, "fewer weights|model timm"),
        (NAME, {"drop_rate": "x"}, "model timm"),
    ],
)
def test_a_network_that_a_commit_file_asks_for_is_bounded_by_the_file(
    make_checkpoint: Callable[..., str], tmp_path: Path, name: str, options: dict[str, Any], words: str
) -> None:
    place = Path(make_checkpoint(tmp_path)) / "commit.json"
    content = json.loads(place.read_text())
    content["config"]["model"] |= {"name": name, "options": options}
    place.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        load_backbone(str(place.parent))


def test_our_own_files_are_backbones_too(tmp_path: Path) -> None:
    network = nfnet.create_model("nfnet_tiny", num_classes=4, activation="relu").eval()
    place = str(tmp_path / "tiny.safetensors")
    nfnet.save_weights(network, place)
    images = torch.randn(2, 3, 32, 32)
    for name in (place, f"nfnet_tiny@{place}"):
        loaded = load_backbone(name)
        assert torch.equal(loaded.model(images), network(images)) and len(loaded.classes) == 4
        assert loaded.config["model"]["options"] == {"activation": "relu"}


def test_spellings() -> None:
    assert spelled("timm:convnext_atto") == ("timm:convnext_atto", None)
    assert spelled("nfnet_f4+@F4.npz") == ("nfnet_f4+", "F4.npz")
    assert spelled("s3://key@bucket/run") is None and spelled("runs/a") is None
    assert absolute("timm:convnext_atto") == "timm:convnext_atto"
    assert absolute("nfnet_f0@w.npz") == f"nfnet_f0@{Path('w.npz').absolute()}"
    assert absolute("s3://bucket/run") == "s3://bucket/run"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("timm:hf-hub:timm/resnet18.a1_in1k", "write timm:resnet18.a1_in1k"),
        ("timm:hf_hub:org/net@main", "hf download org/net model.safetensors.*timm:NAME@model.safetensors"),
        ("timm:local-dir:/a/b", "timm:NAME@/a/b/model.safetensors"),
    ],
)
def test_a_place_of_anybodys_weights_is_no_network(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", None)  # nothing is asked for
    for ask in (lambda: timm_models.load(name, None), lambda: timm_models.make(name, 2, {}), lambda: find_origin(name)):
        with pytest.raises(UserError, match=f"is a place, not a network, and what lies there may change; .*{advice}"):
            ask()


def test_weights_that_are_not_finite_are_refused(theirs: nn.Module, tmp_path: Path) -> None:
    torch.save({k: torch.full_like(v, torch.nan) for k, v in theirs.state_dict().items()}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="not finite"):
        load_backbone(f"{NAME}@{tmp_path}/nan.pth")


@pytest.mark.parametrize("kind", ["pickle", "legacy", "zip"])
def test_a_file_that_never_ends_to_load_is_refused_before_timm_has_it(tmp_path: Path, kind: str) -> None:
    bomb = b"\x80\x02}N" + b"2\x86" * 64 + b"Ns."  # a key whose hash takes 2^64 steps
    path = tmp_path / "bomb.pth"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
    else:
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + bomb if kind == "legacy" else bomb)
    with pytest.raises(UserError, match=r"bomb\.pth"):
        load_backbone(f"{NAME}@{path}")
