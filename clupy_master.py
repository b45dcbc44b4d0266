"""CluPy's master: knows which servers exist, and who may use how many slots of which.  It never sees a call.

                       statements                              statements
      clients -------- wants -------->  +------------------+  <----- slots, held ------ servers
              <------- share ---------  |      Master      |  ------ cluster --------->
                                        | servers, clients |
      `clupy status` <--- tables -----  +------------------+
                                                 |
                                     shares(servers, clients, now)

- Master   reads statements into two tables, and writes shares; a statement replaces the one before, so that a master
           that was started again knows everything after one round, and stores nothing.
- shares   decides: a plain function of the two tables and the time, max-min fair by slots.

A share is leave to ask.  A server alone counts its slots and lets a connection wait rather than exceed them, so a
share that is out of date, or that two masters gave at once, does no harm.
"""

import asyncio
import json
import logging
import os
import platform
import signal
import socket
import tempfile
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

import clupy
from clupy import (PORT, PYTHON, TO_MASTER, ClupyError, Connection, Dependencies, DependencyError, Listener, Pin,
                   ProtocolError, Resolution, VersionMismatch, canonical, next_try, packed, pip, placed, read_dependencies)

log = logging.getLogger("clupy.master")

TURN_TIME = 1.0            # a slot that others wait for passes on after so long; less moves workers about, more waits
SILENT_CLIENT = 300.0      # a client that stated nothing for so long loses idle slots that others want
WATCH_TIME = 0.1           # a leader asks itself so often whether it still leads
FILE_TIME = 1.0            # the dependency file is looked at so often


# ==== Tables =================================================================

@dataclass
class ServerRow:
    """What a server said last."""
    address: tuple             # (host, port) at which clients reach it; host None: the master's own machine
    slots: int
    held: dict                 # {client id: slots it has open there}
    state: dict                # what `status` shows: load, draining, environments, faults
    connection: Connection = None

    @property
    def usable(self):
        return not self.state.get("draining")


@dataclass
class ClientRow:
    """What a client said last, and what it was given."""
    wanted: int = 0
    unreachable: frozenset = frozenset()
    environment: object = None
    share: dict = field(default_factory=dict)      # {server id: slots}
    since: float = 0.0         # since when it has had slots, or has waited for its first one
    heard: float = 0.0
    peer: str = ""
    connection: Connection = None


# ==== Shares =================================================================

def shares(servers, clients, now):
    """Max-min fair slots: {client id: {server id: slots}}, every client present, fewest moves from what is held.

    servers: {id: ServerRow}; clients: {id: ClientRow}; now: seconds, monotonic.  Pure; called by the master's loop at
    most once in GATHER_TIME for a batch of changes.  A server that the client cannot reach is not in its share."""
    free = {id: row.slots for id, row in servers.items() if row.usable}
    amounts = fair_amounts({id: row.wanted for id, row in clients.items()}, sum(free.values()), clients, now)
    result = {id: {} for id in clients}
    picky = [id for id, row in clients.items() if row.unreachable]         # they choose first: others may go anywhere
    for group in picky, [id for id in clients if id not in picky]:
        for id in group:                           # what is held stays where it is, as far as the amount goes
            for server, held in sorted(clients[id].share.items(), key=lambda item: -item[1]):
                if server not in clients[id].unreachable:
                    amounts[id] -= place(result[id], free, server, min(held, amounts[id]))
        for id in sorted(group, key=amounts.get):
            fill(result[id], free, amounts[id], clients[id].unreachable)
    for id in sorted(clients, key=lambda id: sum(result[id].values())):    # slots that picky clients could not have
        fill(result[id], free, clients[id].wanted - sum(result[id].values()), clients[id].unreachable)
    for id, row in clients.items():                # nobody wants the rest: who has it keeps it, warm
        for server, held in row.share.items():
            if server not in row.unreachable and now - row.heard < SILENT_CLIENT:
                place(result[id], free, server, held - result[id].get(server, 0))
    return result


def fill(share, free, count, unreachable):
    """Move up to `count` slots into the share, each from the server that has the most free ones."""
    while count > 0 and (server := roomiest(free, unreachable)) is not None:
        count -= place(share, free, server, 1)


