"""Reads the values of a row that the columns of a task name. TypeError, KeyError or IndexError if a row lacks them."""

from collections.abc import Mapping, Sequence

import numpy as np


def pick(row: Mapping, field: str):
    """The value of "a.b" or "a.*.b" in a row; "*" is every item of a list or mapping.

    KeyError, IndexError or TypeError if the row does not have it.
    """
    value = row
    names = field.split(".")
    for i, name in enumerate(names):
        if name == "*":
            rest = ".".join(names[i + 1 :])
            if isinstance(value, Mapping):
                value = [item for key, item in value.items() if key[:1] != "_"]
            elif not isinstance(value, (list, tuple)):
                raise TypeError(f"field {field!r}: {value!r:.40} has no items")
            return [pick({"": item}, f".{rest}" if rest else "") for item in value]
        if isinstance(value, (list, tuple)):
            if not name.isdecimal():
                raise TypeError(f"field {field!r}: {name!r} is looked up in a list; '*' means each of its items")
            if int(name) >= len(value):
                raise IndexError(f"field {field!r}: the list has {len(value)} items")
            value = value[int(name)]
        elif isinstance(value, Mapping):
            if name not in value:
                raise KeyError(f"no field {field!r}; there are {', '.join(map(str, value))}")
            value = value[name]
        else:
            raise TypeError(f"field {field!r}: {value!r:.40} has no fields")
    return value


def text_of(row: Mapping, field: str | Sequence[str]) -> str:
    """A text of a row; the non-empty texts of several fields are joined by a space, as a title and a text are."""
    if not isinstance(field, str):
        return " ".join(filter(None, (text_of(row, name) for name in field)))
    value = pick(row, field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"field {field!r} is {value!r:.40}, expected a text")
    return value


def texts_of(row: Mapping, field: str | Sequence[str]) -> list[str]:
    """The texts of a list field, or the one text of another."""
    value = pick(row, field) if isinstance(field, str) else [text_of(row, name) for name in field]
    if not isinstance(value, (list, tuple)):
        return [text_of(row, field)]
    for item in value:
        if not isinstance(item, str):
            raise TypeError(f"field {field!r} has the item {item!r:.40}, expected texts")
    return list(value)


def index_of(query, name: str) -> int:
    """The number of a query, such as that of its chunk."""
    if not isinstance(query, Mapping) or not isinstance(query.get(name), (int, float)):
        raise TypeError(f'a query is {query!r:.40}, expected {{"text": …, "{name}": a number}}')
    return int(query[name])


def number_of(row: Mapping, field: str) -> float:
    """The value of a field as a number."""
    value = pick(row, field)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"field {field!r} is {value!r:.40}, expected a number") from None


def vector_of(row: Mapping, field: str) -> np.ndarray:
    """The vector in a field, float32[n]; finite, with a direction."""
    value = pick(row, field)
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        vector = np.zeros(())
    if vector.ndim != 1 or not len(vector):
        raise TypeError(f"field {field!r} is {value!r:.40}, expected a list of numbers")
    if not np.isfinite(vector).all():
        raise ValueError(f"field {field!r} has a number that is not finite in float32")
    if not vector.any():
        raise ValueError(f"field {field!r} is a zero vector, which has no direction")
    return vector


def query_text(query) -> str:
    """The text of a query, which is a text or has one."""
    text = query if isinstance(query, str) else query["text"]
    if not isinstance(text, str):
        raise TypeError(f"a query is {text!r:.40}, expected a text")
    return text
