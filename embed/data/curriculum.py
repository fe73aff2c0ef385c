"""Which example of which task fills each slot of a batch: a pure function of (seed, step).

All randomness comes from a counter-based hash, so it does not depend on the random generator of any library.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BLOCK = 1024  # slots; in each block of them the proportions of the tasks are exact


def make_key(*parts: int | str) -> np.uint64:
    """A 64-bit key: the hash of `repr(parts)`."""
    return np.frombuffer(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), np.uint64)[0]


def random_bits(key: np.uint64, counters: np.ndarray) -> np.ndarray:
    """A random uint64 for each counter, same shape: SplitMix64 (Steele et al. 2014) seeded with `key`."""
    z = (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(key: np.uint64, n: int) -> np.ndarray:
    """A random permutation of 0..n-1, int64[n]."""
    return np.argsort(random_bits(key, np.arange(n)), kind="stable")


def permute(key: np.uint64, index: np.ndarray, size: int) -> np.ndarray:
    """The images of `index` under a random permutation of 0..size-1, int64, without storing the permutation.

    The permutation is a Feistel network over the row and column (left, right) of an index in a grid of slightly more
    than `size` cells. An image outside 0..size-1 goes through the network again until it is inside (cycle walking), so
    the result stays a bijection.
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
    """The examples in n consecutive slots of a batch."""

    task: np.ndarray  # int[n], index into Curriculum.tasks
    epoch: np.ndarray  # int[n], complete passes over the task before this example
    index: np.ndarray  # int[n], index of the example in its task


class Curriculum:
    """Mixtures of tasks that change with the step: phases of (steps, {task: rate}).

    A batch has `slots` slots, one example each. Slots are numbered from the start of their phase and divided into
    blocks of `BLOCK`. Every block has the same integer number of slots per task (largest remainder), in an order that
    is shuffled by (seed, phase, block). The n-th slot of a task, counted over all phases, holds the n-th example of the
    task's shuffled stream: every epoch is a new permutation of the task. After its last step the last phase continues.
    Rates need not add up to 1.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[str, float]]],
        sizes: Mapping[str, int],
        *,
        seed: int,
        slots: int,
    ):
        """`sizes` are the numbers of examples per task; `slots` is the number of examples in a global batch."""
        if not phases:
            raise ValueError("a curriculum needs at least one phase (steps, {task: rate})")
        self.tasks = sorted({task for _, rates in phases for task, rate in rates.items() if rate})
        self.seed, self.slots, self.sizes = seed, slots, [sizes.get(task) for task in self.tasks]
        for task, size in zip(self.tasks, self.sizes):
            if size is None:
                raise ValueError(
                    f"no data for the task {task!r} of the curriculum; prepared tasks: {', '.join(sorted(sizes))}"
                )
            if size < 1:
                raise ValueError(f"the task {task!r} has no examples")
        for steps, rates in phases:
            if steps < 1 or min(rates.values(), default=0) < 0 or not any(rates.values()):
                raise ValueError(f"a phase needs at least one step and a positive rate, got ({steps}, {dict(rates)})")

        self._first_step = np.cumsum([0] + [steps for steps, _ in phases[:-1]])
        self._counts = [self._block_counts(rates) for _, rates in phases]  # per phase: int[tasks]
        self._before = [np.zeros(len(self.tasks), np.int64)]  # per phase: slots of each task before it, int[tasks]
        for p, (steps, _) in enumerate(phases[:-1]):
            blocks, remainder = divmod(steps * slots, BLOCK)
            tail = np.bincount(self._order(p, blocks)[:remainder], minlength=len(self.tasks))
            self._before.append(self._before[p] + blocks * self._counts[p] + tail)

    def _block_counts(self, rates: Mapping[str, float]) -> np.ndarray:
        """The slots of each task in a block, by largest remainder, int[tasks]."""
        rates = np.array([rates.get(task, 0) for task in self.tasks], np.float64)
        quota = rates / rates.sum() * BLOCK
        counts = np.floor(quota).astype(np.int64)
        counts[np.argsort(counts - quota, kind="stable")[: BLOCK - counts.sum()]] += 1
        for task, rate, count in zip(self.tasks, rates, counts):
            if rate and not count:
                raise ValueError(
                    f"the task {task!r} has a share of {rate / rates.sum():.2g} in its mixture, less than one slot in "
                    f"{BLOCK}: it would never be drawn; raise its rate or set it to 0"
                )
        return counts

    def _order(self, phase: int, block: int) -> np.ndarray:
        """The task of each slot of a block, int[BLOCK]."""
        tasks = np.repeat(np.arange(len(self.tasks)), self._counts[phase])
        return tasks[shuffled(make_key(self.seed, "block", phase, block), BLOCK)]

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """The examples in slots start..stop-1 of the batch of `step`."""
        phase = int(np.searchsorted(self._first_step, step, side="right")) - 1
        begin = (step - int(self._first_step[phase])) * self.slots + start
        end = begin + stop - start
        # The task of each slot, and how many slots of the task come before it.
        task, rank = np.zeros((2, stop - start), np.int64)
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            order, block_rank = self._order(phase, block), np.zeros(BLOCK, np.int64)
            for t in range(len(self.tasks)):
                of_task = np.flatnonzero(order == t)
                first = self._before[phase][t] + block * self._counts[phase][t]
                block_rank[of_task] = first + np.arange(len(of_task))
            low, high = max(begin - block * BLOCK, 0), min(end - block * BLOCK, BLOCK)
            out = slice(block * BLOCK + low - begin, block * BLOCK + high - begin)
            task[out], rank[out] = order[low:high], block_rank[low:high]
        epoch, index = np.zeros((2, len(task)), np.int64)
        for t, (name, size) in enumerate(zip(self.tasks, self.sizes)):
            of_task = np.flatnonzero(task == t)
            epoch[of_task] = rank[of_task] // size
            for e in np.unique(epoch[of_task]):
                of_epoch = of_task[epoch[of_task] == e]
                index[of_epoch] = permute(make_key(self.seed, "epoch", name, int(e)), rank[of_epoch] % size, size)
        return Draw(task, epoch, index)
