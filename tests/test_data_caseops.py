"""data/caseops.py against slow, obvious versions of the same rules."""

import re

import numpy as np
import pytest
from conftest import toy_config, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_helpers import AWKWARD, load, sample_texts, toy_model

import train_gpt as tg

import caseops  # isort: skip
import shards  # isort: skip
import variants  # isort: skip

T, A, N, E = caseops.OPERATORS
# Arbitrary Unicode, and texts in which the interesting characters are frequent.
TEXTS = (
    st.text() | st.text(alphabet="abCDé 1'\n\ue001\ue002\ue003\ue004Ａİſ") | st.text(alphabet=[T, A, N, E, "a", "B"])
)
EXAMPLES = [("Red cat", f"{T}red cat"), ("USA", f"{A}usa"), ("I", f"{T}i"), ("X-ray", f"{T}x-ray"), ("eBook", f"e{N}book"),
            ("DeLuxe", f"{T}de{N}luxe"), ("PhDs", f"{T}ph{N}ds"), ("Ünder", "Ünder"), ("ÉCOLE", f"É{A}cole"), ("", ""),
            ("B2B", f"{T}b2{T}b"), ("don'T", f"don'{T}t"), (A, E + A), ("ABc", f"{T}a{N}bc"), ("aBC", f"a{N}b{N}c"),
            ("AB", f"{A}ab"), ("Ａİſ", "Ａİſ")]  # fmt: skip


def slow_encode(text: str) -> str:
    """The rules as they are written down: word by word, letter by letter."""

    def word(match: re.Match) -> str:
        w = match[0]
        if w in caseops.OPERATORS:
            return E + w
        if w.islower():
            return w
        if len(w) >= 2 and w.isupper():
            return A + w.lower()
        first = T + w[0].lower() if w[0].isupper() else w[0]
        return first + "".join(N + c.lower() if c.isupper() else c for c in w[1:])

    return re.sub(f"[A-Za-z]+|[{T}{A}{N}{E}]", word, text)


def slow_sidecar(pieces: list[bytes]) -> list[int]:
    """Bytes per piece surface, character by character, with the state of a decoder."""
    counts, escaped = [], False
    for surface in pieces:
        count = 0
        for character in surface.decode():
            if character in caseops.OPERATORS and not escaped:
                escaped = character == E
            else:
                count += len(character.encode())
                escaped = False
        counts.append(count)
    return counts


@pytest.mark.parametrize(("text", "transformed"), EXAMPLES)
def test_worked_examples(text, transformed):
    assert caseops.encode(text) == transformed
    assert caseops.decode(transformed) == text


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("".join(AWKWARD))
def test_round_trip_and_equality_with_the_slow_version(text):
    transformed = caseops.encode(text)
    assert caseops.decode(transformed) == text
    assert transformed == slow_encode(text)
    assert not re.search("[A-Z]", transformed)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS))
def test_documents_do_not_influence_each_other(texts):
    raw = [text.encode() for text in texts]
    assert caseops.encode_documents(raw) == [caseops.encode_bytes(text) for text in raw]


BAD = [
    T,
    A,
    N,
    E,
    f"{T}1",
    f"{A} a",
    f"{N}é",
    f"a{T}b",
    f"a{A}b",
    f"{T}{T}a",
    f"{N}{T}a",
    f"{N}{N}a",
    f"{T}{A}a",
    f"ab{A}",
]


@pytest.mark.parametrize("bad", BAD)
def test_operators_out_of_place_are_refused(bad):
    """An upper-case rule applied to the wrong character would otherwise go unnoticed."""
    with pytest.raises(ValueError, match="cannot stand between"):
        caseops.decode(bad)


def test_decoder_accepts_what_the_encoder_never_writes():
    for transformed, text in ((f"{N}abc", "Abc"), (f"{T}{N}abc", "Abc"), (f"{A}a{N}b c", "AB c"), (f"{E}a", "a")):
        assert caseops.decode(transformed) == text


def test_a_planted_fault_in_the_transform_is_noticed():
    """One letter of the transformed text in the wrong case, or one operator lost, does not decode to the text."""
    text = "The USA sent eBooks to PhDs."
    transformed = caseops.encode(text)
    for index, character in enumerate(transformed):
        if character in caseops.OPERATORS:
            assert caseops.decode(transformed[:index] + transformed[index + 1 :]) != text


@pytest.fixture(scope="module")
def tokenizer():
    return load(toy_model(with_operators=True))


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example("  x  y ")
@example("½ a½b ﬃ e\u0301")
@example(f"{E}{E}A{A} {N}")
@example("\0a \0 b\x07c")
@example("漢字漢 🙂 é")
def test_sidecar_counts_the_bytes_of_the_text(text):
    """Sum = UTF-8 bytes less outer white space as the tokenizer sees it; per token = the slow count over its surface."""
    import verify

    tokenizer = load(toy_model(with_operators=True))
    transformed = caseops.encode(text).encode()
    ids, sidecar = caseops.encode_with_sidecar(tokenizer, transformed)
    assert ids.tolist() == tokenizer.encode(transformed.decode())
    assert sidecar.sum() == len(verify.strip_as_tokenizer(text, tokenizer).encode())


