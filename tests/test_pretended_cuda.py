"""The GPU path on a pretended CUDA device: every preset through all stages, waits counted, devices kept apart."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pretended_cuda
import pytest
import torch
from conftest import ToyData, preset_env, toy_config
from pretended_cuda import CUDA, PretendedTensor, Rules, pretended_cuda as pretend
from torch import Tensor

import train_gpt as tg

PRESETS = [name for name in tg.PRESETS if name != "tiny"]
SIZES = dict(
    NUM_LAYERS=5, ITERATIONS=3, ROW_TOKENS=128, GPTQ_CALIBRATION_BATCHES=1, MATRIX_LR=0.3, MIN_LR=1, EVAL_STRIDE=16,
    TTT_BATCH_SIZE=26, TTT_CHUNK_SIZE=32, GLOBAL_TTT_CHUNK_TOKENS=512, TTT_EPOCHS=1, TTT_BATCH_SEQS=2, COMPILE=0,
)  # fmt: skip
NAMED = {"default": "fa3", "pr1880": "fa3", "baseline": "varlen", "frontier": "varlen"}  # the others: auto
FLAGGED = tg.import_error("torch.nn.attention.varlen") != ""


def small_env(preset: str, **changes: Any) -> dict[str, str]:
    """A preset whose every kind of layer exists among five."""
    own = tg.load_config({"PRESET": preset})[0]
    layers = dict(
        NUM_LOOPS=min(own.num_loops, 1),
        LOOP_START=1,
        LOOP_END=2,
        PARALLEL_START_LAYER=4 if own.parallel_start_layer else 0,
        PARALLEL_RESIDUAL_START=3 if own.parallel_residual_start >= 0 else -1,
        XSA_LAST_N=min(own.xsa_last_n, 3),
        EMA_DECAY=0.3 if own.ema_decay else 0,
    )
    return preset_env(preset, **(SIZES | layers | changes))


@dataclasses.dataclass
class Finished:
    """A run of all stages, with the waits of the host where they matter."""

    result: dict[str, Any]
    steps: list[list[str]]  # of each training step: from its begin to that of the next one
    batches: list[tuple[int, list[str]]]  # of each batch of adapted documents: chunks, waits


@contextlib.contextmanager
def watched(waits: list[str], steps: list[list[str]], batches: list[tuple[int, list[str]]]) -> Iterator[None]:
    """Notes the waits of training steps and of adaptation."""
    marks: list[int] = []
    update, adapt, add = tg.Trainer.update, tg.score_and_adapt, tg.Tally.add
    chunks = itertools.count()

    def step(*args: Any) -> Any:
        marks.append(len(waits))
        result = update(*args)
        steps[:] = [waits[a:b] for a, b in itertools.pairwise([*marks, len(waits)])]
        return result

    def batch(*args: Any) -> None:
        before, first = len(waits), next(chunks)
        adapt(*args)
        batches.append((next(chunks) - first - 1, waits[before:]))

    def count(*args: Any) -> None:
        next(chunks)
        add(*args)

    with mock.patch.object(tg.Trainer, "update", step), mock.patch.object(tg, "score_and_adapt", batch):
        with mock.patch.object(tg.Tally, "add", count):
            yield


@contextlib.contextmanager
def device(**options: Any) -> Iterator[Rules]:
    """The pretended device, without answers about kernels that were given for another one."""
    with pretend(**options) as rules, mock.patch.object(tg, "choose_kernels", tg.choose_kernels.__wrapped__):
        yield rules


@pytest.fixture(scope="module")
def finished(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    """Runs a preset once on each kind of device."""
    runs_dir = tmp_path_factory.mktemp("runs")
    paths = dict(DATA_PATH=toy_data.folder, TOKENIZER_PATH=toy_data.tokenizer, RUNS_DIR=runs_dir)

    @functools.cache
    def run(preset: str, cuda: bool, **changes: Any) -> Finished:
        run_id = "-".join([preset, str(cuda), *map(str, changes.values())])
        settings = dict(paths, RUN_ID=run_id, KERNELS="plain") | changes
        done = Finished({}, [], [])
        if not cuda:
            done.result = tg.main(tg.load_config(small_env(preset, **settings))[0], tg.Run())
            return done
        settings.setdefault("ATTN_BACKEND", NAMED.get(preset, "auto"))
        with device(flagged_varlen=FLAGGED or preset == "baseline") as rules:
            with watched(rules.waits, done.steps, done.batches):
                done.result = tg.main(tg.load_config(small_env(preset, **settings))[0], tg.start_run({}))
        return done

    return run


# The script on the device


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_all_stages_as_on_a_cpu(preset: str, finished: Callable[..., Finished]) -> None:
    """Scores before and after quantisation, sliding and adapted, agree with those of the CPU up to bfloat16."""
    there, here = finished(preset, True).result, finished(preset, False).result
    assert there["attn_backend"].split()[0] == NAMED.get(preset, "fa3") and there["hardware"].startswith("1xNVIDIA")
    scores = [key for key in here if key.endswith("val_bpb")]
    assert len(scores) >= 3 and {"train", "quantize", "evaluate"} == there["stage_seconds"].keys()
    for key in scores:
        print("agreement", preset, key, here[key], there[key], there[key] / here[key] - 1)
        assert there[key] == pytest.approx(here[key], rel=0.02), key


@pytest.mark.parametrize("preset", PRESETS)
def test_host_waits_once_in_a_training_step(preset: str, finished: Callable[..., Finished]) -> None:
    """Making rows, dealing them, and logging wait for nothing; only the loss of a step is fetched."""
    steps = finished(preset, True).steps
    assert len(steps) == SIZES["ITERATIONS"]
    for waits in steps:
        assert len(waits) == 1 and waits[0].startswith("copy to the host in update"), waits


@pytest.mark.parametrize("preset", [name for name in PRESETS if tg.load_config({"PRESET": name})[0].ttt_enabled])
def test_host_waits_at_most_twice_in_a_chunk(preset: str, finished: Callable[..., Finished]) -> None:
    """Of adaptation by adapters, only the nats of a chunk are fetched."""
    batches = finished(preset, True).batches
    own = tg.load_config({"PRESET": preset})[0]
    assert bool(batches) == (own.ttt_kind == "lora_phased")
    for chunks, waits in batches:
        assert chunks > 1 and len(waits) <= 2 * chunks, waits
