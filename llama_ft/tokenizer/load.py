"""One door to a tokenizer: loaded, made safe for training, or refused with a reason.

What the door guarantees about the tokenizer it returns:

- it is fast (labels are found through character offsets) and never runs code from a repository;
- `pad_token` exists and is neither the end nor the beginning of a text (a model trained with pad = eos never stops);
- `bos_token` is None unless the tokenizer itself begins a text with it, so a template's `{{ bos_token }}` renders
  exactly what the model saw in pre-training: one BOS or none, never two;
- `model_max_length` is a real number;
- `padding_side` is `right`: training pads on the right. Batched generation wants `left` and sets it for itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.errors import UserError, did_you_mean, nearest
from llama_ft.tokenizer.find import find_tokenizer
from llama_ft.tokenizer.hub import hub_problem, is_hub_id, quick_hub
from llama_ft.tokenizer.native import open_native

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tokens that published LLaMA-like models carry and never train on, best first.
PAD_CANDIDATES = (
    "<|endoftext|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<empty_output>",
    "<unk>",
)
# transformers writes 1e30 where a tokenizer states no length.
ABSURD_LENGTH = 10_000_000
# LLaMA-3.1's context: the longest of the family.
FALLBACK_LENGTH = 131_072
# What a hub repository's tokenizer may consist of: the files that transformers would ask for.
HUB_FILES = ["*token*.json", "config.json", "vocab.*", "merges.txt", "*.model", "chat_template*", "*/*.jinja"]


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder, a tokenizer file or a hub id.

    A folder or repository with a tokenizer.json is opened by transformers. A SentencePiece `.model`, Llama 3's tiktoken
    ranks and llama2.c's tokenizer.bin are converted on the way (docs/tokenizers.md); a checkpoint file stands for the
    tokenizer beside it. `revision` is a hub branch, tag or commit. The network is asked only for a hub id, and only
    when it answers.

    Raises :class:`UserError` when the folder or repository is missing, gated or unreadable, when the file is damaged or
    cannot be converted exactly, when the tokenizer is not a fast one, or when no token can serve as padding.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if _is_local(str(source)):
            raise UserError(f"no such tokenizer folder: {source}", hint=_beside(path))
        path = _download(str(source), revision)
    tokenizer = _from_disk(path)
    tokenizer.name_or_path = str(source)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"the tokenizer of {source} is a slow one ({type(tokenizer).__name__}): it cannot say which characters a "
            "token covers",
            hint="use a tokenizer that has a tokenizer.json",
        )
    settle_pad(tokenizer, str(source))
    if not begins_with_bos(tokenizer):
        tokenizer.bos_token = None
    if not tokenizer.model_max_length or tokenizer.model_max_length > ABSURD_LENGTH:
        tokenizer.model_max_length = stated_context(path) or FALLBACK_LENGTH
    tokenizer.padding_side = "right"
    return tokenizer


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer itself puts its BOS before a text, as in the model's pre-training."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def _from_disk(path: Path) -> Any:
    file = find_tokenizer(path)
    if file is None:
        folder = path if path.is_dir() else path.parent
        raise UserError(
            f"{folder} holds no tokenizer",
            hint="expected tokenizer.json, tokenizer.model or llama2.c's tokenizer.bin in that folder",
        )
    if file.name != "tokenizer.json":
        return open_native(file)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader raises bare Exception for a damaged file
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(
            f"the tokenizer in {file.parent} cannot be read: {line}", hint="is the file whole? Fetch it again if not"
        ) from error


def _download(repo_id: str, revision: str | None) -> Path:
    """The folder, in the hub's own cache, of a repository's tokenizer files."""
    if not is_hub_id(repo_id):
        raise UserError(f"'{repo_id}' is neither a folder nor a hub id (owner/name)", hint="check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with quick_hub():
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise hub_problem(error, repo_id, what="tokenizer") from error


def settle_pad(tokenizer: PreTrainedTokenizerFast, source: str, *, end: int | None = None) -> None:
    """Gives the tokenizer a padding token that is not its eos, not its bos and not `end`, a template's end token.

    Raises :class:`UserError` when its vocabulary has no token that is free for it.
    """
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, end}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_CANDIDATES, tokenizer.unk_token):
        if token in vocabulary and vocabulary[token] not in taken:
            tokenizer.pad_token = token
            return
    now = f"'{tokenizer.pad_token}', its end token" if tokenizer.pad_token else "missing"
    raise UserError(
        f"the tokenizer of {source} has no usable padding token: it is {now}",
        hint=f"set pad_token in its tokenizer_config.json to a token that no text uses, such as {PAD_CANDIDATES[0]}",
    )


def stated_context(path: Path) -> int | None:
    """`max_position_embeddings` of the config.json in a folder, or beside a file, if there is one."""
    folder = path.parent if path.is_file() else path
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    length = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return length if isinstance(length, int) and 0 < length <= ABSURD_LENGTH else None


def _is_local(source: str) -> bool:
    """Whether a name that does not exist was meant as a path rather than as a hub id."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or source.endswith("/")


def _beside(path: Path) -> str | None:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    return did_you_mean(path.name, names) if nearest(path.name, names) else None
