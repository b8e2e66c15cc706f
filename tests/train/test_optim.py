"""AdamW against torch's in float64, clipping against the definition, state that can be put back."""

import ochat_kernels
import pytest
import torch
from torch import nn

from ochat.checkpoint import manifest
from ochat.config import OptimConfig
from ochat.train import optim

GOOD, BAD = torch.tensor(1.0), torch.tensor(float("nan"))


def small_model():
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return model


def give_gradients(model, step, bad=None):
    """Those of a step, with a value among them."""
    draw = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    if bad is not None:
        model[1].weight.grad[1] = bad
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture(params=["torch", "reference", "triton"])
def build(request):
    """optim.build with torch's AdamW, and with the operator of each kind."""
    ops = None if request.param == "torch" else ochat_kernels.load(request.param)
    return lambda model, config: optim.build(model, config, ops)


def moments(model, optimizer, names=manifest.MOMENTS):
    return [optimizer.state[p][name].clone() for p in model.parameters() for name in names if optimizer.state]


def test_steps_equal_those_of_torch_in_float64_and_vectors_do_not_decay(build):
    model, truth = small_model(), small_model().double()
    config = OptimConfig(weight_decay=0.1, eps=1e-5, betas=(0.9, 0.95))
    optimizer = build(model, config)
    matrix, *vectors = truth.parameters()
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    expected = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    for step in range(1, 4):
        for each in (model, truth):
            give_gradients(each, 1)
        for group in expected.param_groups:
            group["lr"] = 0.1 / step
        expected.step()
        optim.update(optimizer, lr=0.1 / step, clip=0.0, loss=GOOD)
        for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
            torch.testing.assert_close(ours.detach().double(), theirs.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("clip", "is_scaled"), [(0.5, True), (1e6, False), (0.0, False)])
def test_clipping_scales_all_gradients_by_one_factor(build, clip, is_scaled):
    model = small_model()
    optimizer, gradients = build(model, OptimConfig(weight_decay=0.0)), give_gradients(model, 1)
    expected = torch.cat([g.flatten() for g in gradients]).norm()
    norm = optim.update(optimizer, lr=0.1, clip=clip, loss=GOOD)
    torch.testing.assert_close(norm, expected)
    assert all(p.grad is None for p in model.parameters())
    factor = clip / expected if is_scaled else 1.0
    for value, gradient in zip(moments(model, optimizer, ["exp_avg"]), gradients, strict=True):
        # after one step, (1 - beta_1) times the gradient that was used
        torch.testing.assert_close(value, 0.1 * gradient * factor, atol=1e-6, rtol=1e-5)


def test_a_parameter_without_gradient_is_left_alone(build):
    model, before = small_model(), small_model()
    optimizer = build(model, OptimConfig())
    give_gradients(model, 1)
    model[0].bias.grad = None
    optim.update(optimizer, lr=0.1, clip=1.0, loss=GOOD)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True)]
    assert moved == [True, False, True, True]


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(("value", "loss"), [(torch.nan, GOOD), (-torch.inf, GOOD), (None, BAD), (3e38, GOOD)])
def test_a_bad_step_changes_no_bit_and_the_next_ones_are_as_if_it_had_not_been(build, value, loss, clip):
    """Also the first one; twice in a row; and a norm that is too large for fp32 is as bad as an infinite gradient."""
    runs, taken = [], (2, 5, 6)
    for skips in (True, False):
        model = small_model()
        optimizer = build(model, OptimConfig())
        for step in (1, 2, 3, 4, 5, 6) if skips else taken:
            is_bad = step not in taken
            before = [p.detach().clone() for p in model.parameters()], moments(model, optimizer)
            give_gradients(model, step, value if is_bad else None)
            norm = optim.update(optimizer, lr=0.1 / step, clip=clip, loss=loss if is_bad else GOOD)
            if is_bad:
                assert not norm.isfinite() or value is None
                after = [*model.parameters()], moments(model, optimizer)
                states = before[1] or [torch.zeros_like(t) for t in after[1]]
                assert all(map(torch.equal, before[0], after[0])) and all(map(torch.equal, states, after[1]))
        runs.append(([*model.parameters()], moments(model, optimizer)))
    for ours, theirs in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, runs[0][1], runs[1][1]))


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_moments_in_host_memory_come_and_go_in_pieces_and_change_nothing(monkeypatch, moment_dtype):
    monkeypatch.setattr(optim, "PIECE", 4)  # of 15, 3, 3 and 3 elements
    results = []
    for host_moments in (False, True):
        model, config = small_model(), OptimConfig(moment_dtype=moment_dtype)
        optimizer = optim.build(model, config, ochat_kernels.load("reference"), host_moments=host_moments)
        optim.start_state(optimizer, 2)
        for step in range(3):
            give_gradients(model, step)
            optim.update(optimizer, lr=0.1, clip=0.5, loss=GOOD)
        results.append([*model.parameters(), *moments(model, optimizer)])
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours, theirs) and ours.any() and ours.device.type == "cpu"
