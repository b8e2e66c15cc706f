"""Choose who computes a run's attention: train.attention = "auto" tests what is installed, then times what passes.

    backend, reason = choose("auto", model, needs, ranks, first_batch, keep=Path("runs/a/attention.json"))
On a GPU each backend that can compute what is needed is compared with `sdpa` on a few short documents, and those that
agree are timed on the run's own first batch: half a second in all, but for packages that compile. The first rank
decides for all. A resumed run keeps its choice.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ochat.data.batch import PackedBatch
from ochat.distributed.processes import Ranks
from ochat.errors import ConfigError
from ochat.files import atomic
from ochat.files.bounded_json import read_object
from ochat.model.attention.backends import BACKENDS, Needs, check
from ochat.model.config import ModelConfig
from ochat.train.attention_trial import Trial

# where none of the first passes, the next is tried: flex compiles for many seconds, and is slower
GROUPS = (("fa3", "fa4", "cudnn", "flash", "varlen"), ("flex",))
LAST = "sdpa"
PACKAGES = ("torch", "flash-attn", "flash_attn_3", "flash-attn-4")


def choose(
    asked: str, model: ModelConfig, needs: Needs, ranks: Ranks, first_batch: Callable[[], PackedBatch], keep: Path
) -> tuple[str, str]:
    """(backend, why), the same on all ranks, which all call it. `first_batch`: of this rank, on the host; `keep`: the
    file that holds the choice of a run.

    Raises: ConfigError for a backend that was asked for and cannot do it, or whose test broke the GPU.
    """
    if asked != "auto":
        check(asked, needs, ranks.device)
        return asked, asked
    if ranks.device.type != "cuda":
        return LAST, f"{LAST}, chosen: on a CPU"
    mine = {name: row.lacks(needs) or row.is_missing(ranks.device) for name, row in BACKENDS.items()}
    refused: dict[str, str] = {}
    for theirs in ranks.all_gather_json(mine):
        refused |= {name: reason for name, reason in theirs.items() if reason}
    found, problem = {}, ""
    if ranks.is_first:
        try:
            found = kept_or_new(Trial(model, needs, ranks.device), refused, first_batch, keep)
        except ConfigError as error:
            problem = str(error)
    ranks.raise_on_all_ranks(problem, ConfigError)
    found = ranks.all_gather_json(found)[0]
    return found["backend"], found["reason"]


def kept_or_new(
    trial: Trial, refused: dict[str, str], first_batch: Callable[[], PackedBatch], keep: Path
) -> dict[str, Any]:
    """The choice in the file `keep`, unless needs, device or versions are others or it is refused now; else a new one,
    which is written there."""
    is_cuda = trial.device.type == "cuda"
    stamp = {"needs": repr(trial.needs), "cudnn": torch.backends.cudnn.version()}
    stamp |= {"device": torch.cuda.get_device_name(trial.device) if is_cuda else "cpu"}
    stamp |= {name: version(name) for name in PACKAGES}
    if keep.is_file():
        kept = read_object(keep, ConfigError, "delete it, and the choice is made anew")
        if kept.get("stamp") == stamp and kept["backend"] not in refused:
            return kept
    backend, reason = decide(trial, refused, first_batch)
    made = {"backend": backend, "reason": reason, "stamp": stamp}
    keep.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(keep, made)
    return made


def decide(trial: Trial, refused: dict[str, str], first_batch: Callable[[], PackedBatch]) -> tuple[str, str]:
    """(the fastest backend that passes the test, why it and not others); `refused`: what is known of some."""
    found, refused = dict[str, float](), dict(refused)
    for group in GROUPS:
        for name in group:
            refused[name] = refused.get(name) or trial.fault(name)
        passed = [name for name in group if not refused[name]]
        if passed:
            found, failed = trial.seconds(passed, first_batch().to(trial.device))
            refused |= failed
        if found:
            break
    ranked = sorted(found, key=lambda name: found[name]) or [LAST]
    reasons = [", ".join(f"{name} {found[name] * 1e3:.3g} ms" for name in ranked) + " a block" if found else "the last"]
    reasons += [f"not {name}, which {reason}" for name, reason in refused.items() if reason]
    if trial.device.type == "cuda":
        torch.cuda.empty_cache()  # the model's memory is taken next
    return ranked[0], f"{ranked[0]}, chosen: {'; '.join(reasons)}"


def version(package: str) -> str:
    """Of an installed package; "": it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
