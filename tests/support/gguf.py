"""Builds small GGUF files, right or wrong in one place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

Tensor = tuple[str, Sequence[int], int, int]
"""Name, sizes, type number, offset."""

PAIRS: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 3,
    "llama.context_length": 512,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "a", "bé"],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.chat_template": "{{ messages }}",
    "general.quantized": True,
}
TENSORS: Sequence[Tensor] = (("a.weight", (64, 2), 3, 0), ("b.weight", (8,), 0, 96))
"""128 weights in blocks of 32 with 20 bytes each: 80 bytes; then 8 floats: 32 bytes at the next multiple of 32."""


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A typed value: bool, int (u32), float (f32), str, or a list of one of them."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    items = [value(one) for one in item]
    kind = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + b"".join(one[4:] for one in items)


def model(
    pairs: dict[str, Any] = PAIRS,
    tensors: Sequence[Tensor] = TENSORS,
    *,
    version: int = 3,
    data_bytes: int | None = None,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    """A GGUF file. Counts can be made to lie; `data_bytes` None gives the default tensors their 128 bytes."""
    out = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    for key, item in pairs.items():
        out += text(key) + value(item)
    for name, sizes, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    alignment = pairs.get("general.alignment", 32)
    if isinstance(alignment, int) and alignment:
        out += bytes(-len(out) % alignment)
    return out + bytes(128 if data_bytes is None else data_bytes)
