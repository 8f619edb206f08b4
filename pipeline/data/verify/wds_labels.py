"""The label of a WebDataset sample: from its `cls`, `json` or `txt` member, as text; and texts -> class numbers."""

import json
from collections.abc import Iterable, Mapping, Sequence

from pipeline.data.sources.csv_jsonl import label_order
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
    return text


def _from_json(text: str, field: str | None) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
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
    numbers = {text: int(text) for text in found if text.isdecimal()}
    all_numbers = len(numbers) == len(found)
    if classes is not None:
        names = {name: number for number, name in enumerate(classes)}
        if found <= set(names):
            return tuple(classes), {text: names[text] for text in found}
        if not all_numbers or max(numbers.values()) >= len(classes):
            odd = min(text for text in found if text not in names and not numbers.get(text, len(names)) < len(names))
            raise UserError(
                f"the label '{odd}' is neither one of the {len(classes)} classes given nor a number below that"
            )
        return tuple(classes), numbers
    if all_numbers and max(numbers.values()) < 2 * len(found):
        return tuple(str(number) for number in range(max(numbers.values()) + 1)), numbers
    order = label_order(found)
    return order, {name: number for number, name in enumerate(order)}
