"""The stories that CluPy promises, told with real processes on free ports.

A `Cluster` starts a master and servers as a user would, each in a folder of its own, and ends them whatever happens.
Scripts run as programs of their own, because that is what users write.  After every test nothing may be left behind.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.machinery
import importlib.resources
import importlib.util
import json
import linecache
import os
import pickle
import pkgutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import types

import cloudpickle
import pytest

import clupy
import clupy_master

PATIENCE = 30                                     # seconds until a condition counts as never met
SECRET = "a secret that only the tests know"
HERE = os.path.dirname(os.path.abspath(__file__))
MARK = f"TEST_RUN={os.getpid()}"                  # in the environment of every process that this run starts


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
    """{pid: command} of every process of this test run that is not a zombie, but for this one."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/environ") as environ, open(f"/proc/{name}/cmdline") as command:
                if MARK in environ.read().split("\0") and int(name) != os.getpid():
                    found[int(name)] = command.read().replace("\0", " ")
    return found


def workers():
    """The pids of all workers of this test run."""
    return {pid for pid, command in processes().items() if "from clupy_server import work" in command}


def environ(**more):
    """The environment of a process of the tests: of CLUPY_* variables only those named."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("CLUPY_") and name != "PYTHONDONTWRITEBYTECODE"}      # compiled once, not per process
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
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            self.master = self.start_master(f"127.0.0.1:{free_port()}")
            for _ in range(servers):
                self.add_server()
            until(lambda: len(self.status()["servers"]) == servers)
            undo.pop_all()

    def start_master(self, listen):
        self.address = listen
        program = self._stack.enter_context(Program(self.folder / "master", "-m", "clupy", "master", "--listen", listen,
                                                    **self.options))
        until(lambda: answers(listen) or program.process.poll() is not None)
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
                              cwd=self.folder, env=environ(**self.options), capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()
        if error[0]:
            for program in [self.master, *self.servers]:
                print(program.out.parent.name, program.log, sep=":\n")


def answers(address):
    """Whether something listens there."""
    host, port = address.split(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def left_behind():
    """What a test must not leave: children, threads, descriptors, temporary files."""
    names = {thread.name for thread in threading.enumerate() if not thread.name.startswith("clupy-job")}
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors[name] = os.readlink(f"/proc/self/fd/{name}").split(":")[0]
    return processes(), names, sum(kind in ("socket", "pipe", "anon_inode") for kind in descriptors.values())


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """The frame of every test: an environment without CluPy's variables, and nothing left when it is over."""
    for name in [name for name in os.environ if name.startswith("CLUPY_") and name != "CLUPY_TEST_SERVICES"]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("CLUPY_SECRET", SECRET)
    monkeypatch.setenv(*MARK.split("="))
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


# ==== Futures, map, Executor: as concurrent.futures ==========================

def sleepy(seconds, value=None):
    time.sleep(seconds)
    return value


def fails(text):
    raise ValueError(text)


def test_an_exception_of_the_function_is_the_outcome_and_is_not_retried(tmp_path):
    def count_and_fail(path):
        with open(path, "a") as file:
            file.write("x")
        raise KeyError("why", 7)
    future = clupy.parallel(count_and_fail)(str(tmp_path / "count"))
    with pytest.raises(KeyError) as caught:
        future.result(PATIENCE)
    assert caught.value.args == ("why", 7) and type(future.failure) is KeyError and future.value is None
    assert not future.successful and (tmp_path / "count").read_text() == "x"


def test_one_argument_that_cannot_be_pickled_spoils_one_result():
    results = [clupy.parallel(square)(x) for x in (1, threading.Lock(), 3)]
    assert clupy.wait_all(results, time_out=PATIENCE)
    assert [r.value for r in results] == [1, None, 9]
    assert "lock" in str(results[1].failure)


def test_arguments_are_those_of_the_time_of_the_call():
    numbers = [1, 2, 3]
    future = clupy.parallel(sum)(numbers)
    numbers.clear()
    assert future.result(PATIENCE) == 6


def test_handlers_run_before_waiting_ends_and_may_make_calls():
    seen = []

    def handler(value):
        time.sleep(0.2)
        seen.append(clupy.parallel(square)(value).result(PATIENCE))
    results = [clupy.parallel(square)(n).succeed(handler).fail(seen.append) for n in range(4)]
    assert clupy.wait_all(results, time_out=PATIENCE)
    assert sorted(seen) == [n ** 4 for n in range(4)]
    failed = clupy.parallel(fails)("on purpose").succeed(seen.append).fail(lambda error: seen.append(str(error)))
    assert failed.wait(timeout=PATIENCE) and seen[-1] == "on purpose"
    late = results[0].succeed(lambda value: seen.append("late"))
    assert late.wait("5s") and seen[-1] == "late"


def test_an_exception_in_a_handler_is_logged_and_hurts_nobody(caplog):
    future = clupy.parallel(square)(2).succeed(lambda value: 1 / 0)
    assert future.wait(PATIENCE) and future.value == 4
    assert "ZeroDivisionError" in caplog.text


def test_waiting_ends_in_time_when_the_call_does_not():
    future = clupy.parallel(sleepy)(60)
    assert not future.wait(0.1) and not clupy.wait_all([future], time_out=0.1)
    with pytest.raises(TimeoutError):
        future.result(0.1)
    with pytest.raises(TimeoutError):
        list(clupy.as_completed([future], time_out=0.1))
    assert future.cancel()


def test_as_completed_gives_the_fast_ones_first():
    slow, fast = clupy.parallel(sleepy)(1.0, "slow"), clupy.parallel(sleepy)(0.0, "fast")
    assert [f.value for f in clupy.as_completed([slow, fast], time_out=PATIENCE)] == ["fast", "slow"]


def test_map_is_ordered_lazy_and_takes_endless_input():
    def endless():
        n = 0
        while True:
            taken.append(n)
            yield n
            n += 1
    taken = []
    squares = clupy.map(square, endless())
    assert [next(squares) for _ in range(1000)] == [n * n for n in range(1000)]
    assert len(taken) < 1000 + 2 * clupy.MAP_AHEAD
    squares.close()
    assert list(clupy.map(pow, range(10), [2] * 7, chunk_size=3)) == [n * n for n in range(7)]
    assert list(clupy.map(square, [])) == []


