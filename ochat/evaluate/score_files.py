"""Write scores: a safetensors file by token, and Parquet tables by message and by conversation.

write_scores(Path("scores"), table, scores)     # scores/tokens.safetensors, messages.parquet, conversations.parquet

The folder appears whole or not at all. The tables have a row for each condition and message, or conversation, with at
least one supervised token: record_id, file, line, message, class, condition, num_tokens, nll and entropy (sums, nats),
mean_rank.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ochat.data.scores import token_file
from ochat.data.scores.record_ids import split_id
from ochat.errors import ConfigError
from ochat.evaluate.score import Scores, SupervisedTokens
from ochat.files import atomic

NAMES = TOKENS, BY_MESSAGE, BY_CONVERSATION = "tokens.safetensors", "messages.parquet", "conversations.parquet"


def check_output(output: Path) -> None:
    """Raises: ConfigError where something is there already, and without the package that writes Parquet."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("writing Parquet needs pyarrow: pip install 'ochat-crlft[data]'")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output}: exists; name a new folder, or remove it")


def write_scores(output: Path, table: SupervisedTokens, scores: Scores) -> list[Path]:
    """The files, once they are written. Raises: ConfigError for a folder that cannot be made; OSError."""
    is_conversation = np.diff(table.conversations, prepend=-1) != 0  # the first token of one
    is_message = is_conversation | (np.diff(table.messages, prepend=-1) != 0)
    with atomic.staging_dir(output) as folder:
        token_file.write(folder / TOKENS, _tensors(table, scores))
        _write_table(folder / BY_MESSAGE, table, scores, is_message, with_message=True)
        _write_table(folder / BY_CONVERSATION, table, scores, is_conversation, with_message=False)
        for name in NAMES:
            atomic.fsync(folder / name)
        atomic.replace_dir(folder, output)
    return [output / name for name in NAMES]


def _tensors(table: SupervisedTokens, scores: Scores) -> dict[str, NDArray[Any]]:
    return {
        "record_ids": token_file.lines(table.record_ids),
        "offsets": table.offsets,
        "lengths": table.lengths,
        "checksums": table.checksums,
        "conditions": token_file.lines(scores.conditions),
        "token_ids": table.token_ids,
        "nll": scores.nll,
        "entropy": scores.entropy,
        "rank": scores.rank,
    }


def _write_table(
    path: Path, table: SupervisedTokens, scores: Scores, is_first: NDArray[np.bool_], *, with_message: bool
) -> None:
    """`is_first` (N,): whether a row begins with the token."""
    import pyarrow
    import pyarrow.parquet

    first, groups = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    conversations = table.conversations[first]
    ids = [table.record_ids[i] for i in conversations]
    files, lines, _ = zip(*map(split_id, ids), strict=True)
    columns = {"record_id": ids, "file": files, "line": lines}
    columns |= {"message": table.messages[first]} if with_message else {}
    of_messages = [table.class_names[i] for i in table.class_ids[first]]
    columns |= {"class": of_messages if with_message else [table.classes[i] for i in conversations]}
    parts = []
    for number, name in enumerate(scores.conditions):
        sums = scores.sums(groups, len(first), number)
        sums = {key: pyarrow.array(values, from_pandas=True) for key, values in sums.items()}
        parts.append(pyarrow.table(columns | {"condition": [name] * len(first)} | sums))
    pyarrow.parquet.write_table(pyarrow.concat_tables(parts), path)
