"""An encoder as an ONNX graph, for onnxruntime and programs built on it: the equations of models/transformer.py again.

    input_ids, attention_mask   int64[B, L]
    last_hidden_state           float32[B, L, D]
    pooler_output               float32[B, D]      the mean over tokens with mask 1
    pooler_output_int8          int8[B, D]         round(127 tanh v)
    pooler_output_binary        uint8[B, D / 8]    packed bits of v >= 0, as `ubinary`

The graph is written node by node, which needs neither PyTorch nor a tracer and is as readable as the model. It uses
only operators of opset 17.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from embed.models.transformer import TransformerConfig

FILE, DATA = "onnx/model.onnx", "model.onnx_data"  # the names that transformers.js and sentence-transformers expect
OPSET = 17


class _Graph:
    """Nodes and constants, each with its own name."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, value, dtype=np.float32) -> str:
        import onnx

        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(value, dtype, order="C"), name))
        return name

    def shape(self, *dimensions: int) -> str:
        return self.constant(dimensions, np.int64)

    def add(self, operator: str, *inputs: str, name: str = "", **attributes) -> str:
        import onnx

        name = name or f"n{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], **attributes))
        return name

    def rms_norm(self, x: str, scale, eps: float) -> str:
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=[-1], keepdims=1)
        rms = self.add("Sqrt", self.add("Add", mean, self.constant(eps)))
        return self.add("Mul", self.add("Div", x, rms), self.constant(scale))


