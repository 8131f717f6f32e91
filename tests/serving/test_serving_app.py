"""The whole service over a socket, asked by OpenAI's own client."""

import asyncio
import base64
import hashlib
import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue

import openai
import pytest
from PIL import Image
from serving_stand_ins import SIDE, Model, Stage, Watcher, ask, default_policy, make_service, quick_policy, running

from valign.checks import UserError
from valign.guard import Guard
from valign.serving.audit_chain import verify
from valign.serving.audit_store import AuditStore
from valign.serving.keys import Keys
from valign.serving.schemas import OPENAI_CATEGORIES
from valign.serving.service import Rules
from valign.serving.settings import Settings

KEY = "the-key-of-these-tests"
FOREIGN = "Привет, большой мир"
BLOCKED = "a nude toddler"  # neutral words; the block rule


@cache
def client(url, key=KEY):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def entries(folder):
    store = AuditStore(str(folder / "audit.db"))
    verify(store.links())
    return [json.loads(link.body) for link in store.links()]


def metric(url, name):
    lines = ask(f"{url}/metrics").content.decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    with running(make_service(folder, guard=guard)) as url:
        yield url, folder


def test_moderation_in_openais_shape(served):
    found = client(served[0]).moderations.create(input=["a cat on a sofa", "a corpse on the beach"])
    assert [one.flagged for one in found.results] == [False, True]
    assert found.results[1].categories.violence_graphic
    for one in ask(f"{served[0]}/v1/moderations", {"input": ["a cat", "a gory corpse"]}).json()["results"]:
        for part in ("categories", "category_scores", "category_applied_input_types"):
            assert set(one[part]) == set(OPENAI_CATEGORIES)
        assert one["flagged"] == any(one["categories"].values())
        assert all(0 <= score <= 1 for score in one["category_scores"].values())
        assert one["category_applied_input_types"]["violence"] == ["text"]
        assert one["category_applied_input_types"]["illicit/violent"] == []


def test_moderation_counts_results_as_openai_does(served):
    moderate = client(served[0]).moderations.create
    assert len(moderate(input="one text").results) == 1
    assert len(moderate(input=["one", "two", "three"]).results) == 3
    parts = [{"type": "text", "text": "a corpse"}, {"type": "text", "text": "a cat"}]
    assert [one.flagged for one in moderate(input=parts).results] == [True]


def test_intent_counts_and_a_block_rule_has_its_key(served):
    moderate = client(served[0]).moderations.create
    sign = moderate(input="a poster with the words: no weapons allowed")
    assert (sign.results[0].flagged, sign.guard[0]["parts"][0]["action"]) in ((False, "rewrite"), (False, "allow"))
    blocked = moderate(input=BLOCKED)
    assert blocked.results[0].categories.sexual_minors
    assert blocked.results[0].category_scores.sexual_minors == 1.0


def test_a_text_that_the_guard_cannot_read_is_not_passed_as_clean(served):
    with pytest.raises(openai.BadRequestError) as caught:
        client(served[0]).moderations.create(input=["a cat", FOREIGN])
    assert (caught.value.code, caught.value.param) == ("unsupported_script", "input")
    with pytest.raises(openai.BadRequestError) as caught:
        client(served[0]).moderations.create(input=["a cat", "en vacker trädgård med röda blommor i solen"])
    assert (caught.value.code, caught.value.param) == ("unsupported_language", "input")


def image_part(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}}


