"""A pretended CUDA device: tensors that say they lie on cuda:0 and are computed on the CPU, under a GPU's rules.

Operations that mix such tensors with host tensors raise, waits of the host for the device are written down, and the
attention of FlashAttention-3 and of PyTorch's varlen_attn is checked against what those kernels accept. Memory and
speed are not pretended, and what the C++ side of PyTorch sees is the meta device with a number that nobody else uses:
that one, unlike cuda, has a back-end in every build, but no kernels that could run by accident.

    with pretended_cuda() as device:
        run = tg.start_run({})       # cuda:0, bfloat16
        ...
        device.waits                 # ["item in update:2685", ...]
"""

import contextlib
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before torch.cuda is replaced: importing it asks for devices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, STAND_IN = torch.device("cuda", 0), torch.device("meta", 7)
aten, HostGenerator = torch.ops.aten, torch.Generator

# Operators that wait for the device to tell the host a number or a size.
WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::is_nonzero": "bool",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_consecutive": "unique_consecutive",
    "aten::unique_dim": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::_linalg_check_errors": "errors of linalg",
    "aten::_linalg_svd": "svd",
}


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended device; `host` is the CPU tensor with its numbers."""

    host: Tensor
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> "PretendedTensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=STAND_IN
        )
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func}: this thread has not called torch.cuda.set_device")

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def uniform_(self, *args: float, generator: HostGenerator | None = None) -> Tensor:
        return super().uniform_(*args, generator=checked(generator))

    def normal_(self, *args: float, generator: HostGenerator | None = None) -> Tensor:
        return super().normal_(*args, generator=checked(generator))

    def __repr__(self, **unused: Any) -> str:
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"


class PretendedGenerator(HostGenerator):
    """A random generator of the pretended device; asked for one of another device, it makes that."""

    device = property(lambda self: CUDA)

    def __new__(cls, device: Any = "cpu") -> HostGenerator:
        return super().__new__(cls) if on_device(torch.device(device)) else HostGenerator(device)


def checked(generator: HostGenerator | None) -> HostGenerator | None:
    if generator is not None and not isinstance(generator, PretendedGenerator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    return generator


def on_device(device: torch.device | None) -> bool:
    if device is not None and device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError(f"CUDA error: invalid device ordinal {device.index}")
    return device is not None and (device.type == "cuda" or device == STAND_IN)


class Rules(TorchDispatchMode):
    """What a GPU would do with each operator of one thread."""

    def __init__(self, waits: list[str]):
        super().__init__()
        self.waits = waits

    def wait(self, what: str) -> None:
        """Writes down a wait of the host, with the place in the script that it comes from."""
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.endswith("train_gpt.py"):
            frame = frame.f_back
        place = f"{frame.f_code.co_name}:{frame.f_lineno}" if frame else "elsewhere"
        self.waits.append(f"{what} in {place}")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        known: dict[int, PretendedTensor] = {}  # by the identity of the host tensor inside
        hosts: list[Tensor] = []
        bare = [inside(value, known, hosts) for value in args]
        options = {key: inside(value, known, hosts) for key, value in kwargs.items()}
        device = options.get("device")
        here = on_device(device) if device is not None else bool(known)
        if name in PINNING:
            return PINNING[name](*args)
        if not known and not here:
            return func(*args, **kwargs)
        if here and device is not None:
            options["device"] = torch.device("cpu")
        if name == "aten::_to_copy":
            self.transfer(bool(known), here, args[0], options.get("non_blocking", False))
        elif name == "aten::copy_":
            here = isinstance(args[0], PretendedTensor)
            self.transfer(isinstance(args[1], PretendedTensor), here, args[1], (*args, False)[2], args[0])
        else:
            self.check(func, name, args, kwargs, bool(known), hosts)
        kernel = ATTENTION.get(name)
        result = kernel(func, args, kwargs) if kernel else func(*bare, **options)
        return outside(result, known) if here else result

    def transfer(self, leaves: bool, arrives: bool, source: Tensor, asynchronous: bool, target: Any = None) -> None:
        """A copy between host and device waits unless it is asynchronous and the host's memory is pinned."""
        if leaves != arrives:
            end = source if arrives else target
            if not (asynchronous and getattr(end, "pinned", False)):
                self.wait("copy to the device" if arrives else "copy to the host")

    def check(self, func: Any, name: str, args: tuple, kwargs: dict, some_here: bool, hosts: list[Tensor]) -> None:
        """Raises for tensors of both devices in one operator, and writes down operators that wait."""
        if name in WAITING:
            self.wait(WAITING[name])
        elif name == "aten::repeat_interleave" and isinstance(args[0], Tensor) and kwargs.get("output_size") is None:
            self.wait("repeat_interleave")
        elif name in ("aten::index", "aten::index_put", "aten::index_put_"):
            picks = [pick for pick in args[1] if pick is not None]
            if isinstance(args[0], PretendedTensor) and any(not isinstance(p, PretendedTensor) for p in picks):
                self.wait("copy of an index to the device")
                hosts = [host for host in hosts if all(host is not pick for pick in picks)]
            if any(pick.dtype in (torch.bool, torch.uint8) for pick in picks):
                self.wait("mask as an index")
        if hosts and some_here and not accepted(func, name, args, hosts):
            shapes = [tuple(host.shape) for host in hosts]
            raise RuntimeError(f"{func}: tensors on cuda:0 and on cpu {shapes}, expected all on the same device")


