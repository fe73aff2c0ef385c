import pytest
import small
from random_models import TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    return small.write_bpe(tmp_path_factory.mktemp("tokenizer"), TEXTS * 3)
