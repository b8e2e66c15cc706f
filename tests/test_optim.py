"""AdamW against its formula in float64, clipping against the definition, state that can be put back."""

import pytest
import torch
from torch import nn

from ochat.config import OptimConfig
from ochat.train import optim


def model_with_gradients(seed=0):
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


def test_steps_equal_the_formula_and_vectors_do_not_decay():
    model, config = model_with_gradients(), OptimConfig(weight_decay=0.1, eps=1e-5, betas=(0.9, 0.95))
    optimizer = optim.build(model, config)
    truth = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(t) for name, t in truth.items()}
    second = {name: torch.zeros_like(t) for name, t in truth.items()}
    for step in range(1, 4):
        lr = 0.1 / step
        optim.set_lr(optimizer, lr)
        optimizer.step()
        for name, parameter in model.named_parameters():
            grad = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.1 if truth[name].dim() >= 2 else 0.0
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-5)
            truth[name] = truth[name] * (1 - lr * decay) - lr * update
            torch.testing.assert_close(parameter.detach().double(), truth[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("largest", "scaled"), [(0.5, True), (1e6, False), (0.0, False)])
def test_clipping_scales_all_gradients_by_one_factor(largest, scaled):
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in before]).norm()
    norm = optim.clip_gradients(model.parameters(), largest)
    torch.testing.assert_close(norm, expected)
    factor = largest / expected if scaled else 1.0
    for parameter, grad in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, grad * factor, atol=1e-6, rtol=1e-5)


def test_state_that_is_put_back_continues_bitwise():
    model = model_with_gradients()
    optimizer = optim.build(model, OptimConfig())
    optim.set_lr(optimizer, 0.1)
    optimizer.step()
    twin = model_with_gradients()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = optim.build(twin, OptimConfig())
    optim.start_state(twin_optimizer, 1)
    saved = {(name, moment): t for name, moment, t in optim.moments(model, optimizer)}
    assert len(saved) == 2 * len(list(model.parameters()))
    for name, moment, target in optim.moments(twin, twin_optimizer):
        target.copy_(saved[name, moment])
    for each in (optimizer, twin_optimizer):
        optim.set_lr(each, 0.05)
        each.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