def accepted(func: Any, name: str, args: tuple, hosts: list[Tensor]) -> bool:
    """Whether CUDA takes these host tensors as numbers: of no dimension, in an element-wise operator of two tensors
    whose first one, if it is written to, is on the device."""
    pointwise = torch.Tag.pointwise in func.tags and sum(isinstance(arg, Tensor) for arg in args) == 2
    numbers = all(host.dim() == 0 and host.device.type == "cpu" for host in hosts)
    written = func._schema.is_mutable and not isinstance(args[0], PretendedTensor)
    return numbers and not written and (pointwise or name in ("aten::where", "aten::index_put_", "aten::index_put"))


def inside(value: Any, known: dict[int, PretendedTensor], hosts: list[Tensor]) -> Any:
    """An argument with host tensors in place of pretended ones, which are noted in `known`; the others, in `hosts`.

    No closure: one that calls itself is a cycle, and PyTorch 2.9 strips tensors that the collector finds in a cycle of
    their attributes, although autograd has saved them.
    """
    if isinstance(value, PretendedTensor):
        known[id(value.host)] = value
        return value.host
    if isinstance(value, Tensor):
        hosts.append(value)
    elif isinstance(value, (list, tuple)):
        return [inside(item, known, hosts) for item in value]
    return value


def outside(result: Any, known: dict[int, PretendedTensor]) -> Any:
    """Results as tensors of the device; what an operator wrote in place is the tensor that it was given."""
    if isinstance(result, Tensor):
        return known[id(result)] if id(result) in known else PretendedTensor(result)
    return type(result)(outside(item, known) for item in result) if isinstance(result, (list, tuple)) else result


def pinned(tensor: Tensor, *unused: Any) -> Tensor:
    if isinstance(tensor, PretendedTensor) or tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.dtype}' on cuda:0, only dense CPU tensors can be pinned")
    copy = tensor.clone()
    copy.pinned = True
    return copy


PINNING = {"aten::_pin_memory": pinned, "aten::is_pinned": lambda tensor, *unused: getattr(tensor, "pinned", False)}


# Attention. The kernels take bfloat16 or float16 tensors (tokens, heads, d) whose last dimension is contiguous, and
# int32 offsets on the device. Wrong ones are refused by a build, or silently misread: here all of them are refused.


