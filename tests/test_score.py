"""SCORE: every target once, with the right context, and the sums that make bits per byte."""

import csv
import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FEW_VISITS,
    OneOf,
    evaluation_of,
    make_validation,
    nll_per_target,
    random_model,
    random_tokens,
    toy_config,
    validation_of_lengths,
    write_shard,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt as tg

LENGTHS = [1, 2, 7, 8, 9, 31, 32, 33, 34, 40, 41, 64, 65, 90]


@settings(deadline=None, max_examples=150)
@given(
    num_targets=st.integers(0, 5000),
    context=st.sampled_from([1, 2, 31, 32, 48, 256, 2047, 2048]),
    stride=st.integers(1, 2048),
    adaptive=st.booleans(),
)
@example(0, 2048, 64, False)
@example(2048, 2048, 2048, False)
@example(2049, 2048, 64, False)
@example(5000, 2048, 48, True)
def test_windows_score_every_target_exactly_once(num_targets: int, context: int, stride: int, adaptive: bool) -> None:
    """Scored parts tile 0..num_targets-1 in order; no window reads more than the context or past its last target."""
    stride = min(stride, context)
    windows = list(tg.plan_windows(num_targets, context, stride, first=stride if adaptive else None))
    counted = [target for _, first, end in windows for target in range(first, end)]
    assert counted == list(range(num_targets))
    for number, (begin, first, end) in enumerate(windows):
        assert 0 <= begin <= first < end <= begin + context
        full = stride if adaptive or number else context
        assert end - first == full or number == len(windows) - 1
        assert begin == max(0, first + full - context)  # where a full window would begin


def test_windows_of_a_worked_example() -> None:
    """Nine targets, context 4, stride 2: the first window scores 4, the others 2, the last the one that is left."""
    assert list(tg.plan_windows(9, 4, 2)) == [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 9)]
    assert list(tg.plan_windows(9, 4, 4)) == [(0, 0, 4), (4, 4, 8), (8, 8, 9)]
    assert list(tg.plan_windows(9, 4, 2, first=2)) == [(0, 0, 2), (0, 2, 4), (2, 4, 6), (4, 6, 8), (6, 8, 9)]


