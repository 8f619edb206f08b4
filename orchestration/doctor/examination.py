"""The examination of one host or of several: each alone, then what they share, then the network between them."""

import dataclasses
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from orchestration.doctor import comparison
from orchestration.doctor.conversation import Conversation, Unanswered
from orchestration.doctor.host import Request, examine
from orchestration.doctor.messages import Examined, Finding, Hello, Link, Sweep
from orchestration.doctor.sweep import LIMIT_S as SWEEP_S
from pipeline import documents

HELLO_S, EXAMINE_S, SHORT_S, LINK_S = 60.0, 300.0, 30.0, 60.0
MAX_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be looked at besides the hosts themselves."""

    out: str = ""
    data: str = ""
    tracking_uri: str = ""
    parity: bool = True


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What ranks on the hosts would have."""

    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    processes: int = 0
    """Ranks of a host in the all-reduces; 0 = one a GPU, or one."""


@dataclass(kw_only=True)
class Report:
    facts: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """By host."""
    findings: list[Finding] = field(default_factory=list)
    links: dict[tuple[str, str], Link] = field(default_factory=dict)
    sweep: Sweep | None = None

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_fault]

    def to_json(self) -> dict[str, Any]:
        return {
            "is_well": not self.faults,
            "hosts": self.facts,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "links": [{"hosts": pair, **dataclasses.asdict(link)} for pair, link in self.links.items()],
            "all_reduce": dataclasses.asdict(self.sweep) if self.sweep else None,
        }


def of_this_host(asked: Asked) -> Report:
    name = socket.gethostname()
    found = examine(Request(do="examine", **dataclasses.asdict(asked)))
    return Report(facts={name: found.facts}, findings=[dataclasses.replace(f, host=name) for f in found.findings])


def of_hosts(
    hosts: Sequence[Conversation],
    asked: Asked,
    *,
    setting: Setting = Setting(),
    why: Callable[[Conversation, str], str] = lambda host, text: text,
) -> Report:
    """Args:
    why: the words for a host that was not reached.
    """
    report = Report()
    with ThreadPoolExecutor(min(MAX_AT_ONCE, len(hosts))) as pool:
        group = _Group(report, pool, hosts)
        hellos = group.hello(setting, why)
        if hellos:
            num_local = {name: setting.processes or max(1, hello.num_gpus) for name, hello in hellos.items()}
            group.examine(asked, sum(num_local.values()))
            if len(hellos) > 1:
                if asked.out:
                    group.share(asked.out)
                ports = group.listen(hellos)
                group.link(hellos, ports)
                if not any(link.error for link in report.links.values()):
                    group.sweep(hellos, ports, num_local)
    return report


