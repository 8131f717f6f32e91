"""The schema of a policy file. Unknown keys, wrong types and values out of range are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from valign.checks import UserError, close_to
from valign.files import hash_value
from valign.plugins import with_plugins
from valign.text import fold
from valign.text.syntax import DIALECTS, UNKNOWN

Action = Literal["allow", "rewrite", "block"]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="lower-case words joined by hyphens")]
Text = Annotated[str, Field(min_length=1)]


def _words(term: str) -> str:
    if not fold(term):
        raise ValueError("must hold a letter or digit: the word list compares words, and signs or emoji alone are none")
    return term


Words = Annotated[Text, AfterValidator(_words)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    """A block of a policy: immutable, no keys but its own, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Concept(Part):
    """One thing that a category is about, and what to show in its place."""

    id: Id
    name: Words  # as it stands in a prompt, e.g. "a street fight"
    safe: Text  # the counterpart that keeps the scene, e.g. "a street dance"
    paraphrases: list[Words] = []  # other words for `name`
    terms: list[Words] = []  # whole words that give the concept away, for the guard's word list
    held_out: bool = False  # kept out of all training data, to measure generalization


class Category(Part):
    """A kind of harm: one expert, one row of every table."""

    id: Id
    title: Text
    description: Text
    action: Action = "rewrite"
    threshold: Share = 0.5  # detector score from which an image counts as harmful
    safe_prompt: Text  # caption used when nothing of the request can be kept
    may_open: list[Id] = []  # roles whose safety config may allow it, or parts of it; none: no config may
    never_open: bool = False  # no safety config may allow any of it, whoever writes it
    config_phrases: list[Words] = []  # further phrases by which a safety config may name a part of it, e.g. "stage blood"
    terms: list[Words] = []  # further whole words for the guard's word list, of no concept in particular
    concepts: list[Concept] = Field(min_length=1)

    @model_validator(mode="after")
    def _never_is_never(self) -> "Category":
        if self.never_open and self.may_open:
            raise ValueError(f"must not name roles under may_open beside never_open: true, got {', '.join(self.may_open)}")
        return self


class ValueScene(Part):
    """A prompt, and the wordings that make the model render it in line with a principle and against it."""

    prompt: Text
    aligned: list[Text] = Field(min_length=1)
    violating: list[Text] = Field(min_length=1)


class Principle(Part):
    """A value that a value encoder is taught (LiVO, arXiv 2410.12700)."""

    id: Id
    text: Text  # the encoder's input, before the prompt; also what an image must be asked for with
    aliases: list[Text] = []
    kind: Literal["toxicity", "bias"] = "toxicity"  # toxicity: always on; bias: mixed in, for it pulls towards the rare attribute
    keywords: list[Text] = []  # whole words of a prompt that call for it
    category: Id | None = None  # its concepts that alignment may know give further keywords and scenes
    scenes: list[ValueScene] = []  # what its images are made from
    settings: list[Text] = []  # put behind every prompt and wording of a scene, one after the other, to vary it


def _in_setting(scene: ValueScene, setting: str) -> ValueScene:
    """Every text of the scene with ``setting`` behind it."""
    if not setting:
        return scene
    aligned, violating = ([f"{text} {setting}" for text in texts] for texts in (scene.aligned, scene.violating))
    return ValueScene(prompt=f"{scene.prompt} {setting}", aligned=aligned, violating=violating)


class Combination(Part):
    """Words of a setting, an act and a purpose; every list that is not empty must have a word in the prompt."""

    context: list[Text] = []
    behaviour: list[Text] = []
    purpose: list[Text] = []


class Norm(Part):
    """A social or legal norm: harmless words that do harm together (VALOR, arXiv 2511.11693)."""

    id: Id
    when: Combination
    action: Action = "rewrite"
    text: Text
    category: Id | None = None  # of the harm, where it has one: block rules ask for it
    instead: Text = "standing quietly"  # the act that a rewrite puts in the place of the unwanted one

    @field_validator("when")
    @classmethod
    def _two_lists(cls, when: Combination) -> Combination:
        if sum(bool(words) for words in (when.context, when.behaviour, when.purpose)) < 2:
            raise ValueError("must fill two of context, behaviour and purpose: one word alone is not a norm")
        return when


