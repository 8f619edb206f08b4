"""Names and probabilities for images: any file that Pillow reads, prepared exactly as evaluation prepares it.

from pipeline.models.classify import classify
classify("runs/c100", ["cat.jpg", "s3://bucket/photos/"])
"""

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image, normalise
from pipeline.data.images import formats
from pipeline.data.images.decode import DecodeError, open_picture
from pipeline.distributed import allow_tf32
from pipeline.errors import UserError
from pipeline.models.backbone import LoadedBackbone, load_backbone
from pipeline.models.evaluation_options import activation_of
from pipeline.storage import objects

ENDINGS = tuple(f".{ending}" for ending in formats.ENDINGS)
"""Of a folder's files, those that are taken; a file that is named itself may have any."""
BATCH_IMAGES = 32

Image = str | Path | bytes | np.ndarray
"""A path or URL, the bytes of an image file, or (H, W, 3) uint8 pixels."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    image: str
    """Its path or URL; "image 3" for the third of those that came without a name."""
    ranked: list[tuple[str, float]]
    """(class, probability), most probable first; empty where the image could not be read. Of a network that was trained with
    `optim.loss: binary` each probability is of that class alone."""
    error: str = ""
    """Why it could not."""


def classify(
    checkpoint: str | LoadedBackbone,
    images: Sequence[Image] | Image,
    top: int = 5,
    *,
    device: str | torch.device | None = None,
) -> list[Prediction]:
    """The most probable classes of each image, in order; what cannot be read has an error in place of them.

    Args:
        checkpoint: what `load_backbone` takes: URL of a checkpoint, of a run folder, or of an exported folder (`--format
            safetensors`); NAME@FILE, FILE.safetensors, timm:NAME[@FILE]. Classes without names are numbers.
        images: also folders and patterns with `*`, whose images come in the order of their names.
        top: how many classes; all of them where there are fewer.
        device: default: a GPU where there is one.
    Raises:
        UserError: no checkpoint there, no image in a folder, or none that a pattern fits.
    """
    return list(predictions(checkpoint, images, top, device=device))


def predictions(
    checkpoint: str | LoadedBackbone,
    images: Sequence[Image] | Image,
    top: int = 5,
    *,
    device: str | torch.device | None = None,
) -> Iterator[Prediction]:
    """As `classify`, one batch after the other: any number of images in the memory of one batch."""
    if top < 1:
        raise UserError(f"--top is {top}; set it to 1 or more")
    found = find_images([images] if isinstance(images, str | Path | bytes | np.ndarray) else images)
    loaded = checkpoint if isinstance(checkpoint, LoadedBackbone) else load_backbone(checkpoint)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    allow_tf32(False)
    model = loaded.model.to(where)
    for first in range(0, len(found), BATCH_IMAGES):
        yield from _batch(model, loaded, found[first : first + BATCH_IMAGES], top, where)


def find_images(words: Iterable[Image]) -> list[tuple[str, Image]]:
    """(name, image) of each: folders and patterns are spelled out. UserError where there is nothing."""
    found: list[tuple[str, Image]] = []
    for word in words:
        if isinstance(word, bytes | np.ndarray):
            found.append((f"image {len(found) + 1}", word))
            continue
        urls = _spelled_out(str(word))
        found += zip(urls, urls, strict=True)
    return found


def _spelled_out(word: str) -> list[str]:
    if objects.is_local(word):
        path = objects.local_path(word)
        if path.is_dir():
            return _some(_pictures(str(path)), word)
        if not path.exists() and glob.has_magic(word):
            return _some(sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file()), word)
        return [word]
    if word.startswith(("http://", "https://")):  # no listing there, and "?" begins a query
        return [word]
    if "*" in word:
        root = word[: word.index("*")].rpartition("/")[0]
        return _some([url for url in objects.list_urls(root) if fnmatchcase(url, word)], word)
    if word.endswith("/"):
        return _some(_pictures(word), word)
    inside = [] if word.lower().endswith(ENDINGS) else _pictures(word)
    return inside or [word]


def _pictures(folder: str) -> list[str]:
    return [url for url in objects.list_urls(folder) if url.lower().endswith(ENDINGS)]


def _some(found: list[str], word: str) -> list[str]:
    if not found:
        raise UserError(
            f"no images at {word}; give image files, a folder that holds some ({', '.join(ENDINGS)}) or a pattern"
        )
    return found


def _batch(
    model: torch.nn.Module,
    loaded: LoadedBackbone,
    named: list[tuple[str, Image]],
    top: int,
    device: torch.device,
) -> list[Prediction]:
    pixels, errors = [], {}
    for i, (_, image) in enumerate(named):
        try:
            pixels.append(_pixels(image, loaded.augment, loaded.convert_icc))
        except (DecodeError, UserError, OSError) as error:
            errors[i] = _reason(error)
    inputs = normalise(torch.from_numpy(np.stack(pixels)), loaded.augment, device) if pixels else None
    ranked = iter([] if inputs is None else _ranked(model, loaded, inputs, top))
    return [
        Prediction(image=name, ranked=[], error=errors[i])
        if i in errors
        else Prediction(image=name, ranked=next(ranked))
        for i, (name, _) in enumerate(named)
    ]


@torch.inference_mode()
def _ranked(
    model: torch.nn.Module, loaded: LoadedBackbone, images: torch.Tensor, top: int
) -> list[list[tuple[str, float]]]:
    classes, logits = loaded.classes, model(images).float()
    shares = logits.sigmoid() if activation_of(loaded.config) == "sigmoid" else logits.softmax(dim=1)
    shares, numbers = shares.topk(min(top, len(classes)), dim=1)
    return [
        [(classes[n], share) for n, share in zip(row, values, strict=True)]
        for row, values in zip(numbers.tolist(), shares.tolist(), strict=True)
    ]


def _pixels(image: Image, augment: AugmentConfig, convert_icc: bool) -> np.ndarray:
    """The network's input before `normalise`, as `pipeline.data.loading.batches.Pixels` makes it."""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise DecodeError(f"pixels must be (H, W, 3) uint8, these are {image.shape} {image.dtype}")
        return eval_image(image, augment)
    data = image if isinstance(image, bytes) else objects.read_bytes(image)
    return eval_image(open_picture(data, convert_icc=convert_icc), augment)


def _reason(error: Exception) -> str:
    if isinstance(error, DecodeError):
        return f"it does not decode ({error})"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) if isinstance(error, UserError) else f"it cannot be read ({type(error).__name__}: {error})"
