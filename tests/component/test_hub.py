"""Downloads from a hub on loopback that breaks off, lies, redirects and refuses."""

from __future__ import annotations

import fcntl
import hashlib
import io
import stat
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpusvc.cli.commands import add
from gpusvc.errors import GpusvcError, PermissionDeniedError, UnknownModelError, UsageError
from gpusvc.hub import store
from gpusvc.hub.client import Client, _Redirects, endpoint_in, token_in
from gpusvc.hub.download import Item, download
from gpusvc.hub.reference import HubReference
from gpusvc.hub.selection import RemoteFile, select
from gpusvc.paths import Paths
from tests.component import hub as loopback
from tests.component.conftest import Machine
from tests.component.hub import Hub
from tests.component.test_cli import Host
from tests.engines import tinygguf

CONTENT = bytes(range(256)) * 12_000  # 3 MiB
WANTED = HubReference("owner", "model")


class Log:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.bytes = 0
        self.said: list[str] = []

    def received(self, count: int) -> None:
        self.bytes += count

    def waits(self, sentence: str) -> None:
        self.said.append(sentence)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback.running() as running:
        yield running


class Downloader:
    """Downloads the repository's model into a directory."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub = hub
        self.root = root
        self.folder = root / "owner/model"
        self.log = Log()
        self.pauses: list[float] = []

    def run(self, token: str | None = None) -> None:
        client = Client(self.hub.address, token)
        listing = client.listing(WANTED)
        chosen = select(listing.files)
        items = [Item(client.address(WANTED, listing.commit, file.path), file) for file in chosen.files]
        download(client, items, self.root, ("owner", "model"), self.log, pause=self.pauses.append)

    def names(self) -> list[str]:
        return sorted(file.name for file in self.folder.iterdir() if not file.name.endswith(".digest"))


@pytest.fixture
def downloader(hub: Hub, tmp_path: Path) -> Downloader:
    hub.put("m.gguf", CONTENT)
    return Downloader(hub, tmp_path / "models")


def test_a_file_arrives_whole_and_readable(downloader: Downloader) -> None:
    downloader.run()
    file = downloader.folder / "m.gguf"
    assert file.read_bytes() == CONTENT
    assert file.stat().st_mode & 0o777 == 0o644
    assert downloader.names() == ["m.gguf"]
    assert downloader.log.bytes == len(CONTENT)


@pytest.mark.parametrize(("above", "below"), [(0o2775, 0o2775), (0o1777, 0o775), (0o755, 0o755)])
def test_the_group_that_may_write_above_may_write_into_new_folders(
    hub: Hub, downloader: Downloader, above: int, below: int
) -> None:
    hub.put("m.gguf", CONTENT)
    downloader.root.mkdir()
    downloader.root.chmod(above)
    downloader.run()
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (downloader.folder.parent, downloader.folder)] == [
        below
    ] * 2


def test_a_broken_connection_goes_on_where_it_stopped(hub: Hub, downloader: Downloader) -> None:
    hub.break_at = [1_000_000, 500_000]
    downloader.run()
    assert (downloader.folder / "m.gguf").read_bytes() == CONTENT
    assert hub.ranges("m.gguf") == ["", "bytes=1000000-", "bytes=1500000-"]
    assert len(downloader.pauses) == 2


def test_a_killed_download_goes_on_where_it_stopped(hub: Hub, downloader: Downloader) -> None:
    part = downloader.folder / ".m.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[:2_000_000])
    downloader.run()
    assert (downloader.folder / "m.gguf").read_bytes() == CONTENT
    assert hub.ranges("m.gguf") == ["bytes=2000000-"]
    assert downloader.log.bytes == len(CONTENT)


def test_a_damaged_part_is_downloaded_again(hub: Hub, downloader: Downloader) -> None:
    part = downloader.folder / ".m.gguf.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2_000_000)
    downloader.run()
    assert (downloader.folder / "m.gguf").read_bytes() == CONTENT
    assert hub.ranges("m.gguf") == ["bytes=2000000-", ""]
    assert downloader.log.bytes == len(CONTENT)


def test_a_server_without_ranges_begins_again(hub: Hub, downloader: Downloader) -> None:
    hub.break_at = [1_000_000]
    hub.ignores_ranges = True
    downloader.run()
    assert (downloader.folder / "m.gguf").read_bytes() == CONTENT
    assert downloader.log.bytes == len(CONTENT)


def test_another_content_than_announced_is_deleted(hub: Hub, downloader: Downloader) -> None:
    hub.delivered["m.gguf"] = b"y" * len(CONTENT)
    with pytest.raises(GpusvcError, match="another content than the hub announced"):
        downloader.run()
    assert downloader.names() == [".m.gguf.part"]
    assert (downloader.folder / ".m.gguf.part").stat().st_size == 0


@pytest.mark.parametrize("delivered", [CONTENT[:-1], CONTENT + b"more"])
def test_a_server_that_lies_about_the_size_is_refused(hub: Hub, downloader: Downloader, delivered: bytes) -> None:
    hub.delivered["m.gguf"] = delivered
    with pytest.raises(GpusvcError, match=f"should have {len(CONTENT)} bytes"):
        downloader.run()
    assert "m.gguf" not in downloader.names()


def test_a_busy_hub_is_asked_again_when_it_says(hub: Hub, downloader: Downloader) -> None:
    hub.statuses = [429, 503]
    hub.headers = {"Retry-After": "7"}
    downloader.run()
    assert downloader.pauses == [7.0, 7.0]
    assert downloader.log.said[0] == "127.0.0.1 is busy (HTTP 429); tries again in 7 s"


def test_a_hub_that_stays_busy_is_given_up_and_the_part_stays(hub: Hub, downloader: Downloader) -> None:
    hub.break_at = [1_000_000]
    hub.statuses = [200, *[503] * 9]
    with pytest.raises(GpusvcError, match="HTTP 503") as refusal:
        downloader.run()
    assert refusal.value.hint is not None
    assert len(downloader.pauses) < 9
    assert (downloader.folder / ".m.gguf.part").stat().st_size == 1_000_000


def test_what_does_not_exist_is_said_at_once(hub: Hub) -> None:
    with pytest.raises(UnknownModelError, match=r"o/nothing does not exist \(HTTP 404\)"):
        Client(hub.address).listing(HubReference("o", "nothing"))


def test_a_private_repository_needs_the_token(hub: Hub, downloader: Downloader) -> None:
    hub.token = "hf_secret"
    with pytest.raises(PermissionDeniedError, match="HTTP 401") as refusal:
        downloader.run()
    assert "HF_TOKEN" in str(refusal.value.hint)
    downloader.run("hf_secret")
    assert downloader.names() == ["m.gguf"]


def test_a_gated_repository_tells_where_its_terms_are(hub: Hub, downloader: Downloader) -> None:
    hub.token, hub.gated = "hf_secret", True
    with pytest.raises(PermissionDeniedError, match="gated") as refusal:
        downloader.run("hf_other")
    assert "Accept the terms" in str(refusal.value.hint)


def test_a_token_never_goes_to_another_host(hub: Hub, downloader: Downloader) -> None:
    hub.token = "hf_secret"
    with loopback.running() as storage:
        storage.files = hub.files
        hub.storage = storage.address
        downloader.run("hf_secret")
        assert [path for path, _ in storage.requests] == ["/stored/m.gguf"]
        assert "authorization" not in storage.requests[0][1]
    assert downloader.names() == ["m.gguf"]


def test_a_hub_that_is_no_hub_is_named(hub: Hub) -> None:
    class Odd(Hub):
        def listing(self) -> bytes:
            return b"<html>login</html>"

    hub.listing = Odd().listing  # type: ignore[method-assign]
    with pytest.raises(GpusvcError, match="not a list of files"):
        Client(hub.address).listing(WANTED)


def test_a_commit_that_is_no_name_and_a_size_that_is_no_size_are_not_used(hub: Hub) -> None:
    hub.put("m.gguf", CONTENT)
    hub.sizes["m.gguf"] = 10**400
    (file,) = Client(hub.address).listing(WANTED).files
    assert file.size_bytes is None
    hub.COMMIT = "\ud800/../.."
    with pytest.raises(GpusvcError, match="not a list of files"):
        Client(hub.address).listing(WANTED)


@pytest.mark.parametrize("storage", ["http://[nowhere", "http://127.0.0.1:99999", "http://a..b"])
def test_a_redirect_to_an_address_that_cannot_exist_is_an_error_in_words(
    hub: Hub, downloader: Downloader, storage: str
) -> None:
    hub.storage = storage
    with pytest.raises(GpusvcError, match=r"cannot be asked|does not deliver"):
        downloader.run()


def test_no_redirect_leads_to_an_unencrypted_address() -> None:
    asked = urllib.request.Request("https://hub.example/m.gguf")
    follow = _Redirects().redirect_request
    with pytest.raises(GpusvcError, match="unencrypted address"):
        follow(asked, io.BytesIO(), 302, "Found", {}, "http://hub.example/m.gguf")
    assert follow(asked, io.BytesIO(), 302, "Found", {}, "https://cdn.example/m.gguf") is not None


def test_the_body_of_a_redirect_is_not_read(hub: Hub, downloader: Downloader) -> None:
    hub.statuses = [302]
    hub.headers = {"Location": f"{hub.address}/stored/m.gguf", "Content-Length": str(1 << 40)}
    downloader.run()
    assert (downloader.names(), downloader.pauses) == (["m.gguf"], [])


def test_a_redirect_in_a_circle_ends(hub: Hub, downloader: Downloader) -> None:
    hub.statuses = [302] * 20
    hub.headers = {"Location": f"{hub.address}/stored/m.gguf"}
    with pytest.raises(GpusvcError, match=r"cannot be downloaded \(HTTP 302\)"):
        downloader.run()


@pytest.mark.parametrize("endpoint", ["hub.example", "file:///etc", "http://[x", "https://"])
def test_an_endpoint_that_is_no_address_is_a_wrong_usage(endpoint: str) -> None:
    with pytest.raises(UsageError, match="HF_ENDPOINT is not the address of a hub"):
        endpoint_in({"HF_ENDPOINT": endpoint})


def test_nobody_at_the_other_end_is_an_error_in_words() -> None:
    with pytest.raises(GpusvcError, match=r"127\.0\.0\.1 does not deliver: Connection refused"):
        Client("http://127.0.0.1:9").listing(WANTED)


def test_several_parts_appear_together(hub: Hub, tmp_path: Path) -> None:
    hub.put("m-00001-of-00002.gguf", CONTENT)
    hub.put("m-00002-of-00002.gguf", CONTENT[:1000])
    downloader = Downloader(hub, tmp_path)
    hub.statuses = [200, 404]
    with pytest.raises(UnknownModelError):
        downloader.run()
    assert all(name.startswith(".") for name in downloader.names())
    downloader.run()
    assert downloader.names() == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert len(hub.ranges("m-00001-of-00002.gguf")) == 1


def test_a_directory_of_safetensors_is_verified_by_gits_hashes_too(hub: Hub, tmp_path: Path) -> None:
    hub.put("config.json", b"{}\n", small=True)
    hub.put("model.safetensors", CONTENT)
    downloader = Downloader(hub, tmp_path)
    downloader.run()
    assert downloader.names() == ["config.json", "model.safetensors"]
    hub.files["config.json"] = b"[]\n"
    downloader.run()
    assert (downloader.folder / "config.json").read_bytes() == b"[]\n"
    hub.delivered["config.json"] = b"oh\n"
    hub.files["config.json"] = b"no\n"
    with pytest.raises(GpusvcError, match="another content"):
        downloader.run()


def test_what_is_there_is_not_downloaded_again(hub: Hub, downloader: Downloader) -> None:
    downloader.run()
    downloader.run()
    assert len(hub.ranges("m.gguf")) == 1
    assert downloader.log.bytes == 2 * len(CONTENT)


def test_another_revision_of_the_same_size_is_downloaded(hub: Hub, downloader: Downloader) -> None:
    downloader.run()
    hub.files["m.gguf"] = CONTENT[::-1]
    downloader.run()
    assert (downloader.folder / "m.gguf").read_bytes() == CONTENT[::-1]


def test_two_downloads_of_one_file_do_not_mix(downloader: Downloader) -> None:
    part = downloader.folder / ".m.gguf.part"
    part.parent.mkdir(parents=True)
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GpusvcError, match="Another download of m"):
            downloader.run()


def test_too_small_a_disk_is_said_before_anything_is_downloaded(hub: Hub, downloader: Downloader) -> None:
    hub.sizes["m.gguf"] = 1 << 60
    with pytest.raises(GpusvcError, match=r"free, and the download needs 1024\.0 PiB|more\.") as refusal:
        downloader.run()
    assert "--to" in str(refusal.value.hint)
    assert hub.ranges("m.gguf") == []


@pytest.mark.parametrize("name", ["owner", "owner/model", "owner/model/.m.gguf.part", "owner/model/m.gguf"])
def test_no_link_is_followed_out_of_the_directory(downloader: Downloader, tmp_path: Path, name: str) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    victim = target / "victim"
    victim.write_text("precious")
    link = downloader.root / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if name.endswith(("part", "gguf")) else target)
    with pytest.raises(GpusvcError):
        downloader.run()
    assert victim.read_text() == "precious"
    assert list(target.iterdir()) == [victim]


def test_an_address_is_resumed_by_its_etag_only(hub: Hub, tmp_path: Path) -> None:
    hub.put("m.gguf", CONTENT)
    hub.etags["m.gguf"] = '"v1"'
    client = Client(hub.address)
    item = Item(f"{hub.address}/stored/m.gguf", RemoteFile("m.gguf", len(CONTENT)))

    def run() -> None:
        download(client, [item], tmp_path, ["host"], Log(), pause=lambda _: None)

    hub.break_at = [1_000_000]
    hub.statuses = [200, *[503] * 9]
    with pytest.raises(GpusvcError, match="503"):
        run()
    hub.statuses.clear()
    hub.requests.clear()
    hub.files["m.gguf"] = CONTENT[::-1]
    hub.etags["m.gguf"] = '"v2"'
    run()
    assert (tmp_path / "host/m.gguf").read_bytes() == CONTENT[::-1]
    assert [headers.get("if-range") for _, headers in hub.requests] == ['"v1"']


def test_the_token_comes_from_the_environment_a_credential_or_a_file(tmp_path: Path) -> None:
    paths = Paths(config=tmp_path / "etc", runtime=tmp_path / "run", state=tmp_path / "var")
    home = {"HOME": str(tmp_path)}
    assert token_in(home, paths) is None
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/token").write_text("hf_cache\n")
    assert token_in(home, paths) == "hf_cache"
    paths.config.mkdir()
    (paths.config / "hub-token").write_text("hf_config\n")
    assert token_in(home, paths) == "hf_config"
    (tmp_path / "gpusvc-hub-token").write_text("hf_credential")
    credential = {**home, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert token_in(credential, paths) == "hf_credential"
    assert token_in({**credential, "HF_TOKEN": "hf_own"}, paths) == "hf_own"
    with pytest.raises(GpusvcError, match="one line"):
        token_in({"HF_TOKEN": "two\nlines"}, paths)


# ---- the commands ----


@pytest.fixture
def host(machine: Machine, tmp_path: Path) -> Host:
    return Host(tmp_path / "host", machine)


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> bytes:
    file = tmp_path / "tiny.gguf"
    tinygguf.write(file)
    hub.put("tiny-Q4_0.gguf", file.read_bytes())
    return file.read_bytes()


def test_pull_says_what_it_is_before_and_where_it_is_after(host: Host, hub: Hub, model: bytes) -> None:
    done = host.gpusvc("pull", "hf:owner/model", HF_ENDPOINT=hub.address)
    file = host.paths.downloads_directory / "owner/model/tiny-Q4_0.gguf"
    assert (done.returncode, done.stdout) == (0, f"{file}\n")
    assert file.read_bytes() == model
    assert done.stderr.startswith("tiny random llama, Q4_0, 526.3 KiB, made for a context of 4096 tokens. 1 file")
    assert "It needs about" in done.stderr
    assert "It fits on GPU" in done.stderr
    assert "100%" in done.stderr
    assert f"`gpusvc add NAME {file}`" in done.stderr


def test_a_dry_run_downloads_nothing(host: Host, hub: Hub, model: bytes) -> None:
    done = host.gpusvc("pull", "hf:owner/model", "--dry-run", HF_ENDPOINT=hub.address)
    assert (done.returncode, done.stdout) == (0, "")
    assert "tiny random llama" in done.stderr
    assert not host.paths.downloads_directory.exists()


def test_a_name_that_is_too_long_for_a_file_is_an_error_in_words(host: Host, hub: Hub, model: bytes) -> None:
    hub.files.clear()
    hub.put("q" * 300 + ".gguf", model)
    done = host.gpusvc("pull", "hf:owner/model", HF_ENDPOINT=hub.address)
    assert done.returncode == 1
    assert "File name too long" in done.stderr
    assert "bug" not in done.stderr


def test_an_address_can_be_pulled_to_a_directory_and_verified(
    host: Host, hub: Hub, model: bytes, tmp_path: Path
) -> None:
    address = f"{hub.address}/stored/tiny-Q4_0.gguf"
    wrong = host.gpusvc("pull", address, "--to", str(tmp_path / "to"), "--sha256", "0" * 64)
    assert wrong.returncode == 1
    assert "another content" in wrong.stderr
    right = hashlib.sha256(model).hexdigest()
    done = host.gpusvc("pull", address, "--to", str(tmp_path / "to"), "--sha256", right)
    assert done.stdout == f"{tmp_path}/to/127.0.0.1/tiny-Q4_0.gguf\n"


def test_add_takes_the_download_with_its_projector(
    host: Host, hub: Hub, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("mmproj-F16.gguf", model)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setattr("gpusvc.config.presets.ENGINE_PATH", str(host.root))
    (host.root / "llama-server").write_text("#!/bin/sh\n")
    (host.root / "llama-server").chmod(0o755)
    found = add.here(host.paths, ["hf:owner/model", "-ngl", "9"], "", dry_run=False)
    folder = host.paths.downloads_directory / "owner/model"
    assert found == [f"{folder}/tiny-Q4_0.gguf", "--mmproj", f"{folder}/mmproj-F16.gguf", "-ngl", "9"]
    assert all(Path(path).read_bytes() == model for path in (found[0], found[2]))


def test_add_downloads_nothing_without_an_engine(host: Host, hub: Hub, model: bytes) -> None:
    done = host.gpusvc("add", "tiny", "hf:owner/model", "--user", "root", HF_ENDPOINT=hub.address)
    assert done.returncode == 2
    assert "Nothing is downloaded: There is no program 'llama-server'" in done.stderr
    assert hub.ranges("tiny-Q4_0.gguf") == []


def test_a_removal_takes_the_file_with_its_notes_and_its_empty_folders(downloader: Downloader) -> None:
    downloader.run()
    assert store.remove(downloader.root, "owner/model/m.gguf")
    assert list(downloader.root.iterdir()) == []
    assert not store.remove(downloader.root, "owner/model/m.gguf")


def test_a_removal_follows_no_link(downloader: Downloader, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "m.gguf").write_text("x")
    downloader.root.mkdir()
    (downloader.root / "owner").symlink_to(precious)
    assert not store.remove(downloader.root, "owner/m.gguf")
    assert (precious / "m.gguf").exists()


def test_a_wrong_reference_is_a_wrong_usage(host: Host) -> None:
    done = host.gpusvc("pull", "qwen3")
    assert done.returncode == 2
    assert "hf:owner/repository" in done.stderr
