"""The entropy coder of integer codes: what is written is read again, is short, and damage is noticed."""

import hashlib
import tracemalloc
import zlib

import brotli
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

Matrices = list[np.ndarray]
PLAIN = tg.trellis_of(0)


def gaussian_codes(rows: int, cols: int, count: int = 1, step: float = 12 / 31, spread: float = 0.0) -> Matrices:
    """Rounded Gaussian matrices whose columns differ in scale, log-normally by `spread`; rows scaled to one std."""
    generator = np.random.default_rng(rows + cols + count)
    matrices = []
    for _ in range(count):
        weights = generator.standard_normal((rows, cols)) * np.exp(spread * generator.standard_normal(cols))
        scaled = weights / weights.std(1, keepdims=True) / step
        matrices.append(np.clip(np.round(scaled), -127, 127).astype(np.int8))
    return matrices


def plain_codes(rows: int) -> Matrices:
    """Fixed codes from integer arithmetic alone: three matrices of two shapes, the last with repeated rows."""
    state, numbers = 1, []
    for _ in range(4 * 3 * rows * 32):
        state = (1103515245 * state + 12345) % 2**31
        numbers.append(state >> 16)
    noise = np.array(numbers).reshape(4, -1) % 9 - 4
    first, second, alone = np.split(noise.sum(0).astype(np.int8), 3)  # within +-16, roughly Gaussian
    alone = alone.reshape(-1, 96)
    alone[-rows // 8 :] = alone[: rows // 8]
    return [first.reshape(rows, 32), second.reshape(rows, 32), alone]


def decode(data: bytes, shapes: list[tuple[int, int]]) -> Matrices:
    matrices = [np.zeros(shape, np.int8) for shape in shapes]
    tg.rans_decode(data, matrices)
    return matrices


def read(data: bytes, matrices: Matrices) -> Matrices:
    return decode(data, [m.shape for m in matrices])


def same(left: Matrices, right: Matrices) -> bool:
    return len(left) == len(right) and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right))


def resealed(data: bytes) -> bytes:
    """Data with a valid checksum, to test the checks behind it."""
    return zlib.crc32(data[4:]).to_bytes(4, "little") + data[4:]


