"""tests/probe_validity.py at toy size: the script passes every probe, and broken evaluators fail them.

A check that cannot fail is worthless: each broken evaluator below replaces one function of train_gpt, and the probe
that is meant for it must notice.
"""

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import probe_validity as probe
import pytest
import torch
from conftest import ROOT, ToyData, random_model, replace_plain, toy_config

import train_gpt as tg

LENGTHS = [30, 2, 21, 13, 1, 18]
PLACES = (5, 27, 31, 60)  # in the first and last chunk of a long document; behind two global phases; behind one


def subject(vocab_size: int = 256, **changes: Any) -> probe.Subject:
    """A model none of whose gates is neutral; several chunks per document, several batches, two global phases."""
    settings = dict(VOCAB_SIZE=vocab_size, TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=4, GLOBAL_TTT_CHUNK_TOKENS=32)
    config = toy_config(**settings | changes)
    return probe.Subject(lambda: random_model(config), config)


def stream() -> np.ndarray:
    return probe.unique_stream(LENGTHS, 256)


def repetitive() -> np.ndarray:
    """Two documents over a few ids, in which many pairs of tokens come back."""
    tokens = np.random.default_rng(0).integers(4, 7, 40)
    tokens[[0, 15]] = tg.BOS_ID
    return tokens


@pytest.mark.parametrize("kind", probe.KINDS)
def test_nothing_scored_depends_on_what_is_scored_later(kind: str) -> None:
    """Causality by mutation."""
    outcome = probe.causality(kind, subject(), stream(), PLACES)
    assert outcome.ok, outcome


@pytest.mark.parametrize("kind", probe.KINDS)
def test_every_target_is_scored_exactly_once(kind: str) -> None:
    """Single pass."""
    outcome = probe.single_pass(kind, subject(), stream())
    assert outcome.ok, outcome


@pytest.mark.parametrize("kind", probe.KINDS)
def test_documents_do_not_see_each_other(kind: str) -> None:
    """Isolation of packed documents."""
    outcome = probe.isolation(kind, subject(), stream())
    assert outcome.ok, outcome


@pytest.mark.parametrize("kind", probe.KINDS)
def test_the_probabilities_of_all_ids_sum_to_one_on_the_real_path(kind: str) -> None:
    """Normalisation, every id of a small vocabulary as the target."""
    outcome = probe.normalisation(kind, subject(16), repetitive(), (9, 38))
    assert outcome.ok, outcome


def test_every_update_uses_only_scored_targets() -> None:
    """Score before update, with global phases."""
    outcome = probe.score_before_update(subject(), stream())
    assert outcome.ok, outcome


CHUNKS = dict(TTT_KIND="chunk_sgd", TTT_CHUNK_TOKENS=24, TTT_EPOCHS=2, TTT_LR=0.05, TTT_BATCH_SEQS=1)
TILT = dict(NGRAM_TILT_ENABLED=1, TOKEN_ORDER=4, TOKEN_THRESHOLD=0.5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(PHASED_TTT_PREFIX_DOCS=0),
        dict(PHASED_TTT_NUM_PHASES=1, TTT_BATCH_SIZE=1),
        dict(TTT_CHUNK_SIZE=5, TTT_EVAL_SEQ_LEN=16),
        dict(SMEAR_GATE_ENABLED=0, NUM_LOOPS=0, PARALLEL_START_LAYER=0),
        CHUNKS,
        CHUNKS | dict(CHUNK_TTT_OPTIMIZER="adamw", TTT_LR=0.002),
        CHUNKS | dict(VARLEN_ATTN=0),
        TILT,
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()),
)
def test_every_mode_of_test_time_training_passes(changes: dict) -> None:
    """The probes of the adaptive evaluation at other settings, its other kind, and with hints."""
    mode = subject(**changes)
    tokens, places = stream(), (60,)
    if changes is TILT:
        tokens, places = hinted_stream()
    outcomes = [
        probe.causality("ttt", mode, tokens, places),
        probe.single_pass("ttt", mode, tokens),
        probe.isolation("ttt", mode, tokens) if mode.config.varlen_attn else probe.Outcome("isolation", True, ""),
        probe.score_before_update(mode, tokens),
    ]
    assert all(outcome.ok for outcome in outcomes), outcomes


def hinted_stream() -> tuple[np.ndarray, tuple[int, ...]]:
    """A stream in which a phrase comes back, a place with a hint that is right, and one without."""
    tokens = probe.repeating_stream(LENGTHS, 256, 4)
    hints = dict(zip(*(part.tolist() for part in tg.token_hints(tokens, 4, 0.5))))
    right = [position for position, hint in hints.items() if tokens[position] == hint]
    assert len(right) >= 8 and 60 not in hints
    return tokens, (right[-1], 60)


@pytest.mark.parametrize("changes", [CHUNKS, TILT], ids=["chunk_sgd", "tilt"])
def test_the_probabilities_of_all_ids_sum_to_one_in_the_other_modes(changes: dict) -> None:
    """Normalisation on the real path of learning in chunks, and of tilted scores at places with and without a hint."""
    tokens, places = repetitive(), (9, 38)
    if changes is TILT:
        hinted = tg.token_hints(tokens, 4, 0.5)[0].tolist()
        places = (next(t for t in range(10, 40) if t not in hinted), hinted[-1])
    outcome = probe.normalisation("ttt", subject(16, **changes), tokens, places)
    assert outcome.ok, outcome


# Hints from the own document, and boosts that are learnt. Each batch has a track of its own until there are as many of
# them as tracks; with one track the boosts that a batch has taught are those of the next. A random model finds all
# hints unlikely, so that a few true ones would take the boosts to their bound, where nothing shows: they learn slower.
DOCUMENTS = TILT | dict(TOKEN_DOCUMENT_ORDERS="4,2")
SHARED_LENGTHS = [20, 30, 21, 25, 1, 2]  # queue: documents 1 and 3, 2 and 0, 5 and 4


@pytest.fixture
def shared_boosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tg, "TTT_TRACKS", 1)
    monkeypatch.setattr(tg.Boosts, "PRIOR", 100.0)


def document_stream(config: tg.Config) -> tuple[np.ndarray, int]:
    """A stream with hints of both kinds, and a place with a right one from the own document: in document 3, of the
    first batch; document 2, before it in the stream and behind it in the queue, has such hints too."""
    tokens = probe.repeating_stream(SHARED_LENGTHS, 256, 4, inside=True)
    hints = tg.stream_hints(probe.as_validation(tokens), config, tg.Run(), tg.Log(None)).numpy()
    assert tg.hint_sources(config)[2] == (False, 4)
    right = np.flatnonzero((hints[:, 0] == tokens) & (hints[:, 1] != 2))
    first, behind = (right[(right > begin + 8) & (right < begin + 20)] for begin in (71, 50))
    assert len(first) >= 4 and len(behind) >= 4
    return tokens, int(first[2])


def test_document_hints_and_learnt_boosts_pass(shared_boosts: None) -> None:
    """At a place behind which the boosts of another document, scored later and standing earlier, are learnt."""
    mode = subject(**DOCUMENTS)
    tokens, place = document_stream(mode.config)
    outcomes = [
        probe.causality("ttt", mode, tokens, (place,)),
        probe.single_pass("ttt", mode, tokens),
        probe.score_before_update(mode, tokens),
    ]
    assert all(outcome.ok for outcome in outcomes), outcomes


def scores_without_learning(mode: probe.Subject, tokens: np.ndarray) -> dict[int, list[float]]:
    """No adapter and no global phase: boosts are all that one document can leave to the next."""
    config = dataclasses.replace(mode.config, ttt_lora_lr=0.0, phased_ttt_prefix_docs=0)
    return probe.trace("ttt", mode._replace(config=config), probe.as_validation(tokens)).scores


