"""Documents: every source reads, and whatever cannot be used is counted and named."""

import ast
import gzip
import json
import random

import pytest
from datasets import Dataset, Features, Image, IterableDataset, Value

from anchor_attn.train import read_documents
from anchor_attn.train.documents import text_fault, tokens_fault
from anchor_attn.train.embedded import read_stdlib, read_stdlib_files
from anchor_attn.train.items import Found, Skipped


@pytest.fixture(scope="module")
def stdlib():
    return read_documents()


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def texts(documents):
    return [row["text"] for row in documents]


def names(documents):
    return [row["name"] for row in documents]


# The embedded corpus


def test_the_standard_library_gives_functions_and_classes_of_200_to_2000_bytes(stdlib):
    assert len(stdlib) > 2_000
    assert all(200 <= len(text.encode()) <= 2_000 for text in texts(stdlib))
    assert len(set(texts(stdlib))) == len(stdlib)
    for row in random.Random(0).sample(list(stdlib), 50):
        (node,) = ast.parse(row["text"]).body
        assert row["name"] == f"{row['file']}:{node.name}"


def test_the_standard_library_is_read_in_the_order_of_its_paths_without_site_packages(stdlib):
    files = [row["file"] for row in stdlib]
    assert files == sorted(files)
    assert "argparse.py" in files
    assert not any("site-packages" in file or "dist-packages" in file for file in files)


def test_meta_of_the_standard_library_names_python_the_hash_and_what_was_left_out(stdlib):
    import platform

    assert stdlib.meta == json.loads(json.dumps(stdlib.meta))
    assert stdlib.meta["python_version"] == platform.python_version()
    assert len(stdlib.meta["corpus_hash"]) == 16
    assert {"shorter than 200 bytes", "longer than 2000 bytes", "duplicates"} <= stdlib.meta["skipped"].keys()
    assert sum(stdlib.meta["skipped"].values()) == len(stdlib.skipped)


def test_the_standard_library_splits_by_file(stdlib):
    train, held_out = stdlib.split_by_file(0.1)
    sides = [{row["file"] for row in side} for side in (train, held_out)]
    assert sides[0].isdisjoint(sides[1])
    assert len(train) + len(held_out) == len(stdlib)
    assert 0.03 < len(held_out) / len(stdlib) < 0.2
    assert len({train.corpus_hash, held_out.corpus_hash, stdlib.corpus_hash}) == 3


FUNCTION = "@cache\ndef {name}():\n    return '" + "é" * 100 + "'\n"


def test_every_top_level_definition_is_read_or_skipped_with_its_reason(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "c.py").write_text(FUNCTION.format(name="never"))
    (tmp_path / "b" / "z.py").write_text(FUNCTION.format(name="again") + "\f\nx = 1\n\n" + FUNCTION.format(name="last"))
    (tmp_path / "b.py").write_text("def short(): pass\n\nclass Long:\n    " + "x = 1; " * 400 + "\n")
    (tmp_path / "a.py").write_bytes(FUNCTION.format(name="again").replace("\n", "\r\n").encode())
    (tmp_path / "bad.py").write_text("def :\n")
    (tmp_path / "raw.py").write_bytes(b"x = '\xff'\n")
    assert list(read_stdlib(tmp_path)) == [
        Found("a.py:again", "a.py", FUNCTION.format(name="again")),
        Skipped("b.py:short", "shorter than 200 bytes"),
        Skipped("b.py:Long", "longer than 2000 bytes"),
        Skipped("b/z.py:again", "duplicates"),
        Found("b/z.py:last", "b/z.py", FUNCTION.format(name="last")),
        Skipped("bad.py", "files that do not parse"),
        Skipped("raw.py", "files that do not decode"),
    ]


