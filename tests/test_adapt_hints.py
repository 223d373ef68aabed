"""ADAPT, the n-gram tilt: hints against tables, boosts that are learnt, and a distribution that stays one."""

import collections
import copy
import dataclasses
import functools
import itertools
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    evaluation_of,
    make_validation,
    nll_per_target,
    on_peers,
    random_model,
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


def lists(least: int, top: int, size: int) -> st.SearchStrategy:
    """Lists of numbers up to `top`, of all lengths up to `size` alike: by itself hypothesis prefers short ones."""
    lengths = st.integers(1, size)
    return lengths.flatmap(lambda length: st.lists(st.integers(least, top), min_size=length, max_size=length))


streams = st.just([]) | st.integers(1, 4).flatmap(lambda top: lists(0, top, 120))
texts = st.builds(cut, streams, lists(1, 40, 8), lists(0, 3, 9))
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


Entry = tuple[int, int]


def slow_table(text: Text, sources: list[tuple[bool, int]], threshold: float) -> list[Entry]:
    """(hint, number of its source) of each position, (-1, -1) for none; the first source that has one wins. Hints from
    the document itself are those of a text in which all documents have one turn."""
    table: list[Entry] = [(-1, -1)] * len(text.tokens)
    for number, (inside, order) in enumerate(sources):
        tokens, document, turn = text
        if inside:  # the same id in two documents is not the same token
            tokens, turn = [1000 * d + token for d, token in zip(document, tokens)], [0] * len(turn)
        for position, hint in slow_hints(Text(tokens, document, turn), order, threshold):
            if table[position][0] < 0:
                table[position] = (hint - 1000 * document[position] * inside, number)
    return table


def text_of(validation: tg.Validation, config: tg.Config) -> Text:
    """The stream with the rounds in which documents are scored."""
    queue = tg.document_queue(validation.documents, config.ttt_batch_size)
    numbers = tg.deal_rounds(queue, config).number
    turn_of = {start: number for number, batch in zip(numbers, queue) for start in batch[:, 0].tolist()}
    starts = validation.documents[:, 0].tolist()
    document = np.repeat(range(len(starts)), np.diff([*starts, len(validation.tokens)])).tolist()
    return Text(validation.tokens.tolist(), document, [turn_of[starts[number]] for number in document])


def stream_hints(validation: tg.Validation, config: tg.Config, run: tg.Run = RUN) -> torch.Tensor | None:
    queue = tg.document_queue(validation.documents, config.ttt_batch_size)
    return tg.stream_hints(evaluation_of(None, validation, config, run), queue, tg.deal_rounds(queue, config))


def as_tensor(table: list[Entry]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.int32)


