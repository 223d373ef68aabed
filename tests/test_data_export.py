"""data/export.py and data/documents.py: documents to shards."""

import gzip
import hashlib
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest
import zstandard
from test_data_helpers import AWKWARD, DATA, load, sample_texts, toy_model, without_space_piece, write_documents

import caseops  # isort: skip
import documents  # isort: skip
import export  # isort: skip
import fuse  # isort: skip
import shards  # isort: skip

VAL_DOCS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a document list and two tokenizers."""
    folder = tmp_path_factory.mktemp("export")
    texts = [text for text in dict.fromkeys([*AWKWARD[2:], *sample_texts()])]
    write_documents(folder / "docs.jsonl", texts)
    (folder / "plain.model").write_bytes(toy_model())
    (folder / "caseops.model").write_bytes(toy_model(with_operators=True))
    return folder, texts


def run(place, out, model="plain.model", **options):
    folder, _ = place
    tokenizer = {} if "train_tokenizer" in options else {"tokenizer": folder / model}
    return export.export(
        export.Options(**({"docs": [folder / "docs.jsonl"], "out": out, "val_docs": VAL_DOCS} | tokenizer | options))
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_tokens(folder, split):
    return np.concatenate([shards.read_shard(path) for path in shards.require_shards(folder, split)])


def test_tokens_are_bos_and_pieces_of_every_document_in_order(place, tmp_path):
    """Against one plain call of the tokenizer per document."""
    folder, texts = place
    manifest = run(place, tmp_path / "out")
    tokenizer = load(toy_model())
    for split, chosen in (("val", texts[:VAL_DOCS]), ("train", texts[VAL_DOCS:])):
        expected = [token for text in chosen for token in (1, *tokenizer.encode(text))]
        assert all_tokens(tmp_path / "out", split).tolist() == expected
        assert manifest["splits"][split] == {"documents": len(chosen), "text_bytes": sum(len(text.encode()) for text in chosen),
                                             "tokens": len(expected), "shards": 1}  # fmt: skip
    assert manifest["docs_sha256"] == hashlib.sha256((folder / "docs.jsonl").read_bytes()).hexdigest()
    names = ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "manifest.json", "tokenizer.model"]
    assert sorted(contents(tmp_path / "out")) == names


@pytest.mark.parametrize(
    "options", [{}, {"caseops": True, "mp3": True, "model": "caseops.model"}], ids=["plain", "mp3"]
)
def test_two_processes_write_the_same_bytes_as_one(place, tmp_path, options, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 37)  # many batches; the parent alone makes them
    for workers in (1, 2):
        run(place, tmp_path / str(workers), workers=workers, shard_tokens=5000, **options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) > 10


def test_stopping_early_is_exact_for_any_number_of_processes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 37)
    whole = run(place, tmp_path / "whole", shard_tokens=3000)
    for workers in (1, 2):
        manifest = run(place, tmp_path / str(workers), workers=workers, shard_tokens=3000, max_train_shards=2)
        assert manifest["splits"]["train"]["tokens"] == 6000
        assert manifest["splits"]["train"]["documents"] == np.count_nonzero(
            all_tokens(tmp_path / "whole", "train")[:6000] == 1
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert whole["splits"]["train"]["tokens"] > 6000


def test_caseops_and_mp3_agree_with_their_parts(place, tmp_path):
    folder, texts = place
    plain = run(place, tmp_path / "caseops", "caseops.model", caseops=True)
    fused = run(place, tmp_path / "mp3", "caseops.model", caseops=True, mp3=True)
    tokenizer = load(toy_model(with_operators=True))
    val = all_tokens(tmp_path / "caseops", "val")
    assert val.tolist() == [
        token for text in texts[:VAL_DOCS] for token in (1, *tokenizer.encode(caseops.encode(text)))
    ]
    pairs = caseops.MarkerPairs.of(tokenizer)
    for split in ("val", "train"):
        assert np.array_equal(
            pairs.expand(all_tokens(tmp_path / "mp3", split)), all_tokens(tmp_path / "caseops", split)
        )
    sidecar = all_tokens(tmp_path / "caseops", "val_bytes")
    assert np.array_equal(pairs.fuse(val, sidecar)[1], all_tokens(tmp_path / "mp3", "val_bytes"))
    assert not sidecar[val == 1].any() and sidecar.sum() == plain["sidecar_bytes"] == fused["sidecar_bytes"]
    assert json.loads((tmp_path / "mp3/alias_map.json").read_text()) == pairs.alias_map()
    assert (
        shards.list_shards(tmp_path / "caseops", "val_bytes")
        and not (tmp_path / "caseops/fineweb_train_bytes_000000.bin").exists()
    )
    assert fused["splits"]["train"]["tokens"] < plain["splits"]["train"]["tokens"]


def test_tokenizer_is_trained_on_training_documents_only(place, tmp_path):
    folder, texts = place
    run(place, tmp_path / "a", train_tokenizer=600, caseops=True)
    tokenizer = shards.load_tokenizer(tmp_path / "a/tokenizer.model")
    assert tokenizer.vocab_size() == 600 and caseops.has_operators(tokenizer)
    changed = ["entirely different words zq zq zq"] * VAL_DOCS
    write_documents(tmp_path / "docs.jsonl", [f"{text} {i}" for i, text in enumerate(changed)] + texts[VAL_DOCS:])
    run(place, tmp_path / "b", train_tokenizer=600, caseops=True, docs=[tmp_path / "docs.jsonl"])
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (tmp_path / "b/tokenizer.model").read_bytes()


@pytest.mark.parametrize("suffix", ["xz", "gz", "zst"])
def test_compressed_lists_read_as_the_plain_one_and_cut_ones_are_refused(place, tmp_path, suffix):
    folder, texts = place
    compress = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[suffix]
    plain = (folder / "docs.jsonl").read_bytes()
    half = len(plain) // 2
    packed = compress(plain[:half]) + compress(plain[half:])  # two streams in one file
    path = tmp_path / f"docs.jsonl.{suffix}"
    path.write_bytes(packed)
    assert list(documents.read_texts([path])) == texts
    for bad in (packed[:-20], b"junk" + packed):
        path.write_bytes(bad)
        with pytest.raises(shards.DataError, match="damaged or cut short"):
            list(documents.read_texts([path]))


def test_several_files_are_one_list(place, tmp_path):
    _, texts = place
    parts = [write_documents(tmp_path / "a.jsonl", texts[:100]), write_documents(tmp_path / "b.jsonl", texts[100:])]
    run(place, tmp_path / "parts", docs=parts)
    run(place, tmp_path / "whole")
    assert np.array_equal(all_tokens(tmp_path / "parts", "train"), all_tokens(tmp_path / "whole", "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 3: found b'{"), ("[1]", 'key "text" holds a string'), ('{"text": 7}', 'key "text" holds a string'),
     ('{"body": "x"}', 'key "text" holds a string'), ('{"text": "\\ud800"}', "unpaired surrogate")],
)  # fmt: skip
def test_bad_lines_are_named_and_nothing_is_left(place, tmp_path, line, message):
    (tmp_path / "docs.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n')
    for workers in (1, 2) if line == "{" else (1,):
        with pytest.raises(shards.DataError, match=message) as error:
            run(place, tmp_path / "out", docs=[tmp_path / "docs.jsonl"], val_docs=1, workers=workers)
        assert "docs.jsonl line 3" in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


def test_training_documents_that_are_in_validation_are_refused(place, tmp_path):
    _, texts = place
    write_documents(tmp_path / "docs.jsonl", [*texts, texts[3]])
    with pytest.raises(shards.DataError, match="1 training documents that are also validation"):
        run(place, tmp_path / "out", docs=[tmp_path / "docs.jsonl"])
    write_documents(tmp_path / "docs.jsonl", [*texts, f" {texts[30]}\n".replace(" ", "  ")])  # in other white space
    with pytest.raises(shards.DataError, match="1 training documents that are also validation"):
        run(place, tmp_path / "out", docs=[tmp_path / "docs.jsonl"])
    write_documents(tmp_path / "docs.jsonl", [*texts, texts[VAL_DOCS + 3]])  # twice in training is no leak
    assert run(place, tmp_path / "out", docs=[tmp_path / "docs.jsonl"])["overlapping_documents"] == 0


def test_natural_duplicates_are_counted_up_to_one_in_a_thousand(place, tmp_path):
    texts = [f"document number {i}" for i in range(2000)]
    write_documents(tmp_path / "docs.jsonl", [*texts, texts[5], texts[6], "and one more"])
    assert run(place, tmp_path / "a", docs=[tmp_path / "docs.jsonl"], val_docs=2000)["overlapping_documents"] == 2
    write_documents(tmp_path / "docs.jsonl", [*texts, texts[5], texts[6], texts[7]])
    with pytest.raises(shards.DataError, match="at most 2"):
        run(place, tmp_path / "b", docs=[tmp_path / "docs.jsonl"], val_docs=2000)


def test_folders_in_use_are_refused(place, tmp_path):
    (tmp_path / "empty").mkdir()
    run(place, tmp_path / "empty")
    before = contents(tmp_path / "empty")
    with pytest.raises(shards.DataError, match="a folder that is not empty"):
        run(place, tmp_path / "empty")
    assert contents(tmp_path / "empty") == before
    (tmp_path / "new.part").mkdir()
    with pytest.raises(shards.DataError, match="running or broken off"):
        run(place, tmp_path / "new")


def test_wrong_tokenizers_counts_and_files_are_refused(place, tmp_path):
    folder, texts = place
    out = tmp_path / "out"
    with pytest.raises(shards.DataError, match="add --caseops"):
        run(place, out, "caseops.model")
    with pytest.raises(shards.DataError, match="use the CaseOps tokenizer"):
        run(place, out, "plain.model", caseops=True)
    with pytest.raises(shards.DataError, match="no such file"):
        run(place, out, "nothing.model")
    with pytest.raises(shards.DataError, match="no such file"):
        run(place, out, docs=[tmp_path / "nothing.jsonl"])
    with pytest.raises(shards.DataError, match="lower --val-docs"):
        run(place, out, val_docs=len(texts))
    (tmp_path / "docs.txt").write_text("x")
    with pytest.raises(shards.DataError, match="ends in '.txt'"):
        run(place, out, docs=[tmp_path / "docs.txt"])
    write_documents(tmp_path / "nul.jsonl", ["good", "has \0 in it", "more"])
    with pytest.raises(shards.DataError, match="control character"):
        run(place, out, "caseops.model", docs=[tmp_path / "nul.jsonl"], val_docs=1, caseops=True, mp3=True)
    assert not out.exists() and not shards.temporary(out).exists()


def test_tokenizer_without_a_space_piece_exports_too(place, tmp_path):
    (tmp_path / "odd.model").write_bytes(without_space_piece(toy_model()))
    run(place, tmp_path / "out", tokenizer=tmp_path / "odd.model")
    assert np.isin(all_tokens(tmp_path / "out", "train"), load(toy_model()).piece_to_id("<0xE2>")).any()


def test_the_list_is_never_read_far_ahead(place, tmp_path, monkeypatch):
    """Memory stays bounded whatever the length of the list: at most BATCHES_AHEAD batches per worker are under way."""
    folder, _ = place
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield documents.Batch("train", [f"line {taken}"], [b'{"text": "some words"}'])

    options = export.Options([folder / "docs.jsonl"], tmp_path, 1, workers=2)
    results = export.encode_in_order(endless(), folder / "plain.model", options)
    for _ in range(20):
        next(results)
    assert taken <= 20 + export.BATCHES_AHEAD * 2
    results.close()


def test_command_line(place, tmp_path):
    folder, _ = place
    inputs = ["--docs", folder / "docs.jsonl", "--tokenizer", folder / "plain.model"]
    command = [sys.executable, DATA / "export.py", *inputs, "--out", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--val-docs" in result.stderr  # has no default
    result = subprocess.run([*command, "--val-docs", "40", "--workers", "1"], capture_output=True, text=True)
    assert result.returncode == 0 and "warning:val_docs:40" in result.stdout and "bytes_per_token:" in result.stdout
    result = subprocess.run([*command, "--val-docs", "40"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    for bad in (
        ["--val-docs", "0"],
        ["--val-docs", "40", "--workers", "0"],
        ["--val-docs", "40", "--shard-tokens", "-5"],
    ):
        with pytest.raises(shards.DataError, match="1 or more"):
            export.parse_options([*map(str, command[2:]), *bad])


def test_fusing_shards_equals_exporting_fused_documents(place, tmp_path):
    """Whatever the shard size of the source, so pairs over shard boundaries are fused too; shards and side-car, bit by bit."""
    run(place, tmp_path / "mp3", "caseops.model", caseops=True, mp3=True, shard_tokens=3000)
    for shard_tokens in (777, 3000):
        source, out = tmp_path / f"caseops{shard_tokens}", tmp_path / f"fused{shard_tokens}"
        run(place, source, "caseops.model", caseops=True, shard_tokens=shard_tokens)
        manifest = fuse.fuse_folder(source, out, shard_tokens=3000)
        expected, found = contents(tmp_path / "mp3"), contents(out)
        assert {name: found[name] for name in found if name != "manifest.json"} == {
            name: expected[name] for name in expected if name != "manifest.json"}  # fmt: skip
        for split, numbers in json.loads(expected["manifest.json"])["splits"].items():
            assert (
                manifest["splits"][split].items()
                >= {key: numbers[key] for key in ("tokens", "documents", "shards")}.items()
            )


def test_fusing_refuses_what_is_not_caseops(place, tmp_path):
    run(place, tmp_path / "plain")
    with pytest.raises(shards.DataError, match="use the CaseOps tokenizer"):
        fuse.fuse_folder(tmp_path / "plain", tmp_path / "out")
    run(place, tmp_path / "caseops", "caseops.model", caseops=True)
    with pytest.raises(shards.DataError, match="not empty"):
        fuse.fuse_folder(tmp_path / "caseops", tmp_path / "plain")
    fuse.fuse_folder(tmp_path / "caseops", tmp_path / "mp3")
    with pytest.raises(shards.DataError, match="control character"):
        fuse.fuse_folder(tmp_path / "mp3", tmp_path / "twice")  # fused already
    train = shards.shard_path(tmp_path / "caseops", "train", 0)
    shards.write_shard(train, np.array(shards.read_shard(train))[1:])
    with pytest.raises(shards.DataError, match="with BOS before every document"):
        fuse.fuse_folder(tmp_path / "caseops", tmp_path / "out")
    shards.shard_path(tmp_path / "caseops", "val_bytes", 0).unlink()
    with pytest.raises(shards.DataError, match="no fineweb_val_bytes"):
        fuse.fuse_folder(tmp_path / "caseops", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
