"""data/embedded.py: the corpus every Python ships with."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from test_data_helpers import DATA

import embedded  # isort: skip
import shards  # isort: skip


def build_in_another_process(root, hash_seed, *options):
    command = [sys.executable, DATA / "embedded.py", "--root", root, *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded")
    before = os.times()
    result = build_in_another_process(root, "1")
    assert result.returncode == 0, result.stderr
    after = os.times()  # of the processor: other tests run at the same time
    return root, result, after.children_user + after.children_system - before.children_user - before.children_system


def test_summary_and_time(built):
    _, result, seconds = built
    assert seconds < 20
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("embedded_corpus:built") and [line.split()[0] for line in lines[1:3]] == [
        "split:train",
        "split:val",
    ]


@pytest.mark.slow
def test_the_same_python_gives_the_same_bytes(built, tmp_path):
    result = build_in_another_process(tmp_path, "2")
    assert result.returncode == 0
    assert files_of(tmp_path) == files_of(built[0])


def test_manifest_tells_the_truth(built):
    folder = embedded.dataset_folder(built[0], 1024)
    manifest = json.loads((folder / "manifest.json").read_text())
    tokenizer = shards.load_tokenizer(folder / manifest["tokenizer"])
    assert tokenizer.vocab_size() == manifest["vocab_size"] == 1024
    for split, numbers in manifest["splits"].items():
        tokens = shards.read_split(folder, split, 1024)
        texts = tokenizer.decode([part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])])
        assert tokens[0] == 1 and 2 not in tokens  # BOS first, no EOS
        assert numbers["documents"] == np.count_nonzero(tokens == 1) and numbers["tokens"] == len(tokens)
        assert numbers["bytes"] == sum(len(text.encode()) for text in texts)
        assert min(map(len, texts)) >= embedded.MIN_DOCUMENT_CHARS - 5  # NFKC may shorten
    assert 25 <= manifest["splits"]["val"]["documents"] <= 50
    assert 40_000 <= manifest["splits"]["val"]["bytes"] <= 80_000
    assert manifest["splits"]["train"]["documents"] > 400
    assert manifest["splits"]["train"]["bytes"] > 1_500_000


def test_no_long_paragraph_occurs_twice(built):
    """So no validation text is in the training part: sentences of 100 characters taken from validation are not there."""
    folder = embedded.dataset_folder(built[0], 1024)
    tokenizer = shards.load_tokenizer(embedded.tokenizer_path(built[0], 1024))
    val, train = (tokenizer.decode(shards.read_split(folder, split).tolist()) for split in ("val", "train"))
    samples = [val[begin : begin + 150] for begin in range(0, len(val) - 150, 150)]
    found = sum(sample in train for sample in samples)
    assert found <= len(samples) // 50, [sample for sample in samples if sample in train][:3]


def test_running_again_is_free_and_repairs_what_is_damaged(built, capsys):
    root, _, _ = built
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    _, made = embedded.build(root, 1024)
    assert not made and {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert "complete, nothing to do" in build_in_another_process(root, "3").stdout
    good = files_of(root)
    for path in (embedded.tokenizer_path(root, 1024), shards.shard_path(embedded.dataset_folder(root, 1024), "val", 0)):
        path.write_bytes(path.read_bytes()[:-2])
        assert embedded.complete_manifest(root, "embedded", 1024) is None
        path.unlink()
        assert embedded.complete_manifest(root, "embedded", 1024) is None
        path.write_bytes(good[path.relative_to(root).as_posix()])
        assert embedded.complete_manifest(root, "embedded", 1024) is not None


def test_another_python_is_another_corpus(built, monkeypatch):
    monkeypatch.setattr(embedded.sys, "version", "3.99.0")
    assert embedded.complete_manifest(built[0], "embedded", 1024) is None


def test_a_build_that_breaks_off_is_not_taken_for_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(
        embedded, "collect_documents", lambda: [f"document {i} " + "with some words " * 20 for i in range(300)]
    )
    monkeypatch.setattr(embedded, "write_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises((KeyboardInterrupt, shards.DataError)):
        embedded.build(tmp_path, 512)
    assert embedded.complete_manifest(tmp_path, "embedded", 512) is None


def test_bad_input_is_named(tmp_path, monkeypatch):
    result = build_in_another_process(tmp_path, "1", "--vocab-size", "100")
    assert result.returncode == 2 and result.stderr.startswith("error: --vocab-size: found 100; expected 512 to 16384")
    monkeypatch.setattr(embedded, "collect_documents", lambda: ["too little"])
    with pytest.raises(shards.DataError, match="install the full package"):
        embedded.build(tmp_path, 1024)


def test_splitting_and_cutting():
    paragraphs = ["x" * 3000] * 7
    assert [len(document) for document in embedded.cut_document(paragraphs)] == [6001, 6001, 6001, 3000]
    assert list(embedded.cut_document(["short"])) == []
    seen = set()
    assert embedded.fresh_paragraphs("a  b\n-----\n\n\nc", seen) == ["a b", "c"]
    long = "long paragraph " * 6
    assert (
        len(embedded.fresh_paragraphs(f"{long}\n\n{long}", seen)) == 1 and embedded.fresh_paragraphs(long, seen) == []
    )
    documents = [f"{i}" * 1000 for i in range(100)]
    val, train = embedded.split_documents(documents, embedded.VAL_FRACTION)
    assert sorted(val + train) == sorted(documents) and val == documents[:5]