def test_images_are_moderated_by_the_detector(tmp_path):
    guard = Guard.from_policy(quick_policy(), detector=Watcher(flags=[4]))
    with running(make_service(tmp_path, guard=guard)) as url:
        for red, flagged in ((5, True), (6, False)):
            image = image_part(Image.new("RGB", (9, 7), (red, 0, 0)))
            found = client(url).moderations.create(input=[{"type": "text", "text": "a cat"}, image])
            assert len(found.results) == 1
            assert (found.results[0].flagged, found.results[0].categories.violence) == (flagged, flagged)
            assert found.results[0].category_applied_input_types.violence == ["text", "image"]
        for wrong in ("http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "data:image/png;base64,!"):
            with pytest.raises(openai.BadRequestError) as caught:
                client(url).moderations.create(input=[{"type": "image_url", "image_url": {"url": wrong}}])
            assert caught.value.param == "input"
    assert [entry["scores"]["violence"] for entry in entries(tmp_path) if entry["kind"] == "image-check"] == [0.9, 0.1]


def test_a_huge_image_is_not_unpacked(tmp_path):
    service = make_service(tmp_path, guard=Guard.from_policy(quick_policy(), detector=Watcher()), settings=Settings(max_pixels=100))
    with running(service) as url, pytest.raises(openai.BadRequestError, match="at most 100 pixels"):
        client(url).moderations.create(input=[image_part(Image.new("RGB", (101, 1)))])


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_images_come_back_as_asked(served, form):
    found = client(served[0]).images.generate(prompt="a cat on a sofa", n=3, output_format=form, extra_body={"seed": 7})
    assert isinstance(found.created, int)
    assert [one.revised_prompt for one in found.data] == ["a cat on a sofa"] * 3
    for number, one in enumerate(found.data):
        image = Image.open(io.BytesIO(base64.b64decode(one.b64_json)))
        assert (image.format, image.size) == (form.upper(), (SIDE, SIDE))
        assert abs(image.convert("RGB").getpixel((3, 3))[0] - (8 + number)) <= 3  # the seed's colour, as far as the format keeps it
    assert (found.guard["action"], found.guard["checked"], found.guard["seeds"]) == ("allow", True, [7, 8, 9])


def test_an_unsafe_prompt_gives_an_image_of_its_rewrite(served):
    found = client(served[0]).images.generate(prompt="a corpse on the beach", size=f"{SIDE}x{SIDE}", quality="high")
    assert found.data[0].revised_prompt == "a mossy fallen tree on the beach"
    assert (found.guard["action"], found.guard["stage"], found.guard["categories"]) == ("rewrite", "lexical", ["shocking"])


def test_a_blocked_prompt_is_openais_moderation_error(served):
    with pytest.raises(openai.BadRequestError) as caught:
        client(served[0]).images.generate(prompt=FOREIGN)
    error = caught.value
    assert (error.status_code, error.code, error.type, error.param) == (
        400,
        "moderation_blocked",
        "image_generation_user_error",
        None,
    )
    assert error.body["moderation_details"] == {"moderation_stage": "input", "categories": []}
    assert error.request_id.startswith("req_")


def test_flagged_images_are_made_again_or_held_back(tmp_path):
    # seeds 5 and 6, and what is generated again for them (one seed on for each try), all flagged but 7 and 9
    guard = Guard.from_policy(quick_policy(), detector=Watcher(flags=[3, 4, 5, 6, 8]))
    with running(make_service(tmp_path, guard=guard)) as url:
        generate = client(url).images.generate
        again = generate(prompt="a cat on a sofa", extra_body={"seed": 5})
        assert again.guard["seeds"] == [7]
        assert again.data[0].revised_prompt.startswith("a cat on a sofa, ")
        some = generate(prompt="a cat on a sofa", n=3, extra_body={"seed": 3})  # 3 4 5 and 4 5 6 are all flagged; 5 6 7 ends well
        assert (len(some.data), some.guard["requested"], some.guard["seeds"]) == (1, 3, [7])
        assert some.guard["blocked"] == [{"index": 0, "categories": ["violence"]}, {"index": 1, "categories": ["violence"]}]
        with pytest.raises(openai.BadRequestError) as caught:
            generate(prompt="a cat on a sofa", n=2, extra_body={"seed": 3})
        assert caught.value.body["moderation_details"] == {"moderation_stage": "output", "categories": ["violence"]}
        assert metric(url, 'valign_pictures_total{outcome="blocked"}') == 4
    last = entries(tmp_path)[-1]
    assert (last["outcome"], [one["sha256"] for one in last["pictures"]]) == ("blocked", [None, None])


def test_the_log_knows_every_decision_and_image_but_no_words(served):
    url, folder = served
    found = client(url).images.with_raw_response.generate(prompt="a burglar in a hallway")
    request = found.headers["x-request-id"]
    image = base64.b64decode(found.parse().data[0].b64_json)
    client(url).moderations.create(input="an unusual prompt about zebras")
    store = AuditStore(str(folder / "audit.db"))
    (link,) = store.find(request=request)
    body = json.loads(link.body)
    assert body["pictures"][0]["sha256"] == hashlib.sha256(image).hexdigest()
    assert body["decision"]["trace"][-1]["stage"] == "intention"
    text = "\n".join(link.body for link in store.links())
    for words in ("zebras", "burglar in", "hallway", hashlib.sha256(b"an unusual prompt about zebras").hexdigest()):
        assert words not in text
    verify(store.links())


def test_prompts_are_logged_in_full_where_the_site_wants_it_but_never_after_a_block_rule(tmp_path):
    with running(make_service(tmp_path, settings=Settings(names=("tiny",), steps=4, prompts="full"))) as url:
        client(url).images.generate(prompt="a corpse on the beach")
        client(url).moderations.create(input=BLOCKED)
        with pytest.raises(openai.BadRequestError, match="blocked by this server's policy"):
            client(url).images.generate(prompt=BLOCKED)
    found = entries(tmp_path)
    drawn = next(entry for entry in found if entry["kind"] == "draw")
    assert (drawn["decision"]["prompt"], drawn["result"]) == ("a corpse on the beach", "a mossy fallen tree on the beach")
    assert drawn["attempts"][0]["text"] == "a mossy fallen tree on the beach"
    assert "toddler" not in json.dumps(found)


def test_equal_prompts_have_equal_hashes_that_need_the_secret(served):
    url, folder = served
    for _ in range(2):
        client(url).moderations.create(input="seven quiet herons")
    from valign.serving.audit_record import Recorder

    store = AuditStore(str(folder / "audit.db"))
    assert len(store.find(prompt=Recorder(b"secret").hash("seven quiet herons"))) == 2
    assert store.find(prompt=Recorder(b"another").hash("seven quiet herons")) == []


@pytest.mark.parametrize("failing", ["stage", "detector", "detector that is asked"])
def test_a_check_that_is_down_lets_nothing_through(tmp_path, failing):
    stage, watcher = Stage(), Watcher()
    guard = Guard(default_policy(), [stage], detector=watcher)
    with running(make_service(tmp_path, guard=guard)) as url:
        stage.fails, watcher.fails = failing == "stage", failing != "stage"
        requests = {
            "stage": lambda: client(url).images.generate(prompt="a cat"),
            "detector": lambda: client(url).images.generate(prompt="a cat"),
            "detector that is asked": lambda: client(url).moderations.create(input=[image_part(Image.new("RGB", (8, 8)))]),
        }
        with pytest.raises(openai.InternalServerError) as caught:
            requests[failing]()
        assert (caught.value.status_code, caught.value.code) == (503, "check_unavailable")
        assert "retry-after" in caught.value.response.headers
        if failing == "stage":
            with pytest.raises(openai.InternalServerError):
                client(url).moderations.create(input="a cat")
    assert len(entries(tmp_path)) >= 2


def test_a_log_that_is_gone_lets_nothing_through(tmp_path):
    with running(make_service(tmp_path)) as url:
        (tmp_path / "audit.db").rename(tmp_path / "moved.db")
        for request in (lambda: client(url).images.generate(prompt="a cat"), lambda: client(url).moderations.create(input="a cat")):
            with pytest.raises(openai.InternalServerError) as caught:
                request()
            assert (caught.value.status_code, caught.value.code) == (503, "audit_unavailable")
        assert metric(url, "valign_audit_failures_total") == 2
        (tmp_path / "moved.db").rename(tmp_path / "audit.db")
        assert client(url).images.generate(prompt="a cat").data


def test_a_model_that_fails_is_an_error_in_the_log(tmp_path):
    model = Model()
    with running(make_service(tmp_path, model=model)) as url:
        model.fails = True
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).images.generate(prompt="a cat")
        assert (caught.value.status_code, caught.value.code) == (500, "internal_error")
        model.fails = False
        assert client(url).images.generate(prompt="a cat").data
    assert [entry["outcome"] for entry in entries(tmp_path) if entry["kind"] == "draw"] == ["failed", "drawn"]


