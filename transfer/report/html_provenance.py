"""The end of the report's page: sources with their digests, data down to shards, sweeps with their commands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline.data.format.manifest import Manifest
from transfer.report.html_elements import anchor, esc, fold, is_said, plural, public, settings, table, table_row
from transfer.results.scorecard import Row
from transfer.results.sweep_results import Findings, Folder

MAX_SHARDS = 200


def origin(findings: Findings, rows: Sequence[Row]) -> str:
    shared = ""
    if findings.num_shared:
        shared = (
            f"<p class=note>{plural(findings.num_shared, 'cell')} were in several of these sweeps; each is shown once, from the "
            "sweep with most of its seeds, the first of equals.</p>"
        )
    protocols = "<br>".join(f"<code>{esc(d)}</code>" for d in sorted({row.protocol_digest for row in rows}))
    return (
        "<h2>Where this comes from</h2>"
        f"{_sources(findings)}{_data(findings)}{''.join(map(_sweep, findings.folders))}{shared}"
        f"<dl><dt>protocols</dt><dd>{protocols}</dd></dl>"
    )


def _sources(findings: Findings) -> str:
    seen: dict[str, tuple[str, str, str]] = {}
    for cell in findings.finals:
        digest = cell.checkpoint_digest or cell.backbone_digest
        name = cell.backbone or cell.model or str(findings.home[cell.digest].sweep.get("model") or "")
        url = cell.checkpoint_url if cell.init == "pretrained" else "fresh weights, a function of the seed"
        if digest:
            seen.setdefault(digest, (name, cell.model, url))
    body = "".join(
        f'<tr id="{anchor("source", digest)}"><td class=t>{esc(name)}</td><td>{esc(model)}</td>'
        f"<td><code>{esc(public(url))}</code></td><td><code>{esc(digest)}</code></td></tr>\n"
        for digest, (name, model, url) in sorted(seen.items(), key=lambda item: item[1])
    )
    return (
        "<h3 class=sub>Sources</h3>" + table(["name", "model", "checkpoint", "digest"], body, numbers=set())
        if body
        else ""
    )


def _data(findings: Findings) -> str:
    out = ""
    for digest, cell in sorted({c.data_digest: c for c in findings.finals}.items(), key=lambda item: item[1].task):
        data = findings.datasets[cell.task]
        said = f"<p class=note>{esc(public(data))}</p>" if isinstance(data, str) else _shards(data)
        summary = f"{esc(cell.task_title)} <code>{esc(digest)}</code>"
        out += fold(summary, said, name=anchor("data", digest))
    return f"<h3 class=sub>Data</h3>{out}"


def _shards(data: Manifest) -> str:
    shards = [(name, shard) for name, split in data.splits.items() for shard in split.shards]
    body = "".join(
        table_row(
            [
                esc(name),
                f"<code>{esc(shard.name)}</code>",
                f"{shard.size_bytes:,}",
                f"<code>{esc(shard.sha256)}</code>",
            ],
            numbers={2},
        )
        for name, shard in shards[:MAX_SHARDS]
    )
    rest = len(shards) - MAX_SHARDS
    more = f"<p class=note>{plural(rest, 'shard')} more in its manifest.</p>" if rest > 0 else ""
    head = ["split", "shard", "bytes", "SHA-256"]
    return f"<p><code>{esc(public(data.url))}</code></p>{table(head, body, numbers={2})}{more}"


def _sweep(folder: Folder) -> str:
    sweep = folder.sweep
    started = sweep.get("started_s")
    when = datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%d %H:%M UTC") if started else None
    num_opened = sum(map(len, folder.openings.values()))
    items = [
        ("folder", f"<code>{esc(public(folder.url))}</code>"),
        ("suite", esc(sweep.get("suite"))),
        ("model", esc(sweep.get("model"))),
        ("checkpoint", f"<code>{esc(public(sweep.get('checkpoint_url')))}</code>"),
        ("its digest", f"<code>{esc(sweep.get('checkpoint_digest'))}</code>"),
        ("scheduler", esc(sweep.get("scheduler"))),
        ("started", esc(when)),
        ("hardware", esc(settings(sweep.get("hardware")))),
        ("code", f"<code>{esc(sweep.get('code_revision'))}</code>"),
        (
            "records",
            esc(
                f"{plural(len(folder.selections), 'selection record')}, {plural(num_opened, 'opening')} of test splits"
            ),
        ),
        ("command", f"<pre>{esc(public(sweep.get('command')))}</pre>"),
    ]
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in items if is_said(value))
    return f'<h3 class=sub id="{anchor("sweep", folder.url)}">Sweep</h3><dl>{listed}</dl>'
