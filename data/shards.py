"""The shard format of the challenge: the one place in data/ that reads and writes it, and that trains tokenizers.

A shard is 256 little-endian int32 header words (20240520, 1, number of tokens, zeros), then that many little-endian
uint16 ids. Names are fineweb_train_000000.bin, fineweb_val_000000.bin and, for the byte side-car of CaseOps data,
fineweb_val_bytes_000000.bin. A document is BOS followed by its pieces, without EOS; documents run on from one shard
into the next of the same split.

Every file is written under a temporary name and renamed at the end, so that a partial file is never used as complete.
"""

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import sentencepiece

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
SHARD_TOKENS = 100_000_000  # tokens in a full shard of the challenge: 200,001,024 bytes
BOS_ID = 1
SPLITS = ("train", "val", "val_bytes")
TEMPORARY = ".part"  # suffix of a file or folder that is still being written
# SentencePiece silently leaves longer texts out of tokenizer training; the challenge keeps this default.
MAX_SENTENCE_BYTES = 4192


class DataError(ValueError):
    """Bad input from the user: one line that names the place, what was found, what was expected and the fix."""

    def __init__(self, place: object, found: object, expected: object, fix: str):
        super().__init__(str(place), str(found), str(expected), fix)  # as args, so that it travels between processes

    def __str__(self) -> str:
        place, found, expected, fix = self.args
        return f"{place}: found {found}; expected {expected}; fix: {fix}"


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line entry point; bad input becomes one line on standard error and exit status 2."""
    try:
        main()
    except DataError as error:
        sys.exit(_one_line("error", error))
    except OSError as error:  # disk full, no permission, no network
        sys.exit(_one_line("error", error))
    except KeyboardInterrupt:
        sys.exit(_one_line("interrupted", "what was complete is kept; run the same command again"))


def _one_line(kind: str, message: object) -> int:
    print(f"{kind}: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------------------------------
# Names


def shard_path(folder: Path, split: str, index: int) -> Path:
    assert split in SPLITS, split
    return Path(folder) / f"fineweb_{split}_{index:06d}.bin"


def list_shards(folder: Path, split: str) -> list[Path]:
    """The shards of one split in order, possibly none.

    The side-car is not listed as a token shard: a digit must follow `val_`.
    Raises DataError when the folder is missing or the numbers are not 0, 1, 2, ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            folder, "no such folder", "a folder with shards", "check the path, or make it with data/download.py"
        )
    shards = sorted(path for path in folder.iterdir() if re.fullmatch(rf"fineweb_{split}_\d{{6}}\.bin", path.name))
    for index, path in enumerate(shards):
        if path != shard_path(folder, split, index):
            raise DataError(
                folder,
                f"{path.name} in place {index}",
                shard_path(folder, split, index).name,
                "the numbering has a gap: fetch or export the folder again",
            )
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """Memory-map one shard after checking it.

    Returns the tokens, (n,) uint16, read-only. With vocab_size, every id is read once and checked against it.
    Raises DataError for a missing or truncated file, for one that is no shard (an HTML page, a Git LFS pointer) and for
    ids out of range.
    """
    path = Path(path)
    num_tokens = check_header(path)
    if num_tokens == 0:
        return np.zeros(0, np.uint16)
    tokens = np.memmap(path, np.dtype("<u2"), "r", HEADER_BYTES, (num_tokens,))
    if vocab_size is not None and (largest := int(tokens.max())) >= vocab_size:
        raise DataError(
            path,
            f"token id {largest}",
            f"ids below the vocabulary size {vocab_size}",
            "these shards belong to another tokenizer: use the one they were exported with",
        )
    return tokens


