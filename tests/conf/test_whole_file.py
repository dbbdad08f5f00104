"""Files that appear whole or not at all."""

import pytest

from sere.conf.whole_file import remove_unfinished, written_whole


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with written_whole(file) as aside:
        aside.write_text("one")
        assert not file.exists()
    with pytest.raises(RuntimeError), written_whole(file) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert file.read_text() == "one" and list(file.parent.iterdir()) == [file]


def test_what_a_killed_process_had_half_written_goes(tmp_path, monkeypatch):
    (tmp_path / ".mine").write_text("a hidden file of somebody's")
    with monkeypatch.context() as patch:
        # As after kill -9: nothing of what comes after is done.
        patch.setattr("os.replace", lambda *_: None)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with written_whole(tmp_path / "b.parquet") as aside:
            aside.write_text("never renamed")
    assert len(list(tmp_path.iterdir())) == 2
    remove_unfinished(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".mine"]
    remove_unfinished(tmp_path / "nothing")
