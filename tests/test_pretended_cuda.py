"""The GPU path on a pretended CUDA device: every preset through all stages, waits counted, devices kept apart."""

import contextlib
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pretended_cuda
import pytest
import torch
from conftest import QUIET, ToyData, evaluation_of, shallow_env, short_coder_states, toy_config
from pretended_cuda import CUDA, PretendedTensor, Rules
from pretended_cuda import pretended_cuda as pretend
from torch import Tensor

import train_gpt as tg

ALIKE = ("fork5_twin", "pr1941", "pr1855", "pr2158")  # every part of these is in another one too
PRESETS = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in tg.PRESETS if name != "tiny"]
SIZES = dict(
    ITERATIONS=2, ROW_TOKENS=128, VAL_BATCH_TOKENS=2048, GPTQ_CALIBRATION_BATCHES=1, EVAL_STRIDE=16,
    MATRIX_LR=0.3, MIN_LR=1, TTT_BATCH_SIZE=26, TTT_CHUNK_SIZE=32, GLOBAL_TTT_CHUNK_TOKENS=512, TTT_EPOCHS=1,
    TTT_BATCH_SEQS=2, COMPILE=0, KERNELS="plain",
)  # fmt: skip
NAMED = {"default": "fa3", "pr1880": "fa3", "baseline": "varlen", "frontier": "varlen"}  # the others: auto
FLAGGED = tg.import_error("torch.nn.attention.varlen") != ""


def small_env(preset: str, **changes: Any) -> dict[str, str]:
    """A preset of three layers for two steps."""
    own = tg.load_config({"PRESET": preset})[0]
    rates = dict(EMA_DECAY=0.3 if own.ema_decay else 0, TTT_CHUNK_STEPS="64:16" if own.ttt_chunk_steps else "")
    return shallow_env(preset, **(SIZES | rates | {"FIT_ARTIFACT": 1} | changes))


@dataclasses.dataclass
class Finished:
    """A run of all stages on the device, with the waits of the host where they matter, and what a CPU makes of it."""

    steps: list[list[str]]  # of each training step: from its begin to that of the next one
    batches: list[tuple[int, list[str]]]  # of each batch of adapted documents: chunks, waits
    there: dict[str, Any]  # the result
    here: dict[str, Any]  # that of a run on the CPU
    config: tg.Config  # of that run; its folder is config.run_dir
    scored_there: np.ndarray  # nats of each document by kind of score, of the artifact of the device
    scored_here: np.ndarray  # the same artifact scored on the CPU


@contextlib.contextmanager
def watched(waits: list[str], steps: list[list[str]], batches: list[tuple[int, list[str]]]) -> Iterator[None]:
    """Notes the waits of training steps and of adaptation."""
    marks: list[int] = []
    update, adapt, add = tg.Trainer.update, tg.adapt_batch, tg.Tally.add
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

    with mock.patch.object(tg.Trainer, "update", step), mock.patch.object(tg, "adapt_batch", batch):
        with mock.patch.object(tg.Tally, "add", count):
            yield


@contextlib.contextmanager
def device(**options: Any) -> Iterator[Rules]:
    """The pretended device, without two slow answers: whether kernels agree, and what a row keeps in memory."""
    kernels = lambda wanted, device: ("triton", tg.fused_kernels()) if wanted == "triton" else ("plain", tg.PLAIN)
    with pretend(**options) as rules, mock.patch.object(tg, "choose_kernels", kernels):
        with mock.patch.object(tg, "row_bytes_per_token", lambda config: dict(train=1e4, eager=1e4, adapt=1e4)):
            yield rules


