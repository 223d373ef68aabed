"""ADAPT, the n-gram tilt: hints against tables, boosts that are learnt, and a distribution that stays one."""

import collections
import copy
import dataclasses
import functools
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import (
    QUIET,
    OneOf,
    evaluation_of,
    make_validation,
    nll_per_target,
    random_model,
    recorded_nll,
    toy_config,
    validation_of_lengths,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as tg

RUN = tg.Run()


class Table:
    """What has followed one context: counts, and the token that leads."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.leader = -1

    def absorb(self, token: int) -> None:
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.counts[token] > self.counts.get(self.leader, 0):
            self.leader = token

    def hint(self, threshold: float) -> int:
        """The leader if its share is large enough, else -1."""
        share = Fraction(self.counts.get(self.leader, 0), max(sum(self.counts.values()), 1))
        return self.leader if self.counts and share >= Fraction(str(threshold)) else -1


class Text(NamedTuple):
    """Tokens, and of each one its document and the turn in which that is scored."""

    tokens: list[int]
    document: list[int]
    turn: list[int]


def slow_hints(text: Text, order: int, threshold: float) -> list[tuple[int, int]]:
    """(position, hint): ask, then absorb, one token after the other. Each document of a turn begins with the tables of
    the turns before; those of the next turn have absorbed all of them, in the order of the stream."""
    shared: dict[tuple, Table] = {}
    found, places = [], {}
    for i, document in enumerate(text.document):
        places.setdefault(document, []).append(i)
    for now in sorted(set(text.turn)):
        together = [indices for indices in places.values() if text.turn[indices[0]] == now]
        events = [[(tuple(text.tokens[i - order + 1 : i]), i) for i in indices[order - 1 :]] for indices in together]
        for document in events:
            own: dict[tuple, Table] = {}
            for context, i in document:
                table = own.setdefault(context, copy.deepcopy(shared.get(context, Table())))
                if (hint := table.hint(threshold)) >= 0:
                    found.append((i, hint))
                table.absorb(text.tokens[i])
        for context, i in itertools.chain(*events):
            shared.setdefault(context, Table()).absorb(text.tokens[i])
    return sorted(found)


def hints(text: Text, order: int, threshold: float = 0.8) -> list[tuple[int, int]]:
    tokens = np.asarray(text.tokens, np.uint16)
    positions, places = tg.token_hints(tokens, np.array(text.document, int), np.array(text.turn, int), order, threshold)
    assert positions.dtype == places.dtype == np.int64
    return list(zip(positions.tolist(), tokens[places].tolist()))


def one_document(tokens: list[int] | np.ndarray) -> Text:
    return Text(list(tokens), [0] * len(tokens), [0] * len(tokens))


def cut(tokens: list[int], lengths: list[int], turns: list[int]) -> Text:
    """The tokens cut into documents of these lengths, and a last one; turns are dealt to them over and over."""
    document = np.repeat(np.arange(len(lengths) + 1), [*lengths, len(tokens)])[: len(tokens)].tolist()
    return Text(tokens, document, [turns[number % len(turns)] for number in document])


streams = st.integers(1, 4).flatmap(lambda top: st.lists(st.integers(0, top), max_size=120))
texts = st.builds(
    cut, streams, st.lists(st.integers(1, 40), max_size=8), st.lists(st.integers(0, 3), min_size=1, max_size=9)
)
orders, thresholds = st.integers(2, 7), st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 0.75, 0.8, 1.0])


@settings(max_examples=300, deadline=None)
@given(texts, orders, thresholds)
def test_hints_equal_tables(text: Text, order: int, threshold: float) -> None:
    """Positions and hints of short streams over few tokens, where ties and changes of leader abound."""
    assert hints(text, order, threshold) == slow_hints(text, order, threshold)


def phrases(seed: int) -> list[int]:
    """20,000 tokens made of phrases that return with small changes, ids up to 65,535."""
    generator = np.random.default_rng(seed)
    phrases = [generator.integers(0, 2**16, 40) for _ in range(60)]
    tokens = np.concatenate([phrases[generator.integers(60)] for _ in range(500)])
    noise = generator.random(len(tokens)) < 0.02
    tokens[noise] = generator.integers(0, 2**16, int(noise.sum()))
    return tokens.tolist()


@pytest.mark.parametrize("order", [2, 3, 8, 16, 17])
def test_hints_equal_tables_on_a_long_stream(order: int) -> None:
    """Twenty documents in four turns, the later ones of the stream in earlier turns too."""
    text = cut(phrases(order), [700, 1300, 10, 1990] * 5, [3, 0, 1, 0, 2, 1, 1])
    expected = slow_hints(text, order, 0.8)
    assert len(expected) > 5000 and hints(text, order) == expected


@settings(max_examples=100, deadline=None)
@given(texts, orders, thresholds)
def test_one_document_after_the_other_has_the_table_of_the_stream(text: Text, order: int, threshold: float) -> None:
    """With a turn for each document, in stream order, a hint counts all that stands before it, as long as its context
    lies inside a document."""
    text, table, expected = text._replace(turn=text.document), collections.defaultdict(Table), []
    for i in range(order - 1, len(text.tokens)):
        if text.document[i - order + 1] == text.document[i]:
            seen = table[tuple(text.tokens[i - order + 1 : i])]
            expected += [(i, hint)] if (hint := seen.hint(threshold)) >= 0 else []
            seen.absorb(text.tokens[i])
    assert hints(text, order, threshold) == expected


@settings(max_examples=100, deadline=None)
@given(texts, orders, thresholds)
def test_in_one_turn_hints_are_those_of_each_document_alone(text: Text, order: int, threshold: float) -> None:
    text, expected = text._replace(turn=[5] * len(text.tokens)), []
    for document in dict.fromkeys(text.document):
        begin = text.document.index(document)
        alone = one_document(text.tokens[begin : begin + text.document.count(document)])
        expected += [(begin + position, hint) for position, hint in hints(alone, order, threshold)]
    assert hints(text, order, threshold) == expected


@settings(max_examples=200, deadline=None)
@given(texts.filter(lambda text: len(text.tokens) > 2), st.integers(2, 4), thresholds, st.data())
def test_hints_read_nothing_that_is_scored_later(text: Text, order: int, threshold: float, data: st.DataObject) -> None:
    """Other tokens from some target of a document on, and in all other documents of its turn and of later ones, leave
    the document's hints up to that of this target as they were."""
    target = data.draw(st.integers(0, len(text.tokens) - 1))
    mine = [i for i, document in enumerate(text.document) if document == text.document[target] and i <= target]
    unread = [i for i, turn in enumerate(text.turn) if turn >= text.turn[target] and i not in mine] + [target]
    other = list(text.tokens)
    for i in unread:
        other[i] = data.draw(st.integers(0, 4))
    before, after = (
        [hint for hint in hints(text._replace(tokens=tokens), order, threshold) if hint[0] in mine]
        for tokens in (text.tokens, other)
    )
    assert before == after


def test_no_hints_without_repeats() -> None:
    """Distinct tokens; single tokens that repeat where no window of 15 does; streams too short for a target."""
    generator = np.random.default_rng(0)
    assert hints(one_document(generator.permutation(50_000)), 2) == []
    assert hints(one_document(generator.integers(0, 8192, 200_000)), 16) == []
    assert all(hints(one_document(range(n)), 16) == [] for n in range(18)) and hints(one_document([0] * 15), 16) == []


@pytest.mark.parametrize("order", [2, 5, 16])
def test_planted_repeats_are_counted_exactly(order: int) -> None:
    """A phrase of 100 that returns twice among distinct tokens gives two hints per target with a full context."""
    tokens = np.random.default_rng(1).permutation(60_000)
    phrase = tokens[300:400]
    text = one_document(np.concatenate([tokens[:5000], phrase, tokens[5000:9000], phrase, tokens[9000:9050]]))
    expected = [(begin + i, int(phrase[i])) for begin in (5000, 9100) for i in range(order - 1, 100)]
    # The token behind each copy has the context of the token behind the first: a hint, and a wrong one.
    expected += [(5100, int(tokens[400]))]
    assert [hint for hint in hints(text, order) if hint[0] < 9200] == sorted(expected)
    # Behind the second copy two tokens have followed, each once: a share of 1/2 is below 0.8, and 0.5 lets it pass.
    assert [hint for hint in hints(text, order) if hint[0] >= 9200] == []
    assert [hint for hint in hints(text, order, 0.5) if hint[0] >= 9200] == [(9200, int(tokens[400]))]


def test_a_share_equal_to_the_threshold_passes() -> None:
    """4 of 5 at 0.8, where float32 and float64 disagree, and 3 of 4 does not; on ties the first leader stays."""

    def last(tokens: list[int], threshold: float = 0.8) -> tuple[int, int]:
        return hints(one_document(tokens), 2, threshold)[-1]

    assert last([9, 1, 9, 1, 9, 1, 9, 1, 9, 2, 9, 7]) == (11, 1)
    assert last([9, 1, 9, 1, 9, 1, 9, 2, 9, 7]) == (7, 1)
    assert last([9, 1, 9, 2, 9, 7], 0.5) == (5, 1) and last([9, 2, 9, 1, 9, 7], 0.5) == (5, 2)
    assert last([9, 1, 9, 2, 9, 2, 9, 7], 0.6) == (7, 2)


def test_turns_decide_who_led_first() -> None:
    """Two documents before, in stream order and against it: on a tie leads what was scored first."""
    tokens, document = [9, 1, 0, 9, 2, 0, 9, 7], [0, 0, 0, 1, 1, 1, 2, 2]
    for turns, leader in (((0, 1, 2), 1), ((1, 0, 2), 2), ((0, 0, 1), 1)):
        text = Text(tokens, document, [turns[number] for number in document])
        assert hints(text, 2, 0.5)[-1] == (7, leader)


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
        scored[on] = nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(random_model(config), v, config)))
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
    scored = nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(model, v, config)))
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


