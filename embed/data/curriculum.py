"""Which example of which task stands in each slot of a step's batch: a pure function of (seed, step).

All randomness is a counter-based hash, so that it depends on no library's generator.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1024  # slots over which the shares of the tasks are exact


def make_key(*parts: int | str) -> np.uint64:
    """A 64-bit key of anything that has a fixed text."""
    return np.frombuffer(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), np.uint64)[0]


def random_bits(key: np.uint64, counters: np.ndarray) -> np.ndarray:
    """uint64 for each counter: SplitMix64 (Steele et al. 2014) started at `key`."""
    z = (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(key: np.uint64, n: int) -> np.ndarray:
    """A permutation of 0..n-1, int64[n]."""
    return np.argsort(random_bits(key, np.arange(n)), kind="stable")


def permute(key: np.uint64, index: np.ndarray, size: int) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends each index, int64, without ever holding the permutation.

    A Feistel network over the digits (left, right) of the index in a grid of barely more than `size` cells; what
    lands outside is sent on until it lands inside (cycle walking), which keeps it a bijection.
    """
    height = math.isqrt(size - 1) + 1 if size > 1 else 1
    width = -(-size // height)
    keys = random_bits(key, np.arange(6))

    def network(x):
        left, right = x // width, x % width
        for k in range(0, 6, 2):
            left = (left + (random_bits(keys[k], right) % np.uint64(height)).astype(np.int64)) % height
            right = (right + (random_bits(keys[k + 1], left) % np.uint64(width)).astype(np.int64)) % width
        return left * width + right

    x = network(np.asarray(index, np.int64))
    while (outside := x >= size).any():
        x[outside] = network(x[outside])
    return x


class Draw(NamedTuple):
    """The examples of consecutive slots."""

    task: np.ndarray  # int[n] into Curriculum.tasks
    epoch: np.ndarray  # int[n]: how often the task had been gone through before
    index: np.ndarray  # int[n]: the example in its task


class Curriculum:
    """Mixtures that change with the step: phases of (steps, {task: rate}).

    Slots are numbered from the start of their phase and cut into blocks of `BLOCK`. Each block has a fixed integer
    count a task (largest remainder) in an order permuted by (seed, phase, block). The n-th slot of a task, counted
    over all phases, is example n of the task, through a permutation for each epoch. A step at or beyond the end
    uses the last phase. Rates need not add up to 1.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[str, float]]],
        sizes: Mapping[str, int],
        *,
        seed: int,
        slots: int,
    ):
        """`sizes`: examples a task; `slots`: examples a step, over all processes."""
        if not phases:
            raise ValueError("a curriculum needs at least one phase (steps, {task: rate})")
        self.tasks = sorted({task for _, rates in phases for task, rate in rates.items() if rate})
        self.seed, self.slots, self.sizes = seed, slots, [sizes.get(task) for task in self.tasks]
        for task, size in zip(self.tasks, self.sizes):
            if size is None:
                raise ValueError(
                    f"no data for the task {task!r} of the curriculum; there is: {', '.join(sorted(sizes))}"
                )
            if size < 1:
                raise ValueError(f"the task {task!r} has no examples")
        for steps, rates in phases:
            if steps < 1 or min(rates.values(), default=0) < 0 or not any(rates.values()):
                raise ValueError(f"a phase needs at least one step and a positive rate, got ({steps}, {dict(rates)})")

        self._first_step = np.cumsum([0] + [steps for steps, _ in phases[:-1]])
        self._counts = [self._block_counts(rates) for _, rates in phases]  # a phase: int[tasks]
        self._before = [np.zeros(len(self.tasks), np.int64)]  # slots of each task before each phase
        for p, (steps, _) in enumerate(phases[:-1]):
            blocks, rest = divmod(steps * slots, BLOCK)
            tail = np.bincount(self._order(p, blocks)[:rest], minlength=len(self.tasks))
            self._before.append(self._before[p] + blocks * self._counts[p] + tail)

    def _block_counts(self, rates: Mapping[str, float]) -> np.ndarray:
        """Slots of each task in a block, by largest remainder."""
        rates = np.array([rates.get(task, 0) for task in self.tasks], np.float64)
        quota = rates / rates.sum() * BLOCK
        counts = np.floor(quota).astype(np.int64)
        counts[np.argsort(counts - quota, kind="stable")[: BLOCK - counts.sum()]] += 1
        for task, rate, count in zip(self.tasks, rates, counts):
            if rate and not count:
                raise ValueError(
                    f"the task {task!r} has the share {rate / rates.sum():.2g} of its mixture, less than one slot in "
                    f"{BLOCK}: it would never be drawn; give it more, or 0"
                )
        return counts

    def _order(self, phase: int, block: int) -> np.ndarray:
        """The task of each slot of a block, int[BLOCK]."""
        tasks = np.repeat(np.arange(len(self.tasks)), self._counts[phase])
        return tasks[shuffled(make_key(self.seed, "block", phase, block), BLOCK)]

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """The examples of slots start..stop-1 of the batch of `step`."""
        phase = int(np.searchsorted(self._first_step, step, side="right")) - 1
        begin = (step - int(self._first_step[phase])) * self.slots + start
        end = begin + stop - start
        task, nth = np.zeros((2, stop - start), np.int64)
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            order, rank = self._order(phase, block), np.zeros(BLOCK, np.int64)
            for t in range(len(self.tasks)):
                where = np.flatnonzero(order == t)
                rank[where] = self._before[phase][t] + block * self._counts[phase][t] + np.arange(len(where))
            low, high = max(begin - block * BLOCK, 0), min(end - block * BLOCK, BLOCK)
            here = slice(block * BLOCK + low - begin, block * BLOCK + high - begin)
            task[here], nth[here] = order[low:high], rank[low:high]
        epoch, index = np.zeros((2, len(task)), np.int64)
        for t, (name, size) in enumerate(zip(self.tasks, self.sizes)):
            mine = np.flatnonzero(task == t)
            epoch[mine] = nth[mine] // size
            for e in np.unique(epoch[mine]):
                now = mine[epoch[mine] == e]
                index[now] = permute(make_key(self.seed, "epoch", name, int(e)), nth[now] % size, size)
        return Draw(task, epoch, index)
