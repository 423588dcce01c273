"""Attacks of the playground, on the tiny model."""

import base64
import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rampart as rp
from rampart.handlers.errors import ImageError
from rampart.hardening.model.images import Images
from rampart.model import twin_of
from rampart.play.attack import Event, Order, Stopped, attack
from rampart.play.bench import UNDEFENDED, Bench


@pytest.fixture(scope="module")
def bench(twinned: Path) -> Bench:
    model = rp.Model.load(twinned)
    return Bench(model, twin_of(model, None), rate=0.05)


@pytest.fixture(scope="module")
def image(tiny_images: Images) -> torch.Tensor:
    return tiny_images.image[:1]


def pixels(uri: str) -> np.ndarray:
    head, _, text = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def run(bench: Bench, image: torch.Tensor, order: Order) -> tuple[Event, list[Event]]:
    steps: list[Event] = []
    return attack(bench, image, order, steps.append, threading.Event()), steps


def test_every_defence_answers_as_the_library_does(bench: Bench, image: torch.Tensor) -> None:
    answers = bench.answers(image)
    assert list(answers) == ["full", "lean", UNDEFENDED]
    for variant in ("full", "lean"):
        policy = rp.Policy(0.05)
        (verdict,) = bench.model.predict(image, variant=variant, policy=policy)
        assert answers[variant] == answers[variant] | verdict.to_dict()
        assert answers[variant]["p_value"] == verdict.p_value
    assert bench.twin is not None
    share = bench.twin(image.permute(0, 3, 1, 2) / 255).softmax(1)[0].detach()
    assert answers[UNDEFENDED]["index"] == int(share.argmax())
    assert answers[UNDEFENDED]["confidence"] == pytest.approx(float(share.max()), abs=1e-6)


def test_the_parts_of_the_suspicion_add_up_to_where_the_histogram_has_the_picture(
    bench: Bench, image: torch.Tensor
) -> None:
    answer, defence = bench.answers(image)["full"], bench.defences["full"]
    parts = [part["surprise"] for part in answer["parts"]]
    assert [part["name"] for part in answer["parts"]] == list(defence.calibration.detectors)
    assert answer["suspicion"] == pytest.approx(sum(parts))
    ranks = defence.calibration.combined
    share = (1 + int((ranks >= answer["suspicion"]).sum())) / (len(ranks) + 1)
    assert answer["p_value"] == pytest.approx(share)
    assert sum(defence.described({})["histogram"]["counts"]) == len(ranks)


@pytest.mark.parametrize("victim", ["full", "lean", UNDEFENDED])
def test_an_attack_stays_within_eps_and_tells_what_everybody_says_of_its_8_bits(
    victim: str, bench: Bench, image: torch.Tensor
) -> None:
    done, steps = run(bench, image, Order(victim, eps=6, steps=5))
    clean, attacked = pixels(done["clean"]), pixels(done["attacked"])
    assert (clean == image[0].numpy()).all()
    assert 1 <= np.abs(attacked - clean).max() == done["largest"] <= 6
    assert (pixels(done["change"]) == 128 + 10 * (attacked - clean)).all()
    again = bench.answers(torch.from_numpy(attacked.astype(np.uint8))[None])
    for name, answer in done["answers"]["attacked"].items():
        assert answer["label"] == again[name]["label"]
        assert answer.get("p_value") == pytest.approx(again[name].get("p_value"))
    changed = again[victim]["label"] != done["answers"]["clean"][victim]["label"]
    rejected = again[victim].get("decision") == "flag"
    expected = "held" if not changed else "caught" if rejected else "fooled"
    assert done["result"] == expected
    assert (pixels(done["purified"]) == pixels(again["full"]["purified"])).all()
    assert [step["step"] for step in steps] == list(range(1, done["steps"] + 1))


def test_the_twin_is_attacked_for_itself_and_only_beside_another(
    bench: Bench, image: torch.Tensor
) -> None:
    beside = run(bench, image, Order("lean", eps=8, steps=10))[0]["twin"]
    alone = run(bench, image, Order(UNDEFENDED, eps=8, steps=10))[0]
    assert alone["twin"] is None
    assert beside["attacked"] == alone["attacked"]
    assert beside["answer"]["label"] == alone["answers"]["attacked"][UNDEFENDED]["label"]
    assert (beside["steps"], beside["result"]) == (alone["steps"], alone["result"])


def test_a_stronger_attack_brings_the_label_further_down(bench: Bench, image: torch.Tensor) -> None:
    least = {}
    for eps in (1, 16):
        _, steps = run(bench, image, Order(UNDEFENDED, eps=eps, steps=10))
        least[eps] = min(step["lead"] for step in steps)
    assert least[16] < 0
    assert least[16] < least[1]


def test_only_a_victim_that_rejects_has_a_guard(bench: Bench, image: torch.Tensor) -> None:
    guarded = run(bench, image, Order("lean", eps=4, steps=3))[1]
    bare = run(bench, image, Order(UNDEFENDED, eps=4, steps=3))[1]
    assert all(isinstance(step["guard"], float) for step in guarded)
    assert {step["guard"] for step in bare} == {None}


def test_a_target_is_what_the_attack_wants_and_nothing_else(
    bench: Bench, image: torch.Tensor
) -> None:
    label = bench.answers(image)[UNDEFENDED]["index"]
    reached = 0
    for target in {0, 1, 2, 3} - {label}:
        done, steps = run(bench, image, Order(UNDEFENDED, 32, 20, target))
        found = done["answers"]["attacked"][UNDEFENDED]["index"]
        assert done["result"] == ("fooled" if found == target else "held")
        reached += found == target
        assert (min(step["lead"] for step in steps) < 0) >= (found == target)
    assert reached


def test_a_target_that_the_picture_is_taken_for_already_is_refused(
    bench: Bench, image: torch.Tensor
) -> None:
    answer = bench.answers(image)["lean"]
    with pytest.raises(ImageError, match=f"labels the picture {answer['label']}: choose another"):
        run(bench, image, Order("lean", 8, 5, answer["index"]))


def test_an_attack_that_nobody_waits_for_ends_at_its_next_step(
    bench: Bench, image: torch.Tensor
) -> None:
    stop, steps = threading.Event(), []

    def watch(event: Event) -> None:
        steps.append(event)
        if len(steps) == 3:
            stop.set()

    with pytest.raises(Stopped):
        attack(bench, image, Order("full", eps=1, steps=50), watch, stop)
    assert len(steps) == 3


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"eps": "0"}, "eps must be a whole number from 1 to 64"),
        ({"eps": "8.5"}, "eps must be"),
        ({"eps": "²"}, "eps must be"),
        ({"steps": "101"}, "steps must be a whole number from 1 to 100"),
        ({"steps": "9" * 5000}, "steps must be"),
        ({"victim": "nobody"}, "victim must be one of full, lean, undefended"),
        ({"target": "lion"}, "target must be one of the model's classes"),
    ],
)
def test_an_order_for_what_there_is_not_is_refused(
    query: dict[str, str], said: str, bench: Bench
) -> None:
    with pytest.raises(ImageError, match=said) as refused:
        Order.read(query, bench)
    assert refused.value.code == 422


def test_an_order_that_says_nothing_takes_the_models_own_threat(bench: Bench) -> None:
    assert Order.read({}, bench) == Order("full", 8, 20, None)
    recipe = "Recipe(method='gat', threat=Threat(norm='Linf', eps=0.01568627450980392))"
    bench.model.card["training"] = {"classifier": recipe}
    assert Order.read({"target": "ship", "steps": "3"}, bench) == Order("full", 4, 3, 8)
