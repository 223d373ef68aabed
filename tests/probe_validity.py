#!/usr/bin/env python3
"""Probes of the evaluator: is a score what the rules say it must be?

    python tests/probe_validity.py --run runs/my-run          the artifact and the settings of a run

Each probe drives the script's own evaluation (plain, sliding, and the run's kind of test-time training, with its global
phases, chunks and hints) on a made-up token stream and looks at what is scored, and when:

    causality             changing token t and all that is scored after it leaves the whole distribution at t and every
                          score before it bit-identical
    hints                 a hint, and whether there is one, depends on the tokens before its target alone
    normalisation         every vocabulary id, BOS too, as the target, through the real path: probabilities sum to 1
    score_before_update   no weight update depends on a target whose score is not final
    single_pass           every target is scored exactly once
    fresh_start           the first chunk of every document is scored by the weights alone, whatever was adapted before
    isolation             a document scores the same whatever is packed around it, and as it does alone
    artifact_alone        a new process without training files and network reproduces the run's score from the artifact

Nearly all tokens of the stream are different, so that any forward call tells by its targets which stream positions it
touches; the longest document is longer than eight contexts. One thing is exempt: a hint of the n-gram tilt may count
text that stands earlier in the stream and is scored later, because documents are scored by length and the table of
hints is made in stream order. So causality holds hints fixed, and `hints` looks at them alone.
tests/test_validity.py runs the probes at toy size and shows that each one fails on a broken evaluator.
Exit status: 0 all probes passed, 1 one failed, 2 the run cannot be read.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
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


class Outcome(NamedTuple):
    """What a probe found."""

    probe: str
    ok: bool
    found: str


class Subject(NamedTuple):
    """What is probed: a way to get a fresh copy of the model, and the settings."""

    make_model: Callable[[], tg.GPT]
    config: tg.Config


@dataclasses.dataclass
class Trace:
    """One evaluation as seen from outside."""

    tally: Any = None
    calls: list[np.ndarray] = dataclasses.field(default_factory=list)  # positions of each scoring call, in order
    scores: dict[int, list[float]] = dataclasses.field(default_factory=dict)  # position -> nats, once per scoring
    updates: list[np.ndarray] = dataclasses.field(default_factory=list)  # positions with a gradient at each update
    early: list[int] = dataclasses.field(default_factory=list)  # of these, the ones not yet scored
    priced: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # position -> nats of all ids (V,)

    @property
    def scored(self) -> np.ndarray:
        return np.concatenate(self.calls) if self.calls else np.zeros(0, np.int64)


def evaluate(kind: str, subject: Subject, validation: tg.Validation) -> Any:
    """The script's own evaluation of a fresh model; returns its tally."""
    program = tg.Program(subject.config, tg.Run())
    program.model = subject.make_model()
    evaluation = tg.Evaluation(program, validation, tg.Log(None))
    if kind == "ttt":
        return tg.TTT_KINDS[subject.config.ttt_kind](evaluation)
    return evaluation.score(subject.config.eval_stride if kind == "sliding" else subject.config.eval_seq_len)


