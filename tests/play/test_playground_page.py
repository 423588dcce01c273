"""The playground's page in a real browser, as people use it."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from browser import Page, Pipe, violations
from PIL import Image
from playing import READY, Playground, opened, playing

pytestmark = pytest.mark.server
DONE = "!document.querySelector('#outcome').hidden"
PROBLEM = "!document.querySelector('#problem-{}').hidden"


@pytest.fixture
def page(pipe: Pipe, playground: Playground) -> Iterator[Page]:
    """The page with its first picture judged; nothing may have gone wrong in it by the end."""
    with opened(pipe, playground.root) as one:
        yield one


def picture(file: Path, side: int = 64) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def attack(page: Page, *, eps: int = 8, steps: int = 3, victim: str = "undefended") -> None:
    """Set the form as a person would have, and press its button."""
    values = {"eps": eps, "steps": steps, "victim": victim}
    for name, value in values.items():
        page.js(f"document.querySelector('#{name}').value = {json.dumps(str(value))}; 0")
    page.js("document.querySelector('#order').dispatchEvent(new Event('input')); 0")
    page.click("#go")


def inactive(page: Page, selector: str) -> bool:
    return page.js(f"document.querySelector('{selector}').ariaDisabled") == "true"


def test_the_page_begins_with_a_picture_that_is_judged_in_words(page: Page) -> None:
    said = page.text("#words")
    assert re.match(r"(Accepted|Flagged)\n", said)
    assert re.search(r"\d+% sure", said) and re.search(r"\d+ of 10+", said.replace(",", ""))
    assert page.text("#model") == "tiny: 10 classes, sees 32 \u00d7 32 pixels"
    assert page.js("document.querySelectorAll('#top li').length") == 5
    assert page.js("document.querySelector('#picture').naturalWidth") == 32
    assert "ms (undefended twin)" in page.text("#latency")
    words = page.js("document.querySelector('#histogram svg').getAttribute('aria-label')")
    assert words.startswith("Histogram of how unusual 310 clean pictures look")
    assert page.js("document.querySelectorAll('#histogram rect').length") > 5


def test_each_sample_can_be_picked_and_is_marked(page: Page) -> None:
    for number, name in enumerate(("cat", "rocket", "coffee", "noise"), 1):
        page.click(f"#thumbs li:nth-child({number}) button")
        page.wait(f"document.querySelector('#picture').alt.startsWith('{name}.png')")
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.innerText)"
        assert page.js(pressed) == [name]


def test_a_chosen_file_is_judged_and_no_sample_is_marked(page: Page, tmp_path: Path) -> None:
    page.choose_file("#file", picture(tmp_path / "it's mine.png"))
    page.wait("document.querySelector('#picture').alt === \"it's mine.png as the model sees it\"")
    assert page.js("document.querySelectorAll('[aria-pressed=true]').length") == 0


def test_a_dropped_and_a_pasted_picture_are_judged(page: Page) -> None:
    for kind, event in (("drop", "DragEvent"), ("paste", "ClipboardEvent")):
        page.js(
            f"""(async () => {{
              const blob = await (await fetch("/api/pictures/3?seed=5")).blob();
              const data = new DataTransfer();
              data.items.add(new File([blob], "{kind}ed.png", {{type: "image/png"}}));
              document.body.dispatchEvent(new {event}("{kind}", {{bubbles: true, cancelable: true,
                dataTransfer: data, clipboardData: data}}));
            }})()"""
        )
        page.wait(f"document.querySelector('#picture').alt.startsWith('{kind}ed.png')")


def test_a_drawing_is_judged_when_the_pen_is_lifted(page: Page) -> None:
    assert not page.visible("#draw")
    page.click("#open-draw")
    assert page.visible("#draw") and page.focused() == "canvas"
    page.click("[name=colour][value=red]")
    x, y = page.middle("#canvas")
    page.mouse("mousePressed", x, y)
    page.mouse("mouseMoved", x + 60, y + 60)
    page.mouse("mouseReleased", x + 60, y + 60)
    page.wait("document.querySelector('#picture').alt.startsWith('drawing.png')")
    ink = "paper.getImageData(150, 150, 1, 1).data.slice(0, 3).join()"
    assert page.js(ink) == "181,18,27"
    beside = "paper.getImageData(165, 135, 1, 1).data.slice(0, 3).join()"
    assert page.js(beside) == "255,255,255"
    tab_to(page, "pen")
    page.press("ArrowRight", 46)
    x, y = page.middle("#canvas")
    page.mouse("mousePressed", x, y)
    page.mouse("mouseMoved", x + 60, y + 60)
    page.mouse("mouseReleased", x + 60, y + 60)
    assert page.js(beside) == "181,18,27"
    page.click("#clear")
    assert page.js(ink) == "255,255,255"
    before = page.js("document.querySelector('#picture').src")
    page.click("#judge")
    page.wait(f"document.querySelector('#picture').src !== {json.dumps(before)}")
    page.click("#open-draw")
    assert not page.visible("#draw")


def test_a_switched_off_detector_changes_the_p_value_that_is_told(page: Page) -> None:
    everyone = page.text("#switched")
    assert everyone.startswith("With all of them, p would be 0.")
    boxes = page.js("document.querySelectorAll('#detectors input').length")
    assert boxes == 7
    page.click("#detectors input")
    page.wait("document.querySelector('#switched').innerText.startsWith('With 6 of 7')")
    assert "p would be about" in page.text("#switched") and "estimated" in page.text("#switched")
    for number in range(2, 8):
        page.click(f"#detectors label:nth-child({number}) input")
    page.wait("document.querySelector('#switched').innerText.startsWith('With none')")
    page.wait("document.querySelector('#switched').innerText.includes('p would be 1: accepted')")


def test_the_other_variant_has_its_own_verdict(page: Page) -> None:
    page.click("[name=variant][value=lean]")
    page.wait("document.querySelectorAll('#detectors input').length === 3")
    assert "detectors" in page.text("#said").lower()


def test_an_attack_shows_pictures_answers_and_its_course(page: Page) -> None:
    attack(page, eps=16, steps=5)
    page.wait(DONE)
    assert re.match(r"(It held|Fooled)\.", page.text("#outcome"))
    assert re.search(r"\d+ steps in \d+\.\d s\.", page.text("#outcome"))
    titles = page.js("[...document.querySelectorAll('#views b')].map(b => b.innerText)")
    assert titles == ["Clean", "Change \u00d7 10", "Attacked", "Purified"]
    rows = page.js("[...document.querySelectorAll('#answers tbody th')].map(r => r.innerText)")
    assert rows == ["full", "lean", "undefended twin (attacked)"]
    assert page.visible("#lead svg") and not page.visible("#guard-box")
    scale = page.js("[...document.querySelectorAll('#lead text')].map(text => text.textContent)")
    assert float(scale[0]) > float(scale[1])
    assert scale[2:] == ["logits", "step 1", f"step {page.js('trace.length')}"]
    page.click("#take")
    page.wait("document.querySelector('#picture').alt.startsWith('attacked.png')")
    assert not page.visible("#outcome")


def test_the_attacked_picture_is_saved_and_lies_within_eps(page: Page, tmp_path: Path) -> None:
    attack(page, eps=16)
    page.wait(DONE)
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.click("#save")
    file, until = tmp_path / "attacked.png", time.monotonic() + 20
    while not file.is_file():
        assert time.monotonic() < until, list(tmp_path.iterdir())
        time.sleep(0.05)
    clean = page.js("document.querySelector('#views img').src")
    before, after = (
        np.asarray(Image.open(one).convert("RGB")).astype(int)
        for one in (BytesIO(base64.b64decode(clean.partition(",")[2])), file)
    )
    assert 1 <= np.abs(after - before).max() <= 16


def test_one_button_below_the_verdict_tries_to_fool_the_model(page: Page) -> None:
    page.click("#try")
    page.wait(DONE)
    assert page.focused() == "go"
    assert page.js("document.querySelector('#title-attack').getBoundingClientRect().top") < 900


def test_an_attack_on_a_variant_has_a_course_of_suspicion_and_a_row_of_the_twin(
    page: Page,
) -> None:
    attack(page, victim="lean")
    page.wait(DONE)
    assert page.visible("#guard svg") and "suspicion" in page.text("#guard")
    assert "undefended twin, attacked itself" in page.text("#answers")
    assert "undefended twin, attacked in the same way" in page.text("#outcome")


def test_a_wanted_label_that_is_there_already_is_told_and_can_be_changed(page: Page) -> None:
    label = page.text("#top li span")
    page.js(f"document.querySelector('#target').value = {json.dumps(label)}; 0")
    attack(page, victim="full")
    page.wait(PROBLEM.format("attack"))
    assert "it already labels the picture" in page.text("#problem-attack")
    page.js("document.querySelector('#target').value = ''; 0")
    attack(page, victim="full")
    page.wait(DONE)
    assert not page.visible("#problem-attack")


def test_an_attack_can_be_stopped_and_begun_anew(page: Page) -> None:
    unlikely = """model.classes.find(name =>
      !verdict.answers.full.top.some(one => one.label === name))"""
    page.js(f"document.querySelector('#target').value = {unlikely}; 0")
    attack(page, eps=1, steps=100, victim="full")
    page.wait("trace.length > 2")
    assert inactive(page, "#go")
    page.click("#stop")
    page.wait("document.querySelector('#progress').innerText.startsWith('Stopped after')")
    assert inactive(page, "#stop")
    page.js("document.querySelector('#target').value = ''; 0")
    attack(page)
    page.wait(DONE)


def test_another_picture_ends_the_attack_on_the_one_before(page: Page) -> None:
    page.js("document.querySelector('#target').value = model.classes[0]; 0")
    attack(page, eps=1, steps=100, victim="full")
    page.click("#thumbs li:nth-child(2) button")
    page.wait("document.querySelector('#picture').alt.startsWith('rocket')")
    page.wait("running === null")
    assert not page.visible("#outcome") and not page.visible("#problem-attack")


def bad_files(folder: Path) -> dict[Path, str]:
    files = {folder / name: "" for name in ("text.png", "cut.png", "empty.png", "large.png")}
    text, cut, empty, large = files
    text.write_text("no picture")
    cut.write_bytes(picture(folder / "whole.png").read_bytes()[:400])
    empty.write_bytes(b"")
    large.write_bytes(b"\x89PNG" + bytes(7_000_000))
    said = ("not a JPEG, PNG or WebP", "truncated or corrupt", "is empty", "has 7.0 MB")
    return dict(zip(files, said, strict=True))


def test_bad_files_are_told_and_the_page_goes_on(page: Page, tmp_path: Path) -> None:
    shown = page.js("document.querySelector('#picture').src")
    for file, said in bad_files(tmp_path).items():
        page.choose_file("#file", file)
        page.wait(f"document.querySelector('#problem-choose').innerText.includes('{said}')")
        assert page.text("#problem-choose").startswith(file.name)
        assert page.js("document.querySelector('#picture').src") == shown
    page.choose_file("#file", picture(tmp_path / "good.png"))
    page.wait("document.querySelector('#picture').alt.startsWith('good.png')")
    assert not page.visible("#problem-choose")


@pytest.mark.slow
def test_a_server_that_goes_away_is_told_and_taken_up_again_when_it_is_back(
    pipe: Pipe, twinned: Path, tmp_path: Path
) -> None:
    page = Page(pipe)
    with playing(twinned, log=tmp_path / "log") as own:
        page.open(own.root)
        page.wait(READY)
        assert own.end() == 0
    page.click("#thumbs li:nth-child(2) button")
    page.wait(PROBLEM.format("choose"))
    assert "The playground does not answer" in page.text("#problem-choose")
    page.click("#go")
    page.wait(PROBLEM.format("attack"))
    assert "start `rampart play` again" in page.text("#problem-attack")
    assert not inactive(page, "#go")
    page.click("#detectors input")
    page.wait("document.querySelector('#switched').innerText.includes('does not answer')")
    port = own.root.rpartition(":")[2]
    with playing(twinned, "--port", port, log=tmp_path / "log"):
        page.click("#problem-attack button")
        page.wait(DONE)
        assert not page.visible("#problem-attack")
        page.click("#problem-choose button")
        page.wait("document.querySelector('#picture').alt.startsWith('rocket')")
        assert not page.visible("#problem-choose")


def test_a_server_that_dies_during_an_attack_leaves_the_page_usable(
    pipe: Pipe, twinned: Path, tmp_path: Path
) -> None:
    page = Page(pipe)
    with playing(twinned, log=tmp_path / "log") as own:
        page.open(own.root)
        page.wait(READY)
        page.js("document.querySelector('#target').value = model.classes.at(-1); 0")
        attack(page, eps=1, steps=100, victim="full")
        page.wait("trace.length > 2 || document.querySelector('#problem-attack').innerText")
        os.kill(own.process.pid, signal.SIGKILL)
        page.wait(PROBLEM.format("attack"))
    assert "does not answer" in page.text("#problem-attack")
    assert not inactive(page, "#go")
    assert inactive(page, "#stop")


def copied(page: Page, button: str, code: str) -> str:
    """What a button copies, run by a shell."""
    page.call(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.click(button)
    page.wait(f"document.querySelector('{button}').innerText !== 'Copy as curl'")
    line = page.text(code)
    if page.text(button) == "Copied":
        assert page.js("navigator.clipboard.readText()") == line
    else:
        assert page.js("getSelection().toString()") == line
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout


def test_what_is_copied_of_a_verdict_is_a_curl_line_that_gives_it(page: Page) -> None:
    told = json.loads(copied(page, "#copy-verdict", "#curl-verdict"))
    assert told["answers"]["full"]["label"] == page.text("#top li span")


def test_what_is_copied_of_an_attack_is_a_curl_line_that_makes_it(page: Page) -> None:
    *steps, last = copied(page, "#copy-attack", "#curl-attack").splitlines()
    assert "victim=full&eps=8&steps=20" in page.text("#curl-attack")
    assert json.loads(steps[0])["step"] == 1
    assert "result" in json.loads(last)


def test_the_curl_line_of_a_file_quotes_its_name_for_the_shell(page: Page, tmp_path: Path) -> None:
    page.choose_file("#file", picture(tmp_path / "it's $mine.png"))
    page.wait("document.querySelector('#curl-verdict').innerText.includes('mine.png')")
    assert shlex.split(page.text("#curl-verdict"))[:3] == ["curl", "-T", "it's $mine.png"]


def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until the element of this id, or with this text, has the focus."""
    for _ in range(60):
        if page.focused() == wanted:
            return
        page.press("Tab")
    raise AssertionError(f"Tab does not lead to {wanted}")


