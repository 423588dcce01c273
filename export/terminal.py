"""Makes text from files of unknown origin safe for a terminal."""

import unicodedata
from typing import Any

# Control characters, changes of text direction, line ends of Unicode, halves of surrogate pairs.
HIDDEN = {"Cc", "Cf", "Zl", "Zp", "Cs"}


def visible(text: str) -> str:
    """`text` as one line in which nothing acts on the terminal: ESC becomes \\x1b."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in HIDDEN else char
        for char in text
    )


def all_visible(content: Any) -> Any:
    """`visible` for every string, keys too, in the content of JSON or YAML."""
    if isinstance(content, dict):
        return {all_visible(name): all_visible(entry) for name, entry in content.items()}
    if isinstance(content, list):
        return [all_visible(entry) for entry in content]
    return visible(content) if isinstance(content, str) else content
