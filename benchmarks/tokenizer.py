"""Whether `embed.tokenizers` gives the same ids for a Qwen tokenizer.json as tiktoken does with Qwen's own ranks.

    python benchmarks/tokenizer.py --tokenizer=FOLDER --ranks=qwen.tiktoken TEXT_FILE…

Needs `pip install tiktoken`. A text is 20 lines of a UTF-8 file, including line ends. Exit code 1 if any text differs.
"""

import argparse
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
from header import header

from embed import tokenizers

LINES = 20

# Qwen's pattern for splitting text before the merges.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--ranks", required=True, help="path of qwen.tiktoken")
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
    print(header("tokenizers", "tiktoken") + "\n")
    print(f"{len(arguments.texts)} files, {len(texts):,} texts, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
    print(f"{len(differing)} texts differ" + "".join(f"\n  {texts[i]!r:.100}" for i in differing[:10]))
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
