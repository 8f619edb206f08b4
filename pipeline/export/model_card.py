"""The model card of an export: what the run's own record says, and by name what it does not say. Nothing is made up."""

import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from nfnet.model import NFNet
from pipeline import documents
from pipeline.checkpoint.commit import Commit
from pipeline.display import markdown
from pipeline.display import markdown_code as code
from pipeline.errors import UserError
from pipeline.export.card_facts import CardFacts, model_index, results_table
from pipeline.models.evaluation_options import activation_of
from pipeline.storage import objects

_LIBRARIES = {"timm": "timm", "onnx": "onnx", "mlflow": "mlflow", "safetensors": "normfree"}
_SHOWN_CLASSES = 50
NO_FACTS = CardFacts()

_USE = {
    "safetensors": """With normfree (`normfree classify DIR photo.jpg`, or `DIR` wherever a checkpoint is asked for):

```python
from pipeline.models.classify import classify

for prediction in classify("DIR", ["photo.jpg"]):
    print(prediction.ranked)
```

Without it, `export.json` names the network, its options, the classes in order and the preprocessing; the tensors in
`model.safetensors` have the names of `nfnet.create_model(name, num_classes, **options)`, which `nfnet.load_model` builds; of a
network timm:NAME those of timm's, after `trunk.`, and of the classifier `head`.""",
    "timm": """```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`config.json` has the class names (`label_names`) in order.""",
    "onnx": """`model.onnx` takes `images`, float32 (N, 3, px, px) after the preprocessing below, and gives `logits` (N, classes).
Its metadata has `classes` and `preprocessing` as JSON:

```python
import json, onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
(logits,) = session.run(["logits"], {"images": images})
```""",
    "mlflow": """The model takes image files (bytes; base64 in JSON) in a column `image` and gives the class, its probability, and
the best `top` classes:

```
mlflow models predict --model-uri DIR --env-manager local --input-path DIR/serving_input_example.json
```

It holds no pickle: code as text, the network as ONNX.""",
}


