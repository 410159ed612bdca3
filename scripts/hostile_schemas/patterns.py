"""Regular expressions that choke parsers, compilers and matchers, and a few harmless ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

HARMLESS = (
    "^[a-z]{1,4}$",
    "^\\d{3}-\\d{2}$",
    "^(red|green)+$",
    "x?yz",
    "^[^@\\s]+@[^@\\s]+$",
    "^\\w{2,8}(?: \\w+)*$",
    "^(?:[01]\\d|2[0-3]):[0-5]\\d$",
)
SIZES = (1, 2, 7, 50, 400, 3000, 20_000, 100_000)
"""How often a piece is repeated; one long pattern in some is as long as a whole schema may be."""
OPENERS = (
    "[",
    "(",
    "(?<",
    "(?P<",
    "(?:",
    "(?=",
    "{",
    "[^",
    "[[",
    "\\",
    "(?i",
    "(?#",
    "*",
    "+",
    "|",
    "^",
    "$",
    "-",
    "]",
)
INVALID = (
    *(
        "(",
        ")",
        "[",
        "]",
        "[z-a]",
        "a{2,1}",
        "a{99999999999999999999}",
        "*",
        "+?",
        "?",
        "a**",
        "\\",
        "\\q",
        "\\x",
        "\\u12",
    ),
    *(
        "(?<n",
        "(?P<1>a)",
        "(?P=n)",
        "(?z)",
        "[[:alpha:]",
        "\\p{Nonsense}",
        "\\p{",
        "a{,",
        "{1}",
        "(?(1)a|b)",
        "\ud7ff",
        "\0",
    ),
)
UNSUPPORTED = (
    *(
        "(?=a)b",
        "(?!a)b",
        "(?<=a)b",
        "(?<!a)b",
        "(a)\\1",
        "(?P<n>a)(?P=n)",
        "\\k<n>",
        "(?>a+)b",
        "a++",
        "\\bword\\b",
        "\\Bx",
    ),
    *("(?i)a", "(?s).", "(?m)^a$", "(?x) a b", "\\A\\Z", "\\Ga", "\\Ra", "\\X", "(?R)", "\\cA", "(*ACCEPT)", "\\Q[\\E"),
)
CLASSES = (
    "\\p{L}",
    "\\P{L}",
    "\\p{Han}",
    "\\p{Greek}",
    "\\w",
    "\\W",
    "\\d",
    "[^\\x00-\\x7f]",
    "[\\u{10000}-\\u{10ffff}]",
    ".",
    "\\S",
)


def pattern(random: Random) -> str:
    """One pattern of a random kind, harmless in one case of five."""
    if random.random() < 0.2:
        return random.choice(HARMLESS)
    return random.choice(KINDS)(random)


def _size(random: Random, most: int) -> int:
    return min(random.choice(SIZES), most)


def _opened(random: Random) -> str:
    """Thousands of brackets that are opened and never closed."""
    return random.choice(OPENERS) * _size(random, 100_000)


def _nested(random: Random) -> str:
    """Groups within groups, each repeated: ``((a+)+)+``."""
    levels = _size(random, 3000)
    end = random.choice((")+", ")*", "){2}", ")?", "+)+", "|b)+", "){1,3}"))
    return "(" * levels + "a" + end * levels


def _counted(random: Random) -> str:
    """Counted repetitions, one within the other or one after the other."""
    piece = random.choice(("a", ".", "\\w", "\\p{L}", "[a-z]", "(ab|cd)", "[^,]"))
    times = random.choice((2, 30, 255, 1000, 1999, 2001, 65_535, 10**6, 2**31, 10**12))
    least = random.choice((0, 1, times))
    text = f"{piece}{{{least},{times}}}"
    for _ in range(random.randrange(6)):
        text = f"(?:{text}){{{random.choice((2, 9, 100))}}}"
    return text * random.choice((1, 1, 3, 40))


def _quadratic(random: Random) -> str:
    """Patterns whose deterministic automaton has exponentially many states: ``(a|b)*a(a|b){n}``."""
    times = random.choice((5, 12, 20, 60, 500, 1900))
    return random.choice(
        (f"(a|b)*a(a|b){{{times}}}$", f".*x.{{{times}}}", f"(.*,){{{min(times, 30)}}}x", f"(\\w*\\d){{{times}}}")
    )


def _alternatives(random: Random) -> str:
    """Thousands of branches."""
    branches = _size(random, 20_000)
    return "|".join(f"{random.choice('abcxyz')}{index}" for index in range(branches))


def _classes(random: Random) -> str:
    """Unicode classes, which are thousands of ranges each, repeated."""
    return "".join(
        random.choice(CLASSES) + random.choice(("", "+", "*", "?", "{3}")) for _ in range(_size(random, 400))
    )


def _sets(random: Random) -> str:
    """Sets of many characters, ranges and escapes."""
    members = "".join(chr(random.randrange(0x20, 0xD7FF)) for _ in range(_size(random, 3000)))
    return f"[{random.choice(('', '^'))}{members}]{random.choice(('', '+', '{9}'))}"


def _long(random: Random) -> str:
    """A plain text of up to 100 kB."""
    return "".join(random.choices("abc é漢.-_", k=_size(random, 100_000)))


def _soup(random: Random) -> str:
    """Pieces of syntax in any order."""
    pieces = (*OPENERS, *CLASSES, *INVALID, "a", "b", ")", "]", "}", "{2,3}", "{1,}", "*?", "|", "\\1")
    return "".join(random.choices(pieces, k=_size(random, 400)))


KINDS: tuple[Callable[[Random], str], ...] = (
    _opened,
    _nested,
    _counted,
    _quadratic,
    _alternatives,
    _classes,
    _sets,
    _long,
    _soup,
    lambda random: random.choice(INVALID),
    lambda random: random.choice(UNSUPPORTED) * random.choice((1, 1, 50)),
)