@pytest.fixture
def one_track(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of the queue is a round of its own."""
    monkeypatch.setattr(tg, "ROUND_BATCHES", 1)


def test_stream_hints_follow_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry per stream position: the tables' hint for the token there, else -1; nothing at all when off."""
    validation, seen = repetitive_validation(), []
    cases = (4, 0.5, 1, 1), (4, 0.5, 1, 2), (3, 0.9, 2, 1), (2, 0.3, 2, 3), (4, 0.5, 8, 1)
    for order, threshold, size, batch in cases:
        monkeypatch.setattr(tg, "ROUND_BATCHES", size)
        sizes = dict(TTT_BATCH_SIZE=batch, PHASED_TTT_PREFIX_DOCS=0)
        config = toy_config(**TILT | dict(TOKEN_ORDER=order, TOKEN_THRESHOLD=threshold) | sizes)
        found = stream_hints(validation, config)
        assert torch.equal(found, as_tensor(slow_table(text_of(validation, config), [(False, order)], threshold)))
        seen.append(int((found[:, 0] >= 0).sum()))
    assert min(seen[:4]) >= 50 and seen[4] < 10  # all documents in one round share nothing
    assert stream_hints(validation, toy_config()) is None


def test_all_ranks_get_the_hints_of_the_main_one() -> None:
    """Only the main rank makes them."""
    validation, config = few_validation(), document_config("2", 4)
    tables = on_peers(3, lambda run: stream_hints(validation, config, run))
    assert all(torch.equal(table, stream_hints(validation, config)) for table in tables)


def test_only_the_tallied_score_is_tilted(one_track: None) -> None:
    """Adapters and global updates learn from the model's own loss: without a hint every score is as without the tilt,
    to the last bit; with one it is the tilted score of the target that really stands there."""
    validation = repetitive_validation()
    scored, hits, misses = {}, 0, 0
    for on in (0, 1):
        config = toy_config(**TILT | dict(NGRAM_TILT_ENABLED=on), TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=4)
        scored[on] = adapted(validation, config)
    hinted = slow_table(text_of(validation, config), [(False, 4)], 0.5)
    for position in range(1, len(validation.tokens)):
        plain, tilted, hint = scored[0][position], scored[1][position], hinted[position][0]
        if hint < 0:
            assert tilted == plain, position
        elif hint == validation.tokens[position]:
            q = np.exp(-plain)
            assert tilted == pytest.approx(-np.log(q * np.exp(1.5) / (1 + q * np.expm1(1.5))), abs=1e-5)
            hits += 1
        else:
            assert plain < tilted < plain + 1.5
            misses += 1
    assert hits > 10 and misses > 5


def test_a_missed_hint_costs_what_its_probability_says(one_track: None) -> None:
    """On the real path, the price of a wrong hint is log(1 + q (e^boost - 1)) with q of the hinted id at that place."""
    config = toy_config(**TILT, TTT_LORA_LR=0, PHASED_TTT_PREFIX_DOCS=0, TTT_EVAL_SEQ_LEN=32, TTT_BATCH_SIZE=1)
    validation, model = repetitive_validation(), random_model(config)
    scored = nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(model, v, config)))
    hints, plan, checked = dict(slow_hints(text_of(validation, config), 4, 0.5)), tg.layer_plan(config, True), 0
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


few_ids = st.integers(3, 6).flatmap(lambda top: lists(1, top, 90))


@settings(max_examples=60, deadline=None)
@given(few_ids.filter(lambda ids: len(ids) > 1), st.sampled_from(list(SOURCES)), thresholds, st.integers(1, 3))
def test_document_hints_equal_tables(tokens: list[int], case: tuple[str, int], threshold: float, size: int) -> None:
    """Streams over few ids, one of them BOS: documents of all lengths, the first with and without a BOS."""
    validation, config = make_validation(np.array(tokens)), document_config(*case, threshold, TTT_BATCH_SIZE=1)
    with mock.patch.object(tg, "ROUND_BATCHES", size):
        expected = as_tensor(slow_table(text_of(validation, config), SOURCES[case], threshold))
        assert torch.equal(stream_hints(validation, config), expected)


def test_every_source_gives_hints_on_a_long_stream(one_track: None) -> None:
    """The same on 3,000 tokens, where each of four sources is asked often, and documents and stream disagree."""
    generator = np.random.default_rng(0)
    tokens = np.concatenate(
        [np.append(tg.BOS_ID, generator.integers(4, 9, generator.integers(1, 80))) for _ in range(75)]
    )
    validation, case = make_validation(tokens), ("3, 6,2", 3)
    config = document_config(*case)
    found = stream_hints(validation, config)
    assert torch.equal(found, as_tensor(slow_table(text_of(validation, config), SOURCES[case], 0.5)))
    assert (torch.bincount(found[found[:, 1] >= 0, 1], minlength=4) >= 20).all()


def test_hints_of_a_document_are_its_own() -> None:
    """Without hints from the stream, which no window of 63 gives here, other texts around a document change nothing; a
    document that stands there twice gets the same hints twice, and none at first sight."""
    config = document_config("5,3,2", 64, TTT_BATCH_SIZE=1)
    generator, seen = np.random.default_rng(1), []
    make = lambda length: np.append(tg.BOS_ID, generator.integers(4, 8, length))
    mine = make(50)
    for _ in range(3):
        validation = make_validation(np.concatenate([make(90), mine, make(90), mine, [4]]))
        found = stream_hints(validation, config)
        seen += [found[92:142], found[234:284]]  # the targets of both copies
    assert all(torch.equal(table, seen[0]) for table in seen) and (seen[0][:, 0] >= 0).sum() > 20
    with mock.patch.object(tg, "ROUND_BATCHES", 1):
        shared = stream_hints(validation, document_config("5,3,2", 4, TTT_BATCH_SIZE=1))
    assert not torch.equal(shared[234:284, 0], seen[0][:, 0])  # an earlier round would have known


