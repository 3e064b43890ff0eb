"""Hostile text: whole files by their syntax, and every field of a good file with every wrong value."""

import copy
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from typing import Any
from xml.sax.saxutils import quoteattr

MARK = "HOSTILEVALUE"
"""Placeholder of a value in a template."""

Change = Callable[[bytes], bytes]
Structure = Callable[[dict[str, Any]], dict[str, Any]]

WHOLE: dict[str, Change] = {
    "empty": lambda _: b"",
    "blank": lambda _: b" \n\n\t\n",
    "binary": lambda _: random.Random(0).randbytes(4096),
    "zeros": lambda _: bytes(4096),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.decode().encode("utf-16-be"),
    "UTF-32": lambda text: text.decode().encode("utf-32"),
    "BOM": lambda text: b"\xef\xbb\xbf" + text,
    "latin-1": lambda text: text.replace(b"cat", b"ch\xe2t").replace(b"a.png", b"\xe4.png"),
    "broken UTF-8": lambda text: text[: len(text) // 2] + b"\xc3\x28\xff" + text[len(text) // 2 :],
    "NUL": lambda text: text[: len(text) // 2] + b"\0" + text[len(text) // 2 :],
    "half": lambda text: text[: len(text) // 2],
    "without its last character": lambda text: text.rstrip()[:-1],
    "twice": lambda text: text + text,
    "carriage returns": lambda text: text.replace(b"\n", b"\r"),
    "CRLF": lambda text: text.replace(b"\n", b"\r\n"),
    "gzip": lambda text: __import__("gzip").compress(text),
    "zip": lambda _: b"PK\x03\x04" + bytes(60),
    "HTML": lambda _: b"<!DOCTYPE html><html><body>404</body></html>",
    "an LFS pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
    "escape sequences": lambda text: b"\x1b[2J\x1b]0;owned\x07\n" + text,
    "30 MB of spaces": lambda text: b" " * 30_000_000 + text,
    "a line of 30 MB": lambda _: b"x" * 30_000_000,
    "30 MB of digits": lambda _: b"9" * 30_000_000,
}
"""Changes of any text file."""

_BOMB_YAML = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (98 + n, 98 + n, *[97 + n] * 9) for n in range(10)
)
_MERGE_YAML = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [*%c, *%c], k%d: 1}\n" % (98 + n, 98 + n, 97 + n, 97 + n, n) for n in range(20)
)
_ENTITIES = b'<!DOCTYPE a [<!ENTITY x "lol">' + b"".join(
    b'<!ENTITY x%d "%s">' % (n, b"&x%s;" % (str(n - 1).encode() if n else b"") * 10) for n in range(9)
)
_OUTSIDE_ENTITY = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'

