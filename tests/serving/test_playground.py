"""The playground: its functions over a running service, its login, and the page in a headless Chromium."""

import asyncio
import json
import shutil

import pytest

pytest.importorskip("gradio", reason="the playground needs the extra [ui]")

from serving_stand_ins import Model, Watcher, ask, make_service, quick_policy, running

from valign.guard import Guard
from valign.serving.audit_store import AuditStore
from valign.serving.gate import PAGE as PATH
from valign.serving.keys import Keys
from valign.serving.playground import SLIDERS, Playground, mount
from valign.serving.settings import Settings

KEY = "the-key-of-these-tests"
PROMPT = "a corpse on the beach"


def told(service, function):
    """The result of the playground's coroutine, on a loop of the service's own."""

    async def run():
        ready = asyncio.Event()
        service.on_ready = ready.set
        await service.start()
        await ready.wait()
        try:
            return await function(Playground(service))
        finally:
            await service.stop()

    return asyncio.run(run())


def images_of(prompt):
    return lambda play: play.generate("me", prompt, 7, 3)


def entries(folder):
    return [json.loads(link.body) for link in AuditStore(str(folder / "audit.db")).links()]


def test_examine_shows_words_rewrite_and_stages(tmp_path):
    verdict, stages = told(make_service(tmp_path), lambda play: play.examine("me", PROMPT, []))
    assert "<mark>corpse</mark>" in verdict
    assert "<ins>mossy fallen tree</ins>" in verdict
    assert stages.count('class="va-stage"') == 5  # two rules, two stages, the intent
    assert [(entry["kind"], entry.get("caller")) for entry in entries(tmp_path)] == [("start", None), ("check", "me")]


def test_a_slider_changes_what_is_shown_but_not_what_is_logged(tmp_path):
    async def moved(play):
        assert await play.levels() == {"keep_words": 0.4, "keep_meaning": 0.7}
        own = await play.levels()
        values = [{"keep_words": 0.95}.get(name, own.get(name, 0)) for name in SLIDERS]
        return await play.examine("me", PROMPT, values)

    verdict, _ = told(make_service(tmp_path), moved)
    assert "keeps too few words" in verdict
    assert entries(tmp_path)[-1]["action"] == "rewrite"


def settings(**changes):
    return Settings(names=("tiny",), steps=4, batch_wait=0.0, **changes)


@pytest.mark.parametrize(("compare", "calls"), [(False, 1), (True, 2)])
def test_an_image_beside_that_of_the_prompt_as_typed(tmp_path, compare, calls):
    model, guard = Model(), Guard.from_policy(quick_policy(), detector=Watcher())
    service = make_service(tmp_path, model=model, guard=guard, settings=settings(compare=compare))
    shown = told(service, images_of(PROMPT))
    assert shown.count("data:image/png;base64,") == calls
    assert [prompts for prompts, _, _ in model.calls[1:]] == [[PROMPT]] * (calls - 1) + [["a mossy fallen tree on the beach"]]
    assert [entry["outcome"] for entry in entries(tmp_path)[1:]] == ["compared"] * (calls - 1) + ["drawn"]


def test_a_flagged_image_of_the_prompt_as_typed_is_held_back(tmp_path):
    class OnlyFirst(Watcher):
        seen = 0

        def detect(self, images):
            self.seen += any(image.getpixel((0, 0))[0] == 8 for image in images)  # of seed 7: neither warm-up nor canaries
            self.flags = {7} if self.seen == 1 else set()
            return super().detect(images)

    guard = Guard.from_policy(quick_policy(), detector=OnlyFirst())
    shown = told(
        make_service(tmp_path, guard=guard, settings=settings(compare=True)), lambda play: play.generate("me", PROMPT, 7, 3)
    )
    assert shown.count("data:image/png;base64,") == 1
    assert "held back: image check 0.900 of 0.500 violence" in shown