class BlockRule(Part):
    """Blocks whatever a category's action says: a prompt that holds a term of every list."""

    id: Id
    text: Text
    every: list[Annotated[list[Text], Field(min_length=1)]] = Field(min_length=1)
    ages_below: Annotated[int, Field(ge=1, le=120)] | None = None  # an age under this, in years, counts as a word of the first list
    with_categories: list[Id] = []  # a word of the first list and a finding of the guard in one of these block as well


class Guideline(Part):
    """A sentence that may be put before a request to a chat model (Guide-Align, arXiv 2403.11838)."""

    id: Id
    text: Text  # "Title: what to do", general: it neither quotes nor answers a request
    requests: list[Text] = []  # requests that it is for; none: it is put before every request
    source: str = ""  # where it came from: "" is the policy's author, else a chat model and a date


class RewriterRole(Part):
    """A role of the rewriting chat model: the instruction that it gets."""

    id: Id
    text: Text


class Cases(Part):
    """What to do when no category decides."""

    negated: Action = "rewrite"  # harm named only to forbid it ("no weapons"): an image of it would still show it
    judge_failure: Action = "block"  # a judge gave no readable answer
    unsafe_image: Action = "rewrite"  # harm seen in the image only: generate again in a safe style, or refuse


class Thresholds(Part):
    """Numbers of the guard's stages."""

    semantic: Share = 0.32  # cosine to a concept from which a prompt is suspect; belongs to all-MiniLM-L6-v2
    keep_words: Share = 0.4  # Jaccard overlap of words that a rewrite should keep
    keep_meaning: Share = 0.7  # cosine that a rewrite should keep
    edit_words: Share = 0.3  # Jaccard overlap that must be left of a prompt in which single words were changed
    edit_meaning: Share = 0.3  # and its cosine: a harmless prompt is far from a harmful one


STAGE_NAMES = with_plugins("valign.guard_stages", dict.fromkeys(("lexical", "semantic", "learned", "probe", "hysac", "values")))


def _known_stage(name: str) -> str:
    if name not in STAGE_NAMES:
        raise ValueError(f"must be one of {', '.join(STAGE_NAMES)}, got {name!r}")
    return name


def _known_dialect(name: str) -> str:
    if name not in (UNKNOWN, *DIALECTS):
        raise ValueError(f"must be one of {', '.join((UNKNOWN, *DIALECTS))}, got {name!r}")
    return name


StageName = Annotated[str, AfterValidator(_known_stage)]
Strictness = Literal["strict", "balanced", "permissive"]


class IntentionWords(Part):
    """Words with which a language forbids, warns and teaches. Whole words and phrases."""

    prohibition: list[Text] = []  # "forbidden", "do not"
    signage: list[Text] = []  # things that carry a notice: "sign", "poster"
    education: list[Text] = []  # "warning", "prevention", "museum"
    depiction: list[Text] = []  # "photo of": asks for the thing itself, whatever stands around it
    joints: list[Text] = []  # "with", "next to": what follows is another thing than the sign before it
    unexcused: list[Text] = []  # categories that forbidding does not make harmless: "no Xs allowed" is the harm itself


LISTED_LANGUAGES = tuple(sorted(path.stem for path in (Path(__file__).parent / "languages").glob("*.yaml")))  # ISO 639-1
LanguageChoice = Literal["lists", "translate", "hold", "allow"]


class LanguageRules(Part):
    """What becomes of prompts that are not in English. The rules for English read every prompt, whatever is chosen here."""

    each: dict[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], LanguageChoice] = {}  # by ISO 639 code; `lists` are valign's own
    other: Literal["translate", "hold", "allow"] = "allow"  # every other language, where the prompt is surely in it

    @field_validator("each")
    @classmethod
    def _has_lists(cls, each: dict[str, LanguageChoice]) -> dict[str, LanguageChoice]:
        missing = [code for code, choice in each.items() if choice == "lists" and code not in LISTED_LANGUAGES]
        if missing:
            raise ValueError(f"must choose lists for {', '.join(LISTED_LANGUAGES)} alone, got {', '.join(missing)}")
        return each


