"""The stories that CluPy promises, told with real processes on free ports.

A `Cluster` starts a master and servers as a user would, each in a folder of its own, and ends them whatever happens.
Scripts run as programs of their own, because that is what users write.  After every test nothing may be left behind.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pickle
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
            for n, seconds in enumerate((3, 8))]
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


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(4000), b"clupy\x01M\0", b"clupy\x63M\0",
                                  b"clupy\x01C\0" + b"x" * 32, b"clupy\x01S\0" + b"x" * 57, pickle.dumps(os.system)],
                         ids=["nothing", "http", "garbage", "half", "version", "no-proof", "forged-slot", "pickle"])
def test_strangers_are_refused_within_five_seconds_and_with_one_line(cluster, data):
    server = next(iter(cluster.status()["servers"].values()))["address"].replace("the master", "127.0.0.1")
    for program, address in ((cluster.master, cluster.address), (cluster.servers[0], server)):
        lines = program.log.count("refused")
        received, seconds = talk(address, data)
        assert seconds < 7 and len(received) <= 8 + 32 + 32
        until(lambda program=program, lines=lines: program.log.count("refused") == lines + 1)
    clupy.connect(cluster.address)
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


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
    assert "secret-word" not in repr(settings) and "***" in repr(settings)


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
    assert clupy_master.shares(servers, {"idle": row(0, s1=4), "new": row(3)}, 100.0) == {"idle": {"s1": 1}, "new": {"s1": 3}}
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
