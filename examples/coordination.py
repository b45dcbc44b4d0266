"""Calls that wait for each other: a lock, a barrier, an election.

    redis-server &  zkServer start          # or the addresses of yours in CLUPY_REDIS and CLUPY_ZOOKEEPER
    python examples/coordination.py         # on a cluster with three slots at least, or on this machine alone

Calls that meet at a barrier must run at the same time: so many slots there must be."""

import uuid

import clupy


def deposit(amount):
    """Read, change, write: safe, for only one holder of the lock is in between on any computer."""
    with clupy.lock("account", timeout=60) as held:
        clupy.put("balance", clupy.get("balance") + amount)
        held.check()        # LockLost, should this process have slept past its ZooKeeper session


def simulate(run, part, parts, steps):
    """Each step begins when all parts have ended the one before.  run: a name that no other run of this program has."""
    for step in range(steps):
        clupy.put(f"state/{part}", step * part)
        clupy.barrier(run, parts, timeout=60)          # all have written
        total = sum(clupy.get(f"state/{other}") for other in range(parts))
        clupy.barrier(run, parts, timeout=60)          # all have read
    return total


def report(name):
    """The leader does what must be done once at a time; another takes over when it ends, or dies."""
    with clupy.election("reporter", data=name, timeout=60) as election:
        clupy.queue("reports").put(f"{name} reports, and the leader is {election.leader()}")


if __name__ == "__main__":
    clupy.put("balance", 0)
    for call in [clupy.parallel(deposit)(10) for _ in range(20)]:
        call.result()
    print("balance:", clupy.get("balance"))

    with clupy.Executor(3) as executor:                                 # three workers, even on two cores
        run = uuid.uuid4().hex
        parts = [executor.submit(simulate, run, part, 3, 5) for part in range(3)]
        print("totals:", [part.result() for part in parts])

    for call in [clupy.parallel(report)(name) for name in ("anna", "ben")]:
        call.result()
    reports = clupy.queue("reports")
    while len(reports):
        print(reports.get(timeout=5))

    clupy.delete("balance", *clupy.keys("state/*"))
