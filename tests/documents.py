"""The blocks of code that the documents show."""

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^([^\n]*)\n```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """What stands between two fences, its language, and the line before it."""

    before: str
    language: str
    text: str


def blocks(document: str) -> list[Block]:
    """Those of a document, which is named by its path from the root."""
    return [Block(*found) for found in FENCED.findall((ROOT / document).read_text())]


def block(document: str, words: str) -> str:
    """The text of the only block that contains `words`.

    A test that asks for it runs it: `run_by_tests` looks for such calls, with two literals.
    """
    (text,) = {one.text for one in blocks(document) if words in one.text}
    return text


@cache
def run_by_tests() -> set[tuple[str, str]]:
    """The blocks that tests ask for: (document, text)."""
    sources = (file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    nodes = chain.from_iterable(ast.walk(ast.parse(text)) for text in sources if "block(" in text)
    calls = (
        [ast.literal_eval(word) for word in node.args]
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "block"
    )
    return {(document, block(document, words)) for document, words in calls}
