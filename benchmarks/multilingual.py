"""The table of a run of configs/multilingual.py: nDCG@10 by set and language, and similarity of sentences.

    python benchmarks/multilingual.py --run=RUN --data_root=DATA [--model=merged]

The first table has the figures of RUN/results.json for one checkpoint against BM25 and the model before any training
(float32), the second those of the documents of chunks, where BM25 reads a chunk with the first one of its document. The
third is Spearman's correlation of cosines (of binary vectors: of the number of equal bits) with the scores of people on
JSTS and KLUE-STS, with the exported model.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from header import header
from scipy.stats import spearmanr

from embed import inference

PRECISIONS = ("float32", "int8", "binary")
LANGUAGES = {
    "arcd": "ar",
    "cmrc": "zh",
    "jsquad": "ja",
    "norquad": "no",
    "tldr_translations": "39 languages",
}
SENTENCES = {"JSTS (ja)": "jglue/jsts-valid.jsonl.gz", "KLUE-STS (ko)": "klue/sts-dev.jsonl.gz"}


def language(name: str) -> str:
    name = name.removesuffix("_alone")
    return LANGUAGES.get(name) or (name.removeprefix("tldr_") if name.startswith("tldr_") else "en")


def cells(row: dict, evaluation: str) -> list[str]:
    figures = row.get(evaluation, {})
    return [f"{figures[p]['ndcg@10']:.3f}" if p in figures else "" for p in PRECISIONS]


def correlation(encoder, file: Path, precision: str) -> float:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    a, b = (encoder.encode([row[name] for row in rows], precision=precision) for name in ("sentence1", "sentence2"))
    if precision == "binary":
        similar = -np.bitwise_count((a ^ b).view(np.uint8)).sum(1, dtype=np.int64)
    else:
        a, b = a.astype(np.float64), b.astype(np.float64)
        similar = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return spearmanr(similar, [row["score"] for row in rows]).statistic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="workdir of the run")
    parser.add_argument("--data_root", required=True, type=Path, help="folder with jglue and klue")
    parser.add_argument("--model", default="merged", help="the checkpoint of the first table (default merged)")
    arguments = parser.parse_args()
    results = json.loads((arguments.run / "results.json").read_text(encoding="utf-8"))
    rows, counts = results["checkpoints"], results["data"]["counts"]
    encoder = inference.load(arguments.run / "export" / "embed")
    print(header() + "\n")
    models = " | ".join(f"{arguments.model} {p}" for p in PRECISIONS)
    print(f"| set | language | queries | BM25 | untrained | {models} |\n|---|---|--:|--:|--:|--:|--:|--:|")
    in_context = [name for name in rows["BM25"] if name.startswith("squad_") or name in ("medquad", "jsquad")]
    for name in rows["BM25"]:
        if name in in_context and name != "squad_alone":
            continue
        size = counts.get(f"evaluation/{name.removesuffix('_alone')}/test", {}).get("queries")
        size = size or counts["evaluation/squad/chunks_1"]["queries"]
        figures = [cells(rows[row], name)[0] for row in ("BM25", "random init")] + cells(rows[arguments.model], name)
        print(f"| {name} | {language(name)} | {size:,} | {' | '.join(figures)} |")
    print("\n| documents of chunks | BM25 | checkpoint | alone | in context, float32 | int8 | binary |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for checkpoint in ("contextual", "merged"):
        for name in in_context:
            alone = "squad_alone" if name.startswith("squad") else f"{name}_alone"
            if name != alone:
                figures = [cells(rows[checkpoint], alone)[0], *cells(rows[checkpoint], name)]
                print(f"| {name} | {cells(rows['BM25'], name)[0]} | {checkpoint} | {' | '.join(figures)} |")
    print(f"\n| Spearman | {' | '.join(PRECISIONS)} |\n|---|--:|--:|--:|")
    for name, file in SENTENCES.items():
        figures = [correlation(encoder, arguments.data_root / file, p) for p in PRECISIONS]
        print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")


if __name__ == "__main__":
    main()
