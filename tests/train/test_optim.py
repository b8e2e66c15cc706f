"""AdamW against its formula in float64, clipping against the definition, state that can be put back."""

import ochat_kernels
import pytest
import torch
from torch import nn

from ochat.checkpoint import manifest
from ochat.config import OptimConfig
from ochat.train import optim

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


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
    return [(n, moment, optimizer.state[p][moment]) for n, p in model.named_parameters() for moment in manifest.MOMENTS]


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
        optim.update(optimizer, lr=lr, clip=0.0, loss=GOOD)
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
    norm = optim.update(optimizer, lr=0.1, clip=clip, loss=GOOD)
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in model.parameters())
    factor = clip / expected if is_scaled else 1.0
    for name, moment, value in moments(model, optimizer):
        if moment == "exp_avg":  # after one step, (1 - beta_1) times the gradient that was used
            torch.testing.assert_close(value, 0.1 * gradients[name] * factor, atol=1e-6, rtol=1e-5)


def test_a_parameter_without_gradient_is_left_alone(build):
    model = model_with_gradients()
    optimizer = build(model, OptimConfig())
    model[0].bias.grad = None
    before = [p.detach().clone() for p in model.parameters()]
    optim.update(optimizer, lr=0.1, clip=1.0, loss=GOOD)
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, True, True]


def gradients_of(step, value=None):
    draw = torch.Generator().manual_seed(step)
    shapes = [p.shape for p in model_with_gradients().parameters()]
    gradients = [torch.randn(shape, generator=draw) for shape in shapes]
    if value is not None:
        gradients[2][1] = value
    return gradients


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(("value", "loss"), [(torch.nan, GOOD), (-torch.inf, GOOD), (None, BAD), (3e38, GOOD)])
def test_a_bad_step_changes_no_bit_and_the_next_ones_are_as_if_it_had_not_been(build, value, loss, clip):
    """Also the first one; twice in a row; and a norm that is too large for fp32 is as bad as an infinite gradient."""
    runs, taken = [], (2, 5, 6)
    for skips in (True, False):
        model = model_with_gradients()
        optimizer = build(model, OptimConfig())
        for step in (1, 2, 3, 4, 5, 6) if skips else taken:
            is_bad = step not in taken
            before = [p.detach().clone() for p in model.parameters()]
            states = [t.clone() for _, _, t in moments(model, optimizer)] if optimizer.state else []
            for p, gradient in zip(model.parameters(), gradients_of(step, value if is_bad else None), strict=True):
                p.grad = gradient
            norm = optim.update(optimizer, lr=0.1 / step, clip=clip, loss=loss if is_bad else GOOD)
            if is_bad:
                assert not norm.isfinite() or value is None
                assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
                after = [t for _, _, t in moments(model, optimizer)]
                states = states or [torch.zeros_like(t) for t in after]
                assert all(torch.equal(a, b) for a, b in zip(states, after, strict=True))
        runs.append((list(model.parameters()), moments(model, optimizer)))
    for ours, theirs in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for (_, _, ours), (_, _, theirs) in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_moments_in_host_memory_come_and_go_in_pieces_and_change_nothing(monkeypatch, moment_dtype):
    monkeypatch.setattr(optim, "PIECE", 4)  # of 15, 3, 3 and 3 elements
    results = []
    for host_moments in (False, True):
        model, config = model_with_gradients(), OptimConfig(moment_dtype=moment_dtype)
        optimizer = optim.build(model, config, ochat_kernels.load("reference").adamw, host_moments=host_moments)
        optim.start_state(optimizer, 2)
        for step in range(3):
            for parameter, gradient in zip(model.parameters(), gradients_of(step), strict=True):
                parameter.grad = gradient
            optim.update(optimizer, lr=0.1, clip=0.5, loss=GOOD)
        results.append([*model.parameters(), *(t for _, _, t in moments(model, optimizer))])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.any() and ours.device.type == "cpu"
