"""YAML that people write: strict, bounded, and wrong in one sentence with its line."""

import pytest

from pipeline.errors import UserError
from pipeline.yaml_files.parse import parse_yaml

LAUGH = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        ("é: 1".encode("latin-1"), "not UTF-8 .* save it as UTF-8"),
        ("a: 1".encode("utf-16"), "not UTF-8"),
        (b"a: 1\nb: 2\na: 3", "line 3 column 1.*'a' stands twice"),
        (b"a: {x: 1, 'x': 2}", "'x' stands twice"),
        (b"a: 010", "line 1 column 4.*010 would be octal"),
        (b"a: 1:30", "base 60"),
        (b"a: .nan", "no finite number"),
        (b"a: 1\nb: !!python/object:os.system x", "line 2.*tag"),
        (b"a: !!binary aGVsbG8=", "tag"),
        (b"? [1, 2]\n: 3", "no plain value"),
        (b"a: &a [*a]", "alias"),
        (b"a: *b", "alias"),
        (b"a: 1\n---\nb: 2", "document"),
        (b"a: [1", "line"),
        (b"a: " + b"1" * 5000, "5000 digits"),
        (b"[" * 5000, "64 levels"),
        (b"- " * 5000, "64 levels"),
        (LAUGH.encode(), "200000 values"),
        (b"a: \x07", "not usable"),
    ],
)
def test_yaml_that_guesses_or_never_ends_is_refused_with_its_place(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)^card.yaml .*{words}"):
        parse_yaml(data, "card.yaml")


def test_plain_yaml_is_read() -> None:
    text = b"""
base: &base {lr: 0.1, name: 2024-01-02, n: 0x10, t: 1.5e+3, z: 0, list: [no, yes, ~, '010']}
deep: {er: {<<: *base, lr: 0.2}}
over: {<<: *base, lr: 0.3}
"""
    base = {"lr": 0.1, "name": "2024-01-02", "n": 16, "t": 1500.0, "z": 0, "list": [False, True, None, "010"]}
    assert parse_yaml(text, "f") == {
        "base": base,
        "deep": {"er": {**base, "lr": 0.2}},
        "over": {**base, "lr": 0.3},
    }
    nested = b"x: {y: {z: &b {<<: {q: 1}, q: 2}}}\nc: {<<: *b}"
    assert parse_yaml(nested, "f") == {"x": {"y": {"z": {"q": 2}}}, "c": {"q": 2}}
