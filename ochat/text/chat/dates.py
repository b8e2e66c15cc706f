"""Dates that chat templates write as today's: always the same one, so that training and serving see the same text."""

from __future__ import annotations

import json
import re
from datetime import datetime

from ochat.errors import ConfigError

_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def parse_date(date: str) -> datetime:
    """Raises: ConfigError unless it is a date such as 2026-01-31; "" is the first of January 2025."""
    try:
        return datetime.strptime(date or "2025-01-01", "%Y-%m-%d")
    except ValueError:
        raise ConfigError(f"--date {date!r}: a date such as 2026-01-31 is needed") from None


def fixed(source: str, date: str) -> str:
    """A Jinja macro that says this date wherever the template asks for today's; "" where it does not.

    Raises: ConfigError where a format is not written out in the template.
    """
    forms = [match[2] for match in _FORMAT.finditer(source)]
    if len(forms) < source.count("strftime_now("):
        raise ConfigError("the chat template's date has no format that could be fixed; choose another --template")
    if not forms:
        return ""
    texts = {form: parse_date(date).strftime(form) for form in forms}
    return f"{{%- macro strftime_now(form) %}}{{{{- {json.dumps(texts)}[form] }}}}{{%- endmacro %}}"
