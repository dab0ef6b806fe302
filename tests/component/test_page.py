"""The status page in a real browser: the application over a scripted machine, and Chromium without a window."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from gpusvc.api.page.clock import duration
from gpusvc.journal.events import EventType
from gpusvc.quantity import GIB
from gpusvc.state.line import Blocker, Notice
from gpusvc.status.models import ModelState
from tests.component.browser import PROGRAM, Browser, Page, opened
from tests.component.scene import TRAIN, Scene, furnish, refusal, serving

# One process of pytest's runs them all, so that there is one browser.
pytestmark = pytest.mark.xdist_group("browser")

LIVE = "document.getElementById('link').textContent === 'Live'"

# The least contrast of all that is written, as WCAG 2.1 has it, and where that is.
LEAST_CONTRAST = """(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const over = (ground, color) => {
    context.fillStyle = ground; context.fillRect(0, 0, 1, 1);
    context.fillStyle = color; context.fillRect(0, 0, 1, 1);
    const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
    return `rgb(${r}, ${g}, ${b})`;
  };
  const luminance = (color) => {
    const [r, g, b] = color.match(/\\d+/g).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => element
    ? over(ground(element.parentElement), getComputedStyle(element).backgroundColor) : "rgb(255, 255, 255)";
  let least = [21, ""];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || element.closest(".unseen, .skip, noscript, [hidden]")) continue;
    const back = ground(element);
    const [one, other] = [luminance(back), luminance(over(back, getComputedStyle(element).color))].sort();
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < least[0]) least = [contrast, text];
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("chromium"))
    yield made
    made.close()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    made = Scene(tmp_path, programs)
    furnish(made)
    return made


