"""What several test modules share: seeds, threads, and the embedded digits as a prepared dataset."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait for each other
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NORMFREE_PICTURES", "0")  # uploaders of the tests draw none, but where a test asks for them

# What runs in a store keep on this machine is the tests' own, and goes with them.
if "NORMFREE_CACHE" not in os.environ:
    os.environ["NORMFREE_CACHE"] = tempfile.mkdtemp(prefix="normfree-tests-")
    atexit.register(shutil.rmtree, os.environ["NORMFREE_CACHE"], ignore_errors=True)

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the embedded set `digits`, prepared in several small shards."""
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import load_card

    url = str(tmp_path_factory.mktemp("digits") / "digits")
    prepare(load_card("digits"), url, shard_bytes=1 << 19)
    return url


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, tests that need it skip where it is absent."""
    folder = Path(os.environ.get("NORMFREE_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10.tar").exists():
        pytest.skip(f"no real images at {folder}; set NORMFREE_TEST_DATA to a folder that holds cifar10.tar and others")
    return folder


CLASSES = ["ant", "bee", "crow", "dogfish", "eagle, bald"]


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., str]:
    """Writes a committed checkpoint without training one: make_checkpoint(folder, model, px=..., **options) -> its URL.

    Every parameter is away from its initial value, so that each of them shows in the logits; raw weights differ from averaged.
    """

    def make(folder: Path, name: str = "nfnet_tiny", *, px: int = 16, ema: bool = True, **options: Any) -> str:
        import torch
        from safetensors.torch import save_file

        import nfnet
        from pipeline.checkpoint import commit
        from pipeline.configuration import to_dict
        from pipeline.data.augment.augment_config import AugmentConfig
        from pipeline.data.loading.datasets import DataConfig
        from pipeline.duration import Duration
        from pipeline.engine.optim_config import OptimConfig
        from pipeline.models.backbone import ModelConfig
        from pipeline.storage import objects
        from pipeline.training.run import Run

        url = folder / "run" / "checkpoints" / "step_00000007"
        url.mkdir(parents=True)
        resize = options.pop("eval_resize", "plain")
        classes, loss = options.pop("classes", CLASSES), options.pop("loss", "softmax")
        evaluation = options.pop("evaluation", {"loss": 1.25, "top1": 0.5, "top5": 1.0})
        fragments, kinds = {}, ["weights", "ema"] if ema else ["weights"]
        with torch.random.fork_rng(devices=[]):
            for seed, kind in enumerate(kinds):
                torch.manual_seed(seed)
                model = nfnet.create_model(name, num_classes=len(classes), **options)
                for key, value in model.state_dict().items():
                    if key.endswith(("gain", "bias")):
                        value.copy_(torch.randn_like(value) * 0.1 + (1.0 if key.endswith("gain") else 0.0))
                    elif key == "head.weight":
                        value.normal_(std=0.05)
                    fragments[f"{kind}/{key}@0"] = value.flatten()
        save_file(fragments, url / "part.safetensors")
        run = Run(
            name="animals",
            model=ModelConfig(name=name, options=options),
            data=DataConfig(url="data/animals"),
            augment=AugmentConfig(image_px=px, eval_resize=resize),
            optim=OptimConfig(learning_rate=0.1, ema_decay=0.9 if ema else None, loss=loss),
            global_batch=4,
            duration=Duration(7, "steps"),
        )
        facts = {
            "samples": 28,
            "num_updates": 7,
            "shapes": {k: list(v.shape) for k, v in model.state_dict().items()},
            "config": to_dict(run),
            "config_digest": run.digest(),
            "dataset": {"name": "animals", "url": "data/animals", "digest": "0123abcd"},
            "classes": classes,
            "evaluation": evaluation,
        }
        path = url / "part.safetensors"
        files = [{"name": path.name, "size_bytes": path.stat().st_size, "sha256": objects.sha256_file(path)}]
        return commit.write_commit(str(url), step=7, kinds=kinds, files=files, facts=facts).url

    return make
