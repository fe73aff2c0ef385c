"""Whether a Qwen tokenizer.json gives, through `embed.tokenizers`, the ids that Qwen's own tiktoken ranks give.

    python benchmarks/tokenizer.py --tokenizer=FOLDER --ranks=qwen.tiktoken TEXT_FILE…

Every 20 lines of the UTF-8 files are a text, line ends included. Needs `pip install tiktoken`. Exit code 1 if any text differs.
"""

import argparse
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np

from embed import tokenizers
from embed.checkpoints.provenance import made_with
from embed.graph import machine

LINES = 20

# How Qwen splits text before its merges.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--ranks", required=True, help="qwen.tiktoken")
    parser.add_argument("texts", nargs="+", help="UTF-8 files")
    arguments = parser.parse_args()
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ours = tokenizers.load(arguments.tokenizer)
    theirs = tiktoken.Encoding(
        "qwen", pat_str=PATTERN, mergeable_ranks=load_tiktoken_bpe(arguments.ranks), special_tokens={}
    )
    texts = []
    for path in arguments.texts:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        texts += ["".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    start = time.perf_counter()
    got = ours.encode(texts)
    seconds = time.perf_counter() - start
    differing = [
        i
        for i, (text, ids) in enumerate(zip(texts, got))
        if not np.array_equal(ids, theirs.encode_ordinary(unicodedata.normalize("NFC", text)))
    ]
    tokens = sum(map(len, got))
    print(f"python benchmarks/tokenizer.py; commit {made_with()['commit']}, {machine()}")
    print(f"{len(arguments.texts)} files, {len(texts):,} texts, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    print(f"{len(differing)} texts differ" + "".join(f"\n  {texts[i]!r:.100}" for i in differing[:10]))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
