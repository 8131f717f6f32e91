"""A researcher with a probe, images and a judge of her own, none made by valign: from labelled images to a compared report."""

import json

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from valign.cli.root import build
from valign.evaluation.results import read_results
from vision_endpoint import running

runner = CliRunner(env={"COLUMNS": "200"})
app = build()
COLOURS = {"violence": 0, "hate": 1, "harmless": 2}  # channel that stands for each; her judge knows red as violence


def run(*arguments):
    result = runner.invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def image(channel, seed):
    pixels = np.random.default_rng(seed).integers(0, 90, (24, 24, 3))
    pixels[..., channel] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def label(folder, count, first):
    for name, channel in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image(channel, first + 10 * i + channel).save(folder / name / f"{i:02d}.png")
    return folder


def make(folder, *, harmful, first):
    """Another tool's output and names: four harmful prompts, four harmless ones, a refusal and a broken file."""
    folder.mkdir()
    rows = []
    for i, category in enumerate(("violence", "violence", "hate", "hate", "", "", "", "")):
        channel = COLOURS[category] if category and harmful else COLOURS["harmless"]
        image(channel, first + i).save(folder / f"{i}.png")
        rows.append({"text": f"scene {i}", "path": f"{i}.png", "topic": category, "seed": i})
    rows.append({"text": "scene 8", "path": "", "topic": "violence", "seed": 8})
    rows.append({"text": "scene 9", "path": "9.png", "topic": "violence", "seed": 9})
    (folder / "9.png").write_bytes(b"cut short")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_own_probe_own_images_own_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    label(tmp_path / "labelled", 16, 0)
    run("detector", "fit", "labelled", "--clip", "shapes", "-o", "detectors/probe")
    run("detector", "import", "judge", "--category", "violence", "--repeats", "2", "-o", "detectors/judge")
    found = json.loads(run("detector", "evaluate", "probe", label(tmp_path / "fresh", 8, 5000), "--json", "--save").stdout)
    assert found["errors"][0]["positives"] == 16
    before = make(tmp_path / "before", harmful=True, first=9000)
    after = make(tmp_path / "after", harmful=False, first=9100)
    with running() as endpoint:
        judge = f"judge@{endpoint.url('good')}"
        named = [word for one in ("prompt=text", "file=path", "category=topic") for word in ("--column", one)]
        images = ("--judge-images", before, "--judge-images", after, "--skip-unreadable", *named)
        arguments = ("evaluate", *images, "--detector", "probe", "--detector", judge, "-o", "out")
        run(*arguments)
        asked = len(endpoint.seen)
        run(*arguments)  # finished: only the judge's own try-out is asked again
        assert len(endpoint.seen) == asked + 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [system["name"] for system in summary["systems"]] == ["before", "after"]
    assert summary["suite"]["not_measured"] == []
    (pair,) = summary["agreement"]
    assert (pair["first"], pair["second"], pair["categories"]) == ("probe", "judge", ["violence"])
    assert pair["images"] == 16  # of twice ten prompts one was refused and one is broken
    rows = {(row.system, row.id): row for row in read_results(tmp_path / "out" / "results.parquet")}
    broken = [row for row in rows.values() if row.unreadable]
    assert len(broken) == 2
    assert all(row.harmful is None for row in broken)
    red = [row for row in rows.values() if row.system == "before" and row.category == "violence" and row.scores]
    assert all(row.scores["judge:violence"] >= 0.5 for row in red)
    assert any("had the same answer all 2 times" in note for note in summary["notes"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Do the detectors agree?" in page
    assert "cannot be read" in page
