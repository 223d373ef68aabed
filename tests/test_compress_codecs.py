"""COMPRESS, the way into the file: row orders, codecs, and artifacts whose header is not to be trusted."""

import dataclasses
import json
import random
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, short_coder_states, toy_config

import train_gpt as tg

CPU = torch.device("cpu")
CODECS = [name for name in tg.CODECS if name != "lrzip" or shutil.which("lrzip")]  # a stand-in for lrzip: below
LAYERS = range(4)


@pytest.fixture(autouse=True)
def many_states_of_the_coder() -> Iterator[None]:
    with short_coder_states():
        yield


# ---------------------------------------------------------------------------------------------------------------
# Row orders
# ---------------------------------------------------------------------------------------------------------------


def slow_order(codes: np.ndarray) -> list[int]:
    chain, left = [0], list(range(1, len(codes)))
    while left:
        gaps = [int(np.abs(codes[i].astype(int) - codes[chain[-1]].astype(int)).sum()) for i in left]
        chain.append(left.pop(gaps.index(min(gaps))))
    return chain


@pytest.mark.parametrize("rows, cols, low, high", [(1, 5, -3, 3), (2, 1, 0, 0), (60, 3, -2, 2), (40, 30, -128, 127)])
def test_row_order_is_the_greedy_chain(rows: int, cols: int, low: int, high: int) -> None:
    """Equal to a double loop, with duplicates and ties, and with differences up to 255."""
    codes = np.random.default_rng(rows).integers(low, high, (rows, cols), endpoint=True).astype(np.int8)
    order = tg.row_order(codes)
    assert order.dtype == np.uint16 and order.tolist() == slow_order(codes)
    assert tg.row_order(np.asfortranarray(codes)).tolist() == order.tolist()


def test_row_order_survives_leaving_out_used_rows() -> None:
    """Beyond two rounds of 256 rows it is still the chain, and a permutation."""
    codes = np.random.default_rng(0).integers(-2, 2, (600, 4), endpoint=True).astype(np.int8)
    order = tg.row_order(codes)
    assert order.tolist() == slow_order(codes) and sorted(order.tolist()) == list(range(600))


def test_row_order_does_not_overflow() -> None:
    """The largest possible distance of 2048 columns, 522,240, is not taken for a small one."""
    codes = np.zeros((3, 2048), np.int8)
    codes[0], codes[1], codes[2] = -128, 127, 0
    assert tg.row_order(codes).tolist() == [0, 2, 1]


# ---------------------------------------------------------------------------------------------------------------
# Codecs
# ---------------------------------------------------------------------------------------------------------------


