"""Fork the tests' Ray workers from one process that has already imported the slow libraries.

A job starts half a dozen processes, and each takes seconds to import torch, transformers and pandas: on two cores, most
of the suite's time. Here one process imports them (all but Ray itself), and each worker is a fork of it. The fork then
runs Ray's own `default_worker.py` with the arguments, environment and streams that Ray has given it.

    python tests/warm_workers.py ARGUMENTS    started by Ray instead of its `setup_worker.py`; requests a fork
    python tests/warm_workers.py SOCKET       the process that forks; SOCKET is the descriptor of a listening socket
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import random
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_ADDRESS = "PERSONA_WARM_WORKERS"
_SETUP = str(Path(__file__).resolve())
# None of them starts a thread, which a fork would not have. Ray is not among them, because on import it reads the
# environment, which differs between workers.
_IMPORTS = (
    "aiohttp",
    "boto3",
    "deepspeed",
    "deltalake",
    "jsonschema",
    "pandas",
    "pyarrow.dataset",
    "requests",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.t5.modeling_t5",
)


@contextlib.contextmanager
def warm_workers() -> Iterator[int]:
    """Within the context, any Ray that this process or `ray_command` starts has forked workers.

    Yields the id of the process that forks them.
    """
    import pytest
    from ray._private import ray_constants

    if sys.platform != "linux":  # on other systems these libraries do not survive a fork
        yield os.getpid()
        return
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as folder:  # short: it is part of a socket path
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"{folder}/socket")
            listening.listen(128)
            number = listening.fileno()
            forked = subprocess.Popen([sys.executable, _SETUP, str(number)], pass_fds=[number])
        try:
            with pytest.MonkeyPatch.context() as change:
                change.setenv(_ADDRESS, f"{folder}/socket")
                # Ray joins it to one of its folders, which does not change an absolute path.
                change.setattr(ray_constants, "SETUP_WORKER_FILENAME", _SETUP)
                yield forked.pid
        finally:
            forked.kill()
            forked.wait()


def ray_command() -> list[str]:
    """The command `ray`, for nodes in separate processes."""
    change = f"from ray._private import ray_constants; ray_constants.SETUP_WORKER_FILENAME = {_SETUP!r}"
    return [sys.executable, "-c", f"{change}; from ray.scripts.scripts import main; main()"]


def request_fork(arguments: list[str]) -> None:
    """Have a worker forked, and exit when it does: Ray takes this process for the worker, and may kill it."""
    is_worker = any(argument.endswith("/default_worker.py") for argument in arguments)  # not the server for Ray clients
    if _ADDRESS not in os.environ or not is_worker:
        (ray,) = importlib.util.find_spec("ray").submodule_search_locations
        os.execv(sys.executable, [sys.executable, f"{ray}/_private/workers/setup_worker.py", *arguments])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[_ADDRESS])
        socket.send_fds(connection, [b"\n"], [0, 1, 2])
        connection.sendall(json.dumps([arguments, dict(os.environ)]).encode())
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


def serve(listening: socket.socket) -> NoReturn:
    """Fork a worker per request."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that ended workers leave no zombies
    imported = False
    while True:
        connection, _ = listening.accept()
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile("rb") as request:
            arguments, environment = json.load(request)
        if not imported:
            # Some libraries read the environment when they are imported, so it must be that of a worker.
            os.environ |= environment
            for module in _IMPORTS:
                importlib.import_module(module)
            gc.freeze()
            imported = True
        if os.fork() == 0:
            listening.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            become_worker(arguments, environment)
        for stream in streams:
            os.close(stream)
        connection.close()


def become_worker(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Do in this process what `setup_worker.py` and then `python default_worker.py` would do."""
    os.setpgrp()  # Ray kills a worker together with its process group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    known = argparse.ArgumentParser()
    known.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    known.add_argument("--language")
    parsed, worker = known.parse_known_args(arguments)
    context = parsed.serialized_runtime_env_context
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(context.get("env_vars", {}))
    if prefix := context.get("command_prefix"):
        cd, folder, _ = prefix  # `cd FOLDER &&`, for a working directory; the tests use no other prefix
        assert cd == "cd"
        os.chdir(*shlex.split(folder))
    random.seed()
    sys.argv = worker
    sys.path[:1] = [str(Path(worker[0]).parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    code = 1
    try:
        runpy.run_path(worker[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        serve(socket.socket(fileno=int(sys.argv[1])))
    else:
        request_fork(sys.argv[1:])
