"""How much of its document a contextual model hears: nDCG@10 by a chunk's place in its document.

    python benchmarks/context.py --model=RUN/export/embed-context --data=RUN/data/evaluation/contextual/test

Three ways to embed the same chunks: alone; in context (late chunking); and alone plus 0.75 times the embedding of the
document's first chunk, both of unit length. The last one hands every chunk the module's name without the help of
attention: what the model's own embeddings would reach if late chunking brought that name along.
"""

import argparse

import numpy as np

from embed import inference
from embed.checkpoints.provenance import made_with
from embed.evaluation import retrieval
from embed.graph import machine
from embed.inference.index import Index

HEADER = 0.75  # of 0.25, 0.5, 0.75, 1 and 1.5 the best in the first run
PLACES = ((1, 1), (2, 3), (4, 7), (8, 15))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an exported model")
    parser.add_argument("--data", required=True, help="a set of chunked documents")
    arguments = parser.parse_args()
    encoder, data = inference.load(arguments.model), retrieval.read_set(arguments.data)
    queries, alone = retrieval.embed_set(encoder, data, alone=True)
    context, alone = retrieval.embed_set(encoder, data)[1], unit(alone)
    first, place = np.zeros_like(alone), np.zeros(len(alone), int)
    for rows in data.documents:
        first[rows], place[rows] = alone[rows[0]], np.arange(len(rows))
    # Queries with one answer, by its place.
    asked = np.array([place[r.indices[0]] if len(r.indices) == 1 else -1 for r in data.relevant])
    groups = [("all", np.ones(len(asked), bool))]
    groups += [(f"{a}" if a == b else f"{a} to {b}", (asked >= a) & (asked <= b)) for a, b in PLACES]
    scores = []
    for corpus in (alone, context, alone + HEADER * first):
        _, ranking = Index(corpus, "float32").search(queries, 10)
        scores.append(retrieval.ndcg(ranking, data.relevant, 10))
    source = made_with()
    print(f"python benchmarks/context.py: {arguments.model}, {arguments.data}; commit {source['commit']},")
    print(f"{machine()}, jax {source['versions']['jax']}\n")
    print("| chunk's place | queries | alone | in context | alone + header |\n|---|---|---|---|---|")
    for name, chosen in groups:
        print(f"| {name} | {chosen.sum()} | " + " | ".join(f"{s[chosen].mean():.3f}" for s in scores) + " |")


if __name__ == "__main__":
    main()
