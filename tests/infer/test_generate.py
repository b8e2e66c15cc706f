"""Greedy answers equal transformers' generate, token by token with a cache as the whole sequence at once; sampled ones
follow the distribution; neighbours change neither."""

from dataclasses import replace

import pytest
import torch
from ochat_kernels import reference

from ochat.errors import ConfigError, DataError
from ochat.infer import generate as generation
from ochat.infer.generate import KVCache, Sampler, generate
from ochat.model import hf
from ochat.model.attention.sdpa import Scores
from ochat.model.rope import RopeConfig
from ochat.model.transformer import Transformer, pack_ids
from tests.model_families import FAMILIES, make, random_ids

LENGTHS = (11, 1, 20, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    make("mistral", folder)
    return hf.load(folder, dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_answers_are_the_peers_and_cached_logits_the_whole_sequences(family, tmp_path):
    peer, ours = make(family, tmp_path), hf.load(tmp_path, dtype="float32")
    prompts = random_ids(*LENGTHS)
    answers = generate(ours, prompts, max_new_tokens=24, stop_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        assert answer == peer.generate(ids, max_new_tokens=24, **options)[0, len(prompt) :].tolist()
    if ours.config.rope.kind == "longrope":
        return  # the whole sequence turns by other factors than its beginning: generate reads it anew at the border
    sequences = random_ids(25, 13, 18)
    prompts = [sequence[:-12] for sequence in sequences]  # 13, 1 and 6 tokens, then 12 more of each
    cache = KVCache(ours.config, [len(prompt) for prompt in prompts], 25, torch.float32, "cpu")
    steps = [generation._read(ours, prompts, cache, None)]
    for offset in range(12):
        tokens = torch.tensor([sequence[offset - 12] for sequence in sequences])
        steps.append(ours(tokens, cache.lengths, cache))
        cache.advance()
    for found, wanted in zip(torch.stack(steps, dim=1), ours.logits(sequences), strict=True):  # (13, V) each
        assert (found - wanted[-13:]).abs().max() <= 2e-5 * wanted.abs().max()


@torch.no_grad()
def test_an_answer_that_outgrows_the_original_length_is_that_of_the_whole_sequence(model):
    """LongRoPE then turns all keys anew, those of a short prompt that the cache holds too."""
    ours = with_longrope(model)
    prompts = random_ids(*LENGTHS)  # 11, 1 and 4 tokens grow beyond 16, 20 are there
    for prompt, answer in zip(prompts, generate(ours, prompts, max_new_tokens=24, stop_ids=()), strict=True):
        for at, token in enumerate(answer):
            assert token == ours.logits([prompt + answer[:at]])[0][-1].argmax()


def test_unwritten_places_are_never_seen():
    """A large value wherever nothing was stored yet would reach the output through any wrong mask."""

    class Shape:
        num_layers, num_kv_heads, head_dim = 1, 2, 4

    cache = KVCache(Shape(), [3, 1], 8, torch.float32, "cpu")
    stored = torch.ones(4, 2, 4)
    cache.storing(lambda layer, q, k, v, *_: q)(0, stored, stored, stored, Scores())
    empty = torch.arange(8)[None, :] >= cache.lengths[:, None]
    cache.values[0][empty] = 1e9
    new = torch.ones(2, 2, 4)
    assert torch.allclose(cache(0, new, new, new, Scores()), new)


def test_an_answer_ends_before_its_stop_id_while_others_go_on(model):
    prompts = random_ids(*LENGTHS)
    free = generate(model, prompts, max_new_tokens=16, stop_ids=())
    stop = free[0][5]
    stopped = generate(model, prompts, max_new_tokens=16, stop_ids={stop})
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(stopped[0]) < 16 and any(len(answer) == 16 for answer in stopped)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 3}])
def test_an_answer_does_not_depend_on_its_neighbours(model, options):
    prompts = random_ids(*LENGTHS)
    together = generate(model, prompts, max_new_tokens=12, stop_ids=(), **options)
    assert generate(model, prompts[:1], max_new_tokens=12, stop_ids=(), **options) == together[:1]
    swapped = [prompts[0], *random_ids(30, 2, seed=7)]
    assert generate(model, swapped, max_new_tokens=12, stop_ids=(), **options)[0] == together[0]


