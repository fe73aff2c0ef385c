"""The language of a text, by py3langid, and whether it is the one that a task states. Works offline."""

import functools

CHARACTERS = 200  # from the middle of a text, that are looked at: its time grows with them
SHORTEST = 60  # bytes of UTF-8; nothing is said of a shorter text
CONFIDENCE = 0.5
UNKNOWN = "unknown"  # too short, or not sure
# What is told apart badly, or named differently: an answer in the group of the stated language agrees with it.
GROUPS = tuple(
    frozenset(codes.split())
    for codes in (
        "no nb nn",
        "hr bs sr sh cnr",
        "zh cmn yue wuu nan hak lzh",
        "ar arb arz ary apc ajp acm ars",
        "fa prs",
        "id ms",
        "ku sdh ckb",
        "uz uzs",
        "ps sd",
        "bo dz",
        "xh zu ss nr nd",
        "st nso tn",
        "qu quy quz",
        "gn gug",
        "ff fuv fuc",
        "grc el",
        "hbo he",
        "fil tl",
    )
)


@functools.cache
def code(language: str) -> str:
    """The short code of a language: "en" for en, eng, en-GB or eng_Latn; "zh" for cmn_Hani. ValueError for no code."""
    import langcodes

    try:
        parsed = langcodes.Language.get(language.replace("_", "-"))
    except ValueError:
        parsed = None
    if parsed is None or not parsed.language or not parsed.is_valid():
        raise ValueError(f"{language!r} is no language code, such as en, eng or eng_Latn")
    return parsed.prefer_macrolanguage().language


@functools.lru_cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@functools.lru_cache
def known() -> frozenset[str]:
    """The codes of the languages that can be identified."""
    return frozenset(_identifier().labels)


def identify(text: str) -> str:
    """The code of the language of a text, or UNKNOWN."""
    start = max(len(text) - CHARACTERS, 0) // 2
    sample = text[start : start + CHARACTERS]
    if len(sample.encode("utf-8", "surrogatepass")) < SHORTEST:
        return UNKNOWN
    language, confidence = _identifier().classify(sample)
    return language if confidence >= CONFIDENCE else UNKNOWN


@functools.lru_cache
def accepted(stated: tuple[str, ...]) -> frozenset[str]:
    """The answers of `identify` that agree with the stated languages; empty if every answer does.

    Every answer agrees if no language is stated, and if the identifier does not have one of them.
    """
    groups = [next((group for group in GROUPS if c in group), frozenset({c})) for c in map(code, stated)]
    if not groups or not all(group & known() for group in groups):
        return frozenset()
    return frozenset({UNKNOWN}).union(*groups)
