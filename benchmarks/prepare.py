"""Tokens per second of `embed prepare`, and its memory as the text grows, against what bounds and what does the same.

    python benchmarks/prepare.py speed --tokenizer=FOLDER [--text='FILES…'] [--megabytes=50] [--peers]
    python benchmarks/prepare.py memory --megabytes 100 1000 10000

`speed` prepares one diffusion task with one process per core, and in the same run

    encode_batch    the tokenizer alone, on all cores, texts in memory: the limit
    seqio           (--peers) seqio.scripts.cache_tasks_main on Beam's FnApiRunner, one worker per core
    datatrove       (--peers) its DocumentTokenizer, one task per core

`memory` prepares text of several sizes with a word-level tokenizer, which is fast, and prints the largest resident size
of a process. The text is that of --text (by default the Python sources of this environment), repeated with changes
until it has the size, as JSON lines in files of 16 MB. The peers need `pip install apache-beam 'sentencepiece<0.2.3'
datatrove`, the former in an environment of its own.
"""

import argparse
import glob
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from header import header

from embed import tokenizers
from embed.preparation import runners

FILE_BYTES = 16 << 20
LONGEST = 20_000  # characters of a text
SEPARATOR = "< sep >"  # of the tokenizer of words: no word has a space

GIN = """
mixtures.rates = {"diffusion": {"texts": 1.0}}
texts/task.source = @files()
texts/files.paths = "{data_root}/*.jsonl"
texts/task.kind = "text"
"""


def texts_of(pattern: str) -> list[str]:
    files = sorted(glob.glob(pattern or f"{sysconfig.get_path('stdlib')}/**/*.py", recursive=True))
    if not files:
        raise SystemExit(f"--text: no file matches {pattern}")
    texts = [Path(file).read_text(encoding="utf-8", errors="ignore") for file in files]
    return [text[i : i + LONGEST] for text in texts for i in range(0, len(text), LONGEST)]


def write_texts(folder: Path, texts: list[str], megabytes: float) -> int:
    """Writes about `megabytes` of text; returns the number of texts. Every repetition changes each text."""
    folder.mkdir(parents=True)
    size = count = part = 0
    out = open(folder / "00000.jsonl", "w", encoding="utf-8")
    while True:
        for index, text in enumerate(texts):
            line = json.dumps({"text": f"{count // len(texts)} {index}\n{text}"}, ensure_ascii=False) + "\n"
            out.write(line)
            count += 1
            if out.tell() > FILE_BYTES:
                size, part = size + out.tell(), part + 1
                out.close()
                if size >= megabytes * 1e6:
                    return count
                out = open(folder / f"{part:05d}.jsonl", "w", encoding="utf-8")
            if size + out.tell() >= megabytes * 1e6:
                out.close()
                return count


