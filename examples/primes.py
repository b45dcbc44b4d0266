"""The seed of CluPy: a hundred calls, and both ways to take their results.

    python examples/primes.py

Without a cluster it runs on the cores of this machine; with one (see the README) on all of its servers, unchanged."""

import os
import time
from collections import Counter

import clupy


def primes(n):
    """The prime divisors of n other than n, and the worker that found them."""
    divisors = [d for d in range(2, n // 2 + 1) if n % d == 0]
    return [d for d in divisors if all(d % od != 0 for od in divisors if od != d)], os.getpid()


if __name__ == "__main__":
    cluster = clupy.connect()                   # optional: the first call does it; here to know what there is

    # 1. Wait for all, then look at each.
    begun = time.monotonic()
    results = [clupy.parallel(primes, max=10)(n) for n in range(100, 200)]
    if not clupy.wait_all(results, time_out=30):
        raise SystemExit("not all calls were done within 30 s")
    seconds = time.monotonic() - begun
    for n, r in zip(range(100, 200), results):
        if not r.successful:
            print(n, "failed:", r.failure)
        elif n >= 195:
            print(n, *r.value[0])

    # 2. Say what is to happen with each, then wait until it has; larger numbers, so that there is work for all workers.
    workers = Counter()
    more = [clupy.parallel(primes, max=10)(n) for n in range(100_000, 100_100)]
    for r in more:
        r.succeed(lambda value: workers.update([value[1]])).fail(lambda error: print("failed:", error))
    clupy.wait_all(more, time_out=30)
    print(f"{sum(workers.values())} larger ones ran in {len(workers)} worker processes: {dict(workers)}")
    print(f"{len(results)} calls on {cluster}, {seconds:.1f} s")
