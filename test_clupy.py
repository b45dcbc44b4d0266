"""The stories that CluPy promises, told with real processes on free ports.

A `Cluster` starts a master and servers as a user would, each in a folder of its own, and ends them whatever happens.
Scripts run as programs of their own, because that is what users write.  After every test nothing may be left behind.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import clupy
import clupy_master

PATIENCE = 30                                     # seconds until a condition counts as never met
SECRET = "a secret that only the tests know"
HERE = os.path.dirname(os.path.abspath(__file__))


# ==== What the stories are told with =========================================

def until(condition, patience=PATIENCE):
    """The first true value of condition(); fails after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    pytest.fail(f"not within {patience} s: {condition}")


def processes():
    """{pid: (parent, group, command)} of every process that is not a zombie."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            with open(f"/proc/{name}/cmdline") as file:
                command = file.read().replace("\0", " ")
            if fields[0] != "Z":
                found[int(name)] = int(fields[1]), int(fields[2]), command
    return found


def workers():
    """The pids of all workers on this machine."""
    return {pid for pid, (_, _, command) in processes().items() if "from clupy_server import work" in command}


def environ(**more):
    """The environment of a process of the tests: of CLUPY_* variables only those named."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CLUPY_")}
    return {**clean, "CLUPY_SECRET": SECRET, "PYTHONPATH": HERE, "PYTHONUNBUFFERED": "1",
            **{name: str(value) for name, value in more.items()}}


class Program:
    """A process with its output in files; ended at the end of the with-block."""

    def __init__(self, folder, *command, stdin=subprocess.DEVNULL, **env):
        folder.mkdir(parents=True, exist_ok=True)
        self.out, self.err = folder / "stdout", folder / "stderr"
        with open(self.out, "ab") as out, open(self.err, "ab") as err:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=folder, env=environ(**env),
                                            stdin=stdin, stdout=out, stderr=err)

    @property
    def log(self):
        return self.err.read_text(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def run_script(folder, text, timeout=60, check=True, args=(), **env):
    """Run a program of a user's and return its subprocess.CompletedProcess, with output as text."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.py"
    script.write_text(textwrap.dedent(text))
    done = subprocess.run([sys.executable, script.name, *args], cwd=folder, env=environ(**env), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


class Cluster:
    """A master and servers in folders of their own; a client in this process is told their address by the tests."""

    def __init__(self, folder, servers=1, slots=2, **options):
        self.folder, self.options, self.slots = folder, options, slots
        self.servers = []
        self._stack = contextlib.ExitStack()
        self.master = self.start_master(f"127.0.0.1:{free_port()}")
        for _ in range(servers):
            self.add_server()
        until(lambda: len(self.status()["servers"]) == servers)

    def start_master(self, listen):
        self.address = listen
        program = self._stack.enter_context(Program(self.folder / "master", "-m", "clupy", "master", "--listen", listen))
        until(lambda: "master listens" in program.log or program.process.poll() is not None)
        assert program.process.poll() is None, program.log
        return program

    def add_server(self, *arguments, **env):
        host, port = self.address.split(":")
        folder = self.folder / f"server{len(self.servers)}"
        program = Program(folder, "-m", "clupy", "serve", "--master", host, "--port", port, "--listen", "127.0.0.1:0",
                          "--slots", self.slots, *arguments, **self.options, **env)
        self.servers.append(self._stack.enter_context(program))
        return program

    def status(self):
        done = subprocess.run([sys.executable, "-m", "clupy", "status", "--master", self.address, "--json"],
                              cwd=self.folder, env=environ(), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()
        if error[0]:
            for program in [self.master, *self.servers]:
                print(program.out.parent.name, program.log, sep=":\n")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def left_behind():
    """What a test must not leave: children, threads, descriptors, temporary files."""
    children = {pid for pid, (parent, _, _) in processes().items() if parent == os.getpid()}
    names = {thread.name for thread in threading.enumerate() if not thread.name.startswith("clupy-job")}
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}").split(":")[0]
    return children | workers(), names, sum(kind in ("socket", "pipe", "anon_inode") for kind in descriptors.values())


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """The frame of every test: an environment without CluPy's variables, and nothing left when it is over."""
    for name in [name for name in os.environ if name.startswith("CLUPY_") and name != "CLUPY_TEST_SERVICES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLUPY_SECRET", SECRET)
    monkeypatch.setenv("CLUPY_PORT", str(free_port()))      # so that no master of the machine's user is found
    monkeypatch.setenv("PYTHONPATH", HERE)
    monkeypatch.chdir(tmp_path)
    before = left_behind()
    yield
    clupy.close()
    deadline = time.monotonic() + 10
    while (now := left_behind()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path) as it:
        yield it


# ==== On one machine, without set-up =========================================

def square(x):
    return x * x


def test_a_call_runs_in_a_worker_process_without_any_set_up():
    future = clupy.parallel(os.getpid)()
    assert future.result(PATIENCE) != os.getpid()


def test_many_calls_each_give_their_own_result():
    square_in_cluster = clupy.parallel(square)
    results = [square_in_cluster(n) for n in range(5000)]
    assert clupy.wait_all(results, time_out=PATIENCE)
    assert [r.value for r in results] == [n * n for n in range(5000)]
    assert all(r.successful and r.completed and r.failure is None for r in results)


def test_the_main_example_runs_unchanged_with_and_without_a_cluster(tmp_path, cluster):
    with open(os.path.join(HERE, "examples", "primes.py")) as file:
        text = file.read()
    alone = run_script(tmp_path / "alone", text, CLUPY_PORT=free_port()).stdout.splitlines()
    together = run_script(tmp_path / "client", text, CLUPY_MASTER=cluster.address).stdout.splitlines()
    assert alone[:-1] == together[:-1]
    assert "198 2 3 11" in alone and "199" in alone
    assert alone[-1].startswith("100 calls ran in")


# ==== The wire: bytes by hand ================================================

def feed(frames, data, step):
    messages = []
    while data:
        space = frames.space()
        count = min(step, len(space), len(data))
        space[:count] = data[:count]
        messages += frames.filled(count)
        data = data[count:]
    return messages


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_frames_are_cut_the_same_however_the_bytes_arrive(step):
    size = 2000 if step < 10 else 700_000
    import pickle
    sent = [("a", 1, None), ("b", "x" * size), ("c", b"payload", pickle.PickleBuffer(bytearray(b"y" * size))), ("d",)]
    data = b"proof" + b"".join(bytes(part) for message in sent for part in clupy.encode(message))
    received = feed(clupy.Frames(b"proof"), data, step)
    assert received[:2] == sent[:2] and received[3] == ("d",)
    assert bytes(received[2][2]) == b"y" * size


def test_a_frame_that_is_too_large_is_refused_before_memory_is_spent():
    with pytest.raises(clupy.ProtocolError, match="over the limit"):
        feed(clupy.Frames(limit=1000), struct.pack(">QI", 1 << 50, 0), 12)
    with pytest.raises(clupy.ProtocolError, match="over the limit"):
        feed(clupy.Frames(limit=1000), struct.pack(">QIQ", 10, 1, 1 << 50), 20)


def test_a_message_never_runs_code():
    import pickle
    body = pickle.dumps(("kind", os.system))
    with pytest.raises(clupy.ProtocolError, match="plain values"):
        clupy.decode(body)
    with pytest.raises(clupy.ProtocolError, match="no message"):
        clupy.decode(b"rubbish")


def test_a_wrong_proof_is_refused_before_any_frame_is_read():
    with pytest.raises(clupy.ProtocolError, match="slot's key"):
        feed(clupy.Frames(b"right"), b"wrong", 5)
