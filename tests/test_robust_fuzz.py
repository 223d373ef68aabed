"""Hostile input: every mutated file or setting is refused in one sentence or gives a correct run, in bounded memory."""

import collections
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import robust_fuzz
from conftest import ToyData, toy_env
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from robust_helpers import ended, start_child, start_command, text_of

import train_gpt as tg

FAST = dict(shard=40, artifact=40, checkpoint=30, trained=25, result=30, settings=80, whole=2)
MANY = dict(shard=2500, artifact=2500, checkpoint=1500, trained=1000, result=1000, settings=3000, whole=300)


def run_campaign(root: Path, counts: dict[str, int], seed: int, seconds: float) -> dict[str, Any]:
    output = root / "output.txt"
    status = ended(start_child(robust_fuzz.campaign, root, counts, seed, output=output), seconds)
    assert status == 0, text_of(output)[-3000:]
    report = json.loads((root / "campaign.json").read_text())
    lines = [f"{kind}: {count}" for kind, count in report["counts"].items()]
    total = sum(sum(count.values()) for count in report["counts"].values())
    lines.append(f"mutated inputs: {total}, failures: {report['failed']}, slowest {report['slowest_s']:.2f} s,"
                 f" peak {report['peak_rss_mib']} MiB, {report['seconds']:.0f} s")  # fmt: skip
    print("\n" + "\n".join(lines), flush=True)
    assert not report["failures"], "\n".join(report["failures"])
    assert report["peak_rss_mib"] < 2048
    return report


def test_mutated_files_and_settings_are_refused_or_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Some dozens of shards, artifacts, checkpoints, weights, results, settings: no crash, hang or unexplained error."""
    with capsys.disabled():
        report = run_campaign(tmp_path, FAST, 1, 120)
    assert {kind: sum(count.values()) for kind, count in report["counts"].items()} == FAST
    assert all(count.get("refused", 0) > 10 for kind, count in report["counts"].items() if kind != "whole")


@pytest.mark.slow
def test_ten_thousand_mutated_files_and_settings_are_refused_or_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same for more than ten thousand."""
    with capsys.disabled():
        report = run_campaign(tmp_path, MANY, 2, 3000)
    assert sum(sum(count.values()) for count in report["counts"].values()) >= 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "unchecked, kind",
    [("check_arrays", "checkpoint"), ("check_arrays", "trained"), ("check_ids", "shard")],
)
def test_campaign_notices_a_missing_check(unchecked: str, kind: str, tmp_path: Path) -> None:
    """Without one of the script's own checks, the same cases end in something else than a refusal or a good run."""
    start = start_child(robust_fuzz.campaign, tmp_path, {kind: 300}, 1, unchecked, output=tmp_path / "output.txt")
    assert ended(start, 300) == 0
    assert json.loads((tmp_path / "campaign.json").read_text())["failed"] > 0


def hostile_tokenizers(root: Path, data: ToyData, count: int, seed: int) -> collections.Counter:
    """Outcomes of this many mutated tokenizers; a child that crashes is replaced, and its case counted as a crash."""
    counts: collections.Counter = collections.Counter()
    done, log = 0, root / "tokenizers.txt"
    while done < count:
        log.unlink(missing_ok=True)
        child = start_child(robust_fuzz.tokenizers, root, data, range(done, count), seed, output=root / "output.txt")
        status = ended(child, 600)
        lines = text_of(log).splitlines()
        for line in lines:
            number, *outcome = line.split(maxsplit=2)
            done = int(number) + 1
            counts[outcome[0] if outcome else f"crashed with status {status}"] += 1
            if outcome and outcome[0] == "failed":
                print(line)
        assert lines, text_of(root / "output.txt")[-2000:]
    print(f"\nmutated tokenizers: {count}: {dict(counts)}", flush=True)
    return counts


