"""Regression fusion: against least squares on the inputs themselves, its corners, and what it refuses."""

import logging
import sys

import numpy as np
import pytest
import torch
from expert_data import SHAPES, deltas, random_factors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.checks import UserError
from valign.editing.uce import closed_form
from valign.merging import Calibration, DenseDelta, Expert, MergeContext, NamedDeltas, RegMean, regmean, regression
from valign.merging.moments import activation_moments, block_of, text_moments
from valign.merging.regression import Edit, assemble, fuse
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.text_states import token_states

MODULE = sys.modules["valign.merging.regmean"]
TEXT = "attn2.to_k"


def rows_of(count, fan_in, seed):
    return torch.randn(count, fan_in, generator=torch.Generator().manual_seed(seed)).double()


def gram(rows):
    return rows.T @ rows


def named(name, factors, weight=1.0, **metadata):
    return Expert(name, NamedDeltas(factors, metadata={"category": name, **metadata}), weight)


def least_squares(parts, inputs, preserved=None, lam=0.0, mu=0.0, edits=None):
    """X by stacking one equation per input, without a second moment anywhere; ``edits``: (states, moves, weight)."""
    fan_out, fan_in = parts[0].shape
    left = [rows.numpy() for rows in inputs] + [np.sqrt(mu) * np.eye(fan_in)]
    right = [rows.numpy() @ part.numpy().T for rows, part in zip(inputs, parts)] + [np.zeros((fan_in, fan_out))]
    if preserved is not None:
        left.append(np.sqrt(lam) * preserved.numpy())
        right.append(np.zeros((len(preserved), fan_out)))
    if edits is not None:
        states, moves, weight = edits
        left.append(np.sqrt(weight) * states.numpy())
        right.append(np.sqrt(weight) * moves.numpy())
    return torch.from_numpy(np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0].T)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    fan_in=st.integers(2, 12),
    lam=st.floats(0.1, 5.0),
    ridge=st.floats(1e-6, 1e-2),
    edited=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_change_is_the_least_squares_answer(ranks, fan_in, lam, ridge, edited, seed):
    weights = [1.75, -0.5, 1.0, 2.0][: len(ranks)]
    factors = [random_factors({"x": (5, fan_in)}, rank=rank, seed=seed + n)["x"] for n, rank in enumerate(ranks)]
    inputs, preserved = [rows_of(3 + n, fan_in, seed + 10 + n) for n in range(len(ranks))], rows_of(6, fan_in, seed + 50)
    edit = Edit(rows_of(2, fan_in, seed + 60), rows_of(2, 5, seed + 61), 0.7) if edited else None
    experts = [named(str(n), {"x": lora}, weight) for n, (lora, weight) in enumerate(zip(factors, weights))]
    ((_, found),) = regmean(
        experts,
        [{"x": gram(rows)} for rows in inputs],
        {"x": gram(preserved)},
        lam=lam,
        ridge=ridge,
        edits={"x": edit} if edit else None,
    )
    assert found.rank == sum(ranks) + 2 * edited  # exact: nothing was truncated
    mu = ridge * float(preserved.square().sum()) / fan_in
    parts = [weight * lora.delta().double() for weight, lora in zip(weights, factors)]
    wanted = least_squares(parts, inputs, preserved, lam, mu, (edit.states, edit.moves, edit.weight) if edit else None)
    assert_close(found.delta().double(), wanted, rtol=2e-4, atol=2e-5)


def test_dense_changes_give_what_their_factors_give(three):
    moments = [{module: gram(rows_of(30, i, n)) for module, (_, i) in SHAPES.items()} for n in range(3)]
    preserve = {module: gram(rows_of(30, i, 9)) for module, (_, i) in SHAPES.items()}
    whole = [
        Expert(one.name, NamedDeltas({m: DenseDelta(d.delta()) for m, d in one.file.items()}, one.file.metadata), 2.0)
        for one in three
    ]
    low = [Expert(one.name, one.file, 2.0) for one in three]
    expected = deltas(regmean(low, moments, preserve))
    for module, delta in regmean(whole, moments, preserve):
        assert isinstance(delta, DenseDelta)
        assert_close(delta.delta(), expected[module], rtol=1e-4, atol=1e-5)


def test_experts_that_read_apart_are_all_kept_exactly():
    """Orthogonal inputs: each expert's answer on its own is kept, and what is preserved does not move."""
    basis = torch.linalg.qr(rows_of(6, 6, 1)).Q
    inputs, preserved = [basis[:2], basis[2:4]], basis[4:]
    factors = [random_factors({"x": (5, 6)}, rank=3, seed=n)["x"] for n in range(2)]
    experts = [named(str(n), {"x": lora}) for n, lora in enumerate(factors)]
    ((_, found),) = regmean(experts, [{"x": gram(rows)} for rows in inputs], {"x": gram(preserved)}, ridge=1e-9)
    for lora, rows in zip(factors, inputs):
        assert_close(rows @ found.delta().double().T, rows @ lora.delta().double().T, rtol=1e-5, atol=1e-5)
    assert (preserved @ found.delta().double().T).abs().max() < 1e-5


