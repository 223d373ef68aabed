"""The fused kernels, run by Triton's interpreter on the CPU, against float64 formulas written anew here."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton.runtime.interpreter")
import train_gpt as tg

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of NumPy, about the interpreter
    pytest.mark.usefixtures("exact_bfloat16"),
]

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of |result - reference| / |reference|
FUSED = tg.fused_kernels()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other inputs every time, the seed printed; memory that no kernel has written reads as NaN."""
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(2**31)))
    print(f"SEED={seed}")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(tg, "ELEMENT_BLOCK", 128)  # several rounds of every loop at toy sizes
    monkeypatch.setattr(tg, "VOCABULARY_BLOCK", 32)
    yield
    torch.use_deterministic_algorithms(False)


def error(result: Tensor, reference: Tensor) -> float:
    assert result.shape == reference.shape
    result, reference = result.detach().double(), reference.detach()
    return float((result - reference).norm() / reference.norm().clamp_min(1e-30))


def check(fused: Callable, reference: Callable, *inputs: Tensor, tolerance: float | None = None) -> None:
    """Results and the gradients of all floating inputs agree, for random upstream gradients."""
    dtype = inputs[0].dtype
    ours = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs]
    results, references = fused(*ours), reference(*exact)
    results = results if isinstance(results, tuple) else (results,)
    references = references if isinstance(references, tuple) else (references,)
    # An upstream gradient with the last two axes exchanged in memory: kernels must not assume contiguity.
    upstream = [torch.randn_like(r).mT.contiguous().mT if r.dim() > 1 else torch.randn_like(r) for r in results]
    torch.autograd.backward(results, upstream)
    torch.autograd.backward(references, [g.double() for g in upstream])
    pairs = [*zip(results, references), *((a.grad, b.grad) for a, b in zip(ours, exact) if a.is_floating_point())]
    errors = [error(a, b) for a, b in pairs]
    print("errors", " ".join(f"{e:.1e}" for e in errors))
    assert all(e <= (tolerance or TOLERANCE[dtype]) for e in errors), errors
    assert all(r.dtype == dtype or r.dtype == torch.float32 for r in results)
    assert all(x.grad.dtype == x.dtype for x in ours if x.is_floating_point())


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)


# MLP


