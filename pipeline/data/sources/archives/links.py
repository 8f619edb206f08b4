"""Links inside an archive, followed by name: no file system is asked."""

import bisect
import posixpath
from collections.abc import Mapping

from pipeline.data.sources.archives.locators import BROKEN_LINK, FoundFile, Listing
from pipeline.errors import UserError

_MAX_STEPS = 40
_MAX_GROWTH = 4
"""Links may make so many times more files than there are: shared folders do not, a tree of links to links does."""


def add_links(listing: Listing, links: Mapping[str, str], source: str) -> None:
    """Add the files that are reached through links, under the links' names.

    Args:
        links: name of a link -> name of what it leads to, both inside the archive; the latter may not be there.
    Raises:
        UserError: the links multiply the files without end.
    """
    by_name = {file.name: file for file in listing.files}
    names = sorted(by_name)
    limit = _MAX_GROWTH * len(names) + 1000
    found: list[FoundFile] = []
    for link, target in links.items():
        real = _follow(target, links)
        if real in by_name:
            found.append(by_name[real]._replace(name=link))
            continue
        inside = _below(names, real)
        if not inside or (link + "/").startswith(real + "/"):  # a folder inside itself has no end
            listing.skip(link, BROKEN_LINK)
            continue
        found += [by_name[name]._replace(name=link + name[len(real) :]) for name in inside]
        if len(found) > limit:
            raise UserError(
                f"the source {source} has links that make more than {limit} files of {len(names)}: do not trust it"
            )
    listing.files += [file for file in found if file.name not in by_name]


def target_of(link: str, target: str) -> str:
    """The name inside the archive that a symbolic link leads to; one outside is kept as `../...` or `/...`."""
    return target if target.startswith("/") else posixpath.normpath(posixpath.join(posixpath.dirname(link), target))


def _follow(name: str, links: Mapping[str, str]) -> str:
    """`name` with every link on its way replaced by what it leads to."""
    for _ in range(_MAX_STEPS):
        parts = name.split("/")
        heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        head = next((head for head in heads if head in links), None)
        if head is None:
            return name
        name = posixpath.normpath(links[head] + name[len(head) :])
    return "/"  # a circle


def _below(names: list[str], folder: str) -> list[str]:
    first = bisect.bisect_left(names, folder + "/")
    return names[first : bisect.bisect_left(names, folder + "0")]  # "0" comes after "/"
