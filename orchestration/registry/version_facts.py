"""What a registered version says of its checkpoint: its tags, the scorecard of a sweep, and the text of its page."""

from __future__ import annotations

from typing import Any

from orchestration.tracking import lineage
from orchestration.tracking.sweep_summary import table
from pipeline.checkpoint.commit import Commit
from pipeline.errors import UserError
from pipeline.secrets import public

HEADER = ("task", "method", "images a class", "pretrained %", "from scratch %", "gain, points", "")
DESCRIPTION_CHARACTERS = 4900  # the column holds 5,000


def tags_of(commit: Commit) -> dict[str, str]:
    """What it is, of what and of which data, by digests."""
    config, dataset = commit.config, commit.dataset
    tags = {
        lineage.DIGEST: commit.digest,
        "step": str(commit.step),
        "samples": str(commit.samples),
        "size_bytes": str(commit.size_bytes),
        "num_classes": str(len(commit.classes)),
        "model": str(config["model"]["name"]),
        "recipe": str(config.get("name", "")),
        "config_digest": commit.config_digest,
        "dataset": str(dataset.get("name", "")),
        "dataset.url": str(dataset.get("url", "")),
        "dataset.digest": str(dataset.get("digest", "")),
        **{f"eval.{name}": f"{value:.6g}" for name, value in commit.evaluation.items()},
    }
    return {key: public(value) for key, value in tags.items() if value}


def scorecard_rows(sweep: str, commit: Commit) -> list[dict[str, Any]]:
    """The scorecard of a sweep; UserError if that is about other weights."""
    from transfer.report.write_report import load_entries
    from transfer.report.write_report import scorecard as rows_of
    from transfer.sweep.ledger import Ledger

    theirs = Ledger(sweep).info().checkpoint_digest
    if theirs != commit.digest:
        raise UserError(
            f"the sweep {sweep} is about another checkpoint (digest {theirs[:12]}) than {commit.url} ({commit.digest[:12]}); "
            "give the sweep of this one, or leave --scorecard out"
        )
    rows = []
    for row in rows_of(load_entries(sweep)):
        values = {"pretrained": row.pretrained, "scratch": row.scratch, "gain": row.gain}
        numbers = {k: round(v.mean, 6) for k, v in values.items() if v is not None}
        rows.append({"task": row.task, "method": row.method, "shots": row.shots, **numbers, "verdict": row.verdict})
    return rows


def origin_tags(run: Any, commit: Commit) -> dict[str, str]:
    """What the MLflow run that saved this checkpoint says of the code, and which sweeps it knows of."""
    if run is None:
        return {}
    names = ("code.revision", "code.dirty", "run_dir")
    found = {name: public(run.data.tags[name]) for name in names if run.data.tags.get(name)}
    return {"run_id": run.info.run_id, **found, **lineage.sweeps_of(run, commit.digest)}


def description(commit: Commit, rows: list[dict[str, Any]]) -> str:
    """What a person reads on the version's page."""
    result = ", ".join(f"{name} {value:.4f}" for name, value in commit.evaluation.items())
    lines = [
        f"`{commit.config['model']['name']}` trained on {commit.dataset.get('name')} for {commit.samples:,} images "
        f"(step {commit.step}), {len(commit.classes)} classes." + (f" Evaluation: {result}." if result else ""),
        "",
        f"Checkpoint `{public(commit.url)}`, SHA-256 of its commit file `{commit.digest}`; the whole recipe stands in it.",
    ]
    if rows:
        body = []
        for row in rows:
            sides = [f"{100 * row[k]:.1f}" if k in row else "" for k in ("pretrained", "scratch")]
            gain = f"{100 * row['gain']:+.1f}" if "gain" in row else ""
            body.append([row["task"], row["method"], str(row["shots"]), *sides, gain, row["verdict"]])
        lines += ["", *table(HEADER, body)]
    while len("\n".join(lines)) > DESCRIPTION_CHARACTERS:
        lines.pop()
    return "\n".join(lines)