def test_mutated_tokenizers_are_refused_or_used(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Damaged SentencePiece models end in a UserError or in a byte table of the right size."""
    with capsys.disabled():
        counts = hostile_tokenizers(tmp_path, toy_data, 60, 3)
    assert set(counts) <= {"refused", "ran"} and counts["refused"] > 5


@pytest.mark.slow
def test_a_thousand_mutated_tokenizers_are_refused_or_used(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The same for many more."""
    with capsys.disabled():
        counts = hostile_tokenizers(tmp_path, toy_data, 2000, 4)
    assert set(counts) <= {"refused", "ran"}


# By hypothesis ------------------------------------------------------------------------------------------------------

ANY_TEXT = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(["", " ", "0", "1", "-1", "1e308", "9" * 400, "0x1", "true", "None", "nan", "train,train", "\x00"]),
)
SETTINGS = st.dictionaries(st.sampled_from([name.upper() for name in tg.FIELDS]), ANY_TEXT, min_size=1, max_size=3)
JSON_KEYS = st.sampled_from(["meta", "blobs", "bytes", "sha256", "arrays", "a"])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_KEYS, inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@QUICK
@given(changes=SETTINGS)
@example(changes={"NUM_LAYERS": str(10**9)})
@example(changes={"NUM_LOOPS": str(10**9)})
@example(changes={"MODEL_DIM": str(2**40)})
@example(changes={"MLP_MULT": "1e300"})
@example(changes={"PHASED_TTT_NUM_PHASES": str(10**12)})
@example(changes={"SEED": str(2**64)})
@example(changes={"TRAIN_BATCH_TOKENS": str(2**50), "ROW_TOKENS": "1"})
@example(changes={"MODEL_DIM": "2", "NUM_HEADS": "1", "NUM_KV_HEADS": "1", "ROPE_DIMS": "0", "MLP_MULT": "0.1"})
def test_any_settings_are_refused_or_a_model(changes: dict[str, str]) -> None:
    """Whatever a few settings say, there is a UserError that names one of them, or a model of bounded size."""
    try:
        config = tg.load_config(toy_env() | changes)[0]
    except tg.UserError as error:
        assert "=" in str(error)
        return
    assert sum(parameter.numel() for parameter in tg.GPT(config, tg.Run(), "meta").parameters()) <= 1.1e9
    assert all(math.isfinite(getattr(config, name)) for name, field in tg.FIELDS.items() if field.type in (int, float))


@QUICK
@given(header=JSON_VALUES, body=st.binary(max_size=40), length=st.none() | st.integers(0, 2**32 - 1))
def test_any_header_of_a_container_is_refused_or_read(
    tmp_path_factory: Any, header: Any, body: bytes, length: int | None
) -> None:
    """Any JSON as header, of the right or a wrong length, in front of any bytes."""
    text = json.dumps(header).encode()
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(tg.CONTAINER_MAGIC + (len(text) if length is None else length).to_bytes(4, "little") + text + body)
    for reader in (tg.read_container, tg.load_arrays):
        try:
            assert isinstance(reader(path)[0], dict)
        except tg.UserError as error:
            assert "any.bin" in str(error)


# Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["artifact.bin", "trained.bin", "checkpoint.bin", "result.json", "tokenizer"])
def test_file_of_a_terabyte_is_refused_at_once(name: str, toy_data: ToyData, tmp_path: Path) -> None:
    """A sparse file that claims more than these settings can need is never read into memory."""
    config = toy_data.config(RUNS_DIR=tmp_path, RUN_ID="toy")
    folder = tmp_path / "toy"
    folder.mkdir()
    path = folder / name
    with open(path, "wb") as file:
        file.write(tg.CONTAINER_MAGIC)
        file.truncate(2**40)
    with pytest.raises(tg.UserError, match=name):
        if name == "artifact.bin":
            tg.load_artifact(path, config)
        elif name == "trained.bin":
            tg.quantize_stage(config, tg.Run(), tg.Log(None), tg.Program(config, tg.Run()))
        elif name == "checkpoint.bin":
            tg.Trainer(config, tg.Run(), tg.Log(None)).restore_checkpoint()
        elif name == "result.json":
            tg.earlier_parts(path, config, tg.Run())
        else:
            tg.load_tokenizer(toy_data.config(TOKENIZER_PATH=path))


def test_out_of_memory_is_one_line(toy_data: ToyData, tmp_path: Path) -> None:
    """Settings in range whose tensors do not fit into this process end with status 2 and what to lower."""
    env = toy_data.env(RUNS_DIR=tmp_path, RUN_ID="toy", TTT_LORA_RANK=8192, TTT_BATCH_SIZE=64, ITERATIONS=1)
    status = ended(start_command(env, tmp_path / "out.txt", (robust_fuzz.limit_memory, 2**28)))
    lines = [line for line in text_of(tmp_path / "out.txt").splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and re.search("(out of memory|needs .* GiB of) .* lower", lines[0]), lines
    assert "Traceback" not in text_of(tmp_path / "out.txt")
