"""CluPy: wrap a function call, and it runs in a cluster.

    import clupy

    def area(radius):
        return 3.14159 * radius ** 2

    results = [clupy.parallel(area)(r) for r in range(100)]
    clupy.wait_all(results, time_out=10)
    print([r.value for r in results])

Without any set-up the calls run on the cores of this machine; `python -m clupy master` and `python -m clupy serve
--master HOST` make a cluster of several.  Trusted networks only: whoever knows the secret can run code.

      caller's threads            engine: a thread and its event loop                      the cluster
                           |
      parallel(f)(x) ------|-> inbox -> queue --fill--> Slot ----- calls ------------> worker
         |   capture, pack |             ^               |  |
         v                 |             | lost, recalled|  +----- results, fetch ---- worker
      Future <-------------|--conclude---+---------------+
         |                 |
      handlers, callbacks  |     ServerLink: one control connection per server ------- server
      (threads that may    |     Connection to the master: wants out, share in ------- master
       block)              |

- caller's threads  read the function and its arguments, pickle them, make the Future; write the inbox.
- Engine            reads the inbox; owns the queue, the links, the slots and every call from submit to its outcome.
- Slot              reads and writes one TCP connection to one worker; knows which calls are under way there.
- ServerLink        asks one server to open, close and kill; hears of deaths and of output.

Words: a *call* is one invocation and its Future; a *client* makes calls; the *master* knows the servers and who may
use how many slots of which; a *server* watches the workers of one node; a *worker* is a process that runs one
client's calls; a *slot* is the capacity of one worker, and the connection to it; a *share* is how many slots of
which servers the master leaves to one client; an *environment* is a set of installed libraries.
Everywhere in the code seconds are floats and sizes are bytes.
"""

if __name__ == "__main__":                    # `python -m clupy`: run the module under its own name, once
    import clupy
    raise SystemExit(clupy.main())


import atexit
import collections
import concurrent.futures
import contextlib
import copy
import errno
import functools
import hmac
import importlib
import io
import itertools
import json
import linecache
import logging
import math
import operator
import os
import pickle
import random
import re
import selectors
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import types
import weakref
from collections.abc import MutableMapping
from concurrent.futures import BrokenExecutor, CancelledError
from queue import Empty, SimpleQueue


class _Lazy:
    """A module that is imported when it is first used: `import clupy` stays light, and a worker never loads asyncio."""

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


argparse = _Lazy("argparse")
ast = _Lazy("ast")
asyncio = _Lazy("asyncio")
cloudpickle = _Lazy("cloudpickle")
clupy_master = _Lazy("clupy_master")          # this and the next against the arrows: to embed a cluster, and to start one
clupy_server = _Lazy("clupy_server")
difflib = _Lazy("difflib")
dis = _Lazy("dis")
fcntl = _Lazy("fcntl")
fnmatch = _Lazy("fnmatch")
inspect = _Lazy("inspect")
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
redis = _Lazy("redis")
redis_backoff = _Lazy("redis.backoff")
redis_connection = _Lazy("redis.connection")
redis_retry = _Lazy("redis.retry")
shutil = _Lazy("shutil")
site = _Lazy("site")
ssl = _Lazy("ssl")
subprocess = _Lazy("subprocess")
sysconfig = _Lazy("sysconfig")
tempfile = _Lazy("tempfile")
urls = _Lazy("urllib.parse")
uuid = _Lazy("uuid")
yaml = _Lazy("yaml")

__version__ = "0.1.0"

# Whose are the names?  Those of __all__ are the users'.  Others without an underscore are what the three files share;
# those with one are this file's alone.
__all__ = [
    "connect", "close", "parallel", "map", "wait_all", "as_completed", "Future", "Executor",                    # calls
    "configure", "put", "get", "delete", "exists", "keys", "shared", "open", "share", "Ref",                    # data
    "counter", "Counter", "queue", "Queue", "publish", "subscribe", "Subscription",
    "lock", "semaphore", "election", "Election", "barrier", "event", "Event", "LockLost",                       # coordination
    "ClupyError", "ConfigurationError", "SecretError", "VersionMismatch", "ProtocolError", "MasterUnreachable",   # errors
    "WorkerDied", "CallTimeout", "Closed", "DependencyError", "LibraryMismatch", "Unavailable", "RemoteError", "main"]

log = logging.getLogger("clupy")

# Each constant names the price of turning it.
PORT = 7878                       # the master's; users know it, so it never changes
PYTHON = sys.version_info[:2]     # bytecode travels, so client, server and master must have the same
HANDSHAKE_TIME = 5.0              # a stranger holds a connection no longer; less refuses honest peers on a busy machine
STATEMENT_TIME = 2.0              # statements are repeated; less is traffic, more delays the repair of what was lost
GATHER_TIME = 0.02                # changes are gathered so long; more delays shares, less makes more of them
WORK_AHEAD = 0.005                # seconds of work sent ahead to a worker; more hides latency, but may have to be recalled
MAX_SPARED = 2                    # workers that may die before they begin a call; the next death is charged to it
MAX_AHEAD = 2000                  # calls under way in one slot at most, however short they are
STALL_TIME = 0.02                 # a slot without a result for so long gives back what it has not begun
LINGER_TIME = 1.0                 # an extra slot for nested calls stays open so long when idle; a new one costs a worker
MASTER_SILENCE = 6.0              # a master that answers no statement for so long is left for the next of several
RETRY_TIME = 10.0                 # an unreachable server is tried again after it
UNSERVED_TIME = 3.0               # calls that wait so long without any slot are told of in the log
SILENCE_TIME = 60.0               # a server from which nothing came for so long, while a call is out, is lost
ALIVE_TIME = 10.0                 # a server says so often that it is alive
NO_LIMIT = 1e7                    # seconds of a TLS handshake, which begins when the slot gets a worker
CLOSE_TIME = 5.0                  # closing waits for the last lines of output no longer
MIN_MEMORY = 64 << 20             # bytes that a worker needs to start
MAX_CONTROL = 1 << 31             # bytes of one frame on control and master connections: wheels travel there, too
MAX_FRAME = 1 << 40               # bytes of one frame on a slot; checked before memory is spent
MAX_BUFFERS = 1 << 20             # out-of-band buffers of one frame
CHUNK = 256 << 10                 # bytes read at once; more is memory for every slot, less is system calls
SEND_PIECE = 256 << 10            # bytes given to asyncio at once, which may copy what the socket does not take
HUGE = 4 << 20                    # bytes from which memory is asked of the kernel, in huge pages
LARGE = 64 << 10                  # bytes from which a buffer travels beside the pickle; below, copying is cheaper
UNSEEN_OUTPUT = 64 << 10          # bytes of output on their way to a client; beyond, lines are dropped and counted
MAP_AHEAD = 4096                  # calls of one `map` that are under way before their results are taken
MAP_BYTES = 256 << 20             # ... and bytes of their arguments


# ==== Errors =================================================================
# Each says what was tried, on whom, what happened and what to do.

class ClupyError(Exception):
    """Any error of CluPy's own; an exception of the user's function keeps its type."""


