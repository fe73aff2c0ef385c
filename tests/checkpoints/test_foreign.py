"""Which fields of a third-party folder are read or refused: the table of docs/checkpoints.md, row by row."""

import json
import re
import shutil

import numpy as np
import pytest
import small
from small import edit_config

from embed import cli, inference, tokenizers
from embed.checkpoints import foreign, model_folder
from embed.models import transformer

EMBEDDING = small.EMBEDDING | {"matryoshka": [16, 32], "separator": False}
TRANSFORMER = "sentence_bert_config.json"
MODEL = "config_sentence_transformers.json"
TOKENIZER = "tokenizer_config.json"
POOLING = "1_Pooling/config.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A third-party encoder with a tokenizer.json."""
    tokenizer = tokenizers.load(small.write_bpe(tmp_path_factory.mktemp("tokenizer"), small.sentences(100)))
    config = transformer.make_config("micro", tokenizer.vocab_size + 3, rope_theta=1e4)
    path = tmp_path_factory.mktemp("foreign") / "encoder"
    return small.foreign(small.write_model(path, small.random_params(config), config, tokenizer, embedding=EMBEDDING))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def edit(path, **fields):
    """Change fields of a JSON file. A missing file is created."""
    path.parent.mkdir(exist_ok=True)
    document = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(document | fields))


def assert_refused(folder, message):
    """The folder must be refused in one line that names it and matches the regular expression `message`."""
    with pytest.raises(ValueError, match=message) as error:
        model_folder.open_model(folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="llama"), "model_type 'llama', expected qwen3 or bidirectional_pplx_qwen3"),
        (dict(hidden_act="gelu"), "hidden_act='gelu', expected 'silu'"),
        (dict(attention_bias=True), "attention_bias=True, expected False"),
        (dict(use_sliding_window=True), "use_sliding_window=True, expected False"),
        (
            dict(rope_parameters=None, rope_scaling={"type": "yarn", "factor": 4.0}),
            "rope parameters .*yarn.*, expected",
        ),
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "rope parameters .*yarn.*, expected rope_type",
        ),
        (dict(rope_scaling=YARN), "rope_scaling=.*yarn.* and other rope_parameters=.*default.*, expected one"),
        (dict(rope_parameters={"rope_type": "default", "type": "yarn"}), "rope parameters .*, expected rope_type"),
        (dict(rope_scaling={"rope_type": "default"}), "and other rope_parameters"),
        (dict(rope_parameters={"rope_theta": 5e6}), "two values of rope_theta, .10000.0, 5000000.0."),
        (dict(rope_parameters=None, rope_theta=None), "rope_theta=None, expected a positive number"),
        (dict(rope_parameters=[1]), "rope parameters .1., expected an object"),
        (dict(rope_theta=[1]), "two values of rope_theta"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5, expected None or 1"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types .*sliding_attention.*, expected"),
        (dict(layer_types=["full_attention"]), "layer_types .*, expected full_attention once per layer"),
        (dict(layer_types=3), "layer_types 3, expected full_attention once per layer"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0, expected a positive whole number"),
        (dict(num_hidden_layers=2.0), "num_hidden_layers=2.0, expected a positive whole number"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000, but there are 24 tensors"),
        (dict(hidden_size=10**12), "hidden_size=1000000000000, expected a positive whole number"),
        (dict(head_dim=None), "head_dim=None, expected a positive whole number"),
        (dict(rms_norm_eps=float("inf")), "rms_norm_eps=inf, expected a positive number"),
        (dict(num_attention_heads=3, num_key_value_heads=2), "num_heads=3 must be a multiple of num_kv_heads=2"),
        (dict(is_causal=0), "is_causal=0, expected True or False"),
        (dict(use_bidirectional_attention=False), "use_bidirectional_attention=False, but .* say an encoder"),
        (dict(is_causal=True), "use_bidirectional_attention=True, but .* say a causal model"),
        (
            dict(is_causal=True, model_type="bidirectional_pplx_qwen3"),
            "is_causal=True, but bidirectional_pplx_qwen3 is",
        ),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes', expected False or True"),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config=.*fp8.*, expected None"),
        (dict(per_layer_config={"0": {"head_dim": 4}}), "per_layer_config=.*, expected None or {}"),
        (dict(transformers_weights="other.safetensors"), "transformers_weights='other.safetensors', expected None"),
        (dict(max_position_embeddings="8"), "config.json has max_position_embeddings='8', expected a positive number"),
    ],
)
def test_another_architecture_is_refused(fields, message, folder):
    edit_config(folder, **fields)
    assert_refused(folder, message)


TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@pytest.mark.parametrize(
    "file, fields, message",
    [
        (TRANSFORMER, dict(do_lower_case=True), "do_lower_case=True, expected false or null"),
        (TRANSFORMER, dict(max_seq_length="8"), "max_seq_length='8', expected a positive number of tokens or null"),
        (
            TRANSFORMER,
            dict(transformer_task="fill-mask"),
            "transformer_task='fill-mask', expected .feature-extraction.",
        ),
        (TRANSFORMER, dict(modality_config={"message": {}} | TEXT), "modality_config=.*message.*, expected"),
        (
            TRANSFORMER,
            dict(module_output_name="sentence_embedding"),
            "module_output_name='sentence_embedding', expected",
        ),
        (TRANSFORMER, dict(processing_kwargs={"text": {"max_length": 4}}), "processing_kwargs=.*, expected {} or null"),
        (TRANSFORMER, dict(query_length=4), "query_length=4, expected null"),
        (TRANSFORMER, dict(document_length=4), "document_length=4, expected null"),
        (TRANSFORMER, dict(query_expansion={"length": 4}), "query_expansion=.*, expected null"),
        (TRANSFORMER, dict(tokenizer_name_or_path="x"), "tokenizer_name_or_path='x', expected null"),
        (TRANSFORMER, dict(model_args={"num_hidden_layers": 1}), "model_args=.*, expected {} or null"),
        (TRANSFORMER, dict(tokenizer_args={"model_max_length": 4}), "tokenizer_args=.*, expected {} or null"),
        (TRANSFORMER, dict(config_kwargs={"is_causal": True}), "config_kwargs=.*, expected {} or null"),
        (TRANSFORMER, dict(something=3), "sentence_bert_config.json has something=3, which is not known"),
        (
            "sentence_roberta_config.json",
            dict(do_lower_case=True),
            "sentence_roberta_config.json has do_lower_case=True",
        ),
        (MODEL, dict(model_type="SparseEncoder"), "model_type='SparseEncoder', expected .SentenceTransformer."),
        (MODEL, dict(truncate_dim=8), "truncate_dim=8, expected null or at least 32: `encode` takes truncate_dim"),
        (MODEL, dict(truncate_dim="x"), "truncate_dim='x', expected null or at least 32"),
        (
            MODEL,
            dict(prompts={"q": "Query: "}, default_prompt_name="q"),
            "'Query: ' before texts, which is not supported",
        ),
        (MODEL, dict(default_prompt_name="other"), "puts the prompt None before texts"),
        (MODEL, dict(default_prompt_name=["q"]), "default_prompt_name=.'q'., expected an object and a name in it"),
        (MODEL, dict(prompts="q"), "prompts='q' and default_prompt_name=None, expected an object"),
        (POOLING, dict(pooling_mode="lasttoken"), "pooling_mode='lasttoken', expected .mean. or .*mean"),
        (POOLING, dict(pooling_mode=["mean", "max"]), "pooling_mode=.'mean', 'max'., expected"),
        (POOLING, dict(pooling_mode_cls_token=True), "pooling_mode_cls_token=True, expected false"),
        (POOLING, dict(pooling_mode_weightedmean_tokens=True), "pooling_mode_weightedmean_tokens=True, expected false"),
        (POOLING, dict(pooling_mode_mean_tokens=False), "pooling_mode_mean_tokens=False, expected true"),
        (
            POOLING,
            dict(pooling_mode_other=True),
            "1_Pooling/config.json has pooling_mode_other=True, which is not known",
        ),
        (TOKENIZER, dict(add_bos_token=True), "add_bos_token=True, expected false or null"),
        (TOKENIZER, dict(add_eos_token=True), "add_eos_token=True, expected false or null"),
        (TOKENIZER, dict(add_prefix_space=True), "add_prefix_space=True, but tokenizer.json has False"),
        (TOKENIZER, dict(do_lower_case=True), "tokenizer_config.json has do_lower_case=True, expected false"),
        (TOKENIZER, dict(truncation_side="left"), "truncation_side='left', expected .right. or null"),
        (TOKENIZER, dict(tokenizer_class="BertTokenizer"), "tokenizer_class='BertTokenizer', expected"),
        (TOKENIZER, dict(tokenizer_class="Qwen2Tokenizer"), "but tokenizer.json has another normalizer or pre-"),
        (TOKENIZER, dict(model_max_length=0), "model_max_length=0, expected a positive number of tokens or null"),
        (TOKENIZER, dict(eos_token="a"), "eos_token='a', expected a special token of tokenizer.json"),
        (TOKENIZER, dict(additional_special_tokens=["b"]), "additional_special_tokens='b', expected a special token"),
        (
            TOKENIZER,
            dict(added_tokens_decoder={"0": {"content": "<s>"}}),
            "has token 0 as .*<s>.*, which differs from",
        ),
        (TOKENIZER, dict(added_tokens_decoder={"9": {"content": "x"}}), "has token 9 as .*x.*, which differs from"),
        ("special_tokens_map.json", dict(bos_token={"content": "a"}), "special_tokens_map.json has bos_token='a', exp"),
        ("added_tokens.json", {"<think>": 5}, "added_tokens.json has the id 5 for '<think>', tokenizer.json has None"),
        ("adapter_config.json", {}, "adapter_config.json is an adapter, which is not supported"),
        ("router_config.json", {}, "router_config.json is of a Router, which is not supported: use one of its models"),
        (POOLING, dict(embedding_dimension=16), "1_Pooling/config.json has embedding_dimension=16, expected 32"),
        (POOLING, dict(word_embedding_dimension="32"), "word_embedding_dimension='32', expected 32"),
    ],
)
def test_a_field_that_changes_vectors_is_refused(file, fields, message, folder):
    edit(folder / file, **fields)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    "file, fields, message",
    [
        (
            "added_tokens.json",
            {"<think>": 120},
            "added_tokens.json has the id 120 for '<think>', expected the id of a con",
        ),
        (
            "added_tokens.json",
            {"<sep>": 9},
            "added_tokens.json has the id 9 for '<sep>', expected the id of a control s",
        ),
        ("added_tokens.json", {"<sep>": 3.0}, "added_tokens.json has the id 3.0 for '<sep>'"),
        ("added_tokens.json", {"s": 7}, "added_tokens.json has the id 7 for 's'"),
        (
            "special_tokens_map.json",
            dict(bos_token={"content": "s"}),
            "special_tokens_map.json has bos_token='s', expect",
        ),
        (TOKENIZER, dict(additional_special_tokens=["s"]), "additional_special_tokens='s', expected a control symbol"),
        (TOKENIZER, dict(added_tokens_decoder={"7": {"content": "x"}}), "tokenizer_config.json has the id 7 for 'x'"),
        (TOKENIZER, dict(added_tokens_decoder={"7": "<sep>"}), "tokenizer_config.json has the id 7 for '<sep>'"),
        (
            TOKENIZER,
            dict(added_tokens_decoder=[1]),
            "tokenizer_config.json has added_tokens_decoder=.1., expected an obj",
        ),
    ],
)
def test_a_token_that_a_file_adds_to_a_sentencepiece_model_is_refused(file, fields, message, tmp_path):
    folder = small.foreign(small.write_model(tmp_path / "m"))
    edit(folder / "added_tokens.json", **{"<sep>": 3, "<mask>": 2})
    edit(folder / "special_tokens_map.json", unk_token="<unk>", sep_token="<sep>", cls_token="\ud800")
    edit(folder / TOKENIZER, added_tokens_decoder={"0": {"content": "<pad>"}, "1": {"content": "<unk>"}})
    assert not model_folder.open_model(folder).language_model
    edit(folder / file, **fields)
    assert_refused(folder, message)


