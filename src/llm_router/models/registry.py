"""The models folder: which model files there are, and the only way from a name to a file.

A model is a file `NAME.gguf` directly in the folder. Whoever comes over HTTP says a name; paths, URLs and
symbolic links that lead out of the folder are refused here. The operator's own configuration may point
anywhere: `locate`. Not for: getting files into the folder (pull.py), or running them (launch.py).
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Final

import msgspec

from llm_router.errors import BadModelFile, InvalidRequest, ModelNotFound
from llm_router.families import SIZE_CATEGORIES
from llm_router.models.gguf import Header, read_header

FORMAT: Final = "gguf"
SUFFIX: Final = ".gguf"

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
"""What `make serve` runs: the smallest model that chats."""

MOST_FILES: Final = 1000
"""Files that are looked at; more than any folder of models has."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SIZE_BOUNDS: Final = (1_000_000_000, 10_000_000_000, 50_000_000_000)


def size_category(size_bytes: int) -> str:
    """The value of the label `size_category` for a model file: small below 1 GB, medium 10, large 50, else xlarge."""
    position = sum(size_bytes >= bound for bound in _SIZE_BOUNDS)
    return SIZE_CATEGORIES[position]


def is_name(text: str) -> bool:
    """Whether `text` can name a model file: letters, digits, `.`, `_` and `-`, at most 128, no path."""
    return _NAME.fullmatch(text) is not None


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the models folder. `header` is None if it is no usable model; `problem` then says why."""

    name: str
    path: str
    size_bytes: int
    size_category: str
    modified_time: float
    header: Header | None = None
    problem: str = ""


class ModelsFolder:
    """The files of one folder. Headers are read once per version of a file. Not shared between threads.

    Every method blocks on the disk: call it in a thread from an event loop.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._seen: dict[str, tuple[tuple[int, int, int], ModelFile]] = {}

    def names(self) -> list[str]:
        """The names of all model files, good or bad, sorted; none if there is no such folder."""
        try:
            files = [file for file in os.listdir(self.folder) if file.endswith(SUFFIX)]
        except OSError:
            return []
        names = (file.removesuffix(SUFFIX) for file in files)
        return sorted(name for name in names if is_name(name))[:MOST_FILES]

    def list(self) -> list[ModelFile]:
        """All model files, by name. Those that cannot be used are there too, with what is wrong."""
        found = [file for name in self.names() if (file := self._look(name)) is not None]
        self._seen = {file.name: self._seen[file.name] for file in found}
        return found

    def get(self, name: str) -> ModelFile:
        """The model file of that name, whole and usable.

        Raises InvalidRequest for what is no plain name, ModelNotFound, BadModelFile.
        """
        file = self._look(name := self._plain(name))
        if file is None:
            raise self._not_found(name)
        if file.header is None:
            raise BadModelFile(file.problem)
        return file

    def resolve(self, name: str) -> Path:
        """The path behind a name that came over HTTP. The file is there, but may be bad.

        Raises InvalidRequest for what is no plain name or leads out of the folder, ModelNotFound.
        """
        path = self.folder / (self._plain(name) + SUFFIX)
        if not path.exists():
            raise self._not_found(name)
        return self._inside(name, path)

    def locate(self, source: str) -> Path:
        """The path that the operator means: a file if `source` has a slash or the suffix and exists, else a name.

        Raises as `resolve`; BadModelFile for a path to nothing.
        """
        path = Path(source).expanduser()
        if "/" in source or os.sep in source:
            if not path.exists():
                raise BadModelFile(f"{path}: there is no such file")
            return path
        if source.endswith(SUFFIX) and path.exists():
            return path
        return self.resolve(source)

    def _plain(self, name: str) -> str:
        plain = name.removesuffix(SUFFIX)
        if not is_name(plain):
            shown = name if len(name) <= 80 else name[:80] + "..."
            raise InvalidRequest(
                f"{shown!r} is not the name of a model file; give a name out of the models folder, no path or URL "
                "(the operator gets other files there with `llm-router models pull`)",
                param="model",
            )
        return plain

    def _inside(self, name: str, path: Path) -> Path:
        real = path.resolve()
        if real.parent != self.folder.resolve():
            raise InvalidRequest(f"model {name!r} is a link that leads out of the models folder", param="model")
        return real

    def _look(self, name: str) -> ModelFile | None:
        path = self.folder / (name + SUFFIX)
        try:
            status = path.stat()
        except OSError:
            return None
        version = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._seen.get(name)
        if known is not None and known[0] == version:
            return known[1]
        header, problem = None, ""
        try:
            header = read_header(self._inside(name, path))
        except (BadModelFile, InvalidRequest) as error:
            problem = str(error)
        file = ModelFile(
            name=name,
            path=str(path),
            size_bytes=status.st_size,
            size_category=size_category(status.st_size),
            modified_time=status.st_mtime,
            header=header,
            problem=problem,
        )
        self._seen[name] = (version, file)
        return file

    def _not_found(self, name: str) -> ModelNotFound:
        there = self.names()
        close = difflib.get_close_matches(name, there, n=3)
        if close:
            hint = f"did you mean {', '.join(close)}?"
        elif there:
            hint = f"there are: {', '.join(there[:10])}"
        else:
            hint = f"the folder is empty; `llm-router models pull {DEFAULT_MODEL}` gets the default model"
        return ModelNotFound(f"there is no model file {name!r} in {self.folder}; {hint}")

    def __repr__(self) -> str:
        return f"ModelsFolder({str(self.folder)!r}, {len(self.names())} models)"
