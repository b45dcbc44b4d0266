"""CluPy's master: knows which servers exist, and who may use how many slots of which.  It never sees a call.

                       statements                              statements
      clients -------- wants -------->  +------------------+  <----- slots, held ------ servers
              <------- share ---------  |      Master      |  ------ cluster --------->
      `clupy status` <--- tables -----  +------------------+ ------ tables ---> Page: a browser, Prometheus
                                          |             |
                                       Tables         Lists
                                      shares()     Resolutions, pip

- Master   owns the connections: reads statements, writes shares.  A statement replaces the one before, so that a master
           that was started again knows everything after one round, and stores nothing.
- Tables   says who is there and who may use what; shares() decides that: a plain function of the tables and the time,
           max-min fair by slots.
- Lists    has the libraries that the master and its clients ask for resolved to exact versions, once for all.
- Listener accepts connections, here and for a server; Leadership elects one of several masters.
- Of a client, too: ClientLibraries, and what it shows: Output of its calls on the Screen, Progress, Timeline.
- Page     shows the tables to a browser and to Prometheus, by HTTP; nothing can be changed by it.

A share is leave to ask.  A server alone counts its slots and lets a connection wait rather than exceed them, so a
share that is out of date, or that two masters gave at once, does no harm.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import datetime
import difflib
import hashlib
import heapq
import hmac
import http.server
import ipaddress
import json
import logging
import operator
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import clupy
from clupy import (CLOSE_TIME, HANDSHAKE_TIME, NONCE_SIZE, PORT, PREAMBLE_SIZE, PROOF_SIZE, TO_MASTER, UNSEEN_OUTPUT,
                   ClupyError, ConfigurationError, Connection, DependencyError, LibraryMismatch, MasterUnreachable,
                   ProtocolError, SecretError, VersionMismatch, Why, address_text, dial, find_secret, masters_of, plain_host,
                   preamble, proof, read_exactly, read_preamble)

log = logging.getLogger("clupy.master")
log.addFilter(clupy.quiet_if_embedded)

TELL_TIME = 2.0            # calls that wait for their libraries are told of after so long; less cries where they are nearly there
TURN_TIME = 1.0            # a slot that others wait for passes on after so long; less moves workers about, more waits
WAKE_TIME = 1.0                # between looks at the own clock: who was stopped judges nobody by the time that passed
SILENT_CLIENT = 300.0      # a client that stated nothing for so long loses idle slots that others want
WATCH_TIME = 0.1           # a leader asks itself so often whether it still leads
LEARN_TIME = 1.0           # a master that stands by asks so often who leads; less is work for ZooKeeper, more sends people astray
PROGRESS_TIME = 0.2        # between looks at calls of which progress is shown; less costs more
PAGE_TIME = 5.0            # a request for the page, and what it waits for, take no longer; less refuses slow networks
PAGE_REQUESTS = 32         # at a time; more are threads for strangers
RATES = 90                 # of a client are kept, one for each statement or so: 3 minutes
FILE_TIME = 1.0            # the dependency file is looked at so often


# ==== Listening ==============================================================

class Tasks:
    """The tasks of one owner: what one raises is logged, and close() ends them all."""

    def __init__(self, owner):
        self._owner, self._tasks = owner, set()

    def spawn(self, coroutine):
        """Run a coroutine as a task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def repeat(self, seconds, action, *arguments):
        """Call action(*arguments) soon, and again every so many seconds."""
        async def repeating():
            while True:
                action(*arguments)
                await asyncio.sleep(seconds)
        self.spawn(repeating())

    def _done(self, task):
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("a task of %s failed", self._owner, exc_info=task.exception())

    async def close(self):
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Alerts of TLS by which a peer refuses a certificate: the other end of what `dial` sends.
REFUSALS = {"CERTIFICATE_EXPIRED": "it has expired, or is not valid yet",
            "BAD_CERTIFICATE": "it is not for the host name or address by which we were reached",
            "UNKNOWN_CA": "the peer's tls_ca is another than whose signature it bears"}


async def admit(sock, peer, preambles, secret, settings):
    """The Connection of an accepted socket whose preamble was read: the mirror of `dial`.  preambles: it, and ours.

    Raises SecretError or OSError; the caller closes the socket then."""
    loop, reader, mine = asyncio.get_running_loop(), asyncio.StreamReader(), preambles[clupy.PREAMBLE_SIZE:]
    await loop.sock_sendall(sock, mine)
    bound = preambles, await read_exactly(sock, NONCE_SIZE), os.urandom(NONCE_SIZE)
    await loop.sock_sendall(sock, bound[-1] + proof(secret, b"admit", *bound))
    try:
        answer = await read_exactly(sock, PROOF_SIZE)
    except EOFError:
        raise SecretError("it hung up on our proof, so it has another secret") from None
    if not hmac.compare_digest(answer, proof(secret, b"dial", *bound)):
        raise SecretError("it has another secret")
    key, (_, how) = proof(secret, b"key", *bound), clupy.read_preamble(mine)
    try:
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader), sock, ssl=clupy.tls_context(how, "admit", settings, key))
    except ssl.SSLError as error:
        alert = error.reason.partition("ALERT_")[2]
        raise SecretError(f"it does not accept our certificate: {REFUSALS.get(alert, alert)}" if alert else
                          f"TLS fails: {error.reason}") from None
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        if how:
            await clupy.prove_tls(reader, writer, key, b"admit tls", b"dial tls")
        return Connection(reader, writer, peer, key, how)
    except BaseException:
        transport.abort()
        raise


