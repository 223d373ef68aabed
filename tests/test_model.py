"""MODEL: the one forward pass against a slow reference written from the published equations."""

import contextlib
import copy
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import preset_env, random_model, random_tokens, toy_config
from torch import Tensor

import train_gpt as tg

# Five layers, layers 1 and 2 visited three times, lanes in layers 3 and 4: 9 visits and 4 skip connections when
# looped (3 and 4 with one), and XSA on some layers only, so that every mechanism has a case with and without it.
DEEP = dict(NUM_LAYERS=5, NUM_LOOPS=2, LOOP_START=1, LOOP_END=2, PARALLEL_START_LAYER=3, XSA_LAST_N=4, ROPE_BASE=50)


# ---------------------------------------------------------------------------------------------------------------
# The slow reference: one segment, token by token and head by head, in float64.
# ---------------------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def unit_rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 2.0**-23)


class SlowModel:
    """The equations of the network for one sequence; `low_rank` may hold (A, B) per kind of weight and visit."""

    def __init__(
        self, model: tg.GPT, config: tg.Config, looping: bool, low_rank: dict | None = None, scale: float = 0.0
    ):
        self.p = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
        self.c, self.looping, self.low_rank, self.scale = config, looping, low_rank or {}, scale
        self.seen: dict[tuple[str, int], list[np.ndarray]] = {}  # inputs of each weight, for the Hessians

    def block(self, layer: int, name: str) -> np.ndarray:
        return self.p[f"blocks.{layer}.{name}"]

    def damping(self, layer: int) -> float:
        return 1 / math.sqrt(layer + 1) if self.c.ln_scale else 1.0

    def linear(
        self, x: np.ndarray, weight: np.ndarray, kind: str, layer: int, slot: int, low_input: np.ndarray
    ) -> np.ndarray:
        self.seen.setdefault((kind, layer), []).append(x)
        y = x @ weight.T
        if kind in self.low_rank:
            a, b = self.low_rank[kind][slot]
            y = y + self.scale * (b @ (a @ low_input))
        return y

    def turn(self, head: np.ndarray, t: int) -> np.ndarray:
        """Rotary embedding of one head's vector at position t: channel j with channel j + R / 2."""
        R, out, base = self.c.rope_dims, head.copy(), self.c.rope_base
        if self.c.rope_train_seq_len:  # NTK: trained at more than the length that the base is meant for
            base *= (self.c.train_seq_len / self.c.rope_train_seq_len) ** (R / (R - 2))
        for j in range(R // 2):
            angle = t * base ** (-2 * j / R)
            u, v = head[j], head[j + R // 2]
            out[j] = u * math.cos(angle) + v * math.sin(angle)
            out[j + R // 2] = -u * math.sin(angle) + v * math.cos(angle)
        return out

    def gates(self, n: np.ndarray, layer: int) -> np.ndarray:
        """One factor per head from the normed input (d,) of one token."""
        c = self.c
        if c.attn_gate == "none":
            return np.ones(c.num_heads)
        w = self.block(layer, "attn_gate_w")
        return {
            "dense": lambda: sigmoid(w @ n),
            "sparse": lambda: sigmoid(c.sparse_attn_gate_scale * (w @ n[: c.gate_window])),
            "two_sigma": lambda: 2 * sigmoid(w @ n[: c.gate_window]),
        }[c.attn_gate]()

    def attention(self, m: np.ndarray, layer: int, slot: int) -> np.ndarray:
        c, L = self.c, self.c.num_layers
        T, d, group = len(m), c.model_dim // c.num_heads, c.num_heads // c.num_kv_heads
        n = unit_rms(m) * self.damping(layer)
        queries, keys, values = [], [], []
        for t in range(T):
            q = self.linear(n[t], self.p["qo_bank"][layer], "attn.q", layer, slot, n[t]).reshape(-1, d)
            k = self.linear(n[t], self.p["kv_bank"][layer], "attn.k", layer, slot, n[t]).reshape(-1, d)
            v = self.linear(n[t], self.p["kv_bank"][L + layer], "attn.v", layer, slot, n[t]).reshape(-1, d)
            gain = self.block(layer, "q_gain")
            queries.append([self.turn(unit_rms(q[h]), t) * gain[h] for h in range(c.num_heads)])
            keys.append([self.turn(unit_rms(k[g]), t) for g in range(c.num_kv_heads)])
            values.append(v)
        out = np.zeros_like(m)
        for t in range(T):
            y = np.zeros((c.num_heads, d))
            for h in range(c.num_heads):
                g = h // group
                logits = np.array([queries[t][h] @ keys[s][g] for s in range(t + 1)]) / math.sqrt(d)
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                y[h] = sum(weights[s] * values[s][g] for s in range(t + 1))
                if layer >= L - c.xsa_last_n:
                    own = values[t][g] / max(np.linalg.norm(values[t][g]), 1e-12)
                    y[h] -= (y[h] @ own) * own
                y[h] *= self.gates(n[t], layer)[h]
            out[t] = self.linear(y.reshape(-1), self.p["qo_bank"][L + layer], "attn.o", layer, slot, n[t])
        return self.block(layer, "attn_scale") * out

    def mlp(self, r: np.ndarray, layer: int, slot: int) -> np.ndarray:
        u = unit_rms(r) * self.damping(layer)
        out = np.zeros_like(r)
        for t in range(len(r)):
            pre = self.linear(u[t], self.p["mlp_up_bank"][layer], "mlp.up", layer, slot, u[t])
            hidden = np.where(pre > 0, pre, self.c.leaky_relu_sq_slope * pre) ** 2
            f = self.linear(hidden, self.p["mlp_down_bank"][layer], "mlp.down", layer, slot, u[t])
            gate = 1.0
            if self.c.mlp_gate_out:
                window = r[t, : self.c.gate_window]
                gate = sigmoid(self.block(layer, "mlp_gate_w")[0] @ window + self.block(layer, "mlp_gate_b")[0])
            out[t] = self.block(layer, "mlp_scale") * gate * f
        return out

    def orders(self) -> tuple[list[int], list[int], int]:
        """(encoder layers, decoder layers, number of skip slots) as the specification builds them."""
        c = self.c
        before, after = list(range(c.loop_start)), list(range(c.loop_end + 1, c.num_layers))
        looped = before + list(range(c.loop_start, c.loop_end + 1)) * (c.num_loops + 1) + after
        order = looped if self.looping else list(range(c.num_layers))
        return order[: len(order) // 2], order[len(order) // 2 :], min(len(looped) // 2, len(looped) - len(looped) // 2)

    def smear(self, raw: np.ndarray, ids: np.ndarray) -> np.ndarray:
        e = raw.copy()
        for t in range(1, len(ids)):
            if ids[t] != 1:
                gate = sigmoid(self.p["smear_gate_w"][0] @ raw[t, : self.c.gate_window])
                e[t] = raw[t] + self.p["smear_lambda"][0] * gate * raw[t - 1]
        return e

    def embed(self, ids: np.ndarray) -> np.ndarray:
        c, p, e = self.c, self.p, self.p["tok_emb.weight"][ids]
        if c.bigram_vocab_size:
            for t in range(len(ids)):
                row = c.bigram_vocab_size - 1
                if t:
                    row = ((36313 * int(ids[t])) ^ (27191 * int(ids[t - 1]))) % (c.bigram_vocab_size - 1)
                e[t] += p["bigram_scale"][0] * (p["bigram_bank"][0] @ p["bigram_emb.weight"][row])
        if c.smear_gate_enabled and c.smear_gate_pos == "pre_norm":
            e = self.smear(e, ids)
        e = unit_rms(e)
        if c.smear_gate_enabled and c.smear_gate_pos == "post_norm":
            e = self.smear(e, ids)
        if c.smear_perdim_enabled:
            g = sigmoid(p["smear_perdim"])
            e = (1 - g) * e + g * np.concatenate([np.zeros_like(e[:1]), e[:-1]])
        return e

    def nll(self, ids: np.ndarray, targets: np.ndarray) -> np.ndarray:
        c, p = self.c, self.p
        x = x0 = self.embed(ids)
        encoder, decoder, slots = self.orders()
        stack, lanes, slot = [], None, 0
        mixed = lambda i, x: self.block(i, "resid_mix")[0] * x + self.block(i, "resid_mix")[1] * x0

        def serial(i: int, x: np.ndarray) -> np.ndarray:
            m = mixed(i, x)
            if 0 <= c.parallel_residual_start <= i:
                return m + self.attention(m, i, slot) + self.mlp(m, i, slot)
            r = m + self.attention(m, i, slot)
            return r + self.mlp(r, i, slot)

        for i in encoder:
            x = serial(i, x)
            stack.append(x)
            slot += 1
        for s, i in enumerate(decoder):
            has_lanes = 0 < c.parallel_start_layer <= i
            if has_lanes and lanes is None:
                lanes = [x, x]
            if s < slots and stack:
                w = p[f"skip_weights.{s}"]
                if c.skip_gates_enabled:
                    g = sigmoid(p[f"skip_gates.{s}"])
                    blend = lambda stream: (1 - g) * (w * skip) + g * stream
                else:
                    blend = lambda stream: stream + w * skip
                skip = stack.pop()
                if has_lanes:
                    lanes[0] = blend(lanes[0])
                else:
                    x = blend(x)
            if has_lanes:
                post, keep = self.block(i, "post_lambdas"), self.block(i, "resid_lambdas")
                a, m = self.attention(mixed(i, lanes[0]), i, slot), self.mlp(lanes[1], i, slot)
                lanes = [keep[lane] * lanes[lane] + post[0, lane] * a + post[1, lane] * m for lane in (0, 1)]
            else:
                x = serial(i, x)
            slot += 1
        h = unit_rms(x if lanes is None else 0.5 * (lanes[0] + lanes[1]))
        out = np.zeros(np.shape(targets))
        for t in range(len(ids)):
            z = self.linear(h[t], p["tok_emb.weight"], "head", 0, 0, h[t])
            z = c.logit_softcap * np.tanh(z / c.logit_softcap)
            out[t] = z.max() + math.log(np.exp(z - z.max()).sum()) - z[targets[t]]
        return out


def packed(lengths: list[int], limit: int) -> tg.Segments:
    return tg.pack_segments(np.array(lengths), limit, tg.Run())


def pair(config: tg.Config, T: int, seed: int = 1, bos_every: int = 9) -> tuple[Tensor, Tensor]:
    """Random inputs and targets (1, T) of one stream with BOS inside."""
    tokens = torch.from_numpy(random_tokens(T + 1, config.vocab_size, seed, bos_every))
    return tokens[None, :-1], tokens[None, 1:]


def random_ids(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.from_numpy(random_tokens(math.prod(shape), 64, seed)).view(*shape)


def random_lora(config: tg.Config, B: int, seed: int = 5, zero_b: bool = False) -> tg.Lora:
    """Adapters of every kind of weight that has one, at every visit, for B rows."""
    generator = torch.Generator().manual_seed(seed)
    d, kv, slots, rank = config.model_dim, config.num_kv_heads * config.head_dim, len(tg.layer_plan(config, True)), 3
    outs = {"attn.q": d, "attn.k": kv, "attn.v": kv, "attn.o": d, "mlp.down": d, "head": config.vocab_size}
    factors = {}
    for kind, out in outs.items():
        count = 1 if kind == "head" else slots
        a, b = (torch.randn(B, count, *shape, generator=generator) * 0.3 for shape in ((rank, d), (out, rank)))
        factors[kind] = (a, b * 0 if zero_b else b)
    return tg.Lora(1.5, factors)


def open_model(config: tg.Config) -> tg.GPT:
    """A random model whose skips let more of the stream through, so that early layers matter behind many skips."""
    model = random_model(config, seed=3)
    with torch.no_grad():
        for gate in getattr(model, "skip_gates", ()):
            gate += 2
    return model


# ---------------------------------------------------------------------------------------------------------------
# The whole forward pass
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(PARALLEL_START_LAYER=0, ROPE_DIMS=0),
    ],
    ids=["all", "no-lanes-no-rope"],
)
def test_whole_forward_equals_a_slow_float64_reference(looping: bool, changes: dict) -> None:
    """Every nll of a random model equals the published equations, looped and unlooped."""
    config = toy_config(**DEEP | changes)
    model = random_model(config, seed=3)
    inputs, targets = pair(config, 21)
    assert (inputs == tg.BOS_ID).any()
    with torch.no_grad():
        fast = model(inputs, targets, tg.layer_plan(config, looping))[0].numpy()
    slow = SlowModel(model, config, looping).nll(inputs[0].numpy(), targets[0].numpy())
    assert slow.std() > 0.3  # the random model is far from uniform, so agreement means something
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def slope_of_the_reference(
    slow: SlowModel, model: tg.GPT, shares: dict[str, float], inputs: Tensor, targets: Tensor, weights: np.ndarray
) -> float:
    """How fast the weighted losses of the reference rise in the direction in which each parameter, by its gradient in
    `model`, adds its share."""
    start, found, step = slow.p, [], 1e-6
    for sign in (1, -1):
        slow.p = dict(start)
        for name, share in shares.items():
            gradient = model.get_parameter(name).grad.double().numpy()
            slow.p[name] = start[name] + sign * step * share * np.sign(gradient) / np.abs(gradient).sum()
        found.append(float(weights @ slow.nll(inputs[0].numpy(), targets[0].numpy())))
    slow.p = start
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("preset", sorted(tg.PRESETS))
def test_losses_and_gradients_of_every_preset_equal_the_reference(preset: str) -> None:
    """The published systems' own embeddings, gates, skips, wirings, activations and rotary bases. Each parameter has a
    share of at least 1 in the slope, so one that is left out, by the model or by the reference, or whose gradient is
    wrong, is noticed."""
    config = tg.load_config(preset_env(preset))[0]
    model, weights = open_model(config), np.random.default_rng(0).normal(size=11)
    inputs, targets = pair(config, 11, bos_every=6)
    assert (inputs[0, 1:] == tg.BOS_ID).any()
    fast, slow = model(inputs, targets, tg.layer_plan(config, True))[0], SlowModel(model, config, True)
    expected = slow.nll(inputs[0].numpy(), targets[0].numpy())
    assert expected.std() > 0.3
    np.testing.assert_allclose(fast.detach().numpy(), expected, atol=3e-5)
    (fast * torch.from_numpy(weights)).sum().backward()
    network = [name for name, _ in model.named_parameters() if name not in model.groups()["fitted"]]  # the tilt's
    shares = {name: (-1) ** n * (1 + n / 100) for n, name in enumerate(network)}
    slope = slope_of_the_reference(slow, model, shares, inputs, targets, weights)
    assert slope == pytest.approx(sum(shares.values()), abs=1e-3)


@pytest.mark.parametrize("preset, looping", [(None, False), (None, True), ("pr489", True), ("pr1880", True)])
def test_packed_row_equals_each_segment_alone(preset: str | None, looping: bool) -> None:
    """A packed row gives each segment, also one of a single token, the slow reference's nll of that segment alone; the
    presets are those that look at the token before in other ways."""
    config = tg.load_config(preset_env(preset))[0] if preset else toy_config(**DEEP)
    model = random_model(config, seed=4)
    lengths = [5, 1, 16, 1, 9]
    inputs, targets = pair(config, sum(lengths), bos_every=7)
    with torch.no_grad():
        fast = model(inputs, targets, tg.layer_plan(config, looping), packed(lengths, 16))[0].numpy()
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        slow = SlowModel(model, config, looping).nll(inputs[0, part].numpy(), targets[0, part].numpy())
        np.testing.assert_allclose(fast[part], slow, atol=1e-4)
        begin += length


def test_lora_equals_a_slow_computation_per_row_and_visit() -> None:
    """Low-rank deltas enter where the specification says, per row of the batch and per visit of a layer."""
    config = toy_config(**DEEP)
    model, B, T = random_model(config, seed=6), 2, 9
    lora = random_lora(config, B)
    tokens = torch.from_numpy(random_tokens(B * (T + 1), config.vocab_size, 8)).view(B, T + 1)
    with torch.no_grad():
        fast = model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True), lora=lora).numpy()
        bare = model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True)).numpy()
    assert np.abs(fast - bare).mean() > 0.1
    for row in range(B):
        low_rank = {
            kind: [(a.double().numpy(), b.double().numpy()) for a, b in zip(A[row], B[row])]
            for kind, (A, B) in lora.factors.items()
        }
        slow = SlowModel(model, config, True, low_rank, lora.scale).nll(
            tokens[row, :-1].numpy(), tokens[row, 1:].numpy()
        )
        np.testing.assert_allclose(fast[row], slow, atol=1e-4)


