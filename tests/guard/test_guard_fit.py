"""Features, fit, calibration and the file of the head, on words that mean nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from valign.checks import UserError
from valign.data.prompts.pairs import LabelledPrompt
from valign.guard.head.learned import LearnedStage
from valign.models.heads.ngrams import bag_of, ngram_ids
from valign.models.heads.prompt_head import ATTEND, Head, HeadSettings, as_saved, average, load_head, save_head, sentence_vectors
from valign.recipes.guard_head import calibrate_and_write, calibrated, harmless_scores
from valign.training.tasks.guard_head.calibration import calibrate, flagged_share, presets, suspicion
from valign.training.tasks.guard_head.fit import FitConfig, contrast_loss, fit_head, naming_loss, source_weights, targets


def row(number, prompt, label, categories=(), source="toy", pair=""):
    return LabelledPrompt(f"{source}:{number}", prompt, label, categories, source, pair or f"{source}:{number}", pair)


TOYS = ["boat", "lamp", "tree", "cup", "road", "bird", "wall", "door"]
ROWS = [
    row(2 * i + side, f"a {'quiet' if not side else 'furious'} {toy} number {n}", side, ("violence",) if side else (), pair=f"p{i}")
    for i, (toy, n) in enumerate((toy, n) for toy in TOYS for n in range(4))
    for side in (0, 1)
]


def test_ngrams_are_the_same_everywhere():
    assert ngram_ids("ab", 1000) == [375, 761, 942, 978]  # 1 + crc32 % 999 of "<ab", "ab>", "<ab>" and "w ab"
    assert ngram_ids("A  b!", 64) == ngram_ids("a b", 64)
    assert ngram_ids("", 64) == ngram_ids("...", 64) == [0]
    assert all(1 <= i < 64 for i in ngram_ids("a longer text with words", 64))


def test_a_bag_begins_where_the_text_before_ends():
    ids, starts = bag_of(["ab", "", "cd e"], 512)
    lengths = [len(ngram_ids(text, 512)) for text in ("ab", "", "cd e")]
    assert starts.tolist() == [0, lengths[0], lengths[0] + lengths[1]]
    assert len(ids) == sum(lengths)
    assert bag_of([], 512)[1].tolist() == []


def test_targets_know_what_is_not_known():
    goal, weight = targets([row(0, "a", 0), row(1, "b", 1, ("hate",)), row(2, "c", 1)], ["hate", "violence"])
    assert goal.tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert weight.tolist() == [[1, 1, 1], [1, 1, 0.5], [1, 0, 0]]


def test_both_labels_weigh_the_same():
    rows = [row(i, "a", 0) for i in range(9)] + [row(9, "b", 1), row(10, "c", 1, source="other")]
    weight = source_weights(rows)
    assert weight[:9].sum() == pytest.approx(weight[9:].sum())
    assert weight.mean() == pytest.approx(1.0)


def test_unsafe_rows_weigh_by_certainty_and_sources_by_their_factor():
    rows = [row(0, "a", 1), replace(row(1, "b", 1), certainty=0.25), replace(row(2, "c", 1), certainty=0.0)]
    rows += [row(3, "d", 0), row(4, "e", 0, source="traffic"), replace(row(5, "f", 0), certainty=0.0)]
    weight = source_weights(rows, {"traffic": 3.0})
    assert (weight[1] / weight[0], float(weight[2])) == (pytest.approx(0.25), 0.0)
    assert weight[4] / weight[3] == pytest.approx(3 * 2**0.5)  # alone in its source, against two
    assert weight[5] == weight[3]  # doubt is about what is called unsafe
    assert weight[:3].sum() == pytest.approx(weight[3:].sum())


def test_contrast_loss_by_hand():  # margins 3 - (2 - 0) = 1 and 3 - (5 - 1) < 0: mean 0.5
    rows = [row(0, "a", 0, pair="p"), row(1, "b", 1, pair="p"), row(2, "c", 0, pair="q"), row(3, "d", 1, pair="q")]
    assert contrast_loss(torch.tensor([0.0, 2.0, 1.0, 5.0]), rows, 3.0).item() == pytest.approx(0.5)
    assert contrast_loss(torch.tensor([1.0]), [row(0, "a", 0)], 3.0).item() == 0


@pytest.fixture(scope="module")
def head(policy, minilm):
    return fit_head(ROWS, policy, minilm, FitConfig(epochs=8, batch_size=16, buckets=512, bag_dim=8, hidden=16))


def test_a_fit_separates_words_it_did_not_see_together(head, minilm):
    scores = head.score(minilm, ["a furious kettle", "a quiet kettle"])
    violence = head.settings.columns.index("violence")
    assert scores[0, 0] > scores[1, 0] + 0.1
    assert scores[0, violence] > scores[1, violence]


def test_the_same_fit_gives_the_same_weights(policy, minilm):
    config = FitConfig(epochs=1, batch_size=16, buckets=64, bag_dim=4, hidden=8, tuned_layers=1)
    one, two = (fit_head(ROWS[:16], policy, minilm, config) for _ in range(2))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert any(name.startswith("upper.encoder.layer.5.") for name in one.weights)
    assert not torch.equal(
        one.weights["upper.encoder.layer.5.output.dense.weight"], minilm.weights["encoder.layer.5.output.dense.weight"]
    )


def test_a_fit_goes_on_from_a_head(head, policy, minilm):
    config = FitConfig(epochs=1, batch_size=16, buckets=512, bag_dim=8, hidden=16)
    still = replace(config, lr=1e-9, weight_decay=0.0)
    kept = fit_head(ROWS, policy, minilm, still, start=head)
    assert all(torch.allclose(kept.weights[name], head.weights[name], atol=1e-6) for name in head.weights)
    further = fit_head(ROWS, policy, minilm, config, start=head)
    assert not torch.equal(further.weights["out.weight"], head.weights["out.weight"])
    with pytest.raises(UserError, match=r"fit_head\.start must have the fit's encoder, policy and sizes"):
        fit_head(ROWS, policy, minilm, replace(config, hidden=8), start=head)


def test_heads_are_averaged_weight_by_weight(head):
    noted = replace(head.settings, notes={"config": {"seed": 0, "epochs": 2}}, thresholds={"balanced": {"any": 0.5}})
    other = {name: tensor + 2.0 for name, tensor in head.weights.items()}
    mean = average([Head(noted, head.weights), Head(replace(noted, notes={"config": {"seed": 0, "epochs": 3}}), other)])
    assert all(torch.allclose(mean.weights[name], tensor + 1.0) for name, tensor in head.weights.items())
    assert (mean.settings.thresholds, mean.settings.notes["averaged"]) == ({}, [{"epochs": 3}])
    of_means = average([Head(noted, head.weights), mean])
    assert of_means.settings.notes["averaged"] == [{"averaged": [{"epochs": 3}]}]
    alone = average([Head(noted, head.weights)])
    assert all(torch.equal(alone.weights[name], tensor) for name, tensor in head.weights.items())
    assert alone.settings.notes == noted.notes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder_sha256": "0" * 64}, "encoder"),
        ({"categories": ("hate",)}, "columns"),
        ({"notes": {"config": {"seed": 1}}}, "seed"),
        ({"notes": {"left_out": ["valor"]}}, "left-out sources"),
    ],
)
def test_refuses_to_average_heads_of_other_fits(head, change, says):
    with pytest.raises(UserError, match=rf"average\.heads must have the same {says}"):
        average([head, Head(replace(head.settings, **change), head.weights)])
    narrow = {**head.weights, "hidden.bias": head.weights["hidden.bias"][:-1]}
    with pytest.raises(UserError, match="the same shapes"):
        average([head, Head(head.settings, narrow)])


def test_a_head_without_tuning_reads_the_encoders_own_vectors(head, minilm):
    tokens = minilm.tokenize(["a quiet lamp"])
    assert torch.equal(head.vectors(minilm.lower(tokens, 6), tokens), minilm.encode_windows(tokens))


def test_a_query_weighs_tokens_by_the_softmax_of_their_products():
    """In NumPy: the same means, padding left out, each of unit length; a query of zeros is the plain mean."""
    generator = torch.Generator().manual_seed(0)
    hidden, queries = torch.randn(2, 5, 384, generator=generator), torch.randn(2, 384, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = sentence_vectors(hidden, mask, {ATTEND: queries}).numpy().reshape(2, 3, 384)
    for i, length in enumerate((5, 3)):
        tokens = hidden[i, :length].double().numpy()
        for query, vector in zip((np.zeros(384), *queries.double().numpy()), found[i]):
            votes = np.exp(tokens @ query - (tokens @ query).max())
            mean = (votes / votes.sum()) @ tokens
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_queries_need_tokens_that_are_tuned(policy, minilm):
    config = FitConfig(epochs=1, batch_size=16, buckets=64, bag_dim=4, hidden=8, queries=3)
    frozen = fit_head(ROWS[:16], policy, minilm, config)
    tuned = fit_head(ROWS[:16], policy, minilm, replace(config, tuned_layers=1))
    assert ATTEND not in frozen.weights
    assert frozen.weights["hidden.weight"].shape == (8, 384 + 4)
    assert (tuned.weights[ATTEND].shape, tuned.weights["hidden.weight"].shape) == ((3, 384), (8, 4 * 384 + 4))
    assert ATTEND not in fit_head(ROWS[:16], policy, minilm, replace(config, tuned_layers=1, queries=0)).weights


def test_words_left_to_rules_change_nothing(head, minilm):
    word = head.settings.hidden_words[0]
    first, second = (head.score(minilm, [text]) for text in (f"a quiet {word} here", "a quiet person here"))
    np.testing.assert_array_equal(first, second)


def test_the_end_of_a_long_prompt_counts(head, minilm):
    plain = "a quiet lamp on a quiet table, " * 60
    harmful = plain + "a furious bird, a furious road, a furious door, " * 6
    assert head.score(minilm, [harmful])[0, 0] > head.score(minilm, [plain])[0, 0] + 0.1


def test_a_file_is_read_as_written(head, minilm, tmp_path):
    sha = save_head(head, tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert (again.sha256, again.settings) == (sha, head.settings)
    np.testing.assert_allclose(
        again.score(minilm, ["a quiet boat"]), head.score(minilm, ["a quiet boat"]), atol=2e-3
    )  # half precision


def test_refuses_a_file_that_is_no_head(tmp_path):
    with pytest.raises(UserError, match=r"does not exist\. Train a head"):
        load_head(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="could not be read as a guard head"):
        load_head(tmp_path / "bad.safetensors")


def test_refuses_a_file_whose_tensors_do_not_fit(head, tmp_path):
    narrow = {**head.weights, "hidden.weight": head.weights["hidden.weight"][:, 1:]}
    save_head(Head(head.settings, narrow), tmp_path / "narrow.safetensors")
    with pytest.raises(UserError, match="tensors that do not fit its settings"):
        load_head(tmp_path / "narrow.safetensors")


def test_refuses_a_file_with_a_number_that_is_not_finite(head, tmp_path):
    path = tmp_path / "head.safetensors"
    bias = head.weights["hidden.bias"].clone()
    bias[0] = float("nan")
    save_head(Head(head.settings, {**head.weights, "hidden.bias": bias}), path)
    with pytest.raises(UserError, match=r"head\.safetensors: hidden\.bias must be finite, got NaN or infinity"):
        load_head(path)
    save_head(Head(replace(head.settings, thresholds={"balanced": {"any": float("nan")}}), head.weights), path)
    with pytest.raises(UserError, match=r"head\.safetensors: its thresholds must be finite"):
        load_head(path)


def test_a_logit_that_is_not_finite_is_no_probability(head, minilm):
    high = dict(head.weights, **{"out.bias": torch.full_like(head.weights["out.bias"], float("-inf"))})
    assert np.isnan(Head(head.settings, high).score(minilm, ["a boat"])).all()  # the sigmoid of -inf would be 0: harmless


def test_refuses_one_kind_of_rows(policy, minilm):
    with pytest.raises(UserError, match="must be safe and unsafe prompts"):
        fit_head([row(0, "a", 0)], policy, minilm)


def test_a_stage_fires_at_its_threshold(head, minilm):
    level = float(head.score(minilm, ["a furious boat number 1"])[0, 0])
    for limit, fires in ((level, True), (float(np.nextafter(level, 2)), False)):
        thresholds = {"balanced": dict.fromkeys(head.settings.columns, 2.0) | {"any": limit}}
        settings_ = replace(head.settings, thresholds=thresholds)
        verdict = LearnedStage(Head(settings_, head.weights), minilm).check("a furious boat number 1")
        assert verdict.fired == fires


def test_opposing_phrases_are_not_read_and_all_beside_them_is(head, minilm):
    thresholds = {"balanced": dict.fromkeys(head.settings.columns, 2.0)}
    known = Head(replace(head.settings, thresholds=thresholds), head.weights)
    plain, opposing = LearnedStage(known, minilm), LearnedStage(known, minilm, opposing=["anti furious", "an anti", "anti"])
    pairs = [
        ("an anti-furious boat number 1", "boat number 1"),
        ("an AN\u0422I-furious boat number 1", "boat number 1"),  # a Cyrillic T
        ("an anti-furious boat number 1, a furious boat", "boat number 1, a furious boat"),
    ]
    for whole, rest in pairs:
        both = [
            verdict.ranking for verdict in plain.check_many([whole, rest])
        ]  # in one batch, as the stage asks: 8 bits round by batch
        assert opposing.check(whole).ranking == pytest.approx(min(both), abs=1e-6)
    full, left = (plain.check(text).ranking for text in pairs[0])
    assert left < full
    assert left < opposing.check(pairs[2][0]).ranking
    for prompt in ("a furious boat number 1", "an antifurious boat", "a boat"):
        assert opposing.check(prompt).ranking == plain.check(prompt).ranking


def test_an_opposing_phrase_can_only_take_findings_away(head, minilm):
    thresholds = {"balanced": dict.fromkeys(head.settings.columns, 2.0)}
    known = Head(replace(head.settings, thresholds=thresholds), head.weights)
    prompts = ["a calm boat", "a calm furious boat", "calm", "boat"]  # "calm" tells against harm: the rest alone would score higher
    for before, after in zip(
        LearnedStage(known, minilm).check_many(prompts), LearnedStage(known, minilm, opposing=["calm"]).check_many(prompts)
    ):
        assert after.ranking <= before.ranking
    assert LearnedStage(known, minilm, opposing=["calm"]).check("calm").outcome == "pass"


def test_a_stage_needs_its_encoder_and_thresholds(head, minilm):
    with pytest.raises(ValueError, match=r"LearnedStage\.strictness must be one of"):
        LearnedStage(head, minilm)
    other = HeadSettings(categories=("hate",), encoder_sha256="0" * 64, thresholds={"balanced": {}})
    with pytest.raises(UserError, match="trained on another encoder"):
        LearnedStage(Head(other, head.weights), minilm)


scores = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).random((100, 3)).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(scores, scores, st.sampled_from([0.01, 0.02, 0.1]))
def test_calibration_keeps_every_source_in_bounds(one, two, rate):
    limits = calibrate({"one": one, "two": two}, target_fpr=rate)
    for part in (slice(0, 1), slice(1, None)):  # "any" alone, and the categories together without it
        assert flagged_share(one[:, part], limits[part]) <= rate
        assert flagged_share(two[:, part], limits[part]) <= rate


def test_one_odd_prompt_of_a_small_source_sets_no_limit_of_a_category():
    """The columns are cut on all sources together: 0.99 in a source of 100 does not lift the limit above the others' scores."""
    rows = np.linspace(0, 0.5, 1000, dtype=np.float32)[:, None].repeat(3, axis=1)
    odd = np.zeros((100, 3), np.float32)
    odd[0, 2] = 0.99
    limits = calibrate({"large": rows, "small": odd}, target_fpr=0.02)
    assert limits[1] < 0.5
    assert limits[2] < 0.5