def test_whole_files_of_the_standard_library_keep_what_stands_between_definitions(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "raw.py").write_bytes(b"x = '\xff'\n")
    assert list(read_stdlib_files(tmp_path)) == [
        Found("a.py", "a.py", "x = 1\n"),
        Skipped("raw.py", "files that do not decode"),
    ]


def test_stdlib_files_reads_and_skips_empty_ones():
    documents = read_documents("stdlib-files", limit=300)
    assert len(documents) == 300
    assert documents.python_version
    assert set(documents.skipped_by_reason) <= {"empty text", "files that do not decode"}
    assert documents.skipped_by_reason["empty text"] > 0


# Rows: JSON Lines, Parquet, the hub


def test_a_malformed_line_costs_itself_only(tmp_path):
    path = write_lines(
        tmp_path / "data[1].jsonl",  # brackets are wildcards to datasets
        b'\xef\xbb\xbf{"text": "first"}',
        b'{"text": "cut',
        b"",
        b'{"text": "\xff"}',
        {"text": None},
        {"text": " \n"},
        {"text": 7},
        {"body": "elsewhere"},
        b"[1, 2]",
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "line \xe2\x80\xa8 separator \xc2\x85"}\r',
    )
    documents = read_documents(path)
    assert texts(documents) == ["first", "line \u2028 separator \x85"]
    assert names(documents) == ["data[1].jsonl:1", "data[1].jsonl:12"]
    assert {(skipped.name.split(":")[1], skipped.reason) for skipped in documents.skipped} == {
        ("2", "not JSON"),
        ("4", "not UTF-8"),
        ("5", "no text"),
        ("6", "empty text"),
        ("7", "text is a int, not a string"),
        ("8", "no input_ids"),
        ("9", "not a JSON object"),
        ("10", "text holds half a surrogate pair"),
        ("11", "not JSON"),
    }


def test_json_lines_may_be_compressed_and_name_their_text_column(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"body": "a", "text": "b"}\n{"body": "c"}\n'))
    assert texts(read_documents(path, text_column="body")) == ["a", "c"]


def test_token_ids_are_taken_where_there_is_no_text(tmp_path):
    rows = [[1, 2, 3], [], [1, -1], [1.5], [True], "12", None, [2**31], [2**31 - 1]]
    documents = read_documents(write_lines(tmp_path / "tokens.jsonl", *({"input_ids": row} for row in rows)))
    assert [row["input_ids"] for row in documents] == [[1, 2, 3], [2**31 - 1]]
    assert [skipped.reason for skipped in documents.skipped] == [
        "empty input_ids",
        "negative token id",
        "input_ids holds other things than integers",
        "input_ids holds other things than integers",
        "input_ids is a str, not a list",
        "no input_ids",
        "token id above int32",
    ]


def test_text_wins_over_token_ids_whichever_comes_first(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"input_ids": [1]}, {"text": "x", "input_ids": [2]}, {"text": "y"})
    documents = read_documents(path)
    assert texts(documents) == ["x", "y"]
    assert documents.skipped == (Skipped("a.jsonl:1", "no text, only input_ids"),)


def test_parquet_reads_the_named_column_and_skips_its_nulls(tmp_path):
    path = str(tmp_path / "data.parquet")
    Dataset.from_dict({"id": [1, 2, 3], "body": ["a", None, "c"]}).to_parquet(path)
    documents = read_documents(path, text_column="body")
    assert (texts(documents), names(documents)) == (["a", "c"], ["data.parquet:1", "data.parquet:3"])
    assert documents.skipped == (Skipped("data.parquet:2", "no text"),)


