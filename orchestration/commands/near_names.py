"""Options that somebody used to other programs may type, and the right words for them."""

import difflib

from pipeline.errors import UserError

USUAL = {
    "lr": "--optim.learning_rate",
    "learning_rate": "--optim.learning_rate",
    "base_lr": "--optim.learning_rate",
    "min_lr": "--optim.final_learning_rate",
    "wd": "--optim.weight_decay",
    "warmup": "--optim.warmup",
    "warmup_epochs": "--optim.warmup '5 epochs'",
    "warmup_steps": "--optim.warmup '500 steps'",
    "smoothing": "--optim.label_smoothing",
    "ema": "--optim.ema_decay",
    "model_ema": "--optim.ema_decay",
    "clip_grad": "--optim.clipping",
    "agc": "--optim.clipping",
    "epochs": "--duration '20 epochs'",
    "num_epochs": "--duration '20 epochs'",
    "max_epochs": "--duration '20 epochs'",
    "steps": "--duration '1000 steps'",
    "num_steps": "--duration '1000 steps'",
    "max_steps": "--duration '1000 steps'",
    "batch": "--global_batch",
    "batch_size": "--global_batch",
    "bs": "--global_batch",
    "bf16": "--engine.precision bf16",
    "fp16": "--engine.precision bf16",
    "amp": "--engine.precision bf16",
    "dtype": "--engine.precision",
    "zero": "--engine.zero_stage",
    "stage": "--engine.zero_stage",
    "grad_checkpointing": "--engine.activation_checkpointing true",
    "data": "--data.url",
    "data_dir": "--data.url",
    "dataset": "--data.url",
    "workers": "--data.num_workers",
    "img_size": "--augment.image_px",
    "image_size": "--augment.image_px",
    "resolution": "--augment.image_px",
    "px": "--augment.image_px",
    "mixup": "--augment.mixup_alpha",
    "cutmix": "--augment.cutmix_alpha",
    "hflip": "--augment.flip",
    "drop": "--model.options.drop_rate",
    "dropout": "--model.options.drop_rate",
    "drop_rate": "--model.options.drop_rate",
    "drop_path": "--model.options.stochastic_depth",
    "stochastic_depth": "--model.options.stochastic_depth",
    "activation": "--model.options.activation",
    "model": "--model.name",
    "pretrained": "--model.init_from",
    "checkpoint": "--model.init_from",
    "finetune": "--model.init_from",
    "resume": "the same command again, which resumes by itself, with --out",
    "output": "--out",
    "output_dir": "--out",
    "save_dir": "--out",
    "run_dir": "--out",
    "gpus": "--num-processes",
    "num_gpus": "--num-processes",
    "nproc": "--num-processes",
    "nproc_per_node": "--num-processes",
    "world_size": "--num-processes",
    "tracking": "--tracking-uri",
    "mlflow": "--tracking-uri",
    "grad_accum": "--micro_batch",
    "accumulation": "--micro_batch",
    "gradient_accumulation_steps": "--micro_batch",
    "log_interval": "--log_every_steps",
    "save_interval": "--save_every",
    "eval_interval": "--eval_every",
    "dry_run": "--show",
    "print": "--show",
}


def check_names(names: list[str], fields: list[str], options: list[str]) -> None:
    """Refuses a field that there is not, with the word that leads on.

    Args:
        fields: dotted paths of all fields of a Run.
        options: of the command, as --num-processes.
    """
    groups = {path.rpartition(".")[0] for path in fields} - {""}
    for name in names:
        parent = name.rpartition(".")[0]
        if name in fields or name in groups or any(parent == f or parent.startswith(f"{f}.") for f in fields):
            continue  # what hangs below a field that has no fields is refused where the value is read
        raise UserError(f"no option --{name}; {advice(name, fields, options)}")


def advice(name: str, fields: list[str], options: list[str]) -> str:
    plain = name.lower().replace("-", "_")
    last = plain.rpartition(".")[2]
    typed = {option.lstrip("-").replace("-", "_"): option for option in options}
    exact = [f"--{path}" for path in fields if path == plain or path.rpartition(".")[2] == last]
    parent = plain.rpartition(".")[0]
    near_parent = [path for path in exact if parent and path.startswith(f"--{parent}.")]
    if found := typed.get(plain) or next(iter(near_parent), None) or USUAL.get(last) or next(iter(exact), None):
        return f"did you mean {found}?"
    words = {
        **{path: f"--{path}" for path in fields},
        **{path.rpartition(".")[2]: f"--{path}" for path in fields},
        **typed,
    }
    near = difflib.get_close_matches(plain, words, n=1, cutoff=0.6) or difflib.get_close_matches(
        last, words, n=1, cutoff=0.6
    )
    if near:
        return f"did you mean {words[near[0]]}?"
    return "'normfree pretrain --help-fields' explains all fields of a run, and 'normfree pretrain --help' the other options"
