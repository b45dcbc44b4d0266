"""What a cluster holds after a million calls: a master, two servers and clients on this machine, measured after each tenth.

    python examples/soak.py --calls 1000000

Every 10 s a worker is killed; every minute another client with libraries of its own comes and goes, and those of the master's
list change; Refs are shared and dropped.  The first tenth is the warm-up: if after that memory grows by 5 % or more, or
descriptors, copies of Refs or temporary files at all, that is a failure.  It needs Linux, and pip, but no network."""

import argparse
import concurrent.futures
import contextlib
import ctypes
import gc
import importlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

import clupy

SLOTS = 6                                         # of both servers
ROUND = 2000                                      # calls that are made at once
KILL_TIME, VISIT_TIME = 10.0, 60.0                # between kills of workers, and between visits of other clients
REST_TIME = clupy.IDLE_MEMORY_TIME + 5            # after which nothing is held that is not needed
PATIENCE = 300.0
GROWTH = 1.05                                     # of memory, which is a failure
NAMES = "master", "first server", "second server", "client"
TABLE = "{:>8} {:>7} {:>6} {:>6}  {:>27}  {:>15} {:>6} {:>5}"
workers = set()                                   # pids of those that ran calls of this round


# ---- Calls, and how their outcomes are looked at

def version(role):
    return importlib.import_module(f"{role}s_library").version


def work(number):
    time.sleep(0.002)
    return number * number, os.getpid(), version("master")


def nested(number):
    return clupy.parallel(work)(number).result()[0]


def results(calls):
    if not clupy.wait_all(calls, PATIENCE):
        raise SystemExit(f"{sum(not call.done() for call in calls)} calls have no outcome after {PATIENCE:g} s")
    return [call.result() for call in calls]


def one_round(visits):
    """ROUND calls, and a few of every other kind."""
    many = results([clupy.parallel(work)(n) for n in range(ROUND)])
    assert [square for square, *_ in many] == [n * n for n in range(ROUND)]
    assert {found for *_, found in many} <= {visits, visits + 1, visits + 2}           # of the list before, or of this one
    workers.clear()
    workers.update(pid for _, pid, _ in many)
    for _ in range(6):                            # what is remembered of the functions of 256 is full before the warm-up ends
        assert list(clupy.map(abs, range(-300, 0))) == list(range(300, 0, -1))
    assert results([clupy.parallel(nested)(n) for n in range(5)]) == [0, 1, 4, 9, 16]
    data = os.urandom(1 << 20)
    ref = clupy.share(data)
    assert results([clupy.parallel(len)(ref) for _ in range(5)]) == [len(data)] * 5
    assert results([clupy.parallel(bytes)(data)]) == [data]
    assert type(clupy.parallel(divmod)(1, 0).exception(PATIENCE)) is ZeroDivisionError
    assert clupy.parallel(time.sleep)(600).cancel()
    assert type(clupy.parallel(time.sleep, timeout=0.1)(600).exception(PATIENCE)) is clupy.CallTimeout
    results([clupy.parallel(print)("x" * 10_000)])


def ask_for(role, folder, number):
    """Ask for another version of the role's library, by a list in a folder that is the working directory of master or client."""
    wheel, info = f"{role}s_library-{number}-py3-none-any.whl", f"{role}s_library-{number}.dist-info"
    with zipfile.ZipFile(f"{folder}/{wheel}", "w") as file:
        file.writestr(f"{role}s_library.py", f"version = {number}")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {role}s_library\nVersion: {number}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{role}s_library.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    with open(f"{folder}/new", "w") as file:
        file.write(f"libraries: [./{wheel}]\npip_options: [--no-index]\n")
    os.rename(f"{folder}/new", f"{folder}/clupy.{role}.dependency.yaml")       # at one stroke, since it is read at any time


def visit(number):
    """Be another client, from its first call to its end."""
    ask_for("client", ".", number)
    assert results([clupy.parallel(version)("client") for _ in range(50)]) == [number] * 50
    ref = clupy.share(bytes(1 << 20))
    assert results([clupy.parallel(len)(ref) for _ in range(50)]) == [1 << 20] * 50
    print(clupy._engine.id)


# ---- What is held

def content(path):
    """What a small file holds; nothing if it is gone."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def entries(folder):
    """How many files and folders are below it, without those few that are there to be locked."""
    return sum(not name.endswith(".lock") for _, folders, files in os.walk(folder) for name in folders + files)


def memory(pid):
    """MB that are the process's own: without files, whose pages all processes of this machine share."""
    sizes = dict(re.findall(rb"(Rss\w+):\s+(\d+)", content(f"/proc/{pid}/status")))
    return (int(sizes[b"RssAnon"]) + int(sizes[b"RssShmem"])) / 1024


