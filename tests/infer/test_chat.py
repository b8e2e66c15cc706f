"""A chat answers as generate does to the same turns, keeps what was said, and asks all classes: pytest
tests/infer/test_chat.py"""

from __future__ import annotations

import pytest

from ochat.commands.chat import ChatOptions, open_chat
from ochat.errors import ConfigError
from ochat.infer.generate import complete
from ochat.text.conversation import Conversation, Message


@pytest.fixture
def chat(exported):
    return open_chat(ChatOptions(exported, max_new_tokens=6, dtype="float32"))


def answer_alone(chat, turns, condition):
    """What generate gives to these turns of user and assistant."""
    items = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns))
    ids = chat.template.encode_prompt(Conversation(items, condition), chat.tokenizer)
    [(text, is_cut)] = complete(chat.model, [ids], chat.tokenizer, chat.stop_ids, chat.max_new_tokens)
    return text, is_cut


def ask(chat, question):
    return "".join(chat.ask(question))


def test_each_turn_is_answered_after_the_earlier_ones_by_the_class_that_was_chosen(chat):
    turns = []
    for condition, question in (("GPT4", "1+1"), ("GPT3", "20+3"), ("GPT3", "5+5")):
        chat.switch(condition)
        turns.append(question)
        turns.append(ask(chat, question))
        wanted, is_cut = answer_alone(chat, turns[:-1], condition)
        assert turns[-1] == wanted and chat.ending == ("length" if is_cut else "complete")
    assert [message.content for message in chat.items] == turns
    before = chat.items
    assert chat.answers() == {name: answer_alone(chat, turns[:-1], name) for name in chat.classes}
    assert len(chat.classes) == 2 and chat.items == before and chat.condition == "GPT3"
    chat.forget()
    assert ask(chat, "5+5") == answer_alone(chat, ["5+5"], "GPT3")[0]


def test_what_was_said_is_kept_when_an_answer_is_stopped(chat):
    parts = chat.ask("1+1")
    said = next(parts)
    parts.close()
    assert [m.content for m in chat.items] == ["1+1", said] and chat.ending == "stopped"
    parts = chat.ask("2+2")
    parts.close()  # before a word
    assert len(chat.items) == 2


def test_a_full_context_is_said_and_a_question_that_does_not_fit_refused(chat):
    used = len(chat.template.encode_prompt(Conversation((Message("user", ""),)), chat.tokenizer))
    said = ask(chat, "9" * (chat.context - used - 1))  # a token of room; of the tiny model a letter, not the end
    assert said and chat.ending == "context"
    with pytest.raises(ConfigError, match="the chat has 5.. tokens with this question.* 512; .*a new chat"):
        chat.ask("9")
    assert len(chat.items) == 2
    chat.forget()
    with pytest.raises(ConfigError, match="no question yet"):
        chat.answers()
    with pytest.raises(ConfigError, match="/class: the model has no class 'gpt3'; did you mean 'GPT3'"):
        chat.switch("gpt3", "/class: ")


def test_draws_differ_between_the_turns_and_come_again_with_the_seed(exported):
    chat = open_chat(ChatOptions(exported, max_new_tokens=8, temperature=2.0, dtype="bfloat16"))
    for question in ("1+1", "2+2"):
        assert ask(chat, question) == chat.answers()["GPT4"][0]

    def said(seed):
        chat = open_chat(ChatOptions(exported, max_new_tokens=8, temperature=2.0, seed=seed, dtype="float32"))
        found = []
        for _ in range(3):
            found.append(ask(chat, "1+1"))
            chat.forget()
        return found

    assert said(1) == said(1) != said(2) and len(set(said(1))) > 1