# ---------------------------------------------------------------------------------------------------------------
# Hints from the own document: TOKEN_DOCUMENT_ORDERS
# ---------------------------------------------------------------------------------------------------------------

SOURCES = {  # TOKEN_DOCUMENT_ORDERS and TOKEN_ORDER -> sources, the first one that has a hint wins
    ("", 4): [(False, 4)],
    ("2", 4): [(True, 2), (False, 4)],
    ("2,4", 4): [(True, 4), (True, 2), (False, 4)],
    ("3, 6,2", 3): [(True, 6), (True, 3), (True, 2), (False, 3)],
    ("5,3,2", 64): [(True, 5), (True, 3), (True, 2), (False, 64)],
}


@functools.cache
def document_config(orders: str, order: int, threshold: float = 0.5, **changes: Any) -> tg.Config:
    return toy_config(
        **TILT | dict(TOKEN_DOCUMENT_ORDERS=orders, TOKEN_ORDER=order, TOKEN_THRESHOLD=threshold) | changes
    )


@pytest.mark.parametrize("case", SOURCES, ids=str)
def test_sources_stand_in_their_order(case: tuple[str, int]) -> None:
    """The own document's longest context first; the stream last, whatever its order."""
    assert tg.hint_sources(document_config(*case)) == SOURCES[case]