def build(params: Mapping, config: TransformerConfig):
    """The onnx.ModelProto of an encoder, which contains its weights in float32. `params` are NumPy arrays."""
    try:
        import onnx
    except ImportError:
        raise ValueError("--format=onnx needs the package onnx: pip install -e '.[onnx]'") from None

    D, H, K, d = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    if D % 8:
        raise ValueError(f"hidden_size={D} must be a multiple of 8: the binary output packs eight dimensions per byte")
    g = _Graph()
    x = g.add("Gather", g.constant(params["embedding"]), "input_ids")  # B L D
    mask = g.add("Cast", "attention_mask", to=onnx.TensorProto.FLOAT)  # B L
    # Added to scores: 0 for a token, and for padding so large a negative number that its weight is 0.
    penalty = g.add("Mul", g.add("Sub", g.constant(1.0), mask), g.constant(np.finfo(np.float32).min))
    bias = g.add("Unsqueeze", penalty, g.shape(1, 2))  # B 1 1 L

    length = g.add("Gather", g.add("Shape", "input_ids"), g.constant(1, np.int64))
    by_head = g.add("Concat", g.shape(0, H), g.add("Unsqueeze", length, g.shape(0)), g.shape(d), axis=0)
    positions = g.add("Range", g.constant(0, np.int64), length, g.constant(1, np.int64))
    positions = g.add("Unsqueeze", g.add("Cast", positions, to=onnx.TensorProto.FLOAT), g.shape(1))  # L 1
    frequencies = config.rope_theta ** (-np.arange(0, d, 2) / d)
    angles = g.add("Mul", positions, g.constant(np.concatenate([frequencies, frequencies])))  # L d
    cos, sin = g.add("Cos", angles), g.add("Sin", angles)

    def heads(y, weight, norm, number):  # B L D -> B H L d
        flat = g.add("MatMul", y, g.constant(np.reshape(weight, (D, number * d))))
        split = g.add("Reshape", flat, g.shape(0, 0, number, d))
        if norm is not None:
            split = g.rms_norm(split, norm, config.norm_eps)
        out = g.add("Transpose", split, perm=[0, 2, 1, 3])
        if norm is None:
            return out
        first = g.add("Slice", out, g.shape(0), g.shape(d // 2), g.shape(3))
        second = g.add("Slice", out, g.shape(d // 2), g.shape(d), g.shape(3))
        turned = g.add("Concat", g.add("Neg", second), first, axis=3)
        return g.add("Add", g.add("Mul", out, cos), g.add("Mul", turned, sin))

    for i in range(config.num_layers):
        layer = {name: np.asarray(stacked[i]) for name, stacked in params["layers"].items()}
        y = g.rms_norm(x, layer["attention_norm"], config.norm_eps)
        query = heads(y, layer["query"], layer["query_norm"], H)
        query = g.add("Mul", query, g.constant(d**-0.5))
        key, value = heads(y, layer["key"], layer["key_norm"], K), heads(y, layer["value"], None, K)
        query = g.add("Reshape", query, g.shape(0, K, -1, d))  # the h query heads of a key head in sequence: B K h·L d
        scores = g.add("MatMul", query, g.add("Transpose", key, perm=[0, 1, 3, 2]))
        weights = g.add("Softmax", g.add("Add", scores, bias), axis=-1)
        mixed = g.add("Reshape", g.add("MatMul", weights, value), by_head)  # B H L d
        mixed = g.add("Reshape", g.add("Transpose", mixed, perm=[0, 2, 1, 3]), g.shape(0, 0, H * d))
        x = g.add("Add", x, g.add("MatMul", mixed, g.constant(layer["output"].reshape(H * d, D))))
        y = g.rms_norm(x, layer["mlp_norm"], config.norm_eps)
        gate, up = (g.add("MatMul", y, g.constant(layer[name])) for name in ("gate", "up"))
        product = g.add("Mul", g.add("Mul", gate, g.add("Sigmoid", gate)), up)
        x = g.add("Add", x, g.add("MatMul", product, g.constant(layer["down"])))

    hidden = g.add("Identity", g.rms_norm(x, params["norm"], config.norm_eps), name="last_hidden_state")
    _add_embeddings(g, hidden, mask, D)

    value, T = onnx.helper.make_tensor_value_info, onnx.TensorProto
    inputs = [value(name, T.INT64, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
    outputs = [
        value("last_hidden_state", T.FLOAT, ["batch", "length", D]),
        value("pooler_output", T.FLOAT, ["batch", D]),
        value("pooler_output_int8", T.INT8, ["batch", D]),
        value("pooler_output_binary", T.UINT8, ["batch", D // 8]),
    ]
    graph = onnx.helper.make_graph(g.nodes, "encoder", inputs, outputs, g.constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)


def _add_embeddings(g: _Graph, hidden: str, mask: str, dimensions: int) -> None:
    """Pool `hidden` [B, L, D] over the tokens with mask 1 and add the outputs pooler_output*."""
    from onnx import TensorProto

    column = g.add("Unsqueeze", mask, g.shape(2))  # B L 1
    total = g.add("ReduceSum", g.add("Mul", hidden, column), g.shape(1), keepdims=0)
    count = g.add("Max", g.add("ReduceSum", column, g.shape(1), keepdims=0), g.constant(1.0))
    pooled = g.add("Div", total, count, name="pooler_output")
    levels = g.add("Round", g.add("Mul", g.add("Tanh", pooled), g.constant(127.0)))
    g.add("Cast", levels, name="pooler_output_int8", to=TensorProto.INT8)
    bits = g.add("Cast", g.add("GreaterOrEqual", pooled, g.constant(0.0)), to=TensorProto.INT32)
    bits = g.add(
        "Mul", g.add("Reshape", bits, g.shape(0, dimensions // 8, 8)), g.constant(1 << np.arange(8)[::-1], np.int32)
    )
    g.add("Cast", g.add("ReduceSum", bits, g.shape(2), keepdims=0), name="pooler_output_binary", to=TensorProto.UINT8)


def save(folder: Path, model) -> None:
    """Write folder/onnx/model.onnx, with the weights in a file next to it."""
    import onnx

    (folder / FILE).parent.mkdir()
    onnx.save_model(model, folder / FILE, save_as_external_data=True, location=DATA)