def test_sidecar_of_every_piece_is_that_of_the_slow_version(tokenizer):
    for text in [*AWKWARD, *sample_texts()[:100]]:
        transformed = caseops.encode(text).encode()
        _, sidecar = caseops.encode_with_sidecar(tokenizer, transformed)
        offsets = tokenizer.encode(transformed, return_type="offset_mapping")["offsets"]
        assert sidecar.tolist() == slow_sidecar([transformed[begin:end] for begin, end in offsets]), text


def test_operators_have_no_bytes_and_escaped_ones_have_three(tokenizer):
    ids, sidecar = caseops.encode_with_sidecar(tokenizer, caseops.encode(f"x {A}{E} USA").encode())
    pieces = [tokenizer.id_to_piece(token) for token in ids.tolist()]
    assert [(piece, count) for piece, count in zip(pieces, sidecar.tolist(), strict=True) if piece in caseops.OPERATORS] == [
        (E, 0), (A, 3), (E, 0), (E, 3), (A, 0)]  # fmt: skip


def test_a_run_too_long_for_the_sidecar_is_refused(tokenizer):
    assert caseops.encode_with_sidecar(tokenizer, b"a" + b" " * 65_000 + b"b")[1].sum() == 65_002
    with pytest.raises(shards.DataError, match="at most 65,535"):
        caseops.encode_with_sidecar(tokenizer, b"a" + b" " * 65_536 + b"b")


def slow_fuse(pairs, tokens, sidecar):
    out = []
    for token, count in zip(tokens.tolist(), sidecar.tolist(), strict=True):
        if out and out[-1][0] == pairs.space and token in pairs.markers:
            _, before = out.pop()
            out.append((pairs.aliases[pairs.markers.index(token)], before + count))
        else:
            out.append((token, count))
    return [token for token, _ in out], [count for _, count in out]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["space", "title", "caps", "next", "escape", "word"]), max_size=40))
def test_fusing_markers_equals_the_slow_version_and_can_be_undone(names):
    pairs = caseops.MarkerPairs.of(load(toy_model(with_operators=True)))
    ids = dict(zip(("space", "title", "caps", "next"), (pairs.space, *pairs.markers), strict=True), escape=7, word=300)
    tokens = np.array([1] + [ids[name] for name in names], np.uint16)
    sidecar = np.arange(len(tokens)).astype(np.uint16)
    fused, fused_sidecar = pairs.fuse(tokens, sidecar)
    assert (fused.tolist(), fused_sidecar.tolist()) == slow_fuse(pairs, tokens, sidecar)
    assert fused_sidecar.sum() == sidecar.sum()
    assert np.array_equal(pairs.expand(fused), tokens)


def test_fusing_shortens_real_text_and_never_crosses_documents(tokenizer):
    pairs = caseops.MarkerPairs.of(tokenizer)
    assert pairs.markers == (4, 5, 6) and pairs.aliases == (8, 9, 10)
    assert pairs.fuse(np.array([1, pairs.space, 1, 4], np.uint16))[0].tolist() == [1, pairs.space, 1, 4]
    ids = np.array(tokenizer.encode(caseops.encode("The United States of America")), np.uint16)
    assert len(pairs.fuse(ids)[0]) == len(ids) - 3
    assert pairs.alias_map()["marker_pairs"][0]["donor"] == 8


def test_aliases_in_use_and_tokenizers_without_operators_are_refused(tokenizer):
    pairs = caseops.MarkerPairs.of(tokenizer)
    with pytest.raises(shards.DataError, match="control character"):
        pairs.fuse(np.array(tokenizer.encode("a\0b"), np.uint16))
    plain = load(toy_model())
    assert caseops.has_operators(tokenizer) and not caseops.has_operators(plain)
    with pytest.raises(shards.DataError, match="U\\+E001"):
        caseops.require_operators(plain, "toy.model")
    with pytest.raises(shards.DataError, match="the pieces that --mp3 fuses"):
        caseops.MarkerPairs.of(plain)


# ---------------------------------------------------------------------------------------------------------------------
# MP3 as the script reads it: MARKER_PAIR_MODE


class PublishedPieces:
    """The ids of the published CaseOps tokenizer that matter here (#1729, #2109)."""

    ids = {"▁": 8133, T: 4, A: 5, N: 6, E: 7, "<0x00>": 8, "<0x01>": 9, "<0x02>": 10}

    def piece_to_id(self, piece):
        return self.ids.get(piece, self.unk_id())

    def unk_id(self):
        return 3


