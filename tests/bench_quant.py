"""Quantises and compresses the full-size model (or PRESET) on this machine; prints key:value lines.

    python tests/bench_quant.py

Weights are Gaussian with the spread of trained ones over columns, Hessians those of correlated inputs: there is no
trained full-size model at hand, and the time does not depend on the values. The bytes of independent Gaussian
weights are those that the rate model predicts; trained weights take slightly fewer.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt


def synthetic_training(config: train_gpt.Config) -> dict[str, np.ndarray]:
    """What trained.bin would hold: Gaussian matrices and Hessians of inputs with a falling spectrum."""
    random = torch.Generator().manual_seed(0)
    model = train_gpt.GPT(config, train_gpt.Run())
    arrays = {}
    for name, array in model.arrays().items():
        matrix = name in (*train_gpt.BANKS, "tok_emb.weight")
        arrays[name] = torch.randn(array.shape, generator=random).mul_(0.05).numpy() if matrix else array
    for kind, matrix in train_gpt.MATRICES.items():
        for layer in range(config.num_layers if matrix.hessian == kind else 0):
            arrays[f"hessian.{kind}.{layer}"] = hessian(getattr(model, matrix.bank).size(-1), random)
    counts = 2e6 / torch.arange(1, config.vocab_size + 1)  # of tokens: Zipf's law
    return arrays | {"hessian.head.0": hessian(config.model_dim, random), "token_counts": counts.floor().numpy()}


def hessian(width: int, random: torch.Generator) -> np.ndarray:
    x = torch.randn(2 * width, width, generator=random) * torch.arange(1, width + 1) ** -0.25
    mixing = torch.randn(width, width, generator=random) / width**0.5
    x = x @ mixing + 0.1 * x
    return (x.T @ x).numpy()


def main() -> None:
    config, _ = train_gpt.load_config(os.environ)
    arrays = synthetic_training(config)
    parameters = sum(array.size for name, array in arrays.items() if not name.startswith(("hessian.", "token_counts")))
    print(f"parameters:{parameters} threads:{torch.get_num_threads()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start, processor = time.perf_counter(), time.process_time()
        stored = train_gpt.quantize(arrays, config, torch.device("cpu"))
        middle = time.perf_counter()
        size = train_gpt.save_artifact(Path(folder) / "artifact.bin", stored, config)
        end, processor = time.perf_counter(), time.process_time() - processor
        train_gpt.load_artifact(Path(folder) / "artifact.bin", config)
        loaded = time.perf_counter()
    print(
        f"gptq_s:{middle - start:.1f} compress_s:{end - middle:.1f} sum_s:{end - start:.1f} processor_s:{processor:.1f} load_s:{loaded - end:.1f}"
    )
    forecast = train_gpt.predicted_artifact_bytes(config)["artifact_bytes"]
    print(f"artifact_bytes:{size} forecast_bytes:{forecast} forecast_error:{forecast / size - 1:+.4f}")
    print(f"peak_memory_mib:{train_gpt.peak_memory_mib(train_gpt.Run())}")


if __name__ == "__main__":
    main()
