"""The encoder: the Qwen3 architecture with bidirectional attention (arXiv 2602.11151), in Flax NNX.

Parameters stay outside the module as a plain nested dict of arrays, so that checkpoints, sharding rules, merging and
export see one simple tree. `apply` binds them to the module for one call:

    params = init(config, key)
    hidden = apply(config, params, tokens, segment_ids, positions)      # [R, L, D]
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from embed.models.attention import KERNELS, attention
from embed.typing import Array, typechecked

FINAL_NORM = 0.4  # scale of the final norm at random init
REMAT_POLICIES = {
    "none": None,  # keep every activation
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only a layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the outputs of the weight products
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and numerics of an encoder. Hashable, so it can be a static argument of jit."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tied: bool = True  # whether the embedding table is also the output layer of the diffusion stage
    token_dimensions: int = 0  # of the token vectors of late interaction; 0 = none
    attention: str = "auto"  # embed.models.attention.KERNELS
    dtype: str = "float32"  # of the compute; parameters are always float32
    remat: str = "none"  # a key of REMAT_POLICIES
    unroll: int = 1  # layers per scan iteration; on CPU, unrolling all is fastest
    dense_barrier: bool = False  # see `dense`; for CPU

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.attention not in KERNELS:
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(KERNELS)}")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r} must be one of {sorted(REMAT_POLICIES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be float32 or bfloat16 (float16 overflows in this model)")


# hidden / layers / heads / kv heads / head_dim / ffn
SIZES = {
    "0.6b": dict(hidden_size=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, intermediate_size=3072),
    "4b": dict(hidden_size=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=9728),
    # Our own, for CPUs: wide vectors, because lexical matching needs dimensions, and a thin network, which saves time.
    # Values have half the dimensions of a vector (docs/experiments.md, "Ablations of the pair stage").
    "tiny": dict(hidden_size=256, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=64, intermediate_size=128),
    "small": dict(hidden_size=512, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=256),
    "micro": dict(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48),
}


def make_config(size: str, vocab_size: int, **overrides) -> TransformerConfig:
    """The config of a named size. `overrides` replace single fields."""
    if size not in SIZES:
        raise ValueError(f"model size {size!r} must be one of {', '.join(SIZES)}")
    return TransformerConfig(**{**SIZES[size], "vocab_size": vocab_size, **overrides})


def from_config(model: Mapping, execution: Mapping | None = None, vocab_size: int = 0) -> TransformerConfig:
    """The encoder of a run's `config.model` and `config.execution` (configs/base.py); `vocab_size` replaces a 0."""
    kernels = {name: execution[name] for name in ("attention", "remat", "unroll", "dense_barrier")} if execution else {}
    return TransformerConfig(**dict(model.items()) | kernels | {"vocab_size": model["vocab_size"] or vocab_size})


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, "d"], eps: float) -> Float[Array, "... d"]:
    """x / rms(x) · scale, with the mean of squares in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype) * scale.astype(x.dtype)


def rope_tables(positions: Int[Array, "R L"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """cos and sin of the rotary angles, float32[R, L, 1, head_dim / 2].

    If all positions are below L, as in packed rows, they come from a table. XLA's CPU compiler would otherwise compute
    them again in every operation that uses them.
    """

    def tables(positions):
        frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    def looked_up(positions):
        return tuple(table[positions] for table in tables(jnp.arange(positions.shape[1])))

    cos, sin = jax.lax.cond(positions.max() < positions.shape[1], looked_up, tables, positions)
    return cos[:, :, None], sin[:, :, None]


def apply_rope(x: Float[Array, "R L H d"], tables: tuple[Array, Array]) -> Float[Array, "R L H d"]:
    """Rotate dimension j of each head together with dimension j + d/2 (the half-split convention of Qwen3)."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


@jax.custom_vjp
def dense(x: Float[Array, "*n D"], weight: Float[Array, "D F"]) -> Float[Array, "*n F"]:
    """x @ weight with a backward pass that reads its operands from memory.

    Otherwise XLA's CPU compiler fuses the element-wise backward pass of the neighboring operations into a transposing
    copy of the activations, one for each weight gradient (ARCHITECTURE.md, "Speed").
    """
    return x @ weight


def _dense_backward(saved, gradient):
    x, weight = saved
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    x_flat, gradient_flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return (gradient_flat @ weight.T).reshape(x.shape), x_flat.T @ gradient_flat


dense.defvjp(lambda x, weight: (x @ weight, (x, weight)), _dense_backward)


def embedding_scale(width: int) -> float:
    """Standard deviation of a new embedding: Qwen's 0.02 at its width of 1024 (ARCHITECTURE.md, "Decisions")."""
    return 0.64 * width**-0.5


