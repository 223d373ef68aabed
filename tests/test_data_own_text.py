"""data/own_text.py: a folder of text becomes shards that train_gpt.py trains on and scores."""

import functools
import itertools
import json
import lzma
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

import embedded  # isort: skip
import own_text  # isort: skip
import shards  # isort: skip


@functools.cache
def some_texts():
    """A hundred chapters of the language reference."""
    seen = set()
    cut = (embedded.cut_document(embedded.fresh_paragraphs(text, seen)) for text in embedded.topic_texts())
    return list(itertools.islice(itertools.chain.from_iterable(cut), 100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real English in files of several kinds, one of them in a folder below; some of it twice."""
    root = tmp_path_factory.mktemp("own") / "My texts!"
    (root / "below").mkdir(parents=True)
    texts = some_texts()
    (root / "long.txt").write_text("\n\n".join(texts[:60]) + "\n", encoding="utf-8-sig")
    (root / "below" / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:90]))
    with lzma.open(root / "packed.jsonl.xz", "wt") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts[80:]))
    (root / "ignored.pdf").write_bytes(b"\xff\xfe")
    return root


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    return root, *own_text.build(folder, root, 512)


def test_all_text_is_there_once(folder):
    """Every word of every kind of file is in a document; repeated documents are there once; the order is fixed."""
    documents = own_text.collect_documents(folder)
    assert sorted(" ".join(documents).split()) == sorted(" ".join(some_texts()).split())
    assert len(documents) == len(set(documents)) and max(map(len, documents)) <= own_text.MOST
    assert documents == own_text.collect_documents(folder)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["word", "x" * 30, "\n\n", "\n", " ", "\u3000", "ü" * 50, "y" * 5000]), max_size=600))
def test_cutting_loses_no_character_but_blanks(parts):
    """Documents are short enough, have no blank at an end, and hold the text; a word is split only if it is too long."""
    text = "".join(parts)
    documents = list(own_text.cut(text))
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(0 < len(document) <= own_text.MOST and document == document.strip() for document in documents)
    longest = max(map(len, text.split()), default=0)
    if longest < own_text.MOST // 2:
        assert " ".join(documents).split() == text.split()


def test_documents_end_at_blank_lines_where_they_can():
    paragraphs = ["a " * 700 + "end", "b " * 700 + "end", "c " * 700 + "end"]  # 1,403 characters each
    assert [document[0] for document in own_text.cut("\n\n".join(paragraphs))] == ["a", "c"]
    assert len(list(own_text.cut("a " * 1500 + "\n\nend"))) == 1  # what fits as a whole is not cut


@pytest.mark.parametrize(
    ("total", "wanted"), [(100_000, 10_000), (300_000, 20_000), (2_000_000, 46_000), (50_000_000, 60_000)]
)
def test_validation_is_large_enough_to_mean_something_and_small_enough_to_be_scored(total, wanted):
    assert total * own_text.validation_fraction(total) == pytest.approx(wanted)


def test_shards_are_what_train_gpt_reads(built):
    """Two disjoint splits, whose bytes and documents are those of the manifest; a tenth of little text is validation."""
    root, manifest, made = built
    tokenizer, folder = embedded.corpus_paths(root, "own_My_texts", 512)
    assert made and folder.is_dir()
    env = dict(PRESET="tiny", VOCAB_SIZE="512", DATA_PATH=str(folder), TOKENIZER_PATH=str(tokenizer))
    config = tg.load_config(env)[0]
    validation, numbers = tg.load_validation(config), manifest["splits"]
    assert (
        int(validation.bytes.sum()) == numbers["val"]["bytes"]
        and len(validation.documents) == numbers["val"]["documents"]
    )
    assert len(tg.TokenStream(folder, "train", 512)) == numbers["train"]["tokens"]
    assert 0.05 < numbers["val"]["bytes"] / (numbers["val"]["bytes"] + numbers["train"]["bytes"]) < 0.12
    decode = shards.load_tokenizer(tokenizer).decode
    parts = [{decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])}
             for tokens in (shards.read_split(folder, split) for split in ("val", "train"))]  # fmt: skip
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_the_same_text_is_built_once_and_other_text_anew(built, folder, tmp_path):
    root, manifest, _ = built
    again, made = own_text.build(folder, root, 512)
    assert not made and again == manifest
    (folder / "more.txt").write_text("one more document")
    changed, made = own_text.build(folder, root, 512)
    (folder / "more.txt").unlink()
    assert made and changed["splits"]["val"]["documents"] + changed["splits"]["train"]["documents"] == 1 + sum(
        numbers["documents"] for numbers in manifest["splits"].values()
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "no such folder"),
        ({}, "no text file; expected files that end in .txt, .jsonl"),
        ({"a.pdf": b"text"}, "no text file"),
        ({"a.txt": b""}, "0 characters in 0 documents"),
        ({"a.txt": b"little", "b.txt": b"little"}, "6 characters in 1 documents, without repeated ones; expected at least 100,000"),
        ({"a.txt": b"good \xff bad"}, "a.txt: found byte 0xff at 5, which is not UTF-8"),
        ({"a.txt": b"PK\0\0"}, "a.txt: found a NUL character"),
        ({"a.jsonl": b'{"text": "good"}\n{"words": 1}\n'}, "a.jsonl line 2: found"),
        ({"a.jsonl": b'{"text": "\xff"}\n'}, "a.jsonl line 1: found"),
        ({"a.jsonl.gz": b"no gzip"}, "a.jsonl.gz: found damaged"),
        ({"a.txt": b" ".join(b"%d" % n for n in range(30_000))}, "text enough for"),
    ],
)  # fmt: skip
def test_bad_folders_are_named_in_one_line(tmp_path, monkeypatch, capsys, files, said):
    folder = tmp_path / "texts"
    if files is not None:
        folder.mkdir()
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["own_text.py", str(folder), "--root", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as stop:
        shards.run_command(own_text.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("data/datasets/*/manifest.json"))


def test_run_sh_passes_the_folder_on(tmp_path):
    """A mistake ends the command with the line above; a relative folder is the caller's."""
    env = os.environ | {"VENV": str(tmp_path / "venv")}
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "venv" / "installed-requirements.txt").write_bytes((ROOT / "requirements.txt").read_bytes())
    (tmp_path / "empty").mkdir()
    for options, said in (
        (["--text", "empty"], f"{tmp_path}/empty: found no text file"),
        (["--text"], "needs a folder"),
    ):
        done = subprocess.run([ROOT / "run.sh", *options], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