class ConfigurationError(ClupyError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class SecretError(ClupyError, PermissionError):
    """There is no secret, others can read it, or the peer has another one."""


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


class Closed(ClupyError, RuntimeError):
    """The client was closed before the call had an outcome."""


class DependencyError(ClupyError):
    """Libraries could not be resolved or installed. The text ends with pip's own last lines; `lines` has them
    alone."""
    def __init__(self, what, lines=()):
        super().__init__(what, tuple(lines))            # its very arguments: so it survives a pickle
        self.lines = tuple(lines)

    def __str__(self): return "\n  ".join((self.args[0], *self.lines))


class LibraryMismatch(ClupyError, UserWarning):
    """This client's versions differ from the cluster's: a warning, or raised with `library_check: error`."""


class Unavailable(ClupyError, ConnectionError):
    """Redis or ZooKeeper is not configured or does not answer."""


class RemoteError(ClupyError):
    """What a call raised, if that cannot be rebuilt here. type_name, message, traceback: its texts."""
    def __init__(self, type_name, message, traceback=""):
        super().__init__(type_name, message, traceback)
        self.type_name, self.message, self.traceback = type_name, message, traceback

    def __str__(self): return f"{self.type_name}: {self.message}"


class LockLost(ClupyError, RuntimeError):
    """What was held is held no more, since when is not known: the session ended, or the node was deleted."""


# ==== Configuration ==========================================================
# defaults < YAML file of the role < CLUPY_* environment variables < command line or arguments

def _duration(value):
    """Seconds as a float, of a number or of a text such as "500ms", "10s", "2m", "1h"."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"\s*([0-9.]+)\s*(ms|s|m|h|)\s*", value) if isinstance(value, str) else None
    if not match:
        raise ValueError('a duration: seconds, or a text such as "500ms", "10s", "2m", "1h"')
    return float(match[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "": 1}[match[2]]


def _size(value):
    """Bytes as an int, of a number or of a text such as "500MB", "2GB"; None for no limit."""
    if value is None or isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(?:i?b)?\s*", value, re.I) if isinstance(value, str) else None
    if not match:
        raise ValueError('a size: bytes, or a text such as "500MB", "2GB"')
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def _count(value):
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a whole number from 0")
    return value


def _text(value):
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _switch(value):
    word = str(value).lower()
    if word not in ("on", "off", "true", "false", "yes", "no", "1", "0"):
        raise ValueError("on or off")
    return word in ("on", "true", "yes", "1")


def _level(value):
    value = {False: "off"}.get(value, value)         # YAML reads a bare off as false
    if value not in ("warn", "error", "off"):
        raise ValueError("warn, error or off")
    return value


def parse_address(value, port=0):
    """(host, port) of "host", "host:port", "port" or "[v6]:port"."""
    if isinstance(value, int) or isinstance(value, str) and value.strip().isdigit():
        value = f":{value}"                     # no host is named so
    match = re.fullmatch(r"\s*(?:\[([^\]]*)\]|([^:]*))(?::(\d+))?\s*", value) if isinstance(value, str) else None
    if not match or match[3] and int(match[3]) > 65535:
        raise ValueError("an address: HOST, HOST:PORT or PORT")
    return match[1] or match[2] or "", int(match[3]) if match[3] else port


def _addresses(value):
    """[(host, port), ...] of a text with commas or a list; a port that is not named is None."""
    parts = value.split(",") if isinstance(value, (str, int)) and str(value).strip() else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError("an address, or several: HOST:PORT,HOST:PORT")
    return [parse_address(part, None) for part in parts]


SETTINGS = {   # key: (roles that have it, how it is read, default)
    "listen": ("master server", parse_address, None),           # None: every address; a master's PORT, a server's free one
    "master": ("server client", _addresses, None),
    "port": ("server client", _count, PORT),                    # the master's, where its address names none
    "secret_file": ("master server client", _text, "~/.clupy/secret"),
    "tls_cert": ("master server", _text, None),
    "tls_key": ("master server", _text, None),
    "tls_ca": ("master server client", _text, None),
    "slots": ("server client", _count, os.cpu_count() or 1),    # client: of the embedded cluster
    "max_nested": ("server client", _count, 64),                # workers beyond the slots, for one client's calls inside calls
    "drain_time": ("server", _duration, 60.0),
    "memory_limit": ("server client", _size, None),             # bytes of one worker
    "output": ("client", _switch, True),
    "environments_dir": ("server client", _text, None),         # None: below the user's cache folder
    "environments_kept": ("server client", _count, 10),         # complete ones per machine; those in use stay in any case
    "sync_interval": ("master server client", _duration, 60.0),
    # What a client does about libraries that differ.  Not off, because arguments and results travel as pickles, and
    # what one version of cloudpickle or numpy wrote, another may fail to read, or read wrongly.
    "library_check": ("client", _level, "warn"),
    "patience": ("master server client", _duration, 60.0),
    "redis": ("master client", _text, None),
    "zookeeper": ("master client", _text, None),
    "prefix": ("master client", _text, "clupy"),
    "ttl": ("master client", _duration, 604800.0),
    "session": ("master client", _duration, 10.0),
}


class Settings:
    """One attribute per key of SETTINGS; `given` names the keys that did not come from the defaults."""

    def __init__(self, values, given):
        self.__dict__.update(values, given=frozenset(given))

    def __repr__(self):
        return f"Settings({', '.join(f'{key}={masked(getattr(self, key))!r}' for key in sorted(self.given))})"


def masters_of(settings):
    """[(host, port), ...] of the masters; localhost where none is named."""
    return [(host or "localhost", port or settings.port) for host, port in settings.master or [("", None)]]


def default_settings(role, **values):
    """The Settings of a role without any file or variable: the defaults, and those of `values` that it has."""
    known = {key: values.get(key, default) for key, (roles, _, default) in SETTINGS.items() if role in roles.split()}
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


def read_settings(role, file=None, **arguments):
    """The Settings of a "master", "server" or "client".

    file: a YAML file that must exist; None: clupy.<role>.yaml in the working directory, if there is one.
    arguments: settings that win over all others; None stands for one that was not given.
    Raises ConfigurationError, naming file, line and the nearest valid key."""
    known = {key for key, (roles, _, _) in SETTINGS.items() if role in roles.split()}
    values = {key: SETTINGS[key][2] for key in known}
    given = set()

    def take(key, value, where):
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise ConfigurationError(f"{where}: unknown setting {key!r}"
                                     + (f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(sorted(known))}"))
        try:
            values[key] = SETTINGS[key][1](value)
        except ValueError as error:
            raise ConfigurationError(f"{where}: {key} is {masked(value)!r}, but must be {error}") from None
        given.add(key)

    for key, value, line in _read_yaml(file or f"clupy.{role}.yaml", must_exist=file is not None):
        take(key, value, f"{file or f'clupy.{role}.yaml'}, line {line}")
    for variable in [name for name in os.environ if name.startswith("CLUPY_")]:
        key = variable[6:].lower()
        if key in known:
            take(key, os.environ[variable], f"environment variable {variable}")
        elif key not in SETTINGS and (near := difflib.get_close_matches(key, [*SETTINGS, "secret"], 1, 0.8)) and near != [key]:
            log.warning("the environment variable %s is no setting; did you mean CLUPY_%s?", variable, near[0].upper())
    for key, value in arguments.items():
        if value is not None:
            take(key, value, "argument")
    if values.get("slots") == 0:
        raise ConfigurationError("slots is 0, but must be at least 1")
    if (values.get("memory_limit") or MIN_MEMORY) < MIN_MEMORY:
        raise ConfigurationError(f"memory_limit is {values['memory_limit']} bytes, but a worker needs {MIN_MEMORY >> 20}MB")
    for key in ("tls_cert", "tls_key", "tls_ca"):
        if values.get(key) and not os.path.isfile(os.path.expanduser(values[key])):
            raise ConfigurationError(f"{key} is {values[key]!r}, but there is no such file")
    return Settings(values, given)


def _read_yaml(path, must_exist=False):
    """[(key, value, line)] of a YAML file with one mapping; [] without the file."""
    try:
        with io.open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        if must_exist:
            raise ConfigurationError(f"{path}: there is no such file") from None
        return []
    try:
        node, value = yaml.compose(text), yaml.safe_load(text)
    except importlib.import_module("yaml").YAMLError as error:
        raise ConfigurationError(f"{path}: not YAML: {error}") from None
    if value is None:
        return []
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}: must hold lines of `key: value`, not a {type(value).__name__}")
    return [(key, item, at.start_mark.line + 1) for (key, item), (at, _) in zip(value.items(), node.value, strict=True)]


# ---- Redis and ZooKeeper: what this process was told (configure, arguments, CLUPY_* variables, clupy.client.yaml) wins,
# else what the master says, else they are on this machine.

SERVICE_KEYS = ("redis", "zookeeper", "prefix", "ttl", "session", "patience")
_LOCAL = {"redis": "redis://localhost:6379/0", "zookeeper": "localhost:2181"}
_configured = {}        # what configure() was given; replaced, never changed


def configure(**settings):
    """Set redis, zookeeper, prefix, ttl, session or patience for this process, over all other places.

    Raises ConfigurationError. Any thread; clients that are in use already stay as they are."""
    global _configured
    for key in settings:
        if key not in SERVICE_KEYS:
            raise ConfigurationError(f"configure() takes {', '.join(SERVICE_KEYS)}, not {key!r}")
    read = read_settings("client", **settings)
    _configured = {**_configured, **{key: getattr(read, key) for key in settings}}


def merged_services(own, theirs):
    """Settings of a client's own, of configure() first, and of what the master says, {} where there is none that could."""
    own = Settings({**vars(own), **_configured}, {*own.given, *_configured})
    values = {key: getattr(own, key) for key in SERVICE_KEYS}
    values.update({key: value for key, value in theirs.items() if key not in own.given and key in SERVICE_KEYS})
    given = set(own.given) | set(theirs.get("given", ()))
    if not theirs:
        values.update({key: value for key, value in _LOCAL.items() if key not in given})
    return Settings(values, given & set(SERVICE_KEYS))


def find_secret(settings, create=False):
    """The cluster's secret as bytes: CLUPY_SECRET, else the file `secret_file`.

    create: make the file where it is missing (0600), as the first master on a machine does.
    Raises SecretError where there is none or others can read it."""
    if os.environ.get("CLUPY_SECRET"):
        return os.environ["CLUPY_SECRET"].encode()
    path = os.path.expanduser(settings.secret_file)
    if create and not os.path.exists(path):
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        with io.open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(os.urandom(32).hex() + "\n")
        try:
            os.link(temporary, path)                  # never over one that another master has just made
            log.info("made the secret %s; copy it to the cluster's other machines", path)
        except FileExistsError:
            log.info("another process made the secret %s", path)
        finally:
            os.unlink(temporary)
    try:
        with io.open(path, "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read(4096).strip()
    except OSError as error:
        raise SecretError(f"no secret: {path}: {error.strerror}; copy the master's ~/.clupy/secret to this machine, "
                          "or set CLUPY_SECRET") from None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid not in (os.getuid(), 0):
        raise SecretError(f"the secret {path} can be read by others or is not yours; run: chmod 600 {path}")
    if len(secret) < 16:
        raise SecretError(f"the secret {path} is shorter than 16 characters; remove it, and the master makes a new one")
    return secret


# ==== Wire ===================================================================
# Everything two processes of a cluster say to each other.
#
# preamble   8 bytes, read exactly and before TLS: "clupy", version, role, 0.  Roles: M to a master, C control, S slot.
# handshake  for M and C, raw bytes of fixed size, HANDSHAKE_TIME at most; D dials, A admits:
#              D -> A  preamble, nonce (32)
#              A -> D  preamble, nonce (32), HMAC-SHA256(secret, "admit", preamble, both nonces)
#              D -> A  HMAC-SHA256(secret, "dial", preamble, both nonces)
#            Both proofs are bound to role and nonces, so neither can be reflected or replayed.  The control
#            connection's key, HMAC(secret, "key", ...), stays in the two processes.
# slot       D -> A  preamble, session (16), number (8), nested (1), HMAC(key, those)     each number once
#            A -> D  HMAC(slot key, "opened"), slot key = HMAC(key, "slot", number); then frames
# frame      body length (8), number of buffers (4), length of each (8), all big-endian | pickle 5 | buffers
#            A message is a tuple (kind, *fields) of plain values: unpickling one runs nobody's code.  What users
#            sent travels in it as payloads, bytes that are unpickled where they are used.
#
# A *statement* is complete and replaces the one before; sent on connecting, on change and every STATEMENT_TIME.
#
# from -> to        kind      fields                                       answer      if it fails
# server -> master  server    id, address, python, slots,                  cluster     next master of the list
#                             held {client: n}, state {load, draining, ...}
# client -> master  client    id, python, wanted slots, unreachable        share       back-off; `patience` without slots
#                             servers, hash of its libraries
# master -> client  share     {server: (address, n)}, services             -           stands until replaced
# master -> server  cluster   services, silent clients, hash of libraries  -           the last one stands
# standby -> any    leader    (host, port) or None                         go there    next master of the list
# any -> master     libraries hash, or None for the cluster's              libraries   again with the next statement
# server -> master  wheel     sha256                                       wheel       pip says that it is not there
# client -> master  resolve   libraries, pip options, {sha256: wheel}      resolved    again after reconnecting
# any -> master     status    -                                            tables      an error text
# any -> dialer     refused   error type, text                             -           the connection is closed
# client -> server  hello     client, python, libraries (None: the         welcome     told to the master, again later
#                             cluster's), whether output is wanted
# server -> client  welcome   session, name of the server, {its versions}  -
# client -> server  close     number                                       ended       control lost: all are closed
# client -> server  kill      number, call                                 ended, late the future has its outcome already
# server -> client  ended     number, {pid, begun, why, reason, code,      -           1 s after the slot's end: lost
#                             peak, limit, lines, stack}
# server -> client  late      number, call: it is over, or has not begun   -           asked again while it is out
# server -> client  output    pid, stream, text, dropped lines             seen        over UNSEEN_OUTPUT: dropped
# client -> server  seen      characters                                   -
# client -> server  release   names of Refs that nobody has any more       -           the session's end
# any -> client     notice    what, text: draining, alive, renew (the      -
#                             libraries changed: give slots back), broken
#                             (why), building or resolving (pip's line)
# client -> worker  opening   the client's own top-level modules           opened      the slot ends
# worker -> client  opened    pid                                          -
# client -> worker  calls     in the order to be done:                     results     the slot's end and `ended`
#                             (number, function id, arguments, time-out),
#                             (0, function id, payload or None: drop it,
#                             (name, payload to be called first or None))
# worker -> client  results   [(number, succeeded, plain value or          -
#                             payload)], seconds that they took
# client -> worker  recall    -                                            returned    none: they stay sent
# worker -> client  returned  [numbers]                                    -
# worker -> client  fetch     request, what (module, ref), its fields      fetched     the slot ends
# client -> worker  fetched   request, answer                              -
# worker -> client  serve     name, buffers of a Ref shared in a call      -
# worker -> client  nested    [(number, parent, function id, arguments,    results     the slot's end
#                             time-out, retries, (Executor's id or None, max) or None)],
#                             {function id: (payload, name, first) or None: drop it}
# client -> worker  results   [(number, succeeded, plain value or payload)] of nested calls
# worker -> client  forget    [numbers of nested calls]                    -
#
# Kind `share` is answered by the method `on_share` of the class that owns the receiver's state.

MAGIC, VERSION = b"clupy", 1
TO_MASTER, CONTROL, SLOT = b"M", b"C", b"S"
PREAMBLE_SIZE, NONCE_SIZE, PROOF_SIZE, SESSION_SIZE = 8, 32, 32, 16
SLOT_HEAD = struct.Struct(f">{SESSION_SIZE}sQ?")                       # session, number, nested
FRAME_HEAD = struct.Struct(">QI")                                      # body length, number of buffers


def preamble(role):
    return MAGIC + bytes((VERSION,)) + role + b"\0"


def read_preamble(data):
    """The role that a preamble names. Raises ProtocolError."""
    if data[:5] != MAGIC:
        raise ProtocolError(f"not CluPy: it began with {bytes(data)!r}")
    if data[5] != VERSION:
        raise VersionMismatch(f"it speaks protocol version {data[5]}, this is {VERSION}; install the same CluPy on both")
    if data[6:7] not in (TO_MASTER, CONTROL, SLOT):
        raise ProtocolError(f"unknown role {data[6:7]!r}")
    return bytes(data[6:7])


def proof(key, *parts):
    """HMAC-SHA256 over the parts, each with its length, so that no two lists of parts look alike."""
    return hmac.digest(key, b"".join(struct.pack(">I", len(part)) + part for part in parts), "sha256")


def slot_head(key, session, number, nested):
    """What opens a slot, after the preamble: head and MAC under the control connection's key."""
    head = SLOT_HEAD.pack(session, number, nested)
    return head + proof(key, preamble(SLOT), head)


def slot_key(key, number):
    """The key of one slot: all that a worker ever knows of the cluster's secrets."""
    return proof(key, b"slot", struct.pack(">Q", number))


def forwarded(payload):
    """A payload that arrived, for another message: its buffers, memory now, travel beside the pickle again."""
    if type(payload) is tuple and payload and type(payload[-1]) is list:
        return *payload[:-1], [pickle.PickleBuffer(buffer) for buffer in payload[-1]]
    return payload


def encode(message):
    """The frame of a message as a list of buffers, large ones uncopied."""
    buffers = []
    body = pickle.dumps(message, 5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    head = FRAME_HEAD.pack(len(body), len(views)) + b"".join([struct.pack(">Q", view.nbytes) for view in views])
    return [head + body, *views]


class _PlainUnpickler(pickle.Unpickler):
    """Reads messages, which hold plain values alone; anything that would run code is refused."""

    def find_class(self, module, name):
        raise ProtocolError(f"a message names {module}.{name}, but messages hold plain values alone")


def decode(body, buffers=()):
    """The message of a frame. Raises ProtocolError for one that is none."""
    try:
        message = _PlainUnpickler(io.BytesIO(body), buffers=buffers).load()
    except ProtocolError:
        raise
    except Exception as error:                     # whatever pickle says of rubbish
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


def memory(size):
    """A writable buffer of so many bytes.  Most of the price of new memory is zeroing it and its page faults: filling
    64 MiB takes 35 ms as a bytearray, 14 ms in huge pages."""
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    try:
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        raise MemoryError(f"no memory for {size} bytes") from None
    with contextlib.suppress(OSError):            # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class Frames:
    """Cuts a stream of bytes into messages; knows nothing of sockets.

    Write bytes to `space()`, say how many to `filled(n)`, and take the messages that are complete.  Large parts are
    received into memory of their own, allocated once.  `proof`: bytes that must come first."""

    def __init__(self, proof=b"", limit=MAX_FRAME):
        self._proof, self._limit = proof, limit
        self._chunk = memoryview(bytearray(CHUNK))
        self._messages = []
        self._parts = self._parse()
        self._want(next(self._parts))

    def _want(self, size):
        self._part, self._have = memory(size), 0

    def _parse(self):
        """Yields the size of the next part, is sent the part."""
        if self._proof and not hmac.compare_digest((yield len(self._proof)), self._proof):
            raise ProtocolError("the peer does not know the slot's key")
        while True:
            size, count = frame_sizes((yield FRAME_HEAD.size), self._limit)
            lengths = struct.unpack(f">{count}Q", (yield 8 * count)) if count else ()
            if sum(lengths) > self._limit:
                raise ProtocolError(f"buffers of {sum(lengths)} bytes are over the limit of {self._limit}")
            body = yield size
            buffers = []
            for length in lengths:
                buffers.append((yield length))
            self._messages.append(decode(body, buffers))

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
                messages, self._messages = self._messages, []
                return messages
            self._want(self._parts.send(self._part))


# ---- Connections over asyncio streams: to masters, and for control

def tune(sock, user_timeout=True):
    """A peer is alive while its kernel answers: keepalive finds a dead one in 10 s, also under unanswered data.

    user_timeout: not on slots, where a full window would look like death."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", 10000 if user_timeout else 0)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tls_context(settings, side):
    """The ssl context of a "dial" or "admit" side, or None where the settings name no certificate."""
    if side == "dial" and settings.tls_ca:
        return ssl.create_default_context(cafile=os.path.expanduser(settings.tls_ca))
    if side == "admit" and settings.tls_cert:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*tls_files(settings))
        return context
    return None


def tls_files(settings):
    """The absolute paths of certificate and key."""
    return [os.path.abspath(os.path.expanduser(path)) for path in (settings.tls_cert, settings.tls_key or settings.tls_cert)]


class Connection:
    """Frames over a stream whose peer has proved the secret; for the thread of its loop alone."""

    def __init__(self, reader, writer, peer, key):
        self._reader, self._writer = reader, writer
        self.heard = time.monotonic()  # when the last message arrived
        self.peer = peer               # "10.0.0.5:41234"
        self.key = key                 # known to both ends, and to nobody else

    def __repr__(self):
        return f"<Connection {self.peer}{' closing' if self._writer.is_closing() else ''}>"

    @property
    def host(self):
        """The peer's numeric address, and this end's."""
        return self._writer.get_extra_info("peername")[0], self._writer.get_extra_info("sockname")[0]

    def send(self, *message):
        if not self._writer.is_closing():
            self._writer.writelines(encode(message))

    async def receive(self):
        size, count = frame_sizes(await self._reader.readexactly(FRAME_HEAD.size), MAX_CONTROL)
        if count:
            raise ProtocolError("a frame with buffers on a connection that has none")
        return decode(await self._reader.readexactly(size))

    async def serve(self, owner):
        """Hand every message to the owner until the connection ends; says why in the log if it was the peer's fault."""
        try:
            while True:
                message = await self.receive()
                self.heard = time.monotonic()
                dispatch(owner, self, message)
        except ProtocolError as error:
            log.warning("closing the connection to %s: %s", self.peer, error)
        except (asyncio.IncompleteReadError, OSError):
            pass                                    # it ended; the owner decides what that means
        finally:
            self.close()

    def refuse(self, error):
        """Tell the peer why, as an error it raises, and close."""
        log.warning("refused %s: %s", self.peer, error)
        self.send("refused", type(error).__name__, str(error))
        self.close()

    def close(self):
        """Send what is under way, then end."""
        self._writer.close()

    def abort(self):
        """End now; TLS would wait for the peer's farewell."""
        self._writer.transport.abort()


async def connect_socket(host, port):
    """A connected, non-blocking socket; tries each address of the host in turn. Raises OSError."""
    loop = asyncio.get_running_loop()
    error = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(HANDSHAKE_TIME):
                await loop.sock_connect(sock, address)
            return sock
        except BaseException as caught:
            sock.close()
            if not isinstance(caught, OSError):
                raise
            error = caught
    raise error


async def dial(address, role, secret, settings):
    """A Connection to a master or server at (host, port), after the handshake.

    Raises OSError if nobody answers there, SecretError, VersionMismatch or ProtocolError if the peer is not one of
    ours."""
    host, port = address
    sock = await connect_socket(host, port)
    try:
        tune(sock)
        async with asyncio.timeout(HANDSHAKE_TIME):
            await asyncio.get_running_loop().sock_sendall(sock, preamble(role))
            context = tls_context(settings, "dial")
            reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname=host if context else None)
    except BaseException:
        sock.close()
        raise
    try:
        async with asyncio.timeout(HANDSHAKE_TIME):
            return await _prove(reader, writer, f"{host}:{port}", preamble(role), secret)
    except BaseException as error:
        writer.transport.abort()
        if isinstance(error, asyncio.IncompleteReadError):
            raise ProtocolError(f"{host}:{port} closed the connection during the handshake; "
                                "is it CluPy's port, and the secret the same?") from None
        raise


async def _prove(reader, writer, peer, mine, secret):
    """The dialing side of the handshake."""
    nonce = os.urandom(NONCE_SIZE)
    writer.write(nonce)
    read_preamble(await reader.readexactly(PREAMBLE_SIZE))
    bound = mine, nonce, await reader.readexactly(NONCE_SIZE)
    if not hmac.compare_digest(await reader.readexactly(PROOF_SIZE), proof(secret, b"admit", *bound)):
        raise SecretError(f"{peer} has another secret than this process; copy its ~/.clupy/secret here")
    writer.write(proof(secret, b"dial", *bound))
    return Connection(reader, writer, peer, proof(secret, b"key", *bound))


class MasterLink:
    """A connection to the leading master, kept for ever: each address in turn, back-off with jitter between rounds.

    The owner answers messages, and hears of the connection by master_joined(connection) and master_lost()."""

    def __init__(self, addresses, secret, settings):
        self.addresses, self.secret, self.settings = addresses, secret, settings
        self.connection = None         # Connection, while there is one
        self.host = None               # how the master was reached; servers on its machine are there, too
        self.lost_at = time.monotonic()
        self.why_lost = "not tried yet"
        self.leader = None             # (host, port) to which a standby sent us
        self._looked = time.monotonic()

    def __repr__(self):
        return f"<MasterLink {self.connection.peer if self.connection else self.why_lost}>"

    async def run(self, owner):
        delay = 0.1
        for address in itertools.cycle(self.addresses):
            address, self.leader, began = self.leader or address, None, time.monotonic()
            try:
                connection = await dial(address, TO_MASTER, self.secret, self.settings)
            except (OSError, ClupyError) as error:
                self.why_lost = f"{address[0]}:{address[1]}: {error or 'no answer'}"
                if isinstance(error, (SecretError, VersionMismatch)):
                    owner.on_refused(None, type(error).__name__, str(error))
            else:
                self.connection, self.host = connection, address[0]
                owner.master_joined(connection)
                await connection.serve(owner)
                self.connection, self.lost_at = None, time.monotonic()
                self.why_lost = f"{address[0]}:{address[1]} closed the connection"
            owner.master_lost()
            if time.monotonic() - began > 1.0:
                delay = 0.1
            if self.leader is None:
                await asyncio.sleep(delay * random.uniform(0.5, 1))
                delay = min(1.0, delay * 1.5)

    def look(self, now):
        """To be called every STATEMENT_TIME: a master that answers no statement is left, if there are others; where it is
        the only one, it is waited for."""
        late = now - self._looked > STATEMENT_TIME + 1           # it was us who slept
        self._looked = now
        if self.connection and len(self.addresses) > 1 and not late and now - self.connection.heard > MASTER_SILENCE:
            log.warning("master %s has been silent for %g s; trying the next one", self.connection.peer, MASTER_SILENCE)
            self.connection.close()

    def follow(self, address):
        """A standby said who leads, or that it does not know: go there, or to the next."""
        self.leader = address and tuple(address)
        self.connection.close()

    def close(self):
        if self.connection:
            self.connection.abort()


# ==== Code and pickles ======================================================
# A worker has neither the program's modules nor its __main__, so that what it is sent travels in three ways:
#
#      data                      pickle             a payload: bytes, or (bytes, [large buffers])
#      __main__, lambda, local   cloudpickle        by value: the code and the globals that it uses
#      the user's own modules    pickle, by name    the worker's Finder asks module_source() for their text
#
# Plain pickle is tried first since it is 6 times as fast, and its bytes tell when it is not enough:
# "__main__" is in them. Back come results, in which the client's classes are only named (_client_class), and
# exceptions, taken apart into a list (unpack_exception), since a pickle loses cause, context and traceback.

PLAIN = frozenset((int, float, bool, type(None), str))     # types that travel in a message as they are
MAX_CAPTURES = 256      # functions kept with their pickle: a closure per turn of a loop is a new function
MAX_CLASSES = 4096      # classes kept alive after they were sent, as a result may name them
MAX_CHAIN = 2000        # exceptions of one failure that are sent: cause, context and group members
MAX_FRAMES = 100        # of each exception: more are left out in the middle
MAX_TEXT = 10_000       # characters of the message that stands for an exception which cannot be rebuilt
_missing_modules = {}   # in a worker: name -> what the ModuleNotFoundError should say; its Finder's
_MAINS = ("__main__", "__mp_main__")    # the second is the first's name in a child of multiprocessing
_RAW = {bytes, bytearray}
_MAIN = b"_main__"                      # in a pickle that has something of either
_ABSENT = type("absent", (), {"__repr__": lambda self: "<absent>"})()
_UNRESOLVED = {}         # {Ref: what makes one that arrives as a Ref, wherever it is}


class _Pickling(threading.local):
    """What this thread pickles or unpickles just now."""
    refs = None         # the Refs that were met so far, where somebody wants to know
    resolve = False     # the arguments of a call: a Ref among them arrives as its value
    of_client = False   # in a worker: what its client sent, so that the classes in it are the client's


pickling = _Pickling()


def _noting_refs(pack, *args, resolve=False):
    """(what pack(*args) returns, the Refs that it met): while they live, their values can be had."""
    before = pickling.refs, pickling.resolve
    pickling.refs, pickling.resolve = refs, _ = [], resolve
    try:
        return pack(*args), refs
    finally:
        pickling.refs, pickling.resolve = before


def pack(obj, by_value=None, snapshot=True):
    """The payload of obj: bytes, or (bytes, [pickle.PickleBuffer]) with the buffers of 64 KiB and more.

    snapshot: writable buffers are copied, so that obj may be changed afterwards; read-only ones never are.
    by_value(obj, buffer_callback) pickles what plain pickle cannot. Raises what it raises. Any thread may call."""
    return _pack(_raw(obj), by_value or _by_value, snapshot)


def _pack(obj, by_value, snapshot=True):
    buffers = _Buffers()
    buffers.snapshot = snapshot
    try:
        data = pickle.dumps(obj, 5, buffer_callback=buffers)
    except Exception:           # lambda, local class, lock ...: if by_value cannot either, it raises
        data = _MAIN
    if data.find(_MAIN) >= 0 or _registered():      # `in` takes 0.2 us more: it asks first for a number
        buffers.clear()
        data = by_value(obj, buffers)
    return (data, list(buffers)) if buffers else data


class _Buffers(list):
    """A buffer_callback: takes large buffers out of the pickle, and copies those that may change."""
    def __call__(self, buffer):
        view = buffer.raw()
        if view.nbytes < LARGE:
            return True
        self.append(buffer if view.readonly or not self.snapshot else pickle.PickleBuffer(_copied(view)))


def _copied(view):
    copied = memory(view.nbytes)
    memoryview(copied)[:] = view
    return copied


def unpack(payload):
    """The object. Once per payload, as arrays are not copies: they use the payload's buffers."""
    if type(payload) is tuple:
        data, buffers = payload
        return pickle.loads(data, buffers=buffers)
    return pickle.loads(payload)


def pack_arguments(function_name, args, kwargs, func=None):
    """(the payload of (args, kwargs), the Refs among them, which arrive as their values). Raises PicklingError that
    names the argument at fault and its type; with func also the parameter's name. Any thread may call."""
    for value in args:
        if type(value) in _RAW:
            args = tuple([_raw(value) for value in args])
            break
    if kwargs:
        kwargs = {name: _raw(value) for name, value in kwargs.items()}
    try:
        return _noting_refs(_pack, (args, kwargs), _by_value, resolve=True)
    except Exception as error:      # whatever a class of the user's raises while it is pickled
        named = [*_numbered(args, func), *((f"argument {name!r}", kwargs[name]) for name in kwargs)]
        raise pickle.PicklingError(f"{function_name} cannot be called: {_culprit(named, 'its arguments')} "
                                   f"cannot be pickled: {error}") from error


def _registered():
    """Modules that the user told cloudpickle to send by value, even if they could be imported."""
    module = sys.modules.get("cloudpickle")
    if module is None:
        return set()
    if not hasattr(module, "list_registry_pickle_by_value"):
        module = importlib.import_module("cloudpickle")     # waits for the thread that imports it just now
    names = module.list_registry_pickle_by_value()      # a copy
    names.discard("__mp_main__")                        # _dumps's
    return names


def _registered_are(modules, _): return _registered() == modules


def _by_value(obj, buffer_callback=None):
    return _dumps(_by_value_pickler(), obj, buffer_callback)


def _dumps(pickler, obj, buffer_callback=None):
    if "__mp_main__" in sys.modules:            # which cloudpickle takes for a module that workers have
        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])
    file = io.BytesIO()
    pickler(file, 5, buffer_callback).dump(obj)
    return file.getvalue()


@functools.cache
def _by_value_pickler():
    """The class, made late: cloudpickle takes 16 ms to import."""
    class Pickler(cloudpickle.Pickler):
        dispatch_table = cloudpickle.Pickler.dispatch_table.new_child(
            {functools._lru_cache_wrapper: _reduce_cached, types.CodeType: _reduce_code})

        def reducer_override(self, obj):
            if type(obj) is types.FunctionType and _is_wrapped(obj):
                return getattr, (_named(obj), "func")
            reduced = super().reducer_override(obj)
            if reduced is not NotImplemented and isinstance(obj, type):
                _keep(obj)
            if reduced is not NotImplemented and type(obj) is types.FunctionType and pickling.resolve:
                _leave_refs(reduced[2][1])
            return reduced
    return Pickler


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