def codes(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(rows).normal(size=(rows, cols), scale=3).round().astype(np.int8)


def decoded(codec: tg.Codec, packed: bytes | memoryview, *shapes: tuple[int, ...], dtype: Any = np.int8) -> list[np.ndarray]:
    arrays = [np.zeros(shape, dtype) for shape in shapes]
    codec.decode(packed, arrays)
    return arrays


ARRAYS = {
    "empty": [np.zeros((0, 5), np.int8)],
    "one": [np.ones((1, 1), np.int8)],
    "several": [codes(7, 3), codes(700, 100), np.zeros((4, 0), np.int8), codes(7, 3)],
    "a transposed view": [codes(40, 30).T],
    "constant": [np.zeros((300, 1000), np.int8)],
    "random": [np.random.default_rng(0).integers(-127, 128, (50, 100)).astype(np.int8)],
    "halves": [codes(30, 4).astype(np.float16) / 7, np.float16([-1, np.inf, 2.0**-24]), np.zeros(0, np.float16)],
    "orders": [np.random.default_rng(0).permutation(65_536).astype(np.uint16)],
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("name", CODECS)
def test_codecs_give_back_every_number(name: str, kind: str) -> None:
    """Empty, tiny, compressible, constant and random arrays; the packed bytes may be a view into a file."""
    codec, arrays = tg.CODECS[name], ARRAYS[kind]
    if name == "rans" and arrays[0].dtype != np.int8:
        with pytest.raises(ValueError, match="int8"):
            codec.encode(arrays)
        return
    packed = codec.encode(arrays)
    for data in (packed, memoryview(b"head" + packed)[4:]):
        found = decoded(codec, data, *(array.shape for array in arrays), dtype=arrays[0].dtype)
        assert all(np.array_equal(a, b) for a, b in zip(found, arrays, strict=True))
    assert name == "lrzip" or codec.encode(arrays) == packed  # an artifact repeats to the byte


def test_bytes_of_codes_run_down_the_columns_and_low_bytes_come_first() -> None:
    assert tg.join_arrays([np.int8([[1, 2], [3, 4]]), np.int8([[5, 6]])]) == bytes([1, 3, 2, 4, 5, 6])
    assert tg.join_arrays([np.uint16([0x0102, 0x0304]), np.uint16([0x0506])]) == bytes([2, 4, 6, 1, 3, 5])
    assert tg.join_arrays([np.float16([[1, 2], [3, 4]])])[4:] == bytes([0x3C, 0x40, 0x42, 0x44])


@pytest.mark.parametrize("name", CODECS)
def test_codecs_refuse_other_sizes_and_cut_data(name: str) -> None:
    """A size that is one off, data cut anywhere, data with something behind it, no data, foreign data."""
    codec, shape = tg.CODECS[name], (50, 100)
    packed = codec.encode([codes(*shape)])
    bad = [packed[:cut] for cut in (0, 1, 5, 12, 24, len(packed) // 2, len(packed) - 5, len(packed) - 1)]
    bad += [packed + b"\0", packed + packed, b"\0" * 50, b"\xff" * 50, packed[::-1]]
    for wrong in bad if name != "lrzip" else bad[:8]:  # lrzip reads no further than its data
        with pytest.raises(ValueError):
            decoded(codec, wrong, shape)
    for size in (0, 1, 4999, 5001, 10**8):
        with pytest.raises(ValueError):
            decoded(codec, packed, (1, size))
    for empty in (b"", b"\0"):
        if (name, empty) not in (("brotli", b"\0"), ("rans", b"")):
            with pytest.raises(ValueError):
                decoded(codec, empty, (0, 5))


@pytest.mark.parametrize("name", CODECS)
def test_codecs_never_pass_changed_bits_as_other_data(name: str) -> None:
    """A flipped bit is refused, or it changed nothing. brotli has no checksum: there only the size is sure."""
    codec, array, chance, refused = tg.CODECS[name], codes(30, 100), random.Random(1), 0
    packed = codec.encode([array])
    tries = 300 if name != "lrzip" else 8
    for _ in range(tries):
        wrong = bytearray(packed)
        wrong[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
        try:
            assert np.array_equal(decoded(codec, bytes(wrong), (30, 100))[0], array) or name == "brotli"
        except ValueError:
            refused += 1
    assert refused > tries * (0.2 if name == "brotli" else 0.5)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("lrzip", "rans")])
def test_codecs_stop_at_the_size_they_were_told(name: str) -> None:
    """16 MB behind a few bytes are not unpacked when 1,000 are expected. (rans: test_memory_follows_the_shapes.)"""
    packed = tg.CODECS[name].encode([np.zeros((1, 2**24), np.int8)])
    tracemalloc.start()
    with pytest.raises(ValueError):
        decoded(tg.CODECS[name], packed, (1, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_lrzip_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program the codec says so; nothing falls back to another one."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="lrzip is not installed"):
        tg.CODECS["lrzip"].encode([codes(3, 4)])


STAND_IN = """#!{python} -SE
# Takes what lrzip is given, and stores instead of compressing: magic, version, size, ten more bytes, the data.
import sys
source, result = sys.argv[-1], sys.argv[sys.argv.index("-o") + 1]
data = open(source, "rb").read()
if sys.argv[1] != "-d":
    assert sys.argv[1:4] == ["-z", "-L", "9"], sys.argv
    data = b"LRZI" + bytes([0, 6]) + len(data).to_bytes(8, "little") + bytes(10) + data
elif data.endswith(b"damaged"):
    sys.exit(1)
else:
    data = data[24:]
open(result, "wb").write(data)
"""


@pytest.fixture
def lrzip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the program, to test the code around it everywhere."""
    program = tmp_path / "bin" / "lrzip"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_lrzip_is_trusted_with_nothing_but_its_data(lrzip: None) -> None:
    """What the program makes is taken at its announced size only; another header, size or exit status is refused."""
    data = codes(10, 100).tobytes()
    packed = tg.pack_lrzip(data)
    assert tg.unpack_lrzip(packed, 1000) == data == tg.unpack_lrzip(memoryview(packed), 1000)
    for wrong, size in (
        (packed, 999),
        (packed, 10**9),
        (packed[:-1], 1000),
        (packed + b"\0", 1000),
        (b"LRZX" + packed[4:], 1000),
        (packed[:20], 1000),
        (b"", 0),
        (packed[:-7] + b"damaged", 1000),
    ):
        with pytest.raises(ValueError):
            tg.unpack_lrzip(wrong, size)


# ---------------------------------------------------------------------------------------------------------------
# Artifacts
# ---------------------------------------------------------------------------------------------------------------


def saved(folder: Path, **changes: Any) -> tuple[tg.Config, dict[str, tg.Parts], Path]:
    """A random toy model in a file: settings, stored arrays, path."""
    config = toy_config(QUANT_SCHEME="intn_row", **changes)
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    stored, path = tg.quantize(arrays, config, CPU), folder / "artifact.bin"
    assert tg.save_artifact(path, stored, config) == path.stat().st_size
    return config, stored, path


@pytest.mark.parametrize("compressor", tg.FIELDS["compressor"].metadata["choices"])
def test_artifacts_of_every_compressor_give_back_the_same_weights(compressor: str, tmp_path: Path) -> None:
    """The codec travels in the header; sorted rows, corrections and fp16 matrices come back in their place."""
    changes = dict(LQER_RANK=2, LQER_TOP_K=2, FP16_KEEP_NAME_PATTERNS="blocks.{last}.attn.k", BIGRAM_VOCAB_SIZE=9)
    config, stored, path = saved(tmp_path, COMPRESSOR=compressor, **changes)
    expected, loaded = tg.dequantize(stored, config), tg.load_artifact(path, config)
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
    codec = tg.read_container(path)[0]["codec"]
    assert codec == (compressor if compressor != "pergroup" else "lrzip" if shutil.which("lrzip") else "brotli")
    other = "zlib" if compressor != "zlib" else "zstd"
    with pytest.raises(tg.UserError, match="COMPRESSOR"):
        tg.load_artifact(path, dataclasses.replace(config, compressor=other))


def test_pergroup_uses_lrzip_where_it_is_installed(
    lrzip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file says so, and where the program is missing then, the error names it."""
    config, stored, path = saved(tmp_path, COMPRESSOR="pergroup")
    assert tg.read_container(path)[0]["codec"] == "lrzip"
    expected, loaded = tg.dequantize(stored, config), tg.load_artifact(path, config)
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(tg.UserError, match="lrzip is not installed"):
        tg.load_artifact(path, config)


def test_pergroup_sorts_rows_of_the_embedding_the_queries_and_the_mlp(tmp_path: Path) -> None:
    """Codes of these streams are stored along the chain, with its order; the others stay as they are."""
    config, stored, _ = saved(tmp_path, COMPRESSOR="pergroup")
    unsorted = saved(tmp_path, COMPRESSOR="brotli")[1]
    wanted = {f"blocks.{i}.{kind}" for i in LAYERS for kind in ("attn.q", "mlp.up")} | {"tok_emb.weight"}
    assert {entry.owner for entry in tg.artifact_table(config) if entry.part == "order"} == wanted
    for name, parts in unsorted.items():
        if name in wanted:
            order = slow_order(parts["codes"])
            parts = parts | {"codes": parts["codes"][order], "order": order}
        assert stored[name].keys() == parts.keys()
        assert all(np.array_equal(stored[name][part], array) for part, array in parts.items()), name
        assert np.array_equal(tg.restore(stored[name]), tg.restore(unsorted[name]))


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 1, 2, 4], [1, 2, 3, 65_535], [0, 0, 0, 0]])
def test_row_orders_that_are_no_permutation_are_refused(order: list[int], tmp_path: Path) -> None:
    """A row named twice, or one that does not exist: no weights, but an error that names the file."""
    with pytest.raises(ValueError, match="row order is no permutation"):
        tg.unsort_rows(np.zeros((4, 3), np.int8), np.array(order, np.uint16))
    config, stored, path = saved(tmp_path, COMPRESSOR="pergroup")
    stored["blocks.2.attn.q"]["order"] = np.array((order * 8)[:32], np.uint16)
    tg.save_artifact(path, stored, config)
    with pytest.raises(tg.UserError, match="artifact.bin: damaged artifact .a row order"):
        tg.load_artifact(path, config)


BAD_HEADERS = {
    "codec": ["gzip", "", "BROTLI", "pergroup", None, 3, True, ["brotli"], {}, "brotli " * 99],
    "corrected": [
        None, 3, True, "tok_emb.weight", {"tok_emb.weight": 1}, [3], [None], [["tok_emb.weight"]], ["tok_emb"],
        ["tok_emb.weight", "tok_emb.weight"], ["blocks.4.attn.q"], ["blocks.0.attn_gate_w"], ["blocks.0.attn_scale"],
        ["blocks.0.attn.q.scale"], ["blocks.3.attn.k"], ["x" * 9999],
    ],
}  # fmt: skip


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD_HEADERS.items() for value in values])
def test_odd_headers_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    """Unknown codecs, corrected names that are no quantised matrix or occur twice: one line that names the file."""
    patterns = dict(FP16_KEEP_NAME_PATTERNS="blocks.{last}.attn.k")
    config, _, path = saved(tmp_path, LQER_RANK=2, LQER_TOP_K=0, **patterns)
    meta, blobs = tg.read_container(path)
    tg.write_container(path, meta | {key: value}, blobs)
    with pytest.raises(tg.UserError) as caught:
        tg.load_artifact(path, config)
    message = str(caught.value)
    assert str(path) in message and "damaged" in message and "\n" not in message and len(message) < 500
    tg.write_container(path, {name: entry for name, entry in meta.items() if name != key}, blobs)
    with pytest.raises(tg.UserError, match="damaged"):
        tg.load_artifact(path, config)
    tg.write_container(path, meta, blobs)
    tg.load_artifact(path, config)


