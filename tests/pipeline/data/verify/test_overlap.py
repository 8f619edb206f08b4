"""Overlap: every planted duplicate that was re-encoded or resized is found, and other pictures are not taken for one."""

import csv
import io
import json
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images.decode import decode_image
from pipeline.data.images.perceptual_hash import FLAT_HASH, mirrored, perceptual_hash
from pipeline.data.prepare.prepare import prepare
from pipeline.data.sources.cards import load_card
from pipeline.data.verify.hash_search import MAX_RADIUS, hash_pairs
from pipeline.data.verify.overlap import RADIUS, _compare, overlap
from pipeline.errors import UserError

CARD = load_card("images")


@pytest.mark.parametrize("radius", range(MAX_RADIUS + 1))
def test_the_pairs_are_those_of_comparing_each_with_each(radius):
    rng = np.random.default_rng(radius)
    a = rng.integers(0, 1 << 63, 2000, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(63, rng.integers(0, 14), replace=False)) for _ in range(400)]
    b = np.concatenate([a[:400] ^ np.array(flips, np.uint64), rng.integers(0, 1 << 63, 100, dtype=np.uint64), a[:3]])
    a = np.concatenate([a, a[:50], rng.integers(0, 1 << 12, 200, dtype=np.uint64)])  # equal ones, and crowded blocks
    distances = np.bitwise_count(a[:, None] ^ b[None])
    in_a, in_b, distance = hash_pairs(a, b, radius)
    assert set(zip(in_a.tolist(), in_b.tolist(), strict=True)) == set(
        zip(*np.nonzero(distances <= radius), strict=True)
    )
    assert len(in_a) == (distances <= radius).sum() and (distances[in_a, in_b] == distance).all()


def test_no_pairs_of_nothing():
    nothing = np.zeros(0, np.uint64)
    for a, b in ((nothing, nothing), (nothing, np.ones(3, np.uint64)), (np.ones(3, np.uint64), nothing)):
        assert [len(part) for part in hash_pairs(a, b, 8)] == [0, 0, 0]


def test_one_colour_has_no_hash():
    for value in (0, 128, 255):
        assert perceptual_hash(np.full((40, 30, 3), value, np.uint8)) == FLAT_HASH


