"""The label of a WebDataset sample: from its `cls`, `json` or `txt` member, as text; and texts -> class numbers."""

from collections.abc import Iterable, Mapping, Sequence

from pipeline.data.sources.csv_jsonl import MAX_CHARACTERS, label_order
from pipeline.documents import excerpt, parse_json
from pipeline.errors import UserError

LABEL_EXTENSIONS = ("cls", "json", "txt")
JSON_FIELDS = ("label", "cls", "class", "class_id", "label_id", "class_name", "label_name")
MAX_LABEL_BYTES = 1 << 20


def label_text(members: Mapping[str, bytes], field: str | None = None) -> str:
    """The label in the first of cls, json and txt that is there.

    Args:
        members: content of the label members by extension.
        field: of a JSON object; None: the first of the usual names.
    Raises:
        ValueError: none, or one that cannot be read; the message is the reason.
    """
    extension = next((name for name in LABEL_EXTENSIONS if name in members), None)
    if extension is None:
        raise ValueError("no label (cls, json or txt)")
    try:
        text = members[extension].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"its {extension} is not UTF-8") from error
    if extension == "json":
        text = _from_json(text, field)
    if not text or "\n" in text:
        raise ValueError(f"its {extension} holds {'no label' if not text else 'more than one line'}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its {extension} holds {len(text)} characters, and a label {MAX_CHARACTERS} at most")
    return text


def _from_json(text: str, field: str | None) -> str:
    try:
        value = parse_json(text, "its json", max_bytes=MAX_LABEL_BYTES)
    except UserError as error:
        raise ValueError("its json is damaged") from error
    if isinstance(value, dict):
        names = (field,) if field else JSON_FIELDS
        found = [name for name in names if name in value]
        if not found:
            raise ValueError(f"its json has no field {' or '.join(names)}")
        value = value[found[0]]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("the label in its json is neither text nor a whole number")
    return str(value).strip()


def label_classes(texts: Iterable[str], classes: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in label order, and the number of each label text.

    Whole numbers that begin near 0 and leave at most half unused are class numbers as they are; other texts are names, in
    order.

    Args:
        texts: every label that occurs.
        classes: names in label order, if they are known: texts are then their numbers or the names themselves.
    """
    found = set(texts)
    numbers = {text: int(text) for text in found if text.isdecimal() and len(text) < 10}
    all_numbers = len(numbers) == len(found)
    if classes is not None:
        names = {name: number for number, name in enumerate(classes)}
        numbers = {text: names.get(text, numbers.get(text, len(classes))) for text in found}
        odd = sorted(text for text, number in numbers.items() if number >= len(classes))
        if odd:
            raise UserError(
                f"the label '{excerpt(odd[0])}' is neither one of the {len(classes)} classes given nor a number below that"
            )
        return tuple(classes), numbers
    if all_numbers and max(numbers.values()) < 2 * len(found):
        return tuple(str(number) for number in range(max(numbers.values()) + 1)), numbers
    if numbers and not all_numbers:
        name = min(found - set(numbers))
        raise UserError(
            f"{len(numbers)} labels are numbers, such as '{min(numbers)}', and {len(found) - len(numbers)} are names, such as "
            f"'{excerpt(name)}', and nothing says which number is which name: give all names in label order by --classes"
        )
    order = label_order(found)
    return order, {name: number for number, name in enumerate(order)}


def label_kind(classes: Sequence[str], numbers: Mapping[str, int]) -> str:
    """What the label texts are: numbers, names, or mixed."""
    if all(str(number) == text for text, number in numbers.items()):
        return "numbers"
    return "names" if all(classes[number] == text for text, number in numbers.items()) else "mixed"


def is_label(text: str, label: int, classes: Sequence[str], kind: str) -> bool:
    """Whether a label's text says the class `label`."""
    by_name = text == classes[label]
    by_number = text not in classes if kind == "mixed" else kind == "numbers"
    return (by_name and kind != "numbers") or (by_number and text.isdecimal() and len(text) < 10 and int(text) == label)
