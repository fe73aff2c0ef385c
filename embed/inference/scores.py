"""How similar vectors are: the cosine, or the number of differing bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

EXACT_DIMENSIONS = 1024  # float32 sums 1024 products of two int8 without rounding: 1024 · 128² = 2^24


def similarity(a: np.ndarray, b: np.ndarray, precision: str | None = None) -> np.ndarray:
    """The similarity of each vector of `a` [A, D] and each of `b` [B, D], float32 [A, B], from -1 to 1.

    Of float32 and int8 vectors, also one of each, it is the cosine; a zero vector has 0. Of packed bits it is 1 minus
    twice the share of bits that differ: the cosine of the signs. Packed bits are uint8 (ubinary), or int8 with
    `precision="binary"`, which their dtype does not tell from int8. Vectors of other kinds or sizes are an error.
    """
    a, b = np.asarray(a), np.asarray(b)
    if precision not in (None, "float32", "int8", "binary", "ubinary"):
        raise ValueError(f"precision={precision!r} must be one of float32, int8, binary, ubinary or None")
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or x.dtype not in (np.float32, np.int8, np.uint8):
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, expected float32, int8 or uint8 [N, D]")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a has {a.shape[1]} numbers per vector, b {b.shape[1]}: they are not of one kind")
    dtypes = {x.dtype.name for x in (a, b)}
    allowed = {None: ({"float32", "int8"}, {"uint8"}), "binary": ({"int8"},), "ubinary": ({"uint8"},)}
    if not any(dtypes <= kinds for kinds in allowed.get(precision, ({precision},))):
        of = "" if precision is None else f" as {precision}"
        raise ValueError(
            f"a is {a.dtype}, b is {b.dtype}: they cannot be compared{of}. Packed bits (uint8, or int8 with "
            'precision="binary") are compared with packed bits, float32 and int8 with each other'
        )
    if precision == "binary" or dtypes == {"uint8"}:
        return np.asarray(1 + negative_hamming(a, b) * (2 / (8 * a.shape[1])), np.float32)
    return np.asarray(cosines(a, b, exact=dtypes == {"int8"}))


@functools.partial(jax.jit, static_argnames="exact")
def cosines(queries, vectors, *, exact):
    """Cosine, float32 [Q, N]; `exact` sums the products of int8 as integers. A zero vector has cosine 0."""

    def products(a, b):
        dot = functools.partial(jnp.dot, precision="highest")
        if not exact:
            return dot(a, b.T)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        parts = [
            dot(a[:, d : d + EXACT_DIMENSIONS], b[:, d : d + EXACT_DIMENSIONS].T).astype(jnp.int32)
            for d in range(0, a.shape[1], EXACT_DIMENSIONS)
        ]
        return sum(parts).astype(jnp.float32)

    def inverse_norms(x):
        norms = jnp.linalg.norm(x.astype(jnp.float32), axis=1)
        return jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)

    return products(queries, vectors) * inverse_norms(queries)[:, None] * inverse_norms(vectors)


@jax.jit
def negative_hamming(queries, vectors):
    """Minus the number of differing bits, float32 [Q, N], exact: (dot - D) / 2 with bits as ±1.

    On CPU, a matrix product and a float top_k are several times faster than counting the bits of [Q, N] words.
    """

    def signs(packed):
        packed = jax.lax.bitcast_convert_type(packed, jnp.uint8)
        return 2 * jnp.unpackbits(packed, axis=1).astype(jnp.float32) - 1

    a, b = signs(queries), signs(vectors)
    return (jnp.dot(a, b.T, precision="highest") - a.shape[1]) / 2
