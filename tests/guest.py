"""A real Linux guest under software emulation: Debian's kernel, an initramfs made here, a shell on a serial line.

`deploy/setup --test` puts the kernel into .cache/kernel; the programs are this machine's. The kernel's messages go
to one serial port, whose output is kept in a file, the shell's to another, so that neither breaks into the other.

A script goes to the guest in base64 on one line. What it prints comes back line by line, the last one is `@@ CODE`.
What runs in the background may print at any time: lines that begin with `! ` are its reports, kept apart.

In the guest 10.0.2.2 is this machine's loopback, and it has no route to anything else. A Unix socket is reached over
a TCP port there, by socat: every connection to the port is a new connection to the socket, so that a server that was
started again is found. (qemu's own `guestfwd=…-cmd:` does the same and costs 40 ms a request.)
"""

from __future__ import annotations

import base64
import lzma
import os
import queue
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import TOP, free_port, run

KERNEL = TOP / ".cache" / "kernel"
# A guest that says nothing for so long has hung; no test waits for it to pass.
SILENCE_SECONDS = 240.0
SEARCH = "/sbin:/usr/sbin:/bin:/usr/bin"
PROGRAMS = ("nbd-client", "mkfs.ext4", "e2fsck", "socat")
# Those that are built into a kernel are left out.
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "nbd", "ext4")

INIT = """\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /run /mnt /root /tmp
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs run /run
/bin/busybox --install -s /bin
if [ -e /modules ]; then
    for module in /modules/*.ko; do insmod "$module" || echo "$module: not loaded"; done
fi
# The same script is run once more, from the root file system, which has no /modules.
if [ -e /modules ] && grep -q root_on_vda1 /proc/cmdline; then
    mount -t ext4 /dev/vda1 /root || echo "no root file system on /dev/vda1"
    umount /proc /sys /dev /run
    exec switch_root /root /init
fi
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up; fi
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo "@@ ready" >&3
# Not the shell's own `read`: when something in the background ends while it reads, it begins anew, and what it had
# of the line is lost.
while line=$(head -n 1 <&3) && [ "$line" ]; do
    echo "$line" | base64 -d >/run/script
    sh /run/script </dev/null >&3 2>&1
    echo "@@ $?" >&3
done
"""


def find(program: str) -> Path:
    """Where a program is on this machine; administrators' directories may not be in PATH."""
    found = shutil.which(program, path=SEARCH)
    assert found, f"{program} is missing: deploy/setup --test installs it"
    return Path(found)


class Kernel:
    """The kernel that deploy/setup fetched; skips the test where there is none for this kind of machine."""

    def __init__(self) -> None:
        if not (KERNEL / "stamp").exists():
            pytest.skip("no kernel in .cache/kernel: deploy/setup --test fetches one on Debian and Ubuntu, amd64")
        (self.image,) = (KERNEL / "boot").glob("vmlinuz-*")
        self.version = self.image.name.removeprefix("vmlinuz-")
        self.modules = KERNEL / "lib" / "modules" / self.version

    def load_order(self) -> list[Path]:
        """The files of the modules that the guest needs, each after those it depends on."""
        files: list[Path] = []
        for module in MODULES:
            words = ("-C", "/dev/null", "-d", KERNEL, "-S", self.version, "--show-depends", module)
            for line in run(find("modprobe"), *words).stdout.splitlines():
                kind, _, rest = line.partition(" ")
                # The other kind is `builtin`.
                if kind == "insmod" and (path := Path(rest.split()[0])) not in files:
                    files.append(path)
        return files


def install(program: Path, tree: Path) -> None:
    """Put a program of this machine into a tree, with the shared libraries it names."""
    files = [program, *map(Path, re.findall(r"(/\S+) \(0x", run("ldd", program, check=False).stdout))]
    for file in files:
        target = tree / ("bin" if file == program else str(file.parent).lstrip("/")) / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def make_tree(tree: Path) -> None:
    """What both the initramfs and a root file system hold: the shell, the programs and the init script."""
    tree.mkdir()
    for name in ("bin", "dev", "proc", "sys", "run", "mnt", "root", "tmp"):
        (tree / name).mkdir()
    install(find("busybox"), tree)
    for program in PROGRAMS:
        install(find(program), tree)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)