class Listener:
    """A listening socket whose every connection is read up to the end of its preamble, and then given away.

    greet(sock, peer, role, preambles), with the peer's preamble and ours, is a coroutine that has HANDSHAKE_TIME; what it raises
    of ClupyError or OSError closes the socket with one log line, as does a preamble that is none.  It returns a coroutine, which
    serves the connection for as long as that takes, or None.  Until it does a connection is half open: of more than
    `max_half_open` the oldest give way, so that strangers keep nobody out for longer than a moment."""

    def __init__(self, address, greet, settings):
        host, port = address
        both = not host and socket.has_dualstack_ipv6()            # every address, of IPv4 and IPv6
        try:
            self._socket = socket.create_server(address, family=socket.AF_INET6 if both or ":" in host else socket.AF_INET,
                                                dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            raise ConfigurationError(f"cannot listen on {address_text(host or '*', port)}: {error.strerror}; "
                                     "is another one running there? --listen takes another address") from None
        self._socket.setblocking(False)
        self.address = self._socket.getsockname()[:2]
        self.where = address_text(*self.address) if host else f"every address, port {self.address[1]}"         # for the log
        self._greet, self._settings = greet, settings
        self._half_open = {}                       # {socket: its asyncio.Timeout}, the oldest first
        self._tasks = Tasks(f"the listener at {self.where}")
        self._tasks.spawn(self._accept())

    async def _accept(self):
        failing = False
        while True:
            try:
                sock, address = await asyncio.get_running_loop().sock_accept(self._socket)
            except OSError as error:               # no descriptors left, or a peer that is gone already
                if not failing:
                    log.error("cannot accept connections on %s: %s; trying again every second", self.where, error)
                failing = True
                await asyncio.sleep(1)
                continue
            failing = False
            self._tasks.spawn(self._welcome(sock, address_text(plain_host(address[0]), address[1])))

    async def _answer(self, sock, theirs):
        """(role, both preambles) of a peer whose preamble is `theirs`; one that does not fit learns so, by ours."""
        mine = preamble(TO_MASTER)
        try:
            role, wanted = read_preamble(theirs)
            agreed = clupy.agreed_encryption(self._settings, wanted)
            mine = preamble(role, agreed)
            clupy.check_certificates(agreed, wanted)
        except (VersionMismatch, SecretError):
            await asyncio.get_running_loop().sock_sendall(sock, mine)
            raise
        return role, theirs + mine

    async def _welcome(self, sock, peer):
        """Serve one connection, from its preamble on."""
        if len(self._half_open) >= self._settings.max_half_open:
            oldest = self._half_open.pop(next(iter(self._half_open)))
            with contextlib.suppress(RuntimeError):            # its time is over just now
                oldest.reschedule(0)
        try:
            async with asyncio.timeout(HANDSHAKE_TIME) as self._half_open[sock]:
                theirs = await read_exactly(sock, PREAMBLE_SIZE)
                life = await self._greet(sock, peer, *await self._answer(sock, theirs))
        except (ClupyError, OSError, EOFError) as error:
            # Somebody only looked who is here, or left in the midst of the handshake.
            silent = (isinstance(error, EOFError) and (error.args[1:] == (0,) or getattr(error, "partial", None) == b"")
                      or isinstance(error, (ConnectionResetError, BrokenPipeError)))
            why = error.args[0] if isinstance(error, EOFError) else str(error)
            log.log(logging.DEBUG if silent else logging.WARNING, "refused %s: %s", peer, why or (
                f"no handshake within {HANDSHAKE_TIME:g} s" if sock in self._half_open else
                f"no handshake yet, and {self._settings.max_half_open} others came after it (max_half_open)"))
            sock.close()
            return
        except asyncio.CancelledError:
            sock.close()
            raise
        finally:
            self._half_open.pop(sock, None)
        if life is not None:
            await life

    def descriptors(self):
        return [self._socket.fileno()]

    async def close(self):
        await self._tasks.close()
        self._socket.close()


# ==== Tables and shares ======================================================

@dataclass
class ServerRow:
    """What a server said last."""
    address: tuple             # (host, port) at which clients reach it; host None: the master's own machine
    slots: int
    held: dict                 # {client id: slots it has open there}
    facts: dict                # what `status` shows: load, draining, environments, faults
    connection: Connection = None

    @property
    def usable(self):
        return not self.facts.get("draining")


@dataclass
class ClientRow:
    """What a client said last, and what it was given."""
    name: str = ""             # "user@host program pid"
    wanted: int = 0
    unreachable: frozenset = frozenset()           # ids of servers
    has_list: bool = False     # of libraries, of its own
    share: dict = field(default_factory=dict)      # {server id: slots}
    since: float = 0.0         # since when it has had slots, or has waited for its first one
    heard: float = 0.0
    connection: Connection = None
    calls: tuple = (0, 0, 0, 0)                    # done, failed of these, running, waiting
    rates: collections.deque = field(default_factory=lambda: collections.deque(maxlen=RATES))      # calls done a second, lately
    rated: tuple = None        # (when, how many were done) when the last rate was taken

    def count(self, calls, now):
        """Its calls by now, and every STATEMENT_TIME or so how many of them a second were done."""
        self.calls = calls
        since, done = self.rated or (now, calls[0])
        if now - since >= clupy.STATEMENT_TIME * 0.9:
            self.rates.append(round((calls[0] - done) / (now - since), 2))
        if self.rated is None or now - since >= clupy.STATEMENT_TIME * 0.9:
            self.rated = now, calls[0]


def shares(servers, clients, now):
    """Max-min fair slots: {client id: {server id: slots}}, every client present, fewest moves from what is held.

    servers: {id: ServerRow}; clients: {id: ClientRow}; now: seconds, monotonic.  Pure; called by the master's loop at
    most once in GATHER_TIME for a batch of changes.  A server that the client cannot reach is not in its share."""
    free = {id: row.slots for id, row in servers.items() if row.usable}
    total = sum(free.values())
    wanted = {id: min(row.wanted, total - sum(free.get(server, 0) for server in row.unreachable)) for id, row in clients.items()}
    amounts = fair_amounts(wanted, total, clients, now)
    result = {id: {} for id in clients}
    # First come the clients that cannot reach every server: the others can have their slots anywhere.
    picky = [id for id, row in clients.items() if row.unreachable]
    for group in picky, [id for id in clients if id not in picky]:
        for id in group:                           # what is held stays where it is, as far as the amount goes
            amounts[id] -= keep(result[id], free, clients[id], amounts[id])
        for id in sorted(group, key=amounts.get):
            spread(result[id], free, amounts[id], clients[id].unreachable)
    if any(free.values()):
        for id in sorted(clients, key=lambda id: sum(result[id].values())):        # what the first could not reach is for all
            spread(result[id], free, clients[id].wanted - sum(result[id].values()), clients[id].unreachable)
        for id, row in clients.items():            # nobody wants the rest: who has it keeps it, with its workers warm
            if now - row.heard < SILENT_CLIENT:
                keep(result[id], free, row, total)
    return result


def keep(share, free, row, count):
    """Move up to `count` slots into the share of those that the client holds, most first where it holds most; how many."""
    left = count
    for server, held in sorted(row.share.items(), key=lambda item: -item[1]):
        more = min(held - share.get(server, 0), free.get(server, 0), left)
        if more > 0 and server not in row.unreachable:
            share[server] = share.get(server, 0) + more
            free[server] -= more
            left -= more
    return count - left


def spread(share, free, count, unreachable):
    """Move up to `count` slots into the share, one by one, each from the server that has the most free ones."""
    if count <= 0:
        return
    rooms = [(-room, id) for id, room in free.items() if room and id not in unreachable]
    heapq.heapify(rooms)
    for _ in range(count):
        if not rooms:
            return
        room, id = rooms[0]
        share[id] = share.get(id, 0) + 1
        free[id] -= 1
        if room < -1:
            heapq.heapreplace(rooms, (room + 1, id))
        else:
            heapq.heappop(rooms)


def fair_amounts(wanted, capacity, clients, now):
    """{client id: slots}: rounds of one slot for each that still wants one, until all are given away.

    For the last round there are not enough.  It goes first to those who hold this slot already, unless it is their only
    one and they have had it for TURN_TIME; then to who has nothing and waited longest; then to the others."""
    amounts = dict.fromkeys(wanted, 0)

    def turn(id):
        row = clients[id]
        has = sum(row.share.values())
        if has > amounts[id] and (now - row.since < TURN_TIME or amounts[id]):
            return 0, -has
        return (1, row.since) if not has else (2, -row.since)

    while capacity > 0:
        hungry = [id for id, count in wanted.items() if count > amounts[id]]
        if not hungry:
            break
        if len(hungry) <= capacity:                # as many whole rounds as there are, at once
            rounds = min(capacity // len(hungry), min(wanted[id] - amounts[id] for id in hungry))
        else:
            hungry, rounds = sorted(hungry, key=turn)[:capacity], 1
        for id in hungry:
            amounts[id] += rounds
        capacity -= rounds * len(hungry)
    return amounts


class Tables:
    """Who is there: what each server and client said last.  Without I/O; who calls says what time it is."""

    def __init__(self):
        self.servers = {}              # {server id: ServerRow}
        self.clients = {}              # {client id: ClientRow}
        self._holders = collections.defaultdict(set)               # {client id: ids of the servers that say it holds slots there}

    def put_server(self, id, row):
        """Replace what a server said; whether that asks for a decision."""
        before, self.servers[id] = self.servers.get(id), row
        self._hold(id, before.held if before else {}, row.held)
        if row.facts["own"] is None:   # it said that when it came
            row.facts["own"] = before.facts["own"] if before else {}
        if before is None:             # a new master may have heard clients first: what they hold there, let them keep
            for client in row.held.keys() & self.clients.keys():
                self.clients[client].share.setdefault(id, row.held[client])
        return before is None or (before.slots, before.usable) != (row.slots, row.usable)

    def put_client(self, id, connection, name, wanted, unreachable, has_list, calls, now):
        """Replace what a client said; whether that asks for a decision."""
        row = self.clients.get(id)
        if row is None:                # what it holds is from a master before this one: let it keep that
            held = {server: row.held[id] for server, row in self.servers.items() if id in row.held}
            row = self.clients[id] = ClientRow(share=held, since=now)
        if not row.share and not row.wanted and wanted:
            row.since = now
        before = row.wanted, row.unreachable, row.connection
        row.wanted, row.unreachable, row.connection, row.heard = wanted, frozenset(unreachable), connection, now
        row.name, row.has_list = name, has_list
        row.count(calls, now)
        return before != (row.wanted, row.unreachable, row.connection)

    def _hold(self, server, before, now):
        """By what a server says now, and said before, of who holds slots there."""
        for client in before.keys() - now.keys():
            self._holders[client].discard(server)
            if not self._holders[client]:
                del self._holders[client]
        for client in now:
            self._holders[client].add(server)

    def drop(self, id, connection):
        """Forget who was connected by this: the row, or None if it has a newer connection, or was not there."""
        for table in self.servers, self.clients:
            if id in table and table[id].connection is connection:
                row = table.pop(id)
                if table is self.servers:
                    self._hold(id, row.held, {})
                return row
        return None

    def clear(self):
        self.servers.clear()
        self.clients.clear()
        self._holders.clear()

    def decide(self, now):
        """Divide the slots anew, into the rows; {client id: the share before}."""
        before = {id: row.share for id, row in self.clients.items()}
        for id, share in shares(self.servers, self.clients, now).items():
            row = self.clients[id]
            if bool(row.share) != bool(share):
                row.since = now
            row.share = share
        return before

    def share_of(self, id, before=()):
        """What a client is told: {server id: (address, slots, name)}.

        A server of which it has nothing any more is named with 0 slots, which says: give them back."""
        row = self.clients[id]
        named = {*row.share, *before, *self._holders.get(id, ())}
        if row.unreachable:                        # else it would not hear that they may be tried again
            named.update(server for server, there in self.servers.items() if there.usable)
        return {server: (there.address, row.share.get(server, 0), there.facts["name"])
                for server in named if (there := self.servers.get(server))}

    def size(self):
        """(servers that give slots, the slots that they have)."""
        usable = [row for row in self.servers.values() if row.usable]
        return len(usable), sum(row.slots for row in usable)

    def starving(self):
        """Whether a client waits for its first slot."""
        return any(row.wanted and not row.share for row in self.clients.values())

    def silent(self, now):
        """The clients that stated nothing for so long that they lose idle slots, while others want more than they hold: what
        those have in their share may be open for a silent one, which cannot hear that it is to give it back."""
        silent = [id for id, row in self.clients.items() if now - row.heard > SILENT_CLIENT]
        others = self.clients.keys() - silent if silent else ()
        return silent if any(self.clients[id].wanted > self._held(id) for id in others) else []

    def _held(self, client):
        """How many slots it holds, as the servers say."""
        return sum(self.servers[server].held[client] for server in self._holders.get(client, ()))

    def restart_clocks(self, now):
        """We slept, not the others."""
        for row in self.clients.values():
            row.heard = now

    def status(self, now):
        """Their part of what `python -m clupy status` and the page show."""
        names = {id: row.name for id, row in self.clients.items()}
        return {
            "servers": {id: {"address": address_text(row.address[0] or socket.gethostname(), row.address[1]), "slots": row.slots,
                             "used": sum(row.held.values()), **row.facts,
                             "runs": {names.get(client, client): count for client, count in row.held.items()}}
                        for id, row in self.servers.items()},
            "clients": {id: {"name": row.name, "address": row.connection.peer, "wanted": row.wanted,
                             "share": sum(row.share.values()), "silent": now - row.heard, "rates": list(row.rates),
                             **dict(zip(("done", "failed", "running", "waiting"), row.calls))}
                        for id, row in self.clients.items()}}


# ==== Libraries: what is asked for, and pip ==================================
# A list of libraries is written down once, resolved once, and installed the same everywhere:
#
#   clupy.*.dependency.yaml --read_dependencies--> Dependencies   what somebody asks for: "numpy>=2", "./mine"
#        the machine that has the file --packed--> Dependencies   and wheels; nothing in it is a path any more
#                            the master --resolve--> Resolution   Pins: what pip made of it, to the last digit
#                 each server --Environments.build--> Environment  a folder that has exactly that
#
# A file or folder under `libraries:` is on one machine only, so it travels as a wheel: built there once, then named by its
# file name and hash (`mine @ wheel:mine-1.0-py3-none-any.whl#sha256=...`) and shipped to who asks for the hash.  Folders
# in `pip_options:` (`--find-links`) do not travel: they must be there on the master and on every server.

PIP_LINES = 20             # of pip's last lines in an error: it explains itself at its end, seldom longer
LONGEST_BACK_OFF = 600.0   # at most so long after the network's return pip is tried again; less asks in vain more often
PICKLED = "cloudpickle", "numpy"                   # what differs in these breaks pickles: first in every list of differences


def digest(*parts):
    """A name for parts, the same for the same ones on every machine."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Dependencies(collections.namedtuple("Dependencies", "libraries pip_options", defaults=((), ()))):
    """What a dependency file asks for: two tuples of text."""

    __slots__ = ()

    @property
    def hash(self):
        """What tells lists apart, in whatever order their libraries are."""
        return digest(sorted(self.libraries), self.pip_options)

    def merged(self, other):
        """Both lists as one: a client's with the master's, which come first."""
        libraries = tuple(dict.fromkeys(self.libraries + other.libraries))
        options = other.pip_options if other.pip_options != self.pip_options else ()
        return Dependencies(libraries, self.pip_options + options)


class Pin(collections.namedtuple("Pin", "name version url sha256", defaults=("", ""))):
    """One library exactly.

    name     canonical: "scikit-learn"
    version  "1.5.2"
    url      "" if the index has it; "https://..."; "git+https://...@commit"; or, shipped by the master,
             "wheel:a-1.0-py3-none-any.whl"
    sha256   of the file that the master's pip chose, "" for git.  For the index it only tells a library that was built
             anew under its old version: servers, maybe of other platforms, do not check it."""

    __slots__ = ()

    @property
    def requirement(self):
        """The line for pip; a "wheel:" in it must be `placed` before."""
        if not self.url:
            return f"{self.name}=={self.version}"
        return f"{self.name} @ {self.url}" + (f"#sha256={self.sha256}" if self.sha256 else "")


class Resolution(collections.namedtuple("Resolution", "pins pip_options", defaults=((), ()))):
    """The exact list for one Dependencies: a sorted tuple of Pins, and how pip is to be told to find them.

    Without pins it stands for the server's own Python."""

    __slots__ = ()

    @property
    def hash(self):
        """Its name in the whole cluster; what a server makes of it is named by `environment_id`."""
        return digest(self.pins, self.pip_options)

    @property
    def plain(self):
        """As it travels in messages; Resolution.of makes it whole again."""
        return [tuple(pin) for pin in self.pins], self.pip_options

    @classmethod
    def of(cls, plain):
        """The Resolution that travelled so."""
        pins, pip_options = plain
        return cls(tuple(Pin(*pin) for pin in pins), tuple(pip_options))


def canonical(name):
    """The name that all spellings of a library have in common (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- dependency files

# A line of the list: `name[extras] @ where[extras] ; marker`, of which all but `where` is optional.
_LINE = re.compile(r"(?:[\w.-]+\s*(?P<extras>\[[^]]*\])?\s*@\s*)?"
                   r"(?P<where>[^;\[]+?)\s*(?P<more_extras>\[[^]]*\])?\s*(?P<marker>;.*)?")
_ARCHIVES = ".whl", ".tar.gz", ".tar.bz2", ".tar.xz", ".tgz", ".zip"
_PATH_OPTIONS = "-f", "--find-links", "-c", "--constraint", "--cert", "--client-cert"
# Options that say what to install, or into what: the list says the one, CluPy the other.
_REFUSED_OPTIONS = {"-r", "--requirement", "-e", "--editable", "-t", "--target", "--prefix", "--root",
                    "--user", "--python", "--dry-run", "--report"}


def read_dependencies(path):
    """The Dependencies that a file asks for, none if it is absent.

    Paths in it are relative to the file, and absolute in what is returned.  What is read depends on the file alone: who
    changed a local library that it names touches the file.  Raises ConfigurationError."""
    found, folder = {}, Path(path).absolute().parent
    readers = {"libraries": _absolute_lines, "pip_options": _absolute_options}
    for key, value, line in clupy.read_yaml(path):
        if key not in readers:
            nearest, = difflib.get_close_matches(str(key), readers, 1, 0)
            raise ConfigurationError(f"{path}, line {line}: unknown key {key!r}; did you mean {nearest!r}?")
        try:
            found[key] = tuple(readers[key](_texts(value), folder))
        except ValueError as error:
            raise ConfigurationError(f"{path}, line {line}: {key}: {error}") from None
    return Dependencies(**found)


def _texts(value):
    """The entries of a key, all of them texts."""
    if not isinstance(value, list | None):
        raise ValueError(f"must be a list, one entry a line, not {value!r:.60}")
    for text in value or ():
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.60} is not text; put it in quotes")
    return value or ()


def _absolute_lines(texts, folder):
    """The lines, in which a file or folder of this machine is in its one form: `/absolute/path[extras] ; marker`."""
    lines = (re.sub(r"(^|\s+)#.*", "", text).strip() for text in texts)
    return [_absolute_line(line, folder) for line in lines if line]


def _absolute_line(line, folder):
    if line.startswith("-"):
        raise ValueError(f"{line!r} is an option; those for pip go under pip_options, and a local folder is named without -e")
    match = _LINE.fullmatch(line)
    path = match["where"] if match else ""
    if path.startswith("file:"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(path).path)
    elif "://" in path or not ("/" in path or path.endswith(_ARCHIVES)):
        return line
    path = os.path.realpath(os.path.join(folder, clupy.home_path(path)))
    if not os.path.exists(path):                   # pathlib's raises of a name that is too long
        raise ValueError(f"{line!r}: there is no {path}")
    return f"{path}{match['extras'] or match['more_extras'] or ''} {match['marker'] or ''}".strip()


def _absolute_options(texts, folder):
    """The options one by one ("--find-links wheels" is two), with paths made absolute."""
    def absolute(value):
        return value if "://" in value else str(Path(folder, clupy.home_path(value)))

    options = []
    for option in [word for text in texts for word in shlex.split(text)]:
        name, equals, value = option.partition("=")
        if name in _REFUSED_OPTIONS:
            raise ValueError(f"{name} is CluPy's own to decide; leave it out")
        if options and options[-1] in _PATH_OPTIONS:
            option = absolute(option)
        elif equals and name in _PATH_OPTIONS:
            option = f"{name}={absolute(value)}"
        options.append(option)
    return options


# ---- running pip

async def run_command(command, what, progress=None, keep=()):
    """Run a command to its end, and kill what it leaves behind.

    progress(line) is called in the loop for each line that it prints; keep: descriptors that it inherits.  Raises
    DependencyError, `what` and the last lines, if it fails.  Cancelling kills it and all its children."""
    lines = collections.deque(maxlen=PIP_LINES)
    ours, its = os.pipe()              # not asyncio's, or Process.wait() would wait for everybody who holds it, orphans too
    output = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(output), open(ours, "rb", 0))
    reading = asyncio.create_task(_read_lines(output, lines, progress))
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=its, stderr=its, env=pip_environ(os.environ),
                start_new_session=True, pass_fds=keep)
        finally:
            os.close(its)
        try:
            code = await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):       # nobody is left
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await asyncio.wait([reading], timeout=1.0)     # who left its group may hold the pipe for ever
    finally:
        transport.close()              # the end of what is read, if it was not there yet
        await reading
    if code:
        end = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise DependencyError(f"{what}: {end}", lines)


async def _read_lines(output, lines, progress):
    """Append each line of a command's output to `lines`, and tell it to progress."""
    rest, more = b"", True
    while more:
        more = await output.read(1 << 16)
        *whole, rest = (rest[-65536:] + (more or b"\n")).split(b"\n")       # bounded, should no newline come
        for line in filter(None, (line.decode(errors="replace").rstrip() for line in whole)):
            lines.append(line)
            if progress:
                progress(line)


async def pip(arguments, what, progress=None, keep=()):
    """Run this Python's pip: see `run_command`."""
    try:
        await run_command([sys.executable, "-P", "-m", "pip", *arguments], what, progress, keep)
    except DependencyError as error:
        if error.lines and error.lines[-1].endswith("No module named pip"):
            raise DependencyError(f"{what}: {sys.executable} has no pip: get it by `python -m ensurepip` "
                                  "or the system's package python3-pip") from error
        raise


# Where pip looks (PIP_INDEX_URL ...) is the user's own business; what it installs, and where to, is not.
_PIP_DROPPED = {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIREMENT", "PIP_EDITABLE", "PIP_PYTHON",
                "PIP_REPORT", "PIP_DRY_RUN", "PIP_QUIET", "PIP_VERBOSE"}
_PIP_SET = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0",     # pip.conf may say otherwise
            "PIP_BREAK_SYSTEM_PACKAGES": "1",       # which we never do, but some pips refuse even a dry run
            "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off", "PIP_NO_COLOR": "1", "PYTHONUNBUFFERED": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}


def pip_environ(environ):
    """The environment variables without what would make pip see or change other libraries than it is told to."""
    kept = {key: value for key, value in environ.items()
            if not key.startswith(("PYTHON", "CLUPY_")) and key not in _PIP_DROPPED}
    # By the epoch a folder that did not change gives the same wheel to the byte, and so the same environment.
    return {"SOURCE_DATE_EPOCH": "315532800"} | kept | _PIP_SET


def next_try(failures, now, interval=60.0):
    """When to try again after so many failures in a row, the last one now: 1, 2, 4 ... intervals later, at most
    LONGEST_BACK_OFF.  In seconds of whatever clock `now` is from."""
    return now + min(interval * 2 ** min(failures - 1, 30), LONGEST_BACK_OFF)


# ---- wheels that travel

_WHEEL = re.compile(r"wheel:(?P<file>[\w.+!-]+\.whl)#sha256=(?P<sha256>[0-9a-f]{64})")    # no slash in a name


async def packed(dependencies, progress=None):
    """(the Dependencies without local paths, {sha256: bytes} of the wheels that stand for them).

    What is no wheel yet is built by this machine's pip.  Raises DependencyError if that fails, OSError if a file cannot
    be read."""
    libraries, wheels = [], {}
    for line in dependencies.libraries:
        match = _LINE.fullmatch(line)
        if match and os.path.isabs(match["where"]):
            file, data = await _wheel(match["where"], dependencies.pip_options, progress)
            sha256 = hashlib.sha256(data).hexdigest()
            wheels[sha256] = data
            name = file.partition("-")[0] + (match["more_extras"] or "")
            line = f"{name} @ wheel:{file}#sha256={sha256} {match['marker'] or ''}".strip()
        libraries.append(line)
    return dependencies._replace(libraries=tuple(libraries)), wheels


async def _wheel(path, pip_options, progress):
    """(file name, bytes) of the wheel at a path, or made of the source folder or archive there."""
    if path.endswith(".whl"):
        return os.path.basename(path), await asyncio.to_thread(Path(path).read_bytes)
    with tempfile.TemporaryDirectory(prefix="clupy-") as folder:
        await pip(["wheel", "--no-deps", "--wheel-dir", folder, *pip_options, path],
                  f"no wheel can be built of {path}", progress)
        wheel, = Path(folder).glob("*.whl")
        return wheel.name, wheel.read_bytes()


def placed(lines, wheels, folder):
    """The lines with every "wheel:" turned into the URL of a file below the folder, written there for pip, which compares
    the hash.

    wheels: {sha256: bytes}.  Raises DependencyError if one is not among them, OSError if it cannot be written."""
    def written(match):
        if match["sha256"] not in wheels:
            raise DependencyError(f"the wheel {match['file']} was not shipped")
        path = Path(folder, match["sha256"], match["file"]).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wheels[match["sha256"]])
        return f"{path.as_uri()}#sha256={match['sha256']}"
    return [_WHEEL.sub(written, line) for line in lines]