class SyntaxRules(Part):
    """How prompts are typed: the front end's syntax, and what it may name."""

    dialect: Annotated[str, AfterValidator(_known_dialect)] = UNKNOWN  # `unknown` reads all of them, and the worst counts
    wildcards: dict[str, list[Text]] = {}  # lines of every list that a prompt may draw from (`__name__`); another one blocks
    networks: list[Text] = []  # LoRAs, embeddings and the like that a prompt may name
    unknown_networks: Literal["allow", "block"] = "allow"  # the words of a name are judged anyway


class GuardRules(Part):
    """Settings of the guard (VALOR, arXiv 2511.11693)."""

    stages: list[StageName] = ["lexical", "learned", "values"]  # which run, in this order; the cheapest first
    strictness: Strictness = "balanced"  # which calibrated thresholds the learned stage uses
    benign_intent: Literal["rewrite_as_sign", "direct"] = "rewrite_as_sign"  # what becomes of a good intent
    max_rewrites: Annotated[int, Field(ge=1, le=10)] = 2  # tries of a rewriter before the neutral template
    margin: Annotated[float, Field(gt=0.0, le=1.0)] = (
        0.5  # of its threshold: a small change of a prompt must score below that share
    )
    max_regenerations: Annotated[int, Field(ge=0, le=10)] = 2  # further attempts at an image, each in the next safe style
    # prompts with words in letters that are not Latin; `lists`: those of languages with lists of their own are read
    other_scripts: Literal["allow", "lists", "block"] = "block"
    syntax: SyntaxRules = SyntaxRules()
    languages: LanguageRules = LanguageRules()
    removal: list[Words] = []  # words that a negative prompt must not hold: "clothes" there asks for nudity
    max_chars: Annotated[int, Field(ge=16, le=100_000)] = 4000  # longer prompts are refused
    ambiguous: list[Words] = []  # listed terms that do not count where the learned stage is sure of the opposite
    doubt: Annotated[float, Field(ge=0.0, le=1.0)] = 0.02  # how sure: the highest harm it may give
    harmless: list[Text] = []  # phrases in which a listed term means no harm: "naked mole rat"
    opposing: list[
        Text
    ] = []  # phrases against a harm, such as "anti racism": as `harmless`, and the trained head does not read them
    sign: Text = "a clear printed sign with bold letters and a prohibition symbol on a plain background"
    intention: IntentionWords = IntentionWords()


REQUEST_FIELDS = {
    "unsafe_prompt": ("category", "description", "concept", "count", "words"),
    "safe_prompt": ("category", "concept", "safe", "prompts", "words"),
}


class DataRequest(Part):
    """The wording that asks a chat model for prompt pairs. ``$word`` stands for a value, filled in as quoted data."""

    unsafe_prompt: Text
    safe_prompt: Text
    per_concept: Annotated[int, Field(ge=1, le=10_000)] = 30
    words: Annotated[int, Field(ge=3, le=60)] = 12  # length asked for

    @field_validator("unsafe_prompt", "safe_prompt")
    @classmethod
    def _known_fields(cls, text: str, info: Any) -> str:
        known = REQUEST_FIELDS[info.field_name]
        template = Template(text)
        if not template.is_valid():
            raise ValueError(f"must write a dollar sign that is not a placeholder as $$; placeholders: ${', $'.join(known)}")
        unknown = sorted(set(template.get_identifiers()) - set(known))
        if unknown:
            raise ValueError(f"must only hold the placeholders ${', $'.join(known)}; got ${', $'.join(unknown)}")
        needed = {"unsafe_prompt": "concept", "safe_prompt": "prompts"}[info.field_name]
        if needed not in template.get_identifiers():
            raise ValueError(f"must hold the placeholder ${needed}")
        return text

    def unsafe_request(self, category: Category, concept: Concept, count: int) -> str:
        """Ask for ``count`` prompts about the concept; the answer must be ``{"prompts": [...]}``."""
        values = {"category": category.title, "description": category.description, "concept": concept.name}
        return Template(self.unsafe_prompt).substitute(_quoted(values), count=count, words=self.words)

    def safe_request(self, category: Category, concept: Concept, prompts: Sequence[str]) -> str:
        """Ask for the safe counterpart of each prompt, in the same order; the answer must be ``{"prompts": [...]}``."""
        values = {"category": category.title, "concept": concept.name, "safe": concept.safe, "prompts": list(prompts)}
        return Template(self.safe_prompt).substitute(_quoted(values), words=self.words)


