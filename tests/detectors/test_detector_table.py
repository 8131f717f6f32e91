import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.detectors import DETECTORS, DetectorCard, build
from valign.detectors.any_of import AnyOf


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


@pytest.mark.parametrize("kind", [kind for kind in DETECTORS if kind != "nudenet"])
def test_a_kind_is_built_with_its_folder(kind, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):  # the folder reaches the class, which finds nothing there
        build(f"{kind}={tmp_path}")


@pytest.mark.parametrize("name", ["", "nobody", "safety-checker", "clip-probe=", "nudenet=", "nudenet=x", "bright+nobody"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match="detector must be oracle, nudenet, safety-checker=FOLDER or clip-probe=FOLDER, joined"):
        build(name, oracle=named)