# ---- here and in the cluster

def installed(name):
    """The version of a library in this interpreter, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def all_installed():
    """{canonical name: version} of the libraries of this interpreter."""
    return {canonical(found.metadata["Name"]): found.version for found in metadata.distributions() if found.metadata["Name"]}


def differences(pins, installed=installed):
    """[(library, version here, version in the cluster)], those that pickles depend on first.

    A library that is missing here is no difference: what comes from it cannot travel either.  installed: a function from
    name to version or None."""
    found = [(pin.name, installed(pin.name), pin.version) for pin in pins]
    return sorted(((name, here, cluster) for name, here, cluster in found if here not in (None, cluster)),
                  key=lambda difference: (difference[0] not in PICKLED, difference[0]))


def check_libraries(pins, library_check="warn", stacklevel=2):
    """Warn with LibraryMismatch, or raise it, if this client's libraries differ from the pins; "off" does not even look."""
    found = differences(pins) if library_check != "off" else []
    if not found:
        return
    lines = [f"{name}: {here} here, {there} in the cluster" for name, here, there in found]
    advice = ("libraries differ from the cluster's: install its versions, or change its list, or set `library_check: off` "
              "in clupy.client.yaml")
    mismatch = LibraryMismatch("\n  ".join([advice, *lines]))
    if library_check == "error":
        raise mismatch
    warnings.warn(mismatch, stacklevel=stacklevel)


def show_progress(line, stream=None):
    """Show a line on standard error in place of the one before, if that is a terminal; "" takes it away."""
    stream = sys.stderr if stream is None else stream
    if stream is not None and stream.isatty():
        stream.write("\r\x1b[K" + line[:shutil.get_terminal_size().columns - 1])
        stream.flush()


# ==== Resolutions: what pip makes of a list ==================================
# pip decides once, here, what a list means; everybody else installs just that.  A client's list is resolved together with
# the master's.  What was decided stands until the list changes, whatever the index has by then:
#
#   master's list ------------------+--> Resolutions.of --> pip install --dry-run --report --> Resolution
#   client's "resolve", its wheels -+         |
#                                             +-- remembered by hash; a refusal until the back-off is over

RESOLVED_KEPT = 200        # lists remembered; what is forgotten is another run of pip when it is asked for again
RESOLVED_BYTES = 256 << 20           # ... and bytes of the wheels that came with them, each counted once
RESOLVERS = 2              # pips at a time: one that hangs on the network must not keep all clients waiting


async def resolve(dependencies, wheels={}, progress=None):
    """The Resolution of Dependencies that are `packed`, with their wheels {sha256: bytes}.

    Nothing is installed; for an empty list pip is not even run.  Raises DependencyError with pip's last lines; cancelling
    kills pip."""
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
            return Resolution(tuple(sorted(_pin(item, folder) for item in found)), dependencies.pip_options)
    except OSError as error:
        raise DependencyError(f"{what}: {error}") from error
    except (KeyError, ValueError) as error:        # a pip that reports otherwise
        raise DependencyError(f"{what}: this pip's report cannot be read: {error!r}; upgrade pip on the master") from error


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

    A refusal is the answer until `next_try`; then who asks next starts pip again.  For one loop alone."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._answers = {}          # {"3f2a...": _Answer}, the one asked for last at the end
        self._turn = asyncio.Semaphore(RESOLVERS)

    async def of(self, dependencies, wheels={}, progress=None):
        """The Resolution of Dependencies, as by `resolve`.

        progress is told if this call is the one that starts pip.  Who is cancelled here stops waiting; pip goes on for the
        others, and for the next time."""
        answer = self._answers.pop(dependencies.hash, None)
        if answer is None or answer.is_stale(self._clock()):
            answer = _Answer(self._resolve(dependencies, wheels, progress), wheels, answer, self._clock)
        self._answers[dependencies.hash] = answer
        self._forget()
        return await asyncio.shield(answer.task)

    def _forget(self):
        """Let go of the answers that were asked for longest ago, until the rest is within bounds."""
        for key, old in list(self._answers.items())[:-1]:
            sizes = {sha256: len(wheel) for answer in self._answers.values() for sha256, wheel in answer.wheels.items()}
            if len(self._answers) <= RESOLVED_KEPT and sum(sizes.values()) <= RESOLVED_BYTES:
                break
            if old.task.done():
                del self._answers[key]

    def known(self):
        """{hash: Resolution} of all that is remembered."""
        done = (answer.task for answer in self._answers.values() if answer.task.done() and not answer.task.cancelled())
        return {task.result().hash: task.result() for task in done if task.exception() is None}

    async def _resolve(self, dependencies, wheels, progress):
        async with self._turn:
            return await resolve(dependencies, wheels, progress)

    def wheels(self):
        """The wheels that came with each list: [{sha256: bytes}]."""
        return [answer.wheels for answer in self._answers.values()]

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

    def is_stale(self, now):
        return self.task.cancelled() or self.again is not None and now >= self.again