def test_lora_with_zero_b_changes_nothing() -> None:
    """Adapters whose B is zero leave every nll exactly as it was."""
    config = toy_config(**DEEP)
    model, B = random_model(config), 2
    tokens = torch.from_numpy(random_tokens(B * 13, config.vocab_size)).view(B, 13)
    with torch.no_grad():
        bare = model(tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True))
        with_lora = model(
            tokens[:, :-1], tokens[:, 1:], tg.layer_plan(config, True), lora=random_lora(config, B, zero_b=True)
        )
    assert torch.equal(bare, with_lora)


def test_taps_sum_the_inputs_of_every_weight_over_all_visits() -> None:
    """The recorded Hessians equal X^T X of the slow reference's inputs, and recording changes no nll."""
    config = toy_config(**DEEP)
    model = random_model(config, seed=2)
    inputs, targets = pair(config, 11)
    taps = tg.Taps()
    with torch.no_grad():
        tapped = model(inputs, targets, tg.layer_plan(config, True), taps=taps)
        assert torch.equal(tapped, model(inputs, targets, tg.layer_plan(config, True)))
    slow = SlowModel(model, config, True)
    slow.nll(inputs[0].numpy(), targets[0].numpy())
    own = {name for name, matrix in tg.MATRICES.items() if matrix.hessian == name}
    assert taps.hessians.keys() == {(name, layer) for name in own for layer in range(5)} | {("head", 0)}
    for key, hessian in taps.hessians.items():
        x = np.stack(slow.seen[key])
        assert len(x) == 11 * (3 if key[1] in (1, 2) and key[0] != "head" else 1)
        np.testing.assert_allclose(hessian.numpy(), x.T @ x, rtol=1e-4, atol=1e-4)
    for name, matrix in tg.MATRICES.items():  # kinds that share a Hessian really have the same inputs
        for layer in range(5):
            np.testing.assert_array_equal(np.stack(slow.seen[name, layer]), np.stack(slow.seen[matrix.hessian, layer]))


