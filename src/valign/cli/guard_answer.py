"""``valign guard answer``: a chat model's answers judged by severity, generated again while they are too severe, then refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Option

from valign.checks import UserError
from valign.cli.common import ChatOptions, PromptTableOptions, one_of, out, resolve_chat
from valign.cli.guard_prompts import BLOCKED, File, Json, PolicyName, Prompts, given_prompts, print_line
from valign.cli.options import configured, record, refuse_given

if TYPE_CHECKING:
    from valign.guard.answer_filter import Level
    from valign.models.language.chat import ChatModel, Message

ANSWER: dict[str, Any] = {
    "cls": configured(chat=ChatOptions, table=PromptTableOptions),
    "epilog": 'example: valign guard answer --chat http://127.0.0.1:8000/v1 --chat-model qwen "how are fireworks made?"',
}


def answer_command(
    ctx: typer.Context,
    prompts: Prompts = None,
    file: File = None,
    judge: Annotated[str, Option(help="endpoint or folder of the chat model that says how severe an answer is; --chat's own")] = "",
    judge_model: Annotated[str, Option(help="model that the judge's endpoint serves")] = "default",
    policy: PolicyName = "default",
    allowed: Annotated[
        str,
        Option(
            help="the most severe level that is shown: safe, minor, moderate or severe",
            callback=one_of("--allowed", "safe", "minor", "moderate", "severe"),
        ),
    ] = "safe",
    block: Annotated[
        str,
        Option(
            help="level of a question from which nothing is generated: minor, moderate or severe",
            callback=one_of("--block", "minor", "moderate", "severe"),
        ),
    ] = "severe",
    rounds: Annotated[int, Option(min=1, help="answers that are generated at most before a refusal is given")] = 5,
    warned: Annotated[bool, Option(help="further answers are asked for with a warning that names the category")] = True,
    temperature: Annotated[float, Option(min=0.0, max=2.0, help="of the answers, which must differ from round to round")] = 0.7,
    as_json: Json = False,
) -> None:
    """Answer questions by a chat model; an answer that is judged too severe is generated again, then refused (Safe RLHF-V).

    Exit code 3 if any question got no answer.
    """
    from dataclasses import asdict

    from valign.guard.answer_filter import AnswerFilter
    from valign.guard.severity import ChatSeverity
    from valign.policy import load_policy

    if not judge:
        refuse_given(ctx, "without --judge", "judge_model")
    options = record(ctx, ChatOptions)
    if options.chat is None:
        raise UserError("--chat must name the model that answers, got none. Give an endpoint's address, or a folder.")
    judging = resolve_chat(judge or options.chat, model=judge_model if judge else options.chat_model, key_env=options.key_env)
    keeper = AnswerFilter(
        judge=ChatSeverity(judging, load_policy(policy)),
        allowed=cast("Level", allowed),  # checked there
        block=cast("Level", block),
        rounds=rounds,
        warned=warned,
    )
    chat = resolve_chat(options.chat, model=options.chat_model, key_env=options.key_env, temperature=temperature)
    refused = False
    for question in given_prompts(ctx, prompts, file):
        found = keeper(question, lambda number, warning: _generated(chat, question, number, warning))  # noqa: B023 - called at once
        refused |= found.action in ("refused", "blocked")
        if as_json:
            print_line(asdict(found))
        else:
            out.print(found.text, markup=False, soft_wrap=True)
    raise typer.Exit(BLOCKED if refused else 0)


def _generated(chat: ChatModel, question: str, number: int, warning: str) -> str:
    """The answer of that round; a local model draws anew, which it would not do for an equal question."""
    from valign.models.language.local import LocalChat

    if isinstance(chat, LocalChat):
        chat.seed = number
    system: list[Message] = [{"role": "system", "content": warning}] if warning else []
    return chat.complete([*system, {"role": "user", "content": question}])
