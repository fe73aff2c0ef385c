"""The model card: a model folder's README.md, with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Mapping

from embed.models.transformer import TransformerConfig, abstract_params, count_params

DENSE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")  # no trust_remote_code
vectors = model.encode(["a text", "another"])
```

or without PyTorch, and with int8 and binary vectors as in training:

```python
from embed import inference

model = inference.load("FOLDER")
vectors = model.encode(["a text", "another"], precision="int8")
```"""
CONTEXTUAL = """```python
from embed import inference

model = inference.load("FOLDER")
(chunks,) = model.encode_documents([["the first chunk of a document", "its second chunk"]], precision="int8")
query = model.encode("a query", precision="int8")
```

A chunk's vector depends on the whole document. sentence-transformers also loads the folder and embeds single texts,
such as queries."""
LATE_INTERACTION = """```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("FOLDER")  # no trust_remote_code
queries, documents = model.encode_query(["a query"]), model.encode_document(["a text", "another"])
scores = model.similarity(queries, documents)
```

or without PyTorch:

```python
from embed import inference

model = inference.load("FOLDER")
queries, documents = model.encode_tokens_multi(["a query"]), model.encode_tokens_multi(["a text", "another"])
scores = inference.maxsim(queries, documents)
```"""
PEERS = """
Needs sentence-transformers 6.0 and transformers 5.2 or newer, whose Qwen3 honors `"is_causal": false` (checked with
6.2 and 5.24). Do not use older versions of transformers: they run the model causally without a warning. Older versions
of sentence-transformers fail to load the folder as long as it is unchanged."""
PPLX = """In the layout of the released pplx-embed models, for programs that support them (text-embeddings-inference
1.9.2 and newer) and for `embed.inference.load`. Code is not included: configuration.py, modeling.py and st_quantize.py
come with the released models. This export has not been tested in those programs. text-embeddings-inference does not
read SentencePiece models, so it needs a folder with tokenizer.json."""
ONNX = """```python
import numpy as np
import onnxruntime
import transformers

tokenizer = transformers.AutoTokenizer.from_pretrained("FOLDER")
session = onnxruntime.InferenceSession("FOLDER/onnx/model.onnx")
tokens = tokenizer(["a text", "another"], padding=True)
inputs = {name: np.array(tokens[name], np.int64) for name in ("input_ids", "attention_mask")}
(int8,) = session.run(["pooler_output_int8"], inputs)
```

Outputs: last_hidden_state, pooler_output (float32), pooler_output_int8, pooler_output_binary (packed bits)."""
POOLING = {"mean": "mean pooling", "last": "pooling of the last token"}
STATES = {"mean": "the mean of the token states", "last": "the state of the last token"}
PLAIN = """A float32 vector is the pooled vector v of the token states. Training compared the int8 vectors,
round(127 tanh v), by cosine. The cosine of v ranks texts almost the same and differs where single dimensions are large.
A dot product of v also depends on the vectors' lengths, which training ignores: normalize them first. The precision
"int8" of sentence-transformers is another int8: it calibrates each dimension on the batch."""
TANH = """A float32 vector is tanh(v) for the pooled vector v of the token states: the int8 vector
round(127 tanh v) before rounding. Training compared its cosine. A dot product also depends on the vectors' lengths,
which are at most √dimensions here. The int8 vectors of `embed.inference` are the same with and without tanh. The
precision "int8" of sentence-transformers is another int8: it calibrates each dimension on the batch."""


TOKENS = """A text has one vector per token. The score of a query and a document is MaxSim: for each token of the query
the cosine of the most similar token of the document, summed over the tokens of the query. Queries and documents are
encoded alike: no prompts, no query expansion, no tokens left out."""


