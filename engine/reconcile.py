"""After a restart: make the catalog agree with what really runs. Floor 3.

Only here: what each state a daemon can leave behind (`kill -9` at any point included) turns into. Runs once, before
anything else touches containers.

    found in the catalog    found running               becomes
    starting                not yet executed, or what   stopped: the start is rolled back
                            the last run left
    starting                running, paused             running, paused: only the note of it was lost
    starting                ended                       running, then stopped with its exit code
    running, paused         running, paused             what is found; watched again, with the limits of its config
    stopping                running, paused             stopping: the stop is taken up again
    stopping … starting     anything, in a restart      starting, once it has stopped
    running … stopping      ended                       stopped with its exit code
    starting … stopping     nothing of it               stopped, exit code 255, the reason says so
    removing                anything                    removed
    created, stopped        anything                    the same; what the driver keeps is cleared
    no row                  a directory                 cleared
"""

from __future__ import annotations

import logging
import time
from typing import Any

from engine.containers import Containers
from engine.errors import EngineError, Unsupported
from engine.execution import LOST, one_line
from engine.lifecycle import State
from engine.model import DIGEST
from engine.records import Container
from engine.runtimes import base
from engine.runtimes.base import Status
from engine.runtimes.resources import Resources

log = logging.getLogger(__name__)

LIVE = {base.State.RUNNING: State.RUNNING, base.State.PAUSED: State.PAUSED}


def reconcile(containers: Containers) -> None:
    """One container that cannot be reconciled (its driver fails, say) is logged, and stops no other."""
    rows = containers.all()
    known = {container.id for container in rows}
    for id in containers.directories():
        if id not in known:
            _orphan(containers, id)
    for container in rows:
        try:
            _one(containers, container)
            if container.state is not State.REMOVING:
                containers.sessions.reconcile(container)
                if containers.records.restart_noted(container.id):
                    containers.resume_restart(container)
        except (EngineError, OSError):
            log.exception("container %s (%s) could not be reconciled", container.name, container.state)


def _orphan(containers: Containers, id: str) -> None:
    log.warning("containers/%s has no row: an unfinished creation is cleared", id)
    try:
        if DIGEST.match(f"sha256:{id}"):
            containers.execution.delete_anywhere(id)
        containers.discard_directory(id)
    except (EngineError, OSError):
        log.exception("containers/%s could not be cleared", id)


def _one(containers: Containers, container: Container) -> None:
    if container.state is State.REMOVING:
        containers.finish_removal(container)
        return
    driver = containers.execution.driver_of(container)
    found = driver.status(container.id)
    if container.state in (State.CREATED, State.STOPPED):
        if found.state is not base.State.ABSENT:
            driver.delete(container.id)
        return
    log.info("container %s was %s, found %s", container.name, container.state, found.state)
    if container.state is State.STARTING:
        _starting(containers, container, found)
    elif found.state in LIVE:
        if container.state is State.STOPPING:
            containers.execution.watch(container)
            containers.resume_stop(container, paused=found.state is base.State.PAUSED)
        else:
            now = LIVE[found.state]
            if now is not container.state:
                containers.records.move(container.id, now, pid=found.pid)
            containers.execution.watch(container)
            _limits(containers, container)
    else:
        _ended(containers, container, found)


def _limits(containers: Containers, container: Container) -> None:
    """Limits that were applied, but not recorded before the daemon was killed, were never acknowledged: undone."""
    try:
        with containers.execution.locked(container.id):
            containers.execution.driver_of(container).update(container.id, Resources.of(container.config))
    except Unsupported:
        pass  # this driver never changed any
    except EngineError as error:
        log.warning("container %s: its limits may not be those of its config: %s", container.name, error)


def _starting(containers: Containers, container: Container, found: Status) -> None:
    driver = containers.execution.driver_of(container)
    earlier = (
        found.finished_ns is not None and found.finished_ns == container.finished_ns
    )  # what is left of the last run
    if found.state in LIVE or (found.state is base.State.STOPPED and not earlier):
        columns: dict[str, Any] = {"pid": found.pid, "started_ns": time.time_ns(), "finished_ns": None, "oom": 0}
        columns["runtime"] = driver.name
        if not container.image:
            try:
                columns["image"] = containers.execution.image_of(container).digest
            except EngineError:
                pass
        if found.finished_ns:
            columns["started_ns"] = min(columns["started_ns"], found.finished_ns)
        after = containers.records.move(container.id, State.RUNNING, exit_code=None, **columns)
        if found.state is base.State.STOPPED:
            _ended(containers, after, found)
            return
        if found.state is base.State.PAUSED:
            after = containers.records.move(container.id, State.PAUSED)
        containers.execution.watch(after)
        return
    driver.delete(container.id)
    again = containers.records.restart_noted(container.id)
    containers.records.move(
        container.id,
        State.STOPPED,
        reason="the daemon ended while it was starting; nothing of it had run",
        exit_code=container.exit_code if container.exit_code is not None else LOST,
        pid=None,
        restarts=container.restarts - 1 if again else container.restarts,  # it is counted when it is taken up again
    )
    if again:
        containers.records.note_restart(container.id)


def _ended(containers: Containers, container: Container, found: Status) -> None:
    told = found.state is base.State.STOPPED and found.exit_code is not None and found.finished_ns is not None
    reason = "" if told else "it ended while no daemon looked, and nothing tells how: the host was restarted, say"
    containers.monitor.before_exit(container.id)
    containers.records.move(
        container.id,
        State.STOPPED,
        exit_code=LOST if found.exit_code is None else found.exit_code,
        oom=int(found.oom),
        finished_ns=found.finished_ns or time.time_ns(),
        pid=None,
        reason=one_line(reason),
    )
    containers.monitor.after_exit(container.id)
