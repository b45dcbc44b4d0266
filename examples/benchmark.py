"""CluPy beside process pools and other engines: the same calls, two workers each, on this machine.

    python examples/benchmark.py                        three rounds, about three minutes
    python examples/benchmark.py --quick                one round of fewer calls, about 20 seconds
    python examples/benchmark.py --peers clupy,loky,dask,ray     these peers: `pip install '.[bench]'` installs them
    python examples/benchmark.py --rows trip,mix        these rows alone: whose name has one of the words

Needs numpy, beside CluPy.  Another engine becomes a column by one more class in "The peers".

Each figure is taken in a fresh process, so that nothing is left of another row or peer, after some calls to
warm it up.  In every round the peers take turns, row by row; printed is the median of the rounds.  The last
columns say how many times as good CluPy is: above 1 it is the better one, whether more or less is better."""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import timeit
from typing import Callable, NamedTuple

WORKERS = 2
ROUNDS = 3
LARGE = 64 << 20            # bytes of an array
LIMIT = 60                  # seconds for one figure, warm-up included


# ==== The peers ==============================================================
# call = peer.function(f) is what users write once, call(*args) what they write often; peer.result() waits for
# the outcome of such a call.  `script` is a whole program that prints one result.

class CluPy:
    """Connects to a master if one answers on localhost, and is an embedded cluster otherwise."""
    title = "CluPy"
    script = (f"import clupy; clupy.connect(slots={WORKERS}); "
              "print(clupy.parallel(abs)(-1).result(), flush=True)")

    def __init__(self):
        import clupy
        clupy.connect(slots=WORKERS)
        self.function, self.map, self.close = clupy.parallel, clupy.map, clupy.close

    def result(self, call):
        return call.result()


class Executor:
    title = "ProcessPoolExecutor"
    script = (f"from concurrent.futures import ProcessPoolExecutor; pool = ProcessPoolExecutor({WORKERS}); "
              "print(pool.submit(abs, -1).result(), flush=True)")

    def __init__(self):
        self._pool = concurrent.futures.ProcessPoolExecutor(WORKERS)

    def function(self, f):
        return functools.partial(self._pool.submit, f)

    def result(self, call):
        return call.result()

    def map(self, f, items):
        return self._pool.map(f, items, chunksize=1000)

    def close(self):
        self._pool.shutdown(cancel_futures=True)


class Pool:
    title = "multiprocessing.Pool"
    script = (f"import multiprocessing; pool = multiprocessing.Pool({WORKERS}); "
              "print(pool.apply_async(abs, (-1,)).get(), flush=True)")

    def __init__(self):
        self._pool = multiprocessing.Pool(WORKERS)

    def function(self, f):
        return lambda *args: self._pool.apply_async(f, args)

    def result(self, call):
        return call.get()

    def map(self, f, items):
        return self._pool.map(f, items)

    def close(self):
        self._pool.terminate()


class Loky(Executor):
    """Its executor for calls, joblib's loop for items."""
    title = "joblib, loky"
    script = (f"from joblib.externals.loky import get_reusable_executor; pool = get_reusable_executor({WORKERS}); "
              "print(pool.submit(abs, -1).result(), flush=True)")

    def __init__(self):
        from joblib.executor import get_memmapping_executor
        self._pool = get_memmapping_executor(WORKERS)

    def map(self, f, items):
        import joblib
        return joblib.Parallel(n_jobs=WORKERS)(joblib.delayed(f)(item) for item in items)

    def close(self):
        self._pool.terminate(kill_workers=True)


class Dask:
    title = "Dask"
    script = (f"from distributed import Client\nif __name__ == '__main__':\n    client = Client(n_workers={WORKERS}, "
              "threads_per_worker=1, dashboard_address=None)\n    print(client.submit(abs, -1).result(), flush=True)")

    def __init__(self):
        from distributed import Client
        self._client = Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None)
        self.close = self._client.shutdown

    def function(self, f):
        return functools.partial(self._client.submit, f, pure=False)

    def result(self, call):
        return call.result()

    def map(self, f, items):
        return self._client.gather(self._client.map(f, items, pure=False))


