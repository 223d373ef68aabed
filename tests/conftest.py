"""Shared pieces of the tests: a toy configuration, a toy corpus with its tokenizer, and small helpers."""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; read when Triton is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start: the cores belong to other workers
os.environ["REPORT"] = "0"  # of the many runs here; tests of the report ask for it

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch

import train_gpt as tg

torch.set_num_threads(1)  # toy sizes are faster on one thread, and results do not depend on the machine
# Processes that tests start are forked from one that has imported all this, but never run it.
multiprocessing.set_forkserver_preload(
    ["torch", "torch._dynamo", "train_gpt", "brotli", "sentencepiece", "matplotlib.backends.backend_agg"]
    + ["matplotlib.pyplot", "tqdm", "conftest", "robust_helpers"]
)

TOY = dict(
    VOCAB_SIZE=64,
    MODEL_DIM=32,
    NUM_LAYERS=4,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=2.0,
    ROPE_DIMS=4,
    XSA_LAST_N=4,
    NUM_LOOPS=1,
    LOOP_START=1,
    LOOP_END=2,
    PARALLEL_START_LAYER=3,
    TRAIN_BATCH_TOKENS=256,
    ROW_TOKENS=64,
    TRAIN_SEQ_LEN=32,
    EVAL_SEQ_LEN=32,
    VAL_BATCH_TOKENS=1024,
    ITERATIONS=6,
    MAX_WALLCLOCK_SECONDS=0,
    WARMUP_STEPS=0,
    TRAIN_LOG_EVERY=1,
    MUON_MOMENTUM_WARMUP_STEPS=4,
    EMA_DECAY=0.5,
    ENABLE_LOOPING_AT=0.5,
    GPTQ_CALIBRATION_BATCHES=5,
    EVAL_STRIDE=8,
    TTT_CHUNK_SIZE=8,
    TTT_EVAL_SEQ_LEN=32,
    TTT_BATCH_SIZE=4,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=6,
    TTT_LORA_LR=0.01,
    PHASED_TTT_PREFIX_DOCS=12,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_LR=0.01,
    GLOBAL_TTT_CHUNK_TOKENS=128,
)

# Three visits in place of six: where it is the targets that matter, or the weights, and not what the network is.
FEW_VISITS = dict(NUM_LAYERS=2, LOOP_START=0, LOOP_END=0, PARALLEL_START_LAYER=0, XSA_LAST_N=1)


def toy_env(**changes: Any) -> dict[str, str]:
    """The toy settings as environment variables."""
    return {key: str(value) for key, value in (TOY | changes).items()}


# Sizes alone: what makes a preset that preset (layers, loops, gates, wirings, quantiser, kind of adaptation) stays.
SMALL = dict(
    VOCAB_SIZE=64, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROW_TOKENS=64, TRAIN_BATCH_TOKENS=256, TRAIN_SEQ_LEN=32,
    EVAL_SEQ_LEN=32, VAL_BATCH_TOKENS=1024, EVAL_STRIDE=8, ITERATIONS=6, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0,
    TRAIN_LOG_EVERY=1, MUON_MOMENTUM_WARMUP_STEPS=4, GPTQ_CALIBRATION_BATCHES=5, TTT_CHUNK_SIZE=8, TTT_EVAL_SEQ_LEN=32,
    TTT_BATCH_SIZE=4, TTT_LORA_RANK=4, TTT_LORA_ALPHA=6, TTT_LORA_LR=0.01, PHASED_TTT_PREFIX_DOCS=12,
    GLOBAL_TTT_CHUNK_TOKENS=128, TTT_CHUNK_TOKENS=256, TTT_BATCH_SEQS=1, LQER_ASYM_GROUP=16,
)  # fmt: skip


