"""Safety configs per API key: the file, the guard that a request gets, and the log."""

import hashlib
import json

import pytest
from serving_stand_ins import Watcher, ask, make_service, quick_policy, running

from valign.checks import UserError
from valign.guard import Guard
from valign.policy import read_guard_config
from valign.serving.audit_store import AuditStore
from valign.serving.key_configs import KeyConfig, load_key_configs
from valign.serving.keys import Keys
from valign.serving.service import Rules

STUDIO, KIDS = "the-key-of-the-studio", "the-key-of-the-kids"
KEYS = Keys({hashlib.sha256(key.encode()).hexdigest(): name for key, name in ((STUDIO, "studio"), (KIDS, "kids"))})
POLICY = quick_policy()


def test_the_file_gives_keys_their_roles_and_configs(tmp_path):
    file = tmp_path / "configs.yaml"
    file.write_text("studio: {role: studio, config: allows gory masks, author: A. Example}\nkids: {config: blocks shocking}\n")
    found = load_key_configs(file, POLICY, {"studio", "kids"})
    assert found["studio"].facts() == {"role": "studio", "config": "allow gory masks (shocking)", "author": "A. Example"}
    assert found["kids"].facts() == {"role": "", "config": "block shocking", "author": ""}
    assert load_key_configs(None, POLICY, ()) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kids: {config: allows violence}", "kids: config: .* may not"),
        ("kids: {config: blocks violnce}", "kids: config: 'violnce'"),
        ("kid: {config: blocks violence}", "'kid' must be the name of a key.*Did you mean 'kids'"),
        ("kids: {role: chef}", "role must be one of museum, studio"),
        ("kids: {rule: studio}", "kids: rule: .*Known keys: role, config, author"),
        ("[kids]", "must map names of keys"),
        ("kids: {config: 'blocks", "must be YAML"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path, text, message):
    file = tmp_path / "configs.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_key_configs(file, POLICY, {"studio", "kids"})
    with pytest.raises(UserError, match="does not exist"):
        load_key_configs(tmp_path / "none.yaml", POLICY, ())


def test_each_key_has_its_config_and_a_request_loosens_no_further_than_its_role(tmp_path):
    guard = Guard.from_policy(POLICY, detector=Watcher())
    configs = {"studio": KeyConfig("studio"), "kids": KeyConfig("", read_guard_config(POLICY, "blocks shocking"))}
    with running(make_service(tmp_path, load_rules=lambda: Rules(guard, KEYS, configs=configs))) as url:

        def judge(key, **more):
            return ask(f"{url}/v1/moderations", {"input": "a corpse on the beach", **more}, key=key)

        def part(reply):
            return reply.json()["guard"][0]["parts"][0]

        assert (part(judge(STUDIO))["action"], part(judge(STUDIO))["config"]) == ("rewrite", None)
        opened = part(judge(STUDIO, safety_config="allows shocking on the beach"))
        assert (opened["action"], opened["config"]) == ("allow", "allow shocking in beach")
        assert part(judge(KIDS))["action"] == "block"
        assert part(judge(STUDIO, safety_config="blocks shocking"))["action"] == "block"
        for key, config in ((KIDS, "allows shocking"), (STUDIO, "allows hate"), (STUDIO, "opens sesame")):
            refused = judge(key, safety_config=config)
            assert (refused.status, refused.json()["error"]["param"]) == (400, "safety_config")
        image = {"prompt": "a corpse on the beach", "safety_config": "allows shocking on the beach"}
        answer = ask(f"{url}/v1/images/generations", image, key=STUDIO).json()
        assert answer["data"][0]["revised_prompt"] == image["prompt"]
        assert answer["guard"]["config"] == "allow shocking in beach"
    entries = [json.loads(link.body) for link in AuditStore(str(tmp_path / "audit.db")).links()]
    assert entries[0]["configs"]["kids"] == {"role": "", "config": "block shocking", "author": ""}
    assert [one["config"] for one in entries if one["kind"] == "check"][:2] == ["", ""]
    assert "allow shocking in beach" in [one["config"] for one in entries if one["kind"] == "check"]
    assert [one["decision"]["config"] for one in entries if one["kind"] == "draw"] == ["allow shocking in beach"]
