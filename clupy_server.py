"""CluPy's server and its workers: the processes of one node that run calls.

      client's engine                        server (asyncio)                         worker 1..n
      control  <------ close, kill ------>   +------------------------+   starts    +--------------------------+
               <--- ended, output, ... ----- | Server                 | Template -> | Worker                   |
                                             |  Session  per client   |   lifeline  |  main thread: user code  |
      slot     ------ preamble, MAC ------>  | Workers                | ----------> |  reader thread: socket   |
         ^                                   |  Process  per worker   |  the socket +--------------------------+
         |                                   | NodeLibraries          |                |
         |                                   |  Libraries  per list   | <--------------+ stdout, stderr, stack, board
         |                                   +------------------------+                |
         +------------------------- calls, results, sources ---------------------------+

- Server         listens, answers its clients, and says to the master what this node has.
- Session        is one client's control connection, and the slots it has.
- Workers        starts, watches, kills and replaces workers, and alone counts slots.
- Process        is a worker as its server sees it: its board, its output, its end.
- Template       is the process that workers are forked from, where that can be: one for each environment that is in use.
- NodeLibraries  knows which environments are here, which are built, and which are the cluster's.
- Worker         is the state of the worker process itself; it imports asyncio only for coroutines, and never has the secret.

The *board* is a page of memory shared by a worker and its server, on which the worker notes number and deadline of the
call it begins.  So the server knows what had begun when a worker died, measures time-outs also while C code holds the
GIL, and kills one call and no other: it stops the worker, reads the board, and kills it if the call still runs.  Its
ZooKeeper session is there, too: the server ends it with the worker, so that a lock of a killed call is free at once.
"""

import builtins
import codecs
import collections
import concurrent.futures
import contextlib
import errno
import faulthandler
import fcntl
import functools
import gc
import importlib.machinery
import importlib.util
import itertools
import json
import linecache
import logging
import math
import mmap
import os
import pickle
import queue
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
import warnings

import clupy
from clupy import (CONTROL, SLOT, DependencyError, ProtocolError, Why, dispatch, encode, pickling, proof,
                   resource, slot_head, slot_key, tune)
# Imported at first use; in a worker none of them, but asyncio where a call returns a coroutine:
from clupy import asyncio, clupy_master, pathlib, platform, shutil, site, subprocess, sysconfig, tempfile

log = logging.getLogger("clupy.server")
log.addFilter(clupy.quiet_if_embedded)

BOARD = struct.Struct("=qd")       # number of the call begun last, 0 before the first; its deadline (monotonic), or:
UNBOUND, IDLE = 0.0, -1.0          # it runs and has no deadline; it is over, and no call runs
KEEPER = struct.Struct("=q16s")    # id and password of the worker's ZooKeeper session, id 0: none
KEEPER_AT = 64                     # where on the board
HOLD_TIME = 0.0002                 # results younger than this wait for more; more is fewer frames, and later results
SHORT_TIME = 0.005                 # seconds a call may run before the reader thread reads; less wakes it more often
FLUSH_TICK = 20                    # milliseconds; after so long a call has left results behind that are not sent
PIPE_READS = 64                    # of 64 KiB from a dead worker's pipe, which holds 1 MiB at most: an orphan may fill it
GRACE_TIME = 1.0                   # a worker whose slot was closed may end by itself for so long
WATCH_TIME = 0.1                   # deadlines are looked at so often, while slots are open
STACK_TIME = 0.1                   # a worker that is to be killed writes its Python stack for so long
STACK_SIGNAL = signal.SIGRTMIN + 3 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
SWEEP_TIME = 3600.0                # copies of Refs that nobody holds any more are looked for so often
UNKNOWN_EXIT = 1 << 16             # of a process for which somebody else has waited; no process ends so
WORKER_ENDS = "channel", "lifeline", "stack", "board", "out", "err"    # the descriptors that a worker is given
TEMPLATE_TIME = 5.0                # seconds; a template that has not done by then what it was asked for is killed
TEMPLATE_PAUSE = 30.0              # where one could not be had, workers start by themselves for so long
WORKER_FILES = 9                   # descriptors of a worker here: channel, lifeline, three pipes, board, pidfd, slot, environment
RESERVED_FILES = 20                # descriptors that no worker takes: for clients, master, templates, what a start needs shortly
RETRY_START = 1.0, 30.0            # seconds until a worker that could not be started is tried again: at first, and at most
LAST_LINES = 10                    # of standard error that an error message shows
LINE_SIZE = 16 << 10               # characters of one line that an error message or a stack shows
OUTPUT_FRAME = 16 << 10            # bytes of output that make a frame; less is sent after GATHER_TIME
OUTPUT_PIECE = 4 << 10             # characters of output that are sent as one; a long line goes in pieces, as it is seen
ENTRY_SIZE = 24                    # bytes on the wire of one entry of a frame, beside its text
UNFINISHED_TIME = 0.2              # an unfinished line is passed on after so long; less is more frames, more is shown late
NUMBERS_KEPT = 4096                # of a client's slots; what comes later than so many others counts as used; more is memory
LONGEST_LINE = 1 << 20             # characters after which a line is passed on without its end; more is memory for each worker


# ==== Worker: the client's classes and modules ===============================
# The client's classes are only named in results (clupy._client_class).  A class that was made here, or came with the
# result of a nested call, is one that the client does not know: it goes by value.

def note_client_classes():
    """Note the classes that come from the client, from now on: wrap the function by which cloudpickle makes or finds them.
    Once, when a worker starts."""
    tracker = clupy._class_tracker()
    lookup = tracker._lookup_class_or_track

    def noting(tracker_id, cls):
        cls = lookup(tracker_id, cls)
        if pickling.of_client:
            clupy._client_classes.add(cls)
        return cls
    tracker._lookup_class_or_track = noting


def unpack_call(payload):
    """clupy.unpack for functions and arguments; nested calls' results are for clupy.unpack itself."""
    before, pickling.of_client = pickling.of_client, True
    try:
        return clupy.unpack(payload)
    finally:
        pickling.of_client = before


def unpack_once(payload):
    """unpack_call of arguments, which then have the buffers alone: free as soon as the call is over."""
    value = unpack_call(payload)
    if type(payload) is tuple:
        payload[1].clear()
    return value


class Finder:
    """The importer of the client's modules.  It stands twice on sys.meta_path: first for the client's own top-level modules,
    so that another version installed here is not taken, last for all others.

    fetch("module", name, parent's __path__) -> clupy.module_source's answer; it blocks, and any thread may call it.  What
    it says holds for the call that asks, number(): what is missing or broken now may be there for the next.  Never asked:
    for the standard library, and for submodules of packages that did not come from the client."""

    def __init__(self, fetch, own, server, number):
        self.fetch, self.own, self.server, self.number = fetch, frozenset(own), server, number
        self.answers = {}                          # {module's name: (call, what the client said)}; any importing thread adds
        self.packages = set()                      # names of packages that came from the client; likewise
        self.files = {}                            # {path there: bytes} of files beside modules; likewise

    def install(self):
        shadowed = self.own & sys.stdlib_module_names
        for name in list(sys.modules):             # this process may have imported the standard ones for itself
            if name.partition(".")[0] in shadowed:
                del sys.modules[name]
        sys.meta_path.insert(0, _OwnFirst(self))
        sys.meta_path.append(self)

    def find_spec(self, name, path=None, target=None):
        """The module's spec from the client, or None.

        Does not raise for a missing module, as optional libraries are looked for with importlib.util.find_spec:
        clupy._missing_modules has the error's text."""
        parent = name.rpartition(".")[0]
        is_known = clupy.is_every_servers(name) and name.partition(".")[0] not in self.own
        if parent and parent not in self.packages or is_known:
            return None
        number = self.number()
        asked, answer = self.answers.get(name, (None, None))
        if asked != number:
            answer = self.fetch("module", name, path and list(path))
            self.answers[name] = number, answer
            clupy._missing_modules.pop(name, None)
        kind, *answer = answer
        return getattr(self, f"on_{kind}")(name, path, *answer)

    def on_source(self, name, path, text, filename, package_path):
        linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename

        def run(namespace):
            exec(compile(text, filename, "exec", dont_inherit=True), namespace)
        return self._spec(name, _Loader(self, run, text), package_path, filename)

    def on_value(self, name, path, payload, filename, package_path):
        def run(namespace):
            namespace.update(unpack_call(payload))
        return self._spec(name, _Loader(self, run), package_path, filename)

    def on_namespace(self, name, path, places):
        here = importlib.machinery.PathFinder.find_spec(name, path)     # parts of the package may be installed here
        places = places + list(here.submodule_search_locations or () if here else ())
        return self._spec(name, _Loader(self, lambda namespace: None), places)

    def on_compiled(self, name, path, filename, stamp, why, package_path):
        here = importlib.util.spec_from_file_location(name, filename)
        if here is None or stamp is None or clupy.stamp(filename) != stamp:       # another machine, or no folder that both have
            return self.on_refused(name, path, why)
        return self._spec(name, here.loader, package_path, filename)

    def _spec(self, name, loader, package_path, filename=None):
        spec = importlib.machinery.ModuleSpec(name, loader, origin=filename)
        spec.has_location = filename is not None   # sets __file__
        spec.submodule_search_locations = package_path
        if package_path is not None:
            self.packages.add(name)
        return spec

    def on_library(self, name, path, distribution, version):
        line = f"{distribution}=={version}" if version else distribution
        clupy._missing_modules[name] = (
            f"No module named {name!r} on {self.server}; the client has {distribution} {version or 'of no version'}: "
            f"add the line `- {line}` under `libraries:` in clupy.client.dependency.yaml")

    def on_refused(self, name, path, why):
        clupy._missing_modules[name] = f"No module named {name!r} on {self.server}: {why}"

    def on_no(self, name, path):
        return None

    def beside(self, path):
        """clupy.package_file's answer of this path; what the client refuses may be found here, on the same machine."""
        if path in self.files:
            return "file", self.files[path]
        answer = self.fetch("file", path)
        if answer[0] == "refused" and (here := clupy.read_file(path))[0] != "absent":
            return here
        if answer[0] == "file":
            self.files[path] = answer[1]
        return answer

    def read(self, path):
        """The bytes of a file beside a module.  Raises OSError."""
        kind, content = self.beside(path)
        if kind == "file":
            return content
        if kind == "folder":
            raise IsADirectoryError(f"{path} is a folder")
        raise FileNotFoundError(content) if kind == "absent" else OSError(content)