def test_no_token_influences_an_earlier_loss() -> None:
    """Changing input t leaves the nll of all positions before t as it was, and changes the one at t."""
    config = toy_config(**DEEP)
    model = random_model(config)
    inputs, targets = pair(config, 24, bos_every=0)
    plan = tg.layer_plan(config, True)
    for segments in (None, packed([24], 24)):
        with torch.no_grad():
            before = model(inputs, targets, plan, segments)[0]
            for t in range(24):
                changed = inputs.clone()
                changed[0, t] = 4 + (changed[0, t] - 3) % 60
                after = model(changed, targets, plan, segments)[0]
                torch.testing.assert_close(after[:t], before[:t], rtol=0, atol=1e-6)
                assert (after[t] - before[t]).abs() > 1e-4


def test_nothing_flows_between_the_segments_of_a_row() -> None:
    """Changing all tokens of one segment leaves the losses of every other segment as they were."""
    config = toy_config(**DEEP)
    model = random_model(config)
    lengths = [7, 1, 12, 4]
    inputs, targets = pair(config, sum(lengths))
    inputs = inputs.clamp(min=4)  # no BOS: the segment table alone must separate them
    segments, plan = packed(lengths, 12), tg.layer_plan(config, True)
    with torch.no_grad():
        before = model(inputs, targets, plan, segments)[0]
        for segment, length in enumerate(lengths):
            begin = sum(lengths[:segment])
            changed = inputs.clone()
            changed[0, begin : begin + length] = 4 + (changed[0, begin : begin + length] - 3) % 60
            same = torch.ones(sum(lengths), dtype=torch.bool)
            same[begin : begin + length] = False
            after = model(changed, targets, plan, segments)[0]
            torch.testing.assert_close(after[same], before[same], rtol=0, atol=1e-6)
            assert (after - before)[~same].abs().min() > 1e-4


