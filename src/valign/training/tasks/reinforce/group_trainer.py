"""trl's GRPOTrainer as the part of a training that samples groups of answers and gives their gradients; our engine does the rest.

The loop, the optimizer, checkpoints and the log are those of `valign.training.engine`: trl's own checkpoints hold pickles.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from valign.data.chats.reward_prompts import RewardPrompt
from valign.models.language.generation import ChatAnswer
from valign.models.language.loading import LoadedChat
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.group_method import GroupMethod, Rollout, ScoreColumn, check_rewards

Sampler = Callable[[Sequence[Any]], list[ChatAnswer]]


class GroupTrainer(GRPOTrainer):
    """Overrides where a method's scores and advantages enter; samples by `sampler`, so that chats are rendered in one place.

    Args:
        network: The policy, its adapter on it. reference: The model as it was; None without a KL term.
        sampler: Answers to chats, one each; set anew for each step by whoever drives the training.
    """

    def __init__(
        self,
        network: Any,
        loaded: LoadedChat,
        reference: Any,
        prompts: Sequence[RewardPrompt],
        chats: Sequence[Any],
        method: GroupMethod,
        config: ReinforceConfig,
        folder: Path,
    ) -> None:
        self.method, self.data = method, prompts
        self.sampler: Callable[[Sequence[Any]], Sequence[Any]] | None = None
        self.group = config.group
        self.scores = torch.zeros(0, 0)  # of the latest answers
        self.rows_of = [{"prompt": list(chat), "place": place} for place, chat in enumerate(chats)]
        rows = config.prompts * config.group // config.accumulation
        arguments = GRPOConfig(
            output_dir=str(folder / "trl"),  # nothing is written there
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=config.accumulation,
            steps_per_generation=config.accumulation,
            num_generations=config.group,
            max_completion_length=config.answer_tokens,
            temperature=config.temperature,
            epsilon=config.clip,
            loss_type=config.loss,
            beta=0.0,  # trl would load the reference from disk; it is set below
            reward_weights=[weight for _, weight in method.columns.values()],
            scale_rewards="group",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=next(network.parameters()).device.type == "cpu",
            report_to="none",
            save_strategy="no",
            seed=config.seed,
            disable_tqdm=True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(
                model=network,
                reward_funcs=[_named(name, self._score(name, column)) for name, (column, _) in method.columns.items()],
                args=arguments,
                train_dataset=Dataset.from_list(self.rows_of),
                processing_class=loaded.renderer.tokenizer,
                rollout_func=self._sampled,
            )
        self.renderer = loaded.renderer
        self.beta, self.ref_model = config.kl, reference
        self.current_gradient_accumulation_steps = config.accumulation
        if reference is not None:
            add_fused_lm_head(reference, temperature=config.temperature)

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Of one step: each prompt as often as its group has answers."""
        return [self.rows_of[place] for place in places for _ in range(self.group)]

    def _sampled(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        assert self.sampler is not None
        answers = self.sampler(prompts)
        return {
            "prompt_ids": [self.renderer.prompt(prompt) for prompt in prompts],
            "completion_ids": [answer.ids for answer in answers],
            "logprobs": None,
        }

    def _score(self, name: str, column: ScoreColumn) -> Callable[..., list[float]]:
        def score(prompts: list[Any], completion_ids: list[list[int]], place: list[int], **_: Any) -> list[float]:
            rollouts = [Rollout(self.data[where], where, self.renderer.text(ids)) for where, ids in zip(place, completion_ids)]
            found = column(rollouts)
            check_rewards(name, found, rollouts)
            return [float(one) for one in found.tolist()]

        return score

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        self.scores = self.method.combined(
            super()._calculate_rewards(inputs, prompts, completions, completion_ids_list), self.group
        )
        return self.scores

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        places = [row["place"] for row in inputs]
        found["advantages"] = self.method.advantages(found["advantages"], self.scores, places, self.group)
        return found


def _named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function
