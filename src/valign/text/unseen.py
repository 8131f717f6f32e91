"""Characters that render as nothing, or as an empty place, though Unicode counts some of them as letters or symbols.

Source: ``Default_Ignorable_Code_Point`` of Unicode 16 (DerivedCoreProperties.txt), and what has an empty glyph by its name.
"""

import unicodedata

_IGNORABLE = (
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F),
    (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8),
    (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
WIDE = frozenset((0x115F, 0x1160, 0x2800, 0x3164, 0xFFA0, 0x13441, 0x13442))  # Hangul fillers, Braille and hieroglyph blanks
_EMPTY = (0xFFFC, 0x16FE4, 0x1D159)  # object replacement, Khitan filler, null notehead
UNSEEN = frozenset(code for first, last in _IGNORABLE for code in range(first, last + 1)) | WIDE | frozenset(_EMPTY)


def is_unseen(char: str) -> bool:
    """Whether the character shows nothing by itself: `UNSEEN`, format and control characters; white space is not among them."""
    return ord(char) in UNSEEN or (unicodedata.category(char) in ("Cf", "Cc") and not char.isspace())