def one_token_at_a_time(model: tg.GPT, validation: tg.Validation, config: tg.Config, stride: int) -> np.ndarray:
    """The definition of sliding scoring: each target alone, from the inputs that its window lets it see."""
    T, nll = config.eval_seq_len, np.full(len(validation.tokens), np.nan)
    plan = tg.layer_plan(config, looping=True)
    starts = [0] + [p for p in range(1, len(nll)) if config.varlen_attn and validation.tokens[p] == tg.BOS_ID]
    for target in range(1, len(nll)):
        start = max(s for s in starts if s < target)  # a BOS is the last target of the document before it
        i = target - 1 - start
        begin = 0 if i < T else ((i - T) // stride + 1) * stride
        inputs = validation.tokens[start + begin : target][None]
        assert inputs.size(1) <= T
        with torch.no_grad():
            nll[target] = model(inputs, validation.tokens[target].view(1, 1), plan)
    return nll


@pytest.mark.parametrize("stride, varlen", [(32, 1), (8, 1), (5, 1), (8, 0)])
def test_score_equals_a_slow_loop_over_single_tokens(stride: int, varlen: int) -> None:
    """Plain (stride 32 = context) and sliding scores give each target the nll of its own window, bytes included; with
    VARLEN_ATTN=0 windows run over the whole stream and see the documents before."""
    config = toy_config(**FEW_VISITS, VARLEN_ATTN=varlen)
    model, validation = random_model(config), validation_of_lengths(LENGTHS)
    slow = one_token_at_a_time(model, validation, config, stride)
    scorer = lambda v: evaluation_of(model, v, config).score(stride)
    fast = nll_per_target(validation, scorer)
    np.testing.assert_allclose(fast[1:], slow[1:], atol=1e-4)
    tally = scorer(validation)
    assert tally.tokens == len(validation.tokens) - 1 == sum(LENGTHS)
    assert tally.bytes == int(validation.bytes.sum())
    assert tally.nats == pytest.approx(slow[1:].sum(), abs=1e-3)


def test_windows_of_a_plain_stream_ignore_documents() -> None:
    """VARLEN_ATTN=0: windows tile the stream as if it were one document, and a document's score depends on the others."""
    validation = validation_of_lengths([20, 5, 40, 31])
    plain, separate = (
        evaluation_of(len, validation, toy_config(VARLEN_ATTN=varlen)).stretches for varlen in (0, 1)
    )
    assert plain.tolist() == [[0, 96]] and separate.tolist() == validation.documents.tolist()
    assert [tuple(w) for w in tg.windows_inside(plain, 32, 32)] == [(0, 0, 32), (32, 32, 64), (64, 64, 96)]
    windows = tg.windows_inside(plain, 32, 8)
    assert [tuple(w) for w in windows[:3]] == [(0, 0, 32), (8, 32, 40), (16, 40, 48)] and tuple(windows[-1])[2] == 96
    scores = []
    for varlen in (0, 1):
        config = toy_config(VARLEN_ATTN=varlen)
        scorer = lambda v: evaluation_of(random_model(config), v, config).score(32)
        changed = validation.tokens.clone()
        changed[3] = 4 + (changed[3] - 3) % 60
        scores.append([nll_per_target(v, scorer) for v in (validation, validation._replace(tokens=changed))])
    for varlen, (before, after) in enumerate(scores):
        others = np.flatnonzero(before[21:] != after[21:]) + 21  # behind the first document
        assert list(others) == ([] if varlen else list(range(21, 33)))  # as far as the first window reads


def test_longer_context_is_really_used() -> None:
    """Planted fault: scoring in plain windows is not the same as sliding, so the test above can tell them apart."""
    config = toy_config()
    model, validation = random_model(config), validation_of_lengths([90])
    plain, sliding = (
        nll_per_target(validation, lambda v: evaluation_of(model, v, config).score(s)) for s in (32, 8)
    )
    same = np.isclose(plain[1:], sliding[1:], atol=1e-5)
    assert same[:32].all() and not same[32:64].all()


@pytest.mark.parametrize("stride", [32, 8])
def test_score_does_not_depend_on_the_row_size_or_the_ranks(stride: int) -> None:
    """Other packed rows, and the sum over 1, 2, 3 or 40 ranks, give the same nats, tokens and bytes."""
    config = toy_config()
    model, validation = random_model(config), validation_of_lengths(LENGTHS)
    whole = evaluation_of(model, validation, config).score(stride)
    for batch in (256, 700, 8192):
        other = evaluation_of(model, validation, toy_config(VAL_BATCH_TOKENS=batch)).score(stride)
        assert (other.tokens, other.bytes) == (whole.tokens, whole.bytes)
        assert other.nats == pytest.approx(whole.nats, rel=1e-6)
    for world_size in (2, 3, 40):
        parts = [
            evaluation_of(model, validation, config, OneOf(rank, world_size)).score(stride) for rank in range(world_size)
        ]
        assert sum(part.tokens for part in parts) == whole.tokens
        assert sum(part.bytes for part in parts) == whole.bytes
        assert sum(part.nats for part in parts) == pytest.approx(whole.nats, rel=1e-9)
        np.testing.assert_allclose(sum(part.document_nats for part in parts), whole.document_nats, rtol=1e-9)


@pytest.mark.parametrize("stride", [32, 8])
def test_no_token_changes_the_score_of_an_earlier_target(stride: int) -> None:
    """Mutating token p, be it BOS or not, leaves the nll of every target before p as it was, and changes that of p."""
    config = toy_config()
    model = random_model(config)
    tokens = random_tokens(120, 64, seed=3, bos_every=50)
    tokens[0] = tg.BOS_ID
    scorer = lambda v: evaluation_of(model, v, config).score(stride)
    before = nll_per_target(make_validation(tokens), scorer)
    for p in (1, 2, 20, 31, 32, 33, 50, 75, 100, 119):
        for value in (4 + (tokens[p] - 3) % 60, tg.BOS_ID):
            changed = tokens.copy()
            changed[p] = value
            after = nll_per_target(make_validation(changed), scorer)
            np.testing.assert_allclose(after[1:p], before[1:p], atol=1e-5)
            assert changed[p] == tokens[p] or abs(after[p] - before[p]) > 1e-4


def test_padding_changes_no_score_and_is_not_counted() -> None:
    """A row padded to a fixed shape, as on a GPU, gives its real targets the same nll, and its padding no position."""
    config = toy_config()
    model, validation = random_model(config), validation_of_lengths([5, 33, 12])
    plan, windows = tg.layer_plan(config, True), tg.windows_inside(validation.documents, 32, 8)[:4]
    evaluation = evaluation_of(model, validation, config)
    bare, positions = evaluation.row(windows, 0)
    count = bare.inputs.size(1)
    for pad_to in (count, count + 1, count + 75):
        padded, targets = evaluation.row(windows, pad_to)
        assert padded.inputs.size(1) == pad_to and padded.segments.cu_seqlens.max() == pad_to
        assert targets[:count].tolist() == positions.tolist() and not targets[count:].any()
        with torch.no_grad():
            long = model(padded.inputs, padded.targets, plan, padded.segments)[0, :count]
            short = model(bare.inputs, bare.targets, plan, bare.segments)[0]
        torch.testing.assert_close(long, short, atol=1e-5, rtol=1e-5)


def test_rows_hold_consecutive_windows_up_to_the_limit() -> None:
    """Windows keep their order, none is lost or split, and no row exceeds the limit or could take the next window."""
    generator = np.random.default_rng(0)
    ends = np.cumsum(generator.integers(1, 33, 200))
    windows = [
        tg.Window(int(end) - int(length), int(end) - 1, int(end)) for end, length in zip(ends, np.diff(ends, prepend=0))
    ]
    rows = tg.fill_rows(windows, 64)
    assert [window for row in rows for window in row] == windows
    sizes = [sum(w.end - w.begin for w in row) for row in rows]
    assert max(sizes) <= 64
    assert all(size + row[0].end - row[0].begin > 64 for size, row in zip(sizes, rows[1:]))


def test_bits_per_byte_by_hand() -> None:
    """Four targets of ln 2, ln 4, ln 8 and 0 nats over 1, 0, 2 and 3 bytes: 6 bits, 6 bytes, 1 bit per byte."""
    validation = make_validation(np.array([1, 5, 6, 7, 8]))._replace(bytes=torch.tensor([0, 1, 0, 2, 3]))
    tally = tg.Tally(validation)
    tally.add(torch.tensor([math.log(4), math.log(2)]), torch.tensor([2, 1]))
    assert (tally.tokens, tally.bytes) == (2, 1)
    tally.add(torch.tensor([math.log(8), 0.0]), np.array([3, 4]))
    assert (tally.tokens, tally.bytes) == (4, 6)
    assert tally.bpb == pytest.approx(1.0, abs=1e-7)
    assert tally.loss == pytest.approx(6 * math.log(2) / 4, abs=1e-7)


def test_tally_sums_in_double_precision() -> None:
    """Small losses behind a large one are not swallowed, as they would be in float32."""
    tally = tg.Tally(make_validation(random_tokens(1002, 64)))
    tally.add(torch.tensor([1e8]), torch.tensor([1001]))
    for begin in range(1, 1001, 10):
        tally.add(torch.full((10,), 1e-1), torch.arange(begin, begin + 10))
    assert tally.nats == pytest.approx(1e8 + 100, abs=0.1)


def test_ledger_counts_repeated_targets_and_refuses_learning_before_the_score() -> None:
    """A target that is tallied twice shows in `times`; one that is not tallied yet stops an update that wants it."""
    tally = tg.Tally(make_validation(random_tokens(9, 64)))
    tally.add(torch.zeros(3), torch.tensor([2, 3, 4]))
    tally.learn_from(torch.tensor([[2, 4], [3, 3]]), tally.times)
    with pytest.raises(RuntimeError, match="target 5"):
        tally.learn_from(np.array([4, 5]), tally.times)
    tally.add(torch.zeros(3), torch.tensor([4, 4, 5]))
    assert tally.times.tolist() == [0, 0, 1, 1, 3, 1, 0, 0, 0]
    tally.learn_from(np.array([4, 5]), tally.times)
    assert tally.learned == 6 == tally.over_ranks(tg.Run()).learned
    assert tally.over_ranks(tg.Run()).times.tolist() == tally.times.tolist()


@pytest.mark.parametrize("varlen", [0, 1])
def test_nats_of_documents_equal_a_slow_loop_over_targets(varlen: int) -> None:
    """A target belongs to the last document that began before it, whatever windows it was scored in: a BOS is the last
    target of the document before. Streams that begin mid-document, hold empty documents or end in BOS too."""
    config = toy_config(VARLEN_ATTN=varlen)
    model, words = random_model(config), list(random_tokens(70, 64))
    long = [1, *words[:20], 1, *words[20:60], 1, 1, 1, *words[60:]]
    for tokens in (long, [*words[:5], 1, *words[5:50], 1], [1, 1, 7]):
        validation = make_validation(np.array(tokens))
        tallies = []
        scorer = lambda v: tallies.append(evaluation_of(model, v, config).score(8))
        nll = nll_per_target(validation, scorer)
        slow = [0.0]  # a document begins at the start of the stream
        for target in range(1, len(tokens)):
            slow[-1] += nll[target]
            if tokens[target] == tg.BOS_ID and target < len(tokens) - 1:
                slow.append(0.0)
        np.testing.assert_allclose(tallies[0].document_nats, slow, rtol=1e-6)
        assert tallies[0].nats == pytest.approx(sum(slow)) and min(slow) > 0


def test_tally_books_each_target_on_its_document_by_hand() -> None:
    """Documents of 3, 1 and 2 targets; a target may come in any order and twice."""
    tally = tg.Tally(make_validation(np.array([1, 5, 6, 1, 1, 7, 8])))
    assert tally.validation.documents.tolist() == [[0, 3], [3, 1], [4, 2]]
    tally.add(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.bfloat16), torch.tensor([3, 4, 1, 5]))
    assert tally.document_nats.tolist() == [5, 2, 8] and tally.nats == 15
    tally.add(torch.tensor([16.0, 32.0]), np.array([6, 3]))
    assert tally.document_nats.tolist() == [37, 2, 24] and tally.times.tolist() == [0, 1, 0, 2, 1, 1, 1]