def preset_env(preset: str, **changes: Any) -> dict[str, str]:
    """A preset at toy size, as environment variables: its own mechanisms, the sizes of SMALL."""
    own = tg.load_config({"PRESET": preset})[0]
    steps = [f"{limit // 32}:{chunk // 4}" for limit, chunk in own.chunk_steps]
    sizes = dict(
        SMALL,
        PRESET=preset,
        MARKER_PAIR_MODE=0,  # a vocabulary of 64 has no room for the ids that it is about; see marker_pairs
        TTT_CHUNK_STEPS=",".join(steps),
        ROPE_DIMS=8 if own.rope_dims == own.head_dim else 4,
        ROPE_TRAIN_SEQ_LEN=own.rope_train_seq_len // 64,
        BIGRAM_VOCAB_SIZE=own.bigram_vocab_size // 64,
        BIGRAM_DIM=16,
        WARMDOWN_ITERS=min(own.warmdown_iters, 4),
        SWA_EVERY=1,
        SWA_START_FRAC=0.9,
    )
    return {key: str(value) for key, value in (sizes | changes).items()}


def shallow_env(preset: str, **changes: Any) -> dict[str, str]:
    """The same with three layers, among which is every kind of visit that the preset has, and skip into one."""
    own = tg.load_config({"PRESET": preset})[0]
    layers = dict(
        NUM_LAYERS=3,
        NUM_LOOPS=min(own.num_loops, 1),
        LOOP_START=1,
        LOOP_END=1,
        PARALLEL_START_LAYER=2 if own.parallel_start_layer else 0,
        PARALLEL_RESIDUAL_START=2 if own.parallel_residual_start >= 0 else -1,
        XSA_LAST_N=min(own.xsa_last_n, 2),
    )
    return preset_env(preset, **layers | changes)


def toy_config(**changes: Any) -> tg.Config:
    """The toy settings as a Config; `changes` are environment names."""
    return tg.load_config(toy_env(**changes))[0]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter, gates and lambdas included, a random value of a sensible size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 1 / parameter.size(-1) ** 0.5 if parameter.dim() == 3 else 0.5
            parameter.normal_(0, spread, generator=generator)
    return model


def program_of(model: Callable, config: tg.Config, run: tg.Run = tg.Run()) -> tg.Program:
    """A program whose model, in every use, is this one."""
    program = tg.Program(config, run)
    program.model = program.score = program.adapt = model
    return program


def evaluation_of(
    model: Callable, validation: tg.Validation, config: tg.Config, run: tg.Run = tg.Run()
) -> tg.Evaluation:
    """A pass over this validation stream with this model."""
    return tg.Evaluation(program_of(model, config, run), validation, QUIET)


def random_model(config: tg.Config, seed: int = 0) -> tg.GPT:
    """A model none of whose parameters is at a neutral value."""
    return randomise(tg.GPT(config, tg.Run()), seed)


