"""data/shards.py: the format, its errors, writing, and tokenizer training."""

import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_helpers import DATA, load, sample_texts

import shards  # isort: skip


def tokens_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 16, length).astype(np.uint16)


def test_bytes_on_disk_are_those_of_the_format(tmp_path):
    """A shard written with struct alone is read, and what is written is that shard."""
    tokens = [1, 500, 65535, 0]
    expected = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack("<4H", *tokens)
    path = shards.shard_path(tmp_path, "train", 3)
    shards.write_shard(path, np.array(tokens, np.uint16))
    assert path.name == "fineweb_train_000003.bin"
    assert path.read_bytes() == expected
    assert shards.read_shard(path).tolist() == tokens
    assert shards.SHARD_TOKENS * 2 + shards.HEADER_BYTES == 200_001_024


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 40))
def test_writer_cuts_any_stream_without_losing_a_token(tmp_path_factory, pieces, shard_tokens):
    folder = tmp_path_factory.mktemp("writer")
    stream = tokens_of(sum(pieces))
    writer = shards.ShardWriter(folder, "train", shard_tokens)
    begin = 0
    for length in pieces:
        writer.append(stream[begin : begin + length])
        begin += length
    paths = writer.close()
    assert paths == shards.list_shards(folder, "train")
    lengths = [len(shards.read_shard(path)) for path in paths]
    assert lengths[:-1] == [shard_tokens] * len(lengths[:-1])
    joined = np.concatenate([shards.read_shard(path) for path in paths]) if paths else np.zeros(0, np.uint16)
    assert np.array_equal(joined, stream) and writer.num_tokens == len(stream)
    assert not list(folder.glob("*.part"))


def test_a_shard_under_way_does_not_pass_for_a_shard(tmp_path):
    writer = shards.ShardWriter(tmp_path, "val", 100)
    writer.append(tokens_of(50))
    assert shards.list_shards(tmp_path, "val") == []
    with pytest.raises(shards.DataError, match="no fineweb_val"):
        shards.require_shards(tmp_path, "val")
    writer.close()
    assert len(shards.list_shards(tmp_path, "val")) == 1


def test_sidecar_is_never_a_token_shard(tmp_path):
    for split in ("val", "val_bytes", "train"):
        shards.write_shard(shards.shard_path(tmp_path, split, 0), tokens_of(5))
    assert [path.name for path in shards.list_shards(tmp_path, "val")] == ["fineweb_val_000000.bin"]
    assert [path.name for path in shards.list_shards(tmp_path, "val_bytes")] == ["fineweb_val_bytes_000000.bin"]


def test_a_gap_in_the_numbers_is_refused(tmp_path):
    for index in (0, 2):
        shards.write_shard(shards.shard_path(tmp_path, "train", index), tokens_of(5))
    with pytest.raises(
        shards.DataError, match="fineweb_train_000002.bin in place 1; expected fineweb_train_000001.bin"
    ):
        shards.list_shards(tmp_path, "train")
    with pytest.raises(shards.DataError, match="no such folder"):
        shards.list_shards(tmp_path / "nowhere", "train")


GOOD = struct.pack("<256i", 20240520, 1, 10, *[0] * 253) + bytes(20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "1,043 bytes; expected 1,044 bytes for the 10 tokens"),
        (GOOD + b"\0\0", "1,046 bytes; expected 1,044"),
        (GOOD[:600], "600 bytes; expected 1,044"),
        (b"", "first bytes b''"),
        (b"<!DOCTYPE html><html>" + bytes(2000), "a web page, not the data"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n", "a Git LFS pointer, not the data"),
        (struct.pack("<i", 20240521) + GOOD[4:], "expected a shard beginning with 20240520"),
        (struct.pack("<2i", 20240520, 2) + GOOD[8:], "shard version 2; expected 1"),
        (struct.pack("<3i", 20240520, 1, -1) + GOOD[12:], "for the -1 tokens"),
    ],
    ids=["cut", "longer", "cut in the header", "empty", "web page", "LFS pointer", "magic", "version", "negative"],
)
def test_bad_shards_are_named(tmp_path, content, message):
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(content)
    with pytest.raises(shards.DataError, match=message) as error:
        shards.read_shard(path)
    assert str(path) in str(error.value) and "fix: " in str(error.value)