def check_attention(q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any) -> None:
    """Raises RuntimeError for what the FlashAttention kernels do not accept, or read wrongly."""

    def need(condition: Any, message: str) -> None:
        if not condition:
            raise RuntimeError(f"FlashAttention: {message}")

    need(all(isinstance(t, PretendedTensor) for t in (q, k, v, cu_q, cu_k)), "every tensor must be on CUDA")
    need(q.dtype in (torch.bfloat16, torch.float16), f"only supports fp16 and bf16, not {q.dtype}")
    need(q.dtype == k.dtype == v.dtype, f"query, key and value of {q.dtype}, {k.dtype}, {v.dtype}")
    need(q.dim() == k.dim() == v.dim() == 3, "packed tensors are (tokens, heads, head_dim)")
    need(all(t.stride(-1) == 1 for t in (q, k, v)), "the last dimension must be contiguous")
    need(k.shape == v.shape and len(q) == len(k) and q.size(1) % k.size(1) == 0, "heads or lengths do not fit")
    need(q.size(-1) == k.size(-1) and q.size(-1) % 8 == 0 and q.size(-1) <= 256, f"head dimension {q.size(-1)}")
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        need(cu.dtype == torch.int32, f"offsets must be int32, not {cu.dtype}")
        need(cu.dim() == 1 and cu.is_contiguous(), "offsets must be one contiguous row")
        lengths = cu.host.diff()
        need(cu.host[0] == 0 and cu.host[-1] == len(q) and (lengths >= 0).all(), "offsets must rise from 0 to the end")
        need(type(longest) is int, f"the largest length is {type(longest).__name__}, not int")
        need(lengths.max() <= longest, f"a segment of {int(lengths.max())} tokens, but max_seqlen is {longest}")
    need(torch.equal(cu_q.host, cu_k.host), "different segments of queries and keys")


def weights(
    q: Tensor, k: Tensor, cu: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float]:
    """float32 queries and keys (heads, n, d), one key for each query head, with what each token attends to (heads, n, n)
    and the scale."""
    place, scale = torch.arange(len(q)), scale or q.size(-1) ** -0.5
    segment = torch.searchsorted(cu.long(), place, right=True)
    unseen = segment[:, None] != segment
    if causal:
        unseen |= place[:, None] < place
    q, k = q.float().transpose(0, 1), heads_of(k, q.size(1))
    return q, k, (scale * q @ k.mT).masked_fill(unseen, -torch.inf).softmax(-1), scale


