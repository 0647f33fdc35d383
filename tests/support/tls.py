"""Certificates for tests, made by openssl in a few milliseconds."""

from __future__ import annotations

import subprocess
from pathlib import Path


def self_signed(folder: Path, name: str = "server", *, passphrase: str = "") -> tuple[Path, Path]:
    """Certificate and key (PEM files) for localhost and 127.0.0.1."""
    certificate, key = folder / f"{name}-cert.pem", folder / f"{name}-key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 1 -subj /CN=localhost"
    secret = ["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command.split(), *secret, *names, "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    return certificate, key
