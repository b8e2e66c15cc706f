"""Rotary frequencies: bitwise those of transformers, angles right at every position, settings never half read."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig, Olmo3Config, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from ochat.errors import ConfigError
from ochat.model import rope
from ochat.model.families import warn_once
from ochat.model.rope import RopeConfig

MAX = 131072
POSITIONS = [0, 1, 7, 100, 4095, 8191, 50000, MAX - 1]


@st.composite
def ropes(draw, kinds=tuple(rope.SCALING_KEYS), pairs=None):
    """A rotation that from_hf can return, with MAX as max_position_embeddings, and its number of pairs."""
    kind, pairs = draw(st.sampled_from(kinds)), pairs or draw(st.integers(2, 64))
    original = draw(st.sampled_from([6, 16, 512, 8192, 32768]))
    numbers = st.lists(st.floats(0.5, 64.0), min_size=pairs, max_size=pairs).map(tuple)
    pick = {
        "factor": st.just(MAX / original) if kind == "longrope" else st.sampled_from([1.0, 2.3, 2.5, 8.0, 32.0]),
        "low_freq_factor": st.sampled_from([0.5, 1.0]),
        "high_freq_factor": st.sampled_from([2.0, 4.0]),
        "original_max_position_embeddings": st.just(original),
        "attention_factor": st.sampled_from([None, 1.25, 0.7]),
        "beta_fast": st.sampled_from([32.0, 64.0]),
        "beta_slow": st.sampled_from([1.0, 0.5]),
        "truncate": st.booleans(),
        "short_factor": numbers,
        "long_factor": numbers,
    }
    used = set(rope.SCALING_KEYS[kind]) | ({"factor"} if kind == "longrope" else set())
    theta = draw(st.sampled_from([10000.0, 500000.0, 1e6, 123.0]))
    return RopeConfig(theta, kind, **{name: draw(pick[name]) for name in pick if name in used}), pairs


def assert_tables_are(theirs, mine, head_dim, positions, layer_type=()):
    position_ids = torch.tensor(positions)
    cos, sin = rope.cos_sin(position_ids, rope.inv_freq(mine, head_dim), mine)
    their_cos, their_sin = theirs(torch.zeros(1), position_ids[None], *layer_type)
    assert cos.dtype == torch.float32
    assert torch.equal(torch.cat((cos, cos), -1), their_cos[0])
    assert torch.equal(torch.cat((sin, sin), -1), their_sin[0])


@settings(deadline=None)
@given(drawn=ropes())
@example(drawn=(RopeConfig(1e4, "yarn", 4.0, original_max_position_embeddings=6), 16))  # a ramp of no width
def test_frequencies_and_tables_are_transformers(drawn):
    mine, pairs = drawn
    config = LlamaConfig(head_dim=2 * pairs, max_position_embeddings=MAX, **rope.to_hf(mine))
    theirs = LlamaRotaryEmbedding(config)
    with torch.device("meta"):  # on which models are built
        frequencies = rope.inv_freq(mine, 2 * pairs)
    assert frequencies.dtype == torch.float32
    assert torch.equal(frequencies[0] if mine.kind == "longrope" else frequencies, theirs.inv_freq)
    is_by_length = mine.kind == "longrope"
    assert_tables_are(
        theirs, mine, 2 * pairs, range(mine.original_max_position_embeddings + 1) if is_by_length else POSITIONS
    )
    assert_tables_are(theirs, mine, 2 * pairs, range(16))


@settings(deadline=None)
@given(drawn=ropes(kinds=("default", "longrope"), pairs=36))
def test_a_part_of_the_head_rotates_as_in_transformers(drawn):
    mine = replace(drawn[0], partial_rotary_factor=0.75)
    record = {"head_dim": 96, "max_position_embeddings": MAX, **rope.to_hf(mine)}
    theirs = Phi3RotaryEmbedding(Phi3Config(hidden_size=96, num_attention_heads=1, **record))
    assert rope.inv_freq(mine, 96).shape[-1] == 36
    assert_tables_are(theirs, mine, 96, range(600))
    assert rope.from_hf(record, is_partial=True) == mine
    assert rope.from_hf({"rope_parameters": None, **theirs.config.to_dict()}, is_partial=True) == mine


@settings(deadline=None)
@given(base=ropes(kinds=("default", "linear", "yarn"), pairs=8), local_theta=st.sampled_from([10000.0, 500000.0]))
@pytest.mark.parametrize(
    ("config_class", "embedding"), [(Gemma3TextConfig, Gemma3RotaryEmbedding), (Olmo3Config, Olmo3RotaryEmbedding)]
)
def test_layers_with_windows_have_their_own_base(config_class, embedding, base, local_theta):
    ours = {"full_attention": replace(base[0], truncate=True), "sliding_attention": RopeConfig(local_theta)}
    record = {"max_position_embeddings": MAX, **rope.to_hf(*ours.values())}
    theirs = embedding(config_class(hidden_size=64, head_dim=16, num_attention_heads=4, **record))
    old = {key: value for key, value in record.items() if key != "rope_parameters"}
    new = {"max_position_embeddings": MAX, "rope_parameters": theirs.config.to_dict()["rope_parameters"]}
    for layers, mine in ours.items():
        assert_tables_are(theirs, mine, 16, POSITIONS, (layers,))
        assert rope.from_hf(record, layers=layers) == rope.from_hf(old, layers=layers) == mine
        assert rope.from_hf(new, layers=layers) == mine


def test_bases_that_the_file_leaves_out_are_the_familys():
    record: dict[str, Any] = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # as in Gemma 3's of 4B
    theirs: Any = Gemma3TextConfig(**record).rope_parameters
    base = rope.from_hf(record, theta=1e6, layers="full_attention")
    local = rope.from_hf(record, theta=1e4, layers="sliding_attention")
    assert (base.kind, base.factor, base.theta) == ("linear", 8.0, theirs["full_attention"]["rope_theta"])
    assert local == RopeConfig(theirs["sliding_attention"]["rope_theta"])


@given(drawn=ropes())
def test_settings_read_back_in_both_spellings(drawn):
    old = {"max_position_embeddings": MAX, **rope.to_hf(drawn[0])}
    assert rope.from_hf(old) == drawn[0]
    table = {"rope_type": "default", **(old["rope_scaling"] or {}), "rope_theta": old["rope_theta"]}
    table["rope_type"] = table.get("type", table["rope_type"])
    whole = {key: old[key] for key in old if "max_position" in key}
    assert (
        rope.from_hf({"rope_parameters": table, **whole}) == drawn[0] == rope.from_hf(old | {"rope_parameters": table})
    )


def test_settings_that_transformers_derives_or_passes_over():
    """YaRN's original length where the file has none; what LLaMA-Factory and Nous Research write besides."""
    read = rope.from_hf({"rope_scaling": YARN | {"finetuned": True}, "max_position_embeddings": 64})
    assert read == rope.from_hf({"rope_scaling": YARN | {rope.WHOLE: 64}})
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert rope.from_hf({"rope_scaling": dynamic | {rope.WHOLE: 64}}) == rope.from_hf({"rope_scaling": dynamic})