class Lists:
    """The master's list of libraries, the clients' own, and what pip made of each; for the master's loop.

    changed(None) is called when the servers should have something else, or it is known why not, changed(connection) when
    that client should."""

    def __init__(self, path, interval, changed):
        self.path = path               # of the master's dependency file; None: there is none
        self.masters = Dependencies()  # what it asks for, packed
        self.wheels = {}               # {sha256: bytes} of the local libraries in it
        self.resolution = None if path else Resolution()       # what it was resolved to last; None: not yet
        self.fault = ""                # why it could not be resolved
        self.clients = {}              # {Connection: (Dependencies, wheels)} of the clients that have a list
        self._answers = {}             # {Connection: (Resolution or None, error or None)}: what became of it
        self._told = {}                # {Connection: hash of the Resolution that it was sent last}
        self._interval, self._changed = interval, changed
        self._looked = asyncio.Event()             # the master's list was resolved or refused once: clients' lists wait for that
        self._resolutions = Resolutions()
        self._tasks = Tasks("the lists of libraries")
        if path:
            self._tasks.spawn(self._keep_resolved())
        else:
            self._looked.set()

    def __repr__(self):
        return f"<Lists {self.resolution and self.resolution.hash} {len(self.clients)} of clients{' fault' * bool(self.fault)}>"

    async def close(self):
        await self._tasks.close()
        await self._resolutions.close()

    async def _keep_resolved(self):
        """Resolve the master's list, and again when its file changes or a failure is old enough."""
        seen, failures, again = "nothing", 0, 0.0
        while True:
            changed = seen != (seen := _file_state(self.path))
            if changed or self.fault and time.monotonic() >= again:
                try:
                    masters, wheels = await packed(read_dependencies(self.path))
                    found = await self._resolutions.of(masters, wheels)
                except (ClupyError, OSError) as error:
                    failures = 1 if changed else failures + 1
                    again = next_try(failures, time.monotonic(), self._interval)
                    self.fault = str(error)
                    log.error("the libraries of %s stay as they were: %s", self.path, error)
                    self.resolution = self.resolution or Resolution()
                else:
                    self.masters, self.wheels, self.resolution, self.fault = masters, wheels, found, ""
                    log.info("libraries: %s", ", ".join(f"{pin.name} {pin.version}" for pin in found.pins) or "none")
                    if self._looked.is_set():      # else they wait for it
                        for connection in self.clients:
                            self._tasks.spawn(self._resolve_for(connection, *self.clients[connection]))
                self._looked.set()
                self._changed(None)
            await asyncio.sleep(FILE_TIME)

    def hear(self, connection, own):
        """A client's list: resolve it together with the master's, now and whenever that changes."""
        libraries, pip_options, wheels = own
        wheels = {sha256: self._wheel(sha256) or wheel for sha256, wheel in wheels.items()}      # each in memory once
        self.clients[connection] = Dependencies(tuple(libraries), tuple(pip_options)), wheels
        self._tasks.spawn(self._resolve_for(connection, *self.clients[connection]))

    def forget(self, connection):
        """Who was connected by this is gone."""
        for table in self.clients, self._answers, self._told:
            table.pop(connection, None)

    async def _resolve_for(self, connection, own, wheels):
        await self._looked.wait()
        both, found, error = self.masters.merged(own), None, None
        try:
            found = await self._resolutions.of(both, {**self.wheels, **wheels},
                                               lambda line: connection.send("notice", "resolving", line))
        except DependencyError as caught:
            log.warning("the libraries of %s cannot be resolved: %s", connection.peer, caught)
            error = caught.args
        if both == self.masters.merged(own) and connection in self.clients:     # else the master's list has changed since
            self._answers[connection] = found, error
            self._changed(connection)

    def for_client(self, connection, has_list):
        """What a share says of libraries: (hash, the exact list, why there is none); the list only if it was not sent before.
        None: it is not known yet."""
        found, error = self._answers.get(connection, (None, None)) if has_list else (self.resolution, None)
        if error:
            return None, None, error
        return found and (found.hash, found.plain if self._is_news(connection, found) else None, None)

    def for_server(self, connection):
        """What a cluster statement says of libraries: (hash, the exact list, its wheels), of which the last two only if they
        were not sent before.  None: nothing is known yet."""
        found = self.resolution
        if found is None:
            return None
        return (found.hash, found.plain, self.wheels) if self._is_news(connection, found) else (found.hash, None, None)

    def _is_news(self, connection, resolution):
        before, self._told[connection] = self._told.get(connection), resolution.hash
        return before != resolution.hash

    def _wheel(self, sha256):
        """The bytes of a wheel that somebody's list came with; None if there is none."""
        places = self.wheels, *(wheels for _, wheels in self.clients.values()), *self._resolutions.wheels()
        return next((wheels[sha256] for wheels in places if sha256 in wheels), None)

    def status(self, environments):
        """Their part of what `python -m clupy status` shows, of environments those that servers have."""
        known = self._resolutions.known() | {found.hash: found for found in (Resolution(), self.resolution) if found}
        pins = self.resolution.pins if self.resolution else ()
        return {"libraries": [tuple(pin) for pin in pins],
                "environment": self.resolution.hash if pins else None,
                "environments": {hash: [tuple(pin) for pin in known[hash].pins] for hash in environments & known.keys()},
                "faults": [self.fault] if self.fault else []}


def _file_state(path):
    """What changes when a file is changed; None without it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# ==== Libraries of a client ==================================================
# The client's side of these lists; part of its engine, and for its loop.

class ClientLibraries:
    """The libraries of this client's workers: its own list and the master's, as the master resolved them; and how their
    versions differ from those here."""

    def __init__(self, engine, dependencies):
        self._engine = engine
        self._dependencies = dependencies         # this client's own list; None: it has none
        self.wheels = {}                          # {sha256: bytes} of the local libraries in it
        self.resolution = None                    # Resolution that the master made of all; None: it has not said yet
        self.checking = engine.settings.library_check == "error"          # no call starts until versions were compared
        self._told = None                         # Connection to the master that was told the list itself
        self._fault = None                        # why the master could not resolve it, as the log says
        self._line = ""                           # pip's last one, while calls wait for it
        self._telling = None                      # TimerHandle, from the first line on: the log tells of it, too

    @property
    def awaited(self):
        """Whether calls must not start yet."""
        return self.resolution is None or self.checking

    async def pack(self):
        """Make wheels of the local libraries in the list."""
        if self._dependencies:
            self._dependencies, self.wheels = await packed(self._dependencies, self.show_progress)

    def statement(self, connection):
        """What the master is told of the list: (its hash, the list itself if this connection is new), or None."""
        own, told, self._told = self._dependencies, self._told, connection
        if not own or not own.libraries:
            return None
        return own.hash, (own.libraries, own.pip_options, self.wheels) if told is not connection else None

    def hear(self, said):
        """What the master made of it: (hash, the exact list if it is new, why there is none); None: it is not known yet."""
        _, found, error = said or (None, None, None)
        if said:
            self.clear_progress()
        if error and self.resolution is None:
            self._engine.fail_all(DependencyError(*error))
        elif error and error != self._fault:
            clupy.log.warning("our libraries stay as they were: %s", DependencyError(*error))
        elif found:
            self.resolution = Resolution.of(found)
            self.check(self.resolution)
            for link in self._engine.pool.links.values():
                link.greet()                      # the server asks for the slots back once it has the new ones
            self._engine.master_side.update_wanted()
        self._fault = error

    def check(self, resolution):
        """Compare the libraries of its workers with this client's, in a thread, since it reads files."""
        if self._engine.settings.library_check == "off" or self._engine.embedded:
            self.checking = False                 # an embedded cluster's workers run this very Python
        else:
            clupy.threads.run(self._check, resolution.pins)

    def _check(self, pins):
        self._compare(pins)
        self._engine.soon(self._checked)

    def _compare(self, pins):
        try:
            check_libraries(pins, self._engine.settings.library_check)
        except LibraryMismatch as error:
            self._engine.soon(self._engine.fail_all, error)

    def _checked(self):
        self.checking = False
        self._engine.master_side.update_wanted()

    def check_server(self, versions):
        """cloudpickle is in no list as a rule, but everything travels by it."""
        if not self._engine.embedded and versions.get("cloudpickle"):      # before a slot is opened
            self._compare([Pin("cloudpickle", versions["cloudpickle"])])

    def show_progress(self, line):
        """Each line is shown on a terminal; the log has one of them, if it takes long."""
        self._line = line
        show_progress(f"clupy: {line}")
        if self._telling is None:
            self._telling = self._engine.loop.call_later(TELL_TIME, self._tell_progress)

    def _tell_progress(self):
        if self._engine.backlog.queued and not (sys.stderr and sys.stderr.isatty()):
            clupy.log.warning("calls wait (%s) until their libraries are there: %s", self._engine.backlog.queued, self._line)

    def clear_progress(self):
        if self._telling:
            self._telling.cancel()
            self._telling = None
            show_progress("")

    # -- servers that cannot have them

    def cannot_be_built(self, link, why):
        """Use other servers; if the next share names none, the calls hear of it."""
        link.broken = why
        link.draining = True                      # what runs there, in the environment before, goes on
        self._engine.pool.balance()
        self.leave_broken(link)

    def leave_broken(self, link):
        """Leave a server for good on which our libraries cannot be had, and nothing runs any more."""
        if link.broken and not link.slots and link.connection:
            link.connection.close()

    def opened(self, link):
        """A slot is open there, so they can be had."""
        link.broken = None
        self.clear_progress()

    def judge(self, share):
        """The outcome of the calls where no server is left that might have our libraries."""
        broken = {id: link.broken for id, link in self._engine.pool.links.items() if link.broken}
        if broken and not any(slots or id not in broken for id, (_, slots, _) in share.items()):
            why = next(iter(broken.values()))
            self._engine.feeder.fail_waiting(DependencyError(why.partition("\n")[0], why.split("\n")[1:]))


# ==== What a client shows =====================================================
# Of its calls, on its own terminal and in a file: what they print, how far they are, and where and when they ran.

def write_text(stream, text):
    """Write it at one stroke, so that what other threads print does not come in between.

    Below the text layer where there is one below: up to 3.12.3 a write that finds its buffer full loses what another
    thread writes meanwhile (python/cpython#119506)."""
    stream.flush()
    if buffer := getattr(stream, "buffer", None):
        buffer.write(text.encode(stream.encoding, "backslashreplace"))
    else:
        stream.write(text)
    stream.flush()


def is_terminal(stream):
    return bool(getattr(stream, "isatty", bool)())


def _marked(mark, line):
    """The line with the mark at its beginning, and at every beginning to which a carriage return takes it back."""
    return re.sub(r"[^\r]+", lambda text: mark + text[0], line) or mark