BY_SYNTAX: dict[str, dict[str, Change]] = {
    "json": {
        "100,000 arrays deep": lambda _: b"[" * 100_000,
        "100,000 arrays, closed": lambda _: b"[" * 100_000 + b"]" * 100_000,
        "100,000 objects deep": lambda _: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "deep in an unknown key": lambda text: _grown(text, b'"more":' + b"[" * 50_000 + b"]" * 50_000),
        "a million empty lists": lambda text: _grown(text, b'"more":[' + b"[]," * 1_000_000 + b"[]]"),
        "10^6 keys": lambda text: _grown(text, b",".join(b'"k%d":1' % n for n in range(1_000_000))),
        "one key 20 MB long": lambda text: _grown(text, b'"' + b"k" * 20_000_000 + b'":1'),
        "a string 40 MB long": lambda text: _grown(text, b'"more":"' + b"s" * 40_000_000 + b'"'),
        "a list": lambda text: b"[" + text + b"]",
        "a string": lambda _: b'"text"',
        "a number": lambda _: b"1",
        "null": lambda _: b"null",
        "an empty list": lambda _: b"[]",
        "an empty object": lambda _: b"{}",
        "NaN": lambda _: b"NaN",
        "lines of objects": lambda text: text + b"\n" + text,
        "single quotes": lambda text: text.replace(b'"', b"'"),
        "a comment": lambda text: b"// comment\n" + text,
        "rubbish behind": lambda text: text + b"}}]]",
        "an integer of 10,000 digits": lambda text: _grown(text, b'"more":' + b"9" * 10_000),
        "escaped surrogates": lambda text: text.replace(b"cat", b"\\ud800\\udfff\\udc00"),
    },
    "yaml": {
        "a bomb of aliases": lambda text: text + b"\n" + _BOMB_YAML,
        "only a bomb of aliases": lambda _: _BOMB_YAML,
        "a bomb of merges": lambda _: _MERGE_YAML,
        "a recursive anchor": lambda _: b"train: &a [*a]\nnames: *a\n",
        "50,000 lists deep": lambda _: b"[" * 50_000,
        "5,000 mappings deep": lambda _: b"".join(b" " * n + b"a:\n" for n in range(5_000)),
        "a Python object": lambda _: b"train: !!python/object/apply:os.system [touch x]\n",
        "an unknown tag": lambda _: b"train: !!java.lang.Runtime x\n",
        "two documents": lambda text: text + b"\n---\n" + text,
        "a list": lambda _: b"- a\n- b\n",
        "a string": lambda _: b"text\n",
        "tabs": lambda text: b"\t" + text,
        "an unknown key": lambda text: _grown(text, b'"more": 1'),
        "a key that is a list": lambda _: b"? [a, b]\n: 1\n",
        "a key that is a number": lambda _: b"1: 2\n",
        "a key with escape sequences": lambda _: b'"\\e[31mred": 1\n',
        "an integer of 10,000 digits": lambda _: b"train: " + b"9" * 10_000 + b"\n",
        "a date": lambda _: b"train: 2001-13-45\n",
        "a sexagesimal number": lambda _: b"train: " + b"59:" * 5_000 + b"59\n",
        "binary": lambda _: b"train: !!binary ////\n",
    },
    "xml": {
        "a bomb of entities": lambda _: _ENTITIES + b"]><annotation>&x8;</annotation>",
        "an entity of a file": lambda text: _OUTSIDE_ENTITY + text.replace(b"cat", b"&x;"),
        "a parameter entity": lambda text: b'<!DOCTYPE a [<!ENTITY % p SYSTEM "http://127.0.0.1:9/x"> %p;]>' + text,
        "a quadratic entity": lambda _: b'<!DOCTYPE a [<!ENTITY x "%s">]><a>%s</a>' % (b"x" * 100_000, b"&x;" * 10_000),
        "an empty DOCTYPE": lambda text: b"<!DOCTYPE annotation>" + text,
        "100,000 elements deep": lambda _: b"<a>" * 100_000,
        "100,000 elements, closed": lambda _: b"<a>" * 100_000 + b"</a>" * 100_000,
        "100,000 attributes": lambda _: b"<a %s/>" % b" ".join(b'k%d=""' % n for n in range(100_000)),
        "100,000 objects": lambda text: _repeated(text, 100_000),
        "a comment of 20 MB": lambda text: b"<!--" + b"x" * 20_000_000 + b"-->" + text,
        "an open comment": lambda text: text + b"<!--",
        "an attribute of 20 MB": lambda _: b'<annotation a="%s"/>' % (b"x" * 20_000_000),
        "a name of 1 MB": lambda _: b"<%s/>" % (b"x" * 1_000_000),
        "CDATA": lambda text: text.replace(b"cat", b"<![CDATA[\x1b[31m]]>"),
        "an instruction": lambda text: b'<?xml-stylesheet href="file:///etc/hostname"?>' + text,
        "an encoding that is none": lambda text: b'<?xml version="1.0" encoding="none"?>' + text,
        "an encoding that is not so": lambda text: b'<?xml version="1.0" encoding="utf-16"?>' + text,
        "a Python codec": lambda text: b'<?xml version="1.0" encoding="rot13"?>' + text,
        "XInclude": lambda text: text.replace(
            b"cat", b'<x:include xmlns:x="http://www.w3.org/2001/XInclude" parse="text" href="/etc/hostname"/>'
        ),
        "namespaces": lambda text: re.sub(rb"<annotations?", rb'\g<0> xmlns="http://x/y"', text, count=1),
        "another root": lambda _: b"<html/>",
        "two roots": lambda text: text + text,
        "a control character": lambda text: text.replace(b"cat", b"&#27;[31m"),
        "a character that is none": lambda text: text.replace(b"cat", b"&#xd800;&#xffffffff;"),
    },
    "txt": {
        "10^5 lines": lambda text: text * 50_000,
        "10^6 words in a line": lambda _: b"0 " * 1_000_000 + b"\n",
        "escape sequences in a line": lambda text: text + b"\x1b[31m 1 1 1 1\n",
        "a comment": lambda text: b"# comment\n" + text,
        "commas": lambda text: text.replace(b" ", b","),
        "a decimal comma": lambda text: text.replace(b".", b","),
        "tabs": lambda text: text.replace(b" ", b"\t"),
        "Arabic digits": lambda _: "٠ ٠.٥ ٠.٥ ٠.٥ ٠.٥\n".encode(),
        "underscores": lambda _: b"0 0.5_0 0.5 1_0e-1 0.5\n",
        "hexadecimal": lambda _: b"0 0x1p-1 0.5 0.5 0.5\n",
        "an open polygon": lambda _: b"0 0.1 0.1 0.5 0.1 0.5 0.5 0.1\n",
        "a polygon of 10^5 points": lambda _: b"0 " + b"0.1 0.2 " * 100_000 + b"\n",
    },
    "csv": {
        "an open quote": lambda text: text.replace(b"a.png", b'"a.png'),
        "10^5 columns": lambda text: b",".join(b"c%d" % n for n in range(100_000)) + b"\n" + text,
        "a ragged row": lambda text: text + b"a,b,c,d,e,f,g,h,i,j\n",
        "a quote of 30 MB": lambda text: text + b'"' + b"x" * 30_000_000 + b'"\n',
        "no header": lambda text: text.partition(b"\n")[2],
        "only a header": lambda text: text.partition(b"\n")[0] + b"\n",
        "the same column twice": lambda text: re.sub(rb"^([^,]*),[^,\n]*", rb"\1,\1", text),
        "semicolons": lambda text: text.replace(b",", b";"),
        "tabs": lambda text: text.replace(b",", b"\t"),
        "10^5 rows": lambda text: text + text.partition(b"\n")[2].partition(b"\n")[0].join([b"\n"] * 100_000),
    },
}
BY_SYNTAX["jsonl"] = BY_SYNTAX["json"]
"""Changes of a file in a syntax, or files in it that replace it."""


