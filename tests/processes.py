"""Processes that begin with the package imported: forks of one that did so once, where each alone would take seconds of a processor.

They end as any interpreter does (those of `multiprocessing` leave by `os._exit`), and hold no thread and no device of the tests' own
process. All have the same seed of hashes: where two are to agree, let one of them be a process of its own.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


# A child leaves the loop and becomes the program. Settings that a library reads when it is imported are those of this process.
SERVER = """
import json, os, sys
import accelerate, torch.distributed, transformers_sslam
for line in sys.stdin:
    request = json.loads(line)
    if "ended" in request:
        pid, status = os.waitpid(request["ended"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
for descriptor, path in ((1, request["log"]), (2, request["errors"])):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = request["words"]
sys.path[0] = os.path.dirname(sys.argv[0])
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


class Fork:
    """What `subprocess.Popen` would be for `python words...`. What it prints is appended to the file `log`, and to `errors` where given."""

    def __init__(self, words: list, log: Path, environment: dict[str, str] | None = None, errors: Path | None = None) -> None:
        log.touch()
        request = {"words": [str(word) for word in words], "log": str(log), "errors": str(errors or log)}
        self.pid = _ask(**request, environment=dict(os.environ if environment is None else environment))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(ended=self.pid)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 500) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode


def run_on_two(words: list, log: Path, environment: dict[str, str]) -> None:
    """Run a program to its end on two processes that know of each other, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = Fork(words, log, {**environment, "RANK": "0", "LOCAL_RANK": "0"})
    with open(log, "a") as file:  # not a fork: its seed of hashes is another one
        second = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env={**environment, "RANK": "1", "LOCAL_RANK": "1"})
    end = time.monotonic() + 300
    while None in (codes := (first.poll(), second.poll())) and not any(codes) and time.monotonic() < end:
        time.sleep(0.02)
    first.kill()  # does nothing where it has ended; the other would wait for one that failed
    second.kill()
    assert codes == (0, 0), log.read_text()[-3000:]


@functools.cache
def _server() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # with more, a fork could wait for threads that it does not have
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(**request):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of forks has ended: what it printed stands above"
    return json.loads(answer)
