"""Rotary frequencies: bitwise those of transformers, angles right at every position, settings never half read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ochat.errors import ConfigError
from ochat.model import rope
from ochat.model.rope import RopeConfig

ROPES = st.builds(
    RopeConfig,
    theta=st.sampled_from([10000.0, 500000.0, 1e6, 123.0]),
    kind=st.sampled_from(["default", "linear", "llama3"]),
    factor=st.sampled_from([1.0, 2.5, 8.0, 32.0]),
    low_freq_factor=st.sampled_from([0.5, 1.0]),
    high_freq_factor=st.sampled_from([2.0, 4.0]),
    original_max_position_embeddings=st.sampled_from([16, 512, 8192]),
)


@settings(deadline=None)
@given(settings_=ROPES, head_dim=st.integers(1, 64).map(lambda half: 2 * half))
def test_frequencies_and_tables_are_transformers(settings_, head_dim):
    old = rope.to_hf(settings_)
    parameters = {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": old["rope_theta"]}
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters))
    frequencies = rope.inv_freq(settings_, head_dim)
    assert frequencies.dtype == torch.float32 and torch.equal(frequencies, theirs.inv_freq)
    position_ids = torch.tensor([0, 1, 7, 100, 8191])
    cos, sin = rope.cos_sin(position_ids, frequencies)
    their_cos, their_sin = theirs(torch.zeros(1), position_ids[None])
    assert torch.equal(torch.cat((cos, cos), -1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), their_sin[0])


@given(settings_=ROPES)
def test_settings_read_back_in_both_spellings(settings_):
    old = rope.to_hf(settings_)
    read = rope.from_hf(old)
    assert rope.to_hf(read) == old
    new = {"rope_parameters": {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": old["rope_theta"]}}
    assert rope.from_hf(new) == read == rope.from_hf(old | new)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor = 1.2"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "rope_type and type disagree"),
        ({"rope_scaling": [2.0]}, "rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one table of numbers for all layers"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16]}}, "mrope_section"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta is 10000.0.*top level says 500000.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": 1e4, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor = 1.0 must be larger"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, "original_max_position.* is missing"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(record, named):
    with pytest.raises(ConfigError, match=f"^config.json: .*{named}"):
        rope.from_hf(record)
