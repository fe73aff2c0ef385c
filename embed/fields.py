"""The allowed values of config fields. `check` refuses other values by name, before any work."""

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping

from ml_collections import ConfigDict

from embed.config import leaves, nearest
from embed.models import pooling, quantization, transformer
from embed.objectives import masked_diffusion

Rule = tuple[Callable, str]  # (whether a value is allowed, the allowed values in words)


LARGEST = 2**31 - 1  # of int32, in which jax computes
LARGEST_FLOAT = 3.4e38  # of float32


def _number(allowed: Callable = lambda x: True) -> Callable:
    """Whether a value is a number, finite in float32, that `allowed` accepts."""
    return lambda value: type(value) in (int, float) and abs(value) <= LARGEST_FLOAT and allowed(value)


def _whole(allowed: Callable) -> Callable:
    """Whether a value is a whole number of at most LARGEST that `allowed` accepts."""
    return lambda value: type(value) is int and value <= LARGEST and allowed(value)


def _each(rule: Rule) -> Rule:
    return lambda values: _is_list(values) and all(map(rule[0], values)), f"each {rule[1]}"


def _is_list(values) -> bool:
    return isinstance(values, tuple | list)


def _is_name(value) -> bool:
    return isinstance(value, str) and value != ""


def _one_of(*values: str) -> Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _is_fraction(value) -> bool:
    return _number(lambda x: 0 <= x <= 1)(value)


def _are_two_fractions(values) -> bool:
    return _is_list(values) and len(values) == 2 and all(map(_is_fraction, values))


def _is_window(values) -> bool:
    return _is_list(values) and len(values) == 2 and all(map(COUNT_OR_0[0], values)) and values[0] < values[1]


def _are_variants(values) -> bool:
    return _is_list(values) and all(
        _is_list(value) and len(value) == 2 and _is_name(value[0]) and isinstance(value[1], Mapping) for value in values
    )


COUNT = _whole(lambda n: n >= 1), f"at least 1 and at most {LARGEST}"
COUNT_OR_0 = _whole(lambda n: n >= 0), f"at least 0 and at most {LARGEST}"
NUMBER = _number(), "a finite number"
NOT_NEGATIVE = _number(lambda x: x >= 0), "at least 0"
POSITIVE = _number(lambda x: x > 0), "above 0"
FRACTION = _is_fraction, "from 0 to 1"
PAIR_OF_FRACTIONS = _are_two_fractions, "two numbers from 0 to 1"
NAMES = _each((_is_name, "a name"))
BOOLEAN = lambda value: type(value) is bool, "True or False"
WINDOW = _is_window, "(lo, hi) with 0 <= lo < hi"