def _grown(text: bytes, member: bytes) -> bytes:
    """Add a member to the first object of a JSON text."""
    before, found, after = text.partition(b"{")
    return before + found + member + b"," + after if found else text


def _repeated(text: bytes, times: int) -> bytes:
    match = re.search(rb"<(object|box)\b.*?</\1>", text, re.S)
    return text if match is None else text.replace(match[0], match[0] * times)


def _many(content: dict[str, Any], key: str, count: int) -> dict[str, Any]:
    first = content[key][0]
    return {**content, key: [{**first, "id": number, "name": f"c{number}"} for number in range(1, count + 1)]}


def _twice(key: str) -> Structure:
    return lambda content: {**content, key: content[key] * 2}


def _none(key: str) -> Structure:
    return lambda content: {**content, key: []}


COCO: dict[str, Structure] = {
    **{f"the same {key} twice": _twice(key) for key in ("images", "annotations", "categories")},
    **{f"no {key}": _none(key) for key in ("images", "annotations", "categories")},
    "10^6 categories": lambda content: _many(content, "categories", 10**6),
    "300,000 boxes of an image": lambda content: _many(content, "annotations", 300_000),
    "100,000 missing images": lambda content: {
        **content,
        "images": content["images"] + [{"id": n, "file_name": f"{n}.png"} for n in range(10, 100_010)],
    },
    "the same file 3,000 times": lambda content: {
        **content,
        "images": [{**content["images"][0], "id": n} for n in range(1, 3_001)],
    },
    "boxes of images that are not listed": lambda content: {
        **content,
        "annotations": [{**item, "image_id": 99} for item in content["annotations"]],
    },
    "classes that differ in invisible characters": lambda content: {
        **content,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat\u200b"}],
    },
    "the keys backward": lambda content: dict(reversed(content.items())),
}
"""Whole COCO files that are wrong in their structure."""

VALUES: dict[str, tuple[str | None, str]] = {
    # name: (in JSON and YAML, in XML and plain text); None: the same as a JSON string
    "null": ("null", "null"),
    "true": ("true", "true"),
    "minus one": ("-1", "-1"),
    "zero": ("0", "0"),
    "a fraction": ("1.5", "1.5"),
    "2^53": (str(2**53), str(2**53)),
    "2^63": (str(2**63), str(2**63)),
    "-2^63 - 1": (str(-(2**63) - 1), str(-(2**63) - 1)),
    "5,000 digits": ("9" * 5_000, "9" * 5_000),
    "NaN": ("NaN", "nan"),
    "infinity": ("Infinity", "inf"),
    "1e400": ("1e400", "1e400"),
    "1e300": ("1e300", "1e300"),
    "5e-324": ("5e-324", "5e-324"),
    "an empty text": ('""', ""),
    "a text": ('"x"', "x"),
    "digits in a text": ('"7"', " 7 "),
    "escape sequences": ('"\\u001b[31mred\\u0007"', "\x1b[31mred"),
    "a bidirectional text": ('"\\u202egnp"', "\u202egnp"),
    "half a surrogate": ('"\\ud800"', "\udc80"),
    "a text of 100,000 characters": ('"' + "s" * 100_000 + '"', "s" * 100_000),
    "an empty list": ("[]", "[]"),
    "an empty object": ("{}", "{}"),
    "a list of lists": ("[[[[]]],[1]]", "1,2,3"),
    "an object": ('{"a":{"b":null}}', "a=b"),
    "10,000 numbers": ("[" + "1," * 9_999 + "1]", "1 " * 10_000),
    "500 lists deep": ("[" * 500 + "]" * 500, "(" * 500),
}
"""Wrong values of a field."""