def heads_of(x: Tensor, heads: int) -> Tensor:
    """Keys or values (n, K, d) for each query head: (heads, n, d)."""
    return x.float().repeat_interleave(heads // x.size(1), 1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
    """Packed attention on the CPU: float32 inside, rounded once."""
    out = weights(q, k, *how)[2] @ heads_of(v, q.size(1))
    return out.transpose(0, 1).contiguous().to(q.dtype)


def attend_gradients(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v. By hand, because no autograd exists below a dispatch."""
    queries, keys, p, scale = weights(q, k, *how)
    g, values = g.float().transpose(0, 1), heads_of(v, q.size(1))
    dp = g @ values.mT
    ds = scale * p * (dp - (dp * p).sum(-1, keepdim=True))
    grouped = [x.unflatten(0, (k.size(1), -1)).sum(1) for x in (ds.mT @ queries, p.mT @ g)]
    return tuple(x.transpose(0, 1).contiguous().to(q.dtype) for x in (ds @ keys, *grouped))


class PackedAttention(torch.autograd.Function):
    """attend for pretended tensors, with the checks of the kernels."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, *rest: Any) -> Tensor:
        check_attention(q, k, v, cu_q, cu_k, max_q, max_k)
        ctx.save_for_backward(q, k, v, cu_q)
        ctx.rest = rest
        return PretendedTensor(attend(q.host, k.host, v.host, cu_q.host, *rest))

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple:
        hosts = [tensor.host for tensor in (g, *ctx.saved_tensors)]
        return *map(PretendedTensor, attend_gradients(*hosts, *ctx.rest)), *[None] * 6


def varlen_operator(func: Any, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    """The operator inside of the installed release's varlen_attn, in place of its kernel."""
    given = {argument.name: argument.default_value for argument in func._schema.arguments}
    given |= dict(zip(given, args)) | kwargs
    q, k, v = (given[name] for name in ("query", "key", "value"))
    check_attention(q, k, v, *(given[name] for name in ("cu_seq_q", "cu_seq_k", "max_q", "max_k")))
    hosts, rest = [t.host for t in (q, k, v, given["cu_seq_q"])], (given["is_causal"], given.get("scale"))
    if "grad_out" in given:
        return attend_gradients(given["grad_out"].host, *hosts, *rest)
    return attend(*hosts, *rest), torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)


ATTENTION = {"torch_attn::_varlen_attn": varlen_operator, "torch_attn::_varlen_attn_backward": varlen_operator}


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """FlashAttention-3, dense (B, T, heads, d)."""
    offsets = PretendedTensor(torch.arange(0, q.size(0) * q.size(1) + 1, q.size(1), dtype=torch.int32))
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    out = flash_attn_varlen_func(
        *packed, offsets, offsets, q.size(1), q.size(1), None, None, softmax_scale, causal, qv, q_descale, k_descale,
        v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin,
    )  # fmt: skip
    return out.unflatten(0, q.shape[:2])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    """FlashAttention-3, packed. Arguments as in hopper/flash_attn_interface.py of Dao-AILab/flash-attention."""
    unused = (seqused_q, seqused_k, qv, q_descale, k_descale, v_descale, pack_gqa)
    if any(value is not None for value in unused) or window_size != (-1, -1) or attention_chunk or softcap:
        raise NotImplementedError("an option of FlashAttention-3 that the pretended one does not know")
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return PackedAttention.apply(q, k, v, *offsets, causal, softmax_scale)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn with the arguments that it had in PyTorch 2.10."""
    if query.size(1) != key.size(1) or return_aux is not None:
        raise RuntimeError("varlen_attn of PyTorch 2.10 needs as many key heads as query heads")
    return PackedAttention.apply(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale)


def module(name: str, **functions: Callable) -> ModuleType:
    """A module that import and find_spec find in sys.modules."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(functions)
    return made


@contextlib.contextmanager
def pretended_cuda(
    fa3: bool = True, flagged_varlen: bool = False, capability: tuple[int, int] = (9, 0), memory: int = 80 * 2**30
) -> Iterator[Rules]:
    """torch with one pretended GPU, FlashAttention-3 (`fa3`), and with `flagged_varlen` the varlen_attn of 2.10.

    Yields the rules of this thread; `waits` is the ledger of all threads that have called torch.cuda.set_device.
    """
    rules, threads = Rules([]), threading.local()
    threads.entered = True

    def set_device(device: Any) -> None:
        assert on_device(torch.device(device)), device
        if not getattr(threads, "entered", False):
            Rules(rules.waits).__enter__()  # for as long as the thread lives
            threads.entered = True

    name = "NVIDIA H100 80GB HBM3"
    properties = dict(name=name, total_memory=memory, multi_processor_count=132)
    properties |= dict(zip(("major", "minor"), capability))
    queries = dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda *unused: True,
        is_current_stream_capturing=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=set_device,
        get_device_name=lambda device=None: name,
        get_device_capability=lambda device=None: capability,
        get_device_properties=lambda device=None: SimpleNamespace(**properties),
        mem_get_info=lambda device=None: (memory, memory),
        memory_allocated=lambda device=None: 2**30,
        memory_reserved=lambda device=None: 2**30,
        max_memory_allocated=lambda device=None: 2**30,
        max_memory_reserved=lambda device=None: 2**30,
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
        synchronize=lambda device=None: rules.wait("synchronize"),
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        _lazy_init=lambda: None,
    )
    modules: dict[str, Any] = {"flash_attn_interface": None, "kernels": None}
    if fa3:
        functions = dict(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
        modules["flash_attn_interface"] = module("flash_attn_interface", **functions)
    if flagged_varlen:
        modules["torch.nn.attention.varlen"] = module("torch.nn.attention.varlen", varlen_attn=varlen_attn)
    stream = SimpleNamespace(is_capturing=lambda: False)  # AdamW of PyTorch 2.14 asks
    replaced = {name: sys.modules[name] for name in modules if name in sys.modules}
    lifted, precision = torch._C._only_lift_cpu_tensors(), torch.get_float32_matmul_precision()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes a host tensor first, and copies it in the open
    try:
        sys.modules.update(modules)
        with mock.patch.multiple(torch.cuda, **queries), mock.patch.object(torch, "Generator", PretendedGenerator):
            with mock.patch.object(torch.accelerator, "current_stream", lambda *unused: stream), rules:
                yield rules
    finally:
        for module_name in modules:
            sys.modules.pop(module_name)
        sys.modules.update(replaced)
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.set_float32_matmul_precision(precision)