def test_low_limits_by_hand():
    """200 found prompts of the category with scores 0.001 to 0.2: all but the lowest may count; of 100 harmless ones 1."""
    unsafe = np.stack([np.ones(200), np.arange(1, 201) / 1000], axis=1)
    harmless = np.stack([np.zeros(100), np.arange(100) / 100], axis=1)
    low = suspicion({"one": harmless}, unsafe, np.ones((200, 1), bool), 0.5, target_fpr=0.01)
    assert low["found"] == [pytest.approx(0.0005, abs=1e-5)]  # a quarter of the second lowest
    assert low["passed"] == [pytest.approx(0.98, abs=1e-5)]
    assert (harmless[:, 1] >= low["passed"][0]).sum() == 1
    harmless[0] = (0.9, 0.3)  # found, and possibly of the category: the one in a hundred is spent
    assert suspicion({"one": harmless}, unsafe, np.ones((200, 1), bool), 0.5, target_fpr=0.01)["passed"] == [
        pytest.approx(0.99, abs=1e-5)
    ]
    few = suspicion({"one": harmless}, unsafe[:50], np.ones((50, 1), bool), 0.5, target_fpr=0.01)
    assert few["found"] == [0.0]  # too few are known: whatever is found may be of the category


def naming_head(head, *, biases, **settings_):
    """The head with constant logits, and thresholds of 0.5 but for those given."""
    weights = dict(head.weights) | {
        "out.weight": torch.zeros_like(head.weights["out.weight"]),
        "out.bias": torch.tensor([biases[name] for name in head.settings.columns]),
    }
    return Head(replace(head.settings, **settings_), weights)


