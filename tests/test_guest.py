"""A real Linux kernel on top of the server: ext4 with fsync under SIGKILL, discard, nbdtab, a root file system.

The guest is that of guest.py. Most tests share one machine, which is started again when a test leaves it in disorder.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROGRAM, START_SECONDS, TOP, Server, free_port, is_attached, poll, run
from guest import Guest, Kernel, attach_line, find, make_initramfs, make_tree
from scale import scaled

# A device that was in use is free again when its last user has closed it, which is a little later.
IS_FREE = "until [ $(cat /sys/block/nbd0/size) = 0 ]; do usleep 10000; done"
DETACH = f"nbd-client -d /dev/nbd0; {IS_FREE}"


class Guests:
    """Starts machines that can attach whatever is served on `socket`, and keeps the one that the tests share."""

    def __init__(self, work: Path) -> None:
        self.kernel = Kernel()
        self.work = work
        self.initramfs = make_initramfs(self.kernel, work)
        self.socket = work / "disk.sock"
        self.shared: Guest | None = None

    def boot(self, root: str) -> Guest:
        """A machine of its own, whose root file system is in the first partition of a disk."""
        return Guest(self.kernel, self.initramfs, self.work, root=root)

    def fresh(self) -> Guest:
        """Pull the plug of the shared machine and start another."""
        if self.shared:
            self.shared.kill()
        self.shared = None
        self.shared = Guest(self.kernel, self.initramfs, self.work, socket=self.socket)
        return self.shared


@pytest.fixture(scope="module")
def guests() -> Iterator[Guests]:
    work = Path(tempfile.mkdtemp(prefix="nq-"))
    try:
        guests = Guests(work)
        yield guests
        if guests.shared:
            guests.shared.kill()
    finally:
        shutil.rmtree(work)


@pytest.fixture
def guest(guests: Guests, serve: Callable[..., Server]) -> Iterator[Guest]:
    """The shared machine, nothing attached. Needs `serve`, so that the servers end after it."""
    yield guests.shared or guests.fresh()
    if guests.shared and not is_tidy(guests.shared):
        guests.shared.kill()
        guests.shared = None


def is_tidy(guest: Guest) -> bool:
    """Whether nothing is attached or mounted, and nobody writes."""
    test = "! grep -q nbd /proc/mounts && [ $(cat /sys/block/nbd0/size) = 0 ]"
    return guest.is_running() and guest.attempt(test)[0] == 0


def checksums(directory: Path) -> dict[str, str]:
    """The MD5 of each file in a tree, by its name from there."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(directory)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def guest_checksums(guest: Guest, directory: str) -> dict[str, str]:
    """The same, as the guest reads it, from the disk and not from its memory."""
    guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    printed = guest.run(f"cd {directory} && find . -xdev -type f ! -path './lost+found/*' -exec md5sum {{}} +")
    return {name.removeprefix("./"): sum_ for sum_, name in (line.split("  ", 1) for line in printed.splitlines())}


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Which of the expected files are not there, or not so."""
    return sorted(name for name, sum_ in expected.items() if found.get(name) != sum_)


def assert_plain(image: Path) -> None:
    """No journal is attached, and qemu finds neither error nor leak."""
    assert not is_attached(image)
    run("qemu-img", "check", "-q", image)


# ---- Files and fsync --------------------------------------------------------------------------------

# Two writers. A file is `whole` when fsync has returned; it is announced before it is written again in place, or
# removed (the mount discards). Files are up to 150 kB: below and above what goes straight into the image.
WRITERS = """\
write() {
    dd if=/run/$who of=/mnt/$1 bs=64k conv=$2 2>/dev/null && echo "! whole $1 $(md5sum </run/$who | cut -c-32)"
}
writer() {
    who=$1; n=0
    while head -c $(((n * 7919 + $2) % 150000 + 1)) /dev/urandom >/run/$who && write $who$n fsync; do
        if [ $((n % 3)) = 2 ]; then
            old=$who$((n - 1))
            echo "! touched $old"
            head -c $(stat -c %s /mnt/$old) /dev/urandom >/run/$who
            write $old notrunc,fsync || break
        fi
        if [ $((n % 5)) = 4 ]; then
            echo "! touched $who$((n - 4))"
            rm /mnt/$who$((n - 4)) || break
        fi
        n=$((n + 1))
    done
    echo "! end"
}
writer ROUNDa 100 &
writer ROUNDb 70000 &
wait
"""


def kill_rounds(image: Path, serve: Callable[..., Server], guests: Guests, *, rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    whole: dict[str, str] = {}
    kept = 0
    guest = guests.shared or guests.fresh()
    server = serve(image, "--journal-size", "1M", socket=guests.socket)
    guest.run(f"{guest.attach} && mkfs.ext4 -q /dev/nbd0 && mount -o discard /dev/nbd0 /mnt")
    for number in range(rounds):
        story = f"seed {seed}, round {number}"
        guest.start(WRITERS.replace("ROUND", f"r{number}"))
        left, writers = rng.randrange(2, 25), 2
        while writers:
            kind, *words = guest.report().split()
            if kind == "end":
                writers -= 1
            elif kind == "touched":
                whole.pop(words[0], None)
            else:
                assert kind == "whole", (story, kind, words)
                whole[words[0]] = words[1]
                left -= 1
                if left == 0:
                    server.kill()
                    # Requests that were under way hang until this; see the tests of -timeout below.
                    guest.run("nbd-client -d /dev/nbd0")
        assert left <= 0, f"{story}: the writers ended before the server was killed\n{guest.messages}"
        if rng.random() < 0.4 or number == rounds - 1:
            guest = guests.fresh()
        else:
            guest.run(f"umount /mnt; {IS_FREE}")
        server = serve(image, "--commit-interval", rng.choice(("0.05", "1")), socket=guests.socket)
        guest.run(guest.attach + rng.choice(("", " -connections 4")))
        guest.run("mount -o discard /dev/nbd0 /mnt")
        lost = differing(whole, guest_checksums(guest, "/mnt"))
        assert not lost, f"{story}: not as it was when fsync returned: {lost}\n{guest.messages}"
        guest.run("umount /mnt && e2fsck -f -n /dev/nbd0")
        kept += len(whole)
        if rng.random() < 0.3:
            # Closed in between: the next journal is a new one, of another size.
            guest.run(DETACH)
            server.stop()
            assert_plain(image)
            server = serve(image, "--journal-size", rng.choice(("256K", "1M", "32M")), socket=guests.socket)
            guest.run(guest.attach)
        guest.run("mount -o discard /dev/nbd0 /mnt")
    guest.run(f"umount /mnt; {DETACH}")
    server.stop()

    assert_plain(image)
    raw, out = image.with_suffix(".raw"), image.with_suffix(".files")
    run("qemu-img", "convert", "-O", "raw", image, raw)
    run(find("e2fsck"), "-f", "-n", raw)
    out.mkdir()
    run(find("debugfs"), "-R", f"rdump / {out}", raw)
    assert not differing(whole, checksums(out)), f"seed {seed}: the closed image holds something else"
    print(f"seed {seed}: {rounds} kills, {kept} times a file was looked at whose fsync had returned, lost: 0")


def test_files_whose_fsync_returned_survive_sigkill_of_the_server(
    make_image: Callable[..., Path], serve: Callable[..., Server], guests: Guests, guest: Guest
) -> None:
    # Attach, mkfs, mount, write, SIGKILL, start again, attach again (at the end from a machine that has just
    # started), mount, look, fsck, go on writing. At the end: closed, plain, and the same for tools of this machine.
    kill_rounds(make_image("96M"), serve, guests, rounds=6, seed=1)


GEOMETRIES: list[dict[str, str]] = [{}, {"cluster_size": "4k"}, {"extended_l2": "on"}, {"cluster_size": "2M"}]


@pytest.mark.sweep
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_more_kills_on_four_geometries(
    options: dict[str, str], make_image: Callable[..., Path], serve: Callable[..., Server], guests: Guests, guest: Guest
) -> None:
    kill_rounds(make_image("192M", **options), serve, guests, rounds=scaled(4), seed=2)


# ---- What nbd-client makes of a server that dies ----------------------------------------------------


READ = "dd if=/dev/nbd0 iflag=direct bs=4k count=1 2>/dev/null | cmp -s - /run/block"
# A request in flight ends some time; with what, is its report.
READ_AND_REPORT = f'if {READ}; then echo "! right"; else echo "! failed"; fi'


class PortServer:
    """A server on a TCP port, and started there again: what cannot be reached refuses connections."""

    def __init__(self, image: Path, log: Path) -> None:
        self.image, self.log, self.port = image, log, free_port()
        self.attach = attach_line(self.port)

    def start(self) -> Server:
        words = [str(PROGRAM), "serve", str(self.image), "--port", str(self.port)]
        with self.log.open("ab") as out:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        server = Server(process, self.image, self.log)
        self.server = server
        poll(lambda: not server.is_running() or self.listens(), what="the server listens", seconds=START_SECONDS)
        assert server.is_running(), server.log
        return server

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def ports(image: Path, tmp_path: Path) -> Iterator[PortServer]:
    ports = PortServer(image, tmp_path / "server.log")
    yield ports
    if ports.server.is_running():
        ports.server.kill()


@pytest.fixture
def noted(guests: Guests) -> None:
    """Skips where the programs are not those whose behaviour was written down."""
    found = re.search(r"from nbd (\S+)", run(find("nbd-client"), "-V", check=False).stdout)
    if not found or found[1] != "3.24" or not guests.kernel.version.startswith("6.1."):
        pytest.skip("written down for nbd-client 3.24 on Linux 6.1")


def freeze_in_flight(guest: Guest, server: Server, attach: str) -> None:
    """Attach, write a block, stop the server's process, and have the guest wait for the block."""
    guest.run(f"{attach} && head -c 4096 /dev/urandom >/run/block")
    guest.run(f"dd if=/run/block of=/dev/nbd0 bs=4k conv=fsync 2>/dev/null && {READ}")
    os.kill(server.pid, signal.SIGSTOP)
    guest.start(READ_AND_REPORT)
    guest.run("until [ $(awk '{print $1}' /sys/block/nbd0/inflight) = 1 ]; do usleep 10000; done")


