"""The learning rate: what "auto" chooses and why, and the warm-up and cosine that scale it step by step.

    choice = choose_lr("auto", supervised_tokens_per_step=200_000, model_type="llama", vocab_size=32002)
    lr = choice.value * factor(step, num_steps, warmup_ratio=0.05, min_lr_ratio=0.1)

"auto": lr = 3e-4 * sqrt(supervised tokens per step / 4e6) / divisor of the model's family, 10 times that for adapters.
The rule and the divisors are those of the public C-RLFT (OpenChat) trainer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ochat.config import OptimConfig

BASE_LR = 3e-4  # for BASE_TOKENS supervised tokens a step
BASE_TOKENS = 4e6
LLAMA3_VOCAB = 128_000  # a Llama with at least this vocabulary is a Llama 3
MIN_TOKENS = 20_000  # a tenth of the published runs' supervised tokens a step; below it the rule's rate is too small
LORA_FACTOR = 10.0  # adapters over full training, at any rank: Schulman et al., "LoRA Without Regret", 2025
FAMILY_DIVISORS = {"Mistral": 6.0, "Gemma": 5.5, "Llama 3": 5.3}


@dataclass(frozen=True)
class LearningRate:
    """The peak learning rate and the sentence that explains it."""

    value: float
    reason: str


def choose_lr(
    setting: float | str, *, supervised_tokens_per_step: float, model_type: str, vocab_size: int, lora: bool = False
) -> LearningRate:
    """The peak learning rate: `setting` itself if it is a number, for "auto" the rule above."""
    if not isinstance(setting, str):
        return LearningRate(float(setting), f"lr {setting:.3g}: set in the configuration")
    family = _family(model_type, vocab_size)
    divisor = FAMILY_DIVISORS.get(family, 1.0)
    value = BASE_LR * math.sqrt(supervised_tokens_per_step / BASE_TOKENS) / divisor * (LORA_FACTOR if lora else 1)
    reason = (
        f"lr {value:.3g}: auto, {BASE_LR:g} x sqrt({supervised_tokens_per_step:,.0f} supervised tokens a step / "
        f"{BASE_TOKENS:,.0f}) / {divisor:g} for {family}{f', x {LORA_FACTOR:g} for adapters' * lora}"
    )
    if supervised_tokens_per_step < MIN_TOKENS:
        reason += "; the rule is meant for steps of about 200,000: for small steps set optim.lr, 1e-5 to 3e-4 are usual"
    return LearningRate(value, reason)


def factor(step: int, num_steps: int, *, warmup_ratio: float, min_lr_ratio: float) -> float:
    """The share of the peak rate in `step` (counted from 0): linear warm-up, then cosine to the minimum."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate in `step` (counted from 0); `optim.lr` must be resolved to a number."""
    assert isinstance(optim.lr, float)
    ratios = {"warmup_ratio": optim.warmup_ratio, "min_lr_ratio": optim.min_lr_ratio}
    return optim.lr * factor(step, num_steps, **ratios)


def _family(model_type: str, vocab_size: int) -> str:
    if model_type == "llama":
        return "Llama 3" if vocab_size >= LLAMA3_VOCAB else "Llama"
    return {"mistral": "Mistral", "gemma": "Gemma"}.get(model_type, model_type)
