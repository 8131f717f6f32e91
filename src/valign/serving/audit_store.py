"""The log in a database: SQLite, or PostgreSQL by URL. One transaction per group of entries; several servers may share one log.

A log in SQLite goes on in a new file when it is large (`valign.serving.audit_files`), unless another process holds it open.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from valign.checks import UserError
from valign.serving.audit_anchor import Anchor, LogHead
from valign.serving.audit_chain import GENESIS, Entry, Link, extend
from valign.serving.audit_files import file_size, make_private, older_files, rotate

LOCK_WAIT = 2  # seconds that a writer waits for another one before it gives up
NETWORK_WAIT = 5  # seconds until a database that does not answer counts as gone
PAGE = 1000  # entries read at a time
MAX_BYTES = 256 * 2**20  # of a file in SQLite
RETRY = 2**20  # bytes that are written before a file that could not be set aside is tried again

TABLE = Table(
    "valign_audit",
    MetaData(),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", String(40), nullable=False),
    Column("request", String(64), nullable=False, index=True),
    Column("prompt", String(64), nullable=False, index=True),
    Column("body", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)
LAST = select(TABLE.c.seq, TABLE.c.hash).order_by(TABLE.c.seq.desc()).limit(1)
FIRST = select(func.min(TABLE.c.seq))
BEGINNING = select(TABLE).order_by(TABLE.c.seq).limit(1)
END = select(TABLE).order_by(TABLE.c.seq.desc()).limit(1)
INSERT = TABLE.insert()
NO_REQUEST = ""  # of the service's own entries
ANCHORED = "anchor"  # key of the service's own entries from the day on which the log has an anchor


class AuditError(Exception):
    """The log could not be written or read."""


class AuditStore:
    """Appends links and reads them. An append is whole or did not happen.

    Args:
        url: A path or ``sqlite:///path``, or ``postgresql://user@host/database``.
        create: Make the file and the table if they are missing.
        anchor: File that holds the head (`valign.serving.audit_anchor`); None is a file beside SQLite's, and none for PostgreSQL.
        secret: Signs the anchor.
        max_bytes: Of a file in SQLite, from which on the log goes on in a new one.
    Raises: UserError for a URL of another kind, or if nothing is there and ``create`` is false; with ``create`` also if entries
        are missing at either end.
    """

    def __init__(
        self, url: str, *, create: bool = False, anchor: Path | None = None, secret: bytes = b"", max_bytes: int = MAX_BYTES
    ) -> None:
        self._url, self._file = _resolve(url)
        self.name = self._url.render_as_string(hide_password=True)
        beside = Path(f"{self._file}.head") if self._file is not None else None
        self.anchor = Anchor(file, secret) if (file := anchor or beside) is not None else None
        self._known = self.anchor.read() if self.anchor is not None else None  # the last entry that must still be there
        self._wal: tuple[int, int] | None = None  # which file that is, as long as this connection is open
        if create and self._file is not None and self._known is not None and not self._file.exists():
            raise UserError(
                f"The audit log {self._file} is gone, and {beside} knows of {self._known.seq} entries. Bring it back, or move the "
                "latter away to begin a new log."
            )
        if self._file is not None and not create and not self._file.exists():
            raise UserError(f"The audit log {self._file} does not exist. Check the path; `valign serve --audit` makes it.")
        if self._file is not None and create:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            make_private(self._file)
        self._max_bytes = max_bytes
        options: dict[str, Any] = {"timeout": LOCK_WAIT} if self._file else _postgres_options(writes=create)
        self._engine = create_engine(self._url, connect_args=options, pool_pre_ping=self._file is None)
        if self._file:
            event.listen(self._engine, "connect", self._prepare_sqlite)
        try:
            if create:
                TABLE.metadata.create_all(self._engine)
            elif not inspect(self._engine).has_table(TABLE.name):
                raise UserError(f"{self.name} holds no audit log. Check the URL; `valign serve --audit` makes one.")
        except SQLAlchemyError as error:
            raise UserError(
                f"The audit log {self.name} cannot be opened: {_reason(error)}. Check the URL and the server."
            ) from None
        self._inode = self._identity()
        self._first = self._expected_first()
        if create:
            self._check_start()

    def append(self, entries: Sequence[Entry]) -> list[Link]:
        """Write the entries behind the last one, in order, in one transaction. Raises: AuditError if that failed."""
        with self._failing():
            if self._identity() != self._inode:
                raise AuditError(f"{self.name} is gone or was replaced")
            with self._engine.begin() as connection:
                self._lock(connection, durable=any(entry.durable for entry in entries))
                if (fault := self._fault(connection)) is not None:
                    raise AuditError(f"{self.name}: {fault}")
                seq, head = connection.execute(LAST).first() or (0, GENESIS)
                links = extend(seq, head, entries)
                connection.execute(INSERT, [vars(link) for link in links])
            self._known = LogHead(links[-1].seq, links[-1].hash)
            if self.anchor is not None:
                self.anchor.write(self._known)
            self._rotate()
        return links

    def links(self, *, after: int | None = None) -> Iterator[Link]:
        """All entries, or those behind ``after``, oldest first, a page at a time. Also those that should not be there."""
        query = select(TABLE) if after is None else select(TABLE).where(TABLE.c.seq > after)
        yield from self._read_all(query.order_by(TABLE.c.seq))

    def known(self) -> LogHead | None:
        """The head that the anchor knows; read it before the entries: the log may grow meanwhile."""
        return self.anchor.read() if self.anchor is not None else None

    def lost_anchor(self) -> bool:
        """Whether the log's entries say that it has an anchor, and there is none."""
        if self.anchor is None or self.anchor.file.exists():
            return False
        own = self._read_all(select(TABLE).where(TABLE.c.request == NO_REQUEST))
        return any(f'"{ANCHORED}":' in link.body for link in own)

    def newest(self, count: int) -> list[Link]:
        """The last entries, oldest first."""
        query, found = select(TABLE).order_by(TABLE.c.seq.desc()), list[Link]()
        for engine in reversed(list(self._engines())):
            found += (link for link in self._read(query.limit(count + 1 - len(found)), engine) if link not in found[-1:])
            if len(found) >= count:
                break
        return found[:count][::-1]

    def find(self, *, request: str = "", prompt: str = "") -> list[Link]:
        """The entries of one request, or of one prompt's keyed hash."""
        wanted = TABLE.c.request == request if request else TABLE.c.prompt == prompt
        return list(self._read_all(select(TABLE).where(wanted).order_by(TABLE.c.seq)))

    def close(self) -> None:
        self._engine.dispose()

    def _engines(self) -> Iterator[Engine]:
        """Of every file of the log, the oldest first; the last one is the log's own."""
        for file in older_files(self._file) if self._file is not None else ():
            engine = create_engine(f"sqlite:///file:{file.resolve().as_posix()}?mode=ro&uri=true", poolclass=NullPool)
            yield engine
        yield self._engine

    def _read_all(self, query: "Select[Any]") -> Iterator[Link]:
        """What every file has, in order; the entry that two files share once."""
        last: Link | None = None
        for engine in self._engines():
            for link in self._read(query, engine):
                if link != last:
                    yield link
                last = link

    def _read(self, query: "Select[Any]", engine: Engine) -> Iterator[Link]:
        with self._failing(), engine.connect() as connection:
            for row in connection.execution_options(yield_per=PAGE).execute(query):
                yield Link(**row._mapping)

    def _rotate(self) -> None:
        """Go on in a new file if this one is large. Where another process holds it open, it is tried again later."""
        if self._file is None or file_size(self._file) < self._max_bytes:
            return
        self._engine.dispose()  # with its last connection SQLite's companion files go
        fresh = Path(f"{self._file}.new")
        fresh.unlink(missing_ok=True)
        make_private(fresh)
        made = create_engine(f"sqlite:///{fresh}", poolclass=NullPool)
        TABLE.metadata.create_all(made)
        if not rotate(self._file, fresh):
            fresh.unlink()
            self._max_bytes = file_size(self._file) + RETRY
        self._inode, self._first = self._identity(), self._expected_first()

    def _expected_first(self) -> int:
        """Number of the entry with which the log's own file must begin: 1, or the last one of the file before it."""
        older = list(self._engines())[:-1]
        return next(self._read(END, older[-1])).seq if older else 1

    def _check_files(self) -> str | None:
        """Whether every file begins with the last entry of the one before it; what is wrong, or None."""
        before: Link | None = None
        for number, engine in enumerate(self._engines(), start=1):
            first = next(self._read(BEGINNING, engine), None)
            if before is not None and first != before:
                return f"file {number} of it does not begin with the last entry of the one before it"
            before = next(self._read(END, engine), None)
        return None

    def _check_start(self) -> None:
        try:
            with self._failing(), self._engine.connect() as connection:
                fault = self._fault(connection) or self._check_files()
            if fault is None and self.lost_anchor():
                fault = f"its anchor {self.anchor.file} is gone" if self.anchor is not None else None
        except AuditError as error:
            raise UserError(f"The audit log {error}. Check the URL and the server.") from None
        if fault is not None:
            raise UserError(
                f"The audit log {self.name} was tampered with: {fault}. Look at it with `valign audit-log verify`, then move it "
                "and its anchor away to begin a new one."
            )

    def _fault(self, connection: Connection) -> str | None:
        """What is missing at either end of the log, or a companion file of SQLite's; None if nothing is."""
        first = connection.execute(FIRST).scalar()
        if first is not None and first != self._first:
            return f"it begins with entry {first}"
        if self._known is not None:
            found = connection.execute(select(TABLE.c.hash).where(TABLE.c.seq == self._known.seq)).scalar()
            if found != self._known.hash:
                return f"entry {self._known.seq}, which was written, is {'missing' if found is None else 'another one'}"
        if self._file is not None:
            wal = Path(f"{self._file}-wal")
            now = _file_identity(wal) if wal.exists() else None
            if self._wal is not None and now != self._wal:
                return f"{wal} is gone or was replaced"
            self._wal = now
        return None

    def _prepare_sqlite(self, connection: Any, _: Any) -> None:
        self._wal = None
        connection.isolation_level = None  # transactions begin where `_lock` says so, not where the driver guesses
        connection.execute("PRAGMA journal_mode = WAL")

    def _lock(self, connection: Connection, *, durable: bool) -> None:
        """Keep other writers out until this transaction ends; readers go on."""
        if self._file is None:
            connection.exec_driver_sql(f"LOCK TABLE {TABLE.name} IN EXCLUSIVE MODE")
        else:
            connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def _identity(self) -> tuple[int, int] | None:
        """Which file this is: SQLite would go on writing to one that was deleted. Raises: OSError if it is not there."""
        return None if self._file is None else _file_identity(self._file)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, OSError, UserError) as error:
            raise AuditError(f"{self.name}: {_reason(error)}") from error


