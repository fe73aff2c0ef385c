"""Runs the commands and programs of docs/checkpoints.md in order, in one folder.

Small random models replace those of the hub, and a tiny run replaces the quickstart.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import small
import transformers
from random_models import random_qwen3, save

from embed import cli
from embed.checkpoints import names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def put_in_cache(cache, hub_id, folder):
    """Write a folder as huggingface_hub would after a download."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)


def test_every_command_of_the_page_runs_as_written(tokenizer_folder, tmp_path):
    cache, here = tmp_path / "cache", tmp_path / "here"
    here.mkdir()
    (here / "configs").symlink_to(ROOT / "configs")
    causal = save(random_qwen3(transformers.Qwen3ForCausalLM, is_causal=True), tokenizer_folder, tmp_path / "causal")
    small.edit_config(causal, is_causal=None)
    put_in_cache(cache, "Qwen/Qwen3-0.6B-Base", causal)
    for name, kind in (
        ("pplx-embed-v1-0.6b", "PPLXQwen3Model"),
        ("pplx-embed-context-v1-0.6b", "PPLXQwen3ContextualModel"),
    ):
        # As wide as the released one: the page cuts vectors to 512 dimensions.
        folder = save(random_qwen3(hidden_size=1024, num_hidden_layers=1), tokenizer_folder, tmp_path / kind)
        small.edit_config(folder, is_causal=None, model_type=names.PPLX, auto_map={"AutoModel": f"modeling.{kind}"})
        put_in_cache(cache, f"perplexity-ai/{name}", folder)
    # The page exports models of the quickstart, which takes seconds at this size.
    run = ["--config=configs/quickstart.py:runlocal", f"--workdir={here / 'runs/quickstart'}"]
    assert cli.main(["pipeline", *run]) == 0
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    blocks = re.findall(r"```(python|bash)\n(.*?)```", PAGE, re.S)
    assert len(blocks) >= 7
    for language, program in blocks:
        program = program.replace("configs/quickstart.py", "configs/quickstart.py:runlocal")  # as in the run above
        command = [sys.executable, "-c", program] if language == "python" else ["bash", "-e", "-c", program]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{program}\n{done.stderr[-3000:]}"
