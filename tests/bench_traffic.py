"""Counts what a training step moves and multiplies on a GPU, without having one; prints tables and a forecast in ms.

    python tests/bench_traffic.py                   the model of PRESET and other settings, plain and with the kernels
    python tests/bench_traffic.py triton kernels    only with the kernels; and every kernel of the looped plan

Forward and backward pass over one row of ROW_TOKENS go through torch.compile as far as inductor's schedule, which says
what is fused into which kernel; nothing is compiled by Triton or launched. The model is traced on the CPU in bfloat16,
and the graph then lowered as if its tensors were on an H100. Attention is one opaque kernel with grouped heads, as
FlashAttention-3 is. Needs the pinned PyTorch (2.9.1 does too), any build of it, and Triton; takes minutes.

Rules of the count: a kernel reads each of its inputs once, as far as it looks at it, and writes each output once. A
pass is one read or one write of a (tokens, model_dim) tensor in bfloat16. Kinds of kernels:

    product       matrix products, the two of the MLP with what is fused into them
    narrow        matrix products with fewer than NARROW rows, columns or terms: those of the gates
    attention     forward or backward
    logits        all else that touches a (tokens, vocabulary) tensor
    elementwise   all else that touches a tensor with at least one entry for each token
    weights       the rest: casts of the weights, last sums of their gradients

floor_ms: each kernel takes the longer of its bytes at BANDWIDTH and its operations at PRODUCTS or ATTENTION.
forecast: with BANDWIDTH_SHARE of that bandwidth and GAP_US more for each kernel; the step has OPTIMIZER_MS on top.
All of these rates are assumptions about an H100. The budgets are sums over the smallest sets of tensors that a visit
must read and write when everything is fused that can be: 12 passes forward and 28 backward, 6 over the logits.
"""

import contextlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as tg