def _resolve(url: str) -> tuple[Any, Path | None]:
    """SQLAlchemy's URL, and the file if it is SQLite."""
    if "://" not in url:
        url = f"sqlite:///{url}"
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        found = None
    kind = found.get_backend_name() if found is not None else ""
    if found is not None and kind == "sqlite" and found.database not in (None, "", ":memory:"):
        return found, Path(found.database)
    if found is not None and kind in ("postgresql", "postgres"):
        try:
            ready = found.set(drivername="postgresql+psycopg")
            ready.get_dialect().import_dbapi()
        except (NoSuchModuleError, ImportError):
            raise UserError("PostgreSQL needs a driver. Run: pip install 'valign[postgres]'") from None
        return ready, None
    raise UserError("--audit must be a path, sqlite:///PATH or postgresql://USER@HOST/DATABASE, got another kind of URL.")


def _file_identity(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def default_anchor(url: str) -> Path:
    """Where the command line keeps a log's anchor: beside a file, else here, under a name of the URL's own."""
    found, file = _resolve(url)
    name = hashlib.sha256(found.render_as_string(hide_password=True).encode()).hexdigest()[:12]
    return Path(f"{file}.head") if file is not None else Path(f"valign-audit-{name}.head")


def _postgres_options(*, writes: bool) -> dict[str, Any]:
    waits = f"-c lock_timeout={LOCK_WAIT}s -c statement_timeout={NETWORK_WAIT}s" if writes else ""
    return {"connect_timeout": NETWORK_WAIT, "tcp_user_timeout": NETWORK_WAIT * 1000, "options": waits}


def _reason(error: Exception) -> str:
    """The driver's own words, one line, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().split("\n")[0].rstrip(".") or type(cause).__name__