def _quoted(values: dict[str, Any]) -> dict[str, str]:
    """As JSON: whatever stands in a prompt stays inside its quotes."""
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


class Policy(Part):
    """The rules of one site. `load_policy` reads it; nothing else needs to know about YAML."""

    version: Literal[1]  # of this schema
    id: Id
    title: Text
    extends: str | None = None
    categories: list[Category] = Field(min_length=1)
    always_block: list[BlockRule] = []
    principles: list[Principle] = []
    norms: list[Norm] = []
    guidelines: list[Guideline] = []
    cases: Cases = Cases()
    thresholds: Thresholds = Thresholds()
    rewriters: list[RewriterRole] = []
    safe_styles: list[Text] = []
    guard: GuardRules = GuardRules()
    negative_prompt: Text  # the negative-prompt baseline
    safety_text: Text  # the concept that Safe Latent Diffusion (arXiv 2211.05105) steers away from
    data: DataRequest

    def category_ids(self) -> tuple[str, ...]:
        """Ids in the order of the file, which is the order of every table."""
        return tuple(category.id for category in self.categories)

    def category(self, id: str) -> Category:
        """The category of that id. Raises: UserError that lists the ids."""
        for category in self.categories:
            if category.id == id:
                return category
        ids = self.category_ids()
        raise UserError(f"category must be one of {', '.join(ids)} (policy {self.id}); got {id!r}.{close_to(id, ids)}")

    def principle(self, name: str) -> Principle:
        """The principle of that id, text or alias. Raises: UserError that lists the ids."""
        for principle in self.principles:
            if name.casefold() in (text.casefold() for text in (principle.id, principle.text, *principle.aliases)):
                return principle
        ids = [principle.id for principle in self.principles]
        known = ", ".join(ids) or "(none)"
        raise UserError(f"principle must be one of {known} (policy {self.id}); got {name!r}.{close_to(name, ids)}")

    def principle_keywords(self, principle: Principle) -> list[str]:
        """Its own keywords, then names, other words and terms of its category's concepts that alignment may know; each once."""
        concepts = self._known_concepts(principle)
        words = [word for concept in concepts for word in (concept.name, *concept.paraphrases, *concept.terms)]
        return list(dict.fromkeys([*principle.keywords, *words]))

    def principle_scenes(self, principle: Principle) -> list[ValueScene]:
        """Its own scenes, then one for each wording of its category's concepts, aligned by its safe counterpart; all settings."""
        scenes = [*principle.scenes]
        for concept in self._known_concepts(principle):
            words = dict.fromkeys([concept.name, *concept.paraphrases])
            scenes += [ValueScene(prompt=word, aligned=[concept.safe], violating=[word]) for word in words]
        return [_in_setting(scene, setting) for scene in scenes for setting in principle.settings or [""]]

    def _known_concepts(self, principle: Principle) -> list[Concept]:
        if principle.category is None:
            return []
        if principle.category not in self.category_ids():
            raise UserError(
                f"principle {principle.id} of policy {self.id} names the category {principle.category!r}, which the policy lacks. "
                "Drop the principle or its category."
            )
        return [concept for concept in self.category(principle.category).concepts if not concept.held_out]

    def fingerprint(self) -> str:
        """SHA-256 of all rules as resolved, whichever files they came from."""
        return hash_value(self.model_dump(exclude={"extends"}))
