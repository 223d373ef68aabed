"""ADAPT: score first, learn afterwards; every target once; results that no batching or rank decides."""

import copy
import math
import threading
import time
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (
    FEW_VISITS,
    evaluation_of,
    nll_per_target,
    on_peers,
    random_model,
    recorded_nll,
    toy_config,
    validation_of_lengths,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import train_gpt as tg

RUN = tg.Run()
LENGTHS = [37, 8, 1, 20, 9, 61, 7, 16, 24, 3, 33, 12, 40, 2, 17, 25, 5, 31, 8, 45]


def new_adapters(config: tg.Config, model: tg.GPT, batch: int, seed: int) -> tg.Adapters:
    """Adapters that have seen nothing yet."""
    adapters = tg.Adapters(config, model, batch)
    adapters.begin(None, seed)
    return adapters


def adapt_batch(
    model: tg.GPT, validation: tg.Validation, config: tg.Config, adapters: Any = None, forward: Any = None
) -> np.ndarray:
    """nll per target when all documents are one batch, longest first, with phases off."""
    model.requires_grad_(False)
    batch = validation.documents[np.argsort(-validation.documents[:, 1], kind="stable")]
    adapters = adapters or new_adapters(config, model, len(batch), seed=1)

    def scorer(v: tg.Validation) -> None:
        tg.adapt_batch(evaluation_of(forward or model, v, config), adapters, batch, config.ttt_chunk_size)

    return nll_per_target(validation, scorer)


def with_tokens(validation: tg.Validation, changes: dict[int, int]) -> tg.Validation:
    """The same documents with some tokens replaced."""
    tokens = validation.tokens.clone()
    for position, value in changes.items():
        tokens[position] = value
    return validation._replace(tokens=tokens)


def all_scored(model: tg.GPT, validation: tg.Validation, config: tg.Config) -> tg.Evaluation:
    """An evaluation in which every target has its score."""
    evaluation, count = evaluation_of(model, validation, config), len(validation.tokens) - 1
    evaluation.tally.add(torch.zeros(count), torch.arange(1, count + 1))
    return evaluation


def another(token: Any) -> int:
    return 4 + (int(token) - 3) % 60


class NoAdapters:
    """Stands in for adapters where only the windows matter."""

    def lora(self, part: slice) -> None:
        return None

    def step(self, lora: None, part: slice, number: int) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------
# Which targets are scored, and from which inputs
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, context", [(48, 2048), (48, 96), (8, 32), (5, 32), (1, 4)])
def test_every_target_is_scored_once_from_its_own_document(chunk: int, context: int) -> None:
    """Documents of 1..600 targets in batches of unequal lengths: each target once, seeing only its document's past."""
    lengths = [1, 47, 48, 49, 95, 96, 97, 2, 600, 333, 144] if chunk == 48 else [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 70]
    validation = validation_of_lengths(lengths)
    config = toy_config(TTT_CHUNK_SIZE=chunk, TTT_EVAL_SEQ_LEN=context, VAL_BATCH_TOKENS=65536)
    stream = validation.tokens.tolist()
    learned_from = []

    def forward(tokens: Tensor, wanted: Tensor, plan: Any, segments: Any, lora: Any) -> Tensor:
        assert segments is None and tokens.size(1) <= context and wanted.size(1) == chunk
        first = tokens.size(1) - chunk
        seen.append((tokens, wanted, first))
        return torch.zeros(wanted.shape, requires_grad=torch.is_grad_enabled())

    for batch in tg.document_queue(validation.documents, 4):
        seen: list = []

        def scorer(v: tg.Validation) -> None:
            tg.adapt_batch(evaluation_of(forward, v, config), NoAdapters(), batch, chunk)

        with recorded_nll() as counted:
            scorer(validation)
        assert sorted(counted) == sorted(s + i + 1 for s, n in batch.tolist() for i in range(n))
        for number, (tokens, wanted, first) in enumerate(seen):
            going_on = [document for document in batch.tolist() if document[1] > number * chunk]
            assert len(tokens) == len(wanted) == len(going_on)  # those that have ended take no work
            for row, (start, count) in enumerate(going_on):
                begin = max(0, (number + 1) * chunk - context)
                for column in range(chunk):
                    i = number * chunk + column  # the document's target i is stream position start + i + 1
                    if i < count:
                        assert wanted[row, column] == stream[start + i + 1]
                        assert tokens[row, : first + column + 1].tolist() == stream[start + begin : start + i + 1]
                past_the_end = tokens[row, max(0, count - begin) :]
                assert not past_the_end.any()  # padding holds no token of the next document
        learned_from.append(len(seen))
    assert learned_from == [-(-int(batch[:, 1].max()) // chunk) for batch in tg.document_queue(validation.documents, 4)]


def test_whole_pass_scores_every_target_once() -> None:
    """adapt_documents(): tokens - 1 targets and all bytes, whatever the batch size and number of phases. Learning is
    counted: all but the last chunks, and the documents of every global update."""
    validation = validation_of_lengths(LENGTHS)
    taught = sum((length - 1) // 8 * 8 for length in LENGTHS)
    for batch_size, prefix, phases in ((4, 12, 2), (64, 2000, 3), (3, 0, 1), (1, 5, 5)):
        changes = dict(TTT_BATCH_SIZE=batch_size, PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=phases)
        config, tallies = toy_config(**FEW_VISITS, **changes), []
        nll_per_target(
            validation,
            lambda v: tallies.append(tg.adapt_documents(evaluation_of(random_model(config), v, config))),
        )
        assert tallies[0].tokens == sum(LENGTHS) == len(validation.tokens) - 1
        assert tallies[0].bytes == int(validation.bytes.sum())
        queue = tg.document_queue(validation.documents, batch_size)
        pauses = [pause for pause in tg.phase_pauses(queue, config) if pause < len(queue)]  # nothing follows the last
        again = sum(int(part[:, 1].sum()) for pause in pauses for part in queue[:pause])
        assert tallies[0].learned == taught + again


def mixed_config(**changes: Any) -> tg.Config:
    """Chunks of 1, 3, 5 and 8 targets for documents of up to 4, 12, 30 and more; one batch each, each its own track."""
    steps = dict(TTT_CHUNK_STEPS="4:1,12:3,30:5", TTT_BATCH_SIZE=64, PHASED_TTT_PREFIX_DOCS=0)
    return toy_config(**FEW_VISITS | steps | changes)


def mixed_chunk(count: int) -> int:
    return 1 if count <= 4 else 3 if count <= 12 else 5 if count <= 30 else 8


def test_chunks_of_several_sizes_score_every_target_once_before_learning_from_it() -> None:
    """TTT_CHUNK_STEPS: each target once; all but the last chunk of each document teach; in every document the tokens
    from some place on change no score before it, and those from the next chunk on."""
    config, validation = mixed_config(), validation_of_lengths(LENGTHS)
    tallies = []
    scorer = lambda v: tallies.append(tg.adapt_documents(evaluation_of(random_model(config), v, config)))
    before = nll_per_target(validation, scorer)
    taught = [(length - 1) // mixed_chunk(length) * mixed_chunk(length) for length in LENGTHS]
    assert tallies[0].tokens == sum(LENGTHS) and tallies[0].learned == sum(taught)
    changes, places = {}, []
    for number, (start, count) in enumerate(validation.documents.tolist()):
        p = start + 1 + (number * 7) % count  # of the first changed target, somewhere in the document
        changes |= {q: another(validation.tokens[q]) for q in range(p, start + count)}
        places.append((start, count, p))
    after = nll_per_target(with_tokens(validation, changes), scorer)
    seen = 0
    for start, count, p in places:
        np.testing.assert_allclose(after[start + 1 : p], before[start + 1 : p], atol=1e-6)
        chunk = mixed_chunk(count)
        following = start + 1 + ((p - start - 1) // chunk + 1) * chunk  # the first target of the chunk behind p's
        if p < start + count and following <= start + count:
            seen += 1
            assert np.abs(after[following : start + count + 1] - before[following : start + count + 1]).max() > 1e-4
    assert seen > 8


def test_learning_behind_short_documents_is_as_fine_as_asked() -> None:
    """With TTT_CHUNK_STEPS a document's first `chunk` targets are scored bare, and the rest is not."""
    validation = validation_of_lengths(LENGTHS)
    adapted, bare = (
        nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(random_model(c), v, c)))
        for c in (mixed_config(TTT_LORA_LR=0.03), mixed_config(TTT_LORA_LR=0))
    )
    for start, count in validation.documents.tolist():
        own, chunk = slice(start + 1, start + count + 1), mixed_chunk(count)
        np.testing.assert_allclose(adapted[own][:chunk], bare[own][:chunk], atol=1e-6)
        assert count <= chunk or (np.abs(adapted[own][chunk:] - bare[own][chunk:]) > 1e-6).all()


@pytest.mark.parametrize("lengths", [[1], [50], [2, 1]])
def test_tiny_streams_terminate(lengths: list[int]) -> None:
    """One document, or fewer documents than the prefix and than there are tracks."""
    config, validation = (
        toy_config(PHASED_TTT_PREFIX_DOCS=2000, PHASED_TTT_NUM_PHASES=3),
        validation_of_lengths(lengths),
    )
    assert tg.adapt_documents(evaluation_of(random_model(config), validation, config)).tokens == sum(lengths)


# ---------------------------------------------------------------------------------------------------------------
# Score first
# ---------------------------------------------------------------------------------------------------------------


def test_learning_rate_zero_equals_bare_scoring_of_the_same_windows() -> None:
    """Adapters that never move score each target as the bare model does on the same window alone."""
    config = toy_config(**FEW_VISITS, TTT_LORA_LR=0)
    model, validation = random_model(config), validation_of_lengths(LENGTHS)
    adapted = adapt_batch(model, validation, config)
    plan = tg.layer_plan(config, True)
    for start, count in validation.documents.tolist():
        for begin, first, end in tg.plan_windows(count, config.ttt_eval_seq_len, 8, first=8):
            tokens = validation.tokens[start + begin : start + end + 1]
            with torch.no_grad():
                nll = model(tokens[None, :-1], tokens[None, 1:], plan)[0, first - begin :]
            np.testing.assert_allclose(adapted[start + first + 1 : start + end + 1], nll.numpy(), atol=2e-5)


def test_a_document_that_repeats_itself_gains() -> None:
    """Its future is easy to learn from its past."""
    validation = validation_of_lengths([64, 30, 9])
    tokens = validation.tokens.clone()
    tokens[1:64] = 9
    validation = validation._replace(tokens=tokens)
    learned, bare = (
        adapt_batch(random_model(config), validation, config)
        for config in (toy_config(TTT_LORA_LR=0.01), toy_config(TTT_LORA_LR=0))
    )
    assert learned[9:64].mean() < bare[9:64].mean() - 0.1


@pytest.mark.parametrize("length", [40, 37])
@pytest.mark.parametrize("beta1", [0, 0.9])
def test_adaptation_equals_decoupled_adam_by_hand(length: int, beta1: float) -> None:
    """One document's scores and final adapters equal a loop that writes AdamW out; its last chunk teaches nothing."""
    config = toy_config(TTT_BETA1=beta1, TTT_BETA2=0.9, TTT_WEIGHT_DECAY=2, TTT_LORA_LR=0.003)
    model, validation = random_model(config), validation_of_lengths([length])
    adapters = new_adapters(config, model, 1, seed=1)
    weights = {name: [t.clone().requires_grad_() for t in pair] for name, pair in adapters.factors.items()}
    fast = adapt_batch(model, validation, config, adapters)
    flat = [t for pair in weights.values() for t in pair]
    first, second = ([torch.zeros_like(t) for t in flat] for _ in range(2))
    slow, chunks = [], -(-length // 8)
    for c in range(chunks):
        begin, end = max(0, 8 * (c + 1) - 32), min(8 * (c + 1), length)
        lora = tg.Lora(6 / 4, {name: (a, b) for name, (a, b) in weights.items()})
        tokens = validation.tokens[begin : end + 1]
        nll = model(tokens[None, :-1], tokens[None, 1:], tg.layer_plan(config, True), lora=lora)[0, 8 * c - begin :]
        slow += nll.tolist()
        if c == chunks - 1:
            break
        gradients = torch.autograd.grad(nll.mean(), flat)
        with torch.no_grad():
            for t, g, m, v in zip(flat, gradients, first, second):
                m.mul_(beta1).add_((1 - beta1) * g)
                v.mul_(0.9).add_(0.1 * g * g)
                t.mul_(1 - 0.003 * 2)
                t.sub_(0.003 * (m / (1 - beta1 ** (c + 1))) / ((v / (1 - 0.9 ** (c + 1))).sqrt() + 1e-10))
    np.testing.assert_allclose(fast[1:], slow, atol=2e-3)
    for name, pair in adapters.factors.items():
        for got, want in zip(pair, weights[name]):
            assert (got - want).abs().mean() < 1e-5, name  # single entries may differ: a sign step at a zero gradient


def mutation_spread(forward_of: Any, places: tuple[int, ...] = (3, 9, 12, 16, 17, 23, 30, 39)) -> list[float]:
    """Largest change of an earlier target's nll when everything from document position p on is replaced, for some p."""
    config, validation = toy_config(), validation_of_lengths([40, 21])
    spread = []

    def scored(v: tg.Validation) -> np.ndarray:
        model = random_model(config)
        adapters = new_adapters(config, model, 2, seed=1)
        return adapt_batch(model, v, config, adapters, forward_of(model, adapters))

    before = scored(validation)
    for p in places:
        changed = with_tokens(validation, {q: another(validation.tokens[q]) for q in range(p, 40)})
        after = scored(changed)
        spread.append(float(np.abs(after[1:p] - before[1:p]).max()))
        assert np.abs(after[p:41] - before[p:41]).max() > 1e-3
        np.testing.assert_allclose(after[41:], before[41:], atol=1e-6)  # nor does it reach the other document
    return spread


def test_replacing_targets_changes_no_score_of_earlier_ones() -> None:
    """Score before update, token by token: what comes at p or later, in the same chunk too, cannot help before p."""
    assert max(mutation_spread(lambda model, adapters: model)) < 1e-6


def test_planted_update_before_the_tally_is_noticed() -> None:
    """A variant that learns from a chunk and then scores it fails the check above."""

    def cheating(model: tg.GPT, adapters: tg.Adapters) -> Any:
        def forward(tokens: Tensor, wanted: Tensor, plan: Any, segments: Any, lora: tg.Lora) -> Tensor:
            if not torch.is_grad_enabled():
                return model(tokens, wanted, plan, segments, lora)
            model(tokens, wanted, plan, segments, lora).mean(1).sum().backward()
            adapters.step(lora, slice(len(tokens)), 0)
            return model(tokens, wanted, plan, segments, adapters.lora(slice(len(tokens))))

        return forward

    assert max(mutation_spread(cheating, (12, 30))) > 1e-3


def test_documents_scored_before_a_pause_do_not_see_later_ones() -> None:
    """Mutating a document behind the last pause changes no score before it; one before it changes later ones."""
    config, validation = toy_config(**FEW_VISITS), validation_of_lengths(LENGTHS)
    queue = tg.document_queue(validation.documents, config.ttt_batch_size)
    pauses = tg.phase_pauses(queue, config)
    assert pauses[-1] < len(queue)
    scored = lambda v: nll_per_target(v, lambda v: tg.adapt_documents(evaluation_of(random_model(config), v, config)))
    targets = lambda batches: np.concatenate(
        [np.arange(s + 1, s + n + 1) for batch in batches for s, n in batch.tolist()]
    )
    before = scored(validation)
    start, count = queue[-1][0].tolist()
    after = scored(with_tokens(validation, {start + count - 1: another(validation.tokens[start + count - 1])}))
    early = targets(queue[: pauses[-1]])
    assert np.array_equal(after[early], before[early]) and not np.array_equal(after[1:], before[1:])
    start, count = queue[0][0].tolist()
    after = scored(with_tokens(validation, {start + count - 1: another(validation.tokens[start + count - 1])}))
    first_phase, later = targets(queue[1 : pauses[0]]), targets(queue[pauses[-1] :])
    assert np.array_equal(after[first_phase], before[first_phase])  # other tracks of the same phase
    assert np.abs(after[later] - before[later]).max() > 1e-6  # the global update has seen it


# ---------------------------------------------------------------------------------------------------------------
# Independence
# ---------------------------------------------------------------------------------------------------------------


def test_a_document_does_not_depend_on_its_batch_mates() -> None:
    """With the same A for every row and no phases, a document scores in a batch as it does alone."""
    config, lengths = toy_config(), [45, 40, 17, 8, 3]
    model, validation = random_model(config), validation_of_lengths(lengths)

    def same_start(batch: int) -> tg.Adapters:
        adapters, draws = new_adapters(config, model, batch, seed=1), new_adapters(config, model, 1, seed=2)
        with torch.no_grad():
            for name, (a, _) in adapters.factors.items():
                a.copy_(draws.factors[name][0].expand_as(a))
        return adapters

    together = adapt_batch(model, validation, config, same_start(5))
    for start, count in validation.documents.tolist():
        with recorded_nll() as rows:
            alone = np.array([[start, count]])
            tg.adapt_batch(evaluation_of(model, validation, config), same_start(1), alone, 8)
        assert sorted(rows) == list(range(start + 1, start + count + 1))
        np.testing.assert_allclose([rows[p] for p in sorted(rows)], together[start + 1 : start + count + 1], atol=1e-3)


def test_chunk_of_a_document_is_that_of_the_first_limit_it_does_not_exceed() -> None:
    """At the limits themselves, beside them, and beyond the last one; without steps it is TTT_CHUNK_SIZE."""
    config = mixed_config()
    assert [tg.chunk_of(count, config) for count in (1, 4, 5, 12, 13, 30, 31, 900)] == [1, 1, 3, 3, 5, 5, 8, 8]
    assert all(tg.chunk_of(count, config) == mixed_chunk(count) for count in range(1, 100))
    assert {tg.chunk_of(count, toy_config()) for count in range(1, 100)} == {8}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, int]]:
    """(batch, chunk) of each pass of adapters over a batch of documents, which then tally 0 without a model."""
    seen: list[tuple[np.ndarray, int]] = []

    def adapt_batch(e: tg.Evaluation, adapters: tg.Adapters, batch: np.ndarray, chunk: int, hints: Any) -> None:
        assert adapters.size == len(batch)
        seen.append((batch, chunk))
        for start, count in batch.tolist():
            e.tally.add(torch.zeros(count), torch.arange(start + 1, start + count + 1))

    monkeypatch.setattr(tg, "adapt_batch", adapt_batch)
    return seen


@pytest.mark.parametrize("factor", [1, 2, 4, 64])
def test_chunk_of_a_document_does_not_depend_on_its_neighbours(
    factor: int, passes: list[tuple[np.ndarray, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any grouping each document is adapted in chunks that its own length decides, times what the governor asks for,
    at most the context."""
    monkeypatch.setattr(tg.Governor, "forecast", lambda self, elapsed: factor)
    validation = validation_of_lengths(LENGTHS)
    for batch_size in (1, 3, 64):
        config = mixed_config(TTT_BATCH_SIZE=batch_size)
        passes.clear()
        nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(random_model(config), v, config)))
        chunks = {int(start): (int(count), chunk) for batch, chunk in passes for start, count in batch}
        assert len(chunks) == len(LENGTHS)
        assert all(chunk == min(factor * mixed_chunk(count), 32) for count, chunk in chunks.values())
        assert len(passes) == {1: 20, 3: 7, 64: 4}[batch_size]


def test_beginning_again_leaves_nothing_of_earlier_documents_but_a() -> None:
    """A batch that begins with the A of another one scores exactly as with new adapters that start from the same A."""
    config = toy_config()
    model, first, second = (
        random_model(config),
        validation_of_lengths([30, 22], seed=1),
        validation_of_lengths([28, 26], seed=2),
    )
    used = new_adapters(config, model, 2, seed=1)
    drawn = used.first_factors(torch.float32)
    adapt_batch(model, first, config, used)
    assert all(b.abs().max() > 0 for _, b in used.factors.values())
    kept = used.first_factors(torch.float32)
    assert not any(map(torch.equal, kept, drawn))  # A has learnt, so that keeping it is a choice
    fresh = tg.Adapters(config, model, 2)
    for adapters in (used, fresh):
        adapters.begin(kept, seed=99)
        assert all(map(torch.equal, adapters.first_factors(torch.float32), kept))
        assert all(not b.any() for _, b in adapters.factors.values())
        assert not any(moment.any() for moments in adapters.moments for moment in moments)
    again, anew = adapt_batch(model, second, config, used), adapt_batch(model, second, config, fresh)
    assert np.array_equal(again[1:], anew[1:])
    assert not any(map(torch.equal, used.first_factors(torch.float32), kept))  # what is kept is a copy


def test_a_is_drawn_where_none_of_this_size_is_kept() -> None:
    """The seed alone decides it then, whatever the adapters have been used for."""
    config, model = toy_config(), random_model(toy_config())
    other, expected = (
        new_adapters(config, model, 3, seed=5),
        new_adapters(config, model, 2, seed=7).first_factors(torch.float32),
    )
    for kept in (None, other.first_factors(torch.float32)):
        adapters = new_adapters(config, model, 2, seed=8)
        assert not any(map(torch.equal, adapters.first_factors(torch.float32), expected))
        adapters.begin(kept, 7)
        assert all(map(torch.equal, adapters.first_factors(torch.float32), expected))


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_batch_begins_without_memory_but_its_tracks_a(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B and the optimizer start empty for each batch; A is that of the track's last batch, over all batches of other
    tracks between, or drawn anew: at first, behind a pause, and for another number of documents."""
    config = toy_config(TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=6, PHASED_TTT_NUM_PHASES=1)
    validation = validation_of_lengths([*LENGTHS, 90, 50, 51] + [6] * 18)
    real, left, kept, drawn = tg.adapt_batch, {}, [], []
    queue = tg.document_queue(validation.documents, 2)
    pauses, tracks = tg.phase_pauses(queue, config), tg.deal_rounds(queue, config).track

    def spy(evaluation: tg.Evaluation, adapters: tg.Adapters, batch: np.ndarray, *rest: Any) -> None:
        assert all(not b.any() for _, b in adapters.factors.values())
        assert not any(moment.any() for moments in adapters.moments for moment in moments)
        number = next(i for i, part in enumerate(queue) if np.array_equal(part, batch))
        place = (sum(number >= pause for pause in pauses), tracks[number], len(batch))
        a = adapters.factors["attn.q"][0].clone()
        if place in left:
            assert torch.equal(a, left[place])
            kept.append(number)
        else:
            assert not any(torch.equal(a, other) for other in drawn)
            drawn.append(a)
        real(evaluation, adapters, batch, *rest)
        left[place] = adapters.factors["attn.q"][0].clone()

    monkeypatch.setattr(tg, "adapt_batch", spy)
    on_peers(world_size, lambda run: tg.adapt_documents(evaluation_of(random_model(config), validation, config, run)))
    # One batch of one document and three of two on four tracks, a pause, then 17 on 8 tracks, 9 of them warm.
    assert len(queue) == 21 and pauses == [4] and len(kept) == 9 and len(drawn) == 12


def test_adapters_have_the_published_shapes_and_start() -> None:
    """A uniform within 1 / sqrt(in), B zero, a pair per visit and kind, the head once; none for the MLP's first map."""
    config = toy_config()
    model, slots = random_model(config), len(tg.layer_plan(config, True))
    adapters = new_adapters(config, model, 3, seed=1)
    outs = {"attn.q": 32, "attn.k": 16, "attn.v": 16, "attn.o": 32, "mlp.down": 32, "head": 64}
    assert adapters.factors.keys() == outs.keys()
    for name, (a, b) in adapters.factors.items():
        n = 1 if name == "head" else slots
        assert a.shape == (3, n, 4, 32) and b.shape == (3, n, outs[name], 4)
        assert not b.any() and 0.9 < a.abs().max() * math.sqrt(32) <= 1 and a.unique().numel() > 0.99 * a.numel()
    assert adapters.lora(slice(None)).scale == config.ttt_lora_alpha / config.ttt_lora_rank


def test_a_part_of_a_batch_learns_alone_and_in_place() -> None:
    """Its adapters are no copies; a step moves its own rows and moments, as if there were no other documents."""
    config = toy_config(TTT_LORA_LR=0.01, TTT_BETA1=0.9)
    model = random_model(config)
    whole, alone, part = new_adapters(config, model, 5, seed=1), new_adapters(config, model, 2, seed=2), slice(1, 3)
    alone.begin([a[part] for a in whole.first_factors(torch.float32)], 0)
    before = copy.deepcopy(whole.factors)
    for number in range(3):
        for adapters, rows in ((whole, part), (alone, slice(None))):
            lora = adapters.lora(rows)
            random = torch.Generator().manual_seed(number)
            for name, pair in lora.factors.items():
                for leaf, factor in zip(pair, adapters.factors[name]):
                    assert leaf.data_ptr() == factor[rows].data_ptr() and leaf.is_contiguous()
                    leaf.grad = torch.randn(leaf.shape, generator=random)
            adapters.step(lora, rows, number)
    for name, pair in whole.factors.items():
        for factor, same, old in zip(pair, alone.factors[name], before[name]):
            assert torch.equal(factor[part], same) and (factor[part] != old[part]).float().mean() > 0.99
            assert torch.equal(factor[[0, 3, 4]], old[[0, 3, 4]])
    for moments, same in zip(whole.moments, alone.moments):
        assert all(torch.equal(m[part], s) and not m[[0, 3, 4]].any() for m, s in zip(moments, same))


@pytest.mark.parametrize("world_size", [2, 9])
def test_ranks_share_the_work_without_changing_the_sums(world_size: int) -> None:
    """With phases off, all ranks get the sums of one (with phases: test_train, real processes)."""
    config, validation = (
        toy_config(**FEW_VISITS, PHASED_TTT_PREFIX_DOCS=0, TTT_BATCH_SIZE=2),
        validation_of_lengths(LENGTHS),
    )
    whole = tg.adapt_documents(evaluation_of(random_model(config), validation, config))
    job = lambda run: tg.adapt_documents(evaluation_of(random_model(config), validation, config, run))
    for tally in on_peers(world_size, job):
        assert (tally.tokens, tally.bytes, tally.times.tolist()) == (whole.tokens, whole.bytes, whole.times.tolist())
        assert tally.nats == pytest.approx(whole.nats, rel=1e-9) and tally.learned == whole.learned


# ---------------------------------------------------------------------------------------------------------------
# Keeping to the time
# ---------------------------------------------------------------------------------------------------------------

HURRY = dict(MAX_WALLCLOCK_SECONDS=600, EVAL_MAX_SECONDS=100)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only element is the time that the script sees."""
    now = [0.0]
    monkeypatch.setattr(tg.time, "monotonic", lambda: now[0])
    return now


def governor_of(config: tg.Config, rounds: int = 10, run: tg.Run = RUN) -> tg.Governor:
    """A governor of so many rounds of equal work."""
    return tg.Governor(evaluation_of(None, validation_of_lengths([8]), config, run), [64] * rounds)


def test_chunks_grow_by_what_the_clock_forecasts(clock: list[float]) -> None:
    """The least power of two with which elapsed * (1 + left / factor / done) is within EVAL_MAX_SECONDS, up to 64."""
    governor = governor_of(toy_config(**HURRY))
    governor.reach(0)
    assert governor.forecast(90) == 1  # nothing is done yet: too early to tell
    governor.reach(4)
    for elapsed, factor in (
        (39, 1),
        (40, 1),
        (41, 2),
        (57, 2),
        (58, 4),
        (72, 4),
        (73, 8),
        (99, 64),
        (100, 64),
        (500, 64),
    ):
        assert governor.forecast(elapsed) == factor, elapsed
        assert factor in (1, 64) or elapsed * (1 + 1.5 / factor) <= 100 < elapsed * (1 + 3 / factor)


TIMES = [0.0, 8, 16, 70, 72, 74, 76, 78, 79, 82]  # at which rounds begin: the third one is slow


def decide(governor: tg.Governor, clock: list[float], times: list[float]) -> list[int]:
    """The factor of each round, when they begin at these times."""
    factors = []
    for number, clock[0] in enumerate(times):
        governor.reach(number)
        factors.append(governor.factor)
    return factors


def test_a_governor_decides_once_a_round_and_says_where_it_changed_its_mind(clock: list[float]) -> None:
    """The factor stays within a round however late it is; decisions name rounds and factors, and repeat them."""
    governor = governor_of(toy_config(**HURRY))
    factors = decide(governor, clock, TIMES)
    assert factors[0] == 1 and len(set(factors)) > 2 and factors[-1] == 1
    changes = [f"{i}:{b}" for i, (a, b) in enumerate(zip([1, *factors], factors)) if a != b]
    assert governor.decisions == changes
    clock[0] = 1e6
    governor.reach(9)
    assert governor.factor == factors[-1] and governor.decisions == changes
    for budget in (HURRY, dict(MAX_WALLCLOCK_SECONDS=0)):  # by another clock, and without one
        again = governor_of(toy_config(**budget, EVAL_CHUNK_FACTORS=",".join(changes)))
        assert decide(again, clock, [500.0] * 10) == factors and again.decisions == changes
    never = governor_of(toy_config(**HURRY, EVAL_CHUNK_FACTORS="0:1"))
    assert decide(never, clock, [500.0] * 10) == [1] * 10 and never.decisions == []


def test_all_ranks_decide_by_the_clock_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a clock of its own, and the others' are far ahead: all factors are those of rank 0 alone."""
    mine = threading.local()
    monkeypatch.setattr(tg.time, "monotonic", lambda: mine.now)

    def job(run: tg.Run) -> tuple[list[int], list[str]]:
        mine.now = 1000.0 * run.rank
        governor, factors = governor_of(toy_config(**HURRY), run=run), []
        for number, now in enumerate(TIMES):
            mine.now = 1000.0 * run.rank + now * (1 + run.rank)
            governor.reach(number)
            factors.append(governor.factor)
        return factors, governor.decisions

    (alone,) = on_peers(1, job)
    assert on_peers(3, job) == [alone] * 3 and len(alone[1]) > 2


def test_without_a_clock_nothing_depends_on_time(clock: list[float]) -> None:
    """Where training has no clock, or EVAL_MAX_SECONDS is 0, chunks keep their size however long it takes."""
    for changes in (dict(MAX_WALLCLOCK_SECONDS=0), dict(EVAL_MAX_SECONDS=0)):
        governor = governor_of(toy_config(**HURRY | changes))
        assert decide(governor, clock, [1e6 * number for number in range(10)]) == [1] * 10
        assert governor.decisions == []


@pytest.mark.parametrize("text", ["x", "3", "3:", ":2", "3:0", "-1:2", "3:1.5", "1:2,1:4", "1:2:4", "0:1;2:2"])
def test_factors_that_make_no_sense_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(tg.UserError) as caught:
        toy_config(EVAL_CHUNK_FACTORS=text)
    message = str(caught.value)
    assert message.startswith(f"EVAL_CHUNK_FACTORS={text}: ") and "\n" not in message
    assert toy_config(EVAL_CHUNK_FACTORS=" 12:2, 40:4,").chunk_factors == {12: 2, 40: 4}
    assert toy_config().chunk_factors == {}


@pytest.mark.parametrize("config", [toy_config(), mixed_config()], ids=["one chunk", "chunks by length"])
def test_work_is_the_number_of_tokens_that_go_through_the_model(config: tg.Config) -> None:
    """batch_work() equals what adapt_batch() passes forward, for several batches."""
    validation, limits = validation_of_lengths(LENGTHS), [4, 12, 30] if config.ttt_chunk_steps else []
    for batch in tg.document_queue(validation.documents, 3, limits):
        passed = []

        def forward(tokens: Tensor, wanted: Tensor, *_: Any) -> Tensor:
            passed.append(tokens.numel())
            return torch.zeros(wanted.shape, requires_grad=torch.is_grad_enabled())

        chunk = mixed_chunk(batch[0, 1]) if limits else 8
        tg.adapt_batch(evaluation_of(forward, validation, config), NoAdapters(), batch, chunk)
        assert tg.batch_work(batch, config) == sum(passed)


def test_an_evaluation_in_a_hurry_scores_every_target_once_and_can_be_repeated(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer chunks, at most as long as the context, change how often adapters learn, and not what is scored. The
    decisions that were logged give the same scores to the last bit without a clock; 0:1 those of a run in no hurry."""
    monkeypatch.setattr(tg, "TTT_TRACKS", 2)
    monkeypatch.setattr(tg, "ROUND_BATCHES", 2)
    validation, sizes, real, said = validation_of_lengths(LENGTHS[:9]), [], tg.adapt_batch, []

    def slow(evaluation: tg.Evaluation, adapters: tg.Adapters, batch: np.ndarray, chunk: int, hints: Any) -> None:
        sizes.append(chunk)
        real(evaluation, adapters, batch, chunk, hints)
        clock[0] += 30

    def scored(**changes: Any) -> np.ndarray:
        config = toy_config(**HURRY | changes, TTT_BATCH_SIZE=1, PHASED_TTT_PREFIX_DOCS=0)
        sizes.clear()
        tallies = []

        def scorer(v: tg.Validation) -> None:
            evaluation = evaluation_of(random_model(config), v, config)
            evaluation.log = lambda event, **values: said.append(values) if "EVAL_CHUNK_FACTORS" in values else None
            evaluation.log.bar = lambda items, label: items
            tallies.append(tg.adapt_documents(evaluation))

        nll = nll_per_target(validation, scorer)
        assert tallies[0].tokens == sum(LENGTHS[:9]) and tallies[0].learned_early == 0
        return nll

    monkeypatch.setattr(tg, "adapt_batch", slow)
    hurried, in_time = scored(), sizes.copy()
    assert sizes[:2] == [8, 8] and sizes[-1] == 32 and set(sizes) <= {8, 16, 32}
    assert [list(values) for values in said] == [["reason", "EVAL_CHUNK_FACTORS"]]
    again = scored(EVAL_CHUNK_FACTORS=said[0]["EVAL_CHUNK_FACTORS"], MAX_WALLCLOCK_SECONDS=0)
    assert sizes == in_time and np.array_equal(again[1:], hurried[1:])
    said.clear()
    calm = scored(EVAL_CHUNK_FACTORS="0:1")
    assert set(sizes) == {8} and said == [{"chunk_factor": 1, "EVAL_CHUNK_FACTORS": "0:1"}]
    assert np.array_equal(calm[1:], scored(MAX_WALLCLOCK_SECONDS=0)[1:]) and not np.array_equal(calm[1:], hurried[1:])


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    batch=st.integers(1, 4),
    tracks=st.integers(1, 4),
    size=st.integers(1, 9),
    prefix=st.integers(0, 60),
)
def test_rounds_are_dealt_to_the_track_with_the_least_work(
    lengths: list[int], batch: int, tracks: int, size: int, prefix: int
) -> None:
    """Against a slow reference: a round ends after so many batches and at each pause; no track has more than the mean
    of its round and one batch; without room for two batches on a track every batch has its own."""
    config = toy_config(TTT_BATCH_SIZE=batch, PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=2)
    queue = tg.document_queue(np.array([[0, length] for length in lengths]), batch)
    with mock.patch.object(tg, "TTT_TRACKS", tracks), mock.patch.object(tg, "ROUND_BATCHES", size):
        rounds = tg.deal_rounds(queue, config)
    ends = [pause for pause in tg.phase_pauses(queue, config) if pause < len(queue)] + [len(queue)]
    assert rounds.phases == list(zip([0, *ends], ends))
    expected, number = [], -1
    for begin, end in rounds.phases:
        for place in range(begin, end):
            number += (place - begin) % size == 0
            expected.append(number)
    assert rounds.number == expected and len(rounds.work) == number + 1
    for one in range(number + 1):
        mine = [place for place in range(len(queue)) if rounds.number[place] == one]
        loads = dict.fromkeys(range(tracks), 0)
        for place in mine:
            assert loads[rounds.track[place]] == min(loads.values())
            loads[rounds.track[place]] += tg.batch_work(queue[place], config)
        assert rounds.work[one] == sum(loads.values())
        if len(mine) <= tracks:
            assert [rounds.track[place] for place in mine] == list(range(len(mine)))


@pytest.mark.parametrize("prefix", [0, 5], ids=["one phase", "a pause inside a round"])
@pytest.mark.parametrize("size", [4, 6])
def test_all_ranks_finish_a_round_before_the_next_begins(
    size: int, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank is slow, another has no batch in some rounds; nobody begins a round while anybody is in one before."""
    monkeypatch.setattr(tg, "TTT_TRACKS", 4)
    monkeypatch.setattr(tg, "ROUND_BATCHES", size)
    config = toy_config(TTT_BATCH_SIZE=1, PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=1)
    validation, events = validation_of_lengths(LENGTHS[:13]), []
    queue = tg.document_queue(validation.documents, 1)
    rounds = tg.deal_rounds(queue, config)
    number_of = {int(batch[0, 0]): number for number, batch in enumerate(queue)}

    def score(e: tg.Evaluation, adapters: tg.Adapters, batch: np.ndarray, *_: Any) -> None:
        (start, count), number = batch[0].tolist(), number_of[int(batch[0, 0])]
        assert rounds.track[number] % 3 == e.run.rank
        events.append(("begin", rounds.number[number]))
        time.sleep(0.03 if e.run.rank == 1 else 0)
        e.tally.add(torch.zeros(count), torch.arange(start + 1, start + count + 1))
        events.append(("end", rounds.number[number]))

    monkeypatch.setattr(tg, "adapt_batch", score)
    on_peers(3, lambda run: tg.adapt_documents(evaluation_of(random_model(config), validation, config, run)))
    assert len(events) == 26
    running = [0] * len(rounds.work)
    for kind, number in events:
        assert not any(running[:number]) and not any(running[number + 1 :])
        running[number] += 1 if kind == "begin" else -1
    assert [number for kind, number in events if kind == "begin"] == rounds.number


# ---------------------------------------------------------------------------------------------------------------
# Queue, pauses, global update
# ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 7))
def test_queue_is_longest_first_in_groups_of_similar_length(lengths: list[int], batch: int) -> None:
    """The queue equals: sort ascending (stable), cut into groups from the short end, reverse everything."""
    documents = np.array([[10 * i, length] for i, length in enumerate(lengths)])
    queue = tg.document_queue(documents, batch)
    rows = sorted(documents.tolist(), key=lambda row: row[1])
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    slow = [group[::-1] for group in groups[::-1]]
    assert [part.tolist() for part in queue] == slow
    assert sorted(row for part in queue for row in part.tolist()) == sorted(documents.tolist())
    flat = [row[1] for part in queue for row in part.tolist()]
    assert flat == sorted(flat, reverse=True)
    assert all(len(part) == batch for part in queue[1:])  # only the group of the longest may be short


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40),
    st.integers(1, 7),
    st.sets(st.integers(1, 11), max_size=4).map(sorted),
)
def test_limits_cut_the_queue(lengths: list[int], batch: int, limits: list[int]) -> None:
    """The queue with limits is the queues of the documents between them, the longest documents first."""
    documents = np.array([[10 * i, length] for i, length in enumerate(lengths)])
    slow = []
    for low, high in reversed(list(zip([0, *limits], [*limits, 10**9]))):
        alike = documents[(low < documents[:, 1]) & (documents[:, 1] <= high)]
        slow += [part.tolist() for part in tg.document_queue(alike, batch)]
    queue = tg.document_queue(documents, batch, limits)
    assert [part.tolist() for part in queue] == slow and all(len(part) for part in queue)
    assert sorted(row for part in queue for row in part.tolist()) == sorted(documents.tolist())


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 80), st.integers(1, 6))
def test_pauses_follow_the_first_batch_that_completes_each_share(
    count: int, batch: int, prefix: int, phases: int
) -> None:
    """A pause comes after the first batch by which limit * (i + 1) // phases documents are scored."""
    documents = np.array([[i, 1 + i % 5] for i in range(count)])
    queue = tg.document_queue(documents, batch)
    config = toy_config(PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=phases)
    limit, expected = min(prefix, count), []
    for i in range(phases):
        share, scored = limit * (i + 1) // phases, 0
        for position, part in enumerate(queue):
            scored += len(part)
            if share and scored >= share:
                expected.append(position + 1)
                break
    assert tg.phase_pauses(queue, config) == sorted(set(expected))


def test_published_shares_of_the_prefix() -> None:
    """2,000 documents in three phases: pauses after 666, 1,333 and 2,000 scored documents, rounded up to batches."""
    queue = tg.document_queue(np.array([[i, 1 + i % 97] for i in range(50_000)]), 64)
    pauses = tg.phase_pauses(queue, tg.load_config({})[0])
    scored = [sum(len(part) for part in queue[:pause]) for pause in pauses]
    assert scored == [16 + 64 * 11, 16 + 64 * 21, 16 + 64 * 31]


def test_global_update_equals_sgd_by_hand() -> None:
    """One pass of clipped momentum SGD, half-cosine rate, over the scored documents' windows, weighted by tokens."""
    config, validation = toy_config(GLOBAL_TTT_LR=0.1), validation_of_lengths([70, 33, 50, 20, 9, 64])
    documents = validation.documents[[0, 2, 3, 5]]
    model, slow = random_model(config), random_model(config)
    steps = tg.global_update(all_scored(model, validation, config), documents)
    windows = []
    for start, count in documents.tolist():
        windows += [(start + i, start + min(i + 32, count)) for i in range(0, count, 32)]
    chunks, room = [], 0
    for begin, end in windows:  # consecutive windows, at most 128 targets a step
        if end - begin > room:
            chunks.append([])
            room = 128
        chunks[-1].append((begin, end))
        room -= end - begin
    assert steps == len(chunks) >= 2
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    plan, clipped = tg.layer_plan(config, True), 0
    for number, chunk in enumerate(chunks):
        losses = [
            slow(validation.tokens[b:e][None], validation.tokens[b + 1 : e + 1][None], plan).sum() for b, e in chunk
        ]
        loss = sum(losses) / sum(e - b for b, e in chunk)
        gradients = torch.autograd.grad(loss, list(slow.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        clipped += norm > 1
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
        with torch.no_grad():
            for parameter, gradient, kept in zip(slow.parameters(), gradients, velocity):
                kept.mul_(0.9).add_(gradient / max(norm, 1.0))
                parameter.sub_(rate * kept)
    assert clipped
    for (name, fast), parameter in zip(model.named_parameters(), slow.parameters()):
        torch.testing.assert_close(fast, parameter, atol=2e-5, rtol=1e-4, msg=lambda text: f"{name}: {text}")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_global_update_uses_only_the_documents_it_is_given() -> None:
    """Replacing every token of the other documents leaves the updated weights exactly as they were."""
    config, validation = toy_config(), validation_of_lengths([20, 33, 18])
    start, count = validation.documents[1].tolist()
    changed = with_tokens(validation, {q: another(validation.tokens[q]) for q in range(start + 1, start + count)})
    models = [random_model(config) for _ in range(2)]
    for model, v in zip(models, (validation, changed)):
        tg.global_update(all_scored(model, v, config), validation.documents[[0, 2]])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_global_update_refuses_a_document_that_is_not_scored() -> None:
    """One missing target among those to learn from stops the pass before any weight moves."""
    config, validation = toy_config(), validation_of_lengths([20, 33, 18])
    evaluation = all_scored(model := random_model(config), validation, config)
    before = model.qo_bank.detach().clone()
    evaluation.tally.times[30] = 0
    with pytest.raises(RuntimeError, match="target 30"):
        tg.global_update(evaluation, validation.documents)
    assert torch.equal(before, model.qo_bank)


def test_adapting_changes_the_weights_only_through_global_updates() -> None:
    """Without phases the model comes out as it went in, ready to train; with phases it does not."""
    validation = validation_of_lengths(LENGTHS)
    for prefix, same in ((0, True), (12, False)):
        config = toy_config(**FEW_VISITS, PHASED_TTT_PREFIX_DOCS=prefix)
        model = random_model(config)
        before = {name: array.copy() for name, array in model.arrays().items()}
        tg.adapt_documents(evaluation_of(model, validation, config))
        after = model.arrays()
        assert all(np.array_equal(before[name], after[name]) for name in before) == same
        assert all(parameter.requires_grad for parameter in model.parameters())