def test_corrections_are_refused_where_there_are_none(tmp_path: Path) -> None:
    """With LQER_RANK=0 the list of corrected matrices must be empty, even if streams for them are there. With a rank the
    streams must be there, and no matrix may be named twice."""
    names = ["tok_emb.weight"]
    for rank in (0, 2):
        config, stored, path = saved(tmp_path, LQER_RANK=rank, LQER_TOP_K=0)
        meta, blobs = tg.read_container(path)
        tg.write_container(path, meta | {"corrected": names}, blobs)
        with pytest.raises(tg.UserError, match="damaged"):
            tg.load_artifact(path, config)
    config, stored, path = saved(tmp_path, LQER_RANK=0)
    for entry in tg.artifact_table(config, tuple(names)):
        stored[entry.owner].setdefault(entry.part, np.zeros(entry.shape, entry.dtype))
    tg.save_artifact(path, stored, config)
    assert tg.read_container(path)[0]["corrected"] == names
    with pytest.raises(tg.UserError, match="corrected matrices"):
        tg.load_artifact(path, config)
    config, _, path = saved(tmp_path, LQER_RANK=2, LQER_TOP_K=1)
    meta, blobs = tg.read_container(path)
    tg.write_container(path, meta | {"corrected": meta["corrected"] * 2}, blobs)
    with pytest.raises(tg.UserError, match="corrected matrices"):
        tg.load_artifact(path, config)


def test_random_changes_of_the_header_never_crash(tmp_path: Path) -> None:
    """Any value at any place of the header's meta gives the weights or a user error."""
    config, stored, path = saved(tmp_path, LQER_RANK=2, LQER_TOP_K=2, COMPRESSOR="pergroup")
    meta, blobs = tg.read_container(path)
    expected, chance, refused = tg.dequantize(stored, config), random.Random(0), 0
    values = [None, 0, -1, 1e300, "", "zlib", [], {}, [[]], ["tok_emb.weight"], True, "x" * 1000, {"a": [1]}]
    for _ in range(60):
        changed = json.loads(json.dumps(meta))
        place: Any = changed if chance.random() < 0.5 else changed["model"]
        place[chance.choice(list(place))] = chance.choice(values)
        tg.write_container(path, changed, blobs)
        try:
            loaded = tg.load_artifact(path, config)
            assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
        except tg.UserError:
            refused += 1
    assert refused > 40
