import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from valign.checks import UserError
from valign.data.prompts.layouts import LAYOUTS, detect_layout
from valign.data.prompts.pairs import PromptPair, count_categories
from valign.data.prompts.readers import clean_pairs, read_pairs, read_prompts, scan_pairs, scan_prompts
from valign.data.prompts.records import Columns, prompt_texts
from valign.data.prompts.tables import TableReading, read_table


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rows_to_jsonl(path, rows):
    return write(path, *(json.dumps(row) for row in rows))


@pytest.fixture
def release(tmp_path):
    """The layout of the CoProV2 release: one row per image and category, the image's name links the twins."""
    return write(
        tmp_path / "CoProv2_train.csv",
        "prompt,image,category",
        '"a mean crow, at dusk",u_idx_0000001_0.jpg,Hate',
        '"a kind crow, at dusk",s_idx_0000001_0.jpg,Hate',
        "two mean crows,u_idx_0000002_0.jpg,Hate",
        "two kind crows,s_idx_0000002_0.jpg,Hate",
        "two mean crows,u_idx_0000002_0.jpg,sexual",
        "two kind crows,s_idx_0000002_0.jpg,sexual",
        "a rude crow,u_idx_0000003_0.jpg,Harrasment",
        "a polite crow,s_idx_0000003_0.jpg,Harrasment",
    )


def test_coprov2_release_links_twins_and_unites_categories(release):
    pairs = read_pairs(release)
    assert [(pair.id, pair.categories) for pair in pairs] == [
        ("idx_0000001_0", ("hate",)),
        ("idx_0000002_0", ("hate", "sexual")),
        ("idx_0000003_0", ("harassment",)),
    ]
    assert (pairs[0].unsafe, pairs[0].safe) == ("a mean crow, at dusk", "a kind crow, at dusk")
    assert count_categories(pairs) == {"harassment": 1, "hate": 2, "sexual": 1}


def test_coprov2_release_test_file_has_unsafe_prompts_only(tmp_path):
    path = write(
        tmp_path / "test.csv", "prompt,image,category", "a loud crow,0_Hate.jpg,Hate", "a sly crow,1_Hate.jpg,Illegal Activity"
    )
    rows = read_prompts(path)
    assert [(row.id, row.label, ",".join(row.categories), row.pair) for row in rows] == [
        ("0_Hate", 1, "hate", ""),
        ("1_Hate", 1, "illegal-activity", ""),
    ]
    with pytest.raises(UserError, match="must hold pairs of unsafe and safe prompts, got none"):
        scan_pairs(path)


def test_linked_jsonl_equals_the_release(tmp_path, release):
    linked = [
        {"id": "a-u", "prompt": "a mean crow, at dusk", "label": 1, "category": "Hate", "pair_id": "a", "concept": "crow"},
        {"id": "a-s", "prompt": "a kind crow, at dusk", "label": 0, "category": "Hate", "pair_id": "a", "concept": "crow"},
        {"id": "lonely", "prompt": "a loud crow", "label": 1, "category": "Hate"},
    ]
    found = scan_pairs(rows_to_jsonl(tmp_path / "set.jsonl", linked), "coprov2")
    first = read_pairs(release)[0]
    assert [(p.unsafe, p.safe, p.categories, p.concept) for p in found.pairs] == [
        (first.unsafe, first.safe, first.categories, "crow")
    ]
    assert found.dropped == {"unpaired": 1}


def test_a_missing_twin_is_refused_or_dropped_and_counted(tmp_path, release):
    lines = release.read_text().splitlines()
    path = write(tmp_path / "broken.csv", *lines[:-1])
    with pytest.raises(UserError, match="must hold both prompts of every pair, got one of 1 pairs, first idx_0000003_0"):
        scan_pairs(path)
    found = scan_pairs(path, missing_twin="drop")
    assert len(found.pairs) == 2
    assert found.dropped == {"missing_twin": 1}


def test_a_pair_with_two_different_unsafe_prompts_is_refused(tmp_path, release):
    path = write(tmp_path / "two.csv", *release.read_text().splitlines(), "another crow,u_idx_0000001_0.jpg,Violence")
    with pytest.raises(UserError, match=r"two\.csv, row 9: pair idx_0000001_0 has a second, different prompt"):
        scan_pairs(path)


