"""Which names a class may have: `ochat prepare` refuses others, and so does the opening of a data set of before.

    check_class_name("GPT4", "condition")

Names stand in tables, in keys such as held_out.loss.GPT4 and in a model's prompt. No path is made of them, so that
"org/model" is one. Empty means that a record has no class.
"""

from __future__ import annotations

import unicodedata

from ochat.errors import DataError

RESERVED = "all"  # means all classes together, as in --best-by all
UNSEEN = ("Cc", "Cf", "Zl", "Zp")  # line breaks, controls, and what turns or hides the letters around it
JOINERS = "\u200c\u200d"  # of the UNSEEN those that spell words and emoji


def check_class_name(name: str, place: str) -> None:
    """Raises: DataError for a name that stands for something else, or that cannot be seen as it is."""
    if name == RESERVED:
        raise DataError(f"{place}: {RESERVED!r} means all classes together; give the class another name")
    if name.isprintable():  # which Python knows at once
        return
    for at, char in enumerate(name):
        if unicodedata.category(char) in UNSEEN and char not in JOINERS:
            what = unicodedata.name(char, "a control character").lower()
            raise DataError(
                f"{place}: {ascii(name)} holds U+{ord(char):04X} ({what}) at character {at}, which is not seen or"
                " breaks the line; give the class another name"
            )