def with_longrope(model):
    """The model with rotations that change once a sequence grows beyond 16 tokens."""
    factors = torch.linspace(1, 4, model.config.head_dim // 2)
    longrope = RopeConfig(
        kind="longrope", original_max_position_embeddings=16, factor=16.0,
        short_factor=tuple(factors.tolist()), long_factor=tuple((4 * factors).tolist()),
    )  # fmt: skip
    ours = Transformer(replace(model.config, rope=longrope), reference)
    ours.load_state_dict(model.state_dict())
    return ours


AGAINST = (3, 15, 8, 4)  # lengths of the other prompts: shorter, longer and the same
SAMPLED = {"temperature": 2.0, "top_k": 40, "seed": 3}


@pytest.mark.parametrize("kind", ["rope", "longrope"])
@pytest.mark.parametrize("options", [{}, SAMPLED])
@torch.no_grad()
def test_guidance_takes_tokens_from_logits_extrapolated_between_two_prompts(model, kind, options):
    """z_against + s * (z - z_against) in float64, each of the whole sequence without a cache."""
    ours, prompts, against = model, random_ids(*LENGTHS), random_ids(*AGAINST, seed=5)
    if kind == "longrope":
        ours = with_longrope(model)
    guided = generate(ours, prompts, max_new_tokens=24, stop_ids=(), guidance=2.5, against=against, **options)
    assert guided != generate(ours, prompts, max_new_tokens=24, stop_ids=(), **options)
    settings = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0} | options
    sampler = Sampler(**settings, num_sequences=len(prompts))
    for at in range(24):
        said = [answer[:at] for answer in guided]
        wanted, other = (
            torch.stack([ours.logits([prompt + text])[0][-1].double() for prompt, text in zip(side, said, strict=True)])
            for side in (prompts, against)
        )
        assert sampler(other + 2.5 * (wanted - other)).tolist() == [answer[at] for answer in guided]


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_guidance_of_1_is_none_to_the_bit_and_of_0_answers_the_other_prompts(model, options, monkeypatch):
    """In bfloat16, where another batch would have other last bits, and so other draws."""
    ours = Transformer(model.config, reference)
    ours.load_state_dict(model.state_dict())
    ours.bfloat16()
    read = []

    def watched(model, sequences, device):
        read.append(sequences)
        return pack_ids(model, sequences, device)

    monkeypatch.setattr(generation, "pack_ids", watched)
    prompts, against = random_ids(*LENGTHS), random_ids(*AGAINST, seed=5)
    settings = {"max_new_tokens": 24, "stop_ids": (), **options}
    assert generate(ours, prompts, guidance=1, against=against, **settings) == generate(ours, prompts, **settings)
    assert read[0] == read[1]
    plain, guided = (generate(model, side, **settings, **more) for side, more in
                     ((against, {}), (prompts, {"guidance": 0.0, "against": against})))  # fmt: skip
    assert guided == plain


def test_a_guided_answer_does_not_depend_on_its_neighbours_and_ends_where_either_prompt_fills_the_context(model):
    context = model.config.max_position_embeddings
    prompts, against = [*random_ids(5, 7)], [*random_ids(context - 3, 2, seed=5)]
    settings = {"max_new_tokens": 20, "stop_ids": (), "guidance": 1.5}
    together = generate(model, prompts, against=against, **settings)
    alone = [generate(model, [prompts[i]], against=[against[i]], **settings)[0] for i in (0, 1)]
    assert together == alone and [len(answer) for answer in alone] == [3, 20]
    stop = alone[1][4]
    assert (
        generate(model, prompts, against=against, **settings | {"stop_ids": {stop}})[1]
        == alone[1][: alone[1].index(stop)]
    )


def test_sampling_is_a_function_of_the_seed(model):
    prompts = random_ids(5, 5)[:1] * 2
    options = {"max_new_tokens": 12, "stop_ids": (), "temperature": 1.5}
    first = generate(model, prompts, seed=1, **options)
    assert first == generate(model, prompts, seed=1, **options) != generate(model, prompts, seed=2, **options)
    assert first[0] != first[1]  # the same prompt twice has draws of its own


def draw(logits, num_draws, **options):
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    sampler = Sampler(**settings, seed=0, num_sequences=num_draws)
    return torch.bincount(sampler(logits.expand(num_draws, -1)), minlength=logits.shape[-1]) / num_draws


LOGITS = torch.tensor([0.0, 2.0, -1.0, 1.0, 0.5])  # 0.08 0.55 0.03 0.20 0.13


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    wanted = (LOGITS / temperature).softmax(-1)
    # 4 standard deviations of a share among 4000 draws
    assert (draw(LOGITS, 4000, temperature=temperature) - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 2, "top_p": 0.72}, [1]),  # of the two that are left, the first has 0.73
        ({"top_k": 1, "temperature": 9.0}, [1]),
    ],
)
def test_only_the_kept_tokens_are_drawn(options, kept):
    assert draw(LOGITS, 1000, **options).nonzero().flatten().tolist() == kept


def test_the_cache_holds_the_longest_sequence_there_can_be_and_no_more(model, monkeypatch):
    capacities = []

    def watched(config, lengths, capacity, *rest):
        capacities.append(capacity)
        return KVCache(config, lengths, capacity, *rest)

    monkeypatch.setattr(generation, "KVCache", watched)
    context = model.config.max_position_embeddings
    long, short = random_ids(context - 3, 2)
    together = generate(model, [long, short], max_new_tokens=20, stop_ids=())  # one is full long before the other ends
    alone = [generate(model, [ids], max_new_tokens=20, stop_ids=())[0] for ids in (long, short)]
    generate(model, [short], max_new_tokens=10**9, stop_ids={alone[1][4]})
    assert capacities == [context, context, 22, context]
    assert together == alone and [len(answer) for answer in alone] == [3, 20]
    assert generate(model, [], max_new_tokens=8, stop_ids=()) == []


BAD_SETTINGS = [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1)]


@pytest.mark.parametrize(
    ("options", "error", "needle"),
    [
        *(({name: value}, ConfigError, f"{name} = {value}") for name, value in BAD_SETTINGS),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens = 0"),
        ({"prompts": [[1], []]}, ConfigError, "prompt 1"),
        ({"prompts": [[1] * 256]}, ConfigError, "prompt 0 .*256 .*256"),
        ({"prompts": [[97]]}, DataError, "97"),  # outside the vocabulary
        ({"guidance": -0.5}, ConfigError, "guidance = -0.5"),
        ({"guidance": float("inf")}, ConfigError, "guidance = inf"),
        ({"guidance": 1.5}, ConfigError, "a second prompt for each: 1 in against, not 0"),
        ({"guidance": 1.5, "against": [[]]}, ConfigError, "prompt 0"),
    ],
)
def test_bad_settings_and_prompts_are_named(model, options, error, needle):
    settings = {"prompts": [[1, 2]], "max_new_tokens": 4, "stop_ids": ()} | options
    with pytest.raises(error, match=needle):
        generate(model, settings.pop("prompts"), **settings)