def test_the_category_is_the_most_probable_one_whatever_its_limit(head, minilm):
    """sexual 0.73 under a limit of 0.99 is named, not shocking at 0.62 over a limit of 0.1."""
    logits = dict.fromkeys(head.settings.columns, -5.0) | {"any": 2.0, "sexual": 1.0, "shocking": 0.5}
    limits = dict.fromkeys(head.settings.columns, 0.1) | {"any": 0.5, "sexual": 0.99}
    named = naming_head(head, biases=logits, thresholds={"balanced": limits})
    verdict = LearnedStage(named, minilm).check("a boat")
    assert (verdict.outcome, verdict.category, verdict.also) == ("fire", "sexual", ("shocking",))
    limits["any"] = 0.99  # the categories name, and do not decide
    verdict = LearnedStage(naming_head(head, biases=logits, thresholds={"balanced": limits}), minilm).check("a boat")
    assert (verdict.outcome, verdict.also) == ("pass", ())


def test_low_limits_are_asked_for_apart_from_those_that_fire(head, minilm):
    logits = dict.fromkeys(head.settings.columns, -8.0) | {"sexual": -3.0, "violence": 0.0}  # 0.047 and 0.5
    limits = {"balanced": dict.fromkeys(head.settings.columns, 0.9)}
    none = LearnedStage(naming_head(head, biases=logits, thresholds=limits), minilm).check("a boat")
    assert (none.outcome, none.likely, set(none.possible)) == ("pass", (), set(head.settings.categories))
    low = {
        "found": dict.fromkeys(head.settings.categories, 0.01),
        "passed": dict.fromkeys(head.settings.categories, 0.4),
    }
    verdict = LearnedStage(naming_head(head, biases=logits, thresholds=limits, suspicion=low), minilm).check("a boat")
    assert (verdict.outcome, verdict.likely, verdict.possible) == ("pass", ("violence",), ("violence", "sexual"))


