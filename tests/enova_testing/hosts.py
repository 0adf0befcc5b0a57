"""Hosts made of namespaces: processes, mounts and network of their own, on one machine; needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from enova_testing.waiting import until

PROGRAMS = Path(__file__).parents[2] / ".venv" / "bin"
_UNSHARE = ("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--mount-proc", "--kill-child")


def namespaces_work() -> bool:
    """Whether this user may make namespaces with a network in them."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    trial = subprocess.run([*_UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True, check=False, timeout=30)
    return trial.returncode == 0


class Host:
    """A host with /etc, /var/lib and /run of its own; its processes end with it. A context manager."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.pid = 0

    def __enter__(self) -> Host:
        for path in ("var/lib", "run", "tmp"):
            (self.folder / path).mkdir(parents=True)
        big = shutil.ignore_patterns("ssl", "alternatives")
        shutil.copytree("/etc", self.folder / "etc", symlinks=True, ignore=big)
        mounts = [f"mount --bind {self.folder}/{path} /{path}" for path in ("etc", "var/lib", "run")]
        script = " && ".join([f"hostname {self.name}", *mounts, "ip link set lo up", "exec sleep infinity"])
        self._holder = subprocess.Popen([*_UNSHARE, "sh", "-c", script])
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        until(lambda: "sleep" in self._comm(children), what=f"host {self.name} to be up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._holder.kill()
        self._holder.wait()

    def _comm(self, children: Path) -> str:
        pids = children.read_text().split()
        if not pids:
            return ""
        self.pid = int(pids[0])
        return Path(f"/proc/{self.pid}/comm").read_text()

    def inside(self, *words: str) -> list[str]:
        """The words that run `words` on this host."""
        return ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-i", "-u", *words]

    def run(self, *words: str, timeout_s: float = 60.0) -> str:
        """The output of a command that must succeed."""
        done = subprocess.run(self.inside(*words), capture_output=True, text=True, check=False, timeout=timeout_s)
        assert done.returncode == 0, f"{words} on {self.name}: {done.stdout}{done.stderr}"
        return done.stdout


class Shell:
    """A shell on a host that keeps its directory and variables from one block of commands to the next."""

    def __init__(self, host: Host, env: dict[str, str]) -> None:
        self._host = host
        self._out = host.folder / "shell.out"
        self._blocks = 0
        with self._out.open("wb") as out:
            self._bash = subprocess.Popen(
                host.inside("bash", "-e"), stdin=subprocess.PIPE, stdout=out, stderr=out, env=env, cwd="/"
            )

    def type(self, block: str, *, timeout_s: float) -> str:
        """Types a block; all the shell has said by its end. Fails if a command of it fails."""
        self._blocks += 1
        end = f"end of block {self._blocks}"
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{block}\necho {end}\n".encode())
        self._bash.stdin.flush()
        until(lambda: end in self.said() or self._bash.poll() is not None, timeout_s=timeout_s, what=self.said())
        assert end in self.said(), f"on {self._host.name}:\n{block}\nended with {self._bash.poll()}:\n{self.said()}"
        return self.said()

    def said(self) -> str:
        """All output so far, of background programs too."""
        return self._out.read_text(errors="replace")

    def close(self) -> None:
        """Ends the shell, not what it started."""
        assert self._bash.stdin is not None
        self._bash.stdin.close()
        self._bash.kill()
        self._bash.wait()


def cable(one: Host, other: Host, prefix: str = "10.77.0") -> None:
    """Connects two hosts; they know each other by name, as PREFIX.1 and PREFIX.2."""
    ends = ["eth0", "netns", str(one.pid), "type", "veth", "peer", "eth0", "netns", str(other.pid)]
    subprocess.run(["ip", "link", "add", *ends], check=True, timeout=10)
    names = "127.0.0.1 localhost\n::1 localhost\n" + "".join(
        f"{prefix}.{number} {host.name}\n" for number, host in enumerate((one, other), 1)
    )
    for number, host in enumerate((one, other), 1):
        host.run("ip", "addr", "add", f"{prefix}.{number}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        (host.folder / "etc" / "hosts").write_text(names)
        (host.folder / "etc" / "resolv.conf").unlink(missing_ok=True)
        (host.folder / "etc" / "resolv.conf").write_text("")
