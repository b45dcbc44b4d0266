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
import logging
import platform
import time
from dataclasses import dataclass, field

import clupy
from clupy import PORT, PYTHON, TO_MASTER, Connection, Listener, ProtocolError, VersionMismatch

log = logging.getLogger("clupy.master")

TURN_TIME = 1.0            # a slot that others wait for passes on after so long; less moves workers about, more waits
SILENT_CLIENT = 300.0      # a client that stated nothing for so long loses idle slots that others want
LOST_TIME = 10.0           # statements that stay away for so long end a client whose connection is still there


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
    for id, row in clients.items():                # what is held stays where it is, as far as the amount goes
        for server, held in sorted(row.share.items(), key=lambda item: -item[1]):
            if server not in row.unreachable:
                place(result[id], free, server, min(held, amounts[id]))
                amounts[id] -= result[id].get(server, 0)
    for id, row in sorted(clients.items(), key=lambda item: amounts[item[0]]):
        while amounts[id] and (server := roomiest(free, row.unreachable)) is not None:
            place(result[id], free, server, 1)
            amounts[id] -= 1
    for id, row in clients.items():                # nobody wants the rest: who has it keeps it, warm
        for server, held in row.share.items():
            if server not in row.unreachable and now - row.heard < SILENT_CLIENT:
                place(result[id], free, server, held - result[id].get(server, 0))
    return result


def place(share, free, server, count):
    """Move `count` slots of the server, or as many as are free, into the share."""
    count = min(count, free.get(server, 0))
    if count > 0:
        share[server] = share.get(server, 0) + count
        free[server] -= count


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


# ==== Master =================================================================

class Master:
    """Owns the two tables; for the loop that made it.  `listen` of its settings is where it is, once made."""

    def __init__(self, settings, secret):
        self.settings, self.secret = settings, secret
        self.servers = {}              # {server id: ServerRow}; changed by on_server and by the end of its connection
        self.clients = {}              # {client id: ClientRow}; likewise, and `share` by _decide
        self.started = time.time()
        self._decision = None          # the timer of the next _decide
        self._decided = 0.0
        self._names = {}               # {Connection: ("server" or "client", id)}
        self._listener = Listener(settings.listen or ("", PORT), self._greet)
        self.address = self._listener.address
        log.info("master listens on %s:%s", *self.address)

    def __repr__(self):
        return f"<Master {self.address[1]} {len(self.servers)} servers, {len(self.clients)} clients>"

    async def close(self):
        await self._listener.close()
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
            table = {"server": self.servers, "client": self.clients}.get(kind, {})
            if id in table and table[id].connection is connection:
                log.info("%s %s is gone", kind, id[:6])
                del table[id]
                self._change()

    # -- messages

    def on_server(self, connection, id, address, python, slots, held, state):
        if self._refuse_python(connection, python, "server"):
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
        connection.send("cluster", self._services(), self._silent_clients())
        if known is None or (known.slots, known.usable) != (slots, self.servers[id].usable):
            self._change()

    def on_client(self, connection, id, python, wanted, unreachable, environment):
        if self._refuse_python(connection, python, "client"):
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
            self._send_share(row)

    def on_status(self, connection):
        connection.send("tables", self.tables())

    def tables(self):
        """What `python -m clupy status` shows."""
        now = time.monotonic()
        return {
            "master": {"address": "%s:%s" % self.address, "python": platform.python_version(),
                       "version": clupy.__version__, "uptime": time.time() - self.started},
            "servers": {id: {"address": f"{row.address[0] or 'the master'}:{row.address[1]}", "slots": row.slots,
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

    # -- decisions

    def _services(self):
        return {key: getattr(self.settings, key) for key in ("redis", "zookeeper", "prefix", "ttl", "session", "patience")}

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
        self._decided = now = time.monotonic()
        if not self.servers:
            for row in self.clients.values():      # nothing known yet, or nobody there: keep what is open
                self._send_share(row)
            return
        new = shares(self.servers, self.clients, now)
        for id, row in self.clients.items():
            before = row.share
            row.share = new[id]
            if bool(before) != bool(row.share):
                row.since = now
            self._send_share(row, gone=before)
        if any(row.wanted and not row.share for row in self.clients.values()):
            if self._decision is None:             # somebody waits: slots pass on in turn
                self._decision = asyncio.get_running_loop().call_later(TURN_TIME / 2, self._decide)

    def _send_share(self, row, gone=()):
        """A server of which the client has nothing any more is named with 0 slots: give them back."""
        share = {}
        for id, server in self.servers.items():
            if id in row.share or id in gone or server.held:
                share[id] = server.address, row.share.get(id, 0)
        row.connection.send("share", share, self._services())


async def run(settings, secret):
    """Be a master until cancelled."""
    master = Master(settings, secret)
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        await master.close()