def test_yarn_settings_that_name_the_attention_factor(caplog):
    yarn = {"rope_type": "yarn", "factor": 4.0, rope.WHOLE: 32768}
    derived = 0.1 * math.log(4.0) + 1.0
    assert rope.attention_factor(rope.from_hf({"rope_scaling": yarn})) == derived
    # DeepSeek-R1-0528-Qwen3-8B undoes the derived factor, for servers of its time
    warn_once.cache_clear()
    assert rope.from_hf({"rope_scaling": yarn | {"attn_factor": 0.8782488562869419}}) == rope.from_hf(
        {"rope_scaling": yarn}
    )
    assert (
        "attn_factor is not read, as in transformers and vLLM" in caplog.text and "attention_factor = 1 " in caplog.text
    )
    written = rope.to_hf(rope.from_hf({"rope_scaling": yarn | {"attention_factor": 1.0}}))["rope_scaling"]
    assert written["attention_factor"] == 1.0 and written["attn_factor"] == 1.0 / derived
    assert rope.attention_factor(rope.from_hf({"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}})) == 1.0
    olmo = yarn | {"factor": 8.0, "attention_factor": 1.2079441541679836}
    assert rope.from_hf({"rope_scaling": olmo}) == rope.from_hf({"rope_scaling": yarn | {"factor": 8.0}})


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


def test_longrope_as_phi_spelled_it():
    record = {"max_position_embeddings": 131072, rope.WHOLE: 4096}
    read = rope.from_hf(record | {"rope_scaling": LONGROPE})
    assert read.short_factor == (1.0, 1.5) and read.factor == 32.0
    assert rope.attention_factor(read) == math.sqrt(1 + math.log(32.0) / math.log(4096))
    for old in ("su", "yarn"):
        assert rope.from_hf(record | {"rope_scaling": LONGROPE | {"type": old}}) == read
    inside = LONGROPE | {"rope_type": "longrope", rope.WHOLE: 4096, "rope_theta": 10000.0}
    assert rope.from_hf({"max_position_embeddings": 131072, "rope_parameters": inside}) == read


def rotated_alone(mine, length):
    positions = torch.arange(length)
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=8, max_position_embeddings=MAX, **rope.to_hf(mine)))
    return [table[0, :, :4] for table in theirs(torch.zeros(1), positions[None])]


@settings(deadline=None)
@given(drawn=ropes(kinds=("longrope",), pairs=4), near=st.lists(st.integers(-3, 3), min_size=1, max_size=6))
def test_each_packed_document_has_the_factors_of_its_own_length(drawn, near):
    mine = replace(drawn[0], original_max_position_embeddings=16, factor=MAX / 16)
    lengths = [16 + more for more in near] + [1, 1]  # padding is documents of one token
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert rope.document_lengths(positions).tolist() == [length for length in lengths for _ in range(length)]
    alone = [rotated_alone(mine, length) for length in lengths]
    for got, parts in zip(rope.cos_sin(positions, rope.inv_freq(mine, 8), mine), zip(*alone, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))


def test_a_step_with_a_cache_has_the_factors_of_the_length_so_far():
    mine = RopeConfig(kind="longrope", original_max_position_embeddings=16, factor=8192.0,
                      short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(2.0, 3.0, 4.0, 5.0))  # fmt: skip
    positions = torch.tensor([14, 15, 16, 3])  # neighbours by chance, not one document
    assert rope.document_lengths(positions).tolist() == [15, 16, 17, 4]
    cos, _ = rope.cos_sin(positions, rope.inv_freq(mine, 8), mine)
    assert torch.equal(cos, torch.stack([rotated_alone(mine, int(p) + 1)[0][-1] for p in positions]))
    assert rope.document_lengths(torch.empty(0, dtype=torch.int64)).tolist() == []


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.2}}, "attention_factor = 1.2"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "rope_type and type disagree"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type is 'ntk'"),
        ({"rope_scaling": [2.0]}, "rope_scaling is"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one table of numbers for all layers"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [16]}}, "mrope_section"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5}, "rope_theta is 10000.0.*top level says 500000.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_theta": 1e4, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor = 1.0 must be larger"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, "original_max_position.* is missing"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "is 64, the top level says 32"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25: this model type"),
        ({"rope_scaling": YARN}, "max_position_embeddings is missing"),
        ({"rope_scaling": YARN | {rope.WHOLE: 64}, "rope_theta": 1}, "rope_theta is 1; YaRN needs a base > 1"),
        (
            {"rope_scaling": LONGROPE, rope.WHOLE: 1},
            "original_max_position_embeddings is 1; expected a whole number >= 2",
        ),
        ({"rope_scaling": YARN | {rope.WHOLE: 64, "truncate": 1}}, "truncate is 1; expected true or false"),
        ({"rope_scaling": LONGROPE, rope.WHOLE: 64}, "max_position_embeddings is missing"),
        ({"rope_scaling": LONGROPE, "max_position_embeddings": 64}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": LONGROPE | {"long_factor": 2}, rope.WHOLE: 64}, "long_factor is 2; expected a list"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0]}, rope.WHOLE: 64}, "long_factor is 0; expected a finite"),
        (
            {"rope_scaling": LONGROPE | {"factor": 3.0}, rope.WHOLE: 32, "max_position_embeddings": 64},
            "factor is 3.0, but max_position_embeddings / original_max_position_embeddings is 2.0",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(record, named):
    with pytest.raises(ConfigError, match=f"^config.json: .*{named}"):
        rope.from_hf(record)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has no table sliding_attention"),
        (
            {"rope_local_base_freq": 5e5, "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
            "sliding_attention: rope_theta is 10000.0, the top level's rope_local_base_freq says 500000.0",
        ),
    ],
)
def test_rotations_of_windows_that_cannot_be_honoured_are_refused(record, named):
    with pytest.raises(ConfigError, match=named):
        rope.from_hf(record, layers="sliding_attention")


def test_a_share_above_one_and_factors_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is 1.5: a share of a head is at most 1"):
        rope.from_hf({"partial_rotary_factor": 1.5}, is_partial=True)
    with pytest.raises(ConfigError, match="short_factor has 2 numbers, but 3 pairs of a head rotate"):
        rope.inv_freq(RopeConfig(kind="longrope", short_factor=(1.0, 1.0), long_factor=(1.0, 1.0)), head_dim=6)