def exact_mlp(slope: float) -> Callable:
    def formula(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        p = x @ up.T
        return (torch.where(p > 0, p, slope * p) ** 2) @ down.T

    return formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, slope", [((37, 24, 50), 0.5), ((2, 5, 9, 33), 0), ((1, 8, 16), 0.3), ((9, 7, 5), 1.0)])
def test_mlp(shape: tuple[int, ...], slope: float, dtype: torch.dtype) -> None:
    """y and the gradients of x, up and down, for any slope, also of batched rows and of a single one."""
    *rows, D, hidden = shape
    x, up = draw(*rows, D, dtype=dtype), draw(hidden, D, dtype=dtype, scale=D**-0.5)
    down = draw(D, hidden, dtype=dtype, scale=hidden**-0.5)
    # A single row of 8 sums may cancel: there the plain function too exceeds 0.01 in 0.7 % of draws, 0.019 in 20,000.
    tolerance = 3e-2 if dtype == torch.bfloat16 and shape == (1, 8, 16) else None
    check(lambda *a: FUSED.mlp(*a, slope), exact_mlp(slope), x, up, down, tolerance=tolerance)


def test_mlp_hidden() -> None:
    """With the identity as down-projection y is the activation itself, nearly always bit for bit the plain one."""
    x, up, eye = draw(37, 24, dtype=torch.bfloat16), draw(24, 24, dtype=torch.bfloat16, scale=0.2), torch.eye(24)
    eye = eye.bfloat16()
    check(lambda *a: FUSED.mlp(*a, 0.5), exact_mlp(0.5), x, up, eye)
    plain, fused = tg.plain_mlp(x, up, eye, 0.5), FUSED.mlp(x, up, eye, 0.5)
    assert (plain == fused).float().mean() > 0.95
    # The other products are rounded to the next bfloat16, 2^-8 to 2^-7 away, which squaring doubles.
    assert torch.allclose(fused.float(), plain.float(), rtol=2**-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["up", "slope"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_descriptors(kind: str, dtype: torch.dtype) -> None:
    """The variants with TMA descriptors and with pointers give the same bits, edges included."""
    M, D, hidden = 37, 48, 80  # the interpreter of Triton 3.5 wants rows of whole 16 elements
    left, pre = draw(M, D, dtype=dtype), draw(M, hidden, dtype=dtype)
    right = draw(hidden, D, dtype=dtype) if kind == "up" else draw(D, hidden, dtype=dtype)
    results = []
    for tma in (False, True):
        arrays = [pre.clone(), torch.empty(M, hidden, dtype=dtype)]
        tg.mlp_product(left, right, *arrays, 0.5, kind, tma)
        results.append(arrays)
    assert all(torch.equal(a, b) for a, b in zip(*results))


# Loss


def exact_nll(softcap: float) -> Callable:
    def formula(logits: Tensor, targets: Tensor) -> Tensor:
        capped = softcap * torch.tanh(logits / softcap)
        return -F.log_softmax(capped, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    return formula


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, softcap", [((11, 77), 30), ((11, 77), 2.5), ((2, 3, 1), 15.0), ((3, 5, 64), 15.0)])
def test_nll(shape: tuple[int, ...], softcap: float, dtype: torch.dtype) -> None:
    """Nats and the gradient of the logits, for any cap and vocabulary, with several blocks to a row."""
    logits, targets = draw(*shape, dtype=dtype, scale=0.5 * softcap), torch.randint(shape[-1], shape[:-1])
    targets.view(-1)[0], targets.view(-1)[-1] = 0, shape[-1] - 1
    check(lambda *a: FUSED.nll(*a, softcap), exact_nll(softcap), logits, targets)
    reference = exact_nll(softcap)(logits.double(), targets)
    assert (FUSED.nll(logits, targets, softcap) - reference).abs().max() < 1e-5  # nats; the input is exact in both
    assert torch.allclose(FUSED.nll(logits, targets, softcap), tg.plain_nll(logits, targets, softcap), atol=1e-5)


def test_nll_extremes() -> None:
    """Saturated logits stay finite, a target outside the vocabulary is NaN, several targets go to the plain one."""
    logits = torch.tensor([[1000.0, -1000.0, 0.0]] * 3, requires_grad=True)
    nats = FUSED.nll(logits, torch.tensor([0, 1, 3]), 30.0)
    nats[:2].sum().backward()
    assert torch.allclose(nats[:2], torch.tensor([0.0, 60.0])) and nats[2].isnan()
    assert logits.grad.isfinite().all()
    several = torch.randint(77, (4, 5, 3))
    logits = draw(4, 5, 77)
    singles = torch.stack([FUSED.nll(logits, several[..., i].contiguous(), 30.0) for i in range(3)], -1)
    assert torch.allclose(FUSED.nll(logits, several, 30.0), singles, atol=1e-5)


# Queries and keys


def exact_heads(qk: Tensor, gain: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Complex numbers: a pair of channels (u, v) is u + iv, and the rotation multiplies it by cos - i sin."""
    n, half = qk / (qk.square().mean(-1, keepdim=True) + tg.NORM_EPS).sqrt(), cos.size(-1)
    pair = torch.complex(n[..., :half], n[..., half : 2 * half]) * torch.complex(cos, -sin)
    turned = torch.cat([pair.real, pair.imag, n[..., 2 * half :]], -1)
    return turned[:, :, : len(gain)] * gain.unsqueeze(-1), turned[:, :, len(gain) :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, H, half", [((1, 37, 12, 64), 8, 8), ((2, 5, 9, 6), 6, 3), ((3, 1, 2, 5), 1, 1), ((1, 7, 3, 4), 2, 0)]
)
def test_heads(shape: tuple[int, ...], H: int, half: int, dtype: torch.dtype) -> None:
    """q, k and the gradients of the products and of the float32 gain, for odd sizes, several rows, and no rotation."""
    angles = 6 * torch.rand(shape[1], 1, half)
    tables = angles.cos(), angles.sin()
    qk, gain = draw(*shape, dtype=dtype), draw(H).bfloat16().float()  # a gain that bfloat16 holds
    check(lambda *a: FUSED.heads(*a, *tables), lambda *a: exact_heads(*a, *(t.double() for t in tables)), qk, gain)
    for ours, plain in zip(FUSED.heads(qk, gain, *tables), tg.plain_heads(qk, gain, *tables)):
        assert error(ours, plain.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_joint_linear(dtype: torch.dtype) -> None:
    """One product of joined weights is the products side by side, and so are the gradients."""
    x, a, b = draw(2, 5, 7, dtype=dtype), draw(6, 7, dtype=dtype), draw(3, 7, dtype=dtype)
    for function in (FUSED.joint_linear, tg.plain_joint_linear):
        check(function, lambda x, a, b: torch.cat([x @ a.T, x @ b.T], -1), x, a, b)


# Exclusive attention and gate


def exact_exclusive_gate(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    own = v.repeat_interleave(y.size(-2) // v.size(-2), -2)
    along = (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True)
    return (y - along * own) * gate.unsqueeze(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((13,), 8, 4, 24), ((2, 5), 6, 2, 7), ((3,), 3, 3, 16), ((1, 4), 5, 1, 1)])
def test_exclusive_gate(shape: tuple, dtype: torch.dtype) -> None:
    """The result and the gradients of y, v and gate; every query head meets its own value head."""
    lead, H, K, d = shape
    y, v, gate = draw(*lead, H, d, dtype=dtype), draw(*lead, K, d, dtype=dtype), torch.rand(*lead, H).to(dtype)
    small = d == 1  # there nothing is left of y, so that only rounding errors remain
    if not small:
        check(FUSED.exclusive_gate, exact_exclusive_gate, y, v, gate)
    plain = tg.plain_exclusive_gate(y, v, gate)
    assert (FUSED.exclusive_gate(y, v, gate) - plain).abs().max() < (1e-6 if small else 0.05)


def test_exclusive_gate_of_zero_values() -> None:
    """A value of length 0 leaves y alone, and gradients are finite."""
    y, v, gate = draw(3, 4, 8).requires_grad_(), torch.zeros(3, 2, 8, requires_grad=True), torch.rand(3, 4)
    out = FUSED.exclusive_gate(y, v, gate)
    out.sum().backward()
    assert torch.equal(out, y * gate.unsqueeze(-1))
    assert v.grad.isfinite().all() and y.grad.isfinite().all()


# Newton-Schulz


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 37, 24), (3, 1, 5), (2, 40, 20), (1, 20, 9)])
def test_symmetric(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """a a^T and b S + c S S with their gradients, both tile sizes, transposed inputs."""
    a = draw(*shape, dtype=dtype)
    # Small, so that the two terms of b S + c S S and of its gradient never nearly cancel: one matrix is a single number.
    s = draw(shape[0], shape[1], shape[1], dtype=dtype, scale=0.1)
    s = s + s.mT
    check(FUSED.symmetric, lambda a: a @ a.mT, a)
    check(lambda s: FUSED.symmetric(s, s, 0.7, -1.3), lambda s: 0.7 * s @ s.mT - 1.3 * s, s)
    check(lambda a, s: FUSED.symmetric(a, s, 2.0, 0.5), lambda a, s: 2.0 * a @ a.mT + 0.5 * s, a, s)
    turned = a.mT.contiguous().mT  # the same numbers, laid out the other way
    assert torch.equal(FUSED.symmetric(turned), FUSED.symmetric(a))
    product = FUSED.symmetric(s, s, 0.7, -1.3)
    assert error(product, product.mT.double()) < 1e-6
    assert error(product, tg.plain_symmetric(s, s, 0.7, -1.3).double()) < TOLERANCE[dtype]


# All of them


def all_operators() -> list[tuple[Callable, tuple]]:
    """Every operator with arguments."""
    x, up, down = draw(9, 8), draw(16, 8), draw(8, 16)
    logits, targets = draw(5, 33), torch.randint(33, (5,))
    qk, gain, cos, sin = draw(1, 5, 6, 8), draw(4), draw(5, 1, 2), draw(5, 1, 2)
    y, v, gate, a = draw(5, 4, 8), draw(5, 2, 8), torch.rand(5, 4), draw(2, 9, 7)
    ops = torch.ops.parameter_golf
    need = [t.requires_grad_() for t in (x, up, down, logits, qk, gain, y, v, gate, a)]
    plain = [t.detach() for t in need]
    return [
        (ops.mlp.default, (x, up, down, 0.5)),
        (ops.mlp_slope.default, (plain[0], plain[2], draw(9, 16), 0.5)),
        (ops.nll.default, (logits, targets, 30.0)),
        (ops.nll_slope.default, (plain[3], targets, draw(5), draw(5), 30.0)),
        (ops.heads.default, (qk, gain, cos, sin)),
        (ops.heads_slope.default, (*plain[4:6], cos, sin, draw(1, 5, 4, 8), draw(1, 5, 2, 8))),
        (ops.exclusive_gate.default, (y, v, gate)),
        (ops.exclusive_gate_slope.default, (*plain[6:9], draw(5, 4, 8))),
        (ops.stored.default, (x,)),
        (ops.symmetric.default, (a, None, 1.0, 0.0)),
        (ops.symmetric.default, (a, draw(2, 9, 9), 1.0, 0.5)),
    ]


@pytest.mark.parametrize("number", range(11))
def test_operators_are_well_formed(number: int) -> None:
    """PyTorch's own checks: schema, shape function, autograd registration, tracing ahead of time."""
    op, arguments = all_operators()[number]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op, arguments, test_utils=checks)


def test_one_graph() -> None:
    """A block made of all kernels traces as one full graph, and gives the eager result and gradients."""

    angles = torch.rand(9, 1, 1)

    def block(x: Tensor, x0: Tensor, gain: Tensor, up: Tensor, down: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        n = FUSED.stored(x)
        q, k = FUSED.heads(FUSED.joint_linear(n, up).view(1, 9, 4, 4), gain, angles.cos(), angles.sin())
        y = FUSED.exclusive_gate((q[0] * k[0]).view(-1, 4, 2), x0.view(-1, 2, 4)[..., :2], torch.sigmoid(n[..., :4]))
        r = n + FUSED.mlp(y.flatten(-2), up, down, 0.5)
        s = FUSED.symmetric((r @ head.T).unsqueeze(0))[0]
        return FUSED.nll(s @ r @ head.T, targets, 30.0).mean()

    inputs = [draw(9, 8), draw(9, 8), draw(2), draw(16, 8), draw(8, 16), draw(33, 8)]
    targets, gradients = torch.randint(33, (9,)), []
    for function in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(*leaves, targets).backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_empty_inputs() -> None:
    """No rows, no work: an empty grid is not launched."""
    assert FUSED.mlp(draw(0, 8), draw(16, 8), draw(8, 16), 0.5).shape == (0, 8)
    assert FUSED.nll(draw(0, 33), torch.zeros(0, dtype=torch.long), 30.0).shape == (0,)
    assert FUSED.heads(draw(1, 0, 6, 8), draw(4), draw(0, 1, 2), draw(0, 1, 2))[0].shape == (1, 0, 4, 8)


# The choice between fused and plain


def test_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at start-up passes right kernels, and finds a wrong one."""
    monkeypatch.setattr(tg, "ELEMENT_BLOCK", 8192)
    monkeypatch.setattr(tg, "VOCABULARY_BLOCK", 2048)
    cpu, wrong = torch.device("cpu"), tg.PLAIN._replace(symmetric=lambda a: 1.1 * tg.plain_symmetric(a))
    assert tg.disagreement(tg.PLAIN, cpu) == 0
    assert tg.disagreement(wrong, cpu) > 0.05
    halved = tg.PLAIN._replace(symmetric=lambda a: tg.plain_symmetric(0.5 * a + 0.5 * a.detach()))
    assert tg.disagreement(halved, cpu) == 0.5  # a right result with a wrong gradient
    elementwise = dict(heads=FUSED.heads, exclusive_gate=FUSED.exclusive_gate)
    assert 0 < tg.disagreement(tg.PLAIN._replace(**elementwise), cpu) < 0.01


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto falls back with a reason, triton refuses with one, plain never asks."""
    choose, cpu, gpu = tg.choose_kernels.__wrapped__, torch.device("cpu"), torch.device("cuda")  # not the kept answers
    assert choose("plain", gpu) == ("plain", tg.PLAIN)
    assert choose("auto", cpu) == ("plain (there is no CUDA device)", tg.PLAIN)
    monkeypatch.setattr(tg, "disagreement", lambda fused, device: 0.005)
    assert choose("triton", gpu) == ("triton", FUSED)
    assert choose("auto", gpu) == ("triton", FUSED)
    for failure in (lambda fused, device: 0.5, lambda fused, device: 1 / 0):
        monkeypatch.setattr(tg, "disagreement", failure)
        name, chosen = choose("auto", gpu)
        assert name.startswith("plain (") and chosen == tg.PLAIN
        with pytest.raises(tg.UserError, match="KERNELS=triton"):
            choose("triton", gpu)


def test_triton_is_optional() -> None:
    """Importing the module imports no Triton, and without Triton the choice is the plain functions."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, train_gpt\n"
        "print(train_gpt.choose_kernels('auto', torch.device('cuda'))[0])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("plain (ModuleNotFoundError")


def test_every_kernel_compiles_for_hopper() -> None:
    """Triton's compiler takes every kernel that `register` or `launch` can reach, for a GPU that is not there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [dict(word.split(":") for word in line.split()) for line in done.stdout.splitlines()]
    kernels = {name for name, value in vars(tg).items() if name.endswith("_kernel") and callable(value)}
    assert {line["function"] for line in lines} == kernels and min(int(line["cubin_bytes"]) for line in lines) > 1000