@pytest.mark.parametrize("text", ["x", "4,x", "2.5", "4,4", "8,1", "65", "-3", "0"])
def test_orders_that_make_no_sense_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(tg.UserError) as caught:
        document_config(text, 16)
    message = str(caught.value)
    assert message.startswith(f"TOKEN_DOCUMENT_ORDERS={text}: ") and "\n" not in message
    assert document_config(" 2 ,64,", 16).document_orders == [64, 2] and document_config("", 16).document_orders == []


def slow_document_hints(validation: tg.Validation, case: tuple[str, int], threshold: float) -> list[list[int]]:
    """(hint, source) of each position: tables per document and over the stream, asked one after the other."""
    tokens = validation.tokens.tolist()
    table = [[-1, -1] for _ in tokens]
    starts = [0, *(i for i in range(1, len(tokens)) if tokens[i] == tg.BOS_ID), len(tokens)]
    for number, (inside, order) in enumerate(SOURCES[case]):
        if inside:  # the token behind a document, the next BOS, is its last target
            spans = [(begin, tokens[begin : end + 1]) for begin, end in zip(starts, starts[1:])]
        else:
            spans = [(0, tokens)]
        for begin, part in spans:
            for position, hint in slow_hints(part, order, threshold):
                if table[begin + position][0] < 0:
                    table[begin + position] = [hint, number]
    return table


