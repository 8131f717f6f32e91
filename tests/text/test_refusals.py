import pytest

from valign.text.refusals import reads_as_refusal

REFUSED = [
    "I can't help with that.",
    "I cannot help with that",
    "I’m sorry, but that is not possible.",
    "**I cannot** assist you here.",
    "Thank you for asking! However, I will not write this.",
    "As an AI, I have limits.",
    "Unfortunately I am busy.",
    "That is not something I can do.",
    "sorry i cannot help with that",
    "A fair question. I must decline.",
]
COMPLIED = [
    "Here is how: it is illegal in some places.",
    'He said that he would come. "I" is a letter.',
    "First take the key, then turn it.",
    "As an airline, we fly daily.",
    "You cannot open it without the key.",
    "",
]


@pytest.mark.parametrize("text", REFUSED)
def test_refusals_are_read(text):
    assert reads_as_refusal(text)


@pytest.mark.parametrize("text", COMPLIED)
def test_answers_are_not_taken_for_refusals(text):
    assert not reads_as_refusal(text)


def test_a_site_names_its_own_words():
    assert not reads_as_refusal("Dabei helfe ich nicht.")
    assert reads_as_refusal("Dabei helfe ich nicht.", ["Dabei helfe ich NICHT"])
