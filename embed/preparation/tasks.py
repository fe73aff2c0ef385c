"""Our tokenizer as a seqio vocabulary, the seqio tasks over `python_docs`, and their mixtures.

task                       columns (all int32[length])
python_docs_text           tokens
python_docs_summaries      query, document          docstring summary -> function without docstring
python_docs_descriptions   query, document          rest of the docstring's prose -> function
python_docs_parameters     query, document          parameter documentation -> function
python_docs_names          query, document          words of class, name and arguments -> body
python_docs_classes        query, document          class summary -> class header and method signatures
python_docs_members        query, document          words and summary of a class or module -> one of its functions
python_docs_modules        document, chunk_lengths, queries, query_lengths, positives; see examples.chunks
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from embed.data.loader import COLUMNS
from embed.preparation import examples
from embed.tokenizers import Tokenizer

BATCH = 512  # texts per call of the tokenizer
# Limits the characters to tokenize: no token is longer than 16 characters, and the tokenizer squeezes indentation.
CHARACTERS_PER_TOKEN = 20
TRUNCATED, OVER_LIMIT, WITHOUT_QUERY = (
    "texts cut to their length",
    "modules beyond max_characters",
    "documents without a query",
)
PAIRS = {
    "python_docs_summaries": ("functions", examples.summary_pairs),
    "python_docs_descriptions": ("functions", examples.description_pairs),
    "python_docs_parameters": ("functions", examples.parameter_pairs),
    "python_docs_names": ("modules", examples.name_pairs),
    "python_docs_classes": ("modules", examples.class_pairs),
    "python_docs_members": ("modules", examples.member_pairs),
}
TASKS = {
    "python_docs_text": "diffusion",
    **dict.fromkeys(PAIRS, "pair"),
    "python_docs_modules": "contextual",
}
# The config of `python_docs` that a task reads.
CONFIGS = {name: PAIRS[name][0] if name in PAIRS else "modules" for name in TASKS}


class TokenizerVocabulary(seqio.Vocabulary):
    """Our tokenizer as a seqio vocabulary: the same tokens as at inference, no EOS.

    `lost` counts, by reason, what the preprocessors truncated or left out since it was last cleared.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.lost = Counter()

    bos_id = eos_id = unk_id = None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode([s])[0].tolist()

    def _decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text):  # bytes in a graph, an array in eager mode
            return self.tokenizer.encode([tf.compat.as_text(np.asarray(text).item())])[0]

        tokens = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        tokens.set_shape([None])
        return tokens

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda i: self.tokenizer.decode(i).encode(), [ids], tf.string, stateful=False)

    def __eq__(self, other) -> bool:
        return isinstance(other, TokenizerVocabulary) and other.tokenizer.digest == self.tokenizer.digest

    def __hash__(self) -> int:
        return hash(self.tokenizer.digest)

    def encode_batch(self, texts: Sequence[str], length: int | None = None) -> list[np.ndarray]:
        """int32[at most length] per text."""
        if length is None:
            return self.tokenizer.encode(texts)
        prefixes = [text[: length * CHARACTERS_PER_TOKEN] for text in texts]
        encoded = self.tokenizer.encode(prefixes)
        self.lost[TRUNCATED] += sum(len(a) < len(b) or len(t) > length for a, b, t in zip(prefixes, texts, encoded))
        return [tokens[:length] for tokens in encoded]


class _ReadOnce(seqio.TfdsDataSource):
    """A TFDS source that reads and parses a split once for all tasks.

    The tasks share the split's dataset, which TFDS caches in memory unless it is large.
    """

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self._datasets: dict[str, tf.data.Dataset] = {}

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None):
        if shuffle or shard_info:
            return super().get_dataset(split, shuffle, seed, shard_info)
        if split not in self._datasets:
            self._datasets[split] = super().get_dataset(split, shuffle=False)
        return self._datasets[split]


def register(
    data_dir: str | Path,
    version: str,
    tokenizer: Tokenizer,
    *,
    max_text_characters: int,
    chunk_length: int,
    context_length: int,
    context_query_length: int,
    max_chunks: int,
) -> None:
    """Registers (anew) every task over the `python_docs` build of `version` in `data_dir`.

    The lengths of pair tasks come from seqio's `sequence_length`. Those of the contextual task are in tokens.
    """
    sources = {
        config: _ReadOnce(
            tfds_name=f"python_docs/{config}:{version}",
            tfds_data_dir=str(data_dir),
            splits=("train", "development", "test"),
            read_only=True,
        )
        for config in set(CONFIGS.values())
    }

    def add(name: str, preprocessor: Callable) -> None:
        vocabulary = TokenizerVocabulary(tokenizer)  # one per task, since it counts what the task lost
        seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=sources[CONFIGS[name]],
            preprocessors=[preprocessor],
            output_features={
                column: seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32) for column in COLUMNS[TASKS[name]]
            },
        )

    add("python_docs_text", functools.partial(text, max_characters=max_text_characters))
    for name, (_, make) in PAIRS.items():
        add(name, functools.partial(pairs, make=make))
    add(
        "python_docs_modules",
        functools.partial(
            contextual,
            chunk_length=chunk_length,
            context_length=context_length,
            query_length=context_query_length,
            max_chunks=max_chunks,
        ),
    )


def register_mixtures(mixtures: Mapping[str, Mapping[str, float]]) -> None:
    """Registers (anew) seqio mixtures: {mixture: {task: rate}}."""
    for name, rates in mixtures.items():
        seqio.MixtureRegistry.remove(name)
        seqio.MixtureRegistry.add(name, [(task, float(rate)) for task, rate in rates.items()])


