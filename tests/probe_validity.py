#!/usr/bin/env python3
"""Probes of the evaluator: is a score what the rules say it must be?

    python tests/probe_validity.py --run runs/my-run          the artifact and the settings of a run

Each probe drives the script's own evaluation (plain, sliding, and the run's kind of test-time training, with its global
phases, chunks, hints and boosts) on a made-up token stream and looks at what is scored, and when:

    causality             a token, and all that is scored after it or at the same time elsewhere, may be anything: the
                          whole distribution at the token, tilted by its hint, and every score before it stay
                          bit-identical; in documents of all lengths, and (long causality) far inside one
    normalisation         every vocabulary id, BOS too, as the target, through the real path: probabilities sum to 1
    score_before_update   no weight update depends on a target whose score is not final
    single_pass           every target is scored exactly once, and the tally holds these nats, targets and bytes
    context               a score depends on every token of its window and on none before it
    isolation             a document scores the same whatever is packed around it, and as it does alone
    fresh_start           a document begins with the bare weights and is adapted without a trace of documents before it
    ranks                 two ranks, whose governor lets chunks grow, score what one rank does that repeats its log
    artifact_alone        a new process without training files and network reproduces the run's score from the artifact

No two neighbours of the stream stand side by side a second time, so that a forward call tells by its inputs and targets
which positions it touches; then phrases are repeated, for hints to occur: inside documents, across documents that are
scored before, side by side and after, and across the begins of documents. The longest document has more than 1,000
targets and 16 contexts. Documents that are scored in one round of the queue count as scored at the same time: ranks
score them side by side. Only the begins of documents stay what they are, since documents are dealt by their lengths.
tests/test_validity.py runs the probes at toy size and shows that each one fails on broken evaluators.
Exit status: 0 all probes passed, 1 one failed, 2 the run cannot be read.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt as tg
from records.logs import read_log

SUM_TOLERANCE = 1e-4  # of the probabilities of all ids
SAME_SCORE = 1e-4  # nats: a document alone and in a packed row differ by rounding only
KINDS = ("plain", "sliding", "ttt")
TRACKS = 2  # of test-time training, so that a short queue has several rounds
ROUND = 2  # batches of a round of it


class Outcome(NamedTuple):
    """What a probe found."""

    probe: str
    ok: bool
    found: str


class Subject(NamedTuple):
    """What is probed: a way to get a fresh copy of the model, and the settings."""

    make_model: Callable[[], tg.GPT]
    config: tg.Config

    @property
    def by_document(self) -> bool:
        """Whether test-time training takes the documents by length and adapts to each of them."""
        return self.config.ttt_kind == "lora_phased"

    def having(self, **changes: Any) -> "Subject":
        return self._replace(config=dataclasses.replace(self.config, **changes))


@dataclasses.dataclass
class Trace:
    """One evaluation as seen from outside."""

    tally: Any = None
    scores: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # position -> nats, once per scoring
    updates: list[np.ndarray] = dataclasses.field(default_factory=list)  # positions with a gradient at each update
    early: list[int] = dataclasses.field(default_factory=list)  # of these, the ones not yet scored
    priced: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # position -> nats of all ids (V,)
    hinted: set[int] = dataclasses.field(default_factory=set)  # priced positions with a hint

    def differing(self, other: "Trace", places: np.ndarray) -> list[int]:
        """Of these positions, the ones with other scores."""
        return [p for p in places.tolist() if self.scores.get(p) != other.scores.get(p)]


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def evaluate(
    kind: str,
    subject: Subject,
    validation: tg.Validation,
    run: tg.Run = tg.Run(),
    log: tg.Log | None = None,
) -> Any:
    """The script's own evaluation of a fresh model; returns its tally."""
    program = tg.Program(subject.config, run)
    program.model = subject.make_model()
    evaluation = tg.Evaluation(program, validation, log or tg.Log(None))
    if kind == "ttt":
        return tg.TTT_KINDS[subject.config.ttt_kind](evaluation)
    return evaluation.score(subject.config.eval_stride if kind == "sliding" else subject.config.eval_seq_len)


