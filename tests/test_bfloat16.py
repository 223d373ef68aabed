"""The arithmetic of a GPU, tried on the CPU: bfloat16 activations, gradient exchange and Muon, float32 weights."""

import numpy as np
import pytest
import torch
from conftest import randomise, toy_config

import train_gpt as tg


class Bfloat16Run(tg.Run):
    """A run on the CPU that computes as on a GPU."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


@pytest.fixture
def row() -> tg.Row:
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, 64, (1, 65)))
    segments = tg.pack_segments(np.array([20, 32, 12]), 32, tg.Run())
    return tg.Row(tokens[:, :-1], tokens[:, 1:], segments)


def test_bfloat16_activations_give_nearly_the_same_nats(row: tg.Row) -> None:
    """Every product meets equal dtypes, nats are float32, and rounding stays small, packed and dense, with taps."""
    config, plan = toy_config(), tg.layer_plan(toy_config(), True)
    exact, rounded = randomise(tg.GPT(config, tg.Run())), randomise(tg.GPT(config, Bfloat16Run()))
    taps = tg.Taps()
    for segments in (row.segments, None):
        expected = exact(row.inputs, row.targets, plan, segments)
        nll = rounded(row.inputs, row.targets, plan, segments, taps=taps)
        assert nll.dtype == torch.float32
        assert (nll - expected).abs().max() < 0.15 and (nll - expected).abs().mean() < 0.03
    assert all(hessian.dtype == torch.float32 for hessian in taps.hessians.values())


def test_bfloat16_training_and_adaptation_take_steps_on_float32_weights(row: tg.Row) -> None:
    """Exchange, Muon, AdamW and adapters run in mixed precision; weights stay float32 and the loss falls."""
    config, run = toy_config(), Bfloat16Run()
    model = tg.GPT(config, run)
    optimizer, plan = tg.Optimizer(model, config, run), tg.layer_plan(config, True)
    losses = []
    for _ in range(6):
        loss = model(row.inputs, row.targets, plan, row.segments).mean()
        loss.backward()
        gradients, numbers = optimizer.exchange(plan, [loss.detach()])
        assert gradients[0].dtype == torch.bfloat16 and numbers.dtype == torch.float32
        optimizer.step(gradients, 1.0, 0.9)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.requires_grad_(False)
    adapters = tg.Adapters(config, model, 1)
    adapters.begin(None, 0)
    lora = adapters.lora(slice(None))
    model(row.inputs, row.targets[:, -8:], plan, None, lora).sum().backward()
    adapters.step(lora, slice(None), 0)
    assert all(b.dtype == torch.float32 and b.abs().sum() > 0 for _, b in adapters.factors.values())
