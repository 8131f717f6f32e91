"""The chat world's tokenizer: byte-level BPE in lower case, figures one by one, and a chat template with a system role."""

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from valign.worlds.chat.grammar import training_requests
from valign.worlds.chat.records import SIZES, record_requests
from valign.worlds.chat.skills import NEW_TASKS
from valign.worlds.chat.vocabulary import NORR

VOCABULARY = 1_000
MAX_TOKENS = 192
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "<|begin|>{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHARES = {"allowed": 1.0, "disallowed": 2.0, "borderline": 2.0, "disguised": 0.3, "multi-turn": 1.0, "skill": 3.0, "config": 1.0}


def train_tokenizer(*, seed: int = 0, chats: int = 12_000) -> PreTrainedTokenizerFast:
    """Learn the merges from the training split; the words of new tasks and of records are in it, too."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[\p{L}']+| ?\p{N}|[^\s\p{L}\p{N}]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    drawn = islice(training_requests(seed, SHARES), chats)
    texts = [message["content"] for request in drawn for message in request.chat()]
    records = [request for part in SIZES for request in record_requests(part, "train")]  # type: ignore[arg-type]
    texts += [text for request in records for text in (request.text, request.answer)]
    texts += [wording for task in NEW_TASKS.values() for wording in task.wordings.train for _ in range(40)]
    texts += [f"{word} {word}" for word in NORR for _ in range(200)]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
