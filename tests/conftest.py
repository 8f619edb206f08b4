"""What several test modules share: seeds, threads, and the embedded digits as a prepared dataset."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: more threads only wait for each other
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NORMFREE_PICTURES", "0")  # uploaders of the tests draw none, but where a test asks for them

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the embedded set `digits`, prepared in several small shards."""
    from pipeline.data.cards import load_card
    from pipeline.data.prepare import prepare

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
