"""Which attention a transformers model computes with: the fastest that works here, tried on a tiny model.

    name = choose(torch.device("cuda"), otherwise="flex_attention")
Packages of FlashAttention share a namespace, so what can be imported says little; transformers says what it could use,
and a forward and a backward say whether it does.
"""

from __future__ import annotations

from importlib import import_module

import torch

FLASH = ("flash_attention_3", "flash_attention_2", "flash_attention_4")  # in this order


def choose(device: torch.device, otherwise: str) -> str:
    """A name for `attn_implementation`: on a CPU "sdpa", without any FlashAttention that works `otherwise`."""
    if device.type != "cuda":
        return "sdpa"
    return next((name for name in FLASH if _is_there(name) and _works(name, device)), otherwise)


def _is_there(name: str) -> bool:
    known = import_module("transformers.utils")
    return getattr(known, f"is_{name.replace('attention', 'attn')}_available", lambda: False)()


def _works(name: str, device: torch.device) -> bool:
    """Whether two packed documents go forward and backward; why not is printed."""
    transformers = import_module("transformers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**heads, **sizes)
    places = torch.arange(32, device=device).repeat(2)[None]  # (1, T)
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=name
        ).to(device)
        model(input_ids=places, position_ids=places, use_cache=False).logits.sum().backward()
        return bool(torch.stack([p.grad.isfinite().all() for p in model.parameters()]).all())
    except Exception as problem:  # compilers and drivers raise what they like
        print(f"transformers' {name} does not work here: {type(problem).__name__}: {problem}", flush=True)
        return False