def test_map_raises_where_the_failing_item_is():
    items = clupy.map(lambda n: 10 // n, [5, 2, 0, 1])
    assert [next(items), next(items)] == [2, 5]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_executor_gives_the_same_answers_as_a_process_pool():
    def story(executor):
        with executor:
            a = [f.result(PATIENCE) for f in [executor.submit(pow, n, 3) for n in range(50)]]
            b = list(executor.map(pow, range(20), range(20), chunksize=4))
            failed = executor.submit(int, "x")
            done, rest = concurrent.futures.wait([executor.submit(abs, -n) for n in range(9)], timeout=PATIENCE)
            error = failed.exception(PATIENCE)
            return a, b, type(error), error.args, sorted(f.result() for f in done), len(rest)
    assert story(clupy.Executor(2)) == story(concurrent.futures.ProcessPoolExecutor(2))


def test_an_executor_gets_as_many_workers_as_it_asks_for_on_the_embedded_cluster():
    with clupy.Executor(max_workers=5) as executor:
        begun = time.monotonic()
        pids = {f.result(PATIENCE) for f in [executor.submit(sleepy_pid, 0.5) for _ in range(5)]}
    assert len(pids) == 5 and time.monotonic() - begun < PATIENCE


def sleepy_pid(seconds):
    time.sleep(seconds)
    return os.getpid()


def remember(value):
    import builtins
    builtins.remembered = value


def recall():
    import builtins
    return builtins.remembered


def test_an_initializer_runs_once_in_every_worker_and_its_failure_breaks_the_executor():
    with clupy.Executor(2, initializer=remember, initargs=("this",)) as executor:
        assert {f.result(PATIENCE) for f in [executor.submit(recall) for _ in range(20)]} == {"this"}
    with clupy.Executor(2, initializer=fails, initargs=("no database",)) as executor:
        with pytest.raises(concurrent.futures.BrokenExecutor) as caught:
            executor.submit(square, 2).result(PATIENCE)
    assert "no database" in repr(caught.value.__cause__)


def test_max_bounds_how_many_calls_run_at_once(tmp_path):
    def overlap(folder):
        mine = os.path.join(folder, str(os.getpid()))
        with open(mine, "w"):
            time.sleep(0.02)
            together = len(os.listdir(folder))
        os.unlink(mine)
        return together
    folder = tmp_path / "running"
    folder.mkdir()
    one = [clupy.parallel(overlap, max=1)(str(folder)) for _ in range(20)]
    assert clupy.wait_all(one, PATIENCE) and {f.value for f in one} == {1}
    two = [clupy.parallel(overlap)(str(folder)) for _ in range(20)]
    assert clupy.wait_all(two, PATIENCE) and 2 in {f.value for f in two}


def test_a_future_can_be_awaited_and_the_executor_used_from_asyncio():
    async def story():
        loop = asyncio.get_running_loop()
        with clupy.Executor() as executor:
            other = loop.run_in_executor(executor, square, 5)
            return await clupy.parallel(square)(4), await other, await asyncio.gather(*[
                clupy.parallel(square)(n) for n in range(20)])
    assert asyncio.run(story()) == (16, 25, [n * n for n in range(20)])


def test_a_coroutine_function_runs_to_its_result():
    async def slowly(n):
        await asyncio.sleep(0.01)
        return n + 1
    assert clupy.parallel(slowly)(41).result(PATIENCE) == 42


def test_large_arguments_and_results_arrive_whole_and_unshared():
    import numpy
    array = numpy.arange(3_000_000, dtype=float)
    doubled = clupy.parallel(lambda a: a * 2)(array)
    array[:] = 0
    result = doubled.result(PATIENCE)
    assert result[-1] == 2 * 2_999_999 and result.sum() == 3_000_000 * 2_999_999
    result[0] = 5
    data = bytes(range(256)) * 40_000
    assert clupy.parallel(lambda b: b[::-1])(data).result(PATIENCE) == data[::-1]


# ==== A cluster of several processes =========================================

CALLS = """
    import os, sys, time, clupy
    def work(n):
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.02)
        return n, os.getpid()
    if __name__ == "__main__":
        seconds = float(sys.argv[1])
        clupy.connect()
        begun, done, pids = time.time(), 0, []
        while time.time() - begun < seconds:
            results = [clupy.parallel(work)(n) for n in range(40)]
            assert clupy.wait_all(results, time_out=60)
            assert [r.value[0] for r in results] == list(range(40))
            done += 40
            pids += [r.value[1] for r in results]
        print(done, len(set(pids)))
"""


@pytest.mark.parametrize("how", ["yaml", "environment", "argument"])
def test_clients_find_the_cluster_by_yaml_environment_or_argument(tmp_path, how):
    with Cluster(tmp_path, servers=2, slots=1) as cluster:
        folder, env, argument = tmp_path / "client", {}, ""
        folder.mkdir()
        if how == "yaml":
            (folder / "clupy.client.yaml").write_text(f"master: {cluster.address}\n")
        elif how == "environment":
            env["CLUPY_MASTER"] = cluster.address
        else:
            argument = repr(cluster.address)
        done = run_script(folder, f"""
            import os, time, clupy
            def work(n):
                time.sleep(0.05)
                return os.getppid()
            clupy.connect({argument})
            results = [clupy.parallel(work)(n) for n in range(20)]
            assert clupy.wait_all(results, 30)
            print(*sorted({{r.value for r in results}}))
            """, **env)
        assert done.stdout.split() == sorted(str(server.process.pid) for server in cluster.servers)


def test_status_shows_servers_slots_and_clients(cluster):
    clupy.connect(cluster.address)
    future = clupy.parallel(sleepy)(2)
    tables = until(lambda: (t := cluster.status()) and sum(s["used"] for s in t["servers"].values()) and t)
    server, = tables["servers"].values()
    client, = tables["clients"].values()
    assert server["slots"] == 2 and client["share"] >= 1 and not server["draining"]
    text = subprocess.run([sys.executable, "-m", "clupy", "status", "--master", cluster.address], env=environ(),
                          capture_output=True, text=True).stdout
    assert "SERVER" in text and "CLIENT" in text and "ready" in text
    assert future.cancel()


def test_killing_a_server_in_the_middle_changes_nothing_in_the_results(tmp_path):
    with Cluster(tmp_path, servers=2) as cluster:
        clupy.connect(cluster.address)
        results = [clupy.parallel(sleepy)(0.05, n) for n in range(100)]
        until(lambda: results[10].completed)
        cluster.servers[0].process.kill()
        assert clupy.wait_all(results, time_out=PATIENCE)
        assert [r.value for r in results] == list(range(100))


def test_two_clients_share_the_slots_and_the_one_left_gets_all(tmp_path, cluster):
    both = [Program(tmp_path / f"client{n}", "-c", textwrap.dedent(CALLS), seconds, CLUPY_MASTER=cluster.address)
            for n, seconds in enumerate((1.5, 4))]
    with both[0] as first, both[1] as second:
        until(lambda: [c["share"] for c in cluster.status()["clients"].values()] == [1, 1])
        assert first.process.wait(PATIENCE) == 0, first.log
        until(lambda: [c["share"] for c in cluster.status()["clients"].values()] == [2])
        assert second.process.wait(PATIENCE) == 0, second.log


def test_ten_clients_on_two_slots_all_get_turns(tmp_path, cluster):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Program(tmp_path / f"client{n}", "-c", textwrap.dedent(CALLS), 0.1, 0.01,
                                               CLUPY_MASTER=cluster.address)) for n in range(10)]
        assert [client.process.wait(90) for client in clients] == [0] * 10


def test_an_edited_function_runs_as_edited_in_the_next_run(tmp_path, cluster):
    text = "import clupy\ndef f(x):\n    return x + {}\nprint(clupy.parallel(f)(1).result(30))"
    outputs = [run_script(tmp_path / "client", text.format(n), CLUPY_MASTER=cluster.address).stdout for n in (1, 10)]
    assert outputs == ["2\n", "11\n"]


def test_sigterm_drains_a_server_and_a_second_one_ends_it(tmp_path, cluster):
    clupy.connect(cluster.address)
    future = clupy.parallel(sleepy)(1.5, "done")
    until(lambda: future.running())
    server = cluster.servers[0].process
    server.terminate()
    assert future.result(PATIENCE) == "done"
    assert server.wait(PATIENCE) == 0
    stuck = cluster.add_server()
    until(lambda: len(cluster.status()["servers"]) == 1)
    long = clupy.parallel(sleepy, retries=0)(60)
    until(lambda: long.running())
    stuck.process.terminate()
    until(lambda: "draining" in stuck.log)
    stuck.process.terminate()
    assert stuck.process.wait(PATIENCE) == 0
    with pytest.raises(clupy.WorkerDied):
        long.result(PATIENCE)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_their_server_whatever_they_do(tmp_path, end):
    hold_the_gil = "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address)
        calls = [clupy.parallel(exec, retries=0)(hold_the_gil), clupy.parallel(os.fork)()]
        until(lambda: calls[0].running())
        time.sleep(0.3)
        before = workers()
        cluster.servers[0].process.send_signal(end)
        if end == signal.SIGTERM:
            until(lambda: "draining" in cluster.servers[0].log)
            cluster.servers[0].process.send_signal(end)
        until(lambda: not before & workers())
        clupy.close()


# ---- The secret, versions, strangers

def talk(address, data, seconds=8):
    """What a stranger gets who sends these bytes, and after how many seconds the connection is closed."""
    host, port = address.split(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=seconds) as sock:
        sock.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(4096):
                received += part
    return received, time.monotonic() - begun


STRANGERS = {"nothing": b"", "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "garbage": os.urandom(4000),
             "half": b"clupy\x01M\0", "version": b"clupy\x63M\0", "no proof": b"clupy\x01C\0" + b"x" * 32,
             "forged slot": b"clupy\x01S\0" + b"x" * 57, "pickle": pickle.dumps(os.system)}


def test_strangers_are_refused_within_five_seconds_and_with_one_line_each(cluster):
    clupy.connect(cluster.address)
    server = next(iter(cluster.status()["servers"].values()))["address"].replace("the master", "127.0.0.1")
    before = {program: program.log.count(" refused ") for program in (cluster.master, cluster.servers[0])}
    with concurrent.futures.ThreadPoolExecutor(2 * len(STRANGERS)) as pool:
        talks = {(kind, address): pool.submit(talk, address, data)
                 for kind, data in STRANGERS.items() for address in (cluster.address, server)}
        assert clupy.parallel(square)(3).result(PATIENCE) == 9          # meanwhile the service is unharmed
        for kind, future in talks.items():
            received, seconds = future.result()
            assert seconds < clupy.HANDSHAKE_TIME + 3 and len(received) <= 8 + 32 + 32, kind
    for program in (cluster.master, cluster.servers[0]):
        until(lambda program=program: program.log.count(" refused ") == before[program] + len(STRANGERS))
    assert clupy.parallel(square)(4).result(PATIENCE) == 16


