"""Shared pieces of the benchmarks: a stopwatch, the machine's ceilings, and data of the right shape where none is there.

Speed does not depend on what the tokens say, only on their number and on the lengths of documents.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg


def seconds(function: Callable, run: tg.Run, repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        run.synchronize()
        start = time.perf_counter()
        function()
        run.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matrix_product_rate(run: tg.Run) -> float:
    """Operations per second of a large square product in the run's dtype: the ceiling of model FLOP utilisation."""
    side = 8192 if run.device.type == "cuda" else 1024
    a = torch.randn(side, side, device=run.device, dtype=run.dtype)
    return 2 * side**3 / seconds(lambda: a @ a, run)


def document_lengths(total: int, random: np.random.Generator) -> np.ndarray:
    """Lengths like those of FineWeb documents in tokens: log-normal, median about 430, mean about 810, at least 2."""
    lengths = np.maximum(np.exp(random.normal(6.06, 1.13, total // 200 + 10)), 2).astype(int)
    return lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1]


def synthetic_tokens(total: int, vocab_size: int) -> np.ndarray:
    """About `total` random ids in documents that begin with BOS."""
    random = np.random.default_rng(0)
    lengths = document_lengths(total, random)
    tokens = random.integers(4, vocab_size, lengths.sum())
    tokens[np.cumsum(lengths) - lengths] = tg.BOS_ID
    return tokens


def synthetic_validation(total: int, vocab_size: int) -> tg.Validation:
    """A validation split of about `total` random tokens, three bytes each."""
    tokens = synthetic_tokens(total, vocab_size)
    starts = np.flatnonzero(tokens == tg.BOS_ID)
    ends = np.append(starts[1:], len(tokens) - 1)
    documents = np.stack([starts, ends - starts], 1)
    counts = torch.full((len(tokens),), 3)
    return tg.Validation(torch.from_numpy(tokens), counts, documents[documents[:, 1] > 0])


def with_data(config: tg.Config, folder: Path) -> tg.Config:
    """`config` where its data exists; else with random shards in `folder`, and a validation split that fits them."""
    if config.dataset_dir.exists():
        return config
    print(f"data:synthetic ({config.dataset_dir} does not exist)")
    tokens = synthetic_tokens(40 * config.train_batch_tokens, config.vocab_size)
    header = np.zeros(256, "<i4")
    header[:3] = tg.SHARD_MAGIC, tg.SHARD_VERSION, len(tokens)
    (folder / "fineweb_train_000000.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    tg.load_validation = lambda _: synthetic_validation(10_000, config.vocab_size)
    return dataclasses.replace(config, data_path=str(folder))
