"""COMPRESS, the low-rank correction (LQER): its levels, its signs, and which matrices of a model get it."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, scale_of, toy_config

import train_gpt as tg

CPU = torch.device("cpu")


def residual(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Noise with a few stronger directions, lopsided ones, of the size of rounding errors."""
    generator = np.random.default_rng(seed)
    strong = (generator.exponential(size=(rows, 3)) - 1) @ (generator.normal(size=(3, cols)) * 0.5)
    return torch.from_numpy(1e-3 * (generator.normal(size=(rows, cols)) + strong)).float()


def factors_with(A: np.ndarray, B: np.ndarray, group: int, left_bits: int = 2) -> np.ndarray:
    """The product of A and B rounded as published, written out with scalar loops over groups."""
    half = 2 ** (left_bits - 1)
    a_step = float(scale_of(np.abs(A).max(keepdims=True), half - 0.5).item())
    a = np.clip(np.round(A / np.float32(a_step)), -half, half - 1) * a_step
    b = B.flatten()
    for begin in range(0, b.size, group):
        part = b[begin : begin + group]
        step = float(scale_of(np.abs(part).max(keepdims=True), 7.5).item())
        b[begin : begin + group] = np.clip(np.round(part / np.float32(step)), -8, 7) * step
    return a.astype(np.float64) @ b.reshape(B.shape).astype(np.float64)


@pytest.mark.parametrize(
    "shape, rank, group", [((48, 64), 4, 32), ((64, 20), 2, 40), ((6, 40), 8, 64), ((30, 10), 3, 64)]
)
def test_lqer_factors_have_the_announced_shapes_and_levels(shape: tuple[int, int], rank: int, group: int) -> None:
    """Arrays fit lqer_shapes; levels are -2..1 and -8..7; where the group does not divide B it is the row."""
    factors = tg.lqer_factors(residual(*shape, seed=1), rank, group)
    assert {k: (v.shape, v.dtype) for k, v in factors.items()} == {
        k: (s, np.dtype(d)) for k, (s, d) in tg.lqer_shapes(*shape, rank, group).items()
    }
    assert factors["lqer_a"].min() >= -2 and factors["lqer_a"].max() <= 1
    assert factors["lqer_b"].min() >= -8 and factors["lqer_b"].max() <= 7
    used = min(rank, *shape)
    expected = used * shape[1] // group if used * shape[1] % group == 0 else used
    assert factors["lqer_b_scale"].shape == (expected,) and (factors["lqer_b_scale"] > 0).all()


def test_asymmetric_levels_are_all_reached_and_no_others() -> None:
    """The largest |x| lies half a step beyond the last positive level: -1.5 becomes -2, and +1.5 only 1."""
    x = np.array([[-1.5, -0.6, -0.4, 0.4, 0.6, 1.4], [3.0, 2.9, 0.9, -0.9, -1.1, -2.9], [0, 0, 0, 0, 0, 0]], np.float32)
    codes, scale = tg.round_asymmetric(x, 2)
    assert scale.tolist() == [1, 2, 2.0**-24] and codes.dtype == np.int8
    assert codes.tolist() == [[-2, -1, 0, 0, 1, 1], [1, 1, 0, 0, -1, -1], [0, 0, 0, 0, 0, 0]]
    codes, scale = tg.round_asymmetric(np.linspace(-7.5, 7.5, 61, dtype=np.float32)[None], 4)
    assert scale == 1 and sorted(set(codes[0].tolist())) == list(range(-8, 8))
    assert codes[0, 0] == -8 and codes[0, -1] == 7


@pytest.mark.parametrize("seed", range(6))
def test_lqer_signs_are_the_best(seed: int) -> None:
    """Of all 2^r choices of signs none comes nearer to E, up to 0.1 % of what the correction gains."""
    E = residual(96, 64, seed)
    U, S, Vt = np.linalg.svd(E.numpy(), full_matrices=False)
    A, B, exact = U[:, :4] * S[:4], Vt[:4], E.double().numpy()
    errors = {}
    for signs in itertools.product((1, -1), repeat=4):
        sign = np.array(signs, np.float32)
        errors[signs] = float(np.linalg.norm(exact - factors_with(A * sign, B * sign[:, None], 32)))
    found = float(np.linalg.norm(exact - tg.lqer_product(tg.lqer_factors(E, 4, 32))))
    gain = float(np.linalg.norm(exact)) - min(errors.values())
    assert gain > 0 and found <= min(errors.values()) + 1e-3 * gain
    assert max(errors.values()) > min(errors.values()) + 3e-3 * gain  # the signs do matter here
    tail = float(np.sqrt(np.square(S[4:]).sum()))  # no product of rank 4 is nearer (Eckart and Young)
    assert tail <= found < float(np.linalg.norm(exact))


