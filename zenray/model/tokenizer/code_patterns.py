"""Patterns of source code that get an entry of their own: indentation, operators, brackets, and frequent keywords."""

from __future__ import annotations

_OPERATORS = (
    "== != <= >= -> => :: && || ++ -- += -= *= /= %= |= &= ^= << >> <<= >>= ** // := ?? ?. .. ... === !== |> <- ~= @@ "
    "$("
)
_BRACKETS = "() [] {} (); [] [: ({ }) }); }, ], ), ); }; )] )) ))) ]) ]] (( ([ [( [[ {{ }} ): ]: }: (): )->"
_COMMENTS = "/* */ /** #! # /// <!-- --> \"\"\" ''' ``` </ /> \\n \\t ${ #{ %} {% {{"
_LINE_ENDS = (
    "\n",
    "\n\n",
    "\r\n",
    ":\n",
    ",\n",
    "(\n",
    "[\n",
    "{\n",
    "}\n",
    ")\n",
    ");\n",
    "):\n",
    ";\n",
    "};\n",
    "},\n",
    "],\n",
)
_KEYWORDS = (
    "abstract assert async await begin boolean break case catch char class const continue def default defer "
    "del delete do elif else elsif end enum except export extends false finally float fn for foreach from func "
    "function global goto if impl implements import in include instanceof int interface is lambda let loop "
    "match module mut namespace new nil None not null operator or override package pass private protected "
    "public raise readonly require return self sizeof static str string struct super switch template then this "
    "throw throws trait true True False try type typedef typename typeof union unless unsafe unsigned until "
    "using val var virtual void volatile when where while with yield "
)
_INDENTATION_SPACES, _INDENTATION_TABS = 48, 12


def code_patterns() -> tuple[str, ...]:
    """Every pattern of more than one byte once, in the order of its place in the code range.

    The order gives the ids: new patterns are appended.
    """
    runs = [" " * n for n in range(2, _INDENTATION_SPACES + 1)] + ["\t" * n for n in range(1, _INDENTATION_TABS + 1)]
    symbols = [*_OPERATORS.split(), *_BRACKETS.split(), *_COMMENTS.split()]
    words = [spelled for word in _KEYWORDS.split() for spelled in (word, f" {word}")]
    patterns = [*runs, *_LINE_ENDS, *symbols, *(f" {symbol}" for symbol in symbols), *words]
    return tuple(dict.fromkeys(pattern for pattern in patterns if len(pattern) > 1))