def test_a_wrong_or_missing_secret_is_refused_with_what_to_do(tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("CLUPY_SECRET", "wrong wrong wrong wrong")
    with pytest.raises(clupy.SecretError, match="another secret"):
        clupy.connect(cluster.address)
    monkeypatch.delenv("CLUPY_SECRET")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(clupy.SecretError, match="no secret.*copy"):
        clupy.connect(cluster.address)
    (tmp_path / ".clupy").mkdir()
    (tmp_path / ".clupy" / "secret").write_text(SECRET)
    (tmp_path / ".clupy" / "secret").chmod(0o644)
    with pytest.raises(clupy.SecretError, match="chmod 600"):
        clupy.connect(cluster.address)
    (tmp_path / ".clupy" / "secret").chmod(0o600)
    clupy.connect(cluster.address)
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_the_first_master_makes_the_secret_and_one_machine_needs_no_set_up(tmp_path):
    env = {"HOME": tmp_path / "home", "CLUPY_SECRET": ""}
    address = f"127.0.0.1:{free_port()}"
    with Program(tmp_path / "master", "-m", "clupy", "master", "--listen", address, **env) as master:
        until(lambda: "master listens" in master.log)
        secret = tmp_path / "home" / ".clupy" / "secret"
        assert secret.stat().st_mode & 0o777 == 0o600 and len(secret.read_text().strip()) == 64
        with Program(tmp_path / "server", "-m", "clupy", "serve", "--port", address.split(":")[1], **env):
            text = "import clupy\nprint(clupy.parallel(pow)(2, 10).result(30))"
            assert run_script(tmp_path / "client", text, **env, CLUPY_PORT=address.split(":")[1]).stdout == "1024\n"


def test_a_worker_never_has_the_secret(cluster):
    clupy.connect(cluster.address)
    assert "CLUPY_SECRET" not in clupy.parallel(lambda: dict(os.environ))().result(PATIENCE)


def test_another_python_version_is_refused_on_both_sides(cluster, monkeypatch):
    monkeypatch.setattr(clupy, "PYTHON", (3, 99))
    with pytest.raises(clupy.VersionMismatch, match="3.99.*3[.]1"):
        clupy.connect(cluster.address)
    until(lambda: "3.99" in cluster.master.log)


def test_everything_travels_under_tls_where_a_certificate_is_configured(tmp_path):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=clupy",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"],
                   check=True, capture_output=True, cwd=tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths = {"CLUPY_TLS_CERT": cert, "CLUPY_TLS_KEY": key, "CLUPY_TLS_CA": cert}
    with Cluster(tmp_path, **paths) as cluster:
        clupy.connect(cluster.address, tls_ca=str(tmp_path / "cert.pem"))
        results = [clupy.parallel(square)(n) for n in range(500)]
        assert clupy.wait_all(results, PATIENCE) and [r.value for r in results] == [n * n for n in range(500)]
        data = os.urandom(5_000_000)
        assert clupy.parallel(lambda data: data[::-1])(data).result(PATIENCE) == data[::-1]
        clupy.close()
        with pytest.raises(clupy.MasterUnreachable):
            clupy.connect(cluster.address, patience=1)          # without TLS


def test_importing_clupy_is_light_and_the_command_does_not_load_it_twice(tmp_path):
    done = run_script(tmp_path, """
        import sys, clupy
        heavy = "asyncio redis kazoo yaml cloudpickle ssl".split()
        print([name for name in heavy if name in sys.modules])
        """)
    assert done.stdout == "[]\n"
    loaded = subprocess.run([sys.executable, "-X", "importtime", "-m", "clupy", "--version"], env=environ(),
                            capture_output=True, text=True, check=True)
    assert loaded.stdout.startswith("clupy ") and len([x for x in loaded.stderr.splitlines() if x.endswith("| clupy")]) == 1


# ---- Configuration

def test_settings_come_from_yaml_then_environment_then_arguments(tmp_path, monkeypatch):
    assert clupy.read_settings("server").slots == os.cpu_count()
    (tmp_path / "clupy.server.yaml").write_text("slots: 3\ndrain_time: 2m\nmemory_limit: 1.5GB\n")
    settings = clupy.read_settings("server")
    assert (settings.slots, settings.drain_time, settings.memory_limit) == (3, 120.0, 3 * 2**29)
    monkeypatch.setenv("CLUPY_SLOTS", "4")
    assert clupy.read_settings("server").slots == 4
    assert clupy.read_settings("server", slots=5).slots == 5


@pytest.mark.parametrize("text, message", [
    ("slots: 2\nslotz: 3\n", "clupy.server.yaml, line 2: unknown setting 'slotz'; did you mean 'slots'?"),
    ("slots: many\n", "line 1: slots is 'many', but must be a whole number"),
    ("drain_time: soon\n", "must be a duration"),
    ("- slots\n", "must hold lines of `key: value`"),
    ("a: [", "not YAML"),
])
def test_a_wrong_setting_is_refused_with_file_line_and_the_nearest_valid_one(tmp_path, text, message):
    (tmp_path / "clupy.server.yaml").write_text(text)
    with pytest.raises(clupy.ConfigurationError) as caught:
        clupy.read_settings("server")
    assert message in str(caught.value)


def test_passwords_do_not_show():
    settings = clupy.read_settings("client", redis="redis://:secret-word@host:6379/0")
    assert "secret-word" not in repr(settings) and "host:6379" in repr(settings)


# ---- Shares: tables and a clock by hand

def row(wanted, since=0.0, unreachable=(), **share):
    return clupy_master.ClientRow(wanted=wanted, since=since, heard=100.0, unreachable=frozenset(unreachable), share=share)


def server_row(slots, **state):
    return clupy_master.ServerRow(("h", 1), slots, {}, state)


def totals(shares):
    return {id: sum(share.values()) for id, share in shares.items()}


def test_shares_are_max_min_fair():
    servers = {"s1": server_row(4), "s2": server_row(4)}
    clients = {"small": row(1), "big": row(100), "bigger": row(1000)}
    assert totals(clupy_master.shares(servers, clients, 100.0)) in (
        {"small": 1, "big": 4, "bigger": 3}, {"small": 1, "big": 3, "bigger": 4})


def test_shares_move_as_little_as_possible():
    servers = {"s1": server_row(2), "s2": server_row(2)}
    shares = clupy_master.shares(servers, {"old": row(9, s1=2, s2=2), "new": row(9)}, 100.0)
    assert totals(shares) == {"old": 2, "new": 2}
    again = clupy_master.shares(servers, {id: row(9, **share) for id, share in shares.items()}, 100.0)
    assert again == shares


def test_idle_slots_stay_with_who_has_them_until_somebody_wants_them():
    servers = {"s1": server_row(4)}
    assert clupy_master.shares(servers, {"idle": row(0, s1=4)}, 100.0) == {"idle": {"s1": 4}}
    both = {"idle": row(0, s1=4), "new": row(3)}
    assert clupy_master.shares(servers, both, 100.0) == {"idle": {"s1": 1}, "new": {"s1": 3}}
    assert clupy_master.shares(servers, {"idle": row(0, s1=4)}, 1000.0) == {"idle": {}}


def test_slots_pass_on_in_turn_when_there_are_more_clients_than_slots():
    servers, clients, had = {"s1": server_row(2)}, {str(n): row(5, since=0.0) for n in range(5)}, {}
    for tick in range(60):
        now = tick / 2
        for id, share in clupy_master.shares(servers, clients, now).items():
            if bool(share) != bool(clients[id].share):
                clients[id].since = now
            clients[id].share = share
            had[id] = had.get(id, 0) + sum(share.values())
    assert sum(had.values()) == 120 and min(had.values()) >= 18


def test_draining_and_unreachable_servers_are_in_no_share():
    servers = {"s1": server_row(2, draining=True), "s2": server_row(2), "s3": server_row(2)}
    shares = clupy_master.shares(servers, {"c": row(9, unreachable=["s3"], s1=2)}, 100.0)
    assert shares == {"c": {"s2": 2}}


# ==== Ways to die, and what the call, its neighbours and the cluster make of them =============

def die(how):
    """End this process in one of the ways in which processes end."""
    import ctypes
    import faulthandler
    import resource
    if how == "kill -9":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "SIGSEGV":
        ctypes.string_at(0)
    elif how == "abort":
        os.abort()
    elif how.startswith("os._exit"):
        os._exit(int(how.split()[1]))
    elif how == "sys.exit":
        sys.exit(3)
    elif how == "SIGTERM blocked":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "recursion":
        def deeper(n):
            return deeper(n + 1) + 1
        deeper(0)
    elif how == "fork":
        if os.fork() == 0:
            os._exit(7)
        os.wait()
    elif how == "forked child returns":
        if os.fork():
            os.wait()
    elif how == "orphan holds the pipes":
        if os.fork() == 0:
            os.setsid()
            time.sleep(3)
        os._exit(5)
    elif how == "descriptors closed":
        os.closerange(3, 1000)
    elif how == "stdout None":
        sys.stdout = sys.stderr = None
    elif how == "thread left behind":
        threading.Thread(target=time.sleep, args=(60,)).start()
    elif how == "multiprocessing":
        import multiprocessing
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            return pool.map(abs, [-1, -2])
    elif how == "memory":
        resource.getrlimit(resource.RLIMIT_DATA)
        return len(bytearray(1 << 40))
    assert faulthandler
    return "lived"


WAYS_TO_DIE = {
    "kill -9": (clupy.WorkerDied, "signal 9"),
    "SIGSEGV": (clupy.WorkerDied, "signal 11"),
    "abort": (clupy.WorkerDied, "signal 6"),
    "os._exit 0": (clupy.WorkerDied, "exit code 0"),
    "os._exit 3": (clupy.WorkerDied, "exit code 3"),
    "SIGTERM blocked": (clupy.WorkerDied, "signal 9"),
    "orphan holds the pipes": (clupy.WorkerDied, "exit code 5"),
    "descriptors closed": (clupy.WorkerDied, ""),
    "sys.exit": (SystemExit, "3"),
    "recursion": (RecursionError, "recursion"),
    "memory": (MemoryError, ""),
    "fork": None,
    "forked child returns": None,
    "stdout None": None,
    "thread left behind": None,
    "multiprocessing": None,
}


