"""What the drill judges by: the ledger's law, the distance of two states, the small copy of a run and of its data."""

import json
from pathlib import Path

import pytest
import torch

from orchestration.operations.drill import evidence, own_data
from orchestration.operations.drill.card import Card, Result
from orchestration.operations.drill.evidence import Lost
from orchestration.operations.drill.own_run import shrunk, with_watchdog
from pipeline import recipes
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import TrainData
from pipeline.data.loading.sample_ledger import Ledger
from pipeline.data.verify.verify import verify
from pipeline.training.run import Run, override

PAGE = {
    "source": "d",
    "epochs": [0, 0],
    "manifest": 10,
    "used": 10,
    "skipped": 0,
    "dropped": 0,
    "excluded": 0,
    "repeated": 0,
}


def write(folder: Path, *pages: dict[str, object]) -> None:
    content = {"step": 1, "pages": [{**PAGE, "entries": [], **page} for page in pages]}
    (folder / "ledger.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("pages", "positions"),
    [
        ([{"used": 4, "dropped": 6}], 4),
        ([{"epochs": [0, 2]}, {"epochs": [3, 3], "used": 1, "dropped": 9}], 31),
        ([{"used": 9, "skipped": 1, "repeated": 1}], 10),
    ],
)
def test_an_account_that_adds_up(pages: list[dict[str, object]], positions: int, tmp_path: Path) -> None:
    write(tmp_path, *pages)
    assert evidence.account(tmp_path, positions=positions).step == 1
    with pytest.raises(Lost, match=f"drew {positions + 1} images, and {positions} are"):
        evidence.account(tmp_path, positions=positions + 1)


def test_an_account_that_does_not(tmp_path: Path) -> None:
    write(tmp_path, {"used": 9})
    with pytest.raises(Lost, match="of 10 samples in the manifest 9 were used"):
        evidence.account(tmp_path, positions=9)
    with pytest.raises(Lost, match="there is no account"):
        evidence.account(tmp_path / "other", positions=9)


def test_states_are_equal_or_near_or_lost() -> None:
    state = {"weights": {"a": torch.tensor([1.0, 2.0])}}
    near = {"weights": {"a": torch.tensor([1.0, 2.0 + 5e-7])}}
    far = {"weights": {"a": torch.tensor([1.0, 2.01])}}
    assert evidence.compare(state, state) == "weights bit-equal to the undisturbed run"
    assert evidence.compare(near, state).startswith("weights within 5e-07")
    with pytest.raises(Lost, match=r"weights of a differ by 0\.01"):
        evidence.compare(far, state)
    with pytest.raises(Lost, match="other tensors"):
        evidence.compare({}, state)


def small(run: Run, num_ranks: int = 2) -> Run:
    return shrunk(run, num_images=20_000, num_ranks=num_ranks, data=run.data)


@pytest.mark.parametrize(
    "name", ["nfnet_tiny_glyphs", "nfnet_f5_imagenet", "nfnet_f7_plus_imagenet_finetune", "nf_resnet50_imagenet"]
)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_the_small_run_keeps_what_makes_it_the_users(name: str, num_ranks: int) -> None:
    run = recipes.get(name)
    drilled = small(run, num_ranks)
    assert drilled.engine == run.engine and drilled.keep_checkpoints == run.keep_checkpoints
    assert (drilled.optim.sam_rho > 0, drilled.optim.ema_decay) == (run.optim.sam_rho > 0, run.optim.ema_decay)
    assert drilled.batch_plan(num_ranks)[1] == (2 if 0 < run.micro_batch * num_ranks < run.global_batch else 1)
    assert drilled.global_batch % run.data.repeats == 0 and drilled.model.init_from is None


def test_a_watchdog_that_is_off_stays_off() -> None:
    run = recipes.get("nfnet_tiny_glyphs")
    assert with_watchdog(run, 20).watchdog.limit_s == 20
    assert with_watchdog(override(run, {"watchdog.limit_s": 0}), 20).watchdog.limit_s == 0


def test_a_copy_of_the_data_is_a_dataset_of_the_users_own_images(digits: str, tmp_path: Path) -> None:
    run = override(recipes.get("nfnet_tiny_glyphs"), {"data.url": digits})
    copied = own_data.copy_of(run.data, tmp_path, num_images=19_500)
    theirs, ours = Manifest.open(digits), Manifest.open(copied.url)
    assert ours.classes == theirs.classes and copied.max_lost_samples == 1
    assert {name: split.num_samples for name, split in ours.splits.items()} == {"train": 512, "val": 64}
    assert set(ours.split("train").keys) < set(theirs.split("train").keys)
    assert verify(copied.url).problems == ()
    renamed = own_data.with_another_class(copied, tmp_path / "renamed")
    assert Manifest.open(renamed.url).classes != ours.classes


def test_a_flipped_byte_is_one_unreadable_sample(digits: str, tmp_path: Path) -> None:
    run = override(recipes.get("nfnet_tiny_glyphs"), {"data.url": digits})
    copied = own_data.copy_of(run.data, tmp_path, num_images=500)
    assert copied.max_lost_samples == 0
    data = TrainData(copied, run.augment, seed=0)
    source, _, shard, key = data.keys(2, 16)[0]
    flipped = own_data.with_flipped_byte(copied, tmp_path / "flipped", source=source, shard=shard, key=key)
    problems = verify(flipped.url).problems
    assert problems and all(key in problem or shard in problem for problem in problems)


def test_the_ledger_of_the_product_passes_its_law(digits: str, tmp_path: Path) -> None:
    run = override(recipes.get("nfnet_tiny_glyphs"), {"data.url": digits, "data.repeats": 2})
    ledger = Ledger(TrainData(run.data, run.augment, seed=0), global_batch=16)
    (tmp_path / "ledger.json").write_bytes(ledger.to_json(300))
    assert evidence.account(tmp_path, positions=300 * 16).lost_keys == []


def test_a_card_says_why() -> None:
    common = {"done": "a", "expected": "b", "codes": (1,), "seconds_s": 1.0}
    good = Result(name="kill", happened=("went on",), survived=True, reason="", **common)  # type: ignore[arg-type]
    bad = Result(name="nan", happened=(), survived=False, reason="it did not", **common)  # type: ignore[arg-type]
    card = Card(run="r", results=[good, bad], not_played={"freeze": "needs 2 processes"}, seconds_s=9.0)
    text = "\n".join(card.lines())
    assert "codes 1; went on" in text and "expected: b; codes 1; but it did not" in text
    assert card.num_lost == 1 and "1 survived, 1 lost, in 9 s" in text
    assert json.loads(card.to_json())["not_played"] == {"freeze": "needs 2 processes"}
