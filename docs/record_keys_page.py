"""Writes the tables of keys in docs/data.md from ochat/text: `PYTHONPATH=. python docs/record_keys_page.py`.

tests/test_docs.py fails while the page is not what this makes of the code.
"""

from __future__ import annotations

from pathlib import Path

from ochat.text.records.keys import LEVELS
from ochat.text.records.levels import Level
from ochat.text.records.messages import CALLS, ROLES

PAGE = Path(__file__).with_name("data.md")
BEGIN, END = "<!-- begin: docs/record_keys_page.py -->\n", "<!-- end: docs/record_keys_page.py -->\n"
TITLES = {
    "record": "Keys of a record",
    "message": "Keys of a message",
    "part": "Keys of a content part",
    "detail": "Keys of an object in `train_detail`",
    "call": "Keys of a tool call",
}


def page() -> str:
    """The page with its tables as the code has them."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return "".join([before, BEGIN, "\n", "\n".join([roles(), *map(table, LEVELS)]), "\n", END, after])


def table(level: Level) -> str:
    """A heading, and a row for each meaning: its keys, what they are, or why they are refused."""
    lines = [f"### {TITLES[level.name]}", "", "| keys | what they are |", "|---|---|"]
    for key in level.keys:
        text = key.text if key.meaning else f"refused: {key.text}"
        names = ", ".join(f"`{name}`" for name in key.names)
        lines.append(f"| {names} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


def roles() -> str:
    """A row for each role: its names."""
    lines = ["### Roles", "", "| role | names, in any case |", "|---|---|"]
    for role in dict.fromkeys(ROLES.values()):
        lines.append(f"| {role} | {', '.join(f'`{name}`' for name, named in ROLES.items() if named == role)} |")
    lines.append(f"| assistant, whose content is the JSON of calls | {', '.join(f'`{name}`' for name in CALLS)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