def trace(
    kind: str,
    subject: Subject,
    validation: tg.Validation,
    price: tuple[int, ...] = (),
    hints: torch.Tensor | None = None,
) -> Trace:
    """Runs an evaluation and records its forward calls, scores and weight updates; with `hints` these are its hints.

    At the positions `price`, all ids are priced right where the score is computed, with the weights and adapters of
    that moment. What a tilt must make of these prices is computed by itself, as a softmax over all ids.
    """
    result = Trace()
    tokens = validation.tokens.numpy()
    ids, counts = np.unique(tokens, return_counts=True)
    position_of = np.full(subject.config.vocab_size, -1)
    position_of[ids[counts == 1]] = [int(np.flatnonzero(tokens == i)[0]) for i in ids[counts == 1]]
    pending: list[np.ndarray] = []
    last_call: dict[str, torch.Tensor] = {}
    forward, add, tilt = tg.GPT.forward, tg.Tally.add, tg.tilt

    def watched_forward(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *more: Any, **named: Any) -> Any:
        nll = forward(model, inputs, targets, *more, **named)
        if nll.requires_grad:
            where = position_of[targets.numpy()]
            nll.register_hook(lambda grad: pending.append(where[(grad != 0).numpy() & (where >= 0)]))
        if price:
            own, nats = (targets, nll) if targets.dim() == 2 else (targets[..., 0], nll[..., 0])  # a hint comes second
            everything = torch.arange(subject.config.vocab_size).expand(*own.shape, -1)
            with torch.no_grad():
                last_call.update(nll=nats.detach(), targets=own, all=forward(model, inputs, everything, *more, **named))
        return nll

    def watched_tilt(nll: torch.Tensor, ids: torch.Tensor, boost: torch.Tensor) -> torch.Tensor:
        tilted = tilt(nll, ids, boost)
        if price:
            hint = ids[..., 1:]
            logits = -last_call["all"].double()
            logits = logits.scatter_add(-1, hint.clamp(min=0), boost.unsqueeze(-1) * (hint >= 0))
            last_call.update(nll=tilted, all=-torch.log_softmax(logits, -1))
        return tilted

    def watched_add(tally: Any, nll: torch.Tensor, positions: Any) -> None:
        places = np.asarray(positions)
        result.calls.append(places.copy())
        for place, value in zip(places.tolist(), nll.detach().tolist()):
            result.scores.setdefault(place, []).append(value)
            if place in price and place not in result.priced:
                same = (last_call["nll"] == value) & (last_call["targets"] == tokens[place])
                if len(found := last_call["all"][same]):  # else the score is not what the forward pass returned
                    result.priced[place] = found[0]
        add(tally, nll, positions)

    def before_step(*_: Any) -> None:
        used = np.unique(np.concatenate(pending)) if pending else np.zeros(0, np.int64)
        pending.clear()
        result.updates.append(used)
        result.early += [int(place) for place in used if place not in result.scores]

    with (
        patched(tg.GPT, "forward", watched_forward),
        patched(tg.Tally, "add", watched_add),
        patched(tg, "tilt", watched_tilt),
        patched(tg, "stream_hints", tg.stream_hints if hints is None else lambda *_: hints),
    ):
        handle = register_optimizer_step_pre_hook(before_step)
        try:
            result.tally = evaluate(kind, subject, validation)
        finally:
            handle.remove()
    return result


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ------------------------------------------------------------------------------------------------------------
# STREAMS
# ------------------------------------------------------------------------------------------------------------


def as_validation(tokens: np.ndarray, documents: np.ndarray | None = None) -> tg.Validation:
    """A validation split of these tokens, which begin with BOS; every target counts 3 bytes. Documents (n, 2) may be
    given, where a BOS among the tokens is to be nothing but another target."""
    starts = np.flatnonzero(tokens == tg.BOS_ID)
    ends = np.append(starts[1:], len(tokens) - 1)
    counts = torch.full((len(tokens),), 3)
    counts[0] = 0
    if documents is None:
        documents = np.stack([starts, ends - starts], 1)
        documents = documents[documents[:, 1] > 0]
    return tg.Validation(torch.from_numpy(tokens), counts, documents)


def unique_stream(lengths: list[int], vocab_size: int, seed: int = 0) -> np.ndarray:
    """Documents with these numbers of targets, all of whose ids but BOS are different. Raises ValueError when the
    vocabulary has no room for them and for as many replacements."""
    total = sum(lengths) + 1
    if 2 * total > vocab_size - 4:
        raise ValueError(f"{total} tokens: a vocabulary of {vocab_size} has room for {(vocab_size - 4) // 2}")
    tokens = np.random.default_rng(seed).permutation(np.arange(4, vocab_size))[:total]
    tokens[np.cumsum([0, *lengths[:-1]])] = tg.BOS_ID
    return tokens


def repeating_stream(
    lengths: list[int], vocab_size: int, order: int, seed: int = 0, inside: bool = False
) -> np.ndarray:
    """The same with one phrase of up to `order` + 5 tokens at three places of the stream, where there is room for it,
    so that n-gram hints of that order occur; with `inside` it stands there twice, for hints from the own document."""
    tokens = unique_stream(lengths, vocab_size, seed)
    begins = np.cumsum([0, *lengths])
    longest = np.argsort(-np.array(lengths), kind="stable")[:3]
    size = min(order + 5, *(lengths[i] - 1 for i in longest))
    first = int(begins[min(longest)]) + 1
    for number in longest:
        tokens[begins[number] + 1 :][:size] = tokens[first : first + size]
        if inside and lengths[number] > 2 * size:
            tokens[begins[number] + 1 + size :][:size] = tokens[first : first + size]
    return tokens


