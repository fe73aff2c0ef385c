"""Array types for annotations, and `@typechecked`, which checks them at every call."""

import beartype
import jax
import jaxtyping
import numpy as np
from jaxtyping import Float, Int

Array = jax.Array | np.ndarray
Scalar = float | int | np.floating | np.integer | Float[Array, ""] | Int[Array, ""]


def typechecked(function):
    """Check the shapes and dtypes in a function's annotations at each call (under jit: at each trace)."""
    return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)
