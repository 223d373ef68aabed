"""COMPRESS, the way into the file: row orders, codecs, and artifacts whose header is not to be trusted."""

import dataclasses
import json
import random
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model, toy_config

import train_gpt as tg

CPU = torch.device("cpu")
CODECS = [name for name in tg.CODECS if name != "lrzip" or shutil.which("lrzip")]  # a stand-in for lrzip: below
LAYERS = range(4)

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


def code_bytes(count: int, seed: int = 0) -> bytes:
    """Bytes such as a stream of codes has."""
    return np.random.default_rng(seed).normal(size=count, scale=3).round().astype(np.int8).tobytes()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize(
    "data", [b"", b"\0", code_bytes(3), code_bytes(70_001), bytes(300_000), random.Random(0).randbytes(5000)]
)
def test_codecs_give_back_every_byte(name: str, data: bytes) -> None:
    """Empty, tiny, compressible, constant and random data; the packed bytes may be a view into a file."""
    compress, decompress = tg.CODECS[name]
    packed = compress(data)
    assert decompress(packed, len(data)) == data
    assert decompress(memoryview(b"head" + packed)[4:], len(data)) == data
    assert name == "lrzip" or compress(data) == packed  # an artifact repeats to the byte


@pytest.mark.parametrize("name", CODECS)
def test_codecs_refuse_other_sizes_and_cut_data(name: str) -> None:
    """A size that is one off, data cut anywhere, data with something behind it, no data, foreign data."""
    compress, decompress = tg.CODECS[name]
    data = code_bytes(5000)
    packed = compress(data)
    bad = [packed[:cut] for cut in (0, 1, 5, 12, 24, len(packed) // 2, len(packed) - 5, len(packed) - 1)]
    bad += [packed + b"\0", packed + packed, b"\0" * 50, b"\xff" * 50, packed[::-1]]
    for wrong in bad if name != "lrzip" else bad[:8]:  # lrzip reads no further than its data
        with pytest.raises(ValueError):
            decompress(wrong, len(data))
    for size in (0, 1, len(data) - 1, len(data) + 1, 10**9):
        with pytest.raises(ValueError):
            decompress(packed, size)
    for empty in (b"", b"\0"):
        if empty != b"\0" or name != "brotli":
            with pytest.raises(ValueError):
                decompress(empty, 0)


@pytest.mark.parametrize("name", CODECS)
def test_codecs_never_pass_changed_bits_as_other_data(name: str) -> None:
    """A flipped bit is refused, or it changed nothing. brotli has no checksum: there only the size is sure."""
    compress, decompress = tg.CODECS[name]
    data, chance, refused = code_bytes(3000), random.Random(1), 0
    packed = compress(data)
    tries = 300 if name != "lrzip" else 8
    for _ in range(tries):
        wrong = bytearray(packed)
        wrong[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
        try:
            found = decompress(bytes(wrong), len(data))
            assert found == data or (name == "brotli" and len(found) == len(data))
        except ValueError:
            refused += 1
    assert refused > tries * (0.2 if name == "brotli" else 0.5)


@pytest.mark.parametrize("name", [name for name in CODECS if name != "lrzip"])
def test_codecs_stop_at_the_size_they_were_told(name: str) -> None:
    """16 MB behind a few bytes are not unpacked when 1,000 are expected."""
    compress, decompress = tg.CODECS[name]
    packed = compress(bytes(2**24))
    tracemalloc.start()
    with pytest.raises(ValueError):
        decompress(packed, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 + (2**26 if name == "lzma" else 0)  # the dictionary of preset 9


def test_lrzip_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the program the codec says so; nothing falls back to another one."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="lrzip is not installed"):
        tg.CODECS["lrzip"][0](b"data")


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
    """A stand-in for the program, so that what surrounds it is tested everywhere."""
    program = tmp_path / "bin" / "lrzip"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))


def test_lrzip_is_trusted_with_nothing_but_its_data(lrzip: None) -> None:
    """What the program makes is taken at its announced size only; another header, size or exit status is refused."""
    compress, decompress = tg.CODECS["lrzip"]
    data = code_bytes(1000)
    packed = compress(data)
    assert decompress(packed, 1000) == data == decompress(memoryview(packed), 1000)
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
            decompress(wrong, size)


# ---------------------------------------------------------------------------------------------------------------
# Artifacts
# ---------------------------------------------------------------------------------------------------------------


def saved(folder: Path, **changes: Any) -> tuple[tg.Config, dict[str, np.ndarray], Path]:
    """A random toy model in a file: settings, stored arrays, path."""
    config = toy_config(QUANT_SCHEME="intn_row", **changes)
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    stored, path = tg.quantize(arrays, config, CPU), folder / "artifact.bin"
    assert tg.save_artifact(path, stored, config) == path.stat().st_size
    return config, stored, path


@pytest.mark.parametrize("compressor", ["brotli", "rans", "lzma", "zlib", "zstd", "pergroup"])
def test_artifacts_of_every_compressor_give_back_the_same_weights(compressor: str, tmp_path: Path) -> None:
    """The codec travels in the header; sorted rows, corrections and fp16 matrices come back in their place."""
    changes = dict(LQER_RANK=2, LQER_TOP_K=2, FP16_KEEP_NAME_PATTERNS="blocks.{last}.attn.k", BIGRAM_VOCAB_SIZE=9)
    config, stored, path = saved(tmp_path, COMPRESSOR=compressor, **changes)
    expected, loaded = tg.dequantize(stored, config), tg.load_artifact(path, config)
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[name], expected[name]) for name in expected)
    codec = tg.read_container(path)[0]["codec"]
    assert codec == (compressor if compressor != "pergroup" else "lrzip" if shutil.which("lrzip") else "brotli")
    other = "zlib" if compressor != "zlib" else "lzma"
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
    """These streams hold their rows along the chain, with the order beside them; the others stay as they are."""
    config, stored, _ = saved(tmp_path, COMPRESSOR="pergroup")
    table = tg.artifact_table(config)
    sorted_names = {entry.name.removesuffix(".order") for entry in table if entry.name.endswith(".order")}
    wanted = {f"blocks.{i}.{kind}" for i in LAYERS for kind in ("attn.q", "mlp.up")} | {"tok_emb.weight"}
    assert sorted_names == wanted
    rearranged = tg.sort_rows(stored, table)
    for name in (entry.name.removesuffix(".codes") for entry in table if entry.name.endswith(".codes")):
        codes, moved = stored[name + ".codes"], rearranged[name + ".codes"]
        if name in wanted:
            order = slow_order(codes)
            assert rearranged[name + ".order"].tolist() == order and np.array_equal(moved, codes[order])
        else:
            assert np.array_equal(moved, codes) and name + ".order" not in rearranged
    back = tg.restore_rows(rearranged)
    assert all(np.array_equal(back[name], array) for name, array in stored.items())


