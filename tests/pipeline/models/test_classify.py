"""Classify: odd images are prepared exactly as evaluation prepares them, and one bad file does not cost the others."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import nfnet
from orchestration.cli import main
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import normalise
from pipeline.data.loading.batches import Pixels
from pipeline.errors import UserError
from pipeline.export.export import export
from pipeline.models.backbone import load_backbone
from pipeline.models.classify import classify, find_images
from pipeline.storage import objects

Make = Callable[..., str]
RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(noise(30, 40, 3)), "JPEG", exif=exif)


def holed_palette() -> bytes:
    image = Image.fromarray(noise(20, 30, 3)).convert("P", palette=Image.Palette.ADAPTIVE)
    return encoded(image, transparency=3)


ODD = {
    "1-bit.png": encoded(Image.fromarray(noise(20, 30)).convert("1")),
    "gray.jpg": encoded(Image.fromarray(noise(20, 30)), "JPEG"),
    "cmyk.jpg": encoded(Image.fromarray(noise(20, 30, 3)).convert("CMYK"), "JPEG"),
    "16-bit.png": encoded(Image.fromarray(RNG.integers(0, 65536, (20, 30), dtype=np.uint16))),
    "palette.png": holed_palette(),
    "alpha.webp": encoded(Image.fromarray(noise(20, 30, 4)), "WEBP", lossless=True),
    "pixel.gif": encoded(Image.fromarray(noise(1, 1, 3)), "GIF"),
    "turned.jpg": turned(),
    "large.jpg": encoded(Image.fromarray(np.kron(noise(63, 48, 3), np.ones((48, 48, 1), np.uint8))), "JPEG"),
    "line.bmp": encoded(Image.fromarray(noise(1, 300, 3)), "BMP"),
}


@pytest.fixture(scope="module")
def checkpoint_url(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("classify"), eval_resize="published")


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for name, data in ODD.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def as_evaluated(url: str, data: bytes) -> list[tuple[str, float]]:
    """By the objects that `pipeline.training.evaluate` uses, one image at a time."""
    loaded, augment = load_backbone(url), AugmentConfig(image_px=16, eval_resize="published")
    image = torch.zeros(16, 16, 3, dtype=torch.uint8)
    Pixels(augment, None)(data, image, number=0, view=0, drawn_for=0)
    with torch.no_grad():
        shares = loaded.model(normalise(image[None], augment, torch.device("cpu"))).softmax(1)[0]
    return sorted(zip(loaded.classes, shares.tolist(), strict=True), key=lambda pair: -pair[1])


def test_every_odd_image_is_classified_as_evaluation_sees_it(checkpoint_url: str, folder: Path) -> None:
    found = {Path(p.image).name: p for p in classify(checkpoint_url, str(folder), top=9)}
    assert set(found) == set(ODD)
    for name, data in ODD.items():
        expected = as_evaluated(checkpoint_url, data)
        assert [n for n, _ in found[name].ranked] == [n for n, _ in expected], name
        assert [s for _, s in found[name].ranked] == pytest.approx([s for _, s in expected], abs=1e-6)
    assert len({tuple(p.ranked) for p in found.values()}) == len(ODD)  # the network tells them apart


def test_what_cannot_be_read_costs_only_itself(checkpoint_url: str, folder: Path) -> None:
    cut = folder / "cut.jpg"
    cut.write_bytes(ODD["large.jpg"][:-5000])
    words = [
        str(folder / "gray.jpg"),
        str(cut),
        str(folder / "nothing.png"),
        str(folder / "notes.txt"),
        str(folder / "pixel.gif"),
    ]
    found = classify(checkpoint_url, words)
    assert [p.image for p in found] == words
    assert [bool(p.ranked) for p in found] == [True, False, False, False, True]
    assert found[1].error.startswith("it does not decode") and found[2].error == "there is no such file"
    alone = classify(checkpoint_url, [words[0], words[4]])
    assert [p.ranked[0][0] for p in alone] == [found[0].ranked[0][0], found[4].ranked[0][0]]


def test_bytes_and_pixels_are_images_too(checkpoint_url: str) -> None:
    pixels = noise(20, 30, 3)
    loaded = load_backbone(checkpoint_url)
    from_pixels, from_bytes, bad = classify(loaded, [pixels, encoded(Image.fromarray(pixels)), pixels[..., :2]], top=2)
    assert from_pixels.ranked == from_bytes.ranked and len(from_bytes.ranked) == 2
    assert from_bytes.image == "image 2" and "must be (H, W, 3) uint8" in bad.error


def test_an_exported_folder_classifies_like_its_checkpoint(checkpoint_url: str, folder: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out" / "safetensors")
    export(checkpoint_url, "safetensors", out)
    images = str(folder / "*.jpg")
    assert classify(out, images) == classify(checkpoint_url, images)


def test_classes_that_were_trained_by_themselves_have_probabilities_of_their_own(
    make_checkpoint: Make, tmp_path: Path, folder: Path
) -> None:
    url, image = make_checkpoint(tmp_path, loss="binary"), folder / "gray.jpg"
    softmax = {
        c: p for prediction in classify(make_checkpoint(tmp_path / "other"), image) for c, p in prediction.ranked
    }
    (found,) = classify(url, image)
    odds = {name: p / (1 - p) for name, p in found.ranked}
    total = sum(odds.values())  # exp(logit) each, of which a softmax is the share
    assert {name: o / total for name, o in odds.items()} == pytest.approx(softmax, rel=1e-4)
    exported = export(url, "safetensors", str(tmp_path / "safetensors"))
    assert classify(exported.url, image) == [found]
    assert "sigmoid of its logit" in (tmp_path / "safetensors" / "README.md").read_text()


@pytest.mark.parametrize("option", ["--flip", "--crops 5", "--temperature 1", "--fit-temperature val"])
def test_evaluate_refuses_what_a_softmax_alone_has(
    option: str, make_checkpoint: Make, digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make_checkpoint(tmp_path, loss="binary")
    assert main(["evaluate", url, digits, *option.split()]) == 2
    assert f"{option.split()[0]} is of a softmax" in capsys.readouterr().err


def test_folders_patterns_and_stores_are_spelled_out_in_order(folder: Path) -> None:
    def names(word: str) -> list[str]:
        return [name.rsplit("/", 1)[-1] for name, _ in find_images([word])]

    assert names(str(folder)) == sorted(ODD)
    assert names(str(folder / "*.png")) == ["1-bit.png", "16-bit.png", "palette.png"]
    (folder / "a[1].png").write_bytes(ODD["1-bit.png"])
    assert names(str(folder / "a[1].png")) == ["a[1].png"]  # a file that is there is no pattern
    for name in ("b.png", "a.png", "c.txt"):
        objects.write_bytes(f"memory://pictures/in/{name}", ODD["1-bit.png"])
    assert names("memory://pictures/in") == names("memory://pictures/in/") == names("memory://pictures/in/*.png")
    assert names("memory://pictures/in/*.png") == ["a.png", "b.png"]
    assert names("https://host/photo.jpg?size=3*4") == ["photo.jpg?size=3*4"]
    with pytest.raises(UserError, match="no images at"):
        find_images([str(folder / "*.jp2")])


def test_classify_takes_every_source_that_load_backbone_takes(tmp_path: Path) -> None:
    small, theirs, plain = (
        str(tmp_path / name) for name in ("tiny.safetensors", "theirs.safetensors", "plain.safetensors")
    )
    nfnet.save_weights(nfnet.create_model("nfnet_tiny", num_classes=6), small)
    save_file(timm.create_model("mobilenetv3_small_050", num_classes=5).state_dict(), theirs)
    save_file(nfnet.create_model("nfnet_tiny", num_classes=4).state_dict(), plain)  # says nothing of itself
    image = noise(40, 40, 3)
    for source, num_classes in (
        (small, 6), (f"nfnet_tiny@{small}", 6), (f"timm:mobilenetv3_small_050@{theirs}", 5), (f"nfnet_tiny@{plain}", 4),
    ):  # fmt: skip
        (found,) = classify(source, image, top=9)
        assert sorted(name for name, _ in found.ranked) == list(map(str, range(num_classes)))


def test_a_file_of_timms_other_network_is_answered_with_the_words_that_take_it(tmp_path: Path) -> None:
    path = str(tmp_path / "b0.safetensors")
    save_file(timm.create_model("nf_regnet_b0").state_dict(), path)
    with pytest.raises(UserError, match=r"give timm:nf_regnet_b0@.*--model\.options\.width_divisor 8"):
        classify(f"nf_regnet_b0@{path}", noise(40, 40, 3))
    assert classify(f"timm:nf_regnet_b0@{path}", noise(40, 40, 3))[0].ranked
