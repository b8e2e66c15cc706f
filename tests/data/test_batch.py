"""Laws of the packed batch: pytest tests/data/test_batch.py"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data.batch import IGNORE_INDEX, PAD_DOCUMENT_TOKENS, Example, most_documents, pack

WEIGHTS = st.sampled_from([0.0, 1.0, 0.1, -0.5])
DOCUMENTS = st.lists(st.lists(st.tuples(st.integers(0, 1000), WEIGHTS), min_size=1, max_size=9), max_size=6)


def example(pairs):
    ids, weights = zip(*pairs, strict=True)
    return Example(np.array(ids, np.int64), np.array(weights, np.float32), "GPT4")


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.none() | st.integers(0, 600))
def test_a_batch_says_what_its_documents_say(documents, spare):
    total = sum(map(len, documents))
    pad_to = None if spare is None else total + spare + (total + spare == 0)
    batch = pack([example(d) for d in documents], range(10, 10 + len(documents)), range(len(documents)), pad_to=pad_to)

    expected_rows, expected_classes = [], []
    begin = 0
    for class_id, document in enumerate(documents):
        for t, (token, _) in enumerate(document):
            assert batch.input_ids[begin + t] == token and batch.position_ids[begin + t] == t
            last = t == len(document) - 1
            label, weight = (IGNORE_INDEX, 0.0) if last else document[t + 1]
            assert batch.labels[begin + t] == label
            assert batch.loss_weights[begin + t] == np.float32(weight)
            if not last and weight != 0:
                expected_rows.append(begin + t)
                expected_classes.append(class_id)
        begin += len(document)
    assert batch.supervised_rows.tolist() == expected_rows and batch.supervised_classes.tolist() == expected_classes
    assert batch.num_tokens == total and batch.num_supervised == len(expected_rows)
    assert batch.weight_sum == np.abs(batch.loss_weights.numpy(), dtype=np.float64).sum()
    assert batch.sequences == tuple(range(10, 10 + len(documents)))
    assert batch.sum_len_sq == sum(len(d) ** 2 for d in documents)

    assert len(batch.input_ids) == (pad_to or max(total, 1))
    assert (batch.labels[total:] == IGNORE_INDEX).all() and not batch.loss_weights[total:].any()
    lengths = list(batch.lengths)
    assert lengths[: len(documents)] == [len(d) for d in documents]
    assert batch.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
    assert batch.max_seqlen == min(-(-max(lengths) // 128) * 128, sum(lengths))
    assert batch.position_ids.tolist() == [p for length in lengths for p in range(length)]
    kinds = {name: tensor.dtype for name, tensor in vars(batch).items() if torch.is_tensor(tensor)}
    assert (kinds.pop("loss_weights"), kinds.pop("cu_seqlens")) == (torch.float32, torch.int32)
    assert len(kinds) == 5 and set(kinds.values()) == {torch.int64}


@pytest.mark.parametrize(("longest", "max_seqlen"), [(1, 256), (256, 256), (257, 512), (512, 512), (513, 600)])
def test_empty_documents_and_a_bucket_fix_the_shape(longest, max_seqlen):
    document = example([(5, 1.0)] * longest)
    batch = pack([document], [0], [0], pad_to=600, num_documents=7)
    assert len(batch.lengths) == 7 and batch.cu_seqlens[-1] == batch.cu_seqlens[4] == 600
    assert batch.max_seqlen == max_seqlen
    for shape in ({"pad_to": longest + 1, "num_documents": 1}, {"pad_to": longest - 1}):
        with pytest.raises(AssertionError, match="do not fit into"):
            pack([document], [0], [0], **shape)


@pytest.mark.parametrize(
    ("num_real", "tokens", "most"), [(63, 599, 64), (64, 600, 64), (64, 599, 128), (62, 88, 64), (62, 87, 128)]
)
def test_the_fullest_bin_counts_its_padding(num_real, tokens, most):
    """599 of 600 tokens need one document of padding, 88 need two of 256, 87 need three."""
    assert most_documents(np.array([num_real, 3]), np.array([tokens, 600]), 600) == most


@given(DOCUMENTS, st.sampled_from([2, 7, 64]), st.booleans())
def test_a_multiple_adds_tokens_and_rows_without_weight(documents, multiple, has_budget):
    total = sum(map(len, documents))
    pad_to = total + 70 if has_budget else None
    shape = {"pad_to": pad_to or -(-max(total, 1) // multiple) * multiple}
    args = [example(d) for d in documents], range(len(documents)), range(len(documents))
    plain, batch = pack(*args, **shape), pack(*args, pad_to=pad_to, multiple=multiple)
    assert batch.lengths == plain.lengths and torch.equal(batch.input_ids, plain.input_ids)
    rows, weights = batch.supervised_rows, batch.supervised_weights
    unsupervised = len(plain.labels) - plain.num_supervised
    assert len(rows) - plain.num_supervised == min(-plain.num_supervised % multiple, unsupervised)
    assert torch.equal(rows, rows.unique())  # ascending, each once
    assert torch.equal(rows[weights != 0], plain.supervised_rows)
    assert torch.equal(batch.supervised_classes[weights != 0], plain.supervised_classes)
    assert (batch.num_supervised, batch.weight_sum) == (plain.num_supervised, plain.weight_sum)


def test_padding_is_short_documents_and_an_empty_bin_is_padding_alone():
    batch = pack([example([(5, 0.0), (6, 1.0)])], [0], [0], pad_to=1000)
    assert sum(batch.lengths) == 1000 and max(batch.lengths[1:]) == PAD_DOCUMENT_TOKENS and min(batch.lengths) > 0
    batch = pack([], [], [])
    assert (batch.lengths, batch.num_tokens, batch.weight_sum, len(batch.supervised_rows)) == ((1,), 0, 0.0, 0)
    assert pack([], [], [], pad_to=300).lengths == (256, 44)


def test_to_moves_tensors_and_keeps_the_rest():
    batch = pack([example([(5, 0.0), (6, 1.0)])], [7], [0])
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.supervised_rows.is_meta and not batch.supervised_rows.is_meta
    assert (moved.lengths, moved.sequences, moved.weight_sum) == (batch.lengths, batch.sequences, batch.weight_sum)
