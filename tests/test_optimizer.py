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


CLASSIC = ((3.4445, -4.7750, 2.0315),) * 5  # Newton-Schulz of the first Muon, the same in every step


def slow_orthogonal(matrix: np.ndarray, steps: int, polar: bool = True, unit_rows: bool = True) -> np.ndarray:
    """One matrix in float64: unit rows, unit Frobenius norm, then the polynomial on its singular values."""
    x = matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-7) if unit_rows else matrix
    x = x / np.linalg.norm(x)
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    for a, b, c in (tg.POLAR_EXPRESS if polar else CLASSIC)[:steps]:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return (u * sigma) @ vt


def orthogonal(update: torch.Tensor, steps: int, **how: bool) -> torch.Tensor:
    """tg.orthogonalize, whose tall matrices lie on their side."""
    tall = update.size(1) > update.size(2)
    out = tg.orthogonalize(update.mT if tall else update, torch.full((len(update),), tall), steps, **how)
    return out.mT if tall else out


@pytest.mark.parametrize("rows, cols", [(16, 16), (24, 8), (8, 24)])
@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("polar", [True, False], ids=["polar", "classic"])
@pytest.mark.parametrize("unit_rows", [True, False], ids=["unit-rows", "as-they-are"])
def test_orthogonalising_equals_the_polynomial_of_singular_values(
    rows: int, cols: int, steps: int, polar: bool, unit_rows: bool
) -> None:
    """Each matrix of a batch equals the float64 reference through its singular value decomposition."""
    generator = np.random.default_rng(rows + steps)
    update = torch.from_numpy(generator.normal(size=(3, rows, cols)) * generator.uniform(0.1, 9, (3, rows, 1)))
    fast = orthogonal(update.float(), steps, polar=polar, unit_rows=unit_rows)
    for got, matrix in zip(fast, update):
        np.testing.assert_allclose(got.numpy(), slow_orthogonal(matrix.numpy(), steps, polar, unit_rows), atol=5e-5)
    other = orthogonal(update.float(), steps, polar=polar, unit_rows=not unit_rows)
    assert (other - fast).abs().max() > 1e-3  # the rows' lengths do matter here


def test_tall_matrices_share_a_stack_with_wide_ones() -> None:
    """Each matrix of a mixed stack comes out as it does alone: unit rows are those of the upright matrix."""
    wide, tall = torch.randn(2, 6, 10), torch.randn(3, 10, 6) * torch.logspace(-1, 1, 10)[:, None]
    together = tg.orthogonalize(torch.cat([wide, tall.mT]), torch.tensor([False] * 2 + [True] * 3), 5)
    torch.testing.assert_close(together[:2], orthogonal(wide, 5), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[2:].mT, orthogonal(tall, 5), atol=1e-5, rtol=1e-4)


def test_classic_steps_leave_singular_values_in_their_band() -> None:
    """The published polynomial brings everything in [0.01, 1] into [0.68, 1.21], and 1 itself to 0.7, step by step."""
    sigma = torch.logspace(-2, 0, 4000, dtype=torch.float64)
    for a, b, c in tg.CLASSIC:
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    assert 0.67 < sigma.min() < 0.69 and 1.1 < sigma.max() < 1.21 and len(tg.CLASSIC) == 5
    assert sum(tg.CLASSIC[0]) == pytest.approx(0.701) and sigma[-1] == pytest.approx(0.696, abs=1e-3)


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


def test_orthogonalising_zeros_gives_zeros() -> None:
    """Padding matrices and untouched weights stay finite; a batch mate is not affected."""
    update = torch.zeros(2, 8, 4)
    update[1] = torch.randn(8, 4)
    out = orthogonal(update, 5)
    assert not out[0].any()
    torch.testing.assert_close(out[1:], orthogonal(update[1:], 5))


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


@pytest.mark.parametrize("kind", [(True, True), (False, True), (False, False)], ids=["pr1941", "pr1880", "baseline"])
def test_muon_steps_equal_its_equations(kind: tuple[bool, bool]) -> None:
    """Two steps: momentum, Nesterov look-ahead, polar factor, decoupled decay, and sqrt(max(1, rows / cols))."""
    names = ("POLAR_EXPRESS_NS", "MUON_ROW_NORMALIZE")
    config = toy_config(MATRIX_LR=0.05, MUON_WD=0.3, **dict(zip(names, map(int, kind))))
    model = with_gradients(config)
    banks = list(model.groups()["matrix"].values())
    muon, names = tg.Muon(model.groups()["matrix"], config, RUN), list(model.groups()["matrix"])
    slow = [(bank.detach().double().clone(), torch.zeros_like(bank, dtype=torch.float64)) for bank in banks]
    generator = torch.Generator().manual_seed(3)
    assert {max(1.0, bank.size(1) / bank.size(2)) for bank in banks} == {1.0, 2.0}  # both cases occur
    for mu in (0.92, 0.95):
        gradients = [torch.randn(bank.shape, generator=generator) for bank in banks]
        for bank, gradient in zip(banks, gradients):
            bank.grad = gradient.clone()
        muon.step(muon.gradient_shares(), 0.05, mu)
        for i, (bank, gradient) in enumerate(zip(banks, gradients)):
            weight, momentum = slow[i]
            momentum = mu * momentum + gradient.double()
            polar = np.stack([slow_orthogonal(m.numpy(), 5, *kind) for m in gradient.double() + mu * momentum])
            weight = weight * (1 - 0.05 * 0.3) - 0.05 * math.sqrt(
                max(1.0, bank.size(1) / bank.size(2))
            ) * torch.from_numpy(polar)
            slow[i] = (weight, momentum)
            torch.testing.assert_close(bank.detach().double(), weight, atol=2e-5, rtol=0)
            torch.testing.assert_close(muon.arrays()[names[i]].double(), momentum, atol=1e-5, rtol=1e-5)


