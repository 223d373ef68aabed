"""torch.compile on the GPU's path: after the warm-up nothing is compiled, whatever rows, batches and chunks come.

The back-end `eager` traces and guards as any other and compiles nothing, so a graph costs a second. The stand-in for a
GPU pads its rows, and its attention reads the table of segments, as on a GPU.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUIET, ToyData, shallow_env, validation_of_lengths
from torch import Tensor

import train_gpt as tg

QUICK = ("frontier",)  # the others are among the slow tests


@dataclasses.dataclass(frozen=True)
class PaddedRun(tg.Run):
    """A CPU that is treated as a GPU where the shapes of tensors are concerned."""

    padded = True


def attend(q: Tensor, k: Tensor, v: Tensor, segments: tg.Segments | None) -> Tensor:
    """Causal attention inside the segments of `cu_seqlens`, by a mask."""
    if segments is None:
        return tg.attend_sdpa(q, k, v, None)
    places = torch.arange(q.size(1))
    segment = torch.searchsorted(segments.cu_seqlens, places, right=True)
    mask = (segment[:, None] == segment) & (places[:, None] >= places)
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without a compiler, and no variants left from the test before."""
    torch.compiler.reset()
    tg.COMPILES.listen()
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect every event
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(tg, "choose_attention", lambda config, device: ("stand-in", attend))
    yield
    torch.compiler.reset()


# Where it is the shapes of rows and batches that matter: three visits, or two of a network that is only adapted. Tracing
# a graph takes a second for each visit.
FLAT = dict(NUM_LAYERS=2, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=0, XSA_LAST_N=1)
ADAPTED = FLAT | dict(NUM_LOOPS=0, STAGES="evaluate", SLIDING_WINDOW_ENABLED=0, PHASED_TTT_PREFIX_DOCS=0)


def shallow(data: ToyData, preset: str, **changes: Any) -> tg.Config:
    """A preset of three layers that compiles; with sliding windows and validation during training."""
    sizes = dict(DATA_PATH=data.folder, TOKENIZER_PATH=data.tokenizer, CASEOPS_ENABLED=0, COMPILE=1, WARMUP_STEPS=1)
    sizes |= dict(
        ITERATIONS=4, SLIDING_WINDOW_ENABLED=1, VAL_LOSS_EVERY=3, VAL_BATCH_TOKENS=2048, ENABLE_LOOPING_AT=0.4
    )
    return tg.load_config(shallow_env(preset, **sizes | {"TTT_BATCH_SIZE": 2} | changes))[0]


def compiled_by(work: Any) -> tg.Graphs:
    before = tg.COMPILES.graphs()
    work()
    return tg.COMPILES.graphs().since(before)


def varied_validation(documents: int, seed: int = 0) -> tg.Validation:
    """Documents shorter and longer than a chunk and than the context."""
    return validation_of_lengths(np.random.default_rng(seed).integers(1, 30, documents).tolist())


def warmed_up(config: tg.Config) -> tuple[tg.Trainer, dict[str, tg.Graphs]]:
    """A trainer on the stand-in after everything that comes before the clock, and what that compiled."""
    run = PaddedRun()
    config.run_dir.mkdir()
    program = tg.Program(config, run)
    trainer = tg.Trainer(config, run, QUIET, program)
    evaluation = compiled_by(lambda: tg.warm_up_evaluation(program, config, run, QUIET))
    return trainer, {"evaluation": evaluation, "training": compiled_by(trainer.warm_up)}


def run_everything(trainer: tg.Trainer, batches: int) -> tg.Graphs:
    """Training through the switch of the loops with validation on the way, plain and sliding scores, and adaptation to
    so many batches of documents: what all that compiled."""
    config, program, before = trainer.config, trainer.program, tg.COMPILES.graphs()
    trainer.loop()
    assert trainer.step == config.iterations and trainer.looping == bool(config.num_loops)
    validation = varied_validation(batches * config.ttt_batch_size - 1)
    for stride in (config.eval_seq_len, config.eval_stride):
        tg.Evaluation(program, validation, QUIET).score(stride)
    if config.ttt_enabled:
        some = validation if config.ttt_kind == "lora_phased" else varied_validation(12)
        tg.TTT_KINDS[config.ttt_kind](tg.Evaluation(program, some, QUIET))
    return tg.COMPILES.graphs().since(before)


@pytest.mark.parametrize("preset", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in tg.PRESETS])
def test_nothing_is_compiled_after_the_warm_up(preset: str, toy_data: ToyData, tmp_path: Path) -> None:
    """No graph and no fall-back from the first real step to the last document, with one cache for each use."""
    trainer, warm = warmed_up(shallow(toy_data, preset, RUNS_DIR=tmp_path, RUN_ID="a"))
    assert warm["training"].compiled > len(trainer.plans) and warm["evaluation"].compiled >= 1
    assert run_everything(trainer, 20)[:2] == (0, 0)
    assert not any(part.fallbacks for part in warm.values()), warm


