"""What Docker's habits ask for: inspect with --format, version, info, history, save to a pipe, completion."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dutchman import ROOT, Dutchman, demo_archive, needs_oci

from fdfs.cli_about import formatted
from fdfs.cli_mount import Failure

DOCUMENT = {
    "name": "web", "state": "running", "pid": 7, "exit_code": "", "health": "healthy", "ip": "10.1.1.2",
    "config": {"command": ["sh", "-c", "true"], "restart": "always", "labels": {"a.b": "c"}, "tty": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dutchman]:
    needs_oci()
    with Dutchman(tmp_path_factory.mktemp("about")) as engine:
        engine.up()
        engine.cli("load", str(demo_archive()))
        engine.cli("network", "create", "sea", "--label", "a=b")
        engine.cli("volume", "create", "-d", "ext4", "-o", "size=4m", "-l", "tier=db", "disk")
        engine.cli("create", "--name", "web", "--network", "sea", "-v", "disk:/d", "demo:1", "true")
        engine.cli("run", "--name", "talker", "demo:1", "echo", "said")
        yield engine


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{.State.Status}}", "running"),
        ("{{ .State.Running }} {{.State.Pid}}\\t{{.Name}}", "true 7\tweb"),
        ("{{.State.Health.Status}}/{{.NetworkSettings.IPAddress}}", "healthy/10.1.1.2"),
        ("{{.Config.Cmd}} {{.config.command.2}}", '["sh", "-c", "true"] true'),
        ("{{json .State.ExitCode}}{{.HostConfig.RestartPolicy.Name}}", '""always'),
        ("{{.config.labels}} {{.config.tty}} {a}", '{"a.b": "c"} false {a}'),
        ("", ""),
    ],
)
def test_dotted_paths_are_filled_in(template: str, text: str) -> None:
    assert formatted(template, DOCUMENT) == text
    assert json.loads(formatted("{{json .}}", DOCUMENT)) == DOCUMENT


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{.State.Nonsense}}", "no 'State'|no 'Nonsense'"),
        ("{{.config.command.9}}", "no '9'"),
        ("{{.config.nope}}", "no 'nope'"),
        ("{{range .config}}x{{end}}", "'{{range .config}}' is not understood"),
        ("{{.config", "is not understood"),
        ("{{.__class__}}", "no '__class__'"),
    ],
)
def test_anything_else_is_refused_by_name(template: str, words: str) -> None:
    with pytest.raises(Failure, match=words.replace("{", r"\{").replace("}", r"\}")):
        formatted(template, DOCUMENT)


def test_containers_images_networks_and_volumes_are_inspected(engine: Dutchman) -> None:
    (found,) = yaml.safe_load_all(engine.cli("network", "inspect", "sea").stdout)
    assert found["labels"] == {"a": "b"} and found["used_by"] == ["web"] and found["containers"] == {}
    assert engine.cli("network", "inspect", "-f", "{{.subnets.0}} {{.Internal}}", "sea").stdout.endswith("/24 false\n")
    (found,) = yaml.safe_load_all(engine.cli("volume", "inspect", "disk").stdout)
    assert (found["driver"], found["options"], found["labels"]) == ("ext4", {"size": "4m"}, {"tier": "db"})
    assert found["used_by"] == ["web"] and found["mounted"] is False
    assert engine.cli("inspect", "--format", "{{.Name}} {{.State.Status}}", "web").stdout == "web created\n"
    (found,) = yaml.safe_load_all(engine.cli("inspect", "demo:1").stdout)
    assert found["references"] == ["docker.io/library/demo:1"] or "demo:1" in found["references"]
    assert found["digest"][7:19] in engine.cli("images", "-q").stdout.split()
    for words, told in ((("network", "inspect", "no"), "no network"), (("volume", "inspect", "no"), "no volume"),
                        (("inspect", "no"), "no container or image")):  # fmt: skip
        assert told in engine.cli(*words, code=1).stderr


def test_version_info_and_history(engine: Dutchman) -> None:
    assert engine.cli("version").stdout.splitlines()[1] == f"engine {engine.read('version')}"
    assert engine.cli("info", "-f", "{{.images}}").stdout == "2\n"
    steps = engine.cli("history", "demo:1").stdout.splitlines()
    assert steps[0].split() == ["CREATED", "SIZE", "CREATED", "BY"] and len(steps) > 1


def test_an_image_goes_through_a_pipe(engine: Dutchman) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fdfs", "save", "demo:1"], env=engine.env, cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        assert {"manifest.json"} <= set(archive.getnames())


def test_logs_since_a_moment(engine: Dutchman) -> None:
    assert engine.cli("logs", "--since", "1h", "talker").stdout == "said\n"
    assert engine.cli("logs", "--since", "2999-01-31T12:00:00Z", "talker").stdout == ""
    assert engine.cli("logs", "--since", "1999-01-31", "talker").stdout == "said\n"
    assert "is no time" in engine.cli("logs", "--since", "soon", "talker", code=2).stderr
    assert "needs both streams" in engine.cli("logs", "--since", "1h", "--stdout", "talker", code=2).stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("dutchman logs ta", ["talker"]),
        ("dutchman rm talker ta", []),
        ("dutchman run de", ["demo:1", "demo:2"]),
        ("dutchman network inspect se", ["sea"]),
        ("dutchman volume rm di", ["disk"]),
        ("dutchman network connect sea we", ["web"]),
        ("dutchman rmi demo : ", ["1", "2"]),  # as bash has it, which ends a word at `:`
        ("dutchman cp talke", ["talker:"]),
        ("dutchman cp . talker : /srv/h", ["/srv/hello.txt"]),
        ("dutchman cp talker:/sr", ["talker:/srv/"]),  # as others have it
        ("dutchman cp nobody:/", []),
    ],
)
def test_a_shell_completes_names(engine: Dutchman, words: str, names: list[str]) -> None:
    assert completed(engine, words) == names


def completed(engine: Dutchman, words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fdfs"],
        env=engine.env | {"_DUTCHMAN_COMPLETE": "bash_complete", "COMP_WORDS": words.rstrip(),
                          "COMP_CWORD": str(words.rstrip().count(" "))},
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert not done.stderr
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_paths_in_a_container_complete_without_leading_out(engine: Dutchman, tmp_path: Path) -> None:
    root = engine.mount / "containers/talker/rootfs"
    (tmp_path / "secret").touch()
    (root / "odd").mkdir()
    for name in ("two words", "new\nline", "\x1b[31mred", "sub's"):
        (root / "odd" / name).touch()
    (root / "odd/out").symlink_to(tmp_path)
    (root / "odd/etc").symlink_to("/etc")
    (root / "odd/host").symlink_to("/../../../../usr")
    assert completed(engine, "dutchman cp talker : /odd/") == ["/odd/etc/", "/odd/host/", "/odd/out", "/odd/sub\\'s",
                                                               "/odd/two\\ words"]  # fmt: skip
    assert completed(engine, "dutchman cp talker : /odd/out/") == []
    assert completed(engine, "dutchman cp talker : /odd/etc/gr") == ["/odd/etc/group"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("volume rm nosuch", ["no volume 'nosuch'", "volume ls"]),
        ("network connect nosuch web", ["no networks/nosuch", "hint: ls "]),
        ("top web", ["web does not run", "dutchman start web"]),
        ("create -v some/where:/d demo:1", ["some/where is no name of a volume", "./some/where"]),
    ],
)
def test_a_refusal_says_what_to_do_next(engine: Dutchman, command: str, words: list[str]) -> None:
    said = engine.cli(*command.split(), code=1).stderr
    assert all(word in said for word in words), said