@pytest.mark.parametrize("how", WAYS_TO_DIE)
def test_a_call_that_dies_hurts_only_itself(how):
    clupy.connect(slots=2)
    neighbours = [clupy.parallel(sleepy)(0.01, n) for n in range(20)]
    doomed = clupy.parallel(die, retries=1)(how)
    neighbours += [clupy.parallel(sleepy)(0.01, n) for n in range(20, 40)]
    if WAYS_TO_DIE[how]:
        kind, words = WAYS_TO_DIE[how]
        with pytest.raises(kind) as caught:
            doomed.result(PATIENCE)
        assert words in str(caught.value)
        if kind is clupy.WorkerDied:
            assert "die, try 2 of 2" in str(caught.value) and socket.gethostname() in str(caught.value)
    else:
        assert doomed.result(PATIENCE) == ([1, 2] if how == "multiprocessing" else "lived")
    assert clupy.wait_all(neighbours, time_out=PATIENCE)
    assert [f.value for f in neighbours] == list(range(40))
    again = [clupy.parallel(sleepy_pid)(0.2) for _ in range(2)]
    assert len({f.result(PATIENCE) for f in again}) == 2


def test_the_last_words_of_a_worker_are_in_the_error():
    def speak_and_die():
        print("these were the last words", file=sys.stderr)
        os.abort()
    with pytest.raises(clupy.WorkerDied, match="these were the last words") as caught:
        clupy.parallel(speak_and_die, retries=0)().result(PATIENCE)
    assert "speak_and_die" in str(caught.value) and "GB" in str(caught.value)


def count_starts(path, seconds=0.0, die_before=0):
    """Note the start, live for some seconds, and die if this is not the last start wanted."""
    with open(path, "a") as file:
        file.write("x")
    time.sleep(seconds)
    if os.path.getsize(path) <= die_before:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.path.getsize(path)


@pytest.mark.parametrize("retries, starts", [(0, 1), (1, 2), (3, 4)])
def test_a_call_is_started_at_most_once_more_than_retries(tmp_path, retries, starts):
    with pytest.raises(clupy.WorkerDied, match=f"try {starts} of {starts}"):
        clupy.parallel(count_starts, retries=retries)(str(tmp_path / "x"), 0, 99).result(PATIENCE)
    assert (tmp_path / "x").stat().st_size == starts


def test_a_call_that_dies_twice_succeeds_at_its_third_start(tmp_path):
    assert clupy.parallel(count_starts)(str(tmp_path / "x"), 0, 2).result(PATIENCE) == 3


def test_neighbours_in_a_dead_workers_queue_are_not_charged(tmp_path):
    def quick(path):
        with open(path, "a") as file:
            file.write("x")
    clupy.connect(slots=1)
    assert clupy.wait_all([clupy.parallel(quick)(str(tmp_path / "warm")) for _ in range(50)], PATIENCE)
    doomed = clupy.parallel(die)("kill -9")
    neighbours = [clupy.parallel(quick, retries=1)(str(tmp_path / f"n{n}")) for n in range(30)]
    with pytest.raises(clupy.WorkerDied, match="try 3 of 3"):
        doomed.result(PATIENCE)
    assert clupy.wait_all(neighbours, PATIENCE) and all(f.successful for f in neighbours)
    assert {(tmp_path / f"n{n}").stat().st_size for n in range(30)} == {1}


def test_who_is_charged_when_a_worker_dies():
    assert clupy.had_begun([4, 5, 6, 7], 5) == [True, True, False, False]
    assert clupy.had_begun([4, 5], 3) == [False, False]           # its result had arrived already
    assert clupy.had_begun([4, 5], None) == [True, True]          # nobody knows


# ---- Cancel and time-out

def busy(how, path=None):
    if path:
        with open(path, "a") as file:
            file.write("x")
    if how == "sleep":
        time.sleep(60)
    elif how == "loop":
        while True:
            pass
    elif how == "c":                              # keeps the GIL
        import re
        re.match(r"(a+)+$", "a" * 60 + "b")


@pytest.mark.parametrize("how", ["sleep", "loop", "c"])
def test_a_running_call_can_be_cancelled_and_its_slot_is_back(how):
    clupy.connect(slots=1)
    future = clupy.parallel(busy)(how)
    waiting = clupy.parallel(square)(3)
    until(future.running)
    time.sleep(0.2)
    begun = time.monotonic()
    assert future.cancel() and future.cancelled() and future.completed and not future.successful
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    assert waiting.result(PATIENCE) == 9 and time.monotonic() - begun < 10


def test_a_waiting_call_that_is_cancelled_never_starts(tmp_path):
    clupy.connect(slots=1)
    first = clupy.parallel(sleepy)(0.5, 1)
    second = clupy.parallel(count_starts)(str(tmp_path / "x"))
    assert second.cancel() and first.result(PATIENCE) == 1
    assert clupy.parallel(square)(2).result(PATIENCE) == 4 and not (tmp_path / "x").exists()


def test_cancelling_kills_exactly_that_call(tmp_path):
    clupy.connect(slots=2)
    path = str(tmp_path / "x")
    calls = [clupy.parallel(count_starts)(f"{path}{n}", 0.3) for n in range(8)]
    until(calls[0].running)
    assert calls[0].cancel()
    assert clupy.wait_all(calls, PATIENCE)
    assert [c.successful for c in calls] == [False] + [True] * 7 and {c.value for c in calls[1:]} == {1}


@pytest.mark.parametrize("how", ["sleep", "loop", "c"])
def test_a_call_that_is_over_its_time_is_killed_and_says_where_it_was(how, tmp_path):
    future = clupy.parallel(busy, timeout="300ms")(how, str(tmp_path / "x"))
    neighbours = [clupy.parallel(sleepy, retries=0)(0.02, n) for n in range(20)]
    with pytest.raises(clupy.CallTimeout, match="busy ran longer than its timeout of 0.3 s") as caught:
        future.result(PATIENCE)
    assert "in busy" in str(caught.value) and isinstance(caught.value, TimeoutError)
    assert clupy.wait_all(neighbours, PATIENCE) and [f.value for f in neighbours] == list(range(20))
    assert (tmp_path / "x").stat().st_size == 1


def test_a_memory_limit_gives_memory_errors_and_the_node_lives():
    clupy.connect(slots=1, memory_limit="600MB")
    with pytest.raises(MemoryError):
        clupy.parallel(lambda: len(bytearray(1 << 30)))().result(PATIENCE)
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


# ---- Calls inside calls

def fibonacci(n):
    if n < 2:
        return n
    a, b = clupy.parallel(fibonacci)(n - 1), clupy.parallel(fibonacci)(n - 2)
    return a.result() + b.result()


def depth(n):
    return 0 if n == 0 else 1 + clupy.parallel(depth)(n - 1).result()


@clupy.parallel
def decorated(n):
    return 1 if n == 0 else n * decorated(n - 1).result()


def test_calls_inside_calls_never_deadlock_even_with_one_slot():
    clupy.connect(slots=1)
    assert clupy.parallel(fibonacci)(5).result(PATIENCE) == 5
    assert decorated(5).result(PATIENCE) == 120


def test_recursion_of_depth_30_on_one_slot():
    clupy.connect(slots=1)
    assert clupy.parallel(depth)(30).result(90) == 30
    until(lambda: len(workers()) == 1)


def test_a_cancelled_parents_children_are_cancelled(tmp_path):
    def parent(path):
        def child(path):
            with open(path, "w"):
                time.sleep(60)
        clupy.parallel(child)(path).result()
    clupy.connect(slots=1)
    future = clupy.parallel(parent)(str(tmp_path / "child"))
    until((tmp_path / "child").exists)
    pids = workers()
    assert len(pids) == 2 and future.cancel()
    until(lambda: not pids & workers())


def test_a_nested_call_may_fail_die_or_be_bounded():
    def outer():
        with pytest.raises(ValueError, match="inside"):
            clupy.parallel(fails)("inside").result()
        with pytest.raises(clupy.WorkerDied):
            clupy.parallel(os._exit, retries=0)(3).result()
        return [f.result() for f in [clupy.parallel(square, max=1)(n) for n in range(5)]]
    assert clupy.parallel(outer)().result(PATIENCE) == [0, 1, 4, 9, 16]


# ---- Output

