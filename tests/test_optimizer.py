"""OPTIMIZER: Muon and AdamW groups against their equations, clipping, schedules, and what is left alone."""

import math

import numpy as np
import pytest
import torch
from conftest import random_model, random_tokens, toy_config

import train_gpt as tg

RUN = tg.Run()

# Published check values of five Polar Express steps: singular value in -> singular value out.
CHECK_VALUES = {0.1: 1.0592, 0.5: 0.9106, 1.0: 0.8591, 0.001: 0.8589}


def with_gradients(config: tg.Config, looping: bool = True, seed: int = 0) -> tg.GPT:
    """A random model that carries the gradients of one row."""
    model = random_model(config, seed)
    tokens = torch.from_numpy(random_tokens(49, config.vocab_size, seed))[None]
    model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, looping)).mean().backward()
    return model


def slow_polar(matrix: np.ndarray, steps: int) -> np.ndarray:
    """One matrix in float64: unit rows, unit Frobenius norm, then the polynomial on its singular values."""
    x = matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-7)
    x = x / np.linalg.norm(x)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    for a, b, c in tg.POLAR_EXPRESS[:steps]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (u * sigma) @ vt


@pytest.mark.parametrize("rows, cols", [(16, 16), (24, 8), (8, 24)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_polar_express_equals_the_polynomial_of_singular_values(rows: int, cols: int, steps: int) -> None:
    """Each matrix of a batch equals the float64 reference through its singular value decomposition."""
    update = torch.from_numpy(np.random.default_rng(rows + steps).normal(size=(3, rows, cols)))
    fast = tg.polar_express(update.float(), steps)
    for got, matrix in zip(fast, update):
        np.testing.assert_allclose(got.numpy(), slow_polar(matrix.numpy(), steps), atol=5e-5)


def test_polar_express_maps_singular_values_into_the_published_band() -> None:
    """Everything in [0.003, 1] ends in [0.859, 1.141], with the published check values."""
    for sigma, wanted in CHECK_VALUES.items():
        for a, b, c in tg.POLAR_EXPRESS:
            sigma = a * sigma + b * sigma**3 + c * sigma**5
        assert sigma == pytest.approx(wanted, abs=1e-4)
    grid = np.geomspace(0.003, 1, 20_000)
    for a, b, c in tg.POLAR_EXPRESS:
        grid = a * grid + b * grid**3 + c * grid**5
    assert 0.8585 < grid.min() and grid.max() < 1.1415


def test_polar_express_of_zeros_is_zero() -> None:
    """Padding matrices and untouched weights stay finite; a batch mate is not affected."""
    update = torch.zeros(2, 8, 4)
    update[1] = torch.randn(8, 4)
    out = tg.polar_express(update, 5)
    assert not out[0].any()
    torch.testing.assert_close(out[1:], tg.polar_express(update[1:], 5))


def test_first_muon_update_is_nearly_orthogonal() -> None:
    """Every direction that a real first gradient has, down to 0.003 of its norm, comes out with a length near one."""
    config = toy_config(MUON_WD=0, GRAD_CLIP_NORM=0, MATRIX_LR=1.0)
    model = with_gradients(config)
    before = {name: bank.detach().clone() for name, bank in model.groups()["matrix"].items()}
    optimizer = tg.Optimizer(model, config, RUN)
    raw = [bank.grad.clone() for bank in model.groups()["matrix"].values()]
    gradients, _ = optimizer.exchange(tg.layer_plan(config, True), [])
    optimizer.step(gradients, 1.0, 0.9)
    for (name, bank), stack in zip(model.groups()["matrix"].items(), raw):
        rows, cols = bank.shape[1:]
        update = (before[name] - bank.detach()) / math.sqrt(max(1, rows / cols))
        for matrix, gradient in zip(update, stack):
            unit_rows = gradient / gradient.norm(dim=1, keepdim=True)
            sizable = int((torch.linalg.svdvals(unit_rows / unit_rows.norm()) >= 0.003).sum())
            sigma = torch.linalg.svdvals(matrix)
            assert sizable > 0.6 * len(sigma), name
            assert sigma.max() < 1.142 and int((sigma > 0.858).sum()) >= sizable, name


def test_muon_steps_equal_its_equations() -> None:
    """Two steps: momentum, Nesterov look-ahead, polar factor, decoupled decay, and sqrt(max(1, rows / cols))."""
    config = toy_config(MATRIX_LR=0.05, MUON_WD=0.3)
    model = with_gradients(config)
    banks = list(model.groups()["matrix"].values())
    muon = tg.Muon(banks, config, RUN)
    slow = [(bank.detach().double().clone(), torch.zeros_like(bank, dtype=torch.float64)) for bank in banks]
    generator = torch.Generator().manual_seed(3)
    assert {max(1.0, bank.size(1) / bank.size(2)) for bank in banks} == {1.0, 2.0}  # both cases occur
    for mu in (0.92, 0.95):
        gradients = [torch.randn(bank.shape, generator=generator) for bank in banks]
        muon.step([gradient.clone() for gradient in gradients], 0.05, mu)
        for i, (bank, gradient) in enumerate(zip(banks, gradients)):
            weight, momentum = slow[i]
            momentum = mu * momentum + gradient.double()
            polar = torch.from_numpy(np.stack([slow_polar(m.numpy(), 5) for m in gradient.double() + mu * momentum]))
            weight = weight * (1 - 0.05 * 0.3) - 0.05 * math.sqrt(max(1.0, bank.size(1) / bank.size(2))) * polar
            slow[i] = (weight, momentum)
            torch.testing.assert_close(bank.detach().double(), weight, atol=2e-5, rtol=0)
            torch.testing.assert_close(muon.momentum[i].double(), momentum, atol=1e-5, rtol=1e-5)


def test_adamw_groups_have_their_own_rates_and_decay() -> None:
    """Embedding and scalars follow decoupled AdamW with bias correction, each with its rate, decay and multiplier."""
    config = toy_config(
        GRAD_CLIP_NORM=0, TIED_EMBED_LR=0.03, EMBED_WD=0.5, SCALAR_LR=0.02, ADAM_WD=0.2, BETA1=0.8, BETA2=0.9
    )
    model = with_gradients(config)
    optimizer, plan = tg.Optimizer(model, config, RUN), tg.layer_plan(config, True)
    settings = {"embed": (0.03, 0.5), "scalar": (0.02, 0.2)}
    slow = {
        name: [p.detach().double().clone(), 0.0, 0.0, *settings[group]]
        for group in settings
        for name, p in model.groups()[group].items()
    }
    named = dict(model.named_parameters())
    for step, multiplier in enumerate((1.0, 0.3), start=1):
        if step > 1:
            tokens = torch.from_numpy(random_tokens(49, 64, step))[None]
            model(tokens[:, :-1], tokens[:, 1:], plan).mean().backward()
        for name, state in slow.items():
            g = named[name].grad.double()
            lr, wd = state[3] * multiplier, state[4]
            state[1] = 0.8 * state[1] + 0.2 * g
            state[2] = 0.9 * state[2] + 0.1 * g * g
            update = (state[1] / (1 - 0.8**step)) / ((state[2] / (1 - 0.9**step)).sqrt() + 1e-8)
            state[0] = state[0] * (1 - lr * wd) - lr * update
        gradients, _ = optimizer.exchange(plan, [])
        optimizer.step(gradients, multiplier, 0.9)
        for name, state in slow.items():
            torch.testing.assert_close(named[name].detach().double(), state[0], atol=1e-5, rtol=1e-4, msg=name)
        slow = {name: [named[name].detach().double().clone(), *state[1:]] for name, state in slow.items()}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("limit", [0.3, 1e6, 0])
def test_clipping_scales_all_gradients_by_their_global_norm(limit: float) -> None:
    """All gradients are scaled by one factor, from the norm over all of them; a large limit or 0 changes nothing."""
    config = toy_config(GRAD_CLIP_NORM=limit)
    model = with_gradients(config)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in before.values()))
    assert norm > 0.6
    shares, _ = tg.Optimizer(model, config, RUN).exchange(tg.layer_plan(config, True), [])
    after = dict(zip(tg.BANKS, shares)) | {n: p.grad for n, p in model.named_parameters() if n not in tg.BANKS}
    factor = min(1.0, limit / norm) if limit else 1.0
    assert after.keys() == before.keys()
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name] * factor, rtol=1e-4, atol=1e-8)


