"""COMPRESS, the quantisers: rounding schemes against formulas, pruning, and what each matrix of a model gets."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import preset_env, random_model, scale_of, toy_config

import train_gpt as tg

CPU = torch.device("cpu")
SIMPLE = ("gptq_lite", "int8_clip", "intn_row")  # the schemes that need no Hessian


def matrices(*shape: int, seed: int = 0, tails: float = 4.0) -> torch.Tensor:
    """Random weights with heavy tails (Student's t), whose rows differ in size."""
    generator = np.random.default_rng(seed)
    sizes = np.exp(generator.normal(size=(*shape[:-1], 1)))
    return torch.from_numpy(0.05 * sizes * generator.standard_t(tails, shape)).float()


def awkward_rows() -> torch.Tensor:
    """(1, rows, 64): zero, constant, one-weight, tiny, subnormal-scale and huge rows, then ordinary ones."""
    W = matrices(1, 12, 64, seed=3)
    W[0, 0], W[0, 1], W[0, 2] = 0, 0.3, -0.3
    W[0, 3], W[0, 3, 5] = 0, -2.0
    W[0, 4] *= 1e-9
    W[0, 5] *= 1e-30
    W[0, 6] *= 1e-5
    W[0, 7] *= 1e9
    W[0, 8] = torch.linspace(-1, 1, 64) * 3e38
    return W


def slow_round(W: np.ndarray, clip: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    top = 2 ** (bits - 1) - 1
    scale = scale_of(clip, top)
    return np.clip(np.round(W / scale.astype(np.float32)[..., None]), -top, top).astype(np.int8), scale


# ---------------------------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 5, 6, 7, 8])
@pytest.mark.parametrize("name", SIMPLE)
def test_every_scheme_keeps_its_range_and_stays_finite(name: str, bits: int) -> None:
    """Zero, constant, tiny and huge rows give codes within the range, positive finite scales, finite weights."""
    W = awkward_rows()
    codes, scale = tg.QUANTIZERS[name](W, None, 0.0, bits)
    top = 2 ** (bits - 1) - 1
    assert codes.dtype == torch.int8 and codes.shape == W.shape
    assert scale.dtype == torch.float16 and scale.shape == W.shape[:-1]
    assert int(codes.min()) >= -top and int(codes.max()) <= top
    assert (scale > 0).all() and scale.isfinite().all()
    restored = codes * scale.float().unsqueeze(-1)
    assert restored.isfinite().all() and not restored[0, 0].any()
    assert (codes[0, 1] == top).all() and (codes[0, 2] == -top).all()  # constant rows take the last level
    assert torch.allclose(restored[0, 1:3], W[0, 1:3], rtol=2**-10)


@pytest.mark.parametrize("bits", [3, 6, 8])
def test_round_to_rows_equals_the_formula(bits: int) -> None:
    """Codes and scales equal a NumPy formula; what is not clipped is at most half a step away."""
    W = torch.cat([matrices(3, 12, 64, seed=1), awkward_rows().expand(3, -1, -1)], 1)
    clip = W.abs().amax(-1) * torch.linspace(0.3, 1.2, 24)
    codes, scale = tg.round_to_rows(W, clip, bits)
    expected, expected_scale = slow_round(W.numpy(), clip.numpy(), bits)
    assert np.array_equal(scale.numpy(), expected_scale) and np.array_equal(codes.numpy(), expected)
    step = scale.float().unsqueeze(-1)
    inside = W.abs() <= (2 ** (bits - 1) - 1) * step
    assert inside.any() and ((codes * step - W).abs() <= 0.5001 * step)[inside].all()
    assert (codes.abs() == 2 ** (bits - 1) - 1)[~inside].all()


def test_codes_are_made_with_the_scale_they_are_read_with() -> None:
    """A weight that the unrounded scale would put on another level goes to the nearest level of the fp16 scale."""
    W = torch.rand(1, 200, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    codes, scale = tg.intn_row(W, None, 0.0, 8)
    step = scale.double().unsqueeze(-1)
    assert torch.equal(codes.double(), (W.double() / step).round().clamp(-127, 127))
    unrounded = (W / (W.abs().amax(-1, keepdim=True) / 127)).round()
    assert (unrounded != codes).any()


@pytest.mark.parametrize("n", [1, 2, 7, 512, 2048])
def test_row_quantiles_equal_linear_interpolation(n: int) -> None:
    """NumPy's and torch's quantiles, for awkward fractions and row lengths."""
    x = matrices(2, 5, n, seed=n).abs()
    fractions = [0.0, 0.03, 0.5, *tg.LITE_CLIPS, tg.INT8_CLIP]
    for fraction, found in zip(fractions, tg.row_quantiles(x, fractions)):
        assert found.shape == (2, 5)
        np.testing.assert_allclose(found.numpy(), np.quantile(x.double().numpy(), fraction, axis=-1), rtol=1e-5)
        np.testing.assert_allclose(found.numpy(), torch.quantile(x, fraction, dim=-1).numpy(), rtol=1e-4)


def test_row_quantiles_take_what_torch_quantile_refuses() -> None:
    """More than 2^24 elements in one call, as the stacked MLP matrices have."""
    x = torch.rand(2**18 + 1, 64, generator=torch.Generator().manual_seed(0))
    found = tg.row_quantiles(x, [0.25])[0]
    np.testing.assert_allclose(found[-3:].numpy(), np.quantile(x[-3:].double().numpy(), 0.25, axis=1), rtol=1e-5)


def test_int8_clip_is_the_baselines_percentile() -> None:
    """Equal to rounding with torch.quantile's clip, apart from ties that its float32 rank moves."""
    W = matrices(2, 64, 512, seed=5)
    codes, scale = tg.int8_clip(W, None, 0.0, 8)
    expected, expected_scale = slow_round(W.numpy(), torch.quantile(W.abs(), 0.9999984, dim=-1).numpy(), 8)
    assert (scale.numpy() == expected_scale).mean() > 0.98
    same = scale.numpy() == expected_scale
    assert np.array_equal(codes.numpy()[same], expected[same])
    assert (scale <= tg.intn_row(W, None, 0.0, 8)[1]).all()  # never wider than the maximum


def test_intn_row_puts_the_maximum_on_the_last_level() -> None:
    """The largest |w| of a row becomes +-31, so the published extra level -32 is never taken."""
    W = matrices(4, 200, 128, seed=6)
    codes, scale = tg.intn_row(W, None, 0.0, 6)
    assert np.array_equal(scale.numpy(), scale_of(W.abs().amax(-1).numpy(), 31))
    largest = W.abs().argmax(-1, keepdim=True)
    assert torch.equal(codes.gather(-1, largest), (31 * W.gather(-1, largest).sign()).to(torch.int8))


def test_gptq_lite_takes_the_best_percentile_of_each_row() -> None:
    """Equal to a loop over rows and percentiles; rows of one matrix choose differently."""
    W = matrices(2, 40, 2048, seed=7, tails=3.0)
    codes, scale = tg.gptq_lite(W, None, 0.0, 6)
    chosen = set()
    for n, row in np.ndindex(2, 40):
        w = W[n, row].numpy()
        tries = []
        for percentile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
            q, s = slow_round(w[None], np.quantile(np.abs(w), percentile, keepdims=True).astype(np.float32), 6)
            tries.append((float(np.mean((w - q[0] * s.astype(np.float32)) ** 2)), percentile, s[0]))
        error, percentile, s = min(tries)
        found = float((W[n, row] - codes[n, row] * scale[n, row].float()).square().mean())
        assert found == pytest.approx(error, rel=1e-4)
        assert abs(float(scale[n, row]) - float(s)) <= 2**-10 * float(s)
        chosen.add(percentile)
    assert len(chosen) >= 3
    plain, plain_scale = tg.intn_row(W, None, 0.0, 6)
    assert ((W - codes * scale.float()[..., None]) ** 2).sum() < (
        (W - plain * plain_scale.float()[..., None]) ** 2
    ).sum()


def test_gptq_lite_also_tries_not_to_clip() -> None:
    """A row that lies on the levels of its maximum comes back exactly, though one weight in 2,048 is far from all."""
    row = torch.from_numpy(np.random.default_rng(0).integers(-9, 10, 2048)).float() / 128
    row[7] = 31 / 128
    codes, scale = tg.gptq_lite(row[None, None], None, 0.0, 6)
    assert torch.equal(codes[0, 0] * scale[0, 0].float(), row)


def test_stacked_matrices_round_as_one_by_one() -> None:
    """No scheme lets one layer of a stack influence another."""
    W = matrices(3, 8, 96, seed=8)
    for scheme in map(tg.QUANTIZERS.get, SIMPLE):
        together = scheme(W, None, 0.0, 6)
        for layer in range(3):
            for whole, part in zip(together, scheme(W[layer : layer + 1], None, 0.0, 6)):
                assert torch.equal(whole[layer], part[0])


@pytest.mark.parametrize("frac", [0.0, 0.03, 0.25, 0.999])
def test_prune_zeroes_what_lies_below_the_quantile_of_its_matrix(frac: float) -> None:
    """Equal to NumPy's quantile, matrix by matrix; what stays is not changed; frac 0 is the identity."""
    W = matrices(3, 16, 50, seed=9) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None]
    found = tg.prune(W, frac)
    for before, after in zip(W.double().numpy(), found.numpy()):
        below = np.abs(before) < np.quantile(np.abs(before), frac)
        assert np.array_equal(after, np.where(below, 0, before).astype(np.float32))
        assert below.sum() == np.ceil(frac * 799)
    assert torch.equal(tg.prune(W[0], frac), found[0])
    assert not tg.prune(torch.zeros(1, 4, 4), frac).any()


@pytest.mark.parametrize("name", sorted(tg.QUANTIZERS))
def test_no_step_is_smaller_than_the_floor(name: str) -> None:
    """QUANT_SCALE_FLOOR raises the scales below it, in half precision, and codes are made with the raised ones."""
    W = matrices(1, 60, 64, seed=10)
    H = torch.eye(64)[None]
    free, raised = (tg.QUANTIZERS[name](W, H, 12.0, 6, floor) for floor in (0.0, 1 / 127))
    floor = np.float16(1 / 127)
    low = free[1].numpy() < floor
    assert 0.1 < low.mean() < 0.9
    assert np.array_equal(raised[1].numpy(), np.maximum(free[1].numpy(), floor))
    assert torch.equal(raised[0][~torch.from_numpy(low)], free[0][~torch.from_numpy(low)])
    nearest = (W / raised[1].float()[..., None]).round().clamp(-31, 31)
    assert torch.equal(raised[0].float(), nearest)  # with uncorrelated inputs GPTQ rounds to nearest, too


def correlated(n: int, cols: int, seed: int = 0) -> torch.Tensor:
    """Hessians (n, cols, cols) of inputs that depend on each other."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(n, 3 * cols, cols)) @ generator.normal(size=(n, cols, cols))
    return torch.from_numpy(X.transpose(0, 2, 1) @ X).float()


def test_gptq_takes_a_clip_for_each_row() -> None:
    """A row gets the scale clip * std / top of its own clip, and the codes that the whole matrix would have there."""
    W, H, values = matrices(2, 24, 160, seed=11), correlated(2, 160), (4.0, 9.5, 20.0)
    clips = torch.tensor(values)[torch.arange(48).view(2, 24) % 3]
    codes, scale = tg.gptq(W, H, clips, 6)
    assert np.array_equal(scale.numpy(), scale_of((clips * W.std(-1)).numpy(), 31))
    for value in values:
        alike, (plain, plain_scale) = clips == value, tg.gptq(W, H, value, 6)
        assert torch.equal(codes[alike], plain[alike]) and torch.equal(scale[alike], plain_scale[alike])
        assert not torch.equal(codes, plain)


def zipf_counts() -> np.ndarray:
    """Counts from a million down to none at all, shuffled."""
    counts = np.concatenate([1e6 / np.arange(1, 300) ** 1.5, np.zeros(60)]).astype(np.int64)
    return np.random.default_rng(0).permutation(counts)


@pytest.mark.parametrize("power", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_steps_of_embedding_rows_follow_the_frequency(power: float) -> None:
    """(count + 1)^-power over its geometric mean, within a factor of MOST_FINER, and then of geometric mean 1 again."""
    counts = zipf_counts()
    steps = tg.frequency_steps(torch.from_numpy(counts).float(), power).double().numpy()
    assert (steps > 0).all() and np.log(steps).mean() == pytest.approx(0, abs=1e-5)
    ordered = steps[np.argsort(-counts)]
    assert (np.diff(ordered) >= -1e-6).all()  # the more frequent, the finer
    raw = (counts + 1.0) ** -power
    raw /= np.exp(np.log(raw).mean())
    bounded = np.clip(raw, 1 / tg.MOST_FINER, tg.MOST_FINER)
    np.testing.assert_allclose(steps, bounded / np.exp(np.log(bounded).mean()), rtol=1e-4)
    free = bounded == raw
    np.testing.assert_allclose(steps[free] / steps[free][0], raw[free] / raw[free][0], rtol=1e-4)
    assert steps.max() <= tg.MOST_FINER**2 * steps.min() * 1.0001
    assert free.all() == (power <= 0.1) and len(set(counts[free])) > 10
    if power == 0:
        assert (steps == 1).all()
    else:
        assert steps[counts == 0].min() > 1 > steps[counts > 1000].max()


def test_steps_of_tokens_that_all_occur_alike_are_one() -> None:
    for count in (0, 7):
        torch.testing.assert_close(tg.frequency_steps(torch.full((9,), float(count)), 0.5), torch.ones(9))


# ---------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------


def small_model(preset: str, **changes: object) -> tuple[tg.Config, dict[str, np.ndarray]]:
    """A preset's settings at toy size, and the arrays of a random model."""
    config = tg.load_config(preset_env(preset, **changes))[0]
    arrays = {name: array.copy() for name, array in random_model(config, seed=1).arrays().items()}
    for bank in tg.BANKS:  # rows whose sizes differ, on both sides of the smallest step
        arrays[bank] *= np.random.default_rng(0).uniform(0.01, 2, (*arrays[bank].shape[:2], 1)).astype(np.float32)
    return config, arrays


def matrices_of(config: tg.Config, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices of a model by their names in the artifact; banks hold q over o, k over v."""
    L, named = config.num_layers, {}
    for i in range(L):
        named |= {f"blocks.{i}.attn.q": arrays["qo_bank"][i], f"blocks.{i}.attn.o": arrays["qo_bank"][L + i]}
        named |= {f"blocks.{i}.attn.k": arrays["kv_bank"][i], f"blocks.{i}.attn.v": arrays["kv_bank"][L + i]}
        named |= {f"blocks.{i}.mlp.up": arrays["mlp_up_bank"][i], f"blocks.{i}.mlp.down": arrays["mlp_down_bank"][i]}
    embeddings = {name: arrays[name] for name in ("tok_emb.weight", "bigram_emb.weight") if name in arrays}
    return named | embeddings


def names(stored: dict[str, tg.Parts]) -> set[tuple[str, str]]:
    return {(owner, part) for owner, parts in stored.items() for part in parts}


def names_in_table(config: tg.Config) -> set[tuple[str, str]]:
    return {(entry.owner, entry.part) for entry in tg.artifact_table(config)}


def pruned(W: np.ndarray, frac: float) -> np.ndarray:
    return np.where(np.abs(W) < np.quantile(np.abs(W.astype(np.float64)), frac), np.float32(0), W)


def best_clip(W: np.ndarray, bits: int, floor: float) -> np.ndarray:
    """The percentile of each row with the least squared error, by trying all."""
    tries = []
    for percentile in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = np.quantile(np.abs(W), percentile, axis=1).astype(np.float32)
        codes, scale = slow_round(W, np.maximum(clip, (2 ** (bits - 1) - 1) * floor), bits)
        tries.append((((W - codes * scale.astype(np.float32)[:, None]) ** 2).mean(1), clip))
    best = np.argmin([error for error, _ in tries], 0)
    return np.stack([clip for _, clip in tries])[best, np.arange(len(W))]


PUBLISHED = {  # scheme, bits of attention, MLP, embeddings, smallest clip, pruned share, what stays half-precision
    "baseline": ("int8_clip", 8, 8, 8, 1.0, 0.0, ()),
    "pr489": ("int8_clip", 8, 8, 8, 1.0, 0.0, ()),
    "fork5": ("gptq_lite", 6, 6, 8, 1.0, 0.05, ("blocks.10.attn.k",)),
    "fork5_twin": ("gptq_lite", 6, 6, 8, 1.0, 0.0, ("blocks.10.attn.k",)),
    "fork5_10l": ("intn_row", 6, 5, 8, 0.0, 0.03, ("blocks.9.attn.k", "tok_emb.weight")),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_matrices_of_the_early_systems_are_rounded_as_published(preset: str) -> None:
    """Each matrix, the bigram table too, is pruned and then quantised with its scheme, bits and floor, or kept as fp16."""
    scheme, attn, mlp, embed, smallest, frac, halves = PUBLISHED[preset]
    config, arrays = small_model(preset)
    stored = tg.quantize(arrays, config, CPU)
    clips = {
        "int8_clip": lambda W, bits: np.quantile(np.abs(W), 0.9999984, axis=1).astype(np.float32),
        "intn_row": lambda W, bits: np.abs(W).max(1),
        "gptq_lite": lambda W, bits: best_clip(W, bits, smallest / (2 ** (bits - 1) - 1)),
    }
    raised = 0
    for name, W in matrices_of(config, arrays).items():
        W = pruned(W, frac)
        assert (frac == 0) == (not (W == 0).any()), name
        if name in halves:
            assert np.array_equal(stored[name]["half"], W.astype(np.float16)) and len(stored[name]) == 1
            continue
        bits = attn if ".attn." in name else mlp if ".mlp." in name else embed
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(scale_of(clips[scheme](W, bits), top), np.float16(smallest / top))
        codes = np.clip(np.round(W / scale.astype(np.float32)[:, None]), -top, top)
        found = stored[name]["scale"]
        near = np.abs(found.astype(np.float64) - scale) <= 2**-10 * scale  # a quantile's rank differs by rounding
        assert near.mean() > 0.95, name
        exact = found == scale
        assert exact.mean() > 0.6 and np.array_equal(stored[name]["codes"][exact], codes[exact]), name
        raised += int((scale == np.float16(smallest / top)).sum())
    assert (raised > 20) == (smallest > 0)
    assert {name for name, parts in stored.items() if "codes" in parts} == matrices_of(config, arrays).keys() - set(halves)


def test_the_early_systems_restore_each_parameter_from_what_they_store() -> None:
    """dequantize() gives back all names and shapes, near the weights; parameters that are no matrices as fp16."""
    for preset in PUBLISHED:
        config, arrays = small_model(preset, MAG_PRUNE_FRAC=0)
        stored = tg.quantize(arrays, config, CPU)
        assert names(stored) == names_in_table(config)
        restored = tg.dequantize(stored, config)
        assert restored.keys() == arrays.keys()
        for name, array in arrays.items():
            assert restored[name].shape == array.shape and restored[name].dtype == np.float32
            if name in tg.BANKS or name.endswith("emb.weight"):
                assert np.abs(restored[name] - array).max() < 0.2 * np.abs(array).max(), (preset, name)
            else:
                assert np.array_equal(restored[name], array.astype(np.float16).astype(np.float32)), (preset, name)


@pytest.mark.parametrize(
    "patterns, kept",
    [
        ("", []),
        ("blocks.{last}.attn.k", ["blocks.3.attn.k"]),
        ("blocks.1.attn.k", ["blocks.1.attn.k"]),
        ("tok_emb, blocks.{last}.mlp", ["blocks.3.mlp.down", "blocks.3.mlp.up", "tok_emb.weight"]),
        ("attn.v,,", [f"blocks.{i}.attn.v" for i in range(4)]),
        ("blocks.4.", []),
    ],
)
def test_matrices_named_by_patterns_stay_in_half_precision(patterns: str, kept: list[str]) -> None:
    """Substrings of the names, {last} being the last layer's number; the others keep codes and scales."""
    config = toy_config(QUANT_SCHEME="intn_row", FP16_KEEP_NAME_PATTERNS=patterns)
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    stored, W = tg.quantize(arrays, config, CPU), matrices_of(config, arrays)
    assert sorted(name for name in W if "half" in stored[name]) == kept
    for name in W:
        assert name in kept or stored[name].keys() == {"codes", "scale"}
        assert name not in kept or np.array_equal(stored[name]["half"], W[name].astype(np.float16))
    assert names(stored) == names_in_table(config)
    restored = matrices_of(config, tg.dequantize(stored, config))
    for name in kept:
        assert np.array_equal(restored[name], W[name].astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("rows", [0, 1])
def test_attention_gates_are_int8_rows_or_half_precision(rows: int) -> None:
    """GATED_ATTN_QUANT_GATE: the largest weight of a row is code +-127 of max / 127; without it fp16."""
    config = toy_config(QUANT_SCHEME="intn_row", GATED_ATTN_QUANT_GATE=rows)
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    stored = tg.quantize(arrays, config, CPU)
    for i in range(4):
        name, W = f"blocks.{i}.attn_gate_w", arrays[f"blocks.{i}.attn_gate_w"]
        if rows:
            scale = (np.abs(W).max(1) / np.float32(127)).astype(np.float16)
            codes = np.round(W / scale.astype(np.float32)[:, None]).clip(-127, 127)
            assert np.array_equal(stored[name]["scale"], scale) and np.array_equal(stored[name]["codes"], codes)
        else:
            assert np.array_equal(stored[name]["half"], W.astype(np.float16))
    assert names(stored) == names_in_table(config)


def calibrated_model(**changes: object) -> tuple[tg.Config, dict[str, np.ndarray]]:
    """Settings of a toy model for GPTQ, and all arrays of its trained.bin."""
    config = toy_config(**changes)
    assert config.quant_scheme == "gptq"
    arrays = {name: array.copy() for name, array in random_model(config, seed=2).arrays().items()}
    for number, (name, shape) in enumerate(tg.trained_shapes(config).items()):
        if name.startswith("hessian."):
            arrays[name] = correlated(1, shape[0], seed=number)[0].numpy()
    arrays["token_counts"] = (1e4 / np.arange(1, 65) ** 1.5).astype(np.int64).astype(np.float32)[::-1].copy()
    assert arrays.keys() == tg.trained_shapes(config).keys()
    return config, arrays


def changed_by(arrays: dict[str, np.ndarray], config: tg.Config, **changes: float) -> tuple[set, dict, dict]:
    """(owner, part) of the stored arrays that these settings change; what is stored without and with them."""
    before, after = (tg.quantize(arrays, c, CPU) for c in (config, dataclasses.replace(config, **changes)))
    assert names(before) == names(after)
    changed = {(name, part) for name, part in names(before) if not np.array_equal(before[name][part], after[name][part])}
    return changed, before, after


EMBEDDING = {("tok_emb.weight", "codes"), ("tok_emb.weight", "scale")}


def test_frequency_changes_the_steps_of_the_embedding_alone(tmp_path: Path) -> None:
    """EMBED_FREQ_POWER: scales are those without it times frequency_steps; a reader need not know of it."""
    config, arrays = calibrated_model()
    changed, before, after = changed_by(arrays, config, embed_freq_power=0.5)
    assert changed == EMBEDDING
    steps = tg.frequency_steps(torch.from_numpy(arrays["token_counts"]), 0.5).numpy()
    ratio = after["tok_emb.weight"]["scale"].astype(np.float64) / before["tok_emb.weight"]["scale"]
    np.testing.assert_allclose(ratio, steps, rtol=2**-9)
    assert steps.max() > 2 * steps.min()
    table = after["tok_emb.weight"]["codes"] * after["tok_emb.weight"]["scale"].astype(np.float32)[:, None]
    assert np.array_equal(tg.dequantize(after, config)["tok_emb.weight"], table)
    error = np.abs(table - arrays["tok_emb.weight"]).mean(1) / np.abs(arrays["tok_emb.weight"]).mean(1)
    assert error[-16:].mean() < error[:16].mean()  # counts rise along the ids
    tg.save_artifact(tmp_path / "a.bin", after, dataclasses.replace(config, embed_freq_power=0.5))
    loaded, wanted = tg.load_artifact(tmp_path / "a.bin", config), tg.dequantize(after, config)
    assert all(np.array_equal(loaded[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("damping", [0.0, 0.04, 1.0])
def test_damping_changes_the_codes_of_the_embedding_alone(damping: float) -> None:
    """EMBED_DAMPING: GPTQ with so many means of its diagonal added to the head's Hessian, and all else as without it;
    the caller's arrays stay as they are, so that a second call gives the same."""
    config, arrays = calibrated_model()
    copies = {name: array.copy() for name, array in arrays.items()}
    changed, before, after = changed_by(arrays, config, embed_damping=damping)
    assert changed == ({("tok_emb.weight", "codes")} if damping else set())
    H = copies["hessian.head.0"].astype(np.float64)
    damped = torch.from_numpy(H + damping * np.diag(H).mean() * np.eye(len(H))).float()
    clip, bits, floor = tg.precision("embed", config)
    codes, scale = tg.gptq(torch.from_numpy(copies["tok_emb.weight"])[None], damped[None], clip, bits, floor)
    assert np.array_equal(after["tok_emb.weight"]["scale"], scale[0].numpy())
    assert (after["tok_emb.weight"]["codes"] != codes[0].numpy()).mean() < 2e-3  # ties that rounding of H moves
    assert all(np.array_equal(arrays[name], copies[name]) for name in arrays)
    again = tg.quantize(arrays, dataclasses.replace(config, embed_damping=damping), CPU)
    assert all(np.array_equal(after[name][part], again[name][part]) for name, part in names(after))


def test_schemes_without_statistics_need_no_counts() -> None:
    """EMBED_FREQ_POWER and EMBED_DAMPING mean nothing to the schemes other than GPTQ."""
    config = toy_config(QUANT_SCHEME="intn_row")
    arrays = {name: array.copy() for name, array in random_model(config).arrays().items()}
    assert changed_by(arrays, config, embed_freq_power=0.5, embed_damping=0.5)[0] == set()