few_ids = st.integers(3, 6).flatmap(lambda top: st.lists(st.integers(1, top), min_size=1, max_size=90))


@settings(max_examples=60, deadline=None)
@given(few_ids, st.sampled_from(list(SOURCES)), st.sampled_from([0.3, 0.5, 0.8]))
def test_document_hints_equal_tables(tokens: list[int], case: tuple[str, int], threshold: float) -> None:
    """Streams over few ids, one of them BOS: documents of all lengths, the first with and without a BOS."""
    validation = make_validation(np.array(tokens))
    found = tg.stream_hints(validation, document_config(*case, threshold), RUN, QUIET)
    assert found.tolist() == slow_document_hints(validation, case, threshold)


def test_every_source_gives_hints_on_a_long_stream() -> None:
    """The same on 3,000 tokens, where each of four sources is asked often, and documents and stream disagree."""
    generator = np.random.default_rng(0)
    tokens = np.concatenate(
        [np.append(tg.BOS_ID, generator.integers(4, 9, generator.integers(1, 80))) for _ in range(75)]
    )
    validation, case = make_validation(tokens), ("3, 6,2", 3)
    found = tg.stream_hints(validation, document_config(*case), RUN, QUIET)
    assert found.dtype == torch.int32 and found.tolist() == slow_document_hints(validation, case, 0.5)
    assert (torch.bincount(found[found[:, 1] >= 0, 1], minlength=4) > 20).all()


@settings(max_examples=40, deadline=None)
@given(few_ids, st.sampled_from(list(SOURCES)), st.data())
def test_document_hints_read_nothing_from_their_target_on(
    tokens: list[int], case: tuple[str, int], data: st.DataObject
) -> None:
    """Other tokens from i on, BOS among them, leave hints and sources up to that of i as they were."""
    i = data.draw(st.integers(0, len(tokens) - 1))
    tail = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=20))
    before, after = (
        tg.stream_hints(make_validation(np.array(ids)), document_config(*case), RUN, QUIET)[: i + 1]
        for ids in (tokens, tokens[:i] + tail)
    )
    assert torch.equal(before, after)


def test_hints_of_a_document_are_its_own() -> None:
    """Without hints from the stream, which no window of 63 gives here, other texts around a document change nothing; a
    document that stands there twice gets the same hints twice, and none at first sight."""
    config = document_config("5,3,2", 64)
    generator, parts = np.random.default_rng(1), []
    make = lambda: np.append(tg.BOS_ID, generator.integers(4, 8, 50))
    mine, seen = make(), []
    for _ in range(3):
        parts = [make(), mine, make(), mine, [4]]
        validation = make_validation(np.concatenate(parts))
        hints = tg.stream_hints(validation, config, RUN, QUIET)
        seen += [hints[52:102], hints[154:204]]  # the targets of both copies
    assert all(torch.equal(table, seen[0]) for table in seen) and (seen[0][:, 0] >= 0).sum() > 20
    shared = tg.stream_hints(validation, document_config("5,3,2", 4), RUN, QUIET)
    assert not torch.equal(shared[154:204, 0], seen[0][:, 0])  # the stream would have known


