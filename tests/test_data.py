"""DATA: shards to rows without losing a token, and the exact number of bytes behind each target."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import QUIET, ToyData, toy_config, toy_documents, train_tokenizer, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt as tg

RUN = tg.Run()


def write_stream(folder: Path, kind: str, tokens: np.ndarray, sizes: list[int]) -> None:
    """The tokens as shards of the given sizes; the last shard takes the rest."""
    bounds = [0, *np.cumsum(sizes).tolist(), len(tokens)]
    for number, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        write_shard(folder / f"fineweb_{kind}_{number:06}.bin", tokens[begin:end])


# ---------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------


def test_shard_is_read_back_as_written(tmp_path: Path) -> None:
    """All ids, up to the largest that fits 16 bits."""
    path = write_shard(tmp_path / "fineweb_train_000000.bin", [1, 0, 65535, 7])
    assert tg.read_shard(path, 65536).tolist() == [1, 0, 65535, 7]


@pytest.mark.parametrize(
    "fault, found",
    [
        (dict(magic=7), "7, 1"),
        (dict(version=2), "20240520, 2"),
        (dict(count=4), "4 tokens"),
        (dict(count=2), "2 tokens"),
        (dict(count=-1), "-1 tokens"),
        (dict(count=0), "0 tokens"),
    ],
)
def test_wrong_headers_are_refused_naming_the_file_and_what_was_found(fault: dict, found: str, tmp_path: Path) -> None:
    """Magic, version and token count must be right; the message names the path, the numbers and a fix."""
    path = write_shard(tmp_path / "fineweb_train_000007.bin", [1, 5, 6], **fault)
    with pytest.raises(tg.UserError, match=found) as caught:
        tg.read_shard(path, 64)
    assert str(path) in str(caught.value) and "again" in str(caught.value)


def test_truncated_and_empty_files_are_refused(tmp_path: Path) -> None:
    """A file cut inside the header, inside the tokens, at an odd byte, or with bytes too many, is not read."""
    path = write_shard(tmp_path / "fineweb_train_000000.bin", range(1, 50))
    whole = path.read_bytes()
    for size in (0, 1, 1023, 1024, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(tg.UserError, match="fineweb_train_000000.bin"):
            tg.read_shard(path, 64)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(tg.UserError, match="fineweb_train_000000.bin"):
        tg.read_shard(path, 64)


def test_ids_beyond_the_vocabulary_are_refused_wherever_they_are(tmp_path: Path) -> None:
    """At the start or end of a shard when it is opened, and in the middle of a large one when it is read."""
    for position in (0, 1, 2):
        tokens = [5, 5, 5]
        tokens[position] = 64
        path = write_shard(tmp_path / "a" / "fineweb_train_000000.bin", tokens)
        with pytest.raises(tg.UserError, match="token id 64.*VOCAB_SIZE=64"):
            tg.read_shard(path, 64)
    long = np.full(2_000_010, 5, np.uint16)
    long[1_000_004] = 999
    write_shard(tmp_path / "b" / "fineweb_train_000000.bin", long)
    stream = tg.TokenStream(tmp_path / "b", "train", 64)
    assert stream.read(1_000_000, 4).tolist() == [5] * 4
    with pytest.raises(tg.UserError, match="token id 999"):
        stream.read(1_000_000, 8)


def test_missing_shards_are_refused_naming_folder_and_kind(tmp_path: Path) -> None:
    """No folder, an empty folder, and shards of the other kind only."""
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5])
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(tg.UserError, match=f"{folder}: no fineweb_train"):
            tg.TokenStream(folder, "train", 64)


def test_validation_shards_do_not_include_the_side_car(tmp_path: Path) -> None:
    """The byte side-car matches a careless pattern for validation shards; it must not be read as tokens."""
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5, 6])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 9, 9])
    assert tg.TokenStream(tmp_path, "val", 64).read(0, 3).tolist() == [1, 5, 6]
    assert tg.TokenStream(tmp_path, "val_bytes", 65536).read(0, 3).tolist() == [0, 9, 9]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_stream_is_circular_over_shards_of_any_size(tmp_path_factory: Any, data: st.DataObject) -> None:
    """read(begin, count) equals slicing the concatenated shards written out again and again."""
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    tokens = np.arange(sum(sizes)) + 2
    folder = tmp_path_factory.mktemp("shards")
    write_stream(folder, "train", tokens, sizes[:-1])
    begin, count = data.draw(st.integers(0, 200)), data.draw(st.integers(1, 120))
    stream = tg.TokenStream(folder, "train", 64)
    assert len(stream) == len(tokens)
    assert stream.read(begin, count).tolist() == [int(tokens[p % len(tokens)]) for p in range(begin, begin + count)]


# ---------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [1, 1, 1], [5, 60, 3, 64, 200], [100] * 6], ids=["one", "tiny", "mixed", "even"])
def test_rows_tile_the_stream_without_losing_or_repeating_a_token(sizes: list[int], tmp_path: Path) -> None:
    """Over one epoch each token is an input once and a target once, also for shards shorter than a row."""
    config = toy_config(DATA_PATH=tmp_path)  # rows of 64 tokens
    tokens = np.arange(64 * 11) % 60 + 2  # a whole number of rows, so that an epoch ends with one
    tokens[::37] = tg.BOS_ID
    write_stream(tmp_path, "train", tokens, sizes)
    stream = tg.TokenStream(tmp_path, "train", 64)
    rows = [tg.training_row(stream, number, config, RUN) for number in range(22)]
    inputs = torch.cat([row.inputs[0] for row in rows]).tolist()
    targets = torch.cat([row.targets[0] for row in rows]).tolist()
    twice = np.tile(tokens, 2).tolist()
    assert inputs == twice and targets == twice[1:] + twice[:1]
    assert all(row.inputs.shape == row.targets.shape == (1, 64) for row in rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([1, 5, 5, 5, 6]), min_size=65, max_size=65), st.integers(2, 64))
def test_segments_begin_at_the_row_start_and_every_bos_and_are_cut(
    tmp_path_factory: Any, tokens: list[int], limit: int
) -> None:
    """The segment table equals a walk over the row: a new segment at BOS or after TRAIN_SEQ_LEN tokens."""
    folder = tmp_path_factory.mktemp("shards")
    write_stream(folder, "train", np.array(tokens), [])
    config = toy_config(DATA_PATH=folder, TRAIN_SEQ_LEN=limit)
    row = tg.training_row(tg.TokenStream(folder, "train", 64), 0, config, RUN)
    starts, positions = [], []
    for t, token in enumerate(tokens[:64]):
        if t == 0 or token == tg.BOS_ID or t - starts[-1] == limit:
            starts.append(t)
        positions.append(t - starts[-1])
    table = row.segments.cu_seqlens.tolist()
    assert table[: len(starts)] == starts and set(table[len(starts) :]) == {64}
    assert row.segments.positions.tolist() == positions and row.segments.max_seqlen == limit


def test_windows_of_a_plain_stream_ignore_documents(tmp_path: Path) -> None:
    """VARLEN_ATTN=0: segments are TRAIN_SEQ_LEN tokens whatever stands there, and positions restart only with them."""
    tokens = np.full(200, 5)
    tokens[[0, 3, 40, 41, 100]] = tg.BOS_ID
    write_stream(tmp_path, "train", tokens, [])
    config = toy_config(DATA_PATH=tmp_path, VARLEN_ATTN=0)
    row = tg.training_row(tg.TokenStream(tmp_path, "train", 64), 0, config, RUN)
    assert row.segments.cu_seqlens.tolist() == [0, 32, 64]
    assert row.segments.positions.tolist() == [*range(32), *range(32)]
    assert row.inputs[0].tolist() == tokens[:64].tolist() and row.targets[0].tolist() == tokens[1:65].tolist()


def coprime_stream(folder: Path, total: int, sizes: list[int], **changes: Any) -> tuple[tg.TokenStream, tg.Config]:
    """A stream for the coprime loader whose ids are their own positions; 65,535 stands at 1, which would be BOS."""
    tokens = np.arange(total)
    tokens[1] = 65_535
    write_stream(folder, "train", tokens, sizes)
    settings = dict(DATA_PATH=folder, VOCAB_SIZE=65_536, LOADER="coprime") | changes
    return tg.TokenStream(folder, "train", 65_536), toy_config(**settings)


def windows_of(row: tg.Row, total: int) -> list[int]:
    """Where the windows of a row begin in a stream of positions; fails unless each window is a piece of the stream."""
    where = row.inputs[0].numpy().copy()
    where[where == 65_535] = 1
    pieces = where.reshape(-1, 32)
    assert ((pieces - pieces[:, :1] - np.arange(32)) % total == 0).all()
    following = row.targets[0].numpy().copy()
    following[following == 65_535] = 1
    assert ((following - where) % total == 1).all()
    return pieces[:, 0].tolist()


def test_coprime_epochs_hold_every_token_once_as_a_target(tmp_path: Path) -> None:
    """40 windows in 20 rows are an epoch: whatever its phase, each token of the stream is a target exactly once."""
    total = 40 * 32
    stream, config = coprime_stream(tmp_path, total, [5, 700])
    phases = set()
    for epoch in range(6):
        rows = [tg.training_row(stream, number, config, RUN) for number in range(20 * epoch, 20 * epoch + 20)]
        targets = torch.cat([row.targets[0] for row in rows])
        assert len(targets) == total and sorted(targets.tolist()) == sorted(stream.read(0, total).tolist())
        phases |= {begin % 32 for row in rows for begin in windows_of(row, total)}
    assert len(phases) == 6  # each epoch cuts the stream elsewhere, so no token always stands at a window's start


def test_coprime_epochs_lose_less_than_one_window(tmp_path: Path) -> None:
    """A stream that is no whole number of windows: no token twice in an epoch, fewer than TRAIN_SEQ_LEN left out."""
    total = 40 * 32 + 31
    stream, config = coprime_stream(tmp_path, total, [])
    for epoch in range(3):
        rows = [tg.training_row(stream, number, config, RUN) for number in range(20 * epoch, 20 * epoch + 20)]
        targets = torch.cat([row.targets[0] for row in rows]).tolist()
        assert len(set(targets)) == len(targets) == 40 * 32
    tiny, config = coprime_stream(tmp_path / "tiny", 20, [])  # shorter than one window
    assert windows_of(tg.training_row(tiny, 3, config, RUN), 20)


def test_coprime_rows_follow_from_their_number_alone(tmp_path: Path) -> None:
    """In any order, from another stream object, cut into other shards under another path: the same rows; no seed."""
    stream, config = coprime_stream(tmp_path / "a", 1500, [])
    again, other = coprime_stream(tmp_path / "b", 1500, [3, 999], SEED=99)
    for number in (37, 2, 37, 400, 0):
        first, second = tg.training_row(stream, number, config, RUN), tg.training_row(again, number, other, RUN)
        assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)


def test_coprime_rows_mix_distant_texts_and_epochs_differ(tmp_path: Path) -> None:
    """The windows of a row are seldom neighbours, and no two epochs visit the stream in the same order."""
    total = 200 * 32
    stream, config = coprime_stream(tmp_path, total, [], TRAIN_BATCH_TOKENS=512, ROW_TOKENS=256)
    epochs = [
        [
            windows_of(tg.training_row(stream, number, config, RUN), total)
            for number in range(25 * epoch, 25 * epoch + 25)
        ]
        for epoch in range(4)
    ]
    gaps = np.diff([row for epoch in epochs for row in epoch], axis=1) % total
    assert (np.minimum(gaps, total - gaps) > 32).mean() > 0.8
    orders = [tuple(begin // 32 for row in epoch for begin in row) for epoch in epochs]
    assert len(set(orders)) == 4 and len({tuple(np.diff(order) % 200)[:8] for order in orders}) > 1


@pytest.mark.parametrize("varlen", [0, 1])
def test_coprime_windows_are_segments(varlen: int, tmp_path: Path) -> None:
    """Attention never crosses from one window into the next; with VARLEN_ATTN it also stops at documents."""
    stream, config = coprime_stream(tmp_path, 1280, [], VARLEN_ATTN=varlen)
    tokens = stream.shards[0].copy()
    tokens[5::50] = tg.BOS_ID
    stream.shards[0] = tokens
    for number in range(20):
        row = tg.training_row(stream, number, config, RUN)
        starts = {0, 32} | (
            {t for t, token in enumerate(row.inputs[0].tolist()) if token == tg.BOS_ID} if varlen else set()
        )
        table = row.segments.cu_seqlens.unique().tolist()
        assert table == sorted(starts | {64})


def test_segment_table_of_the_published_example() -> None:
    """BOS at 0, 100, 5000 in 9000 tokens with limit 2048: starts 0, 100, 2148, 4196, 5000, 7048, then 9000."""
    lengths = tg.cut_lengths(np.diff([0, 100, 5000, 9000]), 2048)
    segments = tg.pack_segments(lengths, 2048, RUN)
    table = segments.cu_seqlens
    assert table.dtype == torch.int32 and table.tolist() == [0, 100, 2148, 4196, 5000, 7048, 9000]
    assert int(table.diff().max()) == 2048


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_cut_lengths_equals_a_slow_loop(lengths: list[int], limit: int) -> None:
    """Every length becomes pieces of the limit and a non-empty rest."""
    slow = []
    for length in lengths:
        while length > limit:
            slow.append(limit)
            length -= limit
        slow.append(length)
    assert tg.cut_lengths(np.array(lengths), limit).tolist() == slow


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300))
@example([1])
@example([16, 17, 1, 50])
@example([1] * 255)
@example([1] * 256)
def test_packing_reaches_every_token_exactly_once(lengths: list[int]) -> None:
    """Table, positions, and the CPU batches: each token sits once in a batch, in order behind its segment's start."""
    segments, total = tg.pack_segments(np.array(lengths), 50, RUN), sum(lengths)
    begins = np.cumsum([0, *lengths])
    assert segments.cu_seqlens.tolist() == begins.tolist()
    assert segments.positions.tolist() == [i for length in lengths for i in range(length)]
    flat = torch.cat([index.flatten() for index in segments.gather])
    assert flat[segments.scatter].tolist() == list(range(total)) and len(set(segments.scatter.tolist())) == total
    place = {int(p): token for token, p in enumerate(segments.scatter)}
    offset = 0
    for index in segments.gather:
        for row in index.tolist():
            own = [place[offset + column] for column in range(len(row)) if offset + column in place]
            begin = own[0]
            assert own == row[: len(own)] == list(range(begin, begin + len(own)))
            assert begin in begins and begin + len(own) in begins  # a whole segment, padding only behind it
            offset += len(row)