class _Group:
    """The hosts that answer, all asked at the same time."""

    def __init__(self, report: Report, pool: ThreadPoolExecutor, hosts: Sequence[Conversation]) -> None:
        self._report, self._pool = report, pool
        self._hosts = {host.name: host for host in hosts}
        self._token = secrets.token_hex(32)

    def _ask(self, what: str, questions: Mapping[str, tuple[str, float, Mapping[str, Any]]]) -> dict[str, Any]:
        """Answers by host; one that does not answer is a finding, and left out from here on.

        Args:
            what: for the finding.
            questions: by host, what it is to do, in how many seconds, with which words.
        """

        def one(name: str) -> Any:
            do, limit_s, words = questions[name]
            try:
                return self._hosts[name].ask(do, limit_s=limit_s, **words)
            except Unanswered as error:
                return error

        answers = dict(zip(questions, self._pool.map(one, questions), strict=True))
        for name, answer in list(answers.items()):
            if isinstance(answer, Unanswered):
                self._find(name, Finding(what=what, value=str(answer), remedy="look at that host"))
                del answers[name]
                if "no answer" in str(answer) or "ended" in str(answer):
                    del self._hosts[name]
        return answers

    def _find(self, host: str, finding: Finding) -> None:
        self._report.findings.append(dataclasses.replace(finding, host=finding.host or host))

    def hello(self, setting: Setting, why: Callable[[Conversation, str], str]) -> dict[str, Hello]:
        def one(host: Conversation) -> tuple[Hello, float] | str:
            try:
                words = {"environment": dict(setting.environment), "folder": setting.folder}
                found = documents.convert(host.ask("hello", limit_s=HELLO_S, **words), Hello, f"what {host.name} says")
                return found, found.clock_s - host.heard_s
            except (Unanswered, ValueError) as error:
                return why(host, str(error))

        names = list(self._hosts)
        found = dict(zip(names, self._pool.map(one, self._hosts.values()), strict=True))
        hellos, ahead = dict[str, Hello](), dict[str, float]()
        for name, answer in found.items():
            if isinstance(answer, str):
                self._find(name, Finding(what="ssh", value=answer, remedy="the other hosts were examined without it"))
                del self._hosts[name]
            else:
                hellos[name], ahead[name] = answer
        self._report.findings += comparison.clocks(ahead)
        return hellos

    def examine(self, asked: Asked, num_ranks: int) -> None:
        words = {**dataclasses.asdict(asked), "num_hosts": len(self._hosts), "num_ranks": num_ranks}
        answers = self._ask("examination", dict.fromkeys(self._hosts, ("examine", EXAMINE_S, words)))
        examined = {
            name: documents.convert(found, Examined, f"what {name} says of itself") for name, found in answers.items()
        }
        for name, found in examined.items():
            self._report.facts[name] = found.facts
            for finding in found.findings:
                self._find(name, finding)
        self._report.findings += comparison.differences(examined)

    def share(self, out: str) -> None:
        """Each host finds in its own `--out` what all others wrote there."""
        names = {name: f"host{i}" for i, name in enumerate(self._hosts)}
        base = {"out": out, "token": self._token[:16]}

        def all_do(what: str, *more: str) -> dict[str, Any]:
            asked = {
                name: ("mark", SHORT_S, {**base, "names": [what, names[name], *more]})
                for name in names
                if name in self._hosts
            }
            return self._ask("--out", asked)

        try:
            written = all_do("write")
            looked = all_do("look", *(names[name] for name in written))
        finally:
            all_do("remove")
        by_mark = {mark: name for name, mark in names.items()}
        for name, answer in looked.items():
            missing = [by_mark[mark] for mark in answer["missing"] if mark in by_mark]
            if missing:
                value = f"{out} there is not that of {', '.join(missing[:4])}: what these write is not seen"
                remedy = "set --out to a folder that all hosts share, or to s3://bucket/..."
                self._find(name, Finding(what="--out", value=value, remedy=remedy))

    def listen(self, hellos: Mapping[str, Hello]) -> dict[str, tuple[int, int]]:
        """Of each host, the port where it answers others, and a free one."""
        asked = {
            name: ("listen", SHORT_S, {"address": _address(hellos[name]), "token": self._token}) for name in self._hosts
        }
        return {name: (found["port"], found["free_port"]) for name, found in self._ask("port", asked).items()}

    def link(self, hellos: Mapping[str, Hello], ports: Mapping[str, tuple[int, int]]) -> None:
        for round_ in comparison.pairs([name for name in ports if name in self._hosts]):
            asked = {
                one: (
                    "link",
                    LINK_S,
                    {"address": _address(hellos[other]), "port": ports[other][0], "token": self._token},
                )
                for one, other in round_
                if one in self._hosts
            }
            answers = self._ask("network", asked)
            for one, other in round_:
                if one in answers:
                    self._report.links[one, other] = documents.convert(answers[one], Link, f"what {one} measured")
        self._report.findings += comparison.links(self._report.links)

    def sweep(
        self, hellos: Mapping[str, Hello], ports: Mapping[str, tuple[int, int]], num_local: Mapping[str, int]
    ) -> None:
        names, asked, rank = [name for name in ports if name in self._hosts], {}, 0
        for name in names:
            words = {"address": _address(hellos[names[0]]), "port": ports[names[0]][1], "first_rank": rank}
            words |= {"num_local": num_local[name], "num_ranks": sum(num_local[n] for n in names)}
            words["names"] = [hellos[name].interface or "lo"]
            asked[name] = ("sweep", SWEEP_S + SHORT_S, words)
            rank += num_local[name]
        answers = {
            name: documents.convert(found, Sweep, f"what {name} measured")
            for name, found in self._ask("all-reduce", asked).items()
        }
        for name, found in answers.items():
            for finding in comparison.sweep(found):
                self._find(name, finding)
        self._report.sweep = answers.get(names[0])


def _address(hello: Hello) -> str:
    return hello.address or "127.0.0.1"
