"""Each row of the table in docs/how-to/realign.md: merged exactly, or refused with its reason, by `merge` and `realign`."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from valign.checks import UserError
from valign.files import write_json
from valign.merging import Expert, merge_sum
from valign.merging.realign import AdapterChanges, RealignContext, Resta, Vectors, open_realignment
from valign.models.files.adapter_files import open_adapter

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OTHER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "realign.md"


def adapter(folder, *, rank=4, other_rank=4, tensors=None, **config):
    """A peft folder of two modules, and its exact dense changes at scale 1."""
    g = torch.Generator().manual_seed(rank)
    found, dense = {}, {}
    for module, r in ((MODULE, rank), (OTHER, other_rank)):
        down, up = torch.randn(r, 6, generator=g), torch.randn(8, r, generator=g)
        found[f"base_model.model.{module}.lora_A.weight"], found[f"base_model.model.{module}.lora_B.weight"] = down, up
        dense[module] = up @ down
    folder.mkdir()
    save_file({**found, **(tensors or {})}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": rank, "lora_alpha": 8, **config})
    return dense


# row of the table -> config, tensors beside the factors, and the scale of each module
MERGED = {
    "alpha other than the rank": ({}, (2.0, 2.0)),
    "rsLoRA": ({"use_rslora": True}, (8 / 4**0.5, 8 / 4**0.5)),
    "`rank_pattern`": ({"other_rank": 2, "rank_pattern": {f"^{OTHER}": 2}}, (2.0, 4.0)),
    "`alpha_pattern`": ({"alpha_pattern": {f"^{OTHER}": 2}}, (2.0, 0.5)),
}
REFUSED = {
    "DoRA": ({"use_dora": True}, None, "must be plain LoRA, got DoRA"),
    "trained biases": ({"bias": "all"}, None, "must be plain LoRA, got trained biases"),
    "LoRA biases": ({"lora_bias": True}, None, "must be plain LoRA, got LoRA biases"),
    "`modules_to_save`": ({"modules_to_save": ["conv_in"]}, None, "must be plain LoRA, got modules_to_save"),
    "LoRA on embeddings": ({}, "base_model.model.embed.lora_embedding_A", "must be plain LoRA, got LoRA on embeddings"),
    "LoHa, LoKr": ({}, f"base_model.model.{MODULE}.hada_w1_a", "must be plain LoRA, got LoHa"),
    "starts that rewrite the base (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)": (
        {"init_lora_weights": "pissa"},
        None,
        "must fit the unchanged base model, got the start 'pissa'",
    ),
    "LoRA on bare parameters": ({"target_parameters": ["w"]}, None, "must be plain LoRA, got LoRA on bare parameters"),
    "trained tokens": ({"trainable_token_indices": [1]}, None, "must be plain LoRA, got trained tokens"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, None, "must be plain LoRA, got replicated layers"),
    "other methods than LoRA": ({"peft_type": "IA3"}, None, "must be LoRA, got IA3"),
}


@pytest.mark.parametrize("row", MERGED)
def test_merged_exactly(row, tmp_path):
    config, scales = MERGED[row]
    dense = adapter(tmp_path / "one", **config)
    opened = open_adapter(tmp_path / "one")
    nothing = {"two": AdapterChanges(opened, "")}
    twice = dict(merge_sum([Expert("one", opened), Expert("two", opened)]))
    vectors = Vectors(AdapterChanges(opened, ""), nothing)
    change = Resta(strength=0.5).prepare(vectors, RealignContext())
    for module, scale in zip((MODULE, OTHER), scales, strict=True):
        assert_close(twice[module].delta(), 2 * scale * dense[module], rtol=1e-4, atol=1e-4)
        assert_close(change(vectors.read(module)).delta(), 1.5 * scale * dense[module], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", REFUSED)
def test_refused_with_the_reason(row, tmp_path):
    config, extra, message = REFUSED[row]
    beside = {extra: torch.zeros(2, 2)} if extra else {}
    adapter(tmp_path / "odd", tensors=beside, **config)
    adapter(tmp_path / "plain")
    with pytest.raises(UserError, match=re.escape(message)):
        open_adapter(tmp_path / "odd")  # what `valign merge` opens
    for aligned, tuned in (("plain", "odd"), ("odd", "plain")):
        with pytest.raises(UserError, match=re.escape(message)):
            open_realignment("base", tmp_path / aligned, [tmp_path / tuned])


def test_the_documentation_has_these_rows():
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in DOCS.read_text().splitlines() if line.startswith("| ")
    }
    assert {name for name, what in rows.items() if what.startswith("exact")} == set(MERGED)
    assert {name for name, what in rows.items() if what.startswith("refused")} == set(REFUSED)