@pytest.mark.parametrize("loader", ["stream", "coprime"])
def test_rows_of_a_step_are_dealt_to_ranks_without_overlap(loader: str, toy_data: ToyData, tmp_path: Path) -> None:
    """1, 2, 3 or 5 ranks together have the same four rows of each step, each row once; some ranks may have none."""
    config = toy_data.config(RUNS_DIR=tmp_path, LOADER=loader)
    alone = tg.Trainer(config, tg.Run(), QUIET)
    key = lambda row: (
        tuple(row.inputs[0].tolist()),
        tuple(row.targets[0].tolist()),
        tuple(row.segments.cu_seqlens.tolist()),
    )
    for step in (0, 1, 40):
        whole = Counter(map(key, alone.step_rows(step)))
        assert sum(whole.values()) == 4
        for world_size in (2, 3, 5):
            dealt: Counter = Counter()
            for rank in range(world_size):
                alone.run = tg.Run(rank, world_size)
                dealt += Counter(map(key, alone.step_rows(step)))
            alone.run = tg.Run()
            assert dealt == whole


def test_data_order_does_not_depend_on_the_seed(toy_data: ToyData, tmp_path: Path) -> None:
    """Another SEED reads the same rows."""
    first, second = (
        tg.Trainer(toy_data.config(RUNS_DIR=tmp_path, SEED=s), tg.Run(), QUIET).step_rows(3) for s in (1, 2)
    )
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------

