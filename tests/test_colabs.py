"""The form of the notebooks in colabs/. tests/test_graph.py and tests/peers/test_mteb.py run them."""

from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "colabs"
NAMES = ["1_quickstart", "2_train_your_own", "3_ablation", "4_bits_and_dimensions", "5_evaluate"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_a_colab_is_small_and_is_stored_without_outputs(name, notebook):
    nbformat.validate(notebook)
    assert len(notebook.cells) < 30 and (FOLDER / f"{name}.ipynb").stat().st_size < 40_000
    assert not any(cell.outputs or cell.execution_count for cell in code(notebook))
    assert notebook.metadata.kernelspec.name == "python3"


def test_a_colab_opens_and_installs_from_the_same_repository(name, notebook):
    namespace = {}
    line = next(line for line in code(notebook)[0].source.splitlines() if line.startswith("REPOSITORY = "))
    exec(line, namespace)
    opened = namespace["REPOSITORY"].replace("https://github.com/", "https://colab.research.google.com/github/")
    assert f"]({opened}/blob/main/colabs/{name}.ipynb)" in notebook.cells[0].source


def test_all_colabs_install_in_the_same_way():
    first = {code(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))[0].source for name in NAMES}
    assert len(first) == 1


def test_every_colab_is_tested_and_named_in_the_readme():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    readme = (FOLDER.parent / "README.md").read_text()
    assert all(f"(colabs/{name}.ipynb)" in readme for name in NAMES)
