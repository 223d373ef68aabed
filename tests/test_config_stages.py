"""CONFIG: every setting names what it decides. Files are refused when a setting that decided them has changed, and only
then; and no stage reads a setting that does not name it."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ToyData, shallow_env, short_coder_states

import train_gpt as tg

RUN, QUIET = tg.Run(), tg.Log(None)
# Other values of texts, which have neither a range nor choices.
OTHER_TEXTS = dict(
    stages="train", data_dir="other", data_path="other", tokenizer_path="other",
    fp16_keep_name_patterns="attn.k", ttt_chunk_steps="8:4", token_document_orders="4,2",
    eval_chunk_factors="3:2",
)  # fmt: skip
# Of settings that exclude or need each other, the one that makes room.
BESIDE = dict(
    swa_enabled=dict(ema_decay=0.0), warmdown_iters=dict(warmdown_frac=0.0),
    parallel_residual_start=dict(parallel_start_layer=0), max_wallclock_seconds=dict(gptq_reserve_seconds=0.5),
    trellis_states=dict(compressor="rans"),
)  # fmt: skip


def other_values(name: str, value: Any) -> Iterator[Any]:
    """Values of a setting that differ from `value`."""
    field = tg.FIELDS[name]
    if name in OTHER_TEXTS:
        yield OTHER_TEXTS[name]
    elif field.metadata["choices"]:
        yield from (choice for choice in field.metadata["choices"] if choice != value)
    elif field.type is bool:
        yield not value
    else:
        others = (value + 1, value + 2, value * 2, value + 0.5, value / 2, value - 1, value + 4)
        yield from (field.type(other) for other in others if field.type(other) != value)


def changed(config: tg.Config, name: str) -> tg.Config:
    """`config` with a valid other value of one setting."""
    for other in other_values(name, getattr(config, name)):
        try:
            tg.parse_value(name.upper(), str(int(other) if isinstance(other, bool) else other))
            found = dataclasses.replace(config, **{name: other}, **BESIDE.get(name, {}))
            tg.validate(found)
            return found
        except tg.UserError:
            continue
    raise AssertionError(f"no other value of {name}")


def refuses(read: Callable[[], Any], config: tg.Config, name: str) -> bool:
    """Whether `read` complains that a setting of the file is another one than that of `config`."""
    try:
        read()
        return False
    except tg.UserError as error:
        now = re.escape(tg.shown(getattr(config, name)))
        return re.search(rf"\b{name.upper()}=[^=]* \(now {now}\)", str(error)) is not None


@pytest.fixture(scope="module")
def finished(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> tg.Config:
    """A toy run of two steps that left a checkpoint, a trained.bin and an artifact.bin."""
    sizes = dict(RUN_ID="toy", ITERATIONS=2, CHECKPOINT_SECONDS=1e-9, STAGES="train,quantize")
    config = toy_data.config(RUNS_DIR=tmp_path_factory.mktemp("stages"), **sizes)
    tg.main(config, RUN)
    return config


@pytest.fixture(scope="module")
def trainer(finished: tg.Config) -> tg.Trainer:
    return tg.Trainer(finished, RUN, QUIET)


@pytest.mark.parametrize("name", [name for name in tg.FIELDS if name not in ("run_id", "runs_dir")])
def test_files_are_refused_just_when_a_setting_that_decided_them_has_changed(
    name: str, finished: tg.Config, trainer: tg.Trainer, marker_pairs: int
) -> None:
    """trained.bin: settings of training; checkpoint.bin: these, and rows; artifact.bin: those of the model and layout."""
    stage, trainer.config = tg.FIELDS[name].metadata["stage"], changed(finished, name)
    refused = lambda read: refuses(read, trainer.config, name)
    assert refused(trainer.restore_checkpoint) == (tg.TRAIN in stage or name == "row_tokens")
    assert refused(lambda: tg.load_trained(trainer.config)) == (tg.TRAIN in stage)
    path = finished.run_dir / "artifact.bin"
    assert refused(lambda: tg.open_artifact(path, trainer.config)) == (tg.ARTIFACT in stage)


def test_moved_data_are_no_obstacle_and_other_data_are(finished: tg.Config, tmp_path: Path) -> None:
    """Quantising needs no data, and resuming needs the same ids, wherever they lie; one other id is noticed."""
    data = shutil.copytree(finished.data_path, tmp_path / "data")
    moved = dataclasses.replace(finished, data_path=str(data))
    trainer = tg.Trainer(moved, RUN, QUIET)
    trainer.restore_checkpoint()
    assert trainer.step == 2
    shard = data / "fineweb_train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[1024 + 2 * 500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(tg.UserError, match=r"TRAIN_DATA=\d+ tokens, crc \w{8} \(now \d+ tokens, crc \w{8}\)"):
        tg.Trainer(moved, RUN, QUIET).restore_checkpoint()
    shutil.rmtree(data)
    tg.main(dataclasses.replace(moved, stages="quantize"), RUN)


class Watched(tg.Config):
    """A configuration that notes which of its settings are read."""

    reads: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if name in tg.FIELDS:
            Watched.reads.add(name)
        return super().__getattribute__(name)

    __hash__, __eq__ = object.__hash__, object.__eq__  # as a key of a cache it reads nothing


# Preset, stages, seconds of MAX_WALLCLOCK_SECONDS: all that presets differ in, in as few stages as will do.
WATCHED = [("default", "train", 600), ("fork5_10l", "train,quantize", 0), ("pr1880", "train,quantize,evaluate", 0),
           ("frontier", "train,quantize,evaluate", 600)]  # fmt: skip


@pytest.fixture(scope="module")
def stage_reads(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Stage -> the settings that it reads in some preset, apart from what copies, compares or validates them."""
    found: dict[str, set[str]] = {stage: set() for stage in tg.STAGES}

    def unnoticed(function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            before = set(Watched.reads)
            result = function(*arguments, **named)
            Watched.reads = before
            return result

        return call

    def noted(stage: str, function: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            Watched.reads = set()
            for cached in (tg.artifact_table, tg.parameter_table):  # what a stage before has read is read again
                cached.cache_clear()
            result = function(*arguments)
            found[stage] |= Watched.reads
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.Config, "of_stage", unnoticed(tg.Config.of_stage))
        patch.setattr(tg.Trainer, "validate", unnoticed(tg.Trainer.validate))
        patch.setattr(dataclasses, "replace", unnoticed(dataclasses.replace))
        for stage, function in tg.STAGES.items():
            patch.setitem(tg.STAGES, stage, noted(stage, function))
        for preset, stages, seconds in WATCHED:
            data = dict(DATA_PATH=toy_data.folder, TOKENIZER_PATH=toy_data.tokenizer, RUN_ID=preset, STAGES=stages)
            short = dict(ITERATIONS=1, TTT_EPOCHS=1, MAX_WALLCLOCK_SECONDS=seconds)
            places = dict(RUNS_DIR=tmp_path_factory.mktemp("reads"))
            config = tg.load_config(shallow_env(preset, **data, **short, **places))[0]
            with short_coder_states():
                tg.main(Watched(**dataclasses.asdict(config)), RUN)
    return found


def settings_of(stage: tg.Stage) -> set[str]:
    return {name for name, field in tg.FIELDS.items() if stage in field.metadata["stage"]}


def test_training_reads_just_the_settings_that_decide_it(stage_reads: dict[str, set[str]]) -> None:
    """One that it read without saying so would resume a run with another value; one too many would refuse for nothing."""
    assert stage_reads["train"] - settings_of(tg.RUN) - settings_of(tg.DATA) == settings_of(tg.TRAIN)


def test_quantising_and_scoring_read_the_settings_that_decide_them(stage_reads: dict[str, set[str]]) -> None:
    """All of their own; quantising none of data and scores, scoring none of the quantiser that the artifact lacks."""
    quantize, evaluate = stage_reads["quantize"], stage_reads["evaluate"]
    assert settings_of(tg.QUANTIZE) <= quantize and settings_of(tg.EVALUATE) <= evaluate
    assert not quantize & (settings_of(tg.DATA) | settings_of(tg.EVALUATE) - settings_of(tg.TRAIN))
    assert not evaluate & (settings_of(tg.QUANTIZE) - settings_of(tg.ARTIFACT))


# What these runs do not come to, and the tests that notice whether it is read.
ELSEWHERE = {
    "stages": "test_main: test_evaluating_again_needs_no_training_data_and_gives_the_same_scores",
    "report": "test_records_report: test_a_run_calls_the_report_where_it_is_there",
    "data_dir": "test_data: test_case_operators_have_their_own_dataset_and_tokenizer",
    "train_log_every": "test_main: test_log_is_read_by_a_ten_line_parser",
}


def test_every_setting_is_read_by_a_stage_or_elsewhere(stage_reads: dict[str, set[str]]) -> None:
    """No setting that is checked, logged, and has no effect."""
    assert tg.FIELDS.keys() - set().union(*stage_reads.values()) == ELSEWHERE.keys()
