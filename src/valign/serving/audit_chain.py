"""A log in which no entry can be changed, moved or taken out unseen: every entry's hash covers the hash before it.

``hash = SHA-256(JSON [previous hash, seq, at, request, prompt, body])``. Anybody can check a chain without a secret. What a chain
alone cannot show is an end that was cut off, or a log that was written anew as a whole: the anchor does (`audit_anchor`), and a
head's hash that was noted in another place.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from valign.serving.audit_anchor import LogHead

GENESIS = "0" * 64  # what stands before the first entry


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What happened, before it has a place in the log."""

    at: str  # UTC, ISO 8601
    request: str  # id of the HTTP request; "" for the service's own events
    prompt: str  # keyed hash of the prompt; "" without one
    body: str  # JSON
    durable: bool = False  # must have reached the disk, not only the operating system, before it counts as written


@dataclass(frozen=True, kw_only=True)
class Link:
    """An entry in its place. ``seq`` counts from 1."""

    seq: int
    at: str
    request: str
    prompt: str
    body: str
    hash: str


@dataclass(frozen=True)
class Verified:
    """A chain without a fault: its length, and the hash of its last entry."""

    entries: int
    head: str


class BrokenChain(Exception):
    """Where the log was tampered with, and how it shows."""

    def __init__(self, seq: int, why: str) -> None:
        self.seq = seq
        super().__init__(f"entry {seq}: {why}")


def link_hash(previous: str, seq: int, at: str, request: str, prompt: str, body: str) -> str:
    """The formula of the module, hex."""
    return hashlib.sha256(json.dumps([previous, seq, at, request, prompt, body], separators=(",", ":")).encode()).hexdigest()


def extend(seq: int, head: str, entries: Iterable[Entry]) -> list[Link]:
    """The entries as links behind a chain of length ``seq`` with that head."""
    links = []
    for entry in entries:
        seq += 1
        head = link_hash(head, seq, entry.at, entry.request, entry.prompt, entry.body)
        links.append(Link(seq=seq, at=entry.at, request=entry.request, prompt=entry.prompt, body=entry.body, hash=head))
    return links


def verify(links: Iterable[Link], *, head: str = "", anchor: LogHead | None = None) -> Verified:
    """Walk the whole chain, one link in memory at a time.

    Args:
        head: A hash noted earlier; it must still stand in the chain.
        anchor: An entry that is known to have been written: number and hash.
    Raises: BrokenChain at the first fault.
    """
    previous, seq, seen = GENESIS, 0, head in ("", GENESIS)
    for link in links:
        if link.seq < 1:
            raise BrokenChain(link.seq, "entries count from 1: this one was put in")
        if link.seq != seq + 1:
            raise BrokenChain(seq + 1, f"missing; the next one there is {link.seq}")
        if link.hash != link_hash(previous, link.seq, link.at, link.request, link.prompt, link.body):
            raise BrokenChain(link.seq, "its hash does not fit: it, or the one before it, was changed")
        if anchor is not None and link.seq == anchor.seq and link.hash != anchor.hash:
            raise BrokenChain(link.seq, "its hash is not the one that the anchor holds: the log was written anew")
        previous, seq = link.hash, link.seq
        seen = seen or link.hash == head
    if anchor is not None and anchor.seq > seq:
        raise BrokenChain(seq + 1, f"missing: the anchor knows of {anchor.seq} entries")
    if not seen:
        raise BrokenChain(seq, "the noted head is not in the log: its end was cut off, or it was written anew")
    return Verified(seq, previous)
