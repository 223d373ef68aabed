"""Build the embedded corpus: real English that every Python ships with, as shards in the challenge's format.

The text is the language reference (pydoc_data.topics), the docstrings of the standard library's sources (read with
`ast`, so no module is imported) and those of its C modules. White space in documents is folded, repeated paragraphs are
removed, and the documents are sorted by their SHA-256 and split: about 2.3 % of the text is validation. The tokenizer
is trained on the training part only. Another Python version gives another corpus, so the manifest records its hash.

    python data/embedded.py [--root data] [--vocab-size 1024]

writes ROOT/tokenizers/embedded_1024_bpe.model and ROOT/datasets/embedded_sp1024/ (two shards and manifest.json).
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import shards

NAME = "embedded"
MIN_DOCUMENT_CHARS = 200
MAX_DOCUMENT_CHARS = 8_000  # longer texts are cut at paragraph ends; FineWeb's mean document is about 3,000 bytes
MAX_VAL_DOCUMENT_CHARS = 4_000  # so that a small validation split has many documents
MIN_REPEAT_CHARS = 60  # a paragraph this long is kept once in the whole corpus
VAL_FRACTION = 0.023  # of the characters: about 50 KB
RULES = re.compile(r"[-=*~#+|_^]{5,}")  # drawn lines under titles and in tables
MIN_DOCUMENTS = 200  # fewer means a stripped-down Python without its documentation

# Not documentation, or not part of every installation.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "site-packages",
                   "dist-packages", "lib-dynload", "__pycache__"}  # fmt: skip
SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "antigravity", "this.py")
# C modules whose import does nothing but define names.
C_MODULES = (
    "_asyncio _bisect _codecs _collections _csv _ctypes _datetime _decimal _elementtree _functools _hashlib"
    " _heapq _io _json _lzma _bz2 _operator _pickle _random _socket _sqlite3 _sre _ssl _struct _thread"
    " _tracemalloc _weakref array atexit binascii builtins cmath errno faulthandler fcntl gc itertools marshal"
    " math mmap posix pyexpat resource select sys time unicodedata zlib"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded corpus from Python's own documentation.")
    parser.add_argument(
        "--root", type=Path, default=Path("data"), help="folder for tokenizers/ and datasets/ (default data)"
    )
    parser.add_argument("--vocab-size", type=int, default=1024, help="pieces of the tokenizer (default 1024)")
    options = parser.parse_args()
    describe(*build(options.root, options.vocab_size), NAME, options.root, options.vocab_size)


def describe(manifest: dict, built: bool, name: str, root: Path, vocab_size: int) -> None:
    """Prints what a corpus holds and where it is."""
    state = "built" if built else "complete, nothing to do"
    print(
        f"{name}_corpus:{state} python:{manifest['python'].split()[0]} corpus_sha256:{manifest['corpus_sha256'][:16]}"
    )
    for split in ("train", "val"):
        numbers = manifest["splits"][split]
        print(f"split:{split} documents:{numbers['documents']} tokens:{numbers['tokens']} bytes:{numbers['bytes']} "
              f"bytes_per_token:{numbers['bytes'] / numbers['tokens']:.3f}")  # fmt: skip
    tokenizer, folder = corpus_paths(root, name, vocab_size)
    print(f"tokenizer:{tokenizer} sha256:{manifest['tokenizer_sha256'][:16]}")
    print(f"dataset:{folder}")


def corpus_paths(root: Path, name: str, vocab_size: int) -> tuple[Path, Path]:
    """(tokenizer, dataset folder) of a corpus."""
    root = Path(root)
    return root / "tokenizers" / f"{name}_{vocab_size}_bpe.model", root / "datasets" / f"{name}_sp{vocab_size}"


def tokenizer_path(root: Path, vocab_size: int) -> Path:
    return corpus_paths(root, NAME, vocab_size)[0]


def dataset_folder(root: Path, vocab_size: int) -> Path:
    return corpus_paths(root, NAME, vocab_size)[1]


def build(root: Path, vocab_size: int) -> tuple[dict, bool]:
    """Build what is missing of the embedded corpus; returns (manifest, whether anything was built)."""
    manifest = complete_manifest(root, NAME, vocab_size)
    if manifest is not None:
        return manifest, False
    documents = collect_documents()
    if len(documents) < MIN_DOCUMENTS:
        raise shards.DataError(
            sysconfig.get_path("stdlib"),
            f"{len(documents)} documents of text",
            f"at least {MIN_DOCUMENTS}",
            "this Python lacks its documentation: install the full package (python3-full on Debian)",
        )
    return write_corpus(root, NAME, vocab_size, *split_documents(documents, VAL_FRACTION))


def write_corpus(root: Path, name: str, vocab_size: int, val: list[str], train: list[str]) -> tuple[dict, bool]:
    """Tokenizer, shards and manifest of a corpus, unless they are there already; returns (manifest, whether built).

    Raises DataError where the text does not make a tokenizer of this size.
    """
    digest = hashlib.sha256(json.dumps([val, train]).encode()).hexdigest()
    manifest = complete_manifest(root, name, vocab_size)
    if manifest is not None and manifest["corpus_sha256"] == digest:
        return manifest, False
    tokenizer_file, folder = corpus_paths(root, name, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is written last and removed first: if it exists, everything else does.
    (folder / "manifest.json").unlink(missing_ok=True)
    shards.train_tokenizer(training_sentences(train), vocab_size, tokenizer_file)
    tokenizer = shards.load_tokenizer(tokenizer_file)
    manifest = {
        "name": folder.name,
        "python": sys.version,
        "recipe_sha256": recipe_sha256(),
        "corpus_sha256": digest,
        "tokenizer": f"../../tokenizers/{tokenizer_file.name}",
        "tokenizer_sha256": shards.file_sha256(tokenizer_file),
        "vocab_size": vocab_size,
        "splits": {
            split: write_split(folder, split, part, tokenizer) for split, part in (("val", val), ("train", train))
        },
    }
    shards.write_json(folder / "manifest.json", manifest)
    return manifest, True


def complete_manifest(root: Path, name: str, vocab_size: int) -> dict | None:
    """The manifest when this Python and this recipe made what is there and every file still has its hash, else None.

    Raises DataError for a vocabulary size out of range.
    """
    if not 512 <= vocab_size <= 16384:
        raise shards.DataError("--vocab-size", vocab_size, "512 to 16384", "the published size for small runs is 1024")
    tokenizer, folder = corpus_paths(root, name, vocab_size)
    if not (folder / "manifest.json").is_file():
        return None
    manifest = shards.read_json(folder / "manifest.json")
    if (manifest.get("python"), manifest.get("recipe_sha256")) != (sys.version, recipe_sha256()):
        return None
    expected = {tokenizer: manifest["tokenizer_sha256"]}
    for split, numbers in manifest["splits"].items():
        expected[shards.shard_path(folder, split, 0)] = numbers["sha256"]
    whole = all(path.is_file() and shards.file_sha256(path) == digest for path, digest in expected.items())
    return manifest if whole else None


def recipe_sha256() -> str:
    """Hash of what the result depends on besides Python: this program and the tokenizer library."""
    sources = b"".join(Path(module).read_bytes() for module in (__file__, shards.__file__))
    return hashlib.sha256(sources + sentencepiece.__version__.encode()).hexdigest()


def write_split(
    folder: Path, split: str, documents: list[str], tokenizer: sentencepiece.SentencePieceProcessor
) -> dict:
    """Tokenize and write one split as one shard; returns its numbers. `bytes` are those of the tokenizer's normalised
    text, which is what a score in bits per byte divides by."""
    encoded = [tokenizer.encode(document) for document in documents]
    tokens = np.array([token for ids in encoded for token in (shards.BOS_ID, *ids)], np.uint16)
    path = shards.shard_path(folder, split, 0)
    shards.write_shard(path, tokens)
    num_bytes = sum(len(text.encode()) for text in tokenizer.decode(encoded))
    return {"documents": len(documents), "tokens": len(tokens), "bytes": num_bytes, "sha256": shards.file_sha256(path)}


# ---------------------------------------------------------------------------------------------------------------------
# Collecting: the result is a list of documents, each one line of text, the same for the same Python.


def collect_documents() -> list[str]:
    """All documents, sorted by their SHA-256; no document is in both parts of the split."""
    documents = []
    seen: set[str] = set()
    for text in [*topic_texts(), *source_texts(), *c_module_texts()]:
        documents += cut_document(fresh_paragraphs(text, seen))
    return sorted(documents, key=lambda document: hashlib.sha256(document.encode()).digest())


def topic_texts() -> Iterator[str]:
    """The chapters of the language reference that `help()` shows."""
    from pydoc_data.topics import topics  # a dictionary of texts and nothing else

    for _, text in sorted(topics.items()):
        yield text


def source_texts() -> Iterator[str]:
    """One text per standard-library source file: its docstrings, each under its dotted name."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not SKIPPED_FOLDERS.intersection(parts) and not any(part.startswith(SKIPPED_PREFIXES) for part in parts):
            module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
            yield "\n\n".join(f"{name}\n{text}" for name, text in docstrings(ast.parse(path.read_bytes()), module))


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, its classes and functions, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        text := ast.get_docstring(node)
    ):
        yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):  # definitions that depend on the platform
            yield from docstrings(child, name)


