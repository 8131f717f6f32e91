"""The log on disk: SQLite, and PostgreSQL where a server can be started."""

import sqlite3
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from postgres_server import postgres
from sqlalchemy import create_engine

from valign.checks import UserError
from valign.serving.audit_chain import BrokenChain, Entry, verify
from valign.serving.audit_store import TABLE, AuditError, AuditStore


def entry(number, **changes):
    return Entry(**{"at": "now", "request": f"req_{number}", "prompt": "p" * 64, "body": f'{{"n":{number}}}', **changes})


@pytest.fixture(scope="module")
def server():
    with tempfile.TemporaryDirectory() as folder, postgres(Path(folder)) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return str(tmp_path / "log.db")
    return emptied(request.getfixturevalue("server")[0])


def emptied(address):
    with changing(address) as connection:
        TABLE.metadata.drop_all(connection)
    return address


@contextmanager
def changing(address):
    """A connection to the database past the store, as somebody who tampers with it has one; committed at the end."""
    driver = address.replace("postgresql:", "postgresql+psycopg:") if "://" in address else f"sqlite:///{address}"
    engine = create_engine(driver)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def test_what_is_appended_is_read_back_in_order(url):
    store = AuditStore(url, create=True)
    written = store.append([entry(1), entry(2, durable=True)]) + store.append([entry(3, prompt="ü" * 10, body='["\\u0000"]')])
    assert list(store.links()) == written
    assert [link.seq for link in written] == [1, 2, 3]
    assert store.newest(2) == written[1:]
    assert store.find(request="req_2") == [written[1]]
    assert store.find(prompt="p" * 64) == written[:2]
    assert list(store.links(after=2)) == written[2:]
    assert verify(AuditStore(url).links()).head == written[-1].hash


def test_a_second_start_goes_on_with_the_chain(url):
    AuditStore(url, create=True).append([entry(1)])
    AuditStore(url, create=True).append([entry(2)])
    assert verify(AuditStore(url).links()).entries == 2


def test_many_writers_make_one_chain(url):
    stores = [AuditStore(url, create=True) for _ in range(4)]
    failures = []

    def write(store, first):
        try:
            for number in range(first, first + 10):
                store.append([entry(number), entry(number)])
        except AuditError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(store, 100 * i)) for i, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert verify(stores[0].links()).entries == 80


def test_tampering_in_the_database_shows(url):
    store = AuditStore(url, create=True)
    store.append([entry(number) for number in range(1, 6)])
    with changing(url) as connection:
        connection.execute(TABLE.update().where(TABLE.c.seq == 3).values(body="{}"))
    with pytest.raises(BrokenChain, match="entry 3: its hash does not fit"):
        verify(store.links())
    with changing(url) as connection:
        connection.execute(TABLE.delete().where(TABLE.c.seq == 3))
    with pytest.raises(BrokenChain, match="entry 3: missing"):
        verify(store.links())


def test_a_locked_sqlite_file_fails_and_works_again(tmp_path, monkeypatch):
    monkeypatch.setattr("valign.serving.audit_store.LOCK_WAIT", 0.05)
    store = AuditStore(str(tmp_path / "log.db"), create=True)
    other = sqlite3.connect(tmp_path / "log.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(AuditError, match="locked"):
        store.append([entry(1)])
    other.execute("ROLLBACK")
    assert store.append([entry(1)])[0].seq == 1
    assert list(store.links()) == store.newest(1)


def test_a_deleted_or_replaced_sqlite_file_is_not_written_to(tmp_path):
    path = tmp_path / "log.db"
    store = AuditStore(str(path), create=True)
    store.append([entry(1)])
    path.rename(tmp_path / "elsewhere.db")
    with pytest.raises(AuditError, match="No such file"):
        store.append([entry(2)])
    AuditStore(str(path), create=True)
    with pytest.raises(AuditError, match="gone or was replaced"):
        store.append([entry(2)])


def test_a_postgres_that_went_away_fails_and_works_again(server):
    url, start, stop = server
    store = AuditStore(emptied(url), create=True)
    store.append([entry(1)])
    stop()
    with pytest.raises(AuditError):
        store.append([entry(2)])
    start()
    store.append([entry(3)])
    assert verify(store.links()).entries == 2


def test_urls_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        AuditStore(str(tmp_path / "none.db"))
    for wrong in ("mysql://x@y/z", "sqlite://", "no such://thing", "sqlite:///:memory:"):
        with pytest.raises(UserError, match="--audit must be"):
            AuditStore(wrong, create=True)
    sqlite3.connect(tmp_path / "other.db").execute("create table x (y)").connection.commit()
    with pytest.raises(UserError, match="holds no audit log"):
        AuditStore(str(tmp_path / "other.db"))
    (tmp_path / "text.db").write_text("this is no database, but long enough to be looked at as one " * 20)
    with pytest.raises(UserError, match="cannot be opened"):
        AuditStore(str(tmp_path / "text.db"), create=True)


def test_no_password_in_messages():
    pytest.importorskip("psycopg")
    with pytest.raises(UserError) as caught:
        AuditStore("postgresql://someone:hunter2@127.0.0.1:1/none", create=True)
    assert "hunter2" not in str(caught.value)
