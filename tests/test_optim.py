"""AdamW against its formula in float64, clipping against the definition, state that can be put back."""

import ochat_kernels
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


@pytest.fixture(params=["torch", "reference", "triton"])
def build(request):
    """optim.build with torch's AdamW, and with the operator of each kind."""
    adamw = None if request.param == "torch" else ochat_kernels.load(request.param).adamw
    return lambda model, config: optim.build(model, config, adamw)


def moments(model, optimizer):
    return [(n, moment, optimizer.state[p][moment]) for n, p in model.named_parameters() for moment in optim.MOMENTS]


def keep_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_steps_equal_the_formula_and_vectors_do_not_decay(build):
    model, config = model_with_gradients(), OptimConfig(weight_decay=0.1, eps=1e-5, betas=(0.9, 0.95))
    optimizer, gradients = build(model, config), keep_gradients(model)
    truth = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(t) for name, t in truth.items()}
    second = {name: torch.zeros_like(t) for name, t in truth.items()}
    for step in range(1, 4):
        lr = 0.1 / step
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optim.update(optimizer, lr=lr, clip=0.0)
        for name, parameter in model.named_parameters():
            grad = gradients[name].double()
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            decay = 0.1 if truth[name].dim() >= 2 else 0.0
            moved = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-5)
            truth[name] = truth[name] * (1 - lr * decay) - lr * moved
            torch.testing.assert_close(parameter.detach().double(), truth[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("clip", "is_scaled"), [(0.5, True), (1e6, False), (0.0, False)])
def test_clipping_scales_all_gradients_by_one_factor(build, clip, is_scaled):
    model, config = model_with_gradients(), OptimConfig(weight_decay=0.0)
    optimizer, gradients = build(model, config), keep_gradients(model)
    expected = torch.cat([g.flatten() for g in gradients.values()]).norm()
    norm = optim.update(optimizer, lr=0.1, clip=clip)
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in model.parameters())
    factor = clip / expected if is_scaled else 1.0
    for name, moment, value in moments(model, optimizer):
        if moment == "exp_avg":  # after one step, (1 - beta_1) times the gradient that was used
            torch.testing.assert_close(value, 0.1 * gradients[name] * factor, atol=1e-6, rtol=1e-5)


def test_state_that_is_put_back_continues_bitwise(build):
    model = model_with_gradients()
    optimizer, gradients = build(model, OptimConfig()), keep_gradients(model)
    optim.update(optimizer, lr=0.1, clip=1.0)
    twin = model_with_gradients()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = build(twin, OptimConfig())
    optim.start_state(twin_optimizer, 1)
    saved = {(name, moment): t for name, moment, t in moments(model, optimizer)}
    assert len(saved) == 2 * len(list(model.parameters()))
    for name, moment, target in moments(twin, twin_optimizer):
        target.copy_(saved[name, moment])
    for each, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
        for name, parameter in each.named_parameters():
            parameter.grad = gradients[name].clone()
        optim.update(its_optimizer, lr=0.05, clip=1.0)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_without_gradient_is_left_alone(build):
    model = model_with_gradients()
    optimizer = build(model, OptimConfig())
    model[0].bias.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    optim.update(optimizer, lr=0.1, clip=1.0)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, True, True]
