import os

import pytest
import small
from random_models import TEXTS

# With the optimizations that tests/conftest.py takes out: vectors are compared to the last int8 level, as users get them.
for flag in ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(flag, "").strip()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return small.write_bpe(tmp_path_factory.mktemp("tokenizer"), TEXTS * 3)