TEXTS = [
    "hello world and hello again",
    "grün über ÅÄÖ",
    "1234 a-b_c",
    "naïve café 漢字 mixed",
    "tabs  and   runs    of spaces",
]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, sentencepiece.SentencePieceProcessor]:
    """Byte-fallback tokenizers of every kind that matters for counting."""
    folder = tmp_path_factory.mktemp("tokenizers")
    sentences = toy_documents(120, seed=5) + TEXTS * 8
    spaced = [text.replace(" ", "    ") for text in sentences]
    common = dict(byte_fallback=True, character_coverage=0.99)
    keep = dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
    kinds = {
        "challenge": (sentences, 330, dict(split_digits=True)),
        "dummy prefix": (sentences, 330, dict(add_dummy_prefix=True)),
        "runs of spaces": (spaced, 340, keep),
        "no space piece": (["".join(text.split()) for text in sentences], 320, {}),
        "suffix": (sentences, 330, dict(treat_whitespace_as_suffix=True)),
    }
    loaded = {}
    for name, (texts, size, options) in kinds.items():
        path = train_tokenizer(folder / f"{name}.model", texts, size, **common | options)
        loaded[name] = sentencepiece.SentencePieceProcessor(str(path))
    has_space = {name: not t.is_unknown(t.piece_to_id("▁")) for name, t in loaded.items()}
    assert has_space["challenge"] and not has_space["no space piece"]
    pieces = [loaded["runs of spaces"].id_to_piece(i) for i in range(loaded["runs of spaces"].vocab_size())]
    assert any(piece.startswith("▁▁") for piece in pieces)
    return loaded


