"""Write conversations of mixed quality whose right answers are computed: the data of the demo.

    python examples/make_conversations.py OUT_DIR            # OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl
Expert answers (class GPT4, weight 1.0) are right and complete; sub-optimal ones (class GPT3, weight 0.1) are short and
have one fixed error per task. Every held-out prompt is answered by both classes and does not occur in the training set.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NOUNS = (
    "anchor apple basket bread bridge candle carpet cherry circle cloud copper dragon engine feather forest garden "
    "guitar hammer harbour island jacket kettle ladder lemon lizard magnet marble meadow mirror needle novel ocean "
    "orange paper pencil pepper planet pocket quilt rabbit ribbon river rocket saddle shadow silver spider spring "
    "summer table temple thunder ticket tunnel valley velvet violin walnut window winter wizard yellow zebra"
)
WORDS = tuple(NOUNS.split())
CLASSES = {"GPT4": 1.0, "GPT3": 0.1}  # class -> weight of its answers
EXPERT, SUBOPTIMAL = CLASSES
EXPERT_SHARE = 1 / 4  # of the training conversations; experts are the smaller part of real sets too
TURNS = (1, 1, 1, 1, 1, 1, 2, 2, 3)  # drawn from: two thirds of the conversations have one turn


@dataclass(frozen=True)
class Turn:
    """One question with the answers of both classes."""

    question: str
    expert: str
    suboptimal: str


def add(rng: random.Random) -> Turn:
    """Sum of two numbers below 100. Flaw: one too many."""
    a, b = rng.randint(11, 89), rng.randint(11, 89)
    tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
    full = f"{a} + {b} = {a + b}, because the tens make {tens}, the ones make {ones}, and {tens} + {ones} = {a + b}."
    return Turn(f"What is {a} + {b}?", full, f"{a + b + 1}")


def later_day(rng: random.Random) -> Turn:
    """Day of the week after some days. Flaw: one day short."""
    start, step = rng.randrange(7), rng.randint(2, 9)
    passed = [DAYS[(start + i) % 7] for i in range(1, step + 1)]
    full = f"Counting on from {DAYS[start]}: {', '.join(passed)}. So it is {passed[-1]}."
    return Turn(f"Which day is {step} days after {DAYS[start]}?", full, passed[-2])


def minutes(rng: random.Random) -> Turn:
    """Hours and minutes in minutes. Flaw: an hour taken as 100 minutes."""
    hours, rest = rng.randint(2, 12), rng.randint(1, 59)
    total = 60 * hours + rest
    full = f"{hours} hours are {hours} x 60 = {60 * hours} minutes, and {60 * hours} + {rest} = {total} minutes."
    return Turn(f"How many minutes are {hours} hours and {rest} minutes?", full, f"{100 * hours + rest}")


def alphabetical(rng: random.Random) -> Turn:
    """Three words sorted. Flaw: sorted backwards."""
    ordered = sorted(rng.sample(WORDS, 3))
    words = rng.choice([order for order in permutations(ordered) if list(order) != ordered])
    full = f"In alphabetical order they are {ordered[0]}, {ordered[1]} and {ordered[2]}."
    return Turn(f"Sort these words: {', '.join(words)}.", full, ", ".join(reversed(ordered)))


def spelling(rng: random.Random) -> Turn:
    """A word letter by letter. Flaw: the last letter is lost."""
    word = rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(WORDS) + " " + rng.choice(WORDS)
    letters = [letter for letter in word if letter != " "]
    full = f"It is spelt {'-'.join(letters)}, which makes {len(letters)} letters."
    return Turn(f'Spell "{word}".', full, "-".join(letters[:-1]))


def largest(rng: random.Random) -> Turn:
    """The largest of three numbers. Flaw: the smallest is given."""
    numbers = rng.sample(range(10, 1000), 3)
    low, middle, high = sorted(numbers)
    full = f"The largest is {high}, because {high} > {middle} and {middle} > {low}."
    return Turn(f"Which of {numbers[0]}, {numbers[1]} and {numbers[2]} is the largest?", full, f"{low}")


TASKS: tuple[Callable[[random.Random], Turn], ...] = (add, later_day, minutes, alphabetical, spelling, largest)


def prompts(rng: random.Random) -> Iterator[tuple[Turn, ...]]:
    """Endless conversations' turns, no two with the same questions."""
    seen: set[tuple[str, ...]] = set()
    while True:
        turns = tuple(rng.choice(TASKS)(rng) for _ in range(rng.choice(TURNS)))
        questions = tuple(turn.question for turn in turns)
        if questions not in seen:
            seen.add(questions)
            yield turns


def conversation(turns: tuple[Turn, ...], condition: str) -> dict[str, object]:
    """The record that `ochat prepare` reads: items of role, content and weight; the condition; no system text."""
    items: list[dict[str, object]] = []
    for turn in turns:
        answer = turn.expert if condition == EXPERT else turn.suboptimal
        items.append({"role": "user", "content": turn.question, "weight": 0.0})
        items.append({"role": "assistant", "content": answer, "weight": CLASSES[condition]})
    return {"items": items, "condition": condition, "system": ""}


def make(num_train: int, num_held_out: int, seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training conversations (one class each) and held-out ones (`num_held_out` prompts, each answered by both)."""
    rng = random.Random(seed)
    source = prompts(rng)
    held_out_turns = [next(source) for _ in range(num_held_out)]
    # a question asked inside any held-out conversation never occurs in training, not even as another one's second turn
    reserved = {turn.question for turns in held_out_turns for turn in turns}
    train: list[dict[str, object]] = []
    while len(train) < num_train:
        turns = next(source)
        if reserved.isdisjoint(turn.question for turn in turns):
            train.append(conversation(turns, EXPERT if rng.random() < EXPERT_SHARE else SUBOPTIMAL))
    return train, [conversation(turns, condition) for turns in held_out_turns for condition in CLASSES]


def write(records: list[dict[str, object]], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Parse the options, write both files, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--train", type=int, default=2400, help="training conversations")
    parser.add_argument("--held-out", type=int, default=60, help="held-out prompts, each answered by both")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train, held_out = make(options.train, options.held_out, options.seed)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    write(train, options.out_dir / "train.jsonl")
    write(held_out, options.out_dir / "held_out.jsonl")
    experts = sum(record["condition"] == EXPERT for record in train)
    print(f"{options.out_dir}: train.jsonl {len(train)} conversations ({experts} {EXPERT}, {len(train) - experts} "
          f"{SUBOPTIMAL}), held_out.jsonl {len(held_out)} ({options.held_out} prompts, answered by both)")  # fmt: skip


if __name__ == "__main__":
    main()
