"""What a registered version says of its checkpoint: its tags, the scorecard of a sweep, and the text of its page."""

import json
from typing import Any

from orchestration.tracking import lineage
from orchestration.tracking.sweep_summary import fitting, scorecard_table
from pipeline.checkpoint.commit import Commit
from pipeline.display import markdown, markdown_code
from pipeline.errors import UserError
from pipeline.secrets import public
from transfer.results.scorecard import Row, scorecard

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


def scorecard_rows(sweep: str, commit: Commit) -> list[Row]:
    """The scorecard of a sweep; UserError if that is about other weights."""
    from transfer.results.sweep_results import load_entries
    from transfer.sweep.ledger import Ledger

    theirs = Ledger(sweep).info().checkpoint_digest
    if theirs != commit.digest:
        raise UserError(
            f"the sweep {sweep} is about another checkpoint (digest {theirs[:12]}) than {commit.url} ({commit.digest[:12]}); "
            "give the sweep of this one, or omit --scorecard"
        )
    return scorecard(load_entries(sweep))


def rows_tag(rows: list[Row]) -> str:
    """The scorecard as JSON, a tag of the version."""
    found = []
    for row in rows:
        values = {"pretrained": row.pretrained, "scratch": row.scratch, "gain": row.gain}
        numbers = {k: round(v.mean, 6) for k, v in values.items() if v is not None}
        found.append({"task": row.task, "method": row.method, "shots": row.shots, **numbers, "verdict": row.verdict})
    return json.dumps(found)


def origin_tags(run: Any, commit: Commit) -> dict[str, str]:
    """What the MLflow run that saved this checkpoint says of the code, and which sweeps it knows of."""
    if run is None:
        return {}
    names = ("code.revision", "code.dirty", "run_dir")
    found = {name: public(run.data.tags[name]) for name in names if run.data.tags.get(name)}
    return {"run_id": run.info.run_id, **found, **lineage.sweeps_of(run, commit.digest)}


def description(commit: Commit, rows: list[Row]) -> str:
    """What a person reads on the version's page, in Markdown."""
    result = ", ".join(f"{markdown(name)} {value:.4f}" for name, value in commit.evaluation.items())
    lines = [
        f"{markdown_code(commit.config['model']['name'])} trained on {markdown(commit.dataset.get('name'))} for "
        f"{commit.samples:,} images (step {commit.step}), {len(commit.classes)} classes."
        + (f" Evaluation: {result}." if result else ""),
        "",
        f"Checkpoint {markdown_code(public(commit.url))}, SHA-256 of its commit file `{commit.digest}`; the whole recipe stands "
        "in it.",
    ]
    if rows:
        lines += ["", *scorecard_table(rows)]
    return fitting(lines, DESCRIPTION_CHARACTERS, lambda num: f"{num} more lines are in the report of the sweep.")