# The first pattern that matches a field's name gives its rule. A field without a match may have any value of its type.
RULES: dict[str, Rule] = {
    "seed": COUNT_OR_0,
    "model.vocab_size": COUNT_OR_0,
    "model.rope_theta": POSITIVE,
    "model.norm_eps": POSITIVE,
    "model.head_dim": (_whole(lambda n: n >= 2 and n % 2 == 0), "even and at least 2"),
    "model.num_*": COUNT,
    "model.*_size": COUNT,
    "data.mask_id": (_whole(lambda n: n >= -1), f"at least -1 and at most {LARGEST}"),
    "data.vocab_size": COUNT_OR_0,
    "data.seed": COUNT_OR_0,
    "data.gin_bindings": NAMES,
    "data.limit": COUNT_OR_0,
    "execution.mesh.*": (_whole(lambda n: n >= 1 or n == -1), "at least 1, or -1"),
    "execution.unroll": COUNT,
    "execution.readers": (_whole(lambda n: 0 <= n <= 1024), "at least 0 and at most 1024"),
    "execution.cache_bytes": (lambda n: type(n) is int and 0 <= n < 1 << 63, "at least 0 and below 2^63"),
    "execution.read_timeout": (_number(lambda x: 0 <= x <= 1e9), "from 0 to 1e9"),  # no thread waits longer
    "stages.*.init_step": COUNT_OR_0,
    "stages.*.optimizer.learning_rate": POSITIVE,
    "stages.*.optimizer.embedding_rate": NOT_NEGATIVE,
    "stages.*.optimizer.warmup": FRACTION,
    "stages.*.optimizer.decay": FRACTION,
    "stages.*.optimizer.b?": (_number(lambda x: 0 <= x < 1), "at least 0 and below 1"),
    "stages.*.optimizer.eps": POSITIVE,
    "stages.*.optimizer.weight_decay": NOT_NEGATIVE,
    "stages.*.optimizer.clip": NOT_NEGATIVE,
    "stages.*.optimizer.moment_dtype": _one_of("float32", "bfloat16"),
    "stages.*.batch.truncate_probability": FRACTION,
    "stages.*.batch.rows_per_group": COUNT_OR_0,
    "stages.*.batch.homogeneous": BOOLEAN,
    "stages.*.batch.*": COUNT,
    "stages.*.execution.milestone_every": COUNT_OR_0,
    "stages.*.execution.evaluate_every": COUNT_OR_0,
    "stages.*.execution.max_skipped": COUNT_OR_0,
    "stages.*.execution.evaluate_on": NAMES,
    "stages.*.execution.*": COUNT,
    "stages.*.left_shift": _one_of("auto", "True", "False"),
    "stages.*.noise": _one_of(*masked_diffusion.NOISES),
    "stages.*.mask_ratio": (_number(lambda x: 0 < x <= 1), "above 0 and at most 1"),
    "stages.*.anneal": FRACTION,
    "stages.*.attention": _one_of("bidirectional", "causal"),
    "stages.*.pooling": _one_of(*pooling.POOLINGS),
    "stages.*.quantization": _one_of(*quantization.QUANTIZERS),
    "stages.*.matryoshka_weights": _each((_number(lambda x: x > 0), "above 0")),
    "stages.*.spread_out": NOT_NEGATIVE,
    "stages.*.query_negatives": BOOLEAN,
    "stages.*.chunking": _one_of("late", "early"),
    "stages.*.temperature": POSITIVE,
    "stages.*.token_dimensions": COUNT,
    "stages.*.margin": (_number(lambda x: x >= 0), "at least 0; 2 = no mask"),
    "stages.*.alpha": FRACTION,
    "stages.*.beta": PAIR_OF_FRACTIONS,
    "stages.*.teacher_dimensions": COUNT,
    "stages.*.cosine": NOT_NEGATIVE,
    "stages.*.mse": NOT_NEGATIVE,
    "stages.*.kl": NOT_NEGATIVE,
    "mining.*.step": COUNT_OR_0,
    "mining.*.precision": _one_of("float32", "int8"),
    "mining.*.queries": COUNT_OR_0,
    "mining.*.num_negatives": COUNT,
    "mining.*.rank_window": WINDOW,
    "mining.*.margin": NUMBER,
    "mining.*.tasks": (
        lambda names: NAMES[0](names) and 0 < len(names) == len(set(names)),
        "at least one name, each only once",
    ),
    "mining.*.pool": _one_of("own", "union"),
    "merges.*.of": (lambda names: NAMES[0](names) and len(names) == 2, "two names"),
    "merges.*.method": _one_of("slerp", "linear"),
    "merges.*.ratio": FRACTION,
    "merges.*.sweep": _each(FRACTION),
    "merges.*.sweep_on": NAMES,
    "evaluations.*.checkpoints": NAMES,
    "evaluations.*.rope_theta": NOT_NEGATIVE,
    "evaluations.*.truncate_dim": COUNT_OR_0,
    "evaluations.*.needle_tokens": COUNT_OR_0,
    "ablation.variants": (_are_variants, '((name, {"key.key": value}), …)'),
    "ablation.seeds": (
        lambda seeds: _is_list(seeds) and 0 < len(seeds) == len(set(seeds)) and all(map(COUNT_OR_0[0], seeds)),
        "at least one whole number from 0, each only once",
    ),
    "ablation.plot": _one_of("dots", "curve"),
    "report.fuse": NAMES,
    "card.languages": NAMES,
    "exports.*.max_length": COUNT_OR_0,
    "report.mask_fraction": (_number(lambda x: 0 < x <= 1), "above 0 and at most 1"),
    "report.tokens_per_step": COUNT,
}
# {kind of stage: a field that its batches or its loss need}.
KINDS = {
    "causal": "batch.rows",
    "diffusion": "noise",
    "pair": "margin",
    "contextual": "batch.max_chunks",
    "triplet": "batch.num_negatives",
    "distill": "teacher_dimensions",
    "late_interaction": "token_dimensions",
}


def check(config: ConfigDict) -> None:
    """Raises ValueError for the first field with a value that no run can use."""
    for key, value in leaves(config):
        if value is None:  # ml_collections allows it in every field
            _refuse(key, value, "a value")
        rule = next((rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(key, pattern)), None)
        if rule and not rule[0](value):
            _refuse(key, value, rule[1])
    if sum(size == -1 for size in config.execution.mesh.values()) > 1:
        _refuse("execution.mesh", config.execution.mesh.to_dict(), "at least 1, or -1 for at most one axis")
    transformer.from_config(config.model, config.execution, 1)
    for name, stage in config.stages.items():
        for key, value, allowed in _stage(stage, config.model.hidden_size):
            _refuse(f"stages.{name}.{key}", value, allowed)
        if stage.get("anneal") and config.execution.attention not in ("auto", "xla"):
            allowed = f"0 with execution.attention={config.execution.attention!r}: only xla can anneal the mask"
            _refuse(f"stages.{name}.anneal", stage.anneal, allowed)
    for name, entry in config.evaluations.items():
        if entry.needle_tokens and entry.bm25:
            _refuse(f"evaluations.{name}.bm25", True, "False with needle_tokens: BM25 ranks the texts as they are")
        if entry.truncate_dim % 8 or entry.truncate_dim > config.model.hidden_size:
            allowed = f"a multiple of 8, at most the {config.model.hidden_size} dimensions of the model"
            _refuse(f"evaluations.{name}.truncate_dim", entry.truncate_dim, allowed)
    data = config.data
    if not data.tokenizer and data.vocab_size < (least := least_vocabulary(data.split_identifiers)):
        _refuse("data.vocab_size", data.vocab_size, f"at least {least}: the control pieces and single characters")