def replaced(tokens: np.ndarray, where: np.ndarray, vocab_size: int, seed: int = 1) -> np.ndarray:
    """The stream with other ids, which do not occur in it yet, at some positions; BOS stays where it is."""
    where = where[tokens[where] != tg.BOS_ID]
    free = np.random.default_rng(seed).permutation(np.setdiff1d(np.arange(4, vocab_size), tokens))
    changed = tokens.copy()
    changed[where] = free[: len(where)]
    return changed


def document_of(validation: tg.Validation) -> np.ndarray:
    """The document that each position is a target of; -1 for the first token."""
    owner = np.full(len(validation.tokens), -1)
    for number, (start, count) in enumerate(validation.documents.tolist()):
        owner[start + 1 : start + count + 1] = number
    return owner


# ------------------------------------------------------------------------------------------------------------
# PROBES
# ------------------------------------------------------------------------------------------------------------


def causality(kind: str, subject: Subject, tokens: np.ndarray, places: tuple[int, ...]) -> Outcome:
    """At each of `places`: nothing that is known there or was scored before depends on the token or on later ones.

    Later means further on in the stream; in test-time training, which takes documents by length, scored by a later call
    or further on in the same document. So shared state (weights behind a global phase, adapters' warm starts, learnt
    boosts) may flow from what was scored earlier to what is scored later (issue #1017), and in no other direction. The
    hints of the n-gram tilt are those of the unchanged stream throughout: they are the one thing that follows the
    stream instead, and `hints_before` looks at them.
    """
    name = f"causality, {kind}"
    validation = as_validation(tokens)
    owner, base = document_of(validation), trace(kind, subject, validation, places)
    hints = stream_hints(validation, subject)
    call_of = {int(place): number for number, call in enumerate(base.calls) for place in reversed(call)}
    by_length = kind == "ttt" and subject.config.ttt_kind == "lora_phased"
    for t in places:
        if by_length:
            after = lambda p: call_of[p] > call_of[t] or (call_of[p] == call_of[t] and owner[p] == owner[t] and p >= t)
        else:
            after = lambda p: p >= t
        later = [p for p in call_of if after(p)]
        changed = replaced(tokens, np.array(sorted(later)), subject.config.vocab_size)
        other = trace(kind, subject, as_validation(changed), (t,), hints)
        if t not in base.priced or t not in other.priced:
            return Outcome(name, False, f"the score of token {t} is not what the forward pass returned")
        if not torch.equal(base.priced[t], other.priced[t]):
            difference = (base.priced[t] - other.priced[t]).abs().max().item()
            return Outcome(name, False, f"the distribution at token {t} moved by {difference:.3g} nats with that token")
        moved = [p for p in call_of.keys() - set(later) if base.scores[p] != other.scores.get(p)]
        if moved:
            return Outcome(name, False, f"changing tokens from {t} on moved the earlier score of token {min(moved)}")
    return Outcome(name, True, f"{len(places)} tokens: distributions and earlier scores are bit-identical")


def stream_hints(validation: tg.Validation, subject: Subject) -> torch.Tensor | None:
    return tg.stream_hints(validation, subject.config, tg.Run(), tg.Log(None))


def hints_before(subject: Subject, tokens: np.ndarray, places: tuple[int, ...]) -> Outcome:
    """At each of `places`: the hint there and all before it stay when the tokens from there on are others."""
    base = stream_hints(as_validation(tokens), subject)
    if base is None:
        return Outcome("hints", True, "none in use")
    for t in places:
        changed = replaced(tokens, np.arange(t, len(tokens)), subject.config.vocab_size)
        other = stream_hints(as_validation(changed, as_validation(tokens).documents), subject)
        moved = (base[: t + 1] != other[: t + 1]).any(1).nonzero().flatten().tolist()
        if moved:
            return Outcome("hints", False, f"changing tokens from {t} on changed the hint at token {moved[0]}")
    return Outcome("hints", True, f"{len(places)} tokens, {int((base[:, 0] >= 0).sum())} hints")


