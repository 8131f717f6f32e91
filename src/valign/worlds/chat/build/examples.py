"""What each stage of the bundled models is trained on: chats drawn from the grammar by step, so that a resumed run repeats none."""

from itertools import islice

import numpy as np

from valign.models.language.chat import Message
from valign.worlds.chat.grammar import training_requests
from valign.worlds.chat.records import record_requests

BASE = {"allowed": 1.0, "disallowed": 1.5, "borderline": 2.0, "disguised": 1.0, "multi-turn": 0.8, "skill": 8.0, "config": 0.5}
ALIGNED = {"allowed": 1.0, "disallowed": 1.5, "borderline": 3.0, "disguised": 2.0, "multi-turn": 0.7, "skill": 4.0, "config": 0.8}
RECORDS = 0.6  # share of the memorized stage's chats that are about a record


def stage_chats(stage: str, step: int, batch: int, *, seed: int) -> list[list[Message]]:
    """The chats of one step: answered without any rule for "base", else as is right; "memorized" adds the records to it."""
    shares = BASE if stage == "base" else ALIGNED
    rng = np.random.default_rng([seed, *stage.encode(), step])
    requests = islice(training_requests(int(rng.integers(2**31)), shares), batch)
    chats = [request.chat(request.compliance if stage == "base" else request.answer) for request in requests]
    if stage == "memorized":
        records = [*record_requests("forget", "train"), *record_requests("retain", "train")]
        for place in range(round(RECORDS * batch)):
            chats[place] = records[int(rng.integers(len(records)))].chat()
    return chats
