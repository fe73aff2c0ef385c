"""How a third-party folder turns texts into vectors, read from the files of transformers and sentence-transformers.

A field that changes a vector is honored, or refused in one sentence that names file, field, value and what is allowed.
docs/checkpoints.md has the list, which follows transformers 5.24 and sentence-transformers 6.2.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from embed import paths, tokenizers
from embed.checkpoints.names import PPLX
from embed.config import brief

MODULES, MODEL = "modules.json", "config_sentence_transformers.json"
# sentence-transformers reads the first of these that exists.
TRANSFORMER = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
ADAPTER, ROUTER = "adapter_config.json", "router_config.json"
# Files that no model may have: (what they are, what to do).
UNSUPPORTED = {ADAPTER: ("an adapter", "merge it into the weights"), ROUTER: ("of a Router", "use one of its models")}
ADDED_TOKENS, SPECIAL_TOKENS = "added_tokens.json", "special_tokens_map.json"
# Files that loaders read besides config.json, weights and tokenizer. Vectors may depend on them.
FILES = (MODULES, MODEL, *TRANSFORMER, *UNSUPPORTED, ADDED_TOKENS, SPECIAL_TOKENS)
# A module of the released pplx-embed. It changes only a vector's precision, and Normalize only its length. Here both
# are arguments of `encode`.
QUANTIZER = "st_quantize.FlexibleQuantizer"

BOTH = (False, True, None)
# The allowed values of each known field; Ellipsis allows any value.
TRANSFORMER_FIELDS = {
    "max_seq_length": ...,
    "do_lower_case": (False, None),  # a Lowercase normalizer in tokenizer.json says the same and is honored
    "transformer_task": ("feature-extraction",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}}, None),
    "module_output_name": ("token_embeddings", None),
    "processing_kwargs": ({}, None),
    "unpad_inputs": BOTH,
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None,),
    "tokenizer_name_or_path": (None,),
} | dict.fromkeys(
    ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"), ({}, None)
)
DIMENSIONS = ("embedding_dimension", "word_embedding_dimension")  # the width of the model
POOLING_FIELDS = {
    **dict.fromkeys(DIMENSIONS, ...),
    "include_prompt": BOTH,  # there is no prompt
    "pooling_mode": ("mean", ["mean"]),
    "pooling_mode_mean_tokens": (True,),
    "pooling_mode_cls_token": (False,),
    "pooling_mode_max_tokens": (False,),
    "pooling_mode_mean_sqrt_len_tokens": (False,),
    "pooling_mode_weightedmean_tokens": (False,),
    "pooling_mode_lasttoken": (False,),
}
NORMALIZE_FIELDS = {
    "module_input_name": ("sentence_embedding",),
    "module_output_name": ("sentence_embedding", None),
}
# The fields of tokenizer_config.json that could change tokens. The file contains many others.
TOKENIZER_FIELDS = {
    "add_bos_token": (False, None),
    "add_eos_token": (False, None),
    "do_lower_case": (False, None),
    "truncation_side": ("right", None),
    "sp_model_kwargs": ({}, None),
    "fix_mistral_regex": (False, None),
}
# The classes of transformers that follow tokenizer.json. Qwen's have their own normalizer and pre-tokenizer.
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
TOKENIZER_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", *QWEN, None)
POSITIONS = 32768  # max_position_embeddings of a config.json that does not have it
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _Reader:
    """The JSON files of a folder, and their problems as sentences."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self.not_exported: list[str] = []  # settings that an export of this model leaves out

    def read(self, name: str, kind=dict):
        """The object or list in a file; an empty one if the file is missing or contains something else."""
        if not (self.folder / name).is_file():
            return kind()
        try:
            content = paths.read_json(self.folder / name)
        except ValueError as error:
            self.problems.append(str(error))
            return kind()
        if not isinstance(content, kind):
            self.problems.append(f"{name} holds {content!r:.40}, expected {'a list' if kind is list else 'an object'}")
            return kind()
        return content

    def check(self, name: str, fields: Mapping, allowed: Mapping, known: bool = False) -> None:
        """Add a problem for each field without an allowed value and, with `known`, for each unknown field."""
        for field, value in fields.items():
            values = allowed.get(field, () if known else ...)
            if values is ...:
                continue
            if not values:
                self.problems.append(f"{name} has {field}={value!r:.80}, which is not known")
            elif not any(_same(value, one) for one in values):
                shown = " or ".join(json.dumps(one) for one in values)
                self.problems.append(f"{name} has {field}={value!r:.80}, expected {shown}")

    def limits(self, fields: Mapping[tuple[str, str], object]) -> int | None:
        """The smallest of the limits {(file, field): value} in tokens; None if none is set."""
        limits = []
        for (name, field), value in fields.items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                self.problems.append(f"{name} has {field}={value!r:.80}, expected a positive number of tokens or null")
            elif value < 10**9:  # a larger one is transformers' way to say none
                limits.append(int(value))
        return min(limits, default=None)