def test_a_module_folder_that_modules_json_does_not_name_is_not_read(folder):
    edit(folder / "2_Dense" / "config.json", in_features=7)
    assert not model_folder.open_model(folder).language_model


def test_exports_and_merges_warn_in_one_line_about_settings_that_they_leave_out(folder, tmp_path, capsys):
    plain = shutil.copytree(folder, tmp_path / "plain")
    modules = [("Transformer", ""), ("Pooling", NAME), ("Normalize", "2_Normalize")]
    (folder / "modules.json").write_text(json.dumps([dict(type=ST + kind, path=path) for kind, path in modules]))
    edit(folder / MODEL, prompts={"query": "Q: ", "document": ""}, similarity_fn_name="dot")
    left_out = (
        f"embed: warning: the export leaves out settings of {folder}: Normalize, so vectors keep their lengths; "
        "the prompts query, which callers put before texts; similarity_fn_name='dot'\n"
    )
    assert cli.main(["export", f"--model={plain}", f"--output={tmp_path / 'a'}"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["export", f"--model={folder}", f"--output={tmp_path / 'b'}"]) == 0
    assert capsys.readouterr().err == left_out
    assert cli.main(["merge", f"--a={plain}", f"--b={folder}", "--ratio=0.5", f"--output={tmp_path / 'c'}"]) == 0
    assert capsys.readouterr().err == left_out.replace(str(folder), f"{plain} and {folder}")
    # The export itself has none of them.
    assert cli.main(["export", f"--model={tmp_path / 'b'}", f"--output={tmp_path / 'd'}"]) == 0
    assert capsys.readouterr().err == ""


ST, NAME = "sentence_transformers.models.", "1_Pooling"


@pytest.mark.parametrize(
    "modules, message",
    [
        ([("Transformer", ""), ("Pooling", NAME), ("Dense", "2_Dense")], "and after them only Normalize or"),
        ([("Transformer", ""), ("Pooling", NAME), ("LayerNorm", "2_LayerNorm")], "models.LayerNorm, expected a Transf"),
        ([("Transformer", ""), ("Normalize", "1"), ("Pooling", NAME)], "expected a Transformer and a Pooling of sent"),
        ([("Transformer", "")], "expected a Transformer and a Pooling"),
        ([("StaticEmbedding", "")], "has sentence_transformers.models.StaticEmbedding, expected a Transformer"),
        ([("Router", "")], "has sentence_transformers.models.Router, expected a Transformer"),
        (
            [("Transformer", "0_Transformer"), ("Pooling", NAME)],
            "its Transformer in '0_Transformer', expected the fold",
        ),
        ([("Transformer", ""), ("Pooling", "../1_Pooling")], "names '../1_Pooling', expected a folder in this one"),
        ([("Transformer", ""), ("Pooling", "pool")], "pool/config.json is missing, but it must say how to pool"),
        ([], r"modules.json holds \[\], expected modules with type and path"),
    ],
)
def test_other_modules_are_refused(modules, message, folder):
    (folder / "modules.json").write_text(json.dumps([dict(type=ST + kind, path=path) for kind, path in modules]))
    assert_refused(folder, message)


def test_modules_of_other_packages_are_refused(folder):
    for kind in ("custom_st.Transformer", "Transformer", "my.sentence_transformers.Transformer"):
        modules = [dict(type=kind, path=""), dict(type=ST + "Pooling", path=NAME)]
        (folder / "modules.json").write_text(json.dumps(modules))
        assert_refused(folder, f"modules.json has {kind}, .*, expected a Transformer and a Pooling")


def test_a_normalize_of_tokens_is_refused_and_one_of_vectors_is_not(folder):
    modules = [("Transformer", ""), ("Pooling", NAME), ("Normalize", "2_Normalize")]
    (folder / "modules.json").write_text(json.dumps([dict(type=ST + kind, path=path) for kind, path in modules]))
    assert not model_folder.open_model(folder).language_model
    edit(folder / "2_Normalize" / "config.json", module_input_name="token_embeddings")
    assert_refused(
        folder, "2_Normalize/config.json has module_input_name='token_embeddings', expected .sentence_embedding."
    )


def test_the_modules_of_the_released_pplx_embed_are_read(folder):
    modules = [dict(type=ST + "Transformer", path=""), dict(type=ST + "Pooling", path=NAME)]
    modules.append(dict(type="st_quantize.FlexibleQuantizer", path="", kwargs=["quantization"]))
    (folder / "modules.json").write_text(json.dumps([dict(m, idx=i, name=str(i)) for i, m in enumerate(modules)]))
    assert not model_folder.open_model(folder).language_model


def test_every_wrong_file_is_listed_in_one_error(folder):
    edit(folder / TRANSFORMER, do_lower_case=True)
    edit(folder / MODEL, truncate_dim=8)
    (folder / TOKENIZER).write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON") as error:
        model_folder.open_model(folder)
    assert "do_lower_case" in str(error.value) and "truncate_dim" in str(error.value)


@pytest.mark.parametrize("name", [*foreign.FILES, "config.json", "tokenizer.json", TOKENIZER, POOLING])
@pytest.mark.parametrize("content", [b"{", b"[[3]]", b"7", b"\xff\xfe{}", b"[" * 100_000, b""])
def test_a_file_that_is_not_a_json_object_is_refused_by_name(name, content, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        model_folder.open_model(folder)
    assert len(str(error.value).splitlines()) == 1


def test_fields_that_change_no_vector_are_allowed(folder):
    digest = model_folder.open_model(folder).digest
    edit_config(folder, dtype="bfloat16", use_cache=True, max_window_layers=1, sliding_window=4, attention_dropout=0.1)
    edit_config(folder, rope_scaling=json.loads((folder / "config.json").read_text())["rope_parameters"])
    edit(folder / MODEL, similarity_fn_name="dot", truncate_dim=32, prompts={"query": "Q: "}, something="else")
    edit(folder / TOKENIZER, add_bos_token=False, padding_side="left", chat_template="x", unk_token="a")
    edit(folder / TOKENIZER, model_max_length=1e30, added_tokens_decoder={"0": {"content": "<|endoftext|>"}})
    edit(folder / "added_tokens.json", **{"<|endoftext|>": 0})
    edit(folder / "generation_config.json", eos_token_id=3)
    model = model_folder.open_model(folder)
    assert model.embedding["max_length"] == 32768 and model.digest != digest


def test_fields_about_vectors_are_ignored_for_a_causal_model(folder):
    edit_config(folder, is_causal=None, use_bidirectional_attention=None)
    edit(folder / POOLING, pooling_mode="lasttoken")
    edit(folder / TRANSFORMER, do_lower_case=True)
    assert model_folder.open_model(folder).language_model


def test_the_digest_covers_every_file_that_is_read(folder):
    digests = {model_folder.open_model(folder).digest}
    names = [*foreign.FILES, "config.json", "tokenizer.json", TOKENIZER, POOLING]
    names = [name for name in names if name not in foreign.UNSUPPORTED]
    for name in names:
        file = folder / name
        file.write_text((file.read_text() if file.is_file() else "{}") + " ")
        digests.add(model_folder.open_model(folder).digest)
    assert len(digests) == 1 + len(names)


def test_the_shortest_limit_holds_and_a_tokenizer_that_adds_tokens_is_refused(folder):
    edit_config(folder, max_position_embeddings=None)
    assert inference.load(folder).max_length == 32768
    edit(folder / TRANSFORMER, max_seq_length=9)
    assert model_folder.open_model(folder).embedding["max_length"] == 9
    edit(folder / TOKENIZER, model_max_length=8)
    assert inference.load(folder).max_length == 8
    (folder / TRANSFORMER).unlink()
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 7}')
    assert inference.load(folder).max_length == 7
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": "7"}')
    with pytest.raises(ValueError, match="sentence_roberta_config.json has max_seq_length='7', expected a positive"):
        inference.load(folder)
    (folder / "sentence_roberta_config.json").unlink()
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, end],
        "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    edit(folder / "tokenizer.json", post_processor=processor)
    with pytest.raises(ValueError, match="tokenizer.json adds tokens to each text"):
        inference.load(folder)


def test_the_tokenizer_class_of_qwen_is_read_if_tokenizer_json_is_like_that_of_qwen(folder):
    edit(folder / TOKENIZER, tokenizer_class="Qwen2Tokenizer")
    split = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]})
    assert model_folder.open_model(folder).tokenizer().encode(["parse"])[0].size


def test_a_lowercase_normalizer_of_tokenizer_json_is_honored(folder):
    plain = inference.load(folder).tokenizer
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    ids = model_folder.open_model(folder).tokenizer().encode(["Parse the CONFIG"])[0]
    np.testing.assert_array_equal(ids, plain.encode(["parse the config"])[0])
