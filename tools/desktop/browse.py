"""A file manager on the real mount: pcmanfm under Xvfb browses, previews and copies, and leaves screenshots to look at.

Prints JSON lines: a step, the screenshot of it, and the windows that opened besides the file manager's own (an error
dialog is one). The last line has what the file manager read of the mount, in bytes, and "failures"; exit status 1 when
there are any: a dialog, a copy that did not arrive, litter that was accepted, too much read for icons and thumbnails.
Needs root and these packages: pcmanfm xvfb xdotool imagemagick mousepad librsvg2-common shared-mime-info dbus strace
adwaita-icon-theme.
Usage: python tools/desktop/browse.py [--shots DIRECTORY] [--no-bind]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from engines import add_busybox, add_image
from mounting import Daemon

from engine.engine import Engine

PICTURE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="96">'
    b'<circle cx="48" cy="48" r="40" fill="#c0392b"/></svg>'
)
FILES = {
    "etc": None,
    "etc/motd": b"Hello from an image.\n",
    "srv": None,
    "srv/picture.svg": PICTURE,
    "srv/notes.txt": b"Notes.\n" * 20,
    "srv/film.mp4": os.urandom(64 << 20),
    "srv/photo.png": os.urandom(32 << 20),
    "srv/disk.img": os.urandom(64 << 20),
}
ENOUGH = 16 << 20  # bytes that icons and thumbnails of all of this may cost
WAIT = 3.0  # seconds for a window to be drawn


class Desktop:
    """A display with one file manager on it."""

    def __init__(self, place: Path, shots: Path, start: Path) -> None:
        self.place, self.shots = place, shots
        self.failures: list[str] = []
        self.number = 0
        self.display = f":{90 + os.getpid() % 900}"
        home, run = place / "home", place / "run"
        for directory in (home, run):
            directory.mkdir(mode=0o700)
        self.environment = {**os.environ, "DISPLAY": self.display, "HOME": str(home), "XDG_RUNTIME_DIR": str(run)}
        self.server = subprocess.Popen(
            ["Xvfb", self.display, "-screen", "0", "1000x700x24", "-nolisten", "tcp"], stderr=subprocess.DEVNULL
        )
        time.sleep(1)
        trace = ["strace", "-f", "-qq", "-y", "-e", "trace=read,pread64,mkdir,openat", "-o", str(place / "trace")]
        self.manager = subprocess.Popen(
            ["dbus-run-session", "--", *trace, "pcmanfm", str(start)],
            env=self.environment,
            cwd=home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.window = self.do("search", "--sync", "--onlyvisible", "--class", "pcmanfm").split()[0]
        self.do("windowsize", self.window, "1000", "700")

    def do(self, *arguments: str) -> str:
        done = subprocess.run(["xdotool", *arguments], env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout

    def key(self, *names: str) -> None:
        self.do("windowfocus", "--sync", self.window)
        self.do("key", "--clearmodifiers", "--delay", "150", *names)

    def go(self, path: Path) -> None:
        self.key("ctrl+l", "ctrl+a")
        self.do("type", "--delay", "5", str(path))
        time.sleep(0.5)
        self.key("Return", "Return")  # the first may only close the list of completions
        time.sleep(WAIT)
        title = self.do("getwindowname", self.window).strip()
        if title != path.name:
            self.failures.append(f"asked for {path}, the window shows {title}")

    def shot(self, step: str, expect: str = "") -> None:
        """A screenshot. Windows whose title does not have `expect` in it, besides the file manager's, are failures."""
        self.number += 1
        picture = self.shots / f"{self.number:02}-{step.replace(' ', '-')}.png"
        subprocess.run(["import", "-window", "root", str(picture)], env=self.environment, check=True, timeout=30)
        windows = self.do("search", "--onlyvisible", "--name", ".").split()
        titles = [self.do("getwindowname", window).strip() for window in windows if window != self.window]
        titles = [title for title in titles if title and title != "pcmanfm"]
        strange = [title for title in titles if not expect or expect not in title]
        if strange:
            self.failures.append(f"{step}: windows {strange}")
        if expect and len(strange) == len(titles):
            self.failures.append(f"{step}: no window {expect!r} among {titles}")
        say(step=step, picture=str(picture), windows=titles)

    def close(self) -> None:
        os.killpg(self.manager.pid, signal.SIGTERM)
        self.manager.wait()
        self.server.terminate()
        self.server.wait()

    def read_of(self, top: Path) -> tuple[int, dict[str, int]]:
        """Bytes the file manager, and what it started, read below `top`; and of which files most."""
        files: dict[str, int] = {}
        for line in (self.place / "trace").read_text(errors="replace").splitlines():
            match = re.search(r"(?:read|pread64)\(\d+<(.*?)>, .*= (\d+)$", line)
            if match and match[1].startswith(str(top)):
                name = match[1].removeprefix(str(top))
                files[name] = files.get(name, 0) + int(match[2])
        most = dict(sorted(files.items(), key=lambda item: -item[1])[:5])
        return sum(files.values()), most