class Together(tg.Run):
    """A rank of two whose partner has exactly the same gradients."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)

    def sum_shards(self, full: torch.Tensor) -> torch.Tensor:
        return full[: len(full) // 2] * 2


def test_clipping_looks_at_the_sum_over_ranks() -> None:
    """Two ranks whose gradients are each below the limit are clipped when their sum is above it."""
    config = toy_config(GRAD_CLIP_NORM=1)
    model = with_gradients(config)
    # The stand-in's banks are its own half, twice; the rest is everything, doubled.
    banks = sum(2 * (2 * p.grad[: len(p) // 2]).square().sum() for p in model.groups()["matrix"].values())
    rest = sum((2 * p.grad).square().sum() for n, p in model.named_parameters() if n not in tg.BANKS)
    norm = math.sqrt(float(banks + rest))
    for parameter in model.parameters():
        parameter.grad *= 1.25 / norm  # alone 0.62, together 1.25
    scalar = model.blocks[0].q_gain.grad.clone()
    tg.Optimizer(model, config, Together(0, 2)).exchange(tg.layer_plan(config, True), [])
    torch.testing.assert_close(model.blocks[0].q_gain.grad, scalar * 2 / 1.25, rtol=1e-4, atol=0)


def test_extra_numbers_travel_with_the_gradients() -> None:
    """Extra numbers are summed, not clipped, and no part of any gradient; the norm before clipping follows them."""
    config = toy_config(GRAD_CLIP_NORM=1e-3)
    model = with_gradients(config)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    _, numbers = tg.Optimizer(model, config, RUN).exchange(tg.layer_plan(config, True), [torch.tensor(7.5), 2.25])
    assert numbers.tolist() == [7.5, 2.25, pytest.approx(norm, rel=1e-5)]


def test_rank_without_rows_contributes_zero_gradients() -> None:
    """Without any backward pass exchange() gives zeros for used parameters, and still none for unused ones."""
    config = toy_config()
    model, plan = random_model(config), tg.layer_plan(config, False)
    shares, _ = tg.Optimizer(model, config, RUN).exchange(plan, [])
    assert all(not share.any() for share in shares)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in model.unused(plan)), name


def test_unused_skip_parameters_are_left_alone_until_looping() -> None:
    """Connections that only the looped plan has get neither update nor decay nor moments before; afterwards they do."""
    config = toy_config(ADAM_WD=0.5, SCALAR_LR=0.1)
    model = random_model(config)
    optimizer, named = tg.Optimizer(model, config, RUN), dict(model.named_parameters())
    plain, looped = tg.layer_plan(config, False), tg.layer_plan(config, True)
    unused = model.unused(plain)
    assert unused == {"skip_weights.2", "skip_gates.2"} and not model.unused(looped)
    before = {name: p.detach().clone() for name, p in named.items()}
    for plan, same in ((plain, True), (plain, True), (looped, False)):
        tokens = torch.from_numpy(random_tokens(33, 64))[None]
        model(tokens[:, :-1], tokens[:, 1:], plan).mean().backward()
        gradients, _ = optimizer.exchange(plan, [])
        optimizer.step(gradients, 1.0, 0.9)
        for name in named:
            assert torch.equal(named[name], before[name]) == (same and name in unused), name
    state = optimizer.arrays()
    assert state["adamw.step.skip_gates.2"] == 1 and state["adamw.step.skip_gates.0"] == 3


def test_saved_buffers_restore_the_optimizer_completely() -> None:
    """An optimizer loaded from arrays() continues bit for bit like the one that was saved, and covers every buffer."""
    config = toy_config()
    plan = tg.layer_plan(config, True)

    def steps(model: tg.GPT, optimizer: tg.Optimizer, seeds: range) -> None:
        for seed in seeds:
            tokens = torch.from_numpy(random_tokens(33, 64, seed))[None]
            model(tokens[:, :-1], tokens[:, 1:], plan).mean().backward()
            gradients, _ = optimizer.exchange(plan, [])
            optimizer.step(gradients, 0.5, 0.9)

    model = random_model(config)
    optimizer = tg.Optimizer(model, config, RUN)
    steps(model, optimizer, range(3))
    saved = {name: torch.as_tensor(array).clone() for name, array in optimizer.arrays().items()}
    replicated = [name for name, _ in model.named_parameters() if name not in tg.BANKS]
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert saved.keys() == {f"muon.{bank}" for bank in tg.BANKS} | {f"adamw.{k}.{n}" for k in keys for n in replicated}
    buffers = [t for state in optimizer.adamw.state.values() for t in state.values()] + optimizer.muon.momentum
    assert len(buffers) == len(saved) and all(buffer.any() for buffer in buffers)
    twin = random_model(config, seed=9)
    twin.load(model.arrays())
    restored = tg.Optimizer(twin, config, RUN)
    steps(random_model(config, seed=9), restored, range(0))
    restored.load(saved)
    steps(model, optimizer, range(3, 5))
    steps(twin, restored, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    empty = {name: array for name, array in saved.items() if name.startswith("muon.")}
    restored.load({name: torch.zeros_like(array) for name, array in empty.items()})
    assert not restored.adamw.state and not any(kept.any() for kept in restored.muon.momentum)


@pytest.mark.parametrize(
    "progress, wanted",
    [(0, 1), (0.2499, 1), (0.25, 1), (0.625, 0.5), (0.925, 0.1), (0.97, 0.1), (1, 0.1)],
)
def test_learning_rate_multiplier_at_its_knees(progress: float, wanted: float) -> None:
    """1 until the warm-down begins, then linear to zero at 1, never below MIN_LR."""
    assert tg.lr_multiplier(progress, tg.load_config({})[0]) == pytest.approx(wanted, abs=1e-9)


def test_learning_rate_multiplier_without_floor_or_warmdown() -> None:
    """MIN_LR=0 reaches zero at the end; WARMDOWN_FRAC=0 never falls; it never rises again in between."""
    assert tg.lr_multiplier(1.0, toy_config(MIN_LR=0)) == 0
    assert tg.lr_multiplier(1.0, toy_config(WARMDOWN_FRAC=0)) == 1
    assert tg.lr_multiplier(0.0, toy_config(WARMDOWN_FRAC=1)) == 1
    values = [tg.lr_multiplier(p / 1000, toy_config()) for p in range(1001)]
    assert values == sorted(values, reverse=True)


def test_momentum_ramp_at_its_knees() -> None:
    """0.92 at step 0, half-way at half the ramp, 0.97 from its end on; without a ramp always the final value."""
    config = tg.load_config({})[0]
    wanted = {0: 0.92, 750: 0.945, 1500: 0.97, 1501: 0.97, 20_000: 0.97}
    for step, value in wanted.items():
        assert tg.muon_momentum(step, config) == pytest.approx(value, abs=1e-12)
    assert tg.muon_momentum(0, toy_config(MUON_MOMENTUM_WARMUP_STEPS=0)) == 0.97
