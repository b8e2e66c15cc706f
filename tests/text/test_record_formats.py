"""Formats: a conversation written in every format reads back the same; what cannot be expressed is refused by field.

pytest tests/text/test_record_formats.py
"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat.errors import ConfigError, DataError
from ochat.text.conversation import Conversation, Message
from ochat.text.record_formats import RecordReader, convert, is_empty_answer
from ochat.text.records.keys import RECORD
from ochat.text.records.objects import Notes

turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(), st.none() | st.floats(-2, 2)), min_size=1)


def written_as(key: str, role_key: str, text_key: str, conversation: Conversation) -> dict:
    """The conversation as a record whose messages are under `key`."""
    names = {"user": "human", "assistant": "gpt"} if role_key == "from" else {}
    said = [("system", conversation.system, None)] if conversation.system else []
    said += [(m.role, m.content, m.weight) for m in conversation.items]
    record = {key: [{role_key: names.get(r, r), text_key: t, "weight": w} for r, t, w in said], "id": "7"}
    return record | {"condition": conversation.condition, "reward": conversation.reward}


KEYS = (
    st.sampled_from(RECORD.names("messages")),
    st.sampled_from(["role", "from"]),
    st.sampled_from(["content", "value"]),
)


@given(turns, st.text(), st.text(), st.none() | st.floats(-1, 1), st.tuples(*KEYS))
def test_messages_are_read_by_what_is_inside(said, condition, system, reward, keys):
    conversation = Conversation(tuple(Message(*turn) for turn in said), condition, system, reward)
    key, role_key, text_key = keys
    record = written_as(key, role_key, text_key, conversation)
    assert convert(record) == conversation
    assert convert(record | {keys[0]: json.dumps(record[keys[0]])}) == conversation, "JSON text of the messages"
    if not condition and reward is None:
        assert convert(record[keys[0]]) == conversation, "a list for a record"


Q, A = Message("user", "q"), Message("assistant", "a")
EARLIER = [["q0", "a0"], ["q1", "a1"]]
BEFORE = tuple(m for i in "01" for m in (Message("user", f"q{i}"), Message("assistant", f"a{i}")))
LIST = [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}, {"role": "user", "content": "q"}]
ANSWERS = [{"role": "assistant", "content": "a"}]
CALLS = ({"name": "f", "arguments": {}},)
PAIR = {"input": "q0", "output": "a0"}
CONTEXT = (Message("user", "q0"), Message("assistant", "a0", 0.0), Q)


@pytest.mark.parametrize(
    ("record", "items", "system"),
    [
        ({"instruction": "q", "output": "a"}, (Q, A), ""),
        ({"instruction": "q", "input": None, "output": "a"}, (Q, A), ""),
        ({"instruction": "q", "input": "", "output": "a", "history": []}, (Q, A), ""),
        ({"instruction": "q", "input": "1, 2", "output": "a"}, (Message("user", "q\n\n1, 2"), A), ""),
        ({"instruction": "q", "context": "1, 2", "response": "a"}, (Message("user", "q\n\n1, 2"), A), ""),
        ({"instruction": "q", "output": "a", "history": EARLIER}, (*BEFORE, Q, A), ""),
        ({"instruction": "q", "output": "a", "history": json.dumps(EARLIER)}, (*BEFORE, Q, A), ""),
        ({"instruction": "q", "output": "a", "history": LIST[:2]}, (*BEFORE[:2], Q, A), ""),
        ({"instruction": "q", "output": "a", "history": [PAIR]}, (*BEFORE[:2], Q, A), ""),
        ({"system_prompt": "S", "question": "q", "response": "a"}, (Q, A), "S"),
        ({"system": "S", "query": "q", "answer": "a"}, (Q, A), "S"),
        ({"prompt": "q", "completion": "a"}, (Q, A), ""),
        ({"question": "q", "reasoning": "hm", "answer": "a"}, (Q, Message("assistant", "a", reasoning="hm")), ""),
        ({"input": "q", "output": "a"}, (Q, A), ""),
        ({"prompt": LIST, "completion": ANSWERS}, (*CONTEXT, A), ""),  # TRL: of the prompt nothing is trained
        ({"prompt": [LIST[0], LIST[1] | {"weight": 2}, LIST[2]], "completion": "a"},
         (CONTEXT[0], Message("assistant", "a0", 2), Q, A), ""),
        ({"prompt": LIST[2], "completion": ANSWERS[0]}, (Q, A), ""),
        ({"input": LIST, "output": "a"}, (*CONTEXT, A), ""),  # OpenRLHF, Nemotron, and HelpSteer3 with context
        ({"instruction": "", "input": "q", "output": "a"}, (Q, A), ""),
        ({"prompt": "", "question": "q", "output": "a", "response": " ", "context": [], "input": ""}, (Q, A), ""),
        ({"input": {"messages": [LIST[2], *ANSWERS], "tools": []}}, (Q, A), ""),
        ({"conversation": [PAIR, {"input": "q", "output": "a"}]}, (*BEFORE[:2], Q, A), ""),
        ({"conversation": [PAIR | {"system": "S", "weight": 0.5}, {"query": "q", "answer": "a"}]},
         (BEFORE[0], Message("assistant", "a0", 0.5), Q, A), "S"),
        ({"conversations": ["q0", "a0", "q", "a"]}, (*BEFORE[:2], Q, A), ""),
        ({"messages": [LIST[2], *ANSWERS], "text": "<s>Q: q\nA: a</s>"}, (Q, A), ""),
        ({"prompt": "q", "input": "1", "output": "a", "text": "# q\n# 1\n# a"}, (Message("user", "q\n\n1"), A), ""),
        ({"prompt": "q", "tool_calls": '[{"name": "f"}]'}, (Q, Message("assistant", "", tool_calls=CALLS)), ""),
        ({"prompt": "q", "response": "a", "reasoning": "hm", "function_call": {"name": "f"}},
         (Q, Message("assistant", "a", reasoning="hm", tool_calls=CALLS)), ""),
        ({"system": [{"type": "text", "text": "S", "cache_control": {}}, "T"], "prompt": "q", "answer": "a"}, (Q, A),
         "S\nT"),
        ({"prompt": [{"role": "system", "content": "S"}, LIST[2]], "completion": ANSWERS}, (Q, A), "S"),
        ({"messages": [{"role": "developer", "content": "S"}, LIST[2], *ANSWERS], "system": "S"}, (Q, A), "S"),
        ({"messages": [LIST[2], *ANSWERS], "prompt": "q ", "prompt_id": "x"}, (Q, A), ""),  # UltraChat says it twice
        ({"messages": [LIST[0], LIST[2], *ANSWERS, *ANSWERS]}, (BEFORE[0], Q, A, A), ""),
    ],
)  # fmt: skip
def test_formats(record, items, system):
    assert convert(record) == Conversation(items, "", system)


def test_a_key_that_says_what_the_messages_say_is_counted():
    notes = Notes()
    RecordReader().read(CHAT | {"prompt": " q\n", "completion": ANSWERS, "prompt_id": "x"}, notes)
    assert notes.ignored == {"prompt": 1, "completion": 1, "prompt_id": 1}


def weights_of(record):
    return [message.weight for message in convert(record).items]


CHAT = {"messages": [LIST[2], *ANSWERS]}
THREE = {"messages": [{"role": "system", "content": "S"}, LIST[2], *ANSWERS]}


@pytest.mark.parametrize(
    ("record", "weights"),
    [
        (CHAT | {"weight": 0.1}, [None, 0.1]),
        (CHAT | {"train": False}, [None, 0]),
        (CHAT | {"weight": 0.5, "trainable": 1}, [None, 0.5]),
        (CHAT | {"weights": [0, 1]}, [0, 1]),
        (CHAT | {"weights": [2, 1]}, [2, 1]),
        (CHAT | {"loss_weights": [None, 3]}, [None, 3]),
        (CHAT | {"weights": "[0, 1]"}, [0, 1]),
        (CHAT | {"loss_mask": [0, 1]}, [0, 1]),
        (CHAT | {"mask": [True, False]}, [1, 0]),
        (CHAT | {"mask": "User"}, [0, None]),  # NeMo names who is not trained
        (CHAT | {"weights": [0, 3], "loss_mask": [1, 1], "weight": 2}, [0, 6]),
        ({"messages": [LIST[2], ANSWERS[0] | {"weight": 2}], "weights": [0, 3], "weight": 0.5}, [0, 3]),
        (THREE | {"weights": [0, 0, 1]}, [0, 1]),
        ({"messages": [PAIR], "weights": [0, 2]}, [0, 2]),
        ({"messages": [PAIR | {"system": "S"}], "weights": [0, 0, 2]}, [0, 2]),
        ({"prompt": LIST, "completion": "a", "weights": [0, 3, 0, 1]}, [0, 3, 0, 1]),
        ({"prompt": LIST, "completion": "a", "weight": 2}, [None, 0, None, 2]),
        ({"instruction": "q", "output": "a", "weight": 0.5}, [None, 0.5]),
        ({"instruction": "q", "output": "a", "history": EARLIER[:1], "weights": [0, 1, 0, 1]}, [0, 1, 0, 1]),
    ],
)  # fmt: skip
def test_weights_multiply(record, weights):
    assert weights_of(record) == weights


def test_parts_have_their_own_weight_times_the_records():
    parts = [{"type": "text", "text": "no", "weight": 0}, {"type": "text", "text": "yes", "weight": 4}, "so"]
    answer = {"role": "assistant", "content": parts, "weight": 3}
    (message,) = convert({"messages": [answer], "weight": 0.5}).items
    assert message.weight == 1.5 and [tuple(span) for span in message.spans] == [(0, 3, 0), (3, 7, 2)]


def test_the_record_wins_over_the_file_and_the_file_over_the_default():
    reader = RecordReader(default_condition="default")
    assert reader.read(CHAT | {"condition": "own"}, Notes())[0].condition == "own"
    assert reader.read(CHAT | {"condition": None}, Notes(), "file")[0].condition == "file"
    assert reader.read(CHAT | {"condition": ""}, Notes())[0].condition == "default"
    with pytest.raises(DataError, match="condition: 'own', but the input says that the file is 'file'"):
        reader.read(CHAT | {"condition": "own"}, Notes(), "file")


SYSTEM = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": [LIST[2], SYSTEM]}, r"messages\[1\]: a system"),
        ({"messages": [SYSTEM | {"weight": 1}, *ANSWERS]}, r"messages\[0\]: the system text is never trained on"),
        (THREE | {"loss_mask": [1, 0, 1]}, r"messages\[0\]: the system text is never trained on"),
        (THREE | {"weights": [0, 1]}, "weights: 2 values for 3 messages"),
        (CHAT | {"weights": 3}, "weights: expected a list"),
        (CHAT | {"weights": [0, "x"]}, r"weights\[1\]: expected a number"),
        (CHAT | {"loss_mask": [0, 0.5]}, r"loss_mask\[1\]: expected true, false, 1 or 0"),
        (CHAT | {"mask": "Assistant"}, r"mask: text \('Assistant'\) is not read, only User"),
        (CHAT | {"mask": "[0, 1"}, "mask: expected JSON"),
        (CHAT | {"weight": "1"}, "weight: expected a number"),
        ({"messages": [ANSWERS[0] | {"weight": 1e300}], "loss_scale": 1e300}, "loss_scale: expected a finite number"),
        (CHAT | {"loss": 2.3}, "loss: expected true, false, 1 or 0"),
        ({"messages": [SYSTEM]}, r"messages\[0\]: only a system message"),
        ({"messages": [SYSTEM, *ANSWERS], "system": "y"}, r"system: messages\[0\] has another.*--ignore system"),
        ({"messages": []}, "messages: empty"),
        ({"messages": "[]"}, "messages: empty"),
        ({"messages": "hi"}, "messages: expected JSON"),
        ({"messages": {"role": "user"}}, "messages: expected a list"),
        ({"instruction": "x"}, "record: no messages .*there is 'instruction'; .*--map"),
        ({"output": "x"}, "record: no messages .*there is 'output'"),
        ({"answer": "x", "history": EARLIER}, "record: no messages"),
        ({"instruction": 3, "output": "y"}, "instruction: expected text or messages, got 3"),
        ({"instruction": "x", "input": ["y"], "output": "y"}, "input: only text .*into instruction; or"),
        ({"instruction": LIST, "input": "y", "output": "y"}, "input: only text"),
        ({"input": {"messages": LIST, "tools": []}, "tools": []}, "input.tools: the record has this key as well"),
        ({"conversation": [PAIR, {"input": "q"}]}, r"conversation\[1\].record: no messages"),
        ({"conversation": [PAIR, "q"]}, r"conversation\[1\]: expected an object"),
        ({"conversation": [PAIR | {"reward": 1}]}, r"conversation\[0\].reward: .*--ignore reward"),
        ({"conversation": [PAIR | {"output": 3}]}, r"conversation\[0\].output: expected text"),
        ({"conversation": [{"response": "a"}]}, r"conversation\[0\].role: missing"),
        ({"conversation": ["q", 3]}, r"conversation\[0\]: expected an object"),
        (CHAT | {"system": [{"thinking": "hm", "type": "thinking"}]}, "system: the system text has"),
        (CHAT | {"system": [{"type": "image"}]}, r"system\[0\].type: parts of type 'image'"),
        (CHAT | {"tool_calls": [{"name": "f"}]}, "tool_calls: it is not read beside messages"),
        ({"prompt": "q", "answer": "a", "reasoning": "on"}, "reasoning: .*how much to reason, not what; or .*--ignore"),
        (CHAT | {"text": "q"}, "text: it says something else than the rest of the record; or .*--ignore text"),
        ({"role": "user", "text": "q", "parent_id": None}, "record: it is one message"),
        ({"messages": [LIST[2], ANSWERS[0] | {"parent_id": 1}]}, r"messages\[1\].parent_id: messages of a tree"),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " a"}, "prompt: a transcript.*write messages"),
        ({"question": "Human:q0\nAssistant:a0\nHuman:q\nAssistant:", "input": "", "output": "a"}, "question: a trans"),
        ({"prompt": "<|user|>\nq\n<|assistant|>\n", "completion": "a"}, "prompt: a transcript"),
        ({"messages": [LIST[2]], "answer": "a"}, "answer: the record has messages .* --map with question = .messages."),
        ({"instruction": "x", "output": "y", "history": ["a", "b"]}, r"history\[0\]: \[question, answer\]"),
        ({"instruction": "x", "output": "y", "history": [["a", 3]]}, r"history\[0\]\[1\]: expected text or messages"),
        ({"instruction": "x", "output": "y", "reward": "z"}, "reward: expected a number"),
        ({"instruction": "x", "question": "y", "output": "z"}, "question: instruction says the same.*--ignore"),
        ({"text": "x"}, "text: text without roles; write messages, or .*--map"),
        ({"messages": LIST[:1], "items": LIST}, "items: messages says the same thing, with another value"),
        (CHAT | {"prompt": "other"}, "prompt: .* keep it with --ignore messages; or leave it out with --ignore prompt"),
        (CHAT | {"reasoning": "hm"}, "reasoning: it is not read beside messages; write it into messages"),
        ({"prompt": "q", "answer": [], "thinking": "hm"}, "thinking: it is not read beside messages.*--ignore"),
        ({"prompt": "q", "answer": "a", "thinking": ["hm"]}, "thinking: expected text"),
        (CHAT | {"history": EARLIER}, "history: the record has messages as well"),
        (CHAT | {"completion": [ANSWERS[0] | {"content": "b"}]}, "completion: the record has messages as well"),
        (CHAT | {"completion": [ANSWERS[0] | {"reasoning": "hm"}]}, "completion: the record has messages as well"),
        (CHAT | {"label": False}, r"label: false says.*--map.*--ignore label"),
        (CHAT | {"kto_tag": 1}, r'kto_tag: .*{from = "kto_tag", values = {"1" = "GPT4", "0" = "GPT3"}}; .*--ignore'),
        (CHAT | {"tools": [3]}, r"tools\[0\]: expected an object"),
        (CHAT | {"tools": "get"}, "tools: expected JSON"),
        (CHAT | {"chosen": "x"}, r"chosen: give each answer its class with \[answers\] in a --map.*--ignore chosen"),
        (CHAT | {"responses": ["x"]}, "responses: several answers in one list; make a record of each; or .*--ignore"),
        ([1], "record: expected an object, got a list"),
        (["q", "a"], "record: expected an object, got a list"),
        ([LIST[2], 1], r"messages\[1\]: expected an object"),
    ],
)  # fmt: skip
def test_faults_name_their_field(record, said):
    with pytest.raises(DataError, match=f"^{said}"):
        convert(record)


@pytest.mark.parametrize("tools", [[{"name": "f", "x": None}], '[{"name": "f"}]', ['{"name": "f"}'], [{"name": "f"}]])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools(key, tools):
    assert convert(CHAT | {key: tools}).tools == ({"name": "f"},)
    assert convert(CHAT | {key: ""}).tools == ()


def test_a_format_reads_its_key_and_counts_the_others():
    record = CHAT | {"conversations": [{"from": "gpt", "value": "b"}], "instruction": "c", "output": "d"}
    expected = {"messages": "a", "sharegpt": "b", "alpaca": "d"}
    for format, said in expected.items():
        notes = Notes()
        (found,) = RecordReader(format).read(record, notes)
        assert found.items[-1].content == said
        assert len(notes.ignored) == (2 if format == "alpaca" else 3)
    with pytest.raises(DataError, match="conversations: messages says the same thing|instruction: the record has"):
        convert(record)
    with pytest.raises(DataError, match="items: missing or null; --format openchat"):
        convert(record, "openchat")
    with pytest.raises(ConfigError, match="known: auto, openchat, messages, sharegpt, alpaca"):
        convert({"items": []}, format="chatml")


@pytest.mark.parametrize("answer", ["", " \n", [], "\u200b\ufeff \x00"])
def test_an_empty_answer_is_refused_unless_it_is_not_trained_or_kept(answer):
    turn = {"role": "assistant", "content": answer}
    for record in ({"messages": [LIST[2], turn, *ANSWERS]}, {"items": [turn]}):
        with pytest.raises(DataError, match=r"\[\d\]: an empty answer, .*--empty-answers keep"):
            RecordReader().read(record, Notes())
        (kept,) = RecordReader(empty_answers="keep").read(record, Notes())
        assert any(map(is_empty_answer, kept.items))
    for more in ({"weight": 0}, {"reasoning": "hm"}, {"tool_calls": [{"name": "f"}]}):
        (read,) = RecordReader().read({"messages": [LIST[2], turn | more]}, Notes())
        assert not any(map(is_empty_answer, read.items))
    assert RecordReader().read({"messages": [{"role": "user", "content": ""}, *ANSWERS]}, Notes())


@pytest.mark.parametrize(
    ("record", "items"),
    [
        ({"prompt": "q", "system": "S"}, (Q,)),
        ({"prompt": LIST, "weights": [1]}, (Message("user", "q0"), Message("assistant", "a0"), Q)),
        (CHAT | {"system": "S", "reward": 3, "weight": 2}, (Q,)),
        ({"question": "q", "answer": ""}, (Q,)),
        ({"messages": [{"role": "user", "content": "q", "weight": 1}]}, (Q,)),
    ],
)
def test_a_prompt_is_what_stands_before_the_answer(record, items):
    assert RecordReader().read_prompt(record, Notes()) == Conversation(items, "", record.get("system", ""))


@pytest.mark.parametrize("record", [{"messages": ANSWERS}, {"answer": "a"}, {"messages": [SYSTEM]}, {}])
def test_no_prompt(record):
    with pytest.raises(DataError):
        RecordReader().read_prompt(record, Notes())
