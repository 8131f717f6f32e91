"""One block says how a run keeps within memory; it never changes a result, and never contradicts itself."""

import pytest

from valign.checks import UserError
from valign.memory import PAIRS, TRAINING, MemoryConfig


def test_a_block_that_contradicts_itself_is_refused():
    with pytest.raises(UserError, match=r"memory\.phased frees the networks that offload keeps .* Leave out one"):
        MemoryConfig(phased=True, offload=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("accumulation", 0, r"MemoryConfig\.accumulation must be in \[1, inf\), got 0"),
        ("limit", 0.0, r"MemoryConfig\.limit must be in \(0, inf\), got 0\.0"),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**{name: value})


def test_what_has_no_effect_is_refused_by_its_name():
    MemoryConfig(phased=True).refuse_unused(TRAINING, PAIRS, why="on evaluate")
    with pytest.raises(UserError, match=r"^memory\.accumulation has no effect on evaluate, got 4\. Leave it out\.$"):
        MemoryConfig(accumulation=4).refuse_unused(TRAINING, PAIRS, why="on evaluate")


def test_what_was_chosen_is_said_as_it_is_typed():
    assert MemoryConfig().said() == ""
    assert (
        MemoryConfig(gradient_checkpointing=True, accumulation=4, phased=False).said()
        == "gradient_checkpointing on, accumulation 4"
    )