def test_order_names_and_sequence_do_not_matter(three):
    moments = {one.name: {m: gram(rows_of(30, i, n)) for m, (_, i) in SHAPES.items()} for n, one in enumerate(three)}
    expected = deltas(regmean(three, list(moments.values()), None))
    for module, delta in deltas(regmean(three[::-1], moments, None)).items():
        assert_close(delta, expected[module], rtol=1e-4, atol=1e-5)


def test_without_experts_it_is_unified_concept_editing():
    weight, edited, guide, kept = rows_of(5, 7, 1), rows_of(2, 7, 2), rows_of(2, 7, 3), rows_of(4, 7, 4)
    wanted = closed_form(weight, edited, guide, kept, lam=0.5, erase_scale=1.5, preserve_scale=0.3)
    edit = Edit(edited, (guide - edited) @ weight.T, 1.5)
    mean_eigenvalue = float(kept.square().sum()) / 7
    system = assemble([], gram(kept), lam=0.3, ridge=0.5 / mean_eigenvalue, edit=edit)
    assert_close(fuse([], [], system, edit=edit).delta(), wanted.delta(), rtol=1e-5, atol=1e-6)


def test_layers_that_read_the_same_share_one_system(monkeypatch):
    calls = []
    monkeypatch.setattr(regression, "assemble", lambda *a, **k: calls.append(k["name"]) or assemble(*a, **k))
    shapes = {"a.to_k": (3, 6), "a.to_v": (4, 6), "b.to_k": (3, 6), "c.to_q": (3, 6)}
    experts = [named(str(n), random_factors(shapes, seed=n)) for n in range(2)]
    shared = [gram(rows_of(9, 6, n)) for n in range(3)]
    own = gram(rows_of(9, 6, 8))
    moments = [{module: own if module == "c.to_q" else shared[n] for module in shapes} for n in range(2)]
    list(regmean(experts, moments, dict.fromkeys(shapes, shared[2])))
    assert calls == ["a.to_k", "c.to_q"]