def normalisation(kind: str, subject: Subject, tokens: np.ndarray, places: tuple[int, ...], most: int = 64) -> Outcome:
    """At each of `places`, ids take the token's place, and are scored by the real path. All ids (or, in a vocabulary
    of more than `most`, a sample) must get the nats that the forward pass gives them; all probabilities sum to 1."""
    name, size, worst = f"normalisation, {kind}", subject.config.vocab_size, 0.0
    documents = as_validation(tokens).documents
    base = trace(kind, subject, as_validation(tokens), places)
    others = np.setdiff1d(np.arange(size), [tg.BOS_ID])
    ids = others if size <= most else np.random.default_rng(0).choice(others, most // 4, replace=False)
    for t in places:
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
    return Outcome(name, True, f"{len(places)} tokens, {len(ids) + 1} of {size} ids each: sums within {worst:.1e} of 1")


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
    name, seen = f"single_pass, {kind}", trace(kind, subject, as_validation(tokens))
    times = np.bincount(seen.scored, minlength=len(tokens))
    if times[0] or (times[1:] != 1).any():
        odd = int(np.flatnonzero(times != (np.arange(len(tokens)) > 0))[0])
        return Outcome(name, False, f"token {odd} was scored {times[odd]} times")
    nats = sum(value for values in seen.scores.values() for value in values)
    if abs(seen.tally.nats - nats) > 1e-6 * nats or seen.tally.tokens != len(tokens) - 1:
        return Outcome(name, False, f"tally: {seen.tally.nats:.6f} nats, {seen.tally.tokens} tokens; scored {nats:.6f}")
    return Outcome(name, True, f"{len(tokens) - 1} targets once each")


def fresh_start(subject: Subject, tokens: np.ndarray) -> Outcome:
    """Test-time training by document: before a document has taught its adapters they change nothing, so that its first
    chunk scores as without them. All documents follow each other on two tracks, without global phases and hints."""
    alone = dict(ttt_batch_size=2, phased_ttt_prefix_docs=0, ngram_tilt_enabled=False, ttt_chunk_steps="")
    subject = subject._replace(config=dataclasses.replace(subject.config, **alone))
    validation = as_validation(tokens)
    with patched(tg, "TTT_TRACKS", 2):
        adapted, plain = trace("ttt", subject, validation), trace("plain", subject, validation)
    for number, (start, count) in enumerate(validation.documents.tolist()):
        first = range(start + 1, start + 1 + min(count, subject.config.ttt_chunk_size))
        gap = max(abs(adapted.scores[p][0] - plain.scores[p][0]) for p in first)
        if gap > SAME_SCORE:
            return Outcome("fresh_start", False, f"document {number} begins {gap:.3g} nats off the bare weights")
    return Outcome("fresh_start", True, f"{len(validation.documents)} documents")


def isolation(kind: str, subject: Subject, tokens: np.ndarray) -> Outcome:
    """Changing all other documents leaves a document's scores bit-identical; scored alone it differs by rounding.

    For test-time training without shared state, that is with all documents in one batch or chunk, no global phase, no
    hints; what flows on from there is a matter of `causality`. There, a document alone has other random adapters.
    """
    name = f"isolation, {kind}"
    alone = dict(ttt_batch_size=1000, phased_ttt_prefix_docs=0, ttt_chunk_tokens=2**27, ngram_tilt_enabled=False)
    subject = subject._replace(config=dataclasses.replace(subject.config, **alone))
    validation = as_validation(tokens)
    owner, base = document_of(validation), trace(kind, subject, validation)
    for number, (start, count) in enumerate(validation.documents.tolist()):
        others = np.flatnonzero(owner != number)[1:]
        changed = replaced(tokens, others, subject.config.vocab_size)
        after = trace(kind, subject, as_validation(changed))
        mine = np.flatnonzero(owner == number)
        if moved := [p for p in mine.tolist() if base.scores[p] != after.scores[p]]:
            return Outcome(
                name, False, f"document {number} changed with the others, first at its token {moved[0] - start}"
            )
        if kind != "ttt":
            alone = trace(kind, subject, as_validation(tokens[start : start + count + 1]))
            gap = max(abs(base.scores[p][0] - alone.scores[p - start][0]) for p in mine.tolist())
            if gap > SAME_SCORE:
                return Outcome(name, False, f"document {number} packed and alone differ by {gap:.3g} nats")
    return Outcome(name, True, f"{len(validation.documents)} documents")


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


def artifact_alone(folder: Path, script: Path = ROOT / "train_gpt.py", places: Path = ROOT) -> Outcome:
    """Scores the run's artifact in a new process that has the script, the artifact, the tokenizer and the validation
    shards and nothing else; `places` is where the run's relative paths begin."""
    settings, expected = run_settings(folder), json.loads((folder / "result.json").read_text())
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
            return Outcome("artifact_alone", False, f"exit status {done.returncode}: {last}")
        found = json.loads(result.read_text())
    if found["val_bpb"] != expected["val_bpb"]:
        return Outcome("artifact_alone", False, f"val_bpb {found['val_bpb']}, the run has {expected['val_bpb']}")
    return Outcome("artifact_alone", True, f"val_bpb {found['val_bpb']:.8f} in a new process, bit-identical")


# ------------------------------------------------------------------------------------------------------------
# MAIN
# ------------------------------------------------------------------------------------------------------------


def probe_config(config: tg.Config) -> tg.Config:
    """The settings of a run with short contexts, batches and chunks, so that a short stream has documents of many
    contexts, several batches and two global phases; what a token's score may depend on does not follow from sizes."""
    context, chunk = min(config.eval_seq_len, 32), min(config.ttt_chunk_size, 16)
    sizes = dict(eval_seq_len=context, eval_stride=min(config.eval_stride, 8), ttt_eval_seq_len=context)
    sizes |= dict(ttt_chunk_size=chunk, ttt_batch_size=3, phased_ttt_prefix_docs=6, phased_ttt_num_phases=2)
    sizes |= dict(ttt_chunk_tokens=64, ttt_batch_seqs=1, eval_max_seconds=0.0)  # no clock decides about chunks
    steps = ",".join(f"{64 * (i + 1)}:{min(step, chunk)}" for i, (_, step) in enumerate(config.chunk_steps))
    return dataclasses.replace(config, **sizes, ttt_chunk_steps=steps, compile="0", global_ttt_chunk_tokens=2 * context)


LENGTHS = [291, 3, 50, 17, 41, 1, 33, 45, 20]  # targets of the documents of the probes' stream


def planned(subject: Subject) -> dict[str, Callable[[], Outcome]]:
    """Every probe that needs no files, by name."""
    size, config = subject.config.vocab_size, subject.config
    tokens = unique_stream(LENGTHS, size)
    # In chunks with and without learned adapters, in windows with and without a beginning, before and after the phases.
    places = (5, 100, 285, 300, 340, 480)
    if config.ngram_tilt_enabled:
        tokens = repeating_stream(LENGTHS, size, config.token_order, inside=bool(config.document_orders))
        hints = stream_hints(as_validation(tokens), subject)[:, 0].numpy()
        right = np.flatnonzero(hints == tokens)
        places = (*places, *right[[0, len(right) // 2, -1]].tolist()) if len(right) else places
    few = np.random.default_rng(3).integers(4, 10, 161)
    few[132:161] = few[102:131]  # what comes back is hinted at
    few[[0, 31]] = tg.BOS_ID  # the second document is longer than four contexts
    many = np.random.default_rng(4).integers(4, size, 2301)
    many[np.cumsum([0, 1100, 3, 700, 1, 290])] = tg.BOS_ID
    probes: dict[str, Callable[[], Outcome]] = {}
    for kind in KINDS:
        probes[f"causality, {kind}"] = functools.partial(causality, kind, subject, tokens, places)
        probes[f"single_pass, {kind}"] = functools.partial(single_pass, kind, subject, many)
        if config.varlen_attn:  # else windows run across documents, and that is what they are there for
            probes[f"isolation, {kind}"] = functools.partial(isolation, kind, subject, tokens)
        probes[f"normalisation, {kind}"] = functools.partial(normalisation, kind, subject, few, (20, 150))
    probes["hints"] = functools.partial(hints_before, subject, tokens, places)
    probes["score_before_update"] = functools.partial(score_before_update, subject, tokens)
    if config.ttt_kind == "lora_phased" and config.varlen_attn:
        probes["fresh_start"] = functools.partial(fresh_start, subject, tokens)
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
