"""Processes that begin with the package imported: forks of one that did so once, where each alone would take seconds of a processor.

They end as any interpreter does (those of `multiprocessing` leave by `os._exit`), and hold no thread and no device of the tests' own
process. They have the seed of hashes of what they are forks of, of which there are two: where two processes are to agree, let one have
`other_hashes`.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


# A child leaves the loop and becomes the program. Settings that a library reads when it is imported are those of this process, but for the
# folder of `datasets`. What is imported here is garbage in no fork: a fork that looked through all of it would take seconds to end.
SERVER = """
import gc, json, os, runpy, sys
import accelerate, datasets, soundfile, torch.distributed
import transformers_sslam.finetuning.run, transformers_sslam.pretraining.loop
os.fsync = os.fstat  # as in conftest.py
assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of the other threads"
gc.collect()
gc.freeze()
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
datasets.config.HF_DATASETS_CACHE = os.environ.get("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
sys.argv = request["words"]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    sys.exit()
sys.path[0] = os.path.dirname(sys.argv[0])
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


class Fork:
    """What `subprocess.Popen` would be for `python words...`. What it prints is appended to the file `log`, and to `errors` where given."""

    def __init__(
        self, words: list, log: Path, environment: dict[str, str] | None = None, errors: Path | None = None, other_hashes: bool = False
    ) -> None:
        log.touch()
        request = {"words": [str(word) for word in words], "log": str(log), "errors": str(errors or log)}
        self.server = _server(other_hashes)
        self.pid = _ask(self.server, **request, environment=dict(os.environ if environment is None else environment))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self.server, ended=self.pid)
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


def kill_with_all_it_started(process: subprocess.Popen | Fork) -> None:
    """`kill -9` of a program, its ranks and their readers. (torchrun gives each rank a session of its own.)"""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family)


def run_on_two(words: list, log: Path, environment: dict[str, str]) -> None:
    """Run a program to its end on two processes that know of each other, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first = Fork(words, log, {**environment, "RANK": "0", "LOCAL_RANK": "0"})
    second = Fork(words, log, {**environment, "RANK": "1", "LOCAL_RANK": "1"}, other_hashes=True)
    end = time.monotonic() + 300
    while None in (codes := (first.poll(), second.poll())) and not any(codes) and time.monotonic() < end:
        time.sleep(0.02)
    first.kill()  # does nothing where it has ended; the other would wait for one that failed
    second.kill()
    assert codes == (0, 0), log.read_text()[-3000:]


@functools.cache
def _server(other_hashes: bool) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",  # with more, a fork could wait for threads that it does not have
        "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow
        "PYTHONHASHSEED": "random",  # each server draws its own
    }
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(server: subprocess.Popen, **request):
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the server of forks has ended: what it printed stands above"
    return json.loads(answer)
