"""Tokens: who holds them, and that a changed file counts at once."""

from pathlib import Path

import pytest

from rampart.handlers.http import tokens
from rampart.handlers.http.tokens import Rate, Tokens, read_tokens

ONE, TWO = "a" * 16, "b" * 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tokens, "AGE", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"# of our teams\nvision {ONE}\n\nweb-2  {TWO}\n")
    return path


@pytest.mark.parametrize(
    ("header", "holder"),
    [
        (f"Bearer {ONE}", "vision"),
        (f"bearer  {TWO} ", "web-2"),
        (f"Basic {ONE}", None),
        (f"Bearer {ONE}a", None),
        (f"Bearer {ONE[:-1]}", None),
        (f"Bearer é{ONE}", None),
        ("Bearer ", None),
        (ONE, None),
        ("", None),
    ],
)
def test_a_header_has_a_holder(file: Path, header: str, holder: str | None) -> None:
    assert Tokens(file).holder(header.encode()) == holder


def test_a_changed_file_counts_and_its_bad_lines_let_nobody_in(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Tokens(file)
    new = b"Bearer " + b"c" * 16
    file.write_text(f"new {'c' * 16}\n")
    assert known.holder(f"Bearer {ONE}".encode()) is None
    assert known.holder(new) == "new" and not caplog.messages
    file.write_text(f"a {ONE}\nc short\n")
    assert known.holder(f"Bearer {ONE}".encode()) == "a" and known.holder(new) is None
    (said,) = caplog.messages
    assert f"{file}, line 2: write NAME TOKEN" in said and "short" not in said
    for text, words in (("nonsense\n", "line 1"), ("", "contains no token")):
        file.write_text(text)
        assert known.holder(f"Bearer {ONE}".encode()) is None
        assert words in caplog.messages[-1]


def test_a_file_that_cannot_be_read_changes_nothing_and_is_told_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Tokens(file)
    file.unlink()
    for _ in range(3):
        assert known.holder(f"Bearer {ONE}".encode())
    (said,) = caplog.messages
    assert said.startswith(f"{file} cannot be read, so tokens of before count: ")
    file.write_text(f"b {TWO}\n")
    assert known.holder(f"Bearer {ONE}".encode()) is None


def test_a_line_may_have_a_rate_and_a_burst_and_both_may_change(file: Path) -> None:
    file.write_text(f"a {ONE} 2.5\nb {TWO} 0.5 9\nc {'c' * 16}\n")
    known = Tokens(file)
    assert [known.rate(name) for name in "abc"] == [Rate(2.5, 3), Rate(0.5, 9), None]
    file.write_text(f"a {ONE} 40\n")
    assert known.holder(f"Bearer {ONE}".encode()) == "a"
    assert known.rate("a") == Rate(40.0, 40)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none\n",
        "name short\n",
        f"{ONE}\n",
        f"a b {ONE}\n",
        f"a {ONE} fast\n",
        f"a {ONE} 1 2 3\n",
        f"a {ONE} 0\n",
        f"a {ONE} 5 0\n",
    ],
)
def test_a_file_without_good_tokens_is_refused_and_not_quoted(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match="token") as caught:
        read_tokens(file)
    assert "short" not in str(caught.value) and ONE not in str(caught.value)