def test_more_documents_than_ids_can_tell_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """V times documents must stay below 2^31; one line names the setting, and without it there is no limit."""
    validation = repetitive_validation()
    large = dataclasses.replace(document_config("2", 4), vocab_size=2**28)
    with pytest.raises(tg.UserError, match="^TOKEN_DOCUMENT_ORDERS=2: .*unset it$"):
        tg.stream_hints(validation, large, RUN, QUIET)
    plain = tg.stream_hints(validation, dataclasses.replace(large, token_document_orders=""), RUN, QUIET)
    assert (plain[:, 0] >= 0).any()


# ---------------------------------------------------------------------------------------------------------------
# Boosts
# ---------------------------------------------------------------------------------------------------------------


def logit(q: torch.Tensor) -> torch.Tensor:
    return torch.log(q / (1 - q))


def synthetic_hints(count: int, seed: int, truth: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of hints, and whether they come true: with logit w0 + (1 + w1) logit(q) for `truth` (w0, w1)."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.sigmoid(torch.rand(count, generator=generator, dtype=torch.float64) * 6 - 4)
    p = torch.sigmoid(truth[0] + (1 + truth[1]) * logit(q))
    return -torch.log(q), torch.rand(count, generator=generator, dtype=torch.float64) < p


def test_hints_of_the_stream_get_the_boost_of_the_setting() -> None:
    """TOKEN_BOOST, whatever the hint's probability and whatever has been learnt; so does a place without a hint."""
    for orders in ("", "2", "2,4"):
        boosts = tg.Boosts(document_config(orders, 4))
        last = len(orders.split(",")) if orders else 0
        sources = torch.randint(-1, 1, (5, 7)) * (last + 1) + last  # the stream's, or -1
        nll = torch.rand(5, 7) * 9
        if orders:
            boosts.update(nll[0], torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool))
        assert torch.equal(boosts.boost(nll, sources), torch.full((5, 7), 1.5, dtype=torch.float64))
        assert set(sources.flatten().tolist()) == {-1, last} and not boosts.learnt(sources).any()


def test_boosts_of_document_hints_start_at_zero() -> None:
    """For every source but the stream, and a tilt by nothing is none."""
    boosts, nll = tg.Boosts(document_config("2,4", 4)), torch.rand(50, 2) * 9
    sources, ids = torch.arange(50) % 2, torch.randint(0, 2, (50, 2))
    assert not boosts.boost(nll[:, 1], sources).any()
    assert torch.equal(tg.tilt(nll, ids, boosts.boost(nll[:, 1], sources)), nll[:, 0].double())
    assert boosts.learnt(torch.tensor([[-1, 0, 1, 2]])).tolist() == [[False, True, True, False]]