def test_images_of_many_requests_share_a_model_call(tmp_path):
    """A call is made as soon as three of one number of steps are there: they would wait a minute for a third."""
    model, settings = Model(), Settings(names=("tiny",), steps=4, batch_size=3, batch_wait=60.0)
    with running(make_service(tmp_path, model=model, settings=settings)) as url, ThreadPoolExecutor(6) as pool:
        ask_for = client(url).images.generate
        works = [pool.submit(ask_for, prompt=f"a cat {i}", extra_body={"steps": 3 + i % 2}) for i in range(6)]
        assert all(len(work.result().data) == 1 for work in works)
    assert sorted((len(prompts), steps) for prompts, _, steps in model.calls[1:]) == [(3, 3), (3, 4)]


def test_a_full_queue_says_when_to_come_again(tmp_path):
    model = Model(wait=threading.Event())
    settings = Settings(names=("tiny",), max_images=10, steps=4)
    with running(make_service(tmp_path, model=model, settings=settings)) as url:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client(url).images.generate, prompt="a cat", n=10)
            assert model.called.wait(10)
            with pytest.raises(openai.InternalServerError) as caught:
                client(url).images.generate(prompt="a dog")
            assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            model.wait.set()
            assert len(first.result().data) == 10
        assert client(url).images.generate(prompt="a dog").data