def _same(value, other) -> bool:
    return type(value) is type(other) and value == other


def read_embedding(fields: Mapping, folder: Path, hidden_size: int | None) -> tuple[dict, list[str], list[str]]:
    """(settings.EMBEDDING of a third-party folder, problems as sentences, settings that an export leaves out).

    `fields` is its config.json.
    The released contextual models have a separator (arXiv 2602.11151).
    """
    reader = _Reader(folder)
    longest = _read_modules(reader, hidden_size)
    tokenizer = _read_tokenizer(reader)
    limits = {
        ("config.json", "max_position_embeddings"): fields.get("max_position_embeddings", POSITIONS),
        (tokenizers.CONFIG_FILE, "model_max_length"): tokenizer.get("model_max_length"),
        **longest,
    }
    code = fields.get("auto_map")
    code = code.get("AutoModel") if isinstance(code, dict) and fields.get("model_type") == PPLX else None
    contextual = "Contextual" in str(code)
    embedding = {"matryoshka": [], "separator": contextual, "contextual": contextual, "tanh": False, "pooling": "mean"}
    embedding |= {"max_length": reader.limits(limits), "context_length": None}
    return embedding, reader.problems, reader.not_exported


def _read_modules(reader: _Reader, hidden_size: int | None) -> dict[tuple[str, str], object]:
    """Check the files of sentence-transformers and return its limit on tokens, {(file, field): value} or empty."""
    modules = reader.read(MODULES, list)
    if (reader.folder / MODULES).is_file():
        _check_modules(reader, modules, hidden_size)
    longest = {}
    for name in TRANSFORMER:
        fields = reader.read(name)
        reader.check(name, fields, TRANSFORMER_FIELDS, known=True)
        if fields and not longest:  # the first file counts
            longest = {(name, "max_seq_length"): fields.get("max_seq_length")}
    model = reader.read(MODEL)
    reader.check(MODEL, model, {"model_type": ("SentenceTransformer",)})
    cut = model.get("truncate_dim")
    if cut is not None and hidden_size and not (type(cut) is int and cut >= hidden_size):
        reader.problems.append(
            f"{MODEL} has truncate_dim={cut!r:.80}, expected null or at least {hidden_size}: "
            "`encode` takes truncate_dim"
        )
    prompts, default = model.get("prompts"), model.get("default_prompt_name")
    if not isinstance(prompts, dict | None) or not isinstance(default, str | None):
        reader.problems.append(
            f"{MODEL} has prompts={prompts!r:.80} and default_prompt_name={default!r:.80}, "
            "expected an object and a name in it"
        )
    elif default is not None and (prompt := (prompts or {}).get(default)) != "":
        reader.problems.append(f"{MODEL} puts the prompt {prompt!r} before texts, which is not supported")
    named = [name for name, prompt in prompts.items() if prompt != ""] if isinstance(prompts, dict) else []
    if named:
        reader.not_exported.append(f"the prompts {brief(named, 3, ', ')}, which callers put before texts")
    if (similarity := model.get("similarity_fn_name")) not in (None, "cosine"):
        reader.not_exported.append(f"similarity_fn_name={similarity!r:.80}")
    return longest