def c_module_texts() -> Iterator[str]:
    """One text per C module: the docstrings of the module, its functions, classes and their methods."""
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not built on this platform: the corpus and its hash are different then
            continue
        found = [(name, module)]
        for key, value in sorted(vars(module).items()):
            if inspect.isclass(value):
                found.append((f"{name}.{key}", value))
                found += [
                    (f"{name}.{key}.{inner}", member)
                    for inner, member in sorted(vars(value).items())
                    if callable(member)
                ]
            elif inspect.isbuiltin(value):
                found.append((f"{name}.{key}", value))
        texts = [(key, text) for key, value in found if isinstance(text := getattr(value, "__doc__", None), str)]
        yield "\n\n".join(f"{key}\n{inspect.cleandoc(text)}" for key, text in texts)


def fresh_paragraphs(text: str, seen: set[str]) -> list[str]:
    """The paragraphs of a text, white space folded, drawn lines removed, without long ones that the corpus has already.

    seen: those long paragraphs; the new ones are added.
    """
    fresh = []
    for paragraph in text.split("\n\n"):
        paragraph = " ".join(RULES.sub(" ", paragraph).split())
        if not paragraph or paragraph in seen:
            continue
        if len(paragraph) >= MIN_REPEAT_CHARS:
            seen.add(paragraph)
        fresh.append(paragraph)
    return fresh


