"""Names of classes in a configuration, verified: `num_labels`, `id2label` and `label2id`."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any


LABEL_FIELDS = ("num_labels", "id2label", "label2id")


def check_classes(num_labels: Any, id2label: Any) -> None:
    """Raise a ValueError if there is a count or names, and these are not those of classes from 0 on, or do not fit each other."""
    if num_labels is not None and (not isinstance(num_labels, Integral) or isinstance(num_labels, bool) or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}, but a whole number of at least 1 is expected")
    if not id2label:
        return
    if not isinstance(id2label, dict):
        raise ValueError(f"id2label is {str(id2label)[:80]}, but the name of each number is expected: {{0: 'dog', 1: 'rain'}}")
    names = ordered_names(id2label)
    if num_labels not in (None, len(names)):
        raise ValueError(f"num_labels is {num_labels}, but id2label has {len(names)} names: leave num_labels out, or name every class")


def ordered_names(id2label: dict[Any, Any]) -> list[str]:
    """Names in the order of their numbers, which may also be text, as JSON and YAML have them.

    Raises:
        ValueError: if not each class from 0 on has a name. (Two may have the same one, as in other models.)
    """
    numbers = _whole_numbers(id2label)
    if sorted(numbers) != list(range(len(id2label))):
        keys = ", ".join(map(repr, list(id2label)[:5])) + (" ..." if len(id2label) > 5 else "")
        raise ValueError(
            f"id2label has the keys {keys}, but the classes' numbers are expected, 0 to {len(id2label) - 1}, each with its name"
        )
    return [str(name) for _, name in sorted(zip(numbers, id2label.values()))]


def names_by_number(label2id: Any, num_labels: int | None) -> dict[int, str]:
    """The `id2label` of a `label2id`."""
    numbers = _whole_numbers(label2id.values()) if isinstance(label2id, dict) else []
    if not numbers or sorted(numbers) != list(range(num_labels or len(label2id))):
        raise ValueError(
            f"label2id is {str(label2id)[:80]} and num_labels {num_labels}, but each class from 0 on needs one name: leave num_labels out, "
            "or correct label2id"
        )
    return dict(sorted(zip(numbers, label2id)))


def chosen_labels(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the `LABEL_FIELDS` of a saved configuration and of `from_pretrained` that count: new names, or another number of classes,
    replace all that was saved."""
    saved, given = ({name: fields[name] for name in LABEL_FIELDS if fields.get(name) is not None} for fields in (saved, given))
    count = given.get("num_labels", saved.get("num_labels"))
    if given.get("id2label") or given.get("label2id"):
        return given
    return saved | given if count in (None, len(saved.get("id2label", {}))) else {"num_labels": count}


def _whole_numbers(values: Iterable[Any]) -> list[int]:
    """None at all if one of them is something else."""
    try:
        numbers = [int(value) for value in values]
    except (TypeError, ValueError):
        return []
    return numbers if list(map(str, numbers)) == list(map(str, values)) else []
