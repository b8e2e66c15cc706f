"""Read tools, and calls of tools, in the shapes that they come in.

read_calls({"function": {"name": "rain", "arguments": '{"city": "Delft"}'}}, "tool_calls", notes)
# [{"name": "rain", "arguments": {"city": "Delft"}}]
"""

from __future__ import annotations

from typing import Any

from ochat.errors import DataError
from ochat.text.fields import as_rows, check_json, check_list, check_object, from_json, shorten
from ochat.text.records.keys import CALL
from ochat.text.records.levels import has_content
from ochat.text.records.objects import Notes, read_fields


def read_tools(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """The tools of a list, as they are described; JSON text is read. Raises: DataError."""
    tools = []
    for i, tool in enumerate(check_list(value, place)):
        tool = from_json(tool, f"{place}[{i}]") if isinstance(tool, str) else tool
        tools.append(check_json(check_object(tool, f"{place}[{i}]"), f"{place}[{i}]"))
    return tuple(tools)


def read_calls(value: Any, place: str, notes: Notes) -> list[dict[str, Any]]:
    """One call, or a list of them, or the JSON text of either, as {"name", "arguments"}, and "id" where there is one.

    Raises: DataError.
    """
    if isinstance(value, str):
        value = from_json(value, place) if value.strip() else []
    value = as_rows(value, place)
    calls = []
    for i, call in enumerate(value if isinstance(value, list) else [value] if has_content(value) else []):
        at = f"{place}[{i}]" if isinstance(value, list) else place
        check_object(call, at)
        try:
            calls.append(_read_call(call, notes))
        except DataError as error:
            raise DataError(f"{at}.{error}") from None
    return calls


def _read_call(call: dict[str, Any], notes: Notes) -> dict[str, Any]:
    outer = read_fields(call, CALL, notes)
    kind = outer.text("type") or "function"
    if kind != "function":
        raise DataError(f"{outer.name('type')}: calls of type {shorten(kind)!r} are not read, only function")
    inner = outer
    if "function" in outer:
        name = outer.name("function")
        inner = read_fields(check_object(outer.values["function"], name), CALL, notes)
        if "name" in outer or "arguments" in outer or "function" in inner:
            raise DataError(f"{name}: name and arguments stand both in it and beside it; keep one of the two")
    arguments = inner.values.get("arguments", {})
    place = inner.name("arguments")
    if isinstance(arguments, str):
        arguments = from_json(arguments, place) if arguments.strip() else {}
    found = {
        "name": inner.text("name", required=True),
        "arguments": check_json(check_object(arguments, place), place),
    }
    identity = outer.text("id") or inner.text("id")
    return found | ({"id": identity} if identity else {})
