"""A model on the Hugging Face Hub and back, by the Hub's own client against a stand-in server."""

import fcntl
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from orchestration.cli import main
from pipeline.checkpoint.commit import read_commit
from pipeline.models.backbone import load_backbone
from tests.hub_server import TOKEN, Hub, hub_server
from tests.transfer.records import sweep_json
from transfer.sweep.entry import Trial, entry
from transfer.sweep.ledger import Ledger

Make = Callable[..., str]
hub_library = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as found:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # read when the library is imported
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        # Likewise; the oldest client that is allowed names a commit's repository by them.
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield found


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(words))
    out = capsys.readouterr()
    assert TOKEN not in out.out + out.err
    return code, out.out, out.err


def test_what_is_pushed_comes_back_and_gives_the_same_logits(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make_checkpoint(tmp_path)
    code, out, err = run(f"push {url} hf://org/animals --license apache-2.0 --private", capsys)
    assert code == 0, err
    assert "next: normfree pull hf://org/animals" in out and hub.private == {"org/animals"}
    (files,) = hub.repositories["org/animals"].values()
    assert set(files) == {"README.md", "export.json", "model.safetensors"}
    assert not [name for name, data in files.items() if TOKEN.encode() in data]
    code, out, err = run("pull hf://org/animals --to back", capsys)
    assert code == 0 and "licence: apache-2.0" in out, err
    assert {p.name for p in Path("back").iterdir()} == set(files)
    images = torch.randn(2, 3, 16, 16)
    ours, theirs = load_backbone(url).model(images), load_backbone("back").model(images)
    assert torch.equal(ours, theirs)


def test_the_card_is_one_that_the_hub_reads(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"push {make_checkpoint(tmp_path)} hf://org/animals --license cc-by-4.0", capsys)[0] == 0
    (files,) = hub.repositories["org/animals"].values()
    data = hub_library.ModelCard(files["README.md"].decode()).data
    assert (
        data.license == "cc-by-4.0" and data.pipeline_tag == "image-classification" and data.library_name == "normfree"
    )
    found = {(one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {("animals", "accuracy"): 50.0, ("animals", "top5"): 100.0}
    header = json.loads(files["model.safetensors"][8 : 8 + int.from_bytes(files["model.safetensors"][:8], "little")])
    assert header["__metadata__"]["format"] == "pt"


@pytest.mark.slow
def test_a_pushed_timm_folder_loads_in_timm_and_gives_our_logits(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    url = make_checkpoint(tmp_path, "nf_regnet_b0", px=32)
    code, out, err = run(f"push {url} hf://org/small --format timm --license mit", capsys)
    assert code == 0 and "timm.create_model('hf-hub:org/small', pretrained=True)" in out, err
    code, out, err = run("pull hf://org/small@main", capsys)
    assert code == 0 and "local-dir:small" in out, err
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = timm.create_model(f"local-dir:{tmp_path}/small", pretrained=True).eval()(images)
        ours = load_backbone(url).model(images)
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-5


def test_an_exported_folder_goes_as_it_is(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"export {make_checkpoint(tmp_path)} --format safetensors --out e --license mit", capsys)[0] == 0
    assert run("push e hf://org/again@v2", capsys)[0] == 0
    assert hub.branches.keys() == {("org/again", "v2")}
    (files,) = hub.repositories["org/again"].values()
    assert all(files[p.name] == p.read_bytes() for p in Path("e").iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("push {url} hf://org/x", "give --license"),
        ("push {url} hf://org/x --license 'My Own'", "give an identifier"),
        ("push {url} org/x --license mit", "write hf://ORG/NAME"),
        ("push {url} hf://nobody/x --license mit", "the token in HF_TOKEN may not"),
        ("push e hf://org/x --license mit", "is exported already"),
        ("push e hf://org/x", "give --license ID when you export it"),
        ("pull hf://org/nothing", "is not there, or is not for everybody"),
        ("pull hf://org/bare", "has no export.json"),
        ("pull hf://org/bare@v9", "no such branch"),
        ("pull hf://org", "write hf://ORG/NAME"),
        ("pull hf://org/bare --to e", "is not empty"),
        ("pull hf://org/bare --format timm", "leave it out"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    hub.repositories["org/bare"] = {"c" * 40: {"README.md": b"#"}}
    hub.branches["org/bare", "main"] = "c" * 40
    url = make_checkpoint(tmp_path)
    if " e" in words:
        assert run(f"export {url} --format safetensors --out e", capsys)[0] == 0
    code, _, err = run(words.format(url=url), capsys)
    assert code == 2 and sentence in err, err
    assert "org/x" not in hub.repositories and not list(tmp_path.glob("bare*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("evaluate hf://org/x data", "fetch it with 'normfree pull hf://org/x --to DIR'"),
        ("average {url} hf://org/x --out a", "fetch it with 'normfree pull hf://org/x --to DIR'"),
        ("average {url} {url} --out hf://org/x", "normfree push DIR hf://org/x"),
        ("export {url} --format safetensors --out hf://org/x", "normfree push DIR hf://org/x"),
    ],
)
def test_elsewhere_the_hub_is_no_store(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    code, _, err = run(words.format(url=make_checkpoint(tmp_path)), capsys)
    assert code == 2 and sentence in err and hub.asked == [], err


def test_without_a_token_nothing_is_asked(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = run(f"push {make_checkpoint(tmp_path)} hf://org/x --license mit", capsys)
    assert code == 2 and "set HF_TOKEN" in err and hub.asked == []


def test_a_changed_byte_a_foreign_path_and_a_pickle_are_refused(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"push {make_checkpoint(tmp_path)} hf://org/animals --license mit", capsys)[0] == 0
    (files,) = hub.repositories["org/animals"].values()
    good, weights = json.loads(files["export.json"]), files["model.safetensors"]
    files["model.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    code, _, err = run("pull hf://org/animals --to back", capsys)
    assert code == 2 and "is not what export.json says of it" in err
    files["model.safetensors"] = weights
    for name in ("../outside", "weights.pkl"):
        files["export.json"] = json.dumps({**good, "files": [{**good["files"][0], "name": name}]}).encode()
        code, _, err = run("pull hf://org/animals --to back", capsys)
        assert code == 2 and ("path below" in err or "pickle" in err), err
    assert not Path("back").exists() and not (tmp_path.parent / "outside").exists()


def test_nothing_of_another_size_is_fetched_and_nothing_of_another_pull_stays(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"push {make_checkpoint(tmp_path)} hf://org/animals --license mit", capsys)[0] == 0
    (files,) = hub.repositories["org/animals"].values()
    weights, export, whole = files.pop("model.safetensors"), files["export.json"], len(files)
    left = tmp_path / "back.partial" / "other"
    left.mkdir(parents=True)
    (left / "of_another.safetensors").write_bytes(b"x")
    for changed, sentence in (
        ({}, "lacks a file that its export.json names"),
        ({"model.safetensors": weights + b"x"}, f"its model.safetensors has {len(weights) + 1:,} bytes"),
        ({"export.json": b" " * (17 << 20)}, "its export.json has 17,825,792 bytes"),
    ):
        files.update(changed)
        hub.asked.clear()
        code, _, err = run("pull hf://org/animals --to back", capsys)
        assert code == 2 and sentence in err and not Path("back").exists(), err
        assert not [asked for asked in hub.asked if asked.startswith("GET") and asked.endswith(tuple(changed) or "?")]
    files.update({"model.safetensors": weights, "export.json": export, "../../x": b"", "other.safetensors": b"y"})
    code, out, err = run("pull hf://org/animals --to back", capsys)
    assert code == 0 and f"{whole + 1} files" in out, err
    assert {p.name for p in Path("back").iterdir()} == {"README.md", "export.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("hf://org/animals --to .", "is not empty"),
        ("hf://org/animals --to s3://bucket/x", "a folder of this machine"),
        ("hf://org/animals --to linked", "cannot write to .*linked.partial"),
        ("hf://org/animals --to held", "another pull works on .*held.partial"),
        ("hf://org/animals --to file/x", "cannot write to .*file/x.partial"),
        ("hf://org/a--b", "write hf://ORG/NAME as the Hub has it"),
        ("hf://org/animals@../../other", "no such branch"),
    ],
)
def test_a_pull_keeps_to_a_place_that_is_free(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    hub.repositories["org/animals"] = {"c" * 40: {"README.md": b"#", "export.json": b"{}"}}
    hub.branches["org/animals", "main"] = "c" * 40
    (tmp_path / "file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked.partial").symlink_to("elsewhere")
    (tmp_path / "held.partial").mkdir()
    held = os.open(tmp_path / "held.partial", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    code, _, err = run(f"pull {words}", capsys)
    os.close(held)
    assert code == 2 and re.search(sentence, err), err
    assert not list((tmp_path / "elsewhere").iterdir()) and not list((tmp_path / "held.partial").iterdir())
    assert not (tmp_path / "s3:").exists()


def test_a_server_that_is_away_is_a_sentence(
    make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = run("pull hf://org/animals", capsys)
    assert code == 2 and "cannot be reached" in err


def test_a_sweep_becomes_the_cards_table_and_its_index(
    hub: Hub, make_checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = make_checkpoint(tmp_path)
    write_sweep(tmp_path / "sweep", url, "Digits | <b>")
    code, _, err = run(f"push {url} hf://org/animals --license mit --scorecard sweep", capsys)
    assert code == 0, err
    (files,) = hub.repositories["org/animals"].values()
    card = hub_library.ModelCard(files["README.md"].decode())
    found = {(one.dataset_type, one.metric_value) for one in card.data.eval_results}
    assert ("digits", 75.5) in found and len(found) == 3
    (row,) = (line for line in card.text.splitlines() if "75.5 " in line)
    assert "Digits \\| &lt;b&gt; | top-1, % | ridge" in row and row.endswith("| wins |")


def write_sweep(folder: Path, checkpoint: str, title: str) -> None:
    """Of one task, made up: 75.5 % pretrained and 50.5 % from scratch."""
    digest = read_commit(checkpoint).digest
    folder.mkdir()
    about = {"checkpoint_url": checkpoint, "checkpoint_digest": digest, "model": "nfnet_tiny", "num_seeds": 2}
    (folder / "sweep.json").write_text(sweep_json(**about))
    for init, values in (("pretrained", (0.74995, 0.76005)), ("scratch", (0.5, 0.51))):
        for seed, value in enumerate(values):
            trial = Trial(
                kind="final", task="digits", method="ridge", init=init, shots=5, seed=seed, hyperparameters={},
                protocol_digest="p", data_digest="d", checkpoint_digest=digest if init == "pretrained" else "",
            )  # fmt: skip
            ended = entry(trial, task_title=title, checkpoint_url=checkpoint, value=value)
            Ledger(str(folder)).write(ended)
