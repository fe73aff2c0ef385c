"""Late chunking by length: how often a query finds its passage in a long text, and what it costs.

    python benchmarks/long.py --model=RUN/export/embed-context --data=RUN/data/evaluation/contextual/test

Each text of `embed.evaluation.needles` hides one passage that answers a query among passages that do not. A chunker
divides it into chunks of at most `--chunk_tokens` tokens, and the chunk with the largest cosine must overlap with the
passage. Chunks are embedded in three ways: in overlapping windows (`encode_long`), in the whole text as one window, and
each alone. Seconds are per text, in float32, after a first text has compiled the programs.
"""

import argparse
import time

import numpy as np
from header import header

from embed import inference
from embed.evaluation import needles
from embed.evaluation.sets import read_set
from embed.inference import chunkers

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a contextual model")
    parser.add_argument("--data", required=True, help="folder of an evaluation set")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a text")
    parser.add_argument("--whole", type=int, default=8192, help="most tokens of a text that is encoded as one window")
    parser.add_argument("--chunk_tokens", type=int, default=128)
    parser.add_argument("--count", type=int, default=20, help="texts of a length")
    parser.add_argument("--window", type=int, help="tokens of a window (default: the model's context_length)")
    arguments = parser.parse_args()
    encoder, data = inference.load(arguments.model), read_set(arguments.data)
    window = arguments.window or encoder.context_length
    chunker = chunkers.paragraphs(encoder.tokenizer, arguments.chunk_tokens)
    print(
        header() + f"\nmodel {encoder.digest[:12]}, windows of {window} tokens, {arguments.count} texts of a length\n"
    )
    names = ["windows", "whole", "alone"]
    print("| tokens | chunks | " + " | ".join(f"found, {name}" for name in names), end=" | ")
    print(" | ".join(f"s, {name}" for name in names) + " |")
    print("|--:" * (2 + 2 * len(names)) + "|")
    for length in arguments.lengths:
        hidden = needles.hide(data, length, encoder.tokenizer, arguments.count)
        queries = encoder.encode(hidden.queries)
        divided = [chunker(text) for text in hidden.corpus]
        relevant = [overlapping(data, hidden, i, offsets) for i, offsets in enumerate(divided)]
        cells = []
        ways = {
            "windows": lambda text, at: encoder.encode_long(text, lambda _: at, window=window).vectors,
            "whole": lambda text, at: encoder.encode_long(text, lambda _: at, window=10**9).vectors,
            "alone": lambda text, at: encoder.encode([text[a:b] for a, b in at]),
        }
        for name in names:
            if name == "whole" and length > arguments.whole:
                cells.append(("", ""))
                continue
            ways[name](hidden.corpus[0], divided[0])
            start = time.perf_counter()
            vectors = [ways[name](text, at) for text, at in zip(hidden.corpus, divided)]
            seconds = (time.perf_counter() - start) / len(vectors)
            best = [int(inference.similarity(query[None], some).argmax()) for query, some in zip(queries, vectors)]
            found = np.mean([chunk in chunks for chunk, chunks in zip(best, relevant)])
            cells.append((f"{found:.2f}", f"{seconds:.2f}"))
        chunks = np.mean([len(at) for at in divided])
        found, seconds = zip(*cells)
        print(f"| {length:,} | {chunks:.0f} | {' | '.join([*found, *seconds])} |", flush=True)


def overlapping(data, hidden, i: int, offsets: chunkers.Offsets) -> set[int]:
    """The chunks of text i that share characters with the passage that answers its query."""
    query = data.query_ids.index(hidden.query_ids[i])
    passage = data.corpus[data.relevant_rows[query][0]]
    start = hidden.corpus[i].index(passage)
    return {k for k, (a, b) in enumerate(offsets) if a < start + len(passage) and b > start}


if __name__ == "__main__":
    main()