def read_text(folder: Path) -> Iterator[str]:
    for file in sorted(folder.glob("*.jsonl")):
        with open(file, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


def measured(command: list[str], **environment: str) -> tuple[float, float, float]:
    """(seconds, CPU seconds, largest resident MB of one process) of a command and its children."""
    peak, done = 0, threading.Event()
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            for status in glob.glob("/proc/[0-9]*/stat"):
                try:
                    fields = Path(status).read_text(encoding="utf-8").rpartition(")")[2].split()
                    if int(fields[2]) == process.pid:  # its process group
                        peak = max(peak, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
                except (OSError, IndexError):
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, before = time.monotonic(), os.times()
    code = process.wait()
    seconds, after = time.monotonic() - start, os.times()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, cpu, peak / 1e6


PREPARE = """
import sys
from embed import tokenizers
from embed.preparation.prepare import prepare
if __name__ == "__main__":
    out, gin_file, root, tokenizer = sys.argv[1:]
    prepare(out, gin_file=gin_file, data_root=root, tokenizer=tokenizers.load(tokenizer))
"""


def run_prepare(scratch: Path, text: Path, tokenizer: str) -> tuple[int, float, float, float]:
    """(tokens, seconds, CPU seconds, peak MB) of preparing the text."""
    (scratch / "data.gin").write_text(GIN, encoding="utf-8")
    (scratch / "run.py").write_text(PREPARE, encoding="utf-8")
    out = scratch / "prepared"
    figures = measured(
        [sys.executable, str(scratch / "run.py"), str(out), str(scratch / "data.gin"), str(text), tokenizer]
    )
    tokens = json.loads((out / "info.json").read_text(encoding="utf-8"))["counts"]["texts"]["tokens"]["tokens"]
    subprocess.run(["rm", "-r", str(out)], check=True)
    return tokens, *figures


ENCODE = """
import sys
from embed import tokenizers
sys.path.insert(0, sys.argv[3])
import prepare
from pathlib import Path
import time
encoder, texts = tokenizers.load(sys.argv[1])._tokenizer, list(prepare.read_text(Path(sys.argv[2])))
start = time.perf_counter()
batches = (encoder.encode_batch_fast(texts[i : i + 512], add_special_tokens=False) for i in range(0, len(texts), 512))
tokens = sum(len(encoding.ids) for batch in batches for encoding in batch)
print(tokens, time.perf_counter() - start)
"""

SEQIO = """
import json
from pathlib import Path

import seqio
import tensorflow as tf

from embed import tokenizers
from embed.preparation.seqio_tasks import TokenizerVocabulary

root, folder = (Path(__file__).parent / "arguments").read_text(encoding="utf-8").split("\\n")


def text(dataset):
    def read(line):
        return json.loads(line.numpy())["text"]

    def parsed(line):
        tokens = tf.py_function(read, [line], tf.string)
        tokens.set_shape([])
        return {"tokens": tokens}

    return dataset.map(parsed)


seqio.TaskRegistry.add(
    "texts",
    source=seqio.TextLineDataSource({"train": root + "/*.jsonl"}),
    preprocessors=[text, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder()],
    output_features={"tokens": seqio.Feature(TokenizerVocabulary(tokenizers.load(folder)), add_eos=False)},
)
"""

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    root, tokenizer, out, tasks = sys.argv[1:]
    tokens = DocumentTokenizer(output_folder=out, tokenizer_name_or_path=tokenizer, eos_token=None)
    pipeline = [JsonlReader(root), tokens]
    LocalPipelineExecutor(pipeline, tasks=int(tasks), workers=int(tasks), logging_dir=out + "/logs").run()
"""


def speed(arguments, scratch: Path) -> None:
    text = scratch / "text"
    count = write_texts(text, texts_of(arguments.text), arguments.megabytes[0])
    cores = str(runners.cores())
    rows = []
    command = [sys.executable, "-c", ENCODE, arguments.tokenizer, str(text), str(Path(__file__).parent)]
    tokens, seconds = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    rows.append(("encode_batch_fast", int(tokens), float(seconds), None, None))
    rows.append(("embed prepare", *run_prepare(scratch, text, arguments.tokenizer)))
    if arguments.peers:
        module = scratch / "peer_tasks.py"
        module.write_text(SEQIO, encoding="utf-8")
        (scratch / "arguments").write_text(f"{text}\n{arguments.tokenizer}", encoding="utf-8")
        options = f"--runner=FnApiRunner,--direct_running_mode=multi_processing,--direct_num_workers={cores}"
        command = [
            sys.executable,
            "-m",
            "seqio.scripts.cache_tasks_main",
            "--tasks=texts",
            "--module_import=peer_tasks",
        ]
        command += [f"--output_cache_dir={scratch}/seqio", f"--pipeline_options={options}"]
        rows.append(("seqio cache_tasks", int(tokens), *measured(command, PYTHONPATH=str(scratch))))
        (scratch / "run_datatrove.py").write_text(DATATROVE, encoding="utf-8")
        command = [
            sys.executable,
            str(scratch / "run_datatrove.py"),
            str(text),
            f"{arguments.tokenizer}/tokenizer.json",
        ]
        rows.append(("datatrove", int(tokens), *measured([*command, f"{scratch}/trove", cores])))
    print(header("tokenizers") + "\n")
    print(f"{arguments.megabytes[0]:g} MB of text, {count:,} documents, {int(tokens):,} tokens, {cores} cores\n")
    print("| | seconds | CPU seconds | million tokens/s | of the limit | largest process, MB |")
    print("|---|--:|--:|--:|--:|--:|")
    limit = rows[0][1] / rows[0][2]
    for name, tokens, seconds, cpu, peak in rows:
        rate = tokens / seconds
        rest = f"{rate / 1e6:.3f} | {rate / limit:.2f} | {'' if peak is None else f'{peak:.0f}'}"
        print(f"| {name} | {seconds:.1f} | {'' if cpu is None else f'{cpu:.1f}'} | {rest} |")


def memory(arguments, scratch: Path) -> None:
    texts = texts_of(arguments.text)
    tokenizer = word_level(scratch / "words", texts)
    rows = []
    for megabytes in arguments.megabytes:
        text = scratch / f"{megabytes:g}"
        count = write_texts(text, texts, megabytes)
        rows.append((megabytes, count, *run_prepare(scratch, text, tokenizer)))
        subprocess.run(["rm", "-r", str(text)], check=True)
    print(header("tokenizers") + "\n")
    print("| MB of text | documents | tokens | seconds | largest process, MB |\n|--:|--:|--:|--:|--:|")
    for megabytes, count, tokens, seconds, _, peak in rows:
        print(f"| {megabytes:,.0f} | {count:,} | {tokens:,} | {seconds:.0f} | {peak:.0f} |")


def word_level(folder: Path, texts: list[str]) -> str:
    """A folder with a tokenizer of whole words."""
    import tokenizers as hf

    model = hf.Tokenizer(hf.models.WordLevel(unk_token="<unk>"))
    model.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    trainer = hf.trainers.WordLevelTrainer(vocab_size=50_000, special_tokens=["<unk>", SEPARATOR])
    model.train_from_iterator(texts[:2000], trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"sep_token": SEPARATOR}), encoding="utf-8")
    tokenizers.load(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--text", default="", help="glob of text files (default: Python's standard library)")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[50.0])
    parser.add_argument("--tokenizer", help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--peers", action="store_true", help="run seqio and datatrove too")
    parser.add_argument("--scratch", help="folder for the text (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        (speed if arguments.what == "speed" else memory)(arguments, Path(scratch))


if __name__ == "__main__":
    main()