def test_what_calls_print_appears_with_server_and_pid_and_in_order(tmp_path):
    done = run_script(tmp_path / "client", """
        import clupy, logging, os, sys, warnings
        def speak(n):
            print("line", n)
            print("error", n, file=sys.stderr)
            os.write(1, b"from C %d\\n" % n)
            warnings.warn("warned %d" % n)
            logging.warning("logged %d", n)
            return os.getpid()
        pid = clupy.parallel(speak)(1).result(30)
        clupy.close()
        print("pid", pid)
        """)
    pid = done.stdout.split()[-1]
    mark = f"[{socket.gethostname()} {pid}]"
    assert [line for line in done.stdout.splitlines() if mark in line] == [f"{mark} line 1", f"{mark} from C 1"]
    for words in ("error 1", "warned 1", "logged 1"):
        assert any(line.startswith(mark) and words in line for line in done.stderr.splitlines())


def test_output_can_be_switched_off(tmp_path):
    text = "import clupy\nclupy.parallel(print)('loud').result(30)\nclupy.close()"
    done = run_script(tmp_path, text, CLUPY_OUTPUT="off")
    assert "loud" not in done.stdout + done.stderr


def test_a_flood_of_output_stops_nobody_and_says_how_much_was_not_shown(tmp_path):
    done = run_script(tmp_path, """
        import clupy
        def flood():
            for n in range(1_000_000):
                print("x" * 99)
            return "done"
        print(clupy.parallel(flood)().result(60))
        clupy.close()
        """)
    assert "done" in done.stdout and len(done.stdout) < 120_000_000
    shown = sum("x" * 99 in line for line in done.stdout.splitlines())
    notes = [line for line in (done.stdout + done.stderr).splitlines() if "not shown" in line]
    dropped = [int(line.split("... ")[1].split()[0]) for line in notes]
    assert shown + sum(dropped) == 1_000_000


# ---- Leaving, forking, Ctrl-C

def test_closing_while_the_embedded_cluster_starts_leaves_nothing():
    for delay in (0, 0, 0, 0.01, 0.03, 0.1):
        assert "lock" in str(clupy.parallel(len)(threading.Lock()).failure)
        time.sleep(delay)
        clupy.close()
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise ValueError('x')", "os.kill(os.getpid(), 2)",
                                 "os._exit(0)", "import signal; os.kill(os.getpid(), 9)"])
def test_leaving_the_program_never_hangs_and_leaves_nothing(tmp_path, end):
    before = workers()
    done = run_script(tmp_path, f"""
        import clupy, os, time
        futures = [clupy.parallel(time.sleep)(60) for _ in range(10)]
        while not futures[0].running():
            time.sleep(0.01)
        {end}
        """, check=False, timeout=20)
    until(lambda: workers() <= before, 10)
    assert len(done.stderr.splitlines()) <= (6 if "x" in end or "2" in end else 1), done.stderr


def test_ctrl_c_in_a_wait_ends_the_calls_and_the_prompt_is_back(tmp_path):
    script = """
        import clupy, os, time
        futures = [clupy.parallel(time.sleep)(60) for _ in range(10)]
        while not futures[0].running():
            time.sleep(0.01)
        print("ready", flush=True)
        try:
            clupy.wait_all(futures)
        except KeyboardInterrupt:
            print("interrupted")
        print(all(f.wait(5) for f in futures), {f.cancelled() for f in futures})
        print(clupy.parallel(pow)(2, 5).result(30))
        """
    (tmp_path / "s.py").write_text(textwrap.dedent(script))
    with Program(tmp_path / "client", tmp_path / "s.py") as program:
        until(lambda: "ready" in program.out.read_text())
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(PATIENCE) == 0, program.log
        assert program.out.read_text().split("\n")[1:4] == ["interrupted", "True {True}", "32"]


def test_a_forked_child_gets_an_engine_of_its_own(tmp_path):
    done = run_script(tmp_path, """
        import clupy, os, warnings
        warnings.simplefilter("ignore")
        def pid():
            return os.getpid()
        first = clupy.parallel(pid)().result(30)
        pending = clupy.parallel(__import__("time").sleep)(0.5)
        child = os.fork()
        if child == 0:
            assert isinstance(pending.exception(5), clupy.Closed)
            assert clupy.parallel(pid)().result(30) != first
            clupy.close()
            os._exit(42)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert pending.result(30) is None
        assert clupy.parallel(pid)().result(30)
        """)
    assert not done.stderr


def test_many_threads_may_make_calls_at_once():
    def many(n):
        results = [clupy.parallel(square)(n * i) for i in range(200)]
        return clupy.wait_all(results, PATIENCE) and [r.value for r in results] == [(n * i) ** 2 for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(many, range(8)))


# ---- Who is stopped, and who is gone

def test_a_stopped_client_master_or_server_is_not_dead(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address)
        future = clupy.parallel(sleepy)(14, "done")
        until(future.running)
        for program in (cluster.master, cluster.servers[0]):
            program.process.send_signal(signal.SIGSTOP)
        time.sleep(12)
        for program in (cluster.master, cluster.servers[0]):
            program.process.send_signal(signal.SIGCONT)
        assert future.result(PATIENCE) == "done"
        assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_calls_go_on_without_a_master_and_with_the_next_one(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address)
        results = [clupy.parallel(sleepy)(0.05, n) for n in range(60)]
        until(lambda: results[5].completed)
        cluster.master.process.kill()
        cluster.master.process.wait()
        assert clupy.wait_all(results, PATIENCE) and [r.value for r in results] == list(range(60))
        cluster.start_master(cluster.address)
        until(lambda: len(cluster.status()["servers"]) == 1 and len(cluster.status()["clients"]) == 1)
        assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_without_master_and_slots_calls_fail_after_patience(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address, patience="2s")
        assert clupy.parallel(square)(3).result(PATIENCE) == 9
        for program in (cluster.master, *cluster.servers):
            program.process.kill()
        with pytest.raises(clupy.MasterUnreachable, match="is `python -m clupy master` running"):
            clupy.parallel(square)(4).result(PATIENCE)
    with pytest.raises(clupy.MasterUnreachable):
        clupy.close()
        clupy.connect(cluster.address, patience=1)


def test_all_servers_gone_and_one_back_later(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address)
        assert clupy.parallel(square)(3).result(PATIENCE) == 9
        cluster.servers[0].process.kill()
        future = clupy.parallel(square)(4)
        assert not future.wait(2)
        cluster.add_server()
        assert future.result(PATIENCE) == 16


def test_a_killed_client_leaves_nothing_behind(tmp_path):
    with Cluster(tmp_path) as cluster:
        text = "import clupy, time\nfs = [clupy.parallel(time.sleep)(60) for _ in range(4)]\ntime.sleep(60)"
        with Program(tmp_path / "client", "-c", text, CLUPY_MASTER=cluster.address) as client:
            until(lambda: any(row["used"] == 2 for row in cluster.status()["servers"].values()))
            before = workers()
            client.process.kill()
            until(lambda: not before & workers(), 10)
            until(lambda: not cluster.status()["clients"])


# ---- Other engines

@pytest.mark.parametrize("kind", [concurrent.futures.ThreadPoolExecutor, concurrent.futures.ProcessPoolExecutor])
def test_calls_can_run_on_another_executor_and_are_pickled_all_the_same(kind):
    with kind(2) as executor:
        clupy.connect(executor=executor)
        numbers = [1, 2, 3]
        assert clupy.parallel(lambda n: n + 1)(1).result(PATIENCE) == 2
        assert clupy.parallel(list)(numbers).result(PATIENCE) is not numbers
        with pytest.raises(ValueError, match="on purpose"):
            clupy.parallel(fails)("on purpose").result(PATIENCE)
        assert "lock" in str(clupy.parallel(square)(threading.Lock()).failure)
        assert list(clupy.map(square, range(10))) == [n * n for n in range(10)]
        with clupy.Executor() as mine:
            assert mine.submit(square, 4).result(PATIENCE) == 16
        clupy.close()


# ==== Code: what travels with a call, and what comes back ====================
# The project of a client is in a folder of its own, which no worker has on its path: all that a worker knows of it
# came over the slot.  Only `asked` looks behind the scenes: the modules that workers ask their client for.

WITH_CALL = """
import clupy
asked, answer = [], clupy.FETCHES["module"]
clupy.FETCHES["module"] = lambda name, *path: asked.append(name) or answer(name, *path)
def call(func, *args):
    return clupy.parallel(func)(*args).result(30)
"""


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


def tell(folder, text, files=(), **options):
    """Run a program that may use `call` and `asked`, next to the files {name: text} of its project."""
    write_files(folder, dict(files))
    return run_script(folder, WITH_CALL + textwrap.dedent(text), **{"CLUPY_PORT": free_port(), **options})


def call(func, *args):
    return clupy.parallel(func)(*args).result(PATIENCE)


def shown(error):
    """What Python prints of an exception that nobody catches."""
    return "".join(traceback.format_exception(error))


@pytest.fixture
def asked(monkeypatch):
    """The names of the modules that workers asked this process for, as they come."""
    names, answer = [], clupy.FETCHES["module"]
    monkeypatch.setitem(clupy.FETCHES, "module", lambda name, *path: names.append(name) or answer(name, *path))
    return names


# ---- Modules on demand

