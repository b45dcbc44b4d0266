"""The stories that CluPy promises, told with real processes on free ports.

A `Cluster` starts a master and servers as a user would, each in a folder of its own, and ends them whatever happens.
Scripts run as programs of their own, because that is what users write.  After every test nothing may be left behind.
"""

import ast
import asyncio
import builtins
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import errno
import faulthandler
import fcntl
import functools
import gc
import heapq
import importlib.machinery
import importlib.util
import io
import itertools
import json
import linecache
import logging
import multiprocessing.resource_tracker
import math
import mmap
import operator
import os
import pickle
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import traceback
import types
import urllib.error
import urllib.request
import uuid
import weakref
import zipfile
import zlib

import cloudpickle
import hypothesis
import hypothesis.stateful
import pytest

import clupy
import clupy_master
import clupy_server

PATIENCE = 30                                     # seconds until a condition counts as never met
SECRET = "a secret that only the tests know"
HERE = os.path.dirname(os.path.abspath(__file__))
PORTS = 10_000, 32_000                            # below those that the system gives to outgoing connections
signal.signal(signal.SIGINT, signal.default_int_handler)        # in the background of a shell, it and all below ignored it
MARK = f"TEST_RUN={os.getpid()}"                  # in the environment of every process that this run starts


# Else every worker would import this module, and with it pytest and asyncio: 0.2 s of the processor each.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


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
    return {pid for pid, command in processes().items() if "from clupy_server import work" in command} - templates()


def templates():
    """The pids of the processes that workers are forked from, which have the same command; but their streams are one pipe."""
    found = set()
    for pid, command in processes().items():
        with contextlib.suppress(OSError):
            if "template" in command and os.path.samestat(*(os.stat(f"/proc/{pid}/fd/{fd}") for fd in (1, 2))):
                found.add((pid, parent_of(pid)))
    pids = {pid for pid, _ in found}
    return {pid for pid, parent in found if parent not in pids}     # a child that has not yet its own streams is a worker


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def pythons():
    """The interpreters, one to an environment, that they run in."""
    commands = processes()
    return {commands[pid].split()[0] for pid in workers() & commands.keys()}


def environ(**more):
    """The environment of a process of the tests: of CLUPY_* variables only those named."""
    clean = {name: value for name, value in os.environ.items()
             if not name.startswith("CLUPY_") and name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")}
    return {**clean, "CLUPY_SECRET": SECRET, "CLUPY_PORT": os.environ["CLUPY_PORT"], "PYTHONPATH": HERE,
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


def example(name):
    """The text of a program in examples/."""
    with open(os.path.join(HERE, "examples", f"{name}.py"), encoding="utf-8") as file:
        return file.read()


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
        """What `python -m clupy status --json` prints, without starting a Python for it."""
        return tables_of(self.address, tls_ca=self.options.get("CLUPY_TLS_CA"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()
        if error[0]:
            for program in [self.master, *self.servers]:
                print(program.out.parent.name, program.log, sep=":\n")


def tables_of(address, **settings):
    """What the master there knows."""
    return asyncio.run(clupy_master.ask_master(clupy.read_settings("client", master=address, **settings), "status"))


def answers(address):
    """Whether something listens there."""
    host, port = address.split(":")
    with socket.socket() as sock:
        return sock.connect_ex((host, int(port))) == 0


def free_port():
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


multiprocessing.resource_tracker.ensure_running()      # whose process stays, once one of the tests has needed it


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
    text = example("primes")
    alone = run_script(tmp_path / "alone", text, CLUPY_PORT=free_port()).stdout.splitlines()
    together = run_script(tmp_path / "client", text, CLUPY_MASTER=cluster.address).stdout.splitlines()
    assert alone[:-2] == together[:-2] and alone[-3:-2] == ["199"] and "198 2 3 11" in alone and len(alone) < 10
    assert alone[-2].startswith("100 larger ones ran in")
    assert re.fullmatch(r"100 calls on \d+ cores? of this machine, \d+\.\d s", alone[-1])
    assert together[-1].startswith(f"100 calls on 1 server, 2 slots at {cluster.address}, ")


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


def joined(*values, **named):
    return values, named


class Point:
    def __init__(self, x):
        self.x = x


def test_futures_among_the_arguments_at_any_depth_arrive_as_their_results():
    one, two = clupy.parallel(square)(1), clupy.parallel(sleepy)(0.2, 2)
    call = clupy.parallel(joined)(one, [two, {"deep": (two,)}], 3, key=two)
    assert call.result(PATIENCE) == ((1, [2, {"deep": (2,)}], 3), {"key": 2})
    point = clupy.parallel(Point)(clupy.parallel(square)(3))               # the class is this program's, wherever it goes
    assert clupy.parallel(operator.attrgetter("x"))(point).result(PATIENCE) == 9
    assert list(clupy.map(square, [clupy.parallel(square)(n) for n in range(4)], chunk_size=2)) == [0, 1, 16, 81]
    with clupy.Executor(1) as executor:
        assert executor.submit(square, executor.submit(square, 2)).result(PATIENCE) == 16


def test_large_results_go_on_as_arguments_and_may_be_changed_here_meanwhile():
    made = clupy.parallel(bytearray)(1 << 20)
    waiting = clupy.parallel(sleepy)(1)
    call = clupy.parallel(lambda data, _: sum(data))(made, waiting)
    made.result(PATIENCE)[:] = b"x" * (1 << 20)           # not before it is there: what the call gets is that of then, or of now
    assert call.result(PATIENCE) in (0, ord("x") << 20)
    waiting, made = clupy.parallel(sleepy)(0.2), clupy.parallel(bytearray)(1 << 20)
    assert clupy.wait_all([made], PATIENCE)
    call = clupy.parallel(lambda data: sum(data))(made)
    made.result(PATIENCE)[:] = b"x" * (1 << 20)
    assert call.result(PATIENCE) == 0


def test_a_call_fails_with_what_its_arguments_wait_for_and_takes_no_slot_meanwhile():
    broken = clupy.parallel(fails)("on purpose")
    last = clupy.parallel(square)(clupy.parallel(square)(broken))
    with pytest.raises(clupy.ArgumentFailed, match="one of its arguments is the result of square, which failed"):
        last.result(PATIENCE)
    first = last.failure.__cause__
    assert "result of fails, which failed: ValueError: on purpose" in str(first) and type(first.__cause__) is ValueError
    long = [clupy.parallel(time.sleep)(60) for _ in range(clupy.slots())]
    waiting = [clupy.parallel(square)(long[0]) for _ in range(20)]
    assert all(not call.done() for call in waiting)
    waiting[0].cancel()
    assert waiting[0].cancelled() and not long[0].done()
    long[0].cancel()                                      # what waits for it is cancelled with it
    assert clupy.wait_all(waiting, PATIENCE) and all(call.cancelled() for call in waiting)
    assert clupy.parallel(square)(5).result(PATIENCE) == 25
    with pytest.raises(pickle.PicklingError, match=r"argument 2 \('value'\), a _thread.lock"):
        clupy.parallel(sleepy)(long[1], threading.Lock()).result(PATIENCE)


def test_futures_are_arguments_in_calls_too_and_on_other_executors():
    def chain(length):
        value = clupy.parallel(square)(2)
        for _ in range(length):
            value = clupy.parallel(sum)([value, 1])
        return value.result()
    assert clupy.parallel(chain)(5).result(PATIENCE) == 9
    clupy.close()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        clupy.connect(executor=pool)
        assert clupy.parallel(square)(clupy.parallel(square)(3)).result(PATIENCE) == 81


def test_a_program_that_ends_while_calls_wait_for_others_says_how_many(tmp_path):
    done = run_script(tmp_path, """
        import clupy, time
        slow = clupy.parallel(time.sleep)(60)
        waiting = [clupy.parallel(str)(slow) for _ in range(3)]
    """)
    assert "ended before 4 of its calls" in done.stderr and len(done.stderr.splitlines()) == 1


def count_and_raise(path, times, error=OSError):
    """Raises so many times; then it returns how often it was called."""
    with open(path, "a+") as file:
        file.write("x")
        file.seek(0)
        calls = len(file.read())
    if calls <= times:
        raise error(f"call {calls}")
    return calls


def test_an_exception_named_in_retry_on_is_tried_again_within_its_retries(tmp_path):
    call = clupy.parallel(count_and_raise, retry_on=(OSError, KeyError), retries=3, delay="20ms")
    assert call(str(tmp_path / "a"), 2).result(PATIENCE) == 3
    with pytest.raises(FileNotFoundError) as caught:          # a subclass
        call(str(tmp_path / "b"), 9, FileNotFoundError).result(PATIENCE)
    assert caught.value.__notes__ == ["count_and_raise was tried 4 times, as retry_on and retries say"]
    assert (tmp_path / "b").read_text() == "xxxx"
    with pytest.raises(ValueError):                        # not named
        call(str(tmp_path / "c"), 9, ValueError).result(PATIENCE)
    assert (tmp_path / "c").read_text() == "x"

    def inside(path):
        return clupy.parallel(count_and_raise, retry_on=OSError, delay=0)(path, 1).result()
    assert clupy.parallel(inside)(str(tmp_path / "d")).result(PATIENCE) == 2
    future = call(clupy.parallel(str)(tmp_path / "e"), 1)      # whose argument is waited for
    assert future.result(PATIENCE) == 2


def test_the_delay_doubles_with_each_try_and_is_cut_by_up_to_a_half(monkeypatch, tmp_path):
    waits = []

    def later(self, seconds, job, *args):
        waits.append(seconds)
        clupy.threads.run(job, *args)
    monkeypatch.setattr(clupy.Engine, "later", later)
    call = clupy.parallel(count_and_raise, retry_on=OSError, retries=4, delay="8s")(str(tmp_path / "a"), 4)
    assert call.result(PATIENCE) == 5
    assert len(waits) == 4 and all(4 * 2 ** n <= wait <= 8 * 2 ** n for n, wait in enumerate(waits))


def test_deaths_and_exceptions_share_the_retries(tmp_path):
    def dies_then_raises(path):
        with open(path, "a+") as file:
            file.write("x")
            file.seek(0)
            calls = len(file.read())
        if calls % 2:
            os._exit(1)
        raise OSError(calls)
    with pytest.raises(OSError, match="4"):
        clupy.parallel(dies_then_raises, retry_on=OSError, retries=3, delay=0)(str(tmp_path / "a")).result(PATIENCE)
    assert (tmp_path / "a").read_text() == "xxxx"


def test_a_call_that_waits_to_be_tried_again_can_be_cancelled_and_is_no_failure_yet(tmp_path):
    before = clupy.failures.calls, clupy.failures.unseen
    future = clupy.parallel(count_and_raise, retry_on=OSError, delay="1h")(str(tmp_path / "a"), 9)
    until(lambda: (tmp_path / "a").exists() and len(clupy._engine.held))
    assert not future.done() and (clupy.failures.calls, clupy.failures.unseen) == before
    assert future.cancel() and future.cancelled()
    clupy.close()
    for wrong in ({"retry_on": 3}, {"retry_on": (OSError, "x")}, {"retry_on": OSError, "delay": -1}, {"delay": 1}):
        with pytest.raises((TypeError, ValueError), match="retry_on|delay"):
            clupy.parallel(square, **wrong)


def test_connect_and_slots_say_what_there_is(tmp_path):
    assert repr(clupy.connect(slots=3)) == "3 cores of this machine" and clupy.slots() == 3
    assert clupy.parallel(clupy.slots)().result(PATIENCE) == 3
    clupy.close()
    with Cluster(tmp_path, servers=2) as cluster:
        assert repr(clupy.connect(cluster.address)) == f"2 servers, 4 slots at {cluster.address}"
        cluster.servers[0].process.terminate()
        until(lambda: clupy.slots() == 2)
        assert clupy.connect(cluster.address) == (1, 2, cluster.address)
    clupy.close()
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        assert clupy.connect(executor=pool) is pool and clupy.slots() == 5


def test_everywhere_runs_a_function_once_on_each_server(tmp_path):
    with Cluster(tmp_path, servers=3, slots=1) as cluster:
        clupy.connect(cluster.address)
        parents = clupy.everywhere(os.getppid)
        assert clupy.wait_all(parents.values(), PATIENCE)
        assert {parent_of(future.value) for future in parents.values()} == {server.process.pid for server in cluster.servers}
        busy = [clupy.parallel(sleepy)(0.1) for _ in range(30)]
        assert {f.result(PATIENCE) for f in clupy.everywhere(pow, 2, 5).values()} == {32}
        dead = clupy.everywhere(os._exit, 3)
        assert clupy.wait_all(dead.values(), PATIENCE) and len(dead) == 3
        assert all("try 1 of 1" in str(future.failure) for future in dead.values())
        assert clupy.wait_all(busy, PATIENCE) and all(future.successful for future in busy)
        with pytest.raises(clupy.ClupyError, match="works in the program"):
            clupy.parallel(clupy.everywhere)(os.getpid).result(PATIENCE)
        waiting = clupy.everywhere(time.sleep, 60)
        second = clupy.everywhere(os.getpid)                 # behind the first ones: there is one slot each
        assert len(second) == 3 and not any(future.done() for future in second.values())
        cluster.servers[0].process.kill()
        until(lambda: sum(future.done() for future in waiting.values()) == 1)
        assert [type(future.failure) for future in waiting.values() if future.done()] == [clupy.WorkerDied]
        lost = until(lambda: [future for future in second.values() if future.done()])
        assert len(lost) == 1 and "this client has no slot there any more" in str(lost[0].failure)
        for future in waiting.values():
            future.cancel()


def test_the_program_s_end_waits_for_an_executor_s_calls_but_not_for_others(tmp_path):
    done = run_script(tmp_path, """
        import atexit, clupy, time
        executor = clupy.Executor(2)
        @atexit.register
        def late():
            print("late", future.done(), future.result())
            try:
                executor.submit(abs, 1)
            except RuntimeError as error:
                print(error)
        future = executor.submit(str, executor.submit(time.sleep, 1))
        future.add_done_callback(lambda done: print("called back"))
        other = clupy.parallel(time.sleep)(100)
    """)
    assert done.stdout.splitlines() == ["called back", "late True None",
                                        "cannot submit a call after the program has begun to end"]
    assert done.stderr.splitlines() == ["the program ended before 1 of its calls; clupy.wait_all() waits for them"]


def test_ctrl_c_ends_the_wait_for_an_executor_at_the_program_s_end(tmp_path):
    (tmp_path / "script.py").write_text("import clupy, time\n"
                                        "future = clupy.Executor(2).submit(time.sleep, 100)\n"
                                        "print(clupy.parallel(abs)(-1).result(), flush=True)\n")
    with Program(tmp_path, "script.py") as program:
        until(lambda: program.out.read_text() == "1\n")
        time.sleep(0.3)                                   # into the end, or not: both must end
        program.process.send_signal(signal.SIGINT)
        program.process.wait(PATIENCE)


def test_an_executor_that_nobody_has_any_more_leaves_its_cluster_when_its_calls_are_done(cluster):
    def engines():
        return [thread.name for thread in threading.enumerate()].count(clupy.ENGINE_THREAD)
    call = clupy.Executor(1, master=cluster.address).submit(sleepy, 1, "done")
    assert engines() == 1 and call.result(PATIENCE) == "done"
    until(lambda: not engines())
    results = clupy.Executor(1, master=cluster.address).map(sleepy, [0.01] * 50, range(50))
    assert list(results) == list(range(50))
    del results
    until(lambda: gc.collect() >= 0 and not engines())                # a map and its calls refer to each other


def test_an_executor_kills_its_workers_and_says_how_many_it_may_have():
    executor = clupy.Executor(2)
    other = clupy.parallel(sleepy)(1, "untouched")
    calls = [executor.submit(time.sleep, 100) for _ in range(5)]
    assert executor._max_workers == 2 and clupy.Executor()._max_workers == clupy.slots()
    executor.kill_workers()
    assert all(call.cancelled() for call in calls) and other.result(PATIENCE) == "untouched"
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        clupy.Executor(0)


def test_a_worker_ends_without_a_word_also_where_all_warnings_are_shown(tmp_path):
    done = run_script(tmp_path, """
        import warnings
        warnings.simplefilter("default")
        import clupy
        print(clupy.parallel(abs)(-1).result())
    """)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_what_is_given_by_mistake_is_named():
    with pytest.raises(ValueError, match="'5 parsecs' is not a duration"):
        clupy.parallel(square, timeout="5 parsecs")
    with pytest.raises(TypeError, match="takes a list of Futures; for one: future.wait"):
        clupy.wait_all(clupy.parallel(square)(1))


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


def test_handlers_run_once_and_do_not_delay_who_waits_for_the_result_alone():
    seen, slow = [], []
    futures = [clupy.parallel(square)(n) for n in range(50)]
    for future in futures:
        future.add_done_callback(lambda _: None)
        future.succeed(seen.append)
    late = clupy.parallel(fails)("on purpose").fail(lambda error: (time.sleep(1), slow.append(error)))
    done, rest = concurrent.futures.wait([late, clupy.parallel(sleepy)(60)], PATIENCE, concurrent.futures.FIRST_EXCEPTION)
    assert done == {late} and late.exception(timeout=0.5) and not slow
    assert late.wait(PATIENCE) and len(slow) == 1 and [future.cancel() for future in rest] == [True]
    assert clupy.wait_all(futures, PATIENCE) and sorted(seen) == [n * n for n in range(50)]
    futures[0].succeed(seen.append)
    assert len(list(clupy.as_completed(futures, PATIENCE))) == 50


def test_a_result_does_not_wait_for_a_long_call_behind_it():
    clupy.connect(slots=1)
    assert clupy.wait_all([clupy.parallel(sleepy)(0) for _ in range(20)], PATIENCE)
    short, long = clupy.parallel(sleepy)(0, "short"), clupy.parallel(sleepy)(60)
    assert short.result(10) == "short" and long.cancel()


def test_short_calls_behind_one_that_turns_out_long_are_done_by_a_slot_that_is_free_again():
    clupy.connect(slots=2)
    assert clupy.wait_all([clupy.parallel(sleepy)(0.3) for _ in range(2)], PATIENCE)         # both slots are open
    assert clupy.wait_all([clupy.parallel(sleepy_pid)(0) for _ in range(200)], PATIENCE)     # it seems to take no time
    busy = clupy.parallel(sleepy, retries=0)(0.3)                                            # has its slot to itself
    until(busy.running)
    long, *short = [clupy.parallel(sleepy_pid)(0 if n else 60) for n in range(20)]           # all go to the other slot
    assert clupy.wait_all(short, 10) and busy.completed and long.cancel()


def test_a_future_says_what_it_is_and_that_it_cannot_be_pickled():
    future = clupy.parallel(sleepy)(0.5)
    until(future.running)
    assert re.fullmatch(r"<Future sleepy running on \S+ \(\w+\) \d+ for \d+[.]\d s>", repr(future))
    assert future.wait(PATIENCE) and re.fullmatch(r"<Future sleepy finished on \S+ \(\w+\) \d+ in \d[.]\d+ s>", repr(future))
    with pytest.raises(TypeError, match="pass its result"):
        pickle.dumps(future)


def test_a_handler_that_is_added_while_another_runs_is_run_and_waited_for():
    started, go, seen = threading.Event(), threading.Event(), []

    def first(value):
        started.set()
        go.wait(PATIENCE)
        future.succeed(lambda value: seen.append("by a handler"))
    future = clupy.parallel(square)(2).succeed(first)
    assert started.wait(PATIENCE)
    future.succeed(seen.append).fail(seen.append)
    assert future.completed and not future.wait(0.05) and not seen         # though it has its outcome
    go.set()
    assert future.wait(PATIENCE) and seen == [4, "by a handler"]


def test_an_exception_in_a_handler_is_logged_and_hurts_nobody(caplog):
    future = clupy.parallel(square)(2).succeed(lambda value: 1 / 0)
    assert future.wait(PATIENCE) and future.value == 4
    assert "ZeroDivisionError" in caplog.text


def test_a_handler_that_leaves_by_sys_exit_keeps_nobody_waiting(caplog):
    future = clupy.parallel(square)(2).succeed(lambda value: sys.exit(1))
    assert future.wait(PATIENCE) and clupy.wait_all([future], PATIENCE) and "SystemExit" in caplog.text


def test_a_handler_may_wait_for_its_own_future():
    seen = []
    future = clupy.parallel(square)(3)
    future.succeed(lambda value: seen.append((future.wait(PATIENCE), clupy.wait_all([future]))))
    assert future.wait(PATIENCE) and seen == [(True, True)]


def test_ctrl_c_between_a_call_and_the_loop_loses_no_later_call(monkeypatch):
    clupy.connect(slots=1)
    engine = clupy._engine

    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(engine, "soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        clupy.parallel(square)(2)
    monkeypatch.undo()
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_waiting_ends_in_time_when_the_call_does_not():
    future = clupy.parallel(sleepy)(60)
    assert not future.wait(0.1) and not clupy.wait_all([future], time_out=0.1)
    with pytest.raises(TimeoutError):
        future.result(0.1)
    with pytest.raises(TimeoutError):
        list(clupy.as_completed([future], time_out=0.1))
    assert future.cancel()


def test_a_time_out_bounds_all_calls_together():
    clupy.connect(slots=1)
    calls = [clupy.parallel(sleepy)(0.4) for _ in range(6)]                # each is done 0.4 s after the one before
    assert not clupy.wait_all(calls, time_out=0.6) and calls[-1].cancel()


DURATIONS = [20, 20.0, "20s", math.inf, 1e10, 1e300, None]       # and numpy's, below


def test_every_wait_takes_numbers_texts_and_no_end_under_either_name():
    numpy = pytest.importorskip("numpy")
    for duration in [*DURATIONS, numpy.int64(20), numpy.float32(20)]:
        for name in "timeout", "time_out":
            seconds = {name: duration}
            future = clupy.parallel(sleepy, **seconds)(0.01, 3)
            assert future.wait(**seconds) and future.result(**seconds) == 3 and future.exception(**seconds) is None
            future = clupy.parallel(**seconds)(sleepy)(0.01, 4)
            assert list(clupy.as_completed([future], **seconds)) == [future] and clupy.wait_all([future], **seconds)
            assert list(clupy.map(square, [2], **seconds)) == [4]
    late = clupy.parallel(sleepy)(PATIENCE)
    for wait in late.result, late.exception, lambda timeout: next(clupy.as_completed([late], timeout)):
        with pytest.raises(TimeoutError):
            wait("50ms")
    assert not late.wait("50ms") and not clupy.wait_all([late], "50ms")
    late.cancel()
    for function in functools.partial(clupy.parallel, square), late.result, functools.partial(clupy.wait_all, []):
        with pytest.raises(TypeError, match="was given timeout and time_out, which are the same"):
            function(timeout=1, time_out=1)
    for duration in math.nan, True, "soon", 0, -1:
        with pytest.raises(ValueError):
            clupy.parallel(square, timeout=duration)


def test_whole_numbers_may_be_those_of_numpy():
    two = pytest.importorskip("numpy").int64(2)
    assert clupy.parallel(square, max=two, retries=two)(3).result(PATIENCE) == 9
    assert list(clupy.map(square, range(3), max=two, chunk_size=two)) == [0, 1, 4]
    with clupy.Executor(max_workers=two) as executor:
        assert executor.submit(square, two).result(PATIENCE) == 4
    settings = clupy.read_settings("client", slots=two, memory_limit=two << 30, patience=two)
    assert (settings.slots, settings.memory_limit, settings.patience) == (2, 2 << 30, 2.0)
    for options in {"max": 0}, {"max": 1.5}, {"retries": -1}, {"retries": None}:
        with pytest.raises(ValueError, match="but must be a whole number from"):
            clupy.parallel(square, **options)


def test_a_large_array_that_goes_to_many_calls_is_told_of_once(caplog):
    numpy = pytest.importorskip("numpy")

    def work(array, other=None):
        pass
    array, changing = numpy.zeros(1 << 18), numpy.zeros(1 << 18)
    for i in range(9):
        clupy.parallel(work)(array, i)
    for _ in range(20):
        clupy.parallel(work)(changing.copy(), numpy.zeros(1000))
    assert not caplog.records
    for name in "array", "other", "array":
        clupy.parallel(work)(**{name: array})
    for _ in range(10):
        clupy.parallel(work)(changing)
    [message] = [record.message for record in caplog.records]
    assert ".work was given the same 2 MB in 10 calls, 21 MB in all" in message and "ref = clupy.share(array)" in message
    clupy.wait_all(list(clupy._current_engine().calls()), PATIENCE)
    del array, changing
    assert not any("told_of_once" in str(place) for place in clupy._repeated)


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
    assert len(taken) < 1000 + 2 * clupy.MAP_READ
    squares.close()
    assert list(clupy.map(pow, range(10), [2] * 7, chunk_size=3)) == [n * n for n in range(7)]
    assert list(clupy.map(square, [])) == []


def test_map_reads_a_slow_source_item_by_item_and_one_that_waits_for_results():
    gate = queue.Queue()

    def source():
        yield 1
        while (value := gate.get()) < 50:
            yield value
        raise LookupError("no more")                      # raised where the next result would be
    results = []
    with pytest.raises(LookupError, match="no more"):
        for result in clupy.map(lambda n: n + 1, source()):
            results.append(result)
            gate.put(result + 10)
    assert results == [2, 13, 24, 35, 46]


def test_map_gathers_short_items_into_calls_and_a_slow_one_holds_up_only_what_follows():
    def process_and_time(n):
        if n == 500:
            time.sleep(0.5)
        return n, os.getpid(), time.monotonic()
    taken = []
    for n, pid, done in clupy.map(process_and_time, range(2000)):
        taken.append((n, pid, done, time.monotonic()))
    assert [n for n, *_ in taken] == list(range(2000))
    slow = taken[500][2]
    assert taken[499][3] < slow                           # what was done before it came before it
    assert taken[1999][2] < slow or taken[501][2] < slow + PATIENCE
    calls = clupy.failures.calls
    assert list(clupy.map(square, range(10_000))) == [n * n for n in range(10_000)]
    assert clupy.failures.calls - calls < 1000            # not a call for each


def test_what_is_done_of_a_call_that_takes_long_comes_before_its_end_though_nothing_else_runs():
    """All items but the first are in one call here, which is all that there is."""
    clupy.connect(slots=1)
    assert list(clupy.map(square, range(3))) == [0, 1, 4]

    def last_waits(n, path):
        until(lambda: n < 30 or os.path.exists(path))
        return n
    results = clupy.map(last_waits, iter(range(31)), itertools.repeat(f"{os.getcwd()}/go"))
    assert [next(results) for _ in range(30)] == list(range(30))
    open("go", "w").close()
    assert next(results) == 30


def test_a_map_is_not_over_before_the_last_item_is_sent_by_whatever_thread(monkeypatch):
    class Chunk(clupy._Chunk):
        def __init__(self, items, job):
            if items == [39] and threading.current_thread() is not threading.main_thread():
                time.sleep(2)                                # its thread has taken the item just now
            super().__init__(items, job)
    monkeypatch.setattr(clupy, "_Chunk", Chunk)
    clupy.connect(slots=2)
    results = clupy.map(square, iter(range(40)), chunk_size=1)
    first = next(results)
    time.sleep(1)                                            # meanwhile all others are sent, and answered
    assert [first, *results] == [n * n for n in range(40)]


def test_a_large_item_makes_small_calls_for_a_while_only():
    job = clupy._Map(None, square, [range(10 ** 6)], 2)
    job._engine = types.SimpleNamespace(capacity=2)

    def sent(size, items):
        chunk = clupy._Chunk([0] * items, job)
        chunk.size, job._call = size, lambda *_: None
        job._start(chunk)
        return job._count()
    assert sent(8 << 20, 1) == 1                             # over CHUNK_BYTES
    counts = [sent(10 * count, count) for count in [1] * 20]
    assert counts[0] == 1 and counts[-1] == clupy.CHUNK_ITEMS and counts == sorted(counts)


def test_map_does_no_item_twice_though_calls_give_back_what_they_have_not_begun(tmp_path):
    def note(n):
        with open(tmp_path / "ledger", "a") as file:
            file.write(f"{n}\n")
        time.sleep(0.02 if n % 50 == 0 else 0)
        return n
    assert list(clupy.map(note, range(400))) == list(range(400))
    assert sorted(map(int, (tmp_path / "ledger").read_text().split())) == list(range(400))


def test_of_the_items_of_a_map_only_those_at_fault_fail(tmp_path):
    def taken(items):
        results = []
        try:
            for result in items:
                results.append(result)
        except Exception as error:
            return len(results), error
        return len(results), None

    def dies(n):
        with open(tmp_path / "starts", "a") as file:
            file.write(f"{n}\n")
        if n == 300:
            os._exit(3)
        return n
    count, error = taken(clupy.map(dies, range(1000), retries=1))
    assert count == 300 and type(error) is clupy.WorkerDied and "while running" in str(error) and "dies" in str(error)
    assert (tmp_path / "starts").read_text().split().count("300") <= 2
    count, error = taken(clupy.map(square, [1, 2, threading.Lock(), 4]))
    assert count == 2 and "argument 1 ('x'), a _thread.lock" in str(error)
    count, error = taken(clupy.map(fails, ["on purpose"] * 3))
    assert count == 0 and type(error) is ValueError
    assert "in fails" in "".join(traceback.format_exception(error))
    count, error = taken(clupy.map(square, [1, clupy.parallel(fails)("early"), 3]))
    assert count == 1 and type(error) is clupy.ArgumentFailed


def test_an_item_whose_worker_dies_is_tried_as_often_as_a_call(tmp_path):
    def dies(n, starts):
        with open(tmp_path / "starts", "a") as file:
            file.write(f"{n}\n")
        time.sleep(0.02)                                  # long items are calls by themselves
        if n == 5 and (tmp_path / "starts").read_text().split().count("5") <= starts:
            os.kill(os.getpid(), signal.SIGKILL)
        return n
    for run in clupy.map, clupy.Executor().map:
        (tmp_path / "starts").write_text("")
        assert list(run(dies, range(10), [2] * 10)) == list(range(10))
        assert (tmp_path / "starts").read_text().split().count("5") == 3
    with pytest.raises(clupy.WorkerDied, match="try 3 of 3"):
        list(clupy.map(dies, range(10), [9] * 10))


def test_map_takes_iterables_for_what_they_are():
    numpy = importlib.import_module("numpy")
    assert list(clupy.map(int, numpy.nditer(numpy.arange(4)))) == [0, 1, 2, 3]
    assert list(clupy.map(sum, numpy.ndindex(3))) == [0, 1, 2]
    assert list(clupy.map(int, numpy.arange(4))) == [0, 1, 2, 3]
    shrinking, count = list(range(20_000)), 0
    for _ in clupy.map(square, shrinking):
        count += 1
        if shrinking:
            shrinking.pop()
    assert count == 20_000
    changing = []
    assert list(clupy.Executor().map(len, ((changing.append(n), changing)[1] for n in range(5)))) == [1, 2, 3, 4, 5]


def test_a_callback_that_raises_whatever_it_likes_keeps_nobody_from_hearing():
    first = clupy.parallel(sleepy)(0.1, 3)
    first.add_done_callback(lambda done: sys.exit(1))
    assert clupy.parallel(square)(first).result(PATIENCE) == 9


def test_time_outs_and_deaths_count_once_as_tries(tmp_path):
    def late():
        with open(tmp_path / "starts", "a") as file:
            file.write("x")
        time.sleep(60)
    for retries in 0, 2:
        (tmp_path / "starts").write_text("")
        call = clupy.parallel(late, retry_on=clupy.CallTimeout, timeout=0.2, retries=retries, delay=0)()
        until(call.running)
        error = call.exception(PATIENCE)
        assert type(error) is clupy.CallTimeout and f"tried {clupy.amount(retries + 1, 'time')}" in error.__notes__[0]
        assert (tmp_path / "starts").read_text() == "x" * (retries + 1)


def test_an_executor_s_callback_at_the_program_s_end_is_told_that_it_is_too_late(tmp_path):
    done = run_script(tmp_path, """
        import clupy, time
        def work(x):
            time.sleep(0.2)
            return x
        executor = clupy.Executor()
        executor.submit(work, 1).add_done_callback(lambda done: executor.submit(work, done.result()).result())
    """)
    assert "cannot submit a call after the program has begun to end" in done.stderr


class Unreadable:
    def __reduce__(self):
        return int, ("not a number",)


def test_map_takes_items_and_results_as_they_are_when_they_are_made():
    buffer = [0]

    def filled():
        for n in range(5):
            buffer[0] = n
            yield buffer
    assert list(clupy.map(lambda found: found[0], filled())) == list(range(5))
    kept = [0]

    def again(n):
        kept[0] = n
        return kept
    assert list(clupy.map(again, range(50))) == [[n] for n in range(50)]

    def odd(n):
        return Unreadable() if n == 7 else n
    results = clupy.map(odd, range(10))
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="not a number"):
        next(results)

    async def later(n):
        await asyncio.sleep(0)
        return n
    assert list(clupy.map(later, iter(range(5)))) == list(range(5))


def test_calls_have_no_dicts_of_their_own(tmp_path):
    """Each would be 400 bytes, in every call of a program whose first calls are made at once."""
    done = run_script(tmp_path, """
        import clupy, gc
        def dicts():
            gc.collect()
            return sum(type(thing) is dict for thing in gc.get_objects())
        clupy.connect(slots=2)
        before = dicts()
        calls = [clupy.parallel(abs)(n) for n in range(5000)]
        waiting = dicts() - before
        assert clupy.wait_all(calls, 30)
        print(waiting, dicts() - before)
        """)
    waiting, over = map(int, done.stdout.split())
    assert waiting < 1000 and over < 1000


def test_the_end_of_an_executor_waits_for_what_a_chunk_gave_back(cluster, monkeypatch):
    over = clupy._Map._over

    def slowly(job, chunk, call):
        time.sleep(0.05 * (len(chunk.items) > 1))  # meanwhile none of its calls is unfinished
        over(job, chunk, call)
    monkeypatch.setattr(clupy._Map, "_over", slowly)
    with clupy.Executor(master=cluster.address) as executor:
        results = executor.map(lambda n: time.sleep(0.02) or n, range(64))
    assert list(results) == list(range(64))


def test_a_map_of_many_small_calls_takes_few_threads(tmp_path):
    """One at a time sees to what is over; another ends before it waits for more."""
    done = run_script(tmp_path, """
        import clupy, threading
        clupy.connect(slots=2)
        most = 0
        for count, result in enumerate(clupy.map(abs, range(20_000), chunk_size=1)):
            assert result == count
            if count % 50 == 0:
                most = max(most, sum(thread.name == clupy.JOB_THREAD for thread in threading.enumerate()))
        print(most)
        """)
    assert int(done.stdout) <= 3


def test_maps_in_calls_have_their_parts_too():
    def outer(n):
        return list(clupy.map(lambda x: time.sleep(0.02) or x, range(n)))
    assert clupy.parallel(outer)(30).result(PATIENCE) == list(range(30))


def test_the_executor_s_map_begins_at_once_and_has_the_standard_s_options():
    read = []

    def source():
        for n in range(100):
            read.append(n)
            yield n
    with clupy.Executor() as executor:
        executor.map(square, source())                     # whose results nobody takes
        assert read == list(range(100))
        assert list(executor.map(square, range(100), chunksize=7)) == [n * n for n in range(100)]
        for wrong in {"chunksize": 0}, {"buffersize": 0}:
            with pytest.raises(ValueError):
                executor.map(square, [1], **wrong)
        with pytest.raises(TimeoutError):
            list(executor.map(time.sleep, [0, 60], timeout=0.5))
    read.clear()
    with clupy.Executor() as executor:
        results = executor.map(square, source(), buffersize=3)
        assert next(results) == 0
        until(lambda: len(read) >= 4)
        assert [next(results) for _ in range(5)] == [1, 4, 9, 16, 25] and len(read) <= 10
        results.close()


def test_map_raises_where_the_failing_item_is():
    items = clupy.map(lambda n: 10 // n, [5, 2, 0, 1])
    assert [next(items), next(items)] == [2, 5]
    with pytest.raises(ZeroDivisionError):
        next(items)
    items = clupy.map(lambda n: 10 // n, [5, 2, 0, 1], chunk_size=4)
    assert [next(items), next(items)] == [2, 5]
    with pytest.raises(ZeroDivisionError):
        next(items)


def process_pool(workers):
    """A pool that forks: from 3.14 on they start a fork server, which stays when they have ended."""
    return concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))


def test_the_executor_gives_the_same_answers_as_a_process_pool():
    def story(executor):
        with executor:
            a = [f.result(PATIENCE) for f in [executor.submit(pow, n, 3) for n in range(50)]]
            b = list(executor.map(pow, range(20), range(20), chunksize=4))
            failed = executor.submit(int, "x")
            done, rest = concurrent.futures.wait([executor.submit(abs, -n) for n in range(9)], timeout=PATIENCE)
            error = failed.exception(PATIENCE)
            return a, b, type(error), error.args, sorted(f.result() for f in done), len(rest)
    assert story(clupy.Executor(2)) == story(process_pool(2))


def test_an_executor_gets_as_many_workers_as_it_asks_for_on_the_embedded_cluster():
    with clupy.Executor(max_workers=5) as executor:
        begun = time.monotonic()
        pids = {f.result(PATIENCE) for f in [executor.submit(sleepy_pid, 0.5) for _ in range(5)]}
    assert len(pids) == 5 and time.monotonic() - begun < PATIENCE


def test_an_executor_whose_end_has_come_takes_no_more_calls_and_its_futures_are_done():
    for _ in range(20):
        with clupy.Executor(2) as executor:
            futures = [executor.submit(square, n) for n in range(10)]
        assert all(future.done() for future in futures) and futures[9].value == 81
    executor = clupy.Executor(2)
    clupy.close()
    for ended in executor, futures and executor:
        with pytest.raises(RuntimeError, match="cannot submit"):
            ended.submit(square, 3)


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


def overlap(folder, *_):
    """How many of these run at once."""
    mine = os.path.join(folder, str(os.getpid()))
    open(mine, "w").close()
    time.sleep(0.05)
    together = len(os.listdir(folder))
    os.unlink(mine)
    return together


class Overlapping:
    def method(self, folder):
        return overlap(folder)


@clupy.parallel(max=1)
def one_at_a_time(folder):
    return overlap(folder) if table else 0


table = [b"x" * 100_000]


def test_max_bounds_a_function_however_often_it_is_captured_anew(tmp_path):
    clupy.connect(slots=3)
    folder, data, grows = str(tmp_path), bytes(100_000), []

    def large(folder):
        return overlap(folder) if data else 0

    def changing(folder):
        return overlap(folder) if grows else 0

    def calls(kind, n):
        grows.append(n)
        table.append(n)
        return {
            "a large closure": lambda: clupy.parallel(large, max=1)(folder),
            "a list that grows": lambda: clupy.parallel(changing, max=1)(folder),
            "a lambda over the loop": lambda: clupy.parallel(lambda folder: overlap(folder, n), max=1)(folder),
            "a partial": lambda: clupy.parallel(functools.partial(overlap, folder, n), max=1)(),
            "methods of many objects": lambda: clupy.parallel(Overlapping().method, max=1)(folder),
            "a decorated function": lambda: one_at_a_time(folder),
        }[kind]()
    for kind in ("a large closure", "a list that grows", "a lambda over the loop", "a partial", "methods of many objects",
                 "a decorated function"):
        futures = [calls(kind, n) for n in range(6)]
        assert {future.result(PATIENCE) for future in futures} == {1}, kind


def test_fifty_calls_of_which_one_may_run_want_one_slot(cluster):
    clupy.connect(cluster.address)
    single = clupy.parallel(sleepy, max=1)
    first, *others = [single(60) for _ in range(50)]
    until(first.running)
    assert [(row["wanted"], row["share"]) for row in cluster.status()["clients"].values()] == [(1, 1)]
    assert [future.running() for future in others].count(True) <= 1        # sent ahead, behind the first
    assert clupy.parallel(square)(3).result(PATIENCE) == 9                 # others may have the second one
    clupy.close()


def test_when_those_are_cancelled_that_a_max_lets_through_the_next_ones_run():
    clupy.connect(slots=2)
    assert clupy.wait_all([clupy.parallel(sleepy)(0.3) for _ in range(2)], PATIENCE)         # both slots are open
    single = clupy.parallel(sleepy, max=1)
    for delay in range(0, 200, 20):                            # the second one waits, is about to begin, or runs
        running, waiting, last = single(60), single(60), single(0.0, "last")
        until(running.running)
        busy = clupy.parallel(sleepy, retries=0)(60)           # no slot is idle when the first one's has ended
        until(busy.running)
        assert running.cancel()
        time.sleep(delay / 1000)
        assert waiting.cancel() and last.result(10) == "last" and busy.cancel()


def test_a_cancelled_call_takes_its_nested_ones_along_though_its_server_does_not_answer(cluster):
    def outer():
        return clupy.parallel(sleepy)(60).result()
    clupy.connect(cluster.address)
    result = clupy.parallel(outer)()
    until(lambda: any(call._parent and call.running() for call in clupy._engine.calls()))
    cluster.servers[0].process.send_signal(signal.SIGSTOP)
    try:
        result.cancel()
        until(lambda: not clupy._engine.calls(), 5)
    finally:
        cluster.servers[0].process.send_signal(signal.SIGCONT)
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_a_call_counts_for_max_again_when_its_nested_calls_have_ended(tmp_path):
    def outer(folder):
        nested = clupy.parallel(square)(2).result()
        open(os.path.join(folder, "goes on"), "w").close()
        while not os.path.exists(os.path.join(folder, "end")):
            time.sleep(0.02)
        return nested
    clupy.connect(slots=2)
    single = clupy.parallel(outer, max=1)
    first = single(str(tmp_path))
    until((tmp_path / "goes on").exists)
    (tmp_path / "goes on").unlink()
    second = single(str(tmp_path))
    time.sleep(0.4)
    assert not (tmp_path / "goes on").exists()                 # though a slot is idle
    (tmp_path / "end").touch()
    assert first.result(PATIENCE) == second.result(PATIENCE) == 4


def test_a_future_can_be_awaited_and_the_executor_used_from_asyncio():
    async def story():
        loop = asyncio.get_running_loop()
        with clupy.Executor() as executor:
            other = loop.run_in_executor(executor, square, 5)
            return await clupy.parallel(square)(4), await other, await asyncio.gather(*[
                clupy.parallel(square)(n) for n in range(20)])
    assert asyncio.run(story()) == (16, 25, [n * n for n in range(20)])

    async def stops():
        await asyncio.wait_for(clupy.parallel(lambda: next(iter(())))(), PATIENCE)
    with pytest.raises(RuntimeError, match="StopIteration"):               # as a coroutine that raises it
        asyncio.run(stops())


def test_who_stops_awaiting_a_call_cancels_it():
    clupy.connect(slots=1)
    future = clupy.parallel(sleepy)(60)

    async def gives_up():
        await asyncio.wait_for(future, 0.2)
    with pytest.raises(TimeoutError):
        asyncio.run(gives_up())
    assert future.cancelled() and clupy.parallel(square)(3).result(10) == 9


def test_an_executor_that_is_shut_down_finishes_what_runs_and_cancels_what_waits_if_that_is_wanted():
    clupy.connect(slots=2)
    executor, idles = clupy.Executor(1), clupy.parallel(sleepy)(0.2)
    running, *waiting = [executor.submit(sleepy, 60 if n else 0.6) for n in range(5)]
    until(running.running)
    assert idles.wait(PATIENCE)                                # its slot looked at those that wait, and may not have one
    neighbour = clupy.parallel(sleepy)(0.1, "not its own")
    executor.shutdown(cancel_futures=True)
    assert running.result(PATIENCE) is None and {future.cancelled() for future in waiting} == {True}
    assert neighbour.result(PATIENCE) == "not its own"
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)


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


def test_a_function_that_returns_one_buffer_again_and_again_gives_each_result_its_own():
    buffer = bytearray(100_000)

    def fill(n):
        buffer[:] = bytes([n]) * len(buffer)
        return buffer
    clupy.connect(slots=1)
    filled = clupy.parallel(fill)
    results = [filled(n) for n in range(100)]
    assert [set(result.result(PATIENCE)) for result in results] == [{n} for n in range(100)]


# ==== Lanes: large buffers between two processes of one machine ===============

def holders(name="clupy-lanes"):
    """The pids of this test run, this process included, that have lanes open or mapped."""
    found = set()
    for pid in {os.getpid(), *processes()}:
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/maps") as maps:
                links = [maps.read()]
            for number in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    links.append(os.readlink(f"/proc/{pid}/fd/{number}"))
            if name in str(links):
                found.add(pid)
    return found


def lanes_of(size):
    """Those of the only slot, after a call that has and gives so many bytes."""
    clupy.connect(slots=1)
    assert call(bytes.swapcase, bytes(size)) == bytes(size)
    return until(clupy._engine.pool.slots)[0].lanes


def feed(frames, data, step):
    messages = []
    while data:
        space = frames.space()
        count = min(step, len(space), len(data))
        space[:count] = data[:count]
        messages += frames.filled(count)
        data = data[count:]
    return messages


@pytest.fixture(params=["lanes", "socket"])
def way(request, monkeypatch):
    """By lanes, and as if client and worker were on two machines."""
    if request.param == "socket":
        monkeypatch.setattr(clupy.Lanes, "accepted", lambda lanes, _: lanes.close())
        monkeypatch.setattr(clupy.Lanes, "offer", lambda lanes, key: None)
    return request.param


def test_large_buffers_are_their_owners_own_whichever_way_they_go(way):
    numpy = pytest.importorskip("numpy")

    def change(array, by):
        array += by                                            # it is the call's to write
        kept.append(array)
        return array, [int(old[0]) for old in kept]
    kept = []
    lanes = lanes_of(1 << 20)
    assert (lanes._warm > 0) == (way == "lanes")
    array, results = numpy.zeros(5 << 20, numpy.uint8), []
    changed = clupy.parallel(change)
    for n in range(8):
        results.append(changed(array, 100))
        array[:] = n + 1                                       # ... and this the client's, as soon as the call is made
    values = [result.result(PATIENCE) for result in results]
    for n, (value, seen) in enumerate(values):
        assert set(numpy.unique(value)) == {100 + n} and seen == [100 + before for before in range(n + 1)]
        value[:] = 0                                           # no other result has this memory
    sizes = [1, 1 << 16, (1 << 16) + 1, 300_000, 5_000_001, 1 << 20]
    parts = call(lambda parts: [part[::-1] for part in parts], [os.urandom(size) for size in sizes])
    assert [len(part) for part in parts] == sizes
    blobs = [os.urandom(size) for size in sizes]
    assert call(lambda parts: [part[::-1] for part in parts], blobs) == [blob[::-1] for blob in blobs]


def test_what_does_not_fit_into_lanes_goes_by_the_socket(monkeypatch):
    monkeypatch.setattr(clupy, "LANE_ROOM", 3 << 20)           # of the client alone
    lanes = clupy.Lanes()
    pid, number = lanes.offer(b"key")
    assert not clupy.Lanes().accept((pid, number), b"another key")
    other = clupy.Lanes()
    assert other.accept((pid, number), b"key")
    lanes.accepted(True)
    places = [lanes.put(memoryview(bytes([n]) * (1 << 20))) for n in range(4)]
    assert all(places[:3]) and places[3] == 0 == lanes.put(memoryview(bytes(clupy.LARGE - 1)))
    assert [bytes(other.take(place, 1 << 20)) for place in places[:3]] == [bytes([n]) * (1 << 20) for n in range(3)]
    lanes.released(other.unused()[1:2])
    assert lanes.put(memoryview(bytes(2 << 20))) == 0          # there is a gap in the middle, of 1 MiB
    assert lanes.put(memoryview(bytes(1 << 20))) == places[1]
    lanes.released(places)
    assert lanes.put(memoryview(bytes(3 << 20))) == places[0]
    lanes.released(places[:1])
    lanes.trim()
    assert os.fstat(number).st_blocks * 512 == clupy.LANE_UNIT
    for place, size in (places[0], 1 << 20), (other._theirs + (3 << 20), 1), (0, 10), (other._theirs, 1 << 40):
        with pytest.raises(clupy.ProtocolError, match="where none can be"):
            (lanes if size == 1 << 20 else other).take(place, size)
    lanes.close()
    other.close()
    with pytest.raises(clupy.ProtocolError, match="where none can be"):
        other.take(places[0], 1)


@pytest.mark.parametrize("step", [100, 1 << 20])
def test_frames_say_the_place_of_what_is_in_lanes_and_what_is_free_again(step):
    client, worker = clupy.Lanes(), clupy.Lanes()
    client.accepted(worker.accept(client.offer(b"key"), b"key"))
    data = [os.urandom(size) for size in (100_000, 1000, 200_000)]
    message = ("a", [pickle.PickleBuffer(part) for part in data])
    frame = b"".join(clupy.encode(message, client))
    assert 1000 < len(frame) < 2000 and len(client._lent) == 2
    [(_, parts)] = feed(clupy.Frames(lanes=worker), frame, step)
    assert [bytes(part) for part in parts] == data
    back = feed(clupy.Frames(lanes=client), b"".join(clupy.encode(("b",), worker)), step)
    assert back == [("released", list(client._lent)), ("b",)]
    assert clupy.encode(("b",), worker) == clupy.encode(("b",))
    with pytest.raises(clupy.ProtocolError, match="a connection that has none"):
        feed(clupy.Frames(), frame, step)
    client.close()
    worker.close()


def decoy(size=None, seals=True, key=b"key"):
    """Something like what a client offers, but for one thing."""
    number = os.memfd_create("clupy-decoy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(number, size or clupy.LANE_UNIT + 2 * clupy.LANE_ROOM)
    os.pwrite(number, clupy.proof(key, b"lanes"), 0)
    if seals:
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return number


DECOYS = {
    "none": decoy,
    "another's": lambda: decoy(key=b"another"),
    "too small": lambda: decoy(size=1 << 20),
    "can be shrunk": lambda: decoy(seals=False),
    "no file": lambda: os.eventfd(0),
    "nothing": lambda: None,
}


@pytest.mark.parametrize("what", DECOYS)
def test_a_worker_takes_no_lanes_but_those_of_its_client(what):
    number, worker = DECOYS[what](), clupy.Lanes()
    assert worker.accept((os.getpid(), number), b"key") == (what == "none")
    worker.close()
    if number is not None:
        os.close(number)
        assert not worker.accept((os.getpid(), number), b"key")
    assert os.getpid() not in holders("clupy-decoy")


def test_a_client_whose_lanes_its_worker_cannot_have_uses_the_socket(monkeypatch, caplog):
    caplog.set_level("DEBUG", "clupy")
    offer = clupy.Lanes.offer
    monkeypatch.setattr(clupy.Lanes, "offer", lambda lanes, key: offer(lanes, b"of another slot"))
    assert lanes_of(5 << 20)._warm == 0 and "no lanes, large buffers use the slot's socket: the worker cannot" in caplog.text
    assert not holders()


def test_lanes_and_spare_memory_are_given_back_when_nothing_uses_them(monkeypatch):
    monkeypatch.setattr(clupy, "IDLE_MEMORY_TIME", 0.5)
    lanes = lanes_of(20 << 20)
    assert call(len, bytearray(20 << 20)) == 20 << 20
    assert os.getpid() in holders() and holders() & workers()
    until(lambda: os.fstat(lanes._file).st_blocks * 512 == clupy.LANE_UNIT and not clupy.spare._free)
    assert call(bytes.swapcase, bytes(20 << 20)) == bytes(20 << 20)
    clupy.close()
    assert not holders()


def test_a_worker_that_is_killed_leaves_nothing_and_its_call_starts_with_what_it_was_given(tmp_path, way):
    def change_and_die(array, path):
        array[:] = bytes(len(array))
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return array
    before = bytearray(b"x" * (5 << 20))
    clupy.connect(slots=1)
    assert call(lambda array, path: (set(array), change_and_die(array, path))[0], before, tmp_path / "died") == {ord("x")}
    clupy.close()
    assert not holders()


def test_a_client_that_is_killed_leaves_no_lanes(tmp_path, cluster):
    done = run_script(tmp_path / "client", """
        import clupy, os, signal
        def large(array):
            import time
            if array is not None:
                return array
            time.sleep(60)
        assert clupy.parallel(large)(bytes(5 << 20)).result(30) == bytes(5 << 20)
        call = clupy.parallel(large)(None)
        while not call.running(): pass
        os.kill(os.getpid(), signal.SIGKILL)
        """, check=False, CLUPY_MASTER=cluster.address)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: not holders())


def test_a_forked_child_has_its_own_arrays_and_no_lanes():
    def fork(array):
        if (pid := os.fork()) == 0:
            array[:] = bytes(len(array))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), array
    clupy.connect(slots=1)
    code, array = call(fork, bytearray(b"x" * (5 << 20)))
    assert code == 0 and set(array) == {ord("x")}
    if (pid := os.fork()) == 0:
        array[:] = bytes(len(array))
        os._exit(os.getpid() in holders())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and set(array) == {ord("x")}
    assert call(bytes.swapcase, b"x" * (5 << 20)) == b"X" * (5 << 20)


def test_the_memory_of_an_argument_is_free_as_soon_as_its_call_is_over(tmp_path):
    def note(array):
        def wait():
            until(lambda: clupy.spare._free)
            (tmp_path / "free").touch()
        assert not clupy.spare._free
        threading.Thread(target=wait, daemon=True).start()
    numpy = pytest.importorskip("numpy")
    clupy.connect(slots=1)
    call(note, numpy.zeros(5 << 20, numpy.uint8))
    until((tmp_path / "free").exists)                          # while the worker waits for the next


def test_huge_memory_is_used_again_when_the_last_view_of_it_is_gone(monkeypatch):
    spare = clupy.Spare(20 << 20)
    monkeypatch.setattr(clupy, "spare", spare)
    first = clupy.memory(10 << 20)
    first[:5] = b"first"
    part = first[:5]
    del first
    assert not spare._free
    second = clupy.memory(10 << 20)
    assert bytes(part) == b"first" != bytes(second[:5])
    del part
    third = clupy.memory((10 << 20) - 5000)                    # a bit less does, too
    assert bytes(third[:5]) == b"first" and len(third) == (10 << 20) - 5000
    del second, third
    assert len(spare._free) == 2
    large = clupy.memory(20 << 20)                             # these are not large enough
    del large
    assert [len(pages) >> 20 for pages in spare._free] == [10, 10]     # ... and it is more than may be kept
    spare.trim(60)
    assert len(spare._free) == 2
    late = clupy.memory(10 << 20)
    spare.trim()
    del late                                                   # nobody takes any: it is not kept
    assert not spare._free


# ==== joblib, scikit-learn, multiprocessing's managers ========================

@pytest.fixture
def joblib_on_clupy():
    joblib = importlib.import_module("joblib")
    clupy.register_joblib()
    with joblib.parallel_config(backend="clupy"):
        yield joblib


def test_joblib_runs_in_the_cluster(joblib_on_clupy):
    joblib = joblib_on_clupy
    assert joblib.effective_n_jobs(-1) == clupy.slots()
    calls = [joblib.delayed(square)(n) for n in range(2000)]
    assert joblib.Parallel()(calls) == [n * n for n in range(2000)]
    assert os.getpid() not in joblib.Parallel()(joblib.delayed(os.getpid)() for _ in range(4))
    results = joblib.Parallel(return_as="generator")(calls[:10])
    assert next(results) == 0 and list(results) == [n * n for n in range(1, 10)]
    with pytest.raises(ValueError, match="on purpose"):
        joblib.Parallel()([joblib.delayed(fails)("on purpose")] + [joblib.delayed(time.sleep)(60) for _ in range(10)])
    assert joblib.Parallel()(calls[:3]) == [0, 1, 4]          # its workers were killed, others took their place


def test_joblib_inside_joblib_uses_the_cluster_too(joblib_on_clupy):
    joblib = joblib_on_clupy

    def inner(n):
        found = joblib.Parallel(n_jobs=2)(joblib.delayed(os.getpid)() for _ in range(n))
        return os.getpid() not in found
    assert all(joblib.Parallel(n_jobs=2)(joblib.delayed(inner)(n) for n in range(1, 5)))


def test_joblib_shares_large_arrays_and_drops_them_after(joblib_on_clupy):
    numpy = importlib.import_module("numpy")
    joblib, array = joblib_on_clupy, numpy.ones(1_000_000)

    def looks(array, n):
        return bool(array.flags.writeable), float(array[n])
    found = joblib.Parallel()(joblib.delayed(looks)(array, n) for n in range(40))
    assert found == [(False, 1.0)] * 40                    # one copy for all
    until(lambda: not clupy.served)


def test_joblib_bounds_threads_and_runs_initializers(joblib_on_clupy):
    joblib = joblib_on_clupy

    def threads():
        import threadpoolctl
        import numpy                                      # noqa: F401, its BLAS has threads
        return [library["num_threads"] for library in threadpoolctl.threadpool_info()]

    def setup(value):
        os.environ["SET_UP"] = value
    with joblib.parallel_config(backend="clupy", inner_max_num_threads=1):
        assert all(set(found) == {1} for found in joblib.Parallel()(joblib.delayed(threads)() for _ in range(2)))
    names = joblib.Parallel(initializer=setup, initargs=("yes",))(joblib.delayed(os.getenv)("SET_UP") for _ in range(3))
    assert names == ["yes"] * 3


def test_scikit_learn_gives_the_same_on_clupy_as_on_loky():
    joblib = importlib.import_module("joblib")
    model_selection, ensemble = (importlib.import_module(f"sklearn.{name}") for name in ("model_selection", "ensemble"))
    X, y = importlib.import_module("sklearn.datasets").load_iris(return_X_y=True)
    clupy.register_joblib()

    def fitted():
        search = model_selection.GridSearchCV(ensemble.RandomForestClassifier(5, random_state=0), {"max_depth": [1, 3]}, cv=2)
        forest = ensemble.RandomForestClassifier(10, random_state=0, n_jobs=2).fit(X, y)
        search.fit(X, y)
        return search.best_params_, search.cv_results_["mean_test_score"].tolist(), forest.predict_proba(X).tolist()
    alone = fitted()
    with joblib.parallel_config(backend="clupy", n_jobs=2):
        assert fitted() == alone


def test_a_manager_of_multiprocessing_can_be_used_in_calls():
    with multiprocessing.get_context("fork").Manager() as manager:
        squares = manager.dict()
        assert clupy.wait_all([clupy.parallel(squares.__setitem__)(n, n * n) for n in range(4)], PATIENCE)
        assert dict(squares) == {0: 0, 1: 1, 2: 4, 3: 9}


def test_what_a_callback_calls_belongs_to_the_call_that_it_is_for():
    """Also where its thread has run callbacks of another call before."""
    def outer(n):
        chained = concurrent.futures.Future()
        clupy.parallel(square)(n).add_done_callback(
            lambda done: clupy.parallel(square)(done.result()).add_done_callback(lambda last: chained.set_result(last.result())))
        return chained.result(20)
    with clupy.Executor(1) as executor:
        assert list(executor.map(outer, range(4))) == [0, 1, 16, 81]


# ==== What a client shows: progress, timeline =================================

@pytest.fixture(params=["tqdm", "a plain line"])
def bar(request, monkeypatch):
    """What progress is shown with."""
    if request.param == "tqdm":
        monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)       # else it has a thread for ever
    else:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    return request.param


def on_screen(run, screen=None):
    """What run() gives, and what it shows on standard error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", screen := screen or io.StringIO())
        return run(), screen.getvalue()


def test_progress_is_shown_while_calls_are_waited_for(bar):
    futures = [clupy.parallel(sleepy)(0.3, n) for n in range(4)] + [clupy.parallel(fails)("x")]
    assert on_screen(lambda: clupy.wait_all(futures, PATIENCE, progress=True)) == (True, "")       # nobody would see it
    done, text = on_screen(lambda: clupy.wait_all(futures, PATIENCE, progress="always"))
    assert done and "5/5" in text and "1 failed, 0 running" in text and text.endswith("\n")
    assert futures[-1]._unseen and futures[-1].failure                                          # looking on is no asking
    results, text = on_screen(lambda: list(clupy.map(sleepy, [0.3] * 9, itertools.count(), chunk_size=2, progress="always")))
    assert results == list(range(9)) and "9/9" in text and re.search("0 failed, [12] running", text)
    some, text = on_screen(lambda: sum(1 for _ in clupy.as_completed(iter(futures), progress="always")))
    assert some == 5 and "5/5" in text
    results, text = on_screen(lambda: list(clupy.map(square, (n for n in range(3)), progress="always")))
    assert results == [0, 1, 4] and re.search("3 items|3/[?] items", text)
    never = clupy.parallel(time.sleep)(100)
    done, text = on_screen(lambda: clupy.wait_all([never], 0.5, progress=True), Terminal())
    assert not done and "0/1" in text and "left" not in text
    never.cancel()


def test_a_progress_that_nobody_goes_on_with_ends_with_its_iterator(bar):
    some = clupy.map(square, itertools.count(), progress="always")
    assert on_screen(lambda: next(some))[0] == 0 and "clupy-progress" in {thread.name for thread in threading.enumerate()}
    on_screen(some.close)
    assert "clupy-progress" not in {thread.name for thread in threading.enumerate()}


def die_once(path):
    with contextlib.suppress(FileExistsError), open(path, "x"):
        os._exit(3)
    return "alive"


def parent_of_four():
    return [clupy.parallel(square)(n).result() for n in range(4)]


def test_a_timeline_shows_what_became_of_each_call_and_where(tmp_path, cluster):
    clupy.connect(cluster.address)
    path = tmp_path / "run.json"
    with pytest.raises(ZeroDivisionError), clupy.timeline(path):
        with pytest.raises(RuntimeError, match="run.json"), clupy.timeline(path):
            pass
        futures = [clupy.parallel(square)(n) for n in range(500)]
        assert clupy.wait_all(futures, PATIENCE)
        futures += [clupy.parallel(sleepy)(0.05) for _ in range(10)]
        futures += [clupy.parallel(die_once)(str(tmp_path / "died")), clupy.parallel(fails)("x"),
                    clupy.parallel(time.sleep, timeout=0.2)(100), clupy.parallel(parent_of_four)()]
        cancelled = clupy.parallel(sleepy)(100)
        assert clupy.wait_all(futures, PATIENCE)
        until(cancelled.running)
        cancelled.cancel()
        until(lambda: cancelled._slot.state == clupy.OVER)
        1 / 0
    assert clupy.BaseEngine.timeline is None
    assert [type(future.failure) for future in futures[-3:]] == [ValueError, clupy.CallTimeout, type(None)]
    events = json.loads(path.read_text())["traceEvents"]
    names = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    bars = [event for event in events if event["ph"] == "X"]
    assert all(names[bar["pid"], bar["tid"]] == f"{bar['args']['server']} {bar['args']['worker']}" for bar in bars)
    outcomes = collections.Counter((bar["name"], bar["args"]["try"]) for bar in bars)
    assert outcomes == {("square", 1): 504, ("sleepy", 1): 10, ("parent_of_four", 1): 1, ("die_once (lost)", 1): 1,
                        ("die_once", 2): 1, ("fails (failed)", 1): 1, ("sleep (timed out)", 1): 1, ("sleepy (cancelled)", 1): 1}
    assert {event["name"] for event in events if event["ph"] == "i"} == {"worker exit code 3", "worker signal 9 (Killed)"}
    for row in names:
        mine = sorted((bar["ts"], bar["ts"] + bar["dur"]) for bar in bars if (bar["pid"], bar["tid"]) == row)
        assert all(begin <= end for begin, end in mine) and all(one[1] <= two[0] for one, two in itertools.pairwise(mine))
    slept = [bar for bar in bars if bar["name"] == "sleepy"]
    assert all(bar["dur"] >= 50_000 and bar["args"]["run"] >= 0.05 and bar["args"]["wait"] >= 0 for bar in slept)
    with pytest.raises(FileNotFoundError), clupy.timeline(tmp_path / "no" / "run.json"):
        pass                                                             # before the run, and not after it
    with pytest.raises(clupy.ClupyError, match="in the program"):
        call(clupy.timeline, "run.json")


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
        assert {parent_of(pid) for pid in done.stdout.split()} == {server.process.pid for server in cluster.servers}


def test_status_shows_servers_slots_and_clients(cluster):
    clupy.connect(cluster.address)
    future = clupy.parallel(sleepy)(60)
    tables = until(lambda: (t := cluster.status()) and sum(s["used"] for s in t["servers"].values()) and t)
    server, = tables["servers"].values()
    client, = tables["clients"].values()
    assert server["slots"] == 2 and client["share"] >= 1 and not server["draining"]
    text = shown(cluster, "status")
    own = shown(cluster, "libraries")
    assert "the server's own Python on" in own and "here:" not in own
    assert re.search(f"  pytest +{re.escape(clupy_master.installed('pytest'))}", own)
    assert "SERVER" in text and "CLIENT" in text and "ready" in text
    assert json.loads(shown(cluster, "status", "--json"))["servers"].keys() == tables["servers"].keys()
    assert future.cancel()


def test_a_slot_whose_connection_breaks_is_given_back(tmp_path):
    def first_sleeps(path):
        with open(path, "a") as file:
            file.write("x")
        time.sleep(60 if os.path.getsize(path) == 1 else 0)
    clupy.connect(slots=1)
    future = clupy.parallel(first_sleeps)(str(tmp_path / "x"))
    until((tmp_path / "x").exists)
    engine = clupy._engine
    engine.soon(lambda: [slot.transport.abort() for slot in engine.pool.slots()])
    assert future.wait(PATIENCE) and (tmp_path / "x").read_text() == "xx"


def test_a_slot_that_cannot_be_opened_hurts_no_neighbour_and_is_tried_again(monkeypatch, caplog):
    clupy.connect(slots=2)
    running = clupy.parallel(sleepy, retries=0)(2, "undisturbed")
    until(running.running)
    connect, failures = clupy.connect_socket, [OSError(errno.ETIMEDOUT, "a lost packet")]

    async def fails_once(host, port):
        if failures:
            raise failures.pop()
        return await connect(host, port)
    monkeypatch.setattr(clupy, "connect_socket", fails_once)
    pids = {future.result(PATIENCE) for future in [clupy.parallel(sleepy_pid)(0.5) for _ in range(8)]}
    assert running.result(PATIENCE) == "undisturbed" and len(pids) == 2
    assert caplog.text.count("a lost packet") == 1


def test_what_keeps_every_slot_from_opening_is_the_outcome_of_the_calls(monkeypatch):
    def broken():
        raise RuntimeError("a strange module")
    monkeypatch.setattr(clupy, "own_modules", broken)
    clupy.connect(slots=1)
    with pytest.raises(clupy.ClupyError, match="no slot can be opened.*a strange module"):
        clupy.parallel(square)(3).result(PATIENCE)


def test_a_client_with_few_descriptors_uses_the_slots_that_it_can_open(tmp_path):
    with Cluster(tmp_path, slots=12) as cluster:
        done = run_script(tmp_path / "client", """
            import clupy, os, resource, time
            def pid():
                time.sleep(0.05)
                return os.getpid()
            clupy.connect()
            used = len(os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, used + 24))
            calls = [clupy.parallel(pid, retries=0)() for _ in range(60)]
            assert clupy.wait_all(calls, 30)
            print(len({call.value for call in calls}))
            """, CLUPY_MASTER=cluster.address)
    assert 1 < int(done.stdout) < 12 and done.stderr.count("raise the limit (ulimit -n)") == 1


def test_the_board_tells_a_call_without_a_deadline_from_no_call():
    clupy.connect(slots=1)
    assert clupy.parallel(square, timeout=1000)(2).result(PATIENCE) == 4
    boards = clupy._engine.embedded[1].workers.processes.values

    def states():
        with contextlib.suppress(RuntimeError, ValueError):            # a worker comes or goes just now
            return [process.begun() for process in list(boards())]
    until(lambda: states() and all(deadline == clupy_server.IDLE for _, deadline in states() or [(0, 0)]))
    future = clupy.parallel(sleepy)(60)
    until(lambda: any(number and deadline == clupy_server.UNBOUND for number, deadline in states() or ()))
    future.cancel()
    until(lambda: states() == [(0, clupy_server.IDLE)])                # the next worker has not begun anything


def test_a_program_that_ignores_or_takes_the_ends_of_its_children_still_hears_of_dead_workers(tmp_path):
    for how in "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "threading.Thread(target=reap, daemon=True).start()":
        done = run_script(tmp_path, f"""
            import clupy, os, signal, threading, time
            def reap():
                while True:
                    try: os.wait()
                    except ChildProcessError: time.sleep(0.01)
            clupy.connect(slots=1)
            {how}
            print(type(clupy.parallel(os._exit, retries=0)(3).exception(30)).__name__, clupy.parallel(abs)(-1).result(30))
            """)
        assert done.stdout == "WorkerDied 1\n"


REFUSALS = """
import errno, faulthandler, fcntl, mmap, os, resource, signal, socket

def refuse(owner, name, refused=lambda *args: True, error=OSError):
    original = getattr(owner, name)
    def refusing(*args, **keywords):
        if refused(*args):
            raise error(errno.EPERM, "refused by the test") if error is OSError else error("refused by the test")
        return original(*args, **keywords)
    setattr(owner, name, refusing)

class Map(mmap.mmap):
    def madvise(self, *_):
        raise OSError(errno.ENOSYS, "refused by the test")

REFUSALS = {
    "pidfd_open": lambda: refuse(os, "pidfd_open"),
    "memfd_create": lambda: refuse(os, "memfd_create"),
    "F_SETOWN": lambda: refuse(fcntl, "fcntl", lambda fd, command, *_: command == fcntl.F_SETOWN),
    "F_SETSIG": lambda: refuse(fcntl, "fcntl", lambda fd, command, *_: command == fcntl.F_SETSIG),
    "faulthandler.register": lambda: refuse(faulthandler, "register", error=RuntimeError),
    "setrlimit": lambda: refuse(resource, "setrlimit"),
    "MADV_HUGEPAGE": lambda: setattr(mmap, "mmap", Map),
    "TCP_KEEPIDLE": lambda: refuse(socket.socket, "setsockopt", lambda s, _, key, *__: key == socket.TCP_KEEPIDLE),
    "TCP_INFO": lambda: refuse(socket.socket, "getsockopt", lambda s, _, key, *__: key == socket.TCP_INFO)}
for name in os.environ.get("REFUSED", "").split():
    REFUSALS[name]()
"""


@pytest.mark.parametrize("refused", [
    "pidfd_open", "memfd_create", "F_SETOWN", "F_SETSIG", "faulthandler.register", "setrlimit", "MADV_HUGEPAGE",
    "TCP_KEEPIDLE", "TCP_INFO",
    "pidfd_open memfd_create F_SETOWN F_SETSIG faulthandler.register setrlimit MADV_HUGEPAGE TCP_KEEPIDLE TCP_INFO"])
def test_a_system_call_that_is_refused_costs_no_more_than_what_it_is_for(tmp_path, refused):
    (tmp_path / "sitecustomize.py").write_text(REFUSALS)
    env = {"PYTHONPATH": f"{tmp_path}:{HERE}", "REFUSED": refused, "CLUPY_MEMORY_LIMIT": "2GB"}
    with Cluster(tmp_path, **env) as cluster:
        done = run_script(tmp_path / "client", """
            import clupy, os, time
            print(clupy.parallel(len)(clupy.parallel(bytes)(8 << 20).result(30)).result(30))
            print(type(clupy.parallel(os._exit, retries=0)(3).exception(30)).__name__)
            print(type(clupy.parallel(time.sleep, timeout=0.3)(60).exception(30)).__name__)
            print(len({clupy.parallel(os.getpid)().result(30) for _ in range(20)}) <= 2)
            """, **env, CLUPY_MASTER=cluster.address)
        assert done.stdout == "8388608\nWorkerDied\nCallTimeout\nTrue\n" and not done.stderr
        until(lambda: len(workers()) == 2)                     # the dead are known as such and replaced, none is started twice
        cluster.servers[0].process.kill()
        until(lambda: not workers())


def test_master_and_server_raise_their_limit_of_descriptors_and_calls_have_the_old_one(tmp_path):
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    start = "import resource, clupy\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, {}))\nclupy.main({!r})"
    address = f"127.0.0.1:{free_port()}"
    server = ["serve", "--master", address, "--listen", "127.0.0.1:0", "--slots", "1"]
    with Program(tmp_path / "master", "-c", start.format(hard, ["master", "--listen", address])) as master:
        until(lambda: answers(address))
        with Program(tmp_path / "server", "-c", start.format(hard, server)) as server:
            clupy.connect(address)
            assert call(resource.getrlimit, resource.RLIMIT_NOFILE)[0] == 200
            for program in master, server:
                soft, = re.findall(r"Max open files +(\d+)", open(f"/proc/{program.process.pid}/limits").read())
                assert int(soft) > 200
            clupy.close()


def test_a_server_with_few_descriptors_does_with_the_workers_it_could_start(tmp_path):
    with Cluster(tmp_path, servers=0) as cluster, Program(tmp_path / "few", "-c", f"""if True:
            import resource, clupy
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            clupy.main(["serve", "--master", "{cluster.address}", "--listen", "127.0.0.1:0", "--slots", "16"])
            """) as server:
        until(lambda: any(row["slots"] < 16 for row in cluster.status()["servers"].values()))
        row, = cluster.status()["servers"].values()
        assert 2 <= row["slots"] <= 6                      # of 16, since a worker takes 9 of the descriptors
        until(lambda: len(workers()) == row["slots"])
        clupy.connect(cluster.address)
        assert clupy.wait_all([clupy.parallel(sleepy)(0.1) for _ in range(20)], PATIENCE)
        old = {clupy.parallel(os.getpid)().result(PATIENCE) for _ in range(3)}
        assert clupy.wait_all([clupy.parallel(os._exit, retries=0)(3) for _ in range(4)], PATIENCE)
        until(lambda: len(workers()) >= row["slots"] - 1)      # there was room for others then, but for our connection
        with contextlib.ExitStack() as strangers:
            for _ in range(5):
                strangers.enter_context(contextlib.closing(socket.create_connection(row["address"].rsplit(":", 1))))
            assert run_script(tmp_path / "other", "import clupy\nprint(clupy.parallel(abs)(-1).result(30))",
                              CLUPY_MASTER=cluster.address).stdout == "1\n"
        assert clupy.parallel(os.getpid)().result(PATIENCE) not in old
    assert server.log.count("trying again") == 1
    assert "64 open files" in server.log and "ulimit -Hn" in server.log and "for 16 slots" in server.log


def test_a_client_that_embeds_a_cluster_has_the_descriptors_for_it_and_its_calls_have_the_old_limit(tmp_path):
    done = run_script(tmp_path, """
        import clupy, resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        clupy.connect(slots=6)
        print(clupy.parallel(resource.getrlimit)(resource.RLIMIT_NOFILE).result(30) == (64, hard))
        together = [clupy.parallel(__import__("time").sleep)(0.5) for _ in range(12)]
        print(clupy.wait_all(together, 30))
        """)
    assert done.stdout == "True\nTrue\n" and not done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_fails_at_a_workers_start_is_undone_said_once_and_tried_again(caplog, monkeypatch, when):
    failing, tries = threading.Event(), []
    failing.set()
    popen = subprocess.Popen

    def start(command, **keywords):
        if when == "before" and failing.is_set():
            if "template" not in command[-1]:              # for which the worker's own start takes the place at once
                tries.append(time.monotonic())
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return popen(command, **keywords)

    def watch(process, *args, original=clupy_server.Process._watch_end):
        if when == "after" and failing.is_set():
            tries.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")
        return original(process, *args)
    monkeypatch.setattr(clupy_server.subprocess, "Popen", start)
    monkeypatch.setattr(clupy_server.Process, "_watch_end", watch)
    monkeypatch.setattr(clupy_server, "RETRY_START", (0.1, 0.2))
    clupy.connect(slots=2)
    future = clupy.parallel(square)(3)
    until(lambda: len(tries) >= 5)
    assert len(workers()) <= 1 and all(later - sooner > 0.05 for sooner, later in itertools.pairwise(tries[:5]))
    assert len([record for record in caplog.records if "cannot start a worker" in record.getMessage()]) == 1
    failing.clear()
    assert future.result(PATIENCE) == 9


def test_a_server_that_cannot_have_new_libraries_finishes_what_runs_there():
    clupy.connect(slots=1)
    future = clupy.parallel(sleepy, retries=0)(1.5, "finished")
    until(future.running)
    engine = clupy._engine
    engine.soon(lambda: [engine.libraries.cannot_be_built(link, "no") for link in list(engine.pool.links.values())])
    assert future.result(PATIENCE) == "finished"


def test_an_executor_with_a_cluster_of_its_own_leaves_it_when_its_calls_are_done(cluster):
    executor = clupy.Executor(1, master=cluster.address)
    future = executor.submit(sleepy, 0.5, "done")
    until(lambda: len(cluster.status()["clients"]) == 1)
    executor.shutdown(wait=False)
    assert future.result(PATIENCE) == "done"
    until(lambda: not cluster.status()["clients"])


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
    brief = cluster.add_server(CLUPY_DRAIN_TIME="1s")
    long = clupy.parallel(sleepy, retries=0)(60)
    until(long.running)
    brief.process.terminate()
    assert brief.process.wait(10) == 0                         # a second is all that calls have
    with pytest.raises(clupy.WorkerDied):
        long.result(PATIENCE)


def test_servers_and_clients_have_one_name_in_every_log_in_status_and_in_errors(tmp_path):
    """Of two servers with a call each one is killed, and the other one drained."""
    script = """if True:
        import clupy, logging, time
        logging.basicConfig(level=logging.INFO)
        calls = [clupy.parallel(time.sleep, retries=n)(60) for n in (0, 1)]
        calls[0].fail(lambda error: print(error, flush=True))
        clupy.wait_all(calls)
        """
    with Cluster(tmp_path, servers=2, slots=1, CLUPY_DRAIN_TIME=1) as cluster, \
            Program(tmp_path / "client", "-c", script, CLUPY_MASTER=cluster.address) as client:
        until(lambda: sum(server["used"] for server in cluster.status()["servers"].values()) == 2)
        master, (drained, lost) = cluster.master, cluster.servers
        ours = f"@{socket.gethostname()} python {client.process.pid}"
        names = [re.search(r"server (\S+ \(\w{4}\)) listens", server.log)[1] for server in cluster.servers]
        text = shown(cluster, "status")
        assert all(f"\n{name} " in text for name in names) and ours in text
        for program in master, drained, lost:
            assert re.search(rf"client \w+{ours} is here, from 127.0.0.1:", program.log)
        lost.process.kill()
        until(lambda: f"server {names[1]} is lost" in master.log)
        told = until(lambda: re.search(r"server (.*) was lost; (none|1) of our calls start again", client.log))
        assert told[1] == names[1]
        if told[2] == "none":                      # it was the one that may start once
            until(lambda: client.out.read_text().startswith(f"server {names[1]} was lost while"))
        drained.process.terminate()
        until(lambda: f"server {names[0]} has ended" in master.log)
        assert f"server {names[0]} drains" in master.log and f"server {names[0]} is lost" not in master.log
        until(lambda: f"server {names[0]} has ended, as it said before" in client.log)
        assert re.search(rf"client \w+{ours} is gone: .*; it had workers \(1\), for \d+ s", drained.log)
        client.process.kill()
        until(lambda: f"{ours} is gone" in master.log)


def test_a_server_says_once_that_it_keeps_trying_to_find_a_master(tmp_path):
    with Program(tmp_path, "-m", "clupy", "serve", "--port", free_port(), "--slots", 1) as server:
        until(lambda: "Connection refused; trying again until one answers" in server.log)
        time.sleep(2)
        assert server.log.count("no master") == 1


def test_the_embedded_cluster_says_nothing_that_is_no_error_to_who_logs_from_info_on(tmp_path):
    text = """
        import clupy, logging, os
        logging.basicConfig(level=logging.LEVEL)
        clupy.parallel(os._exit, retries=0)(3).exception(30)
        print(clupy.parallel(abs)(-1).result(30))
        """
    done = run_script(tmp_path, text.replace("LEVEL", "INFO"))
    assert done.stdout == "1\n" and re.fullmatch(r"INFO:clupy:connected to \d+ cores? of this machine\n", done.stderr)
    said = run_script(tmp_path, text.replace("LEVEL", "DEBUG")).stderr
    assert "DEBUG:clupy.master:master listens" in said and "DEBUG:clupy.server:worker" in said


def test_slots_are_served_in_the_order_in_which_they_came_and_each_number_once(tmp_path):
    """A client by hand, that asks for more slots than there are."""
    def ask_for(number):
        sock = stack.enter_context(socket.create_connection(address, timeout=PATIENCE))
        sock.sendall(clupy.preamble(clupy.SLOT) + clupy.slot_head(control.key, control.how, session, number, False))
        return sock

    async def until_said(kind):
        while (message := await control.receive())[0] != kind:
            pass
        return message[1:]

    async def story():
        nonlocal control, session
        control = await clupy.dial(address, clupy.CONTROL, SECRET.encode(), clupy.read_settings("client"))
        control.send("hello", "id", "by hand", ((), ()), {}, True)
        session, *_ = await until_said("welcome")
        waiting = [(number, ask_for(number)) for number in (7, 5, 6, 4)]
        assert ask_for(5).recv(1) == b""                       # a replay of what opens a slot
        while waiting:
            number, sock = waiting.pop(0)
            assert len(await asyncio.to_thread(sock.recv, clupy.PROOF_SIZE)) == clupy.PROOF_SIZE
            assert select.select([sock for _, sock in waiting], [], [], 0.1)[0] == []
            control.send("close", number)
            assert (await until_said("ended"))[0] == number
        control.abort()
    control = session = None
    with Cluster(tmp_path, slots=1) as cluster, contextlib.ExitStack() as stack:
        row, = cluster.status()["servers"].values()
        address = "127.0.0.1", int(row["address"].split(":")[1])
        asyncio.run(story())


def test_what_a_server_remembers_of_a_clients_slots_is_bounded_and_none_opens_twice():
    session, total = clupy_server.Session(None, None), 3 * clupy_server.NUMBERS_KEPT
    for number in range(1, total, 2):                      # the others are other servers'
        assert session.first_use(number) and not session.first_use(number)
    assert not any(map(session.first_use, range(1, total, 2))) and len(session._numbers) == clupy_server.NUMBERS_KEPT


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
             "half": clupy.preamble(b"M"), "version": b"clupy\x63M\x0b", "python": b"clupy\x01M\x63",
             "no proof": clupy.preamble(b"C") + b"x" * 32, "forged slot": clupy.preamble(b"S") + b"x" * 57,
             "pickle": pickle.dumps(os.system)}


def test_strangers_are_refused_within_five_seconds_and_with_one_line_each(cluster):
    clupy.connect(cluster.address)
    server = next(iter(cluster.status()["servers"].values()))["address"].replace(socket.gethostname(), "127.0.0.1")
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
    for mode in 0o644, 0o640, 0o602:
        (tmp_path / ".clupy" / "secret").chmod(mode)
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


def test_a_secret_of_few_characters_is_refused_wherever_it_comes_from(tmp_path, monkeypatch):
    settings = clupy.read_settings("master", secret_file=str(tmp_path / "new" / "secret"))
    monkeypatch.setenv("CLUPY_SECRET", "fifteen letters")
    with pytest.raises(clupy.SecretError, match="CLUPY_SECRET is shorter than 16"):
        clupy.find_secret(settings, create=True)
    monkeypatch.setenv("CLUPY_SECRET", "")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f"secret.{os.getpid()}").touch()         # of a process of our number that died while it made one
    assert len(clupy.find_secret(settings, create=True)) == 64 and clupy.find_secret(settings) == clupy.find_secret(settings)
    assert len(os.listdir(tmp_path / "new")) == 2 and (tmp_path / "new" / "secret").stat().st_mode & 0o777 == 0o600
    (tmp_path / "new" / "secret").write_text("fifteen letters")
    with pytest.raises(clupy.SecretError, match="shorter than 16"):
        clupy.find_secret(settings)


def test_a_server_has_a_slot_for_each_core_that_it_may_use():
    done = subprocess.run([sys.executable, "-c", "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "
                           "import clupy; print(clupy.read_settings('server').slots)"], env=environ(), capture_output=True)
    assert done.stdout == b"1\n"


CGROUP = "/sys/fs/cgroup"


def test_clupy_never_takes_its_own_map_and_open_for_python_s():
    with open(clupy.__file__) as file:
        calls = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Call)]
    assert [f"line {call.lineno}" for call in calls if getattr(call.func, "id", "") in ("map", "open")] == []


@pytest.mark.parametrize("files, expected", [
    ({}, 4),
    ({"/proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "150000 100000\n"}, 2),         # a container's own: rounded up
    ({"/proc/self/cgroup": "0::/\n", f"{CGROUP}/cpu.max": "max 100000\n"}, 4),
    ({"/proc/self/cgroup": "0::/a/b c\n", f"{CGROUP}/a/cpu.max": "300000 100000", f"{CGROUP}/a/b c/cpu.max": "max 100000"}, 3),
    ({"/proc/self/cgroup": "0::/../x\n", f"{CGROUP}/cpu.max": "10000 100000"}, 1),
    ({"/proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n0::/\n", f"{CGROUP}/cpu/cpu.cfs_quota_us": "200000",
      f"{CGROUP}/cpu/cpu.cfs_period_us": "100000"}, 2),        # a container that sees its own group as the outermost
    ({"/proc/self/cgroup": "1:cpu:/a\n", f"{CGROUP}/cpu/a/cpu.cfs_quota_us": "-1", f"{CGROUP}/cpu/a/cpu.cfs_period_us": "9"}, 4),
    ({"/proc/self/cgroup": "1:cpu:/a\n", f"{CGROUP}/cpu/a/cpu.cfs_quota_us": "900000",
      f"{CGROUP}/cpu/a/cpu.cfs_period_us": "100000"}, 4),
])
def test_the_cores_are_no_more_than_the_control_groups_leave(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    for name, text in files.items():
        os.makedirs(os.path.dirname(f"{tmp_path}{name}"), exist_ok=True)
        with open(f"{tmp_path}{name}", "w") as file:
            file.write(text)
    assert clupy.cores(str(tmp_path)) == expected


def test_a_user_without_a_home_has_the_embedded_cluster_and_is_told_what_a_real_one_needs(tmp_path):
    """HOME is unset, and no entry in the table of users has the number."""
    hidden = "import os, pwd\nos.environ.pop('HOME', None)\ndef none(uid):\n    raise KeyError(uid)\npwd.getpwuid = none\n"
    done = run_script(tmp_path, hidden + "import clupy\nprint(clupy.parallel(abs)(-1).result(30))", CLUPY_SECRET="")
    assert (done.stdout, done.stderr) == ("1\n", "")
    for command in "master", "serve", "status":
        done = run_script(tmp_path, f"{hidden}import clupy\nraise SystemExit(clupy.main(['{command}']))", CLUPY_SECRET="",
                          check=False)
        assert done.returncode == 1 and re.match(f"clupy {command}: .*~/.clupy/secret: this user .* no home folder; set HOME",
                                                 done.stderr), done.stderr
    assert os.listdir(tmp_path) == ["script.py"]


def test_numerical_libraries_get_the_cores_divided_by_the_slots_unless_the_user_says_otherwise(monkeypatch):
    names = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    clupy.connect(slots=1)
    threads = clupy.parallel(lambda names: [os.environ[name] for name in names])(names).result(PATIENCE)
    assert threads == [str(len(os.sched_getaffinity(0)))] * 2 + ["7"]


def test_a_worker_never_has_the_secret(cluster):
    clupy.connect(cluster.address)
    assert "CLUPY_SECRET" not in clupy.parallel(lambda: dict(os.environ))().result(PATIENCE)


@pytest.mark.parametrize("name, words", [("PYTHON", "it runs Python 3.{}, this process runs Python 3.{};"),
                                         ("VERSION", "it speaks protocol version {}, this is {};")])
def test_another_python_or_protocol_is_refused_on_both_sides(cluster, monkeypatch, name, words):
    usual = getattr(clupy, name)
    monkeypatch.setattr(clupy, name, 99)
    with pytest.raises(clupy.VersionMismatch, match=words.format(usual, 99)):
        clupy.connect(cluster.address)
    until(lambda: words.format(99, usual) in cluster.master.log)


@pytest.fixture
def certificates(tmp_path, monkeypatch):
    """In the working directory: good.pem and good.key; expired.pem, elsewhere.pem and another.pem of the same key, the first two
    by and for who they are, the last by another; another.key, locked.key with a passphrase, and rubbish.pem."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    monkeypatch.chdir(folder)
    new = "req -x509 -days 2 -subj /CN={0} -addext subjectAltName={1} -out {0}.pem"
    for command in ("ecparam -genkey -name prime256v1 -noout -out good.key",
                    "ecparam -genkey -name prime256v1 -noout -out another.key",
                    new.format("good", "IP:127.0.0.1") + " -key good.key",
                    new.format("elsewhere", "DNS:elsewhere") + " -key good.key",
                    new.format("another", "IP:127.0.0.1") + " -key another.key",
                    "x509 -in good.pem -signkey good.key -days 0 -out expired.pem",              # before it is used
                    "pkey -in good.key -aes256 -passout pass:secret -out locked.key"):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    (folder / "rubbish.pem").write_text("no certificate")
    return folder


def test_everything_travels_under_tls_where_a_certificate_is_configured(tmp_path, certificates):
    paths = {f"CLUPY_TLS_{key}": str(certificates / name)
             for key, name in (("CERT", "good.pem"), ("KEY", "good.key"), ("CA", "good.pem"))}
    with Cluster(tmp_path, CLUPY_MAX_NESTED=1, **paths) as cluster:
        (certificates / "good.key").unlink()                    # it was read, for workers, too
        clupy.connect(cluster.address, tls_ca="good.pem")
        neighbour = clupy.parallel(sleepy, retries=0)(2, "undisturbed")
        until(neighbour.running)
        with pytest.raises(clupy.ClupyError, match="max_nested is 1"):     # slots are turned away before TLS has begun
            clupy.parallel(depth)(5).result(PATIENCE)
        assert neighbour.result(PATIENCE) == "undisturbed"
        results = [clupy.parallel(square)(n) for n in range(500)]
        assert clupy.wait_all(results, PATIENCE) and [r.value for r in results] == [n * n for n in range(500)]
        data = os.urandom(5_000_000)
        assert clupy.parallel(lambda data: data[::-1])(data).result(PATIENCE) == data[::-1]


@pytest.mark.parametrize("cert, ca, words, log", [
    ("good", "another", "its certificate is not accepted: self-signed.*tls_ca must", "our certificate: the peer's tls_ca is"),
    ("elsewhere", "elsewhere", "not accepted: IP address mismatch.*name the host as", "our certificate: it is not for the host"),
    ("expired", "expired", "not accepted: certificate has expired; renew it", "does not accept our certificate: it has expired"),
    ("good", None, "it speaks TLS with a certificate, this process without one.*who connects tls_ca",
     "it speaks TLS without a certificate, this process with one"),
    (None, "good", "it speaks TLS without a certificate, this process with one",
     "it speaks TLS with a certificate, this process without one; who listens needs")])
def test_tls_that_cannot_be_is_an_error_at_once_and_told_on_both_sides(tmp_path, certificates, cert, ca, words, log):
    address, ca = f"127.0.0.1:{free_port()}", ca and str(certificates / f"{ca}.pem")
    given = {"CLUPY_TLS_CERT": certificates / f"{cert}.pem", "CLUPY_TLS_KEY": certificates / "good.key"} if cert else {}
    with Program(tmp_path / "master", "-m", "clupy", "master", "--listen", address, **given) as master:
        until(lambda: answers(address))
        with pytest.raises(clupy.SecretError, match=words):
            clupy.connect(address, tls_ca=ca)
        given = {"CLUPY_TLS_CA": ca} if ca else {}
        with Program(tmp_path / "server", "-m", "clupy", "serve", "--master", address, **given) as server:
            assert server.process.wait(PATIENCE) == 1 and re.search(f"clupy serve: {address}: .*{words}", server.log)
        until(lambda: len(re.findall(f"refused 127.0.0.1:[0-9]+: .*{log}", master.log)) == 2)


@pytest.mark.parametrize("settings, words", [
    ({"tls_cert": "good.pem", "tls_key": "another.key"}, "tls_key is 'another.key', but that is not the key of tls_cert"),
    ({"tls_cert": "good.pem", "tls_key": "rubbish.pem"}, "tls_key is 'rubbish.pem', but that holds no private key"),
    ({"tls_cert": "rubbish.pem", "tls_key": "good.key"}, "tls_cert is 'rubbish.pem', but that holds no certificate"),
    ({"tls_cert": "good.pem", "tls_key": "locked.key"}, "tls_key has a passphrase, which a master or server cannot ask for"),
    ({"tls_cert": "good.pem"}, "tls_cert is 'good.pem', but that holds no private key"),
    ({"tls_key": "good.key"}, "tls_key is 'good.key', but there is no tls_cert"),
    ({"tls_ca": "good.key"}, "tls_ca is 'good.key', but that holds no certificate"),
    ({"tls_ca": "nowhere"}, "tls_ca is 'nowhere', but there is no such file")])
def test_certificates_and_keys_that_are_of_no_use_are_told_at_the_start(certificates, settings, words):
    for role in "master", "server":
        with pytest.raises(clupy.ConfigurationError, match=words):
            clupy.read_settings(role, **settings)


@contextlib.contextmanager
def relay(monkeypatch, talk):
    """Have this process's connections go through a relay: talk(the near socket, the far one) runs in a thread for each."""
    connect, sockets, pool = clupy.connect_socket, [], concurrent.futures.ThreadPoolExecutor(40)

    async def connect_relay(host, port):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = await connect(*listener.getsockname())
            sockets.extend([listener.accept()[0], socket.create_connection((host, port))])
        pool.submit(talk, *sockets[-2:]).add_done_callback(lambda done: [sock.close() for sock in sockets[-2:]]
                                                           if done.exception() else None)
        return near
    monkeypatch.setattr(clupy, "connect_socket", connect_relay)
    try:
        yield
    finally:
        clupy.close()
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        pool.shutdown()
        for sock in sockets:
            sock.close()


def pour(source, target, seen=None):
    """Everything from one socket to the other."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if seen is not None:
                seen.append(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def both_ways(near, far, seen=None):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(pour, near, far, seen)
        pour(far, near, seen)


HOWS = ["off", "certificate", *["on", "auto"] * clupy.has_keys()]      # of "by keys" on the Pythons that have them


@pytest.mark.parametrize("how", HOWS)
def test_who_listens_on_the_wire_hears_nothing_of_what_was_sent(tmp_path, certificates, monkeypatch, capfd, how):
    files = {"cert": "good.pem", "key": "good.key", "ca": "good.pem"} if how == "certificate" else {}
    given = {f"CLUPY_TLS_{key.upper()}": str(certificates / name) for key, name in files.items()}
    settings = {"tls_ca": "good.pem"} if files else {"encryption": how}
    given |= {} if files or how == "auto" else {"CLUPY_ENCRYPTION": how}
    seen = []
    if how == "auto":
        monkeypatch.setattr(clupy, "leaves_machine", lambda sock: True)
    monkeypatch.setattr(clupy.Lanes, "offer", lambda lanes, key: None)         # as on another machine

    def shout(text, array):
        print("PRINTED" * 10)
        return text.lower(), array.upper()
    with Cluster(tmp_path, **given) as cluster, relay(monkeypatch, lambda near, far: both_ways(near, far, seen)):
        clupy.connect(cluster.address, **settings)
        array = b"array" * 30_000
        assert clupy.parallel(shout)("ARGUMENT" * 10, array).result(PATIENCE) == ("argument" * 10, array.upper())
        until(lambda: "PRINTED" in capfd.readouterr().out)
        names = {"certificate": "encrypted by certificate", "off": "unencrypted"}
        assert f", {names.get(how, 'encrypted by the secret')}\n" in cluster.servers[0].log
    heard = b"".join(seen)
    words = [b"ARGUMENT", b"argument", b"arrayarray", b"ARRAYARRAY", b"PRINTED", b"shout", b"opened", b"share"]
    assert len(heard) > 300_000 and [word for word in words if word in heard] == (words if how == "off" else [])


def settings_with(**given):
    return types.SimpleNamespace(**{"dial_tls": None, "admit_tls": None, "encryption": "auto", **given})


@pytest.mark.parametrize("keys", [True, False])
def test_both_ends_agree_how_a_connection_goes_on(monkeypatch, keys):
    monkeypatch.setattr(clupy, "has_keys", lambda: keys)
    outcomes = {}
    ends = {"auto": {}, "on": {"encryption": "on"}, "off": {"encryption": "off"}, "certificate": {"dial_tls": 1, "admit_tls": 1},
            "both": {"dial_tls": 1, "admit_tls": 1, "encryption": "on"}}
    if not keys:
        del ends["on"]                              # refused at the start
    for (dials, mine), (admits, theirs), leaves in itertools.product(ends.items(), ends.items(), [True, False]):
        dialing, admitting = settings_with(**mine), settings_with(**theirs)
        wanted = clupy.wanted_encryption(dialing, leaves)
        agreed = clupy.agreed_encryption(admitting, wanted)
        try:
            clupy.check_certificates(wanted, agreed)
            clupy.check_agreed(dialing, agreed)
            outcomes[dials, admits, leaves] = clupy.ENCRYPTIONS[agreed].split()[-1]
        except clupy.SecretError as error:
            outcomes[dials, admits, leaves] = re.search("certificate|encryption", str(error))[0] + "!"
    expected = {("auto", "auto", True): "secret" if keys else "unencrypted", ("on", "on"): "secret", ("on", "auto"): "secret",
                ("auto", "on"): "secret", ("on", "off"): "encryption!", ("off", "on"): "encryption!"}
    for (dials, admits, leaves), outcome in outcomes.items():
        certified = len({dials, admits} & {"certificate", "both"}) if dials != admits else 2 * (dials in ("certificate", "both"))
        default = ["unencrypted", "certificate!", "certificate"][certified]
        assert outcome == expected.get((dials, admits), expected.get((dials, admits, leaves), default)), (dials, admits, leaves)


def test_encryption_by_keys_is_refused_where_python_has_none(certificates, monkeypatch):
    monkeypatch.setattr(clupy, "has_keys", lambda: False)
    for role in "master", "server", "client":
        with pytest.raises(clupy.ConfigurationError, match="encryption is on, but that needs Python 3.13.*certificates instead"):
            clupy.read_settings(role, encryption="on")
    assert clupy.read_settings("client", encryption="on", tls_ca="good.pem").dial_tls
    with pytest.raises(clupy.ConfigurationError, match="auto, on or off"):
        clupy.read_settings("client", encryption="perhaps")
    assert clupy.read_settings("client", encryption=False).encryption == "off"


@pytest.mark.skipif(not clupy.has_keys(), reason="TLS by keys is from Python 3.13 on")
def test_why_a_server_refuses_is_said_where_calls_wait_for_it(tmp_path):
    """The master takes both; the server and the client do not fit."""
    with Cluster(tmp_path, servers=0) as cluster:
        cluster.add_server("--encryption", "on")
        until(lambda: len(cluster.status()["servers"]) == 1)
        clupy.connect(cluster.address, patience=3, encryption="off")
        with pytest.raises(clupy.ClupyError, match="cannot be reached: its encryption is on, and that of this process off"):
            clupy.everywhere(abs, 1)


def test_nobody_between_talks_two_ends_out_of_encryption(cluster, monkeypatch):
    """He changes what one end wants, or what the other agrees to; each is part of what both prove."""
    monkeypatch.setattr(clupy, "has_keys", lambda: True)
    monkeypatch.setattr(clupy, "leaves_machine", lambda sock: True)
    plain = clupy.preamble(clupy.TO_MASTER)

    def change_wish(near, far):
        assert near.recv(8, socket.MSG_WAITALL) == clupy.preamble(clupy.TO_MASTER, clupy.BY_KEY)
        far.sendall(plain)
        both_ways(near, far)

    def change_answer(near, far):
        far.sendall(near.recv(8, socket.MSG_WAITALL))
        far.recv(8, socket.MSG_WAITALL)
        near.sendall(plain)
        both_ways(near, far)
    for change in [change_wish, change_answer]:
        with relay(monkeypatch, change):
            with pytest.raises(clupy.SecretError, match="another secret"):
                clupy.connect(cluster.address)
        monkeypatch.undo()
        monkeypatch.setenv("CLUPY_SECRET", SECRET)
        monkeypatch.setattr(clupy, "leaves_machine", lambda sock: True)
        if not clupy.has_keys():
            break                                   # the master would agree to nothing else


def test_who_stands_between_with_a_stolen_certificate_is_found(tmp_path, certificates, monkeypatch):
    """He lets the proofs through, and has TLS with each end."""
    def stand_between(near, far):
        for source, target, count in (near, far, 8), (far, near, 8), (near, far, 32), (far, near, 64), (near, far, 32):
            target.sendall(source.recv(count, socket.MSG_WAITALL))
        server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        server.load_cert_chain("good.pem", "good.key")
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        with server.wrap_socket(near, server_side=True) as near, client.wrap_socket(far) as far:
            far.sendall(near.recv(32))
            near.sendall(far.recv(32))
            pour(far, near)
    names = ("CERT", "good.pem"), ("KEY", "good.key"), ("CA", "good.pem")
    files = {f"CLUPY_TLS_{key}": str(certificates / name) for key, name in names}
    with Cluster(tmp_path, servers=0, **files) as cluster:
        clupy.connect(cluster.address, tls_ca="good.pem")
        clupy.close()
        with relay(monkeypatch, stand_between), pytest.raises(clupy.SecretError, match="somebody stands between"):
            clupy.connect(cluster.address, tls_ca="good.pem")
        until(lambda: "refused" in cluster.master.log and "stands between" in cluster.master.log)


@pytest.mark.parametrize("how", ["certificate", *["key"] * clupy.has_keys()])
def test_a_worker_reads_nothing_of_who_has_tls_but_not_the_slots_key(certificates, how):
    key, texts = os.urandom(32), [(certificates / name).read_text() for name in ("good.pem", "good.key")]
    by, told = (clupy.BY_CERTIFICATE, texts) if how == "certificate" else (clupy.BY_KEY, None)
    for good in True, False:
        context = ssl.create_default_context(cafile="good.pem") if told else clupy.key_context("dial", clupy.proof(key, b"tls"))
        near, far = socket.socketpair()
        with concurrent.futures.ThreadPoolExecutor(1) as pool, near, far:
            worker = pool.submit(clupy_server.TlsSocket, far, key, by, told)
            with context.wrap_socket(near, server_hostname="127.0.0.1") as tls:
                tls.sendall(clupy.tls_proof(key if good else b"guessed", b"dial tls", tls))
                if good:
                    os.close(worker.result(PATIENCE).detach())
                else:
                    with pytest.raises(clupy.SecretError, match="stands between"):
                        worker.result(PATIENCE)
        del worker, pool                           # with the exception, whose frames have the socket
        gc.collect()


@pytest.mark.skipif(not clupy.has_keys(), reason="TLS by keys is from Python 3.13 on")
@pytest.mark.parametrize("side", ["dial", "admit"])
def test_who_has_no_key_has_no_tls(certificates, side):
    """Neither one with a certificate, nor one with another key."""
    other = {"dial": "admit", "admit": "dial"}[side]
    strangers = [clupy.key_context(other, b"y" * 32)]
    if side == "dial":
        strangers.append(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        strangers[-1].load_cert_chain("good.pem", "good.key")
    else:
        strangers.append(ssl.create_default_context(cafile="good.pem"))
    for stranger, ours in [(clupy.key_context(other, b"x" * 32), True), *[(stranger, False) for stranger in strangers]]:
        near, far = socket.socketpair()
        contexts = [clupy.key_context(side, b"x" * 32), stranger]

        def shake(sock, context, at):
            with contextlib.closing(sock):
                sock.settimeout(PATIENCE)
                server = at == "admit"
                with context.wrap_socket(sock, server_side=server, server_hostname=None if server else "127.0.0.1") as tls:
                    tls.sendall(b"!")              # with 1.3 who dials is done before the other has agreed
                    assert tls.recv(1) == b"!"
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            both = [pool.submit(shake, near, contexts[0], side), pool.submit(shake, far, contexts[1], other)]
            assert [done.exception(PATIENCE) is None for done in both] == [ours, ours]


def test_a_half_open_connection_whose_time_is_over_just_now_gives_way_too():
    """Its Timeout cannot be moved any more; who comes then is served all the same."""
    class Expiring:
        def reschedule(self, when):
            raise RuntimeError("Cannot change state of expiring Timeout")
    clupy.connect(slots=1)
    listener = clupy._engine.embedded[0]._listener
    listener._settings.max_half_open = 1
    listener._half_open["who came first"] = Expiring()
    with socket.create_connection(listener.address, timeout=PATIENCE) as sock:
        sock.sendall(clupy.preamble(clupy.TO_MASTER))
        assert sock.recv(8) == clupy.preamble(clupy.TO_MASTER)


def test_who_waits_for_a_bell_looks_again_by_himself():
    """Where an interrupt kept a ring from him."""
    seen = []
    threading.Timer(0.1, seen.append, [True]).start()
    assert clupy.Bell().until(lambda: seen, PATIENCE) == [True]


def test_half_open_connections_are_few_and_the_oldest_give_way(tmp_path):
    """Who connects and says nothing keeps nobody out."""
    host = "127.0.0.1"
    with Program(tmp_path / "small", "-m", "clupy", "master", "--listen", "127.0.0.1:0", CLUPY_MAX_HALF_OPEN=3) as small:
        port = until(lambda: re.search(r"master listens on 127.0.0.1:(\d+)", small.log))[1]
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE)) for _ in range(8)]
            begun = time.monotonic()
            assert [sock.recv(1) for sock in strangers[:5]] == [b""] * 5      # the first five; the last three are still there
            assert time.monotonic() - begun < clupy.HANDSHAKE_TIME
            for sock in strangers[5:]:
                sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    sock.recv(1)
            assert tables_of(f"{host}:{port}")["servers"] == {}
        assert small.log.count("no handshake yet, and 3 others came after it (max_half_open)") >= 5


@pytest.mark.parametrize("role, kind", [(b"M", "master"), (b"C", "server"), (b"S", "server")])
def test_of_who_has_proved_nothing_few_bytes_are_read(monkeypatch, role, kind):
    """However much he sends."""
    clupy.connect(slots=1)
    master, server = clupy._engine.embedded
    address = {"master": master, "server": server}[kind].address
    read, receive = [], asyncio.selector_events.BaseSelectorEventLoop.sock_recv

    async def counting(loop, sock, count):
        data = await receive(loop, sock, count)
        read.append(len(data))
        return data
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_recv", counting)
    with socket.create_connection(address, timeout=PATIENCE) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(clupy.preamble(role) + b"x" * 100_000)
        while sock.recv(4096):
            pass
    assert 8 < sum(read) <= 256


def test_the_embedded_cluster_needs_no_certificate_and_no_encryption(certificates):
    clupy.connect(tls_ca="good.pem", encryption="on")
    assert call(square, 3) == 9 and not clupy._engine.pool.slots()[0].transport.get_extra_info("ssl_object")


def test_every_address_is_one_of_ipv4_or_ipv6(tmp_path):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    port = free_port()
    with contextlib.ExitStack() as stack:
        master = stack.enter_context(Program(tmp_path / "master", "-m", "clupy", "master", "--listen", port))
        until(lambda: answers(f"127.0.0.1:{port}"))
        for host in "127.0.0.1", "[::1]":                # each where the other looks for it
            server = stack.enter_context(Program(tmp_path / host, "-m", "clupy", "serve", "--master", f"{host}:{port}",
                                                 "--slots", 1))
            until(lambda host=host, server=server: f"connected to the master at {host}:{port}" in server.log)
            assert re.search(r"server \S+ \(\w+\) listens on every address, port ", server.log)
        assert f"master listens on every address, port {port}\n" in master.log
        for host in "127.0.0.1", "[::1]":
            clupy.connect(f"{host}:{port}")
            assert call(square, 3) == 9
            assert any(row["address"].startswith(f"{host}:") for row in tables_of(f"{host}:{port}")["clients"].values())
            clupy.close()


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


def test_a_worker_loads_neither_asyncio_nor_the_master(cluster, tmp_path):
    done = run_script(tmp_path, """
        import clupy, sys
        def loaded(): return {"asyncio", "clupy_master", "ssl", "redis", "kazoo", "yaml"} & sys.modules.keys()
        print(clupy.parallel(loaded)().result(30))
        """, CLUPY_MASTER=cluster.address)
    assert done.stdout == "set()\n"


def test_everything_of_clupy_may_be_imported_and_hides_no_builtin():
    names = {}
    exec("from clupy import *", names)
    assert "parallel" in names and not (names.keys() - {"__builtins__"}) & set(dir(builtins))


def test_the_embedded_cluster_needs_no_secret_and_listens_on_this_machine_alone(tmp_path):
    done = run_script(tmp_path, """
        import clupy, os
        print(clupy.parallel(abs)(-3).result(30))
        print({part.address[0] for part in clupy._engine.embedded})
        """, CLUPY_SECRET="", HOME=tmp_path, CLUPY_PORT=free_port())
    assert done.stdout == "3\n{'127.0.0.1'}\n" and not (tmp_path / ".clupy").exists()


def test_a_server_without_a_secret_listens_nowhere_until_there_is_one(cluster, tmp_path):
    with Program(tmp_path, "-m", "clupy", "serve", "--master", cluster.address, "--slots", 1, CLUPY_SECRET="",
                 HOME=tmp_path) as server:
        until(lambda: "there is no" in server.log)
        assert not listening(server.process.pid)
        (tmp_path / ".clupy").mkdir(mode=0o700)
        with open(tmp_path / ".clupy" / "secret", "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(SECRET)
        until(lambda: len(cluster.status()["servers"]) == 2)
        assert listening(server.process.pid)


def listening(pid):
    """The inodes of the sockets on which the process listens."""
    table = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/{pid}/net/{name}").read().splitlines()[1:]]
    inodes = {fields[9] for fields in table if fields[3] == "0A"}
    files = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return inodes & {file[len("socket:["):-1] for file in files if file.startswith("socket:[")}


# ---- Configuration

def test_settings_come_from_yaml_then_environment_then_arguments(tmp_path, monkeypatch):
    assert clupy.read_settings("server").slots == len(os.sched_getaffinity(0))
    (tmp_path / "clupy.server.yaml").write_text("slots: 3\ndrain_time: 2m\nmemory_limit: 1.5GB\n")
    settings = clupy.read_settings("server")
    assert (settings.slots, settings.drain_time, settings.memory_limit) == (3, 120.0, 3 * 2**29)
    monkeypatch.setenv("CLUPY_SLOTS", "4")
    assert clupy.read_settings("server").slots == 4
    assert clupy.read_settings("server", slots=5).slots == 5
    (tmp_path / "clupy.client.yaml").write_text("master: 7000\n")
    assert clupy.masters_of(clupy.read_settings("client")) == [("localhost", 7000)]
    (tmp_path / "clupy.client.yaml").write_text("library_check: off\noutput: off\n")      # YAML reads both as false
    settings = clupy.read_settings("client")
    assert (settings.library_check, settings.output) == ("off", False)


@pytest.mark.parametrize("text, message", [
    ("slots: 2\nslotz: 3\n", "clupy.server.yaml, line 2: unknown setting 'slotz'; did you mean 'slots'?"),
    ("slots: many\n", "line 1: slots is 'many', but must be a whole number"),
    ("drain_time: soon\n", "must be a duration"),
    ("- slots\n", "must hold lines of `key: value`"),
    ("a: [", "not YAML"), ("slots: 2\nslots: 3\n", "names a key twice"),
    ("port: 70000\n", "line 1: port is 70000, but must be a port: a whole number up to 65535"),
    ("slots: \u00b2\n", "line 1: slots is '\u00b2', but must be a whole number from 0"),
    ("port: :x\nlisten: '" + "9" * 5000 + "'\n", "but must be a port"),
    ("drain_time: 1.2.3\n", "drain_time is '1.2.3', but must be a duration"),
    (f"drain_time: 1{400 * '0'}\n", "but must be a duration"), (f"memory_limit: {400 * '9'}GB\n", "but must be a size"),
    ("encryption: [on]\n", "encryption is [True], but must be auto, on or off"),
    ('secret_file: "a\\0b"\n', "secret_file is 'a\\x00b', but must be a path"),
    ("slots: 2\nport: !!bool x\n", "not YAML: 'x'"), ("slots: 2001-06-31\n", "not YAML: day is out of range"),
    ("[" * 5000, "not YAML: maximum recursion depth exceeded"),
])
def test_a_wrong_setting_is_refused_with_file_line_and_the_nearest_valid_one(tmp_path, text, message):
    (tmp_path / "clupy.server.yaml").write_text(text)
    with pytest.raises(clupy.ConfigurationError) as caught:
        clupy.read_settings("server")
    assert message in str(caught.value)


def test_a_wrong_setting_is_called_as_the_user_calls_it_and_an_empty_variable_is_none(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-m", "clupy", "master", "--listen", "abc:xyz"], env=environ(), capture_output=True,
                          text=True)
    assert done.stderr == "clupy master: --listen is 'abc:xyz', but must be an address: HOST, HOST:PORT or PORT\n"
    with pytest.raises(clupy.ConfigurationError, match="^argument master is 'a:b', but must be an address"):
        clupy.connect("a:b")
    monkeypatch.setenv("CLUPY_SLOTS", "x")
    with pytest.raises(clupy.ConfigurationError, match="^environment variable CLUPY_SLOTS is 'x', but must be a whole number"):
        clupy.connect()
    monkeypatch.setenv("CLUPY_SLOTS", "")
    monkeypatch.setenv("CLUPY_MASTER", "")
    settings = clupy.read_settings("client")
    assert settings.master is None and settings.slots == clupy.cores() and not {"slots", "master"} & settings.given


def command(*arguments, **env):
    """`python -m clupy` with these arguments, as a subprocess.CompletedProcess."""
    return subprocess.run([sys.executable, "-m", "clupy", *map(str, arguments)], env=environ(**env), timeout=60,
                          capture_output=True, text=True)


@pytest.mark.parametrize("name, role", [("master", "master"), ("serve", "server")])
def test_every_setting_of_a_role_is_an_option_of_its_command(tmp_path, name, role):
    keys = {key for key, (roles, *_) in clupy.SETTINGS.items() if role in roles.split()}
    shown = command(name, "-h").stdout
    assert all(f"  --{key.replace('_', '-')} " in shown for key in keys) and max(map(len, shown.splitlines())) < 100
    parsed = vars(clupy.command_line().parse_args([name, *[f"--{key.replace('_', '-')}=1" for key in keys]]))
    assert {key for key, value in parsed.items() if value == "1"} == keys
    done = command(name, "--patience", "soon")
    assert done.returncode == 1 and done.stderr.startswith(f"clupy {name}: --patience is 'soon', but must be a duration")


def test_status_fails_unless_the_expected_servers_are_there_and_take_calls(tmp_path):
    with Cluster(tmp_path, servers=2, slots=1) as cluster:
        assert command("status", "--master", cluster.address, "--expect", 2).returncode == 0
        done = command("status", "--master", cluster.address, "--expect", 3)
        assert (done.returncode, done.stderr) == (1, "clupy status: only 2 servers can take calls, of 3 that are expected\n")
        clupy.connect(cluster.address)
        calls = list(clupy.everywhere(sleepy, 60).values())        # so that none can drain at once
        until(lambda: sum(row["used"] for row in cluster.status()["servers"].values()) == 2)
        cluster.servers[0].process.terminate()
        until(lambda: any(row["draining"] for row in cluster.status()["servers"].values()))
        assert command("status", "--master", cluster.address, "--expect", 2).returncode == 1
        assert all(call.cancel() for call in calls)


def test_the_log_says_as_much_as_was_asked_for(tmp_path):
    for level in "info", "error":
        address = f"127.0.0.1:{free_port()}"
        with Program(tmp_path / level, "-m", "clupy", "master", "--listen", address, "--log-level", level) as master:
            until(lambda address=address: answers(address))
        assert ("master listens" in master.log) == (level == "info") and (level == "info" or not master.log)


def test_where_pyyaml_is_missing_one_error_says_how_to_get_it(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')")
    (tmp_path / "clupy.client.yaml").write_text("slots: 2")
    script = "import clupy, sys\n"
    done = run_script(tmp_path, f"{script}clupy.connect()", check=False)
    assert done.stderr.count("Traceback") == 1 and "run: python -m pip install pyyaml" in done.stderr.splitlines()[-1]
    done = run_script(tmp_path, f"{script}sys.exit(clupy.main(['status']))", check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and done.stderr.endswith("pip install pyyaml\n")


def test_a_variable_that_is_nearly_a_setting_is_told_of(monkeypatch, caplog):
    for name in ("CLUPY_SLOTZ", "CLUPY_SECRET", "CLUPY_SOMETHING_ELSE", "CLUPY_DRAIN_TIME"):
        monkeypatch.setenv(name, "3")
    clupy.read_settings("client")
    assert [record.getMessage() for record in caplog.records] == [
        "the environment variable CLUPY_SLOTZ is no setting; did you mean CLUPY_SLOTS?"]


@pytest.mark.parametrize("host, words", [("127.0.0.1", "in use"), ("a..b", "not known")])
def test_an_address_that_cannot_be_listened_on_is_an_error_in_words(tmp_path, host, words):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"{host}:{other.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-m", "clupy", "master", "--listen", address], env=environ(), timeout=60,
                              cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert re.search(f"^clupy master: cannot listen on {address}: .*{words}.*--listen", done.stderr)


def test_a_memory_limit_in_which_no_worker_can_start_is_refused():
    with pytest.raises(clupy.ConfigurationError, match="a worker needs 64MB"):
        clupy.read_settings("server", memory_limit=100)


def test_one_slot_is_one_slot_and_one_server_one_server():
    assert clupy.amount(1, "slot") == "1 slot" and clupy.amount(0, "call") == "0 calls"
    assert repr(clupy.Cluster(1, 1, "h:1")) == "1 server, 1 slot at h:1"
    assert repr(clupy.Cluster(1, 2, None)) == "2 cores of this machine"


def test_passwords_do_not_show():
    settings = clupy.read_settings("client", redis="redis://:secret-word@host:6379/0")
    assert "secret-word" not in repr(settings) and "host:6379" in repr(settings)


# ---- Shares: tables and a clock by hand

def row(wanted, since=0.0, unreachable=(), **share):
    return clupy_master.ClientRow(wanted=wanted, since=since, heard=100.0, unreachable=frozenset(unreachable), share=share)


IDLE = 0, 0, 0, 0                                 # what a client says of its calls


def server_row(slots, held={}, **facts):
    return clupy_master.ServerRow(("h", 1), slots, held, {"name": "name", "own": {}, **facts})


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


def test_who_cannot_reach_a_server_gets_slots_where_others_could_go_elsewhere():
    servers = {"s1": server_row(1), "s2": server_row(1)}
    clients = {"free": row(5, s1=1), "picky": row(5, unreachable=["s2"])}
    assert clupy_master.shares(servers, clients, 100.0) == {"free": {"s2": 1}, "picky": {"s1": 1}}
    servers = {"s1": server_row(1), "s2": server_row(3)}
    shares = clupy_master.shares(servers, {"free": row(10), "picky": row(10, unreachable=["s2"])}, 100.0)
    assert totals(shares) == {"free": 3, "picky": 1}


def test_idle_slots_stay_with_who_has_them_until_somebody_wants_them():
    servers = {"s1": server_row(4)}
    assert clupy_master.shares(servers, {"idle": row(0, s1=4)}, 100.0) == {"idle": {"s1": 4}}
    both = {"idle": row(0, s1=4), "new": row(3)}
    assert clupy_master.shares(servers, both, 100.0) == {"idle": {"s1": 1}, "new": {"s1": 3}}
    assert clupy_master.shares(servers, {"idle": row(0, s1=4)}, 1000.0) == {"idle": {}}


def test_the_tables_of_a_new_master_leave_everybody_what_he_has_and_say_what_to_give_back():
    tables = clupy_master.Tables()
    held = {"old": 2}
    assert tables.put_server("s1", server_row(2, held=held)) and not tables.put_server("s1", server_row(2, held=held))
    assert tables.put_server("s2", server_row(1, draining=True))
    assert tables.put_client("old", "first connection", "name", 5, [], False, IDLE, 100.0)
    late = clupy_master.Tables()                            # it hears the client before the server
    late.put_client("old", "its connection", "name", 0, [], False, IDLE, 100.0)
    assert late.put_server("s1", server_row(2, held=held)) and late.share_of("old") == {"s1": (("h", 1), 2, "name")}
    tables.decide(100.0)
    assert tables.share_of("old") == {"s1": (("h", 1), 2, "name")} and not tables.starving()
    assert tables.put_client("new", "its connection", "name", 5, [], False, IDLE, 100.0) and tables.starving()
    assert not tables.put_client("new", "its connection", "name", 5, [], False, IDLE, 200.0)
    before = tables.decide(200.0)
    assert tables.share_of("old", before["old"]) == tables.share_of("new") == {"s1": (("h", 1), 1, "name")}
    assert tables.put_client("new", "its connection", "name", 0, ["s1"], False, IDLE, 300.0)     # so it had no use for it
    before = tables.decide(300.0)
    assert tables.share_of("new", before["new"]) == {"s1": (("h", 1), 0, "name")}
    assert tables.share_of("old") == {"s1": (("h", 1), 2, "name")}
    assert tables.put_server("s1", server_row(2, draining=True))
    before = tables.decide(300.0)
    assert tables.share_of("old", before["old"]) == {"s1": (("h", 1), 0, "name")} and tables.share_of("old") == {}
    assert tables.silent(401.0) == []                       # nobody wants what it has
    assert tables.put_client("new", "its connection", "name", 5, [], False, IDLE, 402.0) and tables.silent(402.0) == ["old"]
    tables.restart_clocks(402.0)                            # the master was stopped, and hears it at once
    assert tables.silent(402.0) == []
    assert tables.put_client("new", "its connection", "name", 0, [], False, IDLE, 402.0)
    assert tables.put_client("old", "second connection", "name", 5, [], False, IDLE, 402.0)
    assert not tables.drop("old", "first connection")
    assert tables.drop("old", "second connection") and list(tables.clients) == ["new"]


@hypothesis.settings(max_examples=300, deadline=None, database=None, derandomize=True)
@hypothesis.given(hypothesis.strategies.data())
def test_shares_keep_their_rules_whatever_the_tables_say(data):
    draw, few = data.draw, hypothesis.strategies.integers(0, 4)
    servers = {f"s{n}": server_row(draw(few), **({"draining": True} if draw(few) == 0 else {})) for n in range(draw(few))}
    picky = draw(hypothesis.strategies.booleans())
    some = hypothesis.strategies.frozensets(hypothesis.strategies.sampled_from(sorted(servers))) if servers and picky else None
    clients = {f"c{n}": row(draw(few) * draw(few), 100.0, () if some is None else draw(some), **{id: draw(few) for id in servers})
               for n in range(draw(few))}
    for server in servers:                                 # together they had what there was
        left = servers[server].slots
        for client in clients.values():
            client.share[server] = min(client.share[server], left)
            left -= client.share[server]
    before = {id: sum(client.share.values()) for id, client in clients.items()}
    result = clupy_master.shares(servers, clients, 100.5)
    free = {id: server.slots * server.usable - sum(share.get(id, 0) for share in result.values())
            for id, server in servers.items()}
    assert result.keys() == clients.keys() and min(free.values(), default=0) >= 0
    has = totals(result)
    for id, client in clients.items():
        assert not result[id].keys() & client.unreachable and has[id] <= max(client.wanted, before[id])
        if has[id] < client.wanted:
            assert not any(count for server, count in free.items() if server not in client.unreachable)
            assert picky or max(has.values()) <= has[id] + 1
        client.share = dict(result[id])
    again = clupy_master.shares(servers, clients, 100.5)                   # nothing moves without a cause, but that a second look
    assert picky or again == result                                        # may do better for who cannot reach all servers
    for id, client in clients.items():
        client.share = dict(again[id])
    assert clupy_master.shares(servers, clients, 100.5) == again


def test_slots_do_not_change_hands_for_a_client_that_reaches_no_server():
    clients = {"a": row(6, 100.0), "b": row(5, 100.0), "lost": row(3, 100.0, ["s0", "s1"])}
    servers, had = {"s0": server_row(3), "s1": server_row(4)}, []
    for _ in range(4):
        had.append(clupy_master.shares(servers, clients, 100.5))
        for id, client in clients.items():
            client.share = dict(had[-1][id])
    assert had[1:] == had[:1] * 3 and totals(had[0]) == {"a": 4, "b": 3, "lost": 0}


def test_a_master_that_was_stopped_judges_nobody_by_the_time_that_passed():
    async def story():
        master = clupy_master.Master(clupy.default_settings("master", listen=("127.0.0.1", 0)), SECRET.encode())
        now = time.monotonic()
        master.tables.put_client("one", "its connection", "name", 1, [], False, IDLE, now - 1000)
        master._woke = now
        assert master._now() >= now and master.tables.clients["one"].heard == now - 1000       # it was awake all the time
        master._woke = now - 10
        assert master.tables.clients["one"].heard < master._now() == master.tables.clients["one"].heard
        await master.close()
    asyncio.run(story())


def test_among_servers_alike_a_slot_is_of_the_one_with_most_free_ones():
    assert clupy_master.shares({"a": server_row(1), "b": server_row(4)}, {"c": row(1)}, 100.0) == {"c": {"b": 1}}


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


def test_a_slot_gets_a_worker_of_its_libraries_first_come_first_served_within_the_bounds():
    def slot(name, nested=False, session="client"):
        return types.SimpleNamespace(name=name, nested=nested, session=session)

    def chosen(waiting, ready, room=9, **room_nested):
        ready = [types.SimpleNamespace(libraries=libraries) for libraries in ready]
        return [(slot.name, worker.libraries) for slot, worker in
                clupy_server.assignments(waiting, ready, room, {"client": 9, "other": 9, **room_nested})]
    one, two, three = (slot(name) for name in "123")
    inner, theirs = slot("inner", nested=True), slot("theirs", nested=True, session="other")
    assert chosen([(one, "a"), (two, "b"), (three, "a")], "aab") == [("1", "a"), ("2", "b"), ("3", "a")]
    assert chosen([(one, "a"), (two, "a")], "a") == [("1", "a")]
    assert chosen([(one, "c"), (two, None), (three, "a")], "ab") == [("3", "a")]         # who cannot be served holds up nobody
    assert chosen([(one, "a"), (inner, "a"), (two, "a")], "aaa", room=1) == [("1", "a"), ("inner", "a")]
    assert chosen([(inner, "a"), (inner, "a"), (theirs, "a"), (one, "a")], "aaaa", client=1) == [
        ("inner", "a"), ("theirs", "a"), ("1", "a")]


def test_workers_are_started_where_slots_wait_then_kept_warm_and_ended_where_nobody_needs_them():
    def changes(most, awaited, spare):
        missing, needless = clupy_server.changes(most, list(awaited), "d", [types.SimpleNamespace(libraries=x) for x in spare])
        return "".join(missing), "".join(worker.libraries for worker in needless)
    assert changes(3, "", "") == ("ddd", "")
    assert changes(3, "a", "dd") == ("a", "") and changes(3, "a", "ddd") == ("a", "d")
    assert changes(2, "aaa", "d") == ("aa", "d")
    assert changes(1, "", "dda") == ("", "da")
    assert changes(0, "a", "a") == ("", "a") and changes(-1, "aa", "") == ("", "")


def test_a_workers_variables_are_without_the_secret_and_share_the_cores():
    given = {"CLUPY_SECRET": "x", "CLUPY_MASTER": "y", "CLUPY_PREFIX": "z", "MKL_NUM_THREADS": "7", "PYTHONHASHSEED": "3"}
    assert clupy_server.worker_variables(given, 10_000, b"x") == {
        "CLUPY_PREFIX": "z", "MKL_NUM_THREADS": "7", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "NUMEXPR_NUM_THREADS": "1", "VECLIB_MAXIMUM_THREADS": "1", "PYTHONHASHSEED": "3"}


def test_strings_hash_alike_in_all_workers_of_a_secret():
    seeds = {secret: clupy_server.worker_variables({}, 1, secret)["PYTHONHASHSEED"] for secret in (b"one", b"another")}
    assert seeds[b"one"] == clupy_server.worker_variables({}, 8, b"one")["PYTHONHASHSEED"] != seeds[b"another"]
    assert all(0 < int(seed) < 1 << 32 for seed in seeds.values())


def text_hashes(wanted):
    """{pid of a server: what a text hashes to in its workers} of so many servers."""
    def text_hash():
        time.sleep(0.1)
        return os.getppid(), hash("a text")
    found = {}

    def are_there():
        found.update(future.result(PATIENCE) for future in [clupy.parallel(text_hash)() for _ in range(wanted)])
        return len(found) == wanted
    until(are_there)
    return {parent_of(template): hashed for template, hashed in found.items()}


def how_it_is():
    """What a worker is to have for itself, and what it is to have as every other."""
    own, files = (os.getpid(), random.random(), uuid.uuid4(), os.urandom(8)), []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):                            # of the list itself
            files.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
    state = {"leads": os.getsid(0) == os.getpgrp() == os.getpid(), "hash": hash("a text"), "folder": os.getcwd(),
             "interpreter": (sys.argv, sys.path[:-1], tuple(sys.flags)), "main": sorted(vars(sys.modules["__main__"])),
             "threads": (threading.active_count(), threading.current_thread() is threading.main_thread()),
             "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
             "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []), "files": sorted(files), "gc": gc.isenabled(),
             "streams": (sys.stdin.read(), sys.stdout.seekable(), sys.stderr.line_buffering), "faults": faulthandler.is_enabled(),
             "left": vars(random).get("left_behind")}
    random.left_behind = True
    return own, state, os.getppid()


def test_a_forked_worker_has_what_a_started_one_has_and_nothing_of_the_one_before(monkeypatch):
    clupy.connect(slots=1)
    once = clupy.parallel(how_it_is)
    found = []
    for _ in range(3):
        found.append(once().result(PATIENCE))
        assert clupy.parallel(os._exit, retries=0)(0).exception(PATIENCE)
    template, = templates()
    assert {parent for _, _, parent in found} == {template}
    clupy.close()
    monkeypatch.setattr(clupy_server, "can_fork", lambda: False)      # as on macOS
    clupy.connect(slots=1)
    for code, how in ((3, "exit code 3"), (-9, "signal 9")):
        end = clupy.parallel(os._exit if code > 0 else os.kill, retries=0)
        found.append(once().result(PATIENCE))
        assert found[-1][2] == os.getpid() and not templates()
        arguments = [code] if code > 0 else [found[-1][0][0], -code]
        assert how in str(end(*arguments).exception(PATIENCE))
    owns, states, _ = zip(*found)
    assert all(len(set(values)) == len(found) for values in zip(*owns))
    assert states[0] == states[1] == states[2] == {**states[3], "hash": states[0]["hash"]} and states[0]["leads"]


def test_the_peak_memory_of_a_worker_is_its_own_and_not_that_of_the_program(tmp_path):
    done = run_script(tmp_path, """
        import clupy, os
        large = b"x" * (400 << 20)
        print(clupy.parallel(os._exit, retries=0)(3).exception(30))
        """)
    assert 0 < float(re.search(r"peak memory ([0-9.]+) GB", done.stdout)[1]) < 0.1


def test_workers_outlive_what_forked_them_and_the_next_are_forked_from_another(caplog):
    caplog.set_level(logging.DEBUG, "clupy.server")
    clupy.connect(slots=2)
    assert call(square, 2) == 4
    pids = until(lambda: len(workers()) == 2 and workers())
    first, = templates()
    assert {parent_of(pid) for pid in pids} == {first}
    os.kill(first, signal.SIGKILL)
    until(lambda: first not in {parent_of(pid) for pid in pids})
    assert {clupy.parallel(sleepy_pid)(0.2).result(PATIENCE) for _ in range(4)} <= pids
    error = clupy.parallel(os._exit, retries=0)(3).exception(PATIENCE)
    assert "exit code unknown" in str(error) and "what had forked it was killed" in str(error)
    late = [clupy.parallel(sleepy, timeout=0.3)(60) for _ in range(2)]    # in an orphan, and a child of the next template
    assert all("in sleepy" in str(future.exception(PATIENCE)) for future in late)
    second, = until(lambda: templates() - {first})
    assert {parent_of(pid) for pid in until(lambda: len(workers() - pids) == 2 and workers())} == {second}
    assert "exit code 3" in str(clupy.parallel(os._exit, retries=0)(3).exception(PATIENCE))
    assert sum("forks workers has failed" in record.getMessage() for record in caplog.records) == 1


def test_a_template_that_is_stopped_is_replaced():
    clupy.connect(slots=1)
    assert call(square, 2) == 4
    template, = templates()
    os.kill(template, signal.SIGSTOP)
    clupy._engine.embedded[1].libraries.plain.template.channel.settimeout(0.2)
    assert "exit code unknown" in str(clupy.parallel(os._exit, retries=0)(3).exception(PATIENCE))
    assert call(square, 2) == 4 and template not in templates()


def test_a_template_ends_with_its_program_even_when_it_is_stopped(tmp_path):
    with Program(tmp_path, "-c", "import clupy, time; clupy.parallel(abs)(1).result(); time.sleep(60)") as program:
        template, = until(lambda: workers() and templates())
        os.kill(template, signal.SIGSTOP)
        program.process.kill()
        until(lambda: not processes())


def test_without_a_template_workers_start_by_themselves_for_a_while(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, "clupy.server")
    boot = clupy_server.boot
    monkeypatch.setattr(clupy_server, "boot", lambda **given: "raise SystemExit('no!')" if "template" in given else boot(**given))
    clupy.connect(slots=2)
    assert call(os.getppid) == os.getpid() and not templates()
    assert "signal 9" in str(clupy.parallel(lambda: os.kill(os.getpid(), 9), retries=0)().exception(PATIENCE))
    assert call(os.getppid) == os.getpid()
    assert ["it ended at its start no!" in record.getMessage() for record in caplog.records
            if "forks workers" in record.getMessage()] == [True]


def test_what_a_program_changes_is_there_in_workers_that_are_forked_later(tmp_path, monkeypatch):
    libraries = tmp_path / "site-packages"
    libraries.mkdir()
    monkeypatch.setattr(clupy_server, "site_paths", lambda: [str(libraries)])
    clupy.connect(slots=1)
    seen = []

    def look():
        seen.append(clupy.parallel(lambda: (os.environ.get("CHANGED"), os.getcwd(), os.getppid()))().result(PATIENCE))
        assert "exit code 3" in str(clupy.parallel(os._exit, retries=0)(3).exception(PATIENCE))

    look()
    monkeypatch.setenv("CHANGED", "yes")                              # the next one is there already
    look(), look()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    look(), look()
    (libraries / "new.pth").touch()
    look(), look()
    assert [row[:2] for row in (seen[0], seen[2], seen[4])] == [
        (None, str(tmp_path)), ("yes", str(tmp_path)), ("yes", str(tmp_path / "folder"))]
    assert len({row[2] for row in (seen[0], seen[2], seen[4], seen[6])}) == 4
    until(lambda: len(templates()) == 1)


def test_strings_hash_alike_on_all_servers_but_on_one_with_a_seed_of_its_own(tmp_path):
    with Cluster(tmp_path, servers=2, slots=1) as cluster:
        own = cluster.add_server(PYTHONHASHSEED=7).process.pid
        clupy.connect(cluster.address)
        hashes = text_hashes(3)
        alone = run_script(tmp_path / "alone", "print(hash('a text'))", PYTHONHASHSEED=7).stdout
        assert hashes.pop(own) == int(alone) not in hashes.values() and len(set(hashes.values())) == 1


def test_workers_of_the_embedded_cluster_hash_as_a_program_with_a_seed(tmp_path):
    script = """
        import clupy
        print({clupy.parallel(hash)("a text").result(30) for _ in range(20)} == {hash("a text")})
        """
    assert run_script(tmp_path, script, PYTHONHASHSEED=7).stdout == "True\n"


def test_of_two_holders_that_have_had_their_turn_the_older_gives_way():
    clients = {"older": row(5, since=10.0, s1=1), "newer": row(5, since=50.0, s1=1), "waits": row(5, since=60.0)}
    assert clupy_master.shares({"s1": server_row(2)}, clients, 100.0) == {"older": {}, "newer": {"s1": 1}, "waits": {"s1": 1}}


def test_draining_and_unreachable_servers_are_in_no_share():
    servers = {"s1": server_row(2, draining=True), "s2": server_row(2), "s3": server_row(2)}
    shares = clupy_master.shares(servers, {"c": row(9, unreachable=["s3"], s1=2)}, 100.0)
    assert shares == {"c": {"s2": 2}}


# ==== What the program has set for all its code =================================

SURROUNDINGS = """
    import logging, warnings, clupy

    def call():
        logging.info("of the root")
        logging.getLogger("quiet.part").info("of a quiet one")
        logging.getLogger("loud").debug("of a loud one")
        for category in DeprecationWarning, RuntimeWarning, Own:
            warnings.warn(f"a {category.__name__}", category)
        try:
            warnings.warn("an error here", FutureWarning)
        except FutureWarning as error:
            return f"{error}"

    class Own(UserWarning):
        pass

    if __name__ == "__main__":
        logging.basicConfig(level=logging.INFO, filename="log")
        logging.getLogger("quiet").setLevel(logging.ERROR)
        logging.getLogger("loud").setLevel("DEBUG")
        warnings.simplefilter("ignore", Own)                            # of a class that only the script has
        warnings.filterwarnings("always", category=DeprecationWarning)
        warnings.filterwarnings("ignore", "A RUNTIME", RuntimeWarning)
        warnings.filterwarnings("error", "an (error|exception)")
        print(clupy.parallel(call)().result(30))
    """


@pytest.mark.parametrize("where", ["on a server", "embedded"])
def test_calls_log_and_warn_as_the_program_has_set(tmp_path, where):
    with contextlib.ExitStack() as stack:
        variables = {"CLUPY_MASTER": stack.enter_context(Cluster(tmp_path)).address} if where == "on a server" else {}
        done = run_script(tmp_path / "client", SURROUNDINGS, **variables)
    shown = done.stdout + done.stderr
    assert "an error here\n" in done.stdout and "a RuntimeWarning" not in shown and "of a quiet one" not in shown
    assert all(text in shown for text in ("INFO:root:of the root", "DEBUG:loud:of a loud one", "a DeprecationWarning"))


def test_a_program_that_has_set_nothing_has_calls_that_log_and_warn_by_default(tmp_path):
    done = run_script(tmp_path, """
        import logging, warnings, clupy
        def call():
            logging.getLogger("one").info("an info")
            logging.getLogger("one").warning("a warning")
            return logging.root.level, logging.root.handlers, list(warnings.filters)
        before = list(warnings.filters)
        print(clupy.parallel(call)().result(30)[:2], len(before))
        """)
    assert done.stdout.startswith("(30, [])") and "an info" not in done.stderr and "a warning" in done.stderr


# ==== Pools inside calls ======================================================
# The project is in a folder of its own.  What its pools' processes know of it they were told by the worker.

POOLS = {
    "work/__init__.py": "",
    "work/late.py": "def twice(x): return 2 * x\n",
    "work/data.py": """
        import dataclasses

        @dataclasses.dataclass
        class Point:
            x: int

        def double(item):
            from . import late                              # which the worker itself has never imported
            return dataclasses.replace(item, x=late.twice(item.x))
        """,
    "work/pools.py": """
        import concurrent.futures, multiprocessing, os, sys

        def pool(how, func, items):
            with multiprocessing.get_context(how).Pool(2) as pool:
                return pool.map_async(func, items).get(60)

        def executor(how, func, items):
            with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context(how)) as pool:
                return list(pool.map(func, items, timeout=60))

        def processes(how, func, items):
            context = multiprocessing.get_context(how)
            queue = context.Queue()
            for item in items:
                context.Process(target=into, args=(queue, func, item)).start()
            return sorted((queue.get(timeout=60) for _ in items), key=lambda point: point.x)

        def into(queue, func, item):
            queue.put(func(item))

        def joblib(how, func, items):
            import joblib
            return joblib.Parallel(2, backend=how, timeout=60)(joblib.delayed(func)(item) for item in items)

        def nested(how, func, items):
            return executor(how, Nested(pool, func), [("spawn", items)])[0]

        class Nested:
            def __init__(self, run, func):
                self.run, self.func = run, func

            def __call__(self, item):
                return self.run(item[0], self.func, item[1])
        """}
HOWS = ("pool fork", "pool spawn", "pool forkserver", "executor fork", "executor spawn", "executor forkserver",
        "processes fork", "processes spawn", "processes forkserver", "nested fork", "nested spawn")
POOLS_SCRIPT = """
    import sys, clupy
    from work import data, pools
    if __name__ == "__main__":
        for how in sys.argv[1:]:
            run, method = how.split()
            points = clupy.parallel(getattr(pools, run), retries=0)(method, data.double, [data.Point(1), data.Point(2)])
            print(how, points.result(120) == [data.Point(2), data.Point(4)])
    """


@pytest.mark.parametrize("where", ["on a server", "embedded"])
def test_processes_of_pools_import_what_their_worker_can(tmp_path, where):
    write_files(tmp_path / "client", POOLS)
    with contextlib.ExitStack() as stack:
        variables = {"CLUPY_MASTER": stack.enter_context(Cluster(tmp_path)).address} if where == "on a server" else {}
        done = run_script(tmp_path / "client", POOLS_SCRIPT, args=HOWS, timeout=240, **variables)
    assert done.stdout.splitlines() == [f"{how} True" for how in HOWS]


SCRIPT_IN_POOLS = """
    import dataclasses, sys, clupy
    from work import pools
    FACTOR, STATE = 2, None

    @dataclasses.dataclass
    class Point:
        x: int

    def double(point):
        return Point(FACTOR * point.x)

    def init(state):
        global STATE
        STATE = state

    def with_state(point):
        return Point(STATE * point.x)

    def with_initializer(method, func, items):
        import multiprocessing
        with multiprocessing.get_context(method).Pool(1, init, (2,)) as pool:
            return pool.map_async(with_state, items).get(60)

    if __name__ == "__main__":
        for how in sys.argv[1:]:
            name, method = how.split()
            run = getattr(pools, name, with_initializer)
            for func in double, lambda point: Point(2 * point.x):
                points = clupy.parallel(run, retries=0)(method, func, [Point(1), Point(2)])
                print(how, points.result(120) == [Point(2), Point(4)])
    """


@pytest.mark.parametrize("where", ["on a server", "embedded"])
def test_processes_of_pools_run_functions_of_the_script(tmp_path, where):
    write_files(tmp_path / "client", POOLS)
    hows = (*HOWS, "initializer fork", "initializer spawn", "initializer forkserver")
    with contextlib.ExitStack() as stack:
        variables = {"CLUPY_MASTER": stack.enter_context(Cluster(tmp_path)).address} if where == "on a server" else {}
        done = run_script(tmp_path / "client", SCRIPT_IN_POOLS, args=hows, timeout=240, **variables)
    assert done.stdout.splitlines() == [f"{how} True" for how in hows for _ in range(2)]


def test_joblibs_processes_run_functions_of_the_script(tmp_path, cluster):
    pytest.importorskip("joblib")
    write_files(tmp_path / "client", POOLS)
    done = run_script(tmp_path / "client", SCRIPT_IN_POOLS, args=["joblib loky"], timeout=120, CLUPY_MASTER=cluster.address)
    assert done.stdout == "joblib loky True\n" * 2


def test_joblibs_processes_import_what_their_worker_can(tmp_path, cluster):
    pytest.importorskip("joblib")
    write_files(tmp_path / "client", POOLS)
    hows = "joblib loky", "joblib multiprocessing"
    done = run_script(tmp_path / "client", POOLS_SCRIPT, args=hows, timeout=120, CLUPY_MASTER=cluster.address)
    assert done.stdout.splitlines() == [f"{how} True" for how in hows]


def test_a_forked_child_of_a_call_imports_what_its_parent_has_not(tmp_path, cluster):
    write_files(tmp_path / "client", POOLS)
    done = run_script(tmp_path / "client", """
        import clupy
        def fork():
            import os
            if (pid := os.fork()) == 0:
                from work import late
                os._exit(late.twice(3))
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(clupy.parallel(fork, retries=0)().result(60))
        """, CLUPY_MASTER=cluster.address)
    assert done.stdout == "6\n"


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_the_processes_of_a_pool_end_with_its_worker(tmp_path, cluster, how):
    def start(path):
        import multiprocessing
        pool = multiprocessing.get_context(how).Pool(2)
        pool.map_async(time.sleep, [60, 60])
        path.write_text(" ".join(str(process.pid) for process in pool._pool))
        os.kill(os.getpid(), signal.SIGKILL)
    clupy.connect(cluster.address)
    with pytest.raises(clupy.WorkerDied):
        clupy.parallel(start, retries=0)(tmp_path / "pids").result(PATIENCE)
    pids = set(map(int, (tmp_path / "pids").read_text().split()))
    until(lambda: len(pids) == 2 and not pids & processes().keys())


def test_the_path_of_a_worker_is_plain_texts_wherever_it_travels():
    def paths():
        import copy
        return sys.path, copy.deepcopy(sys.path), pickle.loads(pickle.dumps(sys.path)), json.loads(json.dumps(sys.path))
    given, *copies = clupy.parallel(paths)().result(PATIENCE)
    assert copies == [given] * 3 and {type(entry) for path in (given, *copies) for entry in path} == {str}


# ==== SIGINT: workers are out of Ctrl-C's reach, and what calls start may be interrupted =======

def ends_of_interrupted_programs():
    """How two programs ended that this call started and interrupted: one that knows no SIGINT, and a Python."""
    ends = []
    for command in ["sleep", "60"], [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
            if len(command) > 2:
                program.stdout.readline()
            program.send_signal(signal.SIGINT)
            ends.append(program.wait(20))
    return ends


def test_a_call_interrupts_programs_that_it_started(cluster):
    clupy.connect(cluster.address)
    assert clupy.parallel(ends_of_interrupted_programs)().result(PATIENCE) == [-signal.SIGINT, -signal.SIGINT]


def test_a_program_that_ignores_sigint_has_calls_that_do_not(tmp_path):
    script = """
        import os, signal, clupy
        def ignored():
            return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(ignored(), clupy.parallel(ignored)().result(30))
        """
    assert run_script(tmp_path, script).stdout == "True False\n"


def test_a_call_that_is_interrupted_ends_by_keyboard_interrupt_and_its_worker_goes_on(cluster):
    clupy.connect(cluster.address)

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
    with clupy.Executor(max_workers=1) as executor:
        pid = executor.submit(os.getpid).result(PATIENCE)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(interrupt).result(PATIENCE)
        assert executor.submit(os.getpid).result(PATIENCE) == pid


def test_ctrl_c_that_the_program_handles_leaves_its_calls_alone(tmp_path):
    script = """
        import os, pathlib, signal, time, clupy
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, lambda *_: print("heard"))
        def call(path):
            path.touch()
            while path.exists():
                time.sleep(0.01)
            return "done"
        path = pathlib.Path("runs").absolute()
        future = clupy.parallel(call, retries=0)(path)
        while not path.exists():
            time.sleep(0.01)
        os.killpg(0, signal.SIGINT)
        path.unlink()
        print(future.result(30))
        """
    assert run_script(tmp_path, script).stdout == "heard\ndone\n"


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
    until(lambda: len({f.result(PATIENCE) for f in [clupy.parallel(sleepy_pid)(0.2) for _ in range(2)]}) == 2)


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


def note_start(path, n, seconds=0.0):
    """Note that the call n has begun, and take so long."""
    with open(path, "a") as file:
        file.write(f"{n}\n")
    time.sleep(seconds)


def seemingly_short_note():
    """note_start as a parallel function that has been short so far, on a busy machine too: many calls of it go to a worker."""
    note = clupy.parallel(note_start)
    known = [note(os.devnull, n) for n in range(50)]
    assert clupy.wait_all(known, PATIENCE)
    known[-1]._function.mean = 1e-5
    return note


@contextlib.contextmanager
def stopped(pid):
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_call_that_prints_as_its_server_dies_has_no_error_of_its_own():
    """The kernel may take the pipes of a server that is killed before it has killed the workers."""
    def write():
        print("out", flush=True)
        print("err", file=sys.stderr, flush=True)
        subprocess.run(["echo", "a child's"], check=True)
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(sum(stat.S_ISFIFO(os.stat(fd).st_mode) and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
                     for fd in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{fd}")))

    def lose():
        for process in clupy._engine.embedded[1].workers.processes.values():
            for fd in [fd for fd, stream in process.output.pipes.items() if stream != "stack"]:
                process.output._close(fd)
        lost.set()
    clupy.connect(slots=1)
    usual, lost = call(write), threading.Event()       # the lifeline alone can be read by a child
    clupy._engine.loop.call_soon_threadsafe(lose)
    assert lost.wait(PATIENCE) and call(write) == usual == 1


@pytest.mark.parametrize("retries, starts", [(0, 1), (1, 2), (3, 4)])
def test_a_call_is_started_at_most_once_more_than_retries(tmp_path, retries, starts):
    with pytest.raises(clupy.WorkerDied, match=f"try {starts} of {starts}"):
        clupy.parallel(count_starts, retries=retries)(str(tmp_path / "x"), 0, 99).result(PATIENCE)
    assert (tmp_path / "x").stat().st_size == starts


def test_a_call_that_may_start_once_still_does_when_its_worker_dies_before_it_began(tmp_path):
    clupy.connect(slots=1)
    pid = call(os.getpid)
    with stopped(pid):
        future = clupy.parallel(count_starts, retries=0)(str(tmp_path / "x"))
        until(future.running)
        os.kill(pid, signal.SIGKILL)
    assert future.result(PATIENCE) == 1


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


def test_a_recall_leaves_what_concerns_functions_to_the_main_thread_in_its_order():
    worker, said = clupy_server.Worker.__new__(clupy_server.Worker), []
    worker.send, worker.send_results = lambda *message: said.append(message), lambda: said.append("results")
    drop, learn = (0, 7, None, None), (0, 8, b"payload", ("f", None))      # one of them may be running
    worker.todo = collections.deque([(1, 7, (), None), drop, (2, 8, (), None), learn, (3, 8, (), None)])
    worker.on_recall(None)
    assert said == ["results", ("returned", [1, 2, 3])] and list(worker.todo) == [drop, learn]


class Steps:
    """Threads of which one goes on at a time: before each line of `code` a chance decides which.  Waiting is theirs, too:
    for a condition, with or without a limit of time, which may be over at any moment."""

    def __init__(self, seed, code):
        self.chance, self.code = random.Random(seed), code
        self.actors, self.errors, self.current, self.over = [], [], None, False
        self._back = threading.Semaphore(0)

    def start(self, function):
        actor = types.SimpleNamespace(go=threading.Semaphore(0), condition=lambda: True, limited=False)

        def run():
            actor.go.acquire()
            sys.settrace(lambda frame, *_: self._line if frame.f_code in self.code else None)
            try:
                function()
            except BaseException as error:
                self.errors += [error] if type(error) is not SystemExit else []
            finally:
                sys.settrace(None)
                self.actors.remove(actor)
                self._back.release()
        self.actors.append(actor)
        actor.thread = threading.Thread(target=run, daemon=True)
        actor.thread.start()

    def _line(self, frame, event, _):
        if event == "line" and not self.over:
            self.wait()
        return self._line

    def wait(self, condition=lambda: True, limited=False):
        """Let others go on; whether the condition is true then."""
        actor = self.current
        actor.condition, actor.limited = condition, limited
        self._back.release()
        actor.go.acquire()
        if self.over:
            raise SystemExit
        return condition()

    def go_on(self, actor):
        self.current = actor
        actor.go.release()
        self._back.acquire()

    def run(self, when_all_wait):
        """Go on until all wait without a limit of time; when_all_wait(whether somebody waits for a limited
        time) is called whenever nobody can go on at once."""
        while True:
            ready = [actor for actor in self.actors if actor.condition()]
            limited = [actor for actor in self.actors if actor.limited]
            if not ready:
                when_all_wait(bool(limited))
            if not ready and not limited or self.errors:
                break
            stay = self.current in ready and self.chance.random() < 0.6
            self.go_on(self.current if stay else self.chance.choice(ready + limited))
        self.over = True
        for actor in list(self.actors):
            self.go_on(actor)
            actor.thread.join()
        assert not self.errors


class SteppedBell:
    def __init__(self, steps):
        self.steps, self.rung = steps, False

    def ring(self):
        self.rung = True

    def wait(self, timeout):
        self.steps.wait(lambda: self.rung, limited=timeout is not None)
        self.rung = False


class SteppedLock:
    def __init__(self, steps):
        self.steps, self.held = steps, False

    def acquire(self, blocking=True):
        if blocking:
            self.steps.wait(lambda: not self.held)
        taken, self.held = not self.held, True
        return taken

    def release(self):
        self.held = False

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


class SteppedWorker(clupy_server.Worker):
    """A worker without a socket: `arrived` are the numbers of calls that its client has sent."""

    def __init__(self, steps):
        self.steps, self.arrived, self.sent, self.reader = steps, [], [], None
        self.todo, self.results = collections.deque(), collections.deque()
        self.ended = self.idle = self._dozing = False
        self.current = 0
        self._reading, self._bell = SteppedLock(steps), SteppedBell(steps)

    def _has_input(self, milliseconds):
        assert self._reading.held and self.reader is None
        self.reader = self.steps.current
        ready = self.steps.wait(lambda: self.arrived, limited=milliseconds is not None)
        self.reader = None
        return ready

    def _read(self):
        self._has_input(None)
        self.todo.append((self.arrived.pop(0), None, None, None))

    def _run_call(self, number, *_):
        self.current = number
        for _ in range(number):
            self.steps.wait()
        if number == 8:                            # it goes on once the next one has been read
            self.steps.wait(lambda: any(item[0] == 3 for item in self.todo))
        self.results.append(number)

    def send_results(self):
        self.sent.extend(self.results)
        self.results.clear()

    def send_calls(self):
        for number in (1, 2, 8, 3, 4, 5):
            self.arrived.append(number)
            for _ in range(self.steps.chance.randrange(20)):
                self.steps.wait()

    def work_waits_for_a_long_call_alone(self, limited):
        assert limited or not self.arrived and not self.todo
        assert not self.idle or self.reader and not self.todo


@pytest.mark.parametrize("seeds", [range(start, start + 150) for start in range(0, 600, 150)])
def test_the_two_threads_of_a_worker_lose_no_work_in_whatever_order_they_go_on(seeds):
    kind = clupy_server.Worker
    code = {method.__code__ for method in (kind._work, kind._await_work, kind._read_beside, kind._read_while_busy)}
    for seed in seeds:
        steps = Steps(seed, code)
        worker = SteppedWorker(steps)
        for actor in worker._work, worker._read_beside, worker.send_calls:
            steps.start(actor)
        steps.run(worker.work_waits_for_a_long_call_alone)
        assert worker.sent == [1, 2, 8, 3, 4, 5], seed


def test_who_is_charged_when_a_worker_dies():
    assert clupy.had_begun([4, 5, 6, 7], 5) == [True, True, False, False]
    assert clupy.had_begun([4, 5], 3) == [False, False]           # its result had arrived already
    assert clupy.had_begun([4, 5], None) == [True, True]          # nobody knows


@pytest.mark.parametrize("error, why", [(clupy.died, clupy.Why.DIED), (clupy.timed_out, clupy.Why.TIMEOUT)])
def test_the_place_at_which_a_worker_was_killed_is_the_users_whatever_his_folder_is_called(error, why):
    lines = ["Current thread 0x7f00 (most recent call first):", '  File "/home/me/try_clupy/clupy_area.py", line 3 in area',
             '  File "/site/clupy.py", line 9 in unpack', '  File "/site/clupy_server.py", line 9 in run']
    call = clupy.Future(None, clupy.Function(b"", b"", "area", None), timeout=1.0)
    slot = types.SimpleNamespace(link=types.SimpleNamespace(name="node"), pid=7)
    text = str(error(call, slot, {"why": why, "pid": 7, "stack": "\n".join(lines)}))
    assert "clupy_area.py" in text and "unpack" not in text and "in run" not in text


@pytest.mark.parametrize("error", [ValueError, OSError])         # the second looks like the end of the slot
def test_a_worker_whose_main_thread_dies_ends_whatever_threads_its_calls_left(cluster, error):
    def leave_a_thread_and_a_handler():
        def late(*_):
            raise error("too late")
        threading.Thread(target=time.sleep, args=(600,)).start()           # no daemon: Python would wait for it
        signal.signal(signal.SIGUSR1, late)
        return os.getpid()
    clupy.connect(cluster.address)
    pid = clupy.parallel(leave_a_thread_and_a_handler)().result(PATIENCE)

    def has_ended():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)                   # again and again: one that comes while output is flushed is lost
        return pid not in workers()
    until(has_ended)
    assert clupy.parallel(os.getpid)().result(PATIENCE) != pid


# ---- Backlog, Feeder, Children, Pool and verdicts by hand, under random sequences of what may happen

class HandSlot(clupy.Slot):
    """A slot whose worker is a list: `todo`, of which the first call runs. It lives by the rules of a real one."""

    def __init__(self, link, number, nested):
        super().__init__(link, number, nested)
        self.state, self.pid, self.todo, self.asked = clupy.OPEN, number, [], 0

    def send(self, kind, *fields):
        if kind == "calls":
            self.todo += [item[0] for item in fields[0] if item[0]]
            self.begin()
        elif kind == "recall":
            self.asked += 1

    def begin(self):
        if self.todo and self.todo[0] != getattr(self, "begun", None):
            self.begun = self.todo[0]
            self.link.starts[self.calls[self.begun]] += 1

    @property
    def running(self):
        return self.calls.get(self.todo[0]) if self.todo else None

    def result(self):
        if self.todo:
            self.on_results(None, [(self.todo.pop(0), True, 1)], 0.001)
            self.begin()

    def answer(self):
        if self.asked:
            self.asked -= 1
            back, self.todo = self.todo[1:], self.todo[:1]
            self.on_returned(None, back)

    def die(self, why="died", lost=False):
        begun, self.todo = (self.todo or [0])[0], []
        self.gone, self.ended = True, None if lost else {"why": why, "begun": begun, "pid": 1, "reason": "exit code 1"}
        if lost:                                       # nobody knows what had begun
            self.state = clupy.ENDING
            self.engine.pool._settle(self)
        else:
            self.engine.pool.ending(self)

    def call_inside(self, max):
        if self.running:
            number = next(self.link.numbers)
            self.on_nested(None, [(number, self.todo[0], b"f", (), None, 0, max and (("nested", max), max))],
                           {b"f": (b"payload", "nested", None)})


class HandLink(types.SimpleNamespace):
    def kill(self, slot, number):
        if slot.todo and slot.todo[0] == number:
            slot.die("cancelled")

    def send(self, kind, number):
        if kind == "close" and number in self.slots and not self.slots[number].calls:
            self.slots[number].die("closed")


class HandPool(clupy.Pool):
    def _open(self, link, nested):
        slot = HandSlot(link, next(self._numbers), nested)
        link.slots[slot.number] = slot


class HandEngine(clupy.BaseEngine):
    """The rooms that decide, without thread, loop and connections."""

    def __init__(self):
        nothing = types.SimpleNamespace(call_later=lambda *_: None, update_wanted=lambda: None,
                                        count_wanted=lambda: self.backlog.wanted, leave_broken=lambda link: None,
                                        opened=lambda link: None, send_statement=lambda: None)
        self.loop = self.master_side = self.libraries = self.output = nothing
        self.backlog, self.children, self.numbers = clupy.Backlog(), clupy.Children(self), itertools.count(1)
        self.feeder, self.pool = clupy.Feeder(self), HandPool(self)
        self.starts = collections.Counter()
        self.links = [HandLink(id=id, name=id, engine=self, key=b"k", slots={}, connection=True, session=1, draining=False,
                               placed=[], max_nested=3, retry_at=0.0, starts=self.starts, numbers=itertools.count(1), failures=0,
                               lost_at=None, again=0)
                      for id in "ab"]
        self.pool.links = {link.id: link for link in self.links}

    def enqueue(self, call):
        call._number = next(self.numbers)
        self.backlog.add(call)

    def cancel(self, call):
        self.feeder.cancelled(call)


def test_a_call_before_which_workers_die_is_spared_twice_and_then_charged():
    engine, function = HandEngine(), clupy.function_of(b"payload", "f")
    engine.pool.share = {"a": (("h", 1), 1, "name")}
    first, second = [clupy.Future(engine, function, (), None, 1) for _ in range(2)]
    engine.enqueue(first)
    engine.enqueue(second)
    deaths = 0
    while not first.done():
        engine.pool.balance()
        [slot] = engine.pool.slots()
        assert first in slot.calls.values()
        slot.todo = []                                  # none has begun
        slot.die()
        deaths += 1
        assert deaths < 9
    assert deaths == clupy.MAX_SPARED + 2               # its two tries
    assert type(first.exception()) is clupy.WorkerDied and not second.done() and second._tries == 0


def test_an_idle_slot_for_nested_calls_lingers_unless_the_share_is_gone():
    def leaving(now, granted=1, starving=False, **changed):
        waits = types.SimpleNamespace(state=clupy.OPEN, suspended=False, calls={1: "call"}, nested=False, heard=0.0, load=1.0)
        idle = types.SimpleNamespace(**{**vars(waits), "calls": {}, "nested": True, "heard": 100.0, "load": 0.0, **changed})
        slots, *_ = clupy.slot_changes([waits, idle], granted, False, starving, now)
        return [slot is idle for slot in slots]
    over = 100.0 + clupy.LINGER_TIME
    assert leaving(over - 0.01) == [] and leaving(over) == [True]
    assert leaving(over - 0.01, nested=False) == [True] and leaving(over, starving=True) == []
    assert sorted(leaving(over - 0.01, granted=0)) == [False, True]

class Calls(hypothesis.stateful.RuleBasedStateMachine):
    """Whatever happens in whatever order: each call gets one outcome, and is started as often as it may be."""

    def __init__(self):
        super().__init__()
        self.engine, self.made, self.outcomes = HandEngine(), [], {}
        self.function = clupy.function_of(b"payload", "f")
        self.share(2, 1)

    def slot(self, index):
        slots = self.engine.pool.slots()
        return slots[index % len(slots)] if slots else None

    indices = hypothesis.strategies.integers(0, 9)

    @hypothesis.stateful.rule(retries=hypothesis.strategies.integers(0, 2), max=hypothesis.strategies.sampled_from((None, 1, 2)),
                              count=hypothesis.strategies.integers(1, 5))
    def submit(self, retries, max, count):
        for _ in range(count):
            call = clupy.Future(self.engine, self.function, (), None, retries, max and (("f", max), max))
            self.made.append(call)
            self.engine.enqueue(call)
        self.engine.pool.balance()

    @hypothesis.stateful.rule(a=hypothesis.strategies.integers(0, 3), b=hypothesis.strategies.integers(0, 2))
    def share(self, a, b):
        self.engine.pool.share = {"a": (("h", 1), a, "name"), "b": (("h", 2), b, "name")}
        self.engine.pool.balance()

    @hypothesis.stateful.rule(index=indices, what=hypothesis.strategies.sampled_from(
        ("result", "result", "result", "answer", "die", "lose", "recall", "nested", "nested 1")))
    def happens(self, index, what):
        slot = self.slot(index)
        if slot is None:
            return
        if what == "lose":
            slot.die(lost=True)
        elif what.startswith("nested"):
            slot.call_inside(1 if what.endswith("1") else None)
        else:
            getattr(slot, what)()
        self.engine.pool.balance()

    @hypothesis.stateful.rule(index=hypothesis.strategies.integers(0, 99))
    def cancel(self, index):
        if self.made:
            self.made[index % len(self.made)].cancel()

    @hypothesis.stateful.invariant()
    def promises_hold(self):
        slots = self.engine.pool.slots()
        for call in self.made:
            if call.done():
                assert self.outcomes.setdefault(call, (call._state, call._result, call._exception)) == (
                    call._state, call._result, call._exception)
            assert self.engine.starts[call] <= 1 + call._retries
            assert sum(call is other for slot in slots for other in slot.calls.values()) + (
                call in self.engine.backlog.waiting()) == (not call.done() or call._number in (
                    number for slot in slots for number in slot.calls))
        running = [slot.running for slot in slots if slot.running and not slot.suspended]
        for limit in {call._limit for call in running if call._limit}:
            assert sum(call._limit == limit for call in running if not call._parent) <= limit[1]
        for slot in slots:
            assert list(slot.calls) == slot.todo           # in the order sent
            for index, number in enumerate(slot.todo):
                ancestors, call = set(), slot.calls[number]
                while call._parent:
                    ancestors.add((call._parent[0], call._outer))
                    call = call._parent[0].calls.get(call._outer)
                    if call is None:
                        break
                assert not ancestors & {(slot, earlier) for earlier in slot.todo[:index]}
        assert self.engine.backlog.queued == len(self.engine.backlog.waiting())
        assert self.engine.backlog.wanted >= 0

    def teardown(self):
        self.share(2, 1)
        for _ in range(20 * (len(self.made) + 5)):
            for slot in self.engine.pool.slots():
                slot.answer()
                slot.result()
            self.engine.pool.balance()
        assert all(call.done() for call in self.made)
        assert not self.engine.backlog.limits and not self.engine.backlog.waiting()


test_every_call_has_one_outcome_whatever_happens = Calls.TestCase
test_every_call_has_one_outcome_whatever_happens.settings = hypothesis.settings(
    max_examples=150, stateful_step_count=40, deadline=None, database=None,
    suppress_health_check=list(hypothesis.HealthCheck))


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


def test_what_was_sent_and_has_not_begun_can_be_cancelled_alone_and_behind_others(tmp_path):
    clupy.connect(slots=1)
    pid, path = call(os.getpid), tmp_path / "begun"
    note = seemingly_short_note()
    with stopped(pid):
        behind = [note(str(path), n, 0 if n else 0.3) for n in range(3)]
        until(behind[2].running)                           # all are sent to that worker
        assert behind[1].cancel()
    assert behind[0].wait(PATIENCE) and behind[2].wait(PATIENCE) and path.read_text().split() == ["0", "2"]
    with stopped(pid):
        alone = clupy.parallel(note_start)(str(path), 3, 60)
        until(alone.running)
        assert alone.cancel()
        time.sleep(0.2)                                    # its server looks, and the worker does not run it
    assert clupy.parallel(square)(3).result(10) == 9


def test_a_long_call_can_be_cancelled_while_others_wait_behind_it(tmp_path):
    clupy.connect(slots=1)
    pid, path = call(os.getpid), tmp_path / "begun"
    note = seemingly_short_note()
    long = note(str(path), 0, 60)
    until(path.exists)
    with stopped(pid):                                     # it cannot give back what waits
        behind = [note(str(path), n) for n in (1, 2, 3)]
        until(behind[2].running)
        assert long.cancel() and behind[0].cancel()
    assert behind[1].wait(10) and behind[2].wait(10) and path.read_text().split() == ["0", "2", "3"]


def test_recalled_calls_begin_in_the_order_in_which_they_were_made(tmp_path):
    clupy.connect(slots=1)
    note = seemingly_short_note()
    calls = [note(str(tmp_path / "begun"), n, 0 if n else 0.3) for n in range(30)]
    assert clupy.wait_all(calls, PATIENCE)
    assert (tmp_path / "begun").read_text().split() == [str(n) for n in range(30)]



def test_a_call_in_c_code_can_be_cancelled_though_others_wait_behind_it():
    clupy.connect(slots=1)
    assert clupy.wait_all([clupy.parallel(busy)("not at all") for _ in range(50)], PATIENCE)      # it seems to take no time
    calls = [clupy.parallel(busy)(how) for how in ("c", "c", *["not at all"] * 20)]
    until(calls[0].running)
    time.sleep(0.2)
    assert calls[0].cancel() and calls[1].cancel() and clupy.wait_all(calls, PATIENCE)


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


def test_a_call_that_ends_just_when_its_time_is_over_is_not_taken_for_the_next_one():
    """The next one dies by itself, while the server still looks whether the first is to be killed."""
    clupy.connect(slots=1)
    timed, dies = clupy.parallel(sleepy, timeout=0.3, retries=0), clupy.parallel(os._exit, retries=0)
    for n in range(10):
        first, second = timed(0.3 + 0.02 * n, "in time"), dies(3)
        assert type(second.exception(PATIENCE)) is clupy.WorkerDied
        assert first.wait(PATIENCE) and (first.value == "in time" or type(first.failure) is clupy.CallTimeout)


def test_an_idle_worker_outlives_the_time_of_its_last_call():
    clupy.connect(slots=1)
    pid = clupy.parallel(sleepy_pid, timeout=0.3)(0).result(PATIENCE)
    time.sleep(1.0)
    assert call(os.getpid) == pid


def test_a_call_that_ends_between_the_look_and_the_stop_costs_its_worker_nothing():
    """A worker by hand: it is to be killed for its call 5, and begins call 6 while it is looked at."""
    async def story(child):
        worker = clupy_server.Process.__new__(clupy_server.Process)
        worker.pid, worker.board, worker.why, worker.template = child.pid, bytearray(mmap.PAGESIZE), None, None
        worker.dead, worker._stopping = asyncio.get_running_loop().create_future(), asyncio.Lock()
        signals, send = [], worker._signal

        def just_before(number, group=True):
            if number == signal.SIGSTOP:
                clupy_server.BOARD.pack_into(worker.board, 0, 6, 0.0)
            signals.append(number)
            send(number, group)
        worker._signal = just_before
        clupy_server.BOARD.pack_into(worker.board, 0, 5, 0.0)
        assert not await worker.kill_call(4, "cancelled") and signals == []
        assert not await worker.kill_call(5, "cancelled") and signals == [signal.SIGSTOP, signal.SIGCONT]
        assert worker.why is None and child.poll() is None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        asyncio.run(story(child))


def test_a_forked_child_that_returns_from_a_call_does_not_end_its_parents_time():
    def fork():
        if os.fork():
            time.sleep(60)
    with pytest.raises(clupy.CallTimeout):
        clupy.parallel(fork, timeout=1)().result(PATIENCE)


def test_a_memory_limit_gives_memory_errors_and_the_node_lives():
    clupy.connect(slots=1, memory_limit="600MB")
    with pytest.raises(MemoryError) as caught:
        clupy.parallel(lambda: len(bytearray(1 << 30)))().result(PATIENCE)
    note, = caught.value.__notes__
    assert note.startswith(f"memory_limit is 600 MB for a worker on {socket.gethostname()}:")
    with pytest.raises(clupy.WorkerDied, match="no memory for 734003200 bytes"):         # before the call can begin
        clupy.parallel(len, retries=0)(bytes(700 << 20)).result(PATIENCE)
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


def test_a_call_that_waits_for_its_children_leaves_its_slot_to_them_whatever_other_slots_do(tmp_path):
    def asks():
        begun = time.monotonic()
        return clupy.parallel(square)(3).result(), time.monotonic() - begun

    def locked(path):
        import fcntl
        with open(path, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return [clupy.parallel(square)(n).result() for n in range(3)]
    clupy.connect(slots=2)
    other = clupy.parallel(sleepy)(60)
    until(other.running)
    assert clupy.parallel(asks)().result(PATIENCE)[0] == 9 and not other.done() and other.cancel()
    calls = [clupy.parallel(locked)(str(tmp_path / "lock")) for _ in range(6)]      # those that wait use all the slots
    assert clupy.wait_all(calls, PATIENCE) and [call.value for call in calls] == [[0, 1, 4]] * 6


def test_recursion_of_depth_30_on_one_slot():
    clupy.connect(slots=1)
    assert clupy.parallel(depth)(30).result(90) == 30
    until(lambda: len(workers()) == 1)


def test_a_nested_call_belongs_to_the_call_that_started_its_thread(tmp_path):
    def leaves_a_thread(path):
        def late():
            while not path.exists():
                time.sleep(0.01)
            outcome = clupy.parallel(sleepy)(0, "nested").exception(PATIENCE)
            path.write_text(type(outcome).__name__)
        threading.Thread(target=late, daemon=True).start()

    def runs_beside(path):
        path.touch()
        while not (text := path.read_text()):
            time.sleep(0.01)
        return text

    def in_threads(pools=[]):
        pools[:] = pools or [concurrent.futures.ThreadPoolExecutor(1)]     # one for all calls here
        thread = concurrent.futures.Future()
        threading.Thread(target=lambda: thread.set_result(clupy.parallel(square)(4).result(PATIENCE))).start()
        return pools[0].submit(lambda: clupy.parallel(square)(3).result(PATIENCE)).result(), thread.result(PATIENCE)
    clupy.connect(slots=1)
    clupy.parallel(leaves_a_thread)(tmp_path / "x").result(PATIENCE)
    assert clupy.parallel(runs_beside)(tmp_path / "x").result(PATIENCE) == "CancelledError"
    in_threads = clupy.parallel(in_threads)
    assert [in_threads().result(PATIENCE) for _ in range(3)] == [(9, 16)] * 3


def test_large_arrays_travel_through_nested_calls():
    import numpy

    def outer(array):
        return clupy.parallel(lambda a: a * 2)(array + 1).result()
    assert clupy.parallel(outer)(numpy.zeros(1_000_000)).result(PATIENCE).sum() == 2_000_000


def test_a_call_that_must_give_its_slot_back_or_whose_server_drains_still_gets_its_children(tmp_path):
    def outer(path):
        open(path, "w").close()
        while os.path.exists(path):
            time.sleep(0.02)
        return clupy.parallel(square)(4).result()
    with Cluster(tmp_path, slots=1) as cluster:
        clupy.connect(cluster.address)
        for name, end in ("passed on", None), ("draining", signal.SIGTERM):
            future = clupy.parallel(outer)(str(tmp_path / name))
            until((tmp_path / name).exists)
            with contextlib.ExitStack() as stack:
                if end:
                    cluster.servers[0].process.send_signal(end)
                else:
                    stack.enter_context(Program(tmp_path / "other", "-c", textwrap.dedent(CALLS), 3,
                                                CLUPY_MASTER=cluster.address))
                    until(lambda: len(cluster.status()["clients"]) == 2)
                time.sleep(1.5)                            # the share passes on, or the client hears of the draining
                (tmp_path / name).unlink()
                assert future.result(PATIENCE) == 16


def limited_depth(n):
    return 0 if n == 0 else 1 + clupy.parallel(limited_depth, max=1)(n - 1).result()


def test_a_call_that_waits_for_its_children_does_not_count_for_max():
    assert clupy.parallel(limited_depth, max=1)(5).result(PATIENCE) == 5


def test_recursion_deeper_than_there_may_be_workers_is_an_error_and_no_deadlock():
    clupy.connect(slots=1, max_nested=3)
    assert clupy.parallel(depth)(3).result(PATIENCE) == 3
    with pytest.raises(clupy.ClupyError, match="max_nested is 3"):
        clupy.parallel(depth)(6).result(PATIENCE)
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


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


@pytest.mark.parametrize("end", ["return", "raise", "die", "timeout"])
def test_the_children_of_a_call_that_ended_are_cancelled_for_whatever_cause(tmp_path, end):
    def parent(path, end):
        def child(path):
            with open(path + ".new", "w") as file:
                file.write(str(os.getpid()))
            os.rename(path + ".new", path)
            time.sleep(600)
        clupy.parallel(child)(path)
        while not os.path.exists(path):
            time.sleep(0.01)
        if end == "raise":
            raise ZeroDivisionError
        if end == "die":
            os._exit(3)
        if end == "timeout":
            time.sleep(600)
    clupy.connect(slots=1)
    error = clupy.parallel(parent, retries=0, timeout=3)(str(tmp_path / "child"), end).exception(PATIENCE)
    assert type(error) is {"return": type(None), "raise": ZeroDivisionError, "die": clupy.WorkerDied,
                           "timeout": clupy.CallTimeout}[end]
    pid = int((tmp_path / "child").read_text())
    until(lambda: pid not in workers())


def test_of_nested_calls_that_wait_the_newest_comes_first(tmp_path):
    def parent(path):
        children = [clupy.parallel(note_start)(path, n) for n in range(6)]
        clupy.wait_all(children)
    clupy.connect(slots=1, max_nested=1)
    clupy.parallel(parent)(str(tmp_path / "begun")).result(PATIENCE)
    begun = [int(line) for line in (tmp_path / "begun").read_text().split()]
    assert sorted(begun) == list(range(6))
    waited = begun[1:]                                     # the first may begin before others are made
    assert waited == sorted(waited, reverse=True)


def test_a_call_may_cancel_a_nested_call_and_its_worker_is_free_for_the_next(tmp_path):
    def outer(path):
        child = clupy.parallel(note_start)(path, 1, 60)
        while not os.path.exists(path):
            time.sleep(0.02)
        return child.cancel(), child.cancelled(), clupy.parallel(square)(3).result()
    clupy.connect(slots=1, max_nested=1)
    assert clupy.parallel(outer)(str(tmp_path / "child")).result(PATIENCE) == (True, True, 9)


def test_two_clients_with_calls_inside_calls_do_not_wait_for_each_other(tmp_path):
    text = textwrap.dedent("""
        import clupy
        def depth(n):
            return 0 if n == 0 else 1 + clupy.parallel(depth)(n - 1).result()
        print(clupy.parallel(depth)(4).result(60))
        """)
    with Cluster(tmp_path, slots=2, CLUPY_MAX_NESTED=4) as cluster, contextlib.ExitStack() as stack:
        both = [stack.enter_context(Program(tmp_path / name, "-c", text, CLUPY_MASTER=cluster.address)) for name in "ab"]
        assert [client.process.wait(2 * PATIENCE) for client in both] == [0, 0]


def test_an_executor_inside_a_call_has_its_initializer_and_its_max_workers(tmp_path):
    def outer():
        with clupy.Executor(1, initializer=remember, initargs=("this",)) as executor:
            begun = time.monotonic()
            calls = [executor.submit(function, 0.2) for function in (sleepy, sleepy_pid)] + [executor.submit(recall)]
            return calls[2].result(), len([call.result() for call in calls]), time.monotonic() - begun
    clupy.connect(slots=3)
    remembered, _, seconds = call(outer)
    assert remembered == "this" and seconds >= 0.4


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


@pytest.mark.parametrize("line", ["x" + "\u00fc" * 100_000 + "\u20ac", "\u20ac" * 700_000])
def test_one_long_line_of_any_characters_is_shown_whole(tmp_path, line):
    done = run_script(tmp_path, f"""
        import clupy
        clupy.parallel(print)({line[0]!r} + {line[1]!r} * {len(line) - 2} + {line[-1]!r}).result(30)
        clupy.close()
        """, PYTHONIOENCODING="utf-8")
    shown = "".join(text.partition("] ")[2] for text in done.stdout.splitlines())
    assert len(shown) == len(line) and shown == line


def test_the_last_lines_are_shown_when_the_program_ends_at_once(tmp_path, cluster):
    text = "import clupy\nclupy.parallel(print)('the last words').result(30)"
    for _ in range(5):
        assert "the last words" in run_script(tmp_path / "client", text, CLUPY_MASTER=cluster.address).stdout


def test_calls_that_no_server_can_take_are_told_of(tmp_path, caplog):
    with Cluster(tmp_path, servers=0) as cluster:
        clupy.connect(cluster.address)
        future = clupy.parallel(square)(3)
        until(lambda: "has no server with a slot" in caplog.text)
        cluster.add_server()
        assert future.result(PATIENCE) == 9


def test_lines_that_are_not_ascii_are_all_shown_however_many_and_an_unfinished_last_one(monkeypatch):
    clupy.connect(slots=1)
    monkeypatch.setattr(sys, "stdout", screen := io.StringIO())
    for n in range(20):                                        # 160 KB in all; the client has shown each before the next
        call(print, "ü" * 4000)
        until(lambda n=n: len(screen.getvalue().splitlines()) > n)
    call(os.write, 1, "ü without an end".encode())
    clupy.close()
    *lines, last = [line.partition("] ")[2] for line in screen.getvalue().splitlines()]
    assert lines == ["ü" * 4000] * 20 and last == "ü without an end"


class Wire(list):
    """A connection by hand: what was sent."""

    def send(self, *message):
        self.append(message)


@pytest.mark.parametrize("line", ["yes\n", "x" * 200 + "\n", "\u6c49\u5b57" * 30 + "\n", "\u20ac" * 100_000 + "\n"])
def test_output_that_a_client_has_not_seen_is_bounded_in_bytes_on_the_wire(line):
    """A client that is stopped: its kernel takes what is sent, but only so much."""
    async def story():
        wire = Wire()
        printed = clupy_server.Printed(wire)
        for number in range(20_000):
            printed.show(number % 4, "out", line)
        await asyncio.sleep(0.1)
        sent = sum(len(part) for message in wire for part in clupy.encode(message))
        assert sent < 100_000 and len(wire) <= 10
        shown, dropped, seen = "", 0, 0
        while seen < len(wire):                            # it goes on, and shows what was sent, until no more comes
            _, entries, more, size = wire[seen]
            shown, dropped, seen = shown + "".join(text for _, _, text, _ in entries), dropped + more, seen + 1
            printed.seen(size)
        assert shown.count("\n") + dropped == 20_000 and shown == line * shown.count("\n") and shown
    asyncio.run(story())


def test_a_line_longer_than_what_may_wait_is_sent_whole_whatever_waits_before_it():
    async def story():
        wire, long = Wire(), "x" * (3 * clupy.UNSEEN_OUTPUT) + "\n"
        printed = clupy_server.Printed(wire)
        for line in "short\n", long, "dropped\n":
            printed.show(1, "out", line)
        printed.flush()
        assert "".join(text for _, entries, _, _ in wire for _, _, text, _ in entries) == "short\n" + long
        assert sum(dropped for _, _, dropped, _ in wire) == 1
    asyncio.run(story())


def test_output_can_be_switched_off(tmp_path):
    text = "import clupy\nclupy.parallel(print)('loud').result(30)\nclupy.close()"
    done = run_script(tmp_path, text, CLUPY_OUTPUT="off")
    assert "loud" not in done.stdout + done.stderr


def test_a_flood_of_output_stops_nobody_and_says_how_much_was_not_shown(tmp_path):
    done = run_script(tmp_path, """
        import clupy
        def flood():
            for n in range(10_000):
                print(("x" * 99 + "\\n") * 100, end="")
            return "done"
        print(clupy.parallel(flood)().result(60))
        clupy.close()
        """)
    assert "done" in done.stdout and len(done.stdout) < 120_000_000
    shown = sum("x" * 99 in line for line in done.stdout.splitlines())
    notes = [line for line in (done.stdout + done.stderr).splitlines() if "not shown" in line]
    dropped = [int(line.split("... ")[1].split()[0]) for line in notes]
    assert shown + sum(dropped) == 1_000_000


# ---- Unfinished lines

def test_an_unfinished_line_appears_while_its_call_runs(tmp_path):
    with Program(tmp_path, "-u", "-c", textwrap.dedent("""
            import clupy, os, sys, time
            def speak(end):
                print("begun ...", end="", flush=True)
                print("\\r 10%\\r 20%", end="", file=sys.stderr, flush=True)
                while not os.path.exists(end):
                    time.sleep(0.02)
                print(" and ended")
                print("\\r100%", file=sys.stderr)
            clupy.parallel(speak)(os.path.abspath("end")).result()
            clupy.close()
            """)) as program:
        until(lambda: program.out.read_text().endswith("begun ...") and program.err.read_text().endswith(" 20%"))
        (tmp_path / "end").touch()
        assert program.process.wait(PATIENCE) == 0
        mark = program.out.read_text().partition("]")[0] + "] "
        assert program.out.read_text() == f"{mark}begun ... and ended\n"
        assert program.err.read_bytes().decode() == f"\r{mark} 10%\r{mark} 20%\r{mark}100%\n"


class Terminal(io.StringIO):
    """One that shows what it was written: lines, of which \\r goes to the beginning and ESC [K takes away what follows."""

    def isatty(self):
        return True

    def lines(self):
        shown = []
        for line in self.getvalue().split("\n"):
            cells = ""
            for piece in re.split(r"(\r|\x1b\[K)", line):
                if piece == "\r":
                    column = 0
                elif piece == "\x1b[K":
                    cells = cells[:column]
                else:
                    column = 0 if cells == "" else column
                    cells, column = cells[:column] + piece + cells[column + len(piece):], column + len(piece)
            shown.append(cells)
        return shown


def test_on_a_terminal_an_unfinished_line_gives_way_and_is_there_again_when_it_goes_on(monkeypatch):
    screen, terminal = clupy_master.Screen(), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal), monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    story = [("err", "[a] ", "\r 10%", ["[a]  10%"]),
             ("err", "[a] ", "\r 20%", ["[a]  20%"]),
             ("out", "[b] ", "whole\n", ["[b] whole", ""]),                        # a's bar gives way to a whole line
             ("out", "[b] ", "no end", ["[b] whole", "[b] no end"]),
             ("err", "[a] ", "\r 5%", ["[b] whole", "[a]  5%"]),                   # and one unfinished line to the other
             ("out", "[b] ", " yet\nnext\n", ["[b] whole", "[b] no end yet", "[b] next", ""]),
             ("err", "[a] ", "\n", ["[b] whole", "[b] no end yet", "[b] next", "[a]  5%", ""]),
             ("out", "[b] ", "." * 18 + "end", ["[b] whole", "[b] no end yet", "[b] next", "[a]  5%", "[b] ............end"])]
    for stream, mark, text, shown in story:
        screen.show(stream, mark, text)
        assert terminal.lines() == shown


def test_an_unfinished_line_that_stands_is_not_shown_again_when_it_ends(monkeypatch):
    """As each one does when its worker ends; the program itself has written behind it meanwhile."""
    screen, terminal = clupy_master.Screen(), Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    screen.show("out", "[a] ", "part")
    terminal.write("1\nafter\n")
    screen.show("out", "[a] ", "\n")
    assert terminal.lines() == ["[a] part1", "after", "", ""]
    screen.show("out", "[a] ", "long " * 5)                  # of this one the beginning is to come yet
    screen.show("out", "[a] ", "\n")
    assert terminal.lines()[3:] == ["[a] " + "long " * 5, ""]


def test_where_nothing_can_be_taken_back_lines_of_several_are_not_mixed(monkeypatch):
    screen, file = clupy_master.Screen(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    for mark, text in [("[a] ", "one"), ("[a] ", " two"), ("[b] ", "x\n"), ("[a] ", " three\n"),
                       ("[b] ", "\r1"), ("[a] ", "\r2"), ("[b] ", "\r3\r\n"), ("[a] ", "\n\n")]:
        screen.show("out", mark, text)
    assert file.getvalue() == ("[a] one two\n[b] x\n[a] one two three\n\r[b] 1\r\r[a] 2\r\r[b] 1\r[b] 3\r\n\r[a] 2\n[a] \n")


def test_a_bar_of_the_program_s_own_is_out_of_the_way_while_calls_print(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal), monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm.tqdm(total=4, file=terminal, ncols=60) as bar:
        clupy_master.Screen().show("out", "[a] ", "a line\n")
        assert terminal.lines()[0].rstrip() == "[a] a line" and "0/4" in terminal.lines()[1]
        bar.update(4)


def test_of_a_line_in_several_pieces_what_is_not_shown_goes_up_to_its_end():
    async def story():
        wire = Wire()
        printed = clupy_server.Printed(wire)
        for pid, text in (1, "begun"), (3, "x" * clupy.UNSEEN_OUTPUT + "\n"), (1, " lost"), (2, "lost too"):
            printed.show(pid, "out", text)
        printed.flush()
        printed.seen(printed._unseen)                  # there is room again, in the midst of these two lines
        for pid, text in (1, " as well\nshown\n"), (2, "\rshown"), (2, " until its end\n"):
            printed.show(pid, "out", text)
        printed.flush()
        texts = collections.defaultdict(str)
        for _, entries, _, _ in wire:
            for pid, _, text, _ in entries:
                texts[pid] += text
        assert (texts[1], texts[2]) == ("begun\nshown\n", "shown until its end\n") and sum(message[2] for message in wire) == 1
    asyncio.run(story())


def test_tqdm_s_lock_for_processes_is_refused_with_the_advice_and_is_not_needed():
    tqdm = pytest.importorskip("tqdm").tqdm
    with pytest.raises(pickle.PicklingError, match="bars of tqdm's need no lock"):
        clupy.Executor(1, initializer=tqdm.set_lock, initargs=(tqdm.get_lock(),))
    assert "clupy.lock" in str(clupy.parallel(square)(multiprocessing.Lock()).failure)


# ---- Leaving, forking, Ctrl-C

def test_closing_while_the_embedded_cluster_starts_leaves_nothing():
    for delay in (0, 0, 0, 0.01, 0.03, 0.1):
        assert "lock" in str(clupy.parallel(len)(threading.Lock()).failure)
        time.sleep(delay)
        clupy.close()
    assert clupy.parallel(square)(3).result(PATIENCE) == 9


def test_a_program_that_ends_at_whatever_moment_prints_nothing_of_ours(tmp_path):
    """Soon after its first call, while a daemon thread makes calls, in an Executor, by an exception."""
    kinds = ["results = [clupy.parallel(abs)(n) for n in range(50)]",
             "results = [clupy.Executor(2).submit(abs, n) for n in range(50)]",
             *(f"def loop():\n    while True:\n        {call}\nthreading.Thread(target=loop, daemon=True).start()"
               for call in ("clupy.parallel(abs)(1).wait()", "list(clupy.map(abs, range(9)))",
                            "clupy.Executor(1).submit(abs, 1).result()"))]

    def run(number):
        end = ["", "sys.exit(3)", "raise ValueError"][number % 3]
        text = f"import clupy, sys, threading, time\n{kinds[number % 5]}\ntime.sleep({0.04 * number})\n{end}\n"
        done = subprocess.run([sys.executable, "-c", text], env=environ(), capture_output=True, text=True, timeout=60)
        expected = re.compile("program ended before|Traceback|<string>|ValueError")
        return [line for line in done.stderr.splitlines() if not expected.search(line)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert [said for said in pool.map(run, range(25)) if said] == []


def test_a_failure_that_nobody_looked_at_is_told_in_one_line_when_the_program_ends(tmp_path):
    text = """
        import clupy
        def bug(n):
            return 1 / n
        if __name__ == "__main__":
            results = [clupy.parallel(bug)(n) for n in (0, 1, 0, 2)]
            clupy.wait_all(results, time_out=30)
            print([r.value for r in results])
            LOOK
        """
    for look, told in {
            "results = None": "2 of 4", "results[2].failure": "1 of 4", "results[0].succeed(print)": "2 of 4",
            "[r.exception() for r in results]": "", "[r.fail(lambda _: None) for r in results]": "",
            "[r.successful for r in results]": "", "raise SystemExit(3)": "2 of 4"}.items():
        done = run_script(tmp_path, text.replace("LOOK", look), check=False)
        assert done.stdout.startswith("[None, 1.0, None, 0.5]")
        line = (f"{told} calls failed and nobody looked; the first: ZeroDivisionError: division by zero "
                f"at {tmp_path}/script.py line 4")
        assert done.stderr.strip() == (line if told else "")


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


WAYS_TO_WAIT = ["clupy.wait_all(futures)", "clupy.wait_all(futures, progress=True)", "futures[0].result()",
                "futures[0].wait(None)", "futures[0].exception(60)", "next(clupy.as_completed(futures))",
                "next(clupy.map(time.sleep, [60] * 3))", "asyncio.run(asyncio.wait_for(futures[0], 60))"]


def test_ctrl_c_in_a_wait_ends_the_calls_and_the_prompt_is_back(tmp_path):
    script = """
        import asyncio, clupy, os, time
        futures = [clupy.parallel(time.sleep)(60) for _ in range(3)]
        while not futures[0].running():
            time.sleep(0.01)
        print("ready", flush=True)
        try:
            {}
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        [f.cancel() for f in futures]                   # what is left: only this one call was waited for
        print(all(f.wait(5) for f in futures), {{f.cancelled() for f in futures}})
        print(clupy.parallel(pow)(2, 5).result(30))
        """
    with contextlib.ExitStack() as stack:
        programs = [stack.enter_context(Program(tmp_path / str(n), "-c", textwrap.dedent(script.format(wait))))
                    for n, wait in enumerate(WAYS_TO_WAIT)]
        for program in programs:
            until(lambda program=program: "ready" in program.out.read_text())
        time.sleep(0.5)                                 # until they wait
        for program in programs:
            program.process.send_signal(signal.SIGINT)
        for program, wait in zip(programs, WAYS_TO_WAIT, strict=True):
            until(lambda program=program: "interrupted" in program.out.read_text(), 5)
            assert program.process.wait(PATIENCE) == 0, (wait, program.log)
            assert program.out.read_text().split("\n")[1:4] == ["interrupted", "True {True}", "32"], wait


def test_ctrl_c_waits_for_what_must_be_done_whole_and_for_nothing_where_the_program_has_a_handler():
    done, heard = [], []
    with pytest.raises(KeyboardInterrupt):
        with clupy.undisturbed(), clupy.undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all")
    assert done == ["all"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("at once"))
    try:
        with clupy.undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            assert heard == ["at once"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_bell_wakes_all_who_wait_and_a_flag_stays_until_it_is_cleared():
    bell, rounds, flag = clupy.Bell(), [], clupy.Flag()
    assert not bell.until(lambda: rounds, 0.01) and not flag.wait(0.01)
    assert not bell._waiters and not flag._waiters
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(bell.until, lambda: len(rounds) > 1, PATIENCE) for _ in range(2)]
        waiting += [pool.submit(flag.wait, PATIENCE) for _ in range(2)]
        for _ in range(2):
            assert not any(future.done() for future in waiting[:2])
            rounds.append(1)
            bell.ring()
        flag.set()
        assert all(future.result(PATIENCE) for future in waiting) and flag.wait(0) and flag.is_set()
    flag.clear()
    assert not flag.wait(0)


INTERRUPTS = int(os.environ.get("INTERRUPTS", 40))        # Ctrl-C in all, by hand more: INTERRUPTS=200 pytest -k ctrl_c_anywhere

INTERRUPTED = '''
import clupy, collections, faulthandler, os, random, subprocess, sys, threading, time

def square(x):
    return x * x

def slowly(items):
    for item in items:
        time.sleep(0.0005)
        yield item

# Each makes what it needs, and gives the operation to interrupt.

def submit():
    first = clupy.parallel(square)(2)
    return lambda: [[clupy.parallel(square)(n), clupy.parallel(len)(bytes(100_000)),
                     clupy.parallel(square, retry_on=ValueError)(first)] for n in range(50)]

def wait():
    calls = [clupy.parallel(square)(n) for n in range(100)] + [clupy.parallel(time.sleep)(0.02)]
    handled = [clupy.parallel(square)(n).succeed(lambda _: time.sleep(0.001)) for n in range(20)]
    return lambda: (calls[0].wait(20), [call.result() for call in calls], clupy.wait_all(calls + handled, 20))

def as_completed():
    calls = [clupy.parallel(square)(n) for n in range(300)]
    return lambda: list(clupy.as_completed(calls))

def map_list():
    return lambda: list(clupy.map(square, range(2000)))

def map_slow():
    return lambda: list(clupy.map(square, slowly(range(100)), chunk_size=1))

def executor():
    def run():
        with clupy.Executor(2, master=os.environ.get("CLUPY_MASTER")) as it:        # a cluster of its own, where there is one
            list(it.map(square, range(100)))
            [it.submit(square, it.submit(square, 3)) for _ in range(100)]
    return run

def shutdown():
    it = clupy.Executor(2)
    [it.submit(square, n) for n in range(200)]
    return it.shutdown

def close():
    clupy.parallel(square)(2).result(20)
    return clupy.close

def connect():
    clupy.close()
    return clupy.connect

def first_call():
    clupy.close()
    return lambda: clupy.parallel(square)(2).result()

def left():
    """Threads, descriptors and children of this process; job threads stay for a while, by design."""
    files = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            files[os.readlink(f"/proc/self/fd/{fd}").split(":")[0]] += 1
        except OSError:                               # it was that of the folder
            pass
    return (sorted(thread.name for thread in threading.enumerate() if thread.name != "clupy-job"),
            files["socket"], files["pipe"], files["anon_inode"], open(f"/proc/self/task/{os.getpid()}/children").read())

def is_interrupted(operation, longest):
    """Whether a KeyboardInterrupt at a random moment came while it ran."""
    runs, delay = True, random.uniform(0, longest)
    try:
        os.write(sender.stdin.fileno(), b"%f\\n" % delay)
        operation()
        runs = False
        time.sleep(delay + 5)
        assert swallowed, f"{operation} lost the KeyboardInterrupt that came after {delay} s"
        swallowed.clear()
    except KeyboardInterrupt:
        return runs

operations = [submit, wait, as_completed, map_list, map_slow, executor, shutdown, close, connect, first_call]
wanted, seed = map(int, sys.argv[1:])
print("seed", seed, flush=True)
random.seed(seed)
random.shuffle(operations)
swallowed = []                                        # by Python itself: what a weak reference's callback raises
sys.unraisablehook = swallowed.append
sender = subprocess.Popen([sys.executable, "-S", "-c", """
import os, signal, sys, time
for line in sys.stdin:
    time.sleep(float(line))
    os.kill(os.getppid(), signal.SIGINT)
"""], stdin=subprocess.PIPE)
first_call()()
clupy.close()
before, took, hits = left(), {}, collections.Counter()
while hits.total() < wanted:
    make = operations[0]
    operations.append(operations.pop(0))
    print(make.__name__, end=" ", flush=True)
    faulthandler.dump_traceback_later(50, exit=True)  # where it hangs
    if make not in took:
        operation, began = make(), time.monotonic()
        operation()
        took[make] = time.monotonic() - began
    hits[make.__name__] += bool(is_interrupted(make(), took[make] * 1.1))
    assert clupy.parallel(square)(7).result(20) == 49
    assert list(clupy.map(square, range(20))) == [n * n for n in range(20)]
clupy.close()
end = time.monotonic() + 20
while left() != before and time.monotonic() < end:
    time.sleep(0.02)
print("\\n", dict(hits), left())
assert left() == before, before
sender.stdin.close()
sender.wait()
'''


@pytest.mark.parametrize("where", ["embedded", "cluster"])
def test_ctrl_c_anywhere_is_an_interrupt_and_the_next_call_works(tmp_path, where):
    with Cluster(tmp_path / "cluster") if where == "cluster" else contextlib.nullcontext() as cluster:
        done = run_script(tmp_path, INTERRUPTED, timeout=60 + 2 * INTERRUPTS, check=False,
                          args=[str(INTERRUPTS // 2), str(random.randrange(10**6))],
                          **{"CLUPY_MASTER": cluster.address} if cluster else {})
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert re.fullmatch("(the program ended before .*\n)?", done.stderr)


def test_a_forked_child_has_an_outcome_for_every_call_at_whatever_moment_it_was_forked_off(tmp_path):
    run_script(tmp_path, f"""
        import os, sys, clupy
        sys.setswitchinterval(1e-5)               # threads are switched in the middle of everything
        results, children = [clupy.parallel(int)(i) for i in range(20_000)], []
        for _ in range(5):
            children.append(os.fork())
            if not children[-1]:
                for result in results:
                    result.exception(5)
                os._exit(0)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5
        assert [result.result({PATIENCE}) for result in results] == list(range(20_000))
    """)


@pytest.mark.parametrize("selector", ["DefaultSelector", "PollSelector"])      # the latter has no descriptor, as gevent's
def test_a_forked_child_gets_an_engine_of_its_own(tmp_path, selector):
    done = run_script(tmp_path, f"""
        import clupy, os, selectors, warnings
        selectors.DefaultSelector = selectors.{selector}
        warnings.simplefilter("ignore")
        def pid():
            return os.getpid()
        clupy.parallel(pid)().result(30)
        clupy.close()                             # a closed engine is of no interest to a child
        first = clupy.parallel(pid)().result(30)
        executor, limited = clupy.Executor(), clupy.parallel(__import__("time").sleep, max=1)
        running = limited(1)
        pending = clupy.parallel(__import__("time").sleep)(0.5)
        child = os.fork()
        if child == 0:
            assert isinstance(pending.exception(5), clupy.Closed)
            assert clupy.parallel(pid)().result(30) != first
            assert limited(0).result(30) is None and executor.submit(pid).result(30) != first
            clupy.close()
            os._exit(42)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert pending.result(30) is running.result(30) is None
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
    script = """
        import clupy, ctypes, os, sys, time
        def work(path, seconds, line):
            with open(path, "a") as file:
                file.write("x")
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                print(line)
                time.sleep(0.002)
            return "done"
        lines = "yes", "x" * 200, "\u6c49\u5b57" * 30     # a short line is most of its way, one is more bytes than letters
        calls = [clupy.parallel(work, retries=0)(os.path.abspath(f"{sys.argv[1]}{n}3"), 23 if n else 1, lines[n - 1])
                 for n in range(4)]
        while not all(call.running() for call in calls):
            time.sleep(0.01)
        print("ready", flush=True)
        if sys.argv[1] == "busy":
            ctypes.PyDLL(None).sleep(22)                # holds the GIL all the time
        print(*[call.result(60) for call in calls], clupy.parallel(pow)(2, 5).result(30), flush=True)
        """
    with Cluster(tmp_path, servers=2, slots=4) as cluster, contextlib.ExitStack() as stack:
        busy, stopped = [stack.enter_context(Program(tmp_path / "client", "-c", textwrap.dedent(script), name,
                                                     CLUPY_MASTER=cluster.address)) for name in ("busy", "stopped")]
        until(lambda: busy.out.read_text().count("ready") == 2)            # both write there
        for program in (stopped, cluster.master, cluster.servers[0]):
            program.process.send_signal(signal.SIGSTOP)
        time.sleep(12)                                  # a dead one would be noticed within 10 s
        for program in (cluster.master, cluster.servers[0]):
            program.process.send_signal(signal.SIGCONT)
        time.sleep(10)
        stopped.process.send_signal(signal.SIGCONT)
        for program in (busy, stopped):
            assert program.process.wait(PATIENCE) == 0, program.log
        assert busy.out.read_text().count("done done done done 32") == 2
        assert [path.read_text() for path in (tmp_path / "client").glob("*3")] == ["x"] * 8
        assert len(cluster.status()["servers"]) == 2


def test_of_several_masters_one_that_is_silent_is_left_but_not_by_a_client_that_was_stopped():
    def looked(*times, masters=2):
        """When the connection, heard at 100.0, was closed by who looked at these times; None: never."""
        closed = []
        link = clupy.MasterLink([("host", n) for n in range(masters)], b"", None)
        link._looked = 100.0
        link.connection = types.SimpleNamespace(heard=100.0, peer="host:0", close=lambda: closed.append(now))
        for now in times:
            link.look(now)
            assert not closed or link.connection.why == f"it has been silent for {silence:g} s"
        return closed[0] if closed else None
    silence = clupy.MASTER_SILENCE
    each = [100.0 + n for n in range(1, int(silence) + 1)]
    assert looked(*each) is None and looked(*each, 100.1 + silence) == 100.1 + silence
    assert looked(*each, 100.1 + silence, masters=1) is None               # there is no other
    assert looked(500.0) is None and looked(500.0, 501.0) == 501.0         # it was the client that slept, or it is both


def test_a_client_that_is_silent_for_long_loses_idle_slots_that_others_want_and_may_come_back(tmp_path):
    class Impatient(Cluster):
        def start_master(self, listen):
            self.address = listen
            program = self._stack.enter_context(Program(
                self.folder / "master", "-c", "import clupy, clupy_master, sys\nclupy_master.SILENT_CLIENT = 3.0\n"
                "clupy.main(sys.argv[1:])", "master", "--listen", listen))
            until(lambda: answers(listen))
            return program
    with Impatient(tmp_path) as cluster, Dialogue(f"""
            clupy.connect("{cluster.address}")
            for line in sys.stdin:
                calls = [clupy.parallel(time.sleep)(0.2) for _ in range(2)]
                print([call.result(30) for call in calls])
            """) as stopped:
        for turn in range(2):
            stopped.process.stdin.write(b"\n")
            stopped.process.stdin.flush()
            assert stopped.hears() == "[None, None]"
            if not turn:
                stopped.send(signal.SIGSTOP)
                clupy.connect(cluster.address)
                assert call(square, 3) == 9
                clupy.close()
                stopped.send(signal.SIGCONT)

def test_a_server_that_says_nothing_for_long_is_lost_but_not_to_a_client_that_was_stopped():
    closed = []
    pool = clupy.Pool(types.SimpleNamespace())
    slot = types.SimpleNamespace(heard=100.0, calls={1: "call"})
    pool.links["s"] = types.SimpleNamespace(id="s", name="s", heard=100.0, lost_at=None, slots={1: slot},
                                            connection=types.SimpleNamespace(close=lambda: closed.append("s")))
    pool.judge(100.0 + clupy.SILENCE_TIME)
    pool.restart_clocks(1000.0)                         # the client slept
    pool.judge(1000.0 + clupy.SILENCE_TIME)
    assert not closed
    slot.calls = {}
    pool.judge(1001.0 + clupy.SILENCE_TIME)             # nothing of ours is out there
    assert not closed
    slot.calls = {1: "call"}
    pool.judge(1001.0 + clupy.SILENCE_TIME)
    assert closed == ["s"]


def test_a_client_starts_its_clocks_anew_when_it_was_stopped(tmp_path):
    """A server and a slot that said nothing while the client could not hear them are not lost."""
    with Program(tmp_path, "-c", textwrap.dedent("""
            import clupy, time
            clupy.SILENCE_TIME, clupy.ALIVE_TIME = 3.0, 0.5
            clupy.connect(slots=1)
            call = clupy.parallel(time.sleep, retries=0)(9)
            while not call.running():
                time.sleep(0.01)
            print("ready", flush=True)
            print(call.result(60))
            """)) as program:
        until(lambda: "ready" in program.out.read_text())
        program.process.send_signal(signal.SIGSTOP)
        time.sleep(5)                                   # longer than SILENCE_TIME
        program.process.send_signal(signal.SIGCONT)
        assert program.process.wait(PATIENCE) == 0 and program.out.read_text() == "ready\nNone\n", program.log


def test_every_connection_has_its_keepalive_and_none_a_time_out_to_which_a_full_window_looks_like_death(cluster):
    clupy.connect(cluster.address)
    call(square, 3)

    def of(transport):
        sock = transport.get_extra_info("socket")
        return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)] + [
            sock.getsockopt(socket.IPPROTO_TCP, option) for option in
            (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)]
    engine = clupy._engine
    slots = [of(slot.transport) for slot in engine.pool.slots()]
    assert slots and slots == [[1, 4, 2, 3, 0]] * len(slots)
    links = [engine.master_side.link, *engine.pool.links.values()]
    assert [of(link.connection._writer) for link in links] == [[1, 4, 2, 3, 0]] * 2


def test_a_peer_that_is_stopped_is_heard_of_and_one_whose_window_is_full_too():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sock:
        clupy.tune(sock)                                # nobody accepts, nobody reads: the kernel alone answers
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 20))
        until(lambda: clupy.silence(sock) > 0.5)
        until(lambda: clupy.silence(sock) < 0.5)        # it was asked whether there is room again


def reset_of(packet, back):
    """The packet that ends the connection of this one, at its sender (back) or its receiver."""
    def sum_of(data):
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        return ~(total % 0xFFFF) & 0xFFFF
    start = (packet[0] & 15) * 4
    source, destination, sent, heard = struct.unpack_from("!HHII", packet, start)
    here, there = packet[12:16], packet[16:20]
    if back:
        here, there, source, destination, sent, heard = there, here, destination, source, heard, sent + 1 & 0xFFFFFFFF
    segment = struct.pack("!HHIIBBHHH", source, destination, sent, heard, 0x50, 0x14, 0, 0, 0)         # RST, ACK
    segment = segment[:16] + struct.pack("!H", sum_of(here + there + struct.pack("!HH", 6, 20) + segment)) + segment[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + here + there
    return head[:10] + struct.pack("!H", sum_of(head)) + head[12:] + segment


class Net:
    """Hosts on this machine, each a network of its own, with this process as their switch: it passes on what they send, late
    or not at all where a test wants it so.  A host has no name in the system, so nothing is left of it whoever is killed."""

    @dataclasses.dataclass
    class Link:
        """What becomes of packets on one way; as it stands, nothing."""
        loss: float = 0.0                          # part of them that does not arrive
        delay: float = 0.0                         # seconds on their way
        rate: float = math.inf                     # bytes a second
        reset: bool = False                        # their connections are ended, as some firewalls do
        free: float = 0.0                          # when the packets before have gone out
        packets: int = 0                           # so far

    def __init__(self, *hosts):
        self.hosts = {name: number for number, name in enumerate(hosts, 1)}
        self.links = {}                            # {(source, destination): Link}, None: any host

    @staticmethod
    @functools.cache
    def refusal():
        """Why this machine lets us have no such hosts, or None."""
        try:
            with Net("host"):
                return None
        except OSError as error:
            return f"no networks of one's own: {error}"

    def address(self, host):
        return f"10.77.0.{self.hosts[host]}"

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._stop, stop = os.pipe()
            for fd in self._stop, stop:
                stack.callback(os.close, fd)
            self._namespaces, self._cables = {}, {}       # {host: descriptor}; a cable gives and takes packets, one at a time
            for host in self.hosts:
                self._add(stack, host)
            thread = threading.Thread(target=self._switch)
            thread.start()
            stack.callback(thread.join)
            stack.callback(os.write, stop, b"x")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    @staticmethod
    def _opened(stack, path, flags):
        fd = os.open(path, flags | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        return fd

    def _add(self, stack, host):
        with self.at(None):
            self._namespaces[host] = self._opened(stack, "/proc/thread-self/ns/net", os.O_RDONLY)
            cable = self._cables[host] = self._opened(stack, "/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(cable, 0x400454CA, struct.pack("16sH22x", b"cable", 0x1001))        # TUNSETIFF: IFF_TUN, IFF_NO_PI
            for command in ("link set lo up", f"addr add {self.address(host)}/24 dev cable", "link set cable up"):
                subprocess.run([needed("/usr/sbin/ip", "ip"), *command.split()], check=True)

    @contextlib.contextmanager
    def at(self, host):
        """What this thread starts and connects in the block is on that host; None: on a new one."""
        libc = ctypes.CDLL(None, use_errno=True)

        def checked(result):
            if result:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        with open("/proc/thread-self/ns/net") as before:
            checked(libc.setns(self._namespaces[host], 0) if host else libc.unshare(0x40000000))         # CLONE_NEWNET
            try:
                yield
            finally:
                checked(libc.setns(before.fileno(), 0))

    @contextlib.contextmanager
    def impaired(self, *ways, **how):
        """The ways, (source, destination) with None for any host, are so in the block; some packet took one of them."""
        links = {way: Net.Link(**how) for way in ways}
        self.links |= links
        yield
        self.links = {way: link for way, link in self.links.items() if way not in links}
        assert any(link.packets for link in links.values())

    def _switch(self):
        names, cables = {number: host for host, number in self.hosts.items()}, {fd: host for host, fd in self._cables.items()}
        poll, waiting, count = select.poll(), [], itertools.count()             # waiting: (when, number, destination, packet)
        for fd in self._stop, *cables:
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(max(0.0, waiting[0][0] - time.monotonic()) * 1000 if waiting else None)}
            if self._stop in ready:
                return
            for fd in ready:
                packet = os.read(fd, 1 << 16)
                if packet[0] >> 4 == 4 and packet[19] in names:                 # IPv4, to one of us
                    for when, to, data in self._passed(cables[fd], names[packet[19]], packet):
                        heapq.heappush(waiting, (when, next(count), to, data))
            while waiting and waiting[0][0] <= time.monotonic():
                *_, to, data = heapq.heappop(waiting)
                os.write(self._cables[to], data)

    def _passed(self, source, destination, packet):
        """[(when, host, packet)] that becomes of a packet."""
        now, links = time.monotonic(), self.links
        for way in (source, destination), (source, None), (None, destination):
            if link := links.get(way):
                break
        else:
            return [(now, destination, packet)]
        link.packets += 1
        if link.reset:
            return [(now, source, reset_of(packet, back=True)), (now, destination, reset_of(packet, back=False))]
        free = max(now, link.free) + len(packet) / link.rate
        if random.random() < link.loss or free > now + 1:                       # a second's packets at most wait for their turn
            return []
        link.free = free
        return [(free + link.delay, destination, packet)]


def test_a_server_that_is_cut_off_runs_no_call_twice_that_may_start_once(tmp_path):
    """The cable is pulled while a server runs two calls; it goes on, and cannot tell anybody."""
    def until_told(name):
        path = tmp_path / name
        with path.open("a") as file:
            file.write("x")
        starts = path.stat().st_size                   # now: a try that was given up must not say the same
        while not (tmp_path / "go").exists():
            time.sleep(0.1)
        return starts
    if Net.refusal():
        pytest.skip(Net.refusal())
    with Net("near", "far") as net, net.at("near"), contextlib.ExitStack() as stack:
        address = f"{net.address('near')}:{free_port()}"

        def serve(host):
            with net.at(host):
                return stack.enter_context(Program(tmp_path / host, "-m", "clupy", "serve", "--slots", 2, CLUPY_MASTER=address,
                                                   CLUPY_LISTEN=f"{net.address(host)}:0"))
        master = stack.enter_context(Program(tmp_path / "master", "-m", "clupy", "master", "--listen", address))
        until(lambda: answers(address))
        far = serve("far")
        clupy.connect(address)
        once, again = clupy.parallel(until_told, retries=0)("once"), clupy.parallel(until_told)("again")
        until(lambda: (tmp_path / "once").exists() and (tmp_path / "again").exists())
        with net.impaired(("near", "far"), ("far", "near"), loss=1):
            serve("near")
            with pytest.raises(clupy.WorkerDied, match="server .* was lost while worker .* try 1 of 1"):
                once.result(PATIENCE)
            assert not again.completed
            until(lambda: (tmp_path / "again").read_text() == "xx")            # on the other server
            why = r"its machine has not answered for \d+ s"           # on either side
            until(lambda: re.search(f"server .* is lost: {why}", master.log) and re.search(f"client .* is gone: {why}", far.log))
            until(lambda: re.search(r"no master: .*: its machine has not answered for \d+ s", far.log))
        (tmp_path / "go").touch()
        assert again.result(PATIENCE) == 2 and (tmp_path / "once").read_text() == "x"
        assert {f.result(PATIENCE) for f in [clupy.parallel(square)(n) for n in range(4)]} == {0, 1, 4, 9}
        clupy.close()


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


def test_a_new_master_leaves_clients_what_they_hold(tmp_path):
    """Idle slots, which nobody else wants; the client is stopped until the new master has heard of them from their server."""
    def rows():
        return [(row["wanted"], row["share"]) for row in cluster.status()["clients"].values()]
    script = "import clupy, time\nclupy.wait_all([clupy.parallel(time.sleep)(0.5) for _ in range(2)])\ntime.sleep(60)"
    with Cluster(tmp_path) as cluster, Program(tmp_path / "client", "-c", script, CLUPY_MASTER=cluster.address) as client:
        until(lambda: rows() == [(0, 2)])
        before = workers()
        client.process.send_signal(signal.SIGSTOP)
        cluster.master.process.kill()
        cluster.master.process.wait()
        cluster.start_master(cluster.address)
        until(lambda: [row["used"] for row in cluster.status()["servers"].values()] == [2])
        client.process.send_signal(signal.SIGCONT)
        until(lambda: rows() == [(0, 2)])
        assert workers() == before


def test_without_master_and_slots_calls_fail_after_patience(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address, patience="2s")
        assert clupy.parallel(square)(3).result(PATIENCE) == 9
        for program in (cluster.master, *cluster.servers):
            program.process.kill()
        until(lambda: not workers())
        with pytest.raises(clupy.MasterUnreachable, match="is `python -m clupy master` running"):
            clupy.parallel(square)(4).result(PATIENCE)
    with pytest.raises(clupy.MasterUnreachable):
        clupy.close()
        clupy.connect(cluster.address, patience=1)


def test_a_master_that_never_answers_is_told_of_and_waited_for_no_longer_than_patience(tmp_path):
    for master in f"127.0.0.1:{free_port()}", "nobody.invalid":
        done = run_script(tmp_path, """
            import clupy
            print(type(clupy.parallel(abs)(-1).exception(30)).__name__)
            """, CLUPY_MASTER=master, CLUPY_PATIENCE="4s")
        assert done.stdout == "MasterUnreachable\n" and "calls wait (1), for 4 s at most: no master" in done.stderr


def test_all_servers_gone_and_one_back_later(tmp_path):
    with Cluster(tmp_path) as cluster:
        clupy.connect(cluster.address)
        assert clupy.parallel(square)(3).result(PATIENCE) == 9
        cluster.servers[0].process.kill()
        until(lambda: not workers())
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

@pytest.mark.parametrize("kind", [concurrent.futures.ThreadPoolExecutor, process_pool])
def test_calls_can_run_on_another_executor_and_are_pickled_all_the_same(kind):
    with kind(2) as executor:
        clupy.connect(executor=executor)
        numbers = [1, 2, 3]
        assert clupy.parallel(lambda n: n + 1)(1).result(PATIENCE) == 2
        assert clupy.parallel(list)(numbers).result(PATIENCE) is not numbers
        large = clupy.parallel(lambda data: data + b"end")(bytearray(1 << 20)).result(PATIENCE)
        assert large == bytes(1 << 20) + b"end" and type(large) is bytearray
        with pytest.raises(ValueError, match="on purpose"):
            clupy.parallel(fails)("on purpose").result(PATIENCE)
        assert "lock" in str(clupy.parallel(square)(threading.Lock()).failure)
        assert list(clupy.map(square, range(10))) == [n * n for n in range(10)]
        with clupy.Executor() as mine:
            assert mine.submit(square, 4).result(PATIENCE) == 16
        clupy.close()


def test_a_forked_child_hears_that_calls_on_another_executor_are_its_parents(tmp_path):
    run_script(tmp_path, """
        import concurrent.futures, os, threading, clupy
        pool, go = concurrent.futures.ThreadPoolExecutor(1), threading.Event()
        pool.submit(go.wait)
        clupy.connect(executor=pool)
        result = clupy.parallel(int)("42")
        child = os.fork()
        if not child:
            assert isinstance(result.exception(5), clupy.Closed)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        go.set()
        assert result.result(30) == 42
        """)


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


def printed(error):
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

    def fork_and_get(refs):                                 # nor by a shared value: the slot's socket is the parent's
        if (pid := os.fork()) == 0:
            mine = socket.socketpair()                      # may have its number
            with contextlib.suppress(LookupError):
                refs[0][0].get()
                os._exit(1)
            os._exit(len(mine))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def fork():                                             # by its worker, which the forked child asks
        if (pid := os.fork()) == 0:
            os._exit(importlib.util.find_spec("nowhere_either") is None)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    clupy.connect(slots=1)
    assert call(imports) and call(imports) and call(fork) == 1
    assert asked == ["nowhere", "nowhere", "nowhere_either"] and call(fork_and_get, [[clupy.share(1).unresolved()]]) == 2
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    try:
        assert call(printed, ValueError()) == "ValueError\n" and __name__ in asked    # though pytest loaded it
    finally:
        cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_a_program_run_by_dash_m_is_a_module_of_its_package(tmp_path):
    write_files(tmp_path, {
        "pkg/__init__.py": "",
        "pkg/other.py": "def name():\n    from pkg import main\n    return main.__name__, main.shared\n",
        "pkg/main.py": "import clupy\nfrom . import other\nshared = 5\ndef f():\n    return *other.name(), shared\n"
                       "if __name__ == '__main__':\n    print(clupy.parallel(f)().result(30))\n",
        "single.py": "import clupy\nprint('single' in clupy.own_modules())\n"})
    for name, says in ("pkg.main", "('pkg.main', 5, 5)\n"), ("single", "True\n"):
        done = subprocess.run([sys.executable, "-m", name], cwd=tmp_path, env=environ(CLUPY_PORT=free_port()),
                              capture_output=True, text=True, timeout=60)
        assert done.stdout == says, done.stderr


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_who_shadows_a_standard_module_here_shadows_it_there(tmp_path, request, master):
    names = "secrets", "statistics", "profile", "trace", "code", "calendar", "cmd", "this", "platform"
    write_files(tmp_path / "client" / "sched", {"__init__.py": "mine = 'sched'\n", "part.py": "mine = 'part'\n"})
    write_files(tmp_path / "client" / "wave", {"read.me": "a folder is no module"})
    text = "mine = '{0}'\ndef name(): return mine\nimport sys\n"
    text += "def python_version(): return sys.version.split()[0]\nsystem = node = python_implementation = machine = name\n"
    tell(tmp_path / "client", """
        import random, secrets, statistics, profile, code, calendar        # the others in calls alone
        def mine(name): return importlib.import_module(name).mine
        import importlib
        for name in NAMES: assert call(mine, name) == name, name
        assert call(lambda: (secrets.mine, calendar.mine)) == ("secrets", "calendar")
        assert call(code.name) == "code" and call(mine, "sched") == "sched" and call(mine, "sched.part") == "part"
        def standard():
            import json.decoder, os, wave, types, typing
            return random.randrange(1, 2), json.loads("3"), types is typing.types, bool(wave.open and os.fork)
        assert call(standard) == (1, 3, True, True)
        """.replace("NAMES", repr(names)),
        {f"{name}.py": text.format(name) for name in names} | {"os.py": "1 / 0\n"},
        **{"CLUPY_MASTER": request.getfixturevalue("cluster").address} if master == "a cluster" else {})


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
    monkeypatch.setattr(clupy, "stamp", lambda path: (0, 0))        # as on another machine
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


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_a_module_without_source_runs_where_its_file_is_and_by_value_if_that_is_gone(tmp_path, request, master):
    tell(tmp_path / "client", """
        import importlib, importlib.util, os, py_compile, shutil
        for name in "quick", "package/part":
            py_compile.compile(name + ".py", name + ".pyc")
            os.remove(name + ".py")
        import package.part, quick
        assert call(quick.f) == call(package.part.f) == "compiled" and type(call(quick.C)) is quick.C
        assert call(lambda: quick.__file__) == quick.__file__
        if spec := importlib.util.find_spec("xxlimited"):          # an extension of CPython's own tests
            shutil.copy(spec.origin, os.path.basename(spec.origin))
            assert call(lambda: importlib.import_module("xxlimited").foo(2, 3)) == 5

        import gone, lost.part
        shutil.rmtree("lost")
        shutil.rmtree("__pycache__")
        os.remove("gone.py")
        assert call(gone.count) == 1 and type(call(gone.C)) is gone.C and call(type, gone.C()) is gone.C
        def twice():
            gone.count(), gone.count()
            assert gone.add() == gone.total            # its functions and it have one namespace
            return gone.state == [0] * 2 + gone.state[2:], gone.state is gone.get(), gone.C().json('2'), gone.__name__
        assert call(twice) == (True, True, 2, "gone")
        assert call(lost.part.f) == ("lost", 5)
        import stuck
        os.remove("stuck.py")
        error = clupy.parallel(lambda: stuck.lock)().exception(30)
        assert isinstance(error, ModuleNotFoundError) and "cannot be read by its client" in str(error), error
        """, {"quick.py": "def f(): return 'compiled'\nclass C: pass\n", "package/__init__.py": "",
              "package/part.py": "def f(): return 'compiled'\n", "stuck.py": "import threading\nlock = threading.Lock()\n",
              "gone.py": "import json\nstate, total = [], 0\n"
                         "def add():\n    global total\n    total += 1\n    return total\n"
                         "def count():\n    state.append(0)\n    return len(state)\n"
                         "def get(): return state\nclass C:\n    def json(self, text): return json.loads(text)\n",
              "lost/__init__.py": "name = 'lost'\n", "lost/part.py": "import lost\ndef f(): return lost.name, 5\n"},
        **{"CLUPY_MASTER": request.getfixturevalue("cluster").address} if master == "a cluster" else {})


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_submodules_that_were_imported_here_are_found_through_their_package_there(tmp_path, request, master):
    tell(tmp_path / "client", """
        import concurrent.futures, functools, json.tool, types, unittest.mock, urllib.robotparser, wsgiref.headers
        import xml.dom.minidom, indirect, mine.deep.leaf, pack
        parse = "<a/>"
        MODULES, TABLE, holder = [xml], {"mine": mine}, types.SimpleNamespace(mod=wsgiref)
        class Holder:
            mod = urllib
            def names(self): return self.mod.robotparser.__name__, type(self).mod.robotparser.__name__
        def through_a_list(): return MODULES[0].dom.minidom.parseString(parse).documentElement.tagName
        def through_a_dict(): return TABLE["mine"].deep.leaf.value
        def through_an_object(): return holder.mod.headers.__name__
        def through_a_function(mod=json): return getattr(mod, "tool").__name__
        assert call(through_a_list) == "a" and call(through_a_dict) == "leaf" and call(through_an_object) == "wsgiref.headers"
        assert call(Holder().names) == ("urllib.robotparser",) * 2 and call(through_a_function) == "json.tool"
        assert call(lambda module: module.deep.leaf.value, mine) == "leaf" and call(indirect.name) == "unittest.mock"
        assert call(functools.partial(getattr, concurrent), "futures").__name__ == "concurrent.futures"
        def missing():
            assert not hasattr(MODULES[0], "nothing") and not hasattr(mine, "nothing") and getattr(mine, "__all__", 3) == 3
            return pack.own, hasattr(pack, "other"), mine.broken
        error = clupy.parallel(missing)().exception(30)
        assert type(error) is ModuleNotFoundError and error.name == "not_there", error
        error = clupy.parallel(lambda: MODULES[0].nothing)().exception(30)
        assert type(error) is AttributeError and str(error) == "module 'xml' has no attribute 'nothing'", error
        """, {"mine/__init__.py": "", "mine/deep/__init__.py": "", "mine/deep/leaf.py": "value = 'leaf'\n",
              "mine/broken.py": "import not_there\n",
              "indirect.py": "import unittest\ndef name(): return unittest.mock.__name__\n",
              "pack/__init__.py": "def __getattr__(name):\n    if name == 'own': return 1\n    raise AttributeError(name)\n"},
        **{"CLUPY_MASTER": request.getfixturevalue("cluster").address} if master == "a cluster" else {})


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_calls_that_a_module_makes_when_it_is_imported_are_refused_in_a_worker_with_the_advice(tmp_path, request, master):
    options = {"CLUPY_MASTER": request.getfixturevalue("cluster").address} if master == "a cluster" else {}
    calls = {"waits": "results = [clupy.parallel(work)(n) for n in range(20)]\nclupy.wait_all(results)\nresults[0].result()\n",
             "asks": "print(clupy.parallel(work)(1).result(30))\n", "maps": "print(list(clupy.map(work, [1, 2])))\n",
             "pools": "with clupy.Executor() as pool: print(pool.submit(work, 1).result(30))\n"}
    files = {f"{name}.py": f"import clupy\ndef work(n): return n + 1\n{text}" for name, text in calls.items()}
    files["top.py"] = ("import clupy\nclupy.connect(patience=50)\ndef inner(n): return n + 1\n"
                       "def outer(n): return clupy.parallel(inner)(n).result()\nclupy.close()\n")
    write_files(tmp_path / "client", files)
    for name in calls:
        done = run_script(tmp_path / "client", f"import {name}", check=False, timeout=30, **options)
        advice = (f"module '{name}' makes calls when it is imported, as it is in a worker now: put them under "
                  "if __name__ == '__main__':")
        assert done.returncode == 1 and advice in done.stderr and len(done.stderr.splitlines()) < 100, done.stderr
    done = run_script(tmp_path / "client", """
        import clupy, top
        assert clupy.parallel(top.outer)(3).result(30) == 4 and clupy.parallel(top.outer)(4).result(30) == 5
        """, **options)
    assert not done.stderr


@pytest.mark.parametrize("executor", [False, True])
def test_a_second_connect_with_the_same_settings_is_the_same_cluster_and_another_names_both(executor):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = {"executor": pool} if executor else {"slots": 1}
        clupy.connect(**first)
        engine = clupy._engine
        clupy.connect(**first)
        assert clupy._engine is engine and call(square, 3) == 9
        with pytest.raises(RuntimeError, match="ThreadPool.* not Settings.*close" if executor else "slots=1, not 2; .*close"):
            clupy.connect(slots=2)
        with pytest.raises(RuntimeError, match="ThreadPool.* not <.*ThreadPool" if executor else "Settings.* not <.*ThreadPool"):
            clupy.connect(executor=concurrent.futures.ThreadPoolExecutor(1))
        clupy.close()


def test_the_first_call_connects_as_connect_does():
    assert call(square, 3) == 9
    engine = clupy._engine
    clupy.connect()
    assert clupy._engine is engine


DATA = {
    "with_data/__init__.py": "",
    "with_data/table.txt": "1 2 3\n",
    "with_data/deep/more.txt": "caf\xe9",
    "spread/part.txt": "a part",
    "single.py": "",
    "beside.txt": "beside",
    "secret.txt": "no",
}


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_files_beside_a_module_are_there_where_it_is(tmp_path, request, master):
    tell(tmp_path / "client", """
        import importlib.resources, os, pkgutil
        read, package_file = [], clupy.FETCHES["file"]
        clupy.FETCHES["file"] = lambda path: read.append(os.path.relpath(path)) or package_file(path)
        if "CLUPY_MASTER" not in os.environ: clupy.connect(slots=1)
        def data(name): return pkgutil.get_data("with_data", name)
        def text(name): return importlib.resources.files("with_data").joinpath(name).read_text("utf-8")
        def rest():
            files = importlib.resources.files("with_data")
            with importlib.resources.as_file(files / "table.txt") as path, open(path) as file: lines = file.readlines()
            with (files / "deep" / "more.txt").open("rb") as file: more = file.read()
            found = {one.name: one.is_dir() for one in files.iterdir() if not one.name.startswith("_")}
            again = importlib.resources.read_text("with_data", "table.txt")
            return lines, more.decode(), found, (files / "nothing").is_file(), again
        assert call(data, "table.txt") == b"1 2 3\\n"
        assert call(text, "table.txt") == "1 2 3\\n" and call(text, "deep/more.txt") == "caf\xe9"
        assert call(rest) == (["1 2 3\\n"], "caf\xe9", {"table.txt": False, "deep": True}, False, "1 2 3\\n")
        assert call(lambda: importlib.resources.files("spread").joinpath("part.txt").read_text()) == "a part"
        assert read.count("with_data/table.txt") <= 1 + ("CLUPY_MASTER" in os.environ), read       # once for each worker
        for name in "nothing", "deep":
            assert isinstance(clupy.parallel(data)(name).exception(30), OSError)
        assert type(clupy.parallel(text)("nothing").exception(30)) is FileNotFoundError
        # of what is below no package: whatever is there by its path
        assert call(pkgutil.get_data, "single", "beside.txt") == b"beside"
        assert clupy.FETCHES["file"](os.path.abspath("with_data/../secret.txt"))[0] == "refused"
        os.symlink(os.path.abspath("secret.txt"), "with_data/link.txt")
        assert clupy.FETCHES["file"](os.path.abspath("with_data/link.txt"))[0] == "refused"
        with open("with_data/large", "wb") as file: file.truncate((64 << 20) + 1)
        kind, why = clupy.FETCHES["file"](os.path.abspath("with_data/large"))
        assert kind == "refused" and "large has 64 MiB" in why and "share()" in why
        with open("with_data/large", "wb") as file: file.truncate(40 << 20)
        assert call(lambda: len(pkgutil.get_data("with_data", "large"))) == 40 << 20
        """, DATA, **{"CLUPY_MASTER": request.getfixturevalue("cluster").address} if master == "a cluster" else {})


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


@pytest.mark.parametrize("master", ["embedded", "a cluster"])
def test_a_call_runs_the_modules_as_the_program_has_them_now(tmp_path, request, master):
    address = request.getfixturevalue("cluster").address if master == "a cluster" else ""
    tell(tmp_path / "client", """
        import importlib, os, sys, time, types
        import model, user                             # user imports model
        clupy.connect(**({"master": os.environ["MASTER"]} if os.environ["MASTER"] else {"slots": 2}))
        def write(name, text):
            time.sleep(0.01)                           # a file of the same second and size is taken for the one before
            with open(name + ".py", "w") as file: file.write(text)
            os.utime(name + ".py", ns=(time.time_ns(), time.time_ns() + next(later)))
        later = iter(range(2 * 10**9, 10**12, 2 * 10**9))
        def both(): return model.f(), user.g(), os.getpid()
        def slowly():
            time.sleep(1)
            return model.f()
        one = call(both)
        assert one[:2] == (1, 1)
        running = [clupy.parallel(slowly)() for _ in range(2)]
        while not all(future.running() for future in running): time.sleep(0.01)
        write("model", "def f(): return 2\\n")
        importlib.reload(model)
        assert call(both)[:2] == (2, 2) and call(model.f) == 2
        assert all(future.result(30) in (1, 2) for future in running) and running[0].result() == 1
        def pid():
            time.sleep(0.2)
            return both()[2]
        pids = set()
        while len(pids) < 2: pids |= {future.result(30) for future in [clupy.parallel(pid)() for _ in range(2)]}
        importlib.reload(model)                        # nothing changed: nobody is renewed
        assert call(both)[2] in pids and one[2] not in pids
        write("model", "def f(): return 3\\n")
        del sys.modules["model"]
        import model
        assert call(both)[:2] == (3, 3)
        old = model.f                                  # as %autoreload 2 does
        write("model", "def f(): return 4\\n")
        old.__code__ = importlib.reload(model).f.__code__
        model.f = old
        assert call(both)[:2] == (4, 4) and call(old) == 4
        # a module that cannot be imported, until its file is mended: imported here, in calls alone, or not there at first
        def late(name): return importlib.import_module(name).value
        write("broken", "value = \\n")
        assert type(clupy.parallel(late)("broken").exception(30)) is SyntaxError
        write("broken", "value = 5\\n")
        assert call(late, "broken") == 5
        assert type(clupy.parallel(late)("missing").exception(30)) is ModuleNotFoundError
        write("missing", "value = 1 / 0\\n")
        importlib.invalidate_caches()
        assert type(clupy.parallel(late)("missing").exception(30)) is ZeroDivisionError
        write("missing", "value = 6\\n")
        import missing
        assert call(late, "missing") == 6 and call(lambda: missing.value) == 6
        """, {"model.py": "def f(): return 1\n", "user.py": "import model\ndef g(): return model.f()\n"}, MASTER=address)


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


def test_whatever_stands_among_the_modules_hurts_no_call(tmp_path, monkeypatch):
    class Raising:
        def __getattr__(self, name): raise SystemExit(name)

    class Yielding:
        def __getattr__(self, name): return self
    namespace = importlib.machinery.ModuleSpec("orphan.space", None, is_package=True)
    namespace.submodule_search_locations = Refusing(KeyError("orphan"), "pickled")      # is no list
    strange = types.ModuleType("strange")
    strange.__spec__ = namespace
    for name, thing in {"raising": Raising(), "yielding": Yielding(), "strange": strange, "number": 3, "nothing": None,
                        "no.string": "text", 7: strange}.items():
        monkeypatch.setitem(sys.modules, name, thing)
    assert __name__ in clupy.own_modules() and not clupy.own_modules() & {"raising", "yielding", "strange", "number", 7}
    assert call(square, 3) == 9
    for name in "raising", "yielding", "strange", "number":
        assert clupy.module_source(name)[0] == "refused"
    assert clupy.module_source("nothing") == ("no",)

    class Finder:
        def find_spec(self, name, path=None, target=None): raise SystemExit("no")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
    assert "SystemExit: no" in clupy.module_source("nowhere")[1]
    monkeypatch.delitem(sys.modules, "__main__")
    assert __name__ in clupy.own_modules() and clupy.module_source("json") == ("no",)


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


ENUMS = """
    import dataclasses, datetime, enum
    class Planet(enum.Enum):
        EARTH, TERRA, MARS = (6, 2), (6, 2), (8, 4)
        def __init__(self, mass, radius): self.mass, self.radius = mass, radius
        def density(self): return self.mass / self.radius
    class Status(enum.IntEnum):
        OK, GONE = (200, "fine"), (410, "gone")
        def __new__(cls, code, phrase):
            self = int.__new__(cls, code)
            self._value_, self.phrase = code, phrase
            return self
    @dataclasses.dataclass(frozen=True)
    class Pair: a: int; b: int
    class Pairs(Pair, enum.Enum): ONE, TWO = (1, 2), (3, 4)
    class Day(datetime.date, enum.Enum): FIRST = 2020, 1, 2
    class Access(enum.Flag, boundary=enum.KEEP): R, W, RW, X = 1, 2, 3, 4
    def story():
        assert Planet.TERRA is Planet.EARTH and list(Planet.__members__) == ["EARTH", "TERRA", "MARS"] and len(Planet) == 2
        assert (Planet.MARS.density(), Planet((6, 2)), Planet["TERRA"].mass) == (2, Planet.EARTH, 6)
        assert (Status.GONE.phrase, Status.GONE + 1, Status(200)) == ("gone", 411, Status.OK)
        assert (Pairs.TWO.a, Pairs.ONE.b, Pairs(Pair(3, 4))) == (3, 2, Pairs.TWO) and Day.FIRST.year == 2020
        assert Access.RW == Access.R | Access.W and list(Access.__members__) == ["R", "W", "RW", "X"]
        assert (Access.R | Access.X).value == 5 and Access(8).value == 8
        return Planet.MARS, Status.OK, Pairs.TWO, Access.RW, [*map(str, (Planet.MARS, Status.OK, Pairs.TWO, Access.RW))]
    assert call(story) == story() and call(lambda member: member is Pairs.TWO and member.b, Pairs.TWO) == 4
    """
MADE = """
    import abc
    class Plugin:
        found = {}
        def __init_subclass__(cls, tag): Plugin.found[tag] = cls
    class Csv(Plugin, tag="csv"): pass
    class Counted:
        seen = []
        def __init_subclass__(cls): Counted.seen.append(cls.__name__)
    class Once(Counted): pass
    class Meta(type):
        made = []
        def __new__(meta, name, bases, body, **options): return super().__new__(meta, name, bases, body)
        def __init__(cls, name, bases, body, *, kind): cls.kind, _ = kind, Meta.made.append(name)
        def __setattr__(cls, name, value): type.__setattr__(cls, name, value) if name == "kind" else 1 / 0
    class First(metaclass=Meta, kind=1): n = 5
    class Second(First, dict, kind=2): pass
    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self): pass
    class Square(Shape):
        def area(self): return 4
    Shape.register(Csv)
    class Outer:
        class Inner: pass
    def story():
        class Late(Plugin, tag="late"): pass
        assert Plugin.found == {"csv": Csv, "late": Late} and Plugin.__subclasses__() == [Csv, Late]
        assert (First.kind, Second.kind, Meta.made, Second(a=1).n, type(Second)) == (1, 2, ["First", "Second"], 5, Meta)
        assert Square().area() == 4 and Shape.__abstractmethods__ == {"area"} and Once.seen == ["Once"]
        assert isinstance(Csv(), Shape) and not isinstance(Csv(), Square)
        assert Outer.Inner.__qualname__ == "Outer.Inner"
        return Csv(), Second(), Square()
    assert [*map(type, call(story))] == [Csv, Second, Square] == call(lambda: [Csv, Second, Square])
    assert Plugin.found == {"csv": Csv} and Meta.made == ["First", "Second"]
    """
SLOTS = """
    import dataclasses, weakref
    @dataclasses.dataclass(slots=True)
    class Data: x: int; y: list = dataclasses.field(default_factory=list)
    @dataclasses.dataclass(slots=True, frozen=True)
    class Frozen: x: int
    class Private:
        __slots__ = "__own", "__weakref__"
        def __init__(self, own): self.__own = own
        def own(self): return self.__own
    class Free(Private): __slots__ = "__own", "__dict__"
    class One: __slots__ = "only"
    def story(data, frozen, private, free):
        assert (data, frozen, private.own(), free.own(), free.more) == (Data(1), Frozen(2), 3, 4, 5)
        assert not any(hasattr(value, "__dict__") for value in (data, frozen, private, One()))
        one = One()
        one.only = weakref.ref(private)().own()
        return data, frozen, private, free, one
    free = Free(4)
    free.more = 5
    data, frozen, private, free, one = call(story, Data(1), Frozen(2), Private(3), free)
    assert (data, frozen, private.own(), free.own(), free.more, one.only) == (Data(1), Frozen(2), 3, 4, 5, 3)
    """
CACHES = """
    import functools
    class Squared:
        def __init__(self, x): self.x = x
        @functools.cached_property
        def value(self): return self.x ** 2
        @functools.singledispatchmethod
        def add(self, y): return self.x + int(y)
        @add.register
        def _(self, y: list): return [self.add(item) for item in y]
    @functools.singledispatch
    def show(x): return "?"
    @show.register
    def _(x: int): return "int"
    @show.register
    def _(x: list): return [show(item) for item in x]
    show(1), Squared(1).add(2)
    assert call(lambda s: (s.value, s.add("2"), s.add(["1", 2])), Squared(3)) == (9, 5, [4, 5])
    assert call(lambda: Squared(4)).value == 16 and call(show, [1, None]) == ["int", "?"]
    assert call(lambda f: (f([1]), show([2]), show.__name__, f is show), show) == (["int"], ["int"], "show", False)
    """


@pytest.mark.parametrize("text", [ENUMS, MADE, SLOTS, CACHES], ids=["enums", "made", "slots", "caches"])
def test_classes_of_a_script_are_in_a_worker_what_their_statements_made_of_them_here(tmp_path, cluster, text):
    for master in {}, {"CLUPY_MASTER": cluster.address}:
        tell(tmp_path, text, **master)


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


def test_objects_of_a_class_that_the_program_has_dropped_still_arrive():
    def make():
        class Local:
            n = 5
        return clupy.parallel(lambda value: value)(Local())
    future = make()
    gc.collect()
    assert future.result(PATIENCE).n == 5


CHANGES = [                             # a definition of f, which returns 1; what makes it return 2
    ("n = 1\ndef f(): return n", "n = 2"),
    ("n = [1]\ndef f(): return n[0]", "n[0] = 2"),
    ("n = b'1' * 100_000\ndef f(): return int(n[:1])", "n = b'2' * 100_000"),
    ("n = bytearray(b'1' * 100_000)\ndef f(): return int(n[:1])", "n[:1] = b'2'"),
    ("n = [1] * 100_000\ndef f(): return n[-1]", "n[-1] = 2"),
    ("import numpy\nn = numpy.ones(100_000)\ndef f(): return int(n[-1])", "n[-1] = 2"),
    ("import numpy\nn = numpy.ones((300, 300), order='F')\ndef f(): return int(n[0, -1])", "n[0, -1] = 2"),
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
    text = printed(clupy.parallel(notebook["f"])(notebook["Point"]()).exception(PATIENCE))
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


def checksums(parts):
    return [zlib.crc32(part) for part in parts]


def sent_back(parts):
    return parts


def raised(parts):
    raise LookupError(*parts)


def through_an_initializer(parts):
    def set_up(parts): sys.modules["prepared"] = parts
    with clupy.Executor(2, initializer=set_up, initargs=(parts,)) as executor:
        return executor.submit(lambda: checksums(sys.modules["prepared"])).result(PATIENCE)


def through_a_nested_call(parts):
    return checksums(clupy.parallel(sent_back)(parts).result())


def through_a_ref_of_a_function(parts):
    ref = clupy.share(parts)
    return call(lambda: checksums(ref.get()))


def through_queues(parts):
    there, back = [clupy.queue(f"{way} {len(parts[0])}") for way in ("there", "back")]
    there.put(parts)
    call(lambda: back.put(there.get(timeout=PATIENCE)))
    return checksums(back.get(timeout=PATIENCE))


PLACES = {"closure": lambda parts: call(lambda: checksums(parts)),
          "default": lambda parts: call(lambda parts=parts: checksums(parts)),
          "argument": lambda parts: call(checksums, parts),
          "named argument": lambda parts: clupy.parallel(checksums)(parts=parts).result(PATIENCE),
          "argument to come": lambda parts: call(checksums, clupy.parallel(sent_back)(parts)),
          "item": lambda parts: next(clupy.map(checksums, [parts])),
          "result": lambda parts: checksums(call(sent_back, parts)),
          "result of an item": lambda parts: checksums(next(clupy.map(sent_back, [parts]))),
          "exception": lambda parts: checksums(clupy.parallel(raised)(parts).exception(PATIENCE).args),
          "initializer": through_an_initializer,
          "nested argument and result": lambda parts: call(through_a_nested_call, parts),
          "Ref": lambda parts: call(checksums, clupy.share(parts)),
          "Ref of a function": through_a_ref_of_a_function,
          "queue item": through_queues}


@pytest.mark.parametrize("where", ["embedded", "cluster"])
def test_data_of_any_size_goes_wherever_data_can_go(redis, tmp_path, where):
    numpy = pytest.importorskip("numpy")
    services = {name: os.environ[name] for name in ("CLUPY_REDIS", "CLUPY_PREFIX")}
    with contextlib.ExitStack() as stack:
        cluster = where == "cluster" and stack.enter_context(Cluster(tmp_path, servers=2, **services))
        clupy.connect(cluster.address) if cluster else clupy.connect(slots=4)
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))        # so that all workers have something to do
        for size in (1, 63 << 10, 65 << 10, 8 << 20):
            parts = [os.urandom(size), numpy.array(memoryview(os.urandom(size)))]
            came = dict(zip(PLACES, threads.map(lambda through: through(parts), PLACES.values())))
            assert came == dict.fromkeys(PLACES, checksums(parts)), size
        clupy.close()


def test_a_large_function_goes_to_a_worker_once_however_often_it_is_wrapped(tmp_path):
    class Counted:
        def __reduce__(self): return mark, (tmp_path / "unpickled",)

    def mark(path):
        with path.open("a") as file:
            file.write("x")
    clupy.connect(slots=1)
    counted, data = Counted(), bytearray(1 << 20)

    def total(n):
        return len(data) + n + (counted is None)
    assert [clupy.parallel(total)(n).result(PATIENCE) for n in range(3)] == [(1 << 20) + n + 1 for n in range(3)]
    calls = [clupy.parallel(lambda n: total(n) + 1)(n) for n in range(20)]
    assert [call.result(PATIENCE) for call in calls] == [(1 << 20) + n + 2 for n in range(20)]
    assert (tmp_path / "unpickled").read_text() == "xx"                   # once each for `total` and the lambda


def test_the_same_content_is_one_function_and_what_did_not_change_is_not_copied_again(monkeypatch):
    numpy = pytest.importorskip("numpy")
    data = numpy.zeros(1 << 20)
    made = [lambda: data.sum() for _ in range(2)]
    first = clupy.capture(made[0])
    assert clupy.capture(made[1]) is first and first.size > data.nbytes
    assert clupy.function_of((first.payload[0], [bytes(first.payload[1][0])]), "f") is first
    with monkeypatch.context() as patch:
        patch.setattr(clupy, "function_of", None)           # it would be asked if there were something new
        assert clupy.capture(made[0]) is clupy.capture(made[1]) is first
    data[-1] = 1
    second = clupy.capture(made[0])
    assert second.id != first.id and clupy.unpack(second.payload)() == 1 and clupy.unpack(first.payload)() == 0
    data[-1] = 0
    assert clupy.capture(made[0]) is first
    set_up = clupy.function_of(first.payload, "f", second.payload)
    assert set_up is clupy.function_of(first.payload, "f", second.payload) and set_up.size == first.size + second.size
    assert len({set_up.id, first.id, clupy.function_of(first.payload, "f", first.payload).id}) == 3


def test_captures_are_bounded_by_bytes_as_well(monkeypatch):
    numpy = pytest.importorskip("numpy")

    def captured(size):
        data = numpy.zeros(size, "uint8")
        return clupy.capture(lambda: data.sum())

    def kept():
        return [function for _, function, _ in clupy._captures.values()]
    monkeypatch.setattr(clupy, "MAX_CAPTURED_BYTES", 10 << 20)
    newest = [captured((1 << 20) + n) for n in range(20)][-1]
    assert sum(function.size for function in kept()) <= 10 << 20 and kept()[-1] is newest and len(kept()) >= 9
    assert captured(20 << 20) not in kept() and kept()[-1] is newest


def test_both_ends_of_a_slot_forget_functions_by_number_and_by_bytes(monkeypatch):
    def function(n, size=1):
        return clupy.Function(n, b"x" * size, "f", None)
    known = clupy.Known()
    assert [known.learn(function(n)) for n in range(clupy.MAX_KNOWN)] == [(True, [])] * clupy.MAX_KNOWN
    assert known.learn(function(0)) == (False, [])                        # now the one used last
    assert known.learn(function("new")) == (True, [1])
    monkeypatch.setattr(clupy, "MAX_KNOWN_BYTES", 1000)
    assert known.learn(function("large", 600)) == (True, [*range(2, 102)])
    assert known.learn(function("larger", 5000)) == (True, [*range(102, clupy.MAX_KNOWN), 0, "new", "large"])
    assert known.learn(function("larger", 5000)) == (False, [])
    assert known.learn(function("small")) == (True, ["larger"]) and known.learn(function("small")) == (False, [])


def test_what_either_end_of_a_slot_forgot_is_told_again_and_nothing_else_is_kept(monkeypatch):
    def kept():
        [table] = [thing for thing in gc.get_objects() if type(thing).__name__ == "Functions"]
        return len(table._functions)

    def nested(functions):
        clupy.MAX_KNOWN = 2                             # this end's
        return [clupy.parallel(functions[n % 4])().result() for n in range(9)]
    monkeypatch.setattr(clupy, "MAX_KNOWN", 2)
    clupy.connect(slots=1)
    functions = [lambda n=n: n for n in range(4)]
    assert [call(functions[n % 4]) for n in range(9)] == [n % 4 for n in range(9)]
    assert call(kept) == 2                              # this one, and the one before
    assert call(nested, functions) == [n % 4 for n in range(9)]
    tables = [slot.functions for slot in clupy._engine.pool.slots()]
    assert max(map(len, tables)) == 2

class Callable:
    def __call__(self): pass
    def method(self): pass
    @classmethod
    def make(cls): pass


def test_a_limit_belongs_to_a_function_as_its_author_sees_it():
    def local(n):
        def inner(): return n
        return inner

    @functools.wraps(local)
    def wrapper(n): pass
    key = clupy.limit_key
    first, second, third, fourth = lambda n: n, lambda n: n, lambda: 1, lambda: 2
    assert key(square) == key(functools.partial(square, 2)) == key(clupy.parallel(square)) == (__name__, "square")
    assert key(Callable().method) == key(Callable().method) == key(Callable.method) == (__name__, "Callable.method")
    assert key(Callable()) == key(Callable) == (__name__, "Callable") and key(Callable.make) == (__name__, "Callable.make")
    assert key(len) == ("builtins", "len") and key([].index) == ("", "list.index")
    assert key(local(1)) == key(local(2)) == key(functools.lru_cache(local(3))) != key(local) == key(wrapper)
    assert len({key(func) for func in (first, second, third, fourth)}) == 4
    for func in local(1), first, second, third, wrapper, square, Callable().method, functools.partial(local, 1), [].index, len:
        assert call(key, func) == key(func) and {type(part) for part in key(func)} <= {str, int}


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated when the function is made")
def test_a_function_whose_annotations_name_what_is_not_there_runs_all_the_same():
    cell = {"__name__": "__main__"}
    exec("def f(x: Missing[int] = 1, *, y: 1 / 0 = 2) -> Missing:\n    return x + y", cell)
    assert call(cell["f"], 5) == 7 and clupy.capture(cell["f"]) is clupy.capture(cell["f"])


def test_a_cloudpickle_without_the_names_that_clupy_uses_is_refused(monkeypatch):
    assert clupy._class_tracker() is cloudpickle.cloudpickle
    for name in "_DYNAMIC_CLASS_TRACKER_BY_ID", "_get_or_create_tracker_id", "_lookup_class_or_track", "_function_setstate":
        with monkeypatch.context() as patch:
            patch.delattr(cloudpickle.cloudpickle, name)
            with pytest.raises(clupy.ClupyError, match=f"{cloudpickle.__version__} has no {name}"):
                clupy._class_tracker()
    with pytest.raises(pickle.UnpicklingError, match="class Point.*keep the class"):
        clupy._client_class("no such id", "Point")


# ---- The script's own world: what it defines lives in a worker's `__main__`

WORLD = """
    import clupy, dataclasses, multiprocessing, pickle, shelve, threading, typing
    from concurrent.futures import ProcessPoolExecutor
    STATE, CACHE, N, LIMIT, lock = None, {}, 1, 2, threading.Lock()

    @dataclasses.dataclass
    class Point: x: int
    class Unused: pass

    def init(value): global STATE, NEW; STATE = NEW = value
    def state(): return STATE, NEW
    def load(key): CACHE[key] = key; return sorted(CACHE)
    def load_anew(key): CACHE[key] = key; return sorted(CACHE)
    def n(): return N
    def n_anew(): return N
    def set_n(value): global N; N = value
    def nested(value): global N; N = value; return clupy.parallel(n)().result()
    def load_nested(): return clupy.parallel(load)("nested").result()
    def even(n): return n == 0 or odd(n - 1)
    def odd(n): return n != 0 and even(n - 1)
    HANDLERS = {"even": even}

    def by_name(data, folder):
        from __main__ import Unused, LIMIT
        with shelve.open(f"{folder}/shelf") as shelf: shelf["x"] = pickle.loads(data)
        with shelve.open(f"{folder}/shelf") as shelf: return shelf["x"], Unused, LIMIT
    def missing(name):
        import __main__
        try: getattr(__main__, name)
        except AttributeError as error: return str(error)
    def dotted(data): return pickle.loads(data)
    def evaluated(thing): return eval(type(thing).__name__) is type(thing)
    def looked_up(): return eval("LIMIT * 10"), globals()["LIMIT"]
    def hinted(point: "Point", other: "lock" = None): return typing.get_type_hints(hinted, None, {"lock": int})["point"]
    def queried(frame): return frame.query("a > @LIMIT").a.tolist()
    def identities(func):
        import __main__
        return func is even is __main__.even is HANDLERS["even"], pickle.loads(pickle.dumps(func)) is even, func(10)
    def in_a_queue(point):
        queue = multiprocessing.get_context("fork").SimpleQueue()
        queue.put(point)
        return queue.get()
    def in_a_pool(func, n):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool: return pool.submit(func, n).result()
    """


@pytest.fixture(params=["embedded", "servers"])
def one_worker(request, tmp_path):
    """Settings of a program with one worker: on its embedded cluster, and on a server that shares nothing with it."""
    if request.param == "embedded":
        yield {"CLUPY_SLOTS": 1}
    else:
        with Cluster(tmp_path / "cluster", slots=1) as cluster:
            yield {"CLUPY_MASTER": cluster.address}


def test_what_an_initializer_or_a_call_makes_of_a_name_stays_and_what_the_program_changed_wins(tmp_path, one_worker):
    pytest.importorskip("numpy")
    tell(tmp_path / "program", WORLD + """
    with clupy.Executor(1, initializer=init, initargs=(7,)) as executor:
        assert [executor.submit(state).result(30) for _ in range(2)] == [(7, 7)] * 2
    assert call(state) == call(lambda: state()) == (7, 7)
    assert call(load, "a") == ["a"] and call(load_anew, "b") == ["a", "b"] == call(lambda: sorted(CACHE))
    CACHE["p"] = 1
    assert call(load, "c") == ["c", "p"] and call(load_anew, "d") == ["c", "d", "p"] and CACHE == {"p": 1}
    STATE = 8
    assert call(state) == (8, 7)

    earlier = clupy.parallel(n)
    assert earlier().result(30) == 1
    N = 2                                               # a version that was captured earlier sees the newest value, too
    assert earlier().result(30) == 1 and call(n_anew) == earlier().result(30) == 2
    N = 1                                               # as at first: what the worker had then is not taken for it
    assert call(n) == call(n_anew) == earlier().result(30) == 1
    call(set_n, 5)
    assert call(n) == call(n_anew) == call(lambda: N) == 5 and N == 1
    class Point: n = 1
    def of_class(): return Point.n
    seen = [call(of_class)]
    for Point.n in 2, 1:
        seen.append(call(of_class))
    assert seen == [1, 2, 1]

    import numpy                                        # large: it is compared with what was sent, not hashed again
    big = numpy.ones(100_000)
    def first(): return big[0]
    def change(): big[0] = 9; return big[0]
    assert call(first) == 1 and call(change) == 9 and call(first) == call(lambda: big[0]) == 9
    for big[0] in 2, 1:
        assert call(first) == call(lambda: big[0]) == big[0]
    """, **one_worker)


def test_a_nested_call_brings_what_its_parent_bound_anew_and_leaves_what_it_did_not(tmp_path, one_worker):
    tell(tmp_path / "program", WORLD + """
    assert call(nested, 5) == 5 and call(nested, 6) == 6 and call(load, "a") == ["a"]
    assert call(load_nested) == ["a", "nested"]         # in another worker, which did not have it
    N = 7
    assert call(n) == 7 and call(nested, 8) == 8
    """, **one_worker)


def test_a_name_is_set_by_a_higher_number_of_its_sender_and_sent_on_under_its_mark_while_it_is_the_same_object(monkeypatch):
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    for name, value in ("_marks", {}), ("_came", {}), ("_sender", b"here"):
        monkeypatch.setattr(clupy, name, value)

    def after(number, value, sender=""):
        clupy.set_names(vars(script), {"x": (value, (sender, number))})
        return script.x
    assert after(3, []) == [] and after(3, [1]) == after(2, [1]) == [] and after(4, [4]) == [4]
    script.x.append(5)                                  # in place: it is this worker's, and the program's mark stays
    assert clupy._mark("x", script.x) == ("", 4) and after(4, [4]) == [4, 5]
    script.x = [6]
    sender, number = clupy._mark("x", script.x)
    assert sender == b"here" and clupy._mark("x", script.x) == (sender, number) and after(4, [4]) == [6]
    script.x.append(7)
    assert clupy._mark("x", script.x) > (sender, number)
    assert after(1, "theirs", b"other") == "theirs" == after(4, [4]) and after(5, "newest") == "newest"
    assert after(1, "theirs", b"other") == "newest" and clupy._mark("x", "newest") == ("", 5)


def test_what_a_script_defines_is_found_by_name(tmp_path, one_worker):
    pytest.importorskip("pandas")
    tell(tmp_path / "program", WORLD + """
    import pandas
    class Outer:
        class Inner: pass
    assert call(evaluated, Outer()) is True             # a class that came by value is known by its name
    assert call(by_name, pickle.dumps(Point(3)), ".") == (Point(3), Unused, 2)
    assert type(call(dotted, pickle.dumps(Outer.Inner()))) is Outer.Inner
    assert call(missing, "nothing") == "module '__main__' has no attribute 'nothing'"
    assert call(missing, "__wrapped__") == "module '__main__' has no attribute '__wrapped__'"
    words = call(missing, "lock")
    assert "no attribute 'lock': 'lock' of the script, a _thread.lock, cannot be pickled" in words, words
    assert call(looked_up) == (20, 2) and call(hinted, None) is Point
    assert call(queried, pandas.DataFrame({"a": [1, 2, 3]})) == [3]
    LIMIT = 1
    assert call(looked_up) == (10, 1) and call(queried, pandas.DataFrame({"a": [1, 2, 3]})) == [2, 3]
    assert call(identities, even) == (True, True, True)
    assert call(in_a_queue, Point(4)) == Point(4) and call(in_a_pool, even, 4) is True
    """, **one_worker)


def test_a_script_that_is_no_file_a_notebook_and_one_of_a_package_have_the_same_world(tmp_path):
    text = ("import clupy, pickle\nclass Point: pass\nCACHE = []\n"
            "def f(data): CACHE.append(type(pickle.loads(data)) is type(pickle.loads(data))); return CACHE\n"
            "def g(): return len(CACHE)\n"
            "if __name__ == '__main__':\n    clupy.connect(slots=1)\n"
            "    print(clupy.parallel(f)(pickle.dumps(Point())).result(30), clupy.parallel(g)().result(30))\n")
    write_files(tmp_path, {"pkg/__init__.py": "", "pkg/main.py": text})
    notebook = (f"import sys, types; cells = sys.modules['__main__'] = types.ModuleType('__main__')\n"
                f"exec({text!r}, vars(cells))")         # as IPython does it
    for how in ("-c", text), ("-m", "pkg.main"), ("-c", notebook):
        done = subprocess.run([sys.executable, *how], cwd=tmp_path, env=environ(CLUPY_PORT=free_port()),
                              capture_output=True, text=True, timeout=60)
        assert done.stdout == "[True] 1\n", done.stderr


def test_functions_that_come_back_leave_the_names_of_who_gets_them_alone(tmp_path):
    tell(tmp_path, """
    N, CACHE = 1, {}
    def give():
        global N
        N = 2
        return lambda: (N, CACHE is not None)
    def outer():
        global N
        N = 3
        return clupy.parallel(give)().result()(), N
    assert call(give)() == (2, True) and N == 1
    assert call(outer) == ((2, True), 3)
    """)


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
    text = printed(error)
    assert all(line in text for line in ('{}["key"]', 'raise ValueError("middle", error) from error', "raise error"))
    assert text.count(f"<{socket.gethostname()}") == 1 and "clupy_server" not in text
    with pytest.raises(ExceptionGroup, match="two") as caught:
        call(hide)
    group, (first, inner) = caught.value, caught.value.exceptions
    assert group.__context__ is first and group.__suppress_context__ and group.__cause__ is None
    assert first.args == ("hidden",) and inner.exceptions[0].args == (3,)
    assert printed(group).count('raise ValueError("hidden")') == 1                # that of the member


def test_an_exception_that_is_a_value_arrives_whatever_its_init_takes_and_as_a_result_with_all_of_it():
    class Failure(Exception):
        def __init__(self, code, *, text):
            super().__init__(f"{code}: {text}")
            self.code = code

    def caught():
        try:
            raise Failure(1, text="no") from KeyError("x")
        except Failure as error:
            error.add_note("noted")
            return error
    error = call(caught)
    assert (type(error), error.args, error.code, error.__notes__) == (Failure, ("1: no",), 1, ["noted"])
    assert type(error.__cause__) is KeyError and "in caught" in printed(error)
    assert call(lambda error, others: (error.code, others["k"].code), error, {"k": Failure(2, text="")}) == (1, 2)
    assert [(type(error), error.code) for error in call(lambda: [Failure(3, text="")])] == [(Failure, 3)]


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


class Stubborn:
    """A result that raises `error` when it is pickled, or when it is unpickled."""
    def __init__(self, error, when): self.error, self.when = error, when
    def __reduce__(self): return (raise_it, (self.error,)) if self.when == "unpickled" else raise_it(self.error)


class Refusing(Stubborn, Exception):
    """Such an exception."""


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


def within_itself():
    error = ValueError()
    error.args = error, 7
    raise error


def because_of(make):
    """What raises an exception whose cause, made by `make`, cannot travel, but has a cause that can."""
    def fail():
        error = make()
        error.__cause__ = KeyError("first")
        raise ValueError("main") from error
    return fail


def keeps(make):
    def fail():
        error = ValueError("keeps")
        error.kept = make()
        error.add_note("mine")
        raise error
    return fail


def foreign():
    """An object of a module that only the worker has."""
    module = sys.modules["server_only"] = types.ModuleType("server_only")
    exec("class Special(Exception): pass", vars(module))
    return module.Special("x")


WAYS_TO_SPOIL = [               # what is called, the type of its failure, words in that, and what else must hold
    (lambda: (i for i in ()), pickle.PicklingError, "<lambda>, a generator, cannot be pickled"),
    (lambda: functools.reduce(lambda inner, _: [inner], range(100_000), []), pickle.PicklingError, "a list, cannot be"),
    (lambda: Stubborn(ValueError("no"), "pickled"), pickle.PicklingError, ".Stubborn, cannot be pickled: no"),
    (lambda: Stubborn(SystemExit("no"), "pickled"), pickle.PicklingError, ".Stubborn, cannot be pickled: no"),
    (lambda: Stubborn(ValueError("no"), "unpickled"), clupy.RemoteError, "ValueError: no (the result of"),
    (lambda: Stubborn(SystemExit("no"), "unpickled"), clupy.RemoteError, "SystemExit: no (the result of"),
    (lambda: [foreign()], clupy.RemoteError, "No module named 'server_only'"),
    (lambda: raise_it(foreign()), clupy.RemoteError, "server_only.Special: x", lambda e: "No module" in e.__notes__[0]),
    (lambda: raise_it(Strange(1, 2)), Strange, "1-2", lambda e: (e.args, e.a, e.b) == (("1-2",), 1, 2)),
    (lambda: raise_it(Doubling("x")), Doubling, "wrapped x", lambda e: str(e) == "wrapped x"),
    (lambda: raise_it(Silent("x")), Silent, None),
    (lambda: raise_it(Refusing(SystemExit("no"), "pickled")), Refusing, "SystemExit('no')", lambda e: e.when == "pickled"),
    (lambda: raise_it(Refusing(SystemExit("no"), threading.Lock())), clupy.RemoteError, f"{__name__}.Refusing: ",
     lambda e: "cannot pickle" in e.__notes__[0]),
    (lambda: raise_it(ValueError(threading.Lock())), clupy.RemoteError, "ValueError: <unlocked _thread.lock",
     lambda e: "in raise_it" in e.traceback and "lock" in e.__notes__[0] and "in raise_it" in printed(e)),
    (lambda: raise_it(ValueError("x" * 20_000_000)), ValueError, "xxx", lambda e: len(str(e)) == 20_000_000),
    (lambda: raise_it(ValueError("x" * 20_000_000, threading.Lock())), clupy.RemoteError, "ValueError: ",
     lambda e: len(str(e)) < 11_000),
    (functools.partial(chain, 100), ValueError, "99", lambda e: cause(e, 99).args == (0,)),
    (functools.partial(chain, 5000), ValueError, "4999",
     lambda e: str(cause(e, 100)) == "ValueError: 4899" and cause(e, 101) is None),
    (circle, ValueError, "a", lambda e: e.__cause__.__cause__ is e.itself is e and e.other is e.__cause__),
    (within_itself, clupy.RemoteError, ", 7)", lambda e: "recursion" in e.__notes__[0].lower()),
    (because_of(lambda: foreign()), ValueError, "main", lambda e: "No module" in e.__cause__.__notes__[0]),
    (because_of(lambda: ValueError(threading.Lock())), ValueError, "main",
     lambda e: "unlocked _thread.lock" in str(e.__cause__) and type(e.__cause__.__cause__) is KeyError),
    (because_of(lambda: Refusing(SystemExit("no"), "unpickled")), ValueError, "main",
     lambda e: type(e.__cause__) is Refusing and type(e.__cause__.__cause__) is KeyError),
    (keeps(lambda: foreign()), ValueError, "keeps", lambda e: "No module" in e.kept.__notes__[0] and e.__notes__ == ["mine"]),
    (keeps(lambda: threading.Lock()), ValueError, "keeps", lambda e: "lock" in e.__notes__[0] and e.__notes__[1] == "mine"),
    (lambda: raise_it(functools.reduce(lambda e, _: ExceptionGroup("g", [e]), range(900), ValueError(1))),
     ExceptionGroup, "g (1 sub-exception)"),
    (lambda: (lambda again: again(again))(lambda again: again(again)), RecursionError, "recursion",
     lambda e: "frames left out" in printed(e)),
    (lambda: raise_it(StopIteration(7)), StopIteration, "7", lambda e: e.value == 7),
    (lambda: raise_it(KeyboardInterrupt("k")), KeyboardInterrupt, "k"),
    (lambda: raise_it(SystemExit(3)), SystemExit, "3", lambda e: e.code == 3),
    (lambda: raise_it(asyncio.CancelledError("c")), asyncio.CancelledError, "c"),
    (lambda: b"\xff".decode(), UnicodeDecodeError, "invalid start byte", lambda e: e.object == b"\xff"),
]


def test_whatever_cannot_be_sent_is_an_error_that_names_it_and_hurts_no_neighbour():
    clupy.connect(slots=2)
    calls = [(clupy.parallel(func)(), clupy.parallel(square)(n)) for n, (func, *_) in enumerate(WAYS_TO_SPOIL)]
    calls.append((clupy.parallel(len)(Stubborn(ValueError("no"), "unpickled")), clupy.parallel(square)(len(calls))))
    assert clupy.wait_all(sum(calls, ()), PATIENCE)
    for (future, _), (_, kind, words, *more) in zip(calls, [*WAYS_TO_SPOIL, (len, ValueError, "no")], strict=True):
        error = future.failure
        assert type(error) is kind and (words is None or words in str(error)), (kind, error)
        assert all(holds(error) for holds in more), error
    assert [neighbour.value for _, neighbour in calls] == [n * n for n in range(len(calls))]


# ==== One master for many ====================================================

def test_the_simulation_of_many_servers_and_clients_runs():
    done = subprocess.run([sys.executable, os.path.join(HERE, "examples", "simulate.py"), "--servers", "12", "--clients", "4",
                           "--seconds", "3", "--change", "0.5"], env=environ(), capture_output=True, text=True, timeout=60)
    servers, clients, cores, grants, count, lost, _ = done.stdout.splitlines()[1].split()
    assert (servers, clients) == ("12", "4") and int(count) > 4 and float(lost) < 10, done.stdout + done.stderr


def test_a_decision_is_told_to_those_whom_it_concerns(monkeypatch):
    told = []

    async def story():
        master = clupy_master.Master(clupy.default_settings("master", listen=("127.0.0.1", 0)), b"secret")
        monkeypatch.setattr(master, "_send_share", lambda id, before=(): told.append(id))
        master.lists.resolution = clupy_master.Resolution()
        for id in "xy":
            row = clupy_master.ServerRow(("h", 1), 4, {}, {"own": {}, "name": id}, None)
            master.tables.put_server(id, row)
        for id, wanted in ("a", 2), ("b", 1), ("c", 0):
            master.tables.put_client(id, None, id, wanted, (), False, (0, 0, 0, 0), 0.0)
        master._decide()
        first, told[:] = sorted(told), []
        master.tables.clients["b"].wanted = 3
        master._asked.add("c")                               # it has stated something: it is answered
        master._decide()
        await master.close()
        return first
    assert asyncio.run(story()) == ["a", "b"] and sorted(told) == ["b", "c"]


rows = hypothesis.strategies.dictionaries(hypothesis.strategies.sampled_from("cde"), hypothesis.strategies.integers(1, 3))


@hypothesis.settings(deadline=None)
@hypothesis.given(hypothesis.strategies.lists(hypothesis.strategies.tuples(hypothesis.strategies.sampled_from("xyz"), rows)))
def test_a_client_is_told_of_each_server_that_says_it_holds_slots_there(said):
    tables, connections = clupy_master.Tables(), {id: object() for id in "xyz"}
    for id in "cde":
        tables.put_client(id, None, id, 1, (), False, IDLE, 0.0)
    for id, held in said:
        if not held:
            tables.drop(id, connections[id])
        else:
            tables.put_server(id, clupy_master.ServerRow(("h", 1), 4, held, {"own": {}, "name": id}, connections[id]))
        for client in "cde":
            tables.clients[client].share = {}
            assert tables.share_of(client).keys() == {server for server, row in tables.servers.items() if client in row.held}


# ==== Libraries ==============================================================
# The index is a folder of small wheels that these stories write, so that they need no network.  In a wheel, the module's
# `version` is the library's.

def write_wheel(folder, name, version, requires=(), code=None):
    folder.mkdir(parents=True, exist_ok=True)
    info, path = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    files = {f"{name}.py": code or f"version = {version!r}\ndef main(): print(version)\n",
             f"{info}/METADATA": "\n".join([f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
                                            *(f"Requires-Dist: {line}" for line in requires)]) + "\n",
             f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
             f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n"}
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def break_wheel(folder, name, version):
    """A wheel that pip can resolve and cannot install: its module does not have its checksum."""
    path = write_wheel(folder, name, version, code="intact")
    path.write_bytes(path.read_bytes().replace(b"intact", b"broken"))


def write_source(folder, name, version, then="pass"):
    """A source folder that builds without setuptools: it brings a build backend, which does `then` and gives its wheel."""
    write_wheel(folder, name, version)
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    (folder / "backend.py").write_text(textwrap.dedent("""
        import glob, os, shutil, time, zipfile
        wheel, = glob.glob("*.whl")
        def prepare_metadata_for_build_wheel(folder, settings=None):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder, [name for name in archive.namelist() if "dist-info" in name])
            return glob.glob("*.dist-info", root_dir=folder)[0]
        def build_wheel(folder, settings=None, metadata=None):
            THEN
            return os.path.basename(shutil.copy(wheel, folder))
        """).replace("THEN", then))
    return folder


def write_slow_source(index):
    """A library of which the first build does not end, and the file that will have the builder's pid."""
    pid = index / "pid"
    source = write_source(index / "slow-1.0", "slow", "1.0", f"os.path.exists({str(pid)!r}) or ("
                          f"open('new', 'w').write(str(os.getpid())), os.rename('new', {str(pid)!r}), time.sleep(600))")
    with tarfile.open(index / "slow-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "slow-1.0")
    return source, pid


@contextlib.contextmanager
def small_disk(path):
    """A file system of 8 MB."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], capture_output=True).returncode:
        pytest.skip("no leave to mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def index(tmp_path):
    """figures 1.0 and 2.0; algebra, which needs figures below 2; own."""
    folder = tmp_path / "index"
    for name, version, *needs in ("figures", "1.0"), ("figures", "2.0"), ("algebra", "1.0", "figures<2"), ("own", "1.0"):
        write_wheel(folder, name, version, needs)
    return folder


def list_of(index, *lines):
    return clupy_master.Dependencies(lines, ("--no-index", "--find-links", str(index)))


def ask(folder, role, index, *lines):
    """Write a dependency file in one go, as an editor does."""
    folder.mkdir(exist_ok=True)
    (folder / "new").write_text(json.dumps(list_of(index, *lines)._asdict()))
    (folder / "new").rename(folder / f"clupy.{role}.dependency.yaml")


def solve(index, *lines):
    return asyncio.run(clupy_master.resolve(list_of(index, *lines)))


def python_in(path, code):
    """What a worker's Python in the environment at path prints."""
    python, variables = clupy_server.worker_command(path, os.environ)
    done = subprocess.run([python, "-P", "-c", code], env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- dependency files

def test_paths_in_a_dependency_file_are_relative_to_the_file(tmp_path, monkeypatch):
    path = tmp_path / "clupy.master.dependency.yaml"
    assert clupy_master.read_dependencies(path) == clupy_master.Dependencies()
    wheel, source = write_wheel(tmp_path / "my wheels", "mine", "1.0"), write_source(tmp_path / "source", "other", "1.0")
    path.write_text(f"""
        libraries:
          - numpy >=2 ; python_version > "3"    # a comment
          - ./my wheels/{wheel.name} ; python_version > "3"
          - source/[fast]
          - other @ {source.as_uri()}
          - tool @ https://example.org/tool-1.0.zip
        pip_options: [--no-index, --find-links ./wheels, --constraint=limits.txt, -i https://example.org/]""")
    monkeypatch.chdir("/")
    assert clupy_master.read_dependencies(path) == clupy_master.Dependencies(
        ('numpy >=2 ; python_version > "3"', f'{wheel} ; python_version > "3"', f"{source}[fast]", str(source),
         "tool @ https://example.org/tool-1.0.zip"),
        ("--no-index", "--find-links", f"{tmp_path}/wheels", f"--constraint={tmp_path}/limits.txt",
         "-i", "https://example.org/"))


@pytest.mark.parametrize("text, words", [
    ("librarys: []", ", line 1: unknown key 'librarys'; did you mean 'libraries'?"),
    ("libraries: numpy", "libraries: must be a list"), ("libraries: [1.5]", "1.5 is not text"),
    ("- numpy", "must hold lines of `key: value`"), ("libraries: [", "not YAML"), ("libraries: [-e .]", "is an option"),
    ("libraries: [./absent.whl]", "there is no"), (f"libraries: [{'a' * 300}/b]", "there is no"),
    ("libraries: [2001-06-31]", "not YAML: day is out of range"),
    ("pip_options: ['--prefix \"a']", ", line 1: pip_options: No closing quotation"),
    ("\nlibraries:\npip_options: [--prefix=/usr]", ", line 3: pip_options: --prefix is CluPy's own"),
    ("libraries: [caf\udce9]", "cannot be read"),
])
def test_a_bad_dependency_file_is_refused_with_its_name(tmp_path, text, words):
    path = tmp_path / "clupy.client.dependency.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(clupy.ConfigurationError) as caught:
        clupy_master.read_dependencies(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


def test_a_clients_list_comes_behind_the_masters():
    one, other = clupy_master.Dependencies(("a", "b"), ("--pre",)), clupy_master.Dependencies(("b", "c"), ("--pre",))
    assert one.merged(other) == clupy_master.Dependencies(("a", "b", "c"), ("--pre",))
    assert one.hash == clupy_master.Dependencies(("b", "a"), ("--pre",)).hash != other.hash


# -- what pip makes of a list

def test_variables_of_the_user_do_not_spoil_pip(tmp_path, index, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    for name, value in {"PYTHONPATH": tmp_path, "PIP_TARGET": tmp_path / "x", "PIP_REQUIREMENT": "absent", "PIP_USER": "1",
                        "PIP_REQUIRE_VIRTUALENV": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": index}.items():
        monkeypatch.setenv(name, str(value))
    found = asyncio.run(clupy_master.resolve(clupy_master.Dependencies(("algebra",))))       # where to look is the user's to say
    assert [pin.requirement for pin in found.pins] == ["algebra==1.0", "figures==1.0"]


def test_a_refusal_has_pips_words_and_stands_until_the_next_try(index):
    async def story():
        now = [1000.0]
        resolutions, late = clupy_master.Resolutions(lambda: now[0]), list_of(index, "late")
        for pause in 60, 120:
            for begin in now[0], now[0] + pause - 1:
                now[0] = begin
                with pytest.raises(clupy.DependencyError, match="No matching distribution found for late") as caught:
                    await resolutions.of(late)
                assert 0 < len(caught.value.lines) <= clupy_master.PIP_LINES
                again = pickle.loads(pickle.dumps(caught.value))
                assert (str(again), again.lines) == (str(caught.value), caught.value.lines)
            write_wheel(index, "late", "1.0") if pause == 120 else None
            now[0] += 1
        first, second = await asyncio.gather(*(resolutions.of(late) for _ in range(2)))
        assert first is second and [pin.name for pin in first.pins] == ["late"]
    asyncio.run(story())
    assert [clupy_master.next_try(failures, 100.0) - 100 for failures in (1, 2, 3, 4, 5, 2000)] == [60, 120, 240, 480, 600, 600]


ORPHANED = """
    import subprocess, sys
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    print("orphans", subprocess.Popen(sleep).pid, subprocess.Popen(sleep, start_new_session=True).pid)
    print("x" * 200_000, "the end", sep="\\n", end="")
    sys.exit(3)
"""


def test_an_orphan_of_pip_is_killed_and_one_that_left_its_group_is_not_waited_for():
    said = []
    with pytest.raises(clupy.DependencyError) as caught:
        asyncio.run(clupy_master.run_command([sys.executable, "-c", textwrap.dedent(ORPHANED)], "it failed", said.append))
    killed, left = map(int, said[0].split()[1:3])
    try:
        until(lambda: killed not in processes())
        assert left in processes() and caught.value.lines == tuple(said) and said[-1] == "the end"
        assert str(caught.value).startswith("it failed: exit code 3\n  orphans ")
    finally:
        os.kill(left, signal.SIGKILL)
    said.clear()
    asyncio.run(clupy_master.run_command([sys.executable, "-c", "print('one\\n\\ntwo', end='')"], "it failed", said.append))
    assert said == ["one", "two"]


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path, index, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare/bin/python"))
    with pytest.raises(clupy.DependencyError, match="has no pip: get it by"):
        solve(index, "algebra")
    assert solve(index).pins == ()              # no pip is asked


def test_a_local_wheel_and_folder_travel(tmp_path, index):
    write_wheel(tmp_path / "local", "mine", "1.0", ["figures"])
    write_source(tmp_path / "local/source", "theirs", "1.5")
    ask(tmp_path / "local", "client", index, "./mine-1.0-py3-none-any.whl", "./source ; python_version > '3'")

    async def story():
        local = clupy_master.read_dependencies(tmp_path / "local/clupy.client.dependency.yaml")
        dependencies, wheels = await clupy_master.packed(local)
        assert (await clupy_master.packed(local))[0].hash == dependencies.hash            # the same to the byte
        write_wheel(tmp_path / "local", "mine", "1.0", ["figures"], code="edited = True")
        assert (await clupy_master.packed(local))[0].hash != dependencies.hash
        resolution = await clupy_master.resolve(dependencies, wheels)
        (tmp_path / "local").rename(tmp_path / "away")                              # a server does not have it
        with pytest.raises(clupy.DependencyError, match="mine-1.0-py3-none-any.whl was not shipped"):
            await clupy_server.Environments(tmp_path / "environments").build(resolution, {})
        with pytest.raises(clupy.DependencyError, match="(?i)do not match the hashes"):
            await clupy_server.Environments(tmp_path / "environments").build(resolution, dict.fromkeys(wheels, b"other"))
        return await clupy_server.Environments(tmp_path / "environments").build(resolution, wheels)
    with contextlib.closing(asyncio.run(story())) as environment:
        assert python_in(environment.path, "import mine, theirs; print(mine.version, theirs.version)") == "1.0 1.5"


# -- environments

def test_an_environments_versions_win_and_the_servers_own_follow(tmp_path, index, monkeypatch):
    """The server has figures 0.1 and odd 0.1, by PYTHONPATH; its environment has figures 1.0 and algebra."""
    for name in "figures", "odd":
        write_wheel(tmp_path / "server", name, "0.1")
        (tmp_path / "server" / f"{name}.py").write_text("version = '0.1'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "server"))
    built = asyncio.run(clupy_server.Environments(tmp_path / "environments").build(solve(index, "algebra")))
    with contextlib.closing(built) as environment:
        look = "import figures, odd, cloudpickle; print(figures.version, odd.version, cloudpickle.__file__)"
        import cloudpickle
        assert python_in(environment.path, look) == f"1.0 0.1 {cloudpickle.__file__}"
        assert python_in(None, "import figures; print(figures.version)") == "0.1"
        assert python_in(environment.path, "import subprocess; subprocess.run(['algebra'])") == "1.0"
        child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import algebra; algebra.main()'])"
        assert python_in(environment.path, child) == "1.0"


BUILDER = """
    import asyncio, clupy_master, clupy_server, sys
    index, folder, *lines = sys.argv[1:]
    pins = tuple(clupy_master.Pin(*line.split("==")) for line in lines)
    resolution = clupy_master.Resolution(pins, ("--no-index", "--find-links", index))
    print("built", asyncio.run(clupy_server.Environments(folder).build(resolution, {}, print)).id)
"""


def test_servers_of_one_machine_build_an_environment_once(tmp_path, index):
    with contextlib.ExitStack() as stack:
        builders = [stack.enter_context(Program(tmp_path / name, "-c", textwrap.dedent(BUILDER), index,
                                                tmp_path / "environments", "algebra==1.0")) for name in "abc"]
        assert [builder.process.wait(PATIENCE) for builder in builders] == [0, 0, 0]
        outputs = [builder.out.read_text() for builder in builders]
    assert sum("Installing collected packages" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_killed_builder_is_followed_by_the_next_once_its_pip_is_gone(tmp_path, index):
    _, pid = write_slow_source(index)
    environments = clupy_server.Environments(tmp_path / "environments")
    with Program(tmp_path / "dead", "-c", textwrap.dedent(BUILDER), index, environments.folder, "slow==1.0") as dead:
        until(pid.exists)
        dead.process.kill()
    lines = []

    async def story():
        task = asyncio.ensure_future(environments.build(solution, {}, lines.append))
        while not lines:
            await asyncio.sleep(0.02)
        assert "waiting" in lines[0] and not task.done()                   # the orphan may still write
        os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        return await task
    solution = solve(index, "figures")
    with contextlib.closing(asyncio.run(story())) as environment:
        assert python_in(environment.path, "import figures; print(figures.version)") == "2.0"
        assert {entry.name for entry in environments.folder.iterdir()} == {"lock", environment.id}


def test_cancelling_kills_pip_and_its_children_and_leaves_nothing(tmp_path, index):
    _, pid = write_slow_source(index)
    environments = clupy_server.Environments(tmp_path / "environments")

    async def story():
        task = asyncio.ensure_future(environments.build(resolution))
        while not pid.exists():
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    resolution = solve(index, "slow")
    asyncio.run(story())
    until(lambda: int(pid.read_text()) not in processes())
    assert {entry.name for entry in environments.folder.iterdir()} == {"lock"}


def test_the_least_recently_used_environments_go_first_and_those_in_use_never(tmp_path, index):
    environments = clupy_server.Environments(tmp_path / "environments", kept=1)

    async def story():
        async def build(*pins):
            return await environments.build(clupy_master.Resolution(pins, list_of(index).pip_options))
        figures, own = clupy_master.Pin("figures", "2.0"), clupy_master.Pin("own", "1.0")
        held = await build(clupy_master.Pin("figures", "1.0"))
        (await build(figures)).close()
        assert len(environments.complete()) == 2                   # one is kept, one more is in use
        (await build(own)).close()
        assert set(environments.complete()) == {held.id, clupy_server.environment_id([own])}
        held.close()
        (await build(figures)).close()
        assert environments.complete() == [clupy_server.environment_id([figures])] and environments.use(held.id) is None
    asyncio.run(story())


# -- here and in the cluster

def test_differences_are_of_libraries_that_both_have_and_those_that_are_pickled_come_first():
    pins = [clupy_master.Pin(*line.split()) for line in ("zeta 1.0", "numpy 2.0", "same 1.0", "absent 1.0")]
    here = {"zeta": "1.1", "numpy": "1.26", "same": "1.0"}.get
    assert clupy_master.differences(pins, here) == [("numpy", "1.26", "2.0"), ("zeta", "1.1", "1.0")]
    assert clupy_master.differences(pins[2:], installed=here) == []


def test_the_progress_line_is_for_terminals_only(capsys):
    clupy_master.show_progress("Collecting numpy")
    assert capsys.readouterr().err == ""

    class Terminal(list):
        isatty, flush, write = (lambda self: True), (lambda self: None), list.append
    screen = Terminal()
    clupy_master.show_progress("x" * 500, screen)
    clupy_master.show_progress("", screen)
    assert len(screen[0]) < 500 and screen[1] == "\r\x1b[K"


def test_who_waits_for_libraries_is_told_once_also_without_a_terminal(monkeypatch, caplog, capsys):
    monkeypatch.setattr(clupy_master, "TELL_TIME", 0.1)

    async def story():
        engine = types.SimpleNamespace(loop=asyncio.get_running_loop(), backlog=types.SimpleNamespace(queued=3),
                                       settings=clupy.default_settings("client"))
        libraries = clupy_master.ClientLibraries(engine, None)
        libraries.show_progress("Collecting one")
        libraries.clear_progress()                 # quick enough
        await asyncio.sleep(0.2)
        assert not caplog.messages
        for line in "one", "two":
            libraries.show_progress(f"Collecting {line}")
        await asyncio.sleep(0.2)
        libraries.show_progress("Collecting three")
        await asyncio.sleep(0.2)
        assert caplog.messages == ["calls wait (3) until their libraries are there: Collecting two"]
    asyncio.run(story())
    assert capsys.readouterr().err == ""


# -- in a cluster

def calls(name="figures"):
    """The versions that some calls see; by a lambda, which does not need this module."""
    version_of = clupy.parallel(lambda name: __import__(name).version)
    results = [version_of(name) for _ in range(4)]
    return {result.result(PATIENCE) for result in results}


def calls_until(condition, name="figures"):
    """The versions that calls see until the condition is met, or until they see one alone; none of them may fail."""
    seen = set()

    def met():
        last = calls(name)
        seen.update(last)
        time.sleep(0.1)                            # the builders need the processor
        return condition() if callable(condition) else last == {condition}
    until(met)
    return seen


@contextlib.contextmanager
def stocked(tmp_path, index, *lines, **options):
    """A Cluster that has a list from its start, and looks often whether all is as it should be."""
    ask(tmp_path / "master", "master", index, *lines)
    (tmp_path / "master" / "clupy.master.yaml").write_text("sync_interval: 500ms\n")
    options = {"CLUPY_ENVIRONMENTS_DIR": tmp_path / "environments", "CLUPY_SYNC_INTERVAL": "500ms"} | options
    with Cluster(tmp_path, **options) as cluster:
        yield cluster


def add_server(cluster, folder):
    """One more server, with environments of its own."""
    cluster.options["CLUPY_ENVIRONMENTS_DIR"] = folder
    return cluster.add_server()


def environments_of(cluster):
    return [row["environment"] for row in cluster.status()["servers"].values()]


def faults_of(cluster):
    tables = cluster.status()
    return "\n".join(sum((row["faults"] for row in tables["servers"].values()), tables["faults"]))


def in_step(cluster, servers=1):
    """Whether so many servers have the environment that the master wants, and nothing is wrong."""
    tables = cluster.status()
    wanted, rows = tables["environment"], tables["servers"].values()
    return (wanted and [row["environment"] for row in rows] == [wanted] * servers
            and not any([tables["faults"], *(row["faults"] for row in rows)]))


def shown(cluster, *command):
    """What a command of `python -m clupy` prints."""
    return subprocess.run([sys.executable, "-m", "clupy", *command, "--master", cluster.address], env=environ(),
                          capture_output=True, text=True, timeout=PATIENCE).stdout


CLIENT = """
    import clupy, sys
    def version_of(name):
        return __import__(name).version
    for name in sys.argv[1:]:
        try:
            print(name, clupy.parallel(version_of)(name).result(30), flush=True)
        except Exception as error:
            print(type(error).__name__, error)
    sys.stdin.read()                     # a warning comes from a thread of its own, and may come after the last result
"""


def client(folder, index, *lines, cluster=None, names=("figures",), **env):
    """What a client with that list prints: a line for each library of which it calls for the version."""
    if lines:
        ask(folder, "client", index, *lines)
    if cluster:
        env["CLUPY_MASTER"] = cluster.address
    return run_script(folder, CLIENT, args=names, **env)


def test_no_call_runs_on_a_server_that_does_not_have_the_libraries_yet(tmp_path, index):
    with stocked(tmp_path, index, "algebra") as cluster:
        clupy.connect(cluster.address)
        assert calls() == {"1.0"} == calls("algebra")              # the very first
        add_server(cluster, tmp_path / "late")
        assert calls_until(lambda: in_step(cluster, 2)) == {"1.0"}
        cluster.servers[0].process.kill()
        assert calls() == {"1.0"}


def test_upgrade_and_downgrade_of_a_running_cluster_cost_no_call(tmp_path, index):
    with stocked(tmp_path, index, "figures<2", servers=2, CLUPY_ENVIRONMENTS_KEPT=1) as cluster:
        clupy.connect(cluster.address)
        assert calls_until(lambda: in_step(cluster, 2)) == {"1.0"}
        old = clupy.parallel(sleepy, retries=0)(3, "finished")
        until(old.running)
        ask(tmp_path / "master", "master", index, "figures")
        assert calls_until("2.0") <= {"1.0", "2.0"}
        ask(tmp_path / "master", "master", index, "figures<2")
        assert calls_until("1.0") <= {"1.0", "2.0"}
        assert old.result(PATIENCE) == "finished"
        until(lambda: in_step(cluster, 2) and len(pythons()) == 1)             # nobody uses the other one any more
        before = set(environments_of(cluster))
        ask(tmp_path / "master", "master", index, "algebra")
        assert calls_until(lambda: in_step(cluster, 2) and set(environments_of(cluster)) != before) == {"1.0"}
        assert len(list((tmp_path / "environments").glob("*/clupy.json"))) <= 2        # one is kept, and one was in use
        ask(tmp_path / "master", "master", index)
        until(lambda: environments_of(cluster) == [None, None])
        with pytest.raises(ModuleNotFoundError):
            calls()


def test_clients_with_conflicting_lists_each_see_their_own_and_impossible_ones_fail_alone(tmp_path, index):
    lists = {"one": ["algebra"], "two": ["figures==2.0"], "conflict": ["algebra", "figures==2.0"], "unknown": ["absent"]}
    with stocked(tmp_path, index, "own") as cluster, contextlib.ExitStack() as stack:
        clupy.connect(cluster.address)
        assert calls("own") == {"1.0"}
        programs = []
        for name, lines in lists.items():
            ask(tmp_path / name, "client", index, *lines)
            programs.append(stack.enter_context(Program(tmp_path / name, "-c", textwrap.dedent(CLIENT), *["figures"] * 5,
                                                        CLUPY_MASTER=cluster.address)))
        assert calls_until(lambda: all(program.process.poll() == 0 for program in programs), "own") == {"1.0"}
        outputs = [program.out.read_text() for program in programs]
        assert outputs[:2] == ["figures 1.0\n" * 5, "figures 2.0\n" * 5]
        for output, words in zip(outputs[2:], ("conflict", "No matching distribution found for absent")):
            assert output.count("DependencyError pip cannot resolve") == 5 and words in output
        assert in_step(cluster)


def test_local_wheels_of_the_masters_list_and_of_a_clients_own_come_together(tmp_path, index):
    for folder, name in ("master", "theirs"), ("client", "mine"):
        write_wheel(tmp_path / folder, name, "1.0")
    with stocked(tmp_path, index, "./theirs-1.0-py3-none-any.whl") as cluster:
        done = client(tmp_path / "client", index, "./mine-1.0-py3-none-any.whl", cluster=cluster, names=("mine", "theirs"))
        assert done.stdout == "mine 1.0\ntheirs 1.0\n"


def test_a_list_that_cannot_be_had_leaves_the_old_environment_until_it_is_mended(tmp_path, index):
    write_wheel(index, "kazoo", "0.1")
    with stocked(tmp_path, index, "figures<2", "kazoo") as cluster:
        clupy.connect(cluster.address, library_check="off")
        assert calls_until(lambda: in_step(cluster)) == {"1.0"}
        environment, = environments_of(cluster)
        ask(tmp_path / "master", "master", index, "algebra", "figures==2.0")
        assert calls_until(lambda: "conflict" in faults_of(cluster)) == {"1.0"}
        text = shown(cluster, "status")
        assert environment in text and "fault at master: pip cannot resolve" in text

        break_wheel(index, "figures", "2.0")
        ask(tmp_path / "master", "master", index, "figures")
        assert calls_until(lambda: "Bad CRC" in faults_of(cluster) and "conflict" not in faults_of(cluster)) == {"1.0"}
        text = shown(cluster, "libraries")
        assert f"environment {environment} on " in text and "own Python" not in text and "Bad CRC" in text
        assert f"kazoo    0.1   here: {clupy_master.installed('kazoo')}" in text and "figures  1.0   here: not installed" in text

        write_wheel(index, "figures", "2.0")
        assert calls_until("2.0") <= {"1.0", "2.0"}
        until(lambda: in_step(cluster))


def test_a_pip_killed_in_the_middle_is_started_again(tmp_path, index):
    _, pid = write_slow_source(index)
    with stocked(tmp_path, index, "figures<2") as cluster:
        clupy.connect(cluster.address)
        assert calls() == {"1.0"}
        ask(tmp_path / "master", "master", index, "figures<2", "slow")
        assert calls_until(pid.exists) == {"1.0"}
        os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        assert calls_until(lambda: in_step(cluster)) == {"1.0"} == calls("slow")
        assert "killed by signal 9" in cluster.servers[0].log


def test_a_full_disk_is_one_servers_fault_and_the_others_work(tmp_path, index):
    write_wheel(index, "large", "1.0", code=f"version = '1.0'\n#{'x' * (16 << 20)}")
    with small_disk(tmp_path / "disk"), stocked(tmp_path, index, "figures<2") as cluster:
        add_server(cluster, tmp_path / "disk" / "environments")
        until(lambda: in_step(cluster, 2))
        names = ["large"] * 3
        assert client(tmp_path / "client", index, "large", cluster=cluster, names=names).stdout == "large 1.0\n" * 3
        clupy.connect(cluster.address)
        ask(tmp_path / "master", "master", index, "figures", "large")
        assert calls_until(lambda: "No space left on device" in faults_of(cluster)) <= {"1.0", "2.0"}
        until(lambda: set(environments_of(cluster)) > {cluster.status()["environment"]})
        assert "No space left on device" in shown(cluster, "status") and calls()


def test_calls_wait_for_a_busy_server_when_the_idle_one_cannot_have_their_libraries(tmp_path, index):
    (tmp_path / "no folder").write_text("")
    with stocked(tmp_path, index, slots=1) as cluster:
        clupy.connect(cluster.address)
        busy = clupy.parallel(sleepy)(3)
        until(busy.running)
        add_server(cluster, tmp_path / "no folder")
        until(lambda: len(environments_of(cluster)) == 2)
        assert client(tmp_path / "client", index, "own", cluster=cluster, names=["own"]).stdout == "own 1.0\n"


def test_a_server_that_was_away_while_the_list_changed_follows(tmp_path, index):
    with stocked(tmp_path, index, "figures<2", servers=2) as cluster:
        clupy.connect(cluster.address)
        assert calls_until(lambda: in_step(cluster, 2)) == {"1.0"}
        away = cluster.servers[0].process
        away.send_signal(signal.SIGSTOP)
        ask(tmp_path / "master", "master", index, "figures")
        until(lambda: len(set(environments_of(cluster))) == 2)
        away.send_signal(signal.SIGCONT)
        assert calls_until("2.0") <= {"1.0", "2.0"}
        cluster.master.process.kill()
        cluster.master.process.wait()
        ask(tmp_path / "master", "master", index, "figures<2")
        assert calls() == {"2.0"}
        cluster.start_master(cluster.address)
        assert calls_until("1.0") <= {"1.0", "2.0"}
        until(lambda: in_step(cluster, 2))


def test_what_is_remembered_of_lists_is_bounded_by_number_and_by_bytes_of_wheels(monkeypatch):
    async def story():
        monkeypatch.setattr(clupy_master, "RESOLVED_BYTES", 1000)
        monkeypatch.setattr(clupy_master, "RESOLVED_KEPT", 5)
        lists, connection = clupy_master.Lists(None, 60.0, lambda _: None), type("Deaf", (), {"send": lambda *_: None})()
        for n in range(20):                        # lists without libraries, for which no pip is asked; all have one wheel
            wheels = {"all": bytes(500), str(n): bytes(400 if n < 10 else 1)}
            await lists._resolutions.of(clupy_master.Dependencies((), (str(n),)), wheels)
            assert len(lists._resolutions.wheels()) == (1 if n < 10 else min(n - 8, 5))
        assert [*map(set, lists._resolutions.wheels())] == [{"all", str(n)} for n in range(15, 20)]
        assert lists._wheel("3") is None and lists._wheel("19") == b"\0"
        lists.hear(connection, ((), (), {"3": b"its client is still there", "19": b"\0"}))
        assert lists._wheel("3") == b"its client is still there" and lists.clients[connection][1]["19"] is lists._wheel("19")
        await lists.close()
    asyncio.run(story())


def test_a_clients_list_waits_for_the_masters_and_no_answer_of_yesterday_comes_late(tmp_path, index):
    """A connection by hand, whose question is there before the master has looked at its own list."""
    class ByHand(list):
        __hash__, peer = object.__hash__, "a client"

        def send(self, kind, *fields):
            if kind == "share" and fields[2] and (fields[2][1] or fields[2][2]):
                self.append(fields[2])

        def close(self):
            """The master closes."""
    answers = connection = ByHand()

    def ask_master(master):
        own = list_of(index, "own")
        master.on_client(connection, "id", "name", 0, (), (own.hash, (own.libraries, own.pip_options, {})), IDLE)

    async def answer(count):
        while len(answers) < count:
            await asyncio.sleep(0.02)
        _, (pins, _), error = answers[count - 1]
        assert error is None
        return [f"{name} {version}" for name, version, *_ in pins]

    async def story():
        ask(tmp_path, "master", index, "figures<2")
        settings = clupy.default_settings("master", listen=("127.0.0.1", 0))
        master = clupy_master.Master(settings, SECRET.encode(), tmp_path / "clupy.master.dependency.yaml")
        try:
            ask_master(master)
            assert await answer(1) == ["figures 1.0", "own 1.0"]
            master.lists.masters = list_of(index, "figures")                # it changes while pip looks at the old one
            ask_master(master)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            master.lists.masters = list_of(index, "figures==2.0")
            ask_master(master)
            assert await answer(2) == ["figures 2.0", "own 1.0"]
            await asyncio.gather(*[answer.task for answer in master.lists._resolutions._answers.values()])
            await asyncio.sleep(0.1)
            assert len(answers) == 2
        finally:
            await master.close()
    asyncio.run(story())


def test_a_client_with_its_own_list_has_the_masters_too_and_follows_it(tmp_path, index):
    ask(tmp_path, "client", index, "own")
    with stocked(tmp_path, index, "figures<2") as cluster:
        clupy.connect(cluster.address, library_check="off")        # before the master has resolved its list
        assert calls() == {"1.0"} == calls("own")
        ask(tmp_path / "master", "master", index, "figures")
        assert calls_until("2.0") <= {"1.0", "2.0"} and calls("own") == {"1.0"}
        ask(tmp_path / "master", "master", index, "figures", "own==2.0")
        assert calls_until(lambda: "own==2.0" in faults_of(cluster)) == {"2.0"}


def test_a_clients_broken_library_is_said_to_its_calls_and_tried_again(tmp_path, index):
    break_wheel(index, "figures", "2.0")
    with stocked(tmp_path, index) as cluster:
        broken = client(tmp_path / "client", index, "figures", cluster=cluster, names=["figures"] * 2).stdout
        assert broken.count("DependencyError environment") == 2 and "Bad CRC" in broken
        write_wheel(index, "figures", "2.0")
        until(lambda: client(tmp_path / "client", index, cluster=cluster).stdout == "figures 2.0\n")
        until(lambda: not faults_of(cluster))


def test_an_environment_that_somebody_removed_is_built_again(tmp_path, index):
    with stocked(tmp_path, index, "figures") as cluster:
        until(lambda: in_step(cluster) and len(workers()) == 2)
        (tmp_path / "environments").rename(tmp_path / "removed")
        until(lambda: client(tmp_path / "client", index, cluster=cluster).stdout == "figures 2.0\n")
        until(lambda: list((tmp_path / "environments").glob("*/clupy.json")))


def test_a_clients_list_works_without_a_cluster(tmp_path, index):
    environments = {"CLUPY_ENVIRONMENTS_DIR": tmp_path / "environments", "CLUPY_LIBRARY_CHECK": "error"}
    assert client(tmp_path / "client", index, "algebra", **environments).stdout == "figures 1.0\n"
    assert "DependencyError" in client(tmp_path / "client", index, "absent", **environments).stdout


def test_differences_are_a_warning_an_error_or_nothing(tmp_path, index):
    write_wheel(index, "kazoo", "0.1")
    mismatch, names = f"kazoo: {clupy_master.installed('kazoo')} here, 0.1 in the cluster", ["figures"] * 3
    with stocked(tmp_path, index, "kazoo", "figures") as cluster:
        with Program(tmp_path / "warn", "-c", textwrap.dedent(CLIENT), *names, stdin=subprocess.PIPE,
                     CLUPY_MASTER=cluster.address) as warned:
            until(lambda: mismatch in warned.log and warned.out.read_text().count("\n") == 3)
            warned.process.communicate(timeout=PATIENCE)
        error, off = (client(tmp_path / check, index, cluster=cluster, names=names, CLUPY_LIBRARY_CHECK=check)
                      for check in ("error", "off"))
        own = client(tmp_path / "own", index, "own", cluster=cluster, CLUPY_LIBRARY_CHECK="error").stdout
    said = [(warned.out.read_text(), warned.log), (error.stdout, error.stderr), (off.stdout, off.stderr)]
    assert [out.count("figures 2.0") for out, _ in said] == [3, 0, 3]
    assert [(out.count(mismatch), err.count(mismatch)) for out, err in said] == [(0, 1), (3, 1), (0, 0)]
    assert "LibraryMismatch" in warned.log and "Error" not in off.stderr
    assert own.startswith("LibraryMismatch") and mismatch in own and "own" not in own       # which is not needed here


def test_no_call_starts_while_libraries_are_compared_that_must_not_differ(tmp_path, cluster, monkeypatch):
    compared = threading.Event()

    def compare(pins, *_):
        if not pins:                               # the cluster's list, which is empty; else a server's cloudpickle
            compared.wait(PATIENCE)
            raise clupy.LibraryMismatch("figures: 1.0 here, 2.0 in the cluster")
    monkeypatch.setattr(clupy_master, "check_libraries", compare)
    clupy.connect(cluster.address, library_check="error")
    future = clupy.parallel(count_starts)(str(tmp_path / "started"))
    assert not future.wait(0.4)
    compared.set()
    with pytest.raises(clupy.LibraryMismatch):
        future.result(PATIENCE)
    assert not (tmp_path / "started").exists()
    clupy.close()


def test_the_advice_for_a_missing_library_works(tmp_path, index):
    here = asyncio.run(clupy_server.Environments(tmp_path / "here").build(solve(index, "figures<2")))
    python, _ = clupy_server.worker_command(here.path, os.environ)     # of a user who has installed figures
    here.close()

    def run():
        return subprocess.run([python, "-c", textwrap.dedent(CLIENT), "figures"], cwd=tmp_path / "client", text=True,
                              stdin=subprocess.DEVNULL, env=environ(CLUPY_MASTER=cluster.address), capture_output=True,
                              timeout=60).stdout
    with stocked(tmp_path, index) as cluster:
        (tmp_path / "client").mkdir()
        advice = run()
        assert advice.startswith("ModuleNotFoundError No module named 'figures' on ")
        line = advice.partition("add the line `- ")[2].partition("` under `libraries:` in clupy.client.dependency.yaml")[0]
        ask(tmp_path / "client", "client", index, line)
        assert line == "figures==1.0" and run() == "figures 1.0\n"


# ==== Data and coordination: real Redis, real ZooKeeper ====
# The stories start servers on free ports, kill and restart them.  They need redis-server, java and zookeeper.jar
# (`make services`); where these are missing they are skipped by name, with CLUPY_TEST_SERVICES=required they fail.

def needed(*paths):
    """The first of these programs or files that this machine has; without any the test is skipped, or fails."""
    for path in filter(None, map(shutil.which, paths)):
        return path
    if os.path.exists(paths[0]):
        return paths[0]
    give_up = pytest.fail if os.environ.get("CLUPY_TEST_SERVICES") == "required" else pytest.skip
    give_up(f"{os.path.basename(paths[0])} is missing: make services")


def die_with_parent():
    """Before a child's exec: it is killed with us, also when we are killed ourselves (PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Service:
    """A server that can be killed and started again on the same port with the same data; ended with the with-block."""

    process = None

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self):
        program, *command = self.command()
        self.process = subprocess.Popen(command, executable=program, preexec_fn=die_with_parent,
                                        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL))
        return self

    def ready(self):
        until(lambda: self.answer().startswith(self.ready_answers))
        return self

    def answer(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as sock:
            sock.sendall(self.question)
            return sock.recv(10000)
        return b""

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def restart(self, after=0.0):
        self.kill()
        time.sleep(after)
        self.start().ready()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.kill)
            self.start().ready()
            stack.pop_all()
        return self

    def __exit__(self, *_):
        self.kill()


class RedisServer(Service):
    question, ready_answers = b"PING\r\n", (b"+PONG", b"-NOAUTH")

    def __init__(self, folder, password="", durable=False):
        super().__init__(folder)
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        self.settings = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", 'save ""',
                         *(["appendonly yes", "appendfsync always"] if durable else []),
                         *([f"requirepass {password}"] if password else [])]

    def command(self):
        (self.folder / "redis.conf").write_text("\n".join(self.settings))
        return needed("redis-server", "redis-check-rdb"), "redis-server", self.folder / "redis.conf"    # one program


class ZooKeeperServer(Service):
    """Ticks of 0.5 s allow sessions from 1 s.  members: the lines of an ensemble's settings; this is its `number`."""

    question, ready_answers = b"srvr", b"Zookeeper version"

    def __init__(self, folder, number=0, members=()):
        super().__init__(folder)
        self.members, self.hosts = members, f"127.0.0.1:{self.port}"
        (folder / "myid").write_text(str(number))

    def command(self):
        (self.folder / "zoo.cfg").write_text("\n".join([
            "tickTime=500", f"dataDir={self.folder}", f"clientPort={self.port}", "clientPortAddress=127.0.0.1",
            "maxSessionTimeout=60000", "maxClientCnxns=0", "admin.enableServer=false", "forceSync=no", "initLimit=20",
            "syncLimit=10", "4lw.commands.whitelist=srvr", *self.members]))
        jars = needed("/usr/share/java/zookeeper.jar") + ":/usr/share/java/slf4j-nop.jar"
        main = "quorum.QuorumPeerMain" if self.members else "ZooKeeperServerMain"
        return [needed("java"), "java", "-Xms32m", "-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
                "-XX:-UsePerfData", "-Dzookeeper.admin.enableServer=false", "-Dzookeeper.jmx.log4j.disable=true",
                "-cp", jars, f"org.apache.zookeeper.server.{main}", self.folder / "zoo.cfg"]


class Dialogue:
    """A Python program, in this process's environment, that says a line when it got somewhere; killed at the end."""

    def __init__(self, code, *arguments):
        code = "import os, pickle, sys, threading, time, clupy\n" + textwrap.dedent(code)
        command = [sys.executable, "-u", "-W", "ignore::DeprecationWarning", "-c", code]     # fork's, from 3.12 on
        self.process = subprocess.Popen([*command, *map(str, arguments)], preexec_fn=die_with_parent,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._unread = b""

    def hears(self):
        """The next line that it says."""
        while b"\n" not in self._unread:
            assert select.select([self.process.stdout], [], [], 2 * PATIENCE)[0], f"silent: {self._unread}"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, f"ended: {self._unread.decode()}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def says_no_more(self):
        assert self._unread + self.process.communicate(timeout=PATIENCE)[0] == b""

    def send(self, signum):
        self.process.send_signal(signum)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.__exit__(*error)                      # closes the pipes and waits


@contextlib.contextmanager
def dialogues(count, code):
    """Several at once; the n-th is told n."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Dialogue(code, number)) for number in range(count)]


def together(here, *others):
    """Run the first in this thread, the others in threads of their own, until all have ended."""
    with concurrent.futures.ThreadPoolExecutor(len(others) or 1) as pool:
        futures = [pool.submit(function) for function in others]
        here()
        for future in futures:
            future.result(2 * PATIENCE)


def elsewhere(function):
    """What it returns or raises in another thread."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(2 * PATIENCE)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def zookeeper_server(tmp_path_factory):
    with ZooKeeperServer(tmp_path_factory.mktemp("zookeeper")) as server:
        yield server


@pytest.fixture
def settings(monkeypatch):
    """Each test has names of its own; settings(session=2) changes some."""
    def change(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"CLUPY_{name.upper()}", str(value))
        clupy._known = None
    change(prefix=f"test-{uuid.uuid4().hex[:8]}")
    return change


@pytest.fixture
def redis(redis_server, settings):
    settings(redis=redis_server.url)
    return redis_server


@pytest.fixture
def zookeeper(zookeeper_server, settings):
    settings(zookeeper=zookeeper_server.hosts)
    return zookeeper_server


@pytest.fixture
def mortal_redis(tmp_path, settings):
    """A Redis of one test, to be killed; it keeps what it acknowledged."""
    with RedisServer(tmp_path / "redis", durable=True) as server:
        settings(redis=server.url)
        yield server


@pytest.fixture
def mortal_zookeeper(tmp_path, settings):
    with ZooKeeperServer(tmp_path / "zookeeper") as server:
        settings(zookeeper=server.hosts)
        yield server


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The folder of this machine's copies of Refs, for this process alone."""
    folder = tmp_path / "copies"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(clupy, "_ref_folders", lambda: iter([str(folder)]))
    return folder / clupy._whose_copies()


@contextlib.contextmanager
def losing_answers(server, requests, once=False):
    """The port of a go-between that cuts the connection instead of answering a request with one of these words.

    once: a word that was met is removed from them."""
    def pump(client):
        with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:
            cut = False
            while True:
                for ready in select.select([client, upstream], [], [])[0]:
                    content = ready.recv(1 << 16)
                    if not content or ready is upstream and cut:
                        return
                    if ready is client and (found := [word for word in requests if word in content]):
                        cut = True
                        requests[:] = [word for word in requests if not (once and word in found)]
                    (upstream if ready is client else client).sendall(content)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=pump, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        clupy.close_services()
        listener.shutdown(socket.SHUT_RDWR)


class Cut:
    """A go-between that cuts the connection once, after `left` more bytes of both sides, and lets all later ones through."""

    def __init__(self, server):
        self.server, self.left = server, math.inf

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()
        return self.listener.getsockname()[1]

    def __exit__(self, *_):
        clupy.close_services()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.pump, args=(self.listener.accept()[0],), daemon=True).start()

    def pump(self, client):
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.server.port)) as upstream:
            while True:
                for ready in select.select([client, upstream], [], [])[0]:
                    content = ready.recv(int(min(self.left, 1 << 16)))
                    if not content:
                        return
                    self.left -= len(content)
                    (upstream if ready is client else client).sendall(content)
                    if not self.left:
                        self.left = math.inf
                        return


def left_beside():
    """The milliseconds for which what was written beside a value will be left there; it should be no time."""
    client, pattern = clupy._redis(), clupy._prefix("new") + b"*"
    return [client.pttl(key) for key in client.scan_iter(pattern)]


def silent_server():
    """Accepts connections and never says a word."""
    return socket.create_server(("127.0.0.1", 0))


def contenders(kind, name):
    """The nodes in the queue of a lock, semaphore, barrier or election."""
    client, path = clupy._zookeeper(), clupy._path(kind, name)
    return client.retry(client.get_children, path) if client.retry(client.exists, path) else []


@contextlib.contextmanager
def raises_soon(error, match):
    began = time.monotonic()
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert time.monotonic() - began < 15


# ---- on the cluster

SERVICES_PASSWORD = "pass-word-of-redis"


class ServiceCluster(Cluster):
    """A Cluster whose clupy.master.yaml has these settings, with a prefix of its own."""

    def __init__(self, folder, servers=1, slots=1, **settings):
        self.settings = {"prefix": f"test-{uuid.uuid4().hex[:8]}", **settings}
        (folder / "master").mkdir()
        (folder / "master" / "clupy.master.yaml").write_text(json.dumps(self.settings))         # which is YAML, too
        super().__init__(folder, servers, slots)

    def start_master(self, listen):
        program = super().start_master(listen)
        until(lambda: "zookeeper" not in self.settings or "this master leads" in program.log)
        return program


def deposit(amount):
    with clupy.lock("account", timeout=PATIENCE) as lock:
        clupy.put("balance", clupy.get("balance") + amount)
        lock.check()
    return clupy.counter("deposits").add(), os.getpid()


def test_the_master_alone_says_where_the_services_are_and_no_password_shows(tmp_path, zookeeper_server, monkeypatch):
    with RedisServer(tmp_path / "redis", SERVICES_PASSWORD) as server:
        with ServiceCluster(tmp_path, 2, redis=server.url, zookeeper=zookeeper_server.hosts) as cluster:
            monkeypatch.setenv("CLUPY_MASTER", cluster.address)
            clupy.put("balance", 0)                        # before anything else
            done = [clupy.parallel(deposit)(n) for n in range(20)]
            assert sorted(future.result(PATIENCE)[0] for future in done) == list(range(1, 21))
            assert clupy.get("balance") == sum(range(20)) and len({future.value[1] for future in done}) == 2
            with clupy.lock("account", timeout=PATIENCE) as lock:
                assert clupy.counter("deposits").value == 20 and lock.held
            shown = [json.dumps(cluster.status()), repr(clupy._settings())]
            for name in filter(str.isdigit, os.listdir("/proc")):
                with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", errors="replace") as command:
                    shown.append(command.read())
            for program in (cluster.master, *cluster.servers):
                shown += [program.log, program.out.read_text()]
            server.kill()
            monkeypatch.setattr(clupy, "_configured", {})
            clupy.configure(patience="500ms")
            with pytest.raises(clupy.Unavailable) as caught:
                clupy.get("balance")
            assert not [text for text in [*shown, str(caught.value)] if SERVICES_PASSWORD in text]


def test_a_fresh_worker_waits_with_patience_for_services_that_answered_the_master(
        tmp_path, mortal_redis, mortal_zookeeper, monkeypatch):
    def both():
        clupy.put("x", 1)
        with clupy.lock("x", timeout=PATIENCE):
            return clupy.get("x")

    def told():                                    # a new client has a fresh worker
        clupy.close()
        clupy.connect(cluster.address)
        return call(lambda: len(clupy._reached)) == 2
    monkeypatch.delenv("CLUPY_REDIS")
    monkeypatch.delenv("CLUPY_ZOOKEEPER")
    with ServiceCluster(tmp_path, redis=mortal_redis.url, zookeeper=mortal_zookeeper.hosts) as cluster:
        until(told)
        for service in mortal_redis, mortal_zookeeper:
            service.kill()
        future = clupy.parallel(both)()
        assert not future.wait(7)                  # longer than a first contact
        for service in mortal_redis, mortal_zookeeper:
            service.start().ready()
        assert future.result(2 * PATIENCE) == 1


def test_a_typing_error_in_an_address_is_told_by_the_master_first(tmp_path):
    url = f"redis://127.0.0.1:{free_port()}"
    with ServiceCluster(tmp_path, redis=url) as cluster:
        until(lambda: f"Redis at {url}: Error 111 connecting" in cluster.master.log)


def test_what_the_master_does_not_configure_is_told_to_calls_and_clients_within_seconds(cluster, monkeypatch):
    monkeypatch.setenv("CLUPY_MASTER", cluster.address)
    for use, says in [(lambda: clupy.put("x", 1), "no Redis is configured.*setting `redis`"),
                      (lambda: clupy.event("x").set(), "no ZooKeeper is configured.*setting `zookeeper`")]:
        with raises_soon(clupy.Unavailable, says):
            clupy.parallel(use)().result(PATIENCE)
        with raises_soon(clupy.Unavailable, says):
            use()


def test_a_clients_own_address_wins_over_the_masters_and_the_rest_is_the_masters(tmp_path, redis_server, monkeypatch):
    with ServiceCluster(tmp_path, redis=f"redis://127.0.0.1:{free_port()}/0") as cluster:
        monkeypatch.setenv("CLUPY_MASTER", cluster.address)
        monkeypatch.setenv("CLUPY_REDIS", redis_server.url)
        clupy.put("x", 1)
        assert clupy._redis().exists(f"{cluster.settings['prefix']}:data:x")
        clupy.close()


def test_configure_wins_and_reaches_the_embedded_clusters_workers(redis_server, monkeypatch):
    monkeypatch.setattr(clupy, "_configured", {})
    monkeypatch.setenv("CLUPY_PREFIX", "environment")
    prefix = f"test-{uuid.uuid4().hex[:8]}"
    clupy.configure(redis=redis_server.url, ttl="1h")
    clupy.connect(prefix=prefix)
    assert clupy.parallel(lambda: clupy.put("x", [1]))().result(PATIENCE) is None
    assert clupy.get("x") == [1]
    assert 3590 < clupy._redis().ttl(f"{prefix}:data:x") <= 3600
    for wrong in ({"slots": 2}, {"ttl": "long"}):
        with pytest.raises(clupy.ConfigurationError):
            clupy.configure(**wrong)


def test_who_has_the_wrong_secret_is_told_so_and_uses_no_other_redis(cluster, monkeypatch):
    monkeypatch.setenv("CLUPY_MASTER", cluster.address)
    monkeypatch.setenv("CLUPY_SECRET", "quite another secret of somebody")
    with raises_soon(clupy.SecretError, "secret"):
        clupy.put("x", 1)


def test_a_worker_that_is_killed_in_a_lock_frees_it_at_once(tmp_path, zookeeper_server, monkeypatch):
    def hold(path):
        with clupy.lock("x"):
            with open(path, "w") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(60)
    with ServiceCluster(tmp_path, zookeeper=zookeeper_server.hosts, session=10) as cluster:
        monkeypatch.setenv("CLUPY_MASTER", cluster.address)
        future, path = clupy.parallel(hold, retries=0)(str(tmp_path / "pid")), tmp_path / "pid"
        until(lambda: path.exists() and path.read_text().endswith("\n"))
        with pytest.raises(TimeoutError):
            clupy.lock("x", timeout="200ms").__enter__()
        os.kill(int(path.read_text()), signal.SIGKILL)
        with clupy.lock("x", timeout=5):                   # sooner than its session would end
            assert isinstance(future.exception(PATIENCE), clupy.WorkerDied)
        path.unlink()
        future = clupy.parallel(hold)(str(path))
        until(lambda: path.exists() and future.cancel())
        with clupy.lock("x", timeout=5):
            pass


def test_at_a_programs_very_end_where_no_thread_starts_a_dead_workers_session_ends_by_itself(monkeypatch):
    workers = clupy_server.Workers.__new__(clupy_server.Workers)
    workers.server, workers._endings = types.SimpleNamespace(services={"zookeeper": "127.0.0.1:1"}), set()

    def refuse(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    workers._end_zookeeper_session((1, b"password"))
    assert not workers._endings


def total(values):
    """The sum of the array in the arguments, who made it, what a Ref arrived in, and what happens to who writes."""
    kind = type(values)
    array = values["in"] if kind is dict else values[0] if kind in (list, tuple) else values
    try:
        array[0] = 1
    except ValueError as error:
        return float(array.sum()), os.getpid(), kind.__name__, str(error)


def fifty_totals(ref):
    """The pids of the workers that added up a Ref's 300,000 numbers, right and read-only wherever the Ref was."""
    add_up = clupy.parallel(total)
    calls = [add_up(argument) for argument in (ref, [ref], (ref, 1), {"in": ref}, ref) * 10]
    results = [call.result(2 * PATIENCE) for call in calls]
    assert {result[0] for result in results} == {299_999 * 150_000.0}
    assert {result[2] for result in results} == {"ndarray", "list", "tuple", "dict"}
    assert all("read-only" in result[3] for result in results)
    return {result[1] for result in results}


def copies_here():
    """The names of all copies of Refs on this machine; one that goes meanwhile may be missing."""
    return {name for folder in clupy._ref_folders() for _, _, names in os.walk(folder) for name in names}


def test_fifty_calls_on_two_servers_of_one_machine_fetch_a_shared_array_once(tmp_path, redis_server, monkeypatch):
    numpy = pytest.importorskip("numpy")
    with ServiceCluster(tmp_path, 2, redis=redis_server.url) as cluster:
        monkeypatch.setenv("CLUPY_MASTER", cluster.address)
        ref = clupy.share(numpy.arange(300_000.0))         # 2.4 MB: two commands read it
        reads = clupy._redis().info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"]
        assert len(fifty_totals(ref)) > 1
        assert clupy._redis().info("commandstats")["cmdstat_hmget"]["calls"] == reads + 2


def test_without_redis_the_client_serves_what_it_and_its_calls_share_once_to_a_machine(monkeypatch):
    numpy = pytest.importorskip("numpy")
    asked, answer = [], clupy.FETCHES["ref"]
    monkeypatch.setitem(clupy.FETCHES, "ref", lambda name: asked.append(name) or answer(name))
    array = numpy.arange(300_000.0)
    ref = clupy.share(array)
    array[:] = 0                                           # too late
    assert fifty_totals(ref) and asked == [ref.name]

    def outer(n):
        mine = clupy.share(list(range(n)))
        assert mine.get() == list(range(n))
        return clupy.parallel(sum)(mine).result(), mine
    value, theirs = clupy.parallel(outer)(100).result(PATIENCE)
    assert value == 4950 and theirs.get() == list(range(100)) and clupy.parallel(len)(theirs).result(PATIENCE) == 100
    with pytest.raises(LookupError, match="gone"):
        clupy.parallel(len)(clupy.Ref("unknown", False)).result(PATIENCE)
    assert copies_here() & {ref.name, theirs.name}
    clupy.close()
    assert not copies_here() & {ref.name, theirs.name, "unknown"}


def test_a_ref_arrives_as_its_value_on_another_executor_too(settings):
    settings(master=f"127.0.0.1:{free_port()}")            # which nobody asks
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        clupy.connect(executor=pool)
        assert clupy.parallel(sum)(clupy.share([1, 2])).result(PATIENCE) == 3


LARGE_VALUE = 8 << 20


def copies_of(client):
    """The names of this client's copies of Refs on this machine."""
    folders = [os.path.join(folder, client) for folder in clupy._ref_folders()]
    return [name for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)]


CLIENT_WITH_COPIES = f"""
    ref = clupy.share(bytes({LARGE_VALUE}))
    assert clupy.parallel(len)(ref).result({PATIENCE}) == {LARGE_VALUE}
    print(clupy._engine.id)
    time.sleep(600)
"""


def test_a_killed_client_leaves_no_copies_on_a_server_that_goes_on(tmp_path, monkeypatch):
    with Cluster(tmp_path, 2, 1) as cluster:               # of one machine: the copies are there while either has a session
        monkeypatch.setenv("CLUPY_MASTER", cluster.address)
        with Dialogue(CLIENT_WITH_COPIES) as client:
            id = client.hears()
            assert any(len(name) == 32 for name in copies_of(id))
            client.process.kill()
            until(lambda: not [folder for folder in clupy._ref_folders() if os.path.exists(os.path.join(folder, id))])
        assert clupy.parallel(len)(clupy.share([1])).result(PATIENCE) == 1


def test_copies_stay_while_one_server_of_the_machine_has_the_client_and_go_at_the_next_start_when_all_were_killed(
        tmp_path, monkeypatch):
    with Cluster(tmp_path, 1, 1) as cluster:
        monkeypatch.setenv("CLUPY_MASTER", cluster.address)
        with Dialogue(CLIENT_WITH_COPIES) as client:
            id = client.hears()
            other = clupy.Copies(id)                       # as another server of this machine
            client.process.kill()
            until(lambda: not cluster.status()["clients"])
            assert copies_of(id)
            other.close()
            until(lambda: not copies_of(id))               # the server hears of the client's end in its own time
        with Dialogue(CLIENT_WITH_COPIES) as client:
            id = client.hears()
            cluster.servers[0].process.kill()
            client.process.kill()
            client.process.wait()
            assert copies_of(id)
        until(lambda: not workers())
        cluster.add_server()
        until(lambda: not copies_of(id))


def test_a_ref_that_its_program_drops_is_gone_but_not_before_its_calls_have_it(monkeypatch):
    clupy.connect(slots=1)
    late = [clupy.parallel(lambda value: time.sleep(0.1) or len(value))(clupy.share(bytes(LARGE_VALUE))) for _ in range(3)]
    assert [call.result(PATIENCE) for call in late] == [LARGE_VALUE] * 3         # nobody but the calls had them
    until(lambda: not clupy.served)

    def captured():
        ref = clupy.share(bytes(LARGE_VALUE))
        return clupy.parallel(lambda: time.sleep(0.1) or len(ref.get()))()         # in the pickle of a function
    assert [call.result(PATIENCE) for call in [captured(), captured()]] == [LARGE_VALUE] * 2
    outer = clupy.share({"inner": clupy.share([1, 2])})
    assert clupy.parallel(lambda value: value["inner"].get())(outer).result(PATIENCE) == [1, 2]
    same = pickle.loads(pickle.dumps(outer))
    assert same is outer and outer.name in copies_of(clupy._engine.id)
    del same
    if (pid := os.fork()) == 0:
        del outer
        os._exit(0)
    os.waitpid(pid, 0)
    assert outer.get()["inner"].get() == [1, 2]
    unresolved = outer.unresolved()
    del outer
    assert kinds(unresolved.get()) == {"inner": "Ref"}
    del unresolved
    gc.collect()
    until(lambda: not clupy.served and not [name for name in copies_of(clupy._engine.id) if len(name) == 32])


def test_servers_are_told_of_a_ref_that_nobody_has_and_remove_its_copy():
    class Told:
        id = uuid.uuid4().hex

        def release(self, names):
            clupy.dispatch(session, "the client", ("release", names))

    engine, session = Told(), clupy_server.Session(None, None)
    clupy._engines.add(engine)
    session.copies = clupy.Copies(engine.id + "elsewhere")             # of another machine
    ref, other = clupy.share([1]), clupy.share([2])
    for shared in other, ref:
        clupy._write_copy(os.path.join(next(clupy._ref_folders()), session.copies.client, shared.name), [b"1"])
    del ref, shared
    assert copies_of(session.copies.client) == [other.name]
    session.copies.close()
    assert not copies_of(session.copies.client)


def test_a_ref_is_given_up_by_hand_by_who_made_it_and_by_calls(redis):
    here = clupy.share([1])
    clupy.connect(slots=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clupy, "_settings", lambda: clupy.default_settings("client"))          # which name no Redis
        served = clupy.share([2])
    for ref in here, served:
        assert call(len, ref) == 1
        call(lambda ref: ref.close(), ref.unresolved())
        until(lambda: not [name for name in copies_of(clupy._engine.id) if name == ref.name])
        for use in ref.get, lambda: call(len, ref):
            with pytest.raises(LookupError, match="gone"):
                use()
        ref.close()


@pytest.mark.parametrize("name, says", [
    ("shared_data", ["rows written: 4000", "{0: 20.0, 1: ", "rows done: 40", "as expected: True"]),
    ("coordination", ["balance: 200", "totals: [12, 12, 12]", "anna reports, and the leader is anna",
                      "ben reports, and the leader is ben"])])
def test_the_examples_run_on_the_embedded_cluster(redis, zookeeper, tmp_path, name, says):
    if name == "shared_data":
        pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    mine = {name: value for name, value in os.environ.items() if name.startswith("CLUPY_")}
    lines = run_script(tmp_path / "program", example(name), **{**mine, "CLUPY_SLOTS": 3}).stdout.splitlines()
    assert all(any(line.startswith(text) for line in lines) for text in says) and clupy.keys() == []


# ---- values, files, counters, queues, topics

def test_another_process_gets_what_was_put_also_what_plain_pickle_refuses(tmp_path, settings):
    """The huge one is larger than a string or a transaction of this Redis: elsewhere these may hold 512 MB and 1 GB."""
    heavy, server = "('asyncio', 'cloudpickle', 'kazoo', 'redis', 'yaml')", RedisServer(tmp_path / "redis")
    server.settings += ["proto-max-bulk-len 1mb", "client-query-buffer-limit 4mb"]
    settings(redis=server.url)
    with server, Dialogue(f"""
        print([name for name in {heavy} if name in sys.modules])
        class Point:
            def __init__(self, x): self.x = x
            def twice(self): return 2 * self.x
        clupy.put("point", Point(21))
        clupy.put("function", lambda x: x + 1)
        clupy.put("plain", {{"a": [1, None, "text"]}})
        clupy.put("huge", bytes(7 << 20) + bytes([7]) + bytes(2 << 20))
        print("put")
    """) as process:
        assert process.hears() == "[]" and process.hears() == "put"
        assert clupy.get("point").twice() == 42 and clupy.get("function")(1) == 2
        assert clupy.get("plain") == {"a": [1, None, "text"]}
        huge = clupy.get("huge")
        assert len(huge) == (9 << 20) + 1 and huge[7 << 20] == 7 and huge.count(0) == 9 << 20


@contextlib.contextmanager
def odd_values():
    """An object of a module that goes by value, a cached function, and an object of a multiprocessing child's main module:
    no other process can import any of the three."""
    text = "class Odd:\n    n = 42\n    def twice(self):\n        return 2 * self.n\ndef one(x):\n    return x + 1\n"
    made, main = types.ModuleType("made_by_hand"), types.ModuleType("__mp_main__")
    for module in made, main:
        exec(text, vars(module))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "made_by_hand", made)
        patch.setitem(sys.modules, "__mp_main__", main)
        cloudpickle.register_pickle_by_value(made)
        try:
            yield {"made": made.Odd(), "cached": functools.lru_cache(made.one), "main": main.Odd()}
        finally:
            for module in made, main:
                cloudpickle.unregister_pickle_by_value(module)


def see(values):
    return values["made"].twice(), values["cached"](1), values["main"].twice()


@pytest.mark.parametrize("way", ["argument", "put", "share", "queue", "topic"])
def test_a_value_that_can_be_an_argument_can_go_every_other_way_too(redis, way):
    with odd_values() as values:
        if way == "topic":
            def listen():
                with clupy.subscribe("odd", timeout=PATIENCE) as topic:
                    clupy.put("listening", True)
                    return see(next(topic))
            seen = clupy.parallel(listen)()
            until(lambda: clupy.exists("listening"))
            clupy.publish("odd", values)
        elif way in ("argument", "share"):
            seen = clupy.parallel(see)(clupy.share(values) if way == "share" else values)
        elif way == "put":
            clupy.put("odd", values)
            seen = clupy.parallel(lambda: see(clupy.get("odd")))()
        else:
            clupy.queue("odd").put(values)
            seen = clupy.parallel(lambda: see(clupy.queue("odd").get(0)))()
        assert seen.result(PATIENCE) == (84, 2, 84)


def test_arrays_and_frames_of_every_shape_come_back_equal_and_writable(redis):
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    big = numpy.random.default_rng(1).random((1000, 1200))
    arrays = [numpy.array(5.0), numpy.zeros((0, 3)), big, numpy.asfortranarray(big), big[::2, ::3], big.T]
    clupy.put("arrays", arrays)
    for original, copy in zip(arrays, clupy.get("arrays"), strict=True):
        numpy.testing.assert_array_equal(original, copy)
        assert copy.flags.writeable and copy.flags.aligned
        copy += 1
    numpy.testing.assert_array_equal(clupy.get("arrays")[2], big)        # not what was added to the copies
    frame = pandas.DataFrame({"x": big[:, 0], "name": [f"row {i}" for i in range(1000)]})
    clupy.put("frame", frame)
    pandas.testing.assert_frame_equal(clupy.get("frame"), frame)


def test_names_may_have_any_characters_and_the_mapping_agrees_with_the_functions(redis, settings):
    names = ["a b", "ü*[?]\\", "a\nb\0", "\ud800", ".", "x" * 5000, "a:b", "日本"]
    for name in names:
        clupy.put(name, name)
    clupy.counter("count").add()
    assert clupy.keys() == sorted([*names, "count"]) and clupy.keys("a?b") == ["a b", "a:b"]
    assert clupy.keys("日?") == ["日本"]
    assert dict(clupy.shared) == {name: name for name in names} and len(clupy.shared) == len(names)
    assert "." in clupy.shared and clupy.exists("count") and "z" not in clupy.shared
    assert clupy.delete(*names[1:], "count", "z") == len(names) and clupy.delete() == 0
    clupy.shared["none"] = None
    assert clupy.get("none", 5) is None and clupy.get("a b") == "a b" and clupy.get("nothing", None) is None
    del clupy.shared["a b"]
    for absent in (lambda: clupy.get("nothing"), lambda: clupy.shared.__delitem__("nothing")):
        with pytest.raises(KeyError, match="nothing"):
            absent()
    for function in (clupy.get, clupy.queue, clupy.counter, clupy.open, clupy.exists, clupy.delete, clupy.subscribe):
        with pytest.raises(ValueError, match="empty"):
            function("")
    with pytest.raises(TypeError, match="must be a str, not int"):
        clupy.put(5, "x")
    settings(prefix="other[*]")
    clupy.put("theirs", 1)
    assert clupy.keys() == ["theirs"] and clupy.delete("theirs") == 1


@pytest.mark.parametrize("prefix", ["..", ".", "a/b", "/", "a\0b", "\ud800", "ü *"])
def test_any_prefix_separates_names_but_an_empty_one(redis, zookeeper, monkeypatch, prefix):
    monkeypatch.setattr(clupy, "_configured", {})
    clupy.configure(prefix=prefix)
    clupy.delete("x\0")
    clupy.put("x\0", 1)
    with clupy.lock("x\0", timeout=5), clupy.semaphore("x", 2, timeout=5):
        assert clupy.keys() == ["x\0"] and clupy.counter("n").add() == 1
        clupy.event("x").set()
    clupy.delete("x\0", "n")
    with pytest.raises(clupy.ConfigurationError, match="prefix is '', but must be a text that is not empty"):
        clupy.configure(prefix="")


def test_of_many_that_change_a_value_at_once_each_is_one_stroke(redis):
    """Eight threads: each setdefault gives all the same value, each item is popped once, no update is lost."""
    rounds, start = range(30), threading.Barrier(8)

    def story(me):
        firsts, popped = [], []
        for n in rounds:
            start.wait()
            firsts.append(clupy.shared.setdefault(f"first {n}", (me, bytes(10_000))))
            if clupy.add(f"item {n}", bytes(5 << 20)):          # more than one transaction takes
                firsts.append("mine")
            start.wait()
            popped.append(clupy.shared.pop(f"item {n}", None) is not None)
            clupy.update("sum", lambda old: old + me, default=0)
        return firsts, popped
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        stories = list(pool.map(story, range(8)))
    assert sum(firsts.count("mine") for firsts, _ in stories) == len(rounds)
    firsts = [[first for first in firsts if first != "mine"] for firsts, _ in stories]
    assert all(one == firsts[0] for one in firsts)
    assert [sum(popped[n] for _, popped in stories) for n in rounds] == [1] * len(rounds)
    assert clupy.get("sum") == sum(range(8)) * len(rounds)
    with pytest.raises(KeyError):
        clupy.shared.pop("sun")
    with pytest.raises(KeyError):
        clupy.update("sun", abs)
    assert clupy.shared.pop("sum") and not clupy.exists("sum") and not left_beside()


def test_small_values_cost_one_round_trip_and_many_of_them_too(tmp_path, settings):
    def messages(use):
        """How often this Redis, which nobody else uses, read something from a connection."""
        use()                                              # connects
        before = client.info("stats")["total_reads_processed"]
        for _ in range(10):
            use()
        return client.info("stats")["total_reads_processed"] - before - 1
    with RedisServer(tmp_path / "redis") as server:
        settings(redis=server.url)
        client, count, queue = clupy._redis(), clupy.counter("n"), clupy.queue("q")
        many = {f"many {n}": n for n in range(500)}
        for use in (lambda: clupy.put("x", 1), lambda: clupy.get("x"), count.add, lambda: count.value, lambda: count.set(1),
                    lambda: queue.put(1), lambda: queue.get(0)):
            assert messages(use) == 10
        for use in lambda: clupy.put_many(many), lambda: clupy.get_many(many):
            assert messages(use) < 1000                    # bytes enough for some reads each
        assert clupy.get_many(many) == many
        clupy.close_services()


def test_many_values_are_put_and_had_at_once_of_any_size(redis, monkeypatch):
    monkeypatch.setattr(clupy, "BATCH", 3)                 # several
    values = {"none": None, "empty": b"", "large": os.urandom(3 << 20), "list": [1], "ü\0": {}, "array": bytearray(100_000)}
    clupy.put_many(values, ttl=30)
    with clupy.open("file", "w") as file:
        file.write("text")
    assert clupy.get_many([*values, "nothing", "file", "list"]) == {**values, "file": b"text"}
    assert all(0 < clupy._redis().ttl(clupy._key(name)) <= 30 for name in values)
    assert clupy.get_many([]) == {} and clupy.put_many({}) is None
    clupy.queue("q").put(1)
    with pytest.raises(TypeError, match="'q' is the name of a queue"):
        clupy.get_many(["none", "q"])
    clupy.put_many({"q": 1})                               # as put does, in the place of whatever is there
    assert clupy.get("q") == 1


def test_a_redis_that_evicts_what_is_being_written_is_told_of(tmp_path, settings):
    with RedisServer(tmp_path / "redis") as server:
        settings(redis=server.url)
        client = clupy._redis()
        clupy.put("x", 1)
        client.config_set("maxmemory", client.info("memory")["used_memory"] + (3 << 20))
        client.config_set("maxmemory-policy", "allkeys-random")
        with pytest.raises(clupy.Unavailable, match="'large'.*maxmemory-policy|refuses to write"):
            clupy.put("large", os.urandom(8 << 20))
        assert not clupy.exists("large") and not left_beside()
        clupy.close_services()


def test_the_wrong_kind_of_name_is_a_type_error_that_says_what_it_is(redis):
    clupy.put("value", 1)
    clupy.queue("queue").put(1)
    clupy.counter("counter").add()
    for use, says in [(lambda: clupy.queue("value").put(1), "'value' is the name of a value or file"),
                      (lambda: clupy.queue("value").get(0), "'value' is the name of a value or file"),
                      (lambda: clupy.counter("value").add(), "'value' is the name of a value or file"),
                      (lambda: clupy.counter("queue").set(1), "'queue' is the name of a queue"),
                      (lambda: clupy.get("queue"), "'queue' is the name of a queue"),
                      (lambda: clupy.get("counter"), "'counter' is the name of a counter"),
                      (lambda: len(clupy.queue("counter")), "'counter' is the name of a counter"),
                      (lambda: clupy.queue("value").clear(), "'value' is the name of a value or file"),
                      (lambda: clupy.shared.pop("queue"), "'queue' is the name of a queue"),
                      (lambda: clupy.add("queue", bytes(100_000)), "'queue' is the name of a queue"),
                      (lambda: clupy.open("value"), "'value' is the name of a value"),
                      (lambda: clupy.open("value", "a").close(), "'value' is the name of a value")]:
        with pytest.raises(TypeError, match=says):
            use()
    assert clupy.get("value") == clupy.queue("queue").get(0) == clupy.counter("counter").value == 1


def test_services_take_durations_and_whole_numbers_as_calls_do(redis, zookeeper):
    numpy = pytest.importorskip("numpy")
    one = numpy.int64(1)
    for duration in [*DURATIONS, numpy.float32(20)]:
        for name in "timeout", "time_out":
            seconds = {name: duration}
            with clupy.lock("x", **seconds), clupy.semaphore("x", one, **seconds), clupy.election("x", **seconds):
                clupy.barrier("x", one, **seconds)
            clupy.event("x").set()
            assert clupy.event("x").wait(**seconds)
            clupy.queue("q").put(1)
            assert clupy.queue("q").get(**seconds) == 1
            with clupy.subscribe("t", **seconds) as values:
                clupy.publish("t", 2)
                assert next(values) == 2
        clupy.put("v", 3, ttl=duration)
        assert clupy.get("v") == 3
    with clupy.lock("x"), pytest.raises(TimeoutError, match="not within 0.05 s"):
        elsewhere(clupy.lock("x", time_out="50ms").acquire)
    with pytest.raises(TypeError, match=r"get\(\) was given timeout and time_out"):
        clupy.queue("q").get(timeout=1, time_out=1)


def test_what_is_used_lives_and_what_is_not_is_gone_after_its_ttl(redis, copies):
    clupy.put("short", 1, ttl=1.2)
    clupy.put("kept", 1, ttl=1.2)
    clupy.put("for ever", 1, ttl=0)
    clupy.put("default", 1)
    ref, gone = clupy.share("x" * 100_000, ttl=1.2), clupy.share(1, ttl=0.1)
    for _ in range(4):
        time.sleep(0.4)
        assert clupy.get("kept") == 1 and len(ref.get()) == 100_000        # the Ref from its copy alone
    assert clupy.keys() == ["default", "for ever", "kept"] and clupy._redis().exists(clupy._key(ref.name, "ref"))
    left = {name: clupy._redis().ttl(clupy._key(name)) for name in ("for ever", "default")}
    assert left["for ever"] == -1 and 604700 < left["default"] <= 604800
    with pytest.raises(LookupError, match="time to live"):
        gone.get()
    for wrong in -1, float("nan"):
        with pytest.raises(ValueError, match="ttl|duration"):
            clupy.put("x", 1, ttl=wrong)


def test_reading_a_value_does_not_shorten_the_life_of_what_replaces_it_meanwhile(redis, monkeypatch):
    def replaced_by(replacement):
        def read_and_replaced(*window):
            monkeypatch.setattr(clupy, "_window", read)
            replacement()
            return read(*window)
        clupy.put("x", bytes(3 << 20), ttl=30)
        monkeypatch.setattr(clupy, "_window", read_and_replaced)

    def requeue():
        clupy.delete("x")
        clupy.queue("x", ttl=0).put("new")
    read = clupy._window
    replaced_by(lambda: clupy.put("x", bytes(2 << 20), ttl=0))
    assert len(clupy.get("x")) == 2 << 20 and clupy._redis().ttl(clupy._key("x")) == -1
    replaced_by(requeue)
    with pytest.raises(TypeError, match="a queue"):
        clupy.get("x")
    assert clupy._redis().ttl(clupy._key("x")) == -1
    clupy.put("x", bytes(3 << 20), ttl=30)                 # in the place of a queue
    clupy._redis().pexpire(clupy._key("x"), 5000)
    assert len(clupy.get("x")) == 3 << 20 and clupy._redis().ttl(clupy._key("x")) > 5
    clupy.put("x", "small", ttl=30)
    clupy._redis().pexpire(clupy._key("x"), 5000)
    assert clupy.get("x") == "small" and clupy._redis().ttl(clupy._key("x")) > 5


def test_a_thousand_gets_of_a_value_that_is_being_replaced_are_each_of_one_piece(redis, monkeypatch):
    allocations, memory = [], clupy._memory
    monkeypatch.setattr(clupy, "PIECE", 1 << 14)           # many windows, so that some are replaced between two
    monkeypatch.setattr(clupy, "_memory", lambda sizes: allocations.append(1) or memory(sizes))
    clupy.put("replaced", bytes(100_000))
    with Dialogue("""
        clupy.PIECE = 1 << 14
        number = 0
        while True:
            number = (number + 1) % 256
            clupy.put("replaced", bytes([number]) * (200_000 + 1000 * (number // 64)))   # mostly of one size
            if number == 1: print("again")
    """) as writer:
        writer.hears()
        seen = set()
        for _ in range(1000):
            value = clupy.get("replaced")
            assert value.count(value[0]) == len(value) and len(value) in (100_000, 200_000 + 1000 * (value[0] // 64))
            seen.add(value[0])
    assert len(seen) > 5 and len(allocations) > 1000       # some were noticed to be torn, and read again


def test_csv_pandas_and_numpy_read_and_write_files_that_redis_keeps(redis):
    numpy, pandas = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": numpy.arange(1000.0), "name": [f"Zeile\t{i} ü" for i in range(1000)]})
    for mode, options in [("", {"newline": ""}), ("b", {})]:
        with clupy.open("table.csv", "w" + mode, **options) as file:
            frame.to_csv(file, index=False)
        with clupy.open("table.csv", "r" + mode) as file:
            pandas.testing.assert_frame_equal(pandas.read_csv(file), frame)
    array = numpy.random.default_rng(1).random((1000, 500))
    with clupy.open("array.npy", "wb") as file:
        numpy.save(file, array)
    with clupy.open("array.npy", "rb") as file:
        numpy.testing.assert_array_equal(numpy.load(file), array)
    with clupy.open("rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b\nc"], ["ü", ""]])
    with clupy.open("rows.csv", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b\nc"], ["ü", ""]]
    assert clupy.get("array.npy")[:6] == b"\x93NUMPY"
    pytest.importorskip("pyarrow")
    with clupy.open("table.parquet", "wb") as file:
        frame.to_parquet(file)
    with clupy.open("table.parquet", "rb") as file:
        pandas.testing.assert_frame_equal(pandas.read_parquet(file, columns=["name"]), frame[["name"]])


def test_a_file_is_seekable_and_appears_whole_when_it_is_closed_or_not_at_all(redis):
    file = clupy.open("f", "wb")
    file.write(b"0123456789" * 300_000)
    assert not clupy.exists("f")
    file.close()
    file.close()
    with clupy.open("f", "rb") as file:
        assert file.seek(-5, os.SEEK_END) == 2_999_995 and file.read() == b"56789"
        assert file.seek(1_048_575) and file.read(2) == b"56"
    with clupy.open("f", "w") as file:
        file.write("short\r\nlines\n")
    assert clupy.open("f").readlines() == ["short\n", "lines\n"]
    assert clupy.open("f", newline="").read() == "short\r\nlines\n"
    for mode in ("w", "wb", "a"):
        with pytest.raises(ZeroDivisionError), clupy.open("f", mode) as file:
            file.write(b"new" if "b" in mode else "new")
            raise ZeroDivisionError
    assert clupy.get("f") == b"short\r\nlines\n"
    with clupy.open("empty", "w"):
        pass
    assert clupy.open("empty").read() == "" and clupy.get("empty") == b""
    with clupy.open("latin", "w", encoding="latin-1") as file:
        file.write("ü")
    assert clupy.get("latin") == b"\xfc" and clupy.open("latin", encoding="latin-1").read() == "ü"
    with pytest.raises(FileNotFoundError, match="nothing"):
        clupy.open("nothing")
    for mode in ("r+", "xx", "", "br", "rwb"):
        with pytest.raises(ValueError, match="mode"):
            clupy.open("f", mode)


def test_a_file_is_read_or_written_and_a_new_one_is_of_who_was_first(redis):
    for binary in "", "b":
        content = b"a\nb\n" if binary else "a\nb\n"
        with clupy.open("f", "w" + binary) as file:
            assert file.writable() and not file.readable() and file.seekable()
            for use in (file.read, file.readline, file.readlines, lambda: list(file),
                        lambda: file.readinto(bytearray(1)) if binary else file.read(1)):
                with pytest.raises(io.UnsupportedOperation):
                    use()
            file.write(content)
        with clupy.open("f", "r" + binary) as file:
            assert file.readable() and not file.writable()
            for use in (lambda: file.write(content), lambda: file.writelines([content]), file.truncate):
                with pytest.raises(io.UnsupportedOperation):
                    use()
            assert file.read() == content
        with pytest.raises(FileExistsError, match="taken.*'f'"):
            clupy.open("f", "x" + binary)
    first, second = clupy.open("new", "x"), clupy.open("new", "xb")
    first.write("first")
    second.write(b"second" * 20_000)
    first.close()
    with pytest.raises(FileExistsError, match="another was first.*'new'"):
        second.close()
    assert clupy.get("new") == b"first" and not left_beside()
    with clupy.open("bytes", "wb", ttl=30) as file:
        file.write(b"\xff-")
    assert clupy.open("bytes", errors="replace").read() == "\ufffd-"
    with clupy.open("bytes", "a", "ascii", errors="ignore") as file:
        file.write("\xfcbc")
    assert clupy.get("bytes") == b"\xff-bc" and clupy._redis().ttl(clupy._key("bytes")) in (29, 30)
    clupy.open("bytes", "a", ttl=0).close()
    assert clupy._redis().ttl(clupy._key("bytes")) == -1


def test_lines_that_many_processes_append_are_all_there(redis):
    with dialogues(4, """
        for number in range(40):
            with clupy.open("log", "a") as file: file.write(f"{sys.argv[1]} {number}\\n")
        print("done")
    """) as processes:
        assert [process.hears() for process in processes] == ["done"] * 4
    lines = list(clupy.open("log"))
    assert sorted(lines) == sorted(f"{name} {number}\n" for name in range(4) for number in range(40))
    assert [line for line in lines if line[0] == "0"] == [f"0 {number}\n" for number in range(40)]


def test_a_counter_counts_and_a_queue_gives_each_item_to_one_taker_for_all_processes(redis):
    queue, count = [pickle.loads(pickle.dumps(thing)) for thing in (clupy.queue("q"), clupy.counter("n"))]
    for number in range(300):
        queue.put(number)
    assert len(queue) == 300 and queue
    with dialogues(2, """
        taken, count = [], clupy.counter("n")
        for _ in range(200): count.add(2)
        try:
            while True: taken.append(clupy.queue("q").get(0.1))
        except clupy.Empty:
            print(taken)
    """) as processes:
        taken = [json.loads(process.hears()) for process in processes]
    assert sorted(taken[0] + taken[1]) == list(range(300)) and all(part == sorted(part) for part in taken)
    assert count.value == 800 and count.add(-1) == 799
    count.set(5)
    assert clupy.counter("n").value == 5 and clupy.counter("new").value == 0
    with pytest.raises(TypeError):
        count.add(0.5)
    for use in (lambda: count.add(2**70), lambda: count.set(2**70), lambda: count.set(-2**63 - 1)):
        with pytest.raises(OverflowError, match="'n' has 64 bits, which -?[0-9]+ does not fit"):
            use()
    count.set(2**63 - 1)
    with pytest.raises(OverflowError, match="'n' has 64 bits, it stays"):
        count.add()
    assert count.value == 2**63 - 1


def test_a_queue_of_a_size_holds_no_more_and_who_puts_waits_for_room(redis):
    queue = clupy.queue("q", maxsize=2)
    queue.put(1)
    queue.put(2, timeout=0)
    for use in (lambda: queue.put_nowait(3), lambda: queue.put(3, timeout="50ms"), lambda: queue.put(3, time_out=-1)):
        with pytest.raises(clupy.Full):
            use()
    assert len(queue) == 2
    with Dialogue("clupy.queue('q', maxsize=2).put(3); print('put')") as waiter:
        until(lambda: not select.select([waiter.process.stdout], [], [], 0.2)[0])
        assert queue.get_nowait() == 1 and waiter.hears() == "put"
    clupy.queue("q").put(4)                                # who gives no size knows none
    assert [queue.get(0) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(clupy.Empty):
        queue.get_nowait()
    queue.put(5)
    queue.clear()
    queue.clear()
    assert len(queue) == 0 and not clupy.exists("q")
    with pytest.raises(ValueError, match="maxsize"):
        clupy.queue("q", maxsize=-1)


def test_a_queue_waits_for_an_item_and_a_topic_reaches_those_who_listen(redis):
    queue = clupy.queue("q")
    for timeout in (0, -1, 0.0001):
        with pytest.raises(clupy.Empty):
            queue.get(timeout)
    with Dialogue("time.sleep(1.2); clupy.queue('q').put({'x': lambda: 7})"):
        assert queue.get()["x"]() == 7
    assert clupy.publish("news", 1) == 0
    with clupy.subscribe("news", timeout="500ms") as first, clupy.subscribe("news", timeout=0.5) as second:
        assert clupy.publish("news", {"x": 1}) == 2
        clupy.publish("other", 3)
        assert list(first) == list(second) == [{"x": 1}]


# ---- Refs on one machine

def test_a_ref_is_a_name_and_each_opening_makes_a_value_of_its_own(redis, copies):
    numpy = pytest.importorskip("numpy")
    value = {"array": numpy.arange(1_000_000.0), "list": [1, 2]}
    ref = clupy.share(value)
    value["array"][0] = 99
    assert len(pickle.dumps(ref)) < 100
    got = pickle.loads(pickle.dumps(ref)).get()
    assert got["array"][0] == 0 and got["array"].flags.aligned and not got["array"].flags.writeable
    got["list"].append(3)
    assert ref.get()["list"] == [1, 2]


@dataclasses.dataclass
class Holder:
    held: object


def kinds(thing):
    """What arrived, with the type names of what is not a container."""
    if isinstance(thing, Holder):
        return Holder, kinds(thing.held)
    if isinstance(thing, dict):
        return {key: kinds(value) for key, value in thing.items()}
    return [kinds(inner) for inner in thing] if isinstance(thing, (list, tuple)) else type(thing).__name__


def test_a_ref_among_arguments_arrives_as_its_value_however_deep_and_elsewhere_as_a_ref():
    clupy.connect(slots=1)
    ref = clupy.share({1, 2})
    deep = [({"a": [ref]}, Holder(ref), ref), 5]
    assert call(kinds, deep) == [[{"a": ["set"]}, (Holder, "set"), "set"], "int"]
    assert clupy.parallel(lambda *, x: x)(x=ref).result(PATIENCE) == {1, 2}
    assert call(lambda a, b: a[0] is b, [ref], ref)                            # one Ref is one value
    assert call(lambda: kinds([ref, ref.get()])) == ["Ref", "set"]             # what the function captured
    unresolved = call(lambda x: [x, x.get()], ref.unresolved())                # there and back
    assert kinds(unresolved) == ["Ref", "set"] and unresolved[0].get() == {1, 2}

    def nested(inner):
        return clupy.parallel(kinds)([inner]).result(), clupy.parallel(kinds)([inner.unresolved()]).result()
    assert call(nested, ref.unresolved()) == (["set"], ["Ref"])
    assert call(lambda function: function(), lambda: kinds([ref])) == ["Ref"]      # an argument, but its code says `ref`
    assert list(clupy.map(len, [ref] * 5, chunk_size=2)) == [2] * 5


def test_a_value_that_another_program_shared_comes_back_though_this_one_never_had_its_class(redis):
    with Dialogue("""
        class Point:
            def __init__(self, x): self.x = x
            def twice(self): return 2 * self.x
        print(pickle.dumps(clupy.share(Point(21))).hex())
    """) as process:
        ref = pickle.loads(bytes.fromhex(process.hears()))
        assert call(lambda point: point, ref).twice() == 42


def test_a_ref_that_is_gone_is_the_failure_of_that_call_and_a_failed_pickle_leaves_nothing_behind():
    class Bad:
        def __reduce__(self):
            raise ValueError("not me")

    clupy.connect(slots=1)
    ref, gone = clupy.share([1]), clupy.Ref("gone", False)
    for wrong, error in ([[gone]], LookupError), ([[ref, Bad()]], pickle.PicklingError):
        assert isinstance(clupy.parallel(len)(*wrong).exception(PATIENCE), error)
    assert type(pickle.loads(pickle.dumps(ref))) is clupy.Ref and call(len, ref) == 1


def test_a_copy_that_its_writer_did_not_finish_is_never_read(redis, copies, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    ref = clupy.share(os.urandom(1_000_000))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clupy.os, "rename", killed)
        ref.get()
    assert not [name for name in os.listdir(copies) if name.startswith(ref.name)]
    (copies / f"{ref.name}.new").write_bytes(bytes(2_000_000))             # its writer was killed by a signal
    value = ref.get()
    assert len(value) == 1_000_000 == len(ref.get()) and (copies / ref.name).stat().st_size < 1_001_000


def test_where_shared_memory_has_no_room_a_copy_is_kept_on_disk_and_where_nothing_has_by_the_process(
        redis, tmp_path, monkeypatch):
    folders, fetched, fetch = [tmp_path / "full", tmp_path / "disk"], [], clupy._fetched
    monkeypatch.setattr(clupy, "_ref_folders", lambda: iter(map(str, folders)))
    monkeypatch.setattr(clupy, "_fetched", lambda ref: fetched.append(ref) or fetch(ref))
    ref = clupy.share([os.urandom(300_000)])
    for folder in folders:
        folder.mkdir()
    full, disk = [folder / clupy._whose_copies() for folder in folders]
    os.symlink("/dev/full", full / f"{ref.name}.new")                      # whoever writes there has no room
    assert ref.get() == ref.get() and len(fetched) == 1
    assert (disk / ref.name).stat().st_size > 300_000 and ref.name not in os.listdir(full)
    shutil.rmtree(disk)
    os.symlink("/dev/full", full / f"{ref.name}.new")
    assert len(ref.get()[0]) == 300_000 and len(fetched) == 2

    def away(ref):
        fetched.append(ref)
        raise clupy.Unavailable("away")
    disk.mkdir()
    monkeypatch.setattr(clupy, "_fetched", away)
    with pytest.raises(clupy.Unavailable):                 # another folder does not help: asked once, waited once
        ref.get()
    assert len(fetched) == 3


def test_while_one_process_looks_for_room_for_a_copy_the_others_wait_for_it_and_fetch_nothing(redis, tmp_path, monkeypatch):
    folders, fetched, fetch, write = [tmp_path / "full", tmp_path / "disk"], [], clupy._fetched, clupy._write_copy

    def no_room_at_first(path, buffers):
        if "full" in path:
            raise OSError(errno.ENOSPC, "no room")
        time.sleep(0.2)                                    # in which another would begin, if it could
        write(path, buffers)
    monkeypatch.setattr(clupy, "_ref_folders", lambda: iter(map(str, folders)))
    monkeypatch.setattr(clupy, "_fetched", lambda ref: fetched.append(ref) or fetch(ref))
    monkeypatch.setattr(clupy, "_write_copy", no_room_at_first)
    for folder in folders:
        folder.mkdir()
    ref = clupy.share(bytes(300_000))
    together(*[lambda: ref.get() == bytes(300_000) or 1 / 0] * 4)
    assert len(fetched) == 1


def test_who_writes_to_a_shared_array_is_told_to_copy_it():
    numpy = pytest.importorskip("numpy")

    def double(array):
        array *= 2

    def fill(array):
        memoryview(array)[0] = 1
    clupy.connect(slots=1)
    ref = clupy.share(numpy.zeros(100_000))
    for function in double, fill:
        error = clupy.parallel(function)(ref).exception(PATIENCE)
        assert "read-only" in str(error) and "array.copy()" in error.__notes__[0]
    assert call(double, numpy.zeros(100_000)) is None      # of one call alone


def test_folders_for_copies_that_somebody_else_made_first_are_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(clupy.tempfile, "gettempdir", lambda: str(tmp_path))
    *others, mine = clupy._ref_folders()
    assert mine == str(tmp_path / f"clupy-{os.getuid()}") and os.stat(mine).st_mode & 0o777 == 0o700
    os.chmod(mine, 0o755)
    assert list(clupy._ref_folders()) == others
    os.rmdir(mine)
    os.symlink(tmp_path, mine)
    assert list(clupy._ref_folders()) == others


# ---- Redis: faults

def test_without_a_redis_every_use_says_so_within_seconds(settings, monkeypatch):
    monkeypatch.setattr(clupy, "FIRST_CONTACT", 1.0)
    monkeypatch.setattr(clupy, "_configured", {"redis": ""})
    settings()
    for use in (lambda: clupy.put("x", 1), lambda: clupy.get("x"), clupy.counter("x").add, clupy.queue("x").get,
                lambda: clupy.subscribe("x"), lambda: clupy.publish("x", 1), lambda: clupy.open("x"), clupy.keys):
        with raises_soon(clupy.Unavailable, "no Redis is configured.*CLUPY_REDIS.*to start a server"):
            use()
    monkeypatch.setattr(clupy, "_configured", {})
    with silent_server() as silent:
        port = silent.getsockname()[1]
        for url in (f"redis://u:secret@127.0.0.1:{free_port()}/0", f"redis://:secret@127.0.0.1:{port}/3"):
            settings(redis=url)
            with raises_soon(clupy.Unavailable, f"redis://{url.partition('@')[2]}.*setting `redis`") as caught:
                clupy.get("x")
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", [
    "localhost:6379", "http://h/0", "redis://h:port/0", "redis://:secret@h:6379?nonsense=secret", "redis://:se?cret@h",
    "redis://u:secret/cret@h:1", "redis://h?db=secret", "redis://[::1", "secret", "redis://u:12?secret@h"])
def test_an_address_that_is_none_is_told_at_once_without_its_password(settings, url):
    settings(redis=url)
    with pytest.raises(clupy.Unavailable, match="not an address.*expected redis://") as caught:
        clupy.get("x")
    text = repr(caught.value.__cause__) + str(caught.value) + repr(clupy._settings())
    assert "se?cret" not in text and ("secret" not in text or url == "secret")


def test_a_missing_or_wrong_password_is_told_at_once_and_the_right_one_works(tmp_path, settings):
    with RedisServer(tmp_path / "redis", SERVICES_PASSWORD) as server:
        for url in (server.url.replace(f":{SERVICES_PASSWORD}@", ""), server.url.replace("pass-word", "wrong-word")):
            settings(redis=url)
            for use in (lambda: clupy.get("x"), clupy.counter("x").add, lambda: clupy.subscribe("x")):
                began = time.monotonic()
                with pytest.raises(clupy.Unavailable, match="password") as caught:
                    use()
                assert time.monotonic() - began < 4 and "-word" not in str(caught.value)
        settings(redis=server.url + "?decode_responses=True&socket_timeout=7")
        clupy.put("x", b"\xff\x00")
        assert clupy.get("x") == b"\xff\x00"


def test_a_redis_that_refuses_a_change_keeps_what_it_had(tmp_path, settings):
    server = RedisServer(tmp_path / "redis")
    server.settings += ["maxmemory 40mb"]
    with server:
        settings(redis=server.url)
        client = clupy._redis()
        for name, size in ("small", 1000), ("large", 6 << 20):
            clupy.put(name, bytes(size))
        for size in 60 << 20, 5 << 20:                     # too large beside what is there; and where there is no room at all
            for name in "small", "large", "new":
                with pytest.raises(clupy.Unavailable, match="refuses to write"):
                    clupy.put(name, os.urandom(size))
            with pytest.raises(clupy.Unavailable, match="refuses to write"), clupy.open("file", "wb") as file:
                file.write(os.urandom(size))
            client.config_set("maxmemory", "5mb")
        with pytest.raises(clupy.Unavailable, match="refuses to write"):
            clupy.put("small", 2)
        client.config_set("maxmemory", "0")
        assert len(clupy.get("small")) == 1000 and len(clupy.get("large")) == 6 << 20
        assert sorted(clupy.keys()) == ["large", "small"] and not left_beside()
        clupy.put("small", 4)
        assert clupy.get("small") == 4
        clupy.close_services()


def refuse_to_write(server, client, how):
    if how == "OOM":
        client.config_set("maxmemory", 1 << 20)
    elif how == "READONLY":
        client.replicaof("127.0.0.1", free_port())
    elif how == "NOREPLICAS":
        client.config_set("min-replicas-to-write", 1)
    else:
        shutil.rmtree(server.folder)                       # it cannot save any more
        client.config_set("save", "3600 1")
        client.bgsave()
        until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def written(name, content, mode="wb"):
    with clupy.open(name, mode) as file:
        file.write(content)


@pytest.mark.parametrize("how, says", [("OOM", "used memory"), ("READONLY", "read only replica"), ("MISCONF", "MISCONF"),
                                       ("NOREPLICAS", "NOREPLICAS")])
def test_whatever_redis_refuses_is_clupys_error_and_changes_nothing(tmp_path, settings, how, says):
    large = os.urandom(5 << 20)
    with RedisServer(tmp_path / "redis") as server:
        settings(redis=server.url)
        client, count, queue = clupy._redis(), clupy.counter("count"), clupy.queue("queue")
        clupy.put("value", 1, ttl=100)
        written("file", b"old")
        count.add(3)
        queue.put("first")
        ref = clupy.share(bytes(100_000), ttl=100)
        before = {key: client.dump(key) for key in client.scan_iter()}
        refuse_to_write(server, client, how)
        uses = [lambda name=name, value=value: use(name, value)
                for value in (2, large) for name in ("value", "new", "file", "queue")
                for use in (clupy.put, lambda name, value: clupy.put_many({name: value}))]
        uses += [lambda: clupy.add("new", 1), lambda: clupy.add("new", large), lambda: clupy.update("value", lambda old: large),
                 lambda: clupy.shared.setdefault("new", 1), lambda: clupy.share(1), lambda: clupy.share(large),
                 lambda: queue.put(2), lambda: queue.put(large), lambda: count.add(1), lambda: count.set(1),
                 *(lambda mode=mode, content=content: written("new" if mode == "xb" else "file", content, mode)
                   for mode in ("wb", "xb", "ab") for content in (b"new", large))]
        for use in uses:
            with pytest.raises(clupy.Unavailable, match=f"refuses to write.*{says}"):
                use()
        assert clupy.get("value") == 1 and clupy.get("file") == b"old" and count.value == 3 and len(ref.get()) == 100_000
        assert clupy.get_many(["value", "new", "file"]) == {"value": 1, "file": b"old"}
        assert {key: client.dump(key) for key in client.scan_iter()} == before
        clupy.close_services()


def test_a_connection_that_is_cut_anywhere_leaves_the_old_value_or_the_new_one(redis, settings, monkeypatch):
    """What may be repeated succeeds; what may not says that it is not known; nothing is left beside."""
    monkeypatch.setattr(clupy, "PIECE", 1 << 14)
    large, count, queue = os.urandom(150_000), clupy.counter("count"), clupy.queue("queue")
    little = large[:9_000]             # which Redis reads at once: what a cut connection brings is done before what the next does

    def state():
        names = [name for name in clupy.keys() if name not in ("count", "queue")]
        return {name: clupy.get(name) for name in names}, count.value, len(queue)
    repeated = [lambda: clupy.put("x", 2), lambda: clupy.put("x", large), lambda: clupy.add("new", 2),
                lambda: clupy.add("new", large), lambda: clupy.put_many({"x": 2, "new": large, "other": 3}),
                lambda: clupy.update("x", lambda old: [old, large]), lambda: written("file", large),
                lambda: clupy.share(large), lambda: count.set(7), lambda: written("new", large, "xb")]
    once = [lambda: count.add(), lambda: queue.put(little), lambda: written("file", little, "ab"),
            lambda: clupy.shared.pop("x"), queue.clear, lambda: queue.get(0)]

    def anew():
        clupy.delete(*clupy.keys())
        clupy.put("x", 1)
        written("file", b"old")
        count.set(5)
        queue.put(1)
    cut = Cut(redis)
    with cut as port:
        settings(redis=f"redis://127.0.0.1:{port}/0", patience=10)
        for use in (*repeated, *once):
            anew()
            before, cut.left = state(), 1e9
            clupy.close_services()
            use()
            after, total = state(), int(1e9 - cut.left)
            for left in sorted({*range(1, total, total // 12), total - 1, total - 3}):
                cut.left = math.inf
                anew()
                clupy.close_services()                     # so that the first byte is that of a connection
                cut.left = left
                if use in repeated:
                    use()
                else:
                    with contextlib.suppress(clupy.Unavailable):
                        use()
                cut.left = math.inf
                assert state() == after or use in once and state() == before
                assert all(0 < left <= 60_000 for left in left_beside())       # a lost connection's


def test_a_redis_that_is_killed_and_comes_back_costs_time_and_no_error(mortal_redis):
    with Dialogue("""
        for number in range(1_000_000):
            value = number.to_bytes(4, "big") * 100_000
            clupy.put("x", value)
            assert clupy.get("x") == value and clupy.exists("x") and clupy.keys() == ["x"]
            with clupy.open("f", "w") as file: file.write(str(number))
            assert clupy.open("f").read() == str(number)
            clupy.delete("f")
            print(number)
    """) as process:
        for _ in range(2):
            for _ in range(10):
                process.hears()
            mortal_redis.restart(after=0.4)
        until(lambda: int(process.hears()) > 40)


def test_a_redis_that_stays_away_is_unavailable_after_patience_and_usable_when_it_is_back(mortal_redis, settings):
    settings(patience=1)
    count, queue = clupy.counter("n"), clupy.queue("q")
    for number in (1, 2):                                  # a restart while nobody asks costs no error at all
        assert count.add() == number
        queue.put(number)
        mortal_redis.restart()
    assert [queue.get(1), queue.get(1)] == [1, 2] and clupy.publish("t", 1) == 0
    with clupy.subscribe("t") as values:
        clupy.publish("t", 1)
        assert next(values) == 1
        mortal_redis.kill()
        with pytest.raises(clupy.Unavailable, match="'t' may have been missed"):
            next(values)
    began = time.monotonic()
    with raises_soon(clupy.Unavailable, "refused"):
        clupy.get("x")
    assert time.monotonic() - began > 0.9
    mortal_redis.start().ready()
    assert count.value == 2


def test_what_was_sent_once_is_done_once_though_its_answer_is_lost(redis, settings):
    queue = clupy.queue("q")
    queue.put("taken")
    with losing_answers(redis, [b"INCRBY", b"RPUSH", b"LPOP", b"BLPOP", b"PUBLISH", b"EVAL"]) as port:
        settings(redis=f"redis://127.0.0.1:{port}/0")
        file = clupy.open("log", "a")
        file.write("line\n")
        for use, name in [(file.close, "log"), (lambda: clupy.counter("n").add(5), "n"), (lambda: queue.get(1), "q"),
                          (lambda: queue.put("put"), "q"), (lambda: clupy.publish("t", 1), "t")]:
            with pytest.raises(clupy.Unavailable, match=f"'{name}' was lost.*may have been made or not"):
                use()
    settings(redis=redis.url)
    assert clupy.counter("n").value == 5 and len(queue) == 1 and queue.get() == "put" and clupy.get("log") == b"line\n"
    with losing_answers(redis, [b"hstrlen"]) as port:      # what may be repeated is, until patience ends
        settings(redis=f"redis://127.0.0.1:{port}/0", patience=1)
        clupy.put("x", 2)
        with raises_soon(clupy.Unavailable, "redis"):
            clupy.get("x")


def test_through_kills_a_counter_and_a_queue_hold_what_was_acknowledged_and_nothing_twice(mortal_redis):
    sure, unsure, end = collections.Counter(), collections.Counter(), threading.Event()

    def work(worker):
        for number in itertools.takewhile(lambda _: not end.is_set(), itertools.count()):
            mine = worker, number
            for item, use in [(None, clupy.counter("n").add), (mine, functools.partial(clupy.queue("q").put, mine))]:
                try:
                    use()
                    outcomes[worker][0][item] += 1
                except clupy.Unavailable:
                    outcomes[worker][1][item] += 1

    def kill():
        try:
            for _ in range(3):
                time.sleep(0.4)
                mortal_redis.restart()
        finally:
            end.set()
    outcomes = [(collections.Counter(), collections.Counter()) for _ in range(4)]
    together(kill, *[functools.partial(work, number) for number in range(4)])
    for mine in outcomes:
        sure, unsure = sure + mine[0], unsure + mine[1]
    assert 20 < sure[None] <= clupy.counter("n").value <= sure.pop(None) + unsure.pop(None, 0)
    items = [clupy.queue("q").get(0) for _ in range(len(clupy.queue("q")))]
    assert len(set(items)) == len(items) and set(sure) <= set(items) <= set(sure) | set(unsure)


# ---- locks, semaphores, barriers, events, elections

def test_a_lock_keeps_processes_apart(redis, zookeeper):
    clupy.put("sum", 0)
    with dialogues(4, """
        for _ in range(25):
            with clupy.lock("sum", timeout=30): clupy.put("sum", clupy.get("sum") + 1)
        print("done")
    """) as processes:
        assert [process.hears() for process in processes] == ["done"] * 4
    assert clupy.get("sum") == 100 and contenders("lock", "sum") == []


def test_readers_share_a_lock_writers_do_not_tokens_grow_and_waiters_keep_their_turn(zookeeper):
    tokens, order = [], []
    with clupy.lock("x", shared=True) as first, clupy.lock("x", shared=True, timeout=5) as second:
        assert first.held and second.held
        tokens += [first.token, second.token]
        with pytest.raises(TimeoutError, match="lock 'x': not within 0.3 s"):
            elsewhere(clupy.lock("x", timeout=0.3).acquire)
    with clupy.lock("x", timeout=0) as writer:
        tokens.append(writer.token)
        for shared in (False, True):
            with pytest.raises(TimeoutError):
                elsewhere(clupy.lock("x", timeout=0, shared=shared).acquire)
    assert tokens == sorted(set(tokens)) and not writer.held and writer.token is None
    with pytest.raises(clupy.LockLost, match="not held"):
        writer.check()

    def hold(shared):
        with clupy.lock("x", shared=shared):
            order.append("reader" if shared else "writer")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with clupy.lock("x", shared=True):
            for number, shared in [(2, False), (3, True)]:
                pool.submit(hold, shared)
                until(lambda: len(contenders("lock", "x")) == number)
            assert order == []
    assert order == ["writer", "reader"] and contenders("lock", "x") == []


def test_a_lock_object_serves_one_block_at_a_time_and_any_name_names_a_lock(zookeeper):
    lock = clupy.lock("x", timeout=1)
    with pytest.raises(ZeroDivisionError):
        with lock:
            with pytest.raises(RuntimeError, match="in use"):
                lock.__enter__()
            raise ZeroDivisionError
    with lock:
        assert lock.held and "held" in repr(lock)
    for name in (".", "..", "a/b", "ü ", "\ud800", "zookeeper", "%2E", "\0", "\x7f", "a\nb"):
        with clupy.lock(name, timeout=5) as lock, clupy.lock(name + "x", timeout=5):
            lock.check()
    for use, says in [(lambda: clupy.lock(""), "empty"), (lambda: clupy.semaphore("", 1), "empty"),
                      (lambda: clupy.barrier("", 1), "empty"), (lambda: clupy.event(""), "empty"),
                      (lambda: clupy.election(""), "empty"), (lambda: clupy.semaphore("x", 0), "n must be"),
                      (lambda: clupy.barrier("x", 0), "n must be"),
                      (lambda: clupy.election("e", "x" * 200_000), "short")]:
        with pytest.raises(ValueError, match=says):
            use()


def test_who_would_wait_for_itself_is_told_so_at_once(zookeeper):
    def would_wait(*holdings):
        for holding in holdings:
            with pytest.raises(RuntimeError, match=" would wait for itself: this thread holds it"):
                holding.acquire()
    with clupy.lock("x"):
        would_wait(clupy.lock("x"), clupy.lock("x", shared=True), clupy.lock("x", timeout=0))
        with clupy.lock("y", timeout=5), clupy.semaphore("x", 1, timeout=5), clupy.election("x", timeout=5):
            would_wait(clupy.semaphore("x", 1), clupy.election("x"))
    with clupy.lock("x", shared=True), clupy.lock("x", shared=True, timeout=5):
        would_wait(clupy.lock("x"))
    with clupy.semaphore("x", 2), clupy.semaphore("x", 2, timeout=5):
        would_wait(clupy.semaphore("x", 2))
    assert contenders("lock", "x") == contenders("semaphore", "x") == []

    async def both():
        """Whichever thread of the pool acquires it, another may release it."""
        first, second = clupy.lock("x"), clupy.lock("x", timeout=PATIENCE)
        loop, pool = asyncio.get_running_loop(), concurrent.futures.ThreadPoolExecutor(2)
        loop.set_default_executor(pool)
        await asyncio.to_thread(first.acquire)
        waiting = asyncio.create_task(asyncio.to_thread(second.acquire))
        while len(contenders("lock", "x")) < 2:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(first.release)
        (await waiting).release()
    asyncio.run(both())


def test_a_lock_is_acquired_and_released_by_hand_too_by_who_holds_it(zookeeper):
    for holding in clupy.lock("x", timeout=5), clupy.semaphore("x", 1, timeout=5), clupy.election("x", "me", timeout=5):
        with pytest.raises(RuntimeError, match="does not hold it"):
            holding.release()
        assert holding.acquire() is holding and holding.held
        elsewhere(holding.release)
        assert not holding.held
        with pytest.raises(RuntimeError, match="does not hold it"):
            holding.release()
    by_hand = clupy.lock("x", timeout=5).acquire()
    with pytest.raises(TimeoutError):
        elsewhere(clupy.lock("x", timeout=0).acquire)
    by_hand.release()
    with pytest.raises(RuntimeError, match="does not hold it"), holding:
        holding.release()
    with pytest.raises(ZeroDivisionError), holding:
        holding.release()
        raise ZeroDivisionError
    with pytest.raises(clupy.LockLost, match="was lost before it was released"):
        lock = clupy.lock("x").acquire()
        clupy._zookeeper().delete(f"{lock._path}/{contenders('lock', 'x')[0]}")
        lock.release()


def test_all_must_say_the_same_size_of_a_semaphore_and_of_a_barrier(zookeeper):
    with clupy.semaphore("s", 2):
        for n in 1, 3:
            with pytest.raises(ValueError, match=f"semaphore 's': n is {n} here, but 2 where it is in use"):
                elsewhere(clupy.semaphore("s", n).acquire)
        with clupy.semaphore("s", 2, timeout=5):
            pass
    with clupy.semaphore("s", 3, timeout=5):               # nobody is left who says otherwise
        pass
    with Dialogue("clupy.barrier('b', 3); print('passed')") as first:
        until(lambda: len(contenders("barrier", "b")) == 1)
        with pytest.raises(ValueError, match="barrier 'b': n is 2 here, but 3 where"):
            clupy.barrier("b", 2, timeout=5)
        stray = clupy._Place("barrier 'b'", clupy._path("barrier", "b"), 5, n=2)       # one that is about to leave
        with pytest.raises(ValueError, match="n is 2 here"):
            stray.nodes()
        with Dialogue("clupy.barrier('b', 3); print('passed')") as second:
            until(lambda: len(contenders("barrier", "b")) == 3)
            clupy.barrier("b", 3, timeout=PATIENCE)
            assert first.hears() == second.hears() == "passed"
        stray.leave()
    assert contenders("barrier", "b") == []


def test_a_semaphore_has_at_most_n_holders(zookeeper):
    inside, most = [], []

    def work():
        for _ in range(5):
            with clupy.semaphore("s", 3, timeout=PATIENCE):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)
                inside.pop()
    together(*[work] * 8)
    assert max(most) == 3 and len(most) == 40 and contenders("semaphore", "s") == []


def test_eight_processes_pass_a_hundred_rounds_of_one_barrier_though_one_is_killed(redis, zookeeper, settings):
    settings(session=2)
    rounds = """
        first = int(sys.argv[1]) == 8 and 50            # it comes in the place of the one that is killed in round 50
        for number in range(first, 100):
            if number == 50 and int(sys.argv[1]): clupy.event("go").wait(60)
            clupy.counter(f"round {number}").add()
            clupy.barrier("b", 8, timeout=60)
            assert clupy.counter(f"round {number}").value == 8 + (number == 50), number
        print("done")
    """
    with dialogues(8, rounds) as processes:
        until(lambda: clupy.counter("round 50").value and len(contenders("barrier", "b")) == 1, 2 * PATIENCE)
        processes[0].process.kill()
        until(lambda: contenders("barrier", "b") == [])    # its session has ended
        clupy.event("go").set()
        with Dialogue(rounds, 8) as other:
            assert [process.hears() for process in [*processes[1:], other]] == ["done"] * 8
    assert contenders("barrier", "b") == []


def test_a_barrier_lets_a_crowd_through_in_groups_and_the_dead_and_the_late_do_not_count(zookeeper, settings):
    settings(session=1)
    passed = []

    def come():
        with contextlib.suppress(TimeoutError):
            clupy.barrier("b", 3, timeout=1.5)
            passed.append(1)
    together(*[come] * 10)
    assert len(passed) == 9 and contenders("barrier", "b") == []
    with Dialogue("clupy.barrier('b', 3)"):
        until(lambda: len(contenders("barrier", "b")) == 1)
    until(lambda: contenders("barrier", "b") == [])        # its session has ended
    with Dialogue("try: clupy.barrier('b', 3, timeout=1)\nexcept TimeoutError as error: print(error)") as late:
        with pytest.raises(TimeoutError, match="barrier 'b': not within 1 s"):
            clupy.barrier("b", 3, timeout=1)
        assert late.hears() == "barrier 'b': not within 1 s"
    with dialogues(2, "clupy.barrier('b', 3); print('passed')") as others:
        clupy.barrier("b", 3, timeout=PATIENCE)
        assert [other.hears() for other in others] == ["passed"] * 2


def test_an_event_is_seen_by_all_and_outlives_who_set_it(zookeeper):
    event = pickle.loads(pickle.dumps(clupy.event("e")))
    assert not event.is_set() and event.wait(0.2) is False
    with Dialogue("e = clupy.event('e'); print(e.is_set()); print(e.wait()); print(e.wait(0))") as waiter:
        assert waiter.hears() == "False"
        with Dialogue("clupy.event('e').set(); clupy.event('e').set(); print('set')") as setter:
            setter.hears()
        assert waiter.hears() == waiter.hears() == "True"
    assert event.is_set()
    event.clear()
    event.clear()
    assert not event.is_set()


def test_an_election_has_one_leader_whom_all_know_and_a_successor(zookeeper, settings):
    settings(session=1)
    election = clupy.election("e", data="me")
    assert election.leader() is None
    with Dialogue("with clupy.election('e', data='first') as e: print(e.leader()); time.sleep(60)") as first:
        assert first.hears() == election.leader() == "first"
        with pytest.raises(TimeoutError):
            clupy.election("e", data="late", timeout=0.3).__enter__()
    with election:                                         # after the killed one's session
        assert election.leader() == "me" and election.held
    assert election.leader() is None


# ---- ZooKeeper: faults

def test_without_a_zookeeper_every_use_says_so_within_seconds(settings, monkeypatch):
    monkeypatch.setattr(clupy, "FIRST_CONTACT", 1.0)
    with silent_server() as silent:
        port = silent.getsockname()[1]
        for hosts, says in [("h:x", "not a list of addresses"),
                            ("h:1/app", "not a list of addresses"),
                            (f"127.0.0.1:{free_port()}", "no answer within 1 s"),
                            (f"127.0.0.1:{port}", f"ZooKeeper at 127.0.0.1:{port}: no answer")]:
            settings(zookeeper=hosts)
            with raises_soon(clupy.Unavailable, says):
                clupy.lock("x").__enter__()
    monkeypatch.setattr(clupy, "_configured", {"zookeeper": ""})
    settings()
    with raises_soon(clupy.Unavailable, "no ZooKeeper is configured.*CLUPY_ZOOKEEPER"):
        clupy.lock("x").__enter__()


def test_an_absence_of_zookeeper_loses_no_lock_and_no_waiter(mortal_zookeeper, settings):
    settings(session=30)                                   # a busy machine may not be back within 10 s of the new start
    with clupy.lock("x") as lock, Dialogue("""
        threading.Thread(target=lambda: (clupy.event("e").wait(), print("event"))).start()
        with clupy.lock("x") as lock: print(lock.token)
        clupy.barrier("b", 2)
        print("passed")
    """) as waiter:
        until(lambda: len(contenders("lock", "x")) == 2)
        mortal_zookeeper.kill()
        until(lambda: not lock.held)
        for use in (lambda: clupy.lock("z", timeout=0.5).__enter__(), lambda: clupy.barrier("c", 2, timeout=0.5)):
            with raises_soon(TimeoutError, "not within 0.5 s"):
                use()                                      # holds though nobody answers
        mortal_zookeeper.start().ready()                   # and starts the clocks of all sessions anew
        lock.check()
        assert lock.held
        token = lock.token
        lock.__exit__(None, None, None)
        assert int(waiter.hears()) > token
        clupy.event("e").set()
        clupy.barrier("b", 2, timeout=PATIENCE)
        assert {waiter.hears(), waiter.hears()} == {"event", "passed"}
        lock.__enter__()
        with Dialogue("with clupy.lock('z', timeout=30): print('free')") as other:       # while our session lives
            assert other.hears() == "free"
        until(lambda: contenders("barrier", "c") == [])


def test_connections_that_nobody_answers_cost_a_part_of_the_session_only(zookeeper, settings):
    """As a server may leave them that has just started."""
    connections, mute = [], []

    def pump(client):
        connections.append(client)
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", zookeeper.port)) as upstream:
            while True:
                for ready in select.select([client, upstream], [], [])[0]:
                    if not (content := ready.recv(1 << 16)):
                        return
                    if client not in mute:
                        (upstream if ready is client else client).sendall(content)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                if len(connections) in (1, 2):
                    mute.append(client)
                threading.Thread(target=pump, args=(client,), daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        settings(zookeeper=f"127.0.0.1:{listener.getsockname()[1]}", session=9)
        with clupy.lock("x") as lock:
            connections[0].shutdown(socket.SHUT_RDWR)
            until(lambda: not lock.held)
            until(lambda: lock.held)
            lock.check()
        assert len(connections) == 4 and len(mute) == 2
        clupy.close_services()
        listener.shutdown(socket.SHUT_RDWR)


def test_a_lock_whose_release_was_answered_to_nobody_is_released_and_not_lost(zookeeper, settings):
    requests = []
    with losing_answers(zookeeper, requests, once=True) as port:
        settings(zookeeper=f"127.0.0.1:{port}")
        with clupy.lock("x") as lock:
            path = f"{clupy._path('lock', 'x')}/{contenders('lock', 'x')[0]}".encode()
            requests.append(struct.pack(">ii", 2, len(path)) + path)       # ZooKeeper's delete
        assert requests == [] and not lock.held
        settings(zookeeper=zookeeper.hosts)
        with clupy.lock("x", timeout=5):
            pass


def test_an_absence_longer_than_patience_is_unavailable_and_the_next_use_starts_anew(mortal_zookeeper, settings):
    settings(session=1, patience=1)
    with pytest.raises(clupy.Unavailable, match="lock 'x': away for longer than 1 s"), clupy.lock("x") as lock:
        mortal_zookeeper.kill()
        lock.check()
    mortal_zookeeper.start().ready()

    def kill():
        until(lambda: len(contenders("lock", "y")) == 2 and contenders("barrier", "b"))
        mortal_zookeeper.kill()

    def fails(what, use):
        with pytest.raises(clupy.Unavailable, match=f"{what}: away for longer than 1 s"):
            use()
    together(kill, *[functools.partial(fails, what, use) for what, use in [
        ("barrier 'b'", lambda: clupy.barrier("b", 2)), ("event 'e'", clupy.event("e").wait),
        ("lock 'y'", lambda: elsewhere(clupy.lock("y").acquire) and clupy.lock("y").acquire())]])
    mortal_zookeeper.start().ready()
    with clupy.lock("x", timeout=PATIENCE):
        pass


def test_a_holder_that_slept_past_its_session_is_told_and_the_next_has_a_larger_token(zookeeper, settings):
    settings(session=1)
    with Dialogue("""
        try:
            with clupy.lock("x") as lock:
                print(lock.token)
                time.sleep(0.2)
                try: lock.check()
                except clupy.LockLost: print("checked")
                print(lock.held)
        except clupy.LockLost as error:
            print(error)
    """) as sleeper:
        token = int(sleeper.hears())
        sleeper.send(signal.SIGSTOP)
        with clupy.lock("x", timeout=PATIENCE) as lock:
            assert lock.token > token
            sleeper.send(signal.SIGCONT)
            assert sleeper.hears() == "checked" and sleeper.hears() == "False"
            assert "lock 'x' was lost before it was released" in sleeper.hears()
            lock.check()
    with pytest.raises(clupy.LockLost):
        with clupy.lock("x") as lock:                      # somebody deletes its node
            clupy._zookeeper().delete(f"{lock._path}/{contenders('lock', 'x')[0]}")
    with Dialogue("clupy.barrier('b', 2); print('passed')") as sleeper:
        until(lambda: len(contenders("barrier", "b")) == 1)
        sleeper.send(signal.SIGSTOP)
        clupy.barrier("b", 2, timeout=PATIENCE)            # counts it, as its session still lives
        time.sleep(2)                                      # it does not any more
        sleeper.send(signal.SIGCONT)
        assert sleeper.hears() == "passed"


def test_a_forked_child_has_connections_of_its_own_and_leaves_its_parents_lock(redis, zookeeper):
    clupy.put("x", 1)
    with Dialogue("""
        import multiprocessing
        def child():
            assert not lock.held and clupy.get("x") == 1
            clupy.counter("n").add()
            with clupy.lock("y", timeout=10), clupy.lock(sys.argv[1], timeout=10): pass
            try: clupy.lock("x", timeout=0.5).__enter__()
            except TimeoutError: clupy.counter("n").add()
        with clupy.lock("x") as lock, clupy.lock("z"):
            clupy.get("x")
            children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(3)]
            for process in children: process.start()
            for process in children: process.join()
            lock.check()
            print("pool", clupy.counter("n").value, lock.held, flush=True)
            forked = os.fork()                  # leaves the with-block, and ends as any program does
            if forked: os.wait()
            else: child()
        if forked: print("fork", clupy.counter("n").value)
    """, "w") as process:
        assert process.hears() == "pool 6 True" and process.hears() == "fork 8"
        process.says_no_more()
    with Dialogue("clupy.lock('w').__enter__(); print('held')") as ends:
        assert ends.hears() == "held"
        ends.says_no_more()
    with clupy.lock("x", timeout=5), clupy.lock("w", timeout=5):       # sooner than their sessions of 10 s would end
        pass


WAITS = {"lock": "clupy.lock('x').__enter__()", "shared lock": "clupy.lock('x', shared=True).__enter__()",
         "semaphore": "clupy.semaphore('x', 1).__enter__()", "election": "clupy.election('x').__enter__()",
         "barrier": "clupy.barrier('x', 2)", "event": "clupy.event('x').wait()", "queue": "clupy.queue('x').get()",
         "topic": "next(clupy.subscribe('x'))"}


def test_control_c_ends_every_wait_and_leaves_nothing_that_blocks(redis, zookeeper):
    with contextlib.ExitStack() as stack:
        for holder in (clupy.lock("x"), clupy.semaphore("x", 1), clupy.election("x")):
            stack.enter_context(holder)
        waiting = [(wait.split()[-1], stack.enter_context(Dialogue(f"""
            clupy.exists("x"), clupy.event("x").is_set()
            print("waits")
            try: {WAITS[wait]}
            except KeyboardInterrupt: print("interrupted")
            time.sleep(60)
        """))) for wait in WAITS]
        assert {process.hears() for _, process in waiting} == {"waits"}
        for kind, count in [("lock", 3), ("semaphore", 2), ("election", 2), ("barrier", 1)]:
            until(lambda: len(contenders(kind, "x")) == count)
        time.sleep(0.3)                                    # the others leave no trace of their waiting
        for _, process in waiting:
            process.send(signal.SIGINT)
        assert {process.hears() for _, process in waiting} == {"interrupted"}
        for kind, count in [("lock", 1), ("semaphore", 1), ("election", 1), ("barrier", 0)]:     # their sessions live
            until(lambda: len(contenders(kind, "x")) == count)


def test_control_c_ends_the_wait_for_a_server_that_is_away(mortal_redis, mortal_zookeeper):
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(Dialogue(f"""
            clupy.put("x", 1); clupy.event("x").is_set(); print("reached")
            sys.stdin.readline()
            print("waits")
            try: {wait}
            except KeyboardInterrupt: print("interrupted")
        """)) for wait in ("clupy.get('x')", "clupy.lock('x').__enter__()", "clupy.event('x').set()")]
        assert {process.hears() for process in waiting} == {"reached"}
        mortal_redis.kill()
        mortal_zookeeper.kill()
        for process in waiting:
            os.write(process.process.stdin.fileno(), b"\n")
            assert process.hears() == "waits"
        time.sleep(0.5)
        for process in waiting:
            process.send(signal.SIGINT)
            assert process.hears() == "interrupted"


def test_an_ensemble_that_loses_its_leader_loses_no_lock(tmp_path, settings):
    members = [f"server.{number}=127.0.0.1:{free_port()}:{free_port()}" for number in (1, 2, 3)]
    with contextlib.ExitStack() as stack:
        servers = [ZooKeeperServer(tmp_path / str(number), number, members) for number in (1, 2, 3)]
        for server in servers:
            stack.callback(server.kill)
            server.start()
        for server in servers:
            server.ready()
        settings(zookeeper=",".join(server.hosts for server in servers), session=6)
        with clupy.lock("x") as lock:
            token = lock.token
            next(server for server in servers if b"Mode: leader" in server.answer()).kill()
            lock.check()
            with Dialogue("with clupy.lock('y'), clupy.lock('x') as lock: print(lock.token)") as other:
                until(lambda: len(contenders("lock", "x")) == 2)
                lock.check()
                lock.__exit__(None, None, None)
                assert int(other.hears()) > token
                lock.__enter__()


# ==== Masters that stand in for each other ===================================

SESSION = 2.0                                     # seconds; short, so that the stories are


class Masters:
    """Two masters that stand for election, two servers of one slot, and this process as their client."""

    def __init__(self, folder, zookeeper):
        self.folder, self.hosts = folder, zookeeper.hosts
        self.ports = [free_port(), free_port()]
        self.address = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self.masters = [self.start(number) for number in range(2)]
        for number in range(2):
            self._stack.enter_context(Program(self.folder / f"server{number}", "-m", "clupy", "serve", "--master", self.address,
                                              "--listen", "127.0.0.1:0", "--slots", 1))
        self.leader()
        clupy.connect(self.address)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def start(self, number):
        return self._stack.enter_context(Program(
            self.folder / f"master{number}", "-m", "clupy", "master", "--listen", f"127.0.0.1:{self.ports[number]}",
            CLUPY_ZOOKEEPER=self.hosts, CLUPY_SESSION=SESSION, CLUPY_PREFIX=f"test-{self.ports[0]}"))

    def leader(self, other_than=None):
        """The number of the master that leads and knows both servers, waited for."""
        return until(lambda: [number for number in range(2) if number != other_than and self.knows(number)])[0]

    def knows(self, number):
        return self.masters[number].process.poll() is None and self.leader_by(number) == (self.ports[number], 2)

    def leader_by(self, number):
        """(port, servers) of the leader as `status` of this master's address says; None if it does not know."""
        try:
            tables = tables_of(f"127.0.0.1:{self.ports[number]}")
        except (OSError, clupy.ClupyError, EOFError):
            return None
        return int(tables["master"]["address"].split(":")[1]), len(tables["servers"])


def note(path, n):
    """Note each start of the call n, and take a moment."""
    with open(os.path.join(path, str(n)), "a") as file:
        file.write("x")
    time.sleep(0.002)
    return n


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_call_fails_or_runs_twice_when_the_leading_master_ends(tmp_path, zookeeper_server, end):
    with Masters(tmp_path, zookeeper_server) as cluster:
        for turn in range(2):
            leader = cluster.leader()
            (tmp_path / str(turn)).mkdir()
            results = [clupy.parallel(note)(str(tmp_path / str(turn)), n) for n in range(1000)]
            until(lambda results=results: results[20].completed)
            cluster.masters[leader].process.send_signal(end)
            cluster.masters[leader].process.wait()
            cluster.leader(other_than=leader)
            assert clupy.wait_all(results, PATIENCE) and [r.value for r in results] == list(range(1000))
            assert {(tmp_path / str(turn) / str(n)).stat().st_size for n in range(1000)} == {1}
            cluster.masters[leader] = cluster.start(leader)


def test_a_new_client_is_served_soon_after_the_leading_master_was_killed(tmp_path, zookeeper_server):
    with Masters(tmp_path, zookeeper_server) as cluster:
        leader = cluster.leader()
        until(lambda: cluster.leader_by(1 - leader) == cluster.leader_by(leader))      # its servers are connected
        cluster.masters[leader].process.kill()
        cluster.masters[leader].process.wait()
        killed = time.monotonic()
        done = run_script(tmp_path / "client", "import clupy\nprint(clupy.parallel(pow)(2, 5).result(60))",
                          CLUPY_MASTER=cluster.address)
        assert done.stdout == "32\n" and time.monotonic() - killed < SESSION + 8     # 1.2 at the worst of 20 on a quiet machine


def test_one_master_leads_again_after_zookeeper_was_away(tmp_path):
    with ZooKeeperServer(tmp_path / "zookeeper") as zookeeper, Masters(tmp_path, zookeeper) as cluster:
        for _ in range(2):
            zookeeper.restart(after=2 * SESSION)
            cluster.leader()
            assert clupy.parallel(square)(7).result(PATIENCE) == 49


def test_a_leader_that_was_stopped_past_its_session_says_nothing_before_it_looks_at_its_clock(tmp_path, zookeeper_server):
    with Masters(tmp_path, zookeeper_server) as cluster:
        old = cluster.leader()
        until(lambda: cluster.leader_by(1 - old) == cluster.leader_by(old))        # whichever is asked
        cluster.masters[old].process.send_signal(signal.SIGSTOP)
        new = until(lambda: cluster.knows(1 - old) and 1 - old + 1) - 1
        cluster.masters[old].process.send_signal(signal.SIGCONT)
        until(lambda: not cluster.knows(old))
        assert new == 1 - old and clupy.parallel(square)(7).result(PATIENCE) == 49
        assert cluster.leader() == new


def test_a_leader_is_sure_of_its_office_for_two_thirds_of_its_session_only():
    leadership = clupy_master.Leadership.__new__(clupy_master.Leadership)
    leadership._until = 100.0
    assert leadership.sure(99.9) and not leadership.sure(100.0)


# ---- one bad master among several

@contextlib.contextmanager
def impostor(answer):
    """The address of a port where each connection gets these bytes for an answer, or, if None, nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.recv(8)
                    sock.sendall(answer)
                    sock.close()
        thread = threading.Thread(target=serve)
        if answer is not None:                     # else the kernel alone accepts
            thread.start()
        try:
            yield "127.0.0.1:%s" % listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            if answer is not None:
                thread.join()


OTHER_VERSION, OTHER_PYTHON = b"clupy\x63M" + clupy.preamble(b"M")[7:], clupy.preamble(b"M")[:7] + b"\x63"
BAD_MASTERS = {"a..b": "'a..b' is no name of a host", "127.0.0.1:closed": "refused",
               "mute": "did not finish the handshake within", "other version": "speaks protocol version 99",
               "other Python": "runs Python 3.99",
               "not CluPy": "not CluPy: it began with b'HTTP/1.1'", "hangs up": "closed the connection during the handshake",
               "other secret": "has another secret"}


@contextlib.contextmanager
def bad_masters(folder):
    """{kind: address} of a master for every kind of BAD_MASTERS."""
    with contextlib.ExitStack() as stack:
        other = f"127.0.0.1:{free_port()}"
        stack.enter_context(Program(folder, "-m", "clupy", "master", "--listen", other, CLUPY_SECRET="another " * 4))
        until(lambda: answers(other))
        answer = {"mute": None, "other version": OTHER_VERSION, "other Python": OTHER_PYTHON, "not CluPy": b"HTTP/1.1 400 no",
                  "hangs up": b""}
        yield {"a..b": "a..b:7878", "127.0.0.1:closed": f"127.0.0.1:{free_port()}", "other secret": other,
               **{kind: stack.enter_context(impostor(bytes)) for kind, bytes in answer.items()}}


def test_a_host_s_name_that_cannot_be_resolved_gets_other_advice_than_a_master_that_is_missing(monkeypatch):
    def unknown(host, *_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    there = f"127.0.0.1:{free_port()}"
    for masters, advice in [("misspelt", "is the name written right, and known to this machine's DNS"),
                            (f"misspelt,{there}", "is `python -m clupy master` running there?")]:
        for ask in (lambda: clupy.connect(masters, patience=0.5), lambda: tables_of(masters)):
            with pytest.raises(clupy.MasterUnreachable) as caught:
                ask()
            assert "misspelt:" in str(caught.value) and advice in str(caught.value)
            assert "the name 'misspelt' cannot be resolved: Name or service not known" in str(caught.value)


def test_a_bad_master_among_several_is_passed_over_whatever_is_wrong_with_it(tmp_path):
    with bad_masters(tmp_path / "bad") as bad, Cluster(tmp_path, servers=0) as cluster:
        addresses = ",".join([*bad.values(), cluster.address])
        cluster.add_server("--master", addresses)
        clupy.connect(addresses)
        assert clupy.parallel(square)(3).result(PATIENCE) == 9
        assert "Traceback" not in cluster.servers[0].log and "connected to the master at" in cluster.servers[0].log
        clupy.close()
        with pytest.raises(clupy.MasterUnreachable) as caught:     # all are bad, but not all for ever
            clupy.connect(",".join(bad.values()), patience=1.5 * clupy.HANDSHAKE_TIME)
        for kind, address in bad.items():
            assert re.search(f"{re.escape(address)}: [^;]*{re.escape(BAD_MASTERS[kind])}", str(caught.value)), kind


@pytest.mark.parametrize("kind, error", [("other secret", clupy.SecretError), ("other version", clupy.VersionMismatch)])
def test_what_all_masters_say_and_no_patience_mends_is_an_error_at_once(tmp_path, monkeypatch, kind, error):
    with bad_masters(tmp_path / "bad") as bad, impostor(OTHER_PYTHON) as another:
        if kind == "other secret":
            another = f"127.0.0.1:{free_port()}"
            monkeypatch.setenv("CLUPY_SECRET", "a third secret, of neither")
            other = Program(tmp_path / "other", "-m", "clupy", "master", "--listen", another, CLUPY_SECRET=SECRET)
        else:
            other = contextlib.nullcontext()
        with other:
            until(lambda: answers(another))
            with pytest.raises(error) as caught:
                clupy.connect(f"{bad[kind]},{another}")
            assert f"{bad[kind]}: it " in str(caught.value) and f"; {another}: it " in str(caught.value)
            server = subprocess.run([sys.executable, "-m", "clupy", "serve", "--master", f"{bad[kind]},{another}"], timeout=60,
                                    env=environ(CLUPY_SECRET=os.environ["CLUPY_SECRET"]), capture_output=True, text=True)
            assert server.returncode == 1 and server.stderr.splitlines()[-1] == f"clupy serve: {caught.value}"


def test_the_commands_say_in_words_why_no_master_answers(tmp_path):
    async def story():                             # one closes as it is asked, one stops and says nothing
        async def greet(sock, peer, role, preambles):
            connection = await clupy_master.admit(sock, peer, preambles, SECRET.encode(), clupy.default_settings("master"))
            await connection.receive()
            connection.abort()
        closing = clupy_master.Listener(("127.0.0.1", 0), greet, clupy.default_settings("master"))
        addresses = [closing.address, *(clupy.parse_address(bad[kind], 7878) for kind in ("a..b", "other Python"))]
        try:
            settings = clupy.read_settings("client", master=["%s:%s" % address for address in addresses])
            with pytest.raises(clupy.MasterUnreachable, match="connection and did not answer.*no name.*runs Python 3.99"):
                await clupy_master.ask_master(settings, "status")
        finally:
            await closing.close()
    with bad_masters(tmp_path) as bad:
        asyncio.run(story())
        done = subprocess.run([sys.executable, "-m", "clupy", "status", "--master", bad["other secret"]],
                              env=environ(), capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"clupy status: {bad['other secret']}: it has another secret")


def test_no_reason_is_empty():
    assert clupy.told({("h", 1): OSError(), ("h", 2): "it left"}) == "h:1: OSError; h:2: it left"


def test_two_masters_that_stand_by_and_name_each_other_are_asked_once_between_two_pauses(monkeypatch):
    class Standby:                                 # stands by for ever
        name = "itself"

        def sure(self, now):
            return False

        def close(self):
            pass

    class Asker:
        visits = lost = 0

        def master_joined(self, connection):
            self.visits += 1
            connection.send("status")

        def on_leader(self, _, address):
            link.follow(address)

        def master_lost(self):
            self.lost += 1

    async def story():
        nonlocal link
        settings = clupy.default_settings("master", listen=("127.0.0.1", 0))
        masters = [clupy_master.Master(settings, SECRET.encode()) for _ in range(2)]
        for master, other in zip(masters, masters[::-1], strict=True):
            master.stand(Standby())
            master.leadership.leader = "%s:%s" % other.address
        link = clupy.MasterLink([masters[0].address, ("localhost", masters[1].address[1])], SECRET.encode(),
                                clupy.default_settings("client"))
        since, asker = link.lost_at, Asker()
        task = asyncio.create_task(link.run(asker))
        while len(pauses) < 4 and asker.visits < 100:
            await asyncio.sleep(0.01)
        task.cancel()
        for master in masters:
            await master.close()
        assert asker.visits == 3 * 4 and asker.lost == 4 and link.lost_at == since        # patience is not for who stands by
        assert link.why_lost.count("it stands by; 127.0.0.1:") == 3
    link, pauses = None, []
    monkeypatch.setattr(clupy.random, "uniform", lambda *_: pauses.append(0) or 1.0)
    asyncio.run(story())


def test_patience_begins_when_the_last_master_that_led_is_lost(monkeypatch):
    """Not with every connection to one that does not lead, nor with the first one, an hour before it stands down."""
    class Leadership:
        leader, name, leads = None, "itself", True

        def sure(self, now):
            return self.leads

        def close(self):
            pass

    class Client:
        def master_joined(self, connection):
            connection.send("client", "c", "name", 1, [], None, IDLE)

        def master_lost(self):
            pass

        def on_share(self, *_):
            link.leads = True

        def on_leader(self, _, address):
            link.follow(address)

    async def meets(condition):
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0.01)

    async def story():
        nonlocal link
        hung_up = []

        async def greet(sock, peer, role, preambles):
            connection = await clupy_master.admit(sock, peer, preambles, SECRET.encode(), clupy.default_settings("master"))
            await connection.receive()
            hung_up.append(peer)
            connection.close()
        closing = clupy_master.Listener(("127.0.0.1", 0), greet, clupy.default_settings("master"))
        master = clupy_master.Master(clupy.default_settings("master", listen=("127.0.0.1", 0)), SECRET.encode())
        master.stand(Leadership())
        link = clupy.MasterLink([closing.address, master.address], SECRET.encode(), clupy.default_settings("client"))
        task, born = asyncio.create_task(link.run(Client())), link.lost_at
        await meets(lambda: link.leads)
        assert link.lost_at == born
        deposed, master.leadership.leads = time.monotonic(), False
        await meets(lambda: len(hung_up) == 3)                     # three rounds later
        assert deposed <= link.lost_at < deposed + 5 and not link.leads
        lost = link.lost_at
        await meets(lambda: len(hung_up) == 5)
        assert link.lost_at == lost
        assert re.fullmatch(r"[\d.:]+: it closed the connection; [\d.:]+: it stands by; no master leads yet", link.why_lost)
        task.cancel()
        for part in closing, master:
            await part.close()
    link = None
    asyncio.run(story())


def test_where_masters_stand_by_and_none_leads_patience_ends_and_all_are_named(tmp_path):
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for number, address in enumerate(addresses):
            stack.enter_context(Program(tmp_path / str(number), "-m", "clupy", "master", "--listen", address,
                                        CLUPY_ZOOKEEPER=f"127.0.0.1:{free_port()}"))
            until(lambda address=address: answers(address))
        done = run_script(tmp_path / "client", "import clupy\nprint(clupy.parallel(abs)(-1).exception(60))",
                          CLUPY_MASTER=",".join(addresses), CLUPY_PATIENCE=3)
        said = "; ".join(f"{address}: it stands by; no master leads yet" for address in addresses)
        assert re.fullmatch(rf"no master for [3-9]\.. s \({said}\); is .* running there\?\n", done.stdout)


def test_these_two_thirds_begin_with_the_question_not_with_the_answer():
    class Election:
        def check(self):
            self.asked = time.monotonic()
            time.sleep(0.1)                                # the answer is on its way

        def candidates(self):
            raise clupy.Unavailable("asked in vain, which costs no office")

    class Looks(list):
        """What stops the leader: it looks once how long that is sure of its office."""
        def is_set(self):
            return bool(self)

        def wait(self, _):
            self.append(leadership._until)
    leadership, election = clupy_master.Leadership.__new__(clupy_master.Leadership), Election()
    leadership._until, leadership._session, leadership.name, leadership._stopped = 0.0, 3.0, "me", Looks()
    leadership._lead(election)
    assert leadership._stopped[0] <= election.asked + 2.0 and not leadership.sure(time.monotonic())


# ==== Chaos: what befalls networks, machines and processes, while calls run ======
# `make chaos` has all rows, `make test` those that are quick; CLUPY_CHAOS says which.

LOAD = """if True:                                 # the client: calls that note when they begin, and what becomes of them
    import collections, functools, json, os, resource, sys, time
    import clupy
    ledger, calls, seconds, size, retries, descriptors = json.loads(sys.argv[1])
    clupy.Lanes.offer = lambda lanes, key: None             # as if it were another machine

    def work(ledger, n, seconds, size):
        with open(ledger, "a") as file:
            file.write(f"{n} {os.getpid()}\\n")
        time.sleep(seconds)
        print(f"call {n} is over")
        return n * n, bytes(size)

    def load(numbers, seconds):
        outcomes = collections.defaultdict(list)
        def note(n, future):
            error = future.exception()
            outcomes[n].append(f"{type(error).__name__}: {error}" if error else future.result() == (n * n, bytes(size)))
        made = [clupy.parallel(work, retries=retries)(ledger, n, seconds, size) for n in numbers]
        for n, future in zip(numbers, made):
            future.add_done_callback(functools.partial(note, n))
        clupy.wait_all(made, 300)
        return outcomes

    clupy.connect()
    if descriptors:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + descriptors, used + descriptors))
    first = load(range(calls), seconds)
    open("first", "w").close()
    while not os.path.exists("again"):
        time.sleep(0.05)
    second = load(range(calls, calls + 60), 0.05)
    clupy.close()
    with open("outcomes", "w") as file:
        json.dump([first, second], file)
    """


@dataclasses.dataclass
class Row:
    """What befalls a cluster, and what may come of it."""
    fault: object                                  # fault(scene) does it, and returns when it is over
    lasts: float                                   # seconds for which there are calls to be made
    quick: bool = False
    seconds: float = 0.25                          # of a call
    size: int = 0                                  # bytes of its result
    retries: int = 2
    lost: int = 0                                  # calls that may fail, by WorkerDied
    descriptors: dict = dataclasses.field(default_factory=dict)     # {host: how many it may have; the client, more than it has}

    @property
    def calls(self):
        return math.ceil(self.lasts * 6 / self.seconds)


class Scene:
    """A master, three servers of two slots and a client that makes the calls of a row, each on a host of its own."""
    servers = "server0", "server1", "server2"

    def __init__(self, folder, net, row, stack):
        self.folder, self.net, self.row, self.stack = folder, net, row, stack
        self.programs, self.ledger = {}, folder / "ledger"
        self.start("master")
        until(self.tables)
        for host in self.servers:
            self.start(host)
        until(lambda: len(self.tables().get("servers", ())) == 3)
        self.start("client")
        until(self.begun)

    @property
    def master(self):
        return f"{self.net.address('master')}:{os.environ['CLUPY_PORT']}"

    def tables(self):
        """What the master knows; nothing if it does not answer in time, on a busy machine."""
        with self.net.at("master"), contextlib.suppress(OSError):
            return tables_of(self.master)
        return {}

    def start(self, host):
        row, limit = self.row, self.row.descriptors.get(host, 0)
        if host == "client":
            command = "-c", LOAD, json.dumps([str(self.ledger), row.calls, row.seconds, row.size, row.retries, limit])
        else:
            words = ["master", "--listen", self.master] if host == "master" else [
                "serve", "--master", self.net.address("master"), "--listen", f"{self.net.address(host)}:7000", "--slots", "2"]
            limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit})); " if limit else ""
            command = "-c", f"{limited}import clupy; clupy.main({words!r})"
        with self.net.at(host):
            program = Program(self.folder / host, *command, CLUPY_MASTER=self.master)
        self.programs[host] = self.stack.enter_context(program)

    def begun(self):
        """[(number, pid)] of the calls' starts."""
        text = self.ledger.read_text() if self.ledger.exists() else ""
        return [tuple(map(int, line.split())) for line in text.splitlines()]

    def goes_on(self, seconds=math.inf):
        """Wait so long; False, and no longer, once the calls are over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.programs["client"].process.poll() is None
            if (self.folder / "client" / "first").exists():
                return False
            time.sleep(0.05)
        return True


def on(ways, seconds, **how):
    """The ways are so for some seconds."""
    def fault(scene):
        with scene.net.impaired(*ways, **how):
            scene.goes_on(seconds)
    return fault


def around(host):
    return (host, None), (None, host)


def kills(scene):
    """By chance workers, what they are forked from, servers and the master are killed; the last two are started again."""
    count = 0
    while scene.goes_on(random.uniform(0, 0.5)):
        victim, = random.choices((workers, templates, *scene.servers, "master"), (12, 1, 1, 1, 1, 1))
        if callable(victim):
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(random.choice([*victim()]), signal.SIGKILL)
        else:
            scene.programs[victim].process.kill()
            scene.programs[victim].process.wait()
            scene.start(victim)
        count += 1
    assert count > scene.row.lasts


def told(host, text):
    """What the row has for a start is told of on that host."""
    return lambda scene: until(lambda: text in scene.programs[host].log)


def family(pid):
    """The process and all that it started, directly or not."""
    found, all_ = {pid}, processes()
    for _ in range(4):
        for other in all_:
            with contextlib.suppress(OSError):
                if parent_of(other) in found:
                    found.add(other)
    return found


def stops(host, seconds, whole=False):
    """The process of a host, or the whole of it, is stopped for some seconds."""
    def fault(scene):
        pid = scene.programs[host].process.pid
        with contextlib.ExitStack() as stack:
            for one in family(pid) if whole else {pid}:
                stack.enter_context(stopped(one))
            time.sleep(seconds)
    return fault


def group_of_processes():
    """A folder of the kernel's in which groups of processes are limited in number, or None."""
    for folder in "/sys/fs/cgroup/pids", "/sys/fs/cgroup":
        probe = f"{folder}/clupy-test-probe-{os.getpid()}"
        with contextlib.suppress(OSError):
            os.mkdir(probe)
            try:
                if os.path.exists(f"{probe}/pids.max"):
                    return folder
            finally:
                os.rmdir(probe)


def no_more_processes(host, seconds):
    """None of the host's processes gets another process or thread for some seconds; if it is a server, its workers are killed."""
    def fault(scene):
        root = group_of_processes() or pytest.skip("no leave to limit the number of processes")
        folder, pid = f"{root}/clupy-test-{os.getpid()}", scene.programs[host].process.pid

        def write(path, *values):
            for value in values:
                with contextlib.suppress(ProcessLookupError), open(path, "w") as file:
                    file.write(f"{value}")
        os.mkdir(folder)
        try:
            write(f"{folder}/cgroup.procs", *family(pid))
            write(f"{folder}/pids.max", 1)
            victims = family(pid) & workers()
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            scene.goes_on(seconds)
            assert not victims or "max 0" not in open(f"{folder}/pids.events").read()           # some were refused
        finally:
            write(f"{folder}/pids.max", "max")
            until(lambda: write(f"{root}/cgroup.procs", *open(f"{folder}/cgroup.procs").read().split())
                  or not open(f"{folder}/cgroup.procs").read())
            os.rmdir(folder)
    return fault


ROWS = {
    "a server is silent for 5 s": Row(on(around("server0"), 5, loss=1), 7, retries=0, quick=True),
    "a server is silent for 60 s, no retries": Row(on(around("server0"), 60, loss=1), 75, retries=0, lost=2),
    "a server is silent for 60 s": Row(on(around("server0"), 60, loss=1), 75),
    "the client is silent for 5 s": Row(on(around("client"), 5, loss=1), 7, retries=0),
    "the client is silent for 60 s, no retries": Row(on(around("client"), 60, loss=1), 40, retries=0, lost=6),
    "the client is silent for 60 s": Row(on(around("client"), 60, loss=1), 40),
    "the master is silent for 5 s": Row(on(around("master"), 5, loss=1), 8, retries=0),
    "the master is silent for 60 s": Row(on(around("master"), 60, loss=1), 75, retries=0),
    "the client hears nothing of a server": Row(on([("server0", "client")], 20, loss=1), 30, retries=0, lost=2),
    "a server hears nothing of the client": Row(on([("client", "server0")], 20, loss=1), 30, retries=0, lost=2),
    "a server hears nothing of the master": Row(on([("master", "server0")], 20, loss=1), 30, retries=0),
    "the master hears nothing of a server": Row(on([("server0", "master")], 20, loss=1), 30, retries=0),
    "the client hears nothing of the master": Row(on([("master", "client")], 20, loss=1), 30, retries=0),
    "the master hears nothing of the client": Row(on([("client", "master")], 20, loss=1), 30, retries=0),
    "the client's connections are reset": Row(on(around("client"), 2, reset=True), 5, quick=True),
    "the client's connections are reset, no retries": Row(on(around("client"), 5, reset=True), 15, retries=0, lost=12),
    "a server's connections are reset": Row(on(around("server0"), 5, reset=True), 15),
    "the master's connections are reset": Row(on(around("master"), 5, reset=True), 15, retries=0),
    "large results, 2 MB a second": Row(on(around("client"), math.inf, rate=2e6), 0.25, size=2 << 20, retries=0, quick=True),
    "larger results, 1 MB a second": Row(on(around("client"), math.inf, rate=1e6), 0.25, size=15 << 20, retries=0),
    "a fifth is lost": Row(on(around("client"), 30, loss=0.2), 25, retries=5),
    "100 ms of delay": Row(on(around("client"), math.inf, delay=0.1), 3, retries=0, quick=True),
    "kills": Row(kills, 10, seconds=0.03, retries=5, quick=True),
    "kills, longer calls": Row(kills, 60, seconds=0.18, retries=5),
    "kills, no retries": Row(kills, 60, seconds=0.18, retries=0, lost=500),
    "the client is short of descriptors": Row(told("client", "ulimit -n"), 2, retries=0, descriptors={"client": 22}, quick=True),
    "a server is short of descriptors": Row(told("server0", "ulimit -Hn"), 2, retries=0, descriptors={"server0": 44}, quick=True),
    "the client is short of processes": Row(no_more_processes("client", 4), 5, retries=0, quick=True),
    "a server is short of processes": Row(no_more_processes("server0", 4), 5, quick=True),
    "the client is stopped for 20 s": Row(stops("client", 20), 10, retries=0),
    "the client is stopped for 65 s": Row(stops("client", 65), 10, retries=0),
    "the master is stopped for 20 s": Row(stops("master", 20), 25, retries=0),
    "the master is stopped for 65 s": Row(stops("master", 65), 75, retries=0),
    "a server is stopped for 20 s": Row(stops("server0", 20), 25, retries=0),
    "a server is stopped for 65 s": Row(stops("server0", 65), 75, retries=0),
    "a server and its workers are stopped for 20 s": Row(stops("server0", 20, True), 25, retries=0),
    "a server and its workers are stopped for 65 s": Row(stops("server0", 65, True), 75, retries=0, lost=2),
}
CHAOS = os.environ.get("CLUPY_CHAOS", "quick")              # or: all, none


def holds(scene):
    """What is so after every row: one outcome of each call, the right values, no start too many, and nothing left running."""
    row, client = scene.row, scene.programs["client"]
    assert client.process.wait(120) == 0, client.log
    first, second = json.loads((scene.folder / "client" / "outcomes").read_text())
    assert [len(outcomes) for outcomes in (first, second)] == [row.calls, 60]
    assert all(len(outcomes) == 1 for outcomes in [*first.values(), *second.values()])
    failed = {n: outcome for n, [outcome] in first.items() if outcome is not True}
    assert len(failed) <= row.lost and not [error for error in failed.values() if "WorkerDied" not in str(error)], failed
    assert set(map(tuple, second.values())) == {(True,)}, second
    starts, calm = collections.Counter(n for n, _ in scene.begun()), {*range(row.calls, row.calls + 60)}
    assert max(starts.values()) <= 1 + row.retries and all(starts[n] == 1 for n in calm)
    assert {n for n in range(row.calls) if str(n) not in failed} <= starts.keys()
    said = collections.Counter(map(int, re.findall(r"call (\d+) is over", client.out.read_text())))
    assert not said - starts and (calm if row.retries or row.lost else starts.keys()) <= said.keys()
    for program in scene.programs.values():
        assert "Traceback" not in program.log
    until(lambda: not {pid for _, pid in scene.begun()} & processes().keys())
    until(lambda: (tables := scene.tables()) and not tables["clients"] and len(tables["servers"]) == 3
          and not any(row["used"] for row in tables["servers"].values()))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if CHAOS == "all" or CHAOS == "quick" and row.quick])
def test_chaos_leaves_each_call_one_outcome_and_the_cluster_as_it_was(tmp_path, name):
    if Net.refusal():
        pytest.skip(Net.refusal())
    row = ROWS[name]
    with Net("master", *Scene.servers, "client") as net, contextlib.ExitStack() as stack:
        scene = Scene(tmp_path, net, row, stack)
        try:
            row.fault(scene)
            (tmp_path / "client" / "again").touch()
            holds(scene)
        except BaseException:
            for host, program in scene.programs.items():
                print(host, program.log[-5000:], sep=":\n")
            raise


# ==== The page ===============================================================

@contextlib.contextmanager
def browser(address, width=1200, **features):
    """A Chromium without a window that shows the address; features: what its user prefers, as style sheets ask for it."""
    driver, program = needed("chromedriver"), needed("chromium")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in "headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu":
        options.add_argument(f"--{option}")
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                 {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": name.replace("_", "-"), "value": value} for name, value in features.items()]})
        chromium.get(address)
        yield chromium
    finally:
        chromium.quit()


def seen(page, id):
    """The text of a part of the page, all of one moment: it may be drawn anew at any time."""
    return page.execute_script("return document.getElementById(arguments[0]).innerText", id)


def fetched(address, host=None):
    """(status, text) that an HTTP server answers; host: what the request calls it."""
    request = urllib.request.Request(address, headers={"Host": host} if host else {})
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


HOSTILE = "<img src=x onerror=alert(1)>.py"

BUSY = f"""if True:
    import sys, time, clupy
    sys.argv[0] = {HOSTILE!r}
    def work(n):
        time.sleep(0.05)
        return 1 // (n % 10)
    while True:
        calls = [clupy.parallel(work)(n) for n in range(20)]
        clupy.wait_all(calls)
        [call.failure for call in calls]
    """


def test_a_browser_sees_who_joins_and_who_dies_and_how_calls_get_on(tmp_path):
    port = free_port()
    with Cluster(tmp_path, CLUPY_STATUS_PORT=port) as cluster, browser(f"http://localhost:{port}/") as page:
        def names():
            return set(re.findall(r"\S+:\d+ \(\w{4}\)", seen(page, "servers")))

        def numbers():
            """Done, failed and running calls of the one client."""
            cells = page.execute_script("return [...document.querySelectorAll('#clients td.number')].map(cell => cell.innerText)")
            return [int(text.replace(",", "")) for text in cells[:3]]

        until(lambda: names() == {row["name"] for row in cluster.status()["servers"].values()})
        assert "No program is connected" in seen(page, "clients")
        cluster.add_server()
        until(lambda: len(names()) == 2)
        with Program(tmp_path / "client", "-c", BUSY, CLUPY_MASTER=cluster.address):
            done, failed, _ = until(lambda: (found := numbers()) and all(found) and found)
            until(lambda: numbers() > [done + 20, failed])
            until(lambda: "L" in page.execute_script("return document.querySelector('#clients path').getAttribute('d')"))
            assert HOSTILE in seen(page, "clients") and HOSTILE in seen(page, "servers")
            assert not page.find_elements("css selector", "main img")
        cluster.servers[0].process.kill()
        until(lambda: len(names()) == 1)
        assert page.get_log("browser") == []
        cluster.master.process.kill()
        until(lambda: "does not answer" in seen(page, "alarm"))


def test_the_page_fits_a_phone_and_is_dark_for_who_likes_that(tmp_path):
    port = free_port()
    with Cluster(tmp_path, CLUPY_STATUS_PORT=port), \
            browser(f"http://localhost:{port}/", 360, prefers_color_scheme="dark") as page:
        until(lambda: "ready" in seen(page, "servers"))
        assert page.execute_script("return document.documentElement.scrollWidth") == 360
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert all(int(part) < 64 for part in re.findall(r"\d+", colour)), colour


def test_on_loopback_the_page_is_for_who_calls_it_by_a_name_of_this_machine(tmp_path):
    """A web page of elsewhere, whose name was made to point here, gets nothing."""
    port = free_port()
    with Cluster(tmp_path, CLUPY_STATUS_PORT=port) as cluster:
        here = f"http://127.0.0.1:{port}/"
        assert cluster.status()["master"]["page"] == here and f"the status page is at {here}\n" in cluster.master.log
        for path in "", "status.json", "metrics":
            assert fetched(here + path)[0] == fetched(here + path, f"localhost:{port}")[0] == 200
            for host in f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example/localhost":
                assert fetched(here + path, host)[0] == 403
        assert fetched(here + "other") == (404, "There is /, /status.json, /metrics.\n")
        name, = [row["name"] for row in cluster.status()["servers"].values()]
        assert [row["name"] for row in json.loads(fetched(here + "status.json")[1])["servers"].values()] == [name]
        assert f'\nclupy_slots{{server="{name}"}} 2\n' in fetched(here + "metrics")[1]
        assert "src=" not in clupy_master.PAGE and "@import" not in clupy_master.PAGE        # it loads nothing from elsewhere


@pytest.mark.parametrize("tls", [False, True])
def test_elsewhere_the_page_is_for_who_has_its_token_which_the_secret_makes(tmp_path, certificates, tls):
    files = {"CLUPY_TLS_CERT": "good.pem", "CLUPY_TLS_KEY": "good.key", "CLUPY_TLS_CA": "good.pem"} if tls else {}
    options = {name: str(certificates / file) for name, file in files.items()}
    with Cluster(tmp_path, servers=0, CLUPY_STATUS_PORT=f"0.0.0.0:{(port := free_port())}", **options) as cluster:
        page = cluster.status()["master"]["page"].replace(socket.gethostname(), "127.0.0.1")
        where, token = page.split("?token=")
        assert where == f"http{'s' * tls}://127.0.0.1:{port}/"
        assert len(token) == 32 and token not in cluster.master.log
        for path in "", "status.json", "metrics":
            queries = "", "token=", f"token={token[:-1]}x", f"token={token}"
            assert [fetched(f"{where}{path}?{query}")[0] for query in queries] == [403, 403, 403, 200]


def test_who_asks_for_the_page_and_says_nothing_does_not_hold_up_the_master_s_end(tmp_path):
    port = free_port()
    with Cluster(tmp_path, servers=0, CLUPY_STATUS_PORT=port) as cluster:
        with socket.create_connection(("127.0.0.1", port)) as silent:
            assert fetched(f"http://127.0.0.1:{port}/")[0] == 200
            cluster.master.process.terminate()
            assert cluster.master.process.wait(PATIENCE) == 0 and "ERROR" not in cluster.master.log
            assert silent.recv(1) == b""


def test_the_page_answers_so_many_at_once_and_ends_them_all(monkeypatch):
    monkeypatch.setattr(clupy_master._Request, "timeout", 9 * PATIENCE)   # none of the silent ones may end by itself
    web = clupy_master._Web(("127.0.0.1", 0), types.SimpleNamespace(allows=lambda host, query: False))
    thread = threading.Thread(target=web.serve_forever, args=(0.01,))
    thread.start()
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(web.close)

        def asks():
            return stack.enter_context(socket.create_connection(web.server_address, timeout=PATIENCE))
        silent = [asks() for _ in range(clupy_master.PAGE_REQUESTS - 1)]
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen("http://127.0.0.1:%s/" % web.server_address[1], timeout=PATIENCE)
        until(lambda: len(web.sockets) == len(silent))        # that one has its answer, and is gone
        silent.append(asks())
        assert asks().recv(1) == b""                          # one too many
        web.close()
        assert all(sock.recv(1) == b"" for sock in silent)


def test_a_page_where_none_can_be_is_an_error_in_words(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = command("master", "--listen", "127.0.0.1:0", "--status-port", other.getsockname()[1])
    assert done.returncode == 1
    assert re.search("^clupy master: status_port is 127.0.0.1:.* in use.*--status-port", done.stderr, re.M)


def test_names_are_quoted_for_prometheus():
    tables = {"master": {"leader": "a", "address": "b"}, "servers": {}, "faults": [], "clients": {
        "id": {"name": 'a "b"\\c\nd', "wanted": 1, "done": 2, "failed": 0, "running": 0, "waiting": 0}}}
    lines = clupy_master.metrics_text(tables).splitlines()
    assert r'clupy_calls_done_total{client="a \"b\"\\c\nd"} 2' in lines and "clupy_leads 0" in lines


def test_the_rate_of_a_client_is_of_what_it_did_since_some_time():
    """However often it says something; from the first statement on, which may be to a new master."""
    row = clupy_master.ClientRow()
    for now, done in (10.0, 1000), (10.02, 1001), (12.0, 1010), (12.5, 1020), (14.5, 1020), (16.5, 1020):
        row.count((done, 0, 1, 2), now)
    assert list(row.rates) == [5.0, 4.0, 0.0] and row.calls == (1020, 0, 1, 2)


def test_the_page_of_each_of_several_masters_says_who_leads(tmp_path, zookeeper_server):
    options = {"CLUPY_ZOOKEEPER": zookeeper_server.hosts, "CLUPY_SESSION": SESSION, "CLUPY_PREFIX": f"test-{free_port()}"}
    ports, addresses = [free_port(), free_port()], [f"127.0.0.1:{free_port()}" for _ in range(2)]
    with contextlib.ExitStack() as stack:
        for port, address in zip(ports, addresses):
            stack.enter_context(Program(tmp_path / address, "-m", "clupy", "master", "--listen", address, "--status-port", port,
                                        **options))
            until(lambda address=address: answers(address))

        def said():
            return [json.loads(fetched(f"http://localhost:{port}/status.json")[1])["master"] for port in ports]
        one, two = until(lambda: (found := said()) and found[0]["leader"] and found[0]["leader"] == found[1]["leader"] and found)
        assert (one["address"], two["address"]) == tuple(addresses) and one["leader"] in addresses
        leader = addresses.index(one["leader"])
        until(lambda: said()[leader]["masters"] == [addresses[leader], addresses[1 - leader]])
        assert "\nclupy_leads 1\n" in fetched(f"http://localhost:{ports[leader]}/metrics")[1]
        with browser(f"http://localhost:{ports[1 - leader]}/") as page:
            until(lambda: f"{addresses[leader]} leads" in seen(page, "alarm"))


# ==== `python -m clupy check` =================================================

def checked(*arguments, limit=PATIENCE, **env):
    """(exit code, {what was looked at: (ok or WRONG, the words)}) of `check`, whose standard error is empty.

    limit: seconds that a call may take."""
    script = f"import clupy, clupy_master; clupy.FIRST_CONTACT, clupy_master.CALL_LIMIT = 0.5, {limit}; exit(clupy.main())"
    done = subprocess.run([sys.executable, "-c", script, "check", *arguments], env=environ(**env), timeout=60,
                          capture_output=True, text=True)
    assert done.stderr == ""
    lines = [re.fullmatch(r"(ok|WRONG) +(.*?): (.*)", line).groups() for line in done.stdout.splitlines()]
    return done.returncode, {what: (ok, words) for ok, what, words in lines}


def test_check_says_that_all_is_right_and_a_call_ran_on_every_server(tmp_path, redis_server):
    with Cluster(tmp_path, servers=2, CLUPY_REDIS=redis_server.url) as cluster:
        code, said = checked("--master", cluster.address)
        names = [row["name"] for row in cluster.status()["servers"].values()]
    assert code == 0 and {ok for ok, _ in said.values()} == {"ok"}
    assert [said[name][1] for name in names] == ["a call ran there, 2 slots"] * 2
    assert said.keys() == {"secret", "master", "clock", "versions", "libraries", "Redis", "ZooKeeper", *names}
    assert said["Redis"][1].endswith(" answers") and said["ZooKeeper"][1].startswith("none; ")


def test_check_says_what_is_wrong_and_what_to_do(tmp_path):
    nowhere = f"127.0.0.1:{free_port()}"
    code, said = checked("--master", nowhere)
    assert code == 1 and said["master"][0] == "WRONG" and "is `python -m clupy master` running there?" in said["master"][1]
    code, said = checked("--master", nowhere, CLUPY_SECRET="", HOME=tmp_path)
    assert code == 1 and said.keys() == {"secret"} and "copy it from there, or set CLUPY_SECRET" in said["secret"][1]
    with Cluster(tmp_path, servers=0) as cluster:
        code, said = checked("--master", cluster.address, CLUPY_SECRET="another secret than all others")
        assert code == 1 and "it has another secret" in said["secret"][1]
        code, said = checked("--master", cluster.address, "--redis", f"redis://:hidden@{nowhere}/0", "--zookeeper", nowhere)
        assert code == 1 and "python -m clupy serve" in said["servers"][1]
        for service in "Redis", "ZooKeeper":
            assert said[service][0] == "WRONG" and nowhere in said[service][1] and "hidden" not in said[service][1]
        assert [said[what][0] for what in ("secret", "master", "clock", "versions", "libraries")] == ["ok"] * 5


def test_check_tells_a_server_that_cannot_be_reached_from_one_that_others_use(tmp_path):
    async def scenario():
        connection = await clupy.dial(tuple(clupy.parse_address(cluster.address)), clupy.TO_MASTER, SECRET.encode(),
                                      clupy.read_settings("client"))
        connection.send("server", "behind a firewall", ("127.0.0.1", free_port()), 1, {}, {**facts, "name": "firewalled"})
        try:
            return await asyncio.to_thread(checked, "--master", cluster.address, limit=2)
        finally:
            connection.abort()

    with Cluster(tmp_path) as cluster:
        row, = cluster.status()["servers"].values()
        facts = {key: value for key, value in row.items() if key not in ("address", "slots", "used", "runs")}
        clupy.connect(cluster.address)
        busy = [clupy.parallel(sleepy, retries=0)(60) for _ in range(2)]
        until(lambda: [row["used"] for row in cluster.status()["servers"].values()] == [2])
        code, said = asyncio.run(scenario())
        assert code == 1 and "cannot be reached from here: Connection refused; is a firewall" in said.pop("firewalled")[1]
        assert {ok for ok, _ in said.values()} == {"ok"}
        assert said[row["name"]][1] == "it can be reached; no call ran, as others have 2 of its 2 slots"
        assert all(call.cancel() for call in busy)


def test_check_compares_clocks_versions_and_libraries():
    clock = clupy_master._clock("its clock", 1000.0, 1010.0, 1011.0)
    assert "its clock is 10 s behind ours" in clock and "NTP" in clock
    assert "20 s ahead of ours" in clupy_master._clock("its clock", 1031.0, 1010.0, 1011.0)
    assert clupy_master._clock("its clock", 1011.5, 1010.0, 1011.0) == ""
    row = {"name": "there", "version": "0.0.1", "cloudpickle": clupy_master.installed("cloudpickle"), "faults": ["no room"]}
    tables = {"master": {"version": clupy.__version__}, "servers": {"id": row}, "faults": [],
              "libraries": [("pytest", "1.0", "", ""), ("not-here", "1.0", "", "")]}
    (ok, what, words), = clupy_master._versions(tables)
    assert (ok, what) == (False, "versions") and words.startswith("there has CluPy 0.0.1, we have ")
    fault, different = clupy_master._libraries(tables)
    assert fault == (False, "libraries", "there: no room")
    assert different[2].endswith(" in the cluster: python -m pip install pytest==1.0")


# ==== examples/deploy: as far as one machine can tell =========================

DEPLOY = os.path.join(HERE, "examples", "deploy")

PROGRAM = """
import clupy, os
servers = clupy.everywhere(os.getppid)
print(len({call.result(30) for call in servers.values()}), "servers")
raise SystemExit(3)
"""

STUBS = {   # of programs that these scripts use; when ssh is killed, what it started hears of that by its standard input
    "hostname": "echo 127.0.0.1",
    "srun": 'shift\npids=\nfor node in 1 2; do "$@" & pids="$pids $!"; done\ntrap "kill $pids" TERM\nwait\nwait',
    "ssh": 'shift 3\nmkfifo "$PWD/pipe.$$"\nsh -c "$*" <"$PWD/pipe.$$" &\nexec cat >"$PWD/pipe.$$"',
    "python": 'echo "$CLUPY_SECRET" "$@"'}


def text_of(*names):
    with open(os.path.join(DEPLOY, *names)) as file:
        return file.read()


@pytest.fixture
def stubs(tmp_path):
    """The PATH with the stubs."""
    folder = tmp_path / "stubs"
    write_files(folder, {name: f"#!/bin/sh\n{text}\n" for name, text in STUBS.items()})
    for name in STUBS:
        os.chmod(folder / name, 0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", ["slurm.sh", "ssh.sh"])
def test_scripts_make_a_cluster_for_one_program_and_leave_nothing(tmp_path, stubs, script):
    port = random.choice([port for port in (free_port() for _ in range(100)) if port >= 20_000])
    (tmp_path / "program.py").write_text(PROGRAM)
    env = environ(PATH=stubs, PYTHON=sys.executable, CLUPY_PORT=port, HOSTS="one two", SLURM_JOB_ID=port - 20_000, SLURM_NNODES=2,
                  SLURM_CPUS_PER_TASK=1, CLUPY_SECRET="")
    done = subprocess.run(["sh", os.path.join(DEPLOY, script), "program.py"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("2 servers\n", 3), done.stderr
    until(lambda: not processes())
    directives = re.findall(r"^#SBATCH (.*)$", text_of(script), re.M)
    assert all(re.fullmatch(r"--[a-z-]+=\S+", directive) for directive in directives)
    assert bool(directives) == (script == "slurm.sh")


def test_units_of_systemd_are_valid_and_their_commands_too(tmp_path):
    for name in "clupy-master.service", "clupy-server.service":
        text = text_of(name)
        _, _, module, *arguments = re.search(r"^ExecStart=/opt/clupy/bin/(.*)$", text, re.M)[1].split()
        assert module == "clupy" and vars(clupy.command_line().parse_args(arguments))["secret_file"] == "/etc/clupy/secret"
        (tmp_path / name).write_text(text.replace("/opt/clupy/bin/python", sys.executable))
        if shutil.which("systemd-analyze"):
            done = subprocess.run(["systemd-analyze", "verify", "--man=no", name], cwd=tmp_path, capture_output=True, text=True)
            assert (done.returncode, name in done.stderr) == (0, False), done.stderr


def test_containers_are_given_commands_and_a_secret_that_exist(stubs):
    compose = clupy.yaml.safe_load(text_of("compose.yaml"))
    commands = [service["command"] for service in compose["services"].values()]
    assert all(service["secrets"] == ["clupy_secret"] for service in compose["services"].values())
    assert compose["secrets"].keys() == {"clupy_secret"}
    manifests = list(clupy.yaml.safe_load_all(text_of("kubernetes.yaml")))
    assert [manifest["kind"] for manifest in manifests] == ["Service", "Deployment", "Deployment"]
    for manifest in manifests[1:]:
        template = manifest["spec"]["template"]
        container, = template["spec"]["containers"]
        commands.append(container["args"])
        assert manifest["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
        assert container["env"] == [{"name": "CLUPY_SECRET", "valueFrom": {"secretKeyRef": {"name": "clupy", "key": "secret"}}}]
    assert manifests[0]["spec"]["selector"] == manifests[1]["spec"]["selector"]["matchLabels"]
    parsed = [vars(clupy.command_line().parse_args(list(map(str, command)))) for command in commands]
    assert [(given["command"], given.get("master")) for given in parsed] == [
        ("master", None), ("serve", "master"), ("master", None), ("serve", "clupy-master")]
    assert "master" in compose["services"] and manifests[0]["metadata"]["name"] == "clupy-master"


def test_the_image_hands_the_secret_and_the_arguments_on(stubs):
    dockerfile = text_of("Dockerfile")
    minor = re.search(r"^FROM python:3\.(\d+)-slim$", dockerfile, re.M)[1]
    assert f"Python :: 3.{minor}" in io.open(os.path.join(HERE, "setup.cfg")).read()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", dockerfile, re.M)[1])
    done = subprocess.run([*entry, "serve", "--master", "a b"], env=environ(PATH=stubs), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{SECRET} -m clupy serve --master a b\n", "")


# ==== The wire: bytes by hand ================================================

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
        feed(clupy.Frames(limit=1000), struct.pack(">QIQQ", 10, 1, 1 << 50, 0), 28)


def test_what_frames_hold_is_free_as_soon_as_they_are():
    gc.disable()
    try:
        frames = clupy.Frames(b"proof")
        assert len(feed(frames, b"proof" + b"".join(clupy.encode(("a", 1))) + b"half a fra", 1 << 20)) == 1
        gone = weakref.ref(frames)
        del frames
        assert gone() is None
    finally:
        gc.enable()


def test_buffers_that_are_too_large_together_or_too_many_are_refused_before_memory_is_spent():
    with pytest.raises(clupy.ProtocolError, match="over the limit"):
        feed(clupy.Frames(limit=1000), struct.pack(">QIQQQQ", 10, 2, 600, 0, 600, 0), 44)
    with pytest.raises(clupy.ProtocolError, match="over the limit"):
        feed(clupy.Frames(), struct.pack(">QI", 10, clupy.MAX_BUFFERS + 1), 12)
    assert feed(clupy.Frames(limit=1000), struct.pack(">QIQQQQ", 10, 2, 500, 0, 500, 0), 44) == []


def test_a_message_never_runs_code():
    body = pickle.dumps(("kind", os.system))
    with pytest.raises(clupy.ProtocolError, match="plain values"):
        clupy.decode(body)
    with pytest.raises(clupy.ProtocolError, match="no message"):
        clupy.decode(b"rubbish")


def test_a_wrong_proof_is_refused_before_any_frame_is_read():
    with pytest.raises(clupy.ProtocolError, match="slot's key"):
        feed(clupy.Frames(b"right"), b"wrong", 5)


def test_what_was_heard_of_a_handshake_opens_no_other(cluster):
    """Bytes of one handshake with a master, replayed by an impostor and by a client, and its proof sent back to it."""
    host, port = cluster.address.split(":")
    hello, secret = clupy.preamble(clupy.TO_MASTER) + os.urandom(clupy.NONCE_SIZE), SECRET.encode()
    nonces = clupy.PREAMBLE_SIZE, clupy.PREAMBLE_SIZE + clupy.NONCE_SIZE

    def shake(proof):
        """The master's answer to our hello, and whether it takes proof(its nonce, its proof) for ours."""
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
            sock.sendall(hello)
            answer = sock.makefile("rb").read(nonces[1] + clupy.PROOF_SIZE)
            sock.sendall(proof(answer[nonces[0]:nonces[1]], answer[nonces[1]:]) + b"".join(clupy.encode(("status",))))
            with contextlib.suppress(ConnectionError):
                return answer, bool(sock.recv(1))
            return answer, False

    def impersonate():
        with listener.accept()[0] as sock:
            sock.recv(clupy.PREAMBLE_SIZE, socket.MSG_WAITALL)
            sock.sendall(recorded[:clupy.PREAMBLE_SIZE])
            sock.recv(clupy.NONCE_SIZE, socket.MSG_WAITALL)
            sock.sendall(recorded[clupy.PREAMBLE_SIZE:])
            assert sock.recv(1) == b""

    def ours(nonce, _):
        return clupy.proof(secret, b"dial", 2 * hello[:nonces[0]], hello[nonces[0]:], nonce)
    recorded, accepted = shake(ours)
    first = ours(recorded[nonces[0]:nonces[1]], None)
    assert accepted and not shake(lambda *_: first)[1] and not shake(lambda _, proof: proof)[1]
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor() as pool:
        impostor = pool.submit(impersonate)
        with pytest.raises(clupy.SecretError, match="another secret"):
            asyncio.run(clupy.dial(listener.getsockname(), clupy.TO_MASTER, secret, clupy.read_settings("client")))
        impostor.result(PATIENCE)


# ---- Rubbish: whatever comes from outside ends as a value or as an error of ours, at no price
# `make fuzz` (FUZZ=300) gives a million inputs, each time others; the quick run the same few hundred of each kind.

FUZZ, VARIANTS = int(os.environ.get("FUZZ", 1)), 20       # of each example: as drawn, and spoiled in several ways
some = hypothesis.strategies
WORD = some.text(max_size=8)
PLAIN = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | WORD | some.binary(max_size=8),
    lambda more: some.lists(more, max_size=3) | some.tuples(more, more) | some.dictionaries(WORD, more, max_size=3), max_leaves=8)


def rubbish(count):
    return hypothesis.settings(max_examples=count * FUZZ, deadline=None, database=None, derandomize=FUZZ == 1,
                               suppress_health_check=list(hypothesis.HealthCheck))


def spoiled(data, seed):
    """The bytes as they are, and in many ways not quite."""
    luck = random.Random(seed)
    yield data
    for _ in range(VARIANTS - 1):
        bad = bytearray(data)
        for _ in range(luck.randint(1, 3)):
            start = luck.randint(0, len(bad))
            bad[start:start + luck.choice((0, 0, 1, 1, 4, 8, 100))] = luck.choice((
                b"", luck.randbytes(1), luck.randbytes(4), bytes(8), b"\xff" * 8, data[luck.randint(0, len(data)):][:16]))
        yield bytes(bad[:luck.choice((len(bad), len(bad), luck.randint(0, len(bad))))])


@contextlib.contextmanager
def guarded(most=16 * clupy.MAX_BUFFERS):
    """No memory is asked for beyond so much at once, and nothing is ever found by name for an unpickler."""
    def memory(size):
        assert size <= most
        return bytearray(size)

    def find_class(self, module, name):
        original(self, module, name)
        pytest.fail(f"{module}.{name} was found")
    original, (old, hard) = clupy._PlainUnpickler.find_class, resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * mmap.PAGESIZE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clupy, "memory", memory)
        patch.setattr(clupy._PlainUnpickler, "find_class", find_class)
        resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (old, hard))


def received_by_control(data):
    """The messages that a control connection makes of the bytes."""
    reader, messages = asyncio.StreamReader(loop=types.SimpleNamespace(get_debug=bool)), []
    reader.feed_data(data)
    reader.feed_eof()
    connection = clupy.Connection(reader, None, "peer", b"key", clupy.NO_TLS)
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            try:
                connection.receive().send(None)
            except StopIteration as done:
                messages.append(done.value)
    return messages


@rubbish(40)
@hypothesis.given(some.lists(some.tuples(WORD, PLAIN), max_size=3), some.lists(some.sampled_from((0, 9, 70_000)), max_size=2),
                  some.integers(1, 30), some.integers())
def test_rubbish_among_frames_is_cut_into_messages_or_refused(sent, sizes, pieces, seed):
    plain = b"".join(part for message in sent for part in clupy.encode(message))
    buffers = b"".join(map(bytes, clupy.encode(("buffers", [pickle.PickleBuffer(bytes(size)) for size in sizes]))))
    with guarded():
        for data in spoiled(b"proof" + plain + buffers, seed):
            with contextlib.suppress(clupy.ProtocolError):
                messages = feed(clupy.Frames(b"proof", 100_000), data, len(data) // pieces + 1)
                assert all(type(message) is tuple and type(message[0]) is str for message in messages)
            with contextlib.suppress(clupy.ProtocolError):
                received_by_control(data[len(b"proof"):])
        assert repr(received_by_control(plain)) == repr(sent)              # nan is not itself


exploded = []


class Bomb:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


BOMBS = some.sampled_from([(exploded.append, 1), (os.system, "exit 7"), (exec, "exploded.append(1)"), (Bomb, exploded.append, 1)])
INSTANCES = [b"(S'kind'\n(S'exit 7'\niposix\nsystem\nt.", b"(S'kind'\n(cposix\nsystem\nS'exit 7'\not.", b"\x80\x02(\x82\x01)Rt."]


@rubbish(30)
@hypothesis.given(WORD, BOMBS.map(lambda parts: Bomb(*parts)), PLAIN, some.integers(0, 5), some.integers())
def test_rubbish_that_names_code_never_runs_it(kind, bomb, value, protocol, seed):
    body = pickle.dumps((kind, value, [value, bomb]), protocol)
    with guarded():
        for data in itertools.chain(spoiled(body, seed), INSTANCES):
            with contextlib.suppress(clupy.ProtocolError):
                message = clupy.decode(data)
                assert data != body and "Bomb" not in repr(message)
    assert not exploded


@rubbish(10)
@hypothesis.given(some.sampled_from(b"MCSX"), some.sampled_from(sorted(clupy.ENCRYPTIONS)), some.integers())
def test_rubbish_for_a_preamble_is_refused(role, how, seed):
    good = clupy.preamble(bytes([role]), how)
    near = [good[:at] + bytes([seed % 256]) + good[at + 1:] for at in range(len(good))]
    for data in itertools.chain(near, spoiled(good, seed)):
        data = data[:clupy.PREAMBLE_SIZE].ljust(clupy.PREAMBLE_SIZE, b"\0")
        with contextlib.suppress(clupy.ProtocolError, clupy.VersionMismatch):
            found = clupy.read_preamble(data)
            assert found[0] in b"MCS" and data == clupy.preamble(*found)


DIGITS = some.text("0123456789.e-+_ kmgtsib:[],\u00b2\u0663\0\ud800", max_size=12)
VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.integers(0, 5000).map(lambda n: 10 ** n) | some.floats() | DIGITS
    | WORD | some.fractions() | some.dates() | some.binary(max_size=4) | some.just("9" * 5000),
    lambda more: some.lists(more, max_size=3) | some.dictionaries(WORD, more, max_size=2), max_leaves=4)


@rubbish(40)
@hypothesis.given(VALUES)
def test_rubbish_for_a_setting_is_a_value_of_its_kind_or_refused_in_words(value):
    for key, (_, read, _, _) in clupy.SETTINGS.items():
        try:
            found = read(value)
        except ValueError as error:
            assert re.fullmatch(r"(a|an|on|auto|warn)\b[^']*", str(error)), (key, error)
            continue
        match key:
            case "listen" | "status_port":
                assert clupy.parse_address(clupy.address_text(*found)) == found or not found[0] or ":" in found[0]
            case "master":
                assert all(port is None or port <= 65535 for _, port in found)
            case "slots" | "port" | "max_nested" | "environments_kept" | "max_half_open":
                assert type(found) is int and found >= 0
            case "memory_limit":
                assert found is None or type(found) is int
            case "drain_time" | "sync_interval" | "patience" | "ttl" | "session":
                assert type(found) is float and not math.isnan(found)
            case "output":
                assert type(found) is bool
            case _:
                assert type(found) is str and b"\0" not in os.fsencode(found)


SCALARS = [
    "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!str {a: 1}",
    "2001-99-99", "!!python/object/apply:os.system [exit 7]", "&a [*a]", "*a", "&b {<<: *b}", "0x_", "1:99:99", "=", "? [a]",
    "|\n  text", "{a: 1}", "[a, 2]", "[" * 1200, "9" * 5000, "1e999", ".nan", ".inf", "~", "", "on", '"~\\0/x"', '"\\ud800"',
    "'~nobody/x'", "[./absent.whl]", "[-e .]", "[/]", "['a @ file://[']", "['a @ file:///']", f"[{'a' * 300}/b]",
    '["~\\0/x.whl"]', "['x[y] @ ~']", "['-f \"a']", "['--find-links ~nobody']", "[a, [b]]", "10s", "2GB", "a:b:c", "[1, '2']",
    "\t", "\u0085", "%TAG", "--- a", "..."]
LINES = some.tuples(some.sampled_from([*clupy.SETTINGS, "libraries", "pip_options", "<<", "1", "[a]", "? a", "slots", "a b"]),
                    some.sampled_from(SCALARS) | WORD | DIGITS)


@rubbish(15)
@hypothesis.given(some.lists(LINES, max_size=4), some.integers())
def test_rubbish_in_a_file_of_settings_or_libraries_is_refused_in_words(tmp_path, lines, seed):
    path, text = tmp_path / "rubbish.yaml", "".join(f"{key}: {value}\n" for key, value in lines)
    for data in itertools.islice(spoiled(text.encode(errors="surrogatepass"), seed), VARIANTS // 2):
        path.write_bytes(data)
        for role in "master", "server", "client":
            with contextlib.suppress(clupy.ConfigurationError, clupy.SecretError):
                clupy.find_secret(clupy.read_settings(role, str(path)))
        with contextlib.suppress(clupy.ConfigurationError):
            found = clupy_master.read_dependencies(path)
            assert all(type(text) is str for text in found.libraries + found.pip_options)


# -- handshakes that others had: again, sent back, changed

QUESTIONS = {clupy.TO_MASTER: ("status",), clupy.CONTROL: ("hello", "id", "by hand", ((), ()), {}, True)}


async def overheard(address, role, settings):
    """An honest conversation by turns, who dials first: its last two have a question and its answer."""
    turns, ended = [], asyncio.Event()

    async def relay(reader, writer, side):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if len(turns) % 2 == side:
                    turns.append(b"")
                turns[-1] += data
                writer.write(data)
            writer.close()
            await writer.wait_closed()

    async def between(reader, writer):
        far = await asyncio.open_connection(*address)
        await asyncio.gather(relay(reader, far[1], 0), relay(far[0], writer, 1))
        ended.set()

    async with await asyncio.start_server(between, "127.0.0.1", 0) as server:
        connection = await clupy.dial(server.sockets[0].getsockname(), role, SECRET.encode(), settings)
        connection.send(*QUESTIONS[role])
        await connection.receive()
        connection.close()
        await asyncio.wait_for(ended.wait(), PATIENCE)
    return turns


def turned(turn, heard, how, luck):
    """What is said instead of a turn of an honest conversation, after something was heard."""
    if how == "again":
        return turn
    if how == "sent back":
        return heard[-len(turn):].ljust(len(turn), b"\0")
    if how == "version 2":
        return turn.replace(clupy.MAGIC + bytes([clupy.VERSION]), clupy.MAGIC + bytes([clupy.VERSION + 1]))
    if how == "changed":
        at = luck.randrange(len(turn))
        return turn[:at] + bytes([turn[at] ^ 1 << luck.randrange(8)]) + turn[at + 1:]
    return {"rubbish": luck.randbytes(len(turn)), "shorter": turn[:luck.randrange(len(turn))]}[how]


WAYS = some.lists(some.sampled_from(["again", "again", "again", "sent back", "version 2", "changed", "rubbish", "shorter"]),
                  min_size=10, max_size=10)


def attack(address, turns, ways, luck):
    """What is answered to the last turn, or to the end of one that is too short."""
    with socket.create_connection(address, timeout=PATIENCE) as sock:
        heard = b""
        for turn, answer, way in zip(turns[::2], turns[1::2], ways):
            said = turned(turn, heard, way, luck)
            try:
                sock.sendall(said)
                if len(said) < len(turn) or turn is turns[-2]:
                    sock.shutdown(socket.SHUT_WR)
                    return sock.recv(len(answer), socket.MSG_WAITALL)
                heard = sock.recv(len(answer), socket.MSG_WAITALL)
            except OSError as error:
                assert error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)      # it has had enough
                return b""


def answer_as_to_others(listener, turns, ways, luck):
    """Answer who dials with what others were answered."""
    with listener.accept()[0] as sock, contextlib.suppress(ConnectionError):
        for turn, answer, way in zip(turns[::2], turns[1::2], ways):
            heard = sock.recv(len(turn), socket.MSG_WAITALL)
            sock.sendall(turned(answer, heard, way, luck))
            if way == "shorter" or not heard:
                return


def resident(program):
    """Bytes that a program has in memory, and how many descriptors."""
    with open(f"/proc/{program.process.pid}/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE, len(os.listdir(f"/proc/{program.process.pid}/fd"))


@pytest.mark.parametrize("encryption", ["off", "on"])
def test_rubbish_in_a_handshake_opens_nothing_and_costs_nothing(tmp_path, encryption):
    if encryption == "on" and not clupy.has_keys():
        pytest.skip("from Python 3.13 on")

    @rubbish(25)
    @hypothesis.given(some.sampled_from([clupy.TO_MASTER, clupy.CONTROL]), some.sampled_from([0, 0, 0, 1]), WAYS, some.integers())
    def strangers(role, wrong, ways, seed):
        address = addresses[(role == clupy.CONTROL) ^ wrong]
        assert attack(address, turns[role], ways, random.Random(seed)) == b""

    @rubbish(10)
    @hypothesis.given(WAYS, some.integers())
    def impostors(ways, seed):
        answered = pool.submit(answer_as_to_others, listener, turns[clupy.TO_MASTER], ways, random.Random(seed))
        with pytest.raises((clupy.ClupyError, OSError)):
            asyncio.run(clupy.dial(listener.getsockname(), clupy.TO_MASTER, SECRET.encode(), settings))
        answered.result(PATIENCE)

    @rubbish(5)
    @hypothesis.given(some.integers())
    def heads(seed):
        for data in spoiled(head, seed):                   # the right one, too: its number was used
            heard = attack(addresses[1], [data, bytes(clupy.PREAMBLE_SIZE + 1)], ["again"], None)
            assert len(heard) <= clupy.PREAMBLE_SIZE or data[:clupy.PREAMBLE_SIZE] != head[:clupy.PREAMBLE_SIZE]

    async def slots():
        nonlocal head
        control = await clupy.dial(addresses[1], clupy.CONTROL, SECRET.encode(), settings)
        with contextlib.closing(control):
            control.send(*QUESTIONS[clupy.CONTROL])
            _, session, *_ = await control.receive()
            head = clupy.preamble(clupy.SLOT, control.how) + clupy.slot_head(control.key, control.how, session, 7, False)
            attack(addresses[1], [head, b"any"], ["again"], None)
            await asyncio.to_thread(heads)

    head = None
    with Cluster(tmp_path, CLUPY_ENCRYPTION=encryption) as cluster, socket.create_server(("127.0.0.1", 0)) as listener, (
            concurrent.futures.ThreadPoolExecutor(1)) as pool:
        settings = clupy.read_settings("client", master=cluster.address, encryption=encryption)
        row, = tables_of(cluster.address, encryption=encryption)["servers"].values()
        addresses = [("127.0.0.1", int(address.split(":")[1])) for address in (cluster.address, row["address"])]
        turns = {role: asyncio.run(overheard(address, role, settings)) for role, address in zip(QUESTIONS, addresses)}
        before = [resident(program) for program in (cluster.master, cluster.servers[0])]
        strangers()
        impostors()
        asyncio.run(slots())
        clupy.connect(cluster.address, encryption=encryption)
        assert call(square, 3) == 9
        clupy.close()
        for program, (memory, descriptors) in zip((cluster.master, cluster.servers[0]), before):
            until(lambda: resident(program)[1] <= descriptors + 30)        # and those of two workers
            assert resident(program)[0] < memory + (20 << 20) and "Traceback" not in program.log


# ==== What is told and shipped: examples, README, packages ======================

def test_a_picture_is_calculated_in_bands_and_is_a_png(tmp_path):
    assert "48 x 38 pixels" in run_script(tmp_path, example("mandelbrot"), args=("set.png", "48")).stdout
    data = (tmp_path / "set.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and struct.unpack(">II", data[16:24]) == (48, 38)
    length, = struct.unpack(">I", data[33:37])
    assert data[37:41] == b"IDAT" and len(zlib.decompress(data[41:41 + length])) == 38 * 49


def test_words_of_files_are_counted_and_a_file_that_is_none_is_an_error(tmp_path):
    (tmp_path / "one").write_text("a rose is a rose")
    (tmp_path / "two").write_text("Rose: \u00fcber \u00dcBER")
    lines = run_script(tmp_path, example("word_count"), args=("one", "two")).stdout.splitlines()
    assert set(lines[:2]) == {"one: 5 words", "two: 3 words"} and lines[2] == "     3 rose" and "     2 \u00fcber" in lines
    assert "absent" in run_script(tmp_path, example("word_count"), args=("one", "absent"), check=False).stderr


def test_a_search_finds_the_best_parameters(tmp_path):
    pytest.importorskip("sklearn")
    lines = run_script(tmp_path, example("parameter_search"), timeout=120).stdout.splitlines()
    assert len(lines) == 6 and lines[0].endswith("with gamma=0.001, C=10") and lines == sorted(lines, reverse=True)


def test_a_web_service_awaits_calls(tmp_path):
    pytest.importorskip("aiohttp")

    def ask(path):
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(address + path, timeout=PATIENCE) as answer:
            return json.load(answer)
    with Program(tmp_path, os.path.join(HERE, "examples", "web_service.py"), 0) as program:
        line = until(lambda: re.search("http:.*", program.out.read_text()))
        address = line[0]
        with concurrent.futures.ThreadPoolExecutor() as threads:
            found = list(threads.map(lambda n: ask(f"/factors?n={n}"), range(2, 30)))
        assert [math.prod(answer["factors"]) for answer in found] == list(range(2, 30)) and ask("/factors?n=many") is None
        program.process.send_signal(signal.SIGINT)
        assert program.process.wait(PATIENCE) == 0 and not program.log


def readme(*languages):
    """The README's code blocks of these languages."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", file.read(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} <= {"python", "yaml", "sh", "console"}, "a block that no test runs"
    return [textwrap.dedent(text) for language, text in blocks if language in languages]


# What the README's blocks take for granted: names, and others who wait at the barrier and publish on the topic.
GIVEN = """
import asyncio, clupy, contextlib, joblib, logging, threading, time
f, x, items, log, anything, value, large_array = abs, -3, [1, -2], logging.warning, {"any": "thing"}, 1, bytes(100_000)
futures = [clupy.parallel(f)(x)]
class frame:
    to_csv = staticmethod(lambda file: file.write("a,b"))
def publish():
    with contextlib.suppress(clupy.ClupyError):
        while True:
            clupy.publish("topic", value)
            time.sleep(0.05)
"""
WITH_SERVICES = """
for _ in range(7):
    threading.Thread(target=clupy.barrier, args=("step", 8), daemon=True).start()
threading.Thread(target=publish, daemon=True).start()
"""


def test_the_readme_s_python_runs_as_it_stands(redis, zookeeper, tmp_path, cluster):
    mine = {name: value for name, value in os.environ.items() if name.startswith("CLUPY_")}
    for number, text in enumerate(readme("python")):
        if '__name__ == "__main__"' in text:       # a program of its own, with what it prints
            printed = re.search(r"print\(.*# (.*)", text)[1]
            assert run_script(tmp_path / str(number), text).stdout.strip() == printed
        else:
            body = textwrap.indent(text.replace("host:7878", cluster.address), "    ")
            program = f"{GIVEN}{WITH_SERVICES * ('barrier' in text)}async def main():\n{body}\nasyncio.run(main())\nclupy.close()"
            run_script(tmp_path / str(number), program, **mine, CLUPY_MASTER=cluster.address)


def test_the_readme_s_yaml_is_what_its_readers_take(tmp_path):
    for text in readme("yaml"):
        (tmp_path / "my_own_package").mkdir(exist_ok=True)
        (tmp_path / "file.yaml").write_text(text)
        if "libraries" in text:
            assert clupy_master.read_dependencies(str(tmp_path / "file.yaml")).libraries
        else:
            clupy.read_settings("client", str(tmp_path / "file.yaml"))


def test_the_readme_s_commands_are_there_with_their_options(tmp_path, monkeypatch):
    with open(os.path.join(HERE, "Makefile")) as file:
        targets = re.findall(r"^([a-z-]+):.*##", file.read(), re.MULTILINE)
    ran = []
    for name in "_run_master", "_run_server", "_show_status", "_show_libraries", "_check":
        monkeypatch.setattr(clupy, name, lambda settings, arguments: ran.append(arguments.command))
    for line in "".join(readme("sh", "console")).splitlines():
        command = line.partition("#")[0].removeprefix("$ ").split()
        while command and "=" in command[0]:
            assert command.pop(0).partition("=")[0].removeprefix("CLUPY_").lower() in clupy.SETTINGS, line
        match command:
            case ["make", target]:
                assert target in targets, line
            case ["python", "-m", "clupy", *arguments]:
                assert clupy.main(arguments) == 0, line
            case ["python", "your_program.py"] | []:
                pass
            case _:
                pytest.fail(f"who checks this line? {line}")
    assert {"master", "serve", "status", "libraries", "check"} <= set(ran)


def test_the_typed_example_runs_as_it_is_typed(tmp_path):
    with open(os.path.join(HERE, "examples", "typed.py")) as file:
        assert run_script(tmp_path, file.read(), CLUPY_SLOTS=2).stdout == "1.5 1 [1] {'slots': 2}\n"


def test_every_file_that_the_readme_names_is_there():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    for name in re.findall(r"\]\((?!http)(.*?)\)", text):
        heading = re.compile(f"^## {name[1:]}$", re.I | re.M)
        assert heading.search(text) if name[0] == "#" else os.path.exists(os.path.join(HERE, name)), name
    assert os.path.getsize(os.path.join(HERE, "examples", "timeline.svg")) <= 100_000


def test_what_make_dist_builds_is_whole_and_works_in_a_fresh_environment(tmp_path):
    pytest.importorskip("build")
    if int(clupy_master.installed("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is too old to build it")
    tree, fresh = tmp_path / "tree", tmp_path / "fresh"
    shutil.copytree(HERE, tree, ignore=lambda _, names: [name for name in names if name in ("dist", "build", ".git") or
                                                         name.startswith((".venv", "__pycache__", ".ruff", ".pytest"))])
    before = set(tree.rglob("*"))
    done = subprocess.run(["make", "-s", "-o", f"{sys.prefix}/test", "dist", f"VENV={sys.prefix}"], cwd=tree, text=True,
                          capture_output=True, timeout=120, env=environ(PYTHONPATH=""))
    assert (done.returncode, done.stdout.split()) == (0, ["dist/clupy-0.1.0-py3-none-any.whl", "dist/clupy-0.1.0.tar.gz"]), done
    assert {path.relative_to(tree).parts[0] for path in set(tree.rglob("*")) - before} == {"dist"} and not done.stderr
    with tarfile.open(tree / "dist" / "clupy-0.1.0.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"test_clupy.py", "CHANGELOG.md", "LICENSE", "Makefile", ".ci/services", "examples/timeline.svg"} <= names
    assert not [name for name in names if "__pycache__" in name]

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh], check=True)
    site = next((fresh / "lib").glob("python*/site-packages"))
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--python", fresh / "bin" / "python",
                    "install", "--no-index", "--no-deps", "--ignore-installed", *(tree / "dist").glob("*.whl")], check=True)
    (tmp_path / "program.py").write_text("import clupy\nprint(clupy.__file__, clupy.parallel(abs)(-3).result(30))")
    for command, words in (("clupy", "--version"), f"clupy {clupy.__version__}"), (
            ("python", "program.py"), f"{site / 'clupy.py'} 3"):
        done = subprocess.run([fresh / "bin" / command[0], command[1]], cwd=tmp_path, env=environ(PYTHONPATH=""), text=True,
                              capture_output=True, timeout=PATIENCE)
        assert (done.stdout.strip(), done.stderr) == (words, "")


def test_elsewhere_than_on_linux_and_macos_the_import_says_so_in_a_line(tmp_path):
    done = run_script(tmp_path, "import sys\nsys.platform = 'win32'\nimport clupy", check=False)
    assert done.stderr.splitlines()[-1] == "ImportError: CluPy supports only Linux and macOS, not win32; on Windows, use WSL"
