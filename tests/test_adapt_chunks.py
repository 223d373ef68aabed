"""ADAPT, learning chunk by chunk: equal to a slow loop, score first, and the illegal order that must be called so."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FEW_VISITS, evaluation_of, nll_per_target, random_model, toy_config, validation_of_lengths
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_gpt as tg

RUN = tg.Run()
LENGTHS = [37, 8, 1, 20, 61, 7, 90, 16, 24, 3, 33, 12, 40, 2, 17, 25, 31]


def chunk_config(**changes: Any) -> tg.Config:
    """Chunks of 96 targets, so that the stream has five; updates on up to two windows."""
    settings = dict(
        TTT_KIND="chunk_sgd", TTT_CHUNK_TOKENS=96, TTT_LR=0.05, TTT_EPOCHS=2, EVAL_STRIDE=8, TTT_BATCH_SEQS=1
    )
    return toy_config(**FEW_VISITS | settings | changes)


def stretches_of(validation: tg.Validation, config: tg.Config) -> list[tuple[int, int]]:
    """(first input, number of targets) of what windows may not leave."""
    whole = [(0, len(validation.tokens) - 1)]
    return [tuple(row) for row in validation.documents.tolist()] if config.varlen_attn else whole


def slow_chunks(model: tg.GPT, validation: tg.Validation, config: tg.Config) -> np.ndarray:
    """The published procedure with one window per forward call; the model comes out as it has learned."""
    T, d, size, tokens = config.eval_seq_len, config.eval_stride, config.ttt_chunk_tokens, validation.tokens
    plan, nll = tg.layer_plan(config, True), np.full(len(tokens), np.nan)
    losses = lambda begin, end: model(tokens[begin:end][None], tokens[begin + 1 : end + 1][None], plan)[0]
    windows = []  # (first input, first scored input, end)
    for start, count in stretches_of(validation, config):
        for begin in range(0, max(count - (T - d), 1), d):
            first = begin + T - d if begin else 0
            windows.append((start + begin, start + first, start + min(begin + T, count)))
    chunks: dict[int, list] = {}
    for window in windows:
        chunks.setdefault(window[1] // size, []).append(window)
    parameters = list(model.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = 0
    for number, chunk in enumerate(chunks.values()):
        with torch.no_grad():
            for begin, scored, end in chunk:
                nll[scored + 1 : end + 1] = losses(begin, end)[scored - begin :].numpy()
        if number == len(chunks) - 1:
            break
        lr = config.ttt_lr * 0.5 * (1 + math.cos(math.pi * number / (len(chunks) - 1)))
        low, high, rows = chunk[0][1], chunk[-1][2], []
        for start, count in stretches_of(validation, config):
            for begin in range(max(start, low), min(start + count, high), T):
                rows.append((begin, min(begin + T, start + count, high)))
        for _ in range(config.ttt_epochs):
            for i in range(0, len(rows), 8 * config.ttt_batch_seqs):
                part = rows[i : i + 8 * config.ttt_batch_seqs]
                loss = sum(losses(b, e).sum() for b, e in part) / sum(e - b for b, e in part)
                gradients = torch.autograd.grad(loss, parameters)
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
                steps += 1
                with torch.no_grad():
                    for p, g, m, v in zip(parameters, gradients, first, second):
                        g = g * min(1.0, config.global_ttt_grad_clip / norm)
                        if config.chunk_ttt_optimizer == "sgd":
                            m.mul_(config.ttt_momentum).add_(g)
                            p.sub_(lr * m)
                        else:
                            m.mul_(0.9).add_(0.1 * g)
                            v.mul_(0.999).add_(0.001 * g * g)
                            p.sub_(lr * (m / (1 - 0.9**steps)) / ((v / (1 - 0.999**steps)).sqrt() + 1e-8))
    return nll


@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.05), ("adamw", 0.002)])
@pytest.mark.parametrize("varlen", [0, 1])
def test_learning_in_chunks_equals_a_slow_loop(optimizer: str, lr: float, varlen: int) -> None:
    """Scores of all targets and the final weights: score a chunk, learn from it for some epochs, take the next."""
    kind = dict(CHUNK_TTT_OPTIMIZER=optimizer, TTT_LR=lr, TTT_MOMENTUM=0.8)
    config = chunk_config(VARLEN_ATTN=varlen, EVAL_STRIDE=16, **kind)
    validation = validation_of_lengths(LENGTHS)
    fast, slow = random_model(config), random_model(config)
    found = nll_per_target(validation, lambda v: tg.adapt_chunks(evaluation_of(fast, v, config)))
    wanted = slow_chunks(slow, validation, config)
    assert not np.isnan(wanted[1:]).any()
    bare = nll_per_target(validation, lambda v: evaluation_of(random_model(config), v, config).score(16))
    assert np.abs(bare[200:] - wanted[200:]).mean() > 0.05  # it does learn
    # AdamW's first steps are the signs of gradients, so that rounding is seen in weights whose gradient is near zero.
    np.testing.assert_allclose(found[1:], wanted[1:], atol=1e-3 if optimizer == "sgd" else 0.02)
    for (name, p), q in zip(fast.named_parameters(), slow.parameters()):
        assert (p - q).abs().mean() < (1e-4 if optimizer == "sgd" else 1e-3), name


def watched_updates(validation: tg.Validation, config: tg.Config) -> tuple[tg.Tally, list[float]]:
    """An evaluation in chunks, and the learning rate of each of its weight updates."""
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        return tg.adapt_chunks(evaluation_of(random_model(config), validation, config)), rates
    finally:
        handle.remove()


def test_learning_rate_falls_along_half_a_cosine_over_the_chunks() -> None:
    """The same rate for all epochs of a chunk; the first chunk has the whole, the last one, were it trained, none."""
    validation = validation_of_lengths([479])
    config = chunk_config(VARLEN_ATTN=0, TTT_EPOCHS=3)
    tally, rates = watched_updates(validation, config)
    assert len(rates) == 4 * 3  # five chunks, of which four teach; three windows of 32 make one update
    wanted = [0.05 * 0.5 * (1 + math.cos(math.pi * chunk / 4)) for chunk in range(4) for _ in range(3)]
    assert rates == pytest.approx(wanted) and rates[0] == 0.05
    assert tally.learned == 4 * 96 * 3 and tally.learned_early == 0


@pytest.mark.parametrize("targets, chunks", [(96, 1), (97, 2), (192, 2), (1, 1)])
def test_the_last_chunk_is_not_learned_from(targets: int, chunks: int) -> None:
    """A stream of one chunk leaves the weights alone; whatever the length, all chunks but the last one are learned."""
    validation, config = validation_of_lengths([targets]), chunk_config(VARLEN_ATTN=0, TTT_EPOCHS=1)
    tally, rates = watched_updates(validation, config)
    assert len(rates) == chunks - 1 and tally.learned == 96 * (chunks - 1) and tally.tokens == targets


def test_updates_take_so_many_windows_at_once() -> None:
    """TTT_BATCH_SEQS windows for each of eight ranks are one update, whatever the number of ranks."""
    validation, rare = validation_of_lengths([1025]), dict(TTT_CHUNK_TOKENS=1024, EVAL_STRIDE=32)
    for sequences, updates in ((1, 4), (2, 2), (3, 2), (32, 1)):  # 32 windows of 32 inputs in the first of two chunks
        config = chunk_config(VARLEN_ATTN=0, TTT_EPOCHS=1, TTT_BATCH_SEQS=sequences, **rare)
        assert len(watched_updates(validation, config)[1]) == updates


def test_without_a_rate_chunks_are_sliding_scores() -> None:
    """TTT_LR=0 scores each target as the sliding evaluation does."""
    validation, config = validation_of_lengths(LENGTHS), chunk_config(TTT_LR=0)
    chunked = nll_per_target(validation, lambda v: tg.adapt_chunks(evaluation_of(random_model(config), v, config)))
    sliding = nll_per_target(validation, lambda v: evaluation_of(random_model(config), v, config).score(8))
    np.testing.assert_allclose(chunked[1:], sliding[1:], atol=1e-5)


def test_a_chunk_is_scored_before_it_is_learned_from() -> None:
    """Replacing the tokens from p on changes no score before p, in the same chunk too; it does change later chunks."""
    config = chunk_config(VARLEN_ATTN=0)
    validation = validation_of_lengths([400])
    scored = lambda v: nll_per_target(v, lambda v: tg.adapt_chunks(evaluation_of(random_model(config), v, config)))
    before = scored(validation)
    for p in (60, 96, 97, 380):
        tokens = validation.tokens.clone()
        tokens[p] = 4 + (tokens[p] - 3) % 60
        after = scored(validation._replace(tokens=tokens))
        assert np.array_equal(after[1:p], before[1:p]) and after[p] != before[p]
        if p < 290:  # not in the last chunk
            assert np.abs(after[300:] - before[300:]).max() > 1e-6


def test_learning_from_what_is_not_scored_stops_the_run() -> None:
    """learn_chunk() refuses a span with one unscored target, before any weight moves."""
    config, validation = chunk_config(), validation_of_lengths([100])
    evaluation = evaluation_of(model := random_model(config), validation, config)
    scored = np.ones_like(evaluation.tally.times)
    scored[41] = 0
    before = model.qo_bank.detach().clone()
    with pytest.raises(RuntimeError, match="target 41"):
        tg.learn_chunk(evaluation, tg.chunk_optimizer(model, config), (10, 90), 0.1, scored)
    assert torch.equal(model.qo_bank, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_illegal_order_gains_and_is_counted(optimizer: str) -> None:
    """pre_eval_illegal learns from all targets before their score: each once a pass, each scored once, and cheaper."""
    rate = 0.05 if optimizer == "sgd" else 0.003
    config = chunk_config(TTT_KIND="pre_eval_illegal", TTT_EPOCHS=3, CHUNK_TTT_OPTIMIZER=optimizer, TTT_LR=rate)
    validation = validation_of_lengths(LENGTHS)
    cheat = tg.TTT_KINDS["pre_eval_illegal"](evaluation_of(random_model(config), validation, config))
    honest = dataclasses.replace(config, ttt_kind="chunk_sgd")
    fair = tg.TTT_KINDS["chunk_sgd"](evaluation_of(random_model(config), validation, honest))
    assert cheat.learned_early == 3 * sum(LENGTHS) and cheat.learned == 0 == fair.learned_early
    assert cheat.tokens == fair.tokens == sum(LENGTHS) and cheat.times.max() == 1
    assert cheat.loss < fair.loss - 0.05