class Soak:
    """A cluster in a folder of its own, which has all its temporary files, and what happens to it."""

    def __init__(self, folder, stack):
        self.folder, self.clients, self.kills, self.visits = folder, [], 0, 0
        self.calm, self.begun = threading.Lock(), time.monotonic()
        for name in "environments", "tmp", "client", "visitor":
            os.mkdir(f"{folder}/{name}")
        tempfile.tempdir = f"{folder}/tmp"
        with socket.create_server(("127.0.0.1", 0)) as sock:
            address = "127.0.0.1:{1}".format(*sock.getsockname())
        os.environ.update(TMPDIR=tempfile.tempdir, CLUPY_SECRET=os.urandom(16).hex(), CLUPY_MASTER=address, CLUPY_OUTPUT="off",
                          CLUPY_SYNC_INTERVAL="5", CLUPY_ENVIRONMENTS_DIR=f"{folder}/environments", CLUPY_ENVIRONMENTS_KEPT="3")
        ask_for("master", folder, 1)
        self.log = stack.enter_context(open(f"{folder}/log", "ab"))
        self.processes = [self.start("master", "--listen", address)]
        stack.callback(self.end)
        for _ in range(2):
            self.processes.append(self.start("serve", "--listen", "127.0.0.1:0", "--slots", str(SLOTS // 2)))
        os.chdir(f"{folder}/client")

    def start(self, *arguments):
        return subprocess.Popen([sys.executable, "-m", "clupy", *arguments], stderr=self.log, cwd=self.folder)

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(PATIENCE)

    def disturb(self, ended):
        """Kills, visits and changes of libraries, in a thread of its own."""
        next_visit = time.monotonic() + KILL_TIME
        while not ended.wait(KILL_TIME):
            with self.calm:
                alive = [pid for pid in list(workers) if b"clupy_server" in content(f"/proc/{pid}/cmdline")]
                if alive:
                    os.kill(random.choice(alive), signal.SIGKILL)
                    self.kills += 1
                if time.monotonic() > next_visit:
                    next_visit += VISIT_TIME
                    self.visits += 1
                    done = subprocess.run([sys.executable, __file__, "--visit", str(self.visits)], check=True,
                                          cwd=f"{self.folder}/visitor", stdout=subprocess.PIPE, text=True, timeout=PATIENCE)
                    self.clients.append(done.stdout.strip())
                    ask_for("master", self.folder, 1 + self.visits)

    def held(self):
        """(MB of each process, descriptors of each, copies of Refs, temporary files), after a rest; with a line of the table."""
        with self.calm:
            deadline, ready = time.monotonic() + PATIENCE, False
            while not ready and time.monotonic() < deadline:               # every slot open, with the newest libraries
                places = {tuple(place) for _, *place in results([clupy.parallel(work)(n) for n in range(ROUND)])}
                ready = len(places) == SLOTS and {found for _, found in places} == {1 + self.visits}
            time.sleep(REST_TIME)
            gc.collect()
            with contextlib.suppress(AttributeError):                      # not glibc
                ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of freed memory, some MB, comes and goes
            pids = [*(process.pid for process in self.processes), os.getpid()]
            copies = [os.path.join(folder, id) for folder in clupy._ref_folders() for id in (*self.clients, clupy._engine.id)]
            return ([memory(pid) for pid in pids], [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids],
                    sum(map(entries, copies)), entries(tempfile.tempdir))

    def line(self, calls, held):
        return TABLE.format(calls, f"{time.monotonic() - self.begun:.0f}", self.kills, self.visits,
                            " ".join(f"{size:6.1f}" for size in held[0]), " ".join(f"{count:3}" for count in held[1]), *held[2:])


def soak(calls):
    """What grew that must not, as words; the table goes to the terminal."""
    with contextlib.ExitStack() as stack:
        it = Soak(stack.enter_context(tempfile.TemporaryDirectory(prefix="clupy-soak-")), stack)
        stack.callback(clupy.close)
        thread, ended = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1)), threading.Event()
        stack.callback(ended.set)
        disturbed = thread.submit(it.disturb, ended)
        print(TABLE.format("calls", "seconds", "killed", "visits", "MB: master, servers, client",
                           "descriptors", "copies", "files"))
        rows, made = [], 0
        while made < calls:
            one_round(it.visits)
            made += ROUND
            if disturbed.done():
                disturbed.result()
            if made >= (len(rows) + 1) * calls / 10:
                rows.append(it.held())
                print(it.line(made, rows[-1]), flush=True)
    return grown(rows[:3], rows[-3:])


def grown(warm, last):
    """What grew, in words.  The least of three rows counts: what malloc keeps of freed memory comes on top of what is held."""
    (memory, descriptors, *counts), (memory_now, descriptors_now, *counts_now) = map(least, (warm, last))
    return [f"memory of the {name}" for name, before, now in zip(NAMES, memory, memory_now) if now >= GROWTH * before] + [
        f"descriptors of the {name}" for name, before, now in zip(NAMES, descriptors, descriptors_now) if now > before] + [
        what for what, before, now in zip(("copies of Refs", "temporary files"), counts, counts_now) if now > before]


def least(rows):
    """A row that has the least of each column."""
    memory, descriptors, *counts = zip(*rows)
    return [*map(min, zip(*memory))], [*map(min, zip(*descriptors))], *map(min, counts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--visit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.visit:
        return visit(options.visit)
    if faults := soak(options.calls):
        sys.exit(f"more than after the warm-up: {', '.join(faults)}")
    print("nothing grew")


if __name__ == "__main__":
    main()
