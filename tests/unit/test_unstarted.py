"""How libvirt's daemon is ended, so that the next one finds its pid file free."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from vmctl import unstarted

# As libvirtd may end under load: its first thread is gone, and another is not, and has the lock still.
_LINGERS = """
import ctypes, fcntl, os, signal, sys, threading, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)

def linger():
    print("ready", flush=True)
    signal_seen.wait()
    time.sleep(0.5)  # lingering is what is tried: there is nothing that it waits for
    os._exit(0)

signal_seen = threading.Event()

def ended(*_):
    signal_seen.set()
    ctypes.CDLL(None).pthread_exit(None)

signal.signal(signal.SIGTERM, ended)
threading.Thread(target=linger).start()
while True:
    signal.pause()
"""


def test_its_pid_file_is_free_when_it_has_ended(tmp_path: Path) -> None:
    lock = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", _LINGERS, str(lock)], stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout and daemon.stdout.readline() == b"ready\n"
        unstarted._end(daemon.pid)
        with lock.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
