"""Reads a SentencePiece `.model` (LLaMA 1 and 2, Code Llama): a serialised `ModelProto`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama_ft.errors import Problem, UserError
from llama_ft.tokenizer.pieces import BYTE_PIECES, Kind, Pieces

# Code Llama's infilling markers (meta-llama/codellama, llama/tokenizer.py). They are control tokens by their use: its
# code puts their ids around text and never spells them, whatever kind of piece the file calls them.
INFILLING = frozenset({"▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"})
BPE = 2  # TrainerSpec.ModelType


def read_sentencepiece(path: Path) -> Pieces:
    """The vocabulary in a SentencePiece file.

    Raises :class:`UserError` when the file is damaged, and, with every reason, when its text could not be cut exactly
    as SentencePiece does: a unigram model, a normaliser that changes the text, unused pieces.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    data = path.read_bytes()
    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # the class is made at import
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise _damaged(path, "it does not parse") from error
    # The settings stand behind the pieces: a file cut between two pieces parses, and lacks them.
    if not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise _damaged(path, f"it ends after {len(proto.pieces):,} pieces, without its settings")
    try:
        SentencePieceProcessor(model_proto=data)  # the library's own checks
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    _refuse_inexact(path, proto)
    texts = [piece.piece for piece in proto.pieces]
    kinds = [Kind.CONTROL if piece.piece in INFILLING else Kind(piece.type) for piece in proto.pieces]
    if [text for text, kind in zip(texts, kinds, strict=True) if kind is Kind.BYTE] not in ([], BYTE_PIECES):
        raise _damaged(path, "its byte pieces are not <0x00> to <0xFF>, each once")
    spec = proto.trainer_spec
    return Pieces(
        texts,
        [piece.score for piece in proto.pieces],
        kinds,
        unknown=kinds.index(Kind.UNKNOWN),
        begin=_control(spec.bos_id, kinds),
        end=_control(spec.eos_id, kinds),
        pad=_control(spec.pad_id, kinds),
        dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
    )


def _control(token: int, kinds: list[Kind]) -> int | None:
    return token if 0 <= token < len(kinds) and kinds[token] is Kind.CONTROL else None


def _refuse_inexact(path: Path, proto: Any) -> None:
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    unused = sum(piece.type == Kind.UNUSED for piece in proto.pieces)
    reasons = [
        (
            trainer.model_type != BPE,
            f"it is a {trainer.ModelType.Name(trainer.model_type).lower()} model; every LLaMA's is BPE",
        ),
        (
            bool(normalizer.precompiled_charsmap),
            f"its normaliser '{normalizer.name}' rewrites the text; a LLaMA's is the identity",
        ),
        (normalizer.remove_extra_whitespaces, "it drops repeated spaces; a LLaMA's keeps them"),
        (not normalizer.escape_whitespaces, "it does not write ▁ for a space"),
        (trainer.treat_whitespace_as_suffix, "it puts ▁ behind a word instead of before it"),
        (unused > 0, f"it has {unused:,} unused pieces, which SentencePiece joins and cuts again"),
    ]
    hint = "its ids would differ from SentencePiece's; use a tokenizer.json made by those who trained the model"
    problems = [Problem(said, where=str(path), hint=hint) for holds, said in reasons if holds]
    if problems:
        raise UserError(problems)


def _damaged(path: Path, said: str) -> UserError:
    return UserError(
        f"the SentencePiece file {path} is damaged: {said}", hint="fetch it again; LLaMA 1 and 2's has 499,723 bytes"
    )
