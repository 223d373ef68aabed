"""Times scoring and test-time training of a preset on this machine; prints key:value lines.

    PRESET=tiny python tests/bench_eval.py [TOKENS]

Scores about TOKENS (default 20,000) random tokens in documents of FineWeb's lengths, with the initial weights. Tokens
pushed through the model per token scored, and what that would mean for the 50,000 documents of the challenge, follow
from the lengths alone.
"""

import os
import sys
import time
from collections.abc import Callable
from unittest import mock

import bench_helpers
import numpy as np
import torch

import train_gpt as tg

CHALLENGE_TARGETS = 40_540_160  # of the sp8192 export


def timed(name: str, work: Callable[[], tg.Tally], run: tg.Run) -> float:
    """Runs one way of scoring, prints its speed, and returns its seconds."""
    run.synchronize()
    start = time.perf_counter()
    tally = work()
    run.synchronize()
    spent = time.perf_counter() - start
    print(f"{name}_s:{spent:.1f} {name}_scored_tokens_per_s:{tally.tokens / spent:.0f}", flush=True)
    return spent


def slowest_ranks(config: tg.Config, size: int) -> tuple[int, float]:
    """Tokens of the slowest rank of each round, in all and over those of equal shares, for the challenge's targets in
    documents of FineWeb's lengths, on eight ranks, in rounds of `size` batches."""
    lengths = bench_helpers.document_lengths(CHALLENGE_TARGETS, np.random.default_rng(0))
    documents = np.stack([np.cumsum(lengths) - lengths, lengths], 1)
    queue = tg.document_queue(documents, config.ttt_batch_size, [limit for limit, _ in config.chunk_steps])
    with mock.patch.object(tg, "ROUND_BATCHES", size):
        rounds = tg.deal_rounds(queue, config)
    loads = np.zeros((len(rounds.work), tg.TTT_TRACKS))
    for batch, place in zip(queue, zip(rounds.number, rounds.track)):
        loads[place] += tg.batch_work(batch, config)
    slowest = loads.max(1).sum()
    return int(slowest), float(slowest / loads.sum() * tg.TTT_TRACKS)


def main() -> None:
    config, _ = tg.load_config(os.environ)
    run, log = tg.start_run({}), tg.Log(None)
    program = tg.Program(config, run)
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    validation = bench_helpers.synthetic_validation(total, config.vocab_size)
    print(f"device:{tg.hardware(run)} threads:{torch.get_num_threads()} torch:{torch.__version__}")
    print(f"documents:{len(validation.documents)} targets:{len(validation.tokens) - 1}")
    tg.warm_up_evaluation(program, config, run, log)
    for name, stride in (("plain", config.eval_seq_len), ("sliding", config.eval_stride)):
        if name == "plain" or config.sliding_window_enabled:
            timed(name, lambda stride=stride: tg.Evaluation(program, validation, log).score(stride), run)
    if not config.ttt_enabled:
        return
    queue = tg.document_queue(validation.documents, config.ttt_batch_size)
    pushed = sum(tg.batch_work(batch, config) for batch in queue) / (len(validation.tokens) - 1)
    spent = timed("ttt", lambda: tg.TTT_KINDS[config.ttt_kind](tg.Evaluation(program, validation, log)), run)
    if config.ttt_kind == "lora_phased":
        for size in (tg.TTT_TRACKS, tg.ROUND_BATCHES):
            tokens, share = slowest_ranks(config, size)
            print(f"ttt_rounds_of_{size}_batches_on_8_ranks slowest_tokens:{tokens} of_equal_shares:{share:.3f}")
        real = sum(int(batch[:, 1].sum()) for batch in queue)
        padded = sum(len(batch) * int(batch[0, 1]) for batch in queue)
        print(f"ttt_pushed_per_scored:{pushed:.1f} ttt_padding_share:{1 - real / padded:.3f}")
    scale = CHALLENGE_TARGETS / (len(validation.tokens) - 1) / 8
    print(f"ttt_challenge_s_on_8_of_this_device:{spent * scale:.0f}")
    print(f"peak_memory_mib:{tg.peak_memory_mib(run)}")


if __name__ == "__main__":
    main()
