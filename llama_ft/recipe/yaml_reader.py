"""YAML text -> a tree with places (nodes.py), on PyYAML's safe event stream.

Only PyYAML's scanner and parser are used; nothing is ever constructed from a tag. Whatever can be said about the rest
of a file after a mistake is said: only broken syntax stops the reading.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

from llama_ft.recipe.nodes import Entry, Findings, Items, Map, Mark, Node, Scalar, Source, Unreadable
from llama_ft.recipe.scalars import read_plain
from llama_ft.recipe.yaml_words import explain, one_line

MAX_BYTES = 1_000_000
"""A recipe is one page; a larger file is a data set or a checkpoint given by mistake."""
MAX_VALUES = 10_000
"""Values of one file with all aliases written out: stops a billion laughs at its tenth thousand."""
MAX_DEPTH = 40

_NON_PRINTABLE = yaml.reader.Reader.NON_PRINTABLE
_NOT_IN_TEXT = re.compile("[\0\ud800-\udfff]")  # escapes make them: NUL ends a path, half a surrogate pair is nothing
_TAB_INDENT = re.compile(r"^[ ]*\t[ \t]*(?![#\s]|$)")


class Broken(Exception):
    """The rest of the text cannot be read; the reason is already in the findings."""


def read_file(path: Path, source: Source, findings: Findings) -> Map | None:
    """The map that a YAML file holds; None when it holds none, with the reasons in `findings`."""
    try:
        text = _read_text(path, source, findings)
        root = parse(text, source, findings)
    except Broken:
        return None
    if root is None:
        findings.add(Mark(source, 1, 1), "the file is empty, keys and values are needed", hint=_EXAMPLE)
    elif isinstance(root, Map):
        return root
    elif not isinstance(root, Unreadable):
        kind = "a list" if isinstance(root, Items) else "a single value"
        findings.add(root.mark, f"the file holds {kind}, a map of keys is needed", hint=_EXAMPLE)
    return None


_EXAMPLE = "write 'key: value' lines, such as name: my-run"


def parse(text: str, source: Source, findings: Findings, *, key: str | None = None) -> Node | None:
    """The tree of one YAML document; None for an empty one. With a `key` (an override) the text has no lines to name.

    Raises :class:`Broken` on broken syntax, after noting it.
    """
    inline = key is not None
    builder = _Builder(text, source, findings, key)
    bad = _NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - (text.rfind("\n", 0, bad.start()) + 1) + 1
        mark = Mark(source) if inline else Mark(source, line, column)
        findings.add(mark, f"character U+{ord(bad[0]):04X} cannot stand in YAML", key=key, hint="remove it")
        raise Broken
    try:
        return builder.document()
    except yaml.MarkedYAMLError as error:
        builder.report(error)
        raise Broken from None
    # PyYAML lets a few conversions of its own escape, e.g. "\U00110000" or a directive of a thousand digits.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, IndexError):
        findings.add(builder.here(), "not valid YAML", key=key, hint="check the escapes, brackets and indentation here")
        raise Broken from None


def _read_text(path: Path, source: Source, findings: Findings) -> str:
    def stop(what: str, hint: str, line: int = 0, column: int = 0) -> NoReturn:
        findings.add(Mark(source, line, column), what, hint=hint)
        raise Broken

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            stop("is a folder, a YAML file is needed", names_in(path))
        if not stat.S_ISREG(status.st_mode):
            stop("is not an ordinary file", "give the path of a YAML file")
        if status.st_size > MAX_BYTES:
            stop(
                f"has {status.st_size:,} bytes, a recipe has at most {MAX_BYTES:,}",
                "is this a data file? name it under data",
            )
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        stop(f"cannot be read: {error.strerror or error}", "check the file and its permissions")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        stop("is UTF-16, YAML here is UTF-8", "save the file as UTF-8", 1, 1)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # 'utf-8-sig' counts from after a byte order mark, the file does not.
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line_start = raw.rfind(b"\n", 0, offset) + 1
        column = len(raw[line_start:offset].decode("utf-8-sig", "replace")) + 1
        what = f"byte 0x{raw[offset]:02x} at offset {offset} is not UTF-8"
        stop(what, "save the file as UTF-8", raw.count(b"\n", 0, offset) + 1, column)


def _shallower_line(lines: list[str], number: int, column: int) -> int | None:
    """The line above, if line `number` is a key that starts deeper than it and `column` is where that key fails."""
    key = re.match(r"( *)[\w.-]+(?=\s*:)", lines[number]) if number < len(lines) else None
    if key is None or column not in (len(key[1]), key.end()):
        return None
    full = (n for n in range(number - 1, -1, -1) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
    above = next(full, None)
    if above is None or len(lines[above]) - len(lines[above].lstrip()) >= len(key[1]):
        return None
    return above


def names_in(folder: Path) -> str:
    """A hint: the YAML files of a folder that was named in place of a file."""
    names = sorted(path.name for path in folder.glob("*.yaml"))
    return f"recipes in it: {', '.join(names[:12])}" if names else "there is no .yaml file in it"


class _Builder:
    """Turns events into nodes. Keeps the dotted path for messages, and counts values so that aliases stay bounded."""

    def __init__(self, text: str, source: Source, findings: Findings, key: str | None):
        self.text, self.source, self.findings, self.inline = text, source, findings, key is not None
        self.loader = yaml.SafeLoader("")
        self.anchors: dict[str, Node | None] = {}
        self.whole, self.path = key, key.split(".") if key else []
        self.values = self.depth = 0

    def mark(self, event_or_mark: Any) -> Mark:
        place = getattr(event_or_mark, "start_mark", event_or_mark)
        return Mark(self.source) if self.inline else Mark(self.source, place.line + 1, place.column + 1)

    def here(self) -> Mark:
        return self.mark(self.loader.get_mark())

    def add(self, mark: Mark, what: str, hint: str | None = None) -> None:
        key = ".".join(self.path[:6]) + (".…" if len(self.path) > 6 else "")
        self.findings.add(mark, what, key=one_line(key) or None, hint=hint)

    def stop(self, mark: Mark, what: str, hint: str) -> NoReturn:
        self.add(mark, what, hint)
        raise Broken

    def report(self, error: yaml.MarkedYAMLError) -> None:
        """Notes a syntax error in plain words; a tab is noted for every line that is indented with one."""
        place, what, hint = explain(error)
        lines = self.text.split("\n")
        tabs = [number for number, line in enumerate(lines) if _TAB_INDENT.match(line)]
        above = None if self.inline or place is None else _shallower_line(lines, place.line, place.column)
        if "tab" in what and not self.inline and place is not None and place.line in tabs:
            for number in tabs:
                mark = Mark(self.source, number + 1, lines[number].index("\t") + 1)
                self.findings.add(mark, "a tab indents this line", hint=hint)
        elif above is not None and ("':' stands" in what or "does not fit" in what):
            column = len(lines[place.line]) - len(lines[place.line].lstrip()) + 1
            what = f"this line is indented deeper than line {above + 1}, which already has a value"
            self.findings.add(Mark(self.source, place.line + 1, column), what, hint="indent both alike")
        else:
            self.findings.add(self.mark(place) if place is not None else self.here(), what, key=self.whole, hint=hint)

    def document(self) -> Node | None:
        self.loader = yaml.SafeLoader(self.text)
        self.loader.get_event()
        if self.loader.check_event(yaml.StreamEndEvent):
            return None
        self.loader.get_event()
        root = self.node()
        self.loader.get_event()
        if not self.loader.check_event(yaml.StreamEndEvent):
            mark = self.mark(self.loader.peek_event())
            self.add(mark, "a second document starts here, a recipe is one", "remove everything from '---' on")
        empty = isinstance(root, Scalar) and root.form == "empty"
        return None if empty else root

    def node(self) -> Node:
        event: Any = self.loader.get_event()
        mark = self.mark(event)
        is_alias = isinstance(event, yaml.AliasEvent)
        node = self.alias(event.anchor, mark) if is_alias else self.fresh(event, mark)
        self.values += node.size if is_alias else 1
        if self.values > MAX_VALUES:
            self.stop(mark, f"the file grows to more than {MAX_VALUES:,} values", "write less, or without aliases")
        return node

    def alias(self, anchor: str, mark: Mark) -> Node:
        if anchor not in self.anchors:
            self.stop(mark, f"*{anchor} has no anchor before it", f"write &{anchor} first, or quote the text")
        target = self.anchors[anchor]
        if target is None:
            self.stop(mark, f"*{anchor} stands inside its own anchor", "write the value out")
        return target

    def fresh(self, event: Any, mark: Mark) -> Node:
        if event.anchor is not None:
            if event.anchor in self.anchors:
                self.add(mark, f"anchor &{event.anchor} is given twice", "use another name")
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, mark)
        else:
            self.depth += 1
            if self.depth > MAX_DEPTH:
                self.stop(mark, f"nested more than {MAX_DEPTH} levels deep", "check the indentation and the brackets")
            node = self.items(mark) if isinstance(event, yaml.SequenceStartEvent) else self.map(mark)
            self.depth -= 1
        if event.tag is not None:
            name = event.tag.replace("tag:yaml.org,2002:", "!!")
            self.add(mark, f"the tag {name} is not allowed, a recipe is plain YAML", "remove the tag")
            node = Unreadable(mark, node.size)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def scalar(self, event: Any, mark: Mark) -> Node:
        if event.style not in (None, ""):
            bad = _NOT_IN_TEXT.search(event.value)
            if bad:
                self.add(mark, f"holds U+{ord(bad[0]):04X}, which is no character of a text", "remove it")
                return Unreadable(mark)
            return Scalar(mark, event.value, "text", event.value, quoted=True)
        form, value = read_plain(event.value)
        return Scalar(mark, value, form, event.value)

    def items(self, mark: Mark) -> Items:
        items: list[Node] = []
        while not self.loader.check_event(yaml.SequenceEndEvent):
            self.path.append(str(len(items)))
            items.append(self.node())
            self.path.pop()
        self.loader.get_event()
        return Items(mark, items, 1 + sum(item.size for item in items))

    def map(self, mark: Mark) -> Map:
        entries: dict[str, Entry] = {}
        inherited: list[Node] = []
        while not self.loader.check_event(yaml.MappingEndEvent):
            key_mark = self.mark(self.loader.peek_event())
            key = self.key(self.node(), key_mark)
            self.path.append(key if key is not None else "?")
            value = self.node()
            if key == "<<":
                inherited += value.items if isinstance(value, Items) else [value]
            elif key in entries:
                self.add(key_mark, f"{key} is given twice", f"the first stands at line {entries[key].mark.line}")
            elif key is not None:
                entries[key] = Entry(key_mark, value)
            self.path.pop()
        self.loader.get_event()
        for parent in inherited:
            if isinstance(parent, Map):
                entries = {**parent.entries, **entries}
            elif not isinstance(parent, Unreadable):
                self.add(parent.mark, "<< takes the alias of a map", "write <<: *anchor, or use extends")
        return Map(mark, entries, 1 + sum(entry.node.size for entry in entries.values()))

    def key(self, node: Node, mark: Mark) -> str | None:
        """The name of a key; None, after a note, when it is no name. `on` and `no` are names here, as in YAML 1.2."""
        if isinstance(node, Unreadable):
            return None
        if isinstance(node, Scalar) and node.form in ("text", "legacy-bool", "date"):
            return node.text
        if isinstance(node, Scalar):
            self.add(mark, f"the key is {node.text or 'empty'}, a name is needed", "quote it if it is meant as a name")
        else:
            kind = "a list" if isinstance(node, Items) else "a map"
            self.add(mark, f"the key is {kind}, a name is needed", "text that starts with [ or { needs quotes")
        return None