def test_targets_may_cover_the_last_positions_only() -> None:
    """Losses asked for the last C positions equal the last C of all losses."""
    config = toy_config()
    model = random_model(config)
    inputs, targets = pair(config, 16)
    with torch.no_grad():
        full = model(inputs, targets, tg.layer_plan(config, True))
        part = model(inputs, targets[:, -5:], tg.layer_plan(config, True))
    torch.testing.assert_close(part, full[:, -5:])


def test_forward_prices_every_id_and_the_probabilities_sum_to_one() -> None:
    """Targets (B, T, V) of all ids give a normalised distribution that contains the plain losses."""
    config = toy_config()
    model, T = random_model(config), 6
    inputs, targets = pair(config, T)
    everything = torch.arange(config.vocab_size).expand(1, T, -1)
    with torch.no_grad():
        nll = model(inputs, everything, tg.layer_plan(config, True))
        plain = model(inputs, targets, tg.layer_plan(config, True))
    assert nll.shape == (1, T, config.vocab_size)
    torch.testing.assert_close(
        torch.exp(-nll.double()).sum(-1), torch.ones(1, T, dtype=torch.float64), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(nll.gather(-1, targets[..., None])[..., 0], plain)


# ---------------------------------------------------------------------------------------------------------------
# Plan, counts, initialisation
# ---------------------------------------------------------------------------------------------------------------


def test_default_visit_orders_and_skip_pairs_are_the_published_ones() -> None:
    """With the defaults the looped plan has 17 visits and 8 connections, the unlooped one 11 and 5."""
    config = tg.load_config({})[0]
    plain, looped = tg.layer_plan(config, False), tg.layer_plan(config, True)
    assert [v.layer for v in plain] == list(range(11))
    assert [v.layer for v in looped] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.push for v in plain] == [True] * 5 + [False] * 6
    assert [v.push for v in looped] == [True] * 8 + [False] * 9
    assert tg.skip_pairs(plain) == [[0, 5, 4], [1, 6, 3], [2, 7, 2], [3, 8, 1], [4, 9, 0]]
    assert tg.skip_pairs(looped) == [
        [0, 5, 4], [1, 3, 3], [2, 4, 5], [3, 5, 4], [4, 6, 3], [5, 7, 2], [6, 8, 1], [7, 9, 0]
    ]  # fmt: skip
    for plan in (plain, looped):
        assert [v.slot for v in plan] == list(range(len(plan)))
        assert all((v.wiring == "two_lane") == (v.layer >= 8) for v in plan)
        assert plan[-1].skip is None


PUBLISHED_PARAMETERS = {
    "baseline": 17_059_912,
    "pr489": 17_383_481,
    "fork5": 26_829_913,
    "fork5_twin": 26_829_913,
    "fork5_10l": 25_517_137,
    "pr1880": 35_945_605,
    "pr1941": 35_989_801,
    "pr1855": 35_945_671,
    "pr2135": 35_945_671,
    "pr2158": 35_945_671,
}


