"""Run functions on several ranks without starting processes each time: a pool of workers that lives as long as pytest.

    done = pool.run(2, "tests.pool:train", "config.toml", "--run.dir=runs/a");  done.returncode, done.stdout

Each worker gets the environment that torchrun would set, with a fresh port for every call; the function joins and
leaves the process group itself. A worker that exits is replaced. Tests of kills and launchers use torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

_workers: list[subprocess.Popen] = []


def run(processes: int, function: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Calls `function` ("module:name") with the arguments on ranks 0 to `processes` - 1.

    Returns the largest exit code (that of an OchatError or SystemExit; 1 for any other error, whose traceback is
    printed) and what the ranks printed, in their order. Raises: AssertionError if `check` and the code is not 0.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("", 0))
        common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": free.getsockname()[1], "GROUP_WORLD_SIZE": 1}
        workers, codes = _take(processes), []
        free.close()
        for rank, worker in enumerate(workers):
            environment = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            files = [f"{folder}/{name}{rank}" for name in ("out", "err")]
            job = {"environment": environment, "function": function, "arguments": arguments, "files": files}
            assert worker.stdin
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
        for worker in workers:
            assert worker.stdout
            line = worker.stdout.readline()
            codes.append(int(line) if line else worker.wait())
        printed = ["".join(Path(f"{folder}/{n}{r}").read_text() for r in range(processes)) for n in ("out", "err")]
    done = subprocess.CompletedProcess([function, *arguments], max(map(abs, codes)), *printed)
    if check and done.returncode:
        raise AssertionError(f"{function} ended with {codes}:\n{done.stdout}\n{done.stderr}")
    return done


def train(*arguments: str) -> None:
    """`ochat train` with these arguments, errors raised."""
    from ochat import config as configuration
    from ochat.console import configure_logging
    from ochat.train import trainer

    configure_logging()
    trainer.train(configuration.load(arguments[0], arguments[1:]))


def _take(count: int) -> list[subprocess.Popen]:
    """The first `count` workers; starts those that are missing or have exited."""
    for i in range(count):
        if i == len(_workers):
            _workers.append(_start())
        elif _workers[i].poll() is not None:
            _workers[i] = _start()
    return _workers[:count]


def _start() -> subprocess.Popen:
    command, environment = [sys.executable, "-m", "tests.pool"], os.environ | ENVIRONMENT
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@atexit.register
def _close() -> None:
    for worker in _workers:
        if worker.stdin:
            worker.stdin.close()  # its loop ends
    for worker in _workers:
        worker.wait()


def _work() -> None:
    """A worker: one JSON object a line in, one exit code a line out."""
    import torch

    torch.set_num_threads(1)
    answers, errors = os.fdopen(os.dup(1), "w"), os.dup(2)
    for line in sys.stdin:
        job = json.loads(line)
        os.environ.update(job["environment"])
        for descriptor, file in zip((1, 2), job["files"], strict=True):
            with open(file, "w") as output:
                os.dup2(output.fileno(), descriptor)
        code = _call(job["function"], job["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(errors, 2)
        answers.write(f"{code}\n")
        answers.flush()


def _call(function: str, arguments: list[str]) -> int:
    from ochat.console import complain
    from ochat.errors import OchatError

    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except (OchatError, OSError) as error:
        complain(error)
        return getattr(error, "exit_code", 1)
    except SystemExit as error:
        return int(error.code or 0)
    except Exception:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _work()