def decaying(rows: int, cols: int, seed: int) -> torch.Tensor:
    """A random residual whose singular values fall by a fifth each."""
    generator = np.random.default_rng(seed)
    U, V = (np.linalg.qr(generator.normal(size=(n, n)))[0] for n in (rows, cols))
    k = min(rows, cols)
    return torch.from_numpy(1e-2 * (U[:, :k] * 0.8 ** np.arange(k)) @ V[:k]).float()


@pytest.mark.parametrize("seed", range(4))
def test_more_bits_of_the_left_factor_bring_the_product_nearer(seed: int) -> None:
    """LQER_LEFT_BITS: all levels from -2^(b-1) to 2^(b-1) - 1 are used; the residual does not grow with the bits; the
    signs are nearly the best; two bits are the default."""
    E = decaying(48, 64, seed)
    U, S, Vt = np.linalg.svd(E.numpy(), full_matrices=False)
    A, B, exact, before = U[:, :4] * S[:4], Vt[:4], E.double().numpy(), np.inf
    for bits in (2, 3, 4, 6, 8):
        factors = tg.lqer_factors(E, 4, 32, bits)
        half = 2 ** (bits - 1)
        assert factors["lqer_a"].dtype == np.int8 and factors["lqer_a"].shape == (48, 4)
        assert -half <= factors["lqer_a"].min() and factors["lqer_a"].max() <= half - 1
        assert max(factors["lqer_a"].max(), -factors["lqer_a"].min()) >= half - 1
        assert factors["lqer_b"].min() >= -8 and factors["lqer_b"].max() <= 7
        error = float(np.linalg.norm(exact - tg.lqer_product(factors)))
        tries = []
        for signs in itertools.product((1, -1), repeat=4):
            sign = np.array(signs, np.float32)
            tries.append(float(np.linalg.norm(exact - factors_with(A * sign, B * sign[:, None], 32, bits))))
        gain = float(np.linalg.norm(exact)) - min(tries)
        assert min(tries) - 1e-6 * gain <= error <= min(tries) + 0.02 * gain
        assert error <= before * 1.0005, bits
        before = error
        if bits == 2:
            plain = tg.lqer_factors(E, 4, 32)
            assert all(np.array_equal(plain[name], factors[name]) for name in plain)
    assert before < 1.03 * float(np.sqrt(np.square(S[4:]).sum()))  # nearly all that rank 4 can do


