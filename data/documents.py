"""Document lists: JSON lines with a key `text`, plain or compressed, read as a stream and turned into tokens.

The list of the challenge is 45 GiB, so nothing here holds more than a batch of documents.
"""

import gzip
import hashlib
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import caseops
import numpy as np
import sentencepiece
import shards
from shards import DataError

BATCH_BYTES = 1 << 20  # of JSON lines per batch: a fraction of a second of tokenizing
BATCH_DOCUMENTS = 1024
CHUNK_TOKENS = 4_000_000  # read at once when a split is streamed
# Largest fraction of the validation documents that may also be in the training part. Natural duplicates are rare.
MAX_OVERLAP_FRAC = 0.001

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_lines(paths: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line) for every non-empty line of the files in turn; place is "FILE line N".

    Raises DataError for a missing file, an unknown kind of file, and compressed data that are damaged or cut short.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(path, "no such file", "a document list", "check the path")
        try:
            with _open(path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path} line {number}", line
        except (lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
            raise _damaged(path, error) from error


def _open(path: Path) -> BinaryIO:
    """The uncompressed bytes of a list, by the end of its name."""
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".gz":
        return gzip.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    if path.suffix == ".jsonl":
        return path.open("rb", buffering=1 << 20)
    raise DataError(
        path,
        f"a file that ends in {path.suffix!r}",
        ".jsonl, .jsonl.xz, .jsonl.gz or .jsonl.zst",
        "rename or convert it",
    )


def _damaged(path: Path, error: object) -> DataError:
    return DataError(path, f"damaged or cut short ({error})", "whole compressed data", "fetch the file again")


class _ZstdStream(io.RawIOBase):
    """Reads a .zst file. Unlike the library's own reader, it notices a file that is cut off."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            fix = "pip install zstandard, or use .jsonl.xz"
            raise DataError(path, "no Python package zstandard", "it, to read .zst", fix) from error
        self._library, self._path, self._file, self._ready = zstandard, path, path.open("rb"), b""
        self._frame = None  # between frames

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer with the data available; 0 means the end of the file."""
        while not self._ready:
            packed = self._file.read(1 << 17)
            if not packed:
                if self._frame is not None:
                    raise _damaged(self._path, "end of file inside a frame")
                return 0
            self._ready = self._decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, packed: bytes) -> bytes:
        """Decompress what was read; a new frame may begin anywhere in it."""
        text = b""
        while packed:
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                text += self._frame.decompress(packed)
            except self._library.ZstdError as error:
                raise _damaged(self._path, error) from error
            packed = b""
            if self._frame.eof:
                packed, self._frame = self._frame.unused_data, None
        return text

    def close(self) -> None:
        self._file.close()
        super().close()


def parse_line(place: str, line: bytes) -> str:
    """The text of one JSON line; raises DataError naming the line."""
    try:
        document = json.loads(line)
    except ValueError as error:
        raise DataError(
            place, f"{line[:60]!r} ({error})", 'a JSON object with a key "text"', "repair or remove the line"
        ) from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise DataError(
            place, f"{line[:60]!r}", 'a JSON object whose key "text" holds a string', "repair or remove the line"
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                place, f"an unpaired surrogate ({error.reason})", "valid Unicode", "repair or remove the line"
            ) from error
    return text


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    for place, line in read_lines(paths):
        yield parse_line(place, line)


@dataclass
class Batch:
    """Consecutive lines of one split, not parsed yet."""

    split: str  # train or val
    places: list[str]
    lines: list[bytes]


def read_batches(paths: Iterable[Path], val_documents: int) -> Iterator[Batch]:
    """The list in batches: the first val_documents lines are validation, the rest is training, in order."""
    batch, size = Batch("val", [], []), 0
    for index, (place, line) in enumerate(read_lines(paths)):
        if size >= BATCH_BYTES or len(batch.lines) >= BATCH_DOCUMENTS or index == val_documents:
            yield batch
            batch, size = Batch("val" if index < val_documents else "train", [], []), 0
        batch.places.append(place)
        batch.lines.append(line)
        size += len(line)
    if batch.lines:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass
