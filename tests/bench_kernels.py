"""Measures every fused kernel on a CUDA GPU against its plain function; prints key:value lines.

    python tests/bench_kernels.py            all kernels at the sizes of the full system (one GPU of eight)
    python tests/bench_kernels.py tiles      the matrix products again with other tiles, for the table TILES

First the ceilings of this GPU: a large copy (bytes read plus bytes written) and a large matrix product. Then one line
per function and version: time, shares of the ceilings, and the largest |result - reference| / |reference| over
results and gradients, where the reference is the plain function in float32. The inputs of the element-wise kernels
are larger than any L2 cache; those of the symmetric products are not, as in the optimizer.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

N, D, F, V, H, K, HEAD = 98304, 512, 2048, 8192, 8, 4, 64  # tokens of a row, sizes of the default model
BANKS = [(22, 512, 512), (22, 256, 512), (11, 512, 2048), (22, 512, 2048)]  # Muon's on one GPU, on their side if tall
SHARES = [(3, 512, 512), (3, 256, 512), (2, 512, 2048), (3, 512, 2048)]  # and those of each of eight
DEVICE = "cuda"
OTHER_TILES = [
    dict(ROWS=256, COLUMNS=128, DEPTH=64, num_warps=8, num_stages=4),
    dict(ROWS=256, COLUMNS=128, DEPTH=64, num_warps=8, num_stages=3),
    dict(ROWS=128, COLUMNS=256, DEPTH=64, num_warps=8, num_stages=3),
    dict(ROWS=128, COLUMNS=128, DEPTH=64, num_warps=8, num_stages=4),
    dict(ROWS=128, COLUMNS=128, DEPTH=64, num_warps=4, num_stages=4),
    dict(ROWS=128, COLUMNS=128, DEPTH=32, num_warps=8, num_stages=4),
    dict(ROWS=64, COLUMNS=64, DEPTH=64, num_warps=4, num_stages=4),
    dict(ROWS=64, COLUMNS=64, DEPTH=128, num_warps=4, num_stages=3),
]


class Case(NamedTuple):
    """One function at one size, with its least traffic in bytes and its work in flops: forward, and with backward."""

    name: str
    field: str  # of Kernels
    tensors: tuple[Tensor, ...]
    rest: tuple
    bytes: tuple[float, ...]  # every input read once, every output written once; weights stay in the cache
    flops: tuple[float, ...]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device=DEVICE)).bfloat16().requires_grad_()


def cases() -> Iterator[Case]:
    """All kernels at full size. Each is made when its turn comes, for the logits take 1.6 GB."""
    row, wide = 2.0 * N * D, 2.0 * N * F  # bytes
    product = 2.0 * N * D * F
    tensors = (draw(N, D), draw(F, D, scale=D**-0.5), draw(D, F, scale=F**-0.5))
    # The hidden layer: pre and h written, h read; backward h and pre read, the gradient of pre written, read twice.
    yield Case("mlp", "mlp", tensors, (0.5,), (2 * row + 3 * wide, 6 * row + 8 * wide), (2 * product, 6 * product))
    angles = torch.rand(N, 1, 8, device=DEVICE)
    tensors, size = (draw(1, N, H + K, HEAD), draw(H)), 2.0 * N * (H + K) * HEAD
    yield Case("heads", "heads", tensors, (angles.cos(), angles.sin()), (2 * size, 5 * size), (0, 0))
    tensors = (draw(N, H, HEAD), draw(N, K, HEAD), draw(N, H))
    y, v = 2.0 * N * H * HEAD, 2.0 * N * K * HEAD
    yield Case("exclusive_gate", "exclusive_gate", tensors, (), (2 * y + v, 5 * y + 3 * v), (0, 0))
    tensors, size = (draw(N, V, scale=3.0),), 2.0 * N * V
    yield Case("nll", "nll", tensors, (torch.randint(V, (N,), device=DEVICE), 30.0), (size, 3 * size), (0, 0))
    for n, rows, columns in BANKS + SHARES:  # flops are those of the whole product
        a = draw(n, rows, columns, scale=columns**-0.5).detach()
        s, square = a @ a.mT, 2.0 * n * rows * rows
        yield Case(
            f"x_xt_{n}x{rows}x{columns}", "symmetric", (a,), (), (2.0 * a.numel() + square,), (square * columns,)
        )
        yield Case(f"b_s_c_ss_{n}x{rows}", "symmetric", (s, s, 2.0, -0.5), (), (2 * square,), (square * rows,))


def milliseconds(function: Callable, repeats: int = 15) -> float:
    """Median time of a call; calls are queued by tens, so that the launch counts only where the GPU waits for it."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


