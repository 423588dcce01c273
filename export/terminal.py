"""Text out of files that others made, on its way to a terminal."""

import unicodedata
from typing import Any

# Control characters, what turns the direction of text, line ends of Unicode, halves of pairs.
HIDDEN = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def visible(text: str) -> str:
    """`text` as one line in which nothing acts on the terminal: ESC becomes \\x1b."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN else char
        for char in text
    )


def all_visible(found: Any) -> Any:
    """The same for every string, names too, in what JSON or YAML holds."""
    if isinstance(found, dict):
        return {all_visible(name): all_visible(entry) for name, entry in found.items()}
    if isinstance(found, list):
        return [all_visible(entry) for entry in found]
    return visible(found) if isinstance(found, str) else found
