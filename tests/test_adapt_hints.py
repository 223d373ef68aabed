"""ADAPT, the n-gram tilt: hints against tables, and a distribution that stays one."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import QUIET, nll_per_target, random_model, toy_config, validation_of_lengths
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

RUN = tg.Run()


def slow_hints(tokens: list[int], order: int, threshold: float) -> list[tuple[int, int]]:
    """Tables as in frontier.md 6.1: ask, then absorb, one token after the other."""
    counts: dict[tuple, dict[int, int]] = {}
    best: dict[tuple, int] = {}
    found = []
    for i in range(order - 1, len(tokens)):
        context = tuple(tokens[i - order + 1 : i])
        if context in best:
            share = Fraction(counts[context][best[context]], sum(counts[context].values()))
            if share >= Fraction(str(threshold)):
                found.append((i, best[context]))
        table = counts.setdefault(context, {})
        table[tokens[i]] = table.get(tokens[i], 0) + 1
        if context not in best or table[tokens[i]] > table[best[context]]:
            best[context] = tokens[i]
    return found


def hints(tokens: list[int] | np.ndarray, order: int, threshold: float = 0.8) -> list[tuple[int, int]]:
    positions, guesses = tg.token_hints(np.asarray(tokens, np.uint16), order, threshold)
    assert positions.dtype == guesses.dtype == np.int64
    return list(zip(positions.tolist(), guesses.tolist()))


streams = st.integers(1, 4).flatmap(lambda top: st.lists(st.integers(0, top), max_size=120))
orders, thresholds = st.integers(2, 7), st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 0.75, 0.8, 1.0])


@settings(max_examples=300, deadline=None)
@given(streams, orders, thresholds)
def test_hints_equal_tables(tokens: list[int], order: int, threshold: float) -> None:
    """Positions and hints of short streams over few tokens, where ties and changes of leader abound."""
    assert hints(tokens, order, threshold) == slow_hints(tokens, order, threshold)


@pytest.mark.parametrize("order", [2, 3, 8, 16, 17])
def test_hints_equal_tables_on_a_long_stream(order: int) -> None:
    """20,000 tokens made of phrases that return with small changes, ids up to 65,535."""
    generator = np.random.default_rng(order)
    phrases = [generator.integers(0, 2**16, 40) for _ in range(60)]
    tokens = np.concatenate([phrases[generator.integers(60)] for _ in range(500)])
    noise = generator.random(len(tokens)) < 0.02
    tokens[noise] = generator.integers(0, 2**16, int(noise.sum()))
    expected = slow_hints(tokens.tolist(), order, 0.8)
    assert len(expected) > 5000 and hints(tokens, order) == expected


@settings(max_examples=150, deadline=None)
@given(streams, st.integers(2, 5), thresholds, st.data())
def test_hints_read_nothing_from_their_target_on(
    tokens: list[int], order: int, threshold: float, data: st.DataObject
) -> None:
    """Changing or cutting tokens i.. leaves the hints for targets up to i, that of i included, as they were."""
    i = data.draw(st.integers(0, len(tokens)))
    tail = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=30))
    before = [hint for hint in hints(tokens, order, threshold) if hint[0] < i or (hint[0] == i < len(tokens))]
    after = [hint for hint in hints(tokens[:i] + tail, order, threshold) if hint[0] < i or (hint[0] == i < len(tokens))]
    assert before == after
    assert [hint for hint in before if hint[0] < i] == hints(tokens[:i], order, threshold)


def test_no_hints_without_repeats() -> None:
    """Distinct tokens; single tokens that repeat where no window of 15 does; streams too short for a target."""
    generator = np.random.default_rng(0)
    assert hints(generator.permutation(50_000), 2) == []
    assert hints(generator.integers(0, 8192, 200_000), 16) == []
    assert all(hints(list(range(n)), 16) == [] for n in range(18)) and hints([0] * 15, 16) == []


@pytest.mark.parametrize("order", [2, 5, 16])
def test_planted_repeats_are_counted_exactly(order: int) -> None:
    """A phrase of 100 that returns twice among distinct tokens gives two hints per target with a full context."""
    tokens = np.random.default_rng(1).permutation(60_000)
    phrase = tokens[300:400]
    stream = np.concatenate([tokens[:5000], phrase, tokens[5000:9000], phrase, tokens[9000:9050]])
    expected = [(begin + i, int(phrase[i])) for begin in (5000, 9100) for i in range(order - 1, 100)]
    # The token behind each copy has the context of the token behind the first: a hint, and a wrong one.
    expected += [(5100, int(tokens[400]))]
    assert [hint for hint in hints(stream, order) if hint[0] < 9200] == sorted(expected)
    # Behind the second copy two tokens have followed, each once: a share of 1/2 is below 0.8, and 0.5 lets it pass.
    assert [hint for hint in hints(stream, order) if hint[0] >= 9200] == []
    assert [hint for hint in hints(stream, order, 0.5) if hint[0] >= 9200] == [(9200, int(tokens[400]))]


def test_a_share_equal_to_the_threshold_passes() -> None:
    """4 of 5 at 0.8, where float32 and float64 disagree, and 3 of 4 does not; on ties the first leader stays."""
    four_of_five = [9, 1, 9, 1, 9, 1, 9, 1, 9, 2, 9]
    assert hints([*four_of_five, 7], 2)[-1] == (11, 1)
    assert hints([9, 1, 9, 1, 9, 1, 9, 2, 9, 7], 2)[-1] == (7, 1)
    assert hints([9, 1, 9, 2, 9, 7], 2, 0.5)[-1] == (5, 1) and hints([9, 2, 9, 1, 9, 7], 2, 0.5)[-1] == (5, 2)
    assert hints([9, 1, 9, 2, 9, 2, 9, 7], 2, 0.6)[-1] == (7, 2)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 15, 16])
def test_window_names_are_equal_just_where_windows_are(length: int) -> None:
    """Compared with tuples; what occurs once is -1 (but for single tokens)."""
    tokens = np.random.default_rng(length).integers(0, 3, 300)
    tokens[150:220] = tokens[20:90]
    names = tg.window_names(tokens, length)
    windows = [tuple(tokens[i : i + length].tolist()) for i in range(len(tokens) - length + 1)]
    assert len(names) == len(windows) and names.dtype == np.int32
    first = {window: windows.index(window) for window in windows}
    for window, name in zip(windows, names):
        assert (name == -1) == (length > 1 and windows.count(window) == 1)
        assert name == names[first[window]]
    kept = {(window, int(name)) for window, name in zip(windows, names) if name >= 0}
    assert len(kept) == len({name for _, name in kept}) == len({window for window, _ in kept})


# ---------------------------------------------------------------------------------------------------------------
# The tilt
# ---------------------------------------------------------------------------------------------------------------


def test_tilted_probabilities_are_a_distribution() -> None:
    """p'(v) is p(v) e^(boost [v = hint]) over their sum, for every id as target, every hint and several boosts."""
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)) * 3
    nats = -torch.log_softmax(logits.double(), -1).float()
    for boost in (0.0, 0.7, 2.625, 20.0):
        for row, hint in ((0, 3), (1, 0), (2, 19), (3, int(nats[3].argmin())), (4, int(nats[4].argmax()))):
            pairs = torch.stack([nats[row], nats[row, hint].expand(20)], -1)
            ids = torch.stack([torch.arange(20), torch.full((20,), hint)], -1)
            tilted = tg.tilt(pairs, ids, boost)
            raised = logits[row].double() + boost * (torch.arange(20) == hint)
            torch.testing.assert_close(tilted, -torch.log_softmax(raised, -1), atol=1e-5, rtol=1e-5)
            assert torch.exp(-tilted).sum().item() == pytest.approx(1, abs=1e-6)


