"""COMPRESS: weights to codes to one file and back; sizes that are true; damaged files that are refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from conftest import QUIET, ROOT, ToyData, random_model, random_tokens, toy_config

import train_gpt as tg

RUN, CPU = tg.Run(), torch.device("cpu")


def slow_gptq(
    W: np.ndarray, H: np.ndarray, clip: float, bits: int, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """One matrix, one column at a time, float64; codes and fp16 scales."""
    rows, cols = W.shape
    top = 2 ** (bits - 1) - 1
    scale = np.maximum((clip * W.std(1, ddof=1) / top).astype(np.float16), np.float16(2**-24))
    W, H, s = W.copy(), H.copy(), scale.astype(np.float64)
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    H += damping * np.diag(H).mean() * np.eye(cols)
    W[:, dead] = 0
    order = np.argsort(-np.diag(H), kind="stable")
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    W, Q = W[:, order], np.zeros((rows, cols), np.int64)
    for j in range(cols):
        Q[:, order[j]] = q = np.clip(np.round(W[:, j] / s), -top, top)
        W[:, j:] -= ((W[:, j] - q * s) / U[j, j])[:, None] * U[j, j:]
    return Q, scale


def correlated(rows: int, cols: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix and X^T X of inputs that lie near a low-dimensional subspace, at very unequal scales."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(4 * cols, cols // 4)) @ generator.normal(size=(cols // 4, cols))
    x = (x + 0.3 * generator.normal(size=x.shape)) * np.exp(generator.normal(size=cols))
    return generator.normal(size=(rows, cols)), x.T @ x


def run_gptq(W: np.ndarray, H: np.ndarray, clip: float, bits: int, **options: int) -> tuple[np.ndarray, np.ndarray]:
    Q, scale = tg.gptq(torch.from_numpy(W).float()[None], torch.from_numpy(H).float()[None], clip, bits, **options)
    assert Q.dtype == torch.int8 and scale.dtype == torch.float16
    return Q[0].numpy(), scale[0].numpy()


def weighted_error(W: np.ndarray, Q: np.ndarray, scale: np.ndarray, H: np.ndarray) -> float:
    E = W - Q * scale.astype(np.float64)[:, None]
    return float(np.trace(E @ H @ E.T))


def to_nearest(W: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    top = 2 ** (bits - 1) - 1
    return np.clip(np.round(W / scale.astype(np.float64)[:, None]), -top, top)


@pytest.mark.parametrize("bits, clip", [(6, 12.0), (3, 2.0)])
def test_blocked_gptq_equals_one_column_at_a_time(bits: int, clip: float) -> None:
    """Codes and scales of a 64 x 300 matrix with a dead column equal the unblocked reference, rare ties aside."""
    W, H = correlated(64, 300, seed=1)
    H[17, :] = H[:, 17] = 0
    Q, scale = run_gptq(W, H, clip, bits)
    slow, slow_scale = slow_gptq(W, H, clip, bits)
    assert np.array_equal(scale, slow_scale)
    assert not Q[:, 17].any() and not slow[:, 17].any()
    # A rounding tie that float32 breaks the other way carries on along its row, so a few rows may differ.
    assert (Q != slow).any(1).mean() < 0.05 and np.abs(Q - slow).max() <= 1
    for block in (1, 7, 300):
        other = run_gptq(W, H, clip, bits, block=block)[0]
        assert (Q != other).any(1).mean() < 0.05


def test_matrices_of_a_batch_do_not_influence_each_other() -> None:
    """Two matrices quantised in one call get the codes that they get alone."""
    first, second = correlated(16, 40, seed=2), correlated(16, 40, seed=3)
    stack = [torch.from_numpy(np.stack(pair)).float() for pair in zip(first, second)]
    Q, scale = tg.gptq(*stack, 12.0, 6)
    for i, (W, H) in enumerate((first, second)):
        alone, alone_scale = run_gptq(W, H, 12.0, 6)
        assert np.array_equal(Q[i].numpy(), alone) and np.array_equal(scale[i].numpy(), alone_scale)


def test_error_feedback_beats_rounding_on_correlated_inputs() -> None:
    """The activation-weighted error is clearly below that of rounding to nearest with the same scales."""
    W, H = correlated(64, 300, seed=4)
    Q, scale = run_gptq(W, H, 12.0, 6)
    assert weighted_error(W, Q, scale, H) < 0.5 * weighted_error(W, to_nearest(W, scale, 6), scale, H)


def test_uncorrelated_inputs_leave_plain_rounding() -> None:
    """With a diagonal Hessian nothing can be compensated: the codes are those of rounding to nearest."""
    W, _ = correlated(32, 100, seed=5)
    H = np.diag(np.random.default_rng(6).uniform(0.5, 50, 100))
    Q, scale = run_gptq(W, H, 12.0, 6)
    assert np.array_equal(Q, to_nearest(W.astype(np.float32).astype(np.float64), scale, 6))


def test_zero_rows_give_zero_codes_and_finite_scales() -> None:
    """A row of zeros, as in an untrained output projection, stays zero and brings no NaN."""
    W, H = correlated(8, 40, seed=7)
    W[3] = 0
    W[5] = 1e-12  # below what a half-precision scale can express
    Q, scale = run_gptq(W, H, 13.0, 6)
    assert not Q[3].any() and not Q[5].any() and np.isfinite(scale).all() and (scale > 0).all()
    untouched = run_gptq(W, np.zeros_like(H), 13.0, 6)[0]
    assert not untouched.any()  # a layer whose inputs were never seen


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_codes_stay_within_their_range(bits: int) -> None:
    """No code exceeds 2^(bits-1) - 1 in magnitude, and a narrow clip really uses both ends."""
    W, H = correlated(32, 80, seed=8)
    Q, _ = run_gptq(W, H, 1.0, bits)
    assert Q.max() == 2 ** (bits - 1) - 1 == -Q.min()


def test_scale_is_the_clip_times_the_deviation_of_the_original_row() -> None:
    """SDClip: unbiased deviation of the row as it came, dead columns included, over the range, in half precision."""
    W, H = correlated(16, 50, seed=9)
    H[:, :10] = H[:10] = 0
    assert np.array_equal(run_gptq(W, H, 15.0, 7)[1], (15.0 * W.std(1, ddof=1) / 63).astype(np.float16))


def test_inverse_factor_is_upper_and_reproduces_the_inverse() -> None:
    """U is upper triangular and U^T U is the inverse of the damped Hessian."""
    _, H = correlated(1, 30, seed=10)
    H = torch.from_numpy(H)[None]
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    U = tg.inverse_factor(H, mean)[0]
    assert torch.equal(U, U.triu())
    identity = U.T @ U @ (H[0] + 0.01 * mean[0] * torch.eye(30))
    torch.testing.assert_close(identity, torch.eye(30, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("lowest, damping", [(-0.05, 0.1), (-0.5, 1.0)])
def test_hessian_that_needs_more_damping_gets_it(lowest: float, damping: float) -> None:
    """Where 1 % of the mean diagonal leaves a negative direction, ten and a hundred times that are tried."""
    vectors = np.linalg.qr(np.random.default_rng(11).normal(size=(20, 20)))[0]
    values = np.append(np.full(19, (20 - lowest) / 19), lowest)  # mean of the diagonal is 1
    H = (vectors * values) @ vectors.T
    W = np.random.default_rng(12).normal(size=(8, 20))
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(H + 0.01 * np.eye(20))
    assert np.array_equal(run_gptq(W, H, 12.0, 6)[0], slow_gptq(W, H, 12.0, 6, damping)[0])


def test_hessian_that_is_not_a_number_is_reported() -> None:
    """NaN statistics stop quantisation with a message instead of producing codes."""
    W, H = correlated(4, 10, seed=13)
    H[2, 3] = H[3, 2] = np.nan
    with pytest.raises(tg.TrainingDiverged, match="not finite"):
        run_gptq(W, H, 12.0, 6)


# ---------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Quantised:
    config: tg.Config
    arrays: dict[str, np.ndarray]  # weights and Hessians, as in trained.bin
    stored: dict[str, tg.Parts]
    path: Path
    size: int


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """A random toy model with real Hessians, quantised and saved."""
    config = toy_config()
    model, taps = random_model(config), tg.Taps()
    tokens = torch.from_numpy(random_tokens(257, 64))[None]
    with torch.no_grad():
        model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True), taps=taps)
    arrays = {name: array.copy() for name, array in model.arrays().items()}
    arrays |= {f"hessian.{name}.{layer}": hessian.numpy() for (name, layer), hessian in taps.hessians.items()}
    stored = tg.quantize(arrays, config, CPU)
    path = tmp_path_factory.mktemp("artifact") / "artifact.bin"
    return Quantised(config, arrays, stored, path, tg.save_artifact(path, stored, config))


def test_every_matrix_is_quantised_with_its_own_hessian_and_clip(toy: Quantised) -> None:
    """Codes of all kinds and layers equal the reference called with the right rows, statistics, clip and bits."""
    c, L = toy.config, toy.config.num_layers
    cases = [("tok_emb.weight", toy.arrays["tok_emb.weight"], "head.0", c.embed_clip_sigmas, c.embed_bits)]
    banks = {"attn.q": ("qo_bank", 0), "attn.k": ("kv_bank", 0), "attn.v": ("kv_bank", L), "attn.o": ("qo_bank", L)}
    banks |= {"mlp.up": ("mlp_up_bank", 0), "mlp.down": ("mlp_down_bank", 0)}
    for kind, (bank, first) in banks.items():
        source = "attn.q" if kind in ("attn.k", "attn.v") else kind
        clip = c.attn_clip_sigmas if kind.startswith("attn") else c.mlp_clip_sigmas
        for i in range(L):
            cases.append((f"blocks.{i}.{kind}", toy.arrays[bank][first + i], f"{source}.{i}", clip, c.matrix_bits))
    assert len({clip for *_, clip, _ in cases}) == 3
    for name, W, hessian, clip, bits in cases:
        Q, scale = slow_gptq(W.astype(np.float64), toy.arrays[f"hessian.{hessian}"].astype(np.float64), clip, bits)
        assert (toy.stored[name]["codes"] != Q).any(1).mean() < 0.05, name
        np.testing.assert_allclose(toy.stored[name]["scale"], scale, rtol=2e-3)


def test_everything_else_is_stored_in_half_precision_or_int8_rows(toy: Quantised) -> None:
    """Gates lose at most half a step of their row, small tensors only fp16 rounding, and no tensor is missing."""
    restored = tg.dequantize(toy.stored, toy.config)
    weights = {name: array for name, array in toy.arrays.items() if not name.startswith("hessian.")}
    assert restored.keys() == weights.keys()
    for name, array in weights.items():
        assert restored[name].shape == array.shape and restored[name].dtype == np.float32
        if name.endswith("attn_gate_w"):
            step = np.abs(array).max(1, keepdims=True) / 127
            assert (np.abs(restored[name] - array) <= 0.502 * step).all()
        elif name not in tg.BANKS and name != "tok_emb.weight":
            assert np.array_equal(restored[name], array.astype(np.float16).astype(np.float32)), name


def test_streams_hold_all_arrays_once_each_of_one_type(toy: Quantised) -> None:
    """Together the streams hold every part of every owner with its shape and dtype; all of a stream share the dtype."""
    streams = tg.artifact_streams(toy.config, "brotli", ())
    entries = [entry for stream in streams.values() for entry in stream.entries]
    assert sorted(entries) == sorted(tg.artifact_table(toy.config))
    found = {(owner, part): (array.shape, array.dtype) for owner, parts in toy.stored.items() for part, array in parts.items()}
    assert found == {(entry.owner, entry.part): (entry.shape, np.dtype(entry.dtype)) for entry in entries}
    for stream in streams.values():
        assert len({entry.dtype for entry in stream.entries}) == 1
        assert stream.nbytes == sum(array.nbytes for array in stream.arrays(toy.stored))


def test_tables_are_made_once_per_configuration() -> None:
    """Equal settings share one table of parameters and one of the artifact; no caller can change them."""
    table, parameters = (make(toy_config(MODEL_DIM=24, ROPE_DIMS=2)) for make in (tg.artifact_table, tg.parameter_table))
    assert table is tg.artifact_table(toy_config(MODEL_DIM=24, ROPE_DIMS=2)) and isinstance(table, tuple)
    assert parameters is tg.parameter_table(toy_config(MODEL_DIM=24, ROPE_DIMS=2))
    with pytest.raises(TypeError):
        parameters["x"] = parameters["qo_bank"]


def test_saved_artifact_reloads_with_identical_codes_and_losses(toy: Quantised) -> None:
    """The file gives back exactly codes times scales, and a model with the same nll as those weights."""
    expected = tg.dequantize(toy.stored, toy.config)
    loaded = tg.load_artifact(toy.path, toy.config)
    assert loaded.keys() == expected.keys() and all(np.array_equal(loaded[name], expected[name]) for name in expected)
    model = tg.GPT(toy.config, RUN)
    model.load(expected)
    tokens, plan = torch.from_numpy(random_tokens(65, 64, seed=5))[None], tg.layer_plan(toy.config, True)
    with torch.no_grad():
        ours = model(tokens[:, :-1], tokens[:, 1:], plan)
        model = tg.GPT(toy.config, RUN)
        tg.use_artifact(model, toy.path, toy.config, RUN)
        theirs = model(tokens[:, :-1], tokens[:, 1:], plan)
    assert torch.equal(ours, theirs)


def test_reported_bytes_are_the_size_of_the_file(toy: Quantised) -> None:
    """save_artifact returns what is on disk, and saving twice gives the same bytes."""
    assert toy.size == toy.path.stat().st_size
    twin = toy.path.with_name("twin.bin")
    tg.save_artifact(twin, toy.stored, toy.config)
    assert twin.read_bytes() == toy.path.read_bytes()
    assert sorted(path.name for path in toy.path.parent.iterdir()) == ["artifact.bin", "twin.bin"]


def refused(path: Path, config: tg.Config, data: bytes, match: str | None = None) -> None:
    path.write_bytes(data)
    with pytest.raises(tg.UserError, match=match) as caught:
        tg.load_artifact(path, config)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_artifacts_are_refused(toy: Quantised, tmp_path: Path) -> None:
    """Cut anywhere, or with bytes behind the end, the file is not read."""
    data = toy.path.read_bytes()
    for size in (0, 4, 8, 11, 12, 40, len(data) // 2, len(data) - 1):
        refused(tmp_path / "cut.bin", toy.config, data[:size])
    refused(tmp_path / "long.bin", toy.config, data + b"x", "left over")


def test_flipped_bits_are_refused_wherever_they_are(toy: Quantised, tmp_path: Path) -> None:
    """A single changed bit in the magic, the header or any stream is noticed."""
    data = toy.path.read_bytes()
    header = 12 + int.from_bytes(data[8:12], "little")
    generator = np.random.default_rng(0)
    for position in [0, 7, 8, 9, 11, *generator.integers(12, header, 60), *generator.integers(header, len(data), 30)]:
        changed = bytearray(data)
        changed[position] ^= 1 << int(generator.integers(8))
        path = tmp_path / "flipped.bin"
        path.write_bytes(changed)
        try:
            loaded = tg.load_artifact(path, toy.config)
        except tg.UserError:
            continue
        # Letters of the JSON may change case without changing its meaning, for example in a hexadecimal number.
        assert 12 <= position < header
        assert all(np.array_equal(loaded[name], a) for name, a in tg.dequantize(toy.stored, toy.config).items())


def test_artifact_of_another_configuration_is_refused_naming_the_settings(toy: Quantised) -> None:
    """Settings that the forward pass or the layout depends on must be the artifact's; others may differ."""
    for key, value in dict(
        NUM_LOOPS=2, LOGIT_SOFTCAP=20, SMEAR_GATE_ENABLED=0, MLP_MULT=3, XSA_LAST_N=1, LEAKY_RELU_SQ_SLOPE=0,
        LN_SCALE=0, SKIP_GATES_ENABLED=0, ATTN_GATE="sparse", SMEAR_GATE_POS="post_norm", BIGRAM_VOCAB_SIZE=9,
        MLP_GATE_OUT=0, SMEAR_PERDIM_ENABLED=1, COMPRESSOR="zlib", LQER_RANK=2, GATED_ATTN_QUANT_GATE=0,
        FP16_KEEP_NAME_PATTERNS="attn.k", MARKER_PAIR_MODE=1,
    ).items():  # fmt: skip
        with pytest.raises(tg.UserError, match=key):
            tg.load_artifact(toy.path, toy_config(**{key: value}))
    for changes in (dict(ROPE_BASE=500), dict(ROPE_TRAIN_SEQ_LEN=8)):  # both decide the base of the rotation
        with pytest.raises(tg.UserError, match="ROTARY_BASE=10000"):
            tg.load_artifact(toy.path, toy_config(**changes))
    others = toy_config(
        SEED=5, EVAL_SEQ_LEN=16, MATRIX_LR=1, ENABLE_LOOPING_AT=0.1, QK_GAIN_INIT=2, TTT_ENABLED=0, MATRIX_BITS=5,
        QUANT_SCHEME="intn_row", INIT_SCHEME="default", VARLEN_ATTN=0, LOADER="coprime", TTT_KIND="chunk_sgd",
        MAG_PRUNE_FRAC=0.1, TRAIN_SEQ_LEN=16, RESID_SCALE_DEPTH_INIT=1,
    )  # fmt: skip
    tg.load_artifact(toy.path, others)


