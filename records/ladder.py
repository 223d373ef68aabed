#!/usr/bin/env python3
"""Measures presets against each other at a small common scale: equal text, equal budget, one table, one picture.

    python records/ladder.py prepare --docs TRAIN.jsonl.xz --val-docs VAL.jsonl.xz --tokenizers DIR --out DATA
    python records/ladder.py run --data DATA --out RUNS --presets baseline,pr1941 --seeds 1,2,3 --seconds 60 --jobs 2
    python records/ladder.py report --runs RUNS --table ladder.md --picture ladder.png

prepare exports the same documents with every tokenizer that a preset needs. run starts train_gpt.py once per preset and
seed, with the preset's own settings scaled down by `scaled`; a run that is there already is skipped. report reads what
the runs have written. What the published systems reach on eight H100s is not measured here, only how their designs
order themselves where everything is small; learning rates are the published ones, for no width in particular.

Exit status: 0 done, 1 a run failed, 2 a mistake in the arguments or files.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import caseops
import documents
import export
import shards
import variants

import train_gpt as tg

DATA_FILE, RUN_FILE = "ladder.json", "ladder.json"  # what prepare and run leave in their folders
DOCUMENTS_FILE = "documents.jsonl"
DATA_VARIANTS = ("sp1024", "sp8192", "caseops")  # rows of variants.VARIANTS; each becomes a folder of this name

# ---------------------------------------------------------------------------------------------------------------------
# Data: the same documents in every tokenizer


class Take(NamedTuple):
    """Whole documents from the head of a list."""

    lines: list[bytes]  # JSON lines as they are
    text_bytes: int  # UTF-8
    sha256: str  # of the texts, each followed by a line feed
    left_out: int  # documents that were skipped


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Exports one document list with each tokenizer; returns what ladder.json in the folder says about it.

    Validation takes only documents that every tokenizer keeps as they are, because a document that is normalised has
    other bytes under each byte rule, and bits per byte would divide by different numbers.
    Raises shards.DataError for unusable input, also when the variants do not count the same bytes in the end.
    """
    models = {name: options.tokenizers / variants.VARIANTS[name].tokenizer for name in DATA_VARIANTS}
    loaded = {name: shards.load_tokenizer(path) for name, path in models.items()}
    val = take(options.val_docs, 1000 * options.val_kb, lambda text: keeps_text(text, loaded))
    train = take(options.docs, 1_000_000 * options.train_mb)
    with export.new_folder(options.out) as folder:
        path = folder / DOCUMENTS_FILE
        path.write_bytes(b"".join(line.rstrip(b"\n") + b"\n" for line in [*val.lines, *train.lines]))
        summary = {"train": described(train, options.docs), "val": described(val, options.val_docs)}
        summary |= {"documents_sha256": shards.file_sha256(path), "variants": {}}
        for name in DATA_VARIANTS:
            summary["variants"][name] = export_variant(name, path, folder / name, models[name], len(val.lines))
        counted = {name: row["val_bytes"] for name, row in summary["variants"].items()}
        if set(counted.values()) != {val.text_bytes}:
            raise shards.DataError(
                options.val_docs, f"scored bytes {counted}", f"{val.text_bytes} in all of them", "leave odd documents out"
            )
        shards.write_json(folder / DATA_FILE, summary)
    return summary


def take(path: Path, limit_bytes: float, wanted: Any = lambda text: True) -> Take:
    """The first documents that are wanted, until their texts have `limit_bytes` or more; raises DataError for too few."""
    lines, size, digest, left_out = [], 0, hashlib.sha256(), 0
    for place, line in documents.read_lines([path]):
        text = documents.parse_line(place, line)
        if not wanted(text):
            left_out += 1
            continue
        lines.append(line)
        size += len(text.encode())
        digest.update(text.encode() + b"\n")
        if size >= limit_bytes:
            return Take(lines, size, digest.hexdigest(), left_out)
    raise shards.DataError(path, f"{size} bytes of usable text", f"{limit_bytes:.0f}", "ask for less, or give more")


def keeps_text(text: str, tokenizers: dict[str, Any]) -> bool:
    """Whether every tokenizer gives the text back exactly, so that all byte rules count its UTF-8 bytes."""
    for name, tokenizer in tokenizers.items():
        seen = caseops.encode(text) if variants.VARIANTS[name].caseops else text
        if tokenizer.decode(tokenizer.encode(seen)) != seen:
            return False
    return text == text.strip()


def described(part: Take, path: Path) -> dict[str, Any]:
    return {"file": path.name, "documents": len(part.lines), "left_out": part.left_out,
            "text_bytes": part.text_bytes, "text_sha256": part.sha256}  # fmt: skip


def export_variant(name: str, path: Path, out: Path, model: Path, val_documents: int) -> dict[str, Any]:
    """Shards of one variant, and its sizes as train_gpt.py counts them."""
    with_caseops = variants.VARIANTS[name].caseops
    manifest = export.export(export.Options([path], out, val_documents, tokenizer=model, caseops=with_caseops))
    env = {"DATA_PATH": str(out), "TOKENIZER_PATH": str(out / export.TOKENIZER_FILE)}
    validation = tg.load_validation(tg.load_config(env | {"VOCAB_SIZE": str(manifest["vocab_size"])})[0])
    return {
        "tokenizer": model.name,
        "tokenizer_sha256": manifest["tokenizer_sha256"],
        "train_tokens": manifest["splits"]["train"]["tokens"],
        "val_tokens": manifest["splits"]["val"]["tokens"],
        "val_documents": len(validation.documents),
        "val_bytes": int(validation.bytes.sum()),
    }

if __name__ == "__main__":
    p=argparse.ArgumentParser();
    for n in ("docs","val_docs","tokenizers","out"): p.add_argument("--"+n.replace("_","-"),type=Path)
    p.add_argument("--train-mb",type=float,default=24);p.add_argument("--val-kb",type=float,default=220)
    print(json.dumps(prepare(p.parse_args()),indent=1))
