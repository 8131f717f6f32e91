"""What rewrites keep, on prompts that can be counted by hand, and a language model's perplexity."""

from math import exp, log
from types import SimpleNamespace

import pytest
import torch

from valign.checks import UserError
from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.page import diff_page, write_guard_report
from valign.evaluation.guards.rates import Rewrite, Scored
from valign.evaluation.guards.usefulness import diff, ranked, usefulness
from valign.models.language import perplexity
from valign.recipes.guard_head import kept_share


def scored(number, rewrite, source="one"):
    row = LabelledPrompt(f"{source}:{number}", f"a cruel man {number}", 1, (), source, str(number))
    return Scored(row, True, 1.0, "lexical", "", (), "harmful", rewrite)


GOOD = Rewrite(made=True, source="learned", kept=0.75, keep_meaning=0.9, agreed=True, checks=2, perplexity=8.0, text="a kind man 0")
POOR = Rewrite(made=True, source="template", kept=0.25, keep_meaning=0.1, agreed=False, checks=5, keep_subject=False, text="a boat")
FOUR = [scored(0, GOOD), scored(1, POOR), scored(2, Rewrite(made=False, checks=5)), scored(3, None)]


def test_figures_by_hand():
    one = usefulness(FOUR)["all"]
    assert (one["prompts"], one["by"], one["checks"], one["most_checks"]) == (3, {"learned": 1, "template": 1}, 3.5, 5)
    assert one["rewritten"]["value"] == pytest.approx(2 / 3)
    assert (one["template"]["value"], one["agreed"]["value"], one["keep_subject"]["value"]) == (0.5, 0.5, 0.0)
    assert (one["kept"], one["keep_meaning"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert (one["safe_meaning"], one["safe_perplexity"], one["perplexity"]) == (None, None, 8.0)
    assert usefulness(FOUR[3:]) == {}


def test_best_and_worst_with_their_differences(tmp_path):
    assert [one.row.id for one in ranked(FOUR)] == ["one:0", "one:1"]
    assert diff("a cruel man walks", "a kind man") == "a ~~cruel~~ **kind** man ~~walks~~"
    assert "~~cruel~~ **kind**" in diff_page(ranked(FOUR))
    write_guard_report(FOUR, tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| one | 3 | 66.7%" in report
    assert "learned 1, template 1" in report
    assert "cruel" not in report
    assert not (tmp_path / "rewrites.md").exists()  # words of prompts only on demand
    write_guard_report(FOUR, tmp_path, show_prompts=True)
    assert "**kind**" in (tmp_path / "rewrites.md").read_text()


def test_the_share_of_words_that_is_kept():
    assert kept_share("A red, red fox", "the red hen") == pytest.approx(1 / 3)
    assert kept_share("...", "x") == 1.0


class Uniform(torch.nn.Module):
    """Every one of four tokens is as likely as any other."""

    def forward(self, input_ids, labels):
        return SimpleNamespace(loss=torch.tensor(log(4)) if input_ids.shape[1] > 1 else None)


def tokenizer(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [1] * len(text.split())}


@pytest.mark.parametrize(("start", "end"), [(0, None), (None, 3)])
def test_perplexity_of_a_uniform_model_is_its_vocabulary(monkeypatch, start, end):
    tokenizer.bos_token_id, tokenizer.eos_token_id = start, end
    monkeypatch.setattr(perplexity, "load_causal", lambda *_: (tokenizer, Uniform()))
    model = perplexity.LanguageModel("anywhere")
    assert model.perplexities(["a b c", "a"]) == [pytest.approx(exp(log(4)))] * 2
    with pytest.raises(UserError, match="must have a token, got none"):
        model.perplexity("")


def test_a_model_without_a_first_token_is_refused(monkeypatch):
    tokenizer.bos_token_id = tokenizer.eos_token_id = None
    monkeypatch.setattr(perplexity, "load_causal", lambda *_: (tokenizer, Uniform()))
    with pytest.raises(UserError, match="token that begins or ends a text"):
        perplexity.LanguageModel("anywhere")
