"""The table of keys: what each key of a record, a message, a content part or a tool call means, or why it is refused.

    MESSAGE.meaning("loss", False)       # "trained"

docs/record_keys_page.py writes the table into the documentation.
"""

from __future__ import annotations

from collections.abc import Iterable

from ochat.text.records.levels import Key, Level

_WEIGHT = "weight loss_weight loss_scale sample_weight example_weight"
_TRAINED = "train training trainable loss"
_REASONING = "reasoning_content reasoning thinking"
_THOUGHT = Key("", "thought thoughts cot chain_of_thought rationale rationales", "reasoning is named reasoning_content")
_MEDIA = Key(
    "",
    "image images video videos audio audios image_url image_urls image_path image_paths video_path audio_path "
    "input_audio pixel_values objects inlineData inline_data fileData file_data image_file image_files media",
    "images, audio and video cannot be trained on; take the record out",
)
_TRUTH = "text is metadata; true, false, 1 and 0 say which answers are good"
_MASK = "trainers disagree on whether 1 is trained or left out; name it loss_mask, in which 1 is trained"
ANSWERS = Key(
    "",
    "chosen rejected chosen_response rejected_response response_chosen response_rejected chosen_messages "
    "rejected_messages positive_messages negative_messages preferred_output non_preferred_output",
    "give each answer its class with [answers] in a --map, which ochat prepare --describe writes",
)

RECORD = Level(
    "record",
    Key("messages", "items messages conversations conversation", "messages, pairs or texts: a list, or its JSON text"),
    Key("question", "instruction prompt question query", "the user's message: text, or a list of messages"),
    Key("extra", "input context", "text below the question, after an empty line; alone, the question itself"),
    Key("answer", "output response completion answer", "the assistant's message: text, or messages"),
    Key("reasoning", _REASONING, "what the assistant thinks before this answer"),
    Key("tool_calls", "tool_calls function_call", "what this answer calls, as in a message"),
    Key("history", "history chat_history conversation_history", "earlier turns: `[[question, answer]]`, or messages"),
    Key("system", "system system_prompt system_message system_instruction preamble", "text, or parts of it; weight 0"),
    Key("condition", "condition", "the class of the conversation: text, or an object of attributes"),
    Key("reward", "reward", 'a number for the conversation; used with `weights.source = "reward"`'),
    Key("weight", _WEIGHT, "a number: multiplies the weight of every message"),
    Key("trained", _TRAINED, "true, false, 1 or 0: whether the record's answers are trained"),
    Key("weights", "weights loss_weights", "a list: the weight of each message, a system message included"),
    Key("mask", "loss_mask mask", "a list of 1 and 0: whether each message is trained; or `User`, who is not"),
    Key("tools", "tools functions available_tools", "the tools that the assistant may call: a list, or its JSON text"),
    Key("label", "label kto_tag", f"{_TRUTH}: give them classes with `--map`"),
    ANSWERS,
    Key("", "responses completions answers", "several answers in one list; make a record of each"),
    _THOUGHT,
    _MEDIA,
    Key("", "input_ids attention_mask token_ids", "records of token ids cannot be read; give text"),
    Key("", "labels", "labels of tokens, steps or answers are not read; write weights"),
    Key("", "chat_template chat_template_kwargs enable_thinking reasoning_effort", "the template writes the prompt"),
    Key("", "documents passages choices options examples definition", "it is not read; write it into the question"),
    Key("text", "text", "all that is said as one text: metadata where the record says it in another way, else refused"),
    Key("", "segments", "text without roles; write messages"),
    Key("", "advantage advantages token_weights", "it weighs tokens in other trainers; write weight or spans"),
)

MESSAGE = Level(
    "message",
    Key("role", "role from", "who says it"),
    Key("content", "content value text", "what is said: text, or a list of content parts"),
    Key("weight", _WEIGHT, "a number: what its tokens weigh"),
    Key("trained", f"{_TRAINED} loss_mask", "true, false, 1 or 0: whether its tokens are trained"),
    Key("condition", "condition", "its class, in place of the conversation's: text, also empty, or an object"),
    Key("spans", "spans", "`[[start, end, weight], ...]` in characters of the content: weights of parts of it"),
    Key("train_detail", "train_detail training_detail", "the same as objects, whose `end_offset` is included"),
    Key("reasoning", _REASONING, "what the assistant thinks before it answers"),
    Key("tool_calls", "tool_calls", "the tools that the assistant calls: a list, or its JSON text"),
    Key("function_call", "function_call", "one such call"),
    Key("tool_call_id", "tool_call_id", "the call that a tool's message replies to; of other roles metadata"),
    Key("tool", "name", "the tool that replies; of other roles metadata"),
    Key("label", "label", f"{_TRUTH}: write `weight`"),
    _THOUGHT,
    Key("", "mask masked", _MASK),
    Key("", "refusal", "it is not read; write the refusal into content"),
    Key("", "reward advantage", "rewards belong to a record; give the message a weight"),
    Key("", "tools functions", "they belong to a record, beside its messages"),
    Key("", "documents attachments files context", "it is not read; write it into content"),
    Key("", "parent_id parent_message_id parent replies children", "messages of a tree; make a record of each path"),
    Key("", "tool_responses tool_results tool_result", "write each reply as a message of the role tool"),
    Key("", "channel recipient", "it says how the message is to be written; write reasoning_content, tool_calls"),
    _MEDIA,
)

PART = Level(
    "part",
    Key("type", "type", "text, input_text or output_text, thinking or reasoning; others are refused"),
    Key("text", "text value content", "the text"),
    Key("reasoning", "thinking reasoning", "what the assistant thinks"),
    Key("weight", _WEIGHT, "a number: replaces the message's weight"),
    Key("trained", f"{_TRAINED} loss_mask", "true, false, 1 or 0: whether it is trained"),
    Key("", "mask masked", _MASK),
    Key("", "thought", "a part of reasoning has the type thinking"),
    Key("", "functionCall function_call", "calls belong to the message, as tool_calls"),
    Key("", "functionResponse function_response", "write each reply as a message of the role tool"),
    _MEDIA,
)

DETAIL = Level(
    "detail",
    Key("start", "begin_offset", "its first character"),
    Key("last", "end_offset", "its last character"),
    Key("trained", "train", "true, false, 1 or 0: whether it is trained"),
    Key("weight", "weight", "a number: what it weighs"),
)

CALL = Level(
    "call",
    Key("function", "function", "an object with name and arguments"),
    Key("name", "name", "the tool"),
    Key("arguments", "arguments parameters", "an object, or its JSON text"),
    Key("id", "id", "what replies name"),
    Key("type", "type", "function; others are refused"),
)

LEVELS = (RECORD, MESSAGE, PART, DETAIL, CALL)
CLASS_LIKE = ("model", "source", "class", "quality", "label", "score", "rating", "dataset", "category", "generator")


def may_be_classes(names: Iterable[str]) -> list[str]:
    """Those metadata keys that often say where an answer comes from or how good it is."""
    return [name for name in names if name in CLASS_LIKE]