class Ray:
    title = "Ray"
    script = (f"import ray; ray.init(num_cpus={WORKERS}, include_dashboard=False, log_to_driver=False); "
              "print(ray.get(ray.remote(lambda: 1).remote()), flush=True)")        # it takes no builtin

    def __init__(self):
        import ray
        ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
        self.result, self.close = ray.get, ray.shutdown

    def function(self, f):
        import ray
        return ray.remote(f).remote

    def map(self, f, items):
        return self.result([call(item) for call in [self.function(f)] for item in items])


PEERS = {"clupy": CluPy, "executor": Executor, "pool": Pool, "loky": Loky, "dask": Dask, "ray": Ray}


# ==== What is called =========================================================

def nothing():
    pass


def same(item):
    return item


def spin(turns):
    """Pure Python that holds its core."""
    total = 0
    for i in range(turns):
        total += i * i
    return total


def take(array):
    return array.nbytes


def give(size):
    import numpy
    return numpy.ones(size, numpy.uint8)


# ==== The measurements =======================================================
# Each takes a peer that is warm and returns a number, the unit of which is in ROWS.

def elapsed(peer, calls):
    """Seconds from the first submit to the last result; `calls` are functions that make a call each."""
    begin = time.perf_counter()
    for pending in [call() for call in calls]:
        peer.result(pending)
    return time.perf_counter() - begin