def test_ids_are_checked_against_the_vocabulary(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    shards.write_shard(path, np.array([1, 1023, 5], np.uint16))
    assert len(shards.read_shard(path, 1024)) == 3
    with pytest.raises(shards.DataError, match="token id 1023; expected ids below the vocabulary size 1023"):
        shards.read_shard(path, 1023)
    with pytest.raises(shards.DataError, match="no such file"):
        shards.read_shard(tmp_path / "fineweb_val_000001.bin")


def test_errors_travel_between_processes_and_end_a_program_with_one_line():
    error = shards.DataError("PLACE", 1, 2, "do that")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "PLACE: found 1; expected 2; fix: do that"
    program = "import shards\ndef main(): raise shards.DataError('a', 'b\\nc', 'd', 'e')\nshards.run_command(main)"
    result = subprocess.run([sys.executable, "-c", program], cwd=DATA, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: a: found b c; expected d; fix: e\n")


def test_json_files_are_checked(tmp_path):
    shards.write_json(tmp_path / "a.json", {"b": 1})
    assert shards.read_json(tmp_path / "a.json") == {"b": 1}
    for bad in (b"[1]", b"{", b"\xff"):
        (tmp_path / "a.json").write_bytes(bad)
        with pytest.raises(shards.DataError, match="expected a JSON object"):
            shards.read_json(tmp_path / "a.json")


def test_tokenizer_training_is_deterministic_and_has_the_settings_of_the_challenge(tmp_path):
    texts = [*sample_texts()[:400], "\0 nul \0", "   "]
    for name in ("a", "b"):
        shards.train_tokenizer(texts, 600, tmp_path / f"{name}.model", ("\ue001", "\ue002"))
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = shards.load_tokenizer(tmp_path / "a.model")
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    assert tokenizer.vocab_size() == 600
    assert [tokenizer.id_to_piece(token) for token in (4, 5, 6)] == ["\ue001", "\ue002", "<0x00>"]
    assert (
        tokenizer.decode(tokenizer.encode("  2024 漢字\n\nﬁ ")) == "2024 漢字 fi"
    )  # byte fallback, NFKC, folded white space
    assert [piece for piece in tokenizer.encode("a 2024", out_type=str) if any(map(str.isdigit, piece))] == [
        "2",
        "0",
        "2",
        "4",
    ]
    assert tokenizer.encode("the", out_type=str)[0][0] != "▁"  # no blank in front


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(shards.DataError, match="expected 5000 pieces"):
        shards.train_tokenizer(["too little text"], 5000, tmp_path / "a.model")
    assert not (tmp_path / "a.model").exists()
    with pytest.raises(shards.DataError, match="no such file"):
        shards.load_tokenizer(tmp_path / "a.model")
    (tmp_path / "a.model").write_bytes(b"<html>")
    with pytest.raises(shards.DataError, match="not a SentencePiece model"):
        shards.load_tokenizer(tmp_path / "a.model")


def test_texts_over_the_limit_of_the_library_are_left_out_of_training(tmp_path):
    """Why the embedded corpus is cut into short sentences: the constant is the library's default."""
    for length, used in ((shards.MAX_SENTENCE_BYTES, True), (shards.MAX_SENTENCE_BYTES + 1, False)):
        text = "zq " * 2000
        shards.train_tokenizer([*sample_texts()[:400], text[: length - 1] + "x"], 700, tmp_path / "a.model")
        tokenizer = load((tmp_path / "a.model").read_bytes())
        assert (tokenizer.piece_to_id("▁zq") != tokenizer.unk_id()) == used
