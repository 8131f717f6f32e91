"""Commands that need no model import none of the libraries that take seconds."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

HEAVY = ("torch", "transformers", "diffusers", "peft", "accelerate", "scipy", "sklearn", "matplotlib")
CODE = """
import sys
from valign.cli import main
sys.argv = ["valign", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    code = stop.code
print(f"loaded={{[name for name in {heavy!r} if name in sys.modules]}} code={{code}}")
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["methods"], 0),
        (["policy", "check", "default"], 0),
        (["adapter", "show", "lora.safetensors"], 0),
        (["adapter", "show", "lora.safetensors", "--json"], 0),
        (["adapter", "show", "."], 0),
        (["adapter", "show", "flux"], 2),
        (["data", "read", "prompts.csv"], 0),
        (["data", "overlap", "prompts.csv", "prompts.csv"], 0),
        (["data", "read", "nowhere.csv"], 2),
        (["data", "read", "prompts.csv", "--column", "prompt=text"], 2),
        (["policy", "check", "nowhere.yaml"], 2),
        (["align", "--modle", "shapes", "-o", "o"], 2),
        (["evaluate", "--model", "flux", "-o", "o"], 2),
        (["train", "alignguard", "--model", "shapes", "--data", "nowhere", "--all", "-o", "o"], 2),
        (["finetune", "--model", "shapes", "--task", "diffusion", "--data", ".", "--out", "o", "--lr", "1"], 2),
        (["finetune", "--model", "shapes", "--task", "diffusion", "--data", ".", "--out", "o", "--tracker", "wanbd"], 2),
        (["generate", "--model", "nowhere", "a lamp", "-o", "o.png"], 2),
        (["align"], 2),
        (["align", "--model", "shapes", "-o", "o", "--detector", "orcale"], 2),
        (["align", "--model", "shapes", "-o", "o", "--merge", "regmen"], 2),
        (["align", "--model", "shapes", "-o", "o", "--steps", "many"], 2),
        (["finetune", "--model", "shapes", "--task", "diffusion", "--data", ".", "--out", "o", "--adapter", "lroa"], 2),
        (["finetune", "--model", "minilm", "--task", "chatt", "--data", ".", "--out", "o"], 2),
        (["merge", "regmen", "a", "-o", "o"], 2),
        (["check", "--before", "chat", "--after", "chat:bas", "-p", "chat", "-o", "o"], 3),
        (["bench", "methods", "--budget", "smal"], 2),
        (["bench", "reinforce", "--budget", "smal"], 2),
        (["quickstart", "--budget", "smal"], 2),
        (["quickstart", "--categories", "hat"], 2),
        (["bench", "resilient", "--arm", "lroa"], 2),
        (["compare", "adapters", "--budget", "small"], 2),
        (["generate", "a lamp", "-o", "a.gif"], 2),
        (["generate", "a lamp", "-o", "prompts.csv"], 2),
        (["evaluate", "--model", "shapes", "-o", "o", "--limit", "0"], 2),
        (["guard", "check", "a lamp", "--policy", "deflt"], 2),
        (["serve", "--model", "shapes", "--detector", "oracle", "--device", "cdua"], 2),
        (["estimate", "--model", "sd16"], 2),
        (["detector", "evaluate", "probe", ".", "--policy", "deflt"], 2),
        (["detector", "evaluate", "oracle", "nowhere"], 2),
        (["detector", "fit", "--clip", "shapes", "nowhere", "-o", "d"], 2),
        (["detector", "import", "nowhere", "--map", "a=b", "-o", "d"], 2),
        (["report", "nowhere", "--csv", "x.csv"], 2),
        (["generate", "a lamp", "-o", "a.png", "--model", "models/sd16"], 2),
        (["generate", "a lamp", "-o", "a.png", "--model", "base", "--adapter", "other"], 2),
        (["evaluate", "--model", "base", "--adapter", "mine=other", "-o", "o", "--detector", "nudenet"], 2),
        (["attack", "--model", "shapes", "--system", "grd", "-o", "o"], 2),
        (["realign", "resta", "--base", "b", "--aligned", "nowhere/at", "--finetuned", ".", "-o", "o"], 2),
        (["realign", "somf", "--base", "b", "--aligned", ".", "--finetuned", ".", "-o", "o", "--spce", "x"], 2),
        (["merge", "regmean", "mine=nowhere", "-o", "o"], 2),
        (["merge", "co-merge", ".", "-o", "o", "--states", "0"], 2),
        (["merge", "plan", "nowhere"], 2),
        (["bench", "methods", "--category", "hat"], 2),
        (["align", "--model", "shapes", "--category", "hat", "--detector", "oracle", "-o", "o"], 2),
        (["align", "--model", "shapes", "-o", "o"], 2),
        (["align", "--model", "shapes", "-o", "o", "--detector", "oracle", "--column", "prompt"], 2),
        (["evaluate", "--model", "shapes", "-o", "o", "--precision", "bfloat61"], 2),
        (["estimate", "--model", "sd15", "--command", "algn"], 2),
        (["adapter", "fuse", "shapes", "nowhere", "out"], 2),
        (["detector", "show", "nowhere"], 2),
        (["driftcheck", "run", "-m", "a=chat", "-m", "b=nowhere", "-o", "o"], 2),
        (["check", "--before", "chat", "--after", "chat:base", "-p", "chat", "-o", "o", "--judge", "phrasse"], 3),
        (["world", "sheet", "shpes"], 2),
        (["align", "--model", "shapes", "-o", "o", "--detector", "oracle", "--format", "i2"], 2),
        (["train", "dpo", "--model", "chat/bas", "--data", ".", "--out", "o"], 2),
        (["finetune", "--model", "nowhere", "--task", "chat", "--data", ".", "--out", "o"], 2),
        (["finetune", "--model", "minilmm", "--task", "classification", "--data", ".", "--out", "o"], 2),
        (["red-eval", "--model", "nowhere/at", "--template", "prompts.csv", "-o", "o"], 2),
    ],
)
def test_light_commands_and_their_refusals_import_no_heavy_library(tmp_path, arguments, code):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    names = [f"unet.mid_block.attentions.0.to_q.lora_{half}.weight" for half in "AB"]
    for folder in ("base", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "other" / "valign.json").write_text('{"base": "theirs", "base_fingerprint": "abc", "family": "sdxl"}')
    save_file({name: np.ones((2, 2), "float32") for name in names}, tmp_path / "other" / "pytorch_lora_weights.safetensors")
    save_file({name: np.ones((2, 2), "float32") for name in names}, tmp_path / "lora.safetensors")
    (tmp_path / "prompts.csv").write_text("prompt,label\na lamp,0\n")
    program = CODE.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] in (f"loaded=[] code={code}", f"loaded=[] code={None if code == 0 else code}")
