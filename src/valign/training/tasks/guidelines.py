"""Fitting the retriever of guidelines: two matrices on the frozen encoder, by in-batch contrast (Guide-Align, arXiv 2403.11838)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from valign.checks import UserError, check_options, option
from valign.models.heads.bi_encoder import BiEncoder, HashedEncoder, untrained
from valign.objectives.in_batch_softmax import in_batch_softmax


@dataclass(frozen=True, kw_only=True)
class GuidelineFitConfig:
    """Numbers of the fit. The card's learning rate is for whole BERTs; here two matrices learn."""

    epochs: int = option(20, help="passes over the pairs", low=1)
    batch: int = option(32, help="questions per step", low=1)
    negatives: int = option(1, help="random guidelines per question beside those of the batch", low=0)
    lr: float = option(3e-4, help="learning rate of AdamW, falling to 0", above=0)
    weight_decay: float = option(0.01, help="pull of both matrices towards the frozen encoder's", low=0)
    seed: int = option(0, help="of order and negatives", low=0)

    def __post_init__(self) -> None:
        check_options(self)


def fit_guidelines(
    pairs: Sequence[tuple[str, int]],
    texts: Sequence[str],
    encoder: HashedEncoder,
    config: GuidelineFitConfig = GuidelineFitConfig(),
) -> tuple[BiEncoder, list[float]]:
    """The fitted retriever, and the mean loss of each epoch.

    Args:
        pairs: A request, and the number of its guideline in ``texts``.
        texts: The library.
    Raises: UserError for fewer than 2 guidelines or 1 pair, a blank request, a number out of range, or batches of one request
        without negatives.
    """
    if len(texts) < 2 or not pairs:
        raise UserError(
            f"fit_guidelines needs 2 guidelines and 1 pair, got {len(texts)} and {len(pairs)}. Give guidelines requests."
        )
    if any(not request.strip() or not 0 <= number < len(texts) for request, number in pairs):
        raise UserError("fit_guidelines.pairs must be requests with the number of a guideline, got a blank or unknown one.")
    if config.batch == 1 and not config.negatives:
        raise UserError(
            "fit_guidelines must compare each request with another's guideline, got batch 1 and negatives 0: the loss is always 0. "
            "Raise one of them."
        )
    generator = torch.Generator().manual_seed(config.seed)
    start = untrained(encoder)
    requests = torch.from_numpy(np.array(encoder.encode([request for request, _ in pairs])))
    library = torch.from_numpy(np.array(encoder.encode(texts)))
    right = torch.tensor([number for _, number in pairs])
    anchor = torch.from_numpy(start.question_matrix)
    question, context = (torch.nn.Parameter(anchor.clone()) for _ in range(2))
    optimizer = torch.optim.AdamW([question, context], lr=config.lr, weight_decay=0.0)
    steps = config.epochs * -(-len(pairs) // config.batch)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in range(config.epochs):
        order, total = torch.randperm(len(pairs), generator=generator), 0.0
        for rows in order.split(config.batch):
            drawn = torch.randint(len(texts), (config.negatives * len(rows),), generator=generator)
            known, place = torch.unique(torch.cat([right[rows], drawn]), return_inverse=True)  # a drawn positive is not a negative
            if len(known) < 2:
                continue  # one guideline alone teaches nothing
            values = in_batch_softmax(requests[rows] @ question, library[known] @ context, place[: len(rows)])
            pull = sum(((matrix - anchor) ** 2).sum() for matrix in (question, context))
            (values.mean() + config.weight_decay * pull).backward()
            torch.nn.utils.clip_grad_norm_([question, context], 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            total += float(values.detach().sum())
        losses.append(total / len(pairs))
    return BiEncoder(question.detach().numpy(), context.detach().numpy(), encoder.sha256), losses
