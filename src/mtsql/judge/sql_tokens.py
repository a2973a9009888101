"""Split SQL into tokens as the official evaluator does."""

import re


class Unparseable(Exception):
    """The text is outside the official grammar."""


# The official tokenizer (NLTK) is made for English prose. These are its rules for what is not part
# of a word. Brackets and most signs are tokens of their own. So are `,` and `:` unless a digit
# follows, and a dot at the end of a sentence.
_ALONE = r"()\[\]{}<>*;@#$%&!?«»“”„‘’‒–—―"
_TOKEN = re.compile(
    rf"""(?: [^\s{_ALONE},:.`-]
           | [,:](?=\d)
           | -(?!-)
           | \.(?! \. | [])}}>»”’\x20]*+\s*+$ | \s++[A-Z)] )
         )+
       | [{_ALONE},:] | `+ | -- | \.+""",
    re.VERBOSE,
)
_CONTRACTION = re.compile(
    r"(?i)\b(?:(can)(not)|(gim|lem)(me)|(gon)(na)|(got)(ta))\b|\b(wan)(na)(?=\s)"
)


def tokenize(text: str) -> list[str]:
    """Split a text into tokens: words in lower case, and literals as they are, in double quotes.

    Quirks: `a=3` and `a >=3` are not split before the digit, `<>` is two tokens, and a quote in a
    literal cannot be escaped. Raises Unparseable for an odd number of quotes.
    """
    text, literals = _without_literals(text)
    text = _CONTRACTION.sub(_split_contraction, text)
    tokens: list[str] = []
    for word in _TOKEN.findall(text):
        if word == "=" and tokens and tokens[-1] in ("!", ">", "<"):
            tokens[-1] += "="  # the split operators `> =`, `< =` and `! =`
        elif word in literals:
            tokens.append(literals[word])
        else:
            tokens.append(word.lower())
    return tokens


def _without_literals(text: str) -> tuple[str, dict[str, str]]:
    """The text with a placeholder word for each literal, and placeholder -> literal.

    `a = 'It is'` becomes `a = __val_1__` with `__val_1__` -> `"It is"`. A placeholder that touches
    other text, as in `a ='x'`, becomes part of that word, and its literal is lost.
    """
    pieces = text.replace("'", '"').split('"')
    if len(pieces) % 2 == 0:
        raise Unparseable("odd number of quotes")
    literals = {}
    for index in range(1, len(pieces), 2):
        placeholder = f"__val_{index}__"
        literals[placeholder] = f'"{pieces[index]}"'
        pieces[index] = placeholder
    return "".join(pieces), literals


def _split_contraction(found: re.Match) -> str:
    """`cannot` -> ` can not `."""
    parts = [part for part in found.groups() if part]
    return f" {' '.join(parts)} "
