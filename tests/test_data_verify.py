"""data/verify.py: passes on good folders, and on each planted fault names it."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from test_data_helpers import (
    AWKWARD,
    DATA,
    load,
    many_space_model,
    sample_texts,
    toy_model,
    without_space_piece,
    write_documents,
)

import documents  # isort: skip
import export  # isort: skip
import shards  # isort: skip
import variants  # isort: skip
import verify  # isort: skip

VAL_DOCS = 40


def unlike(texts):
    """The texts without those that differ from another in white space only."""
    return list({" ".join(text.split()): text for text in texts}.values())


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{kind: exported folder} for plain, CaseOps and MP3 data, and the list they were made from."""
    folder = tmp_path_factory.mktemp("verify")
    docs = write_documents(folder / "docs.jsonl", unlike(AWKWARD[2:] + list(sample_texts()[:400])))
    (folder / "plain.model").write_bytes(toy_model())
    (folder / "caseops.model").write_bytes(toy_model(with_operators=True))
    for kind in ("plain", "caseops", "mp3"):
        with_operators = kind != "plain"
        export.export(export.Options([docs], folder / kind, VAL_DOCS, folder / ("caseops.model" if with_operators else "plain.model"),
                                     caseops=with_operators, mp3=kind == "mp3", shard_tokens=4000))  # fmt: skip
    return folder, docs


