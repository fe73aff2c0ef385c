"""Which texts are computed together: packed rows of few shapes, because each shape compiles a program."""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from embed.rows import RowShape, Segment

MIN_ROW_LENGTH = 64
TOKENS_PER_SPAN = 8  # a row of L tokens has L / 8 span slots
FINE_WORK = 4e11  # tokens times parameters of some ten seconds on two cores: more than this pays for finer lengths
FINE_LENGTH = 64  # longer rows have them


def batches(
    segments: Sequence[Segment], batch_tokens: int, shards: int = 1, fine: bool = False
) -> Iterator[tuple[list, np.ndarray, RowShape, int]]:
    """(segment indices, row of each, row shape, number of rows), longest segments first, every segment once.

    The length of a row is the power of two that holds the longest remaining segment. Then the longest segment that fits
    the free tokens goes in, until none fits. Shapes repeat, so few programs are compiled: a batch has batch_tokens // L
    rows, the last one the smallest sufficient power of four, both rounded up to a multiple of `shards`. A segment
    claims max(tokens, 8 · spans), so that L / 8 span slots always suffice.

    With `fine`, lengths above FINE_LENGTH are multiples of an eighth of that power. On CPU each token is compared with
    its whole row, so many texts gain more by shorter rows than the additional programs cost.
    """
    stacks: dict[int, list[int]] = {}
    for i in reversed(range(len(segments))):
        claim = max(len(segments[i].tokens), TOKENS_PER_SPAN * int(segments[i].num_spans))
        stacks.setdefault(claim, []).append(i)
    claims = sorted(stacks)
    while claims:
        length = max(MIN_ROW_LENGTH, 1 << (claims[-1] - 1).bit_length())
        if fine and length > FINE_LENGTH:
            length = -(-claims[-1] // (length // 8)) * (length // 8)
        num_rows = -(-max(1, batch_tokens // length) // shards) * shards
        members, rows = [], []
        for row in range(num_rows):
            free = length
            while k := bisect.bisect_right(claims, free):
                claim = claims[k - 1]
                members.append(stacks[claim].pop())
                rows.append(row)
                free -= claim
                if not stacks[claim]:
                    del claims[k - 1]
        used = rows[-1] + 1
        if used < num_rows:
            num_rows = min(num_rows, -(-(4 ** -(-(used - 1).bit_length() // 2)) // shards) * shards)
        spans = length // TOKENS_PER_SPAN
        yield members, np.array(rows), RowShape(length, spans, spans), num_rows
