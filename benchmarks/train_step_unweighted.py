"""Peers whose loss has no weights a token: transformers with Liger's operators, and TRL's trainer, over our bins.

    runner = Liger(config, torch.device("cuda"), Peer()); runner.step(); runner.losses()

They train on the mean over supervised tokens instead, which is something else and a little less work.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from torch import Tensor, nn

from benchmarks.train_step_peers import Packed
from ochat.data.batch import IGNORE_INDEX, PackedBatch


class Liger(Packed):
    """transformers, packed, with Liger's RMSNorm, RoPE, SwiGLU and fused head."""

    def load_model(self) -> nn.Module:
        import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
        return super().load_model()

    def loss(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        labels = batch["labels"].masked_fill(batch["loss_weights"] == 0, IGNORE_INDEX)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        count = sum(each.num_supervised for each in packed)
        return self.model(
            **inputs, labels=labels, shift_labels=labels, num_items_in_batch=count, use_cache=False
        ).loss  # fmt: skip


class Trl(Packed):
    """TRL's SFTTrainer without padding: its collator, its loss and its step, with our AdamW and learning rates."""

    def load_model(self) -> nn.Module:
        trl, model = import_module("trl"), super().load_model()
        is_half = self.config.train.dtype == "bfloat16"
        arguments = trl.SFTConfig(
            output_dir=str(Path(self.config.run.dir)), per_device_train_batch_size=1, padding_free=True,
            gradient_accumulation_steps=self.config.data.bins_per_step, bf16=is_half and self.peer.states == "masters",
            max_length=None, use_cpu=self.device.type == "cpu", gradient_checkpointing=self.peer.recompute,
            dataset_kwargs={"skip_prepare_dataset": True}, report_to=[],
        )  # fmt: skip
        rows = [self.example(batch) for batch in self.loader.step(0)]
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(self.config.base.path)
        data = import_module("datasets").Dataset.from_list(rows)
        self.trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        self.prepared = self.trainer.accelerator.prepare(model)
        return model

    def backward(self, batch: dict[str, Tensor], packed: list[PackedBatch]) -> Tensor:
        return self.trainer.training_step(self.prepared, batch, sum(each.num_supervised for each in packed))

    def of_step(self, packed: list[PackedBatch]) -> Iterator[dict[str, Tensor]]:
        for batch in packed:
            yield self.trainer.data_collator([self.example(batch)])

    def example(self, batch: PackedBatch) -> dict[str, list[int]]:
        """A bin as TRL packs: labels stand with their own tokens."""
        labels = batch.labels.masked_fill(batch.loss_weights == 0, IGNORE_INDEX).roll(1)
        return {
            "input_ids": batch.input_ids.tolist(),
            "labels": labels.tolist(),
            "seq_lengths": list(batch.lengths),
        }
