"""Random Qwen3 models of transformers, and texts of many kinds, for the comparisons with other programs."""

import numpy as np
import torch
import transformers

TEXTS = [
    "x",
    "Late chunking pools each chunk after the whole document was read.",
    "def first(items):\n    return items[0]  # IndexError when empty",
    "埋め込みは文の意味をベクトルで表す。",
    "Векторы сравнивают по косинусу.",
    "تقارن المتجهات بجيب التمام.",
    "벡터는 코사인으로 비교한다.",
    "वेक्टर की तुलना कोसाइन से होती है।",
    "🙂 emoji, tabs\tand  double  spaces",
    "a" * 300,
    "eins zwei drei " * 120,
]


def random_qwen3(kind=transformers.Qwen3Model, *, scale=0.08, seed=0, **fields):
    """A Qwen3 of transformers with random weights, including the norms."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=640,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=96,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        is_causal=False,
    )
    model = kind(transformers.Qwen3Config(**sizes | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, scale)
    return model


def save(model, tokenizer_folder, folder, **keywords):
    """Save a model of transformers with a tokenizer."""
    model.save_pretrained(folder, **keywords)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def hidden_states(model, rows) -> list[np.ndarray]:
    """transformers' hidden states of token sequences in one padded batch, without the padding."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    return [x[: len(row)] for x, row in zip(out, rows)]
