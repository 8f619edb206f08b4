"""The pages docs/normalizers/*.md, made from the methods' own modules: run this module with the folder."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from nfnet.normalizers.registry import get_method, list_methods, page
from orchestration.commands.field_help import field_docs


def markdown(name: str) -> str:
    """One method's page."""
    title, body = page(name).split("\n\n", 1)
    lines = [f"# {name}", "", title, ""]
    for line in body.splitlines():
        if line.startswith("    "):
            lines[-1] += f" {line.strip()}"
            continue
        part, _, text = line.partition(": ")
        lines += ([""] if lines[-1] else []) + [f"**{part}.** {text}"]
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


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in list_methods():
        (folder / f"{name}.md").write_text(markdown(name))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
