import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.detectors import DETECTORS, DetectorCard, build, find_folder, on_shelf
from valign.detectors.any_of import AnyOf
from valign.detectors.importing import import_judge
from valign.detectors.vision_judge import JudgeOptions
from valign.policy import load_policy


class Bright:
    card = DetectorCard("bright", ("bright",), 0.5, "0" * 64)

    def detect(self, images):
        return np.array([[np.asarray(image).mean() / 255] for image in images])


def named(name):
    return Bright() if name == "bright" else None


def test_several_names_are_one_detector():
    assert isinstance(build("bright", oracle=named), Bright)
    both = build("bright+bright", oracle=named)
    assert isinstance(both, AnyOf)
    assert both.detect([Image.new("RGB", (2, 2), "white")]).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", [kind for kind in DETECTORS if kind not in ("nudenet", "vision-judge")])
def test_a_kind_is_built_with_its_folder(kind, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):  # the folder reaches the class, which finds nothing there
        build(f"{kind}={tmp_path}")


@pytest.mark.parametrize("name", ["", "nobody", "safety-checker", "clip-probe=", "nudenet=", "nudenet=x", "bright+nobody"])
def test_other_names_are_refused(name):
    with pytest.raises(
        UserError, match=r"detector must be oracle, nudenet, safety-checker=FOLDER, .* or a detector's folder, joined"
    ):
        build(name, oracle=named)


def test_a_folder_or_its_name_on_the_shelf_is_a_detector(tmp_path, monkeypatch):
    import_judge(tmp_path / "shelf" / "a+b", load_policy("default"), (), JudgeOptions())
    monkeypatch.setenv("VALIGN_DETECTORS", str(tmp_path / "shelf"))
    assert [place.name for place in on_shelf()] == ["a+b"]
    assert find_folder("a+b") == find_folder(str(tmp_path / "shelf" / "a+b")) == tmp_path / "shelf" / "a+b"
    with pytest.raises(UserError, match="must be told where images may be sent"):  # so it was found
        build("a+b")
    with pytest.raises(UserError, match=r"In .*shelf: a\+b\."):
        build("nobody")


def test_an_endpoint_is_only_for_what_sends_images():
    with pytest.raises(UserError, match="detector nudenet must be named without an endpoint, for it sends nothing"):
        build("nudenet@http://localhost:8000/v1", oracle=named)


def test_several_options_are_one_detector():
    assert build(["bright", "bright"], oracle=named).names == ("bright", "bright-2")