def random_tokens(count: int, vocab_size: int, seed: int = 0, bos_every: int = 0) -> np.ndarray:
    """Random ids other than BOS, with one BOS at a random place of each stretch of `bos_every` tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(4, vocab_size, count)
    for begin in range(0, count, bos_every) if bos_every else ():
        tokens[min(begin + generator.integers(bos_every), count - 1)] = tg.BOS_ID
    return tokens


def document_table(tokens: np.ndarray) -> np.ndarray:
    """(first input, number of targets) of each document, by walking the stream."""
    rows, start = [], 0
    for position in range(1, len(tokens)):
        if tokens[position] == tg.BOS_ID:
            rows.append((start, position - start))
            start = position
    rows.append((start, len(tokens) - 1 - start))
    return np.array([row for row in rows if row[1] > 0]).reshape(-1, 2)


def make_validation(tokens: np.ndarray, seed: int = 0) -> tg.Validation:
    """A validation split of these tokens, with random byte counts."""
    counts = np.random.default_rng(seed).integers(0, 9, len(tokens))
    counts[0] = 0
    return tg.Validation(torch.from_numpy(tokens), torch.from_numpy(counts), document_table(tokens))


def validation_of_lengths(lengths: list[int], vocab_size: int = 64, seed: int = 0) -> tg.Validation:
    """A validation split of documents with exactly these numbers of targets."""
    generator, parts = np.random.default_rng(seed), []
    for length in lengths:
        parts.append(np.append(tg.BOS_ID, generator.integers(4, vocab_size, length - 1)))
    tokens = np.append(np.concatenate(parts), generator.integers(4, vocab_size))  # the last target is no BOS
    validation = make_validation(tokens, seed)
    assert validation.documents[:, 1].tolist() == lengths
    return validation


@contextlib.contextmanager
def recorded_nll() -> Iterator[dict[int, float]]:
    """Collects stream position -> nll of everything that is tallied inside; fails when a target comes twice."""
    seen: dict[int, float] = {}
    add = tg.Tally.add

    def record(self: tg.Tally, nll: torch.Tensor, positions: Any) -> None:
        for position, value in zip(np.asarray(positions).tolist(), nll.tolist(), strict=True):
            assert position not in seen, f"target {position} was scored twice"
            seen[position] = value
        add(self, nll, positions)

    with mock.patch.object(tg.Tally, "add", record):
        yield seen


def nll_per_target(validation: tg.Validation, scorer: Callable[[tg.Validation], Any]) -> np.ndarray:
    """The nll that `scorer` tallied for each stream position; fails unless each target was tallied exactly once."""
    with recorded_nll() as seen:
        scorer(validation)
    assert sorted(seen) == list(range(1, len(validation.tokens)))
    return np.array([np.nan, *(seen[position] for position in range(1, len(validation.tokens)))])


def replace_plain(patch: pytest.MonkeyPatch, **functions: Callable) -> None:
    """Makes every model that is built from now on compute with these functions in place of the plain ones."""
    plain = tg.PLAIN._replace(**functions)
    patch.setattr(tg, "PLAIN", plain)
    patch.setattr(tg, "choose_kernels", lambda wanted, device: ("plain", plain))


@pytest.fixture
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 as a GPU treats it: the interpreter truncates where a GPU rounds, and multiplies bit patterns."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    tg.fused_kernels()  # imports triton.language as tg.tl
    builder, tl = interpreter.InterpreterBuilder, tg.tl
    cast, multiply = builder.cast_impl, builder.create_dot

    def exact_cast(self: Any, x: Any, target: Any) -> Any:
        kinds, data = (x.dtype.scalar, target.scalar), np.ascontiguousarray(x.data)
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        elif kinds == (tl.bfloat16, tl.float32):
            bits = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float().numpy()
        else:
            return cast(self, x, target)
        return interpreter.TensorHandle(bits.reshape(x.data.shape), target.scalar)

    def exact_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (exact_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(builder, "cast_impl", exact_cast)
    monkeypatch.setattr(builder, "create_dot", exact_dot)


@contextlib.contextmanager
def short_coder_states() -> Iterator[None]:
    """COMPRESSOR=rans codes small streams in many states at once, as large ones; in one state a toy takes seconds."""
    with mock.patch.object(tg, "RANS_RUN", 512):
        yield


@pytest.fixture
def marker_pairs(monkeypatch: pytest.MonkeyPatch) -> int:
    """Makes MARKER_PAIR_MODE possible at toy size: the space is this id."""
    monkeypatch.setattr(tg, "SPACE_ID", 60)
    return tg.SPACE_ID


class OneOf(tg.Run):
    """A rank whose sums stay its own, to add up by hand what several ranks would."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@dataclasses.dataclass(frozen=True)
class Peer(tg.Run):
    """A rank that is a thread of this process: sums and broadcasts are real, without a process group."""

    meeting: Any = None  # threading.Barrier of all ranks
    table: Any = None  # list: what each rank brings

    def exchange(self, value: Any) -> list[Any]:
        """What all ranks bring, in their order."""
        self.table[self.rank] = value
        self.meeting.wait()
        values = list(self.table)
        self.meeting.wait()
        return values

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(0))

    def share(self, value: Any) -> Any:
        return self.exchange(value)[0]