@pytest.mark.parametrize("preset", PUBLISHED_PARAMETERS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    """At full size, in the convention of the published counts, which hold lane factors of all layers."""
    described = tg.describe(tg.load_config({"PRESET": preset})[0])
    assert described["parameters_published_convention"] == PUBLISHED_PARAMETERS[preset]
    with_lanes = preset in ("pr1941", "pr1855", "pr2135", "pr2158")  # two lanes from layer 8 of 11 on
    unused_lanes = 8 * (4 + 2) if with_lanes else 0
    assert described["parameters"] == PUBLISHED_PARAMETERS[preset] - unused_lanes


def test_bigram_table_and_projection_are_in_different_groups() -> None:
    """The table is an embedding, the projection a matrix, their factor a scalar: 2048 x 128, 512 x 128 and 1."""
    sizes = tg.describe(tg.load_config({"PRESET": "fork5"})[0])["parameters_per_tensor"]
    assert sizes["embed"] == {"tok_emb.weight": 1024 * 512, "bigram_emb.weight": 2048 * 128}
    assert sizes["matrix"]["bigram_bank"] == 512 * 128 and sizes["scalar"]["bigram_scale"] == 1
    smaller = tg.describe(tg.load_config({"PRESET": "fork5", "BIGRAM_DIM": "64"})[0])
    assert smaller["parameters"] == 26_666_073


def test_parameter_counts_of_the_published_system() -> None:
    """PR #1941's groups and operations; the SmearGate adds 13 parameters."""
    described = tg.describe(tg.load_config({"PRESET": "pr1941"})[0])
    assert described["parameters_per_group"]["matrix"] == 31_719_424
    assert described["parameters_per_group"]["embed"] == 4_194_304
    unused_lanes = 8 * (4 + 2)  # the published code stores lane factors of all 11 layers, and uses three
    assert described["parameters_per_group"]["scalar"] == 76_073 - unused_lanes
    assert described["matrix_flops_per_token"] == {
        "unlooped": 6 * (31_719_424 + 4_194_304),
        "looped": 6 * (31_719_424 * 17 // 11 + 4_194_304),
    }
    smeared = tg.describe(tg.load_config({})[0])
    assert smeared["parameters"] == described["parameters"] + 13


def test_every_parameter_is_in_exactly_one_group() -> None:
    """The optimizer groups partition the parameters, in every preset, and the table lists just these, in their order."""
    for preset in tg.PRESETS:
        model = tg.GPT(tg.load_config({"PRESET": preset})[0], tg.Run(), "meta")
        made = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
        assert made == list(tg.parameter_shapes(model.config).items())
        members = [name for group in model.groups().values() for name in group]
        assert sorted(members) == sorted(name for name, _ in model.named_parameters())
        owners = [id(p) for group in model.groups().values() for p in group.values()]
        assert len(set(owners)) == len(owners) == len(list(model.parameters()))


@pytest.mark.parametrize("preset, looping", [(None, False), *((preset, True) for preset in (None, *tg.PRESETS))])
def test_every_used_parameter_moves_in_the_first_steps(preset: str | None, looping: bool) -> None:
    """From the true initialisation every parameter gets a gradient within three steps, except those a plan names."""
    config = tg.load_config(preset_env(preset))[0] if preset else toy_config(**DEEP)
    run, model = tg.Run(), tg.GPT(config, tg.Run())
    optimizer, plan = tg.Optimizer(model, config, run), tg.layer_plan(config, looping)
    unused = model.unused(plan)
    slots = () if looping else (2, 3)
    fitted = {"hint_prior"} & dict(model.named_parameters()).keys()  # no loss knows it
    assert unused == {f"{kind}.{slot}" for kind in ("skip_weights", "skip_gates") for slot in slots} | fitted
    moved = set()
    for step in range(3):
        inputs, targets = pair(config, 32, seed=step)
        model(inputs, targets, plan).mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name in unused), name
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                moved.add(name)
        gradients, _ = optimizer.exchange(plan, [])
        optimizer.step(gradients, 1.0, 0.9)
    assert moved == {name for name, _ in model.named_parameters()} - unused


@pytest.mark.parametrize("preset", [None, "tiny"])
def test_first_loss_is_that_of_a_uniform_guess(preset: str | None) -> None:
    """At initialisation the loss is ln(vocab) within 0.02, with and without loops."""
    config = tg.load_config({"PRESET": preset})[0] if preset else toy_config(**DEEP)
    model = tg.GPT(config, tg.Run())
    inputs, targets = pair(config, 128)
    for looping in (False, True):
        with torch.no_grad():
            loss = model(inputs, targets, tg.layer_plan(config, looping)).mean().item()
        assert abs(loss - math.log(config.vocab_size)) < 0.02


def test_initial_values_follow_the_published_table() -> None:
    """Constants, orthogonality and spreads at initialisation, parameter by parameter."""
    config = toy_config(**DEEP | dict(TIED_EMBED_INIT_STD=0.02, GATED_ATTN_INIT_STD=0.03))
    L, p = 5, {name: tensor.detach() for name, tensor in tg.GPT(config, tg.Run()).named_parameters()}
    for i in range(L):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in p.items() if name.startswith(f"blocks.{i}.")}
        assert (block["q_gain"] == 5).all() and (block["mlp_gate_b"] == 5).all() and (block["mlp_gate_w"] == 0).all()
        assert (block["attn_scale"] == 1).all() and (block["mlp_scale"] == 1).all()
        assert (block["resid_mix"][0] == 1).all() and (block["resid_mix"][1] == 0).all()
        assert 0.02 < block["attn_gate_w"].std() < 0.04
        assert ("post_lambdas" in block) == (i >= 3)
        if i >= 3:
            assert (block["post_lambdas"] == 1).all() and torch.allclose(block["resid_lambdas"], torch.tensor(1.1))
        for w in (p["qo_bank"][i], p["kv_bank"][i], p["kv_bank"][L + i], p["mlp_up_bank"][i]):
            small = w @ w.T if w.size(0) <= w.size(1) else w.T @ w
            torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-5, rtol=0)
        assert (p["qo_bank"][L + i] == 0).all() and (p["mlp_down_bank"][i] == 0).all()
    assert 0.018 < p["tok_emb.weight"].std() < 0.022
    for s in range(4):
        assert (p[f"skip_weights.{s}"] == 1).all() and (p[f"skip_gates.{s}"] == 0).all()
    assert (p["smear_gate_w"] == 0).all() and (p["smear_lambda"] == 0).all()


def test_default_initialisation_is_uniform_within_its_bound() -> None:
    """INIT_SCHEME=default: every number of q, k, v and MLP up in +-1 / sqrt(fan_in), filling it; outputs are zero."""
    config = toy_config(**DEEP | dict(INIT_SCHEME="default", MODEL_DIM=64, MLP_MULT=3))
    model, L = tg.GPT(config, tg.Run()), 5
    matrices = [model.qo_bank[:L], model.kv_bank, model.mlp_up_bank]
    for bank in matrices:
        x = bank.detach().double() * 8  # fan_in is 64
        assert 0.999 < x.abs().max() <= 1 and x.mean().abs() < 0.02
        assert x.square().mean() == pytest.approx(1 / 3, rel=0.03)
        assert x.unique().numel() > 0.99 * x.numel()  # no layer repeats another
    assert not model.qo_bank[L:].any() and not model.mlp_down_bank.any()


