"""The loss of a step: a packed batch in fp32 against conversations one at a time in float64, gradients included."""

import ochat_kernels
import pytest
import torch
import torch.nn.functional as F

from ochat.data.batch import Example, pack
from ochat.data.dataset import TokenDataset
from ochat.model import hf
from ochat.model.attention.packed import PackedAttention
from ochat.train.loss import head_loss
from tests import model_families, tiny
from tests.numerics import relative_error

OPS = ochat_kernels.load("reference")
FAMILIES = (  # all that differs between families is in one of these
    "llama2", "llama-tied-odd-head", "qwen3-mixed", "phi3", "smollm3", "granite", "gemma2", "gemma3", "olmo3",
)  # fmt: skip


def conversations(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([0.0, 0.1, 1.0, -0.7, 0.25])
    examples = []
    for ids in model_families.random_ids(*lengths, seed=seed):
        drawn = weights[torch.randint(0, 5, (len(ids),), generator=generator)]
        examples.append(Example(torch.tensor(ids).numpy(), drawn.numpy(), "GPT4"))
    return examples


def packed_gradients(model, examples, shape, step_weight):
    batch = pack(examples, range(len(examples)), [0] * len(examples), **shape)
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, "sdpa", batch.lengths)
    head = head_loss(OPS, model, batch)
    out = model(batch.input_ids, batch.position_ids, attend, head=head, rows=batch.supervised_rows)
    loss = out.loss_sum / step_weight
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def gradients_by_hand(peer, config, examples, step_weight):
    """Each conversation alone through transformers' model in float64; label t is the next id, with the next id's
    weight."""
    peer = peer.double()
    peer.set_attn_implementation("eager")  # the others leave out a cap of the scores
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.from_numpy(example.input_ids)
        logits = peer(ids[None]).logits[0, :-1]
        nll = F.cross_entropy(logits, ids[1:], reduction="none")
        total = total + (nll * torch.from_numpy(example.loss_weights[1:]).double()).sum()
    loss = total / step_weight
    loss.backward()
    return loss.detach(), model_families.from_hf(config, {name: p.grad for name, p in peer.named_parameters()})


@pytest.mark.parametrize(
    ("lengths", "shape"), [((7, 1, 19, 2), {}), ((5, 31), {"pad_to": 64}), ((5, 31), {"multiple": 32})]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_and_gradients_equal_conversations_alone_in_float64(family, lengths, shape, tmp_path):
    peer = model_families.make(family, tmp_path)
    model = hf.load(tmp_path, dtype="float32")
    examples = conversations(lengths)
    step_weight = sum(abs(float(w)) for e in examples for w in e.loss_weights[1:]) + 3.5  # other bins have weight too
    loss, gradients = packed_gradients(model, examples, shape, step_weight)
    truth, expected = gradients_by_hand(peer, model.config, examples, step_weight)
    assert abs(loss.double() - truth) <= 2e-6  # of about 5 a unit of weight; weights of both signs cancel
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("budget", [96, 300])
def test_with_conversation_means_a_step_weighs_conversations_alike_in_any_packing(world, tmp_path, budget):
    """One step of the whole data: the mean over conversations of the mean nll of their supervised labels."""
    options = ["--data.bins_per_step=64", f"--data.token_budget={budget}", "--weights.source=none"]
    (line,) = tiny.train(world, tmp_path / "run", *options, "--weights.per_conversation_mean=true")
    model, means = hf.load(world.base, dtype="float32").double(), []
    for example in TokenDataset(world.data):
        ids, is_label = torch.from_numpy(example.input_ids), torch.from_numpy(example.loss_weights[1:]) != 0
        (logits,) = model.logits([ids.tolist()])
        means.append(F.cross_entropy(logits.double()[:-1], ids[1:], reduction="none")[is_label].mean())
    assert line["loss"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-6)