BASES = [  # toy settings under which a change may show, and the wiring that they exclude
    (dict(ROPE_TRAIN_SEQ_LEN=16, BIGRAM_VOCAB_SIZE=9), "PARALLEL_RESIDUAL_START"),
    (dict(PARALLEL_START_LAYER=0, PARALLEL_RESIDUAL_START=2, ATTN_GATE="sparse"), "PARALLEL_START_LAYER"),
]
FORWARD = dict(
    NUM_HEADS=8, ROPE_DIMS=6, ROPE_BASE=77, ROPE_TRAIN_SEQ_LEN=8, XSA_LAST_N=2, LOGIT_SOFTCAP=9, GATE_WINDOW=11,
    NUM_LOOPS=2, LOOP_START=0, LOOP_END=1, PARALLEL_START_LAYER=4, PARALLEL_RESIDUAL_START=1, LEAKY_RELU_SQ_SLOPE=0.3,
    LN_SCALE=0, ATTN_GATE="two_sigma", SPARSE_ATTN_GATE_SCALE=0.5, MLP_GATE_OUT=0, SMEAR_GATE_ENABLED=0,
    SMEAR_GATE_POS="post_norm", SMEAR_PERDIM_ENABLED=1, BIGRAM_VOCAB_SIZE=8, BIGRAM_DIM=16, SKIP_GATES_ENABLED=0,
)  # fmt: skip
NOT_FORWARD = dict(
    EVAL_SEQ_LEN=16, QK_GAIN_INIT=1, MLP_GATE_BIAS=0, INIT_SCHEME="default", RESID_SCALE_DEPTH_INIT=1,
    MARKER_PAIR_MODE=1, GATED_ATTN_INIT_STD=1, TIED_EMBED_INIT_STD=1, ENABLE_LOOPING_AT=0, VARLEN_ATTN=0, LOADER="coprime",
)  # fmt: skip


