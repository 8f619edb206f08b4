"""A run, or a sweep, as manifests of Kubernetes: what `kubectl apply -f -` takes.

    JobSet          the store in a pod of its own, the hosts in an indexed Job; needs the JobSet controller
    Job             an indexed Job and a headless Service; the store runs alongside the first host and comes back with it
    RayJob          a sweep on a Ray cluster that lives as long as it does; needs KubeRay

A pod that saved after a signal (75) or was preempted comes back and does not count as a failure; a mistake of the user (2) ends
the job. Secrets are named, never written. Pods share no disk: everything lies in a store, or on a claim that is mounted.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestration.child_process import FILES
from orchestration.clusters.environment import is_public
from orchestration.clusters.job import Job, new_run_id
from orchestration.run.rank_end import EXIT_USER
from pipeline.errors import UserError
from pipeline.supervision.stop_signals import EXIT_REQUEUE

PORT = 29400
MARGIN_S = 30
FOLDER = "/etc/normfree"
SPOT_TAINTS = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
)
"""Of nodes that may be taken away; the values differ, so a key is enough."""
THIS_MACHINES = (*FILES, "PATH", "LD_LIBRARY_PATH", "TMPDIR", "NORMFREE_CACHE")
"""Variables that name places of this machine; an image has its own."""
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"\d+(?:\.\d+)?(?:m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_IMAGE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._/:@-]{0,511}")
MAX_NAME = 40
"""A pod's name adds to it, and may have 63 characters."""


@dataclass(frozen=True, kw_only=True)
class Options:
    image: str
    name: str
    gpus: int | None = None
    """A pod."""
    cpus: str | None = None
    memory: str | None = None
    secret: str = "normfree"
    """The Secret whose keys are the variables' names."""
    claim: str | None = None
    """CLAIM:/PATH of a PersistentVolumeClaim that all pods mount."""
    spot: bool = False

    def __post_init__(self) -> None:
        for option, value, pattern in (
            ("--job-name", self.name, _LABEL),
            ("--secret", self.secret, _LABEL),
            ("--image", self.image, _IMAGE),
            ("--cpus-per-host", self.cpus or "1", _QUANTITY),
            ("--memory", self.memory or "1", _QUANTITY),
            ("--claim", self.claim or "a:/b", re.compile(rf"{_LABEL.pattern}:/[^\x00-\x1f:]*")),
        ):
            if not pattern.fullmatch(value) or (option in ("--job-name", "--secret") and len(value) > MAX_NAME):
                raise UserError(
                    f"{option} {value[:80]!r} is nothing that Kubernetes takes there; names are a-z, 0-9 and -, "
                    f"{MAX_NAME} at most"
                )

    def check_place(self, url: str, option: str) -> None:
        """UserError for a place that pods do not share."""
        mounted = self.claim.partition(":")[2] if self.claim else None
        if "://" not in url and not (mounted and url.startswith(mounted.rstrip("/") + "/")):
            raise UserError(
                f"{option} is {url}, and pods share no disk: give a URL such as s3://bucket/runs/a, or a path "
                "on a --claim NAME:/PATH"
            )


def jobset(job: Job, options: Options, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """ConfigMap and JobSet."""
    name = options.name
    store = f"{name}-store-0-0.{name}:{PORT}"
    hosts = _pod(options, "hosts", [_agent(options, environment)], grace_s=_grace_s(job))
    keeper = _pod(options, "store", [_store(options)], grace_s=MARGIN_S, with_gpus=False)
    replicated = [
        {"name": "store", "replicas": 1, "template": {"spec": _job(keeper, 1, job)}},
        {"name": "hosts", "replicas": 1, "template": {"spec": _job(hosts, job.num_hosts, job)}},
    ]
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
        "startupPolicy": {"startupPolicyOrder": "InOrder"},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["hosts"]},
        "failurePolicy": {"maxRestarts": job.max_restarts},
        "replicatedJobs": replicated,
    }
    return [
        _document(job, name, store),
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": _metadata(name), "spec": spec},
    ]


def indexed_job(job: Job, options: Options, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """ConfigMap, headless Service, indexed Job."""
    name = options.name
    store = f"{name}-0.{name}:{PORT}"
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the hosts meet before any of them is ready
            "selector": {"app.kubernetes.io/instance": name},
            "ports": [{"name": "store", "port": PORT}],
        },
    }
    alongside = _store(options)
    serve = f"exec {' '.join(alongside['command'])}"
    alongside |= {
        "command": ["sh", "-c", f'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then {serve}; else exec sleep infinity; fi'],
        "restartPolicy": "Always",  # runs as long as the pod does
    }
    del alongside["readinessProbe"]  # of the first pod's alone it would be true
    pod = _pod(options, "hosts", [_agent(options, environment)], grace_s=_grace_s(job))
    pod["spec"] |= {"subdomain": name, "initContainers": [alongside]}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(name), "spec": _job(pod, job.num_hosts, job)}
    return [_document(job, name, store), service, body]


