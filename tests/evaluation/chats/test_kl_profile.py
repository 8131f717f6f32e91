"""KL divergence by token of the answer."""

from pathlib import Path

import pytest
import torch

from chat_models import byte_tokenizer, tiny_llama
from valign.checks import UserError
from valign.evaluation.chats.kl_profile import kl_profile, token_kl
from valign.models.language.loading import LoadedChat
from valign.models.language.renderer import ChatRenderer

CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}] for answer in ("no", "sorry, no", "certainly not")
]


def loaded(seed, **options):
    tokenizer = byte_tokenizer()
    model = tiny_llama(tokenizer, seed=seed, **options).eval()
    return LoadedChat(model, ChatRenderer(tokenizer, model.generation_config, name="tiny"), Path("tiny"))


def test_a_model_is_at_no_distance_from_itself():
    found = kl_profile(loaded(0), loaded(0), CHATS, depth=30)
    assert all(one.kl.value == 0 for one in found)
    assert [one.token for one in found] == list(range(1, 15))  # 13 letters and the end mark of the longest
    assert [one.answers for one in found][:4] == [3, 3, 3, 2]


def test_the_profile_is_the_mean_over_answers_and_batches_do_not_matter():
    first, second = loaded(0), loaded(1)
    found = kl_profile(first, second, CHATS, depth=5)
    alone = [kl_profile(first, second, [chat], depth=5) for chat in CHATS]
    assert found[0].kl.value == pytest.approx(sum(one[0].kl.value for one in alone) / 3)
    assert found[0].kl.value > 0
    assert found[0].kl.low <= found[0].kl.value <= found[0].kl.high
    one_by_one = kl_profile(first, second, CHATS, depth=5, batch_size=1)
    assert [one.kl.value for one in one_by_one] == pytest.approx([one.kl.value for one in found])


def test_the_first_token_is_read_at_the_end_of_the_prompt():
    first, second = loaded(0), loaded(1)
    ids = torch.tensor([first.renderer.prompt(CHATS[0][:1])])
    with torch.no_grad():
        logs = [torch.log_softmax(one.model(input_ids=ids).logits[0, -1].double(), -1) for one in (first, second)]
    expected = float((logs[0].exp() * (logs[0] - logs[1])).sum())
    assert kl_profile(first, second, CHATS[:1], depth=1)[0].kl.value == pytest.approx(expected, rel=1e-5)


def test_closed_form_of_two_words():
    first, second = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert token_kl(first, second).item() == pytest.approx(0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log())


def test_other_vocabularies_and_no_answers_are_refused():
    other = loaded(0)
    other.model.resize_token_embeddings(300)
    with pytest.raises(UserError, match="one vocabulary"):
        kl_profile(loaded(0), other, CHATS)
    with pytest.raises(UserError, match="must hold answers"):
        kl_profile(loaded(0), loaded(0), [])
