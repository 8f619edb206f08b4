"""The network as ONNX: one file, batch of any size, with classes and preprocessing in its metadata."""

import json
import warnings
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.export.source import Answer, ExportSource, Probe, preprocessing
from pipeline.models.evaluation_options import activation_of

NAME = "model.onnx"
INPUT, OUTPUT = "images", "logits"
_ONE_FILE_BYTES = 1_800_000_000
"""Protocol buffers end at 2 GB; what is larger gets its weights in a file next to it, `model.onnx.data`."""


def write_onnx(source: ExportSource, folder: Path) -> Answer:
    """`model.onnx`: images (N, 3, px, px) float32, normalised -> logits (N, classes).

    Metadata: `classes` and `preprocessing` as JSON, `activation` (softmax or sigmoid makes probabilities), `source_digest`,
    `weights`. Plain torch operations are exported: our kernels step aside for compilers.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter's own need, which it would report in a page of text
    except ImportError as error:
        raise UserError(
            f"the export to ONNX needs {error.name}, which is not installed: pip install 'normfree[export]'"
        ) from None

    folder.mkdir()
    path = folder / NAME
    images = torch.zeros(2, 3, source.px, source.px)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        program = torch.onnx.export(
            source.model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        program.model.metadata_props.update(metadata(source))
        size_bytes = sum(t.numel() * t.element_size() for t in source.model.state_dict().values())
        program.save(str(path), external_data=size_bytes > _ONE_FILE_BYTES)
    onnx.checker.check_model(str(path))
    return lambda probe: answer(path, probe)


def metadata(source: ExportSource) -> dict[str, str]:
    return {
        "classes": json.dumps(source.commit.classes),
        "preprocessing": json.dumps(preprocessing(source.augment)),
        "activation": activation_of(source.commit.config),
        "source_digest": source.commit.digest,
        "weights": source.weights,
    }


def answer(path: Path, probe: Probe) -> torch.Tensor:
    """Logits from onnxruntime; one image alone first, so that a batch that was baked in shows."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "the export to ONNX checks the file with onnxruntime, which is not installed: pip install 'normfree[export]'"
        ) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [probe.images[:1], probe.images[1:]]
    found = [session.run([OUTPUT], {INPUT: part.contiguous().numpy()})[0] for part in parts]
    return torch.cat([torch.from_numpy(part) for part in found])
