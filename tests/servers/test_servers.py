"""Real servers see what was trained: `make test-servers`, which makes their environments under .cache/servers.

Each case is a small export with a real tokenizer (exports.py) in one server, compared by `ochat verify-export`, which
puts a row into the table of docs/serving.md.
"""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

import pytest

from ochat.commands.verify_export import VerifyExportOptions, verify
from ochat.evaluate import compare_served
from ochat.evaluate.compare_served import Exported
from ochat.export import gguf_file
from tests.servers import exports

pytestmark = [pytest.mark.slow, pytest.mark.servers, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".cache" / "servers"
RESULTS = ROOT / "benchmarks" / "results" / "servers.md"
ENGINES = {  # and the interpreter that has it
    "transformers": Path(sys.executable),
    "llama.cpp": ENVIRONMENTS / "llama-cpp/bin/python",
    "vllm": ENVIRONMENTS / "vllm/bin/python",
}
CASES = [  # family, template, tokenizer
    ("llama", "openchat_3.6", "smollm2"),
    ("mistral", "openchat_v3.2", "mistral"),
    ("qwen2", "openchat_3.6", "qwen"),
    ("qwen2", "chatml", "qwen"),
    ("qwen3", "qwen3", "qwen"),
    ("smollm3", "chatml", "smollm2"),
    ("phi3", "chatml", "smollm2"),
    ("gemma2", "chatml", "smollm2"),
    ("gemma3_text", "chatml", "smollm2"),
    ("granite", "chatml", "smollm2"),
    ("olmo2", "chatml", "smollm2"),
]
# llama.cpp's converter wants the tokenizer.model that these families are published with
NEEDS_SENTENCEPIECE = ("gemma2", "gemma3_text", "phi3")
COUNT = 4  # questions, under each class
TITLES = (
    "date", "server", "family", "template", "tokenizer", "ids equal", "greedy answers equal",
    "largest difference of log-probabilities", "classes switch",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Exports by case, made when first asked for."""
    folder, found = tmp_path_factory.mktemp("servers"), {}

    def make(case):
        if case not in found:
            found[case] = exports.make(folder / "-".join(case), *case)
        return found[case]

    return make


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_sees_what_was_trained(case, engine, made, tmp_path, monkeypatch):
    python = ENGINES[engine]
    if not python.is_file():
        pytest.skip(f"no {python}; `make test-servers` makes it")
    if engine == "llama.cpp" and case[0] in NEEDS_SENTENCEPIECE and case[2] != "mistral":
        pytest.skip(f"the converter wants a SentencePiece model for {case[0]}")
    folder, gguf = made(case), None
    if engine == "llama.cpp":
        monkeypatch.setenv("PATH", str(python.parent), prepend=":")
        gguf = tmp_path / "model.gguf"
        gguf_file.write(folder, gguf, "float32")
    options = VerifyExportOptions(folder, engine=engine, python=str(python), gguf=gguf, count=COUNT)
    what, compared = verify(options, Exported.open(folder, "cpu"))
    count = sum(row.count for row in compared.rows)
    merged = sum(row.merged for row in compared.rows)
    ids = f"{sum(row.ids_equal or 0 for row in compared.rows) - merged}/{count}"
    greedy = f"{sum(row.greedy_equal for row in compared.rows)}/{count}"
    largest = max(row.logprob_difference or 0.0 for row in compared.rows)
    ids += f", {merged} merged" if merged else ""
    switch = "yes" if compared.classes_differ else "no"
    _record([f"{datetime.date.today()}", what, *case, ids, greedy, f"{largest:.0e}", switch])
    assert compared.difference == ""
    assert compared.classes_differ
    assert merged == 0 or engine == "llama.cpp" or case[:2] == ("qwen2", "openchat_3.6")
    assert len(compared.rows) == 3 and count == 3 * min(COUNT, len(compare_served.own_chats()))


def _record(cells):
    """Puts a row into the table, in place of the one that the same engine and case had."""
    rows = [line.strip("| ").split(" | ") for line in RESULTS.read_text().splitlines()[2:]] if RESULTS.exists() else []
    key = [re.split("[ ,]", cells[1])[0], *cells[2:5]]
    rows = [row for row in rows if [re.split("[ ,]", row[1])[0], *row[2:5]] != key]
    table = [TITLES, ["---"] * len(TITLES), *sorted([*rows, cells], key=lambda row: row[1:])]
    RESULTS.write_text("".join(f"| {' | '.join(row)} |\n" for row in table))
