"""Chat models behind one method: messages in, text out. Any OpenAI-compatible endpoint, or scripted answers.

A local model is in `valign.models.language.local`, a circuit breaker around any of them in `valign.models.language.breaker`.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from valign.checks import UserError, check_range

MAX_BYTES = 4_000_000  # of an answer; a caption or a verdict has some hundreds
REFUSALS = (400, 404, 413, 422, 501)  # the request is at fault; another one may be answered
NOT_OPENAI = "Check that the address is an OpenAI-compatible one (often it ends in /v1)"
Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text, or a list of texts and images}
Schema = dict[str, Any]  # JSON schema


class ChatUnavailable(UserError):
    """The model cannot answer now, whatever it is asked."""


class ChatRefused(UserError):
    """The model does not take this request; it may take another one."""


@runtime_checkable
class ChatModel(Protocol):
    """Anything that answers a conversation."""

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        """The answer's text. ``schema`` is a wish: a model that cannot be held to it ignores it, so the caller checks."""
        ...


@dataclass(frozen=True, kw_only=True)
class OpenAIChat:
    """A chat model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, Ollama, hosted ones).

    The key is read from the environment when it is needed; it is in no field, message or log.
    """

    base_url: str  # such as http://127.0.0.1:8000/v1
    model: str
    api_key_env: str | None = None  # name of the variable that holds the key; none for an endpoint without keys
    timeout: float = 60.0  # seconds without a byte from the endpoint, and for the whole of an answer's body, for each try
    retries: int = 2  # further tries after a lost connection, a time-out, or status 408, 409, 429, 5xx
    temperature: float = 0.7  # in [0, 2]
    seed: int | None = None  # endpoints honour it as far as they can
    max_tokens: int = 1024  # length of an answer
    _refused: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # options unknown to the endpoint

    def __post_init__(self) -> None:
        check_range("OpenAIChat.timeout", self.timeout, above=0.0)
        check_range("OpenAIChat.retries", float(self.retries), low=0.0)
        check_range("OpenAIChat.temperature", self.temperature, low=0.0, high=2.0)
        check_range("OpenAIChat.max_tokens", float(self.max_tokens), low=1.0)
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"OpenAIChat.base_url must be an http(s) address, got {self.base_url!r}. It often ends in /v1.")
        if not self.model:
            raise UserError("OpenAIChat.model must be the name of a model that the endpoint serves, got none.")
        self._key()

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        """The answer's text, stripped. An endpoint that refuses a schema is asked without one, then and from then on.

        Raises: ChatUnavailable if the endpoint cannot be reached, is too slow, fails, or speaks another protocol; ChatRefused if
            it does not take this request; UserError if it answers with nothing.
        """
        options: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        if schema is not None and "response_format" not in self._refused:
            wanted = {"name": "answer", "schema": schema, "strict": True}
            try:
                return self._ask(messages, options | {"response_format": {"type": "json_schema", "json_schema": wanted}})
            except ChatRefused:
                text = self._ask(messages, options)
            self._refused.add("response_format")
            return text
        return self._ask(messages, options)

    def _ask(self, messages: list[Message], options: dict[str, Any]) -> str:
        import openai

        create = self._client.chat.completions.with_streaming_response.create
        request = {"model": self.model, "messages": messages, "temperature": self.temperature, "max_tokens": self.max_tokens}
        try:
            with create(**request, **options) as response:
                body = self._body(response)
        except openai.APITimeoutError:
            raise self._slow() from None
        except openai.APIConnectionError:
            raise self._down("cannot be reached", "Check the address, and that the server is running") from None
        except openai.AuthenticationError:
            remedy = f"Check the key in {self.api_key_env}" if self.api_key_env else "Name the variable that holds the key"
            raise self._down("refused the key (status 401)", remedy) from None
        except openai.APIStatusError as error:
            what = f"answered with status {error.status_code}: {self._safe(error.message)}"
            kind = ChatRefused if error.status_code in REFUSALS else ChatUnavailable
            raise self._error(what, _remedy(error.status_code), kind) from None
        except openai.OpenAIError as error:
            raise self._down(f"sent no usable answer: {self._safe(str(error))}", NOT_OPENAI) from None
        text = _text(body)
        if text is None:
            raise self._down("sent something that is not a chat completion", NOT_OPENAI)
        if not text.strip():
            raise self._error("sent an empty text", "Raise max_tokens, or choose another model")
        return text.strip()

    def _body(self, response: Any) -> bytes:
        """All of an answer's bytes. The client's own time-out is between bytes, which an endpoint may send for ever."""
        until = monotonic() + self.timeout
        body = bytearray()
        try:
            for chunk in response.iter_bytes():
                body += chunk
                if monotonic() > until:
                    break
                if len(body) > MAX_BYTES:
                    raise self._down(f"sent more than {MAX_BYTES} bytes", NOT_OPENAI)
            else:
                return bytes(body)
        except UserError:
            raise
        except Exception as error:  # of the client's transport, whose classes differ from version to version
            if "Timeout" not in type(error).__name__:
                raise self._down(f"broke off its answer ({type(error).__name__})", "Look into the server's log") from None
        raise self._slow()

    @cached_property
    def _client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=self.base_url, api_key=self._key(), timeout=self.timeout, max_retries=self.retries)

    def _key(self) -> str:
        if self.api_key_env is None:
            return "none"
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise UserError(f"The variable {self.api_key_env} must hold the key for {self.base_url}, got nothing. Export it.")
        return key

    def _safe(self, message: str) -> str:
        """The first 200 characters of what a server said, without the key, should it repeat it."""
        return (message.replace(self._key(), "***") if self.api_key_env else message)[:200].strip().rstrip(".")

    def _slow(self) -> UserError:
        return self._down(f"did not answer within {self.timeout:g} s", "Raise the timeout, or ask for less at a time")

    def _down(self, what: str, remedy: str) -> UserError:
        return self._error(what, remedy, ChatUnavailable)

    def _error(self, what: str, remedy: str, kind: type[UserError] = UserError) -> UserError:
        return kind(f"The chat model {self.model} at {self.base_url} {what}. {remedy}.")


def _remedy(status: int) -> str:
    if status == 404:
        return "Check the model's name and that the address ends in /v1"
    if status == 429:
        return "Wait a while, or ask for less at a time"
    return "Try again later, or look into the server's log" if status >= 500 else "Check the model's name and the options"


def _text(body: bytes) -> str | None:
    """The first choice's text; None if the body has another shape."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


@dataclass
class ScriptedChat:
    """Answers from a list, in order, or from a function of the messages. ``calls`` keeps what was asked."""

    answers: Sequence[str] | Callable[[list[Message]], str]
    calls: list[list[Message]] = field(default_factory=list)

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        self.calls.append(messages)
        if callable(self.answers):
            return self.answers(messages)
        if len(self.calls) > len(self.answers):
            raise ValueError(f"ScriptedChat.answers must hold an answer per call, got {len(self.answers)}. Write more of them.")
        return self.answers[len(self.calls) - 1]
