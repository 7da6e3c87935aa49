"""Of several processes: which one is missing, said in a sentence, when the others cannot go on without it.

Each process counts a number up in the store that JAX's coordinator (process 0) keeps, and looks at the others'. One
whose number stands still, or a coordinator that does not answer, ends this process: collectives would wait for ever.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

SECONDS_BETWEEN = 3.0
SECONDS_TO_LOOK = 1.0
# A process that has not been heard of for so long is gone. JAX's own limit is a longer one.
SILENT_SECONDS = 25.0

# A process that is to end for the same reason says so itself.
SECONDS_FOR_OWN_WORDS = 2.0

GO_ON = "What was finished is kept; run the same command on all hosts to go on"


class Peer:
    """What is known of a process: its host, its last number, and when that was new."""

    def __init__(self, host: str = "a host that never spoke"):
        self.host, self.number, self.heard = host, "", time.monotonic()


class Watch:
    """Keeps watch in threads of its own until the process ends."""

    def __init__(self, client: Any, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.peers = {i: Peer() for i in range(count) if i != index}
        self.answered = time.monotonic()
        self.told = threading.Lock()
        self._explain_aborts()
        threading.Thread(target=self._speak, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._listen, name="watch", daemon=True).start()

    def _speak(self) -> None:
        number = 0
        while True:
            try:
                self.client.key_value_set(f"iar_jax/alive/{self.index}", f"{number} {socket.gethostname()}", True)
                for name, value in self.client.key_value_dir_get("iar_jax/alive"):
                    peer = self.peers.get(int(name.rsplit("/", 1)[1]))
                    if peer is not None and peer.number != value:
                        peer.number, peer.host, peer.heard = value, value.partition(" ")[2], time.monotonic()
                for name, reason in self.client.key_value_dir_get("iar_jax/ended"):
                    other = int(name.rsplit("/", 1)[1])
                    if other != self.index:
                        time.sleep(SECONDS_FOR_OWN_WORDS)
                        self.end(f"{self.name(other)} has ended: {reason}")
                self.answered = time.monotonic()
            except Exception:  # the coordinator does not answer, or this process is ending: `_listen` knows by the time
                pass
            number += 1
            time.sleep(SECONDS_BETWEEN)

    def _listen(self) -> None:
        while True:
            time.sleep(SECONDS_TO_LOOK)
            missing = self.missing()
            if missing:
                self.end(f"{missing}: it was killed or hangs, or its host cannot be reached. {GO_ON}")

    def missing(self) -> str:
        """Which process has been silent for too long, and for how long; "" where none has."""
        now = time.monotonic()
        if now - self.answered > SILENT_SECONDS and self.index != 0:
            return f"{self.name(0)}, at which all meet, has not answered for {now - self.answered:.0f} s"
        for other, peer in self.peers.items():
            if now - peer.heard > SILENT_SECONDS and now - self.answered < SILENT_SECONDS:
                return f"{self.name(other)} has not been heard of for {now - peer.heard:.0f} s"
        return ""

    def wait_for_news(self) -> None:
        """Called where something failed that may be the loss of a process: gives the watch the time to name it and end
        this one; returns where all are heard."""
        time.sleep(SILENT_SECONDS + 2 * SECONDS_BETWEEN)

    def leave_word(self, reason: str) -> None:
        """Tells the others why this process ends."""
        with contextlib.suppress(Exception):  # nobody to tell
            self.client.key_value_set(f"iar_jax/ended/{self.index}", reason, True)

    def name(self, index: int) -> str:
        return f"process {index} of {self.count} ({self.peers[index].host})"

    def end(self, message: str) -> NoReturn:
        """Says it, as the last line, and ends this process."""
        with self.told:
            sys.stdout.flush()
            print(f"\nprocess {self.index} of {self.count} stops: {message}", file=sys.stderr, flush=True)
            os._exit(1)

    def _explain_aborts(self) -> None:
        """JAX aborts, with a dump, when the coordinator's connection breaks: let the last line say what that means."""

        def explain(_number: int) -> None:
            silent = self.missing()
            guess = f"{self.name(0)}, at which all meet, is gone" if self.index else "JAX's coordinator has failed"
            self.end(f"{silent or guess}. {GO_ON}")

        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(explain)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self.handler)