PROJECT = {
    "single.py": "import neighbour\nfrom package import one\ndef value():\n    return neighbour.value + one()\n",
    "neighbour.py": "value = 10\n",
    "package/__init__.py": "from . import first\nfrom .first import one\n",
    "package/first.py": "from package import second\ndef one():\n    return second.two() - 1\nclass Thing:\n    pass\n",
    "package/second.py": "import package.first\ndef two():\n    return 2\ndef late():\n    from .deep import bottom\n"
                         "    return bottom.value\n",
    "package/deep/__init__.py": "",
    "package/deep/bottom.py": "from .. import second\nvalue = 40 + second.two()\n",
    "space/inner/leaf.py": "value = 'leaf'\n",
    "one/split/a.py": "n = 1\n",
    "two/split/b.py": "n = 2\n",
    "guarded.py": "ran = False\nif __name__ == '__main__':\n    ran = True\n",
    "site/__editable__.linked.pth": "../linked\n",
    "linked/by_path.py": "value = 'by path'\n",
    "elsewhere/src/__init__.py": "from . import part\n",
    "elsewhere/src/part.py": "value = 'by hook'\n",
}


def test_modules_of_the_project_are_served_however_they_are_found_and_import_each_other(tmp_path, cluster):
    tell(tmp_path / "client", """
        import concurrent.futures, importlib.util, os, site, sys
        sys.path += ["one", "two"]
        site.addsitedir("site")                        # an editable install is a .pth file, or a hook:
        class Hook:
            def find_spec(name, path=None, target=None):
                if name == "renamed":
                    return importlib.util.spec_from_file_location(name, os.path.abspath("elsewhere/src/__init__.py"))
        sys.meta_path.append(Hook)
        import by_path, guarded, package, renamed, single
        def at_once():
            with concurrent.futures.ThreadPoolExecutor(9) as threads:
                return len(list(threads.map(importlib.import_module, ["neighbour", "guarded", "by_path"] * 3)))
        def late():
            import space.inner.leaf, split.a, split.b      # namespace packages, which the client did not import
            return space.inner.leaf.value, split.a.n + split.b.n
        def missing():
            assert importlib.util.find_spec("nowhere") is None and importlib.util.find_spec("package.nowhere") is None
            import package.nowhere
        assert call(at_once) == 9 and sorted(asked) == ["by_path", "guarded", "neighbour"]
        assert call(single.value) == 11 and call(package.one) == 1
        assert call(package.second.late) == 42 and "package.deep.bottom" not in sys.modules
        assert call(late) == ("leaf", 3) and {"space.inner.leaf", "split.a", "split.b"} <= set(asked)
        assert call(lambda: (by_path.value, renamed.part.value)) == ("by path", "by hook")
        assert call(lambda: (guarded.__name__, guarded.ran, guarded.__file__)) == ("guarded", False, guarded.__file__)
        Thing = package.first.Thing
        assert type(call(Thing)) is Thing and call(type, Thing()) is Thing and call(isinstance, Thing(), Thing)
        error = clupy.parallel(missing)().exception(30)
        assert type(error) is ModuleNotFoundError and str(error) == "No module named 'package.nowhere'"
        """, PROJECT, CLUPY_MASTER=cluster.address)


def test_what_the_client_need_not_be_asked_it_is_not_asked(tmp_path, asked):
    def imports():
        import email.mime.text                              # the standard library's
        import numpy.linalg                                 # the server has it
        for name in ["nowhere"] * 3 + ["numpy.nowhere", "json.nowhere", "clupy.nowhere"]:
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(name)
        return bool(email.mime.text and numpy.linalg)

    def fork():                                             # the slot's socket is the parent's alone
        if (pid := os.fork()) == 0:
            os._exit(importlib.util.find_spec("nowhere_either") is None)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    clupy.connect(slots=1)
    assert call(imports) and call(imports) and call(fork) == 1
    assert asked == ["nowhere"]
    assert call(shown, ValueError()) == "ValueError\n" and __name__ in asked        # though pytest loaded it


def test_a_program_run_by_dash_m_is_a_module_of_its_package(tmp_path):
    write_files(tmp_path, {
        "pkg/__init__.py": "",
        "pkg/other.py": "def name():\n    from pkg import main\n    return main.__name__, main.shared\n",
        "pkg/main.py": "import clupy\nfrom . import other\nshared = 5\ndef f():\n    return *other.name(), shared\n"
                       "if __name__ == '__main__':\n    print(clupy.parallel(f)().result(30))\n"})
    done = subprocess.run([sys.executable, "-m", "pkg.main"], cwd=tmp_path, env=environ(CLUPY_PORT=free_port()),
                          capture_output=True, text=True, timeout=60)
    assert done.stdout == "('pkg.main', 5, 5)\n", done.stderr


def test_what_the_server_has_goes_behind_the_clients_own_and_a_library_that_it_lacks_is_named(tmp_path):
    write_files(tmp_path / "installed", {"versioned.py": "n = 'server'\n", "only_here.py": "n = 'server'\n"})
    packages = f"user/lib/python3.{sys.version_info.minor}/site-packages"
    with Cluster(tmp_path, PYTHONPATH=f"{HERE}:{tmp_path / 'installed'}") as cluster:
        done = tell(tmp_path / "client", """
            import site, sys
            sys.path.append(site.getusersitepackages())
            import fakelib, versioned
            assert call(lambda: (versioned.n, __import__("only_here").n)) == ("client", "server")
            assert asked == ["versioned"]
            def optional():
                try: import fakelib
                except ImportError: return "without it"
            error = clupy.parallel(lambda: fakelib.value)().exception(30)
            print(call(optional), error.name, type(error).__name__, error, sep="\\n")
            """, {"versioned.py": "n = 'client'\n", f"{packages}/fakelib.py": "value = 1\n",
                  f"{packages}/Fake_Lib-1.5.dist-info/METADATA": "Name: Fake-Lib\nVersion: 1.5\n",
                  f"{packages}/Fake_Lib-1.5.dist-info/top_level.txt": "fakelib\n"},
            PYTHONUSERBASE=tmp_path / "client" / "user", CLUPY_MASTER=cluster.address)
    *others, message = done.stdout.splitlines()
    assert others == ["without it", "fakelib", "ModuleNotFoundError"]
    assert message.startswith(f"No module named 'fakelib' on {socket.gethostname()}") and message.endswith(
        "client has Fake-Lib 1.5: add the line `- Fake-Lib==1.5` under `libraries:` in clupy.client.dependency.yaml")