def test_parts_of_batches_are_warmed_up_too(toy_data: ToyData, tmp_path: Path) -> None:
    """Batches of six, of which five to one are left at one time or another; of windows of 32 tokens two fit into a pass."""
    changes = ADAPTED | dict(TTT_BATCH_SIZE=6, VAL_BATCH_TOKENS=256)
    config, run = shallow(toy_data, "pr2135", RUNS_DIR=tmp_path, RUN_ID="a", **changes), PaddedRun()
    assert config.adapt_tokens == 64 and config.ttt_eval_seq_len == 32
    program = tg.Program(config, run)
    tg.warm_up_evaluation(program, config, run, QUIET)
    validation = varied_validation(24)
    chunks = -(-validation.documents[:, 1] // config.ttt_chunk_size)
    assert len(set(chunks)) > 2
    found = compiled_by(lambda: tg.adapt_documents(tg.Evaluation(program, validation, QUIET)))
    assert found[:2] == (0, 0)


@pytest.mark.slow
def test_planted_warm_up_on_one_tensor_is_noticed(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs that are the targets are another graph: the defect of the first version of the warm-up."""
    real = tg.training_row

    def same(stream: Any, number: int, config: tg.Config, run: tg.Run) -> tg.Row:
        row = real(stream, number, config, run)
        return row._replace(targets=row.inputs) if isinstance(stream, tg.NoiseStream) else row

    monkeypatch.setattr(tg, "training_row", same)
    trainer, _ = warmed_up(shallow(toy_data, "default", RUNS_DIR=tmp_path, RUN_ID="a", TTT_ENABLED=0, **FLAT))
    assert run_everything(trainer, 1).compiled == 2  # one for each plan


@pytest.mark.slow
def test_planted_warm_up_without_a_document_alone_is_noticed(
    toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One document is a graph of its own: where the warm-up's documents all end together, it meets none."""
    config = shallow(toy_data, "pr2135", RUNS_DIR=tmp_path, RUN_ID="a", **ADAPTED)
    program, run = tg.Program(config, PaddedRun()), PaddedRun()
    real, alike = tg.adapt_batch, lambda batch: np.stack([batch[:, 0], np.full(len(batch), batch[-1, 1])], 1)
    with monkeypatch.context() as planted:
        planted.setattr(tg, "adapt_batch", lambda e, a, batch, *rest: real(e, a, alike(batch), *rest))
        tg.warm_up_evaluation(program, config, run, QUIET)
    validation = validation_of_lengths([20, 20, 17])
    assert compiled_by(lambda: tg.adapt_documents(tg.Evaluation(program, validation, QUIET))).compiled > 0


def test_each_use_has_its_own_cache_and_giving_up_is_counted() -> None:
    """Nine shapes exhaust the cache of one use, which is counted as a fall-back, and leave that of another alone."""
    config, run = tg.load_config({"COMPILE": "1"})[0], tg.Run()

    def double(x: Tensor) -> Tensor:
        return 2 * x

    first, second = (tg.maybe_compile(double, use, config, run) for use in ("first", "second"))
    found = compiled_by(lambda: [first(torch.ones(n)) for n in range(2, 12)])
    assert found.compiled == 8 and found.fallbacks >= 1
    assert compiled_by(lambda: second(torch.ones(3)))[:2] == (1, 0)
    assert compiled_by(lambda: second(torch.ones(3)))[:2] == (0, 0)


def test_a_run_reports_what_it_compiled(toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log.txt and result.json carry the counts of each stage; a graph inside the clock is a warning."""
    monkeypatch.setattr(tg.Run, "padded", True)
    config = shallow(toy_data, "pr1941", RUNS_DIR=tmp_path, RUN_ID="a", TTT_ENABLED=0, SLIDING_WINDOW_ENABLED=0, **FLAT)
    result, log = tg.main(config, tg.Run()), config.run_dir / "log.txt"
    stages = result["stage_graphs"]
    assert list(stages) == ["train", "quantize", "evaluate"] and stages["quantize"]["compiled_graphs"] == 0
    assert result["compiled_graphs"] == sum(row["compiled_graphs"] for row in stages.values()) >= 4
    assert result["compiled_in_clock"] == 0 and 0 < result["compile_seconds"] < 500
    assert "\ngraphs stage:train compiled_graphs:" in log.read_text() and "\nwarning" not in log.read_text()
    torch.compiler.reset()
    tg.COMPILES.listen()
    late = tg.main(dataclasses.replace(config, run_id="b", warmup_steps=0), tg.Run())
    assert late["compiled_in_clock"] >= 2
    assert "\nwarning stage:train" in (tmp_path / "b" / "log.txt").read_text()
