"""docs/data.md names what the code counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from embed.preparation import examples, hygiene, stream, tasks

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTION = re.search("### What is dropped, and why\n(.*?)\n### ", PAGE, re.DOTALL)[1]


@pytest.mark.parametrize(
    "reason",
    [
        *(tasks.BAD, tasks.UNUSED, tasks.EMPTY, tasks.SHORT, tasks.LONG, tasks.PATTERN),
        *(tasks.LANGUAGE, tasks.SCORE, tasks.HELD_OUT, tasks.NOT_HELD_OUT),
        *(examples.NO_TOKENS, examples.NO_QUERY),
        *(hygiene.CONTAMINATED, hygiene.OTHER_LANGUAGE),
        *(stream.NEAR, stream.DUPLICATES),
    ],
)
def test_every_reason_is_explained(reason):
    assert re.search(rf"^\| {re.escape(reason)} \| .+ \|$", SECTION, re.MULTILINE)


@pytest.mark.parametrize("count", [stream.REPEATED, examples.PARTS])
def test_what_is_counted_but_not_dropped_is_explained(count):
    assert f'"{count}"' in " ".join(SECTION.split())


def test_the_source_of_the_page_reads_rows(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_pairs").mkdir()
    (tmp_path / "my_pairs" / "pairs.jsonl").write_text("a\n\nb\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'text': 'a'" in done.stdout and "the line is empty" in done.stdout