def test_a_request_that_takes_too_long_is_given_up_and_its_place_kept_until_it_ends(tmp_path):
    model = Model(wait=threading.Event())
    service = make_service(tmp_path, model=model, settings=Settings(names=("tiny",), timeout=0.3, steps=4))
    with running(service) as url:
        with pytest.raises(openai.InternalServerError) as caught:
            client(url).images.generate(prompt="a cat")
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert metric(url, 'valign_under_way{queue="pictures"}') == 1
        model.wait.set()
    assert b'valign_under_way{queue="pictures"} 0.0' in service.metrics.text()  # a server ends when its work has ended
    assert entries(tmp_path)[-1]["outcome"] == "failed"


def test_only_keys_get_in_and_each_has_its_rate(tmp_path, caplog):
    keys = Keys.load(environment=f"{KEY} another-key-of-these-tests")
    settings = Settings(names=("tiny",), steps=4, per_minute=5)
    with running(make_service(tmp_path, keys=keys, settings=settings)) as url:
        for wrong in ("", "x", KEY[:-1], f"{KEY} "[:-1] + "x"):
            with pytest.raises(openai.AuthenticationError) as caught:
                client(url, wrong or "none").models.list()
            assert (caught.value.code, caught.value.response.headers["www-authenticate"]) == ("invalid_api_key", "Bearer")
        assert ask(f"{url}/v1/models").status == 401
        assert ask(f"{url}/v1/models", headers={"authorization": f"basic {KEY}"}).status == 401
        client(url).images.generate(prompt="a cat", n=4)
        client(url).moderations.create(input="a cat")
        with pytest.raises(openai.RateLimitError) as caught:
            client(url).images.generate(prompt="a cat", n=2)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 24
        assert client(url, "another-key-of-these-tests").moderations.create(input="a cat").results
        assert ask(f"{url}/healthz").status == 200  # no key needed
    assert KEY not in caplog.text
    assert {entry.get("caller") for entry in entries(tmp_path)} == {None, "environment-1", "environment-2"}


def test_unknown_models_routes_and_methods(served):
    with pytest.raises(openai.NotFoundError) as caught:
        client(served[0]).images.generate(prompt="a cat", model="another")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert client(served[0]).images.generate(prompt="a cat", model="tiny").data
    assert [one.id for one in client(served[0]).models.list()] == ["tiny"]
    for data, path, status in ((None, "/v1/moderations", 405), ({}, "/v1/nothing", 404), (None, "/", 404)):
        found = ask(f"{served[0]}{path}", data)
        assert found.status == status
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


