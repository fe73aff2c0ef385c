import numpy as np

from embed.inference import lexical


def test_words_are_split_at_underscores_and_case_and_lower_cased():
    assert lexical.words("parseHTTPHeader_v2 __init__(self, IOError): x2y 数据 größe") == [
        "parse",
        "http",
        "header",
        "v2",
        "init",
        "self",
        "io",
        "error",
        "x2y",
        "数据",
        "größe",
    ]


def test_fusion_adds_reciprocal_ranks():
    first, second = np.array([[3, 1, 2, -1]]), np.array([[2, 3, 0]])
    # 3: 1/61 + 1/62, 2: 1/63 + 1/61, 1: 1/62, 0: 1/63
    assert lexical.reciprocal_rank_fusion(first, second, depth=5)[0].tolist() == [[3, 2, 1, 0, -1]]


def test_with_k_60_two_middling_ranks_beat_one_first_rank_and_with_k_1_they_do_not():
    first, second = np.arange(50)[None], np.array([[*range(100, 149), 49]])  # text 49 has rank 50 in both
    assert lexical.reciprocal_rank_fusion(first, second, depth=2)[0].tolist() == [[49, 0]]  # 2 / 110 > 1 / 61
    assert lexical.reciprocal_rank_fusion(first, second, k=1, depth=2)[0].tolist() == [[0, 100]]


def test_fusion_breaks_ties_by_index_and_keeps_the_best():
    first, second = np.array([[1, 0], [5, 6]]), np.array([[0, 1], [-1, -1]])
    assert lexical.reciprocal_rank_fusion(first, second, depth=1)[0].tolist() == [[0], [5]]


def test_an_analyzer_stems_words_and_leaves_out_stop_words():
    assert lexical.analyzer("eng")("The studies of a cell's Nuclei") == ["studi", "cell", "nuclei"]
    assert lexical.analyzer("deu")("die Häuser der Stadt") == ["haus", "stadt"]
    assert lexical.analyzer("xho")("Umntu ngumntu") == ["umntu", "ngumntu"]  # without a stemmer
    assert lexical.analyzer("jpn")("東京 Ａ") == ["東", "京", "a"]  # characters, in compatibility form
