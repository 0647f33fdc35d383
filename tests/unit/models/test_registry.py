"""The models folder: names in, files out, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_router.errors import BadModelFile, InvalidRequest, ModelNotFound
from llm_router.models.registry import ModelsFolder, is_name, size_category
from support.gguf import model


@pytest.fixture
def folder(tmp_path: Path) -> ModelsFolder:
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny.gguf").write_bytes(model())
    (models / "broken.gguf").write_bytes(model()[:-1])
    (models / "notes.txt").write_text("not a model")
    (models / ".pull-1-x").mkdir()
    return ModelsFolder(models)


def test_list_shows_good_and_bad_files(folder: ModelsFolder) -> None:
    """A bad file is not hidden: it is listed with what is wrong."""
    broken, tiny = folder.list()
    assert (tiny.name, tiny.problem, tiny.size_category) == ("tiny", "", "small")
    assert tiny.header is not None and tiny.header.quantisation == "Q4_1"
    assert (broken.name, broken.header) == ("broken", None)
    assert "truncated" in broken.problem


def test_a_changed_file_is_read_again(folder: ModelsFolder) -> None:
    """A header is kept only as long as the file is the same."""
    assert folder.list()[0].header is None
    (folder.folder / "broken.gguf").write_bytes(model())
    assert folder.list()[0].header is not None


def test_no_folder_is_an_empty_folder(tmp_path: Path) -> None:
    """Before the first pull there is nothing, and no error."""
    folder = ModelsFolder(tmp_path / "none")
    assert folder.list() == []
    with pytest.raises(ModelNotFound, match="models pull smollm2-135m-instruct"):
        folder.resolve("x")


def test_names_resolve_with_and_without_suffix(folder: ModelsFolder) -> None:
    """Both ways to say a file's name mean the file."""
    assert folder.resolve("tiny") == folder.resolve("tiny.gguf") == folder.folder / "tiny.gguf"
    assert folder.get("tiny").name == "tiny"


@pytest.mark.parametrize(
    "name",
    [
        "../models/tiny", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "https://example.com/x.gguf", "hf:a/b/c.gguf",
        "tiny\0", "tiny\n", "a\\b", "~", "x" * 129, "~root", "file:///x", "C:tiny", "tiny.gguf/", "ti%2fny", "naïve",
    ],
)  # fmt: skip
def test_only_plain_names_are_accepted(folder: ModelsFolder, name: str) -> None:
    """Over HTTP there are no paths, URLs or tricks."""
    with pytest.raises(InvalidRequest, match="not the name of a model file"):
        folder.resolve(name)
    with pytest.raises(InvalidRequest):
        folder.get(name)


def test_links_out_of_the_folder_are_refused(folder: ModelsFolder, tmp_path: Path) -> None:
    """A symbolic link may rename a file inside the folder, not lead out of it."""
    (tmp_path / "outside.gguf").write_bytes(model())
    os.symlink(tmp_path / "outside.gguf", folder.folder / "escape.gguf")
    os.symlink("tiny.gguf", folder.folder / "alias.gguf")
    with pytest.raises(InvalidRequest, match="leads out of the models folder"):
        folder.resolve("escape")
    assert "leads out" in {file.name: file for file in folder.list()}["escape"].problem
    assert folder.resolve("alias").name == "tiny.gguf"


def test_unknown_names_get_suggestions(folder: ModelsFolder) -> None:
    """A typing mistake is answered with the name that was meant."""
    with pytest.raises(ModelNotFound, match=r"did you mean tiny\?"):
        folder.get("tinny")
    with pytest.raises(ModelNotFound, match="there are: broken, tiny"):
        folder.get("zzz")


def test_get_refuses_a_bad_file(folder: ModelsFolder) -> None:
    """What cannot be loaded is refused before anything is started."""
    with pytest.raises(BadModelFile, match="truncated"):
        folder.get("broken")


def test_the_operator_may_point_anywhere(folder: ModelsFolder, tmp_path: Path) -> None:
    """Configuration may name a file of the folder or any path."""
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(model())
    assert folder.locate(str(outside)) == outside
    assert folder.locate("tiny") == folder.folder / "tiny.gguf"
    with pytest.raises(BadModelFile, match="no such file"):
        folder.locate(str(tmp_path / "missing.gguf"))


@pytest.mark.parametrize(
    ("size", "category"),
    [
        (0, "small"),
        (10**9 - 1, "small"),
        (10**9, "medium"),
        (10**10, "large"),
        (5 * 10**10, "xlarge"),
        (10**13, "xlarge"),
    ],
)
def test_size_categories(size: int, category: str) -> None:
    """The bounds of the label `size_category`."""
    assert size_category(size) == category


def test_names() -> None:
    """What a name may look like."""
    assert is_name("SmolLM2-135M-Instruct.Q4_1")
    assert not is_name("-x")