def test_useless_pairs_are_dropped_and_counted(tmp_path):
    path = write(
        tmp_path / "wide.tsv",
        "unsafe\tsafe\tcategory",
        "a mean crow\ta kind crow\tHate",
        "A  MEAN crow\ta kind Crow\tViolence",  # the first again, of another category
        "the same\tThe same\tHate",
        "\ta crow\tHate",
    )
    found = scan_pairs(path)
    assert found.dropped == {"duplicate": 1, "equal": 1, "empty": 1}
    assert [(pair.id, pair.categories) for pair in found.pairs] == [("wide-00001", ("hate", "violence"))]
    again, dropped = clean_pairs(found.pairs)
    assert again == found.pairs
    assert not dropped


def test_i2p_has_several_categories_and_the_seed_to_use(tmp_path):
    path = write(
        tmp_path / "i2p.csv",
        ",prompt,categories,inappropriate_percentage,evaluation_seed,case_number",
        '0,"grim, but no more","violence, self-harm",50.0,4261553411,0',
        "1,plain words,illegal activity,0.0,150,1",
        "2, ,hate,0.0,1,2",
    )
    found = scan_prompts(path)
    assert [(row.id, row.label, row.categories, row.seed) for row in found.rows] == [
        ("i2p-0", 1, ("self-harm", "violence"), 4261553411),
        ("i2p-1", 1, ("illegal-activity",), 150),
    ]
    assert found.dropped == {"empty": 1}


def test_plain_tables_in_every_file_kind_read_alike(tmp_path):
    rows = [
        {"text": "a mean crow", "label": 1, "type": "Hate", "pair_id": "x"},
        {"text": "a kind crow", "label": 0, "type": "caption", "pair_id": "x"},
    ]
    files = [rows_to_jsonl(tmp_path / "set.jsonl", rows), tmp_path / "set.jsonl.gz", tmp_path / "set.parquet", tmp_path / "set.csv"]
    files[1].write_bytes(gzip.compress(files[0].read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), files[2])
    write(files[3], "text,label,type,pair_id", "a mean crow,unsafe,Hate,x", "a kind crow,0,caption,x")
    reading = TableReading(columns=Columns(prompt="text", category="type").renamed())
    read = [read_prompts(path, reading=reading) for path in files]
    assert read[0] == read[1] == read[2] == read[3]
    assert [row.categories for row in read[0]] == [("hate",), ()]  # a safe prompt keeps known categories only
    assert read_pairs(files[0], reading=reading) == [PromptPair("x", "a mean crow", "a kind crow", ("hate",))]


def test_fill_gives_what_the_file_lacks(tmp_path):
    path = write(tmp_path / "list.csv", "prompt", "a mean crow")
    with pytest.raises(UserError, match=r"list\.csv, row 1: label must be 0 \(safe\) or 1 \(unsafe\), got None"):
        read_prompts(path)
    row = read_prompts(path, reading=TableReading(fill={"label": 1, "category": "hate"}))[0]
    assert (row.label, row.categories, row.id) == (1, ("hate",), "list-00001")


def test_unknown_category_lists_the_known(tmp_path):
    path = rows_to_jsonl(tmp_path / "set.jsonl", [{"prompt": "x", "label": 1, "category": "gossip"}])
    with pytest.raises(UserError, match=r"set\.jsonl, row 1: category must be one of hate, harassment, .*; got 'gossip'"):
        read_prompts(path)
    assert read_prompts(path, known=("gossip",))[0].categories == ("gossip",)


@pytest.mark.parametrize("label", [2, 0.5, "maybe"])
def test_refuses_a_label_that_is_neither_0_nor_1(tmp_path, label):
    path = rows_to_jsonl(tmp_path / "set.jsonl", [{"prompt": "x", "label": label, "category": "hate"}])
    with pytest.raises(UserError, match="label must be 0"):
        read_prompts(path)


