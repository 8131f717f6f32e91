import math

import pytest
import torch
from torch.testing import assert_close

from valign.models.hyperbolic.lorentz import distance, exp_root, root_distance
from valign.models.hyperbolic.traversal import GROUPS
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings
from valign.objectives.hyperbolic.safe_redirection import SafeRedirection
from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment, contrast, entailment


def features(rows=6, dim=8, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, rows, dim, dtype=torch.float64, generator=generator)


def embeddings(groups):
    return QuadrupleEmbeddings(safe_text=groups[0], safe_image=groups[1], unsafe_text=groups[2], unsafe_image=groups[3])


def test_contrast_is_the_mean_of_both_directions():  # written out row by row
    x, y = features()[:2]
    c, scale, rows = 0.7, 3.0, range(6)
    far = [[float(distance(x[i], y[j], c)) for j in rows] for i in rows]
    there = [-math.log(math.exp(-scale * far[i][i]) / sum(math.exp(-scale * far[i][j]) for j in rows)) for i in rows]
    back = [-math.log(math.exp(-scale * far[i][i]) / sum(math.exp(-scale * far[j][i]) for j in rows)) for i in rows]
    assert float(contrast(x, y, scale, c)) == pytest.approx((sum(there) + sum(back)) / 12)


def test_seven_terms_are_summed_and_divided_by_49():
    objective = SafetyEntailment()
    terms = objective.terms(embeddings(features()), 5.0, 1.0)
    assert [name for name in terms if ">" in name] == ["safe_text>safe_image", "unsafe_text>unsafe_image", "safe_image>unsafe_text"]
    assert len(terms) == 7
    assert_close(objective.total(terms), sum(terms.values()) / 49)
    heavy = SafetyEntailment(entailment_weight=3.0)
    weighted = sum((3.0 if ">" in name else 1.0) * value for name, value in terms.items())
    assert_close(heavy.total(terms), weighted / (7 * 13))


def test_order_within_a_modality_adds_two_terms():
    objective = SafetyEntailment(within_weight=2.0)
    e = embeddings(features())
    terms = objective.terms(e, 5.0, 1.0)
    assert len(terms) == 9
    assert_close(terms["safe_image>>unsafe_image"], entailment(e.safe_image, e.unsafe_image, 1.0))
    weighted = sum((2.0 if ">>" in name else 1.0) * value for name, value in terms.items())
    assert_close(objective.total(terms), weighted / (9 * 11))


def test_what_lies_further_out_on_the_ray_costs_nothing_and_the_other_way_it_does():
    near = exp_root(0.3 * features()[0], 1.0)
    assert float(entailment(near, 2.5 * near, 1.0)) == 0.0
    assert float(entailment(2.5 * near, near, 1.0)) > 1.0


def test_a_chain_along_one_ray_is_entailed_throughout():
    ray = 0.5 * features()[0]
    groups = [exp_root(ray * factor, 1.0) for factor in (1.0, 1.5, 2.0, 2.5)]
    terms = SafetyEntailment().terms(embeddings(groups), 5.0, 1.0)
    assert all(float(value) == 0.0 for name, value in terms.items() if ">" in name)


@pytest.mark.slow
def test_free_embeddings_come_to_the_order_of_the_groups():  # the card's experiment, shortened; without entailment it is not held
    def train(weight):
        groups = torch.nn.Parameter(features(12, 16, seed=3, scale=0.25))
        curvature = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = torch.optim.Adam([groups, curvature], lr=3e-2)
        objective = SafetyEntailment(entailment_weight=weight)
        for _ in range(100):
            points = exp_root(groups, curvature.exp())
            loss = sum(
                (weight if ">" in name else 1.0) * value
                for name, value in objective.terms(embeddings(points), 14.0, curvature.exp()).items()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return root_distance(exp_root(groups, curvature.exp()), curvature.exp()).mean(1).tolist()

    ordered = train(1.0)
    assert ordered == sorted(ordered)
    assert ordered[3] > 1.5 * ordered[0]
    free = train(0.0)
    assert max(free) < 1.5 * min(free)


def test_captions_alone_have_one_contrast_and_one_entailment():
    x = features()
    terms = SafetyEntailment().terms(QuadrupleEmbeddings(safe_text=x[0], unsafe_text=x[2]), 5.0, 1.0)
    assert list(terms) == ["safe_text~unsafe_text", "safe_text>unsafe_text"]
    assert_close(SafetyEntailment().total(terms), sum(terms.values()) / 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"unsafe_text": torch.zeros(5, 8, dtype=torch.float64)},
            r"unsafe_text must have shape \(6, 8\) as safe_text, got \(5, 8\)",
        ),
        ({"safe_image": torch.zeros(6, 7, dtype=torch.float64)}, r"safe_image must have shape \(6, 8\) as safe_text, got \(6, 7\)"),
        ({"unsafe_image": None}, "must have safe and unsafe images, or no images; got one of the two"),
        ({"safe_text": torch.full((6, 8), float("nan"), dtype=torch.float64)}, "safe_text must be finite, got NaN or infinity"),
    ],
)
def test_groups_that_do_not_fit_are_refused(as_in_use, change, said):
    x = features()
    groups = {"safe_text": x[0], "safe_image": x[1], "unsafe_text": x[2], "unsafe_image": x[3]}
    with pytest.raises(ValueError, match=said):
        QuadrupleEmbeddings(**groups | change)


def test_a_batch_of_one_warns():
    with pytest.warns(UserWarning, match="one row: its contrastive losses have no negatives"):
        QuadrupleEmbeddings(safe_text=torch.ones(1, 3), unsafe_text=torch.ones(1, 3))


@pytest.mark.parametrize(("name", "value"), [("min_radius", 0.0), ("aperture_scale", -1.0), ("entailment_weight", -0.1)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"SafetyEntailment\.{name} must be in"):
        SafetyEntailment(**{name: value})


def test_the_groups_are_named_from_the_root_outwards():
    assert GROUPS == ("safe_text", "safe_image", "unsafe_text", "unsafe_image")


# ---- Safe-CLIP -------------------------------------------------------------------------------------------------------


def test_redirection_is_least_where_unsafe_content_lies_on_its_counterpart():
    x = features()
    frozen = embeddings(x)
    moved = embeddings([x[0], x[1], x[0], x[1]])
    terms, apart = SafeRedirection().terms(moved, frozen, 10.0), SafeRedirection().terms(frozen, frozen, 10.0)
    for name in ("redirect_text_cosine", "redirect_image_cosine", "keep_text_cosine", "keep_image_cosine"):
        assert float(terms[name]) == pytest.approx(0.0, abs=1e-12)
    assert float(apart["redirect_text_cosine"]) > 0.5
    assert_close(terms["redirect_text"], terms["keep_text"])


def test_its_weight_counts_for_the_moved_groups_alone():
    x = features()
    terms = SafeRedirection().terms(embeddings(x), embeddings(features(seed=1)), 10.0)
    expected = sum((2.0 if name.startswith("redirect") else 1.0) * value for name, value in terms.items())
    assert_close(SafeRedirection(redirection_weight=2.0).total(terms), expected)


def test_it_needs_images():
    x = features()
    alone = QuadrupleEmbeddings(safe_text=x[0], unsafe_text=x[2])
    with pytest.raises(ValueError, match="SafeRedirection needs images, got captions alone"):
        SafeRedirection().terms(alone, alone, 10.0)
