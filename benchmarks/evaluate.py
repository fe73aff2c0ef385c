"""One exported model on one task of mteb, through sentence-transformers and through our adapter: scores, time, memory.

    python benchmarks/evaluate.py --model=RUN/export/embed --data_root=DATA --task=SciFact

Each side runs in a process of its own, in turns, `--repeats` times. Seconds are those of mteb with the data already
loaded: tokenize, encode, search and score in float32. Memory is the largest resident size of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

from header import header

SIDES = ("sentence-transformers", "embed")


def measure(side: str, arguments: argparse.Namespace) -> dict:
    """{"ndcg@10", "seconds", "load", "gigabytes"} of a side, in this process."""
    import mteb

    from embed.evaluation import mteb_tasks

    (task,) = mteb_tasks.find(tasks=[arguments.task], data_root=arguments.data_root)
    task.load_data()
    how = dict(cache=None, co2_tracker=False, show_progress_bar=False)
    start = time.perf_counter()
    if side == "embed":
        from embed import inference
        from embed.evaluation import mteb_model
        from embed.evaluation.models import Candidate
        from embed.evaluation.retrieval import Form

        candidate = Candidate("local/model", "1", inference.load(arguments.model))
        model = mteb_model.Adapter(candidate, Form("float32"), mteb_model.Cache())
    else:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(arguments.model, device=arguments.device)
    loaded = time.perf_counter()
    (result,) = mteb.evaluate(model, task, encode_kwargs={"show_progress_bar": False}, **how).task_results
    seconds = time.perf_counter() - loaded
    score = next(iter(result.scores.values()))[0]["ndcg_at_10"]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"ndcg@10": score, "load": loaded - start, "seconds": seconds, "gigabytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an exported model")
    parser.add_argument("--data_root", required=True, help="folder with the folder of the task")
    parser.add_argument("--task", default="SciFact")
    parser.add_argument("--device", default="cpu", help="of sentence-transformers")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # of the process that measures
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    rows = []
    for _ in range(arguments.repeats):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, *sys.argv, f"--side={side}"], stdout=subprocess.PIPE, text=True, check=True
            )
            rows.append((side, json.loads(done.stdout.splitlines()[-1])))
    print(header() + "\n")
    print("| through | nDCG@10 | load, s | evaluate, s | memory, GB |\n|---|--:|--:|--:|--:|")
    for side, row in rows:
        print(f"| {side} | {row['ndcg@10']:.5f} | {row['load']:.1f} | {row['seconds']:.1f} | {row['gigabytes']:.2f} |")
    best = {side: min(row["seconds"] for name, row in rows if name == side) for side in SIDES}
    print(f"\nseconds of {SIDES[0]} divided by those of {SIDES[1]}: {best[SIDES[0]] / best[SIDES[1]]:.2f}")


if __name__ == "__main__":
    main()
