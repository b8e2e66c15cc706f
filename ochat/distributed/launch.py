"""Start the processes of a run on this machine with torchrun's own agent, inside this process.

    exit_code = launch(["run.toml"], processes=8)
    exit_code = launch(["run.toml"], processes=8, nodes=2, node_rank=1, rendezvous="node1:29400")

A signal goes on to every process; each saves and stops by itself. The agent says nothing: the processes explain their
errors, and `complain` prints each error once a machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters, registry

from ochat.distributed.processes import START_S
from ochat.distributed.watchdog import SIGNALS
from ochat.errors import RanksError

log = logging.getLogger(__name__)

AGENT_SIGNALS = "SIGHUP,SIGQUIT"  # those that the agent answers itself, by ending all processes


def launch(
    arguments: Sequence[str], processes: int, *, nodes: int = 1, node_rank: int = 0, rendezvous: str = ""
) -> int:
    """Run `python -m ochat.train ARGUMENTS` in so many processes of this machine, one of `nodes`, of which each calls
    this with its own rank; `rendezvous`: HOST:PORT of the first. Returns the exit code: 0, that of the process that
    failed first, or 128 + the signal that stopped them.

    Raises: RanksError where the machines do not meet, or a process is ended without a word.
    """
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = AGENT_SIGNALS
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="ochat_") as folder:
        try:
            if nodes > 1:
                log.info(f"waiting at {rendezvous} until all {nodes} machines are there")
                socket.getaddrinfo(rendezvous.rpartition(":")[0], None)  # torch would try for minutes
            agent = _agent(arguments, processes, nodes, node_rank, rendezvous, folder)
            result: Any = agent.run()  # torch's decorators hide the type
            return _exit_code(result, agent.received)
        except SignalException as stopped:
            return 128 + stopped.sigval
        except (DistError, RendezvousError, TimeoutError, socket.gaierror) as error:
            raise RanksError(_not_met(nodes, node_rank, rendezvous, error)) from None


class _Agent(LocalElasticAgent):
    """torchrun's agent, except that it passes signals on and keeps watching: torchrun's would end the processes 30 s
    later, saved or not."""

    received: int | None = None  # the first signal

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, int] = super()._start_workers(worker_group)  # type: ignore[call-arg]

        def pass_on(number: int, _frame: FrameType | None) -> None:
            self.received = self.received or number
            for pid in pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        for number in SIGNALS:  # before, while machines wait for each other, each ends this process
            signal.signal(number, pass_on)
        return pids


def _agent(
    arguments: Sequence[str], processes: int, nodes: int, node_rank: int, rendezvous: str, folder: str
) -> _Agent:
    for number in SIGNALS:  # torch waits for the other machines in C++, where Python's Ctrl-C is not heard
        signal.signal(number, signal.SIG_DFL)
    host, _, port = rendezvous.rpartition(":")
    parameters = RendezvousParameters(
        "static" if nodes > 1 else "c10d", rendezvous or "localhost:0",
        uuid.uuid4().hex if nodes == 1 else "ochat", nodes, nodes, local_addr=None if nodes > 1 else "localhost",
        rank=node_rank, timeout=int(START_S),
    )  # fmt: skip
    spec = WorkerSpec(
        role="ochat",
        local_world_size=processes,
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        entrypoint=sys.executable,
        args=("-u", "-m", "ochat.train", *arguments),
        max_restarts=0,
        master_addr=host or None,
        master_port=int(port) if port else None,
    )
    return _Agent(spec, DefaultLogsSpecs(folder))


def _exit_code(result: RunResult, received: int | None) -> int:
    """Raises: RanksError for a process that another signal than ours ended, if no process says so."""
    failures = sorted(result.failures.items(), key=lambda failure: failure[1].timestamp)
    codes = [failure.exitcode for _, failure in failures]
    if received is not None and codes:
        return next((code for code in codes if 0 < code < 128), 128 + received)
    if RanksError.exit_code in codes or not codes or codes[0] > 0:
        return next((code for code in codes if code > 0), 0)
    rank, failure = failures[0]
    name = signal.Signals(-failure.exitcode).name
    why = ", as the system does where host memory is short (`dmesg` tells)" if name == "SIGKILL" else ""
    raise RanksError(
        f"rank {rank} (pid {failure.pid}) was ended by {name}{why}. Start the same command again: it continues from "
        "the newest checkpoint"
    )


def _not_met(nodes: int, node_rank: int, rendezvous: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if nodes == 1:
        return f"the processes could not be started: {reason}"
    return (
        f"--rendezvous {rendezvous}, --node-rank {node_rank} of {nodes}: the machines do not meet ({reason}). Start "
        f"the same command on each, with --node-rank 0 to {nodes - 1}; HOST is the machine of --node-rank 0, and its "
        "PORT is free and reached by the others"
    )
