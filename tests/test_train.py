"""TRAIN: the loop, its restarts and its ranks; and what a user sees when something is wrong."""

import dataclasses
import inspect
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    QUIET,
    ROOT,
    ToyData,
    evaluation_of,
    on_ranks,
    random_model,
    replace_plain,
    train_tokenizer,
    write_shard,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as tg

RUN = tg.Run()


def make_trainer(config: tg.Config, run: tg.Run = RUN) -> tg.Trainer:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return tg.Trainer(config, run, QUIET)


def losses(trainer: tg.Trainer) -> list[float]:
    return [loss for _, loss, _ in trainer.history]


def everything(trainer: tg.Trainer) -> dict[str, torch.Tensor]:
    """A copy of all tensors that training changes."""
    parts = zip(("weights", "average", "optimizer"), trainer.state())
    return {f"{part}/{name}": torch.as_tensor(t).clone() for part, tensors in parts for name, t in tensors.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------


def test_warm_up_is_undone_completely(toy_data: ToyData, tmp_path: Path) -> None:
    """Weights, average, every optimizer buffer and the generator are as before; the real losses are identical."""
    plain = make_trainer(toy_data.config(RUNS_DIR=tmp_path))
    warmed = make_trainer(toy_data.config(RUNS_DIR=tmp_path, WARMUP_STEPS=2))
    before, state = everything(warmed), torch.get_rng_state()
    assert not any(name.startswith("optimizer/adamw") for name in before)
    warmed.warm_up()
    assert same(before, everything(warmed)) and torch.equal(state, torch.get_rng_state())
    assert (warmed.step, warmed.elapsed, warmed.looping, warmed.history) == (0, 0.0, False, [])
    plain.loop()
    warmed.loop()
    assert losses(plain) == losses(warmed) and len(losses(plain)) == 6
    assert same(everything(plain), everything(warmed))


def test_planted_momentum_that_survives_the_warm_up_is_noticed(toy_data: ToyData, tmp_path: Path) -> None:
    """When the Muon buffers are not restored, the losses of the check above differ."""
    plain, warmed = (make_trainer(toy_data.config(RUNS_DIR=tmp_path, WARMUP_STEPS=w)) for w in (0, 2))
    warmed.optimizer.muon.load = lambda arrays: None
    warmed.warm_up()
    plain.loop()
    warmed.loop()
    assert losses(plain)[0] == losses(warmed)[0] and losses(plain)[1:] != losses(warmed)[1:]


def test_average_follows_its_recursion(toy_data: ToyData, tmp_path: Path) -> None:
    """After each step average = decay * average + (1 - decay) * weights, starting from the initial weights."""
    trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, EMA_DECAY=0.8))
    slow = [parameter.detach().double().clone() for parameter in trainer.model.parameters()]
    for step in range(3):
        trainer.update(trainer.step_rows(step), step == 2, 1.0, 0.9)
        slow = [
            0.8 * kept + 0.2 * parameter.detach().double() for kept, parameter in zip(slow, trainer.model.parameters())
        ]
    for kept, expected in zip(trainer.average, slow):
        torch.testing.assert_close(kept.double(), expected, atol=1e-6, rtol=1e-5)
    trainer.use_average()
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(trainer.model.parameters(), trainer.average))


def test_without_an_average_the_last_weights_are_kept(toy_data: ToyData, tmp_path: Path) -> None:
    """EMA_DECAY=0: what is quantised are the weights as the last step left them."""
    trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, EMA_DECAY=0))
    trainer.loop()
    last = {name: array.copy() for name, array in trainer.model.arrays().items()}
    trainer.use_average()
    assert all(np.array_equal(array, last[name]) for name, array in trainer.model.arrays().items())


SWA = dict(EMA_DECAY=0, SWA_ENABLED=1, SWA_START_FRAC=0.6, WARMDOWN_FRAC=1, MIN_LR=0, WARMUP_STEPS=1, ITERATIONS=10)


def watched_loop(trainer: tg.Trainer) -> list[dict[str, Any]]:
    """Runs the loop; of each step its number, what it was made with, by name, and the weights behind it."""
    seen, real = [], trainer.update

    def update(*arguments: Any, **named: Any) -> Any:
        given = inspect.signature(real).bind(*arguments, **named).arguments
        numbers = real(*arguments, **named)
        weights = {name: p.detach().double().clone() for name, p in trainer.model.named_parameters()}
        seen.append(given | {"step": trainer.step + 1, "weights": weights})
        return numbers

    trainer.update = update
    trainer.loop()
    return seen