@functools.lru_cache(MAX_CLASSES)
def _keep(cls):
    """Keeps a class that was sent: cloudpickle's tracker is weak, and a result must find it by its id."""


def _named(obj):
    """What a worker finds under obj's module and name (obj itself, if it can go by name), or None."""
    module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if not isinstance(name, str) or module in _MAINS:
        return None
    if any(f"{module}.".startswith(f"{by_value}.") for by_value in _registered()):
        return None
    try:
        return operator.attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):      # a local name; a module made by hand
        return None


def _is_wrapped(func):
    """Whether a module has a Parallel under func's name: func goes as the `.func` of it, not by value."""
    found = _named(func)
    return isinstance(found, Parallel) and found.func is func


def _reduce_cached(cached):
    """lru_cache and cache of a function that cannot go by name: the worker begins with an empty cache."""
    if _named(cached) is cached:
        return cached.__qualname__
    return _make_cached, (cached.__wrapped__, cached.cache_parameters())


def _make_cached(func, parameters):
    return functools.lru_cache(**parameters)(func)


def _reduce_code(code):
    """With its file's name, which cloudpickle leaves out from 3.1.3 on: tracebacks show their lines by it."""
    _, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return _make_code, (arguments, code.co_filename)


def _make_code(arguments, filename):
    return types.CodeType(*arguments).replace(co_filename=filename)


class _Raw:
    """Large bytes or a bytearray, which plain pickle would copy into its stream."""
    def __init__(self, value): self.value = value

    def __reduce__(self):
        return (bytes if type(self.value) is bytes else _bytearray), (pickle.PickleBuffer(self.value),)


def _raw(value):
    return _Raw(value) if type(value) in _RAW and len(value) >= LARGE else value


def _bytearray(buffer):
    return buffer if type(buffer) is bytearray else bytearray(buffer)   # received memory becomes the argument


def _numbered(args, func):
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):         # None, or a builtin that does not tell
        names = []
    for i, value in enumerate(args):
        yield f"argument {i + 1}" + (f" ({names[i]!r})" if i < len(names) else ""), value


def _culprit(named_values, otherwise):
    """The first of (name, value) that cannot be pickled, as in "argument 2 ('key'), a _thread.lock,"."""
    for name, value in named_values:
        try:
            pack(value)
        except Exception:       # that one
            return f"{name}, a {_type_name(type(value))},"
    return otherwise


def _type_name(cls):
    module, name = cls.__module__, cls.__qualname__
    return name if module in ("builtins", *_MAINS) else f"{module}.{name}"


# A class that came from the client goes back as the id that cloudpickle's tracker gave it. By value,
# cloudpickle would find the class by the same id and set all its attributes to copies. The tracker is
# private, so it is checked.

def _class_tracker():
    """cloudpickle's module with the tracker's three names. Raises ClupyError if they are gone."""
    module = importlib.import_module("cloudpickle.cloudpickle")
    for name in "_DYNAMIC_CLASS_TRACKER_BY_ID", "_get_or_create_tracker_id", "_lookup_class_or_track":
        if not hasattr(module, name):
            raise ClupyError(f"cloudpickle {cloudpickle.__version__} has no {name}, by which CluPy finds "
                             f"the classes in results: install cloudpickle 3.1")
    return module


def _client_class(tracker_id, name):
    """The class that went by value under this id. A worker's results name it so; pickles call this."""
    cls = _class_tracker()._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker_id)
    if cls is None:
        raise pickle.UnpicklingError(f"a result has an object of class {name}, which this process never "
                                     f"had or has dropped: keep the class, or define it in a module")
    return cls


_client_classes = weakref.WeakSet()     # in a worker: classes and type variables that came by value from its client


def pack_result(value, name="the call"):
    """The payload of what `name` returned, its buffers not copied. Raises PicklingError that says its type."""
    try:
        return pack(value, _result_by_value, snapshot=False)
    except BaseException as error:      # whatever a class of the user's raises while it is pickled, SystemExit too
        raise pickle.PicklingError(f"the result of {name}, a {_type_name(type(value))}, cannot be "
                                   f"pickled: {error}") from error


def _result_by_value(obj, buffer_callback=None):
    return _dumps(_result_pickler(), obj, buffer_callback)


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

class Function:
    """One version of a function: what workers are sent once, and then know by its id (of this process)."""
    __slots__ = "payload", "name", "setup", "id", "mean", "limits", "refs", "__weakref__"

    def __init__(self, payload, name, setup=None):
        self.payload, self.name, self.id = payload, name, next(_function_ids)
        self.setup = setup      # payload of a function that a worker must have called first, or None
        self.mean = None        # seconds that a call takes, as far as is known
        self.limits = {}        # {max: Limit}
        self.refs = ()          # the Refs in it, which live as long

    def __repr__(self): return f"<Function {self.id} {self.name}>"

    def limit(self, most):
        """The Limit that the calls of this function with this `max` share."""
        if most not in self.limits:
            self.limits.setdefault(most, Limit(most))
        return self.limits[most]


_function_ids = itertools.count(1)
_functions = weakref.WeakValueDictionary()      # (payload, setup) -> Function, while anybody has it
_captures = {}          # id(func) -> (func, Function, reads), oldest first; any thread looks, changed under the lock
_capture_lock = threading.Lock()                # for both tables


def function_of(payload, name, setup=None):
    """The Function of this payload, the same object while anybody has it."""
    if type(payload) is not bytes:
        return Function(payload, name, setup)
    with _capture_lock:
        function = _functions.get((payload, setup))
        if function is None:
            function = _functions[payload, setup] = Function(payload, name, setup)
        return function


def capture(func):
    """The Function that func is now: a changed global or closure is seen; the same pickle is the same object.

    Pickling takes 40 us; if all that the last pickle read is immutable and still the same object (_reads), it
    is reused in 0.6 us. Raises PicklingError that names what is at fault. Any thread may call."""
    known = _captures.get(id(func))
    if known is not None and known[0] is func:
        for read, a, b, value in known[2]:
            if read(a, b) is not value:
                break
        else:
            return known[1]
    return _capture(func)


def _capture(func):
    name = _function_name(func)
    reads = _reads(func)        # first: what changes while it is pickled is seen by the next capture
    try:
        data, refs = _noting_refs(_by_value, func)
    except Exception as error:      # whatever a class of the user's raises while it is pickled
        raise pickle.PicklingError(f"{name} cannot be sent to a worker: {_culprit(_used(func), 'it')} cannot "
                                   f"be pickled: {error}") from error
    function = function_of(data, name) if len(data) < LARGE else Function(pack(_Pickled(data)), name)
    function.refs = refs
    if reads is not None and type(function.payload) is bytes:
        with _capture_lock:
            if len(_captures) >= MAX_CAPTURES:
                del _captures[next(iter(_captures))]
            _captures[id(func)] = func, function, reads
    return function


class _Pickled:
    """The pickle of a function with much data in it: beside the payload, where it is sent without a copy."""
    def __init__(self, data): self.data = data
    def __reduce__(self): return pickle.loads, (pickle.PickleBuffer(self.data),)


def _function_name(func):
    if isinstance(func, functools.partial):
        return _function_name(func.func)
    return getattr(func, "__qualname__", None) or type(func).__qualname__


_CONSTANTS = {int, float, complex, bool, str, bytes, range, type(None), type(...), type(NotImplemented)}


def _reads(func):
    """[(read, a, b, value)]: func's pickle is right while each read(a, b) is value. None: part of it may
    change unseen. All that goes by value is followed, but no names, docs, and later imports of packages."""
    reads, todo, seen = [(_registered_are, _registered(), None, True)], [func], set()
    while todo:
        obj = todo.pop()
        if type(obj) in _CONSTANTS or id(obj) in seen:
            continue
        seen.add(id(obj))
        if type(obj) in (tuple, frozenset):
            todo += obj
        elif type(obj) in (types.GenericAlias, types.UnionType):        # list[int], int | None in annotations
            todo += getattr(obj, "__origin__", None), *obj.__args__
        elif _named(obj) is obj or type(obj) is types.FunctionType and _is_wrapped(obj):
            prefix, _, name = obj.__qualname__.rpartition(".")
            owner = sys.modules[obj.__module__]
            namespace = vars(operator.attrgetter(prefix)(owner) if prefix else owner)
            reads.append((namespace.get, name, _ABSENT, _named(obj)))
        elif isinstance(obj, Parallel):
            todo.append(obj.func)
        elif type(obj) is types.FunctionType:
            todo += _function_reads(obj, reads)
        elif not (isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj):
            return None
    return reads


def _function_reads(func, reads):
    """Adds to reads what the function itself consists of; the values it uses."""
    for name in "__code__", "__defaults__", "__kwdefaults__":
        reads.append((getattr, func, name, getattr(func, name)))
    reads.append((operator.eq, vars(func), {}, True))       # attributes go by value, and are seldom used
    kwonly = func.__code__.co_varnames[func.__code__.co_argcount:][:func.__code__.co_kwonlyargcount]
    used = [(_contents, cell, _ABSENT) for cell in func.__closure__ or ()]
    for namespace, names in ((func.__globals__, _global_names(func.__code__)),
                             (func.__kwdefaults__ or {}, kwonly),
                             (func.__annotations__, func.__annotations__)):
        used += [(namespace.get, name, _ABSENT) for name in names]
    values = [read(a, b) for read, a, b in used]
    reads += [(*what, value) for what, value in zip(used, values)]
    return [value for value in values if value is not _ABSENT] + [func.__defaults__]


def _contents(cell, otherwise):
    try:
        return cell.cell_contents
    except ValueError:      # not assigned yet
        return otherwise


@functools.lru_cache(MAX_CAPTURES)
def _global_names(code):
    """The globals that cloudpickle sends with the code: named by it or by a function in it."""
    names = {step.argval: None for step in dis.get_instructions(code) if step.opname.endswith("_GLOBAL")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_global_names(constant)))
    return tuple(names)


def _used(func):
    """(name, value) of what may keep a function from being pickled, for the error."""
    if isinstance(func, types.FunctionType):
        for name, cell in zip(func.__code__.co_freevars, func.__closure__ or ()):
            yield f"{name!r} of its closure", _contents(cell, None)
        for name in _global_names(func.__code__):
            yield f"its global {name!r}", func.__globals__.get(name)


# ---- exceptions

def pack_exception(error, skip_frames=0, where=""):
    """The payload that unpack_exception takes. Cannot raise."""
    try:
        return pack(_links(error, skip_frames, where))
    except BaseException as problem:        # at worst: no memory left, a class that breaks type()
        why = f"{type(problem).__name__} while the exception was taken apart"
        return pack([(None, why, type(error).__name__, "message not known", [], None, None, False)])


def _links(error, skip_frames, where):
    """The exceptions that hang together, as _Chain takes them: the first is error itself."""
    chain = _chain(error)
    positions = {id(error): i for i, error in enumerate(chain)}
    links = []
    for error in chain:
        if isinstance(error, ModuleNotFoundError) and error.name in _missing_modules:
            error.msg = _missing_modules[error.name]
            error.args = error.msg,
        frames = _frames(error.__traceback__)
        if not links:
            frames = [(f"<{where}>", "call", 1, 1, None, None, None)] * bool(where) + frames[skip_frames:]
        links.append((*_pickled(error, positions), _type_name(type(error)), _message(error),
                      _shortened(frames), positions.get(id(error.__cause__)),
                      positions.get(id(error.__context__)), error.__suppress_context__))
    return links


def _chain(error):
    """error and what it refers to as cause, context or member of a group, each once, at most MAX_CHAIN."""
    chain, todo = {}, [error]
    while todo and len(chain) < MAX_CHAIN:
        error = todo.pop()
        if error is not None and id(error) not in chain:
            chain[id(error)] = error
            todo += reversed(error.exceptions if isinstance(error, BaseExceptionGroup) else ())
            todo += error.__context__, error.__cause__
    return list(chain.values())


def _pickled(error, positions):
    """(pickle, None), or (None, why there is none). An __init__ that does not take `args` is left out."""
    try:
        faithful = _is_faithful(error)
        return _dumps_link(error, positions, error if faithful else _WithoutInit(error)), None
    except BaseException as problem:        # whatever the user's methods raise; RecursionError, MemoryError
        return None, _line(problem)


def _is_faithful(error):
    """Whether its pickle would make the same: copy.copy does what unpickling does, but makes no classes."""
    try:
        copied = copy.copy(error)
        return type(copied) is type(error) and str(copied) == str(error)
    except Exception:       # the __init__ wants other arguments
        return False


class _WithoutInit:
    def __init__(self, error): self.error = error
    def __reduce__(self): return _without_init, (type(self.error), self.error.args, vars(self.error))


def _dumps_link(error, positions, obj):
    def pickler(*arguments):
        made = _link_pickler()(*arguments)
        made.error, made.positions = error, positions
        return made
    return _dumps(pickler, obj)


@functools.cache
def _link_pickler():
    class Pickler(_result_pickler()):
        def persistent_id(self, part):
            if isinstance(part, BaseException) and part is not self.error:
                return self.positions.get(id(part))
    return Pickler


def _message(error):
    try:
        text = str(error)
    except Exception:       # a __str__ of the user's
        return "<no text: its __str__ fails>"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text):,} characters)"


