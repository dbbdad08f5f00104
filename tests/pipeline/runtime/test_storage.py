"""Files that appear whole or not at all."""

from sere.pipeline.runtime.storage import Storage


def test_what_a_killed_process_had_half_written_goes(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.put("results/a.parquet", b"whole")
    (tmp_path / "results" / ".mine").write_text("a hidden file of somebody's")
    with monkeypatch.context() as patch:
        # As after kill -9: nothing of what comes after is done.
        patch.setattr("os.replace", lambda *_: None)
        patch.setattr("os.unlink", lambda *_: None)
        storage.put("results/b.parquet", b"never renamed")
    assert len(list((tmp_path / "results").iterdir())) == 3 and list(storage.sizes("results")) == ["results/a.parquet"]
    storage.remove_unfinished("results")
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [".mine", "a.parquet"]
    storage.remove_unfinished("nothing")