def test_parquet_reads_token_ids(tmp_path):
    path = str(tmp_path / "data.parquet")
    Dataset.from_dict({"input_ids": [[1, 2], [3]]}).to_parquet(path)
    assert [row["input_ids"] for row in read_documents(path)] == [[1, 2], [3]]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_with_neither_column_raise_with_the_columns_there_are(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_lines(path, {"id": 1, "body": "a"})
    else:
        Dataset.from_dict({"id": [1], "body": ["a"]}).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"text_column must name a column .* got 'text' for .*\['body', 'id'\]"):
        read_documents(path)


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing more"], ids=["empty", "corrupt"])
def test_a_corrupt_parquet_file_is_one_clear_line(tmp_path, content, capfd):
    (tmp_path / "bad.parquet").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"source must be readable to its end, got 'bad.parquet' \(ArrowInvalid: "
    ) as bad:
        read_documents(tmp_path / "bad.parquet")
    assert "\n" not in str(bad.value)
    assert capfd.readouterr().err == ""


def test_a_corrupt_file_of_rows_is_not_passed_over_in_a_folder(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"text": "good"})
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "lost"}\n' * 9)[:-12])
    with pytest.raises(ValueError, match=r"source must be readable to its end, got 'b.jsonl.gz' \(EOFError"):
        read_documents(tmp_path)


def test_a_hub_dataset_is_streamed_with_only_the_columns_that_are_needed(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        broken = {"bytes": b"no picture", "path": None}
        return IterableDataset.from_generator(
            lambda: iter({"body": body, "image": broken} for body in ["a", "", "c"]),
            features=Features({"body": Value("string"), "image": Image()}),
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    documents = read_documents("owner/name-v1.5", text_column="body", split="validation", subset="en", limit=2)
    assert asked == [(("owner/name-v1.5", "en"), {"split": "validation", "streaming": True})]
    assert (texts(documents), names(documents)) == (["a", "c"], ["owner/name-v1.5:1", "owner/name-v1.5:3"])
    assert documents.skipped == (Skipped("owner/name-v1.5:2", "empty text"),)


def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub.\nMax retries exceeded")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = r"source must be a path or a dataset .* got 'owner/name' \(ConnectionError: Couldn't reach .* network\.$"
    with pytest.raises(ValueError, match=message) as failed:
        read_documents("owner/name")
    assert "\n" not in str(failed.value)


def test_files_are_read_without_a_word_to_the_network(tmp_path, monkeypatch):
    write_lines(tmp_path / "a.jsonl", {"text": "a"})
    Dataset.from_dict({"text": ["b"]}).to_parquet(str(tmp_path / "b.parquet"))
    monkeypatch.setattr("socket.getaddrinfo", None)
    monkeypatch.setattr("datasets.load_dataset", None)  # it swallows the failure of the request that it makes
    assert texts(read_documents(tmp_path)) == ["a", "b"]


# Text files and folders


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path):
    (tmp_path / "a.md").write_bytes("\ufeffé\r\nb\rc\n".encode())
    documents = read_documents(str(tmp_path / "a.md"))
    assert (texts(documents), names(documents)) == (["é\nb\nc\n"], ["a.md"])


def test_a_folder_is_read_recursively_in_the_order_of_its_paths(tmp_path):
    for name in ["b.txt", "a/z.py", "a/b/c", "B.txt", ".hidden", ".git/config"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    documents = read_documents(tmp_path)
    assert texts(documents) == names(documents) == ["B.txt", "a/b/c", "a/z.py", "b.txt"]
    assert documents.skipped == (
        Skipped("empty.txt", "empty text"),
        Skipped("gone.txt", "not a regular file"),
        Skipped("latin.txt", "not UTF-8"),
    )


def test_a_broken_text_file_does_not_drop_its_neighbours(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "b.txt").write_text("good")
    documents = read_documents(tmp_path)
    assert texts(documents) == ["good"]
    assert documents.skipped == (Skipped("a.txt.gz", "file that cannot be read, BadGzipFile"),)


def test_a_folder_of_rows_skips_the_readme_beside_them(tmp_path):
    write_lines(tmp_path / "b.jsonl", {"text": "b"})
    Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "README.md").write_text("about")
    documents = read_documents(tmp_path)
    assert (texts(documents), names(documents)) == (["a", "b"], ["a.parquet:1", "b.jsonl:1"])
    assert documents.skipped == (Skipped("README.md", "text file in a folder of rows"),)


def test_nothing_left_raises_with_the_first_reasons(tmp_path):
    for name in "abcd":
        (tmp_path / name).touch()
    message = r"at least one document, got none in .* \(4 skipped: a: empty text, b: empty text, c: empty text, …\); "
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)


def test_an_empty_folder_and_an_empty_file_raise(tmp_path):
    with pytest.raises(ValueError, match=r"source must hold at least one document, got none in '[^(]*; name another"):
        read_documents(tmp_path)
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(ValueError, match="source must hold at least one document, got none in"):
        read_documents(tmp_path / "data.jsonl")


@pytest.mark.parametrize("source", ["missing.jsonl", "owner/data.parquet", "some/deep/folder", "/no/where", "", "./x"])
def test_a_missing_path_is_not_looked_up_on_the_hub(source, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", None)  # a call would raise TypeError
    with pytest.raises(FileNotFoundError, match=f"got '{source}', which does not exist; check the path"):
        read_documents(source)


# Documents


def test_limit_stops_reading_at_so_many_documents(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "a"}, {"text": "b"}, {"text": "c"})
    documents = read_documents(path, limit=2)
    assert (texts(documents), len(documents.skipped)) == (["a", "b"], 1)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_documents(path, limit=0)


def test_token_ids_that_give_way_to_text_do_not_count_towards_the_limit(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "a"}, {"input_ids": [1]}, {"input_ids": [2]}, {"text": "b"})
    assert texts(read_documents(path, limit=2)) == ["a", "b"]


