"""The code of an exported MLflow model, copied into it as text: it runs where normfree is not installed.

Needs numpy, Pillow, onnxruntime and mlflow. `normfree_images` lies next to it in the model: our decoding, unchanged but for its
name. The network is ONNX, with classes and preprocessing in its metadata. Nothing is pickled.
"""

import base64
import json
import os
from typing import Any

import mlflow
import numpy as np
import pandas
from mlflow.pyfunc import PythonModel

_BATCH_IMAGES = 32


class Classifier(PythonModel):
    """A column `image` of image files -> class, probability, and the best `top` classes with their probabilities."""

    def load_context(self, context: Any) -> None:
        import onnxruntime

        path = os.path.join(context.artifacts["network"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        facts = self.session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(facts["classes"])
        self.preprocessing: dict[str, Any] = json.loads(facts["preprocessing"])
        self.activation = facts["activation"]

    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """One row an image. Raises ValueError naming the first image that cannot be read."""
        top = max(1, min(int((params or {}).get("top", 5)), len(self.classes)))
        rows = []
        for logits in self.logits(list(model_input["image"])).astype(np.float64):
            if self.activation == "sigmoid":
                shares = 0.5 + 0.5 * np.tanh(logits / 2)
            else:
                shares = np.exp(logits - logits.max())
                shares /= shares.sum()
            best = np.argsort(-shares, kind="stable")[:top]
            names, values = [self.classes[i] for i in best], [float(shares[i]) for i in best]
            rows.append({"class": names[0], "probability": values[0], "classes": names, "probabilities": values})
        return pandas.DataFrame(rows)

    def logits(self, images: list[Any]) -> np.ndarray:
        """(N, classes) of image files, each as bytes or as their base64 text."""
        parts = []
        for first in range(0, len(images), _BATCH_IMAGES):
            named = enumerate(images[first : first + _BATCH_IMAGES], first + 1)
            batch = np.stack([self._pixels(image, number) for number, image in named])
            parts.append(self.session.run(["logits"], {"images": batch})[0])
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)), np.float32)

    def _pixels(self, image: Any, number: int) -> np.ndarray:
        """(3, px, px) float32, normalised."""
        from normfree_images.decode import DecodeError, decode_image

        data = base64.b64decode(image) if isinstance(image, str) else bytes(image)
        try:
            pixels = _evaluation_form(decode_image(data), self.preprocessing)
        except DecodeError as error:
            raise ValueError(f"image {number} cannot be classified: it does not decode ({error})") from None
        # As the pipeline computes it: (value - 255 mean) / (255 std), in float32.
        mean = np.asarray(self.preprocessing["mean"], np.float32) * np.float32(255)
        std = np.asarray(self.preprocessing["std"], np.float32) * np.float32(255)
        return ((pixels.astype(np.float32) - mean) / std).transpose(2, 0, 1)


def _evaluation_form(pixels: np.ndarray, preprocessing: dict[str, Any]) -> np.ndarray:
    """(H, W, 3) -> (px, px, 3): equals `pipeline.data.augment.transforms.eval_image`, which a test holds."""
    from PIL import Image

    image, px = Image.fromarray(pixels), preprocessing["px"]
    if preprocessing["resize"] == "square":
        width = height = preprocessing["resize_px"]
    else:
        width, height = (preprocessing["resize_px"] * side // min(image.size) for side in image.size)
    bilinear = preprocessing["interpolation"].startswith("bilinear")
    image = image.resize((width, height), Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC)
    left, top = round((width - px) / 2), round((height - px) / 2)
    return np.asarray(image.crop((left, top, left + px, top + px)))


mlflow.models.set_model(Classifier())