@pytest.fixture
def copy(exports, tmp_path):
    def make(kind):
        shutil.copytree(exports[0] / kind, tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", ["plain", "caseops", "mp3"])
def test_good_folders_pass(exports, kind, capsys):
    folder, docs = exports
    verify.verify(folder / kind, [docs], 300)
    printed = capsys.readouterr().out
    assert f"verified:{folder / kind}" in printed
    assert "decoded_text_differences:0" in printed and "overlap:0" in printed
    verify.verify(folder / kind)
    assert "documents:not_given" in capsys.readouterr().out


def change(path, index, value):
    tokens = np.array(shards.read_shard(path))
    tokens[index] = value
    shards.write_shard(path, tokens)


def fails(folder, message, docs=None, **options):
    with pytest.raises(shards.DataError, match=message):
        verify.verify(folder, docs, **options)


@pytest.mark.parametrize("kind", ["plain", "caseops", "mp3"])
def test_one_changed_token_is_found_with_the_documents(copy, exports, kind, capsys):
    """The id stays valid, so that nothing but the text can tell."""
    folder = copy(kind)
    path = shards.shard_path(folder, "val", 0)
    words = np.flatnonzero(shards.read_shard(path) > 400)
    change(path, words[20], 399)
    fails(folder, "'decoded_text': 1", [exports[1]])
    assert "difference:decoded_text validation document" in capsys.readouterr().out


def test_one_changed_training_token_is_found(copy, exports):
    folder = copy("plain")
    change(shards.shard_path(folder, "train", 1), 7, 300)
    fails(folder, "'decoded_text': 1", [exports[1]], train_docs=300)


def test_sidecar_faults_are_found(copy, exports):
    folder = copy("caseops")
    path = shards.shard_path(folder, "val_bytes", 0)
    good = np.array(shards.read_shard(path))
    val = shards.read_split(folder, "val")
    change(path, 0, 1)
    fails(folder, "side-car entry 0: found 1 bytes for token 1; expected 0")
    shards.write_shard(path, good)
    marker = int(np.flatnonzero(val == 4)[0])
    change(path, marker, 1)
    fails(folder, f"side-car entry {marker}")
    shards.write_shard(path, good)
    change(path, int(np.flatnonzero(good)[3]), good[np.flatnonzero(good)[3]] + 1)
    fails(folder, "'sidecar_bytes': 1", [exports[1]])
    shards.write_shard(path, good[:-1])
    fails(folder, "one per validation token|equal ones")
    for shard in shards.list_shards(folder, "val_bytes"):
        shard.unlink()
    fails(folder, "no fineweb_val_bytes")


def test_validation_documents_in_training_are_found(copy):
    """Planted over a shard boundary: the copied document begins in one training shard and ends in the next."""
    folder = copy("plain")
    (folder / "manifest.json").unlink()
    val = verify.split_documents(shards.read_split(folder, "val"))
    shared = max(val[:-1], key=len)
    train = np.concatenate([shards.read_shard(path) for path in shards.list_shards(folder, "train")])
    starts = np.flatnonzero(train == 1)
    at = starts[starts > 4000 - len(shared) // 2][0]
    planted = np.concatenate([train[:at], shared, train[at:]])
    for path in shards.list_shards(folder, "train"):
        path.unlink()
    writer = shards.ShardWriter(folder, "train", 4000)
    writer.append(planted)
    writer.close()
    fails(folder, f"1 of {len(val)} validation documents", tokenizer_path=folder / "tokenizer.model")


def test_document_hashes_see_every_document_whatever_the_chunk(exports, monkeypatch):
    folder = exports[0] / "plain"
    expected = np.concatenate(list(verify.document_hashes(folder, "train")))
    assert len(set(expected.tolist())) == len(expected) == np.count_nonzero(np.concatenate(
        [shards.read_shard(path) for path in shards.list_shards(folder, "train")]) == 1)  # fmt: skip
    for chunk in (1, 77, 1000):
        monkeypatch.setattr(documents, "CHUNK_TOKENS", chunk)
        assert np.array_equal(np.concatenate(list(verify.document_hashes(folder, "train"))), expected)


def test_structural_faults_are_found(copy, exports):
    folder = copy("plain")
    fails(folder.parent / "nowhere", "no such folder")
    path = shards.shard_path(folder, "val", 0)
    good = path.read_bytes()
    change(path, 3, 900)
    fails(folder, "token id 900")
    path.write_bytes(good)
    change(path, 0, 5)
    fails(folder, "first token 5")
    path.write_bytes(good[:-2])
    fails(folder, "cut short")
    shards.write_shard(path, np.zeros(0, np.uint16))
    fails(folder, "no tokens")
    path.write_bytes(good)
    change(path, 5, 1)  # one BOS too many
    fails(folder, "val documents: found 41; expected 40")
    path.write_bytes(good)
    last = shards.list_shards(folder, "train")[-1]
    kept = last.read_bytes()
    last.unlink()
    fails(folder, "train (tokens|documents|shards)")
    last.write_bytes(kept)
    middle = shards.shard_path(folder, "train", 1)
    shards.write_shard(middle, np.array(shards.read_shard(middle))[:-5])
    fails(folder, "equal ones")


def test_foreign_tokenizers_and_lists_are_found(copy, exports, tmp_path):
    folder = copy("plain")
    (folder / "tokenizer.model").write_bytes(without_space_piece(toy_model()))
    fails(folder, "SHA-256")
    (folder / "tokenizer.model").write_bytes(toy_model())
    texts = list(sample_texts()[400:])
    fails(folder, "decoded_text", [write_documents(tmp_path / "other.jsonl", texts)])
    fails(folder, "ends .* documents too early", [write_documents(tmp_path / "short.jsonl", texts[:10])])
    (folder / "manifest.json").unlink()
    fails(folder, "give --tokenizer")
    verify.verify(folder, tokenizer_path=folder / "tokenizer.model")


def test_recorded_hashes_are_compared(copy):
    folder = copy("plain")
    files = {path.name: {"sha256": shards.file_sha256(path)} for path in folder.glob("*.bin")}
    record = {"tokenizer": "tokenizer.model", "files": files}
    shards.write_json(folder / "SOURCE.json", record)
    verify.verify(folder)
    change(shards.shard_path(folder, "train", 0), 9, 300)
    fails(folder, "fineweb_train_000000.bin: found SHA-256")
    shards.shard_path(folder, "train", 2).rename(folder / "lost")
    fails(folder, "SHA-256|lists")


@pytest.mark.parametrize("kind", ["plain", "caseops"])
def test_published_totals_are_checked(copy, monkeypatch, capsys, kind):
    """A toy variant with known totals; then each total off by more than its tolerance."""
    folder = copy(kind)
    val = shards.read_split(folder, "val")
    with_operators = kind == "caseops"
    targets = (len(val) - 1) // 64 * 64
    tokenizer = shards.load_tokenizer(folder / "tokenizer.model")
    if with_operators:
        sidecar = shards.read_split(folder, "val_bytes").astype(int)
        facts = {"val_bytes": int(sidecar[: targets + 1].sum()), "val_bytes_full": int(sidecar.sum())}
    else:
        facts = {"val_bytes": sum(verify.document_bytes(val[: targets + 1], tokenizer)), "val_bytes_full": None}
    facts |= {"block": 64, "val_targets": targets, "caseops": with_operators}
    monkeypatch.setattr(variants, "VAL_DOCUMENTS", VAL_DOCS)
    monkeypatch.setitem(variants.ALIASES, kind, "toy")

    def publish(**changes):
        monkeypatch.setitem(
            variants.VARIANTS, "toy", variants.Variant("someone/data", kind, "toy.model", 800, **(facts | changes))
        )

    publish()
    verify.verify(folder)
    assert f"published:toy documents:{VAL_DOCS} targets:{targets}" in capsys.readouterr().out
    publish(val_bytes=facts["val_bytes"] + 5)
    fails(folder, "bytes in .* targets")
    publish(val_targets=targets + 64)
    fails(folder, "is cut or is another one")
    if with_operators:
        publish(val_bytes_full=facts["val_bytes_full"] - 3)
        fails(folder, "bytes of validation text")
    monkeypatch.setattr(variants, "VAL_DOCUMENTS", VAL_DOCS + 1)
    publish()
    fails(folder, "40 validation documents")


TOKENIZERS = {
    "space piece": lambda: toy_model(),
    "no space piece": lambda: without_space_piece(toy_model()),
    "several blanks": many_space_model,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_reference_bytes_are_those_of_the_text(name):
    """Document by document, for text in the tokenizer's normal form; the text has byte-fallback characters, lone blanks and
    (where the tokenizer keeps them) runs of blanks."""
    tokenizer = load(TOKENIZERS[name]())
    texts = ["a plain text", "漢 字 é 🙂 Ω", "the 漢 the", "x - y = 7", "q Ж q Ж", "ends in é"]
    if name == "several blanks":
        texts += ["a    return value", "if x:    return    value 3", "  begins with blanks", "ends with blanks   "]
        pieces = {tokenizer.id_to_piece(token) for text in texts for token in tokenizer.encode(text)}
        assert any(piece.startswith("▁▁") for piece in pieces)
    has_space = tokenizer.piece_to_id("▁") != tokenizer.unk_id()
    assert has_space == (name != "no space piece")
    stream = [token for text in texts for token in (1, *tokenizer.encode(text))]
    assert (tokenizer.piece_to_id("<0xE2>") in stream) == (name == "no space piece")
    assert verify.document_bytes(np.array(stream, np.uint16), tokenizer) == [len(text.encode()) for text in texts]


def test_stripping_follows_the_tokenizer():
    tokenizer = load(toy_model())
    examples = {" a ": "a", "\u3000a\u200b": "a", "a\x1f": "a\x1f", "\x1fa": "a", "a \x1f": "a", "": "", " \x1f": ""}
    for text, stripped in examples.items():
        assert verify.strip_as_tokenizer(text, tokenizer) == stripped


def test_command_line(exports, tmp_path):
    folder, docs = exports
    result = subprocess.run(
        [sys.executable, DATA / "verify.py", folder / "mp3", "--docs", docs], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"verified:{folder / 'mp3'}"
    result = subprocess.run([sys.executable, DATA / "verify.py", tmp_path / "nowhere"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
