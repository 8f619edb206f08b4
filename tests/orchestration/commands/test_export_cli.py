"""`normfree export` and `normfree classify` as a person meets them; an MLflow model that a real server serves."""

import base64
import contextlib
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from orchestration.cli import main
from orchestration.registry.export_mlflow import ALL_WRITERS
from pipeline.checkpoint.exported import Exported
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import eval_image
from pipeline.export.export import export
from pipeline.export.source import preprocessing
from pipeline.models.classify import classify
from tests.waiting import sentences

Make = Callable[..., str]


def run(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(shlex.split(words))
    out = capsys.readouterr()
    return code, out.out, out.err


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def url(make_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), eval_resize="published")


@pytest.fixture(scope="module")
def served(url: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported in an empty working folder, which must stay empty."""
    place = tmp_path_factory.mktemp("mlflow")
    (place / "cwd").mkdir()
    before = os.getcwd()
    os.chdir(place / "cwd")
    try:
        made = export(url, "mlflow", str(place / "model"), writers=ALL_WRITERS)
    finally:
        os.chdir(before)
    assert not list((place / "cwd").iterdir())
    return made


def test_export_then_classify_in_two_commands(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = Path(url).parents[1], tmp_path / "out"
    code, said, _ = run(f"export {run_dir} --format safetensors --out {out}", capsys)
    assert code == 0 and "averaged weights" in said and "logits are equal" in said
    assert f"next: normfree classify {out} IMAGE..." in said
    (tmp_path / "a.png").write_bytes(png(1))
    code, said, _ = run(f"classify {out} {tmp_path}/a.png --top 2", capsys)
    best = classify(url, str(tmp_path / "a.png"))[0].ranked[0]
    assert code == 0 and said.startswith(f"{tmp_path}/a.png: {best[0]} {best[1]:.1%}, ") and len(said.splitlines()) == 1


def test_json_is_one_list_with_probabilities_and_errors(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2)[:200])
    code, said, err = run(f"classify {url} {tmp_path} --json --top 9", capsys)
    good, bad = json.loads(said)
    assert code == 2 and sum(p["probability"] for p in good["predictions"]) == pytest.approx(1)
    assert len(good["predictions"]) == 5 and bad["predictions"] == [] and "does not decode" in bad["error"]
    (sentence,) = sentences(err)
    assert sentence.startswith(f"normfree: {tmp_path}/b.png cannot be classified: it does not decode")


def test_several_bad_images_are_each_named_and_the_others_classified(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(b"")
    code, said, err = run(f"classify {url} {tmp_path}/b.png {tmp_path}/none.png {tmp_path}/a.png", capsys)
    assert code == 2 and said.startswith(f"{tmp_path}/a.png: ")
    first, second, last = sentences(err)
    assert "b.png cannot be classified: it does not decode (empty file)" in first
    assert "none.png cannot be classified: there is no such file" in second
    assert last.startswith("normfree: 2 images cannot be classified")


# --- MLflow ---------------------------------------------------------------------------------------------------------------


def test_the_mlflow_model_holds_no_pickle_and_leads_back_to_its_checkpoint(served: Exported) -> None:
    import mlflow

    names = {f["name"] for f in served.files}
    assert not [n for n in names if n.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert {"MLmodel", "served_model.py", "README.md", "input_example.json", "serving_input_example.json"} <= names
    for file in served.files:  # a pickle of protocol 2 or later begins with \x80 and the protocol, whatever its name
        assert (Path(served.url) / file["name"]).read_bytes()[:1] != b"\x80"
    assert str(Path.cwd()) not in (Path(served.url) / "MLmodel").read_text()
    info = mlflow.models.get_model_info(served.url)
    assert info.metadata["checkpoint_digest"] == served.source_digest
    assert "python_model" not in info.flavors["python_function"]
    assert [c.name for c in info.signature.inputs] == ["image"] and info.signature.params.params[0].name == "top"


def test_the_mlflow_model_needs_nothing_of_ours(served: Exported, url: str, tmp_path: Path) -> None:
    """In a process that cannot import normfree, and with turbojpeg or without."""
    image = tmp_path / "a.png"
    image.write_bytes(png(1))
    code = (
        "import sys, json, mlflow, pandas\n"
        "for name in ('nfnet', 'pipeline', 'orchestration', 'torch', 'timm'): sys.modules[name] = None\n"
        f"model = mlflow.pyfunc.load_model({served.url!r})\n"
        f"frame = pandas.DataFrame({{'image': [open({str(image)!r}, 'rb').read()] * 40}})\n"
        "found = model.predict(frame, params={'top': 3})\n"
        "print(json.dumps([len(found), found['classes'][39], found['probabilities'][39]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number, names, shares = json.loads(done.stdout.splitlines()[-1])
    ranked = classify(url, str(image), top=3)[0].ranked
    assert number == 40 and names == [n for n, _ in ranked]
    assert shares == pytest.approx([s for _, s in ranked], abs=1e-5)


@pytest.mark.filterwarnings("ignore")  # of mlflow's import
@pytest.mark.parametrize("resize", ["plain", "published", "aspect", "square"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 30), (30, 40), (33, 100), (300, 7)])
def test_the_served_code_prepares_pixels_as_evaluation_does(resize: Any, shape: tuple[int, int]) -> None:
    from orchestration.registry.served_model import _evaluation_form

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = AugmentConfig(image_px=33, eval_resize=resize)
    assert np.array_equal(_evaluation_form(pixels, preprocessing(config)), eval_image(pixels, config))


def mlflow_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "mlflow", "models", *words, "--env-manager", "local"]


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "expected"), [("sigmoid", [0.75, 0.2]), ("softmax", [12 / 13, 1 / 13])])
def test_the_served_code_makes_probabilities_as_the_network_was_trained(
    activation: str, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.registry.served_model import Classifier

    model = Classifier()
    model.classes, model.activation = ["ant", "bee"], activation
    monkeypatch.setattr(model, "logits", lambda images: np.log([[0.25, 3.0]]))
    (row,) = model.predict(None, pandas.DataFrame({"image": [b""]})).to_dict("records")
    assert row["classes"] == ["bee", "ant"] and row["probabilities"] == pytest.approx(expected)


def test_mlflow_models_predict_answers_the_input_example(served: Exported, tmp_path: Path) -> None:
    example = Path(served.url) / "serving_input_example.json"
    command = mlflow_command(
        "predict", "--model-uri", served.url, "--input-path", str(example), "--content-type", "json"
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout[done.stdout.index("{") :])["predictions"]
    image = base64.b64decode(json.loads(example.read_text())["dataframe_split"]["data"][0][0])
    ranked = classify(served.source_url, image)[0].ranked
    assert row["class"] == ranked[0][0] and row["classes"] == [n for n, _ in ranked]
    assert row["probability"] == pytest.approx(ranked[0][1], abs=1e-5)


@pytest.mark.slow
def test_mlflow_models_serve_answers_over_http(served: Exported, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        mlflow_command("serve", "--model-uri", served.url, "--port", str(port), "--workers", "1"),
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },  # it calls uvicorn
        start_new_session=True,
        stdout=(tmp_path / "log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        body = {
            "dataframe_split": {"columns": ["image"], "data": [[base64.b64encode(png(5)).decode()]]},
            "params": {"top": 2},
        }
        found = ask(port, body, server)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    ranked = classify(served.source_url, png(5), top=2)[0].ranked
    assert found["predictions"][0]["classes"] == [n for n, _ in ranked]


def ask(port: int, body: dict[str, Any], server: "subprocess.Popen[bytes]") -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(300):
        assert server.poll() is None, "the server ended, see its log"
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (ConnectionError, urllib.error.URLError):
            time.sleep(1)
    raise AssertionError("the server never answered")
