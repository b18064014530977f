"""How vocabularies write bytes: a token of one may be part of a character, and its text alone would not tell which."""

from __future__ import annotations

from collections.abc import Sequence


def from_byte_level(token: str) -> bytes:
    """GPT-2 writes each byte as a printable character. A token with any other character is an added one and stands for itself."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def from_byte_fallback(token: str, replaced: Sequence[tuple[str, str]]) -> bytes:
    """SentencePiece's way: tokens are text with a sign for the space, and `<0x0A>` is one byte.

    Bytes that are no UTF-8 show as U+FFFD as soon as that is sure; `tokenizers` shows the whole run of byte tokens so.
    """
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes((int(token[3:5], 16),))
    for sign, text in replaced:
        token = token.replace(sign, text)
    return token.encode()


def _byte_characters() -> dict[str, int]:
    """Printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in order."""
    itself = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    return {chr(byte): byte for byte in itself} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