def test_hints_of_a_training_row_are_those_of_its_documents() -> None:
    """Of each target, from the sources inside documents alone; a row begins inside a document."""
    for case, sources in SOURCES.items():
        tokens = np.random.default_rng(3).integers(4, 8, 201)
        tokens[[40, 41, 100, 190, 200]] = tg.BOS_ID
        row = tg.Row(torch.from_numpy(tokens[None, :-1]), torch.from_numpy(tokens[None, 1:]), None)
        document = np.cumsum(tokens == tg.BOS_ID).tolist()
        inside = [source for source in sources if source[0]]
        expected = slow_table(Text(tokens.tolist(), document, [0] * 201), inside, 0.5)[1:]
        found = tg.row_hints(row, document_config(*case))
        assert found.tolist() == [list(entry) for entry in expected]
        assert (found[:, 0] >= 0).sum() > 50 or not inside


# ---------------------------------------------------------------------------------------------------------------
# Boosts
# ---------------------------------------------------------------------------------------------------------------


def logit(q: torch.Tensor) -> torch.Tensor:
    return torch.log(q / (1 - q))


def synthetic_hints(
    count: int, seed: int, truth: tuple[float, float], logits: tuple[int, int] = (-4, 2)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of hints whose logits lie in a range, and whether they come true: with logit w0 + (1 + w1) logit(q) for
    `truth` (w0, w1)."""
    generator, (low, high) = torch.Generator().manual_seed(seed), logits
    q = torch.sigmoid(torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low)
    p = torch.sigmoid(truth[0] + (1 + truth[1]) * logit(q))
    return -torch.log(q), torch.rand(count, generator=generator, dtype=torch.float64) < p


ONE = torch.zeros(1, dtype=torch.long)  # the document, where there is only one


def boosts_of(orders: str, prior: Any = 0.0, documents: int = 1) -> tg.Boosts:
    """Boosts whose first weights are `prior`; nothing else of the model is read."""
    config = document_config(orders, 4)
    first = torch.zeros(len(config.document_orders), 2) + torch.as_tensor(prior)
    return tg.Boosts(config, SimpleNamespace(hint_prior=first), documents)


def test_hints_of_the_stream_get_the_boost_of_the_setting() -> None:
    """TOKEN_BOOST, whatever the hint's probability and whatever has been learnt; so does a place without a hint."""
    for orders in ("", "2", "2,4"):
        boosts, documents = boosts_of(orders, 0.7, 3), torch.arange(7) % 3
        last = len(orders.split(",")) if orders else 0
        sources = torch.randint(-1, 1, (5, 7)) * (last + 1) + last  # the stream's, or -1
        nll = torch.rand(5, 7) * 9
        if orders:
            boosts.update(nll[0], documents, torch.zeros(7, dtype=torch.long), torch.ones(7, dtype=torch.bool))
        found = boosts.boost(nll, documents.expand(5, 7), sources)
        assert torch.equal(found, torch.full((5, 7), 1.5, dtype=torch.float64))
        assert set(sources.flatten().tolist()) == {-1, last} and not boosts.learnt(sources).any()


def test_first_boosts_are_those_of_the_model() -> None:
    """w0 + w1 logit(q) with the source's row of hint_prior, for every document; a prior of nothing tilts nothing."""
    prior = torch.tensor([[0.5, -0.25], [-1.0, 0.125]])
    nll, sources, documents = torch.rand(50, 2) * 5 + 0.1, torch.arange(50) % 2, torch.arange(50) % 3
    found = boosts_of("2,4", prior, 3).boost(nll[:, 1], documents, sources)
    wanted = prior[sources, 0] + prior[sources, 1] * logit(torch.exp(-nll[:, 1].double()))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    none = boosts_of("2,4", 0.0, 3)
    ids = torch.randint(0, 2, (50, 2))
    assert torch.equal(tg.tilt(nll, ids, none.boost(nll[:, 1], documents, sources)), nll[:, 0].double())
    assert none.learnt(torch.tensor([[-1, 0, 1, 2]])).tolist() == [[False, True, True, False]]


def test_an_update_is_one_newton_step_for_each_document_and_source() -> None:
    """Weights - (curvature so far)^-1 gradient of the summed tilted nats, both by differentiating tilt() itself; twice,
    with the curvatures added up over a prior of 10 hints; documents and sources without hints stay as they are."""
    boosts = boosts_of("2,4,6", [[0.3, 0.1], [0.2, 0.0], [-0.4, -0.2]], documents=3)
    curvature = 10 * torch.eye(2, dtype=torch.float64).repeat(3, 4, 1, 1)
    for seed in (1, 2):
        nll, hit = synthetic_hints(360, seed, (1.0, -0.3))
        sources, documents = torch.arange(360) % 2 * 2, torch.arange(360) // 2 % 2 * 2
        before, moved = boosts.weights.clone(), []
        boosts.update(nll.float(), documents, sources, hit)
        for document, source in itertools.product((0, 2), (0, 2)):
            mine = (sources == source) & (documents == document)
            nats, came, start = nll.float()[mine].double(), hit[mine], before[document, source]
            pairs = torch.stack([torch.where(came, nats, torch.full_like(nats, 3.0)), nats], -1)
            ids = torch.stack([torch.where(came, 7, 5), torch.full_like(came, 7, dtype=torch.long)], -1)
            total = lambda w: tg.tilt(pairs, ids, w[0] + w[1] * logit(torch.exp(-nats))).sum()
            gradient = torch.autograd.functional.jacobian(total, start)
            curvature[document, source] += torch.autograd.functional.hessian(total, start)
            wanted = start - torch.linalg.inv(curvature[document, source]) @ gradient
            torch.testing.assert_close(boosts.weights[document, source], wanted, rtol=1e-7, atol=1e-9)
            moved.append(float((wanted - start).abs().max()))
        assert min(moved) > 0.02
        assert torch.equal(boosts.weights[1], before[1]) and torch.equal(boosts.weights[:, [1, 3]], before[:, [1, 3]])
    torch.testing.assert_close(boosts.curvature.view(3, 4, 2, 2), curvature, rtol=1e-7, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), min_size=3, max_size=3), st.integers(0, 2**31))
