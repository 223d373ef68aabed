"""Turn a folder of your own text into shards and a tokenizer for PRESET=tiny.

    python data/own_text.py FOLDER [--root data] [--vocab-size 1024]

reads every .txt and .jsonl file below FOLDER (.jsonl also as .xz, .gz or .zst; JSON lines with a key `text`), cuts long
texts into documents, drops repeated ones, and writes ROOT/tokenizers/own_NAME_1024_bpe.model and
ROOT/datasets/own_NAME_sp1024/, where NAME is the name of the folder. About 2.3 % of the text becomes validation: at
least 20 kB, so that the score is meaningful, at most 60 kB, so that scoring is fast, and never more than a tenth. The
tokenizer is trained on the rest. `./run.sh --text FOLDER` does this and trains on it. Everything is held in memory; use
data/export.py for gigabytes of text and for the challenge's own list.
"""

import argparse
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import shards
from documents import read_texts
from embedded import MAX_VAL_DOCUMENT_CHARS, VAL_FRACTION, describe, split_documents, write_corpus
from shards import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")
LEAST_CHARS = 100_000  # of all documents: less does not support a tokenizer of 1,024 pieces
LEAST_VAL_CHARS, MOST_VAL_CHARS = 20_000, 60_000
MOST = MAX_VAL_DOCUMENT_CHARS  # characters of a document, so that each may be validation
# The rest of the text if it is short enough; else up to the last blank line in the second half of that length, else up
# to a blank, else exactly that length.
DOCUMENT = re.compile(rf"(?s).{{1,{MOST}}}\Z|.{{{MOST // 2},{MOST - 2}}}\n[ \t\r]*\n|.{{1,{MOST - 1}}}\s|.{{{MOST}}}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a folder of .txt and .jsonl files into shards for PRESET=tiny.")
    parser.add_argument("folder", type=Path, help="folder with the text")
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="folder for tokenizers/ and datasets/ (default data)"
    )
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer (default 1024)")
    options = parser.parse_args()
    name = corpus_name(options.folder)
    describe(*build(options.folder, options.root, options.vocab_size), name, options.root, options.vocab_size)


def corpus_name(folder: Path) -> str:
    """own_ and the folder's name, without characters that do not belong in a file name."""
    return "own_" + (re.sub(r"[^\w-]+", "_", folder.resolve().name).strip("_") or "text")


def build(folder: Path, root: Path, vocab_size: int) -> tuple[dict, bool]:
    """The shards of the text below `folder`; returns (manifest, whether anything was built).

    Raises DataError for a folder without text or with too little of it, and for a file that is no text.
    """
    documents = collect_documents(folder)
    total = sum(map(len, documents))
    if total < LEAST_CHARS:
        raise DataError(
            folder,
            f"{total:,} characters in {len(documents):,} documents, without repeated ones",
            f"at least {LEAST_CHARS:,}",
            "add more text",
        )
    return write_corpus(root, corpus_name(folder), vocab_size, *split_documents(documents, validation_fraction(total)))


def validation_fraction(total: int) -> float:
    """Share of `total` characters that becomes validation."""
    return min(max(VAL_FRACTION, LEAST_VAL_CHARS / total), MOST_VAL_CHARS / total, 0.1)


def collect_documents(folder: Path) -> list[str]:
    """All documents, each once, in the order of their SHA-256."""
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "a folder with .txt or .jsonl files", "check the path")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(SUFFIXES))
    if not paths:
        raise DataError(
            folder, "no text file", f"files that end in {', '.join(SUFFIXES)}", "check the folder, or rename files"
        )
    documents = {document for path in paths for text in file_texts(path) for document in cut(text)}
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def file_texts(path: Path) -> Iterable[str]:
    """The texts of one file. Raises DataError for one that is not UTF-8, or is no text."""
    if not path.name.lower().endswith(".txt"):
        return read_texts([path])
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            path,
            f"byte {data[error.start]:#04x} at {error.start:,}, which is not UTF-8",
            "UTF-8 text",
            "convert the file (for example with iconv), or take it out of the folder",
        ) from error
    if "\0" in text:
        raise DataError(path, "a NUL character", "text", "this is a binary file: take it out of the folder")
    return [text]


def cut(text: str) -> Iterable[str]:
    """A text as documents of at most MOST characters, white space folded as the tokenizer folds it."""
    for piece in DOCUMENT.findall(text):
        if document := " ".join(piece.split()):
            yield document


if __name__ == "__main__":
    shards.run_command(main)