@pytest.mark.parametrize("preset", ["baseline", "pr489", "fork5", "pr1941"])
def test_residual_scales_start_at_one_or_at_their_depth(preset: str) -> None:
    """PR #489 starts attn_scale and mlp_scale of layer l at 1 / sqrt(l + 1); all others at 1."""
    model = tg.GPT(tg.load_config(preset_env(preset))[0], tg.Run())
    for layer, block in enumerate(model.blocks):
        wanted = 1 / math.sqrt(layer + 1) if preset == "pr489" else 1.0
        for scale in (block.attn_scale, block.mlp_scale):
            torch.testing.assert_close(scale.detach(), torch.full((32,), wanted))


def test_fused_markers_start_between_the_space_and_their_marker(marker_pairs: int) -> None:
    """MARKER_PAIR_MODE: rows 8, 9, 10 point along 0.4 E[space] + 0.6 E[marker], as long as the marker's row (#2109);
    all else is as without the mode, the random numbers of later tensors included."""
    plain = tg.GPT(toy_config(SEED=5), tg.Run()).arrays()
    mode = tg.GPT(toy_config(SEED=5, MARKER_PAIR_MODE=1), tg.Run()).arrays()
    table = plain["tok_emb.weight"].astype(np.float64)
    wanted = table.copy()
    for fused, marker in ((8, 4), (9, 5), (10, 6)):
        both = 0.4 * table[marker_pairs] + 0.6 * table[marker]
        wanted[fused] = both / np.linalg.norm(both) * np.linalg.norm(table[marker])
    np.testing.assert_allclose(mode["tok_emb.weight"], wanted, rtol=1e-5, atol=1e-9)
    others = [row for row in range(64) if row not in (8, 9, 10)]
    assert np.array_equal(mode["tok_emb.weight"][others], plain["tok_emb.weight"][others])
    assert all(np.array_equal(mode[name], plain[name]) for name in plain if name != "tok_emb.weight")


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """The same SEED draws the same weights whatever torch's global generator did; another SEED other ones."""
    torch.manual_seed(1)
    first = tg.GPT(toy_config(), tg.Run()).arrays()
    torch.manual_seed(2)
    second = tg.GPT(toy_config(), tg.Run()).arrays()
    other = tg.GPT(toy_config(SEED=7), tg.Run()).arrays()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["qo_bank"], other["qo_bank"])


def test_loops_add_no_weights_but_skips() -> None:
    """Repeating layers adds parameters for its skip connections and nothing else."""
    names = lambda config: {name for name, _ in tg.GPT(config, tg.Run(), "meta").named_parameters()}
    extra = names(toy_config(**DEEP)) - names(toy_config(**DEEP | dict(NUM_LOOPS=0)))
    assert extra == {f"{kind}.{slot}" for kind in ("skip_weights", "skip_gates") for slot in (2, 3)}


def test_loading_weights_of_another_shape_is_refused() -> None:
    """GPT.load names what differs instead of loading a part."""
    model = tg.GPT(toy_config(), tg.Run())
    arrays = model.arrays()
    with pytest.raises(tg.UserError, match="smear_lambda"):
        model.load({name: array for name, array in arrays.items() if name != "smear_lambda"})
    with pytest.raises(tg.UserError, match="shapes"):
        model.load(arrays | {"qo_bank": arrays["qo_bank"][:, :-1]})


