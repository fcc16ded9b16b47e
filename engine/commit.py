"""Committing a container: its changes as a layer on its image. Floor 3.

Only here: that what is read holds still. A running container is paused while its changes are read (its state says so,
and its processes go on afterwards; in a virtual machine they are frozen, and the state stays); one that does not run
must not be started meanwhile, else the commit fails and nothing is left of it. Runs in a job's thread.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from engine.changes import Upper
from engine.containers import Containers
from engine.errors import Busy, EngineError, InvalidArgument
from engine.images import manifests, newimage
from engine.images.catalog import Image, Images
from engine.images.newimage import Note
from engine.images.reference import parse
from engine.images.upperlayer import layer_tar
from engine.jobs import Task
from engine.lifecycle import State
from engine.records import Container
from engine.store.trees import Trees

log = logging.getLogger(__name__)

STILL = (State.CREATED, State.STOPPED, State.PAUSED)
COMMITTABLE = (*STILL, State.RUNNING)


def commit(
    containers: Containers,
    images: Images,
    trees: Trees,
    name: str,
    reference: str,
    task: Task,
    *,
    author: str = "",
    message: str = "",
    changes: tuple[str, ...] = (),
) -> Image:
    """The new image. NotFound without an image to build on; Busy in a transient state; InvalidArgument for a change."""
    named = parse(reference)
    if named.digest:
        raise InvalidArgument("a new image cannot be named by digest", at=reference)
    for change in changes:
        newimage.check(change)
    with images.lease():
        container = containers.get(name)
        base = containers.execution.image_of(container)
        tree = trees.open(base.chain_id)
        made: tuple[str, str, int] | None = None
        with still(containers, name, task) as (container, upper):
            task.progress(f"reading the changes of {name}")
            pieces = layer_tar(upper, tree, task)
            head = next(pieces, None)
            if head is not None:
                made = _layer(images, _joined(head, pieces, task), task)
        now = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        note = Note(now, author, message, _command(container, images, base), changes)
        task.progress("building the tree of the new image")
        return newimage.add(images, base, made, container.config, note, named.normalised())


def _command(container: Container, images: Images, base: Image) -> str:
    """What ran, as Docker writes it into the history."""
    runtime = images.config(base.digest).runtime
    config = container.config
    entry = config.entrypoint if config.entrypoint is not None else runtime.entrypoint or ()
    command = config.command if config.command is not None else (() if config.entrypoint else runtime.cmd or ())
    return shlex.join((*entry, *command))


def _joined(head: bytes, rest: Iterator[bytes], task: Task) -> Iterator[bytes]:
    yield head
    done = len(head)
    for piece in rest:
        task.check()
        yield piece
        done += len(piece)
        task.advance("changes", done, done, "reading")


def _layer(images: Images, tar: Iterator[bytes], task: Task) -> tuple[str, str, int]:
    kind = f"{manifests.OCI_LAYER}+gzip"
    with images.blobs.writer(kind) as keep:
        info = images.store_layers.ingest(newimage.gzipped(tar), kind, keep=keep)
        task.log(f"the changes are layer {info.diff_id}, {info.entries} entries")
        return info.diff_id, keep.digest(), keep.offset


def _same_run(containers: Containers, container: Container, states: tuple[State, ...]) -> None:
    after = containers.records.by_id(container.id)
    if after.started_ns != container.started_ns or after.state not in states:
        raise Busy("the container went on while its changes were read", at=container.name, hint="commit it again")


@contextmanager
def still(containers: Containers, name: str, task: Task) -> Iterator[tuple[Container, Path | Upper]]:
    """The container, and what it changed, while nothing in it runs. Busy when it did run meanwhile."""
    container = containers.get(name)
    if container.state not in COMMITTABLE:
        raise Busy(f"the container is {container.state}", at=name, hint="try again once it is running or stopped")
    if containers.guests.has(container):  # once paused it could not tell of its files
        with containers.guests.still(container) as upper:
            yield container, upper
        _same_run(containers, container, (container.state,))
        return
    paused = container.state is State.RUNNING
    if paused:
        containers.pause(name)
    try:
        yield container, containers.upper(name)
        _same_run(containers, container, STILL)
    finally:
        if paused:
            try:
                containers.resume(name)
            except EngineError as error:  # somebody resumed, stopped or killed it meanwhile
                task.log(f"{name} is not resumed: {error.reason}")