def order_zero_bytes(matrices: Matrices) -> float:
    counts = np.unique(np.concatenate([m.ravel() for m in matrices]), return_counts=True)[1]
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def model_bytes(matrices: Matrices) -> tuple[float, int]:
    """Code length that the histograms imply, in bytes, and the number of states."""
    writer = tg.RansWriter()
    tg.code_stream(writer, [m.copy() for m in matrices], PLAIN)
    freq = np.concatenate([freq for freq, _ in writer.runs]).astype(float)
    return float((tg.RANS_BITS - np.log2(freq)).sum() / 8), -(-sum(m.size for m in matrices) // tg.RANS_RUN)


@st.composite
def streams(draw: st.DrawFn) -> Matrices:
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    matrices = []
    for _ in range(draw(st.integers(0, 4))):
        shape = draw(st.tuples(st.sampled_from([0, 1, 2, 7, 40]), st.sampled_from([0, 1, 3, 64])))
        spread = draw(st.sampled_from([0, 1, 3, 30, 1000]))
        matrices.append(np.clip(np.round(spread * generator.standard_normal(shape)), -127, 127).astype(np.int8))
    return matrices


@settings(max_examples=30, deadline=None)
@given(streams())
def test_what_is_written_is_read_again(matrices: Matrices) -> None:
    assert same(read(tg.rans_encode(matrices), matrices), matrices)


AWKWARD = {
    "nothing": [],
    "no codes": [np.zeros((0, 5), np.int8), np.zeros((5, 0), np.int8)],
    "one code": [np.array([[-127]], np.int8)],
    "zeros": [np.zeros((300, 40), np.int8)],
    "constant": [np.full((300, 40), -3, np.int8)],
    "extremes": [np.where(np.arange(6000).reshape(60, 100) % 3, 127, -127).astype(np.int8)],
    "one row": [gaussian_codes(40, 125)[0].reshape(1, -1)],
    "one column": [gaussian_codes(40, 125)[0].reshape(-1, 1)],
    "a transposed view": [gaussian_codes(50, 80)[0].T, gaussian_codes(80, 50)[0]],
    "several shapes": gaussian_codes(30, 20, 2) + gaussian_codes(20, 30) + gaussian_codes(30, 20),
    "three states": gaussian_codes(300, 300),
    "equal rows": [gaussian_codes(2, 100)[0][:1].repeat(90, 0)],
    "two scales in one column": [np.concatenate([gaussian_codes(64, 64)[0] // 8, gaussian_codes(64, 64)[0] * 8])],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_codes_are_read_again(name: str) -> None:
    data = tg.rans_encode(AWKWARD[name])
    assert same(read(data, AWKWARD[name]), AWKWARD[name])
    assert same(read(memoryview(data), AWKWARD[name]), AWKWARD[name])


def test_small_streams_cost_no_tables() -> None:
    assert len(tg.rans_encode([])) == 0
    assert len(tg.rans_encode([np.zeros((300, 40), np.int8)])) <= 20
    small = gaussian_codes(8, 16)  # 128 codes of about 3.4 bits
    assert len(tg.rans_encode(small)) < small[0].size


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_size_is_within_half_a_percent_of_the_models_own_length(spread: float) -> None:
    """The coder adds .03 % and a state per 2^15 codes; in all less than half a percent."""
    matrices = gaussian_codes(512, 256, 3, spread=spread)
    ideal, states = model_bytes(matrices)
    actual = len(tg.rans_encode(matrices))
    assert ideal < actual < 1.0005 * ideal + 4 * states + 8 < 1.005 * ideal


def test_equal_columns_cost_their_entropy() -> None:
    matrices = gaussian_codes(512, 256, 3)
    assert len(tg.rans_encode(matrices)) < 1.002 * order_zero_bytes(matrices)
    few_rows = gaussian_codes(16, 4096)  # a column's scale seen so far is mostly chance
    assert len(tg.rans_encode(few_rows)) < 1.006 * order_zero_bytes(few_rows)


def test_columns_of_different_scale_cost_less_than_their_common_entropy() -> None:
    """The scales of columns are learnt: bytes are near the entropy of each column's own codes, a lower bound."""
    matrices = gaussian_codes(512, 256, 3, spread=0.2)
    own = sum(order_zero_bytes([column]) for m in matrices for column in m.T)
    actual = len(tg.rans_encode(matrices))
    assert actual < 0.992 * order_zero_bytes(matrices)
    assert actual < 1.025 * own  # a histogram fitted to 512 codes is short by about 20 parameters


def test_fewer_bytes_than_brotli() -> None:
    matrices = gaussian_codes(512, 256, 3, spread=0.1)
    columns = b"".join(m.T.tobytes() for m in matrices)
    assert len(tg.rans_encode(matrices)) < 0.99 * len(brotli.compress(columns, quality=11, lgwin=22))


def test_means_of_columns_are_learnt() -> None:
    flat = gaussian_codes(256, 256, 2)
    shifted = [m + np.where(np.arange(256) % 2, 3, -3).astype(np.int8) for m in flat]
    assert len(tg.rans_encode(shifted)) < 1.02 * len(tg.rans_encode(flat))


def test_rows_like_earlier_rows_cost_little() -> None:
    """As the embeddings of tokens that never occur: copies of a row up to a few codes."""
    fresh = gaussian_codes(300, 256)[0]
    copies = fresh[np.random.default_rng(0).integers(0, 300, 300)]
    copies[:, ::16] += 1
    alone, both = len(tg.rans_encode([fresh])), len(tg.rans_encode([np.concatenate([fresh, copies])]))
    assert both < 1.25 * alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 127), st.integers(0, 2**32), st.sampled_from([0, 1, 10**3, 10**7]))
def test_frequencies_are_positive_and_complete(top: int, seed: int, largest: int) -> None:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, largest + 1, (5 * tg.PREDICTIONS, 2 * top + 1))
    counts *= generator.random(counts.shape) < 0.3
    counts[-1] = counts[:-1].sum(0)
    histograms = tg.histograms_of(counts, np.arange(tg.PREDICTIONS, 4 * tg.PREDICTIONS), PLAIN)
    freq, start = histograms.freq, histograms.start
    assert freq.min() >= 1 and (freq.sum(1) == 1 << tg.RANS_BITS).all()
    assert (start[:, 1:] == freq.cumsum(1)[:, :-1]).all() and not start[:, 0].any()


def test_buckets_of_the_scale_are_exact() -> None:
    assert tg.scale_buckets().max() < tg.SCALES - 1 and tg.scale_buckets().min() == 1
    for v in (0, 1, 2, 63, 64, 1000, 127 * tg.SCALE_ONE):
        k = int(tg.scale_buckets()[v]) - 1
        assert 2**k <= (v + 1) ** tg.COLUMN_STEPS < 2 ** (k + 1)


def test_bytes_are_the_same_everywhere() -> None:
    """A change of format shows here. The codes come from integer arithmetic, so the digest holds on any machine."""
    data = tg.rans_encode(plain_codes(96))
    assert data == tg.rans_encode(plain_codes(96))
    assert hashlib.sha256(data).hexdigest() == "bd8f7ca9a1f919487e17dd12e836ff0493b55ed13dd47fff240584e305e338a0"


class Recorder:
    """Takes the place of a writer."""

    def __init__(self) -> None:
        self.symbols: list[list[int]] = []

    def code(self, symbols: np.ndarray, rows: np.ndarray, histograms: tg.Histograms) -> np.ndarray:
        self.symbols.append(symbols.tolist())
        return symbols


@pytest.mark.parametrize("largest, symbols", [(7, [[1, 4, 4, 0], [0, 3, 5]]), (2, [[1, 4, 4, 0]])])
def test_outermost_symbols_are_followed_by_the_distance(largest: int, symbols: list[list[int]]) -> None:
    """The example of code_values: five symbols, values up to 7; without values beyond nothing follows."""
    recorder, values = Recorder(), np.int16([-1, 2, 5, -7]).clip(-largest, largest)
    histograms = tg.histograms_of(np.zeros((3 * tg.PREDICTIONS, 5), np.int64), np.array([tg.PREDICTIONS]), PLAIN)
    found, first = tg.code_values(recorder, values, np.zeros(4, np.int64), histograms, largest)
    assert np.array_equal(found, values) and first.tolist() == symbols[0]
    assert recorder.symbols == symbols


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> tuple[Matrices, bytes]:
    monkeypatch.setattr(tg, "RANS_RUN", 256)  # nine states instead of one
    matrices = plain_codes(24)
    return matrices, tg.rans_encode(matrices)  # 2304 codes in about 1.2 kB


def test_cut_or_extended_data_is_refused(sample: tuple[Matrices, bytes]) -> None:
    matrices, data = sample
    for changed in [data[:n] for n in [*range(44), *range(44, len(data), 97)]] + [data + b"\0", data + b"\0\0", b"x"]:
        for candidate in (changed, resealed(changed)):
            with pytest.raises(ValueError):
                read(candidate, matrices)


def test_missing_words_are_noticed_at_once(sample: tuple[Matrices, bytes]) -> None:
    matrices, data = sample
    with pytest.raises(ValueError, match="cut short"):
        read(resealed(data[:-2]), matrices)
    with pytest.raises(ValueError, match="buffer"):
        read(resealed(data[:6]), matrices)


def test_every_flipped_bit_is_noticed(sample: tuple[Matrices, bytes]) -> None:
    matrices, data = sample
    for position in range(8 * len(data)):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):
            read(bytes(changed), matrices)


def test_flipped_bits_behind_a_valid_checksum_end_in_an_error(sample: tuple[Matrices, bytes]) -> None:
    """ValueError because the final states are wrong; or the same codes, where a setting differs without an effect."""
    matrices, data = sample
    positions = [*range(32, 400, 7), *range(400, 8 * len(data), 397)]
    for position in positions:
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        try:
            codes = read(resealed(bytes(changed)), matrices)
        except ValueError:
            continue
        assert same(codes, matrices)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 40), st.integers(0, 40))
