"""SELinux contexts as they are chosen; that a kernel takes them is seen in a guest (tests/system/guest_selinux.py)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import ContainerConfig
from engine.errors import InvalidArgument
from engine.giving import check_ours
from engine.runtimes import selinux
from engine.runtimes.selinux import Labels

TYPES = {"container_t", "container_file_t", "other_t"}


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A host whose policy has these types."""
    (tmp_path / "selinuxfs").mkdir()
    (tmp_path / "selinuxfs/enforce").write_text("1")
    (tmp_path / "selinuxfs/mls").write_text("1")
    types = set(TYPES)
    monkeypatch.setattr(selinux, "SELINUX", tmp_path / "selinuxfs")
    monkeypatch.setattr(selinux, "ETC", tmp_path / "etc")
    monkeypatch.setattr(selinux, "known", lambda context: context.split(":")[2] in types)
    return types


def of(tmp_path: Path, name: str = "ab" * 32, **fields: object) -> Labels:
    (tmp_path / "containers" / name).mkdir(parents=True, exist_ok=True)
    return selinux.of(tmp_path / "containers" / name, ContainerConfig.model_validate(fields))


def test_nothing_is_labelled_without_selinux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "SELINUX", tmp_path / "none")
    assert of(tmp_path, security_opt=["label=type:my_t"]) == Labels()
    assert not list((tmp_path / "containers").glob("*/*"))


def test_every_container_has_categories_of_its_own(tmp_path: Path, policy: set[str]) -> None:
    one, two = of(tmp_path), of(tmp_path, "cd" * 32)
    found = re.fullmatch(r"system_u:system_r:container_t:s0:(c\d+,c\d+)", one.process)
    assert found and one.private == f"system_u:object_r:container_file_t:s0:{found[1]}"
    assert one.shared == two.shared == "system_u:object_r:container_file_t:s0"
    assert one.private != two.private and of(tmp_path) == one and one.note == ""


def test_categories_that_another_has_are_not_taken(tmp_path: Path, policy: set[str]) -> None:
    first = of(tmp_path).private.rpartition(":")[2]
    (tmp_path / "containers" / ("ab" * 32) / "categories").unlink()
    (tmp_path / "containers" / "other").mkdir()
    (tmp_path / "containers/other/categories").write_text(f"{first}\n")
    assert of(tmp_path).private.rpartition(":")[2] != first


def test_the_contexts_are_the_policys(tmp_path: Path, policy: set[str]) -> None:
    place = tmp_path / "etc/mine/contexts"
    place.mkdir(parents=True)
    (tmp_path / "etc/config").write_text("# SELINUXTYPE=no\nSELINUX=enforcing\nSELINUXTYPE=mine\n")
    (place / "lxc_contexts").write_text('process = "u:r:other_t:s0"\ncontent = "a:b:c:d"\nfile = "u:o:f_t:s0"\n')
    policy.add("f_t")
    found = of(tmp_path)
    assert found.process.startswith("u:r:other_t:s0:c") and found.shared == "u:o:f_t:s0"
    (tmp_path / "selinuxfs/mls").write_text("0")
    assert of(tmp_path) == Labels("u:r:other_t", "u:o:f_t", "u:o:f_t", "")


def test_what_security_opt_asks_for(tmp_path: Path, policy: set[str]) -> None:
    asked = ["label=type:other_t", "label=user:me_u", "label=role:mine_r", "label=level:s0:c1,c2"]
    found = of(tmp_path, security_opt=asked)
    assert found.process == "me_u:mine_r:other_t:s0:c1,c2" and found.private.endswith(":container_file_t:s0:c1,c2")
    found = of(tmp_path, security_opt=["label=filetype:other_t"])
    assert ":other_t:" in found.private and ":other_t:" in found.shared and ":container_t:" in found.process
    for fields in ({"security_opt": ["label=disable"]}, {"privileged": True}, {"pid": "host"}, {"ipc": "host"}):
        found = of(tmp_path, **fields)
        assert found.process == "" and found.private.startswith("system_u:object_r:container_file_t:s0:c")


@pytest.mark.parametrize("option", ["type:no_t", "filetype:no_t"])
def test_a_context_the_policy_has_not_is_named(tmp_path: Path, policy: set[str], option: str) -> None:
    with pytest.raises(InvalidArgument, match=f"security_opt: label={option}: .* no context .*:no_t:"):
        of(tmp_path, security_opt=[f"label={option}"])


@pytest.mark.parametrize(
    ("decision", "enforce", "refused"),
    [
        ("0 ffffffff 0 ffffffff 1 0", "1", True),
        ("ffdfffff ffffffff 0 ffffffff 1 0", "1", True),
        ("200000 ffffffff 0 ffffffff 1 0", "1", False),
        ("0 ffffffff 0 ffffffff 1 1", "1", False),  # the type is permissive
        ("0 ffffffff 0 ffffffff 1 0", "0", False),  # the host is
        ("no answer", "1", False),
    ],
)
def test_a_context_no_container_gets_into_is_refused(
    tmp_path: Path, policy: set[str], monkeypatch: pytest.MonkeyPatch, decision: str, enforce: str, refused: bool
) -> None:
    (tmp_path / "selinuxfs/class/file/perms").mkdir(parents=True)
    (tmp_path / "selinuxfs/class/file/index").write_text("6")
    (tmp_path / "selinuxfs/class/file/perms/entrypoint").write_text("22")
    (tmp_path / "selinuxfs/enforce").write_text(enforce)
    asked = []
    monkeypatch.setattr(selinux, "_ask", lambda *words: asked.append(words) or decision)
    if refused:
        with pytest.raises(InvalidArgument, match=r"label=type:other_t: .*no \S+:other_t:s0:c.* from \S+_file_t:s0:c"):
            of(tmp_path, security_opt=["label=type:other_t"])
    else:
        assert ":other_t:" in of(tmp_path, security_opt=["label=type:other_t"]).process
    if enforce == "1":
        ((node, question),) = asked
        assert node == "access" and re.fullmatch(r"\S+:other_t:\S+ \S+:container_file_t:\S+ 6", question)
    assert of(tmp_path).process and len(asked) == (enforce == "1")  # only of what is asked for


def test_a_policy_without_containers_confines_none(tmp_path: Path, policy: set[str]) -> None:
    policy.clear()
    found = of(tmp_path)
    assert (found.process, found.private, found.shared) == ("", "", "")
    assert found.note == "this host's SELinux policy has no context system_u:object_r:container_file_t:s0"
    with pytest.raises(InvalidArgument, match=r"label=level:s0:c1,c2: .* no context"):
        of(tmp_path, security_opt=["label=level:s0:c1,c2"])


@pytest.mark.parametrize("path", ["/", "/usr", "/home", "/home/somebody", "/etc/passwd", str(Path.home())])
def test_what_belongs_to_the_host_keeps_its_labels(path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"volumes: Z: {path} .* stays its own"):
        check_ours("Z", path)
    check_ours("Z", path.rstrip("/") + "/a/project")