def test_forward_settings_all_travel_in_the_artifact(marker_pairs: int) -> None:
    """Every setting that changes the loss of given weights is among those that the artifact is checked against."""
    tokens = torch.from_numpy(random_tokens(50, 64, bos_every=20))[None]
    seen = set()
    for own, excluded in BASES:
        base = random_model(toy_config(**own))
        weights = base.arrays()
        reference = base(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(base.config, True))
        for key, value in {**FORWARD, **NOT_FORWARD, "TRAIN_SEQ_LEN": 20}.items():
            if key == excluded:
                continue
            config = toy_config(**own | {key: value})
            model = tg.GPT(config, RUN)
            try:
                model.load(weights)
                changed = not torch.equal(model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True)), reference)
            except tg.UserError:
                changed = True
            if changed:
                assert tg.artifact_settings(config) != tg.artifact_settings(base.config), key
                seen.add(key)
    assert seen == {*FORWARD, "TRAIN_SEQ_LEN"}  # the training length decides the rotary base


def stream_bytes(toy: Quantised) -> list[bytes]:
    """What the codecs of bytes compress."""
    return [tg.join_arrays(stream.arrays(toy.stored)) for stream in tg.artifact_streams(toy.config, "zlib", ()).values()]


def test_decompression_bombs_are_refused_without_unpacking_them(
    toy: Quantised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that would expand to a gigabyte, with correct checksums, is given up after its expected size."""
    streams = stream_bytes(toy)
    packer = brotli.Compressor(quality=1)
    bomb = b"".join(packer.process(bytes(2**20)) for _ in range(1024)) + packer.finish()
    assert len(bomb) < 2**20
    unpacked = []

    class Watched:
        def __init__(self) -> None:
            self.inner = real()

        def process(self, data: bytes, **options: int) -> bytes:
            out = self.inner.process(data, **options)
            unpacked.append(len(out))
            return out

        def is_finished(self) -> bool:
            return self.inner.is_finished()

    real = brotli.Decompressor
    monkeypatch.setattr(brotli, "Decompressor", Watched)
    meta = {"model": tg.artifact_settings(toy.config), "codec": "brotli", "corrected": []}
    for victim, expected in enumerate(streams):
        unpacked.clear()
        packed = [brotli.compress(data, quality=1) for data in streams]
        tg.write_container(tmp_path / "bomb.bin", meta, [*packed[:victim], bomb, *packed[victim + 1 :]])
        with pytest.raises(tg.UserError, match=f"does not expand to {len(expected)} bytes"):
            tg.load_artifact(tmp_path / "bomb.bin", toy.config)
        assert sum(unpacked) < sum(map(len, streams)) + 2**17


def test_wrong_streams_are_refused(toy: Quantised, tmp_path: Path) -> None:
    """Too few streams, a stream of another length, a stream that is not compressed, and meta that is no table."""
    streams = [brotli.compress(data) for data in stream_bytes(toy)]
    meta = {"model": tg.artifact_settings(toy.config), "codec": "brotli", "corrected": []}
    path = tmp_path / "wrong.bin"
    longer = brotli.compress(brotli.decompress(streams[0]) + b"\0")
    for blobs in (
        streams[:-1],
        [longer, *streams[1:]],
        [b"no brotli", *streams[1:]],
        [streams[0] + b"x", *streams[1:]],
        [],
    ):
        tg.write_container(path, meta, blobs)
        with pytest.raises(tg.UserError, match="damaged artifact"):
            tg.load_artifact(path, toy.config)
    for other in ({}, {"model": None}, {"model": 3}, {"model": ["vocab_size"]}):
        tg.write_container(path, other, streams)
        with pytest.raises(tg.UserError, match="VOCAB_SIZE"):
            tg.load_artifact(path, toy.config)


# ---------------------------------------------------------------------------------------------------------------
# Containers
# ---------------------------------------------------------------------------------------------------------------


def test_container_gives_back_what_was_written(tmp_path: Path) -> None:
    """Meta and blobs, empty ones included, survive the round trip, and the size is the file's."""
    meta, blobs = {"a": [1, 2.5, None, "é"], "b": {"c": True}}, [b"", b"x" * 1000, bytes(range(256)), b""]
    for contents in (blobs, []):
        size = tg.write_container(tmp_path / "c.bin", meta, contents)
        assert size == (tmp_path / "c.bin").stat().st_size
        assert tg.read_container(tmp_path / "c.bin") == (meta, contents)


def test_arrays_give_back_what_was_written(tmp_path: Path) -> None:
    """Names, shapes (scalars and empty arrays too), types and values survive the round trip."""
    arrays = {
        "matrix": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "whole": np.arange(5),
    }
    tg.save_arrays(tmp_path / "a.bin", {"step": 3}, arrays)
    meta, back = tg.load_arrays(tmp_path / "a.bin")
    assert meta == {"step": 3} and list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].shape == array.shape and back[name].dtype == array.dtype and np.array_equal(back[name], array)


