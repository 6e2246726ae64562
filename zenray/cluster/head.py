"""A Ray head on this machine, as a child process: started, watched and stopped; nothing of it leaves loopback."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

import zenray
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import ClusterUnavailable, Unavailable
from zenray.spec.platform import RaySettings

_log = logging.getLogger(__name__)

RAY_ITSELF_BYTES = 1 << 30  # what an idle head was seen to use, and a Serve controller and proxy
MIN_DRAINING_S = 5.0  # a gateway learns within 2 s that a replica leaves; Ray's own default is 30
_REPLICA_PORTS = 1000
_LONGEST_TEMP_DIR = 38  # so that Ray's socket paths stay within the 107 bytes of a Unix address
_START_TIMEOUT_S = 90.0


class _DiedWhileStarting(ClusterUnavailable):
    """The head ended before it answered."""


@dataclass(frozen=True)
class RayAddresses:
    """Where a running head is reached, all on 127.0.0.1."""

    gcs_address: str
    dashboard_url: str
    serve_port: int
    token_file: Path

    @property
    def serve_url(self) -> str:
        return f"http://127.0.0.1:{self.serve_port}"

    def token(self) -> str:
        return self.token_file.read_text().strip()


class LocalRay:
    """One local Ray head. Its token, logs and record lie in `home`; a new start first ends what an earlier one left."""

    def __init__(self, home: Path, settings: RaySettings) -> None:
        self._home = home.resolve()
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._record_file = self._home / "ray.json"
        self._log_file = self._home / "ray.log"
        self._token_file = self._home / "ray.token"

    def start(self) -> RayAddresses:
        """Start the head and wait until its dashboard answers; blocks for at most 90 s a try. Raises as `starting`."""
        for _ in self.starting():
            time.sleep(0.05)
        return self.addresses()

    def starting(self) -> Iterator[None]:
        """Start the head in steps, so that a caller may do other things between them. Over when its dashboard answers.

        A step blocks for some seconds at most; the first one raises what speaks against starting at all. Closed before
        it is over, it leaves nothing running.

        On a busy machine Ray's own parts give one another up while they start (its client server waits 30 s for the
        raylet, and takes the head with it), so a head that dies before it answered is started once more.
        Raises ClusterUnavailable when a port is in use or Ray dies twice, Unavailable when memory is short.
        """
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            yield from self._try_to_start()
        except _DiedWhileStarting as died:
            _log.warning("Ray died while it started; trying once more. %s", died)
            yield from self._try_to_start()

    def _try_to_start(self) -> Iterator[None]:
        self.end_remains()
        self._check_memory()
        ports = self._choose_ports()
        self._write_token()
        temp_dir = self._fresh_temp_dir()
        started_at = time.time()
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(ports, temp_dir),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._home,
                start_new_session=True,
            )
        record = SessionRecord(
            sid=self._process.pid,
            started_at=started_at,
            booted_at=psutil.boot_time(),
            temp_dir=str(temp_dir),
            gcs_port=ports["gcs_port"],
            dashboard_port=ports["dashboard_port"],
            serve_port=ports["serve_port"],
        )
        try:
            record.write(self._record_file)
            yield from self._await_answer()
        except BaseException:
            record.end()  # by what is in memory: with a full disk nothing may have been written down
            self.stop()
            raise

    def addresses(self) -> RayAddresses:
        """Where the head is reached. ClusterUnavailable when it was never started, or has been ended."""
        record = SessionRecord.read(self._record_file)
        if record is None:
            raise ClusterUnavailable("Ray is not running.", hint="Start the platform again.")
        return RayAddresses(
            gcs_address=f"127.0.0.1:{record.gcs_port}",
            dashboard_url=f"http://127.0.0.1:{record.dashboard_port}",
            serve_port=record.serve_port,
            token_file=self._token_file,
        )

    def check(self) -> None:
        """Raises ClusterUnavailable, with the last lines of Ray's log, when the head has died. Quick."""
        code = self._process.poll() if self._process is not None else None
        record = SessionRecord.read(self._record_file)
        if code is not None or record is None or not record.leader_lives():
            ended = f"with exit code {code}" if code is not None else "or was never started"
            raise ClusterUnavailable(
                f"Ray is not running: it ended {ended}. Last lines of {self._log_file}:\n{self._log_tail()}",
                hint="Start the platform again; Ray's own logs are in "
                f"{record.temp_dir if record else self._home}/session_latest/logs.",
            )

    def stop(self) -> None:
        """End every process of the head. Idempotent; blocks for at most 15 s."""
        self.end_remains()
        if self._process is not None:
            self._process.wait(timeout=5)
            self._process = None

    def end_remains(self) -> int:
        """End what is left of this home's last session, whoever started it; returns the number of processes."""
        record = SessionRecord.read(self._record_file)
        if record is None:
            return 0
        ended = record.end()
        left = record.processes()
        if left:
            raise ClusterUnavailable(
                f"{len(left)} processes of an earlier Ray session cannot be ended: "
                f"{', '.join(f'{p.pid} ({p.name()})' for p in left[:5])}.",
                hint="They may be stuck in the kernel; end them by hand.",
            )
        self._record_file.unlink(missing_ok=True)
        return ended

    def _check_memory(self) -> None:
        needed = self._settings.object_store_bytes + RAY_ITSELF_BYTES
        free = psutil.virtual_memory().available
        if free < needed:
            raise Unavailable(
                f"Too little memory for Ray: {free / 2**30:.1f} GiB are free, {needed / 2**30:.1f} GiB are needed "
                f"(object store {self._settings.object_store_bytes / 2**30:.2f} GiB and Ray's own processes).",
                hint="End other programs, or lower ray.object_store_bytes.",
            )

    def _choose_ports(self) -> dict[str, int]:
        """Every port that Ray would otherwise choose by a fixed default. Raises ClusterUnavailable for one in use."""
        ports: dict[str, int] = {}
        held: list[socket.socket] = []
        try:
            for name in ("gcs_port", "dashboard_port", "serve_port", "client_port", "agent_port"):
                wanted = getattr(self._settings, name, 0)
                listener = _listen(name, wanted)
                held.append(listener)
                ports[name] = listener.getsockname()[1]
        finally:
            for listener in held:
                listener.close()
        return ports

    def _write_token(self) -> None:
        if not self._token_file.exists():
            with open(os.open(self._token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))

    def _fresh_temp_dir(self) -> Path:
        """An empty folder for Ray's sockets and logs: below `home`, or where its path is short enough."""
        folder = self._home / "ray"
        if len(str(folder)) > _LONGEST_TEMP_DIR:
            digest = hashlib.sha256(str(self._home).encode()).hexdigest()[:12]
            folder = Path("/tmp") / f"zenray-{os.getuid()}-{digest}"
        if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
            raise ClusterUnavailable(f"{folder} belongs to somebody else.", hint="Choose another platform folder.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def _command(self, ports: dict[str, int], temp_dir: Path) -> list[str]:
        cpus = self._settings.cpus if self._settings.cpus is not None else max(2, os.cpu_count() or 2)
        flags = {
            "node-ip-address": "127.0.0.1",
            "port": ports["gcs_port"],
            "dashboard-host": "127.0.0.1",
            "dashboard-port": ports["dashboard_port"],
            "ray-client-server-port": ports["client_port"],
            "dashboard-agent-listen-port": ports["agent_port"],
            "temp-dir": temp_dir,
            "num-cpus": int(cpus),
            "object-store-memory": self._settings.object_store_bytes,
            "include-log-monitor": "false",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        return [*command, "--no-monitor", "--log-color=false", *(f"--{name}={value}" for name, value in flags.items())]

    def _environment(self) -> dict[str, str]:
        """What Ray and all its workers inherit. No RAY_ variable of the caller gets through."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        package_root = str(Path(zenray.__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (package_root, kept.get("PYTHONPATH"))))
        return kept | {
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            # Ray listens on loopback alone only where it takes clusters to be unsupported; a laptop is such a place.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray runs its workers at nice 15: fine beside a batch job, but an engine is what its clients wait for, and
            # on a busy machine the gateway in front of it would starve it.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
            # By default every message of an answer crosses from the application's thread to the server's, which doubles
            # the CPU time of a token (docs/experiments.md). Once it has started, a replica of ours never blocks its
            # loop (the engine is another process), so one thread does.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(self._settings.first_replica_port),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self._settings.first_replica_port + _REPLICA_PORTS),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(MIN_DRAINING_S),
        }

    def _await_answer(self) -> Iterator[None]:
        deadline = time.monotonic() + _START_TIMEOUT_S
        addresses = self.addresses()
        request = urllib.request.Request(
            f"{addresses.dashboard_url}/api/serve/applications/",
            headers={"Authorization": f"Bearer {addresses.token()}"},
        )
        while True:
            yield
            try:
                self.check()
            except ClusterUnavailable as died:
                raise _DiedWhileStarting(died.message, hint=died.hint) from None
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                if time.monotonic() > deadline:
                    raise ClusterUnavailable(
                        f"Ray's dashboard did not answer within {_START_TIMEOUT_S:.0f} s.",
                        hint=f"Look into {self._log_file}.",
                    ) from None

    def _log_tail(self, lines: int = 8) -> str:
        try:
            return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"


def _listen(name: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # without it two of these sockets may share a port
    except OSError as error:
        listener.close()
        raise ClusterUnavailable(
            f"Port {port} (ray.{name}) cannot be used: {error.strerror}.",
            hint=f"End what listens there, or set ray.{name} in the cluster file; 0 takes any free port.",
        ) from None
    return listener
