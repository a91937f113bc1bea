"""Parsing of pasted texts: lists of many kinds, tables and class files become names without marks. Does not import torch."""

import ast
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

SYNONYM_MARK = "|"
SEPARATORS = ",;\n\t\u0964\u060c\u061b\u1363\u1802\u3001\u3002\u30fb"  # in normal form NFKC, which has no wide commas
_JOINERS = "\u200c\u200d"  # zero-width joiners, part of Persian words and of compound emoji
_BRACKETS = {")": "(", "]": "[", "}": "{", "\u3011": "\u3010", "\u300b": "\u300a"}
_QUOTES = "\"'`\u00b4\u00ab\u00bb\u2018\u2019\u201a\u201c\u201d\u201e\u2039\u203a\u300c\u300d\u300e\u300f"
_DASHES = "-\u2010-\u2015\u2212"

_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]\w{1,30});", re.IGNORECASE)
_HTML_BREAK = re.compile(r"</?(?:li|ul|ol|br|p|div|tr|td|th|option)(?:\s[^<>]{0,200})?/?>", re.IGNORECASE)
_LINK = re.compile(r"\[([^\[\]]{1,80})\]\([^()\s]{1,400}\)")  # of Markdown
_BULLET = re.compile(  # geometric shapes, ticks, stars, circled numbers, bullets of Word's symbol fonts, keycaps
    "[\u2022\u2023\u2043\u25a0-\u25ff\u2605\u2606\u2610-\u2612\u2713-\u2718\u27a2-\u27a4\u2460-\u249b\u24b6-\u24ff\u2776-\u2793"
    "\ue000-\uf8ff]\ufe0f?|[0-9]\ufe0f?\u20e3|(?<!\\S)[\u00b7\u2192\u2219\u22c5](?!\\S)"
)
_LATIN_JOINER = re.compile(f"(?<=[\x01-\u024f])[{_JOINERS}]+|[{_JOINERS}]+(?=[\x01-\u024f])|^[{_JOINERS}]+|[{_JOINERS}]+$")
_HEADING = re.compile(  # "classes = [", "The names are:"
    r"""^\s*(?:[\w.]+\s*=\s*(?=[\[({])"""
    r"""|[^,;:=\n"'{}()\[\]]{0,40}?(?:\b|_)(?:names|classes|labels|categories|objects)\b[^,;:=\n"']{0,20}[:=])""",
    re.IGNORECASE,
)
_NAME_LINE = re.compile(r"""^[ \t{-]*["']?name["']? ?[:=] ?(\S.*)$""", re.MULTILINE)  # "- name: dog", "name: 'dog'"
_LIST_MARK = re.compile(
    rf"^(?:[{_DASHES}*+>#]+\s*"  # "- dog", "> dog", "# dog"
    r"|\[[ x]?\]\s*(?=\S)"  # "[ ] dog"
    r"|\(?(?:\d{1,4}|[a-z]|[ivx]{2,4})\)\s*(?=\S)|\[\d{1,4}\]\s*(?=\S)"  # "1) dog", "(b) dog", "[1] dog"
    rf"|\d{{1,4}}\s*(?:[.:=]|\s[{_DASHES}|])\s*(?=[^\d\s])"  # "1. dog", "0: dog", "1 - dog", "1 | dog"
    r"|(?:class|label|id)[\s_]*\d{1,4}\s*[:=.)-]\s*|\\item\s+)",  # "class 1: dog", "\item dog"
    re.IGNORECASE,
)
_INLINE_DASH, _INLINE_NUMBER = re.compile(rf"\s+[{_DASHES}*]\s+"), re.compile(r"\s+\(?\d{1,3}[.)]\s+")
_WEAK_MARK = re.compile(r"^\s*(?:(\d{1,4})\s+|([a-z])\.\s+)(?=\S)", re.IGNORECASE)  # not a mark in "7 up"
_CELL = re.compile(rf'\s*"[^"\n]*"\s*(?=[{SEPARATORS}]|$)|[^{SEPARATORS}]+')
_RULER = re.compile(r"[-|:+=\s]+|`{3,}.*|~{3,}.*")  # of tables and code
_NUMBER = re.compile(r"\s*[-+]?\d+(?:\.\d+)?\s*")
_NAME_COLUMN = re.compile(r"(?:class|label|category|display)?[ _]?names?|class(?:es)?|labels?|category|categories|objects?")
_SENTENCE = re.compile(r"(?<!\b\w)(?<!\bst)(?<!\bmr)(?<!\bdr)(?<!\bmt)(?<!\bft)(?<!\bmrs)\.\s+(?=\S)", re.IGNORECASE)
_LAST_AND = re.compile(r"^(.*\S)\s+(?:and|or|&)\s+(\S.*)$", re.IGNORECASE | re.DOTALL)
_FIRST_AND = re.compile(r"^\s*(?:and|or|&)\s+(?=\S)", re.IGNORECASE)
_ETC = re.compile(r"(?:^|\s)(?:etc|et cetera|and so on|and more)\s*\.*\s*$", re.IGNORECASE)
_FINAL = re.compile("(?<!\\b\\w\\.\\w)[.:!?\u2026\u061f]+$")  # "U.S." keeps its last full stop
_COUNT = re.compile(r"\s*[:=]\s*\d{1,4}(?:\.\d{1,6})?$")  # "dog: 12", "dog: 0.97"
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)", re.IGNORECASE)


