"""A base of single bytes, and data sets prepared with it, for the tests of this folder."""

import pytest

from ochat.data import prepare
from tests.tiny_text import write_base, write_lines

TEMPLATE = "openchat_v3.2"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def prepare_into(base):
    """prepare_into(folder, records, source="in.jsonl", **options) -> the report; `source` is next to the folder."""

    def prepared(folder, records, source="in.jsonl", **options):
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = write_lines(folder.parent / source, records)
        return prepare.prepare([path], base, TEMPLATE, folder, **{"progress": False, "workers": 0} | options)

    return prepared