def mixture_rates(name: str) -> dict[str, float]:
    """{task: rate} of a registered seqio mixture."""
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: mixture.get_rate(task) for task in mixture.tasks}


# --- preprocessors: tf.data to tf.data, with Python in between --------------------------------------------------------


def text(dataset: tf.data.Dataset, output_features, max_characters: int) -> tf.data.Dataset:
    """Module sources, up to `max_characters` in total: a fair sample, since records are in order of content."""
    vocabulary = output_features["tokens"].vocabulary

    def generate():
        total = 0
        batch = []
        for record in _records(dataset, ("text",)):
            source = record["text"][: max(max_characters - total, 0)]
            total += len(source)
            vocabulary.lost[OVER_LIMIT] += len(source) < len(record["text"])
            if source:
                batch.append(source)
            if sum(map(len, batch)) > 1_000_000:
                yield {"tokens": vocabulary.encode_batch(batch)}
                batch = []
        yield {"tokens": vocabulary.encode_batch(batch)}

    return _ragged(generate, ("tokens",))


def pairs(
    dataset: tf.data.Dataset, output_features, sequence_length: Mapping[str, int] | None, make: Callable
) -> tf.data.Dataset:
    """The pairs that `make` yields for each record, tokenized and truncated to `sequence_length`."""
    lengths = sequence_length or {}

    def generate():
        for batch in _batches(pair for record in _records(dataset) for pair in make(record)):
            yield {
                column: output_features[column].vocabulary.encode_batch(texts, lengths.get(column))
                for column, texts in zip(("query", "document"), zip(*batch))
            }

    return _ragged(generate, ("query", "document"))


def contextual(
    dataset: tf.data.Dataset,
    output_features,
    chunk_length: int,
    context_length: int,
    query_length: int,
    max_chunks: int,
) -> tf.data.Dataset:
    """Modules as documents of chunks with queries. Documents without a query are left out."""
    vocabulary = output_features["document"].vocabulary

    def generate():
        for modules in _batches((examples.chunks(record) for record in _records(dataset)), 16):
            flat = [chunk for chunks in modules for chunk in chunks]
            tokens = vocabulary.encode_batch([chunk.text for chunk in flat], chunk_length)
            with_query = [i for i, chunk in enumerate(flat) if chunk.query]
            queries = dict(zip(with_query, vocabulary.encode_batch([flat[i].query for i in with_query], query_length)))
            batch = {column: [] for column in COLUMNS["contextual"]}
            first = 0
            for chunks in modules:
                chunk_tokens = tokens[first : first + len(chunks)]
                for document in examples.documents(
                    [c.header for c in chunks],
                    [len(t) for t in chunk_tokens],
                    max_chunks=max_chunks,
                    max_tokens=context_length,
                ):
                    positives = [position for position, i in enumerate(document) if first + i in queries]
                    vocabulary.lost[WITHOUT_QUERY] += not positives
                    if positives:
                        document_queries = [queries[first + document[position]] for position in positives]
                        batch["document"].append(np.concatenate([chunk_tokens[i] for i in document]))
                        batch["chunk_lengths"].append(np.array([len(chunk_tokens[i]) for i in document], np.int32))
                        batch["queries"].append(np.concatenate(document_queries))
                        batch["query_lengths"].append(np.array([len(q) for q in document_queries], np.int32))
                        batch["positives"].append(np.array(positives, np.int32))
                first += len(chunks)
            yield batch

    return _ragged(generate, COLUMNS["contextual"])


def _records(dataset: tf.data.Dataset, features: Sequence[str] | None = None) -> Iterator[dict]:
    """Records with str instead of bytes, and with lists of dictionaries for sequences of structures."""
    if features:
        dataset = dataset.map(lambda record: {name: record[name] for name in features})
    for batch in dataset.ragged_batch(128):  # one record at a time takes three times as long
        yield from _rows({name: _column(value) for name, value in batch.items()})


def _column(value) -> list:
    """One feature of a batch, as a list with an entry per record."""
    if isinstance(value, dict):
        columns = {name: _column(item) for name, item in value.items()}
        return [_rows(dict(zip(columns, row))) for row in zip(*columns.values())]
    if isinstance(value, tf.RaggedTensor):
        values, splits = _column(value.values), value.row_splits.numpy().tolist()
        return [values[start:stop] for start, stop in zip(splits, splits[1:])]
    values = value.numpy().tolist()
    return [v.decode("utf-8", "replace") for v in values] if value.dtype == tf.string else values


def _rows(columns: Mapping[str, list]) -> list[dict]:
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _batches(items: Iterable, size: int = BATCH) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _ragged(generate: Callable[[], Iterator[dict[str, list[np.ndarray]]]], columns: Sequence[str]) -> tf.data.Dataset:
    """A dataset of single examples from a generator of batches."""

    def ragged():
        for batch in generate():
            if batch[columns[0]]:
                yield {
                    column: tf.RaggedTensor.from_row_lengths(
                        np.concatenate(arrays), [len(array) for array in arrays], validate=False
                    )
                    for column, arrays in batch.items()
                }

    signature = {column: tf.RaggedTensorSpec([None, None], tf.int32, row_splits_dtype=tf.int64) for column in columns}
    return tf.data.Dataset.from_generator(ragged, output_signature=signature).unbatch()
