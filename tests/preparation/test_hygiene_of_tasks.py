"""Near duplicates, decontamination and languages: what the maps of `stream` drop, and what the report says."""

import json
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embed import tokenizers
from embed.data.store import Store
from embed.preparation import contamination, hygiene, languages, near_duplicates, settings, stream, windows
from embed.preparation.counts import Counts
from embed.preparation.hygiene import Hygiene
from embed.preparation.prepare import prepare
from embed.preparation.runners import Job
from embed.preparation.sources import Files, Retrieval
from embed.preparation.stream import Work
from embed.preparation.tasks import Task
from tests import small

# A passage in each script, and another about something else.
PASSAGES = {
    "en": (
        "The miller's youngest daughter counted every sack twice, because her father had once sold flour short.",
        "Snow closes the upper pass in November, and nobody crosses again until the first warm week of May.",
    ),
    "de": (
        "Die Brücke über den schmalen Fluss wurde größtenteils aus Eichenholz gebaut und hält bis heute jedem Sturm.",
        "Am Nachmittag verkauft der alte Bäcker süße Brötchen, die er morgens für seine Nachbarn zurückgelegt hat.",
    ),
    "ru": (
        "Старый смотритель маяка каждый вечер записывал в толстую тетрадь направление ветра и высоту волны.",
        "В нашем городе осенью открывается большая ярмарка, куда приезжают мастера из далёких деревень.",
    ),
    "ar": (
        "كان الصياد العجوز يخرج إلى البحر قبل شروق الشمس ويعود في المساء بسلة مليئة بالسمك الطازج لأهل القرية.",
        "تقع المكتبة الجديدة في وسط المدينة القديمة وتضم آلاف الكتب النادرة التي جمعها التجار خلال رحلاتهم الطويلة.",
    ),
    "hi": (
        "गाँव का बूढ़ा कुम्हार हर सुबह नदी के किनारे से मिट्टी लाता था और शाम तक सुंदर घड़े बनाकर बाज़ार में बेचता था।",
        "पहाड़ों में बर्फ गिरने के बाद सड़कें कई दिनों तक बंद रहती हैं और लोग अपने घरों में आग जलाकर बैठते हैं।",
    ),
    "th": (
        "ชาวนาผู้เฒ่าตื่นแต่เช้าทุกวันเพื่อดูแลนาข้าวและสวนผลไม้ที่ปลูกไว้ริมแม่น้ำสายเล็กใกล้หมู่บ้านของเขา",
        "ตลาดน้ำแห่งนี้เปิดเฉพาะวันเสาร์และวันอาทิตย์ นักท่องเที่ยวนิยมมาชิมขนมหวานและอาหารพื้นบ้านหลายชนิด",
    ),
    "zh": (
        "老木匠花了整整三年时间，才把那座被大水冲垮的石桥旁边的小庙重新修好，村里的人都来帮忙。",
        "每年春天，山坡上的梨树开满白花，从城里来的孩子们在树下放风筝，一直玩到太阳落山才回家。",
    ),
    "ja": (
        "山の上の小さな駅には一日に二本しか列車が来ないので、駅長は毎朝ゆっくりと花に水をやっている。",
        "海辺の町では夏になると祭りが開かれ、子供たちは夜遅くまで太鼓の音に合わせて踊り続けるのだった。",
    ),
    "ko": (
        "할머니는 매일 아침 마당에 있는 감나무 아래에서 따뜻한 차를 마시며 먼 산을 바라보는 것을 좋아하셨다.",
        "겨울이 오면 강물이 두껍게 얼어서 마을 아이들은 학교가 끝난 뒤에 모두 썰매를 타러 나가곤 했다.",
    ),
}
WORDS = (
    "the of and with under about which should there would people house water before little great never again between "
    "country school always letter second enough mother answer different thought through light together follow picture "
    "change study still learn plant cover world around every young list bird soon body family direct leave song measure"
).split()


def disguised(text):
    """The text with other white space, case and punctuation."""
    return "« " + text.upper().replace(" ", "\n ").replace(",", " –").replace("。", "!!") + " »"