def _readable(text: str) -> str:
    """Normalise a text to NFKC; bullets and HTML tags become line breaks, invisible characters are removed."""
    text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = unicodedata.normalize("NFKC", _BULLET.sub("\n", _LINK.sub(r"\1", _HTML_BREAK.sub("\n", text))))
    text = re.sub(r"([ \t])[ \t]+", r"\1", "\n".join(text.splitlines()))
    categories = {letter: unicodedata.category(letter) for letter in set(text) - set(_JOINERS + "\n\t")}
    invisible = {letter: category for letter, category in categories.items() if category in ("Cc", "Cf", "Cs")}
    table = {ord(letter): " " if category == "Cc" else "" for letter, category in invisible.items()}
    return _LATIN_JOINER.sub("", text.translate(table))


def words_of(entry: str) -> list[str]:
    """The clean words of one class, "a sofa | couch." -> ["sofa", "couch"]; none if there is nothing but marks."""
    return [word for word in map(_clean_word, re.split(rf"[{SEPARATORS}{SYNONYM_MARK}]", _readable(entry))) if word]


def split_text(text: str) -> list[str]:
    """The classes of a text; each may still hold synonyms and marks."""
    text = _HEADING.sub("", _readable(text)).strip().rstrip(";,")
    literal_names = _literal_names(text) or _NAME_LINE.findall(text) or None
    if literal_names is not None and len(literal_names) > 1:
        return _names_beside_numbers(literal_names)
    rows = _rows(text if literal_names is None else literal_names[0])
    headings = [cell.strip(_QUOTES + " ").lower() for cell in rows[0]] if rows else []
    name_columns = [index for index, heading in enumerate(headings) if _NAME_COLUMN.fullmatch(heading)]
    if name_columns and len(rows) > 1 and all(len(row) == len(headings) for row in rows):
        column = headings.index("name") if "name" in headings else name_columns[0]
        return [row[column] for row in rows[1:]]
    entries: list[str] = []
    for row in rows:
        words = [cell for cell in row if not _NUMBER.fullmatch(cell)]  # numbers in a table may be ids or colours
        entries += words if words and len(rows) > 1 else _names_beside_numbers(row)
    if len(entries) > 1:
        last = _ETC.sub("", entries.pop())
        last_two = _LAST_AND.match(last) if len(rows) == 1 and not _FIRST_AND.match(last) and '"' not in last else None
        entries += last_two.groups() if last_two else [_FIRST_AND.sub("", last)]
    return entries


def _names_beside_numbers(cells: list[str]) -> list[str]:
    """The names of cells like "0", "background", "1", "dog"; other cells are returned unchanged."""
    is_numbered = len(cells) > 2 and all(map(_NUMBER.fullmatch, cells[::2]))
    return cells[1::2] if is_numbered else cells


