"""ImageNet (ILSVRC-2012) as it is distributed: a tar of class tars, a tar of validation images, and their labels.

The source is the folder (or prefix) of the files as downloaded:

    ILSVRC2012_img_train.tar     1,000 tars <wnid>.tar
    ILSVRC2012_img_val.tar       50,000 images without classes
    the labels of validation, one of
        ILSVRC2012_devkit_t12.tar.gz           read in place: numbers, and the table from number to wnid
        LOC_val_solution.csv                   Kaggle's: ImageId,PredictionString
        *synset_labels.txt or val_labels.txt   one wnid a line in the order of the images, or `<image> <wnid>` a line

The two tars may also be there unpacked, as `train/` (class folders or class tars) and `val/`.
"""

import io
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline import documents
from pipeline.data.sources.archives.find_files import list_files
from pipeline.data.sources.archives.locators import FoundFile, Refused, Sparse, Zipped
from pipeline.data.sources.archives.reader import FileReader
from pipeline.data.sources.archives.tar_files import list_tar
from pipeline.data.sources.entry import ImageEntry, Unreadable
from pipeline.errors import UserError
from pipeline.storage import objects

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
LABEL_FILES = (
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_synset_labels.txt",
    "val_labels.txt",
)
_MATLAB_COMPRESSED, _MAX_MATLAB_BYTES = 15, 64 << 20
_JPEG = (".jpeg", ".jpg")
_WNID = re.compile(r"n\d{8}")


def is_distributed(source: str) -> bool:
    """Whether the files of ILSVRC-2012, as distributed, lie at `source`."""
    has_val = objects.exists(objects.join(source, VAL))
    return objects.exists(objects.join(source, TRAIN)) or (has_val and objects.exists(objects.join(source, "train")))


def open_distributed(source: str) -> tuple[list[ImageEntry], str]:
    """The entries of train and, where its images are there, val; and a note.

    Raises:
        UserError: an inner tar that is damaged or not named by a wnid, or validation images without their labels.
    """
    skipped: Counter[str] = Counter()
    train = _train_files(source, skipped)
    entries = [ImageEntry("train", wnid, _stem(file.name), "jpeg", file.locator, file.size) for wnid, file in train]
    found = _files(source, VAL, "val", skipped)
    images = sorted((file for file in found if file.name.lower().endswith(_JPEG)), key=lambda file: file.name)
    skipped["files of val that are no .JPEG"] += len(found) - len(images)
    note = "; " + ", ".join(f"{num} {what} were skipped" for what, num in skipped.items() if num)
    if not images:
        return entries, f"no {VAL}: there is no val split{note}".rstrip("; ")
    labels, where = _val_labels(source, [_stem(file.name) for file in images])
    entries += [
        ImageEntry("val", labels[_stem(file.name)], _stem(file.name), "jpeg", file.locator, file.size)
        for file in images
    ]
    return entries, f"validation labels are from {where}{note}".rstrip("; ")


def _files(source: str, archive: str, folder: str, skipped: Counter[str]) -> list[FoundFile]:
    """Those of the archive, or of the folder where there is none; what is skipped is added up."""
    for name in (archive, folder):
        listing = list_files(objects.join(source, name))
        if listing is not None and listing.files:
            skipped += listing.skipped
            return listing.files
    return []


def _train_files(source: str, skipped: Counter[str]) -> list[tuple[str, FoundFile]]:
    found: list[tuple[str, FoundFile]] = []
    for file in _files(source, TRAIN, "train", skipped):
        folder, _, base = file.name.rpartition("/")
        wnid = base[:-4] if base.endswith(".tar") else folder.rpartition("/")[2]
        if not _WNID.fullmatch(wnid):
            raise UserError(
                f"{source}: train has {documents.excerpt(file.name)}, which is in no class folder or class tar called n########"
            )
        if not base.endswith(".tar"):
            found.append((wnid, file))
            continue
        place = file.locator
        if isinstance(place, Refused | Sparse | Zipped):
            raise UserError(
                f"{source}: the class tar {documents.excerpt(file.name)} lies in another archive than a plain tar: unpack that"
            )
        inner = list_tar(*place)
        if not inner.files:
            raise UserError(
                f"{source}: the class tar {documents.excerpt(file.name)} in train is empty: fetch {TRAIN} again"
            )
        skipped += inner.skipped
        found += [(wnid, image) for image in inner.files]
    if not found:
        raise UserError(f"{source} has no training images: {TRAIN} or train/ is missing or empty")
    return found


