"""Runs the notebooks of colabs/ in a folder of their own, at the smallest size."""

import os
import re
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient


def execute(path: Path, folder: Path) -> list:
    """Run all cells in `folder`, as a user does; returns their outputs. AssertionError if a command of a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with mock.patch.dict(os.environ, EMBED_COLAB_SIZE=":runlocal"):
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": f"{folder}"}}
        ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    # The exit code of `!embed` stops no notebook.
    assert not re.search(r"^embed: (?!warning)|^Traceback|command not found", said, re.M), said
    return outputs
