"""The certificate in force, and its renewal: a thread looks whether its files have changed.

Whoever renews a certificate replaces two files, or a link to their folder, and not at one moment. So what has changed
is used once two looks have found the same, and a pair that does not fit is refused then, once. A reload does not wait.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from threading import Event, Lock, Thread
from typing import Literal

from balancer.edge import tls
from balancer.edge.tls import DAY, WARN_DAYS, Certificate, TlsOptions
from balancer.errors import SettingsError
from balancer.protocol.texts import quoted

log = logging.getLogger("balancer.server")

LOOK_SECONDS = 4.0  # between two looks
STOP_SECONDS = 2.0  # for a look under way to end

News = Literal["certificate_changed", "certificate_refused", "certificate_expires"]


class Renewal:
    """`certificate` is None without TLS; one that is given is not loaded again. `renew` is called once there is a new
    one, `note` for what people want to know.

    `_lock` guards all that changes, and is held for a whole look or reload, the trial in a child process included:
    only these two wait for it. The attributes without `_` may be read without it.
    """

    def __init__(
        self,
        options: TlsOptions,
        *,
        renew: Callable[[], None],
        note: Callable[[News, str], None],
        certificate: Certificate | None = None,
    ) -> None:
        self._renew = renew
        self._note = note
        self._wall_clock = time.time
        self._lock = Lock()
        self._options = options
        self.certificate = certificate or tls.load(options)
        self._checked = options, self.certificate
        self.last_error: str | None = None
        self._seen = ""  # what the last look found, if it is not in force: a digest, or why there is none
        self._judged = ""  # such a find that was refused
        self._again_at = math.inf  # of the wall clock: when it is valid, and so judged once more
        self._warned = math.inf  # days before the end that were told of last
        self._stopping = Event()
        self._thread: Thread | None = None
        self._is_running = False

    # In the thread.

    def start(self) -> None:
        self._is_running = True
        if self.certificate is not None and self._thread is None:
            self._thread = Thread(target=self._run, name="certificate", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # it must go on, or the next certificate would never come
                log.exception("looking at the certificate failed")
            if self._stopping.wait(LOOK_SECONDS):
                return

    def look(self) -> None:
        with self._lock:
            if self.certificate is not None:
                self._look(self.certificate)
                self._warn(self.certificate)

    def _look(self, current: Certificate) -> None:
        try:
            files = tls.read(self._options)
            found = files.digest
        except SettingsError as error:
            files, found = None, str(error)
        is_settled, self._seen = found == self._seen, found
        if found == current.digest:
            self.last_error, self._judged = None, ""  # as it was: whoever changed something has taken it back
        elif is_settled and (found != self._judged or self._wall_clock() >= self._again_at):
            self._judged, self._again_at = found, math.inf
            try:
                if files is None:
                    raise SettingsError(found)
                certificate = tls.checked(self._options, files)
                if certificate.starts_at > self._wall_clock():
                    self._again_at = certificate.starts_at
                self._compare(certificate)
            except SettingsError as error:
                self._refuse(error)
            else:
                self._put_in_force(certificate)
                self._renew()

    def _warn(self, current: Certificate) -> None:
        left = current.expires_at - self._wall_clock()
        due = min((days for days in WARN_DAYS if left <= days * DAY), default=math.inf)
        if due < self._warned:
            how = "expires in less than" if due else "has expired"
            self._note("certificate_expires", f"the certificate {how}{f' {due:g} days' if due else ''}: {current}")
            self._warned = due

    # Whoever reloads.

    def check(self, options: TlsOptions) -> Certificate | None:
        """What these ask for now: the one in force if nothing has changed. Raises SettingsError."""
        with self._lock:
            current = self.certificate
            if options == self._options and current is not None and tls.read(options).digest == current.digest:
                certificate: Certificate | None = current
            else:
                certificate = tls.load(options)
                self._compare(certificate)
            self._checked = options, certificate
            return certificate

    def take(self, options: TlsOptions, certificate: Certificate | None) -> None:
        """What somebody else has checked: `use` puts it in force."""
        with self._lock:
            self._checked = options, certificate

    def refuse(self, error: SettingsError) -> None:
        with self._lock:
            self._refuse(error)

    def use(self) -> None:
        """What `check` found last is in force; the ports are the caller's to renew."""
        with self._lock:
            self._options, certificate = self._checked
            self.last_error = None
            if certificate is not self.certificate:
                self._put_in_force(certificate)
        if self._is_running:
            self.start()

    # Under the lock.

    def _compare(self, certificate: Certificate | None) -> None:
        """What clients refuse must not replace what they take. Raises SettingsError."""
        current, now = self.certificate, self._wall_clock()
        if current is None or certificate is None or current.why_invalid(now):
            return
        if why := certificate.why_invalid(now):
            path = quoted(str(certificate.options.tls_certificate))
            raise SettingsError(f"tls_certificate {path}: {why}: {certificate}")

    def _put_in_force(self, certificate: Certificate | None) -> None:
        before, self.certificate = self.certificate, certificate
        self.last_error, self._warned = None, math.inf
        self._seen = self._judged = ""
        self._note("certificate_changed", f"from {before or 'none'} to {certificate or 'none'}")

    def _refuse(self, error: SettingsError) -> None:
        self.last_error = str(error)
        self._note("certificate_refused", f"{error}; the one in force stays")