class Screen:
    """Standard output and error: lines of many writers, of which the last may be unfinished; any thread may write.

    On a terminal an unfinished line gives way to whatever comes next, and is there again, whole, as soon as it goes on.  What
    is no terminal cannot take anything back: there it is ended, and begun again."""

    def __init__(self):
        self._lock = threading.Lock()
        self._unfinished = {}                     # {(stream, mark): the line, from where it was rewritten last}
        self._standing = {}                       # {stream, or "terminal": whose unfinished line ends at the cursor}

    def show(self, stream, mark, text):
        """What one writer, known by its mark, wrote next to "out" or "err"; its lines begin with the mark."""
        target = sys.stderr if stream == "err" else sys.stdout
        if target is None:
            return
        with self._lock:
            try:
                with _without_bars(target):
                    write_text(target, self._next(is_terminal(target), (stream, mark), text))
            except (OSError, ValueError) as error:      # a closed pipe or stream: output ends, calls do not
                log.debug("output of %s cannot be shown: %s", mark, error)

    def _next(self, terminal, writer, text):
        """What to write so that this shows."""
        stream, mark = writer
        place = "terminal" if terminal else stream
        before, standing = self._unfinished.pop(writer, ""), self._standing.pop(place, None)
        *lines, rest = (before + text).split("\n")
        shown = "".join([_marked(mark, line) + "\n" for line in lines])
        last = re.search(r"\r?[^\r]*\r*$", rest)[0]
        if rest:
            self._unfinished[writer], self._standing[place] = last, writer
        if terminal:
            room = max(1, shutil.get_terminal_size().columns - 1 - len(mark))
            if text == "\n" and standing == writer and "\r" not in before and len(before) <= room:
                return text                       # it stands there, whole; the program may have written behind it
            return "\r\x1b[K" * bool(standing) + shown + (mark + last.strip("\r")[-room:] if rest else "")
        shown += _marked(mark, rest) if rest else ""
        if standing == writer:
            return shown[len(_marked(mark, before)):]
        return ("\r" if self._unfinished.get(standing, "").startswith("\r") else "\n") * bool(standing) + shown


screen = Screen()
os.register_at_fork(after_in_child=screen.__init__)


def _without_bars(target):
    """A block in which no bar of tqdm's stands where something is written."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    return tqdm.external_write_mode(target) if tqdm else contextlib.nullcontext()


class Output:
    """What calls print, in the client's own output, by a thread that may block.

    The thread is there before the first slot: when the interpreter ends, and the last lines come, none can be started."""

    def __init__(self, engine):
        self._engine, self._entries, self._thread = engine, queue.SimpleQueue(), None

    @property
    def started(self):
        return self._thread is not None or not self._engine.settings.output

    def start(self):
        if self._thread is None and self._engine.settings.output:
            thread = threading.Thread(target=self._print, name="clupy-output", daemon=True)
            thread.start()                        # raises when the interpreter ends: nothing is left to join
            self._thread = thread

    def show(self, connection, server, entries, dropped, size):
        """Show [(pid, stream, text, whether more comes at once)] of a server's host, and tell it that so many bytes are seen."""
        self._entries.put((connection, server, entries, dropped, size))

    def end(self):
        """No more will come."""
        self._entries.put(None)

    def join(self):
        """Wait until all is shown, for CLOSE_TIME at most."""
        if self._thread:
            self._thread.join(CLOSE_TIME)

    def _print(self):
        begun = {}                                # {(server, pid, stream): a line of which more comes at once}
        for connection, server, entries, dropped, size in iter(self._entries.get, None):
            for pid, stream, text, more in entries:
                text = begun.pop((server, pid, stream), "") + text
                if more:
                    whole, end, begun[server, pid, stream] = text.rpartition("\n")
                    text = whole + end
                if text:
                    screen.show(stream, f"[{server} {pid}] ", text)
            if dropped:
                screen.show("err", f"[{server}] ", f"... {clupy.amount(dropped, 'line')} not shown: more than "
                                                   f"{UNSEEN_OUTPUT >> 10} KiB were waiting\n")
            self._engine.soon(connection.send, "seen", size)


# ---- how far they are

def progress(wanted, total, look=None, futures=(), unit="calls"):
    """A block in which the progress of these futures, or of what `look` says, is shown; total: None if it is not known.

    wanted: "always"; or another true value, which means: if standard error is a terminal or a notebook's."""
    looked_at = wanted == "always" or is_terminal(sys.stderr) or type(sys.stderr).__module__.startswith("ipykernel")
    return Progress(look or _Calls(futures).look, total, unit) if looked_at else contextlib.nullcontext()


class _Calls:
    """Looks at futures, of which a look passes over those that it saw done."""

    def __init__(self, futures):
        self._open, self._done, self._failed = futures, 0, 0

    def look(self):
        """(done, failed, slots that run some)"""
        still, slots = [], set()
        for future in self._open:
            if future.completed:
                self._done += 1
                self._failed += _has_failed(future)
            else:
                still.append(future)
                if future._state == clupy.RUNNING:                     # or sent, behind one that runs in the same slot
                    slots.add(future._slot)
        self._open = still
        return self._done, self._failed, len(slots)


def _has_failed(future):
    """Whether a call that is done has no result; not as somebody who looks, and without unpickling anything."""
    packed = future._packed
    return not packed[0] if packed else future._exception is not None


class Progress:
    """Shows how far something is, by a thread of its own, until its block ends: as tqdm's bar where tqdm is installed."""

    def __init__(self, look, total, unit):
        self._look, self._total, self._unit = look, total, unit
        self._over = clupy.Flag()
        self._width = 0                           # of the line that stands
        self._thread = threading.Thread(target=self._run, name="clupy-progress", daemon=True)

    def __enter__(self):
        self._began, (self._done_before, *_) = time.monotonic(), self._look()
        try:
            from tqdm.auto import tqdm
        except ImportError:
            self._bar = None
        else:
            self._bar = tqdm(total=self._total, initial=self._done_before, unit=f" {self._unit}", dynamic_ncols=True)
        try:
            with clupy.undisturbed():
                self._thread.start()
        except BaseException:                     # else nobody would end it
            self._over.set()
            raise

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        if self._bar is None:
            screen.show("err", "", "\n")
        else:
            self._bar.close()

    def _run(self):
        over, took = False, 0.0
        while not over:
            over = self._over.wait(max(PROGRESS_TIME, 20 * took))      # at a million calls a look takes 0.2 s
            looked = time.monotonic()
            self._show(*self._look())
            took = time.monotonic() - looked

    def _show(self, done, failed, running):
        words = f"{failed} failed, {running} running"
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(words)
            return
        rate = (done - self._done_before) / max(time.monotonic() - self._began, 1e-9)
        text = f"\r{done}/{'?' if self._total is None else self._total} {self._unit}, {words}, {rate:.1f}/s"
        if rate and self._total is not None:
            text += f", {datetime.timedelta(seconds=round((self._total - done) / rate))} left"
        screen.show("err", "", text.ljust(self._width))
        self._width = len(text)


# ---- where and when they ran

class Timeline:
    """A block of which a file shows all calls that ended in it: Chrome's trace events, with a row for each worker.

    The engines of this process tell it what they hear; what has no time here has it by time.monotonic()."""

    def __init__(self, path):
        self._path = path
        self._made = {}                           # {call: when its engine took it}, as long as it has no outcome
        self._ends = {}                           # {(server, pid): when its last bar ends}
        self._events = []

    def __enter__(self):
        if clupy.BaseEngine.timeline is not None:
            raise RuntimeError("a timeline is being written already, to " + str(clupy.BaseEngine.timeline._path))
        self._file = open(self._path, "w", encoding="utf-8")           # now: at the end it would be too late to hear why not
        self._pid = os.getpid()
        self._began = time.monotonic()
        clupy.BaseEngine.timeline = self
        return self

    def __exit__(self, *_):
        if os.getpid() != self._pid:              # a forked child: the file is its parent's
            return
        clupy.BaseEngine.timeline = None
        with self._file:
            json.dump({"traceEvents": self._finished(), "displayTimeUnit": "ms"}, self._file)

    def made(self, calls):
        """These wait from now on."""
        self._made.update(dict.fromkeys(calls, time.monotonic()))

    def ran(self, slot, ended, now, seconds):
        """A worker has ended these [(call, outcome)], in this order; seconds: what all of them took, None: not known.

        Of several that are heard of at once each has the part of the time that was expected of it."""
        row, expected = (slot.link.name, slot.pid), sum(call._cost for call, _ in ended) or 1.0
        for left, (call, outcome) in zip(range(len(ended) - 1, -1, -1), ended):
            begin = max(call._sent_at, self._ends.get(row, self._began))       # it runs one call at a time
            took = None if seconds is None else seconds * call._cost / expected
            end = min(begin + (took or 0.0), now) if left else now
            self._ends[row] = end
            made = self._made.get(call) if outcome == "lost" else self._made.pop(call, None)
            name = call._function.name + (f" ({outcome})" if outcome != "succeeded" else "")
            self._add(row, begin, name, ph="X", dur=self._us(end) - self._us(begin), args={
                "wait": made and round(call._sent_at - made, 6), "run": took and round(took, 6),
                "server": row[0], "worker": row[1], "try": call._tries + 1, "outcome": outcome})

    def over(self, slot, how, found):
        """A slot ended, and what `verdicts` says of its calls: [(call, (verdict, charged, spared))]."""
        now, names = time.monotonic(), {"done": "cancelled", "timeout": "timed out", "died": "worker died", "again": "lost"}
        self.ran(slot, [(call, names[verdict]) for call, (verdict, charged, _) in found if charged], now, None)
        if how["why"] in (Why.DIED, Why.TIMEOUT, Why.CANCELLED, Why.LOST) and slot.pid:
            row = slot.link.name, slot.pid
            self._ends.setdefault(row, now)
            self._add(row, now, f"worker {how.get('reason', how['why'])}", ph="i", s="t")

    def _add(self, row, when, name, **more):
        self._events.append({"name": name, "ts": self._us(when), "pid": row[0], "tid": row[1], **more})

    def _us(self, when):
        return int((when - self._began) * 1e6)    # whole ones: what is rounded might overlap

    def _finished(self):
        """The events, with numbers for servers, as viewers want them, and the names of all rows."""
        servers = {name: number for number, name in enumerate(sorted({name for name, _ in self._ends}), 1)}
        names = [{"name": "process_name", "ph": "M", "pid": number, "args": {"name": name}} for name, number in servers.items()]
        names += [{"name": "thread_name", "ph": "M", "pid": servers[server], "tid": pid, "args": {"name": f"{server} {pid}"}}
                  for server, pid in self._ends]
        return names + [{**event, "pid": servers[event["pid"]]} for event in self._events]


# ==== Masters that stand in for each other ===================================
# With `zookeeper` configured several masters elect one that leads.  The others answer who that is, and know nothing
# else: statements rebuild the tables of whoever leads next.  A leader is sure of its office for two thirds of its
# session from the last time ZooKeeper confirmed it; nobody else can be elected before the whole session is over.

class Leadership:
    """This master's candidature; a daemon thread stands for it, `sure` and `leader` may be asked by any thread."""

    def __init__(self, name, session):
        self.leader = None             # "host:port" of who leads, as far as is known
        self.masters = []              # ... and of all who stand, as the leader sees it
        self.name, self._session = name, session
        self._until = 0.0              # monotonic; sure of leading until then
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._stand, name="clupy-election", daemon=True)
        self._thread.start()

    def sure(self, now):
        """Whether this master leads at `now`, by its own clock: asked before everything it says."""
        return now < self._until

    def _stand(self):
        while not self._stopped.is_set():
            election = clupy.election("clupy master", data=self.name, timeout=LEARN_TIME)
            try:
                with election:
                    self._lead(election)
            except TimeoutError:       # somebody else leads
                leader, self.leader = self.leader, self._ask(election.leader)
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
            self.masters = self._ask(election.candidates) or [self.name]
            self._stopped.wait(self._session / 6)
        self._until = 0.0

    def _ask(self, question):
        try:
            return question()
        except clupy.Unavailable:
            return None

    def close(self):
        """Stand down at once."""
        self._until = 0.0
        self._stopped.set()
        self._thread.join(1.0)
        clupy.close_services()         # ends the session, and so the candidature if the thread still waits


# ==== The page ===============================================================
# What a browser shows of the tables, and what Prometheus reads of them.  It is off unless `status_port` is set, and can
# change nothing.  On loopback, other programs of this machine may read it, but no web page of elsewhere: the Host header
# must name this machine, not a name that somebody has made point here.  On other addresses whoever reads it has to have a
# token that is made of the secret; under TLS, if the master has a certificate.

def reached_at(host, port):
    """The address at which others reach what listens there."""
    return address_text(socket.gethostname() if host in ("0.0.0.0", "::") else host, port)


