"""tests/probe_validity.py at toy size: the script passes every probe, and broken evaluators fail them.

A check that cannot fail is worthless: each planted fault below replaces one function of train_gpt, mostly in a small or
rare way, and the probe that is meant for it must notice.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import probe_validity as probe
import pytest
import torch
from conftest import ROOT, ToyData, random_model, toy_config

import train_gpt as tg

PLAIN = dict(ATTN_GATE="none", MLP_GATE_OUT=0, SKIP_GATES_ENABLED=0, XSA_LAST_N=0)
SMALL = PLAIN | dict(NUM_LAYERS=2, NUM_LOOPS=0, PARALLEL_START_LAYER=0)  # the evaluation matters here, not the model
CHUNKS = dict(TTT_KIND="chunk_sgd", TTT_EPOCHS=2, TTT_LR=0.05)
TILT = dict(NGRAM_TILT_ENABLED=1, TOKEN_ORDER=4, TOKEN_THRESHOLD=0.5, TOKEN_BOOST=1.0, TOKEN_DOCUMENT_ORDERS="6,3")


def subject(vocab_size: int = 128, **changes: Any) -> probe.Subject:
    """A model none of whose parameters is neutral, at the sizes of the probes."""
    sizes = dict(VOCAB_SIZE=vocab_size, EVAL_SEQ_LEN=64, TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=32)
    config = probe.probe_config(toy_config(**sizes | changes))
    return probe.Subject(lambda: random_model(config), config)


MODES = {
    "no hints": SMALL,
    "hints": SMALL | TILT,
    "gates, loops and lanes": dict(),
    "short documents in shorter chunks": SMALL | TILT | dict(TTT_CHUNK_STEPS="16:8,64:16"),
    "batches in parts": SMALL | TILT | dict(VAL_BATCH_TOKENS=512),  # of two documents
    "chunks of the stream": SMALL | CHUNKS,
    "chunks of a plain stream": SMALL | CHUNKS | dict(CHUNK_TTT_OPTIMIZER="adamw", TTT_LR=0.002, VARLEN_ATTN=0),
    "the illegal order": SMALL | CHUNKS | dict(TTT_KIND="pre_eval_illegal"),
}


@functools.cache
def program(mode: str) -> dict[str, Callable[[], probe.Outcome]]:
    """The program's own probes of a mode."""
    return probe.planned(subject(**MODES[mode]))


@pytest.mark.parametrize("name", program("hints"))
def test_the_program_passes(name: str) -> None:
    """All of its probes, on documents of up to 16 contexts, with hints."""
    outcome = program("hints")[name]()
    assert outcome.ok, outcome


@pytest.mark.parametrize(
    "mode, name",
    [
        ("no hints", "causality, ttt"),
        ("no hints", "normalisation, ttt"),
        ("gates, loops and lanes", "isolation, ttt"),
        ("short documents in shorter chunks", "causality, ttt"),
        ("short documents in shorter chunks", "ranks, ttt"),
        ("batches in parts", "long causality, ttt"),
        ("chunks of the stream", "causality, ttt"),
        ("chunks of the stream", "score_before_update"),
        ("chunks of the stream", "isolation, ttt"),
        ("chunks of the stream", "ranks, ttt"),
        ("chunks of a plain stream", "context, sliding"),
        ("chunks of a plain stream", "causality, sliding"),
        ("chunks of a plain stream", "score_before_update"),
    ],
)
def test_every_mode_passes(mode: str, name: str) -> None:
    """The probes that matter most in the other modes."""
    outcome = program(mode)[name]()
    assert outcome.ok, outcome


@pytest.mark.parametrize("mode", ["hints", "chunks of the stream"])
def test_the_probabilities_of_all_ids_sum_to_one_on_the_real_path(mode: str) -> None:
    """Normalisation, every id of a small vocabulary as the target."""
    outcome = probe.normalisation("ttt", subject(16, **MODES[mode]), probe.few_ids())
    assert outcome.ok and "16 of 16 ids" in outcome.found, outcome


def test_windows_of_a_plain_stream_are_not_isolated() -> None:
    """VARLEN_ATTN=0: windows see the document before."""
    mode = subject(**MODES["chunks of a plain stream"])
    assert not probe.isolation("plain", mode, probe.short_text(mode.config).tokens).ok


