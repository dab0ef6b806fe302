"""An engine's own pages in a real browser: they work, and have none of the rights of the gateway's own page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gpusvc.config import keys
from gpusvc.config.host import HostGateway
from gpusvc.config.keys import Keys
from tests.component.browser import LAN_HOST, PROGRAM, Browser, Page, opened
from tests.component.rig import QUICK, Rig
from tests.component.upstream import Connection, Request

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(not PROGRAM.exists(), reason="there is no Chromium"),
]

HOSTILE = b"""<!doctype html><title>engine</title><link rel="icon" href="data:,"><body><script>
async function tried(what) { try { return await what() } catch (error) { return "" + error } }
async function attack(base) { return {
  stop: await tried(async () => (await fetch(base + "/gpusvc/models/qwen/stop", {method: "POST"})).status),
  config: await tried(async () => (await fetch(base + "/gpusvc/config")).text()),
  form: await tried(async () => (await fetch(base + "/unload", {method: "POST", mode: "no-cors"})).status),
  worker: await tried(async () => (await navigator.serviceWorker.register("sw.js", {scope: "/"})).scope),
  storage: await tried(async () => { localStorage.x = 1; return "kept" }),
  own: await tried(async () => (await fetch("own.json")).text()),
  cookie: await tried(async () => document.cookie),
} }
</script>"""


PLAIN = b"""<!doctype html><title>engine</title><link rel="icon" href="data:,"><script src="lib.js"></script><body>
<form method="post" action="own.json"><input name="x" value="1"></form><a href="page.html">next</a>"""


def _respond(kind: str, body: bytes, more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _engine(request: Request, connection: Connection) -> None:
    path = request.target.partition("?")[0]
    if path.endswith("lib.js"):
        await connection.say(_respond("text/javascript", b"window.lib = 'ran'"))
    elif path.endswith("plain.html"):
        await connection.say(_respond("text/html", PLAIN))
    elif path.endswith("own.json"):
        await connection.say(_respond("application/json", b'"own"'))
    elif path.endswith("sw.js"):
        await connection.say(_respond("text/javascript", b"", "Service-Worker-Allowed: /\r\n"))
    else:
        more = 'Clear-Site-Data: "*"\r\nSet-Cookie: mine=1\r\nSet-Cookie: wide=1; Domain=localhost\r\n'
        await connection.say(_respond("text/html", HOSTILE, more))


async def _api(request: Request, connection: Connection) -> None:
    await connection.say(_respond("text/html", b'<!doctype html><link rel="icon" href="data:,">status page'))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


def play(browser: Browser, directory: Path, scenario: Any, known: Keys | None = None) -> None:
    rig = Rig(directory, HostGateway().replace(hosts=(LAN_HOST,)), QUICK)

    async def whole() -> None:
        async with rig.running(known or Keys.read([])), opened(browser) as page:
            rig.engine.answer, rig.api.answer = _engine, _api
            await scenario(rig, page)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(whole())


def acted(rig: Rig) -> list[str]:
    """What reached the management API, but for the page."""
    return [request.target for request in rig.api.requests if request.target != "/"]


async def attacked(rig: Rig, page: Page) -> dict[str, Any]:
    found = await page.ask(f'attack("http://127.0.0.1:{rig.port}")')
    assert isinstance(found, dict)
    return found


def test_an_engines_page_works_at_an_origin_of_its_own_and_reaches_nothing_else(
    browser: Browser, tmp_path: Path
) -> None:
    async def scenario(rig: Rig, page: Page) -> None:
        await page.goto(f"http://127.0.0.1:{rig.port}/upstream/qwen/page.html?x=1")
        assert await page.ask("location.href") == f"http://qwen.localhost:{rig.port}/page.html?x=1"
        found = await attacked(rig, page)
        assert (found["own"], found["storage"], found["cookie"]) == ('"own"', "kept", "mine=1")
        assert "TypeError" in str(found["stop"])
        assert "TypeError" in found["config"]
        found = await page.ask('attack("")')  # at its own origin all paths are its own
        assert found["config"].startswith("<!doctype html><title>engine")
        assert acted(rig) == []

    play(browser, tmp_path, scenario)


def test_with_keys_a_browser_comes_by_a_ticket_and_keeps_no_password(browser: Browser, tmp_path: Path) -> None:
    boss, secret = keys.make("boss", rights=(keys.Right.ADMIN,))
    file = tmp_path / "keys.toml"
    file.write_text(keys.text([boss]))

    async def scenario(rig: Rig, page: Page) -> None:
        await page.goto(f"http://me:{secret}@127.0.0.1:{rig.port}/")
        assert "status page" in await page.text()
        await page.goto(f"http://127.0.0.1:{rig.port}/upstream/qwen/page.html")
        assert await page.ask("location.href") == f"http://qwen.localhost:{rig.port}/page.html"
        found = await attacked(rig, page)
        assert (found["own"], found["cookie"]) == ('"own"', "mine=1")  # the session's cookie is not for scripts
        assert acted(rig) == []
        told = [value for request in rig.engine.requests for name, value in request.fields if name == "cookie"]
        assert not any("gpusvc-session" in value for value in told)
        assert not any("gpusvc-ticket" in request.target for request in rig.engine.requests)
        client = await rig.client()
        other = await client.get("/page.html", f"Host: whisper.localhost\r\nX-Api-Key: {secret}x\r\n")
        assert other.status == 400  # two Hosts

    play(browser, tmp_path, scenario, Keys.read([file]))


def test_a_document_that_stays_at_the_gateways_origin_is_sandboxed(browser: Browser, tmp_path: Path) -> None:
    async def scenario(rig: Rig, page: Page) -> None:
        await page.goto(f"http://127.0.0.1:{rig.port}/page.html?model=qwen")  # not below /upstream/
        assert await page.ask("self.origin") == "null"
        found = await attacked(rig, page)
        assert "SecurityError" in found["storage"]
        assert (acted(rig), found["own"] == '"own"') == ([], False)

    play(browser, tmp_path, scenario)


def test_from_another_machine_a_page_shows_itself_and_its_scripts_reach_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    """docs/gateway.md says what works there."""

    async def scenario(rig: Rig, page: Page) -> None:
        base = f"http://{LAN_HOST}:{rig.port}/upstream/qwen"
        await page.goto(f"{base}/plain.html")
        assert await page.ask("location.href") == f"{base}/plain.html"
        assert (await page.ask("self.origin"), await page.ask("window.lib")) == ("null", "ran")
        tried = "fetch('own.json').then(answer => answer.text(), error => '' + error)"
        assert "TypeError" in str(await page.ask(tried))
        await page.goto(f"{base}/page.html")
        found = await page.ask(f'attack("http://{LAN_HOST}:{rig.port}")')
        assert isinstance(found, dict)
        assert "SecurityError" in found["storage"]
        assert acted(rig) == []
        assert [request.target for request in rig.engine.requests if request.method != "GET"] == []

    play(browser, tmp_path, scenario)


def test_from_another_machine_a_page_of_another_site_loads_no_model(browser: Browser, tmp_path: Path) -> None:
    async def scenario(rig: Rig, page: Page) -> None:
        rig.add_model("cold")
        await page.goto("data:text/html,<title>another site</title>")
        image = "(address) => new Promise(done => { const image = new Image(); image.onerror = () => done('no'); "
        image += "image.onload = () => done('yes'); image.src = address })"
        for address in (f"http://{LAN_HOST}:{rig.port}", f"http://127.0.0.1:{rig.port}"):
            assert await page.ask(f"({image})('{address}/upstream/cold/picture.png')") == "no"
        assert rig.api.requests == []

    play(browser, tmp_path, scenario)