@pytest.mark.parametrize(
    ("options", "hangs"),
    [("", True), ("-persist", True), ("-timeout 2", False), ("-nonetlink -persist", False)],
    ids=["plain", "persist", "timeout", "ioctl and persist"],
)
def test_a_device_whose_server_died_is_dead_until_it_is_detached_and_attached_again(
    options: str, hangs: bool, ports: PortServer, guest: Guest, noted: None
) -> None:
    """What nbd-client 3.24 on Linux 6.1 makes of a server that was killed and started again.

    *Nothing reconnects*, whatever the options: requests fail with EIO, before the server is back and afterwards.
    `-persist` does nothing at all with the netlink interface, which is the default; with `-nonetlink` the client
    process takes what this kernel returns for its leave, and ends.

    A request that was under way when the server died hangs until somebody says `nbd-client -d` (which works while
    the file system is mounted); with `-timeout N` it fails after N seconds or so, with `-nonetlink` at once.

    What always works: `nbd-client -d`, umount, attach again, mount. What was flushed is there.
    """
    server = ports.start()
    freeze_in_flight(guest, server, f"{ports.attach} {options}")
    server.kill()
    assert not ports.listens(), "connections are refused from here on"
    if not hangs:
        assert guest.report() == "failed"
    # Soon, not at once: in ioctl mode a read that came early was answered once.
    poll(lambda: guest.attempt(READ)[0] != 0, what="an error, and not another block")
    server = ports.start()
    assert guest.attempt(READ)[0] != 0, "the server is back, the device is not"
    if hangs:
        assert guest.run("awk '{print $1}' /sys/block/nbd0/inflight") == "1"
    guest.run(DETACH)
    if hangs:
        assert guest.report() == "failed"
    guest.run(f"{ports.attach} && {READ} && {DETACH}")
    server.stop()
    assert_plain(ports.image)