def say(**facts: Any) -> None:
    print(json.dumps({"desktop": "pcmanfm", **facts}), flush=True)


def tour(desktop: Desktop, daemon: Daemon) -> None:
    mount = daemon.mount
    desktop.shot("top")
    for step, path in (
        ("containers", "containers"),
        ("a running container", "containers/web"),
        ("its configuration", "containers/web/config"),
        ("its files", "containers/web/rootfs"),
        ("a container that is not started", "containers/idle"),
        ("images", "images"),
        ("an image", "images/app:1"),
        ("files of an image", "images/app:1/rootfs/srv"),
        ("volumes", "volumes/data/data"),
        ("store", "store"),
    ):
        desktop.go(mount / path)
        desktop.shot(step)
    desktop.go(mount / "volumes/data/data")
    desktop.do("mousemove", "--window", desktop.window, "600", "500", "click", "1")
    desktop.key("ctrl+a", "ctrl+c")
    desktop.go(mount / "containers/web/rootfs/srv")
    desktop.do("mousemove", "--window", desktop.window, "600", "500", "click", "1")
    desktop.key("ctrl+v")
    time.sleep(WAIT)
    desktop.shot("copied into a container")
    desktop.go(mount / "containers")
    for name in (".DS_Store", "._web", ".hidden", ".Trash-0"):
        (mount / "volumes/data/data" / name).write_text("allowed here")
        try:
            (mount / "containers" / name).write_text("litter")
        except PermissionError:
            continue
        desktop.failures.append(f"{name} was accepted in containers/")
    for name in ("README.txt", "images/app:1/layers.svg"):
        viewer = subprocess.Popen(
            ["mousepad", str(mount / name)],
            env=desktop.environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        time.sleep(WAIT)
        desktop.shot(f"{Path(name).name} opened", expect=Path(name).name)
        viewer.terminate()
        viewer.wait()


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shots", type=Path, default=Path("shots"))
    options.add_argument("--no-bind", action="store_true")
    given = options.parse_args()
    given.shots.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="dutchman-desktop-"))
    with Engine(place / "store", runtime="oci") as engine:
        add_busybox(engine)
        add_image(engine, "docker.io/library/app:1", FILES)
    daemon = Daemon(place, runtime="oci", binds=not given.no_bind)
    try:
        with daemon:
            daemon.sh("mkdir volumes/data containers/web containers/idle; echo text > volumes/data/data/note.txt")
            (daemon.mount / "containers/web/config.yaml").write_text("image: busybox\ncommand: [sleep, '1000']\n")
            daemon.sh("echo busybox > containers/idle/config/image; echo start > containers/web/ctl")
            daemon.sh("mkdir containers/web/rootfs/srv; cp images/app:1/rootfs/srv/picture.svg volumes/data/data/")
            desktop = Desktop(place, given.shots, daemon.mount)
            try:
                tour(desktop, daemon)
            finally:
                desktop.close()
            copied = daemon.mount / "containers/web/rootfs/srv/picture.svg"
            if not copied.exists() or copied.read_bytes() != PICTURE:
                desktop.failures.append("the copied file did not arrive")
            total, most = desktop.read_of(daemon.mount)
            if total > ENOUGH:
                desktop.failures.append(f"{total} bytes were read, most of {most}")
            daemon.sh("echo 'stop 0' > containers/web/ctl")
            say(step="end", read_bytes=total, most=most, failures=desktop.failures)
    finally:
        daemon.stop()
        shutil.rmtree(place, ignore_errors=True)
    return 1 if desktop.failures else 0


if __name__ == "__main__":
    sys.exit(main())
