from rampart.export.terminal import all_visible, visible


def test_nothing_in_a_line_acts_on_the_terminal() -> None:
    assert visible("a\x1b[2Jb") == r"a\x1b[2Jb"
    assert visible("\x00\r\n\t\x7f\x9b") == r"\x00\r\n\t\x7f\x9b"
    assert (
        visible("\u202a\u202e\u2066\u2069\u2028\ud800") == r"\u202a\u202e\u2066\u2069\u2028\ud800"
    )
    assert visible("Grün 猫 ✓ C:\\x") == "Grün 猫 ✓ C:\\x"


def test_names_and_contents_are_made_visible_at_any_depth() -> None:
    found = {"a\n": ["\x1b", {"b": "\r"}, 1, None, 0.5]}
    assert all_visible(found) == {r"a\n": [r"\x1b", {"b": r"\r"}, 1, None, 0.5]}