@pytest.fixture(scope="module", params=PRESETS)
def finished(request: pytest.FixtureRequest, toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A preset's run on the device, the scores of its artifact on the CPU, and its run there."""
    preset, runs_dir = request.param, tmp_path_factory.mktemp("runs")
    paths = dict(DATA_PATH=toy_data.folder, TOKENIZER_PATH=toy_data.tokenizer, RUNS_DIR=runs_dir)

    def main(run: tg.Run, run_id: str, **changes: Any) -> tuple[dict[str, Any], np.ndarray, tg.Config]:
        config = tg.load_config(small_env(preset, **paths, RUN_ID=run_id, **changes))[0]
        with short_coder_states():
            result = tg.main(config, run)
        return result, np.loadtxt(config.run_dir / "documents.csv", delimiter=",", skiprows=1)[:, 3:], config

    steps, batches = [], []
    with device(flagged_varlen=FLAGGED or preset == "baseline") as rules, watched(rules.waits, steps, batches):
        there = main(tg.start_run({}), "device", ATTN_BACKEND=NAMED.get(preset, "auto"))
    rescored = main(tg.Run(), "device", STAGES="evaluate")
    here = main(tg.Run(), "cpu")
    return Finished(steps, batches, there[0], here[0], here[2], there[1], rescored[1])


# The script on the device


def test_every_preset_runs_all_stages_as_on_a_cpu(finished: Finished) -> None:
    """Scores before and after quantisation, sliding and adapted, agree with a run on the CPU up to bfloat16; those of
    the same artifact agree document by document."""
    there, here = finished.there, finished.here
    assert there["attn_backend"].split()[0] == NAMED.get(finished.config.preset, "fa3")
    assert there["hardware"].startswith("1xNVIDIA") and there["stage_seconds"].keys() == tg.STAGES.keys()
    scores = [key for key in here if key.endswith("val_bpb")]
    assert len(scores) >= 3
    for key in scores:
        assert there[key] == pytest.approx(here[key], rel=0.005), key
    np.testing.assert_allclose(finished.scored_there, finished.scored_here, rtol=0.003)


SUBMITTED = {"baseline": "quantized", "fork5_10l": "sliding"}  # presets without test-time training


def test_every_preset_trains_packs_reloads_and_scores(finished: Finished, toy_data: ToyData) -> None:
    """The artifact from disk scores as the weights that went into it, and every target is scored once, before anything
    learns from it."""
    config, result, folder = finished.config, finished.here, finished.config.run_dir
    assert result["valid"] and result["preset"] == config.preset
    kind = SUBMITTED.get(config.preset, "ttt")
    assert result["submitted"] == kind and result["val_bpb"] == result[f"{kind}_val_bpb"]
    assert result["scored_tokens"] == result["val_targets"] == len(toy_data.val_tokens) - 1
    assert result["most_times_scored"] == 1 and result["scored_bytes"] == result["val_bytes"]
    assert (result["learned_targets"] > 200) == config.ttt_enabled and result["learned_before_score"] == 0
    for kind in ("prequant", "quantized", "sliding", "ttt"):
        if f"{kind}_val_loss" in result:
            assert abs(result[f"{kind}_val_loss"] - math.log(64)) < 2, kind
    weights = tg.load_arrays(folder / "trained.bin")[1]
    model = tg.GPT(config, tg.Run())
    clips = tg.scaled_clips(config, result["clip_factor"])  # FIT_ARTIFACT=fill finds room in every toy
    model.load(tg.dequantize(tg.quantize(weights, clips, tg.Run().device), config))
    score = evaluation_of(model, tg.load_validation(config), config).score(config.eval_seq_len)
    assert score.loss == result["quantized_val_loss"] != result["prequant_val_loss"]
    with short_coder_states():
        codes = tg.read_artifact(folder / "artifact.bin", config)[0]["blocks.1.attn.q"]["codes"]
    assert codes.dtype == (np.int16 if config.trellis_states else np.int8)  # half steps of two grids


def test_host_waits_once_in_a_training_step(finished: Finished) -> None:
    """Making rows, dealing them, and logging wait for nothing; only the loss of a step is fetched."""
    assert len(finished.steps) == SIZES["ITERATIONS"]
    for waits in finished.steps:
        assert len(waits) == 1 and waits[0].startswith("copy to the host in update"), waits


def test_host_waits_at_most_twice_in_a_chunk(finished: Finished) -> None:
    """Of adaptation by adapters, only the nats of a chunk are fetched."""
    assert bool(finished.batches) == (finished.config.ttt_enabled and finished.config.ttt_kind == "lora_phased")
    for chunks, waits in finished.batches:
        assert chunks > 1 and len(waits) <= 2 * chunks, waits


@pytest.mark.filterwarnings("ignore")  # of NumPy, about the interpreter
def test_kernels_train_on_the_device_as_the_plain_functions(exact_bfloat16: None) -> None:
    """Triton's interpreter computes what lies inside of the tensors of the device: a row, its gradients, an update."""
    config = tg.load_config(
        small_env("default", NUM_LAYERS=2, NUM_LOOPS=0, PARALLEL_START_LAYER=0, ROW_TOKENS=32, MUON_BACKEND_STEPS=1)
    )[0]
    results = []
    for wanted in ("triton", "plain"):
        with device():
            run = tg.start_run({})
            model = tg.GPT(dataclasses.replace(config, kernels=wanted), run)
            optimizer, plan = tg.Optimizer(model, config, run), tg.layer_plan(config, False)
            row = tg.training_row(tg.NoiseStream(config.vocab_size), 0, config, run)
            losses = []
            for _ in range(2):
                loss = model(row.inputs, row.targets, plan, row.segments).mean()
                loss.backward()
                gradients, numbers = optimizer.exchange(plan, [loss.detach()])
                optimizer.step(gradients, 1.0, 0.9)
                losses += numbers.tolist()
            results.append(losses)
    assert results[0] != results[1] and results[0] == pytest.approx(results[1], rel=0.01)


def test_kernels_are_compared_on_the_device_even_where_gradients_are_off() -> None:
    """Inputs of the comparison lie on the device; a scorer may ask for the first model under no_grad."""
    with pretend(), torch.no_grad():
        assert tg.disagreement(tg.PLAIN, CUDA) == 0


def test_rows_follow_the_memory_of_the_device() -> None:
    """All of TRAIN_BATCH_TOKENS / 8 where it fits, less on a small GPU, and never another length than ROW_TOKENS."""
    env = small_env("baseline", ROW_TOKENS=0, TRAIN_BATCH_TOKENS=8192, VAL_BATCH_TOKENS=256)
    config, rows = tg.load_config(env)[0], []
    for memory, row in ((2**30, 0), (2**22, 0), (2**22, 512)):
        with device(memory=memory) as rules:
            wanted = dataclasses.replace(config, row_tokens=row)
            rows.append(tg.fit_device(wanted, tg.start_run({}), QUIET).train_row_tokens)
            assert not rules.waits
    assert rows[0] == 1024 and 32 <= rows[1] < 1024 and rows[2] == 512


# Choice of the attention


@pytest.mark.parametrize(
    ("options", "wanted", "outcome"),
    [
        (dict(), {}, "fa3"),
        (dict(fa3=False, flagged_varlen=True), {}, "varlen"),
        (dict(capability=(10, 0), flagged_varlen=True), {}, "varlen"),  # FlashAttention-3 has no kernels for Blackwell
        (dict(capability=(8, 0), flagged_varlen=True), dict(ATTN_BACKEND="fa3"), "fa3 needs a Hopper.*usable.*varlen"),
        (dict(fa3=False, flagged_varlen=True), dict(ATTN_BACKEND="fa3"), "flash_attn_interface.*varlen.*=auto"),
        (dict(), dict(ATTN_BACKEND="sdpa"), "sdpa is for a CPU.*fa3"),
        (dict(capability=(7, 5)), {}, "Hopper.*Ampere.*none.*install"),
        (dict(), dict(MODEL_DIM=48, ROPE_DIMS=4), "MODEL_DIM / NUM_HEADS=12 .*multiple of 8"),
    ],
)
def test_attention_is_settled_before_training(
    options: dict, wanted: dict, outcome: str, toy_data: ToyData, tmp_path: Path
) -> None:
    """The first back-end that this GPU can run, or one line that says what is missing, before any row is read."""
    config = toy_data.config(RUNS_DIR=tmp_path, RUN_ID="toy", KERNELS="plain", **wanted)
    with device(**options):
        if outcome in ("fa3", "varlen"):
            assert tg.choose_attention(config, CUDA)[0].startswith(outcome)
            return
        with (
            pytest.raises(tg.UserError, match=outcome),
            mock.patch.object(tg, "training_row", side_effect=AssertionError),
        ):
            tg.main(config, tg.start_run({}))


BACKENDS = [("fa3", False), ("varlen", True)] + [("varlen", False)] * (not FLAGGED)


@pytest.mark.parametrize(("name", "flagged"), BACKENDS)
def test_attention_on_the_device_is_that_of_the_cpu(name: str, flagged: bool) -> None:
    """Packed and dense, results and gradients, with grouped heads, a segment of one token and a padded table."""
    random, config = torch.Generator().manual_seed(0), toy_config(ATTN_BACKEND=name)
    shapes = [(1, 40, 4, 8), (1, 40, 2, 8), (1, 40, 2, 8), (1, 40, 4, 8)]
    q, k, v, g = (torch.randn(shape, generator=random).bfloat16() for shape in shapes)
    lengths = np.array([17, 1, 22])
    with device(flagged_varlen=flagged):
        run = tg.start_run({})
        attend = tg.choose_attention(config, run.device)[1]
        for segments in (tg.pack_segments(lengths, 32, run), None):
            there = [x.to(run.device).requires_grad_() for x in (q, k, v)]
            out = attend(*there, segments)
            assert out.is_cuda and out.dtype == torch.bfloat16 and out.shape == q.shape
            out.backward(g.to(run.device))
            found = [x.detach().cpu().float() for x in (out, *(x.grad for x in there))]
            here = [x.float().requires_grad_() for x in (q, k, v)]
            expected = tg.attend_sdpa(*here, segments and tg.pack_segments(lengths, 32, tg.Run()))
            expected.backward(g.float())
            for a, b in zip(found, (expected.detach(), *(x.grad for x in here))):
                torch.testing.assert_close(a, b, atol=0.03, rtol=0.03)


# The device itself


@pytest.fixture
def rules() -> Iterator[Rules]:
    with pretend() as rules:
        yield rules


MIXED = {
    "sum": lambda here, there: here + there,
    "sum into the host": lambda here, there: here.add_(there),
    "host vector with a number there": lambda here, there: here + there.sum(),
    "product": lambda here, there: there @ here,
    "cat": lambda here, there: torch.cat([here, there]),
    "where": lambda here, there: torch.where(there > 0, here, there),
    "stack of numbers": lambda here, there: torch.stack([here[0], there[0]]),
    "loss": lambda here, there: torch.nn.functional.linear(there, here),
    "foreach": lambda here, there: torch._foreach_mul_([there], here[0]),
    "host data by an index there": lambda here, there: here[there.long()],
    "lookup": lambda here, there: torch.nn.functional.embedding(here.long(), there[:, None]),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_both_devices_do_not_mix(name: str, rules: Rules) -> None:
    """Neither forward nor in place, whichever of the two comes first."""
    with pytest.raises(RuntimeError, match="same device|on cpu"):
        MIXED[name](torch.ones(3), torch.ones(3, device=CUDA))


def test_a_host_number_goes_with_a_tensor_of_the_device(rules: Rules) -> None:
    """Tensors of no dimension in element-wise operators, without a wait."""
    there, number = torch.ones(3, device=CUDA), torch.tensor(2.0)
    for result in (there * number, number * there, there.add_(number), torch.where(there > 0, number, there)):
        assert isinstance(result, PretendedTensor) and result.device == CUDA and result.is_cuda
    assert not rules.waits


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "write by a mask": lambda x: x.__setitem__(x > 0, torch.zeros(3, device=CUDA)),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "unpinned": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "blocking": lambda x: torch.ones(3).pin_memory().to(CUDA),
    "new": lambda x: torch.tensor([1.0], device=CUDA),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_is_written_down_once(name: str, rules: Rules) -> None:
    """What makes a host wait for its GPU: numbers, sizes and copies that are not asynchronous from pinned memory."""
    x = torch.ones(3, device=CUDA)
    WAITS[name](x)
    assert len(rules.waits) == 1, rules.waits


def test_what_stays_on_the_device_does_not_wait(rules: Rules) -> None:
    """Work, gradients, optimizer steps, fills, whole-number indices, and pinned asynchronous copies."""
    row = tg.move(torch.arange(3), CUDA)
    layer = torch.nn.Linear(3, 3, device=CUDA)
    torch.nn.init.constant_(layer.bias, 0.5)
    optimizer = torch.optim.AdamW([layer.bias], lr=0.1, fused=True)
    layer(torch.eye(3, device=CUDA)[row]).square().sum().backward()
    optimizer.step()
    torch.nn.utils.clip_grad_norm_([layer.bias], 1.0)
    x = torch.zeros(4, device=CUDA)
    x[row] = 1.0
    assert not rules.waits
    assert x.tolist() == [1, 1, 1, 0] and bool((layer.bias.cpu() != 0.5).any())


def test_device_refuses_what_cuda_refuses(rules: Rules) -> None:
    """numpy, pinning, another ordinal, a generator of the host, and threads that have not chosen the device."""
    x = torch.ones(3, device=CUDA)
    for refused in (x.numpy, lambda: np.asarray(x), x.pin_memory, lambda: torch.ones(2, device="cuda:1")):
        with pytest.raises((TypeError, RuntimeError)):
            refused()
    drawn = torch.empty(3, device=CUDA).uniform_(generator=torch.Generator(CUDA).manual_seed(1))
    assert torch.equal(drawn.cpu(), torch.empty(3).uniform_(generator=torch.Generator().manual_seed(1)))
    with pytest.raises(RuntimeError, match="generator"):
        x.uniform_(generator=torch.Generator())
    problems: list[str] = []

    def work(choose: bool) -> None:
        try:
            if choose:
                torch.cuda.set_device(CUDA)
            (x + 1).cpu()
        except RuntimeError as error:
            problems.append(str(error))

    for choose in (True, False):
        thread = threading.Thread(target=work, args=(choose,))
        thread.start()
        thread.join()
    assert len(problems) == 1 and "set_device" in problems[0]
    assert len([wait for wait in rules.waits if wait.startswith("copy to the host")]) == 2  # one of the good thread


def test_nothing_of_the_device_is_left_behind() -> None:
    """Outside of the context, torch is as before."""
    before = torch.cuda.is_available(), torch.Generator, torch.get_float32_matmul_precision(), tg.Run().padded
    with device():
        assert tg.start_run({}).device == CUDA and tg.start_run({}).dtype == torch.bfloat16
    assert before == (torch.cuda.is_available(), torch.Generator, torch.get_float32_matmul_precision(), False)
    assert tg.import_error("flash_attn_interface") and torch.tensor([1.0]).device.type == "cpu"


def attention_arguments(**changes: Any) -> dict[str, Any]:
    """Arguments that FlashAttention takes, but for the changes."""
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=CUDA)
    shapes = dict(q=(8, 4, 16), k=(8, 2, 16), v=(8, 2, 16))
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16, device=CUDA) for name, shape in shapes.items()}
    return tensors | dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, causal=True) | changes


