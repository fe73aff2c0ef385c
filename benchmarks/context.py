"""How much a contextual model uses the rest of a document: nDCG@10 by the position of a chunk in its document.

    python benchmarks/context.py --model=RUN/export/embed-context --data=RUN/data/evaluation/contextual/test

The same chunks are embedded in three ways: alone; in context (late chunking); and alone plus 0.75 times the embedding
of the document's first chunk, both of unit length. The third adds the module's name, which is in the first chunk, to
every chunk without attention. It shows what late chunking would reach if it carried that name to all chunks.
"""

import argparse

import numpy as np
from header import header

from embed import inference
from embed.evaluation import retrieval
from embed.inference.index import Index

WEIGHT = 0.75  # of the first chunk: the best of 0.25, 0.5, 0.75, 1 and 1.5 in the first run
POSITIONS = ((1, 1), (2, 3), (4, 7), (8, 15))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--data", required=True, help="folder of an evaluation set of chunked documents")
    arguments = parser.parse_args()
    encoder, data = inference.load(arguments.model), retrieval.read_set(arguments.data)
    queries, alone = retrieval.embed_set(encoder, data, alone=True)
    context, alone = retrieval.embed_set(encoder, data)[1], unit(alone)
    first, position = np.zeros_like(alone), np.zeros(len(alone), int)
    for chunks in data.documents:
        first[chunks], position[chunks] = alone[chunks[0]], np.arange(len(chunks))
    # The position of the relevant chunk of each query; -1 if the query has several.
    relevant = np.array([position[r.indices[0]] if len(r.indices) == 1 else -1 for r in data.relevant])
    groups = [("all", np.ones(len(relevant), bool))]
    groups += [(f"{a}" if a == b else f"{a} to {b}", (relevant >= a) & (relevant <= b)) for a, b in POSITIONS]
    scores = []
    for corpus in (alone, context, alone + WEIGHT * first):
        _, ranking = Index(corpus, "float32").search(queries, 10)
        scores.append(retrieval.ndcg(ranking, data.relevant, 10))
    print(header() + "\n")
    print("| position of the chunk | queries | alone | in context | alone + first chunk |\n|---|---|---|---|---|")
    for name, selected in groups:
        print(f"| {name} | {selected.sum()} | " + " | ".join(f"{s[selected].mean():.3f}" for s in scores) + " |")


if __name__ == "__main__":
    main()
