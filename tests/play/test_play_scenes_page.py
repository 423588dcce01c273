"""The playground's page for an object detector, in a real browser."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from browser import Page, Pipe, violations
from PIL import Image
from playing import Playground, opened
from test_playground_page import DONE, PROBLEM, inactive, tab_to

pytestmark = [pytest.mark.server, pytest.mark.training]
BOXES = "document.querySelectorAll('#stage rect:not(.halo)').length"


@pytest.fixture
def page(pipe: Pipe, scene_playground: Playground) -> Iterator[Page]:
    """The page with the model's sample judged; nothing may have gone wrong in it by the end."""
    with opened(pipe, scene_playground.root) as one:
        yield one


def attack(page: Page, *, eps: int = 8, steps: int = 2, aim: str = "vanish") -> None:
    for name, value in {"eps": eps, "steps": steps, "aim": aim}.items():
        page.js(f"document.querySelector('#{name}').value = {json.dumps(str(value))}; 0")
    page.js("document.querySelector('#order').dispatchEvent(new Event('input')); 0")
    page.click("#go")


def drawn(page: Page, selector: str) -> list[str]:
    return page.js(f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)")


def test_the_sample_is_shown_first_with_a_box_a_label_and_a_confidence_for_each_object(
    page: Page, scene_playground: Playground
) -> None:
    picture = requests.get(f"{scene_playground.root}/api/pictures/0", timeout=10).content
    answer = requests.post(f"{scene_playground.root}/api/verdict", picture, timeout=60).json()
    boxes = answer["answers"]["lean"]["boxes"]
    assert len(boxes) >= 2 and page.js(BOXES) == len(boxes)
    words = {f"{box['label']} {round(100 * box['confidence'])}%" for box in boxes}
    assert {w.replace("over 99%", "100%") for w in drawn(page, "#stage text")} <= words | {
        f"{box['label']} 100%" for box in boxes
    }
    place = """(() => { const box = verdict.answers.lean.boxes[0].box,
      own = document.querySelector("#picture").getBoundingClientRect(),
      all = [...document.querySelectorAll("#stage rect:not(.halo)")],
      rect = all.at(-1).getBBox();
      return [rect.x / own.width * 96 - box[0], rect.y / own.height * 80 - box[1],
        rect.width / own.width * 96 - (box[2] - box[0])]; })()"""
    assert page.js(place) == pytest.approx([0, 0, 0], abs=0.5)
    assert re.match(r"(Accepted|Flagged)\n+\d+ objects?\n", page.text("#words"))
    alt = page.js("document.querySelector('#picture').alt")
    assert re.search(r"as the model sees it: \d+ \u00d7 (disc|square)", alt)
    assert re.search(r"\d+ \u00d7 (disc|square)\n.*sure", page.text("#top"))


def test_classes_differ_in_the_kind_of_line_and_not_in_colour_alone(page: Page) -> None:
    kinds = page.js("model.classes.map((_, index) => line_of(index)['stroke-dasharray'])")
    assert len(set(kinds)) == len(kinds) == 2
    shown = page.js(
        "[...document.querySelectorAll('.key line')].map(l => l.getAttribute('stroke-dasharray'))"
    )
    assert shown and set(shown) <= set(kinds)


def test_an_attack_shows_model_and_twin_side_by_side_with_their_boxes(page: Page) -> None:
    attack(page, eps=16, steps=3)
    page.wait(DONE)
    said = page.text("#outcome")
    assert re.match(r"(It held|Caught|Partly fooled|Fooled)\. lean: \d+ of \d+ box", said)
    assert "Its undefended twin, attacked in the same way:" in said
    titles = drawn(page, "#views b")
    change = "Change \u00d7 10"
    assert titles == [
        *("Clean: lean", change, "Attacked: lean"),
        *("Clean: undefended twin", change, "Attacked: undefended twin"),
    ]
    assert page.js("document.querySelectorAll('#views figure:first-child rect').length") > 2
    assert page.js("document.querySelectorAll('#views figure:nth-child(2) rect').length") == 0
    assert page.visible("#lead svg") and page.visible("#guard svg")
    rows = page.js("[...document.querySelectorAll('#answers tbody th')].map(r => r.innerText)")
    own = "undefended twin, attacked itself"
    assert rows == ["lean (attacked)", "guarded", "undefended twin", own]
    page.click("#take")
    page.wait("document.querySelector('#picture').alt.startsWith('attacked.png')")
    assert not page.visible("#outcome")


def test_an_aim_that_needs_boxes_is_refused_where_there_are_none_and_can_be_changed(
    page: Page, tmp_path: Path
) -> None:
    Image.new("RGB", (96, 80), (160, 160, 160)).save(tmp_path / "empty.png")
    page.choose_file("#file", tmp_path / "empty.png")
    page.wait("document.querySelector('#picture').alt.startsWith('empty.png')")
    assert page.js(BOXES) == 0 and page.text("#top") == "Nothing that it knows."
    attack(page)
    page.wait(PROBLEM.format("attack"))
    assert "it finds nothing in this picture" in page.text("#problem-attack")
    attack(page, aim="fabricate")
    page.wait(DONE)
    assert not page.visible("#problem-attack")


def test_an_attack_can_be_stopped(page: Page) -> None:
    attack(page, steps=100)
    page.wait("trace.length > 2")
    page.click("#stop")
    page.wait("document.querySelector('#progress').innerText.startsWith('Stopped after')")
    assert inactive(page, "#stop")


def test_the_curl_lines_name_the_aim_and_work(page: Page) -> None:
    assert page.text("#curl-attack").endswith("victim=lean&eps=8&steps=20&aim=vanish'")
    line = page.text("#curl-verdict")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert len(json.loads(done.stdout)["answers"]["lean"]["boxes"]) == page.js(BOXES)


def test_the_aim_is_chosen_by_keyboard(page: Page) -> None:
    tab_to(page, "aim")
    page.press("ArrowDown")
    assert page.js("document.querySelector('#aim').value") == "fabricate"
    assert "aim=fabricate" in page.text("#curl-attack")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100, 1600])
def test_nothing_scrolls_sideways_and_axe_finds_nothing_serious(
    width: int, dark: bool, page: Page
) -> None:
    page.resize(width, dark=dark)
    attack(page, steps=1)
    page.wait(DONE)
    assert page.js("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll("body *")].filter(node => node.checkVisibility() &&
      node.getBoundingClientRect().right > innerWidth + 1 &&
      !node.closest("code, .wide, .away, svg")).map(node => node.outerHTML.slice(0, 80))"""
    assert page.js(wide) == []
    assert violations(page) == []


def test_a_picture_of_any_size_keeps_its_shape(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (300, 100), (160, 160, 160)).save(tmp_path / "wide.png")
    page.choose_file("#file", tmp_path / "wide.png")
    page.wait("document.querySelector('#picture').alt.startsWith('wide.png')")
    box = page.js(
        "(({width, height}) => width / height)"
        "(document.querySelector('#picture').getBoundingClientRect())"
    )
    assert box == pytest.approx(3, abs=0.05)
