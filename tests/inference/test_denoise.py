import jax
import numpy as np
import pytest

from embed import config as configs
from embed.inference import denoise
from embed.models import transformer
from embed.training import optimizer, stages
from embed.training.step import make_train_step

MASK, FIRST, CYCLE, LENGTH = 2, 4, 12, 16
MODEL = transformer.make_config("micro", FIRST + CYCLE)


def counting(rows: int, seed: int) -> np.ndarray:
    """Texts that count up modulo CYCLE from a random start, so that one token determines all others."""
    start = np.random.default_rng(seed).integers(0, CYCLE, (rows, 1))
    return (FIRST + (start + np.arange(LENGTH)) % CYCLE).astype(np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["same position", "left shift"])
def trained(request):
    """(left shift, parameters) after a short diffusion stage on that language."""
    rates = dict(learning_rate=1e-2, warmup=0.1, decay=0.5, b2=0.98, weight_decay=0.0)
    stage = configs.base().stage("diffusion", execution=dict(logits_chunk=LENGTH), optimizer=rates)
    config = stage.optimizer
    steps = 300
    tx = optimizer.make_optimizer(config, optimizer.wsd_schedule(config.learning_rate, steps, 0.1, 0.5))
    step = jax.jit(make_train_step(stages.make_loss(stage, MODEL, MASK, request.param), tx, steps))
    params = transformer.init(MODEL, jax.random.key(0))
    state = tx.init(params)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (64, 1))
    for k in range(steps):
        batch = {"tokens": counting(64, k), "segment_ids": np.ones_like(positions), "positions": positions}
        params, state, _ = step(params, state, batch, k, 0)
    return request.param, params


def test_a_trained_model_recovers_a_text_from_a_quarter_of_its_tokens(trained):
    left_shift, params = trained
    wrong = 0
    for text in counting(20, seed=1000):
        noised = text.copy()
        noised[np.arange(LENGTH) % 4 != 0] = MASK
        states = denoise.denoise(
            params, MODEL, noised, mask_id=MASK, tokens_per_step=2, left_shift=left_shift, length=LENGTH
        )
        wrong += int((states[-1] != text).sum())
    assert wrong <= 2  # of 240 masked tokens


def test_held_out_loss_is_low_and_accuracy_high(trained):
    left_shift, params = trained
    levels, elbo = denoise.elbo_and_accuracy(
        params, MODEL, counting(64, seed=1000), mask_id=MASK, left_shift=left_shift, levels=(0.3, 0.9), chunk=LENGTH
    )
    assert levels["0.3"]["accuracy"] > 0.98 and levels["0.3"]["nll"] < 0.1
    assert levels["0.9"]["accuracy"] < levels["0.3"]["accuracy"]
    assert elbo < np.log(CYCLE) / 4


def random_params():
    return transformer.init(MODEL, jax.random.key(1))


def test_a_step_unmasks_the_most_confident_tokens_and_changes_no_other():
    text = counting(1, seed=0)[0]
    text[[1, 4, 5, 9, 12]] = MASK
    states = denoise.denoise(random_params(), MODEL, text, mask_id=MASK, tokens_per_step=2, length=LENGTH)
    assert [int((s == MASK).sum()) for s in states] == [5, 3, 1, 0]
    for state in states:
        np.testing.assert_array_equal(state[text != MASK], text[text != MASK])
    valid = np.ones((1, LENGTH), bool)
    best, confidence = denoise._predict(random_params(), text[None], valid, model=MODEL, mask_id=MASK, left_shift=False)
    masked = np.flatnonzero(text == MASK)
    first = masked[np.argsort(-np.asarray(confidence)[masked])[:2]]
    assert set(np.flatnonzero(states[0] != states[1])) == set(first)
    np.testing.assert_array_equal(states[1][first], np.asarray(best)[first])


@pytest.mark.parametrize(
    "tokens, keywords, message",
    [
        ([5, MASK], dict(tokens_per_step=0), "tokens_per_step=0 must be at least 1"),
        ([], dict(tokens_per_step=1), "0 tokens to denoise: must be between 1 and 16"),
        ([5] * 17, dict(tokens_per_step=1), "17 tokens to denoise"),
        ([MASK, 5], dict(tokens_per_step=1, left_shift=True), "the first token cannot be masked"),
    ],
)
def test_wrong_input_is_an_error_that_names_the_value(tokens, keywords, message):
    with pytest.raises(ValueError, match=message):
        denoise.denoise(random_params(), MODEL, np.array(tokens, np.int32), mask_id=MASK, length=LENGTH, **keywords)
