"""`normfree inspect`: a network in numbers and its signal propagation, ours or one of timm's to compare with."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.commands.output import doing
from orchestration.commands.parser import add, number
from pipeline.display import terminal
from pipeline.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from nfnet.analysis.signal_propagation import SignalPropagation

TIMM_PREFIX = "timm:"


def inspect_commands(commands: Any) -> None:
    p = add(
        commands,
        "inspect",
        inspect,
        "a network in numbers: stages, parameters, multiply-adds, activation memory; its signal propagation as a plot",
        [
            "normfree inspect nfnet_f4_plus",
            "normfree inspect nfnet_tiny --px 64 --batch 32 --json",
            "normfree inspect nf_resnet50 --signal signal.png",
            "normfree inspect timm:resnetv2_50 --signal peer.png",
        ],
    )
    p.add_argument("model", metavar="MODEL", help="one of ours, or timm:NAME to compare with")
    p.add_argument("--px", type=int, help="count multiply-adds at this size too, and measure signals at it")
    p.add_argument(
        "--batch",
        type=number(int, 1),
        default=8,
        metavar="N",
        help="images, for activation memory and signals (default %(default)s)",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--signal", metavar="FILE", help="draw signal propagation, measured and predicted: .png, .svg or .pdf"
    )
    p.add_argument(
        "--seed", type=number(int, 0), default=0, help="of weights and noise for --signal (default %(default)s)"
    )
    p.add_argument(
        "--skip-init",
        type=float,
        default=1.0,
        metavar="X",
        help="gain of the residual branches for --signal (default %(default)s)",
    )
    p.add_argument("--device", metavar="DEVICE", help="for --signal; default: a GPU where there is one")


@doing("inspecting")
def inspect(args: argparse.Namespace) -> int:
    """Print the summary; with --signal draw the plot too; with --json print one JSON object instead."""
    import torch

    import nfnet

    _check(args)
    with torch.device("meta"):
        skeleton, sizes = _network(args.model)
    if args.px:
        sizes["asked"] = args.px
    try:
        summary = nfnet.summarise(skeleton, args.model, sizes, batch=args.batch)
    except ValueError as error:
        raise UserError(str(error)) from None
    report: dict[str, Any] = summary.to_dict()
    lines = summary.lines()
    if args.signal:
        report["signal"] = _signal(args, args.px or sizes["train"])
        lines.append(f"made {args.signal}")
    print(json.dumps(report, indent=2) if args.json else "\n".join(map(terminal, lines)))
    return 0


def _check(args: argparse.Namespace) -> None:
    from orchestration.figures.signal_figure import FORMATS

    if args.px is not None and args.px < 1:
        raise UserError(f"--px is {args.px}; set it to 1 or more")
    if args.signal and Path(args.signal).suffix.lower() not in FORMATS:
        raise UserError(f"--signal is {args.signal!r}; end the file's name in {', '.join(FORMATS)}")
    if not math.isfinite(args.skip_init):
        raise UserError(f"--skip-init is {args.skip_init}; set a finite gain, 1 to see the branches")


def _network(name: str) -> tuple[nn.Module, dict[str, int]]:
    """The network with 1000 classes on the current default device, and its own resolutions."""
    if not name.startswith(TIMM_PREFIX):
        import nfnet
        from nfnet.variants import get_variant

        try:
            variant = get_variant(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        return nfnet.create_model(name), {"train": variant.train_px, "test": variant.test_px}
    try:
        import timm
    except ImportError:
        raise UserError(f"{name} needs timm, which is not installed; pip install timm") from None
    model_name = name.removeprefix(TIMM_PREFIX)
    known = timm.list_models()
    if model_name not in known:
        near = difflib.get_close_matches(model_name, known, n=3, cutoff=0.4)
        raise UserError(f"timm has no model {model_name!r}; the nearest names are {', '.join(near) or 'none'}")
    model = timm.create_model(model_name)
    config = model.default_cfg
    train = config["input_size"][-1]
    return model, {"train": train, "test": (config.get("test_input_size") or config["input_size"])[-1]}


def _signal(args: argparse.Namespace, px: int) -> dict[str, Any]:
    """Measure, predict and draw; what was drawn, as numbers."""
    import torch

    import nfnet
    from nfnet.analysis.signal_propagation import open_branches
    from nfnet.analysis.signal_theory import predict, predict_on_noise
    from orchestration.figures.signal_figure import draw_signal

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device is {args.device!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    torch.manual_seed(args.seed)
    model, _ = _network(args.model)
    try:
        open_branches(model, args.skip_init)
    except ValueError as error:
        raise UserError(f"--signal cannot be had: {error}; leave it out, or name another network") from None
    images = torch.randn(args.batch, 3, px, px).to(device, memory_format=torch.channels_last)
    try:
        measured = nfnet.signal_propagation(model.to(device), images)
    except ValueError as error:
        raise UserError(
            f"--signal cannot be had of {args.model}: {error}; leave it out, or name another network"
        ) from None
    model.to("cpu")
    try:
        law = predict(model)
    except ValueError:
        law = None
    on_noise = predict_on_noise(model)
    if not all(map(math.isfinite, measured.variance)):
        raise UserError(
            f"{args.model} gives no finite numbers at {px} px and {args.batch} images; raise --px or --batch"
        )
    subtitle = (
        f"at initialisation, branches open (gain {args.skip_init:g}), {args.batch} images of {px}×{px} px of unit normal "
        f"noise, seed {args.seed}" + ("" if law else "; there is no law for this kind of network")
    )
    draw_signal(
        args.signal,
        title=f"Signal propagation of {args.model}",
        subtitle=subtitle,
        measured=measured,
        law=law,
        on_noise=on_noise,
    )
    return {
        "px": px,
        "measured": _numbers(measured),
        "predicted": _numbers(law),
        "predicted_on_noise": _numbers(on_noise),
    }


def _numbers(signal: SignalPropagation | None) -> dict[str, Any] | None:
    """JSON has no NaN: where there is no law, null."""
    if signal is None:
        return None
    return {k: [x if math.isfinite(x) else None for x in v] for k, v in vars(signal).items()}