def _val_labels(source: str, stems: Sequence[str]) -> tuple[dict[str, str], str]:
    """wnid of each image, and the file that says so."""
    for name in LABEL_FILES:
        where = objects.join(source, name)
        if objects.exists(where):
            data = objects.read_bytes(where, max_bytes=documents.MAX_BYTES + 1)
            if len(data) > documents.MAX_BYTES:
                raise UserError(f"{where} is larger than {documents.MAX_BYTES >> 20} MiB, which no list of labels is")
            return _label_file(data.decode("utf-8-sig", "replace"), stems, where), name
    devkit = objects.join(source, DEVKIT)
    if objects.exists(devkit):
        return _devkit_labels(stems, devkit), DEVKIT
    raise UserError(
        f"{source} has validation images but not their labels: put {DEVKIT} there, or one of {', '.join(LABEL_FILES)}"
    )


def _label_file(text: str, stems: Sequence[str], where: str) -> dict[str, str]:
    lines = [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("ImageId")]
    rows = [re.split(r"[,\s]+", line) for line in lines]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(stems):
            raise UserError(f"{where} has {len(rows)} labels for {len(stems)} validation images: they must be as many")
        labels = dict(zip(sorted(stems), (row[0] for row in rows), strict=True))
    else:
        labels = {_stem(row[0]): row[1] for row in rows if len(row) > 1}
    odd = sorted({wnid for wnid in labels.values() if not _WNID.fullmatch(wnid)})
    missing = sorted(set(stems) - set(labels))
    if odd:
        raise UserError(f"{where} has a label '{documents.excerpt(odd[0])}' that is no wnid (n########)")
    if missing:
        raise UserError(f"{where} lacks {documents.excerpt(missing[0])}")
    return labels


def _devkit_labels(stems: Sequence[str], where: str) -> dict[str, str]:
    """Ground truth by the devkit: line i is the number of image i, and meta.mat says which wnid has that number."""
    from scipy.io import loadmat

    truth, meta = _devkit_files(where, ("ILSVRC2012_validation_ground_truth.txt", "meta.mat"))
    try:
        _check_matlab(meta)
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        rows = [wnids[int(line)] for line in truth.decode().split()]
    except MemoryError:
        raise
    except Exception as error:  # scipy's reader ends in errors of any kind on bytes that are no such file
        raise UserError(
            f"the devkit {where} is damaged or another one than of ILSVRC-2012 ({documents.excerpt(str(error), 200)})"
        ) from error
    return _label_file("\n".join(rows), stems, where)


def _devkit_files(where: str, names: Sequence[str]) -> list[bytes]:
    with tempfile.TemporaryDirectory(prefix="normfree-spool-") as spool:
        listing = list_files(where, Path(spool))
        found = {file.name.rpartition("/")[2]: file for file in listing.files} if listing else {}
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"the devkit {where} lacks {missing[0]}: fetch it again")
        entries = [ImageEntry("", "", name, "", found[name].locator, found[name].size) for name in names]
        contents = list(FileReader().read(entries))
    for content in contents:
        if isinstance(content, Unreadable):
            raise UserError(f"the devkit {where} cannot be read ({content}): fetch it again")
    return [content for content in contents if isinstance(content, bytes)]


def _check_matlab(data: bytes) -> None:
    """ValueError for a MATLAB 5 file whose compressed parts, which its reader unpacks whole, are out of proportion."""
    at, num_bytes = 128, 0
    while at + 8 <= len(data):
        kind, size = struct.unpack("<II", data[at : at + 8])
        if kind == _MATLAB_COMPRESSED:
            num_bytes += len(zlib.decompressobj().decompress(data[at + 8 : at + 8 + size], _MAX_MATLAB_BYTES + 1))
        if num_bytes > _MAX_MATLAB_BYTES:
            raise ValueError(f"meta.mat unpacks to more than {_MAX_MATLAB_BYTES} bytes")
        at += 8 + size + (-size % 8 if kind != _MATLAB_COMPRESSED else 0)


def _stem(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]
