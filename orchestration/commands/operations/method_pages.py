"""The pages docs/normalizers/*.md, made from the methods' own modules and docs/results/laboratory: run this module with docs."""

import csv
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from nfnet.normalizers.registry import get_method, list_methods, page
from orchestration.commands.field_help import field_docs

RESULTS = "results/laboratory"


def markdown(name: str, docs: Path) -> str:
    """One method's page; `docs` has the results of the laboratory."""
    title, body = page(name).split("\n\n", 1)
    lines = [f"# {name}", "", title, ""]
    for line in body.splitlines():
        if line.startswith("    "):
            lines[-1] += f" {line.strip()}"
            continue
        part, _, text = line.partition(": ")
        lines += ([""] if lines[-1] else []) + [f"**{part}.** {text}"]
    lines += ["", f"**Our numbers.** {_numbers(name, docs / RESULTS)}"]
    cls = get_method(name)
    words: dict[str, str] = field_docs(cast(Any, cls))
    rows = [f"| `{f.name}` | {f.default} | {words.get(f.name, '').replace('|', chr(92) + '|')} |" for f in fields(cls)]
    facts = [
        "depends on the other samples of its batch" if not cls.batch_free else "each sample by itself",
        "evaluation differs from training" if not cls.eval_is_train else "evaluation computes what training does",
        *(["needs residual branches"] if cls.needs_branches else []),
        *([f"AGC with lambda {cls.clipping:g} in the laboratory, unless `clipping` is set"] if cls.clipping else []),
    ]
    lines += ["", facts[0][0].upper() + "; ".join(facts)[1:] + ".", ""]
    lines += ["| setting | default | |", "|---|---|---|", *rows] if rows else ["It has no settings."]
    module = cls.__module__.replace(".", "/")
    return "\n".join([*lines, "", f"Code: `{module}.py`. All methods: [the laboratory](../laboratory.md).", ""])


def _numbers(name: str, results: Path) -> str:
    """Of the table of all methods, and of the claims that name this one."""
    with (results / "all_methods" / "lab.csv").open() as file:
        rows = {row["method"].split()[0]: row for row in csv.DictReader(file)}
    with (results / "claims.csv").open() as file:
        claims = [row for row in csv.DictReader(file) if name in (w.split(":")[0] for w in row["criterion"].split())]
    found = []
    if name in rows:
        accuracy = {method: float(row["accuracy"]) for method, row in rows.items()}
        place = sorted(accuracy.values(), reverse=True).index(accuracy[name]) + 1
        error, speed, memory = (float(rows[name][k]) for k in ("accuracy_error", "speed_ratio", "memory_ratio"))
        table = f"[all methods](../{RESULTS}/README.md)"
        found.append(
            f"{100 * accuracy[name]:.1f} ± {100 * error:.1f} % in the table of {table}, a short training at one rate for all: "
            f"place {place} of {len(rows)}, with {speed:.2f} of the speed and {memory:.2f} of the memory of a pass with batch "
            "normalisation."
        )
    verdicts: dict[str, set[str]] = {}
    for row in claims:
        verdicts.setdefault(row["experiment"], set()).add(row["verdict"])
    told = [f"[{e}](../{RESULTS}/{e}/lab.html) {' and '.join(sorted(v))}" for e, v in verdicts.items()]
    return " ".join([*found, f"Claims that name it: {', '.join(told)}." if told else ""]).strip() or "None yet."


def write(docs: Path) -> None:
    for name in list_methods():
        (docs / "normalizers" / f"{name}.md").write_text(markdown(name, docs))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
