"""Variants of one piece of work, each in a process of its own, in turns: so that drift of the machine hits all alike."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def in_turns(script: str, variants: Sequence[str], rounds: int, options: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What ``script --variant NAME --option=value`` printed as its last line, a JSON object, by variant and round."""
    told = [f"--{name}={value}" for name, value in options.items()]
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            command = [sys.executable, script, "--variant", variant, *told]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    return results
