"""A base of single bytes, and data sets prepared with it, for the tests of this folder."""

import pytest

from ochat.data import prepare
from tests.tiny import write_lines, write_tokenizer

TEMPLATE = "openchat_v3.2"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def prepare_into(base):
    """prepare_into(folder, records, source="in.jsonl", **options) -> the report; `source` is next to the folder."""

    def prepared(folder, records, source="in.jsonl", **options):
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = write_lines(folder.parent / source, records)
        defaults = {"progress": False, "workers": 0, "empty_answers": "keep"}
        return prepare.prepare([path], base, TEMPLATE, folder, **defaults | options)

    return prepared


def examples(data):
    """What a data set holds, to compare."""
    return [(tuple(e.input_ids.tolist()), tuple(e.loss_weights.tolist()), e.condition) for e in data]


def places(data):
    """The lines that the examples came from."""
    return [data.source_location(i) for i in range(len(data))]


def chat(answer="yes", condition="GPT4", **extra):
    """A record of one exchange."""
    items = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    return {"items": items, "condition": condition} | extra
