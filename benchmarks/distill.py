"""A teacher, students that learned from it, and the same students without it: quality against size and speed on CPU.

    python benchmarks/distill.py --data_root=DATA --workdir=WORKDIR

DATA/medquad/medquad.jsonl.gz is MedQuAD: questions about diseases and the passages that answer them. The pairs of one
disease in ten are the evaluation set; pairs with a text of it are left out of training. An answer is its first
CHARACTERS characters. The commands, which are printed, train the teacher with configs/pairs.py, encode all texts of the
training pairs with it, and train each student twice with configs/distill.py. What is complete in WORKDIR is not done
again. Texts per second are those of `encode` in int8 for the evaluation set, the best of REPEATS turns of all models.
"""

import argparse
import gzip
import hashlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from header import header

CHARACTERS = 150
HELD_OUT = 10  # one disease in so many
REPEATS = 5
STEPS = "--config.stages.{stage}.curriculum=(({steps}, '{mixture}'),)"
TEACHER = [
    "--config.data.gin_bindings=('own/files.paths = \"{data_root}/train.jsonl\"',)",
    "--config.model.hidden_size=512",
    "--config.model.num_layers=2",
    "--config.stages.pair.matryoshka=(128, 256, 512)",
    STEPS.format(stage="diffusion", steps=10, mixture="diffusion"),
]
STUDENTS = {
    "256x1": ["--config.data.vocab_size=4096"],
    "128x1": [
        "--config.data.vocab_size=2048",
        "--config.model.hidden_size=128",
        "--config.model.num_heads=1",
        "--config.model.num_kv_heads=1",
        "--config.model.intermediate_size=64",
        *(f"--config.stages.{stage}.matryoshka=(64, 128)" for stage in ("distill", "pair")),
    ],
}


def write_data(source: Path, folder: Path) -> None:
    """train.jsonl and test.jsonl, pairs; texts.jsonl, every text of the training pairs once."""
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    sides: dict[bool, dict[tuple[str, str], None]] = {False: {}, True: {}}
    for row in rows:
        held_out = int(hashlib.sha256(row["focus"].encode()).hexdigest(), 16) % HELD_OUT == 0
        question, answer = (" ".join(row[name].split()) for name in ("question", "answer"))
        sides[held_out][question, answer[:CHARACTERS].strip()] = None
    evaluated = {text for pair in sides[True] for text in pair}
    train = [pair for pair in sides[False] if not evaluated & set(pair)]
    texts = dict.fromkeys(text for pair in train for text in pair)
    write(folder / "train.jsonl", (dict(zip(("query", "document"), pair)) for pair in train))
    write(folder / "test.jsonl", (dict(zip(("query", "document"), pair)) for pair in sides[True]))
    write(folder / "texts.jsonl", ({"_id": str(i), "text": text} for i, text in enumerate(texts)))


def write(file: Path, rows: Iterable[Mapping]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def embed(*arguments: str, output: Path | None = None) -> str:
    """Run a command of embed, unless its output exists; returns it."""
    if output is None or not output.exists():
        subprocess.run([sys.executable, "-m", "embed.cli", *arguments], check=True, stdout=sys.stderr)
    return f"embed {shlex.join(arguments)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, type=Path)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--teacher_steps", type=int, default=200)
    parser.add_argument("--student_steps", type=int, default=200)
    arguments = parser.parse_args()
    work, data = arguments.workdir, arguments.workdir / "data"
    if not (data / "texts.jsonl").exists():
        write_data(arguments.data_root / "medquad" / "medquad.jsonl.gz", data)
    data_root, teacher, vectors = f"--data_root={data}", work / "teacher" / "export" / "embed", data / "vectors.parquet"
    steps = STEPS.format(stage="pair", steps=arguments.teacher_steps, mixture="pairs")
    run = ["pipeline", "--config=configs/pairs.py", data_root, f"--workdir={work / 'teacher'}"]
    commands = [embed(*run, *TEACHER, steps)]
    encode = ["encode", f"--model={teacher}", f"--corpus={data / 'texts.jsonl'}", f"--output={vectors}"]
    commands.append(embed(*encode, output=vectors))
    for name in arguments.students:
        run = ["pipeline", f"--config=configs/distill.py:teacher={teacher},compare", data_root]
        stages = {"distill": "texts", "pair": "pairs"}
        how = [STEPS.format(stage=s, steps=arguments.student_steps, mixture=m) for s, m in stages.items()]
        commands.append(embed(*run, f"--workdir={work / name}", *STUDENTS[name], *how))
    print(header() + "\n\n" + "\n".join(f"    {command}" for command in commands) + "\n")
    report(work, data, teacher, arguments.students)


def report(work: Path, data: Path, teacher: Path, students: Iterable[str]) -> None:
    from embed import inference
    from embed.models.transformer import abstract_params, count_params

    files = {name: work / name / "results.json" for name in students}
    results = {name: json.loads(file.read_text(encoding="utf-8"))["checkpoints"] for name, file in files.items()}
    of_all = next(iter(results.values()))  # the evaluation set is the same
    rows = [("teacher", "", teacher, of_all[str(teacher)])]
    for name, of_student in results.items():
        rows.append((name, "untrained", None, of_student["random init"]))
        for stage, how in (("pair", "pairs alone"), ("distill", "distilled")):
            rows.append((name, how, work / name / "export" / stage, of_student[stage]))
    encoders = {folder: inference.load(folder) for _, _, folder, _ in rows if folder}
    texts = [row["query"] for row in lines(data / "test.jsonl")]
    texts += [row["document"] for row in lines(data / "test.jsonl")]
    seconds = {folder: [] for folder in encoders}
    for turn in range(1 + REPEATS):  # the first compiles
        for folder, encoder in encoders.items():
            start = time.perf_counter()
            encoder.encode(texts, precision="int8")
            seconds[folder] += [time.perf_counter() - start] if turn else []
    figures = of_all["BM25"]["pairs"]
    pairs, to_train = (len(lines(data / f"{name}.jsonl")) for name in ("train", "texts"))
    print(f"{pairs:,} pairs and {to_train:,} texts to train on, {len(texts):,} texts in the evaluation set.")
    print(f"BM25: nDCG@10 {figures['float32']['ndcg@10']:.3f}\n")
    print("| model | trained | layers | dimensions | vocabulary | parameters | of these outside the table | ", end="")
    print("nDCG@10 float32 | int8 | binary | texts/s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, how, folder, figures in rows:
        cells = ["", "", "", "", ""]
        if folder:
            config = encoders[folder].config
            total, rest = count_params(abstract_params(config))
            sizes = (config.num_layers, config.hidden_size, config.vocab_size, total, rest)
            cells = [f"{size:,}" for size in sizes]
        values = [f"{figures['pairs'][precision]['ndcg@10']:.3f}" for precision in ("float32", "int8", "binary")]
        rate = f"{len(texts) / min(seconds[folder]):,.0f}" if folder else ""
        print(f"| {' | '.join([name, how, *cells, *values, rate])} |")


if __name__ == "__main__":
    main()