def test_missing_and_unwritable_containers_are_user_errors(tmp_path: Path) -> None:
    """Reading what is not there, and writing where it cannot be written, names the path and leaves no partial file."""
    with pytest.raises(tg.UserError, match="absent.bin"):
        tg.read_container(tmp_path / "absent.bin")
    with pytest.raises(tg.UserError, match="nowhere"):
        tg.write_container(tmp_path / "nowhere" / "x.bin", {}, [b"1"])
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(tg.UserError, match="folder.bin"):
        tg.write_container(tmp_path / "folder.bin", {}, [b"1"])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.bin"]


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"x": ["<f4", [3]]},
        {"x": ["|O", [2]]},
        {"x": ["<f4"]},
        {"x": 3},
        ["x"],
        None,
        {"x": ["<f4", [3, 3]]},
        {"x": ["<f4", "2"]},
    ],
)
def test_array_tables_that_do_not_fit_are_refused(table: Any, tmp_path: Path) -> None:
    """A header that announces other shapes, odd types or no table at all is an error, not a crash."""
    tg.write_container(tmp_path / "t.bin", {"arrays": table}, [bytes(8)])
    with pytest.raises(tg.UserError, match="t.bin"):
        tg.load_arrays(tmp_path / "t.bin")


# ---------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------


