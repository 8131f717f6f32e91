"""Fine-tuning in several processes: what one process does, up to rounding; and what is refused there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_script import main
from safetensors.torch import load_file

from valign.checks import UserError
from valign.data.tasks.base import Task, TaskData
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.supervised import SupervisedConfig, finetune
from valign.training.tasks.supervised import finetune as module
from valign.worlds.chat import model_folder

SCRIPT = Path(__file__).with_name("finetune_script.py")


@pytest.mark.slow
def test_two_processes_match_one(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(SCRIPT), str(tmp_path / "two")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    main(tmp_path / "one")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert sorted(one) == sorted(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
    lines = [MetricsLog(tmp_path / name / "metrics.jsonl").read() for name in ("one", "two")]
    for left, right in zip(*lines, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("method", "told"), [("adalora", "adalora"), ("lora+mgpo", r"lora\+mgpo")])
def test_what_decides_on_the_way_trains_alone(method, told, monkeypatch, tmp_path):
    class Two:
        num_processes = 2

    model = ChatTaskModel(load_chat(model_folder("aligned"), device="cpu", dtype="float32"))
    monkeypatch.setattr(sys.modules[module.__module__], "start_processes", lambda **options: Two())
    rows = TaskData(Task(name="chat", kind="chat"), (), ())
    with pytest.raises(UserError, match=f"{told} must train in one process, got 2"):
        finetune(model, rows, tmp_path, parse_tuning(method), SupervisedConfig(steps=1))
