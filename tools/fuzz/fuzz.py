"""Coverage-guided fuzzing (atheris) of what reads bytes from strangers: tar, layer index, trees, manifests,
references, frames of a guest, kernels.

    python tools/fuzz/fuzz.py [tar|layer|index|tree|manifest|reference|frames|kernel|package]…
        [--seconds 30] [--corpus DIR] [--seeds DIR]

Needs `pip install -e .[fuzz]`. Without names, every target in turn, each in a process of its own for `--seconds`. A
reader may refuse by an EngineError (a tree also by KeyError); any other exception, a hang above ten seconds or more
than 1 GiB of memory is a finding: its input stays in the corpus directory as crash-*, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
FIXTURES = ROOT.parent / "shared" / "fixtures"
MAX_SEED = 64 << 10  # bytes: mutations of large inputs find little


def check_tar(data: bytes) -> None:
    from engine.store.entries import entry_of
    from engine.store.tar import Limits, TarReader

    limits = Limits(tar_size=1 << 22, entries=4096, special=1 << 16)
    reader = TarReader(iter([data[:700], data[700:]]), limits)
    for member in reader:
        entry_of(member)
        for _ in reader.pieces():
            pass
    reader.drain()


def check_layer(data: bytes) -> None:
    """A tar to a tree and back: what is accepted must be readable."""
    from engine.store import erofs
    from engine.store.entries import entry_of
    from engine.store.merge import Merger
    from engine.store.tar import Limits, TarReader

    reader = TarReader(iter([data]), Limits(tar_size=1 << 22, entries=4096, special=1 << 16))
    merger = Merger()
    entries = [entry for member in reader if (entry := entry_of(member)) is not None]
    for entry in entries:
        entry.size = 0  # bodies are not stored here
    merger.apply("sha256:" + "0" * 64, entries)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        with open(f"{name}/erofs", "wb") as out, open(f"{name}/prov", "wb") as prov:
            count, _ = erofs.write(merger.root, out, prov, merger.layers, bytes(16), lambda diff_id: 0)
        assert len(read_tree(Path(name))) + 1 == count


def read_tree(path: Path) -> set[int]:
    from engine.store.tree import Tree

    def no_data(diff_id: str) -> None:
        raise FileNotFoundError(diff_id)

    tree = Tree(path, no_data)  # type: ignore[arg-type]
    seen = set()
    for number, (name, nid) in enumerate(tree.walk()):
        seen.add(nid)
        tree.stat(nid)
        tree.identity(nid)
        tree.xattrs(nid)
        tree.provenance(nid)
        if number < 1000:
            tree.lookup(name)
        if tree.stat(nid).mode & 0o170000 == 0o120000:
            tree.readlink(nid)
    return seen


def check_tree(data: bytes) -> None:
    """An image whose superblock is right, so that what follows is reached."""
    from engine.store import erofs

    image = bytearray(data[2:] + bytes(-len(data[2:]) % 4096))
    if len(image) >= 8192:
        at = erofs.SUPER_OFFSET
        image[at + 4 : at + 8] = bytes(4)
        image[at + 4 : at + 8] = erofs.crc32c(bytes(image[at:4096])).to_bytes(4, "little")
    count = int.from_bytes(data[:2], "little")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        Path(name, "erofs").write_bytes(image or b"x")
        head = erofs.PROV_HEAD.pack(erofs.PROV_MAGIC, 1, count) + bytes(32)
        Path(name, "prov").write_bytes(head + bytes(erofs.PROV.size * count))
        with contextlib.suppress(KeyError):
            read_tree(Path(name))


def check_index(data: bytes) -> None:
    from engine.store.index import MAGIC, read_index

    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as file:
        file.write(data if data.startswith(MAGIC) else framed(data))
        file.flush()
        for _ in read_index(Path(file.name), "sha256:" + "0" * 64):
            pass


def framed(payload: bytes) -> bytes:
    """An index of one frame with right checksums, so that its records are reached."""
    import struct
    from zlib import crc32

    from engine.store import index

    out = index.MAGIC + index._HEAD.pack(len(payload), crc32(payload)) + payload
    trailer = struct.pack(index._TRAILER.format, 1, len(out))
    return out + index._HEAD.pack(0, crc32(trailer)) + trailer


def check_manifest(data: bytes) -> None:
    from engine.errors import EngineError
    from engine.images import manifests

    for read in (manifests.parse, manifests.parse_config):
        with contextlib.suppress(EngineError):
            read(data)


def check_reference(data: bytes) -> None:
    from engine.images.reference import parse, parse_any
    from fdfs.tree.tags import short

    text = data.decode("utf-8", "replace")
    with contextlib.suppress(*refusals()):
        parse_any(text)
    named = parse(text)
    if not named.digest or named.tag:
        assert parse(named.normalised()).normalised() == named.normalised(), text
    assert parse(short(named.normalised())).normalised() == named.normalised(), text


def refusals() -> tuple[type[Exception], ...]:
    from engine.errors import EngineError

    return (EngineError,)


# --- seeds ------------------------------------------------------------------------------------------------------


def files(*folders: str, where: Path) -> list[bytes]:
    return [
        path.read_bytes()
        for folder in folders
        for path in sorted(where.joinpath(folder).rglob("*"))
        if path.is_file() and path.stat().st_size <= MAX_SEED
    ]


def seeds(target: str, where: Path) -> list[bytes]:
    """Inputs of the kind, from the fixtures where there are any."""
    tars = files("tar", "layers", where=where)
    if target in ("tar", "layer"):
        return tars
    if target == "frames":
        return frames_of_guest()
    if target in ("kernel", "package"):
        return kernels() if target == "kernel" else packages()
    if target == "manifest":
        return files("manifests", "oci-layouts", where=where)
    if target == "reference":
        table = where / "tables" / "image-reference.json"
        rows = json.loads(table.read_text()) if table.exists() else ["nginx", "ghcr.io/o/r:tag@sha256:" + "0" * 64]
        return [text.encode() for text in strings(rows)]
    out = []
    for tar in tars[:60]:
        with contextlib.suppress(Exception):
            out.append(image_of(tar) if target == "tree" else index_of(tar))
    return out


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []


def image_of(tar: bytes) -> bytes:
    from engine.store import erofs
    from engine.store.entries import entry_of
    from engine.store.merge import Merger
    from engine.store.tar import TarReader

    merger = Merger()
    entries = [entry for member in TarReader(iter([tar])) if (entry := entry_of(member)) is not None]
    for entry in entries:
        entry.size = 0
    merger.apply("sha256:" + "0" * 64, entries)
    out, prov = io.BytesIO(), io.BytesIO()
    count, _ = erofs.write(merger.root, out, prov, merger.layers, bytes(16), lambda diff_id: 0)
    return count.to_bytes(2, "little") + out.getvalue()


def index_of(tar: bytes) -> bytes:
    from engine.store.entries import entry_of
    from engine.store.index import IndexWriter
    from engine.store.tar import TarReader

    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "index")
        with IndexWriter(path) as writer:
            for member in TarReader(iter([tar])):
                if (entry := entry_of(member)) is not None:
                    entry.size = 0
                    writer.add(entry)
            writer.finish()
        return path.read_bytes()


def check_frames(data: bytes) -> None:
    """What a hostile guest may say to the client of its agent."""
    from engine.runtimes.vm import protocol
    from engine.runtimes.vm.protocol import Type

    readers = {
        Type.HELLO: protocol.parse_hello,
        Type.EXIT: protocol.parse_exit,
        Type.CREDIT: lambda payload: protocol.Credit(1000).give(protocol.parse_credit(payload)),
    }
    for frame in protocol.Parser(protocol.Side.GUEST).feed(data):
        if frame.type is Type.RESP:
            _, values = protocol.parse_response(frame.payload)
            values.text("step")
            for entry in values.all("entry"):
                name, _, _ = protocol.parse_entry(entry)
                assert b"/" not in name
                assert name not in (b"", b".", b"..")
            if values.get("folder") is not None:
                protocol.parse_folder(values.need("folder"))
            if values.get("attr") is not None:
                protocol.parse_attr(values.need("attr"))
            if values.get("handle") is not None:
                assert values.number("handle", most=1 << 40) >= 0
        elif frame.type in readers:
            readers[frame.type](frame.payload)


def frames_of_guest() -> list[bytes]:
    from engine.runtimes.vm import protocol
    from engine.runtimes.vm.protocol import Type, frame

    hello = frame(Type.HELLO, 0, protocol.pack_words([b"version=%d" % protocol.VERSION, b"build=x"]))
    entry = bytes(protocol.ATTR.size)
    answers: list[protocol.Words] = [
        {},
        {"entry": [entry + b"a", entry + b"b\0user.x"], "folder": bytes(32)},
        {"handle": 7, "attr": entry},
    ]
    out = [hello + frame(Type.RESP, 1, protocol.response(0, words)) for words in answers]
    out.append(hello + frame(Type.DATA, 2, b"text", 1) + frame(Type.END, 2, flag=1) + protocol.credit(2, 9))
    out.append(hello + frame(Type.EXIT, 2, protocol.EXITED.pack(1, 0)) + frame(Type.PONG, 3))
    return out


def check_kernel(data: bytes) -> None:
    """A kernel file, and a module: somebody's download."""
    from engine import kernelimage, kernelmodules
    from engine.errors import EngineError

    with contextlib.suppress(EngineError):
        found = kernelimage.read(data)
        assert found.arch in kernelimage.ARCHITECTURES
        assert found.version
    kernelmodules.modinfo(kernelmodules.plain(data, "m"), "m", kernelimage.X86_64)