def test_clips_change_by_the_bits_per_code_that_are_missing() -> None:
    """One bit per code too many: twice the factor. None where no clip can help, may change, or needs to."""
    config, fill = toy_config(FIT_ARTIFACT=1), toy_config(FIT_ARTIFACT="fill")
    bit = sum(entry.size for entry in tg.artifact_table(config) if entry.part == "codes") / 8  # bytes of a bit per code
    margin, slack = tg.FIT_MARGIN_BYTES, tg.FILL_SLACK_BYTES
    assert tg.next_clip_factor(1.5, bit - margin, config) == pytest.approx(3)
    assert tg.next_clip_factor(2.5, bit - margin, config) is None  # beyond FIT_LARGEST_FACTOR
    assert tg.next_clip_factor(1.0, 0, config) is None and tg.next_clip_factor(1.0, 1, config) > 1
    assert tg.next_clip_factor(1.0, 1 - slack, fill) is None and tg.next_clip_factor(1.0, -slack, fill) < 1
    assert tg.next_clip_factor(1.0, -slack, config) is None
    assert tg.next_clip_factor(1.0, -(10**9), fill) == tg.FILL_SMALLEST_FACTOR
    assert tg.next_clip_factor(tg.FILL_SMALLEST_FACTOR, -(10**9), fill) is None
    for other in (toy_config(FIT_ARTIFACT=0), toy_config(QUANT_SCHEME="intn_row", FIT_ARTIFACT="fill")):
        assert tg.next_clip_factor(1.0, 10**6, other) is None and tg.next_clip_factor(1.0, -(10**6), other) is None