def test_naming_loss_by_hand():
    """Two of three rows name categories: -log(1/2) of logits (0, 0), and 0 where both are named; over three rows."""
    named = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    loss = naming_loss(torch.zeros(3, 2), named, torch.tensor([1.0, 1.0, 1.0]))
    assert loss.item() == pytest.approx(np.log(2) / 3)
    assert naming_loss(torch.zeros(1, 2), named[2:], torch.ones(1)).item() == 0


def test_calibration_spends_what_it_is_given():  # one column: exactly the asked share may be flagged
    values = np.linspace(0, 1, 1000, dtype=np.float32)[:, None]
    assert flagged_share(values, calibrate({"one": values}, target_fpr=0.05)) == pytest.approx(0.05, abs=0.002)


def test_presets_are_ordered():
    rows = np.random.default_rng(0).random((600, 2)).astype(np.float32)
    found = presets({"one": rows}, ("any", "hate"), target_fpr=0.03)
    assert found["strict"]["any"] < found["balanced"]["any"] < found["permissive"]["any"]


def test_refuses_to_calibrate_on_too_few():
    with pytest.raises(UserError, match="at least 100 harmless prompts"):
        calibrate({"one": np.zeros((50, 1), np.float32)}, target_fpr=0.01)


def test_thresholds_belong_to_the_weights_in_the_file(head, policy, minilm, tmp_path):
    """Calibrated heads score as their file does: rounding after calibration would move scores over thresholds."""
    noted = replace(head, settings=replace(head.settings, notes={"trained_on": {"toy": len(ROWS)}, "left_out": [], "config": {}}))
    report = calibrate_and_write(noted, ROWS, policy, tmp_path, encoder=minilm, target_fpr=0.1)
    loaded = load_head(tmp_path / "head.safetensors")
    assert report.sha256 == loaded.sha256
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in as_saved(head).weights.items())
    again = calibrated(loaded, harmless_scores(loaded, minilm, ROWS), target_fpr=0.1, rates={})
    assert again.settings.thresholds == loaded.settings.thresholds


def test_thresholds_hold_in_8_bits_and_in_32(head, minilm, monkeypatch):
    monkeypatch.setattr("valign.recipes.guard_head.has_int8", lambda: True)
    safe = [row.prompt for row in ROWS if not row.label]
    found = harmless_scores(head, minilm, ROWS)["toy"]
    assert (found == np.maximum(head.score(minilm, safe), head.score(minilm, safe, quick=False))).all()
    monkeypatch.setattr("valign.recipes.guard_head.has_int8", lambda: False)
    assert (harmless_scores(head, minilm, ROWS)["toy"] == head.score(minilm, safe, quick=False)).all()
