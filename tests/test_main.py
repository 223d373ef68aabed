"""MAIN: the stages end to end at toy size, what they write, and that importing the script does nothing."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, ToyData

import train_gpt as tg

RUN = tg.Run()
SCORES = ("prequant", "quantized", "sliding", "ttt")
KEYS = {"val_loss", "val_bpb", "artifact_bytes", "code_bytes", "total_bytes", "steps", "stage_seconds", "valid", "seed"}


def parse_log(text: str) -> list[tuple[str, dict[str, str]]]:
    """Lines `event key:value ...` as (event, values); everything else in a log is skipped."""
    events = []
    for line in text.splitlines():
        event, *words = line.split(" ")
        if re.fullmatch("[a-z_]+", event) and words and all(re.match("[a-z_0-9]+:", word) for word in words):
            events.append((event, dict(word.split(":", 1) for word in words)))
    return events


def table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def documents(folder: Path) -> dict[str, list[float]]:
    """The columns of documents.csv."""
    rows = table(folder / "documents.csv")
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


@dataclasses.dataclass
class Finished:
    config: tg.Config
    folder: Path
    result: dict[str, Any]
    data: Path


@pytest.fixture(scope="module")
def finished(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole toy run of all stages, on its own copy of the data."""
    root = tmp_path_factory.mktemp("whole")
    data = root / "toy"
    shutil.copytree(toy_data.folder, data)
    env = toy_data.env(DATA_PATH=data, RUNS_DIR=root / "runs", RUN_ID="toy", ITERATIONS=30, SLIDING_WINDOW_ENABLED=1)
    env |= {"MIN_LR": "0.2", "TTT_LORA_LR": "0.001", "GLOBAL_TTT_LR": "0.003"}
    config, origins = tg.load_config(env)
    return Finished(config, root / "runs" / "toy", tg.main(config, RUN, origins), data)


def again(finished: Finished, tmp_path: Path, **changes: Any) -> tuple[tg.Config, Path]:
    """A copy of the finished run under another folder, without training shards."""
    folder = tmp_path / "runs" / "toy"
    shutil.copytree(finished.folder, folder)
    data = tmp_path / "toy"
    data.mkdir()
    shutil.copy(finished.data / "fineweb_val_000000.bin", data)
    return dataclasses.replace(finished.config, runs_dir=str(tmp_path / "runs"), data_path=str(data), **changes), folder


def test_result_has_every_promised_number(finished: Finished, toy_data: ToyData) -> None:
    """Scores of all stages, sizes, counts and seconds; each finite, and consistent with the others."""
    result = finished.result
    assert result.keys() >= KEYS | {f"{kind}_val_{unit}" for kind in SCORES for unit in ("loss", "bpb")}
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    assert all(math.isfinite(value) for value in numbers.values())
    assert result["submitted"] == "ttt" and result["val_bpb"] == result["ttt_val_bpb"]
    assert result["steps"] == 30 and result["train_tokens"] == 30 * 256 and result["seed"] == finished.config.seed
    assert result["scored_tokens"] == result["val_targets"] == len(toy_data.val_tokens) - 1
    assert result["scored_bytes"] == result["val_bytes"] and result["val_documents"] == 26
    ratio = result["scored_tokens"] / result["scored_bytes"] / math.log(2)
    for kind in SCORES:
        assert result[f"{kind}_val_bpb"] == pytest.approx(result[f"{kind}_val_loss"] * ratio)
    assert result["artifact_bytes"] == (finished.folder / "artifact.bin").stat().st_size
    assert result["total_bytes"] == result["artifact_bytes"] + result["code_bytes"]
    assert list(result["stage_seconds"]) == ["train", "quantize", "evaluate"]
    assert result["valid"] is True and result["violations"] == []


def test_scores_move_the_right_way(finished: Finished) -> None:
    """Training beats the unigram entropy clearly; quantisation, other windows and adaptation move it only a little."""
    result, tokens = finished.result, np.fromfile(finished.data / "fineweb_val_000000.bin", "<u2")[512:]
    p = np.bincount(tokens) / len(tokens)
    unigram = -sum(x * math.log(x) for x in p if x)
    assert result["prequant_val_loss"] < 0.8 * unigram
    for kind in ("quantized", "sliding", "ttt"):
        assert abs(result[f"{kind}_val_loss"] - result["prequant_val_loss"]) < 0.1, kind


