"""A `precompiled_charsmap` as sentencepiece writes it: rules from strings to strings, in a trie.

The trie is a double array of Darts: a unit of 32 bits for each state, in which its children are
found by XOR. Read by the crate spm_precompiled.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping

_LEAF, _HAS_LEAF = 1 << 31, 1 << 8

# Some of what nmt_nfkc does: full width, ligatures, composition, white space, nothing at all.
RULES = {
    "\uff21": "A",
    "\uff41": "a",
    "\uff0c": ",",
    "\u3000": " ",
    "\xa0": " ",
    "\u2003": " ",
    "\t": " ",
    "\n": " ",
    "\r\n": " ",
    "\r": " ",
    "\ufb01": "fi",
    "\u2026": "...",
    "\xbd": "1\u20442",
    "e\u0301": "\xe9",
    "a\u0300": "\xe0",
    "\u304b\u3099": "\u304c",
    "\uff76\uff9e": "\u30ac",
    "\uff76": "\u30ab",
    "\u200b": "",
    "\xad": "",
    "\u0130": "i\u0307",
}


def charsmap(rules: Mapping[str, str]) -> str:
    """Compile rules; base64, as in tokenizer.json."""
    blob, trie = b"", dict[int, object]()
    for source, target in rules.items():
        node: dict[int, object] = trie
        for byte in source.encode():
            node = node.setdefault(byte, {})  # type: ignore[assignment]
        node[0] = len(blob)
        blob += target.encode() + b"\0"
    units, taken = dict[int, int](), {0}

    def place(node: dict[int, object], at: int, unit: int) -> None:
        base = next(b for b in range(1, 1 << 20) if not any(b ^ label in taken for label in node))
        taken.update(base ^ label for label in node)
        units[at] = unit | (at ^ base) << 10 | (_HAS_LEAF if 0 in node else 0)
        for label, child in node.items():
            if isinstance(child, dict):
                place(child, base ^ label, label)
            else:
                units[base] = _LEAF | int(str(child))

    place(trie, 0, 0)
    size = max(units) + 256
    array = struct.pack(f"<{size}I", *(units.get(at, 0) for at in range(size)))
    return base64.b64encode(struct.pack("<I", len(array)) + array + blob).decode()