def cut_document(paragraphs: list[str]) -> Iterator[str]:
    """Documents of about MAX_DOCUMENT_CHARS at most, cut between paragraphs; short remainders are dropped."""
    document = ""
    for paragraph in paragraphs:
        if len(document) + len(paragraph) >= MAX_DOCUMENT_CHARS:
            if len(document) >= MIN_DOCUMENT_CHARS:
                yield document
            document = ""
        document = f"{document} {paragraph}".strip()
    if len(document) >= MIN_DOCUMENT_CHARS:
        yield document


def split_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(validation, training): the first documents of moderate length, until they hold this fraction of the text."""
    wanted, held = fraction * sum(map(len, documents)), 0
    val: list[str] = []
    train: list[str] = []
    for document in documents:
        to_val = len(document) <= MAX_VAL_DOCUMENT_CHARS and held < wanted
        held += len(document) * to_val
        (val if to_val else train).append(document)
    return val, train


def training_sentences(documents: Iterable[str]) -> Iterator[str]:
    """The documents in pieces of whole words that tokenizer training does not skip for their length."""
    for document in documents:
        sentence = ""
        for word in document.split():
            if len(f"{sentence} {word}".encode()) > shards.MAX_SENTENCE_BYTES // 4:
                yield sentence
                sentence = ""
            sentence = f"{sentence} {word}".strip()
        yield sentence


if __name__ == "__main__":
    shards.run_command(main)