BAD = [
    ("images/generations", {}, "prompt"),
    ("images/generations", {"prompt": ""}, "prompt"),
    ("images/generations", {"prompt": "   \u200b"}, "prompt"),
    ("images/generations", {"prompt": "a\u0000b"}, "prompt"),
    ("images/generations", {"prompt": "a\ud800b"}, "prompt"),
    ("images/generations", {"prompt": "x" * 5000}, "prompt"),
    ("images/generations", {"prompt": "x" * 1_000_000}, "prompt"),
    ("images/generations", {"prompt": 3}, "prompt"),
    ("images/generations", {"prompt": ["a cat"]}, "prompt"),
    ("images/generations", {"prompt": "a cat", "n": 0}, "n"),
    ("images/generations", {"prompt": "a cat", "n": 11}, "n"),
    ("images/generations", {"prompt": "a cat", "n": "2"}, "n"),
    ("images/generations", {"prompt": "a cat", "n": True}, "n"),
    ("images/generations", {"prompt": "a cat", "size": "1024x1024"}, "size"),
    ("images/generations", {"prompt": "a cat", "size": "big"}, "size"),
    ("images/generations", {"prompt": "a cat", "response_format": "url"}, "response_format"),
    ("images/generations", {"prompt": "a cat", "stream": True}, "stream"),
    ("images/generations", {"prompt": "a cat", "background": "transparent"}, "background"),
    ("images/generations", {"prompt": "a cat", "output_format": "gif"}, "output_format"),
    ("images/generations", {"prompt": "a cat", "steps": 101}, "steps"),
    ("images/generations", {"prompt": "a cat", "prompt_embeds": [1]}, "prompt_embeds"),
    ("moderations", {}, "input"),
    ("moderations", {"input": ""}, "input"),
    ("moderations", {"input": []}, "input"),
    ("moderations", {"input": None}, "input"),
    ("moderations", {"input": ["a cat", ""]}, "input"),
    ("moderations", {"input": ["a cat", {"type": "text", "text": "mixed"}]}, "input"),
    ("moderations", {"input": [{"type": "sound", "text": "x"}]}, "input"),
    ("moderations", {"input": ["a cat"] * 65}, "input"),
]


@pytest.mark.parametrize(("route", "body", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_names_the_field(served, route, body, param):
    found = ask(f"{served[0]}/v1/{route}", body)
    assert (found.status, found.json()["error"]["param"]) == (400, param)
    assert len(found.content) < 1000  # what was sent is not sent back


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'"text"', b"{}" * 10, b'{"input": NaN}'])
def test_a_body_that_is_not_a_request(served, body):
    for kind in ("application/json", "text/plain"):
        found = ask(f"{served[0]}/v1/moderations", body, headers={"content-type": kind})
        assert found.status == 400
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_cut_off(tmp_path):
    with running(make_service(tmp_path, settings=Settings(max_body=1000))) as url:
        found = ask(f"{url}/v1/moderations", {"input": "x" * 2000})
        assert (found.status, found.json()["error"]["code"]) == (413, "request_too_large")
        assert ask(f"{url}/v1/moderations", {"input": "x" * 500}).status == 200


def test_a_body_that_never_comes_is_not_waited_for(tmp_path):
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with running(make_service(tmp_path, settings=Settings(body_timeout=0.2))) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(head + b'{"input": ')
            found = connection.recv(10_000)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in found


def test_ready_only_when_loaded_and_warm(tmp_path):
    go, warm, model = threading.Event(), threading.Event(), Model()

    def load():
        go.wait(10)
        return model

    service = make_service(tmp_path, load=load)
    service.on_ready = warm.set
    with running(service, ready=False) as url:
        assert ask(f"{url}/healthz").json() == {"status": "ok"}
        assert ask(f"{url}/readyz").status == 503
        found = ask(f"{url}/v1/moderations", {"input": "a cat"})
        assert (found.status, found.json()["error"]["code"]) == (503, "not_ready")
        assert metric(url, "valign_ready") == 0
        go.set()
        assert warm.wait(10)
        assert model.calls
        assert ask(f"{url}/readyz").json()["policy"] == "default"
        assert metric(url, "valign_ready") == 1


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path):
    def load():
        raise UserError("no such model")

    service, failures = make_service(tmp_path, load=load), SimpleQueue()
    service.on_failure = failures.put
    with running(service, ready=False) as url:
        assert str(failures.get(timeout=10)) == "no such model"
        assert ask(f"{url}/readyz").status == 503