def on_peers(world_size: int, job: Callable[[tg.Run], Any]) -> list[Any]:
    """What `job(run)` returns on each of `world_size` threads that are each other's ranks."""
    meeting, table = threading.Barrier(world_size, timeout=60), [None] * world_size

    def work(rank: int) -> Any:
        torch.set_num_threads(1)
        try:
            return job(Peer(rank, world_size, meeting=meeting, table=table))
        except BaseException:
            meeting.abort()  # nobody waits for a rank that has failed
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(work, rank) for rank in range(world_size)]
    errors = [error for error in (future.exception() for future in futures) if error]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


QUIET = tg.Log(None)


def write_shard(path: Path, tokens: Any, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """One shard in the challenge's format: 256 little-endian int32, then uint16 ids."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


def toy_documents(count: int, seed: int) -> list[str]:
    """Sentences over a few words, so that a toy model can learn something; very unequal lengths."""
    words = "the cat dog sees a small red house and runs to it over grey hills at noon".split()
    generator = random.Random(seed)
    documents = []
    for number in range(count):
        length = generator.choice([1, 2, 3, 5, 8, 13, 60])
        start = generator.randrange(len(words))
        documents.append(
            " ".join(words[(start + 3 * i + (generator.random() < 0.2)) % len(words)] for i in range(length))
        )
    return documents


@dataclasses.dataclass
class ToyData:
    """A dataset folder and tokenizer on disk."""

    folder: Path
    tokenizer: Path
    train_tokens: np.ndarray
    val_tokens: np.ndarray

    def env(self, **changes: Any) -> dict[str, str]:
        return toy_env(**dict(DATA_PATH=self.folder, TOKENIZER_PATH=self.tokenizer) | changes)

    def config(self, **changes: Any) -> tg.Config:
        return tg.load_config(self.env(**changes))[0]


def train_tokenizer(path: Path, sentences: list[str], vocab_size: int, **options: Any) -> Path:
    """Trains a SentencePiece model with the id convention of the challenge."""
    import sentencepiece

    settings = dict(
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=1.0,
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, **(settings | options)
        )
    return path


def build_toy_data(root: Path) -> ToyData:
    """The toy dataset: two uneven training shards of about 6,000 tokens and one validation shard."""
    import sentencepiece

    sentences = toy_documents(300, seed=1)
    tokenizer = train_tokenizer(root / "toy.model", sentences, 64)
    processor = sentencepiece.SentencePieceProcessor(str(tokenizer))
    assert processor.vocab_size() == 64
    encode = lambda documents: np.array([i for text in documents for i in [tg.BOS_ID, *processor.encode(text)]])
    train, val = encode(sentences), encode(toy_documents(26, seed=2))
    folder = root / "toy"
    write_shard(folder / "fineweb_train_000000.bin", train[:1003])
    write_shard(folder / "fineweb_train_000001.bin", train[1003:])
    write_shard(folder / "fineweb_val_000000.bin", val)
    return ToyData(folder, tokenizer, train, val)


@pytest.fixture(scope="session", autouse=True)
def begin_as_the_script_does() -> None:
    tg.settle_vector_math()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return build_toy_data(tmp_path_factory.mktemp("data"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, world_size: int, port: int, function: Any, arguments: tuple, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        torch.save(function(tg.Run(rank, world_size), *arguments), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def on_ranks(world_size: int, folder: Path, function: Any, *arguments: Any) -> list[Any]:
    """What `function(run, *arguments)` returns on each of `world_size` gloo processes."""
    folder.mkdir(parents=True, exist_ok=True)
    job = (world_size, free_port(), function, arguments, str(folder))
    torch.multiprocessing.start_processes(_rank_main, job, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes many seconds; left out with -m 'not slow'")


def scale_of(clip: np.ndarray, levels: float) -> np.ndarray:
    """fp16(clip / levels), within the positive fp16 numbers."""
    with np.errstate(over="ignore"):
        half = (clip.astype(np.float32) / np.float32(levels)).astype(np.float16)
    return np.clip(half, np.float16(2.0**-24), np.float16(65504))
