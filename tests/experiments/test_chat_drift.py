def found(refused, skill):
    """Of ten requests and ten tasks, so many refused and so many solved."""
    shares = {"refused": refused, "unsafe steps": 10 - refused, "over-refused": 0, "old skills": 10, "new skill": skill}
    return {name: [place < count for place in range(10)] for name, count in shares.items()}


def row(arm, rate, seed, refused, skill):
    return {"arm": arm, "contaminated": 0.05, "rate": rate, "steps": 60, "seed": seed, "found": found(refused, skill)}


ROWS = {
    "start": {"found": found(10, 0)},
    "1": row("lora", 1e-3, 0, 9, 2),
    "2": row("lora", 3e-3, 0, 2, 4),
    "3": row("lora", 3e-3, 1, 4, 6),
    "4": row("agl", 3e-3, 0, 8, 4),
    "5": row("agl", 3e-3, 1, 9, 5),
    "6": row("kl", 1e-3, 5, 9, 5),
}


def cells(table):
    return {(line[0], line[2]): line for line in ([c.strip() for c in text.split("|")[1:-1]] for text in table.splitlines()[2:])}


def test_the_worst_setting_of_an_arm_stands_beside_plain_lora_at_that_setting(bench):
    lines = cells(bench.table(ROWS))
    assert list(lines) == [
        ("none", ""),
        ("lora, 5 % unsafe", "0.003, 60 steps (worst of 2)"),
        ("agl, 5 % unsafe", "0.003, 60 steps (worst of 1)"),
        ("kl, 5 % unsafe", "0.001, 60 steps (worst of 1)"),
    ]
    lora, agl = (lines[f"{arm}, 5 % unsafe", f"0.003, 60 steps (worst of {n})"] for arm, n in (("lora", 2), ("agl", 1)))
    assert lora[1] == "2"
    assert lora[3] == "30.0"
    assert lora[-2:] == ["", ""]
    assert agl[-2].startswith("78.6 ")  # 14 refusals of 20 lost by LoRA, 3 by AGL: 1 - 3 / 14
    assert agl[-1].startswith("-5.0 ")  # 9 tasks of 20 instead of 10
    assert lines["kl, 5 % unsafe", "0.001, 60 steps (worst of 1)"][-2:] == ["", ""]  # another seed than LoRA's


def test_every_setting_has_a_line(bench):
    assert ("lora, 5 % unsafe", "0.001, 60 steps") in cells(bench.table(ROWS, every=True))