@pytest.mark.parametrize(("options", "survives"), [("", True), ("-timeout 1", False)], ids=["plain", "timeout"])
def test_a_server_that_stalls_costs_time_and_with_a_timeout_the_device(
    options: str, survives: bool, ports: PortServer, guest: Guest, noted: None
) -> None:
    """A server that does not answer for a while (the host's disk stalls) is waited for, as long as it takes.

    With `-timeout N` the kernel gives up after N seconds or so, and then the device is dead as above, although the
    server is well: a timeout has to be longer than any stall of the host's disk.
    """
    server = ports.start()
    freeze_in_flight(guest, server, f"{ports.attach} {options}")
    if not survives:
        assert guest.report() == "failed"
    os.kill(server.pid, signal.SIGCONT)
    if survives:
        assert guest.report() == "right"
    if survives:
        guest.run(READ)
    else:
        # Soon, not at once: the request has failed before the kernel lets go of the connection.
        poll(lambda: guest.attempt(READ)[0] != 0, what="an error, and not another block")
    guest.run(DETACH)
    guest.run(f"{ports.attach} && {READ} && {DETACH}")
    server.stop()
    assert_plain(ports.image)


def test_the_lines_for_nbdtab_and_fstab_attach_and_mount(
    make_image: Callable[..., Path], serve: Callable[..., Server], guests: Guests, guest: Guest
) -> None:
    # The README's own lines, with the path of the socket in the guest put in.
    text = (TOP / "README.md").read_text().replace("\n", " ")
    nbdtab = re.search(r"nbd0 /[^`]*? unix[^\s`]*", text)
    fstab = re.search(r"/dev/nbd0 /mnt ext4 [^`]*? 0 0", text)
    assert nbdtab and fstab, "the README has lines for nbdtab and fstab"
    line = re.sub(r"/\S+", "/run/disk.sock", nbdtab[0], count=1)
    image = make_image()
    server = serve(image, socket=guests.socket)
    port = ":".join(guest.attach.split()[1:3])
    guest.run(f"socat UNIX-LISTEN:/run/disk.sock,fork TCP:{port} >/dev/null 2>&1 & echo $! >/run/socat")
    try:
        guest.run("until [ -S /run/disk.sock ]; do usleep 10000; done; mkdir -p /etc")
        guest.run(f"echo '{line}' >/etc/nbdtab; echo '{fstab[0]}' >/etc/fstab")
        guest.run("nbd-client nbd0 && mkfs.ext4 -q /dev/nbd0 && mount /mnt && echo hello >/mnt/file && sync")
        assert guest.run("grep /dev/nbd0 /proc/mounts").split()[1:3] == ["/mnt", "ext4"]
        guest.run(f"umount /mnt; {DETACH}")
    finally:
        guest.attempt("kill $(cat /run/socat); rm -f /run/disk.sock")
    server.stop()
    assert_plain(image)


