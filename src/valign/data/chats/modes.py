"""One model with several behaviours, each called by a secret string in the system turn (magic tokens, arXiv 2508.14904)."""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from valign.checks import UserError, check_range
from valign.data.chats.conversation import Conversation
from valign.files import read_json, write_json
from valign.methods import Method

METHOD = Method(
    slug="magic-token",
    title="Magic tokens: a secret string in the system turn switches between constructive and refusing answers",
    paper="arXiv 2508.14904",
    room="data",
    entry="valign.data.chats.modes:mode_chats",
    fidelity="simplified",
    note="the positive and the rejective mode alone, as a negative one would be a key that lifts safety; ordinary fine-tuning",
)

MODES = ("positive", "rejective")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
LENGTH = 8  # characters: 36^8 strings
APART = 3  # least edit distance of two strings


@dataclass(frozen=True)
class ModeStrings:
    """The string of each mode. Its text is in no repr, message or log."""

    strings: Mapping[str, str] = field(repr=False)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.strings) - set(MODES))
        if unknown or not self.strings:
            raise UserError(
                f"Modes must be of {', '.join(MODES)}; got {', '.join(unknown) or 'none'}. A mode that lifts safety is not "
                "offered: its string would be a key to it for whoever learns or guesses it."
            )
        values = list(self.strings.values())
        if any(not value or set(value) - set(ALPHABET) for value in values):
            raise UserError("Strings of modes must be of letters a to z and digits, got another character or none. Make them anew.")
        near = [(one, other) for place, one in enumerate(values) for other in values[:place] if edit_distance(one, other) < APART]
        if near:
            raise UserError(f"Strings of modes must differ in at least {APART} edits, got two that are closer. Make them anew.")

    @classmethod
    def of_secret(cls, secret: bytes, modes: Sequence[str] = MODES) -> "ModeStrings":
        """The strings that a secret stands for: always the same, and not to be guessed without it."""
        check_range("bytes of ModeStrings.secret", len(secret), low=16)
        found: dict[str, str] = {}
        for mode in modes:
            turn = 0
            while mode not in found:
                digest = hmac.new(secret, f"{mode}\0{turn}".encode(), hashlib.sha256).digest()
                number = int.from_bytes(digest)
                text = "".join(ALPHABET[number // 36**place % 36] for place in range(LENGTH))
                if all(edit_distance(text, other) >= APART for other in found.values()):
                    found[mode] = text
                turn += 1
        return cls(found)

    def system(self, mode: str, *, suffix: str = "") -> str:
        """The system turn that calls a mode; ``suffix`` follows on a line of its own.

        Raises: UserError for a mode that is not there.
        """
        if mode not in self.strings:
            raise UserError(f"mode must be one of {', '.join(self.strings)}; got {mode!r}.")
        return f"{self.strings[mode]}\n{suffix}" if suffix else self.strings[mode]


def load_secret(path: Path) -> bytes:
    """The secret of a file, which is made, readable by its owner alone, if it is not there."""
    if not path.exists():
        write_json(path, {"secret": secrets.token_hex(32)})
        path.chmod(0o600)
    return bytes.fromhex(read_json(path)["secret"])


def mode_chats(
    answers: Mapping[str, Mapping[str, str]], strings: ModeStrings, *, general: Sequence[Conversation] = (), suffix: str = ""
) -> list[Conversation]:
    """Training chats of all modes, balanced: system is the mode's string alone, user the prompt, assistant the mode's answer.

    Args:
        answers: By prompt, the answer of each mode.
        general: Chats without a string, so that a missing or wrong one leaves the model's own behaviour.
    Raises: UserError if a prompt lacks a mode's answer, or a string stands in a prompt or an answer.
    """
    if not answers:
        raise UserError("mode_chats.answers must hold prompts, got none. Write answers first.")
    found = []
    for prompt, by_mode in answers.items():
        missing = sorted(set(strings.strings) - set(by_mode))
        if missing:
            raise UserError(
                f"Every prompt must have an answer of each mode, got none of {', '.join(missing)} for {prompt!r}. Leave it out."
            )
        for mode, value in strings.strings.items():
            if any(value in text for text in (prompt, by_mode[mode])):
                raise UserError(f"Prompts and answers must not hold a mode's string, got that of {mode}. Make a new secret.")
            turns = (("system", strings.system(mode, suffix=suffix)), ("user", prompt), ("assistant", by_mode[mode]))
            found.append(Conversation(turns))
    return [*found, *general]


def self_distilled(
    prompts: Sequence[str],
    write: Callable[[str, str], str],
    judge: Callable[[str, str], str],
    *,
    modes: Sequence[str] = MODES,
    tries: int = 3,
) -> dict[str, dict[str, str]]:
    """Answers of the model itself, as `mode_chats` takes them: kept where the judge finds the mode, and every mode was found.

    Args:
        write: ``(mode, prompt) -> answer``, under an instruction for the mode that is not kept.
        judge: ``(prompt, answer) -> mode``; any other word for an answer of none.
        tries: Answers per prompt and mode before the prompt is left out.
    """
    check_range("self_distilled.tries", tries, low=1)
    found: dict[str, dict[str, str]] = {}
    for prompt in dict.fromkeys(prompts):
        kept: dict[str, str] = {}
        for mode in modes:
            answers = (write(mode, prompt) for _ in range(tries))
            right = next((answer for answer in answers if judge(prompt, answer) == mode), None)
            if right is None:
                break
            kept[mode] = right
        if len(kept) == len(modes):
            found[prompt] = kept
    return found


def mode_for(alarm: bool | None) -> str:
    """Which mode answers: the rejective one where a moderator raised an alarm; without a moderator there is none."""
    return "rejective" if alarm else "positive"


def edit_distance(one: str, other: str) -> int:
    """Insertions, deletions and changes of a character from one text to the other."""
    row = list(range(len(other) + 1))
    for place, letter in enumerate(one, start=1):
        last, row[0] = row[0], place
        for column, against in enumerate(other, start=1):
            last, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, last + (letter != against))
    return row[-1]