def run(function: Callable, case: Case, tensors: tuple, upstream: list[Tensor] | None) -> list[Tensor]:
    """Results, and gradients where upstream gradients are given."""
    with torch.set_grad_enabled(upstream is not None):
        result = function(*tensors, *case.rest)
    results = result if isinstance(result, tuple) else (result,)
    gradients = () if upstream is None else torch.autograd.grad(results, tensors, upstream)
    return [value.detach() for value in (*results, *gradients)]


def measure(case: Case, copy_rate: float, product_rate: float) -> None:
    """One line for each version of a case."""
    plain, fused = getattr(tg.PLAIN, case.field), getattr(tg.fused_kernels(), case.field)
    exact = tuple(x.detach().float().requires_grad_() if isinstance(x, Tensor) else x for x in case.tensors)
    results = run(plain, case, case.tensors, None)
    upstream = [torch.randn_like(r) for r in results] if len(case.bytes) == 2 else None
    reference = run(plain, case, exact, upstream and [g.float() for g in upstream])
    compiled = {"plain_compiled": torch.compile(plain, fullgraph=True, dynamic=False)}
    compiled |= {"fused_compiled": torch.compile(fused, fullgraph=True, dynamic=False)}
    for version, function in ({"plain": plain, "fused": fused} | compiled).items():
        try:
            ours = run(function, case, case.tensors, upstream)
            error = max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, reference))
            line = f"kernel:{case.name} version:{version} error:{error:.2e}"
            for part, given, size, flops in zip(("forward", "both"), (None, upstream), case.bytes, case.flops):
                ms = milliseconds(lambda: run(function, case, case.tensors, given))  # noqa: B023
                line += f" {part}_ms:{ms:.4f} {part}_bandwidth_share:{size / ms / copy_rate:.3f}"
                line += f" {part}_flops_share:{flops / ms / product_rate:.3f}" if flops else ""
        except Exception as failure:  # noqa: BLE001 - one version that fails must not hide the others
            line = f"kernel:{case.name} version:{version} failed:{type(failure).__name__}: {failure}".splitlines()[0]
        print(line, flush=True)


def ceilings() -> tuple[float, float]:
    """Bytes per millisecond of a 4 GiB copy, and flops per millisecond of a product of two 8192 x 8192 matrices."""
    source = torch.randn(2**30, device=DEVICE)
    target = torch.empty_like(source)
    copy_rate = 2 * source.nbytes / milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
    return copy_rate, 2 * 8192**3 / milliseconds(lambda: a @ b)


def try_tiles() -> None:
    """Every matrix-product kernel with every tile; those that do not fit the GPU say so."""
    x, up, down = (tensor.detach() for tensor in (draw(N, D), draw(F, D), draw(D, F)))
    pre, out = draw(N, F).detach(), torch.empty(N, F, device=DEVICE, dtype=torch.bfloat16)
    a, hardware = draw(22, 512, 512).detach(), tg.tile_set(x)
    jobs = {
        "up": lambda tma: tg.mlp_product(x, up, torch.empty_like(pre), out, 0.5, "up", tma),
        "slope": lambda tma: tg.mlp_product(x, down, pre, out, 0.5, "slope", tma),
        "many": lambda tma: tg.symmetric(a, None, 1.0, 0.0),
        "few": lambda tma: tg.symmetric(a[:3], None, 1.0, 0.0),
    }
    for kind, job in jobs.items():
        table = tg.TILES[hardware, kind]
        for tile in [table, *OTHER_TILES]:
            square = kind in ("many", "few")
            tg.TILES[hardware, kind] = {k: v for k, v in tile.items() if not square or k != "COLUMNS"}
            for tma in [False] if square or hardware != "hopper" else [True, False]:
                try:
                    result = f"ms:{milliseconds(lambda: job(tma)):.4f}"  # noqa: B023
                except Exception as failure:  # noqa: BLE001 - mostly too much shared memory
                    result = f"failed:{type(failure).__name__}"
                print(f"kernel:{kind} tma:{tma} {' '.join(f'{k}:{v}' for k, v in tile.items())} {result}", flush=True)
        tg.TILES[hardware, kind] = table


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a CUDA GPU: torch.cuda.is_available() is False here")
    torch.backends.cuda.matmul.allow_tf32 = False  # the float32 reference
    torch.manual_seed(0)
    import triton

    print(f"device:{torch.cuda.get_device_name()} torch:{torch.__version__} triton:{triton.__version__}")
    copy_rate, product_rate = ceilings()
    print(f"copy_gb_per_s:{copy_rate / 1e6:.0f} matrix_product_tflops:{product_rate / 1e9:.0f}")
    print(f"kernels:{tg.choose_kernels('auto', torch.device(DEVICE))[0]}", flush=True)
    if "tiles" in sys.argv[1:]:
        try_tiles()
        return
    for case in cases():
        measure(case, copy_rate, product_rate)
    torch.cuda.synchronize()
    print(f"peak_memory_mib:{torch.cuda.max_memory_allocated() // 2**20}")


if __name__ == "__main__":
    main()
