"""CHECK: what later stages need is tried before training; forecast of GPU memory, and rows that follow from it."""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import check_fuzz
import numpy as np
import pytest
import torch
from conftest import (
    QUIET,
    ToyData,
    evaluation_of,
    nll_per_target,
    preset_env,
    random_model,
    toy_config,
    validation_of_lengths,
)
from test_main import parse_log

import train_gpt as tg

RUN = tg.Run()
ITEMS = ["packages", "train_data", "validation", "attention", "kernels", "memory", "quantizer", "artifact", "disk"]


def lines_of(capsys: pytest.CaptureFixture) -> dict[str, dict[str, str]]:
    """The lines of a check by their item."""
    return {values["item"]: values for event, values in parse_log(capsys.readouterr().out) if event == "check"}


def command(env: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "environ", {key: str(value) for key, value in env.items()})
    return tg.command_line()


# STAGES=check ------------------------------------------------------------------------------------------------------


def test_check_prints_a_line_per_item_and_writes_nothing(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """STAGES=check on good settings: every item is fine, the status is 0, and no folder appears."""
    assert command(toy_data.env(STAGES="check", RUNS_DIR=tmp_path / "runs"), monkeypatch) == 0
    lines = lines_of(capsys)
    assert list(lines) == ITEMS and all(values["ok"] == "True" for values in lines.values())
    assert f"{len(toy_data.val_tokens)}_tokens" in lines["validation"]["detail"]
    assert list(tmp_path.iterdir()) == []


def break_attention(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tg, "choose_attention", lambda *_: ("odd", lambda q, k, v, segments: q + k.mean() + v.mean()))


def forbid_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)