def saved(pixels, kind="JPEG", scale=1.0, **options):
    image = Image.fromarray(pixels)
    size = tuple(max(8, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    (image if scale == 1 else image.resize(size, Image.Resampling.BICUBIC)).save(buffer, kind, **options)
    return buffer.getvalue()


def some(real_data, name, split, every):
    with tarfile.open(real_data / f"{name}.tar") as tar:
        members = [member for member in tar if member.isreg() and f"{split}/" in member.name]
        return [tar.extractfile(member).read() for member in members[::every]]


CHANGES = {
    "q50": {"quality": 50},
    "q70": {"quality": 70},
    "q90": {"quality": 90},
    "half": {"quality": 85, "scale": 0.5},
    "larger": {"quality": 85, "scale": 1.5},
    "png": {"kind": "PNG"},
}


def folder_of(root, images):
    for number, data in enumerate(images):
        path = root / "val" / str(number % 2) / f"{number}.img.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        if number < 2:  # a dataset has a train split
            (root / "train" / str(number)).mkdir(parents=True, exist_ok=True)
            (root / "train" / str(number) / "x.png").write_bytes(
                saved(np.eye(9, dtype=np.uint8)[..., None] * np.full(3, 99 + number, np.uint8), "PNG")
            )
    return root


@pytest.mark.parametrize(("name", "every"), [("caltech101", 7), ("cifar10", 7)])
def test_planted_copies_are_found_and_others_are_not(real_data, tmp_path, name, every):
    train = some(real_data, name, "train", 3)
    upstream = prepare(CARD, str(tmp_path / "up"), source=str(folder_of(tmp_path / "raw_up", train)))
    copied = train[::every]
    changes = list(CHANGES)
    planted = [saved(decode_image(data), **CHANGES[changes[n % len(changes)]]) for n, data in enumerate(copied)]
    planted[0] = copied[0]
    strangers = [data for other in ("clothing", "flowers", "omniglot") for data in some(real_data, other, "val", 3)]
    source = folder_of(tmp_path / "raw", planted + strangers)
    prepare(CARD, str(tmp_path / "down"), source=str(source))
    found = overlap(upstream.url, str(tmp_path / "down"))
    numbers = {int(pair.key_b.rpartition("_")[0].rpartition("_")[2].removesuffix("_img")) for pair in found.pairs}
    assert len(numbers & set(range(len(planted)))) >= 0.95 * len(planted)
    assert not numbers & set(range(len(planted), len(planted) + len(strangers)))
    assert {pair.kind for pair in found.pairs} == {"bytes", "pixels", "similar"}
    assert sum(pair.kind == "bytes" for pair in found.pairs) == 1 and found.num_b == len(planted) + len(strangers)
    rows = list(csv.DictReader(io.StringIO(found.to_csv().decode())))
    assert rows == [{key: str(value) for key, value in asdict(pair).items()} for pair in found.pairs]
    assert len(json.loads(found.to_json())["pairs"]) == len(rows)


def changed(pixels):
    """Brighter, flatter, mirrored; and what stays unfound by nature, a crop and a border."""
    tall, wide = pixels.shape[0] // 10, pixels.shape[1] // 10
    values = pixels.astype(float)
    return {
        "brighter": np.clip(values * 1.1, 0, 255).astype(np.uint8),
        "flatter": (values * 0.7 + 30).astype(np.uint8),
        "mirrored": np.ascontiguousarray(pixels[:, ::-1]),
        "cropped": np.ascontiguousarray(pixels[tall : -tall or None, wide : -wide or None]),
    }


def test_brightness_contrast_and_mirrors_are_found(real_data):
    """By hash and by look, of photographs; and none of them is taken for another."""
    photos = [decode_image(data) for data in some(real_data, "caltech101", "val", 20)[:40]]
    found = dict.fromkeys(changed(photos[0]), 0)
    for pixels in photos:
        for name, other in changed(pixels).items():
            hashes = np.array([perceptual_hash(pixels), perceptual_hash(other)], np.uint64)
            seen = mirrored(hashes[1:]) if name == "mirrored" else hashes[1:]
            is_near = int(np.bitwise_count(hashes[0] ^ seen[0])) <= RADIUS
            found[name] += is_near and _compare(saved(pixels), saved(other), is_mirrored=name == "mirrored") is not None
    assert min(found["brighter"], found["flatter"], found["mirrored"]) >= 0.9 * len(photos), found
    assert found["cropped"] <= 0.2 * len(photos), found  # the blind spot that the documents name
    pairs = [(a, b) for a in range(0, len(photos), 2) for b in range(1, len(photos), 2)]
    assert len(pairs) >= 64
    assert not any(
        _compare(saved(photos[a]), saved(photos[b]), is_mirrored=flip) for a, b in pairs[::8] for flip in (False, True)
    )


@pytest.mark.slow
def test_a_picture_of_the_same_kind_is_no_copy_once_it_is_looked_at(real_data, tmp_path):
    """caltech101 has planes on white and the like: equal hashes, other pictures. None of cifar10 is among them."""
    for name in ("caltech101", "cifar10"):
        prepare(load_card(name), str(tmp_path / name), source=str(real_data / f"{name}.tar"))
    urls = [str(tmp_path / name) for name in ("caltech101", "cifar10")]
    hashes = overlap(*urls, splits_b=["train", "val"], radius=10, confirm=False)
    looked_at = overlap(*urls, splits_b=["train", "val"], radius=10)
    assert hashes.num_candidates == looked_at.num_candidates > 0 and looked_at.pairs == ()


def test_wrong_questions(digits):
    with pytest.raises(UserError, match="radius 12 must be from 0 to 11"):
        overlap(digits, digits, radius=12)
    with pytest.raises(UserError, match="no split 'test'"):
        overlap(digits, digits, splits_b=["test"])
