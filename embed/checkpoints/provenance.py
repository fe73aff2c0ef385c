"""The commit, versions and device with which a model was made."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import jax

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def made_with() -> dict:
    """The git commit, the versions, the device, and the launcher's name of the run (EMBED_RUN_ID).

    Without git, a launcher can set the commit in EMBED_COMMIT.
    """
    root, commit = Path(__file__).parents[2], ""
    if (root / ".git").exists() and shutil.which("git"):  # and not a repository that contains this installation
        describe = ["git", "-C", root, "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit or os.environ.get("EMBED_COMMIT") or "unknown",
        **({"run_id": os.environ["EMBED_RUN_ID"]} if os.environ.get("EMBED_RUN_ID") else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": jax.devices()[0].device_kind,
    }