class Encoded:
    """What a batch of documents became; arrays, so that they travel cheaply between processes."""

    split: str
    tokens: np.ndarray  # (n,) uint16: BOS and pieces of each document
    sidecar: np.ndarray | None  # (n,) uint16: original bytes per token; validation of CaseOps data only
    hashes: np.ndarray  # (documents,) uint64
    text_bytes: int  # UTF-8 bytes of the documents
    sidecar_differences: int  # documents whose side-car does not add up to their bytes less outer white space


def encode_batch(
    batch: Batch, tokenizer: sentencepiece.SentencePieceProcessor, with_caseops: bool, mp3: bool
) -> Encoded:
    """Tokenize one batch on one core; raises DataError naming the line at fault."""
    texts = [parse_line(place, line) for place, line in zip(batch.places, batch.lines, strict=True)]
    raw = [text.encode() for text in texts]
    hashes = np.array([text_hash(text) for text in raw], np.uint64)
    encoded = Encoded(batch.split, np.zeros(0, np.uint16), None, hashes, sum(map(len, raw)), 0)
    if with_caseops and batch.split == "val":
        _encode_with_sidecar(encoded, batch.places, texts, caseops.encode_documents(raw), tokenizer)
    else:
        pieces = tokenizer.encode(
            caseops.encode_documents(raw) if with_caseops else raw, return_type="numpy", num_threads=1
        )
        encoded.tokens = join_documents(pieces)
    if mp3:
        try:
            encoded.tokens, encoded.sidecar = caseops.MarkerPairs.of(tokenizer).fuse(encoded.tokens, encoded.sidecar)
        except DataError as error:
            raise DataError(f"{batch.places[0]} to {batch.places[-1]}", *error.args[1:]) from error
    return encoded


def _encode_with_sidecar(encoded: Encoded, places: list[str], texts: list[str], transformed: list[bytes],
                         tokenizer: sentencepiece.SentencePieceProcessor) -> None:  # fmt: skip
    """Fill in tokens and side-car, and prove for every document that the transform can be undone."""
    tokens, sidecars = [], []
    for place, text, changed in zip(places, texts, transformed, strict=True):
        assert caseops.decode(changed.decode()) == text, f"{place}: the case transform is not reversible"
        try:
            ids, sidecar = caseops.encode_with_sidecar(tokenizer, changed)
        except DataError as error:
            raise DataError(place, *error.args[1:]) from error
        encoded.sidecar_differences += int(sidecar.sum(dtype=np.int64)) != len(text.strip().encode())
        tokens.append(ids)
        sidecars.append(sidecar)
    encoded.tokens, encoded.sidecar = join_documents(tokens), join_documents(sidecars, first=0)


def join_documents(documents: list[np.ndarray], first: int = shards.BOS_ID) -> np.ndarray:
    """One (n,) uint16 stream with `first` before every document."""
    head = np.array([first], np.uint16)
    return np.concatenate([part for document in documents for part in (head, document.astype(np.uint16))] or [head[:0]])


def text_hash(text: bytes) -> int:
    """A hash of 64 bits; equal for texts that differ only in white space, which the tokenizer folds."""
    return int.from_bytes(hashlib.blake2b(b" ".join(text.split()), digest_size=8).digest(), "little")


def split_documents(tokens: np.ndarray) -> list[np.ndarray]:
    """The documents of a stream, each with its BOS; raises AssertionError when the stream does not begin with one."""
    starts = np.flatnonzero(tokens == shards.BOS_ID)
    assert len(tokens) == 0 or (len(starts) and starts[0] == 0), "the stream does not begin with BOS"
    return np.split(tokens, starts[1:])


def whole_documents(folder: Path, split: str) -> Iterator[np.ndarray]:
    """The stream of a split, over all its shards, in chunks that end where a document ends.

    Raises DataError when the stream does not begin with BOS.
    """
    kept = np.zeros(0, np.uint16)
    for path in shards.require_shards(folder, split):
        shard = shards.read_shard(path)
        for begin in range(0, len(shard), CHUNK_TOKENS):
            kept = np.concatenate([kept, shard[begin : begin + CHUNK_TOKENS]])
            if kept[0] != shards.BOS_ID:
                raise DataError(
                    path,
                    f"first token {kept[0]}",
                    f"BOS ({shards.BOS_ID})",
                    "export again, with BOS before every document",
                )
            last = int(np.flatnonzero(kept == shards.BOS_ID)[-1])  # of a document that may go on
            if last:
                yield kept[:last]
                kept = kept[last:]
    yield kept