def encoded(text: str, syntax: str) -> str:
    """Write a text as a value of a syntax, without checks: half surrogates and control characters stay."""
    if syntax in ("json", "jsonl", "yaml"):
        return json.dumps(text)
    if syntax == "xml":
        return quoteattr(text, {'"': "&quot;"})[1:-1] if '"' in text else quoteattr(text)[1:-1]
    return '"' + text.replace('"', '""') + '"' if syntax == "csv" else text


def value_of(name: str, syntax: str) -> str:
    """Return a wrong value in a syntax."""
    as_json, as_text = VALUES[name]
    if syntax in ("json", "jsonl"):
        return str(as_json)
    if syntax == "yaml":
        return {"NaN": ".nan", "Infinity": ".inf"}.get(str(as_json), str(as_json))
    return encoded(as_text, syntax)


def fill(template: str, value: str) -> bytes:
    """Put a value into a template; half surrogates become bytes that are not UTF-8."""
    text = template.replace(MARK, value)
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def templates(text: str, syntax: str) -> Iterator[tuple[str, str, str]]:
    """Yield (field, template with a mark, template without the field) for each field of a good text."""
    if not text:
        return
    if syntax in ("json", "yaml"):
        yield from _json_templates(json.loads(text))
    elif syntax == "jsonl":
        first, _, rest = text.partition("\n")
        for field, template, without in _json_templates(json.loads(first)):
            yield field, f"{template}\n{rest}", f"{without}\n{rest}"
    elif syntax == "xml":
        yield from _xml_templates(text)
    else:
        yield from _cell_templates(text, "," if syntax == "csv" else " ")


def _json_templates(content: Any) -> Iterator[tuple[str, str, str]]:
    for address in _addresses(content, ()):
        shown = ".".join(map(str, address)) or "all"
        changed = _with(content, address, MARK)
        yield shown, json.dumps(changed).replace(f'"{MARK}"', MARK), json.dumps(_with(content, address, None))


def _addresses(content: Any, before: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the addresses of all values, of lists only that of the first element."""
    if before:
        yield before
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _addresses(value, (*before, key))
    elif isinstance(content, list) and content:
        yield from _addresses(content[0], (*before, 0))


def _with(content: Any, address: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at an address; None removes it."""
    changed = copy.deepcopy(content)
    parent = changed
    for key in address[:-1]:
        parent = parent[key]
    if value is None:
        del parent[address[-1]]
    else:
        parent[address[-1]] = value
    return changed


def _xml_templates(text: str) -> Iterator[tuple[str, str, str]]:
    root = ElementTree.fromstring(text)
    seen: set[str] = set()
    for number, element in enumerate(root.iter()):
        places = [*element.attrib, *([""] if not len(element) else [])]
        for attribute in places:
            shown = f"{element.tag}.{attribute}".rstrip(".")
            if shown in seen:
                continue
            seen.add(shown)
            yield shown, _xml_with(root, number, attribute, MARK), _xml_with(root, number, attribute, None)


def _xml_with(root: ElementTree.Element, number: int, attribute: str, value: str | None) -> str:
    changed = copy.deepcopy(root)
    element = list(changed.iter())[number]
    if value is None:
        element.attrib.pop(attribute, None)
        if not attribute:
            parent = next(parent for parent in changed.iter() if element in list(parent))
            parent.remove(element)
    elif attribute:
        element.set(attribute, value)
    else:
        element.text = value
    return ElementTree.tostring(changed, "unicode")


def _cell_templates(text: str, separator: str) -> Iterator[tuple[str, str, str]]:
    lines = text.split("\n")
    row = 1 if separator == "," else 0
    cells = lines[row].split(separator)
    for number in range(len(cells)):
        changed = [*cells[:number], MARK, *cells[number + 1 :]]
        without = [*cells[:number], *cells[number + 1 :]]
        yield (
            f"column {number}",
            "\n".join([*lines[:row], separator.join(changed), *lines[row + 1 :]]),
            "\n".join([*lines[:row], separator.join(without), *lines[row + 1 :]]),
        )
