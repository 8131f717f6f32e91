"""How well conditioned is RegMean's system at Stable Diffusion 1.5's size, and what does its precision cost?

    python benchmarks/regmean_conditioning.py BENIGN.jsonl UNSAFE.jsonl [--captions 300] [--prompts 120]

Texts go through a CLIP text encoder of SD 1.5's size (12 layers, width 768, 77 tokens, 49,408 ids) with random weights; a word's id
is a hash, as the real vocabulary is not at hand. Two experts of rank 8 read one half of the unsafe prompts each. Every row is one
setting: the condition number of the system, and how far X solved in float32 and in float64 lies from the answer by QR on the states
themselves, which never forms a second moment. Errors are relative (Frobenius).
"""

import argparse
import json
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from valign.merging.regression import RIDGE, assemble, fuse
from valign.models.files.adapter_files import LoraFactors

WIDTH, TOKENS, VOCABULARY = 768, 77, 49408


def read(path: Path, count: int) -> list[str]:
    """The first texts of a JSON-lines file with a column ``prompt``."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line, _ in zip(lines, range(count))]


@torch.inference_mode()
def states_of(texts: list[str]) -> Tensor:
    """All token states, padding too: ``[text, token, width]``."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=TOKENS,
        eos_token_id=VOCABULARY - 1,
        bos_token_id=VOCABULARY - 2,
        pad_token_id=VOCABULARY - 1,
    )
    encoder = CLIPTextModel(config).eval()
    ids = torch.full((len(texts), TOKENS), VOCABULARY - 1)
    ids[:, 0] = VOCABULARY - 2
    for row, text in enumerate(texts):
        words = [int(sha256(word.encode()).hexdigest(), 16) % (VOCABULARY - 2) for word in text.lower().split()][: TOKENS - 2]
        ids[row, 1 : len(words) + 1] = torch.tensor(words, dtype=torch.long)
    return torch.cat([encoder(batch).last_hidden_state for batch in ids.split(32)])


def by_qr(parts: list[LoraFactors], groups: list[Tensor], captions: Tensor, lam: float, mu: float) -> Tensor:
    """X from one equation per state, by QR in float64."""
    left = [rows.flatten(0, 1).double() / len(rows) ** 0.5 for rows in groups]
    right = [rows @ part.delta().double().T for rows, part in zip(left, parts)]
    kept = captions.flatten(0, 1).double() * (lam / len(captions)) ** 0.5
    zeros = (torch.zeros(len(kept), parts[0].shape[0]).double(), torch.zeros(WIDTH, parts[0].shape[0]).double())
    system = torch.cat([*left, kept, mu**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    return torch.linalg.lstsq(system, torch.cat([*right, *zeros])).solution.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benign", type=Path)
    parser.add_argument("unsafe", type=Path)
    parser.add_argument("--captions", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=120, help="of each expert")
    options = parser.parse_args()
    captions = states_of(read(options.benign, options.captions))
    unsafe = states_of(read(options.unsafe, 2 * options.prompts))
    g = torch.Generator().manual_seed(1)
    parts = [LoraFactors(torch.randn(8, WIDTH, generator=g) / 28, torch.randn(320, 8, generator=g) / 28, 1.0) for _ in range(2)]
    print(f"{'captions':>8} {'prompts':>8} {'lam':>5} {'ridge':>8} {'condition':>10} {'float32':>9} {'float64':>9}")
    for count, each, lam, ridge in (
        (options.captions, options.prompts, 1.0, RIDGE),
        (options.captions, options.prompts, 5.0, RIDGE),
        (30, options.prompts, 1.0, RIDGE),
        (options.captions, 8, 1.0, RIDGE),
        (8, 8, 1.0, RIDGE),
        (8, 8, 1.0, 1e-7),
    ):
        kept, groups = captions[:count], [unsafe[:each], unsafe[options.prompts : options.prompts + each]]
        moments = [(rows.flatten(0, 1).double().T @ rows.flatten(0, 1).double()) / len(rows) for rows in groups]
        preserve = kept.flatten(0, 1).double().T @ kept.flatten(0, 1).double() / count
        mu = ridge * float(preserve.diagonal().mean())
        exact = by_qr(parts, groups, kept, lam, mu)
        system = assemble(moments, preserve, lam=lam, ridge=ridge)
        ours = fuse(parts, moments, system).delta().double()
        matrix = (sum(moments) + lam * preserve + mu * torch.eye(WIDTH, dtype=torch.float64)).float()
        right = sum(part.delta() @ moment.float() for part, moment in zip(parts, moments))
        narrow = torch.linalg.solve(matrix, right.T).T.double()
        errors = [float(torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)) for found in (narrow, ours)]
        print(f"{count:8} {each:8} {lam:5g} {ridge:8.0e} {system.condition:10.1e} {errors[0]:9.1e} {errors[1]:9.1e}", flush=True)


if __name__ == "__main__":
    main()
