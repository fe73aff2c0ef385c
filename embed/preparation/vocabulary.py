"""Training a SentencePiece vocabulary, and the normalisation that is baked into it."""

import re
import string
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

MAX_TEXT_BYTES = 8192  # longer training texts are cut
THREADS = 2  # fixed: the sums of EM depend on it in the last bits

_PUNCTUATION = ".([{<\"'`=-+*/@:,;!~#$%&|^\\"


def train_sentencepiece(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, split_identifiers: bool = True
) -> None:
    """Writes folder/sentencepiece.model: a unigram model with <pad> 0, <unk> 1, <mask> 2, <sep> 3, no BOS, no EOS.

    With `split_identifiers` text is case-folded and cut where identifiers are (`identifier_rules`), so parse_config,
    parseConfig and "parse the config" share pieces. Without, it is NFKC with byte fallback, and case is kept.
    The same texts in the same order give the same model. Raises ValueError where `vocab_size` cannot be reached.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"}
    with tempfile.TemporaryDirectory() as scratch:
        if split_identifiers:
            rules = Path(scratch, "rules.tsv")
            lines = (f"{_hex(source)}\t{_hex(target)}\n" for source, target in sorted(identifier_rules().items()))
            rules.write_text("".join(lines), encoding="ascii")
            options = {"normalization_rule_tsv": str(rules), "character_coverage": 0.9998}
        # From a file, not an iterator: then the trainer holds no interpreter lock and others work beside it.
        sentences = Path(scratch, "texts.txt")
        count = 0
        with open(sentences, "w", encoding="utf-8") as out:
            for text in texts:
                out.write(" ".join(text.split()).encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore"))
                out.write("\n")
                count += 1
        if not count:
            raise ValueError("a vocabulary needs at least one training text, there is none")
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(sentences),
                model_prefix=str(Path(scratch, "sentencepiece")),
                model_type="unigram",
                vocab_size=vocab_size,
                pad_id=0,
                unk_id=1,
                bos_id=-1,
                eos_id=-1,
                pad_piece="<pad>",
                unk_piece="<unk>",
                control_symbols=["<mask>", "<sep>"],
                max_sentence_length=MAX_TEXT_BYTES,
                num_threads=THREADS,
                minloglevel=2,
                **options,
            )
        except RuntimeError as error:
            least, most = re.search(r"required_chars\. \d+ vs (\d+)", str(error)), re.search(r"<= (\d+)\.", str(error))
            if least:
                why = f"must be at least {least[1]}: the characters of these {count} texts and the control pieces"
            elif most:
                why = f"must be at most {most[1]}: these {count} texts give no more pieces"
            else:
                why = f"cannot be trained on {count} texts: {error}"
            raise ValueError(f"vocab_size={vocab_size} {why}") from None
        # The trainer writes down the paths it read: without them the same texts give the same file.
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(scratch, "sentencepiece.model").read_bytes())
        model.trainer_spec.ClearField("input")
        model.trainer_spec.ClearField("model_prefix")
        model.normalizer_spec.ClearField("normalization_rule_tsv")
        (folder / "sentencepiece.model").write_bytes(model.SerializeToString(deterministic=True))


def identifier_rules() -> dict[str, str]:
    """The normalisation as {source: target}; SentencePiece applies the longest rule that matches at each position.

    - NFKC with case folding, of every character and of its canonical decomposition;
    - "_" and white space become a space (runs of spaces are squeezed later);
    - a space between a lower-case or digit and an upper-case letter ("aB" -> "a b"), and in front of the last capital of
      a run that a lower-case letter follows ("HTTPServer" -> "http server");
    - a space between punctuation and a letter, so that a word has one piece wherever it stands ("(config" -> "( config").
    """
    rules = {}
    for code in range(0x80, 0x20000):
        character = chr(code)
        if unicodedata.category(character) in ("Cs", "Cn", "Co"):
            continue
        target = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", character).casefold())
        if target != character:
            rules[character] = target
        decomposed = unicodedata.normalize("NFD", character)
        if decomposed not in (character, target):
            rules[decomposed] = target
    lower, upper = string.ascii_lowercase, string.ascii_uppercase
    for capital in upper:
        rules[capital] = capital.lower()
        for before in lower + string.digits:
            rules[before + capital] = f"{before} {capital.lower()}"
        for second in upper:
            for third in lower:
                rules[capital + second + third] = f"{capital.lower()} {second.lower()}{third}"
    for mark in _PUNCTUATION:
        for letter in string.ascii_letters:
            rules[mark + letter] = f"{mark} {letter.lower()}"
    for space in "_\t\n\r\v\f\x85\xa0":
        rules[space] = " "
    return rules


def _hex(text: str) -> str:
    return " ".join(f"{ord(character):x}" for character in text)
