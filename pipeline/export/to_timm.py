"""The network as a folder that `timm.create_model("local-dir:DIR", pretrained=True)` loads."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nfnet.model import NFNet
from nfnet.weights.files import save_tensors
from nfnet.weights.timm_export import timm_form
from pipeline.checkpoint import exported
from pipeline.errors import UserError
from pipeline.export.source import Answer, ExportSource, preprocessing
from pipeline.models.timm_models import architecture, as_timm, is_timm


def write_timm(source: ExportSource, folder: Path) -> Answer:
    """`config.json` and `model.safetensors`. Sizes and conventions are in `model_args`, so timm builds the same network.

    Raises:
        UserError: timm's blocks cannot compute what the network does.
    """
    try:
        import timm
    except ImportError:
        raise UserError(
            "--format timm checks the folder with timm, which is not installed: pip install 'normfree[export]'"
        ) from None
    form = _form(source)
    folder.mkdir()
    save_tensors(form.weights, folder / exported.WEIGHTS)
    (folder / "config.json").write_text(json.dumps(_config(source, form), indent=1), encoding="utf-8")

    def answer(probe: Any) -> torch.Tensor:
        try:
            with torch.random.fork_rng(devices=[]):
                timm_model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        except RuntimeError as error:
            first = next(
                (line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error)[:200]
            )
            raise UserError(f"timm builds another network for this one ({first}); take --format safetensors") from None
        logits: torch.Tensor = timm_model(probe.images)
        return logits

    return answer


@dataclass(frozen=True)
class _Form:
    """A network as timm makes it."""

    architecture: str
    arguments: dict[str, Any]
    weights: dict[str, torch.Tensor]
    num_features: int
    more: dict[str, Any]
    """For the top of `config.json`."""
    first_conv: Any
    classifier: Any


def _form(source: ExportSource) -> _Form:
    if not isinstance(source.model, NFNet):
        if not is_timm(source.name):
            raise UserError(f"timm has no {source.name}; take --format safetensors or onnx")
        whole, arguments = as_timm(source.name, source.model, source.options)
        own: Any = whole.pretrained_cfg
        weights, width = whole.state_dict(), int(whole.num_features)  # type: ignore[arg-type]
        place = architecture(source.name)
        return _Form(place, arguments, weights, width, {}, own.get("first_conv"), own.get("classifier"))
    try:
        form = timm_form(source.model)
    except ValueError as error:
        raise UserError(f"{error}; take --format safetensors or onnx") from None
    stem = "stem.conv1" if len(source.model.variant.stem_widths) > 1 else "stem.conv"
    more, width = {"global_pool": "avg"}, source.model.num_features
    return _Form(form.architecture, form.arguments, form.weights, width, more, stem, "head.fc")


def _config(source: ExportSource, form: _Form) -> dict[str, Any]:
    """What `timm.models.load_model_config_from_path` reads."""
    found = preprocessing(source.augment)
    px, resize_px = found["px"], found["resize_px"]
    return {
        "architecture": form.architecture,
        "num_classes": len(source.commit.classes),
        "num_features": form.num_features,
        **form.more,
        "label_names": source.commit.classes,
        "model_args": form.arguments,
        "pretrained_cfg": {
            "num_classes": len(source.commit.classes),
            "input_size": [3, px, px],
            "fixed_input_size": False,
            "interpolation": found["interpolation"].partition(",")[0],
            "crop_pct": crop_share(px, resize_px),
            "crop_mode": "center" if found["resize"] == "shorter side" else "squash",
            "mean": found["mean"],
            "std": found["std"],
            "first_conv": form.first_conv,
            "classifier": form.classifier,
        },
    }


def crop_share(px: int, resize_px: int) -> float:
    """timm resizes to floor(px / share): the largest share that gives exactly `resize_px`, whatever rounding does."""
    share = px / resize_px
    while math.floor(px / share) < resize_px:
        share = math.nextafter(share, 0.0)
    return share
