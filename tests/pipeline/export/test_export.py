"""An export computes what the checkpoint computes, or is not there."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image
from torch import nn

import nfnet
from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import exported, load
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image
from pipeline.errors import UserError
from pipeline.export import export as export_module
from pipeline.export import source, to_onnx, to_timm
from pipeline.export.export import WRITERS, export
from pipeline.export.model_card import model_card
from pipeline.export.source import TOLERANCE, open_source
from pipeline.models.backbone import ModelConfig, build_model, load_backbone
from pipeline.storage import objects

Make = Callable[..., str]


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(images)
    return found


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_safetensors_hold_the_chosen_weights_bit_for_bit(make_checkpoint: Make, tmp_path: Path, weights: str) -> None:
    url, out = make_checkpoint(tmp_path), str(tmp_path / "out")
    made = export(url, "safetensors", out, weights=weights)  # type: ignore[arg-type]
    theirs, _ = load.load_weights(url, weights)  # type: ignore[arg-type]
    ours = nfnet.load_model(f"{out}/model.safetensors").state_dict()
    assert made.difference == 0 and set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_exported_folder_serves_wherever_a_checkpoint_does(make_checkpoint: Make, tmp_path: Path) -> None:
    url, out = make_checkpoint(tmp_path), str(tmp_path / "out")
    made = export(url, "safetensors", out, weights="raw")
    images = torch.randn(2, 3, 16, 16)
    first, again = load_backbone(url, "raw"), load_backbone(out)
    assert torch.equal(logits(first.model, images), logits(again.model, images))
    assert again.classes == first.classes and again.config == first.config and again.url == out
    assert (
        again.digest == made.digest != first.digest
    )  # raw and averaged weights of one checkpoint must not pass for one
    model, note = build_model(ModelConfig(name="nfnet_tiny", init_from=out), 5, seed=3)
    assert torch.equal(logits(model, images), logits(first.model, images)) and "head included" in note
    with pytest.raises(UserError, match="keeps no ema weights"):
        load_backbone(out, "ema")


def test_a_strangers_file_says_all_that_is_needed(make_checkpoint: Make, tmp_path: Path) -> None:
    url, out = make_checkpoint(tmp_path, drop_rate=0.3), tmp_path / "out"
    export(url, "safetensors", str(out))
    body = json.loads((out / "export.json").read_text())
    commit = checkpoint.read_commit(url)
    assert body["model"] == {
        "name": "nfnet_tiny",
        "options": {"drop_rate": 0.3},
        "num_classes": 5,
        "library": "normfree (nfnet.create_model)",
    }
    assert body["classes"] == commit.classes and body["weights"] == "ema"
    assert body["source"]["digest"] == commit.digest and body["source"]["dataset"]["digest"] == "0123abcd"
    assert body["preprocessing"]["px"] == 16 and body["preprocessing"]["resize_px"] == 16
    for file in body["files"]:
        assert objects.sha256_file(out / file["name"]) == file["sha256"]
    assert {f["name"] for f in body["files"]} == {"README.md", "model.safetensors"}


def test_a_changed_byte_of_an_export_is_refused(make_checkpoint: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(make_checkpoint(tmp_path), "safetensors", str(out))
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="does not verify"):
        load_backbone(str(out))


def test_only_safetensors_are_read_back(make_checkpoint: Make, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    export(make_checkpoint(tmp_path, "nf_regnet_b0", px=32), "timm", out)
    with pytest.raises(UserError, match="is an export to timm, which is not read back"):
        load_backbone(out)


def wrong(source: Any, folder: Path) -> Any:
    answer = export_module.write_safetensors(source, folder)
    return lambda probe: answer(probe) * (1 + 1e-3)


@pytest.mark.parametrize("place", ["{tmp}/new/out", "memory://exports/wrong"])
def test_a_wrong_export_is_not_left(make_checkpoint: Make, tmp_path: Path, place: str) -> None:
    url, out = make_checkpoint(tmp_path), place.format(tmp=tmp_path)
    with pytest.raises(
        UserError, match=r"was not kept: its logits differ from the checkpoint's by 1.0e-03 of the largest"
    ):
        export(url, "onnx", out, writers={**WRITERS, "onnx": wrong})
    assert not objects.list_urls(out) and not objects.list_urls(str(tmp_path / "new"))
    made = export(url, "onnx", out, writers={**WRITERS, "onnx": wrong}, tolerance=0.01)
    assert made.difference == pytest.approx(1e-3, rel=0.01) and exported.is_exported(out)


def test_an_export_to_a_store_is_whole_or_absent(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out, put = make_checkpoint(tmp_path), "memory://exports/c", objects.put_file
    monkeypatch.setattr(load, "default_cache", lambda: str(tmp_path / "cache"))

    def failing(local: Any, place: str) -> None:
        if place.endswith("model.safetensors"):
            raise OSError("the store is full")
        put(local, place)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(objects, "put_file", failing)
        export(url, "safetensors", out)
    assert objects.list_urls(out) == []
    order: list[str] = []
    monkeypatch.setattr(objects, "put_file", lambda local, place: (order.append(place), put(local, place)))
    export(url, "safetensors", out)
    assert order[-1] == f"{out}/export.json" and len(objects.list_urls(out)) == 3
    assert load_backbone(out).classes == load_backbone(url).classes


def test_nothing_is_overwritten(make_checkpoint: Make, tmp_path: Path) -> None:
    url, out = make_checkpoint(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        export(url, "safetensors", str(out))
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_what_cannot_be_checked_is_not_exported(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_checkpoint(tmp_path)
    source = open_source(url)
    torch.nn.init.zeros_(source.model.head.weight)  # type: ignore[arg-type]
    monkeypatch.setattr(export_module, "open_source", lambda *_: source)
    with pytest.raises(UserError, match="the same ones for every image"):
        export(url, "safetensors", str(tmp_path / "out"))


# --- timm -----------------------------------------------------------------------------------------------------------------

TIMM = {
    "nf_regnet_b0 as published": ("nf_regnet_b0", {}),
    "nf_regnet_b0 as in timm": ("nf_regnet_b0", nfnet.timm_options("nf_regnet_b0")),
    "nfnet_f0 with silu": ("nfnet_f0", {"activation": "silu"}),
    "nf_resnet50 as in timm": ("nf_resnet50", nfnet.timm_options("nf_resnet50")),
    "nf_resnet152, which timm does not name": ("nf_resnet152", nfnet.timm_options("nf_resnet152")),
}
SLOW = {"nfnet_f0 with silu", "nf_resnet152, which timm does not name"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in TIMM])
def test_timm_computes_the_same_logits_from_the_folder(make_checkpoint: Make, tmp_path: Path, case: str) -> None:
    import timm

    name, options = TIMM[case]
    url, out = make_checkpoint(tmp_path, name, px=48, ema=False, **options), tmp_path / "out"
    made = export(url, "timm", str(out))
    images = torch.randn(2, 3, 48, 48)
    timm_model = timm.create_model(f"local-dir:{out}", pretrained=True)
    expected = logits(load_backbone(url).model, images)
    assert gap(logits(timm_model, images), expected) < 1e-5 and made.difference < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == made.classes and timm_model.num_classes == 5
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3).num_classes == 3


@pytest.mark.parametrize("resize", ["plain", "published"])
def test_timms_own_transform_makes_the_same_input(make_checkpoint: Make, tmp_path: Path, resize: Any) -> None:
    import timm

    out = tmp_path / "out"
    export(make_checkpoint(tmp_path, "nf_regnet_b0", px=32, eval_resize=resize, ema=False), "timm", str(out))
    timm_model = timm.create_model(f"local-dir:{out}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(timm_model))
    pixels = np.random.default_rng(1).integers(0, 256, (70, 41, 3), dtype=np.uint8)
    theirs = transform(Image.fromarray(pixels))
    config = AugmentConfig(image_px=32, eval_resize=resize)
    ours = source.normalise(torch.from_numpy(eval_image(pixels, config))[None], config, torch.device("cpu"))[0]
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_timms_crop_share_gives_the_published_size_at_every_resolution() -> None:
    for px in range(1, 700):
        assert math.floor(px / to_timm.crop_share(px, px + 32)) == px + 32


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nfnet_tiny", "no stem of widths 16, 32, 64 and strides 1, 1, 2"),
        ("nf_resnet50", "its shortcuts lose resolution by pooling"),
    ],
)
def test_what_timm_cannot_express_is_refused_in_one_sentence(
    make_checkpoint: Make, tmp_path: Path, name: str, reason: str
) -> None:
    url = make_checkpoint(tmp_path, name, ema=False)
    with pytest.raises(UserError, match=reason):
        export(url, "timm", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tanh_gelu_goes_to_timm_only_by_the_users_word(make_checkpoint: Make, tmp_path: Path) -> None:
    url, out = make_checkpoint(tmp_path, "nfnet_f0", px=48, ema=False), str(tmp_path / "out")
    with pytest.raises(UserError, match=r"timm computes GELU exactly, the network by the tanh formula"):
        export(url, "timm", out)
    assert TOLERANCE < export(url, "timm", out, tolerance=0.01).difference < 0.01


# --- ONNX -----------------------------------------------------------------------------------------------------------------

FAMILIES = ["nfnet_tiny", "nfnet_f0", "nf_resnet50", "nf_regnet_b0"]


@pytest.mark.slow  # the fast form is the MLflow model of nfnet_tiny, which is ONNX inside
@pytest.mark.parametrize("name", [*FAMILIES, "nfnet_tiny, weights apart"])
def test_onnxruntime_computes_the_same_logits_at_any_batch(
    make_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import onnxruntime

    apart = name.endswith("apart")
    if apart:  # as a network is written that is larger than a protocol buffer may be
        monkeypatch.setattr(to_onnx, "_ONE_FILE_BYTES", 0)
    url, out = make_checkpoint(tmp_path, name.split(",")[0], px=32, ema=False), tmp_path / "out"
    made = export(url, "onnx", str(out))
    assert ("model.onnx.data" in {f["name"] for f in made.files}) == apart
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == made.classes and facts["source_digest"] == made.source_digest
    assert json.loads(facts["preprocessing"])["px"] == 32
    model = load_backbone(url).model
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        assert gap(torch.from_numpy(found), logits(model, images)) < 1e-5


# --- the card -------------------------------------------------------------------------------------------------------------


def card(url: str, folder: Path, **options: Any) -> str:
    export(url, "safetensors", str(folder), **options)
    return (folder / "README.md").read_text()


def test_the_card_says_what_the_record_says(make_checkpoint: Make, tmp_path: Path) -> None:
    url = make_checkpoint(tmp_path)
    text = card(url, tmp_path / "out")
    commit = checkpoint.read_commit(url)
    for fact in (
        "# animals",
        "`nfnet_tiny`",
        "after 7 steps (28 images seen",
        "| top-1 | 50.00% |",
        "| cross-entropy | 1.2500 |",
    ):
        assert fact in text
    for fact in (
        commit.digest,
        commit.config_digest,
        "0123abcd",
        "`ant`, `bee`, `crow`",
        "decay 0.9",
        "learning_rate: 0.1",
    ):
        assert fact in text


def test_the_card_does_not_claim_what_was_not_measured(make_checkpoint: Make, tmp_path: Path) -> None:
    url = make_checkpoint(tmp_path)
    raw = card(url, tmp_path / "raw", weights="raw")
    assert "raw weights (not averaged)" in raw and "which these numbers are not of" in raw
    assert "which these numbers are not of" not in card(url, tmp_path / "ema", weights="ema")
    silent = card(make_checkpoint(tmp_path / "other", evaluation={}), tmp_path / "silent")
    assert "its accuracy is not known" in silent and "top-1" not in silent
    assert "Licence, origin and content of the images are not part of the record" in silent


def test_the_card_counts_the_samples_that_the_run_lost(make_checkpoint: Make, tmp_path: Path) -> None:
    url = make_checkpoint(tmp_path)
    pages = [{"epochs": [0, 2], "skipped": 2}, {"epochs": [3, 3], "skipped": 1}]
    (tmp_path / "run" / "ledger.json").write_text(json.dumps({"step": 7, "pages": pages}))
    assert "by its ledger of step 7: 7." in card(url, tmp_path / "out")


def test_names_of_the_record_are_no_markup_of_the_card(make_checkpoint: Make, tmp_path: Path) -> None:
    attack = "x`</code>\n```\n\n# owned\n<img src=http://a>[b](http://c)\x1b[2J"
    commit = checkpoint.read_commit(make_checkpoint(tmp_path))
    config = commit.config | {"name": attack, "seed": attack}
    config |= {"model": {**config["model"], "init_from": attack}, "data": {**config["data"], "eval_split": attack}}
    record = replace(commit, classes=(attack,), dataset={"name": attack, "digest": attack}, config=config)
    described = {
        "kind": "timm", "weights": "raw", "check": {"difference": 0},
        "preprocessing": {"resize": "square", "resize_px": 8, "px": 8, "interpolation": attack, "mean": [0], "std": [1]},
    }  # fmt: skip
    text = model_card(nn.Linear(1, 1), record, described)
    assert "\x1b" not in text and r"\x1b[2J" in text
    tokens = [token for one in MarkdownIt().parse(text.split("---\n", 2)[2]) for token in (one, *(one.children or ()))]
    assert not {"html_block", "html_inline", "link_open", "image"} & {token.type for token in tokens}
    headings = [
        token.content for token, before in zip(tokens[1:], tokens, strict=False) if before.type == "heading_open"
    ]
    assert headings[1:] == ["Use", "Preprocessing", "Data", "Recipe", "Results", "Limits"]