@pytest.mark.parametrize("order", [[0, 1, 2, 2], [0, 1, 2, 4], [1, 2, 3, 65_535], [0, 0, 0, 0]])
def test_row_orders_that_are_no_permutation_are_refused(order: list[int], tmp_path: Path) -> None:
    """A row named twice, or one that does not exist: no weights, but an error that names the file."""
    stored = {"x.codes": np.zeros((4, 3), np.int8), "x.order": np.array(order, np.uint16)}
    with pytest.raises(ValueError, match="x: its row order is no permutation"):
        tg.restore_rows(stored)
    config, stored, path = saved(tmp_path, COMPRESSOR="pergroup")
    table = tg.artifact_table(config)
    wrong = tg.sort_rows(stored, table)
    wrong["blocks.2.attn.q.order"] = np.array((order * 8)[:32], np.uint16)
    meta, blobs = tg.read_container(path)
    streams = list(tg.stream_bytes(wrong, table).values())
    tg.write_container(path, meta | {"codec": "zlib"}, [tg.CODECS["zlib"][0](data) for data in streams])
    with pytest.raises(tg.UserError, match="artifact.bin: damaged artifact .blocks.2.attn.q: its row order"):
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
    """Unknown codecs, and corrections of what is no quantised matrix, or named twice: one line that names the file."""
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
    """LQER_RANK=0: a list of corrected matrices in the header must be empty, even if all streams fit it; with a rank
    their streams must be there; and no matrix is named twice."""
    names = ["tok_emb.weight"]
    for rank in (0, 2):
        config, stored, path = saved(tmp_path, LQER_RANK=rank, LQER_TOP_K=0)
        meta, blobs = tg.read_container(path)
        tg.write_container(path, meta | {"corrected": names}, blobs)
        with pytest.raises(tg.UserError, match="damaged"):
            tg.load_artifact(path, config)
    config, stored, path = saved(tmp_path, LQER_RANK=0)
    table = tg.artifact_table(config, names)
    empty = {entry.name: np.zeros(entry.shape, entry.dtype) for entry in table if entry.name not in stored}
    streams = tg.stream_bytes(stored | empty, table).values()
    meta = tg.read_container(path)[0] | {"corrected": names, "codec": "zlib"}
    tg.write_container(path, meta, [tg.CODECS["zlib"][0](data) for data in streams])
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