def model_card(model: nn.Module, commit: Commit, description: dict[str, Any], facts: CardFacts = NO_FACTS) -> str:
    """README.md of an export, in Markdown. `description` is what `export.json` says, without files."""
    run = commit.config
    parts = [
        _head(model, commit, description, facts),
        _title(model, commit, description),
        f"## Use\n\n{_USE[description['kind']]}",
        _average(description.get("average")),
        _preprocessing(description["preprocessing"], run),
        _data(commit, run),
        _recipe(commit, run),
        _results(commit, description),
        results_table(facts),
        _limits(run),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(model: nn.Module, commit: Commit, description: dict[str, Any], facts: CardFacts) -> str:
    """What model hubs read. A licence only where one was given: the run does not record one."""
    import yaml

    data = commit.config["data"]
    evaluated = "ema" if commit.config["optim"].get("ema_decay") is not None else "raw"
    own = commit.evaluation if description["weights"] == evaluated else {}  # else they are numbers of other weights
    dataset, split = str(commit.dataset.get("name", "(not recorded)")), str(data.get("eval_split"))
    head = {
        "library_name": _LIBRARIES[description["kind"]],
        "pipeline_tag": "image-classification",
        "tags": ["normaliser-free", "nfnet"] if isinstance(model, NFNet) else [],
        "license": facts.license,
        "model-index": model_index(str(commit.config["name"]), facts, dataset, split, own),
    }
    text = yaml.safe_dump({k: v for k, v in head.items() if v}, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{text}---"


def _title(model: nn.Module, commit: Commit, description: dict[str, Any]) -> str:
    decay = commit.config["optim"].get("ema_decay")
    averaged = (
        f"averaged weights (exponential moving average, decay {markdown(decay)})"
        if decay is not None
        else "averaged weights"
    )
    which = averaged if description["weights"] == "ema" else "raw weights (not averaged)"
    what = "a network without normalisation layers" if isinstance(model, NFNet) else "a trunk and a linear head"
    check = description["check"]
    agrees = (
        "the same numbers as the checkpoint's; logits on a fixed batch are equal"
        if check["difference"] == 0
        else f"logits on a fixed batch differ from the checkpoint's by {check['difference']:.1e} of the largest "
        f"(allowed: {check['tolerance']:g})"
    )
    origin = f"a checkpoint whose commit file has SHA-256 {code(commit.digest)}: {agrees}"
    if "average" in description:
        origin = f"an average of checkpoints (below): {agrees.replace('the checkpoint', 'the average')}"
    return (
        f"# {markdown(commit.config['name'])}\n\n"
        f"{code(commit.config['model']['name'])}, {what}, for {len(commit.classes):,} classes: "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {which}, after {commit.step:,} steps "
        f"({commit.samples:,} images seen, repetitions counted).{_binary(commit)}\n\n"
        f"Exported to {description['kind']} from {origin}. "
        "`export.json` lists every file with its SHA-256."
    )


def _binary(commit: Commit) -> str:
    if activation_of(commit.config) == "softmax":
        return ""
    return " Each class was trained by itself: its probability is the sigmoid of its logit, and probabilities do not add up to 1."


def _average(found: dict[str, Any] | None) -> str:
    """Of what it is the average, with what each was measured at; "" of a checkpoint."""
    if found is None:
        return ""
    rows = [
        f"| {code(one['url'])} | {code(one['digest'][:12])} | {one['share']:.4g} | {_share(one['top1'])} |"
        for one in found["members"]
    ]
    lines = [
        f"Method: {markdown(found['method'])}.",
        "",
        "| checkpoint | digest | share | top-1 |",
        "|---|---|---|---|",
        *rows,
    ]
    if found["curve"]:
        lines += ["", "| share of the second | top-1 | cross-entropy |", "|---|---|---|"]
        lines += [f"| {one['alpha']:.2f} | {one['top1']:.2%} | {one['loss']:.4f} |" for one in found["curve"]]
    if data := found["data"]:
        of_it = "" if found["top1"] is None else f" The average has {found['top1']:.2%} there."
        lines += [
            "",
            f"Measured, and where there was a choice chosen, on the split {code(data['split'])} of {code(data['name'])} "
            f"(digest {code(data['digest'][:12])}), never on a test split.{of_it}",
        ]
    return "## Average\n\n" + "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _preprocessing(found: dict[str, Any], run: dict[str, Any]) -> str:
    whole = found["resize"] == "square" and found["resize_px"] == found["px"]
    crop = "" if whole else f"; the centre of {found['px']} x {found['px']}"
    profiles = "converted to it" if run["data"].get("convert_icc", True) else "ignored"
    return (
        f"## Preprocessing\n\nUpright RGB (sRGB; embedded ICC profiles are {profiles}); "
        f"resize to {_resized(found)} ({markdown(found['interpolation'])}){crop}; then "
        f"(value / 255 - mean) / std with mean {_numbers(found['mean'])} and std {_numbers(found['std'])}."
    )


def _resized(found: dict[str, Any]) -> str:
    side = found["resize_px"]
    return f"{side} x {side}" if found["resize"] == "square" else f"a shorter side of {side}"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _data(commit: Commit, run: dict[str, Any]) -> str:
    dataset, data = commit.dataset, run["data"]
    shown = ", ".join(map(code, commit.classes[:_SHOWN_CLASSES]))
    more = f" ... and {len(commit.classes) - _SHOWN_CLASSES:,} more" if len(commit.classes) > _SHOWN_CLASSES else ""
    lines = [
        f"Trained on the split {code(data.get('train_split', 'train'))} of "
        f"{code(dataset.get('name', '(not recorded)'))}, whose manifest has the digest "
        f"{code(dataset.get('digest', '(not recorded)'))}.",
        f"Classes, in the order of the logits: {shown}{more}.",
    ]
    if data.get("mixture"):
        lines.append("Mixed with other sources, see `data.mixture` below.")
    if data.get("subset"):
        lines.append(f"Of each class only a part was used: {code(json.dumps(data['subset']))}.")
    if lost := _losses(commit):
        lines.append(lost)
    lines.append("Licence, origin and content of the images are not part of the record.")
    return "## Data\n\n" + "\n\n".join(lines)


@dataclass(frozen=True)
class _Page:
    skipped: int
    """Samples, in each of the epochs."""
    epochs: tuple[int, int]
    """First and last."""


@dataclass(frozen=True)
class _Ledger:
    """What the card needs of a run's ledger.json (`pipeline.data.loading.sample_ledger`)."""

    step: int
    pages: list[_Page]


def _losses(commit: Commit) -> str:
    """What the run's ledger says; "" where there is none to be found."""
    run_dir = commit.url.rsplit("/checkpoints/", 1)[0]
    try:
        ledger = documents.read(objects.join(run_dir, "ledger.json"), _Ledger)
    except (OSError, UserError):
        return ""
    skipped = sum(page.skipped * (page.epochs[1] - page.epochs[0] + 1) for page in ledger.pages)
    return f"Samples that the run could not use, by its ledger of step {ledger.step:,}: {skipped:,}."


def _recipe(commit: Commit, run: dict[str, Any]) -> str:
    import yaml

    init = run["model"].get("init_from")
    start = (
        f"the weights of {code(init)}" if init else f"fresh weights (seed {markdown(run.get('seed', 'not recorded'))})"
    )
    return (
        f"## Recipe\n\nFrom {start}; configuration with SHA-256 {code(commit.config_digest)}:\n\n"
        f"{code(yaml.safe_dump(run, sort_keys=False).rstrip(), language='yaml')}"
    )


def _results(commit: Commit, description: dict[str, Any]) -> str:
    numbers, data = commit.evaluation, commit.config["data"]
    if not numbers:
        return "## Results\n\nNo evaluation was recorded with this checkpoint: its accuracy is not known."
    evaluated = "averaged" if commit.config["optim"].get("ema_decay") is not None else "raw"
    exported = "averaged" if description["weights"] == "ema" else "raw"
    rows = "".join(
        f"| {name} | {numbers[key]:.2%} |\n" for key, name in (("top1", "top-1"), ("top5", "top-5")) if key in numbers
    )
    rows += f"| cross-entropy | {numbers['loss']:.4f} |\n" if "loss" in numbers else ""
    text = (
        f"## Results\n\nLast evaluation before the checkpoint was written, on the split {code(data.get('eval_split'))} of the "
        f"same dataset, with the {evaluated} weights:\n\n| | |\n|---|---|\n{rows}\n"
        "One run with one seed; no interval is known."
    )
    if evaluated != exported:
        text += f" **The weights here are the {exported} ones, which these numbers are not of.**"
    return text


def _limits(run: dict[str, Any]) -> str:
    px = run["augment"].get("eval_px") or run["augment"]["image_px"]
    return (
        "## Limits\n\n"
        "- It always answers with one of its classes, also for images of something else.\n"
        f"- It saw images at {markdown(run['augment']['image_px'])} px and was evaluated at {markdown(px)} px; "
        "other sizes were not measured.\n"
        "- Not measured, and so not known: calibration of the probabilities, robustness, behaviour on other sources of images, "
        "differences between groups of people or places, overlap of the evaluation split with other data."
    )