def place(share, free, server, count):
    """Move `count` slots of the server, or as many as are free, into the share; returns how many."""
    count = max(0, min(count, free.get(server, 0)))
    if count:
        share[server] = share.get(server, 0) + count
        free[server] -= count
    return count


def roomiest(free, unreachable):
    """The server with the most free slots that can be reached, or None."""
    return max((id for id, count in free.items() if count and id not in unreachable), key=free.get, default=None)


def fair_amounts(wanted, capacity, clients, now):
    """{client id: slots}: rounds of one slot for each that still wants one, until all are given away.

    In the round for which there are not enough, those come first who have had theirs for less than TURN_TIME, then who
    waited longest, then who has had most time."""
    amounts = dict.fromkeys(wanted, 0)

    def turn(id):
        row = clients[id]
        has = sum(row.share.values())
        if has > amounts[id] and (now - row.since < TURN_TIME or amounts[id]):
            return 0, -has                         # keeps what it has: fewest moves
        return (1, row.since) if not has else (2, -row.since)

    while capacity > 0:
        hungry = [id for id, count in wanted.items() if count > amounts[id]]
        if not hungry:
            break
        if len(hungry) <= capacity:                # whole rounds at once
            rounds = min(capacity // len(hungry), min(wanted[id] - amounts[id] for id in hungry))
        else:
            hungry, rounds = sorted(hungry, key=turn)[:capacity], 1
        for id in hungry:
            amounts[id] += rounds
        capacity -= rounds * len(hungry)
    return amounts


# ==== Libraries: exact versions ==============================================
# pip decides once, here, what a list means; everybody else installs just that. A client's
# list is resolved together with the master's. What was decided stands until the list changes, whatever the
# index has by then:
#
#   master's list ------------------+--> Resolutions.of --> pip install --dry-run --report --> Resolution
#   client's "resolve", its wheels -+         |
#                                             +-- remembered by hash; a refusal until the back-off is over

RESOLVED_KEPT = 200         # lists remembered, with the wheels that came with them
RESOLVERS = 2               # pips at a time: one that hangs on the network must not keep all clients waiting


async def resolve(dependencies, wheels={}, progress=None):
    """The Resolution of dependencies that are `packed`, with their wheels {sha256: bytes}. Raises
    DependencyError with pip's last lines. Cancelling kills pip. Nothing is installed; an empty list does not
    even run pip."""
    if not dependencies.libraries:
        return Resolution()
    what = "pip cannot resolve " + ", ".join(dependencies.libraries)[:200]
    try:
        with tempfile.TemporaryDirectory(prefix="clupy-") as folder:
            lines = await asyncio.to_thread(placed, dependencies.libraries, wheels, folder)
            requirements, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
            requirements.write_text("\n".join(lines), "utf-8")      # a file has no limit
            await pip(["install", "--dry-run", "--ignore-installed", "--report", str(report),
                       *dependencies.pip_options, "-r", str(requirements)], what, progress)
            found = json.loads(report.read_text("utf-8"))["install"]
    except OSError as error:
        raise DependencyError(f"{what}: {error}") from error
    return Resolution(tuple(sorted(_pin(item, folder) for item in found)), dependencies.pip_options)


def _pin(item, folder):
    """The Pin for one entry of pip's report; the wheels in folder are those that were shipped."""
    name, version = canonical(item["metadata"]["name"]), item["metadata"]["version"]
    origin = item["download_info"]
    url, vcs = origin["url"], origin.get("vcs_info")
    sha256 = origin.get("archive_info", {}).get("hashes", {}).get("sha256", "")
    if not item["is_direct"]:
        return Pin(name, version, "", sha256)
    if url.startswith(Path(folder).as_uri()):
        *_, sha256, file = urllib.parse.unquote(url).split("/")
        return Pin(name, version, f"wheel:{file}", sha256)
    if vcs:
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    if "subdirectory" in origin:        # a URL has one fragment, and it says this rather than the hash
        return Pin(name, version, f"{url}#subdirectory={origin['subdirectory']}")
    return Pin(name, version, url, sha256)


class Resolutions:
    """What pip made of each list that was asked for: one pip per list, whoever asks, and its answer for all.
    A refusal is the answer until `next_try`; then who asks next starts pip again. Used in one loop only."""
    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._answers = {}          # {"3f2a...": _Answer}, the one asked for last at the end
        self._turn = asyncio.Semaphore(RESOLVERS)

    def __repr__(self):
        running = sum(not answer.task.done() for answer in self._answers.values())
        return f"<Resolutions {len(self._answers)}{f', {running} under way' if running else ''}>"

    async def of(self, dependencies, wheels={}, progress=None):
        """The Resolution of dependencies: see `resolve`. progress is told if this call is the one that starts
        pip. Who is cancelled here stops waiting; pip goes on for the others, and for the next time."""
        answer = self._answers.pop(dependencies.hash, None)
        if answer is None or answer.is_stale(self._clock()):
            answer = _Answer(self._resolve(dependencies, wheels, progress), wheels, answer, self._clock)
        self._answers[dependencies.hash] = answer
        for key in [key for key, old in self._answers.items() if old.task.done()][:-RESOLVED_KEPT]:
            del self._answers[key]
        return await asyncio.shield(answer.task)

    async def _resolve(self, dependencies, wheels, progress):
        async with self._turn:
            return await resolve(dependencies, wheels, progress)

    def wheel_of(self, pin):
        """The bytes of a shipped Pin, for a server that asks; None if they are forgotten."""
        return next((answer.wheels[pin.sha256] for answer in self._answers.values()
                     if pin.sha256 in answer.wheels), None)

    async def close(self):
        """Kill the pips that run."""
        tasks = [answer.task for answer in self._answers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Answer:
    """One list's: the task that has the answer or is finding it, and after failures when to try again."""
    def __init__(self, coroutine, wheels, before, clock):
        self.wheels = wheels
        self.failures, self.again = (before.failures if before else 0), None
        self.task = asyncio.ensure_future(coroutine)
        self.task.add_done_callback(lambda task: self._done(clock()))

    def _done(self, now):
        if not self.task.cancelled() and self.task.exception() is not None:
            self.failures += 1
            self.again = next_try(self.failures, now)

    def is_stale(self, now): return self.task.cancelled() or self.again is not None and now >= self.again


# ==== Masters that stand in for each other ===================================
# With `zookeeper` configured several masters elect one that leads.  The others answer who that is, and know nothing
# else: statements rebuild the tables of whoever leads next.  A leader is sure of its office for two thirds of its
# session from the last time ZooKeeper confirmed it; nobody else can be elected before the whole session is over.

class Leadership:
    """This master's candidature; a daemon thread stands for it, `sure` and `leader` may be asked by any thread."""

    def __init__(self, name, session):
        self.leader = None             # "host:port" of who leads, as far as is known
        self.name, self._session = name, session
        self._until = 0.0              # monotonic; sure of leading until then
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._stand, name="clupy-election", daemon=True)
        self._thread.start()

    def __repr__(self):
        return f"<Leadership {'leads' if self.sure(time.monotonic()) else f'of {self.leader}'}>"

    def sure(self, now):
        """Whether this master leads at `now`, by its own clock: asked before everything it says."""
        return now < self._until

    def _stand(self):
        while not self._stopped.is_set():
            election = clupy.election("clupy master", data=self.name, timeout=max(1.0, self._session / 2))
            try:
                with election:
                    self._lead(election)
            except TimeoutError:       # somebody else leads
                leader, self.leader = self.leader, self._ask(election)
                if self.leader != leader:
                    log.info("standing by: %s leads", self.leader)
            except (clupy.LockLost, clupy.Unavailable) as error:
                log.warning("not leading: %s", error)
                self._stopped.wait(0.2)

    def _lead(self, election):
        while not self._stopped.is_set():
            asked = time.monotonic()
            election.check()
            if not self.sure(asked):
                log.info("this master leads")
            self._until, self.leader = asked + self._session * 2 / 3, self.name
            self._stopped.wait(self._session / 6)
        self._until = 0.0

    def _ask(self, election):
        try:
            return election.leader()
        except clupy.Unavailable:
            return None

    def close(self):
        """Stand down at once."""
        self._until = 0.0
        self._stopped.set()
        self._thread.join(1.0)
        clupy.close_services()         # ends the session, and so the candidature if the thread still waits


# ==== Master =================================================================

class Master:
    """Owns the two tables; for the loop that made it.  `listen` of its settings is where it is, once made."""

    def __init__(self, settings, secret, dependencies=None):
        self.settings, self.secret = settings, secret
        self.servers = {}              # {server id: ServerRow}; changed by on_server and by the end of its connection
        self.leadership = None         # Leadership; None: there is no other master
        self.clients = {}              # {client id: ClientRow}; likewise, and `share` by _decide
        self.started = time.time()
        self.given = sorted(settings.given & set(clupy.SERVICE_KEYS))     # services that somebody configured
        self.dependencies = dependencies           # path of the master's dependency file; None: there is none
        self.resolutions = Resolutions()
        self.wheels = {}               # {sha256: bytes} of the local libraries in the master's list
        self.list = Dependencies()     # the master's, packed
        self.libraries = None if dependencies else Resolution()    # what it was resolved to last; None: not yet
        self.known = {Resolution().hash: Resolution()}             # {hash: Resolution}: the master's, clients'
        self.fault = ""                # why the list could not be resolved
        self.resolved = asyncio.Event()            # the list was resolved or refused once: clients' lists wait for that
        if not dependencies:
            self.resolved.set()
        self.own = {}                  # {Connection: (Dependencies, wheels)} of the clients that have a list
        self._decision = None          # the timer of the next _decide
        self._decided = 0.0
        self._names = {}               # {Connection: ("server" or "client", id)}
        self._listener = Listener(settings.listen or ("", PORT), self._greet)
        self.address = self._listener.address
        self._tasks = {asyncio.create_task(self._keep_resolved())} if dependencies else set()
        log.info("master listens on %s:%s", *self.address)

    def __repr__(self):
        return f"<Master {self.address[1]} {len(self.servers)} servers, {len(self.clients)} clients>"

    async def close(self):
        await self._listener.close()
        if self.leadership:
            await asyncio.to_thread(self.leadership.close)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.resolutions.close()
        for connection in list(self._names):
            connection.close()
        if self._decision:
            self._decision.cancel()

    def descriptors(self):
        return self._listener.descriptors()

    async def _greet(self, sock, peer, role, preamble):
        if role != TO_MASTER:
            raise ProtocolError("this is a master, and it wants a server; is the port right?")
        clupy.tune(sock)
        return self._serve(await clupy.admit(sock, peer, preamble, self.secret, self.settings))

    async def _serve(self, connection):
        self._names[connection] = None
        try:
            await connection.serve(self)
        finally:
            kind, id = self._names.pop(connection) or (None, None)
            self.own.pop(connection, None)
            table = {"server": self.servers, "client": self.clients}.get(kind, {})
            if id in table and table[id].connection is connection:
                log.info("%s %s is gone", kind, id[:6])
                del table[id]
                self._change()

    # -- leading

    def stand(self, leadership):
        """Be one of several masters, from now on."""
        self.leadership = leadership
        self._spawn(self._watch_leadership())

    def _leads(self, connection):
        """Whether this master leads; if not, the peer is told who does."""
        if self.leadership is None or self.leadership.sure(time.monotonic()):
            return True
        leader = self.leadership.leader
        connection.send("leader", clupy.parse_address(leader) if leader and leader != self.leadership.name else None)
        return False

    async def _watch_leadership(self):
        """Stand down as soon as we are not sure: who is connected looks for the next leader."""
        while True:
            await asyncio.sleep(WATCH_TIME)
            if self._names and not self.leadership.sure(time.monotonic()):
                self.servers.clear()
                self.clients.clear()
                for connection in list(self._names):
                    if self._names[connection]:
                        self._leads(connection)
                        connection.close()

    # -- messages

    def on_server(self, connection, id, address, python, slots, held, state):
        if not self._leads(connection) or self._refuse_python(connection, python, "server"):
            return
        host, port = address
        peer, own = connection.host
        if not host:                               # it did not say where it is: where it came from
            host = None if peer == own or peer in ("127.0.0.1", "::1") else peer
        if id not in self.servers:
            log.info("server %s at %s: %s slots", id[:6], connection.peer, slots)
            self._note_patch(connection, state.get("python"))
        known = self.servers.get(id)
        self.servers[id] = ServerRow((host, port), slots, held, state, connection)
        self._names[connection] = "server", id
        self._send_cluster(self.servers[id])
        if known is None or (known.slots, known.usable) != (slots, self.servers[id].usable):
            self._change()

    def on_client(self, connection, id, python, wanted, unreachable, environment):
        if not self._leads(connection) or self._refuse_python(connection, python, "client"):
            return
        now = time.monotonic()
        row = self.clients.get(id)
        if row is None:
            log.info("client %s at %s", id[:6], connection.peer)
            held = {server: row.held[id] for server, row in self.servers.items() if id in row.held}
            row = self.clients[id] = ClientRow(share=held, since=now)
        if not row.share and not row.wanted and wanted:
            row.since = now
        changed = (row.wanted, row.unreachable, row.connection) != (wanted, frozenset(unreachable), connection)
        row.wanted, row.unreachable, row.environment = wanted, frozenset(unreachable), environment
        row.heard, row.peer, row.connection = now, connection.peer, connection
        self._names[connection] = "client", id
        if changed:
            self._change()
        else:
            self._send_share(id, row)

    def on_libraries(self, connection, hash):
        """A server's or client's question for an exact list; None stands for the cluster's, once it is known."""
        self._spawn(self._answer_libraries(connection, hash))

    async def _answer_libraries(self, connection, hash):
        await self.resolved.wait()
        found = self.libraries if hash is None else self.known.get(hash)
        connection.send("libraries", hash, found and found.plain)

    def on_wheel(self, connection, sha256):
        connection.send("wheel", sha256, self.wheels.get(sha256) or self.resolutions.wheel_of(Pin("", "", "", sha256)))

    def on_resolve(self, connection, libraries, pip_options, wheels):
        if self._leads(connection):
            self.own[connection] = Dependencies(tuple(libraries), tuple(pip_options)), wheels
            self._spawn(self._resolve_for(connection, *self.own[connection]))

    async def _resolve_for(self, connection, own, wheels):
        """A client's list, together with the master's, once that is known."""
        await self.resolved.wait()
        both, found, error = self.list.merged(own), None, None
        try:
            found = await self.resolutions.of(both, {**self.wheels, **wheels},
                                              lambda line: connection.send("notice", "resolving", line))
        except DependencyError as caught:
            log.warning("the libraries of %s cannot be resolved: %s", connection.peer, caught)
            error = caught.args
        if found:
            self.known[found.hash] = found
        if both == self.list.merged(own):          # else the master's list has changed, and its answer is on its way
            connection.send("resolved", found and found.plain, error)

    def on_status(self, connection):
        if self._leads(connection):
            connection.send("tables", self.tables())

    def tables(self):
        """What `python -m clupy status` shows."""
        now = time.monotonic()
        return {
            "master": {"address": "%s:%s" % self.address, "python": platform.python_version(),
                       "version": clupy.__version__, "uptime": time.time() - self.started},
            "libraries": [tuple(pin) for pin in self.libraries.pins] if self.libraries else [],
            "environments": {hash: [tuple(pin) for pin in self.known[hash].pins] for hash in
                             {hash for row in self.servers.values() for hash in row.state["environments"]} & self.known.keys()},
            "environment": self.libraries.hash if self.libraries and self.libraries.pins else None,
            "faults": [self.fault] if self.fault else [],
            "servers": {id: {"address": f"{row.address[0] or socket.gethostname()}:{row.address[1]}", "slots": row.slots,
                             "used": sum(row.held.values()), **row.state} for id, row in self.servers.items()},
            "clients": {id: {"address": row.peer, "wanted": row.wanted, "share": sum(row.share.values()),
                             "silent": now - row.heard} for id, row in self.clients.items()},
        }

    def _refuse_python(self, connection, python, kind):
        if tuple(python) == PYTHON:
            return False
        connection.refuse(VersionMismatch(
            f"the {kind} runs Python {python[0]}.{python[1]}, the master at {connection.host[1]} runs Python "
            f"{PYTHON[0]}.{PYTHON[1]}; they must be the same, since bytecode travels"))
        return True

    def _note_patch(self, connection, version):
        if version and version != platform.python_version():
            log.info("%s runs Python %s, this master %s", connection.peer, version, platform.python_version())

    # -- libraries

    def _spawn(self, coroutine):
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_resolved(self):
        """Resolve the master's list, and again when its file changes or a failure is old enough."""
        seen, failures, again = "nothing", 0, 0.0
        while True:
            now = time.monotonic()
            changed = seen != (seen := _file_state(self.dependencies))
            if changed or self.fault and now >= again:
                try:
                    own, wheels = await packed(read_dependencies(self.dependencies))
                    found = await self.resolutions.of(own, wheels)
                except (ClupyError, OSError) as error:
                    failures = 1 if changed else failures + 1
                    again = next_try(failures, time.monotonic(), self.settings.sync_interval)
                    self.fault = str(error)
                    log.error("the libraries of %s stay as they were: %s", self.dependencies, error)
                    self.libraries = self.libraries or Resolution()
                else:
                    self.list, self.wheels, self.libraries, self.fault = own, wheels, found, ""
                    self.known[found.hash] = found
                    log.info("libraries: %s", ", ".join(f"{pin.name} {pin.version}" for pin in found.pins) or "none")
                    if self.resolved.is_set():     # else they wait for it
                        for connection, (libraries, built) in self.own.items():
                            self._spawn(self._resolve_for(connection, libraries, built))
                self.resolved.set()
                for row in self.servers.values():
                    self._send_cluster(row)
                self._change()
            await asyncio.sleep(FILE_TIME)

    def _send_cluster(self, row):
        if self.libraries is not None:
            row.connection.send("cluster", self._services(), self._silent_clients(), self.libraries.hash)

    # -- decisions

    def _services(self):
        return {**{key: getattr(self.settings, key) for key in clupy.SERVICE_KEYS}, "given": self.given}

    def _silent_clients(self):
        now = time.monotonic()
        return [id for id, row in self.clients.items() if now - row.heard > SILENT_CLIENT]

    def _change(self, wait=0.0):
        """Decide anew, at once if the last time is GATHER_TIME ago."""
        if self._decision is None:
            loop = asyncio.get_running_loop()
            wait = max(wait, self._decided + clupy.GATHER_TIME - time.monotonic())
            self._decision = loop.call_later(max(0.0, wait), self._decide)

    def _decide(self):
        self._decision = None
        if self.leadership and not self.leadership.sure(time.monotonic()):
            return
        self._decided = now = time.monotonic()
        if not self.servers or self.libraries is None:
            for id, row in self.clients.items():   # nothing known yet, or nobody there: keep what is open
                self._send_share(id, row)
            return
        new = shares(self.servers, self.clients, now)
        for id, row in self.clients.items():
            before = row.share
            row.share = new[id]
            if bool(before) != bool(row.share):
                row.since = now
            self._send_share(id, row, gone=before)
        if any(row.wanted and not row.share for row in self.clients.values()):
            if self._decision is None:             # somebody waits: slots pass on in turn
                self._decision = asyncio.get_running_loop().call_later(TURN_TIME / 2, self._decide)

    def _send_share(self, client, row, gone=()):
        """A server of which the client has nothing any more is named with 0 slots: give them back."""
        share = {}
        for id, server in self.servers.items():
            if id in row.share or id in gone or client in server.held or row.unreachable and server.usable:
                share[id] = server.address, row.share.get(id, 0)
        row.connection.send("share", share, self._services())


def _file_state(path):
    """What changes when a file is changed; None without it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


async def run(settings, secret):
    """Be a master until SIGTERM; with `zookeeper` configured, one of several."""
    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.cancel)
    master = Master(settings, secret, os.path.abspath("clupy.master.dependency.yaml"))
    if settings.zookeeper:
        clupy.use_services({key: getattr(settings, key) for key in clupy.SERVICE_KEYS} | {"given": ["zookeeper"]})
        host, port = master.address
        name = f"{socket.gethostname() if host in ('0.0.0.0', '::') else host}:{port}"
        master.stand(Leadership(name, settings.session))
    try:
        await ended
    except asyncio.CancelledError:
        log.info("ending")
    finally:
        await master.close()
