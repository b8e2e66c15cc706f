"""Writes docs/pictures/show.svg, what `ochat show` prints: `PYTHONPATH=.:kernels python docs/show_picture.py BASE`.

BASE: a folder whose tokenizer has <|im_start|> and <|im_end|>, such as the demo's.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from ochat.commands import show
from ochat.data import shown
from ochat.data.prepare import prepare

PICTURE = Path(__file__).parent / "pictures" / "show.svg"
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "What is 17 * 3?"},
            {"role": "assistant", "content": [
                {"type": "text", "text": "17 * 3 = 41.", "weight": 0},
                {"type": "text", "text": "No: 17 * 3 = 30 + 21 = 51."},
            ]},
        ],
        "condition": "GPT4",
    },
    {
        "messages": [
            {"role": "user", "content": "Is it raining in Delft?"},
            {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Delft"}}]},
            {"role": "tool", "content": "{\"rain\": true}"},
            {"role": "assistant", "content": "Yes, take a coat."},
        ],
        "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
        "condition": "GPT3",
        "weight": 0.1,
    },
]  # fmt: skip


def main(base: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, data = Path(folder) / "chats.jsonl", Path(folder) / "data"
        source.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        prepare([source], base, "chatml", data, progress=False)
        console = Console(
            record=True, width=100, highlight=False, file=io.StringIO(), color_system="truecolor", force_terminal=True
        )
        tokens = show.read_tokenizer(data)
        for each in shown.conversations(data, range(len(RECORDS))):
            show.show(each._replace(place=each.place.replace(f"{folder}/", "")), tokens, console)
        console.print(show.LEGEND, style="dim")
    console.save_svg(str(PICTURE), title="ochat show data")


if __name__ == "__main__":
    main(sys.argv[1])