def _frames(trace):
    """The frames of a traceback as _traceback takes them."""
    frames = []
    while trace is not None:
        code = trace.tb_frame.f_code
        line, text = trace.tb_lineno or code.co_firstlineno, _line_text(trace.tb_frame, trace.tb_lineno)
        first, last, column, last_column = (None,) * 4
        if trace.tb_lasti >= 0:
            positions = itertools.islice(code.co_positions(), trace.tb_lasti // 2, None)
            first, last, column, last_column = next(positions)
        if first != line:
            last, column, last_column = line, None, None
        frames.append((code.co_filename, code.co_name, line, last, column, last_column, text))
        trace = trace.tb_next
    return frames


def _line_text(frame, line):
    """The line of a module's file; None for code that came by value: only the client has its file."""
    if "remote text" in frame.f_globals:        # of a nested call
        return frame.f_globals["remote text"]
    module = sys.modules.get(frame.f_globals.get("__name__"))
    if module is None or vars(module) is not frame.f_globals:
        return None
    return linecache.getline(frame.f_code.co_filename, line, frame.f_globals).rstrip() or None


def _shortened(frames):
    if len(frames) <= MAX_FRAMES:
        return frames
    half = MAX_FRAMES // 2
    gap = f"<{len(frames) - 2 * half} frames left out>", "...", 1, 1, None, None, None
    return [*frames[:half], gap, *frames[-half:]]


def unpack_exception(payload):
    """The exception of a pack_exception, with its causes, contexts, group members, notes, and the worker's
    traceback: raised here, it prints as if the call had run here. One that cannot be rebuilt, be it a cause,
    is a RemoteError with a note that says why. Any thread may call."""
    chain = _Chain(unpack(payload))
    for i in reversed(range(len(chain.links))):     # members before their group
        chain.load(i)
    for error, (*_, cause, context, suppress) in zip(chain.errors, chain.links):
        error.__cause__ = None if cause is None else chain.errors[cause]
        error.__context__ = None if context is None else chain.errors[context]
        error.__suppress_context__ = suppress
    return chain.errors[0]


class _Chain:
    """links: (pickle or None, why none, type name, message, frames, cause, context, suppress) of each
    exception. Cause and context are positions in the list, and so are other exceptions within a pickle."""
    def __init__(self, links):
        self.links = links
        self.errors = [None] * len(links)

    def load(self, i):
        if self.errors[i] is None:
            data, why, type_name, message, frames, *_ = self.links[i]
            self.errors[i] = RemoteError(type_name, message)        # for those within that refer to it
            trace = _traceback(frames)
            try:
                error = self._unpickled(data, why)
            except Exception as problem:    # a constructor's, or a module is missing here
                text = "".join(traceback.format_tb(trace))
                text = f"Traceback (most recent call last):\n{text}{type_name}: {message}"
                error = RemoteError(type_name, message, text)
                error.add_note(f"{type_name} cannot be rebuilt here: {_line(problem)}")
            self.errors[i] = error.with_traceback(trace)
        return self.errors[i]

    def _unpickled(self, data, why):
        if data is None:
            raise pickle.UnpicklingError(why)
        error = _LinkUnpickler(data, self.load).load()
        if not isinstance(error, BaseException):
            raise pickle.UnpicklingError(f"its pickle is a {type(error).__qualname__}")
        return error


class _LinkUnpickler(pickle.Unpickler):
    def __init__(self, data, load):
        super().__init__(io.BytesIO(data))
        self.load_link = load

    def persistent_load(self, position): return self.load_link(position)


def _without_init(cls, args, attributes):
    """An exception whose __init__ does not take its args: class E(Exception) with __init__(self, a, b)."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


def _line(error):
    return "".join(traceback.format_exception_only(error))[:500].strip()


def _traceback(frames):
    """A traceback of frames: (file, function, first and last line, first and last column, text or None).

    A frame cannot be made, but code that fails at any place can be compiled: the idea is Jinja2's. The text
    is given for files that the worker has: if the file here has another line there, its name gets
    " (remote)"."""
    trace = None
    for filename, name, line, last_line, column, last_column, text in reversed(frames):
        linecache.checkcache(filename)      # as printing will do
        if text is not None and linecache.getline(filename, line).rstrip() != text:
            filename = filename.removesuffix(" (remote)") + " (remote)"
            _remember_line(filename, line, text)
        if last_line != line or column is None:     # the whole line, which Python then does not underline
            whole = linecache.getline(filename, line).encode().rstrip()
            column, last_column = column or len(whole) - len(whole.lstrip()), len(whole)
        code = _failing(filename, name, line, column, max(column, last_column))
        try:
            eval(code, {"__builtins__": {}, "remote text": text})       # the text is for a worker's client
        except NameError as error:
            inner = error.__traceback__.tb_next
            trace = types.TracebackType(trace, inner.tb_frame, inner.tb_lasti, line)
    return trace


@functools.lru_cache(1024)
def _failing(filename, name, line, column, last_column):
    node = ast.Name("no such name", ast.Load(), lineno=line, end_lineno=line,
                    col_offset=column, end_col_offset=last_column)
    return compile(ast.Expression(node), filename, "eval").replace(co_name=name)


def _remember_line(filename, line, text):
    lines = list(linecache.getlines(filename))
    lines += ["\n"] * (line - len(lines))
    lines[line - 1] = text + "\n"
    linecache.cache[filename] = 0, None, lines, filename        # None: checkcache() leaves it alone


# ---- modules on demand

CLUPY_MODULES = {"clupy", "clupy_master", "clupy_server"}      # every server has its own


def own_modules():
    """The user's own top-level modules that are imported, or run by -m: a worker asks for these first."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    specs = {name: getattr(module, "__spec__", None) for name, module in list(sys.modules.items())}
    top = {main.name.partition(".")[0]} if main is not None and _is_own(main.name, main) else set()
    return frozenset(top | {name for name, spec in specs.items() if "." not in name and _is_own(name, spec)})


def module_source(name, parent_path=None):
    """What a worker is told that lacks a module; parent_path: the __path__ of the package it is in. One of
         ("source", text, file name, __path__ or None)      it is the user's own
         ("namespace", __path__)                            a folder without __init__.py
         ("library", distribution, version)                 installed here, but not sent
         ("refused", why)                                   own, but it has no source
         ("no",)                                            unknown here, or the standard library's
    Nothing is imported or run, not even the parent. Reads files; any thread may call; never raises."""
    try:
        return _module_source(name, parent_path)
    except Exception as error:      # a finder or loader of the user's may raise anything
        return "refused", f"module {name!r} cannot be read by its client: {_line(error)}"


def _module_source(name, parent_path):
    spec = _spec(name, parent_path)
    if spec is None and name in sys.modules and sys.modules[name] is not None:
        return "refused", (f"module {name!r} was made while its client ran, so it has no source to send: "
                           f"call cloudpickle.register_pickle_by_value(module) before the calls that use it")
    if spec is None or name.partition(".")[0] in sys.stdlib_module_names | CLUPY_MODULES or not _places(spec):
        return ("no",)
    if not _is_own(name, spec):
        return "library", *_distribution(name)
    if not spec.has_location:
        return "namespace", [place for place in _places(spec) if not _is_library(place)]
    if hasattr(spec.loader, "get_source"):
        text = spec.loader.get_source(spec.name)
    else:                                           # pytest's
        with io.open(spec.origin, "rb") as file:
            text = importlib.util.decode_source(file.read())
    if text is None:
        return "refused", (f"module {name!r} is compiled ({spec.origin}), and only source is sent: add its "
                           f"project under `libraries:` in clupy.client.dependency.yaml")
    path = spec.submodule_search_locations
    return "source", text, spec.origin, None if path is None else list(path)


def _spec(name, parent_path):
    """The module's spec or None. importlib.util.find_spec would run the parent."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is not None and main.name == name:      # python -m package.script
        return main
    spec = getattr(sys.modules.get(name), "__spec__", None)
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    while spec is None and finders:
        try:
            spec = finders.pop(0).find_spec(name, parent_path)
        except KeyError:        # a namespace package whose parent is not imported here
            spec = _namespace(name, parent_path)
    return spec


def _namespace(name, parent_path):
    finders = [finder for place in parent_path if (finder := pkgutil.get_importer(place)) is not None]
    parts = [spec for spec in (finder.find_spec(name) for finder in finders) if spec is not None]
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [place for part in parts for place in part.submodule_search_locations]
    return spec


def _is_own(name, spec):
    return (spec is not None and name.partition(".")[0] not in sys.stdlib_module_names | CLUPY_MODULES
            and name not in _MAINS and not all(_is_library(place) for place in _places(spec)))


def _places(spec):
    return [spec.origin] if spec.has_location else list(spec.submodule_search_locations or ())


def _is_library(path):
    folders = _library_folders()
    return os.path.abspath(path).startswith(folders) or os.path.realpath(path).startswith(folders)


@functools.cache
def _library_folders():
    """Where installed modules are, by plain and by real path. An editable install is elsewhere: it is own."""
    folders = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site.getsitepackages(), [site.getusersitepackages()])
    return tuple({os.path.join(form(folder), "")
                  for folder in folders for form in (os.path.abspath, os.path.realpath)})


def _distribution(name):
    """(name to give to pip, installed version or None)."""
    top = name.partition(".")[0]
    names = metadata.packages_distributions().get(top)
    return (names[0], metadata.version(names[0])) if names else (top, None)


FETCHES = {"module": module_source}     # what a worker may ask its client for: each answers in a thread that may block


# ==== Future =================================================================
# A call and its outcome in one object.  PENDING: it waits for a slot.  RUNNING: it was sent to one, and may have begun.
# FINISHED or CANCELLED_AND_NOTIFIED: it has its outcome.  A recall or a lost worker takes RUNNING back to PENDING.
#
# All futures share one Condition as their lock, and nobody waits on it: whoever waits for a future adds a waiter, as
# concurrent.futures' own wait() and as_completed() do.  That makes a pending call 0.4 KB instead of 1.9 KB and takes
# 0.5 us instead of 4 us.  A result stays pickled until somebody asks for it, and is unpickled in that thread: it may
# run user code, which may block, and must never do so in the engine's loop.

PENDING, RUNNING, FINISHED = "PENDING", "RUNNING", "FINISHED"
CANCELLED = "CANCELLED_AND_NOTIFIED"
_DONE = (FINISHED, CANCELLED)


class _Waiter:
    """Wakes one thread when a future is done; the three methods are what concurrent.futures calls.

    handlers: not before its handlers have run."""
    __slots__ = ("lock", "handlers")

    def __init__(self, handlers):
        self.handlers = handlers
        self.lock = threading.Lock()
        self.lock.acquire()

    def add_result(self, future):
        if self.lock.locked():
            self.lock.release()

    add_exception = add_cancelled = add_result


class Future(concurrent.futures.Future):
    """The outcome of one call, to come: a concurrent.futures.Future that can also be awaited.

    .completed, .successful   bools
    .value                    the result, or None until there is one
    .failure                  the exception, or None
    Any thread may use it."""

    _condition = threading.Condition()
    _result = _exception = None
    _packed = None                # (succeeded, payload) until somebody asks for the result
    _waiting = _callbacks = None  # lists of _waiters and of _done_callbacks, made when they are first needed
    _handlers = None              # [(on success, f)] that have not run yet; None: there are none
    _parent = _outer = None       # a nested call: (Slot, its number there), number of the call that made it
    _slot = None                  # the Slot that it was sent to last, and when
    _sent_at = 0.0
    _took = None                  # seconds from then to its outcome
    _number = _cost = _tries = 0  # its number, seconds it counts as in its slot, starts that were charged to it
    _spared = 0                   # workers that died before they began it, though it was the next
    _counted = False              # whether it is among the engine's unfinished calls
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

    def _wait(self, timeout=None, handlers=False):
        """Whether it is done within `timeout` seconds (None: for ever), and its handlers have run if that matters.

        Ctrl-C ends all unfinished calls of this client: whoever gives up waiting wants the cluster back."""
        if self._state in _DONE and not (handlers and self._handlers):
            return True
        waiter = _Waiter(handlers)
        with self._condition:
            if self._state in _DONE and not (handlers and self._handlers):
                return True
            self._waiters.append(waiter)
        try:
            return waiter.lock.acquire(timeout=-1 if timeout is None else max(0, min(timeout, threading.TIMEOUT_MAX)))
        except KeyboardInterrupt:
            if self._engine:
                self._engine.cancel_all()
            raise
        finally:
            with self._condition:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def _open(self):
        """Unpickle the outcome, in the thread that asks for it; the first of several threads decides."""
        packed = self._packed
        if packed is None:
            return
        succeeded, payload = packed
        result = exception = None
        try:
            if succeeded:
                result = unpack(payload)
            else:
                exception = unpack_exception(payload)
        except BaseException as error:          # it may be anything that a user's __setstate__ raises
            if isinstance(error, KeyboardInterrupt):
                raise
            exception = RemoteError(type(error).__name__, f"{error} (the {'result' if succeeded else 'exception'} of "
                                    f"{self._function.name} arrived, but cannot be unpickled here)")
            exception.__cause__ = error
        with self._condition:
            if self._packed is packed:
                self._result, self._exception, self._packed = result, exception, None

    def result(self, timeout=None):
        """The result. Raises the call's exception, CancelledError, or TimeoutError after `timeout` seconds."""
        if not self._wait(timeout):
            raise TimeoutError(f"{self!r} has no result after {timeout:g} s")
        exception = self.exception()
        if exception is not None:
            try:
                raise exception
            finally:
                exception = self = None         # no reference cycle through the traceback
        return self._result

    def exception(self, timeout=None):
        """The call's exception, or None. Raises CancelledError, or TimeoutError after `timeout` seconds."""
        if not self._wait(timeout):
            raise TimeoutError(f"{self!r} has no result after {timeout:g} s")
        if self._state == CANCELLED:
            raise CancelledError()
        self._open()
        return self._exception

    def wait(self, timeout=10):
        """Whether it completed within `timeout` seconds (None: for ever), its handlers included."""
        return self._wait(None if timeout is None else _duration(timeout), handlers=True)

    completed = property(lambda self: self._state in _DONE)

    @property
    def failure(self):
        if self._state == CANCELLED:
            return CancelledError()
        return self.exception() if self._state == FINISHED else None

    @property
    def successful(self):
        return self._state == FINISHED and self.exception() is None

    @property
    def value(self):
        return self._result if self.successful else None

    # -- handlers

    def succeed(self, handler):
        """Call handler(result), once, in a thread of its own, when the call has succeeded; returns this future."""
        return self._handle(True, handler)

    def fail(self, handler):
        """Call handler(exception), once, in a thread of its own, when the call has failed; returns this future."""
        return self._handle(False, handler)

    def _handle(self, succeeded, handler):
        with self._condition:
            start = self._state in _DONE and self._handlers is None        # else somebody is at it, or will be
            self._handlers = (self._handlers or []) + [(succeeded, handler)]
        if start:
            threads.run(self._run_handlers)
        return self

    def _run_handlers(self):
        """Run handlers until none is left, then release who waits for them."""
        while True:
            for succeeded, handler in (entries := self._handlers):
                if self.successful is succeeded:
                    try:
                        handler(self._result if succeeded else self.failure)
                    except BaseException:          # SystemExit, too: whoever waits for the handlers must not wait for ever
                        log.exception("a handler of %r raised", self)
            with self._condition:
                self._handlers = self._handlers[len(entries):] or None
                if self._handlers is None:
                    for waiter in self._waiting or ():
                        if type(waiter) is _Waiter and waiter.handlers:
                            waiter.add_result(self)
                    return

    # -- outcomes

    def cancel(self):
        """Whether it is cancelled now: a waiting call never starts, the worker of a running one is killed."""
        with self._condition:
            if self._state in _DONE:
                return self._state == CANCELLED
        conclude([(self, False, CancelledError())])
        if self._engine:
            self._engine.cancel(self)
        return self._state == CANCELLED

    def _after(self, handle):
        """What user code wants to do now that it is done; in a thread that may block."""
        try:
            self._invoke_callbacks()
        finally:
            if handle:
                self._run_handlers()

    def __reduce__(self):
        raise TypeError(f"{self!r} cannot be pickled: pass its result to the call, or make the call there")


def conclude(outcomes):
    """Give each call of [(call, succeeded, value)] its outcome, unless it has one; any thread.

    value: plain, or a payload; for a failure an exception or its payload."""
    followed, dropped = [], []     # dropped: Refs, which may be the last, and give their values up outside the lock
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
            dropped.append(call._refs)
            call._arguments, call._refs = None, ()
            for waiter in call._waiting or ():
                if call._handlers and type(waiter) is _Waiter and waiter.handlers:
                    continue
                if call._state == CANCELLED:
                    waiter.add_cancelled(call)
                elif succeeded:
                    waiter.add_result(call)
                else:
                    waiter.add_exception(call)
            if call._callbacks or call._handlers:
                followed.append((call, call._handlers is not None))
    for call, handle in followed:
        threads.run(call._after, handle)


class Threads:
    """Runs jobs in daemon threads, one more whenever all are busy, so that a job may block as long as it likes."""

    def __init__(self):
        self._jobs = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0                 # threads that wait, less jobs that are theirs already

    def run(self, job, *args):
        with self._lock:
            if self._idle:
                self._idle -= 1
                self._jobs.put((job, args))
                return
        try:
            threading.Thread(target=self._work, args=(job, args), name="clupy-job", daemon=True).start()
        except RuntimeError as error:  # the interpreter is ending: callbacks of what was still under way are lost
            log.debug("%s is not run: %s", getattr(job, "__qualname__", job), error)

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
        """The next job, or None after a while without one."""
        while True:
            try:
                return self._jobs.get(timeout=10)
            except Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._idle -= 1
                        return None, None


threads = Threads()


# ==== Engine =================================================================
# The client: one thread, one event loop, one owner for every call from `submit` to its outcome.
#
#   submit -> inbox -> queue -> Slot.calls -> conclude
#               any      |  ^        |
#             thread     v  |        +-- recalled, or its worker died: back to the front of the queue
#                  Limit.waiting          (`tries` counts only starts that the server's board has seen)
#
# The methods on_<kind> answer messages; those of ServerLink and Slot that concern calls are the Engine's.

class Limit:
    """At most `most` slots work on the calls that share it; most=None: as many as there are."""

    def __init__(self, most=None):
        self.most = most
        self.pending = 0                          # calls without an outcome
        self.slots = collections.Counter()        # {Slot: calls under way there}
        self.waiting = collections.deque()        # calls put aside while `most` slots are at work
        self.idle = threading.Event()             # set while pending == 0
        self.idle.set()

    def allows(self, slot):
        """Whether a call may be sent there; calls that wait for nested ones do not count."""
        return (self.most is None or slot in self.slots or len(self.slots) < self.most
                or sum(not other.suspended for other in self.slots) < self.most)


class Slot:
    """One connection to one worker; an asyncio.BufferedProtocol through `_as_protocol`."""

    KNOWN = 500                                   # functions that a worker keeps

    def __init__(self, link, number, nested):
        self.link, self.number, self.nested = link, number, nested
        self.engine = link.engine
        self.calls = {}                           # {number: call}
        self.load = 0.0                           # seconds of work under way, as estimated
        self.limits = {}                          # {Limit: calls under way}
        self.functions = collections.OrderedDict()   # {id: None} known to the worker, least recently used first
        self.children = collections.defaultdict(dict)   # {number of a call here: {number there: nested call}}
        self.nested_functions = {}                # {id at the worker: Function}
        self.nested_limits = {}                   # {id at the worker: Limit} of Executors made in calls
        self.pid = None                           # of the worker, once the slot is open
        self.transport = None
        self._outgoing = collections.deque()      # pieces of frames that the transport has not been given yet
        self._full = False                        # it wants no more for now
        self.alone = False                        # runs a call on its last try, and nothing else
        self.stalled = False                      # was asked for what had not begun; no more until a result arrives
        self.recalling = False                    # was asked, and has not answered; what is sent meanwhile is not in the answer
        self.leaving = False                      # to be closed when `calls` is empty
        self.asked_to_close = False
        self.ended = None                         # what the server said of its end
        self.gone = False                         # the connection has been read to its end
        self.over = False                         # its calls were seen to
        self.heard = time.monotonic()             # when anything arrived, or a call was sent to the idle slot
        self._frames = Frames(proof(slot_key(link.key, number), b"opened"))

    def __repr__(self):
        return f"{self.link.name} {self.pid or 'opening'}"

    @property
    def open(self):
        return self.pid is not None and not self.gone and self.ended is None and self.link.connection is not None

    @property
    def suspended(self):
        """Whether the call that runs here has nested calls to wait for, and so does not use its slot."""
        return bool(self.children)

    def send(self, *message):
        if self.transport is not None and not self.transport.is_closing():
            for part in encode(message):
                self._outgoing.extend(part[start:start + SEND_PIECE] for start in range(0, len(part), SEND_PIECE))
            self._write()

    def _write(self):
        while self._outgoing and not self._full:
            self.transport.write(self._outgoing.popleft())

    def recall(self):
        """Ask the worker for what it has not begun, unless it is asked already."""
        if not self.recalling:
            self.recalling = True
            self.send("recall")

    # -- what asyncio calls

    def pause_writing(self):
        self._full = True

    def resume_writing(self):
        self._full = False
        self._write()

    def connection_made(self, transport):
        self.transport = transport

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
        self.engine.slot_ending(self)

    # -- messages from the worker

    def on_opened(self, _, pid):
        self.pid = pid
        self.engine.broken.pop(self.link.id, None)
        self.engine.clear_progress()
        self.engine.fill(self)

    def on_results(self, _, results, seconds):
        self.engine.take_results(self, results, seconds)

    def on_returned(self, _, numbers):
        self.engine.take_back(self, numbers)

    def on_nested(self, _, calls, functions):
        self.engine.take_nested(self, calls, functions)

    def on_forget(self, _, numbers):
        self.engine.forget_nested(self, numbers)

    def on_serve(self, _, name, buffers):
        _serve(name, [bytes(buffer) for buffer in buffers])

    def on_fetch(self, _, request, what, *fields):
        threads.run(self.engine.answer_fetch, self, request, what, fields)


class ServerLink:
    """The control connection to one server, and the slots there."""

    def __init__(self, engine, id, address):
        self.engine, self.id, self.address = engine, id, address
        self.name = f"{address[0]}:{address[1]}"
        self.connection = self.key = self.session = None
        self.slots = {}                           # {number: Slot}, until their calls are seen to
        self.draining = False                     # takes no new slots
        self.failed_at = None                     # when it could not be reached
        self.refused_at = -math.inf               # when it had no room for a nested slot
        self.heard = time.monotonic()
        self.task = asyncio.create_task(self._run())

    def __repr__(self):
        return f"<ServerLink {self.name} {len(self.slots)} slots{' draining' if self.draining else ''}>"

    async def _run(self):
        try:
            connection = await dial(self.address, CONTROL, self.engine.secret, self.engine.settings)
        except Exception as error:                # whatever dialing raises, a host's name that is none included
            log.warning("server %s cannot be reached: %s", self.name, error or type(error).__name__)
            self.engine.link_lost(self)
            return
        self.connection, self.key = connection, connection.key
        self.greet()
        try:
            await connection.serve(self)
        finally:
            self.connection = None
            self.engine.link_lost(self)

    def greet(self):
        libraries = self.engine.libraries
        self.send("hello", self.engine.id, PYTHON, libraries and libraries.plain, self.engine.settings.output)

    def send(self, *message):
        if self.connection:
            self.connection.send(*message)

    def on_welcome(self, _, session, name, versions):
        self.session, self.name = session, name
        if versions["python"] != "%d.%d.%d" % sys.version_info[:3]:
            log.info("server %s runs Python %s, this client %s", name, versions["python"], sys.version.split()[0])
        self.engine.check_server(versions)
        self.engine.balance()

    def on_refused(self, _, kind, text):
        self.engine.fail_all(refusal(kind, text))

    def on_ended(self, _, number, how):
        self.heard = time.monotonic()
        slot = self.slots.get(number)
        if slot:
            slot.ended = how
            self.engine.slot_ending(slot)

    def on_late(self, _, number, call):
        slot = self.slots.get(number)
        if slot and call in slot.calls:           # it had not begun yet, or its result is on its way: ask again
            asyncio.get_running_loop().call_later(0.05, self.engine.kill, slot, call)

    def on_output(self, connection, pid, stream, text, dropped):
        self.heard = time.monotonic()
        self.engine.show(connection, self.name, pid, stream, text, dropped)

    def on_notice(self, _, what, text):
        self.heard = time.monotonic()
        if what == "draining":
            self.draining = True
            self.engine.balance()
        elif what == "renew":
            self.engine.renew(self)
        elif what == "building":
            self.engine.show_building(self, text)
        elif what == "broken":
            self.engine.libraries_broken(self, text)


def refusal(kind, text):
    """The error that a peer's `refused` stands for."""
    known = {cls.__name__: cls for cls in (VersionMismatch, SecretError, ProtocolError, ConfigurationError)}
    return known.get(kind, ClupyError)(text)


class Engine:
    """One client. `submit`, `cancel`, `cancel_all` and `close` may be called by any thread, all else by its loop."""

    def __init__(self, settings, secret=None, dependencies=None):
        self.id = os.urandom(8).hex()
        self.settings = settings
        self.secret = secret                      # None: an embedded cluster makes its own
        self.dependencies = dependencies          # this client's own list
        self.libraries = None                     # Resolution of it and the master's; None: the cluster's
        self.resolving = bool(dependencies and dependencies.libraries)   # no slots are wanted until the list is resolved
        self.checking = settings.library_check == "error"          # nor until the libraries were compared, if that matters
        self.broken = {}                          # {server name: why our libraries cannot be built there}
        self.pid = os.getpid()
        self._inbox = collections.deque()         # calls from any thread, not yet seen by the loop
        self._awake = False                       # the loop will look at the inbox
        self._queue = collections.deque()         # calls that wait for a slot, next one first
        self._numbers = itertools.count(1)
        self._unlimited = Limit()                 # the calls without a limit of their own
        self._limits = set()                      # limits with unfinished calls
        self._links = {}                          # {server id: ServerLink}
        self._share = {}                          # {server id: ((host, port), slots)}; the last one from the master
        self.said = {}                       # what the master says of Redis and ZooKeeper
        self._master = None                       # MasterLink
        self._wanted = (0, 0.0)                   # most slots wanted, and when
        self._stated = 0.0                        # when the last statement was sent
        self.fatal = None                        # an error that every call gets from now on
        self._closing = False
        self._watching = self._stating = False
        self._unserved = None                     # since when calls wait without any slot; inf: it was said
        self._progress = False                    # a line of pip's stands on the terminal
        self._printer = self._printing = None     # queue and thread that show what calls print
        self.joined = threading.Event()           # a first share, or a fatal error, is there
        self.embedded = None                      # (Master, Server) of the embedded cluster
        self._selector = selectors.DefaultSelector()
        self.loop = asyncio.SelectorEventLoop(self._selector)
        self._thread = threading.Thread(target=self._main, name="clupy-engine", daemon=True)
        self._thread.start()

    def __repr__(self):
        slots = sum(len(link.slots) for link in self._links.values())
        return f"<Engine {self.id[:6]} {len(self._queue)} calls waiting, {slots} slots{' closing' if self._closing else ''}>"

    # -- for any thread

    def submit(self, call):
        self._inbox.append(call)
        if not self._awake:
            self._awake = True
            self._soon(self._pump)

    def cancel(self, call):
        self._soon(self._cancelled, call)

    def cancel_all(self):
        """Cancel every unfinished call of this client; those made after it returned are not among them."""
        done = threading.Event()
        self._soon(self._cancel_all)
        self._soon(done.set)
        if not self._closing:
            done.wait(CLOSE_TIME)

    def close(self):
        """End all calls and slots; returns when the last output was shown, after CLOSE_TIME at most."""
        if self._closing or self.pid != os.getpid():
            return
        self._closing = True
        try:
            asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(CLOSE_TIME + 2)
        except TimeoutError:
            log.error("closing took more than %g s; leaving the rest to the servers", CLOSE_TIME + 2)
        if self._printing:
            self._printing.join(CLOSE_TIME)       # the last lines are read, but may not be shown yet
        self._soon(self.loop.stop)
        self._thread.join(CLOSE_TIME)
        _engines.discard(self)
        self._lose()

    def unfinished(self):
        """About how many calls have no outcome yet."""
        return 0 if self._closing else len(self._inbox) + self._unlimited.pending + sum(
            limit.pending for limit in list(self._limits))

    def grow(self, slots):
        """At least so many slots, if this is an embedded cluster."""
        self._soon(self._grow, slots)

    def services(self, patience):
        """What the master says of Redis and ZooKeeper; {} if this cluster is embedded, or nothing is heard in time."""
        if not self.joined.wait(patience):
            raise self.unreachable()
        if self.fatal and not self.said:
            raise self.fatal
        return {} if self.embedded else self.said

    def settle(self, limit):
        """Wait until no call of this limit is unfinished."""
        if self._closing:
            return
        asyncio.run_coroutine_threadsafe(self._pumped(), self.loop).result()
        limit.idle.wait()

    def cancel_limit(self, limit):
        """Cancel the calls of this limit that have not been sent to a worker."""
        if self._closing:
            return
        asyncio.run_coroutine_threadsafe(self._pumped(), self.loop).result()
        for call in [call for call in [*self._queue, *limit.waiting] if call._limit is limit]:
            call.cancel()

    async def _pumped(self):
        self._pump()

    def abandon(self):
        """In a forked child: close every descriptor by number, and tell the child's copies of calls that they are lost.

        Never through asyncio, which would take the parent's sockets out of the epoll that both share."""
        for number in () if self.loop.is_closed() else self.descriptors():
            with contextlib.suppress(OSError):    # closed by the parent's loop in this very moment
                os.close(number)
        self._inbox.extend([*self._waiting(), *(call for slot in self._slots() for call in slot.calls.values())])
        for limit in self._limits:                # they outlive the engine, with the functions that have them
            limit.__init__(limit.most)
        self._soon = self._lose
        self._lose()

    def _soon(self, function, *args):
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:                      # the loop is closed
            self._lose()

    def _lose(self, *_):
        """No loop will look at the inbox any more."""
        self._awake = False                       # first: a call that is submitted now comes here by itself
        calls = list(self._inbox)
        why = "the client was closed" if self.pid == os.getpid() else "the call is one of the process that forked this one off"
        conclude([(call, False, Closed(why)) for call in calls])

    def _waiting(self):
        """The calls that wait for a slot."""
        return [*self._queue, *(call for limit in self._limits for call in limit.waiting)]

    def descriptors(self):
        """The numbers of the engine's open files: a forked child closes them, and nothing else of the engine."""
        numbers = {key.fd for key in list(self._selector.get_map().values())} | {self._selector.fileno()}
        for link in list(self._links.values()):
            for slot in list(link.slots.values()):
                if slot.transport:
                    numbers.add(slot.transport.get_extra_info("socket").fileno())
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

    async def _live(self):
        try:
            self._master = MasterLink(await self._find_masters(), self.secret, self.settings)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._master.run(self))
                tasks.create_task(self._tick())
        except* Exception as group:               # the engine's edge: no call may wait for an engine that is no more
            if not self._closing:                 # else the interpreter ends, and has begun to take things away
                log.error("the engine failed", exc_info=group)
            self.fail_all(ClupyError(f"the engine failed: {group.exceptions[0]!r}"))

    async def _find_masters(self):
        """The masters' addresses: those of the settings, one that answers on localhost, or an embedded one's."""
        if self.settings.master:
            return masters_of(self.settings)
        if self.secret:
            address = ("127.0.0.1", self.settings.port)
            try:
                (await dial(address, TO_MASTER, self.secret, self.settings)).close()
                return [address]
            except ConnectionRefusedError:
                pass
            except (OSError, ClupyError) as error:
                log.warning("%s:%s is not our master (%s); using this machine's cores instead", *address, error)
        return [await self._embed()]

    async def _embed(self):
        """Start a master and a server in this loop, on loopback, with a secret of their own."""
        self.secret = os.urandom(32).hex().encode()
        services = merged_services(self.settings, {})             # the workers' are this process's
        own = {**vars(self.settings), **{key: getattr(services, key) for key in SERVICE_KEYS}}
        master = clupy_master.Master(default_settings("master", **own, listen=("127.0.0.1", 0)), self.secret)
        server = clupy_server.Server(default_settings("server", **{**own, "master": [master.address]}, listen=("127.0.0.1", 0)),
                        self.secret)
        master.given = sorted(services.given)
        self.embedded = master, server
        await server.start()
        return master.address

    def master_joined(self, connection):
        if self.dependencies and self.dependencies.libraries:
            task = self.loop.create_task(self._send_list(connection))
            task.add_done_callback(self._list_sent)
        elif self.settings.library_check != "off" and not self.embedded:
            connection.send("libraries", None)
        if self.embedded:
            self.checking = False                 # workers run this very Python
        self._state()

    async def _send_list(self, connection):
        own, wheels = await clupy_master.packed(self.dependencies, self._show_progress)
        connection.send("resolve", own.libraries, own.pip_options, wheels)

    def _list_sent(self, task):
        if not task.cancelled() and task.exception():
            self.fail_all(task.exception())

    def on_resolved(self, _, found, error):
        self.clear_progress()
        if error and self.libraries is None:
            self.fail_all(DependencyError(*error))
        elif error:
            log.warning("our libraries stay as they were: %s", DependencyError(*error))
        else:
            self.libraries, self.resolving = clupy_master.Resolution.of(found), False
            self._check(self.libraries.pins)
            for link in self._links.values():
                link.greet()                      # the server asks for the slots back once it has the new ones
            self._update_wanted()
            self._state()

    def on_libraries(self, _, _hash, found):
        self._check(clupy_master.Resolution.of(found).pins)

    def _check(self, pins):
        """Compare the libraries of its workers with this client's, in a thread, since it reads files."""
        if self.settings.library_check != "off" and not self.embedded:
            threads.run(self._check_in_thread, pins)

    def _check_in_thread(self, pins):
        try:
            clupy_master.check_libraries(pins, self.settings.library_check)
        except LibraryMismatch as error:
            self._soon(self.fail_all, error)
        self._soon(self._checked)

    def _checked(self):
        self.checking = False
        self._update_wanted()

    def on_notice(self, _, what, text):
        self._show_progress(text)

    def _show_progress(self, line):
        self._progress = True
        clupy_master.show_progress(f"clupy: {line}")

    def clear_progress(self):
        if self._progress:
            self._progress = False
            clupy_master.show_progress("")

    def master_lost(self):
        """Calls that have slots go on; `_judge` looks after the others."""

    def _state(self):
        """Say to the master what this client wants."""
        self._stating = False
        now = time.monotonic()
        most, at = self._wanted
        if now - at > 1.0:
            self._wanted = most, _ = self._count_wanted(), now
        self._stated = now
        if self._master and self._master.connection:
            unreachable = [link.id for link in self._links.values() if link.failed_at is not None]
            self._master.connection.send("client", self.id, PYTHON, most, unreachable,
                                         self.libraries and self.libraries.hash)

    def _count_wanted(self):
        """How many slots the unfinished calls could use now."""
        if self.resolving or self.checking:
            return 0
        suspended = collections.Counter(slot.calls[number]._limit for slot in self._slots() for number in slot.children
                                        if number in slot.calls)
        limited = sum(min(limit.pending - suspended[limit], limit.most or limit.pending) for limit in self._limits)
        return self._unlimited.pending - suspended[None] + limited

    def _update_wanted(self):
        """After a change of the unfinished calls: a larger wish is stated at once, or after GATHER_TIME."""
        if not self._limits and self._unlimited.pending <= self._wanted[0]:
            return
        wanted = self._count_wanted()
        if wanted > self._wanted[0]:
            self._wanted = wanted, time.monotonic()
            if not self._stating:
                self._stating = True
                self.loop.call_later(max(0.0, self._stated + GATHER_TIME - time.monotonic()), self._state)

    async def _tick(self):
        """Every STATEMENT_TIME: state, and look for what ended without a word."""
        woke = time.monotonic()
        while True:
            await asyncio.sleep(STATEMENT_TIME / 2)
            now = time.monotonic()
            if now - woke > STATEMENT_TIME / 2 + 1:       # we slept, not the others: start all clocks anew
                for link in self._links.values():
                    link.heard = now
                    for slot in link.slots.values():
                        slot.heard = now
                if self._master:
                    self._master.lost_at = now
            woke = now
            if now - self._stated >= STATEMENT_TIME * 0.9:
                self._state()
            if self._master:
                self._master.look(now)
            self._judge(now)
            self.balance()

    def _judge(self, now):
        for link in list(self._links.values()):
            if link.failed_at is not None and now - link.failed_at > RETRY_TIME and not link.slots:
                del self._links[link.id]
                self.broken.pop(link.id, None)
            heard = max([link.heard] + [slot.heard for slot in link.slots.values()])
            if link.connection and now - heard > SILENCE_TIME and any(slot.calls for slot in link.slots.values()):
                log.warning("server %s has been silent for %g s; it is lost", link.name, SILENCE_TIME)
                link.connection.close()
        if self._slots() or not self._waiting() or not self._count_wanted():
            self._unserved = None
        elif self._unserved is None:
            self._unserved = now
        elif now - self._unserved > UNSERVED_TIME and self._master:
            self._unserved = math.inf             # said once
            if self._master.connection:
                log.warning("calls wait (%s): the master at %s has no server with a slot for them; start one with: "
                            "python -m clupy serve", len(self._waiting()), self._master.connection.peer)
            else:
                log.warning("calls wait (%s), for %g s at most: %s", len(self._waiting()), self.settings.patience,
                            self.unreachable())
        if not self._slots() and self._waiting() and self.masterless(now) > self.settings.patience:
            self._fail_waiting(self.unreachable())

    def masterless(self, now):
        """Seconds without a master."""
        return 0.0 if self._master is None or self._master.connection else now - self._master.lost_at

    def unreachable(self):
        why = self._master.why_lost if self._master else "none was found yet"
        return MasterUnreachable(f"no master for {self.masterless(time.monotonic()):.1f} s ({why}); "
                                 "is `python -m clupy master` running there?")

    def _slots(self):
        return [slot for link in self._links.values() for slot in link.slots.values()]

    # -- messages from the master

    def on_share(self, _, share, services):
        self._share = {id: ((host or self._master.host, port), slots) for id, ((host, port), slots) in share.items()}
        if services != self.said:
            self.said = services
        self.joined.set()
        self.balance()
        if self.broken and not any(slots or id not in self.broken for id, (_, slots) in self._share.items()):
            why = next(iter(self.broken.values()))             # no server is left that might have our libraries
            self._fail_waiting(DependencyError(why.partition("\n")[0], why.split("\n")[1:]))

    def on_leader(self, _, address):
        self._master.follow(address)

    def on_refused(self, _, kind, text):
        self.fail_all(refusal(kind, text))

    # -- slots: as many as the share says, where it says

    def balance(self):
        """Open and close slots until they are what the share says."""
        if self._closing:
            return
        for id, (address, slots) in self._share.items():
            if slots and id not in self._links:
                self._links[id] = ServerLink(self, id, address)
        wanted = self._count_wanted()
        for link in list(self._links.values()):
            if link.session is not None and link.connection:
                self._balance_link(link, self._share[link.id][1] if link.id in self._share else None, wanted)
        self._dispatch()

    def _balance_link(self, link, granted, wanted):
        """granted: slots there by the share; None: it does not name the server, so keep what is open."""
        if granted is None and not link.draining:
            return
        staying = [slot for slot in link.slots.values()
                   if (slot.suspended or not slot.leaving) and slot.ended is None and not slot.gone]
        allowed = granted if not link.draining else int(any(slot.suspended for slot in staying))    # children must run
        active = [slot for slot in staying if not slot.suspended]
        if len(active) > allowed:
            now = time.monotonic()
            active.sort(key=lambda slot: (len(slot.calls), slot.load))
            for slot in active[:len(active) - allowed]:
                if not (slot.nested and allowed and not slot.calls and now - slot.heard < LINGER_TIME):
                    self._leave(slot)
        elif allowed and wanted > 0:
            for _ in range(allowed - len(staying)):
                self._open(link, nested=False)
            if (not active and len(staying) >= allowed and time.monotonic() - link.refused_at > LINGER_TIME
                    and any(call._parent for call in self._queue)):
                self._open(link, nested=True)

    def _open(self, link, nested):
        self._start_printing()
        number = next(self._numbers)
        slot = link.slots[number] = Slot(link, number, nested)
        slot.task = asyncio.create_task(self._connect(slot))

    async def _connect(self, slot):
        link = slot.link
        try:
            sock = await connect_socket(*link.address)
        except OSError as error:
            log.warning("no slot at %s: %s", link.name, error)
            slot.gone = True
            slot.ended = {"why": "unreachable", "begun": 0}
            if link.connection:
                link.connection.close()           # as a server that cannot be reached: again after RETRY_TIME
            self.slot_ending(slot)
            return
        try:
            tune(sock, user_timeout=False)
            async with asyncio.timeout(HANDSHAKE_TIME):
                head = preamble(SLOT) + slot_head(link.key, link.session, slot.number, slot.nested)
                await self.loop.sock_sendall(sock, head)
            context = tls_context(self.settings, "dial")
            tls = {"server_hostname": link.address[0], "ssl_handshake_timeout": NO_LIMIT} if context else {}
            await self.loop.create_connection(lambda: _as_protocol(slot), sock=sock, ssl=context, **tls)
        except BaseException as error:
            sock.close()
            slot.gone = True
            self.slot_ending(slot)                # turned away: the server's `ended` says why
            if not isinstance(error, OSError):
                raise
            return
        slot.send("opening", own_modules())

    def check_server(self, versions):
        """cloudpickle is in no list as a rule, but everything travels by it."""
        if not self.embedded and versions.get("cloudpickle"):      # before a slot is opened
            try:
                pins = [clupy_master.Pin("cloudpickle", versions["cloudpickle"])]
                clupy_master.check_libraries(pins, self.settings.library_check)
            except LibraryMismatch as error:
                self.fail_all(error)

    def renew(self, link):
        """The cluster's libraries changed: slots with the old ones go back after the calls under way."""
        for slot in list(link.slots.values()):
            self._leave(slot)
        self.balance()

    def show_building(self, link, line):
        self._show_progress(f"{link.name}: {line}")

    def libraries_broken(self, link, why):
        """Our libraries cannot be built there: use other servers; if the next share names none, the calls hear of it."""
        self.broken[link.id] = why
        link.draining = True                      # what runs there, in the environment before, goes on
        self.balance()
        self._leave_broken(link)

    def _leave_broken(self, link):
        if link.id in self.broken and not link.slots and link.connection:
            link.connection.close()

    def _leave(self, slot):
        """Give the slot back after the call that runs in it."""
        slot.leaving = True
        if len(slot.calls) > 1:
            slot.recall()
        elif not slot.calls:
            self._end(slot)

    def _end(self, slot):
        """Ask the server to end the slot, now."""
        if not slot.asked_to_close:
            slot.asked_to_close = True
            slot.link.send("close", slot.number)

    def slot_ending(self, slot):
        """The connection was read to its end, or the server said `ended`: wait for the other, or for 1 s of silence."""
        if slot.over:
            return
        if slot.gone and slot.ended is not None:
            self._slot_over(slot)
        else:
            self.loop.call_later(1.0, self._slot_settled, slot, slot.heard)

    def _slot_settled(self, slot, heard):
        if not slot.over and slot.heard != heard and not slot.gone:
            self.loop.call_later(1.0, self._slot_settled, slot, slot.heard)     # results are still arriving
        elif not slot.over:
            self._slot_over(slot)

    def _slot_over(self, slot):
        """See to the calls that got no answer: who is charged with a try, who starts again, who has lost."""
        slot.over = True
        slot.link.slots.pop(slot.number, None)
        if slot.ended is None:
            self._end(slot)                       # its worker may not know yet
        if slot.transport:
            slot.transport.abort()
        how = slot.ended or {"why": "lost", "begun": None}
        for number in list(slot.children):
            self._cancel_children(slot, number)
        outcomes, again = [], []
        left = list(slot.calls.values())
        begun_ones = had_begun([call._number for call in left], how["begun"])
        if left and how["why"] == "died" and not any(begun_ones):
            left[0]._spared += 1                  # it may be its arguments that no worker can receive
            begun_ones[0] = left[0]._spared > MAX_SPARED
        for call, begun in zip(left, begun_ones):
            call._tries += begun
            self._unsend(slot, call)
            if call._state in _DONE:
                outcomes.append((call, False, CancelledError()))
            elif how["why"] == "timeout" and call._number == how["begun"]:
                outcomes.append((call, False, timed_out(call, slot, how)))
            elif call._tries > call._retries:
                outcomes.append((call, False, died(call, slot, how)))
            else:
                again.append(call)
        slot.calls.clear()
        if slot.nested and how["why"].startswith("max_nested"):
            slot.link.refused_at = time.monotonic()
            stuck = all(other.suspended for other in self._slots())
            child = next((call for call in self._queue if call._parent), None) if stuck else None
            if child:
                self._queue.remove(child)
                outcomes.append((child, False, ClupyError(
                    f"calls inside calls wait for each other in all workers of {slot.link.name} ({how['why']}); a module that "
                    "makes calls when it is imported does so in every worker: put them under if __name__ == '__main__'")))
        self._requeue(again)
        self._finish(outcomes)
        self._leave_broken(slot.link)
        self.balance()

    def link_lost(self, link):
        """The control connection could not be made, or ended, and with it, soon, every slot there."""
        link.failed_at = time.monotonic()
        self._share.pop(link.id, None)
        for slot in list(link.slots.values()):
            self.slot_ending(slot)
        self._state()

    # -- calls: from the queue into slots

    def _pump(self):
        """Take what is in the inbox."""
        self._awake = False
        inbox = self._inbox
        for _ in range(len(inbox)):
            self._enqueue(inbox.popleft())
        if inbox and not self._awake:
            self._awake = True
            self.loop.call_soon(self._pump)
        self._update_wanted()
        if self._queue and not self._slots():
            self.balance()                        # the last slot has ended, but not the share
        else:
            self._dispatch()

    def _enqueue(self, call):
        if call._state in _DONE:
            return
        call._number = next(self._numbers)
        limit = call._limit or self._unlimited
        limit.pending += 1
        if limit is not self._unlimited:
            limit.idle.clear()
            self._limits.add(limit)
        call._counted = True
        if self.fatal or self._closing:
            self._finish([(call, False, self.fatal or Closed("the client was closed"))])
        elif call._parent:
            self._queue.appendleft(call)
        else:
            self._queue.append(call)

    def _dispatch(self):
        slots = [slot for slot in self._slots() if slot.open and not slot.leaving]
        if not slots or not (self._queue or any(limit.waiting for limit in self._limits)):
            return
        slots.sort(key=lambda slot: (slot.load, -slot.heard))     # of the idle ones that which is still warm
        quota = -(-len(self._queue) // len(slots)) or 1
        for slot in slots:
            self.fill(slot, quota)

    def fill(self, slot, quota=None):
        """Send the slot its next calls, if it runs out of work soon."""
        calls = slot.calls
        if (slot.leaving or slot.recalling or not slot.open
                or calls and (slot.alone or slot.stalled or slot.load > WORK_AHEAD / 2)
                or not calls and self._overdrawn(slot.link)):
            return
        if quota is None:
            quota = -(-len(self._queue) // max(1, len(slot.link.slots))) or 1
        batch, items, now = [], [], time.monotonic()
        while (not calls or slot.load < WORK_AHEAD and len(calls) < MAX_AHEAD and not slot.alone) and quota:
            call = self._next_for(slot)
            if call is None:
                break
            self._learn(slot, call._function, items)
            if call._arguments is not None:
                items.append((call._number, call._function.id, call._arguments, call._timeout))
                self._mark_sent(slot, call, now)
                batch.append(call)
                quota -= 1
        if not items:                             # there may be a function alone, as its call was cancelled just now
            return
        with Future._condition:
            for call in batch:
                if call._state == PENDING:
                    call._state = RUNNING
        if len(batch) == len(calls):
            slot.heard = now
        slot.send("calls", items)
        if len(calls) > 1:
            self._watch()

    def _overdrawn(self, link):
        """Whether the slots at work there, less those that wait for nested calls, are all that the share allows."""
        granted = self._share[link.id][1] if link.id in self._share else None
        return granted is not None and sum(bool(s.calls) and not s.suspended for s in link.slots.values()) >= max(granted, 1)

    def _next_for(self, slot):
        """The next call that may be sent to this slot, or None."""
        for limit in slot.limits:
            while limit.waiting:
                if self._must_be_alone(limit.waiting[0]) and slot.calls:
                    return None
                call = limit.waiting.popleft()
                if call._state not in _DONE:
                    return call
        queue = self._queue
        while queue:
            if self._must_be_alone(queue[0]) and slot.calls:
                return None
            call = queue.popleft()
            if call._state in _DONE:
                self._unpark(call._limit)         # it was here for all of its limit that are put aside
            elif call._limit and not call._limit.allows(slot):
                call._limit.waiting.append(call)
            else:
                return call
        return None

    @staticmethod
    def _must_be_alone(call):
        """A call on its last try goes to an idle slot, so that it is known whether it began."""
        return call._tries >= call._retries and call._state not in _DONE

    def _learn(self, slot, function, items):
        """Send the function along if the worker does not know it; let it drop what was not used for long."""
        if function.id in slot.functions:
            slot.functions.move_to_end(function.id)
            return
        slot.functions[function.id] = None
        if len(slot.functions) > slot.KNOWN:
            items.append((0, slot.functions.popitem(last=False)[0], None, None))
        items.append((0, function.id, function.payload, (function.name, function.setup)))

    def _mark_sent(self, slot, call, now):
        slot.calls[call._number] = call
        slot.alone = call._tries >= call._retries
        call._slot, call._sent_at = slot, now
        call._cost = WORK_AHEAD if call._function.mean is None else call._function.mean
        slot.load += call._cost
        limit = call._limit
        if limit:
            limit.slots[slot] += 1
            slot.limits[limit] = limit.slots[slot]

    def _unsend(self, slot, call):
        """Undo `_mark_sent`, but for slot.calls."""
        slot.load -= call._cost
        limit = call._limit
        if limit:
            limit.slots[slot] -= 1
            if not limit.slots[slot]:
                del limit.slots[slot], slot.limits[limit]
                self._unpark(limit)

    def _unpark(self, limit):
        """Another slot may work on the calls of this limit: one of those put aside goes back to the front."""
        while limit and limit.waiting:
            call = limit.waiting.popleft()
            if call._state not in _DONE:
                self._queue.appendleft(call)
                return

    def _requeue(self, calls):
        """Back to the front of the queue, in their order; they may be cancelled as waiting calls again."""
        with Future._condition:
            for call in calls:
                call._slot = None
                if call._state == RUNNING:
                    call._state = PENDING
        self._queue.extendleft(reversed(calls))

    def _watch(self):
        """Look after STALL_TIME whether calls wait behind a long one, or behind many while another slot idles."""
        if not self._watching:
            self._watching = True
            self.loop.call_later(STALL_TIME, self._recall_stalled)

    def _recall_stalled(self):
        self._watching = False
        now, slots = time.monotonic(), self._slots()
        idle = not self._queue and any(slot.open and not slot.leaving and not slot.calls for slot in slots)
        for slot in slots:
            if len(slot.calls) > 1:
                if not slot.stalled and (idle or now - slot.heard >= STALL_TIME):
                    slot.stalled = True
                    slot.recall()
                self._watch()

    # -- calls: their answers

    def take_results(self, slot, results, seconds):
        mean = seconds / len(results)
        outcomes, calls, last = [], slot.calls, None
        for number, succeeded, value in results:
            call = calls.pop(number, None)
            if call is None:
                continue
            self._unsend(slot, call)
            if call._function is not last:
                last = call._function
                last.mean = mean if last.mean is None else 0.7 * last.mean + 0.3 * mean
            call._took = slot.heard - call._sent_at
            if slot.children:
                self._cancel_children(slot, number)
            outcomes.append((call, succeeded, value))
        slot.alone = slot.stalled = False
        if not calls:
            slot.load = 0.0
        self._finish(outcomes)
        if slot.leaving:
            if not calls:
                self._end(slot)
        else:
            self.fill(slot)
        if self._queue and self._idle_elsewhere(slot):
            self._dispatch()

    def _idle_elsewhere(self, slot):
        return any(not other.calls for other in self._slots() if other is not slot)

    def take_back(self, slot, numbers):
        slot.recalling = False
        calls = [slot.calls.pop(number) for number in numbers if number in slot.calls]
        for call in calls:
            self._unsend(slot, call)
        self._requeue([call for call in calls if call._state not in _DONE])
        for call in list(slot.calls.values()):
            if call._state in _DONE:              # cancelled while others waited behind it
                self.kill(slot, call._number)
        if slot.leaving and not slot.calls:
            self._end(slot)
        self._dispatch()

    def _finish(self, outcomes):
        """Every call ends here, exactly once: [(call, succeeded, value)]."""
        answers = collections.defaultdict(list)
        for call, succeeded, value in outcomes:
            if self._uncount(call) and call._parent:
                slot, number = call._parent
                self._end_child(slot, call)
                if isinstance(value, BaseException):
                    value = pack_exception(value)
                answers[slot].append((number, succeeded, forwarded(value)))
        conclude(outcomes)
        for slot, results in answers.items():
            slot.send("results", results)

    def _uncount(self, call):
        """Whether it was among the unfinished calls until now."""
        if not call._counted:
            return False
        call._counted = False
        limit = call._limit or self._unlimited
        limit.pending -= 1
        if not limit.pending and limit is not self._unlimited:
            limit.idle.set()
            self._limits.discard(limit)
        return True

    def _cancelled(self, call):
        """A call was cancelled by its caller: it has its outcome, the rest of it must go."""
        self._pump()
        self._finish([(call, False, CancelledError())])
        slot = call._slot
        if slot is None or call._number not in slot.calls:
            return
        if len(slot.calls) > 1:
            slot.recall()                         # `take_back` kills it if it is not among what comes back
        else:
            self.kill(slot, call._number)

    def kill(self, slot, number):
        if number in slot.calls and not slot.over:
            slot.link.send("kill", slot.number, number)

    def _cancel_all(self):
        self._pump()
        sent = [call for slot in self._slots() for call in slot.calls.values()]
        for call in [*self._waiting(), *sent]:
            if not call._parent:
                call.cancel()

    def fail_all(self, error):
        """No call can succeed any more: give this error to all, now and later."""
        self.fatal = error
        self.joined.set()
        self._pump()
        self._fail_waiting(error)

    def _fail_waiting(self, error):
        waiting = self._waiting()
        if waiting and not self._closing:
            log.warning("calls cannot run (%s): %s", len(waiting), error)
        self._queue.clear()
        for limit in self._limits:
            limit.waiting.clear()
        self._finish([(call, False, error) for call in waiting])

    # -- nested calls: made by a call that runs in a slot, queued here like any other, newest first

    def take_nested(self, slot, calls, functions):
        for id, function in functions.items():
            if function is None:
                slot.nested_functions.pop(id, None)
            else:
                payload, name, setup = function
                slot.nested_functions[id] = function_of(forwarded(payload), name, forwarded(setup))
        for number, parent, function, arguments, timeout, retries, limit in calls:
            function = slot.nested_functions[function]
            if limit:
                executor, most = limit            # None: the limit is the function's
                limit = function.limit(most) if executor is None else slot.nested_limits.setdefault(executor, Limit(most))
            call = Future(self, function, forwarded(arguments), timeout, retries, limit)
            call._parent = slot, number
            call._outer = parent
            if parent in slot.calls:
                slot.children[parent][number] = call
                self._enqueue(call)
            else:                                 # made by a thread that its call left behind
                slot.send("results", [(number, False, pack_exception(CancelledError()))])
        for limit in slot.limits:                 # its call does not count any more: another may run
            self._unpark(limit)
        self._update_wanted()
        self.balance()

    def _end_child(self, slot, call):
        children = slot.children.get(call._outer)
        if children is not None:
            children.pop(call._parent[1], None)
            if not children:
                del slot.children[call._outer]

    def _cancel_children(self, slot, parent):
        for call in list(slot.children.pop(parent, {}).values()):
            call.cancel()

    def forget_nested(self, slot, numbers):
        for children in list(slot.children.values()):
            for number in numbers:
                if number in children:
                    children[number].cancel()

    # -- what workers ask and print

    def answer_fetch(self, slot, request, what, fields):
        """In a thread that may block: the source of a module, or a value that was shared."""
        try:
            answer = FETCHES[what](*fields)
        except Exception as error:                # the asking worker must hear of it, whatever it is
            log.exception("cannot answer a worker that asked for %s %s", what, fields)
            answer = error.__class__.__name__ + ": " + str(error)
        self._soon(slot.send, "fetched", request, answer)

    def _start_printing(self):
        """Before the first slot: when the interpreter ends, and the last lines come, no thread can be started."""
        if self._printer is None and self.settings.output:
            self._printer = SimpleQueue()
            self._printing = threading.Thread(target=self._print, args=(self._printer,), name="clupy-output", daemon=True)
            self._printing.start()

    def show(self, connection, server, pid, stream, text, dropped):
        self._printer.put((connection, server, pid, stream, text, dropped))

    def _print(self, entries):
        while (entry := entries.get()) is not None:
            connection, server, pid, stream, text, dropped = entry
            target = sys.stderr if stream == "err" else sys.stdout
            lines = text.removesuffix("\n").split("\n") if text else []
            if dropped:
                lines.append(f"... {dropped} lines were not shown: more than {UNSEEN_OUTPUT >> 10} KiB were waiting")
            if target is not None:
                try:
                    write_text(target, "".join(f"[{server} {pid}] {line}\n" for line in lines))
                except (OSError, ValueError) as error:      # a closed pipe or stream: output ends, calls do not
                    log.debug("output of %s cannot be shown: %s", server, error)
            self._soon(connection.send, "seen", len(text))

    # -- the end

    async def _close(self):
        """Cancel what is unfinished, end every slot, and wait for its last output."""
        self._cancel_all()
        deadline = self.loop.time() + CLOSE_TIME
        for slot in self._slots():
            self._end(slot)
        while any(slot.pid for slot in self._slots()) and self.loop.time() < deadline:
            await asyncio.sleep(0.005)
        if self._printer:
            self._printer.put(None)
        for link in self._links.values():
            if link.connection:
                link.connection.abort()
            link.task.cancel()
            for slot in link.slots.values():
                slot.task.cancel()
                if slot.transport:
                    slot.transport.abort()
        if self._master:
            self._master.close()
        self._life.cancel()                       # it may be about to start the embedded cluster
        await asyncio.wait([self._life])
        for part in reversed(self.embedded or ()):
            await part.close()
        self._fail_waiting(Closed("the client was closed"))

    def _grow(self, slots):
        if self.embedded:
            self.embedded[1].grow(slots)
        elif not self.joined.is_set():
            self.loop.call_later(0.01, self._grow, slots)


def write_text(stream, text):
    """Write whole lines at one stroke, so that what other threads print does not come in between.

    Below the text layer where there is one below: up to 3.12.3 a write that finds its buffer full loses what another
    thread writes meanwhile (python/cpython#119506)."""
    stream.flush()
    if buffer := getattr(stream, "buffer", None):
        buffer.write(text.encode(stream.encoding, "backslashreplace"))
    else:
        stream.write(text)
    stream.flush()


def _as_protocol(slot):
    """The slot as asyncio wants it: asyncio asks for its own base class, which is not there at import."""
    protocol = _protocol_class()()
    for name in ("connection_made", "connection_lost", "pause_writing", "resume_writing", "get_buffer", "buffer_updated",
                 "eof_received"):
        setattr(protocol, name, getattr(slot, name))
    return protocol


@functools.cache
def _protocol_class():
    return type("SlotProtocol", (asyncio.BufferedProtocol,), {})


def had_begun(numbers, begun):
    """For each unanswered call of a slot, in the order sent: whether it had begun when the slot ended.

    begun: the number of the last call that the worker noted on its board; None: not known, so all may have.
    Those before it in the order had begun as well, and their results were lost."""
    if begun is None:
        return [True] * len(numbers)
    last = numbers.index(begun) if begun in numbers else -1
    return [index <= last for index in range(len(numbers))]


def died(call, slot, how):
    """The WorkerDied of a call on its last try; `how` is what the server said of the slot's end."""
    server, pid = slot.link.name, how.get("pid") or slot.pid
    if how["why"] == "lost":
        return WorkerDied(f"server {server} was lost while worker {pid} had {call._function.name}, try {call._tries} of "
                          f"{call._retries + 1}; why is not known: is the machine up, and what does the server's log say?")
    what = how.get("reason", how["why"]) if how["why"] == "died" else f"was ended ({how['why']})"
    verb = {"signal": "got ", "exit": "ended with "}.get(what.split()[0], "")
    text = (f"worker {pid} on {server} {verb}{what} while running "
            f"{call._function.name}, try {call._tries} of {call._retries + 1}")
    if how.get("peak"):
        of = f" of {how['limit'] / 2**30:.2f}" if how.get("limit") else ""
        text += f"; peak memory {how['peak'] / 2**30:.2f}{of} GB"
    if how.get("code") == -9 and how["why"] == "died":
        text += "; nobody here sent it, so the system may have been out of memory"
    for title, lines in (("its last lines of standard error", how.get("lines")),
                         ("it was at", [line for line in how.get("stack", "").splitlines() if "clupy" not in line])):
        if lines:
            text += f"; {title}:\n  " + "\n  ".join(lines)
    return WorkerDied(text)


def timed_out(call, slot, how):
    """The CallTimeout of a call; names the place at which it was."""
    text = (f"{call._function.name} ran longer than its timeout of {call._timeout:g} s; worker {how['pid']} on "
            f"{slot.link.name} was killed")
    stack = [line for line in how.get("stack", "").splitlines() if "clupy_server" not in line]
    return CallTimeout(text + ("; it was at:\n  " + "\n  ".join(stack) if len(stack) > 1 else ""))


# ==== Calls ==================================================================
# What a user writes.  The functions of the module share one engine per process, made when it is first needed.

_engine = None
_engines = weakref.WeakSet()    # all that this process has made, Executors' own included
_executors = weakref.WeakSet()
_engine_lock = threading.Lock()


def connect(master=None, *, executor=None, config=None, **settings):
    """Connect this process to a cluster; optional, since the first call does it by itself.

    master: "host", "host:port" or several with commas; None: that of clupy.client.yaml or CLUPY_MASTER, else one that
    answers on localhost, else the cores of this machine.  executor: a concurrent.futures.Executor that runs the calls
    instead, where `max`, `timeout` and `retries` do not apply.  config: a YAML file; settings: any key of it.  Returns
    when the master has answered.
    Raises ConfigurationError, SecretError, VersionMismatch, MasterUnreachable, or RuntimeError if connected already."""
    global _engine
    with _engine_lock:
        if _engine is not None:
            raise RuntimeError("this process is connected already; call clupy.close() first")
        if executor is not None:
            if not callable(getattr(executor, "submit", None)):
                raise TypeError(f"executor must be a concurrent.futures.Executor, not {type(executor).__name__}")
            _engine = ExecutorEngine(executor)
            return
        engine = _engine = _make_engine(read_settings("client", config, master=master, **settings))
    patience = engine.settings.patience
    joined = engine.joined.wait(min(UNSERVED_TIME, patience))
    if not joined and patience > UNSERVED_TIME:
        log.warning("still connecting, for %g s at most: %s", patience, engine.unreachable())
        joined = engine.joined.wait(patience - UNSERVED_TIME)
    if not joined or engine.fatal:
        _engine = None
        engine.close()
        raise engine.fatal or engine.unreachable()


def _make_engine(settings):
    file = "clupy.client.dependency.yaml"
    own = clupy_master.read_dependencies(file) if os.path.exists(file) else None
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


def _current_engine():
    global _engine
    if _engine is None:
        with _engine_lock:
            if _engine is None:
                _engine = _make_engine(read_settings("client"))
    return _engine


class Parallel:
    """A function whose calls run in the cluster: calling it returns a Future at once.

    .func is the function itself."""

    def __init__(self, func, most, timeout, retries):
        self.func = func
        self._options = most, timeout, retries
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(self, name, getattr(func, name, None))
        self._function = capture(func) if _is_complete(func) else None         # None: captured at each call

    def __call__(self, *args, **kwargs):
        most, timeout, retries = self._options
        function = self._function or capture(self.func)
        engine = _engine or _current_engine()
        return start(engine, self.func, function, args, kwargs, timeout, retries, function.limit(most) if most else None)

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


def parallel(func=None, *, max=None, timeout=None, retries=2):
    """The function, wrapped so that its calls run in the cluster; also a decorator, with or without options.

    max: how many calls of it may run at once, over the whole cluster; None: as many as there are slots.
    timeout: how long one call may run (seconds, or "10s"); then its worker is killed and it fails with CallTimeout.
    retries: how often a call is started again after its worker, server or connection was lost; an exception of the
    function itself is never retried.  The function is captured here, as it is now (one that is being decorated: at each
    call, since what it uses may be defined further down); arguments are pickled when the call is made.  Any thread may
    call it."""
    if func is None:
        return functools.partial(parallel, max=max, timeout=timeout, retries=retries)
    if not callable(func):
        raise TypeError(f"parallel() wraps a function, not {type(func).__name__} {func!r}; did you call it already?")
    if max is not None and (not isinstance(max, int) or max < 1):
        raise ValueError(f"max is {max!r}, but must be a whole number from 1, or None")
    if not isinstance(retries, int) or retries < 0:
        raise ValueError(f"retries is {retries!r}, but must be a whole number from 0")
    if timeout is not None and not (timeout := _duration(timeout)) > 0:
        raise ValueError(f"timeout is {timeout!r}, but must be more than 0 seconds, or None")
    return Parallel(func, max, timeout, retries)


def start(engine, func, function, args, kwargs, timeout, retries, limit):
    """The Future of a new call; one whose arguments cannot be pickled has that for its outcome already."""
    if not kwargs:
        for value in args:
            if type(value) not in PLAIN:
                break
        else:
            call = Future(engine, function, args, timeout, retries, limit)
            engine.submit(call)
            return call
    call = Future(engine, function, None, timeout, retries, limit)
    try:
        call._arguments, call._refs = pack_arguments(function.name, args, kwargs, func)
    except Exception as error:                    # one bad call among a hundred spoils one result
        conclude([(call, False, error)])
    else:
        engine.submit(call)
    return call


def wait_all(results, time_out=None, progress=False):
    """Whether all the futures completed within `time_out` (None: for ever), their handlers included.

    progress: show on standard error how many have."""
    results = list(results)
    deadline = None if time_out is None else time.monotonic() + _duration(time_out)
    shown = -1
    try:
        for index, future in enumerate(results):
            while not future._wait(_next_look(deadline, progress), handlers=True):
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                shown = _show_progress(results, index, shown)
            if progress and index == len(results) - 1:
                shown = _show_progress(results, len(results), shown)
        return True
    finally:
        if shown >= 0:
            print(file=sys.stderr)


def _next_look(deadline, progress):
    """Seconds to wait at once: up to the deadline, but in steps where progress is to be shown."""
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    return left if not progress else 0.5 if left is None else min(0.5, left)


def _show_progress(results, index, shown):
    done = index + sum(future.completed for future in results[index:])
    if done != shown:
        print(f"\r{done}/{len(results)} calls", end="", file=sys.stderr, flush=True)
    return done


def as_completed(results, time_out=None):
    """The futures, each as soon as it is done. Raises TimeoutError after `time_out` seconds in all (None: never)."""
    futures = list(results)
    try:
        yield from concurrent.futures.as_completed(futures, None if time_out is None else _duration(time_out))
    except KeyboardInterrupt:
        for future in futures:
            future.cancel()
        raise


def map(func, *iterables, max=None, timeout=None, retries=2, chunk_size=None):
    """The results of func over the iterables, in order, as an iterator; they may be of any length, or endless.

    Calls are made ahead of what is taken, MAP_AHEAD at most and MAP_BYTES of arguments.  chunk_size: that many items
    go into one call (`timeout` bounds them together); None: one, which is right unless an item takes under 10 us.
    An exception of the function is raised where its result would be; the calls made ahead are cancelled then."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size!r}, but must be at least 1")
    call = parallel(functools.partial(_run_chunk, func) if chunk_size else func, max=max, timeout=timeout, retries=retries)
    items = zip(*iterables)
    batches = iter(lambda: list(itertools.islice(items, chunk_size)), []) if chunk_size else items
    return _map(call, batches, bool(chunk_size))


def _run_chunk(func, items):
    """(results up to the first failure, its exception's payload or None)."""
    results = []
    for item in items:
        try:
            results.append(func(*item))
        except Exception as error:
            return results, pack_exception(error)
    return results, None


def _map(call, batches, chunked):
    ahead, size = collections.deque(), 0
    try:
        while True:
            while len(ahead) < MAP_AHEAD and size < MAP_BYTES and (batch := next(batches, None)) is not None:
                future = call(batch) if chunked else call(*batch)
                cost = payload_size(future._arguments)
                ahead.append((future, cost))
                size += cost
            if not ahead:
                return
            future, cost = ahead.popleft()
            size -= cost
            result = future.result()
            del future
            if chunked:
                yield from result[0]
                if result[1] is not None:
                    raise unpack_exception(result[1])
            else:
                yield result
    finally:
        for future, _ in ahead:
            future.cancel()


def payload_size(payload):
    """About how many bytes of memory the arguments of a call hold."""
    if type(payload) is bytes:
        return len(payload)
    if payload and type(payload[-1]) is list:
        return len(payload[0]) + sum(memoryview(buffer).nbytes for buffer in payload[1])
    return sum(len(value) for value in payload or () if type(value) is str)


class Executor(concurrent.futures.Executor):
    """A concurrent.futures.Executor whose calls run in the cluster.

    max_workers: how many run at once; None: as many as there are slots; an embedded cluster gets that many workers.
    master: as for connect(); None: the cluster of this process.  initializer(*initargs): run once in every worker
    before its first call of this executor; where it raises, the calls there fail with BrokenExecutor."""

    def __init__(self, max_workers=None, master=None, initializer=None, initargs=()):
        if max_workers is not None and (not isinstance(max_workers, int) or max_workers < 1):
            raise ValueError(f"max_workers is {max_workers!r}, but must be a whole number from 1, or None")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a function, not {type(initializer).__name__}")
        self._own_engine = _make_engine(read_settings("client", master=master)) if master else None
        self._engine = self._own_engine or _current_engine()
        self._limit = Limit(max_workers)
        _executors.add(self)
        self._setup = None
        if initializer is not None:
            self._setup = capture(functools.partial(initializer, *initargs))
        self._shut = False
        if max_workers:
            self._engine.grow(max_workers)

    def submit(self, fn, /, *args, **kwargs):
        if self._shut:
            raise RuntimeError("cannot submit a call after shutdown()")
        if self._engine is None:                  # this process was forked off
            if self._own_engine:
                raise RuntimeError("this Executor has a cluster of the process that made it; make one here")
            self._engine, self._limit = _current_engine(), Limit(self._limit.most)
        function = capture(fn)
        if self._setup:
            function = function_of(function.payload, function.name, self._setup.payload)
        return start(self._engine, fn, function, args, kwargs, None, 2, self._limit)

    def shutdown(self, wait=True, *, cancel_futures=False):
        self._shut = True
        if self._engine is None:                  # the affair of the process that made it
            return
        if cancel_futures:
            self._engine.cancel_limit(self._limit)
        if wait:
            self._end()
        elif self._own_engine:
            threads.run(self._end)

    def _end(self):
        self._engine.settle(self._limit)
        if self._own_engine:
            self._engine.close()


class ExecutorEngine:
    """Runs the calls on another concurrent.futures.Executor: threads to debug, or an engine that a site runs already.

    Functions, arguments and results are pickled all the same, so that what works here works on a cluster."""

    def __init__(self, executor):
        self.executor = executor
        self._running = {}                        # {call: the executor's future}

    def submit(self, call):
        theirs = self.executor.submit(run_packed, call._function.payload, call._function.setup, call._arguments)
        self._running[call] = theirs
        theirs.add_done_callback(functools.partial(self._done, call))

    def _done(self, call, theirs):
        self._running.pop(call, None)
        if theirs.cancelled():
            conclude([(call, False, CancelledError())])
        elif theirs.exception():
            conclude([(call, False, theirs.exception())])
        else:
            conclude([(call, *theirs.result())])

    def cancel(self, call):
        if theirs := self._running.get(call):
            theirs.cancel()

    def cancel_all(self):
        for call in list(self._running):
            call.cancel()

    def grow(self, slots):
        """The executor has the workers that it has."""

    def abandon(self):
        """What becomes of an executor in a forked child is its own affair."""

    def cancel_limit(self, limit):
        for call in list(self._running):
            if call._limit is limit:
                call.cancel()

    def settle(self, limit):
        concurrent.futures.wait([call for call in list(self._running) if call._limit is limit])

    def close(self):
        self.cancel_all()


_set_up = {}                    # {payload of an initializer: None, or the exception that it raised here}


def set_up(setup, unpack=unpack):
    """Run an Executor's initializer, a payload, once in this process. Raises BrokenExecutor if it raised."""
    if setup not in _set_up:
        try:
            unpack(setup)()
            _set_up[setup] = None
        except BaseException as error:            # whatever it raised, it is why no call can run here
            _set_up[setup] = error
    if _set_up[setup] is not None:
        raise BrokenExecutor("the initializer raised") from _set_up[setup]


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
# - One that never answered this process is a mistake in the configuration, and told within FIRST_CONTACT seconds; one that
#   did answer is waited for as long as the setting `patience` says.  Then: Unavailable.
# - What may be done twice is repeated (_retried), what may not is sent once and reported (_once).  redis-py's own retries
#   make no such difference: an `incr` that lost three answers counted four (redis/redis-py#261).

FIRST_CONTACT = 5.0               # seconds; less would refuse a server that is starting, more hides a typing error

_clients_lock = threading.RLock()      # for the next two, and for _own
_redis_clients = {}                    # {address: redis.Redis}
_zookeeper_clients = {}                # {addresses: KazooClient}
_reached = set()                       # addresses that answered this process at least once
_note_session = None                   # a worker's: told (id, password) of its ZooKeeper session, None when that has ended
_told = None                           # Settings that a worker's server, or a master's own file, says: nothing is looked for then
_known = None                          # (engine, what its master says, _configured, the Settings made of them)


def use_services(services):
    """In a worker and a master: the cluster's services, once for all."""
    global _told
    _told = Settings({**{key: SETTINGS[key][2] for key in SERVICE_KEYS}, **services}, services["given"])


def _settings():
    """The Settings of Redis and ZooKeeper that hold for this process now: found anew after whatever they depend on changed."""
    global _known
    if _told is not None:
        return _told
    known = _known                         # another thread may change it
    if not known or any(a is not b for a, b in zip(known, (_engine, getattr(_engine, "said", None), _configured))):
        known = _known = _find_services()
    return known[3]


def _find_services():
    engine, configured, theirs = _engine, _configured, {}
    own = engine.settings if isinstance(engine, Engine) else read_settings("client")
    if engine is None and (own.master or _listens("127.0.0.1", own.port)):
        engine = _current_engine()
    if isinstance(engine, Engine):
        theirs = engine.services(own.patience)
    return engine, getattr(engine, "said", None), configured, merged_services(own, theirs)


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
    global _clients_lock
    _clients_lock = threading.RLock()
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
            failure = _redis_failure(error, name)
            if failure is error:
                raise
            if not isinstance(failure, Unavailable) or isinstance(error, _refusals()):
                raise failure from error
            deadline = deadline or time.monotonic() + _settings().patience
            if time.monotonic() >= deadline:
                raise failure from error
        time.sleep(min(0.01 * 2 ** attempt, 0.5))


def _once(command, name):
    """The result of command(client), sent at most once: a lost answer is an Unavailable that says so."""
    def connect(client):
        client.connection_pool.release(client.connection_pool.get_connection())

    _retried(connect)                      # a live one in the pool: a restart in between costs nobody an error
    try:
        return command(_redis())
    except redis.RedisError as error:
        failure = _redis_failure(error, name)
        if failure is error:
            raise
        if isinstance(failure, Unavailable) and not isinstance(error, _refusals()):
            failure = _unavailable("redis", f"the answer to a change of {name!r} was lost ({error}); it may have been made "
                                            "or not, look before you repeat it")
        raise failure from error


def _refusals():
    """What waiting does not cure: a wrong password, or a user that may not."""
    return redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError


def _redis_failure(error, name):
    """What to raise for an error of redis-py."""
    if isinstance(error, _refusals()):
        return _unavailable("redis", f"password or rights are missing ({error}), expected "
                                     "redis://:password@host:6379/0 or redis://user:password@...")
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        return _unavailable("redis", str(error).rstrip("."))
    if "WRONGTYPE" in str(error):
        return TypeError(f"{name!r} is the name of {_kind(name)}, which does not know this operation")
    return error


def _key(name, kind="data"):
    """The key in Redis of a name, which may have any characters."""
    if not isinstance(name, str):
        raise TypeError(f"a name must be a str, not {type(name).__name__}: {name!r}")
    if not name:
        raise ValueError("a name must not be empty")
    return _prefix(kind) + name.encode("utf-8", "surrogatepass")


def _prefix(kind):
    return f"{_settings().prefix}:{kind}:".encode()


def _kind(name):
    """What stands in Redis under the name, for an error's text."""
    kinds = {b"hash": "a value or file (clupy.get, clupy.open)", b"list": "a queue (clupy.queue)",
             b"string": "a counter (clupy.counter)"}
    return kinds.get(_retried(lambda client: client.type(_key(name))), "something else")


def _zookeeper():
    """This process's ZooKeeper client, connected; a new one if the last was given up."""
    hosts = _settings().zookeeper
    if not hosts:
        raise _unavailable("zookeeper", "locks and the like need one")
    with _clients_lock:
        client = _zookeeper_clients.get(hosts)
        if client is None or _is_over(client):
            if client is not None:
                _close_zookeeper(client)
            client = _zookeeper_clients[hosts] = _zookeeper_client(hosts)
        return client


def _zookeeper_client(hosts):
    settings, quiet = _settings(), logging.getLogger("clupy.zookeeper")
    quiet.setLevel(logging.ERROR)          # kazoo warns of each lost connection, which is what patience is for
    # Without a deadline every request to a server that is away blocks for ever, whatever its own time-out.
    again = kazoo_retry.KazooRetry(max_tries=-1, delay=0.05, backoff=1.5, max_delay=0.5, deadline=settings.patience)
    try:
        client = kazoo.KazooClient(hosts, timeout=settings.session, connection_retry=again, logger=quiet)
    except (ValueError, kazoo_errors.KazooException):
        client = None
    if client is None or client.chroot or not client.hosts:
        raise _unavailable("zookeeper", "not a list of addresses; expected host:2181,host:2181")
    if _note_session:
        client.add_listener(lambda state: _note_session(client.client_id) if client.client_id else None)
    try:
        if not client.start_async().wait(FIRST_CONTACT):
            raise _unavailable("zookeeper", f"no answer within {FIRST_CONTACT:g} s")
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
#                                    cut in pieces of 1 MiB     h: kind, ttl, sizes, token; 0, 1, ...: pieces
#
# Pieces: Redis takes no string over 512 MB, and no copy of the whole is made on either side.  Every read asks for the
# header along with pieces, and Redis answers one command at a time: so a token that changes tells that a value was
# replaced between two of them.  Values and files are hashes, queues lists, counters strings: so Redis itself refuses a
# queue's command on a value.  Refs are values of another prefix, kept once more on each machine that uses them.

PIECE = 1 << 20                   # bytes; half or twice that is no faster
WINDOW = 4                        # pieces per command; more do not fit a processor's cache, 64 take twice as long
LONGEST_ITEM = 512 << 20          # bytes of a string of Redis: one item of a queue, one message

_MISSING = object()
_served = {}                           # {name: buffers} of the Refs that this process shared without Redis
_shared_here = weakref.WeakValueDictionary()       # {name: the Ref that share() gave for one of these}
_own = None                            # this process's Copies where it is no worker, made when it first needs one
_client = None                         # a worker's: the id of its client, whose copies it uses;
_fetch = None                          # callable(what, name): what its client says of a Ref that it serves;
_serve = _served.__setitem__           # callable(name, buffers): its client serves what is shared in its calls


def _serve_ref(name):
    """What a worker that asks for a Ref is told: its buffers, or None."""
    parts = _served.get(name)
    return parts and [pickle.PickleBuffer(part) for part in parts]


FETCHES["ref"] = _serve_ref


def use_client(client, serve=_served.__setitem__, fetch=None):
    """In a worker: the id of its client, who serves what is shared here, and who is asked for what was shared elsewhere."""
    global _client, _serve, _fetch
    _client, _serve, _fetch = client, serve, fetch


def put(name, value, ttl=None):
    """Keep `value` under `name` for the whole cluster, at one stroke instead of whatever had that name.

    value: anything pickle or cloudpickle takes, of any size.  ttl: seconds since the last access after which it is gone;
    None: the setting `ttl`, 0: never.  Raises Unavailable."""
    _store(_key(name), "value", _parts(value), _ttl(ttl))


def get(name, default=_MISSING):
    """The value put under `name`; of a file: its bytes.  Without one: `default`, or KeyError if there is none.

    Never half of an old and half of a new value.  Unpickling runs code: whoever writes to this Redis is trusted."""
    found = _load(_key(name), name, _memory)
    if found is None:
        if default is _MISSING:
            raise KeyError(name)
        return default
    kind, _, buffers = found
    return b"".join(buffers) if kind == "file" else unpack((buffers[0], buffers[1:]))


def delete(*names):
    """How many of the names were there; they are gone then, be they values, files, counters or queues."""
    stored = [_key(name) for name in names]
    return _retried(lambda client: client.unlink(*stored)) if stored else 0


def exists(name):
    """Whether there is a value, file, counter or queue of that name.  An empty queue does not exist."""
    return bool(_retried(lambda client: client.exists(_key(name))))


def keys(pattern="*"):
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
    """Values and files as a mapping.  `shared["x"] += 1` is not atomic: that is what counter() is for."""

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


shared = _Shared()


def _ttl(ttl):
    """The milliseconds of a time to live that a user gave; 0: for ever."""
    seconds = _settings().ttl if ttl is None else _duration(ttl)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"ttl must be seconds, or 0 for ever, not {ttl!r}")
    return math.ceil(1000 * seconds)


def _parts(value):
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


def _expire(client, key, ttl):
    """Begin a key's time to live anew."""
    return client.pexpire(key, ttl) if ttl else client.persist(key)


def _header(kind, ttl, sizes):
    """What a value's or file's hash says of it, with a token: so no two headers are the same."""
    return pickle.dumps((kind, ttl, sizes, os.urandom(8)))


def _store(key, kind, buffers, ttl):
    """Write everything beside the old value, then rename it.

    A transaction would be refused over 1 GB, as the server's client-query-buffer-limit counts it.  What a crash in the
    middle leaves beside is gone in an hour."""
    beside = _key(uuid.uuid4().hex, "new")
    header = _header(kind, ttl, [len(buffer) for buffer in buffers])

    def command(client):
        with client.pipeline(transaction=False) as pipe:
            pipe.hset(beside, "h", header)
            pipe.pexpire(beside, 3_600_000)
            for number, piece in enumerate(_pieces(buffers)):
                pipe.hset(beside, str(number), piece)
            pipe.rename(beside, key)
            _expire(pipe, key, ttl)
            pipe.execute()

    _retried(command)


# Of the value that was read alone: one that has replaced it, of whatever kind, has a time to live of its own.
_REFRESH = "if redis.pcall('hget', KEYS[1], 'h') == ARGV[1] then redis.call('pexpire', KEYS[1], ARGV[2]) end"


def _load(key, name, allocate):
    """(kind, ttl, buffers) of what is stored under the key, or None; its time to live begins anew.

    allocate(sizes) -> writable buffers of these sizes; called again if the value was replaced while it was read."""
    window = WINDOW
    while True:
        header, *pieces = _window(key, name, 0, window)
        if header is None:
            return None
        kind, ttl, sizes, _ = pickle.loads(header)
        buffers = allocate(sizes)
        targets = list(_pieces(buffers))
        for start in range(0, max(len(targets), 1), window):
            now, *pieces = (header, *pieces) if start == 0 else _window(key, name, start, window)
            if now != header:
                break                  # replaced: once more, all of it in one command
            for target, piece in zip(targets[start:start + window], pieces):
                target[:] = piece
        else:
            if ttl:
                _retried(lambda client: client.eval(_REFRESH, 1, key, header, ttl))
            return kind, ttl, buffers
        window = max(len(targets), WINDOW)


def _window(key, name, start, count):
    """[header, piece, ...]: so many pieces from the start-th on."""
    return _retried(lambda client: client.hmget(key, "h", *range(start, start + count)), name)


def _memory(sizes):
    return [memory(size) for size in sizes]


def open(name, mode="r", encoding="utf-8", newline=None):
    """A file kept in Redis, for whatever takes an open file: csv, pandas, numpy.  Modes r w a, with b for bytes.

    Read whole when opened, so seekable and never mixed from two versions.  A written one appears, whole, when it is closed,
    and not at all when its with-block raises; what "a" wrote is added at one stroke then, also by many processes at once.
    Raises FileNotFoundError, TypeError (name of something else), Unavailable."""
    kind, binary = mode[:1], mode[1:] == "b"
    if kind not in ("r", "w", "a") or mode[1:] not in ("", "t", "b"):
        raise ValueError(f"mode must be r, w or a, with b for bytes, not {mode!r}")
    file = _read_file(name) if kind == "r" else _WrittenFile(name, append=kind == "a")
    return file if binary else _TextFile(file, encoding, newline=newline)


def _read_file(name):
    file = None

    def allocate(sizes):               # inside the file itself: no further copy
        nonlocal file
        file = io.BytesIO(bytes(sum(sizes)))
        content, ends = file.getbuffer(), itertools.accumulate(sizes)
        return [content[end - size:end] for size, end in zip(sizes, ends)]

    found = _load(_key(name), name, allocate)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no file of that name in Redis", name)
    if found[0] != "file":
        raise TypeError(f"{name!r} is the name of a value: use clupy.get")
    return file


class _WrittenFile(io.BytesIO):
    """What open(name, "wb") gives.  `failed`: its with-block raised, nothing is to be kept."""

    def __init__(self, name, append):
        super().__init__()
        self.name, self.append, self.failed = name, append, False
        self._key = _key(name)

    def close(self):
        if self.closed:
            return
        try:
            if not self.failed:
                if self.append:
                    _append(self._key, self.name, self.getvalue())
                else:
                    _store(self._key, "file", [self.getvalue()], _ttl(None))
        finally:
            super().close()

    def __exit__(self, kind, *_):
        self.failed = kind is not None
        self.close()


class _TextFile(io.TextIOWrapper):
    """A text over a _WrittenFile, which it tells whether its with-block raised."""

    def __exit__(self, kind, *_):
        self.buffer.failed = kind is not None
        self.close()


# By compare and set: redis-py reports a lost connection of a WATCH as a WatchError, so that it would be added twice.
_APPEND = """
if (redis.call('hget', KEYS[1], 'h') or '') ~= ARGV[1] then return 0 end
for i = 3, #ARGV, 2 do redis.call('hset', KEYS[1], ARGV[i], ARGV[i + 1]) end
if ARGV[2] == '0' then redis.call('persist', KEYS[1]) else redis.call('pexpire', KEYS[1], ARGV[2]) end
return 1"""


def _append(key, name, content):
    """Add the content as one more buffer, whatever others add at the same time."""
    added = 0
    while not added:                   # another one was first
        old = _retried(lambda client: client.hget(key, "h"), name) or b""
        kind, ttl, sizes, _ = pickle.loads(old or _header("file", _ttl(None), []))
        if kind != "file":
            raise TypeError(f"{name!r} is the name of a value, not of a file")
        fields = ["h", _header(kind, ttl, [*sizes, len(content)])]
        for number, piece in enumerate(_pieces([content]), sum(-(-size // PIECE) for size in sizes)):
            fields += [str(number), piece]
        added = _once(lambda client: client.eval(_APPEND, 1, key, old, ttl, *fields), name)


# ---- Refs

def share(value, ttl=None):
    """A Ref to `value`, to be passed to any number of calls: it is sent to each machine once, not with each call.

    With Redis configured it lives `ttl` seconds after its last use (None: the setting, 0: for ever), also without this
    process.  Without, it lives as long as the program has the Ref, or a call or function that was given it.  Later changes
    of `value` do not matter."""
    name, (buffers, refs) = uuid.uuid4().hex, _noting_refs(_parts, value)
    in_redis = "redis" in _settings().given and bool(_settings().redis)
    ref = Ref(name, in_redis, _ttl(ttl))
    if in_redis:
        _store(_key(name, "ref"), "ref", buffers, ref.ttl)
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
    _served.pop(name, None)
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
        head, *buffers = _served.get(self.name) or _machine_copy(self)
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
        buffers = found and found[2]
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

    def __repr__(self):
        return f"<Copies {self.client}>"

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
    _served.clear()
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
    client, buffers = _whose_copies(), None
    paths = [os.path.join(folder, client, ref.name) for folder in _ref_folders()]
    found = _mapped(paths)
    for path in () if found else paths:
        try:
            with _locked(os.path.join(os.path.dirname(path), f"{ref.name[:1]}.lock")):     # few files, and enough
                if not _mapped(paths):
                    buffers = buffers or _fetched(ref)
                    _write_copy(path, buffers)
            break
        except ConnectionError:        # no file's, but that of who has the value
            raise
        except OSError as error:       # Docker's /dev/shm has 64 MB: on disk, then
            log.debug("no copy of %r at %s: %s", ref, path, error)
    found = found or _mapped(paths)
    return _refreshed(ref, *found) if found else buffers or _fetched(ref)


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
    with contextlib.suppress(FileNotFoundError):        # it was given up in this moment
        if ref.in_redis and ref.ttl and time.time() - os.stat(path).st_mtime > ref.ttl / 4000:
            os.utime(path)
            _retried(lambda client: client.pexpire(_key(ref.name, "ref"), ref.ttl))
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


class _Used:
    """What counters and queues have in common: a key whose time to live begins anew with each use."""

    def __init__(self, name, ttl=None):
        self.name, self._key, self._ttl = name, _key(name), _ttl(ttl)

    def _use(self, command, *arguments):
        """The command as a function of the client: at one stroke with the time to live."""
        def use(client):
            with client.pipeline() as pipe:
                getattr(pipe, command)(self._key, *arguments)
                _expire(pipe, self._key, self._ttl)
                return pipe.execute()[0]
        return use


class Counter(_Used):
    """An integer that many processes count with, 0 if it is new; ttl as for put.  May be passed to calls."""

    def __repr__(self):
        return f"clupy.counter({self.name!r})"

    def add(self, n=1):
        """The new value.  Counted at most once: Unavailable says that it is not known whether it was."""
        return _once(self._use("incrby", operator.index(n)), self.name)

    @property
    def value(self):
        return int(_retried(self._use("get"), self.name) or 0)

    def set(self, n):
        """Set it, whatever others add."""
        value = operator.index(n)     # get=True makes Redis refuse the name of something else
        _retried(lambda client: client.set(self._key, value, px=self._ttl or None, get=True), self.name)


counter = Counter


class Queue(_Used):
    """First in, first out; each item goes to one taker, at most once.  ttl as for put.  May be passed to calls."""

    def __repr__(self):
        return f"clupy.queue({self.name!r})"

    def __len__(self):
        return _retried(lambda client: client.llen(self._key), self.name)

    def __bool__(self):
        """An empty queue is still a queue."""
        return True

    def put(self, value):
        """Append the value.  Unavailable says that it is not known whether it is in the queue."""
        _once(self._use("rpush", _item(value)), self.name)

    def get(self, timeout=None):
        """The oldest item, waited for `timeout` seconds (None: for ever), then queue.Empty.

        No item is lost or doubled, except that one under way when Redis or this process dies is lost: Unavailable if that
        may be."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        item = _once(self._use("lpop"), self.name)
        while item is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Empty
            wait = min(max(left, 0.01), 1)     # shorter than the socket's time-out; 0 would be for ever
            item = (_once(lambda client: client.blpop(self._key, wait), self.name) or (None, None))[1]
        return _from_item(item)


queue = Queue


def publish(topic, value):
    """How many subscribers were listening; they get `value`, others never do.  At most once, as with a counter."""
    item = _item(value)
    return _once(lambda client: client.publish(_key(topic, "topic"), item), topic)


class Subscription:
    """An iterator of the values published from now on, which ends after `timeout` seconds of silence (None: never).

    Use it in a with-block, or close() it.  It belongs to one thread.  Unavailable from next(): the connection was lost, and
    values may have been missed."""

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
        deadline = math.inf if self.timeout is None else time.monotonic() + self.timeout
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
        self.deadline = math.inf if timeout is None else time.monotonic() + timeout
        self.client = _zookeeper()
        self.changed = threading.Event()

    def ask(self, request, *arguments, **options):
        """The answer to one request.  Raises TimeoutError at the deadline, though it is given one second at least."""
        return self.answer(getattr(self.client, f"{request}_async")(*arguments, **options))

    def answer(self, pending):
        """The answer that kazoo's asynchronous result gets, as for ask()."""
        left = self.deadline - time.monotonic()
        try:
            return pending.get(timeout=None if left == math.inf else max(left, 1.0))
        except kazoo_threads.KazooTimeoutError:
            raise self.late() from None

    def wake(self, _event):
        """For watches.  Also called when the connection is lost, as the watch is then."""
        self.changed.set()

    def until(self, look):
        """The first true result of look(), which is called again after a change it watches, and after a lost connection."""
        while True:
            self.changed.clear()
            try:
                if result := look():
                    return result
            except _lost_connection():
                if _is_over(self.client):
                    reason = f"{self.what}: away for longer than {_settings().patience:g} s"
                    raise _unavailable("zookeeper", reason) from None
                if time.monotonic() > self.deadline:
                    raise self.late() from None
                time.sleep(0.05)       # kazoo needs a moment to replace an ended session
                continue
            left = self.deadline - time.monotonic()
            if not self.changed.wait(None if left == math.inf else max(left, 0)):
                raise self.late()

    def late(self):
        """The error to raise at the deadline."""
        return TimeoutError(f"{self.what}: not within {self.timeout:g} s")

    def children(self, watch=None):
        """The nodes in the order of their numbers."""
        return sorted(self.ask("get_children", self.path, watch), key=lambda node: node[-10:])


def _lost_connection():
    """Errors after which a request may have been carried out or not."""
    return (kazoo_errors.ConnectionLoss, kazoo_errors.ConnectionClosedError, kazoo_errors.SessionExpiredError,
            kazoo_errors.OperationTimeoutError, kazoo_errors.SessionMovedError)


class _Place(_Wait):
    """A place in a queue: a node of ours in `path`, gone with our session."""

    def __init__(self, what, path, timeout, kind="place", data=None, crowd=False):
        super().__init__(what, path, timeout)
        self.stem = f"{uuid.uuid4().hex}-{kind}-"
        self.data = f"{socket.gethostname()}:{os.getpid()}" if data is None else data
        self.crowd = crowd             # whether the whole queue is watched, or only the node that is in our way
        self.pid = os.getpid()
        self.node = None               # its name; None: not made, or not known to be
        self.tried = False             # to make it
        self.token = None              # transaction that made it: larger for every later one, over all of ZooKeeper
        self.session = None            # the session it ends with

    def nodes(self):
        """All nodes in the order of their numbers, after ours was made; ours is missing if it was lost since."""
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
        return self.children(self.wake if self.crowd else None)

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
        lost = False

        def look():
            nonlocal lost
            try:
                self.ask("delete", f"{self.path}/{self.node}")
            except kazoo_errors.NoNodeError:       # by us, if that answer was lost and the session is the same
                return "left" if lost and self.same_session() else "gone"
            except _lost_connection():
                lost = True
                raise
            return "left"

        return self.until(look) == "left"

    def abandon(self):
        """Give the place up, even if ZooKeeper is away: a node left behind would block others while we live."""
        remover = threading.Thread(target=self._remove, daemon=True)
        remover.start()
        remover.join(1.0)

    def _remove(self):
        """Delete every node of ours, whenever that can be done."""
        self.deadline = math.inf

        def look():
            self.ask("sync", self.path)
            for node in filter(self.is_ours, self.ask("get_children", self.path)):
                with contextlib.suppress(kazoo_errors.NoNodeError):
                    self.ask("delete", f"{self.path}/{node}")
            return True

        # Unavailable: the node ends with its session; NoNodeError: there is no queue.
        with contextlib.suppress(Unavailable, kazoo_errors.NoNodeError):
            self.until(look)


def _path(kind, name):
    """The node of that name; every name is one component, whatever is in it."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name must be a str and not empty: {name!r}")
    quoted = urls.quote(name, safe="", errors="surrogatepass").replace(".", "%2E")
    return f"/{_settings().prefix}/{kind}/{quoted}"


class _Holding:
    """What lock, semaphore and election give: entered when its turn has come, one with-block at a time."""

    def __init__(self, what, name, timeout, in_the_way, **options):
        self._what, self._path = f"{what} {name!r}", _path(what, name)
        self._timeout, self._in_the_way, self._options = timeout, in_the_way, options
        self._place = None             # while held, or held by the parent that forked us

    def __repr__(self):
        return f"<clupy.{self._what}{' held' if self.held else ''}>"

    def __enter__(self):
        if self._place is not None and self._place.pid == os.getpid():
            raise RuntimeError(f"{self._what}: this object is in use; make another for another with-block")
        place = _Place(self._what, self._path, self._timeout, **self._options)
        try:
            place.until(lambda: place.is_turn(self._in_the_way))
            place.deadline = math.inf  # that was for the waiting
            self._place = place
        except BaseException:
            place.abandon()
            raise
        return self

    def __exit__(self, kind, *_):
        place, forked = self._place, self._place.pid != os.getpid()
        self._place = None
        if forked:                     # inside the block: it is the parent's, and so is the connection
            return
        if kind is not None:           # the block's own error is the one to see
            place.abandon()
            return
        try:
            kept = place.leave()
        except BaseException:
            place.abandon()
            raise
        if not kept:
            raise LockLost(f"{self._what} was lost before its block ended: others may have held it meanwhile")

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
        if place.until(lambda: "held" if place.check_node() else "lost") == "lost":
            raise LockLost(f"{self._what} is not held any more: its session ended")


def lock(name, timeout=None, shared=False):
    """`with clupy.lock("x") as l:` one holder at a time in the cluster, in the order of asking.

    shared: any number of such holders, and no other.  timeout: seconds to wait, then TimeoutError.  l.held, l.token and
    l.check() tell whether it still is; LockLost at the block's end if it was lost meanwhile.  Not re-entrant.  A holder that
    is killed holds it for the setting `session` longer."""
    def in_the_way(before):
        writers = [node for node in before if "-write-" in node] if shared else before
        return writers[-1] if writers else None
    return _Holding("lock", name, timeout, in_the_way, kind="read" if shared else "write")


def semaphore(name, n, timeout=None):
    """As lock, with at most n holders at a time; everybody must say the same n."""
    if operator.index(n) < 1:
        raise ValueError(f"n must be at least 1, not {n}")

    def in_the_way(before):
        return before[0] if len(before) >= n else None
    return _Holding("semaphore", name, timeout, in_the_way, crowd=True)


def election(name, data="", timeout=None):
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
        wait = _Wait(self._what, self._path, None)

        def look():
            try:
                nodes = wait.children()
            except kazoo_errors.NoNodeError:
                nodes = []
            for node in nodes:
                with contextlib.suppress(kazoo_errors.NoNodeError):    # gone meanwhile: the next one leads
                    return [wait.ask("get", f"{self._path}/{node}")[0].decode()]
            return [None]

        return wait.until(look)[0]


def barrier(name, n, timeout=None):
    """Return when n callers have come, in all n of them; then the name is free for the next n.

    Callers that died or gave up do not count.  Raises TimeoutError after `timeout` seconds.  Any process, any thread, the
    same n everywhere."""
    if not 1 <= operator.index(n) <= 5000:           # more would not fit into one transaction, 1 MB
        raise ValueError(f"n must be 1 to 5000, not {n}")
    place = _Place(f"barrier {name!r}", _path("barrier", name), timeout)
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
            if nodes == place.children(place.wake):
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

    def _until(self, timeout, look):
        """The first true result of look(wait), as _Wait.until."""
        wait = _Wait(f"event {self.name!r}", self._path, timeout)
        return wait.until(lambda: look(wait))

    def set(self):
        """Set it; whoever waits goes on."""
        def look(wait):
            with contextlib.suppress(kazoo_errors.NodeExistsError):
                wait.ask("create", self._path, makepath=True)
            return True
        self._until(None, look)

    def clear(self):
        """Have whoever waits from now on wait until it is set again."""
        def look(wait):
            with contextlib.suppress(kazoo_errors.NoNodeError):
                wait.ask("delete", self._path)
            return True
        self._until(None, look)

    def is_set(self):
        """Whether it is set."""
        return self._until(None, lambda wait: "set" if wait.ask("exists", self._path) else "clear") == "set"

    def wait(self, timeout=None):
        """Whether it was set within `timeout` seconds (None: for ever); returns as soon as it is."""
        try:
            return bool(self._until(timeout, lambda wait: wait.ask("exists", self._path, wait.wake)))
        except TimeoutError:
            return False


event = Event


# ==== Ends ===================================================================
# What close() ends, a program's end too, and what a forked child must not take for its own.

def close():
    """End this process's calls and give its slots back; returns when their last output was shown.

    The next call connects anew."""
    global _engine, _known
    with _engine_lock:
        engine, _engine, _known = _engine, None, None
    if engine is not None:
        engine.close()
    forget_served()
    close_services()


_parents = []                   # in a forked child: kept for ever, as nothing of them may be finalized here


@atexit.register
def _at_exit():
    unfinished = sum(engine.unfinished() for engine in list(_engines))
    if unfinished:
        log.warning("the program ended before %s of its calls; clupy.wait_all() waits for them", unfinished)
    close()
    for engine in list(_engines):
        engine.close()


def _after_fork():
    """In a forked child: the engines stay the parent's; the child gets one of its own when it makes a call."""
    global _engine, _engines, _engine_lock, _capture_lock, threads
    _engine_lock, _capture_lock, Future._condition, threads = (
        threading.Lock(), threading.Lock(), threading.Condition(), Threads())
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

def main(argv=None):
    """`python -m clupy`, and the console script `clupy`: the exit code."""
    parser = argparse.ArgumentParser(prog="clupy", description="A small cluster for Python calls.")
    parser.add_argument("--version", action="version", version=f"clupy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    master = commands.add_parser("master", help="run the cluster's master")
    master.add_argument("--listen", metavar="HOST:PORT", help=f"where to listen, or the port (default: every address, {PORT})")
    serve = commands.add_parser("serve", help="run a server: the workers of this machine")
    serve.add_argument("--master", metavar="HOST", help="the master, or several with commas (default: localhost)")
    serve.add_argument("--port", type=int, help=f"the master's port (default: {PORT})")
    serve.add_argument("--listen", metavar="HOST:PORT", help="where clients reach it (default: every address, a free port)")
    serve.add_argument("--slots", type=int, metavar="N", help="calls that run at once (default: the number of cores)")
    status = commands.add_parser("status", help="show the cluster's servers and clients")
    status.add_argument("--master", metavar="HOST:PORT", help="the master (default: localhost)")
    status.add_argument("--json", action="store_true", help="for scripts")
    libraries = commands.add_parser("libraries", help="show the cluster's libraries, and how those here differ")
    libraries.add_argument("--master", metavar="HOST:PORT", help="the master (default: localhost)")
    for command, role in ((master, "master"), (serve, "server"), (status, "client"), (libraries, "client")):
        command.add_argument("--config", metavar="FILE", help=f"a YAML file instead of clupy.{role}.yaml here")

    arguments = vars(parser.parse_args(argv))
    command = arguments.pop("command")
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    try:
        return {"master": _command_master, "serve": _command_serve, "status": _command_status,
                "libraries": _command_libraries}[command](arguments)
    except ClupyError as error:
        print(f"clupy {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _command_master(arguments):
    settings = read_settings("master", arguments.pop("config"), **arguments)
    asyncio.run(clupy_master.run(settings, find_secret(settings, create=True)))


def _command_serve(arguments):
    settings = read_settings("server", arguments.pop("config"), **arguments)
    asyncio.run(clupy_server.run(settings, _await_secret(settings)))


def _await_secret(settings):
    """The secret; waited for as long as `patience` where the first master of this machine may be about to make it."""
    path, deadline = os.path.expanduser(settings.secret_file), time.monotonic() + settings.patience
    if not os.environ.get("CLUPY_SECRET") and not os.path.exists(path):
        log.warning("there is no %s yet: the first master of this machine makes it; on another machine, copy it from there",
                    path)
        while not os.path.exists(path) and time.monotonic() < deadline:
            time.sleep(0.2)
    return find_secret(settings)


def _command_status(arguments):
    as_json = arguments.pop("json")
    settings = read_settings("client", arguments.pop("config"), **arguments)
    tables = asyncio.run(clupy_master.ask_master(settings, "status"))
    print(json.dumps(tables, indent=2) if as_json else clupy_master.status_text(tables))


def _command_libraries(arguments):
    settings = read_settings("client", arguments.pop("config"), **arguments)
    tables = asyncio.run(clupy_master.ask_master(settings, "status"))
    print(clupy_master.libraries_text(tables))