def counted(tokenizer: sentencepiece.SentencePieceProcessor, documents: list[str]) -> tuple[list[int], np.ndarray]:
    """Tokens of documents behind BOS, and the bytes that each one counts."""
    tokens = [i for text in documents for i in [tg.BOS_ID, *tokenizer.encode(text)]]
    return tokens, tg.target_bytes(np.array(tokens), tg.byte_table(tokenizer))


def text_bytes(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> int:
    """UTF-8 length of a text as the tokenizer sees it; a space before its first character is free."""
    seen = tokenizer.normalize(text).replace("▁", " ")
    return len(seen.removeprefix(" ").encode())


NAMES = ["challenge", "dummy prefix", "runs of spaces", "no space piece", "suffix"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30)
WORDS = st.lists(
    st.sampled_from(["hello", "world", " ", "  ", "    ", "é", "漢", "a", "1", "\n", "."]), max_size=20
).map("".join)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=120)
@given(documents=st.lists(UNICODE | WORDS, min_size=1, max_size=4))
@example(documents=["hello world", "", "é 漢字  x", " leading", "trailing "])
@example(documents=["â", "\u2582 \u2580", "▂", "€ 5"])  # share bytes with the space marker
@example(documents=["\ue001", "a\ue004b"])  # case markers only where the tokenizer has them
def test_counted_bytes_are_those_of_the_text(tokenizers: dict, name: str, documents: list[str]) -> None:
    """Any Unicode text: the bytes of all targets sum to the UTF-8 length of the normalised documents."""
    tokenizer = tokenizers[name]
    tokens, counts = counted(tokenizer, documents)
    assert counts[0] == 0 and (counts >= 0).all() and len(counts) == len(tokens)
    assert int(counts.sum()) == sum(text_bytes(tokenizer, text) for text in documents)
    assert tg.decoded_bytes(np.array(tokens), tokenizer) == int(counts.sum())