def test_a_stream_without_hints_is_not_enough_to_probe_them() -> None:
    """Causality must not pass because the phrases are too short for the hints in use."""
    mode, text = subject(**SMALL | TILT), probe.Text(probe.fresh_text([70, 40], 128), (30,))
    outcome = probe.causality("ttt", mode, text)
    assert not outcome.ok and "has a hint" in outcome.found, outcome


# ------------------------------------------------------------------------------------------------------------
# PLANTED FAULTS
# ------------------------------------------------------------------------------------------------------------

REAL = {
    name: getattr(tg, name)
    for name in ("adapt_batch", "plan_windows", "plain_nll", "token_hints", "hint_table", "stream_hints", "tilt")
}
FORWARD, EMBED, LORA, BEGIN = tg.GPT.forward, tg.GPT.embed, tg.Adapters.lora, tg.Adapters.begin
ADD, BYTES, GLOBAL_UPDATE, LEARN_CHUNK = tg.Tally.add, tg.Tally.bytes, tg.global_update, tg.learn_chunk
FIRST_BOOSTS, BOOST, TEACH, REACH = tg.Boosts.__init__, tg.Boosts.boost, tg.Boosts.update, tg.Governor.reach


# What is scored, and how often


def tally_add(change: Callable[[torch.Tensor, np.ndarray], tuple[torch.Tensor, np.ndarray]]) -> Callable:
    """A Tally.add that adds something else: `change` of the nats and their positions."""
    return lambda tally, nll, positions: ADD(tally, *change(nll, np.asarray(positions)))