def test_rank_truncates_and_says_what_it_cost(three):
    moments = [{module: gram(rows_of(30, i, n)) for module, (_, i) in SHAPES.items()} for n in range(3)]
    errors, conditions = {}, {}
    ranks = [delta.rank for _, delta in regmean(three, moments, None, rank=2, errors=errors, conditions=conditions)]
    assert ranks == [2, 2, 2]
    assert all(0 < error < 1 for error in errors.values())
    exact = deltas(regmean(three, moments, None))
    for module, delta in regmean(three, moments, None, rank=2):
        lost = torch.linalg.matrix_norm(exact[module] - delta.delta()) / torch.linalg.matrix_norm(exact[module])
        assert float(lost) == pytest.approx(errors[module], rel=1e-3)
    whole = sum(one[module] for one in moments)
    whole = whole + 1e-4 * whole.diagonal().mean() * torch.eye(len(whole))
    assert conditions[module] == pytest.approx(float(torch.linalg.cond(whole, 1)), rel=0.5)  # LAPACK estimates it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moments": [{}, {}, {}]}, "every adapted layer, got none of down_blocks.0.to_q and 2 more"),
        ({"moments": {"hate": {}}}, "every expert, got none for shocking, violence"),
        ({"moments": [dict.fromkeys(SHAPES, torch.eye(3))] * 3}, r"must be \[5, 5\] for down_blocks.0.to_q, got \[3, 3\]"),
        ({"preserve": {}}, None),
        ({"lam": -1.0}, r"regmean.lam must be in \[0, inf\), got -1.0"),
        ({"rank": 0}, "regmean.rank"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(change, message, three):
    good = {module: gram(rows_of(30, i, 1)) for module, (_, i) in SHAPES.items()}
    given = {"moments": [good] * 3, "preserve": good} | change
    if message is None:
        assert len(list(regmean(three, **given))) == 3  # nothing to preserve
        return
    with pytest.raises(ValueError, match=message):
        regmean(three, **given)


def test_a_singular_system_is_refused_with_its_condition_number(three):
    few = [{module: gram(rows_of(1, i, n)) for module, (_, i) in SHAPES.items()} for n in range(3)]
    with pytest.raises(UserError, match=r"well conditioned, got the condition number .*Give more prompts or captions, or raise"):
        list(regmean(three, few, few[0], lam=0.0, ridge=0.0))
    bad = [{module: matrix * float("nan") for module, matrix in few[0].items()}, *few[1:]]
    with pytest.raises(UserError, match="moments of hate must be finite"):
        regmean(three, bad, None)


# ---- on a pipeline ----------------------------------------------------------------------------------------------------

PROMPTS = {"hate": ["a red man", "the blue photo", "a man on a photo"], "violence": ["red", "blue woman", "a painting"]}
CAPTIONS = ["a green photo", "a photo of a woman", "yellow"]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(str(tiny_sd), device="cpu")


def experts_on(model, suffixes, *, rank=2):
    shapes = {
        name: tuple(layer.weight.shape)
        for name, layer in model.denoiser.named_modules()
        if name.endswith(suffixes) and isinstance(layer, torch.nn.Linear)
    }
    base = {"base_fingerprint": model.fingerprint()}
    return [named(name, random_factors(shapes, rank=rank, seed=n), **base) for n, name in enumerate(PROMPTS)]


def context_of(model, **changes):
    given = {"prompts": PROMPTS, "captions": CAPTIONS} | changes
    return MergeContext(calibration=Calibration(model=lambda: model, **given))


@torch.no_grad()
def test_text_moments_are_those_of_the_states(model):
    texts = ["a red man", "a photo of a blue woman", ""]
    states = torch.stack([model.encode_prompts([text or " "]).embeds[0] for text in texts]).double()
    wanted = sum(one.T @ one for one in states) / 3
    assert_close(text_moments(model, texts, batch_size=2), wanted, rtol=1e-5, atol=1e-5)
    words = [len(model.tokenizers[0](text or " ").input_ids) for text in texts]
    shorter = sum(one[:count].T @ one[:count] for one, count in zip(states, words)) / 3
    assert_close(text_moments(model, texts, padding=False), shorter, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_activation_moments_are_those_of_the_inputs(model):
    attention = next(name.removesuffix(".to_q") for name, _ in model.denoiser.named_modules() if name.endswith("attn1.to_q"))
    modules = [f"{attention}.{part}" for part in ("to_q", "to_k", "to_out.0")]
    (expert,) = experts_on(model, ("attn1.to_v",))[:1]
    active = {module: expert.factors(module) for module in expert.file.modules}
    found = activation_moments(model, modules, PROMPTS["hate"], active=active, states=2, steps=4, batch_size=2)
    assert found[modules[0]] is found[modules[1]]  # one input, one matrix
    seen = {module: [] for module in modules}
    hooks = [
        model.denoiser.get_submodule(module).register_forward_pre_hook(lambda _, args, m=module: seen[m].append(args[0]))
        for module in modules
    ]
    from valign.merging.denoising import calibration_states

    for module, lora in active.items():
        model.denoiser.get_submodule(module).weight += lora.delta()
    try:
        wanted = [w for prompt in PROMPTS["hate"] for w in calibration_states(model, [prompt], states=2, steps=4, seed=0)]
    finally:
        for module, lora in active.items():
            model.denoiser.get_submodule(module).weight -= lora.delta()
        for hook in hooks:
            hook.remove()
    assert sum(wanted) == 6
    for module in modules:
        rows = torch.cat([x.flatten(0, 1) for x, looked in zip(seen[module], wanted) if looked]).double()
        assert_close(found[module].double(), gram(rows) / 6, rtol=1e-3, atol=1e-3)


def test_layers_come_in_the_order_in_which_they_run(model):
    modules = [name for name, _ in model.denoiser.named_modules() if name.endswith("attn1.to_q")]
    blocks = list(
        dict.fromkeys(name.split(".")[0] for name in activation_moments(model, modules[::-1], ["red"], states=1, steps=1))
    )
    assert blocks == ["down_blocks", "mid_block", "up_blocks"]


def test_a_block_is_the_name_before_the_layer():
    block = "down_blocks.0.attentions.1.transformer_blocks.0"
    assert {block_of(f"{block}.{part}") for part in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")} == {block}
    assert block_of("mid_block.to_v") == "mid_block"


def test_text_layers_are_fused_from_the_text_encoder_alone(model, monkeypatch, caplog):
    monkeypatch.setattr(MODULE, "activation_moments", lambda *a, **k: pytest.fail("no image is needed"))
    experts = experts_on(model, (TEXT,))
    context = context_of(model)
    found = deltas(RegMean(lam=2.0)(experts, context))
    one = [text_moments(model, texts) for texts in (*PROMPTS.values(), CAPTIONS)]
    modules = experts[0].file.modules
    wanted = deltas(regmean(experts, [dict.fromkeys(modules, part) for part in one[:2]], dict.fromkeys(modules, one[2]), lam=2.0))
    for module in modules:
        assert_close(found[module], wanted[module], rtol=1e-4, atol=1e-6)
    assert context.results["condition_worst"] > 1
    caplog.clear()
    for inputs in ("own", "merged"):  # nothing that a text layer reads depends on another layer
        again = deltas(RegMean(lam=2.0, inputs=inputs)(experts, context_of(model)))
        assert all(torch.equal(again[module], found[module]) for module in modules)
        assert ("inputs merged changes nothing here" in caplog.text) == (inputs == "merged")


def test_options_that_change_nothing_are_named(model, caplog):
    RegMean(batch_size=2, edit_weight=3.0)(experts_on(model, (TEXT,)), context_of(model))
    assert "batch_size 2 changes nothing here: all adapted layers read the text alone" in caplog.text
    assert "edit_weight 3.0 changes nothing here: there are no edits" in caplog.text
    caplog.clear()
    RegMean(padding=False, states=1, steps=1)(experts_on(model, ("attn1.to_v",)), context_of(model))
    assert "padding False changes nothing here: no adapted layer reads the text" in caplog.text
    assert "steps" not in caplog.text


def test_regmean_plus_plus_reads_the_merged_model(model):
    experts = experts_on(model, ("attn1.to_v", TEXT))
    options = {"states": 1, "steps": 1, "lam": 0.5}
    own, merged = (deltas(RegMean(inputs=inputs, **options)(experts, context_of(model))) for inputs in ("own", "merged"))
    first = next(name for name, _ in model.denoiser.named_modules() if name.endswith("attn1.to_v"))
    assert set(own) == set(merged) == set(experts[0].file.modules)
    assert_close(own[first], merged[first], rtol=1e-3, atol=1e-5)  # before it nothing is merged
    assert any(not torch.allclose(own[name], merged[name], rtol=1e-2) for name in own if name.endswith("attn1.to_v"))


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_edits_move_the_states_of_their_texts(tokens, model):
    """The command's edits are those of the equations, with the states that UCE edits."""
    experts, pairs, captions = experts_on(model, (TEXT,)), (("red", "green"), ("man", "photo")), ["yellow", "a cat"]
    modules = experts[0].file.modules
    found = deltas(RegMean(edit_weight=3.0, edit_tokens=tokens)(experts, context_of(model, captions=captions, edits=pairs)))
    edited, guides = (token_states(model, texts, tokens) for texts in (["red", "man"], ["green", "photo"]))
    read = [text_moments(model, texts) for texts in (*PROMPTS.values(), captions)]
    weights = {name: model.denoiser.get_submodule(name).weight.detach() for name in modules}
    edits = {name: Edit(edited, (guides - edited) @ weight.T, 3.0) for name, weight in weights.items()}
    moments = [dict.fromkeys(modules, part) for part in read]
    wanted = deltas(regmean(experts, moments[:2], moments[2], edits=edits))
    plain = deltas(regmean(experts, moments[:2], moments[2]))
    for name in modules:
        assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found[name], plain[name], rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"sexual": ["x"]}}, "hate must have unsafe prompts of its category, got only those of sexual"),
        ({"captions": []}, "must have benign captions to preserve, got none"),
        ({"captions": ["yellow", "A red man"]}, "must not hold what is unsafe or edited, got 1 that do, such as 'A red man'"),
        ({"edits": [("yellow", "blue")]}, "must not hold what is unsafe or edited, got 1 that do, such as 'yellow'"),
    ],
)
def test_texts_that_cannot_be_right_are_refused(changes, message, model):
    with pytest.raises(UserError, match=message):
        RegMean()(experts_on(model, (TEXT,)), context_of(model, **changes))


def test_few_prompts_are_warned_of(model, caplog):
    with caplog.at_level(logging.WARNING):
        RegMean()(experts_on(model, (TEXT,)), context_of(model))
    assert "hate must have 8 prompts or more to be told well, got 3" in caplog.text


def test_edits_need_layers_that_read_the_text(model):
    with pytest.raises(UserError, match="edits need experts on keys and values of cross-attention, got none"):
        RegMean()(experts_on(model, ("attn1.to_v",)), context_of(model, captions=["yellow"], edits=(("red", "blue"),)))


def test_experts_of_another_base_and_no_calibration_are_refused(model):
    with pytest.raises(UserError, match="must have a model, unsafe prompts and benign captions; got none"):
        RegMean()(experts_on(model, (TEXT,)), MergeContext())
    other = [Expert(one.name, NamedDeltas(one.file.entries, {"base_fingerprint": "f" * 64})) for one in experts_on(model, (TEXT,))]
    with pytest.raises(UserError, match=r"regmean\.model must be the base of hate"):
        RegMean()(other, context_of(model))
