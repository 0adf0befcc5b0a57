"""A host whose PID 1 is the real systemd, made of namespaces; needs root and systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from enova_testing.hosts import PROGRAMS, namespaces_work
from enova_testing.waiting import until

ROOT = Path(__file__).parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
# Of the host's own units only what enova's need; these would reach for the machine below.
_MASKED = (
    *(f"systemd-{name}.service" for name in (
        "sysctl", "tmpfiles-setup", "tmpfiles-setup-dev", "udevd", "udev-trigger", "modules-load", "hwdb-update",
        "random-seed", "update-utmp", "binfmt", "remount-fs",
    )),
    "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "dev-hugepages.mount", "dev-mqueue.mount",
    "networking.service",
)
_BOOT = """
mount --make-rprivate /
mount -t proc proc /proc
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mount --bind {folder}/etc /etc
mount --bind {folder}/lib /var/lib
mount -t tmpfs tmpfs /run
export container=docker
exec {systemd} --system --unit=enova-test.target --log-target=console --log-level=warning --show-status=false
"""
_TARGET = "[Unit]\nDescription=test\nRequires=basic.target\nAfter=basic.target\n"


def systemd_works() -> bool:
    """Whether a systemd can be started here as the first process of namespaces."""
    return SYSTEMD.exists() and namespaces_work()


class SystemdHost:
    """Boots on entry; everything on it ends on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.units = folder / "etc" / "systemd" / "system"
        self._pid = 0

    def __enter__(self) -> SystemdHost:
        big = shutil.ignore_patterns("ssl", "alternatives")
        shutil.copytree("/etc", self.folder / "etc", symlinks=True, ignore=big)
        shutil.rmtree(self.folder / "etc" / "systemd" / "system", ignore_errors=True)
        self.units.mkdir(parents=True)
        (self.folder / "lib").mkdir()
        (self.units / "enova-test.target").write_text(_TARGET)
        for unit in _MASKED:
            (self.units / unit).symlink_to("/dev/null")
        script = _BOOT.format(folder=self.folder, systemd=SYSTEMD)
        words = ["unshare", "-m", "-p", "-f", "-u", "-i", "-n", "-C", "--kill-child=KILL", "bash", "-ec", script]
        self._console = (self.folder / "console").open("wb")
        self._holder = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=self._console, stderr=self._console)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self._pid = int(str(until(lambda: children.read_text().strip(), what="namespaces")))
        running = lambda: self.call("systemctl", "is-system-running").stdout.strip() in {"running", "degraded"}  # noqa: E731
        until(running, timeout_s=30, what="systemd to be up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._holder.kill()  # takes PID 1 of the namespaces along, and that everything else
        self._holder.wait()
        self._console.close()

    def call(self, *words: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Runs a command on the host."""
        inside = ["nsenter", "-t", str(self._pid), "-m", "-p", "-u", "-i", "-n", "-C", *words]
        env = {**os.environ, "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
        return subprocess.run(inside, capture_output=True, text=True, check=False, timeout=timeout_s, env=env)

    def run(self, *words: str, timeout_s: float = 120.0) -> str:
        """The output of a command that must succeed."""
        done = self.call(*words, timeout_s=timeout_s)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}\n{self.story()}"
        return done.stdout

    def install(self, unit: Path) -> None:
        """Copies one of our units, which then starts the programs of this environment."""
        text = unit.read_text().replace("/opt/enova/bin", str(PROGRAMS))
        (self.units / unit.name).write_text(text)
        closed = {"root", "home", "tmp"}
        hidden = [str(path) for path in (ROOT, Path(sys.base_prefix)) if path.parts[1] in closed]
        if unit.suffix == ".service" and hidden:
            # The interpreter of this environment lies where the unit may not look: only that is let in.
            (self.units / f"{unit.name}.d").mkdir(exist_ok=True)
            lines = ["[Service]", "ProtectHome=tmpfs", *(f"BindReadOnlyPaths={path}" for path in hidden)]
            (self.units / f"{unit.name}.d" / "interpreter.conf").write_text("\n".join(lines) + "\n")

    def state(self, unit: str) -> str:
        """active, inactive, failed, ..."""
        return self.call("systemctl", "is-active", unit).stdout.strip()

    def main_pid(self, unit: str) -> int:
        """The pid of the unit's main process, on the host; 0 if none runs."""
        return int(self.run("systemctl", "show", "-p", "MainPID", "--value", unit))

    def story(self) -> str:
        """What the units said, for failures."""
        return self.call("journalctl", "--no-pager", "-n", "80", "-o", "cat").stdout
