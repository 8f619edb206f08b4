"""Several labels an image: what one image shows is a *label set*, and each set that occurs is a class of the index.

So shards, index, order and every digest of a dataset are what they are with one label an image; the manifest's `labels` say
that its classes are sets, whose names are spelled here:

    cat|dog         shows both, and none of the other labels
    cat|?dog        shows a cat; whether a dog is not said (VOC's "difficult", CheXpert's "uncertain"): it counts for neither
    (none)          shows none of the labels
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.errors import UserError

SEPARATOR, UNSURE, NONE = "|", "?", "(none)"


def set_name(words: Iterable[str], where: str = "") -> str:
    """The class that stands for these labels, in any order; `?` before a label leaves open whether it is shown.

    Raises:
        UserError: a label that the spelling has no room for, or one that is there as both; with `where`.
    """
    found = sorted({word for word in words if word}, key=lambda word: (word.removeprefix(UNSURE), word))
    plain = [word.removeprefix(UNSURE) for word in found]
    for word in plain:
        if not word or word == NONE or SEPARATOR in word or word.startswith(UNSURE):
            raise UserError(
                f"{where}: {word!r} is no label; it must not hold {SEPARATOR} or begin with {UNSURE}{UNSURE}"
            )
    if twice := [word for word in plain if plain.count(word) > 1]:
        raise UserError(f"{where}: {twice[0]} is said to be there and to be unsure; keep one of them")
    return SEPARATOR.join(found) or NONE


def words_of(name: str) -> list[str]:
    """The labels of a set's name, those left open with their `?`."""
    return [] if name == NONE else name.split(SEPARATOR)


def labels_of(names: Iterable[str]) -> set[str]:
    """All labels that these sets speak of."""
    return {word.removeprefix(UNSURE) for name in names for word in words_of(name)}


def targets(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """What each set says of each label, (sets, labels) int8: 1 shown, 0 not shown, -1 not said. KeyError: no such label."""
    number = {label: i for i, label in enumerate(labels)}
    found = np.zeros((len(names), len(labels)), np.int8)
    for row, name in enumerate(names):
        for word in words_of(name):
            found[row, number[word.removeprefix(UNSURE)]] = -1 if word.startswith(UNSURE) else 1
    return found


def without_image(classes: Sequence[str], labels: Sequence[str], parts: Sequence[np.ndarray]) -> list[str]:
    """Classes that no image has, or labels that none shows. Args: parts: images of each class, (classes,) each."""
    counts = sum(parts, start=np.zeros(len(classes), np.int64))
    shown = counts if not labels else counts @ (targets(classes, labels) == 1)
    return [name for name, num in zip(labels or classes, shown.tolist(), strict=True) if not num]


def common_labels(sources: Sequence[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
    """Of datasets (url, labels) that are read together; () where an image has one. UserError where they differ."""
    (first, labels), *others = sources
    for url, other in others:
        if other != labels:
            raise UserError(
                f"{first} and {url} do not have the same labels ({len(labels)} and {len(other)}; 0 is one class an image); "
                "read one of them, or prepare both with the same card"
            )
    return labels