def test_tally_of_all_ranks_adds_up_every_count() -> None:
    """over_ranks() sums nats per document, both learning counts and the ledger, each in its own place."""

    class Threefold(tg.Run):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mul_(3)

    tally = tg.Tally(validation_of_lengths([3, 4]))
    tally.add(torch.tensor([1.0, 2.0, 4.5]), np.array([1, 3, 4]))
    tally.learned, tally.learned_early = 5, 7
    total = tally.over_ranks(Threefold())
    assert total.octave_nats.tolist() == [16.5, 6, *[0] * 22]  # first targets, second to third ones
    assert total.document_nats.tolist() == [9, 13.5] and total.nats == 22.5 and total.document_nats.dtype == np.float64
    assert (total.learned, total.learned_early, total.times.tolist()) == (15, 21, [0, 3, 0, 3, 3, 0, 0, 0])
    assert tally.document_nats.tolist() == [3, 4.5] and tally.tokens == 3  # its own sums stay


def test_table_of_documents_adds_up(tmp_path: Path) -> None:
    """A line per document in stream order: position, targets and bytes of the validation, nats of the tallies."""
    config, validation = toy_config(), validation_of_lengths([7, 1, 33, 2, 64])
    model = random_model(config)
    strides = {"plain": 32, "fine": 8}
    tallies = {kind: evaluation_of(model, validation, config).score(s) for kind, s in strides.items()}
    tg.write_documents(tmp_path / "documents.csv", tallies)
    with open(tmp_path / "documents.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["position", "tokens", "bytes", "plain", "fine"]
    assert [[int(x) for x in row[:2]] for row in rows] == validation.documents.tolist()
    slow = [int(validation.bytes[begin + 1 : begin + n + 1].sum()) for begin, n in validation.documents.tolist()]
    assert [int(row[2]) for row in rows] == slow
    assert sum(int(row[1]) for row in rows) == tallies["plain"].tokens and sum(slow) == tallies["plain"].bytes
    for column, tally in enumerate(tallies.values(), 3):
        assert [float(row[column]) for row in rows] == tally.document_nats.tolist()  # no digit is lost
        assert sum(float(row[column]) for row in rows) == pytest.approx(tally.nats)
    assert float(rows[2][3]) != pytest.approx(float(rows[2][4]))  # the columns are not the same


def test_table_of_positions_sums_the_targets_of_each_octave(tmp_path: Path) -> None:
    """Against a loop over documents and targets; octaves that do not occur have no line."""
    validation = validation_of_lengths([7, 1, 33, 2, 64])
    nats = torch.arange(1.0, len(validation.tokens))
    tally = tg.Tally(validation)
    for part in (slice(0, 50), slice(50, None)):
        tally.add(nats[part], np.arange(1, len(validation.tokens))[part])
    slow: dict[int, list[float]] = {}
    for begin, count in validation.documents.tolist():
        for distance in range(1, count + 1):
            sums = slow.setdefault(2 ** (distance.bit_length() - 1), [0, 0, 0])
            values = 1, int(validation.bytes[begin + distance]), float(nats[begin + distance - 1])
            sums[:] = [total + value for total, value in zip(sums, values, strict=True)]
    tg.write_positions(tmp_path / "positions.csv", {"plain": tally})
    with open(tmp_path / "positions.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["first", "tokens", "bytes", "plain"]
    assert {int(row[0]): [float(value) for value in row[1:]] for row in rows} == slow
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([1, 1, 5, 6, 7]), min_size=2, max_size=80))
@example([1, 1])
@example([5, 6])
@example([5, 1, 1, 1, 6, 1])
@example([1, 5, 6, 1])
def test_documents_of_any_stream_hold_each_target_once(toy_data, tmp_path_factory, tokens: list[int]) -> None:
    """Streams that begin mid-document, hold empty documents or end in BOS: tokens - 1 targets, BOS as a last target."""
    folder = tmp_path_factory.mktemp("val")
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    config = tg.load_config(toy_data.env() | {"DATA_PATH": str(folder)})[0]
    validation = tg.load_validation(config)
    for stride in (32, 8):
        for varlen in (False, True):
            stretches = evaluation_of(len, validation, dataclasses.replace(config, varlen_attn=varlen)).stretches
            windows = tg.windows_inside(stretches, 32, stride)
            scored = Counter(p + 1 for window in windows for p in range(window.first_scored, window.end))
            assert scored == Counter(range(1, len(tokens)))
    for begin, count in validation.documents.tolist():
        assert begin == 0 or tokens[begin] == tg.BOS_ID
        assert tg.BOS_ID not in tokens[begin + 1 : begin + count]  # only the last target may be the next BOS


def test_constant_model_scores_the_entropy_of_a_uniform_guess() -> None:
    """A model that gives every id the same probability scores ln(V) per token, whatever the stream."""
    config = toy_config()
    validation = validation_of_lengths([40, 3, 9])
    uniform = lambda inputs, targets, plan, segments: torch.full(targets.shape, math.log(64))
    tally = evaluation_of(uniform, validation, config).score(32)
    assert tally.loss == pytest.approx(math.log(64), rel=1e-6)
    assert tally.bpb == pytest.approx(52 * 6 / int(validation.bytes.sum()), rel=1e-6)


def test_scoring_leaves_no_gradients_and_no_changes() -> None:
    """Plain scoring changes no weight and builds no graph."""
    config = toy_config()
    model, validation = random_model(config), validation_of_lengths([20])
    before = {name: array.copy() for name, array in model.arrays().items()}
    evaluation_of(model, validation, config).score(8)
    assert all(np.array_equal(before[name], array) for name, array in model.arrays().items())
    assert all(parameter.grad is None for parameter in model.parameters())
