"""An object detector behind the service: boxes of the picture as sent, in every protocol."""

import base64
import json
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import objects, picture
from inprocess import ask, post
from PIL import Image

from rampart.handlers.http.inference import as_message
from rampart.handlers.service import Service
from rampart.handlers.triton import column
from rampart.handlers.types import Incoming
from rampart.handlers.verdict import Policy
from rampart.scenes import SceneModel

LEAST = 0.1  # the detector has learned for seconds
MODEL = {"name": "drawn", "version": "1.0"}
SIZES = [(128, 128), (96, 160), (300, 200), (1200, 900), (61, 47)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scene_archive: Path) -> Path:
    """The contents of drawn.mar."""
    out = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(scene_archive) as content:
        content.extractall(out)
    return out


def serve(folder: Path, **settings: Any) -> Service:
    terms = {"false_alarm_rate": 0.02, "min_confidence": LEAST} | settings
    return Service.open(folder, terms, name="drawn", version="1.0")


@pytest.fixture(scope="module")
def service(folder: Path) -> Service:
    return serve(folder)


@pytest.fixture(scope="module")
def model(scenes: SceneModel) -> SceneModel:
    return SceneModel(
        scenes.detector, scenes.calibrations, card=scenes.card | {"min_confidence": LEAST}
    )


def scene(width: int, height: int, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return picture(draws, width, height, objects(draws, min(width, height), 2))


def encoded(pixels: np.ndarray, kind: str = "PNG", orientation: int = 1) -> bytes:
    exif, out = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, kind, exif=exif, quality=95)
    return out.getvalue()


def iou(one: list[float], other: list[float]) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = (high - low).clip(0).prod()
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return float(shared / (sum(areas) - shared))


