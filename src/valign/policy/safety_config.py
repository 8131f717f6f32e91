"""Safety configs (CoSA, arXiv 2410.08968): one plain sentence per rule, read strictly by the words of a policy.

``allows stage blood in theatre posters; blocks violence`` becomes statements. A sentence is a verb, what it is about, and where::

    SENTENCE  = [this site | we] VERB TARGET {, TARGET | and TARGET} [(in | on | for) SCOPE]
    VERB      = allow permit open show | block forbid ban refuse never-show | rewrite soften      (in any usual form)
    TARGET    = a category (id, title), a concept (id, name, paraphrase), a listed term, a phrase under config_phrases, or a short
                phrase that holds a listed term
    SCOPE     = words that a prompt must all hold for the sentence to count

No model reads a config, so nothing in it can be talked into something else: what is not such a sentence is refused. Anyone may
tighten. To loosen, the writer's role must stand in the category's ``may_open``; what is ``never_open``, or what a block rule is
about, no role can open. Where sentences of one config disagree, the strictest counts.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from valign.checks import UserError, close_to
from valign.files import hash_value
from valign.methods import Method
from valign.policy.block_rules import BlockRules
from valign.policy.schema import Action, Category, Concept, Policy
from valign.text import WordList, clean, fold

METHOD = Method(
    slug="safety-config",
    title="Safety configs: plain sentences that open or close categories of the guard, by role",
    paper="arXiv 2410.08968",
    room="policy",
    entry="valign.policy.safety_config:read_guard_config",
    fidelity="variant",
    note="the guard enforces the config by rules; the paper trains a chat model to follow it",
)
ANYONE = ""  # the role of whoever has none
STRICTNESS: dict[Action, int] = {"allow": 0, "rewrite": 1, "block": 2}
MAX_CHARS = 2000  # of a config
MAX_STATEMENTS = 64
LONGEST_PHRASE = 6  # words of a phrase that is not a name of the policy but holds a listed term

_VERBS: dict[Action, str] = {
    "block": r"(?:do|does|must|may|can|should)(?: not|n['’]t) (?:allow|permit|open|show|accept)|cannot show"
    r"|never (?:allow|permit|open|show|accept)s?|blocks?|forbids?|bans?|refuses?|no",
    "rewrite": r"rewrites?|softens?",
    "allow": r"allows?|permits?|opens?|accepts?|(?:may|can) (?:show|open)",
}
_SENTENCE = re.compile(
    r"(?:please |this (?:site|app|server|key|studio) |the (?:site|app|server|studio) |we |it )?(?:"
    + "|".join(f"(?P<{action}>{verbs})" for action, verbs in _VERBS.items())
    + r")\s+(?P<body>.+)",
    re.IGNORECASE | re.DOTALL,
)
_CUT = re.compile(r"[;\n]+|\.(?:\s+|$)|,?\s+but\s+", re.IGNORECASE)
_SCOPE = re.compile(r"\s+(?:in|on|for)\s+", re.IGNORECASE)
_LIST = re.compile(r"\s*,\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+", re.IGNORECASE)
_ARTICLE = re.compile(r"(?:a|an|the|any|all|some) ")
_EMPTY_WORDS = frozenset(
    ["a", "an", "the", "any", "all", "some", "of", "for", "in", "on", "at", "to", "with", "and", "or", "by", "from"]
)
_UNREADABLE = frozenset(  # words that turn a sentence round: a target or a scope that holds one is refused
    {"not", "no", "never", "except", "excepting", "unless", "but", "without", "only", "other", "anything", "everything", "everyone"}
    | {"ignore", "instead", "whatever", "all", "any", "dont", "doesnt", "cannot"}
)


@dataclass(frozen=True, kw_only=True)
class ConfigStatement:
    """One rule of a config, in the policy's terms."""

    action: Action
    name: str  # id of the category or concept, or the phrase as it was written
    categories: tuple[str, ...]  # whose action changes, or that the phrases belong to
    phrases: tuple[str, ...] = ()  # folded; the part of the categories that is meant. None: the whole category
    scope: tuple[str, ...] = ()  # folded words of prompts for which it counts; none: all prompts

    def __str__(self) -> str:
        part = f" ({', '.join(self.categories)})" if self.phrases else ""
        return f"{self.action} {self.name}{part}" + (f" in {' '.join(self.scope)}" if self.scope else "")

    def holds_for(self, text: str) -> bool:
        """Whether the folded text holds every word of the scope, in the singular or the plural."""
        words = set(map(stem, text.split()))
        return all(stem(word) in words for word in self.scope)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What `read_guard_config` read. ``str`` gives it in one form, whatever words it was written in."""

    statements: tuple[ConfigStatement, ...]
    role: str = ANYONE  # of who wrote it

    def __str__(self) -> str:
        return "; ".join(map(str, self.statements))

    def fingerprint(self) -> str:
        """SHA-256 of the statements and the role."""
        return hash_value([self.role, *map(str, self.statements)])


def roles_of(policy: Policy) -> tuple[str, ...]:
    """Every role that some category may be opened by, sorted."""
    return tuple(sorted({role for category in policy.categories for role in category.may_open}))


def openable(policy: Policy, role: str) -> frozenset[str]:
    """Ids of the categories that a config of this role may open."""
    return frozenset(one.id for one in policy.categories if role in one.may_open and not one.never_open)


def loosens(policy: Policy, statement: ConfigStatement) -> bool:
    """Whether the statement asks for less than the action of a category that it is about."""
    return any(STRICTNESS[statement.action] < STRICTNESS[policy.category(name).action] for name in statement.categories)


def read_guard_config(policy: Policy, text: str, *, role: str = ANYONE) -> GuardConfig:
    """The statements of a config's text, written by somebody with ``role`` (`ANYONE` may only tighten).

    Raises: UserError for an unknown role; a sentence of another form; a target that the policy does not know; a statement that
        loosens what the role may not open, what is never opened, or what a block rule is about.
    """
    known = roles_of(policy)
    if role != ANYONE and role not in known:
        raise UserError(
            f"role must be one of {', '.join(known) or '(none)'} (policy {policy.id}); got {role!r}.{close_to(role, known)} "
            "Roles stand under may_open of the policy's categories."
        )
    if len(text) > MAX_CHARS:
        raise UserError(f"config must have at most {MAX_CHARS} characters, got {len(text)}. Put lasting rules into the policy.")
    sentences = [sentence for part in _CUT.split(clean_lines(text)) if (sentence := part.strip(" ,."))]
    if not sentences:
        raise UserError('config must hold a sentence, got nothing. Write for example "blocks violence in posters".')
    vocabulary = _vocabulary(policy)
    statements = [one for sentence in sentences for one in _statements(vocabulary, sentence)]
    if len(statements) > MAX_STATEMENTS:
        raise UserError(f"config must hold at most {MAX_STATEMENTS} statements, got {len(statements)}. Name whole categories.")
    for statement in statements:
        _check_authority(policy, statement, role)
    return GuardConfig(statements=tuple(dict.fromkeys(statements)), role=role)


def join_configs(first: GuardConfig | None, second: GuardConfig | None) -> GuardConfig | None:
    """Both at once, so that the strictest counts; None for two that are None."""
    if first is None or second is None:
        return first or second
    return GuardConfig(statements=tuple(dict.fromkeys((*first.statements, *second.statements))), role=first.role)


def clean_lines(text: str) -> str:
    """`valign.text.clean` line by line: a line's end is the end of a sentence."""
    return "\n".join(clean(line) for line in text.splitlines())