def check_header(path: Path) -> int:
    """Number of tokens of a shard whose header and file size agree; raises DataError otherwise."""
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "no such file", "a shard", "fetch it with data/download.py")
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    size = path.stat().st_size
    words = np.frombuffer(head[: len(head) // 4 * 4], "<i4")
    if len(words) < 3 or words[0] != MAGIC:
        raise DataError(
            path,
            f"first bytes {head[:40]!r}{_what_it_is(head)}",
            f"a shard beginning with {MAGIC}",
            "delete the file and fetch it again",
        )
    if words[1] != VERSION:
        raise DataError(path, f"shard version {words[1]}", VERSION, "use shards of version 1")
    num_tokens = int(words[2])
    expected = HEADER_BYTES + 2 * num_tokens
    if num_tokens < 0 or size != expected:
        raise DataError(
            path,
            f"{size:,} bytes",
            f"{expected:,} bytes for the {num_tokens:,} tokens of its header",
            "the file is damaged or cut short: delete it and fetch it again",
        )
    return num_tokens


def _what_it_is(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return " (a Git LFS pointer, not the data)"
    if head.lstrip()[:1] == b"<":
        return " (a web page, not the data)"
    return ""


def read_split(folder: Path, split: str, vocab_size: int | None = None) -> np.ndarray:
    """All tokens of one split as one (n,) uint16 array; raises DataError when there is no shard of it.

    One shard stays memory-mapped; several are copied into memory, so this is for validation splits.
    """
    shards = [read_shard(path, vocab_size) for path in require_shards(folder, split)]
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def require_shards(folder: Path, split: str) -> list[Path]:
    """list_shards, but at least one; raises DataError otherwise."""
    shards = list_shards(folder, split)
    if not shards:
        raise DataError(folder, f"no fineweb_{split}_*.bin", "at least one", "fetch or export the folder again")
    return shards


# ---------------------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one split as a sequence of shards, cutting the stream every `shard_tokens` tokens.

    Memory does not grow with the stream. `close` finishes the last, short shard; an unfinished shard has a temporary
    name.
    An empty split leaves no file.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.num_tokens = 0  # over all shards
        self.paths: list[Path] = []
        self._file: io.BufferedWriter | None = None
        self._in_shard = 0

    def append(self, tokens: np.ndarray) -> None:
        """tokens: (n,) uint16."""
        assert tokens.dtype == np.uint16 and tokens.ndim == 1, (tokens.dtype, tokens.shape)
        while len(tokens):
            if self._file is None:
                self._begin_shard()
            part = tokens[: self.shard_tokens - self._in_shard]
            self._file.write(part.astype("<u2", copy=False).tobytes())
            self._in_shard += len(part)
            self.num_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._in_shard == self.shard_tokens:
                self._finish_shard()

    def close(self) -> list[Path]:
        if self._file is not None:
            self._finish_shard()
        return self.paths

    def _begin_shard(self) -> None:
        path = shard_path(self.folder, self.split, len(self.paths))
        self._file = temporary(path).open("wb", buffering=1 << 20)
        self._file.write(bytes(HEADER_BYTES))  # filled in when the number of tokens is known
        self._in_shard = 0

    def _finish_shard(self) -> None:
        path = shard_path(self.folder, self.split, len(self.paths))
        self._file.seek(0)
        self._file.write(_header(self._in_shard))
        self._file.close()
        self._file = None
        os.replace(temporary(path), path)
        self.paths.append(path)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write one shard; tokens: (n,) uint16."""
    assert tokens.dtype == np.uint16, tokens.dtype
    write_file(path, _header(len(tokens)) + tokens.astype("<u2", copy=False).tobytes())


def _header(num_tokens: int) -> bytes:
    words = np.zeros(HEADER_WORDS, "<i4")
    words[:3] = MAGIC, VERSION, num_tokens
    return words.tobytes()


def temporary(path: Path) -> Path:
    return Path(f"{path}{TEMPORARY}")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary(path).write_bytes(content)
    os.replace(temporary(path), path)


def write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON object from a file; raises DataError when it is not one."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            path, f"{type(error).__name__}: {error}", "a JSON object", "delete the file and make it again"
        ) from error
    if not isinstance(value, dict):
        raise DataError(path, type(value).__name__, "a JSON object", "delete the file and make it again")
    return value


def read_record(folder: Path) -> dict:
    """What is known about a folder of shards: SOURCE.json of a download, manifest.json of an export, or nothing."""
    for name in ("SOURCE.json", "manifest.json"):
        if (Path(folder) / name).is_file():
            return read_json(Path(folder) / name)
    return {}


def find_tokenizer(folder: Path, record: dict) -> Path:
    """The tokenizer that the record of a folder names; raises DataError when it names none."""
    if "tokenizer" not in record:
        raise DataError(folder, "no SOURCE.json or manifest.json that names the tokenizer", "one", "give --tokenizer")
    return Path(folder) / record["tokenizer"]


def file_sha256(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path, control_pieces: tuple[str, ...] = ()) -> None:
    """Train a SentencePiece BPE model with the challenge's settings and write it to `path`.

    texts: documents; those over 4,192 UTF-8 bytes are ignored by the library (its default, which the challenge keeps).
    control_pieces: user-defined pieces, which take the ids from 4 on (CaseOps).
    One thread and no shuffling: the same texts give the same file, byte for byte.
    Raises DataError when the texts do not support vocab_size pieces.
    """
    model = io.BytesIO()
    fix = "choose another vocabulary size, or give more text"
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_texts(texts), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            character_coverage=0.999, byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, pad_id=0, bos_id=BOS_ID, eos_id=2, unk_id=3, hard_vocab_limit=False,
            user_defined_symbols=list(control_pieces), num_threads=1, shuffle_input_sentence=False,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:  # the library's message names its own source line, then the reason
        raise DataError(path, f"tokenizer training failed: {error}", f"{vocab_size} pieces", fix) from error
    made = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if made != vocab_size:
        raise DataError(path, f"text enough for {made} pieces only", f"{vocab_size} pieces", fix)
    write_file(path, model.getvalue())


def _training_texts(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        if text := text.replace("\0", " ").strip():
            yield text


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The tokenizer; raises DataError when the file is missing, damaged, or does not have BOS at id 1."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            path, "no such file", "a SentencePiece model", "check the path, or fetch it with data/download.py"
        )
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(
            path, "not a SentencePiece model", "a .model file", "delete the file and fetch it again"
        ) from error
    if tokenizer.bos_id() != BOS_ID:
        raise DataError(path, f"BOS id {tokenizer.bos_id()}", f"BOS id {BOS_ID}", "use a tokenizer of the challenge")
    if tokenizer.vocab_size() > 1 << 16:
        raise DataError(
            path, f"{tokenizer.vocab_size()} pieces", "at most 65,536 (ids are uint16)", "use a smaller vocabulary"
        )
    return tokenizer
