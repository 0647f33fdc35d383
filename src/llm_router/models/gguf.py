"""Reads the header of a GGUF model file: what the model is, and whether the file is whole.

    magic "GGUF" | version u32 | tensor count u64 | pair count u64
    pairs:   key string | type u32 | value            (string = length u64 + UTF-8; array = type u32 + count u64 + items)
    tensors: name string | dimensions u32 | sizes u64 each | type u32 | offset u64
    padding to general.alignment, then the tensors' bytes at their offsets

All numbers are little-endian. Nothing beyond the header is read, and every count and length in it is
bounded, so that a hostile file costs little time and memory. Not for: tensor values, or loading (runner).
Source: the GGUF specification in the ggml repository, docs/gguf.md.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from typing import Any, Final, NoReturn

import msgspec

from llm_router.errors import BadModelFile

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
"""Version 1 had 32-bit counts and was written for some weeks of 2023 only."""

MOST_TENSORS: Final = 65_536
MOST_PAIRS: Final = 65_536
MOST_ITEMS: Final = 8_388_608
"""Items of one array. The largest vocabularies have 262,144 tokens and about as many merges."""

LONGEST_NAME_BYTES: Final = 65_535
"""Of a key or tensor name; the specification's bound."""

LONGEST_TEXT_BYTES: Final = 1 << 20
"""Of a value that we keep (names, chat templates: some 10 KiB)."""

LONGEST_HEADER_BYTES: Final = 64 << 20
"""Of the whole header. 262,144 tokens with scores, types and as many merges take about 16 MB."""

_MOST_DIMENSIONS: Final = 4
_MOST_ELEMENTS: Final = 1 << 62
_READ_BYTES: Final = 1 << 18

_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9

_BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""Tensor type to (elements, bytes) of a block, as in ggml's type table. Types that are not here are newer
than this table: their tensors count as empty, so that a new format is never taken for a truncated file."""

_FILE_TYPES: Final = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K",
    19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL",
    26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0",
    37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0",
}  # fmt: skip

_OTHER_FORMATS: Final = (
    (b"PK\x03\x04", "a ZIP archive (a PyTorch checkpoint, or a wheel)"),
    (b"\x1f\x8b", "gzip data: unpack it first"),
    (b"\x80\x02", "a pickle (an old PyTorch checkpoint)"),
    (b"version https://git-lfs", "a Git LFS pointer: the model itself was not fetched (git lfs pull)"),
    (b"lmgg", "a GGML file of before August 2023"),
    (b"tjgg", "a GGJT file of before August 2023"),
    (b"fmgg", "a GGMF file of before August 2023"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x08\x00\x00\x00TFL3", "a TensorFlow Lite model"),
)

_WAY_OUT: Final = "download it again, or take another file"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the header of a whole, loadable GGUF file says.

    Args:
        architecture: llama.cpp's word for the kind of model, like `llama`.
        title: the model's own name; "" if it has none.
        parameters: weights, counted from the tensors.
        context_length: tokens it was trained for; 0 if unknown.
        quantisation: like `Q4_1`; "" if unknown.
        chat_template: Jinja source; "" if it has none (then it completes text, but cannot chat well).
        has_pooling: whether the file says how to pool embeddings: it is an embedding model.
        cache_bytes_per_token: of a key-value cache in 16 bits; 0 if unknown.
        header_bytes: where the tensors begin.
        promised_bytes: how long the file must be for all tensors to be there.
        size_bytes: how long it is.
    """

    version: int
    architecture: str
    title: str
    parameters: int
    context_length: int
    quantisation: str
    chat_template: str
    has_pooling: bool
    cache_bytes_per_token: int
    tensors: int
    header_bytes: int
    promised_bytes: int
    size_bytes: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file, after checking that it is a GGUF file and long enough for its tensors.

    Blocks: call it in a thread from an event loop (20 ms for a vocabulary of 49,152 tokens).
    Raises BadModelFile naming the file, what is wrong and the way out.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer. It changes nothing for regular files.
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadModelFile(f"{name}: cannot be opened: {reason}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise BadModelFile(f"{name}: is a {'folder' if stat.S_ISDIR(status.st_mode) else 'device'}, not a file")
    with open(fd, "rb", buffering=0) as file:
        try:
            return _Parser(name, file, status.st_size).header()
        except OSError as error:
            raise BadModelFile(f"{name}: cannot be read: {error.strerror or error}") from error


class _Parser:
    """Goes once through a header. Holds at most the block that is being looked at."""

    def __init__(self, name: str, file: io.FileIO, size_bytes: int) -> None:
        self._name = name
        self._file = file
        self._size = size_bytes
        self._buffer = b""
        self._at = 0  # position in the buffer
        self._base = 0  # position of the buffer in the file

    def header(self) -> Header:
        version, tensor_count, pair_count = self._opening()
        pairs = self._pairs(pair_count)
        parameters, tensor_bytes = self._tensors(tensor_count, alignment := self._alignment(pairs))
        header_bytes = -(-self._position // alignment) * alignment
        promised = header_bytes + tensor_bytes
        if self._size < promised:
            self._fail(
                f"is {self._size:,} bytes, its header promises {promised:,}: truncated or still downloading; {_WAY_OUT}"
            )
        if (parts := pairs.get("split.count", 0)) and isinstance(parts, int) and parts > 1:
            self._fail(f"is one of {parts} parts of a model; join them first with llama-gguf-split --merge")
        architecture = _text(pairs, "general.architecture")
        if not architecture:
            self._fail("does not say which architecture the model has (general.architecture): not a language model")
        return Header(
            version=version,
            architecture=architecture,
            title=_text(pairs, "general.name"),
            parameters=parameters,
            context_length=_count(pairs, f"{architecture}.context_length"),
            quantisation=_FILE_TYPES.get(_count(pairs, "general.file_type", -1), ""),
            chat_template=_text(pairs, "tokenizer.chat_template"),
            has_pooling=_count(pairs, f"{architecture}.pooling_type") > 0,
            cache_bytes_per_token=_cache_bytes_per_token(pairs, architecture),
            tensors=tensor_count,
            header_bytes=header_bytes,
            promised_bytes=promised,
            size_bytes=self._size,
        )

    def _opening(self) -> tuple[int, int, int]:
        self._more(32)
        start = self._buffer[:32]
        if not start:
            self._fail(f"is empty; {_WAY_OUT}")
        if not start.startswith(MAGIC):
            if MAGIC.startswith(start):
                self._fail(f"is {self._size} bytes long: truncated or still downloading; {_WAY_OUT}")
            self._fail(f"starts with {start[:4]!r}: {_format_of(start)}, not a GGUF model; {_WAY_OUT}")
        self._at = len(MAGIC)
        version: int = self._number("I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                self._fail("is a GGUF file for big-endian machines; take the little-endian one")
            self._fail(f"is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
        tensor_count: int = self._number("Q")
        pair_count: int = self._number("Q")
        if tensor_count > MOST_TENSORS:
            self._fail(f"claims {tensor_count:,} tensors (at most {MOST_TENSORS:,}): corrupt; {_WAY_OUT}")
        if pair_count > MOST_PAIRS:
            self._fail(f"claims {pair_count:,} metadata entries (at most {MOST_PAIRS:,}): corrupt; {_WAY_OUT}")
        if tensor_count == 0:
            self._fail("has no tensors: only a vocabulary, not a model")
        return version, tensor_count, pair_count

    def _pairs(self, count: int) -> dict[str, Any]:
        """All scalar values and texts by key; an array of whole numbers as its greatest, other arrays as None."""
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = self._string(LONGEST_NAME_BYTES, "a metadata key")
            if key in pairs:
                self._fail(f"has the metadata entry {_show(key)} twice: corrupt; {_WAY_OUT}")
            pairs[key] = self._value(key, self._number("I"))
        return pairs

    def _value(self, key: str, kind: int) -> Any:
        if number := _NUMBERS.get(kind):
            return self._number(number)
        if kind == _STRING:
            return self._string(LONGEST_TEXT_BYTES, f"the value of {_show(key)}")
        if kind != _ARRAY:
            self._fail(f"has a value of unknown type {kind} at {_show(key)}: corrupt, or newer than this program")
        item: int = self._number("I")
        count: int = self._number("Q")
        if count > MOST_ITEMS:
            self._fail(f"has an array of {count:,} at {_show(key)} (at most {MOST_ITEMS:,}): corrupt; {_WAY_OUT}")
        if number := _NUMBERS.get(item):
            width = struct.calcsize("<" + number)
            # Short arrays of whole numbers are sizes per layer; the greatest is the safe estimate.
            if number in "BbHhIiQq" and 0 < count <= MOST_TENSORS:
                self._need(count * width)
                values = struct.unpack_from(f"<{count}{number}", self._buffer, self._at)
                self._at += count * width
                return max(values)
            self._skip(count * width)
        elif item == _STRING:
            self._skip_strings(count)
        else:
            self._fail(f"has an array of type {item} at {_show(key)}: corrupt, or newer than this program")
        return None

    def _tensors(self, count: int, alignment: int) -> tuple[int, int]:
        """Weights in all tensors, and the bytes from the first to behind the last."""
        parameters = end = 0
        for _ in range(count):
            name = self._string(LONGEST_NAME_BYTES, "a tensor's name")
            dimensions: int = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                self._fail(f"has a tensor {_show(name)} of {dimensions:,} dimensions: corrupt; {_WAY_OUT}")
            sizes = [self._number("Q") for _ in range(dimensions)]
            elements = math.prod(sizes)
            if not 0 < elements < _MOST_ELEMENTS:
                self._fail(f"has a tensor {_show(name)} of {elements:,} elements: corrupt; {_WAY_OUT}")
            block_elements, block_bytes = _BLOCKS.get(self._number("I"), (1, 0))
            offset: int = self._number("Q")
            if offset % alignment:
                self._fail(f"has a tensor {_show(name)} at {offset:,}, no multiple of {alignment}: corrupt; {_WAY_OUT}")
            if (sizes[0] if sizes else 1) % block_elements:
                self._fail(f"has a tensor {_show(name)} with rows that are no whole blocks: corrupt; {_WAY_OUT}")
            parameters += elements
            end = max(end, offset + elements // block_elements * block_bytes)
        return parameters, end

    def _alignment(self, pairs: dict[str, Any]) -> int:
        alignment = pairs.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            self._fail(f"has the alignment {alignment!r}, no power of two: corrupt; {_WAY_OUT}")
        return alignment

    # -- bytes ------------------------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        return self._base + self._at

    def _more(self, count: int) -> int:
        """Have `count` bytes in the buffer, fewer only at the end of the file. Returns how many there are."""
        if len(self._buffer) - self._at < count:
            self._base += self._at
            self._buffer, self._at = self._buffer[self._at :], 0
            while len(self._buffer) < count and (data := self._file.read(max(_READ_BYTES, count - len(self._buffer)))):
                self._buffer += data
        return len(self._buffer) - self._at

    def _need(self, count: int) -> None:
        """Have `count` bytes in the buffer. The length of the file is asked first: no claim of a header reads more."""
        if self._position + count > LONGEST_HEADER_BYTES:
            self._fail(f"has a header of more than {LONGEST_HEADER_BYTES:,} bytes: corrupt; {_WAY_OUT}")
        if self._position + count > self._size or self._more(count) < count:
            self._fail(
                f"is {self._size:,} bytes and ends inside its header: truncated or still downloading; {_WAY_OUT}"
            )

    def _number(self, format: str) -> Any:
        format = "<" + format
        width = struct.calcsize(format)
        if len(self._buffer) - self._at < width:
            self._need(width)
        (value,) = struct.unpack_from(format, self._buffer, self._at)
        self._at += width
        return value

    def _string(self, longest: int, what: str) -> str:
        length: int = self._number("Q")
        if length > longest:
            self._fail(f"claims {length:,} bytes for {what} (at most {longest:,}): corrupt; {_WAY_OUT}")
        self._need(length)
        data = self._buffer[self._at : self._at + length]
        self._at += length
        return data.decode("utf-8", "replace")

    def _skip(self, count: int) -> None:
        if self._at + count <= len(self._buffer):
            self._at += count
            return
        if self._position + count > min(self._size, LONGEST_HEADER_BYTES):
            self._need(count)  # says what is wrong
        self._base, self._at, self._buffer = self._position + count, 0, b""
        self._file.seek(self._base)

    def _skip_strings(self, count: int) -> None:
        """Pass over a vocabulary: the one place with many items, so the common case is a tight loop."""
        unpack = struct.Struct("<Q").unpack_from
        while count:
            buffer, at, end = self._buffer, self._at, len(self._buffer) - 8
            while count and at <= end:
                following = at + 8 + unpack(buffer, at)[0]
                if following > end + 8:
                    break
                at = following
                count -= 1
            self._at = at
            if count:
                self._skip(self._number("Q"))
                count -= 1

    def _fail(self, problem: str) -> NoReturn:
        raise BadModelFile(f"{self._name}: {problem}")


def _format_of(start: bytes) -> str:
    for opening, name in _OTHER_FORMATS:
        if start.startswith(opening):
            return name
    if start[8:10] == b'{"':
        return "a safetensors file: look for a GGUF conversion of the model"
    if start.lstrip()[:1] == b"<":
        return "an HTML or XML page: the download was answered by a web page"
    if start.lstrip()[:1] in (b"{", b"["):
        return "JSON text"
    return "text" if start.isascii() and b"\0" not in start else "something else"


def _show(text: str) -> str:
    """A name out of a file, short and without control characters."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def _text(pairs: dict[str, Any], key: str) -> str:
    value = pairs.get(key)
    return value if isinstance(value, str) else ""


def _count(pairs: dict[str, Any], key: str, default: int = 0) -> int:
    value = pairs.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else default


def _cache_bytes_per_token(pairs: dict[str, Any], architecture: str) -> int:
    """Bytes that a token takes in the key-value cache: 2 bytes a number, keys and values of all layers.

    Models with sliding windows or without attention in some layers need less: an upper estimate.
    """
    layers = _count(pairs, f"{architecture}.block_count")
    heads = _count(pairs, f"{architecture}.attention.head_count")
    width = _count(pairs, f"{architecture}.embedding_length")
    if not (layers and heads and width):
        return 0
    cached_heads = _count(pairs, f"{architecture}.attention.head_count_kv", heads)
    key_length = _count(pairs, f"{architecture}.attention.key_length", width // heads)
    value_length = _count(pairs, f"{architecture}.attention.value_length", width // heads)
    return 2 * layers * cached_heads * (key_length + value_length)
