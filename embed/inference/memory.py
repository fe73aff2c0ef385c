"""Texts that need more memory than there is: an error that names the text, before the work where that is possible."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

import jax

from embed.rows import Segment


class TooLongError(ValueError):
    """A text needs more memory than the machine has."""


def check_memory(lowered, name: str, segment: Segment) -> None:
    """TooLongError if the program for a text's row needs more memory than the device has."""
    analysis = lowered.compile().memory_analysis()
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    statistics = jax.local_devices()[0].memory_stats() or {}
    available = statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    if jax.default_backend() == "cpu":
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available and needed > available:
        why = f"they need {needed / 1e9:,.1f} GB, {available / 1e9:,.1f} GB are available"
        raise TooLongError(_too_long(name, segment, why))


def _too_long(name: str, segment: Segment, why: str) -> str:
    return (
        f"{name} has {len(segment.tokens):,} tokens, too many for the memory of this machine ({why}): shorten it, "
        f"or cut it with truncate=True and a max_length (--truncate --max_length=N)"
    )


@contextlib.contextmanager
def out_of_memory(name: Callable, segments: Sequence[Segment], longest: int) -> Iterator[None]:
    """Turn what the runtime raises when memory is used up into TooLongError."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = "it was used up; with many texts, a smaller batch_tokens helps"
        raise TooLongError(_too_long(name(longest), segments[longest], why)) from error