def pair_keys(before: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return before.astype(np.int64) << 32 | ids.astype(np.int64)


def trace(kind: str, subject: Subject, validation: tg.Validation, price: tuple[int, ...] = ()) -> Trace:
    """Runs an evaluation and records its scores and weight updates.

    At the positions `price`, all ids are priced right where the score is computed, with the weights and adapters of
    that moment. What a tilt must make of these prices is computed by itself, as a softmax over all ids.
    """
    result, tokens = Trace(), validation.tokens.numpy()
    stream = pair_keys(tokens[:-1], tokens[1:])
    known, first, counts = np.unique(stream, return_index=True, return_counts=True)
    wanted = stream[np.array(price, np.int64) - 1]
    pending: list[np.ndarray] = []
    last_call: dict[str, torch.Tensor] = {}
    forward, add, tilt, adamw = tg.GPT.forward, tg.Tally.add, tg.tilt, tg.adamw

    def watched_forward(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *more: Any, **named: Any) -> Any:
        nll = forward(model, inputs, targets, *more, **named)
        own, nats = (targets, nll) if targets.dim() == 2 else (targets[..., 0], nll[..., 0])  # a hint comes second
        keys = pair_keys(inputs[:, -own.size(1) :].numpy(), own.numpy())
        if nll.requires_grad:
            place = np.searchsorted(known, keys).clip(max=len(known) - 1)
            where = np.where((known[place] == keys) & (counts[place] == 1), first[place] + 1, -1)
            used = lambda grad: (grad.numpy().reshape(*where.shape, -1) != 0).any(-1) & (where >= 0)
            nll.register_hook(lambda grad: pending.append(where[used(grad)]))
        last_call.clear()
        if np.isin(keys, wanted).any():
            everything = torch.arange(subject.config.vocab_size).expand(*own.shape, -1)
            with torch.no_grad():
                prices = forward(model, inputs, everything, *more, **named)
            last_call.update(nll=nats.detach(), targets=own, all=prices, hint=torch.full_like(own, -1))
        return nll

    def watched_tilt(nll: torch.Tensor, ids: torch.Tensor, boost: torch.Tensor) -> torch.Tensor:
        tilted = tilt(nll, ids, boost)
        if last_call:
            hint = ids[..., 1:]
            logits = -last_call["all"].double()
            logits = logits.scatter_add(-1, hint.clamp(min=0), torch.as_tensor(boost).unsqueeze(-1) * (hint >= 0))
            last_call.update(nll=tilted, all=-torch.log_softmax(logits, -1), hint=hint[..., 0])
        return tilted

    def watched_add(tally: Any, nll: torch.Tensor, positions: Any) -> None:
        for place, value in zip(np.asarray(positions).tolist(), nll.detach().tolist()):
            result.scores.setdefault(place, []).append(value)
            if last_call and place in price and place not in result.priced:
                same = (last_call["nll"] == value) & (last_call["targets"] == tokens[place])
                if same.any():  # else the score is not what the forward pass returned
                    result.priced[place] = last_call["all"][same][0]
                    result.hinted |= {place} if last_call["hint"][same][0] >= 0 else set()
        add(tally, nll, positions)

    def before_step(*_: Any) -> None:
        used = np.unique(np.concatenate(pending)) if pending else np.zeros(0, np.int64)
        pending.clear()
        result.updates.append(used)
        result.early += [int(place) for place in used if place not in result.scores]

    def watched_adamw(*arguments: Any, **named: Any) -> None:  # the step of adapters, which no optimizer object takes
        before_step()
        adamw(*arguments, **named)

    with (
        patched(tg.GPT, "forward", watched_forward),
        patched(tg.Tally, "add", watched_add),
        patched(tg, "tilt", watched_tilt),
        patched(tg, "adamw", watched_adamw),
        patched(tg, "TTT_TRACKS", TRACKS),
        patched(tg, "ROUND_BATCHES", ROUND),
    ):
        handle = register_optimizer_step_pre_hook(before_step)
        try:
            result.tally = evaluate(kind, subject, validation)
        finally:
            handle.remove()
    return result


# ------------------------------------------------------------------------------------------------------------
# STREAMS
# ------------------------------------------------------------------------------------------------------------


def as_validation(tokens: np.ndarray, documents: np.ndarray | None = None) -> tg.Validation:
    """A validation split of these tokens, which begin with BOS; targets count 0 to 4 bytes. Documents (n, 2) may be
    given, where a BOS among the tokens is to be nothing but another target."""
    starts = np.flatnonzero(tokens == tg.BOS_ID)
    ends = np.append(starts[1:], len(tokens) - 1)
    if documents is None:
        documents = np.stack([starts, ends - starts], 1)
        documents = documents[documents[:, 1] > 0]
    return tg.Validation(torch.from_numpy(tokens), torch.arange(len(tokens)) % 5, documents)


def fresh_text(lengths: list[int], vocab_size: int, seed: int = 0) -> np.ndarray:
    """Documents with these numbers of targets, in which no two ids stand side by side a second time. Raises ValueError
    when the vocabulary is too small for that."""
    dice, total = np.random.default_rng(seed), sum(lengths) + 1
    if 2 * total > (vocab_size - 4) ** 2:
        raise ValueError(f"VOCAB_SIZE={vocab_size}: too few pairs of ids for {total} tokens that repeat none")
    tokens, begins = np.full(total, tg.BOS_ID), {0, *np.cumsum(lengths[:-1]).tolist()}
    used: set[tuple[int, int]] = set()
    for i in (i for i in range(total) if i not in begins):
        last, id = int(tokens[i - 1]), int(dice.integers(4, vocab_size))
        while (last, id) in used or (i + 1 in begins and (id, tg.BOS_ID) in used):
            id = int(dice.integers(4, vocab_size))
        tokens[i] = id
        used |= {(last, id), (id, int(tokens[i + 1]) if i + 1 in begins else -1)}
    return tokens


def replaced(tokens: np.ndarray, where: np.ndarray, vocab_size: int, seed: int = 1) -> np.ndarray:
    """The stream with other random ids at some positions; BOS stays where it is."""
    where, changed = where[tokens[where] != tg.BOS_ID], tokens.copy()
    shift = np.random.default_rng(seed).integers(1, vocab_size - 4, len(where))
    changed[where] = (tokens[where] - 4 + shift) % (vocab_size - 4) + 4
    return changed


def document_of(validation: tg.Validation) -> np.ndarray:
    """The document that each position is a target of; -1 for the first token."""
    owner = np.full(len(validation.tokens), -1)
    for number, (start, count) in enumerate(validation.documents.tolist()):
        owner[start + 1 : start + count + 1] = number
    return owner


def turns(subject: Subject, validation: tg.Validation) -> np.ndarray:
    """For each document a number that grows with the time at which test-time training by document scores it. It is the
    same for documents that may be scored side by side: those of a round, which ends before a global update."""
    config, starts = subject.config, validation.documents[:, 0]
    queue = tg.document_queue(validation.documents, config.ttt_batch_size, [limit for limit, _ in config.chunk_steps])
    pauses, turn = tg.phase_pauses(queue, config), np.empty(len(starts), np.int64)
    for number, batch in enumerate(queue):
        phase = int(np.searchsorted(pauses, number, side="right"))
        begin = pauses[phase - 1] if phase else 0
        turn[np.searchsorted(starts, batch[:, 0])] = phase * len(queue) + (number - begin) // ROUND
    return turn


class Text(NamedTuple):
    """A token stream, and positions in it where the score has much to depend on."""

    tokens: np.ndarray
    places: tuple[int, ...]


# Targets of the documents. With batches of three, two tracks and two pauses the queue is
# 300 250 60, 58 56 54 | pause | 52 50 48, 46 44 42 | pause | 40 3 1, where a comma stands inside a round.
LENGTHS = [56, 300, 44, 52, 250, 1, 60, 46, 3, 58, 54, 42, 50, 48, 40]
LONG_LENGTHS = [70, 1040, 300, 2, 20, 35]


Where = list[tuple[int, int]]  # (number of targets of a document, distance from its begin)


def with_phrases(config: tg.Config, lengths: list[int], phrases: list[tuple[int, Where]], places: Where) -> Text:
    """fresh_text of documents of different lengths, in which phrases come back: (size, where it begins) of each."""
    tokens, dice = fresh_text(lengths, config.vocab_size), np.random.default_rng(1)
    begin = dict(zip(lengths, np.cumsum([0, *lengths]).tolist()))
    for size, where in phrases:
        phrase = dice.integers(4, config.vocab_size, size)
        for length, offset in where:
            tokens[begin[length] + offset :][:size] = phrase
    return Text(tokens, tuple(begin[length] + offset for length, offset in places))


def longest_phrase(config: tg.Config) -> int:
    """Tokens of a phrase in which hints of every order up to 16 occur; longer ones have no room in short documents."""
    return min(max(config.token_order, *config.document_orders, 0), 16) + 5


def short_text(config: tg.Config) -> Text:
    """Documents of up to five contexts, in which phrases come back in the ways that a hint may or may not count."""
    order, size = config.token_order, longest_phrase(config)
    phrases = [
        (size, [(300, 20), (250, 30), (60, 1), (40, 10)]),  # in documents of one batch, and in one of a later round
        (size, [(56, 3), (60, 55 - size)]),  # the one that is behind in the stream is scored first
        (size, [(44, 3), (52, 25)]),  # of one round, on two tracks
        (order, [(56, 56 - order), (44, 44 - order)]),  # the ends of two documents, behind which two others begin alike
        (4, [(300, 1), (52, 1)]),
    ]
    places = [(60, 54), (44, 2 + size), (52, 24 + size), (40, 9 + size)]
    return with_phrases(config, LENGTHS, phrases, places)


def long_text(config: tg.Config) -> Text:
    """A document of 16 contexts with hints from itself, and some around it."""
    size = longest_phrase(config)
    where = [(1040, 5), (1040, 5 + size), (1040, 700), (1040, 1000), (300, 20), (300, 200), (70, 1), (70, 34), (35, 5)]
    places = [(1040, 999 + size), (70, 33 + size), (35, 4 + size)]
    return with_phrases(config, LONG_LENGTHS, [(size, where)], places)


# ------------------------------------------------------------------------------------------------------------
# PROBES
# ------------------------------------------------------------------------------------------------------------


def causality(kind: str, subject: Subject, text: Text, name: str = "causality") -> Outcome:
    """At each of the places: nothing that is known there or was scored before depends on the token or on later ones.

    Later means further on in the stream; in test-time training by document further on in the own document, or in any
    other one of the same turn or of a later one (`turns`). So shared state (weights behind a global phase, adapters'
    warm starts, hints) may flow from what was scored earlier to what is scored later (issue #1017), and in no other
    direction.
    """
    name, tokens = f"{name}, {kind}", text.tokens
    validation, position = as_validation(tokens), np.arange(len(tokens))
    owner, base = document_of(validation), trace(kind, subject, validation, text.places)
    for t in text.places:
        later = position >= t
        if kind == "ttt" and subject.by_document:
            turn = turns(subject, validation)[owner]
            later = np.where(owner == owner[t], later, turn >= turn[t]) & (owner >= 0)
        changed = replaced(tokens, np.flatnonzero(later), subject.config.vocab_size)
        other = trace(kind, subject, as_validation(changed), (t,))
        if t not in base.priced or t not in other.priced:
            return Outcome(name, False, f"the score of token {t} is not what the forward pass returned")
        if not torch.equal(base.priced[t], other.priced[t]):
            difference = (base.priced[t] - other.priced[t]).abs().max().item()
            return Outcome(name, False, f"the distribution at token {t} moved by {difference:.3g} nats with that token")
        if moved := base.differing(other, np.flatnonzero(~later)):
            return Outcome(name, False, f"changing tokens from {t} on moved the earlier score of token {moved[0]}")
    if kind == "ttt" and subject.by_document and subject.config.ngram_tilt_enabled and not base.hinted:
        return Outcome(name, False, f"none of {len(text.places)} tokens has a hint: nothing is seen of them")
    found = f"{len(text.places)} tokens, {len(base.hinted)} with a hint"
    return Outcome(name, True, f"{found}: distributions and earlier scores are bit-identical")


def normalisation(kind: str, subject: Subject, text: Text, most: int = 64) -> Outcome:
    """At each of the places, ids take the token's place, and are scored by the real path. All ids (or, in a vocabulary
    of more than `most`, a sample of `most` / 8) must get the nats that the forward pass gives them; all probabilities
    sum to 1."""
    name, size, worst, tokens = f"normalisation, {kind}", subject.config.vocab_size, 0.0, text.tokens
    documents = as_validation(tokens).documents
    base = trace(kind, subject, as_validation(tokens), text.places)
    others = np.setdiff1d(np.arange(size), [tg.BOS_ID])
    ids = others if size <= most else np.random.default_rng(0).choice(others, most // 8, replace=False)
    for t in text.places:
        if t not in base.priced:
            return Outcome(name, False, f"the score of token {t} is not what the forward pass returned")
        nats = {}
        for token in [tg.BOS_ID, *ids.tolist()]:
            changed = tokens.copy()
            changed[t] = token
            validation = as_validation(changed, documents)  # BOS as a target ends no document here
            nats[token] = trace(kind, subject, validation).scores[t][0]
        priced = base.priced[t].double()
        total = (-priced).exp().sum().item()
        if len(nats) == size:
            total = sum(np.exp(-value) for value in nats.values())
        worst = max(worst, abs(total - 1))
        if worst > SUM_TOLERANCE:
            return Outcome(name, False, f"the probabilities of all ids at token {t} sum to {total:.6f}")
        token, gap = max(((i, abs(value - priced[i].item())) for i, value in nats.items()), key=lambda item: item[1])
        if gap > SUM_TOLERANCE:
            return Outcome(name, False, f"id {token} at token {t} is scored {gap:.3g} nats off its price")
    found = f"{len(text.places)} tokens, {len(ids) + 1} of {size} ids each"
    return Outcome(name, True, f"{found}: sums within {worst:.1e} of 1")


def score_before_update(subject: Subject, tokens: np.ndarray) -> Outcome:
    """Every target that has a gradient at a weight update has been scored before."""
    seen = trace("ttt", subject, as_validation(tokens))
    used = sum(len(update) for update in seen.updates)
    if not used:
        return Outcome("score_before_update", False, "no update at all: the probe needs longer documents")
    if seen.early:
        return Outcome("score_before_update", False, f"token {seen.early[0]} was learned from before its score")
    return Outcome("score_before_update", True, f"{len(seen.updates)} updates on {used} scored targets")


def single_pass(kind: str, subject: Subject, tokens: np.ndarray) -> Outcome:
    """Each token but the first is scored exactly once, and the tally holds just that."""
    name, validation = f"single_pass, {kind}", as_validation(tokens)
    seen = trace(kind, subject, validation)
    times = np.array([len(seen.scores.get(place, [])) for place in range(len(tokens))])
    if times[0] or (times[1:] != 1).any():
        odd = int(np.flatnonzero(times != (np.arange(len(tokens)) > 0))[0])
        return Outcome(name, False, f"token {odd} was scored {times[odd]} times")
    nats, size = math.fsum(chain(*seen.scores.values())), int(validation.bytes[1:].sum())
    wanted = dict(nats=nats, tokens=len(tokens) - 1, bytes=size, bpb=nats / math.log(2) / size)
    for key, value in wanted.items():
        if not math.isclose(getattr(seen.tally, key), value, rel_tol=1e-9):
            return Outcome(name, False, f"the tally has {getattr(seen.tally, key)} {key}, the scores {value}")
    return Outcome(name, True, f"{len(tokens) - 1} targets and {size} bytes, once each")


def context(kind: str, subject: Subject, tokens: np.ndarray) -> Outcome:
    """Every scored stretch depends on the first token of its window, and no stretch on a token before its window.

    Without learning and hints, a stretch of targets is scored behind a context that ends with it; one token changes in
    each document (or in the stream, if windows run across documents), at the begins of windows and right before them.
    """
    name, config = f"context, {kind}", subject.config
    still = dict(ttt_lora_lr=0.0, ttt_lr=0.0, phased_ttt_prefix_docs=0, ngram_tilt_enabled=False)
    subject, validation = subject.having(**still), as_validation(tokens)
    by_document, base = kind == "ttt" and subject.by_document, trace(kind, subject, validation)
    whole = np.array([[0, len(tokens) - 1]])
    stretches = validation.documents if by_document or config.varlen_attn else whole
    length = config.ttt_eval_seq_len if by_document else config.eval_seq_len
    begin_of = np.zeros(len(tokens), np.int64)  # of the window in which a target is scored
    for start, count in stretches.tolist():
        first = tg.chunk_of(count, config) if by_document else length
        step = first if by_document else length if kind == "plain" else config.eval_stride
        last = first + -(-(np.arange(count) + 1 - first).clip(min=0) // step) * step  # target of a full stretch
        begin_of[start + 1 : start + count + 1] = start + (last - length).clip(min=0)
    edges = [np.unique(begin_of[start + 1 : start + count + 1])[1:] for start, count in stretches.tolist()]
    edges = [windows for windows in edges if len(windows)]
    for before in (0, 1):  # the first begin and the token before the last one; the one before the first, and the last
        places = np.unique([(windows[0] - before, windows[-1] - 1 + before) for windows in edges])
        places = places[tokens[places] != tg.BOS_ID]
        other = trace(kind, subject, as_validation(replaced(tokens, places, config.vocab_size)))
        moved, touched = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)
        moved[base.differing(other, np.arange(len(tokens)))] = True
        touched[places] = True  # as targets
        for start, count in stretches.tolist():
            for place in places[(places > start) & (places < start + count)]:
                behind = np.arange(place + 1, start + count + 1)
                touched[behind[begin_of[behind] <= place]] = True
        if (moved & ~touched).any():
            odd = int(np.flatnonzero(moved & ~touched)[0])
            return Outcome(name, False, f"token {odd} depends on one before {begin_of[odd]}, where its window begins")
        if missing := np.setdiff1d(begin_of[touched], begin_of[touched & moved]).tolist():
            return Outcome(name, False, f"the window from {missing[0]} on does not depend on its first token")
    return Outcome(name, True, f"{sum(map(len, edges))} windows")


def sides(count: int, bits: int) -> Iterator[np.ndarray]:
    """Halves of `count` documents, as masks: by the last bit of their number and the other way round, then by the bit
    before it, and so on."""
    for bit in range(bits):
        half = (np.arange(count) >> bit) % 2 == 0
        yield from (half, ~half)


def changed_by_others(kind: str, subject: Subject, tokens: np.ndarray, bits: int) -> str:
    """Changes half of the documents, again and again: says which token of another one was scored differently then."""
    validation = as_validation(tokens)
    owner, base = document_of(validation), trace(kind, subject, validation)
    for half in sides(len(validation.documents), bits):
        theirs = half[owner] & (owner >= 0)
        changed = replaced(tokens, np.flatnonzero(theirs), subject.config.vocab_size)
        mine = np.flatnonzero(~theirs & (owner >= 0))
        if moved := base.differing(trace(kind, subject, as_validation(changed)), mine):
            number = owner[moved[0]]
            return f"document {number} changed with others, at its token {moved[0] - validation.documents[number, 0]}"
    return ""


def isolation(kind: str, subject: Subject, tokens: np.ndarray) -> Outcome:
    """Changing other documents leaves a document's scores bit-identical; scored alone it differs by rounding.

    For test-time training with all documents in one batch or chunk; what flows on from there is a matter of `causality`
    and `fresh_start`. It is not compared with a document alone, which has other random adapters.
    """
    name, validation = f"isolation, {kind}", as_validation(tokens)
    subject = subject.having(ttt_batch_size=1000, phased_ttt_prefix_docs=0, ttt_chunk_tokens=2**27, ttt_chunk_steps="")
    if changed := changed_by_others(kind, subject, tokens, 1):
        return Outcome(name, False, changed)
    if kind != "ttt":
        base = trace(kind, subject, validation)
        for number, (start, count) in enumerate(validation.documents.tolist()):
            alone = trace(kind, subject, as_validation(tokens[start : start + count + 1]))
            gap = max(abs(base.scores[start + i][0] - alone.scores[i][0]) for i in range(1, count + 1))
            if gap > SAME_SCORE:
                return Outcome(name, False, f"document {number} packed and alone differ by {gap:.3g} nats")
    return Outcome(name, True, f"{len(validation.documents)} documents")


def fresh_start(subject: Subject) -> Outcome:
    """Test-time training by document: a document's first chunk scores as without adapters, and nothing of an earlier
    document is left when the next one is adapted.

    Documents of two chunks follow each other, in batches of two on as many tracks. Their one update leaves A as it is,
    since B is 0 before it, so not even the warm start of A carries anything on. Each document repeats a few ids of its
    own: its hints and learnt boosts are a matter of itself.
    """
    chunk, vocab_size = subject.config.ttt_chunk_size, subject.config.vocab_size
    lengths = [max(2 * chunk - i, chunk + 1) for i in range(10)]
    own = np.random.default_rng(2).permutation(np.arange(4, vocab_size))
    documents = [np.append(tg.BOS_ID, np.tile(own[5 * i : 5 * i + 5], chunk)[: n - 1]) for i, n in enumerate(lengths)]
    tokens = np.append(np.concatenate(documents), own[-1])
    orders = dict(token_order=max(subject.config.token_order, 3))  # a context of BOS alone is in every document
    subject = subject.having(ttt_batch_size=2, phased_ttt_prefix_docs=0, ttt_chunk_steps="", **orders)
    validation = as_validation(tokens)
    adapted = trace("ttt", subject.having(ngram_tilt_enabled=False), validation)
    plain = trace("plain", subject.having(eval_seq_len=subject.config.ttt_eval_seq_len), validation)
    for number, start in enumerate(validation.documents[:, 0].tolist()):
        gap = max(abs(adapted.scores[p][0] - plain.scores[p][0]) for p in range(start + 1, start + chunk + 1))
        if gap > SAME_SCORE:
            return Outcome("fresh_start", False, f"document {number} begins {gap:.3g} nats off the bare weights")
    if changed := changed_by_others("ttt", subject, tokens, 4):
        return Outcome("fresh_start", False, changed)
    return Outcome("fresh_start", True, f"{len(lengths)} documents")


# ------------------------------------------------------------------------------------------------------------
# RANKS
# ------------------------------------------------------------------------------------------------------------


class Meeting:
    """Where pretended ranks, a thread each, exchange values."""

    def __init__(self, ranks: int):
        self.barrier, self.box = threading.Barrier(ranks, timeout=60), [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks."""
        self.box[rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values


@dataclasses.dataclass(frozen=True)
class PretendedRank(tg.Run):
    """A rank whose peers are threads of this process."""

    meeting: Meeting = None  # type: ignore[assignment]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(sum(self.meeting.exchange(self.rank, tensor.clone())))

    def share(self, value: Any) -> Any:
        return self.meeting.exchange(self.rank, value)[0]

    def barrier(self) -> None:
        self.meeting.exchange(self.rank, None)


class Lines(tg.Log):
    """Keeps the values of all lines."""

    def __init__(self) -> None:
        super().__init__(None)
        self.values: dict[str, Any] = {}

    def __call__(self, event: str, **values: Any) -> None:
        self.values |= values


def scores_of_ranks(
    kind: str, subject: Subject, validation: tg.Validation, count: int
) -> tuple[dict[int, float], dict[str, Any]]:
    """What `count` ranks score together, and what rank 0 logs. The clock of rank 0 counts its forward passes; those of
    the others stand still."""
    scores: dict[int, float] = {}
    here, passes, meeting = threading.local(), [0], Meeting(count)
    forward, add = tg.GPT.forward, tg.Tally.add

    def counted(*arguments: Any, **named: Any) -> torch.Tensor:
        passes[0] += here.rank == 0
        return forward(*arguments, **named)

    def noted(tally: Any, nll: torch.Tensor, positions: Any) -> None:
        scores.update(zip(np.asarray(positions).tolist(), nll.detach().tolist()))
        add(tally, nll, positions)

    def work(rank: int) -> dict[str, Any]:
        here.rank, log = rank, Lines()
        try:
            evaluate(kind, subject, validation, PretendedRank(rank, count, meeting=meeting), log)
        except BaseException:
            meeting.barrier.abort()
            raise
        return log.values

    clock = types.SimpleNamespace(
        **vars(time) | dict(monotonic=lambda: float(passes[0] if getattr(here, "rank", 1) == 0 else 0))
    )
    with (
        patched(tg.GPT, "forward", counted),
        patched(tg.Tally, "add", noted),
        patched(tg, "time", clock),
        patched(tg, "TTT_TRACKS", TRACKS),
        patched(tg, "ROUND_BATCHES", ROUND),
        ThreadPoolExecutor(count) as pool,
    ):
        return scores, list(pool.map(work, range(count)))[0]


def ranks(kind: str, subject: Subject, tokens: np.ndarray) -> Outcome:
    """Two ranks score what one rank scores. In test-time training by document they are short of time, and the one rank,
    which has all the time, repeats the chunks that their governor has chosen, from its log."""
    name, validation = f"ranks, {kind}", as_validation(tokens)
    governed = kind == "ttt" and subject.by_document
    hurried = dict(max_wallclock_seconds=1.0, eval_max_seconds=1.0) if governed else {}
    together, log = scores_of_ranks(kind, subject.having(**hurried), validation, 2)
    decisions = log.get("EVAL_CHUNK_FACTORS", "")
    if governed and decisions in ("", "0:1"):
        return Outcome(name, False, "the governor has decided nothing, or does not log it")
    alone, _ = scores_of_ranks(kind, subject.having(eval_chunk_factors=decisions), validation, 1)
    gaps = {place: abs(value - together.get(place, math.inf)) for place, value in alone.items()}
    worst = max(gaps, key=gaps.get)
    if gaps[worst] > SAME_SCORE:
        return Outcome(name, False, f"two ranks score token {worst} {gaps[worst]:.3g} nats off what one does")
    chunks = f", chunks grow at {decisions}" if governed else ""
    return Outcome(name, True, f"{len(alone)} targets within {gaps[worst]:.1e} nats{chunks}")


# ------------------------------------------------------------------------------------------------------------
# THE ARTIFACT ALONE
# ------------------------------------------------------------------------------------------------------------


# Loaded by the child process before anything else. There are no training files there; to ask for one is an error too.
GUARD = """
import os, re, sys

def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "os.system"):
        raise PermissionError(f"the evaluation used the network ({event} {arguments!r})")
    name = os.path.basename(str(arguments[0])) if event == "open" else ""
    if re.search(r"fineweb_train|trained[.]bin|checkpoint[.]bin", name):
        raise PermissionError(f"the evaluation opened {arguments[0]}")

sys.addaudithook(guard)
"""


def run_settings(folder: Path) -> dict[str, str]:
    """The settings of a run as environment variables, from its log. Raises OSError or ValueError."""
    log = read_log(folder / "log.txt")
    if not log.settings:
        raise ValueError(f"{folder}/log.txt holds no settings")
    values = {name.upper(): {"True": "1", "False": "0"}.get(value, value) for name, value in log.settings[-1].items()}
    return {key: value for key, value in values.items() if key.lower() in tg.FIELDS}


def score_alone(folder: Path, script: Path = ROOT / "train_gpt.py", places: Path = ROOT) -> float:
    """val_bpb of the run's artifact in a new process that has the script, the artifact, the tokenizer and the
    validation shards and nothing else; `places` is where the run's relative paths begin. Raises ChildProcessError."""
    settings = run_settings(folder)
    config = tg.load_config(settings)[0]
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for name in ("guard", "data", "runs/alone"):
            (home / name).mkdir(parents=True)
        (home / "guard" / "sitecustomize.py").write_text(GUARD)
        shutil.copyfile(script, home / script.name)
        shutil.copyfile(folder / "artifact.bin", home / "runs/alone/artifact.bin")
        shutil.copyfile(places / config.tokenizer_file, home / "tokenizer.model")
        for shard in (places / config.dataset_dir).glob("fineweb_val_*.bin"):
            (home / "data" / shard.name).symlink_to(shard.resolve())
        env = {"PATH": os.defpath, "PYTHONPATH": str(home / "guard"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        env |= settings | {"STAGES": "evaluate", "RUN_ID": "alone", "RUNS_DIR": "runs", "PRESET": "default"}
        env |= {"DATA_PATH": "data", "TOKENIZER_PATH": "tokenizer.model"}
        command = [sys.executable, script.name]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
        result = home / "runs/alone/result.json"
        if done.returncode or not result.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ChildProcessError(f"exit status {done.returncode}: {last}")
        return json.loads(result.read_text())["val_bpb"]


def artifact_alone(folder: Path, **where: Path) -> Outcome:
    """A new process scores the run's artifact as the run has done: see score_alone."""
    expected = json.loads((folder / "result.json").read_text())["val_bpb"]
    try:
        found = score_alone(folder, **where)
    except ChildProcessError as error:
        return Outcome("artifact_alone", False, str(error))
    if found != expected:
        return Outcome("artifact_alone", False, f"val_bpb {found}, the run has {expected}")
    return Outcome("artifact_alone", True, f"val_bpb {found:.8f} in a new process, bit-identical")


# ------------------------------------------------------------------------------------------------------------
# MAIN
# ------------------------------------------------------------------------------------------------------------


def probe_config(config: tg.Config) -> tg.Config:
    """The settings of a run with short contexts, batches and chunks, so that a short stream has documents of many
    contexts, several batches and two global phases; what a token's score may depend on does not follow from sizes."""
    context, chunk = min(config.eval_seq_len, 64), min(config.ttt_chunk_size, 32)
    sizes = dict(eval_seq_len=context, eval_stride=min(config.eval_stride, 16), ttt_eval_seq_len=context)
    sizes |= dict(ttt_chunk_size=chunk, ttt_batch_size=3, phased_ttt_prefix_docs=12, phased_ttt_num_phases=2)
    sizes |= dict(ttt_chunk_tokens=256, ttt_batch_seqs=1, token_order=min(config.token_order, 16))
    sizes |= dict(val_batch_tokens=min(config.val_batch_tokens, 64 * context))
    sizes |= dict(eval_max_seconds=0.0, global_ttt_chunk_tokens=4 * context)  # no clock decides about chunks
    steps = ",".join(f"{64 * (i + 1)}:{min(step, chunk)}" for i, (_, step) in enumerate(config.chunk_steps))
    return dataclasses.replace(config, **sizes, ttt_chunk_steps=steps, compile="0")


def few_ids() -> Text:
    """Two documents over six ids, the second one longer than two contexts, and places without and with a hint."""
    tokens = np.random.default_rng(3).integers(4, 10, 161)
    tokens[132:161] = tokens[102:131]
    tokens[[0, 31]] = tg.BOS_ID
    return Text(tokens, (20, 150))


def planned(subject: Subject) -> dict[str, Callable[[], Outcome]]:
    """Every probe that needs no files, by name."""
    config = subject.config
    short, long = short_text(config), long_text(config)
    probes: dict[str, Callable[[], Outcome]] = {}
    for kind in KINDS:
        probes[f"causality, {kind}"] = functools.partial(causality, kind, subject, short)
        probes[f"long causality, {kind}"] = functools.partial(causality, kind, subject, long, "long causality")
        probes[f"single_pass, {kind}"] = functools.partial(single_pass, kind, subject, long.tokens)
        probes[f"context, {kind}"] = functools.partial(context, kind, subject, long.tokens)
        probes[f"normalisation, {kind}"] = functools.partial(normalisation, kind, subject, few_ids())
        probes[f"ranks, {kind}"] = functools.partial(ranks, kind, subject, short.tokens)
        if config.varlen_attn:  # else windows run across documents, and that is what they are there for
            probes[f"isolation, {kind}"] = functools.partial(isolation, kind, subject, short.tokens)
    fresh = fresh_text(LONG_LENGTHS, config.vocab_size)
    probes["score_before_update"] = functools.partial(score_before_update, subject, fresh)
    if subject.by_document and config.varlen_attn:
        probes["fresh_start"] = functools.partial(fresh_start, subject)
    return probes


def all_probes(subject: Subject) -> Iterator[Outcome]:
    """The outcomes of all of `planned`, one after the other."""
    return (probe() for probe in planned(subject).values())


def run_subject(folder: Path) -> Subject:
    """The artifact of a run, at its settings."""
    config = tg.load_config(run_settings(folder))[0]
    weights = tg.load_artifact(folder / "artifact.bin", config)

    def make_model() -> tg.GPT:
        model = tg.GPT(config, tg.Run())
        model.load(weights)
        return model

    return Subject(make_model, probe_config(config))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Probes the evaluator with the artifact and the settings of a run.")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN_DIR")
    options = parser.parse_args(arguments)
    try:
        subject = run_subject(options.run)
        passed = []
        for outcome in chain(all_probes(subject), map(artifact_alone, [options.run])):
            print(f"{'ok  ' if outcome.ok else 'FAIL'} {outcome.probe}: {outcome.found}", flush=True)
            passed.append(outcome.ok)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
