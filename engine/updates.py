"""Changing a container's config: what may change when, and limits that change while it runs. Floor 3.

Only here: the order of an update: checked whole, applied by the driver, then recorded. What the driver refuses changes
nothing; what cannot be recorded is undone. Thread-safe: updates of one container exclude each other by its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from engine import configcheck, fields
from engine.config import ContainerConfig
from engine.errors import Busy, EngineError
from engine.execution import Execution
from engine.lifecycle import State
from engine.records import Container, Records
from engine.runtimes.resources import Resources

log = logging.getLogger(__name__)

AT_REST = (State.CREATED, State.STOPPED)
UPDATABLE = (State.RUNNING, State.PAUSED)
PATIENCE = 5.0  # seconds an update waits for another command on the container
New = Callable[[Container], ContainerConfig]


def configure(records: Records, execution: Execution, id: str, new: New) -> Container:
    """Replace the config of a container by what `new` makes of it.

    Busy for what cannot change in its state; InvalidArgument or RuntimeFailure when limits cannot be applied to what
    runs. Either way nothing has changed.
    """
    now = records.by_id(id)
    if now.state not in UPDATABLE or Resources.of(new(now)) == Resources.of(now.config):
        return records.configure(id, _change(new, None))
    with execution.locked(id, PATIENCE):
        now = records.by_id(id)
        if now.state not in UPDATABLE:
            return records.configure(id, _change(new, None))
        before, after = Resources.of(now.config), Resources.of(new(now))
        change = _change(new, after)
        change(now)  # all that can be refused is refused before anything is applied
        driver = execution.driver_of(now)
        driver.update(id, after)
        try:
            return records.configure(id, change)
        except BaseException:
            try:
                driver.update(id, before)
            except EngineError as error:
                log.error("container %s: limits that were not recorded were not undone: %s", id, error)
            raise


def _change(new: New, applied: Resources | None) -> New:
    """The change with its checks. `applied`: the limits a running container has been given already."""

    def change(now: Container) -> ContainerConfig:
        config = new(now)
        if config == now.config:
            return config
        configcheck.check(config)
        if now.state not in AT_REST:
            live = fields.LIVE | (fields.RESOURCES if Resources.of(config) == applied else frozenset())
            for field in fields.FIELDS:
                if field not in live and getattr(config, field) != getattr(now.config, field):
                    hint = "wait until it runs" if field in fields.RESOURCES else "stop it first"
                    raise Busy(f"{field}: cannot change while the container is {now.state}", at=field, hint=hint)
        return config

    return change
