"""`server.tls_cert` and `server.tls_key`: files that no TLS server could be started with stop the start."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_router.config import load
from llm_router.config.settings import ServerSettings
from llm_router.errors import ConfigError
from support.tls import self_signed


def server(folder: Path, **files: str | Path) -> ServerSettings:
    keys = "".join(f"  {name}: {path}\n" for name, path in files.items())
    path = folder / "r.yaml"
    path.write_text(f"server:\n  data_dir: {folder}/data\n{keys}")
    return load(str(path), {}, {}).server


def problem(folder: Path, **files: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        server(folder, **files)
    return str(caught.value)


def test_a_certificate_with_its_key_makes_the_api_https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths become absolute: control and workers may have another folder."""
    assert server(tmp_path).scheme == "http"
    certificate, key = self_signed(tmp_path)
    monkeypatch.chdir(tmp_path)
    settings = server(tmp_path, tls_cert=certificate.name, tls_key=key.name)
    assert (settings.scheme, settings.tls_cert, settings.tls_key) == ("https", str(certificate), str(key))


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_one_without_the_other_is_refused(tmp_path: Path, given: str, missing: str) -> None:
    certificate, key = self_signed(tmp_path)
    message = problem(tmp_path, **{given: certificate if given == "tls_cert" else key})
    assert f"server.{missing}: is missing" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    absent = tmp_path / "absent.pem"
    assert f"server.tls_cert: '{absent}' cannot be read" in problem(tmp_path, tls_cert=absent, tls_key=key)
    assert f"server.tls_key: '{absent}' cannot be read" in problem(tmp_path, tls_cert=certificate, tls_key=absent)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    certificate, _ = self_signed(tmp_path)
    _, other = self_signed(tmp_path, "other")
    message = problem(tmp_path, tls_cert=certificate, tls_key=other)
    assert "server.tls_cert" in message
    assert "MISMATCH" in message


def test_files_that_are_no_pem_are_refused(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for files in ({"tls_cert": empty, "tls_key": key}, {"tls_cert": certificate, "tls_key": empty}):
        assert "do not make a TLS server" in problem(tmp_path, **files)


def test_a_key_with_a_passphrase_is_refused_instead_of_asked_for(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, passphrase="secret")
    assert "passphrase" in problem(tmp_path, tls_cert=certificate, tls_key=key)
