"""Checks of the numbers that a gin file binds."""

import math
from collections.abc import Mapping


def is_whole(value, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return type(value) is int and value >= least


def is_number(value, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a finite number from `least` to `most`."""
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def check(about, name: str, whole: Mapping[str, int], fractions: tuple[str, ...] = ()) -> None:
    """ValueError for the first field of `about` that is not allowed; `name` is its gin name.

    whole: {field: least whole number}. fractions: fields with numbers from 0 to 1.
    """
    for field, least in whole.items():
        if not is_whole(value := getattr(about, field), least):
            raise ValueError(f"{name}.{field}={value!r} must be a whole number of at least {least}")
    for field in fractions:
        if not is_number(value := getattr(about, field), 0, 1):
            raise ValueError(f"{name}.{field}={value!r} must be between 0 and 1")