def test_a_module_that_cannot_be_sent_says_why_and_what_to_do(tmp_path, monkeypatch):
    (tmp_path / f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes(b"name = 'caf\xe9'\n")
    monkeypatch.syspath_prepend(tmp_path)
    made = types.ModuleType("made_by_hand")
    exec("def f(): return 5\nclass C: pass", vars(made))
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    for func, words in ((lambda: __import__("fast"), "compiled .*fast.*clupy.client.dependency.yaml"),
                        (lambda: __import__("latin"), "cannot be read by its client: SyntaxError"),
                        (made.f, "cloudpickle.register_pickle_by_value")):
        with pytest.raises(ModuleNotFoundError, match=words) as caught:
            call(func)
        assert f"on {socket.gethostname()}" in str(caught.value)
    cloudpickle.register_pickle_by_value(made)
    try:
        assert call(made.f) == 5 and call(type, made.C()) is made.C
    finally:
        cloudpickle.unregister_pickle_by_value(made)


def test_data_files_beside_a_module_are_not_sent_and_the_error_says_so(tmp_path, monkeypatch):
    def by_pkgutil():
        return pkgutil.get_data("with_data", "table.txt")

    def by_resources():
        return importlib.resources.files("with_data").joinpath("table.txt").read_text()
    write_files(tmp_path, {"with_data/__init__.py": "", "with_data/table.txt": "1 2 3\n"})
    monkeypatch.syspath_prepend(tmp_path)
    for func in by_pkgutil, by_resources:
        with pytest.raises(OSError, match="with_data.*only source"):
            call(func)


def test_a_traceback_shows_the_served_lines_even_if_the_file_was_edited_since(tmp_path):
    tell(tmp_path, """
        import inspect, traceback
        import broken
        clupy.connect(slots=1)
        for marked in False, True:
            text = "".join(traceback.format_exception(clupy.parallel(broken.f)().exception(30)))
            assert "raise ValueError('broken')" in text and ('broken.py (remote)", line 2' in text) is marked, text
            open("broken.py", "w").write("# other\\n" * 5)
        assert call(inspect.getsource, broken.f).splitlines()[0] == "def f():"
        """, {"broken.py": "def f():\n    raise ValueError('broken')\n"})


def test_looking_for_a_module_imports_nothing(tmp_path, monkeypatch):
    write_files(tmp_path, {"loud/__init__.py": "raise SystemExit\n", "loud/child.py": "", "space/inner/leaf.py": ""})
    monkeypatch.syspath_prepend(tmp_path)
    loud = str(tmp_path / "loud")
    for question, answer in {
            ("loud",): ("source", "raise SystemExit\n", f"{loud}/__init__.py", [loud]),
            ("loud.child", (loud,)): ("source", "", f"{loud}/child.py", None),
            ("space.inner", (str(tmp_path / "space"),)): ("namespace", [str(tmp_path / "space" / "inner")]),
            ("cloudpickle",): ("library", "cloudpickle", cloudpickle.__version__),
            ("json",): ("no",), ("clupy",): ("no",), ("nowhere",): ("no",)}.items():
        assert clupy.module_source(*question) == answer
    assert "loud" not in sys.modules
    assert __name__ in clupy.own_modules() and not clupy.own_modules() & {"os", "sys", "pytest", "clupy", "__main__"}


# ---- Functions and classes

def test_every_kind_of_function_of_a_script_runs_in_a_worker(tmp_path):
    tell(tmp_path, """
        import functools, math, operator, numpy, project
        base = 10
        def plain(x): return x + base
        def outer(x):
            def inner(y): return plain(y) + x
            return inner
        class Adder:
            def __init__(self, n): self.n = n
            def __call__(self, x): return self.n + x
            def method(self, x): return self.n * x
            @classmethod
            def make(cls, n): return cls(n)
            @staticmethod
            def fixed(x): return x + 0.5
        def even(n): return n == 0 or odd(n - 1)
        def odd(n): return n != 0 and even(n - 1)
        @functools.lru_cache
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        @clupy.parallel
        def down(n): return [n] + (up(n - 1).result() if n else [])
        @clupy.parallel(retries=0)
        def up(n): return [-n] + (down(n - 1).result() if n else [])
        array = numpy.arange(50_000.0)                  # 400 KB
        assert call(plain, 1) == 11 and call(lambda x: x * base, 2) == 20 and call(outer(5), 1) == 16
        assert call(functools.partial(plain), 1) == 11 and call(functools.partial(math.pow, 2), 3) == 8
        assert call(Adder(3), 4) == 7 and call(Adder(3).method, 4) == 12 and call(Adder.fixed, 1) == 1.5
        assert type(call(Adder, 9)) is Adder and call(Adder.make, 4).n == 4
        assert call(even, 10) and not call(odd, 10) and call(fib, 80) == call(lambda: fib(80)) == 23416728348467685
        assert down(4).result(30) == [4, -3, 2, -1, 0] == call(down.func, 4) == call(lambda: down(4).result())
        assert call(len, [1, 2]) == 2 and call(int, "7") == 7 and call(operator.itemgetter(1), "ab") == "b"
        assert call(str.upper, "a") == "A" and call([3, 1].index, 1) == 1
        assert call(lambda: array.sum()) == 49_999 * 25_000
        assert call(project.twice, 4) == 8 and call(project.Thing(4).double) == 8
        assert project.wrapped(1).result(30) == call(lambda: project.wrapped(1).result()) == 6 == call(project.cached)
        assert set(asked) == {"project"}, asked
        """, {"project.py": """
        import functools, threading, clupy
        lock = threading.Lock()                         # cannot be pickled: whoever uses it must go by name
        def twice(x): return 2 * x
        class Thing:
            def __init__(self, n): self.n = n
            def double(self): return twice(self.n)
        @clupy.parallel
        def wrapped(n):
            with lock: return wrapped(n - 1).result() if n else 6
        @functools.lru_cache
        def cached():
            with lock: return 6
        """})


def test_classes_of_a_script_come_back_as_themselves_and_untouched(tmp_path):
    text = """
        import collections, dataclasses, enum, multiprocessing
        class Point:
            count = 0
            def __init__(self, x): self.x = x
            def moved(self): Point.count += 1; return Point(self.x + 1)
        class Color(enum.Enum): RED = 1
        class Row(collections.namedtuple("Row", "a b")): pass
        @dataclasses.dataclass(frozen=True)
        class Data: n: int = 0; points: list[Point] | None = None
        class Failure(Exception): pass
        class Sub(Point, list): pass
        def fail(): raise Failure("no")
        def change(): Point.count = 99; Point.added = 1; return Point(5)
        def made_here():
            class Local: n = 6
            return Local(), Local
        def story():
            method = Point.__dict__["moved"]
            for value in Point(1), Color.RED, Row(1, 2), Data(3), Sub(4), Failure("x"):
                assert type(call(lambda v: v, value)) is type(value) is call(type, value) is call(lambda: type(value))
            assert call(Point(1).moved).x == 2 and call(lambda: Color.RED) is Color.RED and call(Data, 3) == Data(3)
            assert [type(p) for p in call(lambda: [Point(i) for i in range(3)])] == [Point] * 3
            error = clupy.parallel(fail)().exception(30)
            assert type(error) is Failure and error.args == ("no",) and type(call(change)) is Point
            assert Point.count == 0 and not hasattr(Point, "added") and Point.__dict__["moved"] is method
            value, cls = call(made_here)
            assert type(value) is cls and value.n == 6
            clupy.close()
            print("done", __name__, flush=True)
        if __name__ == "__main__":
            story()
            child = multiprocessing.get_context("spawn").Process(target=story)      # where it is __mp_main__
            child.start()
            child.join()
        """
    assert tell(tmp_path, text).stdout == "done __main__\ndone __mp_main__\n"


def test_classes_keep_their_identity_through_calls_inside_calls():
    class Client:
        pass

    def outer():
        class Local:
            pass

        def inner(client, local):
            class Born:
                n = 1
            return client, local, Client(), type(local)(), Born()
        clients_own, local, other, another, born = clupy.parallel(inner)(Client(), Local()).result()
        assert [type(x) for x in (clients_own, local, other, another)] == [Client, Local, Client, Local]
        return clients_own, other, born
    clients_own, other, born = call(outer)
    assert type(clients_own) is type(other) is Client and born.n == 1


CHANGES = [                             # a definition of f, which returns 1; what makes it return 2
    ("n = 1\ndef f(): return n", "n = 2"),
    ("n = [1]\ndef f(): return n[0]", "n[0] = 2"),
    ("n = 1\ndef f(): return (lambda: n)()", "n = 2"),
    ("n = 1\ndef g(): return n\ndef f(): return g()", "n = 2"),
    ("def g(): return 1\ndef f(): return g()", "def g(): return 2"),
    ("class C: n = 1\ndef f(): return C.n", "C.n = 2"),
    ("def f(x=1): return x", "f.__defaults__ = 2,"),
    ("def f(*, x=1): return x", "f.__kwdefaults__['x'] = 2"),
    ("def f(): return f.n\nf.n = 1", "f.n = 2"),
    ("def g():\n    n = 1\n    def f(): return n\n    def step(): nonlocal n; n = 2\n    return f, step\n"
     "f, step = g()", "step()"),
    ("def f(): return 1\ndef g(): return 2", "f.__code__ = g.__code__"),
    ("def f(): return 1", "def f(): return 2"),
]


def test_whatever_a_function_uses_may_change_and_the_next_call_sees_it():
    for definition, change in CHANGES:
        cell = {"__name__": "__main__"}
        exec(definition, cell)
        assert call(cell["f"]) == 1, definition
        exec(change, cell)
        assert call(cell["f"]) == 2, change
        assert clupy.capture(cell["f"]) is clupy.capture(cell["f"]), definition


def test_cells_of_a_notebook_may_be_run_again_and_tracebacks_show_their_lines():
    def cell(number, text):
        linecache.cache[f"<cell {number}>"] = len(text), None, [text], f"<cell {number}>"
        exec(compile(text, f"<cell {number}>", "exec"), notebook)
    notebook = {"__name__": "__main__"}
    cell(1, "class Point: norm = lambda self: 1")
    cell(2, "def f(point): return point.norm()")
    old = notebook["Point"]()
    assert call(notebook["f"], old) == 1
    cell(1, "class Point: norm = lambda self: 1 / 0")
    assert call(notebook["f"], old) == 1 and type(call(notebook["Point"])) is notebook["Point"]
    text = shown(clupy.parallel(notebook["f"])(notebook["Point"]()).exception(PATIENCE))
    assert '"<cell 1>", line 1, in <lambda>\n    class Point: norm = lambda self: 1 / 0\n' in text
    assert '"<cell 2>", line 1, in f\n    def f(point): return point.norm()\n' in text


def test_captures_are_few_and_what_cannot_be_captured_is_named():
    for n in range(clupy.MAX_CAPTURES * 2):
        clupy.capture(lambda n=n: n)
    assert len(clupy._captures) <= clupy.MAX_CAPTURES
    lock = threading.Lock()
    cell = {"__name__": "__main__", "lock": lock}
    exec("def f(): return lock", cell)
    for func, words in ((cell["f"], "f cannot be sent to a worker: its global 'lock', a _thread.lock,"),
                        (lambda: lock, "'lock' of its closure, a _thread.lock,")):
        with pytest.raises(pickle.PicklingError, match=words):
            clupy.parallel(func)()
    failure = clupy.parallel(write_files)("folder", files=lock).failure
    assert "write_files cannot be called: argument 'files', a _thread.lock, cannot" in str(failure)
    assert "argument 2 ('files'), a _thread.lock," in str(clupy.parallel(write_files)("folder", lock).failure)


def test_a_cloudpickle_without_the_names_that_clupy_uses_is_refused(monkeypatch):
    assert clupy._class_tracker() is cloudpickle.cloudpickle
    for name in "_DYNAMIC_CLASS_TRACKER_BY_ID", "_get_or_create_tracker_id", "_lookup_class_or_track":
        with monkeypatch.context() as patch:
            patch.delattr(cloudpickle.cloudpickle, name)
            with pytest.raises(clupy.ClupyError, match=f"{cloudpickle.__version__} has no {name}"):
                clupy._class_tracker()
    with pytest.raises(pickle.UnpicklingError, match="class Point.*keep the class"):
        clupy._client_class("no such id", "Point")


# ---- Exceptions

def test_an_exception_keeps_type_arguments_attributes_notes_and_links():
    def fail():
        try:
            try:
                {}["key"]
            except KeyError as error:
                error.add_note("a note")
                raise ValueError("middle", error) from error
        except ValueError:
            error = OSError(2, "gone", "file.txt")
            error.extra = [1, 2]
            raise error

    def hide():
        try:
            raise ValueError("hidden")
        except ValueError as error:
            raise ExceptionGroup("two", [error, BaseExceptionGroup("inner", [KeyError(3)])]) from None
    with pytest.raises(FileNotFoundError) as caught:
        call(fail)
    error, middle = caught.value, caught.value.__context__
    assert (error.args, error.filename, error.extra) == ((2, "gone"), "file.txt", [1, 2])
    assert error.__cause__ is None and not error.__suppress_context__
    assert type(middle) is ValueError and middle.__suppress_context__ and middle.args[1] is middle.__cause__
    assert middle.__cause__ is middle.__context__ and middle.__cause__.args == ("key",)
    assert middle.__cause__.__notes__ == ["a note"]
    text = shown(error)
    assert all(line in text for line in ('{}["key"]', 'raise ValueError("middle", error) from error', "raise error"))
    assert text.count(f"<{socket.gethostname()}") == 1 and "clupy_server" not in text
    with pytest.raises(ExceptionGroup, match="two") as caught:
        call(hide)
    group, (first, inner) = caught.value, caught.value.exceptions
    assert group.__context__ is first and group.__suppress_context__ and group.__cause__ is None
    assert first.args == ("hidden",) and inner.exceptions[0].args == (3,)
    assert shown(group).count('raise ValueError("hidden")') == 1                # that of the member


def test_an_uncaught_exception_of_a_nested_call_prints_as_if_it_had_happened_here(tmp_path):
    write_files(tmp_path, {"project.py": "def run(f):\n    try:\n        f(0)\n    except ZeroDivisionError as error:\n"
                                         "        raise ValueError('in a module') from error\n"})
    done = tell(tmp_path, """
        import project
        def divide(x):
            return 1 / x
        def outer():
            return clupy.parallel(project.run)(divide).result()
        call(outer)
        """, check=False)
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert done.returncode == 1 and lines[-1] == "ValueError: in a module", done.stderr
    for line in "return 1 / x", "raise ValueError('in a module') from error", "f(0)", "call(outer)":
        assert line in lines, done.stderr
    assert any('project.py", line 5, in run' in line for line in lines) and "clupy_server" not in done.stderr


class Strange(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.a, self.b = a, b


class Doubling(Exception):
    def __init__(self, text): super().__init__("wrapped " + text)


class Silent(Exception):
    def __str__(self): raise ValueError("no text")


class Refusing(Exception):
    """A result or an exception that raises `error` when it is pickled, or when it is unpickled."""
    def __init__(self, error, when): self.error, self.when = error, when
    def __reduce__(self): return (raise_it, (self.error,)) if self.when == "unpickled" else raise_it(self.error)


def raise_it(error):
    raise error


def chain(length):
    error = None
    for n in range(length):
        try:
            raise ValueError(n) from error
        except ValueError as caught:
            error = caught
    raise error


def cause(error, steps):
    return functools.reduce(lambda error, _: error.__cause__, range(steps), error)


def circle():
    a, b = ValueError("a"), ValueError("b")
    a.other, b.other, a.itself, a.__cause__, b.__cause__ = b, a, a, b, a
    raise a


def foreign():
    """An object of a module that only the worker has."""
    module = sys.modules["server_only"] = types.ModuleType("server_only")
    exec("class Special(Exception): pass", vars(module))
    return module.Special("x")


WAYS_TO_SPOIL = [               # what is called, the type of its failure, words in that, and what else must hold
    (lambda: (i for i in ()), pickle.PicklingError, "<lambda>, a generator, cannot be pickled"),
    (lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []), pickle.PicklingError, "a list, cannot be"),
    (lambda: Refusing(ValueError("no"), "pickled"), pickle.PicklingError, ".Refusing, cannot be pickled: no"),
    (lambda: Refusing(SystemExit("no"), "pickled"), pickle.PicklingError, ".Refusing, cannot be pickled: no"),
    (lambda: Refusing(ValueError("no"), "unpickled"), clupy.RemoteError, "ValueError: no (the result of"),
    (lambda: Refusing(SystemExit("no"), "unpickled"), clupy.RemoteError, "SystemExit: no (the result of"),
    (foreign, clupy.RemoteError, "No module named 'server_only'"),
    (lambda: raise_it(foreign()), clupy.RemoteError, "server_only.Special: x", lambda e: "No module" in e.__notes__[0]),
    (lambda: raise_it(Strange(1, 2)), Strange, "1-2", lambda e: (e.args, e.a, e.b) == (("1-2",), 1, 2)),
    (lambda: raise_it(Doubling("x")), Doubling, "wrapped x", lambda e: str(e) == "wrapped x"),
    (lambda: raise_it(Silent("x")), Silent, None),
    (lambda: raise_it(Refusing(SystemExit("no"), "pickled")), clupy.RemoteError, f"{__name__}.Refusing: ",
     lambda e: "SystemExit: no" in e.__notes__[0]),
    (lambda: raise_it(ValueError(threading.Lock())), clupy.RemoteError, "ValueError: <unlocked _thread.lock",
     lambda e: "in raise_it" in e.traceback and "lock" in e.__notes__[0] and "in raise_it" in shown(e)),
    (lambda: raise_it(ValueError("x" * 20_000_000)), ValueError, "xxx", lambda e: len(str(e)) == 20_000_000),
    (lambda: raise_it(ValueError("x" * 20_000_000, threading.Lock())), clupy.RemoteError, "ValueError: ",
     lambda e: len(str(e)) < 11_000),
    (functools.partial(chain, 1000), ValueError, "999", lambda e: cause(e, 999).args == (0,)),
    (functools.partial(chain, 5000), ValueError, "4999", lambda e: cause(e, clupy.MAX_CHAIN) is None),
    (circle, ValueError, "a", lambda e: e.__cause__.__cause__ is e.itself is e and str(e.other) == "ValueError: b"),
    (lambda: raise_it(functools.reduce(lambda e, _: ExceptionGroup("g", [e]), range(900), ValueError(1))),
     ExceptionGroup, "g (1 sub-exception)"),
    (lambda: (lambda again: again(again))(lambda again: again(again)), RecursionError, "recursion",
     lambda e: "frames left out" in shown(e)),
    (lambda: raise_it(StopIteration(7)), StopIteration, "7", lambda e: e.value == 7),
    (lambda: raise_it(KeyboardInterrupt("k")), KeyboardInterrupt, "k"),
    (lambda: raise_it(SystemExit(3)), SystemExit, "3", lambda e: e.code == 3),
    (lambda: raise_it(asyncio.CancelledError("c")), asyncio.CancelledError, "c"),
    (lambda: b"\xff".decode(), UnicodeDecodeError, "invalid start byte", lambda e: e.object == b"\xff"),
]


def test_whatever_cannot_be_sent_is_an_error_that_names_it_and_hurts_no_neighbour():
    clupy.connect(slots=2)
    calls = [(clupy.parallel(func)(), clupy.parallel(square)(n)) for n, (func, *_) in enumerate(WAYS_TO_SPOIL)]
    calls.append((clupy.parallel(len)(Refusing(ValueError("no"), "unpickled")), clupy.parallel(square)(len(calls))))
    assert clupy.wait_all(sum(calls, ()), PATIENCE)
    for (future, _), (_, kind, words, *more) in zip(calls, [*WAYS_TO_SPOIL, (len, ValueError, "no")], strict=True):
        error = future.failure
        assert type(error) is kind and (words is None or words in str(error)), (kind, error)
        assert all(holds(error) for holds in more), error
    assert [neighbour.value for _, neighbour in calls] == [n * n for n in range(len(calls))]


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
    body = pickle.dumps(("kind", os.system))
    with pytest.raises(clupy.ProtocolError, match="plain values"):
        clupy.decode(body)
    with pytest.raises(clupy.ProtocolError, match="no message"):
        clupy.decode(b"rubbish")


def test_a_wrong_proof_is_refused_before_any_frame_is_read():
    with pytest.raises(clupy.ProtocolError, match="slot's key"):
        feed(clupy.Frames(b"right"), b"wrong", 5)
