"""Times the loader and the training step of a preset on this machine; prints key:value lines.

    PRESET=tiny python tests/bench_train.py

Needs the preset's data. Model FLOP utilisation is against the rate of a large matrix product measured in the same run.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt


def seconds(function: Callable, run: train_gpt.Run, repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        run.synchronize()
        start = time.perf_counter()
        function()
        run.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    config, _ = train_gpt.load_config(os.environ)
    run = train_gpt.start_run({})
    device, log = run.device, train_gpt.Log(None)
    print(f"device:{train_gpt.hardware(run)} threads:{torch.get_num_threads()} torch:{torch.__version__}")
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=run.dtype)
    ceiling = 2 * side**3 / seconds(lambda: a @ a, run)
    print(f"matrix_product_gflops:{ceiling / 1e9:.0f}")

    trainer = train_gpt.Trainer(config, run, log)
    numbers = iter(range(10**9))
    loading = seconds(lambda: trainer.step_rows(next(numbers)), run, 20)
    loader_rate = config.train_batch_tokens / loading
    print(f"loader_tokens_per_s:{loader_rate:.0f}")
    rows = trainer.step_rows(0)
    for name, looping in (("unlooped", False), ("looped", True)):
        step = seconds(lambda looping=looping: trainer.update(rows, looping, 1.0, 0.9), run)
        rate = config.train_batch_tokens / step
        flops = train_gpt.describe(config)["matrix_flops_per_token"][name] * rate
        print(
            f"{name}_ms_per_step:{1000 * step:.1f} tokens_per_s:{rate:.0f} mfu:{flops / ceiling:.3f}"
            f" loader_to_training_ratio:{loader_rate / rate:.0f}",
            flush=True,
        )
    print(f"peak_memory_mib:{train_gpt.peak_memory_mib(run)}")


if __name__ == "__main__":
    main()
