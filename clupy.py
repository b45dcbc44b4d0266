"""CluPy: wrap a function call, and it runs in a cluster.

    import clupy

    def area(radius):
        return 3.14159 * radius ** 2

    results = [clupy.parallel(area)(r) for r in range(100)]
    clupy.wait_all(results, time_out=10)
    print([r.result() for r in results])

Without any set-up the calls run on the cores of this machine; `python -m clupy master` and `python -m clupy serve
--master HOST` make a cluster of several.  Trusted networks only: whoever knows the secret can run code.

    calls          parallel, map, wait_all, as_completed, everywhere, Future, Executor; connect, close, configure, slots, timeline
    data           put, get, put_many, get_many, add, update, delete, exists, keys, shared, open; counter, queue; publish,
                   subscribe; share, Ref
    coordination   lock, semaphore, election, barrier, event
    errors         ClupyError and what is derived from it; an exception of the user's function keeps its type

One word, one thing, everywhere in the code, the messages, the log and the status page:

    call           one invocation of a wrapped function: function, arguments, options, and a Future
    client         a Python process that makes calls
    master         knows which servers exist and who may use how many slots of which; never sees a call
    server         one node's supervisor: starts, watches, kills and replaces its workers; alone counts its slots
    worker         a process that runs one client's calls, one at a time; never used again for another client
    slot           the capacity of one worker; also the connection between a client and that worker
    share          how many slots of which servers the master leaves to one client for now
    environment    a set of installed libraries, named by the hash of its exact versions
    nested call    a call made inside a call, its parent, which does not use its slot as long as nested calls are unfinished
    statement      what a client or server says to its master of itself, complete each time: it replaces the one before
    payload        the pickle of a value on its way, opened only where the value is used
    session        on the wire, one client's control connection to one server; in ZooKeeper, what holds locks

Seconds are floats, sizes are bytes.

A call's way, in the client, where a thread of CluPy's own runs the engine's event loop:

      caller's threads         |  the engine's thread                                           the cluster
                               |
      parallel(f)(x)           |
         |   capture, pack     |
         v                     |
      Future ---> Engine.submit ---> Backlog ---Feeder---> Slot ------ calls ------------------> worker
         ^                     |        ^                    |  <----- results ---------------- worker
         |                     |        +-- recalled, died --+
         +------ conclude -----|--------- Feeder ------------+
         |                     |
      handlers, callbacks      |     Pool        opens and closes slots as the share says
      (threads that may block) |     ServerLink  control: close, kill; deaths, output <--------> server
                               |     MasterSide  statements out, share in <-------------------> master

- caller's threads  read the function and its arguments, pickle them, make the Future, and write the engine's inbox.
- Backlog           holds the calls that wait, and says which is next for a slot; it knows no connection and no clock.
- Feeder            moves calls into slots, back when their slot cannot run them soon, and out with their outcome.
- Slot              is one TCP connection to one worker, and the calls under way there.
- ServerLink        is one control connection to one server: closes and kills there, hears of deaths and of output.
- MasterSide        says what this client wants, and hears which slots it may use.

Three files, each of which uses only those above it here, but for two lazy imports by which a client embeds a cluster and the
command line starts one:

    clupy.py          what users write; the wire, the engine, data and coordination
    clupy_master.py   who may use what, slots and libraries; who accepts connections; the status page
    clupy_server.py   one node: workers, their modules, environments, processes, the server

This text is the view from above.  The file itself is read from below: each section uses only what stands above it, from
errors and settings over the wire, pickles and Future to the engine and what users call.
"""

from __future__ import annotations

import sys

if sys.platform not in ("linux", "darwin"):
    raise ImportError(f"CluPy supports only Linux and macOS, not {sys.platform}; on Windows, use WSL")

if __name__ == "__main__":                    # `python -m clupy`: run the module under its own name, once
    import clupy
    raise SystemExit(clupy.main())


import abc
import atexit
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import copyreg
import enum
import errno
import functools
import heapq
import hashlib
import hmac
import importlib
import io
import itertools
import json
import linecache
import logging
import math
import numbers
import operator
import os
import pickle
import random
import re
import selectors
import signal
import socket
import struct
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import MutableMapping
from concurrent.futures import BrokenExecutor, CancelledError
from queue import Empty, Full, SimpleQueue


TYPE_CHECKING = False             # as typing has it, which takes 5 ms to import: who checks types takes it for true
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
    from typing import IO, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload
    P = ParamSpec("P")
    Q = ParamSpec("Q")
    R = TypeVar("R")
    T = TypeVar("T")
    Time = float | str | None                      # seconds, "10s", or None: without end

    class Wrapped(Protocol[P, T]):
        """What parallel() makes of a function of P that returns T."""
        func: Callable[P, T]

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Future[T]: ...
        @overload
        def __get__(self, instance: None, owner: Any = None) -> Wrapped[P, T]: ...
        @overload
        def __get__(self: Wrapped[Concatenate[R, Q], T], instance: R, owner: Any = None) -> Wrapped[Q, T]: ...

    class Decorator(Protocol):
        """What parallel(max=2) and the like give."""

        @overload
        def __call__(self, func: Callable[P, Coroutine[Any, Any, T]]) -> Wrapped[P, T]: ...
        @overload
        def __call__(self, func: Callable[P, T]) -> Wrapped[P, T]: ...
else:
    def overload(func):
        """For types alone."""


class _Lazy:
    """A module that is imported at its first use: `import clupy` stays light, and a worker loads asyncio for coroutines alone."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        try:
            module = importlib.import_module(self._name)
        except ModuleNotFoundError as error:
            package = {"yaml": "pyyaml"}.get(error.name, error.name)
            raise ModuleNotFoundError(f"{error}: CluPy needs it here; run: python -m pip install {package}",
                                      name=error.name) from None
        return getattr(module, attribute)


annotationlib = _Lazy("annotationlib")        # from Python 3.14 on, and only used there
argparse = _Lazy("argparse")
ast = _Lazy("ast")
asyncio = _Lazy("asyncio")
cloudpickle = _Lazy("cloudpickle")
clupy_master = _Lazy("clupy_master")          # these two against the order: for libraries, to embed a cluster, and to start one
clupy_server = _Lazy("clupy_server")
ctypes = _Lazy("ctypes")
difflib = _Lazy("difflib")
dis = _Lazy("dis")
fcntl = _Lazy("fcntl")
fnmatch = _Lazy("fnmatch")
inspect = _Lazy("inspect")
joblib = _Lazy("joblib")                      # no library of CluPy's own, as tqdm: who calls register_joblib() has it
kazoo = _Lazy("kazoo.client")
kazoo_errors = _Lazy("kazoo.exceptions")
kazoo_retry = _Lazy("kazoo.retry")
kazoo_states = _Lazy("kazoo.protocol.states")
kazoo_threads = _Lazy("kazoo.handlers.threading")
metadata = _Lazy("importlib.metadata")
mmap = _Lazy("mmap")
pathlib = _Lazy("pathlib")
pkgutil = _Lazy("pkgutil")
platform = _Lazy("platform")
pwd = _Lazy("pwd")
redis = _Lazy("redis")
redis_backoff = _Lazy("redis.backoff")
redis_connection = _Lazy("redis.connection")
redis_retry = _Lazy("redis.retry")
resource = _Lazy("resource")
shutil = _Lazy("shutil")
site = _Lazy("site")
ssl = _Lazy("ssl")
subprocess = _Lazy("subprocess")
sysconfig = _Lazy("sysconfig")
tempfile = _Lazy("tempfile")
threadpoolctl = _Lazy("threadpoolctl")
urls = _Lazy("urllib.parse")
uuid = _Lazy("uuid")
yaml = _Lazy("yaml")

__version__ = "0.1.0"

# Whose is a name?  Those in __all__ are the users', as are `open` and `map`, which `from clupy import *` leaves to Python; what
# opens a file here says io.open.  Others without an underscore are the rooms and what the three files share; those with one
# are details, of which a worker (clupy_server.py) uses some and sets _engine, _sender and _note_session.
__all__ = [
    "connect", "close", "slots", "parallel", "wait_all", "as_completed", "everywhere", "Future", "Executor",      # calls
    "Cluster", "timeline", "register_joblib",
    "configure", "put", "get", "put_many", "get_many", "add", "update", "delete", "exists", "keys", "shared",   # data
    "share", "Ref", "counter", "Counter", "queue", "Queue", "publish", "subscribe", "Subscription",
    "lock", "semaphore", "election", "Election", "barrier", "event", "Event", "LockLost",                       # coordination
    "ClupyError", "ConfigurationError", "SecretError", "VersionMismatch", "ProtocolError", "MasterUnreachable",   # errors
    "WorkerDied", "CallTimeout", "ArgumentFailed", "Closed", "DependencyError", "LibraryMismatch", "Unavailable",
    "RemoteError", "main"]

log = logging.getLogger("clupy")

# Each constant names the price of turning it.
PORT = 7878                       # the master's; users know it, so it never changes
ENGINE_THREAD = "clupy-engine"    # the name of a client's thread
JOB_THREAD = "clupy-job"          # ... and of those that run callbacks and handlers
PYTHON = sys.version_info.minor   # bytecode travels, so client, server and master must have the same
PYTHON_VERSION = "%d.%d.%d" % sys.version_info[:3]       # as messages have it
HANDSHAKE_TIME = 5.0              # a stranger holds a connection no longer; less refuses honest peers on a busy machine
STATEMENT_TIME = 2.0              # between statements; less is traffic, more delays the repair of what was lost
GATHER_TIME = 0.02                # changes are gathered so long; more delays shares, less makes more of them
WORK_AHEAD = 0.005                # seconds of work sent ahead to a worker; more hides latency, but may have to be recalled
MAX_AHEAD = 2000                  # calls under way in one slot, however short; more is a long recall, less idles on tiny ones
MAX_SPARED = 2                    # workers that may die before they begin a call; more kills more of them for a bad argument
MAX_FAILURES = 3                  # in a row, before what fails is given up; more is patience, less is haste
FREE_DESCRIPTORS = 16             # left to the program and to what must be opened later; less starves it, more wastes slots
STALL_TIME = 0.02                 # without a result, before a slot gives back what it has not begun; less recalls in vain
LINGER_TIME = 1.0                 # an idle slot for nested calls stays open so long; less starts more workers, more holds them
DEAD_TIME = 8.5                   # a machine that answers nothing for so long is gone; less loses it with a network's hiccup
LOOK_TIME = 1.0                   # between looks for that: it is noticed in 10 s at most
MASTER_SILENCE = 6.0              # unanswered, before the next of several masters is tried; less leaves one that is busy
RETRY_TIME = 10.0                 # before an unreachable server is tried again; less is noise in the log, more leaves it idle
UNSERVED_TIME = 3.0               # without any slot, before the log tells of waiting calls; less cries at each start
SILENCE_TIME = 60.0               # nothing from a server while a call is out, before it is lost; less loses busy ones
ALIVE_TIME = 10.0                 # between a server's signs of life; far below SILENCE_TIME, less is traffic
NO_LIMIT = 1e7                    # of a slot's TLS handshake, which begins when the slot gets a worker: that may take days
CLOSE_TIME = 5.0                  # closing waits no longer for the last lines of output; less loses some
MIN_MEMORY = 64 << 20             # that a worker needs to start; less lets a limit through with which none starts
MAX_CONTROL = 1 << 31             # of one frame on control and master connections; less refuses wheels, which travel there
MAX_FRAME = 1 << 40               # of one frame on a slot, checked before memory is spent; less refuses large arguments
MAX_BUFFERS = 1 << 20             # out-of-band buffers of one frame; less refuses lists of as many arrays
CHUNK = 256 << 10                 # read at once; more is memory for every slot, less is system calls
SEND_PIECE = 256 << 10            # given to asyncio at once, which may copy what the socket does not take; less is turns
HUGE = 4 << 20                    # from which on memory is asked of the kernel in huge pages; less wastes half-filled ones
SPARE_ROOM = 256 << 20            # of huge buffers that nobody uses, kept for the next; more is memory, less is page faults
LANE_ROOM = 256 << 20             # of lanes in each direction of a slot; more is memory, less goes by the socket
IDLE_MEMORY_TIME = 10.0           # unused, before spare memory and that of lanes is given back; less needs new more often
LARGE = 64 << 10                  # from which on a buffer travels beside the pickle; below, copying is cheaper
UNSEEN_OUTPUT = 64 << 10          # of output on its way to a client; beyond, lines are dropped and counted; more is memory
MAP_AHEAD = 4096                  # calls of one `map` made before their results are taken; more is memory, less idles
MAP_BYTES = 256 << 20             # ... and bytes of their arguments
MAP_READ = 10_000                 # items that are read of a slow source before they are sent; more is memory
CHUNK_TIME = 0.004                # seconds of work of `map` that go into one call; more is waiting, less is a call's price
CHUNK_ITEMS = 5000                # ... and items
CHUNK_BYTES = 1 << 20             # ... and bytes of their arguments
PART_TIME = 0.01                  # after so long a chunk's results so far are sent; more holds them back, less is messages
SHARED_ARRAY = 1 << 20            # bytes of an array that joblib gives to its calls; below, sending costs less than sharing
REPEATED_BYTES = 1 << 20          # of one argument, and calls that are given it, before share() is advised; less is noise
REPEATED_CALLS = 10


# ==== Errors =================================================================
# Each says what was tried, on whom, what happened and what to do.

class ClupyError(Exception):
    """Any error of CluPy's own; an exception of the user's function keeps its type."""


class ConfigurationError(ClupyError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class SecretError(ClupyError, PermissionError):
    """There is no secret, others can read it, or the peer has another one, a certificate that is not accepted, or no TLS."""


class VersionMismatch(ClupyError):
    """Client, master and server do not run the same Python major.minor, or not the same protocol."""


class ProtocolError(ClupyError, ConnectionError):
    """A peer sent what the protocol does not know; its connection is closed."""


class MasterUnreachable(ClupyError, ConnectionError):
    """No master answered for `patience` seconds, and the calls concerned had no slot."""


class WorkerDied(ClupyError):
    """The worker died while it ran the call, more than `retries` times."""


class CallTimeout(ClupyError, TimeoutError):
    """The call ran longer than its `timeout`; its worker was killed."""


class ArgumentFailed(ClupyError):
    """A call was not made, as the call whose result is one of its arguments failed; that one's error is the cause."""


class Closed(ClupyError, RuntimeError):
    """The client was closed before the call had an outcome."""


class DependencyError(ClupyError):
    """Libraries could not be resolved or installed.  The text ends with pip's last lines; `lines` has them alone."""

    def __init__(self, what, lines=()):
        super().__init__(what, tuple(lines))       # what __init__ takes: a pickle makes an exception anew from its args
        self.lines = tuple(lines)

    def __str__(self):
        return "\n  ".join((self.args[0], *self.lines))


class LibraryMismatch(ClupyError, UserWarning):
    """This client's versions differ from the cluster's: a warning, or raised with `library_check: error`."""


class Unavailable(ClupyError, ConnectionError):
    """Redis or ZooKeeper is not configured or does not answer."""


class RemoteError(ClupyError):
    """What a call raised, if that cannot be rebuilt here. type_name, message, traceback: its texts."""

    def __init__(self, type_name, message, traceback=""):
        super().__init__(type_name, message, traceback)
        self.type_name, self.message, self.traceback = type_name, message, traceback

    def __str__(self):
        return f"{self.type_name}: {self.message}"


class LockLost(ClupyError, RuntimeError):
    """What was held is held no more, since when is not known: the session ended, or the node was deleted."""


def reason(error):
    """What an error says; some say nothing, and then it is their name."""
    return str(error) or type(error).__name__


def amount(count, thing):
    """As a text has it: 1 slot, 2 slots."""
    return f"{count} {thing}{'s' * (count != 1)}"


# ==== Configuration ==========================================================
# defaults < YAML file of the role < CLUPY_* environment variables < command line or arguments
#
# First, how each kind of setting is read: a function gives the value, or raises ValueError with what it must be.

def _must_be(words):
    """Makes of a function that reads a value one that raises no other error than ValueError with these words."""
    def decorate(read):
        @functools.wraps(read)
        def checked(value, *more):
            try:
                return read(value, *more)
            except (ValueError, TypeError, OverflowError):     # "1.2.3", a list among words, 10 ** 400
                raise ValueError(words) from None
        return checked
    return decorate


@_must_be('a duration: seconds, or a text such as "500ms", "10s", "2m", "1h"')
def _duration(value):
    """Seconds as a float, of a number, numpy's too, or of a text such as "500ms", "10s", "2m", "1h"."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value):
        return float(value)
    match = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h|)\s*", value)
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "": 1}[match[2]]


@_must_be('a size: bytes, or a text such as "500MB", "2GB"')
def _size(value):
    """Bytes as an int, of a number or of a text such as "500MB", "2GB"; None for no limit."""
    if value is None:
        return None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(?:i?b)?\s*", value, re.I | re.A)
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


@_must_be("a whole number from 0")
def _count(value):
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 0:
        raise ValueError
    return int(value)


@_must_be("a port: a whole number up to 65535")
def _port(value):
    if _count(value) > 65535:
        raise ValueError
    return _count(value)


@_must_be("a text")
def _text(value):
    if not isinstance(value, str):
        raise ValueError
    return value


@_must_be("a path")
def _path(value):
    if b"\0" in os.fsencode(_text(value)):        # which no system takes; nor has a path a character that this raises for
        raise ValueError
    return value


@_must_be("a text that is not empty")
def _some_text(value):
    if not _text(value):
        raise ValueError
    return value


@_must_be("on or off")
def _switch(value):
    word = str(value).lower()
    if word not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
        raise ValueError
    return word in ("on", "true", "yes", "1")


@_must_be("auto, on or off")
def _encryption(value):
    value = {False: "off", True: "on"}.get(value, value)       # YAML reads bare words so
    if value not in ("auto", "on", "off"):
        raise ValueError
    return value


@_must_be("warn, error or off")
def _level(value):
    value = {False: "off"}.get(value, value)       # YAML reads a bare off as false
    if value not in ("warn", "error", "off"):
        raise ValueError
    return value


@_must_be("an address: HOST, HOST:PORT or PORT")
def parse_address(value, port=0):
    """(host, port) of "host", "host:port", "port" or "[v6]:port"."""
    if isinstance(value, numbers.Integral) or isinstance(value, str) and value.strip().isdigit():
        value = f":{value}"                        # digits alone are a port: no host has such a name
    match = re.fullmatch(r"\s*(?:\[([^\]]*)\]|([^:]*))(?::(\d+))?\s*", value)
    if match[3] and int(match[3]) > 65535:
        raise ValueError
    return match[1] or match[2] or "", int(match[3]) if match[3] else port


def address_text(host, port):
    """An address as messages show it, and as parse_address reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@_must_be("an address, or several: HOST:PORT,HOST:PORT")
def _addresses(value):
    """[(host, port), ...] of a text with commas or a list; a port that is not named is None."""
    parts = str(value).split(",") if isinstance(value, (str, int)) and str(value).strip() else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError
    return [parse_address(part, None) for part in parts]


def file_text(path):
    """The text of a small file; "" if it cannot be read."""
    try:
        with io.open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _quotas(root):
    """How many cores' time each control group around this process may take, of those of both versions that have a limit."""
    for line in file_text(f"{root}/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount, files = ("/cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")) if controllers else ("", ("cpu.max",))
        names = path.split("/")
        for count in range(len(names), 0, -1):    # of these a container sees only some
            folder = f"{root}/sys/fs/cgroup{mount}{'/'.join(names[:count])}"
            words = " ".join(file_text(f"{folder}/{file}") for file in files).split()
            if len(words) == 2 and words[0].isdigit():        # else "max" or -1: as much as it likes
                yield int(words[0]) / int(words[1])


def cores(root=""):
    """How many this process may use: a container or a batch system may leave it fewer than the machine has.

    root: where its /proc and /sys are."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([mine, *(math.ceil(quota) for quota in _quotas(root))]))


SETTINGS = {   # key: (roles that have it, how it is read, default, what it is, as `-h` shows it)
    "listen": ("master server", parse_address, None,
               f"where to listen, HOST:PORT, or the port (default: every address; a master {PORT}, a server a free port)"),
    "master": ("server client", _addresses, None, "the master, HOST:PORT, or several with commas (default: localhost)"),
    "port": ("server client", _port, PORT, "the master's, where its address names none"),
    "status_port": ("master", parse_address, None, "a page to look at, on this machine alone; HOST:PORT: for others, too"),
    "secret_file": ("master server client", _path, "~/.clupy/secret", "the secret, unless CLUPY_SECRET has it"),
    "encryption": ("master server client", _encryption, "auto", "by keys that the secret makes (Python 3.13 and later): auto: of "
                   "what leaves a machine, on: of all, off: of nothing"),
    "max_half_open": ("master server", _count, 1024, "connections that have not proved yet that they know the secret"),
    "tls_cert": ("master server", _path, None, "file of the certificate, to encrypt connections"),
    "tls_key": ("master server", _path, None, "file of its key, without a passphrase"),
    "tls_ca": ("master server client", _path, None, "file of the certificate to trust"),
    "slots": ("server client", _count, cores(), "calls that run at once; a client's: on its own machine"),
    "max_nested": ("server client", _count, 64, "workers beyond the slots, for one client's calls inside calls"),
    "drain_time": ("server", _duration, 60.0, "after SIGTERM running calls may finish for so long"),
    "memory_limit": ("server client", _size, None, 'of one worker, such as "2GB" (default: none)'),
    "output": ("client", _switch, True, "on or off: show what calls print"),
    "environments_dir": ("server client", _path, None, "where libraries are built (default: below the user's cache folder)"),
    "environments_kept": ("server client", _count, 10, "so many complete ones are kept, and those in use"),
    "sync_interval": ("master server client", _duration, 60.0, "libraries are checked so often"),
    # Not off, because arguments and results travel as pickles, and what one version of cloudpickle or numpy wrote, another
    # may fail to read, or read wrongly.
    "library_check": ("client", _level, "warn", "what to do about libraries that differ: warn, error or off"),
    "patience": ("master server client", _duration, 60.0, "without a master calls that have no slot fail after so long"),
    "redis": ("master client", _text, None, "redis://:PASSWORD@HOST:PORT/0 (better in a file or variable: others see options)"),
    "zookeeper": ("master client", _text, None, "HOST:PORT, or several with commas"),
    "prefix": ("master client", _some_text, "clupy", "of all names in Redis and ZooKeeper"),
    "ttl": ("master client", _duration, 604800.0, "data that nobody used for so long is gone"),
    "session": ("master client", _duration, 10.0, "what a lost program held in ZooKeeper is free after so long"),
}


class Settings:
    """One attribute per key of SETTINGS; `given` names the keys that did not come from the defaults."""

    dial_tls = admit_tls = None        # ssl contexts of the two sides of a connection, made by _load_tls; None: no certificate
    certificate = None                 # the texts of certificate and key, of which a worker makes its own

    def __init__(self, values, given):
        self.__dict__.update(values, given=frozenset(given))

    def __repr__(self):
        return f"Settings({', '.join(f'{key}={masked(getattr(self, key))!r}' for key in sorted(self.given))})"


def masters_of(settings):
    """[(host, port), ...] of the masters; localhost where none is named."""
    return [(host or "localhost", port or settings.port) for host, port in settings.master or [("", None)]]


def default_settings(role, **values):
    """The Settings of a role without any file or variable: the defaults, and those of `values` that it has."""
    known = {key: values.get(key, default) for key, (roles, _, default, _) in SETTINGS.items() if role in roles.split()}
    return Settings(known, ())


_ADDRESS = re.compile(r"""
    (rediss?://) (?:[^/?#@]*@)? ((?:\w[\w.-]*|\[[\da-fA-F:.]+\])? (?::\d+)? (?:/\d*)?) (?:\?[^@]*)?
    | (unix:///[^?@]*) (?:\?[^@]*)? | ([\w.:,-]*)""", re.VERBOSE)     # groups: what a message may show


def masked(value):
    """The value as messages may show it: without the password of an address, or what might be one."""
    if not isinstance(value, str) or "@" not in value and "://" not in value:
        return value
    match = _ADDRESS.fullmatch(value)
    return "".join(filter(None, match.groups())) if match else "(not shown, it may hold a password)"


def home_path(path):
    """The path, with "~" in full.  Raises ConfigurationError for a user who has no home."""
    full = os.path.expanduser(path)
    if full.startswith("~"):
        raise ConfigurationError(f"{path}: this user ({os.getuid()}) has no home folder; set HOME")
    return full


def read_settings(role, file=None, named="argument {}".format, **arguments):
    """The Settings of a "master", "server" or "client".

    file: a YAML file that must exist; None: clupy.<role>.yaml in the working directory, if there is one.
    arguments: settings that win over all others; None stands for one that was not given; named(key): what messages call it.
    Raises ConfigurationError, naming file, line and the nearest valid key."""
    values = {key: default for key, (roles, _, default, _) in SETTINGS.items() if role in roles.split()}
    given = set()

    def take(key, value, where, name=None):
        if key not in values:
            near = difflib.get_close_matches(str(key), values, 1)
            raise ConfigurationError(f"{where}: unknown setting {key!r}"
                                     + (f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(sorted(values))}"))
        try:
            values[key] = SETTINGS[key][1](value)
        except ValueError as error:
            raise ConfigurationError(f"{name or f'{where}: {key}'} is {masked(value)!r}, but must be {error}") from None
        given.add(key)

    for key, value, line in read_yaml(file or f"clupy.{role}.yaml", must_exist=file is not None):
        take(key, value, f"{file or f'clupy.{role}.yaml'}, line {line}")
    for variable in [name for name in os.environ if name.startswith("CLUPY_")]:
        key = variable[6:].lower()
        if key in values and os.environ[variable]:            # an empty one is unset
            take(key, os.environ[variable], "", f"environment variable {variable}")
        elif key not in SETTINGS and (near := difflib.get_close_matches(key, [*SETTINGS, "secret"], 1, 0.8)) and near != [key]:
            log.warning("the environment variable %s is no setting; did you mean CLUPY_%s?", variable, near[0].upper())
    for key, value in arguments.items():
        if value is not None:
            take(key, value, "argument", named(key))
    for key in "slots", "max_half_open":
        if values.get(key) == 0:
            raise ConfigurationError(f"{key} is 0, but must be at least 1")
    if (values.get("memory_limit") or MIN_MEMORY) < MIN_MEMORY:
        raise ConfigurationError(f"memory_limit is {values['memory_limit']} bytes, but a worker needs {MIN_MEMORY >> 20}MB")
    settings = Settings(values, given)
    _load_tls(settings, **{key: values.get(key) for key in ("tls_ca", "tls_cert", "tls_key")})
    if settings.encryption == "on" and not (settings.dial_tls or settings.admit_tls or has_keys()):
        raise ConfigurationError(f"encryption is on, but that needs Python 3.13 or later, and this is {PYTHON_VERSION}: use "
                                 "certificates instead (tls_cert and tls_key of master and servers, tls_ca of all)")
    return settings


# ---- Certificates and keys are read once, at start: who starts hears what is wrong with them, not everybody who connects.

def _load_tls(settings, tls_ca, tls_cert, tls_key):
    """Make the settings' ssl contexts of the files that they name.  Raises ConfigurationError."""
    for name, path in ("tls_ca", tls_ca), ("tls_cert", tls_cert), ("tls_key", tls_key):
        if path and not os.path.isfile(home_path(path)):
            raise ConfigurationError(f"{name} is {path!r}, but there is no such file")
    if tls_ca:
        settings.dial_tls = _trusting("tls_ca", tls_ca)
    if tls_cert:
        _trusting("tls_cert", tls_cert)            # or OpenSSL would not say which of the two is none
        name, path = ("tls_key", tls_key) if tls_key else ("tls_cert", tls_cert)
        try:
            settings.certificate = [_pem(tls_cert), _pem(path)]
            settings.admit_tls = certificate_context(*settings.certificate)
        except ssl.SSLError as error:
            why = "is not the key of tls_cert" if error.reason == "KEY_VALUES_MISMATCH" else "holds no private key"
            raise ConfigurationError(f"{name} is {path!r}, but that {why}") from None
        except OSError as error:
            raise ConfigurationError(f"{name} is {path!r}, but that cannot be read: {error.strerror}") from None
    elif tls_key:
        raise ConfigurationError(f"tls_key is {tls_key!r}, but there is no tls_cert of which it is the key")


def _trusting(name, path):
    """The ssl context that trusts whom the certificates in a file belong to."""
    try:
        return ssl.create_default_context(cafile=home_path(path))
    except ssl.SSLError:
        raise ConfigurationError(f"{name} is {path!r}, but that holds no certificate") from None
    except OSError as error:
        raise ConfigurationError(f"{name} is {path!r}, but that cannot be read: {error.strerror}") from None


def _pem(path):
    with io.open(home_path(path), encoding="latin-1") as file:
        return file.read()


def certificate_context(certificate, key):
    """The ssl context of who listens. certificate, key: what their files hold, as texts in Latin-1."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with tempfile.TemporaryFile() as first, tempfile.TemporaryFile() as second:        # without names: OpenSSL reads files only
        for file, text in (first, certificate), (second, key):
            file.write(text.encode("latin-1"))
            file.seek(0)
        context.load_cert_chain(f"/dev/fd/{first.fileno()}", f"/dev/fd/{second.fileno()}", _ask_nobody)
    return context


def _ask_nobody():
    """Instead of OpenSSL's question at the terminal, which would block whoever loads the key."""
    raise ConfigurationError("tls_key has a passphrase, which a master or server cannot ask for; one without: "
                             "openssl pkey -in KEY -out NEW, readable by its user alone")


def has_keys():
    """Whether TLS by keys can be had: from Python 3.13 on, unless its OpenSSL was built without."""
    return getattr(ssl, "HAS_PSK", False)


def read_yaml(path, must_exist=False):
    """[(key, value, line)] of a YAML file with one mapping; [] without the file.  Raises ConfigurationError."""
    try:
        with io.open(path, encoding="utf-8") as file:      # io's, since `open` is clupy.open in this file
            text = file.read()
    except FileNotFoundError:
        if must_exist:
            raise ConfigurationError(f"{path}: there is no such file") from None
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from None
    compose, load = yaml.compose, yaml.safe_load  # here, where a missing pyyaml is one error, not two
    try:
        node, value = compose(text), load(text)
    except Exception as error:                    # what PyYAML raises of a 31st of June, or of too many brackets, can be anything
        raise ConfigurationError(f"{path}: not YAML: {reason(error)}") from None
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: must hold lines of `key: value`, not a {type(value).__name__}")
    lines = [at.start_mark.line + 1 for at, _ in node.value]
    if len(lines) != len(value):
        raise ConfigurationError(f"{path}: names a key twice, or merges keys; one line for each")
    return [(key, item, line) for (key, item), line in zip(value.items(), lines, strict=True)]


# ---- Redis and ZooKeeper: what this process was told (configure, arguments, CLUPY_* variables, clupy.client.yaml) wins,
# else what the master says, else they are on this machine.

SERVICE_KEYS = ("redis", "zookeeper", "prefix", "ttl", "session", "patience")
_LOCAL = {"redis": "redis://localhost:6379/0", "zookeeper": "localhost:2181"}
_configured = {}        # what configure() was given; replaced, never changed


def configure(**settings: Any) -> None:
    """Set redis, zookeeper, prefix, ttl, session or patience for this process, over all other places.

    Any thread may call; clients that are in use already stay as they are.  Raises ConfigurationError."""
    global _configured
    for key in settings:
        if key not in SERVICE_KEYS:
            raise ConfigurationError(f"configure() takes {', '.join(SERVICE_KEYS)}, not {key!r}")
    read = read_settings("client", **settings)
    _configured = {**_configured, **{key: getattr(read, key) for key in settings}}


def merged_services(own, theirs):
    """The Settings of Redis and ZooKeeper of which `own` are a client's and `theirs` the master's; {}: no master says any."""
    mine = {**{key: getattr(own, key) for key in own.given}, **_configured}
    values = {**vars(own), **(theirs or _LOCAL), **mine}
    given = {*mine, *theirs.get("given", ())}                 # not defaults: somebody named them
    return Settings({key: values[key] for key in SERVICE_KEYS}, given.intersection(SERVICE_KEYS))


def _make_secret(path):
    """Make the file, whole or not at all, unless another process does.  Raises SecretError."""
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix="secret-") as file:       # 0600, of a name of its own
            file.write(os.urandom(32).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())               # a power cut leaves none rather than an empty one
            os.link(file.name, path)              # never over one that another master has just made
            log.info("made the secret %s; copy it to the cluster's other machines", path)
    except FileExistsError:
        log.info("another process made the secret %s", path)
    except OSError as error:
        raise SecretError(f"the secret {path} cannot be made: {error.strerror}; set secret_file or CLUPY_SECRET") from None


def find_secret(settings, create=False):
    """The cluster's secret as bytes: CLUPY_SECRET, else the file `secret_file`.

    create: make the file where it is missing (0600), as the first master on a machine does.
    Raises SecretError where there is none or others can read it."""
    if secret := os.environ.get("CLUPY_SECRET", "").strip():
        if len(secret) < 16:
            raise SecretError("CLUPY_SECRET is shorter than 16 characters; a good one: python -c "
                              "'import secrets; print(secrets.token_hex(32))'")
        return secret.encode()
    try:
        path = home_path(settings.secret_file)
    except ConfigurationError as error:
        raise SecretError(f"no secret: {error}, or CLUPY_SECRET") from None
    if create and not os.path.exists(path):
        _make_secret(path)
    try:
        with io.open(path, "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(4096).strip()
    except FileNotFoundError:
        raise SecretError(f"no secret: there is no {path}: the first `python -m clupy master` of a machine makes it; if that "
                          "is another machine, copy it from there, or set CLUPY_SECRET") from None
    except OSError as error:
        raise SecretError(f"no secret: {path}: {error.strerror}; copy the master's ~/.clupy/secret to this machine, "
                          "or set CLUPY_SECRET") from None
    if status.st_mode & 0o077 or status.st_uid not in (os.getuid(), 0):
        raise SecretError(f"the secret {path} can be read by others or is not yours; run: chmod 600 {path}")
    if len(secret) < 16:
        raise SecretError(f"the secret {path} is shorter than 16 characters; remove it, and the master makes a new one")
    return secret


# ==== Wire ===================================================================
# Everything two processes of a cluster say to each other.
#
# preamble   8 bytes, read exactly: "clupy", version, role, Python's minor version, which must be the same since bytecode
#            travels.  Roles: M to a master, C control, S slot; with the bit that names it where TLS follows.
# handshake  for M and C, raw bytes of fixed size, HANDSHAKE_TIME at most; D dials, A admits:
#              D -> A  preamble, with what D wants: no TLS, TLS by A's certificate, or TLS by a key that the secret makes
#              A -> D  preamble, with what it is to be: in answer to one that does not fit, too, so that both can tell
#              D -> A  nonce (32)
#              A -> D  nonce (32), HMAC-SHA256(secret, "admit", both preambles, both nonces)
#              D -> A  HMAC-SHA256(secret, "dial", both preambles, both nonces)
#              TLS, if that was agreed; under it, both ways: HMAC(key, "dial tls" or "admit tls", what is unique to this TLS)
#            The proofs are bound to role and nonces, so neither can be reflected or replayed, and to what was wanted and agreed,
#            so nobody between can talk them out of TLS.  The connection's key, HMAC(secret, "key", both preambles, both nonces),
#            stays in the two processes, and makes that of its TLS.  Nothing but 72 bytes is read of who has proved nothing.
# slot       D -> A  preamble as for its control connection, session (16), number (8), nested (1), HMAC(key, those)
#                    each number once; slot key = HMAC(key, "slot", number)
#              TLS, if the control connection has it; D -> A  HMAC(slot key, "dial tls", what is unique to this TLS)
#            A -> D  HMAC(slot key, "admit tls", what is unique to this TLS, or nothing); then frames
# frame      body length (8), number of buffers (4), length and place of each (8, 8), all big-endian | pickle 5 | the buffers
#            of which the place is 0; the others are in lanes
#            A message is a tuple (kind, *fields) of plain values: unpickling one runs nobody's code.  What users
#            sent travels in it as payloads, bytes that are unpickled where they are used.
#
# A *statement* is complete and replaces the one before; sent on connecting, on change and every STATEMENT_TIME.
#
# from -> to        kind      fields                                       answer      if it fails
# server -> master  server    id, address, slots, held {client: n},        cluster     next master of the list
#                             facts {load, draining, ...}
# client -> master  client    id, name, wanted slots, unreachable          share       back-off; `patience` without slots
#                             servers, own libraries: (hash, list) or
#                             None, calls: (done, failed of these,
#                             running, waiting)
# master -> client  share     {server: (address, n, name)}, services,      -           stands until replaced
#                             libraries: (hash, exact list, error), size:
#                             (servers, their slots, slots wanted by now)
# master -> server  cluster   services, silent clients, libraries: (hash,  -           the last one stands
#                             exact list, its wheels)
#                             A list itself is sent where the connection is new or the list has changed, else None;
#                             nothing is said of libraries that are not known yet.
# standby -> any    leader    (host, port) or None: not known              go there    next master of the list
# any -> master     status    -                                            tables      an error text
# client -> server  hello     client, name, exact list of its libraries,   welcome     told to the master, again later
#                             own wheels, whether output is wanted
# server -> client  welcome   session, {its versions}, its max_nested      -
# client -> server  close     number                                       ended       control lost: all are closed
# client -> server  kill      number, call                                 ended, late the future has its outcome already
# server -> client  ended     number, {pid, begun, why (one of Why),       -           1 s after the slot's end: Why.LOST
#                             reason (a text), code, peak, limit, lines,
#                             stack, base: the nested slot that has its
#                             place now}
# server -> client  late      number, call: it is over, or has not begun   -           asked again while it is out
# server -> client  output    [(pid, stream, text, whether more comes at   seen        over UNSEEN_OUTPUT: dropped
#                             once)], dropped lines, bytes
# client -> server  seen      bytes                                        -
# client -> server  release   names of Refs that nobody has any more       -           the session's end
# any -> client     notice    what, text: draining, alive, renew (the      -
#                             libraries changed: give slots back), broken
#                             (why), building or resolving (pip's line)
# client -> worker  opening   the client's own top-level modules, its      opened      the slot ends
#                             surroundings, where its lanes are or None
# worker -> client  opened    pid, whether it has the lanes                -
# both ways         released  places of lanes that are free again          -
# client -> worker  trim      -: give back memory that is not used         -
# client -> worker  calls     in the order to be done:                     results     the slot's end and `ended`
#                             (number, function id, arguments, time-out),
#                             (0, function id, payload or None: drop it,
#                             (name, setup: an initializer's payload or None))
# worker -> client  results   [(number, succeeded, plain value or          -
#                             payload)], seconds that they took
# worker -> client  part      number of a call under way, that of its first -
#                             result of these, how many, their payload
# client -> worker  recall    -                                            returned    none: they stay sent
# worker -> client  returned  [numbers]                                    -
# worker -> client  fetch     request, what (a key of FETCHES), its fields  fetched    the slot ends
# client -> worker  fetched   request, answer                              -
# worker -> client  serve     name, buffers of a Ref shared in a call      -
# worker -> client  nested    [(number, parent, function id, arguments,    results     the slot's end
#                             time-out, retries, (key, max) or None)],
#                             {function id: (payload, name, setup) or None: drop it}
# client -> worker  results   [(number, succeeded, plain value or payload)] of nested calls; also part
# worker -> client  forget    [numbers of nested calls]                    -
#
# Kind `share` is answered by the method `on_share` of the class that owns the receiver's state.

class Why:
    """Why a slot ended: plain text, so that it travels in a message.

    Whatever the word, a call that had begun is charged with a try, and one that had not starts again elsewhere (but see
    MAX_SPARED)."""
    # said by the server
    DIED = "died"                      # the worker ended, and nobody here wanted it to: a crash, os._exit, too little memory
    TIMEOUT = "timeout"                # the call that ran was over its time; it is not tried again
    CANCELLED = "cancelled"            # the call that ran was cancelled
    CLOSED = "closed"                  # its client asked for that
    CLIENT_GONE = "client gone"        # the control connection ended: nobody is left to hear of it
    RELIEVED = "relieved"              # it was idle, its client has been silent for SILENT_CLIENT, and others want slots
    NOT_NEEDED = "not needed"          # a worker that never had a slot: others are wanted in its place
    MAX_NESTED = "max_nested"          # it never had a worker: too many slots of its client are nested ones
    SERVER_CLOSED = "server closed"    # the server ends, drained or not
    # told to itself by the client, where no `ended` came
    LOST = "lost"                      # the server, or the way to it: whatever was sent may have begun


def server_name(id, port):
    """The one name of a server, in every log, in `status` and in errors; made by itself, and told to all."""
    return f"{socket.gethostname()}:{port} ({id[:4]})"


def client_name():
    """The one name of this process as a client: "user@host program pid"."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:                              # containers have users without an entry
        user = os.getuid()
    script = (getattr(sys, "argv", None) or [""])[0]
    program = os.path.basename(os.path.dirname(script) if script.endswith("__main__.py") else script)
    if program in ("", "-c", "-m"):
        program = "python"
    name = f"{user}@{socket.gethostname()} {program[:40]} {os.getpid()}"
    return "".join(character if character.isprintable() else "?" for character in name)


def quiet_if_embedded(record):
    """A filter of the loggers of master and server: in a client's engine, which embeds them, only errors are for the user."""
    if record.threadName == ENGINE_THREAD and record.levelno < logging.ERROR:
        record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


MAGIC, VERSION = b"clupy", 1
TO_MASTER, CONTROL, SLOT = b"M", b"C", b"S"
PREAMBLE_SIZE, NONCE_SIZE, PROOF_SIZE, SESSION_SIZE = 8, 32, 32, 16
SLOT_HEAD = struct.Struct(f">{SESSION_SIZE}sQ?")                       # session, number, nested
FRAME_HEAD = struct.Struct(">QI")                                      # body length, number of buffers


NO_TLS, BY_CERTIFICATE, BY_KEY = 0, 0x20, 0x80     # how a connection goes on: bits that no role has, whose letters are capitals
ENCRYPTIONS = {NO_TLS: "unencrypted", BY_CERTIFICATE: "encrypted by certificate", BY_KEY: "encrypted by the secret"}


def preamble(role, how=NO_TLS):
    """What a connection begins with, by this process."""
    return MAGIC + bytes((VERSION, role[0] | how, PYTHON))


def read_preamble(data):
    """(role, how the connection is to go on) that a peer's preamble names.

    Raises ProtocolError or VersionMismatch, which speak of the peer as "it": who dials or listens says who that is."""
    if data[:5] != MAGIC:
        raise ProtocolError(f"not CluPy: it began with {bytes(data)!r}")
    if data[5] != VERSION:
        raise VersionMismatch(f"it speaks protocol version {data[5]}, this is {VERSION}; install the same CluPy on both")
    if data[7] != PYTHON:
        raise VersionMismatch(f"it runs Python 3.{data[7]}, this process runs Python 3.{PYTHON}; they must be the same, "
                              "since bytecode travels")
    how = data[6] & (BY_CERTIFICATE | BY_KEY)
    role = bytes((data[6] - how,))
    if role not in (TO_MASTER, CONTROL, SLOT) or how not in ENCRYPTIONS:
        raise ProtocolError(f"unknown role {bytes(data[6:7])!r}")
    return role, how


def wanted_encryption(settings, leaves):
    """How the dialing side wants a connection to go on.  leaves: whether it leaves the machine."""
    if settings.dial_tls:
        return BY_CERTIFICATE
    return BY_KEY if settings.encryption == "on" or settings.encryption == "auto" and leaves and has_keys() else NO_TLS


def agreed_encryption(settings, wanted):
    """How it is to go on, says the listening side."""
    if settings.admit_tls:
        return BY_CERTIFICATE
    if settings.encryption == "auto":
        return BY_KEY if wanted == BY_KEY and has_keys() else NO_TLS
    return BY_KEY if settings.encryption == "on" else NO_TLS


def check_certificates(mine, theirs):
    """Either both sides want TLS by certificate, or none.  Raises SecretError."""
    if BY_CERTIFICATE in (mine, theirs) and mine != theirs:
        there, here = ("with", "without") if theirs == BY_CERTIFICATE else ("without", "with")
        raise SecretError(f"it speaks TLS {there} a certificate, this process {here} one; who listens needs tls_cert and "
                          "tls_key, who connects tls_ca")


def check_agreed(settings, agreed):
    """Whether the dialing side may go on as the other says.  Raises SecretError."""
    if agreed == BY_KEY and (settings.encryption == "off" or not has_keys()):
        raise SecretError("its encryption is on, and that of this process off; set both to the same, or one to auto")
    if agreed == NO_TLS and settings.encryption == "on":
        raise SecretError("its encryption is off, and that of this process on; set both to the same, or one to auto")


def proof(key, *parts):
    """HMAC-SHA256 over the parts, each with its length, so that no two lists of parts look alike."""
    return hmac.digest(key, b"".join(struct.pack(">I", len(part)) + part for part in parts), "sha256")


def slot_head(key, how, session, number, nested):
    """What opens a slot, after the preamble: head and MAC under the key of the control connection, which goes on as `how`."""
    head = SLOT_HEAD.pack(session, number, nested)
    return head + proof(key, preamble(SLOT, how), head)


def slot_key(key, number):
    """The key of one slot: all that a worker ever knows of the cluster's secrets."""
    return proof(key, b"slot", struct.pack(">Q", number))


def key_context(side, key):
    """The ssl context of one side, "dial" or "admit", of a connection whose two ends alone have the key.

    No certificate will do: with CERT_NONE, as the manual has it, who dials would take any (with keys or without)."""
    if side == "dial":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)            # which wants a certificate of whom it trusts: of nobody
        context.check_hostname = False
        context.set_psk_client_callback(lambda _: ("clupy", key))
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_psk_server_callback(lambda _: key)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def tls_context(how, side, settings, key):
    """The ssl context of one side of a connection that goes on so, and has this key; None: it goes on without TLS."""
    if how == BY_KEY:
        return key_context(side, proof(key, b"tls"))
    return getattr(settings, f"{side}_tls") if how == BY_CERTIFICATE else None


def tls_proof(key, side, tls):
    """That a side has the key, and sees the same TLS as the other: what it says first.  tls: its ssl object, or None."""
    return proof(key, side, tls.get_channel_binding("tls-unique") if tls else b"")


def forwarded(payload):
    """A payload that arrived, for another message: its buffers, memory now, travel beside the pickle again."""
    if type(payload) is tuple and payload and type(payload[-1]) is list:
        return *payload[:-1], [pickle.PickleBuffer(buffer) for buffer in payload[-1]]
    return payload


def encode(message, lanes=None):
    """The frame of a message as a list of buffers, large ones uncopied.

    lanes: those of the slot that it is for.  What fits is copied there, and is told which lanes are free again."""
    buffers = []
    body = pickle.dumps(message, 5, buffer_callback=buffers.append)
    before = b"".join(encode(("released", lanes.unused()))) if lanes is not None and lanes.taken else b""
    if not buffers:
        return [before + FRAME_HEAD.pack(len(body), 0) + body]
    views = [buffer.raw() for buffer in buffers]
    places = [lanes.put(view) if lanes is not None else 0 for view in views]
    sizes = [struct.pack(">QQ", view.nbytes, place) for view, place in zip(views, places)]
    return [b"".join([before, FRAME_HEAD.pack(len(body), len(views)), *sizes, body]),
            *[view for view, place in zip(views, places) if not place]]


class _PlainUnpickler(pickle.Unpickler):
    """Reads messages, which hold plain values alone; anything that would run code is refused."""

    def find_class(self, module, name):
        raise ProtocolError(f"a message names {module}.{name}, but messages hold plain values alone")


def decode(body, buffers=()):
    """The message of a frame.  Raises ProtocolError for one that is none."""
    try:
        message = _PlainUnpickler(io.BytesIO(body), buffers=buffers).load()
    except ProtocolError:
        raise
    except Exception as error:                     # what pickle raises of rubbish can be anything
        raise ProtocolError(f"a frame that is no message: {error!r}") from None
    if not isinstance(message, tuple) or not message or not isinstance(message[0], str):
        raise ProtocolError(f"a frame without a kind: {type(message).__name__}")
    return message


def dispatch(owner, source, message):
    """Give a message to the method that answers its kind: owner.on_<kind>(source, *fields)."""
    kind, *fields = message
    handler = getattr(owner, f"on_{kind}", None) if kind.isidentifier() else None
    if handler is None:
        raise ProtocolError(f"{source} sent {kind!r}, which {type(owner).__name__} does not answer")
    return handler(source, *fields)


def frame_sizes(head, limit):
    """(body length, number of buffers) of a frame's head, within the limits."""
    body, count = FRAME_HEAD.unpack(head)
    if body > limit or count > MAX_BUFFERS:
        raise ProtocolError(f"a frame of {body} bytes and {count} buffers is over the limit of {limit}")
    return body, count


class Spare:
    """Huge buffers that nobody uses any more, for who needs one next: new memory costs more than what is done with it.

    64 MiB are copied in 3 ms into memory that is there, in 5 to 100 into huge pages that the kernel has to find first."""

    def __init__(self, room):
        self.room = room                          # bytes that are kept at most; 0: nothing is
        self._free = []                           # mmaps; any thread may change it while another looks through a copy
        self._taken = -math.inf                   # when one was taken last, unless all was given back since

    def take(self, size):
        """A writable buffer of so many bytes, which comes back when the last view of it is garbage."""
        self._taken = time.monotonic()
        for pages in self._free.copy():
            if size <= len(pages) <= size + size // 4:
                with contextlib.suppress(ValueError):      # another thread was faster
                    self._free.remove(pages)
                    break
        else:
            pages = _huge_pages(size)
        if not self.room:
            return pages
        lent = (ctypes.c_char * size).from_buffer(pages)   # every view of it holds this, which unlike a view can be watched
        weakref.finalize(lent, self._came_back, pages).atexit = False
        return memoryview(lent).cast("B")

    def _came_back(self, pages):
        """In any thread, at any moment."""
        free = sum([len(other) for other in self._free.copy()])
        if free + len(pages) <= self.room and time.monotonic() - self._taken < IDLE_MEMORY_TIME:
            self._free.append(pages)

    def trim(self, seconds=0.0):
        """Give all back to the system, if none was taken in the last so many seconds."""
        if time.monotonic() - self._taken >= seconds:
            self._taken = -math.inf
            self._free.clear()


spare = Spare(SPARE_ROOM)


def _huge_pages(size):
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"no memory for {size} bytes") from None
    with contextlib.suppress(OSError):             # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def memory(size):
    """A writable buffer of so many bytes, of any content."""
    return bytearray(size) if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE") else spare.take(size)


# ---- Lanes: large buffers between two processes of one machine do not go through their socket
#
#      client                   one memfd for each slot, which has no name                 worker
#                       +-------+-------------------------+-------------------------+
#                       | proof | client's half           | worker's half           |
#                       +-------+-------------------------+-------------------------+
#      Lanes.put   copies ------> [lane] [lane]  - - - - - - - - - - - - - - - - copies --> Lanes.take
#      Lanes.take  <-- copies - - - - - - - - - - - - - - - [lane] [lane] <------ copies    Lanes.put
#
# - The sender copies a buffer into a gap of its half, and the frame says the place alone.  The receiver copies it into
#   memory of its own, and says `released` with its next message.  Both keep the memfd mapped, so that after the first time
#   all pages are there: two copies cost a tenth of the socket.  To look at the lane itself would save the second, but what
#   is used there would have to stay, each written page be copied at a fault of its own, and a fork change what the child has.
# - The client offers the memfd when a slot opens, by its pid and the descriptor's number.  A worker that can open this under
#   /proc and finds the proof there, made with the slot's key, is on the same machine and has the same user.  All others, and
#   buffers that find no gap, use the socket.
# - A memfd is gone with its last descriptor and map, whatever killed the processes.  It is sealed, since to shrink it would
#   kill the other end at its next copy (SIGBUS); its pages are allocated before they are written, since so would a lack of
#   memory.

LANE_UNIT = 4096                  # places are multiples of it


class Lanes:
    """One end's part of a slot's lanes; until both ends have the memfd, and where they cannot, it has none.

    One thread at a time sends (`put`, `unused`, `trim`), and one receives (`take`, `released`)."""

    def __init__(self):
        self._file = self._pages = None           # the memfd, and its map
        self._ours = self._theirs = 0             # where the halves begin, as soon as both ends have them
        self._lent = {}                           # {place: its end} of what the peer has not copied yet
        self._warm = 0                            # up to where the pages of our half are there
        self._back = collections.deque()          # places of ours that are free again
        self._used = None                         # when buffers went either way last, unless trimmed since
        self.taken = collections.deque()          # places of the peer's that are free again, which it has to be told

    def close(self):
        if self._file is not None:
            with contextlib.suppress(OSError):    # a forked child: its parent was closing it
                os.close(self._file)
        self.__init__()

    # -- to have them

    def offer(self, key):
        """In the client: where the worker of the slot with this key may find the memfd; None: there is none."""
        if not hasattr(os, "memfd_create"):
            return None
        try:
            self._file = os.memfd_create("clupy-lanes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._file, LANE_UNIT + 2 * LANE_ROOM)
            os.pwrite(self._file, proof(key, b"lanes"), 0)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map()
        except OSError as error:                  # too many open files, or not allowed
            self._refused(error)
            return None
        return os.getpid(), self._file

    def accepted(self, has_it):
        """In the client: whether the worker has what was offered."""
        if has_it and self._pages is not None:
            self._ours = self._warm = LANE_UNIT
            self._theirs = LANE_UNIT + LANE_ROOM
        elif self._file is not None:
            self._refused("the worker cannot open them")

    def accept(self, offer, key):
        """In the worker: whether it has what its client offers."""
        try:
            path = "/proc/{:d}/fd/{:d}".format(*offer)
            if os.stat(path).st_size == LANE_UNIT + 2 * LANE_ROOM:     # first: to open what is no file may do something
                self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                if (fcntl.fcntl(self._file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
                        and hmac.compare_digest(os.pread(self._file, PROOF_SIZE, 0), proof(key, b"lanes"))):
                    self._map()
                    self._ours = self._warm = LANE_UNIT + LANE_ROOM
                    self._theirs = LANE_UNIT
                    return True
            self._refused("what is there is another's")
        except (OSError, TypeError, ValueError, IndexError) as error:
            self._refused(error)
        return False

    def _refused(self, why):
        log.debug("no lanes, large buffers use the slot's socket: %s", why)
        self.close()

    def _map(self):
        """Now: a copy that cannot be made later would end the slot."""
        untracked = {"trackfd": False} if sys.version_info >= (3, 13) else {}      # before, a map has a descriptor of its own
        self._pages = mmap.mmap(self._file, LANE_UNIT + 2 * LANE_ROOM, **untracked)

    # -- sending

    def put(self, view):
        """Copy flat bytes into a lane; its place, or 0: the socket has to do."""
        self._used, size = time.monotonic(), view.nbytes
        if not self._ours or not LARGE <= size <= LANE_ROOM:
            return 0
        place = self._gap(size)
        end = place + -(-size // LANE_UNIT) * LANE_UNIT
        if end > self._ours + LANE_ROOM:
            return 0
        try:
            if end > self._warm:
                os.posix_fallocate(self._file, self._warm, end - self._warm)
                self._warm = end
        except OSError as error:                  # no memory, say
            log.debug("%s bytes use the slot's socket: %s", size, error)
            return 0
        self._pages[place:place + size] = view
        self._lent[place] = end
        return place

    def _gap(self, size):
        """The lowest place with so much room: what was used before, and is there."""
        self._take_back()
        place = self._ours
        for begin, end in sorted(self._lent.items()):
            if begin - place >= size:
                break
            place = end
        return place

    def _take_back(self):
        while self._back:
            self._lent.pop(self._back.popleft(), None)

    def trim(self):
        """Give back to the system what is above all that the peer has not copied yet."""
        self._take_back()
        end = max(self._lent.values(), default=self._ours)
        if end < self._warm:
            with contextlib.suppress(OSError):    # not every system that looks like Linux can
                self._pages.madvise(mmap.MADV_REMOVE, end, self._warm - end)
            self._warm = end
        self._used = None

    def is_idle(self, now):
        """Whether both ends should trim: something went either way, but nothing in the last IDLE_MEMORY_TIME seconds."""
        return self._used is not None and now - self._used > IDLE_MEMORY_TIME

    # -- receiving

    def take(self, place, size):
        """What the peer put there, in memory of our own.  Raises ProtocolError if that is not in its half."""
        if not self._theirs or not self._theirs <= place <= place + size <= self._theirs + LANE_ROOM:
            raise ProtocolError(f"{size} bytes in a lane at {place}, where none can be")
        self._used, buffer = time.monotonic(), memory(size)
        buffer[:] = memoryview(self._pages)[place:place + size]
        self.taken.append(place)
        return buffer

    def released(self, places):
        """The peer has copied these."""
        self._back.extend(places)

    def unused(self):
        """Places of the peer's that it has to be told are free again."""
        places = []
        while self.taken:
            places.append(self.taken.popleft())
        return places


class Frames:
    """What cuts a stream of bytes into messages; it knows nothing of sockets.

    Write bytes to `space()`, say how many to `filled(n)`, and take the messages that are complete.  Large parts are
    received into memory of their own, allocated once.  `proof`: bytes that must come first; `lanes`: those of the slot."""

    def __init__(self, proof=b"", limit=MAX_FRAME, lanes=None):
        self._chunk = memoryview(bytearray(CHUNK))
        self._messages = []
        self._parts = _parse(proof, limit, self._messages, lanes)
        self._want(next(self._parts))

    def _want(self, size):
        self._part, self._have = memory(size), 0

    def space(self):
        """Where the next bytes are to be written."""
        self._direct = len(self._part) - self._have >= CHUNK
        return memoryview(self._part)[self._have:] if self._direct else self._chunk

    def filled(self, count):
        """The messages that `count` more bytes complete."""
        if self._direct:
            self._have += count
            count = 0
        start = 0
        while True:
            take = min(len(self._part) - self._have, count - start)
            if take:
                self._part[self._have:self._have + take] = self._chunk[start:start + take]
                self._have += take
                start += take
            if self._have < len(self._part):
                messages = self._messages.copy()
                self._messages.clear()
                return messages
            self._want(self._parts.send(self._part))


def _parse(proof, limit, messages, lanes):
    """A generator that yields the size of the next part, is sent the part, and appends each message that is complete.

    No method of Frames: if each knew the other, both and the chunk would stay until the next collection of garbage."""
    if proof and not hmac.compare_digest((yield len(proof)), proof):
        raise ProtocolError("the peer does not know the slot's key")
    while True:
        size, count = frame_sizes((yield FRAME_HEAD.size), limit)
        numbers = struct.unpack(f">{2 * count}Q", (yield 16 * count)) if count else ()
        lengths, places = numbers[::2], numbers[1::2]
        if sum(lengths) > limit:
            raise ProtocolError(f"buffers of {sum(lengths)} bytes are over the limit of {limit}")
        body = yield size
        buffers = []
        for length, place in zip(lengths, places):
            if place and lanes is None:
                raise ProtocolError("a lane on a connection that has none")
            buffers.append(lanes.take(place, length) if place else (yield length))
        messages.append(decode(body, buffers))
        del body, buffers                         # the last ones would stay until the next message


# ---- Connections over asyncio streams: to masters, and for control

@functools.cache
def raise_descriptor_limit():
    """Let this process have as many files and connections as the system allows; the soft limit that it had before.

    Each slot and each worker takes some, and many systems give a process 1024 until it asks for more.  Processes that
    it starts are given the old limit: some programs use select(), or close every number that there may be."""
    old, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(most, 10240) if sys.platform == "darwin" else most        # macOS says "unlimited", and refuses that
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(old, wanted), most))
    return old


def descriptors_left():
    """How many more files this process may open."""
    try:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
    except OSError:                               # not even that one; or there is no such folder
        return 0 if os.path.exists("/dev/fd") else math.inf


def tune(sock):
    """A peer is alive while its kernel answers: by keepalive that of an idle one is asked every 4 s, and given up after 10.

    Not by TCP_USER_TIMEOUT: to that a window that stays full looks like death, and with data under way it starts anew."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3):
        with contextlib.suppress(AttributeError, OSError):         # each for itself: not every system has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def silence(sock):
    """Seconds since the peer's kernel answered anything, which it does every 4 s (`tune`) as long as it can.

    While data is under way, keepalive waits for that; so this is how a dead peer is found then.  By Linux's tcp_info, of which
    two fields are the milliseconds since the last data and the last acknowledgement; 0.0 where it cannot be had."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):         # refused, or closed meanwhile
            return min(struct.unpack_from("II", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60), 52)) / 1000
    return 0.0


def plain_host(host):
    """A numeric address without the prefix that an IPv4 one has at a socket of both families."""
    return host.removeprefix("::ffff:")


class Connection:
    """Frames over a stream whose peer has proved the secret; for the thread of its loop alone."""

    def __init__(self, reader, writer, peer, key, how):
        self._reader, self._writer = reader, writer
        self.heard = time.monotonic()  # when the last message arrived
        self.peer = peer               # "10.0.0.5:41234"
        self.key = key                 # known to both ends, and to nobody else
        self.how = how                 # one of ENCRYPTIONS
        self.why = "it was closed here"            # why it ended, once it has

    def __repr__(self):
        return f"<Connection {self.peer}{' closing' if self._writer.is_closing() else ''}>"

    @property
    def hosts(self):
        """The peer's numeric address, and this end's."""
        return [plain_host(self._writer.get_extra_info(name)[0]) for name in ("peername", "sockname")]

    def send(self, *message):
        """Send a message, in order and without waiting; nothing, once the connection is about to end."""
        if not self._writer.is_closing():
            self._writer.writelines(encode(message))

    async def receive(self):
        """The next message.  Raises IncompleteReadError at the end, OSError, ProtocolError."""
        size, count = frame_sizes(await self._reader.readexactly(FRAME_HEAD.size), MAX_CONTROL)
        if count:
            raise ProtocolError("a frame with buffers on a connection that has none")
        return decode(await self._reader.readexactly(size))

    async def serve(self, owner):
        """Hand every message to the owner until the connection ends: `why` says of what, the log if it is the peer's fault."""
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                message = await self.receive()
                self.heard = time.monotonic()
                dispatch(owner, self, message)
        except ProtocolError as error:
            self.why = reason(error)
            log.warning("closing the connection to %s: %s", self.peer, error)
        except asyncio.IncompleteReadError:        # the owner decides what that means
            if not self._writer.is_closing():
                self.why = "it closed the connection"
        except OSError as error:
            self.why = reason(error)
        finally:
            watch.cancel()
            self.close()

    async def _watch(self):
        """End the connection when the peer's machine is gone; one that only sleeps, with a full window too, is not."""
        sock = self._writer.get_extra_info("socket")           # None: it has ended already, under TLS
        while sock:                                # closing, too, takes a peer that takes what is left
            if (silent := silence(sock)) > DEAD_TIME:
                self.why = f"its machine has not answered for {silent:.0f} s"
                return self.abort()
            await asyncio.sleep(LOOK_TIME)

    def close(self):
        """Send what is under way, then end."""
        self._writer.close()

    def abort(self):
        """End now; TLS would wait for the peer's farewell."""
        self._writer.transport.abort()


async def read_exactly(sock, count):
    """`count` bytes of a non-blocking socket and not one more, so that the rest is there for another reader."""
    data = b""
    while len(data) < count:
        part = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
        if not part:
            raise EOFError(f"it closed the connection after {len(data)} of {count} bytes", len(data))
        data += part
    return data


class UnknownHost(OSError):
    """A host's name has no address."""


async def connect_socket(host, port):
    """A connected, non-blocking socket; tries each address of the host in turn.  Raises OSError, with words."""
    loop, family = asyncio.get_running_loop(), socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.inet_pton(family, host)             # numeric: resolving takes a thread, and none is left at a program's end
        found = [(family, socket.SOCK_STREAM, 0, "", (host, port))]
    except OSError:
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise UnknownHost(f"the name {host!r} cannot be resolved: {error.strerror}") from None
        except ValueError as error:                # "a..b" cannot even be asked for
            raise UnknownHost(f"{host!r} is no name of a host: {error}") from None
    failure = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(HANDSHAKE_TIME):
                await loop.sock_connect(sock, address)
            return sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            number = error.errno                   # asyncio's own text is "Connect call failed"
            failure = OSError(number, os.strerror(number)) if number else OSError(f"no answer within {HANDSHAKE_TIME:g} s")
    raise failure


def leaves_machine(sock):
    """Whether the other end of a connection is on another machine, or looks so."""
    here, there = (plain_host(name[0]) for name in (sock.getsockname(), sock.getpeername()))
    return here != there and not there.startswith("127.")


async def dial(address, role, secret, settings):
    """A Connection to a master or server at (host, port), after the handshake.

    Raises OSError if nobody answers there, SecretError, VersionMismatch or ProtocolError if who answers is not one of
    ours.  Each has words, which do not name the address: the caller tries several."""
    sock = await connect_socket(*address)
    try:
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            tune(sock)
            async with asyncio.timeout(HANDSHAKE_TIME):
                wanted = wanted_encryption(settings, leaves_machine(sock))
                mine = preamble(role, wanted)
                await asyncio.get_running_loop().sock_sendall(sock, mine)
                theirs = await read_exactly(sock, PREAMBLE_SIZE)
                _, how = read_preamble(theirs)
                check_certificates(wanted, how)
                check_agreed(settings, how)
                key = await _prove(sock, mine + theirs, secret)
                reader, writer = await _open_stream(sock, address[0], tls_context(how, "dial", settings, key))
                undo.callback(writer.transport.abort)
                if how:
                    await prove_tls(reader, writer, key, b"dial tls", b"admit tls")
                connection = Connection(reader, writer, address_text(*address), key, how)
            undo.pop_all()
            return connection
    except (EOFError, ConnectionResetError):
        raise ProtocolError("it closed the connection during the handshake; is it CluPy's port?") from None
    except TimeoutError:
        raise TimeoutError(f"it did not finish the handshake within {HANDSHAKE_TIME:g} s; is it CluPy's port?") from None


# Why a certificate is refused: OpenSSL's code, the TLS alert by which the other side hears of it, what helps.
_REFUSALS = {9: (45, "renew it, or set the clock"), 10: (45, "renew it, or set the clock"),
             62: (42, "name the host as its certificate does"), 64: (42, "name the host as its certificate does")}
_SIGNED_BY_ANOTHER = 48, "tls_ca must name whose signature is accepted"


async def _open_stream(sock, host, context):
    """asyncio's streams on a socket, under TLS if there is a context."""
    with sock.dup() as spare:                      # asyncio's own is closed without the alert (python/cpython#98078)
        try:
            return await asyncio.open_connection(sock=sock, ssl=context, server_hostname=context and host)
        except ssl.SSLCertVerificationError as error:
            alert, advice = _REFUSALS.get(error.verify_code, _SIGNED_BY_ANOTHER)
            with contextlib.suppress(OSError):
                spare.send(bytes((21, 3, 3, 0, 2, 2, alert)))          # a record: alert, TLS 1.2 as all say, 2 bytes: fatal
            raise SecretError(f"its certificate is not accepted: {error.verify_message.rstrip('.')}; {advice}") from None
        except ssl.SSLError as error:
            raise SecretError(f"TLS fails: {error.reason}") from None


async def _prove(sock, preambles, secret):
    """The dialing side of the proofs; the connection's key."""
    loop, nonce = asyncio.get_running_loop(), os.urandom(NONCE_SIZE)
    await loop.sock_sendall(sock, nonce)
    bound = preambles, nonce, await read_exactly(sock, NONCE_SIZE)
    if not hmac.compare_digest(await read_exactly(sock, PROOF_SIZE), proof(secret, b"admit", *bound)):
        here = "CLUPY_SECRET is set here: unset it, or set it as there" if os.environ.get("CLUPY_SECRET") else (
            "copy its ~/.clupy/secret here")
        raise SecretError(f"it has another secret than this process; {here}")
    await loop.sock_sendall(sock, proof(secret, b"dial", *bound))
    return proof(secret, b"key", *bound)


async def prove_tls(reader, writer, key, mine, theirs):
    """Each side's first words under TLS.  Raises SecretError."""
    tls = writer.get_extra_info("ssl_object")
    writer.write(tls_proof(key, mine, tls))
    if not hmac.compare_digest(await reader.readexactly(PROOF_SIZE), tls_proof(key, theirs, tls)):
        raise SecretError("somebody stands between it and this process, and has TLS with each")


# ---- Masters: several addresses are tried in turn, and what each said is kept: {(host, port): an error or a text}.

def told(said):
    """What each address said, as one text."""
    return "; ".join(f"{address_text(*address)}: {reason(why)}" for address, why in said.items())


def advice(said):
    """What to do when no master answered."""
    if said and all(type(why) is UnknownHost for why in said.values()):
        return "is the name written right, and known to this machine's DNS or /etc/hosts?"
    return "is `python -m clupy master` running there?"


def hopeless(said):
    """The error if no patience mends what all said: another secret, a refused certificate, another version.  Else None."""
    kinds = [type(why) for why in said.values()]
    return kinds[0](told(said)) if {SecretError, VersionMismatch}.issuperset(kinds) else None


def stands_by(leader):
    """What a standby says with its `leader`, in words."""
    return "it stands by; " + (f"{address_text(*leader)} leads" if leader else "no master leads yet")


class MasterLink:
    """A connection to the leading master, kept as long as one may be ours: each address in turn, and a pause after each round.

    An address that is of no use is passed over, whatever is wrong with it.  The owner answers messages, and hears by
    master_joined(connection), by master_lost() when that has ended or a round was in vain, and by master_refused(error)
    when no patience mends what all of a round said.  The owner says `leads = True` when the master answers its statement:
    only who leads is a master to it, and those that stand by, however many and often, give no reason to wait longer."""

    def __init__(self, addresses, secret, settings):
        self.addresses, self.secret, self.settings = addresses, secret, settings
        self.connection = None         # Connection, while there is one
        self.host = None               # how the master was reached; servers on its machine are there, too
        self.leads = False             # whether who is there leads
        self.lost_at = time.monotonic()            # when the last one that led was lost
        self.said = {}                 # {address: what it said} of the last round
        self._onward = None            # [address to which a standby sent us], [] if it knows none; None: it is no standby
        self._looked = time.monotonic()

    def __repr__(self):
        return f"<MasterLink {self.connection.peer if self.connection else self.why_lost}>"

    @property
    def why_lost(self):
        return told(self.said) or "no answer yet"

    async def run(self, owner):
        delay = 0.1
        while True:
            began, said, waiting = time.monotonic(), {}, collections.deque(self.addresses)
            while waiting:
                address = waiting.popleft()
                if address not in said:            # else two standbys that name each other would keep us running about
                    said[address] = await self._visit(address, owner)
                    waiting.extendleft(self._onward or ())
            self.said = said
            if error := hopeless(said):
                owner.master_refused(error)
                return
            owner.master_lost()
            if time.monotonic() - began > 1.0:
                delay = 0.1
            await asyncio.sleep(delay * random.uniform(0.5, 1))
            delay = min(1.0, delay * 1.5)

    async def _visit(self, address, owner):
        """Be connected to the master at this address, for as long as it leads; why that is over, as an error or a text."""
        self._onward = None
        try:
            connection = await dial(address, TO_MASTER, self.secret, self.settings)
        except (OSError, ClupyError) as error:
            return error
        self.connection, self.host = connection, address[0]
        owner.master_joined(connection)
        await connection.serve(owner)
        why = connection.why if self._onward is None else stands_by(self._onward[0] if self._onward else None)
        led, self.leads, self.connection = self.leads, False, None
        if led:
            self.lost_at, self.said = time.monotonic(), {address: why}
            owner.master_lost()
        return why

    def look(self, now):
        """Leave a master that answers no statement, if there are others; the only one is waited for.

        To be called every STATEMENT_TIME, or more often."""
        late = now - self._looked > STATEMENT_TIME + 1           # it was us who slept
        self._looked = now
        if self.connection and len(self.addresses) > 1 and not late and now - self.connection.heard > MASTER_SILENCE:
            self.connection.why = f"it has been silent for {MASTER_SILENCE:g} s"
            log.warning("master %s has been silent for %g s; trying the next one", self.connection.peer, MASTER_SILENCE)
            self.connection.close()

    def follow(self, address):
        """A standby said who leads, or None if it does not know: go there, or to the next."""
        self._onward = [tuple(address)] if address else []
        self.connection.close()

    def close(self):
        """End the connection; `run` is cancelled by who runs it."""
        if self.connection:
            self.connection.abort()


# ==== Code and pickles =======================================================
# A worker has neither the program's modules nor its __main__, so that what it is sent travels in three ways:
#
#      data                      pickle             a payload: bytes, or (bytes, [large buffers])
#      __main__, lambda, local   cloudpickle        by value: the code and the globals that it uses
#      the user's own modules    pickle, by name    the worker's Finder asks module_source() for their text
#
# Plain pickle is tried first since it is 6 times as fast.  What it does not do shows: either it raises, or it wrote the
# name "__main__", under which a worker has another module.  Back come results, in which the client's classes are only
# named (_client_class), and exceptions, each taken apart (pack_exception), since a pickle loses cause, context and
# traceback.

PLAIN = frozenset((int, float, bool, type(None), str))    # types that travel in a message as they are
MAX_CAPTURES = 256                # functions kept with their pickle: a closure per turn of a loop is a new function
MAX_CAPTURED_BYTES = 128 << 20    # ... and bytes of those pickles; more is memory, less is copied and hashed at each use
MAX_KNOWN = 500                   # functions that a worker keeps for its client, and a client for a worker
MAX_KNOWN_BYTES = 256 << 20       # ... and bytes of them; more is memory for every slot, less is sent again
MAX_CLASSES = 4096                # classes kept alive after they were sent, as a result may name them
MAX_CHAIN = 100                   # how far causes, contexts and group members of a failure are followed
MAX_FRAMES = 100                  # of each exception: more are left out in the middle
MAX_TEXT = 10_000                 # characters of the message that stands for an exception which cannot be rebuilt
_missing_modules = {}             # in a worker: {name: what the ModuleNotFoundError should say}, by its Finder
_MAINS = ("__main__", "__mp_main__")      # the second is the first's name in a child of multiprocessing
_MAIN = b"_main__"                # is in each pickle that names either
_RAW = {bytes, bytearray}         # what travels as a _Raw, if it is large
_ABSENT = object()                # the value of a name that has none
_UNRESOLVED = {}                  # {Ref: makes one that arrives as a Ref even among arguments}: for _leave_refs, from Data


class _Pickling(threading.local):
    """What this thread pickles or unpickles just now."""
    refs = None         # the Refs that were met so far, and Futures, where somebody wants to know
    resolve = False     # the arguments of a call: a Ref among them arrives as its value, a Future as its result
    given = {}          # {place of a Future among them: its result}
    of_client = False   # in a worker: what its client sent, so that the classes in it are the client's
    marks = None        # {name: its _Mark} of the script's names in it, where somebody wants to know
    trust = False       # large values among them are taken for what they were: see _capture


pickling = _Pickling()


def _noting_refs(pack, *args, resolve=False):
    """(what pack(*args) returns, the Refs that it met, and Futures): while they live, their values can be had."""
    before = pickling.refs, pickling.resolve
    refs = []
    pickling.refs, pickling.resolve = refs, resolve
    try:
        return pack(*args), refs
    finally:
        pickling.refs, pickling.resolve = before


def pack(obj, pickler=None, snapshot=True):
    """The payload of obj: bytes, or (bytes, [pickle.PickleBuffer]) with the buffers of 64 KiB and more.

    snapshot: writable buffers are copied, so that obj may be changed afterwards; read-only ones never are.
    pickler() is the class that pickles what plain pickle cannot.  Raises what that raises.  Any thread may call."""
    return _pack(_raw(obj), pickler or _by_value_pickler, snapshot)


def _pack(obj, pickler, snapshot=True):
    buffers = _Buffers(snapshot)
    try:
        data = pickle.dumps(obj, 5, buffer_callback=buffers)
    except Exception:                             # a lambda, local class, lock ...: if the pickler cannot either, it raises
        data = _MAIN
    if data.find(_MAIN) >= 0 or _registered():    # find: for bytes, `in` first tries to make a number of _MAIN, 0.2 us
        buffers.clear()
        data = _dumps(pickler(), obj, buffers)
    return (data, list(buffers)) if buffers else data


class _Buffers(list):
    """A buffer_callback, which pickle asks of each buffer: takes large ones out of the pickle; with snapshot, copies those
    that may change."""

    def __init__(self, snapshot):
        self.snapshot = snapshot

    def __call__(self, buffer):
        view = buffer.raw()
        if view.nbytes < LARGE:
            return True                           # it stays in the pickle
        if self.snapshot and not view.readonly:
            buffer = pickle.PickleBuffer(memory(view.nbytes))
            buffer.raw()[:] = view
        self.append(buffer)


class _Raw:
    """Large bytes or a bytearray, which plain pickle would copy into its stream."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return (bytes if type(self.value) is bytes else _bytearray), (pickle.PickleBuffer(self.value),)


def _bytearray(buffer):
    return buffer if type(buffer) is bytearray else bytearray(buffer)     # received memory becomes the argument


def _raw(value):
    return _Raw(value) if type(value) in _RAW and len(value) >= LARGE else value


def unpack(payload):
    """The object.  Only once of a payload that is a tuple: arrays are not copied, so two objects would share its buffers."""
    if type(payload) is tuple:
        data, buffers = payload
        return pickle.loads(data, buffers=buffers)
    return pickle.loads(payload)


def payload_size(payload):
    """About how many bytes of memory the arguments of a call hold, or a function, or None."""
    if type(payload) is bytes:
        return len(payload)
    if payload and type(payload[-1]) is list:
        return len(payload[0]) + sum(memoryview(buffer).nbytes for buffer in payload[1])
    return sum(len(value) for value in payload or () if type(value) is str)


def _type_name(cls):
    module, name = cls.__module__, cls.__qualname__
    return name if module in ("builtins", *_MAINS) else f"{module}.{name}"


def _parameters(func):
    """The names of a function's parameters, as far as it tells."""
    try:
        return list(inspect.signature(func).parameters)
    except (TypeError, ValueError):               # None, or a builtin
        return []


def _culprit(named_values, otherwise, resolve=False):
    """The first of (name, value) that cannot be pickled, as in "argument 2 ('key'), a _thread.lock,"."""
    for name, value in named_values:
        try:
            _noting_refs(pack, value, resolve=resolve)
        except Exception:                         # that one
            return f"{name}, a {_type_name(type(value))},"
    return otherwise


def _numbered(args, func):
    """("argument 2 ('key')", value) of each positional argument."""
    names = _parameters(func)
    for i, value in enumerate(args):
        yield f"argument {i + 1}" + (f" ({names[i]!r})" if i < len(names) else ""), value


def _refusal(error):
    """Why something cannot be pickled, and what to do where that is known."""
    is_lock = re.search(r"through inheritance|_thread\.R?Lock", str(error), re.IGNORECASE)
    return f"{error}" + "; clupy.lock(name) keeps calls apart, and bars of tqdm's need no lock in them" * bool(is_lock)


def pack_arguments(function_name, args, kwargs, func=None):
    """(the payload of (args, kwargs), the Refs and Futures among them).  Refs arrive as their values; for Futures the payload
    is `filled` with their results first.  Raises PicklingError that names the argument at fault and its type; with func also
    the parameter's name.  Any thread may call."""
    for value in args:
        if type(value) in _RAW:
            args = tuple([_raw(value) for value in args])
            break
    if kwargs:
        kwargs = {name: _raw(value) for name, value in kwargs.items()}
    try:
        return _noting_refs(_pack, (args, kwargs), _by_value_pickler, resolve=True)
    except Exception as error:      # whatever a class of the user's raises while it is pickled
        named = [*_numbered(args, func), *((f"argument {name!r}", kwargs[name]) for name in kwargs)]
        raise pickle.PicklingError(f"{function_name} cannot be called: {_culprit(named, 'its arguments', resolve=True)} "
                                   f"cannot be pickled: {_refusal(error)}") from error


def _registered():
    """Modules that the user told cloudpickle to send by value, even if they could be imported."""
    module = sys.modules.get("cloudpickle")
    if module is None:
        return set()
    if not hasattr(module, "list_registry_pickle_by_value"):
        module = importlib.import_module("cloudpickle")     # waits for the thread that imports it just now
    names = module.list_registry_pickle_by_value()          # a copy
    names.discard("__mp_main__")                            # by _dumps, not by the user
    return names


def _dumps(pickler, obj, buffer_callback=None):
    if "__mp_main__" in sys.modules:              # which cloudpickle takes for a module that workers have
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
    file = io.BytesIO()
    pickler(file, 5, buffer_callback).dump(obj)
    return file.getvalue()


class Wrapper:
    """The base of Parallel: wraps a function, its `func`, under whose name a module has the wrapper; never changes."""


class _Instead:
    """Pickles as func(argument): stands in a pickle for what that gives where it arrives."""

    def __init__(self, func, argument):
        self.func, self.argument = func, argument

    def __reduce__(self):
        return self.func, (self.argument,)


def filled(payload, results):
    """The payload of arguments in which results stand where Futures were: {place in the list of pack_arguments: payload}."""
    return pack(_Instead(_fill, (forwarded(payload), {place: forwarded(result) for place, result in results.items()})),
                snapshot=False)


def _fill(parts):
    payload, results = parts
    before, pickling.given = pickling.given, {place: unpack(result) for place, result in results.items()}
    try:
        return unpack(payload)
    finally:
        pickling.given = before


def _given(place):
    """What a Future among the arguments of a call is unpickled as."""
    return pickling.given[place]


@functools.cache
def _by_value_pickler():
    """The class, made late: cloudpickle takes 16 ms to import."""
    class Pickler(cloudpickle.Pickler):
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child(
            {functools._lru_cache_wrapper: _reduce_cached, functools.cached_property: _reduce_descriptor,
             functools.singledispatchmethod: _reduce_descriptor, types.CodeType: _reduce_code,
             types.ModuleType: _reduce_module})
        script_names = _ScriptNames

        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.script = self.script_names()

        def reducer_override(self, obj):
            if type(obj) is types.FunctionType and (found := _named(obj)) is not obj:
                if _wraps(found, obj):
                    return getattr, (found, "func")
                obj = _readable(obj)
                if obj.__globals__ is _script():
                    return self.script.function(obj, super().reducer_override)
            reduced = super().reducer_override(obj)
            if reduced is NotImplemented:
                return _reduce_exception(obj) if isinstance(obj, BaseException) else reduced
            if isinstance(obj, type):
                _keep(obj)
                reduced = _reduce_class(obj, reduced)
                if len(reduced) == 6 and _is_scripts(obj):
                    return *reduced[:2], (reduced[2], reduced[5]), None, None, _set_scripts_class
                return reduced
            if obj.__code__ is _DISPATCHED:
                return _reduce_dispatched(obj)
            if pickling.resolve:
                _leave_refs(reduced[2][1])
            return reduced
    return Pickler


# ---- the script's names
# What a script (or notebook, or `python -c`) defines lives, in a worker, in one namespace: its `__main__`.  So what an
# initializer or a call puts there is what the next call finds, as in a process pool.  A function brings the names that it
# uses, each with a mark: who sent it, and a number that grows when its value is another than when it was sent last.
#
#      a name is set in a worker if its number is higher than any that this sender has set there.
#
# So what the program changed wins, what it did not change stays as calls have left it, and a version of a function that was
# captured earlier sees the newest values, too.  A nested call sends what the program sent under the program's mark, and
# under its worker's own only what was bound anew there.

class _Mark:
    """Of the value that a name of the script had last."""

    def __init__(self, parts, digest, sender, number):
        self.parts = parts                        # of the value, see _parts_of; what came from another process: [the value]
        self.digest = digest                      # content_id of its pickle; None: it came from another process
        self.sent = sender, number                # what travels

    def is_of(self, value):
        """Whether it can be seen, without a pickle, that this is the value still."""
        parts = [value] if self.digest is None else _parts_of(value)
        return (None not in (parts, self.parts) and len(parts) == len(self.parts)
                and all(now is then for now, then in zip(parts, self.parts)))


_marks = {}                                       # {name: _Mark}, changed under the lock
_marks_lock = threading.RLock()                   # also while a value is read: a user's __reduce__ may run
_numbers = itertools.count(1)                     # ... of marks that are made here
_sender = ""                                      # who makes them: the program, or the worker that says so
_came = {}                                        # in a worker: {(name, sender): the number that it was set with last}
_NOT_SENT = {"__name__", "__builtins__", "__spec__", "__loader__"}          # a module's own


def _script():
    """The namespace of `__main__`, or None: a program may have removed it."""
    return getattr(sys.modules.get("__main__"), "__dict__", None)


def _is_scripts(obj):
    """Whether it is what the script has under obj's name."""
    return (_script() or {}).get(obj.__qualname__) is obj


def _mark(name, value):
    """(sender, number) of a name of the script that has this value now.  The lock is held."""
    mark = _marks.get(name)
    if mark is None or not mark.is_of(value):
        payload, _ = _noting_refs(_pack, value, _mark_pickler, False)
        if mark is None or not pickling.trust or type(payload) is not tuple:
            digest = content_id(payload)
            if mark is None or mark.digest != digest:
                mark = _marks[name] = _Mark(_parts_of(value), digest, _sender, next(_numbers))
    if pickling.marks is not None:
        pickling.marks[name] = mark
    return mark.sent


def _parts_of(value):
    """The objects that a value consists of, which is the same while they are; None: it may change unseen."""
    if type(value) in _CONSTANTS or type(value) in (types.ModuleType, types.CodeType, types.GetSetDescriptorType):
        return [value]
    if type(value) is tuple:
        inner = value
    elif type(value) is types.FunctionType and not (value.__closure__ or value.__kwdefaults__ or vars(value)):
        inner = value.__code__, *(value.__defaults__ or ())
    elif type(value) is type and value.__module__ in _MAINS:
        inner = *value.__bases__, *vars(value).values()
    else:
        return [value] if _named(value) is value else None
    parts = [value]
    for thing in inner:
        more = _parts_of(thing)
        if more is None:
            return None
        parts += more
    return parts


class _ScriptNames:
    """The script's functions in one pickle, and the names that they bring."""

    def __init__(self):
        self.namespace = None                     # stands for the worker's `__main__`
        self.marks = {}                           # {name: mark} of those whose values are in the pickle

    def function(self, func, reduce):
        """What reduce, cloudpickle's, makes of it, but with the worker's `__main__` for its globals."""
        with _marks_lock:                         # what it reads is what is marked
            _, (code, base, *others), state, *_ = reduce(func)
            values = state[1]["__globals__"]
            marks = self.bring(func, values)
            own = func.__qualname__ if _is_scripts(func) else None
        if pickling.resolve:
            _leave_refs(state[1])
        state[1]["__globals__"] = {}
        self.namespace = self.namespace or _Instead(_script_globals, base)
        names = {name: (values[name], mark) for name, mark in marks.items()}
        made = own, self.marks.get(own), code, self.namespace, *others
        return _make_function, made, (own, state, names), None, None, _set_function

    def bring(self, func, values):
        """{name: mark} of what the function brings and is not in this pickle yet; adds to values, which are its globals."""
        if _is_scripts(func):
            values[func.__qualname__] = func
        for name in _names_in_texts(func):
            with contextlib.suppress(Exception):          # it cannot be pickled, and may well not be meant
                _mark(name, _script()[name])
                values[name] = _script()[name]
        new = {name: _mark(name, value) for name, value in values.items() if name not in self.marks}
        self.marks.update(new)
        return new


class _NoNames(_ScriptNames):
    """For pickles that make marks: each name has one of its own."""

    def bring(self, func, values):
        return {}


@functools.cache
def _mark_pickler():
    class Pickler(_by_value_pickler()):
        script_names = _NoNames
    return Pickler


def _script_globals(base):
    """A worker's `__main__`.  For functions that come as results or shared values, and in another Executor's process, a
    namespace of their own."""
    if not pickling.of_client:
        return {**base, "__builtins__": __builtins__}
    script = _script()
    script["__package__"] = base.get("__package__")
    return script


def _make_function(own, mark, code, namespace, *others):
    """A function of the script; own: the name by which it can be found, or None."""
    if namespace is _script() and _is_there(own, mark):
        return namespace[own]
    return types.FunctionType(code, namespace, *others)


def _set_function(func, state):
    own, state, names = state
    if func is not (_script() or {}).get(own):    # else it came before, and has what calls made of it
        _class_tracker()._function_setstate(func, state)
    set_names(func.__globals__, names)


def _is_there(name, sent):
    """Whether the name has the value that came with this mark."""
    mark = _marks.get(name)
    return mark is not None and mark.digest is None and mark.sent == sent and mark.is_of(_script().get(name))


def set_names(namespace, names):
    """names: {name: (value, its mark)}."""
    for name, (value, (sender, number)) in names.items():
        if namespace is not _script():
            namespace[name] = value
        elif number > _came.get((name, sender), 0) and name not in _NOT_SENT:
            namespace[name] = value
            _came[name, sender] = number
            _marks[name] = _Mark([value], None, sender, number)


def _set_scripts_class(cls, state):
    state, set_state = state
    set_state(cls, state)
    if pickling.of_client:
        _script().setdefault(cls.__qualname__, cls)


def script_value(name):
    """What a worker is told whose `__main__` lacks a name: the payload of what set_names takes, a text why it cannot be sent,
    or None.  Any thread may call."""
    try:
        value = getattr(sys.modules["__main__"], name)
    except Exception:                             # there is none; a __getattr__ of the user's raises what it likes
        return None
    try:
        with _marks_lock:
            mark = _mark(name, value)
        return pack({name: (value, mark)})
    except Exception as error:                    # whatever a class of the user's raises while it is pickled
        return f"{name!r} of the script, a {_type_name(type(value))}, cannot be pickled: {error}"


def _contents(cell, otherwise):
    try:
        return cell.cell_contents
    except ValueError:                            # not assigned yet
        return otherwise


def _leave_refs(state):
    """In what cloudpickle makes of a function that is an argument: Refs that its code names stay Refs, as in a function
    that is called, since the code asks them for their values."""
    for name, value in state["__globals__"].items():
        if type(value) in _UNRESOLVED:
            state["__globals__"][name] = _UNRESOLVED[type(value)](value)
    cells = list(state["__closure__"] or ())
    for index, value in enumerate(_contents(cell, None) for cell in cells):
        if type(value) in _UNRESOLVED:
            cells[index] = types.CellType(_UNRESOLVED[type(value)](value))
    state["__closure__"] = tuple(cells) or None


# ---- what goes by name, and what cloudpickle alone would not do

@functools.lru_cache(MAX_CLASSES)
def _keep(cls):
    """Keep a class that was sent: cloudpickle's tracker is weak, and a result must find it by its id."""


def _named(obj):
    """What a worker finds under obj's module and name (obj itself, if it can go by name), or None."""
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(name, str) or module in _MAINS:
        return None
    if any(f"{module}.".startswith(f"{by_value}.") for by_value in _registered()):
        return None
    try:
        return operator.attrgetter(name)(sys.modules[module])
    except Exception:                             # a local name; a module made by hand, or one that raises what it likes
        return None


def _wraps(found, func):
    """Whether what is found under func's name is its Wrapper: func goes as the `.func` of it, not by value."""
    return isinstance(found, Wrapper) and found.func is func


def _readable(func):
    """func, or a twin whose annotations are texts, or none: Python 3.14 evaluates them when they are asked for, as cloudpickle
    does, and what they name may not be there, or only for a type checker."""
    try:
        func.__annotations__
        return func
    except Exception:                             # whatever the user's expressions raise
        twin = types.FunctionType(func.__code__, func.__globals__, func.__name__, func.__defaults__, func.__closure__)
        for name in "__kwdefaults__", "__module__", "__qualname__", "__doc__", "__dict__":
            setattr(twin, name, getattr(func, name))
        try:
            twin.__annotations__ = annotationlib.get_annotations(func, format=annotationlib.Format.STRING)
        except Exception:                         # 1 / 0 is evaluated even for its text
            twin.__annotations__ = {}
        return twin


def _reduce_cached(cached):
    """lru_cache and cache of a function that cannot go by name: the worker begins with an empty cache."""
    if _named(cached) is cached:
        return cached.__qualname__
    return _make_cached, (cached.__wrapped__, cached.cache_parameters())


def _make_cached(func, parameters):
    return functools.lru_cache(**parameters)(func)


def _reduce_descriptor(made):
    """Without the lock that a cached_property has until Python 3.11, and the cache of a singledispatchmethod since 3.13."""
    state = {name: value for name, value in vars(made).items() if name not in ("lock", "_method_cache")}
    return type(made), (made.func,), state


_DISPATCHED = functools.singledispatch(len).__code__       # which all functions that singledispatch makes have


def _reduce_dispatched(func):
    """What singledispatch made, whose cache of weak references cannot be pickled.  In two steps: its cases may call it."""
    return _make_dispatched, (func.__name__,), dict(func.registry), None, None, _set_dispatched


def _make_dispatched(name):
    def case():
        """Stands for the first one until that is there."""
    case.__name__ = name                          # which the error for no argument says
    return functools.singledispatch(case)


def _set_dispatched(func, cases):
    for cls, case in cases.items():
        func.register(cls, case)
    functools.update_wrapper(func, cases[object])


def _reduce_code(code):
    """With its file's name, which cloudpickle leaves out from 3.1.3 on: tracebacks show their lines by it."""
    _, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return _make_code, (arguments, code.co_filename)


def _make_code(arguments, filename):
    return types.CodeType(*arguments).replace(co_filename=filename)


def _reduce_module(module):
    """By name, and so that submodules, which something imported here, are found there through their package."""
    make, arguments = cloudpickle.Pickler.dispatch_table[types.ModuleType](module)
    return (make, arguments) if len(arguments) > 1 else (_module, arguments)      # two: by value


def _module(name):
    module = importlib.import_module(name)
    import_when_asked([module])
    return module


def import_when_asked(values):
    """Let the packages among the values, and those in them, import a submodule when somebody asks them for it."""
    for package in values:
        if type(package) is types.ModuleType and "__path__" in vars(package):
            own = vars(package).get("__getattr__")
            if getattr(own, "func", None) is not _submodule:
                package.__getattr__ = functools.partial(_submodule, package.__name__, own)
                import_when_asked(list(vars(package).values()))


def _submodule(package, own, name):
    """The __getattr__ of a package, which had this one of its own, or None."""
    missing, full_name = AttributeError(f"module {package!r} has no attribute {name!r}"), f"{package}.{name}"
    if own is not None:
        try:
            return own(name)
        except AttributeError as error:
            missing = error
    if name.startswith("__"):
        raise missing
    try:
        return _module(full_name)
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        raise missing from None


# ---- classes
# A class statement does more than make a class: metaclass and __init_subclass__ enter it in registries, or want keywords;
# an enum makes its members by __new__ and __init__, of arguments that it does not keep.  cloudpickle runs all that again.
# Here a bare class is made without any of it, and what came of it the first time is set as the class's state.

_OWN_DESCRIPTORS = types.MemberDescriptorType, types.GetSetDescriptorType      # of __slots__; of __dict__ and __weakref__


def _reduce_class(cls, reduced):
    """cloudpickle's reduction of a class, but for how it is made, and with its enum members as they are."""
    in_c = any(type(vars(base).get("__new__")) is types.BuiltinMethodType for base in type(cls).__mro__[:-2])
    if len(reduced) == 2 or in_c:                 # type(None) and such; metaclasses in C want to make their classes themselves
        return reduced
    _, (*_, tracker_id, _), (attributes, _), *_ = reduced
    own, members = vars(cls), cls.__members__ if issubclass(cls, enum.Enum) else {}
    namespace = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    namespace.update((name, value) for name, value in own.items() if name == "__dict__" and isinstance(value, property))
    slots = [name for name, value in own.items() if type(value) in _OWN_DESCRIPTORS and value.__objclass__ is cls]
    if "__slots__" in own:
        namespace["__slots__"] = slots            # private ones have their class's name in front here
    attributes = {name: value for name, value in attributes.items() if name not in slots and name not in members}
    states = {name: object.__getstate__(member) for name, member in members.items()}
    if members:
        raw = [(name, member._value_, _new_arguments(member)) for name, member in members.items()]
        make, how = _make_enum, (raw, getattr(cls, "_boundary_", None))
    else:
        make, how = _make_class, ()
    arguments = tracker_id, type(cls), cls.__name__, cls.__bases__, namespace, *how
    return make, arguments, (attributes, states), None, None, _set_class


def _new_arguments(member):
    """What the __new__ of an enum member's data type takes to make another, as pickle has it."""
    make, arguments, *_ = object.__reduce_ex__(member, 2)
    return arguments[1:] if make is copyreg.__newobj__ else arguments


class _Made(Exception):
    """Raised in type.__new__ when the class is whole, before __init_subclass__ is called."""
    cls = None

    def __set_name__(self, cls, name):
        self.cls = cls
        delattr(cls, name)
        raise self


def _tracked(make):
    """make, but for a class that is here by the tracker's id."""
    @functools.wraps(make)
    def known_or_made(tracker_id, *arguments):
        tracker = _class_tracker()
        cls = tracker._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
        return tracker._lookup_class_or_track(tracker_id, make(*arguments) if cls is None else cls)
    return known_or_made


@_tracked
def _make_class(metaclass, name, bases, namespace):
    made = _Made()
    try:
        type.__new__(metaclass, name, bases, {**namespace, "made": made})
    except Exception:
        if made.cls is None:
            raise
    if issubclass(metaclass, abc.ABCMeta):
        abc._abc_init(made.cls)
    return made.cls


@_tracked
def _make_enum(metaclass, name, bases, namespace, members, boundary):
    todo = iter(members)

    def new(cls, *_):
        _, value, arguments = next(todo)
        member = cls._member_type_.__new__(cls, *arguments)
        member._value_ = value
        return member
    body = enum.EnumType.__prepare__(name, bases)
    body |= {**namespace, "__new__": new, "__init__": lambda *_: None}
    for member, value, _ in members:
        body[member] = enum.member(value)
    cls = enum.EnumType.__new__(metaclass, name, bases, body, boundary=boundary)
    for attribute in {"__init__", "__new_member__"} & vars(cls).keys():      # the state has its own, if any
        type.__delattr__(cls, attribute)
    return cls


def _set_class(cls, state):
    attributes, members = state
    for name, value in attributes.items():
        if name == "_abc_impl":                   # the classes that were registered
            for registered in value:
                abc.ABCMeta.register(cls, registered)
        else:
            type.__setattr__(cls, name, value)    # a metaclass of the user's may forbid it
    for name, values in members.items():
        values, slots = values if type(values) is tuple else (values, {})
        member = cls._member_map_[name]
        vars(member).update(values or {})
        for slot, value in slots.items():
            object.__setattr__(member, slot, value)


# A class that came from the client goes back as the id that cloudpickle's tracker gave it.  By value, all attributes of the
# class that has this id there would be set to copies.  The tracker is private, so it is checked.

def _class_tracker():
    """cloudpickle's module with its names that are used here.  Raises ClupyError if they are gone."""
    module = importlib.import_module("cloudpickle.cloudpickle")
    for name in "_DYNAMIC_CLASS_TRACKER_BY_ID", "_get_or_create_tracker_id", "_lookup_class_or_track", "_function_setstate":
        if not hasattr(module, name):
            raise ClupyError(f"cloudpickle {cloudpickle.__version__} has no {name}, by which CluPy makes "
                             f"functions and finds the classes in results: install cloudpickle 3.1")
    return module


def _client_class(tracker_id, name):
    """The class that went by value under this id.  A worker's results name it so; pickles call this."""
    cls = _class_tracker()._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    if cls is None:
        raise pickle.UnpicklingError(f"a result has an object of class {name}, which this process never "
                                     f"had or has dropped: keep the class, or define it in a module")
    return cls


_client_classes = weakref.WeakSet()     # in a worker: classes and type variables that came by value from its client


def pack_result(value, name="the call"):
    """The payload of what `name` returned, its buffers not copied.  Raises PicklingError that says its type."""
    if isinstance(value, BaseException):          # arrives as if it had been raised
        return pack_exception(value)
    try:
        return pack(value, _result_pickler, snapshot=False)
    except BaseException as error:                # whatever a class of the user's raises while it is pickled, SystemExit too
        raise pickle.PicklingError(f"the result of {name}, a {_type_name(type(value))}, cannot be "
                                   f"pickled: {error}") from error


@functools.cache
def _result_pickler():
    class Pickler(_by_value_pickler()):
        def reducer_override(self, obj):
            if isinstance(obj, type) and obj in _client_classes:
                tracker_id = _class_tracker()._get_or_create_tracker_id(obj)
                return _client_class, (tracker_id, obj.__qualname__)
            return super().reducer_override(obj)
    return Pickler


# ---- functions
# A function is captured: pickled by value with all that it uses, as it is now.  It is known everywhere by the hash of that
# pickle, so a worker is sent the same content once, whoever captured it and however often.

class Function:
    """One version of a function: what workers are sent once and then know by its id."""

    __slots__ = "id", "payload", "name", "setup", "size", "mean", "refs", "__weakref__"

    def __init__(self, id, payload, name, setup):
        self.id = id                              # 16 bytes: what function_of says of payload and setup
        self.payload, self.name = payload, name
        self.setup = setup                        # payload of a function that a worker must have called first, or None
        self.size = payload_size(payload) + payload_size(setup)     # bytes that it takes at either end of a slot
        self.mean = None                          # seconds that a call takes, as far as the engine knows
        self.refs = ()                            # the Refs in it, which live as long

    def __repr__(self):
        return f"<Function {self.id.hex()[:8]} {self.name}, {self.size:,} bytes>"


class Known:
    """What one end of a slot has told the other, which keeps so many functions and bytes of them: the teller alone counts,
    and says what is to be dropped, so the two never differ."""

    def __init__(self):
        self._sizes = collections.OrderedDict()   # {id of a Function: its size}, least recently used first
        self._total = 0

    def __repr__(self):
        return f"<Known {len(self._sizes)} functions, {self._total:,} bytes>"

    def learn(self, function):
        """(whether it has to be told, ids of functions to be dropped for it); never drops the one just learned."""
        if function.id in self._sizes:
            self._sizes.move_to_end(function.id)
            return False, []
        self._sizes[function.id] = function.size
        self._total += function.size
        dropped = []
        while len(self._sizes) > MAX_KNOWN or self._total > MAX_KNOWN_BYTES and len(self._sizes) > 1:
            id, size = self._sizes.popitem(last=False)
            self._total -= size
            dropped.append(id)
        return True, dropped


_functions = weakref.WeakValueDictionary()        # {id: Function} while anybody has it
_hashed = weakref.WeakValueDictionary()           # {id() of a payload: the Function that has it, and so keeps that id its own}
_captures = {}          # {id(func): (func, Function, reads)}, oldest first; any thread looks, changed under the lock
_capture_lock = threading.Lock()                  # for the three


def function_of(payload, name, setup=None):
    """The Function of this payload: the same content is the same object, while anybody has it.  Any thread may call.

    setup: payload of a function that a worker must have called first."""
    hashed = content_id(payload) if setup is None else _hash(content_id(payload), content_id(setup))
    with _capture_lock:
        function = _functions.get(hashed)
        if function is None:
            function = _functions[hashed] = Function(hashed, payload, name, setup)
            if setup is None:
                _hashed[id(payload)] = function
        return function


def content_id(payload):
    """16 bytes that name what is in a payload, the same in every process."""
    known = _hashed.get(id(payload))              # hashing 8 MB takes 4 ms
    if known is not None:
        return known.id
    return _hash(payload[0], *payload[1]) if type(payload) is tuple else _hash(payload)


def _hash(*parts):
    return hashlib.sha256(b"".join([hashlib.sha256(part).digest() for part in parts])).digest()[:16]


def capture(func):
    """The Function that func is now: a changed global or closure is seen.  Any thread may call.

    Pickling takes 40 us; if all that the last pickle read is immutable and still the same object (_reads), it is reused in
    0.5 us.  Raises PicklingError that names what is at fault."""
    known = _captures.get(id(func))
    if known is not None and known[0] is func:
        for read, a, b, value in known[2]:
            if read(a, b) is not value:
                break
        else:
            return known[1]
    return _capture(func)


def _capture(func, trust=True):
    """trust: if it is known, with large buffers, pickle it as if those in the script's names were what they were: they are,
    if that is what the last pickle was, and comparing costs a tenth of hashing."""
    name = _function_name(func)
    known = _captures.get(id(func))
    is_known = known is not None and known[0] is func
    trust = trust and is_known and type(known[1].payload) is tuple
    reads = _reads(func)                          # first: what changes while it is pickled is seen by the next capture
    buffers = _Buffers(snapshot=False)
    before = pickling.marks, pickling.trust
    pickling.marks, pickling.trust = {}, trust
    try:
        data, refs = _noting_refs(_dumps, _by_value_pickler(), func, buffers)
        if reads is not None:                     # if a value was another meanwhile, the script's names have new marks
            reads += [(_marks.get, name, None, mark) for name, mark in pickling.marks.items()]
    except Exception as error:                    # whatever a class of the user's raises while it is pickled
        raise pickle.PicklingError(f"{name} cannot be sent to a worker: {_culprit(_used(func), 'it')} cannot "
                                   f"be pickled: {_refusal(error)}") from error
    finally:
        pickling.marks, pickling.trust = before
    views = [buffer.raw() for buffer in buffers]
    if is_known and _is_still(known[1].payload, data, views):
        function = known[1]
    elif trust:
        return _capture(func, trust=False)
    else:
        copies = [pickle.PickleBuffer(bytearray(view)) for view in views]
        function = function_of((data, copies) if copies else data, name)
    function.refs = refs
    if function.size <= MAX_CAPTURED_BYTES and (reads is not None or function.size >= LARGE):
        _remember(func, function, _NEVER if reads is None else reads)
    return function


_NEVER = [(operator.is_, 0, 0, False)]            # a read that is never what it was: the function is captured at each use


def _is_still(payload, data, views):
    """Whether a payload that _capture made has these bytes: comparing 8 MB takes 0.2 ms, copying and hashing it 4 ms."""
    last, copies = payload if type(payload) is tuple else (payload, ())
    return (last == data and len(copies) == len(views)
            and all(copy.raw().obj == view for copy, view in zip(copies, views)))       # bytearray == view is a memcmp


def _remember(func, function, reads):
    with _capture_lock:
        _captures.pop(id(func), None)             # it is the newest now
        _captures[id(func)] = func, function, reads
        while len(_captures) > MAX_CAPTURES or function.size >= LARGE and (
                sum(kept.size for _, kept, _ in _captures.values()) > MAX_CAPTURED_BYTES):
            del _captures[next(iter(_captures))]


def limit_key(func):
    """Texts and numbers that name func as its author sees it, the same in the client and in a worker: calls with one key
    share one `max`, whatever func has in its globals, cells and defaults, and to whatever object it is bound.  So all
    functions that one lambda or one inner `def` makes are one, and a wrapper is what it wraps."""
    while True:
        if isinstance(func, (functools.partial, Wrapper)):
            func = func.func
        elif isinstance(func, types.MethodType):
            func = func.__func__
        elif "__wrapped__" in getattr(func, "__dict__", ()):
            func = func.__wrapped__
        else:
            break
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None)
    if not isinstance(name, str):                 # an object that can be called
        func = type(func)
        name = func.__qualname__
    module = getattr(func, "__module__", None) or ""
    key = "__main__" if module in _MAINS else module, name
    if "<" not in name or not hasattr(func, "__code__"):
        return key
    code = func.__code__                          # where in the line it stands is in its line table, but for a mere constant's
    constants = repr([constant for constant in code.co_consts if type(constant) in _CONSTANTS]).encode()
    return *key, code.co_filename, code.co_firstlineno, _hash(code.co_code, code.co_linetable, constants).hex()


def _function_name(func):
    if isinstance(func, functools.partial):
        return _function_name(func.func)
    return getattr(func, "__qualname__", None) or type(func).__qualname__


def _registered_are(modules, _):
    return _registered() == modules


_CONSTANTS = {int, float, complex, bool, str, bytes, range, type(None), type(...), type(NotImplemented)}


def _reads(func):
    """[(read, a, b, value)]: func's pickle is right while each read(a, b) is value.  None: part of it may change unseen.
    All that goes by value is followed, but no names, docs, and later imports of packages."""
    reads, todo, seen = [(_registered_are, _registered(), None, True)], [func], set()
    while todo:
        obj = todo.pop()
        if type(obj) in _CONSTANTS or id(obj) in seen:
            continue
        seen.add(id(obj))
        if type(obj) in (tuple, frozenset):
            todo += obj
        elif type(obj) in (types.GenericAlias, types.UnionType):    # list[int], int | None in annotations
            todo += getattr(obj, "__origin__", None), *obj.__args__
        elif _named(obj) is obj or type(obj) is types.FunctionType and _wraps(_named(obj), obj):
            prefix, _, name = obj.__qualname__.rpartition(".")
            owner = sys.modules[obj.__module__]
            namespace = vars(operator.attrgetter(prefix)(owner) if prefix else owner)
            reads.append((namespace.get, name, _ABSENT, _named(obj)))
        elif isinstance(obj, Wrapper):
            todo.append(obj.func)
        elif type(obj) is types.FunctionType:
            todo += _function_reads(obj, reads)
        elif not (isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj):
            return None
    return reads


def _function_reads(func, reads):
    """Add to reads what the function itself consists of.  Returns the values it uses, which are to be followed."""
    for name in "__code__", "__defaults__", "__kwdefaults__":
        reads.append((getattr, func, name, getattr(func, name)))
    reads.append((operator.eq, vars(func), {}, True))               # attributes go by value, and are seldom used
    kwonly = func.__code__.co_varnames[func.__code__.co_argcount:][:func.__code__.co_kwonlyargcount]
    readable = _readable(func)
    used = [(_contents, cell, _ABSENT) for cell in func.__closure__ or ()]
    for namespace, names in ((func.__globals__, [*_global_names(func.__code__), *_names_in_texts(readable)]),
                             (func.__kwdefaults__ or {}, kwonly),
                             (readable.__annotations__, readable.__annotations__)):
        used += [(namespace.get, name, _ABSENT) for name in names]
    values = [read(a, b) for read, a, b in used]
    reads += [(*what, value) for what, value in zip(used, values)]
    return [value for value in values if value is not _ABSENT] + [func.__defaults__]


@functools.lru_cache(MAX_CAPTURES)
def _global_names(code):
    """The globals that cloudpickle sends with the code: named by it or by a function in it."""
    names = {step.argval: None for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


_LOOKS_UP = {"eval", "exec", "globals", "vars", "query"}     # what finds a global by a text; the last is pandas'


def _names_in_texts(func):
    """Names of the script in texts of a function of it: in annotations, and in constants if it may look names up in them."""
    if func.__globals__ is not _script():
        return []
    texts = [text for text in func.__annotations__.values() if type(text) is str]
    code = func.__code__
    if not _LOOKS_UP.isdisjoint(code.co_names):
        texts += [text for text in code.co_consts if type(text) is str]
    return [name for text in texts for name in re.findall(r"[^\W\d]\w*", text) if name in func.__globals__]


def _used(func):
    """(name, value) of what may keep a function from being pickled, for the error."""
    if isinstance(func, types.FunctionType):
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or ()):
            yield f"{name!r} of its closure", _contents(cell, None)
        for name in _global_names(func.__code__):
            yield f"its global {name!r}", func.__globals__.get(name)


# ---- exceptions
# A pickle of an exception loses its cause, context and traceback, and one that cannot be pickled, or rebuilt at the other
# end, would spoil all that hang together with it.  So each goes as two calls,
#
#      _rebuilt(type name, message, frames, pickle of (class, args), ...)      if that fails, a RemoteError of the texts
#      _link(the exception, (pickle of its attributes, ..., cause, context, ...))
#
# in one pickle for all, whose memo keeps what is shared and circular among them.  The inner pickles have no exceptions in
# them, only their places in a list that travels beside (_alone).

def pack_exception(error, skip_frames=0, where=""):
    """The payload of an exception with its causes, contexts, group members, notes and traceback.  Cannot raise.

    `unpack` makes the exception: raised there, it prints as if the call had run there.  One that cannot be rebuilt, be it
    a cause, is a RemoteError with a note that says why.
    skip_frames: how many of the outermost frames are not the user's; where: a text that stands for them, or none."""
    try:
        frames = _frames(error.__traceback__)[skip_frames:]
        if where:
            frames.insert(0, (f"<{where}>", "call", 1, 1, None, None, None))
        return _dumps(functools.partial(_FailurePickler, {id(error): frames}), error)
    except BaseException as problem:              # RecursionError, MemoryError, a class that breaks type()
        why = f"{type(problem).__name__} while the exception was taken apart"
        return pack(_remote_error(type(error).__name__, _message(error), [], why))


class _FailurePickler(pickle.Pickler):
    """Takes each exception apart.  frames: {id of an exception: its frames}, where they are not its traceback's."""

    def __init__(self, frames, *arguments):
        super().__init__(*arguments)
        self.frames = frames
        self.depths = {}                          # {id of an exception: how many others lead to it}

    def reducer_override(self, error):
        if not isinstance(error, BaseException):
            return NotImplemented
        if isinstance(error, ModuleNotFoundError) and error.name in _missing_modules:
            error.msg = _missing_modules[error.name]
            error.args = error.msg,
        frames = _shortened(self.frames.get(id(error)) or _frames(error.__traceback__))
        texts = _type_name(type(error)), _message(error), frames
        links, depth = [error.__cause__, error.__context__], self.depths.get(id(error), 0) + 1
        for other in *links, *(error.exceptions if isinstance(error, BaseExceptionGroup) else ()):
            self.depths.setdefault(id(other), depth)
        if depth > MAX_CHAIN:
            return _remote_error, (*texts, f"it is behind {MAX_CHAIN} others")
        made_by, attributes = _parts(error)
        attributes = attributes and _alone(attributes)
        state = attributes, getattr(error, "__notes__", []), *links, error.__suppress_context__
        return _rebuilt, (*texts, *_alone(made_by)), state, None, None, _link


def _reduce_exception(error):
    """An exception among other values arrives without cause and traceback, as pickle does it, whatever its __init__ takes."""
    (make, args), attributes = _parts(error)
    return make, args, attributes


def _parts(error):
    """((make, args), attributes) of an exception: as its __reduce__ has them, if what they make looks the same."""
    try:
        copied = copy.copy(error)                 # does what unpickling does, but makes no classes
        if type(copied) is type(error) and str(copied) == str(error):
            make, args, *state = error.__reduce_ex__(5)
            return (make, args), state[0] if state else None
    except BaseException:                         # the __init__ wants other arguments, or a method of the user's fails
        pass
    return (_without_init, (type(error), error.args)), vars(error)


def _alone(obj):
    """(pickle, [the exceptions in it]) of obj, or (None, why there is none)."""
    others = {}                                   # {id of an exception: (its place, it)}
    try:
        return _dumps(functools.partial(_part_pickler(), others), obj), [error for _, error in others.values()]
    except BaseException as problem:              # whatever the user's methods raise; RecursionError, MemoryError
        return None, _line(problem)


@functools.cache
def _part_pickler():
    class Pickler(_result_pickler()):
        def __init__(self, others, *arguments):
            super().__init__(*arguments)
            self.others = others

        def persistent_id(self, obj):
            if isinstance(obj, BaseException):
                return self.others.setdefault(id(obj), (len(self.others), obj))[0]
    return Pickler


def _message(error):
    try:
        text = str(error)
    except BaseException:                         # a __str__ of the user's
        return "<no text: its __str__ fails>"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text):,} characters)"


def _frames(trace):
    """The frames of a traceback as _traceback takes them."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        line, text = trace.tb_lineno or code.co_firstlineno, _line_text(trace.tb_frame, trace.tb_lineno)
        instruction = trace.tb_lasti // 2                   # negative, if there is none
        first, *rest = next(itertools.islice(code.co_positions(), instruction, None)) if instruction >= 0 else [None]
        frames.append((code.co_filename, code.co_name, line, *(rest if first == line else (line, None, None)), text))
        trace = trace.tb_next
    return frames


def _line_text(frame, line):
    """The line of a module's file; None for code that came by value: only the client has its file."""
    if "remote text" in frame.f_globals:          # a frame made by _traceback, of a nested call
        return frame.f_globals["remote text"]
    module = sys.modules.get(frame.f_globals.get("__name__"))
    if getattr(module, "__dict__", None) is not frame.f_globals:
        return None
    return linecache.getline(frame.f_code.co_filename, line, frame.f_globals).rstrip() or None


def _shortened(frames):
    if len(frames) <= MAX_FRAMES:
        return frames
    half = MAX_FRAMES // 2
    gap = f"<{len(frames) - 2 * half} frames left out>", "...", 1, 1, None, None, None
    return [*frames[:half], gap, *frames[-half:]]


class _PartUnpickler(pickle.Unpickler):
    def __init__(self, data, others):
        super().__init__(io.BytesIO(data))
        self.persistent_load = others.__getitem__


def _together(data, others):
    """The object that _alone took apart."""
    if data is None:
        raise pickle.UnpicklingError(others)      # why
    return _PartUnpickler(data, others).load()


def _rebuilt(type_name, message, frames, data, others):
    try:
        make, args = _together(data, others)
        return make(*args).with_traceback(_traceback(frames))
    except Exception as problem:                  # a constructor's, a module is missing here, or what it made is no exception
        return _remote_error(type_name, message, frames, _line(problem))


def _link(error, state):
    attributes, notes, error.__cause__, error.__context__, error.__suppress_context__ = state
    try:
        if attributes and type(error) is not RemoteError:       # which may stand for another
            error.__setstate__(_together(*attributes))
    except Exception as problem:                  # one of them is of a class that is missing here, say
        error.add_note(f"its attributes cannot be rebuilt here: {_line(problem)}")
    for note in notes:
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def _remote_error(type_name, message, frames, why):
    """What stands for an exception that cannot be rebuilt."""
    trace = _traceback(frames)
    text = "".join(traceback.format_tb(trace))
    error = RemoteError(type_name, message, f"Traceback (most recent call last):\n{text}{type_name}: {message}")
    error.add_note(f"{type_name} cannot be rebuilt here: {why}")
    return error.with_traceback(trace)


def _without_init(cls, args):
    """An exception whose __init__ does not take its args: class E(Exception) with __init__(self, a, b)."""
    error = cls.__new__(cls, *args)
    error.args = args
    return error


def _line(error):
    return "".join(traceback.format_exception_only(error))[:500].strip()


def _traceback(frames):
    """A traceback of frames: (file, function, first and last line, first and last column, text or None).

    A frame cannot be made, but code that fails at any place can be compiled: the idea is Jinja2's.  The text is given for
    files that the worker has: if the file here has another line there, its name gets " (remote)"."""
    trace = None
    for filename, name, line, last_line, column, last_column, text in reversed(frames):
        linecache.checkcache(filename)            # as printing will do
        if text is not None and linecache.getline(filename, line).rstrip() != text:
            filename = filename.removesuffix(" (remote)") + " (remote)"
            _remember_line(filename, line, text)
        if last_line != line or column is None:   # the whole line, which Python then does not underline
            whole = linecache.getline(filename, line).encode().rstrip()
            column, last_column = column or len(whole) - len(whole.lstrip()), len(whole)
        code = _failing(filename, name, line, column, max(column, last_column))
        try:
            eval(code, {"__builtins__": {}, "remote text": text})       # the text: see _line_text
        except NameError as error:
            inner = error.__traceback__.tb_next
            trace = types.TracebackType(trace, inner.tb_frame, inner.tb_lasti, line)
    return trace


@functools.lru_cache(1024)
def _failing(filename, name, line, column, last_column):
    """Code that raises NameError there."""
    node = ast.Name("no such name", ast.Load(), lineno=line, end_lineno=line,
                    col_offset=column, end_col_offset=last_column)
    return compile(ast.Expression(node), filename, "eval").replace(co_name=name)


def _remember_line(filename, line, text):
    lines = list(linecache.getlines(filename))
    lines += ["\n"] * (line - len(lines))
    lines[line - 1] = text + "\n"
    linecache.cache[filename] = 0, None, lines, filename        # None: checkcache() leaves it alone


# ---- modules on demand

_CLUPY = {"clupy", "clupy_master", "clupy_server"}
_EVERY_SERVERS = sys.stdlib_module_names | _CLUPY
_OWN = "source", "namespace", "compiled", "value"           # kinds of answers that say that a module is the user's own
MAX_FILE = 64 << 20               # bytes of a file beside a module; more is memory for every worker that asks for it
_served_modules = {}    # {name: (its __spec__ here, or None; the last answer)} of own modules that workers were told of


def own_modules():
    """The user's own top-level modules that are imported, or run by -m, or would shadow one of the standard library's: a
    worker asks for these first.  Never raises."""
    specs = {name: _spec_of(name) for name in list(sys.modules) if isinstance(name, str) and "." not in name}
    for name in _shadowing() - specs.keys():
        with contextlib.suppress(BaseException):  # a finder of the user's may raise anything
            specs[name] = _spec(name, None)
    if (main := specs.get("__main__")) is not None:         # under the name by which it could be imported
        specs.setdefault(main.name.partition(".")[0], main)
    return frozenset(name for name, spec in specs.items() if _is_own(name, spec))


def _shadowing():
    """Names of standard modules that something outside the library folders has, too: a script's folder is searched first."""
    found = set()
    for folder in sys.path:
        with contextlib.suppress(OSError, TypeError):       # there is none; an archive; anything that users put there
            if not _is_library(os.path.join(folder, "any")):
                found.update(entry.partition(".")[0] for entry in os.listdir(folder or "."))
    return found & sys.stdlib_module_names


def surroundings(on_this_machine):
    """What the program has set for all of its code, and a worker sets for its calls, too: (its filters of warnings, those of
    built-in categories; {name of a logger: level}; whether the root logger shows what is logged; multiprocessing's key, by
    which a call may use what a Manager of the program's gave it: None to another machine, or without multiprocessing)."""
    filters = [(action, getattr(message, "pattern", message) or "", category.__name__, getattr(module, "pattern", module) or "",
                line) for action, message, category, module, line in list(warnings.filters) if category.__module__ == "builtins"]
    loggers = {**logging.root.manager.loggerDict, "": logging.root}
    levels = {name: int(level) for name, logger in loggers.items() if (level := getattr(logger, "level", logging.NOTSET))}
    key = bytes(sys.modules["multiprocessing.process"].current_process().authkey) if (
        on_this_machine and "multiprocessing.process" in sys.modules) else None
    return filters, levels, logging.root.hasHandlers(), key


def _spec_of(name):
    """The __spec__ of a module that is imported, or None.  What stands in sys.modules is anybody's: it may have none, or
    one that is no spec, or raise, as modules do that import themselves at the first use."""
    try:
        spec = sys.modules[name].__spec__
        return spec if isinstance(spec, importlib.machinery.ModuleSpec) else None
    except BaseException:                         # pytest's Skipped is no Exception
        return None


def module_source(name, parent_path=None):
    """What a worker is told that lacks a module; parent_path: the __path__ of the package it is in.  One of
         ("source", text, file name, __path__ or None)      it is the user's own
         ("namespace", __path__)                            a folder without __init__.py
         ("compiled", file name, stamp, why not, __path__)  own without source: for who has that file
         ("value", payload, file name, __path__)            own, and its file is gone: the module's namespace
         ("library", distribution, version)                 installed here, but not sent
         ("refused", why)                                   own, but it has no source
         ("no",)                                            unknown here, or the standard library's
    Nothing is imported or run, not even the parent.  As long as the program has a module as it was told, it is told the
    same: all workers run one version.  Reads files; any thread may call; never raises."""
    spec, (told_spec, told) = _spec_of(name), _served_modules.get(name, (None, None))
    if spec is not None and spec is told_spec:
        return told
    try:
        answer = _module_source(name, parent_path)
    except BaseException as error:                # a finder or loader of the user's may raise anything
        return "refused", f"module {name!r} cannot be read by its client: {_line(error)}"
    if answer[0] in _OWN:
        _served_modules[name] = spec, answer
    return answer


def reloaded():
    """Note which own modules the program has loaded anew since a worker was told of them, by importlib.reload or after a
    failed import: each load gives a module another __spec__.  Whether one of them is another now."""
    changed = False
    for name, (spec, told) in list(_served_modules.items()):
        now = _spec_of(name)
        if now is not None and now is not spec:
            changed |= module_source(name) != told
    return changed


def _module_source(name, parent_path):
    spec = _spec(name, parent_path)
    if spec is None and sys.modules.get(name) is not None:
        return "refused", (f"module {name!r} was made while its client ran, so it has no source to send: "
                           f"call cloudpickle.register_pickle_by_value(module) before the calls that use it")
    if spec is None or not _places(spec):
        return ("no",)
    if not _is_own(name, spec):
        return ("no",) if is_every_servers(name) else ("library", *_distribution(name))
    if not spec.has_location:
        return "namespace", [place for place in _places(spec) if not _is_library(place)]
    path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    text, is_gone = None, name in sys.modules and not os.path.exists(spec.origin)
    try:
        text = _module_text(spec)
    except (ImportError, OSError):
        if not is_gone:
            raise
    if text is None and is_gone:
        return "value", _module_payload(sys.modules[name]), spec.origin, path
    if text is None:
        return "compiled", spec.origin, stamp(spec.origin), (
            f"module {name!r} is compiled ({spec.origin}), and only source is sent: add its "
            f"project under `libraries:` in clupy.client.dependency.yaml"), path
    return "source", text, spec.origin, path


def _spec(name, parent_path):
    """The module's spec or None.  importlib.util.find_spec would run the parent."""
    main = _spec_of("__main__")
    if main is not None and main.name == name:    # python -m package.script
        return main
    spec = _spec_of(name)
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    while spec is None and finders:
        try:
            spec = finders.pop(0).find_spec(name, parent_path)
        except KeyError:                          # a namespace package whose parent is not imported here
            spec = _namespace(name, parent_path)
    return spec


def _namespace(name, parent_path):
    finders = [finder for place in parent_path if (finder := pkgutil.get_importer(place)) is not None]
    parts = [spec for spec in (finder.find_spec(name) for finder in finders) if spec is not None]
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [place for part in parts for place in part.submodule_search_locations]
    return spec


def _module_text(spec):
    """The source of a module, or None: it is compiled."""
    if hasattr(spec.loader, "get_source"):
        return spec.loader.get_source(spec.name)
    with io.open(spec.origin, "rb") as file:      # pytest's loader
        return importlib.util.decode_source(file.read())


def stamp(path):
    """By which one knows the file of this path on another machine, or None: there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns


def _module_globals(name):
    return vars(sys.modules[name])


_payload_lock = threading.Lock()                  # held while a module is registered for its payload alone


def _module_payload(module):
    """The payload of a module's namespace, in which functions have the namespace of that module, where it arrives."""
    class Pickler(_by_value_pickler()):
        dispatch_table = _by_value_pickler().dispatch_table.new_child(
            {types.ModuleType: lambda other: (_module, (other.__name__,))})       # its submodules, too

        def __init__(self, *args):
            super().__init__(*args)
            self.globals_ref[id(vars(module))] = _Instead(_module_globals, module.__name__)

    with _payload_lock:
        cloudpickle.register_pickle_by_value(module)
        try:
            return _dumps(Pickler, {name: value for name, value in vars(module).items() if not name.startswith("__")})
        finally:
            cloudpickle.unregister_pickle_by_value(module)


def package_file(path):
    """What a worker is told of a file or folder beside a module: ("file", bytes), ("folder", names), ("absent", why) or
    ("refused", why).  Only below the folders of own packages that workers were told of."""
    real, size = os.path.realpath(path), (stamp(path) or [0])[0]
    folders = {os.path.realpath(folder) for _, (*_, folders) in list(_served_modules.values()) for folder in folders or ()}
    if not any(f"{real}{os.sep}".startswith(os.path.join(folder, "")) for folder in folders):
        return "refused", (f"{path} is not on this worker, and only files in folders of the client's packages are sent there: "
                           "pass what is in the file as an argument, or share() it")
    if size > MAX_FILE and os.path.isfile(real):
        return "refused", (f"{path} has {size >> 20} MiB, and at most {MAX_FILE >> 20} are sent of a file beside a module: "
                           "share() what is in it")
    return read_file(real)


def read_file(path):
    """What is in this file or folder here, as `package_file` says it."""
    try:
        if os.path.isdir(path):
            return "folder", sorted(os.listdir(path))
        with io.open(path, "rb") as file:
            return "file", file.read()
    except OSError as error:
        return "absent", str(error)


def is_every_servers(name):
    """Whether every server has a module of this name: the standard library's or CluPy's."""
    return name.partition(".")[0] in _EVERY_SERVERS


def _is_own(name, spec):
    """Whether it is the user's own: a place of it, its file or a folder, is not where libraries are installed.  Its name
    says nothing: who has a module `secrets` here means that one, in a worker too."""
    if spec is None or name in _MAINS or name in _CLUPY:
        return False
    try:
        return not all(_is_library(place) for place in _places(spec))
    except Exception:                             # a namespace package whose parent is gone; a spec made by hand
        return False


def _places(spec):
    return [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())


def _is_library(path):
    folders = _library_folders()
    return os.path.abspath(path).startswith(folders) or os.path.realpath(path).startswith(folders)


@functools.cache
def _library_folders():
    """Where installed modules are, by plain and by real path.  An editable install is elsewhere: it is own."""
    folders = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site.getsitepackages(), [site.getusersitepackages(), os.path.dirname(os.__file__)])
    return tuple({os.path.join(form(folder), "")
                  for folder in folders for form in (os.path.abspath, os.path.realpath)})


def _distribution(name):
    """(name to give to pip, installed version or None)."""
    top = name.partition(".")[0]
    names = metadata.packages_distributions().get(top)
    return (names[0], metadata.version(names[0])) if names else (top, None)


# What a worker may ask its client for, by a function that is called in a thread that may block; Data adds "ref" and "release".
FETCHES = {"module": module_source, "file": package_file, "main": script_value}
served = {}                                       # {name: buffers} of the Refs that this process shared without Redis


# ==== Future =================================================================
# A call and its outcome in one object.  PENDING: it waits for a slot.  RUNNING: it was sent to one, and may have begun.
# FINISHED or CANCELLED_AND_NOTIFIED: it has its outcome.  A recall or a lost worker takes RUNNING back to PENDING.
# Only the engine's loop moves a call between PENDING and RUNNING; any thread may give it its outcome, by `conclude`.
#
# All futures share one lock: whoever waits for a future adds a waiter, as concurrent.futures' own wait() and as_completed()
# do.  That makes a pending call 0.3 KB instead of 1.9 KB and takes 0.5 us instead of 4 us.  A result stays pickled until
# somebody asks for it, and is unpickled in that thread: it may run user code, which may block, and must never do so in the
# engine's loop.
#
# Ctrl-C raises KeyboardInterrupt in the main thread, between any two steps of Python code.  So the main thread shares no Event,
# Condition, Semaphore or stock Future with other threads: these are entered by Python code, and an interrupt in there leaves
# their lock held, on which the others then wait for ever.  It enters locks, which are C code, by `with`, waits by a Bell, a Flag
# or a SimpleQueue, and does what must be done whole in a block of `undisturbed`.

def _time_out(value):
    """The seconds of a duration that a user gave; None, for ever, also for more than any clock counts to."""
    try:
        seconds = math.inf if value is None else _duration(value)
    except ValueError as error:
        raise ValueError(f"{value!r} is not {error}") from None
    return None if seconds > threading.TIMEOUT_MAX else seconds


def _deadline(value):
    """The time.monotonic() after a duration that a user gave; None: never."""
    seconds = _time_out(value)
    return math.inf if seconds is None else time.monotonic() + seconds


def _one_of(name, timeout, time_out):
    """The one of the two spellings that is not None, or None."""
    if timeout is not None and time_out is not None:
        raise TypeError(f"{name}() was given timeout and time_out, which are the same: give one of them")
    return timeout if time_out is None else time_out


def _either_spelling(func: T) -> T:
    """func, which takes `time_out` where it has `timeout`, and the other way round."""
    own, other = ("time_out", "timeout") if "time_out" in func.__code__.co_varnames else ("timeout", "time_out")

    @functools.wraps(func)
    def wrapper(*args, **kwargs):
        if other in kwargs:
            kwargs[own] = _one_of(func.__qualname__, kwargs.get(own), kwargs.pop(other))
        return func(*args, **kwargs)
    return wrapper


def bounded(seconds):
    """A time-out that a lock takes: not less than 0, and not more than there is, which also stands for None."""
    return threading.TIMEOUT_MAX if seconds is None else max(0, min(seconds, threading.TIMEOUT_MAX))


@contextlib.contextmanager
def undisturbed():
    """A block that Ctrl-C does not tear: it is raised at the block's end, which must be soon.

    A handler of the program's own for SIGINT is left alone."""
    if (threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield
        return
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt


PENDING, RUNNING, FINISHED = "PENDING", "RUNNING", "FINISHED"
CANCELLED = "CANCELLED_AND_NOTIFIED"
_DONE = (FINISHED, CANCELLED)


class _Waiter:
    """Wakes one thread when a future is done; the three methods are what concurrent.futures calls."""
    __slots__ = ("lock",)

    def __init__(self):
        self.lock = threading.Lock()
        self.lock.acquire()

    def add_result(self, future):
        if self.lock.locked():
            self.lock.release()

    add_exception = add_cancelled = add_result


class Bell:
    """What wakes all who wait for a change."""

    def __init__(self):
        self._waiters = collections.deque()

    def ring(self):
        with contextlib.suppress(IndexError):     # another thread woke the rest
            for _ in range(len(self._waiters)):
                self._waiters.popleft().add_result(None)

    def until(self, look, timeout=None):
        """The first true look(), which is called again whenever the bell rang; the last one after `timeout` seconds.

        It looks every second, too: an interrupt in `ring` may keep it from one whom it has begun to wake."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not (found := look()) and (left := deadline - time.monotonic()) > 0:
            waiter = _Waiter()
            self._waiters.append(waiter)          # before another look: what changes after that is heard
            try:
                if not look():
                    waiter.lock.acquire(timeout=min(left, 1.0))
            finally:
                with contextlib.suppress(ValueError, IndexError):      # it was woken; another thread changes them just now
                    self._waiters.remove(waiter)
        return found


class Flag(Bell):
    """As a threading.Event."""

    def __init__(self):
        super().__init__()
        self._set = False

    def is_set(self):
        return self._set

    def set(self):
        self._set = True
        self.ring()

    def clear(self):
        self._set = False

    def wait(self, timeout=None):
        return self.until(self.is_set, timeout)


class Threads:
    """Runs jobs in daemon threads, one more whenever all are busy, so that a job may block as long as it likes.

    The first one stays: when the interpreter ends, and none can be started, jobs wait for those that there are."""

    def __init__(self):
        self._jobs = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0                 # threads that wait, less jobs that are theirs already
        self._count = 0                # threads

    def run(self, job, *args):
        with undisturbed():
            self._run(job, args)

    def _run(self, job, args):
        with self._lock:
            self._idle -= 1
            if self._idle >= 0:
                self._jobs.put((job, args))
                return
            self._idle += 1
            self._count += 1
        try:
            threading.Thread(target=self._work, args=(job, args), name=JOB_THREAD, daemon=True).start()
        except RuntimeError as error:  # the interpreter is ending
            with self._lock:
                self._count -= 1
                self._idle -= 1
                self._jobs.put((job, args))
            log.debug("%s waits for a thread: %s", getattr(job, "__qualname__", job), error)

    def _work(self, job, args):
        while job is not None:
            try:
                job(*args)
            except Exception:          # a thread's edge: a user's callback raised
                log.exception("%s raised", getattr(job, "__qualname__", job))
            del job, args
            with self._lock:
                self._idle += 1
            job, args = self._next()

    def _next(self):
        """The next job, or None after a while without one, if others are left."""
        while True:
            try:
                return self._jobs.get(timeout=10)
            except Empty:
                with self._lock:
                    if self._jobs.empty() and self._count > 1:
                        self._idle -= 1
                        self._count -= 1
                        return None, None


threads = Threads()


_handling = threading.local()     # .future: the one whose handlers this thread runs

_ending = False                   # whether the program's end has begun


def leave_if_ending(ending=False):
    """In a daemon thread of a program that ends: end it, as sys.exit() does, without a word."""
    if (ending or _ending) and threading.current_thread().daemon:
        raise SystemExit


class Failures:
    """The failed calls that nobody has looked at, by asking for the result or the exception, or with a handler: none may pass
    unseen, so the program's end tells of them.  Changed under the futures' lock."""

    KEPT = 8                                      # with their exceptions, to name the first

    def __init__(self):
        self.calls = self.unseen = 0              # how many have an outcome; how many of these failed, and nobody looked
        self._first = {}                          # {id of a call: its exception, or the payload of it}

    def add(self, call, error):
        call._unseen = True
        self.unseen += 1
        if len(self._first) < self.KEPT:
            self._first[id(call)] = error

    def seen(self, call):
        with Future._condition:
            if call._unseen:
                call._unseen = False
                self.unseen -= 1
                self._first.pop(id(call), None)

    def __str__(self):
        text = f"{self.unseen} of {amount(self.calls, 'call')} failed and nobody looked"
        if not self._first:
            return text
        error = next(iter(self._first.values()))
        try:
            error = error if isinstance(error, BaseException) else unpack(error)
        except Exception as problem:              # of its class, which is the user's
            error = problem
        text += f"; the first: {_line(error)}"
        places = traceback.extract_tb(error.__traceback__)
        return f"{text} at {places[-1].filename} line {places[-1].lineno}" if places else text


failures = Failures()


class Future(concurrent.futures.Future["T"]):
    """The outcome of one call, to come: a concurrent.futures.Future that can also be awaited.

    .completed, .successful   bools
    .value                    the result, or None until there is one, and if the call failed
    .failure                  the exception, or None
    Any thread may use it."""

    _condition = threading.RLock()            # of all, under the name that concurrent.futures knows
    _result = _exception = None
    _packed = None                # (succeeded, payload) until somebody asks for the result
    _waiting = _callbacks = None  # lists of _waiters and of _done_callbacks, made when they are first needed
    _handlers = None              # [(on success, f)] that have not run yet; None: there are none
    _unseen = False               # whether it failed, and nobody has looked
    _handled = None               # Flag that all handlers have run; None: there never was one
    _parent = _outer = None       # a nested call: (Slot, its number there), number of the call that made it
    _place = None                 # the queue of the one server that may run it, see ServerLink; None: any may
    _sink = None                  # the _Chunk of a map that it is: is given parts of the result, and told of the outcome
    _slot = None                  # the Slot that it was sent to, kept after its outcome; None: it waits (see is_waiting)
    _sent_at = 0.0                # when it was sent there
    _took = None                  # seconds from then to its outcome
    _number = _cost = _tries = 0  # its number, seconds it counts as in its slot, starts that were charged to it
    _spared = 0                   # workers that died before they began it, though it was the next
    _refs = ()                    # the Refs among its arguments: they live until its outcome

    def __init__(self, engine=None, function=None, arguments=(), timeout=None, retries=0, limit=None):
        self._state = PENDING
        self._engine = engine
        self._function = function
        self._arguments = arguments    # tuple of plain values, or a payload
        self._timeout = timeout
        self._retries = retries
        self._limit = limit

    def __repr__(self):
        name = self._function.name if self._function else "?"
        state = self._state.split("_")[0].lower()
        where = f" on {self._slot}" if self._slot else ""
        time_taken = ""
        if self._slot and self._state == RUNNING:
            time_taken = f" for {time.monotonic() - self._sent_at:.1f} s"
        elif self._took is not None:
            time_taken = f" in {self._took:.3f} s"
        return f"<Future {name} {state}{where}{time_taken}>"

    def __await__(self):
        """As asyncio.wrap_future, which never ends where the call raised StopIteration: that becomes a RuntimeError."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(
            lambda: done.done() or done.set_result(None)))
        try:
            yield from done
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result()

    @property
    def _waiters(self):
        """What concurrent.futures' wait() and as_completed() add themselves to."""
        if self._waiting is None:
            self._waiting = []
        return self._waiting

    @property
    def _done_callbacks(self):
        if self._callbacks is None:
            self._callbacks = []
        return self._callbacks

    # -- waiting

    def _wait(self, timeout=None):
        """Whether it is done within `timeout` seconds (None: for ever).

        Ctrl-C ends all unfinished calls of this client: whoever gives up waiting wants the cluster back."""
        if self._state in _DONE:
            return True
        waiter = _Waiter()
        with self._condition:
            if self._state in _DONE:
                return True
            self._waiters.append(waiter)
        try:
            return self._until(waiter.lock.acquire, timeout)
        finally:
            with self._condition:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _until(self, wait, seconds):
        """wait(timeout=seconds), which Ctrl-C may interrupt."""
        try:
            return wait(timeout=bounded(seconds))
        except KeyboardInterrupt:
            if self._engine:
                self._engine.cancel_all()
            raise

    @_either_spelling
    def wait(self, timeout: Time = 10) -> bool:
        """Whether it completed, its handlers included, within `timeout` seconds: 10 by default, after which it returns False,
        where result(), exception() and wait_all() wait for ever; None: for ever, too.

        A handler that asks does not wait for itself."""
        if self._state in _DONE and self._handled is None:
            return True
        deadline = _deadline(timeout)
        if not self._wait(deadline - time.monotonic()):
            return False
        if self._handled is None or getattr(_handling, "future", None) is self:
            return True
        return self._until(self._handled.wait, deadline - time.monotonic())

    def _open(self):
        """Unpickle the outcome, in the thread that asks for it; the first of several threads decides."""
        packed = self._packed
        if packed is None:
            return
        succeeded, payload = packed
        try:
            result, exception = (unpack(payload), None) if succeeded else (None, unpack(payload))
        except KeyboardInterrupt:
            raise
        except BaseException as error:            # it may be anything that a user's __setstate__ raises
            result, exception = None, RemoteError(
                type(error).__name__, f"{error} (the {'result' if succeeded else 'exception'} of {self._function.name} arrived, "
                                      "but cannot be unpickled here)")
            exception.__cause__ = error
        with self._condition:
            if self._packed is packed:
                self._result, self._exception, self._packed = result, exception, None

    def result(self, timeout: Time = None, *, time_out: Time = None) -> T:
        """The result.  Raises the call's exception, CancelledError, or TimeoutError after `timeout` seconds."""
        exception = self.exception(timeout, time_out=time_out)
        if exception is not None:
            try:
                raise exception
            finally:
                exception = self = None         # no reference cycle through the traceback
        return self._result

    def exception(self, timeout: Time = None, *, time_out: Time = None) -> BaseException | None:
        """The call's exception, or None.  Raises CancelledError, or TimeoutError after `timeout` seconds."""
        if not self._wait(timeout := _time_out(_one_of("exception", timeout, time_out))):
            raise TimeoutError(f"{self!r} has no result after {timeout:g} s")
        if self._state == CANCELLED:
            leave_if_ending()
            raise CancelledError()
        if self._unseen:
            failures.seen(self)
        self._open()
        if type(self._exception) is Closed:
            leave_if_ending()
        return self._exception

    @property
    def completed(self) -> bool:
        return self._state in _DONE

    @property
    def failure(self) -> BaseException | None:
        if self._state == CANCELLED:
            return CancelledError()
        return self.exception() if self._state == FINISHED else None

    @property
    def successful(self) -> bool:
        return self._state == FINISHED and self.exception() is None

    @property
    def value(self) -> T | None:
        return self._result if self._succeeded() else None

    def _succeeded(self):
        """Whether it has; not as somebody who looks."""
        if self._state != FINISHED:
            return False
        self._open()
        return self._exception is None

    # -- handlers

    def succeed(self, handler: Callable[[T], Any]) -> Future[T]:
        """Call handler(result), once, in a thread of its own, when the call has succeeded; returns this future."""
        return self._handle(True, handler)

    def fail(self, handler: Callable[[BaseException], Any]) -> Future[T]:
        """Call handler(exception), once, in a thread of its own, when the call has failed; returns this future."""
        return self._handle(False, handler)

    def _handle(self, succeeded, handler):
        if self._unseen and not succeeded:
            failures.seen(self)
        with self._condition:
            start = self._state in _DONE and self._handlers is None        # else `conclude` or who runs them takes this, too
            self._handlers = (self._handlers or []) + [(succeeded, handler)]
            if self._handled is None or self._handled.is_set():
                self._handled = Flag()
        if start:
            threads.run(self._run_handlers)
        return self

    def _run_handlers(self):
        """Run handlers until none is left, those that are added meanwhile, too."""
        _handling.future = self
        threading.current_thread().clupy_call = self._outer                    # in a worker, see clupy_server.follow_threads
        while entries := self._handlers:
            for succeeded, handler in entries:
                if self._succeeded() is succeeded:
                    try:
                        handler(self._result if succeeded else self.failure)
                    except BaseException as error:            # whoever waits for the handlers must not wait for ever
                        if not (_ending and type(error) is SystemExit):        # see leave_if_ending
                            log.exception("a handler of %r raised", self)
            with self._condition:
                self._handlers = self._handlers[len(entries):] or None
                if self._handlers is None:
                    self._handled.set()
        _handling.future = None

    # -- outcomes

    def cancel(self):
        """Whether it is cancelled now: a waiting call never starts, the worker of a running one is killed."""
        with self._condition:
            if self._state in _DONE:
                return self._state == CANCELLED
        with undisturbed():
            conclude([(self, False, CancelledError())])
            if self._engine:
                self._engine.cancel(self)
        return self._state == CANCELLED

    def _invoke_callbacks(self):
        for callback in self._callbacks or ():
            try:
                callback(self)
            except BaseException as error:        # SystemExit, too: those after it are others' affair
                if not (_ending and type(error) is SystemExit):        # see leave_if_ending
                    log.exception("a callback of %r raised", self)

    def _after(self, handle):
        """What user code wants to do now that it is done; in a thread that may block."""
        threading.current_thread().clupy_call = self._outer                    # what it calls belongs to who made this call
        try:
            self._invoke_callbacks()
        finally:
            if handle:
                self._run_handlers()

    def __reduce__(self):
        """Among the arguments of a call it stands for its result; elsewhere it cannot be pickled."""
        if not pickling.resolve:
            raise TypeError(f"{self!r} cannot be pickled: make it an argument of the call, or pass its result")
        pickling.refs.append(self)
        return _given, (len(pickling.refs) - 1,)


def _share_names(first):
    """CPython keeps one table of names for all instances of a class, those that the first few have set; a name that others set
    later costs each of them a dict of its own, of 400 bytes.  So the first one sets all those that every call comes to have."""
    for name in "_number", "_slot", "_sent_at", "_cost", "_took", "_result", "_packed":
        setattr(first, name, getattr(first, name))


_share_names(Future())


def conclude(outcomes):
    """Give each call of [(call, succeeded, value)] its outcome, unless it has one; any thread.

    value: plain, or a payload; for a failure an exception or its payload."""
    counted, followed, sunk, dropped = 0, [], [], []         # dropped: Refs, which outside the lock may give values up
    with Future._condition:
        for call, succeeded, value in outcomes:
            if call._state in _DONE:
                continue
            if isinstance(value, BaseException):
                call._exception = value
            elif succeeded and type(value) in PLAIN:
                call._result = value
            else:
                call._packed = succeeded, value
            call._state = CANCELLED if type(value) is CancelledError else FINISHED
            counted += call._parent is None      # else it is the affair of the call that made it
            if call._parent is None and not succeeded and call._state == FINISHED and type(value) is not Closed and (
                    not call._handlers or all(on_success for on_success, _ in call._handlers)):
                failures.add(call, value)
            call._arguments = None
            if call._refs:
                dropped.append(call._refs)
                call._refs = ()
            for waiter in call._waiting or ():
                if call._state == CANCELLED:
                    waiter.add_cancelled(call)
                elif succeeded:
                    waiter.add_result(call)
                else:
                    waiter.add_exception(call)
            if call._callbacks or call._handlers:
                followed.append((call, call._handlers is not None))
            if call._sink:
                sunk.append((call._sink, call))
        failures.calls += counted
    for sink, call in sunk:
        sink.take_outcome(call)
    for call, handle in followed:
        threads.run(call._after, handle)


# ==== Engine =================================================================
# The client: one thread, one event loop, one owner for every call from `submit` to its outcome.  Its rooms, in their order:
#
#   Backlog      which waiting call is next for a slot, how many slots could be used, `max`        decides, no I/O
#   verdicts     what becomes of the unanswered calls of a slot that ended                         a function
#   Slot         what is under way in one worker                                                   one connection
#   ServerLink   one server: closes and kills there, hears of deaths and of output                 one connection
#   Children     which calls wait for calls that they made
#   Feeder       moves calls: from the Backlog into slots, back from them, out with their outcome
#   Pool         which slots are open where, as the share says
#   (ClientLibraries: its own list, and how its versions differ from the cluster's; Output: what calls print, by a thread;
#    Timeline; they stand in clupy_master.py)
#   MasterSide   what this client wants, and what becomes of it without a master                   one connection
#   Engine       thread and loop; what any thread may call; fork and end
#
#   submit -> inbox -> Backlog --Feeder--> Slot.calls --Feeder--> conclude
#               any       ^                    |
#             thread      +--------------------+  recalled, or its worker died
#
# Any thread may conclude a call (cancel), so every room meets calls that have their outcome already, and passes over them.
# What holds in between: Slot.calls is in the order sent, which is that in which the worker begins them, so `verdicts` can tell
# from the last one that began; Slot.children has a key only while a nested call of it is unfinished, so a key means "waits".

FORKED = "the call is one of the process that forked this one off"


class BaseEngine:
    """What runs calls: the client of a cluster (Engine), another executor (ExecutorEngine), or the client of a worker in
    which a call makes calls (NestedCalls).  Any thread may call its methods."""

    closed = False                                # it takes no more calls
    nested = False                                # it is a worker's, whose client alone is connected to a cluster
    settings = None                               # Settings of its own; None: it has none
    executor = None                               # the other executor that runs its calls
    capacity = 0                                  # slots that there may be, as far as is known
    where = ""                                    # in a worker: "server pid"
    said = None                                   # {key: value} that a master said of Redis and ZooKeeper last
    timeline = None                               # of all engines: the Timeline that they tell what becomes of calls

    def __init__(self):
        self.held = set()                         # calls that are not submitted yet: they wait for other calls, or for a while
        self.maps = weakref.WeakSet()             # every _Map

    def submit(self, call):
        """Run the call: sooner or later it gets its one outcome."""
        raise NotImplementedError

    def hold(self, call):
        """The call of this thread is submitted later, perhaps by another thread."""
        self.held.add(call)

    def later(self, seconds, job, *args):
        """Run a job that may block, after so long."""
        timer = threading.Timer(seconds, job, args)
        timer.daemon = True
        timer.start()

    def cancel(self, call):
        """The call was concluded as cancelled: end what runs of it."""
        raise NotImplementedError

    def calls(self):
        """The calls without an outcome."""
        return [call for call in self.held.copy() if call._state not in _DONE]

    def cancel_all(self):
        """Cancel the unfinished calls; those made after it returned are not among them."""
        for call in self.calls():
            call.cancel()

    def cancel_limit(self, limit):
        """Cancel the calls of this limit that were not sent to a worker."""
        for call in self.calls():
            if call._limit == limit and call._state == PENDING:
                call.cancel()

    def settle(self, limit, ending=False):
        """Wait until no call of this limit is unfinished, and their callbacks have run, which may make more.  ending: the
        interpreter ends: not for calls that nothing can run any more."""
        bell = Bell()

        def ended(call):
            left.discard(call)
            if not left:
                bell.ring()

        while (calls := [call for call in self.calls() if call._limit == limit]) or self._await_maps():
            idle, left = 0, set(calls)
            for call in calls:
                call.add_done_callback(ended)
            while not bell.until(lambda: not left, 1.0):
                idle = 0 if self.works or not ending else idle + 1
                if idle == 3:
                    return

    def _await_maps(self):
        """Wait until the maps have seen to their calls that are over, for some of which they make others; whether they had to."""
        busy = [job for job in list(self.maps) if job.digesting.locked()]
        for job in busy:
            job.changed.until(lambda job=job: not job.digesting.locked())
        return bool(busy)

    @property
    def works(self):
        """Whether there is, or may soon be, what runs calls."""
        return True

    def prepare(self):
        """Start what could not be started once the interpreter has begun to end."""

    def services(self, patience):
        """What a master says of Redis and ZooKeeper, waited for `patience` seconds; {}: there is none that could."""
        return {}

    def join(self):
        """The Cluster, waited for."""
        raise NotImplementedError

    def begin_part(self, results):
        """The _Part of a chunk that begins in this thread."""
        return _Part(results)

    def places(self):
        """{server: the `_place` of a call that it alone is to run}."""
        raise ClupyError("everywhere() works in the program that has a cluster, not on another executor, nor in a call")

    def grow(self, slots):
        """At least so many slots, if that is for the engine to decide."""

    def release(self, names):
        """These shared values are used no more: let their copies go, on every machine."""

    def abandon(self):
        """In a forked child: nothing of this engine is the child's, and the child's copies of calls are told so."""

    def begin_to_close(self):
        """Take no more calls, and end all calls and slots; nobody needs to wait for that."""

    def close(self):
        """The same; returns when it is done."""
        self.cancel_all()


# ---- which call is next


_ties = itertools.count()       # so that a heap never compares two calls


def rank(call):
    """Calls begin in the order of it: nested ones first, the newest of them before the others; then the order made."""
    return -call._number if call._parent else call._number


def is_waiting(call):
    return call._slot is None and call._state not in _DONE


def is_last_try(call):
    """Whether it may be started just once more: then it goes alone to an idle slot, so that it is known whether it began."""
    return call._tries >= call._retries


class Limit:
    """The calls that share one `max`, or have none: those that wait, and the slots that work on the others."""

    def __init__(self, most):
        self.most = most                          # slots that may work on them at once; None: as many as there are
        self.pending = 0                          # calls without an outcome
        self.suspended = 0                        # of these, calls that wait for nested ones
        self.slots = collections.Counter()        # {Slot: calls under way there}
        self.listed = None                        # rank under which the Backlog lists it; None: it does not
        self.fresh = collections.deque()         # calls that were never sent, in the order made
        self.urgent = []                         # heap of (rank, tie, call): nested calls, and calls that came back

    def __repr__(self):
        return f"<Limit {self.most} {self.pending} calls, {len(self.slots)} slots>"

    @property
    def wants(self):
        """How many slots its calls could use; for a limit that has a `max`."""
        return max(0, min(self.pending - self.suspended, self.most))

    def put_back(self, call):
        heapq.heappush(self.urgent, (rank(call), next(_ties), call))

    def first(self):
        """The call that is next, or None."""
        while self.urgent:
            if is_waiting(self.urgent[0][-1]):
                return self.urgent[0][-1]
            heapq.heappop(self.urgent)
        fresh = self.fresh
        while fresh:
            call = fresh[0]
            if call._slot is None and call._state not in _DONE:            # is_waiting, without a call: it is asked for each
                return call
            fresh.popleft()
        return None

    def waiting(self):
        return [call for call in [*(entry[-1] for entry in self.urgent), *self.fresh] if is_waiting(call)]

    def allows(self, slot, call):
        """Whether the slot may work on this call, too.

        A call that waits for nested ones counts for the calls of others, since it will go on, but not for nested calls:
        it may be one of these that it waits for."""
        if self.most is None or slot in self.slots or len(self.slots) < self.most:
            return True
        return bool(call._parent) and sum(not other.suspended for other in self.slots) < self.most


class Backlog:
    """The calls without an outcome: which of those that wait is next for a slot, and how many slots they could use.

    Knows no connection, clock or thread; slots are asked for `calls`, `limits` and `suspended` alone."""

    def __init__(self):
        self.calls = {}                           # {number: call} of all, in the order made
        self.limits = {}                          # {(key, max) or None: Limit} with calls without an outcome, or under way
        self.wanted = 0                           # slots that these could use
        self.queued = 0                           # calls that wait for a slot
        self._heads = []                          # heap of (rank, tie, Limit): each by its first waiting call, unless full

    def __repr__(self):
        return f"<Backlog {self.wanted} slots wanted, {len(self.limits)} limits>"

    def waiting(self):
        """The calls that wait for a slot."""
        return [call for limit in self.limits.values() for call in limit.waiting()]

    def add(self, call):
        """A new call, which has its number."""
        limit = self.limits.get(call._limit)
        if limit is None:
            limit = self.limits[call._limit] = Limit(call._limit and call._limit[1])
        self.calls[call._number] = call
        self.queued += 1
        self._count(limit, 1)
        if call._place is not None:
            call._place.append(call)
            return
        if call._parent:
            limit.put_back(call)
        else:
            limit.fresh.append(call)
        if limit.listed is None or call._parent:  # else others of its limit come first
            self._list(limit)

    def put_back(self, calls):
        """Calls that were sent and came back: before all that were made after them."""
        for call in calls:
            call._slot = None
            self.queued += 1
            if call._place is not None:
                call._place.append(call)
                continue
            limit = self.limits[call._limit]
            limit.put_back(call)
            self._list(limit)

    def finish(self, call):
        """The call has its outcome; whether it was among the unfinished ones until now."""
        if self.calls.pop(call._number, None) is None:
            return False
        self.queued -= call._slot is None
        limit = self.limits[call._limit]
        if limit.most is None:                    # as _count, which most calls need not
            limit.pending -= 1
            self.wanted -= 1
        else:
            self._count(limit, -1)
        if not limit.pending:
            self._forget(call._limit, limit)
        return True

    def next_for(self, slot):
        """The waiting call that the slot is to do next, taken out; None if there is none for it."""
        best, first = self._first_listed(slot)
        for limit in slot.limits:                 # full, but this slot works on it already
            call = limit.first() if limit.listed is None else None
            if call and (first is None or rank(call) < rank(first)):
                best, first = limit, call
        if first is None or slot.calls and is_last_try(first):
            return None
        if best.urgent:
            heapq.heappop(best.urgent)
        else:
            best.fresh.popleft()
        self.queued -= 1
        return first

    def take(self, slot, call):
        """Take out this waiting call, wherever it stands, if the slot may work on it; whether it may."""
        if not self.limits[call._limit].allows(slot, call):
            return False
        self.queued -= 1                          # it is passed over by `first` from now on, as it has a slot
        return True

    def sent(self, slot, call):
        """The slot works on the call, which has a limit."""
        limit = self.limits[call._limit]
        if limit.most is None:
            return
        limit.slots[slot] += 1
        slot.limits[limit] = limit.slots[slot]

    def unsent(self, slot, call):
        """The slot works on the call, which has a limit, no more."""
        limit = self.limits.get(call._limit)
        if limit is None or limit.most is None:
            return
        limit.slots[slot] -= 1
        slot.limits[limit] = limit.slots[slot]
        if not limit.slots[slot]:
            del limit.slots[slot], slot.limits[limit]
            self._list(limit)
            self._forget(call._limit, limit)

    def suspend(self, slot, call, change):
        """The call of the slot begins (1) or ends (-1) to wait for nested calls."""
        if limit := self.limits.get(call._limit):
            self._count(limit, 0, change)
        for limit in slot.limits:
            self._list(limit)

    def _count(self, limit, pending, suspended=0):
        """So many more calls of the limit have no outcome, or wait for nested ones."""
        if limit.most is None:
            limit.pending += pending
            self.wanted += pending - suspended
        else:
            self.wanted -= limit.wants
            limit.pending += pending
            limit.suspended += suspended
            self.wanted += limit.wants

    def _list(self, limit):
        call = limit.first()
        if call is not None and (limit.listed is None or rank(call) < limit.listed):
            limit.listed = rank(call)
            heapq.heappush(self._heads, (limit.listed, next(_ties), limit))

    def _first_listed(self, slot):
        """(limit, its first call): of the calls that the slot may do the one that comes first; (None, None) without any.

        A limit may be listed by a call before its first one: that is put right when it comes to the top."""
        heads = self._heads
        while heads:
            listed, _, limit = heads[0]
            call = limit.first() if listed == limit.listed else None       # else it was listed anew since
            if call is None or limit.most is not None and not limit.allows(slot, call):
                heapq.heappop(heads)
                if listed == limit.listed:
                    limit.listed = None           # nothing waits, or it is full: `unsent` lists it again
            elif len(heads) > 1 and rank(call) != listed:
                limit.listed = rank(call)
                heapq.heapreplace(heads, (limit.listed, next(_ties), limit))
            else:
                return limit, call
        return None, None

    def _forget(self, key, limit):
        if not limit.pending and not limit.slots:
            self.limits.pop(key, None)


# ---- what becomes of the calls of a slot that ended

def had_begun(numbers, begun):
    """For each unanswered call of a slot, in the order sent: whether it had begun when the slot ended.

    begun: the number of the last call that the worker noted on its board; None: not known, so all may have.
    Those before it in the order had begun as well, and their results were lost."""
    if begun is None:
        return [True] * len(numbers)
    last = numbers.index(begun) if begun in numbers else -1
    return [index <= last for index in range(len(numbers))]


def verdicts(calls, how):
    """[(verdict, charged, spared)] for the unanswered calls of a slot, in the order sent.  Pure.

    how: what the server said of the slot's end.  charged: whether this start counts as one of 1 + `retries`.  spared: the
    worker died before it could begin this one, which was the next: it may be its arguments that no worker can receive, so
    that happens MAX_SPARED times only.  verdict: "done" (it has its outcome), "timeout", "died" (it has no try left), "again"."""
    found, charged = [], had_begun([call._number for call in calls], how["begun"])
    spared = bool(calls) and how["why"] == Why.DIED and not any(charged)
    if spared:
        charged[0] = calls[0]._spared >= MAX_SPARED
    for index, call in enumerate(calls):
        if call._state in _DONE:
            verdict = "done"
        elif how["why"] == Why.TIMEOUT and call._number == how["begun"]:
            verdict = "timeout"
        else:
            verdict = "died" if call._tries + charged[index] > call._retries else "again"
        found.append((verdict, charged[index], spared and index == 0))
    return found


def _was_at(how):
    """The place at which a worker was killed, without CluPy's own frames; the stack's first line is a title."""
    stack = [line for line in how.get("stack", "").splitlines() if not re.search(r'\bclupy(_server)?\.py"', line)]
    return "; it was at:\n  " + "\n  ".join(stack) if len(stack) > 1 else ""


def died(call, slot, how):
    """The WorkerDied of a call on its last try; `how` is what the server said of the slot's end."""
    server, pid = slot.link.name, how.get("pid") or slot.pid
    if how["why"] == Why.LOST:
        return WorkerDied(f"server {server} was lost while worker {pid} had {call._function.name}, try {call._tries} of "
                          f"{call._retries + 1}; why is not known: is the machine up, and what does the server's log say?")
    what = how.get("reason", how["why"]) if how["why"] == Why.DIED else f"was ended ({how['why']})"
    verb = {"signal": "got ", "exit": "ended with "}.get(what.split()[0], "")
    text = (f"worker {pid} on {server} {verb}{what} while running "
            f"{call._function.name}, try {call._tries} of {call._retries + 1}")
    if how.get("peak"):
        of = f" of {how['limit'] / 2**30:.2f}" if how.get("limit") else ""
        text += f"; peak memory {how['peak'] / 2**30:.2f}{of} GB"
    if how.get("code") == -9 and how["why"] == Why.DIED:
        text += "; nobody here sent it, so the system may have been out of memory"
    if how.get("lines"):
        text += "; its last lines of standard error:\n  " + "\n  ".join(how["lines"])
    return WorkerDied(text + _was_at(how))


def timed_out(call, slot, how):
    """The CallTimeout of a call; names the place at which it was."""
    text = (f"{call._function.name} ran longer than its timeout of {call._timeout:g} s; worker {how['pid']} on "
            f"{slot.link.name} was killed")
    return CallTimeout(text + _was_at(how))


# ---- one worker, one server

OPENING, OPEN, LEAVING, ENDING, OVER = range(5)


class Slot:
    """What is under way in one worker, and the connection to it: an asyncio.BufferedProtocol through `slot_class`.

    Its states, which it goes through from left to right, each once at most:

        opening   the connection is made, and waits for a free worker        Pool._open
        open      the worker answered: calls may be sent                     on_opened
        leaving   no more calls are sent; it ends when it has none left      Pool.leave
        ending    `close` was sent, or one of the two ends was heard of:     Pool.end, connection_lost, on_ended
                  the connection's (`gone`) or the worker's (`ended`)
        over      both were, or 1 s passed: its calls were seen to           Pool._settle"""

    def __init__(self, link, number, nested):
        self.link, self.number = link, number
        self.nested = nested                      # beyond the share: while a call there waits for nested calls
        self.engine = link.engine
        self.state = OPENING
        self.calls = {}                           # {number: call} in the order sent, which is that in which they begin
        self.load = 0.0                           # seconds of work under way, as estimated
        self.limits = {}                          # {Limit: calls under way}
        self.known = Known()                      # the functions that the worker has
        self.children = {}                        # {number of a call here: {number there: nested call}}, all unfinished
        self.children_sent = 0                    # of these, how many are in slots
        self.functions = {}                       # {id: Function} of nested calls, as long as the worker knows them
        self.modules = {}                         # {name: module_source's answer} of own modules that the worker may have
        self.pid = None                           # of the worker, once it is open
        self.transport = None
        self.recalled = None                      # "asked" for what it has not begun; "answered", and no result since
        self.closing = False                      # `close` was sent
        self.ended = None                         # what the server said of its end
        self.gone = False                         # the connection has been read to its end
        self.heard = time.monotonic()             # when anything arrived, or a call was sent to the idle slot
        self._outgoing = collections.deque()      # pieces of frames that the transport has not been given yet
        self._full = False                        # it wants no more for now
        self.lanes = Lanes()
        self._frames = None                       # once it is connected

    def __repr__(self):
        return f"{self.link.name} {self.pid or 'opening'}"

    @property
    def _key(self):
        return slot_key(self.link.key, self.number)

    @property
    def suspended(self):
        """Whether the call that runs here has nested calls to wait for, and so does not use its slot."""
        return bool(self.children)

    @property
    def takes_calls(self):
        """Whether it may be sent more calls now."""
        return (self.state == OPEN and not self.recalled and self.link.connection is not None
                and (not self.calls or self.load <= WORK_AHEAD / 2 and not self._has_last_try))

    @property
    def _has_last_try(self):
        """Whether its call is one that must be alone."""
        return len(self.calls) == 1 and is_last_try(next(iter(self.calls.values())))

    def add(self, call, now):
        """The call is about to be sent here."""
        self.calls[call._number] = call
        call._slot, call._sent_at = self, now
        call._cost = WORK_AHEAD if call._function.mean is None else call._function.mean
        self.load += call._cost

    def remove(self, call):
        """The call is under way here no more, whatever became of it."""
        del self.calls[call._number]
        self.load -= call._cost

    def offer_lanes(self):
        """Where the worker finds lanes, or None.  They take two descriptors: where these are few, slots come first."""
        return None if self.gone or descriptors_left() < FREE_DESCRIPTORS + 2 else self.lanes.offer(self._key)

    def trim(self, now):
        """Give memory back that was not used for a while, here and there."""
        if self.lanes.is_idle(now):
            self.lanes.trim()
            self.send("trim")

    def recall(self):
        """Ask the worker for what it has not begun, unless it is asked already."""
        if self.recalled != "asked":
            self.recalled = "asked"
            self.send("recall")

    def send(self, *message):
        if self.transport is not None and not self.transport.is_closing():
            for part in encode(message, self.lanes):
                self._outgoing.extend(part[start:start + SEND_PIECE] for start in range(0, len(part), SEND_PIECE))
            self._write()

    def _write(self):
        while self._outgoing and not self._full:
            self.transport.write(self._outgoing.popleft())

    # -- what asyncio calls

    def pause_writing(self):
        self._full = True

    def resume_writing(self):
        self._full = False
        self._write()

    def connection_made(self, transport):
        self.transport, tls = transport, transport.get_extra_info("ssl_object")
        self._frames = Frames(tls_proof(self._key, b"admit tls", tls), lanes=self.lanes)
        if tls:
            transport.write(tls_proof(self._key, b"dial tls", tls))

    def get_buffer(self, _):
        return self._frames.space()

    def buffer_updated(self, count):
        self.heard = time.monotonic()
        try:
            for message in self._frames.filled(count):
                dispatch(self, self, message)
        except ProtocolError as error:
            log.warning("closing the slot %s: %s", self, error)
            self.transport.abort()

    def eof_received(self):
        self.transport.abort()                    # nobody reads what was not sent yet

    def connection_lost(self, _):
        self.gone, self._frames = True, None      # a future may keep the slot, but not this memory
        self.lanes.close()
        self._outgoing.clear()
        self.engine.pool.ending(self)

    # -- messages from the worker

    def on_opened(self, _, pid, has_lanes):
        self.pid = pid
        self.lanes.accepted(has_lanes)
        self.engine.pool.opened(self)

    def on_results(self, _, results, seconds):
        self.engine.feeder.take_results(self, results, seconds)

    def on_part(self, _, number, first, count, results):
        if call := self.calls.get(number):
            if call._parent:
                slot, number = call._parent
                slot.send("part", number, first, count, forwarded(results))
            elif call._sink:
                call._sink.take_part(first, count, results)

    def on_released(self, _, places):
        self.lanes.released(places)

    def on_returned(self, _, numbers):
        self.engine.feeder.take_back(self, numbers)

    def on_nested(self, _, calls, functions):
        self.engine.children.take(self, calls, functions)

    def on_forget(self, _, numbers):
        self.engine.children.forget(self, numbers)

    def on_serve(self, _, name, buffers):
        served[name] = [bytes(buffer) for buffer in buffers]

    def on_fetch(self, _, request, what, *fields):
        threads.run(self._answer, request, what, fields)

    def _answer(self, request, what, fields):
        """In a thread that may block: the source of a module, or a value that was shared."""
        try:
            answer = FETCHES[what](*fields)
        except Exception as error:                # the asking worker must hear of it, whatever it is
            log.exception("cannot answer a worker that asked for %s %s", what, fields)
            answer = f"{type(error).__name__}: {error}"
        self.engine.soon(self._fetched, request, what, fields, answer)

    def _fetched(self, request, what, fields, answer):
        if what == "module" and answer[0] in _OWN:
            self.modules[fields[0]] = answer
        self.send("fetched", request, answer)
        self.engine.pool.leave_outdated([self])   # the program may have reloaded it just now


@functools.cache
def slot_class():
    """Slot as asyncio wants it: with a base class that is not there yet when this module is imported."""
    return type("Slot", (Slot, asyncio.BufferedProtocol), {})


class ServerLink:
    """The control connection to one server, and the slots there."""

    def __init__(self, engine, id, address, name):
        self.engine, self.id, self.address, self.name = engine, id, address, name
        self.connection = self.key = self.how = self.session = None
        self.slots = {}                           # {number: Slot}, until they are over
        self.placed = collections.deque()         # calls that this server alone may run
        self.max_nested = 0                       # slots there beyond the share at most
        self.draining = False                     # takes no new slots
        self.again = 0                            # calls that start again since it was lost or ended
        self.broken = None                        # why our libraries cannot be built there
        self.lost_at = None                       # when it could not be reached, or ended
        self.why_lost = ""                        # why it could not be reached
        self.failures = 0                         # slots in a row that could not be opened
        self.retry_at = 0.0                       # no slot is opened before
        self.heard = time.monotonic()
        self.task = asyncio.create_task(self._run())

    def __repr__(self):
        return f"<ServerLink {self.name} {len(self.slots)} slots{' draining' if self.draining else ''}>"

    async def _run(self):
        try:
            connection = await dial(self.address, CONTROL, self.engine.secret, self.engine.dialing)
        except Exception as error:                # whatever dialing raises, a host's name that is none included
            log.warning("server %s cannot be reached: %s", self.name, reason(error))
            self.why_lost = reason(error)
            self.engine.pool.link_lost(self)
            return
        self.connection, self.key, self.how = connection, connection.key, connection.how
        self.greet()
        try:
            await connection.serve(self)
        except BaseException:                     # it was us: the interpreter ends, say, and no thread can be started
            self.session = None
            raise
        finally:
            self.connection = None
            self.engine.pool.link_lost(self)

    def close(self):
        """End the connection, and those of the slots."""
        if self.connection:
            self.connection.abort()
        self.task.cancel()
        for slot in self.slots.values():
            slot.task.cancel()
            if slot.transport:
                slot.transport.abort()

    def greet(self):
        engine, libraries = self.engine, self.engine.libraries
        self.send("hello", engine.id, engine.name, libraries.resolution.plain, libraries.wheels, engine.settings.output)

    def send(self, *message):
        if self.connection:
            self.connection.send(*message)

    def kill(self, slot, number):
        """End the call, and the worker with it, if it runs there."""
        if number in slot.calls and slot.state < OVER:
            self.send("kill", slot.number, number)

    # -- messages from the server

    def on_welcome(self, _, session, versions, max_nested):
        self.session, self.max_nested = session, max_nested
        if versions["python"] != PYTHON_VERSION:
            log.info("server %s runs Python %s, this client %s", self.name, versions["python"], PYTHON_VERSION)
        self.engine.libraries.check_server(versions)
        self.engine.pool.balance()

    def on_ended(self, _, number, how):
        self.heard = time.monotonic()
        if base := self.slots.get(how.get("base")):
            base.nested = False                   # it has the other's place now
        if slot := self.slots.get(number):
            slot.ended = how
            self.engine.pool.ending(slot)

    def on_late(self, _, number, call):
        slot = self.slots.get(number)
        if slot and call in slot.calls:           # it had not begun yet, or its result is on its way: ask again
            asyncio.get_running_loop().call_later(0.05, self.kill, slot, call)

    def on_output(self, connection, entries, dropped, size):
        self.heard = time.monotonic()
        self.engine.output.show(connection, self.name.partition(":")[0], entries, dropped, size)

    def on_notice(self, _, what, text):
        self.heard = time.monotonic()
        if what == "draining":
            self.draining = True
            self.engine.pool.balance()
        elif what == "renew":
            self.engine.pool.renew(self)
        elif what == "building":
            self.engine.libraries.show_progress(f"{self.name}: {text}")
        elif what == "broken":
            self.engine.libraries.cannot_be_built(self, text)


# ---- calls inside calls: made by a call that runs in a slot, queued here like any other, newest first

class Children:
    """Which calls wait for calls that they made.  Each Slot has the table of its own call; only this changes it."""

    def __init__(self, engine):
        self._engine = engine

    def take(self, slot, calls, functions):
        """A worker's message `nested`: calls that the call there made."""
        for id, function in functions.items():
            if function is None:
                slot.functions.pop(id, None)
            else:
                payload, name, setup = function
                slot.functions[id] = function_of(forwarded(payload), name, forwarded(setup))
        for number, parent, function, arguments, timeout, retries, limit in calls:
            call = Future(self._engine, slot.functions[function], forwarded(arguments), timeout, retries, limit)
            call._parent, call._outer = (slot, number), parent
            if parent not in slot.calls or slot.calls[parent].completed:       # a thread was left behind, or it is cancelled
                slot.send("results", [(number, False, pack_exception(CancelledError()))])
                continue
            if parent not in slot.children:
                slot.children[parent] = {}
                self._engine.backlog.suspend(slot, slot.calls[parent], 1)
            slot.children[parent][number] = call
            self._engine.enqueue(call)
            if self._engine.timeline is not None:
                self._engine.timeline.made([call])
        self._engine.master_side.update_wanted()
        self._engine.pool.balance()

    def ended(self, call):
        """A nested call has its outcome."""
        slot, number = call._parent
        children = slot.children.get(call._outer, {})
        if children.pop(number, None) and not children:
            self._resume(slot, call._outer)

    def cancel_of(self, slot, parent):
        """The call ended, for whatever cause: nobody waits for its children."""
        for call in list(slot.children.get(parent, {}).values()):
            call.cancel()
        if parent in slot.children:
            self._resume(slot, parent)

    def forget(self, slot, numbers):
        """A worker's message `forget`: these nested calls were cancelled there."""
        for children in list(slot.children.values()):
            for number in numbers:
                if number in children:
                    children[number].cancel()

    def _resume(self, slot, parent):
        del slot.children[parent]
        if call := slot.calls.get(parent):
            self._engine.backlog.suspend(slot, call, -1)

    def starving(self, slots):
        """A nested call that must run, however many others do, or None: its parent, in one of these slots, has no child in any
        slot.  So a call that waits always goes on some day, whatever the others wait for: a lock that it holds, perhaps."""
        for slot in slots:
            if slot.suspended and not slot.children_sent:
                waiting = [call for children in slot.children.values() for call in children.values() if is_waiting(call)]
                if waiting:
                    return min(waiting, key=rank)
        return None


# ---- calls on their way

class Feeder:
    """Moves calls: from the Backlog into slots, back when their slot cannot run them soon, out when they have an outcome."""

    def __init__(self, engine):
        self._engine, self._backlog = engine, engine.backlog
        self._watching = False                    # `_recall_stalled` is about to look
        self.failed = 0                           # calls that ended with an error, and were not cancelled

    def feed(self):
        """Give the slots that run out of work their next calls."""
        if not self._backlog.queued:
            return
        slots = [slot for slot in self._engine.pool.slots() if slot.takes_calls]
        slots.sort(key=lambda slot: (slot.load, -slot.heard))             # of idle ones, who worked last: its caches are warm
        quota = self._quota(len(slots))
        for slot in slots:
            self.fill(slot, quota)

    def _quota(self, slots):
        """How many calls one slot may take, so that others get their part of few."""
        return max(1, -(-self._backlog.queued // max(1, slots)))

    def fill(self, slot, quota=None):
        """Send the slot its next calls, if it runs out of work soon."""
        if not slot.takes_calls or not self._backlog.queued:
            return
        batch, items, now = [], [], time.monotonic()
        if slot.link.placed:
            if slot.calls:                        # a call of theirs has one try, and goes alone
                return
            call = slot.link.placed.popleft()
            self._backlog.take(slot, call)
            self._add(slot, call, now, batch, items)
        elif not slot.calls and self._engine.pool.is_crowded(slot.link):
            call = self._engine.children.starving(self._engine.pool.slots())
            if call is not None and self._backlog.take(slot, call):
                self._add(slot, call, now, batch, items)
        else:
            if quota is None:
                quota = self._quota(len(slot.link.slots))
            calls, next_for = slot.calls, self._backlog.next_for
            while len(batch) < quota and (not calls or slot.load < WORK_AHEAD and len(calls) < MAX_AHEAD):
                call = next_for(slot)
                if call is None:
                    break
                self._add(slot, call, now, batch, items)
                if is_last_try(call):
                    break                         # it must be alone
        if not items:
            return
        with Future._condition:
            for call in batch:
                if call._state == PENDING:
                    call._state = RUNNING
        if len(batch) == len(slot.calls):
            slot.heard = now
        slot.send("calls", items)
        if len(slot.calls) > 1:
            self._watch()

    def _add(self, slot, call, now, batch, items):
        """One more call for the message `calls`, with its function if the worker does not know that."""
        arguments, call._slot = call._arguments, slot
        if arguments is None:                     # it was cancelled just now
            return
        function = call._function
        if not (batch and batch[-1]._function is function):
            new, dropped = slot.known.learn(function)
            if new:
                items += [(0, id, None, None) for id in dropped]
                items.append((0, function.id, function.payload, (function.name, function.setup)))
        items.append((call._number, function.id, arguments, call._timeout))
        slot.add(call, now)
        if call._limit:
            self._backlog.sent(slot, call)
        if call._parent:
            call._parent[0].children_sent += 1
        batch.append(call)

    def _remove(self, slot, call):
        """Undo `_add`: the call is under way there no more."""
        slot.remove(call)
        if call._limit:
            self._backlog.unsent(slot, call)
        if call._parent:
            call._parent[0].children_sent -= 1

    # -- back

    def _watch(self):
        """Look after STALL_TIME whether calls wait behind a long one, or behind many while another slot idles."""
        if not self._watching:
            self._watching = True
            self._engine.loop.call_later(STALL_TIME, self._recall_stalled)

    def _recall_stalled(self):
        self._watching = False
        now, slots = time.monotonic(), self._engine.pool.slots()
        idle = not self._backlog.queued and any(slot.state == OPEN and not slot.calls for slot in slots)
        for slot in slots:
            if len(slot.calls) > 1:
                if slot.recalled is None and (idle or now - slot.heard >= STALL_TIME):
                    slot.recall()
                self._watch()

    def take_back(self, slot, numbers):
        """A worker's message `returned`: it has not begun these, and will not."""
        calls = [slot.calls[number] for number in numbers if number in slot.calls]
        for call in calls:
            self._remove(slot, call)
        slot.recalled = "answered" if slot.calls else None
        self.put_back([call for call in calls if call._state not in _DONE])
        self._kill_cancelled(slot)
        self._engine.pool.end_if_empty(slot)
        self._engine.pool.balance()               # a nested call may want a slot of its own

    def put_back(self, calls):
        """To the others that wait, as if they had never been sent."""
        with Future._condition:
            for call in calls:
                if call._state == RUNNING:
                    call._state = PENDING
        self._backlog.put_back(calls)

    # -- out

    def take_results(self, slot, results, seconds):
        """A worker's message `results`; seconds: what all of them took."""
        mean, outcomes, last = seconds / len(results), [], None
        calls, heard = slot.calls, slot.heard
        for number, succeeded, value in results:
            call = calls.get(number)
            if call is None:
                continue
            if slot.children:
                self._engine.children.cancel_of(slot, number)
            self._remove(slot, call)
            if call._function is not last:
                last = call._function
                last.mean = mean if last.mean is None else 0.7 * last.mean + 0.3 * mean
            call._took = heard - call._sent_at
            outcomes.append((call, succeeded, value))
        if not calls:
            slot.load = 0.0                       # sums of floats are not exact
        if slot.recalled == "answered":
            slot.recalled = None
        if self._engine.timeline is not None:
            self._engine.timeline.ran(slot, [
                (call, "cancelled" if call._state in _DONE else "succeeded" if succeeded else "failed")
                for call, succeeded, _ in outcomes], heard, seconds)
        self.finish(outcomes)
        self._engine.pool.end_if_empty(slot)
        self._kill_cancelled(slot)
        self.fill(slot)
        if self._backlog.queued and any(not other.calls for other in self._engine.pool.slots() if other is not slot):
            self.feed()

    def slot_over(self, slot, how):
        """The unanswered calls of a slot that ended get what `verdicts` says."""
        outcomes, again, calls = [], [], list(slot.calls.values())
        found = list(zip(calls, verdicts(calls, how)))
        if self._engine.timeline is not None:
            self._engine.timeline.over(slot, how, found)
        for call, (verdict, charged, spared) in found:
            self._engine.children.cancel_of(slot, call._number)
            self._remove(slot, call)
            call._tries += charged
            call._spared += spared
            if verdict == "again":
                again.append(call)
            else:
                make = {"done": lambda *_: CancelledError(), "timeout": timed_out, "died": died}[verdict]
                outcomes.append((call, False, make(call, slot, how)))
        if how["why"] in (Why.LOST, Why.SERVER_CLOSED):
            slot.link.again += len(again)
        self.put_back(again)
        self.finish(outcomes)

    def finish(self, outcomes):
        """Every call ends here, exactly once: [(call, succeeded, value)]."""
        conclude(outcomes)
        answers = collections.defaultdict(list)
        for call, succeeded, value in outcomes:
            if not self._backlog.finish(call):
                continue
            if not succeeded and type(value) is not CancelledError:
                self.failed += 1
            if call._parent:
                slot, number = call._parent
                self._engine.children.ended(call)
                if (parent := slot.calls.get(call._outer)) and parent.completed:       # cancelled: it must not go on meanwhile
                    continue
                if isinstance(value, BaseException):
                    value = pack_exception(value)
                answers[slot].append((number, succeeded, forwarded(value)))
        for slot, results in answers.items():
            slot.send("results", results)

    def cancelled(self, call):
        """A call was cancelled by its caller: it has its outcome, the rest of it must go."""
        slot = call._slot
        if slot is not None:
            self._engine.children.cancel_of(slot, call._number)        # now: its worker may take long to end
        self.finish([(call, False, CancelledError())])
        if slot is None or call._number not in slot.calls:
            return
        if len(slot.calls) > 1:
            slot.recall()                         # `take_back` kills it if it is not among what comes back
        self._kill_cancelled(slot)

    @staticmethod
    def _kill_cancelled(slot):
        """Kill the call that runs, or is next, if it was cancelled: C code may keep its worker from answering a recall."""
        call = next(iter(slot.calls.values()), None)
        if call and call._state in _DONE:
            slot.link.kill(slot, call._number)

    def fail_waiting(self, error):
        """The outcome of all calls that wait for a slot."""
        waiting = self._backlog.waiting()
        if waiting and not self._engine.closed:
            log.warning("calls cannot run (%s): %s", len(waiting), error)
        self.finish([(call, False, error) for call in waiting])


# ---- slots: as many as the share says, where it says

def slot_changes(slots, granted, draining, starving, now):
    """(slots to leave, how many to open, how many to open beyond the share) on one server.  Pure.

    granted: what the share allows there.  A call that waits for nested ones does not use its slot: as long as it waits there
    may be one more, a nested slot.  starving: a nested call there must run, whatever else does."""
    staying = [slot for slot in slots if slot.state <= OPEN or slot.state == LEAVING and slot.suspended]
    active = [slot for slot in staying if not slot.suspended]
    idle = [slot for slot in active if not slot.calls and (slot.state == OPEN or slot.nested)]     # else it may wait for a worker
    if draining:
        granted = int(len(active) < len(staying))              # nothing new, but who waits needs its nested calls
    missing = granted - len(active)
    plain = max(0, min(missing, granted - sum(not slot.nested for slot in staying)))
    leaving = []
    if missing < 0:
        least = sorted(active, key=lambda slot: (len(slot.calls), slot.load))[:-missing]
        leaving = [slot for slot in least if slot.calls or not starving and not (
            slot.nested and granted and now - slot.heard < LINGER_TIME)]
    return leaving, plain, max(missing - plain, int(starving and not idle), 0)


class Pool:
    """Which slots are open where, as the share says."""

    def __init__(self, engine):
        self._engine = engine
        self.links = {}                           # {server id: ServerLink}
        self.share = {}                           # {server id: ((host, port), slots, name)}; the last one from the master
        self._failures = 0                        # slots in a row that failed here, not at a server
        self._numbers = itertools.count(1)        # of slots
        self._short = False                       # it was said that there are too few descriptors

    def __repr__(self):
        return f"<Pool {len(self.links)} servers, {len(self.slots())} slots>"

    def slots(self):
        return [slot for link in self.links.values() for slot in link.slots.values()]

    def is_crowded(self, link):
        """Whether the calls that run there, less those that wait for nested ones, are all that the share allows."""
        granted = self._granted(link)
        return granted is not None and sum(bool(slot.calls) and not slot.suspended
                                           for slot in link.slots.values()) >= max(granted, 1)

    def _granted(self, link):
        """Slots there by the share; None: it does not name the server, so what is open stays."""
        return self.share[link.id][1] if link.id in self.share else None

    def balance(self):
        """Open and leave slots until they are what the share says, and feed them."""
        if self._engine.closed:
            return
        for id, (address, count, name) in self.share.items():
            if count and id not in self.links and self._engine.libraries.resolution:
                self.links[id] = ServerLink(self._engine, id, address, name)
        for link in list(self.links.values()):
            if link.session is not None and link.connection:
                self._balance_link(link)
        self._fail_stuck()
        self._fail_placed()
        self._engine.feeder.feed()

    def _balance_link(self, link):
        granted, now, backlog = self._granted(link), time.monotonic(), self._engine.backlog
        if granted is None and not link.draining:
            return
        slots = list(link.slots.values())
        starving = self._engine.children.starving(slots) is not None
        leaving, plain, nested = slot_changes(slots, granted, link.draining, starving, now)
        for slot in leaving:
            self.leave(slot)
        if not self._engine.master_side.count_wanted() or now < link.retry_at:
            return
        for _ in range(plain):
            self._open(link, nested=False)
        for _ in range(min(nested, backlog.queued, link.max_nested - sum(slot.nested for slot in link.slots.values()))):
            self._open(link, nested=True)

    def places(self):
        """{name of a server: the queue of calls that it alone runs}, of the servers of which this client has a slot; {}: one of
        them has not answered yet."""
        links = [link for link in self.links.values() if link.lost_at is None and self._granted(link)]
        return {link.name: link.placed for link in links} if all(link.session for link in links) else {}

    def _fail_placed(self):
        """Calls that only a server may run of which there is no slot any more."""
        for link in self.links.values():
            if link.placed and (link.lost_at is not None or not self._granted(link)):
                self._engine.feeder.finish([(call, False, ClupyError(f"{call._function.name} cannot run on {link.name}: "
                                             "this client has no slot there any more")) for call in link.placed])
                link.placed.clear()

    def _fail_stuck(self):
        """Calls inside calls that wait for each other in all workers that there may be: the newest of them fails."""
        slots = self.slots()
        if not all(slot.suspended for slot in slots) or (call := self._engine.children.starving(slots)) is None:
            return
        links = {slot.link for slot in slots}
        if all(sum(slot.nested for slot in link.slots.values()) >= link.max_nested for link in links):
            self._engine.feeder.finish([(call, False, ClupyError(
                f"calls inside calls wait for each other in all workers of {', '.join(link.name for link in links)} (max_nested "
                f"is {max(link.max_nested for link in links)}); a module that makes calls when it is imported does so in every "
                "worker: put them under if __name__ == '__main__'"))])

    # -- from opening to over

    def _open(self, link, nested):
        if descriptors_left() - sum(slot.transport is None for slot in self.slots()) <= FREE_DESCRIPTORS:
            if not self._short:
                self._short = True                # once; with the slots that there are it goes on
                log.warning("no more slots than these %s: nearly all files that this process may open are open, and a slot is "
                            "one; raise the limit (ulimit -n)", len(self.slots()))
            return
        self._engine.output.start()
        slot = slot_class()(link, next(self._numbers), nested)
        link.slots[slot.number] = slot
        slot.task = asyncio.create_task(self._connect(slot))

    async def _connect(self, slot):
        """Make the slot's connection; what goes wrong concerns this slot alone."""
        link, how = slot.link, slot.link.how
        try:
            sock = await connect_socket(*link.address)
            try:
                tune(sock)
                async with asyncio.timeout(HANDSHAKE_TIME):
                    head = slot_head(link.key, how, link.session, slot.number, slot.nested)
                    await self._engine.loop.sock_sendall(sock, preamble(SLOT, how) + head)
                context = tls_context(how, "dial", self._engine.dialing, slot_key(link.key, slot.number))
                tls = {"server_hostname": link.address[0], "ssl_handshake_timeout": NO_LIMIT} if context else {}
                await self._engine.loop.create_connection(lambda: slot, sock=sock, ssl=context, **tls)
            except BaseException:
                sock.close()
                raise
            slot.send("opening", own_modules(), surroundings(self._engine.embedded is not None), slot.offer_lanes())
        except Exception as error:                # whatever it is, the calls must not wait for this slot
            self._not_opened(slot, error)

    def _not_opened(self, slot, error):
        link, engine = slot.link, self._engine
        slot.gone = True
        if slot.transport:
            slot.transport.abort()
        self.end(slot)
        self.ending(slot)
        link.failures += 1
        link.retry_at = time.monotonic() + min(RETRY_TIME, 0.5 * 2 ** min(link.failures, 10))
        if not isinstance(error, OSError):
            self._failures += 1
            log.error("a slot at %s cannot be opened", link.name, exc_info=error)
            if self._failures >= MAX_FAILURES:
                engine.feeder.fail_waiting(ClupyError(f"no slot can be opened, the last time because of {error!r}"))
        elif link.failures == 1:
            log.warning("no slot at %s: %s", link.name, reason(error))
        elif link.failures >= MAX_FAILURES and link.connection and not any(s.state == OPEN for s in link.slots.values()):
            log.warning("giving up server %s: %s slots in a row could not be opened, the last one because of: %s", link.name,
                        link.failures, reason(error))
            link.connection.close()               # as a server that cannot be reached: again after RETRY_TIME

    def opened(self, slot):
        """Its worker is there."""
        if slot.state == OPENING:
            slot.state = OPEN
        slot.link.failures = self._failures = 0
        self._engine.libraries.opened(slot.link)
        self._engine.feeder.fill(slot)

    def renew(self, link):
        """The libraries changed: slots with the old ones go back after the calls under way."""
        for slot in list(link.slots.values()):
            self.leave(slot)
        self.balance()

    def leave_outdated(self, slots):
        """Of these, leave those whose worker has another version of an own module than the program."""
        for slot in slots:
            if any(_served_modules[name][1] != answer for name, answer in slot.modules.items()):
                self.leave(slot)

    def leave(self, slot):
        """Give the slot back after the call that runs in it."""
        if slot.state <= OPEN:
            slot.state = LEAVING
        if len(slot.calls) > 1:
            slot.recall()
        self.end_if_empty(slot)

    def end_if_empty(self, slot):
        if slot.state == LEAVING and not slot.calls:
            self.end(slot)

    def end(self, slot):
        """Ask the server to end the slot, now."""
        if not slot.closing:
            slot.closing, slot.state = True, max(slot.state, ENDING)
            slot.link.send("close", slot.number)

    def ending(self, slot):
        """Its connection was read to its end, or its worker has ended: wait for the other, or for 1 s of silence."""
        if slot.state == OVER:
            return
        slot.state = ENDING
        if slot.gone and slot.ended is not None:
            self._settle(slot)
        else:
            self._engine.loop.call_later(1.0, self._settle_late, slot, slot.heard)

    def _settle_late(self, slot, heard):
        if slot.state == OVER:
            return
        if slot.heard != heard and not slot.gone:
            self._engine.loop.call_later(1.0, self._settle_late, slot, slot.heard)      # results are still arriving
        else:
            self._settle(slot)

    def _settle(self, slot):
        """See to the calls that got no answer."""
        slot.state = OVER
        slot.link.slots.pop(slot.number, None)
        if slot.ended is None:
            self.end(slot)                        # its worker may not know yet
        if slot.transport:
            slot.transport.abort()
        how = slot.ended or {"why": Why.LOST, "begun": None}
        if how["why"] == Why.MAX_NESTED:
            slot.link.retry_at = time.monotonic() + LINGER_TIME
        self._engine.feeder.slot_over(slot, how)
        self._say_lost(slot.link)
        self._engine.libraries.leave_broken(slot.link)
        self.balance()

    # -- servers that are gone

    def advice(self):
        """What to do where no server has a slot."""
        refused = [(link.name, link.why_lost) for link in self.links.values() if link.why_lost]
        return "; ".join(f"server {name} cannot be reached: {why}" for name, why in refused) or (
            "start one with: python -m clupy serve")

    def link_lost(self, link):
        """The control connection could not be made, or ended, and with it, soon, every slot there."""
        link.lost_at = time.monotonic()
        self.share.pop(link.id, None)
        for slot in list(link.slots.values()):
            self.ending(slot)
        self._say_lost(link)
        self._engine.master_side.send_statement()

    def _say_lost(self, link):
        """Tell of a server that was there, once all its calls are seen to."""
        if link.lost_at is None or link.slots or link.session is None or link.broken or self._engine.closed:
            return
        how = "has ended, as it said before" if link.draining else "was lost"
        log.log(logging.INFO if link.draining and not link.again else logging.WARNING,
                "server %s %s; %s of our calls start again", link.name, how, link.again or "none")

    def judge(self, now):
        """Forget servers that were lost long enough ago to be tried again, and give up those that are silent."""
        for link in list(self.links.values()):
            if link.lost_at is not None and now - link.lost_at > RETRY_TIME and not link.slots:
                del self.links[link.id]
            heard = max([link.heard] + [slot.heard for slot in link.slots.values()])
            if link.connection and now - heard > SILENCE_TIME and any(slot.calls for slot in link.slots.values()):
                log.warning("server %s has been silent for %g s; it is lost", link.name, SILENCE_TIME)
                link.connection.close()

    def trim(self, now):
        """Give memory back that was not used for a while."""
        spare.trim(IDLE_MEMORY_TIME)
        for slot in self.slots():
            slot.trim(now)

    def restart_clocks(self, now):
        """We slept, not the others."""
        for link in self.links.values():
            for one in (link, *link.slots.values()):
                one.heard = now

    def close(self):
        """End every connection."""
        for link in self.links.values():
            link.close()


# ---- what the master is told, and says

async def embed(engine):
    """Start a master and a server in the engine's loop, on loopback, with a secret of their own; the master's address."""
    engine.secret = os.urandom(32).hex().encode()
    engine.dialing = default_settings("client", encryption="off")        # on loopback, to ourselves
    services = merged_services(engine.settings, {})                # the workers' are this process's
    own = {**vars(engine.settings), **{key: getattr(services, key) for key in SERVICE_KEYS},
           "listen": ("127.0.0.1", 0), "encryption": "off"}
    master = clupy_master.Master(default_settings("master", **own), engine.secret)
    server = clupy_server.Server(default_settings("server", **{**own, "master": [master.address]}), engine.secret)
    master.given = sorted(services.given)
    engine.embedded = master, server
    await server.start()
    server.grow(engine.least_slots)
    return master.address


class Cluster(collections.namedtuple("Cluster", "servers slots master")):
    """What a program is connected to: how many servers, how many slots they have, the master's "host:port"; master None: there
    is none, the slots are cores of this machine."""
    __slots__ = ()

    def __repr__(self):
        slots = amount(self.slots, "slot" if self.master else "core")
        if not self.master:
            return f"{slots} of this machine"
        return f"{amount(self.servers, 'server')}, {slots} at {self.master}"


class MasterSide:
    """What this client wants of its master, and what becomes of its calls without one."""

    def __init__(self, engine):
        self._engine = engine
        self.link = None                          # MasterLink, once the masters' addresses are known
        self._wanted = (0, 0.0)                   # most slots wanted, and when
        self._stated = 0.0                        # when the last statement was sent
        self._stating = False                     # one is about to be sent
        self._unserved = None                     # since when calls wait without any slot; inf: it was said
        self.size = 0, 0, 0                       # servers and slots of the cluster, and what we wanted when this was said
        self._surveys = 0                         # threads that wait for a share of every server
        self._preparing = None                    # the task of `begin_to_prepare`

    def __repr__(self):
        return f"<MasterSide {self.link} {self._wanted[0]} wanted>"

    async def run(self):
        """Be connected to a master, for ever."""
        engine = self._engine
        self.link = MasterLink(await self._find_masters(), engine.secret, engine.dialing)
        await self.link.run(self)

    async def _find_masters(self):
        """The masters' addresses: those of the settings, one that answers on localhost, or an embedded one's."""
        engine = self._engine
        if engine.settings.master:
            return masters_of(engine.settings)
        if engine.secret:
            address = ("127.0.0.1", engine.settings.port)
            try:
                (await dial(address, TO_MASTER, engine.secret, engine.settings)).close()
                return [address]
            except ConnectionRefusedError:
                pass
            except (OSError, ClupyError) as error:
                log.warning("%s:%s is not our master (%s); using this machine's cores instead", *address, reason(error))
        return [await embed(engine)]

    def master_joined(self, connection):
        self.send_statement()

    def master_lost(self):
        """Calls that have slots go on; `judge` looks after the others."""

    def send_statement(self):
        """Say to the master what this client wants."""
        self._stating, now = False, time.monotonic()
        if now - self._wanted[1] > 1.0:
            self._wanted = self.count_wanted(), now
        self._stated = now
        if self.link and self.link.connection:
            unreachable = [link.id for link in self._engine.pool.links.values() if link.lost_at is not None]
            self.link.connection.send("client", self._engine.id, self._engine.name, self._wanted[0], unreachable,
                                      self._engine.libraries.statement(self.link.connection), self._count_calls())

    def _count_calls(self):
        """What a statement says of this client's calls: (done, failed of these, running, waiting)."""
        engine = self._engine
        unfinished, running = len(engine.backlog.calls), sum(bool(slot.calls) for slot in engine.pool.slots())
        return engine.numbered - unfinished, engine.feeder.failed, running, unfinished - running

    def count_wanted(self):
        """How many slots the unfinished calls could use now; all of them, as long as a call is for one server alone."""
        if self._engine.libraries.awaited:
            return 0
        placed = self._surveys or any(link.placed for link in self._engine.pool.links.values())
        return max(self._engine.backlog.wanted, self.size[1] if placed else 0)

    def update_wanted(self):
        """After a change of the unfinished calls: a larger wish is stated at once, or after GATHER_TIME."""
        wanted = self.count_wanted()
        if wanted > self._wanted[0]:
            self._wanted = wanted, time.monotonic()
            if not self._stating:
                self._stating = True
                self._engine.loop.call_later(max(0.0, self._stated + GATHER_TIME - time.monotonic()), self.send_statement)

    def judge(self, now):
        """State what is due, and look after calls that wait without any slot."""
        if now - self._stated >= STATEMENT_TIME * 0.9:
            self.send_statement()
        if self.link:
            self.link.look(now)
        answered = self.link and self.link.leads
        if (self._engine.pool.slots() or not self._engine.backlog.queued
                or answered and not self.count_wanted()):          # pip resolves our list, say
            self._unserved = None
            return
        if self._unserved is None:
            self._unserved = now
        elif now - self._unserved > UNSERVED_TIME and self.link:
            self._unserved = math.inf             # said once
            self._say_unserved()
        if self.masterless(now) > self._engine.settings.patience:
            self._engine.feeder.fail_waiting(self.unreachable())

    def _say_unserved(self):
        calls = self._engine.backlog.queued
        if self.link.leads:
            log.warning("calls wait (%s): the master at %s has no server with a slot for them; %s", calls,
                        self.link.connection.peer, self._engine.pool.advice())
        else:
            log.warning("calls wait (%s), for %g s at most: %s", calls, self._engine.settings.patience, self.unreachable())

    def restart_clocks(self, now):
        """We slept, not the others."""
        if self.link:
            self.link.lost_at = now

    def masterless(self, now):
        """Seconds without a master."""
        return 0.0 if self.link is None or self.link.leads else now - self.link.lost_at

    def unreachable(self):
        why = self.link.why_lost if self.link else "none was found yet"
        return MasterUnreachable(f"no master for {self.masterless(time.monotonic()):.1f} s ({why}); "
                                 f"{advice(self.link.said if self.link else {})}")

    # -- messages from the master

    def await_answer(self):
        """Wait, in any thread, until a master has answered."""
        engine, patience = self._engine, self._engine.settings.patience
        joined = engine.joined.wait(min(UNSERVED_TIME, patience))
        if not joined and patience > UNSERVED_TIME:
            log.warning("still connecting, for %g s at most: %s", patience, self.unreachable())
            joined = engine.joined.wait(bounded(patience - UNSERVED_TIME))
        if not joined or engine.fatal:
            raise engine.fatal or self.unreachable()

    def cluster(self):
        servers, slots, _ = self.size
        return Cluster(servers, slots, None if self._engine.embedded else self.link.connection and self.link.connection.peer)

    @property
    def has_workers(self):
        """Whether there are some, as far as that is for this process to see."""
        embedded = self._engine.embedded
        return not embedded or any(process.ready or process.slot for process in embedded[1].workers.processes.values())

    def begin_to_prepare(self):
        self._preparing = asyncio.create_task(self._prepare())

    async def _prepare(self):
        """Have the thread for output and, if the cluster is embedded, a first worker; any other is waited for UNSERVED_TIME."""
        engine, began = self._engine, time.monotonic()
        try:
            while not (engine.joined.is_set() and self.has_workers) and not engine.fatal and (
                    time.monotonic() < began + (engine.settings.patience if engine.embedded else UNSERVED_TIME)):
                await asyncio.sleep(0.005)
            engine.output.start()
        finally:
            engine.prepared.set()

    async def survey(self):
        """Wait until this client has slots of as many servers as it can; `pool.places` names them."""
        self._surveys += 1
        try:
            async with asyncio.timeout(self._engine.settings.patience):
                while not (self._engine.pool.places() and self.size[2] >= self.size[1]):
                    self.update_wanted()
                    await asyncio.sleep(GATHER_TIME)
        except TimeoutError:
            raise self.unreachable() if self.masterless(time.monotonic()) else ClupyError(
                f"no server has a slot for {self._engine.settings.patience:g} s; {self._engine.pool.advice()}") from None
        finally:
            self._surveys -= 1

    def on_share(self, _, share, services, libraries, size):
        engine, self.size, self.link.leads = self._engine, size, True
        engine.capacity = size[1]
        if not engine.joined.is_set():
            log.info("connected to %r", self.cluster())
        engine.libraries.hear(libraries)
        engine.pool.share = {id: ((host or self.link.host, port), *rest) for id, ((host, port), *rest) in share.items()}
        if services != engine.said:               # else it stays the same object, by which Services sees that nothing changed
            engine.said = services
        engine.joined.set()
        engine.pool.balance()
        engine.libraries.judge(engine.pool.share)

    def on_leader(self, _, address):
        self.link.follow(address)

    def master_refused(self, error):
        """No master can be ours, as all of them said."""
        self._engine.fail_all(error)

    def on_notice(self, _, what, text):
        self._engine.libraries.show_progress(text)


# ---- the client

class Engine(BaseEngine):
    """One client: its thread, its loop, its rooms.  Any thread may call the methods of BaseEngine; all else is the loop's."""

    def __init__(self, settings, secret=None, dependencies=None):
        super().__init__()
        self.id, self.name = os.urandom(8).hex(), client_name()
        self.settings = self.dialing = settings   # ... and those by which it connects, which are others where it is embedded
        self.secret = secret                      # None: an embedded cluster makes its own
        self.embedded = None                      # (Master, Server) of the embedded cluster
        self.fatal = None                         # an error that every call gets from now on
        self.joined = Flag()                      # a first share, or a fatal error, is there
        self.prepared = Flag()                    # what an ending interpreter could not start is there, or need not be
        self.pid = os.getpid()
        self.backlog = Backlog()
        self.output = clupy_master.Output(self)
        self.children = Children(self)
        self.feeder = Feeder(self)
        self.pool = Pool(self)
        self.libraries = clupy_master.ClientLibraries(self, dependencies)
        self.master_side = MasterSide(self)
        self._inbox = collections.deque()         # calls from any thread, not yet seen by the loop
        self._awake = False                       # the loop will look at the inbox
        self.least_slots = 0                      # of an embedded server, as `grow` said
        self.numbered = 0                         # the number of the call made last
        self._selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(target=self._main, name=ENGINE_THREAD, daemon=True)
        self._thread.start()

    def __repr__(self):
        return f"<Engine {self.id[:6]} {self.backlog} {self.pool}{' closed' if self.closed else ''}>"

    # -- for any thread

    def submit(self, call):
        self._inbox.append(call)
        if not self._awake:
            self._awake = True
            self.soon(self._pump)

    def cancel(self, call):
        self.soon(self.feeder.cancelled, call)

    def soon(self, function, *args):
        """Call the function in the loop."""
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:                      # the loop is closed
            self._lose()

    def later(self, seconds, job, *args):
        self.soon(self.loop.call_later, seconds, threads.run, job, *args)

    def calls(self):
        if self.closed:
            return []
        with contextlib.suppress(Closed):
            return self._ask(self._calls)
        return []

    def _ask(self, coroutine):
        """What coroutine(), run in the loop, returns or raises.  Raises Closed if the loop ends before."""
        answers = SimpleQueue()
        self.soon(lambda: self.loop.create_task(coroutine()).add_done_callback(answers.put))
        while self._thread.is_alive():
            with contextlib.suppress(Empty):
                if not (task := answers.get(timeout=1.0)).cancelled():
                    return task.result()
        raise Closed("the client was closed")

    def begin_to_close(self):
        with undisturbed():
            if not self.closed:
                self.closed = True
                self.soon(self._start_to_close)

    def close(self):
        """End all calls and slots; returns when the last output was shown.  Each of its three waits takes CLOSE_TIME or
        little more at most."""
        if self.pid != os.getpid():
            return
        self.begin_to_close()
        self._thread.join(CLOSE_TIME + 2)
        if self._thread.is_alive():
            log.error("closing took more than %g s; leaving the rest to the servers", CLOSE_TIME + 2)
            self.soon(self.loop.stop)
            self._thread.join(CLOSE_TIME)
        self.output.join()                        # the last lines are read, but may not be shown yet
        self._lose()

    def grow(self, slots):
        self.soon(self._grow, slots)

    @property
    def works(self):
        return self.output.started and self.master_side.has_workers

    def prepare(self):
        self.soon(self.master_side.begin_to_prepare)
        threads.run(self.prepared.wait, bounded(self.settings.patience))       # whose thread stays
        self.prepared.wait(bounded(self.settings.patience))

    def join(self):
        """Wait until a master has answered: the Cluster.  Raises MasterUnreachable, or why no master can be ours."""
        self.master_side.await_answer()
        return self.master_side.cluster()

    def places(self):
        """{name of a server: a call's `_place` there}, of each of which this client has a slot.  Raises as `join`."""
        self._ask(self.master_side.survey)
        return self.pool.places()

    def services(self, patience):
        if not self.joined.wait(bounded(patience)):
            raise self.master_side.unreachable()
        if self.fatal and not self.said:
            raise self.fatal
        return {} if self.embedded else self.said or {}

    def release(self, names):
        self.soon(lambda: [link.send("release", names) for link in self.pool.links.values()])

    def abandon(self):
        """In a forked child: close every descriptor by number, and tell the child's copies of calls that they are lost.

        Never through asyncio, which would take the parent's sockets out of the epoll that both share."""
        for number in () if self.loop.is_closed() else self.descriptors():
            with contextlib.suppress(OSError):    # closed by the parent's loop in this very moment
                os.close(number)
        for slot in self.pool.slots():
            slot.lanes.close()                    # its map would keep the memory as long as this child lives
        self._inbox.extend([*self.backlog.calls.values(), *self.held])
        self.closed, self.soon = True, self._lose
        self._lose()

    def _lose(self, *_):
        """No loop will look at the inbox any more."""
        self._awake = False                       # first: a call that is submitted now comes here by itself
        calls = list(self._inbox)
        why = "the client was closed" if self.pid == os.getpid() else FORKED
        conclude([(call, False, Closed(why)) for call in calls])

    def descriptors(self):
        """The numbers of the engine's open files: a forked child closes them, and nothing else of the engine."""
        numbers = {key.fd for key in list(self._selector.get_map().values())}
        if hasattr(self._selector, "fileno"):     # not those by poll() or select(), nor gevent's
            numbers.add(self._selector.fileno())
        numbers.update(slot.transport.get_extra_info("socket").fileno() for slot in self.pool.slots() if slot.transport)
        for part in self.embedded or ():
            numbers.update(part.descriptors())
        return {number for number in numbers if number >= 0}

    # -- the loop

    def _main(self):
        asyncio.set_event_loop(self.loop)
        self._life = self.loop.create_task(self._live())
        try:
            self.loop.run_forever()
        finally:
            rest = asyncio.all_tasks(self.loop)
            for task in rest:
                task.cancel()
            if rest:
                self.loop.run_until_complete(asyncio.wait(rest))
            self.loop.run_until_complete(asyncio.sleep(0))         # transports close in the loop's next turn
            self.loop.close()
            self._lose()

    async def _live(self):
        try:
            await self.libraries.pack()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.master_side.run())
                tasks.create_task(self._tick())
        except* Exception as group:               # the engine's edge: no call may wait for an engine that is no more
            error = group.exceptions[0]
            if not isinstance(error, (ClupyError, OSError)):
                if not self.closed:               # else the interpreter ends, and has begun to take things away
                    log.error("the engine failed", exc_info=group)
                error = ClupyError(f"the engine failed: {error!r}")
            self.fail_all(error)

    async def _tick(self):
        """Twice in STATEMENT_TIME: state what is due, and look for what ended without a word."""
        woke = time.monotonic()
        while True:
            await asyncio.sleep(STATEMENT_TIME / 2)
            now = time.monotonic()
            if now - woke > STATEMENT_TIME / 2 + 1:
                self.pool.restart_clocks(now)
                self.master_side.restart_clocks(now)
            woke = now
            if self._inbox:                       # Ctrl-C may have come between submit and the loop
                self._pump()
            self.pool.judge(now)
            self.pool.trim(now)
            self.master_side.judge(now)
            self.pool.balance()

    def _pump(self):
        """Take what is in the inbox."""
        self._awake = False
        inbox = self._inbox
        if self.timeline is not None:
            self.timeline.made(inbox.copy())
        for _ in range(len(inbox)):
            self.enqueue(inbox[0])                # in this order: a child that is forked off finds it in one or the other
            inbox.popleft()
        if inbox and not self._awake:
            self._awake = True
            self.loop.call_soon(self._pump)
        self.master_side.update_wanted()
        changed = reloaded()                      # before these calls are sent: they want what the program has now
        if changed:
            self.pool.leave_outdated(self.pool.slots())
        if self.backlog.queued and (changed or not self.pool.slots()):
            self.pool.balance()                   # slots have ended, but not the share
        else:
            self.feeder.feed()

    def enqueue(self, call):
        """The call's first step in the loop."""
        if call._state in _DONE:
            return
        self.numbered += 1
        call._number = self.numbered
        self.backlog.add(call)
        if call._place is not None:
            self.loop.call_soon(self.pool.balance)                     # there may be no slot there
        if self.fatal or self.closed:
            self.feeder.finish([(call, False, self.fatal or Closed("the client was closed"))])

    async def _calls(self):
        self._pump()
        return [*self.backlog.calls.values(), *super().calls()]

    def fail_all(self, error):
        """No call can succeed any more: give this error to all, now and later."""
        self.fatal = error
        self.joined.set()
        self._pump()
        self.feeder.fail_waiting(error)

    def _grow(self, slots):
        self.least_slots = max(self.least_slots, slots)
        if self.embedded:
            self.embedded[1].grow(slots)

    # -- the end

    def _start_to_close(self):
        self._end = self.loop.create_task(self._close())

    async def _close(self):
        """Whatever fails, the loop ends."""
        try:
            await self._close_all()
        except Exception:                         # the engine's edge
            log.exception("the engine failed to close")
        finally:
            self.loop.stop()

    async def _close_all(self):
        """Cancel what is unfinished, end every slot, and wait for its last output."""
        for call in await self._calls():
            call.cancel()
        deadline = self.loop.time() + CLOSE_TIME
        for slot in self.pool.slots():
            self.pool.end(slot)
        while any(slot.pid for slot in self.pool.slots()) and self.loop.time() < deadline:
            await asyncio.sleep(0.005)
        self.output.end()
        self.loop.set_exception_handler(lambda *_: None)       # else asyncio tells of resets when connections are garbage
        self.pool.close()
        if self.master_side.link:
            self.master_side.link.close()
        self._life.cancel()                       # it may be about to start the embedded cluster
        await asyncio.wait([self._life])
        for part in reversed(self.embedded or ()):
            await part.close()
        self.feeder.fail_waiting(Closed("the client was closed"))


# ==== Calls ==================================================================
# What a user writes.  The functions of the module share one engine per process, made when it is first needed.

_engine = None
_engines = weakref.WeakSet()    # all that this process has made, Executors' own included
_executors = weakref.WeakSet()
_engine_lock = threading.Lock()


def connect(master: str | None = None, *, executor: concurrent.futures.Executor | None = None, config: str | None = None,
            **settings: Any) -> Any:
    """Connect this process to a cluster; optional, since the first call does it by itself.

    master: "host", "host:port" or several with commas; None: that of clupy.client.yaml or CLUPY_MASTER, else one that
    answers on localhost, else the cores of this machine.  executor: a concurrent.futures.Executor that runs the calls
    instead, where `max`, `timeout` and `retries` do not apply.  config: a YAML file; settings: any key of it.  Returns
    when the master has answered: the Cluster, which shows servers and slots, or the executor.  Once more with the same
    settings does no harm, and in a worker it does nothing: modules that connect may be imported there.
    Raises ConfigurationError, SecretError, VersionMismatch, MasterUnreachable, or RuntimeError if connected otherwise."""
    global _engine
    if _engine is not None and _engine.nested:
        return
    if executor is not None and not callable(getattr(executor, "submit", None)):
        raise TypeError(f"executor must be a concurrent.futures.Executor, not {type(executor).__name__}")
    wanted = read_settings("client", config, master=master, **settings) if executor is None else executor
    with undisturbed(), _engine_lock:
        if _engine is None:
            _engine = _make_engine(wanted) if executor is None else ExecutorEngine(executor)
        elif difference := _difference(_engine.executor or _engine.settings, wanted):
            raise RuntimeError(f"this process is connected already, with {difference}; call clupy.close() first")
        engine = _engine
    if executor is not None:
        return executor
    try:
        return engine.join()
    except ClupyError:
        _engine = None
        engine.close()
        raise


def _difference(old, new):
    """How what this process is connected with differs from what is wanted now, as a message says it; "": it does not."""
    if not (isinstance(old, Settings) and isinstance(new, Settings)):
        return "" if old is new else f"{old!r}, not {new!r}"
    return ", ".join(f"{key}={masked(value)!r}, not {masked(getattr(new, key))!r}"
                     for key, value in vars(old).items() if key in SETTINGS and getattr(new, key) != value)


def _make_engine(settings):
    file = "clupy.client.dependency.yaml"
    own = clupy_master.read_dependencies(file)
    try:
        secret = find_secret(settings)
    except SecretError as error:
        path = os.path.expanduser(settings.secret_file)
        if settings.master or "secret_file" in settings.given or os.path.exists(path):
            raise
        log.debug("%s; so no master of ours runs on this machine", error)
        secret = None
    engine = Engine(settings, secret, own)
    _engines.add(engine)
    return engine


class _Ended(BaseEngine):
    """Stands in at the program's end, when no thread can be started: daemon threads may go on to make calls."""

    closed = True

    def submit(self, call):
        conclude([(call, False, Closed("the program is ending"))])

    def cancel(self, call):
        """Nothing runs of it."""


def _current_engine():
    global _engine
    if _engine is None:
        with undisturbed(), _engine_lock:
            if _engine is None:
                try:
                    _engine = _make_engine(read_settings("client"))
                except RuntimeError as error:
                    if "shutdown" not in str(error):
                        raise
                    _engine = _Ended()
    return _engine


class Parallel(Wrapper):
    """A function whose calls run in the cluster: calling it returns a Future at once.

    .func is the function itself."""

    def __init__(self, func, most, timeout, retries, again=None):
        self.func = func
        self._options = most, timeout, retries, again                          # again: (retry_on, delay), or None
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(func, name, None))
        self._limit = (limit_key(func), most) if most else None
        self._function = capture(func) if _is_complete(func) else None         # None: captured at each call

    def __call__(self, *args, **kwargs):
        _, timeout, retries, again = self._options
        function = self._function or capture(self.func)
        engine = _engine or _current_engine()
        if again:
            engine = _Tries(engine, *again)
        return start(engine, self.func, function, args, kwargs, timeout, retries, self._limit)

    def __repr__(self):
        return f"<parallel {self.__qualname__ or self.func!r}>"

    def __get__(self, instance, owner=None):
        return self if instance is None else Parallel(self.func.__get__(instance, owner), *self._options)

    @property
    def __wrapped__(self):
        return self.func

    def __reduce__(self):
        """By name where a worker finds it under that; else in two steps, as the function may refer to this object."""
        if _named(self) is self:
            return self.__qualname__
        return Parallel.__new__, (Parallel,), {**vars(self), "_function": None}


def _is_complete(func):
    """Whether all that a function uses can be there: not so while it is being decorated, as its module does not know it
    yet, and what it uses may be defined further down."""
    if type(func) is not types.FunctionType:
        return True
    if func.__name__ == "<lambda>" or "<locals>" in func.__qualname__:
        return all(_contents(cell, _ABSENT) is not _ABSENT for cell in func.__closure__ or ())
    return func.__globals__.get(func.__name__) is func


@overload
def parallel(func: Callable[P, Coroutine[Any, Any, T]], *, max: int | None = None, timeout: Time = None, retries: int = 2,
             retry_on: Any = (), delay: Time = None, time_out: Time = None) -> Wrapped[P, T]: ...
@overload
def parallel(func: Callable[P, T], *, max: int | None = None, timeout: Time = None, retries: int = 2,          # noqa: F811
             retry_on: Any = (), delay: Time = None, time_out: Time = None) -> Wrapped[P, T]: ...
@overload
def parallel(*, max: int | None = None, timeout: Time = None, retries: int = 2,                                # noqa: F811
             retry_on: Any = (), delay: Time = None, time_out: Time = None) -> Decorator: ...
def parallel(func=_ABSENT, *, max=None, timeout=None, retries=2, retry_on=(), delay=None, time_out=None):      # noqa: F811
    """The function, wrapped so that its calls run in the cluster; also a decorator, with or without options.

    max: how many calls of it may run at once, over the whole cluster; None: as many as there are slots.
    timeout: how long one call may run (seconds, or "10s"); then its worker is killed and it fails with CallTimeout.
    retries: how often a call is started again after its worker, server or connection was lost.
    retry_on: an exception class or a tuple of them: a call that raises one is made again, too, within its `retries`, after
    `delay` (None: 1 s), which doubles with each try and is cut at random by up to a half; other exceptions of the function
    are its outcome at once.  The function is captured here, as it is now (one that is being decorated: at each call, since what
    it uses may be defined further down); arguments are pickled when the call is made.  Any thread may call it."""
    if time_out is not None:
        timeout = _one_of("parallel", timeout, time_out)
    if func is _ABSENT:
        return functools.partial(parallel, max=max, timeout=timeout, retries=retries, retry_on=retry_on, delay=delay)
    if not callable(func):
        raise TypeError(f"parallel() wraps a function, not {type(func).__name__} {func!r}; did you call it already?")
    if timeout is not None and (timeout := _time_out(timeout)) is not None and timeout <= 0:
        raise ValueError(f"timeout is {timeout!r}, but must be more than 0 seconds, or None")
    again = (_exceptions(retry_on), _delay(1 if delay is None else delay)) if retry_on != () else None
    if delay is not None and not again:
        raise TypeError(f"parallel() was given delay={delay!r}, but no retry_on, for whose exceptions it is")
    return Parallel(func, _whole("max", max, 1), timeout, _whole("retries", retries, 0), again)


def _exceptions(classes):
    """The exception classes that a user gave, as a tuple."""
    classes = classes if isinstance(classes, tuple) else (classes,)
    if not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in classes):
        raise TypeError(f"retry_on must be an exception class, or a tuple of them, not {classes!r}")
    return classes


def _delay(delay):
    seconds = _time_out(delay)
    if seconds is None or seconds < 0:
        raise ValueError(f"delay is {delay!r}, but must be a number of seconds")
    return seconds


def _whole(name, value, least):
    """What a user gave as a whole number, numpy's too, as an int; None stays None, unless it must be a number."""
    if value is None and least:
        return None
    if type(value) is int and value >= least:     # nearly always; to ask an abstract class takes 0.2 us
        return value
    if not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number from {least}{', or None' if least else ''}")
    return int(value)


def start(engine, func, function, args, kwargs, timeout, retries, limit, place=None, sink=None, tries=0):
    """The Future of a new call; one whose arguments cannot be pickled has that for its outcome already."""
    if not kwargs and place is None and sink is None:
        for value in args:
            if type(value) not in PLAIN:
                break
        else:
            call = Future(engine, function, args, timeout, retries, limit)
            engine.submit(call)
            return call
    call = Future(engine, function, None, timeout, retries, limit)
    call._place, call._sink, call._tries = place, sink, tries
    try:
        call._arguments, call._refs = pack_arguments(function.name, args, kwargs, func)
    except Exception as error:                    # one bad call among a hundred spoils one result
        conclude([(call, False, error)])
    else:
        if sink is not None:
            sink.size = payload_size(call._arguments)          # now: the call may be over as soon as it is submitted
        if type(call._arguments) is tuple:        # with large buffers
            _note_repeated(func, args, kwargs, payload_size(call._arguments))
        awaited = {place: thing for place, thing in enumerate(call._refs) if isinstance(thing, Future)}
        if awaited:
            _hold(engine, call, awaited)
        else:
            engine.submit(call)
    return call


def _hold(engine, call, awaited):
    """Submit the call when the Futures among its arguments, {place: Future}, have succeeded; if one does not, nor does it."""
    left = itertools.count(len(awaited) - 1, -1)

    def ended(future):                            # in a thread that may block: a result may have to be unpickled
        if future.cancelled():
            conclude([(call, False, CancelledError())])
        elif (error := future.exception()) is not None:
            conclude([(call, False, argument_failed(call, future, error))])
        elif next(left):
            return
        elif not call.done():
            try:
                call._arguments = filled(call._arguments, {place: _result_of(future) for place, future in awaited.items()})
            except Exception as error:            # whatever a class of the user's raises while it is pickled
                conclude([(call, False, error)])
            else:
                engine.submit(call)
                if call.cancelled():              # just now
                    engine.cancel(call)
        engine.held.discard(call)

    with undisturbed():
        engine.hold(call)
        for future in awaited.values():
            future.add_done_callback(ended)


def argument_failed(call, future, error):
    """The ArgumentFailed of a call that has a Future among its arguments which failed with this error."""
    why = "" if isinstance(error, ArgumentFailed) else f": {_line(error)}"
    failure = ArgumentFailed(f"{call._function.name} was not called: one of its arguments is the result of "
                             f"{future._function.name}, which failed{why}")
    failure.__cause__ = error
    return failure


def _result_of(future):
    """The payload of a result for another call: as it came, unless something in it is for this process to read."""
    packed = future._packed
    if packed and (packed[1] if type(packed[1]) is bytes else packed[1][0]).find(b"clupy") < 0:
        return pack(_Instead(unpack, forwarded(packed[1])))            # large buffers copied: this process may change them
    return pack(future.result())


def timeline(path: str) -> contextlib.AbstractContextManager[Any]:
    """A block of which the file at `path` shows when and where each call ran that ended in it: JSON that ui.perfetto.dev opens.

    A row is a worker, a bar a call, with the seconds that it waited and ran, its try and what became of it; deaths of workers
    are marked.  The file is written when the block ends, however it does.  One block at a time; in the program, not in calls."""
    if _engine is not None and not isinstance(_engine, Engine):
        raise ClupyError("timeline() needs a cluster of its own: it works in the program, not on another executor, nor in a call")
    return clupy_master.Timeline(path)


def slots() -> int:
    """How many calls can run at once: the slots of the cluster, this machine's cores without one.

    Waits for the master as connect() does, and raises what that raises."""
    engine = _current_engine()
    return getattr(engine.executor, "_max_workers", None) or 1 if engine.executor else engine.join().slots


FETCHES["slots"] = slots


def everywhere(func: Callable[..., T], *args: Any) -> dict[str, Future[T]]:
    """{server: Future}: func(*args) runs once on each server of which this client has a slot, or can have one now.

    To warm caches there, or to look around.  A call has one try."""
    engine, function = _current_engine(), capture(func)
    return {server: start(engine, func, function, args, {}, None, 0, None, place) for server, place in engine.places().items()}


class _Tries(BaseEngine):
    """The engine of one call which is made again where it raises what its `retry_on` names: each try is a call by itself."""

    def __init__(self, engine, retry_on, delay):
        self._engine, self._retry_on, self._delay = engine, retry_on, delay
        self.held, self.hold, self.cancel_all = engine.held, engine.hold, engine.cancel_all
        self._current = None                      # the Future of the present try, or of the last

    def submit(self, call):
        self._try(call, call._retries, 0, 1)

    def _try(self, call, left, made, number):
        """The number-th try; left: starts that are left for later ones; made: those before."""
        self.held.discard(call)
        self._state_is(call, PENDING, RUNNING)
        arguments, refs = call._arguments, call._refs
        if arguments is None:                     # it was cancelled meanwhile
            return
        current = Future(self._engine, call._function, arguments, call._timeout, left, call._limit)
        current._refs, current._outer = refs, call._outer
        current._parent = ()                      # none, nor is it one of those that `failures` counts
        self._current = current
        self._engine.submit(current)
        current.add_done_callback(functools.partial(self._tried, call, left, made, number))
        if call.cancelled():                      # just now
            current.cancel()

    @staticmethod
    def _state_is(call, before, now):
        with Future._condition:
            if call._state == before:
                call._state = now

    def _tried(self, call, left, made, number, current):
        starts = max(1, current._tries + (current._packed is not None))        # what the function raised was charged to nobody
        left, made = left - starts, made + starts
        if current.cancelled():
            conclude([(call, False, CancelledError())])
        elif not isinstance(error := current.exception(), self._retry_on):
            conclude([(call, error is None, current._result if error is None else error)])
        elif left < 0:
            error.add_note(f"{call._function.name} was tried {amount(made, 'time')}, as retry_on and retries say")
            conclude([(call, False, error)])
        else:
            call._outer = current._outer
            self._state_is(call, RUNNING, PENDING)
            self.hold(call)
            self._engine.later(self._delay * 2 ** (number - 1) * random.uniform(0.5, 1), self._try, call, left, made, number + 1)

    def cancel(self, call):
        if self._current:
            self._current.cancel()


_repeated = {}      # {(limit key of a function, id of an argument): (weak reference to it, calls that were given it)}
_advised = set()    # limit keys of functions whose arguments were warned of


def _note_repeated(func, args, kwargs, size):
    """Warn, once for a function, of a large argument that goes to many calls: each time it is copied and sent.

    size: bytes of all arguments.  Any thread may call: a lost count is no harm."""
    if size < REPEATED_BYTES or (key := limit_key(func)) in _advised:
        return
    arguments = [(name, value) for name, value in (*enumerate(args), *kwargs.items()) if type(value) not in PLAIN]
    for name, value in arguments:
        bytes_each = size if len(arguments) == 1 else getattr(value, "nbytes", 0)
        if not isinstance(bytes_each, numbers.Integral) or bytes_each < REPEATED_BYTES:
            continue
        place = key, id(value)
        try:
            reference, calls = _repeated.get(place) or (weakref.ref(value, lambda _, place=place: _repeated.pop(place, None)), 0)
        except TypeError:                         # bytes, a list: it cannot be told from the next that is put in its place
            continue
        _repeated[place] = reference, calls + 1
        if calls + 1 == REPEATED_CALLS:
            _advised.add(key)
            named = name if isinstance(name, str) else (_parameters(func)[name:] or ["value"])[0]
            log.warning("%s was given the same %s in %d calls, %s in all: if it stays as it is, ref = clupy.share(%s) and a call "
                        "with ref sends it once", _function_name(func), _megabytes(bytes_each), REPEATED_CALLS,
                        _megabytes(bytes_each * REPEATED_CALLS), named)


def _megabytes(size):
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _shown(progress, *how, **more):
    """A block in which progress is shown, if that is wanted; see clupy_master.progress."""
    return clupy_master.progress(progress, *how, **more) if progress else contextlib.nullcontext()


@_either_spelling
def wait_all(results: Iterable[Future[Any]], time_out: Time = None, progress: bool | Literal["always"] = False) -> bool:
    """Whether all the futures completed within `time_out` (None: for ever), their handlers included.

    progress: show on standard error, if that is a terminal or a notebook's, how many have, have failed and run, how fast and
    for how long: with tqdm where it is installed.  "always": wherever that is shown."""
    if isinstance(results, concurrent.futures.Future):
        raise TypeError("wait_all() takes a list of Futures; for one: future.wait() or future.result()")
    results = list(results)
    deadline = _deadline(time_out)
    with _shown(progress, len(results), futures=results):
        return all(future.wait(deadline - time.monotonic()) for future in results)


@_either_spelling
def as_completed(results: Iterable[Future[T]], time_out: Time = None,
                 progress: bool | Literal["always"] = False) -> Iterator[Future[T]]:
    """The futures, each as soon as it is done. Raises TimeoutError after `time_out` seconds in all (None: never).

    progress: as for wait_all()."""
    futures, deadline = set(results), _deadline(time_out)
    total, done = len(futures), SimpleQueue()
    waiter = types.SimpleNamespace(add_result=done.put, add_exception=done.put, add_cancelled=done.put)
    try:
        with _shown(progress, total, futures=list(futures)):
            for future in futures:
                with future._condition:           # as concurrent.futures has it, whose own futures may be among them
                    if future.done():
                        done.put(future)
                    else:
                        future._waiters.append(waiter)
            while futures:
                try:
                    future = done.get(timeout=bounded(deadline - time.monotonic()))
                except Empty:
                    raise TimeoutError(f"{len(futures)} (of {total}) futures unfinished") from None
                futures.remove(future)
                yield future
                del future
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        raise
    finally:
        for future in futures:
            with future._condition:
                if waiter in future._waiters:
                    future._waiters.remove(waiter)


# ---- map: results of many items, in their order
#
#      iterables --- _Items ---> chunks, each a call ---> their results, in order ---> what the program takes
#                                   ^          |
#                                   +----------+  given back, or again one by one
#
# A chunk has as many items as are CHUNK_TIME of work.  If it takes longer than PART_TIME, its worker sends what it has, and
# gives back what it has not begun: so a slow item holds up only what comes after it, and nothing is done twice.  Where a
# chunk's call itself fails (its worker died, an argument cannot be pickled), its items are made calls one by one, so that only
# those at fault fail.

class _InChunks(Wrapper):
    """func, called for each of several items in one call.  spread: an item is a tuple of arguments, else the only one."""

    def __init__(self, func, spread):
        self.func, self.spread, self.__qualname__ = func, spread, _function_name(func)

    def __call__(self, items, gives_back):
        """(number of the first result, results, failure of the item after them or None, items done, seconds); results before
        the first were sent already."""
        results, failure, begun = [], None, time.perf_counter()
        func = self._spread if self.spread else self.func
        part = _engine.begin_part(results) if _engine else _Part(results)
        late = part.late
        try:
            for item in items:
                if late and gives_back and results:
                    break
                value = func(item)
                results.append(value if type(value) in PLAIN else _packed_item(value))
        except BaseException as error:            # the outcome of an item, whatever the user's code raised
            failure = pack_exception(error, 1, _engine.where if _engine else "")
        first, rest = part.close()
        return first, rest, failure, len(results) + (failure is not None), time.perf_counter() - begun

    def _spread(self, item):
        return self.func(*item)


def _packed_item(value):
    """A result as it is now: the next item may change it."""
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return _Instead(_opened_item, forwarded(pack(value, _result_pickler)))


def _opened_item(payload):
    try:
        return unpack(payload)
    except Exception as error:                    # whatever a user's __setstate__ raises
        return _Unreadable(error)


class _Unreadable:
    """Stands for a result that cannot be unpickled here."""

    def __init__(self, error):
        self.error = error


class _Part:
    """The results of a chunk under way, of which those that are there may be sent before the others."""

    def __init__(self, results):
        self._results, self._sent, self._lock = results, 0, threading.Lock()
        self.late = []                            # not empty: it takes long
        self.over = False

    def take(self):
        """(number of the first, how many, their payload) of the results that were not sent yet; None: there are none."""
        with self._lock:
            if self.over:
                return None
            self.late.append(True)
            first, results = self._sent, self._results[self._sent:]
            if not results:
                return None
            payload = pack_result(results)
            self._sent += len(results)
            return first, len(results), payload

    def close(self):
        """(number of the first, results) of those that were not sent; no more are."""
        with self._lock:
            self.over, results, self._results = True, self._results[self._sent:], None
            return self._sent, results


_STILL = (list, tuple, range, str, bytes, bytearray, dict, set, frozenset)        # to iterate over these runs nobody's code
_FIXED = (tuple, range, str, bytes, frozenset)     # and these never change


def _runs_nothing(iterable):
    return type(iterable) in _STILL or type(iterable).__module__ == "numpy" and type(iterable).__name__ == "ndarray"


def _is_plain(value):
    """Whether it cannot change, and so may be pickled later."""
    return type(value) in PLAIN or type(value) is tuple and all(_is_plain(inner) for inner in value)


class _Items:
    """The items of a map's iterables: of one, or tuples of several's.  They are read at once where nobody's code runs for that,
    else by `read` in a thread, since one may be long in coming."""

    def __init__(self, iterables, func):
        self.still = all(_runs_nothing(each) for each in iterables)
        if self.still:                            # as they are now
            iterables = [list(each) if type(each) in _STILL and type(each) not in _FIXED else each for each in iterables]
        self.spread = len(iterables) != 1
        self._source, self._func = zip(*iterables) if self.spread else iter(iterables[0]), func
        self.left = min((len(each) for each in iterables), default=0) if self.still else math.inf
        self._read = collections.deque()
        self._over = False                        # `read` is
        self.error = None                         # what an iterable raised after them

    @property
    def ended(self):
        return not self.left or self._over and not self._read

    def __len__(self):
        """How many can be taken now."""
        return self.left if self.still else len(self._read)

    def take(self, count):
        """The next items, at most so many."""
        if self.still:
            items = list(itertools.islice(self._source, count))
            self.left = self.left - len(items) if len(items) == count else 0
            return items
        items = []
        while self._read and len(items) < count:
            if type(self._read[0]) is _Alone:
                return items or [self._read.popleft().item]
            items.append(self._read.popleft())
        return items

    def read(self, then):
        """Read them all; then() after each says whether to go on.  An item is pickled at once: the next one may change it."""
        try:
            for item in self._source:
                self._read.append(item if _is_plain(item) else self._packed(item))
                if not then():
                    return
        except BaseException as error:            # raised where its item would be
            self.error = error
        finally:
            self._over = True
            then()

    def _packed(self, item):
        try:
            payload, met = self.packed(item)
        except pickle.PicklingError:
            return _Alone(item)                   # which says so when it is made a call
        return _Alone(item) if any(isinstance(one, Future) for one in met) else _PackedItem(payload, met, self.spread)

    def packed(self, item):
        """pack_arguments of an item."""
        return pack_arguments(_function_name(self._func), item if self.spread else (item,), {}, self._func)


class _Alone:
    """An item that is a call by itself."""

    def __init__(self, item):
        self.item = item


class _PackedItem:
    """Stands for an item that may have changed since it was pickled."""

    def __init__(self, payload, refs, spread):
        self.payload, self.refs, self.spread = payload, refs, spread           # the refs live as long

    def __reduce__(self):
        return _unpacked_item, (forwarded(self.payload), self.spread)


def _unpacked_item(payload, spread):
    args, _ = unpack(payload)
    return args if spread else args[0]


class _Chunk:
    """Items that are one call; job: the _Map that they are of."""

    def __init__(self, items, job):
        self.items, self._job = items, job
        self.call = None                          # the Future of it
        self.size = 0                             # bytes of the arguments
        self.parts = collections.deque()          # (number of the first result, results or their payload)
        self.got = 0                              # results that came in parts
        self.taken = 0                            # results that the program has
        self.rest = []                            # the chunks that take its place for what it has not done
        self.failure = None                       # an exception, or its payload, after the results
        self.over = False

    def take_part(self, first, count, payload):
        self.parts.append((first, payload))
        self.got = max(self.got, first + count)
        self._job.changed.ring()

    def take_outcome(self, call):
        self._job.take_outcome(self, call)


class _Map:
    """One map.  `_send` makes calls, in whatever thread: the program's, a reader's or that of `_digest`, which sees to calls that
    are over; `results` gives what comes of them to the program."""

    def __init__(self, call, func, iterables, retries, size=None, eager=False, room=None):
        """call(engine, chunk, retries, tries) -> the Future of a chunk's call.  size: items of a chunk; None: as measured.
        eager: all are sent at once.  room: how many items may be read and not taken; None: as the constants say."""
        self._call, self._retries, self._size, self._eager, self._room = call, retries, size, eager, room or math.inf
        self._engine = None
        self._items = _Items(iterables, func)
        self._chunks = collections.deque()        # in order; the first is the one of which the next result is
        self.changed = Bell()                     # for all below, and for what is in the chunks
        self._lock = threading.Lock()             # held while numbers below change, and while items become a chunk
        self._sending = threading.Lock()          # held by the thread that takes items and makes calls of them
        self._outcomes = collections.deque()      # (chunk, call) that is over
        self.digesting = threading.Lock()         # held by the thread that sees to them
        self._under_way = self._ahead = self._bytes = 0         # chunks; items that are not taken; bytes of their arguments
        self._done = self._failed = 0             # items
        self._seconds = None                      # that an item takes
        self._item_bytes = None                   # of its arguments, about the most of late
        self._closed = False

    def begin(self, engine):
        self._engine = engine
        engine.maps.add(self)
        if self._eager and not self._items.still:
            self._items.read(lambda: True)
        elif not self._items.still:
            with undisturbed():
                threading.Thread(target=self._items.read, args=(self._after_item,), name="clupy-map", daemon=True).start()
        self._send()

    # -- sending

    def _slots(self):
        return max(self._engine.capacity, 4)

    def _count(self):
        """How many items the next chunk may have."""
        if self._size:
            return self._size
        if self._item_bytes is None:
            return 1
        count = CHUNK_ITEMS if self._seconds is None else max(1, min(int(CHUNK_TIME / self._seconds), CHUNK_ITEMS))
        if self._items.still:                     # so that all slots have something to do to the end
            count = min(count, -(-self._items.left // (8 * self._slots())))
        return max(1, min(count, int(CHUNK_BYTES / self._item_bytes), self._room - self._ahead))

    def _may_send(self):
        return len(self._items) and not self._closed and (self._eager or (
            (self._size or self._under_way < 3 * self._slots()) and len(self._chunks) < MAP_AHEAD and self._bytes < MAP_BYTES
            and self._ahead < self._room))

    def _send(self):
        """Make calls, as many as may be under way.  If another thread does, it looks once more when it has."""
        while self._may_send() and self._sending.acquire(blocking=False):
            try:
                with self._lock:
                    items = self._items.take(self._count())
                    chunk = _Chunk(items, self)
                    if items:
                        self._chunks.append(chunk)
                    self._ahead += len(items)
                if items:
                    self._start(chunk)
            finally:
                self._sending.release()

    def _start(self, chunk, tries=0):
        """tries: that its items have lost.  Of several none is tried again but alone: it may not have begun."""
        with self._lock:
            self._under_way += 1
        alone = self._size or len(chunk.items) == 1
        chunk.call = call = self._call(self._engine, chunk, self._retries if alone else 0, tries)
        with self._lock:
            self._bytes += chunk.size
            each = chunk.size / len(chunk.items)
            self._item_bytes = max((self._item_bytes or 1) / 2, each)          # a large one counts for a while
        self.changed.ring()
        if self._closed:                          # just now
            call.cancel()

    def _after_item(self):
        """Called by the reader after each item; whether it is to go on."""
        if self._under_way < 3 * self._slots():
            self._send()
        if self._is_full():
            self.changed.until(lambda: not self._is_full())
        elif self._items.ended:
            self.changed.ring()
        return not self._closed

    def _is_full(self):
        """Whether so much is read that the reader waits until some of it is taken."""
        return not self._closed and len(self._items) and len(self._items) + self._ahead >= min(self._room, MAP_READ)

    # -- results

    def take_outcome(self, chunk, call):
        """In whatever thread, which must not wait."""
        self._outcomes.append((chunk, call))
        with undisturbed():
            if self.digesting.acquire(blocking=False):
                threads.run(self._digest)

    def _digest(self):
        """See to all that is over; if more comes when this thread has just done that, another call of this will, or this one."""
        while True:
            try:
                while self._outcomes:
                    chunk, call = self._outcomes.popleft()
                    threading.current_thread().clupy_call = call._outer        # what it calls belongs to who made this call
                    self._over(chunk, call)
                    if not self._outcomes:
                        self._send()
            finally:
                self.digesting.release()
                self.changed.ring()
            if not self._outcomes or not self.digesting.acquire(blocking=False):
                return

    def _over(self, chunk, call):
        """A chunk's call has its outcome: what is left of it is sent anew."""
        rest, tries, count, done = [], 0, 1, 0
        try:
            first, results, chunk.failure, done, seconds = call.result()
            chunk.parts.append((first, results))
            self._seconds = seconds / done if self._seconds is None else (self._seconds + seconds / done) / 2
            if chunk.failure is None:
                rest, count = chunk.items[done:], self._count()
        except (CancelledError, Closed) as error:
            chunk.failure = error
        except BaseException as error:
            if self._size or len(chunk.items) == 1:
                chunk.failure = self._of_item(chunk, error)
            else:
                rest, tries = chunk.items[chunk.got:], 1
        if not self._closed:
            chunk.rest = [_Chunk(rest[start:start + count], self) for start in range(0, len(rest), count)]
            for one in chunk.rest:
                self._start(one, tries)
        with self._lock:
            self._under_way -= 1
            self._done += done
            self._failed += chunk.failure is not None and not self._closed
            chunk.over = True
            is_next = self._chunks[0] is chunk     # else nobody waits for it yet
        if is_next:
            self.changed.ring()

    def _of_item(self, chunk, error):
        """The error of a chunk's call; if its only item cannot be pickled, the error that says so of that."""
        if isinstance(error, pickle.PicklingError) and len(chunk.items) == 1:
            try:
                self._items.packed(chunk.items[0])
            except pickle.PicklingError as problem:
                return problem
        return error

    def results(self, deadline=math.inf):
        """An iterator of the results.  deadline: time.monotonic() at which TimeoutError is raised."""
        try:
            while (values := self._next_values(deadline)) is not None:
                with self._lock:
                    self._ahead -= len(values)
                self.changed.ring()
                self._send()
                values.reverse()
                while values:
                    value = values.pop()
                    if type(value) is _Unreadable:
                        raise value.error
                    yield value
                    del value
        finally:
            self.close()

    def _next_values(self, deadline):
        """The next results, as they are there; None: there are no more.  Raises what an item, or reading one, raised."""
        while True:
            if not self.changed.until(self._is_next_there, deadline - time.monotonic()):
                raise TimeoutError(f"no result of map within its timeout; {self._ahead} items are under way")
            if not self._chunks:
                if self._items.error is not None:
                    raise self._items.error
                return None
            chunk = self._chunks[0]
            if chunk.parts:
                first, values = chunk.parts.popleft()
                values = (unpack(values) if type(values) is not list else values)[chunk.taken - first:]
                chunk.taken += len(values)
                if values:
                    return values
            elif chunk.failure is not None:
                raise chunk.failure if isinstance(chunk.failure, BaseException) else unpack(chunk.failure)
            else:
                with self._lock:
                    self._bytes -= chunk.size
                    self._chunks.popleft()
                    self._chunks.extendleft(reversed(chunk.rest))

    def _is_next_there(self):
        """Whether there is something to take, or nothing will come any more."""
        with self._lock:
            return bool(self._chunks[0].parts or self._chunks[0].over) if self._chunks else self._items.ended

    def close(self):
        with undisturbed():
            self._closed = True
            self.changed.ring()
            for call in self._calls():
                call.cancel()

    def _calls(self):
        """Those of which not all is taken."""
        calls, todo = [], list(self._chunks)
        while todo:
            chunk = todo.pop()
            todo += chunk.rest
            if chunk.call:
                calls.append(chunk.call)
        return calls

    def look(self):
        """(items done, failed, slots that run some)"""
        return self._done, self._failed, len({call._slot for call in self._calls() if call._state == RUNNING})


@_either_spelling
def map(func: Callable[..., T], *iterables: Iterable[Any], max: int | None = None, timeout: Time = None, retries: int = 2,
        chunk_size: int | None = None, progress: bool | Literal["always"] = False) -> Iterator[T]:
    """The results of func over the iterables, in order, as an iterator; they may be of any length, or endless.

    Several items go into one call, as many as are a few milliseconds of work; a slow one among them holds nothing up.
    chunk_size: that many, and `timeout` bounds them together; without it, with a timeout or without retries it is one.
    Calls are made ahead of what is taken.  Lists and the like are taken as they are then; other iterables are read by a thread,
    so that one which is slow, or waits for results, holds nothing up.  An exception of the function, or of an iterable, is
    raised where its result would be; the calls made ahead are cancelled then.  progress: of the items, as for wait_all()."""
    if not callable(func):
        raise TypeError(f"map() calls a function, not {type(func).__name__} {func!r}")
    chunk_size = _whole("chunk_size", chunk_size, 1) or (1 if timeout is not None or not retries else None)
    whole = parallel(_InChunks(func, len(iterables) != 1), max=max, timeout=timeout, retries=retries)
    _, timeout, retries, _ = whole._options
    call = functools.partial(_call_chunk, whole.func, whole._function, not chunk_size, timeout, whole._limit)
    job = _Map(call, func, iterables, retries, chunk_size)
    known = [length for each in iterables if (length := operator.length_hint(each, -1)) >= 0]
    return _lazily(job, _shown(progress, min(known, default=None), job.look, unit="items"))


def _lazily(job, shown):
    with contextlib.closing(job):
        job.begin(_current_engine())
        with shown:
            yield from job.results()


def _call_chunk(func, function, gives_back, timeout, limit, engine, chunk, retries, tries):
    """The Future of a chunk's call, which brings it parts of its results."""
    return start(engine, func, function, (chunk.items, gives_back), {}, timeout, retries, limit, None, chunk, tries)


class Executor(concurrent.futures.Executor):
    """A concurrent.futures.Executor whose calls run in the cluster.

    max_workers: how many run at once; None: as many as there are slots; an embedded cluster gets that many workers.
    master: as for connect(); None: the cluster of this process.  initializer(*initargs): run once in every worker
    before its first call of this executor; where it raises, the calls there fail with BrokenExecutor.  The program's end
    waits for its calls, as for those of the standard executors.  As a program that ends can start nothing, from Python 3.12 on,
    the first call waits until the cluster can run one, but for a master that is away UNSERVED_TIME at most."""

    _shut_by_end = False                          # of all: the program has begun to end

    def __init__(self, max_workers: int | None = None, master: str | None = None,
                 initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError(f"max_workers must be greater than 0, or None, not {max_workers}")
        max_workers = _whole("max_workers", max_workers, 1)
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a function, not {type(initializer).__name__}")
        self._limit = ("executor", os.urandom(8).hex()), max_workers
        self._own_engine = None
        if master:
            settings = read_settings("client", master=master)
            with undisturbed():
                self._own_engine = engine = _make_engine(settings)
                # When nobody has it any more; which is found wherever the garbage collector likes, so it takes no lock.
                weakref.finalize(self, engine.soon, threads.run, self._end, engine, self._limit, True).atexit = False
        self._engine = self._own_engine or _current_engine()
        _executors.add(self)
        self._setup = None if initializer is None else capture(functools.partial(initializer, *initargs))
        self._shut = False                        # shutdown() was called
        self._prepared = False                    # its engine is, for the program's end
        if max_workers:
            self._engine.grow(max_workers)

    @property
    def _max_workers(self):
        """As the standard executors have it: dask and others ask for it."""
        return self._limit[1] or self._engine.join().slots

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return start(self._open_engine(), fn, self._capture(fn), args, kwargs, None, 2, self._limit)

    def map(self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: Time = None, chunksize: int | None = None,
            buffersize: int | None = None) -> Iterator[T]:
        """As the standard executors' map, buffersize as from Python 3.14 on.  chunksize: items of one call; None: as measured,
        which is best."""
        size, room = _whole("chunksize", chunksize, 1), _whole("buffersize", buffersize, 1)
        engine, func = self._open_engine(), _InChunks(fn, len(iterables) != 1)
        function, deadline = self._capture(func), _deadline(timeout)
        call = functools.partial(_call_chunk, func, function, not size, None, self._limit)
        job = _Map(call, fn, iterables, 2, size, eager=room is None, room=room)           # eager: as those do, all at once
        job.executor = self                       # which leaves its cluster when nobody has it
        try:
            job.begin(engine)
        except BaseException:
            job.close()
            raise
        return job.results(deadline)

    def _capture(self, fn):
        function = capture(fn)
        return function_of(function.payload, function.name, self._setup.payload) if self._setup else function

    def _open_engine(self):
        """The engine for another call.  Raises RuntimeError if there can be none."""
        if threading.current_thread().name != JOB_THREAD:      # else it is a callback's, which is told
            leave_if_ending(self._shut_by_end)
        if self._shut or self._shut_by_end:
            raise RuntimeError(f"cannot submit a call after {'shutdown()' if self._shut else 'the program has begun to end'}")
        if self._engine is None:                  # this process was forked off
            if self._own_engine:
                raise RuntimeError("this Executor has a cluster of the process that made it; make one here")
            self._engine = _current_engine()
        elif self._engine.closed:
            leave_if_ending()
            raise RuntimeError("cannot submit a call after its cluster was closed; make another Executor")
        if not self._prepared:                    # from Python 3.12 on a program that ends can start no thread and no process
            self._prepared = True
            self._engine.prepare()
        return self._engine

    def shutdown(self, wait=True, *, cancel_futures=False):
        self._shut = True
        if self._engine is None:                  # the affair of the process that made it
            return
        if cancel_futures:
            self._engine.cancel_limit(self._limit)
        end = self._engine, self._limit, self._own_engine is not None
        if wait:
            self._end(*end)
        elif self._own_engine:
            threads.run(self._end, *end)

    def kill_workers(self):
        """Shut down at once: calls that wait and calls that run are cancelled."""
        self.shutdown(wait=False, cancel_futures=True)
        for call in self._engine.calls() if self._engine else ():
            if call._limit == self._limit:
                call.cancel()

    terminate_workers = kill_workers

    @staticmethod
    def _end(engine, limit, is_own):
        try:
            engine.settle(limit)
        except KeyboardInterrupt:                 # as in any wait for calls, see Future._wait
            engine.cancel_all()
            raise
        finally:
            if is_own:
                engine.close()

    @classmethod
    def _end_all(cls):
        """At the program's end, before its threads are."""
        cls._shut_by_end = True
        with contextlib.suppress(KeyboardInterrupt):       # whoever presses Ctrl-C does not want to wait: _at_exit cancels
            for executor in list(_executors):
                if executor._engine is not None:
                    executor._engine.settle(executor._limit, ending=True)


# As concurrent.futures does it: later, at atexit, no callback can have a thread any more.
threading._register_atexit(Executor._end_all)


# ---- joblib
# With it a joblib.Parallel runs in the cluster, scikit-learn's too.  A batch of joblib's is a call; a large array
# is shared, so that each machine gets it once (an idea of dask's backend), until the joblib.Parallel ends.

class _JoblibBackend:
    """What a backend of joblib's is asked for, which calls its methods; `_backend_class` adds its base classes."""

    default_n_jobs = -1
    supports_retrieve_callback = supports_inner_max_num_threads = True

    def __init__(self, **options):
        super().__init__(**options)
        self._make_executor = self._executor = None
        self._shared = {}                     # {id of an array: (weak reference to it, its Ref)}

    def __reduce__(self):
        return functools.partial(_joblib_backend, nesting_level=self.nesting_level,
                                 inner_max_num_threads=self.inner_max_num_threads), ()

    def effective_n_jobs(self, n_jobs):
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(slots() + 1 + n_jobs, 1)

    def configure(self, n_jobs=1, parallel=None, **options):
        options = {**self.backend_kwargs, **options}
        self.parallel, n_jobs = parallel, self.effective_n_jobs(n_jobs)
        self._make_executor = functools.partial(Executor, n_jobs, initializer=options.get("initializer"),
                                                initargs=options.get("initargs", ()))
        return n_jobs

    def submit(self, func, callback=None):
        func.items = [(item, [self._share(value) for value in args],
                       {name: self._share(value) for name, value in kwargs.items()}) for item, args, kwargs in func.items]
        self._executor = self._executor or self._make_executor()
        future = self._executor.submit(_run_batch, func, self.inner_max_num_threads)
        future.add_done_callback(callback)
        return future

    def _share(self, value):
        """The value, or the Ref of a large array."""
        size = getattr(value, "nbytes", 0)
        if not isinstance(size, int) or size < SHARED_ARRAY:
            return value
        here, _ = self._shared.get(id(value), (None, None))
        if not here or here() is not value:
            try:
                here = weakref.ref(value, functools.partial(self._forget, id(value)))
                self._shared[id(value)] = here, share(value, ttl="1h")
            except TypeError:                 # it takes no weak reference: then it is sent with each batch
                return value
        return self._shared[id(value)][1]

    def _forget(self, key, _):
        self._shared.pop(key, None)

    def retrieve_result_callback(self, out):
        return out.result()

    def abort_everything(self, ensure_ready=True):
        executor, self._executor = self._executor, None        # the next batch makes another
        if executor:
            executor.kill_workers()

    def stop_call(self):
        for _, ref in self._shared.values():
            ref.close()
        self._shared.clear()

    def terminate(self):
        executor, self._executor = self._executor, None
        if executor:
            executor.shutdown(wait=False)
        self.reset_batch_stats()

    def get_nested_backend(self):
        return _joblib_backend(nesting_level=(self.nesting_level or 0) + 1,
                               inner_max_num_threads=self.inner_max_num_threads), -1


@functools.cache
def _backend_class():
    """_JoblibBackend as joblib wants it: with base classes that are there only where joblib is."""
    return type("Backend", (_JoblibBackend, joblib.parallel.AutoBatchingMixin, joblib.parallel.ParallelBackendBase), {})


def register_joblib() -> None:
    """Let joblib, and with it scikit-learn, run in the cluster: `with joblib.parallel_config(backend="clupy"): ...`"""
    joblib.register_parallel_backend("clupy", _backend_class())


def _joblib_backend(**options):
    """A backend of joblib's.  Also what one is unpickled as in a call, for joblib.Parallel there: so it is known there, too."""
    register_joblib()
    return _backend_class()(**options)


def _run_batch(batch, threads):
    """In a worker: the results of a batch of joblib's, for which libraries use so many threads; None: as many as for any call."""
    if threads is None:
        return batch()
    with threadpoolctl.threadpool_limits(threads):
        return batch()


class ExecutorEngine(BaseEngine):
    """Runs the calls on another concurrent.futures.Executor: threads to debug, or an engine that a site runs already.

    Functions, arguments and results are pickled all the same, so that what works here works on a cluster."""

    def __init__(self, executor):
        super().__init__()
        self.executor = executor
        self._running = {}                        # {call: the executor's future}

    def submit(self, call):
        packed = pickle.dumps((call._function.payload, call._function.setup, call._arguments), 5)
        theirs = self.executor.submit(_run_pickled, packed)
        self._running[call] = theirs
        theirs.add_done_callback(functools.partial(self._done, call))

    def _done(self, call, theirs):
        self._running.pop(call, None)
        if theirs.cancelled():
            conclude([(call, False, CancelledError())])
        elif theirs.exception():
            conclude([(call, False, theirs.exception())])
        else:
            conclude([(call, *pickle.loads(theirs.result()))])

    def cancel(self, call):
        if theirs := self._running.get(call):
            theirs.cancel()

    def calls(self):
        return [*self._running, *super().calls()]

    def abandon(self):
        conclude([(call, False, Closed(FORKED)) for call in (*self._running, *self.held)])


_set_up = {}                    # {content id of an initializer: None, or the exception that it raised here}
_set_up_lock = threading.Lock()   # held while one runs: another thread's call must not begin before it is done


def set_up(setup, unpack=unpack):
    """Run an Executor's initializer, a payload, once in this process. Raises BrokenExecutor if it raised."""
    key = content_id(setup)
    with _set_up_lock:
        if key not in _set_up:
            try:
                unpack(setup)()
                _set_up[key] = None
            except BaseException as error:        # whatever it raised, it is why no call can run here
                _set_up[key] = error
    if _set_up[key] is not None:
        raise BrokenExecutor("the initializer raised") from _set_up[key]


def _run_pickled(packed):
    """What run_packed gives, pickled as its arguments are: buffers of payloads need protocol 5, and multiprocessing has 4."""
    return pickle.dumps(run_packed(*pickle.loads(packed)), 5)


def run_packed(function, setup, arguments):
    """(succeeded, value or payload) of a call whose function and arguments are payloads; raises nothing."""
    try:
        if setup is not None:
            set_up(setup)
        args, kwargs = unpack_arguments(arguments)
        value = unpack(function)(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        return True, value if type(value) in PLAIN else pack_result(value)
    except BaseException as error:                # the outcome of the call, whatever it is
        return False, pack_exception(error)


def unpack_arguments(arguments, unpack=unpack):
    """(args, kwargs) of a call's arguments: a tuple of plain values, or a payload."""
    if type(arguments) is tuple and not (arguments and type(arguments[-1]) is list):
        return arguments, {}
    return unpack(arguments)


# ==== Services ================================================================
# This process's connections to Redis and ZooKeeper: made on first use, by any thread, forgotten in a forked child, closed
# at the end.  Two rules for a server that is away:
# - One that never answered this process nor its master is a mistake in the configuration, and told within FIRST_CONTACT
#   seconds; one that did answer is waited for as long as the setting `patience` says.  Then: Unavailable.
# - What may be done twice is repeated (_retried), what may not is sent once and reported (_once).  redis-py's own retries
#   make no such difference: an `incr` that lost three answers counted four (redis/redis-py#261).

FIRST_CONTACT = 5.0               # seconds; less would refuse a server that is starting, more hides a typing error

_clients_lock = threading.RLock()      # for the next two, and for _own
_keeper_lock = threading.RLock()       # held while a ZooKeeper client connects, which may take as long as patience
_redis_clients = {}                    # {address: redis.Redis}
_zookeeper_clients = {}                # {addresses: KazooClient}
_reached = set()                       # addresses that answered this process or its master at least once
_note_session = None                   # a worker's: told (id, password) of its ZooKeeper session, None when that has ended
_told = None                           # Settings that a worker's server, or a master's own file, says: nothing is looked for then
_known = None                          # (engine, what its master says, _configured, the Settings made of them)


def use_services(services):
    """In a worker and a master: the cluster's services, once for all."""
    global _told
    _told = Settings({**{key: SETTINGS[key][2] for key in SERVICE_KEYS}, **services}, services["given"])
    _note_reached(services)


def _note_reached(services):
    """Some of these have answered the master: they are right, and waited for."""
    _reached.update(services[key] for key in services.get("reached", ()))


def _settings():
    """The Settings of Redis and ZooKeeper that hold for this process now: found anew after whatever they depend on changed."""
    global _known
    if _told is not None:
        return _told
    known = _known                         # another thread may change it
    if not known or known[:3] != (_engine, getattr(_engine, "said", None), _configured):
        known = _known = _find_services()
    return known[3]


def _find_services():
    engine, configured, theirs = _engine, _configured, {}
    own = engine and engine.settings or read_settings("client")
    if engine is None and (own.master or _listens("127.0.0.1", own.port)):
        engine = _current_engine()
    if engine is not None:
        theirs = engine.services(own.patience)
        _note_reached(theirs)
    return engine, engine and engine.said, configured, merged_services(own, theirs)


def _listens(host, port):
    """Whether somebody listens there: a call would then look whether it is our master."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), FIRST_CONTACT):
        return True
    return False


def close_services():
    """End this process's connections, which frees its locks at once; the next use connects anew."""
    with _clients_lock:
        stores, keepers = list(_redis_clients.values()), list(_zookeeper_clients.values())
        _redis_clients.clear()
        _zookeeper_clients.clear()
    for client in stores:
        client.connection_pool.disconnect()     # close() would leave a pool that it did not make to the garbage collector
    for client in keepers:
        _close_zookeeper(client)
    if keepers and _note_session:
        _note_session(None)


def _close_zookeeper(client):
    with contextlib.suppress(kazoo_errors.WriterNotClosedException):       # its thread, a daemon, is in connect()
        client.stop()
        client.close()


def _forget_clients():
    """In a forked child: the connections are the parent's, and kazoo would hang (python-zk/kazoo#519)."""
    global _clients_lock, _keeper_lock
    _clients_lock, _keeper_lock = threading.RLock(), threading.RLock()
    _redis_clients.clear()
    _zookeeper_clients.clear()


_TITLES = {"redis": "Redis", "zookeeper": "ZooKeeper"}
_START = {"redis": "apt-get install redis-server, or docker run -p 6379:6379 redis:7",
          "zookeeper": "apt-get install zookeeperd, or docker run -p 2181:2181 zookeeper:3.9"}


def _unavailable(service, reason):
    """The Unavailable that says which setting and address are meant, what happened, and what to do."""
    address = getattr(_settings(), service)
    where = f"{_TITLES[service]} at {masked(address)}" if address else f"no {_TITLES[service]} is configured"
    return Unavailable(f"{where}: {reason}. Its address is the setting `{service}` or CLUPY_{service.upper()}; "
                       f"to start a server: {_START[service]}")


def _redis():
    """This process's Redis client.  Commands go through _retried or _once: it repeats nothing itself."""
    url = _settings().redis
    if not url:
        raise _unavailable("redis", "data needs one")
    with _clients_lock:
        if url not in _redis_clients:
            _redis_clients[url] = _redis_client(url)
        return _redis_clients[url]


def _redis_client(url):
    try:
        if not _ADDRESS.fullmatch(url):
            raise ValueError("no address")
        pool = redis.ConnectionPool.from_url(
            url, protocol=2, socket_timeout=FIRST_CONTACT, socket_connect_timeout=FIRST_CONTACT,
            socket_keepalive=True, command_packer=_redis_packer())
        pool.connection_kwargs.update(     # whatever the address says: pickles are bytes, and _once means once
            decode_responses=False, retry=redis_retry.Retry(redis_backoff.NoBackoff(), 0))
        pool.make_connection()             # connects nothing, but refuses options it does not know
    except (ValueError, TypeError, redis.RedisError) as error:
        reason = f"not an address ({type(error).__name__}), expected redis://:password@host:6379/0"
        raise _unavailable("redis", reason) from None
    return redis.Redis(connection_pool=pool)


def _redis_packer():
    """redis-py's packer that sends memoryviews as they are, 3 to 5 times faster than hiredis's, which copies them twice;
    undocumented, hence None, redis-py's choice, where it is missing."""
    try:
        encode = redis_connection.Encoder("utf-8", "strict", False).encode
        return redis_connection.PythonRespSerializer(6000, encode)
    except AttributeError:
        return None


def _retried(command, name=None):
    """The result of command(client), repeated while Redis is away: so it must not matter how often it is done."""
    client, url = _redis(), _settings().redis
    deadline = None if url in _reached else time.monotonic() + FIRST_CONTACT
    for attempt in itertools.count():
        try:
            result = command(client)
            _reached.add(url)
            return result
        except redis.RedisError as error:
            why = _why_lost(error, name)
            deadline = deadline or time.monotonic() + _settings().patience
            if time.monotonic() >= deadline:
                raise _unavailable("redis", why) from error
        time.sleep(min(0.01 * 2 ** attempt, 0.5))


def _once(name, *command):
    """The answer to one command, sent at most once: a lost answer is an Unavailable that says so."""
    pool = _redis().connection_pool
    connection = _retried(lambda _: pool.get_connection())       # a live one: a restart in between costs nobody an error
    try:
        return _answer(pool, connection, command)
    except redis.RedisError as error:
        why = _why_lost(error, name)
        raise _unavailable("redis", f"the answer to a change of {name!r} was lost ({why}); it may have been made or not, "
                                    "look before you repeat it") from error


def _asked(name, *command):
    """The answer to one command, which is sent until there is one."""
    def send(client):
        pool = client.connection_pool
        return _answer(pool, pool.get_connection(), command)

    return _retried(send, name)


def _answer(pool, connection, command):
    """As Redis sends it, of a connection that goes back to its pool; at half the price of redis-py's own way."""
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        pool.release(connection)


class _Refused(Unavailable):
    """Redis can be read, but takes no change now."""


def _why_lost(error, name):
    """Why Redis did not answer.  Raises what waiting does not cure: a wrong password, a user that may not, a wrong command."""
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError)):
        raise _unavailable("redis", f"password or rights are missing ({error}), expected "
                                    "redis://:password@host:6379/0 or redis://user:password@...") from error
    if "WRONGTYPE" in str(error):
        raise TypeError(f"{name!r} is the name of {_kind(name)}, which does not know this operation") from error
    what = str(error).rpartition(" caused error: ")[2].partition(". script: ")[0]     # without the command: it holds the data
    if isinstance(error, redis.ResponseError) and (
            isinstance(error, (redis.exceptions.OutOfMemoryError, redis.exceptions.ReadOnlyError))
            or re.search(r"\b(OOM|READONLY|MISCONF|NOREPLICAS)\b", what)):       # a script's error, of older servers, among them
        raise _Refused(str(_unavailable("redis", f"it refuses to write, so nothing has changed ({what})"))) from None
    if "would overflow" in what:
        raise OverflowError(f"counter {name!r} has 64 bits, it stays as it was")
    if not isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        raise error
    return str(error).rstrip(".")


def _key(name, kind="data"):
    """The key in Redis of a name, which may have any characters."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a name must not be empty")
    return _prefix(kind) + name.encode("utf-8", "surrogatepass")


def _prefix(kind):
    return f"{_settings().prefix}:{kind}:".encode("utf-8", "surrogatepass")


def _kind(name):
    """What stands in Redis under the name, for an error's text."""
    kinds = {b"hash": "a value or file (clupy.get, clupy.open)", b"list": "a queue (clupy.queue)",
             b"string": "a counter (clupy.counter)"}
    return kinds.get(_retried(lambda client: client.type(_key(name))), "something else")


def _zookeeper(deadline=math.inf):
    """This process's ZooKeeper client, connected, by then if it can; a new one if the last was given up."""
    hosts = _settings().zookeeper
    if not hosts:
        raise _unavailable("zookeeper", "locks and the like need one")
    patience = FIRST_CONTACT
    if hosts in _reached:
        patience = max(FIRST_CONTACT, min(_settings().patience, deadline - time.monotonic()))
    if not _keeper_lock.acquire(timeout=bounded(patience)):
        raise _unavailable("zookeeper", f"no answer within {patience:g} s")
    try:
        client = _zookeeper_clients.get(hosts)
        if client is None or _is_over(client):
            if client is not None:
                _close_zookeeper(client)
            client = _zookeeper_client(hosts, patience)
            with _clients_lock:
                _zookeeper_clients[hosts] = client
            _reached.add(hosts)
        return client
    finally:
        _keeper_lock.release()


def _zookeeper_client(hosts, patience):
    settings, quiet = _settings(), logging.getLogger("clupy.zookeeper")
    quiet.setLevel(logging.ERROR)          # kazoo warns of each lost connection, which is what patience is for
    # Without a deadline every request to a server that is away blocks for ever, whatever its own time-out.
    again = kazoo_retry.KazooRetry(max_tries=-1, delay=0.05, backoff=1.5, max_delay=0.5, deadline=settings.patience)
    try:
        # Each address three times: kazoo lets one connection attempt take a session's time, divided by the number of them, and
        # a server that has just started may leave one without an answer: the session would be over.
        client = kazoo.KazooClient(",".join([hosts] * 3), timeout=settings.session, connection_retry=again, logger=quiet)
    except (ValueError, kazoo_errors.KazooException):
        client = None
    if client is None or client.chroot or not client.hosts:
        raise _unavailable("zookeeper", "not a list of addresses; expected host:2181,host:2181")
    if _note_session:
        client.add_listener(lambda state: _note_session(client.client_id) if client.client_id else None)
    try:
        if not client.start_async().wait(bounded(patience)):
            raise _unavailable("zookeeper", f"no answer within {patience:g} s")
    except BaseException:                  # closed in a thread, as it waits for a connect() under way
        threading.Thread(target=_close_zookeeper, args=(client,), daemon=True).start()
        raise
    return client


def _is_over(client):
    """Whether a client waited for a server longer than its patience, or was closed: its session is lost."""
    return client.client_state in (kazoo_states.KeeperState.CLOSED, kazoo_states.KeeperState.AUTH_FAILED)


# ==== Data ====================================================================
# Values, files, counters and queues that any process of the cluster reaches by name, in Redis.
#
#     put("x", array) -> pickle 5 -> head | buffer | buffer     a hash "clupy:data:x":
#                                    cut in pieces (PIECE)      h: ttl, kind, sizes, token; 0, 1, ...: pieces
#
# A small value is written, or read, by one command: a script, so at one stroke with its time to live.
#
# Pieces: Redis takes no string over 512 MB, and no copy of the whole is made on either side.  Every read asks for the
# header along with pieces, and Redis answers one command at a time: so a token that changes tells that a value was
# replaced between two of them.  Values and files are hashes, queues lists, counters strings: so Redis itself refuses a
# queue's command on a value.  Refs are values of another prefix, kept once more on each machine that uses them.

PIECE = 256 << 10                 # bytes; half or four times that is slower, and Redis frees over 64 of them in a thread
WINDOW = 8                        # pieces per command; more do not fit a processor's cache, all take twice as long
SMALL = 64 << 10                  # bytes of a value or piece that goes through a script, which copies it
BATCH = 1000                      # values that get_many asks for at once; more is memory, less is round trips
LONGEST_ITEM = 512 << 20          # bytes of a string of Redis: one item of a queue, one message

_shared_here = weakref.WeakValueDictionary()       # {name: the Ref that share() gave for one of these}
_own = None                            # this process's Copies where it is no worker, made when it first needs one
_client = None                         # a worker's: the id of its client, whose copies it uses;
_fetch = None                          # callable(what, name): what its client says of a Ref that it serves;
_serve = served.__setitem__           # callable(name, buffers): its client serves what is shared in its calls


def _serve_ref(name):
    """What a worker that asks for a Ref is told: its buffers, or None."""
    parts = served.get(name)
    return parts and [pickle.PickleBuffer(part) for part in parts]


FETCHES["ref"] = _serve_ref


def use_client(client, serve=served.__setitem__, fetch=None):
    """In a worker: the id of its client, who serves what is shared here, and who is asked for what was shared elsewhere."""
    global _client, _serve, _fetch
    _client, _serve, _fetch = client, serve, fetch


def put(name: str, value: Any, ttl: Time = None) -> None:
    """Keep `value` under `name` for the whole cluster, at one stroke instead of whatever had that name.

    value: anything pickle or cloudpickle takes, of any size.  ttl: seconds since the last access after which it is gone;
    None: the setting `ttl`, 0: never.  Raises Unavailable."""
    _store(_key(name), name, "value", _buffers_of(value), _ttl(ttl))


def get(name: str, default: Any = _ABSENT) -> Any:
    """The value put under `name`; of a file: its bytes.  Without one: `default`, or KeyError if there is none.

    Never half of an old and half of a new value.  Unpickling runs code: whoever writes to this Redis is trusted."""
    found = _load(_key(name), name, _memory)
    if found is not None:
        return _value_in(found)
    if default is _ABSENT:
        raise KeyError(name)
    return default


def _value_in(stored):
    return b"".join(stored.buffers) if stored.kind == "file" else unpack((stored.buffers[0], stored.buffers[1:]))


def add(name: str, value: Any, ttl: Time = None) -> bool:
    """Whether the value was put, as nothing had that name: of several that try at once, one succeeds."""
    return _store(_key(name), name, "value", _buffers_of(value), _ttl(ttl), b"")


def update(name: str, change: Callable[[Any], T], default: Any = _ABSENT) -> T:
    """The value change(old) that is put in place of the old one at one stroke: done again if another was first.

    default: what is changed where there is no value; without it that is a KeyError.  The time to live stays as it was."""
    while True:
        old = _load(_key(name), name, _memory)
        if old is None and default is _ABSENT:
            raise KeyError(name)
        if old and old.kind == "file":
            raise TypeError(f"{name!r} is the name of a file: use clupy.open")
        value = change(_value_in(old) if old else default)
        if _store(_key(name), name, "value", _buffers_of(value), *((old.ttl, old.header) if old else (_ttl(None), b""))):
            return value


def put_many(values: Mapping[str, Any], ttl: Time = None) -> None:
    """Keep each value of a mapping under its name, as put() does; small ones in one round trip.  Each at one stroke, not all
    of them: of those that Redis refuses others may be there."""
    lives = _ttl(ttl)
    items = ((name, _key(name), _buffers_of(value)) for name, value in dict(values).items())
    while batch := list(itertools.islice(items, BATCH)):
        small = [item for item in batch if _is_small(item[2])]
        done = _in_one_go([_placing(key, "value", buffers, lives) for _, key, buffers in small])
        placed = {name for (name, *_), answer in zip(small, done) if answer == 1}
        for name, key, buffers in batch:
            if name not in placed:                     # too large, or refused: then it raises
                _store(key, name, "value", buffers, lives)


def get_many(names: Iterable[str]) -> dict[str, Any]:
    """{name: value} of those that are there, as get() gives them; small ones in one round trip."""
    found, names = {}, iter(dict.fromkeys(names))
    while batch := list(itertools.islice(names, BATCH)):
        stored = [_key(name) for name in batch]
        answers = _in_one_go([("EVAL", _READ, 1, key, SMALL) for key in stored])
        for name, key, answer in zip(batch, stored, answers):
            if value := _load(key, name, _memory, answer if type(answer) is list else None):   # None: asked again, it raises
                found[name] = _value_in(value)
    return found


def _in_one_go(commands):
    """The answers to commands that are sent together; an error is its exception."""
    def send(client):
        with client.pipeline(transaction=False) as pipe:
            for command in commands:
                pipe.execute_command(*command)
            return pipe.execute(raise_on_error=False)

    return _retried(send) if commands else []


def delete(*names: str) -> int:
    """How many of the names were there; they are gone then, be they values, files, counters or queues."""
    stored = [_key(name) for name in names]
    return _retried(lambda client: client.unlink(*stored)) if stored else 0


def exists(name: str) -> bool:
    """Whether there is a value, file, counter or queue of that name.  An empty queue does not exist."""
    return bool(_retried(lambda client: client.exists(_key(name))))


def keys(pattern: str = "*") -> list[str]:
    """All names that match, in order; pattern as in fnmatch: * ? [abc]."""
    return _names(pattern, None)


def _names(pattern, redis_type):
    """The names that match, of one of Redis' types or of all (None), in order."""
    start = _prefix("data")
    match = re.sub(rb"([*?\[\]\\])", rb"\\\1", start) + b"*"
    found = _retried(lambda client: set(client.scan_iter(match, count=1000, _type=redis_type)))
    names = (key[len(start):].decode("utf-8", "surrogatepass") for key in found)
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


class _Shared(MutableMapping):
    """Values and files as a mapping.  `shared["x"] += 1` is not atomic: that is what counter() and update() are for; all
    others are, pop() and setdefault() too."""

    def __repr__(self):
        return "clupy.shared"

    def __getitem__(self, name):
        return get(name)

    def __setitem__(self, name, value):
        put(name, value)

    def __contains__(self, name):
        return exists(name)

    def __iter__(self):
        return iter(_names("*", "hash"))

    def __len__(self):
        return len(_names("*", "hash"))

    def __delitem__(self, name):
        if not delete(name):
            raise KeyError(name)

    def setdefault(self, name, default=None):
        while True:
            try:
                return get(name)
            except KeyError:
                if add(name, default):                 # else another was first, and may be gone again
                    return default

    def pop(self, name, default=_ABSENT):
        while found := _load(_key(name), name, _memory):
            value = _value_in(found)                   # before it goes: what cannot be unpickled here stays there
            if _once(name, "EVAL", _DROP, 1, _key(name), found.header):
                return value
        if default is _ABSENT:
            raise KeyError(name)
        return default


shared = _Shared()


def _ttl(ttl):
    """The milliseconds of a time to live that a user gave; 0: for ever."""
    seconds = _time_out(_settings().ttl if ttl is None else ttl) or 0
    if seconds < 0:
        raise ValueError(f"ttl must be seconds, or 0 for ever, not {ttl!r}")
    return math.ceil(1000 * seconds)


def _buffers_of(value):
    """[pickle, buffer, ...] of a value, pickled exactly as an argument is."""
    payload = pack(value, snapshot=False)
    return [payload[0], *(buffer.raw() for buffer in payload[1])] if type(payload) is tuple else [payload]


def _item(value):
    """The value as one string of Redis, as queues and topics need it: its payload, pickled once more, buffers inside."""
    item = pickle.dumps(pack(value, snapshot=False), 5)
    if len(item) > LONGEST_ITEM:
        raise ValueError(f"an item of {len(item):,} bytes, over 512 MB: put() the value and send its name")
    return item


def _from_item(item):
    """The value of an _item."""
    return unpack(pickle.loads(item))


def _pieces(buffers):
    """The buffers' bytes in order, as views of at most PIECE bytes."""
    for buffer in buffers:
        view = memoryview(buffer)
        yield from (view[start:start + PIECE] for start in range(0, len(view), PIECE))


# The scripts take a time to live of 0 as for ever, and begin it anew even where Redis would refuse to: what is read is read.
_EXPIRE = """
local function expire(key, ttl)
    if ttl == '0' then redis.pcall('persist', key) else redis.pcall('pexpire', key, ttl) end
end
"""

# Put what is beside in place, at one stroke.  KEYS: what is beside, the value.  ARGV: time to live, header, that of the value
# to be replaced ('': none, '*': whatever is there), how many pieces; those of a small value, which nobody has written beside.
# Done already: its answer was lost.  By compare and set: redis-py reports a lost connection of a WATCH as a WatchError.
_PLACE = _EXPIRE + """
local now = redis.pcall('hget', KEYS[2], 'h') or ''
if now == ARGV[2] then return 1 end
if ARGV[3] ~= '*' and now ~= ARGV[3] then
    redis.call('unlink', KEYS[1])
    return now.err and now or 0
end
if #ARGV > 4 then redis.call('hset', KEYS[1], 'h', ARGV[2], unpack(ARGV, 5))
elseif redis.call('hget', KEYS[1], 'h') ~= ARGV[2] or redis.call('hlen', KEYS[1]) ~= ARGV[4] + 1 then return false end
redis.call('unlink', KEYS[2])          -- which rename would free before it answers: 28 ms for 64 MiB
redis.call('rename', KEYS[1], KEYS[2])
expire(KEYS[2], ARGV[1])
return 1"""

_BEGIN = "redis.call('hset', KEYS[1], 'h', ARGV[1]) redis.call('pexpire', KEYS[1], 60000)"

_DROP = """
if redis.call('hget', KEYS[1], 'h') ~= ARGV[1] then return 0 end
return redis.call('unlink', KEYS[1])"""


def _header(kind, ttl, sizes):
    """What a value's or file's hash says of it, with a token: so no two headers are the same."""
    return b"%d " % ttl + pickle.dumps((kind, sizes, os.urandom(8)))


def _parsed(header):
    """(kind, ttl, sizes) of a header."""
    ttl, _, rest = header.partition(b" ")
    kind, sizes, _ = pickle.loads(rest)
    return kind, int(ttl), sizes


def _store(key, name, kind, buffers, ttl, old=b"*"):
    """Whether the value was written in place of the one with the header `old` (b"": of none; b"*": of whatever is there).

    All of it, or nothing if Redis refuses a part: a large one is written beside, and put in place once all of it is there."""
    if _is_small(buffers):
        return bool(_asked(name, *_placing(key, kind, buffers, ttl, old)))
    header = _header(kind, ttl, [len(buffer) for buffer in buffers])
    for _ in range(3):
        beside = _retried(lambda client: _write_beside(client, header, buffers), name)
        placed = _asked(name, "EVAL", _PLACE, 2, beside, key, ttl, header, old, sum(1 for _ in _pieces(buffers)))
        if placed is not None:
            return bool(placed)
        _asked(name, "UNLINK", beside)                 # what is left of it
    raise _unavailable("redis", f"it lost what was written of {name!r}, three times: does it evict (maxmemory-policy)?")


def _is_small(buffers):
    return sum(len(buffer) for buffer in buffers) <= SMALL


def _placing(key, kind, buffers, ttl, old=b"*"):
    """The command that puts a small value in place."""
    header = _header(kind, ttl, [len(buffer) for buffer in buffers])
    fields = itertools.chain(*enumerate([bytes(piece) for piece in _pieces(buffers)] or [b""]))
    return "EVAL", _PLACE, 2, _key(uuid.uuid4().hex, "new"), key, ttl, header, old, 0, *fields


def _write_beside(client, header, buffers):
    """The key, in nobody's way, under which a value was written.

    What a lost connection leaves there is gone in a minute: it has another key each time, since the rest of a connection that
    was lost may arrive when the value is written, and placed, by another one."""
    beside = _key(uuid.uuid4().hex, "new")
    try:
        with client.pipeline(transaction=False) as pipe:
            pipe.eval(_BEGIN, 1, beside, header)
            pieces = enumerate(_pieces(buffers))
            while some := dict(itertools.islice(pieces, WINDOW)):
                pipe.hset(beside, mapping=some)
                pipe.pexpire(beside, 60_000)
            pipe.execute()
    except redis.ResponseError:                        # no memory left, say: give back what this took
        client.unlink(beside)
        raise
    return beside


# The header, and the first piece if that is small.
_READ = _EXPIRE + """
local header = redis.call('hget', KEYS[1], 'h')
if not header then return {} end
expire(KEYS[1], string.match(header, '^%d+'))
if redis.call('hstrlen', KEYS[1], '0') > tonumber(ARGV[1]) then return {header} end
return {header, redis.call('hget', KEYS[1], '0')}"""


_Stored = collections.namedtuple("_Stored", "kind ttl buffers header")


def _load(key, name, allocate, answer=None):
    """The _Stored under the key, or None; its time to live begins anew.

    allocate(sizes) -> writable buffers of these sizes; called again if the value was replaced while it was read.
    answer: that to _READ, if it was asked for already."""
    window = WINDOW
    header, *pieces = (_asked(name, "EVAL", _READ, 1, key, SMALL) if answer is None else answer) or [None]
    while header is not None:
        kind, ttl, sizes = _parsed(header)
        buffers = allocate(sizes)
        targets, done, now = list(_pieces(buffers)), 0, header
        while now == header:
            for target, piece in zip(targets[done:], pieces):
                target[:] = piece
            done += len(pieces)
            if done >= len(targets):
                return _Stored(kind, ttl, buffers, header)
            now, *pieces = _window(key, name, done, window)
        window = max(len(targets), WINDOW)             # replaced: once more, all of it in one command
        header, *pieces = _window(key, name, 0, window)
    return None


def _window(key, name, start, count):
    """[header, piece, ...]: so many pieces from the start-th on."""
    return _asked(name, "HMGET", key, "h", *range(start, start + count))


def _memory(sizes):
    return [memory(size) for size in sizes]


def open(name: str, mode: str = "r", encoding: str = "utf-8", newline: str | None = None, errors: str | None = None,
         ttl: Time = None) -> IO[Any]:
    """A file kept in Redis, for whatever takes an open file: csv, pandas, numpy.  Modes r w x a, with b for bytes.

    Read whole when opened, so seekable and never mixed from two versions.  A written one appears, whole, when it is closed,
    and not at all when its with-block raises; what "a" wrote is added at one stroke then, also by many processes at once.
    "x" writes a new one: FileExistsError, when it is opened or closed, if somebody else was first.  encoding, newline, errors:
    as for Python's open; ttl: as for put, of what is written; None with "a": as it was.
    Raises FileNotFoundError, TypeError (name of something else), io.UnsupportedOperation (reading "w", writing "r"),
    Unavailable."""
    kind, binary = mode[:1], mode[1:] == "b"
    if kind not in ("r", "w", "x", "a") or mode[1:] not in ("", "t", "b"):
        raise ValueError(f"mode must be r, w, x or a, with b for bytes, not {mode!r}")
    if kind == "x" and exists(name):
        raise FileExistsError(errno.EEXIST, "the name is taken in Redis", name)
    file = _read_file(name) if kind == "r" else _WrittenFile(name, kind, ttl)
    return file if binary else _TextFile(file, encoding, errors, newline)


def _read_file(name):
    file = None

    def allocate(sizes):               # inside the file itself: no further copy
        nonlocal file
        file = _ReadFile(bytes(sum(sizes)))
        content, ends = file.getbuffer(), itertools.accumulate(sizes)
        return [content[end - size:end] for size, end in zip(sizes, ends)]

    found = _load(_key(name), name, allocate)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no file of that name in Redis", name)
    if found.kind != "file":
        raise TypeError(f"{name!r} is the name of a value: use clupy.get")
    return file


def _unsupported(self, *_):
    raise io.UnsupportedOperation("a file opened for writing cannot be read, one for reading cannot be written")


class _ReadFile(io.BytesIO):
    """What open(name, "rb") gives."""

    write = writelines = truncate = _unsupported

    def writable(self):
        return False


class _WrittenFile(io.BytesIO):
    """What open(name, "wb") gives.  `failed`: its with-block raised, nothing is to be kept."""

    read = read1 = readinto = readinto1 = readline = readlines = __next__ = _unsupported

    def __init__(self, name, kind, ttl):
        super().__init__()
        self.name, self.kind, self.failed = name, kind, False
        self._key, self._ttl = _key(name), None if kind == "a" and ttl is None else _ttl(ttl)

    def readable(self):
        return False

    def close(self):
        if self.closed:
            return
        try:
            if not self.failed:
                self._keep()
        finally:
            super().close()

    def _keep(self):
        if self.kind == "a":
            _append(self._key, self.name, self.getvalue(), self._ttl)
        elif not _store(self._key, self.name, "file", [self.getvalue()], self._ttl, b"" if self.kind == "x" else b"*"):
            raise FileExistsError(errno.EEXIST, "another was first to take the name in Redis", self.name)

    def __exit__(self, kind, *_):
        self.failed = kind is not None
        self.close()


class _TextFile(io.TextIOWrapper):
    """A text over a _WrittenFile, which it tells whether its with-block raised."""

    def __exit__(self, kind, *_):
        self.buffer.failed = kind is not None
        self.close()


_APPEND = _EXPIRE + """
if (redis.call('hget', KEYS[1], 'h') or '') ~= ARGV[1] then return 0 end
for i = 3, #ARGV, 2 do redis.call('hset', KEYS[1], ARGV[i], ARGV[i + 1]) end
expire(KEYS[1], ARGV[2])
return 1"""


def _append(key, name, content, ttl):
    """Add the content as one more buffer, whatever others add at the same time.  ttl: None: as it was."""
    added = 0
    while not added:                   # another one was first
        old = _asked(name, "HGET", key, "h") or b""
        kind, before, sizes = _parsed(old) if old else ("file", _ttl(None), [])
        if kind != "file":
            raise TypeError(f"{name!r} is the name of a value, not of a file")
        lasts = before if ttl is None else ttl
        fields = ["h", _header(kind, lasts, [*sizes, len(content)])]
        for number, piece in enumerate(_pieces([content]), sum(-(-size // PIECE) for size in sizes)):
            fields += [number, piece]
        added = _once(name, "EVAL", _APPEND, 1, key, old, lasts, *fields)


# ---- Refs

def share(value: Any, ttl: Time = None) -> Any:
    """A Ref to `value`, to be passed to any number of calls: it is sent to each machine once, not with each call.

    With Redis configured it lives `ttl` seconds after its last use (None: the setting, 0: for ever), also without this
    process.  Without, it lives as long as the program has the Ref, or a call or function that was given it.  Later changes
    of `value` do not matter."""
    name, (buffers, refs) = uuid.uuid4().hex, _noting_refs(_buffers_of, value)
    in_redis = "redis" in _settings().given and bool(_settings().redis)
    ref = Ref(name, in_redis, _ttl(ttl))
    if in_redis:
        _store(_key(name, "ref"), ref, "ref", buffers, ref.ttl)
    else:
        _serve(name, [bytes(buffer) for buffer in buffers])
        if _fetch is None:             # else a call's result may name it: the client serves it to its own end
            _shared_here[name] = ref
            weakref.finalize(ref, _release, name, [*_ref_folders()], refs).atexit = False
    return ref


def _release(name, folders, _refs=()):
    """Give a Ref's value up: here, in this machine's copies, and on all servers.

    Called by Ref.close(), and when nobody has the Ref any more: wherever the garbage collector likes, so it takes no lock.
    In a forked child it finds no engine, and concerns that process alone.  _refs: those in the value, which live as long."""
    served.pop(name, None)
    for engine in list(_engines):
        _unlink_copies(folders, engine.id, [name])
        if release := getattr(engine, "release", None):
            release([name])
    if _own:
        _unlink_copies(folders, _own.client, [name])


FETCHES["release"] = lambda name: _release(name, _ref_folders())


class Ref:
    """A shared value's name.  Among the arguments of a call, at any depth, it arrives as the value; one that comes back as a
    result, or that a function's code names, stays a Ref.

    Arrays of the value are read-only, as all processes of a machine have them from one piece of memory: copy() to write."""
    __slots__ = ("name", "in_redis", "ttl", "_original", "__weakref__")

    def __init__(self, name, in_redis, ttl=0):
        self.name = name
        self.in_redis = in_redis       # else its client serves it
        self.ttl = ttl                 # milliseconds after its last use that Redis keeps it; 0: for ever
        self._original = None          # the Ref that unresolved() was called on

    def __reduce__(self):
        if pickling.refs is not None:
            pickling.refs.append(self)
        return (_value_of if pickling.resolve and self._original is None else _ref), (self.name, self.in_redis, self.ttl)

    def __repr__(self):
        return f"Ref({self.name!r})"

    def get(self):
        """The value.  Raises LookupError if it is gone, or Unavailable.  Any thread."""
        head, *buffers = served.get(self.name) or _machine_copy(self)
        before, pickling.of_client = pickling.of_client, False       # in the midst of a call's arguments, perhaps
        try:
            return pickle.loads(head, buffers=[memoryview(buffer).toreadonly() for buffer in buffers])
        finally:
            pickling.of_client = before

    def close(self):
        """Give the value up, wherever it is kept; who has opened it keeps what he has.  Any process."""
        if self.in_redis:
            _retried(lambda client: client.unlink(_key(self.name, "ref")))
        if _fetch:
            _fetch("release", self.name)
        else:
            _release(self.name, _ref_folders())

    def unresolved(self):
        """A Ref to the same value, which arrives as a Ref where it is among the arguments of a call."""
        other = Ref(self.name, self.in_redis, self.ttl)
        other._original = self
        return other


_UNRESOLVED[Ref] = Ref.unresolved


def _ref(name, *fields):
    """What a Ref is unpickled as; where share() gave it, as that very object, on which the value's life depends."""
    return _shared_here.get(name) or Ref(name, *fields)


def _value_of(*fields):
    """What a Ref among the arguments of a call is unpickled as."""
    return Ref(*fields).get()


def _fetched(ref):
    """The buffers of a Ref, from Redis or from the client that serves it."""
    if ref.in_redis:
        found = _load(_key(ref.name, "ref"), ref.name, _memory)
        buffers = found and found.buffers
    else:
        buffers = _fetch and _fetch("ref", ref.name)
    if not isinstance(buffers, list):      # None, or why the client cannot answer
        raise LookupError(f"the value of Ref {ref.name!r} is gone: "
                          f"{buffers or 'its time to live ended, or who shared it did, or dropped it'}")
    return buffers


# ---- Copies of Refs on this machine
#
#     /dev/shm/clupy-1000/CLIENT/REF    pickle of the sizes | buffers, each at a multiple of 64 bytes, as numpy likes them
#
# A file in memory, which the first process to ask makes and all of them map.  It is whole where it exists, since it is
# renamed into place.  It is one file and not one for each buffer, since every mapping takes a descriptor.
#
# The folder CLIENT is held by a shared flock, by each server that has a session of the client, or by the client itself.
# A flock ends with its process: so what nobody holds was left by who was killed, whoever that was.  Workers hold nothing,
# and make no folder; to remove a copy does no harm to who has mapped it.

class Copies:
    """One client's copies of Refs on this machine, held by a server that has a session of it, or by the client itself."""

    def __init__(self, client):
        self.client = client
        self.held = []                 # descriptors of its folders
        for folder in _ref_folders():
            with contextlib.suppress(OSError), _locked(folder, os.O_DIRECTORY):    # no room: no copies there
                path = os.path.join(folder, client)
                os.makedirs(path, 0o700, exist_ok=True)
                self.held.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                fcntl.flock(self.held[-1], fcntl.LOCK_SH)

    def release(self, names):
        _unlink_copies(_ref_folders(), self.client, names)

    def close(self):
        """Hold them no longer, and remove them if nobody else does."""
        while self.held:
            os.close(self.held.pop())
        remove_copies(self.client)


def _unlink_copies(folders, client, names):
    """Remove the copies of these Refs of a client."""
    for path in [os.path.join(folder, client, name) for folder in folders for name in names]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_copies(client=None):
    """Remove the copies of this client, or of every one, that nobody holds."""
    for folder in _ref_folders():
        gone = []
        with contextlib.suppress(OSError), _locked(folder, os.O_DIRECTORY):
            for path in [os.path.join(folder, name) for name in ([client] if client else os.listdir(folder))]:
                with contextlib.suppress(OSError), _locked(path, os.O_DIRECTORY, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    os.rename(path, f"{path}.gone")    # first, so that a worker about to be killed makes no copy in it
                    gone.append(f"{path}.gone")
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)


def forget_served():
    """End what this process serves without Redis, and its copies: nobody can ask again."""
    global _own
    served.clear()
    with _clients_lock:
        own, _own = _own, None
    if own:
        own.close()


def _forget_copies():
    """In a forked child: they are its parent's, and so is the lock that holds them."""
    global _own
    own, _own = _own, None
    for file in own.held if own else ():
        os.close(file)


def _whose_copies():
    """The id of the client whose copies this process uses: a worker's client, or this process."""
    global _own
    if _client:
        return _client
    with _clients_lock:
        if _own is None:
            remove_copies()
            _own = Copies(getattr(_engine, "id", None) or uuid.uuid4().hex)
        return _own.client


def _machine_copy(ref):
    """The buffers of a Ref, from this machine's copy of it; where there is no room for one, this process's own."""
    client = _whose_copies()
    paths = [os.path.join(folder, client, ref.name) for folder in _ref_folders()]
    found = _mapped(paths)
    if not found:
        with contextlib.ExitStack() as stack:
            # Few files, and enough.  The first folder's that can be had, for all: who finds no room in one folder goes on to
            # the next while others wait, instead of each fetching anew.
            for path in paths:
                with contextlib.suppress(OSError):
                    stack.enter_context(_locked(os.path.join(os.path.dirname(path), f"{ref.name[:1]}.lock")))
                    break
            found = _mapped(paths)
            if not found:
                buffers = _fetched(ref)
                found = _copied(ref, paths, buffers)
    return _refreshed(ref, *found) if found else buffers


def _copied(ref, paths, buffers):
    """(path, buffers) of a copy made at the first of the paths that has room, or None."""
    for path in paths:
        try:
            _write_copy(path, buffers)
            return _mapped([path])
        except OSError as error:       # Docker's /dev/shm has 64 MB: on disk, then
            log.debug("no copy of %r at %s: %s", ref, path, error)
    return None


@contextlib.contextmanager
def _locked(path, kind=os.O_CREAT, how=None):
    """Hold the flock of a file, which is made, or of a folder (os.O_DIRECTORY); how: fcntl.LOCK_EX unless told."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | kind, 0o600)
    try:
        fcntl.flock(file, how or fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _write_copy(path, buffers):
    """Make a copy; one process at a time may.  Raises OSError if there is no room."""
    beside = f"{path}.new"
    try:
        with io.open(beside, "wb") as file:
            pickle.dump([len(buffer) for buffer in buffers], file)
            for buffer in buffers:
                file.seek(-file.tell() % 64, os.SEEK_CUR)
                file.write(buffer)
        os.rename(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _mapped(paths):
    """(path, buffers) of the first copy that is there, or None."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError), io.open(path, "rb") as file:
            sizes, start, buffers = pickle.load(file), file.tell(), []
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            for size in sizes:
                start += -start % 64
                buffers.append(content[start:start + size])
                start += size
            return path, buffers
    return None


def _refreshed(ref, path, buffers):
    """The buffers; Redis is told of their use once in a quarter of their time to live: else the original would expire."""
    with contextlib.suppress(FileNotFoundError, Unavailable):        # given up in this moment; what is here is here
        if ref.in_redis and ref.ttl and time.time() - os.stat(path).st_mtime > ref.ttl / 4000:
            os.utime(path)
            _asked(ref, "PEXPIRE", _key(ref.name, "ref"), ref.ttl)
    return buffers


def _ref_folders():
    """The folders for copies, best first: nobody else may write there, for a pickle is code.  One that somebody else made
    first is passed over."""
    for parent in filter(os.path.isdir, dict.fromkeys(("/dev/shm", tempfile.gettempdir()))):
        folder = os.path.join(parent, f"clupy-{os.getuid()}")
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o700)
            status = os.lstat(folder)
            if status.st_uid == os.getuid() and status.st_mode & 0o170077 == 0o040000:
                yield folder


# A command and the key's time to live, at one stroke.
_USE = _EXPIRE + """
local answer = redis.call(ARGV[2], KEYS[1], unpack(ARGV, 3))
expire(KEYS[1], ARGV[1])
return answer"""


class _Used:
    """What counters and queues have in common: a key whose time to live begins anew with each use."""

    def __init__(self, name, ttl=None):
        self.name, self._key, self._ttl = name, _key(name), _ttl(ttl)

    def _use(self, *command):
        """What follows the name for _once() and _asked(), to use the key by a command."""
        return "EVAL", _USE, 1, self._key, self._ttl, *command


class Counter(_Used):
    """An integer of 64 bits that many processes count with, 0 if it is new; ttl as for put.  May be passed to calls."""

    def __repr__(self):
        return f"clupy.counter({self.name!r})"

    def _checked(self, n):
        n = operator.index(n)
        if not -1 << 63 <= n < 1 << 63:
            raise OverflowError(f"counter {self.name!r} has 64 bits, which {n} does not fit into")
        return n

    def add(self, n=1):
        """The new value.  Counted at most once: Unavailable says that it is not known whether it was.  OverflowError beyond
        64 bits: it stays as it was then."""
        return _once(self.name, *self._use("incrby", self._checked(n)))

    @property
    def value(self):
        return int(_asked(self.name, *self._use("get")) or 0)

    def set(self, n):
        """Set it, whatever others add."""
        lives = ("PX", self._ttl) if self._ttl else ()     # GET makes Redis refuse the name of something else
        _asked(self.name, "SET", self._key, self._checked(n), "GET", *lives)


counter = Counter


# Append an item where there are fewer than ARGV[2], 0 for any number.
_ENQUEUE = _EXPIRE + """
if ARGV[2] ~= '0' and redis.call('llen', KEYS[1]) >= tonumber(ARGV[2]) then return 0 end
redis.call('rpush', KEYS[1], ARGV[3])
expire(KEYS[1], ARGV[1])
return 1"""


class Queue(_Used):
    """First in, first out; each item goes to one taker, at most once.  ttl as for put.  May be passed to calls.

    maxsize: items that it holds before those who put with this `maxsize` wait; 0: any number."""

    def __init__(self, name, ttl=None, maxsize=0):
        super().__init__(name, ttl)
        self.maxsize = _whole("maxsize", maxsize, 0)

    def __repr__(self):
        return f"clupy.queue({self.name!r})"

    def __len__(self):
        return _asked(self.name, "LLEN", self._key)

    def __bool__(self):
        """An empty queue is still a queue."""
        return True

    @_either_spelling
    def put(self, value, timeout=None):
        """Append the value, when there is room within `timeout` seconds (None: for ever), else queue.Full.

        Unavailable says that it is not known whether it is in the queue."""
        item, deadline = _item(value), _deadline(timeout)
        for attempt in itertools.count():
            if _once(self.name, "EVAL", _ENQUEUE, 1, self._key, self._ttl, self.maxsize, item):
                return
            if (left := deadline - time.monotonic()) <= 0:
                raise Full
            time.sleep(min(left, 0.01 * 2 ** min(attempt, 4)))       # nobody tells of room: more is idle, less is traffic

    def put_nowait(self, value):
        """put() that does not wait for room: queue.Full."""
        self.put(value, 0)

    @_either_spelling
    def get(self, timeout=None):
        """The oldest item, waited for `timeout` seconds (None: for ever), then queue.Empty.

        No item is lost or doubled, except that one under way when Redis or this process dies is lost: Unavailable if that
        may be."""
        deadline = _deadline(timeout)
        item = _once(self.name, *self._use("lpop"))
        while item is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Empty
            wait = min(max(left, 0.01), 1)     # shorter than the socket's time-out; 0 would be for ever
            item = (_once(self.name, "BLPOP", self._key, wait) or (None, None))[1]
        return _from_item(item)

    def get_nowait(self):
        """get() that does not wait for an item: queue.Empty."""
        return self.get(0)

    def clear(self):
        """Remove all items."""
        _once(self.name, "LTRIM", self._key, 1, 0)


queue = Queue


def publish(topic: str, value: Any) -> int:
    """How many subscribers were listening; they get `value`, others never do.  At most once, as with a counter."""
    return _once(topic, "PUBLISH", _key(topic, "topic"), _item(value))


class Subscription:
    """An iterator of the values published from now on, which ends after `timeout` seconds of silence (None: never).

    Use it in a with-block, or close() it.  It belongs to one thread.  Unavailable from next(): the connection was lost, and
    values may have been missed."""

    @_either_spelling
    def __init__(self, topic, timeout=None):
        self.topic, self.timeout = topic, timeout
        self._listener = _retried(self._listen)

    def __repr__(self):
        return f"clupy.subscribe({self.topic!r})"

    def _listen(self, client):
        listener = client.pubsub()
        try:
            listener.subscribe(_key(self.topic, "topic"))
            if listener.get_message(timeout=FIRST_CONTACT) is None:      # the confirmation
                raise redis.TimeoutError("no answer to a subscription")
            return listener
        except BaseException:
            listener.close()
            raise

    def __iter__(self):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._listener.close()

    def __next__(self):
        deadline = _deadline(self.timeout)
        while True:
            left = deadline - time.monotonic()
            try:
                message = self._listener.get_message(timeout=min(max(left, 0), 1))
            except redis.RedisError as error:
                self.close()
                reason = f"{error}; values of topic {self.topic!r} may have been missed"
                raise _unavailable("redis", reason) from error
            if message and message["type"] == "message":
                return _from_item(message["data"])
            if left <= 0:
                self.close()
                raise StopIteration


subscribe = Subscription


# ==== Coordination ============================================================
# Locks, semaphores, barriers, events and elections of processes on many machines, in ZooKeeper.
#
#     /clupy/lock/x/9f3c...-write-0000000007    the first in the queue has the lock
#                   11ab...-write-0000000008    waits, watching the one before
#
# A contender is a node that ends with its process's session; its number is its place.  Whose turn it is is read off the
# list of nodes, again after each change and each lost connection, so an outage leaves nothing to be remembered.  kazoo's
# own recipes are not used: a holder whose session ended is not told, an interrupted acquire leaves a node that blocks
# everybody (python-zk/kazoo#732, PR #760), and DoubleBarrier hangs when used again (ZOOKEEPER-1011).  That a node carries
# an id chosen before it is made, so that it is found again after a lost answer, is Curator's idea.


class _Wait:
    """One operation on ZooKeeper: its client, its deadline, and looking again whenever something changed."""

    def __init__(self, what, path, timeout):
        self.what, self.path, self.timeout = what, path, timeout
        self.deadline = _deadline(timeout)
        self.client = _zookeeper(self.deadline)
        self.changed = Flag()

    def ask(self, request, *arguments, **options):
        """The answer to one request.  Raises TimeoutError at the deadline, though it is given one second at least."""
        return self.answer(getattr(self.client, f"{request}_async")(*arguments, **options))

    def answer(self, pending):
        """The answer that kazoo's asynchronous result gets, as for ask()."""
        try:
            return pending.get(timeout=max(1.0, bounded(self.deadline - time.monotonic())))
        except kazoo_threads.KazooTimeoutError:
            raise self.late() from None

    def wake(self, _event):
        """For watches.  Also called when the connection is lost, as the watch is then."""
        self.changed.set()

    def persist(self, look):
        """The result of look(), which is called again after a lost connection."""
        while True:
            try:
                return look()
            except _lost_connection():
                if _is_over(self.client):
                    reason = f"{self.what}: away for longer than {_settings().patience:g} s"
                    raise _unavailable("zookeeper", reason) from None
                if time.monotonic() > self.deadline:
                    raise self.late() from None
                time.sleep(0.05)       # kazoo needs a moment to replace an ended session

    def until(self, look):
        """The first true result of look(), which is called again after a change it watches, and after a lost connection."""
        while True:
            self.changed.clear()
            if result := self.persist(look):
                return result
            if not self.changed.wait(bounded(self.deadline - time.monotonic())):
                raise self.late()

    def late(self):
        """The error to raise at the deadline."""
        return TimeoutError(f"{self.what}: not within {_duration(self.timeout):g} s")

    def children(self, watch=None):
        """The nodes in the order of their numbers."""
        return sorted(self.ask("get_children", self.path, watch), key=lambda node: node[-10:])


def _lost_connection():
    """Errors after which a request may have been carried out or not."""
    return (kazoo_errors.ConnectionLoss, kazoo_errors.ConnectionClosedError, kazoo_errors.SessionExpiredError,
            kazoo_errors.OperationTimeoutError, kazoo_errors.SessionMovedError)


class _Place(_Wait):
    """A place in a queue: a node of ours in `path`, gone with our session.  n: what all in the queue must agree on, or None."""

    def __init__(self, what, path, timeout, kind="place", data=None, crowd=False, n=None):
        super().__init__(what, path, timeout)
        self.n = n
        self.stem = f"{uuid.uuid4().hex}-{kind if n is None else n}-"
        self.data = f"{socket.gethostname()}:{os.getpid()}" if data is None else data
        self.crowd = crowd             # whether the whole queue is watched, or only the node that is in our way
        self.pid = os.getpid()
        self.node = None               # its name; None: not made, or not known to be
        self.tried = False             # to make it
        self.token = None              # transaction that made it: larger for every later one, over all of ZooKeeper
        self.session = None            # the session it ends with

    def nodes(self, watch=None):
        """All nodes in the order of their numbers, after ours was made; ours is missing if it was lost since.

        Raises ValueError if the first one has another n than ours.  So others with another n are about to leave."""
        while self.node is None:
            try:
                if self.tried:         # and the answer was lost; the server we have now may lag behind
                    self.ask("sync", self.path)
                    self.node = next(filter(self.is_ours, self.ask("get_children", self.path)), None)
                if self.node is None:
                    self.tried = True
                    made = self.ask("create", f"{self.path}/{self.stem}", self.data.encode(),
                                    ephemeral=True, sequence=True)
                    self.node = made.rpartition("/")[2]
            except kazoo_errors.NoNodeError:
                self.ask("ensure_path", self.path)
        nodes = self.children(self.wake if self.crowd else watch)
        if self.n is None or self.node not in nodes:
            return nodes
        said = [int(node.split("-")[1]) for node in nodes]
        if said[0] != self.n:
            raise ValueError(f"{self.what}: n is {self.n} here, but {said[0]} where it is in use already; it must be the same")
        return [node for node, n in zip(nodes, said) if n == self.n]

    def is_ours(self, node):
        """Whether it is our node, also before we know its number."""
        return node.startswith(self.stem)

    def check_node(self, watch=None):
        """Whether our node is there; its token and session are known then."""
        status = self.ask("exists", f"{self.path}/{self.node}", watch)
        if status:
            self.token, self.session = status.czxid, status.owner_session_id
        return status is not None

    def same_session(self):
        """Whether the session that our node ends with is still this process's."""
        return self.client.client_id is not None and self.client.client_id[0] == self.session

    def forget_node(self):
        """Take a place at the end of the queue with the next look: our session ended, and the node with it."""
        self.node, self.tried = None, False

    def is_turn(self, in_the_way):
        """Whether our turn has come; else what is in the way is watched.  in_the_way(nodes before us) -> one or None."""
        while True:
            nodes = self.nodes()
            if self.node not in nodes:
                self.forget_node()
                continue
            obstacle = in_the_way(nodes[:nodes.index(self.node)])
            if obstacle is None:
                if self.check_node():
                    return True
            elif self.crowd or self.ask("exists", f"{self.path}/{obstacle}", self.wake):
                return False

    def leave(self):
        """Delete our node; False if it was gone already."""
        tries = itertools.count()

        def delete():
            again = next(tries) > 0
            try:
                self.ask("delete", f"{self.path}/{self.node}")
            except kazoo_errors.NoNodeError:       # by us, if that answer was lost and the session is the same
                return again and self.same_session()
            return True

        return self.persist(delete)

    def abandon(self):
        """Give the place up, even if ZooKeeper is away: a node left behind would block others while we live."""
        remover = threading.Thread(target=self._remove, daemon=True)
        remover.start()
        remover.join(1.0)

    def _remove(self):
        """Delete every node of ours, whenever that can be done."""
        self.deadline = math.inf

        def delete():
            self.ask("sync", self.path)
            for node in filter(self.is_ours, self.ask("get_children", self.path)):
                with contextlib.suppress(kazoo_errors.NoNodeError):
                    self.ask("delete", f"{self.path}/{node}")

        # Unavailable: the node ends with its session; NoNodeError: there is no queue.
        with contextlib.suppress(Unavailable, kazoo_errors.NoNodeError):
            self.persist(delete)


def _path(kind, name):
    """The node of that name; every name is one component, whatever is in it, and so is the prefix."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name must be a str and not empty: {name!r}")
    prefix, quoted = (urls.quote(text, safe="", errors="surrogatepass").replace(".", "%2E")
                      for text in (_settings().prefix, name))
    return f"/{prefix}/{kind}/{quoted}"


_holdings = contextvars.ContextVar("clupy_holdings", default=())      # those that were acquired in this context


class _Holding:
    """What lock, semaphore and election give: acquired when its turn has come, by one with-block at a time, or by hand."""

    def __init__(self, what, name, timeout, in_the_way, **options):
        self._what, self._path = f"{what} {name!r}", _path(what, name)
        self._timeout, self._in_the_way, self._options = timeout, in_the_way, options
        self._place = None             # while held, or held by the parent that forked us
        self._thread = None            # that acquired it

    def __repr__(self):
        return f"<clupy.{self._what}{' held' if self.held else ''}>"

    def acquire(self):
        """Wait for it, as entering a with-block does, and return it.  Raises TimeoutError; RuntimeError if it would wait for
        what this thread itself holds."""
        if self._place is not None and self._place.pid == os.getpid():
            raise RuntimeError(f"{self._what}: this object is in use; make another for another with-block")
        if self._in_the_way([holding._place.node for holding in _holdings.get() if holding._is_here(self._path)]):
            raise RuntimeError(f"{self._what} would wait for itself: this thread holds it already, and it is not re-entrant")
        place = _Place(self._what, self._path, self._timeout, **self._options)
        try:
            place.until(lambda: place.is_turn(self._in_the_way))
            place.deadline = math.inf  # that was for the waiting
            self._place, self._thread = place, threading.get_ident()
        except BaseException:
            place.abandon()
            raise
        _holdings.set((*(holding for holding in _holdings.get() if holding._place), self))
        return self

    def _is_here(self, path):
        """Whether what has this path is held by this very thread.  The context alone is inherited by others (asyncio), the
        thread alone is used by others (asyncio.to_thread)."""
        return self._path == path and self._thread == threading.get_ident() and self.held

    def release(self):
        """Give it to the next.  Any thread; RuntimeError if it is not held, LockLost if it was lost meanwhile."""
        place, self._place = self._place, None
        if place is None or place.pid != os.getpid():
            raise RuntimeError(f"{self._what} cannot be released: this object does not hold it")
        try:
            kept = place.leave()
        except BaseException:
            place.abandon()
            raise
        if not kept:
            raise LockLost(f"{self._what} was lost before it was released: others may have held it meanwhile")

    __enter__ = acquire

    def __exit__(self, kind, *_):
        place = self._place
        if place is not None and place.pid != os.getpid():     # forked inside the block: it is the parent's, as the connection
            self._place = None
        elif kind is None:
            self.release()
        elif place is not None:        # the block's own error is the one to see
            self._place = None
            place.abandon()

    @property
    def held(self):
        """Whether it is held, as far as this process knows: no round trip.

        False while ZooKeeper is away.  After a stop (SIGSTOP, a sleeping machine) true for up to a second too long: check()
        asks."""
        return self._place is not None and self._place.pid == os.getpid() and self._place.same_session()

    @property
    def token(self):
        """An int that is larger with every later holder, None outside the block.

        Only a resource that refuses smaller tokens than it has seen is safe from a holder that was stopped and does not know
        yet."""
        return self._place and self._place.token

    def check(self):
        """Raise LockLost if ZooKeeper says that it is not held any more, Unavailable if it cannot be asked."""
        place = self._place
        if place is None or place.pid != os.getpid():
            raise LockLost(f"{self._what} is not held by this process")
        if not place.persist(place.check_node):
            raise LockLost(f"{self._what} is not held any more: its session ended")


@_either_spelling
def lock(name: str, timeout: Time = None, shared: bool = False) -> _Holding:
    """`with clupy.lock("x") as l:` one holder at a time in the cluster, in the order of asking.

    shared: any number of such holders, and no other.  timeout: seconds to wait, then TimeoutError.  l.held, l.token and
    l.check() tell whether it still is; LockLost at the block's end if it was lost meanwhile.  l.acquire() and l.release() do by
    hand what the block does.  Not re-entrant: a second one in the same thread that would wait for itself is a RuntimeError.
    A holder that is killed holds it for the setting `session` longer."""
    def in_the_way(before):
        writers = [node for node in before if "-write-" in node] if shared else before
        return writers[-1] if writers else None
    return _Holding("lock", name, timeout, in_the_way, kind="read" if shared else "write")


@_either_spelling
def semaphore(name: str, n: int, timeout: Time = None) -> _Holding:
    """As lock, with at most n holders at a time; ValueError on entering if others say another n."""
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")

    def in_the_way(before):
        return before[0] if len(before) >= n else None
    return _Holding("semaphore", name, timeout, in_the_way, crowd=True, n=n)


@_either_spelling
def election(name: str, data: Any = "", timeout: Time = None) -> Election:
    """`with clupy.election("x", data=me) as e:` entered by one at a time, the leader.

    Check e.held or e.check() in its loop, since leadership ends with the session.  e.leader() is the data of the present
    leader, in or out of the block."""
    if len(str(data).encode()) > 100_000:
        raise ValueError("data of an election must be short: ZooKeeper drops connections over 1 MB")
    return Election("election", name, timeout, lambda before: before[-1] if before else None, data=str(data))


class Election(_Holding):
    """What election() gives: entered by the leader, asked by anybody."""

    def leader(self):
        """The present leader's data; None if there is none.  Any process may ask."""
        return next(iter(self.candidates(1)), None)

    def candidates(self, most=None):
        """[data of each who leads or waits to lead], the leader's first; of `most` of them.  Any process may ask."""
        wait, most = _Wait(self._what, self._path, None), math.inf if most is None else most

        def look():
            found = []
            with contextlib.suppress(kazoo_errors.NoNodeError):        # nobody ever wanted to lead
                for node in wait.children():
                    if len(found) < most:
                        with contextlib.suppress(kazoo_errors.NoNodeError):    # gone meanwhile: the next one leads
                            found.append(wait.ask("get", f"{self._path}/{node}")[0].decode())
            return found

        return wait.persist(look)


@_either_spelling
def barrier(name: str, n: int, timeout: Time = None) -> None:
    """Return when n callers have come, in all n of them; then the name is free for the next n.

    Callers that died or gave up do not count.  Raises TimeoutError after `timeout` seconds, ValueError if those who came before
    say another n.  Any process, any thread."""
    n = operator.index(n)
    if not 1 <= n <= 5000:                           # more would not fit into one transaction, 1 MB
        raise ValueError(f"n must be 1 to 5000, not {n}")
    place = _Place(f"barrier {name!r}", _path("barrier", name), timeout, n=n)
    try:
        try:
            place.until(lambda: _is_released(place, n))
        except TimeoutError:
            if place.node is None or place.leave() or not _was_released(place):
                raise
    except BaseException:
        place.abandon()
        raise


def _is_released(place, n):
    """Whether n have come, us among them.

    The n-th deletes the first n nodes at one stroke, and that is the signal."""
    while True:
        nodes = place.nodes()
        if place.node not in nodes or not place.check_node(place.wake):
            if _was_released(place):
                return True
            place.forget_node()        # our session ended: we come anew
            continue
        index = nodes.index(place.node)
        if index < n - 1:
            return False               # our own node is watched
        if index >= n:                 # a crowd: wait for the next round, which may make us its n-th
            if nodes == place.nodes(place.wake):
                return False
            continue
        release = place.client.transaction()
        for node in nodes[:n]:
            release.delete(f"{place.path}/{node}")
        release.set_data(place.path, " ".join(node[-10:] for node in nodes[:n]).encode())
        if not any(isinstance(result, Exception) for result in place.answer(release.commit_async())):
            return True                # else somebody left at this moment: look again


def _was_released(place):
    """Whether our node, which is gone, was deleted by a release, or ended with our session.

    The last release left its list; and while the session is the same nothing else deletes nodes."""
    released, _ = place.ask("get", place.path)
    return place.node[-10:] in released.decode().split() or place.same_session()


class Event:
    """A flag for the whole cluster, as threading.Event, which outlives its processes.

    Any process, any thread; may be passed to calls."""

    def __init__(self, name):
        self.name, self._path = name, _path("event", name)

    def __repr__(self):
        return f"clupy.event({self.name!r})"

    def _wait(self, timeout=None):
        return _Wait(f"event {self.name!r}", self._path, timeout)

    def _change(self, request, done, **options):
        """Make a request; done: the error that says it was done already."""
        wait = self._wait()
        with contextlib.suppress(done):
            wait.persist(lambda: wait.ask(request, self._path, **options))

    def set(self):
        """Set it; whoever waits goes on."""
        self._change("create", kazoo_errors.NodeExistsError, makepath=True)

    def clear(self):
        """Have whoever waits from now on wait until it is set again."""
        self._change("delete", kazoo_errors.NoNodeError)

    def is_set(self):
        """Whether it is set."""
        wait = self._wait()
        return wait.persist(lambda: wait.ask("exists", self._path)) is not None

    @_either_spelling
    def wait(self, timeout=None):
        """Whether it was set within `timeout` seconds (None: for ever); returns as soon as it is."""
        wait = self._wait(timeout)
        try:
            return bool(wait.until(lambda: wait.ask("exists", self._path, wait.wake)))
        except TimeoutError:
            return False


event = Event


# ==== Ends ===================================================================
# What close() ends, a program's end too, and what a forked child must not take for its own.

def close() -> None:
    """End this process's calls and give its slots back; returns when their last output was shown.

    The next call connects anew.  In a worker nothing is closed but what its calls use: its client is connected."""
    _close(None)


def _close(successor):
    """successor: what is to run the calls that are made from now on; None: what the next call makes."""
    global _engine, _known
    with undisturbed(), _engine_lock:
        engine = _engine
        if engine is None or not engine.nested:
            _engine, _known = successor, None
            if engine is not None:
                engine.begin_to_close()
    if engine is not None:
        engine.close()
    spare.trim()
    forget_served()
    close_services()


_parents = []                   # in a forked child: kept for ever, as nothing of them may be finalized here


@atexit.register
def _at_exit():
    with contextlib.suppress(KeyboardInterrupt):      # whoever presses Ctrl-C again does not want to wait
        _end()


def _end():
    global _ending
    _ending = True
    unfinished = sum(len(engine.calls()) for engine in list(_engines))
    if unfinished:
        log.warning("the program ended before %s of its calls; clupy.wait_all() waits for them", unfinished)
    if failures.unseen and not _client:           # in a worker it is the affair of the call that made them
        log.warning("%s", failures)
    _close(_Ended())
    for engine in list(_engines):
        engine.close()


def _after_fork():
    """In a forked child: the engines stay the parent's; the child gets one of its own when it makes a call."""
    global _engine, _engines, _engine_lock, _capture_lock, _payload_lock, _marks_lock, _set_up_lock, failures, threads
    _engine_lock, _capture_lock, _payload_lock, _set_up_lock = (threading.Lock() for _ in range(4))
    _marks_lock = threading.RLock()
    Future._condition, threads, failures = threading.RLock(), Threads(), Failures()
    for engine in {*_engines, *filter(None, [_engine])}:
        engine.abandon()
        _parents.append(engine)
    for executor in _executors:
        executor._engine = None
    _engine, _engines = None, weakref.WeakSet()
    _forget_clients()
    _forget_copies()


os.register_at_fork(after_in_child=_after_fork)


# ==== Command line ===========================================================

REACHING = "master", "port", "secret_file", "encryption", "tls_ca"      # the settings by which a command only looks at a cluster


def _option(key):
    return f"--{key.replace('_', '-')}"


def _settings_of(arguments):
    """The settings among the arguments of the command line."""
    return {key: value for key, value in vars(arguments).items() if key in SETTINGS}


def _run_master(settings, _):
    asyncio.run(clupy_master.run(settings, find_secret(settings, create=True)))


def _await_secret(settings):
    """The secret; waited for as long as `patience` where the first master of this machine may be about to make it."""
    deadline = time.monotonic() + settings.patience
    if not os.environ.get("CLUPY_SECRET") and not os.path.exists(path := home_path(settings.secret_file)):
        log.warning("there is no %s yet: the first master of this machine makes it; on another machine, copy it from there",
                    path)
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.2)
    return find_secret(settings)


def _run_server(settings, _):
    asyncio.run(clupy_server.run(settings, _await_secret(settings)))


def _show_status(settings, arguments):
    tables = asyncio.run(clupy_master.ask_master(settings, "status"))
    print(json.dumps(tables, indent=2) if arguments.json else clupy_master.status_text(tables))
    there = sum(not row["draining"] for row in tables["servers"].values())
    if there < (arguments.expect or 0):
        raise ClupyError(f"only {amount(there, 'server')} can take calls, of {arguments.expect} that are expected")


def _show_libraries(settings, _):
    print(clupy_master.libraries_text(asyncio.run(clupy_master.ask_master(settings, "status"))))


def _check(settings, arguments):
    given = {"patience": "5s", **{key: value for key, value in _settings_of(arguments).items() if value is not None}}
    return 0 if clupy_master.check(settings, lambda: connect(config=arguments.config, **given)) else 1


def _add_setting(parser, role, key):
    """The option of a setting, if the role has it; read_settings reads its value."""
    roles, read, default, text = SETTINGS[key]
    if role in roles.split():
        shown = {None: "", True: " (default: on)"}.get(
            default, f" (default: {default:g} s)" if read is _duration else f" (default: {default})")
        parser.add_argument(_option(key), metavar=read.__name__.rpartition("_")[2].upper(), help=text + shown)


def command_line():
    """The parser of `python -m clupy`."""
    layout = functools.partial(argparse.HelpFormatter, max_help_position=29)
    parser = argparse.ArgumentParser(prog="clupy", description="A small cluster for Python calls.", formatter_class=layout)
    parser.add_argument("--version", action="version", version=f"clupy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, role, run, text, keys=SETTINGS, level="info"):
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=layout,
                                   usage="%(prog)s [OPTION ...]")
        made.set_defaults(role=role, run=run)
        made.add_argument("--config", metavar="FILE", help=f"a YAML file instead of clupy.{role}.yaml here")
        made.add_argument("--log-level", default=level, choices=("debug", "info", "warning", "error"), metavar="LEVEL",
                          help=f"debug, info, warning or error (default: {level})")
        group = made.add_argument_group(
            "settings", f"--secret-file, say, is also `secret_file:` in clupy.{role}.yaml, and the variable CLUPY_SECRET_FILE")
        for key in keys:
            _add_setting(group, role, key)
        return made

    command("master", "master", _run_master, "run the cluster's master")
    command("serve", "server", _run_server, "run a server: the workers of this machine")
    status = command("status", "client", _show_status, "show the cluster's servers and clients", REACHING, "warning")
    status.add_argument("--json", action="store_true", help="for scripts")
    status.add_argument("--expect", type=int, metavar="N", help="fail unless so many servers are there, and take calls")
    command("libraries", "client", _show_libraries, "show the cluster's libraries, and how those here differ", REACHING,
            "warning")
    command("check", "client", _check, "look whether calls can run, and say what is wrong and what to do", level="error")
    return parser


def main(argv=None):
    """`python -m clupy`, and the console script `clupy`: the exit code."""
    arguments = command_line().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=arguments.log_level.upper())
    try:
        return arguments.run(read_settings(arguments.role, arguments.config, _option, **_settings_of(arguments)), arguments) or 0
    except (ClupyError, ModuleNotFoundError) as error:        # the latter of a package that is not installed, with what to do
        print(f"clupy {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
