"""Rates of mixtures as the loader needs them, from the sizes of their tasks."""

from collections.abc import Mapping

from embed.preparation.settings import Mixtures
from embed.preparation.stream import Work


def of_mixtures(mixtures: Mixtures, work: Work, counts: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """{mixture: {task: relative rate of the loader}}, with size^α, rates in tokens and mixtures in mixtures worked out.

    The loader draws examples, but in diffusion rows of tokens, whose rates are in tokens already.
    """

    def is_diffusion(name: str) -> bool:
        members = mixtures.rates.get(name)
        return is_diffusion(next(iter(members))) if members else work.stage(name) == "diffusion"

    def size(name: str) -> float:
        if name in mixtures.rates:
            return sum(size(member) for member in mixtures.rates[name])
        count = counts[name]
        return sum(count["tokens"].values()) if mixtures.unit == "tokens" else count["examples"]

    def tokens_per_example(name: str) -> float:
        if name in mixtures.rates:  # of its examples, drawn at its rates
            rates = relative(name)
            return sum(r * tokens_per_example(m) for m, r in rates.items()) / sum(rates.values())
        return sum(counts[name]["tokens"].values()) / counts[name]["examples"]

    def relative(name: str) -> dict[str, float]:
        alpha = mixtures.alpha.get(name)
        rates = {m: r * (size(m) ** alpha if alpha is not None else 1) for m, r in mixtures.rates[name].items()}
        if mixtures.unit == "tokens" and not is_diffusion(name):
            rates = {member: rate / tokens_per_example(member) for member, rate in rates.items()}
        return rates

    def of_tasks(name: str) -> dict[str, float]:
        """The rates of the tasks in a mixture. One inside it shares its rate among its members, as in seqio."""
        result: dict[str, float] = {}
        for member, rate in relative(name).items():
            inner = of_tasks(member) if member in mixtures.rates else {member: 1.0}
            total = sum(inner.values())
            for task, share in inner.items():
                result[task] = result.get(task, 0.0) + rate * share / total
        return result

    return {name: of_tasks(name) for name in mixtures.rates}