def test_run_folder_holds_log_weights_artifact_result_and_picture(finished: Finished) -> None:
    """The files of a run, no partial ones, and the result twice: the file has the log's last line and its parts."""
    names = {path.name for path in finished.folder.iterdir()}
    assert {"log.txt", "trained.bin", "artifact.bin", "result.json", "loss_curve.png", "documents.csv"} <= names
    assert {"steps.csv", "tensors.csv", "positions.csv"} <= names
    assert not any(name.endswith(".part") for name in names)
    saved = json.loads((finished.folder / "result.json").read_text())
    assert list(saved.pop("stages")) == list(tg.STAGES) and saved == json.loads(json.dumps(finished.result))
    last = (finished.folder / "log.txt").read_text().rstrip("\n").splitlines()[-1]
    assert json.loads(last.removeprefix("result ")) == json.loads(json.dumps(finished.result))
    assert (finished.folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_documents_add_up_to_the_scores(finished: Finished) -> None:
    """documents.csv has a column for each score on the artifact; its sums are the result's."""
    columns = documents(finished.folder)
    assert list(columns) == ["position", "tokens", "bytes", "quantized", "sliding", "ttt"]
    result = finished.result
    assert len(columns["tokens"]) == result["val_documents"] == 26 and columns["position"][0] == 0
    assert (sum(columns["tokens"]), sum(columns["bytes"])) == (result["scored_tokens"], result["scored_bytes"])
    for kind in ("quantized", "sliding", "ttt"):
        assert sum(columns[kind]) / result["scored_tokens"] == pytest.approx(result[f"{kind}_val_loss"])


def test_positions_add_up_to_the_scores(finished: Finished) -> None:
    """positions.csv: octaves in order, whose targets, bytes and nats are those of the result."""
    rows, result = table(finished.folder / "positions.csv"), finished.result
    assert list(rows[0]) == ["first", "tokens", "bytes", "quantized", "sliding", "ttt"]
    assert [int(row["first"]) for row in rows] == [2**n for n in range(len(rows))]
    assert int(rows[0]["tokens"]) == result["val_documents"]  # each document has one first target
    for name in ("tokens", "bytes"):
        assert sum(int(row[name]) for row in rows) == result[f"scored_{name}"]
    for kind in ("quantized", "sliding", "ttt"):
        nats = sum(float(row[kind]) for row in rows)
        assert nats / result["scored_tokens"] == pytest.approx(result[f"{kind}_val_loss"])


def test_steps_are_those_of_the_log(finished: Finished) -> None:
    """steps.csv has every step with the loss, multiplier and time that its line in the log says; loops as logged."""
    events = parse_log((finished.folder / "log.txt").read_text())
    logged = [values for event, values in events if event == "train"]
    looping = next(int(values["step"]) for event, values in events if event == "looping")
    rows = table(finished.folder / "steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 31))
    for row, line in zip(rows, logged, strict=True):
        for name in ("loss", "seconds", "lr_multiplier"):
            assert float(row[name]) == pytest.approx(float(line[name]), rel=1e-5)
        assert int(row["looped"]) == (int(row["step"]) > looping)
    assert len({row["lr_multiplier"] for row in rows}) > 10


def test_tensors_account_for_every_byte_of_the_artifact(finished: Finished) -> None:
    """tensors.csv: all arrays of the file and its header; bytes add up to the file, errors are those of the weights."""
    rows, config = table(finished.folder / "tensors.csv"), finished.config
    names = [entry.owner + f".{entry.part}" * (entry.part != "half") for entry in tg.artifact_table(config)]
    assert [row["array"] for row in rows] == [*names, "header"]
    assert sum(float(row["bytes"]) for row in rows) == pytest.approx(finished.result["artifact_bytes"], abs=0.01)
    assert all(float(row["bytes"]) > 0 for row in rows)
    trained = tg.load_arrays(finished.folder / "trained.bin")[1]
    restored = tg.load_artifact(finished.folder / "artifact.bin", config)
    of = {row["array"]: row for row in rows}
    layer, L = 2, config.num_layers
    W, Q = (arrays["qo_bank"][L + layer].astype(float) for arrays in (trained, restored))
    H = trained[f"hessian.{tg.MATRICES['attn.o'].hessian}.{layer}"].astype(float)
    entry = of[f"blocks.{layer}.attn.o.codes"]
    assert float(entry["weight_error"]) == pytest.approx(((W - Q) ** 2).sum() ** 0.5 / (W**2).sum() ** 0.5)
    outputs = [sum(row @ H @ row for row in matrix) for matrix in (W - Q, W)]
    assert float(entry["output_error"]) == pytest.approx((outputs[0] / outputs[1]) ** 0.5)
    assert of["tok_emb.weight.codes"]["output_error"] and not of["tok_emb.weight.scale"]["weight_error"]


def test_log_is_read_by_a_ten_line_parser(finished: Finished) -> None:
    """Losses, scores, stages and settings come out of the log as the result has them."""
    text = (finished.folder / "log.txt").read_text()
    assert text.startswith((ROOT / "train_gpt.py").read_text())  # the head of the log is the source
    events = parse_log(text)
    of = lambda kind: [values for event, values in events if event == kind]
    steps = of("train")
    assert [values["step"] for values in steps] == [f"{n}/30" for n in range(1, 31)]
    assert abs(float(steps[0]["loss"]) - math.log(64)) < 0.02 and float(steps[-1]["loss"]) < 3
    assert float(steps[-1]["loss"]) == pytest.approx(finished.result["train_loss"], rel=1e-5)
    assert len(of("looping")) == 1 and of("looping")[0]["step"] == "15"
    scores = {values["kind"]: values for values in of("score")}
    assert list(scores) == ["quantized", "sliding", "ttt"]
    for kind, values in scores.items():
        assert float(values["val_bpb"]) == pytest.approx(finished.result[f"{kind}_val_bpb"], abs=1e-8)
        assert int(values["tokens"]) == finished.result["val_targets"]
    assert [values["name"] for values in of("stage")] == ["train", "quantize", "evaluate"]
    origins = {values["name"]: values for values in of("setting")}
    assert origins["min_lr"] == {"name": "min_lr", "value": "0.2", "origin": "environment"}
    for name in tg.FIELDS:  # every setting is in the log, set or not
        assert re.search(rf"^  {name}: ", text, re.MULTILINE)


def test_evaluating_again_needs_no_training_data_and_gives_the_same_scores(finished: Finished, tmp_path: Path) -> None:
    """STAGES=evaluate on an existing artifact, its training shards removed, repeats the scores exactly."""
    config, folder = again(finished, tmp_path, stages="evaluate")
    (folder / "trained.bin").unlink()
    result = tg.main(config, RUN)
    for key in (
        "val_bpb",
        "ttt_val_loss",
        "sliding_val_loss",
        "quantized_val_loss",
        "scored_bytes",
        "steps",
        "artifact_bytes",
    ):
        assert result[key] == finished.result[key], key
    assert list(result["stage_seconds"]) == ["train", "quantize", "evaluate"]


def test_quantising_again_needs_no_training_data_and_gives_the_same_file(finished: Finished, tmp_path: Path) -> None:
    """STAGES=quantize reads trained.bin alone; other bits give another artifact, of which no old score is reported."""
    config, folder = again(finished, tmp_path, stages="quantize")
    shutil.rmtree(config.data_path)
    before = (folder / "artifact.bin").read_bytes()
    tg.main(config, RUN)
    assert (folder / "artifact.bin").read_bytes() == before
    result = tg.main(dataclasses.replace(config, matrix_bits=4), RUN)
    assert (folder / "artifact.bin").read_bytes() != before and result["artifact_bytes"] < len(before)
    assert "val_bpb" not in result and "quantized_val_bpb" not in result
    assert result["prequant_val_bpb"] == finished.result["prequant_val_bpb"] and result["steps"] == 30


def test_submitted_score_is_the_last_enabled_one(finished: Finished, tmp_path: Path) -> None:
    """Without TTT the sliding score is submitted, without that the plain one."""
    for number, (sliding, kind) in enumerate(((True, "sliding"), (False, "quantized"))):
        config, _ = again(
            finished, tmp_path / str(number), stages="evaluate", ttt_enabled=False, sliding_window_enabled=sliding
        )
        result = tg.main(config, RUN)
        assert result["submitted"] == kind and result["val_bpb"] == finished.result[f"{kind}_val_bpb"]


def test_stage_without_the_file_before_it_is_a_user_error(toy_data: ToyData, tmp_path: Path) -> None:
    """Quantising what was not trained and scoring what was not quantised name the missing file."""
    for stage, missing in (("quantize", "trained.bin"), ("evaluate", "artifact.bin")):
        with pytest.raises(tg.UserError, match=missing):
            tg.main(toy_data.config(RUNS_DIR=tmp_path, RUN_ID="none", STAGES=stage), RUN)


def test_illegal_order_is_called_invalid_everywhere(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """TTT_KIND=pre_eval_illegal: every line of log and console, the table, result.json and the exit status say so; the
    score without it is there, too. The same artifact scored in the legal order is valid again."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", ITERATIONS=2, TTT_KIND="pre_eval_illegal", TTT_EPOCHS=2)
    monkeypatch.setattr(os, "environ", os.environ | env)
    assert tg.command_line() == 1
    out, path = capsys.readouterr().out, tmp_path / "toy" / "result.json"
    for text in (out, (tmp_path / "toy" / "log.txt").read_text()):
        events = parse_log(text)
        assert len(events) > 30
        for event, values in events:
            assert values["valid"] == "false" and "before_scoring" in values["reason"], event
        assert re.search("^valid +INVALID: score_before_update", text, re.MULTILINE)
    assert {values["kind"] for event, values in parse_log(out) if event == "score"} == {"quantized", "ttt"}
    result = json.loads(path.read_text())
    assert result["valid"] is False and result["violations"][0].startswith("score_before_update ")
    assert result["learned_before_score"] == 2 * result["val_targets"] and result["learned_targets"] == 0
    again = {"STAGES": "evaluate", "TTT_KIND": "chunk_sgd", "TTT_CHUNK_TOKENS": "256", "EVAL_STRIDE": "32"}
    monkeypatch.setattr(os, "environ", os.environ | again)
    assert tg.command_line() == 0
    assert json.loads(path.read_text())["valid"] is True
    assert all("valid" not in values for _, values in parse_log(capsys.readouterr().out))


def test_second_run_in_one_folder_is_refused(toy_data: ToyData, tmp_path: Path) -> None:
    """While a run writes, another one with its RUN_ID is an error in one line and changes nothing; afterwards it is not."""
    config = toy_data.config(RUNS_DIR=tmp_path, RUN_ID="once", ITERATIONS=1, TTT_ENABLED=0)
    (tmp_path / "once").mkdir()
    holder = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "once")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(tg.UserError, match="RUN_ID=once: another run is writing to"):
            tg.main(config, RUN)
        assert not any((tmp_path / "once").iterdir())
        other.kill()  # the claim ends with the process, however that ends
    assert tg.main(config, RUN)["valid"] and tg.main(config, RUN)["valid"]


def test_run_gets_a_name_of_its_own(toy_data: ToyData, tmp_path: Path) -> None:
    """Without RUN_ID the folder is named after time, preset and seed; a runs folder that cannot be made is an error."""
    named = tg.named_run(toy_data.config(RUNS_DIR=tmp_path / "runs", SEED=5), RUN)
    assert re.fullmatch(r"\d{8}-\d{6}-default-seed5", named.run_id) and named.run_dir.is_dir()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(tg.UserError, match="RUNS_DIR"):
        tg.named_run(toy_data.config(RUNS_DIR=tmp_path / "file"), RUN)


def test_validity_judges_each_rule_and_only_what_it_can() -> None:
    """Sizes, seconds, coverage and bytes are broken by numbers beyond them; what has not run is not judged."""
    timed, untimed = (tg.load_config({"MAX_WALLCLOCK_SECONDS": s})[0] for s in ("600", "0"))
    fine = dict(total_bytes=16_000_000, train_seconds=600.0, eval_seconds=600.0, scored_tokens=9, val_targets=9)
    fine |= dict(
        most_times_scored=1,
        targets_scored=9,
        scored_bytes=30,
        val_bytes=30,
        text_bytes=30,
        byte_sidecar=False,
        scored_sha256="a",
        artifact_sha256="a",
        val_documents=2,
        hardware="1xCPU",
        torch="x",
        seed=1,
        learned_before_score=0,
    )
    broken = lambda result, config: {row["rule"] for row in tg.validity(result, config) if row["ok"] is False}
    assert broken(fine, timed) == set() == broken({"torch": "x", "seed": 1}, timed)
    for change, rules in (
        (dict(total_bytes=16_000_001), {"artifact_bytes"}),
        (dict(train_seconds=600.1), {"train_seconds"}),
        (dict(eval_seconds=601), {"eval_seconds"}),
        (dict(targets_scored=8), {"scored_targets"}),
        (dict(most_times_scored=2), {"single_pass"}),
        (dict(text_bytes=31), {"text_bytes"}),
        (dict(scored_sha256="b"), {"weights_from_artifact"}),
        (dict(scored_bytes=29), {"scored_bytes"}),
        (dict(learned_before_score=1), {"score_before_update"}),
        (dict(val_documents=50_000), {"scored_bytes"}),  # the challenge's documents have far more bytes
    ):
        assert rules <= broken(fine | change, timed), change
    assert not broken(fine | dict(val_bytes=3000, scored_bytes=3000, text_bytes=2998, byte_sidecar=True), timed)
    assert not broken(fine | dict(train_seconds=5000, eval_seconds=5000), untimed)


def test_compiled_code_is_kept_with_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself, so bare torchrun too, names RUNS_DIR/compile-cache to torch.compile; a given folder wins."""
    env = {"RUNS_DIR": str(tmp_path / "runs"), "RUN_ID": "none", "STAGES": "evaluate", "DATA_DIR": str(tmp_path)}
    for given, used in (({}, "runs/compile-cache"), ({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "own")}, "own")):
        monkeypatch.setattr(os, "environ", env | given)
        assert tg.command_line() == 2  # there is nothing to evaluate
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / used)  # where torch.compile looks


def test_a_wrong_byte_table_makes_a_run_invalid(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every word's space counted twice, the known error of early tables: the decoded text has fewer bytes."""
    real = tg.byte_table
    double = lambda table: table._replace(base=table.base + table.leading_space)
    monkeypatch.setattr(tg, "byte_table", lambda tokenizer: double(real(tokenizer)))
    result = tg.main(toy_data.config(RUN_ID="a", RUNS_DIR=tmp_path), tg.Run())
    assert not result["valid"] and [row["rule"] for row in result["validity"] if row["ok"] is False] == ["text_bytes"]
    assert result["val_bytes"] > 1.1 * result["text_bytes"]


def test_describe_prints_json_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """STAGES=describe needs no data: counts per tensor and group, visits, operations, forecast; and writes no file."""
    # Its figures have tests in test_check.py, and take ten seconds at full size.
    monkeypatch.setattr(tg, "row_bytes_per_token", lambda config: dict(train=1e5, eager=2e5, adapt=1e5))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"STAGES": "describe", "PRESET": "pr1941"})
    assert tg.command_line() == 0
    described = json.loads(capsys.readouterr().out)
    assert (
        sum(n for group in described["parameters_per_tensor"].values() for n in group.values())
        == described["parameters"]
    )
    for group, total in described["parameters_per_group"].items():
        assert sum(described["parameters_per_tensor"][group].values()) == total
    assert len(described["visits"]["looped"]) == 17 and len(described["skips"]["looped"]) == 8
    forecast = described["forecast"]
    assert forecast["total_bytes"] == forecast["artifact_bytes"] + forecast["code_bytes"]
    assert forecast["artifact_bytes"] == pytest.approx(15_950_000, rel=0.005)  # the published files, all three seeds
    assert list(tmp_path.iterdir()) == []


