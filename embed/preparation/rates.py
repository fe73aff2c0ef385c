"""Rates of mixtures as the loader needs them, from the sizes of their tasks."""

from collections.abc import Mapping

from embed.preparation.settings import Mixtures
from embed.preparation.stream import Work


def of_mixtures(mixtures: Mixtures, work: Work, counts: Mapping[str, dict]) -> dict[str, dict[str, float]]:
    """{mixture: {task or mixture: relative rate of the loader}}, with size^α and rates in tokens worked out.

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

    return {name: relative(name) for name in mixtures.rates}