def test_boosts_of_a_document_depend_on_nothing_but_its_own_hints(counts: list[tuple[int, int]], seed: int) -> None:
    """To the last bit: the same hints in the same chunks give the same boosts alone and between other documents, which
    have any number of hints before and behind."""
    alone, among = boosts_of("2,4", 0.1), boosts_of("2,4", 0.1, documents=3)
    generator = torch.Generator().manual_seed(seed)
    for before, behind in counts:
        sizes = torch.tensor([before, 9, behind])
        documents = torch.arange(3).repeat_interleave(sizes)
        nll = torch.rand(len(documents), generator=generator) * 6
        sources = torch.randint(0, 2, (len(documents),), generator=generator)
        hit, mine = torch.rand(len(documents), generator=generator) < 0.5, documents == 1
        here = (nll[mine], ONE.expand(9), sources[mine])
        assert torch.equal(among.boost(nll, documents, sources)[mine], alone.boost(*here))
        among.update(nll, documents, sources, hit)
        alone.update(*here, hit[mine])
        assert torch.equal(among.weights[1], alone.weights[0])


TRUTHS = [(1.2, -0.2), (-0.7, 0.3), (0.0, 0.0)]


def test_learnt_boosts_make_probabilities_true() -> None:
    """Hints that come true more often, or less, than the model says: after some thousands of each source the new
    probabilities are the hit rates, for likely and for unlikely hints, and the nats fall."""
    boosts = boosts_of("2,4,6")
    for seed in range(120):
        drawn = [synthetic_hints(32, 3 * seed + source, truth) for source, truth in enumerate(TRUTHS)]
        nll, hit = (torch.cat(parts) for parts in zip(*drawn))
        boosts.update(nll, ONE.expand(96), torch.arange(3).repeat_interleave(32), hit)
    for source, truth in enumerate(TRUTHS):
        nll, hit = synthetic_hints(20_000, 10**6 + source, truth)
        boost = boosts.boost(nll, ONE, torch.full((20_000,), source))
        raised = torch.sigmoid(logit(torch.exp(-nll)) + boost)
        for kind in (nll < 2, nll >= 2):
            assert float(raised[kind].mean()) == pytest.approx(float(hit[kind].double().mean()), abs=0.025)
        assert boosts.weights[0, source].tolist() == pytest.approx(truth, abs=0.2)
        pairs = torch.stack([torch.where(hit, nll, torch.zeros_like(nll)), nll], -1)  # misses: only the sum's price
        ids = torch.stack([hit.long(), torch.ones_like(hit, dtype=torch.long)], -1)
        gain = (pairs[:, 0] - tg.tilt(pairs, ids, boost)).mean()
        assert gain > (0.02 if source < 2 else -0.002)