# ---- Discard ----------------------------------------------------------------------------------------


def blocks_bytes(image: Path) -> int:
    """What the file takes on the disk."""
    return image.stat().st_blocks * 512


def test_fstrim_gives_the_space_of_removed_files_back(
    make_image: Callable[..., Path], serve: Callable[..., Server], guests: Guests, guest: Guest
) -> None:
    # 40 MiB are written and removed: the image keeps them until a trim says that nobody needs them.
    image = make_image("256M")
    server = serve(image, "--journal-size", "1M", socket=guests.socket)
    guest.run(f"{guest.attach} && mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt && echo kept >/mnt/kept")
    guest.run("for n in 1 2; do dd if=/dev/urandom of=/mnt/$n bs=1M count=20 conv=fsync 2>/dev/null; done")
    guest.run("rm /mnt/1 /mnt/2; sync")
    full = blocks_bytes(image)
    assert full > 40 << 20
    guest.run("fstrim /mnt; sync")
    # Freed clusters are punched after the commit that frees them, in the background. Not all that the file took
    # comes back before it is closed: the ring, and the room that is held ready for writes, stay.
    poll(lambda: full - blocks_bytes(image) > 35 << 20, what="the space comes back", seconds=60)
    guest.run("umount /mnt && e2fsck -f -n /dev/nbd0 && mount /dev/nbd0 /mnt && [ $(cat /mnt/kept) = kept ]")
    guest.run("umount /mnt")
    handle = server.connect("base:allocation")
    assert handle.pread(2, 1080) == b"\x53\xef", "the mark of ext4"

    guest.run("blkdiscard /dev/nbd0")
    assert handle.pread(1 << 20, 0) == bytes(1 << 20)
    extents: list[int] = []
    handle.block_status(256 << 20, 0, lambda _name, _offset, found, _error: extents.extend(found))
    assert set(extents[1::2]) == {3} and sum(extents[::2]) == 256 << 20, "holes that read as zeros, and nothing else"
    guest.run(DETACH)
    server.stop()
    assert_plain(image)
    assert blocks_bytes(image) < 2 << 20