def make_initramfs(kernel: Kernel, work: Path) -> Path:
    """An initramfs for Guest; a few MiB, not compressed."""
    tree = work / "initramfs"
    make_tree(tree)
    (tree / "modules").mkdir()
    for number, module in enumerate(kernel.load_order()):
        content = module.read_bytes()
        if module.suffix == ".xz":
            content = lzma.decompress(content)
        elif module.suffix == ".zst":
            content = subprocess.run(["zstd", "-dc", module], stdout=subprocess.PIPE, check=True).stdout
        (tree / "modules" / f"{number:02}-{module.name.split('.')[0]}.ko").write_bytes(content)
    names = "\n".join(["."] + [str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))])
    archive = work / "initramfs.cpio"
    with archive.open("wb") as out:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=tree, input=names.encode(), stdout=out, check=True)
    return archive


def attach_line(port: int) -> str:
    """What attaches, in the guest, a server that is reached over a TCP port of this machine."""
    return f'nbd-client 10.0.2.2 {port} /dev/nbd0 -b 4096 -N ""'


class Guest:
    """One machine, running from the start of this object until `kill`.

    `attach` is the command that attaches whatever server listens on the Unix socket that was given.
    """

    def __init__(
        self, kernel: Kernel, initramfs: Path, work: Path, *, socket: Path | None = None, root: str | None = None
    ) -> None:
        self._messages = work / f"guest-{os.urandom(4).hex()}.log"
        words = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults", "-no-user-config"]
        words += ["-display", "none", "-no-reboot", "-serial", f"file:{self._messages}", "-serial", "stdio"]
        words += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        words += ["-append", "console=ttyS0 panic=-1 quiet" + (" root_on_vda1" if root else "")]
        words += ["-device", "virtio-net-pci,netdev=n0,romfile=", "-netdev", "user,id=n0"]
        if root:
            words += ["-drive", f"file={root},format=raw,if=virtio,discard=unmap"]
        self.attach = ""
        self._socat: subprocess.Popen[bytes] | None = None
        self._errors = work / f"{self._messages.stem}.err"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        if socket:
            port = free_port()
            listen = f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,nodelay"
            self._socat = subprocess.Popen(["socat", "-lf", "/dev/null", listen, f"UNIX-CONNECT:{socket}"])
            self.attach = attach_line(port)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, daemon=True).start()
        try:
            greeting = self._next(self._lines)
            assert greeting == "@@ ready", f"the guest greets with {greeting!r}\n{self.messages}"
        except BaseException:
            self.kill()
            raise

    @property
    def messages(self) -> str:
        """What the kernel and qemu have said so far."""
        return self._messages.read_text(errors="replace") + self._errors.read_text(errors="replace")

    def run(self, script: str, *, check: bool = True) -> str:
        """Run a script and return what it printed; fails if the script does and `check` is on."""
        code, text = self.attempt(script)
        assert not (check and code), f"exit code {code} in the guest\n{script}\n{text}\n{self.messages}"
        return text

    def attempt(self, script: str) -> tuple[int, str]:
        """Run a script; its exit code and what it printed."""
        self._send(script)
        printed = []
        while not (line := self._next(self._lines)).startswith("@@ "):
            printed.append(line)
        return int(line.removeprefix("@@ ")), "\n".join(printed)

    def start(self, script: str) -> None:
        """Run a script in the background; it prints reports, see `report`."""
        self.run(f"cat >/run/background <<'END'\n{script}\nEND\nsh /run/background >/dev/ttyS1 2>&1 &")

    def report(self) -> str:
        """The next line that something in the background has printed, without the mark."""
        return self._next(self._reports).removeprefix("! ")

    def power_off(self) -> None:
        """Shut down as the machine would, everything synced."""
        self._send("sync; poweroff -f")
        code = self._process.wait(SILENCE_SECONDS)
        assert code == 0, f"qemu ended with {code}\n{self.messages}"

    def kill(self) -> None:
        """Pull the plug; nothing is left in the memory of the machine."""
        for process in (self._process, self._socat):
            if process:
                process.kill()
                process.wait()

    def is_running(self) -> bool:
        """Whether the machine is on."""
        return self._process.poll() is None

    def _send(self, script: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(base64.b64encode(script.encode()) + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip("\r\n")
            (self._reports if line.startswith("! ") else self._lines).put(line)
        self._lines.put(None)
        self._reports.put(None)

    def _next(self, lines: queue.SimpleQueue[str | None]) -> str:
        try:
            line = lines.get(timeout=SILENCE_SECONDS)
        except queue.Empty:
            raise AssertionError(f"the guest was silent for {SILENCE_SECONDS} s\n{self.messages}") from None
        assert line is not None, f"the guest has ended\n{self.messages}"
        return line
