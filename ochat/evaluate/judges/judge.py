"""`ochat judge A B OUTPUT --endpoint URL --judge NAME`: how often A's answers are preferred to B's by a model.

ochat judge mine/model_outputs.json theirs/model_outputs.json verdicts.jsonl --endpoint https://host/v1 --judge gpt-4o
ochat judge model_answer/mine.jsonl model_answer/other.jsonl verdicts.jsonl --questions question.jsonl --endpoint ...

Each pair is shown in both orders. A win in both is 1, a loss in both 0, everything else that could be read 0.5.
Verdicts lie in OUTPUT as they come: a second start asks only for those that are missing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ochat.console import bar
from ochat.errors import ConfigError
from ochat.evaluate import proportion
from ochat.evaluate.judges import answer_files, verdict
from ochat.evaluate.judges.answer import check_limit, warn
from ochat.evaluate.judges.answer_log import AnswerLog
from ochat.evaluate.judges.asked_model import check_max_new_tokens
from ochat.evaluate.judges.chat_server import ChatServer, RefusedError, ServerOptions
from ochat.evaluate.judges.parallel import in_parallel
from ochat.evaluate.judges.verdict import Pair
from ochat.files import atomic

MAX_REFUSED = 3  # requests in a row, at the beginning: then it is not them that are at fault


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(ServerOptions):
    """Lets a model behind an OpenAI-compatible server compare two models' answers."""

    a: Path  # answers of one model: model_outputs.json (AlpacaEval) or model_answer/NAME.jsonl (FastChat)
    b: Path  # answers of the other to the same questions
    output: Path  # the JSON Lines file that keeps every verdict and the judge's words
    judge: str = ""  # the judge's name at its server
    questions: Path | None = None  # FastChat's question.jsonl, whose answers do not hold the questions
    max_new_tokens: int = 1024  # the longest verdict, reasons included
    limit: int | None = None  # compare the first so many questions; left out: all
    summary: Path | None = None  # write the numbers to this JSON file too


class Showing(NamedTuple):
    """A pair in one of its orders."""

    pair: Pair
    swapped: bool

    @property
    def key(self) -> str:
        return f"{self.pair.key}/{'BA' if self.swapped else 'AB'}"


def main(options: JudgeOptions) -> None:
    """The command `ochat judge`."""
    record, console = judge(options), Console(highlight=False)
    console.print(table(record))
    if record["unread"]:
        where = f"the judge's words, and refusals, are in {options.output}"
        console.print(escape(f"not readable: no last line `Verdict: 1`, `2` or `tie`; {where}"), soft_wrap=True)


def judge(options: JudgeOptions) -> dict[str, Any]:
    """The numbers, as `summarise` makes them, after all verdicts are in OUTPUT.

    Raises: ConfigError and DataError for what can be known before anything is asked; ServerError.
    """
    check_limit(options.limit)
    check_max_new_tokens(options.max_new_tokens)
    atomic.check_places(options.output, options.summary)
    if not options.judge:
        raise ConfigError("--judge NAME: which model of the server judges?")
    server = ChatServer(options, options.judge, warn)
    pairs, name_a, name_b = answer_files.read_pairs(options.a, options.b, options.questions)
    pairs = pairs[: options.limit]
    about = {"judge": options.judge, "prompt": verdict.PROMPT_ID, "max_new_tokens": options.max_new_tokens}
    about |= {"a": atomic.sha256(options.a), "b": atomic.sha256(options.b)}
    about |= {"questions": atomic.sha256(options.questions)} if options.questions else {}
    with AnswerLog(options.output, about) as log:
        _ask(server, pairs, log, options)
        lines = dict(log.found)
    record = {"a": name_a, "b": name_b, "judge": options.judge} | summarise(pairs, lines)
    if options.summary:
        atomic.write_json(options.summary, record)
    return record


def _ask(server: ChatServer, pairs: Sequence[Pair], log: AnswerLog, options: JudgeOptions) -> None:
    """Fills the log; a request that was refused stands there with the reason, and is asked again by the next start."""
    showings = [Showing(pair, swapped) for pair in pairs for swapped in (False, True)]
    missing = [each for each in showings if "text" not in log.found.get(each.key, {})]
    ask = functools.partial(_verdict, server, options.max_new_tokens)
    refused = 0
    with bar("verdicts", len(missing)) as advance:
        for showing, line in in_parallel(ask, missing, options.concurrent):
            refused += "refused" in line
            if refused == MAX_REFUSED and not any("text" in each for each in log.found.values()):
                raise RefusedError(f"the first {refused} requests were all refused: {line['refused']}")
            log.append(showing.key, line)
            advance(1)