# ---------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[24], [1, 1, 22], [5, 1, 17, 1], [16, 8], [1] * 24])
def test_packed_attention_equals_a_naive_softmax(lengths: list[int]) -> None:
    """attend inside segments equals explicit loops over queries, heads and keys, forward and backward."""
    torch.manual_seed(0)
    T, H, K, d = 24, 4, 2, 8
    q, k, v = (torch.randn(1, T, heads, d, requires_grad=True) for heads in (H, K, K))
    fast = tg.attend_sdpa(q, k, v, packed(lengths, 24))
    begins = np.cumsum([0, *lengths[:-1]]).repeat(lengths)
    rows = []
    for t in range(T):
        for h in range(H):
            keys, values = k[0, begins[t] : t + 1, h // 2].double(), v[0, begins[t] : t + 1, h // 2].double()
            weights = torch.softmax(keys @ q[0, t, h].double() / math.sqrt(d), 0)
            rows.append(weights @ values)
    slow = torch.stack(rows).view(1, T, H, d)
    torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-5)
    direction = torch.randn(1, T, H, d)
    for got, want in zip(
        torch.autograd.grad((fast * direction).sum(), (q, k, v)),
        torch.autograd.grad((slow * direction).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    if len(lengths) == 1:
        torch.testing.assert_close(tg.attend_sdpa(q, k, v, None), fast, atol=1e-6, rtol=1e-5)


def test_plain_nll_equals_float64_cross_entropy() -> None:
    """Losses and gradients equal cross-entropy of c tanh(z / c) in float64, also for saturated logits."""
    torch.manual_seed(1)
    logits = (torch.randn(2, 7, 50) * 20).requires_grad_()
    targets = torch.randint(0, 50, (2, 7))
    targets[0, 0], targets[0, 1] = 0, 49
    fast = tg.plain_nll(logits, targets, 30.0)
    exact = logits.detach().double().requires_grad_()
    slow = F.cross_entropy(30 * torch.tanh(exact / 30).flatten(0, 1), targets.flatten(), reduction="none").view(2, 7)
    torch.testing.assert_close(fast.double(), slow, atol=1e-5, rtol=1e-5)
    fast.sum().backward()
    slow.sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)
    saturated = tg.plain_nll(torch.tensor([[[1000.0, -1000.0, 0.0]]]), torch.tensor([[1]]), 30.0)
    assert abs(saturated.item() - 60.0) < 1e-3
    assert fast.dtype == torch.float32 and tg.plain_nll(logits.bfloat16(), targets, 30.0).dtype == torch.float32


def test_bigram_rows_by_hand() -> None:
    """((36313 id) xor (27191 previous id)) mod (rows - 1); the last row is for tokens without one before."""
    ids = torch.tensor([[3, 5, 1023, 0, 7, 5]])
    positions = torch.tensor([0, 1, 2, 3, 0, 1])  # a segment begins at index 4
    rows = tg.bigram_hash(ids, positions, 2048)[0].tolist()
    assert rows == [2047, 1047, 981, 1757, 2047, 704]  # for example 181565 xor 81573 = 261016 = 127 * 2047 + 1047
    many = torch.randint(0, 1024, (4, 500))
    inner = tg.bigram_hash(many, torch.arange(500), 48)[:, 1:]
    assert inner.min() == 0 and inner.max() == 46 and (tg.bigram_hash(many, torch.arange(500), 48)[:, 0] == 47).all()
    assert (tg.bigram_hash(many.flip(1), torch.arange(500), 48)[:, 1:] != inner).any()  # the order of a pair matters


def test_own_value_is_removed_and_nothing_else() -> None:
    """The result is orthogonal to the token's own value; a second time, or for a zero value, nothing changes."""
    y, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8)
    v[0, 0] = 0
    out = tg.remove_own_value(y, v)
    own = v.repeat_interleave(2, dim=2)
    torch.testing.assert_close((out * own).sum(-1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[0, 0], y[0, 0])
    slow = y - (y * own).sum(-1, keepdim=True) / (own * own).sum(-1, keepdim=True).clamp_min(1e-20) * own
    torch.testing.assert_close(out, slow)
    torch.testing.assert_close(tg.remove_own_value(out, v), out, atol=1e-6, rtol=1e-4)


def bigram_model() -> tuple[tg.GPT, tg.Config]:
    config = tg.load_config(preset_env("fork5"))[0]
    return tg.GPT(config, tg.Run()), config


def test_bigram_branch_starts_silent_and_trains() -> None:
    """One factor starts at zero and the other one does not, so that both move within two steps; so does the scale."""
    model, config = bigram_model()
    P, L = model.bigram_bank.detach()[0], config.num_layers
    torch.testing.assert_close(P.T @ P, torch.eye(16) / (2 * L), atol=1e-6, rtol=0)
    assert not model.bigram_emb.weight.any() and model.bigram_scale.item() == pytest.approx(0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith("bigram")}
    optimizer, plan = tg.Optimizer(model, config, tg.Run()), tg.layer_plan(config, True)
    for step in range(3):
        inputs, targets = pair(config, 32, seed=step)
        model(inputs, targets, plan).mean().backward()
        optimizer.step(optimizer.exchange(plan, [])[0], 1.0, 0.9)
    for name, start in before.items():
        assert (dict(model.named_parameters())[name] - start).abs().max() > 1e-4, name
    rows = tg.bigram_hash(inputs, torch.arange(32), config.bigram_vocab_size).flatten()
    assert model.bigram_emb.weight[rows].abs().amax(-1).min() > 0  # every row that was looked up


def test_planted_bigram_branch_of_two_zeros_never_trains() -> None:
    """The published defect: with both factors at zero no gradient reaches either of them, nor the scale."""
    model, config = bigram_model()
    with torch.no_grad():
        model.bigram_bank.zero_()
    inputs, targets = pair(config, 32)
    model(inputs, targets, tg.layer_plan(config, True)).mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("bigram"):
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("gate, start", [("two_sigma", 1.0), ("sparse", 0.5), ("dense", 0.5), ("none", 1.0)])
def test_attention_gates_start_where_they_are_said_to(gate: str, start: float) -> None:
    """Before training 2 sigmoid is exactly 1, the sparse gate exactly 1/2, the dense one about that, for every head."""
    config, plain = toy_config(ATTN_GATE=gate), toy_config(ATTN_GATE="none")
    gated, bare = tg.GPT(config, tg.Run()), random_model(plain)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if name in dict(bare.named_parameters()):
                parameter.copy_(dict(bare.named_parameters())[name])
        for block in bare.blocks:
            block.attn_scale *= start
    inputs, targets = pair(config, 20)
    with torch.no_grad():
        ours, wanted = (m(inputs, targets, tg.layer_plan(config, True)) for m in (gated, bare))
    torch.testing.assert_close(ours, wanted, atol=0.1 if gate == "dense" else 1e-5, rtol=0)
    assert torch.equal(ours, wanted) == (gate != "dense")
    shapes = {"dense": (4, 32), "sparse": (4, 12), "two_sigma": (4, 12)}
    assert gate == "none" or gated.blocks[0].attn_gate_w.shape == shapes[gate]
    assert gate != "none" or not any("attn_gate" in name for name, _ in gated.named_parameters())


def test_mlp_output_gate_can_be_left_out() -> None:
    """Without it there are no gate parameters, and the loss is that of a gate that is wide open."""
    gated, bare = random_model(toy_config()), tg.GPT(toy_config(MLP_GATE_OUT=0), tg.Run())
    missing = {name for name, _ in gated.named_parameters()} - {name for name, _ in bare.named_parameters()}
    assert missing == {f"blocks.{i}.mlp_gate_{kind}" for i in range(4) for kind in "wb"}
    inputs, targets = pair(toy_config(), 20)
    plan = tg.layer_plan(toy_config(), True)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            parameter.copy_(dict(gated.named_parameters())[name])
        assert (gated(inputs, targets, plan) - bare(inputs, targets, plan)).abs().max() > 0.01
        for block in gated.blocks:
            block.mlp_gate_b += 100
        torch.testing.assert_close(gated(inputs, targets, plan), bare(inputs, targets, plan))


def test_rotary_base_grows_with_the_training_length() -> None:
    """base (T / T0)^(r / (r - 2)): 22,082 for 16 rotated channels at twice the reference, 20,452 for 64."""
    base = lambda **env: tg.load_config({key: str(value) for key, value in env.items()})[0].rotary_base
    assert round(base(PRESET="fork5")) == 22_082
    assert round(base(PRESET="fork5", ROPE_DIMS=64)) == 20_452
    assert base(PRESET="fork5", ROPE_TRAIN_SEQ_LEN=0) == 10_000
    assert base(PRESET="fork5", ROPE_TRAIN_SEQ_LEN=4096) == 10_000  # a shorter training leaves it
    for preset in ("baseline", "pr489", "fork5_10l", "pr1880", "pr1941", "pr1855", "pr2135", "pr2158"):
        assert base(PRESET=preset) == 10_000, preset


def test_attention_backend_that_cannot_run_is_refused() -> None:
    """Asking for a GPU back-end on a CPU names the setting and what is usable."""
    with pytest.raises(tg.UserError, match="ATTN_BACKEND=fa3.*sdpa"):
        tg.GPT(toy_config(ATTN_BACKEND="fa3"), tg.Run())


# FlashAttention-3's functions with the names and order of their arguments; one result in a tuple, as older builds have it.
FA3 = """
import torch
import train_gpt as tg

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    assert causal
    return tg.attend_sdpa(q, k, v, None), None

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False,
):
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    cu = cu_seqlens_q.tolist()
    return torch.cat([tg.attend_sdpa(*(x[None, a:b] for x in (q, k, v)), None)[0] for a, b in zip(cu, cu[1:])])
"""
# The package `kernels`, release 0.17: it wants a version or a revision. `state` stands for the network.
KERNELS = """
import sys

state, calls = "online", []

def get_kernel(repo_id, *, revision=None, version=None, backend=None, user_agent=None, trust_remote_code=False):
    assert (revision is None) != (version is None) and not trust_remote_code
    calls.append(repo_id)
    if state == "offline":
        raise OSError("cannot reach the hub\\nsecond line")
    return sys.modules["fa3"]
"""


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Hopper GPU with the package `kernels`, as far as choose_attention looks; the folder of its modules."""
    modules = {"kernels": KERNELS, "fa3": FA3}
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(text)
    for name in (*modules, "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tg.fetch_fa3.cache_clear()
    importlib.import_module("fa3")
    yield tmp_path
    tg.fetch_fa3.cache_clear()
    for name in (*modules, "flash_attn_interface"):
        sys.modules.pop(name, None)


def choose(**changes: Any) -> tuple[str, Any]:
    return tg.choose_attention(toy_config(**changes), torch.device("cuda"))


@pytest.mark.parametrize("source", ["kernels", "flash_attn_interface"])
def test_flash_attention_3_is_attention(hopper: Path, source: str) -> None:
    """Installed or fetched once, it gives what SDPA gives, for dense and packed rows, captured in one graph too."""
    if source == "flash_attn_interface":
        (hopper / "flash_attn_interface.py").write_text(FA3)
    names = {"kernels": "fa3 (kernels-community/flash-attn3)", "flash_attn_interface": "fa3 (flash_attn_interface)"}
    (name, attend), again = choose(), choose(ATTN_BACKEND="fa3")
    assert name == again[0] == names[source]
    kernels = importlib.import_module("kernels")
    assert kernels.calls == ["kernels-community/flash-attn3"] * (source == "kernels")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 24, heads, 8) for heads in (4, 2, 2))
    for segments in (None, packed([5, 1, 18], 24)):
        torch.testing.assert_close(attend(q, k, v, segments), tg.attend_sdpa(q, k, v, segments))
    captured = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(captured(q, k, v, None), attend(q, k, v, None))
    copy.deepcopy(attend)  # as a model with it is copied


def test_flash_attention_3_that_cannot_be_fetched_is_no_silent_loss(hopper: Path) -> None:
    """auto takes the next back-end and its name says why, after one try; fa3 by name is refused with the reason."""
    kernels = importlib.import_module("kernels")
    kernels.state = "offline"
    reason = "fa3 cannot be fetched from kernels-community/flash-attn3: OSError: cannot reach the hub"
    with pytest.raises(tg.UserError, match=f"ATTN_BACKEND=fa3: {reason} .usable here"):
        choose(ATTN_BACKEND="fa3")
    if tg.import_error("torch.nn.attention.varlen"):  # PyTorch 2.9
        with pytest.raises(tg.UserError, match=f"ATTN_BACKEND=auto: {reason};.* pip install kernels"):
            choose()
    else:
        assert choose()[0] == f"varlen ({reason})"
    assert len(kernels.calls) == 1


@pytest.mark.parametrize(
    "capability, backend", [((8, 0), "auto"), ((10, 0), "auto"), ((12, 0), "auto"), ((9, 0), "varlen")]
)
def test_flash_attention_3_is_not_fetched_in_vain(
    hopper: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str
) -> None:
    """Nothing is downloaded for another GPU than Hopper, or where another back-end is named."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with contextlib.suppress(tg.UserError):  # PyTorch 2.9 has no variable-length attention
        assert choose(ATTN_BACKEND=backend)[0] == "varlen"
    assert importlib.import_module("kernels").calls == []


def test_toy_configuration_has_every_mechanism_switched_on() -> None:
    """The other tests rely on loops, lanes, skips, XSA, rotation and SmearGate being present in the toy size."""
    config = toy_config()
    looped = tg.layer_plan(config, True)
    assert len(looped) > config.num_layers and any(v.wiring == "two_lane" for v in looped)
    assert any(v.skip is not None and v.wiring == "two_lane" for v in looped)
    assert any(v.skip is not None and v.wiring == "serial" for v in looped)
    assert config.smear_gate_enabled and config.rope_dims < config.head_dim


@pytest.mark.slow
def test_forward_is_one_graph_with_and_without_adapters() -> None:
    """Bare, packed and adapted calls are captured whole, and give the same losses as the plain calls."""
    config = toy_config()
    model, plan = random_model(config), tg.layer_plan(config, True)
    captured = torch.compile(model, backend="eager", fullgraph=True)
    inputs, targets = pair(config, 24)
    for segments, lora in ((None, None), (packed([8, 1, 15], 32), None), (None, random_lora(config, 1))):
        with torch.no_grad():
            expected = model(inputs, targets, plan, segments, lora)
            torch.testing.assert_close(captured(inputs, targets, plan, segments, lora), expected)