FAULTS = {  # name -> (settings, what is broken, the item that says so, what it says)
    "no training shards": ({}, lambda d, m: [p.unlink() for p in d.glob("*train*")], "train_data", "DATA_PATH"),
    "no validation": ({}, lambda d, m: [p.unlink() for p in d.glob("*val*")], "validation", "DATA_PATH"),
    "other vocabulary": ({"VOCAB_SIZE": 65}, lambda d, m: None, "validation", "VOCAB_SIZE=65"),
    "side-car of another length": (
        {}, lambda d, m: shutil.copy(next(d.glob("*train*1.bin")), d / "fineweb_val_bytes_000000.bin"), "validation",
        "side-car",
    ),
    "attention that is wrong": ({}, break_attention, "attention", "ATTN_BACKEND=odd"),
    "attention for a GPU": ({"ATTN_BACKEND": "fa3"}, lambda d, m: None, "attention", "ATTN_BACKEND=fa3"),
    "kernels for a GPU": ({"KERNELS": "triton"}, lambda d, m: None, "kernels", "KERNELS=triton"),
    "no zstandard": ({"COMPRESSOR": "zstd"}, lambda d, m: forbid_import("zstandard", m), "artifact", "COMPRESSOR=zstd"),
    "no matplotlib": ({}, lambda d, m: forbid_import("matplotlib", m), "packages", "matplotlib"),
    "no room": (
        {"CHECKPOINT_SECONDS": 9},
        lambda d, m: m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**7)), "disk",
        "RUNS_DIR=",
    ),
    "no memory": (
        {"TTT_LORA_RANK": 4096, "TTT_BATCH_SIZE": 65536}, lambda d, m: None, "memory", "TTT_BATCH_SIZE=65536"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_announced_before_training(
    fault: str, toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The item fails, the others are tried all the same, the error names key and fix; a run of all stages stops there
    too, before its first step."""
    settings, break_something, item, text = FAULTS[fault]
    data = shutil.copytree(toy_data.folder, tmp_path / "toy")
    env = toy_data.env(**{"DATA_PATH": data, "RUNS_DIR": tmp_path / "runs", "RUN_ID": "a"} | settings)
    break_something(data, monkeypatch)
    assert command(env | {"STAGES": "check"}, monkeypatch) == 2
    captured = capsys.readouterr()
    lines = {values["item"]: values for event, values in parse_log(captured.out) if event == "check"}
    assert list(lines) == ITEMS and lines[item]["ok"] == "False"
    first = next(values["detail"] for values in lines.values() if values["ok"] == "False")
    assert captured.err.replace(" ", "_") == f"error:_{first}\n"
    assert text.replace(" ", "_") in lines[item]["detail"]
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(tg.Trainer, "loop", lambda trainer: pytest.fail("training has begun"))
    with pytest.raises(tg.UserError):
        tg.main(tg.load_config({key: str(value) for key, value in env.items()})[0], RUN)


@pytest.mark.parametrize("stages, file", [("quantize,evaluate", "trained.bin"), ("evaluate", "artifact.bin")])
def test_a_run_that_continues_checks_the_file_it_continues_from(
    stages: str, file: str, toy_data: ToyData, tmp_path: Path
) -> None:
    """Missing, or of other settings: the item `earlier` says so; whole, it names the file."""
    env = dict(RUNS_DIR=tmp_path, RUN_ID="a", STAGES=stages, ITERATIONS=1, TTT_ENABLED=0)
    with pytest.raises(tg.UserError, match=file):
        tg.check(toy_data.config(**env), RUN, QUIET)
    tg.main(toy_data.config(**env | {"STAGES": "train,quantize"}), RUN)
    assert file in tg.check_earlier(toy_data.config(**env), RUN)
    with pytest.raises(tg.UserError, match="XSA_LAST_N=4"):
        tg.check(toy_data.config(**env | {"XSA_LAST_N": "1"}), RUN, QUIET)


@pytest.mark.parametrize("installed", [False, True])
def test_pergroup_says_which_codec_it_writes(installed: bool, toy_data: ToyData, monkeypatch: pytest.MonkeyPatch) -> None:
    """COMPRESSOR=pergroup without lrzip is brotli, and the check says so."""
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/lrzip" if installed else None)
    monkeypatch.setitem(tg.CODECS, "lrzip", tg.CODECS["zlib"])
    detail = tg.check_artifact(toy_data.config(COMPRESSOR="pergroup"), RUN)
    assert detail.startswith("pergroup writes lrzip," if installed else "pergroup writes brotli without lrzip,")


def test_codec_that_gives_back_other_codes_is_refused(toy_data: ToyData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every codec that the artifact will use is tried, with COMPRESSOR=rans both of its two."""
    for name in ("rans", "brotli"):
        with monkeypatch.context() as patch:
            patch.setitem(tg.CODECS, name, tg.CODECS[name]._replace(decode=lambda data, arrays: None))
            with pytest.raises(tg.UserError, match="COMPRESSOR=rans: gives back other codes"):
                tg.check_artifact(toy_data.config(COMPRESSOR="rans"), RUN)


def test_one_bit_is_refused() -> None:
    """MLP_BITS=1 has no levels: a division by zero after training, before this was checked."""
    with pytest.raises(tg.UserError, match="MLP_BITS=1.*2 to 8"):
        toy_config(MLP_BITS=1)


def test_settings_that_pass_the_check_do_not_fail_later(toy_data: ToyData, tmp_path: Path) -> None:
    """A sample of tests/check_fuzz.py: random settings, and whole runs of some that pass."""
    report = check_fuzz.campaign(tmp_path, 16, 1, 7, toy_data)
    assert not report["defects"], report["defects"]
    assert min(report["counts"]["check"][kind] for kind in ("passed", "refused")) > 2


@pytest.mark.slow
def test_two_thousand_settings_and_150_runs_fail_early_or_never(toy_data: ToyData, tmp_path: Path) -> None:
    """The whole of it."""
    report = check_fuzz.campaign(tmp_path, 2000, 150, 1, toy_data)
    print(report)
    assert not report["defects"], report["defects"]


def test_the_campaign_notices_a_late_error(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantiser that fails after training is reported as late."""
    monkeypatch.setattr(tg, "make_artifact", lambda *_: 1 / 0)
    report = check_fuzz.campaign(tmp_path, 0, 1, 7, toy_data)
    assert len(report["defects"]) == 1 and "late: ZeroDivisionError" in report["defects"][0]


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tg.Config:
    """Three layers of the baseline, as they would run on a GPU."""
    env = dict(PRESET="baseline", NUM_LAYERS=3)
    return tg.load_config({key: str(value) for key, value in env.items()})[0]


@pytest.mark.slow
def test_visits_counted_by_kind_add_up_to_the_whole_plan(small: tg.Config) -> None:
    """What a row keeps, from a few visits, is within 10 % of the cut of the whole graph; eager keeps more."""
    kept, plan = tg.row_bytes_per_token(small), tg.layer_plan(small, looping=True)
    whole = tg.kept_per_token(small, plan)
    assert kept["train"] == pytest.approx(whole, rel=0.1)
    assert whole < kept["eager"] < 2.5 * whole


def test_a_kept_row_is_what_autograd_really_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count on fake tensors equals that of storages which a real eager pass in bfloat16 keeps."""
    monkeypatch.setattr(tg, "PROBE_TOKENS", 1009)
    config = tg.load_config(preset_env("default", KERNELS="plain"))[0]
    model, plan = random_model(config), tg.layer_plan(config, looping=True)
    model.dtype, kept = torch.bfloat16, {}
    tokens = torch.zeros(1, tg.PROBE_TOKENS, dtype=torch.int64)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % tg.PROBE_TOKENS == 0:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, tokens, plan)
    expected = sum(kept.values()) / tg.PROBE_TOKENS
    assert loss.requires_grad and tg.kept_per_token(config, plan, compiled=False) == pytest.approx(expected, rel=0.01)


def forecast_of(**bytes_per_token: float) -> Any:
    return lambda config: dict(train=1000.0, eager=1500.0, adapt=800.0) | bytes_per_token


@pytest.mark.parametrize("changes", [{}, {"LOADER": "coprime", "VARLEN_ATTN": 0}, {"TRAIN_BATCH_TOKENS": 8 * 120_120}])
def test_rows_are_the_longest_divisors_that_fit(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """ROW_TOKENS for any memory: the next longer choice would not fit; every choice is a valid configuration."""
    monkeypatch.setattr(tg, "row_bytes_per_token", forecast_of())
    config, _ = tg.load_config({key: str(value) for key, value in changes.items()})
    size = lambda config: sum(tg.memory_forecast(config)["train"].values())
    seen = set()
    for memory in np.geomspace(size(dataclasses.replace(config, row_tokens=4096)), 2 * size(config), 12):
        fitting = tg.fit_rows(config, memory)
        row = fitting.train_row_tokens
        tg.validate(fitting)
        seen.add(row)
        assert config.train_batch_tokens % row == 0 and config.train_seq_len <= row <= config.train_batch_tokens // 8
        assert config.loader == "stream" or row % config.train_seq_len == 0
        choices = [r for r in range(row + 1, config.train_batch_tokens // 8 + 1) if config.train_batch_tokens % r == 0
                   and (config.loader == "stream" or r % config.train_seq_len == 0)]  # fmt: skip
        assert all(size(dataclasses.replace(config, row_tokens=r)) > memory for r in choices)
        assert size(fitting) <= memory
    assert len(seen) > 3


def test_an_explicit_row_wins_and_scoring_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROW_TOKENS of the environment stays; VAL_BATCH_TOKENS falls until scoring, learning and adapting fit."""
    monkeypatch.setattr(tg, "row_bytes_per_token", forecast_of(train=4e5, eager=6e5, adapt=3e5))
    config, _ = tg.load_config({"ROW_TOKENS": "98304"})
    fitting = tg.fit_rows(config, 22 * 2**30)
    assert fitting.row_tokens == 98_304 and fitting.val_batch_tokens < config.val_batch_tokens
    forecast = tg.memory_forecast(fitting)
    assert max(sum(forecast[part].values()) for part in ("score", "learn", "adapt")) <= 22 * 2**30
    assert tg.fit_rows(config, 2**40) == config


def test_scores_do_not_depend_on_the_size_of_scoring_passes() -> None:
    """VAL_BATCH_TOKENS changes neither plain scores nor those of adaptation with its global updates and hints."""
    validation = validation_of_lengths([1, 31, 7, 40, 16, 2, 25, 33, 9, 12, 5, 70])
    found = []
    for size in (64, 256, 1024):
        config = toy_config(VAL_BATCH_TOKENS=size, NGRAM_TILT_ENABLED=1, TOKEN_ORDER=2, TOKEN_DOCUMENT_ORDERS="2")
        model = random_model(config)
        plain = nll_per_target(validation, lambda v: evaluation_of(model, v, config).score(8))
        adapted = nll_per_target(validation, lambda v: tg.adapt_documents(evaluation_of(model, v, config)))
        found.append(np.stack([plain, adapted])[:, 1:])
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3  # adaptation does something
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-5)


def test_out_of_memory_in_the_warm_up_halves_the_row(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted for rows of more than 32 tokens: the run says so, goes on with 32, and gives the scores of a run that was
    told to take 32. Where no shorter row is possible, the error is out of memory."""
    update = tg.Trainer.update

    def hungry(trainer: tg.Trainer, rows: list[tg.Row], *arguments: Any) -> Any:
        if rows[0].inputs.numel() > 32:
            update(trainer, rows, *arguments)  # the weights have changed already
            raise torch.OutOfMemoryError("planted")
        return update(trainer, rows, *arguments)

    monkeypatch.setattr(tg.Trainer, "update", hungry)
    env = dict(RUNS_DIR=tmp_path, WARMUP_STEPS=1, TTT_ENABLED=0, ROW_TOKENS=128, ITERATIONS=3)
    result = tg.main(toy_data.config(**env | {"RUN_ID": "a"}), RUN)
    expected = tg.main(toy_data.config(**env | {"RUN_ID": "b", "ROW_TOKENS": 32}), RUN)
    assert result["val_bpb"] == expected["val_bpb"]
    events = parse_log((tmp_path / "a" / "log.txt").read_text())
    rows = [values["row_tokens"] for event, values in events if event == "warning"]
    assert rows == ["64", "32"]
    with pytest.raises(torch.OutOfMemoryError):
        tg.main(toy_data.config(**env | {"RUN_ID": "c", "TRAIN_SEQ_LEN": 64}), RUN)