def test_the_independent_count_of_bytes_begins_anywhere(toy_data: ToyData) -> None:
    """Of any stretch of the stream, whose first token is no target: as many bytes as the table gives."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(toy_data.tokenizer))
    table = tg.byte_table(tokenizer)
    for begin in range(40):
        tokens = toy_data.val_tokens[begin : begin + 200]
        assert tg.decoded_bytes(tokens, tokenizer) == int(tg.target_bytes(tokens, table).sum())


def test_each_kind_of_piece_costs_its_own_bytes(tokenizers: dict) -> None:
    """Control ids 0; byte pieces 1; words with and without the leading space; the lone space after BOS is free."""
    tokenizer = tokenizers["challenge"]
    table = tg.byte_table(tokenizer)
    space, byte = tokenizer.piece_to_id("▁"), tokenizer.piece_to_id("<0xE6>")
    word = next(
        i
        for i in range(tokenizer.vocab_size())
        if len(tokenizer.id_to_piece(i)) > 2 and tokenizer.id_to_piece(i)[0] == "▁"
    )
    length = len(tokenizer.id_to_piece(word)) - 1
    stream = np.array([1, word, word, 1, space, space, byte, 2, word, 3, word, 0, byte, 1])
    expected = [0, length, length + 1, 0, 0, 1, 1, 0, length, 0, length, 0, 1, 0]
    assert tg.target_bytes(stream, table).tolist() == expected


def test_space_spelled_in_byte_pieces_counts_one_byte(tokenizers: dict) -> None:
    """E2 96 81 is one byte, none after BOS, on whichever of its targets; a longer run shares no bytes twice."""
    tokenizer = tokenizers["no space piece"]
    table = tg.byte_table(tokenizer)
    a, b, c, d = (tokenizer.piece_to_id(f"<0x{byte}>") for byte in ("E2", "96", "81", "82"))
    count = lambda tokens: int(tg.target_bytes(np.array(tokens), table).sum())
    assert count([1, a, b, c]) == 0 and count([1, d, a, b, c]) == 2
    assert count([1, d, a, b, c, a, b, c]) == 3 and count([1, d, a, b, d]) == 4 and count([1, a]) == 1


def test_inner_space_markers_count_one_byte_each(tokenizers: dict) -> None:
    """A piece of several spaces costs as many bytes as spaces, one fewer directly behind BOS."""
    tokenizer = tokenizers["runs of spaces"]
    table = tg.byte_table(tokenizer)
    several = next(
        i
        for i in range(tokenizer.vocab_size())
        if set(tokenizer.id_to_piece(i)) == {"▁"} and len(tokenizer.id_to_piece(i)) > 1
    )
    n, x = len(tokenizer.id_to_piece(several)), tokenizer.piece_to_id("<0x41>")
    assert tg.target_bytes(np.array([1, several, x, several]), table).tolist() == [0, n - 1, 1, n]


def test_validation_bytes_are_those_of_the_documents(toy_data: ToyData) -> None:
    """load_validation counts exactly the bytes of the toy validation texts."""
    validation = tg.load_validation(toy_data.config())
    tokenizer = sentencepiece.SentencePieceProcessor(str(toy_data.tokenizer))
    expected = sum(text_bytes(tokenizer, text) for text in toy_documents(26, seed=2))
    assert int(validation.bytes.sum()) == expected and len(validation.documents) == 26
    assert validation.tokens.tolist() == toy_data.val_tokens.tolist()


def test_side_car_replaces_the_byte_table(toy_data: ToyData, tmp_path: Path) -> None:
    """With fineweb_val_bytes shards their numbers are used as they are; one of another length is refused."""
    config = toy_data.config(DATA_PATH=tmp_path)
    counts = np.random.default_rng(0).integers(0, 300, len(toy_data.val_tokens))
    write_stream(tmp_path, "val", toy_data.val_tokens, [100])
    write_stream(tmp_path, "val_bytes", counts, [70, 90])
    assert tg.load_validation(config).bytes.tolist() == counts.tolist()
    write_stream(tmp_path, "val_bytes", counts[:-1], [70, 90])
    with pytest.raises(tg.UserError, match="side-car"):
        tg.load_validation(config)


def test_case_operators_without_a_side_car_are_refused(tmp_path: Path) -> None:
    """The table would count case markers as text, so a CaseOps tokenizer needs the side-car."""
    operators = ["\ue001", "\ue002", "\ue003", "\ue004"]
    path = train_tokenizer(tmp_path / "caseops.model", toy_documents(200, seed=3), 64, user_defined_symbols=operators)
    size = sentencepiece.SentencePieceProcessor(str(path)).vocab_size()
    config = toy_config(DATA_PATH=tmp_path, TOKENIZER_PATH=path, VOCAB_SIZE=size)
    tokens = np.array([1, 5, 30, 31, 1, 4, 30])
    write_stream(tmp_path, "val", tokens, [])
    with pytest.raises(tg.UserError, match="CaseOps.*fineweb_val_bytes"):
        tg.load_validation(config)
    write_stream(tmp_path, "val_bytes", np.array([0, 0, 3, 1, 0, 0, 3]), [])
    assert int(tg.load_validation(config).bytes.sum()) == 7


def test_case_operators_have_their_own_dataset_and_tokenizer() -> None:
    """CASEOPS_ENABLED picks the published export's names; explicit paths win."""
    config = tg.load_config({"CASEOPS_ENABLED": "1", "DATA_DIR": "d"})[0]
    assert config.dataset_dir == Path("d/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved")
    assert config.tokenizer_file == Path("d/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    plain = tg.load_config({"DATA_DIR": "d"})[0]
    assert plain.dataset_dir == Path("d/datasets/fineweb10B_sp8192")
    assert plain.tokenizer_file == Path("d/tokenizers/fineweb_8192_bpe.model")
    own = tg.load_config({"CASEOPS_ENABLED": "1", "DATA_PATH": "x", "TOKENIZER_PATH": "y"})[0]
    assert (own.dataset_dir, own.tokenizer_file) == (Path("x"), Path("y"))


def test_tokenizer_of_another_size_is_refused(toy_data: ToyData) -> None:
    """The message names the setting, the file and both sizes."""
    with pytest.raises(tg.UserError, match="VOCAB_SIZE=128.*toy.model has 64"):
        tg.load_tokenizer(toy_data.config(VOCAB_SIZE=128))