class _OwnFirst:
    """The Finder's first place on sys.meta_path: for the client's own modules alone."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0] in self.finder.own or name.rpartition(".")[0] in self.finder.packages
        return self.finder.find_spec(name, path) if first else None


_importing = threading.local()      # name: the client's module that this thread runs the text of just now


class _Loader:
    """What fills a module's namespace as the client said, under the client's file name."""

    def __init__(self, finder, run, text=None):
        self.finder, self.run, self.text = finder, run, text

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        before, _importing.name = getattr(_importing, "name", None), module.__name__
        try:
            self.run(vars(module))
        finally:
            _importing.name = before
        clupy.import_when_asked(list(vars(module).values()))       # as the program may have imported their submodules elsewhere

    def get_source(self, name):
        """The text, for inspect and linecache."""
        return self.text

    def get_data(self, path):
        """The bytes of a file beside the module, for pkgutil."""
        return self.finder.read(path)

    def get_resource_reader(self, name):
        """Has `files()`, for importlib.resources."""
        spec = sys.modules[name].__spec__
        return types.SimpleNamespace(files=lambda: _Resource(
            self.finder, spec.submodule_search_locations or [os.path.dirname(spec.origin)]))


class _Resource:
    """A file or folder beside a module of the client's, as importlib.resources wants it: a Traversable.

    paths: where it is there; a namespace package has several folders."""

    def __init__(self, finder, paths):
        self._finder, self._paths = finder, paths
        self.name = os.path.basename(paths[0])

    def __fspath__(self):
        return self._paths[0]                      # it can be opened by that where client and worker share a machine

    __str__ = __fspath__

    def __truediv__(self, name):
        return self.joinpath(name)

    def joinpath(self, *names):
        return _Resource(self._finder, [os.path.join(path, *names) for path in self._paths])

    def _found(self, kind):
        """{path: what is in it} of those paths that are of this kind."""
        answers = {path: self._finder.beside(path) for path in self._paths}
        return {path: content for path, (found, content) in answers.items() if found == kind}

    def is_file(self):
        return bool(self._found("file"))

    def is_dir(self):
        return bool(self._found("folder"))

    def iterdir(self):
        names = [name for content in self._found("folder").values() for name in content]
        return (self / name for name in dict.fromkeys(names))

    def read_bytes(self):
        for content in self._found("file").values():
            return content
        return self._finder.read(self._paths[0])   # raises

    def read_text(self, *args, **options):
        with self.open("r", *args, **options) as file:
            return file.read()

    def open(self, mode="r", *args, **options):
        file = clupy.io.BytesIO(self.read_bytes())
        return file if "b" in mode else clupy.io.TextIOWrapper(file, *args, **options)


def use_script(fetch):
    """Have this process's `__main__` ask the client for names that it lacks: for `from __main__ import x`, and pickles that
    name the script's classes.  fetch(name) -> clupy.script_value's answer.  Not asked for names like __file__."""
    class Main(types.ModuleType):
        def __getattr__(self, name):
            answer = None
            if not (name.startswith("__") and name.endswith("__")):
                answer = fetch(name)
            if answer is None or type(answer) is str:
                raise AttributeError(": ".join(filter(None, [f"module '__main__' has no attribute {name!r}", answer])))
            clupy.set_names(vars(self), unpack_call(answer))
            return vars(self)[name]
    sys.modules["__main__"].__class__ = Main


def use_surroundings(filters, levels, shows, key):
    """Set for this process what its client has set for itself: clupy.surroundings."""
    warnings.resetwarnings()
    for action, message, category, module, line in filters:
        warnings.filterwarnings(action, message, getattr(builtins, category), module, line, append=True)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if shows:
        logging.basicConfig()
    if key:
        importlib.import_module("multiprocessing.process").current_process().authkey = key


# ==== Worker: the processes that calls start =================================
# A forked child of a call has what the worker had, but not its socket; what a pool spawned is a new interpreter.  Both ask
# the worker for the client's modules and the script's names, and it asks the client:
#
#      client  <-- slot --  worker  <-- Family --  child, forked or spawned
#
# How does a spawned one learn of it?  Every pool, be it multiprocessing's, the standard library's or joblib's, gives its new
# process the parent's sys.path, pickled: so one entry of that is an Inheritance.

class Family:
    """Where the processes that a call starts ask what their worker would ask its client.

    fetch(what, *fields) -> the client's answer; any thread may call."""

    def __init__(self, fetch=None):
        self._fetch = fetch
        self.key = os.urandom(32)                  # every user of this machine may connect
        self.address = self._listener = None       # None: no call has started a process yet

    def open(self):
        """Before a process starts: begin to answer, as it would not know where to ask later, and to pickle for it."""
        if "multiprocessing.reduction" in sys.modules:
            sys.modules["multiprocessing.reduction"].ForkingPickler.reducer_override = _reduce_for_process
        if self.address is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=self._answer_all, name="clupy-family", daemon=True).start()
            self.address = self._listener.getsockname()

    def _answer_all(self):
        with self._listener:
            while True:
                asker, _ = self._listener.accept()
                with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):   # it was killed, or the slot has ended
                    asker.settimeout(clupy.HANDSHAKE_TIME)
                    with asker, asker.makefile("rwb") as file:
                        self._answer(file)

    def _answer(self, file):
        if clupy.hmac.compare_digest(file.read(clupy.PROOF_SIZE), proof(self.key, b"ask")):
            file.write(proof(self.key, b"answer") + pickle.dumps(self._fetch(*pickle.load(file))))

    def leave(self):
        """In a forked child: who asks must not wait for us when the worker has ended."""
        if self._listener is not None:
            self._listener.close()


def ask_worker(address, key, *question):
    """In a process that a call started: the client's answer to the question.  Raises OSError when the slot has ended."""
    with socket.create_connection(address) as sock, sock.makefile("rwb") as file:
        file.write(proof(key, b"ask") + pickle.dumps(question))
        file.flush()
        if not clupy.hmac.compare_digest(file.read(clupy.PROOF_SIZE), proof(key, b"answer")):
            raise ConnectionError("the slot has ended")
        return pickle.load(file)


def _reduce_for_process(_, obj):
    """What multiprocessing's own pickler says of obj: a function or class that is not found under its name goes by value.
    Such are lambdas, and a function of the script that is an argument of the call, or is there in a newer version."""
    if (not isinstance(obj, (types.FunctionType, type)) or clupy._named(obj) is obj or clupy._is_scripts(obj)):
        return NotImplemented
    return unpack_call, (clupy._dumps(clupy._by_value_pickler(), obj),)


class Inheritance(str):
    """The entry of sys.path by which a spawned process becomes one of the family: there it is unpickled by `inherit`.
    Wherever else it travels, it is the text that it is here."""

    def __new__(cls, entry, family, own, server):
        self = super().__new__(cls, entry)
        self.family, self.rest = family, (own, server)
        return self

    def __reduce__(self):
        context = sys.modules.get("multiprocessing.context")
        if context is None or context.get_spawning_popen() is None:
            return str, (str(self),)
        self.family.open()
        given = str(self), self.family.address, self.family.key, *self.rest
        return eval, (INHERIT.format(folder=os.path.dirname(os.path.abspath(__file__)), given=given),)


INHERIT = "__import__('sys').path.insert(0, {folder!r}) or __import__('clupy_server').inherit(*{given!r})"


def inherit(entry, address, key, own, server):
    """In a spawned process, before it has its parent's sys.path: have it import what the worker can."""
    family = Family()
    family.address, family.key = address, key
    family.open()
    fetch = functools.partial(ask_worker, address, key)
    Finder(fetch, own, server, itertools.count().__next__).install()
    use_script(functools.partial(fetch, "main"))
    return Inheritance(entry, family, own, server)


# ==== Worker: the process that runs calls ====================================
# Started as `python -P -c BOOT`, its arguments in it, so that nothing of the server's folder can be imported by accident and
# `__main__` is clean; or forked from a process that was started so, which is the same but for the time it takes.  It says
# "r" on its channel when it is warm, and waits there for one slot's socket.

BOOT = """import sys
sys.path.insert(0, {folder!r})
from clupy_server import work
del sys.path[0], sys
work, _ = None, work({arguments!r})"""


def work(arguments):
    """Be a worker: wait for a slot, run its calls, return when it ends."""
    given = json.loads(arguments)
    arm_lifeline(given["lifeline"])
    note_client_classes()                          # imports cloudpickle, too, which nearly every client needs
    if "template" in given:
        given = fork_workers(socket.socket(fileno=given["template"]), given["lifeline"])
        arm_lifeline(given["lifeline"])
    faulthandler.enable(given["stack"])
    try:
        faulthandler.register(STACK_SIGNAL, file=given["stack"], all_threads=False)
    except (OSError, RuntimeError):
        signal.signal(STACK_SIGNAL, signal.SIG_IGN)    # it would end us; the error of a time-out has no stack then
    limit_resources(given["files"], given["memory_limit"])
    signal.signal(signal.SIGINT, signal.default_int_handler)       # a server in the background of a shell ignores it
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    hold_output()
    board = mmap.mmap(given["board"], mmap.PAGESIZE)
    with socket.socket(fileno=given["channel"]) as channel:
        channel.send(b"r")
        slot = receive_slot(channel)
    if slot:
        live_by(lambda: Worker(board, given["memory_limit"], *slot).run())