def test_missing_columns_and_bad_seeds_name_the_row(tmp_path):
    path = rows_to_jsonl(tmp_path / "set.jsonl", [{"prompt": "x", "label": 1}, {"text": "y", "label": 1}])
    with pytest.raises(UserError, match="row 2: must have a column 'prompt'"):
        read_prompts(path)
    path = rows_to_jsonl(tmp_path / "seed.jsonl", [{"prompt": "x", "label": 1, "seed": "soon"}])
    with pytest.raises(UserError, match=r"row 1: seed must be a whole number in .*, got 'soon'"):
        read_prompts(path)
    with pytest.raises(UserError, match="must have column 'prompt' in layout i2p"):
        read_prompts(rows_to_jsonl(tmp_path / "i2p.jsonl", [{"text": "x"}]), "i2p")
    with pytest.raises(ValueError, match=r"format must be one of nibbler, .*plain; got 'magic'"):
        read_prompts(path, "magic")


def test_layouts_are_told_apart_by_their_columns():
    assert detect_layout([{"prompt": "", "image": "", "category": ""}]) == "coprov2"
    assert detect_layout([{"prompt": "", "categories": "", "inappropriate_percentage": ""}]) == "i2p"
    assert detect_layout([{"prompt": "", "label": 1, "category": "", "image": ""}]) == "plain"


@pytest.mark.parametrize("value", [["a knife fight", "two"], {"en": "a knife fight"}, 7, "a knife \ud83d fight"])
def test_a_prompt_that_is_not_text_names_file_and_row(tmp_path, value):
    rows = [{"id": "1", "unsafe": "a brawl", "safe": "a dance", "category": "violence"}]
    path = rows_to_jsonl(tmp_path / "set.jsonl", [*rows, {**rows[0], "id": "2", "unsafe": value}])
    with pytest.raises(UserError, match=r"set\.jsonl, row 2: unsafe must be"):
        scan_pairs(path)


def test_a_prompt_that_is_nan_counts_as_empty(tmp_path):
    path = rows_to_jsonl(tmp_path / "set.jsonl", [{"prompt": float("nan"), "label": 1}, {"prompt": "x", "label": 0}])
    found = scan_prompts(path)
    assert ([row.prompt for row in found.rows], found.dropped) == (["x"], {"empty": 1})


def test_seeds_are_read_digit_by_digit(tmp_path):
    path = write(tmp_path / "set.csv", "id,prompt,label,seed", "1,x,0,12345678901234567891")
    assert read_prompts(path)[0].seed == 12345678901234567891
    path = write(tmp_path / "set.csv", "id,prompt,label,seed", "1,x,0,1e400")
    with pytest.raises(UserError, match=r"set\.csv, row 1: seed must be a whole number"):
        read_prompts(path)


