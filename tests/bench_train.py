"""Times the loader and the training step of a preset on this machine; prints key:value lines.

    PRESET=tiny python tests/bench_train.py

On the preset's data, or on random tokens where there is none. Model FLOP utilisation is against the rate of a large matrix product measured in the same run.
"""

import os
import tempfile
from pathlib import Path

import torch
from bench_helpers import matrix_product_rate, seconds, with_data

import train_gpt


def main() -> None:
    config, _ = train_gpt.load_config(os.environ)
    run = train_gpt.start_run({})
    log = train_gpt.Log(None)
    print(f"device:{train_gpt.hardware(run)} threads:{torch.get_num_threads()} torch:{torch.__version__}")
    ceiling = matrix_product_rate(run)
    print(f"matrix_product_gflops:{ceiling / 1e9:.0f}")

    folder = tempfile.TemporaryDirectory()
    trainer = train_gpt.Trainer(with_data(config, Path(folder.name)), run, log)
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