def how_it_ended(pid):
    """(exit code, peak memory) of a child, for which this waits.  Raises ChildProcessError when it is none of ours."""
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fork_workers(channel, lifeline):
    """Be a template: do what the server asks for until it closes the channel.  Returns in each worker that was forked, alone.

    So here is one thread and nothing that workers must not share.  (`random` seeds itself anew in a forked child.)"""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as a program may have it, it would hide how workers end
    _ = resource.getrlimit, concurrent.futures.ThreadPoolExecutor      # these are imported at first use, by every worker
    gc.freeze()                                    # else the collector writes to, and so copies, what workers share
    channel.send(b"r")
    while True:
        data, files, _, _ = socket.recv_fds(channel, 1 << 12, len(WORKER_ENDS), socket.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        given, answer = json.loads(data), None
        try:
            if "pid" in given:
                answer = how_it_ended(given["pid"])
            elif os.fork() == 0:
                break                              # and the worker answers
        except OSError as error:
            answer = error.errno
        for fd in files:
            os.close(fd)
        if answer is not None:
            channel.send(json.dumps(answer).encode())
    *own, out, err = files
    os.close(lifeline)
    os.setsid()                                    # before the server has our number, as it signals our group
    for stream, fd in ((1, out), (2, err)):
        os.dup2(fd, stream)
        os.close(fd)
    with channel:
        channel.send(json.dumps([os.getpid()]).encode())
    return given | dict(zip(WORKER_ENDS, own))


def live_by(run):
    """Run what this worker lives by.  What it raises ends the process at once, beside threads that calls have left, and
    which Python would wait for: so the worker is known to be dead, and its calls go on elsewhere."""
    try:
        run()
    except BaseException:                          # the process's edge: a user's signal handler may raise at any moment
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def limit_resources(files, memory):
    """Let this process have so many files, and bytes of data (None: any number), where the system can count them."""
    with contextlib.suppress(OSError, ValueError):         # the server's own limit stands, which is higher
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if memory:
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        except (OSError, ValueError) as error:
            print(f"clupy worker: a memory_limit of {memory} bytes cannot be kept here: {error}", file=sys.stderr)


def arm_lifeline(lifeline):
    """Let this worker and its children be killed when the server is gone: the pipe's other end is the server's alone.

    On Linux the kernel does it, whoever holds the GIL then: the pipe's end raises SIGKILL for our process group.
    Elsewhere, and where that is refused, a thread reads the pipe."""
    try:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    except (AttributeError, OSError):
        threading.Thread(target=_await_server, args=(lifeline,), name="clupy-lifeline", daemon=True).start()
    else:
        if select.select([lifeline], [], [], 0)[0]:        # it was gone before we were armed
            _await_server(lifeline)


def _await_server(lifeline):
    os.read(lifeline, 1)                           # nothing is ever written: the end, when the server is gone
    os.killpg(os.getpgrp(), signal.SIGKILL)


def hold_output():
    """Have the ends to read of our output's pipes, too.  A server that is killed loses its own before or after the lifeline, as
    the kernel likes: what a call prints in between would be an error of the call's.  Children, which may outlive us, do not."""
    held = []
    for stream in (1, 2):
        with contextlib.suppress(OSError):         # there is no /proc
            held.append(os.open(f"/proc/self/fd/{stream}", os.O_RDONLY | os.O_NONBLOCK))

    def release():
        while held:
            os.close(held.pop())
    os.register_at_fork(after_in_child=release)


def receive_slot(channel):
    """(socket, what the server says of the slot) from the channel; None when the server needs this worker no more."""
    data, files = b"", []
    while not data.endswith(b"\n"):
        part, fds, _, _ = socket.recv_fds(channel, 1 << 16, 1, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not part:
            return None
        data += part
        files += fds
    sock = socket.socket(fileno=files[0])
    sock.set_inheritable(False)
    sock.setblocking(True)
    return sock, json.loads(data)


Unopened = collections.namedtuple("Unopened", "payload setup")     # a function that has not been called yet


class Functions:
    """The functions that a worker knows, and what comes of calling them."""

    def __init__(self, memory_limit, server):
        self.memory_limit, self.server = memory_limit, server
        self._functions = {}                       # {id: the function, or Unopened until its first call}
        self._names = {}                           # {id: its name, for messages}

    def learn(self, id, payload, name_and_setup):
        """Know a function from now on, or, without a payload, no more."""
        if payload is None:
            self._functions.pop(id, None)
            self._names.pop(id, None)
        else:
            self._names[id], setup = name_and_setup
            self._functions[id] = Unopened(payload, setup)

    def _function(self, id):
        known = self._functions[id]
        if type(known) is Unopened:
            payload, setup = known
            if setup is not None:
                clupy.set_up(setup, unpack_call)
            known = self._functions[id] = unpack_call(payload)
        return known

    def outcome(self, id, arguments):
        """(succeeded, value or payload) of a call; raises nothing."""
        try:
            func = self._function(id)
            args, kwargs = clupy.unpack_arguments(arguments, unpack_once)
            value = func(*args, **kwargs)
            if type(value) in clupy.PLAIN:
                return True, value
            if clupy.inspect.iscoroutine(value):
                value = asyncio.run(value)
        except BaseException as error:             # the outcome of the call, whatever the user's code raised
            if isinstance(error, MemoryError) and self.memory_limit:
                error.add_note(f"memory_limit is {self.memory_limit >> 20} MB for a worker on {self.server}")
            if type(error) in (ValueError, TypeError) and "read-only" in str(error):       # numpy's words, and Python's
                error.add_note("arrays of a Ref (clupy.share) are read-only, as all processes of a machine have them from one "
                               "piece of memory: change a copy, array.copy()")
            return False, clupy.pack_exception(error, 1, f"{self.server} {os.getpid()}")
        try:
            return True, value if type(value) in clupy.PLAIN else clupy.pack_result(value, self._names[id])
        except BaseException as error:             # what the user's own __reduce__ thinks of
            return False, clupy.pack_exception(error.with_traceback(None))


class Parts:
    """Sends what is done of a chunk of `map` that takes long: a thread looks every PART_TIME, while chunks run."""

    def __init__(self, worker):
        self._worker = worker
        self._now = None                           # (number of the call, its _Part)
        self._idle, self._wake = None, threading.Semaphore(0)          # whether the thread waits; None: there is none yet

    def begin(self, results):
        part = clupy._Part(results)
        self._now = self._worker.current, part
        if self._idle:
            self._wake.release()
        elif self._idle is None:
            self._idle = False
            threading.Thread(target=self._run, name="clupy-parts", daemon=True).start()
        return part

    def _run(self):
        while True:
            now = number, part = self._now
            if part.over:
                self._idle = True                  # first: `begin` writes `_now`, and looks then
                if self._now is now:
                    self._wake.acquire()
                self._idle = False
                continue
            time.sleep(clupy.PART_TIME)
            if self._now is now and (results := part.take()):
                with contextlib.suppress(OSError):         # the slot has ended
                    self._worker.send("part", number, *results)


# Who reads the socket?  The two threads of a worker take turns:
#
#      main thread      works              while `todo` has something
#                       idle, reads        has `_reading`, until something came
#                       idle, waits        for `_reading`, which the reader thread gives up once something came
#      reader thread    dozes              while the main thread is idle and no call began for SHORT_TIME, until the bell rings
#                       watches            else, for SHORT_TIME or until the bell rings
#                       reads              has `_reading`, until the main thread is idle
#
# So while the main thread is idle one of them reads.  No wake-up is lost, since each writes first and looks then:
#
# - The main thread says `idle`, and looks at `todo` before it waits.  The reader thread puts work into `todo`, and looks
#   at `idle` before it reads on.  Whoever comes second sees the other: the work is taken, or `_reading` given up.
# - The reader thread says `_dozing`, and looks at `idle` before it dozes.  The main thread ends `idle`, and looks at
#   `_dozing` before it works.  Whoever comes second sees the other: it does not doze, or the bell rings.
#
# A bell that rings too early is heard at the next wait.

class Worker:
    """The state of a worker process, from its slot's opening to its end.

    The main thread runs calls in the order of `todo`, and reads the socket itself while there are none: so a short call
    costs one change of threads less.  The reader thread reads while user code runs, from SHORT_TIME after it began or
    as soon as an answer is waited for.  Any thread may write."""

    def __init__(self, board, memory_limit, sock, given):
        self.board = board
        self.sock, self.server = sock, given["server"]
        self.pid = os.getpid()
        self.todo = collections.deque()            # items of `calls` that have not begun
        self.functions = Functions(memory_limit, given["server"])
        self.current = 0                           # number of the call that runs
        self.results = collections.deque()         # (number, succeeded, value) that were not sent
        self.held_since = 0.0                      # when the oldest of them was made
        self.busy = 0.0                            # seconds that they took
        self.ended = False                         # the slot is over
        self.nested = NestedCalls(self)
        self.parts = Parts(self)
        self.requests = {}                         # {request: queue for its answer}
        self.idle = False                          # whether the main thread has nothing to do
        self._reading = threading.Lock()           # held by the thread that reads
        self._bell = Doorbell()                    # what the reader thread waits for
        self._dozing = False                       # whether it waits without end
        self._writing = threading.Lock()
        self._lanes = clupy.Lanes()
        self._key = bytes.fromhex(given["key"])
        self._frames = clupy.Frames(lanes=self._lanes)
        if memory_limit:
            clupy.spare.room = 0                   # what nobody uses would count
        clupy.use_services(given["services"])
        self.client = given["client"]
        clupy.use_client(self.client, functools.partial(self.send, "serve"), self.fetch)
        clupy._note_session = self._note_session
        clupy._sender = os.urandom(8)              # of names that calls here bind anew
        clupy._engine = self.nested
        follow_threads(self)
        tls = TlsSocket(sock, self._key, given["how"], given["certificate"]) if given["how"] else None
        self.sock = tls or sock
        self.sock.sendall(clupy.tls_proof(self._key, b"admit tls", tls))
        self.family = Family(self.fetch)
        os.register_at_fork(before=self.family.open)

    def call_of_this_thread(self):
        """The number of the call that this thread works for, which may be over; see `follow_threads`."""
        return getattr(threading.current_thread(), "clupy_call", self.current)

    def _note_session(self, session):
        if os.getpid() == self.pid:                # a forked child has a session of its own
            KEEPER.pack_into(self.board, KEEPER_AT, *(session or (0, b"")))

    def run(self):
        """Run calls until the slot ends."""
        threading.Thread(target=live_by, args=(self._read_beside,), name="clupy-reader", daemon=True).start()
        self._work()

    def _work(self):
        """The main thread."""
        todo = self.todo
        while not self.ended:
            try:
                number, function, arguments, timeout = todo.popleft()
            except IndexError:
                self.send_results()
                flush_output()
                self._await_work()
                continue
            if number:
                self._run_call(number, function, arguments, timeout)
            else:                                  # in `todo` like a call, so that the calls before still find it
                self.functions.learn(function, arguments, timeout)

    def _await_work(self):
        self.idle = True
        if not self.todo and not self.ended:
            with self._reading:
                if not self.todo and not self.ended:       # the reader thread may have left something
                    self._read()
        self.idle = False
        if self._dozing:
            self._bell.ring()

    def _run_call(self, number, function, arguments, timeout):
        begin = time.perf_counter()
        if self.results and begin - self.held_since > HOLD_TIME:
            self.send_results()
        BOARD.pack_into(self.board, 0, number, time.monotonic() + timeout if timeout else UNBOUND)
        self.current = number
        succeeded, value = self.functions.outcome(function, arguments)
        if os.getpid() != self.pid:                # a forked child came back from the call: only its parent answers
            os._exit(0)
        BOARD.pack_into(self.board, 0, number, IDLE)
        end = time.perf_counter()
        if not self.results:
            self.held_since, self.busy = end, 0.0
        self.busy += end - begin
        self.results.append((number, succeeded, value))
        if type(value) is tuple:                   # large buffers, not copied: the next call may change them
            self.send_results()

    # -- writing, any thread

    def send(self, *message):
        with self._writing:
            for part in encode(message, self._lanes):
                self.sock.sendall(part)

    def send_results(self):
        try:
            with self._writing:
                results, busy = [], self.busy
                while self.results:
                    results.append(self.results.popleft())
                if results:
                    for part in encode(("results", results, busy), self._lanes):
                        self.sock.sendall(part)
        except OSError:
            self._end()                            # the client is gone

    def fetch(self, what, *fields):
        """The client's answer to a question; blocks the asking thread. Raises ConnectionError when the slot ends."""
        if os.getpid() != self.pid:                # a forked child: the socket is its parent's
            return ask_worker(self.family.address, self.family.key, what, *fields)
        answer = queue.SimpleQueue()
        request = id(answer)
        self.requests[request] = answer
        try:
            if self.ended:
                raise ConnectionError("the slot has ended")
            self.send("fetch", request, what, *fields)
            self.answer_expected()
            reply = answer.get()
        finally:
            del self.requests[request]
        if reply is None:
            raise ConnectionError("the slot has ended")
        return reply[0]

    def answer_expected(self):
        """Somebody here waits for what the client will say: the reader thread reads at once, whoever runs."""
        self._bell.ring()

    # -- reading: never runs user code, so that in the reader thread it answers whatever that does

    def _read(self):
        """Read what is there, or wait for it, and do what it says; at its end the slot has ended."""
        try:
            count = self.sock.recv_into(self._frames.space())
            if count:
                for message in self._frames.filled(count):
                    dispatch(self, self, message)
                return
        except ProtocolError:
            raise                                  # it is an OSError, but no end
        except OSError:
            pass                                   # the client is gone, as at the end
        except MemoryError as error:
            raise MemoryError(str(error) or "no memory for what the client sends") from None
        self._end()

    def _read_beside(self):
        """The reader thread: read while a call takes long."""
        seen = None
        while not self.ended:
            if self.idle and seen == self.current:
                self._dozing = True
                self._bell.wait(None if self.idle else SHORT_TIME)
                self._dozing = False
            else:                                  # short calls come one by one: it is not woken for each of them
                seen = self.current
                self._bell.wait(SHORT_TIME)
            if not self.idle and self._reading.acquire(blocking=False):
                try:
                    self._read_while_busy()
                finally:
                    self._reading.release()

    def _read_while_busy(self):
        self.send_results()                        # a call that takes long began before they were old enough
        while not self.idle and not self.ended:
            if (self.todo or self.results) and not self._has_input(FLUSH_TICK):
                self.send_results()
            else:
                self._read()

    def _has_input(self, milliseconds):
        """Wait for something to read; whether there is."""
        if type(self.sock) is TlsSocket and self.sock.pending():     # TLS has read it already
            return True
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(milliseconds))

    def _end(self):
        """The slot is over, and this process soon: what calls have left may end by itself for as long as a server allows."""
        if not self.ended:
            self.ended = True
            end = threading.Timer(GRACE_TIME, os._exit, (0,))      # Python would wait for threads, for ever
            end.daemon = True
            end.start()
        self.todo.clear()
        for answer in list(self.requests.values()):
            answer.put(None)
        self.nested.lose_all()
        self._bell.ring()

    def on_opening(self, _, own_modules, surroundings, lanes):
        use_surroundings(*surroundings)
        Finder(self.fetch, own_modules, self.server, self.call_of_this_thread).install()
        use_script(functools.partial(self.fetch, "main"))
        sys.path[-1] = Inheritance(sys.path[-1], self.family, own_modules, self.server)
        self.send("opened", self.pid, lanes is not None and self._lanes.accept(lanes, self._key))

    def on_calls(self, _, items):
        self.todo.extend(items)

    def on_released(self, _, places):
        self._lanes.released(places)

    def on_trim(self, _):
        clupy.spare.trim()
        with self._writing:
            self._lanes.trim()

    def on_recall(self, _):
        back = []
        with contextlib.suppress(IndexError):      # the main thread may take the last one
            while True:
                back.append(self.todo.pop())
        back.reverse()
        self.todo.extend(item for item in back if not item[0])     # functions stay, in their order
        self.send_results()                        # first: what is neither in these nor returned runs just now
        self.send("returned", [item[0] for item in back if item[0]])

    def on_fetched(self, _, request, answer):
        if request in self.requests:
            self.requests[request].put((answer,))

    def on_results(self, _, results):
        self.nested.take_results(results)

    def on_part(self, _, number, first, count, results):
        self.nested.take_part(number, first, count, results)


def follow_threads(worker):
    """Have every thread, and what is given to a pool of threads, belong to the call that started or gave it.

    So a thread that outlives its call makes no children for the call that runs then.  The main thread, and threads that
    C code made, have no `clupy_call`: they belong to the call that runs."""
    start, submit = threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit

    def start_for_call(thread):
        thread.clupy_call = worker.call_of_this_thread()
        start(thread)

    def submit_for_call(pool, function, /, *args, **kwargs):
        if isinstance(pool, getattr(concurrent.futures, "InterpreterPoolExecutor", ())):
            return submit(pool, function, *args, **kwargs)         # of Python 3.14; it pickles what it is given
        return submit(pool, run_for_call, worker.call_of_this_thread(), function, *args, **kwargs)

    def run_for_call(number, function, /, *args, **kwargs):
        thread = threading.current_thread()
        before, thread.clupy_call = getattr(thread, "clupy_call", number), number
        try:
            return function(*args, **kwargs)
        finally:
            thread.clupy_call = before

    threading.Thread.start, concurrent.futures.ThreadPoolExecutor.submit = start_for_call, submit_for_call


class Doorbell:
    """What one thread waits for; rung before it waits, it is heard once."""

    def __init__(self):
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self):
        try:
            self._lock.release()
        except RuntimeError:
            pass                                   # it was rung already

    def wait(self, timeout=None):
        self._lock.acquire(timeout=-1 if timeout is None else timeout)


