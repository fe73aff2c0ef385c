"""Which example of which task fills each slot of a batch: a pure function of (seed, step).

All randomness comes from a counter-based hash, so it does not depend on the random generator of any library.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = 10
BLOCK = 1 << BITS  # slots; in each block of them the proportions of the tasks are exact within one slot
PERIOD = BLOCK * BLOCK  # slots; in each period of them the proportions are exact
_REVERSED = np.array([int(f"{i:0{BITS}b}"[::-1], 2) for i in range(BLOCK)])  # the bits of 0..BLOCK-1, reversed


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


def permute(key: np.ndarray, index: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The image of each index under a random permutation of 0..size-1, int64[n], without storing the permutation.

    Each index has a key and a size of its own, or all share one. The permutation is a Feistel network over the row and
    column (left, right) of an index in a grid of slightly more than `size` cells. An image outside 0..size-1 goes
    through the network again until it is inside (cycle walking), so the result stays a bijection.
    """
    key, x, size = np.broadcast_arrays(key, np.asarray(index, np.int64), np.asarray(size, np.int64))
    height = np.ceil(np.sqrt(size)).astype(np.int64)
    width = -(-size // height)
    keys = random_bits(key, np.arange(6)[:, None])

    def network(x, keys, height, width):
        left, right = x // width, x % width
        for k in range(0, 6, 2):
            left = (left + (random_bits(keys[k], right) % height.astype(np.uint64)).astype(np.int64)) % height
            right = (right + (random_bits(keys[k + 1], left) % width.astype(np.uint64)).astype(np.int64)) % width
        return left * width + right

    x = network(x, keys, height, width)
    while len(outside := np.flatnonzero(x >= size)):
        x[outside] = network(x[outside], keys[:, outside], height[outside], width[outside])
    return x


class Draw(NamedTuple):
    """The examples in n consecutive slots of a batch."""

    task: np.ndarray  # int[n], index into Curriculum.tasks
    epoch: np.ndarray  # int[n], complete passes over the task before this example
    index: np.ndarray  # int[n], index of the example in its task


class Curriculum:
    """Mixtures of tasks that change with the step: phases of (steps, {task: rate}).

    A batch has `slots` slots, one example each. Slots are numbered from the start of their phase. Every period of
    PERIOD = 2^20 slots has the same integer number of slots per task (largest remainder), and every block of BLOCK =
    1,024 has its share of them within one slot, in an order that is shuffled by (seed, phase, block). The n-th slot of
    a task, counted over all phases, holds the n-th example of the task's shuffled stream: every epoch is a new
    permutation of the task. After its last step the last phase continues. Rates need not add up to 1.

    With `homogeneous`, all slots of a batch have one task, and the same holds for batches instead of slots.

    A period is a lattice of BLOCK x BLOCK points 0..PERIOD-1, and each task has an interval of them. Block j holds the
    points BLOCK * i + v(j) for all i. v(j) is j with its bits reversed (a van der Corput sequence), and a random number
    per period flips bits of it. So the number of earlier points in an interval is a closed form.
    """

    def __init__(
        self,
        phases: Sequence[tuple[int, Mapping[str, float]]],
        sizes: Mapping[str, int],
        *,
        seed: int,
        slots: int,
        homogeneous: bool = False,
    ):
        """`sizes` are the numbers of examples per task; `slots` is the number of examples in a global batch."""
        if not phases:
            raise ValueError("a curriculum needs at least one phase (steps, {task: rate})")
        self.tasks = sorted({task for _, rates in phases for task, rate in rates.items() if rate})
        self.seed, self.slots, self.homogeneous = seed, slots, homogeneous
        for task in self.tasks:
            if (size := sizes.get(task)) is None:
                raise ValueError(
                    f"no data for the task {task!r} of the curriculum; prepared tasks: {', '.join(sorted(sizes))}"
                )
            if size < 1:
                raise ValueError(f"the task {task!r} has no examples")
        self.sizes = np.array([sizes[task] for task in self.tasks], np.int64)
        for steps, rates in phases:
            if steps < 1 or min(rates.values(), default=0) < 0 or not any(rates.values()):
                raise ValueError(f"a phase needs at least one step and a positive rate, got ({steps}, {dict(rates)})")

        self._first_step = np.cumsum([0] + [steps for steps, _ in phases[:-1]])
        self._bounds = [self._intervals(rates) for _, rates in phases]  # per phase: int[tasks + 1]
        self._before = [np.zeros(len(self.tasks), np.int64)]  # per phase: slots of each task before it, int[tasks]
        for p, (steps, _) in enumerate(phases[:-1]):
            blocks, remainder = divmod(steps * (1 if homogeneous else slots), BLOCK)
            last = np.bincount(self._blocks(p, blocks, blocks + 1)[0, :remainder], minlength=len(self.tasks))
            self._before.append(self._before[p] + self._earlier(p, blocks) + last)

    def _intervals(self, rates: Mapping[str, float]) -> np.ndarray:
        """The bounds of each task's interval in 0..PERIOD, int[tasks + 1]: slots by largest remainder."""
        rates = np.array([rates.get(task, 0) for task in self.tasks], np.float64)
        quota = rates / rates.sum() * PERIOD
        for task, rate, share in zip(self.tasks, rates, quota / PERIOD):
            if rate and share * PERIOD < 1 - 1e-9:
                raise ValueError(
                    f"the task {task!r} has a share of {share:.2g} in its mixture, less than one in {PERIOD}; raise "
                    "its rate or set it to 0"
                )
        counts = np.floor(quota + 1e-9).astype(np.int64)
        counts[np.argsort(counts - quota, kind="stable")[: PERIOD - counts.sum()]] += 1
        return np.concatenate([[0], np.cumsum(counts)])

    def _flips(self, phase: int, period: int) -> int:
        """The bits that are flipped in v(j) of a period."""
        return int(make_key(self.seed, "period", phase, period)) % BLOCK

    def _blocks(self, phase: int, first: int, last: int) -> np.ndarray:
        """The task of each slot of blocks first..last-1, int[blocks, BLOCK]."""
        points = np.empty((last - first, BLOCK), np.int64)
        for row, block in enumerate(range(first, last)):
            period, j = divmod(block, BLOCK)
            points[row] = _REVERSED[j] ^ self._flips(phase, period)
        keys = np.array([make_key(self.seed, "block", phase, block) for block in range(first, last)], np.uint64)
        points += BLOCK * np.argsort(random_bits(keys[:, None], np.arange(BLOCK)), axis=1, kind="stable")
        return np.searchsorted(self._bounds[phase], points, "right") - 1

    def _earlier(self, phase: int, block: int) -> np.ndarray:
        """The slots of each task in the blocks of a phase before `block`, int[tasks]."""
        bounds = self._bounds[phase]
        periods, j = divmod(block, BLOCK)
        v = np.sort(_REVERSED[:j] ^ self._flips(phase, periods))
        return np.diff(periods * bounds + j * (bounds // BLOCK) + np.searchsorted(v, bounds % BLOCK))

    def _slots(self, phase: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Of slots begin..end-1 of a phase: the task, and the number of the task's slots before, int[n] each."""
        first, last = begin // BLOCK, -(-end // BLOCK)
        tasks = self._blocks(phase, first, last).reshape(-1)
        order = np.argsort(tasks, kind="stable")
        counts = np.bincount(tasks, minlength=len(self.tasks))
        earlier = self._before[phase] + self._earlier(phase, first)
        rank = np.empty(len(tasks), np.int64)
        rank[order] = np.arange(len(tasks)) + np.repeat(earlier - (np.cumsum(counts) - counts), counts)
        inside = slice(begin - first * BLOCK, end - first * BLOCK)
        return tasks[inside], rank[inside]

    def draw(self, step: int, start: int, stop: int) -> Draw:
        """The examples in slots start..stop-1 of the batch of `step`."""
        phase = int(np.searchsorted(self._first_step, step, side="right")) - 1
        step_of_phase = step - int(self._first_step[phase])
        if self.homogeneous:
            (task,), (batch,) = self._slots(phase, step_of_phase, step_of_phase + 1)
            task, rank = np.full(stop - start, task), batch * self.slots + np.arange(start, stop)
        else:
            task, rank = self._slots(phase, step_of_phase * self.slots + start, step_of_phase * self.slots + stop)
        size = self.sizes[task]
        epoch, index = np.divmod(rank, size)
        streams, inverse = np.unique(epoch * len(self.tasks) + task, return_inverse=True)
        pairs = zip(*(x.tolist() for x in np.divmod(streams, len(self.tasks))))
        keys = [make_key(self.seed, "epoch", self.tasks[t], e) for e, t in pairs]
        return Draw(task, epoch, permute(np.array(keys, np.uint64)[inverse], index, size))
