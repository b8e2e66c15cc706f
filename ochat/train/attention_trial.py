"""Try backends of attention on the device itself: is one right, and which is fastest?

    trial = Trial(model, needs, device); trial.fault("fa3"), trial.seconds(["fa3", "varlen"], batch)
Right is what `sdpa` computes, within the project's accuracy rule. Letters: T, N, K, D.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ochat.data.batch import PackedBatch
from ochat.errors import ConfigError
from ochat.model.attention.backends import BACKENDS, Needs, first_line
from ochat.model.attention.packed import PackedAttention
from ochat.model.attention.sdpa import Scores
from ochat.model.config import ModelConfig

LENGTHS = (130, 1, 64, 300)  # around the blocks of kernels
SHORT_WINDOW = 97  # where a model's is longer than these documents
TIMED_S, LEAST_TURNS, MOST_TURNS = 0.5, 3, 20  # seconds of all backends together
RESULTS = ("result", "gradient of q", "gradient of k", "gradient of v")


@dataclass(frozen=True)
class Trial:
    """Of one model on one device."""

    model: ModelConfig
    needs: Needs
    device: torch.device

    def fault(self, name: str) -> str:
        """What is wrong with a backend on a few short documents, each kind of layer apart; "": nothing.

        An error may be twice that of `sdpa` in the same dtype and half a rounding of the largest value; the truth is
        `sdpa` in float64. Raises: ConfigError where the backend broke the GPU.
        """
        lengths = [*LENGTHS, *[0, 0] * self.needs.has_empty]
        inputs = self.draw(sum(lengths))
        try:
            for asked in self.kinds():
                window = None if asked.window is None else min(asked.window, SHORT_WINDOW)
                scores = Scores(window, asked.scale, asked.softcap)
                found = computed(name, inputs, lengths, scores)
                if wrong := self._difference(found, inputs, lengths, scores):
                    return wrong
                again = computed(name, inputs, lengths, scores) if self.needs.is_deterministic else found
                if not all(map(torch.equal, found, again)):
                    return "gives other numbers when run again, but run.deterministic is true"
        except Exception as problem:  # whatever a package raises
            return self._failure(name, problem)
        finally:
            if name == "flex":
                torch._dynamo.reset()  # else the run's own shape would be compiled as one of many
        return ""

    def _difference(self, found: list[Tensor], inputs: Sequence[Tensor], lengths: list[int], scores: Scores) -> str:
        exact = computed("sdpa", [x.double() for x in inputs], lengths, scores)
        plain = computed("sdpa", inputs, lengths, scores)
        for what, ours, theirs, truth in zip(RESULTS, found, plain, exact, strict=True):
            if not torch.isfinite(ours).all():
                return f"has NaN or infinity in its {what}"
            error, usual = (float((x.double() - truth).abs().max()) for x in (ours, theirs))
            if error > 2 * usual + torch.finfo(self.needs.dtype).eps / 2 * float(truth.abs().max()):
                return f"is wrong in its {what}: off by {error:.2g}, sdpa by {usual:.2g}"
        return ""

    def seconds(self, names: Sequence[str], batch: PackedBatch) -> tuple[dict[str, float], dict[str, str]]:
        """(forward and backward of an average block on this batch on the device, by backend; what those say that fail).

        Backends take turns, and each has the median of its own. One that plans every batch anew pays for that too.
        """
        inputs = self.draw(len(batch.input_ids))
        first, failed = dict[str, float](), dict[str, str]()
        for name in names:
            try:
                first[name] = self._turn(name, batch, inputs)
            except Exception as problem:
                failed[name] = self._failure(name, problem)
        turns: dict[str, list[float]] = {name: [] for name in first}
        end = time.perf_counter() + TIMED_S
        for done in range(MOST_TURNS):
            if done >= LEAST_TURNS and time.perf_counter() > end:
                break
            for name, taken in turns.items():
                taken.append(self._turn(name, batch, inputs))
        found = {name: statistics.median(taken) for name, taken in turns.items()}
        for name, usual in found.items():
            if BACKENDS[name].plans_shapes and not BACKENDS[name].takes_empty():
                found[name] += max(first[name] - usual, 0) / self.model.num_layers
        return found, failed

    def _turn(self, name: str, batch: PackedBatch, inputs: Sequence[Tensor]) -> float:
        """Seconds of an average block."""
        kinds = self.kinds()
        windows = [scores.window for scores in kinds]
        attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen, name, batch.lengths, windows)
        total = 0.0
        for scores, layers in kinds.items():
            start = self.now()
            gradients(attend, inputs, scores)
            total += (self.now() - start) * layers
        return total / self.model.num_layers

    def kinds(self) -> Counter[Scores]:
        """How many layers do what with their scores."""
        model = self.model
        windows = map(model.window, range(model.num_layers))
        return Counter(Scores(window, model.attention_scale, model.attention_softcap) for window in windows)

    def draw(self, num_tokens: int) -> list[Tensor]:
        """q, k, v and a gradient of the result, by a generator of their own."""
        generator, m = torch.Generator(self.device).manual_seed(0), self.model
        shapes = [
            (num_tokens, heads, m.head_dim) for heads in (m.num_heads, m.num_kv_heads, m.num_kv_heads, m.num_heads)
        ]
        return [torch.randn(shape, generator=generator, device=self.device).to(self.needs.dtype) for shape in shapes]

    def now(self) -> float:
        """Seconds of a clock, after all that the device was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _failure(self, name: str, problem: Exception) -> str:
        """What an exception says. Raises: ConfigError where the GPU can't go on after it."""
        told = f"{type(problem).__name__}: {first_line(problem)}"
        try:
            self.now()
        except RuntimeError:
            other = "varlen" if name != "varlen" else "sdpa"
            raise ConfigError(
                f"the test of attention {name!r} broke the GPU ({told}); set train.attention = {other!r}"
            ) from None
        return f"fails ({told})"


def computed(name: str, inputs: Sequence[Tensor], lengths: list[int], scores: Scores) -> list[Tensor]:
    """The result and the gradients of q, k and v of documents of such lengths."""
    cu_seqlens = torch.tensor([0, *lengths], device=inputs[0].device).cumsum(0).to(torch.int32)
    return gradients(PackedAttention(cu_seqlens, max(lengths), name, lengths, [scores.window]), inputs, scores)


def gradients(attend: PackedAttention, inputs: Sequence[Tensor], scores: Scores) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(0, q, k, v, scores)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]