# MUON_PER_HEAD with a bigram bank, which shares a stack with kv_bank: matrices that lie on their side among the heads.
HEADS = dict(BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=16, MATRIX_LR=1, MUON_WD=0)


def headed(name: str, number: int, layers: int) -> bool:
    """Whether a matrix of a bank is q, k or v: q stands above o, k above v."""
    return name == "kv_bank" or (name == "qo_bank" and number < layers)


def banks_with_gradients(config: tg.Config) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
    """The banks of a model, at zero, and gradients for them whose rows differ in size."""
    banks, generator = random_model(config).groups()["matrix"], torch.Generator().manual_seed(7)
    gradients = {}
    for name, bank in banks.items():
        bank.data.zero_()
        sizes = torch.rand(*bank.shape[:2], 1, generator=generator) * 5 + 0.1
        gradients[name] = torch.randn(bank.shape, generator=generator) * sizes
        bank.grad = gradients[name].clone()
    return banks, gradients


@pytest.mark.parametrize("per_head", [0, 1])
def test_heads_of_q_k_and_v_are_orthogonalised_alone(per_head: int) -> None:
    """With MUON_PER_HEAD a step equals a loop over blocks of head_dim rows, each orthogonalised as a matrix; o, the MLP
    and the bigram bank, and without it all, are whole."""
    config = toy_config(MUON_PER_HEAD=per_head, **HEADS)
    banks, gradients = banks_with_gradients(config)
    muon = tg.Muon(banks, config, RUN)
    muon.step(muon.gradient_shares(), 1.0, 0.9)
    assert config.head_dim == 8 and "bigram_bank" in banks
    for name, bank in banks.items():
        for number, gradient in enumerate(gradients[name]):
            whole = orthogonal(gradient[None], 5)[0]
            blocks = torch.cat([orthogonal(block[None], 5)[0] for block in gradient.split(8)])
            single = per_head and headed(name, number, 4)
            found = -bank.detach()[number] / math.sqrt(max(1, bank.size(1) / bank.size(2)))
            torch.testing.assert_close(found, blocks if single else whole, atol=1e-4, rtol=0)
            assert (blocks - whole).abs().max() > 0.05  # it does matter


@pytest.mark.parametrize("world_size", [2, 3, 5, 8, 16])
def test_shares_of_ranks_join_to_the_same_direction(world_size: int) -> None:
    """However the stacks are dealt out, with shares of heads only, of none and of padding only, every direction is
    as on one rank; padding stays zero."""
    config = toy_config(MUON_PER_HEAD=1, **HEADS)
    banks, gradients = banks_with_gradients(config)
    one, kinds = tg.Muon(banks, config, RUN), set()
    ranks = [tg.Muon(banks, config, tg.Run(rank, world_size)) for rank in range(world_size)]
    for number, stack in enumerate(one.stacks):
        wanted = one.direction(one.join(stack, gradients), stack)
        parts = []
        for rank, muon in enumerate(ranks):
            mine = muon.stacks[number]
            share = muon.join(mine, gradients)[rank * mine.share :][: mine.share]
            parts.append(muon.direction(share, mine))
            kinds.add((len(mine.by_head) > 0, len(mine.whole) > 0))
        together = torch.cat(parts)
        torch.testing.assert_close(together[: len(wanted)], wanted, atol=1e-4, rtol=0)
        assert not together[len(wanted) :].any()
    assert world_size < 8 or {(True, False), (False, True)} <= kinds


def test_heads_leave_the_momentum_alone() -> None:
    """Two steps with the same gradients: other weights, but the very same momentum."""
    states, weights = [], []
    for per_head in (0, 1):
        config = toy_config(MUON_PER_HEAD=per_head, **HEADS)
        banks, gradients = banks_with_gradients(config)
        muon = tg.Muon(banks, config, RUN)
        for mu in (0.9, 0.95):
            muon.step(muon.gradient_shares(), 0.1, mu)
        states.append(muon.arrays())
        weights.append({name: bank.detach().clone() for name, bank in banks.items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(states[1][name], 1.95 * gradient)
        assert torch.equal(weights[0][name], weights[1][name]) == (name not in ("qo_bank", "kv_bank"))


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
    optimizer = tg.Optimizer(model, config, RUN)
    shares, _ = optimizer.exchange(tg.layer_plan(config, True), [])
    after = {n: p.grad for n, p in model.named_parameters() if n not in tg.BANKS}
    for stack, share in zip(optimizer.muon.stacks, shares):
        after |= optimizer.muon.split(stack, share)
    factor = min(1.0, limit / norm) if limit else 1.0
    assert after.keys() == before.keys()
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name] * factor, rtol=1e-4, atol=1e-8)