def check_package(data: bytes) -> None:
    """A Debian package."""
    from engine import kernelpackage

    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "k.deb"
        path.write_bytes(data)
        kernelpackage.read(path, Path(place), "x86_64")


def kernels() -> list[bytes]:
    """The least that are kernels: those of the tests, in each wrapping."""
    import gzip
    import lzma

    import zstandard

    sys.path.append(str(ROOT / "tests"))
    from test_2_kernels import arm64, bzimage, lz4, vmlinux

    packed = [pack(vmlinux()) for pack in (gzip.compress, lzma.compress, zstandard.compress, lz4)]
    zboot = b"MZ\0\0zimg" + (64).to_bytes(4, "little") + len(packed[0]).to_bytes(4, "little") + bytes(48) + packed[0]
    modules = sorted(
        (ROOT / ".cache" / "kernels").glob("imported-*/*/modules/*.ko"), key=lambda path: path.stat().st_size
    )
    small = [path.read_bytes() for path in modules[:3]]
    return [vmlinux(), arm64(), gzip.compress(arm64()), zboot, *packed, *map(bzimage, packed), *small]


def packages() -> list[bytes]:
    import gzip
    import lzma
    import tarfile

    out = []
    for pack, suffix in ((lzma.compress, "xz"), (gzip.compress, "gz"), (bytes, "")):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            names = {"boot/vmlinuz-6.9.1": kernels()[0], "boot/config-6.9.1": b"CONFIG_EROFS_FS=y\n"}
            for name, body in {**names, "lib/modules/6.9.1/kernel/fs/ext4.ko": b"\x7fELF" + bytes(99)}.items():
                info = tarfile.TarInfo(f"./{name}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        body = pack(data.getvalue())
        member = f"{'data.tar.' + suffix if suffix else 'data.tar':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n"
        out.append(b"!<arch>\n" + member.encode() + body)
    return out


TARGETS: dict[str, Callable[[bytes], None]] = {
    "tar": check_tar,
    "layer": check_layer,
    "index": check_index,
    "tree": check_tree,
    "manifest": check_manifest,
    "reference": check_reference,
    "frames": check_frames,
    "kernel": check_kernel,
    "package": check_package,
}


def run(target: str, corpus: Path, seconds: int) -> None:
    """Fuzz in this process; libFuzzer ends it."""
    import atheris

    with atheris.instrument_imports(include=["engine"]):
        import engine.images.manifests
        import engine.images.reference
        import engine.kernelpackage
        import engine.store.entries
        import engine.store.tree  # noqa: F401
    refused = refusals()
    check = TARGETS[target]

    def one(data: bytes) -> None:
        with contextlib.suppress(*refused):
            check(data)

    options = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=1024",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/", str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], default=[])
    parser.add_argument("--seconds", type=int, default=30)
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "dutchman-fuzz")
    parser.add_argument("--seeds", type=Path, default=FIXTURES, help="a directory as the tests' fixtures")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    if options.here:
        run(targets[0], options.corpus / targets[0], options.seconds)
        return 0
    failed = []
    for target in targets:
        corpus = options.corpus / target
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds(target, options.seeds)):
            (corpus / f"seed-{number:04}").write_bytes(seed)
        command = [sys.executable, __file__, target, "--here", "--seconds", str(options.seconds)]
        done = subprocess.run([*command, "--corpus", str(options.corpus)], capture_output=True, text=True)
        runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(json.dumps({"target": target, "seconds": options.seconds, "runs": int(runs[0]) if runs else 0,
                          "ok": done.returncode == 0}), flush=True)  # fmt: skip
        if done.returncode:
            failed.append(target)
            print((done.stdout + done.stderr)[-4000:], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