def _rows(text: str) -> list[list[str]]:
    """The lines of a text, each as a list of cells."""
    text = re.sub(r"\s\.(?=\s|$)", "\n", text)
    if not re.search(rf"[{SEPARATORS}]", text) and text.endswith("."):
        text = _SENTENCE.sub("\n", text)  # "a cat. a dog."
    rows: list[list[str]] = []
    lines = [line.strip(" ") for line in text.split("\n")]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _RULER.fullmatch(line):
            if "|" in line and "-" in line and rows:  # below the heading of a table
                rows.pop()
        elif line.startswith("|") and line.endswith("|") and len(line) > 1:
            rows.append([cell for cell in line.strip("|").split("|") if cell.strip()])
        elif line and not (line.endswith(":") and _LIST_MARK.match(following)):
            mark = _LIST_MARK.match(line)
            inline = _INLINE_NUMBER if mark and re.match(r"\(?\d", line) else _INLINE_DASH
            for part in inline.split(line) if mark else [line]:  # a list that lost its line breaks
                rows.append([cell for cell in _CELL.findall(_LIST_MARK.sub("", part.strip(" "))) if cell.strip()])
    return [row for row in rows if row]


def _literal_names(text: str) -> list[str] | None:
    """The names in a JSON value or Python literal, which may lack its outer brackets; None if the text is neither."""
    text = text.translate(dict.fromkeys(map(ord, "\u201c\u201d\u201e\u00ab\u00bb"), '"'))
    if not text.startswith(("[", "{", "(", '"', "'")):
        return None
    text = re.sub(r"""(["'])\s+(?=["'])""", r"\1, ", text)
    for candidate in (text, f"[{text}]", f"{{{text}}}"):
        for read in (json.loads, ast.literal_eval):
            try:
                names = list(_strings(read(candidate)))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
            if names:
                return names
    return None


def _strings(value: Any) -> Iterator[str]:
    """The names in a nested value: those under keys like "categories" or "name", else all texts, else the keys of numbers."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, dict):
        nested = [each for key, each in value.items() if _NAME_COLUMN.fullmatch(str(key)) and isinstance(each, (list, dict))]
        if nested or isinstance(value.get("name"), str):
            yield from _strings(nested or value["name"])
            return
        texts = [name for name in _strings(list(value.values())) if not _NUMBER.fullmatch(name)]
        yield from texts or _strings(list(value))
    elif isinstance(value, (set, frozenset)):
        raise ValueError("a set has no order")


def without_numbers(entries: list[str]) -> list[str]:
    """Remove class numbers ("0 background", "1 dog") or letters, if every entry has one and they increase."""
    marks = [_WEAK_MARK.match(entry) for entry in entries]
    if len(entries) < 2 or not all(marks):
        return entries
    numbers = [int(mark[1]) if mark[1] else ord(mark[2].lower()) - ord("a") for mark in marks]
    if numbers[0] > 1 or any(one >= next_one for one, next_one in zip(numbers[:-1], numbers[1:], strict=True)):
        return entries
    return [entry[mark.end() :] for entry, mark in zip(entries, marks, strict=True)]


def _clean_word(word: str) -> str:
    """One name without marks around it, with single spaces."""
    word = " ".join(word.replace("_", " ").split())
    before = None
    while word != before and len(word) < 1000:  # no name is longer
        before = word
        word = _COUNT.sub("", _LIST_MARK.sub("", word)).strip(_QUOTES + "*~- ")
        word = _FINAL.sub("", word).rstrip()
        for closing, opening in _BRACKETS.items():
            if word.endswith(closing) and opening not in word[:-1]:  # "orange (fruit)" keeps its brackets
                word = word[:-1]
            if word.startswith(opening) and closing not in word[1:]:
                word = word[1:]
            if word.startswith(opening) and word.endswith(closing) and closing not in word[1:-1]:
                word = word[1:-1]
    return _ARTICLE.sub("", word)
