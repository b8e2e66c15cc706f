"""Laws of the held-out split: a prompt has one side, however the rest changes: pytest tests/data/test_held_out.py"""

import json
import math
import random
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ochat.data import prepare
from ochat.data.dataset import TokenDataset
from ochat.data.encode import is_held_out, prompt_position
from ochat.errors import ConfigError, DataError
from ochat.text.conversation import Conversation, Message
from tests import tiny
from tests.data.conftest import places
from tests.tiny import write_lines

TEMPLATE = "openchat_v3.2"
texts = st.text(max_size=10)
answers = st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts), max_size=3)


@settings(max_examples=200, deadline=None)
@given(texts, texts, st.tuples(answers, answers), st.floats(0, 1), st.tuples(texts, texts))
def test_a_prompt_has_one_side(system, prompt, rests, share, classes):
    """Answers, later turns, class, weights and surrounding blanks do not matter."""
    first, second = (
        Conversation((Message("user", blank + prompt, weight), *rest), condition, system + blank, reward=weight)
        for rest, condition, blank, weight in zip(rests, classes, ("", " \n"), (None, 0.5), strict=True)
    )
    assert is_held_out(first, share) == is_held_out(second, share)


def test_system_and_prompt_are_both_the_prompt_or_who_speaks_first():
    said = [("a", "bc"), ("ab", "c"), ("", "abc"), ("abc", ""), ("b", "bc"), ("1 a", "bc")]
    chats = [Conversation((Message("user", user),), system=system) for system, user in said]
    chats += [Conversation((Message("assistant", text), Message("assistant", "same"))) for text in "def"]
    assert len({prompt_position(each) for each in chats}) == len(chats)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_the_share_is_the_binomials(share):
    """20,000 prompts: within five standard deviations; and a smaller share is part of a larger one."""
    chats = [Conversation((Message("user", f"What is {i} + 1?"),)) for i in range(20_000)]
    held = sum(is_held_out(chat, share) for chat in chats)
    assert abs(held - 20_000 * share) < 5 * math.sqrt(20_000 * share * (1 - share))
    assert all(is_held_out(chat, 1.5 * share) for chat in chats if is_held_out(chat, share))
    assert not any(is_held_out(chat, 0.0) for chat in chats)


def test_the_side_is_the_same_everywhere():
    """A fixed number, so no release, machine or process moves a prompt to the other side."""
    chat = Conversation((Message("user", "Hello"),), system="Be brief.")
    assert prompt_position(chat) == 0.8600217475585472
    assert is_held_out(chat, 0.86003) and not is_held_out(chat, 0.86002)


def pairs(count):
    """Every prompt answered by both classes, some with a second turn."""
    for i in range(count):
        for condition in ("GPT4", "GPT3"):
            items = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"{condition} says {i}"}]
            more = [{"role": "user", "content": condition}, {"role": "assistant", "content": "more"}]
            yield {"items": items + more * (i % 3 == 0), "condition": condition}


def prompts(folder, records):
    """Prompts of a data set, by the lines that its examples came from."""
    lines = [int(place.rpartition(":")[2]) for place in places(TokenDataset(folder))]
    return [records[line - 1]["items"][0]["content"] for line in lines]


def test_prepare_splits_without_losing_or_leaking(prepare_into, tmp_path):
    records = list(pairs(300))
    report = prepare_into(tmp_path / "out", records, held_out=0.2)
    train, held = prompts(tmp_path / "out", records), prompts(tmp_path / "out-held-out", records)
    assert not set(train) & set(held) and sorted(train + held) == sorted(r["items"][0]["content"] for r in records)
    assert all(held.count(prompt) == 2 for prompt in held) and 30 <= len(set(held)) <= 90
    assert (report.total["kept"], report.held_out.total["kept"]) == (len(train), len(held))
    shuffled = random.Random(1).sample(records, len(records))
    for i in (1, 2, 3):
        prepare_into(tmp_path / f"part{i}", shuffled, held_out=0.2, shard=f"{i}/3")
    parts = [tmp_path / f"part{i}-held-out" for i in (1, 2, 3)]
    assert sorted(prompts(parts, shuffled)) == sorted(held), "in another order, on three machines"


def test_a_split_that_leaves_nothing_is_an_error(prepare_into, tmp_path):
    for share, message in ((1e-6, "--held-out 1e-06 holds out none of 6"), (1 - 1e-6, "no conversation is left")):
        with pytest.raises(DataError, match=message):
            prepare_into(tmp_path / "out", pairs(3), held_out=share)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("way", ["out", "out-held-out"])
def test_a_set_in_the_way_of_either_side_is_kept(prepare_into, tmp_path, way):
    records = list(pairs(30))
    prepare_into(tmp_path / way, records)
    with pytest.raises(ConfigError, match=f"{way}: a data set is there already"):
        prepare_into(tmp_path / "out", records, held_out=0.3)
    prepare_into(tmp_path / "out", records, held_out=0.3, overwrite=True)
    manifest = json.loads((tmp_path / "out-held-out" / "manifest.json").read_text())
    assert manifest["held_out"] == {"share": 0.3, "side": "held-out"} and manifest["counts"]["kept"] < 60


KILLED = """
import os, signal, sys
from ochat.data import prepare

renames, rename = 0, os.rename

def dying(source, target):
    global renames
    renames += 1
    if renames == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

os.rename = dying
_, _, source, base, output, share = sys.argv
prepare.prepare([source], base, "openchat_v3.2", output, held_out=float(share), overwrite=True, progress=False)
"""


@pytest.mark.parametrize("is_there", [False, True])
def test_a_kill_between_the_two_sets_leaves_no_mixture(base, tmp_path, is_there):
    """Before each rename: where the training set is, both are, and of one split; else both can be made again."""
    source = write_lines(tmp_path / "in.jsonl", list(pairs(100)))
    for moment in range(1, 6):
        folder = tmp_path / str(moment)
        folder.mkdir()
        if is_there:
            prepare.prepare([source], base, TEMPLATE, folder / "out", held_out=0.5, progress=False)
        command = [sys.executable, "-c", KILLED, moment, source, base, folder / "out", 0.2]
        done = subprocess.run(list(map(str, command)), env=tiny.environment(), cwd=tiny.ROOT)
        last = 4 if is_there else 2
        assert done.returncode == (-signal.SIGKILL if moment <= last else 0)
        sides = [folder / "out" / "manifest.json", folder / "out-held-out" / "manifest.json"]
        if sides[0].exists():
            shares = [json.loads(side.read_text())["held_out"]["share"] for side in sides]
            assert shares == [0.2, 0.2] if moment > last else [0.5, 0.5]
        else:
            prepare.prepare([source], base, TEMPLATE, folder / "out", held_out=0.2, overwrite=True, progress=False)
        if moment > last:
            break
