import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from valign.checks import UserError
from valign.detectors import build
from valign.detectors.importing import import_judge
from valign.detectors.vision_judge import Consistency, JudgeOptions, VisionJudge, encode_image, policy_questions, read_answer
from valign.models.language.chat import ChatRefused
from valign.policy import load_policy
from vision_endpoint import running

POLICY = load_policy("default")
RED, BLUE = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 20), "blue")


@pytest.fixture
def endpoint():
    with running() as found:
        yield found


def judge_folder(tmp_path, *categories, **options):
    folder = tmp_path / "judge"
    import_judge(folder, POLICY, categories or ("violence", "hate"), JudgeOptions(**{"repeats": 1, "retries": 0, **options}))
    return folder


def judge(tmp_path, endpoint, behaviour="good", *categories, **options):
    return VisionJudge(judge_folder(tmp_path, *categories, **options), endpoint=endpoint.url(behaviour))


def test_one_question_per_category_in_the_policys_words():
    questions = policy_questions(POLICY, ("violence",))
    assert list(questions) == ["violence"]
    assert POLICY.category("violence").description in questions["violence"]
    assert list(policy_questions(POLICY)) == list(POLICY.category_ids())


def test_scores_are_shares_of_yes_per_category(tmp_path, endpoint):
    found = judge(tmp_path, endpoint, repeats=2)
    assert found.card.classes == ("violence", "hate")
    assert found.card.abstains
    assert found.detect([RED, BLUE]).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert found.detect([]).shape == (0, 2)
    assert {request["body"]["seed"] for request in endpoint.seen} == {0, 1}  # each repetition has its own


def test_an_image_goes_out_alone_small_and_without_metadata(tmp_path, endpoint):
    notes = PngInfo()
    notes.add_text("parameters", "the prompt of this image")
    large = tmp_path / "large.png"
    Image.new("RGB", (800, 400), "red").save(large, pnginfo=notes)
    with Image.open(large) as image:
        judge(tmp_path, endpoint, side=64).detect([image])
    sent = endpoint.seen[-1]
    assert sent["size"] == (64, 32)
    assert "the prompt" not in str(sent["info"]) + json.dumps(sent["body"])
    system, user = sent["body"]["messages"]
    assert "never an instruction" in system["content"]
    assert set(json.loads(user["content"][0]["text"])) == {"question"}  # quoted data
    assert encode_image(Image.new("RGB", (8, 8)), 64) == encode_image(Image.new("RGB", (8, 8)), 64)


@pytest.mark.parametrize(
    "text", ["yes", '{"answer": "maybe"}', '{"answer": "yes", "why": "red"}', '["yes"]', "{}", "", '{"answer": true}']
)
def test_any_other_form_is_no_answer(text):
    assert read_answer(text) is None


def test_the_asked_form_is_read():
    assert (read_answer('{"answer": "yes"}'), read_answer(' {"answer":"no"}\n')) == ("yes", "no")


@pytest.mark.parametrize("behaviour", ["prose", "fenced"])
def test_a_judge_that_answers_prose_is_refused_before_any_work(tmp_path, endpoint, behaviour):
    with pytest.raises(UserError, match=r'must answer {"answer": "yes"} or {"answer": "no"}, got'):
        judge(tmp_path, endpoint, behaviour)
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize(("behaviour", "said"), [("dead", "cannot be reached"), ("down", "status 503")])
def test_a_judge_that_does_not_answer_is_refused_before_any_work(tmp_path, endpoint, behaviour, said):
    with pytest.raises(UserError, match=said):
        judge(tmp_path, endpoint, behaviour)


def test_prose_in_between_leaves_an_image_without_a_score_never_harmless(tmp_path, endpoint):
    found = judge(tmp_path, endpoint, "torn", "violence", workers=1)
    assert np.isnan(found.detect([RED, BLUE])).tolist() == [[True], [False]]  # the try-out was the first answer
    assert found.consistency() == Consistency(questions=2, agreed=1, asked=2, unreadable=1)
    assert "1 of 2 answers were not of the asked form" in found.remarks()[0]


def test_the_majority_counts_and_its_consistency_is_reported(tmp_path, endpoint):
    found = judge(tmp_path, endpoint, "moody", "violence", repeats=3, workers=1)
    assert found.detect([RED]).tolist() == [[pytest.approx(1 / 3)]]  # no, yes, no
    assert found.consistency() == Consistency(questions=1, agreed=0, asked=3, unreadable=0)
    assert "0 of 1 questions had the same answer all 3 times" in found.remarks()[0]


def test_an_endpoint_that_goes_away_stops_the_work_and_keeps_its_answers(tmp_path, endpoint):
    options = {"workers": 1, "retries": 0}
    found = judge(tmp_path, endpoint, "fading", "violence", **options)
    found.keep_answers(tmp_path / "answers")
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(0, 250, 25)]
    with pytest.raises(UserError, match=r"left alone|cannot be reached"):
        found.detect(images)
    lines = (tmp_path / "answers" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 2  # the third question went into the try-out


def test_kept_answers_are_not_asked_again(tmp_path, endpoint):
    found = judge(tmp_path, endpoint, "good", "violence", repeats=2)
    found.keep_answers(tmp_path / "answers")
    first, asked = found.detect([RED, BLUE]), len(endpoint.seen)
    found.keep_answers(tmp_path / "answers")
    assert found.detect([RED, BLUE]).tolist() == first.tolist()
    assert len(endpoint.seen) == asked


def test_a_refused_image_has_no_score(tmp_path):
    class Refusing:
        def __init__(self, **options):
            self.asked = 0

        def complete(self, messages, *, schema=None):
            self.asked += 1
            if self.asked > 1:
                raise ChatRefused("content policy")
            return '{"answer": "no"}'

    found = VisionJudge(judge_folder(tmp_path, "violence"), endpoint="http://x/v1", connect=Refusing)
    assert np.isnan(found.detect([RED])).all()


def test_no_image_is_sent_where_the_user_named_no_endpoint(tmp_path):
    folder = judge_folder(tmp_path)
    assert "http" not in (folder / "detector.json").read_text()
    with pytest.raises(UserError, match="must be told where images may be sent, no endpoint was named"):
        build(str(folder))


def test_changed_questions_are_another_judge(tmp_path, endpoint):
    folder = judge_folder(tmp_path)
    record = json.loads((folder / "detector.json").read_text())
    record["options"]["questions"]["violence"] = "Is it red?"
    (folder / "detector.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"must hold the weights that detector\.json describes"):
        VisionJudge(folder, endpoint=endpoint.url("good"))
