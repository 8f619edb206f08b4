"""Records of a run in MLflow's terms: points, parameters, tags, and how the run ended. Pure; imports no MLflow.

What is derived here is derived from the spool's lines alone, in order, so that an uploader which starts again folds
over the lines that are already uploaded and stands where the one before it stood.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from orchestration.tracking.upload import DatasetUsed, Ending, Upload, points_of, shorten, source_tags, value_at
from pipeline.secrets import public

STEP_KEYS = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "clipped_share": "train/clipped_share",
    "gradient_norm": "train/gradient_norm",
    "epoch": "train/epoch",
    "samples": "train/samples",
    "images_per_s": "speed/images_per_s",
    "flops_share": "speed/share_of_matrix_rate",
    "data_wait_s": "speed/data_wait_s",
    "step_s": "speed/step_s",
    "transfer_s": "speed/transfer_s",
    "compute_s": "speed/compute_s",
    "save_s": "speed/save_s",
    "log_s": "speed/log_s",
    "evaluate_s": "speed/evaluate_s",
    "other_s": "speed/other_s",
    "wall_s": "speed/wall_s",
}
PART_KEYS = {
    "clipped_share": "agc/clipped_share",
    "gradient_norm": "gradient_norm",
    "weight_norm": "weight_norm",
    "update_ratio": "update_ratio",
}
"""Of numbers of a part of the network: "update_ratio/stage 2"."""
STARTED_PARAMS = (
    "config_digest",
    "dataset_digest",
    "total_steps",
    "total_samples",
    "global_batch",
    "num_parameters",
    "precision",
)
FACTS = ("code.", "environment.")
"""What an attempt's first line says about where it runs (`pipeline.provenance`); the newest attempt's stand."""
TRACE = re.compile(r"steps-[0-9]+-[0-9]+\.json\.gz")
"""A name that a record may give: what it says of a folder is not followed."""
CHECKPOINT_DIGITS = 16
"""Of a checkpoint's digest in the tag `checkpoint.digests`: enough to find a run by what came of it."""
CONFIG_PARAMS = (
    "seed",
    "duration",
    "model.name",
    "optim.learning_rate",
    "optim.weight_decay",
    "data.url",
    "engine.compile",
    "engine.cuda_graphs",
)


