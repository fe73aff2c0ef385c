"""Trains a SentencePiece vocabulary and defines the normalization that it contains."""

import re
import string
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from embed import paths

MAX_TEXT_BYTES = 8192  # longer training texts are truncated
THREADS = 2  # fixed, because the last bits of EM's sums depend on it

_PUNCTUATION = ".([{<\"'`=-+*/@:,;!~#$%&|^\\"


def train_sentencepiece(
    texts: Iterable[str], folder: str | Path, *, vocab_size: int, split_identifiers: bool = True
) -> None:
    """Writes folder/sentencepiece.model: a unigram model with <pad> 0, <unk> 1, <mask> 2, <sep> 3, no BOS, no EOS.

    With `split_identifiers`, the model case-folds text and splits identifiers (`identifier_rules`), so that
    parse_config, parseConfig and "parse the config" share pieces. Without it, the model applies NFKC with byte fallback
    and keeps case. The same texts in the same order give the same model. If the texts do not give `vocab_size` pieces,
    it has as many as they give. Raises ValueError if `vocab_size` is smaller than their characters need.
    """
    options = {"byte_fallback": True, "normalization_rule_name": "nmt_nfkc"}
    with tempfile.TemporaryDirectory() as scratch:
        if split_identifiers:
            rules = Path(scratch, "rules.tsv")
            lines = (f"{_hex(source)}\t{_hex(target)}\n" for source, target in sorted(identifier_rules().items()))
            rules.write_text("".join(lines), encoding="ascii")
            options = {"normalization_rule_tsv": str(rules), "character_coverage": 0.9998}
        # A file, not an iterator: the trainer then holds no interpreter lock, and other threads run meanwhile.
        sentences = Path(scratch, "texts.txt")
        count = 0
        with open(sentences, "w", encoding="utf-8") as out:
            for text in texts:
                out.write(" ".join(text.split()).encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore"))
                out.write("\n")
                count += 1
        if not count:
            raise ValueError("a vocabulary needs at least one training text, got none")
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(sentences),
                model_prefix=str(Path(scratch, "sentencepiece")),
                model_type="unigram",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
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
            if least := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
                why = f"must be at least {least[1]}: the control pieces and the characters of the {count} texts"
            else:
                why = f"cannot be trained on {count} texts: {error}"
            raise ValueError(f"config.data.vocab_size={vocab_size} {why}") from None
        # The model records the trainer's temporary paths. Without them, the same texts give the same file.
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(scratch, "sentencepiece.model").read_bytes())
        model.trainer_spec.ClearField("input")
        model.trainer_spec.ClearField("model_prefix")
        model.normalizer_spec.ClearField("normalization_rule_tsv")
        paths.write(paths.path(folder) / "sentencepiece.model", model.SerializeToString(deterministic=True))


def identifier_rules() -> dict[str, str]:
    """The normalization as {source: target}. At each position SentencePiece applies the longest matching rule.

    - NFKC with case folding, for every character and its canonical decomposition;
    - "_" and white space become a space (SentencePiece later squeezes runs of spaces);
    - a space between a lower-case letter or digit and a capital ("aB" -> "a b"), and before the last capital of a run
      if a lower-case letter follows ("HTTPServer" -> "http server");
    - a space between punctuation and a letter, so that a word has the same piece in every context ("(config" ->
      "( config").
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
        for left in lower + string.digits:
            rules[left + capital] = f"{left} {capital.lower()}"
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