Scenario = Callable[[Page], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture
def run(browser: Browser, scene: Scene) -> Run:
    """Plays a scenario on a page of its own, and sees to it that the browser had nothing to complain of."""

    def play(scenario: Scenario) -> None:
        async def whole() -> None:
            async with asyncio.timeout(30), serving(scene), opened(browser) as page:
                await page.look()
                await scenario(page)
                assert page.complaints == []
                assert await page.ask("document.title") != "owned"

        asyncio.run(whole())

    return play


async def show(page: Page, scene: Scene, query: str = "") -> None:
    await page.goto(scene.url + query)
    await page.until(LIVE)


def row(name: str) -> str:
    return f"document.getElementById('model-{name}')"


def in_state(name: str, state: ModelState) -> str:
    return f"{row(name)}.dataset.state === '{state}'"


def test_the_browser_is_there() -> None:
    assert PROGRAM.exists(), "./test installs it: chromium-headless-shell"


# ---- what is shown ----


def test_models_gpus_and_events_are_shown_as_they_are(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        assert "3 ready, 1 starting, 1 failed, 1 stopped" in await page.text("#models")
        assert "21.0 GiB on GPU 1" in await page.text("#model-coder")
        assert "in use" in await page.text("#model-coder")
        assert "idle for 5 min, stays loaded" in await page.text("#model-embed")
        assert "idle for 2 min, unloads in 12 min" in await page.text("#model-qwen")
        assert "CUDA error: out of memory" in await page.text("#model-scribe")
        assert "It loads: 31 % of 6.0 GiB." in await page.text("#model-whisper")
        gpu = await page.text("#gpu-1")
        assert "24.5 GiB of 48.0 GiB, 37 % busy" in gpu
        assert f"{TRAIN} (PID 31337)" in gpu
        assert "no model" in gpu
        assert "GPU 1 has had 0.2 GiB of free VRAM for 10s." in await page.text("#events")

    run(scenario)


def test_the_bar_is_as_long_as_what_is_held(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        rects = "[...document.querySelectorAll('#gpu-1 rect')].map(r => [r.className.baseVal, r.width.baseVal.value])"
        assert await page.ask(rects) == [["hue0", 437.5], ["foreign", 62.5], ["rest", pytest.approx(10.4)]]
        colours = "[...document.querySelectorAll('#gpu-1 rect')].map(r => getComputedStyle(r).fill)"
        assert len(set(await page.ask(colours))) == 3

    run(scenario)


def test_what_is_not_known_is_not_shown_as_nothing(run: Run, scene: Scene) -> None:
    scene.foreign_bytes = None
    scene.change("qwen", vram_bytes=None)

    async def scenario(page: Page) -> None:
        await show(page, scene)
        assert "unknown VRAM on GPU 0" in await page.text("#model-qwen")
        assert "unknown" in await page.text("#gpu-1")
        assert "driver and others" not in await page.text("#gpu-1")

    run(scenario)


def test_a_page_without_an_answer_of_systemd_says_why(run: Run, scene: Scene) -> None:
    scene.snapshots.problem = refusal()

    async def scenario(page: Page) -> None:
        await show(page, scene)
        assert "<b>coder</b> is in use." in await page.text(".problem")
        assert await page.ask("document.querySelectorAll('.problem').length") == 1
        assert "Not known." in await page.text("#models")
        assert "starts on GPU 0" in await page.text("#events")

    run(scenario)


def test_what_strangers_wrote_stays_text(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene, "?log=qwen")
        await page.until("document.querySelectorAll('#log-lines p').length === 3")
        for place in ("#model-scribe", "#events", "#log-lines"):
            assert "<script>" in await page.text(place)
        assert await page.ask("document.querySelectorAll('main script, main img, main b').length") == 0

    run(scenario)


# ---- what happens ----


def test_a_click_starts_a_model_that_is_then_seen_to_be_ready_and_evicted(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.click("#run-flux")
        await page.until(in_state("flux", ModelState.STARTING))
        assert scene.jobs.asked == [("start", "flux")]
        scene.become_ready("flux", gpu=0, vram=6 * GIB)
        await page.until(in_state("flux", ModelState.READY))
        await page.until("document.getElementById('announcement').textContent === 'flux is ready.'")
        assert "6.0 GiB on GPU 0" in await page.text("#model-flux")
        assert "flux is ready on GPU 0." in await page.text("#events li:first-child")
        scene.be_evicted("flux", "room for coder")
        await page.until(in_state("flux", ModelState.STOPPED))
        assert "flux is evicted: room for coder." in await page.text("#events")

    run(scenario)


def test_a_double_click_does_not_stop_what_it_started(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.click("#run-flux", count=2)
        await page.until(in_state("flux", ModelState.STARTING))
        assert scene.jobs.asked == [("start", "flux")]

    run(scenario)


def test_a_model_in_use_is_stopped_when_that_is_said_twice(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.click("#run-coder")
        await page.until(in_state("coder", ModelState.STOPPING))
        assert page.questions == ["coder is in use. Stop it all the same?"]

    run(scenario)


def test_a_model_is_pinned_and_unpinned_by_keyboard_and_the_focus_stays(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.ask("document.getElementById('run-qwen').focus()")
        await page.press("Tab")
        assert await page.ask("document.activeElement.id") == "pin-qwen"
        assert await page.ask("document.activeElement.matches(':focus-visible')")
        for key, pressed in ((" ", "true"), ("Enter", "false")):
            await page.until("performance.now() - (window.last ?? -1e9) > 600")
            await page.press(key)
            await page.ask("window.last = performance.now()")
            await page.until(f"document.getElementById('pin-qwen').getAttribute('aria-pressed') === '{pressed}'")
            assert await page.ask("document.activeElement.id") == "pin-qwen"
            assert scene.paths.pin_file("qwen").exists() is (pressed == "true")
            assert ("unloads" in await page.text("#model-qwen")) is (pressed == "false")

    run(scenario)


def test_the_focus_stays_on_the_button_that_start_becomes(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.ask("document.getElementById('run-flux').focus()")
        await page.press("Enter")
        await page.until(in_state("flux", ModelState.STARTING))
        assert await page.ask("document.activeElement.id") == "run-flux"
        assert await page.ask("document.activeElement.textContent") == "Stop flux"

    run(scenario)


def test_models_come_and_go(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.ask("document.getElementById('pin-qwen').focus()")
        scene.add("dinner")
        del scene.models["embed"]
        scene.happen(EventType.LEAK, "Something happened.", model="dinner")
        await page.until(row("dinner"))
        names = "[...document.querySelectorAll('.model')].map(model => model.dataset.name)"
        assert await page.ask(names) == ["coder", "dinner", "flux", "qwen", "scribe", "whisper"]
        assert await page.ask("document.activeElement.id") == "pin-qwen"

    run(scenario)


def test_who_waits_for_room_is_shown_as_long_as_it_waits(run: Run, scene: Scene) -> None:
    scene.add("coder", state=ModelState.STARTING, text="coder waits for qwen (in use). It is next.")
    first = Notice(scene.paths, "1-coder", "coder", 1, 0)
    second = Notice(scene.paths, "2-late", "<b>late</b>", 2, 0)

    async def scenario(page: Page) -> None:
        await show(page, scene)
        assert await page.ask("document.getElementById('line')") is None
        first.tell([Blocker("qwen", "in use")], [])
        second.tell([], [])
        await page.until("document.querySelectorAll('#line li').length === 2")
        said = await page.text("#line")
        assert re.search(r"coder has waited (a moment|\d+ s) for qwen \(in use\)\. It is next\.", said)
        assert re.search(r"<b>late</b> has waited .* in line behind coder\. coder is next\.", said)
        await page.until("/waited [1-9]\\d* s/.test(document.querySelector('#line li').innerText)")
        first.close()
        await page.until("document.querySelectorAll('#line li').length === 1")
        second.close()
        await page.until("document.getElementById('line') === null")

    run(scenario)


def test_clocks_go_on_by_themselves(run: Run, scene: Scene) -> None:
    scene.use("qwen", in_use=False, idle=20.2)

    async def scenario(page: Page) -> None:
        await show(page, scene)
        seen = re.search(r"idle for (\d+) s", await page.text("#model-qwen"))
        assert seen is not None
        await page.until(f"Number({row('qwen')}.innerText.match(/idle for (\\d+) s/)[1]) > {int(seen[1])}")

    run(scenario)


def test_the_script_and_the_server_tell_durations_alike(run: Run, scene: Scene) -> None:
    seconds = [-3.5, 0.5, 1.5, 59.5, 60.5, 3599.5, 3600.5, 7321.5, 86399.5, 86400.5, 200000.5]
    words = ["a moment", "a moment", "1 s", "59 s", "1 min", "59 min", "1 h 0 min", "2 h 2 min", "23 h 59 min"]
    words += ["1 d 0 h", "2 d 7 h"]

    async def scenario(page: Page) -> None:
        await show(page, scene)
        # Its clock stands still, and at the next refresh it is set by the server's.
        await page.ask("Date.now = () => 0")
        before = await page.ask("document.getElementById('moment').dataset.now")
        await page.ask("document.dispatchEvent(new Event('visibilitychange'))")
        await page.until(f"document.getElementById('moment').dataset.now !== '{before}'")
        now = await page.ask("Number(document.getElementById('moment').dataset.now)")
        clocks = "".join(f"<i data-since='{now - second}'></i>" for second in seconds)
        await page.ask(f'document.querySelector("footer").innerHTML = "{clocks}"')
        read = "[...document.querySelectorAll('footer i')].map(clock => clock.textContent)"
        await page.until(f"{read}.every(Boolean)")
        assert await page.ask(read) == words

    run(scenario)
    assert [duration(second) for second in seconds] == words


def test_a_refusal_is_told_and_can_be_put_away(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        scene.jobs.error = refusal()
        await page.click("#run-flux")
        await page.until("document.querySelector('#alert p')")
        said = await page.text("#alert p")
        assert said == "No GPU has room for flux: it takes 18.0 GiB. <b>coder</b> is in use."
        await page.click("#alert button")
        assert await page.text("#alert") == ""
        page.complaints.clear()  # the status itself is one

    run(scenario)


def test_a_model_may_be_called_as_parts_of_the_page_are(run: Run, scene: Scene) -> None:
    names = ("lines", "name", "gpus", "models", "a:b.c")
    for name in names:
        scene.add(name, state=ModelState.READY, gpu=0, idle=5.0)

    async def scenario(page: Page) -> None:
        await show(page, scene)
        ids = await page.ask("[...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))
        await page.click("#show-a\\%3Ab\\.c")
        scene.say("a:b.c", "hello")
        await page.until("document.getElementById('log-lines').innerText.includes('hello')")

    run(scenario)


def test_a_log_is_followed_live_and_put_back_to_its_place(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        await page.click("#show-qwen")
        await page.until("document.querySelectorAll('#log-lines p').length === 3")
        assert await page.ask("document.activeElement.id") == "log-lines"
        for number in range(60):
            scene.say("qwen", f"line {number}")
        await page.until("document.getElementById('log-lines').innerText.includes('line 59')")
        lines = "document.getElementById('log-lines')"
        assert await page.ask(f"{lines}.scrollHeight - {lines}.scrollTop - {lines}.clientHeight") < 2
        await page.ask("document.getElementById('log-lines').scrollTop = 0")
        scene.say("qwen", "the last")
        await page.until("document.getElementById('log-lines').innerText.includes('the last')")
        assert await page.ask("document.getElementById('log-lines').scrollTop") == 0
        await page.click("#show-coder")
        await page.until("document.getElementById('log-name').textContent === ' of coder'")
        assert await page.ask("document.querySelectorAll('#log-lines p').length") == 0

    run(scenario)


# ---- for everybody ----


def test_without_a_script_all_can_be_read_and_done(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await page.call("Emulation.setScriptExecutionDisabled", value=True)
        await page.goto(scene.url + "?log=qwen")
        assert "idle for 2 min, unloads in 12 min" in await page.text("#model-qwen")
        assert "Load again" in await page.text("#link")
        assert "<script>document.title = 'owned'</script><b>bold</b>" in await page.text("#log-lines")
        async with page.leading_on():
            await page.click("#run-flux")
        assert await page.ask(in_state("flux", ModelState.STARTING))
        assert await page.ask("location.pathname") == "/"
        assert scene.jobs.asked == [("start", "flux")]

    run(scenario)


@pytest.mark.parametrize("width", [360, 700, 1000, 1400])
def test_nothing_is_wider_than_the_window(run: Run, scene: Scene, width: int) -> None:
    scene.add("n" * 120, state=ModelState.FAILED, text="x" * 300, file=f'description = "{"y" * 300}"')
    scene.happen(EventType.FAIL, "z" * 300, model="qwen")
    scene.say("qwen", "w" * 300)

    async def scenario(page: Page) -> None:
        await page.look(width=width)
        await show(page, scene, "?log=qwen")
        await page.until("document.querySelectorAll('#log-lines p').length === 4")
        assert await page.ask("document.documentElement.scrollWidth") == width
        # A finger needs room: 44 CSS pixels.
        if width == 360:
            heights = "[...document.querySelectorAll('.actions button, .actions a')].map(b => b.offsetHeight)"
            assert min(await page.ask(heights)) >= 44

    run(scenario)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_told_from_its_ground(run: Run, scene: Scene, scheme: str) -> None:
    async def scenario(page: Page) -> None:
        await page.look(scheme=scheme)
        await show(page, scene, "?log=qwen")
        await page.until("document.querySelectorAll('#log-lines p').length === 3")
        await page.click("#pin-qwen")
        await page.until("document.getElementById('pin-qwen').getAttribute('aria-pressed') === 'true'")
        await page.ask(
            "Promise.all(document.getAnimations().map(each => each.effect.target.matches('button') && each.finished))"
        )
        contrast, text = await page.ask(LEAST_CONTRAST)
        assert contrast >= 4.5, text
        grounds = await page.ask("getComputedStyle(document.body).backgroundColor")
        assert (int(grounds[4:].split(",")[0]) < 64) is (scheme == "dark")

    run(scenario)


def test_a_screen_reader_finds_its_way(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene, "?log=qwen")
        roles = await page.roles()
        for landmark in ("banner", "main", "contentinfo"):
            assert [role for role, _ in roles].count(landmark) == 1
        named = {("region", name) for name in ("GPUs", "Recent events")} | {("heading", "qwen")}
        named |= {("button", "Stop qwen"), ("button", "Pin qwen"), ("button", "Start flux"), ("link", "Log of qwen")}
        assert named <= set(roles)
        assert ("log", "Log of qwen") in roles
        assert all(name for role, name in roles if role in {"button", "link", "region"})

    run(scenario)


def test_nothing_moves_for_those_who_do_not_want_that(run: Run, scene: Scene) -> None:
    async def scenario(page: Page) -> None:
        await show(page, scene)
        assert await page.ask("document.getAnimations().length") > 0
        await page.look(reduced_motion=True)
        await page.until("document.getAnimations().length === 0")

    run(scenario)


def test_the_page_takes_nothing_from_elsewhere_and_runs_nothing_inline(scene: Scene) -> None:
    async def scenario() -> None:
        async with serving(scene), aiohttp.ClientSession() as client:
            for path in ("", "?log=qwen", "gpusvc/page"):
                async with client.get(scene.url + path) as answer:
                    text = await answer.text()
                    policy = answer.headers["Content-Security-Policy"]
                    assert answer.headers["Cache-Control"] == "no-store"
                assert policy.startswith("default-src 'none'; script-src 'self';")
                assert "unsafe" not in policy
                assert "http://" not in text
                assert "https://" not in text
                assert " style=" not in text
            for file in ("page.css", "page.js", "icon.svg"):
                async with client.get(f"{scene.url}gpusvc/static/{file}") as answer:
                    assert answer.status == 200
                    assert answer.headers["X-Content-Type-Options"] == "nosniff"
            for file in ("page.py", "..%2fpage.py", "%2fetc%2fpasswd"):
                async with client.get(f"{scene.url}gpusvc/static/{file}") as answer:
                    assert answer.status == 404

    asyncio.run(scenario())