def leads(master):
    """Whether it is the leader, by its row in the tables."""
    return master["leader"] == master["address"]


def bare_tables(tables):
    """Without what each server has installed, which is much, and the same for long."""
    return {**tables, "servers": {id: {key: value for key, value in row.items() if key != "own"}
                                  for id, row in tables["servers"].items()}}


METRICS = (   # for Prometheus: (whose, None: the cluster's; name, kind, meaning, how its value is read of a row of these)
    (None, "leads", "gauge", "1 where this master leads", lambda tables: leads(tables["master"])),
    (None, "servers", "gauge", "servers that are there", lambda tables: len(tables["servers"])),
    (None, "clients", "gauge", "clients that are there", lambda tables: len(tables["clients"])),
    (None, "faults", "gauge", "faults of the master's libraries", lambda tables: len(tables["faults"])),
    ("servers", "slots", "gauge", "slots that a server has", operator.itemgetter("slots")),
    ("servers", "slots_used", "gauge", "slots that clients hold there", operator.itemgetter("used")),
    ("servers", "draining", "gauge", "1 where a server takes no new slots", operator.itemgetter("draining")),
    ("servers", "server_faults", "gauge", "faults of its libraries", lambda row: len(row["faults"])),
    ("servers", "load", "gauge", "processes that want to run, in the last minute", operator.itemgetter("load")),
    ("servers", "memory_used_bytes", "gauge", "memory in use on its machine", lambda row: (row["memory"] or ["NaN"])[0]),
    ("clients", "slots_wanted", "gauge", "slots that a client could use", operator.itemgetter("wanted")),
    ("clients", "calls_done_total", "counter", "its calls that have an outcome", operator.itemgetter("done")),
    ("clients", "calls_failed_total", "counter", "of these, failed", operator.itemgetter("failed")),
    ("clients", "calls_running", "gauge", "its calls that run", operator.itemgetter("running")),
    ("clients", "calls_waiting", "gauge", "its calls that wait", operator.itemgetter("waiting")))


def metrics_text(tables):
    """The tables as Prometheus reads them."""
    escaped, lines = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"}), []
    for where, name, kind, meaning, read in METRICS:
        lines += [f"# HELP clupy_{name} {meaning}", f"# TYPE clupy_{name} {kind}"]
        for row in tables[where].values() if where else [tables]:
            label = '{%s="%s"}' % (where[:-1], row["name"].translate(escaped)) if where else ""
            value = read(row)
            lines.append(f"clupy_{name}{label} {int(value) if isinstance(value, bool) else value}")
    return "\n".join(lines) + "\n"


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>CluPy</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --back: #f4f5f7; --card: #fff; --text: #1b2230; --soft: #5d6879; --line: #e3e6eb;
        --fill: #dbe6fb; --main: #2a63d4; --good: #16794f; --bad: #c0312b; --wait: #95610a }
@media (prefers-color-scheme: dark) { :root { --back: #12151b; --card: #1b2029; --text: #e6e9ef; --soft: #97a2b4; --line: #2c333f;
        --fill: #2b416b; --main: #7aa7ff; --good: #56c596; --bad: #ff8078; --wait: #e0ad55 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.2rem; max-width: 82rem; font: 15px/1.45 system-ui, sans-serif; color: var(--text);
       background: var(--back); font-variant-numeric: tabular-nums }
header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 1.6rem 0 .5rem }
.soft { color: var(--soft); font-size: .87rem } .bad { color: var(--bad) } .good { color: var(--good) }
.wait { color: var(--wait) }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
.pad { padding: .7rem .9rem } .pad + .pad { border-top: 1px solid var(--line) }
#alarm { margin: .9rem 0 0; border-color: var(--bad); color: var(--bad) }
#sums { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .7rem; margin-top: 1rem }
#sums b { display: block; font-size: 1.55rem; line-height: 1.25 }
table { width: 100%; border-collapse: collapse }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: .82rem }
th, td { padding: .5rem .9rem; border-bottom: 1px solid var(--line); vertical-align: top } tr:last-child td { border-bottom: 0 }
.number { text-align: right } td div, .words { overflow-wrap: anywhere }
.bar { position: relative; min-width: 6.5rem; padding: 0 .5rem; border-radius: 5px; background: var(--back); overflow: hidden;
       white-space: nowrap }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--fill) } .bar span { position: relative }
