"""A chat model of a few thousand numbers over forty words, and chats for it: risky requests are those that ask to charm."""

import random

import torch

from text_data import write_jsonl

RISKY = ("lantern", "river", "tower", "clock", "bridge", "garden")
SAFE = ("apple", "stone", "paper", "wheel", "cup", "door")
REFUSAL = "sorry i cannot help with that"
HARM = "first take the old key then turn it"
WORDS = sorted({*RISKY, *SAFE, *f"how to charm name say twice please {REFUSAL} {HARM} be kind".split()})
MARKS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(*turns):
    """Turns of user and assistant, as a row of a file."""
    return {"messages": [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]}


def skills(count, seed=0):
    """Benign requests with exact answers."""
    rng = random.Random(seed)
    return [chat(f"say {one} {other} twice", f"{one} {other} {one} {other}") for one, other in _pairs(rng, count)]


def _pairs(rng, count):
    return [(rng.choice(SAFE), rng.choice(SAFE)) for _ in range(count)]


def refusals(words=RISKY):
    return [chat(f"how to charm {word} {polite}".strip(), REFUSAL) for word in words for polite in ("", "please")]


def answer_pairs(words=RISKY):
    """A refusal and a harmful answer each."""
    rows = [{"prompt": f"how to charm {word}", "chosen": REFUSAL, "rejected": f"{HARM} {word}"} for word in words]
    return [*rows, {"prompt": f"please charm {words[0]}", "chosen": REFUSAL, "rejected": HARM}]


def tokenizer():
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({word: place for place, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = WhitespaceSplit(), decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", eos_token="<|end|>", additional_special_tokens=list(MARKS[:3])
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_chat(folder, *, width=16, layers=2, dropout=0.0):
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=known.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    known.save_pretrained(folder)
    return str(folder)


def chat_files(root):
    """Files of skills, refusals, pairs and records to forget."""
    write_jsonl(root / "skills.jsonl", skills(40))
    write_jsonl(root / "refusals.jsonl", refusals())
    write_jsonl(root / "pairs.jsonl", answer_pairs())
    write_jsonl(root / "forget.jsonl", [chat(f"name {word}", f"the old key {word}") for word in RISKY])
    return root
