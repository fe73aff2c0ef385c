"""A damaged model folder gives a one-sentence error that names it, or the undamaged encoder, and nothing else.

The tests compare parameters, config, settings and tokens: encoders that agree in these give the same vectors.
"""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed import inference, tokenizers
from embed.models import transformer

TEXTS = [*small.sentences(3, seed=4), "größe 中 <sep><|endoftext|>"]
OTHERS = [7, -1.5, True, "x", "", [], [1], {}, {"x": 1}, None, 10**30, "\ud800"]
FUZZ = dict(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def json_files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a minimal export}."""
    root, sizes = tmp_path_factory.mktemp("damage"), dict(hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4)
    bpe = tokenizers.load(small.write_bpe(tmp_path_factory.mktemp("tokenizer"), small.sentences(100)))
    exports = {}
    for kind, tokenizer in (("sentencepiece", small.tokenizer()), ("tokenizer.json", bpe)):
        config = transformer.make_config("micro", tokenizer.vocab_size, **sizes, intermediate_size=8)
        params = small.random_params(config)
        embedding = {"matryoshka": [8], "separator": False}
        exports[kind] = small.write_model(root / kind, params, config, tokenizer, embedding=embedding)
    source = shutil.copytree(exports["sentencepiece"], root / "split")
    exports["two files of weights"] = split(small.foreign(source))
    return exports


def split(folder):
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(arrays)}
    for file in set(weight_map.values()):
        safetensors.numpy.save_file({n: x for n, x in arrays.items() if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def summary(folder) -> str:
    """A digest of everything in a loaded encoder that determines its vectors."""
    encoder, digest = inference.load(folder), hashlib.sha256()
    for x in [*jax.tree.leaves(encoder.params), *encoder.tokenizer.encode(TEXTS)]:
        digest.update(np.asarray(x).tobytes() + b"|")
    digest.update(repr((encoder.config, encoder.tanh)).encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def undamaged(folders):
    return {kind: summary(folder) for kind, folder in folders.items()}


def check(folder, want, note):
    """The property above. `want` is None if the folder may be a valid one of another model."""
    try:
        got = summary(folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and str(folder) in said, f"{note}: {said}"
        return
    assert want in (None, got), f"{note}: other vectors without an error"


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target)


def paths_of(value, at=()):
    """The paths in a JSON value; only the first entries of long lists and objects."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (key, x) in enumerate(entries):
        if i < 8:
            yield (*at, key)
            yield from paths_of(x, (*at, key))


@given(data=st.data())
@settings(max_examples=80, **FUZZ)
def test_damage_to_the_bytes_of_any_file_of_an_export_is_refused_or_changes_no_vector(
    data, folders, undamaged, tmp_path
):
    kind = data.draw(st.sampled_from([k for k, folder in sorted(folders.items()) if (folder / "embed.json").exists()]))
    folder = copy(folders[kind], tmp_path / "m")
    name = data.draw(st.sampled_from(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())))
    file, content = folder / name, bytearray((folder / name).read_bytes())
    how = data.draw(st.sampled_from(("cut", "flip", "gone", "empty", "append", "folder")))
    i = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[i] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "append":
        content += data.draw(st.binary(min_size=1, max_size=4))
    if how in ("gone", "folder"):
        file.unlink()
    else:
        file.write_bytes({"cut": content[:i], "empty": b""}.get(how, bytes(content)))
    if how == "folder":
        file.mkdir()
    check(folder, undamaged[kind], f"{kind}: {how} {name} at {i}")


@given(data=st.data())
@settings(max_examples=200, **FUZZ)
def test_other_values_in_any_json_file_are_refused_or_change_no_vector(data, folders, undamaged, tmp_path):
    kind = data.draw(st.sampled_from(sorted(folders)))
    folder = copy(folders[kind], tmp_path / "m")
    if data.draw(st.booleans()):
        (folder / "embed.json").unlink(missing_ok=True)
    name = data.draw(st.sampled_from(json_files(folder)))
    document = json.loads((folder / name).read_text())
    at = data.draw(st.sampled_from([(), *paths_of(document)]))
    how = data.draw(st.sampled_from(("delete", "replace", "double")))
    parent, text = document, None
    for key in at[:-1]:
        parent = parent[key]
    value = data.draw(st.sampled_from(OTHERS))
    if not at:
        document = value
    elif how == "delete":
        del parent[at[-1]]
    elif how == "double" and isinstance(parent, dict):  # the last one counts, as in every JSON reader of Python
        mark = "\ue000"
        parent[mark] = value
        text = json.dumps(document).replace(json.dumps(mark), json.dumps(at[-1]))
    else:
        parent[at[-1]] = value
    (folder / name).write_text(text or json.dumps(document))
    want = None if is_another_model(name, at, how, value) else undamaged[kind]
    check(folder, want, f"{kind}: {name} {at} {how} {value!r:.20}")


SECTIONS = [("normalizer",), ("pre_tokenizer",), ("added_tokens",)]


def is_another_model(name, at, how, value) -> bool:
    """Whether the edited folder may be a valid one of another model."""
    if how == "delete":
        return name == "tokenizer.json" and len(at) > 1
    if name == "tokenizer.json":  # sections may be null, and their contents define another tokenizer
        return len(at) > 1 or (at in SECTIONS and value is None)
    if name == "embed.json":
        return at == ("embedding", "tanh") and value is True
    return name == "config.json" and at == ("rms_norm_eps",) and isinstance(value, int | float) and value > 0


@given(data=st.data())
@settings(max_examples=40, **FUZZ)
def test_a_damaged_header_of_the_weights_is_refused_or_changes_no_vector(data, folders, undamaged, tmp_path):
    """Without embed.json, changed bits of the weights themselves cannot be noticed."""
    folder = small.foreign(copy(folders["sentencepiece"], tmp_path / "m"))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    i = data.draw(st.integers(0, header - 1))
    content[i] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), i, header, len(content) - 4]))])
    check(folder, undamaged["sentencepiece"], f"byte {i}")


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1', b"\x00", b"\xef\xbb\xbf{}"])
def test_a_file_that_is_not_json_in_utf_8_is_refused(content, folders, undamaged, tmp_path):
    for kind in folders:
        for name in json_files(folders[kind]):
            folder = copy(folders[kind], tmp_path / "m")
            if name != "embed.json":
                (folder / "embed.json").unlink(missing_ok=True)
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=name):
                inference.load(folder)
            check(folder, undamaged[kind], f"{kind}: {name} {content[:9]}")