def test_tilt_leaves_targets_without_a_hint_alone() -> None:
    """Where the hint is -1 the nats are exactly those of the model, whatever was priced in its place."""
    nats, ids = torch.rand(4, 5, 2) * 9, torch.randint(0, 9, (4, 5, 2))
    ids[..., 1] = -1
    assert torch.equal(tg.tilt(nats, ids, 2.625), nats[..., 0].double())
    ids[2, 3, 1] = ids[2, 3, 0]
    changed = tg.tilt(nats, ids, 2.625) != nats[..., 0].double()
    assert changed.sum() == 1 and changed[2, 3]


def test_tilt_of_a_sure_model_is_finite() -> None:
    """A hint of probability one, or a little more by rounding, and one of probability zero."""
    nats = torch.tensor([[0.0, 0.0], [-1e-6, -1e-6], [60.0, 0.0], [60.0, 60.0], [0.0, 60.0]])
    ids = torch.tensor([[5, 5], [5, 5], [4, 5], [5, 5], [4, 5]])
    found = tg.tilt(nats, ids, 2.625)
    wanted = torch.tensor([0, -1e-6, 62.625, 57.375, 0], dtype=torch.float64)  # q counts as one, not as more
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)


def repetitive_validation(seed: int = 0) -> tg.Validation:
    """Documents that share phrases, so that there are hints, most of them right."""
    generator = np.random.default_rng(seed)
    validation = validation_of_lengths([30, 44, 21, 60, 25, 38, 50])
    phrase, tokens = generator.integers(4, 64, 12), validation.tokens.clone()
    for start, count in validation.documents.tolist():
        place = start + 2 + int(generator.integers(count - 15))
        tokens[place : place + 12] = torch.from_numpy(phrase)
        tokens[place + int(generator.integers(6, 12))] = 5  # a surprise inside
    return validation._replace(tokens=tokens)