def offsets(*numbers: int, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.tensor(numbers, dtype=dtype, device=CUDA))


def bad_heads(*shape: int) -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bfloat16, device=CUDA) for name in "kv"}


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "float32": (lambda: dict(q=torch.ones(8, 4, 16, device=CUDA)), "bf16"),
    "two dtypes": (lambda: dict(k=torch.ones(8, 2, 16, device=CUDA).half()), "key and value of"),
    "host offsets": (lambda: dict(cu_seqlens_q=torch.tensor([0, 8], dtype=torch.int32)), "on CUDA"),
    "int64 offsets": (lambda: offsets(0, 3, 3, 8, dtype=torch.int64), "int32"),
    "falling offsets": (lambda: offsets(0, 5, 3, 8), "rise"),
    "offsets from 1": (lambda: offsets(1, 3, 8), "rise"),
    "offsets that end early": (lambda: offsets(0, 3, 7), "rise"),
    "too small a maximum": (lambda: dict(max_seqlen_q=4), "max_seqlen is 4"),
    "a tensor as maximum": (lambda: dict(max_seqlen_k=torch.tensor(5)), "not int"),
    "strided channels": (lambda: dict(q=torch.ones(8, 16, 4, device=CUDA).bfloat16().mT), "contiguous"),
    "heads": (lambda: bad_heads(8, 3, 16), "heads"),
    "lengths": (lambda: bad_heads(7, 2, 16), "lengths"),
    "head dimension": (lambda: bad_heads(8, 2, 12) | dict(q=bad_heads(8, 4, 12)["k"]), "head dimension"),
    "dense": (lambda: dict(q=bad_heads(1, 8, 4, 16)["k"]), "packed"),
    "segments": (lambda: dict(cu_seqlens_k=offsets(0, 4, 8)["cu_seqlens_q"]), "different segments"),
}


