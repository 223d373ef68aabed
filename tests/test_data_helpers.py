"""What the data tests share: the path to data/, sample documents, toy tokenizers. No tests in here."""

import io
import json
import sys
from functools import cache
from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
sys.path.insert(0, str(DATA))

import caseops  # noqa: E402
import sentencepiece  # noqa: E402
import shards  # noqa: E402

# Text a tokenizer's normalisation changes, next to text it leaves alone.
AWKWARD = ["", " ", "I", "  outer  blanks \n", "tabs\tand\n\nlines", "ﬁligree ½ Ａ", "ÉCOLE Ünder naïve", "漢字 and 🙂",
           "eBook B2B PhDs don'T", "operators \ue001\ue002\ue003\ue004 in text", "\ue004\ue004A\ue001", "a\u200bb \u00a0 c\u3000",
           "x" * 300, "A" * 300]  # fmt: skip


@cache
def sample_texts() -> tuple[str, ...]:
    """About 1,500 short and longer documents of English, from Python's own documentation, all different."""
    from pydoc_data.topics import topics

    paragraphs = [part for _, text in sorted(topics.items()) for part in text.split("\n\n") if len(part) > 80]
    return tuple(dict.fromkeys(paragraphs))


@cache
def toy_model(vocab_size: int = 800, with_operators: bool = False) -> bytes:
    """A tokenizer with the challenge's settings, as the content of its file."""
    import tempfile

    texts = [caseops.encode(text) for text in sample_texts()] if with_operators else sample_texts()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.model"
        shards.train_tokenizer(texts, vocab_size, path, caseops.OPERATORS if with_operators else ())
        return path.read_bytes()


def load(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def without_space_piece(model: bytes) -> bytes:
    """The same tokenizer, its stand-alone space piece renamed to a character no text has: a blank then takes three bytes."""
    piece = b"\x0a\x03\xe2\x96\x81\x15"  # protobuf: field 1, three bytes, U+2581; then field 2, the score
    assert model.count(piece) == 1
    return model.replace(piece, b"\x0a\x03\xee\xa1\x81\x15")


@cache
def many_space_model() -> bytes:
    """A tokenizer that keeps runs of blanks and has pieces that begin with several of them."""
    texts = [f"{' ' * (1 + i % 4)}return {'    ' if i % 2 else '  '}value {i % 7}" for i in range(400)] + list(
        sample_texts()[:300]
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True, pad_id=0,
        bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        split_by_whitespace=False, hard_vocab_limit=False, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_documents(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