def test_artifact_over_the_limit_is_written_and_reported_and_fails(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """An artifact over the limit is on disk with its true size; the result says invalid and why, and the exit status is not 0."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="big", ITERATIONS=1, STAGES="train,quantize", FIT_ARTIFACT=0)
    for limit, status in ((1000, 1), (16_000_000, 0)):
        monkeypatch.setattr(tg, "ARTIFACT_LIMIT_BYTES", limit)
        monkeypatch.setattr(os, "environ", {**os.environ, **env})
        assert tg.command_line() == status
        result = json.loads((tmp_path / "big" / "result.json").read_text())
        artifact = tmp_path / "big" / "artifact.bin"
        assert result["artifact_bytes"] == artifact.stat().st_size
        assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"] > 1000
        assert result["valid"] == (status == 0)
        assert ("1000" in " ".join(result["violations"])) == (status == 1)
        assert ("INVALID" in capsys.readouterr().out) == (status == 1)
        tg.load_artifact(artifact, tg.load_config(env)[0])


def test_artifact_over_the_limit_is_refitted_by_coarser_steps(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With FIT_ARTIFACT the clips are raised until the file fits; the first try is kept beside it, both loadable."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="fit", ITERATIONS=2, STAGES="train,quantize")
    config, folder = tg.load_config(env)[0], tmp_path / "fit"
    first = tg.main(config, RUN)
    assert first["clip_factor"] == 1 and not (folder / "oversize.bin").exists()
    original = (folder / "artifact.bin").read_bytes()
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT_BYTES", first["total_bytes"] - 1500)
    fitted = tg.main(dataclasses.replace(config, stages="quantize"), RUN)
    assert fitted["valid"] and fitted["clip_factor"] > 1 and fitted["total_bytes"] <= first["total_bytes"] - 1500
    assert (folder / "oversize.bin").read_bytes() == original
    coarse, fine = (tg.load_artifact(folder / name, config) for name in ("artifact.bin", "oversize.bin"))
    weights = tg.load_arrays(folder / "trained.bin")[1]
    error = lambda arrays: np.square(arrays["mlp_up_bank"] - weights["mlp_up_bank"]).sum()
    assert error(coarse) > error(fine)
    again = tg.quantize(weights, tg.scaled_clips(config, fitted["clip_factor"]), CPU)
    expected = tg.dequantize(again, config)
    assert all(np.array_equal(coarse[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def trained(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> tuple[tg.Config, dict[str, Any]]:
    """A trained toy run and the sizes of its artifact as the clips are set."""
    env = toy_data.env(RUNS_DIR=tmp_path_factory.mktemp("fill"), RUN_ID="fill", ITERATIONS=2, STAGES="train,quantize")
    config = tg.load_config(env)[0]
    return config, tg.main(config, RUN)


@pytest.fixture
def small_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tg, "FIT_MARGIN_BYTES", 60)
    monkeypatch.setattr(tg, "FILL_SLACK_BYTES", 240)


def fitted(config: tg.Config, limit: int, how: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT_BYTES", limit)
    return tg.make_artifact(dataclasses.replace(config, fit_artifact=how), CPU, QUIET)


@pytest.mark.parametrize("spare", [1800, -1500, 100, 239])
def test_artifact_fills_the_limit_from_below_and_from_above(
    spare: int, trained: tuple, small_slack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIT_ARTIFACT=fill ends within the slack below the limit. With room left clips fall, and so does the quantisation
    error; above the limit clips rise; nothing changes when the first artifact is within the slack."""
    config, first = trained
    folder = config.run_dir
    weights = tg.load_arrays(folder / "trained.bin")[1]
    plain = tg.dequantize(tg.quantize(weights, config, CPU), config)
    limit = first["total_bytes"] + spare
    result = fitted(config, limit, "fill", monkeypatch)
    assert limit - 240 < result["total_bytes"] <= limit
    stored = tg.load_artifact(folder / "artifact.bin", config)
    expected = tg.dequantize(tg.quantize(weights, tg.scaled_clips(config, result["clip_factor"]), CPU), config)
    assert all(np.array_equal(stored[name], expected[name]) for name in expected)
    assert (folder / "oversize.bin").exists() == (spare < 0)  # kept only where something did not fit
    changed = [name for name in stored if not np.array_equal(stored[name], plain[name])]
    if abs(spare) < 240:
        assert result["clip_factor"] == 1 and not changed
        return
    assert (result["clip_factor"] < 1) == (spare > 0)
    error = lambda arrays, name: np.square(arrays[name] - weights[name]).sum()
    assert set(changed) >= {"tok_emb.weight", *tg.BANKS}
    for name in ("tok_emb.weight", *tg.BANKS):
        assert (error(stored, name) < error(plain, name)) == (spare > 0), name


@pytest.mark.parametrize("how, spare", [("0", 1800), ("0", -1500), ("1", 1800), ("1", 10**6)])
def test_only_fill_lowers_clips(
    how: str, spare: int, trained: tuple, small_slack: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FIT_ARTIFACT=0 never changes a clip; FIT_ARTIFACT=1 does not when the file fits, however much room is left."""
    config, first = trained
    result = fitted(config, first["total_bytes"] + spare, how, monkeypatch)
    assert result["clip_factor"] == 1 and result["artifact_sha256"] == first["artifact_sha256"]


def test_filling_stops_at_half_the_clips(trained: tuple, small_slack: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more room than codes can use, clips end at FILL_SMALLEST_FACTOR, in two tries."""
    config, first = trained
    tries, real = [], tg.quantize

    def quantize(arrays: Any, changed: tg.Config, *rest: Any) -> Any:
        tries.append(changed.mlp_clip_sigmas / config.mlp_clip_sigmas)
        return real(arrays, changed, *rest)

    monkeypatch.setattr(tg, "quantize", quantize)
    result = fitted(config, first["total_bytes"] + 10**6, "fill", monkeypatch)
    assert result["clip_factor"] == tg.FILL_SMALLEST_FACTOR == 0.5 and tries == [1, 0.5]
    assert result["total_bytes"] > first["total_bytes"]


def test_artifact_that_cannot_fit_stays_usable(trained: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no clip is wide enough, the file on disk still holds the weights that its clips give."""
    config, _ = trained
    result, path = fitted(config, 1000, "1", monkeypatch), config.run_dir / "artifact.bin"
    assert result["artifact_bytes"] == path.stat().st_size and result["total_bytes"] > 1000
    weights, loaded = tg.load_arrays(config.run_dir / "trained.bin")[1], tg.load_artifact(path, config)
    expected = tg.dequantize(tg.quantize(weights, tg.scaled_clips(config, result["clip_factor"]), CPU), config)
    assert all(np.isfinite(loaded[name]).all() and np.array_equal(loaded[name], expected[name]) for name in expected)


def test_packed_script_runs_alone_and_its_length_is_what_counts(tmp_path: Path) -> None:
    """In a clean folder the packed file describes the same system, and counts exactly its own bytes. A small one: of the
    memory it keeps what two layers need on a GPU, which at full size takes ten seconds."""
    packed = tg.packed_script((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    assert tg.counted_code_bytes() == (len(packed), False)
    (tmp_path / "train_gpt.py").write_bytes(packed)
    small = {"PRESET": "baseline", "NUM_LAYERS": "2"}
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | small | {"STAGES": "describe"}
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert described.pop("memory")["gpus"]["80 GiB"]["fits"]
    assert described == json.loads(json.dumps(tg.describe(tg.load_config(small)[0])))
    assert described["forecast"]["code_bytes"] == len(packed)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["train_gpt.py"]


def test_packed_text_has_no_comments_and_the_same_program() -> None:
    """Packing removes comments and docstrings only: what is left parses to the same tree without its docstrings."""
    import ast

    source = '"""Doc."""\nclass A:\n    """Only a docstring."""\n\n'
    source += 'def f(x):\n    """Doc."""\n    return x + 1  # note\n\nprint(f(1), "#no")\n'
    names: dict[str, Any] = {"__file__": "none"}
    packed = tg.packed_script(source)
    text = packed.decode("latin1").removeprefix("#coding:latin1\n")
    captured: list[str] = []
    real = brotli.decompress
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brotli, "decompress", lambda data: captured.append(real(data).decode()) or real(data))
        exec(compile(text, "packed", "exec"), names)
    assert names["f"](4) == 5 and names["A"].__doc__ is None
    assert (
        ast.unparse(ast.parse(captured[0])) == "class A:\n    pass\n\ndef f(x):\n    return x + 1\nprint(f(1), '#no')"
    )


@pytest.mark.parametrize(
    "clip, bits, published", [(12.85, 6, 3.328), (12.0, 6, 3.425), (15.0, 7, 4.121), (20.0, 8, 4.715)]
)
def test_rate_model_equals_the_entropy_of_gaussian_codes(clip: float, bits: int, published: float) -> None:
    """The forecast's bits per weight match the entropy of quantised Gaussian rows within 0.02 bits."""
    keys = ("ATTN_CLIP_SIGMAS", "MLP_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS")
    config = toy_config(MATRIX_BITS=bits, EMBED_BITS=bits, **dict.fromkeys(keys, clip))
    count, gates, halves = 0, 0, 0
    for entry in tg.artifact_table(config):
        count += entry.size * (entry.dtype == "i1" and entry.stream != "gates")
        gates += entry.size * (entry.stream == "gates")
        halves += entry.size * (entry.dtype == "<f2")
    weights = tg.predicted_artifact_bytes(config)["artifact_bytes"] - 0.85 * 2 * halves
    forecast = (weights * 8 / 1.012 - 7 * gates) / count
    W = np.random.default_rng(0).normal(size=(256, 2048))
    Q = to_nearest(W, clip * W.std(1, ddof=1) / (2 ** (bits - 1) - 1), bits)  # GPTQ with an identity as Hessian
    p = np.unique(Q, return_counts=True)[1] / Q.size
    entropy = float(-(p * np.log2(p)).sum())
    assert abs(entropy - published) < 0.01 and abs(forecast - entropy) < 0.02


def test_forecast_is_close_to_the_file_of_a_gaussian_model(tmp_path: Path) -> None:
    """At a size where headers do not matter, the predicted bytes are within 3 % of the saved file's."""
    config = toy_config(MODEL_DIM=128, VOCAB_SIZE=256, MLP_MULT=4)
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    for name, matrix in tg.MATRICES.items():
        for layer in range(config.num_layers):
            arrays[f"hessian.{name}.{layer}"] = np.eye(arrays[matrix.bank].shape[-1], dtype=np.float32)
    arrays["hessian.head.0"] = np.eye(128, dtype=np.float32)
    size = tg.save_artifact(tmp_path / "a.bin", tg.quantize(arrays, config, CPU), config)
    assert size > 250_000
    assert tg.predicted_artifact_bytes(config)["artifact_bytes"] == pytest.approx(size, rel=0.03)