def ray_job(words: str, options: Options, environment: Mapping[str, str], num_workers: int) -> list[dict[str, Any]]:
    """RayJob: a head that runs no trials, workers, and the driver that types `words`."""

    def group(kind: str, **start: str) -> dict[str, Any]:
        container = {
            "name": "ray",
            "image": options.image,
            "env": _variables(options, environment),
            "resources": _resources(options, with_gpus=kind == "worker"),
            "volumeMounts": _mounts(options, document=False),
        }
        pod = _pod(options, kind, [container], grace_s=MARGIN_S, with_gpus=kind == "worker", document=False)
        del pod["spec"]["restartPolicy"]  # KubeRay's own
        return {"rayStartParams": start, "template": pod}

    worker = {
        "groupName": "workers",
        "replicas": num_workers,
        "minReplicas": 0,
        "maxReplicas": num_workers,
        **group("worker"),
    }
    cluster = {"headGroupSpec": group("head", **{"num-cpus": "0", "num-gpus": "0"}), "workerGroupSpecs": [worker]}
    spec = {"entrypoint": words, "shutdownAfterJobFinishes": True, "backoffLimit": 3, "rayClusterSpec": cluster}
    return [{"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(options.name), "spec": spec}]


def text(manifests: list[dict[str, Any]], options: Options, environment: Mapping[str, str]) -> str:
    """YAML of several documents, after a comment on the Secret that they expect."""
    import yaml

    hidden = [name for name, value in environment.items() if not is_public(name, value)]
    head = f"# The Secret {options.secret} has the keys {', '.join(hidden)}: "
    head += f"kubectl create secret generic {options.secret} --from-env-file=FILE\n"
    return (head if hidden else "") + yaml.safe_dump_all(manifests, sort_keys=False, width=120)


def _metadata(name: str) -> dict[str, Any]:
    return {"name": name, "labels": _labels(name)}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "normfree", "app.kubernetes.io/instance": name}


def _grace_s(job: Job) -> int:
    return int(job.run.watchdog.grace_s) + MARGIN_S


def _document(job: Job, name: str, store: str) -> dict[str, Any]:
    data = {"job.json": json.dumps(job.document(run_id=new_run_id(), store=store, host_name=""), indent=1)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(name), "data": data}


def _job(pod: dict[str, Any], num_pods: int, job: Job) -> dict[str, Any]:
    name = pod["spec"]["containers"][0]["name"]

    def rule(action: str, code: int) -> dict[str, Any]:
        return {"action": action, "onExitCodes": {"containerName": name, "operator": "In", "values": [code]}}

    rules = [
        rule("FailJob", EXIT_USER),
        rule("Ignore", EXIT_REQUEUE),
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "completions": num_pods,
        "parallelism": num_pods,
        "completionMode": "Indexed",
        "backoffLimitPerIndex": job.max_restarts,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }


def _pod(
    options: Options,
    role: str,
    containers: list[dict[str, Any]],
    *,
    grace_s: int,
    with_gpus: bool = True,
    document: bool = True,
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
    if document:
        volumes.append({"name": "job", "configMap": {"name": options.name}})
    if options.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": options.claim.partition(":")[0]}})
    tolerations = [{"key": key, "operator": "Exists"} for key in (SPOT_TAINTS if options.spot and with_gpus else ())]
    if options.gpus and with_gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists"})
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "containers": containers,
        "volumes": volumes,
    }
    if tolerations:
        spec["tolerations"] = tolerations
    return {"metadata": {"labels": {**_labels(options.name), "app.kubernetes.io/component": role}}, "spec": spec}


def _agent(options: Options, environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": "agent",
        "image": options.image,
        "command": ["python", "-P", "-m", "orchestration.launch.agent", f"{FOLDER}/job.json"],
        "env": _variables(options, environment),
        "resources": _resources(options),
        "volumeMounts": _mounts(options),
    }


def _store(options: Options) -> dict[str, Any]:
    return {
        "name": "store",
        "image": options.image,
        "command": ["python", "-P", "-m", "orchestration.launch.store", "0.0.0.0", str(PORT)],
        "ports": [{"name": "store", "containerPort": PORT}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 2},
        "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}},
    }


def _variables(options: Options, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Plain ones by value; what may be a secret by the Secret that holds it."""
    own = {name: value for name, value in environment.items() if value and name not in THIS_MACHINES}
    return [
        {"name": name, "value": value}
        if is_public(name, value)
        else {"name": name, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": name}}}
        for name, value in own.items()
    ]


def _resources(options: Options, *, with_gpus: bool = True) -> dict[str, Any]:
    requests = {name: value for name, value in (("cpu", options.cpus), ("memory", options.memory)) if value}
    found: dict[str, Any] = {"requests": requests} if requests else {}
    if options.gpus and with_gpus:
        found["limits"] = {"nvidia.com/gpu": str(options.gpus)}
    return found


def _mounts(options: Options, *, document: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": "memory", "mountPath": "/dev/shm"}]
    if document:
        found.append({"name": "job", "mountPath": FOLDER, "readOnly": True})
    if options.claim:
        found.append({"name": "claim", "mountPath": options.claim.partition(":")[2]})
    return found
