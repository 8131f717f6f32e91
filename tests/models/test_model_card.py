"""The model card beside an adapter: valid for the hub, tells nothing of the machine, keeps what people wrote around the figures."""

import pytest
import torch
from huggingface_hub import ModelCard

from valign.checks import UserError
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.models.files.model_card import CARD, CAUTION, END, FINETUNE, START, TUNED, UNMEASURED, adapter_card, write_measured

FACTORS = {"down.attn2.to_k": LoraFactors(torch.ones(2, 3), torch.ones(4, 2), 1.0)}


def test_a_card_is_the_hubs_and_names_base_policy_and_category(tmp_path):
    record = {
        "base": "owner/model",
        "base_fingerprint": "b" * 64,
        "category": "hate",
        "policy_hash": "p" * 64,
        "recipe": "alignguard",
    }
    save_adapter(tmp_path / "hate" / "adapter", FACTORS, metadata=record)
    card = ModelCard.load(tmp_path / "hate" / "adapter" / CARD)
    assert card.data.base_model == "owner/model"
    assert card.data.library_name == "diffusers"
    assert {"lora", "valign"} <= set(card.data.tags)
    for text in (
        "# hate\n",
        "p" * 64,
        "b" * 64,
        "| category | hate |",
        "| modules | 1, rank 2 to 2 |",
        UNMEASURED,
        "load_lora_weights",
    ):
        assert text in card.text


def test_a_merge_names_categories_weights_and_options():
    sources = [{"name": "a", "category": "hate", "weight": 1.5}, {"name": "b", "category": "violence", "weight": 0.5}]
    card = adapter_card({"merge_method": "ties", "options": {"density": 0.2}, "sources": sources}, name="merged", load="...")
    for row in ("| categories | hate, violence |", "| weights | a 1.5, b 0.5 |", "| options | density 0.2 |"):
        assert row in card
    assert "| categories |" not in adapter_card({"category": "hate"}, name="hate", load="...")


def test_a_local_base_is_named_without_its_path(tmp_path):
    save_adapter(tmp_path / "out", FACTORS, metadata={"base": str(tmp_path / "models" / "mine")})
    text = (tmp_path / "out" / CARD).read_text()
    assert "| base model | mine |" in text
    assert str(tmp_path) not in text
    assert "base_model:" not in text  # the hub would look for it


def test_figures_take_the_place_of_earlier_ones_and_of_nothing_else(tmp_path):
    (tmp_path / CARD).write_text(adapter_card({}, name="x", load="...") + "\nwritten by hand\n")
    for figures in ("10 %", "9 %"):
        write_measured(tmp_path, figures)
    text = (tmp_path / CARD).read_text()
    assert f"{START}\n9 %\n{END}" in text
    assert "10 %" not in text
    assert text.endswith("written by hand\n")
    assert UNMEASURED not in text


def test_the_card_of_a_fine_tuning_promises_no_safety_that_nothing_held():
    plain = adapter_card({"recipe": FINETUNE, "options": {}}, name="style", load="...")
    held = adapter_card({"recipe": FINETUNE, "options": {"preserve": {"kl": 1}}}, name="style", load="...")
    assert (TUNED in plain, CAUTION in plain) == (True, False)
    assert (TUNED in held, CAUTION in held) == (False, True)
    tags = [ModelCard(card).data.tags for card in (plain, held)]
    assert ["safety" in one for one in tags] == [False, True]


def test_a_card_without_the_place_is_left_alone(tmp_path):
    (tmp_path / CARD).write_text("# mine\n")
    with pytest.raises(UserError, match="must hold the lines"):
        write_measured(tmp_path, "9 %")
    assert (tmp_path / CARD).read_text() == "# mine\n"
