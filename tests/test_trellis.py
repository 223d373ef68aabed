"""Trellis-coded quantisation: its rule, the search for the best path, the quantiser, the coder, and the artifact."""

import dataclasses
import itertools
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FEW_VISITS, random_model, short_coder_states, toy_config

import train_gpt as tg

CPU, STATES = torch.device("cpu"), (4, 8, 16)
Matrices = list[np.ndarray]


@pytest.fixture(autouse=True)
def many_states_of_the_coder() -> Iterator[None]:
    with short_coder_states():
        yield


# ---------------------------------------------------------------------------------------------------------------
# The rule
# ---------------------------------------------------------------------------------------------------------------

# What the specification prints for 8 states, by state: q, the next state for even and odd k, the two states before, and
# the classes n mod 4 of the codes between them and this one.
PRINTED = dict(
    q=[0, 1, 0, 1, 0, 1, 0, 1],
    following=[(0, 2), (5, 7), (1, 3), (4, 6), (2, 0), (7, 5), (3, 1), (6, 4)],
    before=[(0, 4), (2, 6), (0, 4), (2, 6), (3, 7), (1, 5), (3, 7), (1, 5)],
    classes=[(0, 2), (0, 2), (2, 0), (2, 0), (1, 3), (1, 3), (3, 1), (3, 1)],
)
# Row t of a column uses the grid given by these parity checks: delays of q, and the delay of p = k mod 2.
CHECKS = {4: ((2,), 1), 8: ((1, 3), 2), 16: ((1, 4), 2)}


def grids_by_checks(k: list[int], states: int) -> list[int]:
    """q of each code of a column by the parity check, everything before the column being 0."""
    delays, delay = CHECKS[states]
    q: list[int] = []
    for t in range(len(k)):
        bits = [q[t - d] for d in delays if t >= d] + [k[t - delay] % 2 for _ in range(t >= delay)]
        q.append(sum(bits) % 2)
    return q


def test_the_tables_of_eight_states_are_the_printed_ones() -> None:
    trellis = tg.trellis_of(8)
    (before, classes), following = trellis.branches.tolist(), trellis.following.reshape(-1, 2)
    assert [state & 1 for state in range(8)] == PRINTED["q"]
    assert [tuple(pair) for pair in following.tolist()] == PRINTED["following"]
    assert list(zip(*before)) == PRINTED["before"] and list(zip(*classes)) == PRINTED["classes"]


@pytest.mark.parametrize("states", STATES)
def test_states_follow_the_parity_checks(states: int) -> None:
    """The state machine gives each code the grid that the check over the codes above it gives."""
    dice, trellis = random.Random(states), tg.trellis_of(states)
    for _ in range(50):
        k, state, found = [dice.randrange(-9, 10) for _ in range(40)], 0, []
        for code in k:
            found.append(state & 1)
            state = int(trellis.following[2 * state + code % 2])
        assert found == grids_by_checks(k, states)