BANDWIDTH, PRODUCTS, ATTENTION = 3.35e12, 600e12, 300e12  # bytes and operations per second, bfloat16
BANDWIDTH_SHARE, GAP_US = 0.85, 2.0
OPTIMIZER_MS = 1.8  # Newton-Schulz shared by 8 ranks, exchange, AdamW and averaging, when they are fused and batched
CONTEXT = 400  # keys that a query sees, on average
FORWARD_BUDGET, BACKWARD_BUDGET, LOGITS_BUDGET = 12, 28, 6  # passes: element-wise of a visit; over the logits
NARROW = 64
CUDA = torch.device("cuda:0")
H100 = SimpleNamespace(
    name="H100", type="cuda", index=0, major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
    warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
KINDS = ("product", "attention", "logits", "elementwise", "narrow", "weights")


class Kernel(NamedTuple):
    """One kernel of the schedule, or one operator of KERNELS."""

    name: str
    kind: str
    bytes: float
    flops: float
    logits: float  # part of the bytes that belongs to (tokens, vocabulary) tensors
    launches: int

    def seconds(self, bandwidth: float = BANDWIDTH) -> float:
        return max(self.bytes / bandwidth, self.flops / (ATTENTION if self.kind == "attention" else PRODUCTS))


@torch.library.custom_op("bench::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Stands in for attention: the result and the log-sum-exp of each query."""
    raise NotImplementedError


@torch.library.custom_op("bench::attend_slope", mutates_args=())
def attend_slope(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Stands in for its backward pass: the gradients of q, k and v."""
    raise NotImplementedError


def save_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


attend.register_fake(lambda q, *rest: (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)))
attend_slope.register_fake(lambda g, q, k, v, *rest: tuple(map(torch.empty_like, (q, k, v))))
attend.register_autograd(
    lambda ctx, g, unused: (*attend_slope(g, *ctx.saved_tensors), None), setup_context=save_attention
)


def operator_work(name: str, inputs: list[list[int]], tokens: int) -> tuple[float, float, int]:
    """(operations, bytes moved between its own kernels, launches) of an operator, from the shapes of its tensors."""
    if name == "attend":
        return 4 * tokens * CONTEXT * inputs[0][-2] * inputs[0][-1], 0, 1
    if name == "attend_slope":
        return 10 * tokens * CONTEXT * inputs[1][-2] * inputs[1][-1], 0, 2
    if name == "mlp":  # the hidden layer is read again by the second product
        hidden, width = inputs[1]
        return 4 * tokens * hidden * width, 2 * tokens * hidden, 2
    if name == "mlp_slope":
        return 2 * tokens * inputs[1][0] * inputs[1][1], 0, 1
    return 0, 0, 1


class Scheduled(BaseException):
    """Ends the compilation of a graph once its kernels are known."""


class Schedule:
    """Kernels of the graphs that a compilation makes: the forward one first, then the backward one."""

    def __init__(self, config: tg.Config):
        self.tokens, self.vocabulary = config.train_row_tokens, config.vocab_size
        self.graphs: list[list[Kernel]] = []

    def compile(self, gm: torch.fx.GraphModule, inputs: list, **options: Any) -> Any:
        """inner_compile of inductor. What it returns stands for the compiled graph: outputs of the right shapes."""
        from torch._inductor import compile_fx

        returned = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        shapes = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in returned]
        with mock.patch.object(compile_fx, "GraphLowering", self.lowering()):
            try:
                compile_fx.compile_fx_inner(gm, inputs, **options)
            except Scheduled:
                pass

        def compiled(arguments: list) -> list:
            arguments.clear()
            return [
                torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, Tensor) else value
                for value in shapes
            ]

        compiled._boxed_call = True
        return compiled

    def lowering(self) -> type:
        from torch._inductor.graph import GraphLowering

        schedule = self

        class OnCuda(GraphLowering):
            """A graph that was traced on the CPU, lowered as if its tensors were on a GPU."""

            def __init__(self, gm: torch.fx.GraphModule, *rest: Any, **options: Any):
                mode = torch._guards.detect_fake_mode(options["example_inputs"])

                def move(value: Any) -> Any:
                    if not isinstance(value, Tensor):
                        return value
                    with mode:
                        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

                for node in gm.graph.nodes:
                    if node.kwargs.get("device") == torch.device("cpu"):
                        node.update_kwarg("device", CUDA)
                    if "val" in node.meta:
                        node.meta["val"] = torch.utils._pytree.tree_map(move, node.meta["val"])
                self.moved = options["example_inputs"] = [move(value) for value in options["example_inputs"]]
                super().__init__(gm, *rest, **options)

            def run(self, *arguments: Any) -> Any:
                return super().run(*self.moved)

            def compile_to_module(self) -> Any:
                self._update_scheduler()
                schedule.graphs.append([kernel for node in self.scheduler.nodes for kernel in schedule.price(node)])
                raise Scheduled

        return OnCuda

    def price(self, node: Any) -> Iterator[Kernel]:
        """The kernel of a node of the schedule; none for a node that only names or joins buffers."""
        from torch._inductor import ir, scheduler

        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
            return
        extern = isinstance(node, scheduler.ExternKernelSchedulerNode)
        touched = extern_tensors(node.node) if extern else fused_tensors(node)
        moved, logits = (sum(size for size, shape in touched if keep(shape)) for keep in (bool, self.is_logits))
        name, flops, launches = kernel_name(node), 0.0, 1
        kind = "logits" if logits else "elementwise" if any(self.of_row(shape) for _, shape in touched) else "weights"
        if extern:
            shapes = [list(map(int, value.get_size())) for value in node.node.inputs]
            if name in ("mm", "addmm", "bmm"):
                kind = "product" if min(*shapes[-2], *shapes[-1]) >= NARROW else "narrow"
                flops = 2.0 * torch.Size(shapes[-2]).numel() * shapes[-1][-1]
            else:
                flops, inside, launches = operator_work(name, shapes, self.tokens)
                moved += inside
                kind = "attention" if name.startswith("attend") else "product" if flops else kind
        yield Kernel(name, kind, moved, flops, logits, launches)

    def of_row(self, shape: tuple[int, ...]) -> bool:
        return self.tokens in shape

    def is_logits(self, shape: tuple[int, ...]) -> bool:
        return self.of_row(shape) and self.vocabulary in shape


def kernel_name(node: Any) -> str:
    """The operators of an element-wise kernel that give it away; the name of any other."""
    if operator := getattr(node.node, "op_overload", None):
        return operator.name().split("::")[-1].split(".")[0]
    if kernel := getattr(node.node, "python_kernel_name", None):
        return kernel.split(".")[-1]
    origins = {origin.name.rstrip("_0123456789") for part in node.get_nodes() for origin in part.node.origins}
    dull = {"view", "unsqueeze", "squeeze", "convert_element_type", "permute", "expand", "getitem", "select", "clone"}
    return "+".join(sorted(origins - dull)) or "copy"


def extern_tensors(kernel: Any) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes, shape) of the inputs and outputs of a kernel that inductor only calls."""
    outputs = getattr(kernel, "outputs", None) or [kernel]
    tensors = {str(value): value for value in (*kernel.inputs, *outputs) if hasattr(value, "get_size")}
    return [(size_of(value), tuple(map(int, value.get_size()))) for value in tensors.values()]


def size_of(value: Any) -> int:
    return int(value.get_numel()) * value.get_dtype().itemsize


def fused_tensors(node: Any) -> list[tuple[int, tuple[int, ...]]]:
    """(bytes, shape) of what a fused kernel reads and writes; what lives and dies inside it is neither."""
    from torch._inductor.virtualized import V

    parts = node.get_nodes()
    buffers = node.scheduler.name_to_buf

    def inside(name: str) -> bool:
        return name in buffers and {user.node for user in buffers[name].users} <= set(parts)

    touched = []
    for side in ("reads", "writes"):
        sizes: dict[str, dict[Any, int]] = defaultdict(dict)
        for part in parts:
            for dependency in getattr(part.read_writes, side):
                sizes[dependency.name][dependency] = int(dependency.numbytes_hint())
        made = {buffer for part in parts for buffer in part.get_buffer_names()}
        for name, parts_of_it in sizes.items():
            if inside(name) or (side == "reads" and name in made):
                continue
            buffer = V.graph.try_get_buffer(name)
            if buffer is not None:
                shape = tuple(map(int, buffer.get_size()))
                touched.append((min(size_of(buffer), sum(parts_of_it.values())), shape))
    return touched


def fused_rms(x: Tensor) -> Tensor:
    """F.rms_norm as PyTorch traces it on CUDA: one operator, which inductor takes apart."""
    return torch.ops.aten._fused_rms_norm(x, [x.size(-1)], None, tg.NORM_EPS)[0]


def kernels_of(config: tg.Config, kernels: str, looping: bool) -> tuple[list[Kernel], list[Kernel]]:
    """Kernels of the forward and of the backward pass over one row."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._functorch import config as functorch
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor

    run, schedule, T = tg.Run(), Schedule(config), config.train_row_tokens
    model = tg.GPT(config, run, "meta").to_empty(device="cpu")
    model.dtype, model.kernels = torch.bfloat16, tg.PLAIN if kernels == "plain" else tg.fused_kernels()
    for block in model.blocks:
        block.attend = lambda q, k, v, segments: attend(q, k, v, segments.cu_seqlens)[0]
    ids = torch.zeros(2, 1, T, dtype=torch.long)
    segments = tg.Segments(torch.zeros(256, dtype=torch.int32), config.train_seq_len, ids[0, 0], (), ids[0, 0])
    torch._dynamo.reset()
    answers = {"get_device_properties": H100, "current_device": 0, "get_compute_capability": 90}
    answers |= {"is_available": True, "is_bf16_supported": True}
    with contextlib.ExitStack() as patched:
        for where in (CudaInterface, CudaInterface.Worker):
            for name, value in answers.items():
                if hasattr(where, name):
                    answer = staticmethod(lambda *rest, value=value, **options: value)
                    patched.enter_context(mock.patch.object(where, name, answer))
        patched.enter_context(mock.patch.object(tg, "rms", fused_rms))
        patched.enter_context(inductor.patch(fx_graph_cache=False))
        patched.enter_context(functorch.patch(enable_autograd_cache=False))
        compiled = torch.compile(
            model, backend=lambda gm, x: compile_fx.compile_fx(gm, x, inner_compile=schedule.compile), fullgraph=True
        )
        compiled(ids[0], ids[1], tg.layer_plan(config, looping), segments).sum().backward()
    forward, backward = schedule.graphs
    return forward, backward


class Totals(NamedTuple):
    """Sums over kernels."""

    gb: float
    gflop: float
    launches: int
    floor_ms: float
    forecast_ms: float


def totals(kernels: list[Kernel]) -> Totals:
    floor = sum(kernel.seconds() for kernel in kernels)
    launches = sum(kernel.launches for kernel in kernels)
    forecast = sum(kernel.seconds(BANDWIDTH * BANDWIDTH_SHARE) for kernel in kernels) + launches * GAP_US / 1e6
    gb, gflop = (sum(getattr(kernel, field) for kernel in kernels) / 1e9 for field in ("bytes", "flops"))
    return Totals(gb, gflop, launches, 1e3 * floor, 1e3 * forecast)


def report(config: tg.Config, kernels: str, each: bool) -> None:
    """The tables of one choice of KERNELS."""
    plans = {looping: tg.layer_plan(config, looping) for looping in (False, True)[: 2 if config.num_loops else 1]}
    schedules = {looping: kernels_of(config, kernels, looping) for looping in plans}
    for looping, sides in schedules.items():
        print(f"kernels:{kernels} plan:{'looped' if looping else 'unlooped'} visits:{len(plans[looping])}")
        print("kind           GB fwd   GB bwd  kernels    GFLOP  floor_ms  forecast")
        for kind in (*KINDS, "all"):
            parts = [[k for k in side if kind in (k.kind, "all")] for side in sides]
            fwd, bwd, both = totals(parts[0]), totals(parts[1]), totals(parts[0] + parts[1])
            row = f"{both.launches:8} {both.gflop:8.0f} {both.floor_ms:9.1f} {both.forecast_ms:9.1f}"
            print(f"{kind:12} {fwd.gb:8.2f} {bwd.gb:8.2f} {row}")
        everything = sides[0] + sides[1]
        logits = sum(k.logits for k in everything) / (2 * config.train_row_tokens * config.vocab_size)
        print(f"logits_passes:{logits:.1f} of a budget of {LOGITS_BUDGET}")
        print(f"step_forecast_ms:{totals(everything).forecast_ms + OPTIMIZER_MS:.1f}")
        if each and looping == max(schedules):
            for name, side in zip(("forward", "backward"), sides):
                for k in side:
                    print(f"{name:9} {k.kind:12} {k.bytes / 1e6:8.1f} MB {k.flops / 1e9:7.1f} GFLOP {k.name}")
    if config.num_loops:
        report_passes(schedules, plans, 2 * config.train_row_tokens * config.model_dim)
    print(flush=True)


def report_passes(schedules: dict, plans: dict, one_pass: int) -> None:
    """Element-wise passes, those of the gates' narrow products included, beside their budget."""
    more = len(plans[True]) - len(plans[False])
    lines = [("forward", (0,), FORWARD_BUDGET), ("backward", (1,), BACKWARD_BUDGET)]
    for name, sides, budget in [*lines, ("both", (0, 1), FORWARD_BUDGET + BACKWARD_BUDGET)]:
        unlooped, looped = (
            sum(k.bytes for i in sides for k in schedules[looping][i] if k.kind in ("elementwise", "narrow")) / one_pass
            for looping in (False, True)
        )
        visit, average = (looped - unlooped) / more, looped / len(plans[True])
        print(
            f"passes_{name}: {visit:.1f} for one more visit, {average:.1f} a visit with embedding and skips,"
            f" of a budget of {budget}: factors {visit / budget:.2f} and {average / budget:.2f}"
        )


def main() -> None:
    if importlib.util.find_spec("triton") is None:
        sys.exit("bench_traffic.py needs Triton, which PyTorch for Linux brings along: pip install triton")
    config, _ = tg.load_config({"PRESET": "default"} | dict(os.environ))
    print(f"torch:{torch.__version__} preset:{config.preset} row_tokens:{config.train_row_tokens}")
    wanted = [word for word in sys.argv[1:] if word in ("plain", "triton")]
    for kernels in wanted or ("plain", "triton"):
        report(config, kernels, "kernels" in sys.argv)


if __name__ == "__main__":
    main()
