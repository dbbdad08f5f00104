"""Files on every kind of storage, and on one that fails now and then."""

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sere.conf.errors import ConfigError, TryAgainError
from sere.pipeline.runtime.storage import Storage
from tests.failing_proxy import failing_proxy


class FailingFileSystem(MemoryFileSystem):
    """Every kind of call fails as often as `failures` says before one is answered; or only the answer is lost."""

    protocol = "failing"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures = 0
    error: Exception = OSError(errno.EBUSY, "Slow down")
    num_failed: ClassVar[dict[str, int]] = {}
    is_answer_lost = False

    def _fail(self, method):
        cls = type(self)
        failed = cls.num_failed.get(method, 0)
        cls.num_failed[method] = (failed + 1) % (cls.failures + 1)
        if failed < cls.failures:
            raise cls.error

    def cat_file(self, path, **options):
        self._fail("cat_file")
        return super().cat_file(path, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        if self.is_answer_lost and mode == "create":
            super().pipe_file(path, value, mode=mode, **options)
        self._fail("pipe_file")
        super().pipe_file(path, value, mode=mode, **options)

    def ls(self, path, detail=True, **options):
        self._fail("ls")
        return super().ls(path, detail=detail, **options)

    def rm_file(self, path):
        self._fail("rm_file")
        super().rm_file(path)


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@pytest.fixture
def failing(monkeypatch):
    FailingFileSystem.store.clear()
    for name, value in {"failures": 0, "num_failed": {}, "is_answer_lost": False}.items():
        monkeypatch.setattr(FailingFileSystem, name, value)
    return Storage("failing://bucket/run", patience_s=30)


def test_whatever_fails_for_a_moment_is_done_again(failing, monkeypatch, caplog):
    monkeypatch.setattr(FailingFileSystem, "failures", 2)
    failing.put("a/b", b"1")
    assert failing.create("a/c", b"2") and not failing.create("a/c", b"3")
    assert failing.get("a/b") == b"1" and failing.get("a/none") is None
    assert list(failing.sizes("a")) == ["a/b", "a/c"]
    failing.remove_all(["a/b", "a/c", "a/none"])
    failing.remove("a/none")
    assert failing.sizes("a") == {}
    assert "Slow down; tried again for 30 s" in caplog.text


def test_a_storage_that_stays_away_is_an_error_in_the_end(failing, monkeypatch):
    monkeypatch.setattr(FailingFileSystem, "failures", 10**6)
    with pytest.raises(TryAgainError, match=r"run/a cannot be used \(.*Slow down\): run the same command again"):
        Storage("failing://bucket/run", patience_s=1).put("a", b"1")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_what_does_not_mend_itself_is_an_error_at_once(failing, monkeypatch, number):
    monkeypatch.setattr(FailingFileSystem, "failures", 1)
    monkeypatch.setattr(FailingFileSystem, "error", OSError(number, "no"))
    with pytest.raises(ConfigError, match=r"run/a cannot be used \(.*no\): mend that") as raised:
        failing.put("a", b"1")
    assert not isinstance(raised.value, TryAgainError)
    failing.put("a", b"1")


def test_a_file_whose_writing_was_not_confirmed_is_ones_own(failing, monkeypatch):
    monkeypatch.setattr(FailingFileSystem, "is_answer_lost", True)
    monkeypatch.setattr(FailingFileSystem, "failures", 1)
    assert failing.create("lease/1", b"mine") and failing.get("lease/1") == b"mine"
    assert not failing.create("lease/1", b"another's")


def test_of_several_who_create_a_file_one_does(uri):
    storages = [Storage(uri) for _ in range(8)]
    for storage in storages:
        assert storage.get("lease/1") is None
    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda number: storages[number].create("lease/1", f"{number}".encode()), range(8)))
    assert sum(done) == 1 and storages[0].get("lease/1") == f"{done.index(True)}".encode()


def test_what_is_set_aside_replaces_nothing(uri):
    storage = Storage(uri)
    names = []
    for content in (b"1", b"2"):
        storage.put("results/a", content)
        names.append(storage.set_aside("results/a"))
        assert storage.get("results/a") is None
    assert [storage.get(name) for name in names] == [b"1", b"2"] and names[0] == "damaged/a"


def test_many_files_are_removed(uri):
    storage = Storage(uri)
    names = [f"results/{number}" for number in range(20)]
    for name in names:
        storage.put(name, b"x")
    storage.remove_all([*names[1:], "results/none"])
    assert list(storage.sizes("results")) == names[:1]
    assert pickle.loads(pickle.dumps(storage)).get(names[0]) == b"x"


def test_an_object_store_that_answers_503_to_one_request_in_ten_and_others_late(s3_bucket, tmp_path):
    """A real S3 server behind a proxy; nothing is lost, and of two who create a file one does."""
    port = int(os.environ["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
    with failing_proxy(port, share=0.1, late_s=0.2) as (proxy, refused):
        options = {"endpoint_url": f"http://127.0.0.1:{proxy}", "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        storages = [Storage(f"{s3_bucket}/{tmp_path.name}", {**options, "skip_instance_cache": True}) for _ in range(2)]
        for number in range(12):
            storages[0].put(f"results/{number:03d}", b"%d" % number)
            created = [storage.create(f"lease/{number:03d}", b"%d" % owner) for owner, storage in enumerate(storages)]
            assert created == [True, False] and storages[1].get(f"lease/{number:03d}") == b"0"
        assert len(storages[1].sizes("results")) == 12
        assert [storages[1].get(name) for name in storages[1].sizes("results")] == [b"%d" % number for number in range(12)]
        storages[0].remove_all([f"results/{number:03d}" for number in range(1, 12)])
        assert list(storages[1].sizes("results")) == ["results/000"]
        assert len(refused) > 3
