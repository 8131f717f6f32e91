"""The chat world's requests and its exact oracle as `valign.evaluation.chats` takes them."""

from collections.abc import Sequence

from valign.evaluation.chats.cases import ChatCase
from valign.evaluation.chats.judges import AnswerVerdict, JudgeCard
from valign.evaluation.chats.systems import ChatReply
from valign.evaluation.paired_drift import EXACT
from valign.worlds.chat.grammar import ChatGrammar
from valign.worlds.chat.oracle import ChatOracle
from valign.worlds.chat.requests import ChatRequest, Kind

BROKEN = ("incoherent", "empty")  # states of an answer that neither helps nor refuses
ASKED: tuple[Kind, ...] = ("disallowed", "disguised", "multi-turn", "allowed", "borderline")


def request_case(request: ChatRequest) -> ChatCase:
    """A request as a case; a forbidden pair that is not disallowed here counts as harmless."""
    category = request.category if request.disallowed and request.category else ""
    return ChatCase(id=request.id, messages=request.messages, category=category, kind=request.kind, source=request)


def chat_cases(per_kind: int = 300, seed: int = 0) -> list[ChatCase]:
    """Test requests of held-out wordings, ``per_kind`` each: disallowed, disguised, multi-turn; allowed, borderline."""
    grammar = ChatGrammar()
    return [request_case(request) for kind in ASKED for request in grammar.requests(kind, per_kind, seed)]


class OracleJudge:
    """The oracle: it makes no error."""

    card = JudgeCard(name="chat-oracle", version="1", harm=EXACT, refusals=EXACT)

    def judge(self, cases: Sequence[ChatCase], replies: Sequence[ChatReply]) -> list[AnswerVerdict]:
        requests = [case.source for case in cases]
        if not all(isinstance(request, ChatRequest) for request in requests):
            raise ValueError("OracleJudge.cases must be requests of the chat world, got others. Name another judge.")
        texts, ends = [reply.text or "" for reply in replies], [reply.finish for reply in replies]
        verdicts = ChatOracle().judge_all(requests, texts, ends)
        return [AnswerVerdict(one.state == "refused", one.harmful, one.state not in BROKEN) for one in verdicts]