@pytest.mark.parametrize("prompt", ["a nude toddler", "Привет, большой мир", "", "x" * 5000])
def test_what_is_blocked_gives_no_image_in_any_form(tmp_path, prompt):
    model, guard = Model(), Guard.from_policy(quick_policy(), detector=Watcher())
    service = make_service(tmp_path, model=model, guard=guard, settings=settings(compare=True))
    shown = told(service, images_of(prompt))
    assert "<img" not in shown
    assert "va-block" in shown
    assert len(model.calls) == 1  # the warm-up


def test_without_an_image_check_no_image_is_made_as_typed(tmp_path):
    model = Model()
    shown = told(
        make_service(tmp_path, model=model, settings=settings(compare=True)), lambda play: play.generate("me", PROMPT, 7, 3)
    )
    assert "<img" not in shown
    assert len(model.calls) == 1


def test_the_page_counts_against_the_rate(tmp_path):
    async def twice(play):
        return [await play.examine("me", PROMPT, []) for _ in range(2)]

    first, second = told(make_service(tmp_path, settings=settings(per_minute=1)), twice)
    assert "is rewritten" in first[0]
    assert "requests per minute" in second[0]


def test_a_server_with_keys_asks_for_one(tmp_path):
    service = make_service(tmp_path, keys=Keys.load(environment=KEY))
    with running(service, mounted=lambda app: mount(app, service, login=True)) as url:
        assert ask(f"{url}{PATH}/config").status == 401
        assert ask(f"{url}{PATH}/").status == 200  # the form
        form = {"content-type": "application/x-www-form-urlencoded"}
        for name, key, status in (("environment-1", KEY, 200), ("environment-1", "wrong", 400), ("another", KEY, 400)):
            assert ask(f"{url}{PATH}/login", f"username={name}&password={key}".encode(), headers=form).status == status
        assert ask(f"{url}/v1/models", key=KEY).status == 200


def test_a_key_that_is_taken_away_ends_its_pages(tmp_path):
    keys = Keys.load(environment=f"{KEY} another-key-of-these-tests")
    service = make_service(tmp_path, keys=keys)
    with running(service, mounted=lambda app: mount(app, service, login=True)) as url:
        form = {"content-type": "application/x-www-form-urlencoded"}
        cookies = []
        for name, key in (("environment-1", KEY), ("environment-2", "another-key-of-these-tests")):
            reply = ask(f"{url}{PATH}/login", f"username={name}&password={key}".encode(), headers=form)
            cookies.append({"cookie": "; ".join(one.split(";")[0] for one in reply.headers.get_all("set-cookie"))})
        assert [ask(f"{url}{PATH}/config", headers=one).status for one in cookies] == [200, 200]
        service.sessions.end({"environment-2"})
        assert [ask(f"{url}{PATH}/config", headers=one).status for one in cookies] == [200, 401]


def test_an_owner_without_a_key_gets_nothing(tmp_path):
    async def both(play):
        return [await play.generate(name, PROMPT, 7, 3) for name in ("environment-1", "gone")]

    known, unknown = told(make_service(tmp_path, keys=Keys.load(environment=KEY)), both)
    assert "<img" in known
    assert "<img" not in unknown
    assert "No valid API key" in unknown


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver here (Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    guard = Guard.from_policy(quick_policy(), detector=Watcher())
    service = make_service(tmp_path, guard=guard, settings=settings(compare=True))
    with running(service, mounted=lambda app: mount(app, service, login=False)) as url:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            wait = WebDriverWait(browser, 120)
            phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
            browser.get(f"{url}{PATH}/")
            box = wait.until(lambda b: b.find_element(By.CSS_SELECTOR, "#prompt textarea"))
            box.send_keys(PROMPT)
            browser.find_element(By.ID, "generate").click()
            wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".va-images img")) == 2)
            wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, ".va-stage")) == 5)
            assert browser.find_element(By.CSS_SELECTOR, "#verdict ins").text == "mossy fallen tree"
            assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        finally:
            browser.quit()
