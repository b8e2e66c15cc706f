"""Laws of counted lengths: pytest tests/plan/test_lengths.py"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.errors import DataError
from ochat.plan import lengths as files
from ochat.plan.lengths import LengthCounts

LENGTHS = st.lists(st.integers(1, 20000), min_size=1, max_size=60).map(np.array)


@given(LENGTHS, st.integers(1, 20000), st.sampled_from([1, 50, 90, 99, 100]))
def test_counts_answer_what_the_lengths_do(lengths, limit, percent):
    counts = LengthCounts.of(lengths)
    assert (counts.num_sequences, counts.num_tokens, counts.longest) == (len(lengths), lengths.sum(), lengths.max())
    assert counts.over(limit) == (lengths > limit).sum()
    assert counts.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")
    cut = counts.cut(limit)
    assert (cut.num_sequences, cut.num_tokens) == (len(lengths), np.minimum(lengths, limit).sum())


@given(LENGTHS)
def test_the_ranges_hold_every_sequence_once_and_are_few(lengths):
    title, *lines = LengthCounts.of(lengths).text().splitlines()
    ranges = [line.replace(",", "").split() for line in lines]
    assert sum(int(words[3]) for words in ranges) == len(lengths)
    assert all(int(a[2]) + 1 == int(b[0]) for a, b in zip(ranges, ranges[1:], strict=False))
    assert int(ranges[0][0]) <= lengths.min() and int(ranges[-1][2]) >= lengths.max()
    assert len(lines) <= 16 and max(map(len, (title, *lines))) <= 80


def test_pieces_make_no_difference_and_what_is_no_length_is_named(monkeypatch):
    lengths = np.array([5, 1, 900, 3, 3, 2, 77], np.int32)
    whole = LengthCounts.of(lengths).counts
    monkeypatch.setattr(files, "PIECE", 2)
    np.testing.assert_array_equal(LengthCounts.of(lengths).counts, whole)
    for wrong in (0, -3, files.LONGEST + 1):
        with pytest.raises(DataError, match=f"sequence 4 has {wrong} tokens"):
            LengthCounts.of(np.array([1, 2, 3, 4, wrong]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"1\n2\n", "not a NumPy .npy file"),
        (np.zeros((2, 2), np.int32), "int32 of shape"),
        (np.array([1.0, 2.0]), "float64"),
        (np.zeros(0, np.int64), "holds no lengths"),
    ],
)
def test_a_file_of_lengths_is_mapped_and_another_refused_with_how_to_make_one(tmp_path, content, said):
    path = tmp_path / "lengths.npy"
    np.save(path, np.array([3, 4], np.int32))
    assert isinstance(files.read(path), np.memmap) and files.read(path).tolist() == [3, 4]
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(DataError, match=said) as raised:
        files.read(path)
    assert str(path) in str(raised.value) and (said == "holds no lengths" or "np.save" in str(raised.value))
