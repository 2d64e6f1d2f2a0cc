"""Downloads: resumed, checked, whole or not there; only when asked for; what an earlier one left is used."""

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from genpipe.errors import InputError
from genpipe.published import download, mindalle
from genpipe.published.download import Download, File, fetch, fetch_file, on_this_disk
from pipelines.family import describe_family, load_family
from pipelines.importing import located

CONTENT = bytes(range(256)) * 8000  # two megabytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves files from memory; may forget about ranges, or break off after so many bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.ranges, self.breaks_after = True, 1 << 60
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.server.ranges else None
        self.server.asked.append(f"{self.path} {wanted}")
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + self.server.breaks_after])

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    serving = Server()
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where downloads are kept, and a Hub that nobody answers for."""
    monkeypatch.setenv("GENPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def test_a_file_comes_whole_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    file = File(f"{server.url}/file", "file", "sha256", SHA256)
    fetch_file(file, tmp_path / "deep" / "file", lambda there, total: seen.append((there, total)))
    assert (tmp_path / "deep" / "file").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and [there for there, _ in seen] == sorted(
        there for there, _ in seen
    )
    fetch_file(file, tmp_path / "deep" / "file")
    assert len(server.asked) == 1  # what is there is not asked for again


@pytest.mark.parametrize("ranges", [True, False])
def test_what_broke_off_is_gone_on_with(server: Server, tmp_path: Path, ranges: bool) -> None:
    file, target = File(f"{server.url}/file", "file", "sha256", SHA256), tmp_path / "file"
    server.breaks_after, server.ranges = 700_000, ranges
    with pytest.raises(InputError, match="could not be fetched .*broke off after 700,000 of 2,048,000 bytes"):
        fetch_file(file, target)
    assert not target.exists() and (tmp_path / "file.part").stat().st_size == 700_000
    server.breaks_after = 1 << 60
    fetch_file(file, target)
    assert target.read_bytes() == CONTENT and sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert server.asked[1] == f"/file {'bytes=700000-' if ranges else None}"


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"of another file")
    fetch_file(File(f"{server.url}/file", "file", "sha256", SHA256), tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another file than the published one .*sha256.* thrown away"):
        fetch_file(File(f"{server.url}/file", "file", "sha256", "0" * 64), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_or_has_it_not(server: Server, tmp_path: Path) -> None:
    for url in (f"{server.url}/nothing", "http://127.0.0.1:9/file"):
        with pytest.raises(InputError, match="could not be fetched") as caught:
            fetch_file(File(url, "file"), tmp_path / "file")
        assert str(caught.value).count("\n") == 0 and url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_said_before_anything_is_written(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="has no room for the 0.0 GB"):
        fetch_file(File(f"{server.url}/file", "file"), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def archive_of(members: tuple[str, ...]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in members:
            entry = tarfile.TarInfo(f"1.3B/{name}")
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"data"))
    return stream.getvalue()


def test_an_archive_is_unpacked_once(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive_of(mindalle.FILES)
    server.files["/archive"] = content
    file = File(f"{server.url}/archive", "1.3B.tar.gz", "md5", hashlib.md5(content).hexdigest())
    known = Download(4.9, files=[file], members=mindalle.FILES, opened="1.3B")
    monkeypatch.setattr(download, "KNOWN", {"minDALL-E": known})
    assert on_this_disk("mindall-e") is None
    folder = fetch("minDALL-E")
    assert (folder / mindalle.VOCABULARY).read_bytes() == b"data" and mindalle.recognises(folder)
    assert not list(cache.rglob("*.gz")) and on_this_disk("MINDALL-E") == folder == fetch("minDALL-E")
    assert located("minDALL-E", print) == str(folder) and len(server.asked) == 1
    server.files["/archive"] = archive_of((*mindalle.FILES, "../outside"))
    evil = File(f"{server.url}/archive", "1.3B.tar.gz")
    monkeypatch.setattr(download, "KNOWN", {"other": Download(1, files=[evil], members=mindalle.FILES, opened="1.3B")})
    with pytest.raises(InputError, match="outside"):
        fetch("other")
    assert not (cache / "other" / "1.3B").exists() and not list(cache.parent.glob("outside"))


def test_nothing_is_downloaded_unless_asked_for(cache: Path) -> None:
    for name, size in [("kakaobrain/karlo-v1-alpha", "about 13.7 GB"), ("minDALL-E", "about 4.9 GB"), ("GLIDE", "3.8")]:
        with pytest.raises(InputError, match=rf"not on this disk; fetch it \(.*{size}.*genpipe import {name} FOLDER"):
            load_family(name)
    for name in ("kakaobrain/karlo-v1-alpha", "somebody/something"):
        with pytest.raises(InputError, match="could not be fetched from the Hub .* connect to the network") as caught:
            load_family(name, download=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no folder, no Hub id .*minDALL-E, GLIDE"):
        fetch("nope")
    assert not cache.exists()


def test_what_the_hub_gave_before_is_used_without_a_network(cache: Path, tiny_folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(tiny_folder)
    assert on_this_disk("somebody/tiny") == repository / "snapshots" / ("0" * 40)
    assert describe_family("somebody/tiny").name == "tiny"
    assert load_family("somebody/tiny", pipelines=["dalle2"]).dalle2 is not None


def test_known_sources_are_complete() -> None:
    for name, known in download.KNOWN.items():
        assert bool(known.hub) != bool(known.files) and known.gigabytes > 0, name
        for file in known.files:
            assert file.url.startswith("https://") and "/" not in file.name
            assert (len(file.checksum), file.algorithm) in {(64, "sha256"), (32, "md5"), (0, "")}
