"""Check a folder of shards against its records, the published figures, and the documents.

    python data/verify.py data/datasets/fineweb10B_sp8192 [--docs docs_selected.jsonl] [--train-docs 1000]

Without --docs: headers, numbering, token ids, recorded hashes and counts, side-car alignment, no validation document in
the training part, and the published totals where the folder is a published variant. With --docs also, for every
validation document and the first --train-docs training documents: the case transform can be undone, the tokens decode
to the text in the tokenizer's normal form (NFKC, folded white space), and the side-car adds up to the UTF-8 bytes of
the text less outer white space. Prints one line per check; the first failure ends with exit status 2.

Byte counts come from decoding, never from a table of bytes per token, so that such a table can be checked against them.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import caseops
import numpy as np
import sentencepiece
import shards
import variants
from documents import MAX_OVERLAP_FRAC, read_texts, split_documents, whole_documents
from shards import BOS_ID, DataError

DECODE_DOCUMENTS = 1000  # decoded at a time
SHOWN = 3  # examples printed per kind of difference


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove that a folder of shards is what it says it is.")
    parser.add_argument("folder", type=Path, help="datasets/NAME")
    parser.add_argument("--docs", type=Path, nargs="+", help="the document list it was made from")
    parser.add_argument(
        "--train-docs", type=int, default=1000, help="training documents to compare with --docs (default 1000)"
    )
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, when the folder does not name it")
    options = parser.parse_args()
    verify(options.folder, options.docs, options.train_docs, options.tokenizer)


def verify(
    folder: Path, docs: list[Path] | None = None, train_docs: int = 1000, tokenizer_path: Path | None = None
) -> None:
    """Run every check in turn; raises DataError at the first that fails."""
    folder = Path(folder)
    shards.require_shards(folder, "val")  # before anything else: names a wrong path
    record = shards.read_record(folder)
    tokenizer_path = tokenizer_path or shards.find_tokenizer(folder, record)
    tokenizer = shards.load_tokenizer(tokenizer_path)
    with_caseops = caseops.has_operators(tokenizer)
    check_recorded(folder, record, tokenizer, tokenizer_path)
    numbers = {split: check_split(folder, split, tokenizer.vocab_size()) for split in ("train", "val")}
    check_counts(folder, record, numbers)
    val = shards.read_split(folder, "val")
    pairs = mp3_pairs(folder, record, tokenizer)
    sidecar = check_sidecar(folder, val, tokenizer, pairs) if with_caseops else None
    check_overlap(folder)
    check_published(folder, record, val, sidecar, tokenizer)
    if docs is None:
        print("documents:not_given the case transform, the text of tokens and the bytes are not proven: add --docs")
    else:
        check_documents(folder, docs, train_docs, val, sidecar, tokenizer, pairs)
    print(f"verified:{folder}")


def mp3_pairs(
    folder: Path, record: dict, tokenizer: sentencepiece.SentencePieceProcessor
) -> caseops.MarkerPairs | None:
    is_mp3 = record.get("mp3", folder.name == variants.VARIANTS["mp3"].dataset)
    return caseops.MarkerPairs.of(tokenizer) if is_mp3 else None


# ---------------------------------------------------------------------------------------------------------------------
# The folder by itself


def check_recorded(
    folder: Path, record: dict, tokenizer: sentencepiece.SentencePieceProcessor, tokenizer_path: Path
) -> None:
    """Hashes and sizes that SOURCE.json or manifest.json state."""
    again = "fetch or export the folder again"
    if record.get("vocab_size", tokenizer.vocab_size()) != tokenizer.vocab_size():
        raise DataError(
            tokenizer_path, f"{tokenizer.vocab_size()} pieces", record["vocab_size"], "use the tokenizer of this data"
        )
    digest = shards.file_sha256(tokenizer_path)
    if record.get("tokenizer_sha256", digest) != digest:
        raise DataError(
            tokenizer_path, f"SHA-256 {digest}", record["tokenizer_sha256"], "use the tokenizer this data was made with"
        )
    for name, facts in record.get("files", {}).items():
        if not (folder / name).is_file():
            raise DataError(
                folder / name, "no such file", "a file that SOURCE.json lists", "run data/download.py again"
            )
        if facts["sha256"] and (found := shards.file_sha256(folder / name)) != facts["sha256"]:
            raise DataError(folder / name, f"SHA-256 {found}", facts["sha256"], again)
    present, files = "present" if record else "none", len(record.get("files", {}))
    print(f"record:{present} hashed_files:{files} tokenizer_sha256:{digest}")


def check_split(folder: Path, split: str, vocab_size: int) -> dict:
    """Headers, numbering, ids, first BOS, only the last shard short; returns {"tokens", "documents", "shards"}."""
    lengths, documents = [], 0
    for path in shards.require_shards(folder, split):
        tokens = shards.read_shard(path, vocab_size)
        if len(tokens) == 0:
            raise DataError(path, "no tokens", "at least one", "fetch or export the folder again")
        if not lengths and tokens[0] != BOS_ID:
            raise DataError(
                path, f"first token {tokens[0]}", f"BOS ({BOS_ID})", "export again, with BOS before every document"
            )
        if lengths and len(tokens) > lengths[0] or len(lengths) > 1 and lengths[-1] != lengths[0]:
            raise DataError(
                path,
                f"shard lengths {lengths + [len(tokens)]}",
                "equal ones, the last may be shorter",
                "fetch or export the folder again",
            )
        lengths.append(len(tokens))
        documents += int(np.count_nonzero(tokens == BOS_ID))
    print(f"split:{split} shards:{len(lengths)} tokens:{sum(lengths)} documents:{documents} ids_below:{vocab_size}")
    return {"tokens": sum(lengths), "documents": documents, "shards": len(lengths)}


def check_counts(folder: Path, record: dict, numbers: dict) -> None:
    for split, expected in record.get("splits", {}).items():
        for key, found in numbers[split].items():
            if expected.get(key, found) != found:
                raise DataError(
                    f"{folder}: {split} {key}",
                    found,
                    expected[key],
                    "files were added, lost or changed: export the folder again",
                )


def check_sidecar(folder: Path, val: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor,
                  pairs: caseops.MarkerPairs | None) -> np.ndarray:  # fmt: skip
    """The side-car has an entry per validation token, and gives no bytes to BOS and to operators."""
    sidecar = shards.read_split(folder, "val_bytes")
    if len(sidecar) != len(val):
        raise DataError(
            f"{folder}: fineweb_val_bytes_*.bin",
            f"{len(sidecar)} entries",
            f"{len(val)}, one per validation token",
            "fetch or export the folder again: this side-car belongs to other shards",
        )
    escape = tokenizer.piece_to_id(caseops.ESCAPE)
    after_escape = np.concatenate([[False], val[:-1] == escape])  # may be literal text of 3 bytes
    operators = [tokenizer.piece_to_id(operator) for operator in caseops.OPERATORS]
    weightless = (val == BOS_ID) | np.isin(val, operators) & ~after_escape
    if (wrong := np.flatnonzero(weightless & (sidecar != 0))).size:
        raise DataError(f"{folder}: side-car entry {wrong[0]}", f"{sidecar[wrong[0]]} bytes for token {val[wrong[0]]}",
                        "0 for BOS and operators", "export the folder again")  # fmt: skip
    fused = 0 if pairs is None else np.count_nonzero(np.isin(val, pairs.aliases))
    found = f"operators:{np.isin(val, operators).sum()} fused_markers:{fused}"
    print(f"sidecar:aligned bytes:{sidecar.sum(dtype=np.int64)} {found}")
    return sidecar


def check_overlap(folder: Path) -> None:
    """No validation document is also in the training part, except for a few natural duplicates."""
    val = np.concatenate([hashes for hashes in document_hashes(folder, "val")])
    again = np.zeros(len(val), bool)
    for hashes in document_hashes(folder, "train"):
        again |= np.isin(val, hashes)
    allowed = int(MAX_OVERLAP_FRAC * len(val))
    print(f"overlap:{again.sum()} validation_documents_in_training allowed:{allowed}")
    if again.sum() > allowed:
        raise DataError(
            folder,
            f"{again.sum()} of {len(val)} validation documents in the training shards",
            f"at most {allowed}",
            "the two splits were cut from the list at different places: export both again in one run",
        )


def document_hashes(folder: Path, split: str) -> Iterator[np.ndarray]:
    """Yield 64-bit hashes of the split's documents, (documents,) uint64, a chunk of the stream at a time.

    A document is hashed by its ids: sum of random[id] * odd ** position, modulo 2 ** 64.
    """
    random = np.random.default_rng(0).integers(0, 1 << 64, 1 << 16, np.uint64, endpoint=False)
    multiplier = np.uint64(0x9E3779B97F4A7C15)
    powers = np.ones(1, np.uint64)
    for tokens in whole_documents(folder, split):
        starts = np.flatnonzero(tokens == BOS_ID)
        lengths = np.diff(starts, append=len(tokens))
        if lengths.max() > len(powers):
            powers = np.concatenate([[np.uint64(1)], np.cumprod(np.full(lengths.max(), multiplier), dtype=np.uint64)])
        positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
        yield np.add.reduceat(random[tokens] * powers[positions], starts)


# ---------------------------------------------------------------------------------------------------------------------
# Against what is published


def check_published(folder: Path, record: dict, val: np.ndarray, sidecar: np.ndarray | None,
                    tokenizer: sentencepiece.SentencePieceProcessor) -> None:  # fmt: skip
    """Documents, targets and bytes of the validation split, where the folder is a published variant."""
    name = variants.ALIASES.get(folder.name) if "variant" not in record else record["variant"]
    if name is None:
        print(f"published:no {folder.name} is not a published variant")
        return
    variant = variants.VARIANTS[name]
    documents = int(np.count_nonzero(val == BOS_ID))
    targets = (len(val) - 1) // variant.block * variant.block
    if (documents, targets) != (variants.VAL_DOCUMENTS, variant.val_targets):
        raise DataError(folder, f"{documents:,} validation documents and {targets:,} targets",
                        f"{variants.VAL_DOCUMENTS:,} and {variant.val_targets:,} for {name}",
                        "the split is cut or is another one: fetch it again, or rename the folder")  # fmt: skip
    if sidecar is None:
        num_bytes = sum(document_bytes(val[: targets + 1], tokenizer))
        tolerance = variant.val_bytes_tolerance + 3  # the cut may fall inside a character, which then decodes to U+FFFD
    else:
        num_bytes, tolerance = int(sidecar[1 : targets + 1].sum(dtype=np.int64)), variant.val_bytes_tolerance
        full = int(sidecar.sum(dtype=np.int64))
        if abs(full - variant.val_bytes_full) > 2:
            raise DataError(
                folder,
                f"{full:,} bytes of validation text",
                f"{variant.val_bytes_full:,} +- 2",
                "fetch the side-car again",
            )
    if abs(num_bytes - variant.val_bytes) > tolerance:
        raise DataError(folder, f"{num_bytes:,} bytes in {targets:,} targets", f"{variant.val_bytes:,} +- {tolerance}",
                        "fetch the validation shards again")  # fmt: skip
    print(f"published:{name} documents:{documents} targets:{targets} bytes:{num_bytes}")


def document_bytes(tokens: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor) -> list[int]:
    """UTF-8 bytes of each document of a stream that begins with BOS, by decoding it.

    This is what a table of bytes per token must add up to, document by document, with 0 for BOS.
    """
    return [len(text.encode()) for text in decoded_texts(split_documents(tokens), tokenizer)]


def decoded_texts(documents: list[np.ndarray], tokenizer: sentencepiece.SentencePieceProcessor) -> Iterator[str]:
    """The text of each document, (n,) uint16 with its BOS. A tokenizer without a piece for a single blank encodes it as
    the three bytes of its blank marker. Texts do not contain the marker, so it is decoded as a blank."""
    for begin in range(0, len(documents), DECODE_DOCUMENTS):
        ids = [document[1:].tolist() for document in documents[begin : begin + DECODE_DOCUMENTS]]
        yield from (text.replace("▁", " ") for text in tokenizer.decode(ids, num_threads=1))


# ---------------------------------------------------------------------------------------------------------------------
# Against the documents


def check_documents(
    folder: Path,
    docs: list[Path],
    train_docs: int,
    val: np.ndarray,
    sidecar: np.ndarray | None,
    tokenizer: sentencepiece.SentencePieceProcessor,
    pairs: caseops.MarkerPairs | None,
) -> None:
    """Compare shards and list, document by document; raises DataError at the end when anything differs."""
    texts = read_texts(docs)
    val_documents = split_documents(val)
    starts = np.cumsum([0] + [len(document) for document in val_documents])
    differences = Differences()
    with_caseops = sidecar is not None
    compared = zip(texts_for(texts, len(val_documents)), decode_all(val_documents, tokenizer, pairs), strict=True)
    for number, (text, decoded) in enumerate(compared):
        differences.compare(f"validation document {number}", text, decoded, tokenizer, with_caseops)
        if with_caseops:
            differences.compare_bytes(
                f"validation document {number}", text, sidecar[starts[number] : starts[number + 1]], tokenizer
            )
        else:
            differences.text_bytes += len(text.encode())
            differences.scored_bytes += len(decoded.encode())
    train_documents = list(islice(stream_documents(folder, "train"), train_docs))
    compared = zip(texts_for(texts, len(train_documents)), decode_all(train_documents, tokenizer, pairs), strict=True)
    for number, (text, decoded) in enumerate(compared):
        differences.compare(f"training document {number}", text, decoded, tokenizer, with_caseops)
    differences.report(folder, len(val_documents), len(train_documents))


def texts_for(texts: Iterator[str], count: int) -> list[str]:
    """The next `count` documents of the list; raises DataError when it ends before."""
    chosen = list(islice(texts, count))
    if len(chosen) < count:
        raise DataError(
            "--docs",
            f"a list that ends {count - len(chosen)} documents too early",
            "the list the shards were made from",
            "give the whole list",
        )
    return chosen


def stream_documents(folder: Path, split: str) -> Iterator[np.ndarray]:
    for chunk in whole_documents(folder, split):
        yield from split_documents(chunk)


def decode_all(documents: list[np.ndarray], tokenizer: sentencepiece.SentencePieceProcessor,
               pairs: caseops.MarkerPairs | None) -> Iterator[str]:  # fmt: skip
    return decoded_texts(documents if pairs is None else [pairs.expand(document) for document in documents], tokenizer)


class Differences:
    """Counts and shows documents whose tokens or bytes do not fit their text."""

    def __init__(self) -> None:
        self.counts = {"case_transform": 0, "decoded_text": 0, "sidecar_bytes": 0}
        self.outer_characters = 0  # documents whose outer white space is not all white space to Python
        self.text_bytes = self.scored_bytes = 0  # of the validation documents

    def compare(self, place: str, text: str, decoded: str, tokenizer: sentencepiece.SentencePieceProcessor,
                with_caseops: bool) -> None:  # fmt: skip
        """decoded: what the document's tokens decode to, still transformed for CaseOps data."""
        if with_caseops:
            transformed = caseops.encode(text)
            if caseops.decode(transformed) != text:
                self._found("case_transform", place, caseops.decode(transformed), text)
        else:
            transformed = text
        normal = tokenizer.normalize(transformed).replace("▁", " ")
        if decoded != normal:
            self._found("decoded_text", place, decoded, normal)

    def compare_bytes(
        self, place: str, text: str, sidecar: np.ndarray, tokenizer: sentencepiece.SentencePieceProcessor
    ) -> None:
        """The side-car counts every byte of the text but those of outer white space, as the tokenizer sees it."""
        found, stripped = int(sidecar.sum(dtype=np.int64)), strip_as_tokenizer(text, tokenizer)
        self.outer_characters += stripped != text.strip()
        self.text_bytes += len(text.encode())
        self.scored_bytes += found
        if found != len(stripped.encode()):
            self._found("sidecar_bytes", place, str(found), str(len(stripped.encode())))

    def _found(self, kind: str, place: str, found: str, expected: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            at = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            print(f"difference:{kind} {place} character {at}: found {found[max(0, at - 20) : at + 20]!r} "
                  f"expected {expected[max(0, at - 20) : at + 20]!r}")  # fmt: skip

    def report(self, folder: Path, num_val: int, num_train: int) -> None:
        print(f"documents:compared val:{num_val} train:{num_train} "
              f"text_bytes:{self.text_bytes} scored_bytes:{self.scored_bytes} "
              f"bytes_lost_frac:{1 - self.scored_bytes / max(self.text_bytes, 1):.6f} "
              + " ".join(f"{kind}_differences:{count}" for kind, count in self.counts.items())
              + f" outer_characters_that_only_the_tokenizer_strips:{self.outer_characters}")  # fmt: skip
        if any(self.counts.values()):
            raise DataError(
                folder,
                f"differences {self.counts}",
                "none",
                "give the list the shards were made from, or export the folder again",
            )


def strip_as_tokenizer(text: str, tokenizer: sentencepiece.SentencePieceProcessor) -> str:
    """The part of the text that its tokens cover: without the characters at its ends that the tokenizer's normalisation
    turns into blanks or removes. Removed characters directly after the last visible one belong to that part."""

    def is_invisible(character: str) -> bool:
        return not tokenizer.normalize(character).strip("▁")

    def is_dropped(character: str) -> bool:
        return tokenizer.normalize(f"a{character}b") == "ab"

    begin, end = 0, len(text)
    while begin < end and is_invisible(text[begin]):
        begin += 1
    while begin < end and is_invisible(text[end - 1]):
        end -= 1
    while begin < end < len(text) and is_dropped(text[end]):
        end += 1
    return text[begin:end]


if __name__ == "__main__":
    shards.run_command(main)
