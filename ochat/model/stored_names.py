"""The names of stored tensors: plain ones, whatever was around the model, and what is wrong where they do not fit.

plain_name("language_model.model.norm.weight")    # model.norm.weight
stored = by_plain_names(open_folder(folder), wanted);  misfit(wanted - stored.keys(), stored.keys() - wanted)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set

from ochat.errors import CheckpointError
from ochat.files.safetensors_file import StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Segments of a name that say only what was around the decoder: its class with a head, or with a vision tower;
# DistributedDataParallel; torch.compile.
WRAPPERS = frozenset(("model", "language_model", "module", "_orig_mod"))
VISION = frozenset(("vision_tower", "multi_modal_projector"))
# Segments of names that GPTQ, AWQ, FP8, bitsandbytes, compressed-tensors and MLX write beside or for a weight.
QUANTISED = frozenset(
    """qweight qzeros scales g_idx weight_scale weight_scale_inv input_scale activation_scale absmax nested_absmax
    quant_map quant_state SCB weight_packed weight_shape weight_zero_point""".split()  # noqa: SIM905
)
NAMES_SHOWN = 5


def plain_name(stored: str) -> str:
    """The name of a tensor in a plain text model, whatever was around the decoder when it was stored.

    `language_model.model.norm.weight`, `model.language_model.norm.weight`, `_orig_mod.model.norm.weight` and
    `norm.weight` are all `model.norm.weight`.
    """
    rest = ".".join(segment for segment in stored.split(".") if segment not in WRAPPERS)
    return rest if rest == HEAD else f"model.{rest}"


def by_plain_names(stored: Mapping[str, StoredTensor], wanted: Collection[str]) -> dict[str, StoredTensor]:
    """The tensors by their plain names where those are wanted, else by their own.

    Raises: CheckpointError for two of one plain name.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = plain_name(name)
        other = found.setdefault(plain if plain in wanted else name, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"{other} and {name} are both read as {plain}: two models in one folder; remove the one not meant"
            )
    return found


def misfit(missing: Set[str], left_over: Set[str]) -> str:
    """What is wrong with a folder's names, and what to do: the end of a sentence that begins with the folder."""
    if quantised := [name for name in left_over if not QUANTISED.isdisjoint(name.split("."))]:
        return f"holds {listed(quantised)}: quantised weights are not read; take the model that they were made from"
    if adapters := [name for name in left_over if ".lora_" in name]:
        return f"holds {listed(adapters)}: merge the adapter into its weights first (PEFT: merge_and_unload)"
    if EMBEDDING in missing and (foreign := [name for name in left_over if name.endswith("embed_tokens.weight")]):
        return f"holds {foreign[0]} where {EMBEDDING} is expected; take that prefix off its tensors' names"
    if missing == {HEAD}:
        return f"lacks {HEAD}; if its embedding is the head too, set tie_word_embeddings to true in config.json"
    if missing:
        return f"lacks {listed(missing)}, which its config.json asks for"
    return f"holds {listed(left_over)}, which its config.json has no place for"


def listed(names: Iterable[str]) -> str:
    """The first few, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMES_SHOWN} more" if len(ordered) > NAMES_SHOWN else ""
    return ", ".join(ordered[:NAMES_SHOWN]) + more
