"""The documentation says what the code says: pytest tests/test_docs.py"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import msgspec

from ochat import config

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_of_config_keys_is_made_from_the_code():
    spec = importlib.util.spec_from_file_location("config_page", ROOT / "docs" / "config_page.py")
    assert spec is not None and spec.loader is not None
    config_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config_page)
    assert config_page.PAGE.read_text(encoding="utf-8") == config_page.page(), (
        "run: PYTHONPATH=. python docs/config_page.py"
    )


def test_every_config_key_that_the_documentation_names_exists():
    known = {section.name: section.type for section in msgspec.structs.fields(config.Config)}
    key = re.compile(rf"(?<![\w./])(?:--)?({'|'.join(known)})\.([a-z_]+)\b(?![./(])")
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "configs" / "README.md"]
    pages = [page for page in pages if page.name != "changelog.md"]
    named = {(page.name, *found) for page in pages for found in key.findall(page.read_text(encoding="utf-8"))}
    named = {(page, section, key) for page, section, key in named if key not in ("py", "md", "json", "jsonl", "toml")}
    assert len(named) > 30
    sections = {name: kind for name, kind in known.items() if isinstance(kind, type)}
    unknown = [each for each in named if each[1] in sections and each[2] not in sections[each[1]].__struct_fields__]
    assert not unknown
