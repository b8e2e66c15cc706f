"""The documentation says what the code says, recipes are configurations and launch scripts bash:
pytest tests/test_docs.py"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import textwrap
from pathlib import Path

import msgspec
import pytest

from ochat import config
from ochat.commands import schema
from ochat.text.record_formats import RecordReader
from ochat.text.records import map as record_map
from ochat.text.records.objects import Notes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("demo/*.toml")])


@pytest.mark.parametrize("script", ["config_page", "record_keys_page"])
def test_the_pages_of_keys_are_made_from_the_code(script):
    made = runpy.run_path(str(ROOT / "docs" / f"{script}.py"))
    assert made["PAGE"].read_text("utf-8") == made["page"](), f"run: PYTHONPATH=. python docs/{script}.py"


def test_the_tables_and_the_picture_of_the_evidence_are_made_from_its_records():
    pytest.importorskip("scipy", reason="the extra `report` is not installed")
    made = runpy.run_path(str(ROOT / "docs" / "evidence_tables.py"))
    page, rows = made["PAGE"].read_text("utf-8"), made["read"](made["SMALL"])["table"]["rows"]
    assert page.count("<!-- end of ") > 1 and made["page"](page) == page, "run: python docs/evidence_tables.py"
    assert made["PICTURE"].read_text("utf-8") == made["picture"](rows), "run: python docs/evidence_tables.py"


def blocks(kind: str, text: str) -> list[str]:
    """The code blocks of a kind."""
    return [textwrap.dedent(found) for found in re.findall(rf"^ *```{kind}\n(.*?)^ *```", text, re.M | re.S)]


def test_every_record_and_map_of_the_page_of_formats_is_read(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    records, maps = blocks("json", page), blocks("toml", page[page.index("## Bring") : page.index("## Weights")])
    assert len(records) >= 10 and len(maps) >= 5
    for text in records:
        notes = Notes()
        assert RecordReader().read(json.loads(text), notes) and not notes.ignored
    for i, text in enumerate(maps):
        file = tmp_path / f"{i}.toml"
        file.write_text(text, encoding="utf-8")
        assert record_map.load(file) != record_map.RecordMap()


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


def test_every_file_that_the_documentation_names_exists():
    """By folder and name, such as `data/batch.py`; tests without their ending, such as `checkpoint/test_best`."""
    text = "".join(page.read_text("utf-8") for page in (*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"))
    modules = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text))
    tests = {f"tests/{name}.py" for name in re.findall(r"`([a-z_/]+/test_[a-z_]+)`", text)}
    assert len(modules) > 10 and len(tests) > 5
    assert not [name for name in modules | tests if not any((ROOT / top / name).is_file() for top in ("", "ochat"))]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_can_be_read_and_is_described(file):
    assert config.load(file).base.path
    if file.parent.name == "configs":
        assert file.stem in (ROOT / "configs" / "README.md").read_text("utf-8")


def test_the_schema_is_made_from_the_code_and_explains_each_key():
    text = (ROOT / "docs" / "ochat.schema.json").read_text("utf-8")
    assert text == schema.text(), "run: PYTHONPATH=. python docs/config_page.py"
    named = json.loads(text)["$defs"] | {"Config": json.loads(text)}
    kinds = schema.sections(config.Config)
    assert {kind.__name__ for kind in kinds} == set(named) and len(named) > 15
    for kind in kinds:
        described = named[kind.__name__]
        assert described["additionalProperties"] is False and described["description"]
        assert set(described["properties"]) == {field.encode_name for field in msgspec.structs.fields(kind)}
        for key, explanation in config.explanations(kind).items():
            assert described["properties"][key]["description"] == explanation


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.toml")), ids=lambda file: file.stem)
def test_a_recipe_names_the_schema(file):
    first = file.read_text("utf-8").splitlines()[0].removeprefix("#:schema ")
    assert (file.parent / first).resolve() == ROOT / "docs" / "ochat.schema.json"


@pytest.mark.parametrize("script", sorted(ROOT.glob("configs/launch/*.sh")), ids=lambda file: file.name)
def test_a_launch_script_has_no_syntax_error(script):
    assert not subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr
