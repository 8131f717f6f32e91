"""The log on disk: SQLite, and PostgreSQL where a server can be started."""

import os
import shutil
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
from valign.serving.audit_store import TABLE, AuditError, AuditStore, default_anchor


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
    with pytest.raises(UserError, match=r"log\.db is gone, and .*log\.db\.head knows of 1 entries"):
        AuditStore(str(path), create=True)
    (tmp_path / "log.db.head").rename(tmp_path / "elsewhere.head")
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


def tampered(path, statement):
    with changing(str(path)) as connection:
        connection.exec_driver_sql(statement)


@pytest.fixture
def anchored(tmp_path):
    """A log of three entries, as the service leaves it."""
    store = AuditStore(str(tmp_path / "log.db"), create=True)
    store.append([entry(0, request="", body='{"kind":"start","anchor":"log.db.head"}')])
    store.append([entry(1), entry(2)])
    return tmp_path / "log.db", store


MISSING = ("entry 3, which was written, is missing", "missing: the anchor knows of 3 entries")


@pytest.mark.parametrize(
    ("statement", "found", "says"),
    [
        (
            "delete from valign_audit where seq = 3",
            "entry 3, which was written, is missing",
            "missing: the anchor knows of 3 entries",
        ),
        ("delete from valign_audit", *MISSING),
        ("delete from valign_audit where seq = 1", "it begins with entry 2", "entry 1: missing"),
        ("insert into valign_audit values (0, 'x', 'y', '', '{}', 'x')", "it begins with entry 0", "entry 0: entries count from 1"),
        ("update valign_audit set hash = 'f' where seq = 3", "entry 3, which was written, is another one", "entry 3: its hash"),
    ],
)
def test_what_is_missing_at_an_end_is_noticed_by_everybody(anchored, statement, found, says):
    path, running = anchored
    tampered(path, statement)
    with pytest.raises(AuditError, match=found):
        running.append([entry(3)])
    with pytest.raises(UserError, match=rf"was tampered with: {found}"):
        AuditStore(str(path), create=True)
    reader = AuditStore(str(path))
    with pytest.raises(BrokenChain, match=says):
        verify(reader.links(), anchor=reader.known())


def test_a_write_ahead_file_that_is_gone_is_noticed(anchored):
    path, running = anchored
    running.append([entry(3)])
    Path(f"{path}-wal").unlink()
    with pytest.raises(AuditError, match=r"log\.db-wal is gone or was replaced"):
        running.append([entry(4)])


def test_a_log_without_its_write_ahead_file_is_not_gone_on_with(anchored, tmp_path):
    path, _ = anchored
    (tmp_path / "copy").mkdir()
    for name in ("log.db", "log.db.head"):
        shutil.copy(path.parent / name, tmp_path / "copy")
    with pytest.raises(UserError, match="entry 3, which was written, is missing"):
        AuditStore(str(tmp_path / "copy" / "log.db"), create=True)


def test_an_anchor_that_is_gone_damaged_or_of_another_key_is_noticed(anchored, tmp_path):
    path, _ = anchored
    anchor = Path(f"{path}.head")
    kept = anchor.read_text()
    anchor.unlink()
    assert AuditStore(str(path)).lost_anchor()
    with pytest.raises(UserError, match=r"its anchor .*log\.db\.head is gone"):
        AuditStore(str(path), create=True)
    anchor.write_text(kept[:-9])
    with pytest.raises(UserError, match="must hold a number and two hashes, it is damaged"):
        AuditStore(str(path), create=True)
    signed = AuditStore(str(tmp_path / "signed.db"), create=True, secret=b"one key")
    signed.append([entry(1)])
    assert AuditStore(str(tmp_path / "signed.db"), secret=b"one key").known() == AuditStore(str(tmp_path / "signed.db")).known()
    with pytest.raises(UserError, match="was not signed with this VALIGN_AUDIT_KEY"):
        AuditStore(str(tmp_path / "signed.db"), create=True, secret=b"another")