def test_the_corpus_hash_follows_names_contents_and_order(tmp_path):
    def corpus_hash(*files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files:
            (folder / name).write_text(text)
        return read_documents(folder).corpus_hash

    same = corpus_hash(("a", "x"), ("b", "y"))
    assert same == corpus_hash(("b", "y"), ("a", "x"))  # the order of writing is nothing
    different = [corpus_hash(("a", "x"), ("b", "z")), corpus_hash(("a", "x"), ("c", "y")), corpus_hash(("a", "xby"))]
    assert len({same, *different}) == 4


def test_a_single_file_of_rows_is_split_by_document(tmp_path):
    documents = read_documents(write_lines(tmp_path / "a.jsonl", *({"text": str(row)} for row in range(200))))
    train, held_out = documents.split_by_file(0.2)
    assert sorted(texts(train) + texts(held_out), key=int) == texts(documents)
    assert 20 <= len(held_out) <= 60


def test_a_new_file_moves_no_other_to_the_other_side(tmp_path):
    def held_out_files(count):
        for index in range(count):
            (tmp_path / f"{index}.txt").write_text("text")
        return set(names(read_documents(tmp_path).split_by_file(0.3)[1]))

    few, many = held_out_files(30), held_out_files(60)
    assert few == {name for name in many if int(name.split(".")[0]) < 30}


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(tmp_path, share):
    for name in "ab":
        (tmp_path / name).write_text(name)
    train, held_out = read_documents(tmp_path).split_by_file(share)
    assert (len(train), len(held_out)) == (1, 1)


def test_a_split_that_cannot_be_made_raises(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    documents = read_documents(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="documents must be at least two to be split, got 1"):
        documents.split_by_file()
    with pytest.raises(ValueError, match="held_out_share must lie between 0 and 1, got 1"):
        documents.split_by_file(1)


def test_faults_are_none_for_good_content():
    assert text_fault("x") is None
    assert tokens_fault([0, 1]) is None


def test_documents_say_in_one_line_what_they_are(stdlib):
    assert repr(stdlib) == (
        f"Documents(source='stdlib', documents={len(stdlib)}, skipped={len(stdlib.skipped)}, "
        f"corpus_hash='{stdlib.corpus_hash}')"
    )