def one_by_one(peer, count):
    """Calls per second: all submitted in a loop, then all results taken."""
    call = peer.function(nothing)
    return count / statistics.median(elapsed(peer, [call] * count) for _ in range(max(1, 10_000 // count)))


def items(peer, count):
    """Items per second through the peer's own map."""
    begin = time.perf_counter()
    assert sum(1 for _ in peer.map(same, range(count))) == count
    return count / (time.perf_counter() - begin)


def round_trip(peer, count):
    """Microseconds from a call to its result, while nothing else is under way."""
    call = peer.function(nothing)
    return 1e6 * statistics.median(elapsed(peer, [call]) for _ in range(count))


def argument(peer, count):
    """GB/s into a worker, 64 MiB in one call after the other."""
    import numpy
    return rate(peer, functools.partial(peer.function(take), numpy.ones(LARGE, numpy.uint8)), count)


def result(peer, count):
    """GB/s out of a worker, 64 MiB from one call after the other."""
    return rate(peer, functools.partial(peer.function(give), LARGE), count)


def rate(peer, call, count):
    return LARGE / statistics.median(elapsed(peer, [call]) for _ in range(count)) / 1e9


def speed_up(peer, count):
    """How many times as fast as this process alone, with calls of 50 ms of pure Python."""
    turns = round(0.05 * 100_000 / min(timeit.repeat(lambda: spin(100_000), number=1, repeat=10)))
    return count * 0.05 / elapsed(peer, [functools.partial(peer.function(spin), turns)] * count)


def mix(peer, count):
    """Time taken, as a multiple of all work spread evenly: every 20th call lasts 500 ms, the others 2 ms."""
    seconds = [0.002 if i % 20 else 0.5 for i in range(count)]
    call = peer.function(time.sleep)
    return elapsed(peer, [functools.partial(call, s) for s in seconds]) / (sum(seconds) / WORKERS)


def first_result(peer, count):
    """Seconds from the start of a script's interpreter to its first result."""
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", peer.script], stdout=subprocess.PIPE) as script:
        script.stdout.readline()
        return time.perf_counter() - begin


def memory(peer, count):
    """KB by which this process grows for each call that waits while the workers sleep."""
    sleep, call = peer.function(time.sleep), peer.function(nothing)
    kept = [sleep(2) for _ in range(WORKERS)]
    before = resident()
    kept += [call() for _ in range(count)]
    time.sleep(0.5)                        # for threads that do something about each call
    return (resident() - before) / count / 1000


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Row(NamedTuple):
    title: str
    unit: str
    measure: Callable
    count: int
    quick: int                  # count with --quick; 0: not then
    more_is_better: bool = True


ROWS = [
    Row("one by one, 1,000 calls", "calls/s", one_by_one, 1_000, 1_000),
    Row("one by one, 10,000 calls", "calls/s", one_by_one, 10_000, 10_000),
    Row("one by one, 100,000 calls", "calls/s", one_by_one, 100_000, 0),
    Row("map, 20,000 items", "items/s", items, 20_000, 20_000),
    Row("map, 1,000,000 items", "items/s", items, 1_000_000, 0),
    Row("round trip", "us", round_trip, 3_000, 1_000, False),
    Row("64 MiB arguments", "GB/s", argument, 8, 6),
    Row("64 MiB results", "GB/s", result, 8, 6),
    Row("50 ms of pure Python, speed-up", "x", speed_up, 64, 16),
    Row("500 ms among 2 ms, of ideal", "x", mix, 200, 40, False),
    Row("first result of a script", "s", first_result, 1, 1, False),
    Row("memory per pending call", "KB", memory, 20_000, 20_000, False),
]


# ==== Rounds and table =======================================================

def measure_here(peer_name, row, count):
    """One figure, in this process."""
    peer = PEERS[peer_name]()
    call = peer.function(nothing)
    for _ in range(5):
        elapsed(peer, [call] * 100)
    figure = row.measure(peer, count)
    peer.close()
    return figure


def measure(peer_name, row, count):
    """One figure, in a process of its own; NaN if that takes longer than LIMIT."""
    command = [sys.executable, __file__, "--here", peer_name, str(ROWS.index(row)), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            return float(process.communicate(timeout=LIMIT)[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)             # its workers, too
            return math.nan


def rounds(peers, rows, quick):
    """{(peer, row): median figure, or NaN: over LIMIT}; each row is measured with one peer after the other."""
    count = 1 if quick else ROUNDS
    figures = {(peer, row): [] for row in rows for peer in peers}
    for number in range(1, count + 1):
        for peer, row in figures:
            show(f"round {number} of {count}: {row.title}, {PEERS[peer].title}")
            if not any(map(math.isnan, figures[peer, row])):
                figures[peer, row].append(measure(peer, row, row.quick if quick else row.count))
    show("")
    return {key: math.nan if math.isnan(values[-1]) else statistics.median(values) for key, values in figures.items()}


def show(text):
    """On the terminal's current line, if there is one."""
    if sys.stderr.isatty():
        print(text.ljust(78), end="\r", file=sys.stderr, flush=True)


def table(figures, peers, rows):
    """The lines of the table: a row for each measurement, a column for each peer, then CluPy's ratios."""
    others = [peer for peer in peers if peer != "clupy"] if "clupy" in peers else []
    yield "".join([" " * 39, *(f"{PEERS[peer].title:>21}" for peer in peers),
                   *(f"{'to ' + peer:>13}" for peer in others)])
    for row in rows:
        ratios = [figures["clupy", row] / figures[peer, row] for peer in others]
        yield "".join([f"{row.title:<31}{row.unit:>8}",
                       *(f"{number(figures[peer, row]):>21}" for peer in peers),
                       *("-".rjust(13) if math.isnan(ratio) else f"{ratio if row.more_is_better else 1 / ratio:>11.2f} x"
                         for ratio in ratios)])


def number(value):
    if math.isnan(value):
        return f"over {LIMIT} s"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, fewer calls")
    parser.add_argument("--peers", default="clupy,executor,pool", help=f"some of {','.join(PEERS)}")
    parser.add_argument("--rows", default="", help="words, with commas: rows whose name has one of them")
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        peer, row, count = options.here
        print(measure_here(peer, ROWS[int(row)], int(count)))
        return
    peers, words = options.peers.split(","), options.rows.split(",")
    if unknown := set(peers) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    rows = [row for row in ROWS if any(word in row.title for word in words)]
    if options.quick:
        rows = [row for row in rows if row.quick]
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {WORKERS} workers for each peer")
    for line in table(rounds(peers, rows, options.quick), peers, rows):
        print(line)


if __name__ == "__main__":
    main()