def _verdict(server: ChatServer, most: int, showing: Showing) -> dict[str, Any]:
    """The line of one verdict."""
    chat = verdict.ask(showing.pair, swapped=showing.swapped)
    try:
        text, is_cut = server.ask(chat, max_tokens=most, temperature=0.0)
    except RefusedError as error:
        return {"winner": None, "refused": str(error)}
    return {"winner": verdict.winner(verdict.read(text), swapped=showing.swapped), "text": text, "is_cut": is_cut}


def summarise(pairs: Sequence[Pair], lines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The share of wins (1; ties 0.5) of A over the questions whose two verdicts could be read, its interval, and every
    other question too: `unread`, with what the rate would be if A had lost, or won, all of those."""
    found = Counter[str]()
    places = Counter[str]()
    for pair in pairs:
        one, other = (lines[Showing(pair, swapped).key] for swapped in (False, True))
        for line, first in ((one, "A"), (other, "B")):
            places["read"] += line["winner"] is not None
            places["first"] += line["winner"] == first
            places["second"] += line["winner"] not in (first, "tie", None)
            places["refused"] += "refused" in line
            places["cut"] += line["winner"] is None and bool(line.get("is_cut"))
        outcome = verdict.combined(one["winner"], other["winner"])
        changed = outcome == "tie" and one["winner"] != other["winner"]
        found["unread" if outcome is None else "changed" if changed else outcome] += 1
    total, count = len(pairs), len(pairs) - found["unread"]
    score = found["A"] + 0.5 * (found["tie"] + found["changed"])
    rate = score / count if count else None
    return {
        "questions": total,
        "wins": found["A"],
        "losses": found["B"],
        "ties": found["tie"],
        "ties_by_place": found["changed"],
        "unread": found["unread"],
        "win_rate": rate,
        "interval": None if rate is None else proportion.wilson(rate, count),
        "win_rate_if_unread_lost": score / total,
        "win_rate_if_unread_won": (score + found["unread"]) / total,
        "verdicts": {"all": 2 * total} | {key: places[key] for key in ("read", "first", "second", "cut", "refused")},
        "level": proportion.LEVEL,
        "method": proportion.METHOD,
    }


def table(record: Mapping[str, Any]) -> Table:
    """What came out, and what could not be read."""
    shown = Table(
        title=escape(f"{record['a']} (A) against {record['b']} (B), judged by {record['judge']}"),
        caption=escape(f"[low, high]: {record['level']:.0%}, {record['method']}, over questions; ties count a half"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=False,
    )
    shown.add_column(no_wrap=True)
    shown.add_column(justify="right", no_wrap=True)
    verdicts, unread = record["verdicts"], record["unread"]
    rows = [
        ("questions", record["questions"]),
        ("A wins in both orders", record["wins"]),
        ("B wins in both orders", record["losses"]),
        ("ties in both orders", record["ties"]),
        ("other verdict in the other order (a tie)", record["ties_by_place"]),
        ("not readable in one order or both", unread),
    ]
    for label, number in rows:
        shown.add_row(label, f"{number:,}")
    shown.add_section()
    shown.add_row("A's win rate", _rate(record), style="bold")
    if unread:
        low, high = record["win_rate_if_unread_lost"], record["win_rate_if_unread_won"]
        shown.add_row("  if the unreadable were all lost / all won", f"{100 * low:.1f} / {100 * high:.1f}")
    shown.add_row("verdicts read", f"{verdicts['read']:,} of {verdicts['all']:,}")
    shown.add_row("  for the answer shown first / second", f"{verdicts['first']:,} / {verdicts['second']:,}")
    for key, label in (("cut", "  cut short by --max-new-tokens"), ("refused", "  refused by the server")):
        if verdicts[key]:
            shown.add_row(label, f"{verdicts[key]:,}")
    return shown


def _rate(record: Mapping[str, Any]) -> str:
    if record["win_rate"] is None:
        return "-"
    low, high = record["interval"]
    return escape(f"{100 * record['win_rate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