def test_boosts_are_bounded_and_finite() -> None:
    """What is learnt is at most 8 either way; hints of probability zero and one, and updates on them, are finite."""
    boosts = boosts_of("2,4,6", [[100.0, 0.0], [-100.0, 0.0], [0.0, 2.0]])
    nll = torch.tensor([0.0, -1e-6, 1e-9, 0.7, 90.0, 1e4])
    for source, wanted in ((0, [8.0] * 6), (1, [-8.0] * 6), (2, [8.0, 8.0, 8.0, None, -8.0, -8.0])):
        found = boosts.boost(nll, ONE, torch.full((6,), source)).tolist()
        assert all(w is None or f == w for f, w in zip(found, wanted)) and abs(found[3]) <= 8
    boosts.weights[0, 3, 0] = 100.0  # TOKEN_BOOST is the user's
    assert boosts.boost(nll, ONE, torch.full((6,), 3)).tolist() == [100.0] * 6
    for hit in (True, False):
        for source in range(3):
            boosts.update(nll, ONE.expand(6), torch.full((6,), source), torch.full((6,), hit))
    assert boosts.weights.isfinite().all() and boosts.curvature.isfinite().all()
    boosts.update(nll[:0], ONE[:0], ONE[:0], torch.zeros(0, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------
# Boosts to begin with: fit_boosts
# ---------------------------------------------------------------------------------------------------------------


def fit(hints: list[tuple[torch.Tensor, torch.Tensor]], count: int, run: tg.Run = RUN) -> torch.Tensor:
    """fit_boosts of (nats, hit) for each source."""
    nll, hit = (torch.cat(parts) for parts in zip(*hints))
    sources = torch.arange(len(hints)).repeat_interleave(torch.tensor([len(nats) for nats, _ in hints]))
    return tg.fit_boosts(nll, sources, hit, count, run)


def test_fitted_boosts_are_the_planted_truths() -> None:
    """20,000 hints of each source, one of which the model knows all about; two sources without hints keep zeros."""
    drawn = [synthetic_hints(20_000, source, truth) for source, truth in enumerate(TRUTHS)]
    found = fit(drawn, 5)
    torch.testing.assert_close(found[:3], torch.tensor(TRUTHS, dtype=torch.float64), atol=0.08, rtol=0)
    assert not found[3:].any()
    assert not fit([(torch.zeros(0), torch.zeros(0, dtype=torch.bool))], 2).any()


def test_few_hints_move_little() -> None:
    """A prior of ten hints: one hint, true or not, is worth little, and a thousand are worth almost the truth."""
    nll = torch.full((1000,), math.log(2))  # a logit of zero, so that w0 alone matters
    for hit in (True, False):
        (w0, w1), = fit([(nll[:1], torch.tensor([hit]))], 1).tolist()
        assert 0.02 < (w0 if hit else -w0) < 0.06 and abs(w1) < 1e-6
    (w0, _), = fit([(nll, torch.arange(1000) % 4 > 0)], 1).tolist()
    assert math.log(3) * 0.9 < w0 < math.log(3)


@pytest.mark.parametrize("logits", [(-4, 2), (-9, -5), (-12, -4), (-39, 6), (6, 13)], ids=str)
@pytest.mark.parametrize("truth", [(1.2, -0.2), (4.0, -0.5), (6.0, 0.0), (5.0, -0.9), (-5.0, 0.0)], ids=str)
def test_fitted_boosts_are_the_least_nats(truth: tuple[float, float], logits: tuple[int, int]) -> None:
    """Also where a model finds all hints unlikely, or sure, and is wrong: the gradient of nats and prior, by
    differentiating tilt(), is zero there."""
    for count in (100, 20_000):
        nll, hit = synthetic_hints(count, 7, truth, logits)
        found = fit([(nll, hit)], 1)[0].requires_grad_()
        pairs = torch.stack([torch.where(hit, nll, torch.zeros_like(nll)), nll], -1)
        ids = torch.stack([hit.long(), torch.ones_like(hit, dtype=torch.long)], -1)
        nats = tg.tilt(pairs, ids, found[0] + found[1] * logit(torch.exp(-nll))).sum() + 5 * found.square().sum()
        nats.backward()
        assert found.grad.abs().max() < 1e-4 * count and found.abs().max() < 20


@pytest.mark.parametrize("world_size", [2, 3])
def test_fitted_boosts_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    """Hints dealt to ranks, of which only the first has those of one source: all find what one finds with all hints."""
    drawn = [synthetic_hints(900, source, truth) for source, truth in enumerate(TRUTHS)]
    nll, hit, sources = torch.cat([d[0] for d in drawn]), torch.cat([d[1] for d in drawn]), torch.arange(2700) // 900
    alone = tg.fit_boosts(nll, sources, hit, 4, RUN)
    owner = torch.where(sources == 1, 0, torch.arange(2700) % world_size)
    part = lambda run: (tensor[owner == run.rank] for tensor in (nll, sources, hit))
    found = on_peers(world_size, lambda run: tg.fit_boosts(*part(run), 4, run))
    assert all(torch.equal(weights, found[0]) for weights in found)
    torch.testing.assert_close(found[0], alone, atol=1e-9, rtol=1e-9)
    assert alone[:2].abs().min() > 0.1 and not alone[3].any()


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
    others, with row, source and truth; the ledger is asked before; all such hints of the stream come by once."""
    monkeypatch.setattr(tg, "ROUND_BATCHES", 1)
    config, validation = document_config("2,4", 4, **LEARNT), mixed_validation()
    config = dataclasses.replace(config, val_batch_tokens=65536)  # no batch is passed in parts
    watched = Watched(monkeypatch)
    tg.adapt_documents(evaluation_of(random_model(config), validation, config))
    hints, used = stream_hints(validation, config), []
    learnt, row_of = (hints[:, 1] == 0) | (hints[:, 1] == 1), {}
    for batch in tg.document_queue(validation.documents, 4):
        row_of |= {start + i: row for row, (start, count) in enumerate(batch.tolist()) for i in range(1, count + 1)}
    for number, (kind, arguments) in enumerate(watched.events):
        if kind == "Tally.add":
            wanted = [p for p in np.asarray(arguments[1]).tolist() if learnt[p]]
            chunk = list(itertools.takewhile(lambda event: event[0] != "Tally.add", watched.events[number + 1 :]))
            updates = [place for place, event in enumerate(chunk) if event[0] == "Boosts.update"]
            assert len(updates) == bool(wanted)
            if wanted:
                (ledger, asked), (_, given) = chunk[updates[0] - 1 : updates[0] + 1]
                nll, rows, sources, hit = given
                assert ledger == "Tally.learn_from" and np.asarray(asked[0]).tolist() == wanted
                assert len(nll) == len(wanted) and rows.tolist() == [row_of[p] for p in wanted]
                assert sources.tolist() == hints[wanted, 1].tolist()
                assert hit.tolist() == (hints[wanted, 0] == validation.tokens[wanted]).tolist()
            used += wanted
    kinds = [kind for kind, _ in watched.events]
    assert sorted(used) == learnt.nonzero()[:, 0].tolist() and len(used) > 80 and (hints[:, 1] == 2).sum() > 10
    assert 0 < kinds.count("Boosts.update") <= kinds.count("Tally.add") and "Adapters.step" in kinds


def test_fixed_boosts_are_never_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TOKEN_DOCUMENT_ORDERS the ledger only knows the targets of weight updates."""
    watched = Watched(monkeypatch)
    config = document_config("", 4, **LEARNT)
    tg.adapt_documents(evaluation_of(random_model(config), few_validation(), config))
    kinds = [kind for kind, _ in watched.events]
    assert "Boosts.update" not in kinds and kinds.count("Tally.learn_from") == kinds.count("Adapters.step") > 0


def test_each_document_begins_with_the_prior_and_gets_what_it_has_learnt(one_track: None) -> None:
    """In a document's first chunk its own hints are tilted by hint_prior alone, in later ones by something else; hints
    of the stream by TOKEN_BOOST throughout; where there is no hint, no score is changed."""
    config, validation = document_config("2,4", 4, **LEARNT), mixed_validation()
    tilted = adapted(validation, config)
    plain = adapted(validation, dataclasses.replace(config, ngram_tilt_enabled=False))
    prior, hints = random_model(config).hint_prior.double(), stream_hints(validation, config)
    first, later, stream = 0, 0, 0
    for start, count in validation.documents.tolist():
        for position in range(start + 1, start + count + 1):
            (hint, source), q = hints[position].tolist(), np.exp(-plain[position])
            if source < 0:
                assert tilted[position] == plain[position], position
            elif hint == validation.tokens[position]:
                w0, w1 = prior[source].tolist() if source < 2 else (1.5, 0.0)
                boost = w0 + w1 * np.log(q / (1 - q))
                as_at_first = abs(tilted[position] + np.log(q * np.exp(boost) / (1 + q * np.expm1(boost)))) < 1e-5
                early = position <= start + 8
                assert as_at_first or not (early or source == 2)
                first, later, stream = first + (early and source < 2), later + (not as_at_first), stream + (source == 2)
    assert first > 2 and later > 8 and stream > 8


def test_another_token_moves_no_score_of_other_documents_through_the_boosts() -> None:
    """In one batch, with hints from documents only: another token leaves all scores before it in its document, and all
    of the documents beside it, to the last bit; later ones of its own document do move."""
    config = document_config("5,3,2", 64, **LEARNT | dict(TTT_BATCH_SIZE=9))
    validation = few_validation()
    start, count = validation.documents[1].tolist()
    position, tokens = start + 21, validation.tokens.clone()
    tokens[position] = 4 + (int(tokens[position]) + 9) % 60
    first, second = adapted(validation, config), adapted(validation._replace(tokens=tokens), config)
    moved = np.flatnonzero(first[1:] != second[1:]) + 1
    assert len(moved) > 10 and position <= moved.min() and moved.max() <= start + count


@pytest.mark.parametrize("prefix", [0, 6], ids=["one phase", "phases"])
def test_a_later_document_moves_no_score_of_earlier_rounds(prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, with hints from everywhere, adapters and global updates: other tokens in all documents from a
    round on leave every score of the rounds before; those of the round before move the later ones, by hints alone if
    there is no global update."""
    monkeypatch.setattr(tg, "TTT_TRACKS", 2)
    monkeypatch.setattr(tg, "ROUND_BATCHES", 2)
    phases = dict(TTT_BATCH_SIZE=1, PHASED_TTT_PREFIX_DOCS=prefix)
    config, validation = document_config("2,4", 3, 0.3, **phases), mixed_validation()
    queue, first = tg.document_queue(validation.documents, 1), adapted(validation, config)
    targets = [[start + i for start, count in batch.tolist() for i in range(1, count + 1)] for batch in queue]
    for number in (2, 4):  # the first batch of a round
        tokens, generator = validation.tokens.clone(), torch.Generator().manual_seed(number)
        for batch in queue[number:]:
            for start, count in batch.tolist():
                tokens[start + 1 : start + count] = torch.randint(4, 9, (count - 1,), generator=generator)
        second = adapted(validation._replace(tokens=tokens), config)
        early = list(itertools.chain(*targets[:number]))
        assert np.array_equal(first[early], second[early])
    start, count = queue[3][0].tolist()
    tokens = validation.tokens.clone()
    tokens[start + count - 12 : start + count] = torch.arange(15, 3, -1)
    second, later = adapted(validation._replace(tokens=tokens), config), list(itertools.chain(*targets[4:]))
    assert not np.array_equal(first[later], second[later])


@pytest.mark.parametrize("world_size", [2, 8])
def test_scores_with_hints_do_not_depend_on_the_number_of_ranks(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each target gets the same score, to the last bit, from one rank and from the ranks that share the tracks, with
    hints from earlier rounds; on eight ranks of nine batches most have nothing in the second round."""
    lengths = (26, 24, 17, 28, 19, 22, 25, 16, 27)
    config, validation = document_config("2,4", 3, 0.3, **LEARNT | dict(TTT_BATCH_SIZE=1)), few_validation(lengths)
    assert (stream_hints(validation, config)[:, 1] == 2).any()
    alone = adapted(validation, config)
    job = lambda run: tg.adapt_documents(evaluation_of(random_model(config), validation, config, run))
    tallies = []
    together = nll_per_target(validation, lambda _: tallies.extend(on_peers(world_size, job)))
    assert np.array_equal(together[1:], alone[1:])
    assert {(tally.nats, tally.tokens) for tally in tallies} == {(tallies[0].nats, len(alone) - 1)}


def test_the_artifact_carries_the_prior_and_the_score_depends_on_it(tmp_path: Path) -> None:
    """In fp16; the weights that come back are those of the first boosts, and another value is another score."""
    config, validation = document_config("2,4", 4, **LEARNT, QUANT_SCHEME="intn_row"), few_validation((40, 30))
    scores = []
    for value in (0.1, 0.7):
        model = random_model(config)
        with torch.no_grad():
            model.hint_prior[1, 0] = value
        expected = model.hint_prior.half().float()
        stored = tg.quantize(model.arrays(), config, RUN.device)
        tg.save_artifact(tmp_path / "artifact.bin", stored, config)
        again = tg.GPT(config, RUN)
        tg.use_artifact(again, tmp_path / "artifact.bin", config, RUN)
        assert torch.equal(again.hint_prior, expected) and again.hint_prior.shape == (2, 2)
        assert torch.equal(tg.Boosts(config, again, 3).weights[2, :2], expected.double())
        scores.append(nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(again, v, config))))
    changed, sources = scores[0][1:] != scores[1][1:], stream_hints(validation, config)[1:, 1]
    assert changed.sum() > 10 and (sources[torch.from_numpy(changed)] == 1).all()


def test_nothing_but_the_fit_moves_the_prior() -> None:
    """Neither adapters nor global updates, of either optimizer; the optimizer of training does not know it."""
    config = document_config("2,4", 4, TTT_BATCH_SIZE=2, TTT_CHUNK_TOKENS=128, TTT_EPOCHS=1)
    validation = few_validation()
    for kind, change in (("lora_phased", {}), ("chunk_sgd", {}), ("chunk_sgd", dict(chunk_ttt_optimizer="adamw"))):
        model = random_model(config)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        tg.TTT_KINDS[kind](evaluation_of(model, validation, dataclasses.replace(config, ttt_kind=kind, **change)))
        assert torch.equal(model.hint_prior, before["hint_prior"])
        assert not torch.equal(model.qo_bank, before["qo_bank"])
    assert list(model.groups()["fitted"]) == ["hint_prior"]
    assert "hint_prior" in model.unused(tg.layer_plan(config, True))
