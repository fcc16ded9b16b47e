"""Debian's real docker-registry on a free loopback port, for tests; with `users` behind htpasswd basic auth.

with Registry(tmp_path) as registry:
    registry.push_layout(layout, "demo:1")          # skopeo copy oci:… docker://127.0.0.1:<port>/demo:1
    registry.name("demo:1")                          # 127.0.0.1:<port>/demo:1
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {root}}}
  delete: {{enabled: true}}
http:
  addr: 127.0.0.1:{port}
"""


def available() -> bool:
    return shutil.which("docker-registry") is not None and shutil.which("skopeo") is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Registry:
    """A running registry below `directory`; a context manager, stopped by its own pid."""

    def __init__(self, directory: Path, *, users: Mapping[str, str] | None = None) -> None:
        self.directory = directory / "registry"
        self.users = dict(users or {})
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def name(self, reference: str) -> str:
        return f"{self.host}/{reference}"

    def start(self) -> Registry:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        config = CONFIG.format(root=self.directory / "data", port=self.port)
        if self.users:
            lines = [
                subprocess.run(
                    ["htpasswd", "-nbBC", "4", user, password], check=True, capture_output=True, text=True
                ).stdout.strip()
                for user, password in self.users.items()
            ]
            (self.directory / "htpasswd").write_text("\n".join(lines) + "\n")
            config += f"auth:\n  htpasswd: {{realm: test, path: {self.directory / 'htpasswd'}}}\n"
        (self.directory / "config.yml").write_text(config)
        with open(self.directory / "log", "ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(self.directory / "config.yml")], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=2).close()
                return self
            except urllib.error.HTTPError:  # 401: it is up
                return self
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log_text = (self.directory / "log").read_text()
                    self.stop()
                    raise RuntimeError(f"docker-registry did not start: {log_text}") from error
                time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _skopeo(self, source: str, reference: str, *options: str) -> None:
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *options]
        if self.users:
            user, password = next(iter(self.users.items()))
            command += ["--dest-creds", f"{user}:{password}"]
        done = subprocess.run([*command, source, f"docker://{self.name(reference)}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

    def push_layout(self, layout: Path, reference: str, tag: str = "latest", *, all_platforms: bool = True) -> None:
        """Copy what `tag` names in an OCI layout, byte for byte (so digests stay)."""
        self._skopeo(f"oci:{layout}:{tag}", reference, "--preserve-digests", *(["--all"] if all_platforms else []))

    def push_archive(self, archive: Path, reference: str) -> None:
        """Copy a docker-archive; arrives as Docker v2s2 with gzip layers."""
        self._skopeo(f"docker-archive:{archive}", reference)

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()
