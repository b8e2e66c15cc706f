"""Answers to the fixed prompts, by prompt, step and class, of samples.jsonl.

for asked in of_run(run): asked.prompt, asked.conditions, asked.rows
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ochat.report.run_record import RunRecord

MOST_PROMPTS, MOST_STEPS, MOST_CHARACTERS = 20, 8, 2000


@dataclass(frozen=True)
class Asked:
    """One prompt: a row of answers for each step that is shown, a column for each class."""

    prompt: str
    conditions: list[str]
    rows: list[tuple[int, list[str]]]
    num_steps: int  # at which it was answered


def of_run(run: RunRecord) -> list[Asked]:
    """The first prompts, each at the first step, the last and some between."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for line in run.samples:
        prompt, condition, answer = (str(line.get(key, "")) for key in ("prompt", "condition", "answer"))
        found.setdefault(prompt, {}).setdefault(int(line["step"]), {})[condition] = answer
    return [_asked(prompt, steps) for prompt, steps in list(found.items())[:MOST_PROMPTS]]


def _asked(prompt: str, steps: dict[int, dict[str, str]]) -> Asked:
    conditions = list(dict.fromkeys(condition for answers in steps.values() for condition in answers))
    places = np.unique(np.linspace(0, len(steps) - 1, MOST_STEPS).round().astype(int))
    shown = [sorted(steps)[place] for place in places]
    rows = [(step, [_cut(steps[step].get(condition, "")) for condition in conditions]) for step in shown]
    return Asked(_cut(prompt), [condition or "(no class)" for condition in conditions], rows, len(steps))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