def assert_alike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Boxes of the same labels in the same places, as confident, and the same decision."""
    assert found["decision"] == expected["decision"]
    assert len(found["boxes"]) == len(expected["boxes"])
    for one, other in zip(found["boxes"], expected["boxes"], strict=True):
        assert (one["label"], one["index"]) == (other["label"], other["index"])
        assert one["confidence"] == pytest.approx(other["confidence"], abs=1e-3)
        assert iou(one["box"], other["box"]) >= 0.99


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_boxes_are_those_of_torch_whatever_the_size_of_the_picture(
    service: Service, model: SceneModel, width: int, height: int, kind: str
) -> None:
    pictures = [encoded(scene(width, height, seed), kind) for seed in range(3)]
    answers = ask(service, *pictures)["predictions"]
    expected = model.predict(pictures, policy=Policy(0.02), variant="lean")
    assert sum(len(one.boxes) for one in expected) >= 3
    for answer, verdict in zip(answers, expected, strict=True):
        assert_alike(answer, verdict.to_dict())
        for box in answer["boxes"]:
            x1, y1, x2, y2 = box["box"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_lie_in_the_picture_as_it_is_seen_whatever_its_orientation(
    service: Service, model: SceneModel, orientation: int
) -> None:
    """A turned picture gives the boxes of the upright one, and not those of its stored pixels."""
    stored = scene(140, 100, seed=4)
    turned = encoded(stored, "PNG", orientation)
    upright = Image.open(BytesIO(turned))
    pixels = np.asarray(upright.transpose(TURNS[orientation]) if orientation > 1 else upright)
    answer = ask(service, turned)
    assert answer["boxes"]
    assert_alike(answer, ask(service, encoded(np.ascontiguousarray(pixels))))
    (own,) = model.predict([turned], policy=Policy(0.02), variant="lean")
    assert_alike(answer, own.to_dict())


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def test_what_was_drawn_is_found_where_it_was_drawn(service: Service) -> None:
    draws = np.random.default_rng(0)
    own = objects(draws, 400, 1)
    (box, *_) = ask(service, encoded(picture(draws, 440, 400, own)))["boxes"]
    assert iou(box["box"], list(map(float, own[0][1:]))) > 0.5


def test_a_jpeg_that_its_decoder_reduces_has_boxes_of_the_picture_as_sent(service: Service) -> None:
    pixels = scene(1200, 900, seed=2)
    whole, reduced = (ask(service, encoded(pixels, kind))["boxes"] for kind in ("PNG", "JPEG"))
    assert whole and reduced
    assert reduced[0]["label"] == whole[0]["label"]
    assert iou(reduced[0]["box"], whole[0]["box"]) > 0.8


def test_a_verdict_has_boxes_in_place_of_a_class(service: Service, folder: Path) -> None:
    answer = ask(service, encoded(scene(128, 128)))
    assert list(answer) == ["boxes", "decision", "model", "detail"]
    assert list(answer["boxes"][0]) == ["label", "index", "confidence", "box"]
    assert answer["model"] == MODEL and list(answer["detail"]) == ["p_value", "scores"]
    assert set(answer["detail"]["scores"]) == {"emptiness", "crowd", "doubt"}
    public = ask(serve(folder, detail="public"), encoded(scene(128, 128)))
    assert public == {name: answer[name] for name in ("boxes", "decision", "model")}


def test_several_pictures_are_answered_in_order_with_errors_in_place(service: Service) -> None:
    bodies = [encoded(scene(128, 96)), b"hello", encoded(scene(96, 128, 3))]
    expected = [ask(service, body) for body in bodies]
    assert expected[1]["type"] == "unsupported_format"
    instances = [{"b64": base64.b64encode(body).decode()} for body in bodies]
    text = json.dumps({"instances": instances}).encode()
    assert ask(service, *bodies) == ask(service, text, route="v1") == {"predictions": expected}


def infer(service: Service, *tensors: Any, **more: Any) -> dict[str, Any]:
    body = json.dumps({"inputs": [{"name": "image"} | tensor for tensor in tensors]} | more)
    return ask(service, body.encode(), route="v2")


def pictures(*bodies: bytes) -> dict[str, Any]:
    data = [base64.b64encode(body).decode() for body in bodies]
    return {"datatype": "BYTES", "shape": [len(data)], "data": data}


def arrays(answer: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {o["name"]: np.array(o["data"]).reshape(o["shape"]) for o in answer["outputs"]}


def test_open_inference_gives_the_same_as_tensors(service: Service) -> None:
    bodies = [encoded(scene(128, 96)), encoded(np.full((90, 70, 3), 180, np.uint8))]
    expected = ask(service, *bodies)["predictions"]
    found = arrays(infer(service, pictures(*bodies), id="7"))
    assert list(found) == ["count", "boxes", "label", "index", "confidence", "decision", "p_value"]
    assert found["count"].tolist() == [len(one["boxes"]) for one in expected]
    assert found["boxes"].shape == (2, max(1, *found["count"]), 4)
    for row, one in enumerate(expected):
        count = len(one["boxes"])
        assert found["boxes"][row, :count].tolist() == [box["box"] for box in one["boxes"]]
        assert found["label"][row, :count].tolist() == [box["label"] for box in one["boxes"]]
        assert (found["index"][row, count:] == -1).all()
    assert found["p_value"].tolist() == [one["detail"]["p_value"] for one in expected]


def test_decoded_pixels_of_any_size_have_boxes_in_these_pixels(service: Service) -> None:
    pixels = scene(150, 110)
    raw = {"datatype": "UINT8", "shape": [1, *pixels.shape], "data": pixels.ravel().tolist()}
    own = ask(service, encoded(pixels))
    found = arrays(infer(service, raw))
    assert found["boxes"][0, : found["count"][0]].tolist() == [box["box"] for box in own["boxes"]]


def test_only_the_outputs_that_there_are_may_be_asked_for(service: Service, folder: Path) -> None:
    tensor = pictures(encoded(scene(128, 96)))
    wanted = infer(service, tensor, outputs=[{"name": "boxes"}, {"name": "count"}])
    assert [output["name"] for output in wanted["outputs"]] == ["count", "boxes"]
    assert "count, boxes, label" in infer(service, tensor, outputs=[{"name": "top"}])["message"]
    hidden = serve(folder, detail="public")
    assert "p_value" in infer(hidden, tensor, outputs=[{"name": "p_value"}])["message"]


@pytest.mark.parametrize("raw", [False, True])
def test_over_grpc_the_tensors_are_those_of_http(service: Service, raw: bool) -> None:
    content = infer(service, pictures(encoded(scene(128, 96))))
    expected, message = arrays(content), as_message(content, raw=raw)
    for number, output in enumerate(message.outputs):
        assert list(output.shape) == list(expected[output.name].shape)
        if output.name == "boxes":
            data = output.contents.fp32_contents
            if raw:
                data = np.frombuffer(message.raw_output_contents[number], np.float32)
            np.testing.assert_allclose(np.reshape(data, output.shape), expected["boxes"], atol=1e-4)


def test_triton_gets_a_row_of_a_picture_at_fault_too(service: Service) -> None:
    bodies = [encoded(scene(128, 96)), b"hello"]
    (answers,) = service.answer_images([bodies])
    found = {name: column(output, answers) for name, output in service.outputs.items()}
    longest = max(1, len(answers[0][1]["boxes"]))
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes["boxes"] == (2, longest, 4) and shapes["label"] == (2, longest)
    assert shapes["count"] == shapes["decision"] == (2, 1)
    assert found["boxes"].dtype == np.float32 and found["count"].dtype == np.int64
    assert found["decision"].tolist() == [[answers[0][1]["decision"]], ["error"]]
    assert found["count"][1, 0] == 0 and np.isnan(found["p_value"][1, 0])
    assert json.loads(column(None, answers)[1, 0])["code"] == 415


def test_the_operator_sets_from_which_confidence_on_a_box_is_shown(folder: Path) -> None:
    body, counts = encoded(scene(128, 128)), []
    for least in (0.02, LEAST, 0.999):
        boxes = ask(serve(folder, min_confidence=least), body)["boxes"]
        assert all(box["confidence"] > least for box in boxes)
        counts.append(len(boxes))
    assert 100 >= counts[0] > counts[1] > counts[2] == 0


def test_a_description_tells_classes_size_and_threshold(folder: Path) -> None:
    told = ask(serve(folder, min_confidence=0.7), route="describe")
    assert (told["task"], told["min_confidence"]) == ("detect", 0.7)
    assert told["objects"]["classes"] == ["disc", "square"] and told["objects"]["size"] == 128


def test_detections_are_kept_and_boxes_withheld_where_the_policy_says_so(
    folder: Path, tmp_path: Path
) -> None:
    strict = serve(folder, false_alarm_rate=0.99, on_detection="reject", quarantine=str(tmp_path))
    answer = ask(strict, encoded(scene(128, 128)))
    assert (answer["decision"], answer["boxes"]) == ("reject", [])
    assert strict._quarantine
    strict._quarantine._waiting.join()
    (kept,) = tmp_path.glob("*.png")
    with Image.open(kept) as file:
        assert json.loads(file.text["rampart"])["boxes"] == [] and file.size == (128, 128)


def test_a_picture_at_which_the_graph_fails_harms_no_other(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies, run = [encoded(scene(128, 96)), encoded(scene(96, 128, 3))], service._engine.run
    expected = [ask(service, body) for body in bodies]

    def moody(images: np.ndarray) -> Any:
        out = run(images)
        dark = (images == run_marker).all(axis=(1, 2, 3))
        return out._replace(boxes=np.where(dark[:, None, None], np.float32("nan"), out.boxes))

    run_marker = 7
    monkeypatch.setattr(service._engine, "run", moody)
    bad = encoded(np.full((128, 128, 3), run_marker, np.uint8))
    batch = [Incoming({}, [body]) for body in (bodies[0], bad, bodies[1])]
    first, failed, last = (json.loads(reply.body) for reply in service.answer(batch))
    assert failed["type"] == "engine_failure"
    assert_alike(first, expected[0])
    assert_alike(last, expected[1])


def test_a_plan_or_the_settings_of_another_task_are_refused(folder: Path, unpacked: Path) -> None:
    with pytest.raises(ValueError, match="only classifiers have plans"):
        serve(folder, device="plan")
    with pytest.raises(ValueError, match="min_confidence is not a setting for this kind"):
        Service.open(unpacked, {"min_confidence": 0.5})


def test_requests_are_counted_as_ever(service: Service, pixels: np.ndarray) -> None:
    assert post(service, encoded(pixels), x_request_id="7").headers["x-request-id"] == "7"
    assert post(service, b"").status == 422
