"""Headers of model files: what is read, and that nothing a file claims does harm."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_router.errors import BadModelFile
from llm_router.models.gguf import Header, read_header
from support.gguf import PAIRS, TENSORS, model, text

ANY_PATH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(data)
    return path


def refusal(tmp_path: Path, data: bytes) -> str:
    """What is said about a file with these bytes; it always names the file first."""
    path = write(tmp_path, data)
    with pytest.raises(BadModelFile) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_header_of_a_whole_file_is_read(tmp_path: Path) -> None:
    """Everything an operator wants to know is in the record."""
    data = model()
    assert read_header(write(tmp_path, data)) == Header(
        version=3,
        architecture="llama",
        title="Tiny",
        parameters=136,
        context_length=512,
        quantisation="Q4_1",
        chat_template="{{ messages }}",
        has_pooling=False,
        cache_bytes_per_token=2 * 2 * 2 * (16 + 16),
        tensors=2,
        header_bytes=len(data) - 128,
        promised_bytes=len(data),
        size_bytes=len(data),
    )


def test_version_2_is_read_too(tmp_path: Path) -> None:
    """Versions 2 and 3 have the same layout."""
    assert read_header(write(tmp_path, model(version=2))).version == 2


def test_missing_metadata_is_unknown_and_no_error(tmp_path: Path) -> None:
    """Only the architecture is needed."""
    header = read_header(write(tmp_path, model({"general.architecture": "x"})))
    assert (header.title, header.context_length, header.quantisation, header.cache_bytes_per_token) == ("", 0, "", 0)


def test_heads_per_layer_count_as_the_greatest(tmp_path: Path) -> None:
    """Some models give a list, one a layer; memory is estimated from the greatest."""
    header = read_header(write(tmp_path, model({**PAIRS, "llama.attention.head_count_kv": [0, 2]})))
    assert header.cache_bytes_per_token == 256


def test_metadata_of_wrong_types_is_unknown(tmp_path: Path) -> None:
    """A text where a number belongs is not taken for one."""
    header = read_header(write(tmp_path, model({**PAIRS, "llama.context_length": "many", "general.name": 7})))
    assert (header.context_length, header.title) == (0, "")


def test_unknown_tensor_type_is_no_truncation(tmp_path: Path) -> None:
    """A format newer than the table is loaded, not called truncated."""
    header = read_header(write(tmp_path, model(tensors=(("a", (64,), 250, 0),), data_bytes=0)))
    assert header.parameters == 64


def test_every_truncation_is_recognised(tmp_path: Path) -> None:
    """However short, a file that misses a byte is refused as truncated or empty."""
    data = model()
    for length in range(len(data)):
        assert re.search("truncated or still downloading|is empty", refusal(tmp_path, data[:length])), length


def test_truncated_tensors_are_named_in_bytes(tmp_path: Path) -> None:
    """The message says how long the file is and how long it should be."""
    data = model()
    assert f"is {len(data) - 1:,} bytes, its header promises {len(data):,}" in refusal(tmp_path, data[:-1])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"GG", "is 2 bytes long"),
        (b"PK\x03\x04" + bytes(40), "starts with b'PK\\x03\\x04': a ZIP archive"),
        (b"<!DOCTYPE html><html>" + bytes(20), "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (struct.pack("<Q", 90) + b'{"__metadata__":{}}' + bytes(9), "a safetensors file"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"once upon a time there was a file", "text, not a GGUF model"),
        (b"\x00\xff" * 32, "something else"),
        (model(version=1), "is GGUF version 1"),
        (model(version=0x03000000), "big-endian"),
        (model(tensor_count=1 << 40), "claims 1,099,511,627,776 tensors"),
        (model(pair_count=1 << 40), "claims 1,099,511,627,776 metadata entries"),
        (model(tensors=()), "has no tensors"),
        (model({"general.name": "x"}), "does not say which architecture"),
        (model({**PAIRS, "general.alignment": 24}), "alignment 24"),
        (model({**PAIRS, "general.alignment": "no"}), "alignment 'no'"),
        (model({**PAIRS, "split.count": 3}), "one of 3 parts"),
        (model(tensors=(("a", (0,), 0, 0),)), "of 0 elements"),
        (model(tensors=(("a", (1 << 40, 1 << 40), 0, 0),)), "elements: corrupt"),
        (model(tensors=(("a", (1,) * 5, 0, 0),)), "of 5 dimensions"),
        (model(tensors=(("a", (8,), 0, 31),)), "no multiple of 32"),
        (model(tensors=(("a", (33,), 3, 0),)), "no whole blocks"),
        (model(tensors=(("a\n" * 99, (33,), 3, 0),)), "tensor 'a\\na"),
    ],
)
def test_bad_files_are_refused_with_what_was_found(tmp_path: Path, data: bytes, said: str) -> None:
    """Each kind of wrong file gets a message of its own."""
    assert said in refusal(tmp_path, data)


def opening(pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 1, pairs)


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (struct.pack("<Q", 1 << 60), "for a metadata key"),
        (text("k") + struct.pack("<IQ", 8, 1 << 60), "for the value of 'k'"),
        (text("k") + struct.pack("<I", 99), "unknown type 99"),
        (text("k") + struct.pack("<IIQ", 9, 4, 1 << 60), "has an array of"),
        (text("k") + struct.pack("<IIQ", 9, 9, 1), "array of type 9"),
        (text("k") + struct.pack("<IIQ", 9, 4, 1 << 20), "ends inside its header"),
        (text("k") + struct.pack("<IIQ", 9, 8, 1 << 20), "ends inside its header"),
        (text("k") + struct.pack("<IIQQ", 9, 8, 2, (1 << 64) - 1), "header of more than"),
        ((text("k") + struct.pack("<II", 4, 1)) * 2, "entry 'k' twice"),
    ],
)
def test_hostile_claims_are_refused(tmp_path: Path, tail: bytes, said: str) -> None:
    """No count or length is believed beyond its bound or the end of the file."""
    assert said in refusal(tmp_path, opening(2) + tail)


def test_hostile_vocabulary_ends_soon(tmp_path: Path) -> None:
    """A sparse file may claim any length; only the bounds limit what is read."""
    path = write(tmp_path, opening(1) + text("k") + struct.pack("<IIQ", 9, 8, 8_388_608))
    os.truncate(path, 1 << 40)
    with pytest.raises(BadModelFile, match="header of more than"):
        read_header(path)


def test_not_a_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """A named pipe has no writer, a device no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(BadModelFile):
            read_header(path)


