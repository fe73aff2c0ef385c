"""Runs the commands and programs of README.md and of pages of docs/ in order, each in its own folder.

Small random models replace those of the hub, tiny runs replace the quickstart and the one on the user's own pairs.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
import transformers
from random_models import random_qwen3, save

from embed import cli
from embed.checkpoints import names

ROOT = Path(__file__).parents[2]


def put_in_cache(cache, hub_id, folder):
    """Write a folder as huggingface_hub would after a download."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


@pytest.fixture(scope="module")
def hub(tokenizer_folder, tmp_path_factory):
    """A cache of huggingface_hub with small random models under the names of real ones."""
    folder = tmp_path_factory.mktemp("hub")
    cache = folder / "cache"
    causal = save(random_qwen3(transformers.Qwen3ForCausalLM, is_causal=True), tokenizer_folder, folder / "causal")
    small.edit_config(causal, is_causal=None)
    put_in_cache(cache, "Qwen/Qwen3-0.6B-Base", causal)
    for name, kind in (
        ("pplx-embed-v1-0.6b", "PPLXQwen3Model"),
        ("pplx-embed-context-v1-0.6b", "PPLXQwen3ContextualModel"),
    ):
        # As wide as the released one: the page cuts vectors to 512 dimensions.
        released = save(random_qwen3(hidden_size=1024, num_hidden_layers=1), tokenizer_folder, folder / kind)
        small.edit_config(released, is_causal=None, model_type=names.PPLX, auto_map={"AutoModel": f"modeling.{kind}"})
        put_in_cache(cache, f"perplexity-ai/{name}", released)
    return cache


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The quickstart, which takes seconds at this size. The pages use its models."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert cli.main(["pipeline", "--config=configs/quickstart.py:runlocal", f"--workdir={folder}"]) == 0
    return folder


def write_pairs(folder):
    """A folder of JSON lines of queries and documents, as docs/data.md shows them."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(2000)]
    documents = [rng.choices(words, k=40) for _ in range(400)]
    pairs = [{"query": " ".join(rng.sample(words, 4)), "document": " ".join(words)} for words in documents]
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.parametrize(
    "page, blocks", [("README.md", 1), ("docs/checkpoints.md", 7), ("docs/data.md", 4), ("docs/evaluation.md", 1)]
)
def test_every_command_of_a_page_runs_as_written(page, blocks, hub, workdir, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(workdir)
    write_pairs(tmp_path / "my_pairs")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    matches = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert len(matches) >= blocks
    for language, program in matches:
        program = re.sub(r"configs/(quickstart|pairs)\.py", r"\g<0>:runlocal", program)  # as in the run above
        command = [sys.executable, "-c", program] if language == "python" else ["bash", "-e", "-c", program]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{program}\n{done.stderr[-3000:]}"
