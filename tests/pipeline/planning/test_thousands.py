"""Nothing that grows with the ranks grows faster than they do: counted in bytes and calls at 64, 512 and 4,096 of them."""

import json
import threading
from pathlib import Path

import pytest

from pipeline.checkpoint import commit, part_writer
from pipeline.storage import objects
from tests.pipeline import processes

RANKS = (64, 512, 4096)


def grows_at_most_with_ranks(counts: list[float]) -> None:
    """Per rank no more at 4,096 than at 64, within a per cent."""
    per_rank = [count / ranks for count, ranks in zip(counts, RANKS, strict=True)]
    assert per_rank[1] <= 1.01 * per_rank[0] and per_rank[2] <= 1.01 * per_rank[1], counts


def test_words_and_agreements_of_a_rank() -> None:
    """Of one rank; their calls do not grow at all."""
    out = processes.run("control_traffic.py", *map(str, RANKS), timeout_s=600)
    found = json.loads(out.strip().splitlines()[-1])
    for what in ("gather", "broadcast", "save"):
        sums = [found[str(ranks)][what] for ranks in RANKS]
        grows_at_most_with_ranks([sum(size for size, _ in s.values()) for s in sums])
        assert len({sum(calls for _, calls in s.values()) for s in sums}) == 1
    assert found["64"]["broadcast"] == found["4096"]["broadcast"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run folders with one committed checkpoint each, of 64, 512 and 4,096 ranks; files without contents."""
    found = []
    for ranks in RANKS:
        run = tmp_path_factory.mktemp(f"ranks{ranks}")
        url = commit.checkpoint_url(str(run), 10)
        Path(url).mkdir(parents=True)
        files = []
        for rank in range(ranks):
            name = f"fragments-{rank:05d}-of-{ranks:05d}.safetensors"
            (Path(url) / name).touch()
            files.append(commit.FileInfo(name=name, size_bytes=0, sha256="0" * 64))
            part = {"files": files[-1:], "kinds": ["weights"]}
            (Path(url) / part_writer._part_name(rank, ranks)).write_text(json.dumps(part))
        facts = {"samples": 0, "num_updates": 0, "shapes": {"w": [1]}, "config": {}, "config_digest": "", "dataset": {},
                 "classes": [], "evaluation": {}}  # fmt: skip
        commit.write_commit(url, step=10, kinds=["weights"], files=files, facts=facts)
        found.append(str(run))
    return found


def test_the_main_rank_reads_each_rank_s_word_once(checkpoints: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counts, sizes = [], []
    read = objects.read_bytes
    for ranks, run in zip(RANKS, checkpoints, strict=True):
        taken: list[int] = []

        def counted(url: str, *args: object, **named: object) -> bytes:
            data = read(url, *args, **named)  # type: ignore[arg-type]
            taken.append(len(data))  # noqa: B023
            return data

        monkeypatch.setattr(objects, "read_bytes", counted)
        url = commit.checkpoint_url(run, 10)
        mine = json.loads(read(objects.join(url, part_writer._part_name(0, ranks))))
        parts = part_writer.wait_for_parts(url, list(range(ranks)), size=ranks, mine=mine, give_up=threading.Event())
        assert len(parts) == ranks and len(taken) == ranks - 1
        counts.append(len(taken))
        sizes.append(sum(taken))
        monkeypatch.undo()
    assert counts == [r - 1 for r in RANKS]
    assert sizes[2] / sizes[0] == pytest.approx((RANKS[2] - 1) / (RANKS[0] - 1), rel=0.01)


def test_a_commit_file_and_its_listing(checkpoints: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit file holds a line a file, well below the bound of documents; a listing asks once, whatever the ranks."""
    sizes = []
    for run in checkpoints:
        asked: list[str] = []
        listed = objects.list_urls
        monkeypatch.setattr(objects, "list_urls", lambda *a, **k: asked.append(a[0]) or listed(*a, **k))  # noqa: B023
        (url,) = commit.committed(run)
        monkeypatch.undo()
        assert len(asked) == 1
        sizes.append((Path(url) / commit.COMMIT).stat().st_size)
    grows_at_most_with_ranks(sizes)
    assert sizes[2] < 2e6
