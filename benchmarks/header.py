"""The first lines of every benchmark's output."""

import shlex
import sys
from importlib.metadata import version


def header(*packages: str) -> str:
    """The command, commit, device and versions of this process, those of `packages` too, as three lines."""
    from embed.checkpoints.provenance import made_with
    from embed.graph import machine

    source = made_with()
    versions = source["versions"] | {name: version(name) for name in packages}
    return f"python {shlex.join(sys.argv)}\ncommit {source['commit']}, {machine()}\n" + ", ".join(
        f"{name} {number}" for name, number in versions.items()
    )