@pytest.mark.parametrize("every, wanted", [(1, [6, 7, 8, 9, 10]), (3, [6, 9]), (10, [10])])
def test_swa_is_the_mean_of_the_collected_weights(
    every: int, wanted: list[int], toy_data: ToyData, tmp_path: Path
) -> None:
    """Every SWA_EVERY-th step whose multiplier is below SWA_START_FRAC, each once, the last step too, and no other."""
    trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, **SWA, SWA_EVERY=every))
    trainer.warm_up()  # leaves nothing collected
    seen = watched_loop(trainer)
    chosen = [step for step in seen if step["multiplier"] < 0.6 and step["step"] % every == 0]
    assert [step["step"] for step in chosen] == wanted and trainer.collected == len(wanted)
    trainer.use_average()
    for name, parameter in trainer.model.named_parameters():
        mean = sum(step["weights"][name] for step in chosen) / len(chosen)
        torch.testing.assert_close(parameter.detach().double(), mean, atol=1e-6, rtol=1e-5)
    assert len(wanted) == 1 or not torch.equal(trainer.model.qo_bank.double(), seen[-1]["weights"]["qo_bank"])


def test_swa_that_collects_nothing_keeps_the_last_weights(toy_data: ToyData, tmp_path: Path) -> None:
    """Nothing collected, because the rate never falls or SWA_EVERY never comes: no average of nothing is used."""
    for changes in (dict(WARMDOWN_FRAC=0), dict(SWA_EVERY=50)):
        settings = SWA | dict(ITERATIONS=3, WARMUP_STEPS=0) | changes
        trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, **settings))
        last = watched_loop(trainer)[-1]["weights"]
        trainer.use_average()
        assert not trainer.collected
        assert all(torch.equal(p.double(), last[name]) for name, p in trainer.model.named_parameters())


def test_swa_survives_a_restart(toy_data: ToyData, tmp_path: Path) -> None:
    """A run resumed in the middle of collecting ends with the same mean, bit for bit, and the same count."""
    env = dict(RUNS_DIR=tmp_path, **SWA | dict(SWA_EVERY=1, WARMUP_STEPS=0))
    whole = make_trainer(toy_data.config(**env, RUN_ID="whole"))
    whole.loop()
    first = make_trainer(toy_data.config(**env, RUN_ID="resumed"))
    real = first.update

    def stopping(*arguments: Any) -> Any:
        if first.step == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    first.update = stopping
    with pytest.raises(KeyboardInterrupt):
        first.loop()
    assert first.collected == 3
    first.save_checkpoint()
    resumed = make_trainer(toy_data.config(**env, RUN_ID="resumed"))
    resumed.restore_checkpoint()
    assert resumed.collected == 3
    resumed.loop()
    assert resumed.collected == whole.collected == 5 and same(everything(resumed), everything(whole))


def test_warmdown_in_steps_reaches_the_loop(toy_data: ToyData, tmp_path: Path) -> None:
    """WARMDOWN_ITERS=4 of 10 steps: the full rate seven times, then 3/4, 2/4 and 1/4 of it."""
    settings = dict(ITERATIONS=10, WARMDOWN_FRAC=0, WARMDOWN_ITERS=4, MIN_LR=0)
    seen = watched_loop(make_trainer(toy_data.config(RUNS_DIR=tmp_path, **settings)))
    assert [step["multiplier"] for step in seen] == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])


def test_only_gptq_looks_at_training_data_again(toy_data: ToyData, tmp_path: Path) -> None:
    """The other schemes have no Hessians: none is made, none is in trained.bin, and quantising needs none."""
    for scheme in ("int8_clip", "intn_row", "gptq_lite"):
        env = dict(RUNS_DIR=tmp_path, RUN_ID=scheme, QUANT_SCHEME=scheme, ITERATIONS=1, STAGES="train,quantize")
        config = toy_data.config(**env)
        tg.main(config, RUN)
        names = set(tg.load_arrays(tmp_path / scheme / "trained.bin")[1])
        assert names == {name for name, _ in tg.GPT(config, RUN, "meta").named_parameters()}
        text = (tmp_path / scheme / "log.txt").read_text()
        assert "calibrated hessians:0 " in text