class TlsSocket:
    """A socket under TLS, the server's side, for one reading and one writing thread: OpenSSL's state must not see two
    threads at once, so the socket never blocks in it."""

    def __init__(self, sock, key, how, certificate):
        sock.settimeout(None)                      # a client may be stopped; of one that is gone the server ends the slot
        context = (clupy.certificate_context(*certificate) if how == clupy.BY_CERTIFICATE else
                   clupy.key_context("admit", proof(key, b"tls")))
        self._sock = context.wrap_socket(sock, server_side=True)
        self.get_channel_binding = self._sock.get_channel_binding
        theirs = self._sock.recv(clupy.PROOF_SIZE)             # one record, as it was written
        if not clupy.hmac.compare_digest(theirs, clupy.tls_proof(key, b"dial tls", self._sock)):
            raise clupy.SecretError("somebody stands between the client and this worker, and has TLS with each")
        self._sock.setblocking(False)
        self._lock = threading.Lock()

    def fileno(self):
        return self._sock.fileno()

    def detach(self):
        return self._sock.detach()

    def pending(self):
        with self._lock:
            return self._sock.pending()

    def recv_into(self, buffer):
        return self._when_ready(self._sock.recv_into, buffer)

    def sendall(self, data):
        view = memoryview(data).cast("B")
        while view:
            view = view[self._when_ready(self._sock.send, view[:1 << 20]):]

    def _when_ready(self, operation, buffer):
        while True:
            with self._lock:
                try:
                    return operation(buffer)
                except clupy.ssl.SSLWantReadError:
                    event = select.POLLIN
                except clupy.ssl.SSLWantWriteError:
                    event = select.POLLOUT
            poller = select.poll()
            poller.register(self._sock, event)
            poller.poll()


def flush_output():
    """What was printed without a line's end is shown before the worker waits."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):     # the call set it to None or closed it: its affair
            stream.flush()


class NestedCalls(clupy.BaseEngine):
    """The engine of calls inside calls: they go back over the slot to the client, which queues them newest first."""

    nested = True

    def __init__(self, worker):
        super().__init__()
        self._worker = worker
        self._calls = {}                           # {number: call} without an outcome
        self._numbers = itertools.count(1)
        self._known = clupy.Known()                # the functions that the client has
        self._sending = threading.Lock()           # so that no call overtakes its function

    @property
    def where(self):
        return f"{self._worker.server} {self._worker.pid}"

    def begin_part(self, results):
        return self._worker.parts.begin(results)

    def take_part(self, number, first, count, results):
        call = self._calls.get(number)
        if call is not None and call._sink:
            call._sink.take_part(first, count, results)

    def join(self):
        return clupy.Cluster(None, self._worker.fetch("slots"), None)

    def hold(self, call):
        self._note_parent(call)
        super().hold(call)

    def _note_parent(self, call):
        if call._outer is None:
            call._outer = self._worker.call_of_this_thread()

    def submit(self, call):
        if name := getattr(_importing, "name", None):        # else each worker that runs one makes all of them again
            raise clupy.ClupyError(f"module {name!r} makes calls when it is imported, as it is in a worker now: put them under "
                                   "if __name__ == '__main__':")
        worker, function = self._worker, call._function
        number = call._number = next(self._numbers)
        self._note_parent(call)
        item = number, call._outer, function.id, call._arguments, call._timeout, call._retries, call._limit
        self._calls[number] = call
        try:
            if worker.ended:
                raise ConnectionError("the slot has ended")
            worker.send_results()
            with self._sending:
                worker.send("nested", [item], self._news_of(function))
            worker.answer_expected()
        except OSError as error:
            del self._calls[number]
            clupy.conclude([(call, False, clupy.Closed(f"the client is gone: {error}"))])

    def _news_of(self, function):
        """{id: (payload, name, setup), or None to drop it} of what the client has to learn to run this function."""
        new, dropped = self._known.learn(function)
        return {**dict.fromkeys(dropped), function.id: (function.payload, function.name, function.setup)} if new else {}

    def take_results(self, results):
        clupy.conclude([(call, succeeded, value) for number, succeeded, value in results
                        if (call := self._calls.pop(number, None)) is not None])

    def lose_all(self):
        calls, self._calls = list(self._calls.values()), {}
        clupy.conclude([(call, False, clupy.Closed("the client is gone")) for call in calls])

    def cancel(self, call):
        if self._calls.pop(call._number, None) and not self._worker.ended:
            self._worker.send("forget", [call._number])

    def calls(self):
        return [*self._calls.values(), *super().calls()]

    def abandon(self):
        """In a forked child of a call: the slot's socket is the parent's alone."""
        os.close(self._worker.sock.detach())
        self._worker.family.leave()
        clupy.use_client(self._worker.client)


# ==== Environments ===========================================================
# An environment is a virtual environment that has exactly the libraries of one Resolution.  It is never changed, only
# replaced: built beside the live ones, at its final place (its scripts have absolute paths in them), and it exists once
# its last file does.  The server's own Python is never touched, and its libraries follow behind:
#
#   folder/lock                  held by the one builder of this machine, and by its pip
#   folder/3f2a.../bin/python    what workers run
#   folder/3f2a.../lib/...       the Pins, as pip installed them; zz-server.pth leads on to the server's own
#   folder/3f2a.../clupy.json    written last; without it the folder is remains, swept by the next builder.
#                                Who uses the environment has a shared lock on it; its time is the last use's
#   folder/trash-...             on its way out
#
# Locks are flock's: they end with the last process that has the descriptor.  The builder's pip inherits its lock, so the
# pip of a server that was killed cannot write into what the next builder builds.

LOCK_POLL = 0.2                    # seconds between looks at another's lock: a wait inside flock cannot be cancelled


def default_environments_dir():
    """The folder for environments in the user's cache: losing it costs time only.  Raises ConfigurationError."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or clupy.home_path("~/.cache"), "clupy", "environments")


def site_paths():
    """The server's own site-packages, and its user's."""
    return site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])


def server_paths():
    """The folders of the server's own libraries, to which its environments lead on: PYTHONPATH and `site_paths`."""
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return [path for path in given + site_paths() if os.path.isdir(path)]


def start_state():
    """What an interpreter takes from this machine at its start and keeps: working directory and folders of libraries; those in
    site-packages may add more, and have another time when something was installed."""
    here = os.stat(".")
    times = [os.stat(path).st_mtime_ns for path in site_paths() if os.path.isdir(path)]
    return (here.st_dev, here.st_ino), server_paths(), times


def environment_id(pins, python=None, system=None):
    """The name of the environment of these Pins.

    python: text that tells interpreters, and what they have, from each other; None: this one.  system: likewise text for
    systems on which a wheel may differ."""
    python = python or f"{sys.implementation.cache_tag} {sys.version} {sys._base_executable} {server_paths()}"
    return clupy_master.digest(sorted(pins), python, system or f"{sysconfig.get_platform()} {platform.libc_ver()}")


def worker_command(path, variables):
    """(python, variables) to start a worker with in the environment at path; None: in the server's own Python.

    PYTHONPATH would come before the environment: what it names comes behind, by `server_paths`."""
    if path is None:
        return sys.executable, dict(variables)
    kept = {key: value for key, value in variables.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    search = os.pathsep.join(filter(None, [str(pathlib.Path(path, "bin")), variables.get("PATH")]))
    return str(pathlib.Path(path, "bin", "python")), kept | {"VIRTUAL_ENV": str(path), "PATH": search}


def _touch(descriptor):
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))            # finer than the kernel's own idea of now, which has ties