class Together(tg.Run):
    """A rank of two whose partner has exactly the same gradients."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)

    def sum_shards(self, full: torch.Tensor) -> tuple[torch.Tensor, None]:
        return full[: len(full) // 2] * 2, None


def test_clipping_looks_at_the_sum_over_ranks() -> None:
    """Two ranks whose gradients are each below the limit are clipped when their sum is above it."""
    config = toy_config(GRAD_CLIP_NORM=1)
    model = with_gradients(config)
    # The stand-in's matrices are its own half of each stack, twice; the rest is everything, doubled.
    muon = tg.Muon(model.groups()["matrix"], config, Together(0, 2))
    gradients = {name: bank.grad for name, bank in model.groups()["matrix"].items()}
    stacks = [muon.join(stack, gradients) for stack in muon.stacks]
    banks = sum(2 * (2 * full[: len(full) // 2]).square().sum() for full in stacks)
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
    buffers = [t for state in optimizer.adamw.state.values() for t in state.values()]
    buffers += [stack.momentum for stack in optimizer.muon.stacks]
    assert sum(buffer.numel() for buffer in buffers) == sum(array.numel() for array in saved.values())
    assert all(buffer.any() for buffer in buffers)
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
    assert not restored.adamw.state and not any(stack.momentum.any() for stack in restored.muon.stacks)


@pytest.mark.parametrize(
    "progress, wanted",
    [(0, 1), (0.2499, 1), (0.25, 1), (0.625, 0.5), (0.925, 0.1), (0.97, 0.1), (1, 0.1)],
)
def test_learning_rate_multiplier_at_its_knees(progress: float, wanted: float) -> None:
    """1 until the warm-down begins, then linear to zero at 1, never below MIN_LR; the step does not matter."""
    for step in (0, 7, 20_000):
        assert tg.lr_multiplier(progress, step, tg.load_config({})[0]) == pytest.approx(wanted, abs=1e-9)


def test_learning_rate_multiplier_without_floor_or_warmdown() -> None:
    """MIN_LR=0 reaches zero at the end; WARMDOWN_FRAC=0 never falls; it never rises again in between."""
    assert tg.lr_multiplier(1.0, 9, toy_config(MIN_LR=0)) == 0
    assert tg.lr_multiplier(1.0, 9, toy_config(WARMDOWN_FRAC=0)) == 1
    assert tg.lr_multiplier(0.0, 0, toy_config(WARMDOWN_FRAC=1)) == 1
    values = [tg.lr_multiplier(p / 1000, p, toy_config()) for p in range(1001)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("floor", [0, 0.25])
def test_warmdown_in_steps_by_the_number_of_steps(floor: float) -> None:
    """Without a clock WARMDOWN_ITERS is a number of steps: min(1, steps left / WARMDOWN_ITERS), floored."""
    for total, warmdown in ((20, 8), (20, 20), (7, 1), (6, 60)):
        config = toy_config(ITERATIONS=total, WARMDOWN_FRAC=0, WARMDOWN_ITERS=warmdown, MIN_LR=floor)
        for step in range(total + 1):
            wanted = max(min(1, (total - step) / warmdown), floor)
            assert tg.lr_multiplier(step / total, step, config) == pytest.approx(wanted, abs=1e-9), step


def test_warmdown_in_steps_by_the_clock() -> None:
    """With a clock they last as long as so many steps took so far: min(1, time left / (WARMDOWN_ITERS mean step))."""
    config = toy_config(WARMDOWN_FRAC=0, WARMDOWN_ITERS=1200, MIN_LR=0, MAX_WALLCLOCK_SECONDS=600)
    assert tg.lr_multiplier(0.0, 0, config) == 1  # no step has shown its speed yet
    fallen = 0
    for elapsed in (1.0, 200.0, 545.0, 550.0, 599.0, 600.0):
        for step in (1, 50, 13_780):
            wanted = min(1, (600 - elapsed) / (1200 * elapsed / step))
            assert tg.lr_multiplier(elapsed / 600, step, config) == pytest.approx(wanted, abs=1e-9)
            fallen += 0 < wanted < 1
    assert fallen > 5


def test_momentum_ramp_at_its_knees() -> None:
    """0.92 at step 0, half-way at half the ramp, 0.97 from its end on; without a ramp always the final value."""
    config = tg.load_config({})[0]
    wanted = {0: 0.92, 750: 0.945, 1500: 0.97, 1501: 0.97, 20_000: 0.97}
    for step, value in wanted.items():
        assert tg.muon_momentum(step, config) == pytest.approx(value, abs=1e-12)
    assert tg.muon_momentum(0, toy_config(MUON_MOMENTUM_WARMUP_STEPS=0)) == 0.97
