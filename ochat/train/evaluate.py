"""Evaluate between steps: held-out loss and accuracy per class, and answers to a few fixed prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ochat_kernels import LossOutput

from ochat.config import SamplesConfig
from ochat.data.batch import PackedBatch
from ochat.data.loader import Loader
from ochat.distributed.processes import Ranks
from ochat.infer.generate import generate
from ochat.model.transformer import Transformer
from ochat.text.conversation import Conversation, Message
from ochat.text.template import Template
from ochat.text.tokenizer import Tokenizer
from ochat.train import metrics
from ochat.train.metrics import StepMetrics


@torch.no_grad()
def held_out(forward: Callable[[PackedBatch], LossOutput], loader: Loader, ranks: Ranks) -> dict[str, Any]:
    """Loss and accuracy over one pass of the loader and all ranks: {loss, accuracy, supervised_tokens, classes}."""
    measured = StepMetrics(loader.dataset.class_names, ranks.device)
    for _, batches in loader.iterate():
        for batch in batches:
            batch = batch.to(ranks.device)
            measured.add(batch, forward(batch))
    means = metrics.summarise(ranks.sum_tensor(measured.to_tensor()).tolist(), loader.dataset.class_names)
    return {key: means[key] for key in ("loss", "accuracy", "supervised_tokens", "classes")}


def answer(
    model: Transformer,
    template: Template,
    tokenizer: Tokenizer,
    config: SamplesConfig,
    conditions: tuple[str, ...],
    device: torch.device,
) -> list[dict[str, str]]:
    """Greedy answers to the configured prompts under each condition; all ranks of a sharded model call it."""
    asked = [(prompt, condition) for prompt in config.prompts for condition in config.conditions or conditions]
    if not asked:
        return []
    prompts = [
        template.encode_prompt(Conversation((Message("user", prompt, None),), condition=condition), tokenizer)
        for prompt, condition in asked
    ]
    stop = [tokenizer.special_tokens[template.eot]]
    answers = generate(model, prompts, max_new_tokens=config.max_new_tokens, stop_ids=stop, device=device)
    return [
        {"prompt": prompt, "condition": condition, "answer": tokenizer.decode(ids)}
        for (prompt, condition), ids in zip(asked, answers, strict=True)
    ]
