"""A checkpoint as an MLflow model: code as text, the network as ONNX, a signature, an input example, and no pickle."""

import contextlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pipeline.data.images
from pipeline import places
from pipeline.errors import UserError
from pipeline.export.export import WRITERS
from pipeline.export.source import Answer, ExportSource, Probe
from pipeline.export.to_onnx import write_onnx

_REQUIREMENTS = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
_IMAGES_PACKAGE = "normfree_images"
_CODE = Path(__file__).with_name("served_model.py")


def write_mlflow(source: ExportSource, folder: Path) -> Answer:
    """A folder that `mlflow models predict` and `mlflow.pyfunc.load_model` serve, with nothing of normfree installed.

    Written on this machine alone: no tracking server is asked. Turbojpeg, where it is installed, is used; Pillow serves else.
    """
    with _quiet():  # the import has warnings too
        import mlflow.pyfunc

    with places.temporary_folder("mlflow") as parts, _quiet():
        write_onnx(source, parts / "onnx")
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(_CODE),
            artifacts={"network": str(parts / "onnx")},
            code_paths=[str(_images_package(parts))],
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in _REQUIREMENTS],
            signature=_signature(),
            input_example=_example(source.probe()),
            metadata=_lineage(source),
        )
        _without_places(folder / "MLmodel", {str(_CODE): _CODE.name, str(parts / "onnx"): "artifacts/onnx"})

    def answer(probe: Probe) -> torch.Tensor:
        with _quiet():
            loaded = mlflow.pyfunc.load_model(str(folder))
        shown = loaded.predict(_example(probe))
        logits = torch.from_numpy(loaded.unwrap_python_model().logits(probe.files))
        best = [source.commit.classes[i] for i in logits.argmax(dim=1).tolist()]
        if list(shown["class"][:1]) != best[:1]:
            raise UserError(f"the MLflow model answers {shown['class'][0]!r} where its own logits say {best[0]!r}")
        return logits

    return answer


ALL_WRITERS = {**WRITERS, "mlflow": write_mlflow}
"""Format -> what writes it: safetensors, timm, onnx and mlflow."""


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import DataType as types
    from mlflow.types.schema import Array, ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(types.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(types.string, "class"),
                ColSpec(types.double, "probability"),
                ColSpec(Array(types.string), "classes"),
                ColSpec(Array(types.double), "probabilities"),
            ]
        ),
        params=ParamSchema([ParamSpec("top", types.long, 5)]),
    )


def _example(probe: Probe) -> Any:
    import pandas

    return pandas.DataFrame({"image": probe.files[:1]})


def _lineage(source: ExportSource) -> dict[str, Any]:
    """What leads from the served model back to its checkpoint."""
    commit = source.commit
    return {
        "checkpoint_digest": commit.digest,
        "checkpoint_step": commit.step,
        "weights": source.weights,
        "network": commit.config["model"]["name"],
        "dataset_digest": commit.dataset.get("digest", ""),
        "config_digest": commit.config_digest,
    }


def _without_places(path: Path, names: dict[str, str]) -> None:
    """MLflow writes down where its parts came from on this machine, reads the last part of it only, and nobody needs it."""
    text = path.read_text(encoding="utf-8")
    for place, name in names.items():
        text = text.replace(place, name)
    path.write_text(text, encoding="utf-8")


def _images_package(folder: Path) -> Path:
    """Our decoding as a package of another name: `pipeline` is too common a name to put on someone's path."""
    package = folder / _IMAGES_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text('"""Image bytes -> pixels; a copy of normfree\'s pipeline.data.images."""\n')
    here = Path(pipeline.data.images.__file__).parent
    for path in sorted(here.glob("[a-z]*.py")):  # all of them, since they import each other
        text = path.read_text(encoding="utf-8").replace("pipeline.data.images", _IMAGES_PACKAGE)
        (package / path.name).write_text(text, encoding="utf-8")
    return package


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's progress bars and its advice on packaging, which is followed or not to the point here."""
    logger, bar = logging.getLogger("mlflow"), "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    level, shown = logger.level, os.environ.get(bar)
    logger.setLevel(logging.ERROR)
    os.environ[bar] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if shown is None:
            del os.environ[bar]
        else:
            os.environ[bar] = shown
