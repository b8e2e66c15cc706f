"""The learning rate: what "auto" chooses and why, and the warm-up and cosine that scale it step by step.

    peak, reason = choose_lr("auto", 200_000, model_config)
    lr = lr_at(step, num_steps, structs.replace(config.optim, lr=peak))

"auto": lr = 3e-4 * sqrt(supervised tokens per step / 4e6) / divisor of the model's family, 10 times that for adapters.
The rule and the divisors are those of the public C-RLFT (OpenChat) trainer.
"""

from __future__ import annotations

import math
from fractions import Fraction

from ochat.config import OptimConfig
from ochat.model.config import ModelConfig

BASE_LR = 3e-4  # for BASE_TOKENS supervised tokens a step
BASE_TOKENS = 4e6
LLAMA3_VOCAB = 128_000  # a Llama with at least this vocabulary is a Llama 3
MIN_TOKENS = 20_000  # a tenth of the published runs' supervised tokens a step; below it the rule's rate is too small
LORA_FACTOR = 10.0  # adapters over full training, at any rank: Schulman et al., "LoRA Without Regret", 2025
FAMILY_DIVISORS = {"Mistral": 6.0, "Gemma": 5.5, "Llama 3": 5.3}


def choose_lr(
    setting: float | str, supervised_tokens_per_step: float, model: ModelConfig, lora: bool = False
) -> tuple[float, str]:
    """The peak learning rate and the sentence that explains it: `setting` itself if it is a number, for "auto" the rule
    above."""
    if not isinstance(setting, str):
        return float(setting), f"lr {setting:.3g}: set in the configuration"
    family = {"mistral": "Mistral", "gemma": "Gemma", "llama": "Llama"}.get(model.model_type, model.model_type)
    if family == "Llama" and model.vocab_size >= LLAMA3_VOCAB:
        family = "Llama 3"
    divisor = FAMILY_DIVISORS.get(family, 1.0)
    value = BASE_LR * math.sqrt(supervised_tokens_per_step / BASE_TOKENS) / divisor * (LORA_FACTOR if lora else 1)
    reason = (
        f"lr {value:.3g}: auto, {BASE_LR:g} x sqrt({supervised_tokens_per_step:,.0f} supervised tokens a step / "
        f"{BASE_TOKENS:,.0f}) / {divisor:g} for {family}{f', x {LORA_FACTOR:g} for adapters' * lora}"
    )
    if supervised_tokens_per_step < MIN_TOKENS:
        reason += "; the rule is meant for steps of about 200,000: for small steps set optim.lr, 1e-5 to 3e-4 are usual"
    return value, reason


def lr_at(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate in `step` (counted from 0): linear warm-up to optim.lr, which must be resolved to a number,
    then cosine to the minimum."""
    assert isinstance(optim.lr, float)
    warmup = math.ceil(Fraction(str(optim.warmup_ratio)) * num_steps)  # 0.28 of 25 is 7, in floats a little more
    if step < warmup:
        return optim.lr * ((step + 1) / warmup)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