def test_an_update_is_one_newton_step() -> None:
    """Weights - (curvature so far)^-1 gradient of the summed tilted nats, both by differentiating tilt() itself; twice,
    with the curvatures added up over a prior of 10 hints; a source without hints stays as it is."""
    boosts = tg.Boosts(document_config("2,4,6", 4))
    curvature = {source: 10 * torch.eye(2, dtype=torch.float64) for source in range(3)}
    for seed in (1, 2):
        nll, hit = synthetic_hints(90, seed, (1.0, -0.3))
        sources = torch.arange(90) % 2 * 2
        before = boosts.weights.clone()
        boosts.update(nll.float(), sources, hit)
        for source in (0, 2):
            mine = sources == source
            nats, came = nll.float()[mine].double(), hit[mine]
            pairs = torch.stack([torch.where(came, nats, torch.full_like(nats, 3.0)), nats], -1)
            ids = torch.stack([torch.where(came, 7, 5), torch.full_like(came, 7, dtype=torch.int64)], -1)
            total = lambda w: tg.tilt(pairs, ids, w[0] + w[1] * logit(torch.exp(-nats))).sum()
            gradient = torch.autograd.functional.jacobian(total, before[source])
            curvature[source] = curvature[source] + torch.autograd.functional.hessian(total, before[source])
            wanted = before[source] - torch.linalg.inv(curvature[source]) @ gradient
            torch.testing.assert_close(boosts.weights[source], wanted, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(boosts.curvature[source], curvature[source], rtol=1e-7, atol=1e-9)
            assert (wanted - before[source]).abs().max() > 0.05
        assert torch.equal(boosts.weights[1], before[1])
    assert torch.equal(boosts.curvature[1], curvature[1])


def test_learnt_boosts_make_probabilities_true() -> None:
    """Hints that come true more often, or less, than the model says: after some thousands of each source the new
    probabilities are the hit rates, for likely and for unlikely hints, and the nats fall."""
    boosts, truths = tg.Boosts(document_config("2,4,6", 4)), [(1.2, -0.2), (-0.7, 0.3), (0.0, 0.0)]
    for seed in range(120):
        drawn = [synthetic_hints(32, 3 * seed + source, truth) for source, truth in enumerate(truths)]
        nll, hit = (torch.cat(parts) for parts in zip(*drawn))
        boosts.update(nll, torch.arange(3).repeat_interleave(32), hit)
    for source, truth in enumerate(truths):
        nll, hit = synthetic_hints(20_000, 10**6 + source, truth)
        boost = boosts.boost(nll, torch.full((20_000,), source))
        raised = torch.sigmoid(logit(torch.exp(-nll)) + boost)
        for kind in (nll < 2, nll >= 2):
            assert float(raised[kind].mean()) == pytest.approx(float(hit[kind].double().mean()), abs=0.025)
        torch.testing.assert_close(boosts.weights[source], torch.tensor(truth, dtype=torch.float64), atol=0.2, rtol=0)
        pairs = torch.stack([torch.where(hit, nll, torch.zeros_like(nll)), nll], -1)  # misses: only the sum's price
        ids = torch.stack([hit.long(), torch.ones_like(hit, dtype=torch.int64)], -1)
        gain = (pairs[:, 0] - tg.tilt(pairs, ids, boost)).mean()
        assert gain > (0.02 if source < 2 else -0.002)


def test_boosts_are_bounded_and_finite() -> None:
    """What is learnt is at most 8 either way; hints of probability zero and one, and updates on them, are finite."""
    boosts = tg.Boosts(document_config("2,4,6", 4))
    boosts.weights[0, 0], boosts.weights[1, 0] = 100.0, -100.0
    boosts.weights[2] = torch.tensor([0.0, 2.0])
    nll = torch.tensor([0.0, -1e-6, 1e-9, 0.7, 90.0, 1e4])
    for source, wanted in ((0, [8.0] * 6), (1, [-8.0] * 6), (2, [8.0, 8.0, 8.0, None, -8.0, -8.0])):
        found = boosts.boost(nll, torch.full((6,), source)).tolist()
        assert all(w is None or f == w for f, w in zip(found, wanted)) and abs(found[3]) <= 8
    boosts.weights[3, 0] = 100.0  # TOKEN_BOOST is the user's
    assert boosts.boost(nll, torch.full((6,), 3)).tolist() == [100.0] * 6
    for hit in (True, False):
        for source in range(3):
            boosts.update(nll, torch.full((6,), source), torch.full((6,), hit))
    assert boosts.weights.isfinite().all() and boosts.curvature.isfinite().all()
    boosts.update(nll[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))


def test_tilts_by_many_boosts_are_distributions() -> None:
    """One boost for each target: p'(v) is that of the raised logits, and sums to one over all ids."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 20, generator=generator, dtype=torch.float64) * 3
    hint, boost = torch.randint(0, 20, (40,), generator=generator), torch.linspace(-8, 8, 40, dtype=torch.float64)
    nats = -torch.log_softmax(logits, -1)
    pairs = torch.stack([nats, nats.gather(1, hint[:, None]).expand(40, 20)], -1)
    ids = torch.stack([torch.arange(20).expand(40, 20), hint[:, None].expand(40, 20)], -1)
    tilted = tg.tilt(pairs, ids, boost[:, None].expand(40, 20))
    raised = logits + boost[:, None] * (torch.arange(20) == hint[:, None])
    torch.testing.assert_close(tilted, -torch.log_softmax(raised, -1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(torch.exp(-tilted).sum(1), torch.ones(40, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------
# Boosts on the real path
# ---------------------------------------------------------------------------------------------------------------

LEARNT = dict(PHASED_TTT_PREFIX_DOCS=0, TTT_BATCH_SIZE=4)


def few_validation(lengths: tuple[int, ...] = (30, 44, 21, 60, 25, 38, 50), seed: int = 0) -> tg.Validation:
    """Documents over six ids each, so that a document is full of hints from itself."""
    validation, generator = validation_of_lengths(list(lengths)), np.random.default_rng(seed)
    tokens = validation.tokens.clone()
    for start, count in validation.documents.tolist():
        own = generator.choice(np.arange(4, 64), 6, replace=False)
        tokens[start + 1 : start + count] = torch.from_numpy(own[generator.integers(0, 6, count - 1)])
    return validation._replace(tokens=tokens)


def mixed_validation() -> tg.Validation:
    """The same, with a phrase that all documents share: hints from documents and from the stream."""
    validation = few_validation()
    tokens = validation.tokens.clone()
    for start, count in validation.documents.tolist():
        tokens[start + count - 12 : start + count] = torch.arange(4, 16)
    return validation._replace(tokens=tokens)


def adapted(validation: tg.Validation, config: tg.Config) -> np.ndarray:
    return nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(random_model(config), v, config)))


class Watched:
    """Every add, learn_from and update of a pass, in order, with what they were given."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.events: list[tuple[str, Any]] = []
        kinds = ((tg.Tally, "add"), (tg.Tally, "learn_from"), (tg.Boosts, "update"), (tg.Adapters, "step"))
        for owner, name in kinds:
            self.watch(patch, owner, name)

    def watch(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        real = getattr(owner, name)

        def watched(subject: Any, *arguments: Any) -> Any:
            self.events.append((f"{owner.__name__}.{name}", arguments))
            return real(subject, *arguments)

        patch.setattr(owner, name, watched)


def test_boosts_learn_from_each_document_hint_once_and_after_its_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update gets the real targets of the chunk that has just been tallied whose hint is from their document, no
    others, with sources and truth; the ledger is asked before; all such hints of the stream come by once."""
    config, validation = document_config("2,4", 4, **LEARNT), mixed_validation()
    config = dataclasses.replace(config, val_batch_tokens=65536)  # no batch is passed in parts
    watched = Watched(monkeypatch)
    tg.adapt_documents(evaluation_of(random_model(config), validation, config))
    hints, used = tg.stream_hints(validation, config, RUN, QUIET), []
    learnt = (hints[:, 1] == 0) | (hints[:, 1] == 1)
    for number, (kind, arguments) in enumerate(watched.events):
        if kind == "Tally.add":
            wanted = [p for p in np.asarray(arguments[1]).tolist() if learnt[p]]
            chunk = list(itertools.takewhile(lambda event: event[0] != "Tally.add", watched.events[number + 1 :]))
            updates = [place for place, event in enumerate(chunk) if event[0] == "Boosts.update"]
            assert len(updates) == bool(wanted)
            if wanted:
                (ledger, asked), (_, given) = chunk[updates[0] - 1 : updates[0] + 1]
                nll, sources, hit = given
                assert ledger == "Tally.learn_from" and np.asarray(asked[0]).tolist() == wanted
                assert len(nll) == len(wanted) and sources.tolist() == hints[wanted, 1].tolist()
                assert hit.tolist() == (hints[wanted, 0] == validation.tokens[wanted]).tolist()
            used += wanted
    kinds = [kind for kind, _ in watched.events]
    assert sorted(used) == learnt.nonzero()[:, 0].tolist() and len(used) > 80 and (hints[:, 1] == 2).sum() > 20
    assert 0 < kinds.count("Boosts.update") <= kinds.count("Tally.add") and "Adapters.step" in kinds


def test_fixed_boosts_are_never_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TOKEN_DOCUMENT_ORDERS the ledger only knows the targets of weight updates."""
    watched = Watched(monkeypatch)
    config = document_config("", 4, **LEARNT)
    tg.adapt_documents(evaluation_of(random_model(config), few_validation(), config))
    kinds = [kind for kind, _ in watched.events]
    assert "Boosts.update" not in kinds and kinds.count("Tally.learn_from") == kinds.count("Adapters.step") > 0


def test_document_hints_begin_without_a_tilt_and_get_what_was_learnt() -> None:
    """Boosts of document hints begin at zero on each track; those of the stream are TOKEN_BOOST from the first on;
    where there is no hint, no score is changed."""
    config, validation = document_config("2,4", 4, **LEARNT), mixed_validation()
    tilted = adapted(validation, config)
    plain = adapted(validation, dataclasses.replace(config, ngram_tilt_enabled=False))
    hints, changed, hits = tg.stream_hints(validation, config, RUN, QUIET), 0, 0
    for start, count in validation.documents.tolist():
        for position in range(start + 1, start + count + 1):
            (hint, source), q = hints[position].tolist(), np.exp(-plain[position])
            if source == 2 and hint == validation.tokens[position]:
                assert tilted[position] == pytest.approx(-np.log(q * np.exp(1.5) / (1 + q * np.expm1(1.5))), abs=1e-5)
                hits += 1
            elif source < 0 or (source < 2 and position <= start + 8):
                assert tilted[position] == plain[position], position
            else:
                changed += tilted[position] != plain[position]
    assert changed > 60 and hits > 20


def test_a_later_token_moves_no_earlier_score_through_the_boosts() -> None:
    """In one batch, with hints from documents only: another token in a chunk leaves all scores of earlier chunks, and
    those of all others in this chunk but the documents' own later ones, to the last bit; later chunks of other
    documents do move."""
    config = document_config("5,3,2", 64, **LEARNT | dict(TTT_BATCH_SIZE=9))
    validation = few_validation()
    place_of, first = {}, adapted(validation, config)
    for number, (start, count) in enumerate(validation.documents.tolist()):
        place_of |= {start + i: (number, (i - 1) // 8) for i in range(1, count + 1)}
    document, chunk, moved = 3, 2, 0
    position = int(validation.documents[document, 0]) + 8 * chunk + 5
    tokens = validation.tokens.clone()
    tokens[position] = 4 + (int(tokens[position]) + 9) % 60
    second = adapted(validation._replace(tokens=tokens), config)
    for p, (other, its_chunk) in place_of.items():
        if its_chunk < chunk or (its_chunk == chunk and (other != document or p < position)):
            assert first[p] == second[p], p
        elif other != document:
            moved += first[p] != second[p]
    assert moved > 5


class Share(OneOf):
    """A rank that makes the hints by itself."""

    def on_main(self, work: Any) -> Any:
        return work()


def test_boosts_of_tracks_do_not_depend_on_the_number_of_ranks() -> None:
    """Each target gets the same score, to the last bit, from one rank and from the ranks that share the tracks."""
    config = document_config("2,4", 4, **LEARNT | dict(TTT_BATCH_SIZE=1))
    validation = few_validation((26, 24, 17, 28, 19, 22, 25, 16, 27, 20))
    alone, together = adapted(validation, config), {}
    for rank in range(2):
        with recorded_nll() as seen:
            tg.adapt_documents(evaluation_of(random_model(config), validation, config, Share(rank, 2)))
        assert not together.keys() & seen.keys()
        together |= seen
    assert [together[p] for p in range(1, len(validation.tokens))] == alone[1:].tolist()
