"""What a model was made with: the commit and the versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def made_with() -> dict:
    """The git commit, versions, device and the name that a launcher gave the run (EMBED_RUN_ID).

    Where there is no git, a launcher can tell the commit in EMBED_COMMIT.
    """
    root, commit = Path(__file__).parents[2], ""
    if (root / ".git").exists() and shutil.which("git"):  # not that of a repository which holds this installation
        describe = ["git", "-C", root, "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or os.environ.get("EMBED_COMMIT") or "unknown",
        **({"run_id": os.environ["EMBED_RUN_ID"]} if os.environ.get("EMBED_RUN_ID") else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": jax.devices()[0].device_kind,
    }
