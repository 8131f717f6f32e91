"""Decisions as entries of the log. Prompts are keyed hashes; a site may add full texts, but never after a block rule."""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from valign.guard.records import GuardDecision, GuardResult
from valign.serving.audit_chain import Entry
from valign.serving.image_queue import ServedImage


@dataclass(frozen=True)
class Recorder:
    """``secret`` keys the hashes of prompts: without it, guesses cannot be tried against the log. ``full`` keeps texts as well."""

    secret: bytes = field(repr=False)
    full: bool = False

    def hash(self, text: str) -> str:
        """HMAC-SHA256, hex: equal prompts have equal hashes as long as the secret stays."""
        return hmac.new(self.secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def event(self, kind: str, **facts: Any) -> Entry:
        """An event of the service itself, such as a reload."""
        return _entry(kind, "", "", facts, durable=True)

    def decision(self, request: str, caller: str, prompt: str, decision: GuardDecision) -> Entry:
        """A prompt that was only checked."""
        return _entry("check", request, self.hash(prompt), {"caller": caller, **self._decision(decision)})

    def images(
        self, request: str, caller: str, prompt: str, result: GuardResult, images: Sequence[ServedImage], facts: Mapping[str, Any]
    ) -> Entry:
        """A request for images: the decision, every rewrite that was tried, and what became of each image."""
        full = self._full(result.decision)
        record = result.to_json(with_prompt=full)
        record["result_hash"] = self.hash(result.prompt) if result.prompt is not None else None
        record["decision"] = self._decision(result.decision)
        record["pictures"] = [
            {
                "sha256": image.encoded.sha256 if image.encoded else None,
                "checked": image.found.checked,
                "drawings": [asdict(attempt) for attempt in image.found.attempts],
            }
            for image in images
        ]
        return _entry("draw", request, self.hash(prompt), {"caller": caller, **facts, **record}, durable=True)

    def image_check(self, request: str, caller: str, facts: Mapping[str, Any]) -> Entry:
        """An image that was sent for moderation."""
        return _entry("image-check", request, "", {"caller": caller, **facts})

    def _decision(self, decision: GuardDecision) -> dict[str, Any]:
        record = decision.to_json(with_prompt=self._full(decision))
        del record["prompt_sha256"]  # without a key, anybody could try guesses
        return record

    def _full(self, decision: GuardDecision) -> bool:
        return self.full and bool(decision.prompt)  # a block rule leaves it empty


def _entry(kind: str, request: str, prompt: str, facts: Mapping[str, Any], *, durable: bool = False) -> Entry:
    body = json.dumps({"kind": kind, **facts}, separators=(",", ":"), default=str)
    return Entry(
        at=datetime.now(UTC).isoformat(timespec="microseconds"), request=request, prompt=prompt, body=body, durable=durable
    )
