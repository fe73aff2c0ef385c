"""Seconds from the start of a program to its first vector: the first time, and when its compiled programs are kept.

    python benchmarks/startup.py --model=MODEL

Each row is a process of its own. The first one finds an empty ~/.cache/embed/compiled.
"""

import argparse
import os
import subprocess
import sys
import tempfile

from header import header

PROGRAM = """
import sys, time
start = time.perf_counter()
from embed.inference import load
imported = time.perf_counter()
encoder = load(sys.argv[1])
loaded = time.perf_counter()
encoder.encode("one text")
print(imported - start, loaded - imported, time.perf_counter() - loaded)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--starts", type=int, default=4)
    arguments = parser.parse_args()
    print(header() + "\n\n| start | import, s | load, s | first vector, s | together, s |\n|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as cache:
        for start in range(1, arguments.starts + 1):
            command = [sys.executable, "-c", PROGRAM, arguments.model]
            environment = os.environ | {"XDG_CACHE_HOME": cache}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            seconds = [float(x) for x in done.stdout.split()]
            print(f"| {start} | {' | '.join(f'{x:.2f}' for x in [*seconds, sum(seconds)])} |", flush=True)


if __name__ == "__main__":
    main()