def test_all_of_it_works_by_keyboard_alone(page: Page) -> None:
    tab_to(page, "rocket")
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    page.wait("document.querySelector('#picture').alt.startsWith('rocket')")
    tab_to(page, "open-draw")
    page.press("Enter")
    assert page.focused() == "canvas"
    page.press(" ")
    page.press("ArrowRight", 5)
    page.press("ArrowDown", 5)
    page.press(" ")
    page.wait("document.querySelector('#picture').alt.startsWith('drawing')")
    assert page.js("paper.getImageData(140, 128, 1, 1).data[0]") < 50
    tab_to(page, "eps")
    page.press("ArrowLeft", 2)
    assert page.text("#eps-words") == "6/255"
    tab_to(page, "victim")
    page.press("ArrowDown", 2)
    assert page.js("document.querySelector('#victim').value") == "undefended"
    tab_to(page, "go")
    page.press("Enter")
    page.wait(DONE)
    tab_to(page, "take")


def test_the_choice_of_a_file_is_reached_by_keyboard_and_shows_the_focus(page: Page) -> None:
    tab_to(page, "file")
    assert page.js("getComputedStyle(document.querySelector('#drop')).outlineStyle") == "solid"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100, 1600])
def test_nothing_scrolls_sideways_and_axe_finds_nothing_serious(
    width: int, dark: bool, page: Page
) -> None:
    page.resize(width, dark=dark)
    page.click("#open-draw")
    page.click("#detectors input")
    attack(page, victim="lean")
    page.wait(DONE)
    page.js("problem('choose', 'A problem', start); 0")
    assert page.js("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll("body *")].filter(node => node.checkVisibility() &&
      node.getBoundingClientRect().right > innerWidth + 1 && !node.closest("code, .wide, .away"))
      .map(node => node.outerHTML.slice(0, 80))"""
    assert page.js(wide) == []
    small = """[...document.querySelectorAll("button, select, .button")].filter(node =>
      node.checkVisibility() && node.getBoundingClientRect().height < 36).map(n => n.outerHTML)"""
    assert page.js(small) == []
    assert violations(page) == []


def test_axe_sees_a_fault_where_there_is_one(page: Page) -> None:
    page.js("document.querySelector('#words').style.color = '#ccc'; 0")
    page.js("document.querySelector('#victim').previousElementSibling.remove(); 0")
    assert {one.partition(":")[0] for one in violations(page)} == {"color-contrast", "select-name"}


def test_no_verdict_is_told_by_colour_alone(page: Page) -> None:
    pill = "document.querySelector('#words .pill')"
    assert page.js(f"{pill}.innerText") in ("Accepted", "Flagged")
    shapes = page.js("[ICONS.good, ICONS.warn, ICONS.bad]")
    assert len(set(shapes)) == 3
    assert page.js(f"{pill}.querySelector('path').getAttribute('d')") in shapes
    assert page.js(f"{pill}.querySelector('svg').getBoundingClientRect().width") > 12
    attack(page)
    page.wait(DONE)
    assert page.js("document.querySelector('#outcome path').getAttribute('d')") in shapes
    assert page.js("document.querySelector('#outcome svg').getBoundingClientRect().width") > 12
    changed, moved = (page.text("#answers").count(word) for word in ("label changed", "\u2192"))
    assert changed == moved


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1, "100 of 100"),
        (0.357, "36 of 100"),
        (0.1, "10 of 100"),
        (0.0202, "2 of 100"),
        (0.029, "29 of 1,000"),
        (0.0062, "6 of 1,000"),
        (0.00037, "4 of 10,000"),
        (1e-9, "1 of 10,000"),
    ],
)
def test_shares_are_told_as_so_many_of_so_many(share: float, words: str, page: Page) -> None:
    assert page.js(f"outOf({share})") == words


def test_signs_are_offered_to_a_model_that_knows_them_and_drawn_anew(
    pipe: Pipe, twinned: Path, tmp_path: Path
) -> None:

    from rampart.hardening.model import pipeline as pipelines

    folder = Path(shutil.copytree(twinned, tmp_path / "signs"))
    whole, classes = pipelines.load_whole(folder / "weights.safetensors")
    names = ("stop", "yield", "no entry", "danger", *classes[4:])
    pipelines.save(folder / "weights.safetensors", whole, names)
    page = Page(pipe)
    with playing(folder, log=tmp_path / "log") as own:
        page.open(own.root)
        page.wait(READY)
        shown = "[...document.querySelectorAll('.thumb')].map(b => b.innerText)"
        assert page.js(shown) == ["stop", "yield", "no entry", "danger", "noise"]
        page.click("#others")
        page.wait("document.querySelector('.thumb img').src.endsWith('seed=1')")
        page.click(".thumb")
        page.wait("current.from.endsWith('seed=1')")
