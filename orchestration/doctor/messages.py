"""What a host is asked by the doctor, and what it answers: one JSON document a line, of bounded size."""

from dataclasses import dataclass, field

from pipeline.documents import Count, Text
from pipeline.errors import UserError
from pipeline.secrets import public

MARK = "normfree doctor"
"""Key of a line that is an answer; a login shell may print others."""
MAX_BYTES = 1 << 20
REMEDY = "install the same normfree on all hosts"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about a host that is to be known, or to be mended."""

    what: Text
    value: Text
    remedy: Text = ""
    is_fault: bool = True
    """Training would fail, be wrong or be slow. Otherwise it is only worth knowing."""
    host: Text = ""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What one step of the examination found."""

    facts: dict[Text, Text] = field(default_factory=dict)
    """By name, for people; those of `comparison.COMPARED` are the same on all hosts that fit together."""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The first answer: where the host is."""

    clock_s: float
    address: Text = ""
    """Under which it was reached."""
    interface: Text = ""
    """Of that address."""
    num_gpus: Count = 0


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between two hosts, one TCP connection."""

    round_trip_s: float = 0.0
    """Median of small messages."""
    to_bytes_s: float = 0.0
    from_bytes_s: float = 0.0
    error: Text = ""

    @property
    def bytes_s(self) -> float:
        """Of the slower direction."""
        return min(self.to_bytes_s, self.from_bytes_s)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All-reduces over all hosts, with the backend of training."""

    backend: Text = ""
    num_ranks: Count = 0
    seconds: dict[Text, float] = field(default_factory=dict)
    """Median of one, by its size in bytes."""
    error: Text = ""


def words(error: Exception) -> str:
    """For a finding, of bounded length and without credentials."""
    return public(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")[:1000]