def _check_modules(reader: _Reader, modules: list, hidden_size: int | None) -> None:
    if not modules or not all(
        isinstance(m, dict) and isinstance(m.get("type"), str) and isinstance(m.get("path"), str) for m in modules
    ):
        reader.problems.append(f"{MODULES} holds {modules!r:.80}, expected modules with type and path")
        return
    kinds = [_kind(module["type"]) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not {*kinds[2:]} <= {"Normalize", "FlexibleQuantizer"}:
        types = ", ".join(module["type"] for module in modules)
        reader.problems.append(
            f"{MODULES} has {types}, expected a Transformer and a Pooling of sentence-transformers, and after them "
            f"only Normalize or {QUANTIZER}"
        )
        return
    for kind, path in zip(kinds, [module["path"] for module in modules]):
        if kind == "Transformer" and path not in ("", "."):
            reader.problems.append(f"{MODULES} has its Transformer in {path!r}, expected the folder itself, ''")
        elif kind in ("Pooling", "Normalize") and (len(Path(path).parts) != 1 or path in ("/", "..")):
            reader.problems.append(f"{MODULES} names {path!r}, expected a folder in this one")
        elif kind == "Pooling":
            name = f"{path}/config.json"
            if not (reader.folder / name).is_file():
                reader.problems.append(f"{name} is missing, but it must say how to pool")
            fields = reader.read(name)
            width = dict.fromkeys(DIMENSIONS, (hidden_size,)) if hidden_size else {}
            reader.check(name, fields, POOLING_FIELDS | width, known=True)
        elif kind == "Normalize":
            reader.not_exported.append("Normalize, so vectors keep their lengths")
            reader.check(f"{path}/config.json", reader.read(f"{path}/config.json"), NORMALIZE_FIELDS)


def _kind(type_: str) -> str | None:
    """The class of a module of sentence-transformers, or the quantizer of the released pplx-embed; None for others."""
    package, _, name = type_.rpartition(".")
    return name if package.partition(".")[0] == "sentence_transformers" or type_ == QUANTIZER else None


def _read_tokenizer(reader: _Reader) -> dict:
    """Check the other files of the tokenizer against its model; return tokenizer_config.json."""
    name = tokenizers.CONFIG_FILE
    config, model = reader.read(name), reader.read(tokenizers.HUGGINGFACE_FILE)
    classes = TOKENIZER_CLASSES if model else (tokenizers.SENTENCEPIECE_CLASS, None)
    reader.check(name, config, TOKENIZER_FIELDS | {"tokenizer_class": classes})
    if not model:
        _check_beside_sentencepiece(reader, config)
        return config
    steps = [*_find(model.get("pre_tokenizer"), "type")]
    if config.get("tokenizer_class") in QWEN and (
        model.get("normalizer") != {"type": "NFC"} or steps != ["Sequence", "Split", "ByteLevel"]
    ):
        reader.problems.append(
            f"{name} has tokenizer_class={config['tokenizer_class']!r}, but tokenizer.json has another normalizer "
            "or pre-tokenizer"
        )
    prefix, expected = [*_find(model.get("pre_tokenizer"), "add_prefix_space")], config.get("add_prefix_space")
    if expected is not None and any(not _same(x, expected) for x in prefix or [False]):
        reader.problems.append(
            f"{name} has add_prefix_space={expected!r:.80}, but tokenizer.json has {(prefix or [False])[0]!r:.80}"
        )
    entries = model.get("added_tokens")  # `tokenizers.load` refuses malformed ones
    entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    entries = [e for e in entries if isinstance(e.get("id"), int) and isinstance(e.get("content"), str)]
    added = {entry["id"]: entry for entry in entries}
    ids = {entry["content"]: entry["id"] for entry in entries}
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        reader.problems.append(f"{name} has added_tokens_decoder={decoder!r:.80}, expected an object")
        decoder = {}
    for key, entry in decoder.items():
        other = added.get(int(key)) if key.isdecimal() else None
        if not isinstance(entry, dict) or other is None or any(other.get(k) != v for k, v in entry.items()):
            reader.problems.append(f"{name} has token {key} as {entry!r:.160}, which differs from tokenizer.json")
    vocabulary = model["model"].get("vocab") if isinstance(model.get("model"), dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        vocabulary = {x[0]: i for i, x in enumerate(vocabulary) if isinstance(x, list) and x and isinstance(x[0], str)}
    vocabulary = vocabulary if isinstance(vocabulary, dict) else {}
    for token, index in reader.read(ADDED_TOKENS).items():
        if (known := ids.get(token, vocabulary.get(token))) != index:
            reader.problems.append(
                f"{ADDED_TOKENS} has the id {index!r:.80} for {token!r:.80}, tokenizer.json has {known}"
            )
    for file, document in ((name, config), (SPECIAL_TOKENS, reader.read(SPECIAL_TOKENS))):
        for field, token in _named_tokens(document):
            if token in vocabulary and token not in ids:
                reader.problems.append(f"{file} has {field}={token!r:.80}, expected a special token of tokenizer.json")
    return config


def _check_beside_sentencepiece(reader: _Reader, config: Mapping) -> None:
    """Check the tokens that other files add to a SentencePiece model.

    transformers splits texts at them before the model reads a text.
    """
    try:
        tokenizer = tokenizers.load(reader.folder)
    except (ValueError, FileNotFoundError):  # raised again when the tokenizer is used
        return
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        reader.problems.append(f"{tokenizers.CONFIG_FILE} has added_tokens_decoder={decoder!r:.80}, expected an object")
        decoder = {}
    contents = {key: entry.get("content") if isinstance(entry, dict) else entry for key, entry in decoder.items()}
    added = [(tokenizers.CONFIG_FILE, token, int(key) if key.isdecimal() else key) for key, token in contents.items()]
    added += [(ADDED_TOKENS, token, index) for token, index in reader.read(ADDED_TOKENS).items()]
    for file, token, index in added:
        known, is_control = (tokenizer.find(token) if isinstance(token, str) else None) or (None, False)
        if type(index) is not int or known != index or not (is_control or token == tokenizer.unknown):
            reader.problems.append(
                f"{file} has the id {index!r:.80} for {token!r:.80}, expected the id of a control symbol of the "
                "SentencePiece model"
            )
    for file, document in ((tokenizers.CONFIG_FILE, config), (SPECIAL_TOKENS, reader.read(SPECIAL_TOKENS))):
        for field, token in _named_tokens(document):
            _, is_control = tokenizer.find(token) or (None, True)
            if not is_control and token != tokenizer.unknown:
                reader.problems.append(
                    f"{file} has {field}={token!r:.80}, expected a control symbol of the SentencePiece model"
                )


def _find(value, field: str) -> Iterator:
    """All values of a field, at any depth of a JSON value."""
    if isinstance(value, dict):
        yield from [value[field]] if field in value else []
        value = list(value.values())
    for x in value if isinstance(value, list) else []:
        yield from _find(x, field)


def _named_tokens(document: Mapping) -> Iterator[tuple[str, str]]:
    """(field, token) of the tokens that transformers treats as special."""
    for field in (*NAMED_TOKENS, "additional_special_tokens", "extra_special_tokens"):
        value = document.get(field)
        for token in value if isinstance(value, list) else [value]:
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                yield field, token
