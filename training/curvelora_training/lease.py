"""The attempt fence: one attempt at a time writes a run folder.

The first process of an attempt holds `lease.json` in the folder: it creates the file, renews its time of change every minute, and
reads it again before everything that it writes. Another attempt takes it over where the holder is known to be dead or has not
been heard of for 15 minutes; one that was taken over finds out before its next write, and stops.

Assumed of the file system: exclusive creation and renaming are atomic, and a file that is opened is read as it is now (POSIX, and
NFS from version 3 on). No locks are used. Ages are differences of the file server's own times, so clocks need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from curvelora.errors import UserError
from curvelora_eval.files import make_folder
from curvelora_training.distributed import agree, rank

RENEWAL = 60.0  # seconds
STALE = 900.0  # seconds: missed renewals may be a file server that is slow or away for some minutes


class Lease:
    """The right to write a run folder; all of it concerns the first process only, the others learn of errors by `agree`.

    Args:
        folder: the run folder, which need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "lease.json"
        self.me = describe_attempt()
        self.held = False
        self._stop = threading.Event()

    def check_free(self) -> None:
        """Raise `UserError`, on every process, where another attempt holds the folder; changes nothing."""
        self._agreed(lambda: self._refuse_living(self._read()))

    def take(self) -> None:
        """Take the lease. Raises `UserError`, on every process, where another attempt holds it."""
        self._agreed(self._take)

    def confirm(self) -> None:
        """Raise `UserError`, on every process, where another attempt has taken over."""
        self._agreed(self.check)

    def check(self) -> None:
        """Raise `UserError` where this attempt had the lease and another one has taken over; for the first process alone."""
        if self.held and (holder := self._read()).get("token") != self.me["token"]:
            self.held = False
            raise UserError(
                f"{self.folder} was taken over by another attempt ({_said(holder)}): this one stops and writes nothing more"
            )

    def release(self) -> None:
        """Give the lease back, where it is still held; on a disk that cannot be written it stays, and counts as a dead one's."""
        self._stop.set()
        with contextlib.suppress(OSError):  # what ended the run is the error to be told
            if self.held and self._read().get("token") == self.me["token"]:
                self.path.unlink(missing_ok=True)
        self.held = False

    def _agreed(self, action: Any) -> None:
        problem = None
        if rank() == 0:
            try:
                action()
            except UserError as error:
                problem = error
            except OSError as error:
                problem = UserError(
                    f"{self.path} cannot be read or written ({error.strerror}): {self.folder} is not written to"
                )
        agree(problem)

    def _take(self) -> None:
        make_folder(self.folder)
        try:
            self._create(self.path)
        except FileExistsError:
            self._take_over()
        self.held = True
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _take_over(self) -> None:
        """Put this attempt's file in the place of a dead one's. One attempt alone can create the claim to it."""
        found = self._read()  # before it is judged: what is claimed is what was judged
        if not found and not self.path.exists():  # given back in this moment
            self._create(self.path)
            return
        self._refuse_living(found)
        claim = self.path.with_name(f".lease-after-{found.get('token')}.json")
        try:
            self._create(claim)
        except FileExistsError:
            raise UserError(
                f"another attempt is just taking {self.folder} over: wait for it; if there is none, delete {claim}"
            ) from None
        try:
            if (now := self._read()) != found:  # another one was quicker, and has removed its claim already
                self._refuse(now, 0)
            os.replace(claim, self.path)
        finally:
            claim.unlink(missing_ok=True)

    def _create(self, path: Path) -> None:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(file, json.dumps(self.me).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL):
            with contextlib.suppress(OSError):  # the file server may be back at the next time
                if self._read().get("token") == self.me["token"]:
                    os.utime(self.path)

    def _read(self) -> dict[str, Any]:
        """The lease as it is; empty where there is none, or where it is just being written."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _refuse_living(self, holder: dict[str, Any]) -> None:
        """Raise `UserError` where the holder may be alive."""
        try:
            age = self._age()
        except FileNotFoundError:  # given back in this moment
            return
        if age <= STALE and not is_over(holder, self.me):
            self._refuse(holder, age)

    def _age(self) -> float:
        """Seconds since the lease was renewed, by the file server's clock."""
        renewed = self.path.stat().st_mtime
        probe = self.path.with_name(f".lease-probe-{self.me['token']}")
        try:
            probe.touch()
            return probe.stat().st_mtime - renewed
        except OSError:  # a folder that cannot be written, which is said elsewhere
            return time.time() - renewed
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)

    def _refuse(self, holder: dict[str, Any], age: float) -> None:
        raise UserError(
            f"{self.folder} is held by another attempt ({_said(holder)}, heard of {max(age, 0):.0f} s ago): wait for it, stop "
            f"it, or name another output; one that is dead is taken over after {STALE / 60:.0f} minutes without a sign of life "
            f"(on the same machine, and by the requeued SLURM job, at once), or delete {self.path} where you know that it is"
        )


def describe_attempt() -> dict[str, Any]:
    """Who this process is, for others to tell whether it still runs."""
    process = psutil.Process()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "machine": _machine(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def is_over(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder is dead for certain: its process on this machine is gone, or SLURM has started its job anew."""
    job = holder.get("slurm_job")
    if job is not None and job == me["slurm_job"] and holder.get("slurm_restart", 0) < me["slurm_restart"]:
        return True
    if not holder.get("machine") or holder["machine"] != me["machine"]:
        return False
    try:
        # a process of the same number that was started at another time is another one
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) > 2
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _machine() -> str:
    """Name, boot and process namespace: only within these does a process number mean anything. Containers share a name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _said(holder: dict[str, Any]) -> str:
    """The holder in words."""
    if not holder:
        return "which has only just begun, or has removed its lease"
    job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"
