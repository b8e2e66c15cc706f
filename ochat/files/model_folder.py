"""Folders without a model's safetensors: what they hold instead, and the command that makes a base of it.

raise ConfigError(f"{folder} has no model.safetensors. {how_to_get_base(folder)}")
"""

from __future__ import annotations

from pathlib import Path

from ochat.errors import CheckpointError, OchatError, how_to_fetch
from ochat.files import bounded_json

ADAPTER = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs"  # what a clone without git-lfs has in place of a large file


def how_to_get_base(directory: str | Path) -> str:
    """A sentence for a message about a folder that lacks config.json or weights. Costs: lists it and two levels below
    it."""
    folder = Path(directory)
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if folder.is_file() and folder.suffix == ".gguf":
        return f"{folder.name} is a GGUF file: make a base of it with `ochat init-base --gguf {folder} NEW_DIR`"
    if ADAPTER in files:
        return _merge_adapter(folder)
    if has_only_gguf(folder):
        largest = max(folder.glob("*.gguf"), key=lambda path: path.stat().st_size)  # the least quantised
        return f"It holds GGUF: make a base of it with `ochat init-base --gguf {largest} NEW_DIR`"
    if pickled := [name for name in files if name.startswith("pytorch_model") and name.endswith(".bin")]:
        command = _python("AutoModelForCausalLM", "transformers", folder, f".save_pretrained({str(folder)!r})")
        return f"{pickled[0]} is pickled: it can run code and is not read. Convert the weights with {command}"
    if foreign := [name for name in files if name.startswith("consolidated")]:
        return f"{foreign[0]} is in another format: fetch the model*.safetensors that are published next to it"
    if parts := [name for name in files if name.startswith("model-") and name.endswith(".safetensors")]:
        return f"{parts[0]} is one of several: fetch their model.safetensors.index.json too"
    if others := [name for name in files if name.endswith(".safetensors")]:
        return f"If {others[0]} is the whole model, rename it to model.safetensors"
    if inner := [path.parent for below in ("*", "*/*") for path in sorted(folder.glob(f"{below}/model*.safetensors"))]:
        return f"{inner[0]} has weights: name that folder"
    return how_to_fetch(directory)


def refuse_pointer(path: Path) -> None:
    """Raises: CheckpointError for a file of which only the pointer of Git LFS is there."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            fetch = f"`git -C {path.parent} lfs pull`"
            raise CheckpointError(f"{path}: a Git LFS pointer instead of the file; fetch it with {fetch}")


def has_only_gguf(folder: Path) -> bool:
    """Whether a folder has GGUF files and no safetensors."""
    return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))


def _merge_adapter(folder: Path) -> str:
    try:
        base = bounded_json.read_object(folder / ADAPTER, OchatError, "").get("base_model_name_or_path")
    except OchatError:
        base = None
    base = bounded_json.shown(base) if base else "its base"
    command = _python("AutoPeftModelForCausalLM", "peft", folder, ".merge_and_unload().save_pretrained('NEW_DIR')")
    return (
        f"It holds an adapter of {base}, no whole model: train on {base} itself, or merge the two with {command} "
        f"and copy the base's tokenizer into NEW_DIR"
    )


def _python(loader: str, package: str, folder: Path, rest: str) -> str:
    load = f"M.from_pretrained({str(folder)!r}, dtype='auto')"
    return f'`python -c "from {package} import {loader} as M; {load}{rest}"`'