def test_noise_is_refused(noise: bytes, rows: int, cols: int) -> None:
    for data in (noise, resealed(bytes(4) + noise), resealed(bytes(4) + bytes([0, 0, 1, 0]) + noise)):
        if data or rows * cols:
            with pytest.raises(ValueError):
                decode(data, [(rows, cols)] * 2)


def test_other_shapes_are_refused(sample: tuple[Matrices, bytes]) -> None:
    _, data = sample
    for shapes in ([], [(24, 32)], [(24, 32)] * 4, [(0, 4)], [(32, 24), (32, 24), (8, 96)], [(64, 64)] * 40):
        with pytest.raises(ValueError):
            decode(data, shapes)


@pytest.mark.parametrize("inertia, kinds, references", [(0, 0, 0), (1, 1, 0), (1, 0, 5), (1, 0, 63)])
def test_impossible_settings_are_refused(inertia: int, kinds: int, references: int) -> None:
    """A forged file: a weight of zero rows, a first row with a reference, a reference to a row still to come."""
    writer, rows = tg.RansWriter(), 8
    of_rows = np.zeros((2, rows), np.int64)
    of_rows[:, 5], of_rows[:, 0] = (1, references), (kinds, 0)
    tg.code_numbers(writer, np.array([1, 1]), 7)
    tg.code_numbers(writer, np.array([inertia, 1]), 14)
    tg.code_numbers(writer, np.array([1]), 1)
    tg.code_numbers(writer, of_rows[0], 2)
    tg.code_numbers(writer, of_rows[1][of_rows[0] > 0] % (1 << rows.bit_length()), rows.bit_length())
    with pytest.raises(ValueError, match="setting"):
        decode(resealed(bytes(4) + writer.finish(1)), [(rows, 4)])


