"""Sizes as people write them on a command line."""

from __future__ import annotations

from llama_ft.errors import UserError


def parse_size(text: str, key: str) -> int:
    """Bytes of `5GB`, `512KiB` or `1000000`. UserError that names the option `key` for anything else."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise UserError(f"'{text}' is no size", key=key, hint="write 1MB, 512KB or 64KiB")
    return size