def passage(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


# --- letters and windows ----------------------------------------------------------------------------------------------


def test_letters_forget_case_accents_punctuation_and_form():
    codes, bounds = windows.letters(["Größe: É-2", "", "ｆｕｌｌ がくЙ"])
    assert "".join(map(chr, codes)) == "grossee2fullかくи" and bounds.tolist() == [0, 8, 8, 15]
    decomposed, _ = windows.letters(["Gro\u0308ße: E\u0301-2"])
    assert np.array_equal(decomposed, codes[:8])


def test_a_window_has_the_hash_of_an_equal_range_anywhere():
    codes = np.random.default_rng(0).integers(1, 5000, 300).astype(np.uint32)
    codes[200:240] = codes[10:50]
    hashes = windows.Hashes(codes)
    by_window = hashes.windows(40)
    assert len(by_window) == 261 and by_window[200] == by_window[10] and len(np.unique(by_window)) == 260
    assert hashes.ranges(np.array([200, 5]), np.array([240, 45])).tolist() == by_window[[10, 5]].tolist()
    assert len(windows.Hashes(codes[:3]).windows(4)) == 0


# --- contamination ----------------------------------------------------------------------------------------------------


def index_of(folder, *texts):
    contamination.build(folder, [("set", "corpus", f"d{i}", text) for i, text in enumerate(texts)])
    return contamination.Index(folder)


def found(index, *texts, overlap=0.5):
    """(training text, evaluation text) that are found."""
    return index.find(list(texts), np.arange(len(texts)), overlap)


@pytest.mark.parametrize("language", PASSAGES)
def test_an_evaluation_text_is_found_in_every_script_and_disguise_and_other_texts_are_not(language, tmp_path):
    held_out, other = PASSAGES[language]
    index = index_of(tmp_path, held_out, "a text in between", *(p[0] for n, p in PASSAGES.items() if n != language))
    training = [other, f"{other} {disguised(held_out)} {other}", passage(0), held_out.replace(" ", "")]
    assert found(index, *training) == [(1, 0), (3, 0)]
    assert found(index, other, *(p[1] for p in PASSAGES.values()), overlap=0) == []


def test_short_texts_are_found_as_whole_texts_only(tmp_path):
    index = index_of(tmp_path, "How old is the bridge?", "桥有多少年的历史？", "yes", "")
    assert found(index, "how old is THE bridge", "Tell me: how old is the bridge?", "yes", "桥有多少年的历史") == [
        (0, 0),
        (3, 1),
    ]


@pytest.mark.parametrize("length", [*range(8, 140, 7), 1000])
def test_a_text_of_any_length_is_found_in_itself(length, tmp_path):
    text = passage(1, 400).replace(" ", "")[:length]
    assert found(index_of(tmp_path, passage(2), text), text, passage(3)) == [(0, 1)]


def test_a_common_phrase_in_a_long_text_does_not_count_unless_any_overlap_does(tmp_path):
    phrase = "licensed under the terms of the license that is in the file next to this one"
    index = index_of(tmp_path, f"{passage(1)} {phrase}", f"{passage(2)} {phrase}")
    assert found(index, f"{passage(3)} {phrase} {passage(4)}") == []
    assert found(index, f"{passage(3)} {phrase} {passage(4)}", overlap=0) == [(0, 0), (0, 1)]
    # Half of the text and more counts.
    assert found(index, passage(2)[: len(passage(2)) * 3 // 4]) == [(0, 1)]


def test_a_text_with_a_changed_word_is_found(tmp_path):
    words = passage(1).split()
    index = index_of(tmp_path, " ".join(words))
    assert found(index, " ".join([*words[:20], "different", *words[21:]])) == [(0, 0)]


def test_a_text_is_not_found_across_two_texts(tmp_path):
    text = passage(1, 12)
    index = index_of(tmp_path, text)
    assert found(index, text[:40], text[40:], overlap=0) == []


def test_all_texts_of_an_example_count_together(tmp_path):
    text = passage(1)
    index = index_of(tmp_path, text)
    parts = [text[: len(text) * 9 // 20], text[len(text) * 9 // 20 : len(text) * 9 // 10]]
    assert index.find(parts, np.array([0, 1]), 0.5) == []
    assert index.find(parts, np.array([7, 7]), 0.5) == [(7, 0)]


def test_an_index_that_is_built_in_batches_is_the_same(tmp_path, monkeypatch):
    texts = [passage(i, 3 * i) for i in range(20)]
    index_of(tmp_path / "one", *texts)
    monkeypatch.setattr(contamination, "BATCH", 500)
    index_of(tmp_path / "two", *texts)
    for name in ("hashes.npy", "owners.npy", "windows.npy", "texts.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# --- near duplicates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity, expected", [(0.5, (22, 5)), (0.75, (12, 9)), (0.9, (6, 18))])
def test_bands_find_their_similarity(similarity, expected):
    number, rows = near_duplicates.num_bands(similarity)
    assert (number, rows) == expected and number * rows <= near_duplicates.PERMUTATIONS
    assert abs((1 / number) ** (1 / rows) - similarity) < 0.04


def test_near_texts_share_a_band_and_others_do_not():
    text = passage(1, 200)
    texts = [text, disguised(text), text.replace(text.split()[50], "else", 1), passage(2, 200), "", "?!", "short"]
    bands, known = near_duplicates.bands([{"text": t} for t in texts], 0.75)
    assert known.tolist() == [True, True, True, True, False, False, True]
    equal = (bands[:, None] == bands[None]).any(-1)
    assert equal[0, 1] and equal[0, 2] and not equal[0, 3] and not equal[3, 6]


def test_the_estimated_similarity_is_that_of_the_shingles():
    a, b = passage(1, 400), passage(1, 400)[:2000] + passage(2, 100)
    one, two = near_duplicates._signatures([a, b])[0]
    sets = [
        {t[i : i + near_duplicates.SHINGLE] for i in range(len(t))} for t in (a.replace(" ", ""), b.replace(" ", ""))
    ]
    expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert 0.4 < expected < 0.9 and abs((one == two).mean() - expected) < 0.12


def test_the_example_with_the_smallest_id_stays_in_every_group():
    bands = np.array([5, 5, 5, 8, 8, 9, 9], np.uint64)
    ids, tasks = np.array([30, 10, 10, 7, 8, 4, 4], np.uint64), np.array([0, 1, 1, 0, 0, 0, 1])
    drop, groups = near_duplicates.find(bands, ids, tasks)
    assert drop.tolist() == [True, False, False, False, True, False, True]
    assert [group.tolist() for group in groups] == [[1, 2, 0], [3, 4], [5, 6]]


# --- languages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", PASSAGES)
def test_passages_are_identified_and_agree_with_their_own_language_only(language):
    own, other = languages.accepted((language,)), languages.accepted(("fi",))
    for text in PASSAGES[language]:
        assert languages.identify(text) in own - {languages.UNKNOWN}
        assert languages.identify(text) not in other


@pytest.mark.parametrize(
    "name, code",
    [
        ("en", "en"),
        ("eng", "en"),
        ("eng_Latn", "en"),
        ("en-GB", "en"),
        ("cmn_Hani", "zh"),
        ("arb_Arab", "ar"),
        ("ekk_Latn", "et"),
        ("nob", "nb"),
        ("pes_Arab", "fa"),
        ("ory_Orya", "or"),
        ("yue_Hani", "yue"),
    ],
)
def test_codes_of_any_standard_name_a_language(name, code):
    assert languages.code(name) == code


def test_what_cannot_be_told_agrees():
    assert languages.identify("Too short.") == languages.UNKNOWN
    assert languages.UNKNOWN in languages.accepted(("en",))
    assert {"nb", "no", "nn"} <= languages.accepted(("nob_Latn",)) == languages.accepted(("no",))
    assert languages.accepted(("mri_Latn",)) == frozenset() == languages.accepted(())  # any
    with pytest.raises(ValueError, match="'english!' is no language code"):
        languages.code("english!")


# --- the maps ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return small.write_bpe(folder, [passage(i) for i in range(20)])


def write_rows(folder, rows, shards):
    """Rows in files, one shard each."""
    folder.mkdir(parents=True)
    for i in range(shards):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[i::shards])
        (folder / f"{i}.jsonl").write_text(lines)
    return f"{folder}/*.jsonl"


def run(folder, tokenizer, tasks, about, *, shards=1, seed=0, buckets=2, sets=None, again=0.0):
    """Prepares {task: (kind, rows, other fields)} with all units of work in random order; returns the work.

    again: the fraction of the units whose marker is lost, and that are done twice.
    """
    rng = random.Random(seed)
    made = {
        name: Task(Files(paths=write_rows(folder / "rows" / name, rows, shards)), kind, **fields)
        for name, (kind, rows, fields) in tasks.items()
    }
    scratch, target = folder / "scratch", folder / "tasks"
    work = Work(
        f"{scratch}",
        f"{target}",
        f"{tokenizer}",
        made,
        {name: task.source.shards() for name, task in made.items()},
        {name: buckets for name in made},
        seed=0,
        hygiene={name: about[name] for name in made if name in about},
    )
    for name in work.hygiene:
        if work.hygiene[name].evaluation_sets:
            hygiene.build_index(work.hygiene[name], work.index(name), sets or {}, scratch)
    work = pickle.loads(pickle.dumps(work))

    def do(jobs):
        rng.shuffle(jobs)
        for job in [*jobs, *(job for job in jobs if rng.random() < again)]:
            job.run(work)

    do([Job(stream.map_shard, (name, i), 0, "") for name in made for i in range(len(work.shards[name]))])
    for name in made:
        stream.list_parts(work, "map_shard", name)
    groups = work.near_groups()
    do([Job(stream.map_near, (group, i), 0, "") for group in groups for i in range(work.near_buckets(group))])
    for group in groups:
        stream.list_parts(work, "map_near", group)
    do([Job(stream.map_bucket, (name, i), 0, "") for name in made for i in range(buckets)])
    for name in made:
        stream.close(work, name, {})
    return work


def stored(work, name, column="tokens"):
    """The texts of a column of a task's store, sorted."""
    store = Store(f"{work.target}/{name}")
    tokenizer = stream.load_tokenizer(work.tokenizer)
    return sorted(tokenizer.decode(example[column]) for example in store.read(range(len(store))))


def folder_bytes(folder):
    return {f"{f.relative_to(folder)}": f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def counts_of(work, name):
    """(counts of map 1, of map 2), which add up to the examples that are stored."""
    first, second = Counts(), Counter()
    for marker in stream.markers(work, "map_shard", name):
        first.add(Counts.from_json(marker["counts"]))
    for marker in stream.markers(work, "map_bucket", name):
        second.update(marker["counts"])
    assert first.rows_read == sum(first.rows.values())
    if work.tasks[name].kind != "contextual":
        assert first.made == first.examples + sum(first.dropped.values())
    lost = second[stream.DUPLICATES] + second[stream.NEAR]
    assert first.examples - lost == len(Store(f"{work.target}/{name}"))
    return first, second


TEXTS = [passage(i) for i in range(30)]
COPIES = [text + " and more" for text in TEXTS[:8]]  # near duplicates, far apart


@pytest.mark.parametrize("shards, seed, again", [(1, 0, 0.0), (3, 1, 0.0), (5, 2, 0.5)])
def test_the_same_near_duplicates_are_dropped_whatever_the_shards_and_the_order(
    shards, seed, again, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "NEAR_BYTES", 1000)
    rows = [{"text": text} for text in [*TEXTS, *COPIES, *map(disguised, TEXTS[20:23]), TEXTS[5]]]
    random.Random(seed).shuffle(rows)
    about = {"t": Hygiene(near_duplicates=0.75)}
    options = {"shards": shards, "seed": seed, "again": again, "buckets": 30}  # some lose all their examples
    work = run(tmp_path, tokenizer, {"t": ("text", rows, {})}, about, **options)
    assert work.near_buckets("task t") > 5
    kept = stored(work, "t")
    for text in TEXTS:
        base = {text, text + " and more", disguised(text)}
        assert len(base & set(kept)) == 1
    assert len(kept) == len(TEXTS)
    # Which one stays does not depend on the order.
    expected = run(tmp_path / "plain", tokenizer, {"t": ("text", sorted(rows, key=str), {})}, about, buckets=30)
    assert folder_bytes(work.target) == folder_bytes(expected.target)
    counts = counts_of(work, "t")[1]
    assert counts[stream.NEAR] + counts[stream.DUPLICATES] == 12


def test_near_duplicates_in_several_tasks_are_dropped_only_if_they_are_compared(tokenizer, tmp_path):
    rows = {
        "a": [{"text": text} for text in TEXTS],
        "b": [{"text": text} for text in [*COPIES, TEXTS[20], passage(99)]],
    }
    tasks = {name: ("text", values, {}) for name, values in rows.items()}
    alone = run(tmp_path / "alone", tokenizer, tasks, dict.fromkeys(tasks, Hygiene(near_duplicates=0.75)), shards=2)
    assert [len(stored(alone, name)) for name in tasks] == [30, 10]
    together = Hygiene(near_duplicates=0.75, compare_with="web")
    work = run(tmp_path / "together", tokenizer, tasks, dict.fromkeys(tasks, together), shards=2)
    both = [*stored(work, "a"), *stored(work, "b")]
    assert len(both) == 31 and passage(99) in both
    dropped = [counts_of(work, name)[1][stream.NEAR] for name in tasks]
    assert sum(dropped) == 9 and min(dropped) > 0
    groups = [group for marker in stream.markers(work, "map_near", "with web") for group in marker["groups"]]
    locations = [{work.location(*member) for member in group} for group in groups]
    assert {len(members) for members in locations} == {2}
    assert all({path.split("/")[-2] for path in members} == {"a", "b"} for members in locations)


def test_pairs_are_near_duplicates_if_both_sides_are(tokenizer, tmp_path):
    query, document = passage(1, 8), passage(2)
    rows = [
        {"query": query, "document": document},
        {"query": disguised(query), "document": document + " etc"},
        {"query": passage(3, 8), "document": document},
        {"query": query, "document": passage(4)},
    ]
    about = Hygiene(near_duplicates=0.75)
    work = run(tmp_path, tokenizer, {"t": ("pair", rows, {"document_length": 0})}, {"t": about})
    assert len(stored(work, "t", "query")) == 3
    assert counts_of(work, "t")[1][stream.NEAR] == 1


def test_a_contextual_document_is_dropped_with_all_its_parts(tokenizer, tmp_path):
    def document(chunks):
        return {"chunks": chunks, "queries": [{"text": f"query of {i}", "chunk": i} for i in range(len(chunks))]}

    chunks = [passage(i, 20) for i in range(6)]
    # The first two parts of both documents are equal, and the last one differs a little.
    rows = [document(chunks), document([*chunks[:5], chunks[5] + " etc"]), document([passage(i, 20) for i in (7, 8)])]
    fields = {"max_chunks": 2, "chunk_length": 512}
    work = run(tmp_path, tokenizer, {"t": ("contextual", rows, fields)}, {"t": Hygiene(near_duplicates=0.75)}, shards=3)
    kept = Counter(stored(work, "t", "document"))
    assert sum(kept.values()) == 4 and set(kept.values()) == {1}
    assert kept["".join(chunks[:2])] == kept["".join(chunks[2:4])] == 1
    assert counts_of(work, "t")[1][stream.NEAR] == 3


def write_set(folder, corpus, queries):
    folder.mkdir(parents=True)
    for name, rows in (
        ("corpus", [{"_id": f"d{i}", "text": text} for i, text in enumerate(corpus)]),
        ("queries", [{"_id": f"q{i}", "text": text} for i, text in enumerate(queries)]),
        ("qrels", [{"query-id": f"q{i}", "corpus-id": "d0", "score": 1} for i in range(len(queries))]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_examples_with_evaluation_texts_are_dropped_and_hits_are_named(shards, tokenizer, tmp_path):
    held_out = write_set(
        tmp_path / "set", [PASSAGES["ru"][0], PASSAGES["zh"][0]], ["Who mends the bridge?", passage(50)]
    )
    rows = [
        {"query": "who mends the bridge", "document": TEXTS[0], "negatives": [TEXTS[1]]},
        {"query": "another question", "document": disguised(PASSAGES["ru"][0]), "negatives": [TEXTS[2]]},
        {"query": "one more question", "document": TEXTS[3], "negatives": [TEXTS[4], PASSAGES["zh"][0]]},
        {"query": "a good question", "document": PASSAGES["ru"][1], "negatives": [TEXTS[6]]},
    ]
    about = Hygiene(evaluation_sets=("s/test",))
    tasks = {"t": ("triplet", rows, {})}
    work = run(tmp_path / "all", tokenizer, tasks, {"t": about}, shards=shards, sets={"s/test": held_out, "other": 1})
    assert stored(work, "t", "query") == ["a good question"]
    assert counts_of(work, "t")[0].dropped[hygiene.CONTAMINATED] == 3
    found = [marker["hygiene"] for marker in stream.markers(work, "map_shard", "t")]
    assert sum((Counter(f["hits"]) for f in found), Counter()) == {"0": 1, "2": 1, "3": 1}
    located = [item for f in found for item in f["locations"].items()]
    assert sorted(owner for owner, _ in located) == ["0", "2", "3"]
    assert all(place.startswith(f"{tmp_path}/all/rows/t/") for _, places in located for place in places)
    # Queries only, from a source.
    about = Hygiene(evaluation_sets=(Retrieval(path=f"{held_out}"),), evaluation_texts=("queries",))
    work = run(tmp_path / "queries", tokenizer, tasks, {"t": about}, shards=shards)
    assert counts_of(work, "t")[0].dropped[hygiene.CONTAMINATED] == 1


def test_an_unknown_evaluation_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="'s/tset' is neither a folder nor one of s/test, s/development"):
        hygiene.build_index(Hygiene(evaluation_sets=("s/tset",)), tmp_path, {"s/test": 1, "s/development": 2}, tmp_path)
    with pytest.raises(ValueError, match=r"has no evaluation set: expected @retrieval\(\)"):
        hygiene.build_index(Hygiene(evaluation_sets=(Files(paths="x"),)), tmp_path, {}, tmp_path)
    names = hygiene.evaluation_sources(Hygiene(evaluation_sets=("s/*",)), {"s/a": "A", "s/b": "B", "r": "C"})
    assert {name: source.path for name, source in names.items()} == {"s/a": "A", "s/b": "B"}


def test_texts_in_other_languages_are_dropped_and_counted(tokenizer, tmp_path):
    rows = [{"text": text} for pair in PASSAGES.values() for text in pair] + [{"text": "Short"}, {"text": "короткий"}]
    work = run(
        tmp_path,
        tokenizer,
        {"t": ("text", rows, {"language": "rus_Cyrl"}), "u": ("text", rows, {})},
        dict.fromkeys("tu", Hygiene(language=True)),
        shards=2,
    )
    assert stored(work, "t") == sorted([*PASSAGES["ru"], "Short", "короткий"])
    assert counts_of(work, "t")[0].dropped[hygiene.OTHER_LANGUAGE] == 2 * len(PASSAGES) - 2
    found = [marker["hygiene"] for marker in stream.markers(work, "map_shard", "t")]
    seen, other = (sum((Counter(f[name]) for f in found), Counter()) for name in ("languages", "other"))
    assert seen["ru"] == seen["unknown"] == seen["ja"] == 2 and seen - other == {"ru": 2, "unknown": 2}
    # Without a stated language they are counted only.
    assert len(stored(work, "u")) == len(rows) and not any(counts_of(work, "u")[0].dropped.values())


# --- gin files and the report -----------------------------------------------------------------------------------------

GIN = """
mixtures.rates = {"texts": {"web.a": 1.0, "web.b": 1.0}, "pairs": {"qa": 1.0}}
web/task.source = @files()
web/files.paths = "{data_root}/{name}/*.jsonl"
web/task.kind = "text"
web/task.language = "en"
web/hygiene.compare_with = "web"
web/hygiene.language = True
hygiene.near_duplicates = 0.75
hygiene.evaluation_sets = ["*", "{data_root}/set"]
qa/task.source = @files()
qa/files.paths = "{data_root}/qa/*.jsonl"
qa/task.kind = "pair"
qa/task.held_out = 0.3
evaluation.sets = {"qa/test": "qa"}
"""


def test_hygiene_is_bound_for_all_tasks_or_by_scope(tmp_path):
    (tmp_path / "x.gin").write_text(GIN)
    bound = settings.bind(tmp_path / "x.gin", ["web/b/hygiene.evaluation_sets = []"], data_root="/data").hygiene
    assert bound["web.a"] == Hygiene(0.75, "web", ["*", "/data/set"], language=True)
    assert bound["web.b"].evaluation_sets == [] and bound["web.b"].index == ""
    assert bound["qa"] == Hygiene(0.75, evaluation_sets=["*", "/data/set"])
    assert bound["qa"].index == bound["web.a"].index


@pytest.mark.parametrize(
    "binding, message",
    [
        ("hygiene.near_duplicates = 1.5", r"hygiene.near_duplicates=1.5 must be between 0 and 1"),
        ("hygiene.overlap = -1", r"hygiene.overlap=-1 must be between 0 and 1"),
        ("hygiene.evaluation_sets = '*'", r"hygiene.evaluation_sets='\*' must be a list, each item a text in quotes"),
        ("hygiene.evaluation_texts = ['query']", "'query' must be one of queries, corpus"),
        ("web/task.language = 'klingonisch!'", "task 'web.a': hygiene.language=True: task.language 'klingonisch!' "),
        ("web/b/hygiene.near_duplicates = 0.8", "it is 0.75 for 'web.a' and 0.8 for 'web.b'"),
        ("hygiene.near_duplicate = 0.8", "unknown gin binding 'hygiene.near_duplicate'; the nearest valid one is"),
    ],
)
def test_wrong_hygiene_is_refused_before_any_work(binding, message, tmp_path):
    (tmp_path / "x.gin").write_text(GIN)
    with pytest.raises(ValueError, match=message):
        settings.bind(tmp_path / "x.gin", [binding], data_root="/data")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(hygiene.LIBRARIES, "near_duplicates", ("no_such_library",))
    with pytest.raises(ValueError, match="hygiene.near_duplicates needs no_such_library: pip install"):
        Hygiene(near_duplicates=0.8)
    assert not Hygiene(evaluation_sets=["*"]).near_duplicates


def test_the_figures_of_the_report_add_up_and_name_what_was_found(tokenizer, tmp_path):
    root, english = tmp_path / "root", PASSAGES["en"]
    write_set(root / "set", [english[0]], ["an unused query"])
    texts = [*TEXTS[:20], TEXTS[3], *english, PASSAGES["de"][0], "  "]
    write_rows(root / "a", [{"text": text} for text in texts], 3)
    write_rows(root / "b", [{"text": text} for text in [*COPIES, disguised(english[0])]], 2)
    pairs = [{"query": passage(100 + i, 12), "document": passage(200 + i)} for i in range(40)]
    write_rows(root / "qa", pairs, 2)
    (tmp_path / "x.gin").write_text(GIN)
    folder = tmp_path / "data"
    prepare(
        folder,
        gin_file=tmp_path / "x.gin",
        data_root=f"{root}",
        tokenizer=tokenizers.load(tokenizer),
        processes=1,
    )
    report = json.loads((folder / "hygiene.json").read_text())
    for name, task in report["tasks"].items():
        rows, texts, examples = (dict(task[part]) for part in ("rows", "texts", "examples"))
        assert rows.pop("read") == sum(rows.values())
        assert texts["made"] == texts["kept"] + sum(texts["dropped"].values()) and texts["kept"] == examples["made"]
        lost = examples[stream.DUPLICATES] + examples.get(stream.NEAR, 0)
        assert examples["stored"] == examples["made"] - lost == len(Store(folder / "tasks" / name))
    a, b, qa = (report["tasks"][name] for name in ("web.a", "web.b", "qa"))
    assert a["texts"]["dropped"] == {"empty texts": 1, hygiene.CONTAMINATED: 1, hygiene.OTHER_LANGUAGE: 1}
    assert a["dropped languages"] == {"de": 1} and a["languages"]["de"] == 1
    assert b["texts"]["dropped"] == {hygiene.CONTAMINATED: 1}
    hit = b["evaluation sets"][f"{root}/set"]
    assert hit["texts"] == {"queries": 1, "corpus": 1} and hit["found"] == {"corpus": 1}
    assert hit["examples of"] == [{"part": "corpus", "id": "d0", "examples": 1, "locations": [f"{root}/b/0.jsonl:5"]}]
    assert a["examples"].get(stream.NEAR, 0) + b["examples"].get(stream.NEAR, 0) == 8
    assert set(report["near duplicates"]) == {"with web", "task qa"}
    groups = report["near duplicates"]["with web"]["groups"]
    assert len(groups) == 8 and all({m["task"] for m in group} == {"web.a", "web.b"} for group in groups)
    assert set(qa["evaluation sets"]) == {"qa/test", f"{root}/set"} and not qa["evaluation sets"]["qa/test"]["found"]
    text = (folder / "hygiene.md").read_text()
    for expected in (
        f"corpus d0 | 1 | {root}/b/0.jsonl:5 |",
        "| web.a | ",
        "de 1",
        "8 examples of web.a, web.b were dropped",
    ):
        assert expected in text
    assert not (folder / "scratch").exists()
