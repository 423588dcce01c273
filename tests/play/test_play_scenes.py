"""Attacks of the playground on what an object detector finds."""

import base64
import io
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rampart.handlers.errors import ImageError
from rampart.handlers.image import View
from rampart.handlers.verdict import Policy
from rampart.hardening.objects.detector import ObjectConfig
from rampart.hardening.objects.suspicions import SUSPICIONS
from rampart.play.attack import Event, Stopped
from rampart.play.bench import UNDEFENDED
from rampart.play.scene_attack import SceneOrder, attack, damage, result
from rampart.play.scene_bench import QUESTIONS, SceneBench
from rampart.play.server import bench_of
from rampart.scenes import SceneModel, twin_of


@pytest.fixture(scope="module")
def bench(twinned_scenes: Path) -> SceneBench:
    found = bench_of(twinned_scenes, None, 0.05)
    assert isinstance(found, SceneBench)
    return found


@pytest.fixture(scope="module")
def sample(twinned_scenes: Path) -> bytes:
    return (twinned_scenes / "sample.png").read_bytes()


@pytest.fixture(scope="module")
def view(bench: SceneBench, sample: bytes) -> View:
    return bench.see(sample)


def picture(uri: str) -> bytes:
    head, _, text = uri.partition(",")
    assert head == "data:image/png;base64"
    return base64.b64decode(text)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture(uri)))).astype(int)


def run(bench: SceneBench, view: View, order: SceneOrder) -> tuple[Event, list[Event]]:
    steps: list[Event] = []
    return attack(bench, view, order, steps.append, threading.Event()), steps


def test_each_score_of_an_object_detector_has_a_question_of_its_own() -> None:
    assert set(QUESTIONS) == set(SUSPICIONS)


def test_every_variant_answers_as_the_endpoint_does(
    bench: SceneBench, view: View, sample: bytes
) -> None:
    answers = bench.answers(view)
    assert list(answers) == ["lean", "guarded", UNDEFENDED]
    for variant in ("lean", "guarded"):
        (verdict,) = bench.model.predict([sample], variant=variant, policy=Policy(0.05))
        assert answers[variant] == answers[variant] | verdict.to_dict()
        assert answers[variant]["p_value"] == verdict.p_value
        parts = [part["surprise"] for part in answers[variant]["parts"]]
        assert answers[variant]["suspicion"] == pytest.approx(sum(parts))
    assert len(answers["lean"]["boxes"]) >= 2
    assert answers[UNDEFENDED].keys() == {"boxes", "milliseconds"}
    assert answers[UNDEFENDED]["boxes"] == answers["lean"]["boxes"]  # it is its own twin here


def test_the_picture_is_shown_without_its_border_and_boxes_are_of_it_as_sent(
    bench: SceneBench, view: View
) -> None:
    seen = bench.seen(view)
    assert tuple(seen["sides"]) == (96, 80)
    assert pixels(seen["picture"]).shape == (107, 128, 3)
    assert (view.pixels[:10] == 128).all()
    for box in bench.answers(view)["lean"]["boxes"]:
        x1, y1, x2, y2 = box["box"]
        assert 0 <= x1 < x2 <= 96 and 0 <= y1 < y2 <= 80


def test_an_attack_changes_the_picture_alone_and_what_is_saved_is_found_again(
    bench: SceneBench, view: View
) -> None:
    done, steps = run(bench, view, SceneOrder("lean", eps=6, steps=4))
    clean, attacked = pixels(done["clean"]), pixels(done["attacked"])
    assert clean.shape == (107, 128, 3)
    assert 1 <= np.abs(attacked - clean).max() == done["largest"] <= 6
    assert (pixels(done["change"]) == 128 + 10 * (attacked - clean)).all()
    again = bench.see(picture(done["attacked"]))
    inner = view.pixels.astype(int)
    inner[10:117] = attacked
    assert (again.pixels == inner).all()  # the border is as it was
    confidences = [box["confidence"] for box in done["answer"]["boxes"]]
    now = bench.answers(again)["lean"]
    assert [box["confidence"] for box in now["boxes"]] == pytest.approx(confidences)
    assert now["p_value"] == pytest.approx(done["answer"]["p_value"])
    assert [step["step"] for step in steps] == list(range(1, done["steps"] + 1))
    assert done["steps"] == 5  # the first look, and four


def test_each_aim_reaches_for_what_it_names(bench: SceneBench, view: View) -> None:
    count = len(bench.answers(view)[UNDEFENDED]["boxes"])
    ends = {}
    for aim in ("vanish", "fabricate"):
        ends[aim], _ = run(bench, view, SceneOrder(UNDEFENDED, 24, 15, aim))
    assert ends["vanish"]["kept"] < count
    assert ends["fabricate"]["new"] > ends["vanish"]["new"]
    assert ends["vanish"]["result"] == ends["fabricate"]["result"] == "fooled"


