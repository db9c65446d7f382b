"""What the words of --data find, and what they cannot mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from lf.data import DataError, find_files, find_sources


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_files_come_in_order_of_path_whatever_names_them(tmp_path: Path) -> None:
    touch(tmp_path, "b/z.txt", "a.txt", "b/c/[1].txt", "b/.hidden/x.txt", "note.md")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    expected = [str(tmp_path / name) for name in ("a.txt", "b/c/[1].txt", "b/z.txt")]
    assert find_files(tmp_path) == expected
    assert find_files([tmp_path / "b", tmp_path / "a.txt", expected[0]]) == expected
    assert find_files(str(tmp_path / "**" / "*.txt")) == expected
    assert find_files(tmp_path, match="*.md") == [str(tmp_path / "note.md")]


def test_indexed_tokens_are_found_by_prefix_file_folder_and_glob(tmp_path: Path) -> None:
    touch(tmp_path, "t/x.bin", "t/x.idx", "t/x.json", "t/sub/y.bin", "t/sub/y.idx")
    x, y = (str(tmp_path / "t" / name) for name in ("x", "sub/y"))
    for words, prefixes in [
        ([x], (x,)), ([x + ".bin"], (x,)), ([x + ".idx"], (x,)), ([str(tmp_path / "t")], (y, x)), ([str(tmp_path / "t" / "*.bin")], (x,)),
        ([str(tmp_path / "t" / "*")], (y, x)), ([x, x + ".idx", y], (y, x)),
    ]:  # fmt: skip
        (source,) = find_sources(words)
        assert source.prefixes == prefixes
        assert source.files == ()
    (tmp_path / "t" / "x").mkdir()
    with pytest.raises(DataError, match=r"x is there, and so is .*x.idx; write .*x.idx or"):
        find_sources([x])


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.txt", "b.txt", "c:d.txt", "2:e.txt", "7:a.txt")
    monkeypatch.chdir(tmp_path)

    def found(*words: str) -> list[tuple[float | None, list[str]]]:
        return [(s.weight, [Path(f).name for f in s.files]) for s in find_sources(words)]

    assert found("0.7:a.txt", "3e-1:b.txt") == [(0.7, ["a.txt"]), (0.3, ["b.txt"])]
    assert found("b.txt", "a.txt") == [(None, ["a.txt", "b.txt"])]  # one source
    assert found("c:d.txt") == [(None, ["c:d.txt"])]
    assert found("2:e.txt") == [(None, ["2:e.txt"])]  # there is no e.txt
    assert found("2:c:d.txt", "1:2:e.txt") == [(2, ["c:d.txt"]), (1, ["2:e.txt"])]
    assert found("./7:a.txt") == [(None, ["7:a.txt"])]
    assert found("7:./a.txt") == [(7, ["a.txt"])]
    for words, said in [
        (("0.7:a.txt", "b.txt"), "b.txt without a weight, while others have one; write 0.3:b.txt, or give none"),
        (("7:a.txt",), r"7:a.txt is a file, and a.txt with the weight 7 as well; write ./7:a.txt or 7:./a.txt"),
        (("0:a.txt",), "the weight 0 must be a positive number; leave a source out"),
        (("-1:a.txt",), "the weight -1 must be a positive number"),
        (("nan:a.txt",), "the weight nan must be a positive number"),
        (("inf:a.txt", "1:b.txt"), "the weight inf must be a positive number"),
        (("0.7:", "0.3:b.txt"), "0.7: without a weight"),
        (("0.7:typo", "0.3:b/*.txt"), r"typo does not exist; glob .*b/\*.txt matches no file"),
        ((), "no data was named"),
    ]:
        with pytest.raises(DataError, match=said):
            find_sources(words)
    with pytest.raises(DataError, match=r"data='a.txt' must be a list of words"):
        find_sources("a.txt")


def test_folders_that_could_mean_several_things(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "two/a.txt", "two/b.jsonl", "two/c.md", "sets/dataset_dict.json", "sets/train/x", "sets/test/x", "one/a.txt", "one/config.json")
    for path, words in [
        ("empty", r"empty has no .txt, .jsonl, .*or .idx file; give match="),
        ("two", r"two has files of several kinds, such as .*a.txt and .*b.jsonl; say which are meant, as .*two/\*.txt"),
        ("sets", r"sets holds several data sets; name one: .*sets/test, .*sets/train"),
    ]:
        with pytest.raises(DataError, match=words):
            find_files(tmp_path / path)
    with pytest.raises(DataError, match=r"two has no file that matches '\*.xyz'"):
        find_files(tmp_path / "two", "*.xyz")
    assert [Path(f).name for f in find_files(tmp_path / "one")] == ["a.txt"]
    with pytest.raises(DataError, match=r"nowhere does not exist; glob .*\*.json matches no file"):
        find_files([tmp_path / "nowhere", tmp_path / "*.json"])
    with pytest.raises(DataError, match="no data was named"):
        find_files([])
