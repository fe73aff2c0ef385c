"""Precisions of vectors: float32, int8 and packed bits."""

import jax
import jax.numpy as jnp
import numpy as np

from embed.models import quantization

PRECISIONS = ("float32", "int8", "binary", "ubinary")


class NotFiniteError(ValueError):
    """A model computed vectors that contain NaN or infinity."""


def quantize(
    pooled, precision: str, *, truncate_dim: int | None = None, normalize: bool = False, tanh: bool = False
) -> np.ndarray:
    """Convert pooled float32 vectors [..., D] to another precision: cut the prefix, then normalize, then pack bits.

    float32 is [..., D], with `tanh` tanh(v). int8 is [..., D], round(127 tanh v). ubinary is uint8 [..., D/8], the
    packed bits of v >= 0 with the first dimension in the highest bit. binary is int8 [..., D/8], ubinary - 128, as in
    sentence-transformers. A vector that is not finite raises NotFiniteError, because int8 and bits would hide it.
    """
    if not getattr(pooled, "ndim", 0) or not jnp.issubdtype(pooled.dtype, jnp.floating):
        what = f"{pooled.dtype}{list(pooled.shape)}" if hasattr(pooled, "dtype") else f"of type {type(pooled).__name__}"
        raise ValueError(f"the vectors to quantize are {what}, expected an array of float32 [..., D]")
    check_precision(precision, pooled.shape[-1], truncate_dim, normalize)
    pooled = jnp.asarray(pooled)
    bad = np.flatnonzero(~np.asarray(is_finite(pooled)))
    if len(bad):
        raise NotFiniteError(f"vector {bad[0]} is not finite; {len(bad)} of {pooled[..., 0].size} vectors are not")
    return convert(pooled, precision, truncate_dim, normalize, tanh)


def convert(pooled, precision: str, truncate_dim: int | None, normalize: bool, tanh: bool) -> np.ndarray:
    """`quantize` without its checks."""
    pooled = pooled[..., :truncate_dim]
    if precision == "int8":
        return np.array(quantization.int8(pooled))
    if precision in ("binary", "ubinary"):
        packed = np.array(quantization.pack_bits(pooled))
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    vectors = np.array(jnp.tanh(pooled) if tanh else pooled)
    if normalize:  # a zero vector stays zero
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return vectors


@jax.jit
def is_finite(vectors):
    """Whether each vector [..., D] is finite: bool, flattened."""
    return jnp.isfinite(vectors).all(-1).reshape(-1)


def is_int(value) -> bool:
    """Whether a value is a whole number by its type, of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_count(name: str, value) -> None:
    """ValueError unless the value is a positive int."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be positive, an int")


def check_precision(precision: str, dimensions: int, truncate_dim: int | None = None, normalize: bool = False) -> None:
    """ValueError unless vectors of `dimensions` can be cut to `truncate_dim` and converted to `precision`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} must be one of {', '.join(PRECISIONS)}")
    if truncate_dim is not None and not (is_int(truncate_dim) and 1 <= truncate_dim <= dimensions):
        raise ValueError(f"truncate_dim={truncate_dim!r} must be in 1..{dimensions}, an int")
    kept = truncate_dim or dimensions
    if precision in ("binary", "ubinary") and kept % 8:
        raise ValueError(f"{precision} packs eight dimensions per byte: {kept} dimensions are not a multiple of 8")
    if normalize and precision != "float32":
        raise ValueError(f"normalize_embeddings is for float32 only, not {precision}: its distance ignores lengths")