class Environment:
    """A complete environment that is in use, and so stays, until `close`.  From Environments."""

    def __init__(self, path, descriptor):
        self.path, self._descriptor = path, descriptor

    @property
    def id(self):
        return self.path.name

    def close(self):
        """End the use, and note its time.  A second call does nothing."""
        if self._descriptor is not None:
            _touch(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


class Environments:
    """The environments in a folder, which servers of one machine may share.  At most `kept` complete ones remain after a
    build, unless more are in use.  Used in any loop; the folder is the only state."""

    def __init__(self, folder=None, kept=10):
        self._folder, self.kept = folder, kept

    @functools.cached_property
    def folder(self):
        """Where they are; asked for when there is one to be built, since not every user has a home."""
        return pathlib.Path(clupy.home_path(self._folder) if self._folder else default_environments_dir()).absolute()

    def complete(self):
        """The ids of those that are complete, the most recently used first."""
        times = {}
        for marker in self.folder.glob("*/clupy.json"):
            with contextlib.suppress(FileNotFoundError):       # somebody removes it just now
                times[marker.parent.name] = marker.stat().st_mtime_ns
        return sorted(times, key=times.get, reverse=True)

    def use(self, environment_id):
        """The Environment of that id, in use from now on, or None if it is not there."""
        marker = self.folder / environment_id / "clupy.json"
        with contextlib.ExitStack() as undo:
            try:
                descriptor = os.open(marker, os.O_RDWR)
                undo.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if not os.path.samestat(os.fstat(descriptor), os.stat(marker)):
                    return None                    # removed between the lines above
            except (FileNotFoundError, BlockingIOError):       # not there, or being removed
                return None
            _touch(descriptor)
            undo.pop_all()
        return Environment(marker.parent, descriptor)

    async def build(self, resolution, wheels={}, progress=lambda line: None):
        """The Environment for a Resolution with pins, in use: the one that is there, or built now, after whoever else
        builds on this machine.

        wheels: {sha256: bytes} of the pins that the master ships, by url "wheel:...".  Raises DependencyError.
        Afterwards, also if cancelled, there is all of it or nothing."""
        name = environment_id(resolution.pins)
        try:
            if environment := self.use(name):
                return environment
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.folder / "lock", "a") as lock:      # closed, and pip ended: unlocked
                await self._acquire(lock, progress)
                if environment := self.use(name):
                    return environment
                for entry in list(self.folder.iterdir()):
                    if entry.is_dir() and not (entry / "clupy.json").exists():
                        await self._discard(entry)
                await self._install(self.folder / name, resolution, wheels, progress, lock.fileno())
                environment = self.use(name)
                for unused in self.complete()[self.kept:]:
                    await self._remove(unused)
                return environment
        except OSError as error:
            raise DependencyError(f"environment {name} cannot be built in {self.folder}: {error}") from error
        except clupy.ConfigurationError as error:
            raise DependencyError(f"environment {name} cannot be built: {error}, or environments_dir") from None

    async def _acquire(self, lock, progress):
        waits = False
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waits:
                    progress("waiting for another environment to be built on this machine")
                waits = True
            await asyncio.sleep(LOCK_POLL)

    async def _install(self, path, resolution, wheels, progress, lock):
        what = f"environment {path.name} cannot be built"
        try:
            venv = [sys.executable, "-P", "-m", "venv", "--without-pip", "--symlinks", str(path)]
            await clupy_master.run_command(venv, what, keep=(lock,))
            pins = [pin.requirement for pin in resolution.pins]
            lines = await asyncio.to_thread(clupy_master.placed, pins, wheels, path / "wheels")
            requirements = path / "requirements.txt"
            requirements.write_text("\n".join(lines), "utf-8")
            # Not --no-deps: a server of another platform may need a library that the master's does not.
            await clupy_master.pip(["--python", str(path / "bin" / "python"), "install", *resolution.pip_options,
                                    "-r", str(requirements)], what, progress, keep=(lock,))
            await asyncio.to_thread(shutil.rmtree, path / "wheels", ignore_errors=True)        # absent, mostly
            # After pip, which would take the server's libraries for its own.  ascii: of any locale.
            pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": str(path)}), "zz-server.pth").write_text(
                "".join(f"import site; site.addsitedir({folder!a})\n" for folder in server_paths()))
            await asyncio.to_thread(os.sync)       # a power cut must not leave the marker without the rest
            marker = path / "clupy.json.new"
            marker.write_text(json.dumps({"libraries": pins}, indent=1))
            marker.rename(path / "clupy.json")
        except BaseException:
            await self._discard(path)
            raise

    async def _remove(self, environment_id):
        """Remove an environment, unless it is in use."""
        path = self.folder / environment_id
        marker = path / "clupy.json"
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(marker, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            marker.unlink()
            await self._discard(path)

    async def _discard(self, path):
        """Take path away at once, then free its space. What cannot be removed, the next builder tries again."""
        trash = self.folder / f"trash-{os.urandom(8).hex()}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(trash)
        await asyncio.to_thread(shutil.rmtree, trash, ignore_errors=True)


# ==== Process: a worker as its server sees it ================================

def boot(**given):
    """The program of a process that becomes a worker, or a template."""
    return BOOT.format(folder=os.path.dirname(os.path.abspath(__file__)), arguments=json.dumps(given))


def worker_variables(environ, slots, secret):
    """The environment variables of a worker: without the secret, with one node's cores divided by its slots, and with a hash
    seed that all workers of the cluster share, so that hash(text) % n is the same in each."""
    variables = {name: value for name, value in environ.items() if name not in ("CLUPY_SECRET", "CLUPY_MASTER")}
    seed = int.from_bytes(proof(secret, b"hash seed")[:4], "big")
    variables.setdefault("PYTHONHASHSEED", str(seed or 1))         # 0 would let strangers foresee collisions
    threads = str(max(1, clupy.cores() // slots))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
                 "VECLIB_MAXIMUM_THREADS"):
        variables.setdefault(name, threads)
    return variables


def can_fork():
    """Whether a Template is of use here: whether who is not their parent can see how workers are.  On Linux."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):              # macOS; an old kernel, or a sandbox that does not know it
        return False
    return os.path.exists("/proc/self/stat")


class Template:
    """A process in which all is imported that workers need, and which forks them: each costs 5 ms of the processor then, not
    70, and a third of the memory.

    It does nothing unasked, so it is asked, and its answer waited for, at once; it ends with its channel.  Workers outlive
    it, but as they are its children nobody knows how they end then.

    given: all that a process has from its start: (python, variables), and more that only tells one start from another;
    then: called when it is ready, or has failed."""

    def __init__(self, given, then):
        self.given, self._then = given, then
        self.ready = self.works = self.over = False        # it can be asked; it has forked a worker; it is no more
        self._users = 1                            # who asks: the Libraries, and each Process that it has forked
        python, variables = given[0]
        with contextlib.ExitStack() as undo:
            self.channel, channel = map(undo.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            lifeline, self._lifeline = make_pipe(undo, undo)
            self._popen = subprocess.Popen(        # its streams are of the kind that a worker's are: Python has looked then
                [python, "-P", "-c", boot(template=channel.fileno(), lifeline=lifeline)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[channel.fileno(), lifeline],
                start_new_session=True, env=variables)
            undo.pop_all()
        channel.close()
        os.close(lifeline)
        os.set_blocking(self._popen.stdout.fileno(), False)
        self.channel.settimeout(TEMPLATE_TIME)
        asyncio.get_running_loop().add_reader(self.channel, self._begin)

    def __repr__(self):
        return f"<Template {self._popen.pid} {'over' if self.over else 'ready' if self.ready else 'starting'}>"

    def _begin(self):
        asyncio.get_running_loop().remove_reader(self.channel)
        try:
            self.ready = self.channel.recv(1) == b"r"
        except ConnectionError:
            pass
        if not self.ready:
            self._fail("it ended at its start")
        self._then()

    def fork(self, limits, files):
        """The pid of a new worker, with these files as WORKER_ENDS names them."""
        pid, = self._ask(limits, files)
        self.works = True
        return pid

    def wait(self, pid):
        """`how_it_ended` of a worker that has ended."""
        try:
            return self._ask({"pid": pid})
        except ChildProcessError:
            return how_it_ended(pid)               # it is our child by now if we are the container's first process

    def _ask(self, question, files=()):
        """Its answer.  Raises the OSError that it met, or ChildProcessError: it is over."""
        try:
            socket.send_fds(self.channel, [json.dumps(question).encode()], files)
            if not (answer := self.channel.recv(1 << 12)):
                raise ConnectionResetError("it was killed")
        except OSError as error:
            self._fail(error)
            raise ChildProcessError("what was to fork a worker has ended") from None
        if type(answer := json.loads(answer)) is int:
            raise OSError(answer, os.strerror(answer))
        return answer

    def _fail(self, why):
        if not self.over:
            log.warning("the process that forks workers has failed: %s %s", why, self._close())

    def hold(self, stack):
        """Have it in use until the ExitStack closes."""
        self._users += 1
        stack.callback(self.release)

    def release(self):
        """A user less; without any it ends."""
        self._users -= 1
        if not self._users and not self.over:
            self._close()

    def _close(self):
        """End it; what it had to say."""
        self.over = True
        asyncio.get_running_loop().remove_reader(self.channel)
        self.channel.close()
        os.close(self._lifeline)
        self._popen.kill()
        self._popen.wait()
        with self._popen.stdout as out:
            return (out.read() or b"").decode(errors="replace").strip()

    def descriptors(self):
        return [] if self.over else [self.channel.fileno(), self._lifeline, self._popen.stdout.fileno()]


class Process:
    """One worker process: its board, and how it begins and ends.  For the server's loop alone.

    workers: the Workers that it is one of; libraries: the Libraries in whose environment it runs; template: the Template that
    forks it, or None."""

    def __init__(self, workers, libraries, template):
        self.workers, self.libraries, self.template = workers, libraries, template
        self.ready = False                         # warm, and waits for a slot
        self.slot = None                           # SlotRow it serves, or did
        self.why = None                            # one of Why, if the server ended it; None: it ended by itself
        self.late = False                          # a call is over its time, and being looked at
        self.dead = asyncio.get_running_loop().create_future()     # (exit code, peak memory)
        self._stopping = asyncio.Lock()            # held while it is stopped and looked at
        self._start()

    def __repr__(self):
        return f"<Process {self.pid} {self.slot or ('ready' if self.ready else 'starting')}>"

    @property
    def usable(self):
        """Whether it lives, and is to go on living."""
        return not self.why and not self.dead.done()

    def _start(self):
        """Start the process. What fails on the way undoes it all: no process, descriptor or reader is left."""
        loop = asyncio.get_running_loop()
        # In any case theirs are closed here; held is closed when the worker is dead; ours are closed by what they are.
        with contextlib.ExitStack() as held, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            environment = self.libraries.hold()    # None: our own Python
            if environment:
                held.callback(environment.close)
            self.channel, channel = (stack.enter_context(end)
                                     for stack, end in zip((held, theirs), socket.socketpair(), strict=True))
            lifeline, self.lifeline = make_pipe(theirs, held)
            (out_here, out), (err_here, err), (stack_here, stack) = (make_pipe(ours, theirs) for _ in range(3))
            board = make_board(theirs)
            self.board = ours.enter_context(mmap.mmap(board, mmap.PAGESIZE))
            BOARD.pack_into(self.board, 0, 0, IDLE)
            keep_reserve(board, sum(not other.slot for other in self.workers.processes.values()))
            self.pid = self._launch(channel.fileno(), lifeline, stack, board, out, err)
            if self.template:
                self.template.hold(held)
            ours.callback(self._undo)
            self.channel.setblocking(False)
            loop.add_reader(self.channel, self._channel_readable)
            held.callback(loop.remove_reader, self.channel)
            self.output = Output(self, {out_here: "out", err_here: "err", stack_here: "stack"}, ours)
            self.pidfd = self._watch_end(loop, held)   # last: nothing that is watched is undone
            ours.pop_all()
            self._held = held.pop_all()

    def _launch(self, *files):
        """Have it forked, or start it, with these files as WORKER_ENDS names them: its pid."""
        limits = {"memory_limit": self.workers.settings.memory_limit, "files": clupy.raise_descriptor_limit()}
        if self.template:
            return self.template.fork(limits, files)
        *own, out, err = files
        python, variables = self.libraries.command()
        popen = subprocess.Popen([python, "-P", "-c", boot(**limits, **dict(zip(WORKER_ENDS, own)))], stdin=subprocess.DEVNULL,
                                 stdout=out, stderr=err, pass_fds=own, start_new_session=True, env=variables)
        popen.returncode = 0                       # it is `_wait` that waits
        return popen.pid

    def _wait(self):
        return (self.template.wait if self.template else how_it_ended)(self.pid)

    def _undo(self):
        """The start failed after the process was there."""
        self._signal(signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):       # somebody else has waited for it
            self._wait()

    def _watch_end(self, loop, undo):
        """Have `_reap` called when the process has ended: by a pidfd, or None and a thread where there is none."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):          # macOS; an old kernel, or a sandbox that does not know it
            if self.template:
                raise                              # nobody else can see its end
            try:
                threading.Thread(target=self._await_end, args=(loop,), name="clupy-await", daemon=True).start()
            except RuntimeError as error:
                raise OSError(errno.EAGAIN, str(error)) from None
            return None
        undo.callback(os.close, pidfd)
        loop.add_reader(pidfd, self._reap)
        undo.callback(loop.remove_reader, pidfd)
        return pidfd

    def _channel_readable(self):
        asyncio.get_running_loop().remove_reader(self.channel)
        try:
            self.ready = self.channel.recv(1) == b"r"
        except ConnectionError:
            self.ready = False                     # it died; `_reap` will tell
        if self.ready:
            self.workers.look()

    def hand_over(self, slot, given):
        """Give the worker the slot's socket. Raises OSError if it is dead."""
        self.ready = False
        socket.send_fds(self.channel, [json.dumps(given).encode() + b"\n"], [slot.sock.fileno()])
        self.slot, slot.process = slot, self

    # -- the board

    def begun(self):
        """(number of the call begun last, its deadline) as the board says."""
        return BOARD.unpack_from(self.board)

    def zookeeper_session(self):
        """(id, password) of the session that the worker had when it died, or None."""
        session = KEEPER.unpack_from(self.board, KEEPER_AT)
        return session if session[0] else None

    def runs(self, number):
        begun, deadline = self.begun()
        return begun == number and deadline != IDLE

    # -- the end

    def end(self, why, grace=0.0):
        """End the worker and its children: after `grace` seconds in which it may end by itself, by SIGKILL."""
        self.why = self.why or why
        if self.slot and grace:
            self.slot.hang_up()
        if grace:
            asyncio.get_running_loop().call_later(grace, self.kill)
        else:
            self.kill()

    def kill(self):
        if not self.dead.done():
            self._signal(signal.SIGKILL)

    def _signal(self, number, group=True):
        try:
            (os.killpg if group else os.kill)(self.pid, number)
        except ProcessLookupError:
            pass                                   # it has ended by itself
        except PermissionError:                    # macOS says so of a group whose leader is a zombie
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill_call(self, number, why):
        """Kill the worker if it runs this call, and no other; False if it does not.

        Its Python stack is taken first; it is stopped while the board is read, so that no call can begin between."""
        if why == Why.TIMEOUT and not self.dead.done() and self.runs(number):
            self._signal(STACK_SIGNAL, group=False)
            await asyncio.sleep(STACK_TIME)
        async with self._stopping:
            if self.dead.done() or not self.runs(number):
                return False
            self._signal(signal.SIGSTOP, group=False)
            while not self._is_stopped():
                await asyncio.sleep(0.001)
                if self.dead.done():
                    return False
            if not self.runs(number):
                self._signal(signal.SIGCONT, group=False)
                return False
            self.why = why
            self.kill()
            await asyncio.shield(self.dead)
            return True

    def _is_stopped(self):
        if self.template:                          # only a parent may ask by waitid
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{self.pid}/stat", "rb") as file:
                return file.read().rpartition(b") ")[2][:1] == b"T"
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return False                           # it is dead, as `_reap` is about to see

    def _await_end(self, loop):
        """Where there is no pidfd: wait in a thread."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with contextlib.suppress(RuntimeError):    # the loop is closed: nobody waits for this worker any more
            loop.call_soon_threadsafe(self._reap)

    def _reap(self):
        try:
            if not self.template and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            self._signal(signal.SIGKILL)           # the children it left; while it is a zombie nobody else has its number
            how = self._wait()
        except ChildProcessError:                  # the program ignores SIGCHLD, or has waited for all its children
            self._signal(signal.SIGKILL)           # its number may be another's by now, but no other group's
            self._is_dead(UNKNOWN_EXIT, 0)
        else:
            self._is_dead(*how)

    def _is_dead(self, code, peak):
        self.dead.set_result((code, peak))         # first: a fork from now on closes none of what is held
        self._held.close()
        self.workers.died(self)

    def descriptors(self):
        held = [] if self.dead.done() else [self.channel.fileno(), self.lifeline, self.pidfd,
                                            *(self.template.descriptors() if self.template else [])]
        return [fd for fd in (*held, *self.output.pipes) if fd is not None]


class Output:
    """What a worker writes: for the client that has the slot, in whole lines and, after UNFINISHED_TIME, what has no end yet;
    before it has one, for the log; and, kept here, its stack.

    pipes: {descriptor: "out", "err" or "stack"}, closed by `close`, or by `undo` if the start fails."""

    def __init__(self, process, pipes, undo):
        self.process, self.pipes = process, pipes
        self.stack = b""                           # what faulthandler wrote
        self.last_lines = collections.deque(maxlen=LAST_LINES)     # of standard error, since this call began:
        self._call = 0
        self._tails = {"out": "", "err": ""}       # without a line's end yet
        self._passed = {"out": 0, "err": 0}        # characters of these that were passed on all the same
        self._timer = None                         # TimerHandle, while some were not
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in self._tails}
        loop = asyncio.get_running_loop()
        for fd in pipes:
            os.set_blocking(fd, False)
            loop.add_reader(fd, self._read, fd)
            undo.callback(loop.remove_reader, fd)

    def _read(self, fd):
        """Pass on what is there; whether there was anything."""
        try:
            data = os.read(fd, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._close(fd)
        elif self.pipes[fd] == "stack":
            self.stack = (self.stack + data)[-LINE_SIZE:]
        else:
            self._pass_on(self.pipes[fd], data)
        return bool(data)

    def _close(self, fd):
        asyncio.get_running_loop().remove_reader(fd)
        stream = self.pipes.pop(fd)
        os.close(fd)
        if stream != "stack":
            self._pass_on(stream, b"", final=True)

    def _pass_on(self, stream, data, final=False):
        """Send whole lines to the client; final: and what has no end."""
        process, text = self.process, self._tails[stream] + self._decoders[stream].decode(data, final)
        if final and text:
            text += "\n"
        end = text.rfind("\n") + 1 or (len(text) if len(text) > LONGEST_LINE else 0)
        lines, self._tails[stream] = text[:end], text[end:]
        if self._tails[stream] and not self._timer:
            self._timer = asyncio.get_running_loop().call_later(UNFINISHED_TIME, self._pass_tails)
        if not lines:
            return
        passed, self._passed[stream] = self._passed[stream], 0
        if stream == "err":
            if self._call != (call := process.begun()[0]):
                self._call = call
                self.last_lines.clear()
            self.last_lines.extend(lines[-LINE_SIZE:].splitlines())
        if process.slot:
            process.slot.session.printed.show(process.pid, stream, lines[passed:])
        else:
            log.info("worker %s: %s", process.pid, lines.rstrip())

    def _pass_tails(self):
        self._timer = None
        for stream, tail in self._tails.items() if self.process.slot else ():
            if len(tail) > self._passed[stream]:
                self.process.slot.session.printed.show(self.process.pid, stream, tail[self._passed[stream]:])
                self._passed[stream] = len(tail)

    def close(self):
        """Read what the pipes still hold, and close them: all that the worker wrote is there, whoever else has them."""
        for fd in list(self.pipes):
            for _ in range(PIPE_READS):
                if fd not in self.pipes or not self._read(fd):
                    break
            if fd in self.pipes:
                self._close(fd)
        if self._timer:
            self._timer.cancel()


def end_zookeeper_session(hosts, session, ended):
    """End the ZooKeeper session of a worker that is dead, so that what it held is free at once; in a thread of its own.

    session: (id, password); ended: a future that is done then, well or not: by itself it ends after `session` seconds."""
    quiet = logging.getLogger("clupy.zookeeper")
    quiet.setLevel(logging.ERROR)
    try:
        client = clupy.kazoo.KazooClient(hosts, client_id=session, logger=quiet)
        with contextlib.suppress(client.handler.timeout_exception):
            client.start(clupy.FIRST_CONTACT)      # takes the session over, or has a new one if it has ended already
        client.stop()
        client.close()
    except Exception as error:                     # the thread's edge: the interpreter may be ending
        log.debug("the ZooKeeper session of a dead worker ends by itself: %s", error)
    finally:
        ended.set_result(None)


def make_pipe(reader, writer):
    """(end to read, end to write) of a pipe, each closed by its ExitStack."""
    ends = os.pipe()
    for stack, end in zip((reader, writer), ends, strict=True):
        stack.callback(os.close, end)
    return ends


def keep_reserve(newest, spare):
    """Raise EMFILE if too few descriptors are left, beyond the newest one, for connections and spare workers' slots."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if newest + RESERVED_FILES + spare >= limit:   # the system gives the lowest number that is free
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def why_no_worker(error):
    """What an OSError at the start of a worker means, and what to do."""
    if error.errno == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (f"this process may have {limit} open files, and a worker takes {WORKER_FILES}; "
                "more: `ulimit -Hn` of who starts it, or LimitNOFILE= of its unit")
    if error.errno == errno.EAGAIN:
        return f"{error}; the system lets us have no more processes: see `ulimit -u`, or TasksMax= of its unit"
    return str(error)


def make_board(stack):
    """A descriptor, closed by an ExitStack, of a page of memory that is shared and has no name."""
    try:
        fd = os.memfd_create("clupy-board")
    except (AttributeError, OSError):              # macOS; an old kernel, or a sandbox that does not know it
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    stack.callback(os.close, fd)
    os.ftruncate(fd, mmap.PAGESIZE)
    return fd


# ==== Workers: who serves which slot =========================================

class SlotRow:
    """One slot as its server sees it: from the client's preamble to the end of its worker."""

    def __init__(self, session, number, nested, sock):
        self.session, self.number, self.nested = session, number, nested
        self.sock = sock                           # kept open until the client has read to the end
        self.process = None                        # Process, once a worker is free
        self.since = 0.0                           # when that was, monotonic

    def __repr__(self):
        return f"slot {self.number} of {self.session.name}"

    def end(self, why):
        """End it, by the end of its worker if it has one."""
        if self.process:
            self.process.end(why, GRACE_TIME)
        else:
            self.session.server.workers.withdraw(self, why)

    def hang_up(self):
        """Let the worker read the end."""
        with contextlib.suppress(OSError):         # the client's end is gone already
            self.sock.shutdown(socket.SHUT_RD)


def assignments(waiting, ready, room, room_nested):
    """[(slot, worker), ...]: who serves whom from now on; first come first served, in the libraries that each wants.

    waiting: [(slot, its Libraries, None until they are built)]; ready: workers that wait for a slot; room: how many more
    slots there may be; room_nested: {session: how many more of its nested ones}.  Pure."""
    chosen, ready, room_nested = [], list(ready), dict(room_nested)
    for slot, libraries in waiting:
        worker = next((worker for worker in ready if worker.libraries == libraries), None)
        if worker is None or (room_nested[slot.session] if slot.nested else room) <= 0:
            continue
        if slot.nested:
            room_nested[slot.session] -= 1
        else:
            room -= 1
        ready.remove(worker)
        chosen.append((slot, worker))
    return chosen


def changes(most, awaited, default, spare):
    """([Libraries, ...] for each of which a worker is to be started, [spare workers that nobody needs]).

    most: spare workers that there may be; awaited: the Libraries that slots wait for, which come first; default: those
    of all others, which are kept warm; spare: the workers without a slot that there are.  Pure."""
    missing = awaited[:max(0, most)]
    missing += [default] * (most - len(missing))
    needless = []
    for worker in spare:
        if worker.libraries in missing:
            missing.remove(worker.libraries)
        else:
            needless.append(worker)
    return missing, needless


class Pause:
    """The time in which no worker is started, because it would fail: one timer, longer each time, told once."""

    def __init__(self, then):
        self._then = then                          # called when it is over, to end it
        self._timer = None
        self._length, self._why = RETRY_START[0], ""

    def __bool__(self):
        return self._timer is not None

    def begin(self, why, workers, slots):
        """Begin one; `why` is said if it is not what was said last."""
        if why != self._why:
            self._why = why
            log.error("%s (%s for %s; trying again from time to time)", why, clupy.amount(workers, "worker"),
                      clupy.amount(slots, "slot"))
        self._timer = asyncio.get_running_loop().call_later(self._length, self._then)
        self._length = min(2 * self._length, RETRY_START[1])

    def end(self):
        """End it early, as something has changed."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def forget(self):
        """It goes well again: the next one is short and told, unless this one goes on."""
        if not self._timer:
            self._length, self._why = RETRY_START[0], ""


class Workers:
    """The workers of this node and the slots they serve: starts, watches and replaces them, and alone counts."""

    def __init__(self, server, slots):
        self.server, self.settings = server, server.settings
        self.slots = slots                         # how many calls run at once, nested ones aside
        self.processes = {}                        # {pid: Process}, dying ones included
        self.waiting = collections.deque()         # SlotRows that no worker serves yet, first come first served
        self.started = None                        # how many workers could be started, if not all that are needed
        self._failures = 0                         # workers in a row that died before they had a slot
        self._pause = Pause(self.try_again)
        self._endings = set()                      # futures of threads that end ZooKeeper sessions of dead workers
        self._closing = False
        clupy.raise_descriptor_limit()

    def __repr__(self):
        return f"<Workers {len(self.processes)} for {self.slots} slots, {len(self.waiting)} wait>"

    @property
    def usable_slots(self):
        return self.slots if self.started is None else min(self.slots, self.started)

    def open_slots(self, nested=None):
        return sum(1 for process in self.processes.values()
                   if process.slot and nested in (None, process.slot.nested))

    def descriptors(self):
        own = []
        for process in list(self.processes.values()):
            own += process.descriptors()
            if process.slot:
                own.append(process.slot.sock.fileno())
        return own + [slot.sock.fileno() for slot in list(self.waiting)]

    # -- slots

    def serve(self, slot):
        """Hand the slot's socket over, as soon as a worker is free."""
        if slot.nested and slot.session.nested_slots() >= self.settings.max_nested:    # nobody else's end would make room
            self._turn_away(slot, Why.MAX_NESTED, f"max_nested is {self.settings.max_nested}")
            return
        self.waiting.append(slot)
        self.look()

    def withdraw(self, slot, why):
        """End a slot that waits for a worker."""
        self.waiting.remove(slot)
        self._turn_away(slot, why)

    def _turn_away(self, slot, why, reason=""):
        """End a slot that no worker serves."""
        slot.session.slots.pop(slot.number, None)
        slot.sock.close()
        slot.session.connection.send("ended", slot.number, {"pid": None, "begun": 0, "why": why, "reason": reason})

    def look(self):
        """Something has changed: start or end workers, and give slots to those that are ready."""
        self._replenish()
        self._assign()

    def _assign(self):
        waiting = [(slot, self.server.libraries.of_session(slot.session)) for slot in self.waiting]
        room_nested = {slot.session: self.settings.max_nested - slot.session.nested_slots() for slot, _ in waiting}
        ready = [process for process in self.processes.values() if process.ready and process.usable]
        for slot, process in assignments(waiting, ready, self.slots - self.open_slots(nested=False), room_nested):
            try:
                process.hand_over(slot, self.server.said_to_worker(slot))
            except ConnectionError:
                continue                           # it died just now, and is replaced: the slot waits on
            self.waiting.remove(slot)
            slot.session.workers += 1
            slot.since = time.monotonic()
            self._failures = 0
            self._pause.forget()
            self.server.state_soon()

    def _replenish(self):
        """Have a worker for every slot, and for the nested ones that are open or waited for."""
        if self._closing or self._pause:
            return
        target = self.slots + sum(min(session.nested_slots(waiting=True), self.settings.max_nested)
                                  for session in self.server.sessions.values())
        usable = [process for process in self.processes.values() if process.usable]
        spare = [process for process in usable if not process.slot]
        awaited = [libraries for slot in self.waiting if (libraries := self.server.libraries.of_session(slot.session))]
        missing, needless = changes(target - len(usable) + len(spare), awaited, self.server.libraries.warm, spare)
        for process in needless:
            process.end(Why.NOT_NEEDED)
        for libraries in missing:
            try:
                template = libraries.template_now()
                if template and not template.ready:
                    continue                       # `look` is called when it is
                process = Process(self, libraries, template)
            except ChildProcessError:              # the template is no more: another one
                asyncio.get_running_loop().call_soon(self.look)
                return
            except OSError as error:
                self.started = sum(process.usable for process in self.processes.values())
                self._pause.begin("cannot start a worker: " + why_no_worker(error), len(self.processes), self.slots)
                self.server.state_soon()
                return
            self.processes[process.pid] = process
        self.started = None

    def try_again(self):
        """What made workers fail at their start may be over: look at once."""
        self._pause.end()
        self._failures = 0
        self.look()

    # -- the end of a worker

    def died(self, process):
        """Let the client read what a dead worker sent, say to it how it ended, and have a new one in its place."""
        slot, (code, peak) = process.slot, process.dead.result()
        begun, base = process.begun()[0], None
        del self.processes[process.pid]
        if slot:
            if not process.why:
                log.info("worker %s of client %s died: %s", process.pid, slot.session.name, describe_exit(code))
            slot.session.slots.pop(slot.number, None)
            slot.session.seconds += time.monotonic() - slot.since
            with contextlib.suppress(OSError):     # the client closed it first
                slot.sock.shutdown(socket.SHUT_WR)
            self._end_zookeeper_session(process.zookeeper_session())
            base = give_base(slot)
            self._pause.end()                      # there may be room for another now
        elif not process.why:
            log.error("worker %s died before it had a slot: %s", process.pid, describe_exit(code))
            self._failures += 1
            if self._failures >= clupy.MAX_FAILURES and not self._pause and not self._closing:
                self._pause.begin("workers keep dying at their start", len(self.processes), self.slots)
        process.output.close()
        process.board.close()
        if slot:
            slot.session.printed.flush()
            slot.session.connection.send("ended", slot.number, {
                "pid": process.pid, "begun": begun, "why": process.why or Why.DIED, "reason": describe_exit(code),
                "code": code, "peak": peak, "limit": self.settings.memory_limit, "lines": list(process.output.last_lines),
                "stack": process.output.stack.decode(errors="replace"), "base": base})
            self.server.tasks.spawn(drain_socket(slot.sock))
        self.look()
        self.server.state_soon()

    def _end_zookeeper_session(self, session):
        hosts = self.server.services.get("zookeeper")
        if not hosts or not session:
            return
        ended = concurrent.futures.Future()
        ended.set_running_or_notify_cancel()
        try:
            threading.Thread(target=end_zookeeper_session, args=(hosts, session, ended), daemon=True).start()
        except RuntimeError:
            return                                 # the interpreter is ending: the session ends by itself
        ending = asyncio.wrap_future(ended)
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    def relieve(self, clients):
        """End the idle slots of clients that are stopped or hang: they are of use to others."""
        for process in self.processes.values():
            if process.slot and process.slot.session.client in clients and process.begun()[1] == IDLE:
                process.end(Why.RELIEVED, GRACE_TIME)

    async def watch(self):
        """Kill calls that are over their time."""
        while True:
            await asyncio.sleep(WATCH_TIME if self.open_slots() else 1.0)
            now = time.monotonic()
            for process in list(self.processes.values()):
                if process.slot and process.usable and not process.late:
                    number, deadline = process.begun()
                    if deadline not in (UNBOUND, IDLE) and deadline < now:
                        process.late = True
                        self.server.tasks.spawn(self._time_out(process, number))

    async def _time_out(self, process, number):
        try:
            await process.kill_call(number, Why.TIMEOUT)
        finally:
            process.late = False                   # it may be the next call that runs by now

    async def close(self):
        """Kill the workers, and wait until they are dead."""
        self._closing = True
        self._pause.end()
        for process in list(self.processes.values()):
            process.end(Why.SERVER_CLOSED)
        if self.processes:
            await asyncio.wait([process.dead for process in self.processes.values()])
        if self._endings:
            await asyncio.wait(self._endings, timeout=GRACE_TIME)
        for ending in self._endings:
            ending.cancel()


def give_base(slot):
    """A slot ended that was no nested one: its place among the slots goes to one of its client that waits for it, else to a
    nested one, which is none from now on.  The number of that one, which the client is told, or None."""
    others = list(slot.session.slots.values())
    if slot.nested or any(not other.nested and not other.process for other in others):
        return None
    for other in others:
        if other.nested and other.process:
            other.nested = False
            return other.number
    return None


async def drain_socket(sock):
    """Close the socket once the client has: closing one with unread input would lose what is still under way."""
    with sock, contextlib.suppress(OSError):       # reset, or not closed in time
        sock.setblocking(False)
        async with asyncio.timeout(clupy.CLOSE_TIME):
            while await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
                pass


def describe_exit(code):
    """What the exit code of a process means: "signal 9 (Killed)" or "exit code 3"."""
    if code == UNKNOWN_EXIT:
        return "exit code unknown: another part of the server's program waited for it, or what had forked it was killed"
    if code < 0:
        return f"signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}"


# ==== Libraries: what this node has installed ================================

class Libraries:
    """One resolution on this server: not built yet, being built, ready, or at fault."""

    def __init__(self, node, resolution, wheels):
        self.node, self.resolution = node, resolution
        self.wheels = wheels                       # {sha256: bytes} of the local libraries in it
        self.environment = None                    # Environment, in use for as long as somebody may want it
        self.ready = not resolution.pins           # nothing to install: the server's own Python
        self.building = None                       # the task that does
        self.fault = ""                            # why it could not be built, with pip's last lines
        self.failures, self.again = 0, 0.0         # in a row; when to try again, monotonic
        self.template = None                       # Template that forks workers in them
        self._template_again = 0.0                 # not before; 0: at once

    def __repr__(self):
        return f"<Libraries {self.resolution.hash} {'ready' if self.ready else self.fault or 'not built'}>"

    def hold(self):
        """The environment, once more in use: for one worker. None: the server's own Python. Raises FileNotFoundError,
        and builds it anew, if somebody removed it."""
        if not self.resolution.pins:
            return None
        held = self.ready and self.node.environments.use(self.environment.id)
        if not held:
            self.ready = False
            self.node.libraries_of(self.resolution, self.wheels)
            raise FileNotFoundError(f"environment {self.resolution.hash} was removed; it is built anew")
        return held

    def command(self):
        """(python, variables) to start a worker with."""
        workers = self.node.server.workers
        return worker_command(self.environment and self.environment.path,
                              worker_variables(os.environ, workers.slots, self.node.server.secret))

    def template_now(self):
        """The Template that is to fork the workers that start now, ready or not yet; None: they start by themselves."""
        given = self.command(), start_state()
        if self.template and (self.template.over or self.template.given != given):
            if self.template.over and not self.template.works:
                self._template_again = time.monotonic() + TEMPLATE_PAUSE
            self._leave_template()
        if not self.template and time.monotonic() >= self._template_again and can_fork():
            try:
                self.template = Template(given, self.node.server.workers.look)
            except OSError:                        # a worker's own start is about to say why
                self._template_again = time.monotonic() + TEMPLATE_PAUSE
        return self.template

    def _leave_template(self):
        if self.template:
            self.template.release()
            self.template = None

    async def build(self):
        try:
            cluster = self.node.wanted             # a client's list is resolved with the cluster's, whose wheels it does not have
            wheels = {**cluster.wheels, **self.wheels} if cluster else self.wheels
            environment = await self.node.environments.build(
                self.resolution, wheels, lambda line: self.node.notice(self, line))
            self.close()
            self.environment = environment
            self.ready, self.fault, self.failures = True, "", 0
        except DependencyError as error:
            self.failures += 1
            self.again = clupy_master.next_try(self.failures, time.monotonic(), self.node.settings.sync_interval)
            self.fault = str(error)
        finally:
            self.building = None
        self.node.libraries_changed(self)

    def close(self):
        self._leave_template()
        if self.environment:
            self.environment.close()


class NodeLibraries:
    """All Libraries of this node: those of the cluster, and those that clients brought."""

    def __init__(self, server):
        self.server, self.settings = server, server.settings
        self.environments = Environments(self.settings.environments_dir, self.settings.environments_kept)
        self.wanted = None                         # the cluster's newest Libraries; None until the master has spoken
        self.default = None                        # the cluster's newest that are built; None: none were yet
        self.plain = Libraries(self, clupy_master.Resolution(), {})        # this Python's own
        self.known = {self.plain.resolution.hash: self.plain}      # {hash of a resolution: Libraries}

    def __repr__(self):
        return f"<NodeLibraries {len(self.known)}, the cluster's are {self.default}>"

    @property
    def warm(self):
        """Those in which workers are kept warm."""
        return self.default or self.plain

    def libraries_of(self, resolution, wheels):
        """The Libraries of a resolution; building them begins now if they are not there."""
        libraries = self.known.get(resolution.hash)
        if libraries is None:
            libraries = self.known[resolution.hash] = Libraries(self, resolution, wheels)
        libraries.wheels = {**libraries.wheels, **wheels}
        if libraries.building is None and not libraries.ready and time.monotonic() >= libraries.again:
            libraries.building = asyncio.get_running_loop().create_task(libraries.build())
        return libraries

    def of_session(self, session):
        """The Libraries for a slot of a client, or None until they are built.  As long as those of the cluster cannot be had,
        its last ones stay in use."""
        libraries = session.libraries
        if libraries is self.wanted and libraries and not libraries.ready:
            libraries = self.default
        return libraries if libraries and libraries.ready else None

    def libraries_changed(self, libraries):
        """A build has ended, well or not."""
        if libraries.fault:
            log.error("%s", libraries.fault)
        self._switch()
        self.server.workers.try_again()

    def _switch(self):
        """Have the cluster's newest libraries in use, if they are built, and let everybody know what changed."""
        if self.wanted and self.wanted.ready and self.default is not self.wanted:
            log.info("the cluster's libraries are now %s", self.wanted)
            self.default = self.wanted
        for session in list(self.server.sessions.values()):
            self.tell_libraries(session)
        self._forget()
        self.server.workers.look()
        self.server.state_soon()

    def tell_libraries(self, session):
        """Say to the client why its libraries cannot be had here, or that its slots with older ones should go back."""
        libraries = self.of_session(session) or session.libraries
        if libraries and libraries.fault and not libraries.building:
            session.connection.send("notice", "broken", libraries.fault)
        elif libraries and libraries.ready and any(slot.process and slot.process.libraries is not libraries
                                                   for slot in session.slots.values()):
            session.connection.send("notice", "renew", "")

    def _forget(self):
        """Let go of what neither the cluster nor a connected client wants; workers hold their environments themselves.

        What could not be built is remembered until it may be tried again."""
        wanted = [self.plain, self.default, self.wanted, *(session.libraries for session in self.server.sessions.values())]
        for hash, libraries in list(self.known.items()):
            if libraries not in wanted and not libraries.building and time.monotonic() >= libraries.again:
                self.known.pop(hash).close()

    def notice(self, libraries, line):
        """A line of what pip says, for the clients that wait for these libraries."""
        for session in self.server.sessions.values():
            if session.libraries is libraries:
                session.connection.send("notice", "building", line)

    def hear(self, said):
        """The master has said which libraries are the cluster's: (hash, the exact list, its wheels), the last two if they are
        new; None: it does not know yet."""
        if said is None or said[1] is None:
            return
        if self.wanted:
            self.wanted.again = 0.0                # nobody tries that again: its fault is of no interest
        self.wanted = self.libraries_of(clupy_master.Resolution.of(said[1]), said[2])
        self._switch()

    def keep_in_step(self):
        """Try again what could not be built, and build anew what somebody removed; to be called from time to time."""
        for libraries in {self.wanted, *(session.libraries for session in self.server.sessions.values())} - {None}:
            self.libraries_of(libraries.resolution, {})
        self._forget()

    def descriptors(self):
        return [fd for libraries in self.known.values() if libraries.template for fd in libraries.template.descriptors()]

    def state(self):
        """What the master and `status` are told."""
        return {"environment": self.warm.resolution.hash if self.warm.resolution.pins else None,
                "environments": [hash for hash, libraries in self.known.items() if libraries.environment],
                "building": any(libraries.building for libraries in self.known.values()),
                "faults": [libraries.fault for libraries in self.known.values() if libraries.fault]}

    async def close(self):
        building = [libraries.building for libraries in self.known.values() if libraries.building]
        for task in building:
            task.cancel()
        await asyncio.gather(*building, return_exceptions=True)
        for libraries in self.known.values():
            libraries.close()


# ==== Server =================================================================

def _partition(text):
    """(what comes before the first end of a line, this end or "", what comes after it)."""
    end = re.search("[\r\n]", text)
    return (text[:end.start()], end[0], text[end.end():]) if end else (text, "", "")


class Printed:
    """What a client's calls print, on its way to the client: gathered, and never more on the wire than its kernel has room for.

    Else a client that is stopped, or busy in C code, would look dead: its window would close, and the kernel gives up a
    connection on which nothing moves."""

    def __init__(self, connection):
        self.wanted = True                         # whether the client wants to see it
        self._connection = connection
        self._waiting = collections.deque()        # (pid, stream, text, whether more comes at once, bytes on the wire), not sent
        self._size = self._unseen = 0              # bytes of these; bytes that were sent, and the client has not shown
        self._dropped = 0                          # lines that were not sent, since the client had enough to show
        self._begun = {}                           # {(pid, stream): whether the beginning of its unfinished line was sent}
        self._timer = None                         # TimerHandle, while more is gathered

    def show(self, pid, stream, text):
        """Send text on, unless the client has not seen what was sent before: then what is left out goes up to a line's end.
        What comes at once goes whole or not."""
        if not self.wanted:
            return
        begun = self._begun.pop((pid, stream), None)
        if begun is False:                         # the rest of a line goes as its beginning did
            left_out, end, text = _partition(text)
            self._dropped += end == "\n"
            if not end:
                self._begun[pid, stream] = False
        has_room = self._size + self._unseen < clupy.UNSEEN_OUTPUT
        if text and text[-1] not in "\r\n":
            self._begun[pid, stream] = has_room
        if not has_room:
            self._dropped += text.count("\n")
            text = "\n" if begun else ""            # where its line stops
        if not text:
            return
        for start in range(0, len(text), OUTPUT_PIECE):
            piece = text[start:start + OUTPUT_PIECE]
            more = start + OUTPUT_PIECE < len(text)
            self._waiting.append((pid, stream, piece, more, len(piece.encode()) + ENTRY_SIZE))
            self._size += self._waiting[-1][-1]
        if self._size >= OUTPUT_FRAME:
            self._send()
        elif not self._timer:
            self._timer = asyncio.get_running_loop().call_later(clupy.GATHER_TIME, self._send)

    def seen(self, size):
        """The client has shown so many bytes."""
        self._unseen -= size
        if self._waiting or self._dropped and not self._unseen:
            self._send()

    def flush(self):
        """Send all that waits: what is said next is to come after it."""
        if self._waiting:
            self._send(math.inf)

    def _send(self, room=clupy.UNSEEN_OUTPUT):
        if self._timer:
            self._timer.cancel()
            self._timer = None
        entries, before = [], self._unseen
        while self._waiting and self._unseen < room:
            pid, stream, text, more, size = self._waiting.popleft()
            if entries and entries[-1][:2] == (pid, stream):
                text = entries.pop()[2] + text
            entries.append((pid, stream, text, more))
            self._size -= size
            self._unseen += size
        if entries or self._dropped:
            self._connection.send("output", entries, self._dropped, self._unseen - before)
            self._dropped = 0


class Session:
    """One client's control connection.  The methods on_<kind> answer its messages."""

    def __init__(self, server, connection):
        self.server, self.connection = server, connection
        self.id = os.urandom(clupy.SESSION_SIZE)
        self.client = self.name = "?"              # its id, and what logs call it; until it said hello
        self.workers, self.seconds = 0, 0.0        # how many it has had, and for how long those that it has no more
        self.libraries = None                      # Libraries that its workers are to have; None until it said which
        self.copies = None                         # the client's clupy.Copies of Refs on this machine
        self.printed = Printed(connection)         # what its calls print, on its way to it
        self.slots = {}                            # {number: SlotRow} open or waiting
        self._numbers, self._past = {}, 0          # {number used: None}, so many as are kept; up to `past` all are

    def __repr__(self):
        return f"<Session {self.name} {len(self.slots)} slots>"

    def first_use(self, number):
        """Whether this number was not used before: each opens one slot, once.  Clients count up, so an old one counts as used."""
        if number <= self._past or number in self._numbers:
            return False
        self._numbers[number] = None
        if len(self._numbers) > NUMBERS_KEPT:
            oldest = next(iter(self._numbers))
            del self._numbers[oldest]
            self._past = max(self._past, oldest)
        return True

    def nested_slots(self, waiting=False):
        return sum(slot.nested for slot in self.slots.values() if slot.process or waiting)

    def on_hello(self, connection, client, name, resolution, wheels, output):
        self.client, self.name, self.printed.wanted = client, name, output
        if self.copies is None:
            log.info("client %s is here, from %s, %s", self.name, connection.peer, clupy.ENCRYPTIONS[connection.how])
            self.copies = clupy.Copies(client)
        self.libraries = self.server.libraries.libraries_of(clupy_master.Resolution.of(resolution), wheels)
        connection.send("welcome", self.id, self.server.versions, self.server.settings.max_nested)
        self.server.libraries.tell_libraries(self)
        if self.server.draining:
            connection.send("notice", "draining", "")

    def farewell(self):
        """It is gone: what it had here."""
        now = time.monotonic()
        seconds = self.seconds + sum(now - slot.since for slot in self.slots.values() if slot.process)
        log.info("client %s is gone: %s; it had workers (%s), for %.0f s together", self.name, self.connection.why, self.workers,
                 seconds)

    def on_close(self, _, number):
        slot = self.slots.get(number)
        if slot is None:                           # it ended by itself, or was never opened
            self.first_use(number)
            self.connection.send("ended", number, {"pid": None, "begun": 0, "why": Why.CLOSED})
        else:
            slot.end(Why.CLOSED)

    def on_kill(self, _, number, call):
        slot = self.slots.get(number)
        if slot and slot.process:
            self.server.tasks.spawn(self._kill(slot, call))

    async def _kill(self, slot, call):
        if not await slot.process.kill_call(call, Why.CANCELLED):
            self.connection.send("late", slot.number, call)

    def on_release(self, _, names):
        self.copies.release(names)

    def on_seen(self, _, size):
        self.printed.seen(size)


def memory_used():
    """(bytes in use, bytes that there are) of this machine; None where the system does not say."""
    lines = dict(re.findall(r"(\w+): +(\d+) kB", clupy.file_text("/proc/meminfo")))
    if "MemAvailable" not in lines:
        return None
    total, available = (int(lines[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    return total - available, total


class Server:
    """One node: listens for clients, has their sessions, and says to the master what it has.  For its loop alone."""

    def __init__(self, settings, secret):
        self.settings, self.secret = settings, secret
        self.id = os.urandom(8).hex()
        self.services = {}                         # what the master says of Redis and ZooKeeper
        self.sessions = {}                         # {session id: Session}; changed by _serve_control
        self.draining = False
        self.over = asyncio.get_running_loop().create_future()       # None, or an error: it makes no sense to go on
        self.versions = {"python": clupy.PYTHON_VERSION, "cloudpickle": clupy_master.installed("cloudpickle")}
        self.own = {}                              # {library: version} of this Python, for `python -m clupy libraries`
        self.link = clupy.MasterLink(clupy.masters_of(settings), secret, settings)
        self.libraries = NodeLibraries(self)
        self.workers = Workers(self, settings.slots)
        self.tasks = clupy_master.Tasks("the server")
        self._told = None                          # Connection to the master that was told `own`
        self._stating = None                       # TimerHandle, while a statement is due
        self._closing = False
        self._said = ""                            # why there is no master, as the log says; None: there is one
        self._listener = clupy_master.Listener(settings.listen or ("", 0), self._greet, settings)
        self.address, self.where = self._listener.address, self._listener.where
        self.name = clupy.server_name(self.id, self.address[1])

    def __repr__(self):
        return f"<Server {self.name} {len(self.sessions)} sessions, {self.workers}>"

    async def start(self):
        self.workers.look()
        self.tasks.spawn(self.link.run(self))
        self.tasks.spawn(self.workers.watch())
        self.tasks.repeat(clupy.STATEMENT_TIME, self._restate)
        self.tasks.repeat(clupy.ALIVE_TIME, self.tell, "alive", "")
        self.tasks.repeat(self.settings.sync_interval, self.libraries.keep_in_step)
        self.tasks.repeat(SWEEP_TIME, clupy.remove_copies)         # of clients and servers that were killed together

    def descriptors(self):
        copies = [fd for session in list(self.sessions.values()) if session.copies for fd in session.copies.held]
        return self._listener.descriptors() + copies + self.libraries.descriptors() + self.workers.descriptors()

    # -- clients

    async def _greet(self, sock, peer, role, preambles):
        if role == CONTROL:
            tune(sock)
            connection = await clupy_master.admit(sock, peer, preambles, self.secret, self.settings)
            return self._serve_control(connection)
        if role == SLOT:
            return await self._greet_slot(sock)
        raise ProtocolError("this is a server, and it wants a master; is the port right?")

    async def _serve_control(self, connection):
        session = Session(self, connection)
        self.sessions[session.id] = session
        try:
            await connection.serve(session)
        finally:
            del self.sessions[session.id]
            for slot in list(session.slots.values()):
                slot.end(Why.CLIENT_GONE)
            if session.copies:                     # it said hello
                session.copies.close()
                session.farewell()

    async def _greet_slot(self, sock):
        head = await clupy.read_exactly(sock, clupy.SLOT_HEAD.size + clupy.PROOF_SIZE)
        id, number, nested = clupy.SLOT_HEAD.unpack(head[:clupy.SLOT_HEAD.size])
        session = self.sessions.get(id)
        key = session.connection.key if session else os.urandom(32)
        how = session.connection.how if session else clupy.NO_TLS
        if not clupy.hmac.compare_digest(slot_head(key, how, id, number, nested), head):
            raise clupy.SecretError("a slot was asked for with a wrong or an old key")
        if not session.first_use(number):          # its client closed it before it was here
            log.debug("slot %s was opened or closed before", number)
            sock.close()
            return None
        tune(sock)
        slot = session.slots[number] = SlotRow(session, number, nested, sock)
        self.workers.serve(slot)
        return None

    def said_to_worker(self, slot):
        """What a worker is told with the socket of its slot."""
        return {"key": slot_key(slot.session.connection.key, slot.number).hex(), "server": self.name,
                "client": slot.session.client, "services": self.services, "how": slot.session.connection.how,
                "certificate": self.settings.certificate}

    def tell(self, *notice):
        """Send a notice to every client."""
        for session in self.sessions.values():
            session.connection.send("notice", *notice)

    # -- the master

    def master_joined(self, connection):
        self._state()                              # a standby answers with `leader`, the master with `cluster`

    def master_lost(self):
        if not self._closing and self.link.why_lost != self._said:
            self._said = self.link.why_lost        # once, however often it is tried again
            log.warning("no master: %s; trying again until one answers", self._said)

    def _restate(self):
        self.link.look(time.monotonic())
        self._state()

    def state_soon(self):
        """After a change: state it, gathered for GATHER_TIME."""
        if self._stating is None:
            self._stating = asyncio.get_running_loop().call_later(clupy.GATHER_TIME, self._state)

    def _state(self):
        self._stating = None
        if not self.link.connection or self._closing:
            return
        held = collections.Counter(process.slot.session.client for process in self.workers.processes.values() if process.slot)
        host, port = self.address
        host = None if host in ("0.0.0.0", "::", "") else host
        told, self._told = self._told, self.link.connection
        self.link.connection.send("server", self.id, (host, port), self.workers.usable_slots, dict(held), {
            "name": self.name, "load": os.getloadavg()[0], "draining": self.draining, "cores": os.cpu_count(),
            "memory": memory_used(), "version": clupy.__version__,
            "own": None if told is self.link.connection else self.own,
            **self.versions, **self.libraries.state()})

    def on_cluster(self, connection, services, silent, libraries):
        self.link.leads = True
        if self._said is not None:
            log.info("connected to the master at %s", connection.peer)
            self._said = None
        self.services = services
        self.libraries.hear(libraries)
        self.workers.relieve(silent)

    def on_leader(self, _, address):
        self.link.follow(address)

    def master_refused(self, error):
        self._is_over(error)

    def _is_over(self, error=None):
        if not self.over.done():
            self.over.set_result(error)

    # -- more slots, and the end

    def grow(self, slots):
        """At least so many slots."""
        if slots > self.workers.slots:
            self.workers.slots = slots
            self.workers.look()
            self.state_soon()

    async def _drain(self):
        """Take no new slots, and wait until the calls under way are done, `drain_time` at most."""
        log.info("draining, with %s open; for %g s at most", clupy.amount(self.workers.open_slots(), "slot"),
                 self.settings.drain_time)
        self._state()
        self.tell("draining", "")
        deadline = time.monotonic() + self.settings.drain_time
        while self.workers.open_slots() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._is_over()

    def terminate(self):
        """For SIGTERM: drain; end at once when it comes again."""
        if self.draining:
            self._is_over()
        else:
            self.draining = True
            self.tasks.spawn(self._drain())

    async def close(self):
        """Kill the workers and close everything."""
        self.draining = True                       # the master's log is not to call it lost
        self._state()
        self._closing = True
        self.link.close()
        await self._listener.close()
        await self.workers.close()
        for session in list(self.sessions.values()):
            session.connection.close()
        await self.tasks.close()
        await self.libraries.close()


async def run(settings, secret):
    """Be a server until cancelled or refused by the master; SIGTERM drains, a second one ends at once."""
    server = Server(settings, secret)
    server.own = clupy_master.all_installed()
    log.info("server %s listens on %s, with %s", server.name, server.where, clupy.amount(server.workers.slots, "slot"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.terminate)
    try:
        await server.start()
        if error := await server.over:
            raise error
    finally:
        await server.close()
