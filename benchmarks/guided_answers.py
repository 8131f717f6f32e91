"""How often does a chat model answer against house rules without, with random and with retrieved guidelines?

    python benchmarks/guided_answers.py --out runs/guided [--steps 120] [--requests 200] [--seeds 3]

The chat world's aligned model refuses whatever is asked once its system role closes anything, so a copy is fine-tuned first to
read which act a guideline closes: on requests under guidelines about six of the eight harmless acts, under guidelines that are
about something else, and under none. A house then closes three of the six, and the two that no training named. Its library has a
guideline for each of these and for each act that the model refuses anyway; the retriever is fitted on requests in training
wordings. Requests and their wordings are held out. Unsafe is an answer with steps of an act that is closed; shares in % with 95 %
intervals (Wilson) over requests of all seeds, which choose the closed acts and the requests.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from valign.data.chats import Conversation
from valign.data.tasks.base import Task, TaskData
from valign.evaluation.statistics import wilson
from valign.guard.guidelines import GuidedChat, GuidelineRetriever
from valign.models.encoders.minilm import MiniLM
from valign.models.language.chat import ScriptedChat
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.generation import answer_chats
from valign.models.language.loading import load_chat
from valign.policy import Guideline
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.guidelines import fit_guidelines
from valign.training.tasks.supervised import SupervisedConfig, finetune
from valign.worlds.chat import model_folder
from valign.worlds.chat.configs import SafetyConfig
from valign.worlds.chat.grammar import KINDS, ChatGrammar, slots_of
from valign.worlds.chat.measure import MAX_TOKENS
from valign.worlds.chat.oracle import ChatOracle
from valign.worlds.chat.requests import ChatRequest
from valign.worlds.chat.vocabulary import ACTS, HARMLESS_ACTS, THINGS, TOPICS, Pair
from valign.worlds.chat.wordings import FORBID, PLAIN

NAMED, UNNAMED = (tuple(act.verb for act in part) for part in (HARMLESS_ACTS[:6], HARMLESS_ACTS[6:]))  # in training guidelines
CLOSED = 3  # of `NAMED`, by a house


def reader(out: Path, steps: int) -> Path:
    """The aligned model, fine-tuned to read which act a guideline closes; a finished one is taken as it is."""
    draw, chats = np.random.default_rng(0), list[Conversation]()
    for number in range(60):
        closed = draw.choice(NAMED, int(draw.integers(1, 4)), replace=False)
        config = SafetyConfig(forbidden=frozenset(map(str, closed)))
        chats += [conversation(one, draw) for one in ChatGrammar().configured(config, 20, number, split="train")]
    chats += [conversation(one, draw) for kind in KINDS for one in ChatGrammar().requests(kind, 100, 0, split="train")]
    model = ChatTaskModel(load_chat(model_folder("aligned"), device="cpu", dtype="float32"), max_tokens=192)
    data = TaskData(Task(name="chat", kind="chat", score="loss"), tuple(chats[8:]), tuple(chats[:8]))
    config = SupervisedConfig(steps=steps, batch_size=32, validate_every=0)
    return Path(finetune(model, data, out, parse_tuning("full", {"learning_rate": 3e-4}), config, label="reader").adapter)


def conversation(request: ChatRequest, draw: np.random.Generator) -> Conversation:
    """The request with its right answer; under up to two guidelines more, about acts that are refused anyway."""
    acts = [act.ing for topic in TOPICS for act in topic.acts if request.pair is None or act.verb != request.pair.act]
    said = [
        FORBID.train[int(draw.integers(2))].format(ing=acts[place]) for place in draw.permutation(len(acts))[: draw.integers(3)]
    ]
    turns = [(message["role"], message["content"]) for message in request.chat()]
    said += [turns.pop(0)[1]] if turns[0][0] == "system" else []
    return Conversation((*([("system", " ".join(said))] if said else []), *turns))


def library(closed: Sequence[str], wording: str) -> tuple[Guideline, ...]:
    """One guideline per closed act and per act of a topic; what it is for, in training wordings."""
    acts = [*closed, *(act.verb for topic in TOPICS for act in topic.acts)]
    draw = random.Random(0)
    return tuple(
        Guideline(
            id=act,
            text=wording.format(ing=ACTS[act].ing),
            requests=[one.format(**slots_of(Pair(act, draw.choice(THINGS)))) for one in PLAIN.train],
        )
        for act in acts
    )


def systems(requests: Sequence[ChatRequest], guidelines: tuple[Guideline, ...], encoder: MiniLM, seed: int) -> dict[str, list[str]]:
    """The system message of each request, by way; "" for none."""
    pairs = [(asked, number) for number, one in enumerate(guidelines) for asked in one.requests]
    model, _ = fit_guidelines(pairs, [one.text for one in guidelines], encoder)
    draw = random.Random(seed)
    ways: dict[str, list[str]] = {"none": [""] * len(requests)}
    for count in (1, 3):
        retriever = GuidelineRetriever(guidelines, model, lambda: encoder, count)
        ways[f"{count} at random"] = [" ".join(one.text for one in draw.sample(guidelines, count)) for _ in requests]
        ways[f"{count} retrieved"] = [" ".join(one.text for one in retriever.retrieve(asked.text)) for asked in requests]
    guided = GuidedChat(ScriptedChat([]), GuidelineRetriever(guidelines, model, lambda: encoder, 1))
    user = [[{"role": "user", "content": asked.text}] for asked in requests]
    ways["1 retrieved, in GuidedChat's form"] = [guided.guided(one)[0]["content"] for one in user]
    return ways


def measure(model: Path, requests: int, seeds: int, wording: str) -> None:
    chat, encoder, oracle = load_chat(model, device="cpu", dtype="float32"), MiniLM(), ChatOracle()
    found: dict[str, list[tuple[ChatRequest, bool, bool]]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        closed = [*map(str, rng.choice(NAMED, CLOSED, replace=False)), *UNNAMED]
        asked = ChatGrammar().configured(SafetyConfig(forbidden=frozenset(closed)), requests, seed)
        for way, said in systems(asked, library(closed, wording), encoder, seed).items():
            chats = [
                [*([{"role": "system", "content": text}] if text else []), {"role": "user", "content": one.text}]
                for one, text in zip(asked, said)
            ]
            answers = answer_chats(chat, chats, max_tokens=MAX_TOKENS)
            verdicts = oracle.judge_all(asked, [one.text for one in answers], [one.finish for one in answers])
            rows = [(one, verdict.harmful, verdict.state == "refused") for one, verdict in zip(asked, verdicts)]
            found.setdefault(way, []).extend(rows)
    columns = ("closed", "closed, act not in training", "refused anyway", "allowed")
    print(
        f"\nguidelines worded {wording!r}; the last column counts refusals\n| guidelines | {' | '.join(columns)} |\n{'|---' * 5}|"
    )
    for way, rows in found.items():
        house = [(one, harmful) for one, harmful, _ in rows if one.disallowed and one.category is None]
        parts = [[harmful for one, harmful in house if (one.pair.act in UNNAMED) is new] for new in (False, True)]
        parts += [[harmful for one, harmful, _ in rows if one.category is not None]]
        parts += [[given for one, _, given in rows if not one.disallowed]]
        print(f"| {way} | {' | '.join(map(share, parts))} |")


def share(cases: Sequence[bool]) -> str:
    """In %, with its interval and the number of cases."""
    found = wilson(sum(cases), len(cases))
    return f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}] of {len(cases)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="of the fine-tuned model")
    parser.add_argument("--steps", type=int, default=120, help="of the fine-tuning, 32 chats each")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for name, folder in (("shipped", model_folder("aligned")), ("reader", reader(arguments.out, arguments.steps))):
        print(f"\n{name} model")
        for form in (FORBID.train[0], FORBID.test[0]):
            measure(folder, arguments.requests, arguments.seeds, form)
