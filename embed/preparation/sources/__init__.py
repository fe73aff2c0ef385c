"""Sources of text for `prepare`, each with its gin name: files, hub, tfds, retrieval, conteb, parallel."""

from embed.preparation.sources.base import Row, Shard, Source, SourceError, UnreachableError
from embed.preparation.sources.files import Files
from embed.preparation.sources.hub import Hub
from embed.preparation.sources.parallel import Parallel
from embed.preparation.sources.retrieval import Conteb, Retrieval
from embed.preparation.sources.tfds import Tfds

__all__ = [
    "Conteb",
    "Files",
    "Hub",
    "Parallel",
    "Retrieval",
    "Row",
    "Shard",
    "Source",
    "SourceError",
    "Tfds",
    "UnreachableError",
]
