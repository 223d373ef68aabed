"""Speed of the data tools, one `key:value` line per measurement. Not collected by pytest.

    python tests/bench_data.py [--docs LIST] [--tokenizer MODEL] [--caseops-tokenizer MODEL] [--documents 4000]

Without arguments: the embedded corpus's text and tokenizers trained on it. One process, but for the last comparison.
"""

import argparse
import filecmp
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

from test_data_helpers import write_documents

import caseops  # isort: skip
import documents  # isort: skip
import embedded  # isort: skip
import export  # isort: skip
import shards  # isort: skip
import verify  # isort: skip

VAL_DOCS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the data tools.")
    parser.add_argument("--docs", type=Path, help="document list (default: the embedded corpus)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: trained, 8192 pieces at most)")
    parser.add_argument("--caseops-tokenizer", type=Path, help="CaseOps model (default: trained)")
    parser.add_argument("--documents", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        texts = (
            list(islice(documents.read_texts([options.docs]), options.documents))
            if options.docs
            else embedded.collect_documents()
        )
        bench_caseops(texts)
        docs = write_documents(Path(folder) / "docs.jsonl", texts)
        plain = options.tokenizer or train(texts, Path(folder) / "plain.model", ())
        with_operators = options.caseops_tokenizer or train(texts, Path(folder) / "caseops.model", caseops.OPERATORS)
        for name, model, flags in (("plain", plain, {}), ("caseops", with_operators, {"caseops": True}),
                                   ("mp3", with_operators, {"caseops": True, "mp3": True})):  # fmt: skip
            bench_export(name, export.Options([docs], Path(folder) / name, VAL_DOCS, model, **flags))
            bench_verify(name, Path(folder) / name, docs, len(texts) - VAL_DOCS)
        compare_processes(
            export.Options([docs], Path(folder) / "two", VAL_DOCS, plain, workers=2), Path(folder) / "plain"
        )


def train(texts: list[str], path: Path, control_pieces: tuple[str, ...]) -> Path:
    transformed = map(caseops.encode, texts) if control_pieces else texts
    shards.train_tokenizer(embedded.training_sentences(transformed), 4096, path, control_pieces)
    return path


def bench_caseops(texts: list[str]) -> None:
    """The transform and its inverse on the text as it is, without capitals, in capitals, and with every other letter one."""
    as_is = [text.encode() for text in texts]
    alternating = [
        bytes(c - 32 if i % 2 and 97 <= c <= 122 else c for i, c in enumerate(text)) for text in as_is[:1000]
    ]
    kinds = {"as_it_is": as_is, "lower_case": [text.lower() for text in as_is], "upper_case": [text.upper() for text in as_is],
             "alternating": alternating}  # fmt: skip
    for kind, raw in kinds.items():
        num_bytes = sum(map(len, raw))
        capitals = sum(text.count(bytes([c])) for text in raw for c in range(65, 91)) / num_bytes
        started = time.perf_counter()
        transformed = [
            text for begin in range(0, len(raw), 256) for text in caseops.encode_documents(raw[begin : begin + 256])
        ]
        encode_s = time.perf_counter() - started
        texts = [text.decode() for text in transformed]
        started = time.perf_counter()
        restored = [caseops.decode(text) for text in texts]
        decode_s = time.perf_counter() - started
        assert [text.encode() for text in restored] == raw
        print(f"caseops:{kind} bytes:{num_bytes} capitals_frac:{capitals:.3f} encode_mb_per_s:{num_bytes / 1e6 / encode_s:.1f} "
              f"decode_mb_per_s:{num_bytes / 1e6 / decode_s:.1f}")  # fmt: skip


def bench_export(name: str, options: export.Options) -> float:
    started = time.perf_counter()
    splits = export.export(options)["splits"]
    seconds = time.perf_counter() - started
    tokens = sum(split["tokens"] for split in splits.values())
    text_bytes = sum(split["text_bytes"] for split in splits.values())
    print(f"export:{name} workers:{options.workers} tokens:{tokens} text_bytes:{text_bytes} bytes_per_token:{text_bytes / tokens:.3f} "
          f"seconds:{seconds:.2f} tokens_per_s:{tokens / seconds:.0f} tokens_per_s_per_core:{tokens / seconds / options.workers:.0f} "
          f"peak_memory_mb:{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")  # fmt: skip
    return seconds


def bench_verify(name: str, folder: Path, docs: Path, train_docs: int) -> None:
    started = time.perf_counter()
    verify.verify(folder, [docs], train_docs)
    print(f"verify:{name} seconds:{time.perf_counter() - started:.2f}")


def compare_processes(options: export.Options, one: Path) -> None:
    bench_export("plain", options)
    names = sorted(path.name for path in one.iterdir())
    same, *_ = filecmp.cmpfiles(one, options.out, names, shallow=False)
    print(
        f"one_and_two_processes_identical:{sorted(same) == names == sorted(path.name for path in options.out.iterdir())}"
    )


if __name__ == "__main__":
    main()