@pytest.mark.parametrize("name", WRONG)
def test_attention_refuses_wrong_arguments(name: str, rules: Rules) -> None:
    """What a build of FlashAttention refuses or silently misreads."""
    assert pretended_cuda.flash_attn_varlen_func(**attention_arguments()).shape == (8, 4, 16)
    make, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        pretended_cuda.flash_attn_varlen_func(**attention_arguments(**make()))


# Planted faults: the tests above would notice them


def train_once(toy_data: ToyData) -> list[list[str]]:
    """The waits of the steps of a small training run."""
    env = small_env("baseline", DATA_PATH=toy_data.folder, TOKENIZER_PATH=toy_data.tokenizer)
    config, steps = tg.load_config(env)[0], []
    with device() as rules, watched(rules.waits, steps, []):
        tg.Trainer(config, tg.start_run({}), QUIET).loop()
    return steps


def waits_of_rows(toy_data: ToyData) -> list[str]:
    """The waits while the rows of a step are made: here, because a thread makes them ahead of the loop's steps."""
    env = small_env("baseline", DATA_PATH=toy_data.folder, TOKENIZER_PATH=toy_data.tokenizer)
    with device() as rules:
        trainer = tg.Trainer(tg.load_config(env)[0], tg.start_run({}), QUIET)
        before = len(rules.waits)
        trainer.step_rows(0)
        return rules.waits[before:]


def test_planted_waits_and_mixtures_are_noticed(toy_data: ToyData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second wait in a step, a row that stays on the host, unpinned rows, and int64 offsets."""
    step = tg.Optimizer.step

    def waiting_step(self: tg.Optimizer, gradients: list[Tensor], *rest: float) -> None:
        assert float(gradients[0].sum()) < 1e9
        step(self, gradients, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tg.Optimizer, "step", waiting_step)
        assert {len(waits) for waits in train_once(toy_data)} == {2}
    with monkeypatch.context() as patch:
        assert not waits_of_rows(toy_data)
        patch.setattr(tg, "move", lambda tensor, device: tensor.to(device, non_blocking=True))
        assert waits_of_rows(toy_data)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cpu"):
        patch.setattr(tg, "move", lambda tensor, device: tensor)
        train_once(toy_data)
    pack = tg.pack_segments
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="int32"):
        wide = lambda *args: (segments := pack(*args))._replace(cu_seqlens=segments.cu_seqlens.long())
        patch.setattr(tg, "pack_segments", wide)
        train_once(toy_data)