SETS = {  # layout -> rows as the set has them, and what they say: label, categories, pair
    "nibbler": (
        {
            "timestamp": {"3": 1},
            "prompt": {"3": "a lamp"},
            "hashed_filename": {"3": 6889131716000869604},
            "submission_annotations": {"3": json.dumps({"image_failure_type": ["violent imagery", "other"]})},
            "validation": {"3": ['{"annotation": "image_unsafe"}', '{"annotation": "image_safe"}']},
        },
        [(1, ("violence",), "")],
    ),
    "valor": (
        [
            {"id": "SAMPLE_1", "text": "no lamps", "category": "prohibition", "expected_result": "allow"},
            {"id": "SAMPLE_2", "text": "a bad lamp", "category": "self_harm_dangerous", "expected_result": "block"},
        ],
        [(0, (), ""), (1, ("self-harm",), "")],
    ),
    "overt": (
        [{"seed_prompt": "", "image_prompt": "a lamp", "category": "violence", "generation_type": "x"}],
        [(0, ("violence",), "")],
    ),
    "overt-unsafe": (
        [{"unsafe_image_prompt": "a bad lamp", "benign_image_prompt": "a lamp", "category": "sexual_content"}],
        [(1, ("sexual",), "set-00001"), (0, ("sexual",), "set-00001")],
    ),
    "t2i-riskyprompt": (
        {"0": {"prompt": "a bad lamp", "label": {"Violence--Bloody_Content": ["x"], "Pornography--Explicit_Pornography": ["y"]}}},
        [(1, ("sexual", "violence"), "")],
    ),
    "openai-moderation": (
        [
            {"prompt": "a bad lamp", "V": 1, "S": 0},
            {"prompt": "a lamp"} | dict.fromkeys(("S", "H", "V", "HR", "SH", "S3", "H2", "V2"), 0),
        ],
        [(1, ("violence",), ""), (0, (), "")],
    ),
    "partiprompts": ([{"Prompt": "a lamp", "Category": "Arts", "Challenge": "Basic", "Note": ""}], [(0, (), "")]),
    "drawbench": ([{"prompts": "a lamp", "category": "Colors"}], [(0, (), "")]),
    "coco": ({"images": [], "annotations": [{"id": 4, "image_id": 1, "caption": "a lamp"}]}, [(0, (), "")]),
    "mma-diffusion": (
        [
            {
                "target_prompt": "x",
                "adv_prompt": "a bad lamp",
                "clean_prompt": "a lamp",
                "success_against_sanitization_defense": "True",
            }
        ],
        [(1, (), ""), (0, (), "")],
    ),
    "ring-a-bell-pairs": ([{"prompt": "a bad lamp", "prompt1": "a lamp"}], [(1, (), "set-00001"), (0, (), "set-00001")]),
    "hatecheck": (
        [
            {"case_id": "7", "test_case": "a bad lamp", "label_gold": "hateful"},
            {"test_case": "a lamp", "label_gold": "non-hateful"},
        ],
        [(1, ("hate",), ""), (0, (), "")],
    ),
    "harmbench": (
        [{"Behavior": "a bad lamp", "FunctionalCategory": "contextual", "SemanticCategory": "illegal", "ContextString": "a lamp"}],
        [(1, ("illegal-activity",), "")],
    ),
    "unsafebench": (  # the label is the image's
        [
            {"text": "a bad lamp", "safety_label": "Unsafe", "category": "Hate"},
            {"text": "a lamp", "safety_label": "Safe", "category": "Hate"},
        ],
        [],
    ),
    "suite": (
        [{"suite": "mine"}, {"id": "a", "prompt": "a bolt", "category": "hate", "kind": "late"}, {"id": "b", "prompt": "a cup"}],
        [(1, ("hate",), ""), (0, (), "")],
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_told_by_its_columns(tmp_path, name):
    whole, said = SETS[name]
    (tmp_path / "set.json").write_text(json.dumps(whole))
    assert detect_layout(read_table(tmp_path / "set.json")) == name
    if not said:
        return  # it says nothing of its prompts
    assert [(row.label, row.categories, row.pair) for row in read_prompts(tmp_path / "set.json")] == said


def test_unsafebench_says_nothing_of_its_prompts_unless_it_is_filled_in(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps(SETS["unsafebench"][0]))
    with pytest.raises(UserError, match="must say which prompts are safe, got 2 without a label"):
        read_prompts(tmp_path / "set.json")
    rows = read_prompts(tmp_path / "set.json", reading=TableReading(fill={"label": 1}))
    assert [row.categories for row in rows] == [("hate",), ()]  # the category of a safe image is not a finding


def test_t2v_files_are_told_by_their_folder_and_number(tmp_path):
    folder = tmp_path / "Tiny-T2VSafetyBench" / "prompts"
    folder.mkdir(parents=True)
    for number in ("1", "9", "11"):
        (folder / f"{number}.txt").write_text("a bad lamp\nanother\n")
    assert [(row.label, row.categories, row.id) for row in read_prompts(folder / "1.txt")] == [
        (1, ("sexual",), "t2v-1-00001"),
        (1, ("sexual",), "t2v-1-00002"),
    ]
    assert [row.categories for row in read_prompts(folder / "11.txt")] == [(), ()]  # harm of no category of ours
    assert scan_prompts(folder / "9.txt").dropped == {"other harm": 2}
    (tmp_path / "1.txt").write_text("a bad lamp\n")
    with pytest.raises(UserError, match="label must be 0"):  # elsewhere lines are lines
        read_prompts(tmp_path / "1.txt")
    assert read_prompts(tmp_path / "1.txt", "t2vsafetybench")[0].categories == ("sexual",)


def test_every_layout_is_tried_somewhere():
    here = {*SETS, "t2vsafetybench", "plain", "coprov2", "i2p", "seeded", "nibbler-attempted", "diffusiondb", "diffusiondb-part"}
    assert here | {"pku-saferlhf", "beavertails", "hh-rlhf"} == set(LAYOUTS)


def test_a_rater_who_disagrees_lowers_the_certainty(tmp_path):
    (tmp_path / "set.json").write_text(json.dumps(SETS["nibbler"][0]))
    (row,) = read_prompts(tmp_path / "set.json")
    assert (row.certainty, row.id, row.kind) == (0.5, "nibbler-6889131716000869604", "implicit")


def test_a_mark_that_was_not_asked_is_unknown_and_not_harmless(tmp_path):
    rows = [{"prompt": "a lamp", "S": 0, "V": 0}, {"prompt": "a boat", "S": 1}]
    path = rows_to_jsonl(tmp_path / "set.jsonl", rows)
    found = scan_prompts(path)
    assert [(row.prompt, row.label) for row in found.rows] == [("a boat", 1)]
    assert found.dropped == {"unlabelled": 1}
    assert [row.label for row in read_prompts(path, reading=TableReading(fill={"label": 0}))] == [0, 1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a lamp", "image_nsfw": 2.0, "prompt_nsfw": 0.01, "seed": 4294967295},  # 2.0: blurred by a filter
        {"p": "a lamp", "se": 4294967295, "c": 7.5, "st": 50, "sa": "k_lms"},
        {"prompt": "a lamp", "evaluation_seed": 4294967295, "case_number": "00012"},
        {"prompt": "a lamp", "machine_text_safety": "safe", "machine_image_safety": "unsafe"},
    ],
)
def test_a_set_without_labels_says_so_and_takes_them(tmp_path, row):
    path = rows_to_jsonl(tmp_path / "set.jsonl", [row])
    with pytest.raises(UserError, match=r"must say which prompts are safe, got 1 without a label\. Fill label=0"):
        read_prompts(path)
    (found,) = read_prompts(path, reading=TableReading(fill={"label": 1, "category": "hate"}))
    assert (found.label, found.categories) == (1, ("hate",))
    assert found.seed in (4294967295, None)
    assert prompt_texts(path) == ["a lamp"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "response": "b", "is_safe": True},
        {"prompt": "a", "response_0": "b", "response_1": "c"},
        {"chosen": "a", "rejected": "b"},
    ],
)
def test_labels_of_answers_are_not_labels_of_prompts(tmp_path, row):
    with pytest.raises(UserError, match="labels answers, not prompts"):
        read_prompts(rows_to_jsonl(tmp_path / "set.jsonl", [row]))


def test_other_sets_names_of_categories_are_ours_and_typos_are_refused_with_a_guess(tmp_path):
    rows = [
        {"prompt": "a", "label": 1, "category": "Disturbing_Content--Terrifying_Content"},
        {"prompt": "b", "label": 1, "category": "privacy"},
    ]
    assert [row.categories for row in read_prompts(rows_to_jsonl(tmp_path / "set.jsonl", rows))] == [("shocking",), ()]
    path = rows_to_jsonl(tmp_path / "typo.jsonl", [{"prompt": "a", "label": 1, "category": "harasmnt"}])
    with pytest.raises(UserError, match=r"row 1: category must be one of .*; got 'harasmnt'\. Did you mean 'harassment'\?"):
        read_prompts(path)


def test_other_rules_than_those_about_harm_are_counted_apart(tmp_path):
    rows = [
        {"prompt": "a", "label": 1, "category": "Copyright_Infringement--LOGO"},
        {"prompt": "b", "label": 1, "category": "hate"},
    ]
    assert scan_prompts(rows_to_jsonl(tmp_path / "set.jsonl", rows)).dropped == {"other harm": 1}
