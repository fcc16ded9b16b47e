"""Before the first virtual machine starts its agent is built, which may take minutes. Floor 3.

Only here: that this is a job, whose progress can be seen and which can be cancelled, that who starts a machine
meanwhile waits for the same one, and that it is told what a container's start waits for. Thread-safe.
"""

from __future__ import annotations

import threading

from engine.errors import RuntimeFailure
from engine.jobs import Jobs, State, Task
from engine.model import ImageConfig
from engine.runtimes import foreign
from engine.runtimes.vm import agentbuild

VERB = "agent build"


class Agents:
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        self._building: dict[str, int] = {}  # architecture -> job
        self._waiting: dict[str, int] = {}  # container -> job

    def ready(self, id: str, image: ImageConfig) -> None:
        """Returns when there is an agent for the machine of container `id`, of this image. Unsupported when none can be
        built, RuntimeFailure when it was not."""
        from engine.runtimes.vm import driver  # few engines need it

        architecture, cache = foreign.machine_of(image), driver.agents()
        agentbuild.check(architecture, cache)
        if agentbuild.built(architecture, cache) is not None:
            return

        def work(task: Task) -> str:
            return agentbuild.build(architecture, cache, task.progress, task.check).name

        with self._lock:
            number = self._building.get(architecture, 0)
            if not number or self._jobs.get(number).state is not State.RUNNING:
                number = self._building[architecture] = self._jobs.start(f"{VERB} {architecture}", work)
            self._waiting[id] = number
        try:
            job = self._jobs.wait(number)
        finally:
            with self._lock:
                del self._waiting[id]
        if job.state is not State.DONE:
            raise RuntimeFailure(f"jobs/{number}, {job.verb}: {job.error or job.state}", hint="start it again")

    def waits(self, id: str) -> str:
        """What the start of a container waits for; empty when for nothing of this."""
        number = self._waiting.get(id)
        if number is None:
            return ""
        return f"waits for jobs/{number}: {' '.join(self._jobs.get(number).progress.split())}"