def model_card(config: TransformerConfig, embedding: Mapping, provenance: Mapping, *, format: str = "") -> str:
    """The README.md of a model in one of export.FORMATS.

    `provenance` may contain checkpoint (str), lineage (`embed.runs.lineage`: the stages that made the model), merge
    ({of, ratio, method}), languages, license, figures ({benchmark: {precision: {metric: value}}}), source ({folder,
    digest} of a model folder), commit and versions. The card omits a missing entry or calls it unknown.
    """
    languages, license = provenance.get("languages") or (), provenance.get("license")
    total, without_table = count_params(abstract_params(config))
    head = ["---"]
    if languages:
        head += ["language:", *(f"- {json.dumps(code)}" for code in languages)]
    if license:
        head.append(f"license: {json.dumps(license)}")
    if not format:
        head.append("library_name: sentence-transformers")
    head += [
        "pipeline_tag: feature-extraction",
        "tags:",
        "- embed",
        "- feature-extraction",
        "- sentence-similarity",
        "---",
    ]
    usage = {"pplx": PPLX, "onnx": ONNX}.get(format) or (
        LATE_INTERACTION if config.token_dimensions else CONTEXTUAL if embedding["contextual"] else DENSE
    ) + "\n" + PEERS
    windows = embedding["context_length"]
    context = f"at most {windows} tokens of its document" if windows else "its whole document"
    title = "# Contextual text embeddings" if embedding["contextual"] else "# Text embeddings"
    pooling = POOLING[embedding["pooling"]]
    longest = f"{embedding['max_length']:,} tokens" if embedding["max_length"] else "any length"
    vectors = [
        f"| dimensions | {config.hidden_size} |",
        f"| prefixes trained (Matryoshka) | {', '.join(map(str, embedding['matryoshka'])) or 'unknown'} |",
        f"| float32 vectors | {'tanh of ' if embedding['tanh'] else ''}{STATES[embedding['pooling']]} |",
        "| compare with | cosine for float32 and int8, Hamming distance for binary |",
    ]
    if config.token_dimensions:
        title, pooling = "# Token embeddings for late interaction", "a vector per token"
        vectors = [f"| dimensions | {config.token_dimensions} per token |", "| compare with | MaxSim |"]
    lines = [
        *head,
        "",
        title,
        "",
        f"A {'causal' if config.causal else 'bidirectional'} Qwen3 encoder with {pooling}: "
        f"{total:,} parameters ({without_table:,} without the embedding table), {config.num_layers} "
        f"{'layer' if config.num_layers == 1 else 'layers'}, {config.hidden_size} dimensions.",
        "",
        "| | |",
        "|---|---|",
        *vectors[:2],
        f"| longest text | {longest} |",
        f"| context of a chunk | {context} |",
        f"| chunks of a document | {'with a separator token between them' if embedding['separator'] else 'joined'} |",
        *vectors[2:],
        f"| languages | {', '.join(languages) or 'unknown'} |",
        f"| license | {license or 'unknown'} |",
        "",
        "## Use",
        "",
        usage,
        "",
        TOKENS if config.token_dimensions else TANH if embedding["tanh"] else PLAIN,
    ]
    lines += _origin(provenance) + _evaluation(provenance.get("figures") or {})
    versions = ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items())
    lines += [
        "",
        f"Made with embed, commit {provenance.get('commit', 'unknown')}" + (f"; {versions}." if versions else "."),
    ]
    return "\n".join(lines) + "\n"


def check_provenance(provenance: Mapping, source: str) -> None:
    """ValueError that names `source` unless `model_card` can show its provenance."""
    try:
        ", ".join([*(provenance.get("languages") or ()), *(provenance.get(x) or "" for x in ("license", "commit"))])
        dict(provenance.get("versions") or {})
        _origin(provenance), _evaluation(provenance.get("figures") or {})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"the provenance of {source} is not what an export writes ({what}): export it again") from None


def _origin(provenance: Mapping) -> list[str]:
    """The lines about the model's sources and training."""
    lines = []
    if source := provenance.get("source"):
        lines += ["", f"Made from {source['folder']} (sha256 {source['digest']})."]
    stages, merge = provenance.get("lineage") or (), provenance.get("merge")
    if not (stages or merge):
        return lines
    lines += ["", "## Training", "", f"Checkpoint: {provenance.get('checkpoint', 'unknown')}."]
    if merge:
        first, second = merge["of"]
        lines.append(f"Merged by {merge['method']}, {merge['ratio']} of the way from {first} to {second}.")
    if stages:
        lines += [
            "",
            "| stage | objective | steps and tasks | step | checksum | starts from |",
            "|---|---|---|---:|---|---|",
        ]
    for stage in stages:
        phases = ", ".join(f"{steps} of {' and '.join(rates)}" for steps, rates in stage["phases"])
        cells = [stage["name"], stage["kind"], phases, stage["step"], stage["digest"], _parent(stage["parent"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _parent(identity: Mapping) -> str:
    if "random init" in identity:
        return f"random init, seed {identity['random init']}"
    if "merge" in identity:
        return f"{identity['method']} at {identity['ratio']} of " + " and ".join(map(_parent, identity["merge"]))
    return (
        f"{identity['folder']}"
        + (f", step {identity['step']}" if identity["step"] else "")
        + f" ({identity['digest'][:12]})"
    )


def _evaluation(figures: Mapping) -> list[str]:
    if not figures:
        return []
    metrics = sorted({metric for row in figures.values() for cell in row.values() for metric in cell})
    lines = ["", "## Evaluation", "", "| set | precision | " + " | ".join(metrics) + " |"]
    lines.append("|---|---|" + "---:|" * len(metrics))
    for name, row in figures.items():
        for precision, cell in row.items():
            values = " | ".join(f"{cell[m]:.3f}" if m in cell else "–" for m in metrics)
            lines.append(f"| {name} | {precision} | {values} |")
    return lines
