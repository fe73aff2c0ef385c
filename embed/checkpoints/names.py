"""Hugging Face's Qwen3 names for our parameters and config fields, for reading and for writing.

Hugging Face has one matrix [output, input] per layer. Ours are stacked over layers and have a separate axis for heads:
[layers, input, heads, head_dim].
"""

from collections.abc import Container, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from embed import tokenizers
from embed.config import brief
from embed.models.transformer import TransformerConfig, abstract_params

# Our parameter -> their tensor; {} is the layer. Causal models have the prefix "model." on all tensors but the head.
# The projection is a module of its own of sentence-transformers, in the file PROJECTION.
NAMES = {
    "embedding": "embed_tokens.weight",
    "layers.attention_norm": "layers.{}.input_layernorm.weight",
    "layers.query": "layers.{}.self_attn.q_proj.weight",
    "layers.key": "layers.{}.self_attn.k_proj.weight",
    "layers.value": "layers.{}.self_attn.v_proj.weight",
    "layers.query_norm": "layers.{}.self_attn.q_norm.weight",
    "layers.key_norm": "layers.{}.self_attn.k_norm.weight",
    "layers.output": "layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "layers.gate": "layers.{}.mlp.gate_proj.weight",
    "layers.up": "layers.{}.mlp.up_proj.weight",
    "layers.down": "layers.{}.mlp.down_proj.weight",
    "norm": "norm.weight",
    "head": "lm_head.weight",
    "projection": "linear.weight",
}
UNPREFIXED = (NAMES["head"], NAMES["projection"])
# The number of leading input dimensions of our weights. Parameters without an entry are the same on both sides.
INPUTS = {
    "layers.query": 1,
    "layers.key": 1,
    "layers.value": 1,
    "layers.output": 2,
    "layers.gate": 1,
    "layers.up": 1,
    "layers.down": 1,
    "projection": 1,
}
# Our config field -> the field of their config.json.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
PPLX = "bidirectional_pplx_qwen3"  # model_type of the released pplx-embed
# What our encoder computes. A model with other values has another architecture.
FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PROJECTION = f"1_Dense/{WEIGHTS}"
TOKENIZER_FILES = (tokenizers.HUGGINGFACE_FILE, tokenizers.CONFIG_FILE, *tokenizers.SENTENCEPIECE_FILES)


def flatten(params: Mapping) -> dict:
    """A nested dict as {path joined with ".": leaf}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping) -> dict:
    """The inverse of `flatten`."""
    params: dict = {}
    for name, value in leaves.items():
        *parents, leaf = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return params


def _entries(num_layers: int, others: Container[str], prefix: str) -> Iterator[tuple[str, str, int | None]]:
    """(their name, our name, layer or None) in the order of a forward pass. Head and projection: if in `others`."""
    yield prefix + NAMES["embedding"], "embedding", None
    for layer in range(num_layers):
        for name, theirs in NAMES.items():
            if name.startswith("layers."):
                yield prefix + theirs.format(layer), name, layer
    yield prefix + NAMES["norm"], "norm", None
    for name in ("head", "projection"):
        if name in others:
            yield NAMES[name], name, None


def shapes(config: TransformerConfig, prefix: str = "") -> dict[str, tuple]:
    """{their name: shape}, in the order of `tensors`."""
    ours, result = flatten(abstract_params(config)), {}
    for theirs, name, layer in _entries(config.num_layers, ours, prefix):
        shape = ours[name].shape if layer is None else ours[name].shape[1:]
        if split := INPUTS.get(name):
            shape = int(np.prod(shape[split:])), int(np.prod(shape[:split]))
        result[theirs] = shape
    return result


def tensors(params: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(their name, their tensor) of each parameter, in its dtype, one at a time in this process's memory.

    If arrays are sharded over several processes, every process must iterate over all tensors.
    """
    flat = flatten(params)
    for theirs, name, layer in _entries(flat["layers.gate"].shape[0], flat, prefix):
        tensor = fetch(flat[name], layer)
        if split := INPUTS.get(name):
            tensor = np.ascontiguousarray(tensor.reshape(int(np.prod(tensor.shape[:split])), -1).T)
        yield theirs, tensor


def fetch(array, layer: int | None = None) -> np.ndarray:
    """An array, or one layer of a stacked array, as NumPy. Every process that holds a part must make the call."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    # Copy even a whole array: jax keeps an array's host copy for as long as the array lives.
    array = jnp.copy(array) if layer is None else _layer(array, layer)
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


@jax.jit
def _layer(stacked, layer):
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def check_finite(params: Mapping, source: str, prefix: str = "") -> None:
    """ValueError that names, as in a model folder, the tensors that contain NaN or infinity.

    `source` says where they come from; `prefix` is put before their names. Arrays may be sharded over devices and
    processes; then all processes call this, and the error is raised in all of them.
    """
    if not _is_finite(params):
        wrong = [name for name, tensor in tensors(params, prefix) if not np.isfinite(tensor).all()]
        raise ValueError(f"{source} has weights that are not finite: {brief(wrong, 3, ', ')}")


@jax.jit
def _is_finite(params):
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()
