"""Attention inside segments, bidirectional or causal: one function with a kernel for each platform."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from embed.typing import Array, Scalar, typechecked

# Scores that `xla` holds at once per row and head: all up to 1,024 tokens, and a block of queries above that.
MAX_SCORES = 2**20
CACHED_SCORES = 2**19  # scores of all rows and heads that a CPU computes at once: 2 MiB, which fit its cache
LANES = 128  # the TPU kernel needs lengths and head_dim in multiples of this
KERNELS = ("auto", "xla", "splash", "triton", "cudnn")
# The mesh axes of rows and of heads (embed.models.sharding). A kernel needs no communication.
ROWS, HEADS = ("data", "fsdp"), "tensor"


@typechecked
def attention(
    query: Float[Array, "R L H d"],
    key: Float[Array, "R L K d"],
    value: Float[Array, "R L K d"],
    segment_ids: Int[Array, "R L"],
    *,
    causal: bool = False,
    lookahead: Scalar | None = None,
    kernel: str = "auto",
    interpret: bool = False,
) -> Float[Array, "R L H d"]:
    """Grouped-query attention: a token attends to exactly the tokens of its own segment, before and after it.

    Two segments of lengths 2 and 1 and one padding token, segment_ids [1, 1, 2, 0]; rows attend to columns:

        1 1 . .
        1 1 . .
        . . 1 .
        . . . 1

    Padding has segment id 0 and attends only to padding, so its (unused) output stays finite. Scores are scaled by
    1/√d. The softmax is computed in float32.

    With `causal`, a token attends to none after it. With `lookahead`, a share from 0 to 1, it attends to about this
    share of the tokens after it (arXiv 2410.17891 anneals the mask like this): 0 is causal, 1 bidirectional. Each pair
    of positions has a fixed random threshold, so what is visible at one share is visible at every larger one. Only
    `xla` can do this.

    `kernel` is one of

        xla      runs everywhere
        splash   a Pallas kernel for TPU; length and d must be multiples of 128
        triton   a Pallas kernel for GPU; length must be a multiple of 16
        cudnn    for GPU; assumes without a check that each row is one segment and then padding
        auto     splash on TPU and triton on GPU if the device and the shapes allow it, else xla

    `interpret` runs a Pallas kernel without its platform, for tests.
    """
    *_, length, heads, head_dim = query.shape
    if kernel not in KERNELS:
        raise ValueError(f"attention={kernel!r} must be one of {', '.join(KERNELS)}")
    fits = {"splash": length % LANES == 0 and head_dim % LANES == 0, "triton": length % 16 == 0}
    if lookahead is not None and kernel not in ("auto", "xla"):
        raise ValueError(f"attention={kernel!r} has no lookahead: annealing from a causal mask needs attention='xla'")
    if kernel == "auto" and lookahead is not None:
        kernel = "xla"
    if kernel == "auto":
        kernel = default_kernel()
        kernel = kernel if fits.get(kernel, True) else "xla"
    if not fits.get(kernel, True):
        needs = "rows and heads in multiples of 128" if kernel == "splash" else "rows in multiples of 16"
        raise ValueError(f"attention={kernel!r} needs {needs}, not length {length} and head_dim {head_dim}")
    if kernel == "xla":
        return _xla(query, key, value, segment_ids, 0 if causal else lookahead)
    if kernel == "cudnn":
        lengths = (segment_ids > 0).sum(1)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            is_causal=causal,
            implementation="cudnn",
        )
    function = functools.partial({"splash": _splash, "triton": _triton}[kernel], causal=causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(query, key, value, segment_ids)
    # The partitioner cannot see into a kernel: state that every device has its own rows and heads.
    array = PartitionSpec(ROWS, None, HEADS, None)
    specs = (array, array, array, PartitionSpec(ROWS, None))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=array, check_vma=False)(
        query, key, value, segment_ids
    )


def default_kernel() -> str:
    """The fastest kernel of this process's devices. jax's Triton kernels need compute capability 8.0; a T4 has 7.5."""
    backend = jax.default_backend()
    if backend == "gpu" and f"{jax.local_devices()[0].compute_capability}".startswith(("5.", "6.", "7.")):
        return "xla"
    return {"tpu": "splash", "gpu": "triton"}.get(backend, "xla")


@jax.custom_vjp
def _softmax_attention(query, key, value, allowed):
    """softmax(query · key where `allowed`) · value, [R K h b d]; queries [R K h b d], keys and values [R K s d].

    Its own gradient reads the scores [R K h b s] once; the gradient of `jax.nn.softmax` reads them three times. The
    softmax's correction is Σ_d of the output times its gradient (as in FlashAttention, arXiv 2205.14135), and the
    division is applied to vectors.
    """
    return _softmax_attention_forward(query, key, value, allowed)[0]


def _softmax_attention_forward(query, key, value, allowed):
    scores = jnp.einsum("rkhqd,rksd->rkhqs", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores, jnp.finfo(jnp.float32).min)
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = exponentials.sum(-1, keepdims=True)
    exponentials = exponentials.astype(value.dtype)
    mixed = jnp.einsum("rkhqs,rksd->rkhqd", exponentials, value, preferred_element_type=jnp.float32) / total
    return mixed.astype(value.dtype), (query, key, value, exponentials, total, mixed)


def _softmax_attention_backward(saved, gradient):
    query, key, value, exponentials, total, mixed = saved
    dtype = value.dtype
    gradient = gradient / total  # float32
    correction = (gradient * mixed).sum(-1, keepdims=True)
    gradient = gradient.astype(dtype)
    # The small operand comes first because XLA's CPU compiler transposes the first one.
    of_value = jnp.einsum("rkhqd,rkhqs->rkds", gradient, exponentials)
    of_weights = jnp.einsum("rkhqd,rksd->rkhqs", gradient, value, preferred_element_type=jnp.float32)
    of_scores = (exponentials * (of_weights - correction)).astype(dtype)
    of_query = jnp.einsum("rkhqs,rksd->rkhqd", of_scores, key)
    of_key = jnp.einsum("rkhqd,rkhqs->rkds", query, of_scores)
    return of_query, of_key.swapaxes(2, 3), of_value.swapaxes(2, 3), None


_softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


def _xla(query, key, value, segment_ids, lookahead):
    """`_whole`; on CPU for as many rows at a time as keep their scores in its cache, in the backward pass too."""
    rows, length, heads, _ = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    at_once = rows
    if jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1):  # a loop over sharded rows would move them
        most = max(1, CACHED_SCORES // (heads * length**2))
        at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= most)
    if at_once == rows:
        return _whole(query, key, value, segment_ids, lookahead)
    blocks = (x.reshape(-1, at_once, *x.shape[1:]) for x in (query, key, value, segment_ids))
    return jax.lax.map(jax.checkpoint(lambda x: _whole(*x, lookahead)), tuple(blocks)).reshape(query.shape)


def _whole(query, key, value, segment_ids, lookahead):
    """Holds scores [R, H, b, L] of b queries at a time, with b · L ≤ MAX_SCORES, in the backward pass too.

    `lookahead` is the visible share of later tokens; None is all of them.
    """
    rows, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # With heads before positions, the score and value products are plain matrix products on CPU.
    query = query.reshape(rows, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)  # R K h L d
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)  # R K L d

    def attend(query, query_segments, offsets):  # R K h b d, R b, b
        allowed = query_segments[:, :, None] == segment_ids[:, None, :]  # R b s
        if lookahead is not None:
            allowed &= _visible(offsets, length, lookahead)
        return _softmax_attention(query * head_dim**-0.5, key, value, allowed[:, None, None])

    block = max(1, MAX_SCORES // length)
    if block >= length:
        out = attend(query, segment_ids, jnp.arange(length))
    else:
        padding = -length % block  # queries that fill the last block; their outputs are dropped
        queries = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0)))
        queries = jnp.moveaxis(queries.reshape(*query.shape[:3], -1, block, head_dim), 3, 0)  # L/b R K h b d
        segments = jnp.moveaxis(jnp.pad(segment_ids, ((0, 0), (0, padding))).reshape(rows, -1, block), 1, 0)  # L/b R b
        offsets = jnp.arange(length + padding).reshape(-1, block)
        blocks = jax.lax.map(jax.checkpoint(lambda x: attend(*x)), (queries, segments, offsets))
        out = jnp.moveaxis(blocks, 0, 3).reshape(*query.shape[:3], -1, head_dim)[..., :length, :]
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, head_dim)


def _visible(offsets, length: int, lookahead):
    """Whether tokens at `offsets` int[b] of a row see each of its tokens, bool[b, L]: earlier ones, some later ones.

    A padded token sees itself, so its softmax stays finite.
    """
    others = jnp.arange(length)
    earlier = others[None, :] <= offsets[:, None]
    if isinstance(lookahead, int) and lookahead == 0:  # causal
        return earlier
    pair = (offsets[:, None] * length + others).astype(jnp.uint32)  # a hash of the pair, uniform in 0..1
    pair = (pair ^ (pair >> 16)) * jnp.uint32(0x7FEB352D)
    pair = (pair ^ (pair >> 15)) * jnp.uint32(0x846CA68B)
    threshold = (pair ^ (pair >> 16)).astype(jnp.float32) * 2.0**-32
    return earlier | (threshold < lookahead)


def _splash(query, key, value, segment_ids, *, causal: bool, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    _, length, heads, head_dim = query.shape
    block = next(b for b in (512, 384, 256, 128) if length % b == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    kind = mask.CausalMask if causal else mask.FullMask
    masks = mask.MultiHeadMask([kind((length, length))] * heads)  # not materialized
    attend = kernel.make_splash_mha(masks, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)

    def row(q, k, v, ids):  # H L d, K L d, L
        return attend(q, k, v, kernel.SegmentIds(ids, ids))

    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query * head_dim**-0.5, key, value))
    return jax.vmap(row)(query, key, value, segment_ids).transpose(0, 2, 1, 3).astype(value.dtype)


def _triton(query, key, value, segment_ids, *, causal: bool, interpret: bool):
    from jax.experimental.pallas.ops.gpu import attention as kernel

    _, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    key, value = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)  # the kernel has no grouped heads
    blocks = {
        name: next(b for b in (size, 64, 32, 16) if length % b == 0 and b <= size)
        for name, size in (
            ("block_q", 128),
            ("block_k", 128),
            ("block_q_dkv", 32),
            ("block_kv_dkv", 32),
            ("block_q_dq", 32),
            ("block_kv_dq", 32),
        )
    }
    return kernel.mha(
        query,
        key,
        value,
        segment_ids,
        head_dim**-0.5,
        causal,
        kernel.BlockSizes(**blocks),
        "triton",
        None,
        2,
        None,
        interpret,
    )