def test_several_servers_on_one_log_keep_the_latest_head(tmp_path):
    first, second = (AuditStore(str(tmp_path / "log.db"), create=True) for _ in range(2))
    first.append([entry(1)])
    second.append([entry(2)])
    first.append([entry(3)])
    assert second.known().seq == 3
    second.append([entry(4)])
    assert verify(second.links(), anchor=second.known()).entries == 4


def test_the_anchor_of_a_postgres_log_stands_where_it_is_told(server, tmp_path):
    url = emptied(server[0])
    AuditStore(url, create=True, anchor=tmp_path / "head").append([entry(1), entry(2)])
    with changing(url) as connection:
        connection.exec_driver_sql("delete from valign_audit where seq = 2")
    with pytest.raises(UserError, match="entry 2, which was written, is missing"):
        AuditStore(url, create=True, anchor=tmp_path / "head")
    assert default_anchor(url) != default_anchor(url + "2")


def filled(path, count, **options):
    store = AuditStore(str(path), create=True, **options)
    for number in range(1, count + 1):
        store.append([entry(number, body="x" * 40_000)])
    return store


def test_a_full_file_is_set_aside_and_the_chain_goes_on(tmp_path):
    path = tmp_path / "log.db"
    store = filled(path, 12, max_bytes=200_000)
    older = sorted(file.name for file in tmp_path.glob("log.db.?"))
    assert older == [f"log.db.{number}" for number in range(1, len(older) + 1)]
    assert len(older) > 1
    links = list(store.links())
    assert [link.seq for link in links] == list(range(1, 13))
    assert verify(store.links(), anchor=store.known()).entries == 12
    assert store.newest(9) == links[3:]
    assert store.find(request="req_1") == links[:1]
    assert store.find(prompt="p" * 64) == links
    assert AuditStore(str(path), create=True).append([entry(13)])[0].seq == 13
    assert verify(AuditStore(str(path)).links()).entries == 13


@pytest.mark.skipif(os.name != "posix", reason="there are no such permissions")
def test_every_file_of_a_log_is_private(tmp_path):
    (tmp_path / "log.db").touch(mode=0o644)
    store = filled(tmp_path / "log.db", 8, max_bytes=200_000)
    files = {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()}
    assert {"log.db", "log.db.1", "log.db-wal", "log.db.head"} <= set(files)
    assert set(files.values()) == {"0o600"}
    store.close()


def test_a_file_that_somebody_reads_is_set_aside_later(tmp_path):
    path = tmp_path / "log.db"
    store = AuditStore(str(path), create=True, max_bytes=200_000)
    store.append([entry(1)])
    with sqlite3.connect(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM valign_audit").fetchone()
        for number in range(2, 9):
            store.append([entry(number, body="x" * 40_000)])
        assert not Path(f"{path}.1").exists()
    reader.close()
    for number in range(9, 40):
        store.append([entry(number, body="x" * 40_000)])
    assert Path(f"{path}.1").exists()
    assert verify(store.links(), anchor=store.known()).entries == 39


def test_a_rotation_that_was_cut_short_leaves_one_log(tmp_path):
    path = tmp_path / "log.db"
    filled(path, 3).close()
    os.link(path, f"{path}.1")  # set aside under its new name, and no new file in its place yet
    assert verify(AuditStore(str(path)).links()).entries == 3
    store = filled(path, 6, max_bytes=200_000)
    assert verify(store.links()).entries == 9


def test_older_files_that_are_gone_or_others_are_noticed(tmp_path):
    path = tmp_path / "log.db"
    filled(path, 18, max_bytes=200_000).close()
    oldest, other, log = Path(f"{path}.1"), Path(f"{path}.2"), lambda: AuditStore(str(path), create=True)
    kept = oldest.read_bytes()
    oldest.unlink()
    with pytest.raises(UserError, match=r"log\.db\.1 is gone, and later ones are there"):
        log()
    oldest.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="file 2 of it does not begin with the last entry"):
        log()
    with pytest.raises(BrokenChain):
        verify(AuditStore(str(path)).links())
    for file in (oldest, *tmp_path.glob("log.db.[2-9]")):
        file.unlink()
    with pytest.raises(UserError, match="it begins with entry"):
        log()
    assert kept
