"""Make MP3 shards from CaseOps shards, without the document list.

    python data/fuse.py data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved \\
        --out data/datasets/fineweb10B_sp8192_caseops_marker_pair_v3

The space piece and the operator after it become one token (PR #2109), in one pass over the document stream: a pair that
a shard boundary separates is fused too, and the new shards are full. The result equals `data/export.py --mp3` on the
same documents.
"""

import argparse
import shutil
from pathlib import Path

import caseops
import numpy as np
import shards
from documents import whole_documents
from export import TOKENIZER_FILE, new_folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Make MP3 shards from CaseOps shards.")
    parser.add_argument("folder", type=Path, help="CaseOps shards with their side-car")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must be empty or missing")
    parser.add_argument("--tokenizer", type=Path, help="CaseOps model, when the folder does not name it")
    parser.add_argument(
        "--shard-tokens", type=int, default=shards.SHARD_TOKENS, help="tokens per shard (default 100,000,000)"
    )
    options = parser.parse_args()
    if options.shard_tokens < 1:
        raise shards.DataError("--shard-tokens", options.shard_tokens, "1 or more", "give a positive number")
    splits = fuse_folder(options.folder, options.out, options.tokenizer, options.shard_tokens)["splits"]
    for split, numbers in splits.items():
        print(f"fused:{split} tokens:{numbers['tokens']} of:{numbers['source_tokens']} "
              f"tokens_saved_frac:{1 - numbers['tokens'] / numbers['source_tokens']:.4f}")  # fmt: skip
    print(f"complete:{options.out}")


def fuse_folder(
    folder: Path, out: Path, tokenizer_path: Path | None = None, shard_tokens: int = shards.SHARD_TOKENS
) -> dict:
    """Write the MP3 folder; returns its manifest. Raises DataError for bad input, and then leaves nothing behind."""
    shards.require_shards(folder, "val")  # before anything else: names a wrong path
    record = shards.read_record(folder)
    tokenizer_path = tokenizer_path or shards.find_tokenizer(folder, record)
    tokenizer = shards.load_tokenizer(tokenizer_path)
    caseops.require_operators(tokenizer, tokenizer_path)
    pairs = caseops.MarkerPairs.of(tokenizer)
    with new_folder(out) as unfinished:
        shutil.copyfile(tokenizer_path, unfinished / TOKENIZER_FILE)
        shards.write_json(unfinished / "alias_map.json", pairs.alias_map())
        splits = {"val": fuse_validation(folder, unfinished, pairs, shard_tokens)}
        splits["train"] = fuse_training(folder, unfinished, pairs, shard_tokens)
        manifest = {
            "made_from": {
                key: record[key] for key in ("repository", "revision", "docs_sha256", "val_docs") if key in record
            },
            "tokenizer": TOKENIZER_FILE,
            "tokenizer_sha256": shards.file_sha256(tokenizer_path),
            "vocab_size": tokenizer.vocab_size(),
            "caseops": True,
            "mp3": True,
            "shard_tokens": shard_tokens,
            "splits": splits,
        }
        shards.write_json(unfinished / "manifest.json", manifest)
    return manifest


def fuse_validation(folder: Path, out: Path, pairs: caseops.MarkerPairs, shard_tokens: int) -> dict:
    """Tokens and side-car together; the sum of bytes must not change. Returns the numbers of the split."""
    tokens, sidecar = shards.read_split(folder, "val"), shards.read_split(folder, "val_bytes")
    if len(tokens) != len(sidecar):
        raise shards.DataError(
            f"{folder}: fineweb_val_bytes_*.bin",
            f"{len(sidecar)} entries",
            f"{len(tokens)}, one per validation token",
            "fetch or export the folder again",
        )
    fused, fused_sidecar = pairs.fuse(tokens, sidecar)
    assert fused_sidecar.sum(dtype=np.int64) == sidecar.sum(dtype=np.int64)
    for split, stream in (("val", fused), ("val_bytes", fused_sidecar)):
        writer = shards.ShardWriter(out, split, shard_tokens)
        writer.append(stream)
        files = writer.close()
    documents = int(np.count_nonzero(fused == shards.BOS_ID))
    return {"tokens": len(fused), "source_tokens": len(tokens), "documents": documents, "shards": len(files)}


def fuse_training(folder: Path, out: Path, pairs: caseops.MarkerPairs, shard_tokens: int) -> dict:
    """The training stream, some documents at a time. Returns the numbers of the split."""
    writer = shards.ShardWriter(out, "train", shard_tokens)
    source_tokens = documents = 0
    for tokens in whole_documents(folder, "train"):
        writer.append(pairs.fuse(tokens)[0])
        source_tokens += len(tokens)
        documents += int(np.count_nonzero(tokens == shards.BOS_ID))
    files = writer.close()
    return {"tokens": writer.num_tokens, "source_tokens": source_tokens, "documents": documents, "shards": len(files)}


if __name__ == "__main__":
    shards.run_command(main)
