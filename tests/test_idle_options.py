"""Options that have no effect beside others are refused: a walk over the table of those that depend on others."""

import re
from dataclasses import replace
from importlib import import_module
from inspect import isabstract
from pathlib import Path

import pytest

import valign
from valign.checks import UserError, declared_options, refuse_idle
from valign.merging import MERGES, CoMerge
from valign.recipes.align import AlignConfig
from valign.recipes.alignguard import AlignGuardRecipe

ROOT = Path(valign.__file__).parent


def dependent():
    """Every option of the package that says what it depends on: dataclass and name."""
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        if "needs={" in text:
            module = import_module(".".join(["valign", *path.relative_to(ROOT).with_suffix("").parts]))
            for name in re.findall(r"^class (\w+)", text, re.MULTILINE):
                kind = getattr(module, name)
                if hasattr(kind, "__dataclass_fields__"):
                    kinds = kind.__subclasses__() if isabstract(kind) else (kind,)
                    yield from ((kind, option) for kind in kinds for option, one in declared_options(kind).items() if one.needs)


TABLE = list(dependent())
NEEDED = {"ConceptEdit": {"concepts": ("a storm",)}}  # what has no default


def unmet(kind, other, values):
    """A value of ``other`` with which the option has no effect."""
    declared = declared_options(kind)[other]
    if not values:
        return None if declared.optional else type(declared.default)()
    if isinstance(declared.default, bool):
        return not values[0]
    choices = [choice for choice in declared.choices if choice not in values]
    return choices[0] if choices else Path("somewhere") if values == (None,) and "Path" in str(declared.type) else 0.5


def another(kind, name):
    """A value that is not the option's default."""
    declared = declared_options(kind)[name]
    usual = getattr(kind(**NEEDED.get(kind.__name__, {})), name)
    others = [choice for choice in declared.choices if choice != usual]
    if others:
        return others[0]
    for value in (True, 7, 0.25, ("x",), "x"):
        if isinstance(usual, type(value)) and value != usual:
            return value
    return "x" if "str" in str(declared.type) else 0.25 if declared.type is float else 3


def met(kind, name, *, but):
    """The other options that ``name`` depends on, set so that they are not what is missing."""
    usual, needs = kind(**NEEDED.get(kind.__name__, {})), declared_options(kind)[name].needs
    missing = {one: values for one, values in needs.items() if one != but}
    fine = {one for one, values in missing.items() if (getattr(usual, one) in values if values else getattr(usual, one))}
    return {one: values[0] if values else another(kind, one) for one, values in missing.items() if one not in fine}


def test_the_table_holds_what_is_known_to_depend():
    names = {(kind.__name__, name) for kind, name in TABLE}
    assert {
        ("CoMerge", "top_k"),
        ("PreferenceConfig", "patience"),
        ("DataConfig", "strength"),
        ("SourceOptions", "drop_missing"),
        ("SubjectOptions", "flagged_images"),
        ("Somf", "beta"),
        ("SafeAlign", "tau"),
    } <= names
    assert len(TABLE) >= 60


@pytest.mark.parametrize(("kind", "name"), TABLE, ids=lambda value: getattr(value, "__name__", value))
def test_an_option_is_refused_where_it_has_no_effect(kind, name):
    usual = kind(**NEEDED.get(kind.__name__, {}))
    refuse_idle(usual)
    for other, values in declared_options(kind)[name].needs.items():
        assert other in declared_options(kind)
        without = replace(usual, **met(kind, name, but=other) | {other: unmet(kind, other, values)})
        message = rf"{kind.__name__}\.{name} has no effect unless {other} is .*, got {other} "
        with pytest.raises(UserError, match=message):
            refuse_idle(replace(without, **{name: another(kind, name)}), [name])
        refuse_idle(without, [name])  # at its default, as in a file that holds all options


def test_what_was_not_set_is_told_by_its_default():
    with pytest.raises(UserError, match=r"CoMerge\.top_k has no effect unless vote is 'topk', got vote 'prompt'\. Leave out top_k"):
        CoMerge(top_k=3)
    CoMerge(top_k=3, vote="topk")


def test_a_preset_may_hold_what_the_user_switched_off():
    AlignGuardRecipe.shapes(val_fraction=0.0)
    with pytest.raises(UserError, match=r"PreferenceConfig\.patience has no effect unless val_fraction is set"):
        AlignGuardRecipe.shapes(val_fraction=0.0, patience=3)


def test_a_chain_refuses_what_its_merge_does_not_read(monkeypatch):
    with pytest.raises(UserError, match=r"AlignConfig\.search has no effect with strength 1\.5"):
        AlignConfig(strength=1.5, search=60)
    monkeypatch.setattr(MERGES["sum"], "grid", ())
    with pytest.raises(UserError, match=r"AlignConfig\.search has no effect with the merge sum, which has no grid"):
        AlignConfig(merge="sum", search=60)
    with pytest.raises(UserError, match=r"AlignConfig\.calibration has no effect with the merge mean, which looks at no prompts"):
        AlignConfig(merge="mean", calibration=8)
    with pytest.raises(UserError, match=r"AlignConfig\.calibration has no effect with the merge joint, which looks at no prompts"):
        AlignConfig(merge="joint", calibration=8)
