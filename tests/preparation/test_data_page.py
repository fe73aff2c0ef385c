"""docs/data.md names what the code counts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from embed.preparation import counts, examples, hygiene, stream

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTION = re.search("### What is dropped, and why\n(.*?)\n### ", PAGE, re.DOTALL)[1]


# What the code counts by: the constants that are phrases, and the one that is a word.
COUNTED = {counts.PATTERN} | {
    value
    for module in (counts, examples, hygiene, stream)
    for name, value in vars(module).items()
    if name.isupper() and isinstance(value, str) and " " in value
}


@pytest.mark.parametrize("reason", sorted(COUNTED))
def test_everything_that_is_counted_is_explained(reason):
    assert re.search(rf"^\| {re.escape(reason)} \| .+ \|$", SECTION, re.MULTILINE)


def test_the_source_of_the_page_reads_rows(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_pairs").mkdir()
    (tmp_path / "my_pairs" / "pairs.jsonl").write_text("a\n\nb\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "'text': 'a'" in done.stdout and "the line is empty" in done.stdout