@pytest.mark.parametrize("states", STATES)
def test_every_state_has_two_ways_in_and_two_out(states: int) -> None:
    trellis = tg.trellis_of(states)
    assert sorted(trellis.following.tolist()) == sorted([*range(states)] * 2)
    for state, (before, classes) in enumerate(zip(*(x.T.tolist() for x in trellis.branches))):
        assert before == sorted(before)
        for origin, z in zip(before, classes):
            assert z % 2 == origin % 2 and trellis.following[2 * origin + z // 2] == state


# ---------------------------------------------------------------------------------------------------------------
# The best path
# ---------------------------------------------------------------------------------------------------------------


def rule_holds(n: np.ndarray, states: int) -> bool:
    """Whether codes n (rows, cols) in half steps obey the rule, one column and code after the other."""
    following = tg.trellis_of(states).following
    for column in n.T.tolist():
        state = 0
        for row, code in enumerate(column):
            state = 0 if row % tg.TRELLIS_SEGMENT == 0 else state
            if code % 2 != state % 2:
                return False
            state = following[2 * state + (code // 2) % 2]
    return True


def brute_force(costs: np.ndarray, states: int) -> float:
    """The least cost of all paths of k parities from state 0, for one column of costs (L, 4)."""
    following, least = tg.trellis_of(states).following, np.inf
    for parities in itertools.product((0, 1), repeat=len(costs)):
        state, total = 0, 0.0
        for row, p in enumerate(parities):
            total += costs[row, 2 * p + state % 2]
            state = following[2 * state + p]
        least = min(least, total)
    return least


def cost_of(costs: np.ndarray, path: np.ndarray, states: int) -> float:
    """The cost of one path of classes, which must be a path of the trellis."""
    following, state, total = tg.trellis_of(states).following, 0, 0.0
    for row, z in zip(costs, path.tolist()):
        assert z % 2 == state % 2
        total += row[z]
        state = following[2 * state + z // 2]
    return total


@pytest.mark.parametrize("states", STATES)
def test_the_path_is_the_cheapest_of_all(states: int) -> None:
    """Against all 2^L paths of short columns; the costs are quarters, so that sums are exact."""
    generator = np.random.default_rng(states)
    for length in (1, 2, 3, 7, 10):
        costs = generator.integers(0, 64, (6, length, 4)) / 4
        paths = tg.plain_trellis(torch.from_numpy(costs).float(), tg.trellis_of(states).branches)
        assert paths.shape == (6, length) and paths.dtype == torch.int64
        for column, path in zip(costs, paths.numpy()):
            assert cost_of(column, path, states) == brute_force(column, states)


@pytest.mark.filterwarnings("ignore")  # of NumPy, about the interpreter
@pytest.mark.parametrize("states", STATES)
def test_the_kernel_decides_like_the_plain_function(states: int) -> None:
    """Bit for bit, on random costs, on costs with many ties, and where a row costs nothing at all."""
    pytest.importorskip("triton.runtime.interpreter")
    generator, branches = torch.Generator().manual_seed(states), tg.trellis_of(states).branches
    for N, L in ((1, 1), (2, 23)):
        smooth = torch.rand(N, L, 4, generator=generator)
        tied = torch.randint(0, 2, (N, L, 4), generator=generator).float()
        padded = smooth * (torch.arange(L) < L - 2)[:, None]
        for costs in (smooth, tied, padded, smooth.mT.contiguous().mT):
            assert torch.equal(tg.trellis(costs, branches), tg.plain_trellis(costs, branches))


def test_the_choice_of_kernels_notices_a_wrong_path() -> None:
    """The check at start-up, which compares the fused functions with the plain ones."""
    wrong = tg.PLAIN._replace(trellis=lambda costs, branches: tg.plain_trellis(-costs, branches))
    assert tg.disagreement(tg.PLAIN, CPU) == 0 and tg.disagreement(wrong, CPU) > 0.1


# ---------------------------------------------------------------------------------------------------------------
# The quantiser
# ---------------------------------------------------------------------------------------------------------------


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


def round_on_trellis(x: torch.Tensor, states: int, rows: list[int], top: int, step: torch.Tensor | None = None) -> Any:
    step = torch.ones_like(x) if step is None else step
    return tg.on_trellis(states, rows, tg.plain_trellis, step, top)(x.clone())


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("rows", [[1], [5, 3], [256], [257, 40, 600]])
def test_columns_obey_the_rule_in_every_matrix_of_a_stack(states: int, rows: list[int]) -> None:
    """Each matrix begins in state 0, and so does each segment; a short last one is not harmed by its padding."""
    x = 3 * gaussian(2, sum(rows), seed=len(rows))
    n = (2 * round_on_trellis(x, states, rows, 31)).numpy()
    assert np.array_equal(n, np.round(n)) and np.abs(n / 2 - x.numpy()).max() < 2
    for matrix, column in itertools.product(range(2), np.split(np.arange(sum(rows)), np.cumsum(rows)[:-1])):
        assert rule_holds(n[matrix, column, None].astype(int), states)
        alone = round_on_trellis(x[matrix : matrix + 1, column], states, [len(column)], 31)
        assert torch.equal(alone, torch.from_numpy(n[matrix : matrix + 1, column]) / 2)


@pytest.mark.parametrize("top", [1, 2, 3, 127])
def test_no_point_lies_beyond_the_range(top: int) -> None:
    """|n| <= 2 top: of the second grid k ends at top - 1. Both grids are used to their ends; nothing ends in NaN."""
    for x in (top * gaussian(1, 2000), gaussian(1, 512) * torch.logspace(-1, 38, 512), torch.full((1, 300), torch.inf)):
        n = (2 * round_on_trellis(x, 8, [x.size(1)], top))[0].numpy()
        assert rule_holds(n[:, None].astype(int), 8)
        assert np.abs(n).max() <= 2 * top
        if x.isfinite().all() and len(n) == 2000:
            k, q = np.divmod(n, 2)
            assert [(k[q == 0].min(), k[q == 0].max()), (k[q == 1].min(), k[q == 1].max())] == [
                (-top, top),
                (-top, top - 1),
            ]


def test_a_huge_weight_does_not_spoil_its_column() -> None:
    """Its error beyond the last point would drown the others in float32."""
    x = 3 * gaussian(1, 256)
    spoilt = x.clone()
    spoilt[0, 100] = 1e20
    errors = [(round_on_trellis(each, 8, [256], 31) - x).square()[0] for each in (x, spoilt)]
    others = torch.arange(256) != 100
    assert errors[1][others].mean() < 1.2 * errors[0][others].mean()


def test_rows_count_by_the_square_of_their_step() -> None:
    """What is least is the sum of squared errors in units of the weights, where rows have different steps."""
    step, x = torch.rand(1, 256) * 4 + 0.1, 3 * gaussian(1, 256)
    wise, flat = round_on_trellis(x, 8, [256], 31, step), round_on_trellis(x, 8, [256], 31)
    error = lambda found: float(((found - x) * step).square().sum())
    assert error(wise) < 0.97 * error(flat)


@pytest.mark.parametrize("states, least", [(4, 0.90), (8, 0.97), (16, 1.02)])
def test_gain_on_white_gaussian_columns(states: int, least: float) -> None:
    """dB of the squared error at equal bytes, actual ones on both sides; 6.02 dB per bit converts what is left.

    Published for whole columns of 512 and entropies: 1.00, 1.08, 1.14; segments of 256 rows cost 0.01 to 0.02.
    """
    x, decibels = 31 / 12 * gaussian(512, 192, seed=states), []
    for count, codes in ((0, x.round()), (states, 2 * round_on_trellis(x.mT.contiguous(), states, [512], 31).mT)):
        error = float((codes / (2 if count else 1) - x).square().mean())
        size = len(tg.rans_encode([codes.numpy().astype(tg.trellis_of(count).dtype)], count))
        decibels.append(10 * np.log10(error) + 6.02 * 8 * size / x.numel())
    assert decibels[0] - decibels[1] > least


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_gptq_on_the_trellis_loses_less_than_without(bits: int) -> None:
    """Same scales; codes in half steps that obey the rule; and a smaller loss tr(E H E^T) at about equal entropy."""
    W, X = gaussian(2, 300, 48, seed=bits), gaussian(2, 200, 48) @ gaussian(2, 48, 48, seed=1)
    H, clip = X.mT @ X, 2.0 ** (bits - 1) / 2
    config = toy_config(TRELLIS_STATES=8, COMPRESSOR="rans")
    codes, scale = tg.quantizer_of(config, "gptq", [200, 100], CPU)(W, H, clip, bits)
    plain, plain_scale = tg.gptq(W, H, clip, bits)
    assert codes.dtype == torch.int16 and plain.dtype == torch.int8 and torch.equal(scale, plain_scale)
    for part in (codes[0, :200], codes[1, 200:]):
        assert rule_holds(part.numpy(), 8)
    loss = lambda values: float(((values - W) @ H * (values - W)).sum())
    step = scale.float().unsqueeze(-1)
    assert int(codes.abs().max()) <= 2 * (2 ** (bits - 1) - 1)
    if bits > 2:  # of two bits most weights are clipped, which costs more than a trellis gains
        assert loss(codes * step / 2) < 0.88 * loss(plain * step)


# ---------------------------------------------------------------------------------------------------------------
# The coder
# ---------------------------------------------------------------------------------------------------------------


def valid_codes(rows: int, cols: int, states: int, spread: float, seed: int = 0, far: float = 0.0) -> np.ndarray:
    """Random codes (rows, cols) int16 that obey the rule, a share `far` of them at the ends +-254 of their grid."""
    generator, following = np.random.default_rng(seed), tg.trellis_of(states).following
    n, state = np.zeros((rows, cols), np.int16), np.zeros(cols, np.int64)
    for row in range(rows):
        state = state * (row % tg.TRELLIS_SEGMENT > 0)
        draws = generator.standard_normal(cols) * np.where(generator.random(cols) < far, 1e9, spread)
        k = np.round(draws).clip(-127, 127 - state % 2).astype(np.int64)
        n[row] = 2 * k + state % 2
        state = following[2 * state + k % 2]
    return n


def decode(data: bytes, matrices: Matrices, states: int) -> Matrices:
    found = [np.zeros(m.shape, np.int16) for m in matrices]
    tg.rans_decode(data, found, states)
    return found


def same(left: Matrices, right: Matrices) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right))


def resealed(data: bytes) -> bytes:
    return zlib.crc32(data[4:]).to_bytes(4, "little") + data[4:]


GRIDS = {
    "one code": [(1, 1)],
    "one row": [(1, 700)],
    "one column": [(700, 1)],
    "a ragged last segment": [(300, 17)],
    "stacked, of equal shape": [(260, 20)] * 3,
    "several shapes": [(40, 30), (30, 40), (40, 30), (0, 5), (513, 3)],
}


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("name", GRIDS)
def test_codes_on_the_grids_are_read_again(name: str, states: int) -> None:
    for spread in (0.0, 0.4, 2.0, 40.0, 1000.0):
        matrices = [valid_codes(*shape, states, spread, seed) for seed, shape in enumerate(GRIDS[name])]
        assert all(rule_holds(m, states) for m in matrices)
        assert same(decode(tg.rans_encode(matrices, states), matrices, states), matrices)


@pytest.mark.parametrize("states", STATES)
def test_outermost_codes_are_read_again(states: int) -> None:
    """The ends of both grids, with few codes beyond `top` and with many. q = 1: n from -253 to 253."""
    for far in (0.01, 0.5, 1.0):
        matrix = valid_codes(90, 40, states, 3.0, far=far)
        assert {-254, -253, 253, 254} <= set(matrix.ravel().tolist()) and rule_holds(matrix, states)
        assert same(decode(tg.rans_encode([matrix], states), [matrix], states), [matrix])


def test_counts_of_the_other_grid_save_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both grids see the same distribution half a step apart, so in a small stream each learns from the other."""
    codes = (2 * round_on_trellis(2.6 * gaussian(64, 128), 8, [128], 31)).numpy().T.astype(np.int16)
    together = len(tg.rans_encode([codes], 8))
    monkeypatch.setattr(tg, "half_step_away", lambda counts, shift: np.zeros_like(counts))
    alone = len(tg.rans_encode([codes], 8))
    assert together < alone


def test_memory_order_does_not_matter() -> None:
    matrices = [valid_codes(60, 30, 8, 2.0, seed) for seed in range(2)]
    data = tg.rans_encode([np.asfortranarray(m) for m in matrices], 8)
    assert data == tg.rans_encode(matrices, 8)
    found = [np.zeros((60, 30), np.int16, order="F") for _ in matrices]
    tg.rans_decode(data, found, 8)
    assert same(found, matrices)


@pytest.mark.parametrize("states", STATES)
def test_codes_off_the_grids_are_refused_by_the_writer(states: int) -> None:
    """One code on the wrong grid, or one of the right grid whose parity moves those below; and what is out of range."""
    good = valid_codes(50, 6, states, 3.0)
    tg.rans_encode([good], states)
    for change in (1, -1, 2, -2):
        for row, column in ((0, 0), (20, 3), (49, 5)):
            bad = good.copy()
            bad[row, column] += change
            if not rule_holds(bad, states):  # a change of the last row's parity moves nothing
                with pytest.raises(ValueError, match="rule|range"):
                    tg.rans_encode([np.asfortranarray(bad)], states)
    for wrong in (good.astype(np.int8), good[0], np.full((2, 2), 256, np.int16), np.full((2, 2), -256, np.int16)):
        with pytest.raises(ValueError, match="int16"):
            tg.rans_encode([wrong], states)


def test_streams_of_another_trellis_are_refused_or_break_no_rule() -> None:
    """The number of states is in the artifact's header; with a wrong one the stream does not end where it should."""
    matrices = [valid_codes(200, 30, 8, 2.0)]
    data = tg.rans_encode(matrices, 8)
    for states in (4, 16):
        with pytest.raises(ValueError):
            decode(data, matrices, states)
    with pytest.raises(ValueError):
        tg.rans_decode(data, [np.zeros((200, 30), np.int8)])


@pytest.mark.parametrize("second", [False, True])
def test_a_forged_code_beyond_the_range_is_refused(second: bool) -> None:
    """The symbol above the last point of the second grid, and a distance that leads out of the range of the first."""
    writer, trellis = tg.RansWriter(), tg.trellis_of(8)
    tg.code_numbers(writer, np.array([3, 4]), 7)  # top and largest
    tg.code_numbers(writer, np.array([1, 1]), 14)
    tg.code_numbers(writer, np.array([0]), 1)
    counts = np.zeros((2 * trellis.contexts + 1, 7), np.int64)
    contexts = np.array([tg.scale_buckets()[0] * trellis.predictions]) + [0, trellis.contexts]
    histograms = tg.histograms_of(counts, contexts, trellis)
    path = [(1, 0), (0, 0), (3, 1)] if second else [(3, 0)]  # (k, q): an odd k puts the code two rows below on grid 1
    for k, q in path:
        writer.code(np.array([k + 3]), np.array([q]), histograms)
        if k == 3 and not second:
            tg.code_numbers(writer, np.array([2]), 7)  # k = 5, above `largest`
    with pytest.raises(ValueError, match="out of range"):
        decode(resealed(bytes(4) + writer.finish(1)), [np.zeros((len(path), 1))], 8)


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Bits flipped, bytes replaced, cut out or put in, mostly in front, where the settings of the stream are."""
    data = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = min(dice.randrange(len(data)), dice.choice([len(data), 12, 40]) - 1)
        kind, length = dice.randrange(4), dice.choice([1, 2, 4, 30])
        if kind == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[at : at + length] = dice.randbytes(length)
        elif kind == 2 and len(data) > 40:
            del data[at : at + length]
        else:
            data[at:at] = dice.randbytes(length)
    return bytes(data)


def attack(mutations: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Mutated streams behind a valid checksum: each is refused by a ValueError, or gives codes on the grids."""
    monkeypatch.setattr(tg, "RANS_RUN", 2**15)  # as few states as can be, which are all compared at the end
    dice, counts = random.Random(seed), dict(refused=0, read=0)
    streams = []
    for states, shapes in itertools.product(STATES, ([(40, 12), (40, 12)], [(300, 9)])):
        matrices = [valid_codes(*shape, states, dice.choice([0.5, 3.0, 60.0]), i) for i, shape in enumerate(shapes)]
        streams.append((states, matrices, tg.rans_encode(matrices, states)))
    for _ in range(mutations):
        states, matrices, data = dice.choice(streams)
        try:
            found = decode(resealed(mutated(data, dice)), matrices, states)
        except ValueError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        assert all(rule_holds(m, states) and np.abs(m).max() <= 254 for m in found)
    return counts


def test_mutated_streams_are_refused_or_obey_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attack(50, 0, monkeypatch)["refused"] > 40


@pytest.mark.slow
def test_many_mutated_streams_are_refused_or_obey_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = attack(2000, 1, monkeypatch)
    print(counts)
    assert counts["refused"] > 1600


# ---------------------------------------------------------------------------------------------------------------
# The artifact
# ---------------------------------------------------------------------------------------------------------------


def trained(config: tg.Config) -> dict[str, np.ndarray]:
    """Random weights and Hessians in place of a trained.bin."""
    arrays, generator = random_model(config).arrays(), np.random.default_rng(0)
    for name, shape in tg.trained_shapes(config).items():
        if name.startswith("hessian"):
            X = generator.standard_normal((3 * shape[0], shape[0])) @ generator.standard_normal(shape)
            arrays[name] = (X.T @ X).astype(np.float32)
    return arrays | {"token_counts": generator.integers(0, 99, config.vocab_size).astype(np.float32)}


LAYOUTS = {
    "plain": {},
    "low-rank corrections": dict(lqer_rank=2, lqer_top_k=4),
    "some matrices stay fp16": dict(fp16_keep_name_patterns="tok_emb,blocks.{last}.attn.k"),
    "rows of different steps": dict(embed_freq_power=0.25, embed_damping=0.04, quant_scale_floor=0.01),
    "a table without a Hessian": dict(bigram_vocab_size=20, bigram_dim=16, embed_bits=8, mlp_bits=3),
    "pruned": dict(mag_prune_frac=0.2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_artifacts_are_read_as_they_were_quantised(name: str, tmp_path: Path) -> None:
    """Codes on the grids for every matrix with a Hessian; the reader needs no TRELLIS_STATES, the header has it."""
    config = dataclasses.replace(toy_config(**FEW_VISITS, COMPRESSOR="rans", TRELLIS_STATES=8), **LAYOUTS[name])
    tg.validate(config)
    arrays = trained(config)
    stored = tg.quantize(arrays, config, CPU)
    on_grids = {owner for owner, parts in stored.items() if parts.get("codes", np.zeros(1)).dtype == np.int16}
    halves = {owner for owner, parts in stored.items() if "half" in parts}
    assert on_grids == ({*tg.bank_rows(config)} | {"tok_emb.weight"}) - halves and len(on_grids) > 10
    assert all(rule_holds(stored[owner]["codes"], 8) for owner in on_grids)
    for owner in (owner for owner in on_grids if ".attn." in owner):
        W = tg.matrix_of(arrays, owner, config)
        assert np.linalg.norm(tg.restore(stored[owner]) - W) < 0.6 * np.linalg.norm(W)
    tg.save_artifact(tmp_path / "a.bin", stored, config)
    assert tg.read_container(tmp_path / "a.bin")[0]["trellis"] == 8
    expected = tg.dequantize(stored, config)
    for reader in (
        config,
        dataclasses.replace(config, trellis_states=0),
        dataclasses.replace(config, trellis_states=16),
    ):
        loaded = tg.load_artifact(tmp_path / "a.bin", reader)
        assert expected.keys() == loaded.keys() and all(np.array_equal(loaded[key], expected[key]) for key in expected)
    tg.write_tensors(tmp_path / "tensors.csv", tmp_path / "a.bin", arrays, config)
    assert "nan" not in (tmp_path / "tensors.csv").read_text()


def test_without_a_trellis_the_header_is_what_it_was(tmp_path: Path) -> None:
    config = toy_config(**FEW_VISITS, COMPRESSOR="rans")
    tg.save_artifact(tmp_path / "a.bin", tg.quantize(trained(config), config, CPU), config)
    assert "trellis" not in tg.read_container(tmp_path / "a.bin")[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[tg.Config, dict[str, Any], list[bytes]]:
    """Settings, header and streams of an artifact on the trellis."""
    config = toy_config(**FEW_VISITS, COMPRESSOR="rans", TRELLIS_STATES=8)
    path = tmp_path_factory.mktemp("written") / "a.bin"
    with short_coder_states():
        tg.save_artifact(path, tg.quantize(trained(config), config, CPU), config)
    meta, blobs = tg.read_container(path)
    return config, meta, [bytes(blob) for blob in blobs]


@pytest.mark.parametrize("wrong", [5, 32, -8, 8.0, True, "8", None, [8], 10**30])
def test_headers_with_another_trellis_are_refused(wrong: Any, tmp_path: Path, written: tuple) -> None:
    config, meta, blobs = written
    tg.write_container(tmp_path / "a.bin", meta | {"trellis": wrong}, blobs)
    with pytest.raises(tg.UserError, match="damaged artifact"):
        tg.load_artifact(tmp_path / "a.bin", config)


@pytest.mark.parametrize("changes", [dict(COMPRESSOR="brotli"), dict(QUANT_SCHEME="gptq_lite"), dict(TRELLIS_STATES=6)])
def test_what_does_not_go_with_a_trellis_is_refused_in_one_line(changes: dict) -> None:
    with pytest.raises(tg.UserError) as refusal:
        toy_config(**dict(TRELLIS_STATES=8, COMPRESSOR="rans") | changes)
    text = str(refusal.value)
    assert "TRELLIS_STATES=" in text and "\n" not in text and ("set" in text or "choose" in text)
