"""Which conversations are held out: told by a hash of their prompt, so that all answers to one prompt share a side.

    is_held_out(conversation, 0.05)

The prompt is the system text and the first user message (the first message where no user speaks), without surrounding
blanks. The hash knows nothing else, so the side is the same on every machine, in every order of the input and under
every class; what a small share holds out, a larger one holds out too.
"""

from __future__ import annotations

import hashlib

from ochat.text.conversation import Conversation


def is_held_out(conversation: Conversation, share: float) -> bool:
    """True for about `share` (0 to 1) of all prompts."""
    return share > 0 and position(conversation) < share


def position(conversation: Conversation) -> float:
    """A number from 0 to 1 that the prompt alone decides, uniform over prompts."""
    users = (message for message in conversation.items if message.role == "user")
    first = next(users, conversation.items[0]).content.strip()
    system = conversation.system.strip()
    prompt = f"{len(system)} {system}{first}".encode()  # the length: so that no text can move between the two
    return int.from_bytes(hashlib.blake2b(prompt, digest_size=8).digest()) / 2**64