.rate { display: flex; gap: .7rem; align-items: center } .rate b { font-weight: 400; min-width: 3.2rem; text-align: right }
svg { width: 10rem; height: 1.9rem; background: var(--back); border-radius: 5px }
svg path { fill: var(--fill); stroke: var(--main); stroke-width: 1.2; vector-effect: non-scaling-stroke }
code { font: .87rem ui-monospace, monospace } .stale { opacity: .55 }
@media (max-width: 46rem) {
  body { padding: .8rem } thead { display: none } tr { display: grid; grid-template-columns: repeat(6, 1fr); gap: .45rem .8rem;
         padding: .7rem .9rem; border-bottom: 1px solid var(--line) } tr:last-child { border-bottom: 0 }
  td { display: block; padding: 0; border: 0; grid-column: span 2; min-width: 0 } td.wide { grid-column: span 6 }
  td.half { grid-column: span 3 } td.number { text-align: left } td::before { content: attr(data-is); display: block;
         color: var(--soft); font-size: .78rem } td.wide.first::before { content: none } td.rest { grid-column: span 4 }
  svg { flex: 1 } .rate b { text-align: left } .bar { min-width: 0 }
  #sums { grid-template-columns: 1fr 1fr 1fr; gap: .5rem } #sums .pad { padding: .5rem .6rem } #sums b { font-size: 1.25rem } }
</style>
<header><h1>CluPy</h1><span id="where" class="soft words"></span></header>
<p id="alarm" class="box pad" role="alert" hidden></p>
<main><div id="sums"></div>
<h2>Servers</h2><div class="box" id="servers"></div>
<h2>Clients</h2><div class="box" id="clients"></div>
<h2>Libraries</h2><div class="box" id="libraries"></div>
<h2>Masters</h2><div class="box" id="masters"></div></main>
<script>
"use strict";
// What comes from the cluster is text: it is given to text nodes and properties, never read as HTML.
const at = id => document.getElementById(id);
const make = (tag, look, ...parts) => {
  const made = document.createElement(tag);
  made.className = look;
  made.append(...parts);
  return made;
};
const soft = text => make("div", "soft", text);
const count = (n, digits = 0) => n.toLocaleString("en", {maximumFractionDigits: digits});
const memory = bytes => count(bytes / 2 ** 30, 1);
const sum = values => values.reduce((all, one) => all + one, 0);
const rate = row => row.silent > 6 ? 0 : row.rates.at(-1) ?? 0;
const span = s => s < 120 ? `${count(s)} s` : s < 7200 ? `${count(s / 60)} min` : s < 172800 ? `${count(s / 3600)} h`
                                            : `${count(s / 86400)} days`;

function bar(used, all, text) {
  const part = make("i", "");
  part.style.width = `${Math.min(100, all ? 100 * used / all : 0)}%`;
  return make("div", "bar", part, make("span", "", text));
}

function picture(rates, room = 90) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"), most = Math.max(...rates, 1e-9);
  const path = document.createElementNS(svg.namespaceURI, "path"), title = document.createElementNS(svg.namespaceURI, "title");
  const points = rates.map((one, n) => `${room - rates.length + n + 1},${(29 - 27 * one / most).toFixed(1)}`);
  title.textContent = `calls done a second, the last ${span(2 * rates.length)}; at most ${count(most, 1)}`;
  path.setAttribute("d", points.length ? `M${room - rates.length + 1},30 L${points.join(" L")} L${room},30` : "");
  svg.setAttribute("viewBox", `0 0 ${room} 31`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.append(title, path);
  return svg;
}

// heads: [[title, classes]]; rows: [[content of a cell]]
function table(place, heads, rows, otherwise) {
  const line = cells => make("tr", "", ...cells.map((content, n) => {
    const cell = make("td", heads[n][1], content ?? "");
    cell.dataset.is = heads[n][0];
    return cell;
  }));
  const head = make("thead", "", make("tr", "", ...heads.map(([title, look]) => make("th", look, title))));
  at(place).replaceChildren(rows.length ? make("table", "", head, make("tbody", "", ...rows.map(line)))
                                        : make("div", "pad soft", otherwise));
}

function several(...parts) {
  const all = document.createDocumentFragment();
  all.append(...parts);
  return all;
}

// "user@host program pid" -> [user@host, program, pid]
const client = name => name.match(/^(\S+) (.*) (\d+)$/)?.slice(1) ?? ["", name, "?"];
const byName = rows => Object.values(rows).sort((a, b) => a.name.localeCompare(b.name, "en", {numeric: true}));

function show({master, servers, clients, environments, environment, faults}) {
  servers = byName(servers);
  clients = byName(clients);
  const running = sum(clients.map(row => row.running)), waiting = sum(clients.map(row => row.waiting));
  document.title = running + waiting ? `${count(running)} running, ${count(waiting)} waiting - CluPy` : "CluPy";
  at("where").textContent =
    `master ${master.address}, up ${span(master.uptime)}, CluPy ${master.version}, Python ${master.python}`;
  at("sums").replaceChildren(...[
    ["servers", count(servers.length)],
    ["slots in use", `${sum(servers.map(row => row.used))} of ${sum(servers.map(row => row.slots))}`],
    ["clients", count(clients.length)], ["calls running", count(running)], ["calls waiting", count(waiting)],
    ["calls a second", count(sum(clients.map(rate)), 1)],
  ].map(([what, value]) => make("div", "box pad", make("b", "", value), make("span", "soft", what))));
  table("servers", [["Server", "wide first"], ["Slots", ""], ["Load", ""], ["Memory, GB", ""], ["Runs", "wide"],
                    ["Python", "half"], ["State", "half"]],
    servers.map(row => [
      several(make("div", "", row.name), soft(row.address)), bar(row.used, row.slots, `${row.used} of ${row.slots}`),
      bar(row.load, row.cores, `${count(row.load, 1)} of ${row.cores}`),
      row.memory ? bar(row.memory[0], row.memory[1], `${memory(row.memory[0])} of ${memory(row.memory[1])}`) : "",
      several(...Object.entries(row.runs).map(([name, n]) => {
        const [who, program] = client(name);
        return make("div", "", `${count(n)} × ${program} `, make("span", "soft", who));
      }), Object.keys(row.runs).length ? "" : soft("nothing")),
      several(row.python, soft(row.environment ?? "own libraries")),
      row.draining ? make("span", "wait", "draining") : row.building ? make("span", "wait", "building libraries")
                   : make("span", "good", "ready")]),
    "No server is there. Start one on each machine that is to run calls: python -m clupy serve --master HOST");
  table("clients", [["Client", "wide first"], ["Calls a second", "wide"], ["Done", "number"], ["Failed", "number"],
                    ["Running", "number"], ["Waiting", "number"], ["Slots", "rest"]],
    clients.map(row => {
      const [who, program, pid] = client(row.name);
      return [several(make("div", "", program), soft(`${who}, pid ${pid}`),
                      row.silent > 6 ? make("div", "wait", `silent for ${span(row.silent)}`) : ""),
        make("div", "rate", make("b", "", count(rate(row), 1)), picture(row.rates)), count(row.done),
        make("span", row.failed ? "bad" : "", count(row.failed)), count(row.running), count(row.waiting),
        several(`${row.share} `, make("span", "soft", `of ${count(row.wanted)} wanted`))];
    }), "No program is connected.");
  const wrong = [...faults.map(text => ["master", text]), ...servers.flatMap(row => row.faults.map(text => [row.name, text]))];
  const lists = Object.entries(environments).map(([hash, pins]) => {
    const names = servers.filter(row => row.environments.includes(hash)).map(row => row.name);
    return make("div", "pad words", soft(`${hash}${hash == environment ? ", the cluster's," : ""} on ${names.join(", ")}`),
                make("code", "", pins.map(([name, version]) => `${name} ${version}`).join(",  ")));
  });
  at("libraries").replaceChildren(
    ...wrong.map(([where, text]) => make("div", "pad bad words", `${where}: ${text}`)), ...lists,
    ...lists.length ? [] : [make("div", "pad soft", "No list is built: calls have what each server's own Python has, which "
                                                    + "`python -m clupy libraries` shows.")]);
  const masters = [...new Set([master.address, ...master.masters, ...master.leader ? [master.leader] : []])];
  at("masters").replaceChildren(...masters.map(address => make("div", "pad", `${address} `,
    make("span", address == master.leader ? "good" : "soft", address == master.leader ? "leads" : "stands by"))));
}

function alarm(text) {
  at("alarm").hidden = !text;
  at("alarm").textContent = text;
  document.querySelector("main").classList.toggle("stale", !!text);
}

let seen = "";
async function look() {
  try {
    const answer = await fetch("status.json" + location.search, {signal: AbortSignal.timeout(8000)});
    if (!answer.ok) throw new Error(`it says ${answer.status}`);
    const tables = await answer.json();
    show(tables);
    seen = ` What you see is of ${new Date().toLocaleTimeString()}.`;
    const {address, leader} = tables.master;
    alarm(address == leader ? "" : `This master stands by and knows nothing: ${leader ?? "no other that is known"} leads.`);
  } catch (error) {
    alarm(`The master does not answer (${error.message}).${seen}`);
  }
  setTimeout(look, 2000);
}
look();
</script></html>
"""

ANSWERS = {   # path: (type, what a function of the tables gives)
    "/": ("text/html", lambda tables: PAGE),
    "/status.json": ("application/json", lambda tables: json.dumps(bare_tables(tables))),
    "/metrics": ("text/plain; version=0.0.4", metrics_text)}
HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
                                      "style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"}


class _Request(http.server.BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    timeout = PAGE_TIME                # of each read and write
    server_version, sys_version = "CluPy", ""

    def do_GET(self):
        path, _, query = self.path.partition("?")
        page = self.server.page
        if not page.allows(self.headers.get("Host", ""), query):
            self._answer(403, "text/plain", "The address lacks its token, or is not this machine's; `python -m clupy status` "
                                            "shows the right one.\n")
        elif path not in ANSWERS:
            self._answer(404, "text/plain", f"There is {', '.join(ANSWERS)}.\n")
        else:
            kind, make = ANSWERS[path]
            self._answer(200, kind, make(page.tables()))

    def _answer(self, status, kind, text):
        body = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, form, *args):
        log.debug("the page, asked by %s: " + form, self.client_address[0], *args)


class _Web(http.server.ThreadingHTTPServer):
    """The threads of the page: one that accepts, and one for each request."""

    daemon_threads = False             # so that server_close waits for them
    request_queue_size = 128           # the 5 of HTTPServer let others wait for seconds

    def __init__(self, address, page):
        self.page, self.sockets = page, set()      # of requests under way; added by the thread that accepts
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Request)

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)   # HTTPServer's asks DNS for a name, which may take long

    def verify_request(self, sock, _):
        return len(self.sockets) < PAGE_REQUESTS   # else it is closed

    def process_request(self, sock, address):
        self.sockets.add(sock)
        super().process_request(sock, address)

    def shutdown_request(self, sock):
        self.sockets.discard(sock)
        super().shutdown_request(sock)

    def handle_error(self, _, address):
        gone = isinstance(sys.exception(), (OSError, concurrent.futures.CancelledError))       # the browser, or the loop
        log.log(logging.DEBUG if gone else logging.ERROR, "no page for %s", address[0], exc_info=True)

    def close(self):
        self.shutdown()
        for sock in self.sockets.copy():
            with contextlib.suppress(OSError):     # it has ended just now
                sock.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Page:
    """What a browser is shown, at `url`, until close().  Made in the loop; close() is for another thread, while the loop runs.

    address: (host, port), host "": loopback; key: of which the token is made; status: a coroutine function, the tables."""

    def __init__(self, address, key, tls, status):
        host, port = address[0] or "127.0.0.1", address[1]
        self._loop, self._status = asyncio.get_running_loop(), status
        try:
            self._web = _Web((host, port), self)
        except OSError as error:
            raise ConfigurationError(f"status_port is {address_text(host, port)}, but there cannot be listened: "
                                     f"{error.strerror}; --status-port takes another address") from None
        host, port = self._web.server_address[:2]
        self._token = "" if ipaddress.ip_address(host).is_loopback else proof(key, b"page").hex()[:32]
        if tls and self._token:
            self._web.socket = tls.wrap_socket(self._web.socket, server_side=True, do_handshake_on_connect=False)
        self._where = f"http{'s' if tls and self._token else ''}://{reached_at(host, port)}/"
        self.url = self._where + (f"?token={self._token}" if self._token else "")
        self._thread = threading.Thread(target=self._web.serve_forever, args=(0.1,), name="clupy-page", daemon=True)
        self._thread.start()
        log.info("the status page is at %s%s", self._where, "; `python -m clupy status` shows its token" if self._token else "")

    def allows(self, host, query):
        """Whether who asks for this host, with this query, may see it."""
        if self._token:                            # which nobody's web page knows, whatever its host
            given = urllib.parse.parse_qs(query).get("token", [""])[0]
            return hmac.compare_digest(given.encode(), self._token.encode())
        return re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host) is not None

    def tables(self):
        """The tables as they are now; for the threads of requests."""
        return asyncio.run_coroutine_threadsafe(self._status(), self._loop).result(PAGE_TIME)

    def close(self):
        self._web.close()
        self._thread.join()


# ==== Master =================================================================

class Master:
    """Connections and what they say; `tables` knows who is there, `lists` which libraries.  For the loop that made it."""

    def __init__(self, settings, secret, dependencies=None):
        self.settings, self.secret = settings, secret
        self.started = time.time()
        self.given = sorted(settings.given & set(clupy.SERVICE_KEYS))     # services that somebody configured
        self.tables = Tables()
        self.lists = Lists(dependencies, settings.sync_interval, self._libraries_changed)
        self.leadership = None         # Leadership; None: there is no other master
        self._decision = None          # the timer of the next _decide
        self._decided = 0.0
        self._asked = set()            # ids of clients that are answered by the next decision
        self._woke = time.monotonic()  # when this process ran last
        self._names = {}               # {Connection: ("server" or "client", id), or None until it has said that}
        self._tasks = Tasks("the master")
        self._listener = Listener(settings.listen or ("", PORT), self._greet, settings)
        self.address = self._listener.address
        self._tasks.repeat(WAKE_TIME, self._now)
        self.name = reached_at(*self.address)
        self.page = settings.status_port and Page(settings.status_port, secret, settings.admit_tls, self._status)
        log.info("master listens on %s", self._listener.where)

    def __repr__(self):
        return f"<Master {self.address[1]} {len(self.tables.servers)} servers, {len(self.tables.clients)} clients>"

    async def close(self):
        await self._listener.close()
        if self.page:
            await asyncio.to_thread(self.page.close)
        if self.leadership:
            await asyncio.to_thread(self.leadership.close)
        await self._tasks.close()
        await self.lists.close()
        for connection in list(self._names):
            connection.close()
        if self._decision:
            self._decision.cancel()

    def descriptors(self):
        return self._listener.descriptors()

    def _now(self):
        """The time by which others are judged: if this process was stopped, their clocks start anew."""
        now = time.monotonic()
        if now - self._woke > WAKE_TIME + 1.0:
            self.tables.restart_clocks(now)
        self._woke = now
        return now

    async def _greet(self, sock, peer, role, preambles):
        if role != TO_MASTER:
            raise ProtocolError("this is a master, and it wants a server; is the port right?")
        clupy.tune(sock)
        return self._serve(await admit(sock, peer, preambles, self.secret, self.settings))

    async def _serve(self, connection):
        self._names[connection] = None
        try:
            await connection.serve(self)
        finally:
            self.lists.forget(connection)
            name = self._names.pop(connection)
            if name and (row := self.tables.drop(name[1], connection)):
                if name[0] == "client":
                    log.info("client %s is gone: %s", row.name, connection.why)
                elif row.usable:
                    log.warning("server %s is lost: %s", row.facts["name"], connection.why)
                else:
                    log.info("server %s has ended", row.facts["name"])
                self._change()

    # -- leading

    def stand(self, leadership):
        """Be one of several masters, from now on."""
        self.leadership = leadership
        self._tasks.repeat(WATCH_TIME, self._watch_leadership)

    def _leads(self, connection):
        """Whether this master leads; if not, the peer is told who does."""
        if self.leadership is None or self.leadership.sure(time.monotonic()):
            return True
        leader = self.leadership.leader
        connection.send("leader", clupy.parse_address(leader) if leader and leader != self.leadership.name else None)
        return False

    def _watch_leadership(self):
        """Stand down as soon as we are not sure: who is connected looks for the next leader."""
        if self._names and not self.leadership.sure(time.monotonic()):
            self.tables.clear()
            for connection in [connection for connection, name in self._names.items() if name]:
                self._leads(connection)
                connection.close()

    # -- messages

    def on_server(self, connection, id, address, slots, held, facts):
        if not self._leads(connection):
            return
        host, port = address
        peer, own = connection.hosts
        if not host:                               # it did not say where it is: where it came from
            host = None if peer == own or peer in ("127.0.0.1", "::1") else peer
        row, before = ServerRow((host, port), slots, held, facts, connection), self.tables.servers.get(id)
        if before is None:
            log.info("server %s is here, from %s: %s", facts["name"], connection.peer, clupy.amount(slots, "slot"))
            if facts["python"] != clupy.PYTHON_VERSION:
                log.info("server %s runs Python %s, this master %s", facts["name"], facts["python"], clupy.PYTHON_VERSION)
        elif before.usable and not row.usable:
            log.info("server %s drains: it takes no new slots", facts["name"])
        self._names[connection] = "server", id
        changed = self.tables.put_server(id, row)
        self._send_cluster(row)
        if changed:
            self._change()

    def on_client(self, connection, id, name, wanted, unreachable, own, calls):
        if not self._leads(connection):
            return
        if own and own[1]:
            self.lists.hear(connection, own[1])
        if id not in self.tables.clients:
            log.info("client %s is here, from %s", name, connection.peer)
        self._names[connection] = "client", id
        if self.tables.put_client(id, connection, name, wanted, unreachable, own is not None, calls, time.monotonic()):
            self._asked.add(id)
            self._change()
        else:
            self._send_share(id)

    def on_status(self, connection):
        if self._leads(connection):
            connection.send("tables", self.status())

    def status(self):
        """All that is known, as `python -m clupy status --json` and the page have it."""
        environments = {hash for row in self.tables.servers.values() for hash in row.facts["environments"]}
        leadership = self.leadership
        return {"master": {"address": self.name, "python": clupy.PYTHON_VERSION, "version": clupy.__version__,
                           "uptime": time.time() - self.started, "time": time.time(), "page": self.page and self.page.url,
                           "leader": leadership.leader if leadership else self.name,
                           "masters": leadership.masters if leadership else [self.name]},
                **self.lists.status(environments), **self.tables.status(time.monotonic())}

    async def _status(self):
        return self.status()

    # -- statements to servers and clients

    def _services(self):
        services = {key: getattr(self.settings, key) for key in clupy.SERVICE_KEYS}
        return {**services, "given": self.given, "reached": [key for key, value in services.items() if value in clupy._reached]}

    def _send_cluster(self, row):
        row.connection.send("cluster", self._services(), self.tables.silent(self._now()),
                            self.lists.for_server(row.connection))

    def _send_share(self, id, before=()):
        row = self.tables.clients[id]
        row.connection.send("share", self.tables.share_of(id, before), self._services(),
                            self.lists.for_client(row.connection, row.has_list), (*self.tables.size(), row.wanted))

    def _libraries_changed(self, connection):
        name = self._names.get(connection)
        if name and name[1] in self.tables.clients:
            self._send_share(name[1])
        elif connection is None:
            for row in self.tables.servers.values():
                self._send_cluster(row)
            self._asked.update(self.tables.clients)
            self._change()

    # -- decisions

    def _change(self):
        """Decide anew, at once if the last time is GATHER_TIME ago."""
        self._decide_in(max(0.0, self._decided + clupy.GATHER_TIME - time.monotonic()))

    def _decide_in(self, seconds):
        if self._decision is None:
            self._decision = asyncio.get_running_loop().call_later(seconds, self._decide)

    def _decide(self):
        self._decision = None
        now = self._now()
        if self.leadership and not self.leadership.sure(now):
            return
        self._decided, before = now, {}
        if self.tables.servers and self.lists.resolution is not None:     # else what is open is kept: who gave it may return
            before = self.tables.decide(now)
            if self.tables.starving():             # slots pass on in turn
                self._decide_in(TURN_TIME / 2)
        asked, self._asked = self._asked, set()
        for id, row in self.tables.clients.items():
            if id in asked or row.share != before.get(id, row.share):
                self._send_share(id, before.get(id, ()))


def _reach_redis(ended):
    """Ask Redis until it has answered once, or `ended`: then its address is right, and clients and workers wait for it with
    patience; a typing error is told here first.  ZooKeeper has answered whoever leads."""
    said = False
    while not ended.is_set():
        try:
            clupy._retried(lambda client: client.ping())
            return
        except Exception as error:                 # the thread's edge: no module, no answer, no password
            if not said:
                log.warning("of the services that this master names, one has not answered it: %s", error)
            said = True
        ended.wait(clupy.FIRST_CONTACT)


async def run(settings, secret):
    """Be a master until SIGTERM; with `zookeeper` configured, one of several."""
    clupy.raise_descriptor_limit()                 # each server and client is one
    ended = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.cancel)
    master = Master(settings, secret, os.path.abspath("clupy.master.dependency.yaml"))
    clupy.use_services({key: getattr(settings, key) for key in clupy.SERVICE_KEYS} | {"given": master.given})
    over = threading.Event()
    if settings.redis:
        threading.Thread(target=_reach_redis, args=(over,), name="clupy-redis", daemon=True).start()
    if settings.zookeeper:
        master.stand(Leadership(master.name, settings.session))
    try:
        await ended
    except asyncio.CancelledError:
        log.info("ending")
    finally:
        over.set()
        await master.close()


# ==== Status =================================================================

async def ask_master(settings, *question):
    """The leading master's answer to one question. Raises SecretError, VersionMismatch or MasterUnreachable."""
    secret, said, waiting = find_secret(settings), {}, collections.deque(masters_of(settings))
    while waiting:
        address = waiting.popleft()
        if address in said:
            continue
        try:
            kind, answer = await _ask(address, secret, settings, question)
        except (OSError, ClupyError) as error:
            said[address] = error
            continue
        if kind != "leader":
            return answer
        said[address] = clupy.stands_by(answer)
        if answer:
            waiting.appendleft(tuple(answer))
    raise clupy.hopeless(said) or MasterUnreachable(f"no master leads ({clupy.told(said)}); {clupy.advice(said)}")


async def _ask(address, secret, settings, question):
    """One master's answer: (kind, what)."""
    connection = await dial(address, TO_MASTER, secret, settings)
    try:
        async with asyncio.timeout(HANDSHAKE_TIME):
            connection.send(*question)
            return await connection.receive()
    except TimeoutError:
        raise TimeoutError(f"it did not answer within {HANDSHAKE_TIME:g} s") from None
    except EOFError:
        raise ProtocolError("it closed the connection and did not answer; is it about to end?") from None
    finally:
        connection.abort()                         # all is said; TLS would wait for the farewell


def status_text(tables):
    """The master's tables for people."""
    master = tables["master"]
    lines = [f"master {master['address']}  Python {master['python']}  CluPy {master['version']}  "
             f"up {master['uptime']:.0f} s", *([f"page   {master['page']}"] if master["page"] else []), ""]
    lines += _table(("SERVER", "ADDRESS", "SLOTS", "USED", "LOAD", "PYTHON", "ENVIRONMENT", "STATE"),
                    [(row["name"], row["address"], row["slots"], row["used"], f"{row['load']:.1f}", row["python"],
                      row["environment"] or "own", "draining" if row["draining"] else "building" if row["building"] else "ready")
                     for row in tables["servers"].values()])
    lines += [""] + _table(("CLIENT", "ADDRESS", "WANTED", "SLOTS", "HEARD"),
                           [(row["name"], row["address"], row["wanted"], row["share"], f"{row['silent']:.0f} s ago")
                            for id, row in tables["clients"].items()])
    faults = [(f"server {row['name']}", fault) for row in tables["servers"].values() for fault in row["faults"]]
    faults += [("master", fault) for fault in tables["faults"]]
    for where, fault in faults:
        lines += ["", f"fault at {where}: {fault}"]
    return "\n".join(lines)


def _table(head, rows):
    rows = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def libraries_text(tables, installed=installed):
    """What `python -m clupy libraries` prints of the master's tables: servers with the same environment share a list."""
    groups, faults = {}, {}
    for row in tables["servers"].values():
        server = row["name"]
        own = (Pin("python", row["python"]), *(Pin(*item) for item in sorted(row["own"].items())))
        for environment in row["environments"] or [None]:
            pins = tuple(Pin(*pin) for pin in tables["environments"].get(environment, [])) if environment else own
            groups.setdefault((environment, pins), []).append(server)
        for fault in row["faults"]:
            faults[f"{server}: {fault}"] = None
    lines = []
    for (environment, pins), servers in groups.items():
        lines.append(f"environment {environment} on {', '.join(servers)}" if environment else
                     f"the server's own Python on {', '.join(servers)}")
        width = max((len(pin.name) for pin in pins), default=0)
        for pin in pins:
            here = platform.python_version() if pin.name == "python" else installed(pin.name)
            note = "" if here == pin.version else f"   here: {here or 'not installed'}"
            lines.append(f"  {pin.name:{width}}  {pin.version}{note}")
    return "\n".join([*lines, *faults, *(f"master: {fault}" for fault in tables["faults"])])


# ==== Checking ===============================================================
# `python -m clupy check`: what calls need, in the order in which they need it, each said in a line.  Each part is a
# generator of (whether it is right, what was looked at, what was found, and what to do if that is wrong).

CLOCK_LIMIT = 2.0          # seconds that two clocks may differ; less cries of slow networks, more of nothing
CALL_LIMIT = 20.0          # ... and that a call may take to come back, which a worker may have to be started for


def check(settings, connect):
    """Print what is right and what is wrong with the cluster as this machine sees it; whether all is right.

    connect: a function that connects this process to it as a client."""
    right = True
    for ok, what, words in _checked(settings, connect):
        print(f"{'ok' if ok else 'WRONG':5}  {what}: {words}", flush=True)
        right = right and ok
    return right


def _checked(settings, connect):
    try:
        find_secret(settings)
        yield True, "secret", ("the variable CLUPY_SECRET" if os.environ.get("CLUPY_SECRET", "").strip() else
                               clupy.home_path(settings.secret_file))
        asked = time.time()
        tables = asyncio.run(ask_master(settings, "status"))
        answered = time.time()
    except ClupyError as error:
        yield False, "secret" if isinstance(error, SecretError) else "master", str(error)
        return
    yield True, "master", f"{tables['master']['address']} leads, for {tables['master']['uptime']:.0f} s"
    wrong = _clock("the master's", tables["master"]["time"], asked, answered)
    yield not wrong, "clock", wrong or "the master's is as ours"
    yield from _versions(tables)
    yield from _libraries(tables)
    try:
        connect()
        yield from _services()
        yield from _servers(settings, tables["servers"])
    except (ClupyError, ModuleNotFoundError) as error:
        yield False, "client", str(error)


def _clock(whose, theirs, asked, answered):
    """What is wrong with their clock or ours, which was read before and after; "": nothing."""
    off = max(asked - theirs, theirs - answered)
    return "" if off <= CLOCK_LIMIT else (
        f"{whose} is {off:.0f} s {'ahead of' if theirs > answered else 'behind'} ours: certificates fail and logs mislead; "
        "have both set by NTP (timedatectl set-ntp true)")


def _versions(tables):
    """Python's minor version is the same, or the master had not answered."""
    ours = {"CluPy": clupy.__version__, "cloudpickle": installed("cloudpickle")}
    found = [("the master", {"CluPy": tables["master"]["version"]})]
    found += [(row["name"], {"CluPy": row["version"], "cloudpickle": row["cloudpickle"]}) for row in tables["servers"].values()]
    wrong = [f"{where} has {name} {theirs}, we have {ours[name]}" for where, versions in found
             for name, theirs in versions.items() if theirs != ours[name]]
    for words in wrong:
        yield False, "versions", f"{words}: install the same on all machines"
    if not wrong:
        yield True, "versions", f"CluPy {ours['CluPy']}, cloudpickle {ours['cloudpickle']}, Python {clupy.PYTHON_VERSION} here"


def _libraries(tables):
    faults = [f"master: {fault}" for fault in tables["faults"]]
    faults += [f"{row['name']}: {fault}" for row in tables["servers"].values() for fault in row["faults"]]
    for fault in faults:
        yield False, "libraries", fault
    different = differences([Pin(*pin) for pin in tables["libraries"]])
    for name, here, there in different:
        yield False, "libraries", f"{name} is {here} here, {there} in the cluster: python -m pip install {name}=={there}"
    if not faults and not different:
        yield True, "libraries", (f"as here, of {len(tables['libraries'])} in the master's list" if tables["libraries"] else
                                  "the master has no list, calls have what the servers' own Python has")


def _services():
    for name, key, ask in (("Redis", "redis", lambda: clupy._retried(lambda client: client.ping())),
                           ("ZooKeeper", "zookeeper", lambda: clupy._zookeeper().exists("/"))):
        if not (address := getattr(clupy._settings(), key)):
            yield True, name, f"none; who needs it names it in clupy.master.yaml (`{key}:`)"
            continue
        try:
            ask()
            yield True, name, f"{clupy.masked(address)} answers"
        except Exception as error:                 # of any of its library's kinds, and ours say what to do
            yield False, name, str(error)


def _servers(settings, rows):
    """One call on each."""
    if not rows:
        yield False, "servers", "there is none; on each machine that is to run calls: python -m clupy serve --master HOST"
        return
    asked, why = time.time(), "this client got no slot of it"
    try:
        calls = clupy.everywhere(time.time)
    except ClupyError as error:                    # no slot anywhere
        calls, why = {}, str(error)
    for id, row in rows.items():
        name = row["name"]
        try:
            theirs = calls[name].result(CALL_LIMIT) if name in calls else None
        except TimeoutError:
            theirs, why = None, f"one was not back after {CALL_LIMIT:g} s"
        except Exception as error:                 # whatever became of the call
            if type(error) is not ClupyError:      # else its slot went to somebody else
                yield False, name, f"a call failed: {clupy.reason(error)}"
                continue
            theirs, why = None, str(error)
        if theirs is None:
            now = asyncio.run(ask_master(settings, "status"))["servers"]
            yield _untried(now[id], why) if id in now else (True, name, "it has left meanwhile")
        else:
            wrong = _clock("its clock", theirs, asked, time.time())
            yield not wrong, name, wrong or f"a call ran there, {clupy.amount(row['slots'], 'slot')}"


def _untried(row, why):
    """What is the matter with a server on which no call ran."""
    name, address = row["name"], row["address"]
    if row["draining"]:
        return True, name, "it drains and takes no calls"
    try:
        asyncio.run(clupy.connect_socket(*clupy.parse_address(address))).close()
    except OSError as error:
        return False, name, (f"the master knows it, but {address} cannot be reached from here: {error.strerror or error}; is "
                             "a firewall between? If it has another address: serve --listen HOST:PORT")
    if others := sum(count for client, count in row["runs"].items() if client != clupy.client_name()):
        return True, name, f"it can be reached; no call ran, as others have {others} of its {clupy.amount(row['slots'], 'slot')}"
    return False, name, f"no call ran: {why}"
