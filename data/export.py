"""Turn a document list into shards: tokenize in parallel, write in order.

    python data/export.py --docs docs_selected.jsonl --tokenizer fineweb_8192_bpe.model --out data/datasets/my_sp8192 \\
        --val-docs 50000 [--caseops] [--mp3] [--workers 8]

The first --val-docs documents are the validation split, the rest is training, both in the order of the list. The folder
gets its name when everything is in it: shards, the tokenizer (tokenizer.model), the byte side-car of CaseOps data, and
manifest.json. The result is the same, byte for byte, for any number of workers.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import caseops
import numpy as np
import shards
import variants
from documents import MAX_OVERLAP_FRAC, Batch, Encoded, encode_batch, parse_line, read_batches, read_lines
from shards import DataError

TOKENIZER_FILE = "tokenizer.model"
BATCHES_AHEAD = 3  # per worker: limits memory for any length of the list
PROGRESS_S = 10.0


@dataclass(frozen=True)
class Options:
    docs: list[Path]
    out: Path
    val_docs: int
    tokenizer: Path | None = None
    train_tokenizer: int | None = None  # vocabulary size
    tokenizer_docs: int = 100_000
    caseops: bool = False
    mp3: bool = False
    workers: int = 1
    shard_tokens: int = shards.SHARD_TOKENS
    max_train_shards: int | None = None


def main() -> None:
    options = parse_options(sys.argv[1:])
    if options.val_docs != variants.VAL_DOCUMENTS:
        split = f"the first {variants.VAL_DOCUMENTS} documents"
        print(f"warning:val_docs:{options.val_docs} the challenge's validation split is {split}")
    started = time.perf_counter()
    manifest = export(options)
    seconds = time.perf_counter() - started
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    text_bytes = sum(split["text_bytes"] for split in manifest["splits"].values())
    documents = sum(split["documents"] for split in manifest["splits"].values())
    print(f"exported:{options.out} documents:{documents} tokens:{tokens} "
          f"text_bytes:{text_bytes} bytes_per_token:{text_bytes / tokens:.3f} val_docs:{options.val_docs} "
          f"overlapping_documents:{manifest['overlapping_documents']}")  # fmt: skip
    print(f"seconds:{seconds:.1f} workers:{options.workers} tokens_per_s:{tokens / seconds:.0f} "
          f"tokens_per_s_per_worker:{tokens / seconds / options.workers:.0f}")  # fmt: skip
    if options.caseops:
        differences = manifest["sidecar_differences"]
        print(f"sidecar_bytes:{manifest['sidecar_bytes']} documents_with_sidecar_differences:{differences}")


def parse_options(arguments: list[str]) -> Options:
    """Raises DataError for numbers out of range."""
    parser = argparse.ArgumentParser(description="Turn a document list into shards.")
    parser.add_argument(
        "--docs", type=Path, nargs="+", required=True, help="JSON lines with a key text: .jsonl, .xz, .gz or .zst"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty or missing")
    parser.add_argument(
        "--val-docs", type=int, required=True, help="validation = the first N documents (50000 for the challenge)"
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="SentencePiece model to use")
    tokenizer.add_argument(
        "--train-tokenizer", type=int, metavar="VOCAB", help="train one with VOCAB pieces on training documents"
    )
    parser.add_argument(
        "--tokenizer-docs", type=int, default=Options.tokenizer_docs, help="documents to train it on (default 100000)"
    )
    parser.add_argument("--caseops", action="store_true", help="lossless case transform and byte side-car")
    parser.add_argument("--mp3", action="store_true", help="CaseOps with the space fused into the operator after it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument(
        "--shard-tokens", type=int, default=shards.SHARD_TOKENS, help="tokens per shard (default 100,000,000)"
    )
    parser.add_argument("--max-train-shards", type=int, help="stop after so many training shards")
    values = vars(parser.parse_args(arguments))
    values["caseops"] |= values["mp3"]
    options = Options(**values)
    for key in ("val_docs", "workers", "shard_tokens", "tokenizer_docs", "max_train_shards"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise DataError(f"--{key.replace('_', '-')}", value, "1 or more", "give a positive number")
    if options.train_tokenizer is not None and not 512 <= options.train_tokenizer <= 65536:
        raise DataError(
            "--train-tokenizer", options.train_tokenizer, "512 to 65536", "the challenge uses 1024, 4096 and 8192"
        )
    return options


def export(options: Options) -> dict:
    """Write the folder; returns its manifest. Raises DataError for bad input, and then leaves nothing behind."""
    for path in options.docs:
        if not path.is_file():
            raise DataError(path, "no such file", "a document list", "check --docs")
    with new_folder(options.out) as unfinished:
        return _export_into(unfinished, options)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into. It is renamed to `out` at the end of the block, or deleted when the block fails.

    Raises DataError unless `out` is missing or an empty folder, and no export to it is under way or left over.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            out,
            "a folder that is not empty" if out.is_dir() else "a file",
            "a new or empty folder",
            "choose another --out, or delete it: two exports never share a folder",
        )
    if shards.temporary(out).exists():
        raise DataError(
            shards.temporary(out),
            "another export to this folder, running or broken off",
            "none",
            "wait for it, or delete that folder",
        )
    unfinished = shards.temporary(out)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)  # replaces an empty folder
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _export_into(folder: Path, options: Options) -> dict:
    """Tokenizer, shards and manifest, the manifest last."""
    tokenizer_path = folder / TOKENIZER_FILE
    if options.tokenizer is not None:
        shards.load_tokenizer(options.tokenizer)  # names the user's path in errors
        shutil.copyfile(options.tokenizer, tokenizer_path)
    else:
        train_on_documents(options, tokenizer_path)
    tokenizer = shards.load_tokenizer(tokenizer_path)
    named = options.tokenizer or "the trained tokenizer"
    if options.caseops:
        caseops.require_operators(tokenizer, named)
    elif caseops.has_operators(tokenizer):
        raise DataError(
            named,
            "a CaseOps tokenizer",
            "a plain one: it encodes raw text badly",
            "add --caseops or choose another tokenizer",
        )
    if options.mp3:
        shards.write_json(folder / "alias_map.json", caseops.MarkerPairs.of(tokenizer).alias_map())
    splits, numbers, digest = write_splits(folder, tokenizer_path, options)
    manifest = {
        "docs": [path.name for path in options.docs],
        "docs_sha256": digest,  # of the lines that were used, uncompressed
        "tokenizer": TOKENIZER_FILE,
        "tokenizer_sha256": shards.file_sha256(tokenizer_path),
        "vocab_size": tokenizer.vocab_size(),
        "val_docs": options.val_docs,
        "caseops": options.caseops,
        "mp3": options.mp3,
        "shard_tokens": options.shard_tokens,
        "splits": splits,
        **numbers,
    }
    shards.write_json(folder / "manifest.json", manifest)
    return manifest


def train_on_documents(options: Options, path: Path) -> None:
    """Train the tokenizer on the first training documents, never on validation documents."""
    chosen = islice(read_lines(options.docs), options.val_docs, options.val_docs + options.tokenizer_docs)
    texts = (parse_line(place, line) for place, line in chosen)
    if options.caseops:
        texts = map(caseops.encode, texts)
    shards.train_tokenizer(texts, options.train_tokenizer, path, caseops.OPERATORS if options.caseops else ())


def write_splits(folder: Path, tokenizer_path: Path, options: Options) -> tuple[dict, dict, str]:
    """Write all shards; returns (numbers per split, numbers of the whole, hash of the lines read)."""
    digest = hashlib.sha256()
    names = ("val", "train", "val_bytes") if options.caseops else ("val", "train")
    writers = {name: shards.ShardWriter(folder, name, options.shard_tokens) for name in names}
    splits = {name: {"documents": 0, "text_bytes": 0} for name in ("val", "train")}
    overlap = Overlap(options.val_docs)
    numbers = {"sidecar_bytes": 0, "sidecar_differences": 0}
    train_limit = options.shard_tokens * options.max_train_shards if options.max_train_shards else None
    progress = Progress()
    for batch, encoded in encode_in_order(read_batches(options.docs, options.val_docs), tokenizer_path, options):
        for line in batch.lines:
            digest.update(line)
        splits[encoded.split]["text_bytes"] += encoded.text_bytes
        overlap.add(encoded)
        left = train_limit - writers["train"].num_tokens if train_limit and encoded.split == "train" else None
        tokens = encoded.tokens[:left]
        writers[encoded.split].append(tokens)
        splits[encoded.split]["documents"] += int(np.count_nonzero(tokens == shards.BOS_ID))  # the last one may be cut
        if encoded.sidecar is not None:
            writers["val_bytes"].append(encoded.sidecar)
            numbers["sidecar_bytes"] += int(encoded.sidecar.sum(dtype=np.int64))
            numbers["sidecar_differences"] += encoded.sidecar_differences
        progress.report(splits, writers)
        if train_limit and writers["train"].num_tokens >= train_limit:
            break
    if splits["val"]["documents"] < options.val_docs or splits["train"]["documents"] == 0:
        raise DataError(
            "--val-docs",
            f"{splits['val']['documents']} documents in the list",
            f"more than {options.val_docs}",
            "lower --val-docs, or give the whole list",
        )
    for name, writer in writers.items():
        files = [path.name for path in writer.close()]
        if name in splits:
            splits[name] |= {"tokens": writer.num_tokens, "shards": len(files)}
    numbers["overlapping_documents"] = overlap.count
    return splits, numbers if options.caseops else {"overlapping_documents": overlap.count}, digest.hexdigest()


class Overlap:
    """Counts validation documents that are also in the training part, by the hash of their text."""

    def __init__(self, val_docs: int):
        self.count = 0
        self._allowed = int(MAX_OVERLAP_FRAC * val_docs)
        self._val: list[np.ndarray] = []

    def add(self, encoded: Encoded) -> None:
        """Raises DataError as soon as there are too many."""
        if encoded.split == "val":
            self._val.append(encoded.hashes)
            return
        if len(self._val) > 1:
            self._val = [np.unique(np.concatenate(self._val))]
        self.count += int(np.isin(encoded.hashes, self._val[0]).sum())
        if self.count > self._allowed:
            raise DataError("--docs", f"{self.count} training documents that are also validation documents",
                            f"at most {self._allowed} ({MAX_OVERLAP_FRAC:.1%} of the validation documents)",
                            "remove duplicates from the list")  # fmt: skip


class Progress:
    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()

    def report(self, splits: dict, writers: dict) -> None:
        """One line to standard error every ten seconds."""
        now = time.perf_counter()
        if now - self._last >= PROGRESS_S:
            self._last = now
            tokens = writers["val"].num_tokens + writers["train"].num_tokens
            print(f"documents:{splits['val']['documents'] + splits['train']['documents']} tokens:{tokens} "
                  f"tokens_per_s:{tokens / (now - self._started):.0f}", file=sys.stderr)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Workers: each has its own tokenizer; results come back in the order of the batches.


def encode_in_order(
    batches: Iterator[Batch], tokenizer_path: Path, options: Options
) -> Iterator[tuple[Batch, Encoded]]:
    """Yield (batch, what it became) in order; at most BATCHES_AHEAD batches per worker are in memory."""
    if options.workers == 1:
        _start_worker(tokenizer_path, options)
        for batch in batches:
            yield batch, _encode(batch)
        return
    pool = ProcessPoolExecutor(
        options.workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_path, options)
    )
    waiting = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) >= BATCHES_AHEAD * options.workers:
                batch, result = waiting.popleft()
                yield batch, result.result()
        for batch, result in waiting:
            yield batch, result.result()
    except BrokenProcessPool as error:
        raise DataError(
            "--workers", "a worker process that died", "all alive", "memory may be short: use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict = {}  # what a worker process keeps between batches


def _start_worker(tokenizer_path: Path, options: Options) -> None:
    _worker.update(tokenizer=shards.load_tokenizer(tokenizer_path), options=options)


def _encode(batch: Batch) -> Encoded:
    return encode_batch(batch, _worker["tokenizer"], _worker["options"].caseops, _worker["options"].mp3)


if __name__ == "__main__":
    shards.run_command(main)