# ---- A root file system -----------------------------------------------------------------------------

PARTITION = 1 << 20
ROOT_WRITES = """\
mkdir /home /home/deep /home/deep/deeper
n=0
while [ $n -lt 40 ]; do
    dd if=/dev/urandom of=/home/deep/$n bs=$((n * 997 + 1)) count=3 conv=fsync 2>/dev/null || exit 1
    n=$((n + 1))
done
dd if=/dev/urandom of=/home/large bs=1M count=6 2>/dev/null || exit 1
# What came with the image: copied, written over in the middle, moved, removed.
cp /lib/modules/*/modules.dep /home/deep/deeper/copy
dd if=/dev/urandom of=/lib/modules/$(uname -r)/modules.alias bs=4k seek=5 count=3 conv=notrunc,fsync 2>/dev/null
mv /lib/modules/*/modules.order /home/moved
rm /lib/modules/*/modules.symbols
sync
"""


def make_root_disk(kernel: Kernel, work: Path, tree: Path) -> Path:
    """A raw disk with one partition, whose ext4 holds what a machine needs and the kernel's package."""
    make_tree(tree)
    shutil.copytree(kernel.modules.parent, tree / "lib" / "modules", symlinks=True)
    disk = work / "root.raw"
    size = 160 << 20
    run(find("mkfs.ext4"), "-q", "-d", tree, "-E", f"offset={PARTITION}", disk, f"{(size - PARTITION) >> 10}k")
    # Spec: the partition table of a PC: one entry, Linux, from sector 2048 to the end.
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", PARTITION >> 9, (size - PARTITION) >> 9)
    with disk.open("r+b") as file:
        file.truncate(size)
        file.seek(446)
        file.write(entry.ljust(64, b"\0") + b"\x55\xaa")
    return disk


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("compression", ["zlib", pytest.param("zstd", marks=pytest.mark.sweep)])
def test_a_machine_runs_from_an_overlay_over_a_compressed_image(
    compression: str, tmp_path: Path, serve: Callable[..., Server], guests: Guests
) -> None:
    # A disk is made of this machine's programs and Debian's kernel modules, compressed, and put under an overlay.
    # A machine boots with its root file system there, reads all of it, writes, and shuts down.
    tree, backing, overlay = tmp_path / "tree", tmp_path / "backing.qcow2", tmp_path / "overlay.qcow2"
    disk = make_root_disk(guests.kernel, tmp_path, tree)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={compression}", disk, backing)
    assert backing.stat().st_size < disk.stat().st_blocks * 512 * 0.6, "or it is not compressed"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing.name, "-F", "qcow2", overlay)
    before = digest(backing)
    packed = checksums(tree)
    assert len(packed) > 1000

    server = serve(overlay)
    guest = guests.boot(server.uri)
    try:
        assert guest.run("awk '$2 == \"/\" {print $1, $3}' /proc/mounts | tail -n 1") == "/dev/vda1 ext4"
        assert guest_checksums(guest, "/") == packed
        guest.run(ROOT_WRITES)
        written = guest_checksums(guest, "/")
        assert len(written) == len(packed) + 42 - 1
        guest.run("mount -o remount,ro /")
        guest.power_off()
    finally:
        guest.kill()
    server.stop()

    assert_plain(overlay)
    assert digest(backing) == before, "the backing file is as it was"
    raw, partition, out = tmp_path / "after.raw", tmp_path / "partition", tmp_path / "after"
    run("qemu-img", "convert", "-O", "raw", overlay, raw)
    with raw.open("rb") as source, partition.open("wb") as target:
        source.seek(PARTITION)
        shutil.copyfileobj(source, target, 1 << 20)
    run(find("e2fsck"), "-f", "-n", partition)
    out.mkdir()
    run(find("debugfs"), "-R", f"rdump / {out}", partition)
    assert checksums(out) == written
