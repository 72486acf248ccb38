"""A worker's journal and tail on the disk: every so often, away from the event loop.

A killed worker loses nothing, since the page cache has its files. A host that loses power loses
what was written to them since the last of these rounds.
"""

import os
import threading
from collections.abc import Callable, Sequence


class JournalSync:
    """One thread, one round at a time; a slow disk makes the rounds longer, nothing else."""

    def __init__(
        self,
        descriptors: Sequence[int],
        seconds: float,
        on_trouble: Callable[[str], None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """The files in the order in which they are to reach the disk; `before` writes to them
        first. `on_trouble` is called from the thread, once per kind of failure."""
        self._before = before
        self._descriptors = descriptors
        self._seconds = seconds
        self._on_trouble = on_trouble
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal-sync", daemon=True)
        self._trouble = ""
        self.rounds = 0

    def __repr__(self) -> str:
        return f"JournalSync(rounds={self.rounds})"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """One round more, then no more: the files may be closed."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            self._round()
        self._round()

    def _round(self) -> None:
        try:
            self._before()
            for descriptor in self._descriptors:
                os.fdatasync(descriptor)
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._trouble:
                self._trouble = why
                self._on_trouble(why)
            return
        self._trouble = ""
        self.rounds += 1