def test_boosts_flow_to_what_is_scored_later_only(shared_boosts: None) -> None:
    """A batch whose hints come true no more leaves other scores in the next one, and none of its own earlier ones."""
    mode = subject(**DOCUMENTS)
    tokens, place = document_stream(mode.config)
    changed = probe.replaced(tokens, np.arange(place, 96), 256)  # the rest of document 3, in the first batch
    before, after = (scores_without_learning(mode, ids) for ids in (tokens, changed))
    moved = [p for p in before if before[p] != after[p]]
    assert any(51 <= p <= 71 for p in moved)  # of document 2, in the second batch
    assert not any(71 < p < place for p in moved) and not any(20 < p <= 36 for p in moved)  # document 1


def test_tilts_by_learnt_boosts_sum_to_one_on_the_real_path(
    shared_boosts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalisation at a place with a hint from the own document, when boosts have been learnt from earlier chunks."""
    seen, real, mode = [], tg.tilt, subject(8, **DOCUMENTS)
    monkeypatch.setattr(tg, "tilt", lambda nll, ids, boost: seen.append(boost) or real(nll, ids, boost))
    outcome = probe.normalisation("ttt", mode, repetitive(), (documents_hint(mode),))
    assert outcome.ok, outcome
    learnt = [boost[boost != mode.config.token_boost] for boost in seen[:3]]
    assert not learnt[0].any() and learnt[2].abs().max() > 0.05


def documents_hint(mode: probe.Subject) -> int:
    """The last place of repetitive() with a hint from its document."""
    hints = tg.stream_hints(probe.as_validation(repetitive()), mode.config, tg.Run(), tg.Log(None))
    place = int(((hints[:, 1] == 0) | (hints[:, 1] == 1)).nonzero()[-1])
    assert place > 15 + 16  # in the third chunk
    return place


@pytest.mark.parametrize("fault", ["own target", "own chunk"])
def test_boosts_that_have_seen_their_target_fail(
    fault: str, shared_boosts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boost that is larger where its hint comes true, and one that has been learnt from the chunk it is used in."""
    forward, boost, hits = tg.GPT.forward, tg.Boosts.boost, []

    def watched(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        if targets.dim() == 3 and targets.size(-1) == 2:
            hits[:] = [targets[..., 0] == targets[..., 1]]
        return forward(model, inputs, targets, *rest, **named)

    def leaky(boosts: tg.Boosts, nll: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        if nll.dim() == 1:  # inside an update
            return boost(boosts, nll, sources)
        if fault == "own target":
            return boost(boosts, nll, sources) + 0.5 * hits[0]
        known = boosts.learnt(sources)
        boosts.update(nll[known], sources[known], hits[0][known])
        return boost(boosts, nll, sources)

    monkeypatch.setattr(tg.GPT, "forward", watched)
    monkeypatch.setattr(tg.Boosts, "boost", leaky)
    mode = subject(**DOCUMENTS)
    tokens, place = document_stream(mode.config)
    outcome = probe.causality("ttt", mode, tokens, (place,))
    assert not outcome.ok and f"the distribution at token {place} moved" in outcome.found
    few = subject(8, **DOCUMENTS)
    assert fault == "own chunk" or not probe.normalisation("ttt", few, repetitive(), (documents_hint(few),)).ok


def test_windows_of_a_plain_stream_pass() -> None:
    """VARLEN_ATTN=0: windows that see the document before are still causal and complete, but not isolated."""
    mode = subject(VARLEN_ATTN=0)
    for kind in ("plain", "sliding"):
        assert probe.causality(kind, mode, stream(), PLACES).ok and probe.single_pass(kind, mode, stream()).ok
        assert not probe.isolation(kind, mode, stream()).ok


# ------------------------------------------------------------------------------------------------------------
# BROKEN EVALUATORS
# ------------------------------------------------------------------------------------------------------------


def leaky_embed(model: tg.GPT, inputs: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A SmearGate without the mask at the start of segments and documents."""
    e = torch.nn.functional.embedding(inputs, table)
    window = e[..., : model.config.gate_window]
    gate = torch.sigmoid(window @ model.smear_gate_w.T) * model.smear_lambda
    return tg.rms(e + gate * torch.nn.functional.pad(e, (0, 0, 1, 0))[:, :-1])


def test_a_leaky_smear_gate_fails_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In packed rows; causality does not see it, because it only looks back."""
    monkeypatch.setattr(tg.GPT, "embed", leaky_embed)
    for kind in ("plain", "sliding"):
        assert not probe.isolation(kind, subject(), stream()).ok
        assert probe.causality(kind, subject(), stream(), PLACES).ok


class Silent(tg.Tally):
    """Counts nothing, and objects to nothing."""

    def __init__(self, validation: tg.Validation):
        super().__init__(validation)
        self.times += 1

    def add(self, nll: torch.Tensor, positions: Any) -> None:
        pass


def train_then_score(evaluation: tg.Evaluation, *rest: Any) -> None:
    """Learns from a whole batch of documents, and scores it afterwards."""
    silent = copy.copy(evaluation)
    silent.tally = Silent(evaluation.validation)
    for e in (silent, evaluation):
        REAL["adapt_batch"](e, *rest)


REAL = {name: getattr(tg, name) for name in ("adapt_batch", "plan_windows", "plain_nll", "token_hints")}


def test_training_before_scoring_fails_causality_and_the_order_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from outside, whatever a ledger inside says."""
    monkeypatch.setattr(tg, "adapt_batch", train_then_score)
    assert not probe.score_before_update(subject(), stream()).ok
    assert not probe.causality("ttt", subject(), stream(), PLACES).ok


def test_the_illegal_order_fails_causality_and_the_order_of_updates() -> None:
    """TTT_KIND=pre_eval_illegal, which exists to reproduce published figures and is called invalid by the run itself."""
    illegal = subject(**CHUNKS | dict(TTT_KIND="pre_eval_illegal"))
    outcome = probe.score_before_update(illegal, stream())
    assert not outcome.ok and "learned from before its score" in outcome.found
    assert not probe.causality("ttt", illegal, stream(), PLACES).ok


def test_a_chunk_that_is_learned_from_first_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked learning whose first span reaches one window too far."""
    real = tg.learn_chunk
    monkeypatch.setattr(tg.Tally, "learn_from", lambda *_: None)

    def greedy(evaluation: tg.Evaluation, optimizer: Any, span: tuple[int, int], *rest: Any) -> None:
        real(evaluation, optimizer, (span[0], span[1] + 16), *rest)

    monkeypatch.setattr(tg, "learn_chunk", greedy)
    assert not probe.score_before_update(subject(**CHUNKS), stream()).ok
    assert not probe.causality("ttt", subject(**CHUNKS), stream(), (27, 60)).ok


def test_hints_that_have_seen_their_target_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is read one token too late leaks the answer: the hint then depends on the target."""
    real = tg.stream_hints
    mode = subject(**TILT)
    tokens, places = hinted_stream()

    def leaky(validation: tg.Validation, *rest: Any) -> torch.Tensor:
        hints = real(validation, *rest)
        return torch.where(hints >= 0, validation.tokens.int()[:, None] * torch.tensor([1, 0]).int(), hints)

    monkeypatch.setattr(tg, "stream_hints", leaky)
    assert not probe.hints_before(mode, tokens, places).ok
    few = repetitive()
    place = int(tg.token_hints(few, 4, 0.5)[0][-1])
    assert not probe.normalisation("ttt", subject(16, **TILT), few, (place,)).ok


def test_hints_from_the_rest_of_the_stream_fail_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are filled with the whole stream first, and read then."""
    mode = subject(**TILT)
    tokens, places = hinted_stream()

    def from_all(tokens: np.ndarray, order: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        doubled, n = np.concatenate([tokens, tokens]), len(tokens)
        positions, hints = REAL["token_hints"](doubled, order, threshold)
        return positions[positions >= n] - n, hints[positions >= n]

    monkeypatch.setattr(tg, "token_hints", from_all)
    assert not probe.hints_before(mode, tokens, (places[0],)).ok


@pytest.mark.parametrize("fault", ["no sum", "hits only"])
def test_a_tilt_that_is_no_distribution_fails_normalisation(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A boost without the sum over all ids, and one that is only paid for when the hint was right."""
    real = tg.tilt

    def wrong(nll: torch.Tensor, ids: torch.Tensor, boost: float) -> torch.Tensor:
        hit = ids[..., 0] == ids[..., 1]
        return torch.where(hit, nll[..., 0] - boost if fault == "no sum" else real(nll, ids, boost), nll[..., 0])

    monkeypatch.setattr(tg, "tilt", wrong)
    few = repetitive()
    place = int(tg.token_hints(few, 4, 0.5)[0][-1])
    assert not probe.normalisation("ttt", subject(16, **TILT), few, (place,)).ok


def test_a_global_phase_on_unscored_documents_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase takes all documents instead of the scored ones."""
    real = tg.global_update
    monkeypatch.setattr(tg.Tally, "learn_from", lambda *_: None)
    monkeypatch.setattr(tg, "global_update", lambda e, documents: real(e, e.validation.documents))
    assert not probe.score_before_update(subject(), stream()).ok
    assert not probe.causality("ttt", subject(), stream(), (60,)).ok


def double_tail(
    num_targets: int, context: int, stride: int, first: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """The windows, and once more the last targets of each document."""
    yield from REAL["plan_windows"](num_targets, context, stride, first)
    yield max(0, num_targets - context), max(0, num_targets - 3), num_targets


def test_a_tail_that_is_counted_twice_fails_single_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known defect of early sliding evaluations."""
    monkeypatch.setattr(tg, "plan_windows", double_tail)
    for kind in ("plain", "sliding"):
        assert not probe.single_pass(kind, subject(), stream()).ok


def test_a_dropped_tail_fails_single_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole windows only."""
    real = REAL["plan_windows"]
    monkeypatch.setattr(tg, "plan_windows", lambda n, *rest, **first: real(n - 1, *rest, **first))
    for kind in ("plain", "sliding"):
        assert not probe.single_pass(kind, subject(), stream()).ok


def test_a_cache_for_the_target_inside_the_forward_pass_fails_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A favoured id gets more, and the others' probabilities are not lowered by as much."""
    real = REAL["plain_nll"]

    def mixed(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
        return -torch.log((-real(logits, targets, softcap)).exp() + 0.1 * (targets == 5))

    replace_plain(monkeypatch, nll=mixed)
    for kind in probe.KINDS:
        assert not probe.normalisation(kind, subject(16), repetitive(), (9, 38)).ok


def scored_through(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
) -> None:
    """Changes the nats between the forward pass and the tally, in the plain evaluation."""

    def score(e: tg.Evaluation, stride: int) -> tg.Tally:
        for window in tg.windows_inside(e.validation.documents, e.config.eval_seq_len, stride):
            row, positions = e.row([window], 0)
            with torch.no_grad():
                nll = e.program.score(row.inputs, row.targets, e.plan, row.segments)[0]
            keep = torch.from_numpy(np.arange(window.begin, window.end) >= window.first_scored)
            e.tally.add(change(nll[keep], row.targets[0][keep], e.tally), positions[keep.numpy()])
        return e.tally

    monkeypatch.setattr(tg.Evaluation, "score", score)


def test_a_cache_for_the_target_behind_the_forward_pass_fails_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of scored ids, mixed into the target's probability only. The same evaluator without the cache passes."""
    scored_through(monkeypatch, lambda nll, ids, tally: nll)
    assert probe.normalisation("plain", subject(16), repetitive(), (9, 38)).ok

    def cached(nll: torch.Tensor, ids: torch.Tensor, tally: tg.Tally) -> torch.Tensor:
        seen = tally.validation.tokens[torch.from_numpy(tally.times > 0)]
        share = (seen[None] == ids[:, None]).float().mean(1) if len(seen) else torch.zeros(len(ids))
        return -torch.log(0.8 * (-nll).exp() + 0.2 * torch.where(share > 0, 0.5, 0.0))

    scored_through(monkeypatch, cached)
    outcome = probe.normalisation("plain", subject(16), repetitive(), (9, 38))
    assert not outcome.ok


def test_a_gate_that_reads_the_target_fails_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits scaled by the class of the token that is scored."""
    real = REAL["plain_nll"]

    def gated(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
        if targets.dim() == 3:  # the classes of the last real targets
            return real(logits * gated.scale, targets, softcap)  # type: ignore[attr-defined]
        gated.scale = 1 + 0.5 * (targets % 2).unsqueeze(-1)  # type: ignore[attr-defined]
        return real(logits * gated.scale, targets, softcap)  # type: ignore[attr-defined]

    replace_plain(monkeypatch, nll=gated)
    assert not probe.causality("plain", subject(), stream(), tuple(range(4, 12))).ok


def test_a_mask_that_looks_one_token_ahead_fails_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next token's embedding mixed in."""
    real = tg.GPT.embed
    ahead = lambda e: e + 0.1 * torch.nn.functional.pad(e, (0, 0, 0, 1))[:, 1:]
    monkeypatch.setattr(tg.GPT, "embed", lambda *arguments: ahead(real(*arguments)))
    for kind in probe.KINDS:
        assert not probe.causality(kind, subject(), stream(), PLACES).ok


def test_adapters_shared_by_the_documents_of_a_batch_fail_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every document gets the mean of all adapters."""
    real = tg.Adapters.lora

    def shared(adapters: Any, part: slice) -> tg.Lora:
        mean = lambda x: x.mean(1, keepdim=True).expand_as(x)
        factors = real(adapters, part).factors
        return tg.Lora(adapters.scale, {name: (mean(a), mean(b)) for name, (a, b) in factors.items()})

    monkeypatch.setattr(tg.Adapters, "lora", shared)
    assert not probe.isolation("ttt", subject(), stream()).ok


# ------------------------------------------------------------------------------------------------------------
# PLANTED FAULTS: small ones, far into a document or rare, in the probes of the program as they are
# ------------------------------------------------------------------------------------------------------------


@functools.cache
def program(tilted: bool) -> dict[str, Callable[[], probe.Outcome]]:
    """The program's own probes, for a toy model with room for its stream."""
    changes = DOCUMENTS | dict(TOKEN_BOOST=1.0) if tilted else {}
    mode = subject(1024, **changes)
    return probe.planned(mode._replace(config=probe.probe_config(mode.config)))


def tally_add(change: Callable[[tg.Tally, torch.Tensor, np.ndarray], tuple[torch.Tensor, np.ndarray]]) -> Callable:
    """A Tally.add that adds something else: `change` of the nats and their positions."""
    real = tg.Tally.add
    return lambda tally, nll, positions: real(tally, *change(tally, nll, np.asarray(positions)))


def one_in_a_thousand(tally: tg.Tally, nll: torch.Tensor, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    keep = positions % 1000 != 999
    return nll[torch.from_numpy(keep)], positions[keep]


def some_twice(tally: tg.Tally, nll: torch.Tensor, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    again = np.flatnonzero(positions % 1000 == 998)
    return torch.cat([nll, nll[torch.from_numpy(again)]]), np.concatenate([positions, positions[again]])


def free_bos(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    nll = REAL_FORWARD(model, inputs, targets, *rest, **named)
    return nll * (targets != tg.BOS_ID) if targets.dim() == 2 else nll


def learn_long_documents_first(evaluation: Any, adapters: Any, batch: np.ndarray, *rest: Any) -> None:
    """Documents of more than 256 targets are learned from before they are scored."""
    (train_then_score if batch[0, 1] > 256 else REAL["adapt_batch"])(evaluation, adapters, batch, *rest)


def gate_on_the_target(tokens: np.ndarray, order: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Hints whose share counts the token they are for."""
    positions, hints = REAL["token_hints"](tokens, order, threshold)
    followers: dict[tuple, list[int]] = {}
    keep = []
    where = {int(p): i for i, p in enumerate(positions)}
    for p in range(order - 1, len(tokens)):
        seen = followers.setdefault(tuple(tokens[p - order + 1 : p].tolist()), [])
        seen.append(int(tokens[p]))
        if p in where and seen.count(int(hints[where[p]])) / len(seen) >= 0.75:
            keep.append(where[p])
    return positions[keep], hints[keep]


def ahead_behind_two_contexts(model: tg.GPT, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The last tokens of long rows see one token ahead."""
    e = REAL_EMBED(model, inputs, *rest)
    seen = torch.nn.functional.pad(e, (0, 0, 0, 1))[:, 1:]
    late = (torch.arange(e.size(1)) >= 24).view(1, -1, 1)
    return torch.where(late, e + 0.1 * seen, e)


def neighbours(adapters: Any, part: slice) -> tg.Lora:
    """Each document's adapters, and a hundredth of the batch's mean."""
    mix = lambda x: x + 0.01 * x.mean(1, keepdim=True)
    factors = REAL_LORA(adapters, part).factors
    return tg.Lora(adapters.scale, {name: (mix(a), mix(b)) for name, (a, b) in factors.items()})


def no_tail_of_long_documents(n: int, context: int, stride: int, first: int | None = None) -> Iterator[tuple]:
    """The last target of a document of more than two contexts is left out."""
    yield from REAL["plan_windows"](n - (n > 2 * context), context, stride, first)


def favoured(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    """One id in the vocabulary gets a thousandth more than its share."""
    return -torch.log((-REAL["plain_nll"](logits, targets, softcap)).exp() + 0.001 * (targets == tg.BOS_ID))


def global_phase_on_all(evaluation: tg.Evaluation, documents: np.ndarray) -> int:
    return REAL_GLOBAL(evaluation, evaluation.validation.documents)


def taught_by_the_own_chunk(boosts: tg.Boosts, nll: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Boosts that are higher where a hint of the chunk, this one included, was likely."""
    known = boosts.learnt(sources)
    return REAL_BOOST(boosts, nll, sources) + (0.1 * nll[known].mean() if nll.dim() > 1 and known.any() else 0.0)


REAL_FORWARD, REAL_EMBED, REAL_LORA, REAL_GLOBAL, REAL_BOOST = (
    tg.GPT.forward,
    tg.GPT.embed,
    tg.Adapters.lora,
    tg.global_update,
    tg.Boosts.boost,
)
# what is wrong -> where it is put, the fault, which of the program's probes notices
FAULTS: dict[str, tuple[Any, str, Callable, str]] = {
    "adapters kept across batches": (tg.Adapters, "forget", lambda adapters: None, "fresh_start"),
    "a hint gate that counts its target": (tg, "token_hints", gate_on_the_target, "hints"),
    "one target in 1,000 dropped": (tg.Tally, "add", tally_add(one_in_a_thousand), "single_pass, plain"),
    "one target in 1,000 counted twice": (tg.Tally, "add", tally_add(some_twice), "single_pass, sliding"),
    "learning before the score beyond 256 targets": (
        tg, "adapt_batch", learn_long_documents_first, "score_before_update",
    ),
    "a BOS that costs nothing": (tg.GPT, "forward", free_bos, "normalisation, plain"),
    "one id with more than its share": (tg, "PLAIN", tg.PLAIN._replace(nll=favoured), "normalisation, sliding"),
    "a mask that fails late in a window": (tg.GPT, "embed", ahead_behind_two_contexts, "causality, plain"),
    "a hundredth of the neighbours' adapters": (tg.Adapters, "lora", neighbours, "isolation, ttt"),
    "no last target of long documents": (tg, "plan_windows", no_tail_of_long_documents, "single_pass, plain"),
    "a global phase on all documents": (tg, "global_update", global_phase_on_all, "score_before_update"),
    "boosts taught by the own chunk": (tg.Boosts, "boost", taught_by_the_own_chunk, "causality, ttt"),
}  # fmt: skip


SLOW = ("boosts taught by the own chunk",)


@pytest.mark.parametrize("fault", [pytest.param(f, marks=[pytest.mark.slow] if f in SLOW else []) for f in FAULTS])
def test_planted_faults_are_caught_by_the_program(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe fails with the fault; test_the_program_passes shows that it passes without."""
    owner, name, wrong, noticed_by = FAULTS[fault]
    monkeypatch.setattr(tg.Tally, "learn_from", lambda *_: None)  # the script's own ledger notices some of them
    if name == "PLAIN":
        monkeypatch.setattr(tg, "choose_kernels", lambda wanted, device: ("plain", wrong))
    monkeypatch.setattr(owner, name, wrong)
    outcome = program(tilted="hint" in fault or "boost" in fault)[noticed_by]()
    assert outcome.probe == noticed_by and not outcome.ok, outcome


@pytest.mark.slow
@pytest.mark.parametrize("tilted", [False, True])
def test_the_program_passes(tilted: bool) -> None:
    """All of its probes, on documents of up to nine contexts, with hints and without."""
    outcomes = [probe() for probe in program(tilted).values()]
    assert all(outcome.ok for outcome in outcomes), [outcome for outcome in outcomes if not outcome.ok]


# ------------------------------------------------------------------------------------------------------------
# THE ARTIFACT ALONE
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy_run(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run at toy size."""
    root = tmp_path_factory.mktemp("runs")
    config, origins = tg.load_config(toy_data.env(RUN_ID="probe", RUNS_DIR=root, VOCAB_SIZE=64))
    assert tg.main(config, tg.Run(), origins)["valid"]
    return root / "probe"


def test_the_artifact_alone_reproduces_the_score(toy_run: Path) -> None:
    """In a new process without training files and network, to the last bit."""
    outcome = probe.artifact_alone(toy_run)
    assert outcome.ok, outcome


SMUGGLERS = {
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\n",
    "name lookup": "import socket\nsocket.getaddrinfo('localhost', 80)\n",
    "training file": "open('data/fineweb_train_000000.bin', 'ab')\n",
    "state of the training": "open('runs/alone/trained.bin', 'wb')\n",
}


@pytest.mark.parametrize("what", SMUGGLERS)
def test_an_evaluation_that_needs_more_than_the_artifact_fails(toy_run: Path, tmp_path: Path, what: str) -> None:
    """A script that reaches out before it starts; the guard stops it before anything heavy is imported."""
    script = tmp_path / "train_gpt.py"
    script.write_text(SMUGGLERS[what] + (ROOT / "train_gpt.py").read_text())
    outcome = probe.artifact_alone(toy_run, script)
    assert not outcome.ok and "the evaluation" in outcome.found, outcome


@pytest.mark.slow
def test_an_artifact_of_other_weights_fails(toy_run: Path, tmp_path: Path) -> None:
    """The score belongs to weights that were kept in memory only."""
    result = json.loads((toy_run / "result.json").read_text())
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("log.txt", "artifact.bin"):
        os.link(toy_run / name, copy / name)
    (copy / "result.json").write_text(json.dumps(result | {"val_bpb": result["val_bpb"] - 1e-9}))
    assert not probe.artifact_alone(copy).ok


def test_command_line_says_what_it_cannot_probe(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is no run, and a vocabulary too small for a stream of different tokens: one line, exit status 2."""
    for folder, said in ((tmp_path, "log.txt"), (toy_run, "a vocabulary of 64 has room for")):
        assert probe.main(["--run", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_probe_settings_keep_what_a_score_depends_on() -> None:
    """Only sizes differ from the run's settings."""
    config = toy_config(VOCAB_SIZE=1024)
    changed = {
        f.name
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != getattr(probe.probe_config(config), f.name)
    }
    sizes = {
        "eval_seq_len",
        "eval_stride",
        "ttt_eval_seq_len",
        "ttt_chunk_steps",
        "ttt_chunk_size",
        "ttt_batch_size",
        "phased_ttt_prefix_docs",
        "phased_ttt_num_phases",
        "global_ttt_chunk_tokens",
        "ttt_chunk_tokens",
        "ttt_batch_seqs",
    }
    assert changed <= sizes | {"compile", "eval_max_seconds"}