def test_a_reload_takes_new_rules_and_a_broken_one_keeps_the_old(tmp_path):
    import asyncio

    guards = [Guard.from_policy(quick_policy()), Guard.from_policy(quick_policy(max_chars=20))]
    made = iter([Rules(guards[0], Keys()), None, Rules(guards[1], Keys.load(environment=KEY))])

    def load_rules():
        rules = next(made)
        if rules is None:
            raise UserError("policy.yaml:3: categories must be a list")
        return rules

    service = make_service(tmp_path, load_rules=load_rules)
    loops = []
    start = service.start

    async def remembered():
        loops.append(asyncio.get_running_loop())
        await start()

    service.start = remembered
    long = "a cat on a very long and comfortable sofa"
    with running(service) as url:
        for works, status in ((False, 200), (True, 400)):
            assert asyncio.run_coroutine_threadsafe(service.reload(), loops[0]).result(10) is works
            found = ask(f"{url}/v1/moderations", {"input": long}, key=KEY)
            assert found.status == status
            assert ask(f"{url}/readyz").json()["reload"] == ("ok" if works else "failed, see the log")
        assert ask(f"{url}/v1/models").status == 401  # the keys are new as well
        assert metric(url, 'valign_reloads_total{outcome="failed"}') == 1
    assert [entry["kind"] for entry in entries(tmp_path)] == ["start", "check", "reload"]


def test_hundreds_of_clients_at_once(tmp_path):
    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    prompts = [("a cat on a sofa", "a corpse on the beach", FOREIGN)[i % 3] for i in range(200)]
    settings = Settings(names=("tiny",), steps=4, max_images=400, batch_wait=0.0)
    with running(make_service(tmp_path, guard=guard, settings=settings)) as url, ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda prompt: ask(f"{url}/v1/images/generations", {"prompt": prompt}), prompts))
    for prompt, answer in zip(prompts, found):
        assert answer.status == (400 if prompt == FOREIGN else 200)
        if prompt == "a corpse on the beach":
            assert answer.json()["data"][0]["revised_prompt"] == "a mossy fallen tree on the beach"
        assert prompt == FOREIGN or answer.json()["guard"]["checked"]
    drawn = [entry for entry in entries(tmp_path) if entry["kind"] == "draw"]
    assert len(drawn) == 200
    assert len({answer.headers["x-request-id"] for answer in found}) == 200


def test_a_thousand_clients_at_once_are_served_or_told_to_wait(tmp_path):
    """A thousand open connections ask in the same moment, with queues of the usual size: nobody is dropped or let through."""
    body = json.dumps({"prompt": "a corpse on the beach", "seed": 1}).encode()
    request = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: test\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body

    async def crowd(port):
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1000)]

        async def one(reader, writer):
            writer.write(request)
            answer = await reader.read()
            writer.close()
            head, _, text = answer.partition(b"\r\n\r\n")
            return int(head.split()[1]), head, json.loads(text)

        return await asyncio.gather(*(one(*stream) for stream in streams))

    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    with running(make_service(tmp_path, guard=guard)) as url:
        found = asyncio.run(crowd(int(url.rpartition(":")[2])))
        assert ask(f"{url}/readyz").status == 200
    drawn = [answer for status, _, answer in found if status == 200]
    waiting = [(head, answer) for status, head, answer in found if status == 503]
    assert drawn
    assert len(drawn) + len(waiting) == 1000
    assert all(answer["data"][0]["revised_prompt"] == "a mossy fallen tree on the beach" for answer in drawn)
    assert all(answer["error"]["code"] == "overloaded" and b"retry-after" in head.lower() for head, answer in waiting)
    assert sum(entry.get("outcome") == "drawn" for entry in entries(tmp_path)) == len(drawn)


def test_stopping_answers_what_is_under_way(tmp_path):
    model = Model(wait=threading.Event())
    with ThreadPoolExecutor(1) as pool:
        with running(make_service(tmp_path, model=model), on_stop=model.wait.set) as url:  # goes on once the server stops
            work = pool.submit(client(url).images.generate, prompt="a cat", n=2)
            assert model.called.wait(10)
        assert len(work.result().data) == 2
    assert entries(tmp_path)[-1]["outcome"] == "drawn"