@pytest.mark.parametrize("top, largest", [(2, 1), (0, 1), (3, 127), (127, 127)])
def test_codes_out_of_range_are_refused(top: int, largest: int) -> None:
    """A forged file whose outermost symbol is followed by 127 beyond; codes above 127 would be out of all tables."""
    writer = tg.RansWriter()
    tg.code_numbers(writer, np.array([top, largest]), 7)
    tg.code_numbers(writer, np.array([1, 1]), 14)
    tg.code_numbers(writer, np.array([0]), 1)
    counts = np.zeros((tg.KINDS * tg.SCALES * tg.PREDICTIONS, 2 * top + 1), np.int64)
    histograms = tg.histograms_of(counts, np.array([tg.PREDICTIONS]), PLAIN)
    writer.code(np.array([2 * top]), np.array([0]), histograms)
    tg.code_numbers(writer, np.array([127]), 7)
    with pytest.raises(ValueError, match="range|end"):
        decode(resealed(bytes(4) + writer.finish(1)), [(1, 1)])


def test_outliers_cost_little() -> None:
    matrices = gaussian_codes(512, 256, 2)
    plain = len(tg.rans_encode(matrices))
    for matrix in matrices:
        matrix[::100, 5] = 127
        matrix[::100, 7] = -100
    assert same(read(tg.rans_encode(matrices), matrices), matrices)
    assert len(tg.rans_encode(matrices)) < plain + 24 * 5


def test_memory_follows_the_shapes() -> None:
    matrices = gaussian_codes(48, 48, 2)
    data = tg.rans_encode(matrices)
    tg.scale_buckets()
    for candidate in (data, resealed(data[:300] + bytes(100_000))):
        tracemalloc.start()
        try:
            read(candidate, matrices)
        except ValueError:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * sum(m.size for m in matrices) + 2**25


@pytest.mark.parametrize("wrong", [np.zeros((2, 2)), np.zeros(4, np.int8), np.full((2, 2), -128, np.int8)])
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="int8"):
        tg.rans_encode([wrong])