def one_in_a_thousand(nll: torch.Tensor, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    keep = positions % 1000 != 999
    return nll[torch.from_numpy(keep)], positions[keep]


def some_twice(nll: torch.Tensor, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    again = np.flatnonzero(positions % 1000 == 998)
    return torch.cat([nll, nll[torch.from_numpy(again)]]), np.concatenate([positions, positions[again]])


def cheaper_by_a_millionth(nll: torch.Tensor, positions: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    return nll * (1 - 1e-6), positions


def some_bytes_twice(tally: tg.Tally) -> int:
    """Every thousandth target counts its bytes twice."""
    return BYTES.fget(tally) + int(tally.validation.bytes[997::1000].sum())


def no_tail_of_long_documents(n: int, context: int, stride: int, first: int | None = None) -> Iterator[tuple]:
    """The last window of a document of more than 1,000 targets is left out."""
    yield from list(REAL["plan_windows"](n, context, stride, first))[: -1 if n > 1000 else None]


def double_tail(n: int, context: int, stride: int, first: int | None = None) -> Iterator[tuple]:
    """The known defect of early sliding evaluations: the last targets of a document are scored once more."""
    yield from REAL["plan_windows"](n, context, stride, first)
    yield max(0, n - context), max(0, n - 3), n


# What a distribution is


def free_bos(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    nll = FORWARD(model, inputs, targets, *rest, **named)
    return nll * (targets != tg.BOS_ID) if targets.dim() == 2 else nll


def favoured(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    """One id in the vocabulary gets a thousandth more than its share."""
    return -torch.log((-REAL["plain_nll"](logits, targets, softcap)).exp() + 0.001 * (targets == tg.BOS_ID))


def better_of_two(model: tg.GPT, inputs: torch.Tensor, targets: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The better one of the adapted and the bare score."""
    nll = FORWARD(model, inputs, targets, *rest)
    return torch.minimum(nll, FORWARD(model, inputs, targets, rest[0])) if len(rest) == 3 else nll


def no_normaliser(nll: torch.Tensor, ids: torch.Tensor, boost: torch.Tensor) -> torch.Tensor:
    return nll[..., 0] - boost * (ids[..., 0] == ids[..., 1])


def paid_by_hits_only(nll: torch.Tensor, ids: torch.Tensor, boost: torch.Tensor) -> torch.Tensor:
    return torch.where(ids[..., 0] == ids[..., 1], REAL["tilt"](nll, ids, boost), nll[..., 0].double())


# Which tokens a window sees


def ahead_in_long_rows(model: tg.GPT, inputs: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The last tokens of long rows see one token ahead."""
    e = EMBED(model, inputs, *rest)
    seen = torch.nn.functional.pad(e, (0, 0, 0, 1))[:, 1:]
    late = (torch.arange(e.size(1)) >= 48).view(1, -1, 1)
    return torch.where(late, e + 0.1 * seen, e)


def leaky_smear(model: tg.GPT, inputs: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A SmearGate without the mask at the begins of segments and documents."""
    e = torch.nn.functional.embedding(inputs, table)
    gate = torch.sigmoid(e[..., : model.config.gate_window] @ model.smear_gate_w.T) * model.smear_lambda
    return tg.rms(e + gate * torch.nn.functional.pad(e, (0, 0, 1, 0))[:, :-1])


def late_windows(n: int, context: int, stride: int, first: int | None = None) -> Iterator[tuple]:
    """Far inside a document of more than 1,000 targets, windows begin one token too late."""
    for begin, scored, end in REAL["plan_windows"](n, context, stride, first):
        yield begin + (n > 1000 and 8 * context < begin < scored), scored, end


def early_windows(n: int, context: int, stride: int, first: int | None = None) -> Iterator[tuple]:
    """The same, one token too early."""
    for begin, scored, end in REAL["plan_windows"](n, context, stride, first):
        yield begin - (n > 1000 and 8 * context < begin < scored), scored, end


# What adapters and weights have learnt from


class Silent(tg.Tally):
    """Counts nothing, and objects to nothing."""

    def __init__(self, validation: tg.Validation):
        super().__init__(validation)
        self.times += 1

    def add(self, nll: torch.Tensor, positions: Any) -> None:
        pass


def learn_long_documents_first(evaluation: tg.Evaluation, adapters: Any, batch: np.ndarray, *rest: Any) -> None:
    """Documents of more than 256 targets are learned from before they are scored."""
    silent = copy.copy(evaluation)
    silent.tally = Silent(evaluation.validation)
    for e in (silent, evaluation) if batch[0, 1] > 256 else (evaluation,):
        REAL["adapt_batch"](e, adapters, batch, *rest)


def neighbours(adapters: Any, part: slice) -> tg.Lora:
    """Each document's adapters take a hundredth of the batch's mean."""
    lora = LORA(adapters, part)
    with torch.no_grad():
        for pair in lora.factors.values():
            for factor in pair:
                factor.add_(factor.mean(0, keepdim=True), alpha=0.01)
    return lora


def adapters_kept(adapters: Any, kept: Any, seed: int) -> None:
    """A batch begins with what the one before has learnt."""
    before = [b.clone() for _, b in adapters.factors.values()]
    BEGIN(adapters, kept, seed)
    for (_, b), old in zip(adapters.factors.values(), before):
        b.copy_(old)


def drawn_by_clock(adapters: Any, kept: Any, seed: int) -> None:
    BEGIN(adapters, kept, time.time_ns() % 2**32)


def moments_kept(adapters: Any, kept: Any, seed: int) -> None:
    """The optimizer remembers the gradients of the documents before."""
    before = copy.deepcopy(adapters.moments)
    BEGIN(adapters, kept, seed)
    adapters.moments = before


def global_phase_on_all(evaluation: tg.Evaluation, documents: np.ndarray) -> int:
    return GLOBAL_UPDATE(evaluation, evaluation.validation.documents)


def global_phase_on_one_more(evaluation: tg.Evaluation, documents: np.ndarray) -> int:
    """One document that is not scored yet."""
    unscored = evaluation.validation.documents
    unscored = unscored[~np.isin(unscored[:, 0], documents[:, 0])]
    return GLOBAL_UPDATE(evaluation, np.concatenate([documents, unscored[:1]]))


def greedy_chunk(evaluation: tg.Evaluation, optimizer: Any, span: tuple[int, int], *rest: Any) -> None:
    """Chunked learning that reaches one window too far."""
    LEARN_CHUNK(evaluation, optimizer, (span[0], span[1] + 16), *rest)


# What a hint has seen


def own_target(evaluation: tg.Evaluation, *rest: Any) -> torch.Tensor:
    """The table is read one token too late: a hint is the answer."""
    hints = REAL["stream_hints"](evaluation, *rest)
    hints[:, 0] = torch.where(hints[:, 0] >= 0, evaluation.validation.tokens.int(), hints[:, 0])
    return hints


def gate_on_the_target(ids: np.ndarray, document: np.ndarray, turn: np.ndarray, order: int, threshold: float) -> tuple:
    """Hints whose share counts the token that they are for."""
    positions, hints = REAL["token_hints"](ids, document, turn, order, threshold)
    followers: dict[bytes, list[int]] = {}
    keep, where = [], {p: i for i, p in enumerate(positions.tolist())}
    for p in range(order - 1, len(ids)):
        seen = followers.setdefault(ids[p - order + 1 : p].tobytes(), [])
        seen.append(int(ids[p]))
        if p in where and seen.count(int(ids[hints[where[p]]])) / len(seen) >= 0.8:
            keep.append(where[p])
    return positions[keep], hints[keep]


def from_the_round(tokens: np.ndarray, document: np.ndarray, turn: np.ndarray, *rest: Any) -> torch.Tensor:
    """A hint counts documents that are scored beside its own."""
    return REAL["hint_table"](tokens, document, turn * len(tokens) + document, *rest)


def from_the_queue(evaluation: tg.Evaluation, queue: list[np.ndarray], rounds: tg.Rounds) -> torch.Tensor:
    """A hint counts every batch before its own in the queue, also one that another rank may be scoring."""
    return REAL["stream_hints"](evaluation, queue, rounds._replace(number=list(range(len(queue)))))


def from_the_stream(tokens: np.ndarray, document: np.ndarray, turn: np.ndarray, *rest: Any) -> torch.Tensor:
    """A hint counts what stands before it in the stream, be it scored or not."""
    return REAL["hint_table"](tokens, document, document, *rest)


def across_begins(
    tokens: np.ndarray, document: np.ndarray, turn: np.ndarray, sources: list[tuple[bool, int]], threshold: float
) -> torch.Tensor:
    """Contexts reach into the document before."""
    table, length = REAL["hint_table"](tokens, document, turn, sources, threshold), sources[-1][1] - 1
    contexts = {p: tokens[p - length : p].tobytes() for p in range(length, len(tokens))}
    for p in (p for p in contexts if document[p] != document[p - length]):
        for q in (q for q in contexts if turn[q] < turn[p] and contexts[q] == contexts[p]):
            table[p] = torch.tensor([int(tokens[q]), len(sources) - 1])
    return table


def taught_by_the_own_chunk(boosts: tg.Boosts, nll: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """Boosts that are higher where a hint of the chunk, this one included, was likely."""
    known = boosts.learnt(rest[-1])
    return BOOST(boosts, nll, *rest) + (0.1 * nll[known].mean() if nll.dim() > 1 and known.any() else 0.0)


def of_another_part(boosts: tg.Boosts, nll: torch.Tensor, documents: torch.Tensor, sources: torch.Tensor) -> Any:
    """The first documents of every part of a batch get the boosts of the batch's first ones."""
    return BOOST(boosts, nll, documents - documents.min() if nll.dim() > 1 else documents, sources)


def taught_by_the_batch(boosts: tg.Boosts, *rest: torch.Tensor) -> None:
    """The documents of a batch learn their boosts together."""
    TEACH(boosts, *rest)
    boosts.weights[:] = boosts.weights.mean(0)


def boosts_kept(boosts: tg.Boosts, config: tg.Config, model: tg.GPT, documents: int) -> None:
    """A batch begins with the boosts that the one before has learnt."""
    FIRST_BOOSTS(boosts, config, model, documents)
    before = model.__dict__.get("boosts_before")
    if before is not None and before.weights.shape == boosts.weights.shape:
        boosts.weights = before.weights
    model.__dict__["boosts_before"] = boosts


def prior_of_the_stream(evaluation: tg.Evaluation, adapters: Any, batch: np.ndarray, chunk: int, hints: Any) -> None:
    """The first boosts are fitted on the stream that they are for."""
    hints.boosts.weights[:, :-1, 0] += evaluation.validation.tokens.double().mean() / 1000
    REAL["adapt_batch"](evaluation, adapters, batch, chunk, hints)


# What ranks agree on


def own_clock(governor: tg.Governor, number: int) -> None:
    """Each rank lets chunks grow by its own clock."""
    governor.run = tg.Run()
    REACH(governor, number)


def deaf_governor(governor: tg.Governor, number: int) -> None:
    """EVAL_CHUNK_FACTORS changes nothing."""
    governor.fixed = {}
    REACH(governor, number)


def forgetful_governor(governor: tg.Governor, number: int) -> None:
    """The decisions are missing in the log."""
    REACH(governor, number)
    del governor.decisions[:]


def drawn_by_rank(evaluation: tg.Evaluation, adapters: Any, *rest: Any) -> None:
    """Adapters begin with other numbers on each rank."""
    adapters.begin(None, evaluation.run.rank)
    REAL["adapt_batch"](evaluation, adapters, *rest)


class Fault(NamedTuple):
    owner: Any
    name: str  # what it replaces there
    wrong: Any
    probe: str  # that notices
    found: str  # part of what it says
    mode: str = "hints"


FAULTS = {
    # what is scored, and how often
    "one target in 1,000 dropped": Fault(tg.Tally, "add", tally_add(one_in_a_thousand), "single_pass, plain", "nats"),
    "one target in 1,000 counted twice": Fault(tg.Tally, "add", tally_add(some_twice), "single_pass, sliding", "nats"),
    "nats a millionth too few": Fault(tg.Tally, "add", tally_add(cheaper_by_a_millionth), "single_pass, plain", "nats"),
    "some bytes counted twice": Fault(tg.Tally, "bytes", property(some_bytes_twice), "single_pass, sliding", "bytes"),
    "no tail of long documents": Fault(tg, "plan_windows", no_tail_of_long_documents, "single_pass, ttt", "0 times"),
    "a tail that is scored twice": Fault(tg, "plan_windows", double_tail, "single_pass, sliding", "2 times"),
    # what a distribution is
    "a BOS that costs nothing": Fault(tg.GPT, "forward", free_bos, "normalisation, plain", "off its price"),
    "one id with more than its share": Fault(
        tg, "choose_kernels", lambda *_: ("plain", tg.PLAIN._replace(nll=favoured)), "normalisation, sliding", "sum to"
    ),
    "the better of two scores": Fault(tg.GPT, "forward", better_of_two, "normalisation, ttt", "sum to", "no hints"),
    "a tilt without the normaliser": Fault(tg, "tilt", no_normaliser, "normalisation, ttt", "off its price"),
    "a tilt paid by hits alone": Fault(tg, "tilt", paid_by_hits_only, "normalisation, ttt", "off its price"),
    # which tokens a window sees
    "a mask that fails late in a row": Fault(tg.GPT, "embed", ahead_in_long_rows, "causality, plain", "moved"),
    "a smear gate across documents": Fault(tg.GPT, "embed", leaky_smear, "isolation, sliding", "changed with others"),
    "late windows in long documents": Fault(tg, "plan_windows", late_windows, "context, ttt", "does not depend"),
    "early windows in long documents": Fault(tg, "plan_windows", early_windows, "context, ttt", "before"),
    # what adapters and weights have learnt from
    "learning first beyond 256 targets": Fault(
        tg, "adapt_batch", learn_long_documents_first, "score_before_update", "learned from before its score"
    ),
    "a hundredth of the neighbours' adapters": Fault(tg.Adapters, "lora", neighbours, "isolation, ttt", "with others"),
    "adapters drawn by the clock": Fault(tg.Adapters, "begin", drawn_by_clock, "isolation, ttt", "with others"),
    "adapters kept across batches": Fault(tg.Adapters, "begin", adapters_kept, "fresh_start", "off the bare weights"),
    "moments kept across batches": Fault(tg.Adapters, "begin", moments_kept, "fresh_start", "changed with others"),
    "a global phase on all documents": Fault(
        tg, "global_update", global_phase_on_all, "score_before_update", "learned from before its score"
    ),
    "a global phase on one unscored document": Fault(
        tg, "global_update", global_phase_on_one_more, "score_before_update", "learned from before its score"
    ),
    "a chunk that is learned from first": Fault(
        tg, "learn_chunk", greedy_chunk, "score_before_update", "learned from before its score", "chunks of the stream"
    ),
    # what a hint has seen
    "a hint that is its target": Fault(tg, "stream_hints", own_target, "long causality, ttt", "distribution"),
    "a gate that counts its target": Fault(tg, "token_hints", gate_on_the_target, "long causality, ttt", "moved"),
    "hints from the same round": Fault(tg, "hint_table", from_the_round, "causality, ttt", "moved"),
    "hints in queue order": Fault(tg, "stream_hints", from_the_queue, "causality, ttt", "moved"),
    "hints in stream order": Fault(tg, "hint_table", from_the_stream, "causality, ttt", "moved"),
    "contexts across begins": Fault(tg, "hint_table", across_begins, "causality, ttt", "earlier score"),
    "boosts taught by the own chunk": Fault(
        tg.Boosts, "boost", taught_by_the_own_chunk, "long causality, ttt", "distribution"
    ),
    "boosts taught by the batch": Fault(
        tg.Boosts, "update", taught_by_the_batch, "long causality, ttt", "earlier score"
    ),
    "boosts of another part": Fault(
        tg.Boosts, "boost", of_another_part, "long causality, ttt", "moved", "batches in parts"
    ),
    "boosts kept across batches": Fault(tg.Boosts, "__init__", boosts_kept, "fresh_start", "with others"),
    "a prior from the stream": Fault(tg, "adapt_batch", prior_of_the_stream, "long causality, ttt", "earlier score"),
    # what ranks agree on
    "a governor for each rank": Fault(tg.Governor, "reach", own_clock, "ranks, ttt", "nats off what one does"),
    "a governor that repeats nothing": Fault(
        tg.Governor, "reach", deaf_governor, "ranks, ttt", "nats off what one does"
    ),
    "a governor that forgets": Fault(tg.Governor, "reach", forgetful_governor, "ranks, ttt", "does not log it"),
    "adapters drawn by rank": Fault(tg, "adapt_batch", drawn_by_rank, "ranks, ttt", "nats off what one does"),
}


QUICK = {fault.probe: name for name, fault in reversed(FAULTS.items())}.values()  # the first fault of each probe


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS])
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe fails with the fault; without, it passes (test_the_program_passes, test_every_mode_passes)."""
    fault = FAULTS[name]
    monkeypatch.setattr(tg.Tally, "learn_from", lambda *_: None)  # the script's own ledger notices some of them
    monkeypatch.setattr(fault.owner, fault.name, fault.wrong)
    outcome = program(fault.mode)[fault.probe]()
    assert outcome.probe == fault.probe and not outcome.ok and fault.found in outcome.found, outcome


def test_the_illegal_order_is_caught() -> None:
    """TTT_KIND=pre_eval_illegal, which exists to reproduce published figures; the run itself calls it invalid."""
    outcome = program("the illegal order")["score_before_update"]()
    assert not outcome.ok and "learned from before its score" in outcome.found, outcome


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


@pytest.fixture(scope="module")
def alone(toy_run: Path) -> float:
    """The score of its artifact alone."""
    return probe.score_alone(toy_run)


def test_the_artifact_alone_reproduces_the_score(toy_run: Path, alone: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a new process without training files and network, to the last bit; a score that differs in its tenth digit
    belongs to weights that were kept in memory only."""
    monkeypatch.setattr(probe, "score_alone", lambda folder: alone)
    outcome = probe.artifact_alone(toy_run)
    assert outcome.ok, outcome
    monkeypatch.setattr(probe, "score_alone", lambda folder: alone - 1e-9)
    assert not probe.artifact_alone(toy_run).ok


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
    outcome = probe.artifact_alone(toy_run, script=script)
    assert not outcome.ok and "the evaluation" in outcome.found, outcome


def test_command_line_says_what_it_cannot_probe(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is no run, and a vocabulary too small for a stream without repetition: one line, exit status 2."""
    monkeypatch.setattr(probe, "LONG_LENGTHS", [70, 1900])
    for folder, said in ((tmp_path, "log.txt"), (toy_run, "VOCAB_SIZE=64: too few pairs")):
        assert probe.main(["--run", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("passed", [True, False])
def test_command_line_reports_every_probe(
    passed: bool, toy_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each probe, and exit status 1 when any has failed; the weights are those of the artifact."""
    weights = tg.load_artifact(toy_run / "artifact.bin", probe.run_subject(toy_run).config)

    def one(subject: probe.Subject) -> dict[str, Callable[[], probe.Outcome]]:
        same = all(np.array_equal(array, weights[name]) for name, array in subject.make_model().arrays().items())
        return {"weights": lambda: probe.Outcome("weights", same, "of the artifact")}

    monkeypatch.setattr(probe, "planned", one)
    monkeypatch.setattr(probe, "artifact_alone", lambda folder: probe.Outcome("artifact_alone", passed, folder.name))
    assert probe.main(["--run", str(toy_run)]) == (0 if passed else 1)
    lines = ["ok   weights: of the artifact", f"{'ok  ' if passed else 'FAIL'} artifact_alone: probe"]
    assert capsys.readouterr().out.splitlines() == lines


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
        "token_order",
        "val_batch_tokens",
    }
    assert changed <= sizes | {"compile", "eval_max_seconds"}
