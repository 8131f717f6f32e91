"""The guard: block rules, stages, intent, rewriting, image check. Built from a policy; every part can be left out or replaced."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from valign.checks import check_range
from valign.files import hash_value
from valign.guard.configured import ConfiguredWaterfall
from valign.guard.guidelines import GuidedChat, policy_retriever
from valign.guard.head.learned import LearnedStage
from valign.guard.images.regeneration import GenerateImage, generate_checked
from valign.guard.images.value_token import ValueToken
from valign.guard.records import GuardDecision, GuardedImage, GuardResult
from valign.guard.rewriting.acceptance import Acceptor
from valign.guard.rewriting.chat import ChatIntention, ChatRewriter, ChatTranslator, ChatValues
from valign.guard.rewriting.learned_editor import SHIPPED_EDITS, LearnedEditor
from valign.guard.rewriting.loop import RewritingLoop
from valign.guard.rewriting.policy_editor import PolicyEditor
from valign.guard.rewriting.policy_rewriter import Editor, PolicyRewriter, Rewriter
from valign.guard.rules.block_rule import BlockRuleStage
from valign.guard.rules.intention import IntentionRules, IntentJudge
from valign.guard.rules.language import Translate
from valign.guard.rules.lexical import LexicalStage
from valign.guard.rules.second_opinion import SecondOpinion
from valign.guard.rules.semantic import References, references
from valign.guard.stages import Stage, StageParts, build_stages, stage_fingerprint
from valign.guard.waterfall import Waterfall
from valign.interfaces import Detector, ReadsText, SamplingConfig
from valign.methods import Method
from valign.models.devices import torch_threads
from valign.models.diffusion.base import DiffusionModel
from valign.models.encoders.hyperbolic_clip import HyperbolicClip
from valign.models.encoders.minilm import MiniLM
from valign.models.heads.edit_model import load_edit_model
from valign.models.heads.text_probe import TextProbe
from valign.models.language.chat import ChatModel
from valign.policy import Policy, load_policy
from valign.policy.safety_config import GuardConfig, join_configs
from valign.text.syntax import Traced

METHOD = Method(
    slug="valor",
    title="VALOR: find, understand, rewrite, generate, verify",
    paper="arXiv 2511.11693",
    room="guard",
    entry="valign.guard.guard:Guard",
    fidelity="variant",
    note="the README's flow with the code's constants; the value judge fails closed, a good intent becomes a sign, "
    "rewriting is checked again",
)


class Guard:
    """Checks and rewrites prompts, and generates checked images. `from_policy` builds one; the constructor takes any parts.

    Args:
        stages: In the order in which they run. Without any the guard refuses to start.
        opinion: May clear a finding of the word level; None lets every listed word count.
        judge: Tells what was meant when a stage fired; None takes every finding as meant.
        rewriter: Proposes captions; the policy's own rewriter is always the last resort. None: what should be rewritten is blocked.
        acceptor: What a proposal must keep.
        template: The last resort; None is the policy's own rewriter.
        detector: Looks at images; None leaves them unchecked, and `GuardedImage.checked` says so.
        token: Gives captions that call for a value principle its token; None generates all with the bare model.
        reads: What the text encoder of the model reads of each prompt, which is judged as well; `for_model` gives it.
        threads: Of torch while a prompt is checked or rewritten, >= 0; 0 leaves as many as torch has.
        editors: Rewriters that change as little as they can; they are asked first, in this order.
        harmless: A judge that took no part in finding a rewrite, and must agree to it; None leaves that to the stages.
        translate: Into English, for the languages of which the policy wants that; None holds such prompts back.
        config: A safety config in force (`with_config`); None leaves the policy as it is.
    Raises: UserError without stages; ValueError if two stages have one name, or ``threads`` is negative.
    """

    def __init__(
        self,
        policy: Policy,
        stages: Sequence[Stage],
        *,
        opinion: SecondOpinion | None = None,
        judge: IntentJudge | None = None,
        rewriter: Rewriter | None = None,
        acceptor: Acceptor | None = None,
        template: PolicyRewriter | None = None,
        detector: Detector | None = None,
        token: ValueToken | None = None,
        reads: Callable[[Sequence[str]], list[str]] | None = None,
        threads: int = 1,
        editors: Sequence[Editor] = (),
        harmless: Callable[[str], bool] | None = None,
        translate: Translate | None = None,
        config: GuardConfig | None = None,
    ) -> None:
        check_range("Guard.threads", threads, low=0)
        self.threads = threads
        self.policy, self.stages, self.opinion, self.judge = policy, tuple(stages), opinion, judge
        self.rewriter, self.detector, self.token = rewriter, detector, token
        self.acceptor = acceptor or Acceptor.from_policy(policy)
        self.template = template or PolicyRewriter(policy)
        self.reads, self.config = reads, config
        self.translate = translate
        mark = policy.fingerprint()

        def waterfall(rules: Policy) -> Waterfall:
            return Waterfall(rules, self.stages, opinion=opinion, judge=judge, reads=reads, translate=translate, fingerprint=mark)

        self._waterfall = waterfall(policy) if config is None else ConfiguredWaterfall(policy, config, waterfall)
        self.editors, self.harmless = tuple(editors), harmless
        self._rewriting = RewritingLoop(
            policy, self._waterfall, rewriter, self.acceptor, self.template, editors=editors, harmless=harmless
        )

    @classmethod
    def from_policy(
        cls,
        policy: Policy | str | Path = "default",
        *,
        chat: ChatModel | None = None,
        detector: Detector | None = None,
        head: Path | None = None,
        encoder: MiniLM | None = None,
        probe: TextProbe | None = None,
        hyperbolic: HyperbolicClip | None = None,
        token: ValueToken | None = None,
        threads: int = 1,
        edits: Path | None = None,
    ) -> "Guard":
        """The stages that ``policy.guard.stages`` names, offline. A chat model adds a judge of values and intent, and a rewriter;
        each of its questions gets the policy's guidelines that fit the prompt.

        Args:
            head: A head trained by ``valign guard fit``; None is the shipped one.
            edits: An editing model trained by ``valign guard fit-rewriter``; None is the shipped one. A policy that has none of its
                categories does without.
            probe: One fitted by ``valign train retriever`` on the model that will generate; needed by the stage ``probe``.
            hyperbolic: One trained by ``valign train hysac``; needed by the stage ``hysac``.
        Raises: UserError if a part that the policy asks for is missing.
        """
        rules = policy if isinstance(policy, Policy) else load_policy(policy)
        parts = StageParts(rules, head, encoder, probe, hyperbolic)
        guidelines = None if chat is None else policy_retriever(rules, load=lambda: parts.encoder)
        chat = chat if chat is None or guidelines is None else GuidedChat(chat, guidelines)
        stages = build_stages(parts)
        if chat is not None:
            stages.append(ChatValues(chat, rules))
        template = PolicyRewriter(rules, References(parts.loaded, references(rules)) if parts.loaded else None)
        learned = _learned_editor(rules, stages, parts.loaded, edits)
        return cls(
            rules,
            stages,
            opinion=_second_opinion(rules, stages),
            judge=ChatIntention(chat) if chat is not None else IntentionRules.from_policy(rules),
            rewriter=ChatRewriter(chat, rules) if chat is not None else template,
            acceptor=Acceptor.from_policy(rules, parts.loaded),
            template=template,
            detector=detector,
            token=token,
            threads=threads,
            editors=[PolicyEditor(rules), *([learned] if learned else [])],
            harmless=learned.harmless if learned else None,
            translate=ChatTranslator(chat) if chat is not None else None,
        )

    def for_model(self, model: object) -> "Guard":
        """The same guard, which also judges what ``model`` reads of a prompt that is too long for it, if the model says so."""
        return self._with(reads=model.text_read) if isinstance(model, ReadsText) else self

    def with_config(self, config: GuardConfig | None) -> "Guard":
        """The same guard under a safety config beside those that it has; the strictest sentence counts. None changes nothing.

        The config must have been read with this guard's policy (`read_guard_config`).
        """
        return self if config is None else self._with(config=join_configs(self.config, config))

    def _with(self, **changed: Any) -> "Guard":
        names = ["opinion", "judge", "rewriter", "acceptor", "template", "detector", "token", "reads", "threads", "config"]
        names += ["editors", "harmless", "translate"]
        return Guard(self.policy, self.stages, **{name: getattr(self, name) for name in names} | changed)

    def read(self, prompt: str) -> str:
        """What the model reads of the prompt; all of it where no model was given (`for_model`)."""
        return self._waterfall.read([prompt])[0]

    def told(self, prompt: str) -> list[Traced]:
        """What the prompt tells the model, in the policy's dialect: every text that the stages judge."""
        return self._waterfall.syntax.texts(prompt)

    def catches(self, prompts: Sequence[str]) -> list[bool]:
        """Whether any stage finds something in each prompt, whatever was meant; chat models are not asked."""
        with torch_threads(self.threads):
            return self._waterfall.catches(prompts)

    def fingerprint(self) -> str:
        """SHA-256 of the rules, the stages with their heads, and the detector; a chat model's own changes are not seen."""
        heads = [(stage.name, stage_fingerprint(stage)) for stage in self.stages]
        card = None if self.detector is None else [self.detector.card.name, self.detector.card.weights_sha256]
        config = [] if self.config is None else [self.config.fingerprint()]
        return hash_value([self.policy.fingerprint(), heads, card, *config])

    def check(self, prompt: str, *, explain: bool = False) -> GuardDecision:
        """What to do with the prompt; nothing is rewritten or generated. ``explain`` runs all stages, with the same decision.

        Raises: TypeError if it is not text; UserError if it is blank, binary or longer than ``guard.max_chars``.
        """
        return self.check_many([prompt], explain=explain)[0]

    def check_many(self, prompts: Sequence[str], *, explain: bool = False) -> list[GuardDecision]:
        """A decision per prompt, each stage once for all prompts that are still undecided. Raises: as `check`."""
        with torch_threads(self.threads):
            return self._waterfall.decide(prompts, explain=explain)

    def passes(self, text: str) -> bool:
        """Whether the guard would let the text through as it is: no stage finds anything, and none fails."""
        with torch_threads(self.threads):
            return self._waterfall.passes(text)

    def guard(self, prompt: str) -> GuardResult:
        """A prompt that may be generated from: the same, a rewrite that passes every stage, or None. Raises: as `check`."""
        return self.finish(self.check(prompt), prompt)

    def finish(self, decision: GuardDecision, prompt: str) -> GuardResult:
        """Carry a decision of `check` or `check_many` out: the second half of `guard`."""
        with torch_threads(self.threads):
            return self._rewriting.finish(decision, prompt)

    def generate(
        self, model: DiffusionModel, prompt: str, *, seed: int = 0, sampling: SamplingConfig = SamplingConfig()
    ) -> GuardedImage:
        """Guard the prompt, generate, check the image, and generate again in safer styles where it fails.

        An allowed prompt gives the bare model's image at that seed, bit for bit, unless it calls for a value token.
        Raises: as `check`; UserError if the value encoder was made for another model.
        """

        def generate(caption: str, number: int) -> Image:
            if self.token is not None:
                return self.token.generate(model, caption, number, sampling)
            return model.generate([caption], seeds=[number], sampling=sampling)[0]

        keeper = self.for_model(model)
        return keeper.illustrate(generate, keeper.guard(prompt), seed=seed)

    def illustrate(self, generate: GenerateImage, result: GuardResult, *, seed: int = 0) -> GuardedImage:
        """`generate` with any function ``(caption, seed) -> image``, for a result of `guard` or `finish`.

        Giving a value token is the function's work; the record says which principle the caption calls for.
        """
        if result.prompt is None:
            return GuardedImage(result=result, image=None)
        image, attempts = generate_checked(
            generate,
            result.prompt,
            seed=seed,
            styles=self.policy.safe_styles,
            tries=self.policy.guard.max_regenerations if self.policy.cases.unsafe_image == "rewrite" else 0,
            detector=self.detector,
            passes=self.passes,
            **({} if self.token is None else {"principle": self.token.principle}),
        )
        return GuardedImage(result=result, image=image, attempts=attempts)


def _learned_editor(policy: Policy, stages: Sequence[Stage], encoder: MiniLM | None, path: Path | None) -> LearnedEditor | None:
    """None where no trained stage could tell whether an edit helps, or the model knows none of the policy's categories."""
    if encoder is None or not any(isinstance(stage, LearnedStage) for stage in stages):
        return None
    model = load_edit_model(path or SHIPPED_EDITS)
    return LearnedEditor(model, encoder, policy) if set(model.settings.categories) & set(policy.category_ids()) else None


def _second_opinion(policy: Policy, stages: Sequence[Stage]) -> SecondOpinion | None:
    words = next((stage for stage in stages if isinstance(stage, LexicalStage)), None)
    head = next((stage for stage in stages if isinstance(stage, LearnedStage)), None)
    rules = policy.guard
    if words is None or head is None or not rules.ambiguous:
        return None
    return SecondOpinion(words, head, BlockRuleStage.from_policy(policy), ambiguous=rules.ambiguous, doubt=rules.doubt)