def test_lqer_product_is_the_product_of_scaled_factors() -> None:
    """By loops, for groups that run across the end of a row of B."""
    factors = tg.lqer_factors(residual(12, 20, seed=2), 4, 16)
    group = factors["lqer_b"].size // factors["lqer_b_scale"].size
    expected = np.zeros((12, 20))
    for i, j, r in np.ndindex(12, 20, 4):
        b = float(factors["lqer_b"][r, j]) * float(factors["lqer_b_scale"][(20 * r + j) // group])
        expected[i, j] += float(factors["lqer_a"][i, r]) * float(factors["lqer_a_scale"][0]) * b
    found = tg.lqer_product(factors)
    assert found.dtype == np.float32 and group == 16
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_lqer_of_nothing_is_nothing() -> None:
    """A residual of zeros, and one far below the fp16 range, correct nothing and stay finite."""
    for E in (torch.zeros(8, 12), residual(8, 12, 0) * 1e-20):
        product = tg.lqer_product(tg.lqer_factors(E, 4, 12))
        assert product.shape == (8, 12) and np.isfinite(product).all() and np.abs(product).max() < 1e-7


# ---------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------


def corrected_model(**changes: object) -> tuple[tg.Config, dict[str, np.ndarray], dict[str, tg.Parts]]:
    """A toy model, its weights by their names in the artifact, and what is stored of it."""
    config = toy_config(
        QUANT_SCHEME="intn_row", MATRIX_BITS=4, EMBED_BITS=4, LQER_RANK=2, LQER_ASYM_GROUP=16, **changes
    )
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    L, weights = config.num_layers, {"tok_emb.weight": arrays["tok_emb.weight"]}
    for kind, matrix in tg.MATRICES.items():
        for layer in range(L):
            weights[f"blocks.{layer}.{kind}"] = arrays[matrix.bank][matrix.half * L + layer]
    return config, weights, tg.quantize(arrays, config, CPU)


def plain(parts: tg.Parts) -> np.ndarray:
    return parts["codes"] * parts["scale"].astype(np.float32)[:, None]


def corrected(stored: dict[str, tg.Parts]) -> set[str]:
    return {name for name, parts in stored.items() if "lqer_a" in parts}


@pytest.mark.parametrize("top_k", [0, 1, 3, 1000])
def test_matrices_with_the_largest_residuals_are_corrected(top_k: int) -> None:
    """The LQER_TOP_K matrices whose W - codes * scale has the largest Frobenius norm, and no others."""
    config, weights, stored = corrected_model(LQER_TOP_K=top_k)
    norms = {name: float(np.linalg.norm(W - plain(stored[name]))) for name, W in weights.items()}
    ordered = sorted(norms, key=norms.get, reverse=True)
    assert corrected(stored) == set(ordered[:top_k]) and len(corrected(stored)) == min(top_k, len(weights))
    table = tg.artifact_table(config, tuple(corrected(stored)))
    assert sorted((entry.owner, entry.part) for entry in table) == sorted((o, part) for o in stored for part in stored[o])


def test_correction_brings_the_restored_weights_nearer(tmp_path: Path) -> None:
    """Corrected matrices come back as codes * scale + A B, nearer to the weights. Codes, and all other matrices, do not
    change. The file gives back the same numbers."""
    config, weights, stored = corrected_model(LQER_TOP_K=3)
    bare = tg.quantize(
        {n: a.copy() for n, a in random_model(config).arrays().items()}, dataclasses.replace(config, lqer_rank=0), CPU
    )
    assert all(np.array_equal(array, stored[name][part]) for name in bare for part, array in bare[name].items())
    restored = tg.dequantize(stored, config)
    tg.save_artifact(tmp_path / "a.bin", stored, config)
    loaded = tg.load_artifact(tmp_path / "a.bin", config)
    assert all(np.array_equal(loaded[name], restored[name]) for name in restored)
    L, nearer = config.num_layers, 0
    for name, W in weights.items():
        kind, layer = name.split(".", 2)[-1], int(name.split(".")[1]) if name.startswith("blocks") else 0
        matrix = tg.MATRICES.get(kind)
        found = restored[matrix.bank][matrix.half * L + layer] if matrix else restored[name]
        parts = stored[name]
        if name not in corrected(stored):
            assert np.array_equal(found, plain(parts)), name
            continue
        A = parts["lqer_a"] * parts["lqer_a_scale"].astype(np.float32)
        B = parts["lqer_b"].reshape(-1, 16) * parts["lqer_b_scale"].astype(np.float32)[:, None]
        np.testing.assert_allclose(found, plain(parts) + A @ B.reshape(2, -1), atol=1e-6)
        assert np.linalg.norm(W - found) < 0.999 * np.linalg.norm(W - plain(parts)), name
        nearer += 1
    assert nearer == 3


def test_finer_left_factors_survive_the_file(tmp_path: Path) -> None:
    """Four bits change only the factors. Codes beyond -2..1 occur, and the restored weights are nearer to the trained
    ones. The file gives them back."""
    settings = dict(LQER_TOP_K=3, COMPRESSOR="rans")
    config, weights, stored = corrected_model(**settings, LQER_LEFT_BITS=4)
    coarse = corrected_model(**settings)[2]
    assert stored.keys() == coarse.keys() and toy_config().lqer_left_bits == 2
    for name, parts in stored.items():
        assert parts.keys() == coarse[name].keys()
        assert all(part.startswith("lqer_") or np.array_equal(parts[part], coarse[name][part]) for part in parts), name
    assert len(corrected(stored)) == 3
    for name in corrected(stored):
        factor = stored[name]["lqer_a"]
        assert -8 <= factor.min() < -2 and 1 < factor.max() <= 7
        fine, rough = (np.linalg.norm(weights[name] - tg.restore(table[name])) for table in (stored, coarse))
        assert fine < rough, name
    restored = tg.dequantize(stored, config)
    tg.save_artifact(tmp_path / "a.bin", stored, config)
    loaded = tg.load_artifact(tmp_path / "a.bin", config)
    assert all(np.array_equal(loaded[name], restored[name]) for name in restored)
