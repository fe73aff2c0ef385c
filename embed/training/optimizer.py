"""AdamW with gradient clipping and a warmup-stable-decay schedule (arXiv 2602.11151)."""

import jax
import optax


def wsd_schedule(learning_rate: float, steps: int, warmup: float, decay: float) -> optax.Schedule:
    """Linear from 0 in the first `warmup` fraction of the steps, then constant, linear to 0 in the last `decay`."""
    if warmup + decay > 1 or min(warmup, decay) < 0:
        raise ValueError(f"warmup={warmup} and decay={decay} must be fractions of the steps with a sum of at most 1")
    up, down = round(warmup * steps), round(decay * steps)
    return optax.join_schedules(
        [
            # step + 1, because a rate of 0 would waste step 0.
            lambda step: learning_rate * (step + 1) / max(up, 1),
            optax.constant_schedule(learning_rate),
            lambda step: learning_rate * (1 - (step + 1) / (down + 1)),
        ],
        [up, steps - down],
    )


def make_optimizer(config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping by global norm (none if clip is 0), then AdamW without weight decay on norm scales.

    The steps of the embedding table, its weight decay included, are `embedding_rate` times as large.
    """

    def decayed(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)

    def is_embedding(params):
        return {name: name == "embedding" for name in params}

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
            mu_dtype=config.moment_dtype,
        ),
        optax.masked(optax.scale(config.embedding_rate), is_embedding),
    )