@ANY_PATH
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_any_damage_is_refused_or_harmless(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """Changed bytes give a header or BadModelFile, never anything else."""
    data = bytearray(model())
    for position, byte in flips:
        data[position % len(data)] = byte
    with contextlib.suppress(BadModelFile):
        read_header(write(tmp_path, bytes(data)))


@ANY_PATH
@given(data=st.binary(max_size=400))
def test_any_bytes_behind_the_magic_are_survived(tmp_path: Path, data: bytes) -> None:
    """Nonsense is BadModelFile."""
    with pytest.raises(BadModelFile):
        read_header(write(tmp_path, b"GGUF\x03\0\0\0" + data))


@ANY_PATH
@given(
    pairs=st.dictionaries(
        st.text(max_size=30),
        st.one_of(
            st.text(max_size=200),
            st.integers(0, 2**32 - 1),
            st.booleans(),
            st.lists(st.text(max_size=20), max_size=30),
            st.lists(st.integers(0, 2**32 - 1), max_size=30),
        ),
        max_size=12,
    )
)
def test_any_metadata_is_passed_over(tmp_path: Path, pairs: dict[str, object]) -> None:
    """Keys that mean nothing to us move nothing."""
    kept = {key: item for key, item in pairs.items() if not key.startswith("general.") and key not in PAIRS}
    data = model({**kept, **PAIRS})
    assert read_header(write(tmp_path, data)).promised_bytes == len(data)


def test_vocabulary_longer_than_a_read_is_passed_over(tmp_path: Path) -> None:
    """Items that straddle the blocks in which the file is read are found."""
    tokens = ["x" * (number % 700) for number in range(3000)]
    data = model({"tokens": tokens, "long": "y" * 900_000, "numbers": [0] * 70_000, **PAIRS}, TENSORS)
    assert read_header(write(tmp_path, data)).promised_bytes == len(data)
