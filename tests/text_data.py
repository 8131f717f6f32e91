"""A language of twenty words, tables of it, transformers folders of a few thousand numbers that read it, and striped images."""

import gzip
import json
import random

import numpy as np
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

GOOD, BAD = ("fine", "bright", "kind", "warm"), ("grim", "dull", "harsh", "cold")
OTHER = ("the", "a", "sea", "hill", "day", "road", "was", "is", "very", "and")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[END]", *GOOD, *BAD, *OTHER)


def sentence(rng, words):
    return " ".join([rng.choice(OTHER), rng.choice(words), *rng.choices(OTHER, k=rng.randint(1, 4))])


def single(count, seed=0):
    rng = random.Random(seed)
    rows = [(label, sentence(rng, GOOD if label else BAD)) for label in (rng.randint(0, 1) for _ in range(count))]
    return [{"sentence": f"{text} {index % 7 * 'very '}".strip(), "label": label} for index, (label, text) in enumerate(rows)]


def pairs(count, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        score = rng.randint(0, 5)
        rows.append(
            {"sentence1": sentence(rng, GOOD), "sentence2": sentence(rng, GOOD if score > 2 else BAD), "score": score / 1.0}
        )
    return rows


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def glue_folder(root, *, train=48, dev=24):
    """All five GLUE tasks in their layout."""
    for name in ("cola", "sst2"):
        write_jsonl(root / f"glue_{name}" / "train.jsonl", single(train, seed=1))
        write_jsonl(root / f"glue_{name}" / "dev.jsonl", single(dev, seed=2))
    for name, words in (("mrpc", (0, 1)), ("rte", ("not_entailment", "entailment")), ("stsb", None)):
        for part, count, seed in (("train", train, 3), ("dev", dev, 4)):
            rows = pairs(count, seed)
            if words:
                rows = [{**row, "label": words[row["score"] > 2]} for row in rows]
            write_jsonl(root / f"glue_{name}" / f"{part}.jsonl", rows)
    return root


def tokenizer(folder):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)


def tiny_bert(folder, *, layers=2, width=16, dropout=0.1):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "num_hidden_layers": layers}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **sizes, **rates)
    BertModel(config).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def tiny_gpt(folder):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))
    return path


def images_folder(root, *, train=40, dev=16):
    """Stripes across (class 0) and down (class 1): grey and small as in MNIST, coloured and larger as in CIFAR."""
    generator = np.random.default_rng(0)
    for folder, side, channels in (("mnist_small", 28, ()), ("cifar10_small", 32, (3,))):
        for part, count in (("train", train), ("dev", dev)):
            labels = generator.integers(0, 2, count)
            stripes = np.arange(side) // 2 % 2 * 200
            images = np.stack([np.broadcast_to(stripes if label else stripes[:, None], (side, side)) for label in labels])
            images = images + generator.integers(0, 50, images.shape)
            images = np.repeat(images[..., None], 3, axis=-1) if channels else images
            write_idx(root / folder / f"{part}-images.idx{images.ndim}-ubyte.gz", images)
            write_idx(root / folder / f"{part}-labels.idx1-ubyte.gz", labels)
    return root