IMPORT_PROBE = """
import os, random, signal, sys, threading
import numpy, torch, torch.distributed, concurrent.futures, json, platform, resource, hashlib, ast, contextlib
import torch.nn.functional, logging, linecache  # what libraries do when loaded is theirs

class Watched(dict):
    def refuse(self, *_):
        raise AssertionError("the environment was read")
    __getitem__ = get = __contains__ = keys = items = refuse

events = []
sys.addaudithook(lambda event, arguments: events.append((event, arguments)) if armed else None)
armed = False
state = lambda: (threading.active_count(), random.getstate(), torch.get_rng_state().tolist(), torch.get_num_threads())
before = state(), os.getcwd()
numpy_state = numpy.random.get_state()[1].tolist()
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
modules, real = set(sys.modules), os.environ
os.environ = Watched()
armed = True
import train_gpt
armed = False
os.environ = real
assert before == (state(), os.getcwd()) and numpy_state == numpy.random.get_state()[1].tolist()
assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert not torch.distributed.is_initialized() and torch.get_default_dtype() == torch.float32
written = [a for e, a in events if e == "open" and isinstance(a[1], str) and set(a[1]) & set("wax+")]
assert not written, written
started = [e for e, _ in events if e.split(".")[0] in ("subprocess", "socket", "shutil", "tempfile") or e == "os.mkdir"]
assert not started, started
heavy = {"torch._dynamo", "brotli", "sentencepiece", "matplotlib", "tqdm", "triton", "flash_attn_interface"}
assert not heavy & (set(sys.modules) - modules), heavy & (set(sys.modules) - modules)
print("clean")
"""


def test_import_has_no_side_effects(tmp_path: Path) -> None:
    """Importing reads no environment, starts no thread, seeds nothing, writes no file, loads no optional package."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "MATRIX_LRR": "1", "SEED": "no number"}
    done = subprocess.run([sys.executable, "-c", IMPORT_PROBE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_log_values_are_one_word_each(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A log line has no spaces inside values, the same text on the console and in the file; other ranks are silent."""
    log = tg.Log(tmp_path / "log.txt")
    log("event", loss=0.123456789, val_bpb=1.0, n=3, text="two words", pair=[1, 2], nothing=None)
    tg.Log(None)("event", n=1)
    line = "event loss:0.123457 val_bpb:1.00000000 n:3 text:twowords pair:[1,2] nothing:None\n"
    assert (tmp_path / "log.txt").read_text() == line == capsys.readouterr().out
