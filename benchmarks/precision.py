"""Whether the tanh or the rounding makes int8 differ from float32: nDCG@10 of one model on one evaluation set.

    python benchmarks/precision.py --model=RUN/export/embed-context --data=RUN/data/evaluation/functions/test

float32 is the pooled mean v, tanh is 127 tanh(v) without rounding, int8 is round(127 tanh(v)).
"""

import argparse

import numpy as np
from header import header

from embed import inference
from embed.evaluation.retrieval import embed_corpus, embed_queries, score
from embed.evaluation.sets import read_set
from embed.inference.ranking import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder or hub id")
    parser.add_argument("--data", required=True, help="folder of an evaluation set")
    arguments = parser.parse_args()
    encoder, data = inference.load(arguments.model, dtype="float32"), read_set(arguments.data)
    queries, documents = embed_queries(encoder, data), embed_corpus(encoder, data, alone=True)
    variants = {
        "float32": ("float32", lambda v: v),
        "tanh": ("float32", lambda v: np.tanh(v)),
        "int8": ("int8", lambda v: inference.quantize(v, "int8")),
    }
    print(header() + "\n")
    largest, share = np.abs(documents).max(), (np.abs(documents) > 1).mean()
    print(f"|v| of documents: mean {np.abs(documents).mean():.3f}, largest {largest:.2f}, above 1 {share:.2%}\n")
    print("| " + " | ".join(variants) + " |\n|" + "---|" * len(variants))
    scores = []
    for precision, change in variants.values():
        _, ranking = search(change(queries), change(documents), 10, precision)
        scores.append(score(ranking, data, ["ndcg@10"])["ndcg@10"])
    print("| " + " | ".join(f"{score:.4f}" for score in scores) + " |")


if __name__ == "__main__":
    main()