TILT = dict(NGRAM_TILT_ENABLED=1, TOKEN_ORDER=4, TOKEN_THRESHOLD=0.5, TOKEN_BOOST=1.5)


def test_stream_hints_follow_the_settings() -> None:
    """One entry per stream position: the tables' hint for the token there, else -1; nothing at all when off."""
    validation = repetitive_validation()
    tokens = validation.tokens.tolist()
    for order, threshold in ((4, 0.5), (3, 0.9), (2, 0.3)):
        config = toy_config(**TILT | dict(TOKEN_ORDER=order, TOKEN_THRESHOLD=threshold))
        found = tg.stream_hints(validation, config, RUN, QUIET)
        wanted = np.full(len(tokens), -1)
        for position, hint in slow_hints(tokens, order, threshold):
            wanted[position] = hint
        assert found[:, 0].tolist() == wanted.tolist() and (wanted >= 0).sum() > 10
        assert found[:, 1].tolist() == np.where(wanted >= 0, 0, -1).tolist()  # the only source
    assert tg.stream_hints(validation, toy_config(), RUN, QUIET) is None


def test_only_the_tallied_score_is_tilted() -> None:
    """Adapters and global updates learn from the model's own loss: without a hint every score is as without the tilt,
    to the last bit; with one it is the tilted score of the target that really stands there."""
    validation = repetitive_validation()
    scored = {}
    for on in (0, 1):
        config = toy_config(**TILT | dict(NGRAM_TILT_ENABLED=on), TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=4)
        scored[on] = nll_per_target(validation, lambda v: tg.adapt(random_model(config), v, config, RUN, QUIET))
    hints, hits, misses = dict(slow_hints(validation.tokens.tolist(), 4, 0.5)), 0, 0
    for position in range(1, len(validation.tokens)):
        plain, tilted = scored[0][position], scored[1][position]
        if position not in hints:
            assert tilted == plain, position
        elif hints[position] == validation.tokens[position]:
            q = np.exp(-plain)
            assert tilted == pytest.approx(-np.log(q * np.exp(1.5) / (1 + q * np.expm1(1.5))), abs=1e-5)
            hits += 1
        else:
            assert plain < tilted < plain + 1.5
            misses += 1
    assert hits > 15 and misses > 5


def test_a_missed_hint_costs_what_its_probability_says() -> None:
    """On the real path, the price of a wrong hint is log(1 + q (e^boost - 1)) with q of the hinted id at that place."""
    config = toy_config(**TILT, TTT_LORA_LR=0, PHASED_TTT_PREFIX_DOCS=0, TTT_EVAL_SEQ_LEN=32, TTT_CHUNK_SIZE=8)
    validation, model = repetitive_validation(), random_model(config)
    scored = nll_per_target(validation, lambda v: tg.adapt(model, v, config, RUN, QUIET))
    hints, plan, checked = dict(slow_hints(validation.tokens.tolist(), 4, 0.5)), tg.layer_plan(config, True), 0
    for start, count in validation.documents.tolist():
        for position in range(start + 1, start + min(count, 32) + 1):  # what the first four chunks read from the start
            if position in hints:
                ids = torch.tensor([[[int(validation.tokens[position]), hints[position]]]])
                with torch.no_grad():
                    nll, of_hint = model(validation.tokens[start:position][None], ids, plan)[0, 0].double().tolist()
                wanted = nll - 1.5 * (ids[0, 0, 0] == ids[0, 0, 1]).item() + np.log1p(np.exp(-of_hint) * np.expm1(1.5))
                assert scored[position] == pytest.approx(wanted, abs=1e-4)
                checked += 1
    assert checked > 20