def test_fused_ids_of_the_script_are_those_of_the_data(tokenizer):
    pairs = caseops.MarkerPairs.of(PublishedPieces())
    assert tg.SPACE_ID == pairs.space and tg.FUSED_MARKERS == dict(zip(pairs.aliases, pairs.markers, strict=True))
    trained = caseops.MarkerPairs.of(tokenizer)  # a tokenizer of the same settings has them at the same places
    assert tg.FUSED_MARKERS == dict(zip(trained.aliases, trained.markers, strict=True))


@pytest.mark.parametrize("env", [{"PRESET": "frontier"}, {"CASEOPS_ENABLED": "1", "MARKER_PAIR_MODE": "1"}])
def test_fused_data_have_the_name_under_which_they_are_made(env):
    config, mp3 = tg.load_config(env)[0], variants.VARIANTS["mp3"]
    assert (config.dataset_dir.name, config.tokenizer_file.name) == (mp3.dataset, mp3.tokenizer)
    assert config.vocab_size == mp3.vocab_size > tg.SPACE_ID
    own = tg.load_config(env | {"DATA_PATH": "x"})[0]
    assert str(own.dataset_dir) == "x"


def caseops_config(folder, tokens, sidecar, model=None, **changes):
    """Validation shards, their side-car and a tokenizer on disk, as settings."""
    model = model or toy_model(with_operators=True)
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    write_shard(folder / "fineweb_val_bytes_000000.bin", sidecar)
    (folder / "toy.model").write_bytes(model)
    paths = dict(DATA_PATH=folder, TOKENIZER_PATH=folder / "toy.model", VOCAB_SIZE=load(model).vocab_size())
    return toy_config(**paths, **changes)


@pytest.fixture
def streams(tokenizer, monkeypatch):
    """{fused or not: (ids, side-car)} of a few documents, with the script's space where this tokenizer has it."""
    pairs = caseops.MarkerPairs.of(tokenizer)
    monkeypatch.setattr(tg, "SPACE_ID", pairs.space)
    ids, sidecar = [], []
    for text in ["The USA sent eBooks to PhDs.", " I", "it is", "Red Cat"]:
        found, counts = caseops.encode_with_sidecar(tokenizer, caseops.encode(text).encode())
        ids += [tg.BOS_ID, *found.tolist()]
        sidecar += [0, *counts.tolist()]
    plain = np.array(ids, np.uint16), np.array(sidecar, np.uint16)
    return {0: plain, 1: pairs.fuse(*plain)}


@pytest.mark.parametrize("mode", [0, 1])
def test_marker_pair_mode_and_data_must_agree(mode, streams, tmp_path):
    """The right shards load and hold the bytes of the text; the others are refused in one line that names the setting."""
    assert len(streams[1][0]) < len(streams[0][0])
    config = caseops_config(tmp_path, *streams[mode], MARKER_PAIR_MODE=mode)
    validation = tg.load_validation(config)
    assert validation.tokens.tolist() == streams[mode][0].tolist() and len(validation.documents) == 4
    assert int(validation.bytes.sum()) == streams[0][1].sum() == len("The USA sent eBooks to PhDs.Iit isRed Cat")
    config = caseops_config(tmp_path, *streams[1 - mode], MARKER_PAIR_MODE=mode)
    with pytest.raises(tg.UserError) as caught:
        tg.load_validation(config)
    message = str(caught.value)
    assert message.startswith(f"MARKER_PAIR_MODE={mode}: {tmp_path} holds ") and "\n" not in message
    assert ("data/fuse.py" if mode else "set MARKER_PAIR_MODE=1") in message


def test_marker_pair_mode_wants_the_tokenizer_of_its_data(streams, tmp_path, monkeypatch):
    """Neither a tokenizer without case markers nor one with its space elsewhere will do."""
    config = caseops_config(tmp_path, [1, 20, 30], [0, 1, 1], toy_model(), MARKER_PAIR_MODE=1)
    refused = "^MARKER_PAIR_MODE=1: .*toy.model is not the CaseOps tokenizer; set CASEOPS_ENABLED=1"
    with pytest.raises(tg.UserError, match=refused):
        tg.load_validation(config)
    config = caseops_config(tmp_path, *streams[1], MARKER_PAIR_MODE=1)
    monkeypatch.setattr(tg, "SPACE_ID", tg.SPACE_ID + 1)
    with pytest.raises(tg.UserError, match=refused):
        tg.load_validation(config)


def test_without_marker_pairs_ordinary_tokenizers_may_use_every_id(tmp_path):
    """Ids 8, 9 and 10 mean something else without case markers: nothing is refused."""
    config = caseops_config(tmp_path, [1, 8, 9, 10, 4, 20], [0, 1, 1, 1, 1, 1], toy_model())
    assert tg.load_validation(config).tokens.tolist() == [1, 8, 9, 10, 4, 20]