def test_a_variant_avoids_the_flag_that_its_attacker_knows_and_the_twin_has_none(
    bench: SceneBench, view: View
) -> None:
    guarded = run(bench, view, SceneOrder("lean", 4, 2))
    bare = run(bench, view, SceneOrder(UNDEFENDED, 4, 2))
    assert all(isinstance(step["guard"], float) for step in guarded[1])
    assert {step["guard"] for step in bare[1]} == {None}
    assert bare[0]["twin"] is None
    twin = guarded[0]["twin"]
    assert twin["attacked"] == bare[0]["attacked"]
    assert (twin["kept"], twin["new"]) == (bare[0]["kept"], bare[0]["new"])


def test_a_picture_without_objects_can_only_get_false_ones(bench: SceneBench) -> None:
    empty = bench.see(Path(__file__).parents[2].joinpath("docs/play.png").read_bytes())
    grey = View(np.full_like(empty.pixels, 160), empty.frame)
    assert not bench.answers(grey)["lean"]["boxes"]
    with pytest.raises(ImageError, match="only the aim fabricate needs no box"):
        run(bench, grey, SceneOrder("lean", 4, 1, "vanish"))
    done, _ = run(bench, grey, SceneOrder("lean", 4, 1, "fabricate"))
    assert done["kept"] == 0 and done["twin"] is not None


def test_an_attack_that_nobody_waits_for_ends_at_its_next_step(
    bench: SceneBench, view: View
) -> None:
    stop, steps = threading.Event(), []

    def watch(event: Event) -> None:
        steps.append(event)
        stop.set()

    with pytest.raises(Stopped):
        attack(bench, view, SceneOrder("guarded", 1, 50), watch, stop)
    assert len(steps) == 1


def box(index: int, *corners: float) -> dict[str, object]:
    return {"index": index, "label": "x", "box": list(corners), "confidence": 0.9}


def test_boxes_are_the_same_where_label_and_place_are() -> None:
    before = [box(0, 0, 0, 10, 10), box(1, 20, 20, 30, 30), box(0, 0, 0, 9, 9)]
    moved = [box(0, 0, 1, 10, 10), box(0, 20, 20, 30, 30), box(0, 0, 0, 9, 9)]
    assert damage(before, before) == (3, 0)
    assert damage(before, moved) == (2, 1)  # another label is another box
    assert damage(before, [box(0, 0, 0, 10, 10)] * 4) == (2, 2)  # each is found once
    assert damage([box(0, 0, 0, 10, 10)], [box(0, 6, 6, 16, 16)]) == (0, 1)
    assert damage([], moved) == (0, 3)


@pytest.mark.parametrize(
    ("count", "found", "decision", "ended"),
    [
        (4, (4, 0), "flag", "held"),
        (4, (3, 0), "accept", "dented"),
        (4, (3, 0), "flag", "caught"),
        (4, (2, 0), "accept", "fooled"),
        (4, (4, 2), "accept", "fooled"),
        (0, (0, 1), "accept", "fooled"),
        (0, (0, 0), "accept", "held"),
    ],
)
def test_an_attack_ends_by_how_many_boxes_it_moved(
    count: int, found: tuple[int, int], decision: str, ended: str
) -> None:
    from rampart.play.scene_attack import Damage

    assert result(count, Damage(*found), {"decision": decision}) == ended


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"eps": "0"}, "eps must be a whole number from 1 to 64"),
        ({"steps": "101"}, "steps must be a whole number from 1 to 100"),
        ({"victim": "nobody"}, "victim must be one of lean, guarded, undefended"),
        ({"aim": "win"}, "aim must be one of vanish, fabricate, mislabel, invert, sum"),
    ],
)
def test_an_order_for_what_there_is_not_is_refused(
    query: dict[str, str], said: str, bench: SceneBench
) -> None:
    with pytest.raises(ImageError, match=said):
        SceneOrder.read(query, bench)


def test_an_order_that_says_nothing_takes_the_threat_of_training(bench: SceneBench) -> None:
    recipe = "ObjectRecipe(method='nfgsm', threat=Threat(norm='Linf', eps=0.0235))"
    bench.model.card["training"] = {"detector": recipe}
    assert SceneOrder.read({}, bench) == SceneOrder("lean", 6, 20, "vanish")


def test_a_twin_of_other_classes_is_refused(twinned_scenes: Path, tmp_path: Path) -> None:
    from rampart.hardening.objects.defended import save
    from rampart.hardening.objects.detector import ObjectDetector

    model = SceneModel.load(twinned_scenes)
    other = Path(shutil.copytree(twinned_scenes, tmp_path / "other"))
    config: ObjectConfig = model.detector.config._replace(classes=("cup", "fork"))
    save(other / "weights.safetensors", ObjectDetector(config))
    with pytest.raises(ValueError, match=r"is not a twin of .*it finds cup, fork at 128 pixels"):
        twin_of(model, other)