class Translator:
    """Folds over a spool's lines.

    A step that an earlier attempt has logged and that a later one, resumed from an older checkpoint, does again is
    logged once: the first report of it stays, because MLflow cannot take points back.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.ending: Ending | None = None
        self._highest: dict[str, int] = {}
        self._floor: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self._num_skipped = 0
        self._num_rollbacks = 0
        self._num_passed_over = 0
        self._num_lost = 0
        self._checkpoints: list[str] = []
        self.begin_ms: int | None = None
        """Of the first line, and of the last: a spool that is sent later is a run of its own time."""
        self.end_ms: int | None = None
        self.num_odd = 0
        """Lines that lack what their kind should have."""
        self._readers: dict[str, Callable[[dict[str, Any]], Upload]] = {
            "Attempt": self._attempt,
            "Started": self._started,
            "Step": self._step,
            "Evaluation": self._evaluation,
            "Skipped": self._skipped,
            "RolledBack": self._rolled_back,
            "PassedOver": self._passed_over,
            "Lost": self._lost,
            "Accounted": self._accounted,
            "Changed": self._changed,
            "Deviation": self._deviation,
            "Notice": self._notice,
            "Saved": self._saved,
            "Profiled": self._profiled,
            "SaveFailed": self._save_missed,
            "SaveSkipped": self._save_missed,
            "Finished": self._finished,
            "Stopped": self._stopped,
            "Failed": self._failed,
            "System": self._system,
        }

    def translate(self, record: dict[str, Any]) -> Upload:
        """What one line means. Unknown kinds mean nothing: an older uploader may read a newer spool."""
        try:
            read = self._readers.get(record["kind"])
            upload = read(record) if read else Upload()
            if "time_s" in record:
                self._mark_time(round(record["time_s"] * 1000))
            upload.tags = {key: shorten(public(value)) for key, value in upload.tags.items()}
        except Exception:  # one odd line, of whatever oddity, must not hold up all those behind it
            upload = Upload()
            self.num_odd += 1
        upload.points = [p for p in upload.points if p.step > self._floor.get(p.key, -1)]
        for point in upload.points:
            self._highest[point.key] = max(point.step, self._highest.get(point.key, -1))
        return upload

    def _mark_time(self, time_ms: int) -> None:
        self.begin_ms = min(time_ms, self.begin_ms or time_ms)
        self.end_ms = max(time_ms, self.end_ms or time_ms)

    def _attempt(self, record: dict[str, Any]) -> Upload:
        self.attempt, self.ending = int(record["attempt"]), None
        self._floor = dict(self._highest)
        when = datetime.fromtimestamp(record["time_s"], UTC).isoformat(timespec="seconds")
        who = f"{when} on {record.get('host')}, process {record.get('pid')}"
        facts = {k: str(v) for k, v in record.items() if k.startswith(FACTS) and v is not None}
        return Upload(
            tags={"attempt": str(self.attempt), f"attempt.{self.attempt}": who, **facts, **source_tags(facts)}
        )

    def _started(self, record: dict[str, Any]) -> Upload:
        config = record.get("config") or {}
        params = {name: public(str(record[name])) for name in STARTED_PARAMS if name in record}
        params |= {name: public(str(v)) for name in CONFIG_PARAMS if (v := value_at(config, name)) is not None}
        # Parameters are write-once (hazard M5): what a later attempt does differently becomes a tag of that attempt.
        changed = [f"{k} {self._params[k]} -> {v}" for k, v in params.items() if self._params.get(k, v) != v]
        new = {k: shorten(v) for k, v in params.items() if k not in self._params}
        is_new_config = not self._params or bool(changed)
        self._params = {**params, **self._params}
        source = record.get("resumed_from") or "its initial weights"
        tags = {
            "run_dir": str(record.get("run_dir", "")),
            "data.plan": "; ".join(record.get("data_plan") or ()),
            f"attempt.{self.attempt}.start": f"step {record['step']} from {source}",
            f"attempt.{self.attempt}.layout": (
                f"{record.get('num_ranks')} x {record.get('device')}, micro-batch {record.get('micro_batch')}, "
                f"accumulation {record.get('accumulation')}, ZeRO stage {record.get('zero_stage')}, "
                f"passes {record.get('passes', 'eager')}"
            ),
        }
        if changed:
            tags[f"attempt.{self.attempt}.changed"] = "; ".join(changed)
        upload = Upload(params=new, tags=tags, config=config if is_new_config else None)
        url = value_at(config, "data.url")
        if url and record.get("dataset_digest"):
            name = str(url).rstrip("/").rsplit("/", 1)[-1]
            upload.datasets = [DatasetUsed(name, str(record["dataset_digest"]), public(str(url)), "training")]
        return upload

    def _step(self, record: dict[str, Any]) -> Upload:
        values = {key: record[name] for name, key in STEP_KEYS.items() if name in record}
        for part, numbers in record.get("parts", {}).items():
            part = re.sub(r"[^\w. -]", "_", str(part))
            values |= {f"{key}/{part}": numbers[name] for name, key in PART_KEYS.items() if name in numbers}
        return Upload(points=points_of(record, values))

    def _evaluation(self, record: dict[str, Any]) -> Upload:
        group = "eval/" + re.sub(r"[^\w.-]", "_", f"{record['split']}_{record['weights']}")
        values = {f"{group}/{name}": record[name] for name in ("loss", "top1", "top5", "seconds_s")}
        return Upload(points=points_of(record, values), tags={f"{group}/num_samples": str(record["num_samples"])})

    def _skipped(self, record: dict[str, Any]) -> Upload:
        self._num_skipped += 1
        return Upload(
            points=points_of(record, {"train/skipped_updates": float(self._num_skipped)}),
            tags={"skipped_updates": str(self._num_skipped), "skipped_updates.last": str(record["reason"])},
        )

    def _rolled_back(self, record: dict[str, Any]) -> Upload:
        self._num_rollbacks += 1
        text = f"from step {record['from_step']} to {record['checkpoint']}: {record['reason']}"
        return Upload(
            points=points_of({**record, "step": record["from_step"]}, {"train/rollbacks": float(self._num_rollbacks)}),
            tags={f"rollback.{self._num_rollbacks}": text},
        )

    def _passed_over(self, record: dict[str, Any]) -> Upload:
        self._num_passed_over += 1
        return Upload(tags={f"passed_over.{self._num_passed_over}": f"{record['url']}: {record['reason']}"})

    def _lost(self, record: dict[str, Any]) -> Upload:
        self._num_lost += len(record["samples"])
        last = record["samples"][-1]
        return Upload(
            points=points_of(record, {"data/lost_samples": float(self._num_lost)}),
            tags={"data.lost.last": f"{last['key']} of {last['shard']}: {last['reason']}"},
        )

    def _accounted(self, record: dict[str, Any]) -> Upload:
        names = ("manifest", "used", "skipped", "dropped", "excluded", "repeated")
        text = ", ".join(f"{name} {record[name]}" for name in names)
        source = re.sub(r"[^\w./ -]", "_", str(record["source"]))
        return Upload(tags={f"data.account.{source}": text} if record["epoch"] is None else {})

    def _changed(self, record: dict[str, Any]) -> Upload:
        return Upload(tags={f"attempt.{self.attempt}.{record['what']}": str(record["text"])})

    def _deviation(self, record: dict[str, Any]) -> Upload:
        what = re.sub(r"[^\w -]", "_", str(record["what"]))
        return Upload(tags={f"attempt.{self.attempt}.deviation.{what}": f"step {record['step']}: {record['text']}"})

    def _notice(self, record: dict[str, Any]) -> Upload:
        return Upload(tags={"notice.last": str(record["text"])})

    def _profiled(self, record: dict[str, Any]) -> Upload:
        name = str(record["url"]).rpartition("/")[2]
        shares = ", ".join(f"{row['name']} {row['host_share']:.1%}" for row in record["phases"])
        text = f"steps {record['first']} to {record['last']}, {record['step_ms']:.4g} ms each: {shares}"
        return Upload(tags={"profile.last": text}, traces=[name] if TRACE.fullmatch(name) else [])

    def _saved(self, record: dict[str, Any]) -> Upload:
        names = ("seconds_s", "size_bytes", "stalled_s", "waited_s")
        values = {f"checkpoint/{n}": record[n] for n in names if n in record}
        self._checkpoints = [*self._checkpoints, record["digest"][:CHECKPOINT_DIGITS]][-200:]
        tags = {"checkpoint.url": record["url"], "checkpoint.digest": record["digest"]}
        tags["checkpoint.digests"] = " ".join(self._checkpoints)  # any of them may have gone into a sweep
        return Upload(points=points_of(record, values), tags={**tags, "checkpoint.step": str(record["step"])})

    def _save_missed(self, record: dict[str, Any]) -> Upload:
        reason = f"step {record['step']}: {record['reason']}"
        return Upload(
            points=points_of(record, {"checkpoint/num_missed": record["num_missed"]}),
            tags={"checkpoint.last_missed": reason},
        )

    def _finished(self, record: dict[str, Any]) -> Upload:
        self.ending = Ending("FINISHED", "all steps are done")
        final = {f"final/{name}": value for name, value in record.get("evaluation", {}).items()}
        final["final/seconds_s"] = record["seconds_s"]
        return Upload(points=points_of(record, final), tags={"final.checkpoint": str(record.get("checkpoint"))})

    def _stopped(self, record: dict[str, Any]) -> Upload:
        # Not FINISHED, for steps are missing; not FAILED, for nothing went wrong: somebody ended it.
        self.ending = Ending("KILLED", f"asked to stop ({record['reason']}); the same command resumes it")
        return Upload(tags={"stopped.checkpoint": str(record.get("checkpoint"))})

    def _failed(self, record: dict[str, Any]) -> Upload:
        self.ending = Ending("FAILED", public(str(record["error"])))
        return Upload()

    def _system(self, record: dict[str, Any]) -> Upload:
        node = re.sub(r"[^\w.-]", "_", str(record["node"]))
        return Upload(points=points_of(record, {f"system/{node}/{k}": v for k, v in record["values"].items()}))
