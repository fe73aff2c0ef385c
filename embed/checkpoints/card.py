"""The model card of an export: README.md with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping

from embed.models.transformer import TransformerConfig, abstract_params, count_params

USAGE = {
    "native": """```python
from embed import inference

model = inference.load("FOLDER")
vectors = model.encode(["a text", "another"], precision="int8")
```""",
    "sentence-transformers": """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")  # no trust_remote_code
vectors = model.encode(["a text", "another"])
```

Needs sentence-transformers 6.0 and transformers 5.2 or newer, whose Qwen3 honours `"is_causal": false` (checked with 6.2 and
5.24). Older transformers would run it causally without a word: do not use them. Older sentence-transformers fail to
load it, as long as the folder is as it was written.""",
    "pplx": """In the layout of the released pplx-embed models, for programs that know those (text-embeddings-inference 1.9.2 and
newer), and for `embed.inference.load`. Code is not included: configuration.py, modeling.py and st_quantize.py come with
the released models. This export has not been run in those programs; text-embeddings-inference reads no SentencePiece model, so
it needs a folder with tokenizer.json.""",
    "onnx": """```python
import numpy as np
import onnxruntime
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")
session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx")
inputs = {k: np.array(v, np.int64) for k, v in tokenizer(["a text", "another"], padding=True).items() if k != "token_type_ids"}
(int8,) = session.run(["pooler_output_int8"], inputs)
```

Outputs: last_hidden_state, pooler_output (float32), pooler_output_int8, pooler_output_binary (packed bits).""",
}


def model_card(config: TransformerConfig, embedding: Mapping, provenance: Mapping, *, layout: str) -> str:
    """README.md of an exported model.

    `provenance` as the pipeline writes it: checkpoint, config (with export.languages and export.license), commit, versions,
    figures ({benchmark: {precision: {metric: value}}}), source (path, revision, digest). What is not there is left out
    or said to be unknown.
    """
    run, figures = provenance.get("config") or {}, provenance.get("figures")
    languages, license = (run.get("export", {}).get(name) for name in ("languages", "license"))
    languages = languages or ()
    total, without_table = count_params(abstract_params(config))
    head = ["---"]
    if languages:
        head += ["language:", *(f"- {json.dumps(code)}" for code in languages)]
    if license:
        head.append(f"license: {json.dumps(license)}")
    if layout == "sentence-transformers":
        head.append("library_name: sentence-transformers")
    head += [
        "pipeline_tag: feature-extraction",
        "tags:",
        "- embed",
        "- feature-extraction",
        "- sentence-similarity",
        "---",
    ]
    checkpoint = provenance.get("checkpoint", "")
    lines = [
        *head, "", "# Text embeddings", "",
        f"A bidirectional Qwen3 encoder with mean pooling: {total:,} parameters ({without_table:,} without the embedding "
        f"table), {config.num_layers} layers, {config.hidden_size} dimensions.", "",
        "| | |", "|---|---|",
        f"| dimensions | {config.hidden_size} |",
        f"| prefixes trained (Matryoshka) | {', '.join(map(str, embedding['matryoshka'])) or 'unknown'} |",
        f"| longest text | {embedding['max_length'] or 'no limit'} tokens |",
        f"| chunks of a document | {'with a separator token between them' if embedding['separator'] else 'joined'} |",
        "| compare with | cosine for float32 and int8, Hamming distance for binary |",
        f"| languages | {', '.join(languages) or 'unknown'} |",
        f"| license | {license or 'unknown'} |",
        "", "## Use", "", USAGE[layout],
    ]  # fmt: skip
    if source := provenance.get("source"):
        lines += [
            "",
            f"Made from {source['path']}" + (f" at revision {source['revision']}" if source.get("revision") else ""),
        ]
        lines[-1] += f" (sha256 {source['digest']})."
    if run.get("stages"):
        lines += ["", "## Training", "", f"Checkpoint: {checkpoint}. Stages of the run:", ""]
        lines += ["| stage | starts from | steps and mixtures |", "|---|---|---|"]
        for name, stage in run["stages"].items():
            phases = ", ".join(f"{steps} of {mixture}" for steps, mixture in stage["curriculum"])
            lines.append(f"| {name} | {stage['init'] or 'random init'} | {phases} |")
        lines += ["", f"Data: `{run['data']['gin_file']}`."]
        if checkpoint == "merged":
            lines.append(f"Merged by slerp, {run['merge']['ratio']} of the way from contextual to triplet.")
    if figures:
        metrics = sorted({metric for row in figures.values() for cell in row.values() for metric in cell})
        lines += ["", "## Evaluation", "", "| set | precision | " + " | ".join(metrics) + " |"]
        lines.append("|---|---|" + "---:|" * len(metrics))
        for name, row in figures.items():
            for precision, cell in row.items():
                values = " | ".join(f"{cell[m]:.3f}" if m in cell else "–" for m in metrics)
                lines.append(f"| {name} | {precision} | {values} |")
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items())
    lines += [
        "",
        f"Made with embed, commit {provenance.get('commit', 'unknown')}" + (f"; {versions}." if versions else "."),
    ]
    return "\n".join(lines) + "\n"