def test_loop_uses_schedules_by_step_and_switches_plans_once(toy_data: ToyData, tmp_path: Path) -> None:
    """Without a clock progress is step / ITERATIONS; rows, rates, momentum and the plan of each step follow from it."""
    config = toy_data.config(RUNS_DIR=tmp_path, ITERATIONS=10, ENABLE_LOOPING_AT=0.35)
    trainer, length = make_trainer(config), config.train_row_tokens
    seen = watched_loop(trainer)
    for step, given in enumerate(seen):
        begin = step * config.train_batch_tokens
        ids = [
            toy_data.train_tokens[p % len(toy_data.train_tokens)]
            for p in range(begin, begin + config.train_batch_tokens)
        ]
        inputs = torch.cat([row.inputs for row in given["rows"]])
        assert inputs.tolist() == np.array(ids).reshape(-1, length).tolist()
        assert given["looping"] == (step >= 4)
        assert given["multiplier"] == tg.lr_multiplier(step / 10, step, config)
        assert given["momentum"] == tg.muon_momentum(step, config)
    assert len(seen) == trainer.step == 10 and trainer.finished()


def test_clock_ends_training_before_the_iterations(toy_data: ToyData, tmp_path: Path) -> None:
    """With a budget, training stops when it is spent less the reserve, and progress is its used fraction."""
    budget = dict(MAX_WALLCLOCK_SECONDS=1.5, GPTQ_RESERVE_SECONDS=0.9, ITERATIONS=20_000)
    trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, **budget))
    assert trainer.config.train_seconds == pytest.approx(0.6)
    trainer.elapsed = 0.15
    assert trainer.progress() == pytest.approx(0.25)
    trainer.elapsed = 0.0
    trainer.loop()
    assert 0.6 <= trainer.elapsed < 1.5 and 0 < trainer.step < 20_000 and trainer.progress() == 1.0 and trainer.looping


def test_hessians_are_those_of_the_rows_behind_the_last_step(toy_data: ToyData, tmp_path: Path) -> None:
    """Calibration sums X^T X over the next rows of the stream, with the looped plan, whatever the number of ranks."""
    config = toy_data.config(RUNS_DIR=tmp_path, GPTQ_CALIBRATION_BATCHES=3)
    trainer = make_trainer(config)
    trainer.step = 5
    got = trainer.calibrate()
    taps = tg.Taps()
    with torch.no_grad():
        for number in (20, 21, 22):  # five steps of four rows have been used
            row = tg.training_row(trainer.stream, number, config, tg.Run())
            trainer.model(row.inputs, row.targets, tg.layer_plan(config, True), row.segments, taps=taps)
    assert got.keys() == taps.hessians.keys()
    for key in got:
        torch.testing.assert_close(got[key], taps.hessians[key])


