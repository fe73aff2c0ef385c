"""How much a contextual model uses the rest of a document, and what a longer document costs: nDCG@10, float32.

    python benchmarks/context.py --model=RUN/export/embed-context --data=RUN/data/evaluation/contextual/test
    python benchmarks/context.py --model=RUN/export/embed-context --data=RUN/data/evaluation/squad/articles

The first table is by the position of a chunk in its document. The same chunks are embedded in three ways: alone; in
context (late chunking); and alone plus 0.75 times the embedding of the document's first chunk, both of unit length. The
third adds what the first chunk says, such as a module's name, to every chunk without attention.

The second table is by the number of chunks in a document: consecutive chunks of the same documents, in groups. Its last
columns are mean cosines: of the chunks of a document with each other, and of a chunk in context with itself alone. If
the former is near 1, a vector says which document it is from and little else.

The third table shows what the rest of a document can say about a chunk at all, without attention: the vector of a chunk
alone plus w times the mean of those of its document, all of unit length; and the BM25 score of a chunk plus w times
that of its document as one text.
"""

import argparse

import bm25s
import numpy as np
from header import header

from embed import inference
from embed.evaluation.metrics import score_queries
from embed.evaluation.retrieval import embed_corpus, embed_queries
from embed.evaluation.sets import RetrievalSet, read_set
from embed.inference import lexical
from embed.inference.ranking import search

WEIGHT = 0.75  # of the first chunk: the best of 0.25, 0.5, 0.75, 1 and 1.5 in the first run
POSITIONS = ((1, 1), (2, 3), (4, 7), (8, 15))
GROUPS = (1, 2, 4, 8, 16)  # chunks of a document; then whole documents
MIXED = (0.1, 0.25, 0.5)  # weights of the document


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def bm25_scores(texts: list[str], queries: list[str]) -> np.ndarray:
    """float32[queries, texts]"""
    model = bm25s.BM25(method="lucene")
    model.index([lexical.words(text) for text in texts], show_progress=False)
    tokens = ([word for word in lexical.words(query) if word in model.vocab_dict] for query in queries)
    return np.stack([model.get_scores(some) if some else np.zeros(len(texts), np.float32) for some in tokens])


def ndcg(ranking: np.ndarray, data: RetrievalSet) -> np.ndarray:
    """nDCG@10 of each query."""
    return score_queries(ranking, data, ["ndcg@10"])["ndcg@10"]


def best(scores: np.ndarray) -> np.ndarray:
    """The ten best texts of each query, by score and index."""
    return np.argsort(-scores, 1, kind="stable")[:, :10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--data", required=True, help="folder of an evaluation set of chunked documents")
    arguments = parser.parse_args()
    encoder, data = inference.load(arguments.model), read_set(arguments.data)
    queries = embed_queries(encoder, data)
    context, alone = embed_corpus(encoder, data), unit(embed_corpus(encoder, data, alone=True))
    first, position = np.zeros_like(alone), np.zeros(len(alone), int)
    for chunks in data.documents:
        first[chunks], position[chunks] = alone[chunks[0]], np.arange(len(chunks))
    # The position of the relevant chunk of each query; -1 if the query has several.
    relevant = np.array([position[rows[0]] if len(rows) == 1 else -1 for rows in data.relevant_rows])
    groups = [("all", np.ones(len(relevant), bool))]
    groups += [(f"{a}" if a == b else f"{a} to {b}", (relevant >= a) & (relevant <= b)) for a, b in POSITIONS]
    scores = []
    for corpus in (alone, context, alone + WEIGHT * first):
        _, ranking = search(queries, corpus, 10, "float32")
        scores.append(ndcg(ranking, data))
    print(header() + "\n")
    print("| position of the chunk | queries | alone | in context | alone + first chunk |\n|---|---|---|---|---|")
    for name, selected in groups:
        print(f"| {name} | {selected.sum()} | " + " | ".join(f"{s[selected].mean():.3f}" for s in scores) + " |")
    print(
        "\n| chunks of a document | mean tokens | nDCG@10 | of a document | with itself alone |\n|---|---|---|---|---|"
    )
    most = max(map(len, data.documents))
    for count in [*(count for count in GROUPS if count < most), most]:
        parts = [rows[i : i + count] for rows in data.documents for i in range(0, len(rows), count)]
        vectors = np.zeros_like(alone)
        texts = [[data.corpus[i] for i in rows] for rows in parts]
        for rows, embedded in zip(parts, encoder.encode_documents(texts), strict=True):
            vectors[rows] = unit(embedded)
        _, ranking = search(queries, vectors, 10, "float32")
        found = ndcg(ranking, data).mean()
        tokens = np.mean([sum(map(len, encoder.tokenizer.encode(chunks))) for chunks in texts])
        pairs = [vectors[rows] @ vectors[rows].T for rows in parts if len(rows) > 1]
        among = np.mean([(p.sum() - len(p)) / (p.size - len(p)) for p in pairs]) if pairs else np.nan
        name = "all" if count == most else count
        print(f"| {name} | {tokens:,.0f} | {found:.3f} | {among:.3f} | {(vectors * alone).sum(1).mean():.3f} |")
    columns = [f"{what}, w = {w:g}" for what in ("dense", "BM25") for w in (0, *MIXED)]
    print(f"\n| chunks of a document | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    lexical = bm25_scores(data.corpus, data.queries)
    for count in [*(count for count in GROUPS[1:] if count < most), most]:
        parts = [rows[i : i + count] for rows in data.documents for i in range(0, len(rows), count)]
        mean, part_of = np.zeros_like(alone), np.zeros(len(alone), int)
        for number, rows in enumerate(parts):
            mean[rows], part_of[rows] = unit(alone[rows].mean(0)), number
        found = []
        for w in (0, *MIXED):
            _, ranking = search(queries, alone + w * mean, 10, "float32")
            found.append(ndcg(ranking, data).mean())
        whole = bm25_scores(["\n".join(data.corpus[i] for i in rows) for rows in parts], data.queries)[:, part_of]
        found += [ndcg(best(lexical + w * whole), data).mean() for w in (0, *MIXED)]
        name = "all" if count == most else count
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found)} |")


if __name__ == "__main__":
    main()