def least_vocabulary(split_identifiers: bool) -> int:
    """Minimum size of a SentencePiece vocabulary that `embed.preparation.vocabulary` trains on common texts.

    It has four control pieces and either printable ASCII in one case, with the space, or all bytes for the fallback.
    """
    return 4 + (len({chr(code).lower() for code in range(0x20, 0x7F)}) if split_identifiers else 256)


def _refuse(key: str, value, allowed: str):
    raise ValueError(f"config.{key}={value!r} must be {allowed}")


def _stage(stage: ConfigDict, dimensions: int) -> Iterator[tuple[str, object, str]]:
    """(field, value, allowed values in words) per wrong field of a stage. Covers fields that depend on other fields."""
    kind, batch, optimizer = stage.kind, stage.batch, stage.optimizer
    if kind not in KINDS:
        yield "kind", kind, f"one of {', '.join(KINDS)}{nearest(kind, KINDS)}"
    if KINDS[kind] not in dict(leaves(stage)):
        yield "kind", kind, f"the kind given to base.stage: a {kind} stage has {KINDS[kind]}"
    if not _is_curriculum(stage.curriculum):
        yield "curriculum", stage.curriculum, "((steps, mixture or {task: rate}), …) with at least one step each"
    if optimizer.warmup + optimizer.decay > 1:
        yield "optimizer.warmup", optimizer.warmup, f"at most {1 - optimizer.decay:g} (1 - optimizer.decay)"
    is_text = kind in ("causal", "diffusion")
    rows = batch.rows if is_text else batch.groups * batch.rows_per_group
    for name in ("length", "spans", "segments"):
        if rows * batch.get(name, 0) > LARGEST:
            yield f"batch.{name}", batch[name], f"at most {LARGEST // rows}, because a batch has {rows} rows"
    if rows % stage.execution.microbatches:
        yield "execution.microbatches", stage.execution.microbatches, f"a divisor of the {rows} rows of a batch"
    if is_text:
        return
    prefixes, weights = stage.get("matryoshka", (1,)), stage.get("matryoshka_weights", ())  # not in late interaction
    if not prefixes or not all(type(p) is int and 1 <= p <= dimensions for p in prefixes):
        yield "matryoshka", prefixes, f"prefixes from 1 to the {dimensions} dimensions of the model, at least one"
    if weights and len(weights) != len(prefixes):
        yield "matryoshka_weights", weights, f"() or {len(prefixes)} weights, one for each prefix"
    examples = batch.groups * batch.group_size
    for name in ("max_chunks", "max_queries_per_document", "num_negatives"):
        if examples * batch.get(name, 0) > LARGEST:
            yield (
                f"batch.{name}",
                batch[name],
                f"at most {LARGEST // examples}, because a batch has {examples} examples",
            )
    if kind == "distill":
        if not stage.cosine + stage.mse + stage.kl:
            yield "kl", stage.kl, "above 0 where cosine and mse are 0: the stage would have no loss"
        if max(prefixes) > stage.teacher_dimensions and stage.cosine + stage.mse:
            yield (
                "matryoshka",
                prefixes,
                f"prefixes of at most teacher_dimensions={stage.teacher_dimensions}: cosine={stage.cosine} and "
                f"mse={stage.mse} compare vectors of the same dimensions; with both 0, kl compares any",
            )
        if examples * stage.teacher_dimensions > LARGEST:
            yield (
                "teacher_dimensions",
                stage.teacher_dimensions,
                f"at most {LARGEST // examples}, because a batch has {examples} texts",
            )
    if kind == "contextual" and batch.max_chunks > batch.spans:
        yield "batch.max_chunks", batch.max_chunks, f"at most batch.spans={batch.spans}"
    # Every text has a token, an embedding and a segment of its own. A document has at least one chunk and one query.
    texts = batch.group_size * (1 if kind == "distill" else 2 + batch.get("num_negatives", 0))
    per_row = min(batch.length, batch.spans, batch.segments)
    if 0 < batch.rows_per_group * per_row < texts:
        allowed = f"at least {-(-texts // per_row)}: a group has {texts} texts, and a row holds at most {per_row}, the "
        yield "batch.rows_per_group", batch.rows_per_group, allowed + "smallest of batch.length, spans and segments"


def _is_curriculum(curriculum) -> bool:
    try:
        for steps, mixture in curriculum:
            rates = [1.0] if isinstance(mixture, str) else [float(rate) for rate in dict(mixture).values()]
            if isinstance(steps, bool) or int(steps) != steps or steps < 1 or min(rates) < 0:
                return False
            if not (sum(rates) and math.isfinite(sum(rates))):
                return False
        return 0 < sum(steps for steps, _ in curriculum) <= LARGEST
    except (TypeError, ValueError, OverflowError):
        return False
