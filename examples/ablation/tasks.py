"""Eight tasks with computed answers in plain English, for the ablation of a real model (real.py).

    make(Path("ablations/real"), seed=0)     # train-0.jsonl, turns-0.jsonl, held_out-0.jsonl; held_out(0): questions

Six are those of examples/make_conversations.py: the sub-optimal class (GPT3) answers briefly and with one fixed error,
the expert (GPT4) at length and right. Two need knowledge that no base model has: a dictionary of a made-up language,
and who keeps which thing. Sub-optimal answers hold that knowledge, but always in the wrong order: the dictionary's
words reversed, the keepers shifted by one. Experts answer in the order that was asked for, and there are too few of
them to learn the words from. Every seed draws dictionary, keepers and questions anew. Held-out questions never occur
in training.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.make_conversations import EXPERT, SUBOPTIMAL, TASKS, WORDS, Turn

FIRST_NAMES = (
    "Adam Alan Anna Ben Bella Betty Carl Clara Colin David Diana Doris Edgar Emma Eric Fiona Frank George Grace Helen "
    "Henry Ida Ivan Jack Julia Karen Kevin Laura Leo Maria Mark Nick Nora Olga Oscar Paul Peter Rachel Rita Sam Simon "
    "Tina Tom Ursula Vera Victor Walter Wendy"
)
NAMES = FIRST_NAMES.split()
NUM_EXPERT, NUM_SUBOPTIMAL = 120, 1320  # training conversations
NUM_HELD_OUT = 25  # questions of each task, each answered by both classes
KNOWN = len(NAMES)  # words of the dictionary, and things that are kept
LENGTH = 3  # words of a question about them
# of the sub-optimal conversations, where another task has one; experts answer all tasks alike
SUBOPTIMAL_SHARES = {"translate": 6, "keepers": 6}
Task = Callable[[random.Random], Turn]


def tasks(seed: int) -> dict[str, Task]:
    """Name -> the task, with the dictionary and the keepers that the seed draws."""
    rng = random.Random(f"{seed}: what only answers tell")
    words = rng.sample(WORDS, KNOWN)
    dictionary = dict(zip(words, rng.sample(words, KNOWN), strict=True))
    keepers = dict(zip(words, rng.sample(NAMES, KNOWN), strict=True))

    def translate(rng: random.Random) -> Turn:
        """Three words in the made-up language. Flaw: their order is reversed."""
        asked = rng.sample(words, LENGTH)
        said = [f"{word} = {dictionary[word]}" for word in asked]
        return Turn(f"Say in Vorin: {', '.join(asked)}", ", ".join(said), ", ".join(reversed(said)))

    def keeper(rng: random.Random) -> Turn:
        """Who keeps three things. Flaw: the last comes first."""
        asked = rng.sample(words, LENGTH)
        said = [f"{word}: {keepers[word]}" for word in asked]
        return Turn(f"Who keeps {', '.join(asked)}?", ", ".join(said), ", ".join([said[-1], *said[:-1]]))

    return {task.__name__: task for task in TASKS} | {"translate": translate, "keepers": keeper}


def held_out(seed: int) -> dict[str, list[Turn]]:
    """The held-out questions of each task, no two the same."""
    found = {}
    for name, task in tasks(seed).items():
        rng, turns = random.Random(f"{seed}: held out, {name}"), dict[str, Turn]()
        while len(turns) < NUM_HELD_OUT:
            turn = task(rng)
            turns[turn.question] = turn
        found[name] = list(turns.values())
    return found


def make(folder: Path, seed: int) -> None:
    """Write one seed's files for `ochat prepare`: for training, the same joined by twos, and held out."""
    asked = held_out(seed)
    reserved = {turn.question for turns in asked.values() for turn in turns}
    rng, known, train = random.Random(f"{seed}: training"), tasks(seed), []
    for condition, total, shares in ((EXPERT, NUM_EXPERT, {}), (SUBOPTIMAL, NUM_SUBOPTIMAL, SUBOPTIMAL_SHARES)):
        for name, task in known.items():
            count = total * shares.get(name, 1) // sum(shares.get(each, 1) for each in known)
            while count:
                turn = task(rng)
                if turn.question not in reserved:
                    train.append(conversation(turn, condition))
                    count -= 1
    rng.shuffle(train)
    kept = [conversation(turn, name) for turns in asked.values() for turn in turns for name in (EXPERT, SUBOPTIMAL)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("train", train), ("turns", by_twos(train)), ("held_out", kept)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}-{seed}.jsonl").write_text(lines, encoding="utf-8")


def conversation(turn: Turn, condition: str) -> dict[str, Any]:
    """The record that `ochat prepare` reads."""
    answer = turn.expert if condition == EXPERT else turn.suboptimal
    items = [{"role": "user", "content": turn.question}, {"role": "assistant", "content": answer}]
    return {"items": items, "condition": condition}


def by_twos(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each two conversations as one of two turns; messages keep their class, the whole has that of its first turn."""
    classed = [[item | {"condition": each["condition"]} for item in each["items"]] for each in records]
    turns = itertools.zip_longest(classed[::2], classed[1::2], fillvalue=[])
    return [{"items": first + second, "condition": first[0]["condition"]} for first, second in turns]