def test_the_prior_of_the_boosts_is_fitted_to_the_rows_behind_the_last_step(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints inside the documents of those rows, priced by the averaged weights with the looped plan; the Hessians are
    what they are without hints, and other quantisers, which want none, get the prior too."""
    env = dict(RUNS_DIR=tmp_path, GPTQ_CALIBRATION_BATCHES=3, TOKEN_THRESHOLD=0.4)
    plain, real = make_trainer(toy_data.config(**env)), tg.fit_boosts
    for scheme in ("gptq", "intn_row"):
        config, given = toy_data.config(**env, TOKEN_DOCUMENT_ORDERS="2,3", QUANT_SCHEME=scheme), []
        trainer, plan = make_trainer(config), tg.layer_plan(config, True)
        trainer.step, trainer.model = 5, random_model(config)
        plain.step, _ = 5, plain.model.load_state_dict(trainer.model.state_dict(), strict=False)
        hessians = plain.calibrate()
        monkeypatch.setattr(tg, "fit_boosts", lambda *arguments: given.append(arguments) or real(*arguments))
        found = trainer.calibrate()
        assert found.keys() == (hessians.keys() if scheme == "gptq" else set())
        assert all(torch.equal(found[key], hessians[key]) for key in found)
        nll, sources, hit, count, run = given[0]
        expected = []
        for number in (20, 21, 22):  # five steps of four rows have been used
            row = tg.training_row(trainer.stream, number, config, RUN)
            table = tg.row_hints(row, config)
            for place in torch.nonzero(table[:, 0] >= 0)[:, 0].tolist():
                hint, source = table[place].tolist()
                targets = row.targets.clone()
                targets[0, place] = hint
                with torch.no_grad():
                    of_hint = trainer.model(row.inputs, targets, plan, row.segments)[0, place]
                expected.append((float(of_hint), source, hint == int(row.targets[0, place])))
        assert len(expected) > 20 and len({(source, true) for _, source, true in expected}) == 4
        assert count == 2 and list(zip(sources.tolist(), hit.tolist())) == [(s, true) for _, s, true in expected]
        np.testing.assert_allclose(nll.numpy(), [nats for nats, _, _ in expected], atol=1e-4)
        assert torch.equal(trainer.model.hint_prior, real(*given[0]).float()) and trainer.model.hint_prior.all()


def test_token_counts_are_those_of_the_head_of_the_stream(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COUNTED_TOKENS ids from the first shard on, or all there are; the same for each rank; in trained.bin for GPTQ."""
    env = dict(RUNS_DIR=tmp_path, RUN_ID="counts", ITERATIONS=1, STAGES="train", GPTQ_CALIBRATION_BATCHES=1)
    config = toy_data.config(**env)
    trainer = make_trainer(config)
    for counted in (700, 1500, 10**9):  # inside the first shard, across its end, and more than there are
        monkeypatch.setattr(tg, "COUNTED_TOKENS", counted)
        wanted = np.bincount(toy_data.train_tokens[:counted], minlength=64)
        for trainer.run in (RUN, tg.Run(1, 2)):
            found = trainer.token_counts()
            assert list(found) == ["token_counts"] and found["token_counts"].dtype == np.float32
            assert found["token_counts"].tolist() == wanted.tolist()
        assert wanted.sum() == min(counted, len(toy_data.train_tokens))
    monkeypatch.setattr(tg, "COUNTED_TOKENS", 1500)
    tg.main(config, RUN)
    arrays = tg.load_arrays(tmp_path / "counts" / "trained.bin")[1]
    assert arrays["token_counts"].tolist() == np.bincount(toy_data.train_tokens[:1500], minlength=64).tolist()
    assert {name: array.shape for name, array in arrays.items()} == tg.trained_shapes(config)
    for scheme in ("int8_clip", "intn_row", "gptq_lite"):
        trainer.config = dataclasses.replace(config, quant_scheme=scheme)
        assert trainer.token_counts() == {} and "token_counts" not in tg.trained_shapes(trainer.config)


def test_prefetch_keeps_the_order_and_passes_errors_on() -> None:
    """Rows come in the order of their numbers; an error while preparing one surfaces where it is used."""
    assert list(tg.prefetch(lambda n: [n * n], range(5), torch.device("cpu"))) == [[0], [1], [4], [9], [16]]
    assert list(tg.prefetch(lambda n: [n], [], torch.device("cpu"))) == []

    def make(number: int) -> list:
        if number == 2:
            raise tg.UserError("shard gone")
        return [number]

    seen = []
    with pytest.raises(tg.UserError, match="shard gone"):
        for rows in tg.prefetch(make, range(5), torch.device("cpu")):
            seen += rows
    assert seen == [0, 1]


# ---------------------------------------------------------------------------------------------------------------
# Repeating, resuming, stopping
# ---------------------------------------------------------------------------------------------------------------


def test_a_process_begins_with_one_number_for_each_vector_function() -> None:
    """MKL's, in both precisions, before anything that threads may share."""
    first: list[tuple[str, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            name = func._schema.name.removeprefix("aten::")
            if name not in ("ones", "empty", "fill_"):
                assert args[0].numel() == 1 and args[0].device.type == "cpu"
                first.append((name, args[0].dtype))
            return func(*args, **kwargs or {})

    with Watch():
        tg.start_run({})
    assert sorted(first, key=str) == sorted(itertools.product(tg.VECTOR_MATH, (torch.float32, torch.float64)), key=str)
    assert {"cos", "sin", "exp", "log", "sqrt", "tanh", "erf"} <= set(tg.VECTOR_MATH)


def test_same_seed_gives_the_same_artifact_byte_for_byte(toy_data: ToyData, tmp_path: Path) -> None:
    """Training by steps and quantising twice gives equal files; another seed gives another one."""
    files = {}
    for run_id, seed in (("first", 1), ("again", 1), ("other", 2)):
        config = toy_data.config(RUNS_DIR=tmp_path, RUN_ID=run_id, SEED=seed, STAGES="train,quantize", ITERATIONS=4)
        tg.main(config, RUN)
        files[run_id] = (tmp_path / run_id / "artifact.bin").read_bytes()
    assert files["first"] == files["again"] != files["other"]


@pytest.mark.parametrize("crash_at", [2, 5])
def test_resumed_training_is_bit_identical(crash_at: int, toy_data: ToyData, tmp_path: Path) -> None:
    """A run that dies, before or after the loops begin, and is started again ends with the same losses and tensors."""
    env = dict(RUNS_DIR=tmp_path, CHECKPOINT_SECONDS=1e-9, RUN_ID="resumed")
    whole = make_trainer(toy_data.config(RUNS_DIR=tmp_path, RUN_ID="whole"))
    whole.loop()
    broken = make_trainer(toy_data.config(**env))
    update = broken.update

    def dying(*arguments: Any) -> Any:
        if broken.step == crash_at:
            raise KeyboardInterrupt
        return update(*arguments)

    broken.update = dying
    with pytest.raises(KeyboardInterrupt):
        broken.loop()
    resumed = make_trainer(toy_data.config(**env))
    resumed.restore_checkpoint()
    assert resumed.step == crash_at and resumed.looping == (crash_at > 3) and len(resumed.history) == crash_at
    resumed.loop()
    assert losses(resumed) == losses(whole) and same(everything(resumed), everything(whole))
    finished = make_trainer(toy_data.config(**env))
    finished.restore_checkpoint()
    finished.loop()  # nothing is left to do
    assert losses(finished) == losses(whole)


def test_damaged_checkpoint_is_refused(toy_data: ToyData, tmp_path: Path) -> None:
    """A checkpoint cut short is a user error that names the file."""
    trainer = make_trainer(toy_data.config(RUNS_DIR=tmp_path, RUN_ID="a"))
    trainer.save_checkpoint()
    path = tmp_path / "a" / "checkpoint.bin"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(tg.UserError, match="checkpoint.bin"):
        trainer.restore_checkpoint()


def run_command(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str, str]:
    """Exit status, standard output and error of the command line with these settings, in this process."""
    monkeypatch.setattr(os, "environ", {**os.environ, **env})
    capsys.readouterr()
    status = tg.command_line()
    return status, *capsys.readouterr()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_and_keep_the_checkpoint(
    where: str, toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A loss or a gradient that is no number ends the run with status 1 and one line; the last checkpoint is finite."""
    real, calls = tg.plain_nll, []

    def failing(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        nll = real(logits, *rest)
        if logits.requires_grad:
            calls.append(1)
            if len(calls) == 14 and where == "loss":  # four rows a step: in the fourth step
                nll = nll * math.nan
            elif len(calls) == 14:
                nll.register_hook(lambda gradient: gradient * math.inf)
        return nll

    replace_plain(monkeypatch, nll=failing)
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="nan", CHECKPOINT_SECONDS=1e-9)
    status, _, err = run_command(env, monkeypatch, capsys)
    assert status == 1 and err.count("\n") == 1 and "nan" in err and "step 4" in err
    meta, arrays = tg.load_arrays(tmp_path / "nan" / "checkpoint.bin")
    assert meta["step"] == 3 and all(np.isfinite(array).all() for array in arrays.values())
    assert not (tmp_path / "nan" / "trained.bin").exists() and not (tmp_path / "nan" / "result.json").exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_a_restart_goes_on_from_there(
    kind: signal.Signals,
    toy_data: ToyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A run that is told to stop saves its state, says so with status 128 + n, and continues bit for bit."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="stopped", STAGES="train")
    whole = make_trainer(toy_data.config(RUNS_DIR=tmp_path, RUN_ID="whole"))
    whole.loop()
    real, calls = tg.Trainer.update, []

    def update(self: tg.Trainer, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), kind)
        return real(self, *arguments)

    before = signal.getsignal(kind)
    monkeypatch.setattr(tg.Trainer, "update", update)
    status, _, err = run_command(env, monkeypatch, capsys)
    assert status == 128 + kind and err.count("\n") == 1 and kind.name in err
    assert signal.getsignal(kind) == before
    resumed = make_trainer(tg.load_config(env)[0])
    resumed.restore_checkpoint()
    assert 3 <= resumed.step < 6
    resumed.loop()
    assert losses(resumed) == losses(whole) and same(everything(resumed), everything(whole))


# ---------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------

# A name, a value, two that do not go together, and one that the data refuse; more of them are in test_config.py.
BAD_SETTINGS = {
    "MATRIX_LRR=0.1": "MATRIX_LR",
    "SEED=abc": "SEED=abc",
    "ROW_TOKENS=60": "TRAIN_BATCH_TOKENS=256",
    "VOCAB_SIZE=65": "VOCAB_SIZE=65",
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_setting_is_one_clear_line_with_status_two(
    setting: str, toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each bad value ends the command before training, with status 2 and a line that names it."""
    key, value = setting.split("=")
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="bad") | {key: value}
    status, out, err = run_command(env, monkeypatch, capsys)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert BAD_SETTINGS[setting] in err and "\ntrain step" not in out


def bad_data(folder: Path, fault: str, toy_data: ToyData) -> dict[str, str]:
    """A dataset with one fault; returns the settings that lead to it."""
    train, val = folder / "fineweb_train_000000.bin", folder / "fineweb_val_000000.bin"
    folder.mkdir()
    write_shard(train, toy_data.train_tokens[:2000])
    write_shard(val, toy_data.val_tokens)
    changes = {"DATA_PATH": str(folder)}
    if fault == "no training shard":
        train.unlink()
    elif fault == "no validation shard":
        val.unlink()
    elif fault == "empty file":
        train.write_bytes(b"")
    elif fault == "no tokens":
        write_shard(train, [])
    elif fault == "magic":
        write_shard(val, toy_data.val_tokens, magic=1)
    elif fault == "version":
        write_shard(train, toy_data.train_tokens, version=2)
    elif fault == "truncated":
        train.write_bytes(train.read_bytes()[:-1])
    elif fault == "id":
        write_shard(train, [1, 5, 64, 7])
    elif fault == "short validation":
        write_shard(val, [1])
    elif fault == "no tokenizer":
        changes["TOKENIZER_PATH"] = str(folder / "none.model")
    elif fault == "damaged tokenizer":
        (folder / "bad.model").write_bytes(b"not a model")
        changes["TOKENIZER_PATH"] = str(folder / "bad.model")
    elif fault == "tokenizer size":
        other = train_tokenizer(folder / "other.model", ["a few words of a text that nobody reads"] * 9, 40)
        changes["TOKENIZER_PATH"] = str(other)
    return changes


@pytest.mark.parametrize(
    "fault, named",
    [
        ("no training shard", "fineweb_train"),
        ("no validation shard", "fineweb_val"),
        ("empty file", "fineweb_train_000000.bin"),
        ("no tokens", "fineweb_train_000000.bin"),
        ("magic", "fineweb_val_000000.bin"),
        ("version", "fineweb_train_000000.bin"),
        ("truncated", "fineweb_train_000000.bin"),
        ("id", "VOCAB_SIZE=64"),
        ("short validation", "validation stream"),
        ("no tokenizer", "none.model"),
        ("damaged tokenizer", "bad.model"),
        ("tokenizer size", "VOCAB_SIZE=64"),
    ],
)
def test_bad_data_is_one_clear_line_with_status_two(
    fault: str,
    named: str,
    toy_data: ToyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Each fault of the files ends the command before training, with status 2 and a line that names what to fix."""
    env = toy_data.env(RUNS_DIR=tmp_path / "runs", RUN_ID="bad") | bad_data(tmp_path / "data", fault, toy_data)
    status, out, err = run_command(env, monkeypatch, capsys)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert named in err and "train step" not in out


def test_script_itself_exits_with_status_two_and_one_line(toy_data: ToyData, tmp_path: Path) -> None:
    """The same as a real process: a typo, and a missing folder."""
    cases = [({"MATRIX_LRR": "1"}, "MATRIX_LR"), ({"DATA_PATH": str(tmp_path / "nothing")}, "nothing")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_gpt.py")],
            cwd=tmp_path,
            env=os.environ | toy_data.env(RUNS_DIR=tmp_path, RUN_ID="bad") | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for changes, _ in cases
    ]
    for process, (_, named) in zip(processes, cases):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1 and named in err, err


# ---------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------


def rank_job(run: tg.Run, env: dict[str, str]) -> dict[str, Any]:
    """What one rank sees of training (resumed from a checkpoint where there is one), calibration and all scorings."""
    config = tg.load_config(env)[0]
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = tg.Trainer(config, run, QUIET)
    trainer.restore_checkpoint()
    trainer.loop()
    seen = {"losses": losses(trainer), "state": everything(trainer), "elapsed": trainer.elapsed}
    seen["hessians"] = {key: hessian.clone() for key, hessian in trainer.calibrate().items()}
    seen["prior"] = trainer.model.hint_prior.clone()
    validation, model = trainer.validation, random_model(config, seed=4)
    scored = evaluation_of(model, validation, config, run).score(config.eval_stride)
    tallies = [scored, tg.adapt_documents(evaluation_of(model, validation, config, run))]
    seen["adapted weights"] = {name: torch.from_numpy(array.copy()) for name, array in model.arrays().items()}
    for optimizer in ("sgd", "adamw"):
        other = dataclasses.replace(config, chunk_ttt_optimizer=optimizer)
        chunked = random_model(other, seed=4)
        tallies.append(tg.adapt_chunks(evaluation_of(chunked, validation, other, run)))
        for name, array in chunked.arrays().items() if optimizer == "sgd" else ():
            seen["adapted weights"][f"chunks {name}"] = torch.from_numpy(array.copy())
    seen["sums"] = [(t.nats, t.tokens, t.bytes, t.learned, t.times.tolist()) for t in tallies]
    return seen


def close(first: dict, second: dict, atol: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=atol, rtol=1e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    "world_size, rows, resumed",
    [
        pytest.param(2, 4, False, id="two", marks=pytest.mark.slow),
        pytest.param(3, 2, True, id="three-resumed-few-rows"),
    ],
)
def test_number_of_ranks_changes_no_result(
    world_size: int, rows: int, resumed: bool, toy_data: ToyData, tmp_path: Path
) -> None:
    """Losses step by step, weights, buffers, Hessians, and the sums of all scorings equal those of one process."""
    chunks = dict(TTT_CHUNK_TOKENS=300, TTT_BATCH_SEQS=1, TTT_EPOCHS=2, TTT_LR=0.01)
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="one", TRAIN_BATCH_TOKENS=64 * rows, **chunks)
    env |= {"NGRAM_TILT_ENABLED": "1", "TOKEN_ORDER": "4", "TOKEN_DOCUMENT_ORDERS": "3,2", "TOKEN_THRESHOLD": "0.5"}
    if resumed:  # by more ranks than the checkpoint was written with, and more than there are rows
        trainer = make_trainer(tg.load_config(env | {"ITERATIONS": "6"})[0])
        for trainer.step in range(4):
            numbers = trainer.update(trainer.step_rows(trainer.step), False, 1.0, 0.9)
            trainer.history.append([trainer.step + 1, numbers[0], 0.0])
        trainer.step = 4
        trainer.save_checkpoint()
    one = rank_job(RUN, env)
    ranks = on_ranks(world_size, tmp_path / "ranks", rank_job, env)
    assert len(one["losses"]) == 6
    for seen in ranks:
        assert seen["losses"] == ranks[0]["losses"] and same(seen["state"], ranks[0]["state"])
        assert seen["sums"] == ranks[0]["sums"] and seen["elapsed"] == ranks[0]["elapsed"]
        assert same(seen["adapted weights"], ranks[0]["adapted weights"])
        np.testing.assert_allclose(seen["losses"], one["losses"], atol=1e-4)
        close(
            {k: v for k, v in seen["state"].items() if "exp_avg" not in k},
            {k: v for k, v in one["state"].items() if "exp_avg" not in k},
            2e-4,
        )
        close(seen["hessians"], one["hessians"], 0.05)
        assert torch.equal(seen["prior"], ranks[0]["prior"]) and seen["prior"].abs().min() > 1e-3
        torch.testing.assert_close(seen["prior"], one["prior"], atol=1e-3, rtol=1e-3)
        close(seen["adapted weights"], one["adapted weights"], 1e-4)
        for (nats, *counts), (expected, *expected_counts) in zip(seen["sums"], one["sums"]):
            assert counts == expected_counts and nats == pytest.approx(expected, rel=1e-5)
            assert counts[0] == len(toy_data.val_tokens) - 1 and set(counts[3][1:]) == {1}
