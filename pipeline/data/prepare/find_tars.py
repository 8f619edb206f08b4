"""Which tars of a folder are a dataset, and which split each belongs to: by patterns that are given, or by words in names."""

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.data.sources.cards import SPLIT_NAMES
from pipeline.data.sources.entry import splits_of_names
from pipeline.documents import excerpt, is_file_name
from pipeline.errors import UserError
from pipeline.storage import listing, objects

_COMPRESSED = (".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


@dataclass(frozen=True)
class FoundTar:
    """A tar to adopt."""

    split: str
    name: str
    """Below the folder of the manifest."""
    size_bytes: int


def find_tars(url: str, splits: Mapping[str, str] | None) -> tuple[str, list[FoundTar], list[str]]:
    """The folder of the manifest, its tars with their splits by name, and what was guessed or skipped, as notes.

    Raises:
        UserError: no tars, compressed ones among them, or tars whose split is not clear.
    """
    base, pattern = _base(url)
    prefix = objects.join(base).rstrip("/") + "/"
    names = {
        each_url.removeprefix(prefix): size
        for each_url, size in listing.sizes(base, (".tar", *_COMPRESSED)).items()
        if "/.staging/" not in each_url
    }
    chosen = sorted(names) if pattern is None else _matching(pattern, names, url)
    if not chosen:
        raise UserError(
            f"there is no tar at {url}: give a folder with *.tar, or a pattern such as train-{{000..099}}.tar"
        )
    found, notes = _by_patterns(splits, chosen, url) if splits else _by_names(chosen)
    _refuse_compressed(list(found), url)
    odd = next((tar for tar in found if not all(is_file_name(part) for part in tar.split("/"))), None)
    if odd is not None:
        raise UserError(f"the tar {excerpt(odd)} of {url} has a name with characters that are no text: rename it")
    tars = [FoundTar(split, tar, names[tar]) for tar, split in found.items()]
    return base, sorted(tars, key=lambda tar: (tar.split, tar.name)), notes


def _by_patterns(splits: Mapping[str, str], chosen: list[str], url: str) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    for split, wanted in splits.items():
        if split not in SPLIT_NAMES:
            raise UserError(f"split '{split}' must be one of {', '.join(SPLIT_NAMES)}")
        for tar in _matching(wanted, chosen, url):
            if tar in found:
                raise UserError(f"{tar} matches the patterns of {found[tar]} and of {split}: make them apart")
            found[tar] = split
    rest = [tar for tar in chosen if tar not in found]
    return found, [f"{len(rest)} tars match no pattern of a split and are skipped, such as {rest[0]}"] if rest else []


def _by_names(chosen: list[str]) -> tuple[dict[str, str], list[str]]:
    splits = splits_of_names(chosen, "say so, as in --split train='train-*.tar'")
    guess = ["no name says a split, so all tars are taken for train"] if None in splits.values() else []
    return {tar: split or "train" for tar, split in splits.items()}, guess


def _refuse_compressed(tars: list[str], url: str) -> None:
    packed = [tar for tar in tars if not tar.lower().endswith(".tar")]
    if packed:
        raise UserError(
            f"{len(packed)} of {len(tars)} tars of {url} are compressed, such as {packed[0]}, and images are read from their "
            "places in a tar: unpack them (gunzip makes NAME.tar of NAME.tar.gz), or leave them out by --split and a pattern"
        )


def _base(url: str) -> tuple[str, str | None]:
    """The folder before the first part that is a pattern, and the pattern below it; (folder, None) for a folder.

    What is there under its own name is no pattern, whatever characters it has.
    """
    plain = str(objects.local_path(url)) if objects.is_local(url) else objects.join(url)
    if not url.lower().endswith((".tar", *_COMPRESSED)) and (not _is_pattern(url) or objects.exists(url)):
        return plain, None
    cuts = [place.start() for place in re.finditer("/", plain)]
    for cut in reversed(cuts):
        folder = plain[:cut]
        if cut > 0 and not folder.endswith((":", "/")) and (not _is_pattern(folder) or objects.exists(folder)):
            return folder, plain[cut + 1 :]
    return ("/", plain[1:]) if plain.startswith("/") else (".", plain)


def _is_pattern(text: str) -> bool:
    return re.search(r"[*?\[{]", text) is not None


def _matching(pattern: str, names: Mapping[str, int] | Sequence[str], where: str) -> list[str]:
    """Names that match a pattern, by their whole path or their last part. A number range must be there completely."""
    import braceexpand

    if pattern in names:
        return [pattern]
    found: list[str] = []
    missing: list[str] = []
    for part in braceexpand.braceexpand(pattern):
        hits = [n for n in names if fnmatch.fnmatchcase(n, part) or fnmatch.fnmatchcase(n.rpartition("/")[2], part)]
        found += [name for name in sorted(hits) if name not in found]
        missing += [] if hits else [part]
    if missing:
        raise UserError(f"{where}: {len(missing)} tars of {pattern} are not there, such as {missing[0]}")
    return found
