"""How far one master goes: many servers and clients that are bare connections, and a real master whose processor time is read.

    python examples/simulate.py --servers 1000 --clients 200 --seconds 30

Clients change what they want every few seconds.  Measured are the master's cores, the time from a larger wish to the share that
answers it, and the time until the clients of a server that is lost have heard of it."""

import argparse
import asyncio
import os
import random
import socket
import subprocess
import sys
import time

import clupy

SLOTS = 8                                         # of a server
LIBRARIES = {"environments": [], "libraries": None, "fault": None}


class Server:
    """Says every STATEMENT_TIME, and after a change, who holds its slots."""

    def __init__(self, number):
        self.id, self.number, self.held, self.changed = f"{number:016x}", number, {}, asyncio.Event()

    async def run(self, connection):
        self.connection = connection
        asyncio.get_running_loop().create_task(connection.serve(self))
        while True:
            connection.send("server", self.id, ("10.0.0.1", 10_000 + self.number), SLOTS, dict(self.held), {
                "name": f"10.0.0.1:{10_000 + self.number} ({self.id[-4:]})", "load": 0.0, "draining": False, "own": None,
                "cores": SLOTS, "memory": None, "version": clupy.__version__,
                "python": clupy.PYTHON_VERSION, "cloudpickle": "3", **LIBRARIES})
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), clupy.STATEMENT_TIME)
                await asyncio.sleep(clupy.GATHER_TIME)
            except TimeoutError:
                pass

    def on_cluster(self, *_):
        """Nothing is built here."""


class Client:
    """Wants now more, now less; takes what it is given, and holds it."""

    def __init__(self, number, servers, most, change):
        self.id, self.servers, self.most, self.change = f"c{number:015x}", servers, most, change
        self.wanted, self.asked, self.share, self.waits, self.lost = 0, None, {}, [], {}

    async def run(self, connection):
        self.connection = connection
        asyncio.get_running_loop().create_task(connection.serve(self))
        change = time.monotonic() + random.uniform(0, self.change)
        while True:
            if time.monotonic() >= change:
                change += self.change
                before, self.wanted = self.wanted, random.randint(0, self.most)
                self.asked = time.monotonic() if self.wanted > before else None
            connection.send("client", self.id, f"user@host simulate.py {self.id[-4:]}", self.wanted, [], None,
                            (0, 0, 0, self.wanted))
            await asyncio.sleep(min(clupy.STATEMENT_TIME, max(0.0, change - time.monotonic())))

    def on_share(self, _, share, services, libraries, size):
        if self.asked and size[2] == self.wanted:
            self.waits.append(time.monotonic() - self.asked)
            self.asked = None
        given = {id: count for id, (_, count, *_) in share.items() if count}
        for id in self.share.keys() - given.keys():
            self.lost.setdefault(id, time.monotonic())
        for id in self.share.keys() | given.keys():
            if self.share.get(id) != given.get(id) and (server := self.servers.get(id)):
                if id in given:
                    server.held[self.id] = given[id]
                else:
                    server.held.pop(self.id, None)
                server.changed.set()
        self.share = given

    def on_notice(self, *_):
        """Nothing is waited for here."""


def processor_time(pid):
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def simulate(address, pid, count, clients, seconds, change):
    """A line of the table; change: seconds between changes of what a client wants."""
    clupy.raise_descriptor_limit()
    settings, secret = clupy.read_settings("client"), os.environ["CLUPY_SECRET"].encode()
    servers = {server.id: server for server in [Server(number) for number in range(count)]}
    clients = [Client(number, servers, max(1, 2 * SLOTS * count // clients), change) for number in range(clients)]
    tasks = []
    for party in (*servers.values(), *clients):
        connection = await clupy.dial(address, clupy.TO_MASTER, secret, settings)
        tasks.append(asyncio.get_running_loop().create_task(party.run(connection)))
        tasks[-1].party = party
    await asyncio.sleep(2 * change)               # until all is in motion
    for client in clients:
        client.waits.clear()
    begun, before = time.monotonic(), processor_time(pid)
    await asyncio.sleep(seconds)
    cores = (processor_time(pid) - before) / (time.monotonic() - begun)
    waits = sorted(wait for client in clients for wait in client.waits)
    lost, heard = random.sample([task for task in tasks if isinstance(task.party, Server)], min(5, count)), []
    for task in lost:
        victim = task.party
        holders = [client for client in clients if victim.id in client.share]
        for client in holders:
            client.lost.pop(victim.id, None)
        gone, _ = time.monotonic(), (servers.pop(victim.id), task.cancel(), victim.connection.abort())
        await asyncio.sleep(1.5)
        heard += [client.lost.get(victim.id, float("inf")) - gone for client in holders]
    for task in tasks:
        task.cancel()
    milliseconds = [f"{1000 * waits[int(len(waits) * part)]:.1f}" for part in (0.5, 0.99)] if waits else ["-", "-"]
    return (f"{count:7} {len(clients):7} {cores:11.3f} {'/'.join(milliseconds):>15} {len(waits):7} "
            f"{max(heard, default=0):10.3f} {1e6 * cores / (count + len(clients)):12.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, default=100)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--change", type=float, default=5, help="seconds between changes of what a client wants")
    options = parser.parse_args()
    os.environ["CLUPY_SECRET"] = os.urandom(16).hex()
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    master = subprocess.Popen([sys.executable, "-m", "clupy", "master", "--listen", f"127.0.0.1:{port}"],
                              stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.monotonic() < deadline:
            time.sleep(0.05)
        print("servers clients master cores  grant p50/p99 ms  grants  lost in s  us/s a node")
        print(asyncio.run(simulate(("127.0.0.1", port), master.pid, options.servers, options.clients, options.seconds,
                                   options.change)))
    finally:
        master.terminate()
        master.wait()


if __name__ == "__main__":
    main()