class Layer(nnx.Module):
    """One pre-norm block: attention, then SwiGLU, both with a residual connection."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        D, H, K, d, F = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.intermediate_size,
        )

        def weight(shape, fan_in, gain=1.0):
            return nnx.Param(jax.random.normal(rngs.params(), shape) * (gain * fan_in**-0.5))

        # All layers together add at most about as much to the residual stream as the embeddings are, at any depth.
        gain = embedding_scale(D) * (2 * config.num_layers) ** -0.5
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones(D))
        self.query = weight((D, H, d), D)
        self.key = weight((D, K, d), D)
        self.value = weight((D, K, d), D)
        self.query_norm = nnx.Param(jnp.ones(d))
        self.key_norm = nnx.Param(jnp.ones(d))
        self.output = weight((H, d, D), H * d, gain)
        self.mlp_norm = nnx.Param(jnp.ones(D))
        self.gate = weight((D, F), D)
        self.up = weight((D, F), D)
        self.down = weight((F, D), F, gain)

    def __call__(self, x: Float[Array, "R L D"], segment_ids: Int[Array, "R L"], rope) -> Float[Array, "R L D"]:
        dtype, eps = x.dtype, self.config.norm_eps
        product = dense if self.config.dense_barrier else jnp.matmul

        def project(y, weight):  # R L D, D H d -> R L H d as one matrix product
            w = weight[...].astype(dtype)
            return product(y, w.reshape(w.shape[0], -1)).reshape(*y.shape[:-1], *w.shape[1:])

        y = rms_norm(x, self.attention_norm[...], eps)
        query = apply_rope(rms_norm(project(y, self.query), self.query_norm[...], eps), rope)
        key = apply_rope(rms_norm(project(y, self.key), self.key_norm[...], eps), rope)
        value = project(y, self.value)
        mixed = attention(query, key, value, segment_ids, kernel=self.config.attention)  # R L H d
        output = self.output[...].astype(dtype)
        x = x + product(mixed.reshape(*x.shape[:-1], -1), output.reshape(-1, output.shape[-1]))
        y = rms_norm(x, self.mlp_norm[...], eps)
        return x + product(jax.nn.silu(project(y, self.gate)) * project(y, self.up), self.down[...].astype(dtype))


class Transformer(nnx.Module):
    """Token embedding, stacked layers under one scan, final norm, and the output layer if it is not tied."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        self.config = config
        scale = embedding_scale(config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * scale)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = nnx.vmap(lambda key: Layer(config, nnx.Rngs(params=key)))(keys)  # every array gets a layer axis
        # Small pooled vectors stay in the range where the tanh of int8 is nearly linear (ARCHITECTURE.md, "Decisions").
        # With a weak type instead of float32, a step would be compiled twice.
        self.norm = nnx.Param(jnp.full(config.hidden_size, FINAL_NORM, jnp.float32))
        if not config.tied:
            self.head = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)) * scale)
        if config.token_dimensions:
            shape = config.hidden_size, config.token_dimensions
            self.projection = nnx.Param(jax.random.normal(rngs.params(), shape) * config.hidden_size**-0.5)

    def __call__(
        self, tokens: Int[Array, "R L"], segment_ids: Int[Array, "R L"], positions: Int[Array, "R L"]
    ) -> Float[Array, "R L D"]:
        config = self.config
        x = self.embedding[...].astype(config.dtype)[tokens]
        rope = rope_tables(positions, config.head_dim, config.rope_theta)
        graph, stacked = nnx.split(self.layers)

        def block(x, layer):
            return nnx.merge(graph, layer)(x, segment_ids, rope), None

        if config.remat != "none":
            block = jax.checkpoint(block, policy=REMAT_POLICIES[config.remat], prevent_cse=False)
        x, _ = jax.lax.scan(block, x, stacked, unroll=min(config.unroll, config.num_layers))
        return rms_norm(x, self.norm[...], config.norm_eps)


@functools.lru_cache
def _abstract(config: TransformerConfig):
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    # Without the mesh of the current context, because the cached result serves other callers.
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def abstract_params(config: TransformerConfig) -> dict:
    """The parameter tree as jax.ShapeDtypeStructs, which take no memory."""
    return nnx.to_pure_dict(_abstract(config)[1])


def init(config: TransformerConfig, key: jax.Array) -> dict:
    """Random float32 parameters as a nested dict; arrays under `layers` are stacked over layers."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


@typechecked
def apply(
    config: TransformerConfig,
    params: dict,
    tokens: Int[Array, "R L"],
    segment_ids: Int[Array, "R L"],
    positions: Int[Array, "R L"],
) -> Float[Array, "R L D"]:
    """Hidden states after the final norm, in the compute dtype."""
    graph, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(tokens, segment_ids, positions)


def output_embedding(params: dict) -> Float[Array, "V D"]:
    """The output layer: hidden · this matrixᵀ are the logits. It is the embedding table, or the head if not tied."""
    return params.get("head", params["embedding"])


@typechecked
def token_vectors(params: dict, hidden: Float[Array, "R L D"]) -> Float[Array, "R L P"]:
    """The token vectors of late interaction, not normalized: hidden · projection, in at least float32."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    projection = params["projection"].astype(dtype)
    return jnp.einsum("rld,dp->rlp", hidden.astype(dtype), projection, precision=jax.lax.Precision.HIGHEST)


def encoder_only(config: TransformerConfig, params: dict) -> tuple[TransformerConfig, dict]:
    """The same encoder without the separate output layer, which embeddings do not use."""
    return dataclasses.replace(config, tied=True), {name: x for name, x in params.items() if name != "head"}


def count_params(params: dict) -> tuple[int, int]:
    """(all parameters, parameters without the embedding table and the output layer)."""
    total = sum(x.size for x in jax.tree.leaves(params))
    return total, total - sum(params[name].size for name in ("embedding", "head") if name in params)