def stem(word: str) -> str:
    """The word without the ending of a plural; crude, and the same for singular and plural of regular nouns."""
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("shes", "ches", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _check_authority(policy: Policy, statement: ConfigStatement, role: str) -> None:
    """Raises: UserError unless the statement tightens, or ``role`` may loosen all that it is about."""
    if not loosens(policy, statement):
        return
    for category in map(policy.category, statement.categories):
        if category.never_open:
            raise UserError(
                f"config: {statement.action} {statement.name!r} would open {category.id}, which policy {policy.id} never opens. "
                "Take the sentence out."
            )
        if role not in category.may_open:
            allowed = ", ".join(category.may_open) or "none"
            who = f"the role {role!r}" if role else "somebody without a role"
            raise UserError(
                f"config: {statement.action} {statement.name!r} would open {category.id}, which {who} may not. Roles that may "
                f"(policy {policy.id}): {allowed}. Anyone may tighten."
            )
    words = " ".join((statement.name, *statement.phrases, *statement.scope))
    rule = BlockRules(policy.always_block).match(words, statement.categories)
    if rule is not None:
        raise UserError(
            f"config: {statement.action} {statement.name!r} is about what the block rule {rule.id} always blocks; no config opens "
            "that. Take the sentence out."
        )


def _statements(vocabulary: "_Vocabulary", sentence: str) -> Iterator[ConfigStatement]:
    match = _SENTENCE.fullmatch(sentence)
    if match is None:
        raise UserError(
            f"config must be made of sentences such as 'allows stage blood in theatre posters' or 'blocks violence', got "
            f"{_short(sentence)}. A verb comes first: allow, block or rewrite."
        )
    action: Action = next(name for name in STRICTNESS if match[name])
    targets, scope = _split(vocabulary, match["body"].strip().strip('"').strip())
    for name, categories, phrases in targets:
        if action == "rewrite" and phrases:
            raise UserError(f"config: rewrite takes a whole category, got {name!r}. Write the category, or `blocks {name}`.")
        yield ConfigStatement(action=action, name=name, categories=categories, phrases=phrases, scope=scope)


_Target = tuple[str, tuple[str, ...], tuple[str, ...]]  # name, categories, phrases


def _split(vocabulary: "_Vocabulary", body: str) -> tuple[list[_Target], tuple[str, ...]]:
    """What a sentence is about, and its scope. Names of the policy come before phrases that only hold a term; so a name with "in"
    in it stays whole."""
    places = [match.span() for match in _SCOPE.finditer(body)]
    readings = [(body, "")] + [(body[:start], body[end:]) for start, end in places]
    for find in (vocabulary.name, vocabulary.phrase):
        for target, scope in readings if find == vocabulary.name else readings[::-1]:
            if (found := _targets(find, vocabulary, target)) is not None:
                return found, _scope(scope) if scope else ()
    part = _SCOPE.split(body)[0]
    raise UserError(vocabulary.unknown(next((one for one in _LIST.split(part) if not vocabulary.phrase(one)), part)))


def _targets(find: Callable[[str], _Target | None], vocabulary: "_Vocabulary", text: str) -> list[_Target] | None:
    """The whole text as one target, else each part of the list that it is; None if one of them is none."""
    if whole := find(text):
        return [whole]
    parts = [vocabulary.name(part) or find(part) for part in _LIST.split(text) if part.strip()]
    return [part for part in parts if part] if len(parts) > 1 and all(parts) else None


def _scope(text: str) -> tuple[str, ...]:
    words = tuple(word for word in fold(text).split() if len(word) > 1 and word not in _EMPTY_WORDS)
    turned = _UNREADABLE & set(words)
    if not words or turned:
        raise UserError(
            f"config: a scope must be plain words that prompts hold, got {_short(text)}. "
            + ("Write one sentence for each case, without exceptions." if turned else "Name the place or the medium.")
        )
    return words


class _Vocabulary:
    """Everything that a config may name, by its folded words."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._names: dict[str, _Target] = {}
        self._terms: dict[str, list[str]] = {}
        for category in policy.categories:
            for text in (category.id, category.title):
                self._add(text, (category.id, (category.id,), ()))
        for category in policy.categories:
            for concept in category.concepts:
                self._add_concept(category, concept)
            for text in (*category.config_phrases, *category.terms):
                self._add(text, (clean(text), (category.id,), (fold(text),)))
                self._terms.setdefault(fold(text), []).append(category.id)

    @cached_property
    def _list(self) -> WordList:
        return WordList(self._terms)

    def _add(self, text: str, target: _Target) -> None:
        self._names.setdefault(_bare(text), target)

    def _add_concept(self, category: Category, concept: Concept) -> None:
        words = tuple(dict.fromkeys(fold(text) for text in (concept.name, *concept.paraphrases, *concept.terms)))
        for text in (concept.id, concept.name, *concept.paraphrases):
            self._add(text, (concept.id, (category.id,), words))
        for text in words:
            self._terms.setdefault(text, []).append(category.id)
            self._add(text, (text, (category.id,), (text,)))

    def name(self, text: str) -> _Target | None:
        """What is called exactly that, articles and the plural aside."""
        return self._names.get(_bare(text))

    def phrase(self, text: str) -> _Target | None:
        """`name`, or a short phrase that holds a listed term; it belongs to the categories of all its terms."""
        if found := self.name(text):
            return found
        folded = fold(text)
        words = folded.split()
        if not self._terms or not 0 < len(words) <= LONGEST_PHRASE or _UNREADABLE & set(words):
            return None
        hits = [category for _, _, term in self._list.find(f" {folded} ") for category in self._terms[term]]
        return (" ".join(words), tuple(dict.fromkeys(hits)), (folded,)) if hits else None

    def unknown(self, text: str) -> str:
        policy = self.policy
        near = close_to(_bare(text), [*policy.category_ids(), *(one.id for each in policy.categories for one in each.concepts)])
        return (
            f"config: {_short(text)} is not a category, concept, listed term or config phrase of policy {policy.id}.{near} "
            f"Categories: {', '.join(policy.category_ids())}."
        )


_RECENT: deque[_Vocabulary] = deque(maxlen=4)  # a vocabulary takes a quarter of a second to make


def _vocabulary(policy: Policy) -> _Vocabulary:
    """The policy's, made once for each policy object."""
    known = next((one for one in list(_RECENT) if one.policy is policy), None)
    if known is None:
        known = _Vocabulary(policy)
        _RECENT.append(known)
    return known


def _bare(text: str) -> str:
    """Folded, without an article before it, each word in the singular."""
    words = fold(text)
    return " ".join(map(stem, _ARTICLE.sub("", words, count=1).split() if _ARTICLE.match(words) else words.split()))


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
